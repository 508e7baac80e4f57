"""Lowering of the attention calls: names of targets and attributes, and the order of operands.

On the path of a call this is the last Python module before `csrc/attention` (whose `buffers.h` has the same order).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from jax_bsk.core import compat
from jax_bsk.core.library import ATTENTION_BACKWARD, ATTENTION_FORWARD
from jax_bsk.core.version import __version__


@dataclasses.dataclass(frozen=True)
class AttentionAttributes:
    """Static numbers of the attention calls.

    Attributes:
      block_q: Queries a block.
      block_kv: Keys a block.
      scale: Factor of the logits. It and the cap travel in float64, of which float64 inputs make use.
      soft_cap: Soft cap of the logits; 0 is none.
    """

    block_q: int
    block_kv: int
    scale: float
    soft_cap: float

    def encode(self) -> dict[str, Any]:
        # The version makes a cached executable of an older library miss.
        return {
            "block_q": np.int64(self.block_q),
            "block_kv": np.int64(self.block_kv),
            "scale": np.float64(self.scale),
            "soft_cap": np.float64(self.soft_cap),
            "version": __version__,
        }


_FORWARD_OPERANDS, _BACKWARD_OPERANDS = 10, 17  # with gates
NO_GATES = (1, 1, 0)  # shape of what stands in their place where there are none
NO_SINKS = (1, 0)  # likewise


def attention_forward(ctx, operands: Sequence[Any], attributes: AttentionAttributes, platform: str):
    """Lowers to the forward call.

    Operands: query, key, value, row_offsets, kv_blocks, tiles, bit_tiles, lengths, sinks (or an array of shape
    `NO_SINKS`) and, if there are any, gates. Results: out, lse, lse_rest; on CUDA also a workspace, which XLA allocates
    with the program's other buffers and nobody reads.
    """
    results = list(ctx.avals_out)
    stats = results[1].dtype
    if platform == "cuda":
        results.append(jax.core.ShapedArray((forward_workspace(ctx.avals_in[0].shape),), np.dtype(np.int32)))
    lower_ctx, operands = _without_gates(ctx, operands, _FORWARD_OPERANDS - len(operands), stats)
    lower = jax.ffi.ffi_lowering(ATTENTION_FORWARD)
    return lower(lower_ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]


def _without_gates(ctx, operands: Sequence[Any], missing: int, stats: np.dtype):
    """Appends the operands that tell the call of no gates."""
    none = np.zeros(NO_GATES, stats)
    avals = [*ctx.avals_in, *[jax.core.ShapedArray(none.shape, stats)] * missing]
    return ctx.replace(avals_in=avals), [*operands, *(compat.mlir.ir_constant(none) for _ in range(missing))]


def forward_workspace(query_shape: Sequence[int]) -> int:
    """Words of `cuda::ForwardWorkspace` in `csrc/attention/launch.cu`, which the handler checks."""
    *lead, length, heads, _ = query_shape
    return 1 + math.prod(lead) * heads * -(-length // 64)


def attention_backward(ctx, operands: Sequence[Any], attributes: AttentionAttributes, platform: str):
    """Lowers to the backward call.

    Operands: dout, query, key, value, lse, lse_rest, delta, row_offsets, kv_blocks, tiles, col_offsets, q_blocks,
    col_tiles, bit_tiles, lengths and, if there are any, row_gates and col_gates. Results: dquery, dkey, dvalue and,
    with gates, dgates in the order of col_gates; on CUDA also a workspace, as for the forward.
    """
    results = list(ctx.avals_out)
    stats, missing = ctx.avals_in[4].dtype, _BACKWARD_OPERANDS - len(operands)
    if missing:
        results.append(jax.core.ShapedArray(NO_GATES, stats))
    if platform == "cuda":
        query, key, ids = (ctx.avals_in[i].shape for i in (1, 2, 8))
        size = backward_workspace(query, key, ids, (attributes.block_q, attributes.block_kv), results[3].shape)
        results.append(jax.core.ShapedArray((size,), np.dtype(np.uint8)))
    lower_ctx, operands = _without_gates(ctx, operands, missing, stats)
    lower = jax.ffi.ffi_lowering(ATTENTION_BACKWARD)
    return lower(lower_ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]


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
