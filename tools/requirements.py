"""Prints the requirements of pyproject.toml with the given extras, one per line, for the Makefile to install.

Usage: python tools/requirements.py dev,cuda13
       python tools/requirements.py --only nvcc    # the extra's own, without JAX
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str], only: bool = False) -> list[str]:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    wanted, seen, lines = list(extras), set(), [] if only else list(project["dependencies"])
    while wanted:
        extra = wanted.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for line in project["optional-dependencies"][extra]:
            inner = re.fullmatch(r"jax_bsk\[(.*)\]", line)
            if inner:
                wanted += inner.group(1).split(",")
            else:
                lines.append(line)
    return lines


if __name__ == "__main__":
    print("\n".join(requirements([e for e in sys.argv[-1].split(",") if e], only="--only" in sys.argv)))
