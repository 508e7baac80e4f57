"""`python -m jax_bsk info`: versions, devices, and what each implementation can take or why it cannot run here."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jax_bsk.core import compat, dispatch, library
from jax_bsk.qa.support import environment


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, implementations and why one is not available",
        description="Shows versions, devices, and each implementation: what it can take, or every reason why it "
        "cannot run here and what to do about it.",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON")
    shape.add_argument("--brief", action="store_true", help="one line an implementation")
    return parser


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
    elif args.brief:
        print("\n".join(_summary(name, facts["implementations"][name]) for name in facts["implementations"]))
    else:
        print(_text(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything the command shows."""
    facts: dict[str, Any] = {
        "versions": environment.versions(),
        "ffi_api": {"runtime": _version(compat.runtime_ffi_api())},
        "platform": None,
        "platform_problem": None,
        "devices": [],
        "implementations": {},
    }
    try:
        facts["devices"] = environment.devices()
        facts["platform"] = compat.default_platform()
    except RuntimeError as error:
        facts["platform_problem"] = str(error)
    for name in dispatch.IMPLEMENTATIONS:
        facts["implementations"][name] = _implementation(name)
    return facts


def _implementation(name: str) -> dict[str, Any]:
    reasons = dispatch.unavailable(name)
    facts: dict[str, Any] = {"available": not reasons, "reasons": reasons}
    if name in dispatch.NATIVE:
        facts["library"] = {
            key: _version(value) if key == "ffi_api" else value for key, value in library.load(name).info.items()
        }
    return facts


def _version(pair: Any) -> str | None:
    return None if pair is None else ".".join(map(str, pair))


def _text(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    lines = [f"jax_bsk {versions['jax_bsk']}", "", "Versions"]
    lines += [f"  {name:8} {version or 'not installed'}" for name, version in versions.items() if name != "jax_bsk"]
    lines += [f"  {'FFI API':8} {facts['ffi_api']['runtime'] or 'not stated by this jaxlib'} (jaxlib's)"]
    lines += ["", "Devices"]
    lines += [f"  {environment.describe_device(device)}" for device in facts["devices"]]
    if facts["platform_problem"]:
        lines.append(f"  none: JAX does not start its platform. {facts['platform_problem']}")
    lines += ["", "Implementations of sparse_attention"]
    for name, implementation in facts["implementations"].items():
        lines.append(f"  {_summary(name, implementation, reasons=False)}")
        lines += [f"    - {reason}" for reason in implementation["reasons"]]
        takes = _takes(name, implementation.get("library", {}))
        lines += [f"    {label:14} {text}" for label, text in takes]
    lines += ["", f"By default: {_default(facts)}"]
    return "\n".join(lines)


def _summary(name: str, implementation: dict[str, Any], reasons: bool = True) -> str:
    if not implementation["available"]:
        return f"{name:5} not available" + (": " + " ".join(implementation["reasons"]) if reasons else "")
    library = implementation.get("library", {})
    detail = library.get("instruction_set") or library.get("architectures")
    return f"{name:5} available" + (f" ({detail})" if detail else "")


def _takes(name: str, library: dict[str, Any]) -> list[tuple[str, str]]:
    """What an implementation can take, from what its library says of itself."""
    if name == "xla":
        return [
            ("takes", "every floating-point type, head size and block size; bias; all derivatives; every platform"),
        ]
    if not library:
        return []
    head = f"up to {library['max_head_dim']}"
    if library.get("head_dim_multiple", 1) > 1:
        head += f", multiples of {library['head_dim_multiple']}"
    blocks = " or ".join(map(str, library["blocks"])) if "blocks" in library else f"up to {library['max_block']}"
    lines = [("types", ", ".join(library["dtypes"])), ("head sizes", head), ("block sizes", blocks)]
    if "instruction_set" in library:
        lines.append(("instructions", f"{library['instruction_set']} (chosen for this processor)"))
    if "architectures" in library:
        lines.append(("architectures", str(library["architectures"])))
    if "min_compute_capability" in library:
        lines.append(("GPUs", f"compute capability {library['min_compute_capability'] / 10} or later"))
    lines.append(("built", f"version {library['version']}, FFI API {library['ffi_api']}"))
    return lines


def _default(facts: dict[str, Any]) -> str:
    platform = facts["platform"]
    if platform is None:
        return "nothing runs until JAX starts; see Devices."
    if platform in dispatch.NATIVE and facts["implementations"][platform]["available"]:
        return f"{platform}, and xla (with a warning that says why) where a call is beyond it."
    return "xla, with a warning that says why. It is slower; pass implementation='xla' to choose it on purpose."
