"""docs/guides/masks-from-elsewhere.md: each line of its tables is the mask that the paper beside it defines."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from jax_bsk import sparse_attention
from jax_bsk.masks import Mask, MultiHeadMask
from tests.masks import definitions as d
from tests.test_coming_from import Row, attention, rows_of
from tests.test_pages import BLOCK, ROOT

TEXT = (ROOT / "docs" / "guides" / "masks-from-elsewhere.md").read_text()
ROWS = {row.name: row for row in rows_of(TEXT)}
N = 256
DOCUMENT = [0] * 100 + [1] * 96 + [2] * 60
BEGIN, END = (0, 100, 196), (100, 196, 256)


@functools.cache
def names() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _, code in BLOCK.findall(TEXT):
        if ">>>" not in code:
            exec(compile(code, "masks-from-elsewhere", "exec"), found)
    return found


def pairs(attends) -> np.ndarray:
    return d.pairs(N, N, attends)


def flashmask(interval, upper=lambda k: (0, 0), causal: bool = False) -> np.ndarray:
    lts, lte, uts, ute = ([pair[n] for pair in map(f, range(N))] for f in (interval, upper) for n in range(2))
    return d.flashmask(N, N, lts, lte, uts, ute, causal)


def na(shape, kernel, dilation=1, stride=1, causal=None, tile=None) -> np.ndarray:
    axes = len(shape)
    return d.neighborhood(shape, kernel, (dilation,) * axes, (stride,) * axes, causal or (False,) * axes, tile)


def with_text() -> np.ndarray:
    dense = d.sliding_tiles((4, 6, 10), (4, 6, 6), (2, 2, 2), length=N)
    dense[240:] = dense[:, 240:] = True
    return dense


def sequences(attends) -> np.ndarray:
    """Inside of documents, by positions there."""

    def pair(q: int, k: int) -> bool:
        first = BEGIN[DOCUMENT[q]]
        return DOCUMENT[q] == DOCUMENT[k] and attends(q - first, k - first, DOCUMENT[q])

    return pairs(pair)


def branch() -> np.ndarray:
    return d.tree([120 if i == 200 else i - 1 for i in range(N)], 0)


DEFINITIONS = {
    "NATTEN na1d, kernel 7": lambda: na((256,), (7,)),
    "na2d, kernel 5 x 7": lambda: na((16, 16), (5, 7)),
    "na3d, kernel 3 x 5 x 5, causal in time": lambda: na((4, 8, 8), (3, 5, 5), causal=(True, False, False)),
    "na2d, kernel 5, dilation 3": lambda: na((16, 16), (5, 5), dilation=3),
    "na2d, kernel 8, stride 4 (GNA)": lambda: na((16, 16), (8, 8), stride=4),
    "na2d, kernel 5, tokens in tiles of 4 x 8": lambda: na((16, 16), (5, 5), tile=(4, 8)),
    "Sliding tile attention, window 3 x 3 x 2 tiles": lambda: d.sliding_tiles((4, 8, 8), (3, 6, 4), (1, 2, 2)),
    "the same with 16 tokens of text behind": with_text,
    "Swin, windows of 4 x 4": lambda: d.swin((16, 16), (4, 4), (0, 0)),
    "Swin, shifted by 2": lambda: d.swin((16, 16), (4, 4), (2, 2)),
    "FlashMask, causal, LTS": lambda: flashmask(lambda k: (END[DOCUMENT[k]], N), causal=True),
    "FlashMask, causal, LTS and LTE": lambda: flashmask(lambda k: (k + 16, k + 64), causal=True),
    "FlashMask, LTS and UTE": lambda: flashmask(lambda k: (END[DOCUMENT[k]], N), lambda k: (0, k - 20)),
    "FlashMask, LTS, LTE, UTS and UTE": lambda: flashmask(lambda k: (k + 8, k + 64), lambda k: (k - 64, k - 8)),
    "MagiAttention, q_ranges, k_ranges and attn_type_map": lambda: d.slices(
        N, N, [(0, 100), (100, 256), (100, 256)], [(0, 100), (0, 50), (100, 256)], [0, 1, 3]
    ),
    "cuDNN Flex Attention, endpoints F0, F1, F2": lambda: pairs(lambda q, k: k < 8 or q - 40 <= k < q + 1),
    "cu_seqlens, causal": lambda: sequences(lambda q, k, n: k <= q),
    "prefix-LM by document, prefixes of 16, 30 and 5": lambda: sequences(lambda q, k, n: k <= q or k < (16, 30, 5)[n]),
    "a prompt with many answers": lambda: pairs(lambda q, k: k <= q and DOCUMENT[k] in (0, DOCUMENT[q])),
    "FlashMask's causal blockwise": lambda: pairs(
        lambda q, k: k <= q and (DOCUMENT[q] == 2 or DOCUMENT[k] == DOCUMENT[q])
    ),
    "StreamingLLM, 4 sinks and a window of 32": lambda: pairs(lambda q, k: k <= q and (q - k < 32 or k < 4)),
    "MInference, vertical and slash": lambda: d.vertical_slash(N, N, [0, 9, 70], [*range(16), 64, 100]),
    "MInference, A-shape": lambda: pairs(lambda q, k: k <= q and (q - k < 64 or k < 16)),
    "Block diffusion, blocks of 16": lambda: d.block_diffusion(128, 16),
    "block causal, blocks of 16": lambda: pairs(lambda q, k: k // 16 <= q // 16),
    "Medusa, SpecInfer: a tree of drafts": lambda: d.tree([-1, 0, 0, 1], 0),
    "Tree training: a trajectory that branches": branch,
}


def test_every_row_has_a_definition():
    assert ROWS.keys() == DEFINITIONS.keys()


def mask_of(row: Row) -> Mask:
    return eval(compile(row.right, row.name, "eval"), names())


@pytest.mark.parametrize("name", ROWS)
def test_the_line_is_the_mask(name):
    dense = DEFINITIONS[name]()
    if name.startswith("Medusa"):
        np.testing.assert_array_equal(mask_of(ROWS[name]).bind(4, 9).to_dense()[0, 0], d.tree([-1, 0, 0, 1], 5))
    for block_size in (32, 64):
        d.check(mask_of(ROWS[name]), dense, block_size)


def test_attention_with_all_of_them():
    """One head per mask, in one call."""
    found = [(mask_of(row), DEFINITIONS[name]()) for name, row in ROWS.items() if not name.startswith("Medusa")]
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, N, len(found), 8))
    out = sparse_attention(q, k, v, mask=MultiHeadMask([mask for mask, _ in found]))
    expected = attention(q, k, v, np.stack([dense for _, dense in found]))
    np.testing.assert_allclose(out, expected, atol=3e-5)
