"""The files around the code say what is true: one version, commands that exist, links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jax_bsk

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")
TEMPLATES = [path.name for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]


def test_the_version_is_the_newest_of_the_changelog_and_the_citation():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest, date = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)[0]
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest == jax_bsk.__version__
    assert f"\nversion: {newest}\n" in citation
    assert f"\ndate-released: {date}\n" in citation
    cut = changelog.split(f"## [{newest}]")[1].split("\n## [")[0]
    assert re.findall(r"^### (.*)$", cut, re.MULTILINE) == ["Added", "Changed", "Fixed"]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_pages_outside_the_site(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        path, _, place = target.partition("#")
        if "://" in path:
            continue
        assert (ROOT / path).exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
            assert place in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_what_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    targets = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets is not None
    for name in set(re.findall(r"`make ([a-z-]+)", text)):
        assert name in targets[1].split(), name
    for path in set(re.findall(r"`((?:jax_bsk|tests|tools|csrc|docs|reports|benchmarks)/[\w./-]+)`", text)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", TEMPLATES)
def test_issue_templates_are_forms_that_ask_for_info(name):
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text())
    assert set(form) == {"name", "description", "labels", "body"}
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)
    info = next(part for part in fields if part["id"] == "info")
    assert "`python -m jax_bsk info`" in info["attributes"]["label"]
    assert info["validations"] == {"required": True}
    assert all(part.get("validations", {}).keys() <= {"required"} for part in fields)
