"""Writes the figures of the README and of the pages in docs/ from the committed reports, so that no figure is made up.

    python tools/figures.py            # writes README.md and docs/**/*.md
    python tools/figures.py --check    # exit status 1 where one of them differs

The tool replaces the text between `<!-- figures: NAME -->` and `<!-- end of figures -->`. It reads
`reports/h200/report.json` (written by `python -m jax_bsk validate --full`), and `benchmarks/results/` for what the
validation tool does not measure.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_bsk.qa.benchmarking.contender import OURS
from jax_bsk.qa.benchmarking.matmul.cases import Operation
from jax_bsk.qa.benchmarking.matmul.operation import DENSE_RANDOM
from jax_bsk.qa.validation import products
from jax_bsk.qa.validation.markdown import milliseconds, share, table

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "reports" / "h200" / "report.json"
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(<!-- figures: ([a-z-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# ---- Of the report


def benchmark() -> dict[str, Any]:
    return read(REPORT)["stages"]["benchmark"]["data"]


def attention(which: str) -> str:
    """Cases of one table, shapes named once."""
    rows, last = [], ""
    for case in benchmark()["cases"]:
        if case["set"] != which or "length," in case["name"] or "seconds" not in case["jax_bsk"]:
            continue
        heads = str(case["heads"]) + (f" ({case['kv_heads']})" if case["kv_heads"] != case["heads"] else "")
        shape = f"{case['batch']}, {heads}, {case['length']}, {case['head_dim']}"
        mine = case["jax_bsk"]
        rate = f"{mine['useful_flops_per_second'] / 1e12:.0f} TFLOP/s"
        flex, cudnn = (case["peers"].get(name, {}) for name in ("flex", "cudnn"))
        cells = [milliseconds(mine["seconds"]), rate, peer(flex), peer(cudnn)]
        rows.append(["" if shape == last else shape, pattern(case), *cells])
        last = shape
    return table(["", "pattern", "jax_bsk", "", "FlexAttention (torch)", "cuDNN (`jax.nn`)"], rows)


def pattern(case: dict[str, Any]) -> str:
    label: str = case["name"].split(f"D{case['head_dim']} ")[1]
    if label.startswith("random"):
        return f"random, {share(case['density'])}"
    names = {"dense": "everything", "window 1024": "window of 1,024 tokens"}
    return names.get(label, label)


def peer(record: dict[str, Any]) -> str:
    if "ratio" not in record:
        return "-"
    mask = record["variant"].startswith("dense mask")
    digits = 2 if record["ratio"] < 10 else 0
    return f"{record['ratio']:.{digits}f}x" + (", dense mask" if mask else "")


def torch_cudnn(which: str) -> str:
    """How PyTorch's own cuDNN attention compares where there is nothing to skip."""
    found = {
        case["pattern"]: case["peers"]["sdpa-cudnn"]["ratio"]
        for case in benchmark()["cases"]
        if case["set"] == which and case["length"] == 8192 and "ratio" in case["peers"].get("sdpa-cudnn", {})
    }
    return f"{found['causal']:.2f}x on causal and {found['dense']:.2f}x on everything"


def with_torch(which: str) -> Callable[[], str]:
    return lambda: f"{attention(which)}\n\ntorch's own cuDNN attention: {torch_cudnn(which)} (8,192 tokens)."


def headline() -> str:
    """The README's short table: what is asked first, beside what people use instead."""

    def attention_row(which: str, name: str, label: str) -> list[str]:
        (case,) = (case for case in benchmark()["cases"] if case["set"] == which and case["name"] == name)
        mine, peers = case["jax_bsk"], case["peers"]
        cudnn = "cuDNN" + (" with the dense mask" if peers["cudnn"]["variant"].startswith("dense mask") else "")
        others = f"FlexAttention {peers['flex']['ratio']:.2f}x, {cudnn} {peers['cudnn']['ratio']:.2f}x"
        return [label, milliseconds(mine["seconds"]), f"{mine['useful_flops_per_second'] / 1e12:.0f} TFLOP/s", others]

    def product_row() -> list[str]:
        config = {"operation": "forward", "size": 8192, "sparsity": 0.78, "block": 128, "dtype": "bfloat16"}
        found = (
            case for case in benchmark()["matmul"]["cases"] if all(case[key] == want for key, want in config.items())
        )
        (contenders,) = (case["contenders"] for case in found)
        mine = contenders[OURS]
        rate = f"{mine['useful_flops_per_second'] / 1e12:.0f} TFLOP/s"
        dense = f"dense product (`jnp.dot`) {contenders['dense']['seconds'] / mine['seconds']:.2f}x"
        return ["product with a block-sparse matrix, 22 % stored", milliseconds(mine["seconds"]), rate, dense]

    def cpu_row() -> list[str]:
        found = read(RESULTS / "attention-cpu.json")["cases"]
        case = next(case for case in found if case["pass"] == "forward" and 0.2 < case["density"] < 0.25)
        mine = case["jax_bsk"]
        label = f"two CPU cores, float32: attention forward, {case['density'] * 100:.0f} % of the blocks"
        rate = f"{mine['useful_flops_per_second'] / 1e9:.0f} GFLOP/s"
        xla = f"XLA with the dense mask {case['peers']['xla']['ratio']:.0f}x"
        return [label, milliseconds(mine["seconds"]), rate, xla]

    step = read(RESULTS / "training-step-nvidia-h200.json")["contenders"]
    mask, causal = (step[name]["seconds"] / step[OURS]["seconds"] for name in ("cudnn-mask", "cudnn-causal"))
    shape = "B4 H32 S8192 D128"
    rows = [
        attention_row("forward", f"{shape} random .22", "attention forward, 24 % of the blocks"),
        attention_row("forward", f"{shape} causal", "attention forward, causal"),
        attention_row("backward", f"{shape} random .22", "attention backward, 24 % of the blocks"),
        product_row(),
        [
            "training step of a 123 M transformer, 5.6 % of all pairs",
            f"{step[OURS]['seconds'] * 1e3:.1f} ms",
            f"{step[OURS]['tokens_per_second'] / 1e3:.0f} k tokens/s",
            f"cuDNN with the dense mask {mask:.2f}x, plain causal cuDNN {causal:.2f}x",
        ],
        cpu_row(),
    ]
    return table(["one H200, bfloat16", "jax_bsk", "", "time of others"], rows)


