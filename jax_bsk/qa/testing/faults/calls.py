"""Calls of the public function under a fault, what they should give, and the valid call that ends every scenario.

Below every scenario. What is expected comes from the float64 oracle. Masks and lengths are arguments of the jitted
call, as a traced computation would hand them on, so that scenarios of the same shapes share one compilation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.testing import battery
from jax_bsk.qa.testing.cases import Case
from jax_bsk.qa.testing.oracle import attention_oracle

BLOCK = 64  # every implementation takes it
HEAD_SIZE = 16
Results = dict[str, np.ndarray]
RESULTS: tuple[str, ...] = ("out", "lse", "dq", "dk", "dv")


def dtypes(implementation: str) -> tuple[str, ...]:
    """Types that reach different kernels: on Hopper the 16-bit ones have kernels of their own."""
    return ("float32", "bfloat16") if implementation == "cuda" else ("float32",)


@dataclasses.dataclass(frozen=True)
class Operands:
    """query, key, value and the cotangent of out, [1, length, 2, HEAD_SIZE] each unless replaced."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    dout: np.ndarray

    @classmethod
    def random(cls, dtype: str, q_len: int, kv_len: int, *, batch: int = 1, heads: int = 2, seed: int = 0) -> Operands:
        rng = np.random.default_rng(seed)
        shapes = [(batch, n, heads, HEAD_SIZE) for n in (q_len, kv_len, kv_len, q_len)]
        return cls(*(rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes))

    @property
    def dtype(self) -> str:
        return self.query.dtype.name


def attend(
    operands: Operands, mask: Any, implementation: str, lengths: Any = None, gates: Any = None, sinks: Any = None
) -> dict[str, np.ndarray]:
    """out [B, T, N, H], lse [B, N, T], dq, dk, dv and, with gates and sinks, dgates and dsinks of a jitted call.

    `lengths` is int [B, 2], by default all; `gates` [B|1, N|1, capacity]; `sinks` [N].
    """
    if lengths is None:
        lengths = [[operands.query.shape[1], operands.key.shape[1]]] * operands.query.shape[0]
    arrays = (operands.query, operands.key, operands.value, operands.dout)
    data = jax.tree.map(jnp.asarray, (mask, np.asarray(lengths, np.int32), gates, sinks))
    results = _step(implementation)(*arrays, *data)
    return {name: np.asarray(x) for name, x in results.items()}


@functools.cache
def _step(implementation: str):
    return jax.jit(functools.partial(call, implementation=implementation))


def call(
    query, key, value, dout, mask, lengths, gates=None, sinks=None, *, implementation: str
) -> dict[str, jax.Array]:
    """One call with its gradients; not jitted."""

    def forward(query, key, value, gates, sinks):
        return sparse_attention(
            query,
            key,
            value,
            mask=mask,
            query_seq_lengths=lengths[:, 0],
            key_value_seq_lengths=lengths[:, 1],
            gates=gates,
            sinks=sinks,
            implementation=cast(Implementation | None, implementation),
            return_residual=True,
        )

    (out, lse), pullback = jax.vjp(forward, query, key, value, gates, sinks)
    gradients = pullback((dout, jnp.zeros_like(lse)))
    names = (*RESULTS, "dgates", "dsinks")
    results = zip(names, (out, jnp.swapaxes(lse, 1, 2), *gradients), strict=True)
    return {name: x for name, x in results if x is not None}


def listed(
    mask: BlockMask, implementation: str, gates: np.ndarray | None = None, *, as_if: BlockMask | None = None
) -> Iterator[tuple[str, Results, Results]]:
    """For each type: its name, results of a call with random operands, and what they must be.

    Args:
      mask: its lists, square and of heads and examples alike.
      implementation: "xla", "cpu" or "cuda".
      gates: as in `attend`.
      as_if: the mask whose lists say what the results must be; by default the same.
    """
    for dtype in dtypes(implementation):
        operands = Operands.random(dtype, mask.q_len, mask.kv_len)
        results = (
            attend(operands, mask, implementation, None, gates)
            if gates is not None
            else attend(operands, mask, implementation)
        )
        yield dtype, results, as_listed(operands, mask if as_if is None else as_if, gates)


