"""An installation that cannot run a native kernel: no library, an older jaxlib, an old GPU, no GPU.

What import makes of a library is seen in a process of its own, where `sys.modules` holds None in its place (which makes
it a module that is not found, by Python's definition) or a stand-in.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import jax_bsk
from jax_bsk import UnsupportedError, sparse_attention
from jax_bsk.core import compat, dispatch, library
from jax_bsk.qa.testing.faults import calls, checks
from jax_bsk.qa.testing.faults.scenario import NATIVE, Scenario, scenario
from jax_bsk.qa.testing.isolate import child_environment

FAULT = "unsupported GPU, no CUDA build, older jaxlib"
EXPECTED = "import works; the call by name says what to do; the automatic choice warns and is right"

# What a library says of itself.
FACTS = {"dtypes": ["float32"], "max_head_dim": 256, "min_compute_capability": 80}
# First in its process: a library that is not there, or that was built against headers of the future.
MISSING = "import sys; sys.modules.update(dict.fromkeys({modules}))"
NEWER = """import sys, types
for name in {modules}:
    sys.modules[name] = module = types.ModuleType(name)
    module.build_info = lambda: {info}
    module.registrations = lambda: dict.fromkeys({targets})  # not to be registered: None is no handler"""
AFTER_IMPORT = """
from jax_bsk.qa.testing.faults import installation
installation.check_refusals({names}, {words!r})"""


def check_refusals(names: Sequence[Any], words: str) -> None:
    """Calls by these names raise with these words, the automatic choice warns with them, and "xla" goes on."""
    x = jnp.ones((1, calls.BLOCK, 2, calls.HEAD_SIZE), jnp.float32)
    for name in names:
        attempt = functools.partial(sparse_attention, x, x, x, implementation=name)
        checks.check_raises(f"implementation={name!r}", attempt, UnsupportedError, words)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = sparse_attention(x, x, x, is_causal=True)
    checks.check_close("the automatic choice", out, x)
    said = [str(w.message) for w in caught if issubclass(w.category, jax_bsk.FallbackWarning)]
    assert len(said) == 1, f"expected one FallbackWarning, got {said}"
    for wanted in (words, "implementation='xla'"):
        assert re.search(wanted, said[0]), f"no {wanted!r} in the FallbackWarning: {said[0]}"
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        calls.check_valid_call("xla")


def _without_libraries(name: str, before_import: str, words: str) -> Scenario:
    @scenario(name, FAULT, EXPECTED)
    def run(implementation: str) -> None:
        names = [implementation] if implementation in NATIVE else list(NATIVE)
        modules = [f"jax_bsk._{name}" for name in names]
        info = {**FACTS, "version": jax_bsk.__version__, "ffi_api": [0, 99]}
        code = before_import.format(modules=modules, info=info, targets=list(library.targets()))
        code += AFTER_IMPORT.format(names=names, words=words)
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=child_environment(implementation),
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr[-3000:]}"

    return run


def _with_devices(name: str, devices: Callable[..., list[Any]], words: str) -> Scenario:
    """What the package makes of the CUDA devices that JAX lists; those of this machine are not asked."""

    @scenario(name, FAULT, EXPECTED)
    def run(implementation: str) -> None:
        del implementation  # counts for the valid call alone
        info = FACTS | dict(library.load("cuda").info)
        with (
            mock.patch.object(jax, "devices", devices),
            mock.patch.object(library, "load", lambda platform: library.Library(platform, info, None)),
            mock.patch.object(compat, "default_platform", return_value="cuda"),
            mock.patch.object(dispatch, "_already_said", set()),
        ):
            check_refusals(["cuda"], words)

    return run


def _no_device(*_: Any) -> list[Any]:
    raise RuntimeError("Unknown backend cuda")


SCENARIOS = (
    _without_libraries("no-native-library", MISSING, "`make build|reinstall"),
    _without_libraries("older-jaxlib", NEWER, r"FFI API 0\.99.*install a newer jaxlib"),
    _with_devices(
        "unsupported-gpu",
        lambda *_: [SimpleNamespace(compute_capability="7.5")],
        r"compute capability 7\.5; the kernels need \d+\.\d or later",
    ),
    _with_devices("no-gpu", _no_device, r"no CUDA device; install jax\[cuda13\]"),
)
