"""What a longer profile would gain: choices made from some of its rows, judged on the others.

A choice from m rows costs more than the best one by about c / m: the noise of costs falls as 1 / sqrt(m), and what a
choice near the best one loses grows with its square (less where noise is so large that choices are hardly better than
chance: then more is gained than is said). So choices from a half and from a quarter of n rows, both judged on the
other half, differ by 2 c / n, and twice as many rows would save c / (2 n) of what n rows cost: a quarter of that. What
chooses is shrunk as a profile's costs are, from the rows of its own alone; what judges is unbiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eval.profile.sketch import Sketch, estimate

SPLITS = 12
FEWEST_ROWS = 4
MOST_SWAPS = 20_000  # beyond them the choices would take longer than what they tell is worth

Costs = Mapping[tuple[str, str], float]  # (group, source) -> nats per token


@dataclass(frozen=True)
class RowGain:
    """KL, nats per token, that choices from a half and from a quarter of the rows have on the other half."""

    rows: int
    from_half: float
    from_quarter: float

    @property
    def of_twice(self) -> float:
        """The share of its KL that a choice would lose with twice as many rows; 0 where nothing is seen of it."""
        if self.from_half <= 0:
            return 0.0
        return max(0.0, self.from_quarter - self.from_half) / 4 / self.from_half


def gain_of_more_rows(sketch: Sketch, row_tokens: int, choose: Callable[[Costs], Mapping[str, str]]) -> RowGain | None:
    """choose: group -> source, of least cost within the limits. None where the rows are too few to tell."""
    count = sketch.products2.shape[1]
    if count < FEWEST_ROWS or len(sketch.swaps) > MOST_SWAPS:
        return None
    generator = np.random.default_rng(0)
    halves: list[float] = []
    quarters: list[float] = []
    for _ in range(SPLITS):
        order = generator.permutation(count)
        held = _costs(_part(sketch, order[count // 2 :]), row_tokens, shrink=False)
        for found, rows in ((halves, order[: count // 2]), (quarters, order[: count // 4])):
            choice = choose(_costs(_part(sketch, rows), row_tokens, shrink=True))
            found.append(math.fsum(held[swap] for swap in choice.items() if swap in held))
    return RowGain(count, math.fsum(halves) / SPLITS, math.fsum(quarters) / SPLITS)


def _part(sketch: Sketch, rows: NDArray[np.int64]) -> Sketch:
    names = ("products2", "products4", "squares", "tokens")
    return replace(sketch, pairs=None, **{name: getattr(sketch, name)[:, rows] for name in names})


def _costs(sketch: Sketch, row_tokens: int, *, shrink: bool) -> dict[tuple[str, str], float]:
    values = estimate(sketch, row_tokens, shrink=shrink, weigh=shrink).mean(1).tolist()
    return dict(zip(sketch.swaps, values, strict=True))
