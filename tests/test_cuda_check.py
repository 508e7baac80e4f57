"""Every case of `tests/csrc/cuda_check*.cu` on a GPU, each in a process of its own with a time limit.

The program knows nothing of XLA or Python: outputs poisoned with NaN between guard bytes, values and gradients against
a float64 loop, every kernel that can take a case, bit-equal repeats and a CUDA graph. Where compute-sanitizer
is installed, one case an instantiation of the Hopper kernels runs under its tools as well. Set JAX_BSK_CUDA_CHECK and
JAX_BSK_CUDA_RACECHECK to built programs to skip the build (about two minutes each on two cores).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

SOURCE = Path(__file__).parent / "csrc"
TEXT = (SOURCE / "cuda_check.cu").read_text() + (SOURCE / "cuda_check_matmul.cu").read_text()
NAMES = re.findall(r'(?:add|gated|product|sampled)\("([a-z0-9-]+)",', TEXT)
NAMES += re.findall(r'{"(choose[a-z-]*)", \d', (SOURCE / "cuda_check_choose.cu").read_text())
NAMES += re.findall(r'{"(lists[a-z-]*)", \d', (SOURCE / "cuda_check_lists.cu").read_text())
NAMES += re.findall(r'{"(gates-[a-z-]+)", F::', TEXT)
NAMES += [f"bias-{name}" for name in re.findall(r'biased\("([a-z0-9-]+)",', TEXT)]
NAMES += [f"bias-{name}" for name in re.findall(r'{"([a-z-]+)", F::', TEXT) if not name.startswith("gates-")]
# Made in loops of the program, over dtypes and sizes.
NAMES += [
    f"instance-{dtype}-d{dim}{cap}" for dtype in ("bf16", "f16") for dim in (64, 96, 128, 256) for cap in ("", "-cap")
]
NAMES += [f"gates-instance-{dtype}-d{dim}" for dtype in ("bf16", "f16") for dim in (64, 96, 128, 256)]
NAMES += [
    f"bias-{term}-{kept}" for term, count in (("dense", 16), ("tiles", 16), ("distances", 4)) for kept in range(count)
]
NAMES += [
    f"bias-instance-{dtype}-d{dim}-b{block}"
    for dtype in ("bf16", "f16", "f32")
    for dim in (64, 128, 256)
    for block in (64, 128)
]
NAMES += [
    f"bias-pairs-{causal}{queries}-{keys}-d{dim}"
    for causal in ("", "causal-")
    for queries in (64, 128)
    for keys in (64, 128)
    for dim in (64, 128)
]
NAMES += [f"bias-lines-{kind}{size}" for kind in (1, 2, 3, 5, 6, 7) for size in ("", "-d128-b128")]
NAMES += [f"bias-lines-{kind}-jump-{jump}" for kind in (3, 6) for jump in (8, 200, 2000)] + ["bias-lines-6-jump-keys"]
NAMES += [f"jump-{jump}{size}" for jump in (8, 200, 2000, 10_000_000) for size in ("", "-d128-b128")]
FAULTS = re.findall(r'fault\("([a-z-]+)"', TEXT)
NAMES += [f"{fault}-d{dim}" for fault in FAULTS for dim in (64, 128, 256)]
NAMES += [
    f"matmul-{operation}-{dtype}-{blocks}"
    for operation in ("product", "sampled")
    for dtype in ("bf16", "f16")
    for blocks in ("128", "64", "128x64", "64x128")
]
NAMES += [
    f"matmul-narrow-{dtype}-{blocks}-{columns}"
    for dtype in ("bf16", "f16")
    for blocks in ("128", "64", "128x64", "64x128")
    for columns in (8, 32, 64)
]
LISTS = re.findall(r'{"([a-z-]+)", Fault::', TEXT)
NAMES += [
    f"matmul-{kernel}-{fault}-{block}" for kernel in ("product", "narrow") for fault in LISTS for block in (64, 128)
]
DECODE = (SOURCE / "cuda_check_decode.cu").read_text()
NAMES += re.findall(r'{"(decode-[a-z0-9-]+)", DType::', DECODE)
NAMES += re.findall(r'{"(decode-far-[a-z0-9-]+)", \d+,', DECODE)
((PROBLEMS, EACH),) = [map(int, pair) for pair in re.findall(r"kProblems = (\d+), kProblemsEach = (\d+);", DECODE)]
NAMES += [f"decode-{first}-{first + EACH - 1}" for first in range(0, PROBLEMS, EACH)]
NAMES += re.findall(r'{"(delta-[a-z0-9-]+)", DType::', (SOURCE / "cuda_check_delta.cu").read_text())
NAMES += ["zero", "huge", "many-nan-value", "many-nan-key", "many-inf-value"]
NAMES += [
    f"{gates}decreasing{lists}{size}"
    for gates in ("", "gates-")
    for lists in ("", "-cols")
    for size in ("", "-d128-b128")
]
# Seeds of random cases: tiles of every kind in random order.
((REGIMES, EACH),) = [map(int, pair) for pair in re.findall(r"kRegimes = (\d+), kRegimesEach = (\d+);", TEXT)]
NAMES += [f"regimes-{first}-{first + EACH - 1}" for first in range(0, REGIMES, EACH)]
NAMES = [name for name in NAMES if not name.startswith("time-")]
# What compute-sanitizer runs: every instantiation, and what is not finite or cannot be followed.
SANITIZED = re.compile(
    r"(gates-|bias-)?instance-|decode-(faults-)?(e4m3-|int8-)?b?f\d\d-|gates-(nan-value|bad-first-col)|choose(-(groups|many-groups|one-row))?(-bad)?$|"
    r"lists(-bad)?$|delta-(bf16|f32|zero)|jump-200|many-nan|matmul-(product|sampled)-b?f16-|matmul-product-(whole|uneven|large-id-64)|"
    r"matmul-sampled-(whole|wild)|matmul-narrow-(bf16-|f16-128-64|one|no-columns|large-id-64)"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], Path]:
    """The path of a target of tests/csrc, built on first need."""
    folder = tmp_path_factory.mktemp("cuda_check")

    @functools.cache
    def build(target: str) -> Path:
        if given := os.environ.get(f"JAX_BSK_{target.upper()}"):
            return Path(given)
        options = ["-DJAX_BSK_CUDA=ON", "-DSANITIZE=", "-DCMAKE_BUILD_TYPE=Release"]
        subprocess.run(["cmake", "-S", SOURCE, "-B", folder, *options], check=True, capture_output=True)
        subprocess.run(["cmake", "--build", folder, "--target", target, "--parallel"], check=True, capture_output=True)
        return folder / target

    return build


@pytest.fixture(scope="module")
def program(built) -> Path:
    return built("cuda_check")


def run(command: list[str | Path], seconds: int) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_these_are_all_the_cases(program):
    listed = subprocess.run([program, "list"], capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in listed if not name.startswith("time-")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_case(program, name):
    run([program, name], 120)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
@pytest.mark.parametrize("name", [name for name in NAMES if SANITIZED.match(name)])
def test_sanitizer(built, tool, name):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = built("cuda_racecheck" if tool == "racecheck" else "cuda_check")
    run([sanitizer, "--tool", tool, "--error-exitcode", "9", program, name, "1", "280"], 300)
