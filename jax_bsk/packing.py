"""What packing sequences needs around attention: rows of documents, packed arrays, positions and numbers of sequences.

The module is beside the path of a call. `first_fit` and `best_fit` run on the host, in a data loader; `pack` and
`unpack` go between a list of arrays and one packed array; `positions` and `segment_ids` are traced.

`cu_seqlens` are integers [sequences + 1]: where each sequence begins, and where the last one ends. Repeated numbers are
sequences without tokens. Tokens before the first number and from the last one on are padding.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_bsk.core.arrays import is_traced

__all__ = ["Rows", "best_fit", "cu_seqlens", "first_fit", "pack", "positions", "segment_ids", "unpack"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Documents in rows of one length: what `first_fit` and `best_fit` found. Printed, it says how much is padding.

    Attributes:
      rows: Numbers of the documents of each row, in the order in which they stand there.
      lengths: Tokens of each document.
      length: Tokens of a row.

    Examples:
      >>> from jax_bsk import packing
      >>> rows = packing.best_fit([6, 5, 2], 8)
      >>> rows.rows, rows.cu_seqlens().tolist()
      (((0, 2), (1,)), [[0, 6, 8], [0, 5, 5]])
    """

    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    length: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.rows)

    @property
    def waste(self) -> float:
        """Share of the rows' tokens that is padding; 0 without rows."""
        total = len(self.rows) * self.length
        return 1 - sum(self.lengths) / total if total else 0.0

    def cu_seqlens(self, sequences: int | None = None) -> np.ndarray:
        """Where the documents of each row begin: int32 [rows, sequences + 1].

        Args:
          sequences: Number of sequences to make room for; by default the most that a row has.

        Returns:
          One list per row; for rows with fewer documents the last number is repeated.

        Raises:
          ValueError: A row has more documents.
        """
        most = max(map(len, self.rows), default=0)
        sequences = max(1, most) if sequences is None else sequences
        lists = [cu_seqlens([self.lengths[n] for n in row], sequences) for row in self.rows]
        return np.stack(lists) if lists else np.zeros((0, sequences + 1), np.int32)

    def __str__(self) -> str:
        return (
            f"{len(self.lengths)} documents of {sum(self.lengths):,} tokens in {len(self.rows)} rows of "
            f"{self.length:,}, {self.waste:.1%} of them padding"
        )


def first_fit(lengths: Sequence[int] | np.ndarray, length: int) -> Rows:
    """Puts each document, in the order given, into the first row that has room for it.

    A row is found by bisection, so n documents take O(n log n) steps.

    Args:
      lengths: Tokens of each document.
      length: Tokens of a row.

    Returns:
      `Rows`.

    Raises:
      TypeError: A length is no integer.
      ValueError: A document is longer than a row, or a length is negative.

    Examples:
      >>> from jax_bsk import packing
      >>> rows = packing.first_fit([5, 7, 3, 1], 8)
      >>> rows.rows
      ((0, 2), (1, 3))
      >>> print(rows)
      4 documents of 16 tokens in 2 rows of 8, 0.0% of them padding
    """
    sizes, length = _sizes(lengths, length)
    leaves = 1
    while leaves < len(sizes):
        leaves *= 2
    room = [length] * (2 * leaves)  # of row n at leaves + n; above, the most of both below
    rows: list[list[int]] = []
    for number, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        row = node - leaves
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return Rows(tuple(map(tuple, rows)), sizes, length)


def best_fit(lengths: Sequence[int] | np.ndarray, length: int) -> Rows:
    """Puts each document, the longest first, into the fullest row that has room for it (best-fit decreasing).

    It knows all documents beforehand and wastes less than `first_fit`. Within a row documents are in the order given.
    Best-fit packing of training documents is described by Ding et al., arXiv 2404.10830.

    Args:
      lengths: Tokens of each document.
      length: Tokens of a row.

    Returns:
      `Rows`.

    Raises:
      TypeError: A length is no integer.
      ValueError: A document is longer than a row, or a length is negative.

    Examples:
      >>> from jax_bsk import packing
      >>> packing.best_fit([3, 5, 4, 4], 8).rows
      ((0, 1), (2, 3))
      >>> print(packing.best_fit([6, 5], 8))
      2 documents of 11 tokens in 2 rows of 8, 31.2% of them padding
    """
    sizes, length = _sizes(lengths, length)
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), ascending
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        at = bisect.bisect_left(open_rows, (sizes[number], -1))
        if at < len(open_rows):
            room, row = open_rows.pop(at)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(number)
        bisect.insort(open_rows, (room - sizes[number], row))
    in_order = sorted(tuple(sorted(row)) for row in rows)
    return Rows(tuple(in_order), sizes, length)


def _sizes(lengths: Any, length: int) -> tuple[tuple[int, ...], int]:
    array = np.asarray(lengths)
    if array.ndim != 1 or not (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        raise TypeError(f"lengths is a sequence of integers, got {array.dtype}{array.shape}; give one per document")
    if array.size and (array.min() < 0 or array.max() > length):
        raise ValueError(
            f"lengths is in [0, {length}], the tokens of a row, got {array.min()} to {array.max()}; cut longer ones"
        )
    return tuple(array.tolist()), int(length)


def cu_seqlens(lengths: ArrayLike | Sequence[int], sequences: int | None = None) -> Any:
    """Where sequences begin, of their lengths.

    Args:
      lengths: Integers [n], host or traced.
      sequences: Number of sequences to make room for; n if not given.

    Returns:
      int32 [sequences + 1], whose last number is repeated where there is room for more: a NumPy array, or a JAX array
      where `lengths` is one.

    Raises:
      ValueError: There are more lengths.

    Examples:
      >>> from jax_bsk import packing
      >>> packing.cu_seqlens([2, 0, 3], 4).tolist()
      [0, 2, 2, 5, 5]
    """
    array: Any = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths, np.int32)
    xp = jnp if isinstance(array, jax.Array) else np
    more = 0 if sequences is None else sequences - array.shape[0]
    if array.ndim != 1 or more < 0:
        raise ValueError(f"lengths is [n] with n at most sequences={sequences}, got {array.shape}; make room for more")
    return xp.concatenate([xp.zeros(1, np.int32), xp.cumsum(xp.pad(array.astype(np.int32), (0, more)), dtype=np.int32)])


