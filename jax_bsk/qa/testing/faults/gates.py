"""Gates whose lists nobody checked, and gates that are not finite."""

from __future__ import annotations

import numpy as np

from jax_bsk import BlockMask
from jax_bsk.qa.testing.faults import calls, checks, direct
from jax_bsk.qa.testing.faults.calls import BLOCK, Operands
from jax_bsk.qa.testing.faults.lists import FAULT, LENGTH, POISON, block_mask, check_keys, check_rows, positions
from jax_bsk.qa.testing.faults.scenario import NATIVE, scenario

BLOCKS = LENGTH // BLOCK


def _gates(mask: BlockMask) -> np.ndarray:
    shape = (1, 2, mask.kv_blocks.shape[-1])
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


@scenario(
    "gates-of-bad-lists",
    f"{FAULT}, with gates",
    "as without; the gates of the row, and of key blocks it lists, may get NaN, those of no row get 0, the others what "
    "is due",
    may_crash=True,
)
def gates_of_bad_lists(implementation: str) -> None:
    for fault, (changes, row) in POISON.items():
        if fault == "decreasing-offsets":  # entries of two rows: `lists` says what becomes of them
            continue
        mask = block_mask(**changes)
        ids, gates = mask.kv_blocks[0, 0], _gates(mask)
        listed = set(block_mask().kv_blocks[0, 0, 2 * row : 2 * row + 2])
        row_of_entry = np.arange(ids.size) // 2
        spared = (row_of_entry != row) & ~np.isin(ids, list(listed))
        for dtype, results, expected in calls.listed(mask, implementation, gates):
            check_rows(results, expected, [row], dtype)
            check_keys(results, expected, set(range(BLOCKS)) - listed, dtype)
            actual, wanted = results["dgates"], expected["dgates"]
            checks.check_close(f"{fault}: dgates ({dtype})", actual[..., spared], wanted[..., spared], dtype)
            rest = (row_of_entry != row) & ~spared & ~np.isnan(actual[0, 0])
            checks.check_close(f"{fault}: dgates of its key blocks", actual[..., rest], wanted[..., rest], dtype)


@scenario(
    "gates-of-padding",
    f"{FAULT}, with gates",
    "what stands behind the last entry, lists and gates, changes nothing, and its gradient is 0",
    may_crash=True,
)
def gates_of_padding(implementation: str) -> None:
    rows = {"row_offsets": [0, 2, 4, 6, 7], "kv_blocks": [0, 1, 1, 2, 2, 3, 0, 3, -7, 99], "tiles": [0, -1] * 5}
    mask = block_mask(**rows)
    gates = _gates(mask)
    gates[..., 7:] = np.nan
    for dtype, results, expected in calls.listed(mask, implementation, gates):
        check_rows(results, expected, [], dtype)
        check_keys(results, expected, range(BLOCKS), dtype)
        checks.check_close(f"dgates ({dtype})", results["dgates"], expected["dgates"], dtype)
        checks.check_equal(f"dgates of padding ({dtype})", results["dgates"][..., 7:], 0)


@scenario("gates-of-duplicates", "duplicate or unsorted ids, with gates", "each entry has its own", may_crash=True)
def gates_of_duplicates(implementation: str) -> None:
    rows = {"kv_blocks": [0, 0, 2, 1, 2, 2, 3, 0], "tiles": [0, -1, -1, 0, -1, -1, 0, -1]}
    longer = {**rows, "row_offsets": [0, 6, 7, 8, 8]}  # than there are blocks of keys
    longest = {**longer, "kv_blocks": [2] * 8}  # a column that is longer than there are blocks of queries, too
    for mask in (block_mask(**rows), block_mask(**longer), block_mask(**longest)):
        for dtype, results, expected in calls.listed(mask, implementation, _gates(mask)):
            check_rows(results, expected, [], dtype)
            check_keys(results, expected, range(BLOCKS), dtype)
            checks.check_close(f"dgates ({dtype})", results["dgates"], expected["dgates"], dtype)


@scenario(
    "overlapping-rows",
    f"{FAULT} (decreasing offsets), with and without gates",
    "rows whose own offsets are in order are as listed; dk, dv and dgates count an entry for the first row that has "
    "it; repeats give the same bits",
    platforms=NATIVE,
    may_crash=True,
)
def overlapping_rows(implementation: str) -> None:
    mask, first = block_mask(row_offsets=[0, 6, 2, 6, 8]), block_mask(row_offsets=[0, 6, 6, 6, 8])
    for gates in (None, _gates(mask)):
        for dtype in calls.dtypes(implementation):
            operands = Operands.random(dtype, LENGTH, LENGTH)
            results = calls.attend(operands, mask, implementation, gates=gates)
            check_rows(results, calls.as_listed(operands, mask, gates), [1], dtype)
            expected = calls.as_listed(operands, first, gates)
            check_keys(results, expected, range(BLOCKS), dtype)
            if gates is not None:
                checks.check_close(f"dgates ({dtype})", results["dgates"], expected["dgates"], dtype)
            for _ in range(10):
                again = calls.attend(operands, mask, implementation, gates=gates)
                for name, x in results.items():
                    checks.check_equal(f"{name} once more ({dtype})", again[name], x.astype(np.float64))


