"""The check programs of tests/csrc: the kernels without XLA or Python, for sanitizers, faults and seeded bugs.

`cuda_check` holds each kernel to a float64 loop; `cuda_racecheck` is the same for compute-sanitizer's racecheck;
`mutant_NAME` has a bug seeded. Built from a checkout where there is an nvcc, or given as a folder of built ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from jax_bsk.qa.support.cuda_tools import find_tool
from jax_bsk.qa.validation import provenance
from jax_bsk.qa.validation.outcome import Check, failed, passed, skipped
from jax_bsk.qa.validation.settings import Clock, Level, Settings

PROGRAMS = ("cuda_check", "cuda_racecheck")


def folder(settings: Settings) -> Path | None:
    """Where the programs lie; None where they are neither given nor could be built."""
    if settings.programs is not None:
        return settings.programs
    root = provenance.checkout()
    return None if root is None else root / "build" / "validation"


def find(settings: Settings, name: str) -> Path | None:
    """A program that is there and was built from the sources that are looked at."""
    where = folder(settings)
    path = None if where is None else where / name
    return path if path is not None and path.exists() and tree_of(path) == provenance.source_tree() else None


def tree_of(program: Path) -> str:
    """Git's hash of the sources that a check program says it was built from; empty where it does not say."""
    result = subprocess.run([program, "tree"], capture_output=True, text=True, timeout=60, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def provide(settings: Settings, clock: Clock, *, on_gpu: bool) -> Check:
    """Builds what a full run needs and is not there."""
    name = "check programs"
    if not on_gpu or settings.level is Level.QUICK:
        return skipped(name, "for full runs on a GPU", required=False)
    if settings.programs is not None:
        missing = [program for program in PROGRAMS if find(settings, program) is None]
        why = f"not there, or of other sources, in {settings.programs}: {', '.join(missing)}"
        return failed(name, why) if missing else passed(name, "given, and built from these sources")
    root, nvcc, cmake = provenance.checkout(), find_tool("nvcc"), shutil.which("cmake")
    if root is None or nvcc is None or cmake is None:
        return skipped(name, "building them needs a checkout, cmake and an nvcc; --programs takes built ones")
    build = root / "build" / "validation"
    options = ["-DJAX_BSK_CUDA=ON", "-DJAX_BSK_MUTANTS=ON", "-DSANITIZE=", "-DCMAKE_BUILD_TYPE=Release"]
    commands = [
        [cmake, "-S", str(root / "tests" / "csrc"), "-B", str(build), *options, f"-DCMAKE_CUDA_COMPILER={nvcc}"],
        [cmake, "--build", str(build), "--parallel", str(os.cpu_count()), "--target", *PROGRAMS, "mutants"],
    ]
    for command in commands:
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=max(1, clock.left), check=False)
        except subprocess.TimeoutExpired:
            return skipped(name, "the stage's time was over while they were built")
        if result.returncode:
            return failed(name, (result.stdout + result.stderr)[-500:])
    return passed(name, "built from this checkout")
