"""Attention over packed causal documents: the mask made in the call, prebuilt, and FlexAttention beside both.

`python benchmarks/packed.py` packs documents of log-uniform lengths (64 to 8,192 tokens) into 32,768 tokens, 32 heads
of 128, bfloat16, and measures forward, and forward with gradients, of

- `packed_attention`, whose numbers of tokens are traced: the lists are made in each call;
- `sparse_attention` with the same lists as an argument, also with their key-major order;
- the building of these lists alone, from the numbers and from segment ids;
- FlexAttention with a block mask of the same documents, made beforehand, where PyTorch and a GPU are there.

`--quick` runs small sizes in float32, to see that everything runs. The exit status is 1 where a result is wrong.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_bsk
from jax_bsk.core import compat
from jax_bsk.masks import CausalMask, PackedMask, SegmentMask
from jax_bsk.qa.benchmarking import report, suite, timing
from jax_bsk.qa.benchmarking.contender import Refused, first_line, need
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.progress import Progress
from jax_bsk.qa.support.table import table

RESULTS = Path(__file__).parent / "results"
SIZES = {"tokens": 32_768, "heads": 32, "kv_heads": 32, "head_dim": 128, "least": 64, "most": 8192, "block": 128}
QUICK_SIZES = {"tokens": 768, "heads": 2, "kv_heads": 1, "head_dim": 32, "least": 16, "most": 256, "block": 64}
SEQUENCES = 256  # room in the numbers of tokens
PREBUILT, FLEX = 0.92, 1.15  # speed over prebuilt lists, and over FlexAttention, that an H200 is to have

Inputs = dict[str, Any]
Function = Callable[[Inputs], Any]


def documents(sizes: Mapping[str, int], seed: int) -> np.ndarray:
    """Where documents of log-uniform lengths begin: int32 [SEQUENCES + 1]; the last one is cut to fill the tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < sizes["tokens"]:
        drawn = int(np.exp(rng.uniform(np.log(sizes["least"]), np.log(sizes["most"]))))
        lengths.append(min(drawn, sizes["tokens"] - sum(lengths)))
    return jax_bsk.packing.cu_seqlens(lengths, SEQUENCES)


def inputs(sizes: Mapping[str, int], dtype: str, seed: int) -> Inputs:
    """query, key, value, the cotangent of the output, and the documents as numbers and as ids."""
    keys = jax.random.split(jax.random.key(seed), 4)
    tokens, dim = sizes["tokens"], sizes["head_dim"]
    made = {
        name: jax.random.normal(key, (tokens, sizes[heads], dim), dtype)
        for name, heads, key in zip("qkvd", ("heads", "kv_heads", "kv_heads", "heads"), keys, strict=True)
    }
    numbers = jnp.asarray(documents(sizes, seed))
    return {**made, "numbers": numbers, "ids": jax_bsk.packing.segment_ids(numbers, tokens)}


def pairs(numbers: np.ndarray) -> int:
    """Pairs that attend."""
    lengths = np.diff(numbers).astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum())


def masks(sizes: Mapping[str, int]) -> dict[str, Callable[[Inputs], Any]]:
    """The lists of the documents, by what they are made from."""
    tokens, block, most = (sizes[name] for name in ("tokens", "block", "most"))
    return {
        "numbers": lambda x: PackedMask(x["numbers"], within=CausalMask(), max_seqlen_q=most).bind(
            tokens, block_size=block
        ),
        "ids": lambda x: (CausalMask() & SegmentMask(x["ids"], contiguous=True)).bind(tokens, block_size=block),
    }


def attentions(sizes: Mapping[str, int], implementation: Any) -> dict[str, Function]:
    """What computes attention, of the inputs."""

    def in_call(x: Inputs) -> jax.Array:
        return jax_bsk.packed_attention(
            *(x["q"], x["k"], x["v"], x["numbers"]),
            is_causal=True,
            max_seqlen_q=sizes["most"],
            block_size=sizes["block"],
            implementation=implementation,
        )

    def prebuilt(x: Inputs, lists: str) -> jax.Array:
        return jax_bsk.sparse_attention(x["q"], x["k"], x["v"], mask=x[lists], implementation=implementation)

    return {
        "packed_attention": in_call,
        "prebuilt": functools.partial(prebuilt, lists="lists"),
        "prebuilt, both orders": functools.partial(prebuilt, lists="both"),
    }


def training(function: Function) -> Function:
    """Output and gradients of query, key and value."""

    def run(x: Inputs) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: function({**x, "q": q, "k": k, "v": v}), x["q"], x["k"], x["v"])
        return out, vjp(x["d"])

    return run


