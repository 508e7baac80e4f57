"""`TreeMask`: each token attends to its ancestors in a tree, which is given by parents."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import Array, known
from jax_bsk.masks._text import short
from jax_bsk.masks.algebra._ranges import of_lists
from jax_bsk.masks.algebra.mask import Mask
from jax_bsk.masks.grid import MAX_LENGTH, OWN, Grid, min_max

__all__ = ["TreeMask"]


class TreeMask(Mask):
    """Each token attends to itself and its ancestors in a tree, and to all tokens before the tree.

    Trees are drafts of speculative decoding, or answers that share a prompt. A mask of n tokens needs 8 bytes for each:
    token a is an ancestor of token b where b lies in a's interval of the order in which a walk visits the tree.

    Args:
      parents: for each token of the tree the number of its parent, which comes before it, or -1 for a root; integers
        [n] or [B|1, n], host or traced. Several roots make several trees.

    Raises:
      TypeError: where parents hold no integers.
      ValueError: where a parent on the host does not come before its child; when bound, where there are not n queries,
        or fewer keys. Keys beyond n lie before the tree, and all of its tokens attend to them.

    With traced parents the walk is a loop over the tokens in the program.

    Examples:
      >>> from jax_bsk.masks import TreeMask
      >>> TreeMask([-1, 0, 0]).bind(3, 5, block_size=32).to_dense()[0, 0].astype(int).tolist()
      [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]
    """

    _data_fields = ("parents",)
    _coarse_bounds = True
    parents: Array

    def __init__(self, parents: ArrayLike | Sequence[Any]) -> None:
        array = of_lists(parents)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"TreeMask: parents must hold integers, given {array.dtype}{array.shape}; cast them")
        if array.ndim not in (1, 2):
            raise ValueError(f"TreeMask: parents must be [n] or [B|1, n], given shape {array.shape}")
        if (values := known(array)) is not None:
            late = np.argwhere(values >= np.arange(array.shape[-1]))
            if late.size:
                place = tuple(late[0].tolist())
                raise ValueError(
                    f"TreeMask: parents{list(place)} = {int(values[place])} must come before its child; order "
                    "the tokens so that parents come first, and give -1 for roots"
                )
        self._set(parents=array)

    def _leaf_dims(self, name: str) -> str:
        return "b" if np.ndim(self.parents) == 2 else ""

    def _validate(self, q_len: int, kv_len: int) -> None:
        n = self.parents.shape[-1]
        if q_len != n or kv_len < n:
            raise ValueError(
                f"TreeMask: parents has shape {self.parents.shape}; expected a last dimension of q_len={q_len} and at "
                f"least as many keys, got kv_len={kv_len}; give one parent per query"
            )

    def _walk(self, grid: Grid) -> tuple[Any, Any]:
        """int32 [n]: at which step a walk enters each token, and how many steps its subtree takes."""
        if grid.xp is np:
            return _walk_on_host(np.asarray(self.parents, np.int64).tobytes())
        return _walk_traced(jnp.asarray(self.parents).astype(jnp.int32))

    def _of_keys(self, grid: Grid) -> tuple[Any, Any, Any]:
        """int32 [n]: steps of the queries. int32 [kv_len]: steps of each key's subtree, first and behind the last."""
        enter, size = self._walk(grid)
        before = grid.kv_len - enter.shape[0]
        first = grid.xp.concatenate([grid.xp.full(before, -1, np.int32), enter])
        last = grid.xp.concatenate([grid.xp.full(before, MAX_LENGTH, np.int32), enter + size])
        return enter, first, last

    def _classify(self, grid: Grid, i: Array, j: Array) -> Array:
        enter, first, last = self._of_keys(grid)
        q_min, q_max = (x[i] for x in min_max(grid, enter, grid.nq, grid.block_q))
        first_min, first_max = (x[j] for x in min_max(grid, first, grid.nk, grid.block_kv))
        last_min, last_max = (x[j] for x in min_max(grid, last, grid.nk, grid.block_kv))
        return grid.code((q_max < first_min) | (q_min >= last_max), (q_min >= first_max) & (q_max < last_min), OWN)

    def _evaluate(self, grid: Grid, q: Array, k: Array) -> Array:
        enter, first, last = self._of_keys(grid)
        # A query before the first selects nothing.
        at, k = grid.xp.where(q < 0, -2, enter[grid.clip_q(q)]), grid.clip_kv(k)
        return (first[k] <= at) & (at < last[k])

    def _repr_arguments(self) -> list[str]:
        return [short(self.parents)]


@functools.lru_cache(maxsize=8)
def _walk_on_host(parents: bytes) -> tuple[np.ndarray, np.ndarray]:
    above = np.frombuffer(parents, np.int64).tolist()  # a list: 10 times faster to read one by one
    n = len(above)
    size, enter, free = [1] * n, [0] * n, [0] * n
    for token in range(n - 1, -1, -1):
        if above[token] >= 0:
            size[above[token]] += size[token]
    roots = 0
    for token, parent in enumerate(above):
        # The next step inside of the parent's subtree that no earlier child has taken.
        if parent < 0:
            at, roots = roots, roots + size[token]
        else:
            at = free[parent]
            free[parent] = at + size[token]
        enter[token], free[token] = at, at + 1
    return np.array(enter, np.int32), np.array(size, np.int32)


def _walk_traced(parents: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = parents.shape[0]
    parents = jnp.where(parents < 0, n, jnp.minimum(parents, n))  # roots are children of token n

    def add(step: Any, size: jax.Array) -> jax.Array:
        token = n - 1 - step
        return size.at[parents[token]].add(size[token])

    size = jax.lax.fori_loop(0, n, add, jnp.ones(n + 1, jnp.int32))

    def visit(token: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        enter, free = state
        at = free[parents[token]]
        free = free.at[parents[token]].add(size[token]).at[token].set(at + 1)
        return enter.at[token].set(at), free

    enter, _ = jax.lax.fori_loop(0, n, visit, (jnp.zeros(n, jnp.int32), jnp.zeros(n + 1, jnp.int32)))
    return enter, size[:n]
