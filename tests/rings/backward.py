"""The pipeline of the Hopper backward, csrc/attention/sm90/bwd_*.cuh: four producer warps and two warpgroups.

`Backward` is one CTA, and an item is what its scheduler finds for it: all orders of items are possible, since other
CTAs may have taken those between. `Launch` is all CTAs of a launch with the counters of global memory between them.

Not modelled: what is computed; the barrier `open`; lists that cannot be followed (they end early, with the same steps).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.rings.checker import Agent, Barriers, ItemAgent, Memory, Model, OutOfItems
from tests.rings.sources import BACKWARD, Constants

MODELLED_WARPS = 2  # of a warpgroup's four: each stands for two of them, and arrives for both
WARPS = 4 // MODELLED_WARPS
THREADS = 32 * WARPS
KEYS, QUERIES = "keys", "queries"

MISTAKES = (
    "the loader of keys and values does not wait for open items",
    "an item of keys does not wait for the places of queries",
    "an item of queries does not wait for the places of keys",
    "a void step has no scores",
    "the storer is told in five places",
    "the storer is told in three places",
    "dS buffers are released when the last store has been issued",
    "probabilities are not waited for",
    "an inactive warpgroup does not release its steps",
    "keys and values are released before the last step",
    "items are released before they are done",
)
LAUNCH_MISTAKES = (
    "items of queries do not wait for dS",
    "items of keys do not wait for their buffer",
    "dS is counted as done before it is stored",
    "queries are counted as done before dS has been read",
)


@dataclass(frozen=True)
class Item:
    """What a CTA works on.

    Attributes:
      kind: KEYS or QUERIES.
      steps: number of steps; 0: void.
      half: of queries: whether the block has 64 of them, so that warpgroup 1 has nothing to do.
      slice: number of the slice, in a `Launch`.
      region: of keys: the part of dS that it writes, (buffer, row, tile).
      visits: of queries: what it reads of dS, a region a step.
    """

    kind: str
    steps: int
    half: bool = False
    slice: int = 0
    region: tuple = ()
    visits: tuple = ()

    def __repr__(self):
        return f"{'K' if self.kind == KEYS else 'Q'}{self.steps}{'h' if self.half else ''}"


class Backward(Model):
    """`BackwardShared` in bwd_shared.cuh, and `BackwardKernel` in sm90/bwd.cuh, for one `BackwardConfig` in
    attention/sm90/config.h."""

    def __init__(self, dim: int, split: bool, mistake: str = "", cta: int = 0, launch: Launch | None = None):
        assert not mistake or mistake in MISTAKES or mistake in LAUNCH_MISTAKES, mistake
        self.mistake, self.cta, self.launch = mistake, cta, launch
        self.constants = constants = Constants(BACKWARD, "BackwardConfig", kDim=dim, kSplit=split)
        self.split = split
        self.stages, self.query_stages = constants["kStages"], constants["kQueryStages"]
        self.score_stages, self.prob_stages = constants["kScoreStages"], constants["kProbStages"]
        self.groups = constants["kKeyGroups"]
        assert constants["kConsumers"] == 2
        assert constants["kPlaces"] == self.stages + self.query_stages == constants.size("full")

        def ring(name: str, counter: str, size: int | None = None, label: str = "") -> Barriers:
            size = constants.size(name) if size is None else size
            return Barriers(name + label, constants.count(name), size, counter, cta)

        self.full_item, self.empty_item = ring("full_item", "items"), ring("empty_item", "items")
        self.open_item = ring("open_item", "items")
        self.full_key = [ring("full_key", "key items", 1, f" {g}") for g in range(constants.size("full_key"))]
        self.empty_key = [ring("empty_key", "key items", 1, f" {g}") for g in range(2)]
        # `full` and `empty` are two rings: places of keys, and then those of queries.
        sizes = {KEYS: self.stages, QUERIES: self.query_stages}
        self.full = {kind: ring("full", kind, size, f" {kind}") for kind, size in sizes.items()}
        self.empty = {kind: ring("empty", kind, size, f" {kind}") for kind, size in sizes.items()}
        groups = range(self.groups)
        self.full_scores = [ring("full_scores", KEYS, label=f" {g}") for g in groups]
        self.empty_scores = [ring("empty_scores", KEYS, label=f" {g}") for g in groups]
        assert self.full_scores[0].size == self.score_stages
        assert self.prob_stages <= constants.size("full_probs")
        self.full_probs = ring("full_probs", "live steps", self.prob_stages)
        self.empty_probs = ring("empty_probs", "live steps", self.prob_stages)

        # Resident keys and values: the rows of each warpgroup or, split, of both; cut where a place of queries ends.
        self.extra = self.query_stages - self.stages
        rows = range(1 if split else 2)
        self.resident = {
            (name, g): [Memory(f"{name} {g} part {e}", 1, "items", cta) for e in range(max(1, self.extra))]
            for name in ("key", "value")
            for g in rows
        }
        # `first` and `second` belong to both kinds of steps: contents are (step, its kind).
        self.first = [Memory(f"first {i}", 1, KEYS, cta) for i in range(self.stages)]
        self.second = [Memory(f"second {i}", 1, KEYS, cta) for i in range(self.stages)]
        self.flags = {kind: Memory(f"flags of {kind}", size, kind, cta) for kind, size in sizes.items()}
        self.statistics = Memory("statistics", self.stages, KEYS, cta)  # and bit tiles and gates
        self.scores = [Memory(f"scores {g}", self.score_stages, KEYS, cta) for g in groups]
        self.probs = [Memory(f"probs {w}", max(1, self.prob_stages), "live steps", cta) for w in range(MODELLED_WARPS)]
        orders = constants["kOrders"]
        if mistake == "the storer is told in five places":
            orders = 5
        if mistake == "the storer is told in three places":
            orders = 3
        self.orders = Memory("orders", orders, KEYS, cta)
        self.items = Memory("items", self.full_item.size, "items", cta)

    def agents(self, items: Sequence, ended: bool) -> Sequence[Agent]:
        agents: list[_BackwardAgent] = [
            kind(self, items, ended) for kind in (_Scheduler, _Loader, _Storer, _LoaderOfKeysAndValues)
        ]
        agents += [_Consumer(self, items, ended, group, warp) for group in range(2) for warp in range(MODELLED_WARPS)]
        for agent in agents:
            agent.write_program()
        return agents

    def totals(self, items: Sequence) -> dict[str, int]:
        keys = [item for item in items if item.kind == KEYS]
        return {
            "items": len(items),
            "key items": len(keys),
            KEYS: sum(max(1, item.steps) for item in keys),
            "live steps": sum(item.steps for item in keys),
            QUERIES: sum(max(1, item.steps) for item in items if item.kind == QUERIES),
        }

    def places(self, totals: dict[str, int]) -> tuple:
        return (totals[KEYS] % self.stages, totals[QUERIES] % self.query_stages)

    # ---- Memory of steps
    def first_and_second(self, kind: str, step: int) -> tuple[list[tuple], list[tuple]]:
        """`BackwardShared::First` and `BackwardShared::Second` in bwd_shared.cuh: what a step's place consists of."""
        stage = step % (self.stages if kind == KEYS else self.query_stages)
        extra = stage - self.stages
        if extra < 0:
            return [(self.first[stage], step, kind)], [(self.second[stage], step, kind)]
        parts = [
            [(memory[extra], step, kind) for (which, _), memory in self.resident.items() if which == name]
            for name in ("key", "value")
        ]
        return parts[0], parts[1]

    def own(self, group: int, use: int) -> list[tuple]:
        """What a warpgroup reads of the resident keys and values, whose rows it has or, split, whose operand."""
        wanted = [("key" if group == 0 else "value", 0)] if self.split else [("key", group), ("value", group)]
        return [(part, use, "key items") for key in wanted for part in self.resident[key]]


