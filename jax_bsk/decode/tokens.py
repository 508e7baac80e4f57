"""A ragged batch, and which sequence each of its tokens belongs to; `csrc/decode/params.h` says what is sound."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Ragged(NamedTuple):
    """Lengths, table and offsets of a batch, as `ragged_paged_attention` has them."""

    kv_lens: Array  # int32 [Q]
    page_indices: Array  # int32 [Q, M]
    cu_q_lens: Array  # int32 [Q + 1]
    num_seqs: Array  # int32 [1]


def sequences(number: Array, cu_q_lens: Array, num_seqs: Array) -> tuple[Array, Array, Array]:
    """Each token's sequence, from offsets that are not trusted.

    Args:
      number: int32 [T], the tokens' numbers, counted from 0.
      cu_q_lens: int32 [Q + 1], the sequences' offsets.
      num_seqs: int32 [1], how many sequences there are.

    Returns:
      int32 [T], the sequence (any number in [0, Q) for padding); bool [T], whether the token has one; bool [], whether
      the offsets are sound.
    """
    seqs = cu_q_lens.shape[0] - 1
    count = jnp.clip(num_seqs[0], 0, seqs)
    used = jnp.arange(seqs, dtype=jnp.int32) < count
    grows = jnp.where(used, cu_q_lens[1:] >= cu_q_lens[:-1], True).all()
    sound = (num_seqs[0] == count) & (cu_q_lens[0] >= 0) & grows & (cu_q_lens[count] <= number.shape[0])
    # The number of ends at or before a token is its sequence.
    ends = jnp.where(used, cu_q_lens[1:], jnp.iinfo(jnp.int32).max)
    seq = jnp.searchsorted(ends, number, side="right", method="compare_all" if seqs <= 256 else "scan")
    seq = seq.astype(jnp.int32)
    owned = (seq < count) & (number >= cu_q_lens[0])
    return jnp.minimum(seq, seqs - 1), owned, sound
