"""The lazy mask algebra: the base class, `&`, `|`, `~`, and what a mask must know about itself.

First step of a call's path: a `Mask` says *which* query attends to which key; `BlockMask` (next step) is the data that
kernels read. A mask is never evaluated as a whole. It answers two questions about blocks:

- `_classify`: from bounds alone, is this block empty, full, or possibly partial? (one int8 class code per block)
- `_evaluate`: the exact boolean of the elements at given index arrays (asked only for partial blocks)

Both work with numpy on the host and with `jax.numpy` inside `jit`; `Grid.xp` says which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NoReturn

import numpy as np

from jax_bsk.core.arrays import Array, is_array, is_traced
from jax_bsk.masks.algebra._intervals import Intervals
from jax_bsk.masks.algebra._node import Node
from jax_bsk.masks.algebra._places import PlaceIntervals
from jax_bsk.masks.block_lists import BlockLists
from jax_bsk.masks.grid import OWN, SHIFT, Grid, code_and, code_not, code_or, row_chunks


class Mask(Node):
    """A lazy mask: it says which query attends to which key. `True` means "attend".

    Combine with `&`, `|` and `~`; make a `BlockMask` with `bind`. Masks are immutable pytrees: arrays they hold
    (segment ids, boolean arrays) are leaves, so a mask may be an argument of a jitted function; everything else is
    structure, compared with `==` and hashed. The structure does not depend on what the leaves are. A mask that
    holds arrays is not hashable, as arrays are not.

    Examples:
      >>> from jax_bsk.masks import CausalMask, GlobalMask, LocalMask
      >>> CausalMask() & (LocalMask(128) | GlobalMask([0]))
      CausalMask() & (LocalMask((128, 128)) | GlobalMask([0]))
    """

    # Whether attending depends on q - k alone.
    _shift_invariant: ClassVar[bool] = False
    # Whether `_classify` also answers for blocks that are larger than those of the lists, from bounds of theirs.
    _coarse_bounds: ClassVar[bool] = False
    # Whether its children are asked about the same queries and keys as the mask itself.
    _joins: ClassVar[bool] = True
    # `BlockMask.from_mask`, which stands above this module: the package sets it.
    _from_mask: ClassVar[Callable[..., Any]]
    # Binding strength of the printed form: `~a` 3, `a & b` 2, `a | b` 1.
    _precedence: ClassVar[int] = 4

    # Without this, `numpy_array & mask` would try the mask elementwise instead of asking `__rand__`.
    __array_ufunc__ = None

    # ---- what a mask knows about itself -------------------------------------------------------------------------

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        """Class codes (int8) of the blocks (i, j), broadcastable; one that is called partial may be empty or full."""
        raise NotImplementedError

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        """Booleans of the elements (q, k), broadcastable; anything where q or k is past its length."""
        raise NotImplementedError

    def _tile_key(self, grid: Grid, i: np.ndarray, j: np.ndarray) -> tuple[np.ndarray, ...] | None:
        """Keys of bit tiles: integers that the elements of the blocks (i, j) depend on; None where they are not known.

        Integer arrays [n] for blocks i and j, [n] too, on the host. Blocks inside the lengths with equal integers have
        equal elements.
        """
        if self._shift_invariant:
            return (i.astype(np.int64) * grid.block_q - j.astype(np.int64) * grid.block_kv,)
        return None

    def _as_places(self, grid: Grid) -> PlaceIntervals | None:
        """The mask as intervals of places, exactly and on one axis at least; None where it is not one of those."""
        del grid
        return None

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        """The keys of queries at ascending `positions` (int32), where each has one interval of them; else None.

        Args:
          grid: Grid of the mask.
          positions: Positions of queries, or their indices where the mask is the whole one. They may be negative.
          example: Which example each position belongs to, where masks of several are asked about at once; then arrays
            of the mask have one number per example.
        """
        del grid, positions, example
        return None

    def _validate(self, q_len: int, kv_len: int) -> None:
        """Raises ValueError where the mask cannot have these lengths."""
        for child in self._children():
            child._validate(q_len, kv_len)

    def _leaf_dims(self, name: str) -> str:
        """Leading dims of the array field `name`: "" , "b", "h" or "bh"."""
        del name
        return ""

    def _children(self) -> tuple[Mask, ...]:
        return tuple(leaf for _, leaf in self._fields() if isinstance(leaf, Mask))

    def _arrays(self) -> Iterator[tuple[Array, str]]:
        """Every array held by the mask, with its leading dims."""
        for name, value in self._fields():
            if isinstance(value, Mask):
                yield from value._arrays()
            elif is_array(value):
                yield value, self._leaf_dims(name)

    def _own_traced(self, grid: Grid) -> bool:
        """Whether this mask itself (not its children) can be evaluated only inside the trace."""
        del grid
        return any(is_traced(value) for _, value in self._fields())

    def _is_traced(self, grid: Grid) -> bool:
        return self._own_traced(grid) or any(child._is_traced(grid) for child in self._children())

    def _select(self, b: int | None, h: int | None) -> Mask:
        """The mask of example `b` and head `h`, without those dims (None: keep the dims of the arrays)."""
        return self._map_fields(lambda child: child._select(b, h), lambda name, x: self._select_leaf(name, x, b, h))

    def _select_leaf(self, name: str, leaf: Array, b: int | None, h: int | None) -> Array:
        dims = self._leaf_dims(name)
        indices = [b if dim == "b" else h for dim in dims]
        whole = None in indices  # then all dims stay, as which ones there are is told by their number
        for axis, index in enumerate(indices):
            if index is not None:
                n = index if leaf.shape[axis if whole else 0] > 1 else 0
                leaf = leaf[(slice(None),) * axis + (slice(n, n + 1),)] if whole else leaf[n]
        return leaf

    def _sized(self, batch: int | None, heads: int | None) -> Mask:
        """The mask with the sizes of the call in those parts that are asked about examples and heads by number.

        Raises:
          ValueError: where a part needs a size that it was not given, and None is given here.
        """
        return self._map_fields(lambda child: child._sized(batch, heads), lambda _, x: x)

    def _partial_bound(self, grid: Grid) -> int:
        """Upper bound of the blocks per example and head that `_classify` calls partial when the mask is traced."""
        children = self._children()
        return sum(child._traced_partial_bound(grid) for child in children) if children else grid.nq * grid.nk

    def _visited_bound(self, grid: Grid) -> int:
        """Upper bound of the blocks per example and head that are visited, whatever the traced arrays hold."""
        return grid.nq * grid.nk if self._is_open(grid) else count_codes(self, grid)[0]

    def _is_open(self, grid: Grid) -> bool:
        """Whether the host lacks a part of what it must know to count blocks: arrays that are traced or per example."""
        return self._is_traced(grid) or any(dims for _, dims in self._arrays())

    def _traced_partial_bound(self, grid: Grid) -> int:
        return self._partial_bound(grid) if self._is_open(grid) else count_codes(self, grid)[1]

    def _known_on_host(self, grid: Grid) -> Mask:
        """The mask as the host knows it: every block of a part with traced or per-example arrays may be partial."""
        if self._own_traced(grid) or any(self._leaf_dims(n) for n, v in self._fields() if is_array(v)):
            return _Unknown()
        return self._map_fields(lambda child: child._known_on_host(grid), lambda _, x: x)

    @property
    def batch(self) -> int:
        """Examples the mask distinguishes: 1 where all share it."""
        return self._dim("b", "batch")

    @property
    def heads(self) -> int:
        """Heads the mask distinguishes: 1 where all share it."""
        return self._dim("h", "head")

    def _dim(self, dim: str, what: str) -> int:
        sizes = {array.shape[dims.index(dim)] for array, dims in self._arrays() if dim in dims}
        sizes |= self._structural_dims(dim)
        sizes.discard(1)
        if len(sizes) > 1:
            raise ValueError(f"mask {self!r}: its parts have {what} sizes {sorted(sizes)}; they must be equal, or 1")
        return sizes.pop() if sizes else 1

    def _structural_dims(self, dim: str) -> set[int]:
        """Sizes of `dim` that come from structure, not from arrays (MultiHeadMask)."""
        return set().union(*(child._structural_dims(dim) for child in self._children()))

    # ---- binding ------------------------------------------------------------------------------------------------

    def bind(self, q_len: int, kv_len: int | None = None, *, block_size: int | tuple[int, int] = 128) -> Any:
        """The mask for given lengths as block lists and bit tiles; same as `BlockMask.from_mask`.

        Args:
          q_len: number of queries.
          kv_len: number of keys; `q_len` if not given.
          block_size: tokens of a block, one int or a (query, key) pair, multiples of 32.

        Returns:
          A `BlockMask`.

        Raises:
          ValueError: where the mask does not fit the lengths, or the block size is not a multiple of 32.

        Examples:
          >>> from jax_bsk.masks import LocalMask
          >>> LocalMask((64, 0)).bind(1024).shape
          (1, 1, 1024, 1024)
        """
        return self._from_mask(self, q_len, kv_len, block_size=block_size)

    # ---- algebra ------------------------------------------------------------------------------------------------

    def __and__(self, other: Any) -> Any:
        if isinstance(other, BlockLists):
            return NotImplemented  # a BlockMask: its `__rand__` knows how
        return AndMask(*_flat(AndMask, self, _operand(other, "&")))

    def __or__(self, other: object) -> Mask:
        return OrMask(*_flat(OrMask, self, _operand(other, "|")))

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, NotMask) else NotMask(self)

    def __rand__(self, other: object) -> Mask:
        return _operand(other, "&")  # raises: the left side is no mask, or its own `&` would have been taken

    def __ror__(self, other: object) -> Mask:
        return _operand(other, "|")

    def __bool__(self) -> NoReturn:
        raise TypeError(
            f"a mask has no truth value: {self!r}. Combine masks with `&`, `|` and `~`, not with `and`, `or` and `not`"
            "; to ask whether a mask was given, write `mask is not None`"
        )


def is_hashable(mask: Mask) -> bool:
    """Whether equal masks can be found again: those that hold no array."""
    try:
        hash(mask)
    except TypeError:
        return False
    return True


def _operand(other: object, operator: str) -> Mask:
    if isinstance(other, Mask):
        return other
    raise TypeError(f"cannot combine a mask with {described(other)} by `{operator}`: {remedy_for(other, operator)}")


def described(other: object) -> str:
    """The words for what was given where a mask belongs, in a message."""
    if isinstance(other, type):
        return f"the class {other.__name__}"
    return f"str {other!r}" if isinstance(other, str) else type(other).__name__


def remedy_for(other: object, operator: str = "") -> str:
    """The remedy for something that is no mask; `operator` is given where it is an operand."""
    if is_array(other):
        return "wrap a boolean array in ArrayMask(...)"
    if isinstance(other, type) and issubclass(other, Mask):
        return f"make an instance of it, {other.__name__}(...)"
    if isinstance(other, BlockLists):
        return "the blocks of a BlockMask are chosen and can only be masked, by `&`; combine masks before `bind`"
    if callable(other):
        return "wrap a function of (q_idx, kv_idx) in FunctionMask(...)"
    return "both sides must be masks" if operator else "make a mask of jax_bsk.masks, e.g. CausalMask()"


def _flat(kind: type[_Combined], *masks: Mask) -> list[Mask]:
    return [part for mask in masks for part in (mask.masks if isinstance(mask, kind) else (mask,))]


def count_codes(mask: Mask, grid: Grid) -> tuple[int, int]:
    """Blocks of a host-known 2-D mask that are not empty, and those that are neither empty nor full."""
    visited = partial = 0
    for rows in row_chunks(grid):
        codes = classify(mask, grid, rows)
        visited += int(np.count_nonzero(codes))
        partial += int(np.count_nonzero((codes == OWN) | (codes == SHIFT)))
    return visited, partial


def classify(mask: Mask, grid: Grid, rows: slice) -> np.ndarray:
    """Class codes int8 [rows, nk] of the query blocks `rows`, on the host."""
    i = np.arange(rows.start, rows.stop, dtype=np.int32)[:, None]
    j = np.arange(grid.nk, dtype=np.int32)[None, :]
    return np.broadcast_to(mask._classify(grid, i, j), (i.shape[0], grid.nk))


def parts(mask: Mask) -> Iterator[Mask]:
    """The masks that operators combine."""
    children = mask._children() if mask._joins else ()
    if not children:
        yield mask
    for child in children:
        yield from parts(child)


class _Unknown(Mask):
    """Stands for what the host cannot know: every block may be partial."""

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        return np.full((1, 1), OWN, np.int8)


def _operand_text(mask: Any, precedence: int) -> str:
    """An operand as printed, in parentheses where its own operator binds less; it may be a placeholder."""
    weaker = isinstance(mask, Mask) and mask._precedence < precedence
    return f"({mask!r})" if weaker else repr(mask)


class _Combined(Mask):
    """Two or more masks joined by one operator."""

    _data_fields = ("masks",)
    _operator: ClassVar[str] = ""
    masks: tuple[Mask, ...]

    def __init__(self, *masks: Mask) -> None:
        self._set(masks=masks)

    def __repr__(self) -> str:
        if not isinstance(self.masks, tuple):  # a placeholder of a transformation
            return f"{type(self).__name__}({self.masks!r})"
        return f" {self._operator} ".join(_operand_text(mask, self._precedence) for mask in self.masks)


class AndMask(_Combined):
    """`a & b`: attends where all parts do."""

    _operator = "&"
    _precedence = 2

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        codes = (mask._classify(grid, i, j) for mask in self.masks)
        return functools.reduce(lambda a, b: code_and(a, b, grid.xp), codes)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return functools.reduce(lambda a, b: a & b, (mask._evaluate(grid, q, k) for mask in self.masks))

    def _key_intervals(self, grid: Grid, positions: Array, example: Array | None = None) -> Intervals | None:
        both: Intervals | None = None
        for mask in self.masks:
            one = mask._key_intervals(grid, positions, example)
            if one is None:
                return None
            both = one if both is None else both.intersect(one, grid)
        return both

    def _visited_bound(self, grid: Grid) -> int:
        # Where the mask is open, the parts that are known are counted together (`_known_on_host`).
        bounds = [mask._visited_bound(grid) for mask in self.masks if mask._is_open(grid)]
        return min(bounds) if bounds else super()._visited_bound(grid)


class OrMask(_Combined):
    """`a | b`: attends where any part does."""

    _operator = "|"
    _precedence = 1

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        codes = (mask._classify(grid, i, j) for mask in self.masks)
        return functools.reduce(lambda a, b: code_or(a, b, grid.xp), codes)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return functools.reduce(lambda a, b: a | b, (mask._evaluate(grid, q, k) for mask in self.masks))

    def _visited_bound(self, grid: Grid) -> int:
        return min(sum(mask._visited_bound(grid) for mask in self.masks), grid.nq * grid.nk)


class NotMask(Mask):
    """`~a`: attends where `a` does not."""

    _data_fields = ("mask",)
    _precedence = 3
    mask: Mask

    def __init__(self, mask: Mask) -> None:
        self._set(mask=_operand(mask, "~"))

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        return code_not(self.mask._classify(grid, i, j), grid.xp)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        return ~self.mask._evaluate(grid, q, k)

    def __repr__(self) -> str:
        return f"~{_operand_text(self.mask, self._precedence)}"


class MultiHeadMask(Mask):
    """A mask per head: head n of the queries follows `masks[n]`.

    Args:
      masks: one mask per query head, none of them per-head itself. Equal masks are built once.

    Raises:
      TypeError: where an entry is not a mask.
      ValueError: where there is none, or an entry is per-head itself.

    Examples:
      >>> from jax_bsk.masks import CausalMask, LocalMask, MultiHeadMask
      >>> MultiHeadMask([CausalMask(), LocalMask((64, 0))]).bind(256, block_size=64).heads
      2
    """

    _data_fields = ("masks",)
    masks: tuple[Mask, ...]

    def __init__(self, masks: Iterable[Mask]) -> None:
        if isinstance(masks, Mask):
            raise TypeError(f"MultiHeadMask: masks must be a list of masks, one per head; given the mask {masks!r}")
        masks = tuple(masks)
        if not masks:
            raise ValueError("MultiHeadMask: masks is empty; give one mask per head")
        for n, mask in enumerate(masks):
            if not isinstance(mask, Mask):
                remedy = "; wrap a boolean array in ArrayMask(...)" if is_array(mask) else ""
                raise TypeError(f"MultiHeadMask: masks[{n}] is a {type(mask).__name__}, not a mask{remedy}")
            if mask.heads > 1:
                raise ValueError(
                    f"MultiHeadMask: masks[{n}] has {mask.heads} heads itself; each entry is one head's mask"
                )
        self._set(masks=masks)

    def _structural_dims(self, dim: str) -> set[int]:
        inner = super()._structural_dims(dim)
        return inner | {len(self.masks)} if dim == "h" else inner

    def _sized(self, batch: int | None, heads: int | None) -> Mask:
        return super()._sized(batch, len(self.masks))

    def _select(self, b: int | None, h: int | None) -> Mask:
        if h is None:
            return super()._select(b, h)
        return self.masks[h if len(self.masks) > 1 else 0]._select(b, h)

    def _known_on_host(self, grid: Grid) -> Mask:
        return _Unknown()  # asked only where the heads were not selected, and then nothing is known

    def __repr__(self) -> str:
        return f"MultiHeadMask({list(self.masks) if isinstance(self.masks, tuple) else self.masks!r})"


def has_multi_head(mask: Mask) -> bool:
    """Whether different heads have masks of different structure."""
    return isinstance(mask, MultiHeadMask) or any(has_multi_head(child) for child in mask._children())
