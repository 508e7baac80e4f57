"""Neighborhoods of tokens on a grid in 1, 2, 3 or more dimensions, as NATTEN has them."""

from __future__ import annotations

import numpy as np

from jax_bsk.masks.algebra._boxes import BoxMask, checked_shape, checked_start, checked_tile, per_axis

__all__ = ["NeighborhoodMask"]


class NeighborhoodMask(BoxMask):
    """Attends to the nearest `kernel` tokens along each axis of a grid: neighborhood attention.

    At a border the window is moved inward, so every query has `kernel` keys along each axis (Hassani et al., arXiv
    2204.07143). With a dilation d a query attends to each d-th token, and the tokens that are congruent modulo d are a
    grid of their own (arXiv 2209.15001). Along a causal axis the window ends at the query, and is cut at the border.
    With a stride s each s neighbouring queries of an axis share a window: that of the middle one, or of the last one
    along a causal axis (generalized neighborhood attention, arXiv 2504.16922). Even kernels have one token more before
    the query than behind it.

    Args:
      shape: sizes of the grid, slowest axis first, as (frames, rows, columns); an int for one axis.
      kernel: tokens of the window, an int for all axes or one per axis; at most the axis' size divided by the dilation.
      dilation: distance of neighbouring keys, an int or one per axis.
      stride: queries that share a window, an int or one per axis, at most the kernel.
      causal: a bool for all axes or one per axis.
      tile: tokens lie tile after tile, of this shape, row-major in each tile; None where they lie row-major. Tiles of
        as many tokens as a block visit fewer blocks. Tiles at the end of an axis may be cut.
      start: position of the grid's first token, where other tokens lie before it or behind it. Those attend to nothing
        here; join them, e.g. by `| GlobalMask(...)`. None: all tokens are of the grid.

    Raises:
      TypeError: where an argument is no int or bool.
      ValueError: where one does not fit the shape; when bound, where the lengths do not.

    Examples:
      >>> from jax_bsk.masks import NeighborhoodMask
      >>> NeighborhoodMask(5, 3).bind(5, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
      >>> by_rows, by_tiles = (NeighborhoodMask((128, 128), 13, tile=tile) for tile in (None, (8, 16)))
      >>> by_rows.bind(128 * 128).density, by_tiles.bind(128 * 128).density
      (0.1015625, 0.061767578125)
    """

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    causal: tuple[bool, ...]

    def __init__(
        self,
        shape: int | tuple[int, ...],
        kernel: int | tuple[int, ...],
        *,
        dilation: int | tuple[int, ...] = 1,
        stride: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        tile: int | tuple[int, ...] | None = None,
        start: int | None = None,
    ) -> None:
        who = "NeighborhoodMask"
        shape = checked_shape(shape, who)
        kernels, dilations, strides = (
            per_axis(value, who, name, len(shape))
            for name, value in (("kernel", kernel), ("dilation", dilation), ("stride", stride))
        )
        flags = tuple(causal) if isinstance(causal, tuple | list) else (causal,) * len(shape)
        if len(flags) != len(shape) or not all(isinstance(flag, bool | np.bool_) for flag in flags):
            raise ValueError(f"{who}: causal must be a bool or one per axis of shape, given {causal!r} for {shape}")
        for n, (size, keys, step, shared) in enumerate(zip(shape, kernels, dilations, strides, strict=True)):
            if keys * step > size:
                raise ValueError(
                    f"{who}: kernel[{n}] * dilation[{n}] must be at most shape[{n}]={size}, given {keys} * {step}; "
                    "give a smaller kernel or dilation for this axis"
                )
            if shared > keys:
                raise ValueError(f"{who}: stride[{n}] must be at most kernel[{n}]={keys}, given {shared}")
        self._set(
            shape=shape,
            kernel=kernels,
            dilation=dilations,
            stride=strides,
            causal=tuple(map(bool, flags)),
            tile=checked_tile(tile, who, len(shape)),
            start=checked_start(start, who),
        )

    def _axis_intervals(self) -> list[tuple[np.ndarray, np.ndarray, int]]:
        of_axes = zip(self.shape, self.kernel, self.dilation, self.stride, self.causal, strict=True)
        return [intervals(*axis) for axis in of_axes]

    def _repr_arguments(self) -> list[str]:
        defaults = {"dilation": 1, "stride": 1, "causal": False}
        shown = [repr(self.shape), repr(self.kernel)]
        for name, value in self._named().items():
            plain = value is None if name in ("tile", "start") else set(value) == {defaults.get(name)}  # type: ignore
            shown += [] if plain or name in ("shape", "kernel") else [f"{name}={value!r}"]
        return shown


def intervals(
    size: int, kernel: int, dilation: int = 1, stride: int = 1, causal: bool = False
) -> tuple[np.ndarray, np.ndarray, int]:
    """First and last coordinate [size] that each coordinate of an axis attends to, and the step between them."""
    # Tokens that are congruent modulo the dilation are an axis of their own, of so many tokens.
    at, group = np.divmod(np.arange(size), dilation)
    length = (size - group + dilation - 1) // dilation
    leader = at // stride * stride
    if causal:
        first = np.maximum(np.minimum(leader + stride - 1, length - 1) - kernel + 1, 0)
        last = at
    else:
        first = np.clip(np.minimum(leader + stride // 2, length - 1) - kernel // 2, 0, length - kernel)
        last = first + kernel - 1
    return first * dilation + group, last * dilation + group, dilation
