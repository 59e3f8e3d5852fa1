"""Whatever fails under a command: one line, exit code 1, nothing that a file says moves the cursor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from recompile.cli.common import command, print_json
from recompile.errors import RecompileError
from recompile.io.files import read_json
from recompile.io.report import format_columns


def made(work: Callable[..., Any]) -> click.Command:
    @command("try_it", outputs={"--json": "json_path"}, inputs=("model",))
    @click.option("--model")
    @click.option("--json", "json_path")
    @click.option("--minutes", type=float)
    @click.option("--rtol", type=click.FloatRange(min=0, min_open=True))
    @click.option("--rows", default=3)
    @click.option("--seed", default=0)
    def main(**options: Any) -> None:
        work(**options)

    return main


def fail(error: BaseException) -> Callable[..., None]:
    def work(**_: Any) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RecompileError("x.yaml:3: wrong"), 1, r"^Error: x.yaml:3: wrong\n$"),
        (RecompileError("a\x1b]0;b\x07\u202e"), 1, r"^Error: a\\u001b\]0;b\\u0007\\u202e\n$"),
        (RecompileError("no " + "x" * 5000 + " here"), 1, r"^Error: no x{300}\[\.\.\.\]x{100} here\n$"),
        (KeyError("hidden_size"), 1, r"unforeseen: KeyError: 'hidden_size'; the details were written to (\S+)\n$"),
        (RecursionError("deep"), 1, r"unforeseen: RecursionError"),
        (MemoryError(), 1, r"there is not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, r"there is not enough memory"),
        (OSError(28, "No space left on device", "out/x"), 1, r"^Error: out/x: No space left on device\n$"),
        (AssertionError(), 1, r"unforeseen: AssertionError"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), 1, r"unforeseen: UnicodeEncodeError"),
        (KeyboardInterrupt(), 130, r"interrupted"),
    ],
)
def test_any_failure_is_one_message(error: BaseException, code: int, says: str) -> None:
    result = CliRunner().invoke(made(fail(error)), [])
    assert result.exit_code == code
    found = re.search(says, result.output)
    assert found, result.output
    assert "Traceback" not in result.output
    if found.groups():
        assert "Traceback" in Path(found[1]).read_text()
        Path(found[1]).unlink()


def test_what_was_read_last_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def work(**_: Any) -> None:
        read_json(tmp_path / "config.json")["hidden_size"]

    assert f"after reading {tmp_path / 'config.json'}: unforeseen" in CliRunner().invoke(made(work), []).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minutes", "nan"],
        ["--minutes", "-3"],
        ["--minutes", "0"],
        ["--minutes", "inf"],
        ["--minutes", "1e308"],
        ["--rtol", "nan"],
        ["--rtol", "inf"],
        ["--rtol", "1e308"],
        ["--rtol", "0"],
        ["--rows", "-5"],
        ["--rows", "0"],
        ["--rows", "9" * 30],
        ["--seed", "-1"],
    ],
)
def test_numbers_are_finite_and_positive(arguments: list[str]) -> None:
    result = CliRunner().invoke(made(lambda **_: None), arguments)
    assert result.exit_code == 2
    assert arguments[0] in result.output
    assert CliRunner().invoke(made(lambda **_: None), ["--seed", "0", "--minutes", "0.5"]).exit_code == 0


def test_outputs_are_compared_with_inputs(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    work = made(lambda json_path, **_: print_json(json_path, {"kl": 1.0}))
    mine = tmp_path / "r.json"
    mine.write_text('{"of": "the user"}')

    def run(path: Path, *more: str) -> tuple[int, str]:
        arguments = ["--json", str(path), "--model", f"4={tmp_path / 'm'}", *more]
        result = CliRunner().invoke(work, arguments)
        return result.exit_code, result.output

    for more in ((), ("--force",)):
        code, output = run(tmp_path / "m" / "config.json", *more)
        assert (code, "is never written over" in output) == (1, True)
        assert (tmp_path / "m" / "config.json").read_text() == "{}"
    code, output = run(mine)
    assert (code, "--force" in output) == (1, True)
    assert mine.read_text() == '{"of": "the user"}'
    assert run(mine, "--force")[0] == 0
    assert json.loads(mine.read_text())["kl"] == 1.0
    assert run(mine)[0] == 0  # made by this tool


def test_tables_keep_their_rows() -> None:
    assert format_columns([("a\nb", "\x1b[2J"), ("c", "d")]) == "a\\nb  \\u001b[2J\nc     d"
