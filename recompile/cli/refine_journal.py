"""The journal of a refining search: one line a step, so that an interrupted run goes on from its best choice."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recompile.errors import JournalError
from recompile.optimize.refine import FIRST_DAMPING, RefineStep

if TYPE_CHECKING:
    from recompile.cli.search import Search


@dataclass
class RefineJournal:
    """An open journal. `choice`, `damping` and `steps` are where the search stands."""

    path: Path
    file: IO[str]
    choice: dict[str, str]
    damping: float = FIRST_DAMPING
    steps: int = 0  # linearisations begun

    @staticmethod
    def open(path: Path, search: Search, rows_sha256: str) -> RefineJournal:
        """Begin a journal, or go on with one of the same profile, limits, start and rows.

        A journal of another search is begun anew: what it holds is a recipe that was written already. A line cut off
        by a crash is dropped. Raises JournalError where it cannot be written.
        """
        key = _key(search, rows_sha256)
        lines: list[dict[str, Any]] = []
        try:
            if path.exists():
                for line in path.read_text(encoding="utf-8").splitlines():
                    try:
                        lines.append(json.loads(line))
                    except json.JSONDecodeError:
                        break
            if not lines or lines[0].get("key") != key:
                lines = []
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines or [{"key": key}]), encoding="utf-8")
            partial.replace(path)
            journal = RefineJournal(path, path.open("a", encoding="utf-8"), dict(search.start))
        except (OSError, UnicodeDecodeError) as error:
            raise JournalError(f"{path}: cannot be written: {error}; choose another -o, or remove it") from error
        for kept in lines[1:]:
            journal.choice, journal.damping, journal.steps = dict(kept["choice"]), kept["damping"], kept["step"] + 1
        return journal

    def append(self, step: RefineStep) -> None:
        """Keep a step; on disk when this returns. Raises JournalError."""
        self.choice, self.damping, self.steps = dict(step.choice), step.damping, step.step + 1
        line = {
            "step": step.step,
            "accepted": step.accepted,
            "damping": step.damping,
            "bits": step.bits,
            "kl_nats": step.kl_nats,
            "change_nats": step.change_nats,
            "change_std_error": step.change_std_error,
            "moved": step.moved,
            "predicted_nats": step.predicted_nats,
            "choice": dict(step.choice),
        }
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be written: {error.strerror or error}; make room") from error

    def __enter__(self) -> RefineJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _key(search: Search, rows_sha256: str) -> str:
    from recompile.optimize.choose import profile_sha256

    limits = [(row.name, row.limit, row.fixed) for row in search.limits]
    text = json.dumps([profile_sha256(search.profile), limits, dict(search.start), rows_sha256])
    return hashlib.sha256(text.encode()).hexdigest()
