"""What a stage has found so far, kept after each case or part: a run that is cut short can be resumed.

On a GPU that is lent for some minutes at a time the whole stage may not fit. Only records of the same code, device and
options are taken up again; a case of the benchmark has its peers in it, which ran beside it.
"""

from __future__ import annotations

import json
from typing import Any

from jax_bsk.qa.validation import provenance
from jax_bsk.qa.validation.outcome import finite
from jax_bsk.qa.validation.settings import Settings


class Measured:
    """Records by name (of a case or a part), a line each in a file of the stage's name in the results' folder."""

    def __init__(self, settings: Settings, stage: str):
        facts = provenance.collect()
        self._facts = {name: facts[name] for name in provenance.SAME if name in facts}
        self._facts |= {"level": settings.level.value, "seed": settings.seed, "peers": settings.peers}
        self._path = settings.results / f"{stage}.jsonl"
        self._records: dict[str, dict[str, Any]] = {}
        if settings.resume and self._path.exists():
            for line in self._path.read_text().splitlines():
                entry = json.loads(line)
                if entry["facts"] == json.loads(json.dumps(self._facts)):
                    self._records[entry["name"]] = entry["record"]
        elif self._path.exists():
            self._path.unlink()
        self.taken_up = len(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def __getitem__(self, name: str) -> dict[str, Any]:
        return self._records[name]

    def keep(self, name: str, record: dict[str, Any]) -> None:
        """Writes a record that need not be made again."""
        self._records[name] = record
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            entry = {"name": name, "facts": self._facts, "record": record}
            file.write(json.dumps(finite(entry), allow_nan=False) + "\n")
