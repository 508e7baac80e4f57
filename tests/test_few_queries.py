"""Few queries: the heads that share keys and values are computed together, and give the bits they give alone."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
from jax_bsk.masks import BlockMask


@pytest.mark.parametrize("queries", [1, 5])
def test_packed_heads_have_the_bits_of_heads_alone(queries):
    rng = np.random.default_rng(queries)
    heads, kv_heads, keys = 8, 2, 300
    query = jnp.asarray(rng.normal(size=(2, queries, heads, 40)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(2, keys, kv_heads, 40)), jnp.float32) for _ in range(2))
    value = value.at[:, 7].set(jnp.nan)  # which reaches those that attend to it
    sinks = jnp.asarray(rng.normal(size=(heads,)), jnp.float32)
    lengths = {"key_value_seq_lengths": jnp.array([300, 170], jnp.int32)}
    dense = rng.random((queries, keys)) < 0.4
    dense[0, :128] = False
    shared = BlockMask.from_dense(dense, block_size=(64, 64))
    apart = np.repeat(dense[None, None], heads, 1)
    apart[:, -1] ^= True  # so that heads have lists of their own, and are computed one by one
    options = {"sinks": sinks, "implementation": "cpu", "return_residual": True, **lengths}
    packed = jax_bsk.sparse_attention(query, key, value, mask=shared, **options)
    alone = jax_bsk.sparse_attention(
        query, key, value, mask=BlockMask.from_dense(apart, block_size=(64, 64)), **options
    )
    for got, want in zip(packed, alone, strict=True):
        np.testing.assert_array_equal(got[:, :, :-1], want[:, :, :-1])
