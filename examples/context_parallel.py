r"""Trains a small transformer on packed documents whose sequence is sharded over devices, and compares with one device.

    python examples/context_parallel.py --output context_output
    python examples/context_parallel.py --data 1 --sequence 8 --window 256

The mesh has two axes: the batch is split over `data`, each sequence over `sequence`. Tokens are put into the order of
`jax_bsk.context.plan` once, on the host, so that the devices of a sequence have equal work. Rotary embeddings take
their positions from the plan. Nothing else differs from training on one device: the attention call is the same, and so
are the losses, up to rounding.

Without GPUs, CPU devices show that it works: put XLA_FLAGS=--xla_force_host_platform_device_count=8 before the command.
They share the machine's cores, so their times say nothing about scaling; `benchmarks/scaling.py` measures that on GPUs.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rotary import rotary
from tqdm import trange
from train_bytes import standard_library_text

from jax_bsk import BlockMask, context, sparse_attention
from jax_bsk.masks import CausalMask, LocalMask, SegmentMask

FEATURES, HEADS, KV_HEADS, LAYERS = 128, 8, 2, 2
HEAD_DIM = FEATURES // HEADS


# ---- data -----------------------------------------------------------------------------------------------------------


def packed_bytes(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of Python's standard library, int32 [steps, batch, T + 1], and the document of each token, int32 [T]."""
    rng = np.random.default_rng(options.seed)
    corpus = standard_library_text()
    starts = rng.integers(0, corpus.size - options.length - 1, (options.steps, options.batch))
    tokens = corpus[starts[..., None] + np.arange(options.length + 1)]
    bounds = np.sort(rng.choice(np.arange(1, options.length), options.documents - 1, replace=False))
    return tokens.astype(np.int32), np.searchsorted(bounds, np.arange(options.length), side="right").astype(np.int32)


# ---- model ----------------------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norms = nnx.List([nnx.RMSNorm(FEATURES, rngs=rngs) for _ in range(2)])
        self.query = nnx.LinearGeneral(FEATURES, (HEADS, HEAD_DIM), rngs=rngs)
        self.key_value = nnx.LinearGeneral(FEATURES, (2 * KV_HEADS, HEAD_DIM), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD_DIM), FEATURES, axis=(-2, -1), rngs=rngs)
        self.up, self.down = (nnx.Linear(*n, rngs=rngs) for n in ((FEATURES, 512), (512, FEATURES)))

    def __call__(self, x: jax.Array, mask: BlockMask, positions: Any) -> jax.Array:
        y, positions = self.norms[0](x), jnp.asarray(positions)[None]
        key, value = jnp.split(self.key_value(y), 2, axis=2)
        y = sparse_attention(rotary(self.query(y), positions), rotary(key, positions), value, mask=mask)
        x = x + self.out(y)
        return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(256, FEATURES, rngs=rngs)
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])
        self.logits = nnx.Linear(FEATURES, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: BlockMask, positions: Any) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, mask, positions)
        return self.logits(x)


# ---- training -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A training run: losses, the fastest step's seconds, and bytes that the compiled step needs on each device."""

    losses: list[float]
    step_seconds: float
    bytes_per_device: int


def train(
    name: str, batches: np.ndarray, targets: np.ndarray, mask: BlockMask, positions: Any, sharding: Any, seed: int
) -> Run:
    """Trains from the same start on the same tokens, which may come in another order with mask and positions."""
    graph, state = nnx.split(Transformer(nnx.Rngs(seed)))
    optimizer = optax.adam(3e-3)
    moments = optimizer.init(state)

    @jax.jit
    def step(state, moments, tokens, labels):
        def loss_of(state):
            logits = nnx.merge(graph, state)(tokens, mask, positions)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_of)(state)
        updates, moments = optimizer.update(gradients, moments, state)
        return optax.apply_updates(state, updates), moments, loss

    if isinstance(sharding, NamedSharding):  # parameters are the same on all devices
        state, moments = jax.device_put((state, moments), NamedSharding(sharding.mesh, PartitionSpec()))
    compiled = step.lower(state, moments, *jax.device_put((batches[0], targets[0]), sharding)).compile()
    memory = compiled.memory_analysis()
    losses, seconds = [], []
    for i in trange(len(batches), desc=name, disable=None):
        tokens, labels = jax.device_put((batches[i], targets[i]), sharding)
        start = time.perf_counter()
        state, moments, loss = compiled(state, moments, tokens, labels)
        losses.append(float(loss))
        seconds.append(time.perf_counter() - start)
    sizes = (memory.temp_size_in_bytes, memory.argument_size_in_bytes, memory.output_size_in_bytes) if memory else (0,)
    return Run(losses, min(seconds), sum(sizes))


