"""Biases and dropout over a sharded sequence: those of one device, whatever of the sequence a device has."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import context, sparse_attention
from jax_bsk.biases import AlibiBias, BlockBias, PositionBias, RelativeBias, TileBias, alibi_slopes
from jax_bsk.context.exchange import Positions, exchange_of
from jax_bsk.context.visits import Visits
from jax_bsk.masks import BlockMask, CausalMask, LocalMask, SegmentMask
from tests.util import assert_close, collectives, random_inputs

BATCH, LENGTH, HEADS, BLOCK = 2, 512, 4, 32
WINDOW = CausalMask() & LocalMask((64, 0))
DROPOUT = {"dropout_rate": 0.2, "dropout_rng": jax.random.key(3)}
SEQUENCE = P("data", "sequence")
attention = functools.partial(sparse_attention, implementation="cpu")


def mesh_of(axis_type: AxisType = AxisType.Auto, **sizes: int) -> jax.sharding.Mesh:
    count = int(np.prod(list(sizes.values())))
    types = (axis_type,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count], axis_types=types)


def inputs(seed: int, **options: Any) -> tuple[jax.Array, ...]:
    return random_inputs(seed, BATCH, **{"q_len": LENGTH, "kv_len": LENGTH, "heads": HEADS, "kv_heads": 2, **options})


def normal(seed: int, *shape: int) -> jax.Array:
    return 0.3 * jax.random.normal(jax.random.key(seed), shape)


def arrays_of(mask: BlockMask, *names: str, q_len: int = LENGTH) -> dict[str, jax.Array]:
    """Arrays of some biases, all of which have gradients."""
    made = {
        "slopes": lambda: jnp.asarray(alibi_slopes(HEADS)),
        "table": lambda: normal(1, 32, HEADS),
        "pairs": lambda: normal(2, 1, HEADS, q_len, mask.kv_len),
        "keys": lambda: normal(3, BATCH, 1, 1, mask.kv_len),
        "queries": lambda: normal(4, 1, HEADS, q_len, 1),
        "blocks": lambda: normal(5, BATCH, HEADS, mask.capacity),
        "tiles": lambda: normal(6, 1, HEADS, 3, BLOCK, BLOCK),
        "of_queries": lambda: normal(7, 1, q_len, HEADS, 2),
        "of_keys": lambda: normal(8, 1, mask.kv_len, 1, 2),
    }
    return {name: made[name]() for name in names}


def bias_of(arrays: dict[str, Any], mask: BlockMask) -> Any:
    parts: list[Any] = [arrays[name] for name in ("pairs", "keys", "queries") if name in arrays]
    if "slopes" in arrays:
        parts.append(AlibiBias(arrays["slopes"]))
    if "table" in arrays:
        parts.append(RelativeBias.t5(arrays["table"], bidirectional=False))
    if "blocks" in arrays:
        parts.append(BlockBias(arrays["blocks"]))
    if "tiles" in arrays:
        parts.append(TileBias(arrays["tiles"], jnp.arange(mask.capacity) % 4 - 1))  # traced numbers
    if "of_queries" in arrays:
        parts.append(PositionBias(arrays["of_queries"], arrays["of_keys"]))
    return functools.reduce(lambda a, b: b + a, parts)  # an array is the right one of a sum


def both(attend: Any) -> Any:
    """Output, log-sum-exp, and gradients of everything."""

    def run(*operands):
        out, pullback = jax.vjp(attend, *operands)
        return *out, *pullback((jnp.cos(out[0]), jnp.sin(out[1])))

    return run


def attend_with(mask: BlockMask, **options: Any) -> Any:
    def attend(q, k, v, arrays, **axis):
        return attention(q, k, v, bias_of(arrays, mask), mask, return_residual=True, **options, **axis)

    return attend


def compare(found: Any, expected: Any, atol: float = 2e-5) -> None:
    """Output, log-sum-exp and the gradient of queries have the bits of one device; the others are close."""
    for one, several in zip(expected[:3], found[:3], strict=True):
        np.testing.assert_array_equal(several, one)
    assert_close(found[3:], expected[3:], atol)


SENT = {"window": {"collective-permute", "all-reduce"}, "causal": {"all-gather", "all-to-all", "all-reduce"}}


@pytest.mark.parametrize(
    ("axis_type", "name", "biases", "dropout"),
    [
        (AxisType.Auto, "window", ["slopes"], {}),
        (AxisType.Explicit, "window", ["table"], DROPOUT),
        (AxisType.Explicit, "causal", ["slopes"], DROPOUT),
        (AxisType.Auto, "causal", ["table", "pairs", "blocks"], {}),
        (AxisType.Auto, "window", ["pairs", "tiles"], {}),
        (AxisType.Auto, "window", ["queries", "of_queries", "of_keys"], {}),
        (AxisType.Explicit, "window", ["keys", "blocks"], {}),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, list) else None,
)
def test_jit(axis_type, name, biases, dropout):
    mask = {"window": WINDOW, "causal": CausalMask()}[name].bind(LENGTH, block_size=BLOCK)
    operands, arrays = inputs(0), arrays_of(mask, *biases)
    run = both(attend_with(mask, **dropout))
    expected = jax.jit(run)(*operands, arrays)
    mesh = mesh_of(axis_type, data=2, sequence=4)
    of_arrays = {"pairs": P(None, None, "sequence"), "queries": P(None, None, "sequence")}  # rows, as the queries
    of_arrays |= dict.fromkeys(["of_queries", "of_keys"], P(None, "sequence"))
    of_arrays |= dict.fromkeys(["keys", "blocks"], P("data"))
    specs = SEQUENCE, SEQUENCE, SEQUENCE, {name: of_arrays.get(name, P()) for name in arrays}
    placed = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), (*operands, arrays), specs)
    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(*placed).compile()
        found = compiled(*placed)
    compare(found, expected)
    assert set(collectives(compiled)) == SENT[name]
    for array in ("pairs", "queries"):
        if array in arrays:
            assert found[-1][array].sharding.spec[2] == "sequence"


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("name", "biases"), [("window", ["slopes", "pairs", "blocks"]), ("causal", ["table", "of_queries", "of_keys"])]
)
def test_shard_map(name, biases, check_vma):
    """A bias array has a device's own queries, and features are those of its own tokens; the others are whole."""
    mask = {"window": WINDOW, "causal": CausalMask()}[name].bind(LENGTH, block_size=BLOCK)
    operands, arrays = inputs(1), arrays_of(mask, *biases)
    attend = attend_with(mask, **DROPOUT)
    split = P(None, "sequence")
    specs = {"pairs": P(None, None, "sequence"), "of_queries": split, "of_keys": split}
    mapped = jax.shard_map(
        functools.partial(attend, axis_name="sequence"),
        mesh=mesh_of(sequence=8),
        in_specs=(split, split, split, {name: specs.get(name, P()) for name in arrays}),
        out_specs=split,
        check_vma=check_vma,
    )
    compare(jax.jit(both(mapped))(*operands, arrays), jax.jit(both(attend))(*operands, arrays))


