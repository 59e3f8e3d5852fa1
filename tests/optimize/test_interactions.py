"""Interactions from draws: beside a KL that is known, and how much of noise is believed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from recompile.optimize.interactions import Interactions
from recompile.optimize.problem import Group, Option, Problem, Swap
from recompile.optimize.refine import Costs, SwapModel, refine
from tests.made_up import SOURCES, MadeUp

GROUPS, TOKENS = 6, 8
START = {f"g{n}": "3" for n in range(GROUPS)}


def made_up(seed: int = 0) -> MadeUp:
    return MadeUp(GROUPS, seed, leaning=0.0)


def drawn(made: MadeUp, rows: int, samples: int) -> Interactions:
    """Products <G, e> over a row, G a Fisher sample: the variance is TOKENS e'Fe."""
    vectors = np.stack(list(made.vectors.values()))
    rng = np.random.default_rng(made.seed + 1)
    draws = rng.normal(size=(vectors.shape[1], rows * samples)) * TOKENS**0.5
    products = (vectors @ draws).reshape(-1, rows, samples).astype(np.float32)
    return Interactions.of(list(made.vectors), products, TOKENS)


def exactly(made: MadeUp) -> Interactions:
    """With one draw for every direction, which leaves no noise."""
    vectors = np.stack(list(made.vectors.values())).astype(np.float32)
    return Interactions({swap: n for n, swap in enumerate(made.vectors)}, vectors, 1.0)


def test_a_move_of_many_groups_is_predicted_to_the_bit() -> None:
    made = made_up()
    after = {f"g{n}": "243243"[n] for n in range(GROUPS)}
    costs = Costs()
    costs.add(made.linearise(START, 0))
    alone = sum(costs.of((name, after[name]), 1.0) - costs.of((name, START[name]), 1.0) for name in START)
    true = made.kl(after) - made.kl(START)
    assert abs(alone - true) > 0.05 * abs(true)
    assert alone + exactly(made).between(START, after) == pytest.approx(true, rel=1e-5)


def test_beside_is_what_a_swap_adds_to_the_company_of_the_others() -> None:
    made = made_up(1)
    found = exactly(made)
    after = START | {"g1": "2", "g2": "4", "g5": "2"}
    beside = found.beside(START, after)
    for name, source in itertools.product(START, SOURCES):
        without, with_it = after | {name: START[name]}, after | {name: source}
        company = found.between(START, with_it) - found.between(START, without)
        assert beside[name, source] == pytest.approx(company, abs=1e-6)
    assert found.between(START, START | {"g1": "2"}) == 0.0


def test_many_draws_are_believed_and_noise_is_not() -> None:
    made = made_up()
    many = drawn(made, rows=16, samples=256)
    assert many.share > 0.98
    after = {f"g{n}": "2" for n in range(GROUPS)}
    alone = sum(0.5 * float(((made.vectors[name, "2"] - made.vectors[name, "3"]) ** 2).sum()) for name in START)
    assert many.between(START, after) == pytest.approx(exactly(made).between(START, after), abs=0.05 * alone)

    swaps = [(f"g{n}", "2") for n in range(200)]
    noise = np.random.default_rng(3).normal(size=(200, 12, 4)).astype(np.float32)
    assert Interactions.of(swaps, noise, TOKENS).share < 0.02
    assert Interactions.of(swaps, noise[:, :1], TOKENS).share == 0.0  # one row confirms nothing


def test_the_share_is_that_of_signal_in_all_draws() -> None:
    """Correlations of 0.03 between 300 groups, beside noise of one over the root of the number of draws."""
    rng = np.random.default_rng(0)
    leaning = rng.choice([-1.0, 1.0], (300, 10)) / 10**0.5
    products = 0.1**0.5 * leaning @ rng.normal(size=(10, 48)) + 0.9**0.5 * rng.normal(size=(300, 48))
    found = Interactions.of([(f"g{n}", "2") for n in range(300)], products.reshape(300, 24, 2).astype(np.float32), 1)
    true = 0.1 * leaning @ leaning.T
    apart = ~np.eye(300, dtype=bool)
    signal = float((true[apart] ** 2).mean())
    assert found.share == pytest.approx(signal / (signal + 1 / 48), rel=0.35)


def test_swaps_that_are_not_drawn_are_what_the_others_differ_from() -> None:
    found = Interactions({("g0", "2"): 0, ("g1", "2"): 1}, np.array([[1.0, 2.0], [3.0, 1.0]], np.float32), 1.0)
    base = {"g0": "3", "g1": "3"}
    both: dict[str, str] = {"g0": "2", "g1": "2"}
    assert found.between(base, both) == pytest.approx(5.0)
    assert found.beside(base, both)["g0", "2"] == pytest.approx(5.0)


def test_refine_predicts_its_moves_with_them() -> None:
    """Four groups move at once here, and what they cost together is a good part of what they change."""
    errors: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(30):
        made = made_up(seed)
        problem, budget = made.problem(), GROUPS * 290
        for known in errors:
            interactions = exactly(made) if known else None
            first = next(refine(problem, budget, START, made, steps=1, interactions=interactions))
            assert first.bits <= budget or not first.accepted
            if first.moved > 1:
                errors[known].append(abs(first.predicted_nats - first.change_nats))
    assert len(errors[True]) > 10
    assert np.mean(errors[True]) < 0.5 * np.mean(errors[False])


def test_moves_are_looked_for_in_their_company() -> None:
    """Beside b, which is cheap, a costs little, for their errors cancel; alone c is cheaper."""
    vectors = {"a": np.array([1.0, 0.1]), "b": np.array([-0.5, 0.1]), "c": np.array([0.0, 0.6])}
    draws = np.stack([vectors[name] for name in vectors]).astype(np.float32)
    found = Interactions({(name, "2"): n for n, name in enumerate(vectors)}, draws, 1.0)
    problem = Problem(
        tuple(Group(name, (Option("2", 100, 0.5 * float(v @ v)), Option("4", 200, 0.0))) for name, v in vectors.items())
    )

    class Oracle:
        def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
            zero = {(name, source): 0.0 for name in vectors for source in "24"}
            own = zero | {(name, "2"): 0.5 * float(v @ v) for name, v in vectors.items()}
            return SwapModel(self.kl(choice), zero, own, zero)

        def measure(self, choice: Mapping[str, str]) -> list[float]:
            return [self.kl(choice)] * 2

        def changes(
            self, choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int
        ) -> list[list[float]]:
            raise AssertionError("one step is too early for it")

        def kl(self, choice: Mapping[str, str]) -> float:
            return 0.5 * float((sum(v * (choice[name] == "2") for name, v in vectors.items()) ** 2).sum())

    start = {"a": "4", "b": "4", "c": "4"}
    bits = 400  # two of three at the lowest
    for interactions, wanted in ((None, {"b", "c"}), (found, {"a", "b"})):
        *_, last = refine(problem, bits, start, Oracle(), steps=1, interactions=interactions)
        assert wanted == {name for name, source in last.choice.items() if source == "2"}


def test_they_are_told_apart_by_what_they_hold() -> None:
    made = made_up()
    one, other = exactly(made), exactly(made_up(1))
    assert one.sha256 == replace(one).sha256 != other.sha256
    swaps: list[Swap] = list(one.number)
    assert Interactions({swaps[0]: 0}, one.draws, 1.0).sha256 != one.sha256