def as_listed(operands: Operands, mask: BlockMask, gates: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """float64 results of a mask's lists followed to the letter: duplicates count twice, the order of ids is free.

    Rows that cannot be followed are NaN and give keys nothing. For lists shared by all heads and examples.
    """
    query, key, value, dout = operands.query, operands.key, operands.value, operands.dout
    shapes = {"out": query.shape, "dq": query.shape, "dk": key.shape, "dv": value.shape}
    results: dict[str, np.ndarray] = {name: np.zeros(shape) for name, shape in shapes.items()}
    if gates is not None:
        results["dgates"] = np.zeros(gates.shape)
    results["lse"] = np.full((query.shape[0], query.shape[2], query.shape[1]), -np.inf)
    for row in range(mask.nq):
        queries = np.arange(row * mask.block_q, min((row + 1) * mask.block_q, mask.q_len))
        entries = listed_entries(mask, row)
        if entries is None:
            results["out"][:, queries] = results["dq"][:, queries] = results["lse"][:, :, queries] = np.nan
            continue
        if not entries:
            continue
        positions = [np.arange(i * mask.block_kv, min((i + 1) * mask.block_kv, mask.kv_len)) for i, _ in entries]
        attends = [_bits(mask, tile)[: queries.size, : p.size] for (_, tile), p in zip(entries, positions, strict=True)]
        keys = np.concatenate(positions)
        own = slice(*np.asarray(mask.row_offsets)[0, 0, row : row + 2])
        numbers = np.repeat(np.arange(len(entries)), [p.size for p in positions])
        part = attention_oracle(
            query[:, queries],
            key[:, keys],
            value[:, keys],
            np.concatenate(attends, axis=1)[None, None],
            scale=1 / math.sqrt(query.shape[-1]),
            dout=dout[:, queries],
            gates=None if gates is None else gates[..., own],
            entries=np.broadcast_to(numbers, (1, 1, queries.size, keys.size)),
        ).values
        results["out"][:, queries], results["lse"][:, :, queries] = part["out"], part["lse"]
        results["dq"][:, queries] = part["dq"]
        if gates is not None:
            results["dgates"][..., own] += part["dgates"]
        for at, position in enumerate(keys):  # one by one: a key may be there twice
            results["dk"][:, position] += part["dk"][:, at]
            results["dv"][:, position] += part["dv"][:, at]
    return results


def listed_entries(mask: BlockMask, row: int) -> list[tuple[int, int]] | None:
    """(key block, bit tile) of each entry of a row; None where the row cannot be followed."""
    begin, end = (int(x) for x in np.asarray(mask.row_offsets)[0, 0, row : row + 2])
    ids, tiles = np.asarray(mask.kv_blocks)[0, 0], np.asarray(mask.tiles)[0, 0]
    if not 0 <= begin <= end <= ids.size:
        return None
    entries = [(int(i), int(t)) for i, t in zip(ids[begin:end], tiles[begin:end], strict=True)]
    count = mask.bit_tiles.shape[2]
    sound = all(0 <= i < mask.nk and -1 <= t < count for i, t in entries)
    return entries if sound else None


def _bits(mask: BlockMask, tile: int) -> np.ndarray:
    if tile < 0:
        return np.ones((mask.block_q, mask.block_kv), bool)
    words = np.ascontiguousarray(np.asarray(mask.bit_tiles)[0, 0, tile])
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(bool)


# ---- the valid call ---------------------------------------------------------------------------------------------


def check_valid_call(implementation: str) -> None:
    """A call without a fault, values and gradients, against the oracle by the tolerance rule."""
    for dtype in dtypes(implementation):
        case = dataclasses.replace(_VALID, dtype=dtype)
        judged = battery.judge_case(case, _valid_call(implementation), traced_mask=True)
        assert judged.ok, f"the next valid call is wrong ({dtype})\n{judged}\n{case}"


_VALID = Case(
    "valid call",
    q_len=2 * BLOCK + 2,
    kv_len=3 * BLOCK - 2,
    kv_heads=1,
    head_size=HEAD_SIZE,
    value_size=HEAD_SIZE,
    block_q=BLOCK,
    block_kv=BLOCK,
)
_valid_call = functools.cache(battery.from_public)  # one function, so that its compiled programs are kept
