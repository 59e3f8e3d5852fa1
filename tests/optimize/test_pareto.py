"""Recipes for many budgets from one profile."""

from __future__ import annotations

import pytest

from recompile.errors import BudgetError, RecompileError
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Constraint, Rules, choose
from recompile.optimize.pareto import NESTED_SHARE, parse_grid, solve_frontier
from tests.profiles import make_profile


def test_the_grid_is_read() -> None:
    assert parse_grid("2.5:6:0.25") == tuple(2.5 + 0.25 * n for n in range(15))
    assert parse_grid("3:3:1") == (3.0,)
    assert parse_grid("2:2.95:0.1")[-1] == 2.9
    for wrong in ("3", "3:2:1", "1:2:0", "a:b:c", "0:1:0.1", "1:2:3:4", "1:9e9:0.1"):
        with pytest.raises(RecompileError, match="grid"):
            parse_grid(wrong)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_budget_is_kept_and_nesting_costs_nothing(seed: int) -> None:
    profile = make_profile("tensor", 6, seed)
    found = solve_frontier(profile, parse_grid("1.5:7:0.25"), "exact", Rules())
    assert found.left_out == (1.5, 1.75, 2.0, *(6.25 + 0.25 * n for n in range(4)))
    sizes = [point.choice.bits for point in found.points]
    costs = [point.choice.predicted_kl_nats for point in found.points]
    assert sizes == sorted(sizes)
    assert costs == sorted(costs, reverse=True)
    nested = 0
    for number, point in enumerate(found.points):
        bpw = point.choice.budget.bpw
        assert bpw is not None
        assert point.choice.bpw <= bpw
        free = choose(profile, Budget(bpw=bpw), "exact")
        assert point.choice.solution.cost <= free.solution.cost * (1 + NESTED_SHARE) + 1e-15
        assert point.choice.solution.lower_bound <= free.solution.cost + 1e-15
        if number:
            before = found.points[number - 1].choice.solution.choice
            grows = all(
                group.bits[point.choice.solution.choice[group.name]] >= group.bits[before[group.name]]
                for group in profile.header.groups
            )
            assert grows == point.is_nested
            nested += grows
        assert not point.dominated
    assert nested > 0


def test_uniform_variants_are_in_the_table() -> None:
    profile = make_profile("tensor", 3)
    found = solve_frontier(profile, (3.5,), "greedy", Rules())
    assert [point.label for point in found.uniform] == ["2", "3", "4", "6"]
    for point in found.uniform:
        assert set(point.choice.values()) == {point.label}
        assert point.total_bytes == (point.bits + profile.header.other_bits) // 8
    assert found.uniform[0].predicted_kl_nats > found.points[0].choice.predicted_kl_nats


def test_constraints_hold_along_the_frontier_and_nothing_reachable_is_an_error() -> None:
    profile = make_profile("tensor", 3)
    rules = Rules((Constraint("pin", "*.v_proj", "6"),))
    for point in solve_frontier(profile, (3.0, 4.0), "exact", rules).points:
        assert {s for m, s in point.choice.solution.choice.items() if m.endswith("v_proj")} == {"6"}
    with pytest.raises(BudgetError, match=r"reachable range: 2\.\d+ to 5\.\d+ bpw"):
        solve_frontier(profile, (7.0, 8.0), "exact", Rules())
