"""`python -m jax_bsk.qa.validation STAGE`: one stage in this process, settings on standard input; `runner` calls it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

from jax_bsk.qa.validation import provenance
from jax_bsk.qa.validation.settings import STAGES, Clock, Settings


def main() -> None:
    stage = STAGES[sys.argv[1]]
    settings = Settings.from_json(json.load(sys.stdin))
    clock = Clock(stage.budget[settings.level])
    result = importlib.import_module(f"jax_bsk.qa.validation.{stage.module}").run(settings, clock)
    facts = provenance.collect() | {"level": settings.level.value}
    result = dataclasses.replace(result, seconds=clock.seconds, budget_seconds=clock.budget, provenance=facts)
    settings.results.mkdir(parents=True, exist_ok=True)
    path = settings.results / f"{stage.name}.json"
    path.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
