"""Masks as pytrees: their structure is decided by class and static fields, whatever stands in the arrays' places."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

import jax_bsk.masks as m
from jax_bsk import sparse_attention

T = 64
IDS = np.arange(T, dtype=np.int32) // 9
NEAR = np.abs(np.arange(T)[:, None] - np.arange(T)) < 20


def near(q, k):
    return abs(q - k) < 20


MASKS = {
    "segments": m.SegmentMask(IDS),
    "segments of jax": m.SegmentMask(jnp.asarray(IDS), jnp.asarray(IDS), contiguous=True),
    "segments per example": m.SegmentMask(np.stack([IDS, IDS])),
    "array": m.ArrayMask(NEAR),
    "array of blocks": m.BlockArrayMask(np.eye(2, dtype=bool), 32),
    "prefix": m.PrefixLMMask(5),
    "prefix per example": m.PrefixLMMask(np.array([5, 40])),
    "prefix of jax": m.PrefixLMMask(jnp.int32(5)),
    "function": m.FunctionMask(near),
    "function within": m.FunctionMask(near, within=m.SegmentMask(IDS)),
    "rows": m.RowRangeMask(0, IDS * 7),
    "columns": m.ColumnRangeMask(IDS * 3, upper_end=jnp.asarray(IDS)),
    "slices": m.SliceMask([[0, 9], [9, 64]], [[0, 30], [20, 64]], ["full", "causal"]),
    "sequences": m.BlockDiagonalMask(np.array([[30, 34]]), window=(None, 0), prefix=np.array([3, 4])),
    "lines": m.VerticalSlashMask([3, 4], [0, 1, 9]),
    "tree": m.TreeMask(np.arange(T) // 2 - 1),
    "heads": m.MultiHeadMask([m.SegmentMask(IDS), m.CausalMask()]),
    "combined": (m.CausalMask() & m.SegmentMask(IDS) | m.ArrayMask(NEAR)) & ~m.PrefixLMMask(np.array([3, 4])),
    "blocks": (m.CausalMask() & m.SegmentMask(IDS)).bind(T, block_size=32),
    "blocks, transposed": m.MultiHeadMask([m.LocalMask(3), m.CausalMask()]).bind(T, block_size=32).transpose(),
}
# All have the same leaves' places, but None, which is a pytree of no leaves and must be asked for as one.
PLACEHOLDERS = {
    "bool": True,
    "int": 0,
    "float": 1.5,
    "str": "a name",
    "object": object(),
    "None": None,
    "spec": PartitionSpec("data"),
    "shape": jax.ShapeDtypeStruct((3,), np.int32),
    "scalar": np.float32(2),
    "optax": optax.MaskedNode,
}


def is_none(x):
    return x is None


def dense(mask):
    bound = mask if isinstance(mask, m.BlockMask) else mask.bind(T, block_size=32)
    return bound.to_dense()


@pytest.mark.parametrize("name", MASKS)
def test_structure_does_not_depend_on_leaves(name):
    mask = MASKS[name]
    leaves, structure = jax.tree.flatten(mask)
    assert name in ("prefix", "function") or leaves
    for kind, placeholder in PLACEHOLDERS.items():
        other = jax.tree.map(lambda _, x=placeholder: x, mask)
        assert jax.tree.structure(other, is_leaf=is_none) == jax.tree.structure(mask, is_leaf=is_none), kind
        assert type(mask).__name__ in repr(other) or " & " in repr(other), kind
        back = jax.tree.map(lambda _, leaf: leaf, other, mask, is_leaf=is_none)
        assert jax.tree.structure(back) == structure, kind
        assert all(x is y for x, y in zip(jax.tree.leaves(back), leaves, strict=True)), kind
        if isinstance(mask, m.Mask):
            assert other == jax.tree.map(lambda _, x=placeholder: x, mask), kind
            assert back == mask, kind
            assert not leaves or other != mask, kind
    np.testing.assert_array_equal(dense(back), dense(mask))


@pytest.mark.parametrize("name", MASKS)
def test_prefix_trees_of_jax(name):
    """Trees of a mask's structure in `in_shardings`, `out_shardings` and `in_axes`."""
    mask = MASKS[name]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: sharding, mask)
    same = jax.jit(lambda mask: mask, in_shardings=(shardings,), out_shardings=shardings)(mask)
    assert jax.tree.structure(same) == jax.tree.structure(mask)
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), mask)
    axes = jax.tree.map(lambda _: 0, mask)
    one = jax.vmap(lambda mask, x: (mask, x), in_axes=(axes, 0), out_axes=(axes, 0))(stacked, jnp.zeros(2))[0]
    assert jax.tree.structure(one) == jax.tree.structure(mask)
    shared = jax.tree.map(lambda _: None, mask)
    assert jax.vmap(lambda mask, x: x, in_axes=(shared, 0))(mask, jnp.zeros(2)).shape == (2,)


