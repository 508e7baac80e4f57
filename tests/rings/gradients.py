"""The pipeline of the Hopper kernel for gradients of biases, csrc/attention/sm90/bias_gradient_*.cuh: a warp that looks
for tiles of pairs, one that loads, one that reads statistics, and two warpgroups.

An item is a message of the search: a `Pair`, or a slot to store. What the search keeps for itself is not modelled, nor
what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.rings.checker import Agent, Barriers, ItemAgent, Memory, Model, OutOfItems
from tests.rings.forward import MODELLED_WARPS, THREADS, WARPS
from tests.rings.sources import GRADIENTS, Constants

STORE = "store"  # without a tile of pairs


@dataclass(frozen=True)
class Pair:
    """A tile of pairs.

    Attributes:
      left: whether its queries are others than those of the tile before.
      right: likewise its keys.
      store: whether its slot is complete after it.
    """

    left: bool = True
    right: bool = True
    store: bool = False

    def __repr__(self):
        return (
            "".join(letter for letter, on in zip("qks", (self.left, self.right, self.store), strict=True) if on) or "-"
        )


# Seeded mistakes, and what the model must say of them. See `tests/test_rings.py`.
MISTAKES = (
    "the ring may fill behind the message that is held back",
    "operands are released while they are used again",
    "operands are not released where a slot follows",
    "statistics are written without waiting",
    "sums are read before both warpgroups have written them",
    "sides are released before they are read",
)


class Gradients(Model):
    """`BiasGradientShared` in bias_gradient_shared.cuh, and `BiasGradientKernel` in sm90/bias_gradient.cuh, for one
    `BiasGradientConfig`. `steps`: places for messages; fewer than the kernel's show the same in shorter sequences."""

    def __init__(self, dim: int, diagonals: bool, steps: int = 0, mistake: str = ""):
        assert not mistake or mistake in MISTAKES, mistake
        self.mistake, self.diagonals = mistake, diagonals
        self.constants = constants = Constants(GRADIENTS, "BiasGradientConfig", kDim=dim, kDiagonals=diagonals)

        def barriers(name: str, counter: str, size: int = 0) -> Barriers:
            return Barriers(name, constants.count(name), size or constants.size(name), counter)

        self.full_step = barriers("full_step", "messages", steps)
        self.empty_step = barriers("empty_step", "messages", steps)
        self.full_side, self.empty_side = barriers("full_side", "pairs"), barriers("empty_side", "pairs")
        self.full, self.empty = {}, {}
        for operand, counter in {"query": "lefts", "dout": "lefts", "key": "rights", "value": "rights"}.items():
            self.full[operand] = barriers(f"full_{operand}", counter)
            self.empty[operand] = barriers(f"empty_{operand}", counter)
        threads = 4 * 32
        self.own = [Barriers(f"own {g}", threads, 1, "syncs") for g in range(2)]
        self.both = Barriers("both", 2 * threads, 1, "syncs")

        self.steps = Memory("steps", self.full_step.size, "messages")
        self.bits = Memory("bits", self.full_side.size, "pairs")
        self.statistics = Memory("statistics", self.full_side.size, "pairs")
        self.operands = {name: Memory(name, full.size, full.counter) for name, full in self.full.items()}
        self.lines = [Memory(f"lines {g}", 1, "stores") for g in range(2)]
        self.sums = [Memory(f"sums {g}", 1, "stores") for g in range(2)]

    def agents(self, items: Sequence, ended: bool) -> Sequence[Agent]:
        agents: list[_GradientAgent] = [kind(self, items, ended) for kind in (_Search, _Loader, _Statistics)]
        agents += [_Consumer(self, items, ended, group, warp) for group in range(2) for warp in range(MODELLED_WARPS)]
        for agent in agents:
            agent.write_program()
        return agents

    def totals(self, items: Sequence) -> dict[str, int]:
        pairs = [(i, item) for i, item in enumerate(items) if item != STORE]
        stores = sum(item == STORE or item.store for item in items)
        return {
            "messages": len(items),
            "pairs": len(pairs),
            "lefts": sum(self.is_new(items, i)[0] for i, _ in pairs),
            "rights": sum(self.is_new(items, i)[1] for i, _ in pairs),
            "stores": stores,
            "syncs": 2 * stores,
        }

    def is_new(self, items: Sequence, number: int) -> tuple[bool, bool]:
        """Whether a tile's operands are loaded: also where no message is held back that may have the same."""
        if self.held(items, number) is None:
            return True, True
        return items[number].left, items[number].right

    def held(self, items: Sequence, number: int) -> int | None:
        """The tile that is held back when message `number` becomes known."""
        before = next((i for i in range(number - 1, -1, -1) if items[i] != STORE), None)
        return None if before is None or self.is_published(items, before, number) else before

    def is_published(self, items: Sequence, held: int, number: int) -> bool:
        """Whether what is held back is published by a slot to store before message `number`."""
        return held + 1 < number and (self.diagonals or number - 1 - held >= self.full_step.size - 1)


