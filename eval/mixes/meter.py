"""KL of whole mixes on a few fixed rows, many mixes one after another: what the reference makes of the rows is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from eval.metrics import kl_divergence
from eval.mixes.evaluator import MixEvaluator
from eval.passes.fisher import HeadOutput, chunks_of
from recompile.checkpoint.checkpoint import WeightSource
from recompile.errors import NotFiniteError
from recompile.formats.checks import is_finite
from recompile.model.counted import pick, places_of
from recompile.model.devices import batch_rows
from recompile.model.finite import WIDER, name_of
from recompile.model.stream import LayeredModel, default_dtype, sketch_dtype


@dataclass(frozen=True)
class Goal:
    """What is kept of the reference's distributions p over some tokens.

    Through a linear head W, with hidden states h of another model under the same head,

        KL(p || q) = sum of p log p - (W'p) . h + log sum exp(W h),

    so nothing the size of the vocabulary has to be kept or made twice.

    normed: [tokens, hidden] the reference's post-norm states, of the places of a row that count
    mean: [tokens, hidden] W'p; negative_entropy: float32 [tokens]; both None for a head that is no linear map
    places: int64 [tokens], where in the row these are; None: they are the whole row
    """

    normed: Tensor
    mean: Tensor | None = None
    negative_entropy: Tensor | None = None
    places: Tensor | None = None

    @staticmethod
    def of(model: LayeredModel, row: Tensor, places: Tensor | None = None) -> Goal:
        """row: [tokens, hidden], of which `places` count; the head of the reference must be loaded."""
        normed = pick(row, places)
        if not model.head_is_linear(normed[None, :2]):
            return Goal(normed, places=places)
        means, entropies = [], []
        for chunk in chunks_of(len(normed)):
            output = HeadOutput.of(model, normed[chunk], linear=True)
            assert output.mean is not None, "asked above"
            means.append(output.mean)
            expected = torch.linalg.vecdot(output.mean.float(), normed[chunk].float())
            entropies.append(expected - output.log_total)
        return Goal(normed, torch.cat(means), torch.cat(entropies), places)

    def under_head(self, same: bool) -> Goal:
        """What of it holds for a model whose head is the reference's, or another."""
        return self if same else Goal(self.normed, places=self.places)

    def kl(self, chunk: slice, output: HeadOutput, reference: LayeredModel) -> Tensor:
        """KL of the tokens of a chunk to what another model makes of them, float32 [tokens]."""
        if self.mean is None or self.negative_entropy is None:
            return kl_divergence(reference.logits(self.normed[None, chunk])[0], output.logits.detach())
        expected = torch.linalg.vecdot(self.mean[chunk].float(), output.states.float())
        return (self.negative_entropy[chunk] - expected + output.log_total).clamp(min=0)

    def gradient(self, chunk: slice, output: HeadOutput, reference: LayeredModel, model: LayeredModel) -> Tensor:
        """The gradient q - p of that KL with respect to the states of the other `model`, [tokens, hidden]; both heads
        are loaded."""
        if self.mean is not None and output.mean is not None:
            return output.mean - self.mean[chunk]
        goal = reference.logits(self.normed[None, chunk])[0]
        change = output.p - goal.float().softmax(-1)
        if output.mean is None:
            return output.pull_back(change)
        weight = model.head.get_parameter("weight")  # a linear head that is not the reference's
        return change.to(weight.dtype) @ weight


def same_head(reference: LayeredModel, model: LayeredModel) -> bool:
    """Whether two heads, both loaded, hold the same weights."""
    own, its = (each.head.get_parameter("weight") for each in (reference, model))
    return own.shape == its.shape and torch.equal(own, its)


@dataclass
class MixMeter(MixEvaluator):
    """KL(reference || mix) on rows that are always the same; the reference runs once.

    accept: int64 [rows, tokens], of which the places count that the options say; holds: True unless told otherwise
    """

    accept: Tensor
    rough_above_nats: float = math.inf  # where the first mix has more KL, all are measured in the quickest type too
    rough: bool | None = None  # whether mixes are measured in the quickest type; None: the first one will say
    holds: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        self._accepting: tuple[LayeredModel, LayeredModel, list[Goal]] | None = None

    @cached_property
    def _held_reference(self) -> WeightSource:
        return self._held(self.reference)

    @cached_property
    def _sharp(self) -> tuple[LayeredModel, LayeredModel]:
        """The models, of the reference and of mixes, to measure with."""
        return self._models(self.options.dtype or default_dtype(self.options.device))

    @cached_property
    def _quick(self) -> tuple[LayeredModel, LayeredModel]:
        """Those to linearise with."""
        device, dtype = self.options.device, sketch_dtype(self.options.device)
        return self._sharp if self.options.dtype or dtype == default_dtype(device) else self._models(dtype)

    def _models(self, dtype: torch.dtype) -> tuple[LayeredModel, LayeredModel]:
        sources = (self.reference, self.checkpoints[self.header.base])
        reference, model = (LayeredModel.of(source, dtype=dtype, device=self.options.device) for source in sources)
        return reference, model

    def normed(self, model: LayeredModel, source: WeightSource, ids: Tensor) -> Tensor:
        """Post-norm states [rows, tokens, hidden] of a model with the weights of `source`."""
        return model.normed(ids, batch_rows(model.device, ids.shape[1]), source)

    @torch.no_grad()
    def goals(self, model: LayeredModel, ids: Tensor, counted: Tensor | None = None) -> list[Goal]:
        """What the reference makes of rows [rows, tokens], at the places that count; model: of the reference."""
        wanted = self.normed(model, self._held_reference, ids)
        with model.head_loaded(self._held_reference):
            return [Goal.of(model, states, places_of(counted, row)) for row, states in enumerate(wanted)]

    @torch.no_grad()
    def measure(self, choice: Mapping[str, str]) -> list[float]:
        """KL(reference || mix) of every accepting row, nats per token. All mixes are measured in the same type, which
        the KL of the first one decides."""
        mix = self.source(choice)
        if self.rough is None and self.rough_above_nats < math.inf:
            found = self.kl_of(mix, *self._measured_in(self._quick))
            self.rough = math.fsum(found) > self.rough_above_nats * len(found)
            if self.rough or self._quick is self._sharp:
                return found
            self._accepting = None
        return self.kl_of(mix, *self._measured_in(self._quick if self.rough else self._sharp))

    def _measured_in(self, models: tuple[LayeredModel, LayeredModel]) -> tuple[LayeredModel, LayeredModel, list[Goal]]:
        """The models, with what the reference of this type makes of the accepting rows."""
        if self._accepting is None:
            self._accepting = (*models, self.goals(models[0], self.accept, self.options.counted))
        return self._accepting

    @torch.no_grad()
    def kl_of(
        self, source: WeightSource, reference: LayeredModel, model: LayeredModel, goals: Sequence[Goal]
    ) -> list[float]:
        """KL to the model with the weights of `source` on the accepting rows."""
        (found,) = self._kls([self.normed(model, source, self.accept)], source, reference, model, goals)
        return found

    def _kls(
        self,
        models: Sequence[Tensor],
        source: WeightSource,
        reference: LayeredModel,
        model: LayeredModel,
        goals: Sequence[Goal],
    ) -> list[list[float]]:
        """KL of every row to some models with the head of `source`, from their post-norm states [rows, tokens, hidden]
        each."""
        kls = []  # on the device until all are known: one wait for it
        with reference.head_loaded(self._held_reference), model.head_loaded(source):
            same, linear = same_head(reference, model), model.head_is_linear(models[0][:1, :2])
            for normed in models:
                for goal, row in zip(goals, normed, strict=True):
                    there, states = goal.under_head(same), pick(row, goal.places)
                    sums = []
                    for chunk in chunks_of(len(states)):
                        output = HeadOutput.of(model, states[chunk], linear, mean=False)
                        sums.append(there.kl(chunk, output, reference).double().sum())
                    kls.append(torch.stack(sums).sum() / len(states))
        found = torch.stack(kls).reshape(len(models), len(goals))
        if not is_finite(found):
            row = int(found.isfinite().logical_not().any(0).nonzero()[0])
            raise NotFiniteError(
                f"{getattr(source, 'label', '') or 'a mix'}: the head",
                f"its KL is NaN or infinite in {name_of(models[0])}; {WIDER}",
                row,
            )
        return found.tolist()
