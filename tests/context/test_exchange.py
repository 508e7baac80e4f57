"""What the shards of a sequence send each other: each gets what it needs, from whom has it."""

from __future__ import annotations

import numpy as np
import pytest

from jax_bsk.context.exchange import Exchange, exchange, exchange_of
from jax_bsk.context.visits import Visits
from jax_bsk.masks import BlockMask, CausalMask, LocalMask, SegmentMask


def carried_out(found: Exchange) -> list[list[int]]:
    """The key block at each place of each shard's keys (-1: padding), from the steps alone."""
    n, own = found.shards, found.own
    keys = [list(range(i * own, (i + 1) * own)) for i in range(n)]
    for step in found.steps:
        sent = [[i * own + int(b) if b < own else -1 for b in step.blocks[i]] for i in range(n)]
        if step.gathers:
            came = [[block for blocks in sent for block in blocks]] * n
        else:
            came = [[-1] * step.count] * n
            for source, to in step.pairs:
                came[to] = sent[source]
        keys = [mine + more for mine, more in zip(keys, came, strict=True)]
    return keys


@pytest.mark.parametrize("popular", [False, True])
@pytest.mark.parametrize("shards", [2, 3, 8])
def test_every_shard_gets_what_it_needs(shards, popular):
    rng = np.random.default_rng(shards)
    for density in (0.0, 0.05, 0.5, 1.0):
        needs = rng.random((shards, shards * 4)) < density
        needs[:, 1] |= density > 0  # a block that all visit, as of a global token
        found = exchange(needs, popular)
        keys = carried_out(found)
        for i in range(shards):
            for block in np.flatnonzero(needs[i]):
                assert keys[i][found.slots[i, block]] == block
            known = found.slots[i][found.slots[i] >= 0]
            assert len(set(known)) == len(known), "two blocks at one place"
            assert [keys[i][place] for place in known] == np.flatnonzero(found.slots[i] >= 0).tolist()
        travelling = {block for i in range(shards) for block in keys[i] if block >= 0 and block // 4 != i}
        returned = {i * 4 + int(b) for i in range(shards) for b in found.returned[i] if b < 4}
        assert travelling <= returned, "a block travels whose gradient does not come back"
        if not density:
            assert not found.steps
        if not popular:
            wanted = needs.reshape(shards, shards, 4)
            pairs = {(i, j) for step in found.steps for i, j in step.pairs}
            assert pairs == {(i, j) for i in range(shards) for j in range(shards) if i != j and wanted[j, i].any()}


def test_a_window_asks_its_neighbour_alone():
    mask = (CausalMask() & LocalMask((256, 0))).bind(4096, block_size=64)
    found = exchange_of(Visits(mask), 8)
    assert found is not None
    assert [step.pairs for step in found.steps] == [tuple((i, i + 1) for i in range(7))]
    assert found.received().tolist() == [0, *[4] * 7]


@pytest.mark.parametrize("lazy", [LocalMask((128, 64)), CausalMask() & SegmentMask(np.arange(4096) // 700)])
def test_rows_of_own_keys_alone_are_a_part_of_their_own(lazy):
    mask = lazy.bind(4096, block_size=64)
    visits, shards = Visits(mask), 4
    found = exchange_of(visits, shards)
    assert found is not None
    near, far = found.parts
    blocks = np.zeros((64, 64), bool)
    for row, ids in enumerate(np.split(mask.kv_blocks[0, 0], mask.row_offsets[0, 0, 1:-1])):
        blocks[row, ids] = True
    for shard in range(shards):
        own = slice(16 * shard, 16 * shard + 16)
        asks = blocks[own].copy()
        asks[:, own] = False
        np.testing.assert_array_equal(near.rows[shard], np.where(asks.any(1), -1, np.arange(16)))
        rows = np.flatnonzero(asks.any(1))
        assert far.rows[shard][: rows.size].tolist() == rows.tolist()
        assert (far.rows[shard][rows.size :] == -1).all()
        for part, of_part in ((near, np.flatnonzero(~asks.any(1))), (far, rows)):
            assert part.places[shard].tolist() == [
                list(part.rows[shard]).index(i) if i in of_part else -1 for i in range(16)
            ]
            wanted = blocks[own][of_part].any(0)
            assert (part.keys[shard][part.slots[shard][wanted]] == np.flatnonzero(wanted)).all()
            assert part.capacity >= blocks[own][of_part].sum()
    whole = exchange_of(visits, shards, two_parts=False)
    assert whole is not None
    assert len(whole.parts) == 1


def test_documents_of_whole_shards_ask_nobody():
    mask = (CausalMask() & SegmentMask(np.arange(1024) // 256)).bind(1024, block_size=64)
    found = exchange_of(Visits(mask), 4)
    assert found is not None
    assert not found.steps


def test_what_all_visit_is_gathered_and_where_all_is_wanted_everything():
    blocks = np.eye(64, dtype=bool)
    blocks[:, 3] = True
    found = exchange_of(Visits(BlockMask.from_block_mask(blocks, q_len=64 * 32, block_size=32)), 16)
    assert found is not None
    assert [step.gathers for step in found.steps] == [True]
    assert exchange_of(Visits(CausalMask().bind(1024, block_size=32)), 4) is None


def test_visits_are_equal_where_the_lists_are():
    one, same, other = (LocalMask((n, 0)).bind(512, block_size=32) for n in (64, 64, 128))
    assert Visits(one) == Visits(same)
    assert hash(Visits(one)) == hash(Visits(same))
    assert Visits(one) != Visits(other)
    assert Visits.of(one) is Visits.of(one)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_visits_of_runs_are_those_of_lists(shards):
    mask = (CausalMask() & LocalMask((100000, 0))).bind(131072)
    assert mask.holds_runs
    blocks = np.zeros((1024, 1024), bool)
    for row, ids in enumerate(np.split(mask.kv_blocks[0, 0], mask.row_offsets[0, 0, 1:-1])):
        blocks[row, ids] = True
    np.testing.assert_array_equal(Visits(mask).work(), blocks.sum(1))
    np.testing.assert_array_equal(Visits(mask).needs(shards), blocks.reshape(shards, -1, 1024).any(1))
