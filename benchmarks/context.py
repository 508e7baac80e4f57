r"""Measures attention over a sequence that is sharded over the devices of one host, beside one device.

    python benchmarks/context.py --output context.json

Each case is the same global problem on one device and on all of them, in
contiguous parts and in the order of `jax_bsk.context.plan`. Efficiency is t1 / (n tn). Before anything is timed,
outputs and gradients are compared with those of one device, and the gradients of repeated runs with each other, bit for
bit. Bytes are those that `jax_bsk.context.describe` predicts and those of the collectives in the compiled forward.

This command shows without a GPU that everything runs:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/context.py --dtype float32 --length 1024 \
        --heads 4 --head-dim 64 --window 256 --globals 16 --repeats 1 --rounds 1 --milliseconds 0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jax_bsk import BlockMask, context, sparse_attention
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, SegmentMask
from jax_bsk.qa.support.environment import versions

NAMES = ("out", "dquery", "dkey", "dvalue")
# Floors of the efficiency at 1, 16, 131072, 128 on two H200s: forward and backward together, and the forward.
GOALS = {
    "causal": (0.97, 0.94),
    "documents": (0.92, 0.88),
    "window": (0.92, 0.88),
    "window and global": (0.90, 0.85),
    "random 10 %": (0.92, None),
    "causal, 4 of 32 heads": (0.95, None),
}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    mask: BlockMask
    heads: int
    kv_heads: int


def cases(options: argparse.Namespace) -> list[Case]:
    length, block = options.length, options.block_size
    rng = np.random.default_rng(0)
    documents = np.sort(rng.integers(0, 10, length)).astype(np.int32)
    blocks = rng.random((length // block, length // block)) < 0.1
    causal, window = CausalMask(), LocalMask((options.window, 0))
    lazy = {
        "causal": causal,
        "documents": causal & SegmentMask(documents),
        "window": causal & window,
        "window and global": causal & (window | GlobalMask(options.globals)),
    }
    masks = {name: mask.bind(length, block_size=block) for name, mask in lazy.items()}
    masks["random 10 %"] = BlockMask.from_block_mask(blocks, q_len=length, block_size=block)
    found = [Case(name, mask, options.heads, options.heads) for name, mask in masks.items()]
    # A quarter of the length: the backward keeps dS of whole groups, 137 GB for 8 query heads at 131,072 tokens.
    short = causal.bind(length // 4, block_size=block)
    found.append(Case("causal, 4 of 32 heads", short, 2 * options.heads, max(1, options.heads // 4)))
    return [case for case in found if options.only in case.name]


def functions(mask: BlockMask, implementation: Any) -> dict[str, Callable[..., Any]]:
    """The forward, and output and gradients of a cotangent; the mask is a constant of the program."""

    def forward(query, key, value):
        return sparse_attention(query, key, value, mask=mask, implementation=implementation)

    def both(query, key, value, dout):
        out, pullback = jax.vjp(forward, query, key, value)
        return out, *pullback(dout)

    return {"forward": jax.jit(forward), "both": jax.jit(both)}


def collective_bytes(program: str) -> int:
    """Bytes that a device receives by the collectives of a compiled program, from the shapes of their results."""
    sizes = {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "s32": 4, "u32": 4}
    total = 0
    for result, name in re.findall(r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(", program):
        shapes = [(dtype, dims) for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result) if dtype in sizes]
        counts = [sizes[dtype] * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in shapes]
        if name == "all-gather":  # a device has its own part already
            total += max(counts) - max(counts) // jax.device_count()
        else:
            total += max(counts)
    return total


@jax.jit
def compare(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest difference, and whether all are equal."""
    return jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max(), (a == b).all()


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        result = function()
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - start) / repeats


