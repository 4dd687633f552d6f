"""Hooks of mkdocs: generate the reference, include pages from outside docs/, and show what only the site has."""

import itertools
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
OUTSIDE = {  # files of the repository that are pages of the site too: their paths in the repository and in the site
    "benchmarks/README.md": "benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "README.md",
    "docs/README.md": "README.md",
}
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#:]+\.md)(#[^)\s]*)?\)")
ONLY_SITE = re.compile(r"<!-- site: (.*?) -->", re.DOTALL)
_generated: dict[str, str] = {}  # made once in a process: `mkdocs serve` builds again and again


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and those from outside docs/."""
    if not _generated:
        _generated.update(reference.pages())
    for path, text in _generated.items():
        files.append(File.generated(config, path, content=text))
    for path, page in OUTSIDE.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to files outside docs/ at their pages, name pages by title, and uncomment what the site alone has.

    `<!-- site: text -->` is text that only the site has, such as a link to a generated page, which is no file in the
    repository.
    """
    source = next((path for path, made in OUTSIDE.items() if made == page.file.src_uri and "docs/" not in path), None)
    folder = posixpath.dirname(source if source and page.file.src_uri != "README.md" else f"docs/{page.file.src_uri}")

    def repointed(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        is_file_name = link[1].endswith(".md")
        named = _heading(files.get_file_from_path(target), link[3]) or link[1] if is_file_name else link[1]
        return f"[{named}]({posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{link[3] or ''})"

    return LINK.sub(repointed, ONLY_SITE.sub(r"\1", markdown))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Mark the tables of text, whose rows a phone shows as blocks, and label their cells with their column."""
    return re.sub(r"<table>.*?</table>", lambda table: _labelled(table[0]), html, flags=re.DOTALL)


def _labelled(table: str) -> str:
    headings = [_text(heading) for heading in re.findall(r"<th[^>]*>(.*?)</th>", table, re.DOTALL)]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)
    texts = [_text(cell) for cell in cells]
    has_long_word = any(len(word) > 20 for text in texts for word in text.split())
    is_text = len(headings) > 2 and any(len(text) >= 30 for text in texts)
    if len(headings) > 5 or not (has_long_word or is_text):
        return table
    column = itertools.cycle(headings)
    table = re.sub(r"<td", lambda _: f'<td data-label="{next(column)}"', table)
    return table.replace("<table>", "<table data-stacked>", 1)


def _text(html: str) -> str:
    return re.sub(r"<[^>]+>", "", html).strip()


def _heading(file: File | None, anchor: str | None) -> str:
    """Return the heading that a link points at, which replaces a file name as its text; "" if there is none."""
    headings = re.findall(r"^#+ (.+)$", file.content_string if file else "", re.MULTILINE)
    anchors = {f"#{re.sub(r'[^a-z0-9_ -]', '', heading.lower()).replace(' ', '-')}": heading for heading in headings}
    return anchors.get(anchor or "", headings[0] if headings else "")
