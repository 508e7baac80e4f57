"""How many keys a part of a row has: the split plan of a call, from its static sizes alone.

A row's keys are summed in parts, which several multiprocessors compute at a time, and the partial results are merged in
their order. A part's bounds are positions of its own sequence, so a sequence's result has the same bits whatever else
is in the batch, as long as the parts are equal. Sizes that differ may choose others: the caller can give them.
"""

from __future__ import annotations

import dataclasses
import math

_WORKERS = 264  # kernels at a time on a chip of 132 multiprocessors
_WAVES = 4  # parts per worker, so that workers with little to do take more of them
_LEAST, _MOST = 128, 2048
_PARTIAL_BYTES = 64 << 20
_TILE = 64


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
    """

    groups: int
    tokens: int
    seqs: int
    heads: int
    kv_heads: int
    value_dim: int
    positions: int


def choose(sizes: Sizes, given: int | None = None) -> tuple[int, int]:
    """Keys of a part, for sequences of few queries and for others; multiples of 64.

    Args:
      sizes: Sizes of the call.
      given: What the caller asks for, of both.
    """
    if given is not None:
        return given, given
    group = sizes.heads // max(sizes.kv_heads, 1)
    few = min(sizes.tokens, sizes.seqs * max(1, 16 // max(group, 1)))
    return _part(sizes, few), _part(sizes, sizes.tokens)


def _part(sizes: Sizes, tokens: int) -> int:
    longest = max(_TILE, -(-sizes.positions // _TILE) * _TILE)
    work = sizes.groups * sizes.seqs * sizes.kv_heads * sizes.positions
    part = 1 << round(math.log2(max(1, work / (_WAVES * _WORKERS))))
    part = min(max(part, _TILE if work <= _WORKERS * _LEAST else _LEAST), _MOST)
    a_part = 4 * sizes.groups * tokens * sizes.heads * (sizes.value_dim + 2)
    while part < longest and a_part * -(-sizes.positions // part) >= _PARTIAL_BYTES:
        part *= 2
    return min(part, longest)
