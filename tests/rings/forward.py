"""The pipeline of the Hopper forward, csrc/attention/sm90/fwd_*.cuh: a scheduler, a loader, one or two warpgroups, and
with extras two helpers.

An item is a `Tile` of queries as one CTA meets them, whoever handed them out: the counter of persistent CTAs, or the
launch, of one tile a CTA. The end marker follows the last.

Not modelled: what is computed; the barrier `open`, which is never waited for in earnest; `inexact_noted`, which only
consumers touch, between a header's arrival and its release; initialisation, which a __syncthreads() divides from all
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.rings.checker import Agent, Barriers, ItemAgent, Memory, Model, OutOfItems
from tests.rings.sources import FORWARD, Constants

MODELLED_WARPS = 2  # of a warpgroup's four: each stands for two of them, and arrives for both
WARPS = 4 // MODELLED_WARPS  # that arrive together
THREADS = 32 * WARPS


@dataclass(frozen=True)
class Tile:
    """A tile of queries.

    Attributes:
      steps: number of steps; 0: nothing to attend to, or poisoned.
      cut: numbers of the steps whose values the key/value length cuts.
    """

    steps: int
    cut: tuple[int, ...] = ()

    def __repr__(self):
        return f"{self.steps}{f' cut {self.cut}' if self.cut else ''}"


EMPTY = Tile(0)

# Seeded mistakes, and what the model must say of them. See `tests/test_rings.py`.
MISTAKES = (
    "empty tiles are skipped before the tile is stored",
    "queries are released before the last product that reads them",
    "keys are released before the mask is read",
    "queries are released when the next have come",
    "values are not released",
    "empty tiles do not release their header",
    "the loader does not release headers of empty tiles",
    "a turn too many is waited for",
    "the end needs no place among the headers",
    "steps have as many entries as there are buffers of keys",
    "values are used before they are clean",
    "headers are released before the tile is stored",
    "helpers announce biases before they have written them",
)


class Forward(Model):
    """`ForwardShared` in fwd_shared.cuh, and `ForwardKernel` in sm90/fwd.cuh, for one `ForwardConfig` in
    attention/sm90/config.h."""

    def __init__(self, dim: int, consumers: int, extras: bool = False, mistake: str = ""):
        assert not mistake or mistake in MISTAKES, mistake
        self.mistake = mistake
        arguments = {"kDim": dim, "kConsumers": consumers, "kFeeder": False}
        self.constants = constants = Constants(
            FORWARD, "ForwardConfig", **arguments, kFeatures=int(extras), kPlainExtras=1
        )
        self.consumers = consumers
        self.helpers = constants["kHelperWarps"]
        self.overlap, self.in_registers = constants["kOverlapTiles"], constants["kQueryInRegisters"]
        assert constants["kWarpgroup"] == 4 * 32

        def barriers(name: str, counter: str) -> Barriers:
            return Barriers(name, constants.count(name), constants.size(name), counter)

        self.full_header, self.empty_header = barriers("full_header", "tiles"), barriers("empty_header", "tiles")
        self.full_query, self.empty_query = barriers("full_query", "live"), barriers("empty_query", "live")
        self.full_step = barriers("full_step", "steps")
        self.full_key, self.empty_key = barriers("full_key", "steps"), barriers("empty_key", "steps")
        self.full_value, self.empty_value = barriers("full_value", "steps"), barriers("empty_value", "steps")
        self.tail_value = barriers("tail_value", "cuts")
        # Named barriers, of threads.
        self.turn = [Barriers(f"turn {g}", 2 * constants["kWarpgroup"], 1, "steps") for g in range(2)]
        self.meeting = Barriers("meeting", consumers * constants["kWarpgroup"], 1, "none")

        self.headers = Memory("headers", self.full_header.size, "tiles")
        self.query = Memory("query", 1, "live")
        self.key = Memory("key", self.full_key.size, "steps")  # and the bit tiles
        self.value = Memory("value", self.full_value.size, "steps")
        entries = 2 * self.full_key.size
        if mistake == "steps have as many entries as there are buffers of keys":
            entries //= 2
        self.steps = Memory("steps", entries, "steps")  # and the gates
        # What helpers write for a warpgroup: its biases, and their lines' rows, which products read.
        self.biases = [Memory(f"biases {g}", entries, "steps") for g in range(consumers)]
        self.ramp = [Memory(f"ramp {g}", self.full_key.size, "steps") for g in range(consumers)]
        self.inexact_tiles = Memory("inexact_tiles", 1, "none")

    def agents(self, items: Sequence, ended: bool) -> Sequence[Agent]:
        agents: list[_ForwardAgent] = [_Scheduler(self, items, ended), _Loader(self, items, ended)]
        for group in range(self.consumers):
            agents += [_Consumer(self, items, ended, group, warp) for warp in range(MODELLED_WARPS)]
        agents += [_Helper(self, items, ended, number) for number in range(self.helpers)]
        for agent in agents:
            agent.write_program()
        return agents

    def totals(self, items: Sequence) -> dict[str, int]:
        return {
            "tiles": len(items),
            "live": sum(tile.steps > 0 for tile in items),
            "steps": sum(tile.steps for tile in items),
            "cuts": sum(len(tile.cut) for tile in items),
            "none": 0,
        }


class _ForwardAgent(ItemAgent):
    def write_program(self):
        try:
            self.run()
        except OutOfItems:
            self.context = (*self.context, "waits for an item")


class _Scheduler(_ForwardAgent):
    def __init__(self, model: Forward, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "scheduler")
        self.live = 0

    def run(self):
        """`ForwardScheduler::Run` in fwd_producer.cuh."""
        number = 0
        while (tile := self.item(number)) is not None:
            self.announce(number)
            if tile.steps > 0:
                self.load_queries()
                self.live += 1
            number += 1
        self.announce(number, end=True)

    def announce(self, number: int, end: bool = False):
        """`ForwardScheduler::Announce` in fwd_producer.cuh."""
        model = self.model
        if not (end and model.mistake == "the end needs no place among the headers"):
            self.wait(model.empty_header, number - model.empty_header.size)
        self.write(model.headers, number)
        self.arrive(model.full_header, number)

    def load_queries(self):
        """`ForwardScheduler::LoadQueries` in fwd_producer.cuh. The parity is that of the live tiles so far."""
        self.wait(self.model.empty_query, self.live - 1)
        self.expect(self.model.full_query, self.live)
        self.arrive(self.model.full_query, self.live)
        self.copy([(self.model.query, self.live)], (self.model.full_query, self.live))


class _Loader(_ForwardAgent):
    def __init__(self, model: Forward, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "loader")
        self.step = 0
        self.cuts = 0

    def run(self):
        """`ForwardLoader::Run` in fwd_producer.cuh."""
        model, number = self.model, 0
        while True:
            self.wait(model.full_header, number)
            self.begin_read(model.headers, number)
            tile = self.item(number)
            if tile is not None and tile.steps > 0:
                self.load(tile)
            self.end_read(model.headers, number)
            if tile is None:
                return
            if tile.steps > 0 or model.mistake != "the loader does not release headers of empty tiles":
                self.arrive(model.empty_header, number)
            number += 1

    def load(self, tile: Tile):
        """`ForwardLoader::Load` in fwd_producer.cuh: K0 K1 V0 K2 V1 .."""
        for i in range(tile.steps):
            self.load_keys()
            if i > 0:
                self.load_values(self.step - 1, cut=i - 1 in tile.cut)
            self.step += 1
        self.load_values(self.step - 1, cut=tile.steps - 1 in tile.cut)

    def load_keys(self):
        """`ForwardLoader::LoadKeys`, `LoadBits` and `LoadTile` in fwd_producer.cuh."""
        model, step = self.model, self.step
        self.wait(model.empty_key, step - model.empty_key.size)
        self.write(model.steps, step)
        if model.helpers:
            self.arrive(model.full_step, step)
        self.expect(model.full_key, step)
        self.arrive(model.full_key, step)
        self.copy([(model.key, step)], (model.full_key, step))

    def load_values(self, step: int, cut: bool):
        """`ForwardLoader::LoadValues` and `ZeroRows` in fwd_producer.cuh: "raw" values are those not clean yet."""
        model = self.model
        self.read(model.steps, step)
        self.wait(model.empty_value, step - model.empty_value.size)
        if not cut:
            self.expect(model.full_value, step)
            self.arrive(model.full_value, step)
            self.copy([(model.value, step)], (model.full_value, step))
            return
        self.expect(model.tail_value, self.cuts)
        self.arrive(model.tail_value, self.cuts)
        self.copy([(model.value, step, -1)], (model.tail_value, self.cuts))
        if model.mistake == "values are used before they are clean":
            self.arrive(model.full_value, step)
        self.wait(model.tail_value, self.cuts)
        self.cuts += 1
        self.read(model.value, step, -1)
        self.write(model.value, step)
        if model.mistake != "values are used before they are clean":
            self.arrive(model.full_value, step)


class _Helper(_ForwardAgent):
    """A warp that finds the biases of a warpgroup."""

    def __init__(self, model: Forward, items: Sequence, ended: bool, number: int):
        super().__init__(model, items, ended, f"helper {number}")
        self.number = number
        self.at = 0

    def run(self):
        """`ForwardHelper::Run` and `FindDense` in fwd_helper.cuh."""
        model, number = self.model, 0
        while True:
            self.wait(model.full_header, number)
            self.read(model.headers, number)
            tile = self.item(number)
            if tile is None:
                return
            self.arrive(model.empty_header, number)
            for _ in range(tile.steps):
                self.find_step()
            number += 1

    def find_step(self):
        """`ForwardHelper::Step`, `WriteBiases` and `WriteRows` in fwd_helper.cuh."""
        model, step = self.model, self.at
        early = model.mistake == "helpers announce biases before they have written them"
        self.wait(model.full_step, step)
        self.read(model.steps, step)
        if early:
            self.arrive(model.full_key, step)
        if self.number < model.consumers:
            self.write(model.biases[self.number], step)
            self.write(model.ramp[self.number], step)
        if not early:
            self.arrive(model.full_key, step)
        self.at += 1


class _Consumer(_ForwardAgent):
    """A warp of a consumer warpgroup, `ForwardConsumer` in fwd_consumer.cuh."""

    def __init__(self, model: Forward, items: Sequence, ended: bool, group: int, warp: int):
        super().__init__(model, items, ended, f"consumer {group}.{warp}")
        self.group = group
        self.step = 0
        self.turns = self.passed = 0
        self.tile = 0  # that the current step belongs to
        self.left = 0  # steps of it that have not begun
        self.live = -1  # its number among the live ones
        self.late = False  # for a mistake
        self.following: int | None = 0  # the next tile, once this one is finished

    def run(self):
        """`ForwardConsumer::Run` in fwd_consumer.cuh."""
        if self.group == 1:
            self.pass_turn()  # group 0 goes first
        tile = self.skip_empty_tiles(0)
        if tile is None:
            return
        while tile is not None:
            self.first_step(tile)
            more = True
            while more:
                while self.left > 0:
                    self.middle_step()
                more = self.finish_tile()
            tile = None if self.following is None else self.skip_empty_tiles(self.following)
        self.arrive(self.model.meeting, 0, THREADS)
        self.wait(self.model.meeting, 0)
        self.read(self.model.inexact_tiles, 0)

    # ---- Stages of a tile

    def first_step(self, tile: int):
        """`ForwardConsumer::FirstStep` in fwd_consumer.cuh."""
        model = self.model
        self.wait_for_first_operands(tile)
        self.begin_keys()
        self.read(model.query, self.live + 1)
        self.start_tile(tile)

    def middle_step(self):
        """`ForwardConsumer::Step` and `FindKept` in fwd_consumer.cuh."""
        model, step = self.model, self.step
        self.wait(model.full_key, step)
        self.take_turn()
        self.begin_keys()
        if not model.in_registers:
            self.begin_read(model.query, self.live)
        self.wait(model.full_value, step - 1)
        self.begin_read(model.value, step - 1)
        self.pass_turn()
        self.read(model.steps, step)  # flags, positions of keys
        if not model.in_registers:
            self.end_read(model.query, self.live)
        self.softmax()
        self.release_values()
        self.catch_up()
        self.step += 1
        self.left -= 1

    def finish_tile(self) -> bool:
        """`ForwardConsumer::FinishTile` in fwd_consumer.cuh."""
        model, tile = self.model, self.tile
        self.following = tile + 1
        if model.mistake == "empty tiles are skipped before the tile is stored":
            following = self.skip_empty_tiles(tile + 1)
            if model.overlap and following is not None:
                self.finish_under_next(tile, following)
                return True
            if not model.in_registers:
                self.release(model.empty_query, self.live)
            self.last_product()
            self.store_tile(tile)
            self.following = following
            return False

        # One header beyond the current tile's, at most.
        if not model.overlap or not self.is_live(self.wait_for_header(tile + 1)):
            if not model.in_registers and "queries are released" not in model.mistake:
                self.release(model.empty_query, self.live)  # its products are done
            self.last_product()
            self.store_tile(tile)  # releases the tile's header
            return False
        self.finish_under_next(tile, tile + 1)
        return True

    def finish_under_next(self, tile: int, following: int):
        """`ForwardConsumer::FinishTile` in fwd_consumer.cuh, before a live tile, whose first product runs meanwhile."""
        model = self.model
        self.wait_for_first_operands(following)
        self.wait(model.full_value, self.step - 1)
        self.take_turn()
        self.begin_read(model.value, self.step - 1)
        self.begin_keys()
        self.begin_read(model.query, self.live + 1)
        self.pass_turn()
        self.release_values()
        self.store_tile(tile)
        self.end_read(model.query, self.live + 1)
        self.start_tile(following)

    def last_product(self):
        """`ForwardConsumer::LastProduct` in fwd_consumer.cuh."""
        self.wait(self.model.full_value, self.step - 1)
        self.take_turn()
        self.begin_read(self.model.value, self.step - 1)
        self.pass_turn()
        self.release_values()

    # ---- Parts of them

    def skip_empty_tiles(self, tile: int) -> int | None:
        """`ForwardConsumer::SkipEmptyTiles` and `StoreNothing` in fwd_consumer.cuh."""
        model = self.model
        while True:
            kind = self.wait_for_header(tile)
            if kind is None:
                return None
            if kind.steps > 0:
                return tile
            self.read(model.headers, tile)
            if model.mistake != "empty tiles do not release their header":
                self.release(model.empty_header, tile)
            tile += 1

    def wait_for_header(self, tile: int) -> Tile | None:
        """`ForwardConsumer::WaitForHeader` in fwd_consumer.cuh."""
        self.wait(self.model.full_header, tile)
        self.read(self.model.headers, tile)
        return self.item(tile)

    @staticmethod
    def is_live(tile: Tile | None) -> bool:
        return tile is not None and tile.steps > 0

    def wait_for_first_operands(self, tile: int):
        """`ForwardConsumer::WaitForFirstOperands` in fwd_consumer.cuh."""
        self.wait(self.model.full_key, self.step)
        self.read(self.model.headers, tile)  # the parity of the queries
        self.wait(self.model.full_query, self.live + 1)
        if self.model.mistake == "queries are released when the next have come" and self.live >= 0:
            self.release(self.model.empty_query, self.live)

    def start_tile(self, tile: int):
        """`ForwardConsumer::StartTile`, `LoadQueries`, `StartDropout` and `FindKept` in fwd_consumer.cuh."""
        model = self.model
        self.tile, self.live, self.left = tile, self.live + 1, self.items[tile].steps - 1
        self.context = (("tiles", tile), ("steps", self.step + self.left))
        early = model.mistake == "queries are released before the last product that reads them"
        late = model.mistake == "queries are released when the next have come"
        if early:
            self.release(model.empty_query, self.live)
        if model.in_registers:
            self.read(model.query, self.live)
            if not early and not late:
                self.release(model.empty_query, self.live)
        self.read(model.steps, self.step)  # flags
        self.softmax()
        self.read(model.headers, tile)  # for dropout
        self.read(model.steps, self.step)  # the gates, for dropout
        self.step += 1

    def softmax(self):
        """`ForwardConsumer::Softmax`, `AddBias` and `ApplyMask` in fwd_consumer.cuh: behind the product; releases the
        keys."""
        model = self.model
        if model.helpers:
            self.read(model.biases[self.group], self.step)
            self.end_read(model.ramp[self.group], self.step)
        if model.mistake == "keys are released before the mask is read":
            self.release(model.empty_key, self.step)
            self.read(model.steps, self.step)
            self.end_read(model.key, self.step)
            return
        self.read(model.steps, self.step)
        self.end_read(model.key, self.step)
        self.release(model.empty_key, self.step)

    def catch_up(self):
        """`ForwardConsumer::CatchUp`, `AddLines`, `LoadOperands` and `KeepProbabilities` in fwd_consumer.cuh: the keys
        have been released."""
        self.read(self.model.steps, self.step)
        if self.model.helpers:
            self.read(self.model.biases[self.group], self.step)
        self.read(self.model.headers, self.tile)

    def begin_keys(self):
        self.begin_read(self.model.key, self.step)
        if self.model.helpers:
            self.begin_read(self.model.ramp[self.group], self.step)

    def release_values(self):
        self.end_read(self.model.value, self.step - 1)
        if self.model.mistake != "values are not released":
            self.release(self.model.empty_value, self.step - 1)

    def store_tile(self, tile: int):
        """`ForwardConsumer::StoreTile` and `NoteInexact` in fwd_consumer.cuh."""
        model = self.model
        if model.mistake == "headers are released before the tile is stored":
            self.release(model.empty_header, tile)
        self.read(model.headers, tile)
        self.write(model.inexact_tiles, 0)
        if model.mistake != "headers are released before the tile is stored":
            self.release(model.empty_header, tile)
        self.context = ()

    def take_turn(self):
        """`ForwardConsumer::TakeTurn` in fwd_consumer.cuh."""
        if self.model.consumers == 2:
            self.arrive(self.model.turn[self.group], self.turns, THREADS)
            extra = self.model.mistake == "a turn too many is waited for"
            self.wait(self.model.turn[self.group], self.turns + extra)
            self.turns += 1

    def pass_turn(self):
        """`ForwardConsumer::PassTurn` in fwd_consumer.cuh."""
        if self.model.consumers == 2:
            self.arrive(self.model.turn[1 - self.group], self.passed, THREADS)
            self.passed += 1

    def release(self, barriers: Barriers, use: int):
        """`ForwardConsumer::Release` in fwd_consumer.cuh."""
        self.arrive(barriers, use, WARPS)
