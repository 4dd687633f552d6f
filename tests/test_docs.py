"""README, docs/ and CONTRIBUTING are checked against the code: tree, commands, links, paths, settings, components."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import fmdistill
from fmdistill import recipe

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fmdistill.__file__).parent
FILES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
RECIPES = [
    name for p in sorted((ROOT / "recipes").rglob("*.yaml")) for name in recipe.variants(str(p.relative_to(ROOT)))
]
PROTOCOLS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "eval").glob("*.yaml"))
FENCED = re.compile(r"^```.*?\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:accelerate launch -m )?(?:[^\s=]*/)?fmdistill (.*)")
PATH = re.compile(r"(?<![\w./{-])(?:recipes|eval|benchmarks|docs|tests|fmdistill)/[\w./*-]*[\w/*]")


def code_blocks(text: str) -> list[str]:
    """Fenced and indented code, one string per block."""
    indented = re.findall(r"(?:^(?: {4}.*)?\n)+", FENCED.sub("", text), re.MULTILINE)
    return FENCED.findall(text) + [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in indented]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `fmdistill ...` line in a code block, continuation lines joined, comments dropped."""
    lines = [line for block in code_blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(call[1], comments=True) for line in lines if (call := COMMAND.match(line))]


def inline_commands(text: str) -> list[list[str]]:
    """The arguments of every command in backticks: `fmdistill VERB ARGUMENT ...`; a verb alone only names it."""
    quoted = re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    calls = [shlex.split(call[1]) for span in quoted if (call := COMMAND.fullmatch(span))]
    return [call for call in calls if len(call) > 1]


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


