"""The native choice of key blocks: bit by bit plain JAX's, transformed, sharded, lowered."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_bsk
from jax_bsk.core import compat, library
from jax_bsk.lists import ffi, native
from jax_bsk.masks import CausalMask, LocalMask
from jax_bsk.qa.testing.faults.boundary import check_refused
from jax_bsk.qa.testing.faults.direct import DirectCall, shape
from jax_bsk.selection import choice, from_topk, moba, nsa
from jax_bsk.selection.candidates import EMPTY, FULL, Candidates, Required
from tests.util import assert_close, collectives, text_of

CALL = "custom_call @jax_bsk_lists_choose("
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 3.4028235e38, -3.4028235e38, 1e-38, 1e-45, -1e-45], np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """Scores [tables.., nq, groups] and what is known before them."""

    scores: np.ndarray
    k: int
    required: np.ndarray | None
    candidates: Candidates


def make(seed: int, tables: tuple[int, ...] = (2, 3)) -> Case:
    """Rows of random sizes with ties, numbers that are none, few open groups, and more required than k."""
    rng = np.random.default_rng(seed)
    nq, group = int(rng.integers(0, 20)), int(rng.integers(1, 4)) if seed % 2 else 1
    nk = int(rng.integers(0, 70))
    tiles = rng.choice([EMPTY, FULL, 0, 2], (nq, nk), p=[0.2, 0.6, 0.1, 0.1]).astype(np.int32)
    if seed % 3:
        tiles = np.where(np.arange(nk) * nq > np.arange(nq)[:, None] * nk, EMPTY, tiles)  # causal
    candidates = Candidates(tiles, np.zeros((1, 1, 3, 32, 1), np.uint32), nq * 32, nk * 32, 32, 32, group)
    groups = candidates.open_groups.shape[1]
    scores = rng.normal(size=(*tables, nq, groups)).astype(np.float32)
    kinds = rng.integers(0, 4, (*tables, nq, 1))
    scores = np.where(kinds == 1, np.round(scores * 2), scores)  # ties
    special = rng.choice(SPECIAL, scores.shape)
    scores = np.where((kinds == 2) & (rng.random(scores.shape) < 0.5), special, scores)
    scores = np.where((kinds == 3) & (rng.random(scores.shape) < 0.9), -np.inf, scores).astype(np.float32)
    required = None if seed % 4 == 0 else rng.random((nq, groups)) < 0.1
    return Case(scores, int(rng.integers(1, 12)), required, candidates)


def fields(mask):
    return mask.row_offsets, mask.kv_blocks, mask.tiles


def choose(case: Case, scores=None):
    scores = jnp.asarray(case.scores) if scores is None else scores
    return fields(choice.choose_top_k(scores, case.k, Required(case.required, None), case.candidates))


def in_jax(case: Case, monkeypatch):
    """As where there is no native library."""
    with monkeypatch.context() as patched:
        patched.setattr(ffi, "choose_refusals", lambda *_, **__: ["no"])
        return jax.jit(lambda scores: choose(case, scores))(case.scores)


def plainest(case: Case):
    """A row at a time. XLA takes subnormal numbers as 0 on the CPU."""
    tiny = np.finfo(np.float32).tiny if compat.default_platform() == "cpu" else 0
    tables, (nq, nk), group = case.scores.shape[:2], case.candidates.tiles.shape, case.candidates.group
    open_groups = case.candidates.open_groups
    lists = []
    for at in np.ndindex(tables):
        offsets, entries = [0], []
        for i in range(nq):
            row = case.scores[at][i].astype(np.float64)
            row = np.where(np.abs(row) < tiny, 0, np.minimum(row, np.finfo(np.float32).max))
            must = (np.zeros_like(open_groups) if case.required is None else case.required)[i] & open_groups[i]
            may = [j for j in np.argsort(-row, kind="stable") if open_groups[i, j] and not must[j] and row[j] > -np.inf]
            chosen = [*np.flatnonzero(must), *may[: max(0, case.k - must.sum())]]
            blocks = [b for j in chosen for b in range(j * group, min(j * group + group, nk))]
            row_tiles = case.candidates.tiles[i]
            ordered = sorted((row_tiles[b] == FULL, b) for b in blocks if row_tiles[b] != EMPTY)
            entries += [(b, row_tiles[b]) for _, b in ordered]
            offsets.append(len(entries))
        lists.append((offsets, entries))
    return lists


def check_case(case: Case, monkeypatch) -> None:
    assert library.load(compat.default_platform()).usable
    got = choose(case)
    for name, x, y in zip(("row_offsets", "kv_blocks", "tiles"), got, in_jax(case, monkeypatch), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, name)
    offsets, ids, tiles = (x.reshape(-1, x.shape[-1]) for x in map(np.asarray, got))
    for n, (row_offsets, entries) in enumerate(plainest(case)):
        np.testing.assert_array_equal(offsets[n], row_offsets)
        end = len(entries)
        np.testing.assert_array_equal(np.stack([ids[n, :end], tiles[n, :end]], -1), np.reshape(entries, (-1, 2)))
        assert (ids[n, end:] == -1).all()
        assert (tiles[n, end:] == -1).all()


@pytest.mark.parametrize("seed", range(40))
def test_native_is_plain_jax(seed, monkeypatch):
    check_case(make(seed), monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40, 60))
def test_cuda_is_plain_jax(seed, monkeypatch):
    check_case(make(seed), monkeypatch)


@pytest.mark.parametrize(
    ("tables", "nq", "nk", "k"), [((0, 2), 3, 4, 2), ((1, 0), 3, 4, 2), ((2, 1), 0, 4, 2), ((2, 1), 3, 0, 2)]
)
def test_nothing_to_choose_from(tables, nq, nk, k, monkeypatch):
    tiles = np.full((nq, nk), FULL, np.int32)
    candidates = Candidates(tiles, np.zeros((1, 1, 0, 32, 1), np.uint32), nq * 32, nk * 32, 32, 32, 1)
    case = Case(np.zeros((*tables, nq, nk), np.float32), k, None, candidates)
    jax.tree.map(np.testing.assert_array_equal, choose(case), in_jax(case, monkeypatch))


@pytest.mark.parametrize("k", [5, 2**40])
def test_k_beyond_all_groups(k, monkeypatch):
    case = dataclasses.replace(make(8), k=k)
    got = choose(dataclasses.replace(case, k=case.scores.shape[-1]))
    jax.tree.map(np.testing.assert_array_equal, choose(dataclasses.replace(case, k=2**40)), got)
    jax.tree.map(np.testing.assert_array_equal, choose(case), in_jax(case, monkeypatch))


def test_vmap_adds_tables():
    case = make(10, (1, 2))
    stacked = np.stack([case.scores, case.scores[..., ::-1], case.scores[:, ::-1]])
    got = jax.vmap(functools.partial(choose, case))(stacked)
    twice = jax.vmap(jax.vmap(functools.partial(choose, case)))(stacked[None])
    for i in range(3):
        jax.tree.map(np.testing.assert_array_equal, tuple(x[i] for x in got), choose(case, stacked[i]))
    jax.tree.map(np.testing.assert_array_equal, tuple(x[0] for x in twice), got)


def run(text: str) -> bool:
    return 'custom_call_target="jax_bsk_lists_choose"' in text and "sort(" not in text


def mesh_of(shape: tuple[int, int], axis_type=AxisType.Auto) -> jax.sharding.Mesh:
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), devices=devices, axis_types=(axis_type,) * 2)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_tables_shard_without_a_collective(axis_type):
    mesh = mesh_of((2, 2), axis_type)
    case = make(11, (4, 6))
    sharding = NamedSharding(mesh, PartitionSpec("data", "model"))
    with jax.sharding.set_mesh(mesh):
        placed = jax.device_put(case.scores, sharding)
        compiled = jax.jit(functools.partial(choose, case)).lower(placed).compile()
        results = compiled(placed)
    assert run(text_of(compiled))
    assert collectives(compiled) == []
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x in results)
    jax.tree.map(np.testing.assert_array_equal, results, choose(case))


def test_rows_that_are_sharded_are_gathered():
    mesh = mesh_of((2, 1))
    case = make(13, (2, 1))
    scores = np.concatenate([case.scores] * 2, -2)
    assert case.required is not None
    case = dataclasses.replace(
        case,
        scores=scores,
        required=np.concatenate([case.required] * 2),
        candidates=dataclasses.replace(case.candidates, tiles=np.concatenate([case.candidates.tiles] * 2)),
    )
    placed = jax.device_put(scores, NamedSharding(mesh, PartitionSpec(None, None, "data")))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(functools.partial(choose, case))(placed), choose(case))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = mesh_of((2, 2))
    case = make(14, (2, 4))
    spec = PartitionSpec("data", "model")
    mapped = jax.shard_map(
        functools.partial(choose, case), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    compiled = jax.jit(mapped).lower(case.scores).compile()
    assert run(text_of(compiled))
    assert collectives(compiled) == []
    jax.tree.map(np.testing.assert_array_equal, compiled(case.scores), choose(case))


def test_partly_manual_shard_map():
    mesh = mesh_of((2, 2))
    case = make(14, (2, 4))
    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        functools.partial(choose, case), mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"data"}
    )
    placed = jax.device_put(case.scores, NamedSharding(mesh, PartitionSpec("data", "model")))
    jax.tree.map(np.testing.assert_array_equal, jax.jit(mapped)(placed), choose(case))


def lowered(platform, groups=20, dtype=jnp.float32):
    scores = jax.ShapeDtypeStruct((1, 2, 10, groups), dtype)
    function = jax.jit(lambda x: fields(from_topk(x, 3, q_len=320, kv_len=32 * groups, block_size=32)))
    checks = jax_bsk.export_checks()
    return jax.export.export(function, platforms=[platform], disabled_checks=checks)(scores).mlir_module()


def test_other_platforms_types_and_sizes_have_plain_jax(monkeypatch):
    assert CALL in lowered("cpu")
    assert CALL in lowered("cpu", dtype=jnp.bfloat16)  # converted
    assert "stablehlo.sort" not in lowered("cpu")
    assert CALL not in lowered("tpu")
    with jax.enable_x64(True):
        assert CALL not in lowered("cpu", dtype=jnp.float64)
    # As a CUDA library says of itself, whose rows are in shared memory.
    limited = library.Library("cuda", {"lists_max_groups": 100}, None)
    monkeypatch.setattr(library, "load", lambda platform: limited)
    assert CALL in lowered("cuda", groups=100)
    # Entries and counts of 2 x 10 rows, two words each, behind the results.
    assert "tensor<160xi32>" in lowered("cuda")
    assert CALL not in lowered("cuda", groups=101)
    monkeypatch.setattr(library, "load", lambda platform: library.Library(platform, {}, "not built"))
    assert CALL not in lowered("cuda")


def test_float64_orders_as_float64(monkeypatch):
    """Scores that float32 would make equal."""
    with jax.enable_x64(True):
        scores = 1 + 1e-12 * np.array([[0.0, 3.0, 1.0, 2.0]])
        selected = jax.jit(lambda x: from_topk(x, 2, q_len=32, kv_len=128, block_size=32))(scores)
    np.testing.assert_array_equal(selected.kv_blocks[0, 0], [1, 3])


@pytest.mark.parametrize("select", ["from_topk", "moba", "nsa"])
def test_selections_make_the_call_and_no_sort(select):
    inputs = {
        "from_topk": (lambda x: from_topk(x, 2, q_len=128, block_size=32, mask=CausalMask()), [jnp.ones((2, 3, 4, 4))]),
        "moba": (lambda q, k: moba(q, k, block_size=32, moba_block=64), [jnp.ones((1, 128, 2, 8))] * 2),
        "nsa": (lambda q, k: nsa(q, k, block_size=32, selection_block=32), [jnp.ones((1, 128, 2, 8))] * 2),
    }
    function, arguments = inputs[select]
    assert run(text_of(jax.jit(lambda *a: fields(function(*a))).lower(*arguments).compile()))


def test_gradients_pass_by_the_choice():
    """Scores have none, and what was computed with them keeps its own."""
    x = jax.random.normal(jax.random.key(0), (1, 128, 2, 16))

    def attend(x, scores):
        mask = from_topk(scores, 2, q_len=128, block_size=32, mask=CausalMask(), own_block=True)
        return (jax_bsk.sparse_attention(x, x, x, mask=mask) ** 2).sum()

    scores = jax.random.normal(jax.random.key(1), (1, 2, 4, 4))
    dx, dscores = jax.jit(jax.grad(attend, (0, 1)))(x, scores)
    np.testing.assert_array_equal(dscores, np.zeros_like(scores))
    chosen = from_topk(scores, 2, q_len=128, block_size=32, mask=CausalMask(), own_block=True)
    given = jax.grad(lambda x: (jax_bsk.sparse_attention(x, x, x, mask=chosen) ** 2).sum())(x)
    assert_close(dx, given)
    both = jax.vmap(jax.grad(attend), (None, 0))(x, jnp.stack([scores, -scores]))
    assert_close(both[0], dx)


def test_a_mask_of_several_tiles_is_plain_jax(monkeypatch):
    scores = jax.random.normal(jax.random.key(2), (1, 3, 3, 9))
    options = {"q_len": 150, "kv_len": 260, "block_size": (64, 32), "mask": CausalMask(110) & LocalMask((90, None))}
    native = jax.jit(lambda x: from_topk(x, 3, own_block=True, **options))(scores)
    monkeypatch.setattr(ffi, "choose_refusals", lambda *_, **__: ["no"])
    plain = jax.jit(lambda x: from_topk(x, 3, own_block=True, **options))(scores)
    jax.tree.map(np.testing.assert_array_equal, native, plain)


# ---- the custom call itself -----------------------------------------------------------------------------------------

TABLES, ROWS, GROUPS, GROUP, BLOCKS, CAPACITY = 2, 3, 4, 2, 7, 12


def direct() -> DirectCall:
    """Groups of two blocks, the last of one; every row chooses the last two."""
    scores = jnp.broadcast_to(jnp.arange(GROUPS, dtype=jnp.float32), (1, TABLES, ROWS, GROUPS))
    operands = {
        "scores": scores,
        "states": jnp.ones((ROWS, GROUPS), jnp.int8),
        "candidates": jnp.full((ROWS, BLOCKS), FULL, jnp.int32),
    }
    results = {
        "row_offsets": shape("int32", 1, TABLES, ROWS + 1),
        "kv_blocks": shape("int32", 1, TABLES, CAPACITY),
        "tiles": shape("int32", 1, TABLES, CAPACITY),
    }
    static = native.ChooseCall(2, 2, GROUP, CAPACITY, 0, choice.choose_in_jax)
    if compat.default_platform() == "cuda":
        results["workspace"] = shape("int32", ffi.choose_workspace(scores.shape, BLOCKS, 2, GROUP) // 4)
    return DirectCall(ffi.LISTS_CHOOSE, operands, results, native.CHOOSE.attributes(static))


def check_direct(call: DirectCall, **changes) -> None:
    got = call(**changes)
    for table in range(TABLES):
        row_offsets, kv_blocks = (got[name].reshape(TABLES, -1)[table] for name in ("row_offsets", "kv_blocks"))
        np.testing.assert_array_equal(row_offsets, [0, 3, 6, 9])
        np.testing.assert_array_equal(kv_blocks, [4, 5, 6] * 3 + [-1] * 3)


def test_leading_dimensions_count_as_tables():
    call = direct()
    check_direct(call)
    check_direct(
        call,
        scores=call.operands["scores"][0],
        row_offsets=shape("int32", TABLES, ROWS + 1),
        kv_blocks=shape("int32", TABLES, CAPACITY),
        tiles=shape("int32", TABLES, 1, CAPACITY),
    )


def test_what_does_not_fit_is_refused():
    call = direct()
    changes = {
        "scores rank": {"scores": shape("float32", GROUPS)},
        "scores type": {"scores": shape("float16", 1, TABLES, ROWS, GROUPS)},
        "scores groups": {"scores": shape("float32", 1, TABLES, ROWS, GROUPS + 1)},
        "states type": {"states": shape("int32", ROWS, GROUPS)},
        "states rows": {"states": shape("int8", ROWS - 1, GROUPS)},
        "candidates rank": {"candidates": shape("int32", BLOCKS)},
        "candidates rows": {"candidates": shape("int32", 1, BLOCKS)},
        "candidates blocks": {"candidates": shape("int32", ROWS, BLOCKS + 2)},
        "candidates type": {"candidates": shape("int8", ROWS, BLOCKS)},
        "an operand less": {"candidates": None},
        "offsets length": {"row_offsets": shape("int32", 1, TABLES, ROWS)},
        "offsets type": {"row_offsets": shape("float32", 1, TABLES, ROWS + 1)},
        "ids tables": {"kv_blocks": shape("int32", 1, TABLES - 1, CAPACITY)},
        "ids rank": {"kv_blocks": shape("int32")},
        "tiles capacity": {"tiles": shape("int32", 1, TABLES, CAPACITY - 1)},
        "no tiles": {"tiles": None},
        "group of other blocks": {"group": np.int64(GROUP + 1)},
        "group of nothing": {"group": np.int64(0)},
        "negative group": {"group": np.int64(-2)},
        "huge group": {"group": np.int64(2**63 - 1)},
        "negative k": {"k": np.int64(-1)},
        "negative width": {"width": np.int64(-1)},
        "more width than groups": {"width": np.int64(GROUPS + 1)},
        "width of 32 bits": {"width": np.int32(2)},
        "no k": {"k": None},
        "another version": {"version": "0.0.0"},
    }
    check_refused(call, changes)
    check_direct(call)


def test_static_tables_are_not_trusted():
    """A lowering with other tables than the shapes were made for: what is too much is not listed."""
    call = direct()
    required = jnp.full((ROWS, GROUPS), native.REQUIRED, jnp.int8)
    got = call(states=required, kv_blocks=shape("int32", 1, TABLES, 5), tiles=shape("int32", 1, TABLES, 5))
    np.testing.assert_array_equal(got["row_offsets"][0], [[0, 4, 5, 5]] * TABLES)  # no more than two groups a row
    np.testing.assert_array_equal(got["kv_blocks"][0], [[0, 1, 2, 3, 0]] * TABLES)
    strange = jnp.full((ROWS, BLOCKS), FULL, jnp.int32).at[:, 5].set(-(2**31)).at[:, 4].set(2**31 - 1)
    got = call(candidates=strange, states=jnp.ones((ROWS, GROUPS), jnp.int8).at[:, 0].set(-3))
    np.testing.assert_array_equal(got["row_offsets"][0], [[0, 2, 4, 6]] * TABLES)
    np.testing.assert_array_equal(got["kv_blocks"][0, :, :2], [[4, 6]] * TABLES)
    np.testing.assert_array_equal(got["tiles"][0, :, :2], [[2**31 - 1, -1]] * TABLES)


@pytest.mark.gpu
def test_a_wrong_workspace_is_refused():
    """The kernels write there without looking."""
    call = direct()
    (words,) = call.results["workspace"].shape
    changes = {
        "a word short": {"workspace": shape("int32", words - 1)},
        "type": {"workspace": shape("float32", words)},
    }
    check_refused(call, changes)
    check_direct(call)


@pytest.mark.gpu
def test_a_missing_workspace_is_refused():
    code = "from tests.test_choose import direct; direct()(workspace=None)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert "INVALID_ARGUMENT" in result.stderr
