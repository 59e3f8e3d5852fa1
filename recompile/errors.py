"""Errors that a user or a file can cause. Every message names the place, what was found and wanted, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from recompile.arguments import spell


class RecompileError(Exception):
    """Base of every error that a command turns into one line and exit code 1.

    The message names arguments as {name}, see recompile.arguments: in Python they read as they are spelled there, on
    the command line as flags.
    """

    @property
    def template(self) -> str:
        """The message with arguments as {name}."""
        return super().__str__()

    def __str__(self) -> str:
        return self.spelled({})

    def spelled(self, names: Mapping[str, str]) -> str:
        """The message with other names for the arguments that `names` has."""
        return spell(self.template, names)


class ArgumentError(RecompileError):
    """Arguments that contradict each other, or one that is not what is wanted."""


class RecipeError(RecompileError):
    """A recipe (override YAML) that cannot be read, or that does not fit the checkpoints it names."""


class CheckpointError(RecompileError):
    """A checkpoint that is missing, truncated, inconsistent or not what its config says."""


class FormatError(CheckpointError):
    """Stored parts of one module that their format does not allow (shapes, dtypes, values)."""


class MissingWeight(CheckpointError):
    """A tensor or module that a checkpoint does not hold."""


class MismatchError(RecompileError):
    """Two checkpoints, or a checkpoint and a tokenizer, that are not of the same model."""


class BudgetError(RecompileError):
    """A size budget that no choice can meet; the message gives the reachable range."""


class NotBetterError(RecompileError):
    """Work whose result is not better than what was there, with confidence, so that nothing was written."""


class NoTimeError(RecompileError):
    """What was asked for takes longer than the minutes that were given; nothing was written."""


class FitError(RecompileError):
    """Measurements that do not determine the law that was to be fitted to them."""


class JournalError(RecompileError):
    """A profile journal that belongs to another measurement, or that is damaged before its last line."""


class OutputError(RecompileError):
    """An output that cannot be written: it exists, it is an input, the disk is full or read-only."""


class UnsupportedError(RecompileError):
    """Something that is understood and not supported here; the message names the way out."""


class NotFiniteError(RecompileError):
    """A state, logit, cost or statistic that is NaN or infinite; the message names the model, the layer and the row.

    where: model and layer; row: number of the row, from 0, where it is known
    """

    def __init__(self, where: str, what: str, row: int | None = None) -> None:
        super().__init__(where, what, row)
        self.where, self.what, self.row = where, what, row

    @property
    def template(self) -> str:
        return f"{self.where}{'' if self.row is None else f', row {self.row + 1}'}: {self.what}"
