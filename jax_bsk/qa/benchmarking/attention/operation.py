"""Attention as an operation of the suite: its operands, contenders and references."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

from jax_bsk.qa.benchmarking.attention import ours, peers, tables
from jax_bsk.qa.benchmarking.attention.cases import Case
from jax_bsk.qa.benchmarking.attention.gradients import GradientReferences
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.passes import Pass
from jax_bsk.qa.benchmarking.attention.references import References, choose_spots
from jax_bsk.qa.benchmarking.check import Reference
from jax_bsk.qa.benchmarking.contender import OURS, Contender
from jax_bsk.qa.benchmarking.suite import Maker, Operation


class Attention(Operation):
    """`sparse_attention` of one implementation, with its peers or alone.

    A first call compiles here, so that it says nothing of how long a call takes: none is left out for it.
    """

    whole = False  # whether all rows of short sequences are checked
    ahead = False  # whether jax_bsk's program is compiled ahead, which tells its scratch memory

    def __init__(self, implementation: str | None, *, with_peers: bool):
        self.implementation, self._with_peers = implementation, with_peers

    def key(self, case: Case) -> Hashable:
        return case.shape, case.kv_shape, case.dtype, case.measured

    def operands(self, case: Case, seed: int) -> Inputs:
        return Inputs(case, seed)

    def makers(self, case: Case) -> Mapping[str, Maker]:
        mine: dict[str, Maker] = {OURS: self._ours}
        return mine | dict(self.peers(case))

    def _ours(self, case: Case, inputs: Inputs) -> Contender:
        return ours.make(case, inputs, self.implementation, ahead=self.ahead)

    def peers(self, case: Case) -> Iterator[tuple[str, Maker]]:
        """Name and maker of every peer that may take part."""
        return peers.offers(case) if self._with_peers else iter(())

    def references(self, case: Case, operands: Inputs, seed: int) -> Callable[[Contender], dict[str, Reference]]:
        spots = choose_spots(case, seed, whole=self.whole)
        out = References(case, operands, spots) if "out" in case.measured.results else None
        gradients = None if case.measured is Pass.FORWARD else GradientReferences(case, operands, spots)

        def of(contender: Contender) -> dict[str, Reference]:
            pattern = case.pattern if contender.instead is None else contender.instead
            found = {} if out is None else {"out": out.of(pattern)}
            return found if gradients is None else found | gradients.of(pattern)

        return of

    def record(self, case: Case, found: dict[str, dict[str, Any]] | None, reason: str = "") -> dict[str, Any]:
        if found is None:  # nothing is asked of a case whose mask may be what could not be made
            return {"name": case.name, OURS: {"failed": reason}, "peers": {}}
        mine = found.pop(OURS)
        for record in found.values():
            if "seconds" in record and "seconds" in mine:
                record["ratio"] = record["seconds"] / mine["seconds"]
        return case.facts | {OURS: mine, "peers": found}

    def tables(self, found: dict[str, Any]) -> list[str]:
        return tables.of_report(found)
