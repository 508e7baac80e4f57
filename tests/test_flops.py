"""Operations of calls, of which XLA does not know: against counts by hand, and against XLA's of dense attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BSR, flops, sparse_attention
from jax_bsk.masks import ArrayMask, CausalMask, FullMask, LocalMask, MultiHeadMask

QUERY, KEY, VALUE = (2, 96, 4, 16), (2, 80, 2, 16), (2, 80, 2, 8)


def dense(mask):
    return np.broadcast_to(np.asarray(mask), (2, 4, 96, 80))


CAUSAL = np.tri(96, 80, dtype=bool)
LENGTHS = np.arange(80)[None, None, None] < np.array([80, 33])[:, None, None, None]
# mask, is_causal, the attended elements, visited blocks of 32 x 32 (of 128 x 128 where nothing is bound) of a head
MASKS = {
    "nothing": (None, False, np.ones((96, 80), bool)),
    "causal": (None, True, CAUSAL),
    "lazy": (CausalMask() & LocalMask((9, 0)), False, CAUSAL & ~np.tri(96, 80, -10, dtype=bool)),
    "bound": (CausalMask().bind(96, 80, block_size=32), False, CAUSAL),
    "padding": (ArrayMask(np.broadcast_to(LENGTHS, (2, 1, 96, 80))), True, LENGTHS & CAUSAL),
    "array": (LENGTHS, False, LENGTHS),
    "heads": (MultiHeadMask([CausalMask(), FullMask()] * 2), False, np.stack([CAUSAL, np.ones((96, 80), bool)] * 2)),
}


@pytest.mark.parametrize("name", MASKS)
def test_attention(name):
    mask, is_causal, attended = MASKS[name]
    cost = flops.attention(jax.ShapeDtypeStruct(QUERY, jnp.bfloat16), KEY, np.zeros(VALUE), mask, is_causal=is_causal)
    pairs = int(dense(attended).sum())
    assert cost.forward.useful == pairs * (2 * 16 + 2 * 8)
    assert cost.backward.useful == pairs * (3 * 2 * 16 + 2 * 2 * 8)
    assert cost.training == cost.forward + cost.backward
    block = 32 if name == "bound" else 128
    tiles = np.pad(dense(attended), [(0, 0), (0, 0), (0, -96 % block), (0, -80 % block)])
    tiles = tiles.reshape(2, 4, -(-96 // block), block, -(-80 // block), block).any((3, 5))
    assert cost.forward.visited == int(tiles.sum()) * block**2 * (2 * 16 + 2 * 8)
    assert cost.backward.visited / cost.forward.visited == cost.backward.useful / cost.forward.useful


def test_unbatched_and_what_is_not_known():
    one = flops.attention(QUERY[1:], KEY[1:], VALUE[1:], is_causal=True)
    assert 2 * one.forward.useful == flops.attention(QUERY, KEY, VALUE, is_causal=True).forward.useful
    assert flops.attention(QUERY, KEY).forward.useful == 2 * 4 * 96 * 80 * 64
    with pytest.raises(ValueError, match="all three"):
        flops.attention(QUERY, KEY[1:])
    with pytest.raises(ValueError, match="query has 3 or 4 dimensions, got shape"):
        flops.attention(QUERY[2:], KEY)
    with pytest.raises(TypeError, match="traced"):
        jax.eval_shape(lambda m: flops.attention(QUERY, KEY, mask=m), jnp.ones((96, 80), bool))


def test_dense_attention_takes_what_xla_counts():
    """A mask that attends to all: XLA counts the products and the softmax, and of the custom call nothing."""
    q = jnp.ones((1, 128, 2, 64))
    attend = {
        "dense": lambda q: jax.nn.dot_product_attention(q, q, q),
        "native": lambda q: sparse_attention(q, q, q, implementation="cpu"),
    }
    analyses = {name: jax.jit(f).lower(q).compile().cost_analysis() or {} for name, f in attend.items()}
    counted = {name: analysis["flops"] for name, analysis in analyses.items()}
    mine = flops.attention(q, q).forward.useful
    assert mine <= counted["dense"] <= 1.2 * mine
    assert counted["native"] < 0.1 * mine, "XLA counts custom calls by now: say so in jax_bsk/flops.py"


def test_products():
    keep = np.array([[True, False], [True, True], [False, True]])
    matrix = BSR.from_dense(np.ones((70, 50), np.float32), 32, keep=keep)
    elements = int((keep.repeat(32, 0).repeat(32, 1)[:70, :50]).sum())
    cost = flops.matmul(matrix, (50, 7))
    assert cost.forward == flops.Flops(2 * elements * 7, 2 * 4 * 32 * 32 * 7)
    assert cost.backward == cost.forward + cost.forward
    assert flops.matmul(jnp.ones((3, 5, 70)), matrix).forward.useful == 2 * elements * 15
    assert flops.sampled_matmul((70, 9), (9, 50), matrix).forward.useful == 2 * elements * 9
    traced = []
    jax.eval_shape(lambda a: traced.append(flops.matmul(a, (50, 7))) or a.data, matrix)
    assert traced[0].forward.visited == cost.forward.visited
    with pytest.raises(TypeError, match="one factor is a BSR"):
        flops.matmul((4, 4), (4, 4))