def pack(arrays: Sequence[Any], length: int | None = None, *, sequences: int | None = None) -> tuple[Any, Any]:
    """Puts arrays one after another, and says where each begins.

    Args:
      arrays: Arrays [tokens, ...] that differ in their first dimension alone; at least one.
      length: Tokens of the packed array; zeros follow the last one. None adds none.
      sequences: Number of sequences to make room for in `cu_seqlens`; by default as many as there are arrays.

    Returns:
      The packed array [length, ...] and `cu_seqlens`, int32 [sequences + 1], a NumPy array. The packed array is a
      NumPy array if all arrays are.

    Raises:
      ValueError: There is no array, they do not fit each other, or there is not enough room.

    Examples:
      >>> import numpy as np
      >>> from jax_bsk import packing
      >>> packed, starts = packing.pack([np.ones((2, 4)), np.ones((3, 4))], 8)
      >>> packed.shape, starts.tolist()
      ((8, 4), [0, 2, 5])
    """
    arrays = list(arrays)
    if not arrays:
        raise ValueError("arrays is a list of at least one array, got none; a packed array has their type and shape")
    kinds = {(str(x.dtype), x.shape[1:]) for x in arrays}
    if len(kinds) > 1:
        raise ValueError(f"arrays have one type and one shape but for their first dimension, got {sorted(kinds)}")
    starts = cu_seqlens([x.shape[0] for x in arrays], sequences)
    total = int(starts[-1])
    if length is not None and length < total:
        raise ValueError(f"length is at least the {total} tokens of all arrays, got {length}; pack fewer of them")
    xp: Any = np if all(isinstance(x, np.ndarray) for x in arrays) else jnp
    packed = xp.concatenate(arrays)
    more = 0 if length is None else length - total
    return xp.pad(packed, [(0, more)] + [(0, 0)] * (packed.ndim - 1)), starts


def unpack(packed: Any, cu_seqlens: ArrayLike | Sequence[int], count: int | None = None) -> list[Any]:
    """Takes the sequences out of a packed array.

    Args:
      packed: Array [tokens, ...], host or traced.
      cu_seqlens: Integers [sequences + 1] with known values: they decide shapes.
      count: Number of sequences to take; all if not given. `cu_seqlens` that were padded have empty ones at the end.

    Returns:
      One array [tokens of the sequence, ...] for each sequence.

    Raises:
      TypeError: `cu_seqlens` are traced.

    Examples:
      >>> import numpy as np
      >>> from jax_bsk import packing
      >>> [x.tolist() for x in packing.unpack(np.arange(6), [0, 2, 5])]
      [[0, 1], [2, 3, 4]]
    """
    if is_traced(cu_seqlens):
        raise TypeError("cu_seqlens has known values, as they decide the shapes of the results, got a traced array")
    starts = np.asarray(cu_seqlens).tolist()
    return [packed[begin:end] for begin, end in itertools.pairwise(starts)][:count]


def positions(cu_seqlens: ArrayLike | Sequence[int], tokens: int) -> jax.Array:
    """The position of each token in its sequence, as rotary embeddings need it.

    Args:
      cu_seqlens: Integers [..., sequences + 1], host or traced.
      tokens: Number of tokens of the packed array.

    Returns:
      int32 [..., tokens]; 0 for padding.

    Examples:
      >>> from jax_bsk import packing
      >>> packing.positions([0, 2, 5], 6).tolist()
      [0, 1, 0, 1, 2, 0]
    """
    return _of_tokens(cu_seqlens, tokens)[1]


def segment_ids(cu_seqlens: ArrayLike | Sequence[int], tokens: int) -> jax.Array:
    """The number of each token's sequence.

    Args:
      cu_seqlens: Integers [..., sequences + 1], host or traced.
      tokens: Number of tokens of the packed array.

    Returns:
      int32 [..., tokens] that never decreases; -1 for padding before the first sequence, and the number of sequences
      for padding after the last one.

    Examples:
      >>> from jax_bsk import packing
      >>> packing.segment_ids([0, 2, 2, 5], 6).tolist()
      [0, 0, 2, 2, 2, 3]
    """
    return _of_tokens(cu_seqlens, tokens)[0]


def _of_tokens(cu_seqlens: ArrayLike | Sequence[int], tokens: int) -> tuple[jax.Array, jax.Array]:
    """The number of each token's sequence, and its position in it."""
    starts: jax.Array = jnp.asarray(
        np.asarray(cu_seqlens) if isinstance(cu_seqlens, Sequence) else cu_seqlens, np.int32
    )
    if starts.ndim > 1:
        flat = jax.vmap(lambda one: _of_tokens(one, tokens))(starts.reshape(-1, starts.shape[-1]))
        ids, places = (x.reshape(*starts.shape[:-1], tokens) for x in flat)
        return ids, places
    token = jnp.arange(tokens, dtype=np.int32)
    ids = (starts[None] <= token[:, None]).sum(-1, dtype=np.int32) - np.int32(1)
    sequences = starts.shape[0] - 1
    inside = (ids >= 0) & (ids < sequences)
    return ids, jnp.where(inside, token - starts[jnp.clip(ids, 0, sequences)], 0)
