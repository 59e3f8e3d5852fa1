"""The posterior of swaps against the arithmetic of normal distributions, and searches that measured swaps guide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from recompile.optimize.exact import solve_exact
from recompile.optimize.problem import Group, Option, Problem, evaluate, tie, with_costs
from recompile.optimize.refine import SWAPS, SwapModel, refine
from recompile.optimize.thompson import (
    AGED,
    COST_ERROR,
    COST_FLOOR,
    MEASURED_FLOOR,
    Posterior,
    swaps_to_measure,
)

SOURCES = ("2", "3", "4")


def problem(groups: int = 12, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    expensive = rng.lognormal(0.0, 0.7, groups)
    return Problem(
        tuple(
            Group(f"g{n}", tuple(Option(s, 100 * int(s), float(expensive[n]) * 4.0 ** -int(s)) for s in SOURCES))
            for n in range(groups)
        )
    )


def test_a_belief_is_the_profiles_cost_until_it_is_measured() -> None:
    of = problem()
    posterior = Posterior(of, {f"g{n}": "3" for n in range(12)}, 0.5)
    up = of.groups[4].options[2].cost - of.groups[4].options[1].cost
    mean, variance = posterior.of(("g4", "4"))
    assert mean == pytest.approx(up)
    assert variance == pytest.approx((COST_FLOOR * 0.5 + COST_ERROR * abs(up)) ** 2)
    assert posterior.of(("g4", "3")) == (0.0, 0.0)
    rows = [-0.03, -0.01, -0.05, 0.01]
    posterior.see(("g4", "4"), rows[:2])
    posterior.see(("g4", "4"), rows[2:])
    error = np.var(rows, ddof=1) / 4 + (MEASURED_FLOOR * 0.5) ** 2
    found = posterior.of(("g4", "4"))
    assert found[1] == pytest.approx(1 / (1 / error + 1 / variance))
    assert found[0] == pytest.approx(found[1] * (np.mean(rows) / error + up / variance))
    assert min(up, -0.02) < found[0] < max(up, -0.02)


def test_beliefs_move_with_the_recipe() -> None:
    posterior = Posterior(problem(), {f"g{n}": "3" for n in range(12)}, 0.5)
    posterior.see(("g4", "4"), [-0.02] * 8)
    before = {swap: posterior.of(swap) for swap in posterior.mean}
    after = {f"g{n}": "4" if n == 4 else "3" for n in range(12)}
    assert posterior.change(after) == before["g4", "4"][0]
    posterior.settle(after, 0.4)
    aged = (AGED * 0.4) ** 2
    assert posterior.of(("g4", "4")) == (0.0, 0.0)
    mean, variance = posterior.of(("g4", "3"))
    assert mean == pytest.approx(-before["g4", "4"][0])
    assert variance == pytest.approx(before["g4", "4"][1] + aged)
    mean, variance = posterior.of(("g4", "2"))
    assert mean == pytest.approx(before["g4", "2"][0] - before["g4", "4"][0])
    assert variance == pytest.approx(before["g4", "2"][1] + before["g4", "4"][1] + aged)
    assert posterior.of(("g5", "2")) == pytest.approx((before["g5", "2"][0], before["g5", "2"][1] + aged))


def test_what_is_measured_may_belong_to_the_best_move() -> None:
    of = problem(40)
    budget = 40 * 300
    choice = dict(solve_exact(of, budget).choice)
    posterior = Posterior(of, choice, 0.5)
    rng = np.random.default_rng(0)
    found = swaps_to_measure(posterior, budget, 6, 10, solve_exact, rng)
    assert 2 <= len(found) <= 10
    assert len({(group.name, source) for group, source in found}) == len(found)
    assert all(choice[group.name] != source for group, source in found)
    # what was measured to be bad, over and over, is not asked again
    bad = found[0][0].name, found[0][1]
    posterior.see(bad, [0.5] * 50)
    again = [swap for _ in range(5) for swap in swaps_to_measure(posterior, budget, 6, 10, solve_exact, rng)]
    assert bad not in [(group.name, source) for group, source in again]
    # and what nobody has a cost for is never asked
    unknown = Problem(
        tuple(
            Group(g.name, tuple(Option(o.source, o.bits, math.nan if o.source == "4" else o.cost) for o in g.options))
            for g in of.groups
        )
    )
    cautious = Posterior(unknown, {f"g{n}": "3" for n in range(40)}, 0.5)
    asked = swaps_to_measure(cautious, budget, 6, 10, solve_exact, rng)
    assert all(source != "4" for _, source in asked)


class Misled:
    """Costs of the profile are wrong by factors, slopes at the recipe say nothing: swaps have to be measured."""

    def __init__(self, groups: int = 12, seed: int = 0, noise: float = 0.0) -> None:
        self.asked = problem(groups, seed)
        factors = np.random.default_rng(seed + 100).lognormal(0.0, 0.5, groups)
        self.true = with_costs(self.asked, lambda group, option: option.cost * float(factors[int(group.name[1:])]))
        self.noise, self.rng = noise, np.random.default_rng(seed)
        self.changed: list[tuple[Mapping[str, str], int, int]] = []

    def kl(self, choice: Mapping[str, str]) -> float:
        return evaluate(self.true, choice)[1]

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        swaps = {(group.name, option.source): 0.0 for group in self.true.groups for option in group.options}
        return SwapModel(self.kl(choice), swaps, swaps, swaps)

    def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
        return [self.kl(choice) * (1 + 0.05 * row) for row in range(4)]

    def changes(
        self, choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int
    ) -> Sequence[Sequence[float]]:
        self.changed.append((choice, len(swaps), step))
        return [
            [self.kl({**choice, **swap}) - self.kl(choice) + self.noise * float(self.rng.normal()) for _ in range(4)]
            for swap in swaps
        ]


@pytest.mark.parametrize("noise", [pytest.param(0.0, marks=pytest.mark.sweep), 0.003])
def test_measured_swaps_find_what_costs_do_not_say(noise: float) -> None:
    left, at_first = [], []
    for seed in range(4):
        made = Misled(24, seed, noise)
        budget = 24 * 300
        start = solve_exact(made.asked, budget).choice
        steps = list(refine(made.asked, budget, start, made, steps=20))
        assert all(step.bits <= budget for step in steps)
        assert steps[0].measured == 0
        assert any(step.measured for step in steps)
        assert all(step.measured <= sum(SWAPS) for step in steps)
        least = made.kl(solve_exact(made.true, budget).choice)
        left.append(made.kl(steps[-1].choice) - least)
        at_first.append(made.kl(start) - least)
        assert all(step.accepted == (step.change_nats < 0) for step in steps)
        assert all(before.kl_nats >= after.kl_nats for before, after in itertools.pairwise(steps))
        assert [step for *_, step in made.changed] == sorted(step for *_, step in made.changed)  # fresh rows each
    assert sum(left) < 0.3 * sum(at_first)


def test_thousands_of_groups_are_not_measured_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recompile.optimize.refine.MOST_SWAPPED_GROUPS", 11)
    made = Misled(12)
    steps = list(refine(made.asked, 12 * 300, solve_exact(made.asked, 12 * 300).choice, made, steps=30))
    assert not made.changed
    assert len(steps) < 30


def test_tied_members_are_measured_together() -> None:
    made = Misled()
    tied, changes, asked = tie(made.asked, "g1*"), made.changes, []  # g1, g10, g11

    def note(choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int) -> Sequence[Sequence[float]]:
        asked.extend(swaps)
        return changes(choice, swaps, step)

    made.changes = note  # type: ignore[method-assign]
    for step in refine(tied, 12 * 300, {f"g{n}": "3" for n in range(12)}, made, steps=16):
        assert len({step.choice[name] for name in ("g1", "g10", "g11")}) == 1
    assert any("g1" in swap for swap in asked)
    assert all(set(swap) == {"g1", "g10", "g11"} for swap in asked if "g1" in swap)
