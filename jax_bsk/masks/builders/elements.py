"""Elements of a lazy mask at given queries and keys, in JAX: for what asks about a few of them (selections)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jax_bsk.core import explicit_mesh
from jax_bsk.core.arrays import Array, is_array
from jax_bsk.masks.algebra.mask import Mask, has_multi_head
from jax_bsk.masks.builders._traced import over_examples_and_heads
from jax_bsk.masks.grid import Grid


def elements(mask: Mask, grid: Grid, q: Array, k: Array) -> jax.Array:
    """bool [B|1, H|1, n, m]: whether the queries `q` [n] attend to the keys `k` [m], host or traced indices.

    The mask knows the sizes of its call (`Mask._sized`), and fits the lengths.
    """
    mask = jax.tree.map(lambda leaf: leaf if is_array(leaf) else np.asarray(leaf), mask)
    leaves, structure = jax.tree_util.tree_flatten(mask)
    grid = dataclasses.replace(grid, xp=jnp)

    def evaluated(*arrays: jax.Array) -> jax.Array:
        *leaves, q, k = arrays
        whole = structure.unflatten(leaves)
        if not has_multi_head(whole):
            return _of_tables(whole, grid, q, k)
        heads = [_of_tables(whole._select(None, h), grid, q, k) for h in range(whole.heads)]
        return jnp.concatenate([jnp.broadcast_to(x, (whole.batch, *x.shape[1:])) for x in heads], axis=1)

    arrays = [*leaves, jnp.asarray(q), jnp.asarray(k)]
    return explicit_mesh.call(evaluated, arrays, [*(dims for _, dims in mask._arrays()), "", ""])


def _of_tables(mask: Mask, grid: Grid, q: jax.Array, k: jax.Array) -> jax.Array:
    leaves, structure = jax.tree_util.tree_flatten(mask)

    def one(*leaves: jax.Array) -> tuple[jax.Array]:
        attended = structure.unflatten(leaves)._evaluate(grid, q[:, None], k[None, :])
        return (jnp.broadcast_to(attended, (q.size, k.size)),)

    (found,) = over_examples_and_heads(one, leaves, [dims for _, dims in mask._arrays()])
    return jnp.asarray(found)
