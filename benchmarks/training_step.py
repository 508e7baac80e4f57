"""Compares a whole training step with `sparse_attention` and the same step with cuDNN: time, memory and loss.

In `python benchmarks/training_step.py` a decoder transformer of Flax NNX with 123 M parameters takes steps of
forward, backward and AdamW on one sequence of 16,384 tokens: packed documents, causal, a window of 1,024 tokens and the
first 128 tokens of the sequence. The contenders start from equal parameters and see equal tokens:

    jax_bsk             the mask as a BlockMask, built once on the host
    cudnn-mask          jax.nn.dot_product_attention(implementation="cudnn") with the dense boolean mask
    cudnn-causal-mask   the same, told is_causal as well, so that it may skip the upper half
    cudnn-causal        is_causal alone, cuDNN's fastest: attends across documents and beyond the window

On a CPU XLA takes cuDNN's place; `--length 512 --layers 2 --width 64 --heads 2 --vocabulary 256 --steps 2` shows that
everything runs. Each contender is measured in a process of its own, because the peak of memory is that of a process.

The exit status is 1 where jax_bsk has no result, or its losses differ from another contender's with the same mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Of the processes that measure: memory taken in advance would hide what is needed.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"

from training.attentions import ATTENTIONS, ON_CPU, ON_GPU
from training.config import Config

from jax_bsk.qa.support.table import table

RESULTS = Path(__file__).parent / "results"
# How far losses may be apart, relatively: another kernel rounds otherwise, and steps carry that on. Measured with the
# small sizes above: 2e-5 in bfloat16 between two kernels of one mask, 4e-3 between that mask and the causal one.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-3}
SIZES = ("length", "batch", "layers", "width", "heads", "vocabulary", "steps", "seed")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/training_step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, default=getattr(Config, name), help="default %(default)s")
    parser.add_argument("--dtype", choices=TOLERANCE, default=Config.dtype, help="of the computation")
    parser.add_argument("--remat", action="store_true", help="compute each layer again in the backward")
    parser.add_argument(
        "--implementation", choices=ATTENTIONS, nargs="+", metavar="NAME", help=f"of {', '.join(ATTENTIONS)}"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="default: into results/ after a run of the defaults on a GPU"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds a contender, default %(default)s")
    parser.add_argument("--in-this-process", type=Path, metavar="FILE.json", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.length % min(args.length, Config.loss_chunk):
        parser.error(f"--length beyond {Config.loss_chunk} must be a multiple of it")
    if args.width % args.heads:
        parser.error("--width must be a multiple of --heads")
    return args


def config_of(args: argparse.Namespace) -> Config:
    """The sizes of a run; documents, window and global tokens shrink with a sequence that is short for them."""
    given = {name: getattr(args, name) for name in (*SIZES, "dtype", "remat")}
    most = max(1, args.length // 16)
    return Config(
        **given,
        document_length=min(Config.document_length, max(1, args.length // 4)),
        window=min(Config.window, most),
        global_tokens=min(Config.global_tokens, most),
    )


def main(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    args = parse(argv)
    config = config_of(args)
    if args.in_this_process is not None:
        from training.run import run

        (name,) = args.implementation
        args.in_this_process.write_text(json.dumps(run(name, config)))
        return 0

    platform = _platform()
    names = args.implementation or (ON_GPU if platform == "gpu" else ON_CPU)
    records = {name: _measure(name, argv, args.timeout) for name in names}
    mask = config.mask().bind(config.length, block_size=config.block_size)
    done = [record for record in records.values() if "failed" not in record]
    common = {key: done[0].pop(key) for key in ("versions", "devices", "parameters")} if done else {}
    for record in done:
        for key in common:
            record.pop(key, None)
    report: dict[str, Any] = {
        "benchmark": "training step",
        **common,
        "config": dataclasses.asdict(config),
        "element_density": mask.element_density,
        "block_density": mask.density,
        "tolerance": TOLERANCE[config.dtype],
        "contenders": records,
    }
    _compare(report)
    print(_render(report))
    output = args.output
    if output is None and platform == "gpu" and common and config == config_of(parse([])) and not args.implementation:
        device = re.sub(r"[^a-z0-9]+", "-", common["devices"][0]["name"].lower()).strip("-")
        output = RESULTS / f"training-step-{device}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"Wrote {output}")
    wrong = any(not record.get("agrees", True) for record in records.values())
    return 1 if wrong or "failed" in records.get("jax_bsk", {}) else 0


def _platform() -> str:
    """Of JAX, asked in another process: this one must hold no memory of the GPU."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def _measure(name: str, argv: Sequence[str], timeout: float) -> dict[str, Any]:
    """One contender's record from a process of its own, or why there is none."""
    print(f"{name} ..", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        command = [sys.executable, __file__, *argv, "--implementation", name, "--in-this-process", str(path)]
        try:
            result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"it took more than {timeout:g} s"}
        if result.returncode == 0:
            return json.loads(path.read_text())
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|XlaRuntimeError)\b", line)]
    return {"failed": (errors or lines or [f"exit status {result.returncode}"])[-1][:300]}


