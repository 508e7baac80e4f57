"""`sparse_attention(..., gates=...)`: a differentiable factor of each visited block, over every implementation.

Compared with a plain loop over the lists' entries in float64, which JAX differentiates. The numeric battery and the
fault table have gates of their own; meshes are in `test_gates_sharding`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jax.typing import DTypeLike

import jax_bsk
from jax_bsk import BlockMask, sparse_attention
from jax_bsk.attention import ffi
from jax_bsk.masks import CausalMask, FullMask, SegmentMask
from tests.util import assert_close, random_inputs, random_mask, text_of

BLOCK = 32
LISTS = "row_offsets", "kv_blocks", "tiles"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def reference(query, key, value, gates, mask, *, sinks=None, lengths=None, soft_cap=None):
    """out [B, T, N, Hv] and lse [B, T, N], of each row's entries as they are listed; for host lists that are sound."""
    batch, q_len, heads, size = query.shape
    kv_len, group, lead = key.shape[1], heads // key.shape[2], (batch, heads)
    spread = {name: np.broadcast_to(getattr(mask, name), (*lead, *getattr(mask, name).shape[2:])) for name in LISTS}
    bits = np.unpackbits(np.ascontiguousarray(mask.bit_tiles).view(np.uint8), axis=-1, bitorder="little").astype(bool)
    bits = np.broadcast_to(bits, (*lead, *bits.shape[2:]))
    width = int(np.diff(spread["row_offsets"]).max(initial=0))
    entries = np.zeros((*lead, mask.nq, width), int)
    attends = np.zeros((*lead, mask.nq, mask.block_q, width, mask.block_kv), bool)
    for b, n, row in np.ndindex(*lead, mask.nq):
        begin, end = spread["row_offsets"][b, n, row : row + 2]
        for at, entry in enumerate(range(begin, end)):
            tile = spread["tiles"][b, n, entry]
            entries[b, n, row, at] = entry
            attends[b, n, row, :, at] = True if tile < 0 else bits[b, n, tile]
    keys = np.take_along_axis(spread["kv_blocks"][:, :, None], entries, -1)[..., None] * mask.block_kv
    keys = keys + np.arange(mask.block_kv)
    queries = np.arange(mask.nq * mask.block_q).reshape(mask.nq, mask.block_q)
    q_end, kv_end = (
        np.full((batch, 2), (q_len, kv_len)).T if lengths is None else np.minimum(lengths, (q_len, kv_len)).T
    )
    valid = np.broadcast_to(queries < q_end[:, None, None, None], (*lead, *queries.shape))
    attends &= valid[..., None, None] & (keys < kv_end[:, None, None, None, None])[:, :, :, None]

    index = (
        np.arange(batch)[:, None, None, None, None],
        np.minimum(keys, kv_len - 1),
        np.arange(heads)[:, None, None, None],
    )
    key, value = (jnp.repeat(x, group, 2)[index] for x in (key, value))  # [B, N, nq, width, block_kv, .]
    query = jnp.pad(query, [(0, 0), (0, queries.size - q_len), (0, 0), (0, 0)])
    query = jnp.moveaxis(query, 2, 1).reshape(*lead, *queries.shape, size)
    logits = jnp.einsum("bnrqh,bnrekh->bnrqek", query, key) / math.sqrt(size)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    weights = jnp.where(attends, jnp.exp(jnp.where(attends, logits, 0)), 0)
    total = weights.sum((-1, -2))
    if sinks is not None:
        total = total + jnp.where(valid, jnp.exp(sinks)[None, :, None, None], 0)
    safe = jnp.where(total == 0, 1, total)
    own = jnp.take_along_axis(jnp.broadcast_to(gates, (*lead, gates.shape[-1]))[:, :, None], entries, -1)
    out = jnp.einsum("bnrqek,bnrq,bnre,bnrekv->bnrqv", weights, 1 / safe, own, value)
    out = jnp.moveaxis(out.reshape(*lead, -1, value.shape[-1])[:, :, :q_len], 1, 2)
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(safe)).reshape(*lead, -1)[..., :q_len]
    return out, jnp.moveaxis(lse, 1, 2)


