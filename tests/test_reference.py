"""The pure-JAX implementation: values, every derivative, linear memory, work by the block, isolation of bad values.

`test_numerics` runs the common battery over it; here is what it alone promises.
"""

from __future__ import annotations

import dataclasses
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jax_bsk.attention import schedule
from jax_bsk.attention.xla import sparse_attention_xla
from jax_bsk.masks import BlockMask, CausalMask
from jax_bsk.qa.testing.cases import Case, list_blocks, make_inputs
from jax_bsk.qa.testing.oracle import attention_oracle
from jax_bsk.qa.testing.tolerance import dense_attention
from tests.util import collectives, text_of

BASE = Case("base", 2, 70, 100, 4, 2, 8, 6, "float64", 32, 32, density=0.5)
CASES = {
    "shared": BASE,
    "everything": dataclasses.replace(
        BASE, lengths=True, soft_cap=2.0, sinks=True, gates=True, bias=True, pattern="empty_row"
    ),
    "per-head": dataclasses.replace(BASE, mask_per_head=True, bias=True),
    "per-batch-mqa": dataclasses.replace(BASE, kv_heads=1, mask_per_batch=True, lengths=True, sinks=True),
    "per-both": dataclasses.replace(BASE, mask_per_batch=True, mask_per_head=True, bias=True, sinks=True, gates=True),
}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def functions(case, mask=None):
    """(sparse, dense, operands): two functions of the dict of operands, each returning (out, lse)."""
    inputs = make_inputs(case)
    names = "query", "key", "value", "bias", "sinks", "gates"
    operands = {name: jnp.asarray(x) for name, x in zip(names, inputs.operands, strict=False) if x is not None}
    rest = {"lengths": inputs.lengths, "scale": inputs.scale, "soft_cap": inputs.soft_cap}

    def sparse(operands, mask=inputs.mask if mask is None else mask):
        q, k, v, bias, sinks, gates = (operands.get(name) for name in names)
        return sparse_attention_xla(q, k, v, mask, bias=bias, sinks=sinks, gates=gates, **rest)

    def dense(operands):
        q, k, v, bias, sinks, gates = (operands.get(name) for name in names)
        extra = {"bias": bias, "sinks": sinks, "gates": gates, "entries": inputs.entries, **rest}
        return dense_attention(q, k, v, jnp.asarray(inputs.dense), **extra)

    return sparse, dense, operands, inputs


def loss(attention, inputs):
    def of(operands):
        out, lse = attention(operands)
        finite = jnp.where(jnp.isneginf(lse), 0, lse)
        return (jnp.sin(out) * inputs.dout).sum() + (finite**2 * inputs.dlse).sum(), (out, lse)

    return of


def assert_same(actual, expected, atol=1e-10):
    leaves = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in leaves:
        np.testing.assert_allclose(a, e, atol=atol, rtol=1e-9, err_msg=jax.tree_util.keystr(path))


# ---- values and derivatives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, x64):
    sparse, dense, operands, inputs = functions(CASES[name])
    expected = jax.jit(jax.grad(loss(dense, inputs), has_aux=True))(operands)
    assert_same(jax.jit(jax.grad(loss(sparse, inputs), has_aux=True))(operands), expected)
    traced = jax.jit(lambda o, mask: jax.grad(loss(lambda o: sparse(o, mask), inputs), has_aux=True)(o))
    assert_same(traced(operands, jax.tree.map(jnp.asarray, inputs.mask)), expected)


