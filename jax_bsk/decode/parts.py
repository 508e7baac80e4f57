"""How many keys a part of a row has: the split plan of a call, from its static sizes alone.

A row's keys are summed in parts, which several multiprocessors compute at a time, and the partial results are merged in
their order. A part's bounds are positions of its own sequence, so a sequence's result has the same bits whatever else
is in the batch, as long as the parts are equal. Sizes that differ may choose others: the caller can give them.
"""

from __future__ import annotations

import dataclasses
import math

_STEP = 64  # keys of a kernel's step, of which parts are multiples
_WORKERS = 264  # CTAs at a time on a chip of 132 multiprocessors
# What a part costs beside its keys, in steps: the queries, and the results, take 2.4 us of a step's 2.1 (H200).
_PART_STEPS = 1.2
# Sequences are rarely as long as their table allows: with parts no longer than this there is work for all when they
# are not. For 64 sequences of 8,192 it costs nothing against 4,096 (494 us both). Of caches of a byte per element parts
# are twice as long, so that they have as many bytes: 304 us for float8, and 319 with 2,048.
_MOST_SHORT = 2048
_MOST_SHORT_QUANTISED = 4096
_PARTIAL_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a decoding call.

    Attributes:
      groups: Groups.
      tokens: Tokens of a group.
      seqs: Sequences of a group, at most.
      heads: Query heads.
      kv_heads: Key/value heads.
      value_dim: Head size of the values.
      positions: Most positions of a sequence that are visited.
      quantised: Whether the cache has a byte per element.
    """

    groups: int
    tokens: int
    seqs: int
    heads: int
    kv_heads: int
    value_dim: int
    positions: int
    quantised: bool = False


def choose(sizes: Sizes, given: int | None = None) -> tuple[int, int]:
    """Keys of a part, for sequences of few queries and for others; multiples of 64.

    Args:
      sizes: Sizes of the call.
      given: What the caller asks for, of both.
    """
    if given is not None:
        return given, given
    group = max(1, sizes.heads // max(sizes.kv_heads, 1))
    few = min(sizes.tokens, sizes.seqs * max(1, 16 // group))
    row_tiles = max(sizes.seqs, -(-sizes.tokens * group // 64))
    most = _MOST_SHORT_QUANTISED if sizes.quantised else _MOST_SHORT
    return _part(sizes, sizes.seqs, few, most), _part(sizes, row_tiles, sizes.tokens, None)


def _part(sizes: Sizes, row_tiles: int, tokens: int, most: int | None) -> int:
    """The part with which workers are done first, if all sequences are as long as they can be."""
    steps = max(1, -(-sizes.positions // _STEP))
    tiles = sizes.groups * sizes.kv_heads * row_tiles
    a_part = 4 * sizes.groups * tokens * sizes.heads * (sizes.value_dim + 2)
    best, least = steps, math.inf
    for parts in range(1, min(steps, _WORKERS) + 1):
        part = -(-steps // parts)
        if parts > 1 and a_part * parts > _PARTIAL_BYTES:
            break
        if most is not None and part * _STEP > most:
            best = part  # until one is short enough
            continue
        waves = -(-tiles * -(-steps // part) // _WORKERS)
        if waves * (part + _PART_STEPS) < least:
            best, least = part, waves * (part + _PART_STEPS)
    return best * _STEP