@pytest.fixture
def promotion():
    """Optax multiplies Python floats and int32 counts, which the tests' strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", MASKS)
def test_equinox_and_optax(name, promotion):
    mask = MASKS[name]
    arrays, rest = eqx.partition(mask, eqx.is_array_like)
    assert not jax.tree.leaves(rest)
    assert jax.tree.structure(eqx.combine(arrays, rest)) == jax.tree.structure(mask)
    back = eqx.filter_jit(lambda mask: mask)(mask)
    np.testing.assert_array_equal(dense(back), dense(mask))

    params = {"w": jnp.ones(3), "mask": mask}
    trained = {"w": True, "mask": jax.tree.map(lambda _: False, mask)}
    optimizer = optax.masked(optax.adam(0.1), trained)
    state = optimizer.init(params)
    updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


class Model(eqx.Module):
    """Attention with a mask that travels as data among its weights."""

    weight: jax.Array
    mask: m.Mask | m.BlockMask

    def __call__(self, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in self.weight)
        return sparse_attention(q, k, v, mask=self.mask, implementation="xla")


def test_training_step_saved_and_restored(tmp_path, promotion):
    x = jax.random.normal(jax.random.key(0), (2, T, 4))
    model = Model(jax.random.normal(jax.random.key(1), (3, 4, 1, 4)), m.CausalMask() & m.SegmentMask(jnp.asarray(IDS)))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss, grads = eqx.filter_value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
        updates, state = optimizer.update(grads, state, model)
        return loss, eqx.apply_updates(model, updates), state

    first, model, state = step(model, state)
    second, trained, state = step(model, state)
    assert second < first
    assert trained.mask == model.mask

    saved = {"model": trained, "state": state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", saved)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "standard", abstract)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(a, b)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", saved)
        arguments = ocp.checkpoint_utils.construct_restore_args(saved)
        restored = checkpointer.restore(tmp_path / "tree", item=saved, restore_args=arguments)
    assert restored["model"].mask == trained.mask
    assert step(restored["model"], restored["state"])[0] < second

    # One mask per model: the ids are mapped with the weights.
    models = jax.tree.map(lambda x: jnp.stack([x, x]), eqx.filter(model, eqx.is_array))
    outs = eqx.filter_vmap(lambda model: model(x))(models)
    np.testing.assert_allclose(outs[1], model(x), atol=1e-6)


def test_the_kind_of_a_prefix_is_structure():
    """An int is static, an array is a leaf, of whatever rank; neither changes with what stands in its place."""
    assert not jax.tree.leaves(m.PrefixLMMask(5))
    assert not jax.tree.leaves(m.PrefixLMMask(np.int64(5)))  # pyright: ignore[reportArgumentType]
    assert len(jax.tree.leaves(m.PrefixLMMask(jnp.int32(5)))) == 1
    q, k = np.arange(T)[:, None], np.arange(T)
    number = jax.tree.map(int, m.PrefixLMMask(jnp.int32(5)))
    np.testing.assert_array_equal(dense(number)[0, 0], (k < 5) | (q >= k))
    inside = jax.jit(lambda mask: (mask & m.SegmentMask(jnp.asarray(IDS))).bind(T, block_size=32))
    np.testing.assert_array_equal(dense(inside(number))[0, 0], ((k < 5) | (q >= k)) & (IDS[:, None] == IDS))
