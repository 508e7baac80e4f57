"""Biases that are not finite, tile numbers that nobody checked, and the operands of biases past every Python check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BlockMask, sparse_attention
from jax_bsk.biases import BlockBias, DenseBias, TileBias
from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.testing.faults import calls, checks, direct
from jax_bsk.qa.testing.faults.boundary import EXPECTED, Changes, check_refused
from jax_bsk.qa.testing.faults.boundary import FAULT as BOUNDARY
from jax_bsk.qa.testing.faults.calls import BLOCK, Operands
from jax_bsk.qa.testing.faults.direct import CAPACITY, B, N, S, T, shape
from jax_bsk.qa.testing.faults.lists import FAULT, LENGTH, POISON, block_mask, check_rows
from jax_bsk.qa.testing.faults.scenario import NATIVE, scenario


def _run(implementation: str, dtype: str, make: Callable[..., Any], array: Any, mask: BlockMask, *data: Any) -> Any:
    """out, lse and the gradients of query, key, value and of `array`, for `make(array, *data)` as the bias."""
    x = Operands.random(dtype, LENGTH, LENGTH)

    @jax.jit
    def step(array: Any, mask: BlockMask, *data: Any) -> Any:
        def forward(query: Any, key: Any, value: Any, array: Any) -> Any:
            named = cast(Implementation, implementation)
            bias = make(array, *data)
            return sparse_attention(query, key, value, bias, mask, implementation=named, return_residual=True)

        (out, lse), pullback = jax.vjp(forward, x.query, x.key, x.value, array)
        names = "out", "lse", "dq", "dk", "dv", "dbias"
        gradients = pullback((jnp.asarray(x.dout), jnp.zeros_like(lse)))
        return dict(zip(names, (out, jnp.swapaxes(lse, 1, 2), *gradients), strict=True))

    return {name: np.asarray(y) for name, y in step(array, *jax.tree.map(jnp.asarray, (mask, *data))).items()}


@scenario(
    "bias-values",
    "NaN or Inf in an input",
    "a bias of NaN or +inf makes NaN of its own rows and their gradients; a row of -inf attends to nothing",
    may_crash=True,
)
def bias_values(implementation: str) -> None:
    mask = block_mask()
    row = 5
    for dtype in calls.dtypes(implementation):
        plain = np.zeros((1, 1, LENGTH, LENGTH), np.float32)
        expected = _run(implementation, dtype, DenseBias, plain, mask)
        others = np.arange(LENGTH) != row
        for value in (np.nan, np.inf):
            bias = plain.copy()
            bias[..., row, :] = value
            results = _run(implementation, dtype, DenseBias, bias, mask)
            for name in ("out", "dq"):
                checks.check_equal(f"{name} ({dtype}, {value})", results[name][:, row], np.nan)
                checks.check_close(
                    f"{name} of others ({dtype})", results[name][:, others], expected[name][:, others], dtype
                )
            checks.check_close(
                f"dbias of others ({dtype})", results["dbias"][..., others, :], expected["dbias"][..., others, :], dtype
            )
        bias = plain.copy()
        bias[..., row, :] = -np.inf
        results = _run(implementation, dtype, DenseBias, bias, mask)
        for name in ("out", "dq"):
            checks.check_equal(f"{name} of nothing ({dtype})", results[name][:, row], 0)
        checks.check_equal(f"dbias of nothing ({dtype})", results["dbias"][..., row, :], 0)
        checks.check_equal(f"lse of nothing ({dtype})", results["lse"][..., row], -np.inf)
        for name in ("dk", "dv"):
            assert np.isfinite(results[name].astype(np.float32)).all(), name


@scenario(
    "bias-tile-numbers",
    FAULT,
    "a traced number that is no tile of a TileBias makes NaN of the rows of its block; a negative one adds nothing",
    may_crash=True,
)
def bias_tile_numbers(implementation: str) -> None:
    mask = block_mask()
    count, row = mask.capacity, 1
    tiles = np.zeros((1, 1, 2, BLOCK, BLOCK), np.float32)
    begin = int(np.asarray(mask.row_offsets)[0, 0, row])
    rows = slice(row * BLOCK, (row + 1) * BLOCK)
    for dtype in calls.dtypes(implementation):
        expected = _run(implementation, dtype, TileBias, tiles, mask, np.zeros(count, np.int32))
        for number in (2, 2**31 - 1, -7, -(2**31)):
            numbers = np.zeros(count, np.int32)
            numbers[begin] = number
            results = _run(implementation, dtype, TileBias, tiles, mask, numbers)
            wrong = number >= 2
            others = np.ones(LENGTH, bool)
            others[rows] = not wrong
            checks.check_close(f"out ({dtype}, {number})", results["out"][:, others], expected["out"][:, others], dtype)
            if wrong:
                bad = np.isnan(results["out"][0, rows].astype(np.float32)).all((1, 2))
                assert bad.any(), f"{number} makes no row NaN"


@scenario(
    "bias-of-bad-lists",
    f"{FAULT}, with a bias",
    "as without; the gradient of the bias may get NaN",
    may_crash=True,
)
def bias_of_bad_lists(implementation: str) -> None:
    for fault, (changes, row) in POISON.items():
        if fault == "decreasing-offsets":  # entries of two rows: `lists` says what becomes of them
            continue
        mask = block_mask(**changes)
        values = np.zeros((1, 2, mask.kv_blocks.shape[-1]), np.float32)
        for dtype in calls.dtypes(implementation):
            results = _run(implementation, dtype, BlockBias, values, mask)
            expected = calls.as_listed(Operands.random(dtype, LENGTH, LENGTH), mask)
            check_rows(results, expected, [row], dtype)


TILES = shape("float32", 1, 1, 1, BLOCK, BLOCK)
NUMBERS = shape("int32", 1, 1, CAPACITY)
OPERANDS: Changes = {
    "dense bias rank": {"dense_bias": shape("float32", N, T, S)},
    "dense bias queries": {"dense_bias": shape("float32", 1, 1, T - 1, S)},
    "dense bias keys": {"dense_bias": shape("float32", 1, 1, 1, S + 1)},
    "dense bias examples": {"dense_bias": shape("float32", B + 1, 1, T, S)},
    "dense bias type": {"dense_bias": shape("float16", 1, 1, T, S)},
    "distances length": {"distance_bias": shape("float32", 1, 1, T + S)},
    "distances type": {"distance_bias": shape("bfloat16", 1, 1, T + S - 1)},
    "bias tiles without numbers": {"bias_tiles": TILES},
    "bias tile size": {"bias_tiles": shape("float32", 1, 1, 1, BLOCK, 2), "row_bias_tiles": NUMBERS},
    "bias tile type": {"bias_tiles": shape("bfloat16", 1, 1, 1, BLOCK, BLOCK), "row_bias_tiles": NUMBERS},
    "bias tile numbers": {"bias_tiles": TILES, "row_bias_tiles": shape("int32", 1, 1, CAPACITY + 1)},
    "bias tile numbers of heads": {"bias_tiles": TILES, "row_bias_tiles": shape("int32", 1, N, CAPACITY)},
    "dropout of 256": {"dropout": np.int64(256)},
    "negative dropout": {"dropout": np.int64(-1)},
    "dropout keys": {"dropout": np.int64(9), "dropout_keys": shape("uint32", B, N - 1)},
    "dropout keys of one example": {"dropout": np.int64(9), "dropout_keys": shape("uint32", 1, N)},
    "dropout keys type": {"dropout": np.int64(9), "dropout_keys": shape("int32", B, N)},
}
GRADIENT: Changes = {
    "term": {"term": np.int64(3)},
    "a term that is not there": {"term": np.int64(0)},
    "dbias shape": {"dbias": shape("float32", 1, 1, T + S - 1)},
    "dbias type": {"dbias": shape("bfloat16", 1, 1, 2, T + S - 1)},
    "delta shape": {"delta": shape("float32", B, T, N)},
}


@scenario("bias-operands", BOUNDARY, EXPECTED, platforms=NATIVE, may_crash=True)
def bias_operands(implementation: str) -> None:
    check_refused(direct.forward_call(implementation), OPERANDS)
    check_refused(direct.backward_call(implementation), OPERANDS)
    gradient = direct.bias_gradient_call(implementation)
    check_refused(gradient, {**{k: v for k, v in OPERANDS.items() if "distance_bias" not in v}, **GRADIENT})
    # Of ones: every probability is 1 / BLOCK, and dO V^T less delta is 0.
    checks.check_equal("dbias", gradient()["dbias"], 0)
    direct.check_unchanged(implementation)


SCENARIOS = (bias_values, bias_tile_numbers, bias_of_bad_lists, bias_operands)
