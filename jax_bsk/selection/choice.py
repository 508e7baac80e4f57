"""From scores of key blocks to the lists of a `BlockMask`, in fixed shapes.

The best k of each row come from a native call (`lists.native.choose`) where there is one. In plain JAX they come from
sorts and prefix sums, without a scatter, as do the best up to a share of the weight: three sorts, which at 16 heads of
256 rows of 256 blocks take 94 us on an H200.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import of_rank
from jax_bsk.lists import native
from jax_bsk.masks import BlockMask
from jax_bsk.masks.block_lists import no_tiles
from jax_bsk.masks.builders.indices import packed_rows
from jax_bsk.masks.grid import Grid
from jax_bsk.selection.candidates import EMPTY, Candidates


def ranked(
    scores: jax.Array, required: np.ndarray | jax.Array, open_groups: np.ndarray | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Groups of each row by falling score, required ones first, ties by number.

    Args:
      scores: [.., nq, groups]; -inf and NaN are never chosen, unless required.
      required: bool [nq, groups].
      open_groups: bool [nq, groups]; the others are never chosen.

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


def choose_top_k(scores: jax.Array, k: int, required: np.ndarray | None, candidates: Candidates) -> BlockMask:
    """Lists of the required groups of each row, and of the best others until there are k.

    Args:
      scores: float32 or float64 [B, H, nq, groups].
      k: number of groups per row, at least 1.
      required: bool [nq, groups], or None for none.
    """
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

    return _block_mask(explicit_mesh.call(choose, [scores], ["bh"]), candidates)


def choose_in_jax(
    scores: jax.Array, states: jax.Array, candidates: jax.Array, call: native.ChooseCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`lists.native.choose` of one table, by sorts."""
    required = states == native.REQUIRED
    limits = jnp.maximum(required.sum(1, dtype=jnp.int32), call.k)
    ids, allowed = (x[:, : call.width] for x in ranked(scores, required, states != native.CLOSED))
    chosen = allowed & (np.arange(call.width, dtype=np.int32)[None] < limits[:, None])
    encoded, counts = _encoded_rows(ids, chosen, candidates, call.group, call.n_tiles)
    offsets, encoded = packed_rows(encoded, counts)
    return offsets, *_decoded(encoded[: call.capacity], call.n_tiles)


def choose_by_mass(weights: jax.Array, threshold: jax.Array, required: np.ndarray, candidates: Candidates) -> BlockMask:
    """Lists of the required groups, and of the heaviest others until they have `threshold` of the row's weight.

    Args:
      weights: [B, H, nq, groups], not negative.
      threshold: [] or [H, 1, 1] and the like, in [0, 1].
    """
    n_tiles = _bit_tiles(candidates)
    open_groups = candidates.open_groups
    required = required & open_groups

    def choose(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        is_open, is_required, count, threshold = (
            of_rank(x, weights.ndim)
            for x in (open_groups, required, required.sum(1, keepdims=True).astype(np.int32), threshold)
        )
        weights = jnp.where(is_open, weights, 0)
        ids, allowed = ranked(weights, required, open_groups)
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
        encoded, counts = _encoded_rows(ids, chosen, jnp.asarray(candidates.tiles), candidates.group, n_tiles)
        offsets, encoded = jax.vmap(jax.vmap(packed_rows))(encoded, counts)
        return offsets, *_decoded(encoded[..., : candidates.capacity(ids.shape[-1])], n_tiles)

    return _block_mask(explicit_mesh.call(choose, [weights, threshold], ["bh", ""]), candidates)


def _bit_tiles(candidates: Candidates) -> int:
    """The number of bit tiles, checked: `_encoded_rows` needs a number for each pair of key block and tile."""
    nk, n_tiles = candidates.tiles.shape[1], candidates.bit_tiles.shape[2]
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


def _block_mask(lists: tuple[jax.Array, jax.Array, jax.Array], candidates: Candidates) -> BlockMask:
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
    names = ("row_offsets", "kv_blocks", "tiles")
    arrays = repeat_heads([getattr(mask, name) for name in names], heads // kv_heads)
    return dataclasses.replace(mask, **dict(zip(names, arrays, strict=True)))


def repeat_heads(arrays: Sequence[jax.Array], times: int) -> tuple[jax.Array, ...]:
    """Arrays [B, K, ...] as [B, K * times, ...], each head so many times in a row."""
    return explicit_mesh.call(
        lambda *arrays: tuple(jnp.repeat(x, times, axis=1) for x in arrays), arrays, ["bh"] * len(arrays)
    )
