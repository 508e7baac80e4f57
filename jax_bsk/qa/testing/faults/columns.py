"""Key-major lists that are wrong: only a caller who fills these fields of a BlockMask by hand can make them so.

The native backwards read them for dk and dv; the pure-JAX implementation does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax_bsk.qa.testing.faults import calls, checks
from jax_bsk.qa.testing.faults.lists import BIG, FAULT, block_mask, check_keys, check_rows, positions
from jax_bsk.qa.testing.faults.scenario import scenario

# The lists that a fault changes, and the key block that it poisons.
POISON: dict[str, tuple[Mapping[str, Sequence[int]], int]] = {
    "id too large": ({"q_blocks": [0, 3, 1, 4, 2, 1, 2, 3]}, 1),
    "id huge": ({"q_blocks": [0, 3, 1, BIG, 2, 1, 2, 3]}, 1),
    "id negative": ({"q_blocks": [0, 3, 1, -1, 2, 1, 2, 3]}, 1),
    "tile too large": ({"col_tiles": [0, 0, 1, -1, 0, -1, -1, -1]}, 1),
    "tile negative": ({"col_tiles": [0, 0, -2, -1, 0, -1, -1, -1]}, 1),
    "overflow": ({"col_offsets": [0, 2, 4, 6, 9]}, 3),
    "overflow by far": ({"col_offsets": [0, 2, 4, 6, BIG]}, 3),
    "negative offset": ({"col_offsets": [-2, 2, 4, 6, 8]}, 0),
}
# Key block 1 has row 2 in the place of row 0.
DISAGREEING = {"q_blocks": [0, 3, 1, 2, 2, 1, 2, 3]}
OF_COLUMNS = f"{FAULT} (of the key-major lists)"


@scenario(
    "bad-columns",
    OF_COLUMNS,
    "never dereferenced; dk and dv of that key block are NaN, or right by an implementation that does not read these "
    "lists; nothing else changes",
    may_crash=True,
)
def bad_columns(implementation: str) -> None:
    read = implementation != "xla"
    for fault, (changes, poisoned) in POISON.items():
        for dtype, results, expected in calls.listed(block_mask(**changes), implementation, as_if=block_mask()):
            check_rows(results, expected, [], dtype)
            check_keys(results, expected, [b for b in range(4) if not (read and b == poisoned)], dtype)
            for name in ("dk", "dv") if read else ():
                what = f"{fault}: {name} of key block {poisoned} ({dtype})"
                checks.check_nan(what, results[name][:, positions(poisoned)])


@scenario(
    "columns-disagree",
    OF_COLUMNS,
    "lists that are in range but no transposition of the others change dk and dv of the key blocks in question alone",
    may_crash=True,
)
def columns_disagree(implementation: str) -> None:
    for dtype, results, expected in calls.listed(block_mask(**DISAGREEING), implementation, as_if=block_mask()):
        check_rows(results, expected, [], dtype)
        check_keys(results, expected, [0, 2, 3], dtype)


@scenario("bad-columns-are-named", OF_COLUMNS, "check() raises for every one of them")
def bad_columns_are_named(implementation: str) -> None:
    del implementation  # check() is the same for all
    faults = {fault: changes for fault, (changes, _) in POISON.items()} | {"disagreement": DISAGREEING}
    accepted = []
    for fault, changes in faults.items():
        try:
            block_mask(**changes).check()
        except ValueError:
            continue
        accepted.append(fault)
    assert not accepted, f"check() accepts key-major lists with: {', '.join(accepted)}"


SCENARIOS = (bad_columns, columns_disagree, bad_columns_are_named)