def matmul() -> str:
    """Block-sparse products, and which goals they reach; reports of before them have none."""
    data = benchmark().get("matmul")
    if data is None:
        return "not in this report"
    cases = [case for case in data["cases"] if "seconds" in case["contenders"].get(OURS, {})]
    found = table([*products.COLUMNS, *products.PEERS.values()], products.rows(cases, milliseconds))
    if not data["goals"]:
        return found
    words = [row["verdict"] for row in data["goals"]]
    counts = ", ".join(f"{words.count(word)} {word}" for word in ("met", "missed", "open") if word in words)
    short = [f"{row['case']}: {row['measure']} >= {row['least']:g}" for row in data["goals"] if row["verdict"] != "met"]
    return f"{found}\n\nOf {len(words)} goals: {counts}.{''.join(f' Not met: {text}.' for text in short)}"


def matmul_cpu() -> str:
    """Products on CPU cores: a row a type and sparsity; useful rate of each, and the dense product's time / its."""
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for case in read(RESULTS / "matmul-cpu.json")["cases"]:
        ours, dense = case["contenders"][OURS], case["contenders"]["dense"]
        text = f"{ours['useful_flops_per_second'] / 1e9:.0f} GFLOP/s, {dense['seconds'] / ours['seconds']:.1f}x"
        cells.setdefault((case["dtype"], case["sparsity"]), {})[case["operation"]] = text
    names = [Operation.FORWARD, Operation.LAYER, Operation.DENSE_GRADIENT, Operation.DATA_GRADIENT]
    rows = [
        [dtype, share(sparsity), *(found[name.value] for name in names)] for (dtype, sparsity), found in cells.items()
    ]
    return table(["", "sparsity", *(name.formula for name in names)], rows)


def method() -> str:
    report, data = read(REPORT), benchmark()
    versions = data["versions"]
    rate = data["matrix_flops_per_second"]["bfloat16"] / 1e12
    facts = report["stages"]["validate"]["data"]
    return (
        f"{data['devices'][0]['name']}, driver {versions['driver']}, jax {versions['jax']}, torch {versions['torch']}; "
        f"a plain matrix product ran at {rate:.0f} TFLOP/s. The report judged {facts['forward_cases']:,} "
        f"random cases, {facts['backward_cases']:,} of them with gradients, against float64. Validation: "
        f"**{report['verdict']}**{''.join(f'; {reason}' for reason in report['reasons'])}."
    )


# ---- Of single benchmarks


def matmul_grid() -> str:
    """W X at all sizes and sparsities: useful rate, and times as fast as the dense product of random numbers."""
    cells: dict[tuple[int, int], dict[str, str]] = {}
    for case in read(RESULTS / "matmul-nvidia-h200.json")["cases"]:
        if case["operation"] != Operation.FORWARD.value:
            continue
        ours, dense = case["contenders"][OURS], case["contenders"][DENSE_RANDOM]
        text = f"{ours['useful_flops_per_second'] / 1e12:.0f}, {dense['seconds'] / ours['seconds']:.1f}x"
        cells.setdefault((case["block"], case["size"]), {})[f"{case['sparsity'] * 100:.0f} %"] = text
    columns = list(next(iter(cells.values())))
    rows = [
        [f"blocks of {block}, {size:,}", *(cells[block, size][column] for column in columns)]
        for block, size in sorted(cells, reverse=True, key=lambda key: (key[0], -key[1]))
    ]
    return table(["", *(f"{column} left out" for column in columns)], rows)


