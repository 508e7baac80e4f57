"""Explicit meshes that only the arrays know: no `jax.set_mesh` around the call, as `jax.make_mesh` leaves it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_bsk
import jax_bsk.masks as m
from jax_bsk import selection
from jax_bsk.core.dispatch import Implementation

B, T, N = 4, 64, 2
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, T, N, 32)).astype(np.float32)


def attend(mask, implementation: Implementation = "cpu"):
    return lambda q, x: jax_bsk.sparse_attention(q, q, q, mask=mask(x), implementation=implementation)


def sparsek(q, scores):
    return jax_bsk.sparsek_attention(q, q, q, scores, top_k=1, window=1, block_size=32)


PADDING = np.arange(T) < np.array([64, 3, 40, 0])[:, None, None, None]
CASES = {
    "segments": (attend(m.SegmentMask), np.sort(RNG.integers(0, 4, (B, T)), -1), P("data")),
    "prefix, xla": (attend(m.PrefixLMMask, "xla"), np.array([3, 9, 40, 0]), P("data")),
    "padding": (attend(lambda x: x), PADDING, P("data")),
    "scores": (
        attend(lambda s: m.BlockMask.from_topk(s, 1, q_len=T, block_size=32, mask=m.CausalMask())),
        RNG.random((B, N, 2, 2)),
        P("data", "model"),
    ),
    "xattention": (
        lambda q, x: jax_bsk.sparse_attention(q, q, q, mask=selection.xattention(q, q, block_size=32)),
        np.zeros(B),
        P("data"),
    ),
    "sparsek": (sparsek, RNG.normal(size=(B, T, N)), P("data", None, "model")),
}


@pytest.mark.parametrize("name", CASES)
def test_the_mesh_is_taken_from_the_arrays(name):
    function, data, spec = CASES[name]
    data = data.astype({"f": np.float32, "i": np.int32, "b": bool}[data.dtype.kind])
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    arguments = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((QUERY, P("data", None, "model")), (data, spec))
    ]

    def step(q, data):
        loss, pull = jax.vjp(lambda q: function(q, data), q)
        return loss, *pull(jnp.cos(loss))

    step = jax.jit(step)
    for got, expected in zip(step(*arguments), step(QUERY, data), strict=True):
        assert got.sharding.spec == P("data", None, "model", None)
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_eagerly():
    """Gates of one device, and a mask built of a sharded array, meet a query on the mesh."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    query = jax.device_put(QUERY, NamedSharding(mesh, P("data", None, "model")))
    function, data, spec = CASES["padding"]
    out = function(query, jax.device_put(data, NamedSharding(mesh, spec)))
    np.testing.assert_allclose(out, function(QUERY, data), atol=1e-5)
    gates = jnp.ones((1, 1, 3), jnp.float32)
    out = jax_bsk.sparse_attention(query, query, query, mask=m.CausalMask().bind(T, block_size=32), gates=gates)
    np.testing.assert_allclose(out, jax_bsk.sparse_attention(QUERY, QUERY, QUERY, is_causal=True), atol=1e-5)
