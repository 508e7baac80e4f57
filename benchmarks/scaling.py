r"""Measures how attention, decoding and a training step scale over the devices of one host, beside one of them.

    python benchmarks/scaling.py                       # all parts, all devices; results/scaling-DEVICE-xN.json
    python benchmarks/scaling.py --simulate            # needs no GPU: results/scaling-simulated.json

| part | what |
|---|---|
| attention | forward, and forward and backward, of five masks at 131,072 tokens: one sequence of 8 heads per device |
| decode | one query over a cache of 1,048,576 positions that is split over the devices |
| step | a training step of a transformer of 109 M parameters (that of `training_step.py`) on as many sequences |

Attention and the step are split over the sequence (in contiguous parts or in the order of a plan, whichever
`jax_bsk.context.describe` says is better balanced), over data, over heads, and over data x sequence where there are
four devices or more. The problem is the same on one device and on all, and efficiency is t1 / (n tn); where one device
has no room for it, it runs an n-th of the batch or of the heads and efficiency is t1 / tn. The row says which.

Everything is checked before it is timed. Over data and heads outputs and gradients must have the bits of one device and
the program no collective; over the sequence they must be as near as roundings allow; some rows of one device's output
are compared with float64; repeated calls must have the same bits. Exit status 1 where something is wrong.

Results are written after each case, and rows that the file has of other cases stay, so that parts can be measured one
by one. `--seconds` starts no case after so many. This shows without a GPU that everything runs:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 python benchmarks/scaling.py --quick --output scaling.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from parallel import attention, cases, decoding, layouts, model

from jax_bsk.core import compat
from jax_bsk.qa.benchmarking import report, suite
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.table import table

RESULTS = Path(__file__).parent / "results"
PARTS = ("attention", "decode", "step")
# Of a step the masks of trained models come first; causal attention over 131,072 tokens takes longest.
STEP_ORDER = ("window", "documents", "window and global", "random 10 %", "causal")
# Least efficiency on four and on eight H200s, forward and backward together.
GOALS = {
    "data": (0.98, 0.98),
    "heads": (0.98, 0.98),
    "causal": (0.94, 0.90),
    "documents": (0.85, 0.80),
    "window": (0.85, 0.80),
}
LONG_GOALS = {"causal": (0.97, 0.95)}  # at 1,048,576 tokens
SIMULATED = (2, 4, 8, 64, 512), (131072, 1 << 20)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--masks", nargs="+", choices=cases.MASKS, default=list(cases.DEFAULT_MASKS))
    parser.add_argument("--splits", nargs="+", choices=layouts.SPLITS, help="default: all that so many devices have")
    parser.add_argument("--lengths", nargs="+", type=int, help="of attention; the first is that of the step, too")
    parser.add_argument("--devices", type=suite.positive, help="default: all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    for name in ("batch", "heads", "long-heads", "layers", "cache"):
        parser.add_argument(f"--{name}", type=suite.positive, help="see benchmarks/parallel/cases.py")
    parser.add_argument("--memory", type=float, metavar="GB", help="of a device; default: what it says")
    parser.add_argument("--implementation", choices=["cpu", "cuda", "xla"], help="default: the platform's own")
    parser.add_argument("--rounds", type=suite.positive, help="samples of each time, in turn")
    parser.add_argument("--milliseconds", type=float, help="time of a sample, at least")
    parser.add_argument("--repeats", type=suite.positive, help="calls whose bits are compared with the first's")
    parser.add_argument("--compile-threads", type=suite.positive, help="programs compiled at a time; default: cores")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--simulate", action="store_true", help="predict 2 to 512 shards from the results of two")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: into results/ after a run on GPUs")
    return parser.parse_args(argv)


def sizes_of(args: argparse.Namespace) -> cases.Sizes:
    sizes = cases.QUICK if args.quick else cases.Sizes()
    given = {
        name: getattr(args, name) for name in ("batch", "heads", "long_heads", "layers", "cache", "implementation")
    }
    given["lengths"] = tuple(args.lengths) if args.lengths else None
    given["memory"] = None if args.memory is None else 1e9 * args.memory
    return dataclasses.replace(sizes, **{name: value for name, value in given.items() if value is not None})


def effort_of(args: argparse.Namespace) -> cases.Effort:
    effort = cases.Effort(rounds=1, milliseconds=0.0, repeats=2) if args.quick else cases.Effort()
    given = {name: getattr(args, name) for name in ("rounds", "milliseconds", "repeats", "compile_threads")}
    return dataclasses.replace(effort, **{name: value for name, value in given.items() if value is not None})


def plan(
    args: argparse.Namespace, devices: Sequence[Any], sizes: cases.Sizes, effort: cases.Effort
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """What is to be measured, the most important first: names, and what makes the rows."""
    batch, asked = sizes.batch or len(devices), args.splits or layouts.DEFAULT_SPLITS[: 4 if len(devices) > 3 else 3]
    if "attention" in args.parts:
        for length in sizes.lengths:
            long = length > sizes.lengths[0]
            splits = [name for name in asked if not long or name not in ("data", "heads", "data x sequence")]
            for name in args.masks if splits else []:
                shape = (1, sizes.long_heads) if long else (batch, sizes.heads)
                yield (
                    f"attention, {name}, {length:,}",
                    lambda name=name, length=length, shape=shape, splits=splits: attention.measure(
                        cases.case(name, length, *shape, sizes), splits, devices, sizes, effort
                    ),
                )
    if "decode" in args.parts:
        yield f"decode, {sizes.cache:,}", lambda: decoding.measure(devices, sizes, effort)
    if "step" in args.parts:
        from parallel import step  # Flax and Optax, which the other parts do without

        for name in sorted(set(args.masks) & set(STEP_ORDER), key=STEP_ORDER.index):
            yield (
                f"step, {name}, {sizes.lengths[0]:,}",
                lambda name=name: step.measure(
                    cases.case(name, sizes.lengths[0], batch, sizes.heads, sizes), asked, devices, sizes, effort
                ),
            )


def measure(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")  # of a GPU, before JAX takes its share
    devices = jax.devices()[: args.devices]
    if len(devices) < 2 or len(devices) < (args.devices or 2):
        print(f"needs two devices or more, and as many as are asked for; there are {len(devices)}", file=sys.stderr)
        return 2
    sizes, effort = sizes_of(args), effort_of(args)
    output = args.output
    if output is None and compat.default_platform() == "cuda" and not args.quick:
        path = suite.results_path(RESULTS, "scaling")
        output = path.with_name(f"{path.stem}-x{len(devices)}.json")
    result: dict[str, Any] = {
        "benchmark": "scaling",
        "versions": environment.versions(),
        "devices": [str(device.device_kind) for device in devices],
        "sizes": json.loads(json.dumps(dataclasses.asdict(sizes))),
        "effort": dataclasses.asdict(effort),
        "nccl_nvls_enable": os.environ.get("NCCL_NVLS_ENABLE"),  # 0: no multicast over NVLink
    }
    rows = _rows_of(output, result)
    wrong: list[str] = []
    for name, make in plan(args, devices, sizes, effort):
        begun = time.perf_counter()
        if begun - started > args.seconds:
            print(f"{name}: not started, {args.seconds:g} seconds are over", flush=True)
            continue
        try:
            new = make()
        except (RuntimeError, ValueError) as problem:  # no memory, say: the other cases are measured still
            print(f"{name}: FAILED, {str(problem).splitlines()[0][:300]}", flush=True)
            wrong.append(name)
            continue
        spent = ", ".join(f"{key} {value:g}" for key, value in new[0]["spent_seconds"].items())
        print(f"{name}: {time.perf_counter() - begun:.1f} s ({spent})", flush=True)
        for row in new:
            print(f"  {line(row)}", flush=True)
            wrong += [] if row["ok"] else [f"{name}, {row['split']}"]
            rows[_key(row)] = row
        if output is not None:
            report.write(result | {"ok": all(row["ok"] for row in rows.values()), "rows": list(rows.values())}, output)
    if output is not None and rows:
        print(f"Wrote {output}")
    for goal in goals(list(rows.values())) if "H200" in devices[0].device_kind else []:
        print(goal)
    if wrong:
        print(f"WRONG: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["part"], row.get("mask"), tuple(row["shape"]), row["split"]


def _rows_of(output: Path | None, result: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The rows that an earlier run of these devices and versions wrote."""
    if output is None or not output.exists():
        return {}
    found = json.loads(output.read_text())
    if any(found.get(key) != result[key] for key in ("benchmark", "versions", "devices")):
        return {}
    return {_key(row): row for row in found["rows"]}


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    if "refused" in row:
        return f"{row['split']}: {row['refused']}"
    if row["part"] == "decode":
        one = row["one"]
        return (
            f"{1e6 * one['seconds']:.0f} us on one, {1e6 * row['seconds']:.0f} us on {row['devices']}, efficiency "
            f"{row['efficiency']:.3f}, {row['bytes_per_second'] / 1e12:.2f} TB/s per device, "
            f"{row['share_of_copy']:.3f} of a copy's rate, {row['program_bytes'] / 1e3:.1f} kB received; "
            f"{_verdict(row)}"
        )
    names = ["step"] if row["part"] == "step" else ["forward", "both"]
    names = [name for name in names if f"{name}_ms" in row]
    one = row["one"] or {}
    order = f" ({row['order']})" if row.get("order", row["split"]) != row["split"] else ""
    cells = [f"{row['split']}{order}:"]
    for key, digits, unit in (("ms", 2, " ms"), ("efficiency", 3, "")):
        values = [f"{row[f'{name}_{key}']:.{digits}f}" for name in names if f"{name}_{key}" in row]
        cells.append(f"{' / '.join(values) or '-'}{unit}")
    alone = " / ".join(f"{one[f'{name}_ms']:.2f}" for name in names if f"{name}_ms" in one)
    cells.append(f"beside {alone} ms of {one.get('what')} on one" if alone else "beside nothing")
    if "balance" in row:
        cells.append(f"balance {row['balance']:.3f}, {row['predicted_bytes'] / 1e6:.1f} MB predicted")
    sent = [f"{row[f'{name}_program_bytes'] / 1e6:.1f}" for name in names]
    cells.append(f"{' / '.join(sent)} MB in the program")
    cells.append(f"peak {row['peak_bytes'] / 1e9:.2f} GB")
    return ", ".join(cells).replace(":,", ":") + f"; {_verdict(row)}"


