"""Common parts of the block-sparse dense layers of Linen and NNX: patterns, initial blocks, and the product.

A layer's parameter is the array of its blocks alone. A `BlockPattern` tells where the blocks are. It is a hashable
constant, known when a program is compiled; it is no part of the state and not saved with it. Nothing here needs Flax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_bsk.core.arrays import is_traced, of_rank
from jax_bsk.core.dispatch import Implementation
from jax_bsk.matmul.api import sparse_matmul
from jax_bsk.matmul.bsr import BSR, pair_of
from jax_bsk.matmul.bsr_lists import StaticLists
from jax_bsk.matmul.pruning import Norm, balanced_mask, magnitude_mask

DEFAULT_BLOCK_SIZE = 128


@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """Places of the stored blocks of a matrix, row by row, with ascending ids. Equal patterns have equal hashes.

    Attributes:
      grid: Numbers of rows and columns of blocks.
      block_size: (bm, bk).
      bits: Packed bits, one per block in row-major order. They are bytes, which are hashed once and compared fast.
      shape: (M, K) of the matrix; None fits every matrix with that grid.
    """

    grid: tuple[int, int]
    block_size: tuple[int, int]
    bits: bytes = dataclasses.field(repr=False)
    shape: tuple[int, int] | None = None

    @classmethod
    def of(cls, pattern: Any, block_size: int | tuple[int, int] | None = None) -> BlockPattern:
        """Makes a pattern of booleans [rows of blocks, columns of blocks] or of a BSR's lists; takes a pattern as is.

        Raises:
          ValueError: The array is no matrix, the block size is not the BSR's, or the lists name a block twice or one
            that is out of range.
          TypeError: The pattern is traced, or an array that is not boolean.
        """
        if isinstance(pattern, BlockPattern | BSR):
            if block_size is not None and pair_of(block_size) != pattern.block_size:
                raise ValueError(f"pattern has blocks of {pattern.block_size}, so leave out block_size={block_size}")
            if isinstance(pattern, BlockPattern):
                return pattern
            return cls._of_mask(_mask_of_lists(pattern), pattern.block_size, pattern.shape)
        if is_traced(pattern):
            raise TypeError("the pattern decides the sizes of arrays, but this one is traced; make it outside of jit")
        mask = np.asarray(pattern)
        if mask.dtype != np.bool_:
            raise TypeError(f"pattern is boolean (kernel != 0, or jax_bsk.pruning.magnitude_mask), got {mask.dtype}")
        if mask.ndim != 2:
            raise ValueError(f"pattern is a bool for each block, [rows, columns of blocks], got {mask.shape}")
        return cls._of_mask(mask, pair_of(DEFAULT_BLOCK_SIZE if block_size is None else block_size), None)

    @classmethod
    def _of_mask(cls, mask: np.ndarray, block_size: tuple[int, int], shape: tuple[int, int] | None) -> BlockPattern:
        return cls((mask.shape[0], mask.shape[1]), block_size, np.packbits(mask).tobytes(), shape)

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """Read-only booleans [rows of blocks, columns of blocks], which can be saved beside a checkpoint."""
        mask = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.grid[0] * self.grid[1])
        mask = mask.astype(bool).reshape(self.grid)
        mask.flags.writeable = False
        return mask

    @functools.cached_property
    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """`indptr` and `indices`, as in a `BSR`."""
        indptr = np.concatenate([[0], self.mask.sum(1).cumsum()]).astype(np.int32)
        return indptr, np.nonzero(self.mask)[1].astype(np.int32)

    @functools.cached_property
    def _static_lists(self) -> StaticLists:
        """Lists that all matrices of the pattern share, with everything that is made of them."""
        return StaticLists.of(*self.lists, self.grid[1])

    @property
    def entries(self) -> int:
        """Number of stored blocks."""
        return self.lists[1].size

    @property
    def density(self) -> float:
        """Number of stored blocks / number of all blocks."""
        return self.entries / max(self.mask.size, 1)

    def for_shape(self, shape: tuple[int, int]) -> BlockPattern:
        """Returns the same blocks for a matrix of that shape.

        Raises:
          ValueError: A matrix of that shape has another grid of blocks.
        """
        if self.shape == shape:
            return self
        grid = -(-shape[0] // self.block_size[0]), -(-shape[1] // self.block_size[1])
        if self.grid != grid or self.shape is not None:
            raise ValueError(
                f"a kernel [in_features, features] = {shape} has {grid} blocks of {self.block_size}, but the pattern "
                f"is {self.grid}{f' of a matrix {self.shape}' if self.shape else ''}; give a pattern of that kernel, "
                "or the block_size that it was made for"
            )
        return dataclasses.replace(self, shape=shape)

    def matrix(self, data: Any) -> BSR:
        """Returns the matrix with these blocks [entries, bm, bk]; the pattern must have a shape."""
        assert self.shape is not None
        if data.shape != (self.entries, *self.block_size):
            raise ValueError(
                f"kernel is {data.shape}, but the pattern has {self.entries} blocks of {self.block_size}: parameters "
                "fit the pattern that they were made with; give that density, seed and block_size, or its saved mask"
            )
        lists = self._static_lists
        return BSR(data, lists.indptr, lists.indices, self.shape)


def _mask_of_lists(matrix: BSR) -> np.ndarray:
    matrix.check()
    rows, indices = np.asarray(matrix.row_ids()), np.asarray(matrix.indices)
    mask = np.zeros(matrix.grid, bool)
    mask[rows[rows >= 0], indices[rows >= 0]] = True
    order = rows[rows >= 0] * matrix.grid[1] + indices[rows >= 0]
    if (np.diff(order) <= 0).any() or order.size != matrix.entries:
        raise ValueError(
            "a layer's blocks are in order, each once, with no room to spare; make the BSR by BSR.from_dense or "
            "from_scipy, or give its mask"
        )
    return mask


def resolve_pattern(
    shape: tuple[int, int],
    density: float | None,
    pattern: Any,
    block_size: int | tuple[int, int] | None,
    seed: int,
) -> BlockPattern:
    """Returns the pattern that the arguments of a layer describe, for a kernel of that shape."""
    if (density is None) == (pattern is None):
        raise ValueError(
            "give either density (drawn from seed) or pattern (a bool for each block, or a BSR); "
            f"got density={density} and {'no pattern' if pattern is None else 'a pattern'}"
        )
    if density is None:
        return BlockPattern.of(pattern, block_size).for_shape(shape)
    return _drawn(shape, density, pair_of(DEFAULT_BLOCK_SIZE if block_size is None else block_size), seed)


@functools.lru_cache(64)  # Linen asks in each call
def _drawn(shape: tuple[int, int], density: float, block_size: tuple[int, int], seed: int) -> BlockPattern:
    rows, columns = -(-shape[0] // block_size[0]), -(-shape[1] // block_size[1])
    return BlockPattern._of_mask(balanced_mask(rows, columns, density, seed), block_size, shape)


def initial_blocks(
    draw: Callable[[jax.Array, tuple[int, int]], jax.Array], key: jax.Array, pattern: BlockPattern, dtype: DTypeLike
) -> jax.Array:
    """Draws the blocks of a new kernel as a dense layer would be drawn that has only an output's stored inputs.

    An initializer reads fan_in and fan_out off the shape that it is given. It is therefore given the shape of a dense
    kernel [stored inputs of an output, stored outputs of an input], as often as there are outputs to fill. lecun_normal
    then has the variance 1 / stored inputs, which is that of the dense kernel divided by the density.

    Args:
      draw: Initializer, a function of a key and a shape [inputs, outputs] that returns an array of that shape.
      key: Key of the random numbers.
      pattern: Pattern that has a shape.
      dtype: Type of the result.

    Returns:
      Array [entries, bm, bk] with 0 where blocks stick out of the matrix.
    """
    assert pattern.shape is not None
    mask, (bm, bk), (m, n) = pattern.mask, pattern.block_size, pattern.shape
    heights = np.minimum(bm, m - np.arange(mask.shape[0]) * bm)
    widths = np.minimum(bk, n - np.arange(mask.shape[1]) * bk)
    inputs = heights @ mask  # of the outputs in each column of blocks
    outputs = max(1, round(inputs @ widths / max(m, 1)))  # of an input, in the mean
    number = (np.cumsum(mask) - 1).reshape(mask.shape)
    fans = np.unique(inputs[inputs > 0]).tolist()  # at most four in a balanced pattern
    parts, places = [jnp.zeros((0, bm, bk), dtype)], [np.zeros(0, int)]
    for draws, fan_in in zip(jax.random.split(key, len(fans)), fans, strict=True):
        columns = np.flatnonzero(inputs == fan_in)
        times = -(-columns.size * bk // outputs)
        kernels = jax.vmap(lambda key, fan_in=fan_in: draw(key, (fan_in, outputs)))(jax.random.split(draws, times))
        parts.append(_cut(kernels.astype(dtype), columns.size, bm, bk))
        places.append(number[:, columns].T[mask[:, columns].T])
    data = jnp.concatenate(parts)[np.argsort(np.concatenate(places))]
    if n % bk:
        inside = pattern.lists[1][:, None] * bk + np.arange(bk) < n
        data = jnp.where(inside[:, None], data, 0)
    return data


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # as one program, made once for the like layers of a model
def _cut(kernels: jax.Array, columns: int, bm: int, bk: int) -> jax.Array:
    """Cuts columns of blocks, [columns * rows of blocks, bm, bk], out of kernels [times, inputs, outputs]."""
    times, fan_in, outputs = kernels.shape
    depth = -(-fan_in // bm)
    kernel = jnp.moveaxis(kernels, 0, 1).reshape(fan_in, times * outputs)[:, : columns * bk]
    # Only a last row of blocks is short, so what is missing is at the end.
    blocks = jnp.pad(kernel, ((0, depth * bm - fan_in), (0, 0))).reshape(depth, bm, columns, bk)
    return blocks.transpose(2, 0, 1, 3).reshape(-1, bm, bk)


def sparse_dense(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    pattern: BlockPattern,
    dtype: DTypeLike | None,
    implementation: Implementation | None,
) -> jax.Array:
    """Computes inputs [..., M] @ matrix [M, K] of the blocks + bias [K], in `dtype` or in the type they promote to."""
    matrix = pattern.matrix(kernel)
    if inputs.ndim < 1 or inputs.shape[-1] != matrix.shape[0]:
        raise ValueError(f"inputs are [..., in_features={matrix.shape[0]}], got {inputs.shape}")
    operands = (inputs, kernel) if bias is None else (inputs, kernel, bias)
    dtype = jnp.result_type(*operands) if dtype is None else dtype
    out = sparse_matmul(inputs.astype(dtype), matrix.astype(dtype), implementation=implementation)
    return out if bias is None else out + of_rank(bias.astype(dtype), out.ndim)


def pruned_dense(
    kernel: Any, density: float | None, pattern: Any, block_size: int | tuple[int, int] | None, norm: Norm
) -> tuple[BlockPattern, jax.Array]:
    """Returns the pattern and the blocks that are kept of a dense kernel: those of largest norm, or of a pattern."""
    if kernel.ndim != 2:
        raise ValueError(f"the kernel of a dense layer is [in_features, features], got {kernel.shape}")
    if density is not None and pattern is None:
        block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
        density, pattern = None, magnitude_mask(kernel, density, block_size, norm)
    chosen = resolve_pattern(kernel.shape, density, pattern, block_size, 0)
    return chosen, jnp.asarray(BSR.from_dense(kernel, chosen.block_size, keep=chosen.mask).data)
