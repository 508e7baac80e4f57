"""The attention calls as `csrc/attention` knows them: names, operands, attributes and workspaces.

On the path of a call this is the last Python module before `csrc/attention`, whose `buffers.h` reads the operands in
the same order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_bsk.core.dims import Dims

ATTENTION_FORWARD = "jax_bsk_attention_forward"
ATTENTION_BACKWARD = "jax_bsk_attention_backward"

# Shapes of what stands for an operand that is not given.
NO_GATES = (1, 1, 0)
NO_SINKS = (1, 0)

# Letters: B examples, N query heads, K key/value heads (see `core.dims`). Gates are one number per entry of the lists.
_ROWS = {"row_offsets": "bn.", "kv_blocks": "bn.", "tiles": "bn."}
_COLUMNS = {"col_offsets": "bn.", "q_blocks": "bn.", "col_tiles": "bn."}
_REST = {"bit_tiles": "bn...", "lengths": "b."}

FORWARD = Dims(
    operands={"query": "B.N.", "key": "B.K.", "value": "B.K.", **_ROWS, **_REST, "sinks": "bn", "gates": "bn."},
    results={"out": "B.N.", "lse": "BN.", "lse_rest": "BN."},
    shared=(tuple(_ROWS), ("bit_tiles",), ("lengths",), ("sinks",)),
    follow=("query",),
)
BACKWARD = Dims(
    operands={
        "dout": "B.N.",
        "query": "B.N.",
        "key": "B.K.",
        "value": "B.K.",
        "lse": "BN.",
        "lse_rest": "BN.",
        "delta": "BN.",
        **_ROWS,
        **_COLUMNS,
        **_REST,
        "row_gates": "bn.",
        "col_gates": "bn.",
    },
    results={"dquery": "B.N.", "dkey": "B.K.", "dvalue": "B.K.", "dgates": "bn."},
    # Kernels read the lists of both orders with one count of examples.
    shared=((*_ROWS, *_COLUMNS), ("bit_tiles",), ("lengths",)),
    follow=("query",),
)


@dataclasses.dataclass(frozen=True)
class AttentionAttributes:
    """Static numbers of the attention calls.

    Attributes:
      block_q: Queries per block.
      block_kv: Keys per block.
      scale: Factor of the logits. It and the cap travel in float64, of which float64 inputs make use.
      soft_cap: Soft cap of the logits; 0 is none.
    """

    block_q: int
    block_kv: int
    scale: float
    soft_cap: float

    def encode(self) -> dict[str, Any]:
        """The attributes of the custom call."""
        return {
            "block_q": np.int64(self.block_q),
            "block_kv": np.int64(self.block_kv),
            "scale": np.float64(self.scale),
            "soft_cap": np.float64(self.soft_cap),
        }


def forward_workspace(query_shape: Sequence[int]) -> int:
    """Words of `cuda::ForwardWorkspace` in `csrc/attention/launch.cu`, which the handler checks."""
    *lead, length, heads, _ = query_shape
    return 1 + math.prod(lead) * heads * -(-length // 64)


def backward_workspace(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    ids_shape: Sequence[int],
    block_size: tuple[int, int],
    gates_shape: Sequence[int] = NO_GATES,
) -> int:
    """Bytes for the CUDA backward: what `BackwardLayout` in `csrc/attention/sm90/bwd_plan.h` needs, and more for speed.

    The kernels keep dS (the gradient of the logits, in query's type) of three key/value heads' visited blocks or more;
    they are as fast as they can be with as many heads in each third as `BackwardLayout` calls enough. More than twice
    what dQ takes in float32, or 2 GiB, is spent on that only where three heads need it. So the workspace grows as the
    inputs and the visited blocks do. With gates come four partial sums of each 64 x 64 pairs of each visited block.
    """
    *lead, q_len, heads, head_dim = query_shape
    kv_len, kv_heads = key_shape[-3:-1]
    query_rows, kv_rows = math.prod(lead) * heads, math.prod(lead) * kv_heads
    q_tiles, kv_tiles = -(-q_len // 64), -(-kv_len // 64)
    words = 1 + 2 * kv_rows + 3 * kv_rows * kv_tiles + query_rows * q_tiles * 193 + 2 * math.prod(ids_shape) + 33
    words += 4 * math.prod(gates_shape) * math.prod(-(-size // 64) for size in block_size)
    head_bytes = 2 * math.prod(block_size) * ids_shape[-1] * (heads // max(kv_heads, 1))
    enough = max(-(-1056 // max(-(-kv_len // 128), 1)), -(-264 * -(-q_len // block_size[0]) // max(ids_shape[-1], 1)))
    wanted = min(kv_rows, 3 * enough, max(3, max(8 * query_rows * q_len * head_dim, 2 << 30) // max(head_bytes, 1)))
    return 4 * words + 1024 + wanted * max(head_bytes, 1)
