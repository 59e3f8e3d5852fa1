"""The page's solver chooses what Python's greedy solver chooses, to the last group and bit."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from recompile.errors import BudgetError
from recompile.optimize.frontier import lagrangian_path, solve_for_cost
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.problem import Group, Option, Problem, reachable_range

KINDS = ("ladder", "wild", "noise", "tied")
SOLVE = """
    const solver = load('solver.js');
    return input.map(({problem, budgets, limits}) => {
      const table = solver.buildTable(problem);
      const plain = (found) => ({...found, option: Array.from(found.option)});
      return {
        range: solver.reachableRange(table),
        solved: budgets.map((budget) => plain(solver.solve(table, budget))),
        limited: limits.map((limit) => plain(solver.solveForCost(table, limit))),
        path: solver.path(table),
      };
    });
"""


def random_problem(rng: random.Random, kind: str, groups: int) -> Problem:
    """ "ladder": falling costs at usual widths; "wild": any sizes and costs; "noise": costs around zero; "tied": small
    whole numbers, so that equal sizes and equal costs are common."""
    labels = ["2", "3", "4", "q4_K", "Q4_K", '"4"', "\U0001d7da", "\uff12"]  # the last two: UTF-16 would swap them
    made = []
    for number in range(groups):
        weights = rng.choice([64, 128, 256, 1000, 4096])
        sensitivity = rng.lognormvariate(0, 1.5) * 1e-3
        options = []
        for place, label in enumerate(rng.sample(labels, rng.randint(1, 6))):
            bits, cost = {
                "ladder": (weights * (2 + place), sensitivity * 4.0**-place * rng.uniform(0.7, 1.3)),
                "wild": (rng.randint(1, 10_000), rng.uniform(0, 1e-3)),
                "noise": (weights * (2 + place), rng.gauss(0, 1e-4)),
                "tied": (rng.randint(0, 9), float(rng.randint(-3, 9))),
            }[kind]
            options.append(Option(label, bits, cost))
        made.append(Group(f"g{number}", tuple(options)))
    return Problem(tuple(made), fixed_bits=rng.randint(0, 100))


def for_page(problem: Problem) -> dict[str, Any]:
    labels = sorted({option.source for group in problem.groups for option in group.options}, reverse=True)
    first = [0]
    for group in problem.groups:
        first.append(first[-1] + len(group.options))
    options = [option for group in problem.groups for option in group.options]
    return {
        "labels": labels,
        "first": first,
        "source": [labels.index(option.source) for option in options],
        "bits": [option.bits for option in options],
        "cost": [option.cost for option in options],
        "fixedBits": problem.fixed_bits,
    }


def choice_of(problem: Problem, option_numbers: list[int]) -> dict[str, str]:
    options = [option for group in problem.groups for option in group.options]
    return {group.name: options[n].source for group, n in zip(problem.groups, option_numbers, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_same_choice_as_python_at_any_budget(node: Callable[[str, Any], Any], kind: str) -> None:
    rng = random.Random(f"page-{kind}")
    cases = []
    for _ in range(60):
        problem = random_problem(rng, kind, rng.randint(1, 40))
        fewest, most = reachable_range(problem)
        path = lagrangian_path(problem)
        budgets = [fewest, most, *(rng.randint(fewest, most) for _ in range(5)), rng.choice(path.points).bits]
        low, high = path.points[-1].cost, path.points[0].cost
        limits = [high, rng.choice(path.points).cost, low + rng.random() * (high - low)]
        wanted = []
        for limit in limits:  # the least cost itself may be missed by one rounding; Python then refuses it
            try:
                wanted.append((limit, solve_for_cost(problem, limit, solve_greedy)))
            except BudgetError:
                continue
        cases.append((problem, budgets, wanted))
    answers = node(
        SOLVE,
        [
            {"problem": for_page(problem), "budgets": budgets, "limits": [limit for limit, _ in wanted]}
            for problem, budgets, wanted in cases
        ],
    )
    compared = 0
    for (problem, budgets, wanted), answer in zip(cases, answers, strict=True):
        assert tuple(answer["range"]) == reachable_range(problem)
        path = lagrangian_path(problem)
        assert answer["path"]["bits"] == [point.bits for point in path.points]
        assert answer["path"]["cost"] == [point.cost for point in path.points]
        solutions = [solve_greedy(problem, budget) for budget in budgets] + [solution for _, solution in wanted]
        for solution, found in zip(solutions, [*answer["solved"], *answer["limited"]], strict=True):
            assert choice_of(problem, found["option"]) == dict(solution.choice)
            assert (found["bits"], found["cost"], found["gap"]) == (solution.bits, solution.cost, solution.gap)
            compared += 1
    assert compared > 500


def test_exact_sums_are_those_of_python(node: Callable[[str, Any], Any]) -> None:
    rng = random.Random(7)
    lists = [[rng.uniform(-1, 1) * 10.0 ** rng.randint(-18, 18) for _ in range(rng.randint(0, 60))] for _ in range(300)]
    lists += [[1e16, 1.0, 1e-16], [1e16, 1.0, -1e-16], [0.1] * 10, [1.0, 2.0**-53, 2.0**-106]]
    found = node("const solver = load('solver.js'); return input.map(solver.exactSum);", lists)
    assert [float(value) for value in found] == [math.fsum(values) for values in lists]


def test_a_ban_of_everything_names_the_group(node: Callable[[str, Any], Any]) -> None:
    problem = Problem((Group("a", (Option("2", 2, 1.0),)), Group("b", (Option("2", 2, 1.0), Option("3", 3, 0.5)))))
    code = """
        const solver = load('solver.js');
        try { solver.buildTable(input, [1, 0, 0]); } catch (error) { return [error.message, error.group]; }
    """
    assert node(code, for_page(problem)) == ["no source is left", 1]
    code = """
        const solver = load('solver.js');
        const table = solver.buildTable(input, [1, 1, 0]);
        return [solver.reachableRange(table), Array.from(solver.solve(table, 4).option)];
    """
    assert node(code, json.loads(json.dumps(for_page(problem)))) == [[4, 4], [0, 1]]
