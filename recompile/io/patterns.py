"""Regular expressions from files (targets of checkpoints, recipes of other tools), matched in linear time.

RE2 matches them. It has no look-around and no back-references: those patterns run in Python's own engine where their
repeats are few and none is inside another, so that they end; any other is refused.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from recompile.errors import FormatError, RecompileError
from recompile.io.printable import printable

LONGEST = 1_000_000  # characters
MOST_REPEATS = 6  # unbounded ones in a pattern that RE2 does not take: a name of n characters takes n^6 steps at worst


class Regex:
    """A compiled expression that ends: `match` at the start of a name, `search` anywhere, `fullmatch`."""

    def __init__(self, pattern: str, engine: Any) -> None:
        self.pattern, self._engine = pattern, engine

    def match(self, name: str) -> bool:
        return self._engine.match(name) is not None

    def search(self, name: str) -> bool:
        return self._engine.search(name) is not None

    def fullmatch(self, name: str) -> bool:
        return self._engine.fullmatch(name) is not None


def compile_regex(pattern: str, place: str, *, error: type[RecompileError] = FormatError) -> Regex:
    """Raises `error`, naming the place, for what is no regular expression, or one that may take for ever."""
    import re2

    shown = f'"{printable(pattern[:100])}{"..." if len(pattern) > 100 else ""}"'
    if len(pattern) > LONGEST:
        raise error(f"{place}: {shown} has {len(pattern)} characters, a regular expression has at most {LONGEST}")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 1 << 26
    try:
        return Regex(pattern, re2.compile(pattern, options))
    except (re2.error, UnicodeEncodeError):
        pass  # not one of RE2's: what is wrong with it, if anything, Python's engine says
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = _parser.parse(pattern)
            found = re.compile(pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as failed:
        said = "nested too deeply" if isinstance(failed, RecursionError) else failed
        raise error(f"{place}: {shown} is no regular expression: {said}") from failed
    repeats, nested = _repeats(tree, False)
    if nested or repeats > MOST_REPEATS:
        why = "a repeat inside a repeat" if nested else f"{repeats} unbounded repeats"
        raise error(
            f"{place}: {shown} has {why} beside look-around or back-references, and may take for ever to match; write "
            f"it without"
        )
    return Regex(pattern, found)


def _repeats(tree: Any, inside: bool) -> tuple[int, bool]:
    """How many unbounded repeats a parsed pattern has, and whether one is inside another."""
    count, nested = 0, False
    for operation, argument in tree:
        if operation in _REPEATS:
            _, most, body = argument
            unbounded = most is _parser.MAXREPEAT or most > 1000
            more, deeper = _repeats(body, inside or unbounded)
            count, nested = count + more + unbounded, nested or deeper or (unbounded and inside)
        else:
            for part in _subpatterns(argument):
                more, deeper = _repeats(part, inside)
                count, nested = count + more, nested or deeper
    return count, nested


def _subpatterns(argument: Any) -> list[Any]:
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [found for item in argument for found in _subpatterns(item)]
    return []


try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as _parser
_REPEATS = {
    _parser.MAX_REPEAT,
    _parser.MIN_REPEAT,
    *([_parser.POSSESSIVE_REPEAT] if hasattr(_parser, "POSSESSIVE_REPEAT") else []),
}
