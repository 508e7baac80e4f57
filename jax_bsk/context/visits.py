"""Which key blocks the query blocks of a host mask visit, per shard of a sharded sequence.

A shard has the rows of its own queries. What it needs of the others' keys follows from the lists, so a program can be
compiled that sends this and nothing else. `Visits` is a static part of such a call: hashable by the lists' content.
"""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import jax
import jax.core
import numpy as np

from jax_bsk.masks import BlockMask

_KEPT = 1 << 22  # answers of at most so many booleans are kept


class Visits:
    """The lists of a host mask, as far as they say which query block visits which key block.

    Attributes:
      rows: Number of query blocks.
      columns: Number of key blocks.
    """

    def __init__(self, mask: BlockMask):
        self._mask = copy.copy(mask)  # without what the mask keeps beside its arrays: programs that use this live long
        self._digest = _digest(mask)
        self._needs: dict[int, np.ndarray] = {}
        self.rows, self.columns = mask.nq, mask.nk

    @classmethod
    def of(cls, mask: BlockMask) -> Visits | None:
        """The visits of a mask, made once and kept.

        None where its lists have no values yet, lie on a device, or are not sound: what overflows, or names a block or
        a tile that there is not, is for the kernels to answer with NaN, and they must be given all of it.
        """
        if not mask.is_host:
            return None
        if "_visits" not in mask.__dict__:
            mask.__dict__["_visits"] = cls(mask) if _is_sound(mask) else None
        return mask.__dict__["_visits"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Visits) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    @property
    def tables(self) -> int:
        """Number of lists that the mask distinguishes: examples times heads."""
        return int(np.prod(self._mask.row_offsets.shape[:2]))

    @property
    def mark(self) -> int:
        """A number in [0, 2**31) that differs between masks, to tell programs apart that differ in nothing else."""
        return int.from_bytes(self._digest[:4], "little") >> 1

    def work(self) -> np.ndarray:
        """int64 [rows]: visited blocks of each query block, over all examples and heads that the mask distinguishes."""
        return np.diff(self._mask.row_offsets.astype(np.int64), axis=-1).sum((0, 1))

    def needs(self, shards: int) -> np.ndarray:
        """bool [shards, columns]: the key blocks that the rows of each shard visit in any example and head."""
        if shards not in self._needs:
            needs = self._needs_of(shards, None)
            if needs.size > _KEPT:
                return needs
            self._needs[shards] = needs
        return self._needs[shards]

    def far(self, shards: int) -> np.ndarray:
        """bool [rows]: the query blocks that visit a key block of another shard in any example and head."""
        found = np.zeros(self.rows, bool)
        own = self.columns // shards
        for b, h in np.ndindex(self._mask.row_offsets.shape[:2]):
            rows, first, lengths, _ = self._mask.row_segments(b, h)
            begin = rows // (self.rows // shards) * own
            found[rows[(first < begin) | (first + lengths > begin + own)]] = True
        return found

    def needs_of(self, rows: np.ndarray, shards: int) -> np.ndarray:
        """bool [shards, columns]: `needs` of some rows, bool [rows]."""
        return self._needs_of(shards, rows)

    def _needs_of(self, shards: int, chosen: np.ndarray | None) -> np.ndarray:
        shape = shards, self.columns + 1
        changes = np.zeros(shards * (self.columns + 1), np.int32)
        for b, h in np.ndindex(self._mask.row_offsets.shape[:2]):
            rows, first, lengths, _ = self._mask.row_segments(b, h)
            if chosen is not None:
                rows, first, lengths = (x[chosen[rows]] for x in (rows, first, lengths))
            begin = rows // (self.rows // shards) * (self.columns + 1) + first
            changes += np.bincount(begin, minlength=changes.size).astype(np.int32)
            changes -= np.bincount(begin + lengths, minlength=changes.size).astype(np.int32)
        return np.cumsum(changes.reshape(shape), axis=1, dtype=np.int32)[:, :-1] > 0

    def capacity(self, shards: int, rows: np.ndarray | None = None) -> int:
        """Number of entries of the longest list of a shard, at least 1: of all its rows, or of some, bool [rows]."""
        lengths = np.diff(self._mask.row_offsets.astype(np.int64), axis=-1)
        if rows is not None:
            lengths = lengths * rows
        return max(1, int(lengths.reshape(*lengths.shape[:2], shards, -1).sum(-1).max()))


def visits_of_shards(mask: BlockMask, query: Any, axis: Any = None) -> Visits | None:
    """The visits of a call's mask, where the query may be sharded along the sequence.

    They are a static part of the call, which is compiled anew for other visits. So an eager call has none where its
    query is not sharded so, nor has any call in a process with one device.

    Args:
      mask: Mask of the call.
      query: [B, T, N, H] array, which may be traced.
      axis: Mesh axes of a `shard_map` that the query is a shard along, or None.
    """
    if axis is not None:
        return Visits.of(mask)
    if jax.device_count() == 1:
        return None
    if not isinstance(query, jax.core.Tracer):
        spec = getattr(query.sharding, "spec", ())
        if len(spec) < 2 or spec[1] is None:
            return None
    return Visits.of(mask)


def _is_sound(mask: BlockMask) -> bool:
    """Whether every listed entry is one that a kernel would read without objection."""
    offsets = np.asarray(mask.row_offsets, np.int64)
    if offsets.min() < 0 or offsets.max() > mask.capacity or (np.diff(offsets, axis=-1) < 0).any():
        return False
    tables = np.ndindex(offsets.shape[:2])
    listed = [int(mask.row_segments(b, h).length.sum()) == offsets[b, h, -1] - offsets[b, h, 0] for b, h in tables]
    return all(listed)


def _digest(mask: BlockMask) -> bytes:
    facts = mask.shape, mask.block_size, mask.capacity, mask.bit_tiles.shape
    found = hashlib.blake2b(repr(facts).encode(), digest_size=16)
    for name, array in mask.row_arrays().items():
        values: Any = np.ascontiguousarray(array)
        found.update(f"{name} {values.shape}".encode())
        found.update(values)
    return found.digest()
