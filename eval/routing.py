"""Which experts the tokens of a mixture-of-experts layer go to, and how many tokens keep theirs in another build.

Nothing here knows architectures: whatever module of a layer holds weights of several experts in one tensor and is
called with the experts of every token is watched. A rounding error that sends a token elsewhere is an error that a
quadratic form of small changes (a sketch) does not see, so that it is worth a figure of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from eval.metrics import Mean, mean_over_rows


@dataclass(frozen=True)
class LayerRouting:
    """One layer of a candidate beside the reference.

    experts: how many the layer has; chosen: how many a token goes to
    same_experts: share of tokens whose whole set of experts is the reference's, mean and standard error over rows
    load: tokens an expert, in the reference
    load_candidate: tokens an expert, in the candidate
    """

    name: str
    experts: int
    chosen: int
    same_experts: Mean
    load: tuple[int, ...]
    load_candidate: tuple[int, ...]

    @property
    def unused(self) -> int:
        """Experts that no token of these rows went to in the reference."""
        return sum(count == 0 for count in self.load)


@dataclass
class ExpertChoices:
    """The experts of every token of one layer, batch by batch, in the order in which batches ran.

    sets: bool [tokens, experts] a batch, true where a token goes to an expert
    """

    sets: list[Tensor] = field(default_factory=list)

    @contextmanager
    def watching(self, layer: nn.Module) -> Iterator[ExpertChoices]:
        """While this lasts, every run of `layer` adds a batch; a layer without experts adds none."""
        handles = [
            module.register_forward_pre_hook(self._hook(count), with_kwargs=True)
            for module, count in _experts_of(layer)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, experts: int) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = _sets_of_call([*args, *kwargs.values()], experts)
            if found is not None:
                self.sets.append(found)

        return note


def _experts_of(layer: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """(module, experts) of those that hold weights of several experts in one tensor."""
    for module in layer.modules():
        counts = {len(weight) for weight in module._parameters.values() if weight is not None and weight.dim() == 3}
        if len(counts) == 1 and not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            yield module, counts.pop()


def _sets_of_call(values: list[Any], experts: int) -> Tensor | None:
    """bool [tokens, experts] of what an experts module is called with: the indices of the chosen, [tokens, chosen], or
    the tokens once an expert, [experts * tokens, hidden], zero where an expert is not meant. None for neither."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    for value in tensors:
        if value.dtype in (torch.int64, torch.int32) and value.dim() >= 2:
            chosen = value.flatten(0, -2).to(torch.int64)
            # ids from `experts` on are places of nothing: experts of other ranks, or ones that compute nothing
            most = int(chosen.max()) + 1 if chosen.numel() else 0  # no expert a token is none
            sets = torch.zeros(len(chosen), max(experts, most), dtype=torch.bool, device=chosen.device)
            return sets.scatter_(1, chosen, True)[:, :experts]
    if len(tensors) == 1 and tensors[0].dim() == 2 and len(tensors[0]) % experts == 0:
        return (tensors[0].reshape(experts, -1, tensors[0].shape[-1]) != 0).any(-1).T.contiguous()
    return None


def compare_choices(
    name: str,
    reference: ExpertChoices,
    candidate: ExpertChoices,
    rows: int,
    counted: Sequence[Tensor] | None = None,
) -> LayerRouting | None:
    """How the candidate's choices of the same `rows` compare; None for a layer whose choices were not seen.

    counted: a batch, bool [rows, tokens], the tokens that are meant; None for all
    """
    if not reference.sets or len(reference.sets) != len(candidate.sets):
        return None
    theirs, ours = torch.cat(reference.sets), torch.cat(candidate.sets)
    if theirs.shape != ours.shape or (counted is None and len(theirs) % rows):
        return None
    same = (theirs == ours).all(1).float().cpu()
    if counted is None:
        same_experts = mean_over_rows(same.reshape(rows, -1))
    else:
        meant = torch.cat([batch.flatten() for batch in counted])
        if len(meant) != len(theirs):
            return None
        widest = max(batch.shape[1] for batch in counted)
        parts = same.split([batch.numel() for batch in counted])
        values = [
            pad(part.reshape(batch.shape), (0, widest - batch.shape[1]))
            for part, batch in zip(parts, counted, strict=True)
        ]
        masks = [pad(batch, (0, widest - batch.shape[1])) for batch in counted]
        same_experts = mean_over_rows(torch.cat(values), torch.cat(masks))
        theirs, ours = theirs[meant.to(theirs.device)], ours[meant.to(ours.device)]
    return LayerRouting(
        name=name,
        experts=theirs.shape[1],
        chosen=int(theirs.sum(1).max()),
        same_experts=same_experts,
        load=tuple(theirs.sum(0).tolist()),
        load_candidate=tuple(ours.sum(0).tolist()),
    )
