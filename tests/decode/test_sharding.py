"""Decoding on a mesh of eight host devices: batch and heads split with no collective, and the same values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import decode
from tests.util import assert_close, collectives

TABLE = jnp.array([[2, 0, 3], [1, 5, 4]], jnp.int32)
LENGTHS, OFFSETS, NUMBER = jnp.array([40, 20]), jnp.array([0, 1, 6]), jnp.array([2])


def arrays(kv_heads, heads=8, batch=4):
    rng = np.random.default_rng(0)

    def numbers(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    paged = numbers(8, heads, 16), numbers(6, 16, 2 * kv_heads, 16)
    contiguous = numbers(batch, 2, heads, 16), *(numbers(batch, 48, kv_heads, 16) for _ in range(2))
    return paged, contiguous


def placed(mesh, arrays, specs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]


# Query heads, key/value heads, and how the heads of the cache lie.
HEADS = {"mha": (8, 8, "model"), "gqa": (16, 8, "model"), "mqa": (8, 1, None)}


@pytest.mark.parametrize("pages_read", ["all", "selected", "shared"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_of_pages_split_without_collectives(name, pages_read, implementation):
    heads, kv_heads, axis = HEADS[name]
    if name == "mha" and (implementation == "xla" or pages_read == "shared"):
        pytest.skip("as gqa")
    (q, pages), _ = arrays(kv_heads, heads)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    options = {"sinks": jnp.arange(heads, dtype=jnp.float32)}
    lengths, table = LENGTHS, TABLE
    if pages_read == "shared":
        options["shared_pages"] = jnp.array(3)
        lengths, table = LENGTHS.at[1].set(30), TABLE.at[1, 0].set(TABLE[0, 0])
    if pages_read == "selected":
        options["page_selection"] = jnp.arange(2 * kv_heads * 2, dtype=jnp.int32).reshape(2, kv_heads, 2) % 3
        shardings = {"page_selection": NamedSharding(mesh, P(None, axis))}
    else:
        shardings = {}

    def attend(q, pages, options):
        return decode.ragged_paged_attention(
            q, pages, lengths, table, OFFSETS, NUMBER, implementation=implementation, **options
        )

    placed_options = {n: jax.device_put(x, shardings.get(n, NamedSharding(mesh, P()))) for n, x in options.items()}
    sharded = placed(mesh, (q, pages), (P(None, "model"), P(None, None, axis)))
    program = jax.jit(attend).lower(*sharded, placed_options).compile()
    assert collectives(program) == []
    out = program(*sharded, placed_options)
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 3)
    assert_close(out, attend(q, pages, options))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize(("shape", "kv_heads"), [((2, 4), 4), ((4, 2), 2)], ids=["wide-model", "wide-data"])
def test_batch_and_heads_of_a_contiguous_cache_split_without_collectives(axis_type, shape, kv_heads, implementation):
    _, contiguous = arrays(kv_heads)
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)
    lengths = jnp.array([5, 48, 17, 30])

    def attend(q, keys, values, lengths):
        return decode.attention(q, keys, values, lengths, implementation=implementation)

    spec = P("data", None, "model")
    with jax.set_mesh(mesh):
        sharded = placed(mesh, (*contiguous, lengths), (spec, spec, spec, P("data")))
        program = jax.jit(attend).lower(*sharded).compile()
        out = program(*sharded)
    assert collectives(program) == []
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    query, keys, values = contiguous
    assert_close(out, attend(query, keys, values, lengths))


def test_heads_split_on_an_explicit_mesh_and_in_a_shard_map(implementation):
    (q, pages), _ = arrays(8, 16)
    args, specs = (LENGTHS, TABLE, OFFSETS, NUMBER), (P(None, "model"), P(None, None, "model"))

    def attend(q, pages):
        return decode.ragged_paged_attention(q, pages, *args, implementation=implementation)

    expected = attend(q, pages)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        out = jax.jit(attend)(*placed(mesh, (q, pages), specs))
    assert jax.typeof(out).sharding.spec == P(None, "model", None)
    assert_close(out, expected)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P(None, "model"))
    assert_close(jax.jit(mapped)(q, pages), expected)


def test_heads_that_do_not_split_are_gathered():
    """Three key/value heads on four devices: right, at the price of a collective."""
    (q, pages), _ = arrays(3, 12)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded = placed(mesh, (q, pages), (P(None, "model"), P()))
    args = LENGTHS, TABLE, OFFSETS, NUMBER
    attend = jax.jit(lambda q, pages: decode.ragged_paged_attention(q, pages, *args, implementation="cpu"))
    assert_close(attend(*sharded), attend(q, pages))


def test_appending_splits_without_collectives():
    _, (new, keys, _) = arrays(8)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "model")
    sharded = placed(mesh, (keys, new, jnp.array([0, 3, 46, 47])), (spec, spec, P("data")))
    program = jax.jit(decode.append).lower(*sharded).compile()
    assert collectives(program) == []
    assert_close(program(*sharded), decode.append(keys, new, jnp.array([0, 3, 46, 47])), 0)
