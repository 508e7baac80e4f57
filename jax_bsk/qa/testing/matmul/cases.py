"""Test cases of block-sparse products as data: named corners, and random ones from a seed.

Blocks' numbers outside of the matrix, and blocks in room that no row uses, are NaN: a product must not look at them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_bsk.qa.testing.judgement import NamedCase

Form = Literal["A B", "A^T B", "X A", "X A^T", "sampled"]
FORMS: tuple[Form, ...] = ("A B", "A^T B", "X A", "X A^T", "sampled")
# What has a batch of its own under vmap: names of `Inputs.operands`; "lists" are indptr and indices.
MAPPED = {
    "product": ((), (), ("data",), ("dense",), ("data", "lists"), ("data", "lists", "dense")),
    "sampled": ((), (), ("left",), ("right",), ("lists",), ("left", "right", "lists")),
}
EXAMPLES = 2  # of a mapped operand
Fault = Literal["id too large", "id negative", "offsets decrease", "offset too large"]
Lists = Literal["traced", "carried", "constant"]
FAULTS: tuple[Fault, ...] = ("id too large", "id negative", "offsets decrease", "offset too large")
SPARE = 3  # entries of room beyond a block for every place


@dataclasses.dataclass(frozen=True)
class Case(NamedCase):
    """One call of `sparse_matmul` or `sampled_matmul`.

    Attributes:
      form: which product.
      rows, columns: of the sparse matrix.
      width: columns of the dense factor (rows, where it is on the left; the contracted length of a sampled product).
      block_rows, block_columns: of a block.
      dtype: of the factors.
      wide: whether a float32 result is asked for.
      pattern: a key of `PATTERNS`.
      density: of patterns that have one.
      mapped: operands that vmap maps.
      lists: where they are: arguments of the program, with room; those with the same by columns beside them; constants
        of it, without room.
      fault: what is wrong with the lists of the (untransposed) product, or a sampled product's ids.
      seed: of all numbers.
    """

    form: Form = "A B"
    rows: int = 256
    columns: int = 192
    width: int = 136
    block_rows: int = 64
    block_columns: int = 64
    dtype: str = "bfloat16"
    wide: bool = False
    pattern: str = "random"
    density: float = 0.4
    mapped: tuple[str, ...] = ()
    lists: Lists = "traced"
    fault: Fault | None = None
    seed: int = 0

    kit = "matmul"

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.rows, self.columns

    @property
    def block_size(self) -> tuple[int, int]:
        """(bm, bk)."""
        return self.block_rows, self.block_columns

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.rows // self.block_rows), -(-self.columns // self.block_columns)

    @property
    def transposed(self) -> bool:
        """What `sparse_matmul(transpose=...)` is told."""
        return self.form in ("A^T B", "X A^T")

    @property
    def dense_left(self) -> bool:
        return self.form in ("X A", "X A^T")

    @property
    def transposed_lists(self) -> bool:
        """Whether the product walks columns of blocks: a fault in the lists of rows is then no row of the result."""
        return self.form != "sampled" and self.transposed != self.dense_left

    @property
    def result_dtype(self) -> str:
        return "float32" if self.wide and self.dtype != "float64" else self.dtype


class Inputs(NamedTuple):
    """Arrays of a case (NumPy).

    Attributes:
      operands: by name. "lists" is a pair (indptr int32, indices int32); a product has "data" [entries, bm, bk] and
        "dense", a sampled one "left" [M, L] and "right" [L, K]. What is mapped has a leading dimension.
      cotangent: [examples, ...] of the result, in its type, exact in the factors'.
    """

    operands: dict[str, Any]
    cotangent: np.ndarray


def make_inputs(case: Case) -> Inputs:
    """Builds the arrays of a case; the same on every machine."""
    rng = np.random.default_rng(case.seed)
    dtype = jnp.dtype(case.dtype)
    lists = [_lists(rng, case) for _ in range(EXAMPLES if "lists" in case.mapped else 1)]
    entries = lists[0][1].size

    def normal(name: str, *shape: int) -> np.ndarray:
        lead = (EXAMPLES,) if name in case.mapped else ()
        return rng.standard_normal((*lead, *shape)).astype(dtype)

    indptr, indices = (np.stack(x) if "lists" in case.mapped else x[0] for x in zip(*lists, strict=True))
    operands: dict[str, Any] = {"lists": (indptr, indices)}
    if case.form == "sampled":
        operands["left"] = normal("left", case.rows, case.width)
        operands["right"] = normal("right", case.width, case.columns)
        result = (entries, *case.block_size)
    else:
        unused = np.stack([_unused(case, *one) for one in lists])
        data = normal("data", entries, *case.block_size)
        operands["data"] = np.where(unused if "lists" in case.mapped else unused[0], dtype.type(np.nan), data)
        contracted, out = case.shape if case.transposed_lists else case.shape[::-1]
        dense, result = (contracted, case.width), (out, case.width)
        if case.dense_left:
            dense, result = dense[::-1], result[::-1]
        operands["dense"] = normal("dense", *dense)
    cotangent = rng.standard_normal((EXAMPLES if case.mapped else 1, *result)).astype(dtype)
    return Inputs(operands, cotangent.astype(case.result_dtype))


# Patterns: the columns of blocks that each row lists, in their order.

Rows = list[list[int]]


def _lists(rng: np.random.Generator, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """indptr and indices, with the case's fault; room for every block and more, unless they are one constant list."""
    rows = PATTERNS[case.pattern](rng, case)
    indptr = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    listed = np.array([c for row in rows for c in row], np.int32)
    exact = case.lists == "constant" and "lists" not in case.mapped  # mapped lists are of one length
    room = listed.size if exact else math.prod(case.grid) + SPARE
    indices = np.full(room, -1, np.int32)
    indices[: listed.size] = listed
    if case.fault is not None and listed.size:
        _break(rng, case, indptr, indices)
    return indptr, indices


