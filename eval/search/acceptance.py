"""Verification: a recipe measured beside the mixes that people make by hand, on rows that neither chose it.

One pass of the reference and of every mix over the same rows; the recipe wins a comparison where the 95 % interval of
the paired difference over rows lies below zero. What does not win is said, and the best of them is named, so that no
user gets a model worse than the simple mix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.diff import DiffReport
from eval.metrics import Mean, paired_difference
from eval.mixes.evaluator import MixEvaluator
from recompile.events import OnEvent, ignore
from recompile.model.tokens import Rows
from recompile.optimize.baselines import Baseline

RECIPE = "recipe"


@dataclass(frozen=True)
class Contender:
    """One measured mix."""

    name: str
    choice: Mapping[str, str]
    bits: int  # stored bits of quantized modules
    is_over: bool  # larger than the limits allow: measured, never written
    competes: bool  # whether the recipe has to beat it
    kl: Mean  # nats per token
    perplexity: float
    kl_rows: tuple[float, ...]
    difference: Mean | None  # recipe - this, paired by row; None for the recipe itself
    interval: tuple[float, float] | None  # 95 % of the difference; None for fewer than two rows

    @property
    def is_beaten(self) -> bool:
        """Whether the recipe is better with confidence."""
        return self.interval is not None and self.interval[1] < 0


@dataclass(frozen=True)
class Verdict:
    """What rows that nothing else used say of a recipe."""

    contenders: tuple[Contender, ...]  # the recipe first
    predicted_kl_nats: float
    reference_perplexity: float
    rows: int
    row_tokens: int
    rows_sha256: str
    rows_source: str
    noise_floor: float
    activations: bool = False  # whether the mixes ran with quantized inputs
    rows_role: str = ""
    positions: str = "all"  # of a trace: "response" where only predictions of what the model wrote are counted
    tokens: int = 0  # compared

    @property
    def recipe(self) -> Contender:
        return self.contenders[0]

    @property
    def ratio(self) -> float:
        """Measured over predicted KL."""
        return self.recipe.kl.mean / self.predicted_kl_nats if self.predicted_kl_nats > 0 else math.nan

    @property
    def unbeaten(self) -> tuple[Contender, ...]:
        """Those that the recipe has to beat and does not, with confidence."""
        return tuple(c for c in self.contenders[1:] if c.competes and not c.is_beaten)

    @property
    def best(self) -> Contender:
        """The least measured KL of what the limits allow; at equal KL the recipe."""
        return min((c for c in self.contenders if not c.is_over and c.competes), key=lambda c: c.kl.mean)

    @property
    def ppl_increase(self) -> float:
        """Of the recipe over the reference, a share."""
        return self.recipe.perplexity / self.reference_perplexity - 1


def verify(
    mixes: MixEvaluator,
    recipe: Mapping[str, str],
    bits: int,
    predicted_kl_nats: float,
    baselines: Sequence[Baseline],
    rows: Rows,
    on_event: OnEvent = ignore,
    *,
    activations: bool = False,
) -> Verdict:
    """Measure a recipe and its baselines on rows that nothing else used. Where a baseline that is over the limits is
    not beaten, its form within them is measured in a second pass.

    bits, predicted_kl_nats: of the recipe; activations: run every mix with the inputs of its maps quantized as their
    schemes say. on_event: gets what `eval.diff.measure_many` tells.
    """
    header, rows = mixes.header, rows.by_length()
    choices: list[Mapping[str, str]] = [recipe, *(r.choice for r in baselines)]
    reports = mixes.reports(choices, rows, on_event, "checking", activations=activations)
    contenders = [_contender(RECIPE, recipe, bits, False, True, reports[0], None)]
    for baseline, report in zip(baselines, reports[1:], strict=True):
        competes = baseline.within is not None
        contenders.append(
            _contender(
                baseline.name,
                baseline.choice,
                baseline.bits,
                baseline.is_over or not competes,
                competes,
                report,
                reports[0],
            )
        )
    again = [
        baseline
        for baseline, found in zip(baselines, contenders[1:], strict=True)
        if baseline.is_over and not found.is_beaten and baseline.within is not None
    ]
    known = [dict(contender.choice) for contender in contenders]
    again = [baseline for baseline in again if baseline.within is not None and dict(baseline.within) not in known]
    if again:
        choices = [baseline.within for baseline in again if baseline.within is not None]
        more = mixes.reports(choices, rows, on_event, "checking", activations=activations)
        for baseline, choice, report in zip(again, choices, more, strict=True):
            smaller = header.fixed_bits + sum(group.bits[choice[group.name]] for group in header.groups)
            name = f"{baseline.name} (within the limits)"
            contenders.append(_contender(name, choice, smaller, False, True, report, reports[0]))
    return Verdict(
        tuple(contenders),
        predicted_kl_nats,
        reports[0].score_reference.perplexity,
        len(rows.ids),
        rows.ids.shape[1],
        rows.sha256,
        rows.source,
        reports[0].noise_floor,
        activations,
        rows.role,
        rows.positions,
        reports[0].tokens,
    )


def _contender(
    name: str,
    choice: Mapping[str, str],
    bits: int,
    is_over: bool,
    competes: bool,
    report: DiffReport,
    recipe: DiffReport | None,
) -> Contender:
    difference, interval = None, None
    if recipe is not None:
        difference, low_high = paired_difference(_float64(recipe.kl_rows), _float64(report.kl_rows))
        interval = low_high if len(report.kl_rows) > 1 else None
    return Contender(
        name,
        choice,
        bits,
        is_over,
        competes,
        report.kl,
        report.score_candidate.perplexity,
        report.kl_rows,
        difference,
        interval,
    )


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
