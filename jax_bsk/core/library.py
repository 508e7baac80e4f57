"""The native libraries: loading, version checks, registration with XLA, and what each says of itself."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export

from jax_bsk.core import compat
from jax_bsk.core.version import __version__

_PLATFORM_NAMES = {"cpu": "cpu", "cuda": "CUDA"}  # as jax.ffi.register_ffi_target spells them


@dataclasses.dataclass(frozen=True)
class Library:
    """One native library: what it says of itself, or why it cannot be used (with the remedy)."""

    platform: str
    info: Mapping[str, Any]
    problem: str | None

    @property
    def usable(self) -> bool:
        return self.problem is None


_targets: list[str] = []


def declare(target: str) -> None:
    """Says that the Python code makes a custom call of this name, which every library must have."""
    _targets.append(target)


def targets() -> tuple[str, ...]:
    """Names of all custom calls that the Python code makes."""
    return tuple(_targets)


@functools.cache
def load(platform: str) -> Library:
    """The native library of `platform` ("cpu" or "cuda"), loaded, checked and registered with XLA on first need."""
    name = f"jax_bsk._{platform}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return Library(platform, {}, _missing(platform))
    except ImportError as error:
        return Library(platform, {}, f"{name} does not load ({error}); build it again with `make build`.")
    info, handlers = module.build_info(), module.registrations()
    problem = mismatch(name, info, set(handlers))
    if problem is None:
        for target, handler in handlers.items():
            jax.ffi.register_ffi_target(target, handler, platform=_PLATFORM_NAMES[platform])
    return Library(platform, info, problem)


def limits(platform: str) -> Mapping[str, Any]:
    """What a platform's kernels can take, also where its library was not built; empty where no library says."""
    own = load(platform)
    if own.usable:
        return own.info
    every, prefix = load("cpu"), f"{platform}_"
    facts = every.info if every.usable else {}
    return {name.removeprefix(prefix): fact for name, fact in facts.items() if name.startswith(prefix)}


def workspace(target: str, **sizes: int) -> int:
    """Bytes of a CUDA call's workspace. `csrc/workspace.cc` says what they depend on; any library knows it."""
    usable = next((platform for platform in _PLATFORM_NAMES if load(platform).usable), None)
    if usable is None:
        raise RuntimeError(load("cpu").problem)
    return importlib.import_module(f"jax_bsk._{usable}").workspace(target, sizes)


def register() -> None:
    """Registers every usable library, so that executables loaded from a cache find their targets."""
    for platform in _PLATFORM_NAMES:
        load(platform)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export.export(..., disabled_checks=...)` needs to let a program with this package's custom calls pass.

    The program runs wherever a jax_bsk of the same version is imported.
    """
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets()]


def _missing(platform: str) -> str:
    package = Path(__file__).parent.parent
    in_source_tree = (package.parent / "csrc").is_dir()
    if platform == "cuda":
        if in_source_tree:
            remedy = "`make build CUDA=1` builds it where there is an nvcc; with NVCC=wheels it gets one from PyPI."
        else:
            remedy = "install a wheel that `make wheel CUDA=1` built, or a checkout with an nvcc on PATH."
        return f"this jax_bsk was built without its CUDA library; {remedy}"
    if in_source_tree:
        return (
            "jax_bsk was imported from its source tree, which holds no built library: run `make build` there and use "
            "the `.venv` it makes, or start Python in another directory if jax_bsk is installed."
        )
    return "the installed jax_bsk holds no CPU library; install it again from a wheel or a checkout."


def mismatch(name: str, info: Mapping[str, Any], handlers: set[str]) -> str | None:
    """Why a loaded library must not be registered: XLA kills the whole backend when the FFI versions do not fit."""
    if info["version"] != __version__:
        return f"{name} is version {info['version']} but the Python code is {__version__}; run `make build`."
    if handlers != set(targets()):
        return f"{name} has the calls {sorted(handlers)} but the Python code {sorted(targets())}; run `make build`."
    built, runtime = tuple(info["ffi_api"]), compat.runtime_ffi_api()
    if runtime is not None and (built[0] != runtime[0] or built[1] > runtime[1]):
        return (
            f"{name} was built against XLA FFI API {built[0]}.{built[1]}, the installed jaxlib has "
            f"{runtime[0]}.{runtime[1]}; install a newer jaxlib (0.10.2 or later) or build jax_bsk against this one."
        )
    return None
