"""`BlockLists`: the data that a bound mask is. The lists of visited blocks, their bit tiles, and the sizes.

Below everything that reads, checks or makes lists; `BlockMask` adds constructors and views. The arrays are the contract
with the kernels, which trust nothing in them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, NoReturn, Self

import jax
import numpy as np

from jax_bsk.core import compat
from jax_bsk.core.arrays import Array, is_traced
from jax_bsk.masks import _runs
from jax_bsk.masks._text import short
from jax_bsk.masks.grid import Grid
from jax_bsk.masks.orders.column_lists import ColumnLists, rows_of_entries, transpose_host, transpose_traced


class RowLists(NamedTuple):
    """The query-major arrays of a mask, named as in `BlockLists`; what builders return."""

    row_offsets: Array
    kv_blocks: Array
    tiles: Array
    bit_tiles: Array


class Entries(NamedTuple):
    """Entries of one list, on the host.

    Attributes:
      rows, columns: integers [n], query block and key block of each entry.
      tiles: integers [n], number of the entry's bit tile; negative for a full block.
      weights: int64 [n], number of entries with this tile and kind of block that the entry stands for.
    """

    rows: np.ndarray
    columns: np.ndarray
    tiles: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockLists:
    """The block lists and bit tiles of a mask. `BlockMask` says what each field holds."""

    row_offsets: Array
    kv_blocks: Array
    tiles: Array
    bit_tiles: Array
    col_offsets: Array | None
    q_blocks: Array | None
    col_tiles: Array | None
    block_q: int
    block_kv: int
    q_len: int
    kv_len: int
    planned: bool = False

    # Names of the arrays it holds, which are its pytree's leaves (or None), and of the numbers beside them.
    _stored: ClassVar[tuple[str, ...]] = (
        *("row_offsets", "kv_blocks", "tiles", "bit_tiles"),
        *("col_offsets", "q_blocks", "col_tiles"),
    )
    _row_names: ClassVar[tuple[str, ...]] = _stored[:3]
    _size_names: ClassVar[tuple[str, ...]] = ("block_q", "block_kv", "q_len", "kv_len", "planned")

    # ---- sizes --------------------------------------------------------------------------------------------------

    @property
    def nq(self) -> int:
        """Number of query blocks."""
        return -(-self.q_len // self.block_q)

    @property
    def nk(self) -> int:
        """Number of key/value blocks."""
        return -(-self.kv_len // self.block_kv)

    @property
    def _grid(self) -> Grid:
        """The lengths and block sizes together."""
        return Grid(self.q_len, self.kv_len, self.block_q, self.block_kv)

    @property
    def capacity(self) -> int:
        """Number of entries that each list has room for: `kv_blocks.shape[-1]`."""
        return self.kv_blocks.shape[-1]

    @property
    def batch(self) -> int:
        """Number of examples that the mask distinguishes."""
        return self._dim(0)

    @property
    def heads(self) -> int:
        """Number of query heads that the mask distinguishes."""
        return self._dim(1)

    def _dim(self, axis: int) -> int:
        """Size along a leading axis, of lists or bit tiles, either of which may be shared (1); the other may be 0."""
        lists, tiles = self.row_offsets.shape[axis], self.bit_tiles.shape[axis]
        return tiles if lists == 1 else lists

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len) of the boolean array that the mask stands for."""
        return self.batch, self.heads, self.q_len, self.kv_len

    @property
    def block_size(self) -> tuple[int, int]:
        """(block_q, block_kv)."""
        return self.block_q, self.block_kv

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that it holds; runs count as runs."""
        return sum(a.size * a.dtype.itemsize for a in self._arrays().values() if a is not None)

    @property
    def is_traced(self) -> bool:
        """Whether any array has no value yet."""
        return any(map(is_traced, self._arrays().values()))

    # ---- the arrays ---------------------------------------------------------------------------------------------

    @property
    def holds_runs(self) -> bool:
        """Whether the lists are held as runs, and made only when they are read."""
        return False

    def _arrays(self) -> dict[str, Array | None]:
        """The arrays that it holds, by name."""
        return {name: getattr(self, name) for name in self._stored}

    @property
    def is_host(self) -> bool:
        """Whether every array is a numpy array, so that its values are known when a program is compiled."""
        return all(x is None or isinstance(x, np.ndarray) for x in self._arrays().values())

    def _with_arrays(self, **changes: Array | None) -> Self:
        """The same with other arrays in place of those that it holds."""
        return dataclasses.replace(self, **changes)

    def _concrete(self, what: str) -> Self:
        """The same with numpy arrays.

        Args:
          what: name of the method that needs values, for the message.

        Raises:
          TypeError: where the mask is traced.
        """
        if self.is_traced:
            raise TypeError(f"BlockMask.{what} needs values, but this mask is traced; call it outside of jit")
        if self.is_host:
            return self
        return self._with_arrays(**{n: None if x is None else np.asarray(x) for n, x in self._arrays().items()})

    def _plain(self) -> Self:
        """The same mask with lists in place of runs; where it holds lists, itself."""
        return self

    def kernel_rows(self) -> tuple[Any, Any, Any]:
        """row_offsets, kv_blocks and tiles, to be handed to a kernel; runs are expanded on the device."""
        return self.row_offsets, self.kv_blocks, self.tiles

    def kernel_columns(self) -> tuple[Any, Any, Any]:
        """col_offsets, q_blocks and col_tiles, to be handed to a kernel; runs are expanded on the device."""
        return self.col_offsets, self.q_blocks, self.col_tiles

    def transpose(self) -> Self:
        """The same mask with `col_offsets`, `q_blocks` and `col_tiles` filled; of a host mask made once and kept.

        Entries with ids out of range, and those that found no room, are left out.
        """
        if self.col_offsets is not None:
            return self
        if "_transposed" not in self.__dict__:
            lists = self.kernel_rows()
            if self.is_traced or any(isinstance(x, jax.Array) for x in lists):
                return self._with_columns(transpose_traced(*lists, self.nk))
            self.__dict__["_transposed"] = self._with_columns(transpose_host(*lists, self.nk))
        return self.__dict__["_transposed"]

    def _with_columns(self, columns: ColumnLists) -> Self:
        """The same mask with these key-major lists."""
        return dataclasses.replace(self, **columns._asdict())

    def _entries(self, b: int, h: int) -> Entries:
        """The valid entries of one example and head, of numpy arrays."""
        ids, tiles = of_table(self.kv_blocks, b, h), of_table(self.tiles, b, h)
        rows = rows_of_entries(of_table(self.row_offsets, b, h), ids.shape[0])
        valid = np.flatnonzero((rows >= 0) & (ids >= 0) & (ids < self.nk) & (tiles < self.bit_tiles.shape[2]))
        return Entries(rows[valid], ids[valid], tiles[valid], np.ones(valid.size, np.int64))

    def row_arrays(self) -> dict[str, Array | None]:
        """The arrays that say which key blocks each query block visits, by name."""
        return {name: getattr(self, name) for name in self._row_names}

    def row_segments(self, b: int, h: int) -> _runs.Segments:
        """The visited key blocks of one example and head of a host mask, those of a run together."""
        rows, columns, tiles, weights = self._entries(b, h)
        return _runs.Segments(rows, columns, weights, tiles)

    def _weighted_entries(self, b: int, h: int) -> Entries:
        """The same entries in as few elements as the mask holds: those of a run may be counted by one of them."""
        return self._entries(b, h)

    # ---- pytree -------------------------------------------------------------------------------------------------

    def _leaves(self) -> tuple[Array | None, ...]:
        """The arrays it holds; outside of traces their copies on the default device, which are made once.

        In a trace host arrays stay numpy: they become constants there, and their values are known.
        """
        arrays = tuple(self._arrays().values())
        if not any(isinstance(x, np.ndarray) for x in arrays) or not compat.outside_traces():
            return arrays
        device = compat.default_device()
        if self.__dict__.get("_copies", (None,))[0] != (device,):
            copies = tuple(jax.device_put(x) if isinstance(x, np.ndarray) else x for x in arrays)
            self.__dict__["_copies"] = (device,), copies
        return self.__dict__["_copies"][1]

    def _sizes(self) -> tuple[Any, ...]:
        """What is beside the arrays and decides the structure of the pytree."""
        return tuple(getattr(self, name) for name in self._size_names)

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickling and copies, without what is on a device or can be made again."""
        return self._arrays() | dict(zip(self._size_names, self._sizes(), strict=True))

    # ---- Python -------------------------------------------------------------------------------------------------

    # Without this, `numpy_array & block_mask` would try it elementwise instead of asking `__rand__`.
    __array_ufunc__ = None

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"a BlockMask has no truth value: {self!r}. Combine masks with `&`, not with `and`; to ask whether a mask "
            "was given, write `mask is not None`"
        )

    def __repr__(self) -> str:
        arrays = {name: x for name, x in self._arrays().items() if not name.startswith(("col_", "q_"))}
        ranks = [x.ndim if isinstance(x, Array) else None for x in arrays.values()]
        if ranks != [5 if name == "bit_tiles" else 3 for name in arrays]:  # inside a transformation of the pytree
            return f"BlockMask({', '.join(f'{name}={short(x)}' for name, x in arrays.items())})"
        room = f"{self.capacity} entries, {self.bit_tiles.shape[2]} tiles"
        return (
            f"BlockMask(batch={self.batch}, heads={self.heads}, q_len={self.q_len}, kv_len={self.kv_len}, "
            f"block_size={self.block_size}, {room}{', traced' if self.is_traced else ''})"
        )


