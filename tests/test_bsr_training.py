"""Training with other libraries: Equinox modules, Optax and Orbax checkpoints."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jax_bsk import BSR, sparse_attention
from jax_bsk.masks import SegmentMask


@pytest.fixture(autouse=True)
def promotion():
    """Optax relies on implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Attention(eqx.Module):
    """Attention inside documents, of a projection with a block-sparse kernel [32, 96]."""

    kernel: BSR
    mask: SegmentMask

    def __call__(self, x: jax.Array) -> jax.Array:
        query, key, value = jnp.split((x @ self.kernel).reshape(1, 64, 6, 16), 3, axis=2)
        return sparse_attention(query, key, value, mask=self.mask)


def loss(model: Attention, x: jax.Array) -> jax.Array:
    return ((model(x) - 1) ** 2).mean()


def make() -> Attention:
    return Attention(BSR.random(jax.random.key(0), (32, 96), 0.5, 16) * 0.2, SegmentMask(jnp.arange(64) // 9))


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2))


@eqx.filter_jit
def step(model, state, x):
    value, grads = eqx.filter_value_and_grad(loss)(model, x)
    updates, state = OPTIMIZER.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, value


def train(model, state, x, steps):
    for _ in range(steps):
        model, state, value = step(model, state, x)
    return model, state, value


def test_an_equinox_module_is_trained_saved_and_restored(tmp_path):
    model, x = make(), jax.random.normal(jax.random.key(1), (1, 64, 32))
    state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))
    first = loss(model, x)
    model, state, _ = train(model, state, x, 3)
    assert loss(model, x) < first

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step_3", {"model": model, "state": state})
    with ocp.StandardCheckpointer() as checkpointer:
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"model": make(), "state": state})
        restored = checkpointer.restore(tmp_path / "step_3", template)
    assert jax.tree.structure(restored["model"]) == jax.tree.structure(model)
    assert restored["model"].kernel.lists is model.kernel.lists
    jax.tree.map(np.testing.assert_array_equal, restored, {"model": model, "state": state})

    # Training goes on with the same bits.
    *_, value = train(model, state, x, 1)
    *_, again = train(restored["model"], restored["state"], x, 1)
    assert value == again


def test_equinox_takes_a_module_apart_and_maps_over_it():
    model, x = make(), jax.random.normal(jax.random.key(1), (2, 1, 64, 32))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    assert jax.tree.leaves(arrays) == [model.kernel.data]
    joined = eqx.combine(arrays, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(model)
    batched = eqx.filter_vmap(lambda model, x: model(x), in_axes=(None, 0))(joined, x)
    np.testing.assert_allclose(batched[1], model(x[1]), atol=1e-5)