def loss_of(attention):
    """A scalar of out and lse whose gradient is another for each element."""

    def loss(*args):
        out, lse = attention(*args)
        weights = jnp.cos(jnp.arange(out.size, dtype=lse.dtype)).reshape(out.shape)
        more = jnp.sin(jnp.arange(lse.size, dtype=lse.dtype)).reshape(lse.shape)
        return (jnp.sin(out.astype(lse.dtype)) * weights).sum() + (jnp.where(jnp.isneginf(lse), 0, lse) * more).sum()

    return loss


def random_gates(mask, batch, heads, seed=0, dtype: DTypeLike = np.float32):
    """Of both signs, some exactly 0, with numbers past the last entry too."""
    rng = np.random.default_rng(seed)
    gates = rng.standard_normal((batch, heads, mask.kv_blocks.shape[-1]))
    return jnp.asarray(np.where(rng.random(gates.shape) < 0.2, 0, gates), dtype)


def bind(seed=0, batch=1, heads=1, **sizes) -> BlockMask:
    return BlockMask.from_dense(random_mask(seed, batch=batch, heads=heads, **sizes), block_size=BLOCK)


def gated(implementation, mask, **options):
    """(query, key, value, gates[, sinks]) -> out, lse."""

    def attention(query, key, value, gates, sinks=None):
        return sparse_attention(
            query,
            key,
            value,
            mask=mask,
            gates=gates,
            sinks=sinks,
            implementation=implementation,
            return_residual=True,
            **options,
        )

    return attention


def gradients(attention, operands):
    return jax.jit(jax.value_and_grad(loss_of(attention), tuple(range(len(operands)))))(*operands)


def assert_same(actual, expected, atol=1e-11):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=atol, rtol=1e-10)


# ---- values and gradients


@pytest.mark.parametrize(
    ("kv_heads", "batch", "heads"), [(4, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 4), (4, 2, 4)], ids=str
)
def test_values_and_gradients(x64, implementation, kv_heads, batch, heads):
    """Of lists that are shared, and of an example's, a head's and both's own."""
    mask = bind(0, batch, heads)
    operands = (*random_inputs(0, kv_heads=kv_heads, dtype=jnp.float64), random_gates(mask, 2, 4, dtype=np.float64))
    expected = functools.partial(reference, mask=mask)
    assert_same(gated(implementation, mask)(*operands), jax.jit(expected)(*operands))
    assert_same(gradients(gated(implementation, mask), operands), gradients(expected, operands))


@pytest.mark.parametrize("soft_cap", [None, 0.75])
def test_with_sinks_lengths_and_soft_cap(x64, implementation, soft_cap):
    mask = bind(1)
    operands = *random_inputs(1, kv_heads=2, dtype=jnp.float64), random_gates(mask, 2, 4, dtype=np.float64)
    operands = *operands, jnp.linspace(-1.0, 1.0, 4)
    lengths = np.array([[70, 96], [33, 40]])
    ours = gated(
        implementation,
        mask,
        logits_soft_cap=soft_cap,
        query_seq_lengths=lengths[:, 0],
        key_value_seq_lengths=lengths[:, 1],
    )

    def expected(q, k, v, gates, sinks):
        return reference(q, k, v, gates, mask, sinks=sinks, lengths=lengths, soft_cap=soft_cap)

    assert_same(gradients(ours, operands), gradients(expected, operands))


@pytest.mark.parametrize("lengths", [(0, 0), (0, 96), (80, 0)])
def test_gradients_of_gates_beyond_the_lengths_are_zero(implementation, lengths):
    mask = bind(2)
    operands = *random_inputs(2), random_gates(mask, 2, 4)
    options = dict(zip(("query_seq_lengths", "key_value_seq_lengths"), ([n, n] for n in lengths), strict=True))
    options = {name: np.array(n) for name, n in options.items()}
    (_, (*_, dgates)) = gradients(gated(implementation, mask, **options), operands)
    np.testing.assert_array_equal(dgates, 0)


