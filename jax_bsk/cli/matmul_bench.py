"""`python -m jax_bsk bench-matmul`: `sparse_matmul` beside dense and other sparse products, timed and checked."""

from __future__ import annotations

import argparse
from typing import Any

from jax_bsk.qa.benchmarking.matmul import operation


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "bench-matmul", help="compare sparse_matmul with dense and sparse products", description=operation.DESCRIPTION
    )
    operation.add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    return operation.run(args)
