"""Windows of tokens on a grid that neighbouring queries share: sliding tiles, and shifted windows."""

from __future__ import annotations

import numpy as np

from jax_bsk.masks.algebra._boxes import BoxMask, checked_shape, checked_start, checked_tile, per_axis
from jax_bsk.masks.algebra.neighborhood import intervals

__all__ = ["ShiftedWindowMask", "SlidingTileMask"]


class SlidingTileMask(BoxMask):
    """Sliding tile attention: a tile of queries attends to a window of whole tiles (Zhang et al., arXiv 2502.04507).

    The window is centred at the query's tile and moved inward at the borders. Tokens lie tile after tile, row-major in
    each tile: the order in which that paper lays them. Where a tile has as many tokens as a block, no block is partial.

    Args:
      shape: sizes of the grid in tokens, slowest axis first, as (frames, rows, columns); multiples of the tile's.
      window: sizes of the window in tokens, an int or one per axis; multiples of the tile's.
      tile: sizes of a tile in tokens, an int or one per axis.
      start: position of the grid's first token, where other tokens (text) lie before it or behind it. Those attend to
        nothing here; join them, e.g. by `| GlobalMask(...)`. None: all tokens are of the grid.

    Raises:
      TypeError: where an argument is no int.
      ValueError: where one does not fit the shape; when bound, where the lengths do not.

    Examples:
      >>> from jax_bsk.masks import SlidingTileMask
      >>> print(SlidingTileMask((6, 16, 16), (6, 8, 8), (6, 8, 8)).bind(1536).describe().splitlines()[1])
        visited: 36 blocks per list, 36 full, 0 partial
    """

    window: tuple[int, ...]

    def __init__(
        self,
        shape: int | tuple[int, ...],
        window: int | tuple[int, ...],
        tile: int | tuple[int, ...],
        *,
        start: int | None = None,
    ) -> None:
        who = "SlidingTileMask"
        shape = checked_shape(shape, who)
        windows, tiles = (per_axis(x, who, name, len(shape)) for name, x in (("window", window), ("tile", tile)))
        for n, (size, width, of_tile) in enumerate(zip(shape, windows, tiles, strict=True)):
            if size % of_tile or width % of_tile or width > size:
                raise ValueError(
                    f"{who}: shape[{n}] and window[{n}] must be multiples of tile[{n}]={of_tile}, and the window at "
                    f"most the shape, given {size} and {width}; pad the grid, or give a tile that divides them"
                )
        self._set(shape=shape, window=windows, tile=tiles, start=checked_start(start, who))

    def _unit(self) -> tuple[int, ...]:
        assert self.tile is not None
        return self.tile

    def _axis_intervals(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        of_axes = zip(self.shape, self.window, self._unit(), strict=True)
        return [intervals(size // tile, width // tile) for size, width, tile in of_axes]

    def _repr_arguments(self) -> list[str]:
        start = [] if self.start is None else [f"start={self.start}"]
        return [repr(self.shape), repr(self.window), repr(self.tile), *start]


class ShiftedWindowMask(BoxMask):
    """Attends inside windows of a grid that are shifted by some tokens (Swin, Liu et al., arXiv 2103.14030, figure 2).

    Windows begin at `shift`, `shift + window`, ... along each axis, and those at the borders are cut. That is what Swin
    computes with a cyclic shift and a mask; here tokens stay where they are. A layer without a shift has `shift=0`.

    Args:
      shape: sizes of the grid in tokens, slowest axis first; an int for one axis.
      window: sizes of a window in tokens, an int or one per axis.
      shift: tokens by which windows are shifted, an int or one per axis, less than the window; Swin takes half of it.
      tile: tokens lie tile after tile, of this shape, row-major in each tile; None where they lie row-major.
      start: position of the grid's first token, where other tokens lie before it or behind it. Those attend to nothing
        here; join them, e.g. by `| GlobalMask(...)`. None: all tokens are of the grid.

    Raises:
      TypeError: where an argument is no int.
      ValueError: where one does not fit the others; when bound, where the lengths do not fit the shape.

    Examples:
      >>> from jax_bsk.masks import ShiftedWindowMask
      >>> ShiftedWindowMask(6, 3, shift=1).bind(6, block_size=32).to_dense()[0, 0].astype(int).tolist()[:2]
      [[1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    """

    window: tuple[int, ...]
    shift: tuple[int, ...]

    def __init__(
        self,
        shape: int | tuple[int, ...],
        window: int | tuple[int, ...],
        *,
        shift: int | tuple[int, ...] = 0,
        tile: int | tuple[int, ...] | None = None,
        start: int | None = None,
    ) -> None:
        who = "ShiftedWindowMask"
        shape = checked_shape(shape, who)
        windows = per_axis(window, who, "window", len(shape))
        shifts = per_axis(shift, who, "shift", len(shape), minimum=0)
        for n, (width, by) in enumerate(zip(windows, shifts, strict=True)):
            if by >= width:
                raise ValueError(
                    f"{who}: shift[{n}] must be less than window[{n}]={width}, given {by}; take {by % width}"
                )
        self._set(
            shape=shape,
            window=windows,
            shift=shifts,
            tile=checked_tile(tile, who, len(shape)),
            start=checked_start(start, who),
        )

    def _axis_intervals(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        found = []
        for size, window, shift in zip(self.shape, self.window, self.shift, strict=True):
            first = (np.arange(size) - shift) // window * window + shift
            found.append((np.maximum(first, 0), np.minimum(first + window, size) - 1, 1))
        return found

    def _repr_arguments(self) -> list[str]:
        shown = [repr(self.shape), repr(self.window), *([f"shift={self.shift}"] if any(self.shift) else [])]
        return shown + [f"{n}={x!r}" for n, x in (("tile", self.tile), ("start", self.start)) if x is not None]
