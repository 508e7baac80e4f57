"""Stage analyse: the machine, its software, and its measured ceilings, which later stages are held against."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from jax_bsk.core import dispatch
from jax_bsk.qa.benchmarking import ceilings, report
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.validation import provenance
from jax_bsk.qa.validation.outcome import Check, StageResult, judged, passed, skipped
from jax_bsk.qa.validation.settings import Clock, Settings

GPU = "a GPU"  # the check's name: `report` asks whether it is all that was skipped
# nvidia-smi's names; what a figure depends on.
GPU_FACTS = ("name", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem", "compute_cap", "driver_version")


def run(settings: Settings, clock: Clock) -> StageResult:
    """Reads what there is and measures what a plain product and a plain copy reach."""
    with Progress(3, settings.quiet) as progress:
        checks, data = _look(settings, progress)
    rates = ", ".join(f"{dtype} {rate / 1e12:.4g}" for dtype, rate in data["matrix_flops_per_second"].items())
    checks.append(passed("matrix rate", f"{rates} TFLOP/s"))
    checks.append(passed("copy bandwidth", f"{data['copy_bytes_per_second'] / 1e9:.4g} GB/s read and written"))
    return StageResult("analyse", tuple(checks), data)


def _look(settings: Settings, progress: Progress) -> tuple[list[Check], dict[str, Any]]:
    implementation = provenance.implementation()
    on_gpu = implementation == "cuda"
    progress.step("devices and software")
    checks = [gpu_check(on_gpu)]
    reasons = dispatch.unavailable(implementation)
    checks.append(judged(f"{implementation} kernels", not reasons, " ".join(reasons) or "available"))
    data: dict[str, Any] = report.surroundings() | {"gpu": _gpu_facts() if on_gpu else None}
    data["implementations"] = {name: dispatch.unavailable(name) for name in dispatch.IMPLEMENTATIONS}

    progress.step("matrix products")
    dtypes = ("bfloat16", "float16", "float32") if on_gpu else ("float32",)
    data["matrix_flops_per_second"] = {dtype: ceilings.matrix_product_rate(dtype, settings.seed) for dtype in dtypes}
    progress.step("copies")
    data["copy_bytes_per_second"] = ceilings.copy_bandwidth()
    return checks, data


def gpu_check(on_gpu: bool) -> Check:
    """Without a GPU nothing is cleared, however well the CPU kernels do."""
    if on_gpu:
        return passed(GPU)
    return skipped(GPU, "JAX runs on no NVIDIA GPU here: the CPU kernels are looked at")


def _gpu_facts() -> dict[str, str]:
    """Of the first GPU, from NVIDIA's tool; empty where that is absent."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    if result.returncode or not result.stdout.strip():
        return {}
    return dict(zip(GPU_FACTS, map(str.strip, result.stdout.splitlines()[0].split(",")), strict=False))
