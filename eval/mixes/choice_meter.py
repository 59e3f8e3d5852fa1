"""Whole choices measured on some rows: what the searches of recompile.optimize are handed as `measure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from eval.diff import DiffOptions, DiffReport, compare_many
from eval.search.acceptance import mix_of
from recompile.checkpoint.checkpoint import Checkpoint, WeightSource
from recompile.costs import ProfileHeader
from recompile.merge.weight_cache import WeightStore, room_for_weights

TOGETHER = 8  # mixes whose hidden states are held at the same time


class ChoiceMeter:
    """KL(reference || choice) of whole choices (group -> candidate label), row by row.

    ids: int64 [rows, tokens]. Each call runs the reference and all its choices once over the rows asked for, layer by
    layer; decoded weights are held between calls as far as there is room (unless holds is False), nothing else is.
    """

    def __init__(
        self,
        header: ProfileHeader,
        checkpoints: Mapping[str, Checkpoint],
        reference: WeightSource,
        ids: Tensor,
        options: DiffOptions | None = None,
        holds: bool = True,
    ) -> None:
        self.header, self.checkpoints, self.reference = header, checkpoints, reference
        self.ids, self.options = ids, options or DiffOptions()
        self._store = WeightStore(room_for_weights(self.options.device) if holds else 0)

    def __call__(self, choices: Sequence[Mapping[str, str]], rows: Sequence[int]) -> list[tuple[float, ...]]:
        """KL of every choice at every one of these rows, nats per token."""
        found: list[tuple[float, ...]] = []
        ids = self.ids[list(rows)]
        for start in range(0, len(choices), TOGETHER):
            some = choices[start : start + TOGETHER]
            mixes = [self._store.over(mix_of(self.header, self.checkpoints, choice)) for choice in some]
            for event in compare_many(mixes, self._store.over(self.reference), ids, self.options):
                if isinstance(event, DiffReport):
                    found.append(event.kl_rows)
        return found
