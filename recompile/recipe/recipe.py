"""Recipes (override YAML): read, explained, checked and written. Opens no checkpoint and imports no torch.

    sources:
      - {id: 4, model_dir: ./4bpw}
      - {id: 5, model_dir: ./5bpw}
    overrides:
      - {key: "model.layers.*.self_attn.*", source: 4}
      - {key: "model.layers.0.*", source: 5}

Who wins. A later source of the same id replaces the earlier one. A key that is repeated to the letter keeps its first
position and takes its last source. The keys are then grouped by directory, in order of first mention, and the group
that was first mentioned last is asked first: if any of its patterns matches, it wins. No match: the base.
"""

from __future__ import annotations

import datetime
import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from recompile.errors import RecipeError
from recompile.io.files import read_bytes

SourceId: TypeAlias = str | int | float | bool | bytes | datetime.date | None  # any YAML scalar; datetime is a date

# A source that is not there yet: model_quantize makes it. What each says is read by recompile/quantize/made.py.
MADE_KINDS = ("bits", "type", "scheme")
MADE_SETTINGS = ("group_size", "symmetric", "format")
_SOURCE_KEYS = ("id", "model_dir", "note", *MADE_KINDS, *MADE_SETTINGS)
_OVERRIDE_KEYS = ("key", "source", "note")
_TOP_KEYS = ("sources", "overrides", "base", "budget", "provenance")

_TEXT_TAG, _MERGE_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_Repeated: TypeAlias = dict[int, list[tuple[str, list[int]]]]  # id of a mapping node -> (key, its lines)

_FEW = 16  # patterns: so many are tried in less time than it takes to look up which of them may match
_PIECE = 6  # characters of a literal by which patterns are indexed: "ers.3." and ".17." already tell layers apart
_ALIGN_UP_TO = 88  # columns: comments of longer lines follow after two blanks


# ---------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class Source:
    """One line of `sources:`, a directory that modules may be taken from."""

    id: SourceId
    model_dir: str  # as written, see resolve_dir; "bits: 4" for a source that model_quantize is to make
    line: int = 0  # of the entry, from 1; 0 where no file was read
    note: str | None = None
    spec: Mapping[str, Any] | None = field(default=None, hash=False)  # how to make it; None for a directory


@dataclass(frozen=True)
class Override:
    """One line of `overrides:`, as written."""

    key: str
    source: SourceId
    line: int = 0  # of the entry, from 1; 0 where no file was read
    note: str | None = None


@dataclass(frozen=True)
class Decision:
    """Where one tensor comes from, and why."""

    tensor_name: str
    directory: str | None  # None: the base
    override: Override | None  # the line that decided: the first match of the winning directory
    beaten: tuple[Override, ...]  # other lines that match the name, in file order


