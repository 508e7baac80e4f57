"""The grid of blocks that a mask is asked about, and the class codes by which it answers.

The bottom of the room: everything that knows of query blocks and key blocks stands on this module.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from jax_bsk.core.arrays import Array

# Class codes of a block. The order makes `&` a minimum, and with `~` swapping the ends, `|` its De Morgan dual:
# SHIFT is a partial block whose bit tile depends only on the distance between its query and key block (causal,
# window) and on which parts of the mask are empty or full there: one evaluation serves all such blocks of a diagonal.
# OWN is any other partial block, and wins where the two meet.
EMPTY, OWN, SHIFT, FULL = 0, 1, 2, 3

# Positions, offsets and windows are int32 on every path; sums of two of them must not wrap.
MAX_LENGTH = 2**30


@dataclasses.dataclass(frozen=True)
class Grid:
    """The block grid a mask is asked about, and the array module (`numpy` or `jax.numpy`) that answers."""

    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    xp: ModuleType = np

    @property
    def nq(self) -> int:
        """Number of query blocks."""
        return -(-self.q_len // self.block_q)

    @property
    def nk(self) -> int:
        """Number of key/value blocks."""
        return -(-self.kv_len // self.block_kv)

    def q_bounds(self, i: Array) -> tuple[Any, Any]:
        """First and last query of block `i`, the last one inside the length."""
        return i * self.block_q, self.xp.minimum((i + 1) * self.block_q, self.q_len) - 1

    def kv_bounds(self, j: Array) -> tuple[Any, Any]:
        """First and last key of block `j`, the last one inside the length."""
        return j * self.block_kv, self.xp.minimum((j + 1) * self.block_kv, self.kv_len) - 1

    def clip_q(self, q: Array) -> Any:
        """Indices into an array of `q_len` entries; those past the end (never used) read the last one."""
        return self.xp.minimum(q, self.q_len - 1)

    def clip_kv(self, k: Array) -> Any:
        """Indices into an array of `kv_len` entries; those past the end (never used) read the last one."""
        return self.xp.minimum(k, self.kv_len - 1)

    def code(self, empty: Array, full: Array, partial: int) -> Any:
        """Class codes (int8) of blocks, from two boolean arrays; `partial` is the code of all others."""
        xp = self.xp
        return xp.where(full, np.int8(FULL), xp.where(empty, np.int8(EMPTY), np.int8(partial)))


def min_max(grid: Grid, numbers: Array, blocks: int, block: int) -> tuple[Any, Any]:
    """Least and greatest of `numbers` [length] in each block, inside the length."""
    padded = grid.xp.pad(numbers, (0, blocks * block - numbers.shape[0]), mode="edge" if numbers.shape[0] else "empty")
    padded = padded.reshape(blocks, block)
    return padded.min(1), padded.max(1)


def code_not(codes: Array, xp: ModuleType) -> Any:
    """Class codes of `~mask`: the ends swap, both kinds of partial stay."""
    del xp
    return codes ^ ((codes == EMPTY) | (codes == FULL)).astype(np.int8) * np.int8(EMPTY ^ FULL)


def code_and(a: Array, b: Array, xp: ModuleType) -> Any:
    """Class codes of `a & b`."""
    return xp.minimum(a, b)


def code_or(a: Array, b: Array, xp: ModuleType) -> Any:
    """Class codes of `a | b`, by De Morgan."""
    return code_not(xp.minimum(code_not(a, xp), code_not(b, xp)), xp)


def alike(values: np.ndarray) -> np.ndarray:
    """Numbers [n] of the rows of an array [n, m], the same for equal rows."""
    numbers = np.unique(values[:, 0], return_inverse=True)[1].ravel()
    mixed = (values != values[:, :1]).any(1)  # often few, and sorting whole rows takes long
    rows = np.ascontiguousarray(values[mixed]).view(np.dtype((np.void, values.shape[1] * values.itemsize))).ravel()
    numbers[mixed] = np.unique(rows, return_inverse=True)[1].ravel() + numbers.max(initial=0) + 1
    return numbers


def in_blocks(values: np.ndarray, blocks: int, block: int) -> np.ndarray:
    """A host array [tokens] as [blocks, block], the last value repeated past the end."""
    past = blocks * block - values.shape[0]
    return (np.pad(values, (0, past), mode="edge") if past else values).reshape(blocks, block)


def row_chunks(grid: Grid, blocks: int = 2**18) -> Iterator[slice]:
    """Rows of blocks in chunks of about `blocks` blocks, which bounds the memory of classification."""
    step = max(1, blocks // max(1, grid.nk))
    for start in range(0, grid.nq, step):
        yield slice(start, min(start + step, grid.nq))


def grid_of(q_len: int, kv_len: int | None, block_size: int | tuple[int, int]) -> Grid:
    """A checked grid; `kv_len` is `q_len` where it is None.

    Raises:
      TypeError: where a size is no int.
      ValueError: where a length is not in [0, 2^30), or a block size no multiple of 32.
    """
    q_len = _length(q_len, "q_len")
    kv_len = q_len if kv_len is None else _length(kv_len, "kv_len")
    pair = block_size if isinstance(block_size, tuple | list) else (block_size, block_size)
    try:
        block_q, block_kv = (operator.index(size) for size in pair)
    except (TypeError, ValueError):
        raise TypeError(f"block_size must be an int or a (query, key) pair of ints, given {block_size!r}") from None
    if min(block_q, block_kv) < 32 or block_q % 32 or block_kv % 32:
        raise ValueError(f"block_size must be a positive multiple of 32, given {block_size!r}; 128 suits most")
    return Grid(q_len, kv_len, block_q, block_kv)


def _length(value: Any, name: str) -> int:
    try:
        length = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, given {type(value).__name__} {value!r}") from None
    if not 0 <= length < MAX_LENGTH:
        raise ValueError(f"{name} must be in [0, 2**30), given {length}")
    return length
