"""The pages: made ones are what the code says, links lead somewhere, commands shown are such as the commands take."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")])
MADE = ("commands.md", "report-schema.md")


def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MADE)
def test_made_pages_are_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == make_docs().PAGES[name](), "run python scripts/make_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def shown_commands(page: Path) -> list[list[str]]:
    """Words of every command line in a code block, comments and continuations resolved."""
    text = page.read_text().replace("\\\n", " ")
    names = "|".join(make_docs().COMMANDS)
    found = []
    for line in re.findall(rf"^(?: {{4}}|)((?:{names}) +[-\w].*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if len(words) > 1 and (words[1].startswith("-") or "." in words[1]):
            found.append(words)
    return found


def test_commands_are_shown() -> None:
    assert sum(len(shown_commands(page)) for page in PAGES if page.name not in MADE) > 40
    for name in {name.split()[0] for name in make_docs().COMMANDS}:
        assert any(words[0] == name for words in shown_commands(ROOT / "README.md")), name


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in MADE], ids=lambda page: page.name)
def test_every_command_shown_is_one_that_the_command_takes(page: Path) -> None:
    for words in shown_commands(page):
        command = importlib.import_module(f"recompile.cli.{words[0]}").main
        try:
            command.make_context(words[0], words[1:])
        except click.UsageError as error:
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")


def test_the_first_page_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
