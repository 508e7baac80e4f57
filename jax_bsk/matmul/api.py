"""`sparse_matmul` and `sampled_matmul`: check a product, pick an implementation, and hand the product to it.

This is the top of the path of a product: `matmul.api` -> `core.dispatch` -> `matmul.products` -> `matmul.native` ->
`csrc/matmul/`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jax_bsk.core import dispatch
from jax_bsk.core.dispatch import Implementation
from jax_bsk.matmul import ffi, products, refusals
from jax_bsk.matmul.bsr import BSR
from jax_bsk.matmul.native import ProductCall, SampledCall


def sparse_matmul(
    a: BSR | ArrayLike,
    b: BSR | ArrayLike,
    *,
    transpose: bool = False,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies a block-sparse matrix and a dense one; only stored blocks are multiplied.

    `A @ b` and `x @ A` call this function for a `BSR` A. It is linear in each factor and differentiable in both any
    number of times, in forward and in reverse mode: `jax.linear_transpose` and the solvers of `jax.scipy.sparse.linalg`
    work. The gradient of a `BSR` is the product sampled at the stored blocks (see `sampled_matmul`); no dense gradient
    is ever made. The product and its two gradients are those of Gray, Radford and Kingma, "GPU Kernels for Block-Sparse
    Weights" (2017).

    Dimensions: M rows and K columns of the sparse matrix, N columns (or T rows) of the dense one.

    Args:
      a: Left factor: a `BSR` of shape [M, K], or a dense array [..., T, M] or [M].
      b: Right factor: a dense array [K, N] or [K], or a `BSR`.
      transpose: Whether the sparse matrix is transposed. Nothing is copied for it.
      preferred_element_type: Type of the result; the default is the common type of the factors. Sums are float32
        (float64 where a factor is float64).
      implementation: Name of an implementation: "cpu", "cuda" (float16 and bfloat16, blocks of 64 or 128, compute
        capability 9.0) or "xla". None takes the platform's native kernel. Where that cannot take the call, None takes
        "xla" and warns once with a `FallbackWarning` that says why.

    Returns:
      The product a @ b, with one dimension where the dense factor has one. A row of blocks whose lists cannot be
      followed yields NaN where the product walks rows. Where it walks columns (`transpose`, or a dense factor on the
      left, but not both) that row counts as 0.

    Raises:
      TypeError: Neither or both factors are a `BSR`, the blocks are boolean, or the common type is not floating point.
      ValueError: Sizes do not fit, or there is no such implementation.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import BSR, sparse_matmul
      >>> weight = BSR.random(jax.random.key(0), (64, 96), density=0.5, block_size=32)
      >>> x = jnp.ones((4, 64))
      >>> y = sparse_matmul(x, weight, implementation="cpu")
      >>> bool(jnp.allclose(y, x @ weight.to_dense(), atol=1e-4))
      True
      >>> jax.grad(lambda w: sparse_matmul(x, w, implementation="cpu").sum())(weight)
      BSR(shape=(64, 96), block_size=(32, 32), entries=3, dtype=float32)
    """
    if isinstance(a, BSR) and not isinstance(b, BSR):
        left, matrix, dense = False, a, jnp.asarray(b)
    elif isinstance(b, BSR) and not isinstance(a, BSR):
        left, matrix, dense = True, b, jnp.asarray(a)
    else:
        raise TypeError(
            f"a and b must be one a BSR and the other an array, got {type(a).__name__} and {type(b).__name__}; of two "
            "BSRs make one dense with to_dense()"
        )
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
    a: ArrayLike,
    b: ArrayLike,
    pattern: BSR,
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> BSR:
    """Computes a @ b at the stored blocks of a pattern (a sampled dense-dense product, SDDMM).

    The function is linear in each factor, and differentiable in both any number of times, in forward and in reverse
    mode.

    Args:
      a: Dense array [M, L].
      b: Dense array [L, K].
      pattern: `BSR` of shape [M, K] whose lists say where the blocks are. The numbers in its blocks are not read.
      preferred_element_type: Type of the blocks; the default is the common type of a and b.
      implementation: Name of an implementation, as for `sparse_matmul`.

    Returns:
      A `BSR` with the pattern's lists and the blocks of a @ b.

    Raises:
      TypeError: The pattern is no `BSR`, or the common type is not floating point.
      ValueError: Sizes do not fit, or there is no such implementation.
      UnsupportedError: The named implementation cannot take the call.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax_bsk import BSR, sampled_matmul
      >>> pattern = BSR.random(jax.random.key(0), (64, 96), density=0.5, block_size=32)
      >>> a, b = jnp.ones((64, 8)), jnp.ones((8, 96))
      >>> blocks = sampled_matmul(a, b, pattern, implementation="cpu")
      >>> blocks
      BSR(shape=(64, 96), block_size=(32, 32), entries=3, dtype=float32)
      >>> float(blocks.data.max())
      8.0
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
    """Returns the common type of two factors.

    Raises:
      TypeError: The common type is not a real floating-point type.
    """
    common = jnp.result_type(first, second)
    if not jnp.issubdtype(common, jnp.floating):
        raise TypeError(
            f"{names} must have floating-point numbers, got {np.dtype(first)} and {np.dtype(second)}; convert them "
            "with astype(jnp.float32)"
        )
    return common


def _choose(implementation: str | None, facts: refusals.MatmulFacts) -> tuple[bool, str | None]:
    """Returns whether a native kernel takes the call, and the only platform it may be compiled for (None: any)."""
    chosen, named = dispatch.choose(implementation, facts)
    native = chosen != "xla"
    return native, chosen if native and named else None


def _summed_in(dtype: np.dtype, common: Any) -> str:
    """Returns the type that the kernels write: the wanted one where they can, the type of the sums otherwise."""
    common = np.dtype(common)
    return str(dtype) if dtype in (common, np.dtype(np.float32)) else "float64" if common == np.float64 else "float32"
