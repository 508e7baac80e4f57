"""`python -m jax_bsk.testing.worker IMPLEMENTATION`: judges cases that come on standard input, a line a task.

A task is `SEED` or the name of a corner case, and `gradients` behind it if they count. It is answered by lines of
JSON: one a case, {"task", "draw", "ok", "case", "results", "text"}, where a result has its errors as shares of their
bounds, or {"task", "draw", "refused"}; then `null`. A seed has a case for each draw of its shape (see `cases.redraw`):
masks are traced, so that they share two compiled programs, which take far longer than the rest. A process that dies
takes a case with it, which its caller knows (`jax_bsk.validation.numerics`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax

from jax_bsk import UnsupportedError
from jax_bsk.testing.battery import AttentionFn, Judgement, from_public, judge_case
from jax_bsk.testing.cases import CORNER_CASES, DRAWS, Case, random_case, redraw

MAX_LEN = 700  # of random cases; the dense reference and the oracle grow with its square


def judge(task: str, attention: AttentionFn, gradients: bool) -> Iterator[dict[str, Any]]:
    """The records of one task."""
    if task in CORNER_CASES:
        yield _judge(task, 0, CORNER_CASES[task], attention, gradients)
        return
    shape = random_case(int(task), max_len=MAX_LEN)
    for draw in range(DRAWS):
        record = _judge(task, draw, redraw(shape, draw), attention, gradients)
        yield record
        if "refused" in record:
            return


def _judge(task: str, draw: int, case: Case, attention: AttentionFn, gradients: bool) -> dict[str, Any]:
    record = {"task": task, "draw": draw, "gradients": gradients, "case": dataclasses.asdict(case)}
    try:
        judged = judge_case(case, attention, gradients=gradients, traced_mask=True)
    except UnsupportedError as refusal:
        return record | {"refused": str(refusal)}
    except Exception as error:  # a crash inside XLA, say: it is this case's, and the next one can go on
        return record | {"ok": False, "results": [], "text": f"{type(error).__name__}: {error}"[:2000]}
    return record | {"ok": judged.ok, "results": _results(judged), "text": "" if judged.ok else str(judged)}


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
    case = f"--case {task}" if task in CORNER_CASES else f"--seed {task} --draw {draw} --max-len {MAX_LEN}"
    options = f"{case} --traced-mask --implementation {implementation}"
    return f"python -m jax_bsk.testing {options}" + ("" if gradients else " --no-gradients")


def main() -> None:
    attention = from_public(sys.argv[1])
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        for line in sys.stdin:
            task, *rest = line.split()
            for record in itertools.chain(judge(task, attention, bool(rest)), [None]):
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
