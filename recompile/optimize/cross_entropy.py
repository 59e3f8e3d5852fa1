"""Costs tilted until the mix that they choose measures best.

Costs of swaps made one at a time rank swaps of one kind well. Where kinds differ they err together: errors of early
layers, of one kind of projection, of the lowest rung cost more, or less, together than alone. So every cost is
multiplied by

    exp(theta . features),   features: the source (the lowest two, and size), the kind of module, depth, depth^2,
                             log(score / cost) where there is a second opinion, the squared-gradient score

and theta, a dozen numbers, is looked for by what counts: the KL of the whole mix that the solver chooses with it. The
search is the cross-entropy method (Rubinstein, "The cross-entropy method for combinatorial and continuous
optimization", Methodology and Computing in Applied Probability 1, 1999): draw thetas from a normal distribution, keep
the best, move the distribution to them. No gradient is needed, and noise that all mixes share does no harm.

On SmolLM2-135M at 2.9 bits 50 mixes took the exact choice from 3.08 to 2.62 nats per token (on other rows); at 4.4 they
gain nothing. Numbers only: what measures is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recompile.costs import kind_of, layer_index
from recompile.optimize.problem import Problem, Solution, Swap, choice_key, with_costs

ROUNDS = 5
POPULATION = 10  # mixes a round
FEWEST_BEST = 3  # thetas that the distribution moves to after the first round, and one more a round
SPREAD, BLEND_SPREAD = 0.35, 0.5  # first standard deviations: of log factors, of the share of the score
SPREAD_KEPT = 0.7  # share of the standard deviation that a round leaves, whatever the best ones say
LOWEST_RAISED = math.log(2)  # of the lowest source, in some of the first thetas

Choice = Mapping[str, str]


@dataclass(frozen=True)
class CrossEntropyRound:
    """After a round: the best mix so far, and how many were measured."""

    number: int
    choice: Choice
    kl_nats: float
    measured: int


@dataclass(frozen=True)
class CostFactors:
    """The factors that a theta gives every option.

    logs: features of every option, [options, features], groups and their options in the problem's order
    names: of the features
    """

    problem: Problem
    logs: NDArray[np.float64]
    names: tuple[str, ...]

    @staticmethod
    def of(problem: Problem, scores: Mapping[Swap, float] | None = None) -> CostFactors:
        """scores: a second opinion on costs, by (member, source); members of one group are added up."""
        sizes: dict[str, int] = {}
        for group in problem.groups:
            for option in group.options:
                sizes[option.source] = sizes.get(option.source, 0) + option.bits
        order = sorted(sizes, key=sizes.__getitem__)
        kind_by_group = [kind_of(group.members[0]) for group in problem.groups]
        kinds = sorted(set(kind_by_group))
        deepest = max((layer_index(group.members[0]) or 0 for group in problem.groups), default=0)
        named: dict[str, list[float]] = {}
        for group, kind in zip(problem.groups, kind_by_group, strict=True):
            layer = layer_index(group.members[0])
            depth = 2 * layer / deepest - 1 if layer is not None and deepest else 0.0
            smallest = max(1, min(option.bits for option in group.options))
            for option in group.options:
                values = {"score": _log_ratio(group.members, option.source, option.cost, scores)}
                values |= {f"source {name}": float(option.source == name) for name in order[:2]}
                values["size"] = math.log2(max(1, option.bits) / smallest)
                values |= {name: float(name == kind) for name in kinds}
                values |= {"depth": depth, "depth^2": depth**2 - 1 / 3}
                for name, value in values.items():
                    named.setdefault(name, []).append(value)
        kept = {name: values for name, values in named.items() if max(values) > min(values)}
        logs = np.array(list(kept.values())).T.reshape(len(next(iter(named.values()), [])), len(kept))
        return CostFactors(problem, logs, tuple(kept))

    def apply(self, theta: NDArray[np.float64]) -> Problem:
        """The problem with its costs times exp(theta . features). Costs of 0 or less, which are noise, become 0."""
        factors = iter(np.exp(self.logs @ theta).tolist())
        return with_costs(self.problem, lambda group, option: max(option.cost, 0.0) * next(factors))

    def first(self) -> list[NDArray[np.float64]]:
        """Where the search begins: the costs as they are, the score in their place, and the lowest source at more."""
        found: list[NDArray[np.float64]] = []
        lowest = next((name for name in self.names if name.startswith("source ")), None)
        for blend, raised in ((0.0, 0.0), (1.0, 0.0), (0.0, LOWEST_RAISED), (1.0, LOWEST_RAISED), (0.5, LOWEST_RAISED)):
            theta = np.zeros(len(self.names))
            for number, name in enumerate(self.names):
                theta[number] = blend if name == "score" else raised if name == lowest else 0.0
            if not any(np.array_equal(theta, other) for other in found):
                found.append(theta)
        return found


def search_factors(
    tilts: CostFactors,
    solve: Callable[[Problem], Solution],
    measure: Callable[[Sequence[Choice]], Sequence[float]],
    *,
    rounds: int = ROUNDS,
    population: int = POPULATION,
    seed: int = 0,
) -> Iterator[CrossEntropyRound]:
    """Yields a CrossEntropyRound after every round.

    solve: within the limits; measure: KL of whole mixes, nats per token, the same rows each time
    """
    generator = np.random.default_rng(seed)
    is_blend = np.array([name == "score" for name in tilts.names])
    mean = np.where(is_blend, 0.5, 0.0)
    spread = np.where(is_blend, BLEND_SPREAD, SPREAD)
    found: list[tuple[float, NDArray[np.float64], Choice]] = []
    known: dict[tuple[tuple[str, str], ...], float] = {}
    for number in range(rounds):
        thetas = tilts.first()[:population] if number == 0 else []
        thetas += [mean + spread * generator.standard_normal(len(mean)) for _ in range(population - len(thetas))]
        choices = [dict(solve(tilts.apply(theta)).choice) for theta in thetas]
        fresh = {choice_key(choice): choice for choice in choices if choice_key(choice) not in known}
        known |= dict(zip(fresh, measure(list(fresh.values())), strict=True))
        found += [(known[choice_key(choice)], theta, choice) for theta, choice in zip(thetas, choices, strict=True)]
        found.sort(key=lambda entry: entry[0])
        best = np.array([theta for _, theta, _ in found[: FEWEST_BEST + number]])
        mean = best.mean(0)
        spread = SPREAD_KEPT * spread + (1 - SPREAD_KEPT) * best.std(0)
        yield CrossEntropyRound(number, found[0][2], found[0][0], len(known))


def _log_ratio(members: Sequence[str], source: str, cost: float, scores: Mapping[Swap, float] | None) -> float:
    if scores is None:
        return 0.0
    score = math.fsum(scores.get((member, source), 0.0) for member in members)
    return math.log(score / cost) if score > 0 and cost > 0 else 0.0
