"""The pipelines of the Hopper products, csrc/matmul/sm90: clusters of two CTAs (BSR x dense), and CTAs alone (sampled).

An item is a tile as a cluster or a CTA meets it: what its blocks are of use for, one after the other.

Not modelled: what is computed; results of 32-bit words, which registers write; initialisation, which a barrier of the
whole cluster divides from all else.

The preparation of lists and plans (csrc/lists/*.cu, csrc/matmul/plan.cu, csrc/attention/prepare.cu) needs no model: it
has no rings, and its warps meet at __syncthreads() alone. None of these may hang, because all threads of a CTA come to
the same ones: the loops and branches around them depend on kernel parameters, on block indices, and on what a
__syncthreads() before has made the same for all. Warp votes have full masks, and are in branches that a warp takes as
a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from tests.rings.checker import Agent, Barriers, ItemAgent, Memory, Model, OutOfItems
from tests.rings.sources import PRODUCTS, Constants

MODELLED_WARPS = 2  # of a warpgroup's four: each stands for two of them, and arrives for both
WARPS = 4 // MODELLED_WARPS
THREADS = 32 * WARPS

# Why a warp's release of a stage may count for another's of the phase before (see `Consumer::Release` in
# csrc/matmul/sm90/consumer.cuh).
STAND_IN = """A warp issues its arrivals in both CTAs together, behind its last read of the stage. Where a stage has
nothing from the other CTA's producer, a warp may be a phase ahead in the other CTA, and its arrival there may land
before a late one of the phase before. But that one has been issued: this CTA's stage was free only when its twin had
landed here. So the phase it stands in for completes behind the last reads all the same, and the late one then counts in
its place."""

ROWS, PAIRS, SAMPLED, SAMPLED_64 = "rows", "pairs", "sampled", "sampled, blocks of 64 rows"

MISTAKES = (
    "stages are released to the own CTA alone",
    "stages are released to the own CTA alone, and counted so",
    "the arrivals of a release are divided",
    "work indices are taken without waiting",
    "stages of no use are not released",
    "stages are released when the next product has been issued",
    "no CTA waits for the other in the end",
    "staging is written before it has left",
    "results are not waited for",
    "arrivals may not stand in",
)


class Products(Model):
    """`Shared` in matmul/sm90/shared.cuh, `ProductKernel` in product.cuh and `SampledKernel` in sampled.cuh.

    Args:
      kind: ROWS (blocks of 128 rows), PAIRS (two of 64), SAMPLED or SAMPLED_64.
      steps: stages of a block: its columns / 64; for a sampled item 1.
      mistake: Seeded mistake, one of MISTAKES.

    Items are tuples of masks, one for each block of the tile in the order of their columns: bit w is set if the block
    is of use to warpgroup w. Of ROWS all masks are 3. The empty tuple is a tile without blocks. Masks of a sampled item
    are its steps.
    """

    def __init__(self, kind: str, steps: int = 1, mistake: str = ""):
        assert not mistake or mistake in MISTAKES, mistake
        self.kind, self.steps, self.mistake = kind, steps, mistake
        self.sampled = kind in (SAMPLED, SAMPLED_64)
        self.halves = 1 if kind == SAMPLED_64 else 2  # of a tile, in which it leaves
        self.skips = kind == PAIRS
        constants = Constants(PRODUCTS)
        self.cluster = 1 if self.sampled else constants["kProductCluster"]
        constants.values["cluster"] = self.cluster
        self.lead, self.flush_at = constants["kWorkLead"], constants["kFlushAt"]
        assert constants["kConsumers"] == 2
        self.stages = stages = constants.size("full")
        assert stages == constants["kStages"]
        releases = constants.count("empty")
        if mistake == "stages are released to the own CTA alone, and counted so":
            releases //= self.cluster
        stand_in = "" if mistake == "arrivals may not stand in" or self.cluster == 1 else STAND_IN

        ctas = range(self.cluster)
        self.full = [Barriers("full", constants.count("full"), stages, "stages", cta) for cta in ctas]
        self.empty = [Barriers("empty", releases, stages, "stages", cta, stand_in) for cta in ctas]
        self.full_task = [Barriers("full_task", constants.count("full_task"), 1, "tasks", cta) for cta in ctas]
        self.empty_task = Barriers("empty_task", constants.count("empty_task"), 1, "tasks")
        self.epilogue = [[Barriers(f"epilogue {w}", 128, 1, "syncs", cta) for w in range(2)] for cta in ctas]
        agents = (1 + 2 * MODELLED_WARPS) * self.cluster + (self.cluster > 1)
        self.exit = Barriers("cluster", agents, 1, "none")
        self.messages = [Memory("messages", stages, "stages", cta) for cta in ctas]
        self.left = [[Memory(f"left {w}", stages, "stages", cta) for w in range(2)] for cta in ctas]
        self.right = [Memory("right", stages, "stages", cta) for cta in ctas]
        self.staging = [[Memory(f"staging {w}", 1, "halves", cta) for w in range(2)] for cta in ctas]
        self.task = [Memory("task", 1, "tasks", cta) for cta in ctas]

    def agents(self, items: Sequence, ended: bool) -> Sequence[Agent]:
        agents: list[_ProductAgent] = [_Scheduler(self, items, ended)] if self.cluster > 1 else []
        for cta in range(self.cluster):
            agents.append((_SampledProducer if self.sampled else _Producer)(self, items, ended, cta))
            agents += [
                _Consumer(self, items, ended, cta, warpgroup, warp)
                for warpgroup in range(2)
                for warp in range(MODELLED_WARPS)
            ]
        for agent in agents:
            agent.write_program()
        return agents

    def totals(self, items: Sequence) -> dict[str, int]:
        return {
            "stages": sum(len(self.masks(tile)) for tile in items),
            "tasks": len(items),
            "syncs": 2 * self.halves * len(items),
            "halves": self.halves * len(items),
            "none": 0,
        }

    def masks(self, tile: tuple[int, ...]) -> list[int]:
        """Of the stages of a tile: one that is of no use where there is no block."""
        return [mask for mask in tile for _ in range(self.steps)] or [0]


class _ProductAgent(ItemAgent):
    def __init__(self, model: Products, items: Sequence, ended: bool, cta: int, name: str):
        super().__init__(model, items, ended, f"{name} of CTA {cta}", cta)

    def write_program(self):
        try:
            self.run()
        except OutOfItems:
            return
        if self.model.cluster > 1 and self.model.mistake != "no CTA waits for the other in the end":
            self.sync_cluster()

    def sync_cluster(self):
        """`SyncCluster` in ptx/cluster.cuh, at the end of `ProductKernel` in product.cuh: a release, so that arrivals
        in the other CTA have landed."""
        self.fence()
        self.arrive(self.model.exit, 0)
        self.wait(self.model.exit, 0)


class _Scheduler(_ProductAgent):
    def __init__(self, model: Products, items: Sequence, ended: bool):
        super().__init__(model, items, ended, 0, "scheduler")

    def run(self):
        """`ScheduleProduct` in product.cuh, and `SendWord` in ptx/cluster.cuh."""
        model, number = self.model, 0
        while True:
            if model.mistake != "work indices are taken without waiting":
                self.wait(model.empty_task, number - 1)
            tile = self.item(number)
            for cta in range(model.cluster):
                self.write(model.task[cta], number)
                self.send([(model.full_task[cta], number)])
            if tile is None:
                return
            number += 1


class _Producer(_ProductAgent):
    def __init__(self, model: Products, items: Sequence, ended: bool, cta: int):
        super().__init__(model, items, ended, cta, "producer")
        self.stage = 0
        self.asked = False

    def run(self):
        """`ProductProducer::Run` in product.cuh, and `WaitForWord` in ptx/cluster.cuh."""
        model, number = self.model, 0
        while True:
            self.wait(model.full_task[self.cta], number)
            self.read(model.task[self.cta], number)
            tile = self.item(number)
            if tile is None:
                break
            self.load(tile, number)
            number += 1
        self.announce(copies=0)

    def load(self, tile: tuple[int, ...], number: int):
        """`ProductProducer::Load` in product.cuh."""
        model = self.model
        self.asked = False
        for at, mask in enumerate(tile or (0,)):
            behind = tile[at + 1 :]  # the first of each list is at hand, the others are to come
            lists = [sum(other >> w & 1 for other in behind) for w in range(2)]
            last = not behind
            if not self.asked and (last or max(0, max(lists) - 1) * model.steps < model.lead):
                self.send([(model.empty_task, number)])
                self.asked = True
            for _ in range(model.steps if mask else 1):
                self.announce(copies=mask.bit_count() + 1 if mask else 0)
                if mask:
                    self.load_stage(mask)
                self.stage += 1

    def load_stage(self, mask: int):
        """`ProductProducer::LoadBlock`, `LoadDense` and `Mine` in product.cuh: each CTA fetches one warpgroup's blocks
        for both."""
        model, cta = self.model, self.cta
        for warpgroup in range(2):
            if mask >> warpgroup & 1 and warpgroup % model.cluster == cta:
                for other in range(model.cluster):
                    self.copy([(model.left[other][warpgroup], self.stage)], (model.full[other], self.stage))
        self.copy([(model.right[cta], self.stage)], (model.full[cta], self.stage))

    def announce(self, copies: int):
        """`Shared::Announce` in matmul/sm90/shared.cuh."""
        model, cta = self.model, self.cta
        self.wait(model.empty[cta], self.stage - model.stages)
        self.write(model.messages[cta], self.stage)
        if copies > 0:
            self.expect(model.full[cta], self.stage, copies)
        self.arrive(model.full[cta], self.stage)


class _SampledProducer(_Producer):
    def run(self):
        """`SampledProducer::Run` in sampled.cuh: who gets which item needs no counter."""
        number = 0
        while (tile := self.item(number)) is not None:
            self.load(tile, number)
            number += 1
        self.announce(copies=0)

    def load(self, tile: tuple[int, ...], number: int):
        """`SampledProducer::Load` in sampled.cuh."""
        model = self.model
        for mask in tile or (0,):
            self.announce(copies=1 if mask else 0)
            if mask:
                writes = [(memory, self.stage) for memory in (*model.left[0], model.right[0])]
                self.copy(writes, (model.full[0], self.stage))
            self.stage += 1


class _Consumer(_ProductAgent):
    """A warp of a consumer warpgroup, `Consumer` in matmul/sm90/consumer.cuh, with its `Epilogue` in epilogue.cuh."""

    def __init__(self, model: Products, items: Sequence, ended: bool, cta: int, warpgroup: int, warp: int):
        super().__init__(model, items, ended, cta, f"consumer {warpgroup}.{warp}")
        self.warpgroup, self.warp = warpgroup, warp
        self.stage = 0
        self.keeps = False
        self.syncs = self.sends = 0
        self.late: tuple | None = None  # an arrival, for a mistake

    def run(self):
        """`Consumer::Run` in matmul/sm90/consumer.cuh."""
        number = 0
        while True:
            self.context = (self.keeps, self.late is not None)
            self.next()
            tile = self.item(number)
            if tile is None:
                break
            masks = self.model.masks(tile)
            used = [bool(mask >> self.warpgroup & 1) for mask in masks]
            if self.model.skips:
                self.multiply_some(used)
            else:
                self.multiply_all(len(masks), used[0])
            self.take()
            number += 1
        self.finish()

    def multiply_some(self, used: list[bool]):
        """The first branch of `Consumer::Run` in matmul/sm90/consumer.cuh: a stage may be of use to one warpgroup."""
        for i, use in enumerate(used):
            stage = self.stage - 1 if i == 0 else self.next()
            if use:
                self.begin_product(stage)
                self.end_product(stage)
            if use or self.model.mistake != "stages of no use are not released":
                self.release(stage)
            if i + 1 == self.model.flush_at:
                self.flush()

    def multiply_all(self, stages: int, used: bool):
        """The second branch of `Consumer::Run` in matmul/sm90/consumer.cuh: one product may be unfinished."""
        pending = self.stage - 1
        if used:
            self.begin_product(pending)
            for i in range(1, stages):
                stage = self.next()
                self.begin_product(stage)
                early = self.model.mistake == "stages are released when the next product has been issued"
                if early:
                    self.release(pending)
                self.end_product(pending)
                if not early:
                    self.release(pending)
                pending = stage
                if i == self.model.flush_at:
                    self.flush()
            self.end_product(pending)
        if used or self.model.mistake != "stages of no use are not released":
            self.release(pending)

    def next(self) -> int:
        """`Consumer::Next` in matmul/sm90/consumer.cuh."""
        self.wait(self.model.full[self.cta], self.stage)
        self.read(self.model.messages[self.cta], self.stage)
        self.stage += 1
        return self.stage - 1

    def operands(self) -> list[Memory]:
        left = self.model.left[self.cta]
        return [*(left if self.model.sampled else [left[self.warpgroup]]), self.model.right[self.cta]]

    def begin_product(self, stage: int):
        """`Consumer::MultiplyStage` in matmul/sm90/consumer.cuh."""
        for memory in self.operands():
            self.begin_read(memory, stage)

    def end_product(self, stage: int):
        for memory in self.operands():
            self.end_read(memory, stage)

    def release(self, stage: int):
        """`Consumer::Release` in matmul/sm90/consumer.cuh: in both CTAs, by one instruction."""
        own, others = self.model.empty[self.cta], [x for x in self.model.empty if x.cta != self.cta]
        if not others:
            self.arrive(own, stage, WARPS)
        elif self.model.mistake == "the arrivals of a release are divided":
            self.arrive(own, stage, WARPS)
            if self.late is not None:
                self.send([self.late], WARPS)
            self.late = (others[0], stage)
        elif "own CTA alone" in self.model.mistake:
            self.arrive(own, stage, WARPS)
        else:
            self.send([(own, stage), *((other, stage) for other in others)], WARPS)

    # ---- The epilogue

    def take(self):
        """`Epilogue::Take` in epilogue.cuh."""
        self.flush()
        self.send_half()
        self.keeps = self.model.halves == 2

    def flush(self):
        """`Epilogue::Flush` in epilogue.cuh."""
        if self.keeps:
            self.send_half()
        self.keeps = False

    def finish(self):
        """`Epilogue::Finish` in epilogue.cuh."""
        self.flush()
        if self.warp == 0 and self.sends > 0 and self.model.mistake != "results are not waited for":
            self.end_read(self.model.staging[self.cta][self.warpgroup], self.sends - 1)

    def send_half(self):
        """`Epilogue::Send` in epilogue.cuh: thread 0 has the copy engine read what all have written."""
        staging = self.model.staging[self.cta][self.warpgroup]
        waits = self.model.mistake != "staging is written before it has left"
        if self.warp == 0 and self.sends > 0 and waits:
            self.end_read(staging, self.sends - 1)
        self.sync()
        self.write(staging, self.sends)
        self.sync()
        if self.warp == 0:
            if self.sends > 0 and not waits:
                self.end_read(staging, self.sends - 1)
            self.begin_read(staging, self.sends)
        self.sends += 1

    def sync(self):
        """`SyncNamed` in ptx/barrier.cuh."""
        barrier = self.model.epilogue[self.cta][self.warpgroup]
        self.arrive(barrier, self.syncs, THREADS)
        self.wait(barrier, self.syncs)
        self.syncs += 1
