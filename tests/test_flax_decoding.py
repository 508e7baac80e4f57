"""Decoding with a cache in Flax: every token has the result that it has in the whole sequence."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jax_bsk.flax
from jax_bsk.flax._cache import Window, causal_window
from jax_bsk.masks import CausalMask, ChunkedMask, FullMask, GlobalMask, LocalMask, Mask, MultiHeadMask, SegmentMask
from tests.test_flax import close, standard_promotion  # noqa: F401  (a fixture that every test here uses)

BATCH, SIZE, FEATURES, HEADS = 2, 70, 32, 4
WINDOW = CausalMask() & LocalMask((9, 0))
SINKS = CausalMask() & (LocalMask((9, 0)) | GlobalMask(3))


def inputs(length: int = SIZE, batch: tuple[int, ...] = (BATCH,)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((*batch, length, FEATURES)), jnp.float32)


# ---- Flax's own layers, which take one token at a time --------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "decoding"),
    [
        (CausalMask(), None),
        (CausalMask(), CausalMask()),
        (SINKS, SINKS),
        (WINDOW & SegmentMask(np.arange(12) // 5), WINDOW & SegmentMask(np.arange(12) // 5)),
    ],
)
def test_linen_attention_step_by_step(mask, decoding):
    x = inputs(12)
    whole = nn.MultiHeadDotProductAttention(HEADS, attention_fn=jax_bsk.flax.attention_fn(mask))
    params = whole.init(jax.random.key(0), x)
    expected: Any = whole.apply(params, x)
    decoder = nn.MultiHeadDotProductAttention(HEADS, attention_fn=jax_bsk.flax.attention_fn(decoding), decode=True)
    cache = decoder.init(jax.random.key(0), x)["cache"]
    step = jax.jit(lambda cache, x: decoder.apply({**params, "cache": cache}, x, mutable=["cache"]))
    for t in range(12):
        out, updated = step(cache, x[:, t : t + 1])
        cache = updated["cache"]
        close(out, expected[:, t : t + 1])


def test_nnx_attention_step_by_step_behind_padding():
    """Example 1 begins with 4 tokens of padding, which the module's mask leaves out."""
    x = inputs(12)
    pads = jnp.array([[0], [4]])
    valid = (jnp.arange(12)[None] >= pads)[:, None, None]
    attend = jax_bsk.flax.attention_fn(LocalMask((4, 0)))
    layer = nnx.MultiHeadAttention(HEADS, FEATURES, attention_fn=attend, decode=False, rngs=nnx.Rngs(0))
    expected = layer(x, mask=valid, is_causal=True)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x, mask=valid, is_causal=True, decode=True))
    for t in range(12):
        out = step(layer, x[:, t : t + 1])
        tokens = slice(0, 2 if t >= 4 else 1)  # of examples, without the padding
        close(out[tokens], expected[tokens, t : t + 1])


