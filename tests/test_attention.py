"""The public function: meanings shared with `jax.nn.dot_product_attention`, and what it refuses with a remedy."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
from jax_bsk import BlockMask, sparse_attention
from jax_bsk.masks import ArrayMask, CausalMask, FullMask, LocalMask
from jax_bsk.qa.testing.oracle import attention_oracle
from tests.util import assert_close, dense, random_inputs, random_mask


def jax_nn(query, key, value, **kwargs):
    """jax.nn's attention; it computes in the standard promotion world."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(query, key, value, implementation="xla", **kwargs)


@pytest.fixture
def inputs():
    return random_inputs(0, q_len=96, value_dim=16)


SAME_AS_JAX_NN = {
    "nothing": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7, "is_causal": True},
    "window": {"local_window_size": (17, 5)},
    "symmetric window": {"local_window_size": 9},
    "causal window": {"is_causal": True, "local_window_size": (30, 0)},
    "key lengths": {"key_value_seq_lengths": np.array([96, 41])},
    "mask BNTS": {"mask": np.random.default_rng(0).random((2, 4, 96, 96)) < 0.9},
    "mask 11TS": {"mask": np.random.default_rng(1).random((1, 1, 96, 96)) < 0.9},
    "padding mask B11S": {"mask": np.arange(96)[None, None, None] < np.array([90, 50])[:, None, None, None]},
    "mask and causal": {"mask": np.arange(96)[None, None, None] % 7 != 5, "is_causal": True},
}


@pytest.mark.parametrize("name", SAME_AS_JAX_NN)
def test_means_the_same_as_jax_nn(implementation, inputs, name):
    options = SAME_AS_JAX_NN[name]
    actual = sparse_attention(*inputs, implementation=implementation, **options)
    arrays = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    assert_close(actual, jax_nn(*inputs, **arrays))


@pytest.mark.parametrize("shape", [(2, 4, 96, 96), (1, 4, 96, 96), (2, 1, 96, 96), (1, 1, 1, 96), (1, 1, 96, 1)])
def test_bias_broadcasts(inputs, shape):
    bias = jax.random.normal(jax.random.key(1), shape)
    actual = sparse_attention(*inputs, bias=bias, is_causal=True, implementation="xla")
    assert_close(actual, jax_nn(*inputs, bias=jnp.broadcast_to(bias, (*shape[:2], 96, 96)), is_causal=True))


def test_unbatched_inputs(implementation, inputs):
    mask = np.random.default_rng(2).random((4, 96, 96)) < 0.9
    out, lse = sparse_attention(*(x[0] for x in inputs), mask=mask, implementation=implementation, return_residual=True)
    batched = sparse_attention(*inputs, mask=mask, implementation=implementation, return_residual=True)
    assert out.shape == (96, 4, 16)
    assert lse.shape == (96, 4)
    assert_close((out, lse), jax.tree.map(lambda x: x[0], batched))


def test_residual_is_the_log_sum_exp(implementation, inputs):
    query, key, _value = inputs
    _, lse = sparse_attention(*inputs, is_causal=True, implementation=implementation, return_residual=True)
    logits = jnp.einsum("btnh,bsnh->btns", query, key, precision="highest") / 4
    expected = jax.nn.logsumexp(logits, axis=-1, where=jnp.tri(96, dtype=bool)[:, None])
    assert lse.dtype == jnp.float32
    assert_close(lse, expected)


def test_residual_has_a_gradient(implementation, inputs):
    query, key, value = inputs

    def ours(q, k):
        return sparse_attention(q, k, value, is_causal=True, implementation=implementation, return_residual=True)[
            1
        ].sum()

    def expected(q, k):
        logits = jnp.einsum("btnh,bsnh->btns", q, k) / 4
        return jax.nn.logsumexp(logits, axis=-1, where=jnp.tri(96, dtype=bool)[:, None]).sum()

    assert_close(jax.grad(ours, (0, 1))(query, key), jax.grad(expected, (0, 1))(query, key))


