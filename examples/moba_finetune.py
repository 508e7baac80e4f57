"""Trains a small causal model with full attention, swaps MoBA in, and fine-tunes it.

    python examples/moba_finetune.py --output moba_output

MoBA (Lu et al. 2025, arXiv 2502.13189) has no parameters: each block of queries attends to its own block and to those
earlier blocks whose mean keys fit the queries best. So it can take the place of full attention in a trained model, and
then the model is fine-tuned. The model reads the bytes of Python's standard library; the losses are those of
modules that it was not trained on:

    before the swap    full attention, trained
    after the swap     the same parameters with MoBA, nothing trained
    fine-tuned         MoBA, trained for some more steps
    control            full attention, trained for as many more steps on the same batches

The control shows what more training gives by itself. Its steps and those of MoBA take turns, so the ratio of their
times can be trusted on a busy machine, too. Written are `summary.json` and `moba_finetune.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rotary import rotary
from tqdm import tqdm
from train_bytes import standard_library_text

import jax_bsk
from jax_bsk.masks import BlockMask, CausalMask


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run; the defaults take less than two minutes on two CPU cores.

    Attributes:
      steps: Steps with full attention before the swap.
      more_steps: Steps after it, of MoBA and of the control.
      block: Tokens of a block of queries and of one that MoBA chooses.
      top_k: Blocks of keys that a block of queries attends to, its own included.
      test_rows: Held-out sequences of the losses.
    """

    steps: int = 120
    more_steps: int = 40
    length: int = 4096
    batch: int = 1
    layers: int = 2
    heads: int = 4
    head_dim: int = 32
    block: int = 64
    top_k: int = 4
    test_rows: int = 8
    learning_rate: float = 3e-3
    seed: int = 0

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


# ---- the two kinds of attention: (query, key, config) -> what is attended to ----


def full(query: jax.Array, key: jax.Array, config: Config) -> BlockMask:
    return CausalMask().bind(config.length)


def moba(query: jax.Array, key: jax.Array, config: Config) -> BlockMask:
    return jax_bsk.selection.moba(query, key, top_k=config.top_k, moba_block=config.block, block_size=config.block)


Chooser = Callable[[jax.Array, jax.Array, Config], BlockMask]


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config, choose: Chooser, rngs: nnx.Rngs):
        width, heads = config.width, (config.heads, config.head_dim)
        self.config, self.choose = config, choose
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(width, heads, use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.LinearGeneral(heads, width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The layer's output, and the share of blocks it visited."""
        normed, positions = self.norm_1(x), jnp.arange(x.shape[1])[None]
        query, key = rotary(self.query(normed), positions), rotary(self.key(normed), positions)
        mask = self.choose(query, key, self.config)
        x = x + self.out(jax_bsk.sparse_attention(query, key, self.value(normed), mask=mask))
        share = jnp.asarray(mask.row_offsets)[..., -1].mean(dtype=jnp.float32) / (mask.nq * mask.nk)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x)))), share


