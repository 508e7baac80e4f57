"""From scores of key blocks to the lists of a `BlockMask`, in fixed shapes: sorts and prefix sums, no scatter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.masks import BlockMask, _explicit
from jax_bsk.masks._lists import _indices_traced, _no_tiles
from jax_bsk.masks.algebra import Grid
from jax_bsk.selection._outline import EMPTY, Outline


def ranked(scores: jax.Array, required: np.ndarray, open_units: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Units of each row by falling score, required ones first, ties by number.

    Args:
      scores: [B, H, nq, units]; -inf and NaN are never chosen, unless required.
      required: bool [nq, units].
      open_units: bool [nq, units]; the others are never chosen.

    Returns:
      int32 ids [B, H, nq, units], and bool of that shape: whether the unit may be chosen (a prefix of each row).
    """
    least = -float(jnp.finfo(scores.dtype).max)
    # Not even a score of +inf comes before what is required.
    order = jnp.where(jnp.isnan(scores) | (scores == -jnp.inf), jnp.inf, jnp.maximum(-scores, least))
    order = jnp.where(required, -jnp.inf, order)
    order = jnp.where(open_units, order, jnp.inf)
    ids = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    # Sorted, not `lax.top_k`, which XLA does not partition over examples and heads.
    order, ids = jax.lax.sort((order, ids), num_keys=1, is_stable=True)
    return ids, order < jnp.inf


def choose_top_k(scores: jax.Array, k: int, required: np.ndarray | None, outline: Outline) -> BlockMask:
    """Lists of the required units of each row, and of the best others until there are k."""
    open_units = outline.open_units
    if required is None:
        required = np.zeros_like(open_units)
    required = required & open_units

    def choose(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        limits = np.maximum(required.sum(1), k).astype(np.int32)
        width = min(int(limits.max(initial=1)), scores.shape[-1])
        ids, allowed = (x[..., :width] for x in ranked(scores, required, open_units))
        return ids, allowed & (np.arange(width, dtype=np.int32) < limits[:, None])

    ids, chosen = _explicit.call(choose, [scores], ["bh"])
    return block_mask(ids, chosen, outline)


def choose_by_mass(weights: jax.Array, threshold: jax.Array, required: np.ndarray, outline: Outline) -> BlockMask:
    """Lists of the required units, and of the heaviest others until they have `threshold` of the row's weight.

    Args:
      weights: [B, H, nq, units], not negative.
      threshold: [] or [H, 1, 1] and the like, in [0, 1].
    """
    open_units = outline.open_units
    required = required & open_units

    def choose(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights = jnp.where(open_units, weights, 0)
        ids, allowed = ranked(weights, required, open_units)
        # The weight of the required ones counts first, as that of one.
        rest = -jax.lax.sort(jnp.where(required, jnp.inf, -weights))
        count = required.sum(1).astype(np.int32)
        place = np.arange(weights.shape[-1], dtype=np.int32)
        first = jnp.where(required, weights, 0).sum(-1, keepdims=True)
        # `rest` has the others first, by falling weight, then -inf for the required; ranks have the required first.
        others = jnp.cumsum(jnp.where(rest > -jnp.inf, rest, 0), -1)
        before = jnp.concatenate([jnp.zeros_like(first), others[..., :-1]], -1) + first
        total = others[..., -1:] + first
        extra = ((before < threshold * total) & (rest > 0)).sum(-1, keepdims=True, dtype=jnp.int32)
        return ids, allowed & (place < count[:, None] + extra)

    ids, chosen = _explicit.call(choose, [weights, threshold], ["bh", ""])
    return block_mask(ids, chosen, outline)


def block_mask(ids: jax.Array, chosen: jax.Array, outline: Outline) -> BlockMask:
    """Lists of chosen units.

    Args:
      ids: int32 [B, H, nq, width], distinct in each row.
      chosen: bool [B, H, nq, width].
    """
    nq, nk = outline.tiles.shape
    n_tiles = outline.bit_tiles.shape[2]
    if max(nk, 1) * (n_tiles + 1) >= 2**31:
        raise ValueError(f"{nk} key blocks with {n_tiles} bit tiles are too many; choose larger blocks")
    width = ids.shape[-1]

    def rows(ids: jax.Array, chosen: jax.Array) -> tuple[jax.Array, jax.Array]:
        # ---- units to blocks ----
        blocks = ids[..., None] * outline.unit + np.arange(outline.unit, dtype=np.int32)
        blocks = blocks.reshape(*ids.shape[:-1], width * outline.unit)
        chosen = jnp.repeat(chosen, outline.unit, axis=-1) & (blocks < nk)
        blocks = jnp.clip(blocks, 0, max(nk - 1, 0))
        # ---- a block's tile; what the mask leaves empty falls out ----
        tile = (
            jnp.asarray(outline.tiles)[np.arange(nq, dtype=np.int32)[:, None], blocks]
            if nk
            else jnp.full_like(blocks, EMPTY)
        )
        chosen &= tile != EMPTY
        # ---- partial blocks first, then full ones, ascending in each class; what is not chosen last ----
        order = jnp.where(chosen, jnp.where(tile >= 0, 0, nk) + blocks, 2 * nk)
        # A number for both, so that the lists are made of one array.
        code = jnp.where(chosen, blocks * (n_tiles + 1) + tile + 1, -1)
        _, code = jax.lax.sort((order, code), num_keys=1, is_stable=False)
        return code, chosen.sum(-1, dtype=jnp.int32)

    code, counts = _explicit.call(rows, [ids, chosen], ["bh", "bh"])
    grid = Grid(outline.q_len, outline.kv_len, outline.block_q, outline.block_kv)
    lists = _indices_traced(code, counts, grid)
    # No row is longer than the mask and the width allow: what lies past the capacity is never listed.
    code = lists.kv_blocks[..., : outline.capacity(width)]
    listed = code >= 0
    return BlockMask(
        lists.row_offsets,
        jnp.where(listed, code // (n_tiles + 1), -1),
        jnp.where(listed, code % (n_tiles + 1) - 1, -1),
        outline.bit_tiles if n_tiles else _no_tiles(grid),
        None,
        None,
        None,
        outline.block_q,
        outline.block_kv,
        outline.q_len,
        outline.kv_len,
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
    return _explicit.call(
        lambda *arrays: tuple(jnp.repeat(x, times, axis=1) for x in arrays), arrays, ["bh"] * len(arrays)
    )
