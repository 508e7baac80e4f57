"""The native block-sparse products.

Stands between `products`, whose primitives have the derivatives, and the two native calls (`ffi`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk.core import library
from jax_bsk.core.native_call import Avals, NativeCall, like
from jax_bsk.matmul import ffi, refusals
from jax_bsk.matmul.sharding import ProductSplitting, SampledSplitting


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

    function = "sparse_matmul"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.attributes.rows, self.attributes.columns


@dataclasses.dataclass(frozen=True)
class SampledCall:
    """Static part of a sampled product, as `ProductCall`; `shape` is that of the pattern."""

    attributes: ffi.SampledAttributes
    shape: tuple[int, int]
    native: bool
    platform: str | None = None

    function = "sampled_matmul"

    @property
    def block_size(self) -> tuple[int, int]:
        """(bm, bk) of the pattern."""
        return self.attributes.block_size


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


def _product_shapes(*args: Any, call: ProductCall) -> tuple[Any, ...]:
    lead = ffi.product_dims(call.attributes).lead([x.shape for x in args])
    return (product_result(lead, args[4], call),)


def _sampled_shapes(*args: Any, call: SampledCall) -> tuple[Any, ...]:
    lead = ffi.sampled_dims(call.attributes).lead([x.shape for x in args])
    return (sampled_result(lead, args[0], args[2].shape[-1], call),)


# --- Sizes: on CUDA the copy engine takes rows of whole 16 bytes, so operands of other sizes are padded first


def _up(size: int) -> int:
    """To a whole number of 16 bytes of 16-bit elements."""
    return -(-size // 8) * 8


def _pad_to(x: Any, shape: Sequence[int]) -> Any:
    return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


def _adapt_product(platform: str, avals: Avals, call: ProductCall) -> Callable[..., list[jax.Array]] | None:
    dense, attributes = avals[4].shape, call.attributes
    left, length = attributes.dense_left, attributes.columns if attributes.transposed else attributes.rows
    if platform != "cuda" or (dense[-1] % 8 == 0 and (not left or length % 8 == 0)):
        return None
    if not left and dense[-1] == 1:  # a column lies as a row does, which needs no more of them beside it
        rows = dataclasses.replace(attributes, dense_left=True)
        call = ProductCall(rows, avals[0].shape[-2:], native=True)

        def as_a_row(*args: jax.Array) -> list[jax.Array]:
            (out,) = PRODUCT.bind(call, *args[:4], jnp.swapaxes(args[4], -1, -2))
            return [jnp.swapaxes(out, -1, -2)]

        return as_a_row
    if left:  # a matrix a few columns larger still has as many blocks: these are of whole multiples of 8
        attributes = dataclasses.replace(attributes, rows=_up(attributes.rows), columns=_up(attributes.columns))
    larger = ProductCall(attributes, avals[0].shape[-2:], native=True)

    def padded(*args: jax.Array) -> list[jax.Array]:
        (out,) = PRODUCT.bind(larger, *args[:4], _pad_to(args[4], (*dense[:-1], _up(dense[-1]))))
        return [out[..., :length] if left else out[..., : dense[-1]]]

    return padded


def _adapt_sampled(platform: str, avals: Avals, call: SampledCall) -> Callable[..., list[jax.Array]] | None:
    left, right, attributes = avals[0].shape, avals[1].shape, call.attributes
    if platform != "cuda" or (left[-1] % 8 == 0 and right[-1] % 8 == 0):
        return None

    def padded(*args: jax.Array) -> list[jax.Array]:
        # Both factors alike along the contracted length; what is added to the others is cut by the pattern's blocks.
        sizes = [[*left[:-1], _up(left[-1])], [*right[:-1], _up(right[-1])]]
        depth = -1 if not attributes.left_transposed else -2, -1 if attributes.right_transposed else -2
        deep = _up(left[depth[0]])
        sizes[0][depth[0]] = sizes[1][depth[1]] = deep
        factors = [_pad_to(x, shape) for x, shape in zip(args[:2], sizes, strict=True)]
        return list(SAMPLED.bind(SampledCall(attributes, (0, 0), native=True), *factors, *args[2:]))

    return padded


def _refusals(platform: str, avals: Avals, call: ProductCall | SampledCall) -> list[str]:
    facts = refusals.MatmulFacts(call.function, avals[0].dtype.name, call.block_size)
    return facts.problems(platform, library.limits(platform))


PRODUCT = NativeCall(
    ffi.MATMUL_PRODUCT,
    dims=lambda call: ffi.product_dims(call.attributes),
    shapes=_product_shapes,
    attributes=lambda call: call.attributes.encode(),
    workspace=lambda avals, call: ffi.product_workspace(avals[1].shape),
    refusals=_refusals,
    adapt=_adapt_product,
    splitting=ProductSplitting(),
)
SAMPLED = NativeCall(
    ffi.MATMUL_SAMPLED,
    dims=lambda call: ffi.sampled_dims(call.attributes),
    shapes=_sampled_shapes,
    attributes=lambda call: call.attributes.encode(),
    workspace=lambda avals, call: ffi.sampled_workspace(avals[2].shape),
    refusals=_refusals,
    adapt=_adapt_sampled,
    splitting=SampledSplitting(),
)
