"""What a bias is made of when it reaches an implementation: at most one array of each of four kinds.

Below the public objects, each of which says what its terms are; `lowering` adds them up.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_bsk.core.dtypes import statistics_dtype
from jax_bsk.masks import BlockMask


class Terms(NamedTuple):
    """The terms of a bias, whose sum is added to the logits after the soft cap; None where there is none of a kind.

    B, N, T and S are examples, query heads, queries and keys; 1 where the term is shared.

    Attributes:
      dense: [B|1, N|1, T|1, S|1], of query's type or the statistics type.
      distances: [B|1, N|1, T + S - 1] in the statistics type; element key - query + T - 1.
      tiles: [B|1, N|1, count, block_q|1, block_kv|1] in the statistics type.
      numbers: int32 [.., .., capacity], the tile that each entry of the lists adds; a negative one adds nothing. From
        an object, None: each entry adds the tile of its own position. From `lowering.lower`, of the lists' shape.
      query_features: [B|1, T, N|1, F]; the bias is the product with
      key_features: [B|1, S, N|K|1, F], K key/value heads.
    """

    dense: Any = None
    distances: Any = None
    tiles: Any = None
    numbers: Any = None
    query_features: Any = None
    key_features: Any = None


@dataclasses.dataclass(frozen=True)
class Call:
    """What a bias must know of the call it is given to.

    Attributes:
      batch, heads, kv_heads, q_len, kv_len: Sizes; lengths are those of the whole sequence.
      own: Queries and keys of the call's arrays: where a `shard_map` gives it a shard of a sequence, fewer.
      dtype: Type of the queries.
      unbatched: Whether the call's arrays have no batch dimension.
      mask: The `BlockMask` that the user gave, or None where the mask is another.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    own: tuple[int, int]
    dtype: Any
    unbatched: bool
    mask: BlockMask | None

    @property
    def stats(self) -> np.dtype:
        """The statistics type."""
        return statistics_dtype(self.dtype)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(B, N, T, S)."""
        return self.batch, self.heads, self.q_len, self.kv_len


def check_dims(
    array: jax.Array, wanted: tuple[tuple[str, int | tuple[int, ...]], ...], name: str, batched: bool = True
) -> jax.Array:
    """An array with all of its dimensions, checked.

    Args:
      array: The array; its first dimension, the batch, may be missing.
      wanted: Letter and size of each dimension. A size in a pair with others is one of them.
      name: What the message calls the array.
      batched: Whether the message names the batch.

    Raises:
      ValueError: A dimension has another size.
    """
    if array.ndim == len(wanted) - 1:
        array = array[None]
    sizes = [n if isinstance(n, tuple) else (n,) for _, n in wanted]
    if array.ndim != len(wanted) or any(n not in of for n, of in zip(array.shape, sizes, strict=True)):
        shown = wanted if batched else wanted[1:]
        letters = ", ".join(letter for letter, _ in shown)
        numbers = ", ".join("|".join(str(n) for n in dict.fromkeys(of)) for of in sizes[len(wanted) - len(shown) :])
        raise ValueError(
            f"{name} is [{letters}] = [{numbers}], got shape {array.shape}; give it dimensions of these sizes"
        )
    return array
