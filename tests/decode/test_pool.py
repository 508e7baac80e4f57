"""`PagePool` under thousands of random arrivals: nothing leaks, and no page has two owners unless they share it."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from jax_bsk.decode import PagePool, PagesExhausted


def check(pool: PagePool, contents: dict[int, list[int]], marks: dict[tuple[int, int], int]) -> None:
    """Each sequence finds in its pages what was written there, and the counts are those of the pages that are owned."""
    owners = collections.Counter(page for sequence in contents for page in pool.pages(sequence))
    assert pool.pages_held == len(owners)
    assert pool.pages_free == pool.num_pages - len(owners)
    for sequence, numbers in contents.items():
        pages = pool.pages(sequence)
        assert len(pages) == len(set(pages)) == pool.pages_for(len(numbers))
        assert pool.length(sequence) == len(numbers)
        found = [marks[pages[i // pool.page_size], i % pool.page_size] for i in range(len(numbers))]
        assert found == numbers


@pytest.mark.parametrize("seed", range(3))
def test_random_arrivals(seed):
    """Sequences arrive, grow, are cut, fork and leave; each position holds a number that only a fork may share."""
    rng = np.random.default_rng(seed)
    pool = PagePool(num_pages=60, page_size=int(rng.choice([1, 4, 16])))
    contents: dict[int, list[int]] = {}
    marks: dict[tuple[int, int], int] = {}
    fresh = iter(range(10**9))
    exhausted = 0

    def write(sequence: int, count: int) -> None:
        numbers, pages = contents[sequence], pool.pages(sequence)
        for _ in range(count):
            position = len(numbers)
            numbers.append(next(fresh))
            marks[pages[position // pool.page_size], position % pool.page_size] = numbers[-1]

    for turn in range(4000):
        kind = rng.choice(["arrive", "grow", "cut", "fork", "leave"], p=[0.2, 0.4, 0.05, 0.15, 0.2])
        count = int(rng.integers(0, 5 * pool.page_size))
        before = pool.pages_free
        try:
            if kind == "arrive":
                sequence = pool.allocate(count)
                contents[sequence] = []
                write(sequence, count)
            elif contents:
                sequence = int(rng.choice(list(contents)))
                if kind == "grow":
                    pool.extend(sequence, count)
                    write(sequence, count)
                elif kind == "leave":
                    pool.free(sequence)
                    del contents[sequence]
                elif kind == "cut":
                    keep = int(rng.integers(0, len(contents[sequence]) + 1))
                    shared = {page for other in contents if other != sequence for page in pool.pages(other)}
                    if keep % pool.page_size and pool.pages(sequence)[keep // pool.page_size] in shared:
                        with pytest.raises(ValueError, match="shares the page"):
                            pool.truncate(sequence, keep)
                    else:
                        pool.truncate(sequence, keep)
                        del contents[sequence][keep:]
                else:
                    prefix = int(rng.integers(0, len(contents[sequence]) + 1))
                    child, copies = pool.fork(sequence, prefix)
                    contents[child] = contents[sequence][:prefix]
                    for source, target in copies:
                        for place in range(prefix % pool.page_size):
                            marks[target, place] = marks[source, place]
        except PagesExhausted:
            exhausted += 1
            assert pool.pages_free == before
        if turn % 40 == 0:
            check(pool, contents, marks)
    check(pool, contents, marks)
    assert exhausted > 10  # the pool was full now and then
    for sequence in list(contents):
        pool.free(sequence)
    assert (pool.pages_held, pool.pages_free, pool.sequences) == (0, 60, ())


def test_what_is_wrong_is_named():
    pool = PagePool(4, 16)
    first = pool.allocate(40)
    with pytest.raises(PagesExhausted, match="2 pages are asked for, and 1 of 4 are free"):
        pool.allocate(20)
    with pytest.raises(PagesExhausted):
        pool.extend(first, 40)
    assert (pool.length(first), pool.pages_held) == (40, 3)
    with pytest.raises(ValueError, match="room for 2"):
        pool.page_table([first], 2)
    with pytest.raises(ValueError, match="the table room for 0"):
        pool.kv_lens([first], 0)
    with pytest.raises(ValueError, match="a prefix of 41"):
        pool.fork(first, 41)
    pool.free(first)
    with pytest.raises(ValueError, match="sequence 0 was freed already"):
        pool.free(first)
    with pytest.raises(ValueError, match="there is no sequence 7"):
        pool.pages(7)
    with pytest.raises(ValueError, match="0 positions or more"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="one page of one position or more"):
        PagePool(0, 16)


def test_tables_and_memory():
    pool = PagePool(8, 4)
    first, second = pool.allocate(9), pool.allocate(3)
    table = pool.page_table([second, first], 4, 3)
    assert table.dtype == np.int32
    assert table.tolist() == [[3, -1, -1, -1], [0, 1, 2, -1], [-1, -1, -1, -1]]
    assert pool.kv_lens([second, first], 3).tolist() == [3, 9, 0]
    assert pool.memory_held(np.zeros((8, 4, 2, 16), np.float32)) == 4 * (4 * 2 * 16 * 4)