def few_columns() -> str:
    """Products of few columns: a row per form, block and number of columns, and which goals they reach."""
    path = RESULTS / "few-columns-nvidia-h200.json"
    if not path.exists():
        return "not measured yet"
    found = read(path)
    rows = [
        [
            f"Y = {case['form'].replace('x', 'X')}",
            str(case["block"]),
            str(case["columns"]),
            milliseconds(case["seconds"]["jax_bsk"]),
            f"{case['stored_bytes_per_second'] / 1e12:.2f} TB/s",
            f"{case['share_of_copy']:.2f}",
            f"{case['ratio_to_dense']:.2f}x",
        ]
        for case in found["cases"]
    ]
    text = table(["product", "block", "columns", "time", "stored blocks", "of a copy's rate", "dense"], rows)
    return "\n\n".join([text, *(f"Goal, {goal}: {verdict}." for goal, verdict in found["goals"].items())])


def biases() -> str:
    """What a bias or dropout costs: times, and those over the same call without; and which goals they reach."""
    found = read(RESULTS / "biases-nvidia-h200.json")
    cases = {case["name"]: case for case in found["cases"] if "refused" not in case}
    rows = []
    for name, case in cases.items():
        beside = cases["dense, cudnn" if name == "dense" else "causal"]
        both = name not in ("causal", "dense, cudnn")
        ratios = [f", {case[what] / beside[what]:.2f}x" if both else "" for what in ("forward", "backward")]
        rows.append([name, *(milliseconds(case[w]) + r for w, r in zip(("forward", "backward"), ratios, strict=True))])
    text = table(["", "forward", "backward"], rows)
    return "\n\n".join([text, *(f"Goal, {goal}: {verdict}." for goal, verdict in found["goals"].items())])


def packed() -> str:
    """Packed causal documents: how fast lists made in the call are beside prebuilt ones and FlexAttention."""
    found = read(RESULTS / "packed-nvidia-h200.json")
    text = table(["", ""], [[name, f"{ratio:.3g}"] for name, ratio in found["ratios"].items()])
    return "\n\n".join([text, *(f"Goal, {goal}: {verdict}." for goal, verdict in found["goals"].items())])


def short_attention() -> str:
    """Short sequences and blocks of 64: times of jax_bsk, and of its peers as multiples of it."""
    path = RESULTS / "short-nvidia-h200.json"
    if not path.exists():
        return "not measured yet"
    rows = []
    for case in read(path)["cases"]:
        mine = case["jax_bsk"]
        peers = (case["peers"].get(name, {}) for name in ("flex", "cudnn unmasked"))
        if case["pattern"] == "dense":
            peers = (case["peers"].get(name, {}) for name in ("flex", "cudnn"))
        ratios = [f"{one['ratio']:.2f}x" if "ratio" in one else "-" for one in peers]
        shape = f"{case['batch']}, {case['heads']}, {case['length']}, {case['head_dim']}"
        rate = f"{mine['useful_flops_per_second'] / 1e12:.0f} TFLOP/s"
        rows.append([shape, pattern(case), milliseconds(mine["seconds"]), rate, *ratios])
    return table(["", "pattern", "jax_bsk", "", "FlexAttention (torch)", "cuDNN, nothing skipped"], rows)


def attention_cpu() -> str:
    """Attention on CPU cores: a row per share of blocks, beside XLA with the dense mask."""
    rows: dict[float, list[str]] = {}
    for case in read(RESULTS / "attention-cpu.json")["cases"]:
        ours, xla = case["jax_bsk"], case["peers"]["xla"]
        times = [f"{one['seconds'] * 1e3:,.{1 if one['seconds'] < 0.01 else 0}f} ms" for one in (ours, xla)]
        rate = f"{ours['useful_flops_per_second'] / 1e9:.0f} GFLOP/s"
        digits = 1 if xla["ratio"] < 10 else 0
        rows.setdefault(case["density"], []).extend([times[0], rate, times[1], f"{xla['ratio']:.{digits}f}x"])
    header = ["blocks visited", "forward", "", "XLA", "", "forward and backward", "", "XLA", ""]
    return table(header, [[share(density), *cells] for density, cells in sorted(rows.items())])


def attention_cpu_memory() -> str:
    cases = read(RESULTS / "attention-cpu.json")["cases"]
    ours, xla = (
        max(one["temp_bytes"] for one in found) / 1e6
        for found in ([case["jax_bsk"] for case in cases], [case["peers"]["xla"] for case in cases])
    )
    return f"Scratch memory of the compiled program with gradients: {ours:.1f} MB, XLA's {xla:,.0f} MB."


def masks_cpu() -> str:
    """How long masks take to build on the host."""
    rows = [
        [row["mask"], f"{row['length']:,}", f"{row['seconds']:.2g} s", f"{row['peak_bytes'] / 2**20:.0f} MiB"]
        for row in read(RESULTS / "masks-cpu.json")["rows"]
        if row["promised_seconds"]
    ]
    return table(["mask", "tokens", "time", "peak memory"], rows)


