from __future__ import annotations

import dataclasses
import math

import pytest

from recompile.errors import BudgetError, RecompileError
from recompile.optimize.exact import solve_exact
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.problem import (
    Group,
    Option,
    Problem,
    at_least,
    at_most,
    ban,
    check_budget,
    evaluate,
    glob_matches,
    pin,
    prepare,
    reachable_range,
    tie,
)


def make_group(name: str, *options: tuple[str, int, float]) -> Group:
    return Group(name, tuple(Option(*option) for option in options))


LADDER = (("2", 20, 0.9), ("3", 30, 0.5), ("4", 40, 0.2))
Q, K, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "lm_head"
PROBLEM = Problem(
    (make_group(Q, *LADDER), make_group(K, *LADDER), make_group(HEAD, ("4", 400, 0.3), ("8", 800, 0.1))), fixed_bits=7
)


def sources(problem: Problem) -> dict[str, list[str]]:
    return {group.name: [option.source for option in group.options] for group in problem.groups}


def test_reachable_range_counts_the_fixed_bits():
    assert reachable_range(PROBLEM) == (7 + 20 + 20 + 400, 7 + 40 + 40 + 800)
    assert reachable_range(Problem((), fixed_bits=5)) == (5, 5)


@pytest.mark.parametrize("solver", [solve_greedy, solve_exact])
def test_budgets_outside_the_range_are_errors_that_give_it(solver):
    for budget, wrong in ((446, "below the cheapest"), (888, "above the most expensive")):
        with pytest.raises(
            BudgetError, match=rf"budget {budget} bits is {wrong} choice; reachable range: 447 to 887 bits"
        ):
            solver(PROBLEM, budget)
    assert solver(PROBLEM, 447).bits == 447
    assert solver(PROBLEM, 887).bits == 887
    check_budget(PROBLEM, 447)


def test_prepare_drops_what_was_not_measured():
    assert prepare(PROBLEM) is PROBLEM
    group = make_group("g", ("2", 20, math.nan), ("3", 30, 0.5), ("4", 40, math.inf))
    assert sources(prepare(Problem((group,)))) == {"g": ["3"]}
    assert reachable_range(Problem((group,))) == (30, 30)
    with pytest.raises(RecompileError, match='"h" has no option with a measured cost'):
        prepare(Problem((group, make_group("h", ("2", 20, math.nan)))))


def test_what_cannot_be_a_problem():
    with pytest.raises(RecompileError, match='"g" has no option'):
        Group("g", ())
    with pytest.raises(RecompileError, match='offers source "2" twice'):
        make_group("g", ("2", 1, 0.0), ("2", 2, 0.0))
    with pytest.raises(RecompileError, match="-1 bits"):
        make_group("g", ("2", -1, 0.0))
    with pytest.raises(RecompileError, match='"g" is in two groups'):
        Problem((make_group("g", ("2", 1, 0.0)), make_group("g", ("2", 1, 0.0))))


@pytest.mark.parametrize(
    ("glob", "name", "expected"),
    [
        ("*", "a.b", True),
        ("a*", "a", True),
        ("*.q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.q_proj", False),
        ("a.b", "axb", False),
        ("a?", "ab", False),
        ("[ab]", "a", False),
        (" a** ", "a.b.c", True),
        ("A", "a", False),
    ],
)
def test_globs(glob: str, name: str, expected: bool):
    assert glob_matches(glob, name) is expected


def test_pin_min_max_and_ban_narrow_the_named_groups_only():
    assert sources(pin(PROBLEM, "*.q_proj", "3")) == {Q: ["3"], K: ["2", "3", "4"], HEAD: ["4", "8"]}
    assert sources(at_least(PROBLEM, "model.*", "3")) == {Q: ["3", "4"], K: ["3", "4"], HEAD: ["4", "8"]}
    assert sources(at_most(PROBLEM, "*.k_proj", "3")) == {Q: ["2", "3", "4"], K: ["2", "3"], HEAD: ["4", "8"]}
    assert sources(ban(PROBLEM, "*", "8")) == {Q: ["2", "3", "4"], K: ["2", "3", "4"], HEAD: ["4"]}
    assert sources(PROBLEM)[Q] == ["2", "3", "4"]


