"""The fault table: every scenario of `jax_bsk.qa.testing.faults` on every implementation that runs here, and its runner.

Where a crash or a hang is conceivable, scenarios run in a process apart from this one, those of an implementation
together; `tests/test_cuda.py` has the same for the CUDA kernels.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import jax_bsk
from jax_bsk.qa.testing.faults import (
    SCENARIOS,
    Outcome,
    calls,
    lists,
    run_all_in_subprocesses,
    run_in_subprocess,
)
from jax_bsk.qa.testing.faults.__main__ import main
from jax_bsk.qa.testing.faults.process import run_commands
from jax_bsk.qa.testing.faults.scenario import scenario

EVERYWHERE = [s.name for s in SCENARIOS.values() if {"cpu", "xla"} <= set(s.platforms)]
NATIVE = [s.name for s in SCENARIOS.values() if "cpu" in s.platforms and "xla" not in s.platforms]


@functools.cache
def outcomes(implementation: str) -> dict[str, Outcome]:
    """What came of all scenarios that are not run in this process."""
    names = [s.name for s in SCENARIOS.values() if implementation in s.platforms and s.may_crash]
    return {outcome.name: outcome for outcome in run_all_in_subprocesses(names, implementation)}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_scenario(name, implementation):
    if SCENARIOS[name].may_crash:
        outcome = outcomes(implementation)[name]
        assert outcome.passed, outcome
    else:
        SCENARIOS[name].run(implementation)


@pytest.mark.parametrize("name", NATIVE)
def test_scenario_of_native_kernels(name):
    outcome = outcomes("cpu")[name]
    assert outcome.passed, outcome


def test_one_scenario_in_a_process_of_its_own():
    outcome = run_in_subprocess("id-huge", "cpu")
    assert outcome.passed, outcome
    assert (outcome.name, outcome.detail) == ("id-huge", "")
    assert outcome.seconds > 0


# Stands in for `python -m jax_bsk.qa.testing.faults`, without its scenarios.
CHILD = """
import os, sys, time
for name in sys.argv[1:]:
    if name == "crash": os.abort()
    if name == "hang": time.sleep(60)
    if name == "leave": os._exit(0)
    if name == "raise": raise RuntimeError("out of ideas")
    print(f"{name}: {'FAILED (1.00 s) 3 is not 4' if name == 'wrong' else 'ok (0.25 s)'}", flush=True)
print("survived")
if "crash-late" in sys.argv: sys.stdout.flush(); os.abort()
"""


def run_child(*names: str, timeout: float = 20) -> dict[str, Outcome]:
    return run_commands([sys.executable, "-c", CHILD], names, os.environ, timeout)


def test_a_crash_a_hang_and_a_wrong_answer_are_told_apart():
    found = run_child("first", "wrong", "crash", "second", "leave", "third", "raise", "fourth")
    assert [name for name, outcome in found.items() if outcome.passed] == ["first", "second", "third", "fourth"]
    assert found["wrong"] == Outcome("wrong", False, "3 is not 4", 1.0)
    assert found["first"] == Outcome("first", True, "", 0.25)
    assert "crashed: SIGABRT" in found["crash"].detail
    assert "ended early: exit status 0" in found["leave"].detail
    assert "ended early: exit status 1" in found["raise"].detail
    assert "out of ideas" in found["raise"].detail
    hung = run_child("hang", timeout=1)["hang"]
    assert not hung.passed
    assert "hung: no end after 1 s" in hung.detail


def test_a_process_that_dies_after_its_scenarios_fails_the_last():
    found = run_child("first", "crash-late")
    assert found["first"].passed
    assert "crashed: SIGABRT" in found["crash-late"].detail


def test_scenarios_fail_when_the_fault_changes_nothing(monkeypatch):
    """A kernel that follows bad lists as if they were sound, and one that answers everything with NaN."""
    attend = calls.attend
    monkeypatch.setattr(calls, "attend", lambda operands, mask, *rest: attend(operands, lists.block_mask(), *rest))
    with pytest.raises(AssertionError, match=r"row 1 \(float32\): 2048 of 2048 values are not NaN"):
        SCENARIOS["id-too-large"].run("cpu")
    monkeypatch.setattr(calls, "attend", lambda *a: {name: x * np.nan for name, x in attend(*a).items()})
    with pytest.raises(AssertionError, match="of key block 0"):
        SCENARIOS["id-too-large"].run("cpu")


def test_scenarios_fail_when_the_next_call_is_wrong(monkeypatch):
    attend = calls.attend
    monkeypatch.setattr(calls, "attend", lambda *a: {name: 1.01 * x for name, x in attend(*a).items()})
    with pytest.raises(AssertionError, match="the next valid call is wrong"):
        SCENARIOS["wrong-rank"].run("cpu")


def test_command_line(capsys, monkeypatch):
    assert main(["wrong-rank", "mismatched-shapes", "--implementation", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines] == ["wrong-rank: ok", "mismatched-shapes: ok", "survived"]

    @scenario("sum", "arithmetic", "three and four are seven")
    def wrong(implementation):
        assert 3 + 4 == 8, f"3 + 4 is\n{3 + 4}"

    monkeypatch.setitem(SCENARIOS, "sum", wrong)
    assert main(["sum"]) == 1
    assert re.fullmatch(r"sum: FAILED \(.* s\) 3 \+ 4 is 7.*\nsurvived\n", capsys.readouterr().out)
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(SCENARIOS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nonsense"], "no such scenario: nonsense"), (["wrong-workspace"], "not with implementation xla")],
)
def test_command_line_refuses(arguments, words, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert words in capsys.readouterr().err


def test_unsupported_is_a_not_implemented_error():
    assert issubclass(jax_bsk.UnsupportedError, NotImplementedError)
    error = jax_bsk.UnsupportedError("cpu", ["One.", "Two."])
    assert str(error) == "implementation='cpu' cannot take this call: One. Two."


def test_repeated_calls_leak_nothing():
    """Resident memory after ten thousand calls of a small jitted gradient is what it was after a thousand."""
    code = """
import resource, jax, jax.numpy as jnp, jax_bsk
x = jnp.ones((1, 64, 2, 16))
f = jax.jit(jax.grad(lambda x: jax_bsk.sparse_attention(x, x, x, is_causal=True).sum()))
def run(n):
    for _ in range(n): y = f(x)
    jax.block_until_ready(y)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(1000)
print(run(9000) - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) < 20_000  # KiB
