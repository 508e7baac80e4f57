"""`sparse_attention(..., gates=...)`: a differentiable factor of each visited block, over every implementation.

Compared with a plain loop over the lists' entries in float64, which JAX differentiates.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.masks import CausalMask
from tests.util import random_inputs, random_mask


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def reference(query, key, value, gates, mask, *, sinks=None, lengths=None, soft_cap=None):
    """(out [B, T, N, Hv], lse [B, T, N]), entry by entry as they are listed; for any lists that are sound."""
    batch, q_len, heads, size = query.shape
    kv_len, group = key.shape[1], heads // key.shape[2]
    bits = np.unpackbits(np.asarray(mask.bit_tiles).view(np.uint8), axis=-1, bitorder="little").astype(bool)
    pad_q, pad_kv = -q_len % mask.block_q, -kv_len % mask.block_kv
    key, value = (jnp.pad(x, [(0, 0), (0, pad_kv), (0, 0), (0, 0)]) for x in (key, value))
    outs, lses = [], []
    for b, n in np.ndindex(batch, heads):
        offsets, ids, tiles, words, gate = (
            x[b % x.shape[0], n % x.shape[1]] for x in (mask.row_offsets, mask.kv_blocks, mask.tiles, bits, gates)
        )
        q_end, kv_end = (q_len, kv_len) if lengths is None else np.minimum(lengths[b], (q_len, kv_len))
        for row in range(mask.nq):
            begin, end = int(offsets[row]), int(offsets[row + 1])
            queries = row * mask.block_q + np.arange(mask.block_q)
            keys = (np.asarray(ids[begin:end])[:, None] * mask.block_kv + np.arange(mask.block_kv)).astype(int)
            attends = [
                words[t] if t >= 0 else np.ones((mask.block_q, mask.block_kv), bool) for t in tiles[begin:end].tolist()
            ]
            attends = np.concatenate([np.zeros((mask.block_q, 0), bool), *attends], 1)
            attends = attends & (queries < q_end)[:, None] & (keys.ravel() < kv_end)
            q = jnp.pad(query[b, :, n], [(0, pad_q), (0, 0)])[queries]
            logits = q @ key[b, keys.ravel(), n // group].T / math.sqrt(size)
            if soft_cap is not None:
                logits = soft_cap * jnp.tanh(logits / soft_cap)
            weights = jnp.where(attends, jnp.exp(jnp.where(attends, logits, 0)), 0)
            total = weights.sum(-1)
            if sinks is not None:
                total = total + jnp.where(queries < q_end, jnp.exp(sinks[n]), 0)
            safe = jnp.where(total == 0, 1, total)
            probs = weights / safe[:, None] * jnp.repeat(gate[begin:end], mask.block_kv)
            outs.append(probs @ value[b, keys.ravel(), n // group])
            lses.append(jnp.where(total == 0, -jnp.inf, jnp.log(safe)))
    out = jnp.stack(outs).reshape(batch, heads, -1, value.shape[-1])[:, :, :q_len]
    return jnp.moveaxis(out, 1, 2), jnp.moveaxis(jnp.stack(lses).reshape(batch, heads, -1)[..., :q_len], 1, 2)


def loss_of(attention):
    def loss(*args):
        out, lse = attention(*args)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        more = jnp.sin(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape)
        return (jnp.sin(out) * weights).sum() + (jnp.where(jnp.isneginf(lse), 0, lse) * more).sum()

    return loss


def random_gates(mask, batch, heads, seed=0, dtype=np.float64):
    """Of both signs, some exactly 0, with numbers past the last entry too."""
    rng = np.random.default_rng(seed)
    gates = rng.standard_normal((batch, heads, mask.kv_blocks.shape[-1]))
    return jnp.asarray(np.where(rng.random(gates.shape) < 0.2, 0, gates), dtype)


def test_values_and_gradients(x64, implementation):
    mask = BlockMask.from_dense(random_mask(0), block_size=32)
    operands = (*random_inputs(0, heads=4, kv_heads=2, dtype=jnp.float64), random_gates(mask, 2, 4))

    def ours(*args):
        *qkv, gates = args
        return sparse_attention(*qkv, mask=mask, gates=gates, implementation=implementation, return_residual=True)

    def expected(*args):
        return reference(*args, mask)

    for a, e in zip(jax.tree.leaves(ours(*operands)), jax.tree.leaves(expected(*operands)), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-12)
    every = tuple(range(4))
    got, want = (jax.jit(jax.grad(loss_of(f), every))(*operands) for f in (ours, expected))
    for a, e in zip(got, want, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-12)


def test_gates_need_a_block_mask():
    q, k, v = random_inputs(0)
    with pytest.raises(ValueError, match=r"gates has one number for each entry of a BlockMask's lists.*CausalMask"):
        sparse_attention(q, k, v, mask=CausalMask(), gates=jnp.ones((1, 1, 4)))
