"""An assignment of modules to directories as few override lines, without loss.

The reader of recipes groups lines by directory; of the directories that match a name the one first mentioned last wins
(recipe.py). So with the directories in an order d1, d2, ... a pattern of d may also match modules of later ones, which
win with lines of their own (the exceptions, which therefore come last), but none of an earlier one or of the base.
Orders are tried and covered greedily; what comes out is read back with the reader's own rules, and where that differs
in any name the plain form, a line a module, is returned.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from recompile.recipe.recipe import Override, Recipe, Source

_ORDER_WORK = 300_000  # modules x orders tried
_FEWEST_ORDERS = 6


@dataclass(frozen=True)
class Line:
    """One override: a key of the recipe, its directory, and the modules that it decides, in order."""

    key: str
    directory: str
    modules: tuple[str, ...]


def compress(assignment: Mapping[str, str | None], others: Iterable[str] | None) -> tuple[Line, ...]:
    """Lines for module -> directory (None: the base), sorted, exceptions last.

    others: all further tensor names of the base and the sources, which have to stay with the base; None where they are
    not known: then every line is for one module.
    """
    plain = plain_lines(assignment)
    if others is None or not plain:
        return plain
    staying = {name for name in others if name.rpartition(".")[0] not in assignment}
    best = min(_attempts(assignment, staying), key=lambda keys: (len(keys), keys), default=())
    if not best or len(best) >= len(plain):
        return plain
    return _decide(best, assignment, staying) or plain


def plain_lines(assignment: Mapping[str, str | None]) -> tuple[Line, ...]:
    """A line for every module that is not taken from the base, in natural order; no two compete."""
    taken = [(module, directory) for module, directory in assignment.items() if directory is not None]
    return tuple(Line(f"{module}.*", directory, (module,)) for module, directory in sorted(taken, key=_natural))


def _natural(line: tuple[str, str]) -> tuple[tuple[int, int, str], ...]:
    """`model.layers.*.x` before `model.layers.2.x` before `model.layers.10.x`."""
    return tuple(
        (0, 0, word) if word == "*" else (2, int(word), "") if word.isdigit() else (1, 0, word)
        for word in line[0].split(".")
    )


def _attempts(assignment: Mapping[str, str | None], staying: set[str]) -> Iterator[tuple[tuple[str, str], ...]]:
    """(key, directory) of all lines, for every order of directories that is tried."""
    counts = Counter(directory for directory in assignment.values() if directory is not None)
    matched: dict[str, list[str]] = defaultdict(list)
    for module in assignment:
        for key in _keys_for(module):
            matched[key].append(module)
    spoilt = {key for module in {name.rpartition(".")[0] for name in staying} for key in _keys_for(module)}
    usable = {key: modules for key, modules in matched.items() if key not in spoilt}
    tries = max(_FEWEST_ORDERS, _ORDER_WORK // max(1, len(assignment)))
    common = [directory for directory, _ in counts.most_common()]  # the likely order: the most used is the rule
    for order in itertools.islice(itertools.permutations(common), tries):
        rank: dict[str | None, int] = {None: -1} | {directory: place for place, directory in enumerate(order)}
        ranks = {key: min(rank[assignment[module]] for module in modules) for key, modules in usable.items()}
        lines: list[tuple[str, str]] = []
        for place, directory in enumerate(order):
            fair = {
                key: [module for module in modules if assignment[module] == directory]
                for key, modules in usable.items()
                if ranks[key] >= place
            }
            lines += sorted(((key, directory) for key in _cover(fair, usable)), key=_natural)
        yield tuple(lines)


def _keys_for(module: str) -> tuple[str, ...]:
    """Patterns that match all tensors of a module: itself and its parents, with their numbers or stars for them.

    model.layers.3.mlp.experts.7.up_proj -> it, its parents down to model.layers.3.*, the same with a star for 7, with
    stars for both. Nothing above the first number: `model.*` says little and matches much.
    """
    words = module.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    keys: dict[str, None] = {f"{module}.*": None}
    if not numbers:
        return tuple(keys)
    for stars in (numbers[len(numbers) - count :] for count in range(len(numbers) + 1)):
        spelled = ["*" if place in stars else word for place, word in enumerate(words)]
        for end in range(len(words), numbers[0], -1):
            keys[re.sub(r"(\.\*)+$", "", ".".join(spelled[:end])) + ".*"] = None
    return tuple(keys)


def _cover(gains: Mapping[str, list[str]], usable: Mapping[str, list[str]]) -> list[str]:
    """Few keys that match all modules that any of them gains: the one with most new modules first; of equal ones that
    which matches least besides."""
    heap = [(-len(modules), len(usable[key]), len(key), key) for key, modules in gains.items() if modules]
    heapq.heapify(heap)
    left = {module for modules in gains.values() for module in modules}
    chosen: list[str] = []
    while left:
        gain, width, length, key = heapq.heappop(heap)
        now = sum(module in left for module in gains[key])
        if not now:
            continue
        if now < -gain:
            heapq.heappush(heap, (-now, width, length, key))
            continue
        chosen.append(key)
        left.difference_update(gains[key])
    times = Counter(module for key in chosen for module in gains[key])
    kept: list[str] = []
    for key in chosen:  # one whose modules later picks cover as well goes
        if all(times[module] > 1 for module in gains[key]):
            times.subtract(gains[key])
        else:
            kept.append(key)
    return kept


def _decide(
    keys: tuple[tuple[str, str], ...], assignment: Mapping[str, str | None], staying: set[str]
) -> tuple[Line, ...] | None:
    """The lines with the modules they decide, by the reader's own rules; None where a name comes out wrong."""
    recipe = Recipe(
        tuple(Source(directory, directory) for directory in dict.fromkeys(directory for _, directory in keys)),
        tuple(Override(key, directory) for key, directory in keys),
    )
    deciding: dict[str, list[str]] = {key: [] for key, _ in keys}
    for module in sorted(assignment, key=lambda module: _natural((module, ""))):
        decision = recipe.explain(f"{module}.weight")
        if decision.directory != assignment[module]:
            return None
        if decision.override is not None:
            deciding[decision.override.key].append(module)
    if any(recipe.source_dir(name) is not None for name in staying):
        return None
    return tuple(Line(key, directory, tuple(deciding[key])) for key, directory in keys if deciding[key])