@dataclass(frozen=True)
class Recipe:
    """A whole override file. Raises RecipeError on creation where a line names no source or an empty pattern."""

    sources: tuple[Source, ...]
    overrides: tuple[Override, ...]
    base: Any = field(default=None, hash=False)  # these three are ours, optional and as parsed; exllamav3 ignores them
    budget: Any = field(default=None, hash=False)
    provenance: Any = field(default=None, hash=False)
    path: Path | None = None
    name: str = "<recipe>"  # what messages call it: the path as given
    other: Mapping[Any, Any] = field(default_factory=dict, hash=False)  # unknown top-level keys, carried through
    warnings: tuple[str, ...] = ()
    # A second name of some tensors (GGUF's own), by which lines may call them as well.
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        known = {source.id for source in self.sources}
        for number, override in enumerate(self.overrides):
            at = _Place(self.name, override.line, f"overrides[{number}]")
            _check_pattern(at.inside("key"), override.key)
            if override.source not in known:
                raise _unknown_source(at.inside("source"), override.source, self.sources)

    def source_dir(self, tensor_name: str) -> str | None:
        """The `model_dir`, as written, that holds this tensor; None for the base."""
        if tensor_name not in self.aliases:
            return self._rules.source_dir(tensor_name)
        return self.explain(tensor_name).directory

    def explain(self, tensor_name: str) -> Decision:
        """Which line decides this tensor, and which lines match it but are beaten."""
        rules = self._rules
        matching = self._matching(tensor_name)
        if not matching:
            return Decision(tensor_name, None, None, ())
        winner = rules.patterns[min(matching, key=rules.precedence)]
        beaten = {number for index in matching for number in rules.patterns[index].written} - {winner.decider}
        return Decision(
            tensor_name,
            winner.directory,
            self.overrides[winner.decider],
            tuple(self.overrides[number] for number in sorted(beaten)),
        )

    def shadowed(self, names: Iterable[str]) -> list[tuple[Override, Override]]:
        """Lines that match some of the names and decide none, each with the line that beats it most often.

        The line that beats may name the same directory: then the shadowed line is merely superfluous.
        """
        rules = self._rules
        beaten_by: dict[int, Counter[int]] = {}
        deciding: set[int] = set()
        for name in names:
            matching = self._matching(name)
            if not matching:
                continue
            decider = rules.patterns[min(matching, key=rules.precedence)].decider
            deciding.add(decider)
            for index in matching:
                for number in rules.patterns[index].written:
                    if number != decider:
                        beaten_by.setdefault(number, Counter())[decider] += 1
        return [
            (self.overrides[number], self.overrides[beaten_by[number].most_common(1)[0][0]])
            for number in sorted(beaten_by.keys() - deciding)
        ]

    def unmatched(self, names: Iterable[str]) -> list[Override]:
        """Lines that match none of the names, in file order. `suggest` finds what each may have meant."""
        rules = self._rules
        matched: set[int] = set()
        for name in names:
            for index in self._matching(name):
                matched.update(rules.patterns[index].written)
        return [override for number, override in enumerate(self.overrides) if number not in matched]

    def location(self, line: Source | Override) -> str:
        """How a message names a line of this recipe: `mix.yaml:9: overrides[4]`.

        Raises ValueError for a line that is not of this recipe.
        """
        if isinstance(line, Source):
            return str(_Place(self.name, line.line, f"sources[{self.sources.index(line)}]"))
        return str(_Place(self.name, line.line, f"overrides[{self.overrides.index(line)}]"))

    def _matching(self, name: str) -> Sequence[int]:
        """Indices of the patterns that match a tensor by its name or by its alias."""
        found = self._rules.matching(name)
        alias = self.aliases.get(name)
        return found if alias is None else list(dict.fromkeys([*found, *self._rules.matching(alias)]))

    @cached_property
    def _rules(self) -> _Rules:
        return _Rules(self.sources, self.overrides)


# ------------------------------------------------------------------------------------------- patterns and precedence


@dataclass(frozen=True)
class Glob:
    """A pattern over whole tensor names: `*` matches anything, also nothing and dots; all else is literal.

    Literals between stars are searched from left to right, each as early as possible, so that no pattern can
    backtrack: `*a*a*a*b` costs no more than its length times the name's.
    """

    literals: tuple[str, ...]  # what stands between the stars; one literal: no star

    @classmethod
    def parse(cls, text: str) -> Glob:
        return cls(tuple(re.split(r"\*+", text.strip())))

    def matches(self, name: str) -> bool:
        if len(self.literals) == 1:
            return name == self.literals[0]
        head, *middle, tail = self.literals
        start, end = len(head), len(name) - len(tail)
        if start > end or not name.startswith(head) or not name.endswith(tail):
            return False
        for literal in middle:
            start = name.find(literal, start, end)
            if start < 0:
                return False
            start += len(literal)
        return True


@dataclass(frozen=True)
class _Pattern:
    """One key after identical keys were merged into one."""

    glob: Glob
    directory: str
    rank: int  # of its directory; 0 is asked first
    written: tuple[int, ...]  # numbers of the override lines that wrote it

    @property
    def decider(self) -> int:
        """The line whose source counts."""
        return self.written[-1]


