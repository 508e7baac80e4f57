"""Trains a small causal Flax transformer to find needles in long sequences, with one kind of attention after the other.

    python examples/long_context.py --output long_context_output

The task is multi-query associative recall (Zoology, Arora et al. 2023, arXiv 2312.04927): a long sequence of random
filler tokens holds a few needles, each a key token with its value token behind it, at random places. Questions at the
end name keys, and the model must say their values. It has to attend from a question to the token whose predecessor is
the same key. As the models of that paper do with short convolutions, each token is given the embedding of the one
before it, and then a single layer can do it. There are no positional embeddings: only which token precedes matters.

All kinds have the same initial parameters and the same batches, and each runs in a process of its own, so that its peak
memory is its own:

    full           every token before
    window         the last tokens, as many as MoBA chooses
    moba           MoBA (arXiv 2502.13189): the blocks with the most fitting keys, chosen anew in each layer and head
    window+moba    as many blocks: the query's own block, the one before it, and those that MoBA would choose first
    sparsek        SparseK attention (arXiv 2406.16747): as many blocks, the query's own one and the earlier ones of
                   highest score; each token's score does not depend on the query and is learned with the rest
    nsa            NSA (arXiv 2502.11089): the gated sum of three branches, which attend to means of neighbouring keys,
                   to as many selected blocks as MoBA's, and to a window of two blocks

A question is repeated until it fills a block of queries, because these choose their key blocks together.

Every batch is drawn anew, so the accuracy of a batch before its step is one on fresh sequences. Written are
`summary.json` and `long_context.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jax_bsk
from jax_bsk.compositions.nsa import CompressedMask
from jax_bsk.masks import BlockMask, CausalMask, LocalMask


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run; the defaults take a bit more than a minute a kind on two CPU cores.

    Attributes:
      vocabulary: A quarter keys, a quarter values, the rest filler.
      needles: Pairs of key and value in a sequence.
      questions: Needles that are asked for, `block` times each.
      block: Queries and keys of a block.
      top_k: Key blocks that MoBA chooses for each query block, the own one included.
      phases: Parts of the training, of as many steps each. The last has sequences of `length`, each one before it of
        half the length: where nearly all blocks are chosen, what to look for is learned soon.
      test_sequences: Sequences of the accuracy after training.
    """

    steps: int = 600
    length: int = 1024
    batch: int = 16
    seed: int = 0
    vocabulary: int = 64
    needles: int = 8
    questions: int = 4
    layers: int = 1
    heads: int = 4
    head_dim: int = 16
    block: int = 32
    top_k: int = 8
    phases: int = 2
    dtype: str = "float32"
    learning_rate: float = 5e-3
    test_sequences: int = 128

    @classmethod
    def for_backend(cls, backend: str) -> Config:
        if backend == "cpu":
            return cls()
        return cls(
            steps=1500,
            length=16_384,
            batch=8,
            questions=8,
            heads=8,
            head_dim=64,
            block=64,
            top_k=16,
            phases=5,
            dtype="bfloat16",
            learning_rate=7e-4,  # 2e-3 learns nothing at this width
        )

    def __post_init__(self):
        shortest = self.length // 2 ** (self.phases - 1)
        room = shortest - self.questions * self.block
        if self.length % (self.block * 2 ** (self.phases - 1)) or room < 2 * self.needles:
            raise ValueError(
                f"the length of every phase is a multiple of {self.block} and has room for {self.questions} questions "
                f"of that many tokens and {self.needles} needles, got {shortest} to {self.length}"
            )
        if self.steps % self.phases:
            raise ValueError(f"steps are a multiple of the {self.phases} phases, got {self.steps}")

    @property
    def context(self) -> int:
        """Tokens before the questions."""
        return self.length - self.questions * self.block

    def in_phases(self) -> list[Config]:
        """The same for each phase, with its length and steps."""
        return [
            dataclasses.replace(self, length=self.length // 2**n, steps=self.steps // self.phases, phases=1)
            for n in reversed(range(self.phases))
        ]

    @property
    def window(self) -> int:
        """Keys before a query's own."""
        return self.top_k * self.block - 1


# ---- kinds of attention ----

# An attention is called with query, key and value, [B, T, heads, head size], and what they were projected from, [B, T,
# width]; it gives [B, T, heads, head size] and the share of all pairs that its visited blocks hold. It may have
# parameters of its own.
Attention = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# (query, key, config) -> what each query attends to.
Chooser = Callable[[jax.Array, jax.Array, Config], BlockMask]


def visited_share(mask: BlockMask, length: int) -> jax.Array:
    """Pairs of query and key in the visited blocks, as a share of length x length; the mean over examples and heads."""
    visited = jnp.asarray(mask.row_offsets)[..., -1].mean(dtype=jnp.float32)
    return visited * (min(mask.block_q, mask.q_len) * min(mask.block_kv, mask.kv_len) / length**2)


class Chosen(nnx.Module):
    """Attention to what a function of query and key chooses; no parameters."""

    def __init__(self, choose: Chooser, config: Config, rngs: nnx.Rngs):
        self.choose, self.config = choose, config

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        mask = self.choose(query, key, self.config)
        return jax_bsk.sparse_attention(query, key, value, mask=mask), visited_share(mask, self.config.length)


def full(query: jax.Array, key: jax.Array, config: Config) -> BlockMask:
    return CausalMask().bind(config.length, block_size=config.block)


def window(query: jax.Array, key: jax.Array, config: Config) -> BlockMask:
    return (CausalMask() & LocalMask((config.window, 0))).bind(config.length, block_size=config.block)


def moba(query: jax.Array, key: jax.Array, config: Config) -> BlockMask:
    return jax_bsk.selection.moba(query, key, top_k=config.top_k, moba_block=config.block, block_size=config.block)


def window_and_moba(query: jax.Array, key: jax.Array, config: Config) -> BlockMask:
    # MoBA's scores, with the own block and the one before it always chosen.
    query_means, key_means = (
        x.reshape(x.shape[0], -1, config.block, *x.shape[2:]).mean(2, dtype=jnp.float32) for x in (query, key)
    )
    scores = jnp.einsum("binh,bjnh->bnij", query_means, key_means)
    before = jnp.eye(scores.shape[-1], k=-1, dtype=bool)
    return jax_bsk.selection.from_topk(
        jnp.where(before[None, None], jnp.inf, scores),
        config.top_k,
        q_len=config.length,
        block_size=config.block,
        mask=CausalMask(),
        own_block=True,
    )


class SparseK(nnx.Module):
    """The query's own block, and those before it whose tokens' scores are highest; what scores them is learned."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        # Of a stream of its own: what other layers draw is the same with and without.
        rngs = nnx.Rngs(rngs.score())
        width = config.heads * config.head_dim
        self.score = nnx.Linear(width, config.heads, use_bias=False, dtype="float32", rngs=rngs)

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        mask, gates = jax_bsk.selection.sparsek(
            self.score(inputs), top_k=self.config.top_k - 1, window=1, block_size=self.config.block
        )
        out = jax_bsk.sparse_attention(query, key, value, mask=mask, gates=gates)
        return out, visited_share(mask, self.config.length)


class NSA(nnx.Module):
    """Compressed, selected and window branch, with sigmoids of the token as gates, as in `jax_bsk.flax`'s layer.

    It selects as many blocks as MoBA chooses. The window of two blocks and the means, one for each half block of the
    sequence, come on top. The blocks of these two branches are jax_bsk's default of 128 tokens, so in short sequences
    they visit many more keys than they attend to. With fewer selected blocks, so that a query attends to no more keys
    in all than with MoBA, the model of `Config()` reached 18.2 and 20.7 % with seeds 0 and 1.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        rngs = nnx.Rngs(rngs.score())
        width = config.heads * config.head_dim
        self.gate = nnx.Linear(width, 3 * config.heads, dtype="float32", rngs=rngs)

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, inputs: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        block, length = self.config.block, self.config.length
        compression_block, stride, window_tokens = block, block // 2, 2 * block
        means = (length - compression_block) // stride + 1
        selection: dict[str, Any] = {
            "top_k": self.config.top_k,
            "compression_block": compression_block,
            "compression_stride": stride,
            "selection_block": block,
            "initial_blocks": 0,  # no token at the beginning is special, and the window has the local ones
            "local_blocks": 1,
            "block_size": block,
        }
        gates = jax.nn.sigmoid(self.gate(inputs)).reshape(*query.shape[:3], 3)
        out = jax_bsk.nsa_attention(query, key, value, gates, window=window_tokens, **selection)
        # The masks of the three branches once more, to count their blocks; a training step computes none of this.
        masks = (
            CompressedMask(compression_block, stride).bind(length, means),
            jax_bsk.selection.nsa(query, key, **selection),
            LocalMask((window_tokens - 1, 0)).bind(length),
        )
        return out, jnp.stack([visited_share(mask, length) for mask in masks]).sum()


# A kind is a name and what makes its attention; the model, the options and the report take it from here.
KINDS: dict[str, Callable[[Config, nnx.Rngs], Attention]] = {
    "full": functools.partial(Chosen, full),
    "window": functools.partial(Chosen, window),
    "moba": functools.partial(Chosen, moba),
    "window+moba": functools.partial(Chosen, window_and_moba),
    "sparsek": SparseK,
    "nsa": NSA,
}


# ---- model ----


class Layer(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config, kind: str, rngs: nnx.Rngs):
        heads, width = (config.heads, config.head_dim), config.heads * config.head_dim
        self.norm_1 = nnx.LayerNorm(width, dtype=config.dtype, rngs=rngs)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(width, heads, use_bias=False, dtype=config.dtype, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.LinearGeneral(heads, width, axis=(-2, -1), use_bias=False, dtype=config.dtype, rngs=rngs)
        self.norm_2 = nnx.LayerNorm(width, dtype=config.dtype, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, dtype=config.dtype, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, dtype=config.dtype, rngs=rngs)
        self.attention = KINDS[kind](config, rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The layer's output, and the share of blocks it visited."""
        normed = self.norm_1(x)
        query, key, value = self.query(normed), self.key(normed), self.value(normed)
        attended, share = self.attention(query, key, value, normed)
        x = x + self.out(attended)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x)))), share


