"""The pipeline of the Hopper forward with a feeder, csrc/attention/sm90/fwd_feeder.cuh.

One warp fetches what the warpgroup of the CTA consumes, in one stream over the borders of tiles.

An item is a `Tile` of queries of one CTA. It has one step where there is nothing to attend to.

Not modelled: what is computed; the barrier `open`, which is never waited for in earnest; `inexact_noted` and the
meeting at the end, which concern consumers alone; words and entries of lists, which the feeder copies for itself alone;
initialisation, which a __syncthreads() divides from all else.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.rings.checker import Agent, Barriers, ItemAgent, Memory, Model, OutOfItems
from tests.rings.sources import FORWARD, Constants

MODELLED_WARPS = 2  # of the warpgroup's four: each stands for two

# Seeded mistakes, and what the model must say of them. See `tests/test_rings.py`.
MISTAKES = (
    "queries are asked for as soon as the tile is known",
    "values are asked for without waiting",
    "keys are asked for without waiting",
    "as many headers as buffers of keys",
    "queries are released before they are in registers",
)


class Feeder(Model):
    """`ForwardShared` in fwd_shared.cuh, and `ForwardKernel` in sm90/fwd.cuh."""

    def __init__(self, mistake: str = ""):
        assert not mistake or mistake in MISTAKES, mistake
        self.mistake = mistake
        constants = Constants(
            FORWARD, "ForwardConfig", kDim=64, kConsumers=1, kFeeder=True, kFeatures=0, kPlainExtras=1
        )
        assert constants["kOverlapTiles"]
        assert constants["kQueryInRegisters"]
        assert constants["kThreads"] == constants["kWarpgroup"] + 32

        def barriers(name: str, counter: str) -> Barriers:
            return Barriers(name, constants.count(name), constants.size(name), counter)

        self.full_query, self.empty_query = barriers("full_query", "tiles"), barriers("empty_query", "tiles")
        self.full_key, self.empty_key = barriers("full_key", "steps"), barriers("empty_key", "steps")
        self.full_value, self.empty_value = barriers("full_value", "steps"), barriers("empty_value", "steps")
        self.tail_value = barriers("tail_value", "cuts")
        headers = constants["kHeaders"]
        if mistake == "as many headers as buffers of keys":
            headers = self.full_key.size
        self.headers = Memory("headers", headers, "tiles")
        self.query = Memory("query", 1, "tiles")
        self.key = Memory("key", self.full_key.size, "steps")  # and the bit tiles
        self.value = Memory("value", self.full_value.size, "steps")
        self.steps = Memory("steps", 2 * self.full_key.size, "steps")  # and the gates

    def agents(self, items: Sequence, ended: bool) -> Sequence[Agent]:
        agents: list[_FeederAgent] = [_Feeder(self, items, ended, "feeder")]
        agents += [_Consumer(self, items, ended, f"consumer {warp}") for warp in range(MODELLED_WARPS)]
        for agent in agents:
            agent.write_program()
        return agents

    def totals(self, items: Sequence) -> dict[str, int]:
        return {
            "tiles": len(items),
            "steps": sum(tile.steps for tile in items),
            "cuts": sum(len(tile.cut) for tile in items),
        }


class _FeederAgent(ItemAgent):
    def __init__(self, model: Feeder, items: Sequence, ended: bool, name: str):
        super().__init__(model, items, ended, name)
        self.step = 0

    def write_program(self):
        try:
            self.run()
        except OutOfItems:
            self.context = (*self.standing(), "waits for an item")

    def standing(self) -> tuple:
        """What decides how the program goes on, beside the items."""
        return (("steps", self.step),)


class _Feeder(_FeederAgent):
    """The fifth warp, `ForwardFeeder` in fwd_feeder.cuh."""

    def __init__(self, model: Feeder, items: Sequence, ended: bool, name: str):
        super().__init__(model, items, ended, name)
        self.keys = self.values = self.tiles = self.queries = self.cuts = 0
        self.left = 0  # steps of the tile whose keys were not asked for
        self.asked: list[tuple[int, bool]] = []  # of each step: its tile, and whether a length cuts it

    def standing(self) -> tuple:
        numbers = (("steps", self.keys), ("steps", self.values), ("tiles", self.tiles), ("tiles", self.queries))
        asked = [x for tile, cut in self.asked[self.step :] for x in (("tiles", tile), cut)]
        return (*super().standing(), *numbers, ("cuts", self.cuts), *asked)

    def run(self):
        """`ForwardFeeder::Run` in fwd_feeder.cuh."""
        model = self.model
        if self.item(0) is None:
            return
        self.begin_tile()
        self.ask_queries()
        for _ in range(model.full_key.size):
            self.ask_keys()
            self.ask_values(0)
        while self.step < self.keys:
            self.ask_keys()
            self.read(model.steps, self.step)  # flags
            early = model.mistake == "queries are asked for as soon as the tile is known"
            if (self.queries == self.asked[self.step][0] + 1 or early) and self.queries < self.tiles:
                self.ask_queries()
            self.ask_values(self.step)
            self.step += 1

    def begin_tile(self):
        """`ForwardFeeder::BeginTile` in fwd_feeder.cuh."""
        self.write(self.model.headers, self.tiles)
        self.left = self.items[self.tiles].steps
        self.tiles += 1

    def ask_queries(self):
        """`ForwardFeeder::AskQueries` in fwd_feeder.cuh, `ForwardScheduler::LoadQueries` in fwd_producer.cuh."""
        model, number = self.model, self.queries
        self.read(model.headers, number)
        self.wait(model.empty_query, number - 1)
        self.expect(model.full_query, number)
        self.arrive(model.full_query, number)
        self.copy([(model.query, number)], (model.full_query, number))
        self.queries += 1

    def ask_keys(self):
        """`ForwardFeeder::AskKeys` and `Take` in fwd_feeder.cuh, `ForwardLoader::LoadKeys` in fwd_producer.cuh."""
        if self.left == 0:
            return
        model, step, tile = self.model, self.keys, self.tiles - 1
        number = self.items[tile].steps - self.left
        following = self.item(tile + 1) if self.left == 1 else None  # whether the step is the CTA's last
        self.read(model.headers, tile)
        if model.mistake != "keys are asked for without waiting":
            self.wait(model.empty_key, step - model.empty_key.size)
        self.write(model.steps, step)
        self.expect(model.full_key, step)
        self.arrive(model.full_key, step)
        self.copy([(model.key, step)], (model.full_key, step))
        self.asked.append((tile, number in self.items[tile].cut))
        self.left -= 1
        self.keys += 1
        if following is not None:
            self.begin_tile()

    def ask_values(self, released: int):
        """`ForwardFeeder::AskValues` in fwd_feeder.cuh."""
        while self.values < min(self.keys, released + self.model.full_value.size):
            self.load_values()

    def load_values(self):
        """`ForwardLoader::LoadValues` in fwd_producer.cuh."""
        model, step = self.model, self.values
        tile, cut = self.asked[step]
        self.read(model.steps, step)
        self.read(model.headers, tile)
        if model.mistake != "values are asked for without waiting":
            self.wait(model.empty_value, step - model.empty_value.size)
        self.values += 1
        if not cut:
            self.expect(model.full_value, step)
            self.arrive(model.full_value, step)
            self.copy([(model.value, step)], (model.full_value, step))
            return
        self.expect(model.tail_value, self.cuts)
        self.arrive(model.tail_value, self.cuts)
        self.copy([(model.value, step, -1)], (model.tail_value, self.cuts))
        self.wait(model.tail_value, self.cuts)
        self.cuts += 1
        self.read(model.value, step, -1)
        self.write(model.value, step)
        self.arrive(model.full_value, step)


class _Consumer(_FeederAgent):
    """A warp of the warpgroup, `ForwardConsumer` in fwd_consumer.cuh."""

    def __init__(self, model: Feeder, items: Sequence, ended: bool, name: str):
        super().__init__(model, items, ended, name)
        self.tile = 0  # that the next step belongs to

    def standing(self) -> tuple:
        return (*super().standing(), ("tiles", self.tile))

    def run(self):
        """`ForwardConsumer::RunFed` in fwd_consumer.cuh."""
        if self.item(0) is None:
            return
        self.first_step()
        more = True
        while more:
            for _ in range(self.items[self.tile].steps - 1):
                self.middle_step()
            more = self.finish_tile()

    def first_step(self):
        """`ForwardConsumer::FirstStep` in fwd_consumer.cuh."""
        self.wait_for_first_operands(0)
        self.begin_read(self.model.key, self.step)
        self.read(self.model.query, 0)
        self.start_tile()

    def middle_step(self):
        """`ForwardConsumer::Step` and `CatchUp` in fwd_consumer.cuh."""
        model, step = self.model, self.step
        self.wait(model.full_key, step)
        self.begin_read(model.key, step)
        self.wait(model.full_value, step - 1)
        self.begin_read(model.value, step - 1)
        self.read(model.steps, step)  # flags
        self.softmax()
        self.release_values()
        self.read(model.steps, step)
        self.read(model.headers, self.tile)
        self.step += 1

    def finish_tile(self) -> bool:
        """`ForwardConsumer::FinishTile`, `IsLive` and `LastProduct` in fwd_consumer.cuh."""
        model, tile = self.model, self.tile
        following = self.item(tile + 1)
        if following is not None:
            self.wait_for_first_operands(tile + 1)
        self.wait(model.full_value, self.step - 1)
        self.begin_read(model.value, self.step - 1)
        if following is not None:
            self.begin_read(model.key, self.step)
            self.begin_read(model.query, tile + 1)
        self.release_values()
        self.read(model.headers, tile)  # StoreTile
        if following is None:
            return False
        self.end_read(model.query, tile + 1)
        self.tile += 1
        self.start_tile()
        return True

    def wait_for_first_operands(self, tile: int):
        """`ForwardConsumer::WaitForFirstOperands` in fwd_consumer.cuh."""
        self.wait(self.model.full_key, self.step)
        self.read(self.model.headers, tile)  # the parity of the queries
        self.wait(self.model.full_query, tile)

    def start_tile(self):
        """`ForwardConsumer::StartTile` and `LoadQueries` in fwd_consumer.cuh."""
        model = self.model
        early = model.mistake == "queries are released before they are in registers"
        if early:
            self.release(model.empty_query, self.tile)
        self.read(model.query, self.tile)
        if not early:
            self.release(model.empty_query, self.tile)
        self.read(model.steps, self.step)  # flags
        self.softmax()
        self.read(model.steps, self.step)  # the gates
        self.step += 1

    def softmax(self):
        """`ForwardConsumer::Softmax` and `ApplyMask` in fwd_consumer.cuh: behind the product; releases the keys."""
        self.read(self.model.steps, self.step)
        self.end_read(self.model.key, self.step)
        self.release(self.model.empty_key, self.step)

    def release_values(self):
        self.end_read(self.model.value, self.step - 1)
        self.release(self.model.empty_value, self.step - 1)

    def release(self, barriers: Barriers, use: int):
        """`ForwardConsumer::Release` in fwd_consumer.cuh, by two warps."""
        self.arrive(barriers, use, 4 // MODELLED_WARPS)
