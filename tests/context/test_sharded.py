"""`sparse_attention` whose sequence is sharded over host devices: values, bits, and what its compiled program sends."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import BlockMask, context, sparse_attention
from jax_bsk.context.visits import Visits
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, MultiHeadMask, SegmentMask
from jax_bsk.qa.testing import battery, cases
from tests.util import assert_close, collectives, loss_of, random_inputs

LENGTH, BLOCK = 512, 32
DOCUMENTS = SegmentMask(np.arange(LENGTH) // 64)
WINDOW = CausalMask() & LocalMask((64, 0))
attention = functools.partial(sparse_attention, implementation="cpu")


def mesh_of(sizes: dict[str, int], axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count], axis_types=(axis_type,) * len(sizes)
    )


def both(attend: Any) -> Any:
    """Output and gradients of a cotangent that is the output's cosine."""

    def run(*operands):
        out, pullback = jax.vjp(attend, *operands)
        return out, *pullback(jnp.cos(out))

    return run


def inputs(seed: int = 0, **options: Any) -> tuple[jax.Array, ...]:
    return random_inputs(seed, q_len=LENGTH, kv_len=LENGTH, **options)


def run_on(mesh: jax.sharding.Mesh, spec: P | tuple[P, P], function: Any, operands: Any) -> tuple[Any, Any]:
    """The compiled function of operands sharded by `spec` (queries, keys and values), and its results."""
    specs = (spec, spec) if isinstance(spec, P) else spec
    split = [NamedSharding(mesh, specs[min(i, 1)]) for i in range(len(operands))]
    operands = [jax.device_put(x, s) for x, s in zip(operands, split, strict=True)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*operands).compile()
        return compiled, compiled(*operands)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    ("mask", "sent"),
    [
        (WINDOW, {"collective-permute"}),
        (CausalMask() & DOCUMENTS, set()),
        (CausalMask(), {"all-gather", "all-to-all"}),
    ],
    ids=["window", "documents", "causal"],
)
def test_bits_of_one_device_and_what_is_sent(mask, sent, axis_type):
    bound, operands = mask.bind(LENGTH, block_size=BLOCK), inputs()
    run = both(functools.partial(attention, mask=bound))
    expected = jax.jit(run)(*operands)
    compiled, found = run_on(mesh_of({"sequence": 4}, axis_type), P(None, "sequence"), run, operands)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert_close(found[2:], expected[2:])
    assert found[0].sharding.spec[1] == "sequence"
    assert set(collectives(compiled)) == sent


def test_a_window_sends_its_neighbours_blocks_alone():
    """Three blocks of keys and values go forth in each pass, and their gradients back: counted off the program."""
    bound = (CausalMask() & LocalMask((95, 0))).bind(LENGTH, block_size=BLOCK)
    operands = inputs(batch=1, heads=2, kv_heads=2, head_dim=16, value_dim=16)
    run = both(functools.partial(attention, mask=bound))
    compiled, _ = run_on(mesh_of({"sequence": 4}), P(None, "sequence"), run, operands)
    text = compiled.as_text()
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* collective-permute(?:-start)?\(", text)
    assert len(shapes) == 3, "keys and values travel together"
    assert {int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes} == {3 * BLOCK * 2 * (16 + 16)}
    pairs = set(re.findall(r"source_target_pairs=(\{\{.*?\}\})", text))
    assert pairs == {"{{0,1},{1,2},{2,3}}", "{{1,0},{2,1},{3,2}}"}
    described = context.describe(bound, 4, kv_heads=2, head_dim=16, dtype=jnp.float32)
    assert described.received.max() == 2 * 3 * BLOCK * 2 * 16 * 4


def test_rows_of_own_keys_alone_wait_for_no_key():
    """Two calls of the kernel, of which one has no operand that depends on a collective: XLA can run them at once."""
    bound = WINDOW.bind(LENGTH, block_size=BLOCK)
    run = functools.partial(attention, mask=bound)
    compiled, _ = run_on(mesh_of({"sequence": 4}), P(None, "sequence"), run, inputs())
    lines = dict(re.findall(r"^\s*(?:ROOT )?(%[\w.-]+) = (.*?)(?:, metadata=.*)?$", compiled.as_text(), re.MULTILINE))
    calls = [name for name, line in lines.items() if 'custom_call_target="jax_bsk_attention_forward"' in line]

    def waits(name: str) -> bool:
        line = lines.get(name, "").partition("to_apply")[0].partition("calls=")[0]
        return "collective-permute" in line or any(map(waits, re.findall(r"%[\w.-]+", line)))

    assert sorted(map(waits, calls)) == [False, True]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_beside_data_and_heads(kv_heads):
    mask = MultiHeadMask([WINDOW, CausalMask(), CausalMask() & GlobalMask(16), WINDOW]).bind(LENGTH, block_size=BLOCK)
    operands = inputs(1, kv_heads=kv_heads)
    run = both(functools.partial(attention, mask=mask, sinks=jnp.linspace(-1, 1, 4), logits_soft_cap=20.0))
    expected = jax.jit(run)(*operands)
    mesh = mesh_of({"data": 2, "sequence": 2, "model": 2})
    heads = "model" if kv_heads > 1 else None
    _, found = run_on(mesh, (P("data", "sequence", "model"), P("data", "sequence", heads)), run, operands)
    np.testing.assert_array_equal(found[0], expected[0])
    assert_close(found, expected)


def test_a_sequence_over_two_mesh_axes():
    bound, operands = WINDOW.bind(LENGTH, block_size=BLOCK), inputs(2)
    run = both(functools.partial(attention, mask=bound))
    _, found = run_on(mesh_of({"a": 2, "b": 4}), P(None, ("a", "b")), run, operands)
    assert_close(found, jax.jit(run)(*operands))


def test_traced_lists_lengths_gates_and_the_log_sum_exp():
    """The lists are an argument, so all keys are gathered; each device still computes its own rows alone."""
    bound = (CausalMask() & LocalMask((100, 0))).bind(LENGTH, block_size=BLOCK).padded()
    q, k, v = inputs(3)
    rng = np.random.default_rng(0)
    gates = jnp.asarray(rng.normal(size=(2, 4, bound.capacity)), jnp.float32)
    lengths = jnp.array([300, 512]), jnp.array([400, 290])

    def attend(q, k, v, gates, mask):
        return attention(
            q,
            k,
            v,
            mask=mask,
            gates=gates,
            query_seq_lengths=lengths[0],
            key_value_seq_lengths=lengths[1],
            return_residual=True,
        )

    def loss(q, k, v, gates, mask):
        out, lse = attend(q, k, v, gates, mask)
        return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))
    expected = run(q, k, v, gates, bound)
    split = NamedSharding(mesh_of({"sequence": 4}), P(None, "sequence"))
    found = run(*(jax.device_put(x, split) for x in (q, k, v)), gates, bound)
    assert_close(found, expected, 5e-4)
    np.testing.assert_array_equal(found[0][1][0], expected[0][1][0])


