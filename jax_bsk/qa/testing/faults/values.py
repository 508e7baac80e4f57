"""NaN and infinities in the inputs: a product with a zero probability would carry them to rows that never asked."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jax_bsk import BlockMask
from jax_bsk.masks import FullMask
from jax_bsk.qa.testing.faults import calls, checks
from jax_bsk.qa.testing.faults.calls import BLOCK, Operands
from jax_bsk.qa.testing.faults.scenario import Scenario, scenario

FAULT = "NaN or Inf in an input"
LENGTH = 3 * BLOCK
POSITION = BLOCK + 9
BAD = (np.nan, np.inf, -np.inf)


def _not_finite(argument: str) -> Scenario:
    @scenario(f"not-finite-{argument}", FAULT, "reaches only the rows that attend to it, and the gradients of these")
    def run(implementation: str) -> None:
        # Causal with holes: whichever block the bad position is in, there are queries that do not attend to it.
        dense: Any = np.tril(np.random.default_rng(0).random((LENGTH, LENGTH)) < 0.5)
        block_mask = BlockMask.from_dense(dense, block_size=BLOCK)
        attends = dense.any(1)
        touched = (np.arange(LENGTH) == POSITION if argument == "query" else dense[:, POSITION]) & attends
        clean_keys = ~dense[touched].any(0)  # no query of theirs is touched
        clean_keys[POSITION] = False
        for dtype in calls.dtypes(implementation):
            operands = Operands.random(dtype, LENGTH, LENGTH)
            expected = calls.attend(operands, block_mask, implementation)
            for bad in BAD:
                array = getattr(operands, argument).copy()
                array[:, POSITION] = bad
                results = calls.attend(dataclasses.replace(operands, **{argument: array}), block_mask, implementation)
                what = f"{bad} in {argument} ({dtype})"
                for name, clean in (("out", ~touched), ("dq", ~touched), ("dk", clean_keys), ("dv", clean_keys)):
                    checks.check_close(f"{name}, {what}", results[name][:, clean], expected[name][:, clean], dtype)
                reached = ~np.isfinite(results["out"][:, touched].astype(np.float32)).all(-1)
                assert reached.all(), f"out, {what}: {(~reached).sum()} of {reached.size} rows that attend are finite"

    return run


@scenario(
    "not-finite-beyond-the-lengths", FAULT, "reaches nothing: queries and keys past the lengths are not looked at"
)
def not_finite_beyond_the_lengths(implementation: str) -> None:
    q_end, kv_end = LENGTH - 26, BLOCK + 18
    lengths = [[LENGTH, LENGTH], [q_end, kv_end]]
    mask = FullMask().bind(LENGTH, block_size=BLOCK)
    for dtype in calls.dtypes(implementation):
        operands = Operands.random(dtype, LENGTH, LENGTH, batch=2)
        expected = calls.attend(operands, mask, implementation, lengths)
        for bad in BAD:
            ends = {"query": q_end, "key": kv_end, "value": kv_end}
            spoiled = {name: getattr(operands, name).copy() for name in ends}
            for name, end in ends.items():
                spoiled[name][1, end:] = bad
            results = calls.attend(dataclasses.replace(operands, **spoiled), mask, implementation, lengths)
            for name, beyond in (("out", q_end), ("dq", q_end), ("dk", kv_end), ("dv", kv_end)):
                what = f"{name}, {bad} ({dtype})"
                checks.check_close(what, results[name], expected[name], dtype)
                checks.check_equal(f"{what} beyond", results[name][1, beyond:], 0)


SINKS = {"+inf": np.inf, "-inf": -np.inf, "NaN": np.nan}


@scenario("not-finite-sinks", FAULT, "+inf: rows attend to their sink alone; -inf: none; NaN: rows are NaN")
def not_finite_sinks(implementation: str) -> None:
    dense = np.tril(np.ones((LENGTH, LENGTH), bool))
    dense[5] = dense[2 * BLOCK :] = False  # an empty row, and an empty row of blocks
    attends = dense.any(1)
    mask = BlockMask.from_dense(dense, block_size=BLOCK)
    gates = np.full((1, 1, mask.kv_blocks.shape[-1]), 0.5, np.float32)
    for dtype in calls.dtypes(implementation):
        operands = Operands.random(dtype, LENGTH, LENGTH)
        for some_gates in (None, gates):
            expected = calls.attend(operands, mask, implementation, gates=some_gates)
            for name, bad in SINKS.items():
                sinks = np.array([bad, -np.inf], np.float32)
                results = calls.attend(operands, mask, implementation, gates=some_gates, sinks=sinks)
                other = f"head without a sink, {name} ({dtype})"
                for result in ("out", "dq", "dk", "dv"):
                    checks.check_close(
                        f"{result} of the {other}", results[result][:, :, 1], expected[result][:, :, 1], dtype
                    )
                checks.check_equal(f"dsinks of the {other}", results["dsinks"][1], 0)
                what = f"{name} ({dtype})"
                own = {result: results[result][:, :, 0] for result in ("out", "dq", "dk", "dv")}
                if name == "NaN":
                    checks.check_nan(f"out, {what}", own["out"])
                    checks.check_nan(f"lse, {what}", results["lse"][:, 0])
                    checks.check_nan(f"dq, {what}", own["dq"][:, attends])
                elif name == "-inf":
                    checks.check_close(f"lse, {what}", results["lse"], expected["lse"], dtype)
                    checks.check_close(f"out, {what}", own["out"], expected["out"][:, :, 0], dtype)
                else:
                    checks.check_equal(f"lse, {what}", results["lse"][:, 0], np.inf)
                    checks.check_equal(f"dsinks, {what}", results["dsinks"], 0)
                    for result, array in own.items():
                        checks.check_equal(f"{result}, {what}", array, 0)
                    if some_gates is not None:  # one gate for both heads: the other one's part is left
                        checks.check_finite(f"dgates, {what}", results["dgates"])


SCENARIOS = (
    *(_not_finite(name) for name in ("query", "key", "value")),
    not_finite_beyond_the_lengths,
    not_finite_sinks,
)
