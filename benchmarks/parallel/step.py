"""A training step of the transformer of `benchmarks/training`, on one device and split over all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from training.config import Config
from training.model import Decoder
from training.step import optimizer_of, step_of

from jax_bsk import BlockMask, sparse_attention

from . import measuring
from .cases import Case, Effort, Sizes
from .layouts import Layout, layouts

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}  # of the loss, as in benchmarks/training_step.py
# Split over heads: projections and the feed-forward network by columns, then rows (Megatron-LM, arXiv 1909.08053).
COLUMNS, ROWS = ("query", "key", "value", "up"), ("out", "down")


def config_of(case: Case, sizes: Sizes, devices: int) -> Config:
    return Config(
        length=case.length,
        batch=case.batch,
        layers=sizes.layers,
        width=sizes.heads * sizes.head_dim,
        heads=sizes.heads,
        vocabulary=sizes.vocabulary,
        dtype=sizes.dtype,
        learned_positions=False,
        remat=True,
        ordered_embedding=True,
        loss_chunk=sizes.loss_chunk * devices,
    )


def measure(
    case: Case, splits: Sequence[str], devices: Sequence[Any], sizes: Sizes, effort: Effort
) -> list[dict[str, Any]]:
    """The rows of one mask, one per split.

    Every call starts from the same parameters, so that calls that are timed are also those whose losses and new
    parameters are compared, bit for bit.
    """
    started = time.perf_counter()
    ways, refused = layouts(case, splits, devices, sizes)
    alone, count = SingleDeviceSharding(devices[0]), len(devices)
    rng = np.random.default_rng(0)
    text = (sizes.vocabulary ** rng.random((case.batch, case.length + 1)) - 1).astype(np.int32)
    parameters = parameters_of(case, sizes)
    programs = {way.split: program(way.mask, case, sizes, parameters, text, count, way=way) for way in ways}
    programs["one"] = program(case.mask, case, sizes, parameters, text, 1, sharding=alone)
    compiled = measuring.compile_all({name: one[:2] for name, one in programs.items()}, effort)
    share, free = 1, measuring.memory_of(devices[0], sizes)
    state = 3 * 4 * sum(x.size for x in jax.tree.leaves(parameters))
    if measuring.peak_bytes(compiled["one"]) + state > free and case.batch % count == 0:
        share = count
        programs["one"] = program(case.mask, case, sizes, parameters, text[: case.batch // count], 1, sharding=alone)
        compiled |= measuring.compile_all({"one": programs["one"][:2]}, effort)
    for name in [name for name in compiled if measuring.peak_bytes(compiled[name]) + state > free]:
        refused[name] = f"needs {measuring.peak_bytes(compiled.pop(name)) / 1e9:,.0f} GB"
    compiled_at = time.perf_counter()
    found = {
        name: _timed(one, programs[name][2](), effort, effort.rounds if name == "one" else effort.repeats)
        for name, one in compiled.items()
    }
    spent = {"compiling": compiled_at - started, "running": time.perf_counter() - compiled_at}
    one = found.get("one")
    reference = None
    if one is not None:
        what = "the same problem" if share == 1 else f"1/{count} of the batch"
        reference = {"what": what, "share": 1 / share, "step_ms": one["step_ms"], "loss": one["loss"]}
        reference["peak_bytes"] = measuring.peak_bytes(compiled["one"])
    common = {
        "part": "step",
        "mask": case.name,
        "shape": [case.batch, case.heads, case.kv_heads, case.length, sizes.head_dim],
        "layers": sizes.layers,
        "parameters": sum(int(x.size) for x in jax.tree.leaves(parameters)),
        "density": float(case.mask.density),
        "devices": count,
        "one": reference,
        "spent_seconds": {key: round(value, 2) for key, value in spent.items()},
    }
    rows = []
    for way in ways:
        if way.split not in found:
            continue
        row: dict[str, Any] = {**common, **way.facts(), **found[way.split]}
        if one is not None:
            row["step_efficiency"] = one["step_ms"] * share / count / row["step_ms"]
        row["ok"] = row["repeats"]["equal"]
        if one is not None and share == 1:
            row["loss_difference"] = abs(row["loss"] - one["loss"]) / abs(one["loss"])
            row["ok"] &= row["loss_difference"] <= TOLERANCE[sizes.dtype]
        row["step_collectives"] = measuring.collectives(compiled[way.split])
        row["step_program_bytes"] = measuring.collective_bytes(compiled[way.split].as_text(), count)
        row["peak_bytes"] = measuring.peak_bytes(compiled[way.split])
        rows.append(row)
    return rows + [{**common, "split": split, "refused": reason, "ok": True} for split, reason in refused.items()]


def _graph(case: Case, sizes: Sizes, mask: BlockMask, devices: int, way: Layout | None = None) -> tuple[Any, Any]:
    """The decoder without numbers: its structure, and shapes of its parameters.

    Args:
      case: Case of the run.
      sizes: Sizes of the run.
      mask: Mask of the attention.
      devices: Number of devices.
      way: Layout that splits heads: between layers every device has all features. Of other layouts XLA finds as much by
        itself.
    """

    def attend(query: Any, key: Any, value: Any, _: Any) -> Any:
        if way is not None:
            query, key, value = (jax.lax.with_sharding_constraint(x, way.sharding) for x in (query, key, value))
        return sparse_attention(query, key, value, mask=mask, implementation=sizes.implementation)

    def place(x: Any) -> Any:
        return x if way is None else jax.lax.with_sharding_constraint(x, NamedSharding(way.mesh, P()))

    config = config_of(case, sizes, devices)
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, attend, nnx.Rngs(0), place)))


def parameters_of(case: Case, sizes: Sizes) -> Any:
    """Parameters on the host, drawn without a compilation."""
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> np.ndarray:
        names = _names(path)
        if "scale" in names:
            return np.ones(x.shape, np.float32)
        deviation = 0.02 if "embedding" in names else x.shape[0] ** -0.5
        return rng.standard_normal(x.shape, np.float32) * np.float32(deviation)

    return jax.tree_util.tree_map_with_path(draw, _graph(case, sizes, case.mask, 1)[1])


def _names(path: Any) -> set[Any]:
    """Names of the layers and parameters on a path; that a parameter has a `.value` is none."""
    return {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}


def program(
    mask: BlockMask,
    case: Case,
    sizes: Sizes,
    parameters: Any,
    text: np.ndarray,
    devices: int,
    *,
    way: Layout | None = None,
    sharding: Any = None,
) -> tuple[Any, tuple[Any, ...], Callable[[], tuple[Any, ...]]]:
    """A jitted step of so many tokens, the shapes of its arguments, and what makes these where they belong."""
    optimizer = optimizer_of(config_of(case, sizes, devices))

    def of_parameter(path: Any, _: Any) -> Any:
        if way is None:
            return sharding
        names, spec = _names(path), P()
        if way.heads and not names.isdisjoint(COLUMNS):
            spec = P(None, way.heads)
        elif way.heads and not names.isdisjoint(ROWS):
            spec = P(way.heads, None)
        return NamedSharding(way.mesh, spec if "kernel" in names else P())

    state = jax.eval_shape(optimizer.init, parameters)
    places = tuple(jax.tree_util.tree_map_with_path(of_parameter, tree) for tree in (parameters, state))
    options: dict[str, Any] = {}
    of_tokens = of_targets = sharding if way is None else way.of_tokens
    if way is not None:
        options["shards"] = way.shards
        if way.heads:  # every device has all tokens, and the loss of its own
            of_targets = NamedSharding(way.mesh, P(None, way.heads))
            options["shards"] = way.mesh.shape[way.heads]
            options["place"] = lambda x: jax.lax.with_sharding_constraint(x, of_targets)
    graph, _ = _graph(case, sizes, mask, devices, way if way is not None and way.heads else None)
    step = step_of(graph, config_of(case, sizes, devices), **options)

    def take(parameters: Any, state: Any, tokens: Any, targets: Any) -> tuple[Any, Any, Any]:
        return step(parameters, state, tokens, targets, None)

    def shape(x: Any, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    tokens = text[:, 1:]
    shapes = (
        *(jax.tree.map(shape, tree, place) for tree, place in zip((parameters, state), places, strict=True)),
        shape(tokens, of_tokens),
        shape(tokens, of_targets),
    )

    def arguments() -> tuple[Any, ...]:
        put = jax.device_put(parameters, places[0])
        made = jax.jit(optimizer.init, out_shardings=places[1])(put)
        tokens, targets = (x if way is None else way.dispatch(x) for x in (text[:, :-1], text[:, 1:]))
        return put, made, jax.device_put(tokens, of_tokens), jax.device_put(targets, of_targets)

    return jax.jit(take, out_shardings=(*places, None)), shapes, arguments


def _timed(compiled: Any, arguments: tuple[Any, ...], effort: Effort, calls: int) -> dict[str, Any]:
    """Steps from the same parameters: the median of their times, the loss, and whether all have the same bits."""
    first = jax.block_until_ready(compiled(*arguments))
    names = [f"parameters{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(first[0])]
    samples, different, start = [], set(), time.perf_counter()
    for _ in range(calls):
        begun = time.perf_counter()
        again = jax.block_until_ready(compiled(*arguments))
        samples.append(1e3 * (time.perf_counter() - begun))
        different |= measuring.differing([*names, "loss"], [again[0], again[2]], [first[0], first[2]])
        if time.perf_counter() - start > effort.repeat_seconds:
            break
    return {
        "step_ms": float(np.median(samples)),
        "least_step_ms": min(samples),
        "loss": float(first[2]),
        "repeats": {
            "count": len(samples),
            "equal": not different,
            "of": "new parameters, loss",
            "different": sorted(different),
        },
    }
