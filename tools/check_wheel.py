"""Checks that a wheel or an sdist works for somebody who has neither a compiler nor this checkout.

    python tools/check_wheel.py dist/*.whl             # what `make check-wheel` runs
    python tools/check_wheel.py dist/jax_bsk-*.tar.gz  # builds a wheel from the sdist first, in an empty environment

A wheel is installed into a new virtual environment, with nothing else on PATH. There, in an empty folder, the README's
first example runs with a forward and a gradient, a first picture is drawn, and `info` says what is available. The
README is the one in the wheel. Each step's time is printed. Standard library alone: the images that build releases have
nothing else.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

MINUTES = 3  # from an empty environment to the first picture
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc", "cmake", "ninja")

# After the README's first example, which leaves `q`, `k`, `v`, `mask` and `out`. Warnings are errors, so a call that
# falls back to plain JAX fails.
QUICK_START = """
import jax, jax_bsk
from jax_bsk.core import library

assert {folder!r} in jax_bsk.__file__, jax_bsk.__file__
assert library.load("cpu").usable, library.load("cpu").problem
native = jax.jit(lambda q: jax_bsk.sparse_attention(q, k, v, mask=mask, implementation="cpu"))
assert (native(q) == out).all(), "the default is not the native implementation"
gradient = jax.jit(jax.grad(lambda q: native(q).sum()))(q)
assert gradient.shape == q.shape and jax.numpy.isfinite(gradient).all()
print("forward", out.shape, "and gradient", gradient.shape)
"""
# A wheel with CUDA kernels is importable where there is no driver, and says which architectures it has.
CUDA = """
import jax_bsk._cuda
print("CUDA kernels:", jax_bsk._cuda.build_info()["architectures"])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks that a wheel or an sdist works in an empty environment.")
    parser.add_argument("files", nargs="+", type=Path, help="wheels, or sdists to build a wheel from")
    parser.add_argument("--python", default=None, help="interpreter to test with (default: one that the wheel fits)")
    args = parser.parse_args()
    for file in args.files:
        if not file.is_file():
            raise SystemExit(f"{file} does not exist; `make wheel` and `make sdist` write into dist/")
        print(file.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            check(file.resolve(), args.python, Path(folder).resolve())


def check(file: Path, python: str | None, folder: Path) -> None:
    if file.name.endswith(".tar.gz"):
        check_names(file)
        python = python or sys.executable
        with step("wheel built from the sdist"):
            run([python, "-m", "venv", folder / "builder"])
            pip = [folder / "builder/bin/python", "-m", "pip", "--disable-pip-version-check", "-q"]
            environment = os.environ | {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DJAX_BSK_CUDA=OFF")}
            run([*pip, "wheel", "--no-deps", "-w", folder, file], env=environment)
        (file,) = folder.glob("*.whl")
    has_cuda = check_libraries(file)
    text = quick_start(file)
    python = python or fitting(file)
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    empty = folder / "empty"
    empty.mkdir()
    began, used = time.perf_counter(), processor_seconds()
    with step(f"virtual environment of {version}"):
        run([python, "-m", "venv", folder / "venv"])
    bin = folder / "venv/bin"
    # No compiler, and nothing of the caller's Python.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"PATH": str(bin), "JAX_PLATFORMS": "cpu"}
    for name in COMPILERS:
        assert not shutil.which(name, path=str(bin)), f"{name} is in the new environment"
    with step("pip install 'jax_bsk[plot]', as this wheel"):
        pip = [bin / "pip", "--disable-pip-version-check", "-q", "install", "--only-binary", ":all:"]
        run([*pip, f"{file}[plot]"], env=environment, cwd=empty)

    def python_code(*arguments: str) -> None:
        run([bin / "python", "-W", "error", *arguments], env=environment, cwd=empty)

    with step("quick start, with a gradient"):
        python_code("-c", text + QUICK_START.format(folder=str(folder)) + CUDA * has_cuda)
    with step("first picture"):
        python_code("-c", text + 'mask.bind(4096).plot("mask.png")')
    assert (empty / "mask.png").read_bytes().startswith(b"\x89PNG"), "no picture"
    with step("python -m jax_bsk info"):
        python_code("-m", "jax_bsk", "info", "--brief")
    seconds = time.perf_counter() - began
    processor = processor_seconds() - used
    print(
        f"  {seconds:5.1f} s from an empty environment to here, {processor:.0f} s of them on the processor", flush=True
    )
    if seconds > 60 * MINUTES:
        print(f"        more than {MINUTES} minutes: is the machine busy, or the package index slow?")


def quick_start(wheel: Path) -> str:
    """The first Python block of the README, which is the wheel's description."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        readme = str(email.message_from_bytes(archive.read(name)).get_payload())
    block = re.search(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block, "the README has no Python block"
    return block.group(1)


def check_libraries(wheel: Path) -> bool:
    """The CPU library is there and of the stable ABI if the name says so. Returns whether there is a CUDA library."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).suffixes]
    suffix = ".abi3.so" if "-abi3-" in wheel.name else ".so"
    assert "jax_bsk/_cpu" in {name.split(".")[0] for name in libraries}, f"no CPU library among {libraries}"
    assert all(name.endswith(suffix) for name in libraries), f"{libraries} do not end in {suffix}"
    assert all(name.startswith("jax_bsk/") for name in libraries), f"libraries of this machine came along: {libraries}"
    return "jax_bsk/_cuda" in {name.split(".")[0] for name in libraries}


def check_names(sdist: Path) -> None:
    """What belongs in an sdist is there: tests, docs, pictures, the reports of the figures; and no built files."""
    names = names_of(sdist)
    for needed in ("CMakeLists.txt", "Makefile", "mkdocs.yml", "README.md", "CHANGELOG.md", "LICENSE", "PKG-INFO",
                   "csrc/bindings.cc", "tests/conftest.py", "tests/csrc/cpu_check.cc", "tools/requirements.py",
                   "examples/train_bytes.py", "docs/index.md", "docs/images/masks.png", "benchmarks/attention.py",
                   "reports/h200/report.json"):  # fmt: skip
        assert needed in names, f"{sdist.name} has no {needed}"
    built = [name for name in names if name.endswith((".so", ".pyc", ".whl")) or name.startswith(("build/", "dist/"))]
    assert not built, f"{sdist.name} has built files: {built}"


def names_of(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def fitting(wheel: Path) -> str:
    """An interpreter that the wheel's Python tag fits: this one, or one on PATH or of pyenv."""
    tag = next(part for part in wheel.name.split("-")[2:] if part.startswith("cp"))
    least = (int(tag[2]), int(tag[3:]))
    candidates = [sys.executable, *filter(None, (shutil.which(f"python3.{minor}") for minor in range(11, 20)))]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += map(str, sorted(pyenv.glob("versions/3.*/bin/python3")))
    for candidate in candidates:
        code = "import sys; print(*sys.version_info[:2])"
        result = subprocess.run([candidate, "-I", "-c", code], capture_output=True, text=True)
        version = tuple(map(int, result.stdout.split())) if result.returncode == 0 else ()
        if version == least or ("-abi3-" in wheel.name and version > least):
            return candidate
    raise SystemExit(f"No Python here fits {wheel.name}: name one with --python.")


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(command: list[str | Path], **options: object) -> None:
    subprocess.run(list(map(str, command)), check=True, **options)  # pyright: ignore[reportCallIssue, reportArgumentType]


class step:
    """Prints how long what is inside took."""

    def __init__(self, title: str):
        self.title = title

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, kind: object, *_: object) -> None:
        outcome = "" if kind is None else ": FAILED"
        print(f"  {time.perf_counter() - self.began:5.1f} s {self.title}{outcome}", flush=True)


if __name__ == "__main__":
    main()