def _break(rng: np.random.Generator, case: Case, indptr: np.ndarray, indices: np.ndarray) -> None:
    if case.fault == "id too large":
        indices[rng.integers(indptr[-1])] = case.grid[1] + rng.integers(2) * 2**30
    elif case.fault == "id negative":
        indices[rng.integers(indptr[-1])] = -1 - rng.integers(2) * 2**30
    elif case.fault == "offset too large":
        indptr[-1] = rng.choice([indices.size + 1, 2**31 - 1])
    elif indptr[-2] > 0:
        indptr[-1] = rng.integers(indptr[-2])


def _unused(case: Case, indptr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """bool [entries, bm, bk]: numbers that belong to no element of the matrix."""
    unused = np.ones((indices.size, *case.block_size), bool)
    for row, column, entry in listed_blocks(case, indptr, indices):
        height, width = inside(case, row, column)
        unused[entry, :height, :width] = False
    return unused


def listed_blocks(case: Case, indptr: np.ndarray, indices: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, column, entry) of each block that a row lists, of rows and ids that make sense."""
    found = []
    for row in range(case.grid[0]):
        begin, end = int(indptr[row]), int(indptr[row + 1])
        if 0 <= begin <= end <= indices.size:
            found += [(row, int(c), e) for e, c in enumerate(indices[begin:end], begin) if 0 <= c < case.grid[1]]
    return found


def inside(case: Case, row: int, column: int) -> tuple[int, int]:
    """How many rows and columns of a block lie in the matrix."""
    height = min(case.block_rows, case.rows - row * case.block_rows)
    return height, min(case.block_columns, case.columns - column * case.block_columns)


def _of(chosen: np.ndarray) -> Rows:
    return [[int(c) for c in np.flatnonzero(row)] for row in chosen]


def _some(rng: np.random.Generator, case: Case) -> np.ndarray:
    return rng.random(case.grid) < case.density


def _random(rng: np.random.Generator, case: Case) -> Rows:
    return _of(_some(rng, case))


def _empty_lines(rng: np.random.Generator, case: Case) -> Rows:
    """A row and a column of blocks have none."""
    chosen = _some(rng, case)
    chosen[rng.integers(case.grid[0])] = False
    chosen[:, rng.integers(case.grid[1])] = False
    return _of(chosen)


def _skewed(rng: np.random.Generator, case: Case) -> Rows:
    """One row has every block, the others next to none."""
    chosen = rng.random(case.grid) < case.density / 10
    chosen[rng.integers(case.grid[0])] = True
    return _of(chosen)


def _unsorted(rng: np.random.Generator, case: Case) -> Rows:
    """In any order."""
    return [[int(c) for c in rng.permutation(row)] for row in _random(rng, case)]


def _diagonal(rng: np.random.Generator, case: Case) -> Rows:
    return _of(np.eye(*case.grid, dtype=bool))


def _full(rng: np.random.Generator, case: Case) -> Rows:
    return _of(np.ones(case.grid, bool))


def _empty(rng: np.random.Generator, case: Case) -> Rows:
    return _of(np.zeros(case.grid, bool))


PATTERNS: dict[str, Callable[[np.random.Generator, Case], Rows]] = {
    "random": _random,
    "empty lines": _empty_lines,
    "skewed": _skewed,
    "unsorted": _unsorted,
    "diagonal": _diagonal,
    "full": _full,
    "empty": _empty,
}

# What kernels take: types, and sides of blocks.
DTYPES = {"cuda": ("bfloat16", "float16")}
BLOCKS = {"cuda": (64, 128)}
_DTYPES, _BLOCKS = ("float32", "bfloat16", "float16"), (1, 7, 16, 17, 32, 48, 64, 64, 100, 128, 128, 256)
MOST_BLOCKS = 24  # along a side, so that small blocks make small matrices


def random_case(seed: int, implementation: str, max_size: int = 700) -> Case:
    """The case of a seed, of what an implementation takes; the command line has the default `max_size`."""
    rng = np.random.default_rng([seed, 30])

    def pick(*options: Any) -> Any:
        return options[int(rng.integers(len(options)))]

    def size(block: int) -> int:
        # Half of them anywhere from 1, half near whole blocks, where tails are of every kind.
        most = min(max_size, MOST_BLOCKS * block)
        if rng.random() < 0.5:
            return round(math.exp(rng.uniform(0, math.log(max(1, most)))))
        return int(np.clip(block * rng.integers(1, max(2, most // block + 1)) + pick(-1, 0, 0, 1, 8), 1, max(1, most)))

    sides = BLOCKS.get(implementation, _BLOCKS)
    block_rows = pick(*sides)
    block_columns = block_rows if rng.random() < 0.6 else pick(*sides)
    form = pick(*FORMS)
    case = Case(
        name=f"seed-{seed}",
        form=form,
        rows=size(block_rows),
        columns=size(block_columns),
        width=size(64),
        block_rows=block_rows,
        block_columns=block_columns,
        dtype=pick(*DTYPES.get(implementation, _DTYPES)),
        wide=rng.random() < 0.3,
        mapped=pick(*MAPPED["sampled" if form == "sampled" else "product"]),
        lists="constant" if rng.random() < 0.15 else pick("traced", "carried"),
    )
    return _drawn(rng, case, seed)


DRAWS = 8  # cases of one shape, see `redraw`


def redraw(case: Case, draw: int) -> Case:
    """Another case of the same shape: other numbers, pattern, density, fault. Draw 0 is the case itself.

    Programs compiled for the one serve the other where the lists are no constants.
    """
    if draw == 0:
        return case
    rng = np.random.default_rng([case.seed, 31, draw])
    return _drawn(rng, dataclasses.replace(case, name=f"{case.name}.{draw}"), int(rng.integers(2**31)))


def _drawn(rng: np.random.Generator, case: Case, seed: int) -> Case:
    faulty = rng.random() < 0.15
    of_ids = faulty and (case.form == "sampled" or rng.random() < 0.5)
    fault = FAULTS[int(rng.integers(2)) + 2 * (not of_ids)] if faulty and not case.transposed_lists else None
    return dataclasses.replace(
        case,
        pattern=list(PATTERNS)[int(rng.integers(len(PATTERNS)))],
        density=float(np.round(rng.uniform(0, 1), 2)),
        fault=fault,
        seed=seed,
    )


def _corner(name: str, **fields: Any) -> Case:
    return Case(name=name, **fields)


CORNER_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _corner("one-number", rows=1, columns=1, width=1, pattern="full"),
        _corner("one-column", rows=200, columns=300, width=1, density=0.6),
        _corner("one-row-left", form="X A", rows=200, columns=300, width=1, density=0.6),
        _corner("no-columns", width=0),
        _corner("no-rows", rows=0, form="A^T B"),
        _corner("no-blocks", pattern="empty", lists="constant"),
        _corner("no-blocks-sampled", form="sampled", pattern="empty", lists="constant"),
        _corner("no-depth-sampled", form="sampled", width=0),
        _corner("tails", rows=257, columns=129, width=65, density=0.9, block_rows=128, block_columns=128),
        _corner("tails-transposed", form="A^T B", rows=257, columns=129, width=65, density=0.9),
        _corner("tails-left", form="X A", rows=129, columns=257, width=63, density=0.9, block_rows=128),
        _corner("tails-sampled", form="sampled", rows=129, columns=257, width=63, density=0.9, block_columns=128),
        _corner("wide", form="X A^T", rows=384, columns=640, width=200, wide=True, dtype="float16"),
        _corner("tall-blocks", rows=384, columns=256, block_rows=128),
        _corner("broad-blocks-transposed", form="A^T B", rows=384, columns=256, block_columns=128),
        _corner("long-sums", rows=128, columns=4096, width=64, pattern="full", wide=True),
        _corner("skewed", rows=1024, columns=512, pattern="skewed", density=0.5),
        _corner("unsorted", rows=512, columns=512, pattern="unsorted", density=0.7),
        _corner("carried-lists", form="A^T B", rows=512, lists="carried"),
        _corner("vmap-data", mapped=("data",)),
        _corner("vmap-dense-left", form="X A", mapped=("dense",)),
        _corner("vmap-everything", form="X A^T", mapped=("data", "lists", "dense"), lists="carried"),
        _corner("vmap-lists-sampled", form="sampled", mapped=("lists",)),
        _corner("id-too-large", fault="id too large", rows=512, seed=1),
        _corner("id-negative-left", form="X A^T", fault="id negative", rows=512, seed=1),
        _corner("offsets-decrease", fault="offsets decrease", rows=512, seed=1),
        _corner("offset-too-large", fault="offset too large", rows=512, seed=1),
        _corner("id-too-large-sampled", form="sampled", fault="id too large", seed=1),
        _corner("float32", dtype="float32", rows=300, columns=200, width=40, block_rows=48, block_columns=17),
        _corner("blocks-of-one", dtype="float32", rows=9, columns=7, width=5, block_rows=1, block_columns=1),
        _corner(
            "largest-blocks", form="A^T B", dtype="float32", rows=300, columns=500, block_rows=256, block_columns=256
        ),
    )
}
