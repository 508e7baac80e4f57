"""How the site shows pages as the repository does: what mkdocs does to them (mkdocs.yml names this file)."""

from __future__ import annotations

import re
from typing import Any

CODE = re.compile(r"`[^`\n]+`")


def on_page_markdown(markdown: str, **_: Any) -> str:
    r"""Writes `\|` in code of tables as `|`: GitHub wants the backslash there, and Python-Markdown would show it."""

    def row(line: str) -> str:
        return CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.lstrip().startswith("|") else line

    return "\n".join(map(row, markdown.split("\n")))
