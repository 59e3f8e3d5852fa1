from __future__ import annotations

import itertools
import math
import random

import pytest

from recompile.errors import BudgetError, RecompileError
from recompile.optimize.exact import solve_exact
from recompile.optimize.frontier import lagrangian_path, solve_for_cost
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.problem import Group, Option, Problem, evaluate, reachable_range, tie

KINDS = ["ladder", "wild", "noise", "tied"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_point_is_optimal_for_its_bits_and_differs_in_one_group(random_problem, brute_force, kind):
    rng = random.Random(21)
    for _ in range(20):
        problem = random_problem(rng, kind, 5)
        path = lagrangian_path(problem)
        assert path.points[0].bits == reachable_range(problem)[0]
        for index, point in enumerate(path.points):
            bits, cost = evaluate(problem, path.choice_at(index))
            assert bits == point.bits
            assert cost == pytest.approx(point.cost, rel=1e-12, abs=1e-12)
            assert brute_force(problem, point.bits)[0] == pytest.approx(cost, rel=1e-12, abs=1e-12)
        for before, after in itertools.pairwise(path.points):
            assert after.bits > before.bits
            assert after.cost < before.cost
            assert after.saved_per_bit <= before.saved_per_bit
        budget = rng.randint(*reachable_range(problem))
        assert path.bound_at(budget) <= brute_force(problem, budget)[0] + 1e-12
        assert path.bound_at(budget) == pytest.approx(solve_greedy(problem, budget).lower_bound, rel=1e-9, abs=1e-12)
        assert path.points[path.index_within(budget)].bits <= budget
        assert path.choice_at(-1) == path.choice_at(len(path.points) - 1)


def test_tied_members_move_together():
    two = (Option("2", 20, 0.9), Option("4", 40, 0.2))
    path = lagrangian_path(tie(Problem((Group("a", two), Group("b", two))), "*"))
    assert path.cheapest == {"a": "2", "b": "2"}
    assert path.points[1].members == ("a", "b")
    assert path.choice_at(1) == {"a": "4", "b": "4"}
    with pytest.raises(BudgetError, match="below the cheapest choice of 40 bits"):
        path.index_within(39)


@pytest.mark.parametrize("kind", KINDS)
def test_smallest_size_for_a_cost(random_problem, kind):
    rng = random.Random(22)
    for _ in range(15):
        problem = random_problem(rng, kind, 4)
        every = []
        for options in itertools.product(*(group.options for group in problem.groups)):
            bits = problem.fixed_bits + sum(option.bits for option in options)
            every.append((bits, math.fsum(option.cost for option in options)))
        least, most = min(cost for _, cost in every), max(cost for _, cost in every)
        limit = rng.uniform(least, most)
        smallest = min(bits for bits, cost in every if cost <= limit)
        solution = solve_for_cost(problem, limit, solve_exact)
        assert (solution.bits, solution.budget_bits) == (smallest, smallest)
        assert solution.cost <= limit
        greedy = solve_for_cost(problem, limit, solve_greedy)
        assert greedy.bits >= smallest
        assert greedy.cost <= limit
        assert solve_for_cost(problem, most + 1, solve_exact).bits == reachable_range(problem)[0]
        with pytest.raises(BudgetError, match="reachable range"):
            solve_for_cost(problem, least - 1e-3, solve_exact)


def test_a_limit_that_is_no_number():
    with pytest.raises(RecompileError, match="not a number"):
        solve_for_cost(Problem((Group("a", (Option("2", 20, 0.9),)),)), math.nan, solve_exact)