def test_a_query_without_a_known_position_is_refused():
    x = inputs(20)
    module = nnx.MultiHeadAttention(
        HEADS, FEATURES, attention_fn=jax_bsk.flax.attention_fn(), decode=False, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="is_causal"):
        module(x[:, :1], x, is_causal=True)
    q, k, v = (jax.random.normal(key, (2, 64, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"one query and 64 keys.*the mask's offset, e.g. LocalMask\(window, offset="):
        jax_bsk.flax.attention_fn(LocalMask((9, 0)) & FullMask())(q[:, :1], k, v)
    mixed = LocalMask((9, 0), offset=3) & CausalMask()
    with pytest.raises(ValueError, match="one query and 64 keys"):
        jax_bsk.flax.attention_fn(mixed)(q[:, :1], k, v, mask=jnp.ones((2, 1, 1, 64), bool))


def test_a_window_that_is_given_its_position_decodes():
    q, k, v = (jax.random.normal(key, (2, 64, 2, 8)) for key in jax.random.split(jax.random.key(0), 3))
    whole = jax_bsk.flax.attention_fn(LocalMask((9, 0)) & ChunkedMask(20))(q, k, v)
    position = jnp.array([50, 7])
    mask = LocalMask((9, 0), offset=position) & ChunkedMask(20, offset=position)
    one = jax_bsk.flax.attention_fn(mask)(q[jnp.arange(2), position][:, None], k, v)
    close(one[:, 0], whole[jnp.arange(2), position])


# ---- SparseSelfAttention, several tokens at a time ------------------------------------------------------------------


class Decoder:
    """A layer of either library with a cache, as a function of tokens and what else a call takes."""

    whole: Any
    step: Any
    cache: Any

    def __init__(self, framework: str, mask: Mask | None, size: int = SIZE, batch=(BATCH,), **options) -> None:
        x = inputs(size, batch)
        if framework == "linen":
            module = jax_bsk.flax.linen.SparseSelfAttention
            whole: Any = module(HEADS, mask, **options)
            layer: Any = module(HEADS, mask, decode=True, **options)
            variables = layer.init(jax.random.key(0), x)
            params, self.cache = {"params": variables["params"]}, variables["cache"]
            self.whole = jax.jit(functools.partial(whole.apply, params))
            self.step = jax.jit(lambda c, *a, **k: layer.apply({**params, "cache": c}, *a, mutable=["cache"], **k))
        else:
            layer = jax_bsk.flax.nnx.SparseSelfAttention(HEADS, FEATURES, mask, rngs=nnx.Rngs(0), **options)
            self.whole = nnx.jit(lambda *a, **k: layer(*a, **k))
            self.cache = nnx.clone(layer)
            self.cache.init_cache(x.shape)
            self.step = nnx.jit(lambda module, *a, **k: module(*a, decode=True, **k))
        self.linen = framework == "linen"

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        if not self.linen:
            return self.step(self.cache, *args, **kwargs)
        out, updated = self.step(self.cache, *args, **kwargs)
        self.cache = updated["cache"]
        return out

    @property
    def index(self) -> jax.Array:
        return self.cache["cache_index"] if self.linen else self.cache.cache_index[...]


MASKS = {
    "none": None,
    "causal": CausalMask(),
    "window": WINDOW,
    "window with sinks": SINKS,
    "both sides": LocalMask(5),
    "documents": WINDOW & SegmentMask(np.arange(SIZE) // 20, contiguous=True),
    "heads": MultiHeadMask([CausalMask(), WINDOW, SINKS, ChunkedMask(16)]),
}


@pytest.mark.parametrize(
    ("name", "framework"), [*((name, "linen") for name in MASKS), ("window with sinks", "nnx"), ("documents", "nnx")]
)
def test_every_token_has_its_row_of_the_whole_sequence(name, framework):
    """Prompts of 43 and 30 tokens in chunks of 24, then tokens one by one, all by two compiled programs."""
    mask, x, prompts = MASKS[name], inputs(), np.array([43, 30])
    decode = Decoder(framework, mask, num_kv_heads=2, sinks=True)
    expected = np.asarray(decode.whole(x, CausalMask()))  # decoding is causal, whatever the mask
    for first in (0, 24):
        lengths = np.clip(prompts - first, 0, 24)
        out = np.asarray(decode(x[:, first : first + 24], lengths=jnp.asarray(lengths)))
        for b, length in enumerate(lengths):
            close(out[b, :length], expected[b, first : first + length])
    for step in range(SIZE - 43):
        at = prompts + step
        out = np.asarray(decode(x[np.arange(BATCH), at][:, None]))
        close(out[:, 0], expected[np.arange(BATCH), at])
    np.testing.assert_array_equal(decode.index, prompts + SIZE - 43)
    if decode.linen:
        assert decode.step._cache_size() == 2


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (CausalMask(), Window()),
        (CausalMask() & FullMask(), Window()),
        (WINDOW, Window(10)),
        (LocalMask((9, 3)) & CausalMask(), Window(10)),
        (LocalMask((None, 3)) & WINDOW, Window(10)),
        (SINKS, Window(10, 3)),
        (CausalMask() & (GlobalMask(3) | LocalMask((None, 0))), Window()),
        (LocalMask((9, 0)), None),  # the caller adds the causal mask
        (WINDOW & LocalMask((5, 0)), None),
        (CausalMask(1), None),
        (CausalMask() & (LocalMask((9, 0), offset=1) | GlobalMask(3)), None),
        (CausalMask() & (LocalMask((9, 0)) | GlobalMask([0, 5])), None),
        (CausalMask() & (CausalMask() | GlobalMask(3)), None),
        (CausalMask() & ChunkedMask(8), None),
    ],
)
def test_windows_are_recognised(mask, expected):
    assert causal_window(mask) == expected


def test_tokens_under_a_window_take_the_decoding_kernel():
    x, lengths = inputs(), jnp.array([1, 1])
    for mask, options, kernel in (
        (SINKS, {}, "jax_bsk_decode_forward"),
        (SINKS, {"lengths": lengths}, "jax_bsk_decode_forward"),
        (MASKS["documents"], {}, "jax_bsk_attention_forward"),
    ):
        decode = Decoder("linen", mask, logits_soft_cap=30.0, implementation="cpu")
        assert f"@{kernel}" in decode.step.lower(decode.cache, x[:, :1], **options).as_text()


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_masks_of_the_call_and_leading_dimensions(framework):
    batch, size = (2, 1), 40
    x, ids = inputs(size, batch), jnp.asarray(np.arange(size)[None] // np.array([[7], [16]]))
    decode = Decoder(framework, WINDOW, size, batch)
    expected = decode.whole(x, SegmentMask(ids))
    same = (ids[:, :, None] == ids[:, None, :])[:, None, None]  # [2, 1, heads, length, cache]
    for first in (0, 16):
        out = decode(x[:, :, first : first + 16], SegmentMask(ids[:, first : first + 16], ids))
        close(out, expected[:, :, first : first + 16])
    for first in range(32, size, 4):
        close(decode(x[:, :, first : first + 4], same[..., first : first + 4, :]), expected[:, :, first : first + 4])


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_calls_past_the_end_of_the_cache_are_nan(framework):
    x = inputs(20)
    decode = Decoder(framework, CausalMask(), 16, use_bias=False)
    expected = decode.whole(x)
    close(decode(x[:, :12], lengths=jnp.array([12, 8])), expected.at[1, 8:].set(0)[:, :12])
    out = np.asarray(decode(x[:, 12:18]))
    assert np.isnan(out[0]).all()  # 18 tokens
    assert np.isfinite(out[1]).all()
    out = np.asarray(decode(x[:, 18:], lengths=jnp.array([1, 2])))
    assert np.isnan(out[0, 0]).all()
    assert (out[0, 1] == 0).all()  # no token of the call
    assert np.isfinite(out[1]).all()
    np.testing.assert_array_equal(decode.index, [19, 16])
    out = np.asarray(decode(x[:, :1], lengths=jnp.array([0, 1])))
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()


def test_bfloat16_caches_and_types():
    x = inputs(24).astype(jnp.bfloat16)
    decode = Decoder("nnx", WINDOW, 24, dtype=jnp.bfloat16)
    assert decode.cache.cached_key.dtype == jnp.bfloat16
    close(decode(x[:, :23]), decode.whole(x)[:, :23], rtol=1e-2)
    decode.cache.init_cache(x.shape, jnp.float32)  # empties it
    np.testing.assert_array_equal(decode.index, [0, 0])
    assert decode(x[:, :23]).dtype == jnp.bfloat16


def test_caches_that_do_not_fit_are_refused():
    x = inputs(8)
    layer = jax_bsk.flax.nnx.SparseSelfAttention(HEADS, FEATURES, WINDOW, decode=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"decode=True needs a cache.*init_cache"):
        layer(x)
    assert layer(x, decode=False).shape == x.shape
    layer.init_cache((3, 8, FEATURES))
    with pytest.raises(ValueError, match=r"the cache holds keys \(3, 8, 4, 8\).*make a cache for this batch"):
        layer(x)
    linen = jax_bsk.flax.linen.SparseSelfAttention(HEADS, WINDOW, decode=True)
    variables = linen.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="needs the collection 'cache'"):
        linen.apply({"params": variables["params"]}, x, mutable=["cache"])
    bound = jax_bsk.flax.linen.SparseSelfAttention(HEADS, WINDOW.bind(8), decode=True)
    with pytest.raises(ValueError, match="decode=True needs lazy masks"):
        bound.apply(variables, x, mutable=["cache"])
