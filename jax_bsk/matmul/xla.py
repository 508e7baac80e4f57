"""Block-sparse matrix products in plain JAX: the "xla" implementation, and what native ones are held against.

Entries are taken a few at a time in a scan, so that scratch memory is that of a few blocks' products and not of all.
Accumulation is in float32 (float64 for float64 operands).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_bsk.core import compat
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.matmul.bsr import grid_of

ENTRIES_AT_A_TIME = 32
PRECISION = jax.lax.Precision.HIGHEST  # of float32: on a GPU XLA would take tf32 by default


class Matrix(NamedTuple):
    """A block-sparse matrix as arrays.

    Attributes:
      data: [entries, bm, bk], of which a sampled product needs the shape alone.
      indptr: int32 [rows of blocks + 1].
      indices: int32 [entries].
      row_ids: int32 [entries], -1 where an entry belongs to no row.
      shape: (M, K).
    """

    data: Any
    indptr: Any
    indices: Any
    row_ids: Any
    shape: tuple[int, int]

    @property
    def block_size(self) -> tuple[int, int]:
        return self.data.shape[1], self.data.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return grid_of(self.shape, self.block_size)

    @property
    def entries(self) -> int:
        return self.data.shape[0]


def sparse_times_dense(a: Matrix, b: jax.Array, *, transposed: bool) -> jax.Array:
    """A B, or A^T B: [M or K, N] in the statistics type, from b [K or M, N].

    A row of blocks whose lists cannot be followed is NaN (transposed: a column of blocks that names no row of b).
    """
    (rows, columns), (bm, bk) = a.grid, a.block_size
    out_size, in_size = (bk, bm) if transposed else (bm, bk)
    outs, ins = (columns, rows) if transposed else (rows, columns)
    length = a.shape[1] if transposed else a.shape[0]
    dtype = statistics_dtype(a.data.dtype, b.dtype)
    row_ids, sound = _places(a)
    into, out_of = (a.indices, row_ids) if transposed else (row_ids, a.indices)
    listed = row_ids >= 0

    ins = max(ins, 1)  # one of zeros where there is none, for what the lists name all the same
    blocks = jnp.pad(b, ((0, ins * in_size - b.shape[0]), (0, 0))).reshape(ins, in_size, b.shape[1])
    data, blocks = _multipliable(without_margins(a.data, row_ids, a.indices, a.shape), blocks, dtype)

    def step(total, entries):
        data, into, out_of, use = entries
        operand = blocks[jnp.clip(out_of, 0, ins - 1)]
        form = "eij,ein->ejn" if transposed else "eij,ejn->ein"
        product = jnp.einsum(form, data, operand, precision=PRECISION, preferred_element_type=dtype)
        # A product with 0 would carry a NaN of what is not listed.
        product = jnp.where(use[:, None, None], product, 0)
        return total.at[jnp.where(use, into, outs)].add(product), None

    use = listed & sound
    total = jnp.zeros((outs + 1, out_size, b.shape[1]), dtype)
    total, _ = jax.lax.scan(step, total, _chunks((data, into, out_of, use)))
    poison = jnp.zeros(outs + 1, bool)
    if transposed:
        bad = listed & ~sound & (a.indices >= 0) & (a.indices < columns)
        poison = poison.at[jnp.where(bad, a.indices, outs)].set(True)
    else:
        poison = poison.at[:outs].set(_bad_rows(a)).at[jnp.where(listed & ~sound, row_ids, outs)].set(True)
    out = jnp.where(poison[:outs, None, None], jnp.nan, total[:outs])
    return out.reshape(outs * out_size, b.shape[1])[:length]


def sampled(a: jax.Array, b: jax.Array, pattern: Matrix) -> jax.Array:
    """The blocks of A B at the places of a pattern: [entries, bm, bk] in the statistics type.

    a is [M, L], b is [L, K]. Entries that belong to no row, or name no column, are 0.
    """
    (rows, columns), (bm, bk) = pattern.grid, pattern.block_size
    dtype = statistics_dtype(a.dtype, b.dtype)
    row_ids, sound = _places(pattern)
    use = (row_ids >= 0) & sound
    rows, columns = max(rows, 1), max(columns, 1)
    left = jnp.pad(a, ((0, rows * bm - a.shape[0]), (0, 0))).reshape(rows, bm, a.shape[1])
    right = jnp.pad(b, ((0, 0), (0, columns * bk - b.shape[1]))).reshape(b.shape[0], columns, bk)
    left, right = _multipliable(left, jnp.moveaxis(right, 1, 0), dtype)

    def step(_, entries):
        row, column, use = entries
        operands = left[jnp.clip(row, 0, rows - 1)], right[jnp.clip(column, 0, columns - 1)]
        product = jnp.einsum("eil,elj->eij", *operands, precision=PRECISION, preferred_element_type=dtype)
        return None, jnp.where(use[:, None, None], product, 0)

    _, blocks = jax.lax.scan(step, None, _chunks((row_ids, jnp.asarray(pattern.indices), use)))
    return blocks.reshape(-1, bm, bk)[: pattern.entries]


def _multipliable(a: jax.Array, b: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Factors as a platform can multiply them in batches: XLA's CPU compiler refuses some products of 16-bit types."""
    if compat.default_platform() == "cpu":
        return a.astype(dtype), b.astype(dtype)
    return a, b


def _places(a: Matrix) -> tuple[jax.Array, jax.Array]:
    """Row of each entry, and whether its column is one."""
    row_ids, indices = jnp.asarray(a.row_ids), jnp.asarray(a.indices)
    return row_ids, (indices >= 0) & (indices < a.grid[1])


def _bad_rows(a: Matrix) -> jax.Array:
    indptr = jnp.asarray(a.indptr)
    begin, end = indptr[:-1], indptr[1:]
    return (end < begin) | (begin < 0) | (end > a.entries)


def without_margins(data: jax.Array, row_ids: jax.Array, indices: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The blocks with zeros where they stick out of the shape.

    Args:
      data: [..., entries, bm, bk].
      row_ids: int32 [..., entries].
      indices: int32 [..., entries].
      shape: (M, K).
    """
    (m, k), (bm, bk) = shape, data.shape[-2:]

    def inside(blocks: jax.Array, size: int, length: int) -> jax.Array:
        return blocks[..., None] * size + of_rank(jnp.arange(size, dtype=jnp.int32), blocks.ndim + 1) < length

    if m % bm:
        data = jnp.where(inside(row_ids, bm, m)[..., :, None], data, 0)
    if k % bk:
        data = jnp.where(inside(indices, bk, k)[..., None, :], data, 0)
    return data


def _chunks(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """[entries, ...] as [steps, ENTRIES_AT_A_TIME, ...]; what is added is False, 0."""
    count = arrays[0].shape[0]
    size = max(1, min(ENTRIES_AT_A_TIME, count))
    steps = -(-count // size)

    def cut(x):
        padded = jnp.pad(x, ((0, steps * size - count), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(steps, size, *x.shape[1:])

    return tuple(cut(jnp.asarray(x)) for x in arrays)
