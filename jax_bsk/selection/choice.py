"""From scores of key blocks to the lists of a `BlockMask`, in fixed shapes.

The best k of each row come from a native call (`_lists_op.choose`) where there is one. In plain JAX, as for the best up
to a share of the weight, they come from sorts and prefix sums, without a scatter: three sorts, which at 16 heads of 256
rows of 256 blocks take 94 us on an H200.
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
from jax_bsk.masks.algebra import Grid
from jax_bsk.masks.lists import no_tiles, packed_rows
from jax_bsk.selection.outline import EMPTY, Outline


def ranked(
    scores: jax.Array, required: np.ndarray | jax.Array, open_units: np.ndarray | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Units of each row by falling score, required ones first, ties by number.

    Args:
      scores: [.., nq, units]; -inf and NaN are never chosen, unless required.
      required: bool [nq, units].
      open_units: bool [nq, units]; the others are never chosen.

    Returns:
      int32 ids [.., nq, units], and bool of that shape: whether the unit may be chosen (a prefix of each row).
    """
    least = -float(jnp.finfo(scores.dtype).max)
    # Not even a score of +inf comes before what is required.
    order = jnp.where(jnp.isnan(scores) | (scores == -jnp.inf), jnp.inf, jnp.maximum(-scores, least))
    order = jnp.where(of_rank(required, order.ndim), -jnp.inf, order)
    order = jnp.where(of_rank(open_units, order.ndim), order, jnp.inf)
    ids = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    # Sorted, not `lax.top_k`, which XLA does not partition over examples and heads.
    order, ids = jax.lax.sort((order, ids), num_keys=1, is_stable=True)
    return ids, order < jnp.inf


