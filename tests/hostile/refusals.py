"""Commands on hostile files: refused in one clear message, quickly, and with nothing of the user's changed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import click
from click.testing import CliRunner

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x9b\u202a-\u202e\u2066-\u2069]")
SLOWEST_SECONDS = 20  # of CPU: what takes longer reads something quadratically, or waits


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = os.lstat(path)
        if not path.is_dir():
            found[str(path.relative_to(folder))] = (status.st_size, status.st_mtime_ns)
    return found


def run_on(command: click.Command, *arguments: object) -> tuple[int, str]:
    """The exit code and what was printed; no exception, no control character, no long wait."""
    began = time.process_time()
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert time.process_time() - began < SLOWEST_SECONDS
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert "unforeseen" not in result.output, result.output
    assert CONTROL.search(result.output) is None
    return result.exit_code, result.output


def refuses(folder: Path, command: click.Command, *arguments: object, names: str) -> str:
    """A command that has to refuse: exit code 1 (2 for an option), the file named, nothing changed or left."""
    before = snapshot(folder)
    code, output = run_on(command, *arguments)
    assert code in (1, 2), output
    message = output[output.index("Error: ") :] if "Error: " in output else ""
    assert names in message, output
    assert len(message) < 1500
    assert snapshot(folder) == before
    return message
