"""The trust-region method on a made-up KL with known interactions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from recompile.optimize.exact import solve_exact
from recompile.optimize.problem import Group, Option, Problem, evaluate, tie
from recompile.optimize.refine import SwapModel, blend, refine, settle

SOURCES = ("2", "3", "4")


@dataclass
class MadeUp:
    """KL = 1/2 |sum over groups of v[group, source]|^2 + noise per row: swaps interact as errors of one output do."""

    groups: int = 8
    seed: int = 0
    rows: int = 6
    noise: float = 0.0
    measured: list[Mapping[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        together = rng.normal(size=4)  # every error leans the same way, so that they add up faster than linearly
        self.vectors = {
            (f"g{n}", source): 2.0 ** -int(source) * (rng.normal(size=4) + together) * (1 + n % 3)
            for n in range(self.groups)
            for source in SOURCES
        }
        self.rng = rng

    def kl(self, choice: Mapping[str, str]) -> float:
        return 0.5 * float((sum(self.vectors[swap] for swap in choice.items()) ** 2).sum())

    def problem(self) -> Problem:
        return Problem(
            tuple(
                Group(f"g{n}", tuple(Option(s, int(s) * 100, self.kl({f"g{n}": s})) for s in SOURCES))
                for n in range(self.groups)
            )
        )

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        total = sum(self.vectors[swap] for swap in choice.items())
        linear, quadratic = {}, {}
        for group, source in self.vectors:
            change = self.vectors[(group, source)] - self.vectors[(group, choice[group])]
            linear[(group, source)] = float(total @ change) + self.noise * float(self.rng.normal())
            quadratic[(group, source)] = 0.5 * float(change @ change)
        return SwapModel(self.kl(choice), linear, quadratic, dict.fromkeys(linear, self.noise or 1e-9))

    def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
        self.measured.append(choice)
        return [self.kl(choice) * (1 + 0.05 * row) for row in range(self.rows)]


def best(made: MadeUp, problem: Problem, budget: int) -> float:
    names = [group.name for group in problem.groups]
    choices = (dict(zip(names, sources, strict=True)) for sources in itertools.product(SOURCES, repeat=len(names)))
    return min(made.kl(choice) for choice in choices if evaluate(problem, choice)[0] <= budget)


@pytest.mark.parametrize("seed", range(6))
def test_it_beats_the_additive_optimum_and_never_goes_over_the_budget(seed: int) -> None:
    made = MadeUp(seed=seed)
    problem, budget = made.problem(), 8 * 280
    start = solve_exact(problem, budget).choice
    steps = list(refine(problem, budget, start, made, steps=12))
    values = [made.kl(start), *(made.kl(step.choice) for step in steps)]
    assert all(after <= before for before, after in itertools.pairwise(values))
    assert all(step.bits <= budget for step in steps)
    assert all(step.accepted == (step.change_nats < 0) for step in steps)


def test_it_finds_nearly_all_that_there_is_to_gain() -> None:
    """Beside the brute-force optimum of the true KL, interactions included."""
    left = []
    for seed in range(20):
        made = MadeUp(seed=seed)
        problem, budget = made.problem(), 8 * 280
        start = solve_exact(problem, budget).choice
        *_, last = [None, *refine(problem, budget, start, made, steps=8)]
        least = best(made, problem, budget)
        left.append((made.kl(last.choice if last else start) - least) / max(made.kl(start) - least, 1e-12))
    assert np.mean(left) < 0.1
    assert np.median(left) < 1e-6


def test_a_start_over_the_budget_is_brought_within_it() -> None:
    made = MadeUp()
    problem, budget = made.problem(), 8 * 280
    first = next(refine(problem, budget, {f"g{n}": "4" for n in range(8)}, made, steps=1))
    assert first.accepted
    assert first.bits <= budget


def test_tied_members_move_together() -> None:
    made = MadeUp()
    problem = tie(made.problem(), "g*")
    steps = list(refine(problem, 8 * 300, {f"g{n}": "2" for n in range(8)}, made, steps=2))
    assert all(len(set(step.choice.values())) == 1 for step in steps)
    assert set(steps[-1].choice.values()) == {"3"}


def test_a_bad_move_raises_the_damping_and_is_not_taken() -> None:
    class Worse(MadeUp):
        def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
            return [float(len(self.measured)) for _ in (self.measured.append(choice), *range(2))]  # ever worse

    made = Worse()
    problem, budget = made.problem(), 8 * 280
    start = {f"g{n}": "2" for n in range(8)}
    steps = list(refine(problem, budget, start, made, steps=1))
    assert not any(step.accepted for step in steps)
    assert all(step.choice == start for step in steps)
    assert len(steps) >= 1
    assert [step.damping for step in steps] == sorted(step.damping for step in steps)


def test_noise_is_shrunk_to_the_profile() -> None:
    made = MadeUp(noise=50.0)
    problem = made.problem()
    choice = {f"g{n}": "3" for n in range(8)}
    model = made.linearise(choice, 0)
    settled = settle(model, problem, choice)
    for group in problem.groups:
        costs = {option.source: option.cost for option in group.options}
        for source in SOURCES:
            swap = (group.name, source)
            prior = costs[source] - costs["3"] - model.quadratic[swap] if source != "3" else model.linear[swap]
            assert abs(settled.linear[swap] - prior) < 0.6 * abs(model.linear[swap] - prior) + 1e-9
    exact = MadeUp().linearise(choice, 0)
    kept = settle(exact, problem, choice)
    for swap, value in exact.linear.items():
        assert kept.linear[swap] == pytest.approx(value, abs=1e-6)  # what is certain stays


def test_an_old_model_is_seen_from_the_new_place() -> None:
    made = MadeUp()
    there, here = {f"g{n}": "3" for n in range(8)}, {f"g{n}": "4" if n == 2 else "3" for n in range(8)}
    mixed = blend(made.linearise(here, 1), made.linearise(there, 0), here)
    assert all(mixed.linear[(group, source)] == 0.0 for group, source in here.items())
    assert all(math.isfinite(value) and value >= 0 for value in mixed.quadratic.values())
