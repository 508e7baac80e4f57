"""`python -m jax_bsk`: the command line. One module of `jax_bsk.cli` a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jax_bsk.cli import bench, info, matmul_bench, plot_mask, validate
from jax_bsk.core.version import __version__

COMMANDS = (info, bench, matmul_bench, validate, plot_mask)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 success, 1 a failed check, 2 a call that cannot be honoured."""
    parser = argparse.ArgumentParser(prog="python -m jax_bsk", description="Block-sparse attention for JAX.")
    parser.add_argument("--version", action="version", version=f"jax_bsk {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers).set_defaults(run=command.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
