"""packed_attention: each sequence alone by the float64 oracle, with all gradients; transformations; refusals."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_bsk import packed_attention, packing, sparse_attention
from jax_bsk.flax.nnx import SparseSelfAttention
from jax_bsk.masks import (
    CausalMask,
    ChunkedMask,
    FunctionMask,
    GlobalMask,
    LocalMask,
    MultiHeadMask,
    PackedMask,
    PrefixLMMask,
    SegmentMask,
)
from jax_bsk.qa.testing.oracle import attention_oracle
from tests.util import collectives

T, S = 200, 230
# A sequence without keys, one without queries, one with more queries than keys, one the other way, and padding.
Q_NUMBERS = np.array([0, 20, 20, 110, 150, 180], np.int32)
KV_NUMBERS = np.array([0, 0, 30, 70, 200, 221], np.int32)
ALIKE = np.array([0, 70, 70, 75, 190], np.int32)


def arrays(q_len=T, kv_len=S, heads=4, kv_heads=2, head_dim=16, value_dim=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = (q_len, heads, head_dim), (kv_len, kv_heads, head_dim), (kv_len, kv_heads, value_dim), (heads,)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_sequence(query, key, value, sinks, q_numbers, kv_numbers, allowed, bottom_right, dout, dlse, soft_cap=None):
    """Results of each sequence alone: out, lse and gradients, of the packed shapes."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = {"out": np.zeros_like(dout), "lse": np.full(dlse.shape, -np.inf)}
    out |= {"dq": np.zeros_like(query), "dk": np.zeros_like(key), "dv": np.zeros_like(value)}
    if sinks is not None:
        out["dsinks"] = np.zeros(sinks.shape)
    pairs = zip(itertools.pairwise(q_numbers), itertools.pairwise(kv_numbers), strict=True)
    for n, ((a, b), (c, d)) in enumerate(pairs):
        q = np.arange(b - a)[:, None] + ((d - c) - (b - a) if bottom_right else 0)
        mask = np.broadcast_to(allowed(q, np.arange(d - c)[None], n), (b - a, d - c))
        one = attention_oracle(
            query[None, a:b],
            key[None, c:d],
            value[None, c:d],
            mask[None, None],
            sinks=sinks,
            scale=query.shape[-1] ** -0.5,
            soft_cap=soft_cap,
            dout=dout[None, a:b],
            dlse=dlse.T[None, :, a:b],
        ).values
        out["out"][a:b], out["lse"][a:b] = one["out"][0], one["lse"][0].T
        out["dq"][a:b] = one["dq"][0]
        out["dk"][c:d], out["dv"][c:d] = one["dk"][0], one["dv"][0]
        if sinks is not None:
            out["dsinks"] += one["dsinks"]
    if sinks is not None:  # padding attends to nothing but the sink
        inside = np.isin(
            np.arange(query.shape[0]), np.concatenate([np.arange(a, b) for a, b in itertools.pairwise(q_numbers)])
        )
        out["lse"][~inside] = sinks
        out["dsinks"] += dlse[~inside].sum(0)
    return out


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "full": ({}, lambda q, k, n: (q == q) & (k == k)),
    "causal": ({"is_causal": True}, lambda q, k, n: q >= k),
    "causal, bottom right": ({"is_causal": True, "alignment": "bottom_right"}, lambda q, k, n: q >= k),
    "window, bottom right": (
        {"local_window_size": (30, 10), "alignment": "bottom_right", "max_seqlen_kv": 130},
        lambda q, k, n: (k >= q - 30) & (k <= q + 10),
    ),
    "chunks and causal": (
        {"mask": ChunkedMask(25), "is_causal": True},
        lambda q, k, n: (q // 25 == k // 25) & (q >= k),
    ),
    "prefix per sequence": (
        {"mask": PrefixLMMask(np.array([3, 5, 0, 20, 9]))},
        lambda q, k, n: (k < (3, 5, 0, 20, 9)[n]) | (q >= k),
    ),
    "global tokens": (
        {"mask": CausalMask() & (LocalMask((9, 0)) | GlobalMask(2)), "alignment": "bottom_right"},
        lambda q, k, n: (q >= k) & ((q - k <= 9) | (k < 2) | ((q < 2) & (q >= 0))),
    ),
    "soft cap and sinks": ({"is_causal": True, "logits_soft_cap": 2.0, "sinks": True}, lambda q, k, n: q >= k),
    "function": ({"mask": FunctionMask(lambda q, k: (q + k) % 2 == 0)}, lambda q, k, n: (q + k) % 2 == 0),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, implementation):
    options, allowed = CASES[name]
    query, key, value, sinks = arrays()
    rng = np.random.default_rng(1)
    dout, dlse = rng.standard_normal((T, 4, 8)), rng.standard_normal((T, 4))
    options = {"implementation": implementation, "return_residual": True, **options}
    operands = {"dq": query, "dk": key, "dv": value}
    if options.pop("sinks", None):
        operands["dsinks"] = sinks

    @jax.jit
    def run(operands, q_numbers, kv_numbers, dout, dlse):
        def attend(operands):
            parts: Any = [operands[name] for name in ("dq", "dk", "dv")]
            call: Any = packed_attention
            return call(*parts, q_numbers, kv_numbers, sinks=operands.get("dsinks"), **options)

        (out, lse), pullback = jax.vjp(attend, operands)
        return {"out": out, "lse": lse, **pullback((dout, jnp.where(jnp.isneginf(lse), 0, dlse)))[0]}

    results = run(operands, Q_NUMBERS, KV_NUMBERS, dout.astype(np.float32), dlse.astype(np.float32))
    expected = by_sequence(
        query,
        key,
        value,
        np.asarray(sinks, np.float64) if "dsinks" in operands else None,
        Q_NUMBERS,
        KV_NUMBERS,
        allowed,
        options.get("alignment") == "bottom_right",
        dout,
        dlse,
        options.get("logits_soft_cap"),
    )
    assert results.keys() == expected.keys()
    for key_of, value_of in expected.items():
        np.testing.assert_allclose(results[key_of], value_of, atol=3e-5, rtol=2e-4, err_msg=key_of)
    if "dsinks" not in operands:
        assert (np.asarray(results["out"])[180:] == 0).all(), "padding"
        assert np.isneginf(results["lse"][180:]).all()


