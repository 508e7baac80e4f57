"""Trains a small transformer on packed documents: with jax_bsk, with a dense mask, and unpacked, side by side.

    python examples/packed_training.py --library nnx --output packed_output
    python examples/packed_training.py --library linen
    python examples/packed_training.py --library equinox

The documents are functions, methods and heads of classes of Python's standard library, 64 to 1,024 bytes each. Three
copies of one model, with the same initial parameters, are trained on the same documents in three ways:

    jax_bsk    documents packed into rows, `CausalMask() & SegmentMask(ids)` with ids that are arguments of the step
    dense      the same rows, a boolean mask [B, 1, T, T] of the same ids, `jax.nn.dot_product_attention`
    padded     each document a row of its own, padded to 1,024 bytes, `jax.nn.dot_product_attention`

No token attends to another document, and the rotary positions begin anew with each, so the losses are equal but for
rounding: this is checked at every step. The steps of the three take turns, so what slows the machine down slows all of
them down, and the ratios of their times can be trusted where the times cannot.

The model is in `packed_nnx.py`, `packed_linen.py` and `packed_equinox.py`. Each calls an attention function that it is
given: `jax_bsk.sparse_attention` and `jax.nn.dot_product_attention` are called alike. Written are `summary.json` and
`packed_training.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm
from train_bytes import standard_library_text

import jax_bsk
from jax_bsk.masks import CausalMask, Mask, SegmentMask

LIBRARIES = ("nnx", "linen", "equinox")
PADDING = np.iinfo(np.int32).max  # the id of padding: the largest, so that ids never decrease along a row
# How far apart the losses of a step may be, relatively. Measured in float32 over 30 steps: 3e-7. A mask in which the
# first token of each document is one of the document before moves the first loss by 1e-4.
TOLERANCE = 1e-5

Apply = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]  # params, tokens, positions, mask -> logits


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run; the defaults take less than two minutes on two CPU cores.

    Attributes:
      length: Tokens of a packed row.
      rows: Packed rows of a batch.
      documents: Documents of a batch.
      shortest: Bytes of the shortest document that is taken.
      longest: Bytes of the longest document, where longer ones are cut; the length of a padded row.
    """

    steps: int = 30
    length: int = 2048
    rows: int = 2
    documents: int = 8
    shortest: int = 64
    longest: int = 1024
    layers: int = 2
    heads: int = 2
    head_dim: int = 64
    learning_rate: float = 2e-3
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


# ---- documents ----


