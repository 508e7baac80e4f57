"""Errors and warnings of the package. Below everything else on the path of a call."""

from __future__ import annotations

from collections.abc import Sequence


class UnsupportedError(NotImplementedError):
    """The named implementation cannot take this call; the message gives one sentence a reason, with the remedy."""

    def __init__(self, implementation: str | None, reasons: Sequence[str]):
        self.implementation = implementation
        self.reasons = tuple(reasons)
        super().__init__(f"implementation={implementation!r} cannot take this call: " + " ".join(reasons))


class FallbackWarning(UserWarning):
    """The automatic choice left the platform's native kernel for the slower pure-JAX implementation; says why."""
