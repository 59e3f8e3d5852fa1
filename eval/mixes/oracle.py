"""What `recompile.optimize.refine` asks of real models: swap costs at a mix, and the KL of a mix, both streamed.

At a mix with logits z_q and distribution q, against the reference's p, the gradient of KL(p || q) with respect to z_q
is q - p, and its second derivative is F_q = diag(q) - q q'. So one streamed backward pass (`eval.passes.adjoint`) with
the cotangent q - p and some Fisher samples of q gives the first- and second-order term of every candidate's error at
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from eval.mixes.meter import Goal, MixMeter, same_head
from eval.passes.adjoint import AdjointPass, LayerBackward, LayerForward, PassPlan, SwapProducts, plan_pass
from eval.passes.fisher import FisherCotangents, HeadOutput
from eval.profile.sketch import collect, estimate
from recompile.checkpoint.checkpoint import WeightSource
from recompile.io.memory import keep_heap_small
from recompile.model.counted import weight_of
from recompile.model.devices import batch_rows
from recompile.model.finite import check_finite
from recompile.model.stream import LayeredModel
from recompile.optimize.refine import SwapModel
from recompile.quantize.lazy_variant import making_bytes

SAMPLES = 1  # Fisher samples a row, beside the gradient: a search averages them over its steps
SAMPLED_FIRST, SAMPLED_EVERY = 6, 3  # linearisations that draw them: the first ones, then one in so many
CURVES_KEPT = 0.9  # weight of the second-order terms so far when those of another linearisation are averaged in


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
        self._gradients.setdefault(row, []).append(goal.gradient(chunk, found, self.reference, self.model))
        return found

    def at_norm(self, rows: slice, normed: Tensor) -> tuple[Tensor, Mapping[tuple[str, str], Tensor]]:
        pieces, products = super().at_norm(rows, normed)
        gradients = [
            self.spread(row, weight_of(self.counted, row) * torch.cat(self._gradients.pop(row))[None], normed.shape[1])
            for row in range(rows.start, rows.stop)
        ]
        return torch.cat([torch.stack(gradients, 1), pieces]), products

    def head_gradients(self, row: int, chunk: slice, p: Tensor, change: Tensor) -> Sequence[Tensor]:
        assert self.reference is not None, "given by MixOracle"
        goal = self.reference.logits(self.goals[row].normed[None, chunk])[0].float().softmax(-1)
        return [weight_of(self.counted, row) * torch.linalg.vecdot(p - goal, change).sum()]


@dataclass(frozen=True)
class OracleProgress:
    """So much of a measurement of whole mixes is done."""

    text: str
    done: int
    total: int


def correlations(found: Sequence[SwapProducts]) -> dict[tuple[str, str], float]:
    """How alike the errors of two candidates of one group are, by their labels: the mean over groups of the correlation
    of their samples. A pair of labels stands for all its groups, for the samples of one group are few."""
    by_group: dict[str, dict[str, Tensor]] = {}
    for swap in found:
        samples = swap.products.flatten().double()
        length = samples.norm()
        if length > 0:
            by_group.setdefault(swap.group, {})[swap.source] = samples / length
    pairs: dict[tuple[str, str], list[float]] = {}
    for samples_of in by_group.values():
        stacked = torch.stack(list(samples_of.values()))
        for first, row in zip(samples_of, (stacked @ stacked.T).tolist(), strict=True):
            for second, value in zip(samples_of, row, strict=True):
                pairs.setdefault((first, second), []).append(value)
    return {pair: math.fsum(values) / len(values) for pair, values in pairs.items()}


@dataclass
class Curves:
    """Second-order terms, averaged over the linearisations that drew samples.

    own: half the quadratic form of a candidate's error; alike: correlations of two candidates of one group, by labels
    """

    own: dict[tuple[str, str], float] = field(default_factory=dict)
    alike: dict[tuple[str, str], float] = field(default_factory=dict)
    asked: int = 0  # linearisations so far
    _weight: float = 0.0

    @property
    def are_due(self) -> bool:
        return self.asked < SAMPLED_FIRST or self.asked % SAMPLED_EVERY == 0

    def add(self, own: Mapping[tuple[str, str], float], alike: Mapping[tuple[str, str], float]) -> None:
        before = CURVES_KEPT * self._weight
        self._weight = before + 1
        for averages, values in ((self.own, own), (self.alike, alike)):
            for key, value in values.items():
                averages[key] = (before * averages.get(key, 0.0) + value) / self._weight

    def recall(self, model: SwapModel) -> None:
        """Stand where they stood after a linearisation that gave this model."""
        if self.are_due:
            self._weight = CURVES_KEPT * self._weight + 1
        self.asked += 1
        self.own, self.alike = dict(model.own), dict(model.alike)

    def cross(self, choice: Mapping[str, str]) -> dict[tuple[str, str], float]:
        """The product of every candidate's error with that of what its group has."""
        found = {}
        for (group, source), value in self.own.items():
            other = self.own[group, choice[group]]
            alike = self.alike.get((source, choice[group]), 0.0)
            found[group, source] = (
                2 * value if source == choice[group] else 2 * alike * math.sqrt(max(0.0, value * other))
            )
        return found