def _verdict(row: dict[str, Any]) -> str:
    equal = [name for name, same in row.get("bit_equal", {}).items() if same]
    bits = f"bits of one device: {', '.join(equal) or 'none'}; " if "bit_equal" in row else ""
    again = row["repeats"]
    repeats = "equal" if again["equal"] else f"DIFFER{' in ' * bool(again.get('different'))}{_few(again)}"
    return f"{bits}{again['count']} repeats {repeats}; {'ok' if row['ok'] else 'WRONG'}"


def _few(repeats: dict[str, Any]) -> str:
    """Names of the first results that differed, where a row has them, and how many there were."""
    names = repeats.get("different", [])
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def goals(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Which goals of four and eight H200s are met."""
    found = []
    for row in rows:
        if row["part"] != "attention" or "both_efficiency" not in row or row["devices"] not in (4, 8):
            continue
        by_mask = LONG_GOALS if row["shape"][3] == 1 << 20 else GOALS
        goal = by_mask.get(row["split"] if row["split"] in ("data", "heads") else row["mask"])
        if goal is not None:
            least, value = goal[row["devices"] == 8], row["both_efficiency"]
            verdict = "met" if value >= least else "missed"
            found.append(f"{row['mask']} over {row['split']}: efficiency {value:.3f} of {least}: {verdict}")
    return found


def simulate(args: argparse.Namespace) -> int:
    """Writes and prints the table of simulated shards."""
    results = json.loads((RESULTS / "context-nvidia-h200-x2.json").read_text())
    copy_rate = json.loads((RESULTS / "decode-nvidia-h200.json").read_text())["copy_bytes_per_second"]
    path = RESULTS / "scaling-nvidia-h200-x2.json"
    again = json.loads(path.read_text()) if path.exists() else None
    counts, lengths = SIMULATED
    found = model.table(results, copy_rate, tuple(args.lengths or lengths), counts, masks=args.masks, again=again)
    output = args.output or RESULTS / "scaling-simulated.json"
    report.write(found, output)
    for key, what in (
        ("errors", "on two GPUs"),
        ("errors_again", f"on the rows of {path.name}, to which it is not fitted"),
    ):
        if key in found["model"]:
            error = found["model"][key]
            print(f"error {what}: {error['median']:.1%} in the median, {error['largest']:.1%} at most")
    names = ("mask", "tokens", "shards", "order", "balance", "MB received", "forward ms", "both ms", "efficiency")
    cells = [
        [
            row["mask"],
            f"{row['length']:,}",
            str(row["shards"]),
            row["order"],
            f"{row['balance']:.3f}",
            f"{row['received_bytes'] / 1e6:.1f}",
            f"{row['forward_ms']:.3f}",
            f"{row['both_ms']:.3f}",
            f"{row['forward_efficiency']:.2f} / {row['both_efficiency']:.2f}",
        ]
        for row in found["rows"]
    ]
    print(table(names, cells))
    print(f"Wrote {output}")
    return 0


def main(argv: Sequence[str]) -> int:
    """Measures or simulates; the exit status."""
    args = parse(argv)
    return simulate(args) if args.simulate else measure(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
