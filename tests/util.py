"""Small inputs and comparisons shared by the behaviour tests."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.qa.testing.tolerance import dense_attention


def random_inputs(
    seed: int, batch=2, q_len=80, kv_len=96, heads=4, kv_heads=4, head_dim=16, value_dim=24, dtype=jnp.float32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """query, key and value of a small call whose lengths are no multiple of the block sizes in use."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (batch, q_len, heads, head_dim), (batch, kv_len, kv_heads, head_dim), (batch, kv_len, kv_heads, value_dim)
    query, key, value = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
    return query, key, value


def random_mask(seed: int, q_len=80, kv_len=96, batch=1, heads=1, density=0.4) -> np.ndarray:
    """A dense boolean mask with some wholly empty and full blocks of 32, and an empty row."""
    rng = np.random.default_rng(seed)
    mask = rng.random((batch, heads, q_len, kv_len)) < density
    kinds = rng.integers(0, 3, (batch, heads, -(-q_len // 32), -(-kv_len // 32))).repeat(32, -2).repeat(32, -1)
    kinds = kinds[..., :q_len, :kv_len]
    mask = np.where(kinds == 0, False, np.where(kinds == 1, True, mask))
    mask[..., q_len // 2, :] = False
    return mask


def dense(query, key, value, mask, **extra):
    """Masked attention by plain JAX with this project's meaning of an empty row; out only."""
    options: dict[str, Any] = {
        "bias": None,
        "lengths": None,
        "sinks": None,
        "scale": query.shape[-1] ** -0.5,
        "soft_cap": None,
    }
    return dense_attention(query, key, value, mask, **{**options, **extra})[0]


def loss_of(attention):
    """A scalar whose gradient is different for every element of the output."""

    def loss(*args):
        out = attention(*args)
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
        return (jnp.sin(out) * weights).sum()

    return loss


def assert_close(actual, expected, atol=2e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(e), atol=atol, rtol=1e-4)


def text_of(compiled) -> str:
    """The text of a compiled program, which JAX has on every platform of these tests."""
    text = compiled.as_text()
    assert text is not None
    return text


def operands_of_shard_maps(lowered) -> list[str]:
    """Types of the operands of the `shard_map`s of a lowered program."""
    found = re.findall(r"sdy\.manual_computation.*?\n *\} : \((.*?)\) ->", lowered.as_text(), re.DOTALL)
    return re.findall(r"tensor<(.*?)>", " ".join(found))


def collectives(compiled) -> list[str]:
    """Names of the collective operations in a compiled program."""
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"\b({names})(?:-start)?\(", text_of(compiled))