@pytest.mark.parametrize("traced", [False, True], ids=["host", "traced"])
def test_padding_and_empty_rows(x64, implementation, traced):
    """Lists with room left: what stands there, and its gates, mean nothing."""
    dense = random_mask(3)
    dense[..., :BLOCK, :] = False
    tight = BlockMask.from_dense(dense, block_size=BLOCK)
    mask = BlockMask.from_dense(dense, block_size=BLOCK, max_blocks=9, max_tiles=9)
    used = tight.kv_blocks.shape[-1]
    assert used < 9
    gates = random_gates(tight, 2, 4, dtype=np.float64)
    padded = jnp.pad(gates, [(0, 0), (0, 0), (0, 9 - used)], constant_values=np.nan)
    inputs = random_inputs(3, dtype=jnp.float64)
    expected = gradients(functools.partial(reference, mask=tight), (*inputs, gates))

    def run(mask):
        return gradients(gated(implementation, mask), (*inputs, padded))

    value, (*others, dgates) = jax.jit(run)(jax.tree.map(jnp.asarray, mask)) if traced else run(mask)
    assert_same((value, (*others, dgates[..., :used])), expected)
    np.testing.assert_array_equal(dgates[..., used:], 0)


def test_duplicates_have_gates_of_their_own(x64, implementation):
    ids, counts = jnp.array([[1, 1, 0], [2, 0, 0], [2, 2, 2]]), jnp.array([3, 2, 3])
    mask = jax.jit(lambda *a: BlockMask.from_indices(*a, q_len=80, kv_len=96, block_size=BLOCK))(ids, counts)
    host = jax.tree.map(np.asarray, mask)
    operands = *random_inputs(4, dtype=jnp.float64), random_gates(mask, 2, 4, dtype=np.float64)
    expected = gradients(functools.partial(reference, mask=host), operands)
    assert_same(gradients(gated(implementation, host), operands), expected)
    assert_same(gradients(gated(implementation, mask), operands), expected)
    assert_same(jax.jit(lambda m: gradients(gated(implementation, m), operands))(mask), expected)


def test_gates_of_one_change_nothing(implementation):
    mask = bind(5)
    inputs = random_inputs(5, kv_heads=2)
    ones = jnp.ones((1, 1, mask.kv_blocks.shape[-1]))
    plain = gradients(lambda q, k, v: gated(implementation, mask)(q, k, v, None), inputs)
    value, grads = gradients(gated(implementation, mask), (*inputs, ones))
    # The native kernels multiply by a gate where they else do not: by 1 that is exact.
    assert_close((value, grads[:3]), plain, atol=0 if implementation == "cpu" else 1e-5)


def test_the_residual_knows_nothing_of_gates(implementation):
    mask = bind(6)
    inputs = random_inputs(6)
    _, lse = gated(implementation, mask)(*inputs, gates=None)
    out, with_zeros = gated(implementation, mask)(*inputs, gates=jnp.zeros((1, 1, mask.kv_blocks.shape[-1])))
    np.testing.assert_array_equal(lse, with_zeros)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4)])
def test_shared_gates_have_the_sum_of_the_gradients(x64, implementation, shape):
    mask = bind(7)
    inputs, gates = random_inputs(7, dtype=jnp.float64), random_gates(mask, *shape, dtype=np.float64)
    whole = jnp.broadcast_to(gates, (2, 4, gates.shape[-1]))
    value, (*others, dwhole) = gradients(functools.partial(reference, mask=mask), (*inputs, whole))
    axes = tuple(axis for axis in (0, 1) if shape[axis] == 1)
    expected = value, (*others, dwhole.sum(axes, keepdims=True))
    assert_same(gradients(gated(implementation, mask), (*inputs, gates)), expected)


def test_unbatched(implementation):
    mask = bind(8)
    inputs, gates = [x[0] for x in random_inputs(8)], random_gates(mask, 1, 4)
    expected = gated(implementation, mask)(*(x[None] for x in inputs), gates=gates)
    for given in (gates, gates[0]):
        out, lse = gated(implementation, mask)(*inputs, gates=given)
        np.testing.assert_array_equal(out, expected[0][0])
        np.testing.assert_array_equal(lse, expected[1][0])
    assert gated(implementation, mask)(*inputs, gates=gates[0, :1])[0].shape == out.shape


