"""The test kit itself: the oracle against JAX and finite differences, and that the tolerance rule catches bugs."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_bsk.attention.xla import sparse_attention_xla
from jax_bsk.core.errors import UnsupportedError
from jax_bsk.masks import BlockMask
from jax_bsk.qa.testing import __main__ as command_line
from jax_bsk.qa.testing.battery import Mismatch, run_case
from jax_bsk.qa.testing.cases import CORNER_CASES, PATTERNS, Case, list_blocks, make_inputs, random_case
from jax_bsk.qa.testing.mask_draws import DRAWS
from jax_bsk.qa.testing.oracle import attention_oracle
from jax_bsk.qa.testing.tolerance import compare, dense_attention

# Of the gradients, by the names of the operands.
NAMES = {
    "query": "dq",
    "key": "dk",
    "value": "dv",
    "sinks": "dsinks",
    "gates": "dgates",
    "bias": "dbias",
    "distances": "ddistances",
    "tiles": "dtiles",
}
CASE = Case("case", 2, 40, 50, 4, 2, 8, 6, "float64", 32, 32, density=0.7, lengths=True)


@pytest.mark.parametrize("bias", [False, True])
def test_oracle_agrees_with_jax_nn(bias):
    case = dataclasses.replace(CASE, dtype="float32", lengths=False, pattern="causal", value_size=8, bias=bias)
    x = make_inputs(case)

    def attention(query, key, value):
        mask, scale = jnp.asarray(x.dense), x.scale
        return jax.nn.dot_product_attention(query, key, value, x.bias, mask, scale=scale, implementation="xla")

    with jax.numpy_dtype_promotion("standard"):
        out, pullback = jax.vjp(attention, *map(jnp.asarray, x[:3]))
        gradients = pullback(jnp.asarray(x.dout))
    oracle = attention_oracle(*x[:4], bias=x.bias, scale=x.scale, dout=x.dout)
    for name, actual in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        np.testing.assert_allclose(actual, oracle.values[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sinks": True},
        {"soft_cap": 1.5, "sinks": True, "pattern": "empty_row", "bias": True},
        {"gates": True, "sinks": True, "mask_per_head": True},
        {"gates": True, "soft_cap": 1.5, "pattern": "empty_tile"},
        {"bias": True, "distances": True, "tiles": True, "dropout": 64, "gates": True},
    ],
)
def test_oracle_gradients_are_finite_differences(fields):
    x = make_inputs(dataclasses.replace(CASE, **fields))
    operands = {"query": x.query, "key": x.key, "value": x.value, "sinks": x.sinks, "gates": x.gates}
    operands |= {"bias": x.bias, "distances": x.distances, "tiles": x.tiles}
    operands = {name: array for name, array in operands.items() if array is not None}
    rest = {"lengths": x.lengths, "scale": x.scale, "soft_cap": x.soft_cap, "entries": x.entries}
    rest["tile_numbers"] = x.pairs.tiles
    if x.dropout:
        rest["factors"] = np.random.default_rng(2).choice([0, 4 / 3], (CASE.batch, CASE.heads, CASE.q_len, CASE.kv_len))

    def run(operands, **cotangents):
        return attention_oracle(mask=x.dense, **operands, **rest, **cotangents).values

    def loss(operands):
        values = run(operands)
        lse = np.where(np.isneginf(values["lse"]), 0, values["lse"])
        return (values["out"] * x.dout).sum() + (lse * x.dlse).sum()

    gradients = run(operands, dout=x.dout, dlse=x.dlse)
    rng, step = np.random.default_rng(1), 1e-5
    for name, short in NAMES.items():
        if name not in operands:
            continue
        along = rng.standard_normal(operands[name].shape)
        up, down = (loss({**operands, name: operands[name] + sign * step * along}) for sign in (1, -1))
        np.testing.assert_allclose((gradients[short] * along).sum(), (up - down) / (2 * step), rtol=1e-6, err_msg=name)


def test_oracle_of_rows_without_keys():
    x = make_inputs(dataclasses.replace(CASE, lengths=False, sinks=True))
    nothing, lengths = np.zeros_like(x.dense), np.array([[30, 50]])
    extra = {"lengths": lengths, "scale": 1.0, "dout": x.dout, "dlse": x.dlse}
    bare = attention_oracle(*x[:3], nothing, **extra).values
    assert np.isneginf(bare["lse"]).all()
    assert x.sinks is not None
    sinks = attention_oracle(*x[:3], nothing, sinks=x.sinks, **extra).values
    np.testing.assert_array_equal(sinks["lse"][:, :, :30], np.broadcast_to(x.sinks[None, :, None], (2, 4, 30)))
    assert np.isneginf(sinks["lse"][:, :, 30:]).all(), "rows past the length have no sink"
    np.testing.assert_allclose(sinks["dsinks"], x.dlse[:, :, :30].sum((0, 2)))
    for values in (bare, sinks):
        for name in ("out", "dq", "dk", "dv"):
            assert not values[name].any(), name


@pytest.mark.parametrize("where", ["query", "key", "value", "dout"])
def test_oracle_keeps_nan_to_what_attends(where):
    x = make_inputs(dataclasses.replace(CASE, lengths=False))
    arrays: dict[str, Any] = {"query": x.query, "key": x.key, "value": x.value, "dout": x.dout}
    arrays[where] = arrays[where].copy()
    arrays[where][0, 7, 0, 0] = np.nan
    values = attention_oracle(mask=x.dense, scale=x.scale, **arrays).values
    attends = x.dense[0, 0]
    rows = attends[:, 7] if where in ("key", "value") else (np.arange(40) == 7) & attends.any(1)
    np.testing.assert_array_equal(np.isnan(values["out"][0, :, 0]).any(-1), rows & (where != "dout"))
    np.testing.assert_array_equal(np.isnan(values["dq"][0, :, 0]).any(-1), rows)
    np.testing.assert_array_equal(np.isnan(values["dk"][0, :, 0]).any(-1), attends[rows].any(0))
    assert not np.isnan(values["dv"][0, ~attends[rows].any(0), 0]).any()


# ---- the tolerance rule -------------------------------------------------------------------------------------------

BUGS = {
    "scale missing": lambda f: lambda *a, scale, **k: f(*a, scale=1.0, **k),
    "soft cap missing": lambda f: lambda *a, soft_cap, **k: f(*a, soft_cap=None, **k),
    "sinks missing": lambda f: lambda *a, sinks, **k: f(*a, sinks=None, **k),
    "gates missing": lambda f: lambda *a, gates, **k: f(*a, gates=None, **k),
    "gates one entry further": lambda f: lambda *a, gates, **k: f(*a, gates=jnp.roll(gates, 1, -1), **k),
    "gates without gradients": lambda f: lambda *a, gates, **k: f(*a, gates=jax.lax.stop_gradient(gates), **k),
    "lengths missing": lambda f: lambda *a, lengths, **k: f(*a, lengths=None, **k),
    "last block dropped": lambda f: lambda q, k, v, m, **x: f(q, k, v, with_last_block_dropped(m), **x),
    "tile bits reversed": lambda f: lambda q, k, v, m, **x: f(q, k, v, with_bits_reversed(m), **x),
    "lse in base 2": lambda f: lambda *a, **k: (lambda out, lse: (out, lse / np.log(2)))(*f(*a, **k)),
    "lse stops gradients": lambda f: lambda *a, **k: (lambda out, lse: (out, jax.lax.stop_gradient(lse)))(*f(*a, **k)),
    "one value slightly off": lambda f: (
        lambda *a, **k: (lambda out, lse: (out.at[0, 3, 0, 0].add(1e-4), lse))(*f(*a, **k))
    ),
    "values in half precision": lambda f: (
        lambda q, k, v, m, **x: f(q, k, v.astype(jnp.bfloat16).astype(v.dtype), m, **x)
    ),
    "empty rows are NaN": lambda f: (
        lambda *a, **k: (lambda out, lse: (out + 0 * lse.swapaxes(1, 2)[..., None], lse))(*f(*a, **k))
    ),
    "lse in half precision": lambda f: lambda *a, **k: (lambda out, lse: (out, lse.astype(jnp.bfloat16)))(*f(*a, **k)),
}


def with_last_block_dropped(mask: BlockMask) -> BlockMask:
    offsets = np.array(mask.row_offsets)
    offsets[..., -1] -= 1
    return dataclasses.replace(mask, row_offsets=offsets)


def with_bits_reversed(mask: BlockMask) -> BlockMask:
    bits = np.unpackbits(np.ascontiguousarray(mask.bit_tiles).view(np.uint8), axis=-1, bitorder="little")
    packed = np.packbits(bits[..., ::-1], axis=-1, bitorder="little")
    return dataclasses.replace(mask, bit_tiles=packed.view("<u4").astype(np.uint32))


RULE_CASE = Case(
    "rule", 2, 70, 80, 2, 1, 16, 16, "float32", 32, 32, "causal", lengths=True, soft_cap=2.0, sinks=True, seed=3
)


def test_rule_passes_what_is_right():
    assert "FAIL" not in run_case(RULE_CASE, sparse_attention_xla)
    assert "dgates ok" in run_case(dataclasses.replace(RULE_CASE, gates=True), sparse_attention_xla)


@pytest.mark.parametrize("bug", BUGS)
def test_rule_catches(bug):
    case = RULE_CASE
    if bug == "empty rows are NaN":  # needs rows whose lse is -inf
        case = dataclasses.replace(case, sinks=False)
    if bug.startswith("gates"):
        case = dataclasses.replace(case, gates=True)
    with pytest.raises(Mismatch, match=r"repro: python -m jax_bsk.qa.testing --case rule"):
        run_case(case, BUGS[bug](sparse_attention_xla), gradients="gradients" in bug)


def test_rule_compares_patterns_of_infinities():
    oracle = np.array([1.0, -np.inf, np.nan])
    arguments = {"reference": oracle, "magnitude": np.ones(3), "dtype": np.float32, "gradient": False}
    assert compare("x", oracle, oracle, **arguments).ok
    for wrong in ([1.0, 0.0, np.nan], [1.0, -np.inf, 0.0], [np.nan, -np.inf, np.nan], [1.0, np.inf, np.nan]):
        assert not compare("x", np.array(wrong), oracle, **arguments).ok


def test_rule_on_exact_results():
    exact = {"reference": np.ones(4), "magnitude": np.ones(4), "dtype": np.float32, "gradient": False}
    assert compare("x", np.ones(4), np.ones(4), **exact).ok
    assert not compare("x", np.ones(4) + 1e-5, np.ones(4), **exact).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dense_reference_keeps_its_dtypes(dtype):
    x = make_inputs(dataclasses.replace(CASE, dtype=dtype, lengths=False))
    out, lse = dense_attention(*map(jnp.asarray, x[:4]), scale=x.scale)
    assert (out.dtype, lse.dtype) == (jnp.dtype(dtype), jnp.float32)


# ---- cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_cases_have_the_mask_they_say(pattern):
    case = dataclasses.replace(CASE, pattern=pattern, mask_per_head=True, q_len=70, kv_len=100, dtype="float32")
    inputs = make_inputs(case)
    assert inputs.dense.shape == (1, 4, 70, 100)
    np.testing.assert_array_equal(inputs.mask.to_dense(), inputs.dense)
    np.testing.assert_array_equal(list_blocks(inputs.dense, 32, 32).to_dense(), inputs.dense)


def test_empty_tiles_are_listed():
    inputs = make_inputs(CORNER_CASES["empty-tiles"])
    tiles = np.asarray(inputs.mask.bit_tiles).reshape(-1, 64 * 2)
    assert (~tiles.any(1)).any()


def test_random_cases_repeat_and_vary():
    cases = [random_case(seed) for seed in range(300)]
    assert cases == [random_case(seed) for seed in range(300)]
    for field in (
        "pattern",
        "dtype",
        "block_q",
        "head_size",
        "sinks",
        "lengths",
        "mask_per_head",
        "mask_per_batch",
        "gates",
    ):
        assert len({getattr(case, field) for case in cases}) > 1, field
    assert {case.heads // case.kv_heads for case in cases} == {1, 4, 8}
    assert {case.pattern for case in cases} == {*PATTERNS, *DRAWS}
    assert min(case.q_len for case in cases) == 1
    assert max(case.q_len for case in cases) <= 1024
    few = [case for case in cases if case.kv_len > 1024]
    assert few
    assert all(case.kv_len <= 3 * 1024 and case.q_len * case.heads // case.kv_heads <= 64 for case in few)
    a, b = (make_inputs(random_case(5, max_len=100)) for _ in range(2))
    np.testing.assert_array_equal(a.query, b.query)
    np.testing.assert_array_equal(a.dense, b.dense)


def test_command_line_repeats_a_case(capsys, monkeypatch):
    with jax.numpy_dtype_promotion("standard"):
        assert command_line.main(["--case", "one-token"]) == 0
        assert "out" in capsys.readouterr().out
        case = random_case(3, max_len=64)
        assert case.repro == "python -m jax_bsk.qa.testing --seed 3"
        monkeypatch.setattr(command_line, "from_public", lambda _: BUGS["lse in base 2"](sparse_attention_xla))
        assert command_line.main(["--seed", "3", "--max-len", "64"]) == 1
        assert (
            "repro: python -m jax_bsk.qa.testing --seed 3 --implementation xla --max-len 64" in capsys.readouterr().out
        )


def test_command_line_counts_refused_cases(capsys, monkeypatch):
    def judge(case, *_, **__):
        if case.seed == 3:
            raise UnsupportedError("cuda", ["The head size is odd; pad it."])
        return types.SimpleNamespace(report=lambda _: "fine")

    monkeypatch.setattr(command_line.battery, "judge_case", judge)
    assert command_line.main(["--seed", "3", "--count", "2"]) == 0
    lines = ["refused seed-3: The head size is odd; pad it.", "seed-4 ok", "1 of 2 cases passed, 1 refused"]
    assert capsys.readouterr().out.splitlines() == lines
    assert command_line.main(["--seed", "3"]) == 1, "nothing was judged"