def draw(mask: BlockMask, plan: context.Plan, path: Path) -> None:
    """Who computes what: the visited blocks of the sequence, in the colour of the device that has their queries."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = np.full((mask.nq, mask.nk), np.nan)
    owner = np.empty(mask.nq, int)
    owner[plan.positions[:: mask.block_q] // mask.block_q] = np.arange(mask.nq) // (mask.nq // plan.shards)
    lists = np.split(np.asarray(mask.kv_blocks)[0, 0], np.asarray(mask.row_offsets)[0, 0, 1:])
    for row, ids in enumerate(lists[: mask.nq]):
        blocks[row, ids] = owner[row]
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    image = axes.imshow(blocks, cmap="tab10", vmin=-0.5, vmax=9.5, interpolation="nearest")
    bounds = np.arange(plan.shards + 1) - 0.5
    figure.colorbar(image, ax=axes, label="device of the sequence", ticks=range(plan.shards), boundaries=bounds)
    axes.set(xlabel="key block", ylabel="query block", title="Who computes which visited blocks")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> tuple[Run, Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=2, help="devices that the batch is split over")
    parser.add_argument("--sequence", type=int, default=4, help="devices that each sequence is split over")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=6, help="documents packed in a sequence")
    parser.add_argument("--window", type=int, help="keys to the left that a token attends to; default: its document")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the picture")
    options = parser.parse_args(argv)
    needed = options.data * options.sequence
    if jax.device_count() < needed:
        parser.error(
            f"the mesh needs {needed} devices and there are {jax.device_count()}; on CPUs set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
        )
    tokens, documents = packed_bytes(options)
    lazy = CausalMask() & SegmentMask(documents)
    if options.window is not None:
        lazy = lazy & LocalMask((options.window, 0))
    mask = lazy.bind(options.length, block_size=options.block_size)
    plan = context.plan(mask, options.sequence, exchange_cost=16 * KV_HEADS / HEADS)
    print(context.describe(mask, options.sequence, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.float32))
    print("in the plan's order:")
    print(context.describe(plan, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=jnp.float32))

    batches, targets = tokens[..., :-1], tokens[..., 1:]
    everywhere = np.arange(options.length)
    one = train("one device", batches, targets, mask, everywhere, jax.devices()[0], options.seed)
    sizes, devices = (options.data, options.sequence), jax.devices()[:needed]
    mesh = jax.make_mesh(sizes, ("data", "sequence"), devices=devices, axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", "sequence"))
    batches, targets = (plan.dispatch(x, axis=2) for x in (batches, targets))
    many = train(f"{needed} devices", batches, targets, plan.mask, plan.positions, sharding, options.seed)

    per_step = options.batch * options.length
    print(f"{'':12} {'loss':>22} {'tokens per s':>14} {'memory per device':>18}")
    for name, run in (("one device", one), (f"{needed} devices", many)):
        losses = f"{run.losses[0]:.6f} .. {run.losses[-1]:.6f}"
        print(f"{name:12} {losses:>22} {per_step / run.step_seconds:14,.0f} {run.bytes_per_device / 2**20:14.1f} MiB")
    difference = max(abs(a - b) for a, b in zip(one.losses, many.losses, strict=True))
    print(f"largest difference of losses: {difference:.1e}")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        draw(mask, plan, options.output / "who_computes_what.png")
        print(f"Wrote {options.output / 'who_computes_what.png'}")
    return one, many


if __name__ == "__main__":
    main()
