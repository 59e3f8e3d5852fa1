from __future__ import annotations

import random

import pytest

from recompile.errors import FitError, RecompileError
from recompile.optimize.exact import solve_exact
from recompile.optimize.problem import Group, Option, Problem, evaluate
from recompile.optimize.superadditive import fit, uniform_mixes


def make_problem(groups: int = 30, seed: int = 0) -> Problem:
    rng = random.Random(seed)
    made = []
    for number in range(groups):
        expensive, weights = rng.lognormvariate(0, 1) * 1e-2, rng.choice([64, 256, 1024])
        made.append(
            Group(f"g{number}", tuple(Option(str(b), weights * b, expensive * 4.0 ** (2 - b)) for b in (2, 3, 4, 6)))
        )
    return Problem(tuple(made))


def law(problem: Problem, choice: dict[str, str], power: float, scale: float) -> float:
    return scale * sum(group.option(choice[group.name]).cost ** power for group in problem.groups)  # type: ignore[union-attr]


def uniform(problem: Problem) -> list[dict[str, str]]:
    return [{group.name: str(bits) for group in problem.groups} for bits in (2, 3, 4, 6)]


@pytest.mark.parametrize("power", [1.0, 1.3, 2.0])
def test_the_law_that_made_the_measurements_is_found(power: float) -> None:
    problem = make_problem()
    found = fit(problem, [(choice, law(problem, choice, power, 3.0)) for choice in uniform(problem)])
    assert found.power == pytest.approx(power, abs=1e-3)
    assert found.scale == pytest.approx(3.0, rel=1e-2)
    assert found.log_error < 1e-3
    assert (found.log_error_of_sum > 0.1) == (power > 1.0)
    mix = {group.name: random.Random(1).choice("2346") for group in problem.groups}
    assert found.predict(problem, mix) == pytest.approx(law(problem, mix, power, 3.0), rel=2e-2)


def test_the_transformed_problem_is_solved_as_the_law_wants() -> None:
    problem = make_problem()
    found = fit(problem, [(choice, law(problem, choice, 1.6, 5.0)) for choice in uniform(problem)])
    budget = sum(group.options[1].bits for group in problem.groups)  # as large as uniform 3
    plain, penalized = solve_exact(problem, budget), solve_exact(found.transform(problem), budget)
    assert penalized.cost == pytest.approx(found.predict(problem, penalized.choice))
    assert law(problem, dict(penalized.choice), 1.6, 5.0) < law(problem, dict(plain.choice), 1.6, 5.0)
    assert evaluate(problem, penalized.choice)[1] > plain.cost, "it gives up some of the plain sum for it"


def test_errors_that_add_up_slower_are_taken_as_a_sum() -> None:
    problem = make_problem()
    found = fit(problem, [(choice, law(problem, choice, 0.7, 1.0)) for choice in uniform(problem)])
    assert found.power == 1.0


def test_noise_below_zero_costs_nothing_and_order_is_kept() -> None:
    group = Group("g", (Option("2", 2, 0.5), Option("3", 3, 0.1), Option("4", 4, -0.01), Option("6", 6, float("nan"))))
    problem = Problem((group, *make_problem(3).groups))
    choices = [{**choice, "g": "3"} for choice in uniform(problem)]
    found = fit(problem, [(choice, law(problem, choice, 1.5, 1.0)) for choice in choices])
    costs = [option.cost for option in found.transform(problem).groups[0].options]
    assert costs[0] > costs[1] > costs[2] == 0.0
    assert costs[3] != costs[3]


def test_uniform_mixes_keep_to_what_is_offered() -> None:
    options = tuple(Option(label, 8 * int(label), 0.1) for label in "234")
    problem = Problem((Group("a", options), Group("tie", options[1:], ("b", "c")), Group("pinned", options[2:])))
    start = {"a": "2", "b": "3", "c": "3", "pinned": "4"}
    assert uniform_mixes(problem, start) == {
        "2": {"a": "2", "b": "3", "c": "3", "pinned": "4"},
        "3": {"a": "3", "b": "3", "c": "3", "pinned": "4"},
        "4": {"a": "4", "b": "4", "c": "4", "pinned": "4"},
    }
    assert list(uniform_mixes(problem, start | {"b": "4", "c": "4"})) == ["2", "3", "4"]
    alike = Problem((Group("a", options[:1]), Group("pinned", options[2:])))
    assert list(uniform_mixes(alike, {"a": "2", "pinned": "4"})) == ["2"], "no mix is named twice"


def test_what_cannot_be_fitted() -> None:
    problem = make_problem()
    one = uniform(problem)[0]
    for wrong in ([], [(one, 0.5)], [(one, 0.5), (one, 0.6)]):
        with pytest.raises(FitError, match="at least two mixes"):
            fit(problem, wrong)
    with pytest.raises(FitError, match="KL of 0 or less"):
        fit(problem, [(one, 0.5), (uniform(problem)[1], 0.0)])
    with pytest.raises(RecompileError, match="does not offer"):
        fit(problem, [(dict.fromkeys(one, "9"), 0.5), (one, 0.4)])
