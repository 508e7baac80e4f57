"""`sparse_attention(..., axis_name=...)`: each device of a `shard_map` calls it with its own tokens of one sequence."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import BlockMask, UnsupportedError, context, sparse_attention
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, MultiHeadMask, SegmentMask
from tests.util import assert_close, collectives, operands_of_shard_maps, random_inputs

LENGTH, BLOCK = 512, 32
WINDOW = CausalMask() & LocalMask((64, 0))
MASKS = {
    "window": WINDOW,  # rows in two parts
    "global": CausalMask() & (LocalMask((64, 0)) | GlobalMask(16)),
    "causal": CausalMask(),  # gathered
    "heads": MultiHeadMask([WINDOW, CausalMask(), WINDOW, CausalMask() & SegmentMask(np.arange(LENGTH) // 100)]),
}
attention = functools.partial(sparse_attention, implementation="cpu")


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values())))
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count], axis_types=types)


def both(attend):
    def run(*operands):
        out, pullback = jax.vjp(attend, *operands)
        return out, *pullback(jnp.cos(out))

    return run


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_bits_of_one_device(name, check_vma):
    mask = MASKS[name].bind(LENGTH, block_size=BLOCK)
    operands = (*random_inputs(0, q_len=LENGTH, kv_len=LENGTH), jnp.linspace(-1, 1, 4))

    def attend(q, k, v, sinks, **axis):
        return attention(q, k, v, mask=mask, sinks=sinks, **axis)

    split = P(None, "sequence")
    mapped = jax.shard_map(
        functools.partial(attend, axis_name="sequence"),
        mesh=mesh_of(sequence=8),
        in_specs=(split, split, split, P()),
        out_specs=split,
        check_vma=check_vma,
    )
    expected, found = (jax.jit(both(f))(*operands) for f in (attend, mapped))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert_close(found, expected)


@pytest.mark.parametrize("inside", [True, False])
def test_no_operand_of_the_shard_map_lacks_elements(inside):
    """XLA of jax 0.11.2 dies of one: sinks, gates, a bias, and bit tiles where all blocks are full.

    A gradient that is taken outside keeps the latter for the backward's `shard_map`.
    """
    mask = BlockMask.from_block_mask(np.tri(16, dtype=bool), q_len=LENGTH, block_size=BLOCK)
    assert 0 in mask.bit_tiles.shape
    attend = functools.partial(attention, mask=mask, axis_name="sequence")
    split = P(None, "sequence")

    def sharded(f, outs):
        return jax.shard_map(f, mesh=mesh_of(sequence=8), in_specs=(split,) * 3, out_specs=outs)

    program = sharded(both(attend), (split,) * 4) if inside else both(sharded(attend, split))
    found = operands_of_shard_maps(jax.jit(program).lower(*random_inputs(0, q_len=LENGTH, kv_len=LENGTH)))
    assert len(found) > 3
    assert not [one for one in found if "0" in one.split("x")]


def test_a_plan_with_positions_beside_data():
    """Two examples over two groups of four devices; the gradient is taken inside, of a loss that is summed over all."""
    mask = (CausalMask() & SegmentMask(np.arange(LENGTH) // 200)).bind(LENGTH, block_size=BLOCK)
    plan = context.plan(mask, 4)
    operands = random_inputs(1, q_len=LENGTH, kv_len=LENGTH)

    def loss_and_gradients(q, k, v, positions, mask, axis=None):
        def loss(q, k, v):
            out = attention(q * jnp.cos(positions / 100)[None, :, None, None], k, v, mask=mask, axis_name=axis)
            return (out**2).sum()

        value, gradients = jax.value_and_grad(loss, (0, 1, 2))(q, k, v)
        return value if axis is None else jax.lax.psum(value, ("data", axis)), gradients

    split = P("data", "sequence")
    mapped = jax.shard_map(
        functools.partial(loss_and_gradients, mask=plan.mask, axis="sequence"),
        mesh=mesh_of(data=2, sequence=4),
        in_specs=(split, split, split, P("sequence")),
        out_specs=(P(), split),
    )
    expected = jax.jit(functools.partial(loss_and_gradients, mask=mask))(
        *operands, jnp.arange(LENGTH, dtype=jnp.float32)
    )
    loss, found = jax.jit(mapped)(*map(plan.dispatch, operands), plan.positions.astype(np.float32))
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    assert_close([plan.undispatch(x) for x in found], expected[1])


@pytest.mark.parametrize("name", ["window", "causal"])
def test_lengths_gates_and_the_log_sum_exp(name):
    mask = MASKS[name].bind(LENGTH, block_size=BLOCK)
    rng = np.random.default_rng(2)
    gates = jnp.asarray(rng.normal(size=(2, 4, mask.capacity)), jnp.float32)
    q, k, v = random_inputs(2, q_len=LENGTH, kv_len=LENGTH)
    lengths = jnp.array([300, 512])

    def attend(q, k, v, gates, lengths, **axis):
        given = {"query_seq_lengths": lengths, "return_residual": True, **axis}
        out, _ = attention(q, k, v, mask=mask, gates=gates, **given)
        plain, lse = attention(q, k, v, mask=mask, **given)
        return out + plain, jnp.where(jnp.isfinite(lse), lse, 0)

    split = P(None, "sequence")
    mapped = jax.shard_map(
        functools.partial(attend, axis_name="sequence"),
        mesh=mesh_of(sequence=4),
        in_specs=(split, split, split, P(), P()),
        out_specs=(split, split),
    )

    def gradients(attend):
        def loss(q, k, v, gates):
            out, lse = attend(q, k, v, gates, lengths)
            return (out**2).sum() + lse.sum(), (out, lse)

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))

    expected, found = (gradients(f)(q, k, v, gates) for f in (attend, mapped))
    np.testing.assert_array_equal(found[1][0], expected[1][0])
    assert_close(found, expected, 5e-5)


def test_traced_lists_key_lengths_and_other_lengths_of_keys():
    """The lists are an argument: all keys are gathered. There are twice as many keys as queries."""
    mask = LocalMask((96, 64)).bind(LENGTH // 2, LENGTH, block_size=BLOCK).padded()
    operands = random_inputs(3, q_len=LENGTH // 2, kv_len=LENGTH)

    def attend(q, k, v, mask, **axis):
        return attention(q, k, v, mask=mask, key_value_seq_lengths=jnp.array([200, 512]), **axis)

    split = P(None, "sequence")
    mapped = jax.shard_map(
        functools.partial(attend, axis_name="sequence"),
        mesh=mesh_of(sequence=4),
        in_specs=(split, split, split, P()),
        out_specs=split,
    )
    expected, found = (jax.jit(both(lambda q, k, v, f=f: f(q, k, v, mask)))(*operands) for f in (attend, mapped))
    np.testing.assert_array_equal(found[0], expected[0])
    assert_close(found, expected)


def test_two_axes_vmap_scan_and_remat():
    mask = WINDOW.bind(LENGTH, block_size=BLOCK)
    q, k, v = (x[None].repeat(2, 0) for x in random_inputs(4, q_len=LENGTH, kv_len=LENGTH, batch=1))

    def layers(q, k, v, **axis):
        @jax.checkpoint
        def layer(x, _):
            return jax.vmap(lambda x, k, v: attention(x, k, v, mask=mask, **axis))(x, k, v)[..., : x.shape[-1]], None

        return jax.lax.scan(layer, q, length=2)[0]

    split = P(None, None, ("a", "b"))
    mapped = jax.shard_map(
        functools.partial(layers, axis_name=("a", "b")), mesh=mesh_of(a=2, b=4), in_specs=split, out_specs=split
    )
    expected, found = (jax.jit(both(f))(q, k, v) for f in (layers, mapped))
    assert_close(found, expected)


def test_forward_mode():
    """Plain JAX computes it, of the rows of all devices."""
    q, k, v = random_inputs(4, q_len=LENGTH, kv_len=LENGTH, batch=1)
    tangents = tuple(jax.random.normal(jax.random.key(5), (2, *q.shape)))
    attend = functools.partial(attention, mask=WINDOW.bind(LENGTH, block_size=BLOCK))
    split = P(None, "sequence")
    mapped = jax.shard_map(
        functools.partial(attend, axis_name="sequence"), mesh=mesh_of(sequence=4), in_specs=split, out_specs=split
    )

    def along(f):
        return jax.jit(lambda q, k: jax.jvp(lambda q, k: f(q, k, v), (q, k), tangents)[1])(q, k)

    assert_close(along(mapped), along(attend))


def test_beside_an_axis_that_is_left_to_the_compiler():
    attend = functools.partial(attention, mask=WINDOW.bind(LENGTH, block_size=BLOCK))
    operands, mesh = random_inputs(5, q_len=LENGTH, kv_len=LENGTH), mesh_of(data=2, sequence=4)
    split = P(None, "sequence")
    mapped = jax.shard_map(
        functools.partial(attend, axis_name="sequence"),
        mesh=mesh,
        in_specs=split,
        out_specs=split,
        axis_names={"sequence"},
    )
    everywhere = [jax.device_put(x, NamedSharding(mesh, P("data", "sequence"))) for x in operands]
    expected = jax.jit(both(attend))(*operands)
    with jax.set_mesh(mesh):
        found = jax.jit(both(mapped))(*everywhere)
    np.testing.assert_array_equal(found[0], expected[0])
    assert_close(found, expected)


def test_only_what_is_wanted_travels():
    split = P(None, "sequence")
    operands = random_inputs(6, q_len=LENGTH, kv_len=LENGTH)
    sent = {}
    for name in ("window", "causal"):
        attend = functools.partial(attention, mask=MASKS[name].bind(LENGTH, block_size=BLOCK), axis_name="sequence")
        mapped = jax.shard_map(attend, mesh=mesh_of(sequence=4), in_specs=split, out_specs=split)
        sent[name] = set(collectives(jax.jit(both(mapped)).lower(*operands).compile()))
    assert sent == {"window": {"collective-permute"}, "causal": {"all-gather", "all-to-all"}}


def test_refusals():
    operands = random_inputs(7, q_len=LENGTH, kv_len=LENGTH)
    mask = WINDOW.bind(LENGTH, block_size=BLOCK)

    def run(split, **options):
        attend = functools.partial(sparse_attention, axis_name="sequence", **options)
        mapped = jax.shard_map(attend, mesh=mesh_of(sequence=8), in_specs=split, out_specs=split, check_vma=False)
        mapped(*operands)

    with pytest.raises(ValueError, match=r"whole blocks of the mask, got 64 queries and 64 keys per device for blocks"):
        run(P(None, "sequence"), mask=CausalMask())  # blocks of 128
    with pytest.raises(UnsupportedError, match="axis_name needs a native kernel"):
        run(P(None, "sequence"), mask=mask, implementation="xla")
    with pytest.raises(ValueError, match=r"mask is a BlockMask for q_len=512, kv_len=512, but the call has q_len=4096"):
        run(P(), mask=mask)
