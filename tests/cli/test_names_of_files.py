"""Names that are none: of a variable that is not set, of a pipe that no command has, of where a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import recompile
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.model_report import main as model_report
from recompile.cli.recompile import main as recompile_command
from recompile.costs import open_journal
from recompile.errors import OutputError
from recompile.io.memory import format_mib
from tests import profiles, tiny
from tests.commands import refusal


@pytest.mark.parametrize("name", ["", "-"])
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (recompile_command, ("-i", "BASE", "-o", "NAME")),
        (recompile_command, ("-i", "NAME", "-o", "out")),
        (recompile_command, ("-i", "BASE", "-o", "out", "-or", "NAME")),
        (model_quantize, ("-i", "BASE", "-o", "NAME", "-b", 3)),
        (model_optimize, ("NAME", "-b", 3, "-o", "out.yaml")),
        (model_diff, ("-ma", "BASE", "-mb", "BASE", "-sla", "NAME")),
        (model_diff, ("-ma", "BASE", "-mb", "BASE", "--trace", "NAME")),
        (model_report, ("NAME",)),
    ],
)
def test_no_name_is_refused(
    command: Any, arguments: tuple[Any, ...], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [{"NAME": name, "BASE": tiny.base("llama-2")}.get(each, each) for each in arguments]
    assert f'"{name}" is no name of a file or directory' in refusal(command, *given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_an_output_does_not_take_the_place_of_where_it_runs(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be renamed over it: the shell would stand in a directory that is gone."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    said = refusal(recompile_command, "-i", tiny.base("llama-2"), "-o", out)
    assert "is, or holds, the directory that this runs in; give a name inside it" in said
    with pytest.raises(OutputError, match="the directory that this runs in"):
        recompile.merge(tiny.base("llama-2"), "")
    assert here.stat().st_ino == Path.cwd().stat().st_ino
    assert list(tmp_path.rglob("*")) == [here]


def test_a_page_is_of_one_profile(tmp_path: Path) -> None:
    one = tmp_path / "p.jsonl"
    made = profiles.make_profile()
    with open_journal(one, made.header) as journal:
        journal.append(made.measurements.values())
    said = refusal(model_report, one, one, "-o", tmp_path / "page.html")
    assert "is a profile, and a page is of one" in said


def test_less_than_a_mebibyte_is_not_said_to_be_none() -> None:
    assert (format_mib(1024), format_mib(3 << 20), format_mib(800 << 10)) == ("1024 bytes", "3 MiB", "1 MiB")
