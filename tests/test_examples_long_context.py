"""The long-context example runs with every kind of attention, and asks what its sequences can answer."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jax_bsk

EXAMPLE = Path(jax_bsk.__file__).parents[1] / "examples" / "long_context.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("long_context", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(autouse=True)
def implicit_promotion():
    """Flax's norms and optax's optimizers rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def tiny(example):
    return example.Config(
        steps=3, length=256, batch=2, needles=4, questions=2, heads=2, head_dim=8, top_k=3, phases=1, test_sequences=4
    )


def test_every_kind_trains_and_is_reported(example, tiny, tmp_path, capsys):
    runs = [example.train(kind, tiny) for kind in example.KINDS]
    example.report(runs, tmp_path)
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in example.KINDS), printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == list(example.KINDS)
    for kind, run in summary.items():
        assert len(run["losses"]) == len(run["accuracies"]) == 3, kind
        assert np.isfinite(run["losses"]).all(), (kind, run["losses"])
        assert 0 <= run["accuracy"] <= 1, kind
        assert run["step_seconds"] > 0, kind
        assert run["peak_memory_bytes"] > 0, kind
    assert (tmp_path / "long_context.png").stat().st_size > 1000
    # 8 x 8 blocks: causal 36; at most 3 a row: 1 + 2 + 6 x 3; the window's first keys lie in one block more. NSA: as
    # many as MoBA, 3 of the 2 x 2 blocks of 128 for the window, and 15 means for 256 queries.
    shares = {kind: run["visited_share"] * 64 for kind, run in summary.items()}
    nsa = 21 + 3 * 16 + 15 * 256 / 32**2
    assert shares == pytest.approx({"full": 36, "window": 26, "moba": 21, "window+moba": 21, "sparsek": 21, "nsa": nsa})


def test_the_command_runs_a_kind_in_its_own_process(example, tmp_path):
    example.main(f"--output {tmp_path} --kinds window --length 512 --steps 2 --batch 2 --seed 3".split())
    run = json.loads((tmp_path / "summary.json").read_text())["window"]
    config = run["config"]
    assert (config["length"], config["steps"], config["batch"], config["seed"]) == (512, 2, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long_context.png", "summary.json"]


def test_a_gpus_settings_fit_together(example):
    config = example.Config.for_backend("gpu")
    tokens = jax.ShapeDtypeStruct((1, config.length), np.int32)
    for kind in example.KINDS:
        logits, share = jax.eval_shape(lambda x, kind=kind: example.Model(config, kind, nnx.Rngs(0))(x), tokens)
        assert logits.shape == (1, config.questions * config.block, config.vocabulary), kind
        assert share.shape == (), kind


def test_questions_are_answered_by_the_needles(example, tiny):
    tokens, answers = example.sequences(tiny, 50, np.random.default_rng(0))
    assert tokens.shape == (50, 256)
    assert answers.shape == (50, 64)
    for row, answer in zip(tokens, answers, strict=True):
        places = np.flatnonzero(row[: tiny.context] < 16)
        values = dict(zip(row[places], row[places + 1], strict=True))
        assert len(values) == tiny.needles
        assert all(16 <= value < 32 for value in values.values())
        np.testing.assert_array_equal([values[key] for key in row[tiny.context :]], answer)


def test_lengths_double_from_phase_to_phase(example, tiny):
    config = dataclasses.replace(tiny, steps=4, length=512, phases=2)
    assert [(phase.length, phase.steps) for phase in config.in_phases()] == [(256, 2), (512, 2)]
    run = example.train("sparsek", config)
    assert len(run["losses"]) == 4
    assert run["config"]["length"] == 512
    with pytest.raises(ValueError, match="steps are a multiple of the 2 phases"):
        dataclasses.replace(config, steps=3)
    with pytest.raises(ValueError, match="got 64 to 128"):
        dataclasses.replace(config, length=128)


def test_a_length_that_does_not_fit_is_refused(example):
    for length in (1000, 256):
        with pytest.raises(ValueError, match=f"multiple of 32 .* to {length}"):
            example.Config(length=length)


def test_kinds_start_alike(example, tiny):
    """Also with a layer after the one that has parameters of its own."""
    config = dataclasses.replace(tiny, layers=2)
    states = {}
    for kind in example.KINDS:
        state = nnx.state(example.Model(config, kind, nnx.Rngs(0, score=0)), nnx.Param)
        states[kind] = {path: value[...] for path, value in nnx.to_flat_state(state)}
    assert states["sparsek"].keys() - states["full"].keys() == {
        ("layers", n, "attention", "score", "kernel") for n in (0, 1)
    }
    assert states["nsa"].keys() - states["full"].keys() == {
        ("layers", n, "attention", "gate", name) for n in (0, 1) for name in ("kernel", "bias")
    }
    for kind, state in states.items():
        for path in states["full"]:
            np.testing.assert_array_equal(state[path], states["full"][path], err_msg=f"{kind} {path}")