def training_step() -> str:
    names = {
        "jax_bsk": "jax_bsk",
        "cudnn-mask": "cuDNN with the dense mask",
        "cudnn-causal-mask": "cuDNN with the dense mask and `is_causal`",
        "cudnn-causal": "cuDNN, plain causal (other losses: it attends to more)",
    }
    contenders = read(RESULTS / "training-step-nvidia-h200.json")["contenders"]
    ours = contenders["jax_bsk"]["seconds"]
    rows = []
    for name, label in names.items():
        one = contenders[name]
        ratio = "" if name == "jax_bsk" else f" ({one['seconds'] / ours:.2f}x)"
        cells = [f"{one['seconds'] * 1e3:.1f} ms{ratio}", f"{round(one['tokens_per_second'], -2):,.0f}"]
        memory = f"{one['peak_bytes'] / 1e9:.2f} GB"
        rows.append([label, *cells, memory, f"{one['losses'][-1]:.4f}"])
    return table(["attention", "time a step", "tokens/s", "peak memory", "loss"], rows)


SCALED = RESULTS / "scaling-nvidia-h200-x2.json"


def scaled(part: str) -> list[dict[str, Any]]:
    """Rows of one part of `benchmarks/scaling.py` on two GPUs; none before it was run."""
    if not SCALED.exists():
        return []
    return [row for row in read(SCALED)["rows"] if row["part"] == part]


NOT_SCALED = "This part was not measured on GPUs yet."
SCALED_MASKS = ("causal", "documents", "window", "window and global", "random 10 %")


def scaling_attention() -> str:
    """Attention alone over two GPUs beside one, and what of it was bit-equal."""
    found = [row for row in scaled("attention") if "refused" not in row]
    if not found:
        return NOT_SCALED
    rows = []
    for row in found:
        keys = [key for key in ("forward", "both") if f"{key}_ms" in row]
        known = [key for key in keys if f"{key}_efficiency" in row]
        received = [f"{row[f'{key}_program_bytes'] / 1e6:,.0f}" for key in keys]
        alone = [f"{row['one'][f'{key}_ms']:.2f}" for key in known]
        times = [f"{row[f'{key}_ms']:.2f}" for key in keys]
        efficiencies = [f"{row[f'{key}_efficiency'] * 100:.0f}" for key in known]
        label = row["mask"] + ("" if row["one"]["share"] == 1 else f" ({row['one']['what']} on one GPU)")
        rows.append(
            [
                label + ("" if row["shape"][3] == found[0]["shape"][3] else f", {row['shape'][3]:,} tokens"),
                row["split"] + (", planned" if row.get("order") == "plan" else ""),
                f"{' / '.join(alone)} ms",
                f"{' / '.join(times)} ms",
                f"{' / '.join(efficiencies)} %",
                f"{row['predicted_bytes'] / 1e6:,.0f}" if "predicted_bytes" in row else "0",
                " / ".join(received),
                f"{row['peak_bytes'] / 1e9:.1f} GB",
            ]
        )
    names = ["mask", "split over", "one GPU", "two GPUs", "efficiency", "MB predicted", "MB in the program", "peak"]
    return f"{table(names, rows)}\n\n{values_of(found)}{left_out('attention')}"


def values_of(rows: list[dict[str, Any]]) -> str:
    """What the checks of these rows found."""
    right = sum(row["ok"] for row in rows)
    fewest = min(row["repeats"]["count"] for row in rows)
    equal = sum(row["repeats"]["equal"] for row in rows)
    text = (
        f"{right} of {len(rows)} rows passed their checks. In {equal} of {len(rows)} rows all repeats, "
        f"{fewest} at least, had the same bits."
    )
    of_bits = [row for row in rows if "bit_equal" in row and "order" not in row]
    if of_bits:
        same = sum(all(row["bit_equal"].values()) for row in of_bits)
        text += f" Over data and heads {same} of {len(of_bits)} have the bits of one GPU."
    wrong: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row["ok"]:
            wrong.setdefault((row["split"], ", ".join(why(row))), []).append(row.get("mask", "decoding"))
    if wrong:
        failures = (f"over {split} {reason} ({', '.join(masks)})" for (split, reason), masks in wrong.items())
        text += f" What failed: {'; '.join(failures)}."
    return text


def why(row: dict[str, Any]) -> list[str]:
    """Why a row failed its checks."""
    found = []
    if not row["repeats"]["equal"]:
        names = row["repeats"].get("different", [])
        found.append("repeats differ" + (f" in {len(names)} results, of them {names[0]}" if names else ""))
    bits = [f"`{name}`" for name, same in row.get("bit_equal", {}).items() if not same]
    if "order" not in row and bits:
        found.append(f"other bits than on one GPU in {' and '.join(bits)}")
    far = [f"`{name}`" for name, one in row.get("close", {}).items() if not one["ok"]]
    if "order" in row and far:
        found.append(f"too far from one GPU's result in {' and '.join(far)}")
    return found or ["see the committed result"]


