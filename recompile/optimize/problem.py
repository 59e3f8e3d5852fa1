"""The budgeted choice as a value: groups, their options, a budget in bits, constraints, and what a solver returns.

One option of every group is chosen. Bits are whole numbers of stored bits (scales and other overhead included);
costs are KL(reference || candidate) in nats per token, taken to add up over groups. Nothing here knows what a model
or a file is. Constraints are functions from a problem to a narrower problem; they change no argument.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from recompile.errors import BudgetError, RecompileError

Swap = tuple[str, str]  # (member of a group, source)


@dataclass(frozen=True)
class Option:
    """One candidate source of a group."""

    source: str
    bits: int  # stored bits of the whole group under this source, >= 0
    cost: float  # KL in nats per token; may be negative or zero (noise); NaN or infinite = not measured
    std_error: float = 0.0  # of cost, nats per token; no solver reads it


@dataclass(frozen=True)
class Group:
    """Modules that are chosen together. `members` are the names that a Solution answers for: itself, unless tied."""

    name: str
    options: tuple[Option, ...]
    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.members:
            object.__setattr__(self, "members", (self.name,))
        if not self.options:
            raise RecompileError(f'group "{self.name}" has no option')
        sources = {option.source for option in self.options}
        if len(sources) != len(self.options):
            labels = [option.source for option in self.options]
            twice = next(label for label in labels if labels.count(label) > 1)
            raise RecompileError(f'group "{self.name}" offers source "{twice}" twice; give each option its own label')
        for option in self.options:
            if option.bits < 0:
                raise RecompileError(f'group "{self.name}", source "{option.source}": {option.bits} bits; wanted >= 0')

    def option(self, source: str) -> Option | None:
        """The option with this label, or None where the group does not offer it."""
        return next((option for option in self.options if option.source == source), None)


@dataclass(frozen=True)
class Problem:
    """The budgeted choice: one option of every group. Raises RecompileError where a module is in two groups."""

    groups: tuple[Group, ...]
    fixed_bits: int = 0  # stored bits that nobody chooses and that the budget counts

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for group in self.groups:
            for member in group.members:
                if member in seen:
                    raise RecompileError(f'"{member}" is in two groups; a module is chosen once')
                seen.add(member)


@dataclass(frozen=True)
class Solution:
    """What a solver chose, and how much better any choice within the same budget could be."""

    choice: Mapping[str, str]  # member of a group -> source, in the order of the problem
    bits: int  # stored bits, fixed_bits included; never above budget_bits
    cost: float  # predicted KL, nats per token: the sum of the chosen costs
    lower_bound: float  # no choice within budget_bits costs less; equal to cost where optimality is proven
    gap: float  # cost - lower_bound, nats per token, >= 0; 0.0 = proven
    solver: str  # "greedy" or "exact"
    budget_bits: int


# --- sizes and usable options -----------------------------------------------------------------------------------


def prepare(problem: Problem) -> Problem:
    """Drop the options whose cost is not finite (not measured). Nothing to drop: the same object.

    Raises RecompileError naming a group of which no option is left.
    """
    isfinite = math.isfinite
    if all(isfinite(option.cost) for group in problem.groups for option in group.options):
        return problem
    groups = []
    for group in problem.groups:
        kept = tuple(option for option in group.options if isfinite(option.cost))
        if not kept:
            raise RecompileError(
                f'group "{group.name}" has no option with a measured cost (sources: {_sources(group)}); '
                "measure it, or leave it out of the problem and count its bits as fixed"
            )
        groups.append(group if len(kept) == len(group.options) else replace(group, options=kept))
    return replace(problem, groups=tuple(groups))


def reachable_range(problem: Problem) -> tuple[int, int]:
    """(fewest, most) bits of a choice of measured options, fixed_bits included. Raises as `prepare` does."""
    groups = prepare(problem).groups
    fewest = sum(min(option.bits for option in group.options) for group in groups)
    most = sum(max(option.bits for option in group.options) for group in groups)
    return problem.fixed_bits + fewest, problem.fixed_bits + most


def check_budget(problem: Problem, budget_bits: int) -> None:
    """Raise BudgetError, with the reachable range in bits, for a budget below the smallest or above the largest."""
    fewest, most = reachable_range(problem)
    if fewest <= budget_bits <= most:
        return
    wrong = "below the cheapest choice" if budget_bits < fewest else "above the most expensive choice"
    fixed = f" ({problem.fixed_bits} of them fixed)" if problem.fixed_bits else ""
    raise BudgetError(f"budget {budget_bits} bits is {wrong}; reachable range: {fewest} to {most} bits{fixed}")


def choice_key(choice: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Equal for equal choices, in whatever order they name their groups."""
    return tuple(sorted(choice.items()))


