"""First and second moments of the inputs of every linear map, row by row of the calibration text.

What importance matrices and the proxy costs need: vectors a module instead of the whole Hessian X^T X.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recompile.gguf.imatrix import Imatrix, InputSums
from recompile.gguf.names import Heads, architecture_for, place_of, text_name
from recompile.model.counted import pick, places_of
from recompile.model.finite import check_finite
from recompile.model.stream import LayeredModel
from recompile.quantize.calibrate import InputCollector, InputStatistics


@dataclass(frozen=True)
class InputMoments:
    """Sums over the tokens of each row that the modules were given; experts see only the tokens routed to them."""

    modules: tuple[str, ...]  # checkpoint names that read this same input
    sums: Tensor  # [rows, in] float32
    sum_squares: Tensor  # [rows, in] float32
    tokens: Tensor  # [rows] int64


class MomentCollector(InputCollector):
    """As InputCollector, with moments of each row in place of Hessians; set `row` before a row is run."""

    def __init__(self, model: LayeredModel, index: int, rows: int) -> None:
        super().__init__(model, index)
        self.rows, self.row = rows, 0
        self._found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def accumulate(self, group: InputStatistics, inputs: Tensor) -> None:
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        found = self._found.get(id(group))
        if found is None:
            zeros = torch.zeros(self.rows, x.shape[1], device=x.device)
            found = (zeros, zeros.clone(), torch.zeros(self.rows, dtype=torch.int64))
            self._found[id(group)] = found
        sums, squares, tokens = found
        sums[self.row] += x.sum(0)
        squares[self.row] += x.square().sum(0)
        tokens[self.row] += len(x)

    def check(self) -> None:
        for group in self.groups:
            for found in self._found.get(id(group), ())[:2]:
                check_finite(found, f"{self._label}: inputs of {group.modules[0]}")

    def moments(self) -> list[InputMoments]:
        return [InputMoments(tuple(g.modules), *self._found[id(g)]) for g in self.groups if id(g) in self._found]


def collect_moments(
    model: LayeredModel, ids: Tensor, *, head: bool = False, counted: Tensor | None = None
) -> Iterator[list[InputMoments]]:
    """Run rows int64 [rows, tokens] through the model; yields the moments of one layer after the other, and last, with
    `head`, those of the head's input. The layer is loaded while its moments are yielded. counted: bool [rows, tokens],
    the places that are meant; None for all."""
    model.model.set_experts_implementation("eager")  # one linear call an expert, which the collector sees
    with torch.inference_mode():
        states = list(model.embed(ids, 1))
    for index in range(model.depth):
        with model.layer(index):
            collector = MomentCollector(model, index, len(ids))
            with torch.inference_mode(), collector:
                for row, state in enumerate(states):
                    collector.row = row
                    collector.counted = None if counted is None else counted[row : row + 1]
                    states[row] = model.run_layer(index, state, row)
            yield collector.moments()
    if head:
        with torch.inference_mode(), model.norm_loaded() as norm:
            normed = [norm(state)[0].float() for state in states]
            for row, state in enumerate(normed):
                model.watch.see(state[None], model.loaded_from, "the final norm", row, model.norm_module)
            normed = [pick(state, places_of(counted, row)) for row, state in enumerate(normed)]
        yield [
            InputMoments(
                (model.prefix_of(model.head),),
                torch.stack([x.sum(0) for x in normed]),
                torch.stack([x.square().sum(0) for x in normed]),
                torch.tensor([len(x) for x in normed]),
            )
        ]


def make_imatrix(
    config: Mapping[str, object],
    layers: Sequence[Sequence[InputMoments]],
    chunk_tokens: int,
    datasets: Sequence[str] = (),
) -> Imatrix:
    """Moments of all layers as an importance matrix under GGUF's names, experts of one tensor together.

    config: the model's, for its `model_type`; raises UnsupportedError for an architecture without a table of names
    """
    architecture = architecture_for(config)
    parts: dict[str, dict[int, InputMoments]] = {}
    rows = 0
    for found in layers:
        for moments in found:
            rows = max(rows, len(moments.tokens))
            for module in moments.modules:
                name = text_name(f"{module}.weight")
                place = place_of(architecture, name, Heads(1, 1)) if name is not None else None
                if place is not None:
                    parts.setdefault(place.gguf, {})[place.expert or 0] = moments
    entries = {}
    for name, experts in parts.items():
        count, width = max(experts) + 1, next(iter(experts.values())).sums.shape[1]
        squares, sums = np.zeros((count, width), np.float32), np.zeros((count, width), np.float32)
        counts = np.zeros(count, np.float32)
        for number, moments in experts.items():
            squares[number] = moments.sum_squares.double().sum(0).float().cpu().numpy()
            sums[number] = moments.sums.double().sum(0).float().cpu().numpy()
            counts[number] = float(moments.tokens.sum())
        entries[name] = InputSums(squares, counts, sums)
    return Imatrix(entries, rows, chunk_tokens, tuple(datasets))
