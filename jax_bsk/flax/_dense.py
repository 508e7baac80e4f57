"""What the block-sparse dense layers of Linen and NNX share: patterns, initial blocks, the product.

A layer's parameter is the array of its blocks alone. Where they lie is a `BlockPattern`, a hashable constant: known
when a program is compiled, no part of the state, not saved with it. Nothing here is of Flax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core.arrays import is_traced, of_rank
from jax_bsk.flax._attention_fn import Implementation
from jax_bsk.matmul.api import sparse_matmul
from jax_bsk.matmul.bsr import BSR, pair_of
from jax_bsk.matmul.bsr_lists import StaticLists
from jax_bsk.matmul.pruning import Norm, balanced_mask, magnitude_mask

DEFAULT_BLOCK_SIZE = 128


@dataclasses.dataclass(frozen=True)
class BlockPattern:
    """Which blocks of a matrix are stored, row by row with ids ascending: equal patterns have equal lists and hashes.

    Attributes:
      grid: Rows and columns of blocks.
      block_size: (bm, bk).
      bits: A bit for each block, row-major, packed; bytes, as they are hashed once and compared fast.
      shape: (M, K) of the matrix; None fits any with such a grid.
    """

    grid: tuple[int, int]
    block_size: tuple[int, int]
    bits: bytes = dataclasses.field(repr=False)
    shape: tuple[int, int] | None = None

    @classmethod
    def of(cls, pattern: Any, block_size: int | tuple[int, int] | None = None) -> BlockPattern:
        """Of a bool [rows of blocks, columns of blocks], of a BSR's lists, or of a pattern (itself).

        Raises:
          ValueError: no matrix; a block size other than the BSR's; lists that name a block twice, or one out of range.
          TypeError: a traced pattern, or an array that is not bool.
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
        """bool [rows of blocks, columns of blocks], read-only: what is to be saved beside a checkpoint."""
        mask = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=self.grid[0] * self.grid[1])
        mask = mask.astype(bool).reshape(self.grid)
        mask.flags.writeable = False
        return mask

    @functools.cached_property
    def lists(self) -> tuple[np.ndarray, np.ndarray]:
        """indptr and indices, as of a `BSR`."""
        indptr = np.concatenate([[0], self.mask.sum(1).cumsum()]).astype(np.int32)
        return indptr, np.nonzero(self.mask)[1].astype(np.int32)

    @functools.cached_property
    def _static_lists(self) -> StaticLists:
        """Kept alive for all matrices of the pattern, which share what is made of it."""
        return StaticLists.of(*self.lists, self.grid[1])

    @property
    def entries(self) -> int:
        """Stored blocks."""
        return self.lists[1].size

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        return self.entries / max(self.mask.size, 1)

    def for_shape(self, shape: tuple[int, int]) -> BlockPattern:
        """The same blocks, of a matrix of that shape."""
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
        """The matrix with these blocks [entries, bm, bk]; the pattern must have a shape."""
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
    """The pattern that a layer's arguments describe, for a kernel of that shape."""
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
    draw: Callable[[jax.Array, tuple[int, int]], jax.Array], key: jax.Array, pattern: BlockPattern, dtype: Any
) -> jax.Array:
    """The blocks of a new kernel: each output's stored inputs look like those of a dense layer with no others.

    An initializer reads fan_in and fan_out off the shape it is given. So it is given that of a dense kernel [stored
    inputs of an output, stored outputs of an input], as often as there are outputs to fill, and lecun_normal has the
    variance 1 / stored inputs: the dense one's over the density.

    Args:
      draw: An initializer: (key, [inputs, outputs]) to an array of that shape.
      key: Of its numbers.
      pattern: With a shape.
      dtype: Of the result.

    Returns:
      [entries, bm, bk], 0 where blocks stick out of the matrix.
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
    """Some columns of blocks out of kernels [times, inputs, outputs]: [columns * rows of blocks, bm, bk]."""
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
    dtype: Any,
    implementation: Implementation | None,
) -> jax.Array:
    """inputs [..., M] @ the matrix [M, K] of the blocks + bias [K], in the type `dtype` or what they promote to."""
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
    """The pattern and the blocks that are left of a dense kernel: those of largest norm, or those of a pattern."""
    if kernel.ndim != 2:
        raise ValueError(f"the kernel of a dense layer is [in_features, features], got {kernel.shape}")
    if density is not None and pattern is None:
        block_size = DEFAULT_BLOCK_SIZE if block_size is None else block_size
        density, pattern = None, magnitude_mask(kernel, density, block_size, norm)
    chosen = resolve_pattern(kernel.shape, density, pattern, block_size, 0)
    return chosen, jnp.asarray(BSR.from_dense(kernel, chosen.block_size, keep=chosen.mask).data)
