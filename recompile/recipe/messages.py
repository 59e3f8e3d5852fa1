"""How errors name a place of a recipe, a value, and what may have been meant."""

from __future__ import annotations

import datetime
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from recompile.errors import RecipeError
from recompile.recipe.spelling import scalar_text
from recompile.recipe.values import Source, SourceId


@dataclass(frozen=True)
class Place:
    """Where in the file: `mix.yaml:9: overrides[4].source`."""

    name: str
    line: int = 0
    inside_file: str = ""

    def __str__(self) -> str:
        where = f"{self.name}:{self.line}" if self.line else self.name
        return f"{where}: {self.inside_file}" if self.inside_file else where

    def inside(self, key: str, node: yaml.Node | None = None) -> Place:
        path = f"{self.inside_file}.{key}" if self.inside_file else key
        return Place(self.name, line_of(node) if node is not None else self.line, path)

    def error(self, problem: str) -> RecipeError:
        return RecipeError(f"{self}: {problem}")


def line_of(node: yaml.Node) -> int:
    """The line, from 1, on which a YAML node starts."""
    return node.start_mark.line + 1


def quote(text: str, limit: int = 120) -> str:
    """Text in double quotes, cut to `limit` characters."""
    return json.dumps(text if len(text) <= limit else text[: limit - 3] + "...", ensure_ascii=not text.isprintable())


def kind(value: object) -> str:
    """What a YAML value is, in a word: text, number, list, ..."""
    # bool before int and datetime before date: each is a child of the other
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (str, "text"),
        (bool, "boolean"),
        ((int, float), "number"),
        (datetime.date, "date"),
        (bytes, "binary"),
        (list, "list"),
        (dict, "mapping"),
        (set, "set"),
    )
    return "null" if value is None else next((word for types, word in kinds if isinstance(value, types)), "value")


def show(value: object) -> str:
    """A value as YAML, in one short line. Lists and mappings by their kind only: they may be of any size."""
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, (bool, float)):
        return scalar_text(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "a huge number"  # str() of more than 4300 digits raises
    return str(value)[:60] if is_scalar(value) else f"a {kind(value)}"


def show_typed(value: object) -> str:
    """A value with its kind, for values that look alike: "4" (text), 4 (number)."""
    return f"{show(value)} ({kind(value)})" if value is not None and is_scalar(value) else show(value)


def is_scalar(value: object) -> bool:
    """Whether a value may be a source's id."""
    return value is None or isinstance(value, (str, int, float, bytes, datetime.date))


def check_pattern(at: Place, key: str) -> None:
    """Raise RecipeError for a pattern that is empty."""
    if not key.strip():
        raise at.error('an empty pattern matches nothing; write "*" for every tensor, or drop the line')


def unknown_source(at: Place, wanted: SourceId, sources: Sequence[Source]) -> RecipeError:
    """The message for an id that no source has, with the nearest that one has."""
    known = list({source.id: None for source in sources})
    if not known:
        return at.error(f'unknown source id {show_typed(wanted)}; "sources" is empty')
    near = _nearest_id(wanted, sources)
    hint = f"; did you mean {near}?" if near else ";"
    listed = ", ".join(map(show, known[:12])) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return at.error(f"unknown source id {show_typed(wanted)}{hint} known: {listed}")


def _nearest_id(wanted: SourceId, sources: Sequence[Source]) -> str | None:
    for source in sources:  # the same word, of another type: "4" and 4, "yes" and true
        as_text, as_value = (wanted, source.id) if isinstance(wanted, str) else (source.id, wanted)
        if isinstance(as_text, str) and not isinstance(as_value, str) and _reads_as(as_text, as_value):
            return show_typed(source.id)
    for source in sources:
        if isinstance(wanted, str) and wanted == source.model_dir:
            return f"{show_typed(source.id)}, the id of that directory"
    # spelling says nothing between two numbers: 40 is no slip for 4
    spelled = {
        str(source.id).lower(): source.id
        for source in sources
        if isinstance(source.id, str) or (isinstance(wanted, str) and source.id is not None)
    }
    word = str(wanted).lower()
    near = difflib.get_close_matches(word, spelled, n=1, cutoff=0.6)
    near = near or [text for text in spelled if word and (text.startswith(word) or word.startswith(text or "\n"))]
    return show_typed(spelled[near[0]]) if len(near) == 1 else None


def _reads_as(text: str, value: SourceId) -> bool:
    try:
        return bool(yaml.safe_load(text) == value)
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError):
        return False  # not YAML by itself, so not another spelling of the value


def nearest_key(key: object, known: Iterable[str]) -> str | None:
    """The known key that is spelled most like this one; None where none is near."""
    spelled = {word.replace("_", ""): word for word in known}
    near = difflib.get_close_matches(re.sub(r"[-_\s]", "", str(key).lower()), spelled, n=1, cutoff=0.7)
    return spelled[near[0]] if near else None
