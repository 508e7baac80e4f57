"""Mistakes in calls that would surface as errors from inside JAX or Python: each is named here, with its remedy.

Below the public functions, which say what their arguments are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
from jax.core import Tracer

Function = TypeVar("Function", bound=Callable[..., Any])

# Arguments of Flax's own attention functions, which of this package's functions only those of `attention_fn` have.
_FLAX_NAMES = frozenset(("broadcast_dropout", "deterministic", "precision", "module", "promote_dtype"))


def refuses_flax(mistake: str, positional: int | None = None) -> Callable[[Function], Function]:
    """Decorates a function that Flax's modules must not call themselves.

    Args:
      mistake: Sentence that names the mistake and the remedy.
      positional: Positional arguments the function takes, where more of them are Flax's; None: Python refuses more.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            too_many = positional is not None and len(args) > positional
            if too_many or not _FLAX_NAMES.isdisjoint(kwargs):
                given = [f"{len(args)} positional arguments", *sorted(_FLAX_NAMES & kwargs.keys())]
                raise TypeError(f"{mistake}; got {', '.join(given)}")
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def check_devices(query: Any, others: Iterable[tuple[str, Any]]) -> None:
    """Refuses arrays that are committed to other devices than the query is.

    Args:
      query: Array.
      others: Names and pytrees of arrays.

    Raises:
      ValueError: One is elsewhere.
    """
    here = _devices(query)
    if here is None:
        return
    for name, tree in others:
        for leaf in jax.tree.leaves(tree):
            there = _devices(leaf)
            if there is not None and there != here:
                raise ValueError(
                    f"{name} must be on the query's devices {_names(here)}, got {_names(there)}; move it, e.g. "
                    "jax.device_put(x, query.sharding)"
                )


def _devices(x: Any) -> frozenset[Any] | None:
    """Devices that an array is committed to; None where it may move, or is traced."""
    if isinstance(x, Tracer) or not isinstance(x, jax.Array) or not x.committed:
        return None
    return frozenset(x.devices())


def _names(devices: frozenset[Any]) -> str:
    return ", ".join(sorted(map(str, devices)))
