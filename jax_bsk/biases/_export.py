"""Serialisation of biases, so that exported functions (`jax.export`) may take and return them."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax.export

from jax_bsk.biases.distances import ClippedBuckets, T5Buckets

_BUCKETS = {cls.__name__: cls for cls in (T5Buckets, ClippedBuckets)}


def _written(name: str, static: tuple[tuple[str, Any], ...]) -> bytes:
    fields = {}
    for field, value in static:
        kind = type(value).__name__
        if kind not in _BUCKETS:
            raise ValueError(
                f"{name} is an argument or a result of the exported function and cannot be serialised, as its {field} "
                f"are the Python function {value!r}; make the bias inside the exported function, from its table"
            )
        fields[field] = [kind, dataclasses.asdict(value)]
    return json.dumps(fields).encode()


def _read(text: bytes) -> tuple[tuple[str, Any], ...]:
    return tuple((field, _BUCKETS[kind](**values)) for field, (kind, values) in json.loads(text).items())


def register(*classes: type) -> None:
    """Registers classes of biases, under names that saved functions refer to: a class keeps its name."""
    for cls in classes:
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jax_bsk.biases.{cls.__name__}",
            serialize_auxdata=functools.partial(_written, cls.__name__),
            deserialize_auxdata=_read,
        )
