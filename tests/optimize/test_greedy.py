from __future__ import annotations

import math
import random
import statistics
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recompile.optimize.greedy import efficient_options, lower_hull, solve_greedy
from recompile.optimize.problem import Group, Option, Problem, evaluate, reachable_range


def make_group(name: str, *options: tuple[int, float]) -> Group:
    return Group(name, tuple(Option(str(number), *option) for number, option in enumerate(options)))


def test_hull_of_a_worked_case():
    group = make_group("g", (20, 1.0), (30, 0.9), (40, 0.25), (40, 0.3), (50, 0.27), (80, 0.125), (60, 0.1875))
    efficient = efficient_options(group)
    # 40 bits at 0.3 and 50 at 0.27 are dominated by 40 at 0.25
    assert [option.bits for option in efficient] == [20, 30, 40, 60, 80]
    # 30 at 0.9 lies above the line from 20 to 40, and 60 on the line from 40 to 80
    assert [efficient[index].bits for index in lower_hull(efficient)] == [20, 40, 80]


def test_best_saving_per_bit_first():
    problem = Problem((make_group("a", (10, 1.0), (20, 0.5)), make_group("b", (10, 1.0), (30, 0.1))))
    assert solve_greedy(problem, 20).choice == {"a": "0", "b": "0"}
    assert solve_greedy(problem, 30).choice == {"a": "1", "b": "0"}  # 0.050 per bit before 0.045
    assert solve_greedy(problem, 50).choice == {"a": "1", "b": "1"}  # an exact fit


def test_an_upgrade_that_does_not_fit_is_passed_over():
    problem = Problem((make_group("a", (10, 1.0), (60, 0.0)), make_group("b", (10, 1.0), (15, 0.99))))
    solution = solve_greedy(problem, 40)
    assert solution.choice == {"a": "0", "b": "1"}
    assert solution.bits == 25


def test_options_above_the_hull_fill_what_is_left():
    problem = Problem((make_group("a", (10, 1.0), (15, 0.9), (30, 0.0)),))
    assert solve_greedy(problem, 20).choice == {"a": "1"}


def test_exchanges_undo_an_early_step():
    # b's step is best per bit, but leaves 10 of 20 bits that nothing fits; the exchange takes it back for a's
    problem = Problem((make_group("a", (0, 1.0), (20, 0.0)), make_group("b", (0, 1.0), (10, 0.4))))
    solution = solve_greedy(problem, 20)
    assert solution.choice == {"a": "1", "b": "0"}
    assert solution.cost == 1.0


def test_budget_that_would_only_do_harm_is_left():
    problem = Problem(
        (make_group("a", (10, 0.1), (20, 0.3), (30, -0.2), (40, -0.1)), make_group("b", (10, 0.0), (90, 0.0)))
    )
    solution = solve_greedy(problem, 130)
    assert solution.choice == {"a": "2", "b": "0"}
    assert (solution.bits, solution.cost, solution.gap) == (40, -0.2, 0.0)


def test_ties_go_to_fewer_bits_then_group_order_then_label():
    same = ((10, 1.0), (20, 0.5))
    assert solve_greedy(Problem((make_group("b", *same), make_group("a", *same))), 30).choice == {"b": "1", "a": "0"}
    fewer = Problem((make_group("a", (10, 1.0), (30, 0.5)), make_group("b", (10, 1.0), (20, 0.75))))
    assert solve_greedy(fewer, 30).choice == {"a": "0", "b": "1"}
    labels = Group("g", (Option("z", 10, 0.5), Option("b", 10, 0.5), Option("c", 20, 0.5)))
    assert solve_greedy(Problem((labels,)), 20).choice == {"g": "b"}


def test_unmeasured_options_are_not_chosen():
    problem = Problem((make_group("a", (10, 1.0), (20, math.nan), (30, 0.0)),))
    assert solve_greedy(problem, 25).choice == {"a": "0"}


# The worst loss of 75 instances each, relative to the optimum for "ladder" (4 of 75 lose anything: 0.02, 0.07, 0.18 and
# 0.53, where three of the six groups must move at once), and for the others, whose optimum may be zero or negative,
# to what the most expensive choice saves.
@pytest.mark.parametrize(("kind", "worst"), [("ladder", 0.53), ("wild", 0.04), ("noise", 0.001), ("tied", 0.18)])
def test_near_brute_force_on_300_small_instances(random_problem, brute_force, kind, worst):
    rng = random.Random(5)
    losses = []
    for _ in range(75):
        problem = random_problem(rng, kind, 6)
        low, high = reachable_range(problem)
        budget = rng.randint(low, high)
        solution = solve_greedy(problem, budget)
        best, _ = brute_force(problem, budget)
        span = brute_force(problem, low)[0] - brute_force(problem, high)[0]  # what any budget can save at all
        assert solution.bits <= budget
        assert solution.cost >= best - 1e-12
        assert solution.lower_bound <= best + 1e-12
        loss = solution.cost - best
        losses.append(0.0 if loss <= 1e-12 else loss / (best if kind == "ladder" else span))
    assert statistics.median(losses) <= 0.02
    print(kind, [round(loss, 4) for loss in sorted(losses)[-5:]])
    assert max(losses) <= worst


costs = st.one_of(st.floats(-1, 1), st.sampled_from([0.0, 1e-6, -1e-6, math.nan]))
groups = st.lists(st.lists(st.tuples(st.integers(0, 50), costs), min_size=1, max_size=5), min_size=1, max_size=6)


@given(groups, st.floats(0, 1))
def test_never_over_budget_nor_worse_than_the_cheapest(options, share):
    kept = [[option for option in group if not math.isnan(option[1])] or [(3, 0.5)] for group in options]
    problem = Problem(tuple(make_group(f"g{number}", *group) for number, group in enumerate(kept)))
    low, high = reachable_range(problem)
    budget = low + int(share * (high - low))
    solution = solve_greedy(problem, budget)
    assert solution.bits <= budget
    assert evaluate(problem, solution.choice) == (solution.bits, solution.cost)
    assert solution.gap >= 0
    fewest = math.fsum(min((bits, cost) for bits, cost in group)[1] for group in kept)
    assert solution.cost <= fewest + 1e-12
    assert solve_greedy(problem, budget) == solution


def test_twenty_thousand_groups_in_seconds(ladder_problem):
    problem = ladder_problem(20_000)
    low, high = reachable_range(problem)
    budget = low + (high - low) * 3 // 10
    began = time.process_time()
    solution = solve_greedy(problem, budget)
    assert time.process_time() - began < 15  # 0.5 s on a free core
    assert solution.bits <= budget
    assert solution.gap <= 1e-4 * solution.cost
    assert budget - solution.bits < 576 * 192  # one bit more for the smallest group