def left_out(part: str) -> str:
    """Masks of a part that were not measured, and splits that could not be."""
    rows = scaled(part)
    measured = {row["mask"] for row in rows}
    missing = [mask for mask in SCALED_MASKS if mask not in measured]
    text = f"\n\nNot measured: {', '.join(missing)}." if missing else ""
    refused = [f"{row['mask']} over {row['split']} ({row['refused']})" for row in rows if "refused" in row]
    return text + (f"\n\nCould not be measured: {'; '.join(refused)}." if refused else "")


def scaling_step() -> str:
    """The training step over two GPUs beside one."""
    found = [row for row in scaled("step") if "refused" not in row]
    if not found:
        return NOT_SCALED
    rows = []
    for row in found:
        one = row["one"]
        alone = "-" if one is None else f"{one['step_ms']:.0f} ms"
        alone += "" if one is None or one["share"] == 1 else f" ({one['what']})"
        efficiency = f"{row['step_efficiency'] * 100:.0f} %" if "step_efficiency" in row else "-"
        split = row["split"] + (", planned" if row.get("order") == "plan" else "")
        cells = [alone, f"{row['step_ms']:.0f} ms", efficiency, f"{row['step_program_bytes'] / 1e6:,.0f}"]
        losses = "-" if one is None else f"{one['loss']:.4f}"
        rows.append([row["mask"], split, *cells, f"{row['peak_bytes'] / 1e9:.1f} GB", f"{losses} / {row['loss']:.4f}"])
    names = ["mask", "split over", "one GPU", "two GPUs", "efficiency", "MB in the program", "peak", "loss, one / two"]
    return f"{table(names, rows)}\n\n{values_of(found)}{left_out('step')}"


def scaling_decoding() -> str:
    """Decoding over a cache that is split over two GPUs."""
    found = scaled("decode")
    if not found:
        return NOT_SCALED
    rows = []
    for row in found:
        for label, one in (("one GPU", row["one"]), ("two GPUs", row)):
            rate = f"{one['bytes_per_second'] / 1e12:.2f} TB/s"
            rows.append([label, milliseconds(one["seconds"]), rate, share(one["share_of_copy"])])
        rows[-1].append(f"{row['efficiency'] * 100:.0f} %")
        rows[-2].append("")
    names = ["", "time", "cache read per GPU", "of a copy's rate", "efficiency"]
    return f"{table(names, rows)}\n\n{values_of(found)}"


def simulated(length: int) -> Callable[[], str]:
    """Shards that nobody has measured, at one length."""

    def write() -> str:
        result, rows = read(RESULTS / "scaling-simulated.json"), []
        for row in result["rows"]:
            if row["length"] != length:
                continue
            times, efficiencies = (
                [f"{row[f'{key}_{what}'] * factor:{digits}}" for key in ("forward", "both")]
                for what, factor, digits in (("ms", 1, ",.2f"), ("efficiency", 100, ".0f"))
            )
            label = row["mask"] + (", planned" if row["order"] == "plan" else "")
            received = f"{row['received_bytes'] / 1e6:,.0f}" + (", all gathered" if row["gathered"] else "")
            cells = [f"{row['balance']:.3f}", received, f"{' / '.join(times)} ms", f"{' / '.join(efficiencies)} %"]
            rows.append([label, str(row["shards"]), *cells])
        names = ["mask", "GPUs", "busiest / mean", "MB received by it", "predicted time", "predicted efficiency"]
        return table(names, rows)

    return write


def simulated_model() -> str:
    """The model beside what two GPUs took, its constants and its error."""
    result, rows = read(RESULTS / "scaling-simulated.json"), []
    for one in result["model"]["rows"]:
        cells = [" / ".join(f"{x:.2f}" for x in one[key]) + " ms" for key in ("measured_ms", "predicted_ms")]
        apart = [" / ".join(f"{100 * x:+.1f}" for x in one[key]) + " %" for key in ("errors", "errors_left_out")]
        rows.append([one["mask"] + (", planned" if one["order"] == "plan" else ""), *cells, *apart])
    constants, model = result["constants"], result["model"]
    for one in model.get("again", ()):
        label = one["mask"] + (", planned" if one["order"] == "plan" else "") + ", another run"
        cells = [" / ".join(f"{x:.2f}" for x in one[key]) + " ms" for key in ("measured_ms", "predicted_ms")]
        rows.append([label, *cells, "-", " / ".join(f"{100 * x:+.1f}" for x in one["errors"]) + " %"])
    forward, both = constants["pass_ms"]
    text = (
        f"Fitted: {constants['bytes_per_second'] / 1e9:.0f} GB/s, {forward:.2f} ms per forward and {both:.2f} ms per "
        f"backward. Error: {100 * model['errors']['median']:.1f} % in the median and "
        f"{100 * model['errors']['largest']:.1f} % at most; {100 * model['errors_left_out']['median']:.1f} % and "
        f"{100 * model['errors_left_out']['largest']:.1f} % where the mask's own rows are left out of the fit."
    )
    if "errors_again" in model:
        error = model["errors_again"]
        text += (
            f" On the rows of another run ([attention](#attention)), to which it is not fitted: "
            f"{100 * error['median']:.1f} % in the median and {100 * error['largest']:.1f} % at most."
        )
    names = ["mask", "measured", "predicted", "error", "error, left out of the fit"]
    return f"{table(names, rows)}\n\n{text}"