class Batch(NamedTuple):
    """Rows of documents; all arrays are [rows, length].

    Attributes:
      tokens: Bytes.
      targets: The byte that follows each in its document.
      ids: Which document a token is of; never decreasing along a row.
      positions: Positions within the document.
      weights: 1 where there is a target, 0 for padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


def definitions(config: Config) -> list[np.ndarray]:
    """Functions, methods and heads of classes of the standard library."""
    parts = re.split(rb"\n(?= *(?:async def|def|class) )", standard_library_text().tobytes())
    return [np.frombuffer(part[: config.longest + 1], np.uint8) for part in parts if len(part) > config.shortest]


def pack(documents: Sequence[np.ndarray], rows: int, length: int) -> list[list[np.ndarray]] | None:
    """Puts each document, the longest first, into the row that has most room; None where one finds no room."""
    packed: list[list[np.ndarray]] = [[] for _ in range(rows)]
    room = np.full(rows, length)
    for document in sorted(documents, key=len, reverse=True):
        row = int(room.argmax())
        packed[row].append(document)
        room[row] -= len(document) - 1  # the last byte is a target only
    return packed if room.min() >= 0 else None


def packed_rows(config: Config) -> Iterator[list[list[np.ndarray]]]:
    """The documents of batch after batch, in rows.

    Each batch has one document of each class of lengths, so that all are about as full.
    """
    rng, documents = np.random.default_rng(config.seed), sorted(definitions(config), key=len)
    classes = np.array_split(np.arange(len(documents)), config.documents)
    failures = 0
    while failures < 100:
        drawn = [documents[rng.choice(numbers)] for numbers in classes]
        if (rows := pack(drawn, config.rows, config.length)) is None:
            failures += 1
        else:
            failures = 0
            yield rows
    raise ValueError(
        f"{config.documents} documents of {config.shortest} to {config.longest} bytes hardly ever fit into "
        f"{config.rows} rows of {config.length}; take fewer or shorter documents, or more or longer rows"
    )


def batch_of(rows: Sequence[Sequence[np.ndarray]], length: int) -> Batch:
    """Lays documents one after the other along each row."""
    shape = (len(rows), length)
    tokens, targets, positions = (np.zeros(shape, np.int32) for _ in range(3))
    ids, weights = np.full(shape, PADDING, np.int32), np.zeros(shape, np.float32)
    for row, documents in enumerate(rows):
        begin = 0
        for number, document in enumerate(documents):
            there = (row, slice(begin, begin + len(document) - 1))
            tokens[there], targets[there] = document[:-1], document[1:]
            ids[there], positions[there], weights[there] = number, np.arange(len(document) - 1), 1
            begin += len(document) - 1
    return Batch(tokens, targets, ids, positions, weights)


# ---- three ways to attend within documents ----


def block_sparse_mask(ids: jax.Array | np.ndarray) -> Mask:
    return CausalMask() & SegmentMask(ids, contiguous=True)


def dense_mask(ids: jax.Array) -> jax.Array:
    causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
    return (causal[None] & (ids[:, :, None] == ids[:, None, :]))[:, None]


@dataclasses.dataclass(frozen=True)
class Way:
    attention: Callable[..., jax.Array]
    mask: Callable[[Any], Any]  # of ids [B, T]
    packed: bool


WAYS = {
    "jax_bsk": Way(jax_bsk.sparse_attention, block_sparse_mask, packed=True),
    "dense": Way(jax.nn.dot_product_attention, dense_mask, packed=True),
    "padded": Way(jax.nn.dot_product_attention, dense_mask, packed=False),
}


# ---- training ----


class Training:
    """One model in training, compiled for batches of the shape of the one given."""

    def __init__(self, way: Way, library: str, config: Config, batch: Batch):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(config.learning_rate))
        self.params, apply = importlib.import_module(f"packed_{library}").make(config, way.attention)
        self.opt_state = optimizer.init(self.params)

        def loss_fn(params, batch: Batch):
            logits = apply(params, batch.tokens, batch.positions, way.mask(batch.ids))
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
            return (losses * batch.weights).sum() / batch.weights.sum()

        def step(params, opt_state, batch: Batch):
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        batch = jax.tree.map(jnp.asarray, batch)
        self.compiled = jax.jit(step, donate_argnums=(0, 1)).lower(self.params, self.opt_state, batch).compile()
        memory = self.compiled.memory_analysis()
        self.buffer_bytes = memory.temp_size_in_bytes if memory else 0
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Batch) -> None:
        started = time.perf_counter()
        self.params, self.opt_state, loss = self.compiled(self.params, self.opt_state, batch)
        self.losses.append(float(loss))  # waits for the step
        self.seconds.append(time.perf_counter() - started)


def train(library: str, config: Config) -> dict:
    """Trains the three copies in turns; returns their losses, times and memory."""
    source = packed_rows(config)

    def next_batches() -> tuple[dict[str, Batch], int]:
        rows = next(source)
        alone = [[document] for row in rows for document in row]
        packed, padded = batch_of(rows, config.length), batch_of(alone, config.longest)
        return {name: packed if way.packed else padded for name, way in WAYS.items()}, int(packed.weights.sum())

    batches, tokens = next_batches()
    first = batches["jax_bsk"]
    trainings = {
        name: Training(way, library, config, batches[name])
        for name, way in tqdm(WAYS.items(), desc="compiling", dynamic_ncols=True)
    }
    counts = []
    bar = tqdm(range(config.steps), desc=library, unit="step", dynamic_ncols=True)
    for _ in bar:
        for name, training in trainings.items():
            training.step(batches[name])
        counts.append(tokens)
        bar.set_postfix(loss=f"{trainings['jax_bsk'].losses[-1]:.4f}", refresh=False)
        batches, tokens = next_batches()

    bound = [block_sparse_mask(row).bind(config.length) for row in first.ids]
    return {
        "library": library,
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "config": dataclasses.asdict(config),
        "tokens_per_step": float(np.mean(counts)),
        "visited_share": float(np.mean([mask.density for mask in bound])),
        "first_ids": first.ids.tolist(),
        "ways": {
            name: {
                "losses": training.losses,
                "step_seconds": float(np.median(training.seconds[2:] or training.seconds)),
                "buffer_bytes": training.buffer_bytes,
                "rows": int(batches[name].tokens.size),
            }
            for name, training in trainings.items()
        },
    }


# ---- report ----


def report(run: dict, output: Path) -> dict:
    """Prints the three ways side by side, writes picture and numbers, and checks that the losses agree and fall."""
    config, ways = Config(**run["config"]), run["ways"]
    losses = np.array([ways[name]["losses"] for name in WAYS])
    difference = (np.abs(losses - losses[2]) / losses[2]).max(0)
    print(
        f"\n{run['library']} on {run['device']}: {config.documents} documents per step, {run['tokens_per_step']:,.0f} "
        f"tokens on average.\nThe mask visits {run['visited_share']:.1%} of the blocks of {config.rows} rows of "
        f"{config.length:,} tokens.\n"
    )
    print(f"{'step':>5}" + "".join(f"{name:>12}" for name in WAYS) + f"{'largest relative difference':>30}")
    for n in sorted({round(x) for x in np.linspace(0, config.steps - 1, 8)}):
        print(f"{n + 1:5d}" + "".join(f"{loss:12.6f}" for loss in losses[:, n]) + f"{difference[n]:30.1e}")

    base = ways["jax_bsk"]
    print(f"\n{'':10}{'tokens with padding':>20}{'time per step':>16}{'':>8}{'step buffers':>14}")
    for name, way in ways.items():
        way["time_ratio"] = way["step_seconds"] / base["step_seconds"]
        way["memory_ratio"] = way["buffer_bytes"] / max(1, base["buffer_bytes"])
        print(
            f"{name:10}{way['rows']:20,}{way['step_seconds'] * 1e3:13.1f} ms{way['time_ratio']:7.2f}x"
            f"{way['buffer_bytes'] / 2**20:10.0f} MiB{way['memory_ratio']:7.2f}x"
        )
    run["largest_relative_loss_difference"] = largest = float(difference.max())
    print(f"\nThe losses agree within {largest:.1e} (tolerance {TOLERANCE:.0e}).")

    (output / "summary.json").write_text(json.dumps(run, indent=1) + "\n")
    plot(run, output / "packed_training.png")
    print(f"Written to {output}/: summary.json, packed_training.png")
    if not largest <= TOLERANCE:  # NaN fails too
        raise SystemExit(f"the losses differ by {largest:.1e}, more than {TOLERANCE:.0e}")
    if config.steps >= 10 and not losses[0, -3:].mean() < losses[0, 0]:
        raise SystemExit(f"the loss did not fall: {losses[0, 0]:.3f} at first, {losses[0, -3:].mean():.3f} at last")
    return run


def plot(run: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    config, ways, colors = Config(**run["config"]), run["ways"], ("#24557a", "#f2b56b", "#b9b9b9")
    figure = Figure(figsize=(10.5, 3.4), dpi=150, layout="constrained")
    left, middle, right, memory = figure.subplots(1, 4, width_ratios=[3, 3, 2, 2])

    ids = np.asarray(run["first_ids"][0])[:: max(1, config.length // 512)]
    attended = (ids[:, None] == ids) & np.tri(len(ids), dtype=bool) & (ids != PADDING)
    left.imshow(attended, cmap="Blues", extent=(0, config.length, config.length, 0), vmin=0, vmax=1.4)
    left.set(title="first row: who attends to whom", xlabel="key", ylabel="query")

    steps = np.arange(1, config.steps + 1)
    for (name, way), color, width in zip(reversed(ways.items()), reversed(colors), (7, 4, 1.5), strict=True):
        middle.plot(steps, way["losses"], color=color, linewidth=width, label=name)
    middle.set(title="the same losses", xlabel="step", ylabel="loss (nats per byte)")
    middle.legend(frameon=False)

    right.bar(list(ways), [way["time_ratio"] for way in ways.values()], color=colors)
    right.set(title="time of a step", ylabel="multiples of jax_bsk's")
    memory.bar(list(ways), [way["buffer_bytes"] / 2**20 for way in ways.values()], color=colors)
    memory.set(title="buffers of a step", ylabel="MiB")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, default="nnx")
    parser.add_argument("--output", type=Path, default=Path("packed_output"), help="folder for picture and numbers")
    for field in dataclasses.fields(Config):
        if field.type == "int":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = vars(parser.parse_args(argv))
    library, output = arguments.pop("library"), arguments.pop("output")
    output.mkdir(parents=True, exist_ok=True)
    return report(train(library, Config(**arguments)), output)


if __name__ == "__main__":
    main()
