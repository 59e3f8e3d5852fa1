"""Values by position, collected row by row, and the figures of a report."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.metrics import Mean, Quantiles, mean_over_rows, quantiles
from recompile.errors import NotFiniteError
from recompile.formats.checks import is_finite
from recompile.model.finite import WIDER


@dataclass(frozen=True)
class KlFigures:
    """KL(reference || candidate) in nats per token over the counted positions; rows are chunks."""

    kl: Mean
    quantiles: Quantiles
    rows: tuple[float, ...]

    @staticmethod
    def of(chunks: list[Tensor]) -> KlFigures:
        """chunks: [positions] float32 KL values of each chunk."""
        values = torch.stack(chunks)
        return KlFigures(mean_over_rows(values), quantiles(values), tuple(float(row.double().mean()) for row in values))


class Collected:
    """Named values of every position: `add` a block of them at a time, `end_row` after each row or chunk."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._row: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[Tensor]] = {}

    def add(self, what: str, values: Tensor) -> None:
        """values: float32 [positions]"""
        self._row.setdefault(what, []).append(values)

    def end_row(self, number: int) -> None:
        """Raises NotFiniteError for a value that is none."""
        for what, parts in self._row.items():
            values = torch.cat(parts)
            if not is_finite(values):
                raise NotFiniteError(
                    f"{self.label}, {what}",
                    f"is NaN or infinite: one of the two has logits that are no numbers; {WIDER}",
                    number,
                )
            self._rows.setdefault(what, []).append(values)
        self._row = {}

    def __contains__(self, what: str) -> bool:
        return what in self._rows

    def kl(self, what: str) -> KlFigures:
        return KlFigures.of(self._rows[what])

    def mean(self, what: str) -> Mean:
        return mean_over_rows(torch.stack(self._rows[what]))