class _Rules:
    """The lines of a recipe in order of precedence, indexed so that a name is tried on few patterns only."""

    def __init__(self, sources: Sequence[Source], overrides: Sequence[Override]) -> None:
        directory_of = {source.id: source.model_dir for source in sources}
        merged: dict[str, list[int]] = {}  # the raw key: blanks around it still tell two keys apart here
        for number, override in enumerate(overrides):
            merged.setdefault(override.key, []).append(number)
        directories = {key: directory_of[overrides[numbers[-1]].source] for key, numbers in merged.items()}
        mentioned = list(dict.fromkeys(directories.values()))
        rank = {directory: len(mentioned) - 1 - at for at, directory in enumerate(mentioned)}
        self.patterns = tuple(
            _Pattern(Glob.parse(key), directories[key], rank[directories[key]], tuple(numbers))
            for key, numbers in merged.items()
        )
        self._answers: dict[str, tuple[int, ...]] = {}  # by name; a checkpoint's names are asked several times
        self._equal: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal answers are one value
        self._exact: dict[str, list[int]] = {}
        by_words: dict[int, frozenset[str]] = {}
        by_pieces: dict[int, frozenset[str]] = {}
        for index, pattern in enumerate(self.patterns):
            if len(pattern.glob.literals) == 1:
                self._exact.setdefault(pattern.glob.literals[0], []).append(index)
            elif words := _needed_words(pattern.glob):
                by_words[index] = words
            else:
                by_pieces[index] = _needed_pieces(pattern.glob)
        self._by_words = _Index(by_words)
        self._by_pieces = _Index(by_pieces)
        self._piece_sizes = sorted({len(piece) for pieces in by_pieces.values() for piece in pieces})

    def precedence(self, index: int) -> tuple[int, int]:
        """Smaller decides: the directory first, then the position in the file."""
        return self.patterns[index].rank, index

    def source_dir(self, name: str) -> str | None:
        best = min(self.matching(name), key=self.precedence, default=None)
        return None if best is None else self.patterns[best].directory

    def matching(self, name: str) -> tuple[int, ...]:
        """Indices of all patterns that match."""
        answer = self._answers.get(name)
        if answer is None:
            if len(self.patterns) <= _FEW:
                found = tuple(index for index, pattern in enumerate(self.patterns) if pattern.glob.matches(name))
            else:
                found = tuple(index for index in self._possible(name) if self.patterns[index].glob.matches(name))
            answer = self._answers[name] = self._equal.setdefault(found, found)
        return answer

    def _possible(self, name: str) -> Iterator[int]:
        """Indices of the patterns that may match, each once."""
        yield from self._exact.get(name, ())
        words = name.split(".")
        yield from self._by_words.possible({*words, *map(_join, words, words[1:])})
        yield from self._by_pieces.possible(
            {name[at : at + size] for size in self._piece_sizes for at in range(len(name) - size + 1)}
        )


_join = "{}.{}".format


def _needed_words(glob: Glob) -> frozenset[str]:
    """Words between dots, single and in pairs, that a name must hold for the pattern to match."""
    needed: set[str] = set()
    for at, literal in enumerate(glob.literals):
        words = literal.split(".")  # a star may go on with the first and the last word, except at the name's own ends
        words = words[0 if at == 0 else 1 : len(words) if at == len(glob.literals) - 1 else -1]
        needed.update(words, map(_join, words, words[1:]))
    return frozenset(needed - {"", "."})


def _needed_pieces(glob: Glob) -> frozenset[str]:
    """The same for pieces of a fixed length, or whole literals that are shorter."""
    return frozenset(
        literal[at : at + _PIECE] for literal in glob.literals for at in range(max(1, len(literal) - _PIECE + 1))
    ) - {""}


class _Index:
    """Patterns by the rarest of the texts that they need; a crowded text holds an index by the others."""

    def __init__(self, needed: Mapping[int, frozenset[str]], depth: int = 0) -> None:
        crowd = Counter(text for texts in needed.values() for text in texts)
        self._loose: list[int] = []  # nothing tells them apart: always tried
        chosen: dict[str, list[int]] = {}
        for index, texts in needed.items():
            rarest = min(texts, key=lambda text: (crowd[text], text), default=None)
            if rarest is None or (depth and crowd[rarest] == len(needed)):
                self._loose.append(index)
            else:
                chosen.setdefault(rarest, []).append(index)
        self._held: dict[str, list[int] | _Index] = {
            text: indices
            if len(indices) <= 4 or depth == 4
            else _Index({index: needed[index] - {text} for index in indices}, depth + 1)
            for text, indices in chosen.items()
        }
        self._texts = frozenset(self._held)

    def possible(self, texts: set[str]) -> Iterator[int]:
        """Indices of the patterns that may match a name which holds these texts, each once."""
        yield from self._loose
        for text in texts & self._texts:
            held = self._held[text]
            yield from held.possible(texts) if isinstance(held, _Index) else held


