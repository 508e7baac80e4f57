"""The examples by task run in a small form, and what they claim holds there."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_bsk

EXAMPLES = Path(jax_bsk.__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name, as if it was run in its folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture(autouse=True)
def implicit_promotion():
    """Flax's norms and optax's optimizers rely on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def drawn(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000


# ---- packed documents ----

PACKED = "--length 256 --rows 2 --documents 3 --longest 128 --layers 1 --heads 1 --head-dim 32 --steps 10"


SLOW = pytest.mark.slow


@pytest.mark.parametrize("library", ["nnx", pytest.param("linen", marks=SLOW), pytest.param("equinox", marks=SLOW)])
def test_packed_training_equals_padded_training(example, library, tmp_path, capsys):
    run = example("packed_training").main([*PACKED.split(), "--library", library, "--output", str(tmp_path)])
    losses = {name: np.array(way["losses"]) for name, way in run["ways"].items()}
    assert list(losses) == ["jax_bsk", "dense", "padded"]
    for name in losses:
        np.testing.assert_allclose(losses[name], losses["padded"], rtol=1e-5, err_msg=name)
    assert losses["jax_bsk"][-3:].mean() < losses["jax_bsk"][0] - 0.2, losses["jax_bsk"]
    assert {name: way["rows"] for name, way in run["ways"].items()} == {"jax_bsk": 512, "dense": 512, "padded": 384}
    assert "The losses agree within" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["library"] == library
    assert drawn(tmp_path / "packed_training.png")


def test_losses_that_differ_are_refused(example, tmp_path):
    module = example("packed_training")
    run = {
        "library": "nnx",
        "device": "a test",
        "config": {"steps": 2, "length": 32},
        "tokens_per_step": 10.0,
        "visited_share": 1.0,
        "first_ids": np.zeros((1, 32), int).tolist(),
        "ways": {
            name: {"losses": [5.0, loss], "step_seconds": 1.0, "buffer_bytes": 1, "rows": 32}
            for name, loss in zip(module.WAYS, (4.0, 4.0, 4.01), strict=True)
        },
    }
    with pytest.raises(SystemExit, match=r"differ by 2\.5e-03, more than 1e-05"):
        module.report(run, tmp_path)


def test_every_document_is_packed_once_and_attends_to_itself_alone(example):
    module = example("packed_training")
    documents = [np.arange(start, start + count + 1, dtype=np.uint8) for start, count in ((0, 40), (50, 20), (80, 60))]
    rows = module.pack(documents, rows=2, length=64)
    assert [[len(document) - 1 for document in row] for row in rows] == [[60], [40, 20]]
    assert module.pack(documents, rows=1, length=64) is None

    batch = module.batch_of(rows, 64)
    assert batch.weights.sum() == 120
    assert (np.diff(batch.ids, axis=1) >= 0).all()  # as SegmentMask(contiguous=True) is promised
    np.testing.assert_array_equal(batch.tokens[1, :40], np.arange(40))
    np.testing.assert_array_equal(batch.targets[1, :40], np.arange(1, 41))
    np.testing.assert_array_equal(batch.positions[1, 40:60], np.arange(20))
    np.testing.assert_array_equal(
        np.asarray(module.block_sparse_mask(batch.ids).bind(64, block_size=32).to_dense()),
        np.asarray(module.dense_mask(jnp.asarray(batch.ids))),
    )


def test_documents_that_hardly_fit_are_refused(example):
    module = example("packed_training")
    config = module.Config(documents=8, rows=1, length=128, longest=128)
    with pytest.raises(ValueError, match="take fewer or shorter documents"):
        next(module.packed_rows(config))


def test_rotary_products_depend_on_the_distance_alone(example):
    rotary = example("rotary").rotary
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 8))
    positions = jnp.arange(4)[None]
    near, far = (
        jnp.einsum("btnh,bsnh->bnts", rotary(query, places), rotary(key, places))
        for places in (positions, positions + 1000)
    )
    np.testing.assert_allclose(near, far, atol=1e-3)  # angles of 1,000 are rounded
    unturned = jnp.einsum("btnh,bsnh->bnts", query, key)
    assert abs(near - unturned).max() > 0.1
    np.testing.assert_allclose(*(jnp.diagonal(x, axis1=-2, axis2=-1) for x in (near, unturned)), atol=1e-5)


# ---- MoBA swapped in ----

MOBA = "--steps 12 --more-steps 6 --length 256 --layers 1 --heads 2 --head-dim 16 --block 32 --top-k 2 --test-rows 2"


def test_moba_is_swapped_in_and_fine_tuned(example, tmp_path, capsys):
    run = example("moba_finetune").main([*MOBA.split(), "--output", str(tmp_path)])
    held_out, losses = run["held_out"], run["losses"]
    assert list(held_out) == ["before the swap", "after the swap", "fine-tuned", "control"]
    assert {name: len(values) for name, values in losses.items()} == {"full": 12, "control": 6, "moba": 6}
    assert held_out["before the swap"] < losses["full"][0] - 0.2
    assert held_out["fine-tuned"] < held_out["after the swap"]
    assert held_out["control"] < held_out["before the swap"]
    # 8 x 8 blocks of 32, at most 2 a row; the full mask has 3 of 2 x 2 blocks of 128.
    assert run["visited_share"] == pytest.approx({"full": 3 / 4, "moba": (1 + 7 * 2) / 64})
    printed = capsys.readouterr().out
    assert all(name in printed for name in held_out), printed
    assert drawn(tmp_path / "moba_finetune.png")


