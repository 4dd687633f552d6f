"""The troubleshooting page lists messages that the package really has, and the machine's."""

import ast
import errno
import os
import re
from pathlib import Path

import pytest

from fmdistill.cli import failures

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
VARIES = "…"
PATTERNS = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def template(node: ast.AST) -> str:
    """The text of a message, with … for each value that is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return VARIES


def templates(source: str) -> list[str]:
    """The messages of all UserErrors that a source file makes."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    errors = [call for call in calls if ast.unparse(call.func).rpartition(".")[2] == "UserError" and call.args]
    return [template(call.args[0]) for call in errors]


MESSAGES = [message for path in sorted((ROOT / "fmdistill").rglob("*.py")) for message in templates(path.read_text())]


def test_the_page_has_at_least_twenty_messages_each_once():
    assert len(PATTERNS) >= 20 and len(set(PATTERNS)) == len(PATTERNS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_message_is_one_of_the_package_s(pattern):
    assert any(message.startswith(pattern) for message in MESSAGES)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_message_is_followed_by_what_it_means(pattern):
    section = PAGE.split(f"### `{pattern}`\n")[1].split("\n#")[0]
    assert len(section.split()) >= 8


def test_the_machine_s_messages_are_those_that_the_command_line_prints():
    import torch

    printed = [
        failures.line(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        failures.machine(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "cache"),
        failures.machine(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "distill"),
        (ROOT / "fmdistill/cli/__init__.py").read_text(),
    ]
    told = re.findall(r"^\| `(.+?)` \|", PAGE.split("## Messages of the machine")[1], re.MULTILINE)
    assert len(told) == len(printed)
    assert [message for message, line in zip(told, printed, strict=True) if message not in str(line)] == []


def test_a_message_is_read_as_it_is_printed():
    source = 'raise UserError(f"{path}: no {kind} here; " f"run it" + rest)\nraise registry.UserError("plain")'
    assert templates(source) == ["…: no … here; run it…", "plain"]
