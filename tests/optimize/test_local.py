"""Measured exchanges on a made-up model whose KL is not the sum of its single costs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest

from recompile.errors import RecompileError
from recompile.optimize.exact import solve_exact
from recompile.optimize.limits import Row
from recompile.optimize.local import LocalOptions, LocalResult, Round, search_local
from recompile.optimize.problem import Group, Option, Problem, evaluate

ROWS = 24


class Model:
    """KL = additive + pairs of neighbours that hurt each other more than they say, times a factor of the row."""

    def __init__(self, groups: int, seed: int, noise: float = 0.1) -> None:
        rng = random.Random(seed)
        made = []
        for number in range(groups):
            expensive, weights = rng.lognormvariate(0, 1) * 1e-2, rng.choice([64, 128])
            options = tuple(Option(str(b), weights * b, expensive * 4.0 ** (2 - b)) for b in (2, 3, 4, 6))
            made.append(Group(f"g{number}", options))
        self.problem = Problem(tuple(made))
        self.pairs = {n: rng.choice([0.0, 0.0, 6.0]) for n in range(groups - 1)}
        self.rows = [1 + noise * rng.gauss(0, 1) for _ in range(ROWS)]
        self.calls = 0

    def kl(self, choice: Mapping[str, str]) -> float:
        costs = [group.option(choice[group.name]).cost for group in self.problem.groups]  # type: ignore[union-attr]
        both = sum(times * min(costs[n], costs[n + 1]) for n, times in self.pairs.items())
        return sum(costs) + both

    def __call__(self, choices: Sequence[Mapping[str, str]], rows: Sequence[int]) -> list[tuple[float, ...]]:
        self.calls += len(choices) * len(rows)
        return [tuple(self.kl(choice) * self.rows[row] for row in rows) for choice in choices]


def limit(problem: Problem, budget: int) -> list[Row]:
    use = {place: tuple(option.bits for option in group.options) for place, group in enumerate(problem.groups)}
    return [Row("size", use, budget)]


@pytest.mark.parametrize("seed", range(5))
def test_it_improves_the_additive_optimum_within_the_budget(seed: int) -> None:
    model = Model(20, seed)
    budget = sum(group.options[1].bits for group in model.problem.groups)
    start = solve_exact(model.problem, budget)
    events = list(search_local(model.problem, limit(model.problem, budget), start.choice, model, ROWS))
    result = events[-1]
    assert isinstance(result, LocalResult)
    assert model.kl(result.choice) < 0.97 * model.kl(start.choice)
    assert evaluate(model.problem, result.choice)[0] == result.bits <= budget
    rounds = [event for event in events if isinstance(event, Round)]
    assert [r.number for r in rounds] == list(range(1, result.rounds + 1))
    assert all(later.kl <= before.kl for before, later in itertools.pairwise(rounds))
    gains = sum(r.gain for r in rounds)
    assert result.kl_start - result.kl == pytest.approx(gains, abs=1e-12)
    assert result.measured == model.calls


def test_racing_measures_less_than_all_moves_on_all_rows() -> None:
    model = Model(20, 1)
    budget = sum(group.options[1].bits for group in model.problem.groups)
    start = solve_exact(model.problem, budget)
    *rounds, result = search_local(model.problem, limit(model.problem, budget), start.choice, model, ROWS)
    assert isinstance(result, LocalResult)
    everything = sum(r.tried for r in rounds if isinstance(r, Round)) * ROWS
    assert result.measured < 0.5 * everything


def test_where_costs_add_up_the_optimum_is_kept() -> None:
    model = Model(12, 3)
    model.pairs = {}
    budget = sum(group.options[1].bits for group in model.problem.groups)
    start = solve_exact(model.problem, budget)
    *_, result = search_local(model.problem, limit(model.problem, budget), start.choice, model, ROWS)
    assert isinstance(result, LocalResult)
    assert result.choice == start.choice
    assert result.kl == result.kl_start


def test_noise_alone_is_not_accepted() -> None:
    """Every choice is equally good; rows differ from call to call by noise only."""
    model = Model(12, 3)
    rng = random.Random(0)

    def noise(choices: Sequence[Mapping[str, str]], rows: Sequence[int]) -> list[tuple[float, ...]]:
        return [tuple(1 + 0.1 * rng.gauss(0, 1) for _ in rows) for _ in choices]

    budget = sum(group.options[1].bits for group in model.problem.groups)
    start = solve_exact(model.problem, budget)
    options = LocalOptions(rounds=10, patience=10, accept_t=4.0)
    *rounds, _ = search_local(model.problem, limit(model.problem, budget), start.choice, noise, ROWS, options)
    assert all(isinstance(r, Round) and r.accepted is None for r in rounds)


def test_the_clock_stops_it() -> None:
    model = Model(20, 1)
    budget = sum(group.options[1].bits for group in model.problem.groups)
    start = solve_exact(model.problem, budget)
    ticks = iter(range(1000))
    options = LocalOptions(seconds=5)
    *_, result = search_local(
        model.problem, limit(model.problem, budget), start.choice, model, ROWS, options, lambda: next(ticks)
    )
    assert isinstance(result, LocalResult)
    assert result.rounds <= 4


def test_starts_that_cannot_be() -> None:
    model = Model(4, 0)
    largest = {group.name: "6" for group in model.problem.groups}
    smallest = {group.name: "2" for group in model.problem.groups}
    budget = evaluate(model.problem, smallest)[0]
    with pytest.raises(RecompileError, match=r"the start takes .* more than size allows"):
        list(search_local(model.problem, limit(model.problem, budget), largest, model, ROWS))
    with pytest.raises(RecompileError, match="at least 2"):
        list(search_local(model.problem, limit(model.problem, budget), smallest, model, 1))
