"""The pipeline of the Hopper product of few columns, csrc/matmul/sm90/narrow.cuh: a cluster with one tile.

An item is the next stage of each CTA's part: COPIED, WRONG (its entry makes no sense, and nothing is copied) or None
where the part has ended before the others'.

Not modelled: what is computed; the prefetch of the lists; initialisation, which __syncthreads() divides from all else,
because no CTA signals another one's barriers.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.rings.checker import Agent, Barriers, ItemAgent, Memory, Model
from tests.rings.sources import NARROW, Constants

MODELLED_WARPS = 2  # of the four consumers: each stands for two of them, and arrives for both
WARPS = 4 // MODELLED_WARPS
CLUSTER = 2  # CTAs

COPIED, WRONG = "copied", "wrong"
Item = tuple[str | None, ...]  # a stage for each CTA

MISTAKES = (
    "stages of wrong entries are not passed on",
    "stages are released before they are multiplied",
    "sums are written before all warps have multiplied",
    "no CTA waits for the others' sums",
    "CTAs end while others read their sums",
)


class Narrow(Model):
    """`NarrowShared` in matmul/sm90/narrow.cuh and `NarrowKernel` in matmul/sm90/narrow.cuh.

    The sums lie over the stages, from the first on. `blocks` stands for both arrays of a stage.

    Args:
      columns: of a tile.
      mistake: Seeded mistake, one of MISTAKES.
    """

    def __init__(self, columns: int, mistake: str = ""):
        assert not mistake or mistake in MISTAKES, mistake
        self.mistake = mistake
        constants = Constants(NARROW, kColumns_=columns)
        assert constants["kNarrowConsumers"] == MODELLED_WARPS * WARPS
        assert constants["kNarrowParts"] == CLUSTER
        self.stages = stages = constants.size("full")
        ctas = range(CLUSTER)
        self.full = [Barriers("full", constants.count("full"), stages, _stages(cta), cta) for cta in ctas]
        self.empty = [Barriers("empty", constants.count("empty"), stages, _stages(cta), cta) for cta in ctas]
        self.sync = [Barriers("consumers", 32 * 4, 1, "none", cta) for cta in ctas]
        self.cluster = Barriers("cluster", (1 + MODELLED_WARPS) * CLUSTER, 1, "none")
        self.blocks = [Memory("blocks", stages, _stages(cta), cta) for cta in ctas]
        self.poisoned = [Memory("poisoned", 1, "none", cta) for cta in ctas]

    def agents(self, items: Sequence, ended: bool) -> Sequence[Agent]:
        agents: list[_NarrowAgent] = []
        for cta in range(CLUSTER):
            agents.append(_Producer(self, items, ended, f"producer of CTA {cta}", cta))
            agents += [
                _Consumer(self, items, ended, f"consumer {warp} of CTA {cta}", cta) for warp in range(MODELLED_WARPS)
            ]
        for agent in agents:
            agent.run()
        return agents

    def totals(self, items: Sequence) -> dict[str, int]:
        found = {_stages(cta): sum(item[cta] is not None for item in items) for cta in range(CLUSTER)}
        return {**found, "none": 0}

    def places(self, totals: dict[str, int]) -> tuple:
        return tuple(totals[_stages(cta)] % self.stages for cta in range(CLUSTER))


def _stages(cta: int) -> str:
    return f"stages {cta}"


class _NarrowAgent(ItemAgent):
    def own(self) -> list[str]:
        """The stages of this CTA's part that are known."""
        return [item[self.cta] for item in self.items if item[self.cta] is not None]

    def sums(self, cta: int) -> list[tuple[Memory, int, str]]:
        """Where a CTA's sums lie: all places of its ring."""
        count, stages = sum(item[cta] is not None for item in self.items), self.model.stages
        first = -(-count // stages) * stages
        return [(self.model.blocks[cta], first + place, "sums") for place in range(stages)]

    def meet(self, time: int):
        """`SyncCluster` in ptx/cluster.cuh."""
        self.fence()
        self.arrive(self.model.cluster, time)
        self.wait(self.model.cluster, time)

    def end(self):
        if self.model.mistake != "CTAs end while others read their sums":
            self.meet(1)


class _Producer(_NarrowAgent):
    def run(self):
        """`ProduceNarrow` and `NarrowKernel` in matmul/sm90/narrow.cuh."""
        model, cta = self.model, self.cta
        for stage, kind in enumerate(self.own()):
            if kind == WRONG and model.mistake == "stages of wrong entries are not passed on":
                continue
            self.wait(model.empty[cta], stage - model.stages)
            if kind == COPIED:
                self.expect(model.full[cta], stage)
            self.arrive(model.full[cta], stage)
            if kind == COPIED:
                self.copy([(model.blocks[cta], stage)], (model.full[cta], stage))
        if not self.ended:
            return
        self.write(model.poisoned[cta], 0)
        self.meet(0)
        self.end()
        # What has the multiprocessor next writes into the same memory.
        for memory, use, _ in self.sums(cta):
            self.write(memory, use + model.stages)


class _Consumer(_NarrowAgent):
    def run(self):
        """`NarrowConsumer::Run`, `NarrowConsumer::MultiplyStage` and `NarrowKernel` in matmul/sm90/narrow.cuh."""
        model, cta = self.model, self.cta
        for stage, kind in enumerate(self.own()):
            self.wait(model.full[cta], stage)
            early = model.mistake == "stages are released before they are multiplied"
            if early:
                self.release(stage)
            if kind == COPIED:  # what lies in the stage of a wrong entry is of no matter
                self.read(model.blocks[cta], stage)
            if not early:
                self.release(stage)
        if not self.ended:
            return
        self.leave()
        if model.mistake != "no CTA waits for the others' sums":
            self.meet(0)
        self.merge()
        self.end()

    def release(self, stage: int):
        """`ReleaseForWarp` in device/ring.cuh."""
        self.arrive(self.model.empty[self.cta], stage, WARPS)

    def leave(self):
        """`NarrowConsumer::Leave` in matmul/sm90/narrow.cuh, with what stands before it in `NarrowConsumer::Run` in
        matmul/sm90/narrow.cuh."""
        if self.model.mistake != "sums are written before all warps have multiplied":
            self.arrive(self.model.sync[self.cta], 0, 32 * WARPS)
            self.wait(self.model.sync[self.cta], 0)
        for memory, use, version in self.sums(self.cta):
            self.write(memory, use, version)

    def merge(self):
        """`NarrowConsumer::Merge` in matmul/sm90/narrow.cuh."""
        for cta in range(CLUSTER):
            self.read(self.model.poisoned[cta], 0)
        for cta in range(CLUSTER):
            for memory, use, version in self.sums(cta):
                self.read(memory, use, version)
