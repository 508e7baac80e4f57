"""The best scores of every prefix of a sequence; reading scores by number with a gradient that repeats bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Up to so many scores the derivatives look at all pairs: on a GPU a pass, where the alternative is sorts and scans.
MOST_PAIRS = 2048
# Prefixes that are solved together, in one step of a scan.
CHUNK = 256


def top_of_prefixes(z: jax.Array, k: int, chunk: int = CHUNK) -> jax.Array:
    """The k greatest scores of each prefix of one sequence.

    Exact and linear: a score that one prefix leaves out no longer prefix takes back, so the k best before a chunk and
    the chunk's own are all that counts. O(n (k + chunk)) numbers are sorted, a row of k + chunk at a time, in n / chunk
    steps; O(chunk (k + chunk)) memory.

    Args:
      z: scores [n], floating, n at least 1. -inf is never chosen, NaN before all others.
      k: number of scores to take, at least 1.

    Returns:
      int32 [n, k]: row t has the numbers of the best of z[..t], ascending, of equal ones the lower; then n.
    """
    n = z.shape[0]
    chunk = min(chunk, n)
    steps = -(-n // chunk)
    order = jnp.where(jnp.isnan(z), -jnp.inf, -z)
    order = jnp.pad(order, (0, steps * chunk - n), constant_values=jnp.inf).reshape(steps, chunk)
    numbers = jnp.arange(steps * chunk, dtype=jnp.int32).reshape(steps, chunk)
    seen = np.concatenate([np.ones((chunk, k), bool), np.tri(chunk, dtype=bool)], -1)

    def step(kept: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        order, numbers = (jnp.concatenate(pair) for pair in zip(kept, part, strict=True))
        # Those kept come first, and of equal ones the lower: a stable sort leaves it so. Sorted, not `lax.top_k`, which
        # XLA does not partition over examples and heads.
        rows = jnp.where(seen, order[None], jnp.inf), jnp.broadcast_to(numbers, seen.shape)
        order, numbers = (x[:, :k] for x in jax.lax.sort(rows, num_keys=1, is_stable=True))
        numbers = jnp.where(order < jnp.inf, numbers, n)
        return (order[-1], numbers[-1]), numbers

    # They are made of z, so that they are sharded and vary along mesh axes as z does.
    nothing = jnp.broadcast_to(jnp.where(jnp.ones_like(z[:1], bool), jnp.inf, z[:1]), (k,))
    start = nothing, jnp.where(nothing < jnp.inf, jnp.int32(0), n)
    _, numbers = jax.lax.scan(step, start, (order, numbers))
    return jax.lax.sort(numbers.reshape(steps * chunk, k)[:n])


@jax.custom_jvp
def take(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """x[numbers], of x [n] and int32 [m] in range, with derivatives of both modes that are bit-equal from run to run.

    The transpose of a gather is a scatter that adds, which on GPUs takes the order of its threads.
    """
    return x[numbers]


@take.defjvp
def _take_jvp(primals: Any, tangents: Any) -> Any:
    x, numbers = primals
    by = _take_by_pairs if x.shape[0] <= MOST_PAIRS else _take_by_runs
    return take(x, numbers), by(tangents[0], numbers)


def _take_by_pairs(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """x[numbers] as a sum over all of x: one pass each way."""
    return jnp.where(numbers[:, None] == jnp.arange(x.shape[0], dtype=numbers.dtype)[None], x[None], 0).sum(-1)


def _take_by_runs(x: jax.Array, numbers: jax.Array) -> jax.Array:
    """x[numbers] by numbers in order: the first of equal ones reads, the others copy.

    So each x is read once, and the transpose adds each sum in one order (and, where others would read, zeros).
    """
    positions = jnp.arange(numbers.shape[0], dtype=jnp.int32)
    ordered, origin = jax.lax.sort((numbers, positions), num_keys=1, is_stable=True)
    _, position = jax.lax.sort((origin, positions), num_keys=1, is_stable=False)
    first = jnp.concatenate([jnp.ones_like(ordered[:1], bool), ordered[1:] != ordered[:-1]])
    read = jnp.where(first, x[ordered], 0)

    def copy(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1])

    _, copied = jax.lax.associative_scan(copy, (first, read))
    return copied.at[position].get(unique_indices=True)