class _BackwardAgent(ItemAgent):
    def __init__(self, model: Backward, items: Sequence, ended: bool, name: str):
        super().__init__(model, items, ended, name if model.launch is None else f"{name} of CTA {model.cta}", model.cta)

    def write_program(self):
        with contextlib.suppress(OutOfItems):
            self.run()

    def run(self):
        """`ForEachItem` in bwd_producer.cuh; the consumers' loop is the same, `BackwardConsumer::Run` in
        bwd_consumer.cuh."""
        model = self.model
        for number in range(len(self.items) + 1):
            self.wait(model.full_item, number)
            self.begin_read(model.items, number)
            if number == len(self.items):
                if not self.ended:
                    raise OutOfItems
                self.end_read(model.items, number)
                return
            early = model.mistake == "items are released before they are done"
            if early:
                self.release_item(number)
            self.work(self.items[number], number)
            self.end_read(model.items, number)
            if not early:
                self.release_item(number)

    def release_item(self, number: int):
        self.arrive(self.model.empty_item, number)

    def work(self, item: Item, number: int):
        raise NotImplementedError

    # An access to several subtiles of memory
    def begin_reads(self, accesses: list[tuple]):
        for access in accesses:
            self.begin_read(*access)

    def end_reads(self, accesses: list[tuple]):
        for access in accesses:
            self.end_read(*access)