@scenario(
    "gates-of-bad-columns",
    f"{FAULT} (of the key-major lists), with gates",
    "dgates of an entry that no column has are 0, that two have NaN, of a column with a bad id NaN; the others what is "
    "due; repeats give the same bits",
    platforms=NATIVE,
    may_crash=True,
)
def gates_of_bad_columns(implementation: str) -> None:
    """Past the public function, which makes these lists itself where there are gates."""
    run = direct.gated_columns(implementation, 6)
    due, nan = BLOCK * direct.H, np.nan  # of any block: BLOCK rows of probabilities 1 / BLOCK, and products of H ones
    for what, offsets, ids, dgates, dvalue in (
        ("columns 0 and 2 overlap", [0, 4, 2, 5], [0, 1, 0, 1, 0, 9], [due, due, nan, nan, due, 0], [4, nan, 3]),
        ("all columns overlap", [0, 6, 0, 6], [0, 1, 0, 1, 0, 1], [nan] * 6, [6, nan, 6]),
        ("negative offset", [-1, 2, 4, 5], [0, 1, 0, 1, 0, 1], [0, 0, due, due, due, 0], [nan, 2, 1]),
        ("overflow", [1, 2, 4, 7], [0, 1, 0, 1, 0, 1], [0, due, due, due, 0, 0], [1, 2, nan]),
        ("bad id", [0, 2, 3, 5], [0, 1, 0, 1, 9, 9], [due, due, due, nan, nan, 0], [2, 1, nan]),
    ):
        results = run(offsets, ids)
        by_key = np.repeat(np.array(dvalue), BLOCK)[:, None, None]
        for name, wanted in (("dgates", np.array(dgates)), ("dvalue", by_key)):
            actual = np.asarray(results[name])
            wanted = np.broadcast_to(wanted, actual.shape)
            checks.check_equal(f"{what}: NaN in {name}", np.isnan(actual), np.isnan(wanted))
            checks.check_close(f"{what}: {name}", np.nan_to_num(actual), np.nan_to_num(wanted))
        for _ in range(10):
            again = run(offsets, ids)
            for name in ("dquery", "dkey", "dvalue", "dgates"):
                checks.check_equal(f"{what}: {name} once more", again[name], np.asarray(results[name], np.float64))


@scenario(
    "not-finite-gates",
    "NaN or Inf in an input",
    "reaches only the rows that attend to something in its block, and the gradients of these; no log-sum-exp",
)
def not_finite_gates(implementation: str) -> None:
    mask = block_mask()
    row, entry = 1, 2  # the row's first, which is partial
    gates = _gates(mask)
    dense = np.asarray(mask.to_dense())[0, 0]
    touched = np.zeros(LENGTH, bool)
    touched[positions(row)] = dense[positions(row), positions(int(mask.kv_blocks[0, 0, entry]))].any(1)
    reached = set(mask.kv_blocks[0, 0, 2 * row : 2 * row + 2].tolist())  # key blocks that these rows attend to
    others = np.arange(gates.shape[-1]) // 2 != row
    for dtype in calls.dtypes(implementation):
        operands = Operands.random(dtype, LENGTH, LENGTH)
        expected = calls.attend(operands, mask, implementation, gates=gates)
        for bad in (np.nan, np.inf, -np.inf):
            spoiled = gates.copy()
            spoiled[..., entry] = bad
            results = calls.attend(operands, mask, implementation, gates=spoiled)
            what = f"{bad} in a gate ({dtype})"
            for name in ("out", "dq"):
                checks.check_close(f"{name}, {what}", results[name][:, ~touched], expected[name][:, ~touched], dtype)
            checks.check_close(f"lse, {what}", results["lse"], expected["lse"], dtype)
            check_keys(results, expected, set(range(BLOCKS)) - reached, dtype)
            checks.check_close(
                f"dgates, {what}", results["dgates"][..., others], expected["dgates"][..., others], dtype
            )
            finite = np.isfinite(results["out"][:, touched].astype(np.float32)).all(-1)
            assert not finite.any(), f"out, {what}: {finite.sum()} of {finite.size} rows that attend are finite"


SCENARIOS = (
    gates_of_bad_lists,
    gates_of_padding,
    gates_of_duplicates,
    overlapping_rows,
    gates_of_bad_columns,
    not_finite_gates,
)
