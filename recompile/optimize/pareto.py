"""Many budgets from one profile: the Pareto table of KL against size, with recipes nested where that costs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from recompile.costs import Profile
from recompile.errors import BudgetError, RecompileError
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Choice, Rules, predict, prepare_problem, solve
from recompile.optimize.problem import Problem, Solution, prepare, reachable_range

NESTED_SHARE = 1e-3  # of the predicted KL: what nesting may cost and still counts as nothing (errors are far larger)


@dataclass(frozen=True)
class FrontierPoint:
    """One budget, solved."""

    choice: Choice
    is_nested: bool  # no group is smaller than in the point before it
    dominated: bool  # another point or uniform variant is no larger and predicted to cost less


@dataclass(frozen=True)
class UniformPoint:
    """One variant as it is."""

    label: str
    bits: int  # stored bits of quantized modules
    total_bytes: int
    bpw: float
    predicted_kl_nats: float
    predicted_std_error: float | None
    choice: Mapping[str, str]


@dataclass(frozen=True)
class Frontier:
    """The best choices over a range of sizes, with the uniform variants to compare them with."""

    points: tuple[FrontierPoint, ...]  # sizes rising
    uniform: tuple[UniformPoint, ...]
    left_out: tuple[float, ...]  # budgets that nothing reaches, bits per weight
    reachable: tuple[float, float]  # bits per weight


def parse_grid(text: str) -> tuple[float, ...]:
    """ "2.5:6:0.25" -> 2.5, 2.75, ... 6. Raises RecompileError."""
    parts = text.split(":")
    try:
        low, high, step = (float(part) for part in parts)
    except ValueError:
        raise RecompileError(f'{{grid}} "{text}": wanted LOW:HIGH:STEP in bits per weight, e.g. 2.5:6:0.25') from None
    finite = all(math.isfinite(part) for part in (low, high, step))
    if not finite or not (0 < low <= high and step > 0) or (high - low) / step > 10_000:
        raise RecompileError(f'{{grid}} "{text}": wanted 0 < LOW <= HIGH, STEP > 0 and at most 10000 budgets')
    return tuple(round(low + number * step, 9) for number in range(int((high - low) / step + 1e-9) + 1))


def solve_frontier(profile: Profile, budgets_bpw: Sequence[float], solver: str, rules: Rules) -> Frontier:
    """A choice for every budget (bits per weight over quantized modules); those out of reach are left out and named.

    Raises BudgetError where all of them are out of reach, RecompileError for a profile with holes.
    """
    problem = prepare(prepare_problem(profile, rules))
    fewest, most = reachable_range(problem)
    weights = max(1, profile.counted_weights)
    found: list[tuple[Choice, bool]] = []
    left_out = []
    for bpw in sorted(budgets_bpw):
        budget = Budget(bpw=bpw)
        if not fewest <= budget.bits(profile) <= most:
            left_out.append(bpw)
            continue
        free = solve(profile, problem, budget, solver, rules)
        nested = True
        if found:
            free, nested = _nest(profile, problem, budget, solver, rules, free, found[-1][0].solution.choice)
        mean, error = predict(profile, free.choice)
        found.append((Choice(free, profile, budget, mean, error), nested))
    if not found:
        raise BudgetError(
            f"none of these budgets is reachable; reachable range: {fewest / weights:.4f} to {most / weights:.4f} bpw"
        )
    uniform = tuple(uniform_points(profile))
    points = tuple(
        FrontierPoint(choice, nested, _is_dominated(choice, [other for other, _ in found], uniform))
        for choice, nested in found
    )
    return Frontier(points, uniform, tuple(left_out), (fewest / weights, most / weights))


def _nest(
    profile: Profile,
    problem: Problem,
    budget: Budget,
    solver: str,
    rules: Rules,
    free: Solution,
    before: Mapping[str, str],
) -> tuple[Solution, bool]:
    """The solution in which no group is smaller than before, if it costs nothing, and whether the result is one."""
    narrow, is_nested = [], True
    for group in problem.groups:
        now, then = (group.option(choice[group.members[0]]) for choice in (free.choice, before))
        assert now is not None, "a solver chooses what is offered"
        assert then is not None, "a solver chooses what is offered"
        is_nested &= now.bits >= then.bits
        narrow.append(replace(group, options=tuple(option for option in group.options if option.bits >= then.bits)))
    if is_nested:
        return free, True
    try:
        nested = solve(profile, replace(problem, groups=tuple(narrow)), budget, solver, rules)
    except BudgetError:  # the steps between neighbours may leave no nested choice
        return free, False
    control = profile.control.mean if profile.control is not None else 0.0
    if nested.cost - free.cost <= NESTED_SHARE * abs(control + free.cost):
        # the bound is that of the free problem
        gap = max(0.0, nested.cost - free.lower_bound)
        return replace(nested, lower_bound=free.lower_bound, gap=gap), True
    return free, False


def uniform_points(profile: Profile) -> list[UniformPoint]:
    """Every variant as it is, as far as the profile knows its costs; sizes rising."""
    header = profile.header
    points = []
    for candidate in header.candidates:
        label = candidate.label
        if any(label not in group.bits or profile.cost(group.name, label) is None for group in header.groups):
            continue
        choice = {group.name: label for group in header.groups}
        bits = header.fixed_bits + sum(group.bits[label] for group in header.groups)
        mean, error = predict(profile, choice)
        total = (bits + header.other_bits) // 8
        points.append(UniformPoint(label, bits, total, bits / max(1, profile.counted_weights), mean, error, choice))
    return sorted(points, key=lambda point: point.bits)


def _is_dominated(choice: Choice, others: Sequence[Choice], uniform: Sequence[UniformPoint]) -> bool:
    baselines = [(other.bits, other.predicted_kl_nats) for other in others if other is not choice]
    baselines += [(point.bits, point.predicted_kl_nats) for point in uniform]
    margin = 1e-12 * abs(choice.predicted_kl_nats)
    return any(bits <= choice.bits and kl < choice.predicted_kl_nats - margin for bits, kl in baselines)
