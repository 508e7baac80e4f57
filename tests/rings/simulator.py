"""Runs a model as a machine would: barriers that count and know a parity, and nothing of phases, in one random order.

It shares nothing with `checker.State` but the programs, and so checks both it and what it assumes: that a wait for the
parity of a phase is a wait for the phase, and an arrival counts where the model means it to. It finds little by itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from tests.rings.checker import DEADLOCK, OVERWRITTEN, STALE, Barriers, Memory, Model


class _Barrier:
    """An mbarrier: https://docs.nvidia.com/cuda/parallel-thread-execution/ says how arrivals and bytes are counted."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.copies = 0
        self.parity = 0  # of the phase that is not complete

    def arrive(self, weight: int):
        for _ in range(weight):  # one by one: the last of a phase may be followed by the first of the next
            self.pending -= 1
            self.check()

    def expect(self, copies: int):
        self.copies += copies
        self.check()

    def check(self):
        if self.pending == 0 and self.copies == 0:
            self.pending, self.parity = self.count, 1 - self.parity


class _Buffer:
    def __init__(self):
        self.holds: tuple | None = None
        self.readers = 0
        self.writers: list[tuple] = []  # what is being written


def simulate(model: Model, items: Sequence, seed: int) -> str:
    """The kind of the first finding of a random run, or nothing."""
    rng = random.Random(seed)
    agents = model.agents(items, True)
    at = [0] * len(agents)
    barriers: dict[tuple[Barriers, int], _Barrier] = {}
    buffers: dict[tuple[Memory, int], _Buffer] = {}
    counters: dict = {}
    flying: list[tuple[int, Callable[[], None]]] = []  # what lands later, and whose it is (copies: of nobody)
    found: list[str] = []
    slow = rng.random()  # how reluctantly things land

    def barrier(ring: Barriers, use: int) -> _Barrier:
        return barriers.setdefault((ring, use % ring.size), _Barrier(ring.count))

    def access(kind: str, memory: Memory, use: int, version: Any = 0) -> tuple[str, Memory, int, Any]:
        return kind, memory, use, version

    def begin(access: str, memory: Memory, use: int, version):
        buffer, token = buffers.setdefault((memory, use % memory.size), _Buffer()), (use, version)
        if access == "write":
            if buffer.readers or any(other != token for other in buffer.writers):
                found.append(OVERWRITTEN)
            buffer.writers.append(token)
            return
        if buffer.holds != token or buffer.writers:
            found.append(STALE)
        buffer.readers += 1

    def end(access: str, memory: Memory, use: int, version):
        buffer = buffers[memory, use % memory.size]
        if access == "write":
            buffer.writers.remove((use, version))
            buffer.holds = (use, version)
        else:
            buffer.readers -= 1

    def step(number: int) -> bool:
        operation = agents[number].program[at[number]]
        kind, *rest = operation
        if kind == "wait":
            ring, use = rest
            return barrier(ring, use).parity != use // ring.size & 1
        if kind == "arrive":
            barrier(rest[0], rest[1]).arrive(rest[2])
        elif kind == "send":
            for ring, use in rest[0]:
                flying.append((number, lambda ring=ring, use=use: barrier(ring, use).arrive(rest[1])))
        elif kind == "fence":
            return all(owner != number for owner, _ in flying)
        elif kind == "expect":
            barrier(rest[0], rest[1]).expect(rest[2])
        elif kind == "copy":
            writes, (ring, use), reads = rest
            accesses = [access("write", *x) for x in writes] + [access("read", *x) for x in reads]
            for each in accesses:
                begin(*each)

            def land():
                for each in accesses:
                    end(*each)
                barrier(ring, use).expect(-1)

            flying.append((-1, land))
        elif kind == "access":
            begin(*rest)
            end(*rest)
        elif kind in ("begin", "end"):
            (begin if kind == "begin" else end)(*rest)
        elif kind == "add":
            counters[rest[0]] = counters.get(rest[0], 0) + 1
        else:
            return counters.get(rest[0], 0) >= rest[1]
        return True

    while not found:
        able = [number for number, agent in enumerate(agents) if at[number] < len(agent.program)]
        if not able:
            break
        number = rng.choice(able)
        if flying and rng.random() > slow:
            flying.pop(rng.randrange(len(flying)))[1]()
            continue
        if step(number):
            at[number] += 1
            for _ in range(rng.choice((0, 0, 3, 30))):  # some are fast for a while
                if at[number] < len(agents[number].program) and not found and step(number):
                    at[number] += 1
                else:
                    break
        elif not flying:
            moved = next((x for x in able if step(x)), None)
            if moved is None:
                return DEADLOCK
            at[moved] += 1
        else:
            flying.pop(rng.randrange(len(flying)))[1]()
    return found[0] if found else ""
