"""Checks a pipeline of agents that meet at barriers: for all interleavings at once, and for sequences of any length.

An agent is a warp, a thread, or several warps that do the same. What it does depends on the items it works on and on
nothing else, so it can be written down as a program: a list of waits, arrivals, copies, reads and writes. Waiting is
monotone: an operation that is possible stays possible. So a single run in any order decides whether some interleaving
hangs, and the order of happening before, which the run builds as it goes, decides everything else:

| finding            | what may happen |
|--------------------|-----------------|
| deadlock           | agents wait for each other, or for what never comes |
| early wait         | a wait begins while the phase before its own may be incomplete: it passes a phase early |
| overrun            | two phases may be complete before a waiter looks: it sees the old parity and waits on |
| misplaced arrival  | an arrival may count in the phase before the one it is meant for |
| extra arrival      | more arrivals than the barrier's count |
| overwritten        | a buffer may be written while it is still read, or while an older write is on its way |
| stale read         | a read may see what was there before, or half of what it wants |
| left open          | a read or a write is never over |
| outlives its CTA   | a copy or an arrival from elsewhere may land when all agents of the CTA have ended |

Barriers and buffers come in rings. Use number x of a ring of n has place x % n, and a phase of a barrier is the use of
its place; use x may begin when use x - n is over. Uses below zero are over from the start, as with the parity 1 that
`Ring::Empty` (csrc/device/ring.cuh) gives for a fresh barrier. A kernel waits for parities and the model for phases;
that they mean the same is what the findings "early wait" and "overrun" are about.

Sequences of any length: `explore` feeds items one by one and runs what can run. What matters of the past is then
little: what the agents have left to do, the phases the barriers are in, and which of the last accesses, arrivals and
waits surely happened before which. Written with numbers counted back from the totals, this state takes few values; a
sequence that leads to a known one need not be continued. Where the states run out, sequences of all lengths have been
checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

DEADLOCK = "deadlock"
EARLY_WAIT = "early wait"
OVERRUN = "overrun"
MISPLACED = "misplaced arrival"
EXTRA = "extra arrival"
OVERWRITTEN = "overwritten"
STALE = "stale read"
LEFT_OPEN = "left open"
OUTLIVES = "outlives its CTA"


@dataclass(frozen=True, eq=False)
class Barriers:
    """A ring of mbarriers, or of named barriers.

    Attributes:
      name: name in the sources.
      count: arrivals that complete a phase.
      size: places of the ring.
      counter: name of the total that its uses are counted by, see `Model.totals`.
      cta: number of the CTA whose shared memory holds it.
      stand_in: why an arrival may count for a late one of the phase before, provided that all arrivals of that phase
        have been issued; empty where it may not.
    """

    name: str
    count: int
    size: int
    counter: str
    cta: int = 0
    stand_in: str = ""


@dataclass(frozen=True, eq=False)
class Memory:
    """A ring of buffers; `counter` as for `Barriers`. Contents are (use, version): most have version 0 alone. Where
    the uses of two rings share a buffer, the version is the name of the counter that the use is counted by."""

    name: str
    size: int
    counter: str
    cta: int = 0


class OutOfItems(Exception):
    """An agent needs to know an item that the sequence does not have yet: its program goes on when it does."""


class Agent:
    """Writes the program of one agent.

    Subclasses mirror the functions of the kernels, line by line where something is waited for or released.
    """

    def __init__(self, name: str, cta: int = 0):
        self.name = name
        self.cta = cta
        self.program: list[tuple] = []
        self.context: tuple = ()  # what decides how the program goes on: (counter, number) or anything else

    # ---- Barriers
    def wait(self, barriers: Barriers, use: int):
        self.program.append(("wait", barriers, use))

    def arrive(self, barriers: Barriers, use: int, weight: int = 1):
        self.program.append(("arrive", barriers, use, weight))

    def send(self, arrivals: Iterable[tuple[Barriers, int]], weight: int = 1):
        """Arrivals of one instruction, in several CTAs: each lands whenever it does."""
        self.program.append(("send", tuple(arrivals), weight))

    def fence(self):
        """What this agent sent has landed."""
        self.program.append(("fence",))

    def expect(self, barriers: Barriers, use: int, copies: int = 1):
        """The phase waits for so many copies as well."""
        self.program.append(("expect", barriers, use, copies))

    # ---- Copies by the copy engine, which end whenever they do, and tell a barrier
    def copy(self, writes: Iterable[tuple], signal: tuple[Barriers, int], reads: Iterable[tuple] = ()):
        self.program.append(("copy", tuple(writes), signal, tuple(reads)))

    # ---- Buffers: an access is (memory, use) or (memory, use, version)
    def begin_read(self, memory: Memory, use: int, version: int | str = 0):
        self.program.append(("begin", "read", memory, use, version))

    def end_read(self, memory: Memory, use: int, version: int | str = 0):
        self.program.append(("end", "read", memory, use, version))

    def begin_write(self, memory: Memory, use: int, version: int | str = 0):
        self.program.append(("begin", "write", memory, use, version))

    def end_write(self, memory: Memory, use: int, version: int | str = 0):
        self.program.append(("end", "write", memory, use, version))

    def read(self, memory: Memory, use: int, version: int | str = 0):
        self.program.append(("access", "read", memory, use, version))

    def write(self, memory: Memory, use: int, version: int | str = 0):
        self.program.append(("access", "write", memory, use, version))

    # ---- Counters in global memory
    def add(self, counter):
        self.program.append(("add", counter))

    def wait_until(self, counter, value: int):
        self.program.append(("until", counter, value))


class ItemAgent(Agent):
    """An agent of a pipeline whose program follows the sequence of items.

    `ended`: whether the end follows the last of them, or it is not known yet what does.
    """

    def __init__(self, model: Any, items: Sequence, ended: bool, name: str, cta: int = 0):
        super().__init__(name, cta)
        self.model = model
        self.items = items
        self.ended = ended

    def run(self):
        raise NotImplementedError

    def item(self, number: int) -> Any:
        """The item of that number, None for the end."""
        if number < len(self.items):
            return self.items[number]
        if not self.ended:
            raise OutOfItems
        return None


class Model:
    """A pipeline. `agents` writes the programs for a sequence of items; `ended`: no item follows."""

    def agents(self, items: Sequence, ended: bool) -> Sequence[Agent]:
        raise NotImplementedError

    def totals(self, items: Sequence) -> dict[str, int]:
        """What the rings are counted by: how many of each the items take. States are written relative to them."""
        raise NotImplementedError

    def places(self, totals: dict[str, int]) -> tuple:
        """What of the totals themselves matters, because rings of different sizes share memory."""
        return ()


@dataclass(frozen=True)
class Finding:
    kind: str
    what: str
    items: tuple = ()

    def __str__(self):
        return f"{self.kind}: {self.what}; items {list(self.items)}"


@dataclass(slots=True)
class _Phase:
    """A phase that is not complete."""

    arrived: int = 0
    expected: int = 0
    landed: int = 0
    past: int = 0
    issued: list = field(default_factory=list)  # (weight, event) of the arrivals, where they may stand in

    def copy(self):
        return _Phase(self.arrived, self.expected, self.landed, self.past, list(self.issued))


@dataclass(slots=True)
class _Place:
    """A barrier of a ring: the last use that is complete, and those that are not."""

    latest: int
    event: int | None = None  # completion of the latest; None: all agents know of it
    before: int | None = None  # completion of the one before
    past: int = 0
    waiters: dict = field(default_factory=dict)  # agent: event, of waits for the latest
    issued: list = field(default_factory=list)  # of the latest
    phases: dict = field(default_factory=dict)  # use: _Phase

    def copy(self):
        phases = {use: phase.copy() for use, phase in self.phases.items()}
        return _Place(self.latest, self.event, self.before, self.past, dict(self.waiters), list(self.issued), phases)


@dataclass(slots=True)
class _Buffer:
    """A buffer: what it holds, and who wrote and read it: {accessor: [begun and not over, event of the last end]}."""

    token: tuple | None = None
    before: list = field(default_factory=list)  # (kind, accessor, event): accesses of the contents before
    write: dict = field(default_factory=dict)
    read: dict = field(default_factory=dict)

    def copy(self):
        write, read = ({key: list(x) for key, x in accesses.items()} for accesses in (self.write, self.read))
        return _Buffer(self.token, list(self.before), write, read)


_COPY = 1000  # accessors from here on are copies


class State:
    """How far a run has come. Events are bits, and the past of an event is the set of those that surely happened."""

    def __init__(self, agents: Sequence[Agent]):
        self.names = [agent.name for agent in agents]
        self.ctas = [agent.cta for agent in agents]
        self.at = [0] * len(agents)  # operations done
        self.past = [0] * len(agents)
        self.events = 0
        self.places: dict[tuple[Barriers, int], _Place] = {}
        self.buffers: dict[tuple[Memory, int], _Buffer] = {}
        self.counters: dict = {}  # (value, past)
        self.sent = [0] * len(agents)  # arrivals of each agent in other CTAs
        self.airborne: dict[int, list[int]] = {}  # CTA: events that have to happen in its lifetime
        self.findings: list[tuple[str, str]] = []

    def copy(self) -> State:
        other = State.__new__(State)
        other.names, other.ctas, other.events = self.names, self.ctas, self.events
        other.at, other.past = list(self.at), list(self.past)
        other.sent = list(self.sent)
        other.places = {key: place.copy() for key, place in self.places.items()}
        other.buffers = {key: buffer.copy() for key, buffer in self.buffers.items()}
        other.counters = dict(self.counters)
        other.airborne = {cta: list(events) for cta, events in self.airborne.items()}
        other.findings = list(self.findings)
        return other

    def run(self, agents: Sequence[Agent]):
        """Runs all programs as far as they go."""
        moved = True
        while moved:
            moved = False
            for number, agent in enumerate(agents):
                program, at = agent.program, self.at[number]
                start = at
                while at < len(program) and self._step(number, program[at]):
                    at += 1
                if at != start:
                    self.at[number] = at
                    moved = True

    def finish(self, agents: Sequence[Agent]):
        """Checks what must hold when all agents have ended."""
        stuck = [
            f"{agent.name} at {_describe(agent.program[at])}"
            for agent, at in zip(agents, self.at, strict=True)
            if at < len(agent.program)
        ]
        if stuck:
            self._report(DEADLOCK, "; ".join(stuck))
            return
        for (memory, _), buffer in self.buffers.items():
            if any(begun for accesses in (buffer.write, buffer.read) for begun, _ in accesses.values()):
                self._report(LEFT_OPEN, f"{memory.name} {buffer.token}")
        self._land()
        for cta, events in self.airborne.items():
            if events:
                self._report(OUTLIVES, f"CTA {cta}")

    # ---- Operations: False where the agent has to wait
    def _step(self, agent: int, operation: tuple) -> bool:
        kind = operation[0]
        if kind == "wait":
            return self._wait(agent, operation[1], operation[2])
        if kind == "access":
            _, access, memory, use, version = operation
            buffer = self._begin(access, None, self.past[agent], memory, use, version, self.names[agent])
            event = self._event()
            self.past[agent] |= 1 << event
            getattr(buffer, access).setdefault(agent, [0, None])[1] = event
        elif kind == "begin":
            _, access, memory, use, version = operation
            self._begin(access, agent, self.past[agent], memory, use, version, self.names[agent])
        elif kind == "end":
            _, access, memory, use, version = operation
            self._end(access, agent, memory, (use, version))
        elif kind == "arrive":
            _, barriers, use, weight = operation
            issued = self._event()
            self.past[agent] |= 1 << issued
            self._arrive(agent, barriers, use, weight, self.past[agent], issued)
        elif kind == "send":
            _, arrivals, weight = operation
            issued = self._event()
            self.past[agent] |= 1 << issued
            for barriers, use in arrivals:
                landed = self._event()
                if barriers.cta != self.ctas[agent]:
                    self.airborne.setdefault(barriers.cta, []).append(landed)
                    self.sent[agent] |= 1 << landed
                self._arrive(agent, barriers, use, weight, self.past[agent] | 1 << landed, issued)
        elif kind == "expect":
            _, barriers, use, copies = operation
            phase = self._phase(agent, barriers, use, self.past[agent])
            if phase is not None:
                phase.expected += copies
                phase.past |= self.past[agent]
        elif kind == "copy":
            self._copy(agent, *operation[1:])
        elif kind == "fence":
            self.past[agent] |= self.sent[agent]
        elif kind == "add":
            value, past = self.counters.get(operation[1], (0, 0))
            self.counters[operation[1]] = (value + 1, past | self.past[agent])
        else:
            value, past = self.counters.get(operation[1], (0, 0))
            if value < operation[2]:
                return False
            # More may have been added than is waited for: nothing is known then of the adders, in general.
            if value == operation[2]:
                self.past[agent] |= past
        return True

    def _wait(self, agent: int, barriers: Barriers, use: int) -> bool:
        place = self._place(barriers, use)
        if place.latest < use:
            return False
        past = self.past[agent]
        if place.latest > use:
            self._report(OVERRUN, f"{self.names[agent]} waits for {barriers.name} {use}")
        elif not _knows(past, place.before):
            self._report(EARLY_WAIT, f"{self.names[agent]} waits for {barriers.name} {use}")
        event = self._event()
        self.past[agent] = past | place.past | 1 << event
        place.waiters[agent] = event
        return True

    def _arrive(self, agent: int, barriers: Barriers, use: int, weight: int, past: int, issued: int):
        phase = self._phase(agent, barriers, use, past)
        if phase is None:
            return
        phase.arrived += weight
        phase.past |= past
        if barriers.stand_in:
            phase.issued.append((weight, issued))
        if phase.arrived > barriers.count:
            self._report(EXTRA, f"{self.names[agent]} at {barriers.name} {use}")
        self._complete(barriers, use)

    def _copy(self, agent: int, writes: tuple, signal: tuple, reads: tuple):
        event, past = self._event(), self.past[agent]
        name = f"copy by {self.names[agent]}"
        for access, accesses in (("write", writes), ("read", reads)):
            for memory, use, *version in accesses:
                token = (use, version[0] if version else 0)
                buffer = self._begin(access, None, past, memory, *token, name)
                getattr(buffer, access)[_COPY + len(getattr(buffer, access))] = [0, event]
        barriers, use = signal
        self.airborne.setdefault(barriers.cta, []).append(event)
        phase = self._phase(agent, barriers, use, past)
        if phase is not None:
            phase.landed += 1
            phase.past |= past | 1 << event
            self._complete(barriers, use)

    # ---- Barriers
    def _event(self) -> int:
        self.events += 1
        return self.events - 1

    def _place(self, barriers: Barriers, use: int) -> _Place:
        key = (barriers, use % barriers.size)
        place = self.places.get(key)
        if place is None:
            place = self.places[key] = _Place(use % barriers.size - barriers.size)
        return place

    def _phase(self, agent: int, barriers: Barriers, use: int, past: int) -> _Phase | None:
        """The phase that something is to count in; a finding where it may count in another."""
        place = self._place(barriers, use)
        if use <= place.latest:
            self._report(EXTRA, f"{self.names[agent]} at {barriers.name} {use}")
            return None
        before = use - barriers.size
        known = place.latest >= before and _knows(past, place.event)
        if not known and barriers.stand_in:
            known = self._issued(barriers, place, before, past)
        if not known:
            self._report(MISPLACED, f"{self.names[agent]} at {barriers.name} {use}")
        return place.phases.setdefault(use, _Phase())

    def _issued(self, barriers: Barriers, place: _Place, use: int, past: int) -> bool:
        """Whether all arrivals of a phase have surely been issued, and all phases before it are complete."""
        if use == place.latest:
            issued, earlier = place.issued, place.before
        elif use == place.latest + barriers.size and use in place.phases:
            issued, earlier = place.phases[use].issued, place.event
        else:
            return False
        certain = sum(weight for weight, event in issued if _knows(past, event))
        return certain == barriers.count and _knows(past, earlier)

    def _complete(self, barriers: Barriers, use: int):
        place = self._place(barriers, use)
        phase = place.phases.get(use)
        if (
            phase is None
            or use != place.latest + barriers.size
            or phase.arrived != barriers.count
            or phase.landed != phase.expected
        ):
            return
        event = self._event()
        past = phase.past | place.past
        for agent, waiter in place.waiters.items():
            if not _knows(past, waiter):
                self._report(OVERRUN, f"{self.names[agent]} waits for {barriers.name} {place.latest}")
        place.latest, place.before, place.event, place.past = use, place.event, event, past | 1 << event
        place.waiters, place.issued = {}, phase.issued
        del place.phases[use]
        self._complete(barriers, use + barriers.size)

    # ---- Buffers
    def _begin(self, access: str, agent: int | None, past: int, memory: Memory, use: int, version, name: str):
        key, token = (memory, use % memory.size), (use, version)
        buffer = self.buffers.get(key)
        if buffer is None:
            buffer = self.buffers[key] = _Buffer()
        what = f"{memory.name} {use} by {name}"
        if access == "write":
            if buffer.token != token:
                accesses = (("write", buffer.write), ("read", buffer.read))
                buffer.before = [
                    (kind, accessor, None if begun else event, begun)
                    for kind, those in accesses
                    for accessor, (begun, event) in those.items()
                ]
                buffer.token, buffer.write, buffer.read = token, {}, {}
            elif buffer.read:
                self._report(STALE, f"{what} is written when it may have been read")
            for _, _, event, begun in buffer.before:
                if begun or not _knows(past, event):
                    self._report(OVERWRITTEN, what)
        elif buffer.token != token:
            self._report(STALE, f"{what}, there is {buffer.token}")
        elif any(begun or not _knows(past, event) for begun, event in buffer.write.values()):
            self._report(STALE, what)
        if agent is not None:
            state = getattr(buffer, access).setdefault(agent, [0, None])
            state[0] += 1
        return buffer

    def _end(self, access: str, agent: int, memory: Memory, token: tuple):
        buffer = self.buffers[memory, token[0] % memory.size]
        event = self._event()
        self.past[agent] |= 1 << event
        state = getattr(buffer, access).get(agent)
        if buffer.token != token or state is None:
            self._report(OVERWRITTEN, f"{memory.name} {token[0]} while {self.names[agent]} has it")
            return
        state[0] -= 1
        state[1] = event

    def _land(self):
        """Forgets the copies and arrivals that some agent of their CTA surely outlives."""
        for cta, events in self.airborne.items():
            pasts = [past for past, home in zip(self.past, self.ctas, strict=True) if home == cta]
            self.airborne[cta] = [event for event in events if not any(_knows(past, event) for past in pasts)]

    def _report(self, kind: str, what: str):
        self.findings.append((kind, what))

    # ---- The state as something to compare
    def progress(self, agents: Sequence[Agent], totals: dict[str, int]) -> tuple:
        """What decides who can go on: what agents have left to do, and the phases of the barriers."""
        places = []
        for (barriers, _), place in self.places.items():
            phases = tuple(
                (use - place.latest, phase.arrived, phase.expected, phase.landed)
                for use, phase in sorted(place.phases.items())
            )
            places.append((barriers.name, barriers.cta, place.latest - totals[barriers.counter], phases))
        return (tuple(sorted(places)), tuple(self._left(agents, totals)))

    def _left(self, agents: Sequence[Agent], totals: dict[str, int]) -> Iterator[tuple[tuple, tuple]]:
        for agent, at in zip(agents, self.at, strict=True):
            context = tuple(x[1] - totals[x[0]] if isinstance(x, tuple) else x for x in agent.context)
            yield (context, tuple(_relative(operation, totals) for operation in agent.program[at:]))

    def normalise(self, agents: Sequence[Agent], totals: dict[str, int]) -> tuple:
        """Forgets what cannot matter any more, and returns all that can, with numbers counted back from the totals.

        What all agents know of needs no event, since whatever happens from now on happens after it.
        """
        self._land()
        known = ~0
        for past in self.past:
            known &= past
        order: dict[int, int] = {}  # events that may matter, in an order that depends on the state alone

        def rename(event: int | None) -> int | None:
            if event is None or known >> event & 1:
                return None
            return order.setdefault(event, len(order))

        places, buffers = [], []
        for (barriers, _), place in self.places.items():
            places.append((barriers.name, barriers.cta, place.latest - totals[barriers.counter], place))
        for (memory, _), buffer in self.buffers.items():
            assert buffer.token is not None  # it was written or read
            use, version = buffer.token
            total = totals[version] if isinstance(version, str) else totals[memory.counter]
            buffers.append((memory.name, memory.cta, str(version), use - total, buffer))
        places.sort(key=lambda x: x[:3])
        buffers.sort(key=lambda x: x[:4])

        key: list = []
        for name, cta, latest, place in places:
            place.event, place.before = rename(place.event), rename(place.before)
            renamed = ((agent, rename(event)) for agent, event in sorted(place.waiters.items()))
            place.waiters = {agent: event for agent, event in renamed if event is not None}
            place.issued = [(weight, rename(event)) for weight, event in place.issued]
            for phase in place.phases.values():
                phase.issued = [(weight, rename(event)) for weight, event in phase.issued]
            key.append(
                (name, cta, latest, place.event, place.before, tuple(place.waiters.items()), tuple(place.issued))
            )
        for name, cta, version, use, buffer in buffers:
            before = [(kind, who, rename(event), begun) for kind, who, event, begun in buffer.before]
            buffer.before = [x for x in before if x[2] is not None or x[3]]
            for accesses in (buffer.write, buffer.read):
                for state in accesses.values():
                    state[1] = rename(state[1])
            accesses = tuple(
                (who, begun, event) for those in (buffer.write, buffer.read) for who, (begun, event) in those.items()
            )
            key.append((name, cta, version, use, tuple(buffer.before), len(buffer.write), accesses))
        for cta, events in self.airborne.items():
            self.airborne[cta] = [order.setdefault(event, len(order)) for event in events]
            key.append((cta, len(events)))

        live = 0
        for event in order:
            live |= 1 << event

        everything = (1 << len(order)) - 1

        def forget(past: int) -> int:
            left = past & live
            most = 2 * left.bit_count() > len(order)  # then count what is missing
            left, result = (left ^ live, everything) if most else (left, 0)
            while left:
                low = left & -left
                result ^= 1 << order[low.bit_length() - 1]
                left ^= low
            return result

        for number in range(len(agents)):
            self.past[number], self.sent[number] = forget(self.past[number]), forget(self.sent[number])
        key += (*self.past, *self.sent, *self._left(agents, totals))
        for _, _, latest, place in places:
            place.past = forget(place.past)
            key.append(place.past)
            for use, phase in sorted(place.phases.items()):
                phase.past = forget(phase.past)
                key.append((use - place.latest + latest, phase.arrived, phase.expected, phase.landed, phase.past))
                key.append(tuple(phase.issued))
        self.events = len(order)
        return tuple(key)


def _knows(past: int, event: int | None) -> bool:
    return event is None or bool(past >> event & 1)


def _describe(operation: tuple) -> str:
    if operation[0] in ("wait", "arrive"):
        return f"{operation[0]} {operation[1].name} {operation[2]}"
    return str(operation)


def _relative(operation: tuple, totals: dict[str, int]) -> tuple:
    """An operation with its numbers counted back from the totals."""

    def barrier(barriers: Barriers, use: int):
        return (barriers.name, barriers.cta, use - totals[barriers.counter])

    def access(memory: Memory, use: int, version=0):
        total = totals[version] if isinstance(version, str) else totals[memory.counter]
        return (memory.name, memory.cta, use - total, version)

    kind = operation[0]
    if kind in ("wait", "arrive", "expect"):
        return (kind, *barrier(operation[1], operation[2]), *operation[3:])
    if kind == "send":
        return (kind, tuple(barrier(*x) for x in operation[1]), operation[2])
    if kind == "copy":
        _, writes, signal, reads = operation
        return (kind, tuple(access(*x) for x in writes), barrier(*signal), tuple(access(*x) for x in reads))
    if kind in ("access", "begin", "end"):
        return (kind, operation[1], *access(*operation[2:]))
    return operation


def check(model: Model, items: Sequence) -> list[Finding]:
    """Everything that can go wrong with one sequence of items."""
    agents = model.agents(items, True)
    state = State(agents)
    state.run(agents)
    state.finish(agents)
    return [Finding(kind, what, tuple(items)) for kind, what in dict.fromkeys(state.findings)]


@dataclass(frozen=True)
class Coverage:
    """What `explore` has seen.

    Attributes:
      states: states that differ.
      sequences: sequences that were run to their end: each leads to another state, or to a known one in another way.
      length: the longest of them.
      complete: whether sequences of all lengths are covered, and not only those up to `length`.
      findings: what was found, of the first sequence with a finding.
    """

    states: int
    sequences: int
    length: int
    complete: bool
    findings: tuple[Finding, ...] = ()


def explore(
    model: Model, alphabet: Sequence, length: int | None = None, states: int | None = None,
    order: bool = True, progress: Callable[[int, int], None] | None = None,
) -> Coverage:  # fmt: skip
    """Checks all sequences of items of the alphabet, shorter ones first, and stops at the first finding.

    What happens before what depends on more of the past than what hangs, and so takes more states. Without it, findings
    other than deadlocks are those of the sequences that are run, and not of all.

    Args:
      model: Model of the pipeline.
      alphabet: Items of which sequences are made.
      length: Length of the longest sequences; None: any.
      states: Number of states at which to give up; None: any.
      order: Whether states differ by what happened before what.
      progress: Called with each length and the number of states that differ so far.
    """
    agents = model.agents((), False)
    start = State(agents)
    start.run(agents)
    seen: set = set()
    layer = [((), start)]
    sequences, longest = 1, 0

    def findings(state: State, items: tuple) -> tuple[Finding, ...]:
        return tuple(Finding(kind, what, items) for kind, what in dict.fromkeys(state.findings))

    end = start.copy()
    end_agents = model.agents((), True)
    end.run(end_agents)
    end.finish(end_agents)
    if end.findings:
        return Coverage(1, 1, 0, False, findings(end, ()))
    while layer and (length is None or longest < length):
        longest += 1
        following = []
        for items, before in layer:
            for item in alphabet:
                if states is not None and len(seen) >= states:
                    return Coverage(len(seen), sequences, longest, False)
                longer = (*items, item)
                sequences += 1
                agents = model.agents(longer, False)
                state = before.copy()
                state.run(agents)
                if state.findings:
                    return Coverage(len(seen), sequences, longest, False, findings(state, longer))
                totals = model.totals(longer)
                if order:
                    key = (model.places(totals), state.normalise(agents, totals))
                else:
                    key = state.progress(agents, totals)
                if key in seen:
                    continue
                seen.add(key)
                end = state.copy()
                agents = model.agents(longer, True)
                end.run(agents)
                end.finish(agents)
                if end.findings:
                    return Coverage(len(seen), sequences, longest, False, findings(end, longer))
                following.append((longer, state))
        layer = following
        if progress is not None:
            progress(longest, len(seen))
    return Coverage(len(seen), sequences, longest, not layer)
