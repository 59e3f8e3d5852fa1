"""Reports as JSON, and rows of text in columns."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recompile import __version__
from recompile.arguments import respell
from recompile.io.files import write_text
from recompile.io.printable import printable

# kind of picture -> what matplotlib writes into the file: that this tool made it, so that it may be replaced; no date,
# so that the same data gives the same bytes
PICTURE_METADATA: Mapping[str, dict[str, str | None]] = {
    "png": {"Software": None, "made_by": "recompile"},
    "svg": {"Date": None, "Description": "made_by: recompile"},
}


def to_plain(value: Any, names: Mapping[str, str] | None = None) -> Any:
    """A report as JSON values: dataclasses by their fields, paths as text, what is not finite as null.

    names: how texts spell arguments, as in recompile.arguments
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name), names)
            for field in dataclasses.fields(value)
            if not field.name.startswith("_")
        }
    if isinstance(value, Mapping):
        return {str(key): to_plain(item, names) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item, names) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return respell(value, names or {})
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch values, without importing either
        return to_plain(value.tolist(), names)
    return str(value)


def to_json(report: Any, names: Mapping[str, str] | None = None) -> str:
    """As to_plain, as text that names this tool, so that the file is known as one that may be replaced."""
    plain = to_plain(report, names)
    if isinstance(plain, dict):
        plain = {"made_by": f"recompile {__version__}", **plain}
    return json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(path: str | os.PathLike[str], report: Any) -> None:
    """Write a report as JSON, the file as a whole. Raises OutputError if it cannot be written."""
    write_text(Path(path), to_json(report))


def role_in_words(role: str, positions: str = "all") -> str:
    """What rows are for and what of them counts, to go on a name of theirs: ", role report, response tokens only"."""
    said = f", role {role}" if role not in ("", "all") else ""
    return f"{said}, response tokens only" if positions == "response" else said


def with_error(value: float | None, std_error: float | None, spec: str = ".6f") -> str:
    """A figure and its standard error, where there is one: "0.250000 ± 0.010000"; "-" where there is no figure."""
    if value is None:
        return "-"
    return format(value, spec) + (f" ± {format(std_error, spec.lstrip('+'))}" if std_error is not None else "")


def format_columns(
    rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, right: Iterable[int] | None = None
) -> str:
    """Rows of text in aligned columns, never cut or wrapped, so that names can be searched and copied.

    right: numbers of the columns that are aligned to the right; None: of those that have a title all but the first
    """
    if right is None:
        right = [column for column, title in enumerate(header or ()) if column and title]
    every = [[printable(cell) for cell in row] for row in ([header, *rows] if header else rows)]
    if not every:
        return ""
    rightward = set(right)
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))]
    lines = []
    for row in every:
        cells = [
            cell.rjust(width) if column in rightward else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if header:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
