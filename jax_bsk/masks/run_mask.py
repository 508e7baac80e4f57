"""`RunBlockMask`: a `BlockMask` whose long lists are held as runs.

`BlockMask.from_mask` makes one of a host mask with many entries. It holds what the mask's structure costs (causal at
1,048,576 tokens: 0.2 MB instead of 268), also where it is a constant of a jitted function or an argument of one; what
kernels read is made of it on the device (`_kernel_rows`, `_kernel_columns`).
"""

from __future__ import annotations

from typing import Any, Self

import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.masks import _runs, lists
from jax_bsk.masks._host import RunLists
from jax_bsk.masks.algebra import Grid
from jax_bsk.masks.block_mask import BlockMask, register_pytree

_ROWS = ("row_offsets", "row_starts", "row_blocks", "row_tiles")
_COLUMNS = ("col_offsets", "col_starts", "col_blocks", "col_run_tiles")


class RunBlockMask(BlockMask):
    """A BlockMask in another form: all its attributes are there, the long ones are made when they are asked for.

    They are numpy arrays of a host mask (made once and kept), and computed on the device of any other. What is given
    to the constructor are the lists themselves, so it makes a plain BlockMask: `dataclasses.replace` does.

    Attributes:
      row_offsets, bit_tiles, block_q, block_kv, q_len, kv_len: as in `BlockMask`.
      row_starts: int32 [B, H, runs], the first entry of each run of `kv_blocks` that ascend by one with equal tiles;
        past a list's runs its capacity.
      row_blocks, row_tiles: int32 [B, H, runs], key block and tile of that entry; -1 past a list's runs.
      col_offsets, col_starts, col_blocks, col_run_tiles: the same by key block; None until `transpose()`.
      capacity: number of entries of the longest list.
    """

    _stored = (*_ROWS, "bit_tiles", *_COLUMNS)
    _sizes = ("block_q", "block_kv", "q_len", "kv_len", "capacity")

    row_starts: Any
    row_blocks: Any
    row_tiles: Any
    col_starts: Any
    col_blocks: Any
    col_run_tiles: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> BlockMask:
        """A plain BlockMask of lists."""
        return BlockMask(*args, **kwargs)

    @classmethod
    def of_fields(cls, **fields: Any) -> Self:
        """One of all stored arrays and sizes by name; nothing is checked."""
        mask = object.__new__(cls)
        mask.__dict__.update(fields)
        return mask

    @classmethod
    def of_runs(cls, lists: RunLists, grid: Grid) -> Self:
        """One of what `_host.build` made."""
        sizes = {name: getattr(grid, name) for name in cls._sizes[:-1]}
        return cls.of_fields(**lists._asdict(), **dict.fromkeys(_COLUMNS), **sizes)

    def _with(self, **changes: Any) -> Self:
        return self.of_fields(**self.__getstate__() | changes)

    @property
    def capacity(self) -> int:
        """Number of entries of the longest list."""
        return self.__dict__["capacity"]

    # ---- the lists ----------------------------------------------------------------------------------------------

    @property
    def kv_blocks(self) -> Any:
        """int32 [B, H, capacity]."""
        return self._row_lists()[0]

    @property
    def tiles(self) -> Any:
        """int32 [B, H, capacity]."""
        return self._row_lists()[1]

    @property
    def q_blocks(self) -> Any:
        """int32 [B, H, capacity], or None."""
        return None if self.col_offsets is None else self._column_lists()[0]

    @property
    def col_tiles(self) -> Any:
        """int32 [B, H, capacity], or None."""
        return None if self.col_offsets is None else self._column_lists()[1]

    def _row_lists(self) -> tuple[Any, Any]:
        return self._expanded("_row_lists_kept", _ROWS)

    def _column_lists(self) -> tuple[Any, Any]:
        return self._expanded("_column_lists_kept", _COLUMNS)

    def _expanded(self, kept: str, names: tuple[str, ...]) -> tuple[Any, Any]:
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

    def _on_device(self, names: tuple[str, ...]) -> tuple[Any, Any]:
        arrays = [jnp.asarray(getattr(self, name)) for name in names]
        return explicit_mesh.call(lambda *runs: _runs.expand(*runs, capacity=self.capacity), arrays, ["bh"] * 4)

    def _kernel_rows(self) -> tuple[Any, Any, Any]:
        return (self.row_offsets, *self._on_device(_ROWS))

    def _kernel_columns(self) -> tuple[Any, Any, Any]:
        return (self.col_offsets, *self._on_device(_COLUMNS))

    def _plain(self) -> BlockMask:
        row_offsets, kv_blocks, tiles = self._kernel_rows()
        col_offsets, q_blocks, col_tiles = (None,) * 3 if self.col_offsets is None else self._kernel_columns()
        return BlockMask(
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

    # ---- views --------------------------------------------------------------------------------------------------

    def transpose(self) -> BlockMask:
        """See `BlockMask.transpose`; the runs of a host mask are transposed as runs."""
        if self.col_offsets is not None:
            return self
        if not self._is_host():
            return self._plain().transpose()
        if "_transposed" not in self.__dict__:
            columns = transpose_runs([getattr(self, name) for name in _ROWS], self.nk, self.capacity)
            self.__dict__["_transposed"] = self._with(**dict(zip(_COLUMNS, columns, strict=True)))
        return self.__dict__["_transposed"]

    def _weighted_entries(self, b: int, h: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Two entries per run: its last one, which may reach past the keys' end, and the others, of which none does."""
        segments = _runs.to_segments(self._runs_of(_ROWS, b, h))
        rows, tiles = (np.tile(x, 2) for x in (segments.rows, segments.tiles))
        columns = np.concatenate([segments.first, segments.first + segments.length - 1])
        return rows, columns, tiles, np.concatenate([segments.length - 1, np.ones_like(segments.length)])

    def _runs_of(self, names: tuple[str, ...], b: int, h: int) -> _runs.Runs:
        arrays = [getattr(self, name) for name in names]
        return _runs.Runs(*(x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0] for x in arrays))

    def check(self) -> None:
        """See `BlockMask.check`: of runs, and of their transposition as runs."""
        mask = self._concrete("check()")
        n_tiles = mask.bit_tiles.shape[2]
        for b, h in np.ndindex(mask.row_offsets.shape[:2]):
            where = f"batch {b}, head {h}, "
            rows = mask._runs_of(_ROWS, b, h)
            lists.check_runs(rows, mask.capacity, mask.nk, n_tiles, where + "row {row}: ", "key")
            if mask.col_offsets is not None:
                columns = mask._runs_of(_COLUMNS, b, h)
                lists.check_runs(columns, mask.capacity, mask.nq, n_tiles, where + "column {row}: ", "query")
                lists.check_transposed_runs(rows, columns, where)

    def __reduce__(self) -> Any:
        return _restored, (self.__getstate__(),)


register_pytree(RunBlockMask)


def transpose_runs(rows: list[np.ndarray], nk: int, capacity: int) -> tuple[np.ndarray, ...]:
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


def _restored(fields: dict[str, Any]) -> RunBlockMask:
    return RunBlockMask.of_fields(**fields)
