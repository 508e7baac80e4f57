"""The differentiable block-sparse products: two bilinear primitives -> `native`, or `xla`.

Stands between `api`, which validates and picks an implementation, and the implementations. The derivatives of each
product are calls of the two, so that all of them nest, in forward mode and in reverse.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import compat
from jax_bsk.core.arrays import is_traced
from jax_bsk.core.bilinear import BilinearPrimitive, lead_of, one_by_one
from jax_bsk.matmul import ffi
from jax_bsk.matmul import xla as reference
from jax_bsk.matmul.bsr_lists import ProductLists, column_lists_of
from jax_bsk.matmul.native import (
    PRODUCT,
    SAMPLED,
    ProductCall,
    SampledCall,
    product_result,
    sampled_result,
)

# The operands of both primitives are two factors (the blocks and a dense matrix, or two dense ones), then indptr,
# indices, row_ids, and (where they are known) the three lists by columns.
PRODUCT_RANKS, SAMPLED_RANKS = (3, 2), (2, 2)


def product(call: ProductCall, data: Any, lists: ProductLists, dense: Any) -> jax.Array:
    """A product with a block-sparse matrix, as its attributes say.

    Args:
      call: Static part.
      data: [entries, bm, bk].
      lists: Their places.
      dense: [contracted, N], or [N, contracted] with `dense_left`, of the same type.

    Returns:
      [out, N], or [N, out], in `out_dtype`.
    """
    data, dense = compat.match_varying(jnp.asarray(data), jnp.asarray(dense))
    return _bind_product(call, data, dense, _operands(lists))


def sampled(call: SampledCall, left: Any, right: Any, lists: ProductLists) -> jax.Array:
    """The blocks [entries, bm, bk] of a product of dense matrices at the places of a pattern, in `out_dtype`."""
    left, right = compat.match_varying(jnp.asarray(left), jnp.asarray(right))
    return _sampled_p.bind(left, right, *_operands(lists), call=call)


def has_values(*factors: Any) -> bool:
    """Whether a product of these factors is computed now, and not traced."""
    return not any(is_traced(x) for x in factors)


def _operands(lists: ProductLists) -> tuple[Any, ...]:
    return (lists.indptr, lists.indices, lists.row_ids, *(lists.column_lists or ()))


def _bind_product(call: ProductCall, data: Any, dense: Any, lists: Sequence[Any]) -> jax.Array:
    """A product of operands with leading dimensions; makes the lists by columns where a kernel will walk them."""
    if call.native and call.attributes.transposed and len(lists) == 3:
        count = -(-call.shape[1] // data.shape[-1])
        make = functools.partial(column_lists_of, columns=count)
        lists = (*lists, *one_by_one(lambda _, indices, rows: make(rows, indices), (1, 1, 1), *lists))
    return _product_p.bind(data, dense, *lists, call=call)


def _swap(x: Any) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)


# --- The product


def _product_shapes(*args: Any, call: ProductCall):
    return product_result(lead_of(args, _ranks(PRODUCT_RANKS, args)), args[1], call)


def _run_product(call: ProductCall, *args: Any) -> jax.Array:
    run = _native_product if call.native else _reference_product
    return one_by_one(functools.partial(run, call), _ranks(PRODUCT_RANKS, args), *args)


def _native_product(
    call: ProductCall, data: Any, dense: Any, indptr: Any, indices: Any, row_ids: Any, *by_columns: Any
):
    data = reference.without_margins(data, row_ids, indices, call.shape)
    if call.attributes.transposed:
        offsets, ids, places = by_columns
    else:
        offsets, ids, places = indptr, indices, np.arange(data.shape[0], dtype=np.int32)
    (out,) = PRODUCT(call, data, offsets, ids, places, dense)
    return out


def _reference_product(call: ProductCall, data: Any, dense: Any, indptr: Any, indices: Any, row_ids: Any, *_: Any):
    attributes = call.attributes
    matrix = reference.Matrix(data, indptr, indices, row_ids, call.shape)
    operand = dense.T if attributes.dense_left else dense
    out = reference.sparse_times_dense(matrix, operand, transposed=attributes.transposed)
    return (out.T if attributes.dense_left else out).astype(attributes.out_dtype)


def _product_data(call: ProductCall, dout: Any, dense: Any, lists: Sequence[Any]) -> jax.Array:
    """Y = A B: dA = dY B^T. Y = A^T B: dA = B dY^T. Y = X A^T: dA = dY^T X. Y = X A: dA = X^T dY."""
    attributes = call.attributes
    left = attributes.dense_left
    factors = (dense, dout) if attributes.transposed else (dout, dense)
    blocks = ffi.SampledAttributes(left, not left, call.block_size, str(dense.dtype))
    return _sampled_p.bind(*factors, *lists, call=SampledCall(blocks, call.shape, call.native, call.platform))


def _product_dense(call: ProductCall, dout: Any, data: Any, lists: Sequence[Any]) -> jax.Array:
    """The product with the matrix transposed."""
    attributes = call.attributes
    back = dataclasses.replace(attributes, transposed=not attributes.transposed, out_dtype=str(data.dtype))
    return _bind_product(dataclasses.replace(call, attributes=back), data, dout, lists)


_product_p = BilinearPrimitive(
    "jax_bsk_sparse_matmul", PRODUCT_RANKS, _product_shapes, _run_product, (_product_data, _product_dense)
)


# --- The sampled product


def _sampled_shapes(*args: Any, call: SampledCall):
    return sampled_result(lead_of(args, _ranks(SAMPLED_RANKS, args)), args[0], args[3].shape[-1], call)


def _run_sampled(call: SampledCall, *args: Any) -> jax.Array:
    run = _native_sampled if call.native else _reference_sampled
    return one_by_one(functools.partial(run, call), _ranks(SAMPLED_RANKS, args), *args)


def _native_sampled(call: SampledCall, left: Any, right: Any, indptr: Any, indices: Any, row_ids: Any, *_: Any):
    (blocks,) = SAMPLED(call, left, right, row_ids, indices)
    return blocks


def _reference_sampled(call: SampledCall, left: Any, right: Any, indptr: Any, indices: Any, row_ids: Any, *_: Any):
    attributes = call.attributes
    blocks = jax.ShapeDtypeStruct((indices.shape[0], *attributes.block_size), left.dtype)
    pattern = reference.Matrix(blocks, indptr, indices, row_ids, call.shape)
    factors = left.T if attributes.left_transposed else left, right.T if attributes.right_transposed else right
    return reference.sampled(*factors, pattern).astype(attributes.out_dtype)


def _sampled_left(call: SampledCall, dblocks: Any, right: Any, lists: Sequence[Any]) -> jax.Array:
    """C = (L R) at the pattern: dL = dC R^T, as L lies."""
    attributes = call.attributes
    dense = right if attributes.right_transposed != attributes.left_transposed else _swap(right)
    return _times(call, dblocks, dense, lists, transposed=False, dense_left=attributes.left_transposed)


def _sampled_right(call: SampledCall, dblocks: Any, left: Any, lists: Sequence[Any]) -> jax.Array:
    """C = (L R) at the pattern: dR = L^T dC, as R lies."""
    attributes = call.attributes
    dense = left if attributes.right_transposed != attributes.left_transposed else _swap(left)
    return _times(call, dblocks, dense, lists, transposed=True, dense_left=not attributes.right_transposed)


def _times(call: SampledCall, blocks: Any, dense: Any, lists: Any, *, transposed: bool, dense_left: bool) -> jax.Array:
    numbers = ffi.ProductAttributes(*call.shape, transposed, dense_left, str(dense.dtype))
    block_size = call.attributes.block_size
    return _bind_product(ProductCall(numbers, block_size, call.native, call.platform), blocks, dense, lists)


_sampled_p = BilinearPrimitive(
    "jax_bsk_sampled_matmul", SAMPLED_RANKS, _sampled_shapes, _run_sampled, (_sampled_left, _sampled_right)
)


def _ranks(factors: tuple[int, int], operands: Sequence[Any]) -> tuple[int, ...]:
    return (*factors, *(1 for _ in operands[2:]))
