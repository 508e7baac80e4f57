"""`PagePool`: who owns which page of a cache. Host side, plain Python; it knows no array but tables of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class PagesExhausted(RuntimeError):
    """The pool has too few free pages for what was asked; nothing was taken."""


class PagePool:
    """Allocates the pages of a cache to sequences.

    A sequence is a number that `allocate` or `fork` returns. It has a length in positions, and as many pages as these
    need. Sequences of a common prefix share its full pages (`fork`), which are counted and go back to the pool with
    their last owner. A page that is written to has one owner. A pool is for one thread; several need a lock around it.

    Args:
      num_pages: Pages of the cache.
      page_size: Positions of a page.

    Raises:
      ValueError: A number is below 1.

    Examples:
      >>> from jax_bsk.decode import PagePool
      >>> pool = PagePool(num_pages=8, page_size=16)
      >>> prompt = pool.allocate(40)
      >>> pool.extend(prompt, 1)  # one more position, which its last page has room for
      >>> child, copies = pool.fork(prompt)  # shares the two full pages; the third is the caller's to copy
      >>> pool.pages(prompt), pool.pages(child), copies
      ((0, 1, 2), (0, 1, 3), [(2, 3)])
      >>> pool.page_table([prompt, child], max_pages=4).tolist()
      [[0, 1, 2, -1], [0, 1, 3, -1]]
      >>> pool.free(prompt)
      >>> pool.pages_held, pool.pages_free
      (3, 5)
    """

    def __init__(self, num_pages: int, page_size: int):
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool has one page of one position or more, got {num_pages} pages of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page that was freed last is taken first
        self._owners = [0] * num_pages
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def pages_free(self) -> int:
        """Number of pages that nobody owns."""
        return len(self._free)

    @property
    def pages_held(self) -> int:
        """Number of pages that someone owns; a shared page counts once."""
        return self.num_pages - len(self._free)

    @property
    def sequences(self) -> tuple[int, ...]:
        """The sequences that are not freed."""
        return tuple(self._pages)

    def memory_held(self, *caches: Any) -> int:
        """Bytes of the held pages in arrays whose first dimension counts pages."""
        return sum(x.nbytes // x.shape[0] * self.pages_held for x in caches)

    def pages_for(self, length: int) -> int:
        """Number of pages that so many positions need."""
        return -(-length // self.page_size)

    def length(self, sequence: int) -> int:
        """Positions of a sequence."""
        self._check(sequence)
        return self._lengths[sequence]

    def pages(self, sequence: int) -> tuple[int, ...]:
        """Pages of a sequence, in the order of its positions."""
        self._check(sequence)
        return tuple(self._pages[sequence])

    def allocate(self, length: int) -> int:
        """A new sequence with pages for so many positions.

        Raises:
          ValueError: The length is below 0.
          PagesExhausted: There are too few free pages.
        """
        if length < 0:
            raise ValueError(f"a sequence has 0 positions or more, got {length}")
        return self._add(self._take(self.pages_for(length)), length)

    def extend(self, sequence: int, count: int) -> None:
        """Makes a sequence longer, taking pages where its last one has no room.

        Raises:
          ValueError: There is no such sequence (any more), or the count is below 0.
          PagesExhausted: There are too few free pages.
        """
        self._check(sequence)
        if count < 0:
            raise ValueError(f"a sequence grows by 0 positions or more, got {count}; truncate makes it shorter")
        length = self._lengths[sequence] + count
        self._pages[sequence] += self._take(self.pages_for(length) - len(self._pages[sequence]))
        self._lengths[sequence] = length

    def truncate(self, sequence: int, length: int) -> None:
        """Makes a sequence shorter, as after drafts that were not accepted; pages past the length go back.

        Raises:
          ValueError: There is no such sequence (any more), it is not so long, or its last page would be one that it
            shares and has room in: it would write to another's positions.
        """
        self._check(sequence)
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"sequence {sequence} has {self._lengths[sequence]} positions, got {length} to keep")
        pages, keep = self._pages[sequence], self.pages_for(length)
        if length % self.page_size and self._owners[pages[keep - 1]] > 1:
            raise ValueError(
                f"sequence {sequence} shares the page of its position {length - 1}; keep all of the page, or fork from "
                "a shorter prefix"
            )
        self._give(pages[keep:])
        del pages[keep:]
        self._lengths[sequence] = length

    def fork(self, sequence: int, length: int | None = None) -> tuple[int, list[tuple[int, int]]]:
        """A new sequence that begins with the same positions.

        Args:
          sequence: Sequence that has them.
          length: Positions of the prefix; None for all.

        Returns:
          The new sequence, and pairs (from, to) of pages that the caller copies before the new sequence is read:
          none, or the one of the prefix's last page where it is not full. Full pages are shared.

        Raises:
          ValueError: There is no such sequence (any more), or it is not so long.
          PagesExhausted: There are too few free pages.
        """
        self._check(sequence)
        length = self._lengths[sequence] if length is None else length
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"sequence {sequence} has {self._lengths[sequence]} positions, got a prefix of {length}")
        full = length // self.page_size
        source = self._pages[sequence]
        own = self._take(self.pages_for(length) - full)
        for page in source[:full]:
            self._owners[page] += 1
        return self._add(source[:full] + own, length), [(source[full], page) for page in own]

    def free(self, sequence: int) -> None:
        """Gives a sequence's pages back.

        Raises:
          ValueError: There is no such sequence, or it was freed already.
        """
        self._check(sequence)
        self._give(self._pages.pop(sequence))
        del self._lengths[sequence]

    def page_table(self, sequences: Sequence[int], max_pages: int, max_seqs: int | None = None) -> np.ndarray:
        """`page_indices` of a batch.

        Args:
          sequences: Sequences of the batch, in its order.
          max_pages: Columns of the table.
          max_seqs: Rows of the table; None for one per sequence.

        Returns:
          int32 [max_seqs, max_pages], -1 behind the pages of each sequence.

        Raises:
          ValueError: A sequence has more pages, or there are more sequences.
        """
        table = np.full((self._rows(sequences, max_seqs), max_pages), -1, np.int32)
        for row, sequence in enumerate(sequences):
            pages = self.pages(sequence)
            if len(pages) > max_pages:
                raise ValueError(f"sequence {sequence} has {len(pages)} pages, the table room for {max_pages}")
            table[row, : len(pages)] = pages
        return table

    def kv_lens(self, sequences: Sequence[int], max_seqs: int | None = None) -> np.ndarray:
        """Lengths of a batch's sequences, int32 [max_seqs], 0 behind them."""
        lengths = np.zeros(self._rows(sequences, max_seqs), np.int32)
        lengths[: len(sequences)] = [self.length(sequence) for sequence in sequences]
        return lengths

    def _rows(self, sequences: Sequence[int], max_seqs: int | None) -> int:
        rows = len(sequences) if max_seqs is None else max_seqs
        if rows < len(sequences):
            raise ValueError(f"the batch has {len(sequences)} sequences, the table room for {rows}")
        return rows

    def _check(self, sequence: int) -> None:
        if sequence in self._pages:
            return
        if isinstance(sequence, int) and 0 <= sequence < self._next:
            raise ValueError(f"sequence {sequence} was freed already")
        raise ValueError(f"there is no sequence {sequence!r}; allocate and fork return them")

    def _add(self, pages: list[int], length: int) -> int:
        sequence, self._next = self._next, self._next + 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise PagesExhausted(f"{count} pages are asked for, and {len(self._free)} of {self.num_pages} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._owners[page] = 1
        return taken

    def _give(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
