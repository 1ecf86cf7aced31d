"""The documentation: its links lead to files and headings that are there, and as a site it builds without a warning."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from running import ROOT

import mxdsurgery

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def prose(page):
    """A page without its blocks of code, and without the code within lines."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def links(page):
    """The relative links of a page, each as path and anchor."""
    return re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", prose(page))


def anchors(page):
    """The anchors of a page's headings, where GitHub and MkDocs make the same of them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page, folder=None):
    """The links of a page that lead nowhere; ``folder``: that they start from, where it is not the page's own."""
    for path, anchor in links(page):
        target = Path(os.path.normpath((folder or page.parent) / path)) if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            yield f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_are_there(page):
    docs = ROOT / "docs"
    part = page.parent.parent == docs and page.parent.name != "guide"  # of a printed page, which is in docs/
    assert not list(broken(page, docs if part else None))


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Run: `a b`\n[1](page.md) [2](#run-a-b) [`3`](other.md) [4](page.md#runs) ![5](no.png) `[6](code.md)`\n")
    assert list(broken(page)) == ["other.md#", "page.md#runs", "no.png#"]
    assert sum(len(links(page)) for page in PAGES) > 100 and any(anchor for page in PAGES for _, anchor in links(page))


def test_readme_links_to_every_page_of_the_guide_and_stays_short():
    readme = ROOT / "README.md"
    linked = {path for path, _ in links(readme)}
    assert {f"docs/guide/{page.name}" for page in (ROOT / "docs" / "guide").glob("*.md")} <= linked
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= linked
    assert readme.stat().st_size < 12_000


class Fetched(HTMLParser):
    """What a browser fetches for a page, and the ids in it."""

    def __init__(self, page):
        super().__init__()
        self.sources, self.ids = [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids.add(given.get("id"))
        if tag != "a" and given.get("rel") not in ("canonical", "prev", "next"):
            self.sources += [given[name] for name in ("src", "href") if given.get(name)]


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("material", "mkdocstrings")),
    reason="mkdocs-material and mkdocstrings are not installed: pip install 'mxdsurgery[docs]'",
)
def test_the_site_builds_without_a_warning_fetches_nothing_and_has_every_public_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {page: Fetched(page) for page in tmp_path.rglob("*.html")}
    assert len(pages) > 40
    for page, found in pages.items():
        assert not [source for source in found.sources if re.match(r"(\w+:)?//", source)], page
    names = {f"mxdsurgery.{module}.{name}" for name, module in mxdsurgery._MODULE_OF.items()}
    assert names <= {name for page, found in pages.items() if page.parent.name == "api" for name in found.ids}
    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert found == {page.relative_to(tmp_path).as_posix() for page in pages if page.name != "404.html"}