class _GradientAgent(ItemAgent):
    def write_program(self):
        try:
            self.run()
        except OutOfItems:
            held = self.model.held(self.items, len(self.items))
            self.context = ("no tile" if held is None else ("messages", held), "waits for an item")

    def messages(self) -> Iterator[tuple[int, Any]]:
        """How `PairLoader::Run` and `ReadPairStatistics` in bias_gradient_producer.cuh and `PairConsumer::Run` in
        bias_gradient_consumer.cuh get the messages before the end."""
        number = 0
        while True:
            self.wait(self.model.full_step, number)
            self.read(self.model.steps, number)
            item = self.item(number)
            if item is None:
                return
            yield number, item
            number += 1

    def is_last(self, number: int) -> tuple[bool, bool]:
        """Whether the next tile has other operands."""
        following = number + 1
        while self.item(following) == STORE:
            following += 1
            if self.model.is_published(self.items, number, following):
                return True, True
        return (True, True) if self.item(following) is None else self.model.is_new(self.items, following)


class _Search(_GradientAgent):
    def __init__(self, model: Gradients, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "search")
        self.held: int | None = None

    def run(self):
        """`PairSearch::Run`, `EmitLanes` and `Emit` in bias_gradient_producer.cuh."""
        number = 0
        while True:
            item = self.item(number)
            if item is None or item == STORE:
                self.emit_without_pairs(number, item is None)
                if item is None:
                    return
            else:
                self.publish_held()
                self.wait_for_place(number)
                self.held = number
            number += 1

    def emit_without_pairs(self, number: int, end: bool):
        """`PairSearch::EmitWithoutPairs` in bias_gradient_producer.cuh."""
        model = self.model
        full = self.held is not None and number - self.held >= model.full_step.size - 1
        if model.mistake == "the ring may fill behind the message that is held back":
            full = False
        if model.diagonals or end or full:
            self.publish_held()
        self.wait_for_place(number)
        self.arrive(model.full_step, number)

    def wait_for_place(self, number: int):
        """`PairSearch::WaitForPlace` in bias_gradient_producer.cuh."""
        self.wait(self.model.empty_step, number - self.model.empty_step.size)
        self.write(self.model.steps, number)

    def publish_held(self):
        """`PairSearch::PublishHeld` and `Publish` in bias_gradient_producer.cuh."""
        if self.held is not None:
            self.write(self.model.steps, self.held)  # its flags
            self.arrive(self.model.full_step, self.held)
        self.held = None


class _Loader(_GradientAgent):
    def __init__(self, model: Gradients, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "loader")
        self.side = 0
        self.uses = dict.fromkeys(model.full, 0)

    def run(self):
        """`PairLoader::Run` in bias_gradient_producer.cuh."""
        model = self.model
        for number, item in self.messages():
            if item != STORE:
                self.load_side()
                left, right = model.is_new(self.items, number)
                for operand in ("value", "key") if right else ():
                    self.load(operand)
                for operand in ("dout", "query") if left else ():
                    self.load(operand)
            self.read(model.steps, number)
            self.arrive(model.empty_step, number)

    def load_side(self):
        """`PairLoader::LoadSide` in bias_gradient_producer.cuh, with a bit tile."""
        model, side = self.model, self.side
        self.wait(model.empty_side, side - model.empty_side.size)
        self.expect(model.full_side, side)
        self.copy([(model.bits, side)], (model.full_side, side))
        self.arrive(model.full_side, side)
        self.side += 1

    def load(self, operand: str):
        """`PairLoader::Load` in bias_gradient_producer.cuh."""
        full, empty, use = self.model.full[operand], self.model.empty[operand], self.uses[operand]
        self.wait(empty, use - empty.size)
        self.expect(full, use)
        self.arrive(full, use)
        self.copy([(self.model.operands[operand], use)], (full, use))
        self.uses[operand] += 1


