"""Number of floating-point operations of a call, for MFU and rooflines, because XLA does not know it.

The module is beside the path of a call and computes no result. `compiled.cost_analysis()["flops"]` leaves out custom
calls (the native kernels), because XLA lets no FFI call on CPUs and GPUs state its cost, and counts the body of a loop
once (the "xla" implementation). For the native kernels the counts of this module are to be added to it.

Multiplications and additions of matrix products count, two per pair of numbers, as is usual; exponentials do not. The
counts are those of the algorithm: a forward pass that a checkpoint runs again is not counted again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.attention.api import bind_mask
from jax_bsk.masks import BlockMask, Mask
from jax_bsk.matmul.bsr import BSR

# What has a shape: an array, a `jax.ShapeDtypeStruct`, or the shape itself.
HasShape = ArrayLike | jax.ShapeDtypeStruct | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Flops:
    """Numbers of operations of one pass. Two of them can be added.

    Attributes:
      useful: Operations of attended (stored) elements, which MFU counts.
      visited: Operations of all elements of visited (stored) blocks, which kernels compute.
    """

    useful: float
    visited: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.useful + other.useful, self.visited + other.visited)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Numbers of operations of a call.

    Attributes:
      forward: Operations that compute the result.
      backward: Operations that compute the gradients of all floating-point arguments, given the result.
    """

    forward: Flops
    backward: Flops

    @property
    def training(self) -> Flops:
        """Operations of both passes together."""
        return self.forward + self.backward


def attention(
    query: HasShape,
    key: HasShape,
    value: HasShape | None = None,
    mask: Mask | BlockMask | ArrayLike | None = None,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
) -> Cost:
    """Counts the operations of `sparse_attention` with the same arguments.

    A pair of a query and a key that attend to each other costs, per query head and with head sizes H of key and Hv of
    value, 2 H + 2 Hv operations in the forward pass (two products) and 6 H + 4 Hv in the backward pass (five).

    Args:
      query: Array, `jax.ShapeDtypeStruct` or shape: BTNH or TNH.
      key: Array, `jax.ShapeDtypeStruct` or shape: BSKH or SKH.
      value: Array, `jax.ShapeDtypeStruct` or shape: BSKH or SKH; None stands for key's shape.
      mask: Mask as in `sparse_attention`, with known values, which are read. Lengths of examples are given as a mask,
        e.g. a `jax_bsk.masks.ArrayMask`.
      is_causal: Whether the call is causal, as in `sparse_attention`.
      local_window_size: Window as in `sparse_attention`.

    Returns:
      The `Cost` of one call: `forward`, `backward` and `training`, each a `Flops` of `useful` and `visited` operations.

    Raises:
      ValueError: Shapes do not fit.
      TypeError: The mask is traced.

    Examples:
      >>> from jax_bsk import flops
      >>> cost = flops.attention((1, 1024, 8, 64), (1, 1024, 8, 64), is_causal=True)
      >>> cost.forward.useful == 4 * 64 * 8 * (1024 * 1025 // 2)
      True
      >>> round(cost.forward.visited / cost.forward.useful, 3)  # blocks on the diagonal are visited whole
      1.124
    """
    q, k = _shape(query, "query", (3, 4)), _shape(key, "key", (3, 4))
    v = k if value is None else _shape(value, "value", (3, 4))
    if not len(q) == len(k) == len(v):
        raise ValueError(f"query is BTNH and key and value BSKH, or TNH and SKH all three; got {q}, {k}, {v}")
    batch, q_len, heads, head_dim = (1,) * (4 - len(q)) + q
    bound = bind_mask(mask, is_causal, local_window_size, (batch, heads, q_len, k[-3]), len(q) == 3)
    lists = bound.batch * bound.heads
    share = batch * heads // max(lists, 1)  # calls that one list serves
    attended = share * round(bound.element_density * lists * q_len * k[-3])
    blocks = share * round(bound.density * lists * bound.nq * bound.nk)
    useful = of_pairs(attended, head_dim, v[-1])
    visited = of_pairs(blocks * bound.block_q * bound.block_kv, head_dim, v[-1])
    return Cost(*(Flops(*passes) for passes in zip(useful, visited, strict=True)))


