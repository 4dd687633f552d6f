"""README and docs/ are checked against the code: the tree, commands, and the recipes and protocols they speak of."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

import fmdistill
from fmdistill import recipe

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fmdistill.__file__).parent
README = (ROOT / "README.md").read_text()
CLUSTER, IMAGES = ((ROOT / f"docs/{name}.md").read_text() for name in ("cluster", "images"))
STUDIES = sorted((ROOT / "recipes/studies").iterdir())
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").rglob("*.md")))]
PAGES += [(study / "README.md").read_text() for study in STUDIES]
RECIPES = [
    name for p in sorted((ROOT / "recipes").rglob("*.yaml")) for name in recipe.variants(str(p.relative_to(ROOT)))
]
PROTOCOLS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "eval").glob("*.yaml"))


def code_blocks(text: str) -> list[str]:
    """Fenced and indented code, one string per block."""
    fenced = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^(?: {4}.*)?\n)+", fenced.sub("", text), re.MULTILINE)
    return fenced.findall(text) + [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in indented]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `fmdistill ...` line in a code block, continuation lines joined, comments dropped."""
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    calls = [re.match(r"\s*(?:\$ )?(?:\S*/)?fmdistill (.*)", line) for line in lines]
    return [shlex.split(call[1], comments=True) for call in calls if call]


def tree(text: str) -> set[str]:
    """What the annotated tree names directly under `fmdistill/`: "cache/", "recipe.py"."""
    (block,) = [b for b in code_blocks(text) if re.search(r"^fmdistill/", b, re.MULTILINE)]
    below = re.split(r"^fmdistill/.*\n", block, maxsplit=1, flags=re.MULTILINE)[1]
    inside = re.match(r"(?:[ \t]+.*\n?|\n)*", below)
    assert inside
    return set(re.findall(r"^ {2}(\w+(?:/|\.py))", inside[0], re.MULTILINE))


def existing(package: Path) -> set[str]:
    """The modules and packages directly in `package`."""
    modules = {p.name for p in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    return modules | {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}


def test_the_tree_lists_what_exists():
    assert tree(README) == existing(PACKAGE)


def test_the_tree_is_read_as_a_person_reads_it(tmp_path):
    block = "recipes/   one\nfmdistill/\n  cache/     a\n             writer.py, b\n  cli.py     c\ntests/\n  deep/\n"
    text = f"x\n\n```\n{block}```\n"
    assert tree(text) == {"cache/", "cli.py"}
    for name in ("cache/__init__.py", "cli.py", "__init__.py", "weights/a.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert existing(tmp_path) == {"cache/", "cli.py"}


def test_commands_are_found():
    text = "Run `fmdistill no`:\n\n"
    text += "    fmdistill run a.yaml \\\n        k=v  # why\n\n```sh\n.venv/bin/fmdistill demo\n```\n"
    assert commands(text) == [["demo"], ["run", "a.yaml", "k=v"]]


@pytest.mark.parametrize("arguments", [command for page in PAGES for command in commands(page)], ids=" ".join)
def test_commands_parse(arguments):
    from fmdistill import cli

    parsed = cli._parsed(arguments)  # settings may follow a flag
    assert parsed
    for name in arguments:
        if name.startswith("recipes/"):
            assert [recipe.load(one).out for one in recipe.variants(name)]
        elif name.endswith(".yaml") and name.startswith("eval/"):
            assert recipe.locate(name)


def test_the_images_page_s_commands_bind_and_it_lists_every_suffix():
    from fmdistill import images
    from fmdistill.images.picture import FORMATS

    assert len(commands(IMAGES)) > 3
    for arguments in commands(IMAGES):
        images.check(recipe.load(arguments[1], arguments[2:]).images)
    assert all(f"`{suffix}`" in IMAGES for suffixes in FORMATS.values() for suffix in suffixes)


def test_the_cluster_page_s_executors_bind():
    from fmdistill.cache import executors

    for arguments in commands(CLUSTER):
        loaded = recipe.load(arguments[1], arguments[2:])
        assert loaded.cache and executors.check(loaded.cache.executor)
    (snippet,) = [block for block in code_blocks(CLUSTER) if block.startswith("cache:")]
    assert executors.check(yaml.safe_load(snippet)["cache"]["executor"])


def test_make_targets_exist():
    made = set(re.findall(r"^make (\w+)", "\n".join(code_blocks(README)), re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert made and made <= targets


@pytest.mark.parametrize("path", RECIPES)
def test_recipes_load(path):
    loaded = recipe.load(path)
    assert loaded.out
    for protocol in loaded.protocols:
        assert recipe.locate(protocol)


@pytest.mark.parametrize("path", PROTOCOLS)
def test_protocols_load(path):
    assert recipe.read_yaml(ROOT / path)["name"]


def test_there_are_recipes_and_protocols():
    assert "recipes/sam/mobilesam_srw.yaml" in RECIPES and "recipes/demo/sam_srw.yaml" in RECIPES
    assert "eval/sam_grid_miou.yaml" in PROTOCOLS
