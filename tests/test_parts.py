"""A backward in parts: the gradients of one call, whatever is given, mapped or sharded, in bounded memory."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_bsk
from jax_bsk import sparse_attention
from jax_bsk.attention import ffi, parts
from jax_bsk.biases import AlibiBias, TileBias
from jax_bsk.masks import BlockMask, CausalMask, LocalMask
from jax_bsk.qa.testing import battery
from jax_bsk.qa.testing.cases import Case
from tests.util import assert_close, collectives, random_inputs, text_of

LENGTH, BLOCK = 512, 64
CAUSAL = CausalMask().bind(LENGTH, block_size=BLOCK)
BOUND = ffi.backward_dlogits(1, 20, (BLOCK, BLOCK))  # of 20 entries: rows of 8 blocks that begin within 13 of them


@pytest.fixture
def divisions(monkeypatch) -> list[parts.Division]:
    """How the calls of a test are divided, with a bound for the CPU."""
    found: list[parts.Division] = []

    def run(bind: Any, dims: Any, cut: parts.Division, operands: Any) -> Any:
        found.append(cut)
        return original(bind, dims, cut, operands)

    original = parts.run
    monkeypatch.setattr(parts, "run", run)
    monkeypatch.setitem(parts.BOUNDS, "cpu", BOUND)
    return found


def gradients(function: Any, *operands: Any) -> Any:
    """Gradients of the differentiable operands; compiled anew, as the bound may be another one."""
    numbers = [i for i, x in enumerate(operands) if not isinstance(x, BlockMask)]
    return jax.jit(jax.grad(lambda *x: jnp.sin(function(*x)).sum(), numbers))(*operands)


def attention(query: Any, key: Any, value: Any, mask: Any = CAUSAL, **options: Any) -> jax.Array:
    return sparse_attention(query, key, value, mask=mask, implementation="cpu", **options)


def inputs(heads: int = 4, kv_heads: int = 2, batch: int = 2) -> tuple[jax.Array, ...]:
    sizes = {"q_len": LENGTH, "kv_len": LENGTH, "head_dim": 16, "value_dim": 16}
    return random_inputs(0, batch, heads=heads, kv_heads=kv_heads, **sizes)


# ---- how many parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "calls"),
    [(32_768, 32, 32, 1), (32_768, 32, 4, 4), (131_072, 4, 4, 7), (131_072, 32, 4, 56), (262_144, 32, 32, 25)],
)
def test_causal_attention_is_within_the_bound(length, heads, kv_heads, calls):
    blocks, group, bound = length // 128, heads // kv_heads, parts.BOUNDS["cuda"]
    capacity = blocks * (blocks + 1) // 2
    cut = parts.division(bound, group, (blocks, blocks), capacity, (128, 128))
    cut = cut or parts.Division(group, 1, capacity, capacity)
    assert cut.parts * group // cut.members == calls
    query, key = ((1, length, n, 0) for n in (kv_heads * cut.members, kv_heads))
    # Beside dS there are numbers per row and per entry.
    assert ffi.backward_workspace(query, key, (1, 1, cut.capacity), (128, 128)) < bound + 2**27
    assert parts.division(bound, cut.members, (blocks, blocks), cut.capacity, (128, 128)) is None


def test_the_program_for_a_gpu_has_one_call_and_its_memory():
    length, mask = 131_072, CausalMask().bind(131_072, block_size=128)
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (32, 4, 4, 32)]

    def backward(query: Any, key: Any, value: Any, dout: Any) -> Any:
        return jax.vjp(lambda *x: sparse_attention(*x, mask=mask), query, key, value)[1](dout)

    exported = jax.export.export(jax.jit(backward), platforms=["cuda"], disabled_checks=jax_bsk.export_checks())(
        *shapes
    )
    text = exported.mlir_module()
    assert text.count(f"stablehlo.custom_call @{ffi.ATTENTION_BACKWARD}(") == 1
    (workspace,) = re.findall(r"tensor<(\d+)xui8>", text)
    assert int(workspace) < parts.BOUNDS["cuda"] + 2**24


@pytest.mark.parametrize("capacity", [1, 9, 36, 64, 100])
@pytest.mark.parametrize("bound", [1, BOUND // 2, 3 * BOUND])
def test_each_row_is_in_one_part(capacity, bound):
    cut = parts.division(bound, 2, (8, 8), capacity, (BLOCK, BLOCK))
    if cut is None:
        assert ffi.backward_dlogits(2, capacity, (BLOCK, BLOCK)) <= bound
        return
    longest = min(max(8, -(-capacity // 8)), capacity)
    assert cut.parts * cut.step >= capacity
    assert cut.capacity == capacity if cut.parts == 1 else cut.step + longest - 1 <= cut.capacity


def test_a_call_within_the_bound_is_the_same_program(monkeypatch):
    def text(bound: int | None) -> str:
        with monkeypatch.context() as patch:
            if bound is not None:
                patch.setitem(parts.BOUNDS, "cpu", bound)
            return jax.jit(jax.grad(lambda *x: attention(*x).sum(), (0, 1, 2))).lower(*inputs()).as_text()

    enough = ffi.backward_dlogits(2, 36, (BLOCK, BLOCK))
    assert text(None) == text(enough) != text(enough - 1)


# ---- what they give ---------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"q_len": 420, "kv_len": 333, "block_q": 64, "block_kv": 64, "head_size": 32, "value_size": 32}
CASES = {
    "causal": {"pattern": "causal", "kv_len": 420},
    "half precision": {"dtype": "bfloat16", "heads": 8, "kv_heads": 2, "lengths": True, "pattern": "full"},
    "gates": {"gates": True, "mask_per_head": True, "sinks": True, "heads": 4, "kv_heads": 2},
    "biases": {"bias": True, "distances": True, "tiles": True, "dropout": 26, "heads": 2, "kv_heads": 1},
    "lists of examples": {
        "mask_per_batch": True,
        "batch": 2,
        "heads": 4,
        "kv_heads": 1,
        "soft_cap": 5.0,
        "gates": True,
    },
}


@pytest.mark.parametrize("traced", [False, True], ids=["host", "traced"])
@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_those_of_float64(name, traced, divisions):
    case = Case(name, **{**SIZES, "density": 0.5, **CASES[name]})
    call = battery.from_public("cpu")
    with jax.numpy_dtype_promotion("standard"):
        battery.run_case(case, lambda *args, **options: call(*args, **options), traced_mask=traced)
    (cut,) = set(divisions)
    assert cut.parts > 1


def everything(query: Any, key: Any, value: Any, gates: Any, slopes: Any, tiles: Any, mask: BlockMask) -> jax.Array:
    numbers = jnp.arange(mask.capacity) % 3 - 1
    bias = AlibiBias(slopes) + TileBias(tiles, numbers)
    more: dict[str, Any] = {"dropout_rate": 0.1, "dropout_rng": jax.random.key(3)}
    return attention(query, key, value, mask, gates=gates, bias=bias, **more)


def operands_of_everything(mask: BlockMask, batch: int = 2, heads: int = 4) -> tuple[jax.Array, ...]:
    gates, tiles = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(batch, heads, mask.capacity), (1, heads, 2, BLOCK, BLOCK)])
    )
    return *inputs(heads, batch=batch), gates, jnp.linspace(0.1, 0.4, heads), tiles


@pytest.mark.parametrize("bound", [BOUND, 2 * BOUND, 1])
def test_of_queries_they_are_those_of_one_call(bound, divisions, monkeypatch):
    operands = *operands_of_everything(CAUSAL), CAUSAL
    monkeypatch.setitem(parts.BOUNDS, "cpu", bound)
    found = gradients(everything, *operands)
    assert {(cut.members, cut.parts > 1) for cut in divisions} == {(1, bound != 2 * BOUND)}
    monkeypatch.delitem(parts.BOUNDS, "cpu")
    expected = gradients(everything, *operands)
    for i in (0, 3, 4, 5):  # query, gates and the bias
        np.testing.assert_array_equal(found[i], expected[i])
    assert_close(found, expected)


def test_under_vmap_and_remat(divisions, monkeypatch):
    window = CausalMask() & LocalMask((100, 0))
    masks = [m.bind(LENGTH, block_size=BLOCK).padded(max_blocks=40, max_tiles=4) for m in (window, CausalMask())]
    operands = [jnp.stack([x, x + 0.5]) for x in operands_of_everything(masks[0], batch=1)]
    lists = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *masks)
    mapped = jax.vmap(jax.checkpoint(everything))
    found = gradients(mapped, *operands, lists)
    assert divisions[0].parts > 1
    monkeypatch.delitem(parts.BOUNDS, "cpu")
    assert_close(found, gradients(mapped, *operands, lists))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_batch_and_heads_split_without_collectives(axis_type, divisions):
    """And with the same bits as on one device, whose parts are the same."""
    operands = operands_of_everything(CAUSAL)[:4]

    def step(*x: jax.Array) -> Any:
        return jax.grad(lambda *x: jnp.sin(attention(*x[:3], gates=x[3])).sum(), (0, 1, 2, 3))(*x)

    one = jax.jit(step)(*operands)
    mesh = jax.make_mesh((2, 2), ("data", "model"), devices=jax.devices()[:4], axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        specs = [P("data", None, "model")] * 3 + [P("data", "model")]
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(operands, specs, strict=True)]
        compiled = jax.jit(step).lower(*sharded).compile()
        found = compiled(*sharded)
    assert collectives(compiled) == []
    assert " while(" in text_of(compiled)
    assert len(set(divisions)) == 1
    for a, b in zip(found, one, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("manual", [False, True], ids=["jit", "shard_map"])
@pytest.mark.parametrize("traced", [False, True], ids=["host", "traced"])
def test_a_sharded_sequence(manual, traced, divisions, monkeypatch):
    monkeypatch.setitem(parts.BOUNDS, "cpu", 1)
    mesh = jax.make_mesh((2,), ("sequence",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    spec = P(None, "sequence")
    operands = inputs(batch=1)
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in operands]

    def function(*x: Any) -> jax.Array:
        if not manual:
            return attention(*x)
        mask = x[3] if traced else CAUSAL
        local = lambda q, k, v: attention(q, k, v, mask, axis_name="sequence")  # noqa: E731
        return jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)(*x[:3])

    lists = (CAUSAL,) if traced else ()
    found = gradients(function, *sharded, *lists)
    assert divisions[0].parts > 1
    assert_close(found, gradients(lambda *x: attention(*x[:3]), *operands))


@pytest.mark.parametrize(
    ("changes", "rows"),
    [({8: 41}, [7]), ({3: 2}, [2, 3]), ({0: -1}, [0])],
    ids=["overflowing", "decreasing", "negative"],
)
def test_lists_that_cannot_be_read_make_nan_of_their_rows_alone(changes, rows, divisions):
    offsets = np.array(CAUSAL.row_offsets)
    offsets[..., list(changes)] = list(changes.values())
    key, value = inputs(batch=1)[1:]

    def loss(query: jax.Array, offsets: jax.Array) -> jax.Array:
        return attention(query, key, value, CAUSAL._with_arrays(row_offsets=offsets)).sum()

    found = jax.jit(jax.grad(loss))(inputs(batch=1)[0], jnp.asarray(offsets))
    bad = np.isnan(np.asarray(found)).reshape(8, -1)
    assert np.flatnonzero(bad.all(1)).tolist() == np.flatnonzero(bad.any(1)).tolist() == rows
    assert divisions[0].parts > 1
