"""`sparsek`: the differentiable top-k operator of SparseK attention (Lou, Jia, Zheng and Tu, arXiv 2406.16747).

The module is not on the path of an attention call: it computes gates and selections of keys, which calls are given.
`soft_topk_causal` has the causal form over prefixes, and the state for decoding.

The operator projects the scores z onto {p : 0 <= p <= 1, sum p = k}. By the KKT conditions of that problem
p = clip(z - tau, 0, 1), where tau solves f(tau) = sum clip(z - tau, 0, 1) = k. f is continuous, piecewise linear and
never increases; its breakpoints are the scores, and the scores less 1. With U = {z >= tau + 1} and S = {tau < z < tau +
1}, the piece that contains tau gives

    tau = (sum_S z + |U| - k) / |S|.

All arithmetic is relative to c, the ceil(k)-th greatest score, because tau lies in [c - 1, c]. Fewer than k scores are
greater than c and each counts at most 1, so f(c) <= k. At least k scores are c or greater, so f(c - 1) >= k. A score is
in U if z >= c + 1 and counts as 0 if z <= c - 1. Hence y = clip(z - c, -1, 1) has everything that matters, in numbers
near 1 for scores of any magnitude.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_bsk.core.arrays import of_rank
from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.core.inputs import floating

Method = Literal["exact", "fast"]


def sparsek(scores: ArrayLike, k: ArrayLike, axis: int = -1, method: Method = "exact") -> jax.Array:
    """Selects k of n scores softly, with a gradient: SparseK (arXiv 2406.16747).

        p = the nearest to z of those with 0 <= p <= 1 and sum(p) = k

    The greatest scores have p = 1, the least have p = 0, and scores in a window of width 1 between them have a p that
    rises linearly. Let S be the scores with 0 < p < 1. The derivative is dp = 1_S * (dz - mean_S dz + dk / |S|), and 0
    where S is empty. That map is symmetric, so one rule serves forward and reverse mode. It is constant between
    breakpoints, so second derivatives are 0. Where k is n or more, p is 1 everywhere and its derivative is 0.

    Scores of -inf are never selected, have a gradient of 0 and do not count among the n. A NaN makes its row NaN.

    Args:
      scores: Floating array [..., n, ...]. Types of fewer than 32 bits are computed in float32.
      k: Number of scores to select, not negative, whole or not. It broadcasts to the shape of scores without `axis`,
        may be traced, and is differentiable where it is floating. A traced k that is negative or NaN gives NaN.
      axis: Axis of the n scores.
      method: Algorithm. "exact" sorts the breakpoints in O(n log n). "fast" finds c by bisection over the bits of a
        floating-point number and tau by bisection in [c - 1, c], and then takes the exact step above: O(n) with about
        30 cheap passes (60 in float64) and no sort. Both agree to rounding.

    Returns:
      The array p of scores' shape and type.

    Raises:
      TypeError: The scores are not floating point, or k is no number.
      ValueError: There is no such method or axis, or k is negative or does not broadcast.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import sparsek
      >>> print(sparsek(jnp.array([2.0, 0.5, 0.25, -1.0]), k=2))
      [1.    0.625 0.375 0.   ]
    """
    scores = floating_scores(scores)
    if method not in ("exact", "fast"):
        raise ValueError(f"method is 'exact' or 'fast', got {method!r}")
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(f"axis is in [{-scores.ndim}, {scores.ndim}) for scores of shape {scores.shape}, got {axis}")
    z = jnp.moveaxis(widen(scores), axis, -1)
    p, _ = solve(z, budget(k, z), method)
    return jnp.moveaxis(p, -1, axis).astype(scores.dtype)


def floating_scores(scores: ArrayLike) -> jax.Array:
    """Returns scores as a floating array of at least one dimension."""
    array = floating(scores, "scores")
    if array.ndim == 0:
        raise ValueError("scores has one dimension at least, the one to choose along; got a scalar")
    return array


def widen(scores: jax.Array) -> jax.Array:
    """Returns scores in float32, and float64 scores as they are."""
    return scores.astype(statistics_dtype(scores.dtype))


def budget(k: ArrayLike, z: jax.Array) -> jax.Array:
    """Returns k as an array of z's type, one number per row of z [..., n]. A k on the host is checked."""
    if not isinstance(k, Tracer | jax.Array):
        host = np.asarray(k)
        if host.dtype.kind not in "iuf":
            raise TypeError(f"k is a number or an array of numbers, got {k!r}")
        if not (host >= 0).all():
            raise ValueError(f"k is not negative and not NaN, got {k!r}")
        k = host
    array = jnp.asarray(k)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"k holds numbers, got {array.dtype}")
    rows = z.shape[:-1]
    if array.ndim > len(rows) or any(n not in (1, m) for n, m in zip(array.shape[::-1], rows[::-1], strict=False)):
        raise ValueError(f"k broadcasts to the shape of scores without its axis, {rows}; got shape {array.shape}")
    return jnp.broadcast_to(array.astype(z.dtype), rows)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def solve(z: jax.Array, k: jax.Array, method: Method) -> tuple[jax.Array, jax.Array]:
    """Returns p [..., n] and tau [...] for scores [..., n] and k [...], both float32 or float64.

    Where several tau solve f(tau) = k (k is whole, with a gap of more than 1 below the k-th score), tau is the greatest
    of them. It is -inf where fewer than k scores are finite.
    """
    return _solve(z, k, method)


