"""Texts that name arguments: as Python spells them, and as the flags of a command."""

from __future__ import annotations

import copy
import json
import pickle

import click
import pytest
from click.testing import CliRunner

from recompile.arguments import Worded, respell, spell
from recompile.errors import BudgetError, NotFiniteError, RecompileError, UnsupportedError
from recompile.io.report import to_json

FLAGS = {"dense": "--dense", "out": "--out-dir", "probe=False": "--no-probe"}


@pytest.mark.parametrize(
    ("template", "python", "flags"),
    [
        ("with {dense} to another {out}", "with dense to another out", "with --dense to another --out-dir"),
        ("({probe=False} skips it)", "(probe=False skips it)", "(--no-probe skips it)"),
        ("{id: 4} and {layer}/{dense }", "{id: 4} and {layer}/{dense }", "{id: 4} and {layer}/{dense }"),
        ("{level} is not in the table", "level is not in the table", "level is not in the table"),
    ],
)
def test_every_error_spells_arguments(template: str, python: str, flags: str) -> None:
    assert spell(template, {}) == python
    for kind in (RecompileError, BudgetError, UnsupportedError):
        assert (str(kind(template)), kind(template).spelled(FLAGS)) == (python, flags)
    error = NotFiniteError("base: layer 1", template, row=2)
    assert str(error) == f"base: layer 1, row 3: {python}"
    assert error.spelled(FLAGS) == f"base: layer 1, row 3: {flags}"
    assert pickle.loads(pickle.dumps(error)).spelled(FLAGS) == error.spelled(FLAGS)


def test_texts_of_reports_and_events_do() -> None:
    text = Worded("re-encoded ({dense})")
    assert text == "re-encoded (dense)"
    assert respell(text, FLAGS) == "re-encoded (--dense)"
    assert respell("{dense}", FLAGS) == "{dense}", "a plain text is what it is"
    for copied in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert respell(copied, FLAGS) == "re-encoded (--dense)"
    assert json.loads(to_json({"notes": [text]}))["notes"] == ["re-encoded (dense)"]
    assert json.loads(to_json({"notes": [text]}, FLAGS))["notes"] == ["re-encoded (--dense)"]


def test_commands_put_their_long_flags() -> None:
    from recompile.cli.common import Screen, command, print_json
    from recompile.events import Note, Said

    @command("some")
    @click.option("-gp", "--gen-prompt", "--gen_prompt", is_flag=True)
    @click.option("--probe/--no-probe", default=True)
    @click.option("-x", "length")
    def some(**options: object) -> None:
        with Screen() as screen:
            screen(Note(Worded("drawn with {pairs}"), "Warning"))
            screen(Said(Worded("under {max_kl}")))
        print_json("-", {"note": Worded("{gen_prompt}")})
        raise BudgetError("{gen_prompt}, {length}, {probe=False}; in another command {recipe} or {importance=False}")

    found = CliRunner().invoke(some, [])
    assert found.exit_code == 1
    assert found.stderr.splitlines() == [
        "Warning: drawn with --pairs",
        "under --max-kl",
        "Error: --gen-prompt, -x, --no-probe; in another command --override or --no-importance",
    ]
    assert json.loads(found.stdout)["note"] == "--gen-prompt"