class _Statistics(_GradientAgent):
    def __init__(self, model: Gradients, items: Sequence, ended: bool):
        super().__init__(model, items, ended, "statistics")

    def run(self):
        """`ReadPairStatistics` in bias_gradient_producer.cuh."""
        model, side = self.model, 0
        for number, item in self.messages():
            if item != STORE:
                if model.mistake != "statistics are written without waiting":
                    self.wait(model.empty_side, side - model.empty_side.size)
                self.read(model.steps, number)
                self.write(model.statistics, side)
                self.arrive(model.full_side, side)
                side += 1
            self.arrive(model.empty_step, number)


class _Consumer(_GradientAgent):
    """A warp of a consumer warpgroup, `PairConsumer` in bias_gradient_consumer.cuh."""

    def __init__(self, model: Gradients, items: Sequence, ended: bool, group: int, warp: int):
        super().__init__(model, items, ended, f"consumer {group}.{warp}")
        self.group = group
        self.side = self.left = self.right = self.stored = 0

    def run(self):
        """`PairConsumer::Run` in bias_gradient_consumer.cuh."""
        model = self.model
        for number, item in self.messages():
            if item != STORE:
                self.add_tile(number)
            if item == STORE or item.store:
                self.read(model.steps, number)
                if model.diagonals:
                    self.store_diagonals()
            self.release(model.empty_step, number)

    def add_tile(self, number: int):
        """`PairConsumer::AddTile`, `StartLogits`, `FindKept` and `MakeScores` in bias_gradient_consumer.cuh."""
        model, side = self.model, self.side
        new_left, new_right = model.is_new(self.items, number)
        last_left, last_right = self.is_last(number)
        if model.mistake == "operands are released while they are used again":
            last_left = last_right = True
        if model.mistake == "operands are not released where a slot follows" and self.item(number + 1) == STORE:
            last_left = last_right = False
        self.left += new_left
        self.right += new_right
        uses = {"query": self.left - 1, "key": self.right - 1, "dout": self.left - 1, "value": self.right - 1}
        new = {"query": new_left, "key": new_right, "dout": new_left, "value": new_right}
        last = {"query": last_left, "key": last_right, "dout": last_left, "value": last_right}
        self.read(model.steps, number)
        for operand, use in uses.items():
            if new[operand]:
                self.wait(model.full[operand], use)
            self.begin_read(model.operands[operand], use)
        self.wait(model.full_side, side)
        for operand, use in uses.items():
            self.end_read(model.operands[operand], use)
        for operand in ("query", "dout", "key", "value"):
            if last[operand]:
                self.release(model.empty[operand], uses[operand])
        if model.mistake == "sides are released before they are read":
            self.release(model.empty_side, side)
        self.read(model.steps, number)
        self.read(model.statistics, side)
        self.read(model.bits, side)
        if model.mistake != "sides are released before they are read":
            self.release(model.empty_side, side)
        self.side += 1

    def store_diagonals(self):
        """`PairConsumer::StoreDiagonals` in bias_gradient_consumer.cuh, of one chunk: the barriers of the next are the
        same."""
        model, group, use = self.model, self.group, self.stored
        early = model.mistake == "sums are read before both warpgroups have written them"
        self.synchronise(model.own[group], 2 * use)
        self.write(model.lines[group], use)
        self.synchronise(model.own[group], 2 * use + 1)
        self.read(model.lines[group], use)
        self.write(model.sums[group], use)
        if not early:
            self.synchronise(model.both, 2 * use)
        for sums in model.sums:
            self.read(sums, use)
        self.synchronise(model.both, use if early else 2 * use + 1)
        self.stored += 1

    def synchronise(self, barriers: Barriers, use: int):
        """`SyncNamed` in device/ptx/barrier.cuh."""
        self.arrive(barriers, use, THREADS)
        self.wait(barriers, use)

    def release(self, barriers: Barriers, use: int):
        """`PairConsumer::Release` in bias_gradient_consumer.cuh."""
        self.arrive(barriers, use, WARPS)
