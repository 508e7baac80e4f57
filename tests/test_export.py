"""Programs compiled for a platform that is not here: what its kernels cannot take is refused, with the remedy."""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
from jax_bsk import BSR, sampled_matmul, sparse_attention, sparse_matmul
from jax_bsk.masks import CausalMask


def export(function, *arguments, platform):
    exported = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=jax_bsk.export_checks())
    return exported(*arguments).mlir_module()


def attention(head_dim=64, value_dim=64, block_size=64, dtype="bfloat16", implementation=None):
    def call(query, value):
        mask = CausalMask().bind(64, block_size=block_size)
        return sparse_attention(query, query, value, mask=mask, implementation=implementation)

    query, value = (jax.ShapeDtypeStruct((1, 64, 2, size), dtype) for size in (head_dim, value_dim))
    return call, query, value


def gradient(**options):
    call, *arguments = attention(**options)
    return jax.grad(lambda q, v: call(q, v).astype("float32").sum()), *arguments


def weight(block_size=64, dtype="bfloat16"):
    return BSR.from_dense(np.ones((64, 64), dtype), block_size=block_size)


def product(**options):
    return sparse_matmul, weight(**options), jnp.ones((64, 8), options.get("dtype", "bfloat16"))


def sampled(**options):
    x = jnp.ones((64, 64), options.get("dtype", "bfloat16"))
    return lambda x: sampled_matmul(x, x, weight(**options)), x


REFUSED = {
    "head size": (attention, {"head_dim": 20}, "query's head size is a multiple of 8, got 20"),
    "value's head size": (attention, {"value_dim": 12}, "value's head size is a multiple of 8, got 12"),
    "blocks": (attention, {"block_size": 32}, "Block sizes are 64 or 128, got 32"),
    "gradient": (gradient, {"block_size": 32}, "Block sizes are 64 or 128, got 32"),
    "blocks of a product": (product, {"block_size": 32}, "Block sizes are 64 or 128, got 32"),
    "type of a product": (product, {"dtype": "float32"}, "take float16, bfloat16, got float32"),
    "blocks of a sampled product": (sampled, {"block_size": 16}, "Block sizes are 64 or 128, got 16"),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the automatic choice is another than the CPU's kernels")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_does_not_take_is_refused_where_there_is_no_gpu(name):
    make, options, message = REFUSED[name]
    with pytest.raises(jax_bsk.UnsupportedError, match=message) as refusal:
        export(*make(**options), platform="cuda")
    assert "compiled for cuda" in str(refusal.value)
    assert "implementation='xla'" in str(refusal.value)


def test_double_precision_for_cuda_is_refused():
    with jax.enable_x64(True), pytest.raises(jax_bsk.UnsupportedError, match="float32, got float64"):
        export(*attention(dtype="float64"), platform="cuda")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the automatic choice is another than the CPU's kernels")
def test_what_cuda_takes_is_exported():
    for made in (gradient(), product(), sampled()):
        assert "@jax_bsk_" in export(*made, platform="cuda")
    assert "@jax_bsk_" not in export(*attention(head_dim=20, implementation="xla"), platform="cuda")


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
@pytest.mark.parametrize("make", [attention, gradient, product, sampled])
def test_platforms_without_kernels_name_xla(make, platform):
    with pytest.raises(jax_bsk.UnsupportedError, match="implementation='xla'") as refusal:
        export(*make(), platform=platform)
    assert f"no native kernel for {platform}" in str(refusal.value)


def test_a_named_implementation_is_compiled_for_its_platform_alone():
    with pytest.raises(jax_bsk.UnsupportedError, match=r"'cpu' .* compiled for cuda.*implementation='xla'"):
        export(*attention(implementation="cpu"), platform="cuda")