@dataclass
class MixOracle(MixMeter):
    """`recompile.optimize.refine.Oracle` over real models: measures as a MixMeter, and linearises.

    pool: int64 [rows, tokens] for linearising, taken in turns of `rows_per_step`, in the quickest type that serves
    where the options name none; pool_counted: bool, the places of them that count, None: all; progress: called after
    every layer of a linearisation
    """

    pool: Tensor = field(kw_only=True)
    pool_counted: Tensor | None = field(default=None, kw_only=True)
    rows_per_step: int = field(default=12, kw_only=True)
    samples: int = field(default=SAMPLES, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    max_memory_bytes: int | None = field(default=None, kw_only=True)
    progress: Callable[[OracleProgress], None] = field(default=lambda event: None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_memory_bytes is not None:
            keep_heap_small()  # before there is much to keep
        self._curves = Curves()

    @cached_property
    def _plan(self) -> PassPlan:
        """Of a linearisation, decided before anything is held."""
        rows, tokens = self.pool.shape
        return plan_pass(
            self._quick[1],
            self.header.groups,
            len(self.checkpoints),
            rows=min(self.rows_per_step, rows),
            tokens=tokens,
            samples=self.samples + 1,
            cap_bytes=self.max_memory_bytes,
            making=making_bytes(self.checkpoints.values()),
            weight_gradients=True,
        )

    def _room(self) -> int:
        """Bytes beside a linearisation."""
        room = super()._room()
        return room if self.max_memory_bytes is None else min(room, self.max_memory_bytes - self._plan.total)

    @cached_property
    def _held_checkpoints(self) -> dict[str, WeightSource]:
        return {label: self._held(source) for label, source in self.checkpoints.items()}

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        """See the protocol. Rows of the pool are taken in turn; after the last the first come again, with new draws.

        Only some linearisations draw Fisher samples (SAMPLED_FIRST, SAMPLED_EVERY): what they say of single groups
        hardly changes with the mix, while the slope does with every group that moves."""
        ids, counted = self._rows_of(step)
        samples = self.samples if self._curves.are_due else 0
        reference, model = self._quick
        mix, origin = self.source(choice), self._held_reference
        goals = self.goals(reference, ids, counted)
        runner = AdjointPass(model, mix, self._held_checkpoints, self.header.groups, self._plan, origin=origin)
        found: list[SwapProducts] = []
        with torch.no_grad(), reference.head_loaded(origin):
            cotangents = KlCotangents(
                model,
                self._held_checkpoints,
                self.header.groups,
                samples,
                self.seed,
                sweep=step,
                gradients=1,
                origin=origin,
                reference=reference,
                goals=goals,
                counted=counted,
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
        slope = {(s.group, s.source): float(s.products[:, 0].double().sum()) / ids.numel() for s in found}
        if samples:
            draws = [SwapProducts(s.group, s.source, s.products[:, 1:], s.squares, s.tokens) for s in found]
            sketch = collect(draws, samples, keep_pairs=False)
            values = estimate(sketch, ids.shape[1]).mean(1).tolist()
            self._curves.add(dict(zip(sketch.swaps, values, strict=True)), correlations(draws))
        self._curves.asked += 1
        kl = sum(cotangents.kl_rows.values()) / len(cotangents.kl_rows)
        check_finite(torch.tensor([kl, *slope.values()], dtype=torch.float64), f"step {step + 1}: slopes of swaps")
        curves = self._curves
        return SwapModel(kl, slope, dict(curves.own), curves.cross(choice), dict(curves.alike))

    def _rows_of(self, step: int) -> tuple[Tensor, Tensor | None]:
        """The rows of a step, and what counts of them."""
        count = min(self.rows_per_step, len(self.pool))
        first = (step * count) % len(self.pool)
        rows = torch.arange(first, first + count) % len(self.pool)
        return self.pool[rows], None if self.pool_counted is None else self.pool_counted[rows]

    @torch.no_grad()
    def changes(self, choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int) -> list[list[float]]:
        """See the protocol. A swap is run from its layer on; as many together as a linearisation holds states."""
        ids, counted = self._rows_of(step)
        reference, model = self._quick
        goals = self.goals(reference, ids, counted)
        layers = {group.name: group.layer for group in self.header.groups}
        places = [{layers[name] for name in swap} for swap in swaps]
        # those of neighbouring layers together; the embedding and the head first, for they run from the start
        order = sorted(range(len(swaps)), key=lambda n: min(-1 if at is None else at for at in places[n]))
        mix, found = self.source(choice), {}
        for start in range(0, len(order), model.depth):
            some = order[start : start + model.depth]
            others = [self.source({**choice, **swaps[number]}) for number in some]
            states, branches = self._branches(mix, others, [places[number] for number in some], ids)
            under_one = [n for n, number in enumerate(some) if None not in places[number]]
            without, *kls = self._kls([states, *(branches[n] for n in under_one)], mix, reference, model, goals)
            rows = dict(zip(under_one, kls, strict=True))
            for n, number in enumerate(some):
                if n not in rows:
                    (rows[n],) = self._kls([branches[n]], others[n], reference, model, goals)
                found[number] = [there - here for there, here in zip(rows[n], without, strict=True)]
        return [found[number] for number in range(len(swaps))]

    def _branches(
        self,
        mix: WeightSource,
        others: Sequence[WeightSource],
        places: Sequence[Set[int | None]],
        ids: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Post-norm states [rows, tokens, hidden] of a mix, and of others that differ from it in few layers (None:
        embedding or head); up to the first of those each is run as the mix is."""
        model = self._quick[1]
        batch = batch_rows(model.device, ids.shape[1])

        def run(index: int, states: Tensor) -> Tensor:
            pieces = states.split(batch)
            return torch.cat([model.run_layer(index, piece, number * batch) for number, piece in enumerate(pieces)])

        def embedded(source: WeightSource) -> Tensor:
            return torch.cat(list(model.embed(ids, batch, source)))

        states = embedded(mix)
        apart = {n: embedded(other) for n, other in enumerate(others) if None in places[n]}
        for index in range(model.depth):
            after = {}
            for number, other in enumerate(others):
                if index in places[number]:
                    with model.layer(index, other):
                        after[number] = run(index, apart.get(number, states))
            with model.layer(index, mix):
                after |= {number: run(index, state) for number, state in apart.items() if number not in after}
                states = run(index, states)
            apart = after
            self._note(f"swaps, layer {index}", index, model.depth)
        with model.norm_loaded(mix) as norm:
            return norm(states), [norm(apart[number]) for number in range(len(others))]

    def recall(self, model: SwapModel) -> None:
        """Go on from what an interrupted search was told last."""
        self._curves.recall(model)

    def _note(self, text: str, done: int, total: int) -> None:
        self.progress(OracleProgress(text, done, total))
