"""`BlockDiffusionMask`: training of block diffusion language models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jax_bsk.core.arrays import Array
from jax_bsk.masks.algebra._offsets import static_int
from jax_bsk.masks.algebra._ranges import Interval, RangesMask
from jax_bsk.masks.grid import Grid

__all__ = ["BlockDiffusionMask"]


class BlockDiffusionMask(RangesMask):
    """Noised tokens, then the same tokens clean: attention of block diffusion (Arriola et al., arXiv 2503.09573, 3.1).

    The sequence has 2 * `length` tokens: `length` noised ones, then `length` clean ones, both in blocks of `block`.
    A noised token attends to the noised tokens of its own block and to the clean tokens of the blocks before it. A
    clean token attends to the clean tokens of its own block and of those before it.

    Args:
      length: number of clean tokens, half of the sequence.
      block: tokens of a diffusion block; the last block may be shorter. Independent of the block size of the lists.

    Raises:
      TypeError, ValueError: where one is no int of at least 1; when bound, where the lengths are not 2 * `length`.

    Examples:
      >>> from jax_bsk.masks import BlockDiffusionMask
      >>> BlockDiffusionMask(2, 1).bind(4, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """

    length: int
    block: int

    def __init__(self, length: int, block: int) -> None:
        self._set(
            length=static_int(length, "BlockDiffusionMask", "length", minimum=1),
            block=static_int(block, "BlockDiffusionMask", "block", minimum=1),
        )

    def _validate(self, q_len: int, kv_len: int) -> None:
        for name, given in (("q_len", q_len), ("kv_len", kv_len)):
            if given != 2 * self.length:
                raise ValueError(
                    f"BlockDiffusionMask: length={self.length} needs {name}={2 * self.length}, noised and clean, "
                    f"got {given}; give length={given // 2}"
                )

    def _key_ranges(self, grid: Grid, q: Array) -> Sequence[Interval]:
        length, block = self.length, min(self.block, self.length)
        noised = q < length
        begin = q % length // block * block
        end = grid.xp.minimum(begin + block, length)
        own = grid.xp.where(noised, begin, 0), grid.xp.where(noised, end, 0)
        clean = grid.xp.full(q.shape, length, np.int32), length + grid.xp.where(noised, begin, end)
        return [own, clean]

    def _repr_arguments(self) -> list[str]:
        return [repr(self.length), repr(self.block)]