def peak_bytes(compiled: Any) -> int:
    """Bytes of a device that a program needs: arguments, results, temporaries, constants."""
    found = compiled.memory_analysis()
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    return sum(sizes) + found.generated_code_size_in_bytes - found.alias_size_in_bytes


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    devices = jax.devices()
    mesh = jax.make_mesh((len(devices),), ("sequence",), axis_types=(AxisType.Auto,))
    split, alone = NamedSharding(mesh, P(None, "sequence")), devices[0]
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = case.heads, case.kv_heads, case.kv_heads, case.heads
    shapes = [(options.batch, case.mask.q_len, n, options.head_dim) for n in sizes]
    arrays = [jax.random.normal(k, s, options.dtype) for k, s in zip(keys, shapes, strict=True)]
    start = time.perf_counter()
    plan = context.plan(case.mask, len(devices), exchange_cost=16 * case.kv_heads / case.heads)
    planned = time.perf_counter() - start
    layouts = {"contiguous": (case.mask, lambda x: x, lambda x: x), "plan": (plan.mask, plan.dispatch, plan.undispatch)}
    operands = {name: jax.device_put([order(x) for x in arrays], split) for name, (_, order, _) in layouts.items()}
    arrays = jax.device_put(arrays, alone)
    whole = functions(case.mask, options.implementation)
    compiled = {("one", n): f.lower(*arrays[: 3 if n == "forward" else 4]).compile() for n, f in whole.items()}
    for layout, (mask, _, _) in layouts.items():
        for name, function in functions(mask, options.implementation).items():
            count = 3 if name == "forward" else 4
            compiled[layout, name] = function.lower(*operands[layout][:count]).compile()
    result: dict[str, Any] = {
        "case": case.name,
        "shape": [options.batch, case.heads, case.kv_heads, case.mask.q_len, options.head_dim],
        "density": float(case.mask.density),
        "plan_seconds": planned,
        "chunk": plan.chunk,
    }
    # ---- right, before it is fast
    want = compiled["one", "both"](*arrays)
    for layout, (_, _, undo) in layouts.items():
        first, second = (compiled[layout, "both"](*operands[layout]) for _ in range(2))
        pairs = [compare(undo(jax.device_put(a, alone)), b) for a, b in zip(first, want, strict=True)]
        result[layout] = {
            "largest_differences": {n: float(difference) for n, (difference, _) in zip(NAMES, pairs, strict=True)},
            "bit_equal_to_one": {n: bool(same) for n, (_, same) in zip(NAMES, pairs, strict=True)},
            "repeats": all(bool(compare(a, b)[1]) for a, b in zip(first, second, strict=True)),
        }
        del first, second
    # ---- in turn
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for (layout, name), program in compiled.items():
        given = (arrays if layout == "one" else operands[layout])[: 3 if name == "forward" else 4]
        calls[layout, name] = lambda program=program, given=given: program(*given)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(options.rounds):
        for key, call in calls.items():
            jax.block_until_ready(call())
            enough = math.ceil(options.milliseconds / milliseconds(call, 1))
            times[key].append(milliseconds(call, max(options.repeats, enough)))
    found = {key: statistics.median(values) for key, values in times.items()}
    result["one"] = {"forward_ms": found["one", "forward"], "both_ms": found["one", "both"]}
    result["one"]["peak_bytes"] = peak_bytes(compiled["one", "both"])
    for layout, (mask, _, _) in layouts.items():
        described = context.describe(
            mask,
            len(devices),
            kv_heads=case.kv_heads,
            head_dim=options.head_dim,
            batch=options.batch,
            dtype=options.dtype,
        )
        result[layout] |= {
            "forward_ms": found[layout, "forward"],
            "both_ms": found[layout, "both"],
            "forward_efficiency": found["one", "forward"] / len(devices) / found[layout, "forward"],
            "both_efficiency": found["one", "both"] / len(devices) / found[layout, "both"],
            "peak_bytes": peak_bytes(compiled[layout, "both"]),
            "balance": described.balance,
            "received_bytes": described.received.tolist(),
            "collective_bytes": collective_bytes(compiled[layout, "forward"].as_text()),
        }
    return result


def report(result: dict[str, Any]) -> str:
    one = result["one"]
    lines = [f"{result['case']} {result['shape']}: {one['forward_ms']:.2f} / {one['both_ms']:.2f} ms on one device"]
    for layout in ("contiguous", "plan"):
        found = result[layout]
        equal = [name for name, same in found["bit_equal_to_one"].items() if same]
        lines.append(
            f"  {layout}: {found['forward_ms']:.2f} / {found['both_ms']:.2f} ms, efficiency "
            f"{found['forward_efficiency']:.3f} / {found['both_efficiency']:.3f}, balance {found['balance']:.3f}, "
            f"{max(found['received_bytes']) / 1e6:.0f} MB predicted, {found['collective_bytes'] / 1e6:.0f} MB in the "
            f"program, peak {found['peak_bytes'] / one['peak_bytes']:.2f} of one's, bits of one device: "
            f"{', '.join(equal) or 'none'}, repeats {'equal' if found['repeats'] else 'DIFFER'}"
        )
    goal = GOALS.get(result["case"])
    if goal:
        best = [max(result[x][f"{n}_efficiency"] for x in ("contiguous", "plan")) for n in ("both", "forward")]
        words = [
            f"{name} {value:.3f} of {least}: {'met' if value >= least else 'missed'}"
            for name, value, least in zip(("both", "forward"), best, goal, strict=True)
            if least is not None
        ]
        lines.append(f"  goals: {'; '.join(words)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--globals", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--repeats", type=int, default=5, help="calls per block, at least")
    parser.add_argument("--milliseconds", type=float, default=100, help="time of a block, at least")
    parser.add_argument("--rounds", type=int, default=3, help="blocks of each program, in turn; the median counts")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    results = []
    for case in tqdm(cases(options), desc="cases", disable=None):
        results.append(measure(case, options))
        print(report(results[-1]), flush=True)
    if options.output:
        facts = {"devices": [str(d.device_kind) for d in jax.devices()], "versions": versions()}
        options.output.write_text(json.dumps({**facts, "cases": results}, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
