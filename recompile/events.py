"""What long work tells its caller on the way: every function that takes `on_event` calls it with these and others.

A function of the library that takes long has the last argument `on_event=None`. It is called with

- a Progress after every piece of work, which is all that a progress bar needs;
- a Note where a person should know something: what was left out, what was chosen, what cannot be had;
- events of the work itself, such as `eval.diff.LayerDrift`; the function's docstring names them.

The result is what the function returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

OnEvent: TypeAlias = Callable[[object], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is; `total` may become known, and grow, on the way."""

    what: str  # "comparing"
    done: float
    total: float
    unit: str = "steps"  # "bytes", or what is counted
    text: str = ""  # what was done last


@dataclass(frozen=True)
class Note:
    """Something that a person should know. kind: "Note", "Warning", or "" where the text says all."""

    text: str
    kind: str = "Note"


@dataclass(frozen=True)
class Said:
    """A line about the work, for a log; of less weight than a Note, and left out where quiet is asked for."""

    text: str


def ignore(event: object) -> None:
    """For `on_event=None`."""


def follow(events: Iterable[object], on_event: OnEvent, result: type[Result]) -> Result:
    """Hand events on until the one that is the result; returns it."""
    found: Result | None = None
    for event in events:
        if isinstance(event, result):
            found = event
        else:
            on_event(event)
    assert found is not None, f"these events end with a {result.__name__}"
    return found
