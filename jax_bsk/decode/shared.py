"""Sequences that begin with the same pages, cut in two: what they share, and what each has of its own.

Between `ragged`, which calls the attention of both and merges them, and `merge`. Tokens of neighbouring sequences that
share pages become the tokens of one sequence, whose keys are these pages; so the pages are read once for all of them.
All of it is integers of the size of the table, on the device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_bsk.decode.tokens import Ragged


def split(batch: Ragged, most: jax.Array, page_size: int) -> tuple[Ragged, Ragged]:
    """The prefixes as sequences of all tokens that share them, and the sequences without their prefixes.

    A group are neighbouring sequences with tokens that begin with the same page. Its prefix are the leading pages that
    the tables of all its sequences have in common and that end before the first token of each, so every token attends
    to all of it. A sequence alone has none. Lengths and offsets that are wrong stay so in the second part, and poison
    what they poison in one call.

    Args:
      batch: The call.
      most: int32 [], pages of a prefix at most.
      page_size: Positions of a page.
    """
    lengths, table, offsets, number = batch
    seqs, pages = table.shape
    seq = jnp.arange(seqs, dtype=jnp.int32)
    q_lens = offsets[1:] - offsets[:-1]
    good = (lengths >= 0) & (lengths <= pages * page_size)
    used = (seq < number[0]) & (q_lens > 0) & good
    # ---- groups: where a sequence differs from the one before, another begins. Without tokens, each is alone. ----
    begins = jnp.roll(table[:, 0], 1) != table[:, 0]
    begins = begins | ~used | ~jnp.roll(used, 1) | (seq == 0)
    group = jnp.cumsum(begins, dtype=jnp.int32) - 1
    first = jax.ops.segment_min(seq, group, seqs, indices_are_sorted=True)  # of each group
    size = jax.ops.segment_sum(jnp.ones_like(seq), group, seqs, indices_are_sorted=True)
    first = jnp.where(size > 0, first, seqs - 1)
    # ---- what all of a group share ----
    same = table == table[first][group]
    common = jnp.where(same.all(1), pages, jnp.argmin(same, 1)).astype(jnp.int32)
    common = jnp.minimum(common, (lengths - q_lens) // page_size)
    common = jax.ops.segment_min(jnp.where(used, common, 0), group, seqs, indices_are_sorted=True)
    common = jnp.where(size > 1, jnp.clip(jnp.minimum(common, most), 0, pages), 0)
    own = common[group]
    # ---- the two parts ----
    count = jnp.where((number[0] >= 0) & (number[0] <= seqs), group[jnp.clip(number[0], 1, seqs) - 1] + 1, 0)
    count = jnp.where(number[0] > 0, count, 0)
    last = offsets[jnp.clip(number[0], 0, seqs)]
    bounds = jnp.where(seq < count, offsets[first], last)
    prefixes = Ragged(common * page_size, table[first], jnp.concatenate([bounds, last[None]]), count[None])
    column = jnp.arange(pages, dtype=jnp.int32)[None] + own[:, None]
    rest = jnp.take_along_axis(table, jnp.minimum(column, pages - 1), axis=1)
    return prefixes, Ragged(jnp.where(good, lengths - own * page_size, -1), rest, offsets, number)