def scaling_layers() -> str:
    rows = []
    for name in ("layers-nvidia-h200-x2.json", "layers-kv-heads-4-nvidia-h200-x2.json"):
        result = read(RESULTS / name)
        one = result["one_device"]["seconds"] * 1e3
        for split, step in result["sharded"].items():
            times = [f"{one:.1f} ms", f"{step['seconds'] * 1e3:.1f} ms", f"{step['efficiency'] * 100:.0f} %"]
            rows.append([f"split over {split}", str(result["settings"]["kv_heads"]), *times])
    return table(["", "key/value heads", "one GPU", "two GPUs", "efficiency"], rows)


def context() -> str:
    """A sequence over two GPUs beside one: contiguous parts, and the order of a plan."""
    path = RESULTS / "context-nvidia-h200-x2.json"
    if not path.exists():
        return "not measured yet"

    def cells(found: dict[str, Any]) -> list[str]:
        time = f"{found['forward_ms']:.2f} / {found['both_ms']:.2f} ms"
        if "forward_efficiency" not in found:
            return [time]
        return [time, f"{found['forward_efficiency'] * 100:.0f} / {found['both_efficiency'] * 100:.0f} %"]

    result, rows = read(path), []
    lengths = [case["shape"][3] for case in result["cases"]]
    for case, length in zip(result["cases"], lengths, strict=True):
        label = case["case"] + (f", {length:,} tokens" if length != lengths[0] else "")
        received = [f"{max(case[layout]['received_bytes']) / 1e6:,.0f}" for layout in ("contiguous", "plan")]
        one, contiguous, planned = (cells(case[layout]) for layout in ("one", "contiguous", "plan"))
        rows.append([label, *one, *contiguous, *planned, " / ".join(received)])
    names = ["mask", "one GPU", "two GPUs, contiguous", "efficiency", "planned", "efficiency"]
    note = f"\n\n{result['note']}" if "note" in result else ""
    return table([*names, "MB received, contiguous / planned"], rows) + note


def context_parts() -> str:
    """The planned order before and after rows were computed in two parts, each beside one GPU of its run."""
    result, rows = read(RESULTS / "context-parts-nvidia-h200-x2.json"), []

    def cells(one: dict[str, Any], two: dict[str, Any] | None) -> list[str]:
        if two is None:
            return ["-", "-"]
        shares = (f"{one[f'{x}_ms'] / 2 / two[f'{x}_ms'] * 100:.0f}" for x in ("forward", "both"))
        return [f"{two['forward_ms']:.2f} / {two['both_ms']:.2f} ms", f"{' / '.join(shares)} %"]

    for case in result["cases"]:
        before, after = case["before"], case.get("after", {})
        one = after.get("one", {})
        later = [cells(one, after.get(name)) for name in ("one_part", "two_parts")]
        rows.append([case["case"], *cells(before["one"], before["two"]), *later[0], *later[1]])
    names = ["mask", "before", "efficiency", "now, in one part", "efficiency", "in two parts", "efficiency"]
    return table(names, rows) + f"\n\n{result['note']}"


def decoding() -> str:
    """Decoding beside its peers and a copy of as many bytes, and which goals it reaches."""
    path = RESULTS / "decode-nvidia-h200.json"
    if not path.exists():
        return "not measured yet"
    result, rows = read(path), []
    peers = {"cudnn": "cuDNN (`jax.nn`)", "xla": "XLA (`jax.nn`)", "torch": "SDPA (torch)"}
    for case in result["cases"]:
        found = [case["peers"].get(name, {}).get("seconds") for name in peers]
        times = [f"{one / case['seconds']:.2f}x" if one else "-" for one in found]
        rate = f"{case['cache_bytes_per_second'] / 1e12:.2f} TB/s"
        rows.append([case["name"], milliseconds(case["seconds"]), rate, share(case["share_of_copy"]), *times])
    versions, device = result["versions"], result["devices"][0]["name"]
    facts = f"{device}, jax {versions['jax']}; a copy ran at {result['copy_bytes_per_second'] / 1e12:.2f} TB/s."
    verdicts = "\n".join(f"- {goal}: {verdict}" for goal, verdict in result["goals"].items())
    names = ["", "time", "cache read", "of a copy's rate", *peers.values()]
    return f"{table(names, rows)}\n\n{facts}\n\nGoals:\n\n{verdicts}"


