"""A made-up KL with known interactions, for searches over recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recompile.optimize.problem import Group, Option, Problem
from recompile.optimize.refine import SwapModel

SOURCES = ("2", "3", "4")


@dataclass
class MadeUp:
    """KL = 1/2 |sum over groups of v[group, source]|^2 + noise per row: swaps interact as errors of one output do."""

    groups: int = 8
    seed: int = 0
    leaning: float = 1.0  # how much every error leans the same way, so that they add up faster than linearly
    rows: int = 6
    noise: float = 0.0
    measured: list[Mapping[str, str]] = field(default_factory=list)
    surveyed: list[tuple[dict[str, str], int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        together = self.leaning * rng.normal(size=4)
        self.vectors = {
            (f"g{n}", source): 2.0 ** -int(source) * (rng.normal(size=4) + together) * (1 + n % 3)
            for n in range(self.groups)
            for source in SOURCES
        }
        self.rng = rng

    def kl(self, choice: Mapping[str, str]) -> float:
        return 0.5 * float((sum(self.vectors[swap] for swap in choice.items()) ** 2).sum())

    def problem(self) -> Problem:
        return Problem(
            tuple(
                Group(f"g{n}", tuple(Option(s, int(s) * 100, self.kl({f"g{n}": s})) for s in SOURCES))
                for n in range(self.groups)
            )
        )

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        total = sum(self.vectors[swap] for swap in choice.items())
        slope = {swap: float(total @ v) + self.noise * float(self.rng.normal()) for swap, v in self.vectors.items()}
        own = {swap: 0.5 * float(v @ v) for swap, v in self.vectors.items()}
        cross = {
            (group, source): float(v @ self.vectors[group, choice[group]])
            for (group, source), v in self.vectors.items()
        }
        return SwapModel(self.kl(choice), slope, own, cross)

    def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
        self.measured.append(choice)
        return [self.kl(choice) * (1 + 0.05 * row) for row in range(self.rows)]

    def changes(
        self, choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int
    ) -> Sequence[Sequence[float]]:
        self.surveyed.append((dict(choice), step))
        return [[self.kl({**choice, **swap}) - self.kl(choice)] * 4 for swap in swaps]
