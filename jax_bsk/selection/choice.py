"""From scores of key blocks to the lists of a `BlockMask`, in fixed shapes.

The best k of each row come from a native call (`lists.native.choose`) where there is one. In plain JAX they come from
sorts and prefix sums, without a scatter, as do the best up to a share of the weight: three sorts, which at 16 heads of
256 rows of 256 blocks take 94 us on an H200. Candidates that differ per head or example, or are traced, take that way.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array, of_rank
from jax_bsk.lists import native
from jax_bsk.masks import BlockMask
from jax_bsk.masks.block_lists import no_tiles
from jax_bsk.masks.builders.indices import packed_rows
from jax_bsk.masks.grid import Grid
from jax_bsk.selection.candidates import EMPTY, Candidates, Required, any_in_groups


def ranked(scores: jax.Array, required: Array, open_groups: Array) -> tuple[jax.Array, jax.Array]:
    """Groups of each row by falling score, required ones first, ties by number.

    Args:
      scores: [.., nq, groups]; -inf and NaN are never chosen, unless required.
      required: bool [nq, groups], or of the scores' rank.
      open_groups: bool, likewise; the others are never chosen.

    Returns:
      int32 ids [.., nq, groups], and bool of that shape: whether the group may be chosen (a prefix of each row).
    """
    least = -float(jnp.finfo(scores.dtype).max)
    # Not even a score of +inf comes before what is required.
    order = jnp.where(jnp.isnan(scores) | (scores == -jnp.inf), jnp.inf, jnp.maximum(-scores, least))
    order = jnp.where(of_rank(required, order.ndim), -jnp.inf, order)
    order = jnp.where(of_rank(open_groups, order.ndim), order, jnp.inf)
    ids = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    # Sorted, not `lax.top_k`, which XLA does not partition over examples and heads.
    order, ids = jax.lax.sort((order, ids), num_keys=1, is_stable=True)
    return ids, order < jnp.inf


def choose_top_k(scores: jax.Array, k: int, needed: Required, candidates: Candidates) -> BlockMask:
    """Lists of the required groups of each row, and of the best others until there are k.

    Args:
      scores: float32 or float64 [B, H, nq, groups].
      k: number of groups per row, at least 1.
      needed: the required groups.
      candidates: the blocks that may be chosen.
    """
    required = needed.groups
    if not candidates.is_shared or (required is not None and required.ndim > 2):
        most = 0 if required is None else needed.most
        widths = scores.shape[-1] if most is None else np.minimum(np.maximum(most, k), scores.shape[-1])
        return choose_listed(scores, states_of(required, candidates), (k, False), candidates, widths)
    n_tiles = _bit_tiles(candidates)
    open_groups = candidates.open_groups
    states = np.where(open_groups, native.OPEN, native.CLOSED).astype(np.int8)
    if required is not None:
        states[required & open_groups] = native.REQUIRED
    groups = states.shape[1]
    k = min(k, groups)
    width = min(int(np.maximum((states == native.REQUIRED).sum(1), k).max(initial=1)), groups)
    call = native.ChooseCall(k, width, candidates.group, candidates.capacity(width), n_tiles, choose_in_jax)

    def choose(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return native.choose(scores, jnp.asarray(states), jnp.asarray(candidates.tiles), call)

    return block_mask(explicit_mesh.call(choose, [scores], ["bh"]), candidates)


def states_of(required: Array | None, candidates: Candidates) -> jax.Array:
    """int8 [B|1, H|1, nq, groups], the states of `lists.native`, of each table."""
    is_open = of_rank(jnp.asarray(candidates.open_groups), 4)
    states = jnp.where(is_open, np.int8(native.OPEN), np.int8(native.CLOSED))
    if required is None:
        return states
    return jnp.where(is_open & of_rank(jnp.asarray(required), 4), np.int8(native.REQUIRED), states)


def choose_listed(
    scores: jax.Array, states: jax.Array, limit: tuple[int, bool], candidates: Candidates, widths: int | np.ndarray
) -> BlockMask:
    """Lists of groups in plain JAX, of states and candidates that each table has for itself.

    Args:
      scores: [B|1, H|1, nq, groups].
      states: int8 [B|1, H|1, nq, groups].
      limit: number k of groups per row; whether that is besides the required ones, or with them.
      candidates: what is known.
      widths: groups that a row has at most, a number or [nq].
    """
    n_tiles = _bit_tiles(candidates)
    width = int(np.max(widths, initial=0))
    call = native.ChooseCall(
        min(limit[0], scores.shape[-1]), width, candidates.group, candidates.capacity(widths), n_tiles, choose_in_jax
    )

    def one(scores: jax.Array, states: jax.Array, tiles: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _choose_rows(scores, states, tiles, call, besides=limit[1])

    def choose(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return per_table(one, *arrays)

    tiles = of_rank(jnp.asarray(candidates.tiles), 4)
    return block_mask(explicit_mesh.call(choose, [scores, states, tiles], ["bh"] * 3), candidates)


def per_table(function: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`function` of the tables of arrays [B|1, H|1, ...]."""
    lead = np.broadcast_shapes(*(x.shape[:2] for x in arrays))
    return jax.vmap(jax.vmap(function))(*(jnp.broadcast_to(x, (*lead, *x.shape[2:])) for x in arrays))


