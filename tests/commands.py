"""Commands as tests call them."""

from __future__ import annotations

from click import Command
from click.testing import CliRunner


def run(command: Command, *arguments: object) -> str:
    """What a command that has to work says."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refusal(command: Command, *arguments: object) -> str:
    """What a command that has to refuse says, in one line."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code in (1, 2), result.output  # 2: an option that is wrong by itself
    return " ".join(result.output.split())
