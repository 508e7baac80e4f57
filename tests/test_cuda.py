"""The CUDA kernels on a GPU, through the public function: the numeric battery, bit-equal repeats, the fault table.

CI has no GPU: these run where there is one, `pytest -m gpu --cases 200`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.testing import battery, cases
from tests.test_faults import FAULTS, check_fault
from tests.util import loss_of, random_inputs, random_mask

pytestmark = pytest.mark.gpu


def run(case):
    inside = case.head_size % 8 == 0 and case.value_size % 8 == 0 and {case.block_q, case.block_kv} <= {64, 128}
    if case.bias or case.dtype == "float64" or not inside:
        pytest.skip("refused by the CUDA kernels, with a reason")
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        battery.run_case(case, battery.from_public("cuda"), command="--implementation cuda --max-len 700")


@pytest.mark.parametrize("name", cases.CORNER_CASES)
def test_corner(name):
    run(cases.CORNER_CASES[name])


def test_random(random_seed):
    run(cases.random_case(random_seed, max_len=700))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_list_poisons_its_row_and_nothing_else(fault):
    check_fault("cuda", fault, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_thousand_steps_give_the_same_bits(dtype):
    inputs = [x.astype(dtype) for x in random_inputs(0, 2, 700, 900, heads=8, kv_heads=2, head_dim=64, value_dim=64)]
    mask = BlockMask.from_dense(random_mask(0, 700, 900), block_size=64)
    step = jax.jit(
        jax.value_and_grad(loss_of(lambda *a: sparse_attention(*a, mask=mask, implementation="cuda")), (0, 1, 2))
    )
    first = step(*inputs)
    same = jax.jit(
        lambda a, b: jnp.stack([(x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)])
    )
    assert all(same(first, step(*inputs)).all() for _ in range(1000))


def test_the_automatic_choice_is_the_kernel_and_matches_xla():
    inputs = [x.astype(jnp.bfloat16) for x in random_inputs(1, 2, 512, 512, head_dim=64, value_dim=64)]
    f = jax.jit(lambda *a: sparse_attention(*a, is_causal=True))
    assert "@jax_bsk_attention_forward(" in f.lower(*inputs).as_text()
    expected = sparse_attention(*inputs, is_causal=True, implementation="xla").astype(jnp.float32)
    np.testing.assert_allclose(np.asarray(f(*inputs), np.float32), expected, atol=2e-2)