@functools.partial(jax.jit, static_argnums=2)  # one program where it is called outside of jit, too
def _solve(z: jax.Array, k: jax.Array, method: Method) -> tuple[jax.Array, jax.Array]:
    if z.shape[-1] == 0:
        return jnp.zeros_like(z), jnp.full_like(k, -jnp.inf)
    finite = z > -jnp.inf
    available = finite.sum(-1, dtype=jnp.int32)
    valid = k >= 0
    # A greater k gives -inf below; the rank must be one there is.
    rank = jnp.clip(jnp.ceil(jnp.where(valid, k, 0)), 1, jnp.maximum(available, 1).astype(z.dtype)).astype(jnp.int32)
    greatest = _nth_by_sort if method == "exact" else _nth_by_bits
    c = greatest(z, rank)
    y = jnp.where(z == c[..., None], 0, jnp.clip(z - c[..., None], -1, 1))  # equal infinities are 0 apart
    shift = (_root_by_sort if method == "exact" else _root_by_bisection)(y, k)
    # The step is exact where S and U are those of the root. The second takes away what the first has rounded.
    shift = _newton(y, k, _newton(y, k, shift))

    everything = k > available.astype(z.dtype)
    p = jnp.where(everything[..., None], 1, jnp.clip(y - shift[..., None], 0, 1))
    p = jnp.where(finite, p, 0)
    tau = jnp.where(everything, -jnp.inf, c + shift)
    bad = jnp.isnan(z).any(-1) | ~valid
    return jnp.where(bad[..., None], jnp.nan, p), jnp.where(bad, jnp.nan, tau)


@solve.defjvp
def _solve_jvp(method: Method, primals: Any, tangents: Any) -> Any:
    (z, k), (dz, dk) = primals, tangents
    p, tau = solve(z, k, method)
    # Rows of NaN have NaN derivatives, in both modes: every score counts as inside.
    bad = jnp.isnan(tau)
    poison = jnp.where(bad, jnp.nan, jnp.ones_like(tau))
    inside = ((p > 0) & (p < 1)) | bad[..., None]
    count = inside.sum(-1, dtype=jnp.int32).astype(z.dtype)
    dtau = (jnp.where(inside, dz, 0).sum(-1) - dk) / jnp.maximum(count, 1)
    dtau = jnp.where(count > 0, dtau, 0) * poison
    dp = jnp.where(inside, dz - dtau[..., None], 0) * poison[..., None]
    return (p, tau), (dp, dtau)


def _nth_by_sort(z: jax.Array, rank: jax.Array) -> jax.Array:
    """The rank-th greatest of each row; rank counts from 1."""
    descending = -jax.lax.sort(-z)
    position = of_rank(jnp.arange(z.shape[-1], dtype=jnp.int32), z.ndim)
    return jnp.where(position < rank[..., None], descending, jnp.inf).min(-1)


