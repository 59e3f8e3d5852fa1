"""Whole recipes, improved where they are: descent over recipes, by what every swap costs at the recipe itself.

Costs of single swaps are measured around the reference, and a recipe sits somewhere else. With e_gc the error of group
g's weights under candidate c, and the KL quadratic in all errors around the recipe,

    cost of c in g, the other groups as they are = <gradient, e_gc> - cross_gc + own_gc,
    own_gc = 1/2 e_gc' F e_gc,    cross_gc = e_gc' F e_gh,

F the Fisher matrix of the model as it is there and h what g has: the gradient of the KL at the recipe holds the group's
own part, F e_gh, which cross takes out. So corrected the costs do not depend on what the group has, and can be averaged
over steps while the recipe moves: each step sees a few rows only, and their average becomes as sharp as that of many.
On it the budgeted choice is solved, with at most a share of the groups moved at once, for costs of moves made together
do not quite add up.

What the quadratic form of single swaps leaves out is measured: every move tells which factor on own and cross would
have predicted it (the damping; 1.0 to 1.2 on SmolLM2 at 3.4 bits), and the next is solved with the average of these.

What groups that move together cost together comes from the draws of `model_profile --pairs`, where there are any
(recompile.optimize.interactions): they join the quadratic part, as far as other rows confirm them. That is little on
SmolLM2, where errors of two groups correlate by 0.02 at 3.4 bits (root mean square, 2,160 samples).

Where no such move pays any more, swaps are measured one at a time (recompile.optimize.thompson), and moves
made of those.

Numbers only: what linearises and measures is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from recompile.optimize.exact import solve_exact
from recompile.optimize.interactions import Interactions
from recompile.optimize.problem import Group, Option, Problem, Swap, choice_key, evaluate, with_costs
from recompile.optimize.thompson import Posterior, moves_to_measure, swaps_to_measure
from recompile.optimize.trust_region import Solve, moved_groups, propose

KEPT = 0.98  # weight of the steps so far when another one is averaged in
PRIOR_STEPS = 2.0  # steps that the profile's costs count for
FIRST_DAMPING = 1.1
LEAST_DAMPING, MOST_DAMPING = 0.1, 10.0
BOLDER = 1.3  # by so much the damping is lowered, again and again, where no untried move is predicted to improve
DAMPING_SPREAD = 0.3  # standard deviation of the damping before anything is measured
LINEAR_ERROR = 0.25  # of a move's linear part, relative: what one move says of the damping is no surer than that
MOVED_SHARE = 12  # at most one group in so many is moved in a step, but never held to fewer than LEAST_MOVED
LEAST_MOVED = 4
STALLED = 10  # steps in a row without a better recipe, and swaps are measured one at a time from there on
PATIENCE = 3  # steps in a row of the last kind without a better recipe, and the search ends
MOST_SWAPPED_GROUPS = 2000  # groups; of more, what can be measured one at a time says little
SWAPS = (100, 40, 20, 20)  # that are measured one at a time in such a step, on fresh rows each time
COMPANIES = 3  # times at most that a move is looked for again in the company of the last one found


@dataclass(frozen=True)
class SwapModel:
    """What every candidate costs at one recipe on some rows, nats per token, by (group, source).

    slope: <gradient of the KL, error of the candidate's weights from the reference's>
    own: half the quadratic form of that error alone, in the Fisher matrix of the recipe
    cross: the product of that error with the one of what the group has, in the same form; 2 own for what it has
    alike: the correlations of errors that cross was made with, by two sources; empty where it was not made so
    """

    kl_nats: float  # of the recipe on these rows
    slope: Mapping[Swap, float]
    own: Mapping[Swap, float]
    cross: Mapping[Swap, float]
    alike: Mapping[tuple[str, str], float] = field(default_factory=dict)


class Oracle(Protocol):
    """What the method asks of the models."""

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        """At a choice (group -> source), on rows that no earlier step has seen where there are any left."""
        ...

    def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
        """KL of every accepting row, nats per token. The same rows each time, none of them seen by linearise."""
        ...

    def changes(
        self, choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int
    ) -> Sequence[Sequence[float]]:
        """By what each of some swaps (group -> source, those that move together) changes the KL of a choice, nats per
        token on every row of the turn; rows as those of a step of linearise."""
        ...


@dataclass(frozen=True)
class RefineStep:
    """One step; `choice` is the best recipe after it."""

    step: int
    accepted: bool  # the step's move gave the best recipe so far
    choice: Mapping[str, str]
    bits: int
    kl_nats: float  # of the best recipe on the accepting rows
    change_nats: float  # of the tried recipe against the best one before it, paired over rows: mean
    change_std_error: float
    predicted_nats: float  # of the step's move, from where it began
    moved: int  # groups that the move changes; 0: none was predicted to improve
    damping: float  # by which the moves so far would best have been predicted
    measured: int = 0  # swaps that the step measured one at a time


@dataclass
class Costs:
    """Averages of the steps' models, by (group, source)."""

    weight: float = 0.0
    slope: dict[Swap, float] = field(default_factory=dict)
    curve: dict[Swap, float] = field(default_factory=dict)  # own - cross

    def add(self, model: SwapModel, moved: float = 0.0) -> None:
        """Average in what was found at a choice. moved: share of the groups that moved since the last one, by which
        what was found before it holds less."""
        before = KEPT * (1 - moved) ** 2 * self.weight
        self.weight = before + 1
        for swap, slope in model.slope.items():
            for averages, value in ((self.slope, slope), (self.curve, model.own[swap] - model.cross[swap])):
                averages[swap] = (before * averages.get(swap, 0.0) + value) / self.weight

    def of(self, swap: Swap, damping: float) -> float:
        """NaN for a swap that was not measured."""
        if swap not in self.slope:
            return math.nan
        return self.slope[swap] + damping * self.curve[swap]


