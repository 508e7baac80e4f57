r"""Measures how a training step scales over the devices of one host.

    python tools/sharded_scaling.py --output scaling.json

The tool runs the same global problem on one device and on all of them (strong scaling), once split over data and once
over heads. The model has layers of query, key, value and output projections around `sparse_attention`, trained by SGD.
Efficiency is t1 / (N tN). The tool also checks that attention and its gradients are bit-equal to those of one device,
and that their compiled program has no collective. It counts the collectives of the training step, which must sum
gradients or projections.

This command shows without a GPU that everything runs:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python tools/sharded_scaling.py --dtype float32 \
        --length 256 --layers 1 --batch 2 --heads 4 --kv-heads 4 --head-dim 64 --window 64 --steps 3
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_bsk import sparse_attention
from jax_bsk.masks import CausalMask, LocalMask

SPLITS = {"data": P("split"), "heads": P(None, None, "split")}  # of query, key, value, out and their gradients
COLLECTIVES = r"\b(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


def collectives(compiled) -> dict[str, int]:
    return dict(collections.Counter(re.findall(COLLECTIVES, compiled.as_text() or "")))


def attention_of(options):
    mask = (CausalMask() & LocalMask((options.window, 0))).bind(options.length, block_size=options.block_size)
    return mask, lambda q, k, v: sparse_attention(q, k, v, mask=mask, implementation=options.implementation)


# ---- Attention alone ------------------------------------------------------------------------------------------------


def check_attention(options, shardings) -> dict:
    """Output and gradients on one device and split: the same bits, no collective."""
    _, attend = attention_of(options)
    heads = options.heads, options.kv_heads, options.kv_heads, options.heads
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(options.batch, options.length, n, options.head_dim) for n in heads]
    arrays = [jax.random.normal(k, s, options.dtype) for k, s in zip(keys, shapes, strict=True)]

    @jax.jit
    def run(q, k, v, dout):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, *pullback(dout)

    one = jax.device_get(run(*arrays))
    found = {}
    for split, sharding in shardings.items():
        sharded = jax.device_put(arrays, sharding)
        compiled = run.lower(*sharded).compile()
        several = jax.device_get(compiled(*sharded))
        same = {
            name: a.tobytes() == b.tobytes()
            for name, a, b in zip(("out", "dquery", "dkey", "dvalue"), one, several, strict=True)
        }
        found[split] = {"bit_equal": same, "collectives": collectives(compiled)}
    return found


# ---- The training step ----------------------------------------------------------------------------------------------


def make_step(options):
    _, attend = attention_of(options)
    dtype = options.dtype

    def loss_of(params, x, target):
        for w in params:
            y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
            q, k, v = (jnp.einsum("btf,fnh->btnh", y.astype(dtype), w[name].astype(dtype)) for name in "qkv")
            x = x + jnp.einsum("btnh,nhf->btf", attend(q, k, v), w["o"].astype(dtype)).astype(jnp.float32)
        return ((x - target) ** 2).mean()

    def step(params, x, target):
        loss, grads = jax.value_and_grad(loss_of)(params, x, target)
        return jax.tree.map(lambda p, g: p - options.learning_rate * g, params, grads), loss

    return jax.jit(step, donate_argnums=0)


def make_arguments(options):
    features = options.heads * options.head_dim
    inner = {"q": options.heads, "k": options.kv_heads, "v": options.kv_heads}
    shapes = {name: (features, n, options.head_dim) for name, n in inner.items()}
    shapes["o"] = options.heads, options.head_dim, features
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return scale * rng.standard_normal(shape, np.float32)

    params = [{n: normal(*s, scale=features**-0.5) for n, s in shapes.items()} for _ in range(options.layers)]
    return params, *(normal(options.batch, options.length, features) for _ in range(2))


def shardings_of_step(split: str, mesh, params):
    """Data: replicated parameters. Heads: each projection split by heads, the batch on every device."""
    specs = dict.fromkeys("qkvo", P())
    if split == "heads":
        specs = {"q": P(None, "split"), "k": P(None, "split"), "v": P(None, "split"), "o": P("split")}
    batch = NamedSharding(mesh, P("split") if split == "data" else P())
    return [{n: NamedSharding(mesh, specs[n]) for n in layer} for layer in params], batch, batch


def measure(options, arguments) -> dict:
    """Median seconds of a step, and what its compiled program sums over devices."""
    params, x, target = arguments
    compiled = make_step(options).lower(params, x, target).compile()
    seconds, losses = [], []
    for _ in range(options.warmup + options.steps):
        started = time.perf_counter()
        params, loss = jax.block_until_ready(compiled(params, x, target))
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
    timed = seconds[options.warmup :]
    result = {"seconds": float(np.median(timed)), "fastest": min(timed), "slowest": max(timed), "losses": losses}
    return result | {"collectives": collectives(compiled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 4, "length": 16384, "heads": 16, "kv_heads": 16, "head_dim": 128, "layers": 4, "window": 2048}
    for name, default in (sizes | {"block_size": 128, "warmup": 3, "steps": 10}).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--devices", type=int, help="all by default")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--implementation", choices=["cpu", "cuda", "xla"], help="the platform's own by default")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.implementation = options.implementation or ("cpu" if jax.default_backend() == "cpu" else "cuda")

    devices = jax.devices()[: options.devices]
    count = len(devices)
    if count < 2 or options.batch % count or options.kv_heads % count:
        parser.error(f"{count} devices: there must be two or more, that divide the batch and the key/value heads")
    mesh = jax.make_mesh((count,), ("split",), axis_types=(AxisType.Auto,), devices=devices)
    visited = attention_of(options)[0].density
    print(f"{count} x {devices[0].device_kind}, jax {jax.__version__}, {options.implementation}, {options.dtype}")
    print(
        f"batch {options.batch}, length {options.length}, {options.heads} heads ({options.kv_heads}) of "
        f"{options.head_dim}, {options.layers} layers, causal window {options.window}: {visited:.1%} of the blocks\n"
    )

    attention = check_attention(options, {s: NamedSharding(mesh, SPLITS[s]) for s in options.splits})
    right = True
    for split, found in attention.items():
        wrong = [name for name, same in found["bit_equal"].items() if not same]
        right &= not wrong and not found["collectives"]
        bits = f"NOT bit-equal: {', '.join(wrong)}" if wrong else "bit-equal out, dquery, dkey, dvalue"
        print(f"attention over {split:6} {bits}; collectives: {found['collectives'] or 'none'}")

    arguments = make_arguments(options)
    one = measure(options, jax.device_put(arguments, devices[0]))
    print(f"\n{'':12}{'step':>11}{'speed-up':>10}{'efficiency':>12}{'last loss':>11}  collectives of the step")
    print(f"{'one device':12}{one['seconds'] * 1e3:8.2f} ms{'':22}{one['losses'][-1]:11.5f}")
    steps = {}
    for split in options.splits:
        placed = jax.device_put(arguments, shardings_of_step(split, mesh, arguments[0]))
        several = measure(options, placed)
        several["efficiency"] = one["seconds"] / (count * several["seconds"])
        steps[split] = several
        print(
            f"{'over ' + split:12}{several['seconds'] * 1e3:8.2f} ms{count * several['efficiency']:9.2f}x"
            f"{several['efficiency']:12.1%}{several['losses'][-1]:11.5f}  {several['collectives']}"
        )

    if options.output:
        settings = {k: v for k, v in vars(options).items() if k != "output"}
        device = {"kind": devices[0].device_kind, "count": count, "jax": jax.__version__}
        result = {"settings": settings, "device": device, "density": visited, "attention": attention}
        options.output.write_text(json.dumps(result | {"one_device": one, "sharded": steps}, indent=1) + "\n")
    if not right:
        raise SystemExit("attention is not bit-equal when sharded, or has collectives")


if __name__ == "__main__":
    main()
