"""Choice of the blocks of a weight that are stored: the largest ones, or some spread evenly; and a pruning schedule.

The module stands above `bsr.py`. A mask here is a boolean array [rows of blocks, columns of blocks], which
`BSR.from_dense` takes as `keep`. Everything runs on the host in NumPy, outside of `jit`, because the number of blocks
decides the sizes of arrays.

Sources for weights in blocks: Gray, Radford and Kingma, "GPU Kernels for Block-Sparse Weights" (2017), and Narang,
Undersander and Diamos, "Block-Sparse Recurrent Neural Networks" (arXiv 1711.02782), which prunes them by magnitude.
"""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np

from jax_bsk.core.arrays import is_traced
from jax_bsk.matmul.bsr import BSR, pair_of

Norm = Literal["l2", "l1", "max"]

# Norms of the blocks of one row, [bm, columns of blocks, bk]. The zeros that pad the matrix to whole blocks add
# nothing.
_NORMS = {
    "l2": lambda rows: np.sqrt((rows * rows).sum((0, 2))),
    "l1": lambda rows: np.abs(rows).sum((0, 2)),
    "max": lambda rows: np.abs(rows).max((0, 2)),
}


def magnitude_mask(
    kernel: jax.Array | np.ndarray, density: float, block_size: int | tuple[int, int] = 128, norm: Norm = "l2"
) -> np.ndarray:
    """Returns a mask of the blocks of largest norm in the whole matrix (arXiv 1711.02782).

    A row or column of blocks may lose all of its blocks. A block that sticks out of the matrix counts with its part
    inside.

    Args:
      kernel: Array [M, K] of any real type; norms are computed in float64.
      density: Number of kept blocks / number of all blocks, in [0, 1]; the count is rounded to a whole block.
      block_size: Side of a block, or (rows, columns).
      norm: Norm of a block: "l2" (which a group lasso penalises), "l1", or "max" (arXiv 1711.02782, section 3).

    Returns:
      A boolean array [rows of blocks, columns of blocks]. Of equal norms the first in row-major order is kept.

    Raises:
      ValueError: The kernel is not a matrix or has a NaN, the density is outside of [0, 1], or there is no such norm.
      TypeError: The kernel is traced.

    Examples:
      >>> import numpy as np
      >>> from jax_bsk import pruning
      >>> kernel = np.kron([[1.0, 4.0], [3.0, 2.0]], np.ones((32, 32)))
      >>> pruning.magnitude_mask(kernel, density=0.5, block_size=32)
      array([[False,  True],
             [ True, False]])
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


def prune(
    kernel: jax.Array | np.ndarray, density: float, block_size: int | tuple[int, int] = 128, norm: Norm = "l2"
) -> BSR:
    """Keeps the blocks of largest norm of a matrix (arXiv 1711.02782).

    Args:
      kernel: Array [M, K] of any real type.
      density: Number of kept blocks / number of all blocks, in [0, 1].
      block_size: Side of a block, or (rows, columns).
      norm: Norm of a block, as in `magnitude_mask`.

    Returns:
      A `BSR` of shape [M, K] and the kernel's type, with the blocks that `magnitude_mask` names.

    Raises:
      ValueError, TypeError: As in `magnitude_mask`.

    Examples:
      >>> import numpy as np
      >>> from jax_bsk import pruning
      >>> kernel = np.kron([[1.0, 4.0], [3.0, 2.0]], np.ones((32, 32), np.float32)).astype(np.float32)
      >>> pruning.prune(kernel, density=0.25, block_size=32)
      BSR(shape=(64, 64), block_size=(32, 32), entries=1, dtype=float32)
    """
    return BSR.from_dense(kernel, block_size, keep=magnitude_mask(kernel, density, block_size, norm))


def balanced_mask(rows: int, columns: int, density: float, seed: int = 0) -> np.ndarray:
    """Draws blocks at random so that all rows have equally many, and all columns too, to within one block.

    Every input then takes part, every output has as many inputs as the others (so that one variance suits all
    weights), and no row takes longer than another. The function starts from diagonals, which fill both sides evenly,
    and trades blocks between pairs of rows. Trades keep all counts, and many of them make all such masks equally
    likely: the "curveball" algorithm of Strona et al., "A fast and unbiased procedure to randomize ecological binary
    matrices with fixed row and column totals" (Nature Communications 5, 2014).

    Args:
      rows: Number of rows of blocks.
      columns: Number of columns of blocks.
      density: Number of stored blocks / number of all blocks; the count is rounded to a whole block.
      seed: Seed of the draw. Equal arguments give the same mask in every version of NumPy, on which checkpoints depend.

    Returns:
      A boolean array [rows, columns].

    Raises:
      ValueError: The density is outside of [0, 1], or so low that some row or column would have no block.

    Examples:
      >>> from jax_bsk import pruning
      >>> mask = pruning.balanced_mask(4, 8, density=0.25)
      >>> mask.sum(axis=1), mask.sum(axis=0)
      (array([2, 2, 2, 2]), array([1, 1, 1, 1, 1, 1, 1, 1]))
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
    """Returns the density at a step of gradual pruning, which falls as a cubic, fast at first.

    The schedule is equation 1 of Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), written for density =
    1 - sparsity.

    Args:
      step: Step of training; any integer.
      begin: Step up to which the density is `initial_density`.
      end: Step from which the density is `density`.
      density: Density at the end.
      initial_density: Density at the beginning.

    Returns:
      The density at that step.

    Raises:
      ValueError: `end` is not after `begin`.

    Examples:
      >>> from jax_bsk import pruning
      >>> [round(pruning.cubic_density(step, begin=100, end=200, density=0.2), 3) for step in (0, 150, 300)]
      [1.0, 0.3, 0.2]
    """
    if end <= begin:
        raise ValueError(f"pruning begins before it ends, got begin={begin} and end={end}")
    done = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return density + (initial_density - density) * (1.0 - done) ** 3


def _count_of(density: float, rows: int, columns: int) -> int:
    if not 0 <= density <= 1:
        raise ValueError(f"density is stored blocks / all blocks, in [0, 1], got {density}")
    return round(density * rows * columns)
