"""What every command shares: errors as one line, progress on stderr, and JSON reports.

Imports click only; rich is imported when a bar is drawn, torch never.
"""

from __future__ import annotations

import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import click

from recompile.arguments import ARGUMENTS, respell
from recompile.errors import OutputError, RecompileError
from recompile.events import Note, Progress, Said
from recompile.io.files import check_outputs, last_opened, models_named_in, write_text
from recompile.io.printable import PrintableStream, printable
from recompile.io.report import to_json
from recompile.io.sizes import format_bytes, format_seconds

LINE_EVERY_SECONDS = 10.0  # where no bar can be drawn (a log file), one line this often
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


# ---- commands --------------------------------------------------------------------------------------------------------


LARGEST = 1e9  # of what any option counts, in minutes, bits or nats; what is larger overflows somewhere


class PositiveFloat(click.ParamType):
    """A number above 0 and at most LARGEST: "nan", "inf", 0 and -3 are refused."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number <= LARGEST:
            said = f" and at most {LARGEST:g}" if number > LARGEST else ""
            self.fail(f"{value!r} is not a number above 0{said}.", param, ctx)
        return number


class FiniteRange(click.ParamType):
    """A range of numbers that NaN is not in: it compares as neither too small nor too large."""

    name = "number"

    def __init__(self, inner: click.FloatRange) -> None:
        self.inner = inner

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(self.inner.convert(value, param, ctx))
        if not abs(number) <= LARGEST:
            self.fail(f"{value!r} is not a number of at most {LARGEST:g}.", param, ctx)
        return number


class Command(click.Command):
    """A click command whose failures are one line on stderr and exit code 1, without a traceback.

    outputs: flag -> parameter of a file that is written; inputs: parameters that name files or directories (also as
        ID=DIR). An output that is an input, or that this tool did not make, is refused before anything starts; with
        outputs the command gets `--force`.
    Options of a plain float are finite numbers above 0; those of a plain int are at least 1, or 0 where that is the
    default. Those with `multiple=True` also take their values after one flag: `-b 2 3 4` is `-b 2 -b 3 -b 4`. Defaults
    are shown. What is printed has its control characters escaped, whatever file it came from.
    """

    def __init__(
        self, *args: Any, outputs: Mapping[str, str] | None = None, inputs: Sequence[str] = (), **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.outputs, self.inputs = dict(outputs or {}), tuple(inputs)
        for option in self.params:
            if isinstance(option, click.Option) and option.show_default is None:
                option.show_default = True
            if option.type is click.FLOAT:
                option.type = PositiveFloat()
            elif isinstance(option.type, click.FloatRange):
                option.type = FiniteRange(option.type)
            elif option.type is click.INT:
                option.type = click.IntRange(0 if option.default == 0 else 1, 2**31 - 1)
        if self.outputs:
            help_text = "Replace files that this tool did not make; never inputs."
            self.params.append(
                click.Option(["--force"], is_flag=True, expose_value=False, help=help_text, callback=_force)
            )

    def main(self, *args: Any, **extra: Any) -> Any:
        with printable_streams():
            try:
                return super().main(*args, **extra)
            except SystemExit as ended:
                raise SystemExit(_flush_stdout(ended.code)) from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [option for option in self.params if isinstance(option, click.Option)]
        many = {flag for option in options if option.multiple and not option.is_flag for flag in option.opts}
        known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
        known |= set(ctx.help_option_names)
        spread: list[str] = []
        flag: str | None = None
        fresh = False
        for arg in args:
            is_flag = arg.split("=")[0] in known or (arg.startswith("-") and not re.fullmatch(r"-?\d+(\.\d*)?", arg))
            if is_flag:
                flag, fresh = (arg, True) if arg in many else (None, False)
                if flag is None:
                    spread.append(arg)
            elif flag is not None:
                spread += [flag, arg]
                fresh = False
            else:
                spread.append(arg)
        if flag is not None and fresh:
            spread.append(flag)  # a flag without a value: let click say so
        return super().parse_args(ctx, spread)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except click.ClickException as error:
            error.message = shortened(error.message)  # type: ignore[misc]  # final by its type alone
            raise
        except (click.exceptions.Exit, click.Abort, EOFError, OSError):
            raise
        except Exception as error:
            raise click.ClickException(unforeseen(error)) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            self._check_files(ctx)
            return super().invoke(ctx)
        except RecompileError as error:
            raise click.ClickException(shortened(error.spelled(flags_of(self)))) from error
        except KeyboardInterrupt:
            click.echo(f"\n{ctx.info_name}: interrupted; nothing half-written was left under a final name", err=True)
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has gone
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
            raise click.ClickException(f"{where}{error.strerror or error}") from error
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            raise click.ClickException(unforeseen(error)) from error

    def _check_files(self, ctx: click.Context) -> None:
        given = [value for name in self.inputs for value in _paths(ctx.params.get(name))]
        given += [value.partition("=")[2] for value in given if "=" in value and not os.path.exists(value)]
        named = {flag: ctx.params.get(name) for flag, name in self.outputs.items()}
        refuse_outputs(named, given)
        check_json_path(ctx.params.get("json_path"))


# Flags of arguments that a message may name in a command without that option; others are spelled alike.
_FLAGS_ELSEWHERE = {
    **{name: f"--{name.replace('_', '-')}" for name in ARGUMENTS},
    **{f"{name}=False": f"--no-{name.replace('_', '-')}" for name in ARGUMENTS},
    "base": "--in-dir",
    "maximum": "--max",
    "minimum": "--min",
    "quantize_also": "--quantize",
    "recipe": "--override",
    "reference": "--model-b",
}


def flags_of(command: click.Command | None) -> dict[str, str]:
    """Argument of the Python API -> flag of a command, the long one: "out" -> "--out-dir", "probe=False" ->
    "--no-probe"; for recompile.arguments.spell."""
    flags = dict(_FLAGS_ELSEWHERE)
    for option in command.params if command is not None else ():
        if isinstance(option, click.Option) and option.name:
            flags[option.name] = long_flag(option.opts)
            if option.secondary_opts:
                flags[f"{option.name}=False"] = long_flag(option.secondary_opts)
    return flags


def long_flag(flags: Sequence[str]) -> str:
    """The first that is spelled out, of an option's flags."""
    return next((flag for flag in flags if flag.startswith("--")), flags[0])


