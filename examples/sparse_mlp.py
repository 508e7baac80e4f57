"""Trains a dense MLP, prunes its matrices by blocks, and fine-tunes what is left with Optax.

    python examples/sparse_mlp.py --output sparse_mlp_output

The MLP predicts the next byte of Python's standard library from the 16 bytes before it (a neural language model as in
Bengio et al. 2003): embeddings of 64 side by side, two hidden layers of 1,024, 256 logits. Nearly all of its parameters
are two 1,024 x 1,024 matrices. `jax_bsk.flax.nnx.BlockSparseDense.from_linear` keeps the blocks of them that have the
largest norm (Narang, Undersander and Diamos 2017, arXiv 1711.02782). The layer stores, trains and multiplies no others:
gradients and the optimizer's state have the stored blocks alone.

For each density the pruned model is tested as it is and after fine-tuning. The dense model is trained for as many more
steps on the same batches, so that fine-tuning is not credited with what more training gives anyhow. The steps of all
models take turns, so the ratios of their times can be trusted on a busy machine, too. Written are `summary.json` and
`sparse_mlp.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm
from train_bytes import standard_library_text

from jax_bsk.flax.nnx import BlockSparseDense


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run; the defaults take less than two minutes on two CPU cores.

    Attributes:
      steps: Steps of the dense model before it is pruned.
      more_steps: Steps after it, of each pruned model and of the dense one.
      context: Bytes from which the next one is predicted.
      embedding: Features of a byte.
      hidden: Features of a hidden layer.
      block: Rows and columns of a block.
      densities: Shares of the blocks that are kept, a pruned model for each.
      tests: Held-out bytes that are predicted.
    """

    steps: int = 200
    more_steps: int = 100
    batch: int = 1024
    context: int = 16
    embedding: int = 64
    hidden: int = 1024
    block: int = 64
    densities: tuple[float, ...] = (0.5, 0.25, 0.125)
    tests: int = 16_384
    learning_rate: float = 1e-3
    seed: int = 0


class MLP(nnx.Module):
    """Predicts the byte that follows: bytes [B, context] to logits [B, 256]."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(256, config.embedding, rngs=rngs)
        self.first = nnx.Linear(config.context * config.embedding, config.hidden, rngs=rngs)
        self.second = nnx.Linear(config.hidden, config.hidden, rngs=rngs)
        self.head = nnx.Linear(config.hidden, 256, rngs=rngs)

    def __call__(self, before: jax.Array) -> jax.Array:
        x = self.embedding(before).reshape(before.shape[0], -1)
        return self.head(nnx.gelu(self.second(nnx.gelu(self.first(x)))))


def pruned(dense: MLP, density: float, block: int) -> MLP:
    """A copy of a trained model that has only the largest blocks of its two hidden layers."""
    model = nnx.clone(dense)
    for name in ("first", "second"):
        layer = BlockSparseDense.from_linear(getattr(model, name), density, block_size=block)
        setattr(model, name, layer)
    return model


# ---- data ----


def split_text() -> tuple[np.ndarray, np.ndarray]:
    """The text to train on, and the last tenth of it, which is held out."""
    text = standard_library_text()
    known, held_out = np.split(text, [len(text) * 9 // 10])
    return known, held_out


def examples_at(text: np.ndarray, places: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes before each place, int32 [N, context], and the one there, int32 [N]."""
    return text[places[:, None] - context + np.arange(context)].astype(np.int32), text[places].astype(np.int32)


# ---- training ----


