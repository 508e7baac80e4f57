"""The fault table: what must happen when the input is bad, on every implementation that runs here.

Lists that nobody checked are made by hand, as a traced computation could make them, and run in a process of their own
where a crash is conceivable: the kernel may answer NaN for the row, and must not do anything else.
"""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bsk
from jax_bsk import BlockMask, sparse_attention
from tests.util import assert_close, dense, random_inputs

POISON = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax_bsk import BlockMask, sparse_attention
implementation, fault, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
length = 4 * size
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((1, length, 2, 16)), jnp.float32) for _ in range(3))
good = dict(row_offsets=[0, 2, 4, 6, 8], kv_blocks=[0, 1, 1, 2, 2, 3, 0, 3], tiles=[0, -1, 0, -1, 0, -1, 0, -1])
bits = rng.integers(0, 2**32, (1, 1, 1, size, size // 32), dtype=np.uint32)
def mask(**changes):
    lists = {n: jnp.asarray([[changes.get(n, x)]], jnp.int32) for n, x in good.items()}
    return BlockMask(**lists, bit_tiles=jnp.asarray(bits), col_offsets=None, q_blocks=None, col_tiles=None,
                     block_q=size, block_kv=size, q_len=length, kv_len=length)
big = 2**31 - 1
faults = {  # fault -> (changed lists, poisoned rows of blocks)
    "id too large": (dict(kv_blocks=[0, 1, 1, 4, 2, 3, 0, 3]), [1]),
    "id huge": (dict(kv_blocks=[0, 1, 1, big, 2, 3, 0, 3]), [1]),
    "id negative": (dict(kv_blocks=[0, 1, 1, -1, 2, 3, 0, 3]), [1]),
    "id most negative": (dict(kv_blocks=[0, 1, 1, -2**31, 2, 3, 0, 3]), [1]),
    "tile too large": (dict(tiles=[0, -1, 1, -1, 0, -1, 0, -1]), [1]),
    "tile negative": (dict(tiles=[0, -1, -2, -1, 0, -1, 0, -1]), [1]),
    "overflow": (dict(row_offsets=[0, 2, 4, 6, 9]), [3]),
    "overflow by far": (dict(row_offsets=[0, 2, 4, 6, big]), [3]),
    "negative offset": (dict(row_offsets=[-2, 2, 4, 6, 8]), [0]),
    "decreasing offsets": (dict(row_offsets=[0, 2, 1, 6, 8]), [1]),
}
changes, rows = faults[fault]
def f(q, k, v, m):
    out, lse = sparse_attention(q, k, v, mask=m, implementation=implementation, return_residual=True)
    return out, lse
bad = mask(**changes)
out, lse = jax.jit(f)(q, k, v, bad)
grads = jax.jit(jax.grad(lambda q, k, v, m: f(q, k, v, m)[0].sum(), (0, 1, 2)))(q, k, v, bad)
expected = f(q, k, v, mask())[0]
jax.block_until_ready(grads)
for block in range(4):
    part = slice(size * block, size * (block + 1))
    if block in rows:
        assert jnp.isnan(out[:, part]).all() and jnp.isnan(lse[:, part]).all(), (block, out[0, part, 0, 0])
        assert jnp.isnan(grads[0][:, part]).all(), "dq of the poisoned row"
    elif fault != "decreasing offsets" or block == 0:  # the rows after a decrease overlap others, as listed
        np.testing.assert_allclose(out[:, part], expected[:, part], rtol=1e-5, atol=1e-5)
        assert jnp.isfinite(grads[0][:, part]).all()
try:
    bad.check()
except ValueError as error:
    assert "row" in str(error), error
    print("check:", error)
np.testing.assert_array_equal(f(q, k, v, mask())[0], expected)
print("survived")
"""
FAULTS = [
    "id too large",
    "id huge",
    "id negative",
    "id most negative",
    "tile too large",
    "tile negative",
    "overflow",
    "overflow by far",
    "negative offset",
    "decreasing offsets",
]


def check_fault(implementation: str, fault: str, block_size: int) -> None:
    """Runs one bad list in a process of its own."""
    command = [sys.executable, "-c", POISON, implementation, fault, str(block_size)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-2000:]}"
    assert "check:" in result.stdout
    assert result.stdout.endswith("survived\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_list_poisons_its_row_and_nothing_else(implementation, fault):
    check_fault(implementation, fault, 32)


@pytest.mark.parametrize(
    ("kv_blocks", "message"),
    [([[0, 0]], "row 0.*twice|row 0.*ascend"), ([[0, 9]], r"row 0.*outside \[0, 2\)"), ([[1, 0]], "row 0.*sort them")],
    ids=["duplicate", "out of range", "unsorted"],
)
def test_lists_built_on_the_host_are_checked(kv_blocks, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.from_indices(np.array(kv_blocks), np.array([2]), q_len=32, kv_len=64, block_size=32)


def test_duplicates_in_a_traced_list_are_visited_as_listed(implementation):
    query, key, value = random_inputs(0, 1, 32, 64, value_dim=16)

    @jax.jit
    def f(kv_blocks):
        counts = jnp.array([2])
        mask = BlockMask.from_indices(kv_blocks, counts, q_len=32, kv_len=64, block_size=32)
        return sparse_attention(query, key, value, mask=mask, implementation=implementation)

    twice = jnp.concatenate([key[:, :32], key[:, :32]], 1), jnp.concatenate([value[:, :32], value[:, :32]], 1)
    assert_close(f(jnp.array([[0, 0]])), dense(query, *twice, np.ones((1, 1, 32, 64), bool)))
    assert_close(f(jnp.array([[1, 0]])), dense(query, key, value, np.ones((1, 1, 32, 64), bool)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_nan_reaches_only_the_rows_that_attend_to_it(implementation, argument, bad):
    rng = np.random.default_rng(argument)
    arrays = [np.array(x) for x in random_inputs(argument, 1, 96, 96, heads=2, kv_heads=2)]
    mask = np.tri(96, dtype=bool) & (rng.random((96, 96)) < 0.5)
    position = 41
    arrays[argument][:, position] = bad
    touched = mask[:, position] if argument else np.arange(96) == position
    attends = mask.any(1)

    def f(*a):
        return sparse_attention(
            *a, mask=BlockMask.from_dense(mask, block_size=32), implementation=implementation, return_residual=True
        )[0]

    out = np.asarray(f(*arrays))
    assert np.isfinite(out[:, ~touched]).all()
    assert not np.isfinite(out[:, touched & attends]).all(axis=-1).any()
    # Queries that do not touch it, and keys none of whose queries touch it, keep finite gradients.
    dq, dk, dv = (np.asarray(g) for g in jax.grad(lambda *a: f(*a).sum(), (0, 1, 2))(*arrays))
    clean_keys = ~mask[touched].any(0)
    clean_keys[position] = False
    assert np.isfinite(dq[:, ~touched]).all()
    assert np.isfinite(dk[:, clean_keys]).all()
    assert np.isfinite(dv[:, clean_keys]).all()


def test_nan_beyond_the_lengths_reaches_nothing(implementation):
    query, key, value = (np.array(x) for x in random_inputs(3, 2, 96, 96))
    key[1, 50:], value[1, 50:], query[1, 70:] = np.nan, np.nan, np.nan

    def f(*a):
        return sparse_attention(
            *a,
            query_seq_lengths=np.array([96, 70]),
            key_value_seq_lengths=np.array([96, 50]),
            implementation=implementation,
        )

    assert jnp.isfinite(f(query, key, value)).all()
    grads = jax.grad(lambda *a: f(*a).sum(), (0, 1, 2))(query, key, value)
    assert all(jnp.isfinite(g).all() for g in grads)
    assert (grads[1][1, 50:] == 0).all()
    assert (grads[2][1, 50:] == 0).all()


def test_unsupported_is_a_not_implemented_error():
    assert issubclass(jax_bsk.UnsupportedError, NotImplementedError)
    error = jax_bsk.UnsupportedError("cpu", ["One.", "Two."])
    assert str(error) == "implementation='cpu' cannot take this call: One. Two."


def test_repeated_calls_leak_nothing():
    """Resident memory after ten thousand calls of a small jitted gradient is what it was after a thousand."""
    code = """
import resource, jax, jax.numpy as jnp, jax_bsk
x = jnp.ones((1, 64, 2, 16))
f = jax.jit(jax.grad(lambda x: jax_bsk.sparse_attention(x, x, x, is_causal=True).sum()))
def run(n):
    for _ in range(n): y = f(x)
    jax.block_until_ready(y)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(1000)
print(run(9000) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) < 20_000  # KiB
