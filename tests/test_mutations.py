"""The mutation check (tests/csrc/mutations.py): its table fits the kernels, and every seeded bug is found.

Without a GPU a mutant of each room of the CPU's kernels is built and run (all of them with JAX_BSK_SLOW_TESTS=1: four
minutes of a core), and of the others the table alone is checked. Set JAX_BSK_MUTANTS to a folder with the built
programs to skip the build of all of them (some five minutes on two cores).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from csrc import variants
from tests.csrc import mutations
from tests.csrc.mutations import BIASES, CPU_KERNELS, CSRC, DECODE_KERNELS, MUTATIONS, PORTABLE, Mutation
from tests.test_cuda_check import NAMES

SOURCE = Path(mutations.__file__).parent


def by_name(mutation: Mutation) -> str:
    return mutation.name


def build(folder: Path, targets: list[str], *options: str) -> None:
    # The environment's own CMake and ninja, or else those on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    assert cmake is not None, "there is no cmake beside this Python or on PATH"
    # Most of the time is compiling: at -O3 a tenth more in all.
    optimise = ("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    options = (*options, f"-DPython_EXECUTABLE={sys.executable}", "-DSANITIZE=", *optimise)
    for command in (
        [cmake, "-G", "Ninja", "-S", SOURCE, "-B", folder, "-DJAX_BSK_MUTANTS=ON", *options],
        [cmake, "--build", folder, "--target", *targets],
    ):
        result = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def assert_all_caught(folder: Path, chosen: tuple[Mutation, ...]) -> None:
    verdicts, unsound = mutations.run(folder, chosen, jobs=2)
    assert not unsound
    assert not [verdict.mutation.name for verdict in verdicts if verdict.by is None]


def test_names_are_unique_and_fit_to_be_targets():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names) >= 14
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=by_name)
class TestTable:
    def test_what_is_replaced_occurs_once(self, mutation):
        text = (CSRC / mutation.file).read_text()
        assert text.count(mutation.before) == 1
        assert mutation.apply(text) != text

    def test_sources_exist(self, mutation):
        assert mutation.instances
        written = {variant.path for variant in variants.variants(split=True)}
        for source in mutation.instances:
            assert source in written or (CSRC / source).is_file()

    def test_cases_exist(self, mutation):
        assert len(set(mutation.cases)) == len(mutation.cases) >= 1
        if mutation.program == "cuda_check":
            assert set(mutation.cases) <= set(NAMES)
        else:
            assert all(re.fullmatch(r"seeds-\d+-\d+", case) for case in mutation.cases)


def test_a_stale_mutation_names_itself():
    with pytest.raises(ValueError, match="basis: its text occurs 2 times"):
        Mutation("basis", "", "a.h", "x", "y", (), ()).apply("x x")


def test_copies_differ_in_the_one_file(tmp_path):
    def files(root: Path) -> dict[str, str]:
        walk = os.walk(root, followlinks=True)
        paths = [Path(folder) / name for folder, _, names in walk for name in names]
        return {str(path.relative_to(root)): path.read_text() for path in paths}

    mutations.generate(tmp_path)
    original = files(CSRC)
    for mutation in MUTATIONS:
        copy = files(tmp_path / mutation.name / "csrc")
        assert copy.keys() == original.keys()
        assert [name for name in copy if copy[name] != original[name]] == [mutation.file]
        assert copy[mutation.file] == mutation.apply(original[mutation.file])
        assert f"jax_bsk_mutant({mutation.name} {mutation.program} " in (tmp_path / "mutants.cmake").read_text()


def test_making_copies_again_touches_nothing_but_what_is_stale(tmp_path):
    mutations.generate(tmp_path)
    first = MUTATIONS[0]
    mutated = [tmp_path / mutation.name / "csrc" / mutation.file for mutation in MUTATIONS]
    old = 1_000_000_000
    for path in [*mutated, tmp_path / "mutants.cmake"]:
        os.utime(path, (old, old))
    mutated[0].write_text("of an earlier table")
    (tmp_path / first.name / "csrc" / "gone.h").write_text("")
    mutations.generate(tmp_path)
    assert mutated[0].read_text() == first.apply((CSRC / first.file).read_text())
    assert not (tmp_path / first.name / "csrc" / "gone.h").exists()
    assert all(path.stat().st_mtime == old for path in [*mutated[1:], tmp_path / "mutants.cmake"])


@pytest.fixture
def programs(tmp_path):
    """A folder with an unmutated program and four mutants, made of shell scripts, and their mutations."""

    def program(name: str, script: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def mutation(name: str) -> Mutation:
        return Mutation(name, "a bug", "a.h", "x", "y", (), ("one", "two"))

    program("cuda_check", "exit 0")
    program("mutant_wrong", '[ "$1 $2" = "one 1" ]')
    program("mutant_hangs", "exec sleep 60")
    program("mutant_crashes", "kill -SEGV $$")
    program("mutant_equal", "exit 0")
    return tmp_path, [mutation(name) for name in ("wrong", "hangs", "crashes", "equal")]


def test_verdicts(programs, capsys):
    folder, table = programs
    verdicts, unsound = mutations.run(folder, tuple(table), jobs=4, timeout=1)
    assert unsound == []
    assert [(verdict.by, verdict.how) for verdict in verdicts] == [
        ("two", "wrong result"),
        ("one", "timeout"),
        ("one", "crash"),
        (None, None),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:4]] == [mutation.name for mutation in table]
    assert "caught by one (timeout)" in lines[1]
    assert "SURVIVED" in lines[3]


def test_the_command_says_what_survives_and_what_is_unsound(programs, monkeypatch, tmp_path):
    folder, table = programs
    monkeypatch.setattr(mutations, "MUTATIONS", tuple(table))
    report = tmp_path / "report.json"
    assert mutations.main(["run", str(folder), "--only", "wrong", "--json", str(report)]) == 0
    assert '"by": "two"' in report.read_text()
    assert mutations.main(["run", str(folder), "--only", "equal"]) == 1
    # What the unmutated program fails, too, catches nothing.
    (folder / "cuda_check").write_text("#!/bin/sh\nexit 1\n")
    assert mutations.main(["run", str(folder), "--only", "wrong", "--json", str(report)]) == 1
    assert '"caught": false' in report.read_text()
    (folder / "mutant_wrong").unlink()
    with pytest.raises(SystemExit):
        mutations.main(["run", str(folder), "--only", "wrong"])
    with pytest.raises(SystemExit):
        mutations.main(["run", str(folder), "--only", "nothing"])


def test_the_cpu_check_finds_mutants(tmp_path):
    """The first mutant of each room; with JAX_BSK_SLOW_TESTS every one, as in `validate --full` on a GPU."""
    chosen = tuple(mutation for mutation in MUTATIONS if mutation.program == "cpu_check")
    if not os.environ.get("JAX_BSK_SLOW_TESTS"):
        chosen = tuple({mutation.instances: mutation for mutation in reversed(chosen)}.values())
    build(tmp_path, ["cpu_check", *(f"mutant_{mutation.name}" for mutation in chosen)])
    assert_all_caught(tmp_path, chosen)


@pytest.mark.gpu
def test_the_cuda_check_finds_every_mutant(tmp_path):
    # Without Hopper's kernels their mutants are what they were.
    hopper = jax.devices()[0].compute_capability == "9.0"
    chosen = tuple(
        mutation for mutation in MUTATIONS if hopper or mutation in PORTABLE + BIASES + DECODE_KERNELS + CPU_KERNELS
    )
    folder = Path(os.environ.get("JAX_BSK_MUTANTS") or tmp_path)
    if folder == tmp_path:
        build(tmp_path, ["cpu_check", "cuda_check", "mutants"], "-DJAX_BSK_CUDA=ON")
    assert_all_caught(folder, chosen)