def suggest(key: str, names: Iterable[str]) -> str | None:
    """A key near to one that matches no name, or None. What is suggested matches at least one of the names.

    Tried in turn: the key read as a regex; a missing `.*` at the end; a missing `*.` in front; the nearest
    name by spelling, with the numbers of the key put back where they exist and `*` where they do not.
    """
    names = tuple(names)
    text = key.strip()
    plain = _without_regex(text)
    for base in dict.fromkeys((text, plain)):
        ends = (base, base + ".*", base + "*") if base.endswith(".") else (base, base + ".*")
        for attempt in (*ends, *("*." + end for end in ends)):
            if attempt != key and _matches_any(attempt, names):
                return attempt

    tokens = plain.split(".")
    shapes = _shapes(names)
    for near in difflib.get_close_matches(_shape(plain).lower(), shapes, n=3, cutoff=0.6):
        numbers = iter([token for token in tokens if token.isdigit() or token == "*"])
        filled = ".".join(next(numbers, "*") if token == "*" else token for token in shapes[near].split("."))
        for attempt in (filled, shapes[near]):
            if attempt != key and _matches_any(attempt, names):
                return attempt
    return None


def _without_regex(text: str) -> str:
    r"""`^model\.layers\.3\..*$` as a glob: `model.layers.3.*`."""
    if not re.search(r"\\|^\^|\$$", text):
        return text
    words = re.split(r"\\(.)", text.strip("^$"))  # every second one was behind a backslash
    return "".join(word if at % 2 else word.replace(".*", "*") for at, word in enumerate(words))


def _matches_any(key: str, names: Iterable[str]) -> bool:
    glob = Glob.parse(key)
    return any(glob.matches(name) for name in names)


def _shape(name: str) -> str:
    """`model.layers.*.mlp.up_proj.weight`: a name with its numbers generalised."""
    return ".".join("*" if token.isdigit() else token for token in name.split("."))


@lru_cache(maxsize=2)  # a recipe with many stray lines asks for the same names again and again
def _shapes(names: tuple[str, ...]) -> dict[str, str]:
    """Patterns for every tensor and for everything below each of its parents; lower case -> as spelled."""
    shapes: dict[str, str] = {}
    for shape in dict.fromkeys(map(_shape, names)):
        tokens = shape.split(".")
        for cut in range(len(tokens) - 1, 0, -1):
            below = ".".join(tokens[:cut]) + ".*"
            shapes.setdefault(below.lower(), below)
        shapes.setdefault(shape.lower(), shape)
    return shapes


# --------------------------------------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class _Place:
    """Where in the file: `mix.yaml:9: overrides[4].source`."""

    name: str
    line: int = 0
    inside_file: str = ""

    def __str__(self) -> str:
        where = f"{self.name}:{self.line}" if self.line else self.name
        return f"{where}: {self.inside_file}" if self.inside_file else where

    def inside(self, key: str, node: yaml.Node | None = None) -> _Place:
        path = f"{self.inside_file}.{key}" if self.inside_file else key
        return _Place(self.name, _line(node) if node is not None else self.line, path)

    def error(self, problem: str) -> RecipeError:
        return RecipeError(f"{self}: {problem}")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _quote(text: str, limit: int = 120) -> str:
    return json.dumps(text if len(text) <= limit else text[: limit - 3] + "...", ensure_ascii=not text.isprintable())


def _kind(value: object) -> str:
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


def _show(value: object) -> str:
    """A value as YAML, in one short line. Lists and mappings by their kind only: they may be of any size."""
    if isinstance(value, str):
        return _quote(value)
    if value is None or isinstance(value, (bool, float)):
        return _flow(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "a huge number"  # str() of more than 4300 digits raises
    return str(value)[:60] if _is_scalar(value) else f"a {_kind(value)}"


def _show_typed(value: object) -> str:
    return f"{_show(value)} ({_kind(value)})" if value is not None and _is_scalar(value) else _show(value)


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float, bytes, datetime.date))


def _check_pattern(at: _Place, key: str) -> None:
    if not key.strip():
        raise at.error('an empty pattern matches nothing; write "*" for every tensor, or drop the line')


