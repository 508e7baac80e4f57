"""The contenders that are JAX functions: jax_bsk, the dense product, and `jax.experimental.sparse`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from jax_bsk import BSR, sparse_matmul
from jax_bsk.core.dispatch import Implementation
from jax_bsk.qa.benchmarking.contender import Refused
from jax_bsk.qa.benchmarking.matmul.cases import Operation
from jax_bsk.qa.benchmarking.matmul.contender import Product, need_memory
from jax_bsk.qa.benchmarking.matmul.operands import Operands

_PLAIN = (((1,), (0,)), ((), ()))  # dimension numbers of a @ b


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