def test_gates_of_a_host_mask():
    bound = WINDOW.bind(LENGTH, block_size=BLOCK)
    q, k, v = inputs(4)
    gates = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, bound.capacity)), jnp.float32)
    grad = jax.jit(jax.grad(loss_of(lambda q, k, v, g: attention(q, k, v, mask=bound, gates=g)), (0, 1, 2, 3)))
    split = NamedSharding(mesh_of({"sequence": 4}), P(None, "sequence"))
    assert_close(grad(*(jax.device_put(x, split) for x in (q, k, v)), gates), grad(q, k, v, gates), 5e-5)


def test_vmap_scan_and_remat():
    bound = (CausalMask() & DOCUMENTS).bind(LENGTH, block_size=BLOCK)
    q, k, v = (x[None].repeat(2, 0) for x in inputs(5, batch=1))

    def loss(q, k, v):
        @jax.checkpoint
        def layer(x, _):
            return jax.vmap(lambda x, k, v: attention(x, k, v, mask=bound))(x, k, v)[..., : x.shape[-1]], None

        return (jax.lax.scan(layer, q, length=2)[0] ** 2).sum()

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    split = NamedSharding(mesh_of({"sequence": 4}), P(None, None, "sequence"))
    assert_close(grad(*(jax.device_put(x, split) for x in (q, k, v))), grad(q, k, v), 5e-5)


def test_calls_repeat_bit_for_bit():
    bound = (CausalMask() & (LocalMask((64, 0)) | GlobalMask(16))).bind(LENGTH, block_size=BLOCK)
    split = NamedSharding(mesh_of({"sequence": 8}), P(None, "sequence"))
    operands = [jax.device_put(x, split) for x in inputs(6)]
    run = jax.jit(both(functools.partial(attention, mask=bound)))
    first = run(*operands)
    for _ in range(20):
        for a, b in zip(run(*operands), first, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("q_len", "kv_len"), [(512, 256), (160, 160), (256, 320)])
def test_lengths_that_do_not_divide_into_blocks_or_differ_are_right(q_len, kv_len):
    bound = CausalMask().bind(q_len, kv_len, block_size=BLOCK)
    operands = random_inputs(7, q_len=q_len, kv_len=kv_len)
    run = both(functools.partial(attention, mask=bound))
    _, found = run_on(mesh_of({"sequence": 4}), P(None, "sequence"), run, operands)
    assert_close(found, jax.jit(run)(*operands), 5e-5)


def test_a_planned_mask_of_a_plan():
    plan = context.plan((CausalMask() & DOCUMENTS).bind(LENGTH, block_size=BLOCK), 8)
    operands = [plan.dispatch(x) for x in inputs(8)]
    run = both(functools.partial(attention, mask=plan.mask))
    _, found = run_on(mesh_of({"sequence": 8}), P(None, "sequence"), run, operands)
    assert_close(found, jax.jit(run)(*operands), 5e-5)


