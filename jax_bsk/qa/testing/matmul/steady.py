"""`python -m jax_bsk.qa.testing.matmul.steady IMPLEMENTATION [--repeats N] [--load]`: products again and again.

Every bit must be the same, whatever else the machine does meanwhile, and the process must not grow. In a process of
its own, so that one which hangs can be ended. It prints one line of JSON: {"unequal": [names], "repeats", "shapes",
"calls", "host_growth_kib", "device_growth_bytes"}.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import BSR, sampled_matmul, sparse_matmul
from jax_bsk.qa.testing.gpu_load import concurrent_load
from jax_bsk.qa.testing.steady import still_same

CALLS = 300  # while memory is watched, after as many that may grow it


@dataclasses.dataclass(frozen=True)
class Steady:
    """A weight whose rows of blocks have uneven densities; `size` is M, K less a tail, `width` the tokens."""

    size: int
    width: int
    block: int
    density: float
    dtype: str = "bfloat16"
    empty_rows: int = 0  # every so many rows of blocks have none; 0 for no such row

    def operands(self) -> tuple[BSR, jax.Array, jax.Array, jax.Array]:
        """The matrix [M, K], x [K, N], dy [M, N] and tokens [N, M]."""
        rng = np.random.default_rng(0)
        shape = self.size, self.size - self.block // 2
        rows, columns = (-(-n // self.block) for n in shape)
        # From next to nothing to twice the density, the longest rows in no order.
        keep = rng.random((rows, columns)) < rng.permutation(np.linspace(0, 2 * self.density, rows))[:, None]
        if self.empty_rows:
            keep[:: self.empty_rows] = False
        indptr = np.concatenate([[0], keep.sum(1).cumsum()]).astype(np.int32)
        indices = np.nonzero(keep)[1].astype(np.int32)

        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape, np.float32)).astype(self.dtype)

        matrix = BSR(normal(indices.size, self.block, self.block), jnp.asarray(indptr), jnp.asarray(indices), shape)
        return matrix, normal(shape[1], self.width), normal(shape[0], self.width), normal(self.width, shape[0])


# Few tiles, fewer than clusters, one row that is longest by far: what makes a cluster's two halves wait for each other.
GPU = {
    "128": Steady(4096, 2048, 128, 0.22),
    "64": Steady(4096, 2048, 64, 0.22),
    "128-empty-rows": Steady(4096, 1024, 128, 0.05, empty_rows=3),
    "64-empty-rows": Steady(2048, 520, 64, 0.05, "float16", empty_rows=3),
    "128-one-tile": Steady(256, 64, 128, 0.5),
}
CPU = {
    "64": Steady(512, 200, 64, 0.3, "float32"),
    "32-empty-rows": Steady(384, 100, 32, 0.05, empty_rows=3),
}


def _step(implementation: Any):
    """(matrix, x, dy, tokens) -> W x, its gradients, tokens W, W^T dy, and the sampled product, all at once."""

    @jax.jit
    def step(matrix: BSR, x: jax.Array, dy: jax.Array, tokens: jax.Array):
        def multiply(data: Any, x: Any) -> jax.Array:
            return sparse_matmul(matrix.with_data(data), x, implementation=implementation)

        out, pullback = jax.vjp(multiply, matrix.data, x)
        left = sparse_matmul(tokens, matrix, implementation=implementation)
        back = sparse_matmul(matrix, dy, transpose=True, implementation=implementation)
        blocks = sampled_matmul(dy, x.T, matrix, implementation=implementation).data
        return out, *pullback(dy), left, back, blocks

    return step


def repeats_are_equal(case: Steady, implementation: str, repeats: int) -> bool:
    """Whether all results of so many steps have the bits of the first, which must be finite.

    Raises:
      FloatingPointError: they are not finite.
    """
    step, operands = _step(implementation), case.operands()
    first = step(*operands)
    if not all(jnp.isfinite(x).all() for x in first):
        raise FloatingPointError("a result is not finite")
    same = jnp.array(True)
    for _ in range(repeats):
        same = still_same(same, step(*operands), first)
    return bool(same)


def growth(implementation: str) -> tuple[int, int]:
    """KiB of the process and bytes of the device that `CALLS` further steps add."""
    step = _step(implementation)
    operands = Steady(256, 128, 64, 0.5, "bfloat16").operands()

    def run() -> tuple[int, int]:
        for _ in range(CALLS):
            results = step(*operands)
        jax.block_until_ready(results)
        del results
        stats = jax.devices()[0].memory_stats() or {}
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, stats.get("bytes_in_use", 0)

    before, after = run(), run()
    return after[0] - before[0], after[1] - before[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jax_bsk.qa.testing.matmul.steady", description=__doc__)
    parser.add_argument("implementation", choices=["xla", "cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--load", action="store_true", help="other work on the GPU meanwhile")
    args = parser.parse_args()
    cases = GPU if args.implementation == "cuda" else CPU
    unequal = []
    for name, case in cases.items():
        with concurrent_load() if args.load else contextlib.nullcontext():
            if not repeats_are_equal(case, args.implementation, args.repeats):
                unequal.append(name)
    host, device = growth(args.implementation)
    print(
        json.dumps(
            {
                "unequal": unequal,
                "repeats": args.repeats,
                "shapes": list(cases),
                "calls": CALLS,
                "host_growth_kib": host,
                "device_growth_bytes": device,
            }
        )
    )


if __name__ == "__main__":
    main()
