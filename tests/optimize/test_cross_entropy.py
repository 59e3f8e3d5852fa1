"""Tilted costs: found by what whole mixes measure, on made-up models whose costs err by kind, source and depth."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from recompile.optimize.cross_entropy import POPULATION, ROUNDS, CostFactors, CrossEntropyRound, search_factors
from recompile.optimize.exact import solve_exact
from recompile.optimize.problem import Group, Option, Problem, evaluate

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
BITS = {"2": 2, "3": 3, "4": 4, "6": 6}
LAYERS = 12


def swaps() -> list[tuple[str, str, int]]:
    names = [f"model.layers.{layer}.{kind}" for layer, kind in itertools.product(range(LAYERS), KINDS)]
    return [(name, source, 1000 * bits) for name in names for source, bits in BITS.items()]


def problem_of(costs: Mapping[tuple[str, str], float]) -> Problem:
    groups: dict[str, list[Option]] = {}
    for name, source, bits in swaps():
        groups.setdefault(name, []).append(Option(source, bits, costs[name, source]))
    return Problem(tuple(Group(name, tuple(options)) for name, options in groups.items()))


def made(seed: int) -> tuple[Problem, Problem]:
    """(what single swaps say, what counts): the second by factors of kind, lowest source and depth."""
    rng = random.Random(seed)
    of_kind = {kind: math.exp(rng.gauss(0, 0.8)) for kind in KINDS}
    of_group: dict[str, float] = {}
    said, true = {}, {}
    for name, source, _ in swaps():
        expensive = of_group.setdefault(name, math.exp(rng.gauss(0, 0.7)))
        said[name, source] = expensive * 4.0 ** -BITS[source]
        layer, kind = int(name.split(".")[2]), name.split(".", 3)[3]
        factor = of_kind[kind] * (2.5 if source == "2" else 1.0) * math.exp(0.5 * (2 * layer / (LAYERS - 1) - 1))
        true[name, source] = said[name, source] * factor
    return problem_of(said), problem_of(true)


def search(said: Problem, true: Problem, budget: int, scores: Mapping[tuple[str, str], float] | None = None, **more: int
           ) -> list[CrossEntropyRound]:  # fmt: skip
    def measure(choices: Sequence[Mapping[str, str]]) -> list[float]:
        return [evaluate(true, choice)[1] for choice in choices]

    return list(
        search_factors(CostFactors.of(said, scores), lambda problem: solve_exact(problem, budget), measure, **more)
    )


@pytest.mark.parametrize("bits", [2.5, 3.2, 4.1])
def test_most_of_what_single_costs_get_wrong_is_made_good(bits: float) -> None:
    lost, kept = 0.0, 0.0
    for seed in range(6):
        said, true = made(seed)
        budget = int(bits * 1000 * LAYERS * len(KINDS))
        best = solve_exact(true, budget).cost
        plain = evaluate(true, solve_exact(said, budget).choice)[1]
        rounds = search(said, true, budget)
        assert len(rounds) == ROUNDS
        assert rounds[-1].measured <= ROUNDS * POPULATION
        assert [found.kl_nats for found in rounds] == sorted((found.kl_nats for found in rounds), reverse=True)
        assert evaluate(said, rounds[-1].choice)[0] <= budget
        assert rounds[-1].kl_nats == pytest.approx(evaluate(true, rounds[-1].choice)[1])
        assert rounds[-1].kl_nats <= plain, "costs as they are were tried first"
        lost += plain / best - 1
        kept += rounds[-1].kl_nats / best - 1
    assert lost > 0.1, "or there was nothing to find"
    assert kept < 0.4 * lost


def test_a_second_opinion_that_is_right_is_taken_at_once() -> None:
    said, true = made(3)
    scores = {(group.name, option.source): option.cost for group in true.groups for option in group.options}
    budget = 3 * 1000 * LAYERS * len(KINDS)
    (first,) = search(said, true, budget, scores, rounds=1, population=2)
    assert first.kl_nats == pytest.approx(solve_exact(true, budget).cost)


def test_costs_that_are_noise_become_nothing_and_one_group_is_enough() -> None:
    group = Group("lm_head", (Option("2", 20, -0.1), Option("4", 40, 0.0), Option("6", 60, 0.2)))
    tilts = CostFactors.of(Problem((group,)), {("lm_head", "6"): 0.3})
    theta = np.full(len(tilts.names), 0.5)
    (tilted,) = tilts.apply(theta).groups
    assert [option.cost for option in tilted.options[:2]] == [0.0, 0.0]
    assert tilted.options[2].cost > 0.2
    found = search_factors(tilts, lambda p: solve_exact(p, 45), lambda c: [1.0] * len(c))
    assert list(found)[-1].choice["lm_head"] in ("2", "4")


def test_one_option_each_has_no_features_that_matter() -> None:
    groups = tuple(Group(f"model.layers.{n}.mlp.up_proj", (Option("4", 4, 0.1),)) for n in range(3))
    (last,) = search_factors(
        CostFactors.of(Problem(groups)), lambda p: solve_exact(p, 12), lambda c: [1.0] * len(c), rounds=1
    )
    assert last.measured == 1
