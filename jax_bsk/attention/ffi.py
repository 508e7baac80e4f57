"""The attention calls as `csrc/attention` knows them: names, operands, attributes and workspaces.

On the path of a call this is the last Python module before `csrc/attention`, whose `buffers.h` reads the operands in
the same order.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_bsk.core import library
from jax_bsk.core.dims import Dims
from jax_bsk.core.dtypes import statistics_dtype

ATTENTION_FORWARD = "jax_bsk_attention_forward"
ATTENTION_DELTA = "jax_bsk_attention_delta"
ATTENTION_BACKWARD = "jax_bsk_attention_backward"
ATTENTION_BIAS_GRADIENT = "jax_bsk_attention_bias_gradient"

# Shapes of what stands for an operand that is not given.
NO_GATES = (1, 1, 0)
NO_SINKS = (1, 0)
NO_LSE_COTANGENT = (1, 1, 0)
NO_DENSE_BIAS = (1, 1, 1, 0)
NO_DISTANCE_BIAS = (1, 1, 0)
NO_BIAS_TILES = (1, 1, 0, 1, 0)
NO_BIAS_TILE_NUMBERS = (1, 1, 0)
NO_DROPOUT_KEYS = (1, 0)

# Letters: B examples, T queries, S keys, N query heads, K key/value heads (see `core.dims`). Gates are one number per
# entry of the lists.
_ROWS = {"row_offsets": "bn.", "kv_blocks": "bn.", "tiles": "bn."}
_COLUMNS = {"col_offsets": "bn.", "q_blocks": "bn.", "col_tiles": "bn."}
_REST = {"bit_tiles": "bn...", "lengths": "b."}
# Keys that a shard is given are any of all: the shard itself takes those numbers of the dense bias.
_BIAS = {"dense_bias": "bnt.", "distance_bias": "bn.", "bias_tiles": "bn..."}
_BIAS_SHARED = tuple((name,) for name in _BIAS)
# Numbers of bias tiles share tables with the lists; those that are not given share nothing.
_ROW_BIAS = {"row_bias_tiles": "bn."}
_COLUMN_BIAS = {"col_bias_tiles": "bn."}
_DROPOUT = {"dropout_keys": "bn"}

FORWARD = Dims(
    operands={
        "query": "BTN.",
        "key": "BSK.",
        "value": "BSK.",
        **_ROWS,
        **_REST,
        "sinks": "bn",
        "gates": "bn.",
        **_BIAS,
        **_ROW_BIAS,
        **_DROPOUT,
    },
    results={"out": "BTN.", "lse": "BNT", "lse_rest": "BNT"},
    shared=((*_ROWS, *_ROW_BIAS), ("bit_tiles",), ("lengths",), ("sinks",), *_BIAS_SHARED),
    follow=("query",),
)
# A row sum depends on nothing but its row, so that batch, queries and heads split wherever they lie.
DELTA = Dims(
    operands={"dout": "BTN.", "out": "BTN.", "dlse": "bnt"},
    results={"delta": "BNT"},
    follow=("out", "dout"),
)
BACKWARD = Dims(
    operands={
        "dout": "BTN.",
        "query": "BTN.",
        "key": "BSK.",
        "value": "BSK.",
        "lse": "BNT",
        "lse_rest": "BNT",
        "delta": "BNT",
        **_ROWS,
        **_COLUMNS,
        **_REST,
        "row_gates": "bn.",
        "col_gates": "bn.",
        **_BIAS,
        **_ROW_BIAS,
        **_COLUMN_BIAS,
        **_DROPOUT,
    },
    results={"dquery": "BTN.", "dkey": "BSK.", "dvalue": "BSK.", "dgates": "bn."},
    # Kernels read the lists of both orders with one count of examples.
    shared=((*_ROWS, *_COLUMNS, *_ROW_BIAS, *_COLUMN_BIAS), ("bit_tiles",), ("lengths",), *_BIAS_SHARED),
    follow=("query",),
)


class BiasTerm(enum.IntEnum):
    """The term of a bias whose gradient is asked for; numbered as in C++."""

    DENSE = 0
    DISTANCES = 1
    TILES = 2


def _bias_gradient(operand: str, letters: str) -> Dims:
    """The call of one term, whose result has the term's dimensions: where the term is shared, the sum over who shares.

    Under `vmap` the term is given to each mapped example (it is in no group of operands that stay as they are).
    """
    return Dims(
        operands={
            "dout": "BTN.",
            "query": "BTN.",
            "key": "BSK.",
            "value": "BSK.",
            "lse": "BNT",
            "lse_rest": "BNT",
            "delta": "BNT",
            **_ROWS,
            **_REST,
            "gates": "bn.",
            **_BIAS,
            **_ROW_BIAS,
            **_DROPOUT,
        },
        results={"dbias": letters},
        shared=(
            (*_ROWS, *_ROW_BIAS),
            ("bit_tiles",),
            ("lengths",),
            *((name,) for name in _BIAS if name != operand),
        ),
        follow=("query",),
        like={"dbias": operand},
    )


BIAS_GRADIENT = {
    BiasTerm.DENSE: _bias_gradient("dense_bias", "bnt."),
    BiasTerm.DISTANCES: _bias_gradient("distance_bias", "bn.."),
    BiasTerm.TILES: _bias_gradient("bias_tiles", "bn..."),
}


@dataclasses.dataclass(frozen=True)
class AttentionAttributes:
    """Static numbers of the attention calls.

    Attributes:
      block_q: Queries per block.
      block_kv: Keys per block.
      scale: Factor of the logits. It and the cap travel in float64, of which float64 inputs make use.
      soft_cap: Soft cap of the logits; 0 is none.
      dropout: Share of the probabilities that are dropped, in 256ths; 0 is none.
    """

    block_q: int
    block_kv: int
    scale: float
    soft_cap: float
    dropout: int = 0

    def encode(self) -> dict[str, Any]:
        """The attributes of the custom call."""
        return {
            "block_q": np.int64(self.block_q),
            "block_kv": np.int64(self.block_kv),
            "scale": np.float64(self.scale),
            "soft_cap": np.float64(self.soft_cap),
            "dropout": np.int64(self.dropout),
        }


def _distance_tables(shape: Sequence[int]) -> int:
    """Tables of a bias by distance, 0 without one."""
    return math.prod(shape[:-1]) if shape[-1] else 0


def forward_workspace(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    value_dim: int,
    block_size: tuple[int, int],
    distances_shape: Sequence[int] = NO_DISTANCE_BIAS,
) -> int:
    """Bytes of the forward's workspace on CUDA."""
    *lead, q_len, heads, _ = query_shape
    kv_len, kv_heads = key_shape[-3:-1]
    return library.workspace(
        ATTENTION_FORWARD,
        batch=math.prod(lead),
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        value_dim=value_dim,
        block_q=block_size[0],
        distance_tables=_distance_tables(distances_shape),
    )