class _Scheduler(_BackwardAgent):
    def __init__(self, model: Backward, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "scheduler")

    def run(self):
        """`BackwardScheduler::Run` in bwd_producer.cuh."""
        for number, item in enumerate(self.items):
            if self.model.launch is not None:
                self.model.launch.wait_for_others(self, item)
            self.announce(number)
        if not self.ended:
            raise OutOfItems
        self.announce(len(self.items))

    def announce(self, number: int):
        """`BackwardScheduler::Announce` in bwd_producer.cuh."""
        self.wait(self.model.empty_item, number - self.model.empty_item.size)
        self.write(self.model.items, number)
        self.arrive(self.model.full_item, number)


class _LoaderOfKeysAndValues(_BackwardAgent):
    def __init__(self, model: Backward, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "loader of keys and values")
        self.place = 0

    def work(self, item: Item, number: int):
        """`LoadKeysAndValues` in bwd_producer.cuh."""
        model, use = self.model, self.place
        if model.mistake != "the loader of keys and values does not wait for open items":
            self.wait(model.open_item, number)
        if item.kind != KEYS:
            return
        for group in range(2):
            self.wait(model.empty_key[group], use - 1)
            self.expect(model.full_key[group], use)
            self.arrive(model.full_key[group], use)
            self.copy(model.own(group, use), (model.full_key[group], use))
        self.place += 1


class _Loader(_BackwardAgent):
    def __init__(self, model: Backward, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "loader")
        self.step = {KEYS: 0, QUERIES: 0}
        self.key_items = 0

    def work(self, item: Item, number: int):
        """`BackwardLoader::Run` in bwd_producer.cuh."""
        if item.kind == KEYS:
            self.begin_keys()
        else:
            self.begin_queries()
        self.arrive(self.model.open_item, number)
        for i in range(item.steps):
            self.emit(item, i)
        if item.steps == 0:
            self.emit(item, None)

    def begin_keys(self):
        """`BackwardLoader::BeginKeys` in bwd_producer.cuh."""
        if self.model.mistake != "an item of keys does not wait for the places of queries":
            for i in range(self.model.query_stages):
                self.wait_until_empty(QUERIES, self.step[QUERIES] + i)
        self.key_items += 1

    def begin_queries(self):
        """`BackwardLoader::BeginQueries` in bwd_producer.cuh.

        The wait for keys and values is for safety: a consumer releases them before its last step's place. Without it
        the model finds nothing.
        """
        if self.model.mistake != "an item of queries does not wait for the places of keys":
            for i in range(self.model.stages):
                self.wait_until_empty(KEYS, self.step[KEYS] + i)
        for group in range(2):
            self.wait(self.model.empty_key[group], self.key_items - 1)

    def wait_until_empty(self, kind: str, step: int):
        """`BackwardLoader::WaitUntilEmpty` in bwd_producer.cuh."""
        empty = self.model.empty[kind]
        self.wait(empty, step - empty.size)

    def emit(self, item: Item, number: int | None):
        """`BackwardLoader::Emit` and `BackwardLoader::Load` in bwd_producer.cuh. No number: void."""
        model, kind = self.model, item.kind
        step, full = self.step[kind], self.model.full[kind]
        self.wait_until_empty(kind, step)
        if number is not None:
            first, second = model.first_and_second(kind, step)
            statistics = [(model.statistics, step)] if kind == KEYS else []
            region = [item.visits[number]] if item.visits else []
            self.expect(full, step)
            self.copy(first + second + statistics, (full, step), reads=region)
        self.write(model.flags[kind], step)
        if kind == KEYS:
            self.write(model.orders, step)
        self.arrive(full, step)
        self.step[kind] += 1