@dataclass
class Damping:
    """The factor on curvature that predicts measured moves, by least squares; `first` is right to DAMPING_SPREAD."""

    first: float
    total: float = field(init=False)
    weight: float = DAMPING_SPREAD**-2

    def __post_init__(self) -> None:
        self.total = self.weight * self.first

    @property
    def value(self) -> float:
        return min(max(self.total / self.weight, LEAST_DAMPING), MOST_DAMPING)

    def see(self, change: float, error: float, linear: float, quadratic: float) -> None:
        """A move that was measured, and what was predicted: linear + damping * quadratic."""
        variance = error**2 + (LINEAR_ERROR * linear) ** 2
        if 0 < variance < math.inf:
            self.total += quadratic * (change - linear) / variance
            self.weight += quadratic**2 / variance


def refine(
    problem: Problem,
    budget_bits: int,
    start: Mapping[str, str],
    oracle: Oracle,
    *,
    steps: int = 24,
    solve: Solve = solve_exact,
    out_of_time: Callable[[], bool] = lambda: False,
    interactions: Interactions | None = None,
) -> Iterator[RefineStep]:
    """Improve `start` (member -> source, within the budget or not); yields a RefineStep per step.

    problem: its costs count for PRIOR_STEPS steps (not where one of a group is NaN), and are what is believed of swaps
    before they are measured. If `start` is over the budget, the first step moves to within it whatever it costs.

    A recipe that is not better on the accepting rows is gone on from all the same, for their noise is larger than what
    a step gains; unless it is worse beyond two standard errors: then the best one is gone back to. Where no untried
    move is predicted to improve, one is tried that would with less damping, and taken only if it is better. After moves
    that are gone back on half as many groups are moved at once, after a better recipe twice as many again.

    After STALLED steps without a better recipe predictions are used up: from there on swaps are measured one at a time
    at the best recipe (recompile.optimize.thompson), where there are no more than MOST_SWAPPED_GROUPS groups. Ends
    after `steps`, after PATIENCE of the last kind of steps without a better recipe, or out of time; the result is the
    best recipe measured.
    """
    search = _Search(problem, budget_bits, oracle, solve, out_of_time)
    best = current = dict(start)
    best_rows = rows = list(oracle.measure(best))
    tried = {choice_key(best)}
    over = evaluate(problem, best)[0] > budget_bits
    costs, factor = Costs(), Damping(FIRST_DAMPING)
    most = first_most = most_moved(problem)
    idle, shift = 0, 0.0
    for step in range(steps):
        if out_of_time() and not over:
            return
        if idle == STALLED and not over:
            if len(problem.groups) > MOST_SWAPPED_GROUPS:
                return
            yield from _swaps(search, best, best_rows, range(step, steps), tried, factor)
            return
        idle += 1
        costs.add(oracle.linearise(current, step), shift)
        held_to = len(problem.groups) if over else most
        move = partial(propose, budget_bits=budget_bits, current=current, most=held_to, solve=solve)
        find = partial(_solve_together, problem, costs, current=current, move=move, interactions=interactions)
        fitted = factor.value
        proposal, used = _untried(find, fitted, current, tried)
        moved = len(moved_groups(problem, current, proposal)) if choice_key(proposal) not in tried else 0
        mean, error, predicted, accepted, shift = 0.0, 0.0, 0.0, False, 0.0
        if moved:
            tried.add(choice_key(proposal))
            found = list(oracle.measure(proposal))
            linear, quadratic = _predict(costs, current, proposal, interactions)
            predicted = linear + used * quadratic
            factor.see(*_mean_and_error(found, rows), linear, quadratic)
            mean, error = _mean_and_error(found, best_rows)
            accepted = over or mean < 0
            before = current
            if not accepted and used < fitted:
                most = max(2, most // 2)  # a move on trial; an exchange takes two
            elif not accepted and mean > 2 * error:
                current, rows, most = best, best_rows, max(2, most // 2)
            else:
                current, rows = proposal, found
                if accepted:
                    most = min(2 * most, first_most)
            shift = len(moved_groups(problem, before, current)) / len(problem.groups)
            if accepted:
                best, best_rows, over, idle = proposal, found, False, 0
        bits, kl = evaluate(problem, best)[0], _mean(best_rows)
        yield RefineStep(step, accepted, dict(best), bits, kl, mean, error, predicted, moved, factor.value)


def most_moved(problem: Problem) -> int:
    """Groups that a step may move."""
    return max(LEAST_MOVED, len(problem.groups) // MOVED_SHARE)


@dataclass(frozen=True)
class _Search:
    """What a search is of, and with what."""

    problem: Problem
    budget_bits: int
    oracle: Oracle
    solve: Solve
    out_of_time: Callable[[], bool]


def _untried(
    find: Callable[[float], dict[str, str]],
    damping: float,
    current: Mapping[str, str],
    tried: set[tuple[tuple[str, str], ...]],
) -> tuple[dict[str, str], float]:
    """What `find` proposes by a damping, which is lowered until that is a move that was not tried; and the damping."""
    proposal = find(damping)
    while (proposal == current or choice_key(proposal) in tried) and damping > LEAST_DAMPING:
        damping = max(LEAST_DAMPING, damping / BOLDER)
        proposal = find(damping)
    return proposal, damping


def _swaps(
    search: _Search,
    best: Mapping[str, str],
    best_rows: Sequence[float],
    left: Iterable[int],
    tried: set[tuple[tuple[str, str], ...]],
    factor: Damping,
) -> Iterator[RefineStep]:
    """The steps that are left, by swaps measured at the best recipe: each measures many on a few fresh rows and fewer
    on more, then the moves that are believed to be best; the best of those is taken if it is better."""
    problem, budget_bits, oracle, solve = search.problem, search.budget_bits, search.oracle, search.solve
    posterior, rng, most = Posterior(problem, best, _mean(best_rows)), np.random.default_rng(0), most_moved(problem)
    idle = 0
    for step in left:
        if search.out_of_time() or idle == PATIENCE:
            return
        idle += 1
        measured = set()
        for heat, count in enumerate(SWAPS):
            swaps = swaps_to_measure(posterior, budget_bits, most, count, solve, rng)
            asked = [dict.fromkeys(group.members, source) for group, source in swaps]
            changes = oracle.changes(best, asked, len(SWAPS) * step + heat) if asked else ()
            for (group, source), rows in zip(swaps, changes, strict=True):
                posterior.see((group.name, source), rows)
                measured.add((group.name, source))
        moves = [
            move for move in moves_to_measure(posterior, budget_bits, most, solve) if choice_key(move) not in tried
        ]
        tried.update(map(choice_key, moves))
        found = [(move, list(oracle.measure(move))) for move in moves]
        mean, error, predicted, moved, accepted = 0.0, 0.0, 0.0, 0, False
        if found:
            move, move_rows = min(found, key=lambda one: _mean(one[1]))
            predicted, moved = posterior.change(move), len(moved_groups(problem, best, move))
            mean, error = _mean_and_error(move_rows, best_rows)
            accepted = mean < 0
        if accepted:
            best, best_rows, idle = move, move_rows, 0
            posterior.settle(best, _mean(best_rows))
        bits, kl = evaluate(problem, best)[0], _mean(best_rows)
        yield RefineStep(
            step, accepted, dict(best), bits, kl, mean, error, predicted, moved, factor.value, len(measured)
        )


def priced(problem: Problem, costs: Costs, damping: float) -> Problem:
    """The problem with measured costs, those of tied members added up; its own costs count for PRIOR_STEPS steps."""
    share = costs.weight / (costs.weight + PRIOR_STEPS)

    def cost(group: Group, option: Option) -> float:
        found = math.fsum(costs.of((member, option.source), damping) for member in group.members)
        if not all(math.isfinite(other.cost) for other in group.options):
            return found
        return share * found + (1 - share) * option.cost

    return with_costs(problem, cost)


def _solve_together(
    problem: Problem,
    costs: Costs,
    damping: float,
    current: Mapping[str, str],
    move: Callable[[Problem], dict[str, str]],
    interactions: Interactions | None,
) -> dict[str, str]:
    """What `move` finds by the costs. With interactions it looks again, by what each swap costs in the company of the
    last one found, until that finds none that is predicted to be better."""
    alone = priced(problem, costs, damping)
    best = move(alone)
    if interactions is None:
        return best

    def predicted(choice: Mapping[str, str]) -> float:
        linear, quadratic = _predict(costs, current, choice, interactions)
        return linear + damping * quadratic

    for _ in range(COMPANIES):
        found = move(_dearer(alone, interactions.beside(current, best), damping))
        if not predicted(found) < predicted(best):
            break
        best = found
    return best


def _dearer(problem: Problem, company: Mapping[Swap, float], damping: float) -> Problem:
    def cost(group: Group, option: Option) -> float:
        return option.cost + damping * math.fsum(company.get((member, option.source), 0.0) for member in group.members)

    return with_costs(problem, cost)


def _predict(
    costs: Costs, before: Mapping[str, str], after: Mapping[str, str], interactions: Interactions | None
) -> tuple[float, float]:
    """(linear, quadratic) parts of a move's change of KL."""
    moves = [((name, before[name]), (name, source)) for name, source in after.items() if before[name] != source]
    linear = math.fsum(costs.of(there, 0.0) - costs.of(here, 0.0) for here, there in moves)
    whole = math.fsum(costs.of(there, 1.0) - costs.of(here, 1.0) for here, there in moves)
    company = interactions.between(before, after) if interactions is not None else 0.0
    return linear, whole - linear + company


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _mean_and_error(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """Of the differences of paired rows."""
    values = [a - b for a, b in zip(after, before, strict=True)]
    mean = _mean(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
