"""Stage build: the library that runs, the sources it was built from, its kernels' registers; the check programs."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from jax_bsk.core import library
from jax_bsk.qa.support.cuda_tools import NoDisassembler, kernel_resources
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.validation import programs, provenance
from jax_bsk.qa.validation.outcome import Check, StageResult, failed, judged, passed, skipped
from jax_bsk.qa.validation.settings import Clock, Settings


def run(settings: Settings, clock: Clock) -> StageResult:
    """Holds the library to its sources and lists its kernels."""
    with Progress(3, settings.quiet) as progress:
        return _run(settings, clock, progress)


def _run(settings: Settings, clock: Clock, progress: Progress) -> StageResult:
    on_gpu = provenance.implementation() == "cuda"
    progress.step("sources")
    facts = provenance.collect()
    native = library.load(facts["implementation"])
    if native.problem is not None:
        return StageResult("build", (failed("library", native.problem),), {"library": dict(native.info)})
    checks = [passed("library", f"version {native.info['version']}, FFI API {_dotted(native.info['ffi_api'])}")]
    checks.append(_sources(facts))
    data: dict[str, Any] = {"library": dict(native.info), "kernels": []}

    progress.step("registers and spills")
    cuda = importlib.util.find_spec("jax_bsk._cuda")
    if cuda is None or cuda.origin is None:
        checks.append(skipped("registers and spills", "there is no CUDA library", required=on_gpu))
    else:
        check, data["kernels"] = _kernels(Path(cuda.origin))
        checks.append(check)
        _write(settings.out / "kernels.csv", data["kernels"])

    progress.step("check programs")
    checks.append(programs.provide(settings, clock, on_gpu=on_gpu))
    return StageResult("build", tuple(checks), data)


def _write(path: Path, kernels: list[dict[str, Any]]) -> None:
    """A line a kernel and architecture."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "arch", "registers", "local_bytes", "hopper"])
        writer.writeheader()
        writer.writerows(sorted(kernels, key=lambda kernel: (kernel["name"], kernel["arch"])))


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))


def _sources(facts: dict[str, Any]) -> Check:
    name = "built from these sources"
    if facts["csrc_tree"] is None:
        return passed(name, f"an installed package, built from csrc/ {facts['library_tree']}")
    same = facts["csrc_tree"] == facts["library_tree"]
    detail = f"csrc/ is {facts['csrc_tree']}" + (
        "" if same else f", the library is of {facts['library_tree']}: rebuild"
    )
    return judged(name, same, detail)


def _kernels(library: Path) -> tuple[Check, list[dict[str, Any]]]:
    name = "registers and spills"
    try:
        kernels = [dataclasses.asdict(kernel) for kernel in kernel_resources(library)]
    except NoDisassembler as reason:
        return skipped(name, str(reason)), []
    spilled = [k for k in kernels if k["hopper"] and k["local_bytes"]]
    most = max((k["registers"] for k in kernels), default=0)
    detail = f"{len(kernels)} kernels, at most {most} registers, "
    if spilled:
        return failed(name, detail + f"{len(spilled)} Hopper kernels with local memory: {spilled[0]['name']}"), kernels
    return passed(name, detail + "no Hopper kernel with local memory"), kernels
