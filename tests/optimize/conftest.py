"""Small random problems and brute force, shared by the tests of the solvers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest

from recompile.optimize.problem import Group, Option, Problem

WIDTHS = (2, 3, 4, 5, 6, 8)


def _random_problem(rng: random.Random, kind: str, groups: int) -> Problem:
    """kind: "ladder" falling costs at usual widths; "wild" any sizes and costs; "noise" costs around zero; "tied" small
    whole numbers, so that equal sizes and equal costs are common."""
    made = []
    for number in range(groups):
        weights = rng.choice([64, 128, 256, 1000, 4096])
        sensitivity = rng.lognormvariate(0, 1.5) * 1e-3
        options = []
        for width in rng.sample(WIDTHS, rng.randint(1, len(WIDTHS))):
            bits, cost = {
                "ladder": (weights * width, sensitivity * 4.0 ** (2 - width) * rng.uniform(0.7, 1.3)),
                "wild": (rng.randint(1, 10_000), rng.uniform(0, 1e-3)),
                "noise": (weights * width, rng.gauss(0, 1e-4)),
                "tied": (rng.randint(0, 9), float(rng.randint(-3, 9))),
            }[kind]
            options.append(Option(str(width), bits, cost))
        made.append(Group(f"model.layers.{number}.mlp", tuple(options)))
    return Problem(tuple(made), fixed_bits=rng.randint(0, 100))


def _brute_force(problem: Problem, budget_bits: int) -> tuple[float, int]:
    """(least cost, fewest bits at that cost) over every choice within the budget."""
    found = []
    for options in itertools.product(*(group.options for group in problem.groups)):
        bits = problem.fixed_bits + sum(option.bits for option in options)
        if bits <= budget_bits and all(math.isfinite(option.cost) for option in options):
            found.append((math.fsum(option.cost for option in options), bits))
    return min(found)


@pytest.fixture
def random_problem() -> Callable[[random.Random, str, int], Problem]:
    return _random_problem


@pytest.fixture
def brute_force() -> Callable[[Problem, int], tuple[float, int]]:
    return _brute_force


@pytest.fixture
def ladder_problem() -> Callable[[int], Problem]:
    """A problem of the given number of groups x 6 options, with the sizes and the spread of costs of a real model."""

    def make(groups: int) -> Problem:
        rng = random.Random(7)
        made = []
        for number in range(groups):
            weights = rng.choice([576 * 576, 576 * 192, 576 * 1536])
            sensitivity = rng.lognormvariate(0, 1.5) * 1e-5
            options = tuple(
                Option(
                    str(width),
                    weights * width + weights // 64 * 16,
                    sensitivity * 4.0 ** (2 - width) * rng.uniform(0.8, 1.25),
                )
                for width in WIDTHS
            )
            made.append(Group(f"g{number}", options))
        return Problem(tuple(made))

    return make