@pytest.mark.parametrize(
    ("dtype", "of_gates", "atol"),
    [("bfloat16", "float32", 3e-2), ("bfloat16", "bfloat16", 6e-2), ("float16", "float16", 6e-3)],
)
def test_types(implementation, dtype, of_gates, atol):
    """Gates of any type are used in float32, and their gradient is of that type."""
    mask = bind(9)
    inputs = random_inputs(9, kv_heads=2, dtype=jnp.dtype(dtype))
    gates = random_gates(mask, 2, 4, dtype=jnp.dtype(of_gates))
    operands = *inputs, gates
    _, grads = gradients(gated(implementation, mask), operands)
    assert [g.dtype for g in grads] == [x.dtype for x in operands]
    wide = tuple(x.astype(jnp.float32) for x in operands)
    _, expected = gradients(functools.partial(reference, mask=mask), wide)
    for g, e in zip(grads, expected, strict=True):
        np.testing.assert_allclose(g.astype(jnp.float32), e, atol=atol * max(1, np.abs(e).max()))


def test_double_gates_of_single_inputs(x64, implementation):
    mask = bind(9)
    inputs = random_inputs(9, dtype=jnp.float32)
    _, (*_, dgates) = gradients(gated(implementation, mask), (*inputs, random_gates(mask, 2, 4, dtype=np.float64)))
    assert dgates.dtype == jnp.float64


def test_finite_differences(x64, implementation):
    mask = BlockMask.from_dense(random_mask(10, q_len=40, kv_len=40), block_size=BLOCK)
    inputs = random_inputs(10, 1, 40, 40, 2, 1, 4, 3, jnp.float64)
    loss = jax.jit(loss_of(gated(implementation, mask)))
    operands = *inputs, random_gates(mask, 1, 2, dtype=np.float64)
    check_grads(loss, operands, order=1, modes=("rev",), atol=1e-6, rtol=1e-6)


def test_second_derivatives(x64):
    mask = BlockMask.from_dense(random_mask(11, q_len=40, kv_len=40), block_size=BLOCK)
    inputs = random_inputs(11, 1, 40, 40, 2, 1, 4, 3, jnp.float64)
    operands = *inputs, random_gates(mask, 1, 2, dtype=np.float64)
    every = tuple(range(4))

    def twice(attention):
        gradient = jax.grad(loss_of(attention), every)
        return jax.jit(jax.grad(lambda *a: sum((g**2).sum() for g in gradient(*a)), every))(*operands)

    assert_same(twice(gated("cpu", mask)), twice(functools.partial(reference, mask=mask)), atol=1e-8)


@pytest.mark.parametrize("sizes", [(0, 40, 50, 2), (2, 0, 50, 2), (2, 40, 0, 2), (2, 40, 50, 0)])
def test_zero_sizes(implementation, sizes):
    batch, q_len, kv_len, heads = sizes
    q, k = jnp.ones((batch, q_len, heads, 8)), jnp.ones((batch, kv_len, heads, 8))
    mask = FullMask().bind(q_len, kv_len, block_size=BLOCK)
    gates = jnp.ones((batch, heads, mask.kv_blocks.shape[-1]))
    value, grads = gradients(gated(implementation, mask), (q, k, k, gates))
    np.testing.assert_array_equal(value, 0)
    assert [g.shape for g in grads] == [x.shape for x in (q, k, k, gates)]
    assert not any(g.any() for g in grads)


# ---- transformations


