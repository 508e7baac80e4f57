"""A contiguous cache sharded over its positions, on eight host devices: no gather of the cache, and the same values."""

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

from jax_bsk import decode
from tests.util import assert_close, collectives, operands_of_shard_maps, text_of

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 3, 128, 4, 2, 16
LENGTHS = jnp.array([7, 70, 128])  # in the first, the fifth and the last of eight parts


def inputs(count: int = 1) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [(BATCH, count, HEADS, HEAD_DIM), *[(BATCH, LENGTH, KV_HEADS, HEAD_DIM)] * 2]
    return [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]


def mesh(shape=(8,), names=("sequence",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def sharded(implementation, **options):
    """The program on a mesh of eight, as a function of query, caches and lengths."""
    specs = P(), P(None, "sequence"), P(None, "sequence"), P()

    def attend(q, keys, values, lengths):
        return decode.attention(
            q,
            keys,
            values,
            lengths,
            axis_name="sequence",
            implementation=implementation,
            return_residual=True,
            **options,
        )

    return jax.jit(jax.shard_map(attend, mesh=mesh(), in_specs=specs, out_specs=P()))


TREE = np.random.default_rng(1).random((BATCH, 5, 5)) < 0.6
BLOCKS = np.array([[[0, -1, 9, 0]] * 2, [[8, 0, 3, 8], [1, 2, 99, -7]], [[15, 14, 3, -1], [0, 5, 6, 2]]])
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"soft_cap": 2.0}),
    "several": (20, {"sinks": jnp.array([0.0, 3.0, -np.inf, 1.0])}),
    "one-with-sinks": (1, {"sinks": jnp.array([0.0, np.inf, -np.inf, 1.0])}),
    "window": (3, {"window": 30, "sink_tokens": 20}),
    "tree": (5, {"tree_mask": jnp.asarray(TREE)}),
    "selected": (2, {"key_blocks": jnp.asarray(BLOCKS), "block_size": 8}),
    "not-causal": (4, {"is_causal": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_whole_caches(name, implementation):
    count, options = CASES[name]
    if implementation == "xla" and name in ("several", "tree", "not-causal"):
        pytest.skip("some of them")
    args: Any = *inputs(count), LENGTHS
    expected = decode.attention(*args, implementation=implementation, return_residual=True, **options)
    assert_close(sharded(implementation, **options)(*args), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_the_cache_is_not_gathered(count):
    """What travels are outputs and log-sum-exps of the queries, in one array."""
    args = *inputs(count), LENGTHS
    program = sharded("cpu").lower(*args).compile()
    assert collectives(program) == ["all-gather"]
    shapes = re.findall(r"= \(?(\w+\[[\d,]*\])[^=]* all-gather(?:-start)?\(", text_of(program))
    sizes = [np.prod([int(n) for n in re.findall(r"\[(.*)\]", shape)[0].split(",")]) for shape in shapes]
    assert sizes == [8 * BATCH * count * HEADS * (HEAD_DIM + 1)]
    assert sizes[0] < BATCH * LENGTH * KV_HEADS * HEAD_DIM


def test_no_operand_of_the_shard_map_lacks_elements():
    """XLA of jax 0.11.2 dies of one."""
    found = operands_of_shard_maps(sharded("cpu").lower(*inputs(), LENGTHS))
    assert len(found) > 3
    assert not [one for one in found if "0" in one.split("x")]


def test_lengths_that_are_none(implementation):
    for count in (1, 2):
        out, lse = sharded(implementation)(*inputs(count), jnp.array([-1, LENGTH + 1, 0]))
        assert bool(jnp.isnan(out[:2]).all() and jnp.isnan(lse[:2]).all())
        assert bool((out[2] == 0).all() and jnp.isneginf(lse[2]).all())


def test_the_bits_are_the_same_again_and_with_other_examples():
    q, keys, values = inputs()
    program = sharded("cpu")
    first = program(q, keys, values, LENGTHS)
    other = program(q, keys.at[0].set(3), values, LENGTHS.at[2].set(5))
    assert first[0].tobytes() == program(q, keys, values, LENGTHS)[0].tobytes()
    assert first[0][1].tobytes() == other[0][1].tobytes()


def test_steps_on_a_mesh_of_data_sequence_and_heads(implementation):
    """A prompt and tokens one by one, appended to where they belong, beside sharded examples and heads."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, 24, n, HEAD_DIM), np.float32)) for n in (4, 2, 2))
    cache = jnp.full((4, 40, KV_HEADS, HEAD_DIM), jnp.nan).at[:, :16].set(0)

    def step(q, k, v, keys, values, lengths, **options):
        keys, values = decode.append(keys, k, lengths, **options), decode.append(values, v, lengths, **options)
        lengths = lengths + q.shape[1]
        out = decode.attention(q, keys, values, lengths, implementation=implementation, **options)
        return out, keys, values, lengths

    new, old, numbers = P("data", None, "model"), P("data", "sequence", "model"), P("data")
    program = jax.shard_map(
        functools.partial(step, axis_name="sequence"),
        mesh=mesh((2, 2, 2), ("data", "sequence", "model")),
        in_specs=(new, new, new, old, old, numbers),
        out_specs=(new, old, old, numbers),
    )
    program = jax.jit(program, donate_argnums=(3, 4))
    lengths = jnp.array([0, 3, 12, 16])
    plain: Any = cache, cache, lengths
    state: Any = cache.copy(), cache.copy(), lengths
    for begin, end in ((0, 19), (19, 20), (20, 21), (21, 24)):
        tokens = [x[:, begin:end] for x in (q, k, v)]
        out, *state = program(*tokens, *state)
        expected, *plain = step(*tokens, *plain)
        assert_close((out, *state), (expected, *plain))


def test_several_axes_and_unchecked_axes():
    """Positions over two mesh axes, the first the slower; and a shard_map that does not check what varies."""
    args: Any = *inputs(2), LENGTHS
    names = "slow", "fast"
    spec = P(None, names)
    program = jax.shard_map(
        functools.partial(decode.attention, axis_name=names, window=50),
        mesh=mesh((2, 4), names),
        in_specs=(P(), spec, spec, P()),
        out_specs=P(),
        check_vma=False,
    )
    assert_close(jax.jit(program)(*args), decode.attention(*args, window=50))


def test_without_a_name_the_cache_is_gathered():
    """What the guide says of `jit` alone: the same values, and the whole cache travels."""
    q, keys, values = inputs()
    split = NamedSharding(mesh(), P(None, "sequence"))
    args = q, jax.device_put(keys, split), jax.device_put(values, split), LENGTHS
    program = jax.jit(functools.partial(decode.attention, implementation="cpu")).lower(*args).compile()
    assert set(collectives(program)) == {"all-gather"}
    assert_close(program(*args), decode.attention(q, keys, values, LENGTHS, implementation="cpu"))


def test_it_has_no_meaning_outside_of_a_shard_map():
    q, keys, values = inputs()
    with pytest.raises(ValueError, match="axis_name names mesh axes of a shard_map around the call, got 'sequence'"):
        decode.attention(q, keys, values, LENGTHS, axis_name="sequence")
    with pytest.raises(ValueError, match="axis_name names mesh axes"):
        decode.append(keys, keys[:, :1], LENGTHS, axis_name="sequence")
