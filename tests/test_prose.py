"""Every name in backticks in a docstring or comment is one that the code has."""

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fmdistill"
OUTSIDE = {"TimmModel"}  # names of other packages that the code itself does not use
QUOTED = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(tree: ast.Module) -> dict[int, tuple[int, str]]:
    """Return the line and the text of each docstring by the identity of its node."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None]
    values = [node.body[0].value for node in nodes]  # type: ignore[union-attr]
    return {id(value): (value.lineno, value.value) for value in values}


def names(tree: ast.Module) -> Iterator[str]:
    """Yield every name that the code defines, uses, or has in a text other than a docstring."""
    prose = docstrings(tree)
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield from value.split(".")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield from re.findall(r"\w+", node.value)


def quoted(text: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the content of each pair of backticks in docstrings and comments."""
    for line, prose in docstrings(tree).values():
        yield from ((line, found) for found in QUOTED.findall(prose))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield from ((token.start[0], found) for found in QUOTED.findall(token.string))


def unknown(files: dict[str, str]) -> list[str]:
    """Return the place of each quoted name that none of `files`, text by path, has."""
    trees = {path: ast.parse(text) for path, text in files.items()}
    known = {name for tree in trees.values() for name in names(tree)} | {*keyword.kwlist, *OUTSIDE}
    known |= {part for path in files for part in Path(path).with_suffix("").parts}
    return [
        f"{path}:{line}: `{found}`"
        for path, text in files.items()
        for line, found in quoted(text, trees[path])
        if any(word not in known and not word.startswith("__") for word in re.findall(r"[A-Za-z_]\w*", found))
    ]


def test_every_quoted_name_exists():
    files = {str(path.relative_to(PACKAGE.parent)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    assert unknown(files) == []


def test_a_quoted_name_that_does_not_exist_is_found():
    text = '"""Calls `run` and `_gone(x)`."""\n\n\ndef run(x):\n    return x  # `run` and `lost` say why\n'
    assert unknown({"a/b.py": text}) == ["a/b.py:1: `_gone(x)`", "a/b.py:5: `lost`"]


def test_no_two_classes_share_a_name():
    defined: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                defined.setdefault(node.name, []).append(path.name)
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


PRIVATE = {"found", "there", "ours", "said", "asked"}  # words that say where a value was met, not what it is


def test_no_identifier_is_a_word_of_private_language():
    used = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for field in ("id", "arg", "attr", "name"):
                if getattr(node, field, None) in PRIVATE:
                    used.add(f"{path.name}: {getattr(node, field)}")
    assert used == set()