def test_other_lengths_compile_nothing_anew():
    query, key, value, _ = arrays(kv_len=T)
    count = []

    @jax.jit
    def attend(query, key, value, numbers):
        count.append(1)
        return packed_attention(query, key, value, numbers, is_causal=True, max_seqlen_q=150)

    for numbers in (ALIKE, np.array([0, 50, 199, 200, 200], np.int32), np.array([0, 0, 0, 0, 0], np.int32)):
        out = attend(query, key, value, numbers)
        eager = packed_attention(query, key, value, numbers, is_causal=True)
        np.testing.assert_allclose(out, eager, atol=1e-5)
        for a, b in itertools.pairwise(numbers):
            alone = sparse_attention(query[a:b], key[a:b], value[a:b], is_causal=True)
            np.testing.assert_allclose(out[a:b], alone, atol=1e-5)
        assert (np.asarray(out)[numbers[-1] :] == 0).all()
    assert len(count) == 1


def test_float64_and_heads_of_their_own():
    with jax.enable_x64(True):
        query, key, value = (x.astype(jnp.float64) for x in arrays(kv_len=T)[:3])
        mask = MultiHeadMask([CausalMask(), LocalMask((9, 0)), ChunkedMask(20), CausalMask()])
        attend = jax.jit(lambda *x: packed_attention(*x, mask=mask, local_window_size=(60, None)))
        out = attend(query, key, value, ALIKE)
        for head, allowed in enumerate(
            [lambda q, k: q >= k, lambda q, k: (q >= k) & (q - k <= 9), lambda q, k: q // 20 == k // 20]
        ):
            group = slice(head // 2, head // 2 + 1)
            expected = by_sequence(
                query[:, head : head + 1],
                key[:, group],
                value[:, group],
                None,
                ALIKE,
                ALIKE,
                lambda q, k, n, allowed=allowed: allowed(q, k) & (k >= q - 60),
                False,
                np.ones((T, 1, 8)),
                np.ones((T, 1)),
            )["out"]
            np.testing.assert_allclose(out[:, head : head + 1], expected, atol=1e-12)


def test_vmap_over_rows_of_documents():
    query, key, value, _ = (jnp.stack([x, x[::-1]]) for x in arrays(kv_len=T))
    numbers = np.stack([ALIKE, np.array([0, 10, 100, 150, 200], np.int32)])
    mapped = jax.jit(jax.vmap(lambda *x: packed_attention(*x, is_causal=True)))(query, key, value, numbers)
    together = sparse_attention(query, key, value, mask=PackedMask(numbers, within=CausalMask()))
    np.testing.assert_allclose(mapped, together, atol=1e-5)


def test_flax_layers_take_the_mask():
    layer = SparseSelfAttention(2, 32, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 96, 32))
    numbers = jnp.array([[0, 30, 80, 96], [0, 50, 96, 96]])
    call = nnx.jit(lambda layer, x, numbers: layer(x, PackedMask(numbers)))
    ids = packing.segment_ids(numbers, 96)
    np.testing.assert_allclose(call(layer, x, numbers), layer(x, SegmentMask(np.asarray(ids))), atol=1e-5)


def test_block_sizes_follow_the_promise():
    from jax_bsk.attention.packed import _block_size

    assert _block_size(None, True, 512, None) == 64
    assert _block_size(None, True, None, 513) == 128
    assert _block_size(None, True, None, None) == 128
    assert _block_size(None, False, 64, None) == 128, "keys may be longer"
    assert _block_size(None, False, 64, 512) == 64
    assert _block_size(32, False, None, None) == 32
    query, key, value, _ = arrays(kv_len=T)
    attend = jax.jit(packed_attention, static_argnames=("is_causal", "max_seqlen_q", "block_size"))
    results = [
        attend(query, key, value, ALIKE, is_causal=True, **x) for x in ({}, {"max_seqlen_q": 120}, {"block_size": 32})
    ]
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=1e-5)