def _unknown_source(at: _Place, wanted: SourceId, sources: Sequence[Source]) -> RecipeError:
    """The message for an id that no source has, with the nearest that one has."""
    known = list({source.id: None for source in sources})
    if not known:
        return at.error(f'unknown source id {_show_typed(wanted)}; "sources" is empty')
    near = _nearest_id(wanted, sources)
    hint = f"; did you mean {near}?" if near else ";"
    listed = ", ".join(map(_show, known[:12])) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return at.error(f"unknown source id {_show_typed(wanted)}{hint} known: {listed}")


def _nearest_id(wanted: SourceId, sources: Sequence[Source]) -> str | None:
    for source in sources:  # the same word, of another type: "4" and 4, "yes" and true
        as_text, as_value = (wanted, source.id) if isinstance(wanted, str) else (source.id, wanted)
        if isinstance(as_text, str) and not isinstance(as_value, str) and _reads_as(as_text, as_value):
            return _show_typed(source.id)
    for source in sources:
        if isinstance(wanted, str) and wanted == source.model_dir:
            return f"{_show_typed(source.id)}, the id of that directory"
    # spelling says nothing between two numbers: 40 is no slip for 4
    spelled = {
        str(source.id).lower(): source.id
        for source in sources
        if isinstance(source.id, str) or (isinstance(wanted, str) and source.id is not None)
    }
    word = str(wanted).lower()
    near = difflib.get_close_matches(word, spelled, n=1, cutoff=0.6)
    near = near or [text for text in spelled if word and (text.startswith(word) or word.startswith(text or "\n"))]
    return _show_typed(spelled[near[0]]) if len(near) == 1 else None


def _reads_as(text: str, value: SourceId) -> bool:
    try:
        return bool(yaml.safe_load(text) == value)
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError):
        return False  # not YAML by itself, so not another spelling of the value


def _nearest_key(key: object, known: Iterable[str]) -> str | None:
    spelled = {word.replace("_", ""): word for word in known}
    near = difflib.get_close_matches(re.sub(r"[-_\s]", "", str(key).lower()), spelled, n=1, cutoff=0.7)
    return spelled[near[0]] if near else None


# ---------------------------------------------------------------------------------------------------------- reading


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read an override file.

    Raises RecipeError where the file cannot be read, is not UTF-8 or YAML, or does not say what a recipe must say;
    the message names the file as given, the line, what was found and what was wanted.
    """
    name = os.fspath(path)
    try:
        data = read_bytes(name, kind="recipe", error=RecipeError)
    except RecipeError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        if missing or os.path.isdir(name):
            what = "no such file" if missing else "is a directory"
            raise RecipeError(f"{name}: {what}; wanted an override file (YAML)") from None
        raise
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None
    return _parse(text, name, Path(path))


def parse_recipe(text: str, name: str = "<string>") -> Recipe:
    """Read a recipe from text; messages call it `name`. Raises RecipeError as load_recipe does."""
    return _parse(text, name, None)


class _Loader(yaml.SafeLoader):
    """safe_load, but a scalar that its own type refuses (0x, 2001-99-99) is a YAML error with a place."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError):
            tag = node.tag.rpartition(":")[2]
            what = _quote(node.value, 60) if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise yaml.constructor.ConstructorError(
                None, None, f"{what} cannot be read as {tag}; quote it if it is meant as text", node.start_mark
            ) from None


def _read_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None, _Repeated]:
    """The value exactly as safe_load gives it, its node, and the keys written twice."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None, {}
        repeated = _repeated_keys(node)  # before construction, which mixes merged keys into the nodes
        return loader.construct_document(node), node, repeated
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from None
    except yaml.reader.ReaderError as error:
        line = len(re.findall(r"\r\n|[\r\n]", text[: error.position])) + 1
        raise RecipeError(
            f"{name}:{line}: not YAML: the character U+{int(error.character):04X} is not allowed"
        ) from None
    except RecursionError:
        raise RecipeError(f"{name}: not a recipe: the YAML is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _syntax_error(error: yaml.MarkedYAMLError, text: str, name: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    at = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    problem = " ".join((error.problem or error.context or "cannot be read").split())
    if problem == "but found another document":
        return RecipeError(f'{at}: a second YAML document starts here ("---"); a recipe is one document')
    hint = ""
    if "alias" in f"{error.context} {problem}":
        hint = '; a pattern that starts with "*" needs quotes'
    elif mark and "\t" in text[mark.index : mark.index + 1]:
        hint = "; indent with blanks, not tabs"
    return RecipeError(f"{at}: not YAML: {problem}{hint}")


def _repeated_keys(root: yaml.Node) -> _Repeated:
    """Keys written more than once in one mapping, with their lines, by the id of the mapping's node."""
    repeated: _Repeated = {}
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], list[int]] = {}
            for key, value in node.value:
                children += (key, value)
                if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                    lines.setdefault((key.tag, key.value), []).append(_line(key))
            repeated[id(node)] = [(text, at) for (_, text), at in lines.items() if len(at) > 1]
        for child in children:
            if id(child) not in seen:  # an alias is the same node again
                seen.add(id(child))
                waiting.append(child)
    return repeated


