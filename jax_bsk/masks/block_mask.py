"""`BlockMask`: a mask as data. Which key blocks each query block visits, and bit tiles for the partly attended ones.

Second step of a call's path: made from a `Mask` (or arrays, index lists, scores), read by every kernel. This module is
the face: the data is `block_lists.BlockLists`, and what constructors and views do is in the modules below.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any, NoReturn, Self, SupportsIndex

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, is_array, is_traced
from jax_bsk.masks.algebra.data_masks import ArrayMask, BlockArrayMask
from jax_bsk.masks.algebra.mask import Mask, described, remedy_for
from jax_bsk.masks.block_lists import BlockLists, RowLists, register_pytree
from jax_bsk.masks.builders import _combine, _host, _topk, _traced, indices
from jax_bsk.masks.grid import Grid, grid_of
from jax_bsk.masks.run_lists import RowRuns, RunLists
from jax_bsk.masks.views import _checks, _plot, _reading

if TYPE_CHECKING:
    import os

    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockMask(BlockLists):
    """Block lists and bit tiles of a mask; a pytree. Make one with `mask.bind(...)` or a `from_*` constructor.

    With B the examples and H the query heads the mask distinguishes (1: shared by all), nq and nk the blocks of queries
    and keys. Arrays built on the host are numpy. As arguments of a jitted function they are copied to the device once,
    at the first use, and the mask keeps the copies: do not change the arrays in place. A host mask holds long lists as
    runs (`RunBlockMask`), and makes the lists when these attributes are asked for.

    Attributes:
      row_offsets: int32 [B, H, nq + 1], where each row's entries start in the lists; the last is their number. A row
        that ends past the lists (overflow of a traced mask) gives NaN.
      kv_blocks: int32 [B, H, capacity], key blocks of each row, partial ones first, then full ones, ascending in both;
        -1 past the end.
      tiles: int32 [B, H, capacity], number of the entry's bit tile; -1 where every element is attended.
      bit_tiles: uint32 [B|1, H|1, tiles, block_q, block_kv // 32]; bit c % 32 of word [r, c // 32] is set where query r
        of the block attends to key c. Elements past the lengths mean nothing.
      col_offsets, q_blocks, col_tiles: the same lists by key block; None until `transpose()`.
      block_q, block_kv: tokens of a block.
      q_len, kv_len: tokens.
      planned: whether the tokens are in the order of `context.plan`, in which distances are not those of the sequence.

    Examples:
      Row 0 visits block 0 with bit tile 0. Row 1 visits block 1 with the same tile, then the full block 0.

      >>> from jax_bsk.masks import BlockMask, CausalMask
      >>> mask = CausalMask().bind(256)
      >>> mask
      BlockMask(batch=1, heads=1, q_len=256, kv_len=256, block_size=(128, 128), 3 entries, 1 tiles)
      >>> mask.row_offsets[0, 0].tolist(), mask.kv_blocks[0, 0].tolist(), mask.tiles[0, 0].tolist()
      ([0, 1, 3], [0, 1, 0], [0, 0, -1])
    """

    # ---- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def from_mask(
        cls,
        mask: Mask,
        q_len: int,
        kv_len: int | None = None,
        *,
        block_size: int | tuple[int, int] = 128,
        max_blocks: int | None = None,
        max_tiles: int | None = None,
    ) -> Self:
        """Block lists of a lazy mask.

        A mask without traced arrays is built on the host, exactly, also inside `jit` (a constant there). One that holds
        traced arrays is built in the trace, with room for a number of blocks and tiles fixed beforehand.

        Args:
          mask: the mask.
          q_len: number of queries.
          kv_len: number of keys; `q_len` if not given.
          block_size: tokens of a block, one int or a (query, key) pair, multiples of 32.
          max_blocks: room for so many visited blocks in each example and head. Traced: by default all blocks that the
            parts known beforehand leave open (`CausalMask() & SegmentMask(traced)`: those of causal). On the host:
            by default what is needed; give it to have equal shapes (no retracing) for changing masks.
          max_tiles: the same for bit tiles.

        Returns:
          A `BlockMask` [B|1, H|1, ...], of numpy arrays where it was built on the host.

        Raises:
          TypeError: where mask is not a `Mask`.
          ValueError: where the mask does not fit the lengths, a size is impossible, or a host mask needs more room. A
            traced mask that needs more gives NaN in the rows that found no room.
        """
        if not isinstance(mask, Mask):
            remedy = "; for a boolean array use BlockMask.from_dense" if is_array(mask) else ""
            remedy = remedy or f"; {remedy_for(mask)}"
            raise TypeError(f"mask must be a jax_bsk.masks.Mask, given {described(mask)}{remedy}")
        grid = grid_of(q_len, kv_len, block_size)
        limits = {"max_blocks": _limit(max_blocks, "max_blocks"), "max_tiles": _limit(max_tiles, "max_tiles")}
        mask = mask._sized(None, None)
        mask._validate(grid.q_len, grid.kv_len)
        batch, heads = mask.batch, mask.heads
        build = _traced.build if mask._is_traced(grid) else _host.build
        return cls._of(build(mask, grid, batch=batch, heads=heads, **limits), grid)

    @classmethod
    def from_dense(
        cls,
        array: ArrayLike,
        *,
        block_size: int | tuple[int, int] = 128,
        max_blocks: int | None = None,
        max_tiles: int | None = None,
    ) -> Self:
        """Block lists of a boolean array over elements.

        Args:
          array: bool [T, S], [H|1, T, S] or [B|1, H|1, T, S], host or traced; True attends.
          block_size, max_blocks, max_tiles: as in `from_mask`.

        Returns:
          A `BlockMask` for T queries and S keys.

        Raises:
          TypeError: where the array is not boolean.
          ValueError: where it is not 2-D to 4-D, or as `from_mask`.

        Examples:
          >>> import numpy as np
          >>> from jax_bsk.masks import BlockMask
          >>> BlockMask.from_dense(np.eye(64, dtype=bool), block_size=32).kv_blocks.tolist()
          [[[0, 1]]]
        """
        mask = ArrayMask(array)
        q_len, kv_len = mask.array.shape[-2:]
        return cls.from_mask(mask, q_len, kv_len, block_size=block_size, max_blocks=max_blocks, max_tiles=max_tiles)

    @classmethod
    def from_block_mask(
        cls,
        blocks: ArrayLike,
        *,
        q_len: int,
        kv_len: int | None = None,
        block_size: int | tuple[int, int] = 128,
        mask: Mask | None = None,
        max_blocks: int | None = None,
        max_tiles: int | None = None,
    ) -> Self:
        """Block lists of a boolean array over blocks [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk], host or traced.

        Args:
          blocks: booleans, True where a pair of blocks is attended.
          mask: a mask of the elements inside those blocks (causal, say); None attends to whole blocks.
          q_len, kv_len, block_size, max_blocks, max_tiles: as in `from_mask`.

        Returns:
          A `BlockMask` with the blocks' leading dimensions.

        Raises:
          TypeError: where blocks are not boolean.
          ValueError: where their shape does not fit the lengths, or as `from_mask`.

        Examples:
          >>> import numpy as np
          >>> from jax_bsk.masks import BlockMask
          >>> BlockMask.from_block_mask(np.eye(2, dtype=bool), q_len=64, block_size=32).density
          0.5
        """
        grid = grid_of(q_len, kv_len, block_size)
        chosen: Mask = BlockArrayMask(blocks, (grid.block_q, grid.block_kv))
        chosen = chosen if mask is None else chosen & mask
        return cls.from_mask(chosen, q_len, kv_len, block_size=block_size, max_blocks=max_blocks, max_tiles=max_tiles)

    @classmethod
    def from_indices(
        cls,
        kv_blocks: ArrayLike,
        counts: ArrayLike,
        *,
        q_len: int,
        kv_len: int | None = None,
        block_size: int | tuple[int, int] = 128,
    ) -> Self:
        """Block lists of index lists: row i attends to the whole key blocks `kv_blocks[..., i, :counts[..., i]]`.

        Args:
          kv_blocks: integers [nq, k], [H|1, nq, k] or [B|1, H|1, nq, k]; entries past the count mean nothing.
          counts: integers, the shape of kv_blocks without its last dimension.
          q_len, kv_len, block_size: as in `from_mask`.

        Returns:
          A `BlockMask` without bit tiles, with the leading dimensions of kv_blocks.

        Raises:
          TypeError, ValueError: for wrong dtypes or shapes; and for host arrays, naming the row, where ids are out of
            range, not ascending or twice there, or a count is not in [0, k]. Traced lists are visited as listed;
            rows with an id out of range, or a count not in [0, k], give NaN.

        Examples:
          >>> from jax_bsk.masks import BlockMask
          >>> BlockMask.from_indices([[0, -1], [0, 1]], [1, 2], q_len=64, block_size=32).row_offsets.tolist()
          [[[0, 1, 3]]]
        """
        grid = grid_of(q_len, kv_len, block_size)
        return cls._of(indices.from_indices(kv_blocks, counts, grid), grid)

    @classmethod
    def from_topk(
        cls,
        scores: ArrayLike,
        k: int,
        *,
        q_len: int,
        kv_len: int | None = None,
        block_size: int | tuple[int, int] = 128,
        mask: Mask | None = None,
    ) -> Self:
        """Block lists of the `k` key blocks of highest score for each query block.

        Args:
          scores: [nq, nk], [H|1, nq, nk] or [B|1, H|1, nq, nk], host or traced. Of equal scores the lower block is
            taken; blocks of score -inf or NaN never are.
          k: number of blocks per row, in [1, nk].
          mask: a mask for the elements; blocks it leaves empty are not chosen, chosen ones are masked by it. With
            `CausalMask()`: the k best blocks at or before the query's own.
          q_len, kv_len, block_size: as in `from_mask`.

        Returns:
          A `BlockMask` with the scores' leading dimensions.

        Raises:
          TypeError: where scores are not real numbers, or k is no int.
          ValueError: where a shape does not fit, or k is out of range.

        Examples:
          >>> from jax_bsk.masks import BlockMask, CausalMask
          >>> BlockMask.from_topk([[0, 9], [1, 2]], 1, q_len=64, block_size=32, mask=CausalMask()).kv_blocks.tolist()
          [[[0, 1]]]
        """
        grid = grid_of(q_len, kv_len, block_size)
        mask = None if mask is None else mask._sized(None, None)
        chosen, max_blocks, max_tiles = _topk.top_k(scores, k, grid, mask)
        traced = is_traced(chosen) or (mask is not None and mask._is_traced(grid))
        return cls.from_block_mask(
            chosen,
            q_len=grid.q_len,
            kv_len=grid.kv_len,
            block_size=block_size,
            mask=mask,
            max_blocks=max_blocks if traced else None,
            max_tiles=max_tiles if traced else None,
        )

    def with_rows(self, lists: RowLists | RowRuns, *, planned: bool = False) -> BlockMask:
        """The mask of these query-major lists, of the same lengths and block sizes; nothing is checked."""
        return BlockMask._of(lists, self._grid, planned)

    @classmethod
    def _of(cls, lists: RowLists | RowRuns, grid: Grid, planned: bool = False) -> Any:
        if isinstance(lists, RowRuns):
            return RunBlockMask.of_runs(lists, grid, planned)
        return cls(
            lists.row_offsets,
            lists.kv_blocks,
            lists.tiles,
            lists.bit_tiles,
            None,
            None,
            None,
            grid.block_q,
            grid.block_kv,
            grid.q_len,
            grid.kv_len,
            planned,
        )

    # ---- densities ----------------------------------------------------------------------------------------------

    @property
    def density(self) -> float:
        """Visited blocks / all blocks: what the time of a call is proportional to."""
        return _reading.density(self._concrete("density"))

    @property
    def element_density(self) -> float:
        """Attended elements / all elements; at most `density`, up to the blocks at the ends."""
        return _reading.element_density(self._concrete("element_density"))

    # ---- combination --------------------------------------------------------------------------------------------

    def __and__(self, other: Mask | BlockMask) -> BlockMask:
        """The same blocks, whose elements are attended where `other`, too, attends: exact, on the host and traced.

        The lists keep their entries and their capacity, so gates of this mask are gates of the result. Blocks that
        `other` leaves empty stay listed, with no element attended: where masks can be combined before they are bound,
        fewer blocks are visited. Of two BlockMasks the left one's lists stay.

        Args:
          other: a lazy mask, or a BlockMask of the same lengths and block size.

        Returns:
          A `BlockMask` with this one's lists.

        Raises:
          TypeError: where it is neither.
          ValueError: where lengths, block sizes, batch or heads do not fit.
        """
        return self._and_mask(other)

    def __rand__(self, other: object) -> BlockMask:
        return self._and_mask(other)

    def _and_mask(self, other: object) -> BlockMask:
        planned = self.planned
        if isinstance(other, BlockMask):
            planned |= other.planned
            sizes = [(x.q_len, x.kv_len, x.block_q, x.block_kv) for x in (self, other)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    "BlockMask & BlockMask: both must have the same (q_len, kv_len, block_q, block_kv), got "
                    f"{sizes[0]} and {sizes[1]}; bind both to the same lengths with the same block_size"
                )
            other = _combine.ListedMask(other)
        elif not isinstance(other, Mask):
            raise TypeError(f"cannot combine a BlockMask with {described(other)} by `&`: {remedy_for(other, '&')}")
        return BlockMask._of(_combine.combine(self, other), self._grid, planned)

    def _refused(self, operator: str, other: object) -> NoReturn:
        raise TypeError(
            f"cannot combine a BlockMask with {described(other)} by `{operator}`: its blocks are chosen, and none can "
            "be added; combine lazy masks before they are bound, e.g. (a | b).bind(q_len, kv_len)"
        )

    def __or__(self, other: object) -> NoReturn:
        self._refused("|", other)

    def __ror__(self, other: object) -> NoReturn:
        self._refused("|", other)

    def __invert__(self) -> NoReturn:
        raise TypeError(
            "a BlockMask cannot be inverted, as its blocks are chosen; invert the lazy mask before it is bound, "
            "(~mask).bind(q_len, kv_len)"
        )

    # ---- views --------------------------------------------------------------------------------------------------

    def to_dense(self) -> np.ndarray:
        """bool [B|1, H|1, q_len, kv_len] on the host: for tests and looks, quadratic in the length.

        Raises:
          ValueError: where `check` does.
          TypeError: where the mask is traced.
        """
        self.check()
        return _reading.to_dense(self._concrete("to_dense()"))

    def padded(self, *, max_blocks: int | None = None, max_tiles: int | None = None) -> BlockMask:
        """The same mask with more room, so that masks of different content have arrays of equal shapes.

        A jitted function that takes a BlockMask as an argument is compiled once for each shape of its arrays. Padded
        masks have few shapes: a new one compiles nothing until it needs twice the room. Rows that found no room in
        this mask stay bad.

        Args:
          max_blocks: number of entries that each list has room for; by default the next power of two.
          max_tiles: number of bit tiles; by default the next power of two, or 0 where there is none.

        Returns:
          A `BlockMask` of plain lists.

        Raises:
          TypeError: where a number is no int.
          ValueError: where the mask has more.
        """
        capacity, n_tiles = self.kv_blocks.shape[-1], self.bit_tiles.shape[2]
        sizes = []
        for name, given, least in (("max_blocks", max_blocks, capacity), ("max_tiles", max_tiles, n_tiles)):
            size = _limit(given, name)
            if size is None:
                size = 1 << (least - 1).bit_length() if least else 0
            if size < least:
                raise ValueError(f"{name} must be at least {least}, what the mask has, got {size}; give more room")
            sizes.append(size)

        def pad(x: Any, axis: int, size: int, fill: int) -> Array:
            xp = np if isinstance(x, np.ndarray) else jnp
            widths = [(0, size - n if k == axis else 0) for k, n in enumerate(x.shape)]
            return xp.pad(x, widths, constant_values=fill)

        def numbers(x: Any) -> Array:  # one of no tile must not become that of a new one
            xp = np if isinstance(x, np.ndarray) else jnp
            return xp.where(x >= n_tiles, np.int32(2**31 - 1), x)

        lists = {"kv_blocks": self.kv_blocks, "tiles": numbers(self.tiles)}
        if self.col_offsets is not None:
            lists |= {"q_blocks": self.q_blocks, "col_tiles": numbers(self.col_tiles)}
        changes = {name: pad(x, 2, sizes[0], -1) for name, x in lists.items()}
        return dataclasses.replace(self, bit_tiles=pad(self.bit_tiles, 2, sizes[1], 0), **changes)

    def check(self) -> None:
        """Checks what kernels do not trust.

        Raises:
          ValueError: naming the first (batch, head, row) whose offsets, ids or tile numbers are out of range: kernels
            give NaN for such a row. The same of the columns of key-major lists, where there are any: NaN in dk and dv
            of such a column, and wrong ones where its entries are not those of the rows.
          TypeError: where the mask is traced.
        """
        _checks.check(self._concrete("check()"))

    def describe(self, *, batch: int | None = None, heads: int | None = None, head_dim: int | None = None) -> str:
        """Describes the mask in a few lines.

        Args:
          batch, heads: examples and query heads of the attention call, for its useful FLOPs; by default the mask's.
          head_dim: head size of queries, keys and values; FLOPs are told where it is given (forward: two products of
            2 * head_dim operations for each attended element).

        Returns:
          Lines of text.

        Raises:
          TypeError: where the mask is traced.

        Examples:
          >>> from jax_bsk.masks import CausalMask
          >>> print(CausalMask().bind(512).describe())
          BlockMask: 512 queries x 512 keys in blocks of 128 x 128 (4 x 4 blocks), batch 1, heads 1
            visited: 10 blocks per list, 6 full, 4 partial
            density: 62.50% of the blocks, 50.10% of the elements
            storage: 1 bit tiles, 2,148 bytes
        """
        return _reading.describe(self._concrete("describe()"), batch, heads, head_dim)

    def plot(
        self, path_or_ax: str | os.PathLike[str] | Axes | None = None, *, batch: int = 0, head: int = 0, title: str = ""
    ) -> Axes:
        """Draws the blocks: empty, partial and full. Needs matplotlib.

        Args:
          path_or_ax: where to save it (the suffix says the format), or matplotlib axes to draw in; None for new ones.
          batch, head: which example and head.
          title: instead of the mask's sizes and density.

        Returns:
          The axes.

        Raises:
          ImportError: where matplotlib is missing.
          ValueError: where the mask has no such example or head.
          TypeError: where it is traced.
        """
        return _plot.plot(self._concrete("plot()"), path_or_ax, batch, head, title)


register_pytree(BlockMask)


class RunBlockMask(RunLists, BlockMask):
    """A `BlockMask` whose long lists are held as runs: see `RunLists`. `BlockMask.from_mask` makes it of long masks."""

    _plain_class = BlockMask

    def check(self) -> None:
        """See `BlockMask.check`: of runs, and of their transposition as runs."""
        _checks.check_runs(self._concrete("check()"))

    def __reduce__(self) -> Any:
        return _restored, (self.__getstate__(),)


register_pytree(RunBlockMask)


def _restored(fields: dict[str, Any]) -> RunBlockMask:
    """A mask of runs from its pickled state."""
    return RunBlockMask.of_fields(**fields)


def _limit(value: SupportsIndex | None, name: str) -> int | None:
    if value is None:
        return None
    try:
        limit = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, given {type(value).__name__} {value!r}") from None
    # Lists keep one entry at least, so that no kernel is handed an empty one.
    least = 1 if name == "max_blocks" else 0
    if not least <= limit < 2**31:
        raise ValueError(f"{name} must be in [{least}, 2**31), given {limit}")
    return limit


__all__ = ["BlockMask"]
