"""`python -m jax_bsk plot-mask`: describes and draws a mask that is written as an expression."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_bsk.cli import mask_expression
from jax_bsk.masks import BigBirdMask, BlockMask, Mask
from jax_bsk.qa.support.progress import Progress

# Pairs of a query and a key in all lists together. A pair takes at most a bit: 2 GiB. Beyond `LONG` binding may take
# seconds, and progress is shown. Partial blocks of a BigBirdMask have little in common, so fewer pairs are allowed.
MAX_LENGTH, MAX_PAIRS, LONG, MAX_BIG_BIRD = 2**20, 2**34, 2**28, 2**30
MAX_TABLE = 2**24  # pairs of a BigBirdMask's own blocks: its draw sorts them
MAX_BLOCK = 1024
CELLS = 32  # rows and columns of a text picture
MOST_HEADS = 16  # drawn where no option says how many
MARKS = {"block": ("··", "▒▒", "██"), "ascii": (" .", "++", "##")}  # empty, partial, full


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "plot-mask",
        help="describe and draw a mask, as text or as a picture",
        description="Binds a mask, describes it, and draws which blocks are visited: as text, or with --output as a "
        f"picture. {mask_expression.SAYS}. Nothing else is allowed, and nothing is executed. Exit status 2 where the "
        "expression, a length or the output cannot be honoured.",
    )
    parser.add_argument("expression", help='the mask, in quotes: "CausalMask() & LocalMask((1024, 0))"')
    parser.add_argument("--length", type=int, required=True, metavar="T", help="number of queries")
    parser.add_argument("--kv-length", type=int, metavar="S", help="number of keys; default as many as queries")
    parser.add_argument("--block-size", type=int, default=128, metavar="B", help="tokens of a block; default 128")
    parser.add_argument(
        "--heads", type=int, metavar="N", help=f"heads of a MultiHeadMask to draw; default all, at most {MOST_HEADS}"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.png", help="draw there instead (or .svg, .pdf); needs matplotlib"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    try:
        mask = bound(args.expression, args.length, args.kv_length, args.block_size)
        heads = _heads(mask, args.heads)
    except (TypeError, ValueError, OverflowError) as error:
        print(f"plot-mask: {error}", file=sys.stderr)
        return 2
    print(mask.describe())
    problem = "" if args.output is None else _draw(mask, heads, args.output)
    if args.output is not None and not problem:
        print(f"Wrote {args.output}")
        return 0
    for head in heads:
        print("\n" + (f"head {head}:\n" if len(heads) > 1 else "") + picture(mask, head=head))
    if problem:
        print(f"plot-mask: {problem}", file=sys.stderr)
    return 2 if problem else 0


def bound(expression: str, q_len: int, kv_len: int | None, block_size: int) -> BlockMask:
    """The mask of an expression as block lists.

    Raises:
      TypeError, ValueError: it is no expression of masks, does not fit the lengths, or would need too much memory.
    """
    kv_len = q_len if kv_len is None else kv_len
    for name, value, most in (("length", q_len, MAX_LENGTH), ("kv-length", kv_len, MAX_LENGTH)):
        if not 0 < value <= most:
            raise ValueError(f"--{name} must be in [1, {most:,}], given {value:,}")
    if not 32 <= block_size <= MAX_BLOCK:
        raise ValueError(f"--block-size must be a multiple of 32 in [32, {MAX_BLOCK:,}], given {block_size:,}")
    mask = mask_expression.parse(expression)
    lists, birds = mask.batch * mask.heads, _big_birds(mask)
    pairs, most = q_len * kv_len * lists, MAX_BIG_BIRD if birds else MAX_PAIRS
    if pairs > most:
        raise ValueError(
            f"{q_len:,} queries x {kv_len:,} keys of {lists} example(s) and head(s) are {pairs:,} pairs, and at most "
            f"{most:,} are drawn of this mask; give smaller lengths"
        )
    for table in birds:
        if -(-q_len // table.block) * -(-kv_len // table.block) > MAX_TABLE:
            raise ValueError(
                f"{table!r} draws its random blocks among all pairs of blocks of {table.block} tokens, and these are "
                "too many for such lengths; give smaller lengths or a larger `block`"
            )
    with Progress(1, quiet=pairs <= LONG) as progress:
        progress.step("makes the block lists")
        return mask.bind(q_len, kv_len, block_size=block_size)


def _big_birds(mask: Mask) -> list[BigBirdMask]:
    """The BigBirdMasks in a mask, found among the nodes that hold masks."""
    inner = getattr(mask, "masks", ()) or (getattr(mask, "mask", None),)
    return ([mask] if isinstance(mask, BigBirdMask) else []) + [
        found for one in inner if one is not None for found in _big_birds(one)
    ]


def _heads(mask: BlockMask, wanted: int | None) -> Sequence[int]:
    """The heads to draw; a mask that all heads share is drawn once."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"--heads must be at least 1, given {wanted}")
    if wanted is not None and 1 < mask.heads < wanted:
        raise ValueError(f"--heads {wanted}: the mask has {mask.heads} heads")
    return range(min(mask.heads, MOST_HEADS if wanted is None else wanted))


