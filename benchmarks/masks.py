"""Measures time and peak memory of building masks, and of lowering attention with them.

`python benchmarks/masks.py` prints two tables, and JSON with `--json`. The first two rows are what the project promises
on 2 cores: a long packed causal window in under 1 s and 1 GB, and an opaque function in under 5 s. Each row is the best
of `--repeats` builds. A build before them measures the peak of allocations; it is not timed, because tracing
allocations slows it down.

The second table binds regular masks and lowers jitted `sparse_attention`, forward and with its gradients: the promise
is less than 1 s and 32 MB of program text, up to 1,048,576 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_bsk
import jax_bsk.masks as m


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: what is built, how long, and what was promised."""

    name: str
    length: int
    build: Callable[[], m.BlockMask]
    most_seconds: float | None = None
    most_bytes: float | None = None


def documents(length: int, count: int) -> np.ndarray:
    """Sorted ids [length] of `count` documents of random lengths."""
    ends = np.sort(np.random.default_rng(0).choice(np.arange(1, length), count - 1, replace=False))
    return np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)


def cases() -> list[Case]:
    """All rows."""
    long, middle = 131_072, 32_768
    window = m.CausalMask() & m.LocalMask((4096, None))
    packed = m.SegmentMask(documents(long, 1000))
    dense = np.random.default_rng(0).random((8192, 8192)) < 0.5
    ids = jax.numpy.asarray(documents(middle, 250)[None])
    traced = jax.jit(lambda i: (m.CausalMask() & m.SegmentMask(i, contiguous=True)).bind(middle))
    turned = window.bind(long)

    def on_device() -> m.BlockMask:
        return jax.block_until_ready(traced(ids))

    def host(mask: m.Mask, length: int) -> Callable[[], m.BlockMask]:
        return lambda: mask.bind(length)

    opaque = m.FunctionMask(lambda q, k: (q * 7 + k * 13) % 17 < 5)
    return [
        Case("causal & window(4096) & 1,000 documents", long, host(window & packed, long), 1.0, 1e9),
        Case("function (q * 7 + k * 13) % 17 < 5", middle, host(opaque, middle), 5.0),
        Case("function q - k < 4096", middle, host(m.FunctionMask(lambda q, k: q - k < 4096), middle), 5.0),
        Case("causal", long, host(m.CausalMask(), long)),
        Case("causal & window(4096)", long, host(window, long)),
        Case("causal & documents", long, host(m.CausalMask() & packed, long)),
        Case("causal & (window | 64 global)", long, host(window | m.CausalMask() & m.GlobalMask(64), long)),
        Case("BigBird", long, host(m.BigBirdMask(), long)),
        Case("causal & window(4096)", 2**20, host(window, 2**20)),
        Case("random boolean array", 8192, lambda: m.BlockMask.from_dense(dense)),
        Case("causal & contiguous documents, in jit", middle, on_device),
        Case("transpose of causal & window(4096)", long, lambda: dataclasses.replace(turned).transpose()),
    ]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Best time, peak of allocations (of Python and numpy) and sizes of a row."""
    tracemalloc.start()
    mask = case.build()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        case.build()
        times.append(time.perf_counter() - start)
    return {
        "mask": case.name,
        "length": case.length,
        "seconds": min(times),
        "peak_bytes": peak,
        "visited_blocks": int(mask.row_offsets[..., -1].max()),
        "tiles": mask.bit_tiles.shape[2],
        "density": mask.density,
        "kept": (case.most_seconds is None or min(times) < case.most_seconds)
        and (case.most_bytes is None or peak < case.most_bytes),
        "promised_seconds": case.most_seconds,
        "promised_bytes": case.most_bytes,
    }


LONG_LENGTHS = (131_072, 524_288, 1_048_576)
MOST_SECONDS, MOST_BYTES = 1.0, 32e6


def regular(length: int) -> dict[str, m.Mask]:
    """Masks whose structure is much smaller than their area."""
    return {
        "causal": m.CausalMask(),
        "causal & window(4096)": m.CausalMask() & m.LocalMask((4096, None)),
        "10 documents": m.SegmentMask(documents(length, 10)),
        "causal & 10 documents": m.CausalMask() & m.SegmentMask(documents(length, 10)),
    }


def lower(name: str, mask: m.Mask, length: int, gradient: bool, repeats: int) -> dict[str, Any]:
    """Best times of binding and lowering, and the sizes of the bound mask's arrays and of the program text.

    Processor time is that of all threads, and says the same on a machine that does other work.
    """
    array = jax.ShapeDtypeStruct((1, length, 8, 64), jnp.bfloat16)
    times, processor_times, held, text = [], [], 0, 0
    for _ in range(repeats):
        start, processor_start = time.perf_counter(), time.process_time()
        bound = mask.bind(length)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, bound: m.BlockMask = bound) -> jax.Array:
            return jax_bsk.sparse_attention(q, k, v, mask=bound).sum(dtype=jnp.float32)

        function = jax.grad(attend, (0, 1, 2)) if gradient else attend
        text = len(jax.jit(function).lower(array, array, array).as_text())
        times.append(time.perf_counter() - start)
        processor_times.append(time.process_time() - processor_start)
        held = bound.nbytes
    return {
        "mask": name,
        "length": length,
        "pass": "gradient" if gradient else "forward",
        "seconds": min(times),
        "processor_seconds": min(processor_times),
        "held_bytes": held,
        "text_bytes": text,
        "kept": min(times) < MOST_SECONDS and text < MOST_BYTES,
    }


def lower_all(repeats: int) -> list[dict[str, Any]]:
    """Prints and returns the rows of the second table."""
    columns = "".join(f"{name:>10}" for name in ("length", "pass", "seconds", "processor", "mask MB", "text MB"))
    print(f"\nbind + lower\n{'mask':<42}{columns}")
    lower("", m.CausalMask(), 256, True, 1)
    rows = []
    for length in LONG_LENGTHS:
        for name, mask in regular(length).items():
            for gradient in (False, True):
                row = lower(name, mask, length, gradient, repeats)
                rows.append(row)
                megabytes = row["held_bytes"] / 1e6, row["text_bytes"] / 1e6
                print(
                    f"{name:<42}{length:>10,}{row['pass']:>10}{row['seconds']:>10.3f}{row['processor_seconds']:>10.3f}"
                    f"{megabytes[0]:>10.2f}{megabytes[1]:>10.2f}  {'kept' if row['kept'] else 'MISSED'}",
                    flush=True,
                )
    return rows


def main() -> None:
    """Runs all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="PATH", help="also write the rows there")
    arguments = parser.parse_args()
    print(
        f"{'mask':<42}{'length':>10}{'seconds':>10}{'peak MiB':>10}{'visited':>10}{'tiles':>8}{'density':>10}  promised"
    )
    rows = []
    for case in cases():
        row = measure(case, arguments.repeats)
        rows.append(row)
        promised = "" if row["promised_seconds"] is None else f"< {row['promised_seconds']:g} s"
        promised += "" if row["promised_bytes"] is None else f", < {row['promised_bytes'] / 1e9:g} GB"
        verdict = (" kept" if row["kept"] else " MISSED") if promised else ""
        print(
            f"{row['mask']:<42}{row['length']:>10,}{row['seconds']:>10.3f}{row['peak_bytes'] / 2**20:>10.1f}"
            f"{row['visited_blocks']:>10,}{row['tiles']:>8,}{row['density']:>10.2%}  {promised}{verdict}",
            flush=True,
        )
    lowered = lower_all(arguments.repeats)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                {
                    "jax": jax.__version__,
                    "numpy": np.__version__,
                    "cores": os.cpu_count(),
                    "rows": rows,
                    "lowered": lowered,
                },
                file,
                indent=2,
            )
            file.write("\n")
    if not all(row["kept"] for row in (*rows, *lowered)):
        raise SystemExit("a promise was missed")


if __name__ == "__main__":
    main()
