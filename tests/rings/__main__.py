"""Longer explorations than those of `tests/test_rings.py`:

- `python -m tests.rings forward --dim 128 --consumers 2 --length 9`
- `python -m tests.rings backward --dim 64 --split --any-order`
- `python -m tests.rings products --kind pairs --steps 2 --length 6`
- `python -m tests.rings agree` writes agreed.json: see agreement.py
"""

from __future__ import annotations

import argparse
import time

from tests.rings import agreement, backward, forward, products
from tests.rings.alphabets import backward_items, product_tiles, tiles
from tests.rings.checker import explore


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.rings", description="Explores a pipeline of the kernels.")
    parser.add_argument("pipeline", choices=("forward", "backward", "products", "agree"))
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--consumers", type=int, default=2)
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--kind", default=products.ROWS)
    parser.add_argument("--steps", type=int, default=1, help="stages of a block")
    parser.add_argument("--length", type=int, help="of the longest sequences; any length where it is not given")
    parser.add_argument("--any-order", action="store_true", help="deadlocks alone: many fewer states")
    parser.add_argument("--mistake", default="", help="one of the model's MISTAKES")
    args = parser.parse_args()
    if args.pipeline == "agree":
        agreement.agree()
        return
    if args.pipeline == "forward":
        model = forward.Forward(args.dim, args.consumers, mistake=args.mistake)
        alphabet = tiles(model)
    elif args.pipeline == "backward":
        model = backward.Backward(args.dim, args.split, args.mistake)
        alphabet = backward_items(model)
    else:
        model = products.Products(args.kind, args.steps, args.mistake)
        alphabet = product_tiles(model)
    start = time.monotonic()

    def progress(length: int, states: int):
        print(f"length {length}: {states} states, {time.monotonic() - start:.0f} s", flush=True)

    coverage = explore(model, alphabet, args.length, order=not args.any_order, progress=progress)
    print(f"items {alphabet}: {coverage.sequences} sequences run, {coverage.states} states", end=", ")
    print("all lengths" if coverage.complete else f"up to {coverage.length} items")
    for finding in coverage.findings:
        print(finding)


if __name__ == "__main__":
    main()