class Training:
    """A model, the state of its optimizer, and its compiled step."""

    def __init__(self, model: MLP, learning_rate: float):
        self.graphdef, self.params = nnx.split(model)
        optimizer = optax.adamw(learning_rate)
        self.opt_state = optimizer.init(self.params)
        self.seconds: list[float] = []
        self.losses: list[float] = []

        def loss_fn(params, before, answers):
            logits = nnx.merge(self.graphdef, params)(before)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()
            return loss, (logits.argmax(-1) == answers).mean(dtype=jnp.float32)

        def step(params, opt_state, before, answers):
            (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, before, answers)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._step: Callable = jax.jit(step)
        self._test: Callable = jax.jit(loss_fn)

    def step(self, before: np.ndarray, answers: np.ndarray) -> float:
        started = time.perf_counter()
        self.params, self.opt_state, loss = self._step(self.params, self.opt_state, before, answers)
        self.losses.append(float(loss))  # waits for the step
        self.seconds.append(time.perf_counter() - started)
        return self.losses[-1]

    def test(self, before: np.ndarray, answers: np.ndarray) -> dict[str, float]:
        loss, accuracy = self._test(self.params, before, answers)
        return {"loss": float(loss), "accuracy": float(accuracy)}

    @property
    def model(self) -> MLP:
        return nnx.merge(self.graphdef, self.params)

    @property
    def parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def train(config: Config) -> dict:
    """Trains the dense model, prunes it to each density, and trains all of them further."""
    known, held_out = split_text()
    rng = np.random.default_rng(config.seed)
    spread = np.linspace(config.context, len(held_out) - 1, config.tests).astype(int)
    test = examples_at(held_out, spread, config.context)

    def next_batch():
        return examples_at(known, rng.integers(config.context, len(known), config.batch), config.context)

    dense = Training(MLP(config, nnx.Rngs(config.seed)), config.learning_rate)
    bar = tqdm(range(config.steps), desc="dense", unit="step", dynamic_ncols=True)
    for _ in bar:
        bar.set_postfix(loss=f"{dense.step(*next_batch()):.3f}", refresh=False)
    before_pruning = dense.test(*test)

    # The optimizer of each begins anew, that of the dense model too.
    trained = dense.model
    models = {"dense": trained} | {f"{d:.1%} of the blocks": pruned(trained, d, config.block) for d in config.densities}
    trainings = {name: Training(model, config.learning_rate) for name, model in models.items()}
    right_after = {name: training.test(*test) for name, training in trainings.items()}
    bar = tqdm(range(config.more_steps), desc="fine-tuning", unit="step", dynamic_ncols=True)
    for _ in bar:
        batch = next_batch()
        for training in trainings.values():
            training.step(*batch)

    return {
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "config": dataclasses.asdict(config),
        "before_pruning": before_pruning,
        "dense_losses": dense.losses,
        "models": {
            name: {
                "parameters": training.parameters,
                "stored_blocks": [
                    int(layer.kernel.shape[0]) if isinstance(layer, BlockSparseDense) else None
                    for layer in (models[name].first, models[name].second)
                ],
                "right_after": right_after[name],
                "fine_tuned": training.test(*test),
                "step_seconds": float(np.median(training.seconds[2:] or training.seconds)),
                "losses": training.losses,
            }
            for name, training in trainings.items()
        },
    }


# ---- report ----


def report(run: dict, output: Path) -> dict:
    """Prints the models one below the other, and writes picture and numbers."""
    config, models, before = Config(**run["config"]), run["models"], run["before_pruning"]
    print(
        f"\n{run['device']}: {config.steps} steps of {config.batch:,} bytes with the dense model, then "
        f"{config.more_steps} of each.\nHeld out are {config.tests:,} bytes: the trained dense model has a loss of "
        f"{before['loss']:.4f} and predicts {before['accuracy']:.1%}.\n"
    )
    print(f"{'':22}{'parameters':>12}{'right after pruning':>24}{'trained further':>24}{'time per step':>22}")
    base = models["dense"]["step_seconds"]
    for name, model in models.items():
        model["speed_up"] = base / model["step_seconds"]
        tests = "".join(f"{x['loss']:15.4f}{x['accuracy']:9.1%}" for x in (model["right_after"], model["fine_tuned"]))
        print(
            f"{name:22}{model['parameters']:12,}{tests}{model['step_seconds'] * 1e3:11.1f} ms{model['speed_up']:7.2f}x"
        )
    (output / "summary.json").write_text(json.dumps(run, indent=1) + "\n")
    plot(run, output / "sparse_mlp.png")
    print("\nThe last column says how many times as fast as the dense model's a step is.")
    print(f"Written to {output}/: summary.json, sparse_mlp.png")
    if not np.isfinite([model["fine_tuned"]["loss"] for model in models.values()]).all():
        raise SystemExit("a loss is not finite")
    return run


def plot(run: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    config, models = Config(**run["config"]), run["models"]
    figure = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[3, 2, 2])
    colors = [f"C{n}" for n in range(len(models))]
    left.plot(np.arange(config.steps) + 1, run["dense_losses"], color=colors[0])
    further = np.arange(config.steps, config.steps + config.more_steps) + 1
    for (name, model), color in zip(models.items(), colors, strict=True):
        left.plot(further, model["losses"], color=color, label=name, linewidth=1)
    left.axvline(config.steps + 0.5, color="gray", linewidth=0.8)  # here it is pruned
    left.set(xlabel="step", ylabel="loss of the batch (nats per byte)", title="training, pruning, fine-tuning")
    left.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 1))

    places = np.arange(len(models))
    for shift, when, alpha, label in ((-0.2, "right_after", 0.4, "right after"), (0.2, "fine_tuned", 1, "fine-tuned")):
        losses = [model[when]["loss"] for model in models.values()]
        middle.bar(places + shift, losses, 0.4, color=colors, alpha=alpha, label=label)
    short = [name.removesuffix(" of the blocks") for name in models]
    middle.set(title="loss of held-out text\n(pale: right after pruning)", xticks=places, xticklabels=short)
    right.bar(short, [model["speed_up"] for model in models.values()], color=colors)
    right.set(title="steps per second,\nmultiples of the dense model's")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("sparse_mlp_output"), help="folder for picture and numbers")
    parser.add_argument("--densities", type=float, nargs="+", default=Config.densities)
    for field in dataclasses.fields(Config):
        if field.type == "int":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = vars(parser.parse_args(argv))
    output, densities = arguments.pop("output"), tuple(arguments.pop("densities"))
    output.mkdir(parents=True, exist_ok=True)
    return report(train(Config(densities=densities, **arguments)), output)


if __name__ == "__main__":
    main()
