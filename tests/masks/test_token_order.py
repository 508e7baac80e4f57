"""Orders of the tokens of a grid: the permutations themselves, masks in them, and attention in them."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_bsk.masks as m
from jax_bsk import sparse_attention
from jax_bsk.masks import TokenOrder
from jax_bsk.masks.algebra._places import place_intervals
from jax_bsk.masks.grid import OWN
from tests.util import assert_close, collectives, loss_of


class Near(m.Mask):
    """Neighbourhoods in a grid, whose window is moved inwards at the borders; the definition, token by token."""

    grid: tuple[int, ...]
    window: tuple[int, ...]

    def __init__(self, grid, window):
        self._set(grid=grid, window=window)

    def _first(self, q):
        places = zip(np.unravel_index(q, self.grid), self.window, self.grid, strict=True)
        return [np.clip(x - size // 2, 0, n - size) for x, size, n in places]

    def _classify(self, grid, i, j):
        return np.full((1, 1), OWN, np.int8)

    def _evaluate(self, grid, q, k):
        first, at = self._first(grid.clip_q(q)), np.unravel_index(grid.clip_kv(k), self.grid)
        return np.logical_and.reduce([(low <= x) & (x < low + n) for low, x, n in zip(first, at, self.window)])  # noqa: B905

    def _as_places(self, grid):
        first = self._first(np.arange(grid.q_len))
        last = [low + size - 1 for low, size in zip(first, self.window, strict=True)]
        return place_intervals(grid, first, last, list(np.unravel_index(np.arange(grid.kv_len), self.grid)))


def orders_of(grid: tuple[int, ...]) -> list[TokenOrder]:
    tiles = [(1,) * len(grid), (4, 5, 3)[: len(grid)], (8,) * len(grid)]
    made = [TokenOrder.tiles(grid, tile) for tile in tiles]
    made += [TokenOrder.bands(grid, (3, 2)[: len(grid) - 1])] if len(grid) > 1 else []
    return [TokenOrder.raster(grid), *made, TokenOrder.morton(grid), TokenOrder.hilbert(grid)]


GRIDS = [(1,), (37,), (8, 16), (13, 7), (1, 9), (4, 4, 8), (5, 6, 7)]


# ---- permutations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRIDS)
def test_an_order_is_a_permutation_with_its_inverse_and_positions(grid):
    tokens = np.arange(math.prod(grid))
    x = np.random.default_rng(0).normal(size=(2, tokens.size, 3)).astype(np.float32)
    for order in orders_of(grid):
        np.testing.assert_array_equal(np.sort(order.order), tokens)
        np.testing.assert_array_equal(order.order[order.places], tokens)
        assert (order.order.dtype, order.places.dtype, order.positions.dtype) == (np.int32,) * 3
        np.testing.assert_array_equal(order.positions, np.stack(np.unravel_index(order.order, grid), -1))
        np.testing.assert_array_equal(order.permute(x), x[:, order.order])
        np.testing.assert_array_equal(order.unpermute(order.permute(x)), x)
        np.testing.assert_array_equal(order.permute(x.swapaxes(1, 2), axis=-1), x[:, order.order].swapaxes(1, 2))


@pytest.mark.parametrize(("grid", "tile"), [((24, 40), (8, 16)), ((13, 50), (4, 7)), ((6, 9, 20), (4, 4, 8))])
def test_tokens_of_a_tile_lie_together(grid, tile):
    def key(at):
        return *(x // n for x, n in zip(at, tile, strict=True)), *at

    places = TokenOrder.tiles(grid, tile).positions.tolist()
    assert places == sorted(places, key=key), "tile after tile, row by row in each"


@pytest.mark.parametrize(("grid", "band"), [((24, 40), (8,)), ((13, 50), (4,)), ((6, 9, 20), (4, 4))])
def test_bands_are_passed_column_by_column(grid, band):
    order = TokenOrder.bands(grid, band)
    columns = [(*(x // n for x, n in zip(at, band, strict=False)), at[-1]) for at in order.positions.tolist()]
    passed = [column for column, _ in itertools.groupby(columns)]
    assert len(passed) == len(set(columns)), "a column is left and entered again"
    for one, other in itertools.pairwise(passed):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) == 1, "columns follow their neighbours"


@pytest.mark.parametrize("grid", [(2, 2), (16, 16), (8, 8, 8), (4, 4, 4, 4)])
def test_neighbours_on_the_hilbert_curve_are_neighbours_in_the_grid(grid):
    steps = np.abs(np.diff(TokenOrder.hilbert(grid).positions, axis=0)).sum(1)
    assert (steps == 1).all()


def test_the_curve_of_morton():
    assert TokenOrder.morton((4, 4)).order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    # The same without what is outside.
    assert TokenOrder.morton((3, 4)).order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]


def test_an_order_of_ones_own():
    order = TokenOrder.from_indices([2, 0, 1])
    assert order.places.tolist() == [1, 2, 0]
    assert order.positions.tolist() == [[2], [0], [1]]
    for wrong in ([0, 0, 1], [0, 1, 3], [[0, 1]]):
        with pytest.raises(ValueError, match="a permutation of the"):
            TokenOrder.from_indices(wrong)
    with pytest.raises(ValueError, match="of the 4 tokens of the grid"):
        TokenOrder.from_indices([2, 0, 1], (2, 2))
    with pytest.raises(TypeError, match="integers on the host"):
        TokenOrder.from_indices([0.0, 1.0])


def test_what_is_refused():
    with pytest.raises(ValueError, match="one size per axis of the grid"):
        TokenOrder.tiles((8, 8), (4,))
    with pytest.raises(ValueError, match="one size per axis but the last"):
        TokenOrder.bands((8, 8), (4, 4))
    with pytest.raises(ValueError, match="at least 1"):
        TokenOrder.tiles((8, 8), (4, 0))
    with pytest.raises(ValueError, match="fewer than"):
        TokenOrder.raster((2**15, 2**15))
    order = TokenOrder.morton((4, 4))
    with pytest.raises(ValueError, match=r"16 tokens, got axis 1 of an array of shape \(2, 15\)"):
        order.permute(np.zeros((2, 15)))
    with pytest.raises(TypeError, match="must be a lazy mask, got"):
        order.mask(m.CausalMask().bind(16, block_size=32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="in an order of 16, got q_len=17"):
        order.mask(m.CausalMask()).bind(17, block_size=32)
    with pytest.raises(ValueError, match="must hold an order"):
        TokenOrder.best(m.CausalMask(), [])


# ---- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_any_mask_in_an_order(seed, random_mask, assert_well_formed):
    rng = np.random.default_rng(seed)
    grid = tuple(int(n) for n in rng.integers(2, 20, 2))
    tokens = math.prod(grid)
    mask, dense = random_mask(rng, tokens, tokens)
    orders = orders_of(grid)
    order = orders[rng.integers(len(orders))]
    bound = order.mask(mask).bind(tokens, block_size=[32, 64, (64, 32)][rng.integers(3)])
    assert_well_formed(bound)
    expected = np.broadcast_to(dense, (bound.batch, bound.heads, tokens, tokens))
    np.testing.assert_array_equal(bound.to_dense(), expected[..., order.order, :][..., order.order])


@pytest.mark.parametrize(
    "mask",
    [
        m.CausalMask(np.arange(143, dtype=np.int32)[None] % 5),
        m.CausalMask(np.array([3, -4], np.int32)) & m.LocalMask((9, 2**45), offset=3),
        m.ChunkedMask(30, offset=np.array(7, np.int32)) | m.DilatedMask(3, (None, 20)),
        ~m.PrefixLMMask(np.array(20, np.int32), offset=-5),
        m.FunctionMask(lambda b, h, q, k: (q + b) % 3 >= (k + h) % 3, batch=2, heads=2),
    ],
    ids=repr,
)
def test_masks_with_offsets_and_numbers_in_an_order(mask):
    expected = mask.bind(143, block_size=32).to_dense()
    for order in orders_of((11, 13)):
        bound = order.mask(mask).bind(143, block_size=32)
        np.testing.assert_array_equal(bound.to_dense(), expected[..., order.order, :][..., order.order])


def test_a_mask_of_intervals_is_told_by_its_bounds():
    """Nothing but what the bounds leave open is evaluated, and equal blocks once."""
    evaluated = 0

    class Counted(Near):
        def _evaluate(self, grid, q, k):
            nonlocal evaluated
            evaluated += np.broadcast(q, k).shape[0]
            return super()._evaluate(grid, q, k)

    order = TokenOrder.tiles((64, 64), (8, 16))
    bound = order.mask(Counted((64, 64), (13, 13))).bind(4096)
    assert bound.row_offsets[0, 0, -1] == 220
    assert evaluated < 220 / 2
    rows = order.order[:64]
    at, first = np.arange(4096), [np.clip(x - 6, 0, 51)[:, None] for x in np.unravel_index(rows, (64, 64))]
    expected = np.logical_and.reduce([(n <= x) & (x < n + 13) for n, x in zip(first, (at // 64, at % 64), strict=True)])
    np.testing.assert_array_equal(bound.to_dense()[0, 0, :64], expected[:, order.order])


def test_blocks_of_a_large_neighbourhood():
    grid, mask = (256, 256), Near((256, 256), (13, 13))
    counts = {}
    start = time.perf_counter()
    for order in (TokenOrder.raster(grid), TokenOrder.tiles(grid, (8, 16)), TokenOrder.hilbert(grid)):
        bound = order.mask(mask).bind(order.tokens)
        counts[order.name] = int(bound.row_offsets[0, 0, -1])
        assert bound.element_density * order.tokens == 169, "each token attends to 13 x 13 others"
    assert time.perf_counter() - start < 10  # 0.1 s each on two cores
    assert counts == {"row by row": 13_312, "tiles of 8 x 16": 4_324, "Hilbert curve": 4_130}


def test_uneven_grids_and_more_axes():
    for grid, window in (((40, 50), (7, 9)), ((7, 10, 12), (3, 5, 5))):
        mask, tokens = Near(grid, window), math.prod(grid)
        dense = np.array(TokenOrder.raster(grid).mask(mask).bind(tokens).to_dense()[0, 0])
        assert (dense.sum(1) == math.prod(window)).all()
        for order in orders_of(grid):
            bound = order.mask(mask).bind(tokens)
            np.testing.assert_array_equal(bound.to_dense()[0, 0], dense[order.order][:, order.order])


def test_traced_documents_in_an_order():
    order = TokenOrder.tiles((12, 12), (4, 8))
    ids = np.random.default_rng(0).integers(0, 3, (2, 144)).astype(np.int32)

    def bound(order, ids):
        documents = m.SegmentMask(ids) & m.PrefixLMMask(np.array([0, 70], np.int32))
        return order.mask(documents).bind(144, block_size=32)

    seen = np.arange(144) < np.array([0, 70])[:, None, None]
    expected = (ids[:, :, None] == ids[:, None]) & (np.tri(144, dtype=bool) | seen)
    expected = expected[:, order.order][..., order.order][:, None]
    np.testing.assert_array_equal(jax.jit(bound)(order, ids).to_dense(), expected)
    np.testing.assert_array_equal(jax.jit(lambda ids: bound(order, ids))(ids).to_dense(), expected)
    with pytest.raises(TypeError, match="traced mask cannot be counted"):
        jax.jit(lambda ids: jnp.zeros(len(order.describe(m.SegmentMask(ids)))))(ids)


def test_the_best_order_and_its_description():
    mask, orders = Near((64, 64), (13, 13)), orders_of((64, 64))
    best = TokenOrder.best(mask, orders)
    counts = [int(order.mask(mask).bind(4096).row_offsets[..., -1].sum()) for order in orders]
    assert best is orders[int(np.argmin(counts))]
    assert TokenOrder.best(mask, iter(orders[:1])) is orders[0]
    text = TokenOrder.tiles((64, 64), (8, 16)).describe(mask)
    assert text.splitlines()[1:] == [
        "  row by row: 224 of 1,024 blocks of 128 x 128 visited (21.88 %)",
        "  tiles of 8 x 16: 220 (21.48 %)",
    ]
    assert repr(orders[-1]) == "TokenOrder(64 x 64 tokens, Hilbert curve)"


# ---- attention ------------------------------------------------------------------------------------------------------

GRID, TILE = (16, 16), (8, 8)


def inputs(batch=2) -> Any:
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, batch, 256, 2, 16)).astype(np.float32))


def test_attention_in_an_order_is_attention(implementation):
    """Permuted once, with positions that follow, and put back: outputs and gradients."""
    order, mask = TokenOrder.tiles(GRID, TILE), m.LocalMask((60, 20)) & Near(GRID, (5, 7))
    phase = jnp.asarray(np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32))

    def attend(x, positions, mask):
        turned = jnp.sin(positions.astype(jnp.float32) @ phase)[None, :, None]
        return sparse_attention(x[0] + turned, x[1] * turned, x[2], mask=mask, implementation=implementation)

    plain, reordered = (o.mask(mask).bind(256, block_size=64) for o in (TokenOrder.raster(GRID), order))

    def in_order(x, order):
        out = attend(order.permute(x, axis=2), order.positions, reordered)
        return order.unpermute(out)

    @jax.jit
    def step(x, order):
        return in_order(x, order), jax.grad(loss_of(lambda x: in_order(x, order)))(x)

    @jax.jit
    def plain_step(x):
        def call(x):
            return attend(x, jnp.asarray(TokenOrder.raster(GRID).positions), plain)

        return call(x), jax.grad(loss_of(call))(x)

    x = inputs()
    assert_close(step(x, order), plain_step(x))
    assert step(x, TokenOrder.tiles(GRID, TILE)) is not None
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch_stays_where_it_is(kind):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    order = TokenOrder.hilbert(GRID)
    x = inputs(4)
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "data")))

    @jax.jit
    def there_and_back(x):
        return order.permute(x, axis=2), order.unpermute(order.permute(x, axis=2) * 2, axis=2)

    permuted, back = there_and_back(sharded)
    np.testing.assert_array_equal(permuted, x[:, :, order.order])
    np.testing.assert_array_equal(back, x * 2)
    assert permuted.sharding.spec[1] == "data"
    assert collectives(there_and_back.lower(sharded).compile()) == []
    gradient = jax.jit(jax.grad(lambda x: (order.permute(x, axis=2) ** 2).sum()))(sharded)
    np.testing.assert_allclose(gradient, 2 * x, rtol=1e-6)


def test_a_sharded_sequence_is_gathered():
    mesh = jax.make_mesh((4,), ("tokens",), axis_types=(AxisType.Auto,))
    order, x = TokenOrder.hilbert(GRID), inputs(1)[0]
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "tokens")))
    np.testing.assert_array_equal(jax.jit(order.permute)(sharded), x[:, order.order])
