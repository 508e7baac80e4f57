"""JAX's transformations of `sparse_attention`: the same values through each, for every implementation."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
from jax_bsk import BlockMask, sparse_attention
from jax_bsk.masks import CausalMask, SegmentMask
from tests.util import assert_close, dense, loss_of, random_inputs, random_mask, text_of

BLOCK = 32


def bind(mask: np.ndarray) -> BlockMask:
    return BlockMask.from_dense(mask, block_size=BLOCK)


@pytest.fixture
def attend(implementation):
    return functools.partial(sparse_attention, implementation=implementation)


def test_eager_and_jit_agree(attend):
    inputs, mask = random_inputs(0), random_mask(0)
    expected = dense(*inputs, mask=mask)
    assert_close(attend(*inputs, mask=bind(mask)), expected)
    assert_close(jax.jit(lambda *a: attend(*a, mask=bind(mask)))(*inputs), expected)


def test_mask_as_jit_argument_does_not_recompile(attend):
    traces = []

    @jax.jit
    def f(inputs, mask):
        traces.append(1)
        return attend(*inputs, mask=mask)

    inputs = random_inputs(1)
    # Every block of these is partial, so that the lists differ in their values only.
    masks = [np.random.default_rng(seed).random((1, 1, 80, 96)) < 0.5 for seed in range(3)]
    for mask in masks:
        assert_close(f(inputs, bind(mask)), dense(*inputs, mask=mask))
    assert len(traces) == 1


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_vmap_over_each_array(attend, argument):
    inputs, mask = list(random_inputs(4)), random_mask(4)
    inputs[argument] = jnp.stack([inputs[argument], 2 * inputs[argument], -inputs[argument]])
    axes = tuple(0 if i == argument else None for i in range(3))
    mapped = jax.vmap(lambda *a: attend(*a, mask=bind(mask)), axes)
    assert_close(mapped(*inputs), jax.vmap(lambda *a: dense(*a, mask=mask), axes)(*inputs))


def test_vmap_over_every_axis_position(attend):
    query, key, value = random_inputs(5)
    mask = random_mask(5)
    stacked = jnp.stack([query, 2 * query], axis=2)
    mapped = jax.vmap(lambda q: attend(q, key, value, mask=bind(mask)), in_axes=2, out_axes=3)
    assert_close(mapped(stacked), jax.vmap(lambda q: dense(q, key, value, mask), in_axes=2, out_axes=3)(stacked))


@pytest.mark.parametrize("batched_inputs", [False, True])
def test_vmap_over_the_mask(attend, batched_inputs):
    # The three masks have the same structure (no block is dropped or full), so that their lists stack.
    masks = np.random.default_rng(6).random((3, 2, 4, 80, 96)) < 0.5
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[bind(m) for m in masks])
    inputs = random_inputs(6)
    if batched_inputs:
        query, key, value = (jnp.stack([x, x / 2, -x]) for x in inputs)
        inputs = query, key, value
    axes = (0 if batched_inputs else None,) * 3 + (0,)
    actual = jax.vmap(lambda q, k, v, m: attend(q, k, v, mask=m), axes)(*inputs, stacked)
    assert_close(actual, jax.vmap(dense, axes)(*inputs, jnp.asarray(masks)))


def mask_of(arrays: dict[str, Any]) -> BlockMask:
    """A mask of 64 queries and 96 keys of the named arrays, or a tree of its structure with anything in their place."""
    return BlockMask(
        **arrays, col_offsets=None, q_blocks=None, col_tiles=None, block_q=BLOCK, block_kv=BLOCK, q_len=64, kv_len=96
    )


def two_of(*names: str) -> tuple[BlockMask, BlockMask]:
    """A mask of 2 x 3 blocks, and one that differs from it in the named arrays alone."""
    words = np.random.default_rng(18).integers(0, 2**32, (2, 1, 1, 2, BLOCK, 1), np.uint32)
    arrays = {
        "row_offsets": np.array([[0, 2, 4], [0, 1, 3]], np.int32)[:, None, None],
        "kv_blocks": np.array([[0, 2, 1, 2], [1, 2, 0, 1]], np.int32)[:, None, None],
        "tiles": np.array([[0, -1, 1, -1], [-1, 1, -1, 0]], np.int32)[:, None, None],
        "bit_tiles": words,
    }
    first, second = (mask_of({n: arrays[n][i if n in names else 0] for n in arrays}) for i in (0, 1))
    return first, second


def mapped_mask(names, masks):
    """Both masks as one, the named arrays stacked, and its axes for vmap."""
    stacked = {name: jnp.stack([getattr(mask, name) for mask in masks]) for name in names}
    axes = mask_of({n: 0 if n in names else None for n in ARRAYS})
    return dataclasses.replace(masks[0], **stacked), axes


ARRAYS = ("row_offsets", "kv_blocks", "tiles", "bit_tiles")


@pytest.mark.parametrize(
    ("names", "gated"),
    [*(((name,), False) for name in ARRAYS), (ARRAYS[1:2], True), (ARRAYS[2:3], True), (ARRAYS[1:4:2], False)],
    ids=str,
)
def test_vmap_over_some_arrays_of_a_mask(names, gated):
    """Of the native calls, which take a block list's arrays together; plain JAX has nothing to take together."""
    attend = functools.partial(sparse_attention, implementation="cpu")
    inputs = random_inputs(18, batch=1, q_len=64, heads=2, kv_heads=1, head_dim=8, value_dim=8)
    gates = jnp.array([[[0.5, 2.0, -1.0, 1.5]]]) if gated else None
    loss = loss_of(lambda q, k, v, gates, mask: attend(q, k, v, mask=mask, gates=gates))
    masks = two_of(*names)
    stacked, axes = mapped_mask(names, masks)
    arguments = (0, 1, 2, 3) if gated else (0, 1, 2)
    one = jax.jit(jax.value_and_grad(loss, arguments))
    expected = [one(*inputs, gates, mask) for mask in masks]

    inside = jax.jit(jax.vmap(one, (None,) * 4 + (axes,)))(*inputs, gates, stacked)
    assert_close(inside, jax.tree.map(lambda *x: jnp.stack(x), *expected), 5e-5)

    def total(*args):
        return jax.vmap(loss, (None,) * 4 + (axes,))(*args).sum()

    outside = jax.jit(jax.value_and_grad(total, arguments))(*inputs, gates, stacked)
    assert_close(outside, jax.tree.map(lambda a, b: a + b, *expected), 1e-4)