def current_flags() -> dict[str, str]:
    """Of the command that runs."""
    context = click.get_current_context(silent=True)
    return flags_of(context.command if context is not None else None)


def refuse_outputs(outputs: Mapping[str, Path | str | None], inputs: Iterable[Path | str | None]) -> None:
    """As `check_outputs`, for files that the options do not name; `--force` counts. Models that a recipe, a profile or
    a report among the inputs names are inputs too."""
    given = list(inputs)
    if any(outputs.values()):
        given += [path for value in given if value is not None for path in models_named_in(Path(value))]
    check_outputs(outputs, given, force=is_forced())


def is_forced() -> bool:
    """Whether the command that runs was given `--force`."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(_FORCE))


_FORCE = "recompile.force"


def _force(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[_FORCE] = value


def _paths(value: Any) -> list[str]:
    if value is None:
        return []
    return [os.fspath(item) for item in (value if isinstance(value, (list, tuple)) else [value])]


def shortened(message: str) -> str:
    """Without the middle of words that nobody reads: an argument of 5,000 characters that a message repeats."""
    return re.sub(r"\S{600,}", lambda found: f"{found[0][:300]}[...]{found[0][-100:]}", message)


def unforeseen(error: Exception) -> str:
    """One line for an error that no layer foresaw: what was being read, what failed, where the details were written."""
    read = last_opened()
    after = f"after reading {read}: " if read else ""
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error) or "out of memory" in str(error).lower():
        return (
            f"{after}there is not enough memory ({str(error).splitlines()[0][:200] if str(error) else 'MemoryError'})"
        )
    said = (str(error).strip().splitlines() or [""])[0][:300]
    try:
        with tempfile.NamedTemporaryFile(  # is kept: the message names it
            "w", prefix="recompile-error-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        details = f"the details were written to {file.name}"
    except OSError:
        details = "the details could not be written"
    return f"{after}unforeseen: {type(error).__name__}: {said}; {details}"


def _flush_stdout(code: Any) -> Any:
    """The exit code, once all of stdout is out: 1 where it could not be (a full disk)."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Python flushes it once more at its end)
        return code or 1
    except (OSError, ValueError) as error:
        click.echo(f"Error: stdout: cannot be written: {getattr(error, 'strerror', None) or error}", err=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return code or 1
    return code


@contextmanager
def printable_streams() -> Iterator[None]:
    """Escape control characters in what is printed, and show what the library logs (`Note: ...`)."""
    before = sys.stdout, sys.stderr
    if any(isinstance(stream, PrintableStream) for stream in before):  # a command that runs another
        yield
        return
    notes = _Notes(logging.WARNING)
    logging.getLogger("recompile").addHandler(notes)
    if sys.stdout is not None:
        sys.stdout = PrintableStream(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = PrintableStream(sys.stderr)
    try:
        yield
    finally:
        logging.getLogger("recompile").removeHandler(notes)
        sys.stdout, sys.stderr = before


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"Note: {record.getMessage()}", err=True)


def command(name: str, *, cls: type[Command] = Command, **options: Any) -> Callable[[Callable[..., Any]], Command]:
    """Decorator: a function with click options becomes a command of this project.

    RecompileError becomes `Error: ...` and exit code 1, any other exception one line and exit code 1, Ctrl-C one
    line and exit code 130; `-h` works as `--help`; defaults are shown. Help texts keep their line breaks after a `\\b`
    line.
    """
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
    return click.command(name, cls=cls, context_settings=settings, **options)


# ---- progress --------------------------------------------------------------------------------------------------------


class Screen:
    """Shows what the library tells on the way (recompile.events) on stderr: one bar at a time, notes, and lines about
    the work. quiet: notes only.

        with Screen(quiet) as screen:
            report = recompile.quantize(..., on_event=screen)
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._what: str | None = None
        self._bar: Bar = _Silent()
        self._open = ExitStack()

    def __call__(self, event: object) -> None:
        if isinstance(event, Progress):
            if event.what != self._what:
                self._open.close()
                shown = progress(event.what, event.total, unit=event.unit, quiet=self.quiet)
                self._what, self._bar = event.what, self._open.enter_context(shown)
            self._bar.update(event.done, event.text, event.total)
            if event.done >= event.total:
                self._close()
        elif isinstance(event, Note):
            text = respell(event.text, current_flags())
            click.echo(f"{event.kind}: {text}" if event.kind else text, err=True)
        elif isinstance(event, Said) and not self.quiet:
            click.echo(respell(event.text, current_flags()), err=True)

    def _close(self) -> None:
        self._what = None
        self._open.close()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


class Bar(Protocol):
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
        self.bar.update(self.task, completed=done, text=printable(text), **({"total": total} if total else {}))


@contextmanager
def progress(description: str, total: float, *, unit: str = "bytes", quiet: bool = False) -> Iterator[Bar]:
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
    raw = sys.stderr.raw if isinstance(sys.stderr, PrintableStream) else sys.stderr  # a bar moves the cursor
    with RichProgress(*columns, console=Console(file=raw), transient=True) as bar:
        yield _Bar(bar, bar.add_task(printable(description), total=total, text=""))


# ---- results ---------------------------------------------------------------------------------------------------------


def print_json(path: str | os.PathLike[str], report: Any) -> None:
    """Write a report (a dataclass, or what to_plain reads) as JSON to a file, or to stdout for "-".

    A file is replaced as a whole, never left half written. Raises OutputError if it cannot be written.
    """
    text = to_json(report, current_flags())
    if os.fspath(path) != "-":
        write_text(Path(path), text)
    elif sys.stdout is None:
        raise OutputError("--json -: stdout is closed")
    else:
        sys.stdout.write(text)


def check_json_path(path: str | os.PathLike[str] | None) -> None:
    """Raise OutputError, before long work, if `print_json` could not write there."""
    if path is None or os.fspath(path) == "-":
        return
    parent = Path(path).parent
    if Path(path).is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        what = "is a directory" if Path(path).is_dir() else f"{parent} is not a directory that can be written to"
        raise OutputError(f"--json {path}: cannot be written: {what}; choose another file")


def _amount(value: float, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value:.0f} {unit}"


def show(report: Any, json_path: str | os.PathLike[str] | None, describe: Callable[[], str]) -> None:
    """Print a result for people, unless JSON goes to stdout, and write it as JSON where that is asked for."""
    if str(json_path) != "-":
        click.echo(describe())
    if json_path is not None:
        print_json(json_path, report)
