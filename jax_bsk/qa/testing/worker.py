"""`python -m jax_bsk.qa.testing.worker IMPLEMENTATION`: judges cases that come on standard input, a line a task.

A task is `SEED` or the name of a corner case, with `matmul:` before those of block-sparse products, and `gradients`
behind it if they count. It is answered by lines of JSON: one a case, {"task", "draw", "ok", "case", "results", "text"},
where a result has its errors as shares of their bounds, or {"task", "draw", "refused"}; then `null`. A seed has a case
for each draw of its shape (see `cases.redraw`): masks and lists are traced, so that they share two compiled programs,
which take far longer than the rest. On CUDA each is judged once more on 1, 2, 3 or 7 multiprocessors. A process that
dies takes a case with it, which its caller knows (`jax_bsk.qa.validation.numerics`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jax_bsk import UnsupportedError
from jax_bsk.qa.testing import battery, cases, grid
from jax_bsk.qa.testing.judgement import Judgement
from jax_bsk.qa.testing.matmul import battery as products
from jax_bsk.qa.testing.matmul import cases as product_cases

MAX_LEN = 700  # of random cases of attention; the dense reference and the oracle grow with its square
PRODUCT = "matmul:"
CORNERS = frozenset([*cases.CORNER_CASES, *(PRODUCT + name for name in product_cases.CORNER_CASES)])
_attention = functools.cache(battery.from_public)


def judge(task: str, implementation: str, gradients: bool) -> Iterator[dict[str, Any]]:
    """The records of one task."""
    for draw, case in enumerate(_cases(task, implementation)):
        record = _judge(task, draw, case, implementation, gradients)
        yield record
        if "refused" in record:
            return


def _cases(task: str, implementation: str) -> Iterable[Any]:
    name = task.removeprefix(PRODUCT)
    if task in CORNERS:
        return [(product_cases if task.startswith(PRODUCT) else cases).CORNER_CASES[name]]
    if not task.startswith(PRODUCT):
        shape = cases.random_case(int(name), max_len=MAX_LEN)
        return (cases.redraw(shape, draw) for draw in range(cases.DRAWS))
    first = product_cases.random_case(int(name), implementation)
    # Constant lists are other programs in every draw.
    return (
        product_cases.redraw(first, draw) for draw in range(1 if first.lists == "constant" else product_cases.DRAWS)
    )


def _judge(task: str, draw: int, case: Any, implementation: str, gradients: bool) -> dict[str, Any]:
    is_product = task.startswith(PRODUCT)
    # The gradients of a product whose lists make no sense are not defined.
    gradients = gradients and not (is_product and case.fault)
    record = {"task": task, "draw": draw, "gradients": gradients, "case": dataclasses.asdict(case)}
    options: dict[str, Any] = {"gradients": gradients, "multiprocessors": limit(task, draw, implementation)}
    try:
        if is_product:
            judged = products.judge_case(case, implementation, **options)
        else:
            judged = battery.judge_case(case, _attention(implementation), traced_mask=True, **options)
    except UnsupportedError as refusal:
        return record | {"refused": str(refusal)}
    except Exception as error:  # a crash inside XLA, say: it is this case's, and the next one can go on
        return record | {"ok": False, "results": [], "text": f"{type(error).__name__}: {error}"[:2000]}
    return record | {"ok": judged.ok, "results": _results(judged), "text": "" if judged.ok else str(judged)}


def limit(task: str, draw: int, implementation: str) -> int | None:
    """The multiprocessors that a case is judged once more on; None for the CPU."""
    number = len(task) if task in CORNERS else int(task.removeprefix(PRODUCT))
    return grid.LIMITS[(number + draw) % len(grid.LIMITS)] if implementation == "cuda" else None


def _results(judged: Judgement) -> list[dict[str, Any]]:
    def share(error: float, bound: float) -> float:
        return error / bound if bound else float(error > 0)

    return [
        {
            "name": c.name,
            "max_share": share(c.max_error, c.max_bound),
            "mean_share": share(c.mean_error, c.mean_bound),
            "max_error": c.max_error,
        }
        for c in judged.comparisons
    ]


def repro(task: str, draw: int, implementation: str, gradients: bool) -> str:
    """The command that judges one case alone."""
    name = task.removeprefix(PRODUCT)
    case = f"--case {name}" if task in CORNERS else f"--seed {name} --draw {draw}"
    if task.startswith(PRODUCT):
        command = f"python -m jax_bsk.qa.testing.matmul {case}"
    else:
        length = "" if task in CORNERS else f" --max-len {MAX_LEN}"
        command = f"python -m jax_bsk.qa.testing {case}{length} --traced-mask"
    command += f" --implementation {implementation}" + ("" if gradients else " --no-gradients")
    multiprocessors = limit(task, draw, implementation)
    return command if multiprocessors is None else f"{command} --multiprocessors {multiprocessors}"


def main() -> None:
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        for line in sys.stdin:
            task, *rest = line.split()
            for record in itertools.chain(judge(task, sys.argv[1], bool(rest)), [None]):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
