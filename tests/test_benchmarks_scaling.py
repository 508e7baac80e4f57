"""benchmarks/scaling.py on host devices: what it writes, what it checks, and the arithmetic of its model."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture(scope="module")
def script():
    """The script with its modules beside it, as if it was started from a shell."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield runpy.run_path(str(BENCHMARKS / "scaling.py"))
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model(script):
    return importlib.import_module("parallel.model")


def test_all_parts_on_two_devices(script, tmp_path, capsys):
    pytest.importorskip("optax")
    path = tmp_path / "scaling.json"
    command = ["--quick", "--devices", "2", "--masks", "window", "--output", str(path)]
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        assert script["main"](command) == 0
    result = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert result["ok"]
    rows = {(row["part"], row["split"]): row for row in result["rows"]}
    splits = ["sequence", "data", "heads"]
    assert list(rows) == [*(("attention", s) for s in splits), ("decode", "cache"), *(("step", s) for s in splits)]
    for (part, split), row in rows.items():
        assert row["ok"]
        compared = {"attention": "out, dquery, dkey, dvalue", "decode": "out", "step": "new parameters, loss"}[part]
        assert row["repeats"] == {"count": 2, "equal": True, "of": compared, "different": []}
        for key in {"attention": ("forward", "both"), "step": ("step",)}.get(part, ()):
            assert row["one"]["what"] == "the same problem"
            assert row[f"{key}_efficiency"] == pytest.approx(row["one"][f"{key}_ms"] / 2 / row[f"{key}_ms"])
        if part == "attention" and split != "sequence":
            assert all(row["bit_equal"].values())
            assert not row["forward_collectives"]
            assert not row["both_collectives"]
            assert row["both_program_bytes"] == 0
            assert row["rows_against_float64"]["ok"]
    attention, step, decode = rows["attention", "sequence"], rows["step", "sequence"], rows["decode", "cache"]
    assert attention["bit_equal"]["out"]
    assert attention["bit_equal"]["dquery"]
    assert attention["predicted_bytes"] == attention["forward_program_bytes"] > 0
    assert step["loss"] == pytest.approx(step["one"]["loss"], rel=1e-4)
    assert set(rows["step", "data"]["step_collectives"]) == {"all-reduce"}
    assert decode["efficiency"] == pytest.approx(decode["one"]["seconds"] / 2 / decode["seconds"])
    assert set(decode["collectives"]) == {"all-gather"}

    # The model is compared with it, and the page's tables are made of it.
    (again,) = importlib.import_module("parallel.model").measured_again(result)
    assert (again.name, again.order) == ("window", attention["order"])
    assert again.seconds == (1e-3 * attention["forward_ms"], 1e-3 * attention["both_ms"])
    figures = runpy.run_path(str(BENCHMARKS.parent / "tools" / "figures.py"))
    figures["scaling_step"].__globals__["SCALED"] = path
    for name, lines in {"scaling_attention": 3, "scaling_decoding": 2, "scaling_step": 3}.items():
        text = figures[name]()
        assert len(re.findall(r"^\| .*", text, re.MULTILINE)) == 2 + lines
        assert "rows passed their checks" in text
        assert ("Not measured: causal" in text) == (name != "scaling_decoding")
    # A later run keeps the rows of cases that it does not measure: here it has time for none.
    capsys.readouterr()
    assert script["main"]([*command, "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count("not started") == 3
    assert json.loads(path.read_text()) == result


def test_where_one_device_has_no_room_it_runs_a_share(script, tmp_path):
    path = tmp_path / "scaling.json"
    command = ["--quick", "--devices", "2", "--parts", "attention", "--masks", "window", "--splits", "heads"]
    assert script["main"]([*command, "--memory", "0.002", "--output", str(path)]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["one"]["what"] == "1/2 of the batch"
    assert row["both_efficiency"] == pytest.approx(row["one"]["both_ms"] / row["both_ms"])
    assert all(row["bit_equal"].values())


def test_splits_that_the_devices_do_not_divide_say_so(script):
    cases, layouts = (importlib.import_module(f"parallel.{name}") for name in ("cases", "layouts"))
    case = cases.case("causal", 512, 3, 6, cases.QUICK)
    found, refused = layouts.layouts(case, layouts.DEFAULT_SPLITS, jax.devices()[:4], cases.QUICK)
    assert [way.split for way in found] == ["sequence"]
    assert set(refused) == {"data", "heads", "data x sequence"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = bf16[1,8,4]{2,1,0} all-gather(bf16[1,4,4] %x), replica_groups={{0,1},{2,3}}", 32),
        ("%a = (f32[2]{0}, f32[8]{0}) all-gather-start(f32[2] %x), replica_groups=[1,4]<=[4]", 24),
        ("%a = f32[8]{0} collective-permute(f32[8] %x), source_target_pairs={{0,1}}", 32),
        ("%a = (f32[8]{0}, f32[4]{0}) all-reduce(f32[8] %x, f32[4] %y), replica_groups=[1,2]<=[2]", 48),
        ("%a = f32[2]{0} reduce-scatter(f32[8] %x), replica_groups=[1,4]<=[4]", 24),
        ("%a = f32[8]{0} all-reduce(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%f", 32),
        ("%a = f32[8]{0} all-gather(%x), replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}, dimensions={0}", 24),
        ("%a = f32[8]{0} add(f32[8] %x, f32[8] %y)", 0),
    ],
)
def test_bytes_of_collectives(script, line, expected):
    assert importlib.import_module("parallel.measuring").collective_bytes(line, 4) == expected


def test_the_gradient_of_ordered_rows_is_that_of_the_lookup(script):
    look_up = importlib.import_module("training.model")._look_up
    table, dx = (jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate([(7, 4), (2, 6, 4)]))
    tokens = np.array([[0, 3, 3, 6, 3, 1], [6, 6, 6, 6, 6, 0]])

    def in_steps(x):  # three steps of a token per example and device, of which there are two
        return jnp.moveaxis(x.reshape(2, 2, 3, 1, *x.shape[2:]), 2, 0)

    got, back = jax.vjp(lambda table: look_up(table, tokens, table.dtype, in_steps), table)
    want, scattered = jax.vjp(lambda table: jnp.take(table, tokens, axis=0), table)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(back(dx)[0], scattered(dx)[0], rtol=1e-6, atol=1e-6)


# ---- The model


def test_seconds_of_the_slowest_device(model):
    """Two devices: one has rows beside its exchange, the other waits for 2 seconds of bytes."""
    loads = model.Loads(np.array([6, 0]), np.array([1, 4]), np.array([1, 1]) / 1e6, np.array([4, 6]), 0, 0)
    assert loads.seconds(1.0, 3.0, 1.0, False) == max(max(6, 4 / 3) + 1, 2 + 4)
    assert loads.seconds(1.0, 3.0, 1.0, True) == max(7 + 4 / 3, 6 + 2)
    alone = model.Loads(np.zeros(2), np.array([1, 4]), np.array([1, 1]) / 1e6, np.array([0, 6]), 30, 0)
    assert alone.seconds(1.0, 3.0, 10.0, False) == 3 + 4, "the copy takes longer than the bytes"
    row = model.Loads(np.zeros(1), np.array([4]), np.array([1]), np.array([0]), 0, 0)
    assert row.seconds(1.0, 3.0, 1.0, False) == model.MULTIPROCESSORS, "its longest row is one multiprocessor's"


def test_the_fit_finds_the_constants_that_made_the_times(model):
    blocks = {"a": (2e-8, 5e-8), "b": (1e-8, 4e-8)}
    true = model.TimeModel(blocks, 250e9, (2e-4, 7e-4), 4e12)
    rng = np.random.default_rng(0)
    rows = []
    for name in blocks:
        near, far, received = (rng.integers(1, most, 2) for most in (50_000, 90_000, 900_000_000))
        loads = model.Loads(near, far, np.ones(2), received, 0, 1)
        rows.append(model.Measured(name, "plan", loads, true.seconds(name, loads)))
    found = model.fit(blocks, rows, 4e12)
    assert found.bytes_per_second == 250e9
    assert found.constants == pytest.approx(true.constants)
    errors = model.errors(blocks, rows, 4e12, rows[:1])
    assert errors["errors_again"]["largest"] == pytest.approx(0, abs=1e-6)
    assert "errors_again" not in model.errors(blocks, rows, 4e12)


def test_the_committed_table(model):
    """Its columns, its error, and rows that are computed again."""
    committed = json.loads((RESULTS / "scaling-simulated.json").read_text())
    results = json.loads((RESULTS / "context-nvidia-h200-x2.json").read_text())
    masks = ("window",)
    again = model.table(results, committed["constants"]["copy_bytes_per_second"], (131072,), (2, 8), masks=masks)
    rows = {(row["mask"], row["length"], row["shards"]): row for row in committed["rows"]}
    assert len(rows) == 5 * 2 * 5
    for row in again["rows"]:
        assert rows[row["mask"], row["length"], row["shards"]] == pytest.approx(row)
    assert again["model"]["errors"] == pytest.approx(committed["model"]["errors"])
    assert committed["model"]["errors"]["largest"] < 0.1
    assert len(committed["model"]["rows"]) == 2 * len(results["cases"])
    for row in rows.values():
        assert row["balance"] >= 1
        assert row["both_ms"] > row["forward_ms"] > 0
        assert row["received_bytes"] > 0
        assert 0 < row["both_efficiency"] <= 1 / row["balance"] + 1e-9