def choose_in_jax(
    scores: jax.Array, states: jax.Array, candidates: jax.Array, call: native.ChooseCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`lists.native.choose` of one table, by sorts."""
    return _choose_rows(scores, states, candidates, call, besides=False)


def _choose_rows(
    scores: jax.Array, states: jax.Array, candidates: jax.Array, call: native.ChooseCall, *, besides: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    required = states == native.REQUIRED
    counts = required.sum(1, dtype=jnp.int32)
    limits = counts + call.k if besides else jnp.maximum(counts, call.k)
    ids, allowed = (x[:, : call.width] for x in ranked(scores, required, states != native.CLOSED))
    chosen = allowed & (np.arange(call.width, dtype=np.int32)[None] < limits[:, None])
    encoded, counts = _encoded_rows(ids, chosen, candidates, call.group, call.n_tiles)
    offsets, encoded = packed_rows(encoded, counts)
    return offsets, *_decoded(encoded[: call.capacity], call.n_tiles)


def choose_by_mass(weights: jax.Array, threshold: jax.Array, required: Array, candidates: Candidates) -> BlockMask:
    """Lists of the required groups, and of the heaviest others until they have `threshold` of the row's weight.

    Args:
      weights: [B, H, nq, groups], not negative.
      threshold: [] or [H, 1, 1] and the like, in [0, 1].
      required: bool [nq, groups] or [B|1, H|1, nq, groups].
    """
    n_tiles = _bit_tiles(candidates)

    def choose(
        weights: jax.Array, tiles: Array, required: Array, threshold: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        is_open, is_required, threshold = (
            of_rank(x, 4) for x in (any_in_groups(tiles != EMPTY, candidates.group), required, threshold)
        )
        is_required = is_required & is_open
        count = is_required.sum(-1, keepdims=True, dtype=np.int32)
        weights = jnp.where(is_open, weights, 0)
        ids, allowed = ranked(weights, is_required, is_open)
        # The weight of the required ones counts first, as that of one.
        rest = -jax.lax.sort(jnp.where(is_required, jnp.inf, -weights))
        rank = of_rank(np.arange(weights.shape[-1], dtype=np.int32), weights.ndim)
        first = jnp.where(is_required, weights, 0).sum(-1, keepdims=True)
        # `rest` has the others first, by falling weight, then -inf for the required; ranks have the required first.
        others = jnp.cumsum(jnp.where(rest > -jnp.inf, rest, 0), -1)
        before = jnp.concatenate([jnp.zeros_like(first), others[..., :-1]], -1) + first
        total = others[..., -1:] + first
        extra = ((before < threshold * total) & (rest > 0)).sum(-1, keepdims=True, dtype=jnp.int32)
        chosen = allowed & (rank < count + extra)
        if candidates.is_shared:
            encoded, counts = _encoded_rows(ids, chosen, jnp.asarray(tiles), candidates.group, n_tiles)
        else:
            rows = functools.partial(_encoded_rows, group=candidates.group, n_tiles=n_tiles)
            encoded, counts = per_table(rows, ids, chosen, jnp.asarray(tiles))
        offsets, encoded = jax.vmap(jax.vmap(packed_rows))(encoded, counts)
        return offsets, *_decoded(encoded[..., : candidates.capacity(ids.shape[-1])], n_tiles)

    if candidates.is_shared and required.ndim == 2:
        lists = explicit_mesh.call(
            lambda weights, threshold: choose(weights, candidates.tiles, required, threshold),
            [weights, threshold],
            ["bh", ""],
        )
    else:
        tables = [jnp.asarray(x) for x in (candidates.tiles, required)]
        dims = ["bh" if x.ndim == 4 else "" for x in tables]
        lists = explicit_mesh.call(choose, [weights, *tables, threshold], ["bh", *dims, ""])
    return block_mask(lists, candidates)


def _bit_tiles(candidates: Candidates) -> int:
    """The number of bit tiles, checked: `_encoded_rows` needs a number for each pair of key block and tile.

    Traced candidates have one more, of tiles that found no room, which kernels answer with NaN.
    """
    nk, n_tiles = candidates.tiles.shape[-1], candidates.bit_tiles.shape[2] + (not candidates.is_shared)
    if max(nk, 1) * (n_tiles + 1) >= 2**31:
        raise ValueError(f"{nk} key blocks with {n_tiles} bit tiles are too many; choose larger blocks")
    return n_tiles


def _encoded_rows(
    ids: jax.Array, chosen: jax.Array, candidates: jax.Array, group: int, n_tiles: int
) -> tuple[jax.Array, jax.Array]:
    """Chosen groups as padded lists of blocks: partial ones first, then full ones, ascending in each class.

    Args:
      ids: int32 [.., nq, width], distinct in each row.
      chosen: bool [.., nq, width].
      candidates: int32 [nq, nk], number of each block's bit tile.
      group: key blocks of a group.
      n_tiles: bit tiles that the candidates refer to.

    Returns:
      int32 encoded [.., nq, width * group], a number for block and tile (`_decoded`), and counts [.., nq].
    """
    nq, nk = candidates.shape
    # ---- groups to blocks ----
    blocks = ids[..., None] * group + of_rank(np.arange(group, dtype=np.int32), ids.ndim + 1)
    blocks = blocks.reshape(*ids.shape[:-1], ids.shape[-1] * group)
    chosen = jnp.repeat(chosen, group, axis=-1) & (blocks < nk)
    blocks = jnp.clip(blocks, 0, max(nk - 1, 0))
    # ---- a block's tile; what the mask leaves empty falls out ----
    tile = candidates[np.arange(nq, dtype=np.int32)[:, None], blocks] if nk else jnp.full_like(blocks, EMPTY)
    chosen &= tile != EMPTY
    # ---- partial blocks first, then full ones; what is not chosen last ----
    order = jnp.where(chosen, jnp.where(tile >= 0, 0, nk) + blocks, 2 * nk)
    encoded = jnp.where(chosen, blocks * (n_tiles + 1) + tile + 1, -1)
    _, encoded = jax.lax.sort((order, encoded), num_keys=1, is_stable=False)
    return encoded, chosen.sum(-1, dtype=jnp.int32)


def _decoded(encoded: jax.Array, n_tiles: int) -> tuple[jax.Array, jax.Array]:
    """Key blocks and tiles, -1 past the lists' ends."""
    listed = encoded >= 0
    return jnp.where(listed, encoded // (n_tiles + 1), -1), jnp.where(listed, encoded % (n_tiles + 1) - 1, -1)


def block_mask(lists: tuple[jax.Array, jax.Array, jax.Array], candidates: Candidates) -> BlockMask:
    """Row offsets, key blocks and tiles [B, H, ..] with the candidates' bit tiles.

    No row is longer than the mask and the width allow: what lies past the candidates' capacity is never listed.
    """
    grid = Grid(candidates.q_len, candidates.kv_len, candidates.block_q, candidates.block_kv)
    return BlockMask(
        *lists,
        candidates.bit_tiles if candidates.bit_tiles.shape[2] else no_tiles(grid),
        None,
        None,
        None,
        candidates.block_q,
        candidates.block_kv,
        candidates.q_len,
        candidates.kv_len,
    )


def for_query_heads(mask: BlockMask, heads: int) -> BlockMask:
    """Lists [B, K] of key/value heads as those [B, N] of their query heads; one list for all stays one."""
    kv_heads = mask.row_offsets.shape[1]
    if kv_heads in (1, heads):
        return mask
    names = ["row_offsets", "kv_blocks", "tiles"]
    if mask.bit_tiles.shape[1] == kv_heads:
        names.append("bit_tiles")
    arrays = repeat_heads([jnp.asarray(getattr(mask, name)) for name in names], heads // kv_heads)
    return dataclasses.replace(mask, **dict(zip(names, arrays, strict=True)))


def repeat_heads(arrays: Sequence[jax.Array], times: int) -> tuple[jax.Array, ...]:
    """Arrays [B, K, ...] as [B, K * times, ...], each head so many times in a row."""
    return explicit_mesh.call(
        lambda *arrays: tuple(jnp.repeat(x, times, axis=1) for x in arrays), arrays, ["bh"] * len(arrays)
    )
