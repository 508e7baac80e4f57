"""The CUDA kernels on a GPU, through the public function: the numeric battery, bit-equal repeats, the fault table.

CI has no GPU: these run where there is one, `pytest -m gpu --cases 200`.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask
from jax_bsk.testing import battery, cases
from jax_bsk.testing.gpu_load import concurrent_load
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


@dataclasses.dataclass(frozen=True)
class Steady:
    """A call whose gradients are repeated: more tiles than multiprocessors, few enough for a thousand repeats.

    Attributes:
      density: Of random whole blocks; None: causal, a window and global tokens.
      partial: `random_mask` instead, of which nearly every block is partial.
      options: Further arguments of `sparse_attention`.
    """

    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 128
    density: float | None = 0.5
    partial: bool = False
    dtype: str = "bfloat16"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def inputs(self):
        sizes = self.batch, self.q_len, self.kv_len, self.heads, self.kv_heads, self.head_dim, self.head_dim
        return [x.astype(self.dtype) for x in random_inputs(0, *sizes)]

    def mask(self) -> BlockMask:
        lengths = self.q_len, self.kv_len
        if self.partial:
            return BlockMask.from_dense(random_mask(0, *lengths, heads=self.heads), block_size=self.block_size)
        if self.density is None:
            mask = CausalMask() & (LocalMask((700, 0)) | GlobalMask(20))
            return mask.bind(*lengths, block_size=self.block_size)
        shape = [-(-n // self.block_size) for n in lengths]
        blocks = np.random.default_rng(0).random((self.heads, *shape)) < self.density
        return BlockMask.from_block_mask(blocks, q_len=self.q_len, kv_len=self.kv_len, block_size=self.block_size)


STEADY = {
    "d128": Steady(2, 2048, 2048, 16, 16, 128),  # 512 tiles of 128 keys
    "d128-gqa": Steady(2, 1500, 1900, 16, 4, 128),
    "d128-partial": Steady(1, 1000, 1100, 8, 8, 128, partial=True),
    "d64-blocks-64": Steady(2, 2048, 2048, 16, 16, 64, 64, density=0.3),
    "d64-mqa": Steady(3, 1500, 1500, 16, 1, 64),
    "d96": Steady(2, 1024, 1024, 16, 16, 96),
    "d256": Steady(1, 1500, 1500, 16, 8, 256, density=0.4),
    "causal-lengths-sinks": Steady(
        4,
        1900,
        1900,
        16,
        8,
        128,
        density=None,
        options={
            "key_value_seq_lengths": np.array([1900, 777, 128, 1]),
            "sinks": np.linspace(-1, 1, 16, dtype=np.float32),
        },
    ),
    "f16-soft-cap": Steady(2, 1500, 1500, 16, 16, 128, dtype="float16", options={"logits_soft_cap": 20.0}),
    "float32": Steady(1, 600, 600, 8, 8, 64, dtype="float32"),
}


@jax.jit
def still_same(same, actual, expected):
    """Whether all bits are the same; stays on the device, so that a thousand steps need not wait for the host."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        bits = jnp.uint32 if a.dtype == jnp.float32 else jnp.uint16
        same &= jnp.array_equal(*(jax.lax.bitcast_convert_type(x, bits) for x in (a, e)))
    return same


@pytest.mark.parametrize("name", STEADY)
def test_a_thousand_gradients_beside_other_work_give_the_same_bits(name):
    case = STEADY[name]
    attend = functools.partial(sparse_attention, mask=case.mask(), implementation="cuda", **case.options)
    step = jax.jit(jax.grad(loss_of(attend), (0, 1, 2)))
    inputs = case.inputs()
    first = step(*inputs)
    assert all(jnp.isfinite(x).all() for x in first)
    same = jax.block_until_ready(still_same(jnp.array(True), first, first))
    with concurrent_load():
        for _ in range(1000):
            same = still_same(same, step(*inputs), first)
        same = bool(same)
    assert same


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
