"""The mixes that people make without a profile, at the size of a recipe: what it has to beat.

Each starts from the largest uniform variant within the limits and spends the rest by a rule of thumb, one rung at a
time. "At no fewer bytes": a baseline that the limits would leave below the recipe gets one more small upgrade, and is
then marked as over them; `within` is the same without it, which could be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from recompile.costs import Profile
from recompile.optimize.engine_constraints import is_routed_expert
from recompile.optimize.limits import Row
from recompile.optimize.problem import Group, Problem, evaluate


@dataclass(frozen=True)
class Baseline:
    """A choice that a recipe is compared with: a uniform variant or a hand-made mix."""

    name: str
    choice: Mapping[str, str]  # member of a group -> source
    bits: int  # stored bits, fixed_bits included
    within: Mapping[str, str] | None  # the same within the limits; None: there is none (shown, not competing)

    @property
    def is_over(self) -> bool:
        return self.within is not None and self.within != self.choice


def make_baselines(
    profile: Profile,
    problem: Problem,
    recipe: Mapping[str, str],
    limits: Sequence[Row],
    others: Mapping[str, Mapping[str, str]] | None = None,
    as_they_are: Mapping[str, Mapping[str, str]] | None = None,
) -> list[Baseline]:
    """The baselines of a recipe, each different from it and from the others.

    problem: as solved, constraints applied (baselines keep them). limits: all that the recipe keeps. others: further
    choices by name, e.g. greedy's, raised to the recipe's size; they have to be within the limits. as_they_are: choices
    that are measured as given, and do not compete where they are over the limits.
    """
    field = _Field(profile, problem, recipe, limits)
    baselines = [*field.uniform_ones(), *field.heuristics()]
    for name, choice in (others or {}).items():
        baselines.append(field.raised(name, field.numbers_of(choice)))
    for name, choice in (as_they_are or {}).items():
        bits = evaluate(problem, choice)[0]  # raises where it is no choice of this problem
        baselines.append(Baseline(name, choice, bits, choice if field.fits(field.numbers_of(choice)) else None))
    seen: list[Mapping[str, str]] = [dict(recipe)]
    found = []
    for baseline in baselines:
        if dict(baseline.choice) not in seen:
            seen.append(dict(baseline.choice))
            found.append(baseline)
    return found


@dataclass(frozen=True)
class _Place:
    """What the rules of thumb ask of a group."""

    layer: int | None
    attention: bool
    shared: bool
    routed: bool


class _Field:
    """A problem with every group's options in order of size."""

    def __init__(self, profile: Profile, problem: Problem, recipe: Mapping[str, str], limits: Sequence[Row]) -> None:
        self.profile, self.problem, self.limits = profile, problem, limits
        self.order = [_by_size(group) for group in problem.groups]
        self.options = [[g.options[n] for n in order] for g, order in zip(problem.groups, self.order, strict=True)]
        self.rows_of: dict[int, list[int]] = {}
        for number, row in enumerate(limits):
            for place in row.use:
                self.rows_of.setdefault(place, []).append(number)
        self.wanted_bits = evaluate(problem, recipe)[0]
        by_name = {group.name: group for group in profile.header.groups}
        self.places = []
        for group in problem.groups:
            modules = [module for member in group.members for module in by_name[member].modules]
            self.places.append(
                _Place(
                    by_name[group.members[0]].layer,
                    any("attn" in module or "attention" in module for module in modules),
                    any(".shared_expert" in module for module in modules),
                    any(is_routed_expert(module) for module in modules),
                )
            )
        layers = [place.layer for place in self.places if place.layer is not None]
        self.last = max(layers, default=0)

    # ---- choices as one option number per group ----

    def numbers_of(self, choice: Mapping[str, str]) -> list[int]:
        return [
            next(n for n, option in enumerate(options) if option.source == choice[group.members[0]])
            for options, group in zip(self.options, self.problem.groups, strict=True)
        ]

    def choice_of(self, numbers: Sequence[int]) -> dict[str, str]:
        return {
            member: options[number].source
            for options, group, number in zip(self.options, self.problem.groups, numbers, strict=True)
            for member in group.members
        }

    def bits_of(self, numbers: Sequence[int]) -> int:
        return self.problem.fixed_bits + sum(o[n].bits for o, n in zip(self.options, numbers, strict=True))

    def used_by(self, numbers: Sequence[int]) -> list[int]:
        """What a choice takes of every limit."""
        original = [order[number] for order, number in zip(self.order, numbers, strict=True)]
        return [row.used(original) for row in self.limits]

    def fits(self, numbers: Sequence[int]) -> bool:
        return all(used <= row.limit for used, row in zip(self.used_by(numbers), self.limits, strict=True))

    def _uniform(self, label: str) -> list[int]:
        """Every group from one source; where it is not offered, from the next smaller one, or the smallest."""
        whole = {g.name: g.bits for g in self.profile.header.groups}
        numbers = []
        for options, group in zip(self.options, self.problem.groups, strict=True):
            bits = sum(whole[member][label] for member in group.members)
            exact = [n for n, option in enumerate(options) if option.source == label]
            below = [n for n, option in enumerate(options) if option.bits <= bits]
            numbers.append(exact[0] if exact else max(below, default=0))
        return numbers

    # ---- baselines ----

    def uniform_ones(self) -> Iterator[Baseline]:
        """The largest uniform variant within the limits, and the smallest beyond them, for comparison only."""
        inside, outside = self._sorted_uniform()
        if inside:
            label, numbers = inside[-1]
            choice = self.choice_of(numbers)
            yield Baseline(f"uniform {label}", choice, self.bits_of(numbers), choice)
        if outside:
            label, numbers = outside[0]
            yield Baseline(f"uniform {label} (larger)", self.choice_of(numbers), self.bits_of(numbers), None)

    def _sorted_uniform(self) -> tuple[list[tuple[str, list[int]]], list[tuple[str, list[int]]]]:
        made = [(c.label, self._uniform(c.label)) for c in self.profile.header.candidates]
        made.sort(key=lambda entry: self.bits_of(entry[1]))
        inside = [entry for entry in made if self.fits(entry[1])]
        return inside, [entry for entry in made if entry not in inside and self.bits_of(entry[1]) > self.wanted_bits]

    def heuristics(self) -> Iterator[Baseline]:
        inside, _ = self._sorted_uniform()
        label, start = inside[-1] if inside else ("smallest", [0] * len(self.options))
        if not self.fits(start):
            return
        groups = range(len(self.options))
        by_layer = sorted(groups, key=lambda g: -1 if (layer := self.places[g].layer) is None else layer)
        by_end = sorted(groups, key=lambda g: (self._from_end(g), g))
        attention = [g for g in by_layer if self.places[g].attention]
        rest = [g for g in by_layer if not self.places[g].attention]
        dense_rest = [g for g in rest if not self.places[g].routed] + [g for g in rest if self.places[g].routed]
        yield self.filled(f"uniform {label}, first layers +1", start, by_layer)
        if attention:
            yield self.filled(f"uniform {label}, attention +1", start, [*attention, *dense_rest])
        yield self.filled(f"uniform {label}, first and last layers +2", start, [g for g in by_end for _ in range(2)])
        shared = [g for g in by_layer if self.places[g].shared]
        if shared:
            later = [g for g in (*attention, *dense_rest) if g not in set(shared)]
            yield self.filled(f"uniform {label}, shared experts +2", start, [*shared, *shared, *later])

    def _from_end(self, group: int) -> int:
        layer = self.places[group].layer
        return -1 if layer is None else min(layer, self.last - layer)

    def filled(self, name: str, start: Sequence[int], order: Iterable[int]) -> Baseline:
        """One rung up for each group of the order in turn, those that do not fit passed over, until as large as the
        recipe; then the order again."""
        numbers, used, bits = list(start), self.used_by(start), self.bits_of(start)
        order = list(order)
        changed = True
        while changed and bits < self.wanted_bits:
            changed = False
            for group in order:
                if bits >= self.wanted_bits:
                    break
                added = self._raise(numbers, used, group)
                bits += added
                changed |= added > 0
        return self.raised(name, numbers)

    def _raise(self, numbers: list[int], used: list[int], group: int) -> int:
        """One rung up where the limits allow it; the bits it adds."""
        options, before = self.options[group], numbers[group]
        above = next((n for n in range(before + 1, len(options)) if options[n].bits > options[before].bits), None)
        if above is None:
            return 0
        order, rows = self.order[group], self.rows_of.get(group, [])
        added = [self.limits[row].use[group][order[above]] - self.limits[row].use[group][order[before]] for row in rows]
        if any(used[row] + more > self.limits[row].limit for row, more in zip(rows, added, strict=True)):
            return 0
        numbers[group] = above
        for row, more in zip(rows, added, strict=True):
            used[row] += more
        return options[above].bits - options[before].bits

    def raised(self, name: str, numbers: Sequence[int]) -> Baseline:
        """A choice within the limits; if it is smaller than the recipe, with the smallest upgrade that makes up for it
        (the largest there is, where none does)."""
        within = self.choice_of(numbers)
        short = self.wanted_bits - self.bits_of(numbers)
        if short <= 0:
            return Baseline(name, within, self.bits_of(numbers), within)
        steps = [
            (option.bits - options[number].bits, group, n)
            for group, (options, number) in enumerate(zip(self.options, numbers, strict=True))
            for n, option in enumerate(options)
            if option.bits - options[number].bits > 0
        ]
        enough = [step for step in steps if step[0] >= short]
        if not steps:
            return Baseline(name, within, self.bits_of(numbers), within)
        _, group, number = min(enough) if enough else max(steps)
        more = list(numbers)
        more[group] = number
        return Baseline(name, self.choice_of(more), self.bits_of(more), within)


def _by_size(group: Group) -> list[int]:
    """Option numbers, fewest bits first."""
    return [number for _, number in sorted((option.bits, number) for number, option in enumerate(group.options))]
