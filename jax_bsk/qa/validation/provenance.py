"""Which code ran, on what: kept with every stage's result, so that stages of different code make no report."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax_bsk
from jax_bsk.core import compat, library
from jax_bsk.qa.support import environment
from jax_bsk.qa.support.git_tree import tree_hash

PACKAGE = Path(jax_bsk.__file__).parent
# What may not differ between the stages of one report: all that says which code ran on what.
SAME = ("csrc_tree", "package_tree", "library_tree", "implementation", "device", "level")


def checkout() -> Path | None:
    """The checkout that this package lies in; None for an installed one."""
    root = PACKAGE.parent
    return root if (root / "csrc").is_dir() and (root / "tests" / "csrc").is_dir() else None


def implementation() -> Literal["cpu", "cuda"]:
    """The native implementation that is looked at: "cuda" where JAX runs on an NVIDIA GPU, else "cpu"."""
    return "cuda" if compat.default_platform() == "cuda" else "cpu"


def source_tree() -> str | None:
    """Git's hash of the sources of the kernels that are looked at: the checkout's, or the installed library's."""
    root = checkout()
    return library.load(implementation()).info.get("source_tree") if root is None else tree_hash(root / "csrc")


def collect() -> dict[str, Any]:
    """Git's hashes of `csrc/` and `jax_bsk/` as they lie here, of the sources the library was built from, versions."""
    root = checkout()
    native = library.load(implementation())
    return {
        "csrc_tree": None if root is None else tree_hash(root / "csrc"),
        "package_tree": tree_hash(PACKAGE),
        "library_tree": native.info.get("source_tree"),
        "implementation": implementation(),
        "platform": compat.default_platform(),
        "device": environment.devices()[0],
        "versions": environment.versions(),
    }