def choose_top_k(scores: jax.Array, k: int, required: np.ndarray | None, outline: Outline) -> BlockMask:
    """Lists of the required units of each row, and of the best others until there are k.

    Args:
      scores: float32 or float64 [B, H, nq, units].
      k: at least 1.
      required: bool [nq, units], or None for none.
    """
    n_tiles = _bit_tiles(outline)
    open_units = outline.open_units
    states = np.where(open_units, native.OPEN, native.CLOSED).astype(np.int8)
    if required is not None:
        states[required & open_units] = native.REQUIRED
    units = states.shape[1]
    k = min(k, units)
    width = min(int(np.maximum((states == native.REQUIRED).sum(1), k).max(initial=1)), units)
    call = native.ChooseCall(k, width, outline.unit, outline.capacity(width), n_tiles, choose_in_jax)

    def choose(scores: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return native.choose(scores, jnp.asarray(states), jnp.asarray(outline.tiles), call)

    return _block_mask(explicit_mesh.call(choose, [scores], ["bh"]), outline)


def choose_in_jax(
    scores: jax.Array, states: jax.Array, outline: jax.Array, call: native.ChooseCall
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_lists_op.choose` of one table, by sorts."""
    required = states == native.REQUIRED
    limits = jnp.maximum(required.sum(1, dtype=jnp.int32), call.k)
    ids, allowed = (x[:, : call.width] for x in ranked(scores, required, states != native.CLOSED))
    chosen = allowed & (np.arange(call.width, dtype=np.int32)[None] < limits[:, None])
    codes, counts = _row_codes(ids, chosen, outline, call.unit, call.n_tiles)
    offsets, codes = packed_rows(codes, counts)
    return offsets, *_decoded(codes[: call.capacity], call.n_tiles)


def choose_by_mass(weights: jax.Array, threshold: jax.Array, required: np.ndarray, outline: Outline) -> BlockMask:
    """Lists of the required units, and of the heaviest others until they have `threshold` of the row's weight.

    Args:
      weights: [B, H, nq, units], not negative.
      threshold: [] or [H, 1, 1] and the like, in [0, 1].
    """
    n_tiles = _bit_tiles(outline)
    open_units = outline.open_units
    required = required & open_units

    def choose(weights: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        is_open, is_required, count, threshold = (
            of_rank(x, weights.ndim)
            for x in (open_units, required, required.sum(1, keepdims=True).astype(np.int32), threshold)
        )
        weights = jnp.where(is_open, weights, 0)
        ids, allowed = ranked(weights, required, open_units)
        # The weight of the required ones counts first, as that of one.
        rest = -jax.lax.sort(jnp.where(is_required, jnp.inf, -weights))
        place = of_rank(np.arange(weights.shape[-1], dtype=np.int32), weights.ndim)
        first = jnp.where(is_required, weights, 0).sum(-1, keepdims=True)
        # `rest` has the others first, by falling weight, then -inf for the required; ranks have the required first.
        others = jnp.cumsum(jnp.where(rest > -jnp.inf, rest, 0), -1)
        before = jnp.concatenate([jnp.zeros_like(first), others[..., :-1]], -1) + first
        total = others[..., -1:] + first
        extra = ((before < threshold * total) & (rest > 0)).sum(-1, keepdims=True, dtype=jnp.int32)
        chosen = allowed & (place < count + extra)
        codes, counts = _row_codes(ids, chosen, jnp.asarray(outline.tiles), outline.unit, n_tiles)
        offsets, codes = jax.vmap(jax.vmap(packed_rows))(codes, counts)
        return offsets, *_decoded(codes[..., : outline.capacity(ids.shape[-1])], n_tiles)

    return _block_mask(explicit_mesh.call(choose, [weights, threshold], ["bh", ""]), outline)


def _bit_tiles(outline: Outline) -> int:
    """How many there are: few enough that `_row_codes` has a number for each pair of key block and tile."""
    nk, n_tiles = outline.tiles.shape[1], outline.bit_tiles.shape[2]
    if max(nk, 1) * (n_tiles + 1) >= 2**31:
        raise ValueError(f"{nk} key blocks with {n_tiles} bit tiles are too many; choose larger blocks")
    return n_tiles


def _row_codes(
    ids: jax.Array, chosen: jax.Array, outline: jax.Array, unit: int, n_tiles: int
) -> tuple[jax.Array, jax.Array]:
    """Chosen units as padded lists of blocks: partial ones first, then full ones, ascending in each class.

    Args:
      ids: int32 [.., nq, width], distinct in each row.
      chosen: bool [.., nq, width].
      outline: int32 [nq, nk], tile of each block.
      unit: key blocks of a unit.
      n_tiles: bit tiles that the outline refers to.

    Returns:
      int32 codes [.., nq, width * unit], a number for block and tile (`_decoded`), and counts [.., nq].
    """
    nq, nk = outline.shape
    # ---- units to blocks ----
    blocks = ids[..., None] * unit + of_rank(np.arange(unit, dtype=np.int32), ids.ndim + 1)
    blocks = blocks.reshape(*ids.shape[:-1], ids.shape[-1] * unit)
    chosen = jnp.repeat(chosen, unit, axis=-1) & (blocks < nk)
    blocks = jnp.clip(blocks, 0, max(nk - 1, 0))
    # ---- a block's tile; what the mask leaves empty falls out ----
    tile = outline[np.arange(nq, dtype=np.int32)[:, None], blocks] if nk else jnp.full_like(blocks, EMPTY)
    chosen &= tile != EMPTY
    # ---- partial blocks first, then full ones; what is not chosen last ----
    order = jnp.where(chosen, jnp.where(tile >= 0, 0, nk) + blocks, 2 * nk)
    code = jnp.where(chosen, blocks * (n_tiles + 1) + tile + 1, -1)
    _, code = jax.lax.sort((order, code), num_keys=1, is_stable=False)
    return code, chosen.sum(-1, dtype=jnp.int32)


def _decoded(codes: jax.Array, n_tiles: int) -> tuple[jax.Array, jax.Array]:
    """Key blocks and tiles, -1 past the lists' ends."""
    listed = codes >= 0
    return jnp.where(listed, codes // (n_tiles + 1), -1), jnp.where(listed, codes % (n_tiles + 1) - 1, -1)


def _block_mask(lists: tuple[jax.Array, jax.Array, jax.Array], outline: Outline) -> BlockMask:
    """Row offsets, key blocks and tiles [B, H, ..] with the outline's bit tiles.

    No row is longer than the mask and the width allow: what lies past the outline's capacity is never listed.
    """
    grid = Grid(outline.q_len, outline.kv_len, outline.block_q, outline.block_kv)
    return BlockMask(
        *lists,
        outline.bit_tiles if outline.bit_tiles.shape[2] else no_tiles(grid),
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
    return explicit_mesh.call(
        lambda *arrays: tuple(jnp.repeat(x, times, axis=1) for x in arrays), arrays, ["bh"] * len(arrays)
    )
