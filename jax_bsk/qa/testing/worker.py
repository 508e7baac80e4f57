"""`python -m jax_bsk.qa.testing.worker IMPLEMENTATION`: does tasks that come on standard input, a line each.

Each is answered by lines of JSON, records that have "task", "ok" and "text" at least, and then `null`:

    SEED, NAME [gradients]        random cases of attention, or a corner case, judged by `battery`
    matmul:SEED, matmul:NAME ..   the same of block-sparse products
    decode:SEED, decode:NAME      the same of decoding, which has no gradients
    packed:SEED, packed:NAME ..   the same of packed sequences
    fault:NAME                    a scenario of the fault table
    steady:NAME COUNT [load]      a call again and again, beside other work on the GPU: "ok" where all bits are the same
    growth:NAME COUNT             what so many calls add: "host_growth_kib", "device_growth_bytes"

Records of cases have "draw", "gradients", "case" and "results" too, whose errors are shares of their bounds, or
"refused" with the reason. A seed has a case for each draw of its shape (see `cases.redraw`): masks and lists are
traced, so that they share two compiled programs, which take far longer than the rest. A seed of decoding has one case.
On CUDA each is judged once more on 1, 2, 3 or 7 multiprocessors. A process that dies takes a task with it, which its
caller knows (`isolate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from jax_bsk import UnsupportedError
from jax_bsk.qa.testing import battery, cases, faults, grid, steady
from jax_bsk.qa.testing.decode import battery as decoding
from jax_bsk.qa.testing.decode import cases as decode_cases
from jax_bsk.qa.testing.gpu_load import concurrent_load
from jax_bsk.qa.testing.judgement import Judgement
from jax_bsk.qa.testing.matmul import battery as products
from jax_bsk.qa.testing.matmul import cases as product_cases
from jax_bsk.qa.testing.packed import battery as packed
from jax_bsk.qa.testing.packed import cases as packed_cases

MAX_LEN = 700  # of random cases of attention; the dense reference and the oracle grow with its square
PRODUCT, DECODE, PACKED = "matmul:", "decode:", "packed:"  # before the tasks of other operations than attention
_KITS: dict[str, Any] = {"": cases, PRODUCT: product_cases, DECODE: decode_cases, PACKED: packed_cases}
CORNERS = frozenset(prefix + name for prefix, kit in _KITS.items() for name in kit.CORNER_CASES)
_attention = functools.cache(battery.from_public)


def answer(task: str, implementation: str, words: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The records of one task."""
    kind, _, name = task.partition(":")
    if kind == "fault":
        yield {"task": task} | _fault(faults.SCENARIOS[name], implementation)
    elif kind == "steady":
        with concurrent_load() if "load" in words else contextlib.nullcontext():
            same = steady.repeats_are_equal(steady.STEADY[name], implementation, int(words[0]))
        yield {"task": task, "ok": same, "text": "" if same else "other bits"}
    elif kind == "growth":
        host, device = steady.growth(steady.STEADY[name], implementation, int(words[0]))
        yield {"task": task, "ok": True, "text": "", "host_growth_kib": host, "device_growth_bytes": device}
    else:
        yield from judge(task, implementation, gradients="gradients" in words)


def _fault(scenario: faults.Scenario, implementation: str) -> dict[str, Any]:
    start, text = time.perf_counter(), ""
    try:
        scenario.run(implementation)
    except AssertionError as error:
        traceback.print_exc()
        text = " ".join((str(error) or "AssertionError").split())
    return {"ok": not text, "text": text, "seconds": time.perf_counter() - start}


def judge(task: str, implementation: str, gradients: bool) -> Iterator[dict[str, Any]]:
    """The records of the cases of one task."""
    for draw, case in enumerate(_cases(task, implementation)):
        record = _judge(task, draw, case, implementation, gradients)
        yield record
        if "refused" in record:
            return


def split(task: str) -> tuple[str, str]:
    """The prefix of a task's operation, and its seed or the name of its case."""
    prefix = next((prefix for prefix in (PRODUCT, DECODE, PACKED) if task.startswith(prefix)), "")
    return prefix, task.removeprefix(prefix)


def has_gradients(task: str) -> bool:
    """Whether a task is asked for gradients: corners have them, and every second random shape; decoding has none."""
    prefix, name = split(task)
    return prefix != DECODE and (task in CORNERS or int(name) % 2 == 0)


def _cases(task: str, implementation: str) -> Iterable[Any]:
    prefix, name = split(task)
    if task in CORNERS:
        return [_KITS[prefix].CORNER_CASES[name]]
    if prefix == DECODE:
        return [decode_cases.random_case(int(name))]
    if prefix == PACKED:
        shape = packed_cases.random_case(int(name))
        return (packed_cases.redraw(shape, draw) for draw in range(packed_cases.DRAWS))
    if prefix != PRODUCT:
        shape = cases.random_case(int(name), max_len=MAX_LEN)
        return (cases.redraw(shape, draw) for draw in range(cases.DRAWS))
    first = product_cases.random_case(int(name), implementation)
    # Constant lists are other programs in every draw.
    return (
        product_cases.redraw(first, draw) for draw in range(1 if first.lists == "constant" else product_cases.DRAWS)
    )


def _judge(task: str, draw: int, case: Any, implementation: str, gradients: bool) -> dict[str, Any]:
    prefix, _ = split(task)
    is_product = prefix == PRODUCT
    # The gradients of a product whose lists make no sense are not defined.
    gradients = gradients and not (is_product and case.fault)
    record = {"task": task, "draw": draw, "gradients": gradients, "case": dataclasses.asdict(case)}
    options: dict[str, Any] = {"gradients": gradients, "multiprocessors": limit(task, draw, implementation)}
    try:
        if prefix == DECODE:
            judged = decoding.judge_case(case, implementation, multiprocessors=options["multiprocessors"])
        elif prefix == PACKED:
            judged = packed.judge_case(case, implementation, **options)
        elif is_product:
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
    number = len(task) if task in CORNERS else int(split(task)[1])
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
    prefix, name = split(task)
    multiprocessors = limit(task, draw, implementation)
    limited = "" if multiprocessors is None else f" --multiprocessors {multiprocessors}"
    if prefix == DECODE:
        case = f"--case {name}" if task in CORNERS else f"--cases 1 --seed {name}"
        return f"python -m jax_bsk.qa.testing.decode {case} --implementation {implementation}{limited}"
    case = f"--case {name}" if task in CORNERS else f"--seed {name} --draw {draw}"
    if prefix in (PRODUCT, PACKED):
        case = f"{prefix.removesuffix(':')} {case}"
    else:
        case += ("" if task in CORNERS else f" --max-len {MAX_LEN}") + " --traced-mask"
    command = f"python -m jax_bsk.qa.testing {case} --implementation {implementation}"
    return command + ("" if gradients else " --no-gradients") + limited


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        for line in sys.stdin:
            task, *words = line.split()
            for record in itertools.chain(answer(task, sys.argv[1], words), [None]):
                print(json.dumps(record), file=answers, flush=True)


if __name__ == "__main__":
    main()