@pytest.mark.parametrize("mapped", ["kv_blocks", "counts"])
def test_vmap_over_part_of_index_lists(attend, mapped):
    (query, key, value), length = random_inputs(19, batch=2, q_len=64, kv_len=64, heads=2, kv_heads=2, head_dim=8), 64
    lists = {"kv_blocks": jnp.array([[0, 1], [0, 1]]), "counts": jnp.array([2, 1])}
    others = {"kv_blocks": jnp.array([[1, 0], [1, 0]]), "counts": jnp.array([1, 2])}

    def loss(query, array):
        mask = BlockMask.from_indices(**{**lists, mapped: array}, q_len=length, block_size=BLOCK)
        return loss_of(lambda q: attend(q, key, value, mask=mask))(query)

    both = jnp.stack([lists[mapped], others[mapped]])
    gradient = jax.jit(jax.value_and_grad(loss))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[gradient(query, array) for array in both])
    assert_close(jax.vmap(gradient, (None, 0))(query, both), expected, 5e-5)


def test_nested_vmap_over_different_arrays_of_a_mask():
    query, key, value = random_inputs(20, batch=1, q_len=64, heads=2, kv_heads=2, head_dim=8, value_dim=8)
    queries = jnp.stack([query, -query, query / 2])
    stacked = {name: mapped_mask((name,), two_of(name))[0] for name in ("kv_blocks", "tiles")}
    base = two_of()[0]

    def loss(query, ids, tiles):
        mask = dataclasses.replace(base, kv_blocks=ids, tiles=tiles)
        return loss_of(lambda q: sparse_attention(q, key, value, mask=mask, implementation="cpu"))(query)

    gradient = jax.jit(jax.value_and_grad(loss))
    ids, tiles = stacked["kv_blocks"].kv_blocks, stacked["tiles"].tiles
    # Outermost the ids, then the queries, then the tiles.
    nested = jax.vmap(jax.vmap(jax.vmap(gradient, (None, None, 0)), (0, None, None)), (None, 0, None))
    values, gradients = jax.jit(nested)(queries, ids, tiles)
    assert values.shape == (2, 3, 2)
    for i, q, t in np.ndindex(2, 3, 2):
        assert_close((values[i, q, t], gradients[i, q, t]), gradient(queries[q], ids[i], tiles[t]), 5e-5)