def check(sizes: Mapping[str, int], seed: int) -> dict[str, float]:
    """Largest difference from plain JAX with a dense mask, over the largest number, of a short call in float32."""
    small = {**sizes, "tokens": min(1024, sizes["tokens"]), "most": min(512, sizes["most"])}
    x = inputs(small, "float32", seed + 1)
    x["lists"] = jax.jit(masks(small)["numbers"])(x)
    x["both"] = jax.jit(lambda x: masks(small)["ids"](x).transpose())(x)
    allowed = (x["ids"][:, None] == x["ids"][None]) & jnp.tri(small["tokens"], dtype=bool)

    def dense(x: Inputs) -> jax.Array:
        return jax.nn.dot_product_attention(x["q"], x["k"], x["v"], mask=allowed[None, None], implementation="xla")

    found = {}
    with jax.default_matmul_precision("highest"):
        want = jax.jit(training(dense))(x)
        for name, function in attentions(small, None).items():
            got = jax.jit(training(function))(x)
            errors = jax.tree.map(lambda a, b: jnp.abs(a - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-30), got, want)
            found[name] = max(float(error) for error in jax.tree.leaves(errors))
    return found


class Wait:
    """What `jax.block_until_ready` waits for: the work that PyTorch has queued."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def block_until_ready(self) -> Wait:
        self._torch.cuda.synchronize()
        return self


def flex(sizes: Mapping[str, int], x: Inputs) -> dict[str, Callable[[int], Any]]:
    """FlexAttention's forward, and with gradients, on the same documents; their results are compared with ours.

    Raises:
      Refused: PyTorch is not there, or sees no GPU, or its result is another.
    """
    torch = need("torch")
    if not torch.cuda.is_available():
        raise Refused("PyTorch sees no GPU")
    flexible = need("torch.nn.attention.flex_attention")
    tokens = sizes["tokens"]

    def tensor(array: jax.Array) -> Any:
        # [tokens, heads, head size] in float32 through the host, as NumPy has no bfloat16.
        whole = torch.from_numpy(np.array(array.astype(jnp.float32))).to("cuda", torch.bfloat16)
        return whole.transpose(0, 1)[None].contiguous()

    q, k, v, d = (tensor(x[name]) for name in "qkvd")
    ids = torch.from_numpy(np.array(x["ids"])).cuda()

    def attends(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx >= kv_idx) & (ids[q_idx] == ids[kv_idx])

    mask = flexible.create_block_mask(attends, None, None, tokens, tokens, device="cuda", _compile=True)
    compiled = torch.compile(flexible.flex_attention, dynamic=False)
    grouped = sizes["heads"] != sizes["kv_heads"]

    def forward(number: int) -> Any:
        with torch.no_grad():
            compiled(q, k, v, block_mask=mask, enable_gqa=grouped)
        return Wait(torch)

    leaves = [t.clone().requires_grad_() for t in (q, k, v)]

    def both(number: int) -> Any:
        out = compiled(*leaves, block_mask=mask, enable_gqa=grouped)
        torch.autograd.grad(out, leaves, d)
        return Wait(torch)

    with torch.no_grad():
        out = compiled(q, k, v, block_mask=mask, enable_gqa=grouped)[0].transpose(0, 1).float().cpu().numpy()
    ours = np.asarray(jax.jit(attentions(sizes, None)["packed_attention"])(x).astype(jnp.float32))
    if not np.abs(out - ours).max() <= 0.05:
        raise Refused(f"its result differs from ours by {np.abs(out - ours).max():.2g}")
    both(0)
    return {"FlexAttention: forward": forward, "FlexAttention: training": both}


def contenders(sizes: Mapping[str, int]) -> dict[str, Function]:
    """Everything of JAX that is timed, by name."""
    named: dict[str, Function] = {}
    for name, make in masks(sizes).items():
        named[f"lists from {name}"] = lambda x, make=make: jax.tree.leaves(make(x))
    named["lists from numbers, both orders"] = lambda x: jax.tree.leaves(masks(sizes)["numbers"](x).transpose())
    for name, function in attentions(sizes, None).items():
        named[f"{name}: forward"] = function
        named[f"{name}: training"] = training(function)
    return named


def measure(
    sizes: Mapping[str, int], dtype: str, rounds: int, seed: int, quiet: bool, peers: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Seconds of each contender, and why a peer has none."""
    x = inputs(sizes, dtype, seed)
    x["lists"] = jax.jit(masks(sizes)["numbers"])(x)
    x["both"] = jax.jit(lambda x: masks(sizes)["numbers"](x).transpose())(x)
    on_gpu = compat.default_platform() == "cuda"
    calls: dict[str, Callable[[int], Any]] = {}
    refused: dict[str, str] = {}
    named = contenders(sizes)
    with Progress(len(named) + 1 + rounds, quiet) as progress:
        for name, function in named.items():
            progress.step(name)
            compiled = jax.jit(function)
            jax.block_until_ready(compiled(x))
            calls[name] = lambda number, compiled=compiled: compiled(x)
        progress.step("FlexAttention")
        try:
            if not (on_gpu and peers):
                raise Refused("it is measured on an NVIDIA GPU only" if peers else "it was left out")
            calls |= flex(sizes, x)
        except Refused as reason:
            refused["FlexAttention"] = str(reason)
        except Exception as error:  # whatever a compiler raises: ours is measured all the same
            refused["FlexAttention"] = first_line(error)
        timings = timing.interleaved(
            calls, rounds, queued=on_gpu, on_round=lambda number: progress.step(f"round {number + 1}")
        )
    return {name: found.to_json() for name, found in timings.items()}, refused


