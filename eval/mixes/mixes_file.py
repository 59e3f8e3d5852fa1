"""The file beside a recipe that keeps what was measured of whole mixes (eval.mixes.measured); needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recompile.io.journal import LineJournal

KIND = "recompile-mixes"


class MixesFile:
    """The file of measured mixes, held by one run from the first use on, so that a second run on the same output is
    refused before it measures anything. Several MeasuredMixes of one run share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal: LineJournal | None = None
        self._values: list[Any] = []

    def values(self) -> list[Any]:
        """All lines, the header first. Raises JournalError, also where another process holds the file."""
        self._open()
        return list(self._values)

    def append(self, line: dict[str, Any]) -> None:
        """On disk when this returns. Raises JournalError."""
        journal = self._open()
        if not self._values:
            header = {"kind": KIND, "version": 1}
            journal.begin(header)
            self._values.append(header)
        journal.append(line)
        self._values.append(line)

    def _open(self) -> LineJournal:
        if self._journal is None:
            journal = LineJournal(self.path)
            try:
                self._values = journal.values()
            except BaseException:
                journal.close()
                raise
            self._journal = journal
        return self._journal

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
