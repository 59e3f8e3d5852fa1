"""Whole mixes run against the reference: the one place where a choice of the optimizer becomes figures of a model.

A MixEvaluator's `reports` give all that `model_diff` says of a mix, its `kl_rows` and `meter` only the KL. One that
measures many mixes on the same few rows is a MixMeter (`eval.mixes.meter`), which keeps what the reference makes of
those rows; one that linearises, too, is a MixOracle (`eval.mixes.oracle`). MeasuredMixes (`eval.mixes.measured`) keeps
the KLs of one in a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from eval.diff import DiffOptions, DiffReport, measure_many
from recompile.checkpoint.checkpoint import Checkpoint, WeightSource
from recompile.costs import ProfileHeader
from recompile.events import OnEvent, ignore
from recompile.merge.overlay import Overlay
from recompile.merge.weight_cache import WeightStore, room_for_weights
from recompile.model.activations import quantizes_inputs
from recompile.model.tokens import Rows
from recompile.optimize.local import Measure

TOGETHER = 8  # mixes whose hidden states are held at the same time


@dataclass
class MixEvaluator:
    """Choices (group -> candidate label) of a profile, run as models.

    options: dtype, device, vocabulary, and which places of given rows count
    holds: whether decoded weights are held between calls, as far as there is room
    """

    header: ProfileHeader
    checkpoints: Mapping[str, Checkpoint]  # by candidate label
    reference: WeightSource
    options: DiffOptions = field(default_factory=DiffOptions, kw_only=True)
    holds: bool = field(default=False, kw_only=True)

    def _room(self) -> int:
        """Bytes that held weights may take."""
        return room_for_weights(self.options.device)

    @cached_property
    def _store(self) -> WeightStore:
        return WeightStore(self._room())

    def _held(self, source: WeightSource) -> WeightSource:
        return self._store.over(source) if self.holds else source

    def source(self, choice: Mapping[str, str]) -> WeightSource:
        """The mix of a choice. Raises MissingWeight for a module that its source lacks."""
        return self._held(Overlay.of_choice(self.header, self.checkpoints, choice))

    def reports(
        self,
        choices: Sequence[Mapping[str, str]],
        rows: Tensor | Rows,
        on_event: OnEvent = ignore,
        what: str = "measuring mixes",
        *,
        activations: bool = False,
    ) -> list[DiffReport]:
        """Every mix compared with the reference over `rows` (or int64 [rows, tokens]), all in one pass.

        activations: with the inputs of maps quantized where a mix says how
        """
        mixes = [self.source(choice) for choice in choices]
        options, ids = (self.options, rows) if isinstance(rows, Tensor) else (self.options.over(rows), rows.ids)
        if activations:
            quantized = (n for n, mix in enumerate(mixes) if isinstance(mix, Overlay) and quantizes_inputs(mix))
            options = replace(options, quantized_inputs=frozenset(quantized))
        return measure_many(mixes, self._held(self.reference), ids, options, on_event, what)

    def kl_rows(self, choices: Sequence[Mapping[str, str]], rows: Tensor | Rows) -> list[tuple[float, ...]]:
        """KL(reference || mix) of every choice at every row, nats per token; TOGETHER mixes in a pass.

        rows: int64 [rows, tokens], or Rows, whose places that count are taken
        """
        return [
            report.kl_rows
            for start in range(0, len(choices), TOGETHER)
            for report in self.reports(choices[start : start + TOGETHER], rows)
        ]

    def meter(self, given: Tensor | Rows) -> Measure:
        """What recompile.optimize.local measures with: choices and numbers of rows -> KL at these rows.

        given: all the rows, int64 [rows, tokens], or Rows
        """

        def measure(choices: Sequence[Mapping[str, str]], rows: Sequence[int]) -> list[tuple[float, ...]]:
            return self.kl_rows(choices, given[list(rows)] if isinstance(given, Tensor) else given.of(rows))

        return measure