class _Storer(_BackwardAgent):
    def __init__(self, model: Backward, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "storer")
        self.step = 0

    def work(self, item: Item, number: int):
        """`StoreScores` in bwd_producer.cuh."""
        model = self.model
        if item.kind != KEYS:
            return
        several = model.score_stages > 1
        at_once = model.mistake == "dS buffers are released when the last store has been issued"
        reading: tuple[int, int] | None = None  # step and group of the buffer that was handed over last
        if item.region and item.steps:
            self.begin_write(*item.region)
        for _ in range(max(1, item.steps)):
            step = self.step
            for group in range(model.groups):
                self.wait(model.full_scores[group], step)
                self.read(model.orders, step)
                if item.steps:
                    self.begin_read(model.scores[group], step)
                if at_once:
                    self.arrive(model.empty_scores[group], step)
                    if item.steps and reading is not None:
                        self.end_read(model.scores[reading[1]], reading[0])
                elif several:
                    if reading is not None:  # all stores but the last have read their buffers
                        self.release_scores(item, reading)
                else:
                    self.release_scores(item, (step, group))
                reading = (step, group)
            self.step += 1
        assert reading is not None
        early = model.mistake == "dS is counted as done before it is stored"
        if early and model.launch is not None:
            model.launch.add(self, item)
        if at_once:
            if item.steps:
                self.end_read(model.scores[reading[1]], reading[0])
        elif several:
            self.release_scores(item, reading)
        if item.region and item.steps:
            self.end_write(*item.region)
        if model.launch is not None and not early:
            model.launch.add(self, item)

    def release_scores(self, item: Item, buffer: tuple[int, int]):
        step, group = buffer
        if item.steps:
            self.end_read(self.model.scores[group], step)
        self.arrive(self.model.empty_scores[group], step)


