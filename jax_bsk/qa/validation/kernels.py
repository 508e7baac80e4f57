"""The kernels without XLA, for the stage harden: check programs, sanitizers, seeded bugs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jax_bsk.qa.support import environment
from jax_bsk.qa.support.cuda_tools import find_tool
from jax_bsk.qa.support.progress import Note, unheard
from jax_bsk.qa.validation import programs, provenance
from jax_bsk.qa.validation.outcome import Check, failed, judged, skipped
from jax_bsk.qa.validation.settings import Clock, Level, Settings

SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# One case for each pair of instantiations of the Hopper kernels, and what is peculiar: not finite, lists, few tiles.
SANITIZED = re.compile(
    r"instance-|jump-200$|many-nan-value|bad-col-d64|bad-first-col$|nan-dout-d256|causal-d128$|"
    r"gates-(instance-bf16|f32$|nan-value|bad-first-col)|decode-(bf16-|f16-d128|f32-d128|faults-bf16-d64|e4m3-bf16)|lists(-bad|-topk)?$|"
    r"choose(-(topk|groups|many-groups|one-row))?(-bad)?$|"
    r"matmul-(product|sampled)-bf16-(128|64|64x128)$|matmul-product-(uneven|large-id-64)$|matmul-sampled-(singles(-128x64)?|wild)$"
)

REGIMES = re.compile(r"regimes-\d+-\d+")  # random cases of cuda_check by their first and last seed


def _case_names(program: Path) -> list[str]:
    result = subprocess.run([program, "list"], capture_output=True, text=True, timeout=60, check=True)
    return [name for name in result.stdout.split() if not name.startswith("time-")]


def _seeds(regimes: str) -> int:
    """Number of random cases of a name like regimes-0-39."""
    _, first, last = regimes.split("-")
    return int(last) - int(first) + 1


def _gist(output: str) -> str:
    """What a program says of its failure: the comparisons that failed, the seed that they are of, and the end."""
    lines = output.splitlines()
    kept, seed = [], ""
    for i, line in enumerate(lines):
        if line.startswith(" seed "):
            seed = line
        if "<-- FAILED" in line:
            kept += [seed, *lines[i : i + 2]]
            seed = ""
    told = "\n".join(line for line in kept[:30] if line)
    return f"{told}\n[...]\n{output[-400:]}" if told else output[-400:]


def _each(commands: Iterable[list[str]], jobs: int, seconds: float, note: Note = unheard) -> Iterator[tuple[int, str]]:
    """Exit status and gist of the output of each, some beside each other; -1 for one that hung."""
    commands = list(commands)

    def one(command: list[str]) -> tuple[int, str]:
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            return -1, f"not done after {seconds:.0f} s"
        return result.returncode, _gist(result.stdout + result.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        for i, outcome in enumerate(pool.map(one, commands)):
            yield outcome
            note(f"{i + 1} of {len(commands)} done")


def _missing(settings: Settings, name: str, program: str) -> Check:
    if settings.level is Level.QUICK:
        return skipped(name, "in full runs", required=False)
    return skipped(name, f"there is no {program} of these sources: see the stage build")


def _jobs(settings: Settings) -> int:
    return settings.jobs or max(1, environment.usable_cores() - 2)


def check_cases(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """Every case of cuda_check: each kernel that can take it, guard bytes, 20 repeats, a CUDA graph."""
    name = "kernels without XLA"
    program = programs.find(settings, "cuda_check")
    if program is None or settings.level is Level.QUICK:
        return [_missing(settings, name, "cuda_check")], {}
    names = _case_names(program)
    # Random cases of tiles in random order are many, and each has five limits: fewer repeats of each.
    regimes = [n for n in names if REGIMES.fullmatch(n)]
    named = [n for n in names if n not in regimes]
    commands = [[str(program), n] for n in named] + [[str(program), n, "5"] for n in regimes]
    outcomes = dict(zip([*named, *regimes], _each(commands, _jobs(settings), 150, note), strict=True))

    def check(title: str, some: list[str], detail: str) -> Check:
        wrong = [n for n in some if outcomes[n][0]]
        if wrong:
            told = "; ".join(f"{n}: {outcomes[n][1]}" for n in wrong[:4])
            detail = f"{len(wrong)} of {len(some)} programs of {detail}: {told}"
        return judged(title, not wrong, detail)

    limits = "bit-equal on 1, 2, 3, 7 and all multiprocessors"
    cases = sum(map(_seeds, regimes))
    checks = [
        check(name, named, f"{len(named)} cases against float64, 20 repeats {limits}, and a CUDA graph each"),
        check(
            "tiles of every kind in random order",
            regimes,
            f"{cases} random cases against float64, forward and backward of every kernel, {limits}; none may take "
            "longer than its limit; one in sixteen has at least four tiles a multiprocessor",
        ),
    ]
    failed_cases = [n for n, (status, _) in outcomes.items() if status]
    return checks, {"cases": len(named), "regimes": cases, "failed": failed_cases}


def sanitizers(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """compute-sanitizer's tools over one case an instantiation."""
    name = "compute-sanitizer"
    plain, race = (programs.find(settings, p) for p in programs.PROGRAMS)
    if plain is None or race is None or settings.level is Level.QUICK:
        return [_missing(settings, name, "cuda_check or cuda_racecheck")], {}
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        return [skipped(name, "compute-sanitizer is not installed")], {}
    names = [n for n in _case_names(plain) if SANITIZED.match(n)]
    checks, data = [], {}
    for tool in SANITIZERS:
        if clock.left < 0:
            checks.append(skipped(tool, "the stage's time was over"))
            continue
        program = str(race if tool == "racecheck" else plain)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", program]
        told = lambda text, tool=tool: note(f"{tool}: {text}")  # noqa: E731
        commands = ([*command, n, "1", "380"] for n in names)
        outcomes = dict(zip(names, _each(commands, _jobs(settings), 400, told), strict=True))
        wrong = [n for n, (status, _) in outcomes.items() if status]
        detail = f"{len(names)} cases"
        if wrong:
            detail = f"{len(wrong)} of {detail}: {wrong[0]}: {outcomes[wrong[0]][1]}"
        checks.append(judged(tool, not wrong, detail))
        data[tool] = {"cases": names, "failed": wrong}
    return checks, data


def mutations(settings: Settings, clock: Clock, implementation: str, note: Note = unheard) -> tuple[list[Check], Any]:
    """Kernels with a bug seeded: the check program must fail on each."""
    name = "seeded kernel bugs"
    unmutated, root = programs.find(settings, "cuda_check"), provenance.checkout()
    where = None if unmutated is None else unmutated.parent
    if settings.level is Level.QUICK or where is None or root is None or not list(where.glob("mutant_*")):
        return [_missing(settings, name, "mutant")], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutations.json"
        command = [sys.executable, str(root / "tests" / "csrc" / "mutations.py"), "run", str(where)]
        command += ["--jobs", str(_jobs(settings)), "--json", str(path)]
        ((status, text),) = _each([command], 1, max(60, clock.left))
        if not path.exists():
            return [failed(name, text)], []
        table = json.loads(path.read_text())
    survived = [row["name"] for row in table if not row["caught"]]
    detail = (
        f"{len(table)} of them, each caught" if not survived else f"of {len(table)} survived: {', '.join(survived)}"
    )
    return [judged(name, not survived and status == 0, detail if table else text)], table
