"""What is known of the keys of each page of a cache, kept up to date token by token, for selections that decode.

Below `_pages`, which chooses by it. A summary is made again from the keys of its page whenever the page is written to.
So it does not depend on what the page held before: a page that was freed, forked or truncated has no past.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.decode import inputs as checks
from jax_bsk.decode.tokens import Ragged, sequences
from jax_bsk.selection.inputs import positive


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageSummaries:
    """Summaries of the keys of each page (of a contiguous cache, of each block of positions).

    A pytree, so it is an argument and result of jitted functions, and may be donated. After copying page i to page j
    (as `PagePool.fork` asks for), copy its summary too: `jax.tree.map(lambda x: x.at[j].set(x[i]), summaries)`.

    Attributes:
      minimum: [P, K, H] (contiguous: [B, blocks, K, H]) least of the keys in each channel, of the cache's type; None
        where `bounds=False`.
      maximum: The greatest, likewise.
      mean: Mean of the keys, float32 (float64 for float64), of the same shape; None where `means=False`.
      page_size: Positions of a page, a Python number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import selection
      >>> summaries = selection.summarize_pages(jnp.zeros((4, 16, 2, 8)), means=False)
      >>> summaries.shape, summaries.page_size, summaries.mean
      ((4, 1, 8), 16, None)
    """

    minimum: jax.Array | None
    maximum: jax.Array | None
    mean: jax.Array | None
    page_size: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each of the arrays."""
        return next(x.shape for x in (self.minimum, self.maximum, self.mean) if x is not None)


def summarize_pages(
    kv_pages: ArrayLike, filled: ArrayLike | None = None, *, bounds: bool = True, means: bool = True
) -> PageSummaries:
    """Makes summaries of all pages of a cache: of an empty one before the first token, or of one that was loaded.

    Args:
      kv_pages: [P, Z, 2 K, H] cache, keys at even heads, as in `decode.ragged_paged_attention`.
      filled: Integers [P], how many positions of each page hold keys; None for all.
      bounds: Whether to keep least and greatest keys, which `quest_pages` reads.
      means: Whether to keep mean keys, which `moba_pages` reads.

    Returns:
      `PageSummaries` of arrays [P, K, H], 0 for pages without keys.

    Raises:
      ValueError: A shape does not fit, or neither kind is kept.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import selection
      >>> pages = jnp.arange(4.0)[None, :, None, None] * jnp.ones((2, 4, 2, 1))  # keys of 0, 1, 2, 3 in both pages
      >>> selection.summarize_pages(pages, jnp.array([4, 2])).maximum[:, 0, 0].tolist()
      [3.0, 1.0]
    """
    keys = _page_keys(kv_pages)
    if filled is None:
        counts = jnp.full(keys.shape[:1], keys.shape[1], jnp.int32)
    else:
        counts = checks.integers(filled, "filled", keys.shape[:1], "[pages]")
    return _summaries(keys, counts, bounds, means)


def update_page_summaries(
    summaries: PageSummaries,
    kv_pages: ArrayLike,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    tokens: int,
) -> PageSummaries:
    """Brings summaries up to date after `decode.append_pages`, whose arguments it takes.

    The summary of each page that the call's tokens were written to is made again from its positions below the
    sequence's length. It reads these pages only: one per decoding sequence. Donate the summaries to `jax.jit` and they
    are updated in place.

    Args:
      summaries: Before the update.
      kv_pages: [P, Z, 2 K, H] cache, after `append_pages`.
      kv_lens: As in `decode.append_pages`.
      page_indices: As there.
      cu_q_lens: As there.
      num_seqs: As there.
      tokens: T, the length of the row of tokens (`q.shape[0]`), a Python number.

    Returns:
      The updated summaries. Those of pages that `append_pages` would not write stay as they are.

    Raises:
      ValueError: A shape does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import decode, selection
      >>> cache = jnp.zeros((4, 16, 2, 8))
      >>> summaries = selection.summarize_pages(cache)
      >>> batch = jnp.array([3]), jnp.array([[2, 0]]), jnp.array([0, 3]), jnp.array([1])  # a prompt of 3 tokens
      >>> key = jnp.arange(3.0)[:, None, None] * jnp.ones((3, 1, 8)) + 5
      >>> cache = decode.append_pages(cache, key, key, *batch)
      >>> summaries = selection.update_page_summaries(summaries, cache, *batch, tokens=3)
      >>> [float(x[2, 0, 0]) for x in (summaries.minimum, summaries.maximum, summaries.mean)]
      [5.0, 7.0, 6.0]
    """
    keys = _page_keys(kv_pages)
    pages, size = keys.shape[:2]
    _check_same(summaries, (pages, *keys.shape[2:]), "[pages, key/value heads, head size]", size)
    count = positive(tokens, "tokens")
    batch = checks.ragged(kv_lens, page_indices, cu_q_lens, num_seqs)
    seq, page, filled, valid = _touched(batch, size, count)
    number = batch.page_indices[seq, page]
    valid = valid & (number >= 0) & (number < pages)
    new = keys[jnp.where(valid, number, 0)]
    return _replaced(summaries, jnp.where(valid, number, pages), new, filled)


