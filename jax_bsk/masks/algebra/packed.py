"""`PackedMask`: sequences packed one after another, given by where they begin, and a mask within each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, as_array, known
from jax_bsk.masks._search import last_at_most
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._intervals import Intervals, RowBounds, classify, inside, row_bounds
from jax_bsk.masks.algebra._offsets import blocks_met, int32, static_int
from jax_bsk.masks.algebra.data_masks import ArrayMask, BlockArrayMask, SegmentMask
from jax_bsk.masks.algebra.mask import AndMask, Mask, MultiHeadMask, _Unknown, described, parts, remedy_for
from jax_bsk.masks.algebra.patterns import (
    BigBirdMask,
    CausalMask,
    ChunkedMask,
    FullMask,
    LocalMask,
    PrefixLMMask,
)
from jax_bsk.masks.grid import EMPTY, FULL, MAX_LENGTH, OWN, Grid

__all__ = ["Alignment", "PackedMask"]

Alignment = Literal["top_left", "bottom_right"]
_ALIGNMENTS = ("top_left", "bottom_right")
# Numbers of no sequence, before the first one and after the last; those of queries and of keys are not equal.
_NO_QUERY, _NO_KEY = (-1, 2**30), (-2, 2**30 + 1)


class _Tokens(NamedTuple):
    """Of tokens: the number of their sequence, where its queries and keys begin and end, and whether there is one.

    `before` says whether they are before the first sequence.
    """

    sequence: Any
    q_start: Any
    q_end: Any
    kv_start: Any
    kv_end: Any
    inside: Any
    before: Any

    def numbers(self, outside: tuple[int, int], grid: Grid) -> Any:
        """Numbers of sequences that ascend from token to token, with those of tokens before and after all of them."""
        before, after = (np.int32(number) for number in outside)
        return grid.xp.where(self.inside, self.sequence, grid.xp.where(self.before, before, after))


class PackedMask(Mask):
    """Attends within packed sequences, and there where a mask of positions says so.

    Sequence n has the queries `cu_seqlens_q[n]` to `cu_seqlens_q[n + 1]` and the keys `cu_seqlens_kv[n]` to
    `cu_seqlens_kv[n + 1]`. Either may be none. Tokens before the first and from the last number on belong to no
    sequence: they attend to nothing, and nothing attends to them. Repeat the last number for sequences that are not
    used.

    Positions count from the start of each sequence. A mask that combines causal masks, windows, chunks and prefixes by
    `&` gives each query one interval of keys. Inside `jit` its lists are then computed from the intervals in a few
    array operations. Any other mask is classified block by block and has room for a bit tile per block.

    Args:
      cu_seqlens_q: integers [sequences + 1] that never decrease, or [B, sequences + 1] for those of each example; host
        or traced. Where the values are known, they are checked when the mask is bound; traced ones that decrease, or
        lie outside [0, q_len], give NaN in all rows.
      cu_seqlens_kv: the same for keys; `cu_seqlens_q` if not given.
      within: mask of the positions within a sequence; None attends to all of them. It may be causal, a window, chunks,
        a prefix, dilated, global tokens or a function, combined. Offsets and prefixes that are arrays have one number
        per sequence.
      alignment: where position 0 of the queries is. "top_left": at the first key. "bottom_right": where the last query
        stands at the last key, as in flash-attn from 2.1 on. With as many queries as keys both are the same.
      max_seqlen_q, max_seqlen_kv: a promise, used when numbers are traced: no sequence has more queries or keys.
        Without it there is room for all pairs of blocks (in causal self-attention for half of them). Where it is
        broken, rows that find no room give NaN; nothing is truncated silently.

    Raises:
      TypeError, ValueError: where an argument is none of these.

    Examples:
      >>> from jax_bsk.masks import CausalMask, PackedMask
      >>> PackedMask([0, 2, 3, 3], within=CausalMask()).bind(4, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
      >>> lined_up = PackedMask([0, 2], [0, 3], CausalMask(), alignment="bottom_right")
      >>> lined_up.bind(2, 3, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 1]]
    """

    _data_fields = ("cu_seqlens_q", "cu_seqlens_kv", "within")
    cu_seqlens_q: Array
    cu_seqlens_kv: Array | None
    within: Mask | None
    alignment: Alignment
    max_seqlen_q: int | None
    max_seqlen_kv: int | None

    def __init__(
        self,
        cu_seqlens_q: ArrayLike | Sequence[Any],
        cu_seqlens_kv: ArrayLike | Sequence[Any] | None = None,
        within: Mask | None = None,
        *,
        alignment: Alignment = "top_left",
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
    ) -> None:
        q = _numbers(cu_seqlens_q, "cu_seqlens_q")
        kv = None if cu_seqlens_kv is None else _numbers(cu_seqlens_kv, "cu_seqlens_kv")
        if kv is not None:
            _check_pair(q, kv)
        if alignment not in _ALIGNMENTS:
            raise ValueError(f"PackedMask: alignment is 'top_left' or 'bottom_right', got {alignment!r}; choose one")
        if within is not None:
            _check_within(within, q.shape[-1] - 1)
        self._set(
            cu_seqlens_q=q,
            cu_seqlens_kv=kv,
            within=within,
            alignment=alignment,
            max_seqlen_q=_longest(max_seqlen_q, "max_seqlen_q"),
            max_seqlen_kv=_longest(max_seqlen_kv, "max_seqlen_kv"),
        )

    # ---- the mask within, which is no part of this one as operands of `&` are: it is asked about positions -----------

    def _children(self) -> tuple[Mask, ...]:
        return ()

    def _own_traced(self, grid: Grid) -> bool:
        return super()._own_traced(grid) or (self.within is not None and self.within._is_traced(_inner(grid)))

    def _structural_dims(self, dim: str) -> set[int]:
        return set() if self.within is None else self.within._structural_dims(dim)

    @property
    def _coarse_bounds(self) -> bool:
        return _shape(self.within) is not None

    def _leaf_dims(self, name: str) -> str:
        return "b" if np.ndim(getattr(self, name)) == 2 else ""

    def _arrays(self) -> Any:
        # Those of the mask within have no examples: their numbers are those of sequences.
        for name in ("cu_seqlens_q", "cu_seqlens_kv"):
            if getattr(self, name) is not None:
                yield getattr(self, name), self._leaf_dims(name)
        if self.within is not None:
            yield from ((array, "" if self._per_sequence else dims) for array, dims in self.within._arrays())

    @property
    def _per_sequence(self) -> bool:
        """Whether the mask within has numbers for each sequence."""
        return self.within is not None and any(_per_sequence(part) for part in parts(self.within))

    def _select(self, b: int | None, h: int | None) -> Mask:
        keep = self._per_sequence
        return self._map_fields(
            lambda child: child if keep else child._select(b, h), lambda name, x: self._select_leaf(name, x, b, h)
        )

    def _known_on_host(self, grid: Grid) -> Mask:
        return _Unknown() if self._is_open(grid) else self

    def _validate(self, q_len: int, kv_len: int) -> None:
        given = [("cu_seqlens_q", self.cu_seqlens_q, q_len, self.max_seqlen_q)]
        if self.cu_seqlens_kv is not None:
            given.append(("cu_seqlens_kv", self.cu_seqlens_kv, kv_len, self.max_seqlen_kv))
        elif q_len != kv_len:
            raise ValueError(
                f"PackedMask: cu_seqlens_kv must be given where q_len={q_len} and kv_len={kv_len} differ, got None; "
                "say where each sequence's keys begin"
            )
        for name, array, length, longest in given:
            _check_values(name, known(array), length, longest)
        if self.within is not None:
            self.within._validate(max(q_len, kv_len), max(q_len, kv_len))

    # ---- tokens -------------------------------------------------------------------------------------------------

    def _both(self, grid: Grid) -> tuple[Any, Any]:
        q = int32(self.cu_seqlens_q, grid.xp)
        return q, q if self.cu_seqlens_kv is None else int32(self.cu_seqlens_kv, grid.xp)

    def _tokens(self, grid: Grid, index: Array, *, keys: bool) -> _Tokens:
        """What is known of the queries or keys with these numbers."""
        xp, (q, kv) = grid.xp, self._both(grid)
        starts = kv if keys else q
        sequence = last_at_most(starts, index, xp)
        found = (sequence >= 0) & (sequence < starts.shape[0] - 1)
        at = xp.clip(sequence, 0, starts.shape[0] - 2)
        return _Tokens(at, q[at], q[at + 1], kv[at], kv[at + 1], found, sequence < 0)

    def _query_positions(self, tokens: _Tokens, q: Array) -> Any:
        """Positions of queries in their sequences; negative where they stand before the first key."""
        if self.alignment == "top_left" or self.cu_seqlens_kv is None:
            return q - tokens.q_start
        return (q - tokens.q_end) + (tokens.kv_end - tokens.kv_start)

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        if example is not None:
            return None
        xp = grid.xp
        tokens = self._tokens(grid, positions, keys=False)
        # Keys count from the sequence's start, too: intervals are cut to the sequence afterwards.
        within = FullMask() if self.within is None else self.within
        inner = within._key_intervals(grid, self._query_positions(tokens, positions), tokens.sequence)
        if inner is None:
            return None
        most = np.int32(MAX_LENGTH)
        first = tokens.kv_start + xp.clip(inner.first, 0, most - 1)
        end = tokens.kv_start + xp.clip(inner.end, 0, most - 1)
        first, end = xp.minimum(first, tokens.kv_end), xp.minimum(end, tokens.kv_end)
        some = tokens.inside & (first < end)
        return Intervals(
            xp.where(some, first, most),
            xp.where(some, end, np.int32(0)),
            inner.own and self.cu_seqlens_kv is None,
            self._kept(grid) if inner.valid is None else self._kept(grid) & inner.valid,
        )

    def _kept(self, grid: Grid) -> Any:
        """Whether the numbers never decrease and lie inside the lengths."""
        q, kv = self._both(grid)
        kept = (q[0] >= 0) & (q[-1] <= grid.q_len) & (q[1:] >= q[:-1]).all()
        if kv is not q:
            kept = kept & (kv[0] >= 0) & (kv[-1] <= grid.kv_len) & (kv[1:] >= kv[:-1]).all()
        return kept

    # ---- blocks -------------------------------------------------------------------------------------------------

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        xp = grid.xp
        rows, which = (np.unique(i, return_inverse=True)) if xp is np else (i, None)
        q = xp.reshape(rows, (-1, 1)) * np.int32(grid.block_q) + xp.arange(grid.block_q, dtype=np.int32)[None]
        intervals = self._key_intervals(grid, q)
        if intervals is None:
            found = self._tokens_bounds(grid, q)
        else:
            found = row_bounds(grid, *inside(intervals, grid, q.shape), q < grid.q_len)
        bounds = [xp.reshape(x if which is None else x[which.ravel()], i.shape) for x in found]
        if intervals is not None:
            return classify(grid, RowBounds(*bounds), j, OWN)
        return self._classify_positions(grid, bounds, j)

    def _tokens_bounds(self, grid: Grid, q: Array) -> tuple[Any, ...]:
        """Of blocks of queries [rows, block_q]: first and last sequence, and first and last position."""
        q = grid.xp.minimum(q, grid.q_len - 1)
        tokens = self._tokens(grid, q, keys=False)
        sequence, place = tokens.numbers(_NO_QUERY, grid), self._query_positions(tokens, q)
        return sequence.min(-1), sequence.max(-1), place.min(-1), place.max(-1)

    def _classify_positions(self, grid: Grid, bounds: list[Any], j: Array) -> Any:
        """Codes where a row's queries have no intervals: the mask within is asked about blocks of one sequence."""
        xp, inner = grid.xp, _inner(grid)
        q_first, q_last, low, high = bounds
        ends = [self._tokens(grid, k, keys=True) for k in grid.kv_bounds(j)]
        k_first, k_last = (x.numbers(_NO_KEY, grid) for x in ends)
        k_low, k_high = (k - x.kv_start for k, x in zip(grid.kv_bounds(j), ends, strict=True))
        one = (q_first == q_last) & (k_first == k_last)
        same = one & (q_first == k_first) & (low >= 0)
        # A block's positions lie in one block of whole sequences, or in two.
        assert self.within is not None
        codes = [
            self.within._classify(
                inner, xp.clip(row // grid.block_q, 0, inner.nq - 1), xp.clip(column // grid.block_kv, 0, inner.nk - 1)
            )
            for row in (low, high)
            for column in (k_low, k_high)
        ]
        empty, full = same, same
        for code in codes:
            empty, full = empty & (code == EMPTY), full & (code == FULL)
        return grid.code(empty | (q_last < k_first) | (q_first > k_last) | (one & (q_first != k_first)), full, OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        intervals = self._key_intervals(grid, q)
        if intervals is not None:
            return (k >= intervals.first) & (k < intervals.end)
        assert self.within is not None
        queries, keys = self._tokens(grid, q, keys=False), self._tokens(grid, k, keys=True)
        same = queries.inside & keys.inside & (queries.sequence == keys.sequence)
        place = self._query_positions(queries, q), grid.xp.maximum(k - keys.kv_start, 0)
        return same & self.within._evaluate(_inner(grid), *place)

    # ---- room for lists that are made before numbers are known ----------------------------------------------------

    def _partial_bound(self, grid: Grid) -> int:
        shape, visited = _shape(self.within), self._visited_bound(grid)
        if shape is None:
            return visited
        left, right = int(shape.left_moves), int(shape.right_moves)
        if self.cu_seqlens_kv is None and shape.own and grid.block_q == grid.block_kv:
            # Of a row, its own block. To the left of it the block where its first sequence (or chunk) begins, or the
            # two that the left ends of a window meet; and blocks inside a sequence that ends in the row, each of which
            # is beside one such row. The same to the right, if a query sees there.
            return min(visited, grid.nq * (3 + left) + (0 if shape.causal else grid.nq * (2 + right)))
        # Sequences (or chunks) are segments: see `SegmentMask`. An end that moves makes a staircase of blocks.
        return min(visited, (2 + left + right) * (grid.nq + grid.nk))

    def _visited_bound(self, grid: Grid) -> int:
        if not self._is_open(grid):
            return super()._visited_bound(grid)
        shape, alike = _shape(self.within), self.cu_seqlens_kv is None
        longest = _least(self.max_seqlen_kv, self.max_seqlen_q if alike else None)
        left, right = (_least(longest, x) for x in ((shape.left, shape.right) if shape is not None else (None, None)))
        bounds = [grid.nq * grid.nk]
        if longest is not None:
            # A row sees the keys of its sequences. Those of successive rows have one sequence in common.
            bounds.append(grid.nk + grid.nq * (-(-longest // grid.block_kv) + 2))
        in_window = None if left is None or right is None else blocks_met(grid.block_q + left + right, grid.block_kv)
        if alike and shape is not None and shape.own:
            if in_window is not None:
                bounds.append(grid.nq * in_window)
            if shape.causal:
                ends = np.minimum((np.arange(grid.nq, dtype=np.int64) + 1) * grid.block_q, grid.kv_len)
                bounds.append(int((-(-ends // grid.block_kv)).sum()))
        elif in_window is not None:
            # For each sequence of a row: those are as many as rows and sequences together.
            sequences = min(self.cu_seqlens_q.shape[-1] - 1, grid.q_len)
            bounds.append((grid.nq + sequences) * in_window)
        return min(bounds)

    def _repr_arguments(self) -> list[str]:
        given = {name: value for name, value in self._named().items() if value is not None}
        if self.alignment == "top_left":
            del given["alignment"]
        return [f"{name}={short(value)}" for name, value in given.items()]


class _Shape(NamedTuple):
    """What the intervals of the mask within look like.

    Attributes:
      left, right: Most tokens that a query attends to before and after its own position; None where it is not known.
      left_moves, right_moves: Whether that end of the intervals moves with the query within a sequence (or chunk).
      causal: Whether no query attends to a key after its own position.
      own: Whether each query attends to its own position.
    """

    left: int | None
    right: int | None
    left_moves: bool
    right_moves: bool
    causal: bool
    own: bool


def _shape(mask: Mask | None) -> _Shape | None:
    """The shape of a mask's intervals; None where queries have none."""
    shapes = [_part_shape(part) for part in ([] if mask is None else _intersected(mask))]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    return _Shape(
        min((x.left for x in known if x.left is not None), default=None),
        min((x.right for x in known if x.right is not None), default=None),
        any(x.left_moves for x in known),
        any(x.right_moves for x in known),
        any(x.causal for x in known),
        all(x.own for x in known),
    )


def _intersected(mask: Mask) -> list[Mask]:
    return [part for child in mask._children() for part in _intersected(child)] if isinstance(mask, AndMask) else [mask]


def _part_shape(mask: Mask) -> _Shape | None:
    if isinstance(mask, FullMask):
        return _Shape(None, None, False, False, False, True)
    if not isinstance(mask, CausalMask | LocalMask | ChunkedMask | PrefixLMMask):
        return None
    own = mask._is_zero()
    if isinstance(mask, CausalMask):
        shape = _Shape(None, 0, False, True, True, own)
    elif isinstance(mask, LocalMask):
        left, right = mask.window
        shape = _Shape(left, right, left is not None, right is not None, right == 0, own)
    elif isinstance(mask, ChunkedMask):
        shape = _Shape(mask.chunk - 1, mask.chunk - 1, False, False, False, own)
    else:
        shape = _Shape(None, None, False, True, False, own)
    return shape if own else shape._replace(left=None, right=None, causal=False)


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)


def _inner(grid: Grid) -> Grid:
    """The grid that the mask within is asked about: one sequence of all tokens."""
    length = max(grid.q_len, grid.kv_len)
    return dataclasses.replace(grid, q_len=length, kv_len=length)


# ---- checks of arguments --------------------------------------------------------------------------------------------


def _numbers(given: ArrayLike | Sequence[Any], name: str) -> Array:
    array = as_array(given)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"PackedMask: {name} must hold integers, given {array.dtype}{array.shape}; cast it to int32")
    if array.ndim not in (1, 2) or array.shape[-1] < 2:
        raise ValueError(
            f"PackedMask: {name} must be [sequences + 1] or [batch, sequences + 1] with at least one sequence, given "
            f"shape {array.shape}; give where each sequence begins, and where the last one ends"
        )
    return array


def _check_pair(q: Array, kv: Array) -> None:
    if q.shape[-1] != kv.shape[-1]:
        raise ValueError(
            f"PackedMask: cu_seqlens_q {q.shape} and cu_seqlens_kv {kv.shape} must have the same number of sequences; "
            "a sequence without queries or without keys repeats a number"
        )
    sizes = {x.shape[0] for x in (q, kv) if x.ndim == 2} - {1}
    if len(sizes) > 1:
        raise ValueError(f"PackedMask: cu_seqlens_q {q.shape} and cu_seqlens_kv {kv.shape} have different batch sizes")


def _longest(value: Any, name: str) -> int | None:
    remedy = "it bounds the room that is reserved when the program is compiled; give a number, or leave it out"
    return None if value is None else static_int(value, "PackedMask", name, minimum=0, remedy=remedy)


def _check_within(within: Any, sequences: int) -> None:
    if not isinstance(within, Mask):
        raise TypeError(f"PackedMask: within must be a Mask, given {described(within)}; {remedy_for(within)}")
    for part in _nodes(within):
        if isinstance(part, MultiHeadMask):
            raise ValueError(
                f"PackedMask: within must be one mask for all heads, got {part!r}; write MultiHeadMask([PackedMask("
                "cu_seqlens_q, within=mask) for mask in masks])"
            )
        if isinstance(part, SegmentMask | ArrayMask | BlockArrayMask | BigBirdMask | PackedMask):
            raise ValueError(
                f"PackedMask: within must be a mask of positions in a sequence, got {part!r}; combine it with the "
                "packed mask, PackedMask(...) & other"
            )
    if any(_per_sequence(part) for part in parts(within)) and _shape(within) is None:
        raise ValueError(
            f"PackedMask: numbers per sequence are possible in causal masks, windows, chunks and prefixes that `&` "
            f"combines, got {within!r}; use one number for all sequences"
        )
    for part in parts(within):
        for name in ("offset", "prefix"):
            shape = np.shape(getattr(part, name, 0))
            if len(shape) > 1 or (shape and shape[0] not in (1, sequences)):
                raise ValueError(
                    f"PackedMask: {name} of a mask within must be one number, or one per sequence [{sequences}], got "
                    f"{part!r} of shape {shape}; give as many as cu_seqlens_q has sequences"
                )


def _nodes(mask: Mask) -> Iterator[Mask]:
    yield mask
    for child in mask._children():
        yield from _nodes(child)


def _per_sequence(mask: Mask) -> bool:
    return any(np.ndim(getattr(mask, name, 0)) for name in ("offset", "prefix"))


def _check_values(name: str, values: np.ndarray | None, length: int, longest: int | None) -> None:
    if values is None or not values.size:
        return
    steps = np.diff(values.astype(np.int64), axis=-1)
    if steps.min() < 0:
        raise ValueError(f"PackedMask: {name} must never decrease, got {short(values)}; sort the sequences by place")
    if values.min() < 0 or values.max() > length:
        raise ValueError(
            f"PackedMask: {name} must lie in [0, {length}], the tokens there are, got {values.min()} to {values.max()}"
        )
    if longest is not None and steps.max() > longest:
        raise ValueError(
            f"PackedMask: {name} has a sequence of {steps.max()} tokens, more than the {longest} that were promised; "
            "give a larger max_seqlen"
        )