@pytest.mark.parametrize("slack", [0, 100], ids=["entry-after-entry", "aligned"])
def test_values_and_gradients_of_loops(slack, x64, monkeypatch):
    """Known lists of these sizes are computed in one step: here they are walked over as long ones are."""
    sparse, dense, operands, inputs = functions(CASES["per-both"])
    monkeypatch.setattr(schedule, "FEW_ENTRIES", 0)
    monkeypatch.setattr(schedule, "is_even", lambda padded, used: bool(slack))
    known = schedule.known_schedule(inputs.mask, (2, 2), 100)
    assert known is not None
    assert (known.rows is None) == bool(slack)
    assert known.cols.shape[-3] > 1
    expected = jax.jit(jax.grad(loss(dense, inputs), has_aux=True))(operands)
    assert_same(jax.jit(jax.grad(loss(sparse, inputs), has_aux=True))(operands), expected)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_schedules_visit_the_lists(density, monkeypatch):
    """Every entry once, in the order of its row, whatever the order of rows."""
    mask = block_grid(1024, density)
    row = np.repeat(np.arange(mask.nq), np.diff(mask.row_offsets[0, 0]))
    wanted = np.stack([row, mask.kv_blocks[0, 0], mask.tiles[0, 0], np.arange(row.size)], 1)
    lists = schedule.Lists(*(jnp.asarray(x)[:, :, None] for x in (mask.row_offsets, mask.kv_blocks, mask.tiles)))
    traced = jax.jit(lambda lists: schedule.schedule(lists, mask.nk, mask.bit_tiles.shape[2]))
    computed, used, invalid = traced(lists)
    assert int(used[0, 0, 0]) == row.size
    assert not invalid.any()
    schedules = [computed]
    for few in (0, 10**6):
        monkeypatch.setattr(schedule, "FEW_ENTRIES", few)
        known = schedule.known_schedule(mask, (1, 1), 1024)
        assert known is not None
        schedules.append(known)
    for found in schedules:
        steps, chunk, width = found.cols.shape[3:]
        rows = np.arange(chunk)[None].repeat(steps, 0) if found.rows is None else found.rows[0, 0, 0]
        rows = np.broadcast_to(rows[..., None], (steps, chunk, width))
        visits = np.stack([rows, *(x[0, 0, 0] for x in found[1:])], -1).reshape(-1, 4)
        visits = visits[visits[:, 2] != schedule.NOTHING]
        np.testing.assert_array_equal(visits[np.argsort(visits[:, 3])], wanted)
        assert (np.diff(rows.reshape(steps, -1), axis=1) >= 0).all()


@pytest.mark.parametrize("name", ["everything", "per-head"])
def test_second_order(name, x64):
    """Hessian-vector products: forward over reverse, of every operand along a random direction."""
    sparse, dense, operands, inputs = functions(CASES[name])
    rng = np.random.default_rng(0)
    along = {key: jnp.asarray(rng.standard_normal(x.shape)) for key, x in operands.items()}

    def gradient(attention):
        return jax.grad(lambda o: loss(attention, inputs)(o)[0])

    def product(attention):
        return jax.jit(lambda o: jax.jvp(gradient(attention), (o,), (along,)))(operands)

    assert_same(product(sparse), product(dense), atol=1e-8)


def test_finite_differences(x64):
    case = dataclasses.replace(CASES["everything"], batch=1, q_len=33, kv_len=40, heads=2, kv_heads=1, head_size=3)
    sparse, _, operands, inputs = functions(case)
    check_grads(
        jax.jit(lambda o: loss(sparse, inputs)(o)[0]), (operands,), order=1, modes=("fwd", "rev"), atol=1e-4, rtol=1e-4
    )


def test_vmap_over_each_argument(x64):
    sparse, _, operands, inputs = functions(CASES["everything"])
    masks = [inputs.mask, list_blocks(~inputs.dense, 32, 32, visit_also=np.ones((3, 4), bool))]
    # Equal shapes for stacking: the capacity and the number of tiles of the larger one.
    capacity, tiles = (max(x.shape[-1] for x in (m.kv_blocks for m in masks)), max(m.bit_tiles.shape[2] for m in masks))

    def padded(m):
        def pad(x):
            return np.pad(x, [(0, 0), (0, 0), (0, capacity - x.shape[-1])], constant_values=-1)

        bits = np.pad(m.bit_tiles, [(0, 0), (0, 0), (0, tiles - m.bit_tiles.shape[2]), (0, 0), (0, 0)])
        return dataclasses.replace(m, kv_blocks=pad(m.kv_blocks), tiles=pad(m.tiles), bit_tiles=bits)

    masks = [padded(m) for m in masks]
    call = jax.jit(lambda o, m: sparse(o, m))
    for name, x in operands.items():
        stack = jnp.stack([x, 2 * x])
        got = jax.jit(jax.vmap(lambda x, name=name: sparse({**operands, name: x}, masks[0])))(stack)
        expected = [call({**operands, name: one}, masks[0]) for one in stack]
        assert_same(got, jax.tree.map(lambda *x: jnp.stack(x), *expected))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *masks)
    got = jax.jit(jax.vmap(call, in_axes=(None, 0)))(operands, stacked)
    assert_same(got, jax.tree.map(lambda *x: jnp.stack(x), *[call(operands, m) for m in masks]))


@pytest.mark.parametrize("axis", range(4))
def test_zero_sizes(axis):
    sizes = [2, 40, 50, 2]  # batch, q_len, kv_len, heads
    sizes[axis] = 0
    batch, q_len, kv_len, heads = sizes
    q, k = jnp.ones((batch, q_len, heads, 8)), jnp.ones((batch, kv_len, heads, 8))
    mask = list_blocks(np.ones((1, 1, q_len, kv_len), bool), 32, 32)
    extra = {"bias": None, "lengths": None, "sinks": None, "scale": 1.0, "soft_cap": None}
    out, lse = sparse_attention_xla(q, k, k, mask, **extra)
    assert out.shape == q.shape
    assert lse.shape == (batch, heads, q_len)
    assert not out.any()


