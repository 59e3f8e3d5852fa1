"""The pages: made ones are what the code says, links lead somewhere, commands shown are such as the commands take."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest

from tests.conftest import load_script

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")])
MADE = ("commands.md", "report-schema.md")


def make_docs() -> ModuleType:
    return load_script("make_docs")


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


def test_the_first_page_has_the_table_of_the_demo() -> None:
    """Header, builds and paired lines are those that scripts/demo prints today, whatever its figures were."""
    demo = load_script("demo")
    report = {"bpw": 3.5, "total_bytes": 2**26, "kl": {"mean": 0.3, "std_error": 0.02}, "kl_rows": [0.2, 0.4, 0.3]}
    report |= {name: {"perplexity": 14.5} for name in ("score_reference", "score_candidate")}
    report["top_k_agreement"] = [{"mean": 0.75}]
    labels = [f"uniform {bits} bit, GPTQ" for bits in demo.BITS]
    labels += [demo.PRESET_BUILD, demo.EDITED_BUILD, demo.MIX, demo.HEALED]
    printed = demo.table([demo.Build(label, report) for label in labels], 2**28)
    shape = [re.sub(r"[-+]?\d[\d.]*|-{2,}| {2,}", " ", line).split() for line in printed.split("\n") if line]
    page = [line for line in (ROOT / "README.md").read_text().split("\n") if line.startswith("    ")]
    start = next(number for number, line in enumerate(page) if line.split()[:2] == ["build", "bpw"])
    found = page[start : start + len(shape)]
    assert [re.sub(r"[-+]?\d[\d.]*|-{2,}| {2,}", " ", line).split() for line in found] == shape
