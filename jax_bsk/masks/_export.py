"""Serialisation of masks, so that exported functions (`jax.export`) may take and return them.

Structure is written as JSON: the names of all fields, those that are children, and the static values. JSON has no
tuples, and no static field is a list, so lists are read as tuples.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax.export


def _written(name: str, structure: Any) -> bytes:
    try:
        return json.dumps(structure).encode()
    except TypeError:
        functions = ", ".join(repr(value) for _, value in structure[2] if callable(value))
        raise ValueError(
            f"{name} is an argument or a result of the exported function and cannot be serialised, as it holds the "
            f"Python function {functions}; make the mask inside the exported function, or pass mask.bind(...), its "
            "BlockMask"
        ) from None


def _read(text: bytes) -> Any:
    return _tuples(json.loads(text))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def register(*classes: type) -> None:
    """Registers classes of masks, under names that saved functions refer to: a class keeps its name."""
    for cls in classes:
        jax.export.register_pytree_node_serialization(
            cls,
            serialized_name=f"jax_bsk.masks.{cls.__name__}",
            serialize_auxdata=functools.partial(_written, cls.__name__),
            deserialize_auxdata=_read,
        )