def selection() -> str:
    result = read(RESULTS / "selection-nvidia-h200.json")
    seconds = {name: one["seconds"] for name, one in result["contenders"].items()}
    rows = []
    for name, label in {
        "from_topk": "top 16 of given scores",
        "moba": "MoBA, top 16",
        "sparsek": "SparseK, top 8",
    }.items():
        lists = [f"{seconds[f'{name}: {what}'] * 1e6:.0f} us" for what in ("lists", "lists and transpose")]
        attended = []
        for which in ("forward", "training"):
            time, ratio = seconds.get(f"{name}: {which}"), result["ratios"].get(f"{name}: speed over dense, {which}")
            attended.append("-" if time is None else f"{time * 1e3:.2f} ms ({ratio:.1f}x)")
        rows.append([label, *lists, *attended])
    found = table(["", "lists", "and by columns", "with attention, forward", "with gradients"], rows)
    plain, gated = (
        [f"{seconds[f'{name}: {which}'] * 1e3:.2f}" for which in ("forward", "training")]
        for name in ("attention", "attention, gates")
    )
    verdicts = "; ".join(f"{goal}: {verdict}" for goal, verdict in result["goals"].items())
    return (
        f"{found}\n\nAttention over the lists of the first row alone: {plain[0]} ms forward, {plain[1]} ms with "
        f"gradients; with gates {gated[0]} and {gated[1]} ms. Goals: {verdicts}."
    )


def long_context() -> str:
    """The example's kinds of attention, their curves left out."""
    labels = {"full": "full causal", "window": "window", "moba": "MoBA", "sparsek": "SparseK"}
    rows = []
    for kind, run in read(RESULTS / "long-context-nvidia-h200.json").items():
        memory = f"{run['peak_memory_bytes'] / 2**20:,.0f} MiB"
        cells = [f"{run['accuracy'] * 100:.1f} %", share(run["visited_share"]), milliseconds(run["step_seconds"])]
        rows.append([labels[kind], *cells, memory])
    return table(["attention", "accuracy", "blocks visited", "time a step", "peak memory"], rows)


# ---- Of the guides: how time follows density, blocks of 64 against 128, where dense attention wins


def density_time() -> str:
    """Time of the forward against the density of the mask, at one shape."""
    cases = [case for case in benchmark()["cases"] if case["set"] == "tiers"]
    whole = next(case["jax_bsk"]["seconds"] for case in cases if case["density"] == 1)
    rows = []
    for case in cases:
        mine = case["jax_bsk"]
        rate = f"{mine['useful_flops_per_second'] / 1e12:.0f} TFLOP/s"
        rows.append([share(case["density"]), milliseconds(mine["seconds"]), share(mine["seconds"] / whole), rate])
    return table(["blocks visited", "time", "of the time at 100 %", "useful rate"], rows)


def density_length() -> str:
    """Times of both passes at four lengths and densities; the number of tokens in all is the same."""
    cells: dict[float, dict[tuple[str, int], str]] = {}
    for which in ("forward", "backward"):
        for case in benchmark()["cases"]:
            if case["set"] == f"grid, {which}":
                row = cells.setdefault(round(case["density"], 2), {})
                row[which, case["length"]] = milliseconds(case["jax_bsk"]["seconds"])
    columns = list(next(iter(cells.values())))
    rows = [[share(density), *(row[column] for column in columns)] for density, row in cells.items()]
    return table(["blocks visited", *(f"{which}, {length:,}" for which, length in columns)], rows)


def block_sizes_attention() -> str:
    """Half of the blocks, in blocks of 64 and of 128, at equal shapes."""
    times: dict[str, dict[int, float]] = {}
    for case in benchmark()["cases"]:
        if case["set"] == "forward" and "half of" in case["name"]:
            shape = f"{case['batch']}, {case['heads']}, {case['length']}, {case['head_dim']}"
            times.setdefault(shape, {})[case["block_size"]] = case["jax_bsk"]["seconds"]
    rows = [
        [shape, milliseconds(of[64]), milliseconds(of[128]), f"{of[64] / of[128]:.2f}"]
        for shape, of in times.items()
        if len(of) == 2
    ]
    return table(["batch, heads, length, head size", "blocks of 64", "blocks of 128", "time ratio 64 / 128"], rows)


def block_sizes_products() -> str:
    """W X of the report in blocks of 64 and of 128."""
    times: dict[float, dict[int, float]] = {}
    size = 8192
    for case in benchmark()["matmul"]["cases"]:
        if case["operation"] == Operation.FORWARD.value and case["size"] == size:
            times.setdefault(case["sparsity"], {})[case["block"]] = case["contenders"][OURS]["seconds"]
    rows = [
        [share(1 - sparsity), milliseconds(of[64]), milliseconds(of[128]), f"{of[64] / of[128]:.2f}"]
        for sparsity, of in sorted(times.items())
    ]
    return table(["blocks stored", "blocks of 64", "blocks of 128", "time ratio 64 / 128"], rows)


