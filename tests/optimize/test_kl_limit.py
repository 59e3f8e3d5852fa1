"""The smallest size whose measured KL keeps a limit, with measurements that follow a law made up here."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping

import pytest

from recompile.errors import BudgetError, RecompileError
from recompile.optimize.budget import Budget, Pool
from recompile.optimize.choose import Choice, Rules, predict
from recompile.optimize.exact import solve_exact
from recompile.optimize.kl_limit import MOST_TRIES, NEAR, Tried, hold_kl, least_size
from recompile.optimize.problem import Problem, evaluate, reachable_range
from tests.profiles import make_profile

Law = Callable[[Mapping[str, str]], float]


def law_of(problem: Problem, scale: float, power: float) -> Law:
    return lambda choice: scale * evaluate(problem, choice)[1] ** power


@pytest.mark.parametrize("power", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_no_size_smaller_by_the_tolerance_would_do(
    random_problem: Callable[[random.Random, str, int], Problem], share: float, scale: float, power: float
) -> None:
    problem = random_problem(random.Random(7), "ladder", 60)
    law = law_of(problem, scale, power)
    low, high = reachable_range(problem)
    least, most = (law(solve_exact(problem, bits).choice) for bits in (high, low))
    limit = least ** (1 - share) * most**share
    found = list(least_size(problem, limit, solve_exact, law))
    best = [tried for tried in found if tried.holds][-1]
    assert best.kl_nats == law(best.solution.choice) <= limit
    smaller = best.solution.bits - max(2, round(NEAR * (high - low)) + 1)
    if smaller >= low:
        assert law(solve_exact(problem, smaller).choice) > limit
    assert len(found) <= MOST_TRIES
    assert len({tuple(tried.solution.choice.values()) for tried in found}) == len(found), "nothing is measured twice"


def test_few_measurements_are_usual(random_problem: Callable[[random.Random, str, int], Problem]) -> None:
    counts = []
    for seed in range(20):
        problem = random_problem(random.Random(seed), "ladder", 80)
        law = law_of(problem, 2.0, 1.2)
        low, high = reachable_range(problem)
        limit = math.sqrt(law(solve_exact(problem, high).choice) * law(solve_exact(problem, low).choice))
        counts.append(len(list(least_size(problem, limit, solve_exact, law))))
    assert sum(counts) / len(counts) < 7


def test_the_ends_of_the_range(random_problem: Callable[[random.Random, str, int], Problem]) -> None:
    problem = random_problem(random.Random(3), "ladder", 20)
    law = law_of(problem, 1.0, 1.0)
    low, high = reachable_range(problem)
    least, most = (law(solve_exact(problem, bits).choice) for bits in (high, low))
    loose = list(least_size(problem, 2 * most, solve_exact, law))
    assert loose[-1].solution.bits == low
    tight = list(least_size(problem, least, solve_exact, law))
    assert [tried.kl_nats for tried in tight if tried.holds] == [least]
    hopeless = list(least_size(problem, 0.9 * least, solve_exact, law))
    assert not any(tried.holds for tried in hopeless)
    assert min(tried.kl_nats for tried in hopeless) == least, "the best there is was tried"


def test_noise_in_what_is_measured_does_not_break_the_limit(
    random_problem: Callable[[random.Random, str, int], Problem],
) -> None:
    for seed in range(20):
        problem = random_problem(random.Random(seed), "ladder", 40)
        plain, noise = law_of(problem, 1.0, 1.0), random.Random(seed)

        def law(choice: Mapping[str, str], plain: Law = plain, noise: random.Random = noise) -> float:
            return plain(choice) * math.exp(noise.gauss(0, 0.1))

        limit = math.sqrt(math.prod(plain(solve_exact(problem, bits).choice) for bits in reachable_range(problem)))
        found = list(least_size(problem, limit, solve_exact, law))
        assert len(found) <= MOST_TRIES
        best = [tried for tried in found if tried.holds][-1]
        assert best.kl_nats <= limit
        assert all(not tried.holds for tried in found if tried.solution.bits < best.solution.bits)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_mix_that_gives_no_number_does_not_hold(broken: float) -> None:
    profile = make_profile("fused", 4)
    wide = Budget(max_kl=1.0)
    small = 3.0 * profile.counted_weights

    def law(choice: Mapping[str, str]) -> float:
        bits = sum(group.bits[choice[group.name]] for group in profile.header.groups)
        return predict(profile, choice)[0] if bits > small else broken

    *tried, choice = hold_kl(profile, wide, "exact", Rules(), law, "rows")
    assert isinstance(choice, Choice)
    assert any(not t.holds for t in tried if isinstance(t, Tried))
    assert choice.bits - profile.header.fixed_bits > small


# ---- of a profile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["clean", "base"])
def test_a_profile_is_solved_for_what_is_measured(context: str) -> None:
    profile = make_profile("fused", 4, context=context)
    law = lambda choice: 1.7 * predict(profile, choice)[0]  # noqa: E731
    limit = 0.2
    *tried, choice = hold_kl(profile, Budget(max_kl=limit), "exact", Rules(), law, "2 rows")
    assert isinstance(choice, Choice)
    assert law(choice.solution.choice) <= limit
    assert choice.solution.budget_bits == choice.bits
    assert choice.budget.max_kl == limit
    assert [t.solution.choice for t in tried if isinstance(t, Tried) and t.holds][-1] == choice.solution.choice
    assert choice.predicted_kl_nats < limit / 1.6


def test_limits_that_cannot_be_kept() -> None:
    profile = make_profile("fused", 4)
    law = lambda choice: 3 * predict(profile, choice)[0]  # noqa: E731
    best = law({group.name: max(group.bits, key=lambda n: group.bits[n]) for group in profile.header.groups})
    with pytest.raises(
        BudgetError, match=r"out of reach: the best .* measures 0\.\d+ nats per token on 5 rows"
    ) as told:
        list(hold_kl(profile, Budget(max_kl=1e-4), "exact", Rules(), law, "5 rows"))
    measured = float(str(told.value).split("measures ")[1].split()[0])
    assert measured <= best * 1.0001
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(RecompileError, match="wanted a KL above 0"):
            list(hold_kl(profile, Budget(max_kl=wrong), "exact", Rules(), law, "5 rows"))
    with pytest.raises(RecompileError, match="stand alone"):
        list(hold_kl(profile, Budget(max_kl=1.0), "exact", Rules(max_step=1), law, "5 rows"))
    beside = Budget(max_kl=1.0, pools=(Pool("gpu", ("*",), 10),))
    with pytest.raises(RecompileError, match="stand alone"):
        list(hold_kl(profile, beside, "exact", Rules(), law, "5 rows"))
