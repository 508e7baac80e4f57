"""Not enough memory: XLA says so before a kernel runs, and the next call works.

A GPU's memory is cut down by the environment, so that small inputs are enough and other programs keep theirs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk import sparse_attention
from jax_bsk.attention import ffi
from jax_bsk.masks import FullMask
from jax_bsk.qa.testing.faults import checks
from jax_bsk.qa.testing.faults.scenario import scenario

FAULT = "no memory for workspace"
EXPECTED = "RESOURCE_EXHAUSTED from XLA, and the next call works"
# Seven GiB of an H200's 140. The default allocator alone has a limit.
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_ALLOCATOR": "default",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.05",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
}
NO_MACHINE = 1 << 50  # bytes: more than a processor's address space


def _limit() -> int:
    """Bytes that JAX may allocate on the default device."""
    device = jnp.zeros(()).devices().pop()
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit", NO_MACHINE)


def _check_exhausted(call: Any, *arguments: Any) -> None:
    def attempt():
        return jax.block_until_ready(jax.jit(call)(*arguments))

    what = f"a call that needs more than {_limit():,} bytes"
    checks.check_raises(what, attempt, jax.errors.JaxRuntimeError, "RESOURCE_EXHAUSTED")


@scenario(
    "no-memory-for-results",
    FAULT + " (nor for operands and results)",
    EXPECTED,
    environment=ENVIRONMENT,
    may_crash=True,
)
def no_memory_for_results(implementation: Any) -> None:
    shape = 1024, 16, 128
    example_bytes = 2 * 1024 * 16 * 128
    batch = _limit() // example_bytes + 1

    def call(x):
        x = jnp.broadcast_to(x, (batch, *shape))
        return sparse_attention(x, x, x, is_causal=True, implementation=implementation)

    _check_exhausted(call, jnp.ones((), jnp.bfloat16))


@scenario("no-memory-for-workspace", FAULT, EXPECTED, platforms=("cuda",), environment=ENVIRONMENT, may_crash=True)
def no_memory_for_workspace(implementation: Any) -> None:
    """Inputs and results that fit, and a backward workspace (dS of three heads' visited blocks) that does not."""
    x = jnp.ones((1, 1 << 16, 3, 64), jnp.bfloat16)
    mask = FullMask().bind(x.shape[1])
    workspace = ffi.backward_workspace(x.shape, x.shape, mask.kv_blocks.shape, mask.block_size)
    others, limit = 16 * x.nbytes, _limit()
    assert others < limit < workspace, f"a workspace of {workspace:,} bytes, the rest {others:,}, the limit {limit:,}"

    def loss(x):
        return sparse_attention(x, x, x, mask=mask, implementation=implementation).astype(jnp.float32).sum()

    _check_exhausted(jax.grad(loss), x)


SCENARIOS = (no_memory_for_results, no_memory_for_workspace)