def test_rows_that_attend_to_nothing(implementation, inputs):
    mask = np.ones((96, 96), bool)
    mask[10:50] = False

    def attend(*arrays):
        return sparse_attention(*arrays, mask=mask, implementation=implementation, return_residual=True)

    out, lse = attend(*inputs)
    assert (out[:, 10:50] == 0).all()
    assert jnp.isneginf(lse[:, 10:50]).all()
    assert jnp.isfinite(lse[:, 50:]).all()
    grads = jax.grad(lambda *a: attend(*a)[0].sum(), (0, 1, 2))(*inputs)
    assert (grads[0][:, 10:50] == 0).all()
    assert all(jnp.isfinite(g).all() for g in grads)


def test_sinks_take_probability(implementation, inputs):
    sinks = jnp.array([-jnp.inf, -1.0, 0.0, 3.0])
    out, lse = sparse_attention(
        *inputs, is_causal=True, sinks=sinks, implementation=implementation, return_residual=True
    )
    plain, plain_lse = sparse_attention(*inputs, is_causal=True, implementation=implementation, return_residual=True)
    sinks = sinks[None, None]
    share = 1 - jax.nn.sigmoid(sinks - plain_lse)
    assert_close(out, plain * share[..., None])
    assert_close(lse, jnp.logaddexp(plain_lse, sinks))


def test_query_lengths_zero_the_padding(implementation, inputs):
    lengths = np.array([96, 33])
    out, lse = sparse_attention(*inputs, query_seq_lengths=lengths, implementation=implementation, return_residual=True)
    assert (out[1, 33:] == 0).all()
    assert jnp.isneginf(lse[1, 33:]).all()
    assert_close(out[1, :33], sparse_attention(*inputs, implementation=implementation)[1, :33])


def test_every_form_of_a_mask_is_the_same_mask(implementation, inputs):
    boolean = np.tri(96, dtype=bool)
    forms = [
        boolean,
        jnp.asarray(boolean),
        ArrayMask(boolean),
        CausalMask(),
        FullMask() & CausalMask(),
        ~~CausalMask(),
        CausalMask().bind(96, block_size=32),
        CausalMask().bind(96, block_size=(64, 32)).transpose(),
        BlockMask.from_dense(boolean),
    ]
    expected = sparse_attention(*inputs, is_causal=True, implementation=implementation)
    for form in forms:
        assert_close(sparse_attention(*inputs, mask=form, implementation=implementation), expected)