class _Consumer(_BackwardAgent):
    """A warp of a consumer warpgroup, `BackwardConsumer` in bwd_consumer.cuh."""

    def __init__(self, model: Backward, items: Sequence, ended: bool, group: int, warp: int):
        super().__init__(model, items, ended, f"consumer {group}.{warp}")
        self.group, self.warp = group, warp
        self.step = self.query_step = self.prob_step = self.place = 0
        self.makes_scores = not model.split or group == 1
        self.scores_group = 0 if model.split else group
        self.gradients: list[tuple] = []  # what the products in flight read, of the step before

    def work(self, item: Item, number: int):
        if item.kind == KEYS:
            self.keys(item)
        else:
            self.queries(item)

    def release_item(self, number: int):
        self.release(self.model.empty_item, number)

    # ---- Items of keys

    def keys(self, item: Item):
        """`BackwardConsumer::Keys`, `SkipVoid`, `ForSteps` and `EndSteps` in bwd_consumer.cuh."""
        model = self.model
        self.wait(model.full_key[self.group], self.place)
        self.wait_for_step()
        if item.steps == 0:
            self.release(model.empty_key[self.group], self.place)
            if self.makes_scores and model.mistake != "a void step has no scores":
                self.wait(model.empty_scores[self.scores_group], self.step - model.score_stages)
                self.release(model.full_scores[self.scores_group], self.step)
        for i in range(item.steps):
            last = i == item.steps - 1
            early = model.mistake == "keys and values are released before the last step" and i == item.steps - 2
            if model.split:
                self.split_step(i == 0, last, early)
            else:
                self.key_step(i == 0, last, early)
            if not last:
                self.step += 1
        self.end_gradients()
        self.release_place(KEYS, self.step)
        self.step += 1
        self.place += 1

    def key_step(self, first: bool, last: bool, early: bool):
        """`BackwardConsumer::KeyStep` in bwd_consumer.cuh."""
        model = self.model
        one, two = model.first_and_second(KEYS, self.step)
        self.begin_step(one, first)
        self.begin_reads(two)
        self.read(model.flags[KEYS], self.step)
        self.read(model.statistics, self.step)
        self.end_reads(one + two)
        self.release_resident(last, early)
        self.begin_gradients(one + two)
        self.store_scores()

    def split_step(self, first: bool, last: bool, early: bool):
        """`BackwardConsumer::SplitProbabilities` and `SplitScores` in bwd_consumer.cuh."""
        model, place = self.model, self.prob_step
        one, two = model.first_and_second(KEYS, self.step)
        operand, other = (one, two) if self.group == 0 else (two, one)
        self.begin_step(operand, first)
        self.read(model.flags[KEYS], self.step)
        waits = model.mistake != "probabilities are not waited for"
        if self.group == 0:
            self.end_reads(operand)
            self.release_resident(last, early)
            if waits:
                self.wait(model.empty_probs, place - model.prob_stages)
            self.begin_write(model.probs[self.warp], place)
            self.read(model.statistics, self.step)
            self.begin_gradients(other)
            self.end_write(model.probs[self.warp], place)
            self.arrive(model.full_probs, place, THREADS)
        else:
            self.wait(model.full_probs, place)
            self.end_reads(operand)
            self.release_resident(last, early)
            self.begin_read(model.probs[self.warp], place)
            self.read(model.statistics, self.step)
            self.end_read(model.probs[self.warp], place)
            self.arrive(model.empty_probs, place, THREADS)
            self.begin_gradients(other)
            self.store_scores()
        self.prob_step += 1

    def wait_for_step(self):
        """`BackwardConsumer::WaitForStep` in bwd_consumer.cuh."""
        self.wait(self.model.full[KEYS], self.step)
        self.read(self.model.flags[KEYS], self.step)

    def begin_step(self, tile: list[tuple], first: bool):
        """`BackwardConsumer::BeginStep` and `ReleasePrevious` in bwd_consumer.cuh."""
        self.wait(self.model.full[KEYS], self.step)
        self.begin_reads(self.model.own(self.group, self.place))
        self.begin_reads(tile)
        if not first:
            self.end_gradients()
            self.release_place(KEYS, self.step - 1)

    def release_resident(self, last: bool, early: bool):
        """The end of a step's first products, and in the last step that of the item's use of keys and values."""
        if early:
            self.release(self.model.empty_key[self.group], self.place)
        self.end_reads(self.model.own(self.group, self.place))
        if last and self.model.mistake != "keys and values are released before the last step":
            self.release(self.model.empty_key[self.group], self.place)

    def begin_gradients(self, tiles: list[tuple]):
        """Products that the next step's first ones are behind."""
        self.gradients = tiles
        self.begin_reads(tiles)

    def end_gradients(self):
        self.end_reads(self.gradients)
        self.gradients = []

    def store_scores(self):
        """`BackwardConsumer::StoreScores`, `WaitForScoresBuffer` and `ArriveScores` in bwd_consumer.cuh."""
        model, group = self.model, self.scores_group
        self.wait(model.empty_scores[group], self.step - model.score_stages)
        self.write(model.scores[group], self.step)
        self.release(model.full_scores[group], self.step)

    # ---- Items of queries

    def queries(self, item: Item):
        """`BackwardConsumer::Queries` and `WaitForQueryStep` in bwd_consumer.cuh."""
        model = self.model
        active = self.group == 0 or not item.half
        reading: list[tuple] = []
        early = model.mistake == "queries are counted as done before dS has been read"
        launch = model.launch if self.group == 0 and self.warp == 0 else None  # which it tells
        if launch is not None and early:
            launch.add(self, item)
        for i in range(max(1, item.steps)):
            step, last = self.query_step, i >= item.steps - 1
            self.wait(model.full[QUERIES], step)
            self.read(model.flags[QUERIES], step)
            if active and item.steps:
                first, second = model.first_and_second(QUERIES, step)
                self.begin_reads(first + second)
                if i > 0:
                    self.end_reads(reading)
                    self.release_place(QUERIES, step - 1)
                reading = first + second
            elif not last and model.mistake != "an inactive warpgroup does not release its steps":
                self.release_place(QUERIES, step)
            self.query_step += 1
        self.end_reads(reading)
        self.release_place(QUERIES, self.query_step - 1)
        if launch is not None and not early:
            launch.add(self, item)

    # ---- Pipeline

    def release_place(self, kind: str, step: int):
        """`BackwardConsumer::ReleasePlace` in bwd_consumer.cuh."""
        weight = THREADS if self.model.constants["kEveryThreadArrives"] else WARPS
        self.arrive(self.model.empty[kind], step, weight)

    def release(self, barriers: Barriers, use: int):
        """`BackwardConsumer::Release` in bwd_consumer.cuh."""
        self.arrive(barriers, use, WARPS)


@dataclass(frozen=True)
class Plan:
    """A launch: `BackwardLayout` in bwd_plan.h and `BackwardPlan` in bwd_shared.cuh, in small numbers.

    Attributes:
      slices: slices of heads.
      heads: key/value heads of a slice.
      missing: heads that the last slice has less.
      tiles: tiles of keys of a head.
      blocks: blocks of queries of a head.
      group: query heads of a key/value head.
      buffers: slices whose dS exists at a time.
      steps: steps of the items of keys, in turns.
      visited: tiles that an item of queries visits at most.
    """

    slices: int
    heads: int = 1
    missing: int = 0
    tiles: int = 2
    blocks: int = 1
    group: int = 1
    buffers: int = 2
    steps: tuple[int, ...] = (1, 2, 0, 3)
    visited: int = 2