@pytest.mark.parametrize("what", ["query", "kv_blocks", "gates"])
def test_vmap_over_an_axis_of_size_zero(attend, what):
    query, key, value = random_inputs(21, batch=1, q_len=64, heads=2, kv_heads=2, head_dim=8, value_dim=8)
    base = two_of()[0]
    arguments = {"query": query, "kv_blocks": jnp.asarray(base.kv_blocks), "gates": jnp.ones((1, 1, 4))}

    def loss(key, array):
        given = {**arguments, what: array}
        mask = dataclasses.replace(base, kv_blocks=given["kv_blocks"])
        return attend(given["query"], key, value, mask=mask, gates=given["gates"])

    none = jnp.zeros((0, *arguments[what].shape), arguments[what].dtype)
    assert jax.vmap(loss, (None, 0))(key, none).shape == (0, *query.shape[:-1], 8)
    outside = jax.grad(lambda key: jax.vmap(loss, (None, 0))(key, none).sum())(key)
    np.testing.assert_array_equal(outside, 0)
    inside = jax.vmap(jax.grad(lambda *a: loss(*a).sum()), (None, 0))(key, none)
    assert inside.shape == (0, *key.shape)


def test_vmap_over_sinks_and_lengths(attend):
    inputs, mask = random_inputs(7), random_mask(7)
    sinks = jnp.linspace(-1.0, 2.0, 12, dtype=jnp.float32).reshape(3, 4)
    lengths = jnp.array([[90, 10], [96, 0], [33, 64]])
    actual = jax.vmap(lambda s, n: attend(*inputs, mask=bind(mask), sinks=s, key_value_seq_lengths=n))(sinks, lengths)

    def expected(s, n):
        pairs = jnp.stack([jnp.full_like(n, 80), n], 1)
        return dense(*inputs, mask=mask, sinks=s, lengths=pairs)

    assert_close(actual, jax.vmap(expected)(sinks, lengths))


def test_nested_vmap(attend):
    (query, key, value), mask = random_inputs(8), random_mask(8)
    queries, keys = jnp.stack([query, -query]), jnp.stack([key, key / 2, 2 * key])

    def nested(f):
        inner = jax.vmap(f, (0, None, None))
        return jax.vmap(inner, (None, 0, None))(queries, keys, value)

    assert_close(nested(lambda *a: attend(*a, mask=bind(mask))), nested(lambda *a: dense(*a, mask=mask)))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grad_inside_and_outside_vmap(attend, kv_heads):
    (query, key, value), mask = random_inputs(9, kv_heads=kv_heads), random_mask(9)
    queries = jnp.stack([query, query / 2])

    def both(f):
        loss = loss_of(f)
        inside = jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None))(queries, key, value)
        outside = jax.grad(lambda *a: jax.vmap(loss, (0, None, None))(*a).sum(), (0, 1, 2))(queries, key, value)
        return inside, outside

    assert_close(both(lambda *a: attend(*a, mask=bind(mask))), both(lambda *a: dense(*a, mask=mask)), atol=5e-5)


def test_scan_with_remat(attend):
    (query, key, value), mask = random_inputs(10, value_dim=16), random_mask(10)

    def run(f):
        def layer(x, _):
            return x + f(x, key, value), None

        return jax.grad(lambda x: jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0].sum())(query)

    assert_close(
        jax.jit(lambda: run(lambda *a: attend(*a, mask=bind(mask))))(), run(lambda *a: dense(*a, mask=mask)), 1e-4
    )


def test_remat_policy_saves_the_forward():
    inputs, mask = random_inputs(11), bind(random_mask(11))

    def gradient(policy):
        """Value and gradient, and how often their program calls the forward, as lowered and as compiled."""

        def block(q, k, v):
            return jnp.sin(sparse_attention(jnp.sin(q), k, v, mask=mask, implementation="cpu")).sum()

        lowered = jax.jit(jax.value_and_grad(jax.checkpoint(block, policy=policy), (0, 1, 2))).lower(*inputs)
        compiled = lowered.compile()
        counts = (
            lowered.as_text().count("@jax_bsk_attention_forward("),
            text_of(compiled).count('custom_call_target="jax_bsk_attention_forward"'),
        )
        return compiled(*inputs), counts

    names = jax.checkpoint_policies.save_only_these_names(*jax_bsk.RESIDUAL_NAMES)
    recomputed, twice = gradient(None)
    saved, once = gradient(names)
    assert twice[0] == 2  # XLA may then merge the two, as it does on CPUs
    assert once == (1, 1)
    assert_close(saved, recomputed, atol=0)