def evaluate(problem: Problem, choice: Mapping[str, str]) -> tuple[int, float]:
    """(bits with fixed_bits, cost in nats per token) of a choice of one source per member.

    Raises RecompileError for a member without a source, members of a tie that differ, or a source not offered.
    """
    bits, costs = problem.fixed_bits, []
    for group in problem.groups:
        missing = [member for member in group.members if member not in choice]
        if missing:
            raise RecompileError(f'no source is chosen for "{missing[0]}"')
        sources = {choice[member] for member in group.members}
        if len(sources) > 1:
            raise RecompileError(f'tied group "{group.name}" is given several sources: {", ".join(sorted(sources))}')
        option = _need(group, sources.pop())
        bits += option.bits
        costs.append(option.cost)
    return bits, math.fsum(costs)


def with_costs(problem: Problem, cost: Callable[[Group, Option], float]) -> Problem:
    """The problem with other costs."""
    groups = []  # no dataclasses.replace, which takes five times as long: searches do this for every draw
    for group in problem.groups:
        options = tuple(Option(o.source, o.bits, cost(group, o), o.std_error) for o in group.options)
        groups.append(Group(group.name, options, group.members))
    return replace(problem, groups=tuple(groups))


def expand_choice(problem: Problem, sources: Sequence[str]) -> dict[str, str]:
    """member -> source, from one source per group in the order of the problem."""
    return {member: source for group, source in zip(problem.groups, sources, strict=True) for member in group.members}


# --- constraints ------------------------------------------------------------------------------------------------
# Each names groups by a glob: `*` stands for any text, dots included, or none; all else is literal; the whole name
# must match. A tied group is named by its own name or by any member. Apply at_least, at_most and ban before pin and
# tie, since the source that at_least and at_most compare with must still be offered by every group that they name.


def glob_matches(glob: str, name: str) -> bool:
    """Whether the whole name matches; `*` is the only wildcard, crosses dots and may match nothing."""
    return _matcher(glob)(name)


def pin(problem: Problem, glob: str, source: str) -> Problem:
    """Leave the named groups no option but `source`. Raises RecompileError where a group does not offer it."""
    return _narrow(problem, glob, lambda group: (_need(group, source),), f"pin {glob}={source}")


def at_least(problem: Problem, glob: str, source: str) -> Problem:
    """Keep the options with at least the bits that `source` takes in the same group.

    Raises RecompileError where a named group does not offer `source`.
    """

    def keep(group: Group) -> tuple[Option, ...]:
        bits = _need(group, source).bits
        return tuple(option for option in group.options if option.bits >= bits)

    return _narrow(problem, glob, keep, f"min {glob}={source}")


def at_most(problem: Problem, glob: str, source: str) -> Problem:
    """Keep the options with at most the bits that `source` takes in the same group.

    Raises RecompileError where a named group does not offer `source`.
    """

    def keep(group: Group) -> tuple[Option, ...]:
        bits = _need(group, source).bits
        return tuple(option for option in group.options if option.bits <= bits)

    return _narrow(problem, glob, keep, f"max {glob}={source}")


