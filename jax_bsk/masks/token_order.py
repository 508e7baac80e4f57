"""`TokenOrder`: an order of the tokens of a grid in which blocks of neighbouring tokens are compact.

Beside the path of a call: a model puts its tokens into the order once, and gives the mask in that order to every layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import as_array, known
from jax_bsk.masks import _curves
from jax_bsk.masks.algebra._offsets import static_int
from jax_bsk.masks.algebra.mask import Mask, described, remedy_for
from jax_bsk.masks.algebra.ordered import ordered
from jax_bsk.masks.block_mask import BlockMask
from jax_bsk.masks.grid import MAX_LENGTH


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenOrder:
    """An order of the tokens of a 1-D, 2-D or 3-D grid (or of more axes), for attention to neighbours in the grid.

    Tokens of an image or a video are numbered row by row, so a block of 128 neighbouring tokens is a thin line, and the
    neighbourhoods of its tokens touch many other lines. In an order by tiles a block is compact, and attention to
    neighbours visits fewer blocks. Attention is the same up to rounding: a mask in the order says of each token what
    the mask says of it in the grid.

    An order is a pytree of host arrays: close over it in a jitted function, or pass it as an argument.

    Attributes:
      order: int32 [T], number of the token (row by row) at each place of the order.
      places: int32 [T], place of each token: the inverse permutation.
      grid: Sizes of the grid, the last axis fastest; their product is T.
      name: What the order is called where it is printed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk.masks import TokenOrder
      >>> order = TokenOrder.tiles((4, 4), (2, 2))
      >>> order.order.reshape(4, 4).tolist()
      [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
      >>> x = jnp.arange(16.0)[None]
      >>> bool((order.unpermute(order.permute(x)) == x).all())
      True
    """

    order: np.ndarray | jax.Array
    places: np.ndarray | jax.Array
    grid: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    # ---- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def raster(cls, grid: int | Sequence[int]) -> TokenOrder:
        """Row by row, the last axis fastest: the order in which tokens are numbered, to compare others with.

        Args:
          grid: Sizes of the grid.

        Raises:
          TypeError, ValueError: The sizes are no positive ints.
        """
        grid = _sizes(grid, "grid")
        return cls._of(np.arange(math.prod(grid)), grid, "row by row")

    @classmethod
    def tiles(cls, grid: int | Sequence[int], tile: int | Sequence[int]) -> TokenOrder:
        """Tile after tile, row by row in each tile: tokens of a tile lie together.

        Where tiles do not divide the grid, those at the far ends are smaller. Blocks and tiles are then not in step,
        and `bands` visits fewer blocks.

        Args:
          grid: Sizes of the grid.
          tile: Sizes of a tile, one per axis. Best is the size of a block as their product, 8 x 16 or 4 x 4 x 8 for
            128.

        Raises:
          TypeError, ValueError: The sizes are no positive ints, or not one per axis.
        """
        grid, tile = _sizes(grid, "grid"), _sizes(tile, "tile")
        if len(tile) != len(grid):
            raise ValueError(f"TokenOrder: tile has one size per axis of the grid {grid}, got {tile}")
        return cls._of(_curves.tiled(grid, tile), grid, f"tiles of {_times(tile)}")

    @classmethod
    def bands(cls, grid: Sequence[int], band: int | Sequence[int]) -> TokenOrder:
        """By bands along the last axis, each passed column by column, one forwards and the next backwards.

        In a grid of 2 axes a band of 8 is 8 rows, and 128 tokens of it are 16 columns of 8: a tile of 8 x 16, whatever
        the length of the rows and wherever it begins. So blocks are compact also in grids that tiles do not divide.

        Args:
          grid: Sizes of the grid, of 2 axes or more.
          band: Sizes of a band along each axis but the last: 8 for 2 axes, (4, 4) for 3.

        Raises:
          TypeError, ValueError: The sizes are no positive ints, or not one per axis but the last.

        Examples:
          >>> from jax_bsk.masks import TokenOrder
          >>> TokenOrder.bands((4, 3), 2).order.tolist()
          [0, 3, 1, 4, 2, 5, 8, 11, 7, 10, 6, 9]
        """
        grid, band = _sizes(grid, "grid"), _sizes(band, "band")
        if len(band) != len(grid) - 1:
            raise ValueError(f"TokenOrder: band has one size per axis but the last of the grid {grid}, got {band}")
        return cls._of(_curves.banded(grid, band), grid, f"bands of {_times(band)}")

    @classmethod
    def morton(cls, grid: int | Sequence[int]) -> TokenOrder:
        """Along the Z-order curve: by the interleaved bits of the coordinates.

        Every block of a power of two, 128 among them, is a box of a grid of powers of two. Grids of other sizes are
        ordered by rank: the curve leaves out what is outside.

        Args:
          grid: Sizes of the grid.

        Raises:
          TypeError, ValueError: The sizes are no positive ints.
        """
        grid = _sizes(grid, "grid")
        return cls._of(_curves.morton(grid), grid, "Morton curve")

    @classmethod
    def hilbert(cls, grid: int | Sequence[int]) -> TokenOrder:
        """Along the Hilbert curve, in which neighbours in the order are neighbours in the grid.

        Grids that are not cubes of a power of two are ordered by rank: the curve leaves out what is outside.

        Args:
          grid: Sizes of the grid.

        Raises:
          TypeError, ValueError: The sizes are no positive ints.
        """
        grid = _sizes(grid, "grid")
        return cls._of(_curves.hilbert(grid), grid, "Hilbert curve")

    @classmethod
    def from_indices(cls, order: Any, grid: int | Sequence[int] | None = None) -> TokenOrder:
        """An order of your own.

        Args:
          order: Integers [T], the number of the token at each place: a permutation, on the host.
          grid: Sizes of the grid, for `positions`; T by default.

        Raises:
          TypeError: The numbers are traced or no integers.
          ValueError: They are no permutation, or the grid has another number of tokens.
        """
        values = known(as_array(order))
        if values is None or not (values.size == 0 or np.issubdtype(values.dtype, np.integer)):
            raise TypeError(f"TokenOrder: order must be integers on the host, got {as_array(order).dtype}, or traced")
        sizes = _sizes(values.size if grid is None else grid, "grid")
        if values.shape != (math.prod(sizes),) or not np.array_equal(np.sort(values), np.arange(values.size)):
            raise ValueError(
                f"TokenOrder: order must be a permutation of the {math.prod(sizes)} tokens of the grid {sizes}, got "
                f"{values.dtype}{values.shape}; each number from 0 on stands there once"
            )
        return cls._of(values, sizes, "given order")

    @classmethod
    def _of(cls, order: np.ndarray, grid: tuple[int, ...], name: str) -> TokenOrder:
        places = np.empty(order.size, np.int32)
        places[order] = np.arange(order.size, dtype=np.int32)
        return cls(order.astype(np.int32), places, grid, name)

    @staticmethod
    def best(mask: Mask, orders: Iterable[TokenOrder], *, block_size: int | tuple[int, int] = 128) -> TokenOrder:
        """The order in which a mask visits the fewest blocks; of equal ones the first.

        Each order's mask is bound to count its blocks, so it costs as much time as binding it as often.

        Args:
          mask: Mask of the tokens row by row.
          orders: Orders to choose from.
          block_size: Tokens of a block, as in `bind`.

        Raises:
          ValueError: There is no order to choose from, or the mask does not fit one.

        Examples:
          >>> from jax_bsk.masks import DilatedMask, TokenOrder
          >>> orders = [TokenOrder.raster((64, 4)), TokenOrder.tiles((64, 4), (64, 1))]
          >>> TokenOrder.best(DilatedMask(4), orders, block_size=32).name  # tokens of a column attend to each other
          'tiles of 64 x 1'
        """
        counted = [(int(order._bound(mask, block_size).row_offsets[..., -1].sum()), order) for order in orders]
        if not counted:
            raise ValueError("TokenOrder.best: orders must hold an order, got none")
        return min(counted, key=lambda pair: pair[0])[1]

    # ---- tokens -------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """T, the number of tokens."""
        return math.prod(self.grid)

    @property
    def positions(self) -> Any:
        """int32 [T, axes], coordinates in the grid of the token at each place: for rotary embeddings."""
        xp: Any = np if isinstance(self.order, np.ndarray) else jnp
        return xp.stack(xp.unravel_index(self.order, self.grid), -1).astype(np.int32)

    def permute(self, x: Any, axis: int = 1) -> Any:
        """Puts an array's tokens from row by row into this order.

        Args:
          x: Array [.., T, ..] of tokens (activations, positions, labels), on the host or not.
          axis: Its axis of tokens.

        Returns:
          An array of the same shape and kind.

        Raises:
          ValueError: The axis has another length than the order.
        """
        return self._taken(x, axis, self.order)

    def unpermute(self, x: Any, axis: int = 1) -> Any:
        """Puts an array's tokens from this order back to row by row; see `permute`."""
        return self._taken(x, axis, self.places)

    def _taken(self, x: Any, axis: int, indices: Any) -> Any:
        x = as_array(x)
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != self.tokens:
            raise ValueError(
                f"TokenOrder: the order has {self.tokens} tokens, got axis {axis} of an array of shape {x.shape}"
            )
        if isinstance(x, np.ndarray) and isinstance(indices, np.ndarray):
            return np.take(x, indices, axis)
        return jnp.take(x, indices, axis, mode="clip", unique_indices=True)

    # ---- masks --------------------------------------------------------------------------------------------------

    def mask(self, mask: Mask) -> Mask:
        """The mask of tokens in this order: its queries and keys reordered, whatever mask it is.

        Costs of binding the result: what the mask costs for masks of intervals (causal, windows, chunks, prefixes,
        dilations), of segments and of global tokens, and for those combined. Of any other mask every block is
        evaluated that the other parts leave open. Bind it once, outside of the jitted function where that is long.

        Args:
          mask: Mask of the tokens row by row, of T queries and T keys. It may hold traced arrays (segment ids, that of
            documents or of padding).

        Returns:
          A lazy mask of T queries and T keys.

        Raises:
          TypeError: It is no lazy mask.

        Examples:
          >>> import numpy as np
          >>> from jax_bsk.masks import CausalMask, TokenOrder
          >>> order = TokenOrder.tiles((2, 2), (2, 1))
          >>> order.order.tolist()
          [0, 2, 1, 3]
          >>> order.mask(CausalMask()).bind(4, block_size=32).to_dense()[0, 0].astype(int).tolist()
          [[1, 0, 0, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]]
        """
        if not isinstance(mask, Mask):
            raise TypeError(f"TokenOrder: mask must be a lazy mask, got {described(mask)}; {remedy_for(mask)}")
        return ordered(mask, self.order, self.places)

    def describe(self, mask: Mask, *, block_size: int | tuple[int, int] = 128) -> str:
        """How many blocks a mask visits row by row and in this order; binds it in both.

        Args:
          mask: Mask of the tokens row by row.
          block_size: Tokens of a block, as in `bind`.

        Returns:
          Lines of text.

        Raises:
          TypeError: The mask is traced, or no lazy mask.
          ValueError: It does not fit the order's tokens.

        Examples:
          >>> from jax_bsk.masks import FunctionMask, TokenOrder
          >>> near = FunctionMask(lambda q, k: (abs(q // 64 - k // 64) <= 5) & (abs(q % 64 - k % 64) <= 5))
          >>> print(TokenOrder.tiles((64, 64), (8, 8)).describe(near, block_size=64))
          TokenOrder: 64 x 64 tokens, tiles of 8 x 8
            row by row: 674 of 4,096 blocks of 64 x 64 visited (16.46 %)
            tiles of 8 x 8: 484 (11.82 %)
        """
        before, after = (order._bound(mask, block_size) for order in (TokenOrder.raster(self.grid), self))
        total = before.nq * before.nk or 1
        counts = [int(x.row_offsets[..., -1].sum()) / (x.batch * x.heads) for x in (before, after)]
        (old, new), (old_share, new_share) = (f"{n:,.0f}" for n in counts), (f"{n / total:.2%}" for n in counts)
        old_share, new_share = (x.replace("%", " %") for x in (old_share, new_share))
        blocks = f"{total:,} blocks of {before.block_q} x {before.block_kv}"
        return "\n".join(
            (
                f"TokenOrder: {_times(self.grid)} tokens, {self.name}",
                f"  row by row: {old} of {blocks} visited ({old_share})",
                f"  {self.name}: {new} ({new_share})",
            )
        )

    def _bound(self, mask: Mask, block_size: int | tuple[int, int]) -> BlockMask:
        bound = BlockMask.from_mask(self.mask(mask), self.tokens, block_size=block_size)
        if bound.is_traced:
            raise TypeError(
                f"TokenOrder: blocks of a traced mask cannot be counted, got {mask!r}; count outside of jit"
            )
        return bound

    def __repr__(self) -> str:
        return f"TokenOrder({_times(self.grid)} tokens, {self.name})"


def _sizes(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    given = value if isinstance(value, Sequence) else (value,)
    sizes = tuple(static_int(size, "TokenOrder", name, minimum=1) for size in given)
    if not sizes or math.prod(sizes) >= MAX_LENGTH:
        raise ValueError(f"TokenOrder: {name} must have one size per axis and fewer than 2**30 tokens, given {value}")
    return sizes


def _times(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


__all__ = ["TokenOrder"]
