"""What a case is, and what a battery says of it, whichever operation it is of."""

from __future__ import annotations

import dataclasses

from jax_bsk.qa.testing import tolerance


@dataclasses.dataclass(frozen=True)
class NamedCase:
    """Data that decide all inputs of one call, so that its line of text repeats it anywhere.

    Attributes:
      name: its key on the command line (`--seed N` or `--case name`).
    """

    name: str

    kit = ""  # the operation, for the command line

    @property
    def repro(self) -> str:
        """The command that runs this case alone; append `--implementation cpu` and the like."""
        command = f"python -m jax_bsk.qa.testing {self.kit}".rstrip()
        if not self.name.startswith("seed-"):
            return f"{command} --case {self.name}"
        seed, _, draw = self.name.removeprefix("seed-").partition(".")
        return f"{command} --seed {seed}" + (f" --draw {draw}" if draw else "")

    def __str__(self) -> str:
        parts = [f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self) if f.name != "name"]
        return f"{self.name}: {' '.join(parts)}"


class Mismatch(AssertionError):
    """A case outside the tolerance rule; the message has every figure, the case, and the command that repeats it."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What the tolerance rule says of one case: a comparison a result, and what else is wrong (dtypes, other bits)."""

    case: NamedCase
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
