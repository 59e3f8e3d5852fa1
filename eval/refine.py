"""What `recompile.optimize.refine` asks of real models: swap costs at a mix, and the KL of a mix, both streamed.

At a mix with logits z_q and distribution q, against the reference's p, the gradient of KL(p || q) with respect to z_q
is q - p, and its second derivative is F_q = diag(q) - q q'. So one streamed backward pass (`eval.adjoint`) with the
cotangent q - p and some Fisher samples of q gives the first- and second-order term of every swap at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.adjoint import AdjointPass, LayerBackward, LayerForward, SwapProducts, plan_pass
from eval.diff import BATCH_TOKENS
from eval.fisher import FisherCotangents, HeadOutput, chunks_of
from eval.guard import mix_of
from eval.metrics import kl_divergence
from eval.sketch import collect, estimate
from recompile.checkpoint import Checkpoint, WeightSource
from recompile.costs import ProfileHeader
from recompile.optimize.refine import SwapModel
from recompile.quantize.made import making_bytes
from recompile.stream import LayeredModel

SAMPLES = 2  # Fisher samples a row, beside the gradient


@dataclass(frozen=True)
class Goal:
    """What is kept of the reference's distributions p over some tokens.

    Through a linear head W, with hidden states h of another model under the same head,

        KL(p || q) = sum of p log p - (W'p) . h + log sum exp(W h),

    so nothing the size of the vocabulary has to be kept or made twice.

    normed: [tokens, hidden] the reference's post-norm states
    mean: [tokens, hidden] W'p; negative_entropy: float32 [tokens]; both None for a head that is no linear map
    """

    normed: Tensor
    mean: Tensor | None = None
    negative_entropy: Tensor | None = None

    @staticmethod
    def of(model: LayeredModel, normed: Tensor) -> Goal:
        """normed: [tokens, hidden]; the head of the reference must be loaded."""
        if not model.head_is_linear(normed[None, :2]):
            return Goal(normed)
        means, entropies = [], []
        for chunk in chunks_of(len(normed)):
            output = HeadOutput.of(model, normed[chunk], linear=True)
            assert output.mean is not None, "asked above"
            means.append(output.mean)
            expected = torch.linalg.vecdot(output.mean.float(), normed[chunk].float())
            entropies.append(expected - output.log_total)
        return Goal(normed, torch.cat(means), torch.cat(entropies))

    def under_head(self, same: bool) -> Goal:
        """What of it holds for a model whose head is the reference's, or another."""
        return self if same else Goal(self.normed)

    def kl(self, chunk: slice, output: HeadOutput, reference: LayeredModel) -> Tensor:
        """KL of the tokens of a chunk to what another model makes of them, float32 [tokens]."""
        if self.mean is None or self.negative_entropy is None:
            return kl_divergence(reference.logits(self.normed[None, chunk])[0], output.logits.detach())
        expected = torch.linalg.vecdot(self.mean[chunk].float(), output.states.float())
        return (self.negative_entropy[chunk] - expected + output.log_total).clamp(min=0)

    def gradient(self, chunk: slice, output: HeadOutput, reference: LayeredModel) -> Tensor:
        """The gradient q - p of that KL with respect to the other model's states, [tokens, hidden]."""
        if self.mean is None or output.mean is None:
            goal = reference.logits(self.normed[None, chunk])[0]
            return output.pull_back(output.p - goal.float().softmax(-1))
        return output.mean - self.mean[chunk]


def same_head(reference: LayeredModel, model: LayeredModel) -> bool:
    """Whether two heads, both loaded, hold the same weights."""
    own, its = (each.head.get_parameter("weight") for each in (reference, model))
    return own.shape == its.shape and torch.equal(own, its)


@dataclass
class KlCotangents(FisherCotangents):
    """The gradient of KL(reference || mix) first, then Fisher samples of the mix.

    goals: one a row; reference: its model with its head loaded
    """

    reference: LayeredModel | None = None
    goals: Sequence[Goal] = ()
    kl_rows: dict[int, float] = field(default_factory=dict)
    _gradients: dict[int, list[Tensor]] = field(default_factory=dict)
    _same: bool | None = None  # known with the first row, when both heads are loaded

    def output(self, row: int, chunk: slice, states: Tensor, linear: bool) -> HeadOutput:
        assert self.reference is not None, "given by MixOracle"
        if self._same is None:
            self._same = same_head(self.reference, self.model)
        found = super().output(row, chunk, states, linear)
        goal = self.goals[row].under_head(self._same)
        share = float(goal.kl(chunk, found, self.reference).double().sum()) / len(goal.normed)
        self.kl_rows[row] = self.kl_rows.get(row, 0.0) + share
        self._gradients.setdefault(row, []).append(goal.gradient(chunk, found, self.reference))
        return found

    def at_norm(self, rows: slice, normed: Tensor) -> tuple[Tensor, Mapping[tuple[str, str], Tensor]]:
        pieces, products = super().at_norm(rows, normed)
        gradients = torch.stack([torch.cat(self._gradients.pop(row)) for row in range(rows.start, rows.stop)])
        # a swapped head is measured by its Fisher samples alone; its gradient sample is left at zero
        padded = {s: torch.cat([torch.zeros(len(v), 1), v], 1) for s, v in products.items()}
        return torch.cat([gradients[None], pieces]), padded


@dataclass(frozen=True)
class OracleProgress:
    text: str
    done: int
    total: int


@dataclass
class MixOracle:
    """`recompile.optimize.refine.Oracle` over real models.

    pool: int64 [rows, tokens] for linearising, taken in turns of `rows_per_step`; accept: [rows, tokens] for measuring
    progress: called after every layer of a linearisation
    """

    header: ProfileHeader
    checkpoints: Mapping[str, Checkpoint]  # by candidate label
    reference: WeightSource
    pool: Tensor
    accept: Tensor
    rows_per_step: int = 12
    samples: int = SAMPLES
    seed: int = 0
    dtype: torch.dtype | None = None
    device: str = "cpu"
    max_memory_bytes: int | None = None
    progress: Callable[[OracleProgress], None] = lambda event: None

    def __post_init__(self) -> None:
        self._reference = LayeredModel.of(self.reference, dtype=self.dtype, device=self.device)
        self._model = LayeredModel.of(self.checkpoints[self.header.base], dtype=self.dtype, device=self.device)
        self._accept_goals: list[Goal] | None = None

    @torch.no_grad()
    def normed(self, model: LayeredModel, source: WeightSource, ids: Tensor) -> Tensor:
        """Post-norm states [rows, tokens, hidden] of a model with the weights of `source`."""
        batch = max(1, BATCH_TOKENS // ids.shape[1])
        states = list(model.embed(ids, batch, source))
        for index in range(model.depth):
            with model.layer(index, source):
                for number, state in enumerate(states):
                    states[number] = model.run_layer(index, state)
        with model.norm_loaded(source) as norm:
            return torch.cat([norm(state) for state in states])

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        """See the protocol. Rows of the pool are taken in turn; after the last the first come again, with new draws."""
        count = min(self.rows_per_step, len(self.pool))
        first = (step * count) % len(self.pool)
        ids = torch.cat([self.pool, self.pool])[first : first + count]
        mix = mix_of(self.header, self.checkpoints, choice)
        goals = self.goals(ids)
        plan = plan_pass(
            self._model,
            self.header.groups,
            len(self.checkpoints),
            rows=ids.shape[0],
            tokens=ids.shape[1],
            samples=self.samples + 1,
            cap_bytes=self.max_memory_bytes,
            making=making_bytes(self.checkpoints.values()),
        )
        runner = AdjointPass(
            self._model, mix, self.checkpoints, self.header.groups, plan, lambda group, source: choice[group] == source
        )
        found: list[SwapProducts] = []
        with torch.no_grad(), self._reference.head_loaded():
            cotangents = KlCotangents(
                self._model,
                self.checkpoints,
                self.header.groups,
                self.samples,
                self.seed,
                sweep=step,
                gradients=1,
                reference=self._reference,
                goals=goals,
            )
            for event in runner.run(ids, cotangents):
                if isinstance(event, LayerBackward):
                    found += event.swaps
                    if event.layer is not None:
                        self._note(
                            f"step {step + 1}, layer {event.layer}", 2 * event.depth - event.layer, 2 * event.depth
                        )
                elif isinstance(event, LayerForward):
                    self._note(f"step {step + 1}, forward", event.layer, 2 * event.depth)
        tokens = ids.shape[1]
        slopes = {(s.group, s.source): s.products[:, 0].double() / tokens for s in found}  # [rows] each
        linear = {swap: float(rows.mean()) for swap, rows in slopes.items()}
        errors = {swap: float(rows.std()) / len(rows) ** 0.5 for swap, rows in slopes.items()}
        draws = [SwapProducts(s.group, s.source, s.products[:, 1:], s.squares, s.tokens) for s in found]
        away = [s for s in draws if choice[s.group] != s.source]
        sketch = collect(away, self.samples, keep_pairs=False)
        curvature = estimate(sketch, tokens).mean(1).tolist()
        quadratic = dict.fromkeys(linear, 0.0) | dict(zip(sketch.swaps, curvature, strict=True))
        return SwapModel(sum(cotangents.kl_rows.values()) / len(cotangents.kl_rows), linear, quadratic, errors)

    def _note(self, text: str, done: int, total: int) -> None:
        self.progress(OracleProgress(text, done, total))

    @torch.no_grad()
    def goals(self, ids: Tensor) -> list[Goal]:
        """What the reference makes of rows [rows, tokens]."""
        wanted = self.normed(self._reference, self.reference, ids)
        with self._reference.head_loaded():
            return [Goal.of(self._reference, states) for states in wanted]

    @torch.no_grad()
    def measure(self, choice: Mapping[str, str]) -> list[float]:
        """KL(reference || mix) of every accepting row, nats per token."""
        if self._accept_goals is None:
            self._accept_goals = self.goals(self.accept)
        mix = mix_of(self.header, self.checkpoints, choice)
        return list(self.kl_rows(mix, self.accept, self._accept_goals))

    @torch.no_grad()
    def kl_rows(self, source: WeightSource, ids: Tensor, goals: Sequence[Goal]) -> Iterator[float]:
        """KL to the model with the weights of `source`, a row at a time."""
        found = self.normed(self._model, source, ids)
        with self._reference.head_loaded(), self._model.head_loaded(source):
            same, linear = same_head(self._reference, self._model), self._model.head_is_linear(found[:1, :2])
            for goal, states in zip(goals, found, strict=True):
                there = goal.under_head(same)
                total = 0.0
                for chunk in chunks_of(len(states)):
                    output = HeadOutput.of(self._model, states[chunk], linear, mean=False)
                    total += float(there.kl(chunk, output, self._reference).double().sum())
                yield total / len(states)