def of_pairs(pairs: float, head_dim: int, value_dim: int) -> tuple[float, float]:
    """Returns the operations of the forward and the backward pass of attention for a number of pairs of query and key.

    The forward pass has the products QK' and PV; the backward pass QK' again, dO V', P' dO, dS K and dS' Q.
    """
    return pairs * 2 * (head_dim + value_dim), pairs * 2 * (3 * head_dim + 2 * value_dim)


def matmul(a: BSR | HasShape, b: BSR | HasShape) -> Cost:
    """Counts the operations of `sparse_matmul(a, b)`, transposed or not.

    Args:
      a: `BSR` of shape [M, K]; or an array, `jax.ShapeDtypeStruct` or shape [..., M].
      b: Array, `jax.ShapeDtypeStruct` or shape [K, N]; or a `BSR`.

    Returns:
      The `Cost` of one call.

    Raises:
      TypeError: Neither or both are a `BSR`.
      ValueError: The other factor has another number of dimensions.
    """
    if isinstance(a, BSR) and not isinstance(b, BSR):
        return _of_matrix(a, _shape(b, "b", (2,))[1])
    if isinstance(b, BSR) and not isinstance(a, BSR):
        return _of_matrix(b, math.prod(_shape(a, "a", None)[:-1]))
    raise TypeError(f"one factor is a BSR and the other an array, got {type(a).__name__} and {type(b).__name__}")


def sampled_matmul(a: HasShape, b: HasShape, pattern: BSR) -> Cost:
    """Counts the operations of `sampled_matmul(a, b, pattern)`.

    Args:
      a: Array, `jax.ShapeDtypeStruct` or shape [M, L].
      b: Array, `jax.ShapeDtypeStruct` or shape [L, K].
      pattern: `BSR` that says where the blocks are.

    Returns:
      The `Cost` of one call.

    Raises:
      ValueError: `a` is no matrix.
    """
    del b
    return _of_matrix(pattern, _shape(a, "a", (2,))[1])


def of_product(elements: float, width: int) -> float:
    """Returns the operations of a product in which each stored element meets a row of `width` numbers."""
    return 2 * elements * width


def _of_matrix(matrix: BSR, width: int) -> Cost:
    bm, bk = matrix.block_size
    blocks, elements = _stored(matrix)
    forward = Flops(of_product(elements, width), of_product(blocks * bm * bk, width))
    return Cost(forward, forward + forward)  # with respect to the blocks and to the dense factor


def _stored(matrix: BSR) -> tuple[int, int]:
    """Returns the number of stored blocks and of their elements inside the matrix; the room for them where traced."""
    bm, bk = matrix.block_size
    try:
        indptr, indices = np.asarray(matrix.indptr), np.asarray(matrix.indices)
    except TypeError:  # traced
        blocks = matrix.data.shape[0]
        return blocks, blocks * bm * bk
    rows = np.repeat(np.arange(indptr.size - 1), np.diff(indptr))
    heights = np.clip(matrix.shape[0] - rows * bm, 0, bm)
    widths = np.clip(matrix.shape[1] - indices[: rows.size] * bk, 0, bk)
    return rows.size, int((heights * widths).sum())


def _shape(x: Any, name: str, ranks: Sequence[int] | None) -> tuple[int, ...]:
    shape = tuple(x) if isinstance(x, tuple | list) else tuple(np.shape(x) if not hasattr(x, "shape") else x.shape)
    if ranks is not None and len(shape) not in ranks:
        raise ValueError(
            f"{name} has {' or '.join(map(str, ranks))} dimensions, got shape {shape}; pass the call's array"
        )
    return shape


__all__ = ["Cost", "Flops", "attention", "matmul", "sampled_matmul"]
