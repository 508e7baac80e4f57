"""What can be said of the packages without compiling: metadata, the sdist's files, and that workflows, Dockerfile and
error messages name what exists. `make wheel sdist` builds the packages, `make check-wheel check-sdist` tests them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tools import build_wheels, check_wheel, requirements

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: str) -> list[dict]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


# ---- Metadata


def test_extras():
    assert {"cuda13", "flax", "plot", "demo", "docs", "dev", "build", "wheel", "nvcc"} == set(EXTRAS)
    assert any(line.startswith("jax[cuda13]") for line in EXTRAS["cuda13"])
    for line in EXTRAS["wheel"]:
        assert "==" in line, f"{line} decides what a wheel is like and is not pinned"
    used = {extra for lines in EXTRAS.values() for line in lines for extra in re.findall(r"jax_bsk\[(.*)\]", line)}
    assert {extra for names in used for extra in names.split(",")} <= set(EXTRAS)


def test_requirements_of_extras():
    every = requirements.requirements(["dev", "wheel"])
    assert set(PROJECT["dependencies"]) | set(EXTRAS["flax"]) | set(EXTRAS["wheel"]) <= set(every)
    assert not any("jax_bsk" in line for line in every)
    assert sorted(requirements.requirements(["nvcc"], only=True)) == sorted(EXTRAS["nvcc"])


def test_versions_of_python():
    """The classifiers, the interpreters that wheels are built with, and the code agree."""
    oldest = PROJECT["requires-python"].removeprefix(">=")
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert named[0] == oldest == PYPROJECT["tool"]["pyright"]["pythonVersion"]
    assert PYPROJECT["tool"]["scikit-build"]["wheel"]["py-api"] == "cp{}{}".format(*build_wheels.ABI3)
    assert PYPROJECT["tool"]["cibuildwheel"]["build"] == ["cp311-manylinux_*", "cp312-manylinux_*"]


# ---- The sdist


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"import scikit_build_core.build as b; print(b.build_sdist({str(folder)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("jax_bsk-*.tar.gz")
    return file


def test_the_sdist_has_everything_tracked(sdist):
    check_wheel.check_names(sdist)
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git checkout to compare with")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    present = [name for name in tracked if name and (ROOT / name).is_file()]
    assert set(present) <= check_wheel.names_of(sdist)


def test_the_sdist_is_small(sdist):
    assert sdist.stat().st_size < 10e6


# ---- What the tools look at


def wheel(folder: Path, name: str, libraries: list[str]) -> Path:
    file = folder / name
    with zipfile.ZipFile(file, "w") as archive:
        for library in libraries:
            archive.writestr(library, b"")
        archive.writestr("jax_bsk-1.0.dist-info/METADATA", "Name: jax_bsk\n\n" + (ROOT / "README.md").read_text())
    return file


def test_quick_start_is_the_first_example_of_the_readme(tmp_path):
    code = check_wheel.quick_start(wheel(tmp_path, "jax_bsk-1.0-cp311-cp311-linux_x86_64.whl", []))
    compile(code, "README.md", "exec")
    assert "jax_bsk.sparse_attention" in code
    for name in ("q", "k", "v", "mask", "out"):  # what the check goes on with
        assert re.search(rf"^(\w+ = )*{name} = ", code, re.MULTILINE), name


@pytest.mark.parametrize(
    ("name", "libraries", "problem"),
    [
        ("cp311-cp311", ["jax_bsk/_cpu.cpython-311-x86_64-linux-gnu.so"], None),
        ("cp312-abi3", ["jax_bsk/_cpu.abi3.so", "jax_bsk/_cuda.abi3.so"], None),
        ("cp312-abi3", ["jax_bsk/_cpu.cpython-312-x86_64-linux-gnu.so"], "abi3.so"),
        ("cp312-abi3", [], "no CPU library"),
        ("cp311-cp311", ["jax_bsk/_cpu.cpython-311.so", "jax_bsk.libs/libfoo-1.so"], "of this machine"),
    ],
)
def test_libraries_of_a_wheel(tmp_path, name, libraries, problem):
    file = wheel(tmp_path, f"jax_bsk-1.0-{name}-manylinux_2_34_x86_64.whl", libraries)
    if problem is None:
        assert check_wheel.check_libraries(file) == ("jax_bsk/_cuda.abi3.so" in libraries)
    else:
        with pytest.raises(AssertionError, match=problem):
            check_wheel.check_libraries(file)


def test_dist_holds_one_wheel_per_python():
    names = [f"jax_bsk-1.0-{python}-manylinux_2_34_x86_64.whl" for python in ("cp311-cp311", "cp312-abi3")]
    new = "jax_bsk-1.1-1cuda13-cp312-abi3-manylinux_2_34_x86_64.whl"
    assert build_wheels.replaced(new, [*names, "jax_bsk-1.0.tar.gz"]) == names[1:]
    assert build_wheels.replaced(names[0], [new]) == []


def test_the_interpreter_that_fits():
    ours = "cp{}{}".format(*sys.version_info)
    assert check_wheel.fitting(Path(f"jax_bsk-1.0-{ours}-{ours}-linux_x86_64.whl")) == sys.executable
    assert check_wheel.fitting(Path(f"jax_bsk-1.0-1cuda13-{ours}-{ours}-linux_x86_64.whl")) == sys.executable
    with pytest.raises(SystemExit, match="No Python here fits"):
        check_wheel.fitting(Path("jax_bsk-1.0-cp399-cp399-linux_x86_64.whl"))


# ---- Workflows, Dockerfile, texts


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_workflows_run_what_exists(name):
    commands = [step["run"] for step in steps(name) if "run" in step]
    assert commands
    for command in commands:
        for line in re.findall(r"\bmake ([^\n;&|]*)", command):
            goals = [word for word in line.split('"')[0].split() if "=" not in word]
            assert goals
            assert set(goals) <= TARGETS, line
        for script in re.findall(r"[\w./]+\.(?:py|sh)\b|\.ci/run", command):
            assert (ROOT / script).is_file(), script
    assert {"bash .ci/run"} <= set(commands) or name != "ci.yml"


def test_only_publishing_gets_a_permission():
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        allowed = {job: entry["permissions"] for job, entry in workflow["jobs"].items() if "permissions" in entry}
        assert allowed == ({"publish": {"id-token": "write"}} if name == "release.yml" else {})
    publish = WORKFLOWS["release.yml"]["jobs"]["publish"]
    assert publish["environment"] == "pypi"
    assert publish["needs"] == ["sdist", "wheels"]
    uploads = [step["uses"] for step in steps("release.yml") if "publish" in step.get("uses", "")]
    assert len(uploads) == 1
    assert uploads[0].startswith("pypa/gh-action-pypi-publish@")


def test_actions_have_a_version():
    used = [step["uses"] for name in WORKFLOWS for step in steps(name) if "uses" in step]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", action) for action in used), used


def test_the_dockerfile_has_the_steps_of_the_readme():
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^FROM nvidia/cuda:13\.\d+\.\d+-devel-", text, re.MULTILINE)
    for package in ("g++", "make", "python3-dev", "python3-venv"):
        assert package in text
    goals = re.findall(r"^RUN make (\w+)", text, re.MULTILINE)
    assert goals == ["build"]
    assert set(goals) <= TARGETS


def test_nothing_is_installed_from_where_it_is_not():
    """jax_bsk is in no package index, so no text may say `pip install jax_bsk`."""
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "jax_bsk").rglob("*.py")]
    for path in texts:
        assert not re.search(r"pip install [^`\n]*\bjax_bsk(\[|['\"`\s])", path.read_text()), path


# ---- 64-bit ARM


@pytest.mark.slow
def test_cpu_kernels_on_arm():
    """Compiles the kernels for arm64 and checks them under qemu: some 40 s of one core."""
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64", "cmake") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"no {', '.join(missing)} (Debian: apt install g++-aarch64-linux-gnu qemu-user)")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "check-aarch64", "ARGS=--cases 12"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "instruction set: neon" in result.stdout
    assert "12 cases, 0 failed" in result.stdout
