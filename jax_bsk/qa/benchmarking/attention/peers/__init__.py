"""The peers, a module a framework.

Each has `names(case)`, the contenders it may have for a case, and `make(name, case, inputs)`, which returns one or
raises: `Refused` with the reason where the framework is absent or cannot compute the case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from jax_bsk.qa.benchmarking.attention.cases import Case
from jax_bsk.qa.benchmarking.attention.inputs import Inputs
from jax_bsk.qa.benchmarking.attention.peers import fa4_peer, flash_attn3_peer, jax_nn, tokamax_peer, torch_peers
from jax_bsk.qa.benchmarking.contender import Contender

_MODULES = (jax_nn, torch_peers, flash_attn3_peer, fa4_peer, tokamax_peer)


def offers(case: Case) -> Iterator[tuple[str, Callable[[Case, Inputs], Contender]]]:
    """Name and maker of every peer that may take part in a case."""
    for module in _MODULES:
        for name in module.names(case):
            yield name, lambda case, inputs, module=module, name=name: module.make(name, case, inputs)
