"""Which rows something was made of: kept in reports and journals, so that no row is used in two roles.

Builds say so in their quantize_report.json and heal_report.json (healed GGUF files in a key), profiles in their header.
Documents are what counts: the prompt of a row of a trace, the texts of a row of text, the tokens of a row that came as
such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.errors import MismatchError
from recompile.events import Note, OnEvent, ignore
from recompile.gguf.container import is_gguf, open_gguf
from recompile.io.files import parse_json, read_json

if TYPE_CHECKING:
    from recompile.model.tokens import Rows

REPORTS = ("quantize_report.json", "heal_report.json")
HEAL_KEY = "recompile.heal"  # of a healed GGUF file: its report
NAMED = 3  # documents that a message names


@dataclass(frozen=True)
class UsedRows:
    """Rows in a role; documents: of every row, several joined by "+"."""

    role: str
    documents: tuple[str, ...]
    source: str = ""
    positions: str = "all"
    sha256: str = ""

    @staticmethod
    def of(rows: Rows, role: str) -> UsedRows:
        return UsedRows(role, rows.documents, rows.source, rows.positions, rows.sha256)

    @property
    def parts(self) -> frozenset[str]:
        """Single documents: a row may be joined of several."""
        return frozenset(part for document in self.documents for part in document.split("+"))


def recorded_rows(folders: Iterable[Path]) -> list[tuple[str, UsedRows]]:
    """What builds say that they were made of, each with the file that says it. Builds of other tools say nothing."""
    found = []
    for folder in folders:
        if is_gguf(folder):
            report = open_gguf(folder).value(HEAL_KEY)
            if isinstance(report, str):
                found += [(str(folder), used) for used in _read(parse_json(report, f"{folder}: {HEAL_KEY}"))]
            continue
        for name in REPORTS:
            path = folder / name
            if path.is_file():
                found += [(str(path), used) for used in _read(read_json(path))]
    return found


def _read(report: Any) -> list[UsedRows]:
    """The records of a report; none where it has none, as those of earlier versions."""
    stored = report.get("rows") if isinstance(report, dict) else None
    records = stored if isinstance(stored, list) else [stored]
    return [
        UsedRows(str(one["role"]), tuple(map(str, one["documents"])))
        for one in records
        if isinstance(one, dict) and isinstance(one.get("documents"), list) and "role" in one
    ]


def check_apart(rows: Rows, role: str, others: Sequence[tuple[str, UsedRows]], on_event: OnEvent = ignore) -> None:
    """Raise MismatchError where a row was used in another role than it is to be used in now.

    others: (where it is said, rows) each. Rows that have no role of their own, as of a text that someone chose to
    measure on, are not refused but named in a warning.
    """
    mine = UsedRows.of(rows, role)
    for place, used in others:
        common = sorted(mine.parts & used.parts) if used.role != role else []
        if not common:
            continue
        names = ", ".join(common[:NAMED]) + (", ..." if len(common) > NAMED else "")
        said = (
            f"{rows.source}: {len(common)} documents ({names}) have the role {role} here, and {place} says that they "
            f"were used in the role {used.role}"
        )
        if rows.role == "all":
            on_event(Note(f"{said}; what is measured on them is too good", "Warning"))
            continue
        raise MismatchError(f"{said}; a row has one role: use the trace or text that was used before, or another")
