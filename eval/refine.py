"""What `recompile.optimize.refine` asks of real models: swap costs at a mix, and the KL of a mix, both streamed.

At a mix with logits z_q and distribution q, against the reference's p, the gradient of KL(p || q) with respect to z_q
is q - p, and its second derivative is F_q = diag(q) - q q'. So one streamed backward pass (`eval.adjoint`) with the
cotangent q - p and some Fisher samples of q gives the first- and second-order term of every swap at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eval.adjoint import AdjointPass, LayerBackward, LayerForward, SwapProducts, plan_pass
from eval.diff import BATCH_TOKENS, LOGIT_CHUNK_TOKENS
from eval.fisher import FisherCotangents
from eval.guard import mix_of
from eval.metrics import kl_divergence
from eval.sketch import collect, estimate
from recompile.checkpoint import Checkpoint, WeightSource
from recompile.costs import ProfileHeader
from recompile.optimize.refine import SwapModel
from recompile.stream import LayeredModel

SAMPLES = 2  # Fisher samples a row, beside the gradient


@dataclass
class KlCotangents(FisherCotangents):
    """The gradient of KL(reference || mix) first, then Fisher samples of the mix.

    wanted: [rows, tokens, hidden] post-norm states of the reference; reference: its model with its head loaded
    """

    reference: LayeredModel | None = None
    wanted: Tensor | None = None
    kl_rows: list[float] = field(default_factory=list)

    def at_norm(self, rows: slice, normed: Tensor) -> tuple[Tensor, Mapping[tuple[str, str], Tensor]]:
        assert self.reference is not None, "given by MixOracle"
        assert self.wanted is not None, "given by MixOracle"
        pieces, products = super().at_norm(rows, normed)
        gradients = []
        for row, states in enumerate(normed):
            parts, total = [], 0.0
            for start in range(0, len(states), LOGIT_CHUNK_TOKENS):
                chunk = slice(start, start + LOGIT_CHUNK_TOKENS)
                goal = self.reference.logits(self.wanted[rows.start + row, chunk].to(states.device)[None])[0]
                with torch.enable_grad():
                    leaf = states[chunk].detach().requires_grad_(True)
                    logits = self.model.logits(leaf[None])[0]
                total += float(kl_divergence(goal, logits.detach()).double().sum())
                change = logits.detach().float().softmax(-1) - goal.float().softmax(-1)
                parts.append(torch.autograd.grad(logits, leaf, change.to(logits.dtype))[0])
            self.kl_rows.append(total / len(states))
            gradients.append(torch.cat(parts))
        with_gradient = torch.cat([torch.stack(gradients)[None], pieces])
        # a swapped head is measured by its Fisher samples alone; its gradient sample is left at zero
        padded = {s: torch.cat([torch.zeros(len(v), 1), v], 1) for s, v in products.items()}
        return with_gradient, padded


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
        self._wanted_accept: Tensor | None = None

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
        wanted = self.normed(self._reference, self.reference, ids)
        plan = plan_pass(
            self._model,
            self.header.groups,
            len(self.checkpoints),
            rows=ids.shape[0],
            tokens=ids.shape[1],
            samples=self.samples + 1,
            cap_bytes=self.max_memory_bytes,
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
                wanted=wanted,
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
        return SwapModel(sum(cotangents.kl_rows) / len(cotangents.kl_rows), linear, quadratic, errors)

    def _note(self, text: str, done: int, total: int) -> None:
        self.progress(OracleProgress(text, done, total))

    @torch.no_grad()
    def measure(self, choice: Mapping[str, str]) -> list[float]:
        """KL(reference || mix) of every accepting row, nats per token."""
        if self._wanted_accept is None:
            self._wanted_accept = self.normed(self._reference, self.reference, self.accept)
        return list(self.kl_rows(mix_of(self.header, self.checkpoints, choice), self.accept, self._wanted_accept))

    @torch.no_grad()
    def kl_rows(self, source: WeightSource, ids: Tensor, wanted: Tensor) -> Iterator[float]:
        found = self.normed(self._model, source, ids)
        with self._reference.head_loaded(), self._model.head_loaded(source):
            for goal, states in zip(wanted, found, strict=True):
                total = 0.0
                for start in range(0, len(states), LOGIT_CHUNK_TOKENS):
                    chunk = slice(start, start + LOGIT_CHUNK_TOKENS)
                    logits = self._reference.logits(goal[None, chunk])[0]
                    total += float(kl_divergence(logits, self._model.logits(states[None, chunk])[0]).double().sum())
                yield total / len(states)