def test_traced_masks_inside_jit(attend):
    inputs = random_inputs(12, q_len=96)
    ids = jnp.sort(jax.random.randint(jax.random.key(0), (2, 96), 0, 4))

    @jax.jit
    def f(q, k, v, ids):
        block_mask = (SegmentMask(ids) & CausalMask()).bind(96, block_size=BLOCK)
        return attend(q, k, v, mask=block_mask)

    expected = (ids[:, None, :, None] == ids[:, None, None, :]) & jnp.tri(96, dtype=bool)[None, None]
    assert_close(f(*inputs, ids), dense(*inputs, mask=expected))
    grad = jax.jit(jax.grad(loss_of(lambda *a: f(*a, ids)), (0, 1, 2)))(*inputs)
    assert_close(grad, jax.grad(loss_of(lambda *a: dense(*a, mask=expected)), (0, 1, 2))(*inputs), 5e-5)


def test_gradient_of_the_mask_is_refused_as_any_integer_is(attend):
    inputs, mask = random_inputs(13), bind(random_mask(13))
    with pytest.raises(TypeError, match="int32"):
        jax.grad(lambda m: attend(*inputs, mask=m).sum())(mask)


def test_second_derivatives():
    inputs, mask = random_inputs(14), bind(random_mask(14))

    def twice(implementation):
        loss = loss_of(lambda q: sparse_attention(q, *inputs[1:], mask=mask, implementation=implementation))
        return jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum())(inputs[0])

    loss = loss_of(lambda q: dense(q, *inputs[1:], mask=random_mask(14)))
    expected = jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum())(inputs[0])
    for implementation in ("cpu", "xla"):
        assert_close(twice(implementation), expected, 2e-4)


def test_forward_mode_of_xla():
    (query, key, value), mask = random_inputs(15), random_mask(15)
    tangent = jnp.cos(query)
    sparse = jax.jvp(
        lambda q: sparse_attention(q, key, value, mask=bind(mask), implementation="xla"), (query,), (tangent,)
    )
    assert_close(sparse, jax.jvp(lambda q: dense(q, key, value, mask), (query,), (tangent,)))


class TestExport:
    def arguments(self):
        return random_inputs(16), random_mask(16)

    def test_round_trip(self):
        inputs, mask = self.arguments()
        f = jax.jit(lambda *a: sparse_attention(*a, mask=bind(mask), implementation="cpu"))
        exported = jax.export.export(f, disabled_checks=jax_bsk.export_checks())(*inputs)
        restored = jax.export.deserialize(exported.serialize(vjp_order=1))
        assert_close(restored.call(*inputs), dense(*inputs, mask=mask))
        gradient = jax.grad(loss_of(restored.call))(*inputs)
        assert_close(gradient, jax.grad(loss_of(lambda *a: dense(*a, mask=mask)))(*inputs), 5e-5)

    def test_cuda_lowering_without_a_gpu(self):
        inputs, mask = self.arguments()
        lists = BlockMask.from_dense(mask, block_size=64)  # a size that CUDA takes
        loss = loss_of(lambda *a: sparse_attention(*a, mask=lists))
        f = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        exported = jax.export.export(f, platforms=["cuda"], disabled_checks=jax_bsk.export_checks())(*inputs)
        module = exported.mlir_module()
        assert "@jax_bsk_attention_forward(" in module
        assert "@jax_bsk_attention_backward(" in module

    def test_a_named_implementation_stays_on_its_platform(self):
        inputs, mask = self.arguments()
        f = jax.jit(lambda *a: sparse_attention(*a, mask=bind(mask), implementation="cpu"))
        with pytest.raises(jax_bsk.UnsupportedError, match="compiled for cuda"):
            jax.export.export(f, platforms=["cuda"], disabled_checks=jax_bsk.export_checks())(*inputs)


def test_layers_that_share_a_traced_mask_share_its_transposed_lists():
    """Each layer's backward transposes the mask; XLA makes one of all, so layers add attention alone."""
    length = 256

    def loss(x, ids, layers):
        mask = (CausalMask() & SegmentMask(ids, contiguous=True)).bind(length, block_size=64)
        for _ in range(layers):
            x = x + sparse_attention(x, x, x, mask=mask, implementation="cpu")
        return jnp.sum(x**2)

    x, ids = jnp.ones((1, length, 2, 32)), jnp.zeros((1, length), jnp.int32)
    gradient = jax.jit(jax.grad(loss), static_argnums=2)
    one, four = (text_of(gradient.lower(x, ids, layers).compile()) for layers in (1, 4))
    for layers, text in ((1, one), (4, four)):
        assert text.count('custom_call_target="jax_bsk_lists_transpose"') == 1
        assert text.count('custom_call_target="jax_bsk_attention_backward"') == layers
