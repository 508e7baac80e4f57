"""Products with block-sparse matrices: the public functions, and their derivatives.

Each of the two products is made of the other in its derivative, so that they nest. They run in plain JAX
(`_matmul_reference`), wherever JAX does.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_bsk import _matmul_reference as reference
from jax_bsk.bsr import BSR


def sparse_matmul(a: Any, b: Any, *, transpose: bool = False, preferred_element_type: Any = None) -> jax.Array:
    """A product of which one factor is block-sparse; only stored blocks are multiplied.

    Letters: M and K rows and columns of the sparse matrix, N columns (or T rows) of the dense one.

    Args:
      a: the left factor: a `BSR` of [M, K], or dense [..., T, M].
      b: the right one: dense [K, N], or a `BSR`.
      transpose: take the sparse matrix's transpose; nothing is copied.
      preferred_element_type: type of the result; by default the common type of the factors. Sums are float32 (float64
        where a factor is).

    Returns:
      a @ b. Differentiable in both factors, any number of times: the gradient of a `BSR` has its blocks alone (the
      sampled product of `sampled_matmul`), no dense gradient is ever made. A row of blocks whose lists cannot be
      followed is NaN.

    Raises:
      TypeError: neither or both factors are a `BSR`.
      ValueError: sizes that do not fit.
    """
    if isinstance(a, BSR) == isinstance(b, BSR):
        raise TypeError(f"one factor is a BSR and the other an array, got {type(a).__name__} and {type(b).__name__}")
    left = isinstance(a, BSR)
    matrix, dense = (a, jnp.asarray(b)) if left else (b, jnp.asarray(a))
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(matrix.dtype, dense.dtype))
    m, k = matrix.shape[::-1] if transpose else matrix.shape
    if left:
        if dense.ndim != 2 or dense.shape[0] != k:
            raise ValueError(f"a is {(m, k)}, so b is [{k}, N]; got {dense.shape}; use jax.vmap for batches")
        return _multiply(matrix.shape, transpose, matrix.data, matrix.indptr, matrix.indices, dense).astype(dtype)
    if dense.ndim < 1 or dense.shape[-1] != m:
        raise ValueError(f"b is {(m, k)}, so a is [..., {m}]; got {dense.shape}")
    rows = dense.reshape(-1, m)
    out = _multiply(matrix.shape, not transpose, matrix.data, matrix.indptr, matrix.indices, rows.T).T
    return out.astype(dtype).reshape(*dense.shape[:-1], k)


def sampled_matmul(a: Any, b: Any, pattern: BSR, *, preferred_element_type: Any = None) -> BSR:
    """The blocks of a @ b at the places of a pattern (SDDMM), as a `BSR` of the pattern's lists.

    Args:
      a: [M, L].
      b: [L, K].
      pattern: a `BSR` of [M, K]; its blocks' numbers are not looked at.
      preferred_element_type: type of the blocks; by default the common type of a and b.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    m, k = pattern.shape
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != m or b.shape[1] != k or a.shape[1] != b.shape[0]:
        raise ValueError(f"the pattern is {(m, k)}, so a is [{m}, L] and b [L, {k}]; got {a.shape} and {b.shape}")
    dtype = jnp.dtype(preferred_element_type or jnp.result_type(a.dtype, b.dtype))
    blocks = _sample(pattern.shape, pattern.block_size, a, b, pattern.indptr, pattern.indices)
    return pattern.with_data(blocks.astype(dtype))


# --- The two products, each other's derivatives


def _multiply(shape, transposed, data, indptr, indices, dense) -> Any:
    """A B or A^T B of the blocks, in the accumulator's type."""
    return _product(shape, transposed, data, indptr, indices, dense)


def _sample(shape, block_size, a, b, indptr, indices) -> Any:
    """The blocks of A B at those places, in the accumulator's type."""
    return _sampled(shape, block_size, a, b, indptr, indices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(shape, transposed, data, indptr, indices, dense):
    return reference.sparse_times_dense(BSR(data, indptr, indices, shape), dense, transposed=transposed)


def _product_fwd(shape, transposed, data, indptr, indices, dense):
    return _multiply(shape, transposed, data, indptr, indices, dense), (data, indptr, indices, dense)


def _product_bwd(shape, transposed, residuals, dout):
    data, indptr, indices, dense = residuals
    ddense = _multiply(shape, not transposed, data, indptr, indices, dout.astype(data.dtype))
    left, right = (dense, dout) if transposed else (dout, dense)
    # Y = A B: dA = dY B^T; Y = A^T B: dA = B dY^T.
    ddata = _sample(shape, data.shape[1:], left.astype(dense.dtype), right.astype(dense.dtype).T, indptr, indices)
    return ddata.astype(data.dtype), None, None, ddense.astype(dense.dtype)


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sampled(shape, block_size, a, b, indptr, indices):
    pattern = BSR(jax.ShapeDtypeStruct((indices.shape[0], *block_size), a.dtype), indptr, indices, shape)
    return reference.sampled(a, b, pattern)


def _sampled_fwd(shape, block_size, a, b, indptr, indices):
    return _sample(shape, block_size, a, b, indptr, indices), (a, b, indptr, indices)


def _sampled_bwd(shape, block_size, residuals, dblocks):
    a, b, indptr, indices = residuals
    # C = (A B) at the pattern: dA = dC B^T, dB = A^T dC = (dC^T A)^T.
    dblocks = dblocks.astype(a.dtype)
    da = _multiply(shape, False, dblocks, indptr, indices, b.T)
    db = _multiply(shape, True, dblocks, indptr, indices, a).T
    return da.astype(a.dtype), db.astype(b.dtype), None, None


_sampled.defvjp(_sampled_fwd, _sampled_bwd)