def test_min_goes_by_bits_and_not_by_label():
    group = make_group("g", ("small", 20, 0.4), ("wide", 40, 0.1), ("same", 30, 0.2), ("middle", 30, 0.3))
    assert sources(at_least(Problem((group,)), "g", "middle")) == {"g": ["wide", "same", "middle"]}
    assert sources(at_most(Problem((group,)), "g", "middle")) == {"g": ["small", "same", "middle"]}


def test_constraints_that_cannot_be_kept_say_why():
    with pytest.raises(RecompileError, match=r'glob "\*\.q_prjo" matches no group; did you mean ".*q_proj"'):
        pin(PROBLEM, "*.q_prjo", "3")
    with pytest.raises(RecompileError, match=r'pin \*=3: group "lm_head" does not offer source "3"; it offers 4, 8'):
        pin(PROBLEM, "*", "3")
    with pytest.raises(RecompileError, match=r'min \*=3: group "lm_head" does not offer'):
        at_least(PROBLEM, "*", "3")
    with pytest.raises(RecompileError, match=r'no group that "model\.\*" names offers source "8".*offered: 2, 3, 4'):
        ban(PROBLEM, "model.*", "8")
    with pytest.raises(RecompileError, match=r'ban lm_head=4: leaves group "lm_head" no option'):
        ban(pin(PROBLEM, HEAD, "4"), HEAD, "4")
    with pytest.raises(RecompileError, match=r'glob "x" matches no group$'):
        pin(Problem(()), "x", "3")


@pytest.mark.parametrize("solver", [solve_greedy, solve_exact])
def test_tied_groups_get_one_source_each_member_named(solver):
    groups = (
        Group("a.q", (Option("2", 20, 0.9, 0.3), Option("3", 30, 0.5, 0.3), Option("4", 40, 0.2, 0.3))),
        make_group("b", *LADDER),
        Group("a.k", (Option("4", 4, 0.1, 0.4), Option("2", 2, 0.4, 0.4), Option("8", 8, 0.0, 0.4))),
    )
    tied = tie(Problem(groups), "a.*")
    assert [group.name for group in tied.groups] == ["a.*", "b"]
    assert tied.groups[0].members == ("a.q", "a.k")
    assert [(option.source, option.bits) for option in tied.groups[0].options] == [("2", 22), ("4", 44)]
    assert [option.cost for option in tied.groups[0].options] == pytest.approx([1.3, 0.3])
    assert [option.std_error for option in tied.groups[0].options] == pytest.approx([0.5, 0.5])
    solution = solver(tied, 44 + 29)
    assert solution.choice == {"a.q": "4", "a.k": "4", "b": "2"}
    assert evaluate(tied, solution.choice) == (solution.bits, solution.cost)
    # a tied group answers to its members' names
    assert sources(pin(tied, "*.k", "2"))["a.*"] == ["2"]
    assert tie(tied, "a.k") is tied
    with pytest.raises(RecompileError, match="given several sources: 2, 4"):
        evaluate(tied, {"a.q": "2", "a.k": "4", "b": "2"})


def test_ties_need_a_shared_source_and_keep_unmeasured_costs_unmeasured():
    with pytest.raises(RecompileError, match=r"tie \*: its 2 groups share no source"):
        tie(Problem((make_group("a", ("2", 1, 0.0)), make_group("b", ("3", 1, 0.0)))), "*")
    half = tie(Problem((make_group("a", ("2", 1, math.nan)), make_group("b", ("2", 1, 0.0)))), "*")
    assert math.isnan(half.groups[0].options[0].cost)


def test_evaluate_names_what_is_missing():
    with pytest.raises(RecompileError, match='no source is chosen for "lm_head"'):
        evaluate(PROBLEM, {Q: "2", K: "2"})
    with pytest.raises(RecompileError, match='"lm_head" does not offer source "2"'):
        evaluate(PROBLEM, {Q: "2", K: "2", HEAD: "2"})


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROBLEM.fixed_bits = 3  # type: ignore[misc]
