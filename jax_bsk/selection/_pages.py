"""Which pages of a cache the newest tokens attend to: Quest and MoBA while decoding, from summaries of pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_bsk.core import inputs
from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.decode import inputs as checks
from jax_bsk.selection.inputs import positive
from jax_bsk.selection.summaries import PageSummaries, check_summaries

Combine = Literal["max", "sum"]

# (query [K, Q, H], minimum, maximum and mean [M, K, H]) -> scores [K, Q, M], of one sequence.
_Score = Callable[[jax.Array, PageSummaries], jax.Array]


def quest_pages(
    query: ArrayLike,
    summaries: PageSummaries,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    count: int,
    queries: int = 1,
    combine: Combine = "max",
    keep_first: int = 1,
    keep_last: int = 1,
) -> jax.Array:
    """Pages whose keys may have the largest logits: Quest (Tang et al., arXiv 2406.10774), for a cache in pages.

    The score of a page is the sum over channels of max(q_i * minimum_i, q_i * maximum_i): no key of the page has a
    larger product with the query. Quest scores pages for each head by itself. Here the query heads of a key/value head
    share a list, because the kernel reads a page once for all of them; `combine` says how their scores become one.

    Letters are those of `decode.ragged_paged_attention`, whose `page_selection` the result is. Call it after
    `decode.append_pages` and `update_page_summaries`. Prompts are better off in a call without selection, or with a
    `count` of M: all queries of a sequence share its list.

    Args:
      query: [T, N, H] floating array.
      summaries: Summaries of the cache with bounds, up to date.
      kv_lens: As in `decode.ragged_paged_attention`.
      page_indices: As there.
      cu_q_lens: As there.
      num_seqs: As there.
      count: Number of pages per list, those that are kept included, a Python number. More than M is M.
      queries: How many of each sequence's last tokens have a say (the drafts of a speculative step), a Python number.
      combine: "max" takes a page's largest score over these tokens and the query heads of a key/value head, "sum" adds
        them.
      keep_first: Number of first pages that are always listed. The first tokens get much of the attention.
      keep_last: Number of last pages that are always listed. The tokens themselves are in the last one, or in several
        where `queries` is large.

    Returns:
      int32 [Q, K, min(count, M)] pages of the sequence in ascending order, then -1. Pages past the sequence's length
      are never listed, so what a freed page's summary says reaches nobody. A page whose number in `page_indices` is out
      of range is listed, so that attention says NaN. Pages with a score of NaN are not listed unless they are kept.

    Raises:
      ValueError: A shape or a number does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import decode, selection
      >>> cache = jax.random.normal(jax.random.key(0), (8, 16, 2, 32)).at[5, 3, 0].set(4)  # a large key in page 5
      >>> batch = jnp.array([90]), jnp.array([[7, 5, 2, 0, 1, 3]]), jnp.array([0, 1]), jnp.array([1])
      >>> selection.quest_pages(jnp.ones((1, 1, 32)), selection.summarize_pages(cache), *batch, count=3).tolist()
      [[[0, 1, 5]]]
    """
    options = _Options(count, queries, combine, keep_first, keep_last)
    return _of_pages(_quest, query, summaries, (kv_lens, page_indices, cu_q_lens, num_seqs), options)


def moba_pages(
    query: ArrayLike,
    summaries: PageSummaries,
    kv_lens: ArrayLike,
    page_indices: ArrayLike,
    cu_q_lens: ArrayLike,
    num_seqs: ArrayLike,
    *,
    count: int,
    queries: int = 1,
    combine: Combine = "sum",
    keep_first: int = 0,
    keep_last: int = 1,
) -> jax.Array:
    """Pages whose mean key is nearest to the query: MoBA (Lu et al., arXiv 2502.13189), for a cache in pages.

    The score of a page is the product of the query and the mean of the page's keys (equation 6), as in
    `selection.moba`; the page of the newest token is always listed. The scores of the query heads of a key/value head
    are added, as `share_group=True` does there.

    Args:
      query: As in `quest_pages`.
      summaries: Summaries of the cache with means, up to date.
      kv_lens: As in `quest_pages`.
      page_indices: As there.
      cu_q_lens: As there.
      num_seqs: As there.
      count: As there.
      queries: As there.
      combine: As there.
      keep_first: As there.
      keep_last: As there.

    Returns:
      As `quest_pages`.

    Raises:
      ValueError: A shape or a number does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import decode, selection
      >>> cache = jax.random.normal(jax.random.key(0), (8, 16, 2, 32)).at[5, :, 0].add(0.5)  # a mean of 0.5 in page 5
      >>> batch = jnp.array([90]), jnp.array([[7, 2, 5, 0, 1, 3]]), jnp.array([0, 1]), jnp.array([1])
      >>> selection.moba_pages(jnp.ones((1, 1, 32)), selection.summarize_pages(cache), *batch, count=2).tolist()
      [[[2, 5]]]
    """
    options = _Options(count, queries, combine, keep_first, keep_last)
    return _of_pages(_moba, query, summaries, (kv_lens, page_indices, cu_q_lens, num_seqs), options)


def quest_blocks(
    query: ArrayLike,
    summaries: PageSummaries,
    lengths: ArrayLike,
    *,
    count: int,
    combine: Combine = "max",
    keep_first: int = 1,
    keep_last: int = 1,
) -> jax.Array:
    """`quest_pages` for a contiguous cache: the `key_blocks` of `decode.attention`.

    Args:
      query: [B, T, N, H] floating array; all T queries of an example have a say.
      summaries: Summaries of the cache with bounds (`summarize_blocks`), up to date.
      lengths: Integers [B], as in `decode.attention`.
      count: As in `quest_pages`.
      combine: As there.
      keep_first: As there.
      keep_last: As there.

    Returns:
      int32 [B, K, min(count, blocks)] blocks of `summaries.page_size` positions in ascending order, then -1.

    Raises:
      ValueError: A shape or a number does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import decode, selection
      >>> keys, values = jax.random.normal(jax.random.key(0), (2, 1, 128, 1, 32))
      >>> query, lengths = jnp.ones((1, 1, 1, 32)), jnp.array([100])
      >>> summaries = selection.summarize_blocks(keys.at[:, 40].set(4), lengths, block_size=16)
      >>> blocks = selection.quest_blocks(query, summaries, lengths, count=3)
      >>> blocks.tolist()
      [[[0, 2, 6]]]
      >>> decode.attention(query, keys, values, lengths, key_blocks=blocks, block_size=16).shape
      (1, 1, 1, 32)
    """
    return _of_blocks(_quest, query, summaries, lengths, _Options(count, 1, combine, keep_first, keep_last))


def moba_blocks(
    query: ArrayLike,
    summaries: PageSummaries,
    lengths: ArrayLike,
    *,
    count: int,
    combine: Combine = "sum",
    keep_first: int = 0,
    keep_last: int = 1,
) -> jax.Array:
    """`moba_pages` for a contiguous cache: the `key_blocks` of `decode.attention`.

    Args:
      query: As in `quest_blocks`.
      summaries: Summaries of the cache with means (`summarize_blocks`), up to date.
      lengths: As in `quest_blocks`.
      count: As in `quest_pages`.
      combine: As there.
      keep_first: As there.
      keep_last: As there.

    Returns:
      As `quest_blocks`.

    Raises:
      ValueError: A shape or a number does not fit.
      TypeError: An argument has the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import selection
      >>> keys = jnp.arange(8.0).repeat(16)[None, :, None, None] * jnp.ones((1, 128, 1, 32))  # block i holds keys of i
      >>> summaries = selection.summarize_blocks(keys, jnp.array([100]), block_size=16)
      >>> selection.moba_blocks(jnp.ones((1, 1, 1, 32)), summaries, jnp.array([100]), count=3).tolist()
      [[[4, 5, 6]]]
    """
    return _of_blocks(_moba, query, summaries, lengths, _Options(count, 1, combine, keep_first, keep_last))


class _Options:
    """The numbers of a choice, checked."""

    def __init__(self, count: int, queries: int, combine: Combine, keep_first: int, keep_last: int):
        self.count, self.queries = positive(count, "count"), positive(queries, "queries")
        self.first, self.last = checks.whole(keep_first, "keep_first"), checks.whole(keep_last, "keep_last")
        if min(self.first, self.last) < 0 or self.first + self.last > self.count:
            raise ValueError(
                f"keep_first and keep_last are at least 0, and together at most count = {count}, got {keep_first} and "
                f"{keep_last}"
            )
        if combine not in ("max", "sum"):
            raise ValueError(f"combine is 'max' or 'sum', got {combine!r}")
        self.combine = combine


def _of_pages(score: _Score, query: ArrayLike, summaries: PageSummaries, batch: tuple, options: _Options) -> jax.Array:
    q = inputs.floating(query, "query")
    pages, kv_heads, head_dim = check_summaries(summaries, 3, "[pages, key/value heads, head size]")
    if q.ndim != 3 or q.shape[2] != head_dim:
        raise ValueError(f"query is [tokens, heads, head size {head_dim}] of the summaries, got shape {q.shape}")
    checks.heads(q.shape[1], kv_heads)
    lengths, table, offsets, number = checks.ragged(*batch)
    seq = jnp.arange(table.shape[0], dtype=jnp.int32)
    lengths, begins, ends = (jnp.where(seq < number[0], x, 0) for x in (lengths, offsets[:-1], offsets[1:]))
    begins, ends = begins[:, None], ends[:, None]
    token = ends - 1 - jnp.arange(options.queries, dtype=jnp.int32)[None]
    said = (token >= begins) & (token >= 0) & (token < q.shape[0])
    # [Q, queries, N, H]; of no tokens at all nobody has a say
    voters = q[jnp.where(said, token, 0)] if q.shape[0] else jnp.zeros((*said.shape, *q.shape[1:]), q.dtype)
    known = (table >= 0) & (table < pages)
    of_table = jax.tree.map(lambda x: x[jnp.where(known, table, 0)], summaries)  # [Q, M, K, H]
    return _choose(score, voters, said, of_table, lengths, known, options)


def _of_blocks(
    score: _Score, query: ArrayLike, summaries: PageSummaries, lengths: ArrayLike, options: _Options
) -> jax.Array:
    q = inputs.floating(query, "query")
    batch, blocks, kv_heads, head_dim = check_summaries(summaries, 4, "[batch, blocks, key/value heads, head size]")
    if q.ndim != 4 or q.shape[0] != batch or q.shape[3] != head_dim:
        raise ValueError(
            f"query is [batch {batch}, queries, heads, head size {head_dim}] of the summaries, got shape {q.shape}"
        )
    checks.heads(q.shape[2], kv_heads)
    held = checks.integers(lengths, "lengths", (batch,), "[batch]")
    said, known = jnp.ones(q.shape[:2], bool), jnp.ones((batch, blocks), bool)
    if q.shape[1] == 0:  # nobody has a say
        q, said = jnp.zeros((batch, 1, *q.shape[2:]), q.dtype), jnp.zeros((batch, 1), bool)
    return _choose(score, q, said, summaries, held, known, options)


def _choose(
    score: _Score,
    query: jax.Array,
    said: jax.Array,
    summaries: PageSummaries,
    lengths: jax.Array,
    known: jax.Array,
    options: _Options,
) -> jax.Array:
    """The lists [S, K, count] of S sequences.

    Args:
      score: Scores of one sequence's pages.
      query: [S, T, N, H].
      said: bool [S, T], which of these have a say.
      summaries: Arrays [S, M, K, H], the pages of each sequence in its order.
      lengths: int32 [S].
      known: bool [S, M], whether there is such a page.
      options: Numbers of the choice.
    """
    (seqs, tokens, heads, head_dim), (_, pages, kv_heads, _) = query.shape, summaries.shape
    dtype = statistics_dtype(query.dtype)
    query = jax.lax.stop_gradient(query)
    split = query.reshape(seqs, tokens, kv_heads, heads // kv_heads, head_dim)
    # [S, K, tokens and members of the head group, H]
    rows = jnp.moveaxis(split, 2, 1).reshape(seqs, kv_heads, tokens * (heads // kv_heads), head_dim)
    votes = jnp.repeat(said, heads // kv_heads, axis=1)[:, None, :, None]
    scores = jax.vmap(score)(rows, summaries).astype(dtype)  # [S, K, rows, M]
    if options.combine == "max":
        scores = jnp.where(votes, scores, -jnp.inf).max(2)
    else:
        scores = jnp.where(votes, scores, 0).sum(2)
    # ---- what may be listed, and what must ----
    page = jnp.arange(pages, dtype=jnp.int32)
    filled = -(-lengths // summaries.page_size)
    open_pages = of_rank(page, 2) < filled[:, None]
    kept = (of_rank(page, 2) < options.first) | (of_rank(page, 2) >= filled[:, None] - options.last) | ~known
    open_pages, kept = open_pages[:, None], kept[:, None]
    greatest = float(jnp.finfo(dtype).max)
    order = jnp.where(jnp.isnan(scores) | (scores == -jnp.inf), jnp.inf, jnp.maximum(-scores, -greatest))
    order = jnp.where(open_pages, jnp.where(kept, -jnp.inf, order), jnp.inf)
    # Sorted, not `lax.top_k`, which XLA does not partition over sequences and heads.
    ids = jnp.zeros_like(order, dtype=jnp.int32) + of_rank(page, 3)  # sharded as the scores are
    order, ids = jax.lax.sort((order, ids), num_keys=1, is_stable=True)
    width = min(options.count, pages)
    listed = jnp.where(order < jnp.inf, ids, pages)[..., :width]
    listed = jax.lax.sort(listed)
    return jnp.where(listed < pages, listed, -1)


def _quest(rows: jax.Array, summaries: PageSummaries) -> jax.Array:
    """Of positive channels the product with the greatest keys, of negative ones that with the least."""
    if summaries.minimum is None or summaries.maximum is None:
        raise ValueError("quest reads bounds, and these summaries have none; make them with bounds=True")
    return _product(jnp.maximum(rows, 0), summaries.maximum) + _product(jnp.minimum(rows, 0), summaries.minimum)


def _moba(rows: jax.Array, summaries: PageSummaries) -> jax.Array:
    if summaries.mean is None:
        raise ValueError("moba reads means, and these summaries have none; make them with means=True")
    return _product(rows, summaries.mean)


def _product(rows: jax.Array, keys: jax.Array) -> jax.Array:
    """[K, rows, M] of [K, rows, H] and [M, K, H], summed in the statistics type."""
    dtype = statistics_dtype(rows.dtype, keys.dtype)
    if rows.dtype != keys.dtype:
        rows, keys = rows.astype(dtype), keys.astype(dtype)
    return jnp.einsum("krh,mkh->krm", rows, keys, preferred_element_type=dtype)
