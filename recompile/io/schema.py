"""JSON values as frozen dataclasses: every field typed, finite and known, or one error that names its place.

    header = read_as(ProfileHeader, content, "profile.jsonl:1", error=JournalError)

The dataclass is the schema: its type hints say what a field may be, its defaults which fields may be missing.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from recompile.errors import RecompileError
from recompile.io.printable import printable

T = TypeVar("T")
LARGEST_COUNT = 2**53  # what JSON readers of any language hold exactly
_SCALARS = (str, int, float, bool)


def read_as(
    kind: type[T], value: Any, place: str, *, error: type[RecompileError], unbounded: frozenset[str] = frozenset()
) -> T:
    """A value of a dataclass.

    An int is a count, from 0 to 2^53, unless the field is in `unbounded` or of a union of scalars (an id). A float is
    finite. Lists become tuples. Raises `error` naming the place for a value of another type, a missing field, one that
    is not known.
    """
    return _Reader(error, unbounded).dataclass(kind, value, place)


class _Reader:
    def __init__(self, error: type[RecompileError], unbounded: frozenset[str]) -> None:
        self.error, self.unbounded = error, unbounded

    def dataclass(self, kind: Any, value: Any, place: str) -> Any:
        if not isinstance(value, dict):
            raise self._wrong(value, "an object", place)
        hints, required = _fields(kind)
        unknown = [name for name in value if name not in hints]
        if unknown:
            raise self.error(f'{place}: unknown field "{printable(unknown[0])[:60]}"; was it made by a newer version?')
        missing = [name for name in required if name not in value]
        if missing:
            raise self.error(f"{place}: the field {missing[0]} is missing; it is incomplete, make it again")
        return kind(**{name: self.value(hints[name], item, f"{place}: {name}", name) for name, item in value.items()})

    def value(self, hint: Any, value: Any, place: str, name: str = "") -> Any:
        if hint in _SCALARS:
            return self._scalar(hint, value, place, name in self.unbounded)
        origin = get_origin(hint)
        if hint is Any:
            return value
        if dataclasses.is_dataclass(hint):
            return self.dataclass(hint, value, place)
        if origin in (Union, types.UnionType):
            return self._one_of(get_args(hint), value, place, name)
        if origin is tuple:
            if not isinstance(value, list):
                raise self._wrong(value, "a list", place)
            members = get_args(hint)
            if members[-1] is not Ellipsis:  # each its own, such as a pair
                if len(value) != len(members):
                    raise self.error(f"{place}: a list of {len(value)}, wanted one of {len(members)}")
                each = enumerate(zip(members, value, strict=True))
                return tuple(self.value(kind, item, f"{place}[{number}]") for number, (kind, item) in each)
            member = members[0]
            if member is float and all(type(item) is float and math.isfinite(item) for item in value):
                return tuple(value)  # as the lines of a profile are, of which there may be 100,000
            return tuple(self.value(member, item, f"{place}[{number}]") for number, item in enumerate(value))
        if origin is not None and issubclass(origin, Mapping):
            if not isinstance(value, dict):
                raise self._wrong(value, "an object", place)
            member = get_args(hint)[1]
            return {key: self.value(member, item, f"{place}.{printable(key)[:60]}") for key, item in value.items()}
        return self._scalar(hint, value, place, name in self.unbounded)

    def _one_of(self, hints: tuple[Any, ...], value: Any, place: str, name: str) -> Any:
        plain = [hint for hint in hints if hint in (str, int, float, bool, type(None))]
        if type(value) in plain:
            if isinstance(value, float) and not math.isfinite(value):
                raise self._wrong(value, "a finite number", place)
            optional_count = plain == list(hints) and set(plain) == {int, type(None)}
            return (
                self._scalar(int, value, place, name in self.unbounded)
                if optional_count and value is not None
                else value
            )
        others = [hint for hint in hints if hint not in plain]
        if value is not None and len(others) == 1:
            return self.value(others[0], value, place, name)
        words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
        raise self._wrong(value, " or ".join(words.get(hint, "an object") for hint in hints), place)

    def _scalar(self, hint: Any, value: Any, place: str, unbounded: bool) -> Any:
        if hint is str and isinstance(value, str):
            return value
        if hint is bool and isinstance(value, bool):
            return value
        if hint is int and isinstance(value, int) and not isinstance(value, bool):
            if unbounded or 0 <= value <= LARGEST_COUNT:
                return value
            raise self._wrong(value, "a count from 0 to 2^53", place)
        if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST_COUNT:
                return float(value)
            raise self._wrong(value, "a finite number", place)
        wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
        raise self._wrong(value, wanted.get(hint, str(hint)), place)

    def _wrong(self, value: Any, wanted: str, place: str) -> RecompileError:
        return self.error(f"{place}: {describe(value)}, wanted {wanted}")


def describe(value: Any) -> str:
    """A found value for a message: its type and the start of it."""
    names = {dict: "an object", list: "a list", tuple: "a list", type(None): "null", bool: "", int: "", float: ""}
    if isinstance(value, str):
        return f'the text "{printable(value[:40])}{"..." if len(value) > 40 else ""}"'
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return f"a number of {len(hex(value)) * 4 // 13} digits or so"
    return names.get(type(value), type(value).__name__) or str(value).lower() if value is not None else "null"


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Name -> type hint of what a JSON object of a dataclass may have, and the names it must have."""
    fields = [field for field in dataclasses.fields(kind) if field.init]
    hints = get_type_hints(kind)
    missing = dataclasses.MISSING
    required = tuple(f.name for f in fields if f.default is missing and f.default_factory is missing)
    return {field.name: hints[field.name] for field in fields}, required
