"""The mixes that people make by hand: as large as the recipe, within the limits, and what their names say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recompile.costs import Profile
from recompile.optimize.baselines import Baseline, make_baselines
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Choice, Constraint, Rules, choose, limits_of, prepare_problem
from recompile.optimize.problem import Problem, evaluate, reachable_range
from tests.profiles import make_profile


def rivals_of(profile: Profile, budget: Budget, rules: Rules) -> tuple[Choice, list[Baseline]]:
    chosen = choose(profile, budget, "exact", rules)
    problem = prepare_problem(profile, rules)
    limits = limits_of(profile, problem, budget, rules, chosen.bits)
    others = {} if rules.max_step is not None else {"greedy": choose(profile, budget, "greedy", rules).solution.choice}
    return chosen, make_baselines(profile, problem, chosen.solution.choice, limits, others)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 300),
    share=st.floats(0.02, 0.98),
    level=st.sampled_from(["tensor", "fused", "block", "layer"]),
    rules=st.sampled_from(
        [
            Rules(),
            Rules((Constraint("pin", "*.v_proj", "4"), Constraint("min", "model.layers.0.*", "3"))),
            Rules(ties=("*.down_proj",)),
            Rules(max_step=1),
        ]
    ),
)
def test_rivals_are_as_large_and_keep_the_rules(seed: int, share: float, level: str, rules: Rules) -> None:
    if level in ("block", "layer") and rules.constraints:
        rules = Rules()
    profile = make_profile(level, 4, seed)
    budget = Budget(bpw=3.1 + 2.3 * share if rules.constraints else 2.1 + 3.7 * share)
    chosen, baselines = rivals_of(profile, budget, rules)
    problem = prepare_problem(profile, rules)
    limits = limits_of(profile, problem, budget, rules, chosen.bits)
    assert baselines
    for baseline in baselines:
        assert evaluate(problem, baseline.choice)[0] == baseline.bits
        if baseline.within is None:
            assert "larger" in baseline.name
            continue
        plain = baseline.name.startswith("uniform") and "," not in baseline.name
        full = baseline.bits >= chosen.bits
        assert plain or full or rules.max_step is not None or _is_the_largest(problem, baseline)
        within = evaluate(problem, baseline.within)[0]
        assert within <= budget.bits(profile)
        numbers = [
            next(n for n, option in enumerate(group.options) if option.source == baseline.within[group.members[0]])
            for group in problem.groups
        ]
        assert all(row.used(numbers) <= row.limit for row in limits)
    assert len({tuple(sorted(baseline.choice.items())) for baseline in baselines}) == len(baselines)
    assert all(dict(baseline.choice) != dict(chosen.solution.choice) for baseline in baselines)


def _is_the_largest(problem: Problem, baseline: Baseline) -> bool:
    return baseline.bits == reachable_range(problem)[1]


def test_what_the_names_say() -> None:
    profile = make_profile("tensor", 6)
    _, baselines = rivals_of(profile, Budget(bpw=3.2), Rules())
    named = {baseline.name: baseline for baseline in baselines}
    attention = named["uniform 3, attention +1"].choice
    raised = [name for name, source in attention.items() if source == "4"]
    assert raised
    assert sum("self_attn" in name for name in raised) >= len(raised) - 1, "all but the last small step are attention"
    ends = named["uniform 3, first and last layers +2"].choice
    assert {name.split(".")[2] for name, source in ends.items() if source == "6"} <= {"0", "5"}
    assert any(source == "6" for source in ends.values())
    assert set(named["uniform 3"].choice.values()) == {"3"}
    assert set(named["uniform 4 (larger)"].choice.values()) == {"4"}
    assert named["uniform 4 (larger)"].within is None


def test_pinned_modules_stay_pinned_in_every_rival() -> None:
    profile = make_profile("tensor", 4)
    _, baselines = rivals_of(profile, Budget(bpw=3.7), Rules((Constraint("pin", "*.v_proj", "6"),)))
    for baseline in baselines:
        assert {source for name, source in baseline.choice.items() if name.endswith("v_proj")} == {"6"}


@pytest.mark.parametrize("bpw", [2.2, 5.9])
def test_budgets_at_the_edge_have_rivals_or_none(bpw: float) -> None:
    profile = make_profile("tensor", 3)
    chosen, baselines = rivals_of(profile, Budget(bpw=bpw), Rules())
    for baseline in baselines:
        if baseline.within is not None:
            assert evaluate(prepare_problem(profile, Rules()), baseline.within)[0] <= chosen.solution.budget_bits
