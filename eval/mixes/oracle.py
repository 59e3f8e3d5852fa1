"""What `recompile.optimize.refine` asks of real models: swap costs at a mix, and the KL of a mix, both streamed.

At a mix with logits z_q and distribution q, against the reference's p, the gradient of KL(p || q) with respect to z_q
is q - p, and its second derivative is F_q = diag(q) - q q'. So one streamed backward pass (`eval.adjoint`) with the
cotangent q - p and some Fisher samples of q gives the first- and second-order term of every candidate's error at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from eval.diff import BATCH_TOKENS
from eval.metrics import kl_divergence
from eval.passes.adjoint import AdjointPass, LayerBackward, LayerForward, PassPlan, SwapProducts, plan_pass
from eval.passes.fisher import FisherCotangents, HeadOutput, chunks_of
from eval.profile.sketch import collect, estimate
from recompile.checkpoint.checkpoint import Checkpoint, WeightSource
from recompile.costs import ProfileHeader
from recompile.errors import NotFiniteError
from recompile.io.memory import keep_heap_small
from recompile.merge.overlay import Overlay
from recompile.merge.weight_cache import WeightStore, room_for_weights
from recompile.model.finite import WIDER, check_finite, is_finite, name_of
from recompile.model.stream import LayeredModel, default_dtype, sketch_dtype
from recompile.optimize.refine import SwapModel
from recompile.quantize.lazy_variant import making_bytes

SAMPLES = 1  # Fisher samples a row, beside the gradient: a search averages them over its steps
SAMPLED_FIRST, SAMPLED_EVERY = 6, 3  # linearisations that draw them: the first ones, then one in so many
CURVES_KEPT = 0.9  # weight of the second-order terms so far when those of another linearisation are averaged in


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
        gradients = torch.stack([torch.cat(self._gradients.pop(row)) for row in range(rows.start, rows.stop)])
        return torch.cat([gradients[None], pieces]), products

    def head_gradients(self, row: int, chunk: slice, p: Tensor, change: Tensor) -> Sequence[Tensor]:
        assert self.reference is not None, "given by MixOracle"
        goal = self.reference.logits(self.goals[row].normed[None, chunk])[0].float().softmax(-1)
        return [torch.linalg.vecdot(p - goal, change).sum()]


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
    rough_above_nats: float = math.inf  # where the first mix has more KL, all are measured in the quickest type too
    dtype: torch.dtype | None = None  # None: the device's default to measure in, the quickest that serves to linearise
    device: str = "cpu"
    max_memory_bytes: int | None = None
    holds: bool = True  # whether decoded weights may be held where there is room
    rough: bool | None = None  # whether mixes are measured in the quickest type; None: the first one will say
    progress: Callable[[OracleProgress], None] = lambda event: None

    def __post_init__(self) -> None:
        if self.max_memory_bytes is not None:
            keep_heap_small()  # before there is much to keep
        self._accepting: tuple[LayeredModel, LayeredModel, list[Goal]] | None = None
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

    @cached_property
    def _store(self) -> WeightStore:
        """What is decoded, as far as there is room beside a linearisation."""
        room = room_for_weights(self.device)
        if not self.holds:
            room = 0
        elif self.max_memory_bytes is not None:
            room = min(room, self.max_memory_bytes - self._plan.total)
        return WeightStore(room)

    @cached_property
    def _held_reference(self) -> WeightSource:
        return self._store.over(self.reference)

    @cached_property
    def _held_checkpoints(self) -> dict[str, WeightSource]:
        return {label: self._store.over(source) for label, source in self.checkpoints.items()}

    def _mix(self, choice: Mapping[str, str]) -> WeightSource:
        return self._store.over(Overlay.of_choice(self.header, self.checkpoints, choice))

    @cached_property
    def _sharp(self) -> tuple[LayeredModel, LayeredModel]:
        """The models, of the reference and of mixes, to measure with."""
        return self._models(self.dtype or default_dtype(self.device))

    @cached_property
    def _quick(self) -> tuple[LayeredModel, LayeredModel]:
        """Those to linearise with."""
        dtype = sketch_dtype(self.device)
        return self._sharp if self.dtype or dtype == default_dtype(self.device) else self._models(dtype)

    def _models(self, dtype: torch.dtype) -> tuple[LayeredModel, LayeredModel]:
        sources = (self.reference, self.checkpoints[self.header.base])
        reference, model = (LayeredModel.of(source, dtype=dtype, device=self.device) for source in sources)
        return reference, model

    @torch.no_grad()
    def normed(self, model: LayeredModel, source: WeightSource, ids: Tensor) -> Tensor:
        """Post-norm states [rows, tokens, hidden] of a model with the weights of `source`."""
        batch = max(1, BATCH_TOKENS // ids.shape[1])
        states = list(model.embed(ids, batch, source))
        for index in range(model.depth):
            with model.layer(index, source):
                for number, state in enumerate(states):
                    states[number] = model.run_layer(index, state, number * batch)
        with model.norm_loaded(source) as norm:
            return torch.cat([norm(state) for state in states])

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        """See the protocol. Rows of the pool are taken in turn; after the last the first come again, with new draws.

        Only some linearisations draw Fisher samples (SAMPLED_FIRST, SAMPLED_EVERY): what they say of single groups
        hardly changes with the mix, while the slope does with every group that moves."""
        ids = self._rows_of(step)
        samples = self.samples if self._curves.are_due else 0
        reference, model = self._quick
        mix, origin = self._mix(choice), self._held_reference
        goals = self.goals(reference, ids)
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

    def _rows_of(self, step: int) -> Tensor:
        count = min(self.rows_per_step, len(self.pool))
        first = (step * count) % len(self.pool)
        return torch.cat([self.pool, self.pool])[first : first + count]

    @torch.no_grad()
    def changes(self, choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int) -> list[list[float]]:
        """See the protocol. A swap is run from its layer on; as many together as a linearisation holds states."""
        ids = self._rows_of(step)
        reference, model = self._quick
        goals = self.goals(reference, ids)
        layers = {group.name: group.layer for group in self.header.groups}
        places = [{layers[name] for name in swap} for swap in swaps]
        # those of neighbouring layers together; the embedding and the head first, for they run from the start
        order = sorted(range(len(swaps)), key=lambda n: min(-1 if at is None else at for at in places[n]))
        mix, found = self._mix(choice), {}
        for start in range(0, len(order), model.depth):
            some = order[start : start + model.depth]
            others = [self._mix({**choice, **swaps[number]}) for number in some]
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
        batch = max(1, BATCH_TOKENS // ids.shape[1])

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

    @torch.no_grad()
    def goals(self, model: LayeredModel, ids: Tensor) -> list[Goal]:
        """What the reference makes of rows [rows, tokens]; model: of the reference."""
        wanted = self.normed(model, self._held_reference, ids)
        with model.head_loaded(self._held_reference):
            return [Goal.of(model, states) for states in wanted]

    @torch.no_grad()
    def measure(self, choice: Mapping[str, str]) -> list[float]:
        """KL(reference || mix) of every accepting row, nats per token. All mixes are measured in the same type, which
        the KL of the first one decides."""
        mix = self._mix(choice)
        if self.rough is None and self.rough_above_nats < math.inf:
            found = self.kl_rows(mix, *self._measured_in(self._quick))
            self.rough = math.fsum(found) > self.rough_above_nats * len(found)
            if self.rough or self._quick is self._sharp:
                return found
            self._accepting = None
        return self.kl_rows(mix, *self._measured_in(self._quick if self.rough else self._sharp))

    def _measured_in(self, models: tuple[LayeredModel, LayeredModel]) -> tuple[LayeredModel, LayeredModel, list[Goal]]:
        """The models, with what the reference of this type makes of the accepting rows."""
        if self._accepting is None:
            self._accepting = (*models, self.goals(models[0], self.accept))
        return self._accepting

    @torch.no_grad()
    def kl_rows(
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
                for goal, states in zip(goals, normed, strict=True):
                    there = goal.under_head(same)
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
