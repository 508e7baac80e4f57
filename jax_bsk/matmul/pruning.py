"""Which blocks of a weight to store: those of largest magnitude, or some spread evenly; and how many at which step.

Above `bsr.py`. A mask here is a bool [rows of blocks, columns of blocks], what `BSR.from_dense` takes as `keep`. All of
it runs on the host in NumPy, outside of `jit`: which blocks there are decides the sizes of arrays.

Weights in blocks: Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights" (2017), and Narang, Undersander and
Diamos, "Block-Sparse Recurrent Neural Networks" (arXiv 1711.02782), which prunes them by magnitude.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from jax_bsk.core.arrays import is_traced
from jax_bsk.matmul.bsr import BSR, pair_of

Norm = Literal["l2", "l1", "max"]

# Of [bm, columns of blocks, bk], each block's. What pads the matrix to whole blocks is 0 and adds nothing.
_NORMS = {
    "l2": lambda rows: np.sqrt((rows * rows).sum((0, 2))),
    "l1": lambda rows: np.abs(rows).sum((0, 2)),
    "max": lambda rows: np.abs(rows).max((0, 2)),
}


def magnitude_mask(
    kernel: Any, density: float, block_size: int | tuple[int, int] = 128, norm: Norm = "l2"
) -> np.ndarray:
    """The blocks of largest norm, over the whole matrix.

    A row or column of blocks may lose all of its own. A block that sticks out of the matrix counts with what is inside.

    Args:
      kernel: [M, K], any real type; the norms are float64.
      density: kept blocks / all blocks, to half a block, in [0, 1].
      block_size: of either side, or (rows, columns).
      norm: of a block: "l2" (what a group lasso penalises), "l1", or "max" (arXiv 1711.02782, section 3).

    Returns:
      bool [rows of blocks, columns of blocks]; of equal norms the first in row-major order is kept.

    Raises:
      ValueError: what is not a matrix, a density outside of [0, 1], a norm of another name, a NaN in the kernel.
      TypeError: a traced kernel.
    """
    if is_traced(kernel):
        raise TypeError("magnitudes decide which blocks there are, so the sizes of arrays; prune outside of jit")
    if norm not in _NORMS:
        raise ValueError(f'norm is "l2", "l1" or "max", got {norm!r}')
    if kernel.ndim != 2:
        raise ValueError(f"kernel is a matrix [M, K], got {kernel.shape}; prune the matrices of a stack one by one")
    bm, bk = pair_of(block_size)
    kernel = np.asarray(kernel)
    m, k = kernel.shape
    rows, columns = -(-m // bm), -(-k // bk)
    count = _count_of(density, rows, columns)
    norms = np.empty((rows, columns))
    for row in range(rows):  # one row of blocks at a time: no float64 copy of the matrix
        part = kernel[row * bm : (row + 1) * bm].astype(np.float64)
        norms[row] = _NORMS[norm](np.pad(part, ((0, 0), (0, columns * bk - k))).reshape(-1, columns, bk))
    if np.isnan(norms).any():
        row, column = np.argwhere(np.isnan(norms))[0]
        raise ValueError(f"block ({row}, {column}) of kernel has a NaN, which has no magnitude; prune finite weights")
    mask = np.zeros(rows * columns, bool)
    mask[np.argsort(-norms, axis=None, kind="stable")[:count]] = True
    return mask.reshape(rows, columns)


def prune(kernel: Any, density: float, block_size: int | tuple[int, int] = 128, norm: Norm = "l2") -> BSR:
    """The blocks that `magnitude_mask` names, with their numbers: its arguments and errors."""
    return BSR.from_dense(kernel, block_size, keep=magnitude_mask(kernel, density, block_size, norm))


def balanced_mask(rows: int, columns: int, density: float, seed: int = 0) -> np.ndarray:
    """Blocks drawn at random under a condition: rows have equally many, and so have columns, to one block.

    So every input takes part, every output has as many inputs as the others (one variance suits them all), and none
    takes longer than the others. Starts from diagonals that fill both sides evenly and trades blocks between pairs of
    rows, which keeps all counts and comes to draw every such mask alike: the "curveball" of Strona et al., "A fast and
    unbiased procedure to randomize ecological binary matrices with fixed row and column totals" (Nature
    Communications 5, 2014).

    Args:
      rows, columns: Of blocks.
      density: stored blocks / all blocks, to half a block.
      seed: The mask is the same for equal arguments, in every version of NumPy: a checkpoint depends on it.

    Returns:
      bool [rows, columns].

    Raises:
      ValueError: a density outside of [0, 1], or so low that some row or column would have no block.
    """
    count = _count_of(density, rows, columns)
    if count < max(rows, columns):
        raise ValueError(
            f"density={density} of {rows} x {columns} blocks is {count}, too few for each row and column to have one; "
            f"take a density of {max(rows, columns) / max(rows * columns, 1):.3g} or more, or smaller blocks, or give "
            "a mask of your own"
        )
    # The legacy generator: its streams are frozen, those of `default_rng` may change between versions (NEP 19).
    random = np.random.RandomState(seed)
    mask = np.zeros((rows, columns), bool)
    # Step t goes to (t mod rows, t mod columns), which is back at its start after lcm steps: then a diagonal further.
    step = np.arange(count)
    mask[step % rows, (step + step // np.lcm(rows, columns)) % columns] = True
    mask = mask[random.permutation(rows)][:, random.permutation(columns)]
    for _ in range(5 * rows if rows > 1 else 0):  # trades a row, as the paper finds to be enough
        pair = random.choice(rows, 2, replace=False)
        first, second = mask[pair]
        of_one = np.flatnonzero(first != second)
        to_first = random.permutation(of_one)[: np.count_nonzero(first & ~second)]
        mask[pair[:, None], of_one] = [[False], [True]]
        mask[pair[:, None], to_first] = [[True], [False]]
    return mask


def cubic_density(step: int, begin: int, end: int, density: float, initial_density: float = 1.0) -> float:
    """Density at a step of gradual pruning: down by a cubic from `begin` to `end`, fast at first.

    Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1, told for density = 1 - sparsity.

    Args:
      step: Of training; any integer.
      begin, end: Steps at which `initial_density` is left and `density` is reached.
      density, initial_density: The final one, and the one before `begin`.
    """
    if end <= begin:
        raise ValueError(f"pruning begins before it ends, got begin={begin} and end={end}")
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return density + (initial_density - density) * (1.0 - done) ** 3


def _count_of(density: float, rows: int, columns: int) -> int:
    if not 0 <= density <= 1:
        raise ValueError(f"density is stored blocks / all blocks, in [0, 1], got {density}")
    return round(density * rows * columns)