def of_table(array: Any, b: int, h: int) -> Any:
    """The part of an array [B|1, H|1, ...] that belongs to one example and head."""
    return array[b if array.shape[0] > 1 else 0, h if array.shape[1] > 1 else 0]


def no_tiles(grid: Grid) -> np.ndarray:
    """The bit tiles of a mask that has none: uint32 [1, 1, 0, block_q, block_kv // 32]."""
    return np.zeros((1, 1, 0, grid.block_q, grid.block_kv // 32), np.uint32)


def register_pytree(cls: type[BlockLists]) -> None:
    """Makes a class of masks a pytree: the arrays it holds are leaves, its sizes the structure."""

    def flatten(mask: BlockLists) -> tuple[Any, Any]:
        return mask._leaves(), mask._sizes()

    def flatten_with_keys(mask: BlockLists) -> tuple[Any, Any]:
        keys = map(jax.tree_util.GetAttrKey, cls._stored)
        return tuple(zip(keys, mask._leaves(), strict=True)), mask._sizes()

    def unflatten(sizes: Any, leaves: Any) -> BlockLists:
        # Nothing is checked: transformations rebuild masks with placeholders and with arrays of other ranks.
        mask = object.__new__(cls)
        mask.__dict__.update(zip(cls._stored, leaves, strict=True))
        mask.__dict__.update(zip(cls._size_names, sizes, strict=True))
        return mask

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
