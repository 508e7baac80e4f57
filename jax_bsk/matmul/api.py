"""Products with block-sparse matrices: the public functions.

They check what was asked and pick an implementation; `products` has the products and their derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import dispatch
from jax_bsk.core.dispatch import Implementation
from jax_bsk.matmul import ffi, products, refusals
from jax_bsk.matmul.bsr import BSR
from jax_bsk.matmul.native import ProductCall, SampledCall


def sparse_matmul(
    a: Any,
    b: Any,
    *,
    transpose: bool = False,
    preferred_element_type: Any = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """A product of which one factor is block-sparse; only stored blocks are multiplied.

    Letters: M and K rows and columns of the sparse matrix, N columns (or T rows) of the dense one.

    `A @ b` and `x @ A` call it. Letters: M and K are rows and columns of the sparse matrix, N columns (or T rows) of
    the dense one.

    Args:
      a: the left factor: a `BSR` of [M, K], or dense [..., T, M] or [M].
      b: the right one: dense [K, N] or [K], or a `BSR`.
      transpose: take the sparse matrix's transpose; nothing is copied.
      preferred_element_type: type of the result; by default the common type of the factors. Sums are float32 (float64
        where a factor is).
      implementation: "cpu", "cuda" (float16 and bfloat16, blocks of 64 or 128, compute capability 9.0) or "xla"; None
        takes the platform's native kernel, and where that cannot take the call "xla", with one warning that says why.

    Returns:
      a @ b; of one dimension where the dense factor has one. Linear in each factor, and differentiable in both any
      number of times, in forward mode and in reverse (`jax.linear_transpose` and the solvers of
      `jax.scipy.sparse.linalg` work): the gradient of a `BSR` has its blocks alone (the sampled product of
      `sampled_matmul`), no dense gradient is ever made. A row of blocks whose lists cannot be followed is NaN
      where the product walks rows; where it walks columns (`transpose`, or a dense factor on the left, not both) that
      row counts for nothing.

    Raises:
      TypeError: neither or both factors are a `BSR`; boolean blocks; a common type that is not floating point.
      ValueError: sizes that do not fit, an unknown implementation.
      UnsupportedError: the named implementation cannot take the call.
    """
    if isinstance(a, BSR) == isinstance(b, BSR):
        raise TypeError(
            f"a and b must be one a BSR and the other an array, got {type(a).__name__} and {type(b).__name__}; of two "
            "BSRs make one dense with to_dense()"
        )
    left = isinstance(b, BSR)
    matrix, dense = (b, jnp.asarray(a)) if left else (a, jnp.asarray(b))
    matrix.need_blocks("b" if left else "a")
    m, k = matrix.shape[::-1] if transpose else matrix.shape
    if left:
        if dense.ndim < 1 or dense.shape[-1] != m:
            raise ValueError(f"a must be [..., {m}] for b of {(m, k)}, got {dense.shape}; see transpose")
    elif dense.ndim not in (1, 2) or dense.shape[0] != k:
        raise ValueError(
            f"b must be [{k}, N] or [{k}] for a of {(m, k)}, got {dense.shape}; use jax.vmap for batches, and see "
            "transpose"
        )
    common = _common_type("a and b", matrix.dtype, dense.dtype)
    dtype = np.dtype(preferred_element_type or common)
    facts = refusals.MatmulFacts("sparse_matmul", str(common), matrix.block_size)
    native, platform = _choose(implementation, facts)

    # X A of [T, M] rows is the transpose of A^T X^T: with the dense factor on the left the matrix is "transposed" where
    # it is taken as it is.
    rows, columns = matrix.shape
    attributes = ffi.ProductAttributes(rows, columns, transpose != left, left, _summed_in(dtype, common))
    call = ProductCall(attributes, matrix.block_size, native, platform)
    if left:
        result_shape = (*dense.shape[:-1], k)
        operand = dense if dense.ndim == 2 else dense.reshape(math.prod(dense.shape[:-1]), m)
    else:
        result_shape = (m, *dense.shape[1:])
        operand = dense if dense.ndim == 2 else dense[:, None]
    data = jnp.asarray(matrix.data)
    lists = matrix.lists.for_product(matrix.grid[1], eager=products.has_values(data, dense))
    out = products.product(call, data.astype(common), lists, operand.astype(common)).astype(dtype)
    return out if dense.ndim == 2 else out.reshape(result_shape)


BSR.product = staticmethod(sparse_matmul)  # what `@` calls


def sampled_matmul(
    a: Any,
    b: Any,
    pattern: BSR,
    *,
    preferred_element_type: Any = None,
    implementation: Implementation | None = None,
) -> BSR:
    """The blocks of a @ b at the places of a pattern (SDDMM), as a `BSR` of the pattern's lists.

    Linear in each factor, and differentiable in both any number of times, in forward mode and in reverse.

    Args:
      a: [M, L].
      b: [L, K].
      pattern: a `BSR` of [M, K]; its blocks' numbers are not looked at.
      preferred_element_type: type of the blocks; by default the common type of a and b.
      implementation: as for `sparse_matmul`.

    Raises:
      TypeError: a pattern that is no `BSR`; a common type that is not floating point.
      ValueError: sizes that do not fit, an unknown implementation.
      UnsupportedError: the named implementation cannot take the call.
    """
    if not isinstance(pattern, BSR):
        raise TypeError(
            f"pattern must be a BSR, got {type(pattern).__name__}; make one with BSR.from_dense(.., keep=..)"
        )
    pattern.need_lists("pattern")
    a, b = jnp.asarray(a), jnp.asarray(b)
    m, k = pattern.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != m or b.shape[1] != k or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a and b must be [{m}, L] and [L, {k}] for a pattern of {(m, k)}, got {a.shape} and {b.shape}; use "
            "jax.vmap for batches"
        )
    common = _common_type("a and b", a.dtype, b.dtype)
    dtype = np.dtype(preferred_element_type or common)
    facts = refusals.MatmulFacts("sampled_matmul", str(common), pattern.block_size)
    native, platform = _choose(implementation, facts)
    attributes = ffi.SampledAttributes(False, False, pattern.block_size, _summed_in(dtype, common))
    call = SampledCall(attributes, pattern.shape, native, platform)
    lists = pattern.lists.for_product(pattern.grid[1], eager=products.has_values(a, b))
    blocks = products.sampled(call, a.astype(common), b.astype(common), lists)
    return pattern.with_data(blocks.astype(dtype))


def _common_type(names: str, first: Any, second: Any) -> Any:
    """Common type of two factors.

    Raises:
      TypeError: it is not a real floating-point type.
    """
    common = jnp.result_type(first, second)
    if not jnp.issubdtype(common, jnp.floating):
        raise TypeError(
            f"{names} must have floating-point numbers, got {np.dtype(first)} and {np.dtype(second)}; convert them "
            "with astype(jnp.float32)"
        )
    return common


def _choose(implementation: str | None, facts: refusals.MatmulFacts) -> tuple[bool, str | None]:
    """Whether a native kernel takes the call, and the only platform it may be compiled for."""
    chosen, named = dispatch.choose(implementation, facts)
    native = chosen != "xla"
    return native, chosen if native and named else None


def _summed_in(dtype: np.dtype, common: Any) -> str:
    """Type that the kernels write: the wanted one where they can, the sums' own otherwise."""
    common = np.dtype(common)
    return str(dtype) if dtype in (common, np.dtype(np.float32)) else "float64" if common == np.float64 else "float32"
