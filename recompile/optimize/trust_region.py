"""Moves from one recipe to another: the budgeted choice, held to few groups at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from recompile.optimize.problem import Group, Option, Problem, Solution, with_costs

HALVINGS = 12  # of the reluctance to move that holds a move to its size

Solve = Callable[[Problem, int], Solution]  # within so many bits


def propose(problem: Problem, budget_bits: int, current: Mapping[str, str], most: int, solve: Solve) -> dict[str, str]:
    """The choice of the least cost that moves at most so many groups: what a group has is made cheaper by just so much
    that no more of them move."""
    found = dict(solve(problem, budget_bits).choice)
    if len(moved_groups(problem, current, found)) <= most:
        return found
    low, high = 0.0, 2 * max(_spread(option.cost for option in group.options) for group in problem.groups)
    found = dict(current)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = dict(solve(_reluctant(problem, current, middle), budget_bits).choice)
        if len(moved_groups(problem, current, tried)) > most:
            low = middle
        else:
            high, found = middle, tried
    return found


def moved_groups(problem: Problem, before: Mapping[str, str], after: Mapping[str, str]) -> list[Group]:
    """Groups of which a member changes its source from one choice to another."""
    return [group for group in problem.groups if any(before[m] != after[m] for m in group.members)]


def _reluctant(problem: Problem, current: Mapping[str, str], bonus: float) -> Problem:
    def cost(group: Group, option: Option) -> float:
        return option.cost - bonus if option.source == current[group.members[0]] else option.cost

    return with_costs(problem, cost)


def _spread(values: Iterator[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return max(finite) - min(finite) if finite else 0.0
