"""The items of which sequences are made: a few that differ in what they do to the rings."""

from __future__ import annotations

from tests.rings.backward import KEYS, QUERIES, Backward, Item
from tests.rings.feeder import Feeder
from tests.rings.forward import EMPTY, Forward, Tile
from tests.rings.gradients import STORE, Pair
from tests.rings.products import PAIRS, Products


def tiles(model: Forward) -> list[Tile]:
    """Tiles of queries: none, one, two and three steps, and enough to wrap the rings of keys and of values twice."""
    wraps_twice = 2 * max(model.full_key.size, model.full_value.size) + 1
    return [
        EMPTY, Tile(1), Tile(2), Tile(1, cut=(0,)), Tile(3, cut=(0, 2)), Tile(wraps_twice), Tile(2 * wraps_twice - 1)
    ]  # fmt: skip


def fed_tiles(model: Feeder) -> list[Tile]:
    """Tiles of one, two and three steps, and enough to wrap both rings."""
    wraps = max(model.full_key.size, model.full_value.size) + 1
    return [Tile(1), Tile(1, cut=(0,)), Tile(2), Tile(3, cut=(0, 2)), Tile(wraps), Tile(2 * wraps, cut=(wraps,))]


def few_tiles(model: Forward) -> list[Tile]:
    """For longer sequences: two such tiles wrap the rings twice."""
    last = max(model.full_key.size, model.full_value.size) + 1
    return [EMPTY, Tile(1), Tile(last + 1, cut=(1, 2, last))]


def messages() -> list:
    """Of the search for a bias's gradient: a slot alone, tiles that share all, some or no operands, a slot's last."""
    return [STORE, Pair(), Pair(left=False), Pair(right=False), Pair(left=False, right=False), Pair(store=True)]


def backward_items(model: Backward) -> list[Item]:
    """Items of both kinds: void, of one step, and of more steps than there are places."""
    return [
        Item(KEYS, 0), Item(KEYS, 1), Item(KEYS, model.stages + 1), Item(QUERIES, 0), Item(QUERIES, 2, half=True),
        Item(QUERIES, model.query_stages + 1),
    ]  # fmt: skip


def few_backward_items(model: Backward) -> list[Item]:
    return [Item(KEYS, 0), Item(KEYS, 3), Item(QUERIES, model.query_stages + 1, half=True)]


def product_tiles(model: Products) -> list[tuple[int, ...]]:
    """Tiles of no block, one, two, and more than there are stages; of pairs, of use to one warpgroup or to both."""
    if model.kind == PAIRS:
        return [(), (1,), (2, 1), (3, 1, 2, 2, 1)]
    return [(), (3,), (3, 3), (3,) * (model.stages + 1)]
