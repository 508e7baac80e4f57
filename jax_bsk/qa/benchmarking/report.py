"""The report of a run: what it ran on, what is wrong in it, its JSON. Tables are of the operations."""

from __future__ import annotations

import importlib.metadata
import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jax_bsk.qa.benchmarking.contender import OURS
from jax_bsk.qa.support import environment

PACKAGES = (
    *("torch", "triton", "nvidia-cudnn-cu13", "jax-cuda13-plugin", "flash-attn3-jax", "fa4-jax", "tokamax"),
    "nvidia-cutlass-dsl",
)


def surroundings() -> dict[str, Any]:
    """Versions and devices."""
    versions: dict[str, str | None] = environment.versions()
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    devices = environment.devices()
    client = jax.devices()[0].client
    versions["platform"] = client.platform_version.strip().replace("\n", ", ")
    versions["driver"] = _driver() if devices[0]["platform"] == "cuda" else None
    return {"versions": versions, "devices": devices}


def _driver() -> str | None:
    """Version of the NVIDIA driver, from its own tool; None where that is absent."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return result.stdout.splitlines()[0].strip() if result.returncode == 0 and result.stdout.strip() else None


def write(report: dict[str, Any], path: Path) -> None:
    """The JSON, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def contenders(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of a case's contenders by name, jax_bsk first.

    Records of attention keep jax_bsk's apart from its peers', since reports of all versions have them so.
    """
    return case["contenders"] if "contenders" in case else {OURS: case[OURS], **case.get("peers", {})}


def without_samples(case: dict[str, Any]) -> dict[str, Any]:
    """A record without what a report has no room for."""
    left_out = ("samples", "check", "calls_per_sample")

    def bare(one: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in one.items() if key not in left_out}

    found = {name: bare(one) for name, one in contenders(case).items()}
    if "contenders" in case:
        return case | {"contenders": found}
    return case | {OURS: found.pop(OURS), "peers": found}


def is_wrong(record: dict[str, Any]) -> bool:
    """Whether a contender's result was checked and is not right."""
    return "check" in record and not record["check"]["ok"]


def counts(verdicts: Sequence[str]) -> str:
    """How many goals are met, missed and open, in words."""
    return ", ".join(f"{n} {word}" for word in ("met", "missed", "open") if (n := list(verdicts).count(word)))


def unit_of(report: dict[str, Any]) -> tuple[str, float]:
    """Unit of FLOP/s for people, and what it stands for."""
    return ("TFLOP/s", 1e12) if report["devices"][0]["platform"] == "cuda" else ("GFLOP/s", 1e9)


def where(report: dict[str, Any]) -> str:
    """Implementation, device and versions, for a title."""
    versions = report["versions"]
    stack = ", ".join(f"{name} {versions[name]}" for name in ("jax", "torch", "driver") if versions.get(name))
    device = environment.describe_device(report["devices"][0])
    return f"jax_bsk {versions['jax_bsk']} ({report['implementation']}), {device}; {stack}"


def milliseconds(seconds: float) -> str:
    """Four digits that count, never an exponent."""
    value = seconds * 1e3
    digits = max(0, 3 - math.floor(math.log10(value))) if value > 0 else 3
    return f"{value:.{digits}f}"


def render(report: dict[str, Any], tables: Sequence[str]) -> str:
    """The tables, and what is needed to read them: what is wrong, failed or was not measured, each reason once."""
    cases = report["cases"]
    lines = [*tables, "", *_notes(cases), *(f"Not measured: {text}" for text in report.get("not_measured", ()))]
    verdicts = [case["verdict"] for case in cases if case.get("verdict")]
    if verdicts:
        lines.append(f"Goals: {counts(verdicts)}")
        if "open" in verdicts:
            lines.append("open: a peer that the goal names was not measured")
    wrong = sum(not case["ok"] for case in cases)
    if wrong:
        lines.append(f"WRONG: in {wrong} of {len(cases)} cases a result is beyond the tolerance, or jax_bsk has none.")
    return "\n".join(lines).rstrip()


def _notes(cases: Sequence[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for case in cases:
        for name, record in contenders(case).items():
            if is_wrong(record):
                check = record["check"]
                share = check["share_of_tolerance"]
                what = "is not finite" if not check["finite"] or share is None else f"is {share:.3g} of the tolerance"
                lines.append(f"WRONG: {name}, {case['name']}: the error {what}")
            if "failed" in record:
                lines.append(f"FAILED: {name}, {case['name']}: {record['failed']}")
            said = [("Not measured", record["refused"])] if "refused" in record else []
            for what in [*said, *(("Note", note) for note in record.get("notes", ()))]:
                reasons.setdefault(what, {}).setdefault(name, []).append(case["name"])
    for (what, reason), told in reasons.items():
        names = [f"{name} ({of[0] if len(of) == 1 else f'{len(of)} cases'})" for name, of in told.items()]
        lines.append(f"{what}: {', '.join(names)}: {reason}")
    return lines