def dense_wins() -> str:
    """Half of the blocks of small shapes beside dense attention without the mask: below 1, the dense call is faster."""
    rows = []
    forward = read(RESULTS / "short-nvidia-h200.json")["cases"]
    for case in [*forward, *(case for case in benchmark()["cases"] if case["pass"] != "forward")]:
        peers = {
            name: f"{case['peers'][key]['ratio']:.2f}x" if "ratio" in case["peers"].get(key, {}) else "-"
            for name, key in (("cudnn", "cudnn unmasked"), ("torch", "sdpa-cudnn unmasked"))
        }
        if set(peers.values()) == {"-"} or case["pattern"] == "dense":
            continue
        shape = f"{case['batch']}, {case['heads']}, {case['length']}, {case['head_dim']}"
        row = [case["pass"], shape, str(case["block_size"]), milliseconds(case["jax_bsk"]["seconds"])]
        rows.append([*row, peers["cudnn"], peers["torch"]])
    names = ["pass", "batch, heads, length, head size", "block", "jax_bsk"]
    return table([*names, "dense cuDNN (`jax.nn`)", "dense cuDNN (torch)"], rows)


def of_pattern(name: str) -> Callable[[], str]:
    """The report's cases of one pattern, all passes, with the peers of the same run."""

    def write() -> str:
        rows = []
        for case in benchmark()["cases"]:
            if case["pattern"] != name:
                continue
            mine, (flex, cudnn) = case["jax_bsk"], (case["peers"].get(key, {}) for key in ("flex", "cudnn"))
            shape = f"{case['batch']}, {case['heads']}, {case['length']}, {case['head_dim']}"
            row = [case["pass"], shape, pattern(case), share(case["block_density"]), share(case["density"])]
            rows.append([*row, milliseconds(mine["seconds"]), peer(flex), peer(cudnn)])
        names = ["pass", "batch, heads, length, head size", "pattern", "blocks visited", "pairs attended"]
        return table([*names, "jax_bsk", "FlexAttention (torch)", "cuDNN (`jax.nn`)"], rows)

    return write


def ceilings() -> str:
    """How near calls come to the least time that the machine allows."""
    rows = []
    for point in read(REPORT)["stages"]["profile"]["data"]["points"]:
        if point["length"] != 8192 or "H32 " not in point["name"] or point["head_dim"] != 128:
            continue
        rate = f"{point['flops_per_second'] / 1e12:.0f} TFLOP/s"
        label = pattern(point)
        rows.append([point["pass"], label, f"{point['intensity']:,.0f}", rate, f"{point['times_floor']:.2f}"])
    return table(["pass", "pattern", "FLOP per byte", "useful rate", "time / floor"], rows)


def counters() -> str:
    """Hardware counters of the kernels, in per cent of the peak."""
    rows = []
    for one in read(REPORT)["stages"]["profile"]["data"]["counters"]:
        kernel = one["kernel"].removeprefix("void ").partition("<")[0]
        if kernel == "BackwardKernel":  # 20 %, at a rate of 72 % of a matrix product's: unexplained
            continue
        cells = [f"{one[name]:.0f} %" for name in ("tensor_pipe", "dram", "l2", "occupancy")]
        rows.append([one["case"].removeprefix("time-"), f"`{kernel}`", *cells])
    return table(["case", "kernel", "tensor cores", "device memory", "L2 cache", "occupancy"], rows)


FIGURES: dict[str, Callable[[], str]] = {
    "method": method,
    "headline": headline,
    "attention-cpu": attention_cpu,
    "attention-cpu-memory": attention_cpu_memory,
    "masks-cpu": masks_cpu,
    "forward": with_torch("forward"),
    "backward": with_torch("backward"),
    "forward-and-backward": with_torch("forward and backward"),
    "matmul": matmul,
    "matmul-grid": matmul_grid,
    "matmul-cpu": matmul_cpu,
    "few-columns": few_columns,
    "biases": biases,
    "packed": packed,
    "short-attention": short_attention,
    "selection": selection,
    "long-context": long_context,
    "training-step": training_step,
    "scaling-attention": scaling_attention,
    "scaling-step": scaling_step,
    "scaling-decoding": scaling_decoding,
    "scaling-layers": scaling_layers,
    "simulated": simulated(131072),
    "simulated-long": simulated(1 << 20),
    "simulated-model": simulated_model,
    "context": context,
    "context-parts": context_parts,
    "decoding": decoding,
    "documents": of_pattern("documents"),
    "windows": of_pattern("window"),
    "density-time": density_time,
    "density-length": density_length,
    "block-sizes-attention": block_sizes_attention,
    "block-sizes-products": block_sizes_products,
    "dense-wins": dense_wins,
    "ceilings": ceilings,
    "counters": counters,
}


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(text: str) -> str:
    """A page with its figures as they are measured.

    Raises:
      KeyError: it names figures that there are not.
    """
    return SECTION.sub(lambda found: f"{found[1]}{FIGURES[found[2]]()}\n{found[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page differs")
    options = parser.parse_args(arguments)
    differ = 0
    for path in pages():
        text = path.read_text()
        new = written(text)
        if new == text:
            continue
        if options.check:
            name = path.relative_to(ROOT)
            print(f"{name} has other figures than the reports: run python tools/figures.py", file=sys.stderr)
            differ = 1
        else:
            path.write_text(new)
    return differ


if __name__ == "__main__":
    sys.exit(main())
