"""The calls of block-sparse products as `csrc/matmul` knows them: names, operands, attributes and workspaces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_bsk.core import library
from jax_bsk.core.dims import Dims

MATMUL_PRODUCT = "jax_bsk_matmul_product"
MATMUL_SAMPLED = "jax_bsk_matmul_sampled"


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
        """The attributes of the custom call."""
        return {
            "rows": np.int64(self.rows),
            "columns": np.int64(self.columns),
            "transposed": np.bool_(self.transposed),
            "dense_left": np.bool_(self.dense_left),
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
        """The attributes of the custom call."""
        return {
            "left_transposed": np.bool_(self.left_transposed),
            "right_transposed": np.bool_(self.right_transposed),
        }


# Letters (`core.dims`): N the dense factor's free dimension, M the result's in whole blocks, K the contracted one.


def product_dims(attributes: ProductAttributes) -> Dims:
    """Dimensions of a product."""
    left = attributes.dense_left
    return Dims(
        operands={"data": "...", "offsets": ".", "ids": ".", "places": ".", "dense": "NK" if left else "KN"},
        results={"out": "NM" if left else "MN"},
        shared=(("data", "offsets", "ids", "places"), ("dense",)),
        follow=("out", "dense"),
    )


def sampled_dims(attributes: SampledAttributes) -> Dims:
    """Dimensions of a sampled product."""
    return Dims(
        operands={
            "left": "K." if attributes.left_transposed else ".K",
            "right": ".K" if attributes.right_transposed else "K.",
            "row_ids": ".",
            "column_ids": ".",
        },
        results={"blocks": "..."},
        shared=(("left",), ("right",), ("row_ids", "column_ids")),
        follow=("blocks", "left", "right"),
    )


def product_workspace(offsets_shape: Sequence[int]) -> int:
    """Bytes of a product's workspace on CUDA."""
    *lead, offsets = offsets_shape
    return library.workspace(MATMUL_PRODUCT, matrix_batch=math.prod(lead), out_blocks=offsets - 1)


def sampled_workspace(row_ids_shape: Sequence[int]) -> int:
    """Bytes of a sampled product's workspace on CUDA."""
    *lead, entries = row_ids_shape
    return library.workspace(MATMUL_SAMPLED, list_batch=math.prod(lead), capacity=entries)
