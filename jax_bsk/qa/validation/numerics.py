"""Stage validate: every corner case and seeded random ones against float64, by the tolerance rules.

Of attention, of block-sparse products, of decoding and of packed sequences; tasks of the last three have
`worker.PRODUCT`, `worker.DECODE` and `worker.PACKED` before their names. Cases run in worker processes beside each
other. One that kills its worker or hangs fails, with the command that repeats it, and a new worker goes on.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jax_bsk.qa.support import environment
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.testing import worker
from jax_bsk.qa.testing.cases import CORNER_CASES
from jax_bsk.qa.testing.decode.cases import CORNER_CASES as DECODE_CORNERS
from jax_bsk.qa.testing.isolate import Worker
from jax_bsk.qa.testing.matmul.cases import CORNER_CASES as PRODUCT_CORNERS
from jax_bsk.qa.testing.packed.cases import CORNER_CASES as PACKED_CORNERS
from jax_bsk.qa.validation import provenance
from jax_bsk.qa.validation.outcome import Check, StageResult, failed, passed, skipped
from jax_bsk.qa.validation.settings import CASES, DECODING, PACKED, PRODUCTS, Clock, Level, Settings

CASE_SECONDS = 120  # after which a case counts as hung
STEPS = 20  # of the progress through random cases
BINS = 20  # of the histogram of shares of the bound


@dataclasses.dataclass(frozen=True)
class Suite:
    """The cases of one operation.

    Attributes:
      title: before the names of its checks.
      name: of its facts and its table; none for attention, whose are the stage's own.
      prefix: of its tasks.
      corners: names of corner cases that are run.
      wanted: random cases.
      required: random cases without which it is no pass.
    """

    title: str
    name: str
    prefix: str
    corners: tuple[str, ...]
    wanted: int
    required: int

    def has(self, record: dict[str, Any]) -> bool:
        return worker.split(record["task"])[0] == self.prefix


def suites(settings: Settings, implementation: str) -> tuple[Suite, Suite, Suite, Suite]:
    """Attention, products, decoding and packed sequences."""
    usual = CASES[implementation, settings.level]
    count = settings.cases or usual
    # Without a GPU a quick run leaves these corners to the tests: they are a program each.
    skipped_corners = (implementation, settings.level) == ("cpu", Level.QUICK)

    def other(title: str, name: str, prefix: str, corners: Iterable[str], table: dict[Any, int]) -> Suite:
        required = table[implementation, settings.level]
        chosen = () if skipped_corners else tuple(corners)
        return Suite(title, name, prefix, chosen, max(required, count // 5), required)

    return (
        Suite("", "", "", tuple(CORNER_CASES), count, max(count, usual)),
        other("products: ", "matmul", worker.PRODUCT, PRODUCT_CORNERS, PRODUCTS),
        other("decoding: ", "decode", worker.DECODE, DECODE_CORNERS, DECODING),
        other("packed: ", "packed", worker.PACKED, PACKED_CORNERS, PACKED),
    )


def run(settings: Settings, clock: Clock) -> StageResult:
    """Corner cases, then random ones, in workers beside each other."""
    implementation = provenance.implementation()
    all_suites = suites(settings, implementation)
    first, total = sum(len(suite.corners) for suite in all_suites), sum(suite.wanted for suite in all_suites)
    records = []
    with Progress(1 + STEPS, settings.quiet) as progress:
        progress.step("corner cases")
        for record in _answers(settings, clock, implementation, all_suites):
            if progress.done <= STEPS and (len(records) - first) * STEPS >= progress.done * total:
                progress.step(f"{total} random cases")
            records.append(record)
            if len(records) < first:
                progress.note(f"{len(records)} of {first} done")
    checks, data = [], {}
    for suite in all_suites:
        mine = [record for record in records if suite.has(record)]
        name = f"numerics-{suite.name}.csv" if suite.name else "numerics.csv"
        _write(settings.out / name, mine, *_COLUMNS[suite.name])
        found, facts = _judge_suite(suite, mine, settings, implementation)
        checks += found
        data |= {suite.name: facts} if suite.name else facts
    return StageResult("validate", tuple(checks), data)


def _judge_suite(
    suite: Suite, records: list[dict[str, Any]], settings: Settings, implementation: str
) -> tuple[list[Check], dict[str, Any]]:
    corners = [record for record in records if record["task"] in worker.CORNERS]
    random = [record for record in records if record["task"] not in worker.CORNERS]
    checks = []
    if suite.corners:
        least = max(1, len(suite.corners) - _refused(corners))
        checks.append(_judge(f"{suite.title}corner cases", corners, implementation, least))
    name = f"{suite.title}random cases from seed {settings.seed}"
    checks.append(_judge(name, random, implementation, suite.required))
    accepted = [record for record in random if "refused" not in record]
    return checks, {
        "first_seed": settings.seed,
        "forward_cases": len(accepted),
        "backward_cases": sum(record["gradients"] for record in accepted),
        "shapes": len({record["task"] for record in accepted}),
        "refused_shapes": _refused(random),
        "histogram": _histogram(accepted),
        "by_dtype": _largest(accepted, "dtype"),
    }


# ---- Cases in workers


def _answers(
    settings: Settings, clock: Clock, implementation: str, all_suites: Sequence[Suite]
) -> Iterator[dict[str, Any]]:
    """Records of the corner cases and of random ones until as many of those were taken as wanted, or time is over."""
    cores = environment.usable_cores()
    # On a CPU compiling is most of it, which two processes do beside each other.
    jobs = settings.jobs or max(1, cores - 2 if implementation == "cuda" else min(cores, 2))
    taken = dict.fromkeys(all_suites, 0)
    tasks = _tasks(settings.seed, taken)
    done: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    stop, lock = threading.Event(), threading.Lock()

    def work() -> None:
        process = _worker(implementation)
        while not stop.is_set():
            with lock:
                task = next(tasks, None)
            if task is None:
                break
            for record in _records(process, task, gradients=worker.has_gradients(task)):
                done.put(record)
        process.close()
        done.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    ended = 0
    while ended < jobs:
        record = done.get()
        if record is None:
            ended += 1
            continue
        yield record
        if "refused" not in record and record["task"] not in worker.CORNERS:
            taken[next(suite for suite in all_suites if suite.has(record))] += 1
        if clock.left < 0:
            stop.set()  # what is under way still counts


def _tasks(seed: int, taken: dict[Suite, int]) -> Iterator[str]:
    """Corners, then seeds of each suite in turn while fewer of its cases were taken than it wants."""
    for suite in taken:
        yield from (suite.prefix + name for name in suite.corners)
    for number in itertools.count(seed):
        open_ones = [suite for suite in taken if taken[suite] < suite.wanted]
        if not open_ones:
            return
        yield from (f"{suite.prefix}{number}" for suite in open_ones)


def _worker(implementation: str) -> Worker:
    # Workers share the GPU: autotuning the reference's products tells nothing here. A captured graph would keep the
    # grid of its first launch.
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer="
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return Worker(implementation, CASE_SECONDS, {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"} | threads)


def _records(process: Worker, task: str, gradients: bool) -> Iterator[dict[str, Any]]:
    """The records of a task; the last one is the process's failure where it died or hung."""
    blank = {"gradients": gradients, "case": {}, "results": []}
    for draw, record in enumerate(process.ask(task, *(["gradients"] if gradients else []))):
        yield {"draw": draw} | blank | record


