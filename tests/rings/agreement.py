"""Whether models and kernels still agree: what the models mirror, and what that looked like when they were written.

`agreed.json` has a digest of each function that a model names: of its branches, loops and calls. When one differs,
somebody has to read the function and its model again; `python -m tests.rings agree` then writes the file.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from tests.rings import backward, feeder, forward, gradients, narrow, products
from tests.rings.checker import Agent, Model
from tests.rings.sources import body, digest, mirrored

AGREED = Path(__file__).parent / "agreed.json"
MODULES = (forward, feeder, backward, gradients, products, narrow)


def functions() -> list[tuple[str, object]]:
    """The classes of the models and their methods, with their names."""
    found: list[tuple[str, object]] = []
    for module in MODULES:
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, Agent | Model) and kind.__module__ == module.__name__:
                found.append((f"{module.__name__}.{name}", kind))
                for key, method in vars(kind).items():
                    method = getattr(method, "__func__", method)  # of a static method
                    if inspect.isfunction(method) and method.__code__.co_filename == module.__file__:
                        found.append((f"{module.__name__}.{name}.{key}", method))
    return found


def names() -> list[tuple[str, str]]:
    """All functions of csrc that the models name, with their files."""
    found = {name for _, function in functions() for name in mirrored(inspect.getdoc(function) or "")}
    return sorted(found, key=lambda x: (x[1], x[0]))


def unnamed() -> list[str]:
    """Functions of the models that touch barriers or memory and do not say what they mirror."""
    operations = r"self\.(?:wait|arrive|send|expect|copy|begin_read|read|write|begin_write|add|wait_until|fence)\("
    return [
        name
        for name, function in functions()
        if inspect.isfunction(function)
        and re.search(operations, inspect.getsource(function))
        and not mirrored(inspect.getdoc(function) or "")
        and not function.__name__.startswith(("begin_", "end_", "release_"))  # parts of those that do
    ]


def digests() -> dict[str, str]:
    return {f"{path} {name}": digest(name, path) for name, path in names() if body(name, path)}


def agree():
    AGREED.write_text(json.dumps(digests(), indent=2) + "\n")


def agreed() -> dict[str, str]:
    return json.loads(AGREED.read_text())
