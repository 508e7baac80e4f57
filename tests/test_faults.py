"""The fault table: every scenario of `qa.testing.faults` on every implementation that runs here, and its runner.

Where a crash or a hang is conceivable, scenarios run in a process apart from this one, those of an implementation
together; `tests/test_cuda.py` has the same for the CUDA kernels.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys

import numpy as np
import pytest

import jax_bsk
from jax_bsk.qa.testing import worker
from jax_bsk.qa.testing.faults import (
    SCENARIOS,
    Outcome,
    calls,
    lists,
    run_all_in_subprocesses,
)
from jax_bsk.qa.testing.faults.__main__ import main
from jax_bsk.qa.testing.faults.scenario import scenario
from jax_bsk.qa.testing.isolate import Worker

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


# Stands in for `python -m jax_bsk.qa.testing.worker`, without its tasks.
CHILD = """
import os, sys, time
for line in sys.stdin:
    name = line.split()[0]
    if name == "crash": os.abort()
    if name == "hang": time.sleep(60)
    if name == "leave": os._exit(0)
    if name == "raise": raise RuntimeError("out of ideas")
    print('{"task": "%s", "ok": %s, "text": ""}' % (name, "false" if name == "wrong" else "true"))
    print("null", flush=True)
if name == "crash-late": os.abort()
"""


def child(seconds: float = 20) -> Worker:
    return Worker("cpu", seconds, command=[sys.executable, "-c", CHILD])


def test_a_crash_a_hang_and_a_wrong_answer_are_told_apart():
    worker = child()
    names = ("first", "wrong", "crash", "second", "leave", "third", "raise", "fourth")
    found = {name: record for name in names for record in worker.ask(name)}
    assert worker.close() == ""
    assert [name for name, record in found.items() if record["ok"]] == ["first", "second", "third", "fourth"]
    assert found["wrong"] == {"task": "wrong", "ok": False, "text": ""}
    assert "crashed: SIGABRT" in found["crash"]["text"]
    assert "ended early with status 0" in found["leave"]["text"]
    assert "ended early with status 1" in found["raise"]["text"]
    assert "out of ideas" in found["raise"]["text"]
    (hung,) = child(seconds=1).ask("hang")
    assert not hung["ok"]
    assert "does not end (limit 1 s)" in hung["text"]


def test_a_process_that_dies_after_its_tasks_says_so():
    worker = child()
    (record,) = worker.ask("crash-late")
    assert record["ok"]
    assert "status -6 after its last task" in worker.close()


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
    def wrong(*args, **kwargs):
        out, lse = calls.battery.from_public("cpu")(*args, **kwargs)
        return 1.01 * out, lse

    monkeypatch.setattr(calls, "_valid_call", lambda implementation: wrong)
    with pytest.raises(AssertionError, match="the next valid call is wrong"):
        SCENARIOS["wrong-rank"].run("cpu")


def test_scenarios_are_tasks_of_workers(monkeypatch):
    @scenario("sum", "arithmetic", "three and four are seven")
    def wrong(implementation):
        assert 3 + 4 == 8, f"3 + 4 is\n{3 + 4}"

    monkeypatch.setitem(SCENARIOS, "sum", wrong)
    (right,), (record,) = worker.answer("fault:wrong-rank", "cpu"), worker.answer("fault:sum", "cpu")
    assert (right["ok"], right["text"]) == (True, "")
    assert not record["ok"]
    assert re.fullmatch(r"3 \+ 4 is 7.*", record["text"])


def test_command_line(capsys):
    assert main(["wrong-rank", "id-huge", "--implementation", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == ["wrong-rank: ok", "id-huge: ok"]
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
