"""How near refine comes to the best recipe, on made-up models where that can be looked for with full knowledge.

    python scripts/bench_refine.py [--models 8]

A made-up model is KL(recipe) = 1/2 |sum over groups of v[group, candidate]|^2 over 210 groups of SmolLM2's shapes with
four candidates: the v have the lengths that 2/3/4/6 bits have at a refined recipe of 3.4 bits per weight, and random
directions, so that errors of two groups correlate by 0.023 (root mean square), as there. What refine is told has the
noise of 4 rows x 256 tokens (its slopes and squares) and of 12 rows (its measurements). Beside it, annealing that knows
the whole matrix of products: no search of single recipes, however long, can be expected to go below.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bench_record  # noqa: E402

from eval.refine import Curves  # noqa: E402
from recompile.optimize.exact import solve_exact  # noqa: E402
from recompile.optimize.problem import Group, Option, Problem  # noqa: E402
from recompile.optimize.refine import SwapModel, refine  # noqa: E402

LABELS = ("2", "3", "4", "6")
SHAPES = (576 * 576, 192 * 576, 192 * 576, 576 * 576, 1536 * 576, 1536 * 576, 576 * 1536)  # of a layer
LAYERS = 30
BITS = (2.28, 3.30, 4.31, 6.34)  # stored bits a weight: groups of 64, scales and zero points
BUDGET_BPW = 3.4
OWN_LOG = (-5.23, 0.88)  # of 3 bits: logarithm of half the square of v, mean and standard deviation over groups
STEP_LOG = (1.53, 0.0, -1.42, -4.28)  # of the other candidates, relative to it
STEP_SPREAD = 0.3
DIRECTIONS = 1900  # 1 / sqrt of it: how much two errors correlate
REFERENCE_LOG = (-0.3, 0.28)  # what single swaps cost around the reference, relative to there
SLOPE_NOISE = (0.25, 0.6, 1.1, 4.5)  # of one step, relative to a candidate's own term
OWN_NOISE = 0.19
ROWS, ROW_NOISE = 12, 1.0  # of a row's KL, a group's share, relative to its own term
STEPS = (24, 60, 120)
MOVES = 1_000_000
HOT, COLD = 3e-3, 1e-5  # nats


@dataclass
class MadeUp:
    """One model, and what refine asks of it."""

    seed: int
    curves: Curves = field(default_factory=Curves)

    def __post_init__(self) -> None:
        self.rng = rng = np.random.default_rng(self.seed)
        weights = np.array(SHAPES * LAYERS)
        self.bits = np.round(weights[:, None] * np.array(BITS)).astype(np.int64)
        groups = len(weights)
        own_log = rng.normal(*OWN_LOG, size=(groups, 1)) + np.array(STEP_LOG)
        own_log[:, [0, 2, 3]] += rng.normal(0, STEP_SPREAD, size=(groups, 3))
        self.own = np.exp(own_log)
        directions = rng.normal(size=(groups, len(LABELS), DIRECTIONS))
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        self.vectors = (np.sqrt(2 * self.own)[..., None] * directions).astype(np.float32)
        self.row_noise = ROW_NOISE * self.own * rng.normal(size=(ROWS, *self.own.shape))
        prior = self.own * np.exp(rng.normal(*REFERENCE_LOG, size=(groups, 1)))
        self.budget = math.floor(BUDGET_BPW * weights.sum())
        self.names = [f"g{number}" for number in range(groups)]
        self.problem = Problem(
            tuple(
                Group(name, tuple(map(Option, LABELS, map(int, bits), map(float, costs))))
                for name, bits, costs in zip(self.names, self.bits, prior, strict=True)
            )
        )

    def numbers(self, choice: Mapping[str, str]) -> NDArray[np.int64]:
        return np.array([LABELS.index(choice[name]) for name in self.names])

    def error(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.vectors[np.arange(len(numbers)), numbers].sum(0)

    def kl(self, choice: Mapping[str, str]) -> float:
        return 0.5 * float((self.error(self.numbers(choice)).astype(np.float64) ** 2).sum())

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        slope = self.vectors @ self.error(self.numbers(choice))
        slope = slope + self.own * np.array(SLOPE_NOISE) * self.rng.normal(size=slope.shape)
        if self.curves.are_due:
            self.curves.add(self._by_swap(self.own * (1 + OWN_NOISE * self.rng.normal(size=self.own.shape))), {})
        self.curves.asked += 1
        own = {swap: max(0.0, value) for swap, value in self.curves.own.items()}
        return SwapModel(self.kl(choice), self._by_swap(slope), own, self.curves.cross(choice))

    def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
        numbers = self.numbers(choice)
        noise = self.row_noise[:, np.arange(len(numbers)), numbers].sum(1)
        return list(self.kl(choice) + noise)

    def _by_swap(self, values: NDArray[np.float64]) -> dict[tuple[str, str], float]:
        return {
            (name, label): float(value)
            for name, row in zip(self.names, values, strict=True)
            for label, value in zip(LABELS, row, strict=True)
        }


def anneal(model: MadeUp, start: Mapping[str, str]) -> float:
    """The least KL found by exchanges of one or two groups, one rung each, with the products of all errors known."""
    rng = np.random.default_rng(model.seed)
    flat = model.vectors.reshape(-1, DIRECTIONS)
    products = (flat @ flat.T).astype(np.float64)
    at = np.arange(len(model.names)) * len(LABELS) + model.numbers(start)
    field_at = products[:, at].sum(1)
    stored = model.bits.reshape(-1)
    size, kl = int(stored[at].sum()), model.kl(start)
    least = kl
    picks = rng.integers(len(at), size=(MOVES, 2))
    rungs = rng.choice((-1, 1), size=(MOVES, 2)) * (rng.random((MOVES, 2)) < (1.0, 0.8))
    luck = np.log(rng.random(MOVES))
    for move in range(MOVES):
        (one, two), places = picks[move], picks[move] * len(LABELS)
        before = at[picks[move]]
        after = before + rungs[move]
        if one == two or not ((after >= places) & (after < places + len(LABELS))).all():
            continue
        grown = int(stored[after].sum() - stored[before].sum())
        if size + grown > model.budget:
            continue
        sign, moved = np.array([1.0, 1.0, -1.0, -1.0]), np.concatenate([after, before])
        change = float(sign @ field_at[moved] + 0.5 * sign @ products[np.ix_(moved, moved)] @ sign)
        if change < 0 or luck[move] < -change / (HOT * (COLD / HOT) ** (move / MOVES)):
            field_at += products[:, moved] @ sign
            at[[one, two]] = after
            size, kl = size + grown, kl + change
            least = min(least, kl)
    return least


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", default=8, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Default scripts/bench_results/refine.json.")
def main(models: int, out: Path | None) -> None:
    """Compare refine with annealing that knows everything."""
    result = bench_record.birth_certificate()
    found: dict[str, list[float]] = {"annealed": [], **{f"{steps} steps": [] for steps in STEPS}}
    for seed in range(models):
        began, model = time.monotonic(), MadeUp(seed)
        start = solve_exact(model.problem, model.budget).choice
        first = best = model.kl(start)
        found["annealed"].append(anneal(model, start) / first)
        by_step = [best]
        for step in refine(model.problem, model.budget, start, model, steps=max(STEPS)):
            by_step.append(model.kl(step.choice))
        for steps in STEPS:
            found[f"{steps} steps"].append(by_step[min(steps, len(by_step) - 1)] / first)
        said = ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items())
        click.echo(f"model {seed}: exact on its profile {first:.3f}; of that {said}; {time.monotonic() - began:.0f} s")
    result["of_the_start"] = {
        name: {"mean": float(np.mean(values)), "std_error": float(np.std(values, ddof=1) / len(values) ** 0.5)}
        for name, values in found.items()
    }
    for name, values in result["of_the_start"].items():
        click.echo(f"{name:>12}: {values['mean']:.3f} ± {values['std_error']:.3f} of the start's KL")
    bench_record.keep(out or bench_record.RESULTS / "refine.json", result)


if __name__ == "__main__":
    main()
