"""Every example of the README and of the pages in docs/ runs, and their links lead somewhere.

A page is run as its reader would type it: its blocks marked `python` in order, in one session and an empty folder. A
block of prompts (`>>>`) must print what it says.
"""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tools import site_hooks

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
BLOCK = re.compile(r"^( *)```python[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
EXAMPLES = {name: blocks for name, path in PAGES.items() if (blocks := BLOCK.findall(path.read_text()))}


def run(page: str) -> None:
    """Runs the blocks of a page; `out`, where a block leaves one, must be finite."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, (indent, text) in enumerate(EXAMPLES[page], 1):
        code = re.sub(f"^{indent}", "", text, flags=re.MULTILINE)
        label = f"{page}, example {number}"
        if ">>>" in code:
            test = doctest.DocTestParser().get_doctest(code, names, label, page, 0)
            test.globs = names  # what a block of prompts defines, later blocks see
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            assert runner.run(test, clear_globs=False).failed == 0, label
        else:
            exec(compile(code, label, "exec"), names)
        out = names.get("out", 0.0)
        assert all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(out)), label


@pytest.mark.parametrize("page", EXAMPLES)
def test_the_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        run(page)


@pytest.mark.parametrize("page", PAGES)
def test_what_it_points_to_exists(page):
    for target in LINK.findall(PAGES[page].read_text()):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (PAGES[page].parent / path).exists(), f"{page}: {target}"


def test_bars_in_code_of_tables_are_written_for_github_and_shown_by_the_site():
    table = "| a | b |\n| --- | --- |\n| `x \\| y` | not code: \\| |\n`x \\| y` outside"
    assert site_hooks.on_page_markdown(table) == table.replace("| `x \\| y`", "| `x | y`")
    for name, path in PAGES.items():
        for line in path.read_text().splitlines():
            if line.startswith("|"):
                bare = [code for code in re.findall(r"`[^`]+`", line) if re.search(r"(?<!\\)\|", code)]
                assert not bare, f"{name}: GitHub ends a cell at {bare}: write \\|"
