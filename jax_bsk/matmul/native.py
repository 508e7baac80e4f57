"""The native block-sparse products: custom_partitioning -> primitive.

Stands between `_matmul_op`, whose primitives have the derivatives and `vmap`, and `_ffi`, which names the custom calls.
Operands may have leading dimensions, of which each group of them has all or ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding

from jax_bsk.core import compat, library
from jax_bsk.core.bilinear import lead_of
from jax_bsk.core.native_call import like, primitive
from jax_bsk.matmul import ffi, refusals, sharding
from jax_bsk.matmul.sharding import PRODUCT, SAMPLED, CallDims


@dataclasses.dataclass(frozen=True)
class ProductCall:
    """Static part of a product; hashable.

    Attributes:
      attributes: What travels to the kernel.
      block_size: (bm, bk) of the matrix.
      native: Whether a native library computes it, and not plain JAX.
      platform: The only platform it may be lowered for, or None for whichever has a native kernel.
    """

    attributes: ffi.ProductAttributes
    block_size: tuple[int, int]
    native: bool
    platform: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.attributes.rows, self.attributes.columns


@dataclasses.dataclass(frozen=True)
class SampledCall:
    """Static part of a sampled product, as `ProductCall`; `shape` is that of the pattern."""

    attributes: ffi.SampledAttributes
    shape: tuple[int, int]
    native: bool
    platform: str | None = None


# --- Primitives: shape rules and lowerings


def product_result(lead: Sequence[int], dense: Any, call: ProductCall) -> Any:
    """Abstract value of a product's result, from the dense factor's."""
    attributes = call.attributes
    n = dense.ndim - (2 if attributes.dense_left else 1)
    length = attributes.columns if attributes.transposed else attributes.rows
    shape, dims = ((dense.shape[n], length), (n, -1)) if attributes.dense_left else ((length, dense.shape[n]), (-1, n))
    return like(dense, (*lead, *shape), attributes.out_dtype, [*_kept(dense, lead), *dims])


def sampled_result(lead: Sequence[int], left: Any, entries: int, call: SampledCall) -> Any:
    """Abstract value of a sampled product's blocks, from the left factor's."""
    shape = (*lead, entries, *call.attributes.block_size)
    return like(left, shape, call.attributes.out_dtype, [*_kept(left, lead), -1, -1, -1])


def _kept(source: Any, lead: Sequence[int]) -> list[int]:
    """Which leading dims of an operand are those of the result."""
    return [i if source.shape[i] == size else -1 for i, size in enumerate(lead)]


def _product_shapes(*args, call: ProductCall):
    return (product_result(lead_of(args, PRODUCT.ranks), args[4], call),)


def _sampled_shapes(*args, call: SampledCall):
    return (sampled_result(lead_of(args, SAMPLED.ranks), args[0], args[2].shape[-1], call),)


def _aligned(lower, pad):
    """A lowering that on CUDA first brings the operands to sizes the copy engine takes, where they are not."""

    def rule(ctx, operands, attributes, platform):
        padded = pad(ctx.avals_in, attributes) if platform == "cuda" else None
        if padded is None:
            return lower(ctx, operands, attributes, platform)
        return compat.mlir.lower_fun(padded, multiple_results=True)(ctx, *operands)

    return rule


def _up(size: int) -> int:
    """To a whole number of 16 bytes of 16-bit elements."""
    return -(-size // 8) * 8


def _pad_to(x: Any, shape: Sequence[int]) -> Any:
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


def _pad_product(avals, attributes: ffi.ProductAttributes):
    dense = avals[4].shape
    left, length = attributes.dense_left, attributes.columns if attributes.transposed else attributes.rows
    if dense[-1] % 8 == 0 and (not left or length % 8 == 0):
        return None
    call = ProductCall(
        dataclasses.replace(attributes, rows=_up(attributes.rows), columns=_up(attributes.columns))
        if left
        else attributes,
        avals[0].shape[-2:],
        native=True,
    )
    # A matrix a few columns larger still has as many blocks: these are of whole multiples of 8.

    def padded(*args):
        operand = _pad_to(args[4], (*dense[:-1], _up(dense[-1])))
        (out,) = _product_p.bind(*args[:4], operand, call=call)
        return [out[..., :length] if left else out[..., : dense[-1]]]

    return padded


def _pad_sampled(avals, attributes: ffi.SampledAttributes):
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


def _product_problems(platform: str, avals: Sequence[Any], attributes: ffi.ProductAttributes) -> list[str]:
    del attributes
    *_, bm, bk = avals[0].shape
    facts = refusals.MatmulFacts("sparse_matmul", avals[0].dtype.name, (bm, bk))
    return facts.problems(platform, library.limits(platform))


def _sampled_problems(platform: str, avals: Sequence[Any], attributes: ffi.SampledAttributes) -> list[str]:
    facts = refusals.MatmulFacts("sampled_matmul", avals[0].dtype.name, attributes.block_size)
    return facts.problems(platform, library.limits(platform))


_product_p = primitive(
    "jax_bsk_matmul_product", _product_shapes, _aligned(ffi.matmul_product, _pad_product), _product_problems
)
_sampled_p = primitive(
    "jax_bsk_matmul_sampled", _sampled_shapes, _aligned(ffi.matmul_sampled, _pad_sampled), _sampled_problems
)


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
        local = sharding.local_call(dims, call, mesh, args, result_shapes)
        return mesh, lambda operands: local.run(bind, operands), local.results, (local.operands,)

    function.def_partition(
        partition=partition,
        sharding_rule=lambda call, mesh, operands, results: sharding.sharding_rule(dims, call, mesh, operands, results),
    )
    return function


native_product = _partitioned(_product_p, PRODUCT)
native_sampled = _partitioned(_sampled_p, SAMPLED)