@dataclass
class Launch(Model):
    """All CTAs of a launch; an item is the CTA that takes the next work index."""

    dim: int
    split: bool
    plan: Plan
    ctas: int
    mistake: str = ""
    models: list[Backward] = field(default_factory=list)
    scores: dict[tuple, Memory] = field(default_factory=dict)  # dS in global memory

    def __post_init__(self):
        inside = self.mistake if self.mistake in LAUNCH_MISTAKES else ""
        self.models = [Backward(self.dim, self.split, inside, cta, self) for cta in range(self.ctas)]
        self.work = [self.find(number) for number in range(self.plan.slices * self.slice_items)]

    def agents(self, items: Sequence, ended: bool) -> list[Agent]:
        assert ended, "counters are waited for as they are in the end"
        taken: list[list[Item]] = [[] for _ in range(self.ctas)]
        for cta, item in zip(items, self.work, strict=True):
            if item is not None:
                taken[cta].append(item)
        return [agent for model, own in zip(self.models, taken, strict=True) for agent in model.agents(own, True)]

    @property
    def key_items(self) -> int:
        return self.plan.heads * self.plan.tiles

    @property
    def slice_items(self) -> int:
        return self.key_items + self.plan.heads * self.plan.group * self.plan.blocks

    def find(self, number: int) -> Item | None:
        """`BackwardScheduler::Find` in bwd_producer.cuh."""
        plan = self.plan
        kind, slice, place = KEYS, 0, number
        if number >= self.key_items:
            phase, place = divmod(number - self.key_items, self.slice_items)
            keys_left = phase + 1 < plan.slices
            slice = phase + 1
            if not keys_left or place >= self.key_items:
                if keys_left:
                    place -= self.key_items
                kind, slice = QUERIES, phase
        row, tile = divmod(place, plan.tiles if kind == KEYS else plan.blocks)
        group = 1 if kind == KEYS else plan.group
        if slice * plan.heads * group + row >= (plan.slices * plan.heads - plan.missing) * group:
            return None
        if kind == KEYS:
            region = (self.region(slice, row, tile), slice)
            return Item(KEYS, self.steps_of(slice, row, tile), slice=slice, region=region)
        head = row // plan.group
        visits = [
            (self.region(slice, head, t), slice) for t in range(plan.tiles) if self.steps_of(slice, head, t) > 0
        ]  # fmt: skip
        visits = visits[: plan.visited]
        return Item(QUERIES, len(visits), half=(slice + row) % 2 == 1, slice=slice, visits=tuple(visits))

    def steps_of(self, slice: int, row: int, tile: int) -> int:
        place = (slice * self.plan.heads + row) * self.plan.tiles + tile
        return self.plan.steps[place % len(self.plan.steps)]

    def region(self, slice: int, row: int, tile: int) -> Memory:
        """`BackwardLoader::BufferBase` in bwd_producer.cuh: the part of dS of a slice's buffer."""
        place = (slice % self.plan.buffers, row, tile)
        return self.scores.setdefault(place, Memory(f"dS {place}", 1, "slices"))

    def wait_for_others(self, scheduler: Agent, item: Item):
        """`BackwardScheduler::WaitForOthers` and `Items` in bwd_producer.cuh."""
        plan = self.plan
        if item.kind == KEYS:
            before = item.slice - plan.buffers
            if before >= 0 and self.mistake != "items of keys do not wait for their buffer":
                scheduler.wait_until((QUERIES, before), self.heads_of(before) * plan.group * plan.blocks)
        elif self.mistake != "items of queries do not wait for dS":
            scheduler.wait_until((KEYS, item.slice), self.heads_of(item.slice) * plan.tiles)

    def heads_of(self, slice: int) -> int:
        plan = self.plan
        return min(plan.heads, plan.slices * plan.heads - plan.missing - slice * plan.heads)

    @staticmethod
    def add(agent: Agent, item: Item):
        """The ends of `StoreScores` in bwd_producer.cuh and of `BackwardConsumer::Queries` in bwd_consumer.cuh."""
        agent.add((item.kind, item.slice))
