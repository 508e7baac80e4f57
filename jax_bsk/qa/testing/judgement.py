"""What a battery says of one case, whichever operation it is of."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_bsk.qa.testing import tolerance


class Mismatch(AssertionError):
    """A case outside the tolerance rule; the message has every figure, the case, and the command that repeats it."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the tolerance rule says of one case: a comparison a result, and what else is wrong (dtypes, other bits)."""

    case: Any
    comparisons: tuple[tolerance.Comparison, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems and all(c.ok for c in self.comparisons)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.comparisons), *self.problems])

    def report(self, command: str = "") -> str:
        """The text of a case that is right; `command` is appended to the repro line of one that is not.

        Raises:
            Mismatch: a result is outside the tolerance rule.
        """
        if not self.ok:
            raise Mismatch(
                f"outside the tolerance rule\n{self}\n{self.case}\nrepro: {self.case.repro} {command}".rstrip()
            )
        return str(self)
