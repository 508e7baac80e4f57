"""Biases of the distance between query and key: a number per head and distance, T + S - 1 of them and no more."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.biases.base import Bias
from jax_bsk.biases.entries import TileBias
from jax_bsk.biases.terms import Call, Terms, check_dims
from jax_bsk.core import inputs
from jax_bsk.core.arrays import known
from jax_bsk.masks import BlockMask
from jax_bsk.masks.orders.column_lists import rows_of_entries

# Elements of the matrix that sums a table's gradient in a fixed order; a larger one is a scatter.
_SUMMED = 1 << 26


def alibi_slopes(heads: int) -> np.ndarray:
    """The slopes of ALiBi (arXiv 2108.12409, section 3) for a number of heads.

    For a power of two they are 2^(-8 / heads), its square, its cube, and so on. For others, those of the next smaller
    power of two come first, then every second one of the next larger power (as in the authors' code).

    Args:
      heads: Number of heads, at least 1.

    Returns:
      float32 [heads].

    Examples:
      >>> from jax_bsk.biases import alibi_slopes
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if heads < 1:
        raise ValueError(f"heads is at least 1, got {heads}; give the number of query heads")

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    power = 1 << (heads.bit_length() - 1)
    return np.array([*of_power(power), *of_power(2 * power)[::2][: heads - power]], np.float32)


class AlibiBias(Bias):
    """Attention with linear biases (ALiBi, arXiv 2108.12409): -slope * |key - query| is added to the logits.

    Under a causal mask that is slope * (key - query), as in the paper; otherwise it is symmetric. Positions count from
    the beginning of the call's queries and keys, also where a mesh shards these.

    Args:
      slopes: Floating [N] or [B|1, N|1], a slope per query head; traced ones are differentiable. `alibi_slopes` gives
        the paper's.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import sparse_attention
      >>> from jax_bsk.biases import AlibiBias, alibi_slopes
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> sparse_attention(q, k, v, AlibiBias(alibi_slopes(2)), is_causal=True, implementation="xla").shape
      (1, 64, 2, 16)
    """

    _leaves = ("slopes",)
    slopes: Any

    def __init__(self, slopes: ArrayLike) -> None:
        self._set(slopes=inputs.floating(slopes, "slopes"))

    def _terms(self, call: Call) -> Terms:
        slopes = check_dims(
            jnp.asarray(self.slopes),
            (("B|1", (1, call.batch)), ("N|1", (1, call.heads))),
            "slopes of AlibiBias",
            not call.unbatched,
        )
        steps = np.abs(_distances(call)).astype(call.stats)
        return Terms(distances=-slopes.astype(call.stats)[:, :, None] * steps[None, None])


@dataclasses.dataclass(frozen=True)
class T5Buckets:
    """The buckets of T5's relative positions (arXiv 1910.10683, section 2.1): `RelativeBias.t5` uses them.

    Half of the buckets (of each side) hold one distance each. The others grow logarithmically up to `max_distance`,
    from which on all distances share the last one. Their bounds are computed in whole numbers: no rounded logarithm
    decides.

    Attributes:
      buckets: Number of buckets; even where bidirectional.
      bidirectional: Whether keys after the query have buckets of their own (the second half of them). Otherwise such a
        key counts as distance 0.
      max_distance: Distance from which on the last bucket is used.
    """

    buckets: int
    bidirectional: bool
    max_distance: int

    def __post_init__(self) -> None:
        side = self.buckets // 2 if self.bidirectional else self.buckets
        if side < 2 or (self.bidirectional and self.buckets % 2) or self.max_distance <= side // 2:
            raise ValueError(
                "T5's buckets are at least 2 (bidirectional: an even number of at least 4) and max_distance is more "
                f"than the exact ones, got {self}; the usual numbers are 32 and 128"
            )

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """Bucket numbers of distances key - query."""
        side = self.buckets // 2 if self.bidirectional else self.buckets
        first = np.where(distances > 0, side, 0) if self.bidirectional else np.zeros_like(distances)
        back = np.abs(distances) if self.bidirectional else np.maximum(-distances, 0)
        return first + np.searchsorted(self._bounds(side), back, side="right")

    def _bounds(self, side: int) -> np.ndarray:
        """The least distance of each bucket but the first.

        Bucket exact + j begins at the least n with log(n / exact) / log(max_distance / exact) * rest >= j, that is
        (n / exact)^rest >= (max_distance / exact)^j.
        """
        exact, rest = side // 2, side - side // 2

        def begin(j: int) -> int:
            power = self.max_distance**j * exact ** (rest - j)
            return bisect.bisect_left(range(exact, self.max_distance), power, key=lambda n: n**rest) + exact

        return np.array([*range(1, exact), *(begin(j) for j in range(rest))])


@dataclasses.dataclass(frozen=True)
class ClippedBuckets:
    """A bucket per distance from -max_distance to max_distance, to which others are clipped (arXiv 1803.02155).

    Attributes:
      max_distance: The largest distance with a bucket of its own.
    """

    max_distance: int

    def __call__(self, distances: np.ndarray) -> np.ndarray:
        """Bucket numbers of distances key - query."""
        return np.clip(distances, -self.max_distance, self.max_distance) + self.max_distance


class RelativeBias(Bias):
    """A learned number per head and bucket of distances: table[buckets(key - query), head] is added to the logits.

    Args:
      table: Floating [buckets, N|1]; traced ones are differentiable.
      buckets: Function of an integer numpy array of distances key - query that gives the number of each one's bucket
        (a row of the table). It is called whenever a call is traced, and must be hashable (any Python function is).
        `t5` and `clipped` give the usual ones.

    Raises:
      ValueError: In the call: a bucket is no row of the table, or there is not one for each distance.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import sparse_attention
      >>> from jax_bsk.biases import RelativeBias
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 64, 2, 16))
      >>> def loss(table):
      ...     bias = RelativeBias.t5(table, bidirectional=False)
      ...     return sparse_attention(q, k, v, bias, is_causal=True, implementation="xla").sum()
      >>> jax.grad(loss)(jnp.zeros((32, 2))).shape
      (32, 2)
    """

    _leaves = ("table",)
    table: Any
    buckets: Callable[[np.ndarray], np.ndarray]

    def __init__(self, table: ArrayLike, buckets: Callable[[np.ndarray], np.ndarray]) -> None:
        if not callable(buckets):
            raise TypeError(
                f"buckets is a function of distances key - query, got {type(buckets).__name__}; for a bucket per "
                "distance use RelativeBias.clipped(table)"
            )
        self._set(table=inputs.floating(table, "table"), buckets=buckets)

    @classmethod
    def t5(cls, table: ArrayLike, *, bidirectional: bool = True, max_distance: int = 128) -> Self:
        """T5's relative positions (arXiv 1910.10683): the number of buckets is the table's first dimension.

        Args:
          table: Floating [buckets, N|1], as T5's `rel_embedding` transposed.
          bidirectional: Whether keys after the query have buckets of their own (an encoder); False for causal masks.
          max_distance: Distance from which on the last bucket is used.
        """
        return cls(table, T5Buckets(_rows(table), bool(bidirectional), int(max_distance)))

    @classmethod
    def clipped(cls, table: ArrayLike) -> Self:
        """A number per distance, clipped at both ends (Shaw et al., arXiv 1803.02155; Swin's windows in one dimension).

        Args:
          table: Floating [2 * max_distance + 1, N|1]; row max_distance is distance 0, later rows are later keys.
        """
        rows = _rows(table)
        if rows % 2 == 0:
            raise ValueError(
                f"the table of RelativeBias.clipped has 2 * max_distance + 1 rows, an odd number, got {rows}; add the "
                "row of distance 0"
            )
        return cls(table, ClippedBuckets(rows // 2))

    def in_order(self, mask: BlockMask, positions: ArrayLike) -> TileBias:
        """The same bias of tokens that are in another order, such as that of `context.plan`.

        It is a tile per visited block, for the distances of this block's tokens in the sequence. Blocks with the same
        buckets share a tile: T5's buckets and clipped distances have few different ones, as all far blocks are equal.
        Where each distance has a bucket of its own, there are about two tiles for each block of the sequence.

        Args:
          mask: Mask of the call, of tokens in the new order and of whole blocks: `plan.mask`.
          positions: Integers [T], where each token stands in the sequence, in the new order: `plan.positions`. The
            tokens of a block are neighbours there.

        Returns:
          A `TileBias` for calls with this mask.

        Raises:
          ValueError: The positions are not those of the mask's tokens, or known ones separate tokens of a block.

        Examples:
          >>> import jax, jax.numpy as jnp, jax_bsk
          >>> from jax_bsk.biases import RelativeBias
          >>> from jax_bsk.masks import CausalMask
          >>> plan = jax_bsk.context.plan(CausalMask().bind(1024, block_size=64), 4)
          >>> bias = RelativeBias.t5(jnp.zeros((32, 2)), bidirectional=False).in_order(plan.mask, plan.positions)
          >>> bias.tiles.shape
          (1, 2, 5, 64, 64)
        """
        length, blocks = mask.q_len, (mask.block_q, mask.block_kv)
        if mask.kv_len != length or any(length % block for block in blocks) or np.shape(positions) != (length,):
            raise ValueError(
                "in_order takes a mask of as many queries as keys, in whole blocks, and a position per token, got "
                f"{length} queries and {mask.kv_len} keys in blocks of {blocks}, and positions of shape "
                f"{np.shape(positions)}; give it plan.mask and plan.positions"
            )
        values = known(positions)
        if values is not None:
            for block in blocks:
                split = values.reshape(-1, block)
                if (split != split[:, :1] + np.arange(block)).any():
                    raise ValueError(
                        f"positions of the {block} tokens of a block are neighbours in the sequence, got "
                        f"{split[(split != split[:, :1] + np.arange(block)).any(1)][0]}; give it plan.mask and "
                        "plan.positions"
                    )
        # ---- one tile for all first distances with the same buckets
        step, inside = math.gcd(*blocks), np.arange(1 - blocks[0], blocks[1])
        first = np.arange(step - length, length, step)
        buckets = self._numbers((first[:, None] + inside[None]).reshape(-1)).reshape(first.size, inside.size)
        different, tile_of = np.unique(buckets, axis=0, return_inverse=True)
        table = jnp.asarray(self.table)
        diagonals = _looked_up(table, different.reshape(-1)).T.reshape(table.shape[1], *different.shape)
        # ---- the tile of each entry
        known_lists = values is not None and mask.is_host
        xp: Any = np if known_lists else jnp
        starts = [xp.asarray(positions if values is None else values)[::block] for block in blocks]
        rows, columns = _rows_of_entries(mask), xp.clip(mask.kv_blocks, 0, mask.nk - 1)
        apart = starts[1][columns] - starts[0][xp.maximum(rows, 0)]
        tile_of = xp.asarray(tile_of.reshape(-1).astype(np.int32))
        numbers = tile_of[xp.clip((apart + length) // step - 1, 0, first.size - 1)]
        return TileBias(_tiles_of_diagonals(diagonals, blocks)[None], xp.where(rows < 0, np.int32(-1), numbers))

    def _terms(self, call: Call) -> Terms:
        table = jnp.asarray(self.table)
        if table.ndim != 2 or table.shape[1] not in (1, call.heads):
            raise ValueError(
                f"table of RelativeBias is [buckets, N|1] with N = {call.heads} heads, got shape {table.shape}; give "
                "each head a column"
            )
        table, distances = table.astype(call.stats), _distances(call)
        if isinstance(self.buckets, ClippedBuckets) and table.shape[0] == 2 * self.buckets.max_distance + 1:
            found = _clipped(table, distances)
        else:
            found = _looked_up(table, self._numbers(distances))
        return Terms(distances=found.T[None])

    def _numbers(self, distances: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():  # a function of jax.numpy has values inside jit, too
            numbers = np.asarray(self.buckets(distances))
        if numbers.shape != distances.shape or not np.issubdtype(numbers.dtype, np.integer):
            raise ValueError(
                f"buckets gives an integer for each of {distances.size} distances, got {numbers.dtype} of shape "
                f"{numbers.shape}; return the numbers of the table's rows, an array of the shape it is given"
            )
        return numbers


def _rows_of_entries(mask: BlockMask) -> Any:
    """int32 of the shape of the mask's lists: the row of each entry, -1 past the end."""
    if mask.is_host:
        offsets = np.asarray(mask.row_offsets)
        found = [rows_of_entries(offsets[at], mask.capacity) for at in np.ndindex(offsets.shape[:2])]
        return np.stack(found).reshape(*offsets.shape[:2], mask.capacity)
    entry = jnp.arange(mask.capacity, dtype=np.int32)

    def rows(offsets: jax.Array) -> jax.Array:
        found = jnp.searchsorted(offsets[1:], entry, side="right").astype(np.int32)
        return jnp.where(entry < offsets[-1], found, -1)

    return jax.vmap(jax.vmap(rows))(jnp.asarray(mask.row_offsets))


def _tiles_of_diagonals(diagonals: jax.Array, blocks: tuple[int, int]) -> jax.Array:
    """Tiles [.., block_q, block_kv] of the numbers [.., block_q + block_kv - 1] along their diagonals.

    Rows of one number more than there are, read on as rows of as many, are each shifted by one more place. The
    gradient is a sum over rows.
    """
    *lead, size = diagonals.shape
    longer = jnp.pad(diagonals, [(0, 0)] * len(lead) + [(0, 1)])
    rows = jnp.broadcast_to(longer[..., None, :], (*lead, blocks[0], size + 1))
    rows = rows.reshape(*lead, -1)[..., : blocks[0] * size].reshape(*lead, blocks[0], size)
    return rows[..., blocks[0] - 1 :]


def _rows(table: Any) -> int:
    return np.shape(table)[-2] if np.ndim(table) >= 2 else 0


def _distances(call: Call) -> np.ndarray:
    """key - query of each element of the distances."""
    return np.arange(1 - call.q_len, call.kv_len)


def _clipped(table: jax.Array, distances: np.ndarray) -> jax.Array:
    """The table's rows of distances clipped to it: a slice with its ends repeated, whose transpose sums them."""
    largest = table.shape[0] // 2
    before, after = (int((distances < -largest).sum()), int((distances > largest).sum()))
    begin = max(int(distances[0]), -largest) + largest if distances.size else 0
    inside = table[begin : begin + distances.size - before - after]

    def ends(row: int, count: int) -> jax.Array:
        return jnp.broadcast_to(table[row], (count, table.shape[1]))

    return jnp.concatenate([ends(0, before), inside, ends(-1, after)])


def _looked_up(table: jax.Array, numbers: np.ndarray) -> jax.Array:
    """table[numbers], whose gradient is summed in a fixed order and not by a scatter's."""
    rows = table.shape[0]
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < rows:
        raise ValueError(
            f"buckets are rows of the table, 0 to {rows - 1}, got {numbers.min()} to {numbers.max()}; give the table "
            "more rows"
        )
    begins = np.flatnonzero(np.diff(numbers, prepend=-1))  # runs of distances with one bucket
    ends = np.append(begins[1:], numbers.size)
    if begins.size * numbers.size > _SUMMED:
        return jnp.take(table, numbers, axis=0)
    of_runs = np.eye(rows, dtype=table.dtype)[numbers[begins]]

    @jax.custom_jvp
    def look_up(table: jax.Array) -> jax.Array:
        return jnp.take(table, numbers, axis=0)

    @look_up.defjvp
    def _jvp(primals: Any, tangents: Any) -> Any:
        at = jnp.arange(numbers.size, dtype=np.int32)[:, None]
        inside = (at >= begins.astype(np.int32)[None]) & (at < ends.astype(np.int32)[None])
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return look_up(*primals), product(inside.astype(table.dtype), product(of_runs, tangents[0]))

    return look_up(table)
