"""What a command runs on: versions and devices, for people and for JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

from jax_bsk.core import compat
from jax_bsk.core.version import __version__


def versions() -> dict[str, str | None]:
    """Versions of what matters; None for an optional package that is absent."""
    found: dict[str, str | None] = {"jax_bsk": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "numpy", "flax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def devices() -> list[dict[str, Any]]:
    """The devices of JAX's default platform.

    Raises:
      RuntimeError: JAX cannot start its platform (`JAX_PLATFORMS` names one that is absent, say).
    """
    name = compat.default_platform()
    return [_device(name, device) for device in jax.devices()]


def _device(platform_name: str, device: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {"platform": platform_name, "id": device.id, "name": device.device_kind}
    if platform_name == "cpu":
        facts |= {"name": _processor(), "cores": usable_cores()}
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        facts["compute_capability"] = str(capability)
    return facts


def usable_cores() -> int:
    """Cores this process may run on, which a container or `taskset` may have made fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """Name of the processor, from where Linux writes it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def describe_device(device: dict[str, Any]) -> str:
    """One line a device."""
    text = f"{device['platform']} {device['id']}: {device['name']}"
    if "cores" in device:
        text += f", {device['cores']} cores"
    if "compute_capability" in device:
        text += f", compute capability {device['compute_capability']}"
    return text
