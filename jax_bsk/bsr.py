"""`BSR`: a block-sparse matrix as an array of blocks and their places, a pytree.

The lists have `BlockMask`'s conventions: row-major, ids ascending within a row as the constructors make them; entries
past `indptr[-1]` belong to no row and are -1. The arrays may be traced; sizes are static.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from typing import Any, Self

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jax_bsk.masks.algebra import is_traced


@dataclasses.dataclass(frozen=True, eq=False)
class BSR:
    """A matrix of which only some blocks are stored (block compressed sparse rows, as `scipy.sparse.bsr_array`).

    Attributes:
      data: [entries, bm, bk] the blocks, row by row; what sticks out of the shape counts as 0.
      indptr: int32 [rows of blocks + 1], where each row's entries begin, and the last one's end.
      indices: int32 [entries], the column of blocks of each entry.
      shape: (M, K) of the matrix; they need not be multiples of the block.
      column_lists: the same places column by column, as `columns` gives them, which products with the transpose walk
        (and so the derivatives of all). The constructors with values fill it in; None where it is not known, then it is
        made where it is needed (with traced lists by a sort on the device, in every call).
    """

    data: Any
    indptr: Any
    indices: Any
    shape: tuple[int, int]
    column_lists: tuple[Any, Any, Any] | None = None

    def __post_init__(self) -> None:
        if not all(hasattr(x, "shape") for x in (self.data, self.indptr, self.indices)):
            return  # inside a transformation of the pytree
        if len(self.data.shape) != 3 or self.data.shape[:1] != self.indices.shape:
            raise ValueError(
                f"data is [entries, bm, bk] and indices [entries]; got {self.data.shape} and {self.indices.shape}"
            )
        if self.indptr.shape != (self.grid[0] + 1,):
            raise ValueError(
                f"indptr has {self.grid[0] + 1} numbers for {self.shape[0]} rows in blocks of {self.block_size[0]}, "
                f"got {self.indptr.shape}"
            )

    # ---- Facts

    @property
    def block_size(self) -> tuple[int, int]:
        """(bm, bk)."""
        return self.data.shape[1], self.data.shape[2]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        (m, k), (bm, bk) = self.shape, self.block_size
        return -(-m // bm), -(-k // bk)

    @property
    def entries(self) -> int:
        """Blocks that there is room for."""
        return self.data.shape[0]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.data.dtype)

    @property
    def density(self) -> float:
        """Stored blocks / all blocks. Needs values."""
        rows, columns = self.grid
        return int(np.asarray(self.indptr)[-1]) / max(rows * columns, 1)

    def __repr__(self) -> str:
        return f"BSR(shape={self.shape}, block_size={self.block_size}, entries={self.entries}, dtype={self.dtype})"

    # ---- Constructors

    @classmethod
    def from_dense(cls, array: Any, block_size: int | tuple[int, int] = 128, *, keep: Any = None) -> Self:
        """The blocks of a matrix that have a number other than 0, or those that `keep` names.

        Args:
          array: [M, K].
          block_size: of either side, or (rows, columns).
          keep: bool [rows of blocks, columns of blocks], with values; None keeps what is not 0.
        """
        bm, bk = pair_of(block_size)
        if array.ndim != 2:
            raise ValueError(f"array is a matrix [M, K], got {array.shape}")
        xp = jnp if isinstance(array, jax.Array) else np
        m, k = array.shape
        rows, columns = -(-m // bm), -(-k // bk)
        padded = xp.pad(array, ((0, rows * bm - m), (0, columns * bk - k)))
        blocks = padded.reshape(rows, bm, columns, bk).swapaxes(1, 2)
        if keep is None:
            keep = (blocks != 0).any((2, 3))
        if is_traced(keep):
            raise TypeError("which blocks are kept decides the sizes of arrays; give `keep` with values")
        keep = np.asarray(keep, bool)
        if keep.shape != (rows, columns):
            raise ValueError(f"keep is a bool for each block, {(rows, columns)}, got {keep.shape}")
        places = np.nonzero(keep)
        indptr = np.concatenate([[0], keep.sum(1).cumsum()]).astype(np.int32)
        return cls(blocks[places], indptr, places[1].astype(np.int32), (m, k)).with_column_lists()

    @classmethod
    def random(
        cls, key: jax.Array, shape: tuple[int, int], density: float, block_size: int | tuple[int, int] = 128, dtype=None
    ) -> Self:
        """Normal numbers in blocks drawn at random: as many as give that density, to half a block."""
        bm, bk = pair_of(block_size)
        rows, columns = -(-shape[0] // bm), -(-shape[1] // bk)
        count = round(density * rows * columns)
        if not 0 <= count <= rows * columns:
            raise ValueError(f"density is in [0, 1], got {density}")
        draw, numbers = jax.random.split(key)
        chosen = np.sort(np.asarray(jax.random.permutation(draw, rows * columns)[:count]))
        indptr = np.searchsorted(chosen, np.arange(rows + 1) * columns).astype(np.int32)
        data = jax.random.normal(numbers, (count, bm, bk), dtype or jnp.float32)
        return cls(data, indptr, (chosen % columns).astype(np.int32), (shape[0], shape[1])).with_column_lists()

    @classmethod
    def from_scipy(cls, array: Any) -> Self:
        """Of a `scipy.sparse.bsr_array` (or what has its `data`, `indptr`, `indices`); its ids are sorted."""
        array = array.copy()
        array.sort_indices()
        lists = array.indptr.astype(np.int32), array.indices.astype(np.int32)
        return cls(array.data, *lists, tuple(array.shape)).with_column_lists()

    @classmethod
    def from_jax(cls, array: Any, block_size: int | tuple[int, int] = 128) -> Self:
        """Of a matrix of `jax.experimental.sparse` (BCOO, BCSR, ..): the blocks that have a number other than 0."""
        return cls.from_dense(array.todense(), block_size)

    def to_jax(self) -> Any:
        """As a `jax.experimental.sparse.BCOO` of this matrix, an index for each number of a stored block."""
        from jax.experimental.sparse import BCOO

        (m, k), (bm, bk) = self.shape, self.block_size
        rows, columns = jnp.asarray(self.row_ids()), jnp.asarray(self.indices)
        row = rows[:, None, None] * bm + jnp.arange(bm)[None, :, None]
        column = columns[:, None, None] * bk + jnp.arange(bk)[None, None]
        row, column = jnp.broadcast_arrays(row, column)
        inside = (rows >= 0)[:, None, None] & (row < m) & (column >= 0) & (column < k)
        # An index out of range is BCOO's padding.
        places = jnp.stack([jnp.where(inside, row, m), jnp.where(inside, column, k)], -1).reshape(-1, 2)
        return BCOO((jnp.where(inside, self.data, 0).reshape(-1), places), shape=self.shape)

    def to_scipy(self) -> Any:
        """As a `scipy.sparse.bsr_array`; the shape must be of whole blocks."""
        from scipy.sparse import bsr_array

        end = int(np.asarray(self.indptr)[-1])
        parts = (np.asarray(self.data)[:end], np.asarray(self.indices)[:end], np.asarray(self.indptr))
        return bsr_array(parts, shape=self.shape)

    def to_dense(self) -> jax.Array:
        """[M, K]; entries that belong to no row count for nothing, blocks listed twice are summed."""
        (rows, columns), (bm, bk) = self.grid, self.block_size
        row_ids = self.row_ids()
        listed = (row_ids >= 0) & (row_ids < rows) & (self.indices >= 0) & (self.indices < columns)
        place = jnp.where(listed, row_ids * columns + self.indices, rows * columns)
        data = jnp.asarray(self.data)
        blocks = jnp.zeros((rows * columns + 1, bm, bk), data.dtype).at[place].add(data)[:-1]
        dense = blocks.reshape(rows, columns, bm, bk).swapaxes(1, 2).reshape(rows * bm, columns * bk)
        return dense[: self.shape[0], : self.shape[1]]

    # ---- Views

    def with_data(self, data: Any) -> Self:
        """The same places with other blocks."""
        return dataclasses.replace(self, data=data)

    def astype(self, dtype: Any) -> Self:
        return self.with_data(jnp.asarray(self.data).astype(dtype))

    def with_column_lists(self) -> Self:
        """The same with `column_lists`, unless its lists are traced."""
        if is_traced(self.indptr) or is_traced(self.indices):
            return self
        return dataclasses.replace(self, column_lists=self.columns())

    def row_ids(self) -> Any:
        """int32 [entries]: the row of each; -1 past the end, and in rows whose offsets cannot be followed."""
        xp = jnp if is_traced(self.indptr) else np
        offsets = xp.asarray(self.indptr)
        begin, end = offsets[:-1], offsets[1:]
        sound = (begin >= 0) & (begin < end) & (end <= self.entries)
        # Rows without entries begin past all of them, and one more, so that there always is one.
        begin = xp.concatenate([xp.where(sound, begin, self.entries), xp.full(1, self.entries, offsets.dtype)])
        end = xp.concatenate([end, xp.zeros(1, offsets.dtype)])
        entry = xp.arange(self.entries, dtype=offsets.dtype)
        order = xp.argsort(begin, stable=True)
        row = order[xp.searchsorted(begin[order], entry, side="right") - 1]
        return xp.where((begin[row] <= entry) & (entry < end[row]), row, -1).astype(np.int32)

    def columns(self) -> tuple[Any, Any, Any]:
        """The same lists column by column: offsets [columns + 1], rows [entries], and which entry each one is.

        Entries that belong to no row, or name no column, are left out: what is past the end is -1.
        """
        if self.column_lists is not None:
            return self.column_lists
        xp = jnp if is_traced(self.indptr) or is_traced(self.indices) else np
        rows, indices, count = xp.asarray(self.row_ids()), xp.asarray(self.indices), self.grid[1]
        column = xp.where((rows >= 0) & (indices >= 0) & (indices < count), indices, count)
        order = xp.argsort(column, stable=True).astype(np.int32)
        column = column[order]
        offsets = xp.searchsorted(column, xp.arange(count + 1, dtype=column.dtype)).astype(np.int32)
        listed = column < count
        return offsets, xp.where(listed, rows[order], -1), xp.where(listed, order, -1)

    @property
    def T(self) -> Self:
        """The transposed matrix; its blocks are copied."""
        offsets, rows, entries = self.columns()
        data = jnp.swapaxes(jnp.asarray(self.data)[jnp.maximum(entries, 0)], 1, 2)
        return type(self)(data, offsets, rows, (self.shape[1], self.shape[0])).with_column_lists()

    def check(self) -> None:
        """Checks what kernels do not trust.

        Raises:
          ValueError: naming the first row whose entries or columns are out of range: products give NaN for such a row.
          TypeError: where the lists are traced.
        """
        if is_traced(self.indptr) or is_traced(self.indices):
            raise TypeError("BSR.check() needs values, but these lists are traced; call it outside of jit")
        offsets, indices = np.asarray(self.indptr, np.int64), np.asarray(self.indices)
        begin, end = offsets[:-1], offsets[1:]
        bad = (end < begin) | (begin < 0) | (end > self.entries)
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(
                f"invalid BSR: row {row} has entries {begin[row]} to {end[row]}, of {self.entries} that there are"
            )
        rows = self.row_ids()
        bad = (rows >= 0) & ((indices < 0) | (indices >= self.grid[1]))
        if bad.any():
            entry = int(np.argmax(bad))
            raise ValueError(
                f"invalid BSR: row {rows[entry]} has a block in column {indices[entry]}, outside [0, {self.grid[1]})"
            )


def _read_shape(text: bytes) -> tuple[tuple[int, int]]:
    m, k = json.loads(text)[0]
    return ((m, k),)


jax.tree_util.register_dataclass(BSR, data_fields=["data", "indptr", "indices", "column_lists"], meta_fields=["shape"])
# So that exported functions may take and return one.
jax.export.register_pytree_node_serialization(
    BSR,
    serialized_name="jax_bsk.BSR",
    serialize_auxdata=lambda shape: json.dumps(shape).encode(),
    deserialize_auxdata=_read_shape,
)


def pair_of(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block, from either or one number for both."""
    pair = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    bm, bk = (operator.index(size) for size in pair)
    if min(bm, bk) < 1:
        raise ValueError(f"block_size is positive, got {block_size}")
    return bm, bk
