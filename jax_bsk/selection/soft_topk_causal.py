"""SparseK over prefixes: the thresholds of all positions at once, or step by step in decoding (arXiv 2406.16747).

The operator of position t selects among the scores z[..t]. The causal form rests on two facts. Let f_t be the sum f of
the prefix that ends at t. k stays the same, and tau_t is the greatest root of f_t(tau) = k (-inf while there are fewer
than k scores).

**tau never decreases.** f_{t+1}(x) = f_t(x) + clip(z_{t+1} - x, 0, 1) >= f_t(x). So every x with f_t(x) >= k has
f_{t+1}(x) >= k, and the greatest such x, which is tau, cannot become smaller. (For k = 0 tau is the maximum.)

**A dropped key never returns.** Key s counts for position t if z_s > tau_t. Once z_s <= tau_t, all later tau are at
least tau_t. The key has no part in any later f_t near its root either, so it can be forgotten.

U and S together must be remembered. |U| <= k, and the scores of S lie in one interval of width 1, so at most k keys
plus the largest number of keys with scores in one such interval are remembered. No smaller bound holds for all inputs:
n equal scores all stay, with p = k / n. Whether a fixed capacity C is exact depends on the scores, but it is known:
with the C greatest scores of the prefix, tau is right if and only if no score beyond them is greater than tau.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jax_bsk.core.arrays import of_rank
from jax_bsk.selection.soft_topk import budget, floating_scores, solve, sparsek, widen


class SparseKCausal(NamedTuple):
    """Result of `sparsek_causal`: three arrays [..., n] with one number per position.

    Attributes:
      tau: Threshold of the prefix that ends at the position, in float32 (float64 for float64 scores); -inf while the
        prefix has fewer than k scores.
      gates: Gate p of the position's own key in its prefix, of the scores' type.
      exact: Boolean that tells whether the capacity was enough at the position.
    """

    tau: jax.Array
    gates: jax.Array
    exact: jax.Array


def sparsek_causal(scores: ArrayLike, k: ArrayLike, *, capacity: int | None = None, chunk: int = 128) -> SparseKCausal:
    """Computes `sparsek` of every prefix: position t selects among the scores up to and including its own.

    The gate of key s for query t >= s is clip(scores[s] - tau[t], 0, 1). tau never decreases along the sequence, so the
    queries that use a key form one interval. Derivatives (forward and reverse mode) are prefix sums over these
    intervals, in O(n log n). A position that sees fewer than k scores has gates of 1 and derivatives of 0.

    The thresholds take O(n (capacity + chunk)) operations (with the factor of `method="fast"`) in n / chunk steps of
    `lax.scan`, and O(chunk (capacity + chunk)) memory.

    Args:
      scores: Floating array [..., n]; -inf is never selected. A NaN makes its position and all later ones NaN.
      k: Number of scores to select, as in `sparsek`; it broadcasts to [...].
      capacity: Number of greatest scores before a chunk that are kept. None keeps all, which is always exact and takes
        quadratic time. Where the capacity is too small, `exact` is False, and tau is that of the scores kept, below
        the true one.
      chunk: Number of positions that are solved together.

    Returns:
      A `SparseKCausal` of tau, gates and exact, each [..., n].

    Raises:
      TypeError: The scores are not floating point, k is no number, or capacity or chunk is no integer.
      ValueError: k is negative or does not broadcast, capacity or chunk is not positive, or capacity is less than k.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jax_bsk import sparsek_causal
      >>> result = sparsek_causal(jnp.array([0.5, 0.25, 1.5, -1.0]), k=1)
      >>> print(result.tau)
      [-0.5   -0.125  0.5    0.5  ]
      >>> print(result.gates)
      [1.    0.375 1.    0.   ]
    """
    scores = floating_scores(scores)
    z = widen(scores)
    n = z.shape[-1]
    room = n if capacity is None else _size(capacity, "capacity", k)
    tau, gates, forgotten = _prefixes(z, budget(k, z), min(room, n), min(_size(chunk, "chunk"), max(n, 1)))
    return SparseKCausal(tau, gates.astype(scores.dtype), jax.lax.stop_gradient(forgotten <= tau))


def _size(value: Any, name: str, k: ArrayLike | None = None) -> int:
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is an int, got {value!r}") from None
    least = 1
    if k is not None and not isinstance(k, Tracer | jax.Array):
        least = max(1, math.ceil(np.max(np.asarray(k), initial=0)))
    if size < least:
        raise ValueError(f"{name} is at least {least}, got {size}" + (" (as many keys stay)" if least > 1 else ""))
    return size


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _prefixes(z: jax.Array, k: jax.Array, capacity: int, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns tau, own gates and the greatest score that was forgotten before, all [..., n]."""
    return _scan(z, k, capacity, chunk)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _scan(z: jax.Array, k: jax.Array, capacity: int, chunk: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    *lead, n = z.shape
    if n == 0:
        return z, z, z
    chunks = -(-n // chunk)
    parts = jnp.pad(z, [(0, 0)] * len(lead) + [(0, chunks * chunk - n)], constant_values=-jnp.inf)
    parts = jnp.moveaxis(parts.reshape(*lead, chunks, chunk), -2, 0)
    own = of_rank(np.eye(chunk, dtype=bool), z.ndim + 1)
    seen = of_rank(np.concatenate([np.ones((chunk, capacity), bool), np.tri(chunk, dtype=bool)], -1), z.ndim + 1)

    def step(carry: tuple[jax.Array, ...], part: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        kept, forgotten, last = carry
        candidates = jnp.concatenate([kept, part], -1)
        # ---- every position of the chunk: the kept scores and the chunk's up to its own ----
        rows = jnp.where(seen, candidates[..., None, :], -jnp.inf)
        p, tau = solve(rows, jnp.broadcast_to(k[..., None], tau_shape), "fast")
        gates = jnp.where(own, p[..., capacity:], 0).sum(-1)
        # In exact arithmetic this changes nothing; a NaN stays.
        tau = jnp.maximum(jax.lax.cummax(tau, axis=tau.ndim - 1), last[..., None])
        gates = jnp.where(jnp.isnan(tau), jnp.nan, gates)
        # ---- keep the greatest ----
        descending = -jax.lax.sort(-candidates)
        beyond = descending[..., capacity:].max(-1)
        result = tau, gates, jnp.broadcast_to(forgotten[..., None], tau.shape)
        return (descending[..., :capacity], jnp.maximum(forgotten, beyond), tau[..., -1]), result

    tau_shape = (*lead, chunk)
    nothing = jnp.where(jnp.ones_like(z[..., :1], bool), -jnp.inf, z[..., :1])  # of z, so that it is sharded like it
    start = jnp.broadcast_to(nothing, (*lead, capacity)), nothing[..., 0], nothing[..., 0]
    _, results = jax.lax.scan(step, start, parts)
    tau, gates, forgotten = (jnp.moveaxis(x, 0, -2).reshape(*lead, chunks * chunk)[..., :n] for x in results)
    return tau, gates, forgotten


@_prefixes.defjvp
def _prefixes_jvp(capacity: int, chunk: int, primals: Any, tangents: Any) -> Any:
    (z, k), (dz, dk) = primals, tangents
    tau, gates, forgotten = _prefixes(z, k, capacity, chunk)
    sums = _sums_over_inside
    for _ in z.shape[:-1]:
        sums = jax.vmap(sums)
    total, count = sums(z, tau, dz)
    dtau = jnp.where(count > 0, (total - dk[..., None]) / jnp.maximum(count, 1).astype(z.dtype), 0)
    poison = jnp.where(jnp.isnan(tau), jnp.nan, jnp.ones_like(tau))
    dtau = dtau * poison
    dgates = jnp.where((gates > 0) & (gates < 1), dz - dtau, 0) * poison
    return (tau, gates, forgotten), (dtau, dgates, jnp.zeros_like(forgotten))


# Greatest number of positions at which all pairs of keys and positions are compared. On a GPU that is one pass each
# way, while the sums over intervals are searches, scatters and scans.
MOST_PAIRS = 2048


def _sums_over_inside(z: jax.Array, tau: jax.Array, dz: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of dz over S_t, and |S_t|, for each position t of one sequence."""
    if z.shape[0] > MOST_PAIRS:
        return _sums_over_intervals(z, tau, dz)
    seen = np.tri(z.shape[0], dtype=bool)
    inside = seen & (tau[:, None] < z[None]) & (z[None] - 1 < tau[:, None])
    return jnp.where(inside, dz[None], 0).sum(-1), inside.sum(-1, dtype=jnp.int32)


def _sums_over_intervals(z: jax.Array, tau: jax.Array, dz: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the same as `_sums_over_inside` in O(n log n).

    tau never decreases, so key s is in S for an interval of positions t >= s: from the first with tau_t > z_s - 1 up to
    the first with tau_t >= z_s. A prefix sum over starts and ends of the intervals is the sum over keys, linear in dz.
    """
    n = z.shape[0]
    begin = jnp.searchsorted(tau, z - 1, side="right").astype(jnp.int32)
    begin = jnp.maximum(begin, jnp.arange(n, dtype=jnp.int32))
    end = jnp.searchsorted(tau, z, side="left").astype(jnp.int32)
    used = begin < end

    def covered(x: jax.Array) -> jax.Array:
        x = jnp.where(used, x, 0)
        return jnp.cumsum(jnp.zeros(n + 1, x.dtype).at[begin].add(x).at[end].add(-x))[:n]

    return covered(dz), covered(jnp.ones(n, jnp.int32))


class SparseKState(NamedTuple):
    """State of SparseK in decoding: the keys that still count, in `capacity` slots (arXiv 2406.16747). It is a pytree.

    `init` makes a state, and `step` advances it by one key. A slot whose key is dropped is free, and the next key takes
    the free slot of lowest number. So a cache of keys and values needs `capacity` entries as well, and the entry of
    slot i is that of position `positions[..., i]`. Where all slots are taken, the key of the lowest score (of the slots
    and the new one) is forgotten. Thresholds are then those of the greatest `capacity` scores, below the true ones
    while `exact` is False. `exact` becomes True again once tau has passed every score that was forgotten.

    Attributes:
      scores: [..., capacity] scores of the kept keys; -inf in free slots.
      positions: int32 [..., capacity] positions of the kept keys; -1 in free slots.
      tau: [...] threshold, which never decreases; -inf while there were fewer than k keys.
      forgotten: [...] greatest score that found no room; -inf if there is none.
      length: int32 [] number of keys seen.
      k: [...] number of keys to select.

    Examples:
      >>> from jax_bsk import SparseKState
      >>> state = SparseKState.init(k=1, capacity=4)
      >>> for score in (0.5, 0.25, 1.5):
      ...     state, tau, kept = state.step(score)
      >>> tau.item(), state.positions.tolist()
      (0.5, [-1, -1, 2, -1])
    """

    scores: jax.Array
    positions: jax.Array
    tau: jax.Array
    forgotten: jax.Array
    length: jax.Array
    k: jax.Array

    @classmethod
    def init(
        cls, k: ArrayLike, *, capacity: int, shape: tuple[int, ...] = (), dtype: DTypeLike = jnp.float32
    ) -> SparseKState:
        """Makes the state before the first key.

        Args:
          k: Number of keys to select, as in `sparsek`; it broadcasts to `shape`.
          capacity: Number of slots, at least k. k plus the largest number of keys with scores in an interval of width 1
            is always enough.
          shape: Shape [...] of the batch.
          dtype: Type of the state, float32 or float64.

        Returns:
          A state without keys.

        Raises:
          TypeError: k is no number, capacity no integer, or dtype another type.
          ValueError: k is negative or does not broadcast, or capacity is not positive or less than k.
        """
        if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
            raise TypeError(f"dtype is float32 or float64, got {jnp.dtype(dtype)}; steps take scores of any type")
        scores = jnp.full((*shape, _size(capacity, "capacity", k)), -jnp.inf, dtype)
        nothing = jnp.full(shape, -jnp.inf, dtype)
        positions = jnp.full(scores.shape, -1, jnp.int32)
        return cls(scores, positions, nothing, nothing, jnp.int32(0), budget(k, scores))

    def step(self, score: ArrayLike) -> tuple[SparseKState, jax.Array, jax.Array]:
        """Advances the state by one key, in O(capacity) operations. The step is differentiable, also through the state.

        Args:
          score: Floating scores [...] of the next key. -inf is never kept; a NaN makes tau NaN from here on.

        Returns:
          The new state; tau [...]; and booleans [..., capacity] that tell which slots have keys with a gate above 0.
          The new key is in slot i if `state.positions[..., i] == state.length - 1`, and in no slot if it is not kept.

        Raises:
          ValueError: The score has another shape than the batch, or is not floating point.
        """
        score = jnp.asarray(score)
        if score.shape != self.tau.shape or not jnp.issubdtype(score.dtype, jnp.floating):
            raise ValueError(
                f"score is floating of the state's batch shape {self.tau.shape}, got {score.dtype}{score.shape}"
            )
        return _step(self, score.astype(self.scores.dtype))

    @property
    def gates(self) -> jax.Array:
        """Gates p [..., capacity] of the kept keys: 0 in free slots, NaN where tau is NaN. They are differentiable."""
        gates = sparsek(self.scores, self.k, method="fast")
        return jnp.where(jnp.isnan(self.tau)[..., None], jnp.nan, gates)

    @property
    def exact(self) -> jax.Array:
        """Booleans [...] that tell whether tau is the threshold of all keys seen."""
        return self.forgotten <= self.tau


@jax.jit
def _step(state: SparseKState, score: jax.Array) -> tuple[SparseKState, jax.Array, jax.Array]:
    nan = jnp.isnan(score) | jnp.isnan(state.tau)
    new = jnp.where(jnp.isnan(score), -jnp.inf, score)
    # ---- the least slot, free ones first, against the new key ----
    slot = jnp.argmin(state.scores, axis=-1)
    least = state.scores.min(-1)
    replaced = (of_rank(jnp.arange(state.scores.shape[-1]), state.scores.ndim) == slot[..., None]) & (new > least)[
        ..., None
    ]
    scores = jnp.where(replaced, new[..., None], state.scores)
    positions = jnp.where(replaced, state.length, state.positions)
    forgotten = jnp.maximum(state.forgotten, jax.lax.stop_gradient(jnp.minimum(least, new)))
    # ---- the threshold, and what it drops ----
    gates, tau = solve(scores, state.k, "fast")
    tau = jnp.where(nan, jnp.nan, jnp.maximum(tau, state.tau))
    kept = gates > 0
    scores = jnp.where(kept, scores, -jnp.inf)
    positions = jnp.where(kept, positions, -1)
    return SparseKState(scores, positions, tau, forgotten, state.length + 1, state.k), tau, kept


__all__ = ["SparseKCausal", "SparseKState", "sparsek_causal"]
