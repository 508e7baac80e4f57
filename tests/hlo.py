"""What stands beside the attention calls in a compiled program: its text, read as a graph."""

from __future__ import annotations

import dataclasses
import functools
import re

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")
ATTENTION = 'custom_call_target="jax_bsk_attention_'


INLINED = ("call", "fusion", "async-start")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `operands` are names in the same computation, `called` names of computations."""

    computation: str
    name: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    index: int  # of a parameter or a tuple's element
    text: str

    @property
    def is_attention(self) -> bool:
        return ATTENTION in self.text

    @property
    def is_collective(self) -> bool:
        return self.opcode.startswith(COLLECTIVES)


class Program:
    """A compiled program's computations and how values flow between them."""

    def __init__(self, compiled):
        self.instructions: dict[tuple[str, str], Instruction] = {}
        self.roots: dict[str, Instruction] = {}
        self.callers: dict[str, list[Instruction]] = {}
        computation = ""
        for line in compiled.as_text().splitlines():
            if header := re.match(r"(?:ENTRY )?%([\w.\-]+) .*\{$", line):
                computation = header[1]
            elif found := re.match(r"\s+(ROOT )?%([\w.\-]+) = (.*)", line):
                self._add(computation, *found.groups())

    def _add(self, computation: str, root: str | None, name: str, text: str) -> None:
        start = re.search(r" ([a-z][\w-]*)\(", " " + text)
        assert start, text
        depth, end = 1, start.end() - 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        inside, after = text[start.end() - 1 : end - 1], text[end:]
        called = re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", after)
        index = inside if start[1] == "parameter" else (re.findall(r"\bindex=(\d+)", after) or ["0"])[0]
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
        one = Instruction(computation, name, start[1], operands, tuple(called), int(index), text)
        self.instructions[computation, name] = one
        if root:
            self.roots[computation] = one
        for callee in called:
            self.callers.setdefault(callee, []).append(one)

    def has_product(self, one: Instruction) -> bool:
        """Whether it is a matrix product, or a fusion or a library call that holds one."""
        if one.opcode in ("dot", "convolution") or (one.opcode == "custom-call" and not one.is_attention):
            return True
        inside = [i for i in self.instructions.values() if i.computation in one.called]
        return one.opcode in INLINED[1:] and any(self.has_product(i) for i in inside)

    @functools.cache  # noqa: B019  (a program lives as long as its test)
    def sources(self, one: Instruction, element: int | None = None) -> frozenset[Instruction]:
        """The attention calls and collectives that a value comes from with no matrix product between.

        `element` of a tuple, where one is asked for. Looks through calls in both directions: on a GPU, XLA puts what a
        CUDA graph launches in a computation of its own.
        """
        if one.is_attention or one.is_collective:
            return frozenset([one])
        if self.has_product(one):
            return frozenset()
        if one.opcode == "parameter":
            callers = [c for c in self.callers.get(one.computation, []) if c.opcode in INLINED]
            return self._union((self._operand(c, one.index), element) for c in callers)
        if one.opcode in INLINED:
            return self.sources(self.roots[one.called[0]], element)
        if one.opcode == "get-tuple-element":
            return self.sources(self._operand(one, 0), one.index)
        if one.opcode == "tuple" and element is not None:
            return self.sources(self._operand(one, element))
        return self._union((self._operand(one, i), None) for i in range(len(one.operands)))

    def _operand(self, one: Instruction, number: int) -> Instruction:
        return self.instructions[one.computation, one.operands[number]]

    def _union(self, pairs) -> frozenset[Instruction]:
        return frozenset().union(*(self.sources(*pair) for pair in pairs))

    def beside_attention(self) -> list[str]:
        """Collectives that feed an attention call, or take what one made, with no matrix product between."""
        attention = [i for i in self.instructions.values() if i.is_attention]
        assert attention, "no attention call in the program"
        found = set()
        for one in self.instructions.values():
            if one.is_attention or one.is_collective:
                operands = [self._operand(one, i) for i in range(len(one.operands))]
                sources = self._union((operand, None) for operand in operands)
                if one.is_attention:
                    found |= {f"{s.opcode} -> attention" for s in sources if s.is_collective}
                else:
                    found |= {f"attention -> {one.opcode}" for s in sources if s.is_attention}
        return sorted(found)