def test_moba_that_chooses_every_block_is_full_attention(example):
    module = example("moba_finetune")
    config = module.Config(length=128, layers=1, heads=2, head_dim=16, block=32, top_k=4)
    tokens = jax.random.randint(jax.random.key(0), (1, 128), 0, 256)
    full, moba = (module.Model(config, choose, nnx.Rngs(0))(tokens)[0] for choose in (module.full, module.moba))
    np.testing.assert_allclose(full, moba, atol=1e-5)


# ---- an MLP, pruned ----

MLP = (
    "--steps 20 --more-steps 20 --batch 128 --context 8 --embedding 16 --hidden 128 --block 32 --tests 512 "
    "--densities 0.5 0.25"
)


def test_a_pruned_mlp_stores_its_blocks_and_learns_on(example, tmp_path, capsys):
    run = example("sparse_mlp").main([*MLP.split(), "--output", str(tmp_path)])
    models = run["models"]
    dense, half, quarter = models.values()
    assert [model["stored_blocks"] for model in models.values()] == [[None, None], [8, 8], [4, 4]]
    assert dense["parameters"] - half["parameters"] == 2 * 8 * 32**2
    assert dense["parameters"] - quarter["parameters"] == 2 * 12 * 32**2
    assert run["before_pruning"] == dense["right_after"]
    assert run["before_pruning"]["loss"] < run["dense_losses"][0] - 0.5
    for name, model in models.items():
        assert model["fine_tuned"]["loss"] < model["right_after"]["loss"], name
        assert 0 <= model["fine_tuned"]["accuracy"] <= 1, name
    assert half["right_after"]["loss"] > dense["right_after"]["loss"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in models), printed
    assert drawn(tmp_path / "sparse_mlp.png")


def test_pruning_leaves_the_dense_model_as_it_was(example):
    module = example("sparse_mlp")
    config = module.Config(context=4, embedding=16, hidden=64, block=32)
    dense = module.MLP(config, nnx.Rngs(0))
    before = jnp.zeros((2, 4), jnp.int32)
    out = dense(before)
    whole = module.pruned(dense, 1.0, config.block)  # every block
    np.testing.assert_allclose(whole(before), out, atol=1e-5)
    assert isinstance(dense.first, nnx.Linear)
    np.testing.assert_array_equal(dense(before), out)


# ---- context parallelism ----


def test_a_sharded_sequence_has_the_losses_of_one_device_on_less_memory(example, tmp_path):
    small = ["--length", "512", "--steps", "8", "--documents", "3", "--block-size", "32", "--output", str(tmp_path)]
    with jax.numpy_rank_promotion("allow"):  # Flax adds biases without saying so
        one, many = example("context_parallel").main(small)
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-4)
    assert many.losses[-1] < 0.8 * many.losses[0]
    assert many.bytes_per_device < one.bytes_per_device / 2
    assert drawn(tmp_path / "who_computes_what.png")


# ---- serving ----

SERVE = (
    "--steps 25 --length 96 --batch 4 --layers 1 --heads 2 --kv-heads 1 --head-dim 16 --window 24 --sinks 4 "
    "--requests 12 --gap 1.5 --prompt 40 --answer 30 --budget 12 --slots 6 --pages 9 --page-size 16 --checked 4"
)


def test_requests_are_served_from_pages_and_their_text_is_that_of_a_plain_pass(example, tmp_path, capsys):
    """With 9 pages of 16 for up to 6 requests of up to 70 bytes, some give their pages back and are computed again."""
    run = example("serve").main([*SERVE.split(), "--output", str(tmp_path)])
    served, checked = run["served"], run["checked"]
    assert run["losses"][-1] < run["losses"][0] - 0.5, run["losses"]
    assert served["preemptions"] > 0
    assert served["mixed_steps"] > 0
    assert served["peak_pages"] <= 9
    assert served["peak_bytes"] < served["dense_bytes"] / 3
    assert served["given_up"] == 2
    assert checked["requests"] == 4
    assert checked["largest_gap"] <= 1e-4
    assert all(entry["decoding"] + entry["prompts"] <= 12 for entry in run["history"])
    printed = capsys.readouterr().out
    assert printed.count("[done]") == 10, printed
    assert printed.count("[given up]") == 2, printed
    assert drawn(tmp_path / "serve.png")


def test_what_is_drawn_does_not_depend_on_the_batch(example):
    """Sampled answers are the same however many requests share a step, and however prompts are cut."""
    module = example("serve")
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "length": 64, "window": 16, "sinks": 2}
    config = module.Config(**sizes, requests=5, gap=0.5, prompt=24, answer=12, slots=5, budget=9, pages=20)
    graphdef, params = nnx.split(module.Model(config, nnx.Rngs(0)))
    texts = []
    for slots, budget in ((5, 9), (1, 24)):
        config = dataclasses.replace(config, slots=slots, budget=budget)
        requests = module.draw_requests(config, module.standard_library_text(10_000))
        module.serve(module.Engine(config, graphdef, params), requests, lambda *_: None)
        texts.append([request.text for request in requests])
    assert texts[0] == texts[1]


def test_a_greedy_answer_that_is_not_the_plain_pass_is_refused(example):
    module = example("serve")
    config = module.Config(length=64, prompt=24, answer=12, layers=1, heads=2, kv_heads=1, head_dim=16, checked=1)
    graphdef, params = nnx.split(module.Model(config, nnx.Rngs(0)))
    logits = module.plain_logits(nnx.merge(graphdef, params), jnp.full((1, 8), 65), config.mask)
    wrong = int(logits[0, -1].argmin())
    request = module.Request(3, 0, [65] * 8 + [wrong], 8, 1, 2, greedy=True)
    with pytest.raises(SystemExit, match="request 3 differs from the plain pass"):
        module.check(config, graphdef, params, [request])
