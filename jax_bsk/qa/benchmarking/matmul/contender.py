"""What a contender of a matrix product is, and how a product written in JAX becomes one of each operation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_bsk.core import compat
from jax_bsk.qa.benchmarking.contender import Refused
from jax_bsk.qa.benchmarking.matmul.cases import Case, Operation
from jax_bsk.qa.benchmarking.matmul.check import Spots, pick
from jax_bsk.qa.benchmarking.matmul.operands import Operands

MOST_SCRATCH = {"gpu": 40e9, "cpu": 2e9}  # bytes that a peer may take beyond its operands


@dataclasses.dataclass(frozen=True)
class Contender:
    """One implementation with the operands of a case, compiled.

    Attributes:
      once: one call; its result, ready.
      pick: the spots of that result as float64 [r, c], and whether all of it is finite.
      dispatch: queues dispatch number i and returns something that `jax.block_until_ready` waits for.
      calls: calls in a dispatch.
      variant: how it gets the sparse matrix, for the report.
      weights: the dense W that it multiplies, where that is not the case's.
    """

    once: Callable[[], Any]
    pick: Callable[[Any, Spots], tuple[np.ndarray, bool]]
    dispatch: Callable[[int], Any]
    calls: int
    variant: str
    weights: jax.Array | None = None


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
      weights: as in `Contender`.
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
      Refused: it needs more memory than `MOST_SCRATCH`.
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
        once=lambda: jax.block_until_ready(once(moving, *fixed)),
        pick=picked,
        dispatch=lambda i: many(moving, *fixed),
        calls=calls,
        variant=product.variant,
        weights=product.weights,
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


def need_memory(count: float, what: str) -> None:
    """Raises `Refused` where that many bytes are too many."""
    most = MOST_SCRATCH["cpu" if compat.default_platform() == "cpu" else "gpu"]
    if count > most:
        raise Refused(f"{what} takes {count / 1e9:.1f} GB of scratch memory, more than {most / 1e9:g} GB")