def test_default_picks_the_native_kernel_silently(inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = jax.jit(lambda *a: sparse_attention(*a, is_causal=True)).lower(*inputs).as_text()
    assert "@jax_bsk_attention_forward(" in text


def test_fallback_says_why_once(inputs, monkeypatch):
    from jax_bsk.core import dispatch

    monkeypatch.setattr(dispatch, "_already_said", set())
    double = lambda score, *_: 2 * score  # noqa: E731
    with pytest.warns(jax_bsk.FallbackWarning, match="take no score_function") as caught:
        sparse_attention(*inputs, score_function=double)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_attention(*inputs, score_function=double)


q, k, v = (np.zeros((2, 8, 4, 16), np.float32) for _ in range(3))
MISTAKES = {
    "query rank": (lambda: sparse_attention(q[0, 0], k, v), ValueError, "BTNH"),
    "mixed ranks": (lambda: sparse_attention(q[0], k, v), ValueError, "TNH and SKH all three"),
    "integer query": (lambda: sparse_attention(q.astype(int), k, v), TypeError, "query is a floating-point"),
    "key type": (lambda: sparse_attention(q, k.astype(np.float16), v), TypeError, "key is of query's type"),
    "batch": (lambda: sparse_attention(q, k[:1], v[:1]), ValueError, "key has query's batch size 2, got 1"),
    "head size": (lambda: sparse_attention(q, k[..., :8], v), ValueError, "query's head size 16, got 8"),
    "heads": (lambda: sparse_attention(q, k[:, :, :3], v[:, :, :3]), ValueError, "multiple of key's"),
    "value length": (lambda: sparse_attention(q, k, v[:, :4]), ValueError, "same length"),
    "float mask": (lambda: sparse_attention(q, k, v, mask=np.zeros((8, 8))), TypeError, "pass numbers .* as bias"),
    "mask shape": (lambda: sparse_attention(q, k, v, mask=np.ones((8, 9), bool)), ValueError, "mask broadcasts to"),
    "mask heads": (lambda: sparse_attention(q, k, v, mask=np.ones((3, 8, 8), bool)), ValueError, "BNTS"),
    "mask length": (lambda: sparse_attention(q, k, v, mask=CausalMask().bind(16)), ValueError, "q_len=16"),
    "causal block mask": (
        lambda: sparse_attention(q, k, v, mask=CausalMask().bind(8), is_causal=True),
        ValueError,
        "combined mask",
    ),
    "mask kind": (lambda: sparse_attention(q, k, v, mask="causal"), TypeError, "a Mask, a BlockMask or a boolean"),  # pyright: ignore[reportArgumentType]
    "window": (lambda: sparse_attention(q, k, v, local_window_size=(-1, 0)), ValueError, "-1"),
    "soft cap": (lambda: sparse_attention(q, k, v, logits_soft_cap=0.0), ValueError, "got 0; pass None for no cap"),
    "scale of several": (lambda: sparse_attention(q, k, v, scale=np.ones(2)), TypeError, "scale is one number"),
    "sinks": (lambda: sparse_attention(q, k, v, sinks=np.zeros(3, np.float32)), ValueError, r"shape \(4,\)"),
    "lengths type": (
        lambda: sparse_attention(q, k, v, query_seq_lengths=np.ones(2, np.float32)),
        TypeError,
        "query_seq_lengths holds integers",
    ),
    "lengths shape": (
        lambda: sparse_attention(q, k, v, key_value_seq_lengths=np.ones(3, int)),
        ValueError,
        r"key_value_seq_lengths has one length per example, shape \(2,\)",
    ),
    "bias": (lambda: sparse_attention(q, k, v, np.zeros((8, 9), np.float32)), ValueError, "bias broadcasts"),
    "traced scales": (
        lambda: jax.jit(lambda s: sparse_attention(q, k, v, scale=s))(np.ones(4, np.float32)),
        TypeError,
        r"scale is one number, got a traced float32 array of shape \(4,\); multiply the query",
    ),
    "traced soft cap": (
        lambda: jax.jit(lambda c: sparse_attention(q, k, v, logits_soft_cap=c))(0.5),
        TypeError,
        "logits_soft_cap is a number known when tracing, got .*; pass a Python number",
    ),
    "padding mask": (
        lambda: sparse_attention(q, k, v, mask=np.ones((2, 8), bool)),
        ValueError,
        r"got shape \(2, 8\); .* mask\[:, None, None, :\]",
    ),
    "mask of each example": (
        lambda: sparse_attention(q, k, v, mask=np.ones((2, 8, 8), bool)),
        ValueError,
        r"mask\[:, None\]",
    ),
    "padding bias": (
        lambda: sparse_attention(q, k, v, np.ones((2, 8), np.float32)),
        ValueError,
        r"bias\[:, None, None, :\]",
    ),
    "boolean bias": (lambda: sparse_attention(q, k, v, np.ones((8, 8), bool)), TypeError, "pass it as mask"),
    "lengths beyond": (
        lambda: sparse_attention(q, k, v, key_value_seq_lengths=np.array([8, 9])),
        ValueError,
        r"key_value_seq_lengths is in \[0, 8\].*, got 8 to 9; cut it",
    ),
    "lengths below": (
        lambda: sparse_attention(q, k, v, query_seq_lengths=jnp.array([-1, 8])),
        ValueError,
        "got -1 to 8",
    ),
    "flax": (
        lambda: sparse_attention(q, k, v, dropout_rng=None, deterministic=True),  # type: ignore[call-arg]
        TypeError,
        "jax_bsk.flax.attention_fn",
    ),
    "implementation": (lambda: sparse_attention(q, k, v, implementation="tpu"), ValueError, "'cpu', 'cuda', 'xla'"),  # pyright: ignore[reportArgumentType]
    "native score function": (
        lambda: sparse_attention(q, k, v, score_function=lambda s, *_: s, implementation="cpu"),
        jax_bsk.UnsupportedError,
        "implementation='xla'",
    ),
    "native head size": (
        lambda: sparse_attention(*(np.zeros((1, 8, 1, 300), np.float32),) * 3, implementation="cpu"),
        jax_bsk.UnsupportedError,
        "at most 256, got 300",
    ),
    "native block size": (
        lambda: sparse_attention(q, k, v, mask=FullMask().bind(8, block_size=512), implementation="cpu"),
        jax_bsk.UnsupportedError,
        "at most 256, got 512",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_argument_and_the_remedy(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()


HUGE = pytest.param(10**400, id="huge")  # no float either


# What float32 cannot carry, or not its quotients: too great, too small, subnormal, no number.
@pytest.mark.parametrize("cap", [1e39, 1e38, 5e37, 1e31, 1e-31, 1e-38, 1e-46, 0, -1.0, math.inf, math.nan, HUGE])
def test_soft_caps_beyond_float32_are_refused(implementation, cap):
    with pytest.raises(ValueError, match=r"logits_soft_cap is in \[1e-30, 1e\+30\], .* float32"):
        sparse_attention(q, k, v, logits_soft_cap=cap, implementation=implementation)


@pytest.mark.parametrize(("scale", "cap"), [(1e9, 1e-30), (1e-9, 1e30), (-1e-10, 1e30), (1e-300, 1.0)])
def test_quotients_of_scale_and_soft_cap_beyond_float32_are_refused(implementation, scale, cap):
    with pytest.raises(ValueError, match="scale / logits_soft_cap is 0 or"):
        sparse_attention(q, k, v, scale=scale, logits_soft_cap=cap, implementation=implementation)


@pytest.mark.parametrize("scale", [3e38, -3e38, 1e39, math.inf, -math.inf, math.nan, HUGE])
def test_scales_beyond_float32_are_refused(implementation, scale):
    with pytest.raises(ValueError, match=r"scale is in \[-2e\+38, 2e\+38\]"):
        sparse_attention(q, k, v, scale=scale, implementation=implementation)
    with pytest.raises(ValueError, match="scale is in"):
        jax_bsk.selection.xattention(q, q, scale=scale)


@pytest.mark.parametrize(
    ("scale", "cap"), [(1.0, 1e30), (0.25, 1e-30), (0.25, 1e20), (0.25, 1e-10), (-0.5, 1e30), (0, 2.0), (1e-40, None)]
)
def test_numbers_at_the_ends_of_their_ranges(implementation, scale, cap):
    """Against float64: a great cap caps nothing, a small one makes all keys equal."""
    inputs = [np.asarray(x, np.float64) for x in random_inputs(3, q_len=33, kv_len=33, head_dim=8, value_dim=8)]

    def call(*inputs):
        return sparse_attention(*inputs, scale=scale, logits_soft_cap=cap, implementation=implementation)

    out, pullback = jax.vjp(call, *(jnp.asarray(x, jnp.float32) for x in inputs))
    oracle = attention_oracle(
        *inputs, mask=np.ones((1, 1, 33, 33), bool), scale=scale, soft_cap=cap, dout=np.ones(inputs[0].shape)
    )
    assert_close(out, oracle.values["out"], 1e-5)
    dout = jnp.ones(out.shape)
    assert_close(pullback(dout), [oracle.values[name] for name in ("dq", "dk", "dv")], 1e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_cuda_without_a_gpu_says_what_to_do(inputs):
    with pytest.raises(jax_bsk.UnsupportedError, match=r"jax\[cuda13\]"):
        sparse_attention(*inputs, implementation="cuda")


@pytest.mark.parametrize("shape", [(0, 8, 4), (2, 0, 4), (2, 8, 0)])
def test_empty_calls(implementation, shape):
    empty = jnp.zeros((*shape, 16))
    out, lse = sparse_attention(empty, empty, empty, implementation=implementation, return_residual=True)
    assert out.shape == empty.shape
    assert lse.shape == shape
    grads = jax.grad(lambda x: sparse_attention(x, x, x, implementation=implementation).sum())(empty)
    assert grads.shape == empty.shape


def test_no_keys_at_all(implementation):
    query, key = jnp.ones((2, 8, 4, 16)), jnp.ones((2, 0, 4, 16))
    out, lse = sparse_attention(query, key, key, implementation=implementation, return_residual=True)
    assert (out == 0).all()
    assert jnp.isneginf(lse).all()
    grads = jax.grad(lambda q, k: sparse_attention(q, k, k, implementation=implementation).sum(), (0, 1))(query, key)
    assert (grads[0] == 0).all()
    assert grads[1].shape == key.shape


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_type_is_kept(implementation, dtype):
    with jax.enable_x64(dtype == "float64"):
        inputs = [x.astype(dtype) for x in random_inputs(3)]
        mask = random_mask(3)
        block_mask = BlockMask.from_dense(mask, block_size=32)
        out, lse = sparse_attention(*inputs, mask=block_mask, implementation=implementation, return_residual=True)
        assert out.dtype == dtype
        assert lse.dtype == ("float64" if dtype == "float64" else "float32")
        wide = [np.asarray(x, np.float64) for x in inputs]
        expected = dense(*(jnp.asarray(x, jnp.float32) for x in wide), mask=mask)
        eps = float(jnp.finfo(dtype).eps)
        assert_close(out.astype(jnp.float32), expected, atol=max(2e-5, 4 * eps))


def test_a_hundred_steps_give_the_same_bits(implementation):
    inputs, mask = random_inputs(5), BlockMask.from_dense(random_mask(5), block_size=32)
    step = jax.jit(
        jax.value_and_grad(
            lambda *a: (sparse_attention(*a, mask=mask, implementation=implementation) ** 2).sum(), (0, 1, 2)
        )
    )
    first = jax.tree.map(np.asarray, step(*inputs))
    for _ in range(100):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(step(*inputs)), strict=True):
            np.testing.assert_array_equal(a, np.asarray(b))


def test_windows_wider_than_the_sequence(implementation, inputs):
    wide = sparse_attention(*inputs, local_window_size=(1000, None), implementation=implementation)
    assert_close(wide, sparse_attention(*inputs, implementation=implementation))
    assert_close(
        sparse_attention(*inputs, mask=LocalMask((None, 0)), implementation=implementation),
        sparse_attention(*inputs, is_causal=True, implementation=implementation),
    )


WEIGHT = jax_bsk.BSR.from_dense(np.ones((64, 64), np.float32), block_size=32)
EAGER = {
    "attention": lambda q: sparse_attention(q, q, q, is_causal=True),
    "gradient": jax.grad(lambda q: sparse_attention(q, q, q, is_causal=True).sum()),
    "product": lambda q: jax_bsk.sparse_matmul(WEIGHT, q[0, :, 0]),
}


@pytest.mark.parametrize("name", EAGER)
def test_repeated_eager_calls_compile_nothing(name, caplog):
    q = jnp.ones((1, 64, 2, 32))
    EAGER[name](q)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        jax.jit(lambda x: x + 1)(q)
        assert "Compiling" in caplog.text, "the log says what is compiled"
        caplog.clear()
        EAGER[name](q)
    assert "Compiling" not in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_traced_scale(implementation, dtype):
    """It has a gradient, and errs by the rounding of the query in low precision."""
    arrays = [x[:1].astype(dtype) for x in random_inputs(3, q_len=32)]

    def loss(scale):
        out, lse = sparse_attention(*arrays, scale=scale, implementation=implementation, return_residual=True)
        return out.astype("float32").sum() + lse.sum(), lse

    (_, lse), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.float32(0.3))
    assert_close(lse, loss(0.3)[1], 1e-5 if dtype == "float32" else 0.02)
    step = 0.01
    expected = (loss(0.3 + step)[0] - loss(0.3 - step)[0]) / (2 * step)
    np.testing.assert_allclose(gradient, expected, rtol=0.01 if dtype == "float32" else 0.1)


def test_a_traced_scale_in_vmap(implementation):
    arrays = random_inputs(3, q_len=32)
    attend = lambda scale: sparse_attention(*arrays, scale=scale, implementation=implementation)  # noqa: E731
    scales = [0.3, 2.0]
    assert_close(jax.jit(jax.vmap(attend))(jnp.array(scales)), jnp.stack([attend(s) for s in scales]))


@pytest.mark.skipif(jax.device_count() < 2, reason="one device")
@pytest.mark.parametrize("name", ["key", "value", "mask", "sinks", "query_seq_lengths"])
def test_arrays_on_other_devices_are_named(name):
    arrays = {
        **{n: jnp.ones((1, 8, 1, 8)) for n in ("query", "key", "value")},
        "mask": CausalMask().bind(8),
        "sinks": jnp.ones(1),
        "query_seq_lengths": jnp.array([8]),
    }
    arrays["query"] = jax.device_put(arrays["query"], jax.devices()[0])
    arrays[name] = jax.device_put(arrays[name], jax.devices()[1])
    with pytest.raises(ValueError, match=f"{name} must be on the query's devices .*, got .*; move it"):
        sparse_attention(**arrays)
