"""Products with block-sparse matrices: the public functions.

They check what was asked and pick an implementation; `_matmul_op` has the products and their derivatives.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk import _dispatch, _ffi, _matmul_op
from jax_bsk._dispatch import Implementation
from jax_bsk._matmul_op import ProductCall, SampledCall
from jax_bsk.bsr import BSR


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

    Args:
      a: the left factor: a `BSR` of [M, K], or dense [..., T, M].
      b: the right one: dense [K, N], or a `BSR`.
      transpose: take the sparse matrix's transpose; nothing is copied.
      preferred_element_type: type of the result; by default the common type of the factors. Sums are float32 (float64
        where a factor is).
      implementation: "cpu", "cuda" (float16 and bfloat16, blocks of 64 or 128, compute capability 9.0) or "xla"; None
        takes the platform's native kernel, and where that cannot take the call "xla", with one warning that says why.

    Returns:
      a @ b. Differentiable in both factors, any number of times in reverse: the gradient of a `BSR` has its blocks
      alone (the sampled product of `sampled_matmul`), no dense gradient is ever made. A row of blocks whose lists
      cannot be followed is NaN where the product walks rows; where it walks columns (`transpose`, or a dense factor on
      the left, not both) that row counts for nothing.

    Raises:
      TypeError: neither or both factors are a `BSR`.
      ValueError: sizes that do not fit, an unknown implementation.
      UnsupportedError: the named implementation cannot take the call.
    """
    if isinstance(a, BSR) == isinstance(b, BSR):
        raise TypeError(f"one factor is a BSR and the other an array, got {type(a).__name__} and {type(b).__name__}")
    left = isinstance(b, BSR)
    matrix, dense = (b, jnp.asarray(a)) if left else (a, jnp.asarray(b))
    m, k = matrix.shape[::-1] if transpose else matrix.shape
    if left:
        if dense.ndim < 1 or dense.shape[-1] != m:
            raise ValueError(f"b is {(m, k)}, so a is [..., {m}]; got {dense.shape}")
    elif dense.ndim != 2 or dense.shape[0] != k:
        raise ValueError(f"a is {(m, k)}, so b is [{k}, N]; got {dense.shape}; use jax.vmap for batches")
    common = jnp.result_type(matrix.dtype, dense.dtype)
    dtype = np.dtype(preferred_element_type or common)
    facts = _dispatch.MatmulFacts("sparse_matmul", str(common), matrix.block_size)
    native, platform = _choose(implementation, facts)

    # X A of [T, M] rows is the transpose of A^T X^T: with the dense factor on the left the matrix is "transposed" where
    # it is taken as it is.
    rows, columns = matrix.shape
    attributes = _ffi.ProductAttributes(rows, columns, transpose != left, left, _summed_in(dtype, common))
    call = ProductCall(attributes, native, platform)
    operand = dense.reshape(math.prod(dense.shape[:-1]), m) if left and dense.ndim != 2 else dense
    data = jnp.asarray(matrix.data).astype(common)
    out = _matmul_op.product(call, data, _matmul_op.lists_of(matrix), operand.astype(common)).astype(dtype)
    return out.reshape(*dense.shape[:-1], k) if left and dense.ndim != 2 else out


def sampled_matmul(
    a: Any,
    b: Any,
    pattern: BSR,
    *,
    preferred_element_type: Any = None,
    implementation: Implementation | None = None,
) -> BSR:
    """The blocks of a @ b at the places of a pattern (SDDMM), as a `BSR` of the pattern's lists.

    Args:
      a: [M, L].
      b: [L, K].
      pattern: a `BSR` of [M, K]; its blocks' numbers are not looked at.
      preferred_element_type: type of the blocks; by default the common type of a and b.
      implementation: as for `sparse_matmul`.

    Raises:
      ValueError: sizes that do not fit, an unknown implementation.
      UnsupportedError: the named implementation cannot take the call.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    m, k = pattern.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != m or b.shape[1] != k or a.shape[1] != b.shape[0]:
        raise ValueError(f"the pattern is {(m, k)}, so a is [{m}, L] and b [L, {k}]; got {a.shape} and {b.shape}")
    common = jnp.result_type(a.dtype, b.dtype)
    dtype = np.dtype(preferred_element_type or common)
    facts = _dispatch.MatmulFacts("sampled_matmul", str(common), pattern.block_size)
    native, platform = _choose(implementation, facts)
    attributes = _ffi.SampledAttributes(False, False, pattern.block_size, _summed_in(dtype, common))
    call = SampledCall(attributes, pattern.shape, native, platform)
    blocks = _matmul_op.sampled(call, a.astype(common), b.astype(common), _matmul_op.lists_of(pattern))
    return pattern.with_data(blocks.astype(dtype))


def _choose(implementation: str | None, facts: _dispatch.MatmulFacts) -> tuple[bool, str | None]:
    """Whether a native kernel takes the call, and the only platform it may be compiled for."""
    chosen, named = _dispatch.choose(implementation, facts)
    native = chosen != "xla"
    return native, chosen if native and named else None


def _summed_in(dtype: np.dtype, common: Any) -> str:
    """Type that the kernels write: the wanted one where they can, the sums' own otherwise."""
    common = np.dtype(common)
    return str(dtype) if dtype in (common, np.dtype(np.float32)) else "float64" if common == np.float64 else "float32"
