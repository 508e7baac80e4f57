"""The split plan: parts are multiples of 64, and their partial results bounded."""

from __future__ import annotations

import itertools

from jax_bsk.decode import parts
from jax_bsk.decode.parts import Sizes


def test_parts_of_usual_calls():
    def of(seqs, positions, tokens=None):
        return parts.choose(Sizes(1, tokens or seqs, seqs, 32, 8, 128, positions))

    assert of(1, 1024)[0] == 64  # 16 parts for each of 8 heads: 128 workers have something to do
    assert of(1, 32768)[0] == 1024  # 256 workers have a part each
    assert of(8, 8192)[0] == 2048
    assert of(64, 8192) == (2048, 8192)
    assert parts.choose(Sizes(1, 64, 64, 32, 8, 128, 8192, quantised=True)) == (4096, 8192)  # as many bytes
    assert of(64, 32768, 4096)[1] == 32768  # a prompt's partial results would not fit
    assert parts.choose(Sizes(1, 1, 1, 32, 8, 128, 1024), given=192) == (192, 192)


def test_partial_results_are_bounded():
    for seqs, kv_heads, positions, tokens in itertools.product((1, 16, 512), (1, 8), (10, 1000, 131072), (1, 64, 4096)):
        sizes = Sizes(1, tokens, seqs, 32, kv_heads, 128, positions)
        group, longest = 32 // kv_heads, max(64, -(-positions // 64) * 64)
        few = min(tokens, seqs * max(1, 16 // group))
        for part, rows in zip(parts.choose(sizes), (few, tokens), strict=True):
            assert part % 64 == 0
            assert 64 <= part <= longest
            assert part == longest or rows * 32 * -(-positions // part) * 130 * 4 <= 64 << 20
