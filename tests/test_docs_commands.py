"""The command line takes every command that a page shows in a block of its own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final

import click
import pytest

from onnxnorm.cli import cli

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK: Final = re.compile(r"^( *)```(?:sh|console|yaml)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
COMMAND: Final = re.compile(r"\bonnxnorm (?:optimize|inspect|compare|report|passes|ops)\b[^#\n]*")


def commands(page: str) -> list[str]:
    """The commands in the blocks of a page, in order; a folded value of YAML is one line."""
    found: list[str] = []
    for _, block in BLOCK.findall(page):
        steps = re.split(r"^ *- ", block, flags=re.MULTILINE)
        lines = [" ".join(s.split()) if s.startswith("run: >") else s for s in steps]
        found += COMMAND.findall("\n".join(lines).replace("\\\n", " "))
    return [command.strip() for command in found]


def parse(command: str) -> None:
    """Parse a command and do nothing of what it says."""
    _, name, *arguments = shlex.split(command)
    parsed = cli.get_command(click.Context(cli), name)
    assert parsed is not None
    parsed.make_context(name, arguments)


SHOWN: Final = [(page.name, each) for page in PAGES for each in commands(page.read_text("utf-8"))]


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_shown_command_is_one(page: str, command: str) -> None:
    try:
        parse(command)
    except click.UsageError as error:
        pytest.fail(f"{page}: {command}: {error.format_message()}")


def test_the_workflow_is_read_to_the_end() -> None:
    shown = [shlex.split(command)[1:4] for page, command in SHOWN if page == "ci.md"]
    models = ["model.onnx", "model.optimized.onnx"]
    assert shown == [[name, *models] for name in ("optimize", "compare") * 2]
    assert SHOWN[[page for page, _ in SHOWN].index("ci.md") + 3][1].endswith("latency.md")


@pytest.mark.parametrize("wrong", ["optimize a.onnx b.onnx --target cpu", "compare a.onnx"])
def test_another_one_is_not(wrong: str) -> None:
    with pytest.raises(click.UsageError):
        parse(f"onnxnorm {wrong}")