def test_vmap(implementation):
    """Over the gates alone, over everything, with gates that are shared, and in and out of a gradient."""
    mask = bind(12)
    inputs, gates = random_inputs(12, kv_heads=2), random_gates(mask, 2, 4)
    many = jnp.stack([gates, -gates, gates**2])
    attend = gated(implementation, mask)
    one = jax.jit(attend)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(one(*inputs, g) for g in many))
    assert_close(jax.jit(jax.vmap(lambda g: attend(*inputs, gates=g)))(many), expected)
    query, key, value = stacked = [jnp.stack([x, x / 2, -x]) for x in inputs]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(one(*x, g) for *x, g in zip(*stacked, many, strict=True)))
    assert_close(jax.jit(jax.vmap(attend))(query, key, value, many), expected)
    moved = jax.vmap(attend, in_axes=(0, 0, 0, 2))(query, key, value, jnp.moveaxis(many, 0, 2))
    assert_close(moved, expected)

    loss, every = loss_of(attend), (0, 1, 2, 3)
    for axes in ((0, 0, 0, None), (None, None, None, 0)):
        args = [s if a == 0 else x for s, x, a in zip((*stacked, many), (*inputs, gates), axes, strict=True)]
        inside = jax.jit(jax.vmap(jax.grad(loss, every), axes))(*args)
        alone = [
            jax.grad(loss, every)(*(x if a is None else x[i] for x, a in zip(args, axes, strict=True)))
            for i in range(3)
        ]
        assert_close(inside, jax.tree.map(lambda *x: jnp.stack(x), *alone), 5e-5)
        outside = jax.jit(jax.grad(lambda *a, axes=axes: jax.vmap(loss, axes)(*a).sum(), every))(*args)
        summed = [g if a == 0 else g.sum(0) for g, a in zip(inside, axes, strict=True)]
        assert_close(outside, summed, 1e-4)


def test_vmap_over_the_mask(implementation):
    # The three masks have the same structure (no block is dropped or full), so that their lists stack.
    masks = np.random.default_rng(13).random((3, 1, 4, 80, 96)) < 0.5
    masks = [BlockMask.from_dense(m, block_size=BLOCK) for m in masks]
    inputs, gates = random_inputs(13), random_gates(masks[0], 2, 4)
    expected = [gradients(gated(implementation, m), (*inputs, gates)) for m in masks]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *masks)
    actual = jax.vmap(lambda m: gradients(gated(implementation, m), (*inputs, gates)))(stacked)
    assert_close(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected), 5e-5)


def test_scan_with_remat(implementation):
    mask = bind(14)
    (query, key, value), gates = random_inputs(14, value_dim=16), random_gates(mask, 2, 4)

    def run(query, gates, wrap):
        def layer(x, _):
            return x + gated(implementation, mask)(x, key, value, gates)[0], None

        return jax.lax.scan(wrap(layer), query, None, length=3)[0].sum()

    actual = jax.jit(jax.grad(lambda *a: run(*a, wrap=jax.checkpoint), (0, 1)))(query, gates)
    assert_close(actual, jax.jit(jax.grad(lambda *a: run(*a, wrap=lambda f: f), (0, 1)))(query, gates), 1e-4)


def test_traced_mask_built_inside_jit(implementation):
    ids = jnp.sort(jax.random.randint(jax.random.key(0), (2, 96), 0, 4))
    inputs = random_inputs(15, q_len=96)

    def build(ids):
        return (SegmentMask(ids) & CausalMask()).bind(96, block_size=BLOCK)

    capacity = jax.eval_shape(build, ids).kv_blocks.shape[-1]  # with room for every causal block
    gates = jnp.asarray(np.random.default_rng(15).standard_normal((2, 4, capacity)), jnp.float32)

    @jax.jit
    def run(ids, *operands):
        return gradients(gated(implementation, build(ids)), operands)

    host = jax.tree.map(np.asarray, jax.jit(build)(ids))
    expected = gradients(functools.partial(reference, mask=host), (*inputs, gates))
    assert_close(run(ids, *inputs, gates), expected, 5e-5)


