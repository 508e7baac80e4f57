"""How many floating-point operations calls take, for MFU and rooflines, as XLA does not know.

Beside the path of a call: it computes nothing. `compiled.cost_analysis()["flops"]` leaves out what custom calls do (the
native kernels), as XLA lets no FFI call of a CPU or GPU state its cost, and counts the body of a loop once (the "xla"
implementation). So add what is here to it for the native kernels.

Counted are multiplications and additions of matrix products, two per pair of numbers, as others do; the exponentials
are not. The counts are those of the algorithm: a checkpoint that runs a forward again counts for nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from jax_bsk.attention.api import bind_mask
from jax_bsk.masks import BlockMask, Mask
from jax_bsk.matmul.bsr import BSR


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one pass.

    Attributes:
      useful: Those of attended (stored) elements, which MFU counts.
      visited: Those of all elements of visited (stored) blocks, which kernels compute.
    """

    useful: float
    visited: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.useful + other.useful, self.visited + other.visited)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations of a call.

    Attributes:
      forward: Of the results.
      backward: Of the gradients of all floating arguments, given the results.
    """

    forward: Flops
    backward: Flops

    @property
    def training(self) -> Flops:
        """Of both passes."""
        return self.forward + self.backward


def attention(
    query: Any,
    key: Any,
    value: Any = None,
    mask: Mask | BlockMask | ArrayLike | None = None,
    *,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
) -> Cost:
    """Operations of `sparse_attention` with the same arguments.

    Per attended pair of a query and a key and per query head, with head sizes H and Hv: 2 H + 2 Hv in the forward (two
    products), 6 H + 4 Hv in the backward (five).

    Args:
      query: Array, `jax.ShapeDtypeStruct` or shape: BTNH or TNH.
      key: The same: BSKH or SKH.
      value: The same, or None: of key's shape.
      mask, is_causal, local_window_size: As in `sparse_attention`; the values of the mask must be known, and are read.
        Lengths of examples are not asked for: give them as a mask, e.g. `jax_bsk.masks.ArrayMask`.

    Raises:
      ValueError, TypeError: Shapes do not fit, or the mask is traced.
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
    """Operations of the forward and of the backward of attention for a number of pairs of a query and a key.

    The forward has QK' and PV; the backward QK' again, dO V', P' dO, dS K and dS' Q.
    """
    return pairs * 2 * (head_dim + value_dim), pairs * 2 * (3 * head_dim + 2 * value_dim)


def matmul(a: Any, b: Any) -> Cost:
    """Operations of `sparse_matmul(a, b)`, transposed or not.

    Args:
      a, b: One a `BSR`, the other an array, `jax.ShapeDtypeStruct` or shape, [K, N] or [..., M].

    Raises:
      TypeError: Neither or both are a `BSR`.
    """
    if isinstance(a, BSR) == isinstance(b, BSR):
        raise TypeError(f"one factor is a BSR and the other an array, got {type(a).__name__} and {type(b).__name__}")
    if isinstance(a, BSR):
        return _of_matrix(a, _shape(b, "b", (2,))[1])
    return _of_matrix(b, math.prod(_shape(a, "a", None)[:-1]))


def sampled_matmul(a: Any, b: Any, pattern: BSR) -> Cost:
    """Operations of `sampled_matmul(a, b, pattern)`.

    Args:
      a: Array, `jax.ShapeDtypeStruct` or shape: [M, L].
      b: The same: [L, K].
      pattern: The places of the blocks.
    """
    del b
    return _of_matrix(pattern, _shape(a, "a", (2,))[1])


def of_product(elements: float, width: int) -> float:
    """Operations of a product of so many stored elements, each with a row of so many numbers."""
    return 2 * elements * width


def _of_matrix(matrix: BSR, width: int) -> Cost:
    bm, bk = matrix.block_size
    blocks, elements = _stored(matrix)
    forward = Flops(of_product(elements, width), of_product(blocks * bm * bk, width))
    return Cost(forward, forward + forward)  # with respect to the blocks and to the dense factor


def _stored(matrix: BSR) -> tuple[int, int]:
    """Blocks, and elements within the matrix; where the lists have no values, as many as there is room for."""
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