def _nth_by_bits(z: jax.Array, rank: jax.Array) -> jax.Array:
    """`_nth_by_sort` by bisection over all floating-point numbers in order, two bits per pass, at any range."""
    bits = jnp.finfo(z.dtype).bits
    unsigned = jnp.uint64 if bits == 64 else jnp.uint32
    top = unsigned(1 << (bits - 1))

    # Numbers with a sign bit count down: all bits flipped, they count up below those without, whose sign bit is set.
    raw = jax.lax.bitcast_convert_type(z, unsigned)
    order = jnp.where(raw >= top, ~raw, raw | top)

    def step(n: Any, found: jax.Array, order: jax.Array, rank: jax.Array) -> jax.Array:
        shift = jnp.asarray(bits - 2 - 2 * n).astype(unsigned)
        guesses = found[..., None] | (of_rank(np.arange(1, 4, dtype=unsigned), order.ndim) << shift)
        counts = (order[..., None, :] >= guesses[..., None]).sum(-1, dtype=jnp.int32)
        return found | ((counts >= rank[..., None]).sum(-1, dtype=unsigned) << shift)

    # Made of z, so that it is sharded and varies along mesh axes as z does.
    found = _repeat(bits // 2, step, jnp.zeros_like(order[..., 0]), order, rank)
    return jax.lax.bitcast_convert_type(jnp.where(found >= top, found ^ top, ~found), z.dtype)


def _repeat(count: int, step: Callable[..., jax.Array], state: jax.Array, *constants: jax.Array) -> jax.Array:
    """`fori_loop`, written out where a loop costs more than its body: on an H200 an iteration of XLA's takes 17 us.

    On CPUs it does not, and a loop compiles in a third of the time. JAX traces both, but the step, a function of its
    number, the state and the constants, once.
    """
    step = jax.jit(step)

    def loop(state: jax.Array, *constants: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, count, lambda n, state: step(n, state, *constants), state)

    def written_out(state: jax.Array, *constants: jax.Array) -> jax.Array:
        for n in range(count):
            state = step(n, state, *constants)
        return state

    return jax.lax.platform_dependent(state, *constants, cpu=loop, default=written_out)


def _root_by_sort(y: jax.Array, k: jax.Array) -> jax.Array:
    """The greatest root of f in [-1, 0], from f at every breakpoint inside.

    Scanning upwards, a score joins S at y - 1 (the slope of f falls by 1) and leaves it at y (the slope rises by 1).
    """
    joins = jnp.concatenate([jnp.ones_like(y, jnp.int32), -jnp.ones_like(y, jnp.int32)], -1)
    points = jnp.clip(jnp.concatenate([y - 1, y], -1), -1, 0)
    points, joins = jax.lax.sort((points, joins), num_keys=1)
    inside = jnp.cumsum(joins, axis=-1).astype(y.dtype)  # |S| above each point
    fall = inside[..., :-1] * (points[..., 1:] - points[..., :-1])
    start = jnp.clip(y + 1, 0, 1).sum(-1, keepdims=True)
    value = jnp.concatenate([start, start - jnp.cumsum(fall, axis=-1)], -1)

    # The last point with f >= k begins the piece of the root.
    index = of_rank(jnp.arange(points.shape[-1], dtype=jnp.int32), points.ndim)
    last = jnp.where(value >= k[..., None], index, 0).max(-1, keepdims=True)

    def at_last(x: jax.Array) -> jax.Array:
        return jnp.where(index == last, x, 0).sum(-1)

    begin, size = at_last(points), at_last(inside)
    step = jnp.where(size > 0, (at_last(value) - k) / jnp.maximum(size, 1), 0)
    return jnp.clip(begin + step, -1, 0)


def _root_by_bisection(y: jax.Array, k: jax.Array) -> jax.Array:
    """A lower bound of the greatest root of f in [-1, 0], within the rounding of the interval; two bits per pass."""

    def step(n: Any, low: jax.Array, y: jax.Array, k: jax.Array) -> jax.Array:
        width = jnp.exp2(-2.0 * (n + 1)).astype(y.dtype)
        points = low[..., None] + width * of_rank(np.arange(1, 4, dtype=y.dtype), y.ndim)
        enough = jnp.clip(y[..., None, :] - points[..., None], 0, 1).sum(-1) >= k[..., None]
        return low + width * enough.sum(-1, dtype=y.dtype)

    return _repeat((jnp.finfo(y.dtype).nmant + 3) // 2, step, jnp.zeros_like(y[..., 0]) - 1, y, k)


def _newton(y: jax.Array, k: jax.Array, shift: jax.Array) -> jax.Array:
    """tau from its piece: tau + (f(tau) - k) / |S|, the formula above with less to round."""
    above = y - shift[..., None]
    inside = (above > 0) & (above < 1)
    count = inside.sum(-1, dtype=jnp.int32).astype(y.dtype)
    ones = (above >= 1).sum(-1, dtype=jnp.int32).astype(y.dtype)
    excess = jnp.where(inside, above, 0).sum(-1) + (ones - k)
    return jnp.clip(jnp.where(count > 0, shift + excess / jnp.maximum(count, 1), shift), -1, 0)
