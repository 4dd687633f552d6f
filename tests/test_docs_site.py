"""The documentation site: its map, the reference made from the code, and a strict build that loads nothing else."""

import importlib.util
import posixpath
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
import yaml
from test_docs import PAGES, PROTOCOLS, ROOT, commands, dead_links, rows

from fmdistill import catalog, cli, recipe, signatures
from fmdistill.distill import objective


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reference = _module(ROOT / "docs/site/reference.py")
GENERATED = reference.pages()
# `docs/site/hooks.py` copies these into the site; it needs mkdocs, which these tests do not
OUTSIDE = ["benchmarks.md", "contributing.md", "changelog.md"]


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without its Python objects."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def nav_pages(nav: list | dict | str) -> list[str]:
    """The pages of a map of the site, in its order."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in nav_pages(part)]


def test_the_map_has_every_page_once():
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(nav_pages(SITE["nav"])) == sorted([*pages, *GENERATED, *OUTSIDE])


def test_pages_of_the_site_link_only_to_pages_of_the_site():
    shown = {f"docs/{name}": text for name, text in GENERATED.items()} | PAGES
    pages = {*shown, *("benchmarks/README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
    for name in [name for name in shown if name.startswith("docs/")]:
        links = re.findall(r"\]\(([^)\s#:]+\.md)", shown[name])
        targets = {posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) for link in links}
        assert targets <= pages, name


def test_links_of_the_site_alone_and_of_generated_pages_point_at_pages_and_headings(tmp_path):
    for name, text in {**PAGES, **{f"docs/{name}": text for name, text in GENERATED.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(re.sub(r"<!-- site: (.*?) -->", r"\1", text, flags=re.DOTALL))
    for picture in (ROOT / "docs" / "pictures").iterdir():
        (tmp_path / "docs" / "pictures").mkdir(exist_ok=True)
        (tmp_path / "docs" / "pictures" / picture.name).touch()
    made = [f"docs/{name}" for name in GENERATED]
    shown = [name for name in PAGES if name.startswith("docs/")]
    assert sum("<!-- site:" in PAGES[name] for name in shown) >= 3
    for name in [*made, *shown]:
        assert list(dead_links(name, (tmp_path / name).read_text(), tmp_path)) == [], name


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_reference_has_every_component_with_its_settings(name):
    kind = catalog.KINDS[name]
    page = GENERATED[f"reference/{kind.plural}.md"]
    components = reference.components(kind)
    assert components
    for name, component in components.items():
        parts = page.split(f"\n## {name}\n")
        if len(parts) == 1:
            assert f"| `{name}` |" in page, name  # in the table of the classifiers
            continue
        listed = {
            row[0].strip("`"): [cell.strip() for cell in row[1:3]] for row in rows(parts[1].split("\n## ")[0])[1:]
        }
        described = signatures.settings(component, kind.supplied)
        assert listed == {each.name: [each.type, shown_default(each.default)] for each in described}, name
        assert len(reference.about(component).split()) >= 4, name


def shown_default(text: str) -> str:
    """A default as a table shows it."""
    return text if text == signatures.REQUIRED else f"`{text}`"


def test_the_reference_s_kinds_are_those_of_the_component_table():
    table = {
        row[1].split("`")[1] for row in rows(PAGES["docs/extending.md"]) if len(row) == 3 and row[1].count("`") == 4
    }
    kinds = {name: kind.registry.partition(":")[2] for name, kind in catalog.KINDS.items()}
    assert set(kinds.values()) == table and set(kinds) - set(reference.PAGES) == {"export"}


def test_the_reference_has_every_verb_recipe_and_protocol():
    verbs, listed = GENERATED["reference/verbs.md"], GENERATED["reference/recipes.md"]
    assert re.findall(r"^## (\w+)$", verbs, re.MULTILINE) == list(cli.VERBS)
    shipped = [str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml")]
    for name in [*shipped, *PROTOCOLS]:
        (row,) = [row for row in rows(listed) if row[0] == f"`{name.removesuffix('/study.yaml')}`"]
        assert len(row[-1].split()) >= 4, row


@pytest.mark.parametrize("name", GENERATED)
def test_commands_in_generated_pages_are_of_known_verbs(name):
    assert all(command[0] in cli.VERBS for command in commands(GENERATED[name]))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (int | None, "integer or null"),
        (list[str] | str, "list of texts or text"),
        (tuple[int, int], "[integer, integer]"),
        (tuple[float, ...], "list of numbers"),
        (Literal["a", "b"], "`a`, `b`"),
        (Mapping[str, dict], "mapping of mappings"),
        (bool, "true or false"),
    ],
)
def test_types_are_told_as_a_recipe_has_them(kind, text):
    assert signatures.type_text(kind) == text


def test_a_setting_s_meaning_is_the_comment_beside_or_above_it():
    from fmdistill.mini.scenes import Scenes

    meanings = signatures.comments(Scenes)
    assert meanings["size"] == "pixels" and meanings["noise"] == "largest standard deviation, levels"
    assert signatures.comments(recipe.CacheSettings)["codec"].startswith("for training shards, since")
    assert "seed" not in meanings


def test_prose_is_shown_as_it_stands():
    assert reference.prose("w_i < a*b, `x_i`") == r"w\_i \< a\*b, `x_i`"


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        (recipe.Recipe, ""),
        (recipe.CacheSettings, "cache."),
        (recipe.Train, "train."),
        (objective.TermSettings, "objective.TERM."),
    ],
)
def test_the_settings_page_has_every_field_its_type_and_its_default(kind, prefix):
    listed = {row[0].strip("`"): row[1:3] for row in rows(PAGES["docs/settings.md"]) if len(row) == 4}
    listed.pop("key")
    shown = {name: cells for name, cells in listed.items() if name.rpartition(".")[0] == prefix.rstrip(".")}
    described = signatures.settings(kind)
    made = {f"{prefix}{each.name}": [each.type, shown_default(each.default)] for each in described}
    assert shown == made


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_outside(tmp_path):
    pytest.importorskip("material", reason="pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "WARNING -" not in done.stderr
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(pages) > 30 and (tmp_path / "search/search_index.json").is_file()
    assert "<!-- site:" not in "".join(pages.values())
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?(?:https?:)?//"""
    )
    assert [str(path) for path, text in pages.items() if loaded.search(text)] == []
    assert [str(path) for path in tmp_path.rglob("*.css") if re.search(r"url\([\"']?https?:", path.read_text())] == []
