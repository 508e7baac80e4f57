"""Who waits for and releases what in the Hopper kernels: executable models, checked for all interleavings.

`tests/rings/README.md` says how models are read, changed and added. What is covered here, and the rest is for
`python -m tests.rings`:

| model    | exhaustively                                                           | sampled, with fixed seeds   |
|----------|------------------------------------------------------------------------|-----------------------------|
| forward  | deadlocks: sequences of all lengths of seven kinds of tiles;           | everything: 12 tiles        |
|          | everything: all of up to 9 tiles (2 * kHeaders + 1) of three kinds     |                             |
| feeder   | deadlocks: sequences of all lengths of six kinds of tiles;             | everything: 12 tiles        |
|          | everything: all of up to 4 tiles                                       |                             |
| backward | deadlocks: sequences of all lengths of six kinds of items;             | everything: 12 items        |
|          | everything: all of up to 4 items of three kinds                        | (more than 2 * kItems)      |
| launches | all ways to give up to 8 items to 1 or 2 CTAs, and 6 to 3           | larger plans, up to 3 CTAs  |
| gradients| deadlocks: sequences of all lengths of six kinds of messages;          | everything: 40 messages     |
|          | everything: all of up to 4 messages (with 3 places for messages)       |                             |
| products | deadlocks: sequences of all lengths of four kinds of tiles;            | everything: 8 tiles         |
|          | everything: all of up to 4 tiles, of 3 where a block has two stages    |                             |
| narrow   | deadlocks: sequences of all lengths of four kinds of stages            | everything: three rings of  |
|          |                                                                        | stages                      |
| all      |                                                                        | random orders on simulated  |
|          |                                                                        | barriers: 8 or 12 items     |

"Deadlocks" means that states are told apart by who can go on, "everything" that they are also told apart by what surely
happened before what; the other findings are looked for in every sequence that is run.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from tests.rings import agreement, backward, feeder, forward, narrow, products
from tests.rings.alphabets import (
    backward_items,
    fed_tiles,
    few_backward_items,
    few_tiles,
    messages,
    product_tiles,
    tiles,
)
from tests.rings.backward import KEYS, QUERIES, Backward, Item, Launch, Plan
from tests.rings.checker import (
    DEADLOCK,
    EARLY_WAIT,
    EXTRA,
    LEFT_OPEN,
    MISPLACED,
    OUTLIVES,
    OVERRUN,
    OVERWRITTEN,
    STALE,
    Agent,
    Barriers,
    Model,
    check,
    explore,
)
from tests.rings.feeder import Feeder
from tests.rings.forward import EMPTY, Forward, Tile
from tests.rings.gradients import STORE, Gradients, Pair
from tests.rings.narrow import COPIED, WRONG, Narrow
from tests.rings.products import PAIRS, ROWS, SAMPLED, SAMPLED_64, Products
from tests.rings.simulator import simulate
from tests.rings.sources import BACKWARD, FORWARD, Constants, body, python_of

SAMPLES = 30

# ---- Random items


def random_tiles(rng: random.Random) -> list[Tile]:
    steps = rng.choices((0, 1, 2, 3, 5, 9), (6, 4, 2, 2, 1, 1), k=12)
    return [Tile(n, cut=tuple(i for i in range(n) if rng.random() < 0.2)) for n in steps]


def random_fed_tiles(rng: random.Random) -> list[Tile]:
    return [tile if tile.steps > 0 else Tile(1) for tile in random_tiles(rng)]


def random_items(rng: random.Random) -> list[Item]:
    steps = rng.choices((0, 1, 2, 3, 5, 9), k=12)
    return [Item(rng.choice((KEYS, QUERIES)), n, half=rng.random() < 0.5) for n in steps]


def random_messages(rng: random.Random) -> list:
    """Of a dense bias; where a slot has diagonals, `store` of a tile means the same."""
    stores = rng.choices((0, 1, 2, 20), (8, 4, 2, 1), k=30)
    pairs = [Pair(*(rng.random() < p for p in (0.5, 0.7, 0.3))) for _ in stores]
    return [x for count, pair in zip(stores, pairs, strict=True) for x in (*count * [STORE], pair)]


def random_blocks(rng: random.Random, masks: tuple[int, ...] = (3,)) -> list[tuple[int, ...]]:
    return [tuple(rng.choices(masks, k=rng.choice((0, 0, 1, 1, 2, 3, 4, 7, 9)))) for _ in range(8)]


def random_pairs(rng: random.Random) -> list[tuple[int, ...]]:
    return random_blocks(rng, (1, 2, 3))


# ---- The forward

# Of 96 dimensions the rings are those of 128, and of one consumer those of 64: `test_shapes_stand_for_all`.
# With extras the first product of a tile does not run under the output of the one before.
FORWARD_SHAPES = [
    (64, 2), (64, 1), (128, 2), (256, 2), (256, 1),
    (64, 2, True), (64, 1, True), (128, 2, True), (256, 2, True), (256, 1, True),
]  # fmt: skip
ALL_FORWARD_SHAPES = list(itertools.product((64, 96, 128, 256), (1, 2), (False, True)))


def forward_rings(dim: int, consumers: int, extras: bool = False) -> tuple:
    model = Forward(dim, consumers, extras)
    return (consumers, model.full_key.size, model.full_value.size, model.overlap, model.in_registers, model.helpers)


def test_shapes_stand_for_all():
    assert {forward_rings(*shape) for shape in ALL_FORWARD_SHAPES} == {forward_rings(*x) for x in FORWARD_SHAPES}
    shapes = itertools.product((64, 96, 128, 256), (False, True))
    rings = {backward_rings(*shape) for shape in shapes if shape != (256, False)}  # not instantiated
    assert rings == {backward_rings(*shape) for shape in BACKWARD_SHAPES}


@pytest.mark.parametrize("shape", FORWARD_SHAPES)
def test_forward_never_hangs(shape):
    model = Forward(*shape)
    coverage = explore(model, tiles(model), order=False)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.complete


@pytest.mark.parametrize("shape", FORWARD_SHAPES)
def test_forward(shape):
    model = Forward(*shape)
    coverage = explore(model, few_tiles(model), length=2 * model.headers.size + 1)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.complete or coverage.length == 2 * model.headers.size + 1


@pytest.mark.parametrize("shape", FORWARD_SHAPES)
def test_forward_of_one_tile(shape):
    """What a CTA without a counter does."""
    model = Forward(*shape)
    for items in ([], *([tile] for tile in tiles(model))):
        assert check(model, items) == []


@pytest.mark.parametrize("shape", FORWARD_SHAPES)
def test_forward_sampled(shape):
    model, rng = Forward(*shape), random.Random(0)
    for _ in range(SAMPLES):
        assert check(model, random_tiles(rng)) == []


def test_old_forward_hangs_on_a_live_tile_and_three_empty_ones():
    """The finding that this package began with, and that states do not hide anything: every sequence is run here."""
    model = Forward(128, 2, mistake="empty tiles are skipped before the tile is stored")
    for length in range(1, 6):
        for items in itertools.product((EMPTY, Tile(1)), repeat=length):
            hangs = "1000" in "".join(str(tile) for tile in items)
            assert {finding.kind for finding in check(model, items)} == ({DEADLOCK} if hangs else set()), items


# ---- The forward with a feeder


def test_feeder_never_hangs():
    model = Feeder()
    coverage = explore(model, fed_tiles(model), order=False)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.complete


def test_feeder():
    model = Feeder()
    coverage = explore(model, fed_tiles(model), length=4)
    assert not coverage.findings, coverage.findings[0]
    rng = random.Random(0)
    for _ in range(SAMPLES):
        assert check(model, random_fed_tiles(rng)) == []


# ---- Gradients of biases

GRADIENT_SHAPES = list(itertools.product((64, 128), (True, False)))


@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
def test_gradients_never_hang(shape):
    model = Gradients(*shape, steps=3)
    coverage = explore(model, messages(), order=False)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.complete


@pytest.mark.parametrize("shape", GRADIENT_SHAPES)
def test_gradients(shape):
    coverage = explore(Gradients(*shape, steps=3), messages(), length=4)
    assert not coverage.findings, coverage.findings[0]
    rng = random.Random(0)
    for _ in range(SAMPLES):
        assert check(Gradients(*shape), random_messages(rng)) == []


# ---- The backward

BACKWARD_SHAPES = [(64, False), (64, True), (96, False), (128, False), (128, True), (256, True)]


def backward_rings(dim: int, split: bool) -> tuple:
    model = Backward(dim, split)
    return (split, model.stages, model.query_stages, model.score_stages, model.prob_stages)


@pytest.mark.parametrize("shape", BACKWARD_SHAPES)
def test_backward_never_hangs(shape):
    model = Backward(*shape)
    coverage = explore(model, backward_items(model), order=False)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.complete


@pytest.mark.parametrize("shape", BACKWARD_SHAPES)
def test_backward(shape):
    model = Backward(*shape)
    coverage = explore(model, few_backward_items(model), length=4)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.length == 4


@pytest.mark.parametrize("shape", BACKWARD_SHAPES)
def test_backward_sampled(shape):
    model, rng = Backward(*shape), random.Random(0)
    for _ in range(SAMPLES):
        assert check(model, random_items(rng)) == []


def assignments(count: int, ctas: int) -> Iterator[tuple[int, ...]]:
    """All ways to give so many items to at most so many CTAs, which have numbers in the order in which they come."""

    def longer(taken: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(taken) == count:
            yield taken
            return
        for cta in range(min(ctas, max(taken, default=-1) + 2)):
            yield from longer((*taken, cta))

    return longer(())


@pytest.mark.parametrize(
    ("shape", "plan", "ctas"),
    [
        ((128, False), Plan(slices=1, buffers=1, tiles=3, blocks=2), 2),
        ((128, True), Plan(slices=2, buffers=2, tiles=2, blocks=2), 2),
        ((64, False), Plan(slices=4, buffers=3, tiles=1), 2),
        ((256, True), Plan(slices=3, buffers=3, tiles=1), 3),
    ],
)
def test_launch(shape, plan, ctas):
    launch = Launch(*shape, plan=plan, ctas=ctas)
    for items in assignments(len(launch.work), ctas):
        assert check(launch, items) == []


def test_launch_sampled():
    rng = random.Random(0)
    for _ in range(SAMPLES):
        slices, heads = rng.randint(1, 6), rng.randint(1, 2)
        plan = Plan(
            slices, heads, missing=rng.randint(0, heads - 1), tiles=rng.randint(1, 3), blocks=rng.randint(1, 2),
            group=rng.randint(1, 2), buffers=min(slices, 3), steps=tuple(rng.choices((0, 1, 2, 4), k=5)),
        )  # fmt: skip
        launch = Launch(*rng.choice(BACKWARD_SHAPES), plan, rng.randint(1, 3))
        assert check(launch, [rng.randrange(launch.ctas) for _ in launch.work]) == []


def test_slices_and_buffers():
    """Of two slices or more, dS of two exists at a time, or the launch would hang; `BackwardLayout` sees to it."""
    constants = Constants(BACKWARD, "BackwardConfig", kDim=128, kSplit=False)
    assert constants["kSliceBuffers"] == 3
    assert "buffers = std::min<int64_t>(slices, kSliceBuffers)" in body("BackwardLayout", "bwd_plan.h")
    launch = Launch(128, False, Plan(slices=2, buffers=1), 1)
    assert {finding.kind for finding in check(launch, [0] * len(launch.work))} == {DEADLOCK}


# ---- The products


@pytest.mark.parametrize(
    ("kind", "steps"), [(ROWS, 1), (ROWS, 2), (PAIRS, 1), (PAIRS, 2), (SAMPLED, 1), (SAMPLED_64, 1)]
)
def test_products(kind, steps):
    model = Products(kind, steps)
    coverage = explore(model, product_tiles(model), order=False)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.complete
    length = 4 if steps == 1 else 3
    coverage = explore(model, product_tiles(model), length=length)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.length == length


@pytest.mark.parametrize("kind", [ROWS, PAIRS, SAMPLED, SAMPLED_64])
def test_products_sampled(kind):
    rng = random.Random(0)
    for _ in range(SAMPLES):
        model = Products(kind, 1 if kind in (SAMPLED, SAMPLED_64) else rng.randint(1, 2))
        assert check(model, random_pairs(rng) if kind == PAIRS else random_blocks(rng)) == []


# ---- The product of few columns

NARROW_STAGES = [(COPIED, COPIED), (WRONG, COPIED), (COPIED, None), (None, WRONG)]


@pytest.mark.parametrize("columns", [8, 32, 64])
def test_narrow(columns):
    model = Narrow(columns)
    coverage = explore(model, NARROW_STAGES, order=False)
    assert not coverage.findings, coverage.findings[0]
    assert coverage.complete
    rng = random.Random(0)
    for _ in range(SAMPLES):
        assert check(model, rng.choices(NARROW_STAGES, k=rng.randint(0, 3 * model.stages))) == []


# ---- Seeded mistakes: the shortest sequences that show them. Kinds of findings that must be among those reported.

FORWARD_MISTAKES = [
    ((128, 2), "empty tiles are skipped before the tile is stored", DEADLOCK),
    ((256, 2), "empty tiles are skipped before the tile is stored", DEADLOCK),
    ((128, 1), "empty tiles are skipped before the tile is stored", DEADLOCK),
    ((128, 2), "queries are released before the last product that reads them", OVERWRITTEN),
    ((256, 1), "queries are released before the last product that reads them", OVERWRITTEN),
    ((128, 2), "keys are released before the mask is read", OVERWRITTEN),
    ((128, 2), "queries are released when the next have come", DEADLOCK),
    ((256, 2), "queries are released when the next have come", DEADLOCK),
    ((128, 2), "values are not released", DEADLOCK),
    ((256, 1), "empty tiles do not release their header", DEADLOCK),
    ((64, 2), "the loader does not release headers of empty tiles", DEADLOCK),
    ((128, 2), "a turn too many is waited for", DEADLOCK),
    ((128, 2), "the end needs no place among the headers", OVERWRITTEN),
    ((128, 2), "the end needs no place among the headers", OVERRUN),
    ((128, 2), "steps have as many entries as there are buffers of keys", OVERWRITTEN),
    ((64, 1), "values are used before they are clean", STALE),
    ((128, 2), "headers are released before the tile is stored", OVERWRITTEN),
    ((128, 2, True), "helpers announce biases before they have written them", STALE),
]


@pytest.mark.parametrize(("shape", "mistake", "kind"), FORWARD_MISTAKES)
def test_forward_mistake(shape, mistake, kind):
    model = Forward(*shape, mistake=mistake)
    alphabet = [EMPTY, Tile(1)] if "empty" in mistake or "header" in mistake else tiles(model)
    coverage = explore(model, alphabet, order=kind != DEADLOCK)
    assert kind in {finding.kind for finding in coverage.findings}, coverage


FEEDER_MISTAKES = [
    ("queries are asked for as soon as the tile is known", DEADLOCK),
    ("values are asked for without waiting", OVERWRITTEN),
    ("keys are asked for without waiting", OVERWRITTEN),
    ("as many headers as buffers of keys", OVERWRITTEN),
    ("queries are released before they are in registers", OVERWRITTEN),
]


@pytest.mark.parametrize(("mistake", "kind"), FEEDER_MISTAKES)
def test_feeder_mistake(mistake, kind):
    model = Feeder(mistake)
    coverage = explore(model, fed_tiles(model), length=6, order=kind != DEADLOCK)
    assert kind in {finding.kind for finding in coverage.findings}, coverage


GRADIENT_MISTAKES = [
    ((128, False, 3), [STORE, Pair()], "the ring may fill behind the message that is held back", DEADLOCK),
    ((128, True, 3), [Pair(), Pair(left=False)], "operands are released while they are used again", EXTRA),
    ((128, False, 3), [STORE, Pair()], "operands are not released where a slot follows", DEADLOCK),
    ((64, True), [Pair()], "statistics are written without waiting", OVERWRITTEN),
    ((128, True), [STORE], "sums are read before both warpgroups have written them", STALE),
    ((64, False), [Pair(left=False)], "sides are released before they are read", OVERWRITTEN),
]


@pytest.mark.parametrize(("shape", "items", "mistake", "kind"), GRADIENT_MISTAKES)
def test_gradients_mistake(shape, items, mistake, kind):
    coverage = explore(Gradients(*shape, mistake=mistake), items, length=8)
    assert kind in {finding.kind for finding in coverage.findings}, coverage


BACKWARD_MISTAKES = [
    ((64, False), "the loader of keys and values does not wait for open items", OVERWRITTEN),
    ((256, True), "the loader of keys and values does not wait for open items", OVERWRITTEN),
    ((128, False), "an item of keys does not wait for the places of queries", OVERWRITTEN),
    ((128, True), "an item of queries does not wait for the places of keys", OVERWRITTEN),
    ((128, False), "a void step has no scores", DEADLOCK),
    ((128, True), "a void step has no scores", DEADLOCK),
    ((64, False), "the storer is told in five places", OVERWRITTEN),
    ((128, True), "the storer is told in three places", OVERWRITTEN),
    ((96, False), "dS buffers are released when the last store has been issued", OVERWRITTEN),
    ((256, True), "dS buffers are released when the last store has been issued", OVERWRITTEN),
    ((128, True), "probabilities are not waited for", OVERWRITTEN),
    ((256, True), "probabilities are not waited for", MISPLACED),
    ((64, True), "an inactive warpgroup does not release its steps", DEADLOCK),
    ((128, False), "keys and values are released before the last step", OVERWRITTEN),
    ((128, False), "items are released before they are done", OVERWRITTEN),
]


@pytest.mark.parametrize(("shape", "mistake", "kind"), BACKWARD_MISTAKES)
def test_backward_mistake(shape, mistake, kind):
    model = Backward(*shape, mistake=mistake)
    items = [Item(KEYS, 0), Item(KEYS, 3), Item(QUERIES, 3), Item(QUERIES, model.query_stages + 1, half=True)]
    coverage = explore(model, items, order=kind != DEADLOCK)
    assert kind in {finding.kind for finding in coverage.findings}, coverage


LAUNCH_MISTAKES = [
    ("items of queries do not wait for dS", STALE),
    ("items of keys do not wait for their buffer", OVERWRITTEN),
    ("dS is counted as done before it is stored", STALE),
    ("queries are counted as done before dS has been read", OVERWRITTEN),
]


@pytest.mark.parametrize(("mistake", "kind"), LAUNCH_MISTAKES)
def test_launch_mistake(mistake, kind):
    launch = Launch(128, False, Plan(slices=4, buffers=3, tiles=1, steps=(1,)), 2, mistake)
    cases = assignments(len(launch.work), 2)
    assert any(kind == finding.kind for items in cases for finding in check(launch, items))


PRODUCT_MISTAKES = [
    (ROWS, "stages are released to the own CTA alone", DEADLOCK),
    (PAIRS, "stages are released to the own CTA alone", DEADLOCK),
    (ROWS, "stages are released to the own CTA alone, and counted so", OVERWRITTEN),
    (ROWS, "the arrivals of a release are divided", MISPLACED),
    (PAIRS, "the arrivals of a release are divided", MISPLACED),
    (ROWS, "work indices are taken without waiting", OVERWRITTEN),
    (PAIRS, "stages of no use are not released", DEADLOCK),
    (SAMPLED, "stages of no use are not released", DEADLOCK),
    (ROWS, "stages are released when the next product has been issued", OVERWRITTEN),
    (SAMPLED_64, "stages are released when the next product has been issued", OVERWRITTEN),
    (ROWS, "no CTA waits for the other in the end", OUTLIVES),
    (PAIRS, "staging is written before it has left", OVERWRITTEN),
    (SAMPLED, "results are not waited for", LEFT_OPEN),
    # What the model allows for a reason that it gives (`STAND_IN`) happens, in both products of clusters.
    (ROWS, "arrivals may not stand in", MISPLACED),
    (PAIRS, "arrivals may not stand in", MISPLACED),
]


@pytest.mark.parametrize(("kind", "mistake", "finding"), PRODUCT_MISTAKES)
def test_product_mistake(kind, mistake, finding):
    model = Products(kind, 1, mistake)
    coverage = explore(model, product_tiles(model), length=4)
    assert finding in {x.kind for x in coverage.findings}, coverage


NARROW_MISTAKES = [
    ("stages of wrong entries are not passed on", DEADLOCK),
    ("stages are released before they are multiplied", OVERWRITTEN),
    ("sums are written before all warps have multiplied", OVERWRITTEN),
    ("no CTA waits for the others' sums", STALE),
    ("CTAs end while others read their sums", OVERWRITTEN),
]


@pytest.mark.parametrize(("mistake", "finding"), NARROW_MISTAKES)
def test_narrow_mistake(mistake, finding):
    model = Narrow(64, mistake)
    items = [(COPIED, COPIED), (WRONG, COPIED)] * model.stages
    assert finding in {x.kind for x in check(model, items)}


def test_every_mistake_is_looked_for():
    assert {x[1] for x in FORWARD_MISTAKES} == set(forward.MISTAKES)
    assert {x[0] for x in FEEDER_MISTAKES} == set(feeder.MISTAKES)
    assert {x[1] for x in BACKWARD_MISTAKES} == set(backward.MISTAKES)
    assert {x[0] for x in LAUNCH_MISTAKES} == set(backward.LAUNCH_MISTAKES)
    assert {x[1] for x in PRODUCT_MISTAKES} == set(products.MISTAKES)
    assert {x[0] for x in NARROW_MISTAKES} == set(narrow.MISTAKES)


# ---- The checker


class Toy(Model):
    """Two agents that meet at one barrier; the programs are given."""

    def __init__(self, count: int, *programs):
        self.barrier = Barriers("barrier", count, 1, "uses")
        self.programs = programs

    def agents(self, items, ended):
        agents = [Agent(f"agent {i}") for i in range(len(self.programs))]
        for agent, program in zip(agents, self.programs, strict=True):
            for what, use in program:
                getattr(agent, what)(self.barrier, use)
        return agents

    def totals(self, items):
        return {"uses": 0}


@pytest.mark.parametrize(
    ("count", "programs", "kinds"),
    [
        (1, [[("arrive", 0)], [("wait", 0)]], set()),
        (2, [[("arrive", 0)], [("wait", 0)]], {DEADLOCK}),
        (1, [[("arrive", 0), ("arrive", 0)], [("wait", 0)]], {EXTRA}),
        # The second agent's wait for phase 1 may come before phase 0 is complete, and then take -1 for it.
        (1, [[("arrive", 0), ("wait", 0), ("arrive", 1)], [("wait", 1)]], {EARLY_WAIT}),
        # The first goes on without the second, which may see neither phase.
        (1, [[("arrive", 0), ("wait", 0), ("arrive", 1)], [("wait", 0)]], {OVERRUN}),
        # A third arrival of two phases of two: nothing says that it comes last.
        (2, [[("arrive", 0), ("wait", 0), ("arrive", 1)], [("arrive", 0)], [("arrive", 1)]], {MISPLACED}),
        # Both in step.
        (2, [[("arrive", 0), ("wait", 0), ("arrive", 1), ("wait", 1)]] * 2, set()),
    ],
)
def test_checker(count, programs, kinds):
    assert {finding.kind for finding in check(Toy(count, *programs), ())} == kinds


# ---- The same programs on barriers that count, in random orders


SIMULATED = [
    (Forward(128, 2), random_tiles),
    (Forward(256, 1), random_tiles),
    (Feeder(), random_fed_tiles),
    (Backward(128, False), random_items),
    (Backward(64, True), random_items),
    (Gradients(128, True), random_messages),
    (Gradients(64, False), random_messages),
    (Products(PAIRS), random_pairs),
    (Products(ROWS), random_blocks),
    (Products(SAMPLED), random_blocks),
]


@pytest.mark.parametrize(("model", "items"), SIMULATED)
def test_simulated(model, items):
    for seed in range(SAMPLES // 2):
        assert simulate(model, items(random.Random(seed)), seed) == ""


def test_simulator_finds():
    mistake = "empty tiles are skipped before the tile is stored"
    items = [Tile(1), EMPTY, EMPTY, EMPTY]
    assert {simulate(Forward(128, 2, mistake=mistake), items, seed) for seed in range(5)} == {DEADLOCK}
    model = Products(PAIRS, 1, "stages are released to the own CTA alone, and counted so")
    found = {simulate(model, [(1, 2) * 5], seed) for seed in range(20)}
    assert found >= {OVERWRITTEN, STALE}


# ---- Models and kernels


def test_models_name_functions_that_there_are():
    assert [name for name in agreement.names() if not body(*name)] == []
    assert agreement.unnamed() == []


def test_kernels_are_those_that_the_models_mirror():
    agreed, now = agreement.agreed(), agreement.digests()
    changed = sorted(name for name in agreed.keys() | now.keys() if agreed.get(name) != now.get(name))
    assert changed == [], "Read these and the models that name them, then run `python -m tests.rings agree`."


def test_constants_are_read_from_the_sources():
    expression = "a && !b ? 1 : c == 2 ? (b ? 4 : 6) / 2 : 5"
    values = {(a, b, c): eval(python_of(expression)) for a in (0, 1) for b in (0, 1) for c in (2, 3)}
    assert values == {
        (0, 0, 2): 3, (0, 0, 3): 5, (0, 1, 2): 2, (0, 1, 3): 5, (1, 0, 2): 1, (1, 0, 3): 1, (1, 1, 2): 2, (1, 1, 3): 5,
    }  # fmt: skip
    constants = Constants(FORWARD, "ForwardConfig", kDim=128, kConsumers=2, kFeeder=False, kFeatures=0, kPlainExtras=1)
    expected = {"kHeaders": 4, "kKeyStages": 3, "kValueStages": 2, "kTileQ": 128, "kOverlapTiles": True}
    assert {name: constants[name] for name in expected} == expected
    assert (constants.count("empty_header"), constants.count("full_key"), constants.size("empty_key")) == (9, 1, 3)
    constants = Constants(BACKWARD, "BackwardConfig", kDim=128, kSplit=False)
    expected = {"kItems": 4, "kOrders": 8, "kStages": 3, "kQueryStages": 5, "kScoreStages": 3, "kProbStages": 0}
    assert {name: constants[name] for name in expected} == expected
    assert (constants.count("empty_item"), constants.count("full_probs"), constants.size("full")) == (11, 128, 8)
