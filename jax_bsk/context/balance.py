"""Which device computes which chunk of queries: as many chunks each, and as equal work as whole chunks allow."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Iterator

import numpy as np

from jax_bsk.context.visits import Visits

# Work of the busiest device over the mean: among orders that are as good, the cheapest one counts.
ENOUGH = 1.05
# Orders of more chunks times key blocks are judged by their balance alone: reading who needs what would take seconds.
READ = 1 << 23


def imbalance(work: np.ndarray, assigned: np.ndarray) -> float:
    """Work of the busiest shard over the mean; 1 where there is none.

    Args:
      work: Work of each chunk, [chunks].
      assigned: Chunks of each shard, [shards, chunks / shards].
    """
    loads = work[assigned].sum(1)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def assign(
    visits: Visits, shards: int, unit: int, *, chunk: int | None, exchange_cost: float
) -> tuple[np.ndarray, int]:
    """Gives chunks of query blocks to shards.

    Chunks are a shard's part of the sequence, a half of it, a quarter and so on. They are dealt to and fro (two per
    shard are the zigzag of causal attention), or given longest first to the shard with the least work (Graham 1969).
    Of the orders whose busiest shard has at most 5 % more work than the mean, the one is taken whose slowest shard is
    the fastest: its work, and the key blocks that it receives. Where no order is so balanced, the most balanced is.

    Args:
      visits: Visits of the mask.
      shards: Number of shards.
      unit: Query blocks that stay together; the number of shards divides what the sequence has of them.
      chunk: Query blocks per chunk, a multiple of `unit`, or None for whatever is best.
      exchange_cost: Visited blocks that are computed in the time in which one key block is received.

    Returns:
      Chunks of each shard, int64 [shards, chunks / shards], ascending; and query blocks per chunk.
    """
    work = visits.work()
    best: _Order | None = None
    for size in [chunk] if chunk is not None else [unit * n for n in _halves(work.size // (shards * unit))]:
        found = _best_of_size(visits, work, shards, size, exchange_cost)
        if best is not None and best.balanced and not found < best:
            break  # finer chunks send more
        best = found if best is None else min(best, found)
    assert best is not None
    return best.assigned, best.size


@dataclasses.dataclass(frozen=True, eq=False)
class _Order:
    """An order and how good it is: balanced ones first, of these the fastest, of the others the most balanced."""

    assigned: np.ndarray
    size: int
    uneven: float
    slowest: float

    @property
    def balanced(self) -> bool:
        return self.uneven <= ENOUGH

    def __lt__(self, other: _Order) -> bool:
        if self.balanced != other.balanced:
            return self.balanced
        return self.slowest < other.slowest if self.balanced else self.uneven < other.uneven


def _best_of_size(visits: Visits, work: np.ndarray, shards: int, size: int, exchange_cost: float) -> _Order:
    chunks = work.size // size
    of_chunks = work.reshape(chunks, size).sum(1)
    needs = visits.needs(chunks) if chunks * visits.columns <= READ else None

    def order(assigned: np.ndarray) -> _Order:
        slowest = math.inf  # not known: of such orders the first balanced one is taken
        if needs is not None:
            slowest = float(of_chunks[assigned].sum(1).max())
            slowest += exchange_cost * visits.tables * int(_received(needs, assigned).max())
        return _Order(assigned, size, imbalance(of_chunks, assigned), slowest)

    return min(order(_dealt(chunks, shards)), order(_longest_first(of_chunks, shards)))


def _received(needs: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """int64 [shards]: key blocks that each shard needs of others, where `needs` is bool [chunks, key blocks]."""
    chunks, columns = needs.shape
    counts = np.zeros(assigned.shape[0], np.int64)
    for shard, mine in enumerate(assigned):
        wanted = needs[mine].any(0).reshape(chunks, columns // chunks)
        wanted[mine] = False
        counts[shard] = wanted.sum()
    return counts


def _halves(size: int) -> Iterator[int]:
    """The size, and its halves as long as they are whole; a last odd one is cut into single blocks."""
    while size % 2 == 0:
        yield size
        size //= 2
    yield size
    if size > 1:
        yield 1


def _dealt(chunks: int, shards: int) -> np.ndarray:
    """0 1 2 .. then back, and so on: shard i has chunk i of each round forth, and the i-th last of each round back."""
    rounds = np.arange(chunks).reshape(-1, shards)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return rounds.T.copy()


def _longest_first(work: np.ndarray, shards: int) -> np.ndarray:
    room = work.size // shards
    heap = [(0, shard, 0) for shard in range(shards)]
    found: list[list[int]] = [[] for _ in range(shards)]
    for chunk in np.argsort(-work, kind="stable"):
        load, shard, count = heapq.heappop(heap)
        found[shard].append(int(chunk))
        if count + 1 < room:
            heapq.heappush(heap, (load + int(work[chunk]), shard, count + 1))
    return np.sort(np.array(found), axis=1)