def anchors(text: str) -> set[str]:
    """The anchors of the headings, as GitHub makes them: lower case, punctuation dropped, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def dead_links(name: str, text: str, root: Path) -> Iterator[str]:
    """The relative links of the page `name` that point at no file, or at no heading of it; comments are not shown."""
    shown = re.sub(r"<!--.*?-->", "", FENCED.sub("", text), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", shown)):
        path, _, anchor = target.partition("#")
        file = (root / name).parent / path if path else root / name
        if "://" in target or target.startswith("mailto:"):
            continue
        if not file.exists() or anchor and anchor not in anchors(file.read_text()):
            yield target


def missing_paths(text: str, root: Path) -> list[str]:
    """The files of the repository that the text names and that do not exist; NAME, PACKAGE and MODULE stand for any."""
    named = [path for path in PATH.findall(text) if not re.search("NAME|PACKAGE|MODULE", path)]
    return sorted({path for path in named if not any(root.glob(path.rstrip("/")))})


def rows(text: str) -> list[list[str]]:
    """The cells of every row of every table."""
    lines = re.findall(r"^\|(.*)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines if set(line) - set("|-")]


def test_the_readme_fits_on_two_screens():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_the_index_links_every_page():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", PAGES["docs/README.md"])) >= pages


def test_the_tree_lists_what_exists():
    assert tree(PAGES["CONTRIBUTING.md"]) == existing(PACKAGE)


def test_the_tree_is_read_as_a_person_reads_it(tmp_path):
    block = "recipes/   one\nfmdistill/\n  cache/     a\n             writer.py, b\n  cli.py     c\ntests/\n  deep/\n"
    text = f"x\n\n```\n{block}```\n"
    assert tree(text) == {"cache/", "cli.py"}
    for name in ("cache/__init__.py", "cli.py", "__init__.py", "weights/a.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert existing(tmp_path) == {"cache/", "cli.py"}


@pytest.mark.parametrize("name", PAGES)
def test_links_point_at_files_and_headings(name):
    assert list(dead_links(name, PAGES[name], ROOT)) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.md").write_text("# What `x.py` does, and why\n\n```\n# not a heading\n```\n")
    links = "[a](docs/a.md) [b](docs/a.md#what-xpy-does-and-why) [c](https://x.org/y) `registry[0](n)`"
    assert list(dead_links("README.md", links, tmp_path)) == []
    dead = "[a](docs/b.md) [b](docs/a.md#not-a-heading) [c](#here)\n"
    (tmp_path / "README.md").write_text(dead)
    assert list(dead_links("README.md", dead, tmp_path)) == ["docs/b.md", "docs/a.md#not-a-heading", "#here"]


@pytest.mark.parametrize("name", PAGES)
def test_paths_that_pages_name_exist(name):
    assert missing_paths(PAGES[name], ROOT) == []


def test_missing_paths_are_found(tmp_path):
    (tmp_path / "recipes/sam").mkdir(parents=True)
    (tmp_path / "recipes/sam/a.yaml").touch()
    text = "`recipes/sam/a.yaml`, recipes/sam/*.yaml (`recipes/sam/`), runs/docs/x, fmdistill/NAME.py: all fine."
    assert missing_paths(text, tmp_path) == []
    text += " recipes/sam/b.yaml; `tests/x.py`, docs/README.md."
    assert missing_paths(text, tmp_path) == ["docs/README.md", "recipes/sam/b.yaml", "tests/x.py"]


def test_commands_are_found():
    text = "Run `fmdistill no`:\n\n"
    text += "    fmdistill run a.yaml \\\n        k=v  # why\n\n```sh\n.venv/bin/fmdistill demo\n"
    text += "OMP_NUM_THREADS=2 fmdistill plan b.yaml\naccelerate launch -m fmdistill distill c.yaml\n```\n"
    assert commands(text) == [["demo"], ["plan", "b.yaml"], ["distill", "c.yaml"], ["run", "a.yaml", "k=v"]]
    assert inline_commands(f"{text} `fmdistill demo clip`, `python -m fmdistill x y`") == [["demo", "clip"]]


def all_commands(*verbs: str) -> list[list[str]]:
    """The commands of all pages, each once; with `verbs` those of them."""
    listed = [command for page in PAGES.values() for command in commands(page) + inline_commands(page)]
    distinct = {" ".join(command): command for command in listed}
    return [command for command in distinct.values() if not verbs or command[0] in verbs]


@pytest.mark.parametrize("arguments", all_commands(), ids=" ".join)
def test_commands_parse(arguments):
    from fmdistill import cli

    parsed = cli._parsed(arguments)  # settings may follow a flag
    assert parsed
    for name in arguments:
        if name.startswith("recipes/"):
            assert [recipe.load(one).out for one in recipe.variants(name)]
        elif name.endswith(".yaml") and name.startswith("eval/"):
            assert recipe.locate(name)


OF_RECIPES = all_commands("run", "plan", "bench", "cache", "verify", "distill", "check")


@pytest.mark.parametrize("arguments", [c for c in OF_RECIPES if c[1:] and c[1] in RECIPES], ids=" ".join)
def test_commands_of_recipes_bind_every_component(arguments):
    from fmdistill import pipeline

    verb, path, *settings = arguments
    # plan.images=8 is the verb's own; the shell puts in $SLURM_CPUS_PER_TASK
    settings = [setting for setting in settings if not setting.startswith(f"{verb}.")]
    settings = [re.sub(r"\$\w+", "8", setting) for setting in settings]
    assert pipeline.check_files([path], settings) == [path]


def test_commands_of_recipes_are_many():
    assert len(OF_RECIPES) > 30


OF_PROTOCOLS = [command for command in all_commands("evaluate") if command[1:] and command[1].startswith("eval/")]


@pytest.mark.parametrize("arguments", OF_PROTOCOLS, ids=" ".join)
def test_protocols_of_commands_take_their_settings(arguments, tmp_path, monkeypatch):
    from fmdistill import evaluate

    settings = recipe.parse_overrides(setting for setting in arguments[2:] if "=" in setting)
    for name in ("recipe", "store"):  # of the command, not of the protocol
        settings.pop(name, None)
    monkeypatch.chdir(tmp_path)
    for name in (value for value in settings.values() if str(value).endswith(".txt")):
        Path(name).write_text("a {}\n")
    assert evaluate.load(arguments[1], settings).name


def test_the_images_page_s_commands_bind_and_it_lists_every_suffix():
    from fmdistill import images
    from fmdistill.images.picture import FORMATS

    page = PAGES["docs/images.md"]
    assert len(commands(page)) > 3
    for arguments in commands(page):
        images.check(recipe.load(arguments[1], arguments[2:]).images)
    assert all(f"`{suffix}`" in page for suffixes in FORMATS.values() for suffix in suffixes)


def test_the_cluster_page_s_executors_bind():
    from fmdistill.cache import executors

    page = PAGES["docs/cluster.md"]
    assert len(commands(page)) > 3
    for arguments in commands(page):
        loaded = recipe.load(arguments[1], arguments[2:])
        assert loaded.cache and executors.check(loaded.cache.executor)
    (snippet,) = [block for block in code_blocks(page) if block.startswith("cache:")]
    assert executors.check(yaml.safe_load(snippet)["cache"]["executor"])


def test_the_recipe_of_the_quick_start_and_the_study_of_the_comparing_page_bind(tmp_path, monkeypatch):
    from fmdistill import pipeline

    (tmp_path / "mine").mkdir()
    for page, file in (("quick_start", "mine.yaml"), ("comparing", "mine/study.yaml")):
        (block,) = [block for block in FENCED.findall(PAGES[f"docs/{page}.md"]) if block.startswith("extends:")]
        (tmp_path / file).write_text(block)
    monkeypatch.chdir(tmp_path)
    assert pipeline.check_files(["mine.yaml"]) == ["mine.yaml"]
    assert recipe.variants("mine") == ["mine:mse", "mine:srw_half", "mine:mining"]
    assert len(pipeline.check_files(["mine"])) == 3


def test_make_targets_exist():
    made = {
        name: set(re.findall(r"^make (\w+)", "\n".join(code_blocks(page)), re.MULTILINE))
        for name, page in PAGES.items()
    }
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= made["README.md"] and set().union(*made.values()) <= targets


def test_settings_that_may_change_are_those_of_the_running_page():
    from fmdistill import distill

    page = re.split(r"the weights may change:", PAGES["docs/running.md"])[1]
    told = set(re.findall(r"`([\w.]+)`", page)) - {"images"}
    assert told == recipe.free_settings() | distill.FREE


def test_the_component_table_is_the_registries():
    table = [row for row in rows(PAGES["docs/extending.md"]) if len(row) == 3 and row[1].count("`") == 4]
    assert len(table) == 12
    for _, place, names in table:
        registry, file = re.findall(r"`([^`]+)`", place)
        module = importlib.import_module(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        assert set(re.findall(r"`(\w+)`", names)) == set(getattr(module, registry)), registry


def test_the_objectives_page_names_every_method():
    from fmdistill.distill import distances, rectifiers, weightings

    of_part = {row[0].strip("`"): set(re.findall(r"`(\w+)`", row[1])) for row in rows(PAGES["docs/objectives.md"])}
    assert of_part["distance"] >= set(distances.DISTANCES)
    assert of_part["weighting"] >= set(weightings.WEIGHTINGS)
    assert of_part["rectify"] == set(rectifiers.RECTIFIERS)


def test_the_twenty_lines_are_a_weighting_of_mean_one(tmp_path, monkeypatch):
    from fmdistill import pipeline
    from fmdistill.distill.seen import Seen

    page = PAGES["docs/extending.md"]
    (code,) = [block for block in FENCED.findall(page) if "class Hard" in block]
    (settings,) = [block for block in FENCED.findall(page) if block.startswith("extends:")]
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "hard.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert pipeline.check_files(["hard.yaml"]) == ["hard.yaml"]
    assert len(code.splitlines()) <= 20
    valid = torch.tensor([[True, True, False], [True, True, True]])
    distance_BN = torch.tensor([[1.0, 3.0, 9.0], [0.0, 0.0, 2.0]])
    weight_BN = sys.modules["mine"].Hard()(distance_BN, Seen(outputs={}, valid=valid))
    assert torch.allclose(weight_BN, torch.tensor([[0.5, 1.5, 0.0], [0.0, 0.0, 3.0]]), atol=1e-5)
    monkeypatch.delitem(sys.modules, "mine")


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
