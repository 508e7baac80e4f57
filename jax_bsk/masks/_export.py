"""Serialisation of masks, so that exported functions (`jax.export`) may take and return them.

Structure is written as JSON: the names of all fields, those that are children, and the static values. JSON has no
tuples, and no static field is a list, so lists are read as tuples.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.export

from jax_bsk.masks.algebra import AndMask, MultiHeadMask, NotMask, OrMask
from jax_bsk.masks.block_mask import BlockMask
from jax_bsk.masks.data_masks import ArrayMask, BlockArrayMask, SegmentMask
from jax_bsk.masks.function_mask import FunctionMask
from jax_bsk.masks.patterns import (
    BigBirdMask,
    CausalMask,
    ChunkedMask,
    DilatedMask,
    FullMask,
    GlobalMask,
    LocalMask,
    PrefixLMMask,
)

__all__: list[str] = []  # imported for what it registers


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


# The names are those that saved functions refer to: they do not change.
for _class in (
    ArrayMask,
    BigBirdMask,
    BlockArrayMask,
    BlockMask,
    CausalMask,
    ChunkedMask,
    DilatedMask,
    FullMask,
    FunctionMask,
    GlobalMask,
    LocalMask,
    MultiHeadMask,
    PrefixLMMask,
    SegmentMask,
    AndMask,
    OrMask,
    NotMask,
):
    jax.export.register_pytree_node_serialization(
        _class,
        serialized_name=f"jax_bsk.masks.{_class.__name__}",
        serialize_auxdata=functools.partial(_written, _class.__name__),
        deserialize_auxdata=_read,
    )
