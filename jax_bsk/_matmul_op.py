"""The differentiable block-sparse products: custom_vjp -> custom_vmap -> custom_partitioning -> primitive.

Stands between `matmul` (which validates and picks an implementation) and `_ffi` (which names the custom calls) or
`_matmul_reference` (plain JAX). `product` and `sampled` are each made of the other in their derivatives, so that they
nest. As for attention, vmap adds leading dimensions to the operands, of which each group of them has all or ones.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

from jax_bsk import _compat, _ffi, _matmul_partition
from jax_bsk import _matmul_reference as reference
from jax_bsk._matmul_partition import PRODUCT, SAMPLED, CallDims
from jax_bsk._native import like, primitive
from jax_bsk.bsr import BSR


class Lists(NamedTuple):
    """Places of the blocks of a matrix.

    Attributes:
      indptr: int32 [rows of blocks + 1].
      indices: int32 [entries].
      row_ids: int32 [entries], -1 past the end.
      columns: The same column by column, as `BSR.columns` has it; None to make it where it is needed.
    """

    indptr: Any
    indices: Any
    row_ids: Any
    columns: tuple[Any, Any, Any] | None


def lists_of(matrix: BSR) -> Lists:
    """The lists of a matrix, with those by columns where they are known or (having values) can be made on the host."""
    return Lists(matrix.indptr, matrix.indices, matrix.row_ids(), matrix.with_column_lists().column_lists)


@dataclasses.dataclass(frozen=True)
class ProductCall:
    """Static part of a product; hashable.

    Attributes:
      attributes: What travels to the kernel.
      native: Whether a native library computes it, and not plain JAX.
      platform: The only platform it may be lowered for, or None for whichever has a native kernel.
    """

    attributes: _ffi.ProductAttributes
    native: bool
    platform: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.attributes.rows, self.attributes.columns


@dataclasses.dataclass(frozen=True)
class SampledCall:
    """Static part of a sampled product, as `ProductCall`; `shape` is that of the pattern."""

    attributes: _ffi.SampledAttributes
    shape: tuple[int, int]
    native: bool
    platform: str | None = None


# --- Primitives: shape rules and lowerings


def _lead(args: Sequence[Any], dims: CallDims) -> tuple[int, ...]:
    """Sizes of the leading dimensions, which each operand has or is 1 along; they may be 0."""
    count = args[0].ndim - dims.ranks[0]
    return np.broadcast_shapes(*(x.shape[:count] for x in args))


def _kept(source: Any, lead: Sequence[int]) -> list[int]:
    """Which leading dims of an operand are those of the result."""
    return [i if source.shape[i] == size else -1 for i, size in enumerate(lead)]


def _product_shapes(*args, call: ProductCall):
    dense, attributes = args[4], call.attributes
    lead = _lead(args, PRODUCT)
    n = dense.ndim - (2 if attributes.dense_left else 1)
    length = attributes.columns if attributes.transposed else attributes.rows
    shape, dims = ((dense.shape[n], length), (n, -1)) if attributes.dense_left else ((length, dense.shape[n]), (-1, n))
    return (like(dense, (*lead, *shape), attributes.out_dtype, [*_kept(dense, lead), *dims]),)


def _sampled_shapes(*args, call: SampledCall):
    lead, attributes = _lead(args, SAMPLED), call.attributes
    shape = (*lead, args[2].shape[-1], *attributes.block_size)
    return (like(args[0], shape, attributes.out_dtype, [*_kept(args[0], lead), -1, -1, -1]),)


def _aligned(lower, pad):
    """A lowering that on CUDA first brings the operands to sizes the copy engine takes, where they are not."""

    def rule(ctx, operands, attributes, platform):
        padded = pad(ctx.avals_in, attributes) if platform == "cuda" else None
        if padded is None:
            return lower(ctx, operands, attributes, platform)
        return _compat.mlir.lower_fun(padded, multiple_results=True)(ctx, *operands)

    return rule


def _up(size: int) -> int:
    """To a whole number of 16 bytes of 16-bit elements."""
    return -(-size // 8) * 8


def _pad_to(x: Any, shape: Sequence[int]) -> Any:
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


def _pad_product(avals, attributes: _ffi.ProductAttributes):
    dense = avals[4].shape
    left, length = attributes.dense_left, attributes.columns if attributes.transposed else attributes.rows
    if dense[-1] % 8 == 0 and (not left or length % 8 == 0):
        return None
    call = ProductCall(
        dataclasses.replace(attributes, rows=_up(attributes.rows), columns=_up(attributes.columns))
        if left
        else attributes,
        native=True,
    )
    # A matrix a few columns larger still has as many blocks: these are of whole multiples of 8.

    def padded(*args):
        operand = _pad_to(args[4], (*dense[:-1], _up(dense[-1])))
        (out,) = _product_p.bind(*args[:4], operand, call=call)
        return [out[..., :length] if left else out[..., : dense[-1]]]

    return padded


def _pad_sampled(avals, attributes: _ffi.SampledAttributes):
    left, right = avals[0].shape, avals[1].shape
    if left[-1] % 8 == 0 and right[-1] % 8 == 0:
        return None

    def padded(*args):
        # Both factors alike along the contracted length; what is added to the others is cut by the pattern's blocks.
        sizes = [[*left[:-1], _up(left[-1])], [*right[:-1], _up(right[-1])]]
        depth = -1 if not attributes.left_transposed else -2, -1 if attributes.right_transposed else -2
        deep = _up(left[depth[0]])
        sizes[0][depth[0]] = sizes[1][depth[1]] = deep
        operands = [_pad_to(x, shape) for x, shape in zip(args[:2], sizes, strict=True)]
        call = SampledCall(attributes, (0, 0), native=True)
        return list(_sampled_p.bind(*operands, *args[2:], call=call))

    return padded


_product_p = primitive("jax_bsk_matmul_product", _product_shapes, _aligned(_ffi.matmul_product, _pad_product))
_sampled_p = primitive("jax_bsk_matmul_sampled", _sampled_shapes, _aligned(_ffi.matmul_sampled, _pad_sampled))


# --- custom_partitioning


def _partitioned(prim, dims: CallDims):
    def bind(call, args):
        return tuple(prim.bind(*args, call=call))

    function = custom_partitioning(bind, static_argnums=(0,))

    def partition(call, mesh, arg_shapes, result_shapes):
        (args,) = arg_shapes
        shardings = [x.sharding for x in (*args, *result_shapes)]
        if not all(isinstance(s, NamedSharding) for s in shardings):  # of a partial-manual shard_map
            return mesh, functools.partial(bind, call), tuple(shardings[len(args) :]), (tuple(shardings[: len(args)]),)
        local = _matmul_partition.local_call(dims, call, mesh, args, result_shapes)
        return mesh, lambda operands: local.run(bind, operands), local.results, (local.operands,)

    function.def_partition(
        partition=partition,
        sharding_rule=lambda call, mesh, operands, results: _matmul_partition.sharding_rule(
            dims, call, mesh, operands, results
        ),
    )
    return function


# --- custom_vmap


def _mapped(partitioned, dims: CallDims):
    @functools.cache
    def function(call):
        @custom_vmap
        def mapped(args):
            return partitioned(call, args)

        @mapped.def_vmap
        def rule(axis_size, in_batched, args):
            (batched,) = in_batched
            args = [x if b else x[None] for x, b in zip(args, batched, strict=True)]
            lead = _lead(args, dims)[1:]
            new = list(args)
            for group in dims.groups:
                mine = any(batched[i] for i in group)
                if not mine and all(math.prod(args[i].shape[1 : 1 + len(lead)]) == 1 for i in group):
                    continue  # shared along all leading dims
                for i in group:
                    own = args[i].shape[1 + len(lead) :]
                    new[i] = jnp.broadcast_to(args[i], (axis_size, *lead, *own))
            results = mapped(tuple(new))
            return results, tuple(True for _ in results)

        return mapped

    return function


_native_product = _mapped(_partitioned(_product_p, PRODUCT), PRODUCT)
_native_sampled = _mapped(_partitioned(_sampled_p, SAMPLED), SAMPLED)


# --- custom_vjp


def product(call: ProductCall, data: Any, lists: Lists, dense: Any) -> jax.Array:
    """A product with a block-sparse matrix, as its attributes say.

    Args:
      call: Static part.
      data: [entries, bm, bk].
      lists: Their places.
      dense: [contracted, N], or [N, contracted] with `dense_left`, of the same type.

    Returns:
      [out, N], or [N, out], in `out_dtype`.
    """
    data, dense = _compat.match_varying(jnp.asarray(data), jnp.asarray(dense))
    return _product(call, data, _as_arrays(lists), dense)


def sampled(call: SampledCall, left: Any, right: Any, lists: Lists) -> jax.Array:
    """The blocks [entries, bm, bk] of a product of dense matrices at the places of a pattern, in `out_dtype`."""
    left, right = _compat.match_varying(jnp.asarray(left), jnp.asarray(right))
    return _sampled(call, left, right, _as_arrays(lists))


def _as_arrays(lists: Lists) -> Lists:
    return jax.tree.map(jnp.asarray, lists)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(call: ProductCall, data, lists: Lists, dense):
    attributes = call.attributes
    matrix = BSR(data, lists.indptr, lists.indices, call.shape)
    if not call.native:
        operand = dense.T if attributes.dense_left else dense
        out = reference.sparse_times_dense(matrix, operand, transposed=attributes.transposed)
        return (out.T if attributes.dense_left else out).astype(attributes.out_dtype)
    if attributes.transposed:
        offsets, ids, places = lists.columns or matrix.columns()
    else:
        offsets, ids, places = lists.indptr, lists.indices, np.arange(matrix.entries, dtype=np.int32)
    operands = (reference.without_margins(matrix, lists.row_ids), offsets, ids, places, dense)
    (out,) = _native_product(call)(tuple(jnp.asarray(x) for x in operands))
    return out


def _product_fwd(call, data, lists, dense):
    return _product(call, data, lists, dense), (data, lists, dense)


def _product_bwd(call: ProductCall, residuals, dout):
    data, lists, dense = residuals
    attributes = call.attributes
    left, transposed = attributes.dense_left, attributes.transposed
    dout = dout.astype(data.dtype)
    back = dataclasses.replace(attributes, transposed=not transposed, out_dtype=str(dense.dtype))
    ddense = product(dataclasses.replace(call, attributes=back), data, lists, dout)
    # Y = A B: dA = dY B^T. Y = A^T B: dA = B dY^T. Y = X A^T: dA = dY^T X. Y = X A: dA = X^T dY.
    factors = (dense, dout) if transposed else (dout, dense)
    blocks = _ffi.SampledAttributes(left, not left, data.shape[-2:], str(data.dtype))
    ddata = sampled(SampledCall(blocks, call.shape, call.native, call.platform), *factors, lists)
    return ddata, None, ddense


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sampled(call: SampledCall, left, right, lists: Lists):
    attributes = call.attributes
    if not call.native:
        blocks = jax.ShapeDtypeStruct((lists.indices.shape[0], *attributes.block_size), left.dtype)
        pattern = BSR(blocks, lists.indptr, lists.indices, call.shape)
        factors = left.T if attributes.left_transposed else left, right.T if attributes.right_transposed else right
        return reference.sampled(*factors, pattern).astype(attributes.out_dtype)
    (blocks,) = _native_sampled(call)((left, right, lists.row_ids, lists.indices))
    return blocks


def _sampled_fwd(call, left, right, lists):
    return _sampled(call, left, right, lists), (left, right, lists)


def _sampled_bwd(call: SampledCall, residuals, dblocks):
    left, right, lists = residuals
    attributes = call.attributes
    left_transposed, right_transposed = attributes.left_transposed, attributes.right_transposed
    dblocks = dblocks.astype(left.dtype)

    def times(dense, transposed: bool, dense_left: bool):
        numbers = _ffi.ProductAttributes(*call.shape, transposed, dense_left, str(left.dtype))
        return product(ProductCall(numbers, call.native, call.platform), dblocks, lists, dense)

    # C = (L R) at the pattern: dL = dC R^T, dR = L^T dC, each as its factor lies.
    dleft = times(right if right_transposed != left_transposed else right.T, False, left_transposed)
    dright = times(left if right_transposed != left_transposed else left.T, True, not right_transposed)
    return dleft, dright, None


_sampled.defvjp(_sampled_fwd, _sampled_bwd)