def test_lists_that_overflow_give_nan():
    """Rows that found no room are NaN on the device that has them, and no other row is."""

    @jax.jit
    def run(q, k, v, ids):
        mask = BlockMask.from_mask(CausalMask() & SegmentMask(ids), LENGTH, block_size=BLOCK, max_blocks=40)
        return attention(q, k, v, mask=mask)

    operands, ids = inputs(9), jnp.zeros(LENGTH, jnp.int32)
    split = NamedSharding(mesh_of({"sequence": 4}), P(None, "sequence"))
    expected = run(*operands, ids)
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(run(*(jax.device_put(x, split) for x in operands), ids), expected)


def test_a_sequence_left_to_the_compiler_inside_a_shard_map_is_refused():
    """There is no axis to name in a collective there. It gave wrong numbers: each device took its queries for all."""
    bound, operands = WINDOW.bind(LENGTH, block_size=BLOCK), inputs(10)
    mesh = mesh_of({"data": 2, "sequence": 4})
    run = jax.shard_map(
        functools.partial(attention, mask=bound),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    with pytest.raises(Exception, match="Use jit without a shard_map, or make that axis manual, too"):
        run_on(mesh, P("data", "sequence"), run, operands)


@pytest.mark.parametrize("what", ["overflow", "ids"])
def test_host_lists_that_are_not_sound_give_the_same_nan(what):
    if what == "overflow":
        ids, lazy = jnp.zeros(LENGTH, jnp.int32), CausalMask()
        build = jax.jit(lambda i: BlockMask.from_mask(lazy & SegmentMask(i), LENGTH, block_size=BLOCK, max_blocks=40))
    else:
        ids = jnp.sort(jnp.stack([jnp.arange(16), (jnp.arange(16) + 1) % 16], 1), 1).at[3, 1].set(99).at[6, 0].set(-5)
        counts = np.full(16, 2)
        build = jax.jit(lambda i: BlockMask.from_indices(i, counts, q_len=LENGTH, block_size=BLOCK))
    mask = jax.device_get(build(ids))
    assert mask.is_host
    operands, run = inputs(12), jax.jit(lambda *x: attention(*x, mask=mask))
    expected = run(*operands)
    assert np.isnan(expected).any()
    split = NamedSharding(mesh_of({"sequence": 4}), P(None, "sequence"))
    np.testing.assert_array_equal(run(*(jax.device_put(x, split) for x in operands)), expected)
    with pytest.raises(ValueError, match="row"):
        context.plan(mask, 4)


def test_programs_of_two_masks_differ_in_more_than_their_lists():
    """JAX's persistent cache knows a program by its text, and in an eager scan the lists are arguments."""
    for shift in (2, 4):
        near = np.eye(16, dtype=bool) | np.roll(np.eye(16, dtype=bool), shift, 1)
        mask = BlockMask.from_block_mask(near, q_len=LENGTH, block_size=BLOCK)
        text = jax.jit(both(functools.partial(attention, mask=mask))).lower(*inputs(13)).as_text()
        assert text.count(f"dense<{Visits(mask).mark}> : tensor<i32>") == 2, "in the forward and in the backward"


def test_heads_exchanged_for_the_sequence():
    """The guide's recipe: constraints alone make of it all-to-alls, and every device computes whole sequences."""
    bound, operands = CausalMask().bind(LENGTH, block_size=BLOCK), inputs(11)
    mesh = mesh_of({"sequence": 4})
    by_tokens, by_heads = (NamedSharding(mesh, P(*spec)) for spec in ((None, "sequence"), (None, None, "sequence")))

    def attend(*operands):
        out = attention(*(jax.lax.with_sharding_constraint(x, by_heads) for x in operands), mask=bound)
        return jax.lax.with_sharding_constraint(out, by_tokens)

    compiled, found = run_on(mesh, P(None, "sequence"), both(attend), operands)
    assert set(collectives(compiled)) == {"all-to-all"}
    for a, b in zip(found, jax.jit(both(functools.partial(attention, mask=bound)))(*operands), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_cases(random_seed):
    """The numeric battery over 2, 4 or 8 devices; `--cases 400` runs more."""
    if random_seed % 4:
        pytest.skip("every fourth seed")
    shards = (2, 4, 8)[random_seed // 4 % 3]
    case = cases.for_shards(cases.random_case(random_seed, max_len=400), shards)
    command = f"--implementation cpu --max-len 400 --sequence-shards {shards}"
    with jax.numpy_dtype_promotion("standard"):
        sharded = battery.with_sharded_sequence(battery.from_public("cpu"), shards)
        battery.run_case(case, sharded, command=command, traced_mask=random_seed % 8 == 0)
