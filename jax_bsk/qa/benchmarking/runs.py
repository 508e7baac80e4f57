"""Measures a list of cases, one after the other; what fails is a record, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jax_bsk.qa.benchmarking.cases import Case
from jax_bsk.qa.benchmarking.contender import first_line
from jax_bsk.qa.benchmarking.inputs import Inputs
from jax_bsk.qa.benchmarking.measure import measure


def records(
    cases: Sequence[Case], *, implementation: str, with_peers: bool, rounds: int, seed: int
) -> Iterator[dict[str, Any]]:
    """The record of each case as `measure` makes it, in order; neighbours of one shape share their inputs."""
    inputs, key = None, None
    for case in cases:
        try:
            sizes = case.shape, case.kv_shape, case.dtype, case.measured
            if sizes != key:
                inputs = None  # frees the last shape's before the next are made
                inputs, key = Inputs(case, seed), sizes
            assert inputs is not None
            yield measure(case, inputs, implementation=implementation, with_peers=with_peers, rounds=rounds, seed=seed)
        except Exception as error:  # the cases before it took minutes, and those after it may well run
            yield {"name": case.name, "jax_bsk": {"failed": first_line(error)}, "peers": {}, "ok": False}
