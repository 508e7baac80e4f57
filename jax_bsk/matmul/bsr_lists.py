"""Where the blocks of a `BSR` are: lists that are a constant of its structure, or lists that are arrays of it.

Below `bsr`. Both kinds have the same attributes; a matrix with `StaticLists` has no leaf but its blocks.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import is_traced

# Offsets of the columns of blocks [columns + 1], rows [entries], and which entry each one is [entries].
ColumnLists = tuple[Any, Any, Any]


class ProductLists(NamedTuple):
    """What products take of either kind.

    Attributes:
      indptr: int32 [rows of blocks + 1].
      indices: int32 [entries].
      row_ids: int32 [entries], as `row_ids_of` has them.
      column_lists: The same places column by column; None where they are not known.
    """

    indptr: Any
    indices: Any
    row_ids: Any
    column_lists: ColumnLists | None


class ArrayLists(NamedTuple):
    """Lists that travel as arguments of a compiled function: other lists of the same sizes compile nothing.

    Attributes:
      indptr: int32 [rows of blocks + 1].
      indices: int32 [entries].
      column_lists: The same places column by column; None where they are not known.
    """

    indptr: Any
    indices: Any
    column_lists: ColumnLists | None = None

    @property
    def traced(self) -> bool:
        """Whether the lists have no values yet."""
        return is_traced(self.indptr) or is_traced(self.indices)

    @property
    def row_ids(self) -> Any:
        """int32 [entries]: the row of each entry, as `row_ids_of` has it."""
        return row_ids_of(self.indptr, self.indices.shape[0])

    def by_columns(self, columns: int) -> ColumnLists:
        """The lists by columns: those that are known, or made now."""
        return self.column_lists or column_lists_of(self.row_ids, self.indices, columns)

    def for_product(self, columns: int, eager: bool) -> ProductLists:
        """The lists as a product takes them, with those by columns unless they would have to be made in every call."""
        if eager and not self.traced:
            return _for_product_on_device(self, columns)
        by_columns = self.column_lists if self.traced else self.by_columns(columns)
        return ProductLists(self.indptr, self.indices, self.row_ids, by_columns)


@functools.partial(jax.jit, static_argnums=1)
def _for_product_on_device(lists: ArrayLists, columns: int) -> ProductLists:
    """Lists of a product outside of `jit`, of which nothing travels to the host and back."""
    return ProductLists(lists.indptr, lists.indices, lists.row_ids, lists.by_columns(columns))


class StaticLists:
    """Lists with values on the host: immutable and hashable, equal when their numbers are. Make them with `of`.

    Compiled functions have them as constants. What follows from them is made at first use and kept.

    Attributes:
      indptr: int32 [rows of blocks + 1], read-only.
      indices: int32 [entries], read-only.
      columns: Number of columns of blocks.
    """

    traced = False

    def __init__(self, key: tuple[bytes, bytes, int]):
        self._key = key
        self.indptr, self.indices = (np.frombuffer(numbers, np.int32) for numbers in key[:2])
        self.columns = key[2]

    @classmethod
    def of(cls, indptr: Any, indices: Any, columns: int) -> StaticLists:
        """Copies of the lists; the same object for equal ones, so that `jit` compares nothing but identities.

        Args:
          indptr: int [rows of blocks + 1], with values.
          indices: int [entries], with values.
          columns: Number of columns of blocks.
        """
        key = (np.asarray(indptr, np.int32).tobytes(), np.asarray(indices, np.int32).tobytes(), columns)
        return _alive.setdefault(key, cls(key))

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, StaticLists) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return StaticLists.of, (self.indptr, self.indices, self.columns)  # without what is made of them

    def __repr__(self) -> str:
        return f"StaticLists(rows={self.indptr.size - 1}, columns={self.columns}, entries={self.indices.size})"

    @functools.cached_property
    def row_ids(self) -> np.ndarray:
        """int32 [entries]: the row of each entry, as `row_ids_of` has it."""
        return _read_only(row_ids_of(self.indptr, self.indices.size))

    @functools.cached_property
    def column_lists(self) -> ColumnLists:
        """The same places column by column, as `column_lists_of` has them."""
        offsets, rows, entries = column_lists_of(self.row_ids, self.indices, self.columns)
        return _read_only(offsets), _read_only(rows), _read_only(entries)

    def by_columns(self, columns: int) -> ColumnLists:
        """`column_lists`."""
        del columns
        return self.column_lists

    def for_product(self, columns: int, eager: bool) -> ProductLists:
        """The lists as a product takes them: with `eager` on the device, otherwise on the host, to be constants."""
        del columns
        return self._on_device if eager else self._on_host

    @functools.cached_property
    def _on_host(self) -> ProductLists:
        return ProductLists(self.indptr, self.indices, self.row_ids, self.column_lists)

    @functools.cached_property
    def _on_device(self) -> ProductLists:
        """On JAX's default device: copied once, and not at every call."""
        with jax.ensure_compile_time_eval():
            return jax.tree.map(jnp.asarray, self._on_host)


_alive: weakref.WeakValueDictionary[tuple[bytes, bytes, int], StaticLists] = weakref.WeakValueDictionary()


def _read_only(numbers: Any) -> np.ndarray:
    numbers.flags.writeable = False
    return numbers


def row_ids_of(indptr: Any, entries: int) -> Any:
    """int32 [entries]: the row of each; -1 past the end, and in rows whose offsets cannot be followed.

    Args:
      indptr: int32 [rows + 1], where each row's entries begin, and the last one's end.
      entries: Number of entries that there is room for.
    """
    xp = jnp if is_traced(indptr) else np
    offsets = xp.asarray(indptr)
    begin, end = offsets[:-1], offsets[1:]
    sound = (begin >= 0) & (begin < end) & (end <= entries)
    # Rows without entries begin past all of them, and one more, so that there always is one.
    begin = xp.concatenate([xp.where(sound, begin, entries), xp.full(1, entries, offsets.dtype)])
    end = xp.concatenate([end, xp.zeros(1, offsets.dtype)])
    entry = xp.arange(entries, dtype=offsets.dtype)
    order = xp.argsort(begin, stable=True)
    row = order[xp.searchsorted(begin[order], entry, side="right") - 1]
    return xp.where((begin[row] <= entry) & (entry < end[row]), row, -1).astype(np.int32)


def column_lists_of(row_ids: Any, indices: Any, columns: int) -> ColumnLists:
    """Lists column by column: offsets [columns + 1], rows [entries], and which entry each one is [entries], all int32.

    Entries that belong to no row, or name no column, are left out: what is past the end is -1.

    Args:
      row_ids: int32 [entries], as `row_ids_of` has them.
      indices: int32 [entries], the column of blocks of each.
      columns: Number of columns of blocks.
    """
    xp = jnp if is_traced(row_ids) or is_traced(indices) else np
    rows, indices = xp.asarray(row_ids), xp.asarray(indices)
    column = xp.where((rows >= 0) & (indices >= 0) & (indices < columns), indices, columns)
    order = xp.argsort(column, stable=True).astype(np.int32)
    column = column[order]
    offsets = xp.searchsorted(column, xp.arange(columns + 1, dtype=column.dtype)).astype(np.int32)
    listed = column < columns
    return offsets, xp.where(listed, rows[order], -1), xp.where(listed, order, -1)
