"""Cotangents whose covariance is the Fisher matrix of the next-token distribution: where a sketch of the KL starts.

For a token with distribution p, a sample is

    g = m^-1/2 sum over j of s_j (e_{y_j} - p),        E[g] = 0,  E[g g'] = F = diag(p) - p p',

with m labels y_j, one from each of m strata of p, and random signs s_j. With m = 1 it is, but for the sign, the
gradient of the cross-entropy for a label that the model draws itself. The strata average to p, so the covariance is F
for every m; more draws cut the heavy tail of rare labels, and cost a gather of m rows of the head (W'g, for a linear
head W, needs no product with the vocabulary but the one W'p that all samples share).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eval.passes.adjoint import LOGIT_CHUNK_TOKENS
from recompile.checkpoint.checkpoint import WeightSource
from recompile.costs import ProfileGroup
from recompile.model.counted import pick, places_of, spread, weight_of
from recompile.model.stream import LayeredModel

DRAWS = 4  # labels per token and sample


@dataclass
class FisherCotangents:
    """Samples g_t of covariance F_t, pulled back to the post-norm states. The draws of a row depend on the seed, the
    sweep and the row's number only, so that they are the same in any batch and on any machine."""

    model: LayeredModel
    candidates: Mapping[str, WeightSource]
    groups: Sequence[ProfileGroup]
    samples: int
    seed: int = 0
    sweep: int = 0
    first_row: int = 0  # number of the pass's first row among all rows
    draws: int = DRAWS
    gradients: int = 0
    origin: WeightSource | None = None  # whose head the changes of swapped heads are counted from; None: the model's
    # bool [rows of the pass, tokens]: labels are drawn there alone, and rows weighed by one over how many these are,
    # so that what is divided by the length of the rows is a mean over what counts; None: everywhere
    counted: Tensor | None = None

    def at_norm(self, rows: slice, normed: Tensor) -> tuple[Tensor, Mapping[tuple[str, str], Tensor]]:
        """As `eval.passes.adjoint.Cotangents.at_norm`."""
        found: list[Tensor] = []
        labels: list[Tensor] = []
        linear = self.model.head_is_linear(normed[:1, :2])
        parts = [pick(states, places_of(self.counted, rows.start + row)) for row, states in enumerate(normed)]
        draws = [self._draw(rows.start + row, normed.shape[1]) for row in range(len(normed))]
        for row, (states, (uniform, signs)) in enumerate(zip(parts, draws, strict=True)):
            pieces = []
            for chunk in chunks_of(len(states)):
                output = self.output(rows.start + row, chunk, states[chunk], linear)
                made, drawn = self._samples(
                    output, uniform[:, chunk].to(states.device), signs[:, chunk].to(states.device)
                )
                pieces.append(made)
                labels.append(drawn)
            found.append(self.spread(rows.start + row, torch.cat(pieces, 1), normed.shape[1]))
        return torch.stack(found, 1), self._head_products(rows.start, parts, labels, draws)

    def spread(self, row: int, values: Tensor, tokens: int) -> Tensor:
        """What is at the places of a row that count, zero elsewhere; [n, places, hidden] -> [n, tokens, hidden]."""
        return spread(values, places_of(self.counted, row), tokens)

    def output(self, row: int, chunk: slice, states: Tensor, linear: bool) -> HeadOutput:
        """What the head makes of some tokens of a row; states: [tokens, hidden]. Called once for each of them."""
        return HeadOutput.of(self.model, states, linear)

    def _draw(self, row: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Uniform numbers that choose labels, and their signs over the square root of their number, of the places that
        count; a place has the same ones whichever others count."""
        shape = (self.samples, tokens, self.draws)
        generator = row_generator(self.seed, self.sweep, self.first_row + row)
        uniform = torch.rand(shape, generator=generator)
        signs = torch.randint(0, 2, shape, generator=generator).float().mul_(2).sub_(1).mul_(self.draws**-0.5)
        if (places := places_of(self.counted, row)) is None:
            return uniform, signs
        return uniform[:, places], signs[:, places] * weight_of(self.counted, row) ** 0.5

    def _head_products(
        self,
        first_row: int,
        normed: Sequence[Tensor],
        labels: Sequence[Tensor],
        draws: Sequence[tuple[Tensor, Tensor]],
    ) -> dict[tuple[str, str], Tensor]:
        """g . dz of every candidate of the head, dz the true change of the logits; [rows, gradients + samples] each.

        normed: a row, the states of the places that count, [places, hidden]
        """
        model = self.model
        products: dict[tuple[str, str], Tensor] = {}
        for group in self.groups:
            if group.layer is not None or not model.is_head(group.modules[0]):
                continue
            name = f"{model.prefix_of(model.head)}.weight"
            kept = model.head.get_parameter("weight").data
            origin = model.load_parameter(name, self.origin) if self.origin is not None else kept

            def logits(states: Tensor, weight: Tensor, kept: Tensor = kept) -> Tensor:
                model.set_parameter(model.head, "weight", weight)
                found = model.logits(states[None])[0].float()
                model.set_parameter(model.head, "weight", kept)
                return found

            for source in group.bits:
                swapped = model.load_parameter(name, self.candidates[source])
                total = torch.zeros(len(normed), self.gradients + self.samples)
                drawn = iter(labels)
                for row, states in enumerate(normed):
                    for chunk in chunks_of(len(states)):
                        here = states[chunk]
                        p = logits(here, kept).softmax(-1)
                        change = logits(here, swapped) - logits(here, origin)
                        mean = torch.linalg.vecdot(p, change)  # [tokens]
                        at = next(drawn)  # [samples, tokens, draws]
                        rise = change.expand(len(at), -1, -1).gather(-1, at) - mean[:, None]
                        signs = draws[row][1][:, chunk].to(rise.device)
                        along = [*self.head_gradients(first_row + row, chunk, p, change), *(signs * rise).sum((1, 2))]
                        total[row] += torch.stack(along).cpu()
                products[(group.name, source)] = total
        return products

    def head_gradients(self, row: int, chunk: slice, p: Tensor, change: Tensor) -> Sequence[Tensor]:
        """Of every gradient, what it says of a change of some tokens' logits, summed over them: a number each.

        p: what the model makes of the tokens; both [tokens, vocab]
        """
        return ()

    def _samples(self, output: HeadOutput, uniform: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents [samples, tokens, hidden] of one chunk of a row, and the labels drawn."""
        if not len(uniform):
            return output.states.detach().new_empty(0, *output.states.shape), uniform.long()
        labels = draw_labels(output.p, uniform)  # [samples, tokens, draws]
        if output.mean is not None:
            weight = self.model.head.get_parameter("weight")
            flat = labels.flatten(0, 1)
            drawn = nn.functional.embedding_bag(
                flat, weight, per_sample_weights=signs.flatten(0, 1).to(weight.dtype), mode="sum"
            ).reshape(*labels.shape[:2], -1)
            return drawn - signs.sum(-1, keepdim=True).to(weight.dtype) * output.mean, labels
        made = []
        for label, sign in zip(labels, signs, strict=True):
            g = -sign.sum(-1, keepdim=True) * output.p
            g.scatter_add_(-1, label, sign)
            made.append(output.pull_back(g))
        return torch.stack(made), labels


@dataclass(frozen=True)
class HeadOutput:
    """Logits of some tokens, and the way back from them.

    states: [tokens, hidden]; logits: [tokens, vocab]; p: their softmax, float32
    mean: W'p, [tokens, hidden], of a linear head W; None where the logits are no linear map of the states
    """

    states: Tensor
    logits: Tensor
    p: Tensor
    mean: Tensor | None

    @staticmethod
    def of(model: LayeredModel, states: Tensor, linear: bool, mean: bool = True) -> HeadOutput:
        """linear: what the model's head_is_linear says; mean: False where it is not asked for, for it costs as much as
        the logits."""
        with torch.enable_grad():
            leaf = states.detach().requires_grad_(not linear)
            logits = model.logits(leaf[None])[0]
        p = logits.detach().float().softmax(-1)
        weight = model.head.get_parameter("weight") if linear and mean else None
        return HeadOutput(leaf, logits, p, p.to(weight.dtype) @ weight if weight is not None else None)

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """The cotangent [tokens, vocab] of the logits as one of the states, through the graph of a head that is no
        linear map; [tokens, hidden]."""
        return torch.autograd.grad(self.logits, self.states, cotangent.to(self.logits.dtype), retain_graph=True)[0]

    @property
    def log_total(self) -> Tensor:
        """log sum exp of the logits, float32 [tokens]: from the most probable label, whose p is least rounded."""
        top = self.logits.detach().float().max(-1, keepdim=True)
        return (top.values - self.p.gather(-1, top.indices).log())[:, 0]


def chunks_of(tokens: int) -> list[slice]:
    """Tokens whose logits are there at once."""
    return [slice(start, min(tokens, start + LOGIT_CHUNK_TOKENS)) for start in range(0, tokens, LOGIT_CHUNK_TOKENS)]


def row_generator(seed: int, round_number: int, row: int) -> torch.Generator:
    """Random numbers of one row in one round, the same whatever runs beside it."""
    digest = hashlib.sha256(f"recompile sketch {seed} {round_number} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_labels(p: Tensor, uniform: Tensor) -> Tensor:
    """One label from each stratum of every token's distribution.

    p: [tokens, vocab] float32 probabilities; uniform: [samples, tokens, draws] in [0, 1)
    returns: int64 [samples, tokens, draws]; draw j of d comes from the part j/d .. (j+1)/d of the cumulated p
    """
    draws = uniform.shape[-1]
    cumulated = p.cumsum(-1)
    height = (torch.arange(draws, device=p.device) + uniform) / draws * cumulated[:, -1:]
    samples, tokens, _ = uniform.shape
    flat = height.transpose(0, 1).reshape(tokens, -1)  # [tokens, samples * draws]
    found = torch.searchsorted(cumulated, flat, right=True).clamp_(max=p.shape[-1] - 1)
    return found.reshape(tokens, samples, draws).transpose(0, 1)
