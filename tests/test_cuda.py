"""The CUDA kernels on a GPU, through the public function: the numeric battery, bit-equal repeats, the fault table.

CI has no GPU: these run where there is one, `pytest -m gpu --cases 200`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.qa.testing import battery, cases, faults, grid, steady
from jax_bsk.qa.testing.decode import battery as decode_battery
from jax_bsk.qa.testing.decode import cases as decode_cases
from jax_bsk.qa.testing.gpu_load import concurrent_load
from jax_bsk.qa.testing.matmul import battery as product_battery
from jax_bsk.qa.testing.matmul import cases as product_cases
from tests.util import loss_of, random_inputs, random_mask

pytestmark = pytest.mark.gpu

FAULTS = [name for name, scenario in faults.SCENARIOS.items() if "cuda" in scenario.platforms]


def run(case, multiprocessors):
    inside = case.head_size % 8 == 0 and case.value_size % 8 == 0 and {case.block_q, case.block_kv} <= {64, 128}
    if case.dtype == "float64" or not inside:
        pytest.skip("refused by the CUDA kernels, with a reason")
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        battery.run_case(
            case,
            battery.from_public("cuda"),
            multiprocessors=multiprocessors,
            command=f"--implementation cuda --max-len 700 --multiprocessors {multiprocessors}",
        )


@pytest.mark.parametrize("name", cases.CORNER_CASES)
def test_corner(name):
    run(cases.CORNER_CASES[name], 1)


def test_random(random_seed):
    run(cases.random_case(random_seed, max_len=700), grid.LIMITS[random_seed % len(grid.LIMITS)])


@pytest.mark.parametrize("name", product_cases.CORNER_CASES)
def test_corner_of_products(name):
    case = product_cases.CORNER_CASES[name]
    if case.dtype not in product_cases.DTYPES["cuda"] or not {*case.block_size} <= {*product_cases.BLOCKS["cuda"]}:
        pytest.skip("refused by the CUDA kernels, with a reason")
    product_battery.run_case(case, "cuda", multiprocessors=1)


def test_random_product(random_seed):
    case = product_cases.random_case(random_seed, "cuda")
    product_battery.run_case(case, "cuda", multiprocessors=grid.LIMITS[random_seed % len(grid.LIMITS)])


def test_random_decoding(random_seed):
    case = decode_cases.random_case(random_seed)
    if case.dtype == "float32" and max(case.head_dim, case.value_dim) > 128:
        pytest.skip("refused by the CUDA kernels, with a reason")
    decode_battery.run_case(case, "cuda", multiprocessors=grid.LIMITS[random_seed % len(grid.LIMITS)])


@pytest.mark.parametrize("name", steady.DECODING["cuda"])
def test_decoding_beside_other_work_gives_the_same_bits(name):
    with concurrent_load():
        assert steady.repeats_are_equal(steady.DECODING["cuda"][name], "cuda", 1000)


@pytest.mark.parametrize("name", steady.PRODUCTS["cuda"])
def test_products_beside_other_work_give_the_same_bits(name):
    with concurrent_load():
        assert steady.repeats_are_equal(steady.PRODUCTS["cuda"][name], "cuda", 500)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, faults.Outcome]:
    """What came of the scenarios of the fault table, apart from this process."""
    return {outcome.name: outcome for outcome in faults.run_all_in_subprocesses(FAULTS, "cuda")}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name, outcomes):
    assert outcomes[name].passed, outcomes[name]


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


@pytest.mark.parametrize("name", steady.ATTENTION)
def test_a_thousand_gradients_beside_other_work_give_the_same_bits(name):
    with concurrent_load():
        assert steady.repeats_are_equal(steady.STEADY[name], "cuda", 1000)


def test_the_automatic_choice_is_the_kernel_and_matches_xla():
    inputs = [x.astype(jnp.bfloat16) for x in random_inputs(1, 2, 512, 512, head_dim=64, value_dim=64)]
    f = jax.jit(lambda *a: sparse_attention(*a, is_causal=True))
    assert "@jax_bsk_attention_forward(" in f.lower(*inputs).as_text()
    expected = sparse_attention(*inputs, is_causal=True, implementation="xla").astype(jnp.float32)
    np.testing.assert_allclose(np.asarray(f(*inputs), np.float32), expected, atol=2e-2)


def test_more_tiles_than_multiprocessors_match_xla():
    # Persistent CTAs take several tiles each: 2 * 24 * 5 of 128 queries.
    inputs = random_inputs(2, 2, 600, 600, heads=24, kv_heads=8, head_dim=128, value_dim=128)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    mask = BlockMask.from_dense(random_mask(2, 600, 600), block_size=128)
    out = jax.jit(lambda *a: sparse_attention(*a, mask=mask, implementation="cuda"))(*inputs)
    expected = sparse_attention(*(x.astype(jnp.float32) for x in inputs), mask=mask, implementation="xla")
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected), atol=2e-2)


# A live tile, and behind it at least three without work, for one CTA: such calls did not end on Hopper.
@pytest.mark.gpu(seconds=120)
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("length", [2048, 3072])
def test_padded_queries_end_and_change_nothing(length, head_size):
    sizes = {"heads": 4, "kv_heads": 4, "head_dim": head_size, "value_dim": head_size}
    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(4, 8, 4096, 4096, **sizes))
    call = jax.jit(lambda *inputs, **lengths: sparse_attention(*inputs, implementation="cuda", **lengths))
    padded, whole = call(q, k, v, query_seq_lengths=jnp.full(8, length)), call(q, k, v)
    assert (padded[:, :length] == whole[:, :length]).all()
    assert (padded[:, length:] == 0).all()


@pytest.mark.gpu(seconds=120)
def test_runs_of_empty_rows_end_and_change_nothing():
    sizes = {"heads": 4, "kv_heads": 4, "head_dim": 128, "value_dim": 128}
    q, k, v = (x.astype(jnp.bfloat16) for x in random_inputs(5, 8, 4096, 4096, **sizes))
    live = np.arange(4096) // 128 % 4 == 0
    mask = BlockMask.from_dense(np.broadcast_to(live[:, None], (4096, 4096)), block_size=128)
    call = jax.jit(lambda *inputs, **masks: sparse_attention(*inputs, implementation="cuda", **masks))
    rows, whole = call(q, k, v, mask=mask), call(q, k, v)
    assert (rows[:, live] == whole[:, live]).all()
    assert (rows[:, ~live] == 0).all()


def test_every_device_and_several_threads_at_once_give_the_same_bits():
    mask = BlockMask.from_dense(random_mask(3, 512, 512), block_size=128)
    step = jax.jit(jax.grad(loss_of(lambda *a: sparse_attention(*a, mask=mask, implementation="cuda")), (0, 1, 2)))
    sets = [
        [x.astype(jnp.bfloat16) for x in random_inputs(seed, 2, 512, 512, heads=16, kv_heads=16)] for seed in range(4)
    ]
    expected = [jax.device_get(step(*inputs)) for inputs in sets]

    def work(number: int) -> bool:
        device = jax.devices("cuda")[number % len(jax.devices("cuda"))]
        got = step(*jax.device_put(sets[number % 4], device))
        assert got[0].devices() == {device}
        pairs = zip(jax.device_get(got), expected[number % 4], strict=True)
        return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))