def _compare(report: dict[str, Any]) -> None:
    """Adds to each contender what jax_bsk's figures are beside its own."""
    records = report["contenders"]
    mine = records.get("jax_bsk", {})
    for name, record in records.items():
        if name == "jax_bsk" or "failed" in record or "losses" not in mine:
            continue
        record["time_ratio"] = record["seconds"] / mine["seconds"]
        record["memory_ratio"] = record["peak_bytes"] / mine["peak_bytes"]
        if record["masked"]:
            pairs = zip(record["losses"], mine["losses"], strict=True)
            record["loss_difference"] = max(abs(theirs - ours) / abs(theirs) for theirs, ours in pairs)
            record["agrees"] = record["loss_difference"] <= report["tolerance"]  # NaN does not


def _render(report: dict[str, Any]) -> str:
    """The table and what is needed to read it."""
    config, records = Config(**report["config"]), report["contenders"]
    lines = []
    if "devices" in report:
        device, versions = report["devices"][0], report["versions"]
        lines.append(f"jax_bsk {versions['jax_bsk']}, jax {versions['jax']}, {device['name']}; AdamW")
        lines.append(
            f"{report['parameters'] / 1e6:.0f} M parameters in {config.layers} layers, {config.batch} x "
            f"{config.length:,} tokens, {config.dtype}{', remat' if config.remat else ''}"
        )
    lines += [f"mask: {report['element_density']:.1%} of all pairs, {report['block_density']:.1%} of the blocks", ""]
    rows = []
    for name, record in records.items():
        if "failed" in record:
            rows.append([name, *["-"] * 8])
            continue
        program = record["program_bytes"]
        rows.append(
            [
                f"{name} ({record['what']})",
                f"{record['seconds'] * 1e3:.1f}",
                f"{record['tokens_per_second']:,.0f}",
                f"{record['peak_bytes'] / 1e9:.2f}",
                f"{program['total'] / 1e9:.2f}" if program else "-",
                f"{program['temp'] / 1e9:.2f}" if program else "-",
                f"{record['losses'][-1]:.4f}",
                f"{record['time_ratio']:.2f}x" if "time_ratio" in record else "",
                f"{record['memory_ratio']:.2f}x" if "memory_ratio" in record else "",
            ]
        )
    header = ["attention", "ms/step", "tokens/s", "peak GB", "program GB", "temp GB", "last loss", "time", "memory"]
    lines += [table(header, rows), ""]
    lines.append("time, memory: the peer's / jax_bsk's; program: arguments, outputs and temporaries of the step in XLA")
    for name, record in records.items():
        if "failed" in record:
            lines.append(f"Not measured: {name}: {record['failed']}")
        elif not record["masked"]:
            lines.append(f"{name} attends to more than the mask, so it has losses of its own")
        elif "agrees" in record:
            verdict = "agree within" if record["agrees"] else "DIFFER by"
            apart = f"{record['loss_difference']:.1e} (tolerance {report['tolerance']:.0e})"
            lines.append(f"The losses of jax_bsk and {name} {verdict} {apart}")
    if records.get("jax_bsk", {}).get("ran") == "xla":
        lines.append("jax_bsk ran without its kernels: see `python -m jax_bsk info`")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