@dataclass(frozen=True)
class _Mapping:
    """A mapping that was read, with its nodes for the lines."""

    at: _Place
    value: dict[Any, Any]
    node: yaml.MappingNode
    repeated: _Repeated
    known: tuple[str, ...]

    def place(self, key: str) -> _Place:
        return self.at.inside(key, self._pair(key)[1])

    def _pair(self, key: str) -> tuple[yaml.Node, yaml.Node]:
        """The nodes of a text key and its value: the last that was written, as in the value itself."""
        return next(pair for pair in reversed(self.node.value) if pair[0].tag == _TEXT_TAG and pair[0].value == key)

    def entries(self, key: str, known: tuple[str, ...]) -> Iterator[_Mapping]:
        """The mappings of a list. Raises RecipeError where it is no list or holds anything else."""
        at, items, node = self.place(key), self.value[key], self._pair(key)[1]
        if not isinstance(items, list) or not isinstance(node, yaml.SequenceNode):
            way_out = f'; write "{key}: []" for none' if items is None else ""
            raise at.error(f"{_show_typed(items)} is not a list{way_out}")
        for number, (item, item_node) in enumerate(zip(items, node.value, strict=True)):
            item_at = self.at.inside(f"{key}[{number}]", item_node)
            if not isinstance(item, dict) or not isinstance(item_node, yaml.MappingNode):
                wanted = ", ".join(f"{word}: ..." for word in known[:2])
                raise item_at.error(f"{_show_typed(item)} is not a mapping; wanted {{{wanted}}}")
            yield _Mapping(item_at, item, item_node, self.repeated, known)

    def require(self, key: str) -> Any:
        """Raises RecipeError where the key is missing, naming one that may have been meant for it."""
        if key in self.value:
            return self.value[key]
        slips = [other for other in self.value if other not in self.known and _nearest_key(other, self.known) == key]
        hint = f"; {_show(slips[0])} is not known: did you mean {_quote(key)}?" if slips else ""
        raise self.at.error(f"{_quote(key)} is missing{hint}")

    def text(self, key: str) -> str:
        """Raises RecipeError where the value is missing or not text."""
        value = self.require(key)
        if isinstance(value, str):
            return value
        node = self._pair(key)[1]
        way_out = (
            f"; put it in quotes: {_quote(node.value)}" if isinstance(node, yaml.ScalarNode) and node.value else ""
        )
        raise self.place(key).error(f"{_show_typed(value)} is not text{way_out}")

    def scalar(self, key: str) -> SourceId:
        """Raises RecipeError where the value is missing or a list, a mapping or a set."""
        value: SourceId = self.require(key)
        if not _is_scalar(value):
            raise self.place(key).error(f"{_show(value)} cannot be a source id; wanted text or a number")
        return value

    def note(self) -> str | None:
        """Ours and optional. Scalars that are not text are kept as they are spelled, anything else is dropped."""
        if self.value.get("note") is None:
            return None
        node = self._pair("note")[1]
        return node.value if isinstance(node, yaml.ScalarNode) else None

    def oddities(self) -> Iterator[str]:
        """What is no error, but may be a slip."""
        for text, lines in self.repeated.get(id(self.node), ()):
            last = _Place(self.at.name, lines[-1], self.at.inside_file)
            earlier = ", ".join(map(str, lines[:-1]))
            yield f"{last}: {_quote(text)} is written again (before: line {earlier}); the last one counts"
        for key in self.value:
            if key not in self.known:
                at = (
                    _Place(self.at.name, _line(self._pair(key)[0]), self.at.inside_file)
                    if isinstance(key, str)
                    else self.at
                )
                near = _nearest_key(key, self.known)
                yield f"{at}: unknown key {_show(key)} is ignored" + (f"; did you mean {_quote(near)}?" if near else "")