# ---- memory and work ----------------------------------------------------------------------------------------------


def block_grid(length, density, seed=0) -> BlockMask:
    """Whole blocks of 64 at random, at least the diagonal."""
    n = length // 64
    blocks = np.random.default_rng(seed).random((n, n)) < density
    blocks |= np.eye(n, dtype=bool)
    return list_blocks(blocks.repeat(64, 0).repeat(64, 1)[None, None], 64, 64)


def gradient_of(mask):
    def run(q, k, v):
        extra = {"bias": None, "lengths": None, "sinks": None, "scale": 0.1, "soft_cap": None}
        return (sparse_attention_xla(q, k, v, mask, **extra)[0] ** 2).sum()

    return run, jax.value_and_grad(run, (0, 1, 2))


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("backward", [False, True])
def test_memory_is_linear(density, backward):
    """Four times the length, four times the temporary memory, however many of the blocks are visited."""
    sizes = []
    for length in (512, 2048):
        x = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
        compiled = jax.jit(gradient_of(block_grid(length, density))[backward]).lower(x, x, x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        sizes.append(memory.temp_size_in_bytes)
    assert sizes[1] < 5 * sizes[0], sizes


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_steps_follow_the_entries(density):
    mask = block_grid(1024, density)
    x = jax.ShapeDtypeStruct((1, 1024, 2, 32), jnp.float32)
    traced = jax.jit(gradient_of(mask)[0]).trace(x, x, x).jaxpr.jaxpr
    (attention,) = (eqn.params["jaxpr"].jaxpr for eqn in traced.eqns if eqn.params.get("name") == "_attention")
    lengths = [eqn.params["length"] for eqn in attention.eqns if eqn.primitive.name == "scan"]
    steps = -(-int(mask.row_offsets.max()) // 16)  # 16 rows of blocks: as many entries a step
    assert lengths == [steps, steps], "one walk for the maxima, one for the sums"


@pytest.mark.parametrize(("backward", "kernels"), [(False, 25), (True, 50)])
def test_few_entries_compile_to_few_kernels(backward, kernels):
    """Half of what a loop over entries takes, which took a second to compile; known lists leave no search or sort."""
    x = jax.ShapeDtypeStruct((1, 256, 4, 32), jnp.float32)
    mask = BlockMask.from_mask(CausalMask(), 256)
    lowered = jax.jit(gradient_of(mask)[backward]).lower(x, x, x)
    assert not re.search(r"stablehlo\.(while|sort)", lowered.as_text())
    assert len(re.findall(r" fusion\(", text_of(lowered.compile()))) <= kernels


def test_padding_of_traced_lists_is_skipped():
    """A list with room for every block takes time by its entries: here 1/16 of them, asked to be under 1/3."""
    full, sparse = (block_grid(2048, density) for density in (1.0, 0.03))
    room = full.kv_blocks.shape[-1]

    def pad(x):
        return np.pad(x, [(0, 0), (0, 0), (0, room - x.shape[-1])], constant_values=-1)

    sparse = dataclasses.replace(sparse, kv_blocks=pad(sparse.kv_blocks), tiles=pad(sparse.tiles))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2048, 2, 64)), jnp.float32)
    run = jax.jit(lambda mask: gradient_of(mask)[0](x, x, x))

    def seconds(mask):
        mask = jax.tree.map(jnp.asarray, mask)
        jax.block_until_ready(run(mask))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(run(mask))
            times.append(time.perf_counter() - start)
        return min(times)

    few, all_of_them = seconds(sparse), seconds(full)
    assert few < all_of_them / 3, (few, all_of_them)


# ---- bad values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "bad"), [("query", np.nan), ("key", np.nan), ("value", np.nan), ("value", np.inf)])
def test_flaws_reach_only_what_attends(where, bad, x64):
    case = dataclasses.replace(BASE, heads=2, lengths=True, pattern="random", density=0.9)
    sparse, _, operands, inputs = functions(case)
    operands[where] = operands[where].at[0, 37, 1, 2].set(bad)
    assert inputs.lengths is not None
    dense = inputs.dense[0, 0] & (np.arange(70) < inputs.lengths[0, 0])[:, None]
    dense = dense & (np.arange(100) < inputs.lengths[0, 1])
    rows = np.zeros(70, bool)
    rows[37] = where == "query" and dense[37].any()
    if where != "query":
        rows = dense[:, 37]
    keys = dense[rows].any(0)  # their gradients have a NaN row in them
    out, _ = jax.jit(sparse)(operands)
    grads = jax.jit(jax.grad(lambda o: (sparse(o)[0] * inputs.dout).sum()))(operands)

    def flawed(x):
        return np.isnan(x[0, :, 1]).any(-1)

    np.testing.assert_array_equal(flawed(out), rows)
    np.testing.assert_array_equal(flawed(grads["query"]), rows)
    np.testing.assert_array_equal(flawed(grads["key"]), keys)
    assert not (flawed(grads["value"]) & ~keys).any()
    for x in (out, *grads.values()):  # the other head and the other example
        assert np.isfinite(x[0, :, 0]).all()
        assert np.isfinite(x[1]).all()