@pytest.mark.parametrize("shards", [2, 4])
def test_dropped_pairs_are_those_of_one_device(shards):
    """Values that name their keys: a query's outputs are the factors of its pairs."""
    q, k, _ = inputs(2, head_dim=8)
    mask = WINDOW.bind(LENGTH, block_size=BLOCK)
    names = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None, :256], (BATCH, LENGTH, 2, 256))
    attend = functools.partial(attention, 0 * q, k, mask=mask, **DROPOUT)
    split = NamedSharding(mesh_of(sequence=shards), P(None, "sequence"))
    run = jax.jit(lambda x: attend(jax.lax.with_sharding_constraint(x, split)))
    expected, found = attend(names), run(names)
    np.testing.assert_array_equal(found, expected)
    dropped = (np.asarray(expected) == 0) & mask.to_dense().transpose(0, 2, 1, 3)[..., :256]
    assert 0.18 < dropped.sum() / (BATCH * HEADS * mask.to_dense()[..., :256].sum()) < 0.22


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_traced_lists_lengths_and_heads(kv_heads):
    """The lists are an argument, so all keys come; heads and batch split beside the sequence."""
    mask = (CausalMask() & LocalMask((100, 0))).bind(LENGTH, block_size=BLOCK).padded()
    operands, arrays = inputs(3, kv_heads=kv_heads), arrays_of(mask, "slopes", "pairs", "tiles")
    lengths = {"query_seq_lengths": jnp.array([300, 512]), "key_value_seq_lengths": jnp.array([400, 290])}

    def run(q, k, v, arrays, mask):
        def attend(q, k, v, arrays):
            out, lse = attend_with(mask, **DROPOUT, **lengths)(q, k, v, arrays)
            return out, jnp.where(jnp.isfinite(lse), lse, 0)

        return both(attend)(q, k, v, arrays)

    expected = jax.jit(run)(*operands, arrays, mask)
    mesh = mesh_of(data=2, sequence=2, model=2)
    heads = "model" if kv_heads > 1 else None
    specs = [P("data", "sequence", name) for name in ("model", heads, heads)]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]
    compare(jax.jit(run)(*placed, arrays, mask), expected, 5e-5)


def test_more_keys_than_queries_and_lengths_that_do_not_divide():
    for q_len, kv_len in ((256, 320), (160, 160)):
        mask = LocalMask((96, 64)).bind(q_len, kv_len, block_size=BLOCK)
        operands = inputs(4, q_len=q_len, kv_len=kv_len)
        arrays = arrays_of(mask, "table", "queries", q_len=q_len)
        run = both(attend_with(mask, **DROPOUT))
        split = NamedSharding(mesh_of(sequence=4), P(None, "sequence"))
        found = jax.jit(run)(*(jax.device_put(x, split) for x in operands), arrays)
        compare(found, jax.jit(run)(*operands, arrays), 5e-5)