def test_layers_that_share_a_traced_mask_share_its_order():
    def loss(x, gates, ids, layers):
        mask = (CausalMask() & SegmentMask(ids, contiguous=True)).bind(256, block_size=64)
        for _ in range(layers):
            x = x + sparse_attention(x, x, x, mask=mask, gates=gates, implementation="cpu")
        return jnp.sum(x**2)

    x, ids = jnp.ones((1, 256, 2, 32)), jnp.zeros((1, 256), jnp.int32)
    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=3)
    one, four = (text_of(gradient.lower(x, jnp.ones((1, 1, 10)), ids, n).compile()) for n in (1, 4))
    for text in (one, four):
        assert text.count('custom_call_target="jax_bsk_lists_transpose"') == 1
    # Each layer puts the derivative of its gates back in the order of the lists.
    assert four.count(" gather(") == one.count(" gather(") + 3


# ---- without gates


def test_a_call_without_gates_is_told_of_none_when_lowered():
    """Neither operands nor results, no permutation and no list more than without this feature.

    Of this shape is, beside gates, the bias of distances, which the call does not have either.
    """
    mask, inputs = bind(16), random_inputs(16)
    step = jax.jit(jax.grad(lambda *a: sparse_attention(*a, mask=mask, implementation="cpu").sum(), (0, 1, 2)))
    text = step.lower(*inputs).as_text()
    lines = text.splitlines()
    (forward,) = (line for line in lines if "@jax_bsk_attention_forward(" in line)
    (backward,) = (line for line in lines if "@jax_bsk_attention_backward(" in line)
    assert forward.count("tensor<1x1x0xf32>") == 2, forward
    assert backward.count("tensor<1x1x0xf32>") == 4, backward
    assert not any(name in text for name in ("stablehlo.gather", "stablehlo.sort", "stablehlo.scatter"))
    assert "_ordered" not in mask.__dict__
    explicit = jax.jit(
        jax.grad(lambda *a: sparse_attention(*a, mask=mask, gates=None, implementation="cpu").sum(), (0, 1, 2))
    )
    assert explicit.lower(*inputs).as_text() == text


# ---- export


class TestExport:
    def step(self, implementation=None, mask=None):
        mask = bind(17) if mask is None else mask
        attend = gated(implementation, mask)
        operands = *random_inputs(17, kv_heads=2), random_gates(mask, 2, 4)
        return jax.jit(jax.value_and_grad(loss_of(attend), (0, 1, 2, 3))), operands

    def test_round_trip(self):
        step, operands = self.step("cpu")
        exported = jax.export.export(step, disabled_checks=jax_bsk.export_checks())(*operands)
        restored = jax.export.deserialize(exported.serialize())
        assert_close(restored.call(*operands), step(*operands), atol=0)

    def test_cuda_lowering_without_a_gpu(self):
        mask = FullMask().bind(80, 96, block_size=64)
        step, operands = self.step(mask=mask)
        exported = jax.export.export(step, platforms=["cuda"], disabled_checks=jax_bsk.export_checks())(*operands)
        lines = exported.mlir_module().splitlines()
        (forward,) = (line for line in lines if "@jax_bsk_attention_forward(" in line)
        (backward,) = (line for line in lines if "@jax_bsk_attention_backward(" in line)
        gates = "tensor<2x4x4xf32>"
        assert forward.count(gates) == 1, forward
        assert backward.count(gates) == 3, backward  # by rows, by columns, and the gradient
        query, key, *_ = operands
        size = ffi.backward_workspace(query.shape, key.shape, mask.kv_blocks.shape, (64, 64), (2, 4, 4))
        assert f"tensor<{size}xui8>" in backward, backward


def test_workspace_has_room_for_partial_sums_of_gates():
    arguments = (2, 256, 8, 64), (2, 256, 2, 64), (1, 1, 3)
    for block_size in ((128, 64), (128, 128), (64, 64)):
        plain = ffi.backward_workspace(*arguments, block_size)
        tiles = block_size[0] // 64 * (block_size[1] // 64)
        assert ffi.backward_workspace(*arguments, block_size, (2, 8, 3)) == plain + 2 * 8 * 3 * tiles * 4 * 4


# ---- key-major lists


