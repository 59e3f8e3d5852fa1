"""Swaps measured one at a time at the recipe, and moves by what is believed of all of them.

A quadratic form says what a swap costs near the recipe, and the next rung is not near: at 3.4 bits on SmolLM2 such
costs were four times what the swaps measure, and correlated with that by 0.69. The profile's costs, of swaps into the
reference, correlated by 0.87 at the right size, and exchanges by them made the recipe worse all the same, for a solver
picks the costs that are wrong. So swaps are measured at the recipe itself, all the model's answer and nothing else.

What is believed of a swap is normal: first the profile's cost, right to a share of itself; every row that it is
measured on sharpens it. To measure all would take too long, so costs are drawn from the posterior, a move is solved
with them, and what it moves is measured next, for that may belong to the best move (Thompson, "On the likelihood that
one unknown probability exceeds another in view of the evidence of two samples", Biometrika 25, 1933). Many are seen on
a few rows first, and those that still may on more (successive halving: Karnin, Koren and Somekh, ICML 2013).

Numbers only: what measures is handed in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recompile.optimize.problem import Group, Option, Problem, Swap, with_costs
from recompile.optimize.trust_region import Solve, moved_groups, propose

COST_ERROR = 0.35  # of the profile's cost of a swap, relative
# of the recipe's KL:
COST_FLOOR = 0.005  # standard deviation of a profile's cost beside that
ROW_FLOOR = 0.005  # of a swap's change over rows, where few rows say less
MEASURED_FLOOR = 0.0015  # of a measured change, however many rows
AGED = 0.003  # what a recipe's move adds to all that was believed
CARE = 0.5  # standard deviations by which a swap is taken to be worse than believed, when a move is chosen
DRAWS = 24  # of moves, to find what to measure; fewer where they make so many swaps:
SWAPS_DRAWN = 400
WIDER = (1.0, 2.0, 4.0)  # how much less sure posterior are taken to be, where nothing is found otherwise


@dataclass
class Posterior:
    """What moving a group from what it has to another source changes, nats per token, by (group, source).

    problem: its costs are the first posterior; choice: member -> source; kl_nats: of that recipe
    """

    problem: Problem
    choice: Mapping[str, str]
    kl_nats: float
    mean: dict[Swap, float] = field(init=False)
    variance: dict[Swap, float] = field(init=False)
    _seen: dict[Swap, list[float]] = field(default_factory=dict)  # at this recipe

    def __post_init__(self) -> None:
        self.mean, self.variance = {}, {}
        for group in self.problem.groups:
            here = group.option(self.choice[group.members[0]])
            assert here is not None, "the recipe is a choice of this problem"
            for option in group.options:
                change = option.cost - here.cost
                spread = COST_FLOOR * self.kl_nats + COST_ERROR * abs(change)
                self.mean[group.name, option.source] = change
                self.variance[group.name, option.source] = 0.0 if option is here else spread**2

    def see(self, swap: Swap, changes: Sequence[float]) -> None:
        """Rows on which a swap was measured at this recipe."""
        self._seen.setdefault(swap, []).extend(changes)

    def of(self, swap: Swap) -> tuple[float, float]:
        """(mean, variance)"""
        mean, variance = self.mean[swap], self.variance[swap]
        rows = self._seen.get(swap)
        if not rows or not variance > 0:
            return mean, variance
        spread = max(float(np.std(rows, ddof=1)) if len(rows) > 1 else 0.0, ROW_FLOOR * self.kl_nats)
        error = spread**2 / len(rows) + (MEASURED_FLOOR * self.kl_nats) ** 2
        weight, prior = 1 / error, 1 / variance
        return (weight * math.fsum(rows) / len(rows) + prior * mean) / (weight + prior), 1 / (weight + prior)

    def settle(self, choice: Mapping[str, str], kl_nats: float) -> None:
        """Take over what was measured, from the recipe that is gone on with."""
        found = {swap: self.of(swap) for swap in self.mean}
        aged = (AGED * kl_nats) ** 2
        for group in self.problem.groups:
            here = (group.name, choice[group.members[0]])
            for option in group.options:
                swap = (group.name, option.source)
                stayed = here[1] == self.choice[group.members[0]]
                self.mean[swap] = found[swap][0] - found[here][0]
                self.variance[swap] = found[swap][1] + aged + (0.0 if stayed else found[here][1])
            self.mean[here] = self.variance[here] = 0.0
        self.choice, self.kl_nats, self._seen = dict(choice), kl_nats, {}

    def sample(self, rng: np.random.Generator, wider: float = 1.0) -> Problem:
        """The problem with costs drawn from the posterior, or from ones so many times as wide."""

        def cost(group: Group, option: Option) -> float:
            mean, variance = self.of((group.name, option.source))
            return mean + wider * math.sqrt(variance) * float(rng.normal()) if variance > 0 else mean

        return with_costs(self.problem, cost)

    def careful(self) -> Problem:
        """The problem with costs a little worse than believed, the less sure the more."""

        def cost(group: Group, option: Option) -> float:
            mean, variance = self.of((group.name, option.source))
            return mean + CARE * math.sqrt(variance)

        return with_costs(self.problem, cost)

    def change(self, choice: Mapping[str, str]) -> float:
        """What a move is believed to change: its swaps added up."""
        moved = moved_groups(self.problem, self.choice, choice)
        return math.fsum(self.of((group.name, choice[group.members[0]]))[0] for group in moved)


def swaps_to_measure(
    posterior: Posterior, budget_bits: int, most_moved: int, count: int, solve: Solve, rng: np.random.Generator
) -> list[tuple[Group, str]]:
    """At most `count` swaps that may belong to the best move of at most so many groups: those that most of the drawn
    moves make. None where even by posterior that are far less sure nothing would move."""
    drawn: Counter[Swap] = Counter()
    for wider in WIDER:
        for _ in range(DRAWS):
            move = propose(posterior.sample(rng, wider), budget_bits, posterior.choice, most_moved, solve)
            moved = moved_groups(posterior.problem, posterior.choice, move)
            drawn.update((group.name, move[group.members[0]]) for group in moved)
            if drawn.total() >= SWAPS_DRAWN:
                break
        if drawn:
            break
    groups = {group.name: group for group in posterior.problem.groups}
    return [(groups[name], source) for (name, source), _ in drawn.most_common(count)]


def moves_to_measure(posterior: Posterior, budget_bits: int, most_moved: int, solve: Solve) -> list[dict[str, str]]:
    """The best moves of at most so many groups, of half as many, and of half of that; they all differ."""
    careful = posterior.careful()
    found: list[dict[str, str]] = []
    for most in (most_moved, most_moved // 2, most_moved // 4):
        move = propose(careful, budget_bits, posterior.choice, max(2, most), solve)  # an exchange takes two
        if move != posterior.choice and move not in found:
            found.append(move)
    return found