# ---- Pictures


def _draw(mask: BlockMask, heads: Sequence[int], path: Path) -> str:
    """Draws heads beside each other in a file; why not, where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(heads) == 1:
            mask.plot(path)
            return ""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        columns = min(4, len(heads))
        rows = -(-len(heads) // columns)
        figure = Figure(figsize=(4.2 * columns, 4.8 * rows), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        for head in heads:
            mask.plot(figure.add_subplot(rows, columns, head + 1), head=head, title=f"head {head}")
        figure.savefig(path)
    except ImportError:
        return "a picture needs matplotlib; install it with `pip install matplotlib`. Above is the same as text"
    except (ValueError, OSError) as error:  # a suffix that matplotlib does not know, a folder that cannot be written
        return f"{path} cannot be written: {error}"
    return ""


def blocks_of(mask: BlockMask, head: int = 0) -> np.ndarray:
    """int8 [nq, nk] of a head of the first example: 0 where a block is empty, 1 where it is partial, 2 where full."""
    found = np.zeros((mask.nq, mask.nk), np.int8)
    offsets, columns, tiles = (
        np.asarray(lists)[0, head if lists.shape[1] > 1 else 0]
        for lists in (mask.row_offsets, mask.kv_blocks, mask.tiles)
    )
    rows = np.repeat(np.arange(mask.nq), np.diff(offsets))
    found[rows, columns[: rows.size]] = np.where(tiles[: rows.size] < 0, 2, 1)
    return found


def picture(mask: BlockMask, head: int = 0, encoding: str | None = None) -> str:
    """A text of at most `CELLS` rows, two characters a cell.

    Args:
      mask: as block lists.
      head: which head.
      encoding: where the text goes to; by default standard output's. One without block characters gets ASCII.
    """
    blocks = blocks_of(mask, head)
    side = -(-max(blocks.shape) // CELLS)  # blocks of a cell, each way
    starts = [np.arange(0, count, side) for count in blocks.shape]
    # A cell is empty or full where all its blocks are.
    least, most = (
        reduce.reduceat(reduce.reduceat(blocks, starts[0], axis=0), starts[1], axis=1)
        for reduce in (np.minimum, np.maximum)
    )
    cells = np.where(least == most, most, 1)
    try:
        "".join(MARKS["block"]).encode(encoding or sys.stdout.encoding or "ascii")
        marks = MARKS["block"]
    except UnicodeEncodeError:
        marks = MARKS["ascii"]
    width = len(f"{mask.q_len:,}")
    lines = [f"{'':{width}}  keys 0 to {mask.kv_len - 1:,}"]
    for number, row in enumerate(cells):
        label = f"{number * side * mask.block_q:,}" if number % 4 == 0 else ""
        lines.append(f"{label:>{width}}  " + "".join(marks[cell] for cell in row))
    empty, partial, full = marks
    cell = f"{side * mask.block_q:,} queries x {side * mask.block_kv:,} keys"
    of_blocks = "a block" if side == 1 else f"{side} x {side} blocks"
    lines.append(f"{full} full  {partial} partial  {empty} empty; one cell is {of_blocks}, {cell}")
    if mask.batch > 1:
        lines.append(f"Example 0 of {mask.batch} is drawn.")
    return "\n".join(lines)
