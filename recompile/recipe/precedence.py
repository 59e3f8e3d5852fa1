"""Who wins: the lines of a recipe in order of precedence, indexed by what a name must hold for them to match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from recompile.recipe.globs import Glob
from recompile.recipe.messages import Place, check_pattern, unknown_source
from recompile.recipe.values import Decision, Override, Source

_FEW = 16  # patterns: so many are tried in less time than it takes to look up which of them may match
_PIECE = 6  # characters of a literal by which patterns are indexed: "ers.3." and ".17." already tell layers apart


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
    text_sha256: str = field(default="", hash=False, compare=False, repr=False)  # of the file it was read from
    # A second name of some tensors (GGUF's own), by which lines may call them as well.
    aliases: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        known = {source.id for source in self.sources}
        for number, override in enumerate(self.overrides):
            at = Place(self.name, override.line, f"overrides[{number}]")
            check_pattern(at.inside("key"), override.key)
            if override.source not in known:
                raise unknown_source(at.inside("source"), override.source, self.sources)

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
        """Lines that match none of the names, in file order, but for optional ones. `suggest` finds what each may have
        meant."""
        rules = self._rules
        matched: set[int] = set()
        for name in names:
            for index in self._matching(name):
                matched.update(rules.patterns[index].written)
        needed = [(number, override) for number, override in enumerate(self.overrides) if not override.optional]
        return [override for number, override in needed if number not in matched]

    def location(self, line: Source | Override) -> str:
        """How a message names a line of this recipe: `mix.yaml:9: overrides[4]`.

        Raises ValueError for a line that is not of this recipe.
        """
        if isinstance(line, Source):
            return str(Place(self.name, line.line, f"sources[{self.sources.index(line)}]"))
        return str(Place(self.name, line.line, f"overrides[{self.overrides.index(line)}]"))

    def _matching(self, name: str) -> Sequence[int]:
        """Indices of the patterns that match a tensor by its name or by its alias."""
        found = self._rules.matching(name)
        alias = self.aliases.get(name)
        return found if alias is None else list(dict.fromkeys([*found, *self._rules.matching(alias)]))

    @cached_property
    def _rules(self) -> Rules:
        return Rules(self.sources, self.overrides)


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


class Rules:
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
