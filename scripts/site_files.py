"""What MkDocs does not find in docs/ by itself: a hook of mkdocs.yml.

README.md is the site's first page. CHANGELOG.md, CONTRIBUTING.md and every file of the repository that a page links to are
part of the site, and each room of the package with public names has a page with their docstrings. Pages link as they do in
the repository; on the site, these links lead to the same file's place there.
"""

import ast
import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
LINK = re.compile(r"(\]\()([^)#\s:]+)")  # a relative one, up to its anchor


def _place(path):
    """Where a file of the repository is on the site."""
    return PAGES.get(path) or path.removeprefix("docs/")


def _source(file):
    """A page's path in the repository; None for what is made here."""
    return next((path for path, place in PAGES.items() if place == file.src_uri), None) or (
        f"docs/{file.src_uri}" if (ROOT / "docs" / file.src_uri).is_file() else None
    )


def _linked(source, link):
    """The path in the repository of the file that a page links to; None where there is none."""
    path = os.path.normpath(os.path.join(os.path.dirname(source), link))
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _public_names():
    """The public names, by the module that each is in, as `mxdsurgery` has them; read without importing it."""
    for node in ast.parse((ROOT / "mxdsurgery" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_PLACES":
            return ast.literal_eval(node.value)
    raise ValueError("mxdsurgery/__init__.py has no _PLACES")


def _reference(room, places):
    """The page of a room: what it is for, and the docstrings of its public names."""
    parts = [f"# {room}", f"::: mxdsurgery.{room}\n    options: {{members: false, show_root_heading: false}}"]
    for module, names in places.items():
        for name in names:
            parts.append(f"::: mxdsurgery.{module}.{name}\n    options: {{heading: mxdsurgery.{name}, toc_label: {name}}}")
    return "\n\n".join(parts) + "\n"


def on_files(files, config):
    """Adds the pages and files that are not in docs/."""
    for path, place in PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / path).read_text(encoding="utf-8")))
    for page in list(files.documentation_pages()):
        source = _source(page)
        for _, link in LINK.findall(page.content_string):
            path = _linked(source, link)
            if path is not None and files.get_file_from_path(_place(path)) is None:
                files.append(File.generated(config, _place(path), abs_src_path=str(ROOT / path)))
    rooms = {}
    for module, names in _public_names().items():
        rooms.setdefault(module.partition(".")[0], {})[module] = names
    for room, places in rooms.items():
        files.append(File.generated(config, f"api/{room}.md", content=_reference(room, places)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to a file's place in the repository become links to its place on the site."""
    source = _source(page.file)

    def placed(match):
        path = source and _linked(source, match[2])
        start = os.path.dirname(page.file.src_uri) or "."
        return match[0] if not path else match[1] + os.path.relpath(_place(path), start)

    return LINK.sub(placed, markdown)