def _parse(text: str, name: str, path: Path | None) -> Recipe:
    data, node, repeated = _read_yaml(text, name)
    if data is None:
        raise RecipeError(f'{name}: is empty; wanted a mapping with "sources:" and "overrides:"')
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        line = _line(node) if node is not None else 0
        raise _Place(name, line).error(f'{_show_typed(data)} is not a mapping; wanted "sources:" and "overrides:"')
    top = _Mapping(_Place(name, _line(node)), data, node, repeated, _TOP_KEYS)
    warnings = list(top.oddities())

    top.require("overrides")
    override_entries = list(top.entries("overrides", _OVERRIDE_KEYS))
    if override_entries:  # a plain copy may leave the sources out
        top.require("sources")
    sources: list[Source] = []
    seen: dict[SourceId, Source] = {}
    for entry in top.entries("sources", _SOURCE_KEYS) if "sources" in data else ():
        source = _read_source(entry)
        if not source.model_dir.strip():
            raise entry.place("model_dir").error("is blank; wanted a directory")
        if source.id in seen:
            before = seen[source.id]
            warnings.append(
                f"{entry.place('id')}: {_show_typed(source.id)} is the id of line {before.line} again "
                f"({_show_typed(before.id)}); the last directory counts: {_quote(source.model_dir)}"
            )
        warnings += entry.oddities()
        seen[source.id] = source
        sources.append(source)

    overrides: list[Override] = []
    for entry in override_entries:
        override = Override(entry.text("key"), entry.scalar("source"), entry.at.line, entry.note())
        _check_pattern(entry.place("key"), override.key)
        if override.source not in seen:
            raise _unknown_source(entry.place("source"), override.source, sources)
        warnings += entry.oddities()
        overrides.append(override)

    return Recipe(
        sources=tuple(sources),
        overrides=tuple(overrides),
        base=data.get("base"),
        budget=data.get("budget"),
        provenance=data.get("provenance"),
        path=path,
        name=name,
        other={key: value for key, value in data.items() if key not in _TOP_KEYS},
        warnings=tuple(warnings),
    )


def describe_spec(spec: Mapping[str, Any]) -> str:
    """`bits: 4, group_size: 32`: what stands for the directory of a source that is to be made."""
    return ", ".join(f"{key}: {_flow(value)}" for key, value in spec.items())


def _read_source(entry: _Mapping) -> Source:
    """A directory, or a source to be made. Raises RecipeError where an entry is both or neither."""
    kinds = [key for key in MADE_KINDS if key in entry.value]
    settings = {key: entry.value[key] for key in MADE_SETTINGS if key in entry.value}
    if settings and "bits" not in kinds:
        raise entry.at.error(f'"{next(iter(settings))}" goes with "bits" (a source that model_quantize makes)')
    if not kinds:
        return Source(entry.scalar("id"), entry.text("model_dir"), entry.at.line, entry.note())
    if "model_dir" in entry.value or len(kinds) > 1:
        both = ["model_dir", *kinds] if "model_dir" in entry.value else kinds
        raise entry.at.error(f"{' and '.join(map(_quote, both))} exclude each other; a source is there or is made")
    spec = {kinds[0]: entry.scalar(kinds[0]), **{key: entry.scalar(key) for key in settings}}
    for key, value in spec.items():
        _check_setting(entry.place(key), key, value)
    return Source(entry.scalar("id"), describe_spec(spec), entry.at.line, entry.note(), spec)