def backward_workspace(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    ids_shape: Sequence[int],
    block_size: tuple[int, int],
    gates_shape: Sequence[int] = NO_GATES,
    distances_shape: Sequence[int] = NO_DISTANCE_BIAS,
) -> int:
    """Bytes of the backward's workspace on CUDA: what the kernels need at least, and more for speed."""
    *lead, q_len, heads, head_dim = query_shape
    kv_len, kv_heads = key_shape[-3:-1]
    return library.workspace(
        ATTENTION_BACKWARD,
        batch=math.prod(lead),
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        block_q=block_size[0],
        block_kv=block_size[1],
        tables=math.prod(ids_shape[:-1]),
        capacity=ids_shape[-1],
        gates=math.prod(gates_shape),
        distance_tables=_distance_tables(distances_shape),
    )


def backward_dlogits(group: int, capacity: int, block_size: tuple[int, int]) -> int:
    """Bytes of the backward's workspace on CUDA for dS: what kernels need for any number of key/value heads.

    It is what `backward_workspace` allocates for many heads without tokens, where nothing but the lists counts. Where
    kernels need less than 2 GiB, room for more heads at a time is part of it, up to those 2 GiB.

    Args:
      group: Query heads per key/value head.
      capacity: Entries of each list.
      block_size: (block_q, block_kv).
    """
    kv_heads = 8
    return backward_workspace((1, 0, group * kv_heads, 0), (1, 0, kv_heads, 0), (1, 1, capacity), block_size)


def no_bias(dtype: Any) -> tuple[np.ndarray, ...]:
    """What stands for the three terms of a bias that is not given."""
    stats = statistics_dtype(dtype)
    return tuple(np.zeros(shape, stats) for shape in (NO_DENSE_BIAS, NO_DISTANCE_BIAS, NO_BIAS_TILES))


def no_bias_tile_numbers() -> np.ndarray:
    """What stands for the tiles of entries."""
    return np.zeros(NO_BIAS_TILE_NUMBERS, np.int32)


def no_dropout() -> np.ndarray:
    """What stands for the keys of dropout."""
    return np.zeros(NO_DROPOUT_KEYS, np.uint32)