def ban(problem: Problem, glob: str, source: str) -> Problem:
    """Take `source` away from the named groups; those that do not offer it stay as they are.

    Raises RecompileError where none of them offers it, or where one is left without an option.
    """
    matched = _matched(problem, glob)
    if all(problem.groups[index].option(source) is None for index in matched):
        offered = sorted({option.source for index in matched for option in problem.groups[index].options})
        raise RecompileError(
            f'ban {glob}={source}: no group that "{glob}" names offers source "{source}"'
            f"{_did_you_mean(source, offered)}; offered: {', '.join(offered)}"
        )
    return _narrow(
        problem,
        glob,
        lambda group: tuple(option for option in group.options if option.source != source),
        f"ban {glob}={source}",
    )


def tie(problem: Problem, glob: str) -> Problem:
    """Merge the named groups into one, so that all its members get the same source.

    Its options are the sources that all of them offer; bits and costs add up, and standard errors add in quadrature
    (as for independent measurements). It stands where its first member stood and is called by the glob. One match
    changes nothing. Raises RecompileError where the groups share no source.
    """
    return merge(problem, _matched(problem, glob), glob.strip(), f"tie {glob}")


def merge(problem: Problem, indexes: Sequence[int], name: str, what: str) -> Problem:
    """As tie, for groups by their numbers. what: who asks, for messages."""
    matched = sorted(indexes)
    if len(matched) < 2:
        return problem
    tied = [problem.groups[index] for index in matched]
    by_source = [{option.source: option for option in group.options} for group in tied]
    options = []
    for source in by_source[0]:
        same = [table[source] for table in by_source if source in table]
        if len(same) == len(tied):
            bits = sum(option.bits for option in same)
            cost = math.fsum(option.cost for option in same) if all(math.isfinite(o.cost) for o in same) else math.nan
            options.append(Option(source, bits, cost, math.hypot(*(option.std_error for option in same))))
    if not options:
        offers = "; ".join(f'"{group.name}" offers {_sources(group)}' for group in tied[:3])
        raise RecompileError(f"{what}: its {len(tied)} groups share no source: {offers}")
    merged = Group(name, tuple(options), tuple(member for group in tied for member in group.members))
    drop = set(matched[1:])
    groups = (
        merged if index == matched[0] else group for index, group in enumerate(problem.groups) if index not in drop
    )
    return replace(problem, groups=tuple(groups))


def _narrow(problem: Problem, glob: str, keep: Callable[[Group], tuple[Option, ...]], what: str) -> Problem:
    groups = list(problem.groups)
    for index in _matched(problem, glob):
        group = groups[index]
        try:
            options = keep(group)
        except RecompileError as error:
            raise RecompileError(f"{what}: {error}") from None
        if not options:
            raise RecompileError(f'{what}: leaves group "{group.name}" no option; it offers {_sources(group)}')
        if len(options) < len(group.options):
            groups[index] = replace(group, options=options)
    return replace(problem, groups=tuple(groups))


def _matcher(glob: str) -> Callable[[str], bool]:
    pattern = re.compile(".*".join(re.escape(part) for part in re.split(r"\*+", glob.strip())), re.DOTALL)
    return lambda name: pattern.fullmatch(name) is not None


def _matched(problem: Problem, glob: str) -> list[int]:
    """Indexes of the groups that the glob names; an error with the nearest name where there is none."""
    matches = _matcher(glob)
    matched = [
        index
        for index, group in enumerate(problem.groups)
        if matches(group.name) or any(matches(member) for member in group.members)
    ]
    if not matched:
        names = [name for group in problem.groups for name in {group.name: None, **dict.fromkeys(group.members)}]
        raise RecompileError(f'glob "{glob}" matches no group{_did_you_mean(glob.strip(), names)}')
    return matched


def _need(group: Group, source: str) -> Option:
    option = group.option(source)
    if option is None:
        raise RecompileError(f'group "{group.name}" does not offer source "{source}"; it offers {_sources(group)}')
    return option


def _did_you_mean(wanted: str, known: Sequence[str]) -> str:
    for cutoff in (0.6, 0.0):  # the first is quick on tens of thousands of names
        near = difflib.get_close_matches(wanted, known, n=1, cutoff=cutoff)
        if near:
            return f'; did you mean "{near[0]}"?'
    return ""


def _sources(group: Group) -> str:
    return ", ".join(option.source for option in group.options)