def test_vmap_and_forward_mode():
    """Each mapped example has a bias array of its own. Plain JAX computes tangents, of the rows of all devices."""
    mask = WINDOW.bind(LENGTH, block_size=BLOCK)
    q, k, v = inputs(5, head_dim=8, value_dim=8)
    slopes, pairs = jnp.asarray(alibi_slopes(HEADS)), normal(9, BATCH, HEADS, LENGTH, LENGTH)

    def attend(q, k, v, slopes, pairs, **axis):
        def one(q, k, v, pairs):
            return attention(q, k, v, AlibiBias(slopes) + pairs, mask, **axis)

        return jax.vmap(one)(q, k, v, pairs)

    split = P(None, "sequence")
    mapped = jax.shard_map(
        functools.partial(attend, axis_name="sequence"),
        mesh=mesh_of(sequence=4),
        in_specs=(split, split, split, P(), P(None, None, "sequence")),
        out_specs=split,
    )
    operands = q, k, v, slopes, pairs

    def run(f):
        def gradients(*operands):
            return jax.grad(lambda *x: (f(*x) ** 2).sum(), (0, 1, 3, 4))(*operands)

        tangents = jax.jit(lambda *x: jax.jvp(f, x, x)[1])(*operands)
        return jax.jit(gradients)(*operands), tangents

    assert_close(run(mapped), run(attend), 5e-5)


def test_positions_of_keys():
    """Keys from the first to the last that a shard has or visits, or all: each place has its block where it comes."""
    for lazy in (LocalMask((128, 64)), CausalMask() & SegmentMask(np.arange(4096) // 1024)):
        mask = lazy.bind(4096, block_size=64)
        visits, shards, own = Visits(mask), 4, 16
        for positions in (Positions.RELATIVE, Positions.ABSOLUTE):
            found = exchange_of(visits, shards, positions=positions)
            assert found is not None
            (part,) = found.parts
            width = part.keys.shape[1]
            assert width == (64 if positions is Positions.ABSOLUTE else 19 if found.steps else 16)
            for shard in range(shards):
                first = part.keys[shard, 0]
                np.testing.assert_array_equal(part.keys[shard], np.arange(first, first + width))
                wanted = np.flatnonzero(visits.needs(shards)[shard] | (np.arange(64) // own == shard))
                assert set(wanted) <= set(part.keys[shard])
                slots = np.arange(width)[None] if found.spread is None else found.spread
                came = found.keys[shard][slots[min(shard, len(slots) - 1)][wanted - first]]
                np.testing.assert_array_equal(came, wanted)


def test_a_plan_orders_tokens_and_not_distances():
    """Distances of the plan's order would be wrong, and are refused; tiles of the sequence's are right."""
    mask = CausalMask().bind(LENGTH, block_size=BLOCK)
    plan = context.plan(mask, 4)
    q, k, v = inputs(6)
    table, slopes = normal(1, 32, HEADS), jnp.asarray(alibi_slopes(HEADS))

    def attend(q, k, v, table, in_order=None):
        bias = RelativeBias.t5(table, bidirectional=False, max_distance=100)
        if in_order is None:
            return attention(q, k, v, bias, mask, return_residual=True)
        bias = bias.in_order(in_order.mask, in_order.positions)
        assert bias.tiles.shape[2] == 6  # of keys after the query, of five distances up to 100, and of all far ones
        return attention(q, k, v, bias, in_order.mask, return_residual=True)

    split = NamedSharding(mesh_of(sequence=4), P(None, "sequence"))
    placed = [jax.device_put(plan.dispatch(x), split) for x in (q, k, v)]
    expected = jax.jit(both(attend))(q, k, v, table)
    known = jax.jit(both(functools.partial(attend, in_order=plan)))(*placed, table)
    traced = jax.jit(lambda plan, *x: both(functools.partial(attend, in_order=plan))(*x))(plan, *placed, table)
    for found in (known, traced):
        out, lse, *gradients = found
        found = plan.undispatch(out), plan.undispatch(lse), *map(plan.undispatch, gradients[:3]), gradients[3]
        compare(found, expected)

    # A causal row's biases may all be more by one number.
    of_keys = jnp.outer(slopes, jnp.asarray(plan.positions, jnp.float32))[:, None]
    found = plan.undispatch(attention(*placed, bias=of_keys, mask=plan.mask))
    assert_close(found, attention(q, k, v, AlibiBias(slopes), mask))

    for planned in (plan.mask, plan.mask & LocalMask((100, 0)), jax.device_put(plan.mask), plan.mask.padded()):
        for bias in (AlibiBias(slopes), RelativeBias.t5(table) + jnp.ones(1)):
            with pytest.raises(ValueError, match=r"which are in the order of context\.plan and not in the sequence's"):
                attention(q, k, v, bias, planned)
    with pytest.raises(ValueError, match="positions of the 32 tokens of a block are neighbours in the sequence"):
        RelativeBias.t5(table).in_order(plan.mask, plan.positions[::-1])
    with pytest.raises(ValueError, match="in_order takes a mask of as many queries as keys, in whole blocks"):
        RelativeBias.t5(table).in_order(plan.mask, plan.positions[1:])