def shuffled_columns(mask: BlockMask, seed=0) -> BlockMask:
    """The mask with key-major lists whose columns have their entries in another order."""
    mask = mask.transpose()
    assert mask.col_offsets is not None
    q_blocks, col_tiles = np.array(mask.q_blocks), np.array(mask.col_tiles)
    rng = np.random.default_rng(seed)
    for b, h in np.ndindex(q_blocks.shape[:2]):
        for begin, end in zip(mask.col_offsets[b, h, :-1], mask.col_offsets[b, h, 1:], strict=True):
            turned = begin + rng.permutation(end - begin)
            q_blocks[b, h, begin:end], col_tiles[b, h, begin:end] = q_blocks[b, h, turned], col_tiles[b, h, turned]
    shuffled = dataclasses.replace(mask, q_blocks=q_blocks, col_tiles=col_tiles)
    shuffled.check()
    assert not np.array_equal(q_blocks, np.asarray(mask.q_blocks))
    return shuffled


@pytest.mark.parametrize("traced", [False, True], ids=["host", "traced"])
def test_key_major_lists_in_an_order_of_their_own(implementation, traced):
    mask = bind(18)
    operands = *random_inputs(18), random_gates(mask, 2, 4)
    expected = gradients(gated(implementation, mask), operands)

    def run(mask):
        return gradients(gated(implementation, mask), operands)

    given = shuffled_columns(mask)
    assert_close(jax.jit(run)(given) if traced else run(given), expected, atol=2e-5)


def test_a_column_with_a_bad_tile_is_nan_for_its_gates():
    """As its dk and dv are; what a kernel leaves unwritten is never handed on."""
    mask = FullMask().bind(96, block_size=BLOCK)
    tiles = np.array(mask.tiles)
    tiles[0, 0, 4] = 7  # row 1, key block 1
    bad = dataclasses.replace(mask, tiles=tiles)
    operands = *random_inputs(19, q_len=96), random_gates(mask, 2, 4)
    _, (*_, right) = gradients(gated("cpu", mask), operands)
    for given in (bad, jax.tree.map(jnp.asarray, bad)):
        _, (*_, dgates) = gradients(gated("cpu", given), operands)
        columns, rows = np.arange(9) % 3, np.arange(9) // 3
        assert np.isnan(dgates[..., (columns == 1) | (rows == 1)]).all()
        sound = (columns != 1) & (rows != 1)
        np.testing.assert_array_equal(dgates[..., sound], right[..., sound])


# ---- errors


class TestErrors:
    capacity = FullMask().bind(80, 96, block_size=BLOCK).kv_blocks.shape[-1]

    def call(self, gates, mask="full", batched=True, **options):
        inputs = random_inputs(20)
        mask = FullMask().bind(80, 96, block_size=BLOCK) if isinstance(mask, str) else mask
        return sparse_attention(*(inputs if batched else [x[0] for x in inputs]), mask=mask, gates=gates, **options)

    @pytest.mark.parametrize(
        ("mask", "given"), [(None, "no mask"), (CausalMask(), "CausalMask"), (np.ones((80, 96), bool), "ndarray")]
    )
    def test_gates_need_a_block_mask(self, mask, given, implementation):
        with pytest.raises(ValueError, match=rf"gates has one number for each entry.*{given}.*bind\(q_len, kv_len\)"):
            self.call(jnp.ones((1, 1, 4)), mask, implementation=implementation)

    @pytest.mark.parametrize("shape", [(1, 1, 1), (3, 4), (2, 3, 9), (3, 4, 9), (9,), (1, 1, 1, 9), (2, 2, 9)])
    def test_shapes(self, shape, implementation):
        assert self.capacity == 9
        with pytest.raises(ValueError, match=r"gates is \[B\|1, N\|1, capacity\] with .* = \(2, 4, 9\).*got shape"):
            self.call(jnp.ones(shape), implementation=implementation)

    def test_unbatched_shape(self, implementation):
        with pytest.raises(ValueError, match=r"gates is \[N\|1, capacity\] with .* = \(1, 4, 9\)"):
            self.call(jnp.ones((3, 9)), batched=False, implementation=implementation)

    def test_types(self, implementation):
        with pytest.raises(TypeError, match="gates is a floating-point array, got int32; cast it"):
            self.call(jnp.ones((1, 1, 9), jnp.int32), implementation=implementation)
