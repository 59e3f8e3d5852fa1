"""Costs that add up faster than linearly: a penalty on large errors, fitted to a few whole mixes.

Swaps measured one at a time are taken to add up; whole mixes say otherwise, most of all where many groups sit on their
lowest rung. The model here is one exponent and one scale,

    KL(mix)  ~  scale * sum over groups of cost ** power,

fitted by least squares of log KL over mixes that were measured as a whole (uniform variants are the natural ones). A
power above 1 makes large costs larger still and keeps an optimum off the lowest rung; a power of 1 is the plain sum.
 The solvers take the transformed costs as they take any others. Numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recompile.errors import FitError, RecompileError
from recompile.optimize.problem import Group, Option, Problem, with_costs

POWERS = (1.0, 4.0)  # looked for in between; below 1 small errors would be more expensive than large ones
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class SuperAdditive:
    """A fitted law."""

    power: float
    scale: float  # nats per token per (nats per token) ** power
    log_error: float  # root mean square of log(predicted / measured) over the mixes it was fitted to
    log_error_of_sum: float  # the same for the plain sum times its own best scale
    mixes: int

    def predict(self, problem: Problem, choice: Mapping[str, str]) -> float:
        """KL of a whole choice, nats per token."""
        return self.scale * math.fsum(_positive(cost) ** self.power for cost in costs_of(problem, choice))

    def transform(self, problem: Problem) -> Problem:
        """The problem with costs that add up. Order within a group is kept, but for costs of 0 or less (noise): 0."""

        def cost(group: Group, option: Option) -> float:
            if not math.isfinite(option.cost):
                return option.cost
            return self.scale * _positive(option.cost) ** self.power

        return with_costs(problem, cost)


def fit(problem: Problem, measured: Sequence[tuple[Mapping[str, str], float]]) -> SuperAdditive:
    """Fit power and scale to (choice, KL of the whole mix in nats per token), measured against the clean reference.

    Raises FitError for fewer than two mixes of different sums, or a KL of 0 or less.
    """
    if any(not kl > 0 for _, kl in measured):
        raise FitError("a whole mix measured a KL of 0 or less; mixes that differ from the reference are needed")
    costs = [[_positive(cost) for cost in costs_of(problem, choice)] for choice, _ in measured]
    sums = {round(math.log(total), 6) for found in costs if (total := math.fsum(found)) > 0}
    if len(sums) < 2 or len(sums) < len({kl for _, kl in measured}):
        raise FitError("fitting how costs add up needs at least two mixes of different predicted KL")
    logs = [math.log(kl) for _, kl in measured]

    def error(power: float) -> tuple[float, float]:
        """(root mean square, log of the scale) of the best scale for a power."""
        ratios = [log - math.log(math.fsum(c**power for c in found)) for log, found in zip(logs, costs, strict=True)]
        middle = math.fsum(ratios) / len(ratios)
        return math.sqrt(math.fsum((ratio - middle) ** 2 for ratio in ratios) / len(ratios)), middle

    low, high = POWERS
    while high - low > 1e-4:  # golden section: log of a sum of powers is convex in the power
        inner, outer = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if error(inner)[0] <= error(outer)[0]:
            high = outer
        else:
            low = inner
    power = min((POWERS[0], (low + high) / 2), key=lambda candidate: error(candidate)[0])
    best, middle = error(power)
    return SuperAdditive(power, math.exp(middle), best, error(1.0)[0], len(measured))


def uniform_mixes(problem: Problem, start: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Source -> the mix (member -> source) that takes it wherever it is offered, and elsewhere what `start` has.

    Under pins and bans these are what is left of the uniform variants; none is named twice.
    """
    mixes: dict[str, dict[str, str]] = {}
    for source in dict.fromkeys(option.source for group in problem.groups for option in group.options):
        mix: dict[str, str] = {}
        for group in problem.groups:
            label = source if group.option(source) is not None else start[group.members[0]]
            mix |= dict.fromkeys(group.members, label)
        if mix not in mixes.values():
            mixes[source] = mix
    return mixes


def costs_of(problem: Problem, choice: Mapping[str, str]) -> list[float]:
    """The cost of every group under a choice (member -> source). Raises RecompileError for a source not offered."""
    costs = []
    for group in problem.groups:
        option = group.option(choice[group.members[0]])
        if option is None:
            raise RecompileError(f'group "{group.name}" does not offer source "{choice[group.members[0]]}"')
        costs.append(option.cost)
    return costs


def _positive(cost: float) -> float:
    return max(cost, 0.0)