def ratios(times: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """What the goals are about, and its neighbours."""
    seconds = {name: record["seconds"] for name, record in times.items()}
    found = {"lists: share of the forward": seconds["lists from numbers"] / seconds["prebuilt: forward"]}
    for which in ("forward", "training"):
        ours = seconds[f"packed_attention: {which}"]
        prebuilt = "prebuilt" if which == "forward" else "prebuilt, both orders"
        found[f"speed over prebuilt lists, {which}"] = seconds[f"{prebuilt}: {which}"] / ours
        if f"FlexAttention: {which}" in seconds:
            found[f"speed over FlexAttention, {which}"] = seconds[f"FlexAttention: {which}"] / ours
    return found


def goals(found: Mapping[str, float], device: str) -> dict[str, str]:
    """Verdicts, on an H200."""
    if "H200" not in device:
        return {}
    verdicts = {}
    for name, ratio in found.items():
        if name.startswith("speed over"):
            least = FLEX if "Flex" in name else PREBUILT
            verdicts[f"{name} >= {least}"] = "met" if ratio >= least else "missed"
    return verdicts


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/packed.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--no-peers", action="store_true", help="measure jax_bsk alone")
    parser.add_argument("--seed", type=int, default=0, help="of documents and inputs, default 0")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: into results/ after a run on a GPU")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    args = parser.parse_args(argv)
    suite.share_the_gpu()
    on_gpu = compat.default_platform() == "cuda"
    sizes, dtype = (QUICK_SIZES, "float32") if args.quick else (SIZES, "bfloat16")
    numbers = documents(sizes, args.seed)
    lengths = np.diff(numbers)

    errors = check(sizes, args.seed)
    wrong = {name: error for name, error in errors.items() if not error <= 2e-4}
    rounds = suite.QUICK_ROUNDS if args.quick else suite.ROUNDS
    times, refused = measure(sizes, dtype, rounds, args.seed, args.quiet, not args.no_peers)
    found = ratios(times)
    device = environment.devices()[0]["name"]
    flops = 4.0 * pairs(numbers) * sizes["heads"] * sizes["head_dim"]
    result = {
        "benchmark": "packed",
        "versions": environment.versions(),
        "devices": environment.devices(),
        "sizes": {**sizes, "dtype": dtype, "seed": args.seed},
        "documents": lengths[lengths > 0].tolist(),
        "useful_forward_flops": flops,
        "largest_error_of_a_short_call_float32": errors,
        "contenders": times,
        "refused": refused,
        "ratios": found,
        "goals": goals(found, device),
    }
    print(f"{(lengths > 0).sum()} documents of {lengths[lengths > 0].min()} to {lengths.max()} tokens")
    rows = []
    for name, record in times.items():
        rate = f"{flops / record['seconds'] / 1e12:.3g}" if name.endswith("forward") else ""
        rows.append((name, f"{record['seconds'] * 1e6:.1f}", rate))
    print(table(("", "us", "useful TFLOP/s"), rows))
    print(table(("", "ratio"), [(name, f"{ratio:.3f}") for name, ratio in found.items()]))
    for name, reason in refused.items():
        print(f"{name}: {reason}")
    for goal, verdict in goals(found, device).items():
        print(f"{verdict}: {goal}")
    for name, error in wrong.items():
        print(f"wrong: {name} differs from plain JAX by {error:.1e} of its largest number")
    output = args.output
    if output is None and on_gpu and not args.quick:
        output = suite.results_path(RESULTS, "packed")
    if output is not None:
        report.write(result, output)
        print(f"Wrote {output}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