class Model(nnx.Module):
    """Logits of the token after each of the questions'."""

    def __init__(self, config: Config, kind: str, rngs: nnx.Rngs):
        width = config.heads * config.head_dim
        self.context = config.context
        self.token = nnx.Embed(config.vocabulary, width, dtype=config.dtype, rngs=rngs)
        self.previous = nnx.Embed(config.vocabulary, width, dtype=config.dtype, rngs=rngs)
        self.layers = nnx.List([Layer(config, kind, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(width, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(width, config.vocabulary, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of tokens [B, T]: logits [B, questions * block, vocabulary], and the share of blocks visited."""
        before = jnp.pad(self.previous(tokens[:, :-1]), [(0, 0), (1, 0), (0, 0)])
        x, shares = self.token(tokens) + before, []
        for layer in self.layers:
            x, share = layer(x)
            shares.append(share)
        return self.head(self.norm(x[:, self.context :])).astype(jnp.float32), jnp.stack(shares).mean()


# ---- task ----


def sequences(config: Config, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Fresh sequences.

    Returns:
      Tokens int32 [count, length], and the values asked for, int32 [count, questions * block].
    """
    kinds = config.vocabulary // 4  # tokens: keys, then values, then filler
    tokens = rng.integers(2 * kinds, config.vocabulary, (count, config.length), np.int32)
    answers = np.empty((count, config.questions * config.block), np.int32)
    for row, answer in zip(tokens, answers, strict=True):
        # Pairs do not overlap: the i-th of sorted places moves up by the i tokens that the earlier pairs take more.
        places = np.sort(rng.choice(config.context - config.needles, config.needles, replace=False))
        places += np.arange(config.needles)
        row[places] = rng.choice(kinds, config.needles, replace=False)
        row[places + 1] = rng.integers(kinds, 2 * kinds, config.needles)
        asked = np.repeat(rng.choice(places, config.questions, replace=False), config.block)
        row[config.context :], answer[:] = row[asked], row[asked + 1]
    return tokens, answers


# ---- training ----


def train(kind: str, config: Config) -> dict:
    """Trains a model with one kind of attention; returns what it took and learned."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.learning_rate))

    def loss_of(phase: Config):
        graphdef, _ = nnx.split(Model(phase, kind, nnx.Rngs(config.seed, score=config.seed)))

        def loss_fn(params, tokens, answers):
            logits, share = nnx.merge(graphdef, params)(tokens)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, answers).mean()
            return loss, ((logits.argmax(-1) == answers).mean(dtype=jnp.float32), share)

        return loss_fn

    def step_of(loss_fn):
        def step(params, opt_state, tokens, answers):
            (loss, (accuracy, _)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens, answers)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss, accuracy

        return jax.jit(step, donate_argnums=(0, 1))

    train_rng, test_rng = np.random.default_rng([config.seed, 0]), np.random.default_rng([config.seed, 1])
    _, params = nnx.split(Model(config, kind, nnx.Rngs(config.seed, score=config.seed)))
    opt_state = optimizer.init(params)
    losses, accuracies, seconds, compile_seconds, loss_fn = [], [], [], 0.0, loss_of(config)
    bar = tqdm(total=config.steps, desc=f"{kind:12s}", unit="step", dynamic_ncols=True)
    for phase in config.in_phases():
        loss_fn, seconds = loss_of(phase), []
        batch = sequences(phase, phase.batch, train_rng)
        started = time.perf_counter()
        compiled = step_of(loss_fn).lower(params, opt_state, *batch).compile()
        compile_seconds = time.perf_counter() - started  # as the times of steps, of the last phase
        for _ in range(phase.steps):
            started = time.perf_counter()
            params, opt_state, loss, accuracy = compiled(params, opt_state, *batch)
            losses.append(float(loss))  # waits for the step
            seconds.append(time.perf_counter() - started)
            accuracies.append(float(accuracy))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.0%}", refresh=False)
            bar.update()
            batch = sequences(phase, phase.batch, train_rng)
    bar.close()
    peak = peak_memory()  # before the test, which is not what is measured

    evaluate = jax.jit(lambda *arguments: loss_fn(*arguments)[1])
    rounds = range(max(1, config.test_sequences // config.batch))
    tests = [evaluate(params, *sequences(config, config.batch, test_rng)) for _ in rounds]
    accuracy, share = np.mean(np.asarray(tests), axis=0).tolist()
    return {
        "kind": kind,
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "config": dataclasses.asdict(config),
        "accuracy": accuracy,
        "test_sequences": len(rounds) * config.batch,
        "step_seconds": float(np.median(seconds[3:] or seconds)),  # the first few warm up
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak,
        "visited_share": share,
        "losses": losses,
        "accuracies": accuracies,
    }


def peak_memory() -> int:
    """Peak bytes in use on the GPU; on a CPU those of this process, Python and JAX included."""
    statistics = jax.devices()[0].memory_stats() or {}
    if jax.default_backend() != "cpu" and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- report ----


def report(runs: Sequence[dict], output: Path) -> None:
    """Prints the kinds one below the other, and writes `summary.json` and `long_context.png`."""
    config = Config(**runs[0]["config"])
    print(
        f"\nDevice: {runs[0]['device']}. {config.length:,} tokens, {config.needles} needles, batch {config.batch}, "
        f"{config.steps} steps, {config.layers} layer(s) of {config.heads} heads of "
        f"{config.head_dim}, {config.dtype}.\n"
        f"Accuracy on {runs[0]['test_sequences']} fresh sequences; a guess has {4 / config.vocabulary:.1%}.\n"
    )
    print(f"{'attention':14}{'accuracy':>9}{'blocks visited':>16}{'time a step':>14}{'peak memory':>13}")
    for run in runs:
        print(
            f"{run['kind']:14}{run['accuracy']:9.1%}{run['visited_share']:16.1%}{run['step_seconds'] * 1e3:11.1f} ms"
            f"{run['peak_memory_bytes'] / 2**20:9.0f} MiB"
        )
    (output / "summary.json").write_text(json.dumps({run["kind"]: run for run in runs}, indent=1) + "\n")
    plot(runs, output / "long_context.png")
    print(f"\nWritten to {output}/: summary.json, long_context.png")
    for run in runs:
        if not np.isfinite(run["losses"]).all():
            raise SystemExit(f"{run['kind']}: the loss is not finite")


def plot(runs: Sequence[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    config = Config(**runs[0]["config"])
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    left.set(
        xlabel="step", ylabel="accuracy", ylim=(0, 1.02), title=f"{config.needles} needles, {config.length:,} tokens"
    )
    right.set(ylabel="ms", title="time of a training step")
    smooth = max(1, config.steps // 20)
    for i, run in enumerate(runs):
        # The mean of the last few batches, of fewer at the start.
        total = np.cumsum([0.0, *run["accuracies"]])
        last = np.arange(1, len(total))
        first = np.maximum(last - smooth, 0)
        left.plot(last, (total[last] - total[first]) / (last - first), color=f"C{i}", label=run["kind"])
        right.bar(run["kind"], run["step_seconds"] * 1e3, color=f"C{i}")
    for n in range(1, config.phases):
        left.axvline(n * config.steps / config.phases, color="gray", linewidth=0.8)  # from here on twice as long
    left.axhline(4 / config.vocabulary, color="gray", linewidth=0.8, linestyle=":", label="a guess")
    left.legend(frameon=False)
    right.tick_params(axis="x", rotation=30)
    for label in right.get_xticklabels():
        label.set_horizontalalignment("right")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("long_context_output"), help="folder for picture and numbers"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # in this process, into a file of its own
    for name in ("length", "steps", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, help="by default what suits the device")
    arguments = parser.parse_args(argv)
    output, kinds = arguments.output, list(dict.fromkeys(arguments.kinds))
    output.mkdir(parents=True, exist_ok=True)

    if arguments.one:
        given = {
            name: value
            for name in ("length", "steps", "batch", "seed")
            if (value := getattr(arguments, name)) is not None
        }
        config = dataclasses.replace(Config.for_backend(jax.default_backend()), **given)
        (output / f"{arguments.one}.json").write_text(json.dumps(train(arguments.one, config)))
        return

    # Each in a process of its own; this one never touches the GPU.
    command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv)]
    runs = []
    for kind in kinds:
        if subprocess.run([*command, "--one", kind]).returncode:
            raise SystemExit(f"{kind} failed; if its memory did not suffice, give a smaller --length or --batch")
        part = output / f"{kind}.json"
        runs.append(json.loads(part.read_text()))
        part.unlink()
    report(runs, output)


if __name__ == "__main__":
    main()
