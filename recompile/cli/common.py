"""What every command shares: errors as one line, progress on stderr, JSON reports, and how figures are spelled.

Imports click only; rich is imported when a bar is drawn, torch never.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import click

from recompile.errors import OutputError, RecompileError

LINE_EVERY_SECONDS = 10.0  # where no bar can be drawn (a log file), one line this often
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


# ---- commands --------------------------------------------------------------------------------------------------------


class Command(click.Command):
    """A click command whose expected failures are one line on stderr and exit code 1, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RecompileError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo(f"\n{ctx.info_name}: interrupted; nothing half-written was left under a final name", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from error


def command(name: str, **options: Any) -> Callable[[Callable[..., Any]], Command]:
    """Decorator: a function with click options becomes a command of this project.

    RecompileError (and an OSError that no layer gave a better message) becomes `Error: ...` and exit code 1, Ctrl-C one
    line and exit code 130; `-h` works as `--help`. Help texts keep their line breaks after a `\\b` line.
    """
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110, **options.pop("context_settings", {})}
    return click.command(name, cls=Command, context_settings=settings, **options)


# ---- progress --------------------------------------------------------------------------------------------------------


class Progress(Protocol):
    """Says how far the work is: `update(done, text)`, done in the unit of `total`, which may become known late."""

    def update(self, done: float, text: str = "", total: float | None = None) -> None: ...


class _Silent:
    def update(self, done: float, text: str = "", total: float | None = None) -> None:
        pass


class _Lines:
    """For logs: a line every LINE_EVERY_SECONDS."""

    def __init__(self, description: str, total: float, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.started = self.last = time.monotonic()

    def update(self, done: float, text: str = "", total: float | None = None) -> None:
        now = time.monotonic()
        self.total = total or self.total
        if now - self.last < LINE_EVERY_SECONDS:
            return
        self.last = now
        seconds = now - self.started
        left = (self.total - done) * seconds / done if done > 0 else math.nan
        click.echo(
            f"{self.description}: {_amount(done, self.unit)} of {_amount(self.total, self.unit)} "
            f"({100 * done / max(self.total, 1e-9):.0f} %), {format_seconds(seconds)} gone, "
            f"about {format_seconds(left)} left" + (f"; {text}" if text else ""),
            err=True,
        )


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def update(self, done: float, text: str = "", total: float | None = None) -> None:
        self.bar.update(self.task, completed=done, text=text, **({"total": total} if total else {}))


@contextmanager
def progress(description: str, total: float, *, unit: str = "bytes", quiet: bool = False) -> Iterator[Progress]:
    """A progress bar on stderr with rate and time left, for the length of the block.

    total: in `unit`: "bytes", or any word for things that are counted ("rows", "modules")
    quiet: nothing is printed. Where stderr is no terminal a line every 10 seconds takes the bar's place.
    """
    if quiet:
        yield _Silent()
        return
    if not sys.stderr.isatty():
        yield _Lines(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            return Text(f"{task.speed:.3g} {unit}/s" if task.speed else "")

    amount = (
        [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        if unit == "bytes"
        else [MofNCompleteColumn(), Rate()]
    )
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        *amount,
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    ]
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar, bar.add_task(description, total=total, text=""))


# ---- results ---------------------------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """A report as JSON values: dataclasses by their fields, paths as text, what is not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not field.name.startswith("_")
        }
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch values, without importing either
        return to_plain(value.tolist())
    return str(value)


def print_json(path: str | os.PathLike[str], report: Any) -> None:
    """Write a report (a dataclass, or what to_plain reads) as JSON to a file, or to stdout for "-".

    A file is replaced as a whole, never left half written. Raises OutputError if it cannot be written.
    """
    text = json.dumps(to_plain(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if os.fspath(path) == "-":
        sys.stdout.write(text)
        return
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        if target.exists() and not target.is_file():  # /dev/stdout and the like are written to, not replaced
            target.write_text(text, encoding="utf-8")
            return
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}; choose another file") from error


def check_json_path(path: str | os.PathLike[str] | None) -> None:
    """Raise OutputError, before long work, if `print_json` could not write there."""
    if path is None or os.fspath(path) == "-":
        return
    parent = Path(path).parent
    if Path(path).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "is a directory" if Path(path).is_dir() else f"{parent} is not a directory that can be written to"
        raise OutputError(f"--json {path}: cannot be written: {what}; choose another file")


# ---- figures ---------------------------------------------------------------------------------------------------------


def format_bytes(size_bytes: float) -> str:
    """1536 -> "1.50 KiB"."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def format_bpw(bits_per_weight: float | None) -> str:
    """4.25 -> "4.250"; None (there is no such module) -> "-"."""
    return "-" if bits_per_weight is None else f"{bits_per_weight:.3f}"


def format_seconds(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _amount(value: float, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value:.0f} {unit}"


def format_columns(
    rows: Sequence[Sequence[str]], header: Sequence[str] | None = None, right: Iterable[int] = ()
) -> str:
    """Rows of text in aligned columns, never cut or wrapped, so that names can be searched and copied.

    right: numbers of the columns that are aligned to the right.
    """
    every = [header, *rows] if header else list(rows)
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


def follow_comparison(events: Iterable[Any], description: str, builds: int = 1, quiet: bool = False) -> list[Any]:
    """Draw the progress of `eval.diff.compare` or `compare_many`; returns the DiffReports."""
    from eval.diff import DiffReport, LayerDrift

    reports, stages, drifts = [], 0, 0
    with progress(description, 1, unit="steps", quiet=quiet) as bar:
        for event in events:
            if isinstance(event, DiffReport):
                reports.append(event)
            elif isinstance(event, LayerDrift):
                stages, drifts = event.total * builds, drifts + 1
                bar.update(drifts, event.name, 2 * stages)  # logits take about as long as the layers
            else:
                bar.update(stages + stages * event.done / event.total, f"logits of row {event.done}", 2 * stages)
    return reports
