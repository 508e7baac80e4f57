"""Lowering of the block-sparse products: names of targets and attributes, and the order of operands (`csrc/matmul`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from jax_bsk.core.library import MATMUL_PRODUCT, MATMUL_SAMPLED
from jax_bsk.core.version import __version__


@dataclasses.dataclass(frozen=True)
class ProductAttributes:
    """Static numbers of a product with a sparse matrix.

    Attributes:
      rows: Rows of the sparse matrix, M.
      columns: Columns of it, K.
      transposed: Whether the product is with its transpose.
      dense_left: Whether the dense factor lies as [N, contracted] and the result as [N, out], not the other way round.
      out_dtype: Name of the result's type: the factors' or float32.
    """

    rows: int
    columns: int
    transposed: bool
    dense_left: bool
    out_dtype: str

    def encode(self) -> dict[str, Any]:
        return {
            "rows": np.int64(self.rows),
            "columns": np.int64(self.columns),
            "transposed": np.bool_(self.transposed),
            "dense_left": np.bool_(self.dense_left),
            "version": __version__,
        }


@dataclasses.dataclass(frozen=True)
class SampledAttributes:
    """Static numbers of a product at the blocks of a pattern.

    Attributes:
      left_transposed: Whether the left factor lies as [L, M] and not [M, L].
      right_transposed: Whether the right one lies as [K, L] and not [L, K].
      block_size: (bm, bk).
      out_dtype: Name of the blocks' type: the factors' or float32.
    """

    left_transposed: bool
    right_transposed: bool
    block_size: tuple[int, int]
    out_dtype: str

    def encode(self) -> dict[str, Any]:
        return {
            "left_transposed": np.bool_(self.left_transposed),
            "right_transposed": np.bool_(self.right_transposed),
            "version": __version__,
        }


def matmul_product(ctx, operands: Sequence[Any], attributes: ProductAttributes, platform: str):
    """Lowers to the product call.

    Operands: data, offsets, ids, places, dense. Results: out; on CUDA also a workspace, as for attention.
    """
    offsets = ctx.avals_in[1]
    words = 1 + math.prod(offsets.shape[:-1]) * (offsets.shape[-1] - 1)  # csrc/matmul/launch.cu: ProductWorkspace
    return _lower_matmul(MATMUL_PRODUCT, ctx, operands, attributes, platform, words)


def matmul_sampled(ctx, operands: Sequence[Any], attributes: SampledAttributes, platform: str):
    """Lowers to the sampled product's call.

    Operands: left, right, row_ids, column_ids. Results: blocks; on CUDA also a workspace.
    """
    *lead, entries = ctx.avals_in[2].shape
    words = math.prod(lead) * (1 + 2 * entries)  # csrc/matmul/launch.cu: SampledWorkspace
    return _lower_matmul(MATMUL_SAMPLED, ctx, operands, attributes, platform, words)


def _lower_matmul(target, ctx, operands, attributes, platform, words):
    results = list(ctx.avals_out)
    if platform == "cuda":
        results.append(jax.core.ShapedArray((words,), np.dtype(np.int32)))
    lower = jax.ffi.ffi_lowering(target)
    return lower(ctx.replace(avals_out=results), *operands, **attributes.encode())[: len(ctx.avals_out)]
