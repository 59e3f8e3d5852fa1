"""Descent over recipes on a made-up KL with known interactions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from recompile.optimize.exact import solve_exact
from recompile.optimize.problem import Problem, evaluate, tie, with_costs
from recompile.optimize.refine import FIRST_DAMPING, PATIENCE, STALLED, SWAPS, Costs, Damping, SwapModel, priced, refine
from recompile.optimize.trust_region import propose
from tests.made_up import SOURCES, MadeUp


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
    for seed in range(6):
        made = MadeUp(seed=seed)
        problem, budget = made.problem(), 8 * 280
        start = solve_exact(problem, budget).choice
        *_, last = refine(problem, budget, start, made, steps=16)
        least = best(made, problem, budget)
        left.append((made.kl(last.choice) - least) / max(made.kl(start) - least, 1e-12))
    assert np.mean(left) < 0.1
    assert np.median(left) < 1e-6


def test_steps_that_each_see_little_add_up() -> None:
    """A step counts for KEPT of what the one after it does, 200 are worth (1 + KEPT) / (1 - KEPT) = 99 alike."""
    noisy, sure = MadeUp(noise=0.5), MadeUp()
    choice = {f"g{n}": "3" for n in range(8)}
    true, costs = Costs(), Costs()
    true.add(sure.linearise(choice, 0))
    errors = []
    for step in range(200):
        costs.add(noisy.linearise(choice, step))
        wrong = [costs.of(swap, 1.0) - true.of(swap, 1.0) for swap in true.slope]
        errors.append(float(np.std(wrong)))
    assert errors[0] == pytest.approx(0.5, rel=0.4)
    assert errors[-1] == pytest.approx(0.5 / 99**0.5, rel=0.4)
    costs.add(sure.linearise(choice, 200), moved=0.5)  # half the groups moved: what was found before holds less
    assert costs.weight < 0.26 * 50 + 1


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


def test_where_no_improving_move_is_predicted_swaps_are_measured() -> None:
    class Worse(MadeUp):
        def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
            return [float(len(self.measured)) for _ in (self.measured.append(choice), *range(2))]  # ever worse

    made = Worse()
    problem, budget = made.problem(), 8 * 280
    start = {f"g{n}": "2" for n in range(8)}
    steps = list(refine(problem, budget, start, made, steps=STALLED + 2))
    assert not any(step.accepted for step in steps)
    assert all(step.choice == start for step in steps)
    assert steps[0].moved > 0
    assert steps[0].damping > FIRST_DAMPING
    assert steps[1].moved <= max(1, steps[0].moved // 2)  # and fewer are moved at once
    assert [step.measured > 0 for step in steps] == [False] * STALLED + [True] * 2
    assert {step for _, step in made.surveyed} <= set(range(len(SWAPS) * STALLED, len(SWAPS) * (STALLED + 2)))
    assert len({step for _, step in made.surveyed}) == len(made.surveyed)  # fresh rows each time
    assert all(choice == start for choice, _ in made.surveyed)


def test_a_trial_move_that_is_not_better_is_gone_back_on() -> None:
    """With the damping as it is the start is the best choice; with less of it "g0" would have "4". That move is on
    trial: not better on the rows, it is never gone on from, where a predicted one would be, for their noise is larger
    than what it cost."""

    class OnTrial(MadeUp):
        def __init__(self, curve: float) -> None:
            super().__init__(groups=2)
            self.curve, self.linearised = curve, list[dict[str, str]]()

        def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
            self.linearised.append(dict(choice))
            slope = {swap: -1.0 if swap == ("g0", "4") else 0.0 for swap in self.vectors}
            own = {swap: self.curve if swap == ("g0", "4") else 0.0 for swap in self.vectors}
            own |= {swap: 9.0 for swap in self.vectors if swap[1] == "3"}
            return SwapModel(1.0, slope, own, dict.fromkeys(self.vectors, 0.0))

        def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
            worse = sum(source != "2" for source in choice.values())
            return [1.0 + worse * (0.01 + noise) for noise in (-0.5, 0.5, -0.4, 0.4)]  # by far less than its noise

    start = {"g0": "2", "g1": "2"}
    moved = {"g0": "4", "g1": "2"}
    flat = with_costs(MadeUp(groups=2).problem(), lambda group, option: float(option.source != "2") * 1e-6)
    found = {}
    for curve in (0.5, 1.0):  # predicted to change by -1 + FIRST_DAMPING * curve
        oracle = OnTrial(curve)
        found[curve] = list(refine(flat, 800, start, oracle, steps=2))
        assert found[curve][0].moved == 1
        assert not found[curve][0].accepted
        assert oracle.linearised == [start, moved if curve == 0.5 else start]
    assert found[0.5][0].predicted_nats == pytest.approx(-1 + FIRST_DAMPING * 0.5)
    assert found[1.0][0].predicted_nats < 0  # with the lesser damping that it was found with


def test_it_ends_where_nothing_gets_better() -> None:
    made = MadeUp()
    problem, budget = made.problem(), 8 * 280
    steps = list(refine(problem, budget, solve_exact(problem, budget).choice, made, steps=100))
    assert len(steps) < 60
    assert not any(step.accepted for step in steps[-PATIENCE:])


def test_costs_do_not_depend_on_where_they_were_measured() -> None:
    """For a quadratic KL: the cost of a candidate is the same whichever one its group has, others being equal."""
    made = MadeUp()
    problem = made.problem()
    found = []
    for source in SOURCES:
        choice = {f"g{n}": source if n == 2 else "3" for n in range(8)}
        costs = Costs()
        costs.add(made.linearise(choice, 0))
        found.append([costs.of(("g2", candidate), 1.0) for candidate in SOURCES])
        true = [made.kl(choice | {"g2": candidate}) for candidate in SOURCES]
        assert np.diff(found[-1]) == pytest.approx(np.diff(true))
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(found[2])
    assert all(math.isnan(costs.of(swap, 1.0)) for swap in [("g2", "8"), ("other", "2")])
    assert problem.groups[2].option("3") is not None


def test_no_more_groups_move_than_are_allowed() -> None:
    made = MadeUp()
    problem, budget = made.problem(), 8 * 300
    current = {f"g{n}": "42"[n % 2] for n in range(8)}
    free = propose(problem, budget, current, 8, solve_exact)
    assert sum(free[name] != current[name] for name in current) > 3
    for most in (1, 2, 3):
        held = propose(problem, budget, current, most, solve_exact)
        assert sum(held[name] != current[name] for name in current) <= most
        assert evaluate(problem, held)[0] <= budget
        assert evaluate(problem, held)[1] <= evaluate(problem, current)[1]


def test_a_damping_is_learnt_from_moves_by_their_weight() -> None:
    damping = Damping(1.0)
    for _ in range(50):
        damping.see(change=-1.0 + 2.0 * 3.0, error=0.01, linear=-1.0, quadratic=3.0)
    assert damping.value == pytest.approx(2.0, abs=0.01)
    unsure = Damping(1.0)
    unsure.see(change=5.0, error=math.inf, linear=-1.0, quadratic=3.0)
    unsure.see(change=5.0, error=100.0, linear=-1.0, quadratic=3.0)
    assert unsure.value == pytest.approx(1.0, abs=0.01)


def test_costs_of_the_profile_count_less_with_every_step() -> None:
    made = MadeUp()
    problem, choice = made.problem(), {f"g{n}": "3" for n in range(8)}
    costs = Costs()
    shares = []
    for step in range(40):
        costs.add(made.linearise(choice, step))
        option = priced(problem, costs, 1.0).groups[0].option("2")
        prior = problem.groups[0].option("2")
        assert option is not None
        assert prior is not None
        measured = costs.of(("g0", "2"), 1.0)
        shares.append((option.cost - measured) / (prior.cost - measured))
    assert shares[0] == pytest.approx(2 / 3)
    assert all(after < before for before, after in itertools.pairwise(shares))
    assert shares[-1] < 0.12
