"""The contenders that are JAX functions: jax_bsk, the dense product, and `jax.experimental.sparse`.

A `Product` becomes a contender of each operation by `of_jax`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from jax_bsk import BSR, sparse_matmul
from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.benchmarking.contender import Contender, Refused, need_memory
from jax_bsk.qa.benchmarking.matmul.cases import Case, Operation
from jax_bsk.qa.benchmarking.matmul.operands import Operands
from jax_bsk.qa.benchmarking.matmul.references import Spots, pick

_PLAIN = (((1,), (0,)), ((), ()))  # dimension numbers of a @ b


@dataclasses.dataclass(frozen=True)
class Product:
    """Products of a sparse matrix in JAX, differentiable in its numbers.

    Attributes:
      left: (values, places, x) -> W X.
      right: (x, values, places) -> X W.
      values: the numbers of W, one array.
      places: where they stand, a pytree of arrays.
      dense: (values, places) -> [size, size], for the check of gradients with respect to the values.
      variant: as in `Contender`.
      chains: whether its calls are short enough for a chain to tell anything.
      shared: whether its programs are the same for every sparsity, and compiled once.
      weights: the dense W that it multiplies, where that is not the case's.
    """

    left: Callable[[Any, Any, Any], jax.Array]
    right: Callable[[Any, Any, Any], jax.Array]
    values: Any
    places: Any
    dense: Callable[[Any, Any], jax.Array]
    variant: str
    chains: bool = True
    shared: bool = False
    weights: jax.Array | None = None


_Program = Callable[..., jax.Array]
_SHARED: dict[tuple[Any, ...], _Program] = {}  # by variant, operation, size, type and calls


def of_jax(case: Case, operands: Operands, product: Product) -> Contender:
    """The contender of a product in the operation of a case.

    Raises:
      Refused: it needs more memory than `contender.MOST_SCRATCH`.
    """
    step, fixed = _step(case.operation, product, operands)
    moving = operands.moving(case.operation)
    calls = case.calls if product.chains else 1

    def compiled(function: _Program, calls: int) -> _Program:
        if not product.shared:
            return _compile(function, moving, fixed)
        key = "dense", case.operation, case.config.size, case.config.dtype, calls
        if key not in _SHARED:
            _SHARED[key] = _compile(function, moving, fixed)
        return _SHARED[key]

    once = compiled(step, 1)

    def chain(moving, *fixed):
        for _ in range(calls):
            moving = step(moving, *fixed)
        return moving

    many = once if calls == 1 else compiled(chain, calls)

    def picked(result: jax.Array, spots: Spots) -> tuple[np.ndarray, bool]:
        if case.operation is Operation.DATA_GRADIENT:
            result = jax.jit(product.dense)(result, product.places)
        return pick(result, spots)

    return Contender(
        once=lambda: (jax.block_until_ready(once(moving, *fixed)),),
        pick=picked,
        dispatch=lambda i: many(moving, *fixed),
        calls=calls,
        variant=product.variant,
        instead=product.weights,
    )


def _step(operation: Operation, product: Product, operands: Operands) -> tuple[_Program, list[Any]]:
    """The operation as a function of the operand that moves and of others, and those others."""
    x, values, places = operands.x, product.values, product.places
    if operation is Operation.FORWARD:
        return lambda x, values, places: product.left(values, places, x), [values, places]
    if operation is Operation.LAYER:
        return product.right, [values, places]

    # A gradient alone, of what `jax.vjp` keeps: as in the attention benchmark, its leaves are arguments of the jit.
    @jax.jit
    def forward(x, values, places):
        if operation is Operation.DENSE_GRADIENT:
            return jax.vjp(lambda x: product.left(values, places, x), x)[1]
        return jax.vjp(lambda values: product.left(values, places, x), values)[1]

    kept, tree = jax.tree.flatten(forward(x, values, places))
    return lambda dy, *kept: jax.tree.unflatten(tree, kept)(dy)[0], kept


def _compile(function: _Program, moving: jax.Array, fixed: list[Any]) -> _Program:
    compiled = jax.jit(function).lower(moving, *fixed).compile()
    need_memory(getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0), "XLA's program")
    return compiled


def ours(operands: Operands, implementation: Implementation | None, constant: bool) -> Product:
    """`sparse_matmul`; the lists of the matrix are arguments of the jit, or constants of the program."""
    matrix = operands.host if constant else operands.matrix
    shape, lists = matrix.shape, (matrix.indptr, matrix.indices, matrix.column_lists)

    def of(values: Any, places: Any) -> BSR:
        indptr, indices, columns = lists if constant else places
        return BSR(values, indptr, indices, shape, columns)

    return Product(
        left=lambda values, places, x: sparse_matmul(of(values, places), x, implementation=implementation),
        right=lambda x, values, places: sparse_matmul(x, of(values, places), implementation=implementation),
        values=operands.matrix.data,
        places=() if constant else lists,
        dense=lambda values, places: of(values, places).to_dense(),
        variant="lists are constants" if constant else "lists are arguments",
    )


def dense(operands: Operands) -> Product:
    """`jnp.dot` with the zeros; float32 in full precision, as the others have it."""

    def dot(a: Any, b: Any) -> jax.Array:
        return jnp.dot(a, b, precision="highest" if a.dtype == jnp.float32 else None)

    return Product(
        left=lambda values, places, x: dot(values, x),
        right=lambda x, values, places: dot(x, values),
        values=operands.dense,
        places=(),
        dense=lambda values, places: values,
        variant="dense",
        shared=True,
    )


def dense_random(operands: Operands, operation: Operation) -> Product:
    """`jnp.dot` with a matrix of random numbers: a GPU under its power limit is slower with them than with zeros.

    Raises:
      Refused: the operation has no such matrix among its factors.
    """
    if operation is Operation.DATA_GRADIENT:
        raise Refused("this operation multiplies no W; both factors of `dense` are random numbers here")
    weights = operands.random_weights()
    return dataclasses.replace(dense(operands), values=weights, variant="dense, random numbers", weights=weights)


def bcoo(operands: Operands) -> Product:
    """`BCOO`, its indices sorted."""
    matrix = _bcoo(operands)
    shape = matrix.shape

    def of(values: Any, indices: Any) -> sparse.BCOO:
        return sparse.BCOO((values, indices), shape=shape, indices_sorted=True, unique_indices=True)

    return Product(
        left=lambda values, indices, x: _dot(sparse.bcoo_dot_general, of(values, indices), x),
        right=lambda x, values, indices: _dot(sparse.bcoo_dot_general, x, of(values, indices)),
        values=matrix.data,
        places=matrix.indices,
        dense=lambda values, indices: of(values, indices).todense(),
        variant="sums in float32",
        chains=False,
    )


def bcsr(operands: Operands) -> Product:
    """`BCSR`: JAX expands its rows and multiplies as with `BCOO`. It has no product with a dense left factor."""
    matrix = sparse.BCSR.from_bcoo(_bcoo(operands))
    shape = matrix.shape

    def of(values: Any, places: Any) -> sparse.BCSR:
        return sparse.BCSR((values, *places), shape=shape, indices_sorted=True, unique_indices=True)

    return Product(
        left=lambda values, places, x: _dot(sparse.bcsr_dot_general, of(values, places), x),
        right=lambda x, values, places: _dot(sparse.bcsr_dot_general, x, of(values, places)),
        values=matrix.data,
        places=(matrix.indices, matrix.indptr),
        dense=lambda values, places: of(values, places).todense(),
        variant="sums in float32",
        chains=False,
    )


def _bcoo(operands: Operands) -> sparse.BCOO:
    """W with an index for each stored number, made once for both."""
    if "jax sparse" not in operands.copies:
        count = operands.matrix.data.size
        need_memory(count * 40, "an index for each number")  # while it is made
        operands.copies["jax sparse"] = jax.jit(functools.partial(sparse.BCOO.fromdense, nse=count))(operands.dense)
    return operands.copies["jax sparse"]


def _dot(function: Callable[..., Any], a: Any, b: Any) -> jax.Array:
    """a @ b, summed in float32: these sums are scattered additions, which in 16 bits would leave no result."""
    out = function(a, b, dimension_numbers=_PLAIN, preferred_element_type=jnp.float32)
    return out.astype(b.dtype)