# ---- What came of them


def _refused(records: list[dict[str, Any]]) -> int:
    return sum("refused" in record for record in records)


def _judge(name: str, records: list[dict[str, Any]], implementation: str, count: int) -> Check:
    """Passed where no case failed and `count` of them were judged, which is what the level asks for at least."""
    accepted = [record for record in records if "refused" not in record]
    wrong = [record for record in accepted if not record["ok"]]
    backward = sum(record["gradients"] for record in accepted)
    shapes = len({record["task"] for record in accepted})
    detail = f"{len(accepted)} forward, {backward} of them with gradients, of {shapes} shapes; "
    detail += f"{_refused(records)} shapes were refused with a reason"
    if implementation == "cuda":
        detail += "; each also on 1, 2, 3 or 7 multiprocessors"
    if wrong:
        first = wrong[0]
        command = worker.repro(first["task"], first["draw"], implementation, first["gradients"])
        return failed(name, f"{len(wrong)} of {detail}. Repro: {command}\n{first['text']}")
    if len(accepted) < count:
        return skipped(name, f"{detail}: no failure, but {count} cases were to be judged")
    return passed(name, detail)


def _histogram(accepted: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each result's largest error as a share of its bound, 1 being the bound."""
    counts: dict[str, list[int]] = {}
    for record in accepted:
        for result in record["results"]:
            column = min(int(result["max_share"] * BINS), BINS - 1)
            counts.setdefault(result["name"], [0] * BINS)[column] += 1
    return {"bins": BINS, "counts": counts}


def _largest(accepted: list[dict[str, Any]], field: str) -> dict[str, dict[str, float]]:
    """Largest share of the bounds by a field of the case: of the largest error, and of the mean."""
    found: dict[str, dict[str, float]] = {}
    for record in accepted:
        entry = found.setdefault(str(record["case"].get(field)), {"cases": 0, "max_share": 0.0, "mean_share": 0.0})
        entry["cases"] += 1
        for result in record["results"]:
            for key in ("max_share", "mean_share"):
                entry[key] = max(entry[key], result[key])
    return found


# Fields of a case, and its results.
_ATTENTION_COLUMNS = (
    (
        *("batch", "q_len", "kv_len", "heads", "kv_heads", "head_size", "value_size", "dtype", "block_q", "block_kv"),
        *("pattern", "density", "mask_per_batch", "mask_per_head", "lengths", "soft_cap", "sinks", "gates", "scale"),
    ),
    ("out", "lse", "dq", "dk", "dv", "dsinks", "dgates"),
)
_PRODUCT_COLUMNS = (
    (
        *("form", "rows", "columns", "width", "block_rows", "block_columns", "dtype", "wide"),
        *("pattern", "density", "mapped", "lists", "fault"),
    ),
    ("out", "ddata", "ddense", "dleft", "dright"),
)
_DECODE_COLUMNS = (
    (
        *(
            "q_lens",
            "kv_lens",
            "seqs",
            "padding",
            "kv_heads",
            "group",
            "head_dim",
            "value_dim",
            "page_size",
            "max_pages",
        ),
        *(
            "contiguous",
            "causal",
            "window",
            "sink_tokens",
            "tree",
            "selected",
            "sinks",
            "soft_cap",
            "k_scale",
            "v_scale",
        ),
        *("shared", "groups", "part", "dtype", "fault"),
    ),
    ("out", "lse"),
)
_PACKED_COLUMNS = (
    (
        *("q_len", "kv_len", "sequences", "layout", "longest", "promised", "within", "size", "bottom_right", "heads"),
        *("kv_heads", "head_size", "value_size", "dtype", "block_size", "soft_cap", "sinks", "scale", "amplitude"),
    ),
    ("out", "lse", "dq", "dk", "dv", "dsinks"),
)
_COLUMNS = {
    "": _ATTENTION_COLUMNS,
    "matmul": _PRODUCT_COLUMNS,
    "decode": _DECODE_COLUMNS,
    "packed": _PACKED_COLUMNS,
}


def _write(path: Path, records: list[dict[str, Any]], fields: Sequence[str], names: Sequence[str]) -> None:
    """A line a case: what it was, and each result's shares of the bounds."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        largest = [f"{name}_max_share" for name in names]
        writer.writerow(["seed or name", "draw", "gradients", "verdict", *fields, *largest])
        for record in sorted(records, key=lambda record: (_name(record).zfill(9), record["draw"])):
            verdict = "refused" if "refused" in record else "passed" if record["ok"] else "failed"
            case = record["case"]
            shares = {result["name"]: f"{result['max_share']:.3f}" for result in record.get("results", ())}
            row = [_text(case.get(field, "")) for field in fields] + [shares.get(name, "") for name in names]
            writer.writerow([_name(record), record["draw"], int(record["gradients"]), verdict, *row])


def _name(record: dict[str, Any]) -> str:
    return worker.split(record["task"])[1]


def _text(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else value