def _touched(batch: Ragged, size: int, count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The pages that a call's tokens are in, in a list of fixed length.

    Returns:
      Per entry of the list the sequence, the page counted in it, its filled positions, and whether there is one.
    """
    lengths, table, offsets, number = batch
    seqs, most = table.shape
    seq = jnp.arange(seqs, dtype=jnp.int32)
    q_lens = offsets[1:] - offsets[:-1]
    _, _, sound = sequences(jnp.arange(count, dtype=jnp.int32), offsets, number)
    used = sound & (seq < number[0]) & (q_lens > 0) & (lengths > 0) & (lengths <= most * size)
    first = jnp.maximum(lengths - q_lens, 0) // size
    touched = jnp.where(used, (lengths - 1) // size - first + 1, 0)
    ends = jnp.cumsum(touched, dtype=jnp.int32)
    # q tokens are in at most (q - 2) // size + 2 pages, and in q at most.
    entry = jnp.arange(min(count, count // size + 2 * seqs), dtype=jnp.int32)
    of = jnp.minimum(jnp.searchsorted(ends, entry, side="right").astype(jnp.int32), seqs - 1)
    valid = entry < ends[-1]
    page = jnp.where(valid, first[of] + entry - (ends[of] - touched[of]), 0)
    return of, page, jnp.clip(lengths[of] - page * size, 0, size), valid


def summarize_blocks(
    key_cache: ArrayLike, lengths: ArrayLike, *, block_size: int = 128, bounds: bool = True, means: bool = True
) -> PageSummaries:
    """Makes summaries of the blocks of a contiguous cache, as `summarize_pages` of pages.

    Args:
      key_cache: [B, S, K, H] cache of `decode.attention`.
      lengths: Integers [B], the filled positions.
      block_size: Positions of a block; it divides S.
      bounds: As in `summarize_pages`.
      means: As there.

    Returns:
      `PageSummaries` of arrays [B, S / block_size, K, H], 0 for blocks without keys.

    Raises:
      ValueError: A shape does not fit, or neither kind is kept.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import selection
      >>> keys = jnp.arange(8.0)[None, :, None, None]
      >>> selection.summarize_blocks(keys, jnp.array([6]), block_size=4).mean[0, :, 0, 0].tolist()
      [1.5, 4.5]
    """
    keys = _blocks(key_cache, positive(block_size, "block_size"))
    batch, blocks, size = keys.shape[:3]
    lengths = checks.integers(lengths, "lengths", (batch,), "[batch]")
    begins = jnp.arange(blocks, dtype=jnp.int32)[None] * size
    return _summaries(keys, jnp.clip(lengths[:, None] - begins, 0, size), bounds, means)


def update_block_summaries(
    summaries: PageSummaries, key_cache: ArrayLike, lengths: ArrayLike, *, tokens: int = 1
) -> PageSummaries:
    """Brings summaries of a contiguous cache up to date after `decode.append`.

    Args:
      summaries: Before the update.
      key_cache: [B, S, K, H] cache, after `append`.
      lengths: Integers [B], the filled positions, those of the new tokens included.
      tokens: How many tokens each example got, a Python number.

    Returns:
      The updated summaries; those of examples whose length is not in [0, S] stay as they are.

    Raises:
      ValueError: A shape does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import decode, selection
      >>> keys = jnp.zeros((1, 8, 1, 1))
      >>> summaries = selection.summarize_blocks(keys, jnp.array([0]), block_size=4)
      >>> keys = decode.append(keys, jnp.full((1, 5, 1, 1), 3.0), jnp.array([0]))
      >>> summaries = selection.update_block_summaries(summaries, keys, jnp.array([5]), tokens=5)
      >>> summaries.minimum[0, :, 0, 0].tolist()
      [3.0, 3.0]
    """
    letters = "[batch, blocks, key/value heads, head size]"
    check_summaries(summaries, 4, letters)
    size = summaries.page_size
    keys = _blocks(key_cache, size)
    batch, blocks = keys.shape[:2]
    _check_same(summaries, (batch, blocks, *keys.shape[3:]), letters, size)
    count = positive(tokens, "tokens")
    lengths = checks.integers(lengths, "lengths", (batch,), "[batch]")

    def one(summaries: PageSummaries, keys: jax.Array, length: jax.Array) -> PageSummaries:
        touched = jnp.arange(min((count - 2) // size + 2, blocks), dtype=jnp.int32)
        block = jnp.maximum(length - count, 0) // size + touched
        valid = (block * size < length) & (length <= blocks * size)
        new = keys[jnp.where(valid, block, 0)]
        return _replaced(summaries, jnp.where(valid, block, blocks), new, jnp.clip(length - block * size, 0, size))

    return jax.vmap(one)(summaries, keys, lengths)


def _page_keys(kv_pages: ArrayLike) -> jax.Array:
    """[P, Z, K, H] keys of pages that hold keys and values."""
    pages = checks.pages(kv_pages, "kv_pages")
    return pages.reshape((*pages.shape[:2], -1, 2, pages.shape[3]))[..., 0, :]


def _blocks(key_cache: ArrayLike, size: int) -> jax.Array:
    """[B, blocks, Z, K, H] blocks of a contiguous cache."""
    keys = checks.cache(key_cache, "key_cache")
    if keys.ndim != 4 or keys.shape[1] < 1 or keys.shape[1] % size:
        raise ValueError(
            f"key_cache is [B, S, K, H] of whole blocks of {size} positions, got shape {keys.shape}; pad the cache"
        )
    return keys.reshape((keys.shape[0], keys.shape[1] // size, size, *keys.shape[2:]))


def _summaries(keys: jax.Array, filled: jax.Array, bounds: bool, means: bool) -> PageSummaries:
    """Of keys [.., Z, K, H] of which the first `filled` [..] positions are there."""
    if not (bounds or means):
        raise ValueError("summaries keep bounds or means; pass bounds=True for quest_pages, means=True for moba_pages")
    *lead, size, _, _ = keys.shape
    place = of_rank(jnp.arange(size, dtype=jnp.int32)[:, None, None], keys.ndim)
    held = place < filled.reshape((*lead, 1, 1, 1))
    some = (filled > 0).reshape((*lead, 1, 1))
    x = keys.astype(statistics_dtype(keys.dtype))
    least = greatest = mean = None
    if bounds:
        least, greatest = (
            jnp.where(some, found, 0).astype(keys.dtype)
            for found in (jnp.where(held, x, jnp.inf).min(-3), jnp.where(held, x, -jnp.inf).max(-3))
        )
    if means:
        mean = jnp.where(held, x, 0).sum(-3) / jnp.maximum(filled, 1).astype(x.dtype).reshape((*lead, 1, 1))
    return PageSummaries(least, greatest, mean, size)


def _replaced(summaries: PageSummaries, where: jax.Array, keys: jax.Array, filled: jax.Array) -> PageSummaries:
    """The summaries with those at `where` made again; numbers past the last are dropped."""
    new = _summaries(keys, filled, summaries.minimum is not None, summaries.mean is not None)
    return jax.tree.map(lambda x, y: x.at[where].set(y, mode="drop"), summaries, new)


def check_summaries(summaries: Any, rank: int, letters: str) -> tuple[int, ...]:
    """The shape of the arrays of summaries, checked.

    Raises:
      TypeError: They are something else.
      ValueError: The arrays have another rank.
    """
    if not isinstance(summaries, PageSummaries):
        raise TypeError(
            f"summaries are PageSummaries, got {type(summaries).__name__}; make them by summarize_pages or "
            "summarize_blocks"
        )
    if len(summaries.shape) != rank:
        raise ValueError(
            f"summaries hold arrays {letters}, got shape {summaries.shape}; those of pages are made by "
            "summarize_pages, those of a contiguous cache by summarize_blocks"
        )
    return summaries.shape


def _check_same(summaries: Any, shape: tuple[int, ...], letters: str, page_size: int) -> None:
    found = check_summaries(summaries, len(shape), letters)
    if found != shape or summaries.page_size != page_size:
        raise ValueError(
            f"summaries are those of the cache, {letters} = {shape} of {page_size} positions, got shape {found} of "
            f"{summaries.page_size}; make them of this cache"
        )