def broken(mask: BlockMask, fault: str) -> tuple[BlockMask, set[int]]:
    """``mask`` with a fault, and the rows of blocks that must be NaN."""
    offsets, ids, tiles = (np.array(x) for x in (mask.row_offsets, mask.kv_blocks, mask.tiles))
    second = offsets[0, 0, 1]  # first entry of row 1
    match fault:
        case "id past the end":
            ids[..., second] = 4
        case "negative id":
            ids[..., second] = -1
        case "huge id":
            ids[..., second] = 2**31 - 1
        case "tile past the end":
            tiles[..., second] = mask.bit_tiles.shape[2]
        case "negative tile":
            tiles[..., second] = -2
        case "overflow":
            offsets[..., -1] = ids.shape[-1] + 1
            return dataclasses.replace(mask, row_offsets=offsets), {offsets.shape[-1] - 2}
        case "negative offset":
            offsets[..., 0] = -1
            return dataclasses.replace(mask, row_offsets=offsets), {0}
        case "decreasing offsets":
            offsets[..., 2] = 0
            return dataclasses.replace(mask, row_offsets=offsets), {1, 2}
    return dataclasses.replace(mask, kv_blocks=ids, tiles=tiles), {1}


FAULTS = (
    "id past the end",
    "negative id",
    "huge id",
    "tile past the end",
    "negative tile",
    "overflow",
    "negative offset",
    "decreasing offsets",
)


# Lists that are known when traced are trimmed first, which looks at the offsets.
@pytest.mark.parametrize(("fault", "traced"), [(fault, True) for fault in FAULTS] + [("overflow", False)])
def test_invalid_lists_poison_their_rows(fault, traced):
    case = dataclasses.replace(BASE, dtype="float32", pattern="causal", kv_len=128)
    sparse, _, operands, inputs = functions(case)
    mask, rows = broken(list_blocks(inputs.dense, 32, 32), fault)
    poisoned = np.isin(np.arange(70) // 32, list(rows))
    wanted, wanted_lse = sparse(operands)

    def run(operands, mask):
        def out_and_lse(query):
            return sparse({**operands, "query": query}, mask)

        (out, lse), pullback = jax.vjp(out_and_lse, operands["query"])
        return out, lse, pullback((jnp.asarray(inputs.dout), jnp.zeros_like(lse)))[0]

    out, lse, dq = jax.jit(run)(operands, jax.tree.map(jnp.asarray, mask)) if traced else run(operands, mask)
    assert np.isnan(out[:, poisoned]).all()
    assert np.isnan(lse[..., poisoned]).all()
    assert np.isnan(dq[:, poisoned]).all()
    if fault == "decreasing offsets":  # row 2 now starts at entry 0: other entries than intended, but a valid list
        return
    np.testing.assert_allclose(out[:, ~poisoned], wanted[:, ~poisoned], atol=1e-6)
    np.testing.assert_allclose(lse[..., ~poisoned], wanted_lse[..., ~poisoned], atol=1e-6)
    assert np.isfinite(dq[:, ~poisoned]).all()


# ---- sharding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch", "heads"])
def test_no_collective_when_sharded(name):
    """Forward and backward of a shared host mask: GSPMD keeps batch and heads where they are."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P("d") if name == "batch" else P(None, None, "d"))
    q, k, v = (jax.device_put(np.random.default_rng(i).standard_normal((8, 128, 8, 16)), sharding) for i in range(3))
    _, gradient = gradient_of(block_grid(128, 0.5))
    compiled = jax.jit(lambda q, k, v: gradient(q, k, v)[1]).lower(q, k, v).compile()
    assert collectives(compiled) == []


def test_agrees_with_the_oracle_on_flaws():
    """The battery has no NaN in its inputs; the oracle's own pattern of NaN is held here."""
    case = dataclasses.replace(BASE, dtype="float32")
    sparse, _, operands, inputs = functions(case)
    operands["value"] = operands["value"].at[1, 5, 0, 0].set(np.nan)
    out, _ = sparse(operands)
    expected = attention_oracle(
        operands["query"], operands["key"], operands["value"], inputs.dense, scale=inputs.scale
    ).values["out"]
    np.testing.assert_array_equal(np.isnan(out).any(-1), np.isnan(expected).any(-1))