class Model(nnx.Module):
    """Predicts the next byte. The parameters do not depend on the kind of attention."""

    def __init__(self, config: Config, choose: Chooser, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(256, config.width, rngs=rngs)
        self.layers = nnx.List([Layer(config, choose, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of tokens [B, T]: logits [B, T, 256], and the share of blocks visited."""
        x, shares = self.embedding(tokens), []
        for layer in self.layers:
            x, share = layer(x)
            shares.append(share)
        return self.head(self.norm(x)).astype(jnp.float32), jnp.stack(shares).mean()


# ---- training ----


def texts(config: Config) -> tuple[Iterator[np.ndarray], np.ndarray]:
    """Batches from the first nine tenths of the text, and held-out rows [test_rows, length + 1] from the rest."""
    text = standard_library_text()
    known, held_out = np.split(text, [len(text) * 9 // 10])
    rng = np.random.default_rng(config.seed)

    def rows(source: np.ndarray, starts: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.stack([source[start : start + config.length + 1] for start in starts]).astype(np.int32)

    def batches() -> Iterator[np.ndarray]:
        while True:
            yield rows(known, rng.integers(0, len(known) - config.length - 1, config.batch))

    spread = np.linspace(0, len(held_out) - config.length - 1, config.test_rows).astype(int)
    return batches(), rows(held_out, spread)


class Programs:
    """The training step and the test of one kind of attention, compiled."""

    def __init__(self, choose: Chooser, optimizer: optax.GradientTransformation, config: Config):
        graphdef, self.params = nnx.split(Model(config, choose, nnx.Rngs(config.seed)))

        def loss_fn(params, tokens):
            logits, share = nnx.merge(graphdef, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), share

        def step(params, opt_state, tokens):
            (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        tokens = jax.ShapeDtypeStruct((config.batch, config.length + 1), jnp.int32)
        state = jax.eval_shape(optimizer.init, self.params)
        self._step = jax.jit(step).lower(self.params, state, tokens).compile()
        self._test = jax.jit(loss_fn).lower(self.params, tokens).compile()
        self._batch = config.batch

    def step(self, params: Any, opt_state: Any, tokens: np.ndarray) -> tuple[Any, Any, float, float]:
        """Parameters, state of the optimizer, loss and seconds."""
        started = time.perf_counter()
        params, opt_state, loss = self._step(params, opt_state, tokens)
        loss = float(loss)  # waits for the step
        return params, opt_state, loss, time.perf_counter() - started

    def test(self, params: Any, rows: np.ndarray) -> tuple[float, float]:
        """The mean loss, and the share of blocks visited."""
        batches = rows[: len(rows) // self._batch * self._batch].reshape(-1, self._batch, rows.shape[1])
        results = np.asarray([self._test(params, batch) for batch in batches], np.float64)
        loss, share = results.mean(0).tolist()
        return loss, share


def train(config: Config) -> dict:
    """Trains, swaps and fine-tunes; returns losses, times and shares of visited blocks."""
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.warmup_constant_schedule(0.0, config.learning_rate, max(1, config.steps // 10))),
    )
    batches, held_out = texts(config)
    dense, sparse = (Programs(choose, optimizer, config) for choose in (full, moba))

    params, losses = dense.params, []
    opt_state = optimizer.init(params)
    bar = tqdm(range(config.steps), desc="full attention", unit="step", dynamic_ncols=True)
    for _ in bar:
        params, opt_state, loss, _ = dense.step(params, opt_state, next(batches))
        losses.append(loss)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    (before, full_share), (after, _) = dense.test(params, held_out), sparse.test(params, held_out)

    # Both go on from the same parameters and optimizer state, with the same batches.
    states = {"control": (dense, params, opt_state), "moba": (sparse, params, opt_state)}
    further: dict[str, list[float]] = {name: [] for name in states}
    seconds: dict[str, list[float]] = {name: [] for name in states}
    bar = tqdm(range(config.more_steps), desc="MoBA and control", unit="step", dynamic_ncols=True)
    for _ in bar:
        tokens = next(batches)
        for name, (program, params, opt_state) in states.items():
            params, opt_state, loss, elapsed = program.step(params, opt_state, tokens)
            states[name] = program, params, opt_state
            further[name].append(loss)
            seconds[name].append(elapsed)
        bar.set_postfix(loss=f"{further['moba'][-1]:.3f}", refresh=False)
    control, _ = dense.test(states["control"][1], held_out)
    fine_tuned, moba_share = sparse.test(states["moba"][1], held_out)

    return {
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "config": dataclasses.asdict(config),
        "held_out": {
            "before the swap": before,
            "after the swap": after,
            "fine-tuned": fine_tuned,
            "control": control,
        },
        "visited_share": {"full": full_share, "moba": moba_share},
        "step_seconds": {name: float(np.median(times[2:] or times)) for name, times in seconds.items()},
        "losses": {"full": losses, **further},
    }


# ---- report ----


def report(run: dict, output: Path) -> dict:
    """Prints the losses and times, and writes picture and numbers."""
    config, held_out, seconds = Config(**run["config"]), run["held_out"], run["step_seconds"]
    print(
        f"\n{run['device']}: {config.length:,} tokens, batch {config.batch}, {config.layers} layers of {config.heads} "
        f"heads of {config.head_dim}.\n{config.steps} steps with full attention, then {config.more_steps} of MoBA, "
        f"{config.top_k} blocks of {config.block} keys, or of full attention.\n"
    )
    print(f"{'':17}{'attention':>10}{'steps':>7}{'held-out loss':>15}")
    for name, loss in held_out.items():
        kind = "full" if name in ("before the swap", "control") else "MoBA"
        steps = config.steps + (config.more_steps if name in ("fine-tuned", "control") else 0)
        print(f"{name:17}{kind:>10}{steps:7}{loss:15.4f}")
    run["speed_up"] = seconds["control"] / seconds["moba"]
    share = run["visited_share"]
    print(f"\nBlocks visited: {share['moba']:.1%} by MoBA, {share['full']:.1%} by full attention.")
    print(
        f"Time of a training step: {seconds['moba'] * 1e3:.1f} ms with MoBA, {seconds['control'] * 1e3:.1f} ms with "
        f"full attention; MoBA is {run['speed_up']:.2f} times as fast."
    )
    (output / "summary.json").write_text(json.dumps(run, indent=1) + "\n")
    plot(run, output / "moba_finetune.png")
    print(f"Written to {output}/: summary.json, moba_finetune.png")
    every = [*held_out.values(), *np.concatenate(list(run["losses"].values()))]
    if not np.isfinite(every).all():
        raise SystemExit("a loss is not finite")
    return run


def plot(run: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    config, losses, held_out = Config(**run["config"]), run["losses"], run["held_out"]
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    further = np.arange(config.steps, config.steps + config.more_steps) + 1
    left.plot(np.arange(config.steps) + 1, losses["full"], color="#f2b56b", label="full attention")
    left.plot(further, losses["control"], color="#b9b9b9", linewidth=4, label="full attention, goes on")
    left.plot(further, losses["moba"], color="#24557a", label="MoBA")
    left.axvline(config.steps + 0.5, color="gray", linewidth=0.8)
    left.set(xlabel="step", ylabel="loss of the batch (nats per byte)", title="MoBA takes over")
    left.legend(frameon=False)
    colors = {"before the swap": "#f2b56b", "control": "#b9b9b9"}
    for name, loss in held_out.items():
        right.plot(name, loss, "o", markersize=9, color=colors.get(name, "#24557a"))
        right.annotate(f"{loss:.3f}", (name, loss), (0, 9), textcoords="offset points", ha="center")
    right.set(title="loss of held-out text", ylabel="nats per byte")
    right.margins(0.2)
    right.tick_params(axis="x", rotation=20)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("moba_output"), help="folder for picture and numbers")
    for field in dataclasses.fields(Config):
        if field.type == "int":
            parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = vars(parser.parse_args(argv))
    output = arguments.pop("output")
    output.mkdir(parents=True, exist_ok=True)
    return report(train(Config(**arguments)), output)


if __name__ == "__main__":
    main()
