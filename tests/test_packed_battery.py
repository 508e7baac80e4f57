"""The numeric battery of packed attention: random layouts, forward and all gradients, against float64."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jax_bsk.core import dispatch
from jax_bsk.qa.testing import __main__ as command
from jax_bsk.qa.testing.packed import battery, cases


@pytest.fixture
def runs(implementation):
    if reasons := dispatch.unavailable(implementation):
        pytest.skip(" ".join(reasons))
    return implementation


def run(case, implementation):
    with jax.numpy_dtype_promotion("standard"):
        battery.run_case(case, implementation)


@pytest.mark.parametrize("name", cases.CORNER_CASES)
def test_corner(name, runs):
    if runs == "xla" and name not in ("nothing", "bottom-right", "heads"):
        pytest.skip("some of them: a program takes seconds to compile")
    run(cases.CORNER_CASES[name], runs)


def test_random(random_seed, runs):
    if random_seed % {"cpu": 8, "xla": 60}[runs]:
        pytest.skip("every 8th seed, or 60th")
    shape = cases.random_case(random_seed, max_len=400)
    for draw in range(3):
        run(cases.redraw(shape, draw), runs)


def test_float64(runs):
    with jax.enable_x64():
        run(dataclasses.replace(cases.CORNER_CASES["fewer-keys"], dtype="float64"), runs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.CORNER_CASES)
def test_corner_on_a_gpu(name):
    run(cases.CORNER_CASES[name], "cuda")


def test_what_is_wrong_is_found(monkeypatch):
    """A key too many of each sequence."""
    right = battery.packed_attention
    case = cases.CORNER_CASES["bottom-right"]

    def wrong(query, key, value, q_numbers, kv_numbers, **options):
        return right(query, key, value, q_numbers, kv_numbers.at[1].add(1), **options)

    battery._program.cache_clear()
    monkeypatch.setattr(battery, "packed_attention", wrong)
    judged = battery.judge_case(case, "cpu", gradients=False)
    battery._program.cache_clear()
    assert not judged.ok
    assert {c.name for c in judged.comparisons if not c.ok} == {"out", "lse"}


def test_draws_share_a_program():
    shape = cases.random_case(5)
    for draw in range(cases.DRAWS):
        case = cases.redraw(shape, draw)
        assert battery._static(case) == battery._static(shape)
        inputs = cases.make_inputs(case)
        assert inputs.q_numbers.shape == (case.sequences + 1,)
        assert np.diff(inputs.q_numbers).max() <= case.longest
        assert inputs.q_numbers[-1] <= case.q_len


def test_the_command(capsys):
    assert command.main(["packed", "--case", "one-token", "--implementation", "cpu", "--no-gradients"]) == 0
    assert "out" in capsys.readouterr().out
    assert cases.redraw(cases.random_case(5), 2).repro == "python -m jax_bsk.qa.testing packed --seed 5 --draw 2"
