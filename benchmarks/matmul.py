"""Compares block-sparse matrix products with dense ones and every sparse peer that can be imported, on one device.

`python benchmarks/matmul.py` and `python -m jax_bsk bench-matmul` are the same. On a GPU they measure W X for sizes
from 4,096 to 32,768 with 50 % to 90 % of the blocks left out, blocks of 64 and 128, in bfloat16; at 8,192 also X W and
the two gradients. On a CPU they measure matrices of 1,024 and 2,048 in float32 and bfloat16. The code is in
`jax_bsk/qa/benchmarking/`.

The exit status is 1 where a result of any contender is wrong or jax_bsk fails, and 2 where nothing can be measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jax_bsk.qa.benchmarking.matmul import operation

RESULTS = Path(__file__).parent / "results"


def run(argv: Sequence[str]) -> int:
    """Measures, prints and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks/matmul.py", description=operation.DESCRIPTION)
    operation.add_options(parser)
    return operation.run(parser.parse_args(argv), RESULTS)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
