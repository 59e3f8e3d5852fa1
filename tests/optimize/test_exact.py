from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recompile.optimize import exact
from recompile.optimize.exact import solve_exact
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.problem import Group, Option, Problem, evaluate, reachable_range


def make_problem(options: list[list[tuple[int, float]]], fixed_bits: int = 0) -> Problem:
    return Problem(
        tuple(
            Group(f"g{number}", tuple(Option(str(place), *option) for place, option in enumerate(group)))
            for number, group in enumerate(options)
        ),
        fixed_bits,
    )


def largest_cost(problem: Problem) -> float:
    """The size of the numbers that a cost is a sum of: sums are compared to 1e-12 of it."""
    return math.fsum(
        max(abs(option.cost) for option in group.options if math.isfinite(option.cost)) for group in problem.groups
    )


@pytest.fixture(params=["enumeration", "HiGHS"])
def method(request, monkeypatch):
    """Both ways to settle the core: HiGHS takes over where the lists may hold one state only."""
    if request.param == "HiGHS":
        monkeypatch.setattr(exact, "_ROUGH_GROUPS", 10**9)
        monkeypatch.setattr(exact, "_ROUGH_STATES", 1)
        monkeypatch.setattr(exact, "_PROOF_STATES", 1)
    return request.param


@pytest.mark.parametrize("kind", ["ladder", "wild", "noise", "tied"])
def test_equals_brute_force_on_300_small_instances(random_problem, brute_force, kind, method):
    rng = random.Random(11)
    for _ in range(75):
        problem = random_problem(rng, kind, rng.randint(1, 6))
        low, high = reachable_range(problem)
        budget = rng.randint(low, high)
        solution = solve_exact(problem, budget)
        cost, bits = brute_force(problem, budget)
        assert abs(solution.cost - cost) <= 1e-12 * largest_cost(problem)
        assert solution.gap == 0.0
        assert solution.lower_bound == solution.cost
        assert solution.bits <= budget
        if method == "enumeration":
            assert solution.bits == bits  # of equal costs, fewest bits


def test_finds_what_greedy_misses():
    # greedy takes the best step per bit and no single exchange of two groups leads on to the two middle ones
    options = [[(0, 1.0), (6, 0.0)], [(0, 0.8), (5, 0.0)], [(0, 0.8), (5, 0.0)]]
    problem = make_problem(options)
    assert solve_greedy(problem, 10).cost == pytest.approx(1.6)
    solution = solve_exact(problem, 10)
    assert solution.choice == {"g0": "0", "g1": "1", "g2": "1"}
    assert (solution.cost, solution.bits, solution.gap) == (1.0, 10, 0.0)


def test_equal_costs_in_different_sums_go_to_fewer_bits():
    # 0.1 + 0.2 and 0.3 differ in the last digit only; 7 bits do what 8 bits do
    problem = make_problem([[(0, 0.3), (4, 0.1)], [(0, 0.3), (4, 0.2)], [(0, 0.3), (7, 0.0)]])
    solution = solve_exact(problem, 8)
    assert solution.cost == pytest.approx(0.6)
    assert solution.bits == 7


def test_tiny_costs_and_large_sizes(brute_force):
    problem = make_problem([[(10**12 + 7 * n, 1e-9 / (n + 1)), (2 * 10**12 + n, 1e-12 * n)] for n in range(12)])
    low, high = reachable_range(problem)
    solution = solve_exact(problem, (low + high) // 2)
    cost, bits = brute_force(problem, (low + high) // 2)
    assert (solution.bits, solution.gap) == (bits, 0.0)
    assert solution.cost == pytest.approx(cost, rel=1e-12, abs=0)


def test_one_group_one_option_no_group():
    assert solve_exact(make_problem([[(10, 0.5)]], 3), 13).choice == {"g0": "0"}
    assert solve_exact(make_problem([[(10, 0.5), (20, 0.1), (15, 0.2)]]), 19).choice == {"g0": "2"}
    empty = solve_exact(Problem((), 5), 5)
    assert (empty.choice, empty.bits, empty.cost, empty.gap) == ({}, 5, 0.0, 0.0)


def test_a_hard_core_out_of_time_keeps_greedys_choice_and_an_honest_bound(monkeypatch):
    rng = random.Random(3)  # sizes and costs strongly correlated: the known hard case
    options = [
        [(bits, -1e-9 * (bits + 10**5 * place)) for place, bits in enumerate(sorted(rng.sample(range(10**6), 6)))]
        for _ in range(135)
    ]
    problem = make_problem(options)
    low, high = reachable_range(problem)
    budget = low + (high - low) * 6 // 10
    greedy = solve_greedy(problem, budget)
    solution = solve_exact(problem, budget, time_limit_s=0)
    assert solution.cost == greedy.cost
    assert 0 < solution.gap <= greedy.gap
    longer = solve_exact(problem, budget, time_limit_s=2)
    assert longer.cost <= greedy.cost
    assert solution.lower_bound <= longer.lower_bound + 1e-15 <= longer.cost + 2e-15
    assert longer.bits <= budget


costs = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 1e-6, -1e-6, 0.25, math.nan]))
groups = st.lists(st.lists(st.tuples(st.integers(0, 30), costs), min_size=1, max_size=5), min_size=1, max_size=6)


@given(groups, st.floats(0, 1), st.floats(0, 1))
def test_more_budget_never_costs_more_and_greedy_is_never_better(options, one_share, other_share):
    options = [group if any(not math.isnan(cost) for _, cost in group) else [(3, 0.5)] for group in options]
    problem = make_problem(options)
    low, high = reachable_range(problem)
    less, more = sorted(low + int(share * (high - low)) for share in (one_share, other_share))
    tight, loose = solve_exact(problem, less), solve_exact(problem, more)
    rounding = 1e-12 * largest_cost(problem)
    assert loose.cost <= tight.cost + rounding
    for solution, budget in ((tight, less), (loose, more)):
        assert low <= solution.bits <= budget
        assert evaluate(problem, solution.choice) == (solution.bits, solution.cost)
        assert solution.gap == 0.0
        greedy = solve_greedy(problem, budget)
        assert solution.cost <= greedy.cost + rounding
        assert greedy.lower_bound <= solution.cost + rounding


def test_fifty_thousand_groups(ladder_problem):
    problem = ladder_problem(50_000)
    low, high = reachable_range(problem)
    budget = low + (high - low) * 3 // 10
    began = time.process_time()
    solution = solve_exact(problem, budget)
    assert time.process_time() - began < 60  # 1.5 s on a free core
    assert solution.gap == 0.0
    assert solution.bits <= budget
    assert solution.cost <= solve_greedy(problem, budget).cost


def test_thousands_of_equal_groups_are_counted_and_not_listed(method):
    # every edge of the hull is used; 3 bits are left that no single group can use at less loss
    problem = make_problem([[(2, 1.0), (5, 0.4), (9, 0.1)]] * 2000)
    solution = solve_exact(problem, 2 * 2000 + 3 * 700 + 2)
    assert solution.gap == 0.0
    assert solution.cost == pytest.approx(2000 - 0.6 * 700)
