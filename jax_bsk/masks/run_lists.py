"""`RunLists`: block lists that are held as runs.

A host mask with many entries is held so. Its size is what the mask's structure costs (causal at 1,048,576 tokens: 0.2
MB instead of 268), also where it is a constant of a jitted function or an argument of one. Kernels read lists, which
are made of the runs on the device (`kernel_rows`, `kernel_columns`).
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array
from jax_bsk.masks import _runs
from jax_bsk.masks.block_lists import BlockLists, Entries, of_table
from jax_bsk.masks.grid import Grid

_ROWS = ("row_offsets", "row_starts", "row_blocks", "row_tiles")
_COLUMNS = ("col_offsets", "col_starts", "col_blocks", "col_run_tiles")


class RowRuns(NamedTuple):
    """The query-major arrays of a mask as runs, named as in `RunLists`; what the host's builder returns."""

    row_offsets: np.ndarray
    row_starts: np.ndarray
    row_blocks: np.ndarray
    row_tiles: np.ndarray
    bit_tiles: np.ndarray
    capacity: int


class RunLists(BlockLists):
    """Block lists in another form: all attributes are there, the long ones are made when they are asked for.

    They are numpy arrays of a host mask (made once and kept), and computed on the device of any other.

    Attributes:
      row_offsets, bit_tiles, block_q, block_kv, q_len, kv_len: as in `BlockLists`.
      row_starts: int32 [B, H, runs], the first entry of each run of `kv_blocks` that ascend by one with equal tiles;
        past a list's runs its capacity.
      row_blocks, row_tiles: int32 [B, H, runs], key block and tile of that entry; -1 past a list's runs.
      col_offsets, col_starts, col_blocks, col_run_tiles: the same by key block; None until `transpose()`.
      capacity: number of entries of the longest list.
    """

    _stored = (*_ROWS, "bit_tiles", *_COLUMNS)
    _row_names = _ROWS
    _size_names = ("block_q", "block_kv", "q_len", "kv_len", "planned", "capacity")

    row_starts: Array
    row_blocks: Array
    row_tiles: Array
    col_starts: Array | None
    col_blocks: Array | None
    col_run_tiles: Array | None

    # The class that holds the lists themselves. The constructor is given these, also by `dataclasses.replace`.
    _plain_class: ClassVar[type[BlockLists]] = BlockLists

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A mask of lists."""
        return cls._plain_class(*args, **kwargs)

    @classmethod
    def of_fields(cls, **fields: Any) -> Self:
        """A mask with all stored arrays and sizes by name; nothing is checked."""
        mask = object.__new__(cls)
        mask.__dict__.update(fields)
        return mask

    @classmethod
    def of_runs(cls, runs: RowRuns, grid: Grid, planned: bool = False) -> Self:
        """A mask with the runs that the host's builder made."""
        sizes = {name: getattr(grid, name) for name in cls._size_names[:4]}
        return cls.of_fields(**runs._asdict(), **dict.fromkeys(_COLUMNS), **sizes, planned=planned)

    @property
    def holds_runs(self) -> bool:
        """Whether the lists are held as runs, and made only when they are read."""
        return True

    @property
    def capacity(self) -> int:
        """Number of entries of the longest list."""
        return self.__dict__["capacity"]

    def _with_arrays(self, **changes: Array | None) -> Self:
        """The same with other arrays in place of those that it holds."""
        return self.of_fields(**self.__getstate__() | changes)

    # ---- the lists ----------------------------------------------------------------------------------------------

    @property
    def kv_blocks(self) -> Array:
        """int32 [B, H, capacity]."""
        return self._expanded("_row_lists_kept", _ROWS)[0]

    @property
    def tiles(self) -> Array:
        """int32 [B, H, capacity]."""
        return self._expanded("_row_lists_kept", _ROWS)[1]

    @property
    def q_blocks(self) -> Array | None:
        """int32 [B, H, capacity], or None."""
        return None if self.col_offsets is None else self._expanded("_column_lists_kept", _COLUMNS)[0]

    @property
    def col_tiles(self) -> Array | None:
        """int32 [B, H, capacity], or None."""
        return None if self.col_offsets is None else self._expanded("_column_lists_kept", _COLUMNS)[1]

    def _expanded(self, kept: str, names: tuple[str, ...]) -> tuple[Array, Array]:
        arrays = [getattr(self, name) for name in names]
        if not all(isinstance(x, np.ndarray) for x in arrays):
            return self._on_device(names)
        if kept not in self.__dict__:
            lists = np.full((2, *arrays[0].shape[:2], self.capacity), -1, np.int32)
            for b, h in np.ndindex(arrays[0].shape[:2]):
                _, blocks, tiles = _runs.to_lists(_runs.Runs(*(x[b, h] for x in arrays)))
                lists[:, b, h, : blocks.size] = blocks, tiles
            self.__dict__[kept] = lists[0], lists[1]
        return self.__dict__[kept]

    def _on_device(self, names: tuple[str, ...]) -> tuple[Array, Array]:
        arrays = [jnp.asarray(getattr(self, name)) for name in names]
        return explicit_mesh.call(lambda *runs: _runs.expand(*runs, capacity=self.capacity), arrays, ["bh"] * 4)

    def kernel_rows(self) -> tuple[Any, Any, Any]:
        """row_offsets, kv_blocks and tiles, to be handed to a kernel; they are expanded on the device."""
        return (self.row_offsets, *self._on_device(_ROWS))

    def kernel_columns(self) -> tuple[Any, Any, Any]:
        """col_offsets, q_blocks and col_tiles, to be handed to a kernel; they are expanded on the device."""
        return (self.col_offsets, *self._on_device(_COLUMNS))

    def _plain(self) -> Any:
        """The same mask with lists in place of runs, which are expanded on the device."""
        row_offsets, kv_blocks, tiles = self.kernel_rows()
        col_offsets, q_blocks, col_tiles = (None,) * 3 if self.col_offsets is None else self.kernel_columns()
        return self._plain_class(
            row_offsets=row_offsets,
            kv_blocks=kv_blocks,
            tiles=tiles,
            bit_tiles=self.bit_tiles,
            col_offsets=col_offsets,
            q_blocks=q_blocks,
            col_tiles=col_tiles,
            block_q=self.block_q,
            block_kv=self.block_kv,
            q_len=self.q_len,
            kv_len=self.kv_len,
        )

    # ---- the two orders and the entries -------------------------------------------------------------------------

    def transpose(self) -> Any:
        """See `BlockLists.transpose`; the runs of a host mask are transposed as runs."""
        if self.col_offsets is not None:
            return self
        if not self.is_host:
            return self._plain().transpose()
        if "_transposed" not in self.__dict__:
            columns = _transpose([getattr(self, name) for name in _ROWS], self.nk, self.capacity)
            self.__dict__["_transposed"] = self._with_arrays(**dict(zip(_COLUMNS, columns, strict=True)))
        return self.__dict__["_transposed"]

    def row_segments(self, b: int, h: int) -> _runs.Segments:
        """See `BlockLists.row_segments`."""
        return _runs.to_segments(self._row_runs(b, h))

    def _weighted_entries(self, b: int, h: int) -> Entries:
        """Two entries per run: its last one, which may reach past the keys' end, and the others, of which none does."""
        segments = _runs.to_segments(self._row_runs(b, h))
        rows, tiles = (np.tile(x, 2) for x in (segments.rows, segments.tiles))
        columns = np.concatenate([segments.first, segments.first + segments.length - 1])
        return Entries(rows, columns, tiles, np.concatenate([segments.length - 1, np.ones_like(segments.length)]))

    def _row_runs(self, b: int, h: int) -> _runs.Runs:
        """The query-major runs of one example and head."""
        return _runs.Runs(*(of_table(getattr(self, name), b, h) for name in _ROWS))

    def _column_runs(self, b: int, h: int) -> _runs.Runs:
        """The key-major runs of one example and head."""
        return _runs.Runs(*(of_table(getattr(self, name), b, h) for name in _COLUMNS))


def _transpose(rows: list[np.ndarray], nk: int, capacity: int) -> tuple[np.ndarray, ...]:
    """col_offsets [B, H, nk + 1], col_starts, col_blocks and col_run_tiles [B, H, runs] of those of the rows."""
    lead = rows[0].shape[:2]
    turned: dict[Any, _runs.Runs] = {}
    for b, h in np.ndindex(lead):
        turned[b, h] = _runs.transpose(_runs.Runs(*(x[b, h] for x in rows)), nk)
    size = max((x.starts.size for x in turned.values()), default=0)
    sizes, fills = (nk + 1, size, size, size), (0, capacity, -1, -1)
    arrays = [np.full((*lead, n), fill, np.int32) for n, fill in zip(sizes, fills, strict=True)]
    for index, runs in turned.items():
        for array, values in zip(arrays, runs, strict=True):
            array[index][: values.size] = values
    return tuple(arrays)