@pytest.mark.parametrize("split", ["heads", "tokens"])
def test_sharded(split):
    """Heads split without a collective. Of tokens, keys are gathered, as of every mask that is made inside jit."""
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, "x") if split == "heads" else PartitionSpec("x")
    numbers = jnp.array([0, 70, 70, 75, 190], jnp.int32)
    query, key, value, _ = arrays(256, 256)
    given = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (query, key, value)]
    numbers = jax.device_put(numbers, NamedSharding(mesh, PartitionSpec()))

    def loss(query, key, value, numbers):
        out = packed_attention(query, key, value, numbers, is_causal=True)
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))).sum(), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    compiled = grad.lower(*given, numbers).compile()
    gradients, out = compiled(*given, numbers)
    expected, alone = grad(query, key, value, np.asarray(numbers))
    if split == "heads":
        assert not collectives(compiled)
        np.testing.assert_array_equal(out, alone)
    for one, other in zip((out, *gradients), (alone, *expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_numbers_that_make_no_sense_give_nan():
    query, key, value, _ = arrays(kv_len=T)
    attend = jax.jit(lambda *x: packed_attention(*x, is_causal=True, return_residual=True))
    for numbers in ([0, 90, 50, 200], [0, 50, 100, 201], [-5, 50, 100, 200]):
        out, lse = attend(query, key, value, np.array(numbers, np.int32))
        assert np.isnan(out).all()
        assert np.isnan(lse).all()
    out, _ = attend(query, key, value, np.array([0, 50, 100, 200], np.int32))
    assert np.isfinite(out).all()


def test_no_tokens():
    query, key, value, _ = arrays(0, 0)
    out, lse = packed_attention(query, key, value, np.zeros(3, np.int32), return_residual=True)
    assert out.shape == (0, 4, 8)
    assert lse.shape == (0, 4)
    assert jax.jit(packed_attention)(query, key, value, np.zeros(3, np.int32)).shape == (0, 4, 8)
    query, key, value, _ = arrays(5, 0)
    assert not jax.jit(packed_attention)(query, key, value, np.array([0, 5]), np.array([0, 0])).any()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"query": np.zeros((1, T, 4, 16), np.float32)}, ValueError, r"TNH.*without a batch.*query\[0\]"),
        ({"cu_seqlens_q": np.zeros((2, 3), int)}, ValueError, r"cu_seqlens_q is \[sequences \+ 1\]"),
        ({"cu_seqlens_q": np.array([0.0, 9.0])}, TypeError, "cu_seqlens_q must hold integers"),
        ({"cu_seqlens_q": np.array([0, 300])}, ValueError, r"cu_seqlens_q must lie in \[0, 200\]"),
        ({"key": np.zeros((S, 2, 16), np.float32)}, ValueError, "cu_seqlens_kv is given where there are more or fewer"),
        ({"mask": PackedMask([0, 3]).bind(3)}, ValueError, "got a BlockMask; bind PackedMask"),
        ({"mask": np.ones((T, T), bool)}, TypeError, "lazy mask of the positions"),
        ({"mask": CausalMask}, TypeError, "make an instance"),
        ({"alignment": "left"}, ValueError, "'top_left' or 'bottom_right'"),
        ({"max_seqlen_q": 100}, ValueError, "more than the 100 that were promised"),
        ({"dropout_rng": None}, TypeError, "takes no arguments of Flax's modules"),
    ],
)
def test_mistakes_are_named(changes, error, words):
    query, key, value, _ = arrays(kv_len=T)
    call = {"query": query, "key": key, "value": value, "cu_seqlens_q": ALIKE, **changes}
    with pytest.raises(error, match=words):
        packed_attention(**call)
