"""Patterns over tensor names, and what one that matches nothing may have meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache


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


def suggest(key: str, names: Iterable[str]) -> str | None:
    """A key near to one that matches no name, or None. What is suggested matches at least one of the names.

    Tried in turn: the key read as a regex, or as mlx-lm names modules; a missing `.*` at the end; a missing `*.`
    in front; the nearest name by spelling, with the numbers of the key put back where they exist and `*` where they
    do not.
    """
    names = tuple(names)
    text = key.strip()
    plain = _without_regex(text)
    for base in dict.fromkeys((text, plain, _without_mlx(plain))):
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


# What mlx-lm calls stacks of experts and text models in config.json, and transformers.
_OF_MLX = {
    "experts.switch_glu": "experts.*",
    "switch_mlp": "experts.*",
    "language_model.model": "model.language_model",
    "language_model.lm_head": "lm_head",
}


def _without_mlx(text: str) -> str:
    for theirs, own in _OF_MLX.items():
        text = text.replace(theirs, own)
    return text


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
