"""Hooks of mkdocs: generate the reference, include pages from outside docs/, and show what only the site has."""

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
LINK = re.compile(r"(\]\()([^)\s#:]+\.md)((?:#[^)\s]*)?\))")
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
    """Point links to files outside docs/ at their pages, and uncomment what is for the site alone.

    `<!-- site: text -->` is text that only the site has, such as a link to a generated page, which is no file in the
    repository.
    """
    source = next((path for path, made in OUTSIDE.items() if made == page.file.src_uri and "docs/" not in path), None)
    folder = posixpath.dirname(source if source and page.file.src_uri != "README.md" else f"docs/{page.file.src_uri}")

    def repointed(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        target = OUTSIDE.get(path, path.removeprefix("docs/"))
        return f"{link[1]}{posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{link[3]}"

    return LINK.sub(repointed, ONLY_SITE.sub(r"\1", markdown))
