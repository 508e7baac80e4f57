"""Trains a small byte-level Flax transformer on real text, once with dense and once with block-sparse attention.

    python examples/train_bytes.py --output demo_output

The text is the source code of Python's standard library, which is on every machine that runs this. Both models have
the same mask (a causal window plus global tokens), the same initial parameters and the same batches. One attends with
`jax.nn.dot_product_attention`, through Flax's own attention, and the dense boolean mask; the other with `jax_bsk`. Each
is trained in a process of its own, so that its peak memory is its own. The losses are printed side by side and must
agree.

On a GPU the model and the sequence are larger, the computation is in bfloat16, and jax_bsk takes its CUDA kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

import jax_bsk.flax
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, Mask

# How far apart the losses may be, relatively, in the first CHECKED_STEPS steps (rounding grows while training goes on).
# float32, measured: exchanging the attention moves the losses by 2e-7, as does changing each initial parameter by one
# unit in the last place; a window one token too short moves them by 3e-4. The tolerance lies between.
# bfloat16, measured: exchanging the attention 8e-4, exchanging bfloat16 for float32 5e-3.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
CHECKED_STEPS = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run; the defaults take little more than a minute on two CPU cores, both models together."""

    steps: int = 40
    seq_len: int = 3072
    batch: int = 1
    layers: int = 2
    width: int = 128
    heads: int = 2
    window: int = 256
    global_tokens: int = 16
    dtype: str = "float32"
    learning_rate: float = 2e-3

    @classmethod
    def for_backend(cls, backend: str) -> Config:
        if backend == "cpu":
            return cls()
        return cls(200, seq_len=8192, layers=4, width=512, heads=8, window=512, dtype="bfloat16", learning_rate=5e-4)

    @property
    def mask(self) -> Mask:
        """Each byte sees the window before it and the first bytes of the sequence, and nothing that comes later."""
        return CausalMask() & (LocalMask((self.window, 0)) | GlobalMask(self.global_tokens))


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: Config, attention_fn, rngs: nnx.Rngs):
        width, dtype = config.width, config.dtype
        self.norm_1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            config.heads, width, attention_fn=attention_fn, decode=False, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.norm_2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x, dense_mask):
        x = x + self.attention(self.norm_1(x), mask=dense_mask)
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class ByteModel(nnx.Module):
    """Predicts each byte from those that its mask shows; all that differs between the two runs is `attention_fn`."""

    def __init__(self, config: Config, attention_fn, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(256, config.width, dtype=config.dtype, rngs=rngs)
        self.positions = nnx.Embed(config.seq_len, config.width, dtype=config.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, attention_fn, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(config.width, 256, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens, dense_mask):
        x = self.embedding(tokens) + self.positions(jnp.arange(tokens.shape[1])[None])
        for block in self.blocks:
            x = block(x, dense_mask)
        return self.head(self.norm(x)).astype(jnp.float32)


def standard_library_text(limit: int = 4_000_000) -> np.ndarray:
    """The top-level modules of Python's standard library one after the other, as bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    if not text:
        raise SystemExit(f"no Python sources in {folder}: this Python comes without the text the demo trains on")
    return np.frombuffer(text[:limit], np.uint8)


def train(attention: str, config: Config) -> dict:
    """Trains one model; `attention` is "dense" or "sparse". Returns losses, times and memory."""
    if attention == "sparse":
        attention_fn, dense_mask = jax_bsk.flax.attention_fn(config.mask), None
    else:
        attention_fn = nnx.dot_product_attention  # calls jax.nn.dot_product_attention
        dense_mask = jnp.asarray(config.mask.bind(config.seq_len).to_dense())

    graphdef, params = nnx.split(ByteModel(config, attention_fn, nnx.Rngs(0)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(config.learning_rate))

    def loss_fn(params, tokens, dense_mask):
        logits = nnx.merge(graphdef, params)(tokens[:, :-1], dense_mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(params, opt_state, tokens, dense_mask):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, dense_mask)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    text, rng = standard_library_text(), np.random.default_rng(0)

    def next_batch():
        starts = rng.integers(0, len(text) - config.seq_len - 1, config.batch)
        return jnp.asarray(np.stack([text[s : s + config.seq_len + 1] for s in starts]), jnp.int32)

    opt_state, tokens = optimizer.init(params), next_batch()
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, tokens, dense_mask).compile()
    compile_seconds = time.perf_counter() - started

    memory = compiled.memory_analysis()

    losses, seconds = [], []
    bar = tqdm(range(config.steps), desc=f"{attention:6s}", unit="step", dynamic_ncols=True)
    for _ in bar:
        started = time.perf_counter()
        params, opt_state, loss = compiled(params, opt_state, tokens, dense_mask)
        losses.append(float(loss))  # waits for the step
        seconds.append(time.perf_counter() - started)
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        tokens = next_batch()

    return {
        "attention": attention,
        "ran": what_ran(attention, compiled.as_text() or ""),
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "config": dataclasses.asdict(config),
        "text_bytes": len(text),
        "compile_seconds": compile_seconds,
        "step_seconds": float(np.median(seconds[1:] or seconds)),
        "peak_memory_bytes": peak_memory(),
        "buffer_bytes": memory.temp_size_in_bytes if memory else 0,
        "losses": losses,
    }


def what_ran(attention: str, program: str) -> str:
    """What the compiled program attends with: jax_bsk's kernels are custom calls that show their names in it."""
    if attention == "dense":
        return "jax.nn.dot_product_attention, dense mask"
    native = "jax_bsk_attention_forward" in program
    platform = "cpu" if jax.default_backend() == "cpu" else "cuda"
    return f'jax_bsk, implementation "{platform if native else "xla"}"'


def peak_memory() -> int:
    """Peak bytes in use on the GPU; on a CPU those of this process, Python and JAX included."""
    statistics = jax.devices()[0].memory_stats() or {}
    if jax.default_backend() != "cpu" and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(dense: dict, sparse: dict, output: Path) -> None:
    """Prints both runs side by side, checks that they agree, and writes the pictures and `summary.json`."""
    config = Config(**dense["config"])
    bound = config.mask.bind(config.seq_len)
    print(f"\nText: {dense['text_bytes'] / 1e6:.1f} MB of Python's standard library. Device: {dense['device']}.")
    print(f"Mask: {config.mask!r}, {bound.density:.1%} of its blocks are visited.\n")

    a, b = np.array(dense["losses"]), np.array(sparse["losses"])
    difference, tolerance = np.abs(a - b) / a, TOLERANCE[config.dtype]
    largest = float(difference[:CHECKED_STEPS].max())
    print(f"{'step':>5}  {'dense loss':>11}  {'sparse loss':>11}  {'relative difference':>19}")
    for n in sorted({round(x) for x in np.linspace(0, config.steps - 1, 14)}):
        print(f"{n + 1:5d}  {a[n]:11.6f}  {b[n]:11.6f}  {difference[n]:19.1e}")

    print(f"\n{'':8}{'time a step':>12}{'peak memory':>13}{'step buffers':>14}{'compilation':>13}   attention")
    for run in (dense, sparse):
        print(
            f"{run['attention']:8}{run['step_seconds'] * 1e3:9.1f} ms{run['peak_memory_bytes'] / 2**20:9.0f} MiB"
            f"{run['buffer_bytes'] / 2**20:10.0f} MiB{run['compile_seconds']:11.1f} s   {run['ran']}"
        )
    speed_up = dense["step_seconds"] / sparse["step_seconds"]
    memory = dense["peak_memory_bytes"] / sparse["peak_memory_bytes"]
    print(f"\nThe whole training step is {speed_up:.1f} times faster, its peak memory {memory:.1f} times smaller.")
    print(f"The losses agree within {largest:.1e} (tolerance {tolerance:.0e}).")

    summary = {
        "speed_up": speed_up,
        "memory_ratio": memory,
        "largest_relative_loss_difference": largest,
        "tolerance": tolerance,
        "block_density": bound.density,
        "dense": dense,
        "sparse": sparse,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    bound.plot(output / "mask.png")
    plot_losses(a, b, speed_up, output / "losses.png")
    print(f"Written to {output}/: mask.png, losses.png, summary.json")
    if not largest <= tolerance:  # NaN fails too
        raise SystemExit(f"the losses differ by {largest:.1e}, more than {tolerance:.0e}")
    if config.steps >= 20 and not b[-5:].mean() < b[0]:
        raise SystemExit(f"the loss did not fall: {b[0]:.3f} at first, {b[-5:].mean():.3f} at last")


def plot_losses(dense: np.ndarray, sparse: np.ndarray, speed_up: float, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    ax = figure.add_subplot(
        xlabel="step", ylabel="loss (nats a byte)", title=f"same losses, {speed_up:.1f} times faster"
    )
    steps = np.arange(1, len(dense) + 1)
    ax.plot(steps, dense, color="#f2b56b", linewidth=5, label="jax.nn.dot_product_attention, dense mask")
    ax.plot(steps, sparse, color="#24557a", linewidth=1.5, label="jax_bsk, block-sparse mask")
    ax.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for pictures and numbers")
    parser.add_argument("--attention", choices=["both", "dense", "sparse"], default="both")
    for name in ("steps", "seq-len", "batch"):
        parser.add_argument(f"--{name}", type=int, help="by default what suits the device")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)

    if arguments.attention != "both":
        given = {
            name: value for name in ("steps", "seq_len", "batch") if (value := getattr(arguments, name)) is not None
        }
        config = dataclasses.replace(Config.for_backend(jax.default_backend()), **given)
        (output / f"{arguments.attention}.json").write_text(json.dumps(train(arguments.attention, config)))
        return

    # Each in a process of its own; this one never touches the GPU. The later --attention wins.
    for attention in ("dense", "sparse"):
        if subprocess.run([sys.executable, *sys.argv, "--attention", attention]).returncode:
            raise SystemExit(f"the {attention} run failed; if its memory did not suffice, give a smaller --seq-len")
    dense, sparse = (json.loads((output / f"{name}.json").read_text()) for name in ("dense", "sparse"))
    report(dense, sparse, output)


if __name__ == "__main__":
    main()