def _check_setting(at: _Place, key: str, value: Any) -> None:
    """Raise RecipeError for a value of a made source that is of another type than its key has."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e6 < value < 1e6  # NaN is not
    wanted = {
        "bits": (number, "a number"),
        "group_size": (
            (number and isinstance(value, int) and value > 0) or value == "channel",
            "a whole number, or channel",
        ),
        "symmetric": (isinstance(value, bool), "true or false"),
    }
    fits, what = wanted.get(key, (isinstance(value, str), "a name"))
    if not fits:
        raise at.error(f"{_show_typed(value)[:200]} cannot be {key}; wanted {what}")


def resolve_dir(recipe: Recipe, model_dir: str) -> tuple[Path, str | None]:
    """Where a `model_dir` lies: in the working directory, or else beside the recipe file, with a note that says so.

    Raises RecipeError where neither exists, naming both places and the line.
    """
    if os.path.exists(model_dir):
        return Path(model_dir), None
    lines = [number for number, source in enumerate(recipe.sources) if source.model_dir == model_dir]
    at = _Place(recipe.name)
    if lines:
        at = _Place(recipe.name, recipe.sources[lines[-1]].line, f"sources[{lines[-1]}].model_dir")
    looked_in = [os.path.abspath(model_dir)]
    if recipe.path is not None and not os.path.isabs(model_dir):
        beside = recipe.path.parent / model_dir
        if os.path.exists(beside):
            return (
                beside,
                f"{at}: {_quote(model_dir)} is not in the working directory; taken beside the recipe: {beside}",
            )
        if os.path.abspath(beside) not in looked_in:
            looked_in.append(os.path.abspath(beside))
    hint = '; "~" is not expanded here' if model_dir.startswith("~") else ""
    raise at.error(
        f"{_quote(model_dir)} does not exist; looked for {' and '.join(str(place)[:300] for place in looked_in)}{hint}"
    )


# ---------------------------------------------------------------------------------------------------------- writing


def dump_recipe(recipe: Recipe, comments: Mapping[str, str] | None = None, header: str | None = None) -> str:
    """The recipe as YAML, one line an override; reading it back resolves every name the same.

    comments: by key, set behind its line. header: comment lines above everything. `provenance` and whatever else the
    recipe carries must be plain YAML values (yaml.YAMLError if not).
    """
    lines = [f"# {_comment(line)}".rstrip() for line in (header or "").splitlines()]

    lines.append("sources:" if recipe.sources else "sources: []")
    for source in recipe.sources:
        where = f"model_dir: {_flow(source.model_dir)}" if source.spec is None else describe_spec(source.spec)
        lines.append(f"  - {{id: {_flow(source.id)}, {where}{_flow_note(source.note)}}}")

    lines.append("overrides:" if recipe.overrides else "overrides: []")
    rows = [
        (
            f"  - {{key: {_flow(line.key, quoted=True)}, source: {_flow(line.source)}{_flow_note(line.note)}}}",
            _comment((comments or {}).get(line.key, "")),
        )
        for line in recipe.overrides
    ]
    column = max((len(row) for row, comment in rows if comment and len(row) <= _ALIGN_UP_TO), default=0)
    lines += [f"{row:<{column}}  # {comment}" if comment else row for row, comment in rows]

    ours = {"base": recipe.base, "budget": recipe.budget, "provenance": recipe.provenance}
    rest = {key: value for key, value in ours.items() if value is not None} | dict(recipe.other)
    if rest:  # in one piece: its anchors must not repeat
        lines.append(_dump(rest, default_flow_style=False, sort_keys=False).rstrip("\n"))
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Text with line breaks of any kind goes into double quotes: in single ones U+0085 comes back as a blank."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar(_TEXT_TAG, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


_PLAIN = re.compile(r"[A-Za-z0-9_.*-]+")  # keys of recipes, as a rule


def _dump(value: Any, **options: Any) -> str:
    return str(yaml.dump(value, Dumper=_Dumper, allow_unicode=True, width=math.inf, **options))


@lru_cache(maxsize=1024, typed=True)  # 1, 1.0 and true are equal and spelled apart
def _flow(value: SourceId, quoted: bool = False) -> str:
    """A scalar as it may stand inside {...} on one line."""
    if quoted and isinstance(value, str) and _PLAIN.fullmatch(value):
        return f'"{value}"'  # what YAML's emitter writes, a hundred times as fast
    text = _dump([value], default_flow_style=True, default_style='"' if quoted else None).strip()[1:-1]
    if not quoted and isinstance(value, str) and text[:1] == "'":
        return _flow(value, quoted=True)
    return text


def _flow_note(note: str | None) -> str:
    return "" if note is None else f", note: {_flow(note)}"


def _comment(text: str) -> str:
    """One line of characters that YAML allows."""
    return yaml.reader.Reader.NON_PRINTABLE.sub("?", " ".join(text.split()))
