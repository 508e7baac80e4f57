"""Block lists that nobody checked, as a traced computation could make them: ids, tiles, offsets, counts, empty rows.

The kernel may answer NaN for a row that it cannot follow, and must not do anything else: a pointer made of such an id
is out of bounds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_bsk import BlockMask
from jax_bsk.qa.testing.faults import calls, checks
from jax_bsk.qa.testing.faults.calls import BLOCK, Operands
from jax_bsk.qa.testing.faults.scenario import Scenario, scenario

LENGTH = 4 * BLOCK
BIG = 2**31 - 1
# Four rows of blocks with two entries each, the first of them partial; and the same by key block.
ROW_LISTS = {
    "row_offsets": [0, 2, 4, 6, 8],
    "kv_blocks": [0, 1, 1, 2, 2, 3, 0, 3],
    "tiles": [0, -1, 0, -1, 0, -1, 0, -1],
}
COLUMN_LISTS = {
    "col_offsets": [0, 2, 4, 6, 8],
    "q_blocks": [0, 3, 1, 0, 2, 1, 2, 3],
    "col_tiles": [0, 0, 0, -1, 0, -1, -1, -1],
}

FAULT = "id out of range, overflowing list, counts that disagree"
EXPECTED = "never dereferenced; that row is NaN (out, lse, dq); check() names it; nothing else changes"
# The lists that a fault changes, and the row of blocks that it poisons.
POISON: dict[str, tuple[Mapping[str, Sequence[int]], int]] = {
    "id-too-large": ({"kv_blocks": [0, 1, 1, 4, 2, 3, 0, 3]}, 1),
    "id-huge": ({"kv_blocks": [0, 1, 1, BIG, 2, 3, 0, 3]}, 1),
    "id-negative": ({"kv_blocks": [0, 1, 1, -1, 2, 3, 0, 3]}, 1),
    "id-most-negative": ({"kv_blocks": [0, 1, 1, -BIG - 1, 2, 3, 0, 3]}, 1),
    "tile-too-large": ({"tiles": [0, -1, 1, -1, 0, -1, 0, -1]}, 1),
    "tile-negative": ({"tiles": [0, -1, -2, -1, 0, -1, 0, -1]}, 1),
    "overflow": ({"row_offsets": [0, 2, 4, 6, 9]}, 3),
    "overflow-by-far": ({"row_offsets": [0, 2, 4, 6, BIG]}, 3),
    "negative-offset": ({"row_offsets": [-2, 2, 4, 6, 8]}, 0),
    "decreasing-offsets": ({"row_offsets": [0, 2, 1, 6, 8]}, 1),
}


def block_mask(**changes: Sequence[int]) -> BlockMask:
    """The lists above with some of them changed; those by key block only where one of them is."""
    lists: dict[str, Any] = {**ROW_LISTS, **(COLUMN_LISTS if changes.keys() & COLUMN_LISTS.keys() else {}), **changes}
    arrays: dict[str, Any] = dict.fromkeys(COLUMN_LISTS)
    arrays |= {name: np.array([[numbers]], np.int32) for name, numbers in lists.items()}
    bits = np.random.default_rng(0).integers(0, 2**32, (1, 1, 1, BLOCK, BLOCK // 32), dtype=np.uint32)
    return BlockMask(**arrays, bit_tiles=bits, block_q=BLOCK, block_kv=BLOCK, q_len=LENGTH, kv_len=LENGTH)


def positions(block: int) -> slice:
    """Queries or keys of a block."""
    return slice(BLOCK * block, BLOCK * (block + 1))


def check_rows(results: Mapping[str, Any], expected: Mapping[str, Any], poisoned: Iterable[int], dtype: str) -> None:
    """out, lse and dq are NaN in these rows of blocks and as expected in the others."""
    poisoned = tuple(poisoned)
    for row in range(LENGTH // BLOCK):
        part = positions(row)
        for name, at in (("out", (slice(None), part)), ("lse", (..., part)), ("dq", (slice(None), part))):
            what = f"{name} of row {row} ({dtype})"
            if row in poisoned:
                checks.check_nan(what, results[name][at])
            else:
                checks.check_close(what, results[name][at], expected[name][at], dtype)


def check_keys(results: Mapping[str, Any], expected: Mapping[str, Any], blocks: Iterable[int], dtype: str) -> None:
    """dk and dv of these key blocks are as expected."""
    for block in blocks:
        for name in ("dk", "dv"):
            actual, wanted = (x[name][:, positions(block)] for x in (results, expected))
            checks.check_close(f"{name} of key block {block} ({dtype})", actual, wanted, dtype)


def check_named(mask: BlockMask, row: int) -> None:
    """check() raises and names the row."""
    checks.check_raises("check()", mask.check, ValueError, rf"\brow {row}\b")


def _poison(implementation: str, *, fault: str) -> None:
    changes, row = POISON[fault]
    mask = block_mask(**changes)
    # Key blocks that the poisoned row lists may get NaN from it; the others may not.
    spared = set(range(LENGTH // BLOCK)) - set(ROW_LISTS["kv_blocks"][2 * row : 2 * row + 2])
    for dtype, results, expected in calls.listed(mask, implementation):
        poisoned = [row]
        if fault == "decreasing-offsets":
            # The rows after it share entries: together they may name more than there are, which may poison them too.
            later = range(row + 1, LENGTH // BLOCK)
            poisoned += [r for r in later if np.isnan(results["out"][:, positions(r)]).all()]
        else:
            check_keys(results, expected, spared, dtype)
        check_rows(results, expected, poisoned, dtype)
    check_named(mask, row)


def _poisons() -> list[Scenario]:
    overlap = {"decreasing-offsets": "; rows after it, whose entries overlap, are as listed or NaN"}
    return [
        scenario(fault, FAULT, EXPECTED + overlap.get(fault, ""), may_crash=True)(
            functools.partial(_poison, fault=fault)
        )
        for fault in POISON
    ]


@scenario("bad-list-as-a-constant", FAULT, EXPECTED, may_crash=True)
def bad_list_as_a_constant(implementation: str) -> None:
    """Lists whose values are known when the call is traced: some paths trim and transpose them then."""
    mask = block_mask(kv_blocks=[0, 1, 1, BIG, 2, 3, 0, 3])
    lengths = np.array([[LENGTH, LENGTH]], np.int32)
    step = jax.jit(functools.partial(calls.call, mask=mask, lengths=lengths, implementation=implementation))
    for dtype in calls.dtypes(implementation):
        operands = Operands.random(dtype, LENGTH, LENGTH)
        results = step(operands.query, operands.key, operands.value, operands.dout)
        results = {name: np.asarray(x) for name, x in results.items()}
        expected = calls.as_listed(operands, mask)
        check_rows(results, expected, [1], dtype)
        check_keys(results, expected, [0, 3], dtype)
    check_named(mask, 1)


@scenario("no-room", FAULT, EXPECTED, may_crash=True)
def no_room(implementation: str) -> None:
    """A traced mask that visits more blocks than its max_blocks."""
    build = functools.partial(BlockMask.from_block_mask, q_len=LENGTH, block_size=BLOCK)
    blocks = np.tri(LENGTH // BLOCK, dtype=bool)  # rows of 1, 2, 3 and 4; there is room for the first three
    mask = jax.jit(functools.partial(build, max_blocks=6))(blocks)
    for dtype, results, expected in calls.listed(mask, implementation, as_if=build(blocks)):
        check_rows(results, expected, [3], dtype)
    check_named(mask, 3)


@scenario("count-disagrees", FAULT, EXPECTED, may_crash=True)
def count_disagrees(implementation: str) -> None:
    """Traced index lists with a count above their width and a negative one."""
    ids = np.array([[0, 1], [1, 2], [2, 3], [0, 3]])
    mask = _from_indices(ids, np.array([2, 5, -1, 2]))
    for dtype, results, expected in calls.listed(mask, implementation, as_if=_from_indices(ids, np.full(4, 2))):
        check_rows(results, expected, [1, 2], dtype)
    check_named(mask, 1)


@jax.jit
def _from_indices(ids: Any, counts: Any) -> BlockMask:
    return BlockMask.from_indices(ids, counts, q_len=LENGTH, block_size=BLOCK)


@scenario("duplicates-on-the-host", "duplicate or unsorted ids", "rejected when built on the host, naming the row")
def duplicates_on_the_host(implementation: str) -> None:
    del implementation  # there is no call yet
    for words, row in {"twice": [0, 0], "sort them": [1, 0], r"outside \[0, 2\)": [0, 9]}.items():
        lists, sizes = (np.array([[0, 1], row]), np.array([2, 2])), {"q_len": 2 * BLOCK, "block_size": BLOCK}
        build = functools.partial(BlockMask.from_indices, *lists, **sizes)
        checks.check_raises(f"ids {row}", build, ValueError, rf"row 1\b.*{words}")


@scenario("duplicates-when-traced", "duplicate or unsorted ids", "visited as listed when traced", may_crash=True)
def duplicates_when_traced(implementation: str) -> None:
    rows, counts = [[0, 0, 2], [3, 1, 0], [2, 2, 2], [1, 3, 1]], [2, 3, 3, 2]
    mask = _from_indices(np.array(rows), np.array(counts))
    listed = [[i for i, _ in calls.listed_entries(mask, row) or []] for row in range(4)]
    assert listed == [ids[:n] for ids, n in zip(rows, counts, strict=True)], f"the lists hold {listed}"
    for dtype, results, expected in calls.listed(mask, implementation):
        check_rows(results, expected, [], dtype)
        check_keys(results, expected, range(4), dtype)


@scenario("empty-row", "empty row", "output 0, LSE -inf, gradients 0")
def empty_row(implementation: str) -> None:
    """A row of blocks that visits nothing, and queries in visited blocks that attend to nothing; keys likewise."""
    dense = np.random.default_rng(1).random((LENGTH, LENGTH)) < 0.3
    dense[positions(1)] = dense[2 * BLOCK + 5] = dense[-1] = False
    dense[:, positions(2)] = dense[:, 7] = False
    empty, unseen = ~dense.any(1), ~dense.any(0)
    mask = BlockMask.from_dense(dense, block_size=BLOCK)
    for dtype, results, expected in calls.listed(mask, implementation):
        for name, where in (("out", empty), ("dq", empty), ("dk", unseen), ("dv", unseen)):
            checks.check_equal(f"{name} ({dtype})", results[name][:, where], 0)
        checks.check_equal(f"lse ({dtype})", results["lse"][..., empty], -np.inf)
        check_rows(results, expected, [], dtype)
        check_keys(results, expected, range(4), dtype)


SCENARIOS = (
    *_poisons(),
    bad_list_as_a_constant,
    no_room,
    count_disagrees,
    duplicates_on_the_host,
    duplicates_when_traced,
    empty_row,
)
