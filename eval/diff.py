"""Two weight sources and one set of rows -> how far the candidate is from the reference.

Both models are run side by side, layer by layer: at any time one layer of one model is in memory, and the hidden
states of both. Logits exist a chunk of tokens at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor

from eval.diff_memory import LOGIT_CHUNK_TOKENS, kept_states, plan_diff, put_states
from eval.metrics import (
    METRICS_VERSION,
    ConfidenceBin,
    DeltaP,
    Drift,
    Histogram,
    Mean,
    Quantiles,
    Slice,
    SureFlips,
    TokenMetrics,
    delta_p,
    drift,
    kl_by_confidence,
    kl_divergence,
    kl_histogram,
    mean_drift,
    mean_over_rows,
    quantiles,
    slices_by_origin,
    slices_by_position,
    sure_flips,
    token_metrics,
)
from eval.routing import ExpertChoices, LayerRouting, compare_choices
from recompile.checkpoint.checkpoint import WeightSource
from recompile.errors import MismatchError, NotFiniteError, OutputError, RecompileError, UnsupportedError
from recompile.events import OnEvent, Progress, Said, ignore
from recompile.formats.cache_types import CacheFormat
from recompile.io.files import write_atomically
from recompile.merge.overlay import Overlay
from recompile.merge.weight_cache import WeightStore, have_shared_sources, room_for_weights
from recompile.model.activations import QuantizedInputs, UnseenInputs, unseen_inputs
from recompile.model.devices import batch_rows
from recompile.model.finite import WIDER, check_finite, name_of
from recompile.model.kv_cache import SimulatedCache, attends
from recompile.model.stream import LayeredModel, check_same_skeleton
from recompile.model.tokens import Rows

LARGEST_NLL = 700.0  # nats a token; beyond, perplexity overflows a double
FLOOR_TOKENS = 128  # of the first row, run once more on its own to see the arithmetic's own noise
WIDTH_STEP = 128  # padded rows are cut to a multiple of this


@dataclass(frozen=True)
class LayerDrift:
    """One finished stage; yielded while a comparison runs."""

    name: str
    index: int
    total: int
    drift: Drift


@dataclass(frozen=True)
class RowsCompared:
    """Logits of so many rows are compared; yielded after the last stage."""

    done: int
    total: int


Event: TypeAlias = "Said | LayerDrift | RowsCompared | DiffReport"


@dataclass(frozen=True)
class ModelScore:
    """One model on the rows' own next tokens."""

    perplexity: float
    perplexity_std_error: float | None
    nll: Mean  # nats per token
    label_in_top_k: tuple[float, ...]  # K = 1, 2, ...


@dataclass(frozen=True)
class CacheUsed:
    """The quantized cache that a candidate attended through.

    layers: that keep keys and values, of all `of_layers`; what others keep (Mamba, linear attention) was left as it is
    bytes_per_token: of context, over all these layers; windows: the same by the window of the layers that hold it,
    beyond which it does not grow (none: they look back at everything)
    """

    name: str  # as -cq has it
    engine: str
    flags: str  # of the engine
    key_bits: float  # stored bits a value, scales included
    value_bits: float
    layers: int
    of_layers: int
    bytes_per_token: float
    windows: tuple[tuple[int | None, float], ...] = ()

    @staticmethod
    def of(stored_as: CacheFormat, seen: SimulatedCache, of_layers: int) -> CacheUsed:
        by_window = seen.bytes_per_token()
        return CacheUsed(
            stored_as.name,
            stored_as.engine,
            stored_as.flags,
            stored_as.key_bits,
            stored_as.value_bits,
            seen.layers,
            of_layers,
            sum(by_window.values()),
            tuple(sorted(by_window.items(), key=lambda entry: entry[0] or 0)),
        )

    def bytes_at(self, context: int) -> int:
        """What the cache takes once so many tokens are in it."""
        return math.ceil(sum(size * min(context, window or context) for window, size in self.windows))


@dataclass(frozen=True)
class DiffReport:
    """What `model_diff` measured. A is the candidate, B the reference."""

    candidate: str
    reference: str
    rows: int
    row_tokens: int
    tokens: int  # compared
    unlabelled_tokens: int  # the last of each row: it has a KL and no next token, so that perplexity leaves it out
    dtype: str
    device: str
    vocab: int
    kl: Mean  # KL(reference || candidate), nats per token
    kl_reverse: Mean  # KL(candidate || reference)
    kl_quantiles: Quantiles
    kl_by_confidence: tuple[ConfidenceBin, ...]
    kl_rows: tuple[float, ...]  # row means, for paired comparisons
    noise_floor: float  # KL of the reference against itself, run in another shape
    identical: bool  # every logit equal to the last bit
    score_candidate: ModelScore
    score_reference: ModelScore
    top_k_agreement: tuple[Mean, ...]  # same K tokens in the same order, K = 1, 2, ...
    layers: tuple[LayerDrift, ...]
    rows_sha256: str
    rows_source: str
    versions: dict[str, str]
    metrics_version: int = METRICS_VERSION
    kl_histogram: Histogram | None = None  # tokens by KL(reference || candidate)
    routing: tuple[LayerRouting, ...] = ()  # of the layers with experts, in order
    delta_p: DeltaP | None = None  # change of the probability of the text's next token
    sure_flips: SureFlips | None = None  # other top tokens where the reference was sure
    by_origin: tuple[Slice, ...] = ()  # by kind of row, where there are several
    by_position: tuple[Slice, ...] = ()  # by length of context, where rows are long
    rows_role: str = ""  # which part of the text or trace the rows are: "report", "all"; "" where that is not known
    positions: str = "all"  # of a trace: "response" where only predictions of what the model wrote are counted
    cache: CacheUsed | None = None  # the candidate's keys and values, where they are quantized
    unseen_inputs: tuple[UnseenInputs, ...] = ()  # with inputs quantized: modules whose inputs were not, and why

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DiffOptions:
    """How models are compared; rows and recipes are arguments of their own."""

    batch: int | None = None  # rows a batch; None = as many as a layer runs well
    top_k: int = 5
    keep_reference: int = 0  # stages (embedding first) after which the candidate's state is set to the reference's
    dtype: torch.dtype | None = None
    device: str = "cpu"
    vocab: int | None = None  # true vocabulary where the model pads it
    quantized_inputs: frozenset[int] = frozenset()  # candidates (Overlays) run with their inputs quantized as they say
    caches: tuple[CacheFormat | None, ...] = ()  # a candidate: what it keeps its keys and values in; None: as they are
    origins: tuple[str, ...] = ()  # per row, what kind of text it is from; empty where that is not known
    lengths: tuple[int, ...] = ()  # per row, tokens without the padding; empty where there is none
    counted: Tensor | None = field(default=None, compare=False)  # bool [rows, tokens] that figures are of; None: all
    role: str = ""  # of the rows, for the report
    positions: str = "all"  # what `counted` marks, for the report
    max_memory_bytes: int | None = None  # that the process may come to hold
    save_candidate_logits: Path | None = None  # of the first candidate that `quantized_inputs` has, else of the first
    save_reference_logits: Path | None = None

    def over(self, rows: Rows) -> DiffOptions:
        """The same of these rows: their kinds, lengths, role, and what counts of them."""
        return replace(
            self,
            origins=tuple("+".join(sorted(set(origin.split("+")))) for origin in rows.origins),
            lengths=tuple(rows.lengths.tolist()) if rows.lengths is not None else (),
            counted=rows.counted,
            role=rows.role,
            positions=rows.positions,
        )


def compare(
    candidate: WeightSource,
    reference: WeightSource,
    ids: Tensor,
    options: DiffOptions | None = None,
    *,
    rows_source: str = "",
    rows_sha256: str = "",
) -> Iterator[Event]:
    """Run both models over `ids` (int64 [rows, tokens]); yields a LayerDrift per stage, a RowsCompared per row, and
    last the DiffReport; first a Said of the memory that it will take, where that is limited.

    Raises MismatchError if the two are not builds of one model or the ids are not of its vocabulary.
    """
    return compare_many([candidate], reference, ids, options, rows_source=rows_source, rows_sha256=rows_sha256)


def compare_many(
    candidates: Sequence[WeightSource],
    reference: WeightSource,
    ids: Tensor,
    options: DiffOptions | None = None,
    *,
    rows_source: str = "",
    rows_sha256: str = "",
) -> Iterator[Event]:
    """As `compare`, with the reference run once for all candidates: per stage a LayerDrift of each candidate, at the
    end (after a RowsCompared per row) a DiffReport of each, both in the order given. Holds the hidden states
    of all of them; weights of a candidate that is given several times (with other caches) are read once."""
    options = options or DiffOptions()
    model_b = LayeredModel.of(reference, dtype=options.dtype, device=options.device)
    models: list[LayeredModel] = []
    made: dict[tuple[int, bool], LayeredModel] = {}
    shared = WeightStore(room_for_weights(options.device)) if _share(candidates, options) else None
    for number, candidate in enumerate(candidates):
        key = id(candidate), number in options.quantized_inputs
        if key not in made:
            source = candidate if shared is None else shared.over(candidate)
            made[key] = LayeredModel.of(source, dtype=options.dtype, device=options.device)
            check_same_skeleton(model_b, made[key])
            if number in options.quantized_inputs:
                made[key].model.set_experts_implementation(
                    "eager"
                )  # a linear call an expert, which QuantizedInputs sees
        models.append(made[key])
    _check_ids(ids, model_b.vocab_size)
    if any(options.caches) and not attends(model_b.layers):
        raise UnsupportedError(
            f"{{cache_quant}}: no layer of {type(model_b.model).__name__} keeps keys and values for later tokens, so "
            f"that there is no cache to quantize"
        )
    yield from _Comparison(models, model_b, ids, options, rows_source, rows_sha256, shared).run()


def _share(candidates: Sequence[WeightSource], options: DiffOptions) -> bool:
    """Whether weights that several candidates have are read, decoded or made once for all of them: a layer's, which
    are held for that."""
    return options.max_memory_bytes is None and not options.quantized_inputs and have_shared_sources(candidates)


def measure_many(
    candidates: Sequence[WeightSource],
    reference: WeightSource,
    ids: Tensor,
    options: DiffOptions | None = None,
    on_event: OnEvent = ignore,
    what: str = "comparing",
    *,
    rows_source: str = "",
    rows_sha256: str = "",
) -> list[DiffReport]:
    """As `compare_many`; returns the reports. on_event: gets its events, and a Progress after each."""
    reports: list[DiffReport] = []
    stages, drifts = 0, 0
    on_event(Progress(what, 0, 1))
    for event in compare_many(candidates, reference, ids, options, rows_source=rows_source, rows_sha256=rows_sha256):
        if isinstance(event, DiffReport):
            reports.append(event)
            continue
        on_event(event)
        if isinstance(event, LayerDrift):
            stages, drifts = event.total * len(candidates), drifts + 1
            on_event(Progress(what, drifts, 2 * stages, text=event.name))  # logits take about as long as the layers
        elif isinstance(event, RowsCompared):
            done = stages + stages * event.done / event.total
            on_event(Progress(what, done, 2 * stages, text=f"logits of row {event.done}"))
    return reports


def _check_ids(ids: Tensor, vocab: int) -> None:
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise MismatchError(f"token rows are {list(ids.shape)}, wanted [rows >= 1, tokens >= 2]")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise MismatchError(
            f"token ids run from {low} to {high}, the model's vocabulary from 0 to {vocab - 1}; "
            f"is it the wrong tokenizer, or another model's {{input_ids}}?"
        )


@dataclass(frozen=True)
class _RowGroup:
    """Rows start .. stop - 1, which are cut to one width and run `batch` at a time."""

    start: int
    stop: int
    width: int
    batch: int


def _widths(lengths: Sequence[int], tokens: int) -> list[int]:
    """What rows of these lengths are cut to, of `tokens` tokens with their padding."""
    return [min(tokens, math.ceil(length / WIDTH_STEP) * WIDTH_STEP) for length in lengths]


def _row_groups(widths: Sequence[int], batch: int | None, device: torch.device) -> Iterator[_RowGroup]:
    """Neighbouring rows of one width. Padding on the right is seen by no token before it."""
    start = 0
    for row in range(1, len(widths) + 1):
        if row == len(widths) or widths[row] != widths[start]:
            yield _RowGroup(start, row, widths[start], batch or batch_rows(device, widths[start]))
            start = row


class _Comparison:
    def __init__(
        self,
        candidates: list[LayeredModel],
        b: LayeredModel,
        ids: Tensor,
        options: DiffOptions,
        source: str,
        sha256: str,
        shared: WeightStore | None,
    ) -> None:
        self.candidates, self.b, self.ids, self.options, self.shared = candidates, b, ids, options, shared
        self.rows_source, self.rows_sha256 = source, sha256
        lengths = options.lengths or (ids.shape[1],) * len(ids)
        widths = _widths(lengths, ids.shape[1])
        self.plan = plan_diff(b, len(candidates), widths, options.batch, options.max_memory_bytes)
        for model in (b, *candidates):
            model.pieces = self.plan.pieces
        self.groups = list(_row_groups(widths, self.plan.batch, b.device))
        self.batches = [
            (start, min(start + group.batch, group.stop), group.width)
            for group in self.groups
            for start in range(group.start, group.stop, group.batch)
        ]
        self.counted = options.counted
        self.meant: list[Tensor] | None = None  # a batch, bool [rows, tokens]
        if self.counted is not None:
            self.meant = [self.counted[start:stop, :width] for start, stop, width in self.batches]
        if options.keep_reference > b.depth + 2:
            raise RecompileError(
                f"{{keep_b}} {options.keep_reference}: the model has {b.depth + 2} stages (the embedding, {b.depth} "
                f"layers and the norm); wanted at most so many"
            )
        first_length = options.lengths[0] if options.lengths else ids.shape[1]
        self.floor_ids = ids[:1, : min(FLOOR_TOKENS, max(2, first_length // 2))]
        self.stages: list[list[LayerDrift]] = [[] for _ in candidates]
        self.routing: list[list[LayerRouting]] = [[] for _ in candidates]
        formats = options.caches or (None,) * len(candidates)
        kind = b.model.config.model_type
        self.caches = [SimulatedCache.of(each, kind) if each is not None else None for each in formats]
        self.seen_inputs: dict[int, set[str]] = {number: set() for number in options.quantized_inputs}

    @torch.inference_mode()
    def run(self) -> Iterator[Event]:
        if self.options.max_memory_bytes is not None:
            yield Said(self.plan.describe())
        states_b = self._kept(self._embed(self.b))
        states: list[list[Tensor]] = [[] for _ in self.candidates]
        for model, (first, *others) in self._by_model():
            states[first] = self._kept(self._embed(model))
            for number in others:
                states[number] = self._kept(state.clone() for state in states[first])
        floor = next(self.b.embed(self.floor_ids, 1))
        yield from self._finish_stage("embedding", states, states_b)
        for index in range(self.b.depth):
            with self.b.layer(index):
                floor = self.b.run_layer(index, floor)
                with ExpertChoices().watching(self.b.layers[index]) as chosen_b:
                    self._run_layer(self.b, index, states_b)
            self._run_candidates(index, states, chosen_b)
            yield from self._finish_stage(self.b.prefix_of_layer(index), states, states_b)
        with self.b.norm_loaded() as norm:
            floor = norm(floor)
            self._set(states_b, map(norm, states_b))
        for model, numbers in self._by_model():
            with model.norm_loaded() as norm:
                for n in numbers:
                    self._set(states[n], map(norm, states[n]))
        yield from self._finish_stage("norm", states, states_b)
        pieces: list[list[TokenMetrics]] = [[] for _ in self.candidates]
        floor_kl = yield from self._compare_logits(states, states_b, floor, pieces)
        for n, found in enumerate(pieces):
            whole = TokenMetrics.cat(found)
            placed = whole.reshape(len(self.ids)) if self.counted is None else whole.placed(self.counted)
            yield self._report(n, placed, floor_kl)

    def _by_model(self) -> list[tuple[LayeredModel, list[int]]]:
        """Every model of the candidates once, with the numbers of those that are it."""
        found: dict[int, tuple[LayeredModel, list[int]]] = {}
        for number, model in enumerate(self.candidates):
            found.setdefault(id(model), (model, []))[1].append(number)
        return list(found.values())

    def _run_candidates(self, index: int, states: list[list[Tensor]], chosen_b: ExpertChoices) -> None:
        name = self.b.prefix_of_layer(index)
        for model, numbers in self._by_model():
            with model.layer(index) as layer:
                for number in numbers:
                    cache = self.caches[number]
                    with (
                        self._inputs(number, index),
                        cache.of_layer(layer) if cache is not None else nullcontext(),
                        ExpertChoices().watching(layer) as chosen,
                    ):
                        self._run_layer(model, index, states[number])
                    routing = compare_choices(name, chosen_b, chosen, len(self.ids), self.meant)
                    self.routing[number] += [routing] if routing is not None else []
        if self.shared is not None:
            self.shared.clear()

    def _embed(self, model: LayeredModel) -> Iterator[Tensor]:
        for group in self.groups:
            ids = self.ids[group.start : group.stop, : group.width]
            yield from model.embed(ids, group.batch, first_row=group.start)

    def _inputs(self, number: int, index: int) -> AbstractContextManager[Any]:
        """What a candidate's layer runs under: its inputs quantized, or as they are."""
        if number not in self.options.quantized_inputs:
            return nullcontext()
        model = self.candidates[number]
        assert isinstance(model.source, Overlay), "only a mix of checkpoints says how inputs are quantized"
        return QuantizedInputs(model, model.source, index, seen=self.seen_inputs[number])

    def _unseen_inputs(self, number: int) -> tuple[UnseenInputs, ...]:
        model = self.candidates[number]
        if number not in self.seen_inputs or not isinstance(model.source, Overlay):
            return ()
        return unseen_inputs(model.source, model, self.seen_inputs[number])

    def _run_layer(self, model: LayeredModel, index: int, states: list[Tensor]) -> None:
        rows = (start for start, _, _ in self.batches)
        self._set(states, (model.run_layer(index, state, row) for row, state in zip(rows, states, strict=True)))

    def _kept(self, states: Iterable[Tensor]) -> list[Tensor]:
        """The states of a model, a batch each, where the plan has them."""
        return kept_states(
            states, sum((stop - start) * width for start, stop, width in self.batches), self.plan.scratch
        )

    def _set(self, states: list[Tensor], after: Iterable[Tensor]) -> None:
        put_states(states, after, self.plan.scratch)

    def _finish_stage(self, name: str, states: list[list[Tensor]], states_b: list[Tensor]) -> Iterator[LayerDrift]:
        hidden = self.b.hidden_of if name != "norm" else lambda state: state
        for stages, states_a in zip(self.stages, states, strict=True):
            if len(stages) < self.options.keep_reference:
                self._set(states_a, (state.clone() for state in states_b))
            figures = [
                drift(self._counted_of(hidden(a), n), self._counted_of(hidden(b), n))
                for n, (a, b) in enumerate(zip(states_a, states_b, strict=True))
            ]
            stages.append(LayerDrift(name, len(stages), self.b.depth + 2, mean_drift(figures)))
            yield stages[-1]

    def _counted_of(self, state: Tensor, batch: int) -> Tensor:
        """A state [batch, tokens, ...], zero where it is not counted."""
        if self.meant is None:
            return state
        mask = self.meant[batch].to(state.device)
        return torch.where(mask.reshape(*mask.shape, *[1] * (state.dim() - 2)), state, 0)

    def _labels(self) -> Tensor:
        """The next token of every place, int64 [rows, tokens]; -1 where there is none."""
        rows, tokens = self.ids.shape
        labels = torch.cat([self.ids[:, 1:], torch.full((rows, 1), -1)], 1)
        if self.options.lengths:
            labels[torch.arange(tokens)[None] >= torch.tensor(self.options.lengths)[:, None] - 1] = -1
        return labels.to(self.b.device)

    def _chunks(self, row: int) -> list[slice | Tensor]:
        """Places of a row whose logits are compared, some at a time."""
        if self.counted is None:
            tokens = self.ids.shape[1]
            return [slice(at, min(tokens, at + LOGIT_CHUNK_TOKENS)) for at in range(0, tokens, LOGIT_CHUNK_TOKENS)]
        places = self.counted[row].nonzero().flatten().to(self.b.device)
        return list(places.split(LOGIT_CHUNK_TOKENS))

    def _compare_logits(
        self,
        states: list[list[Tensor]],
        states_b: list[Tensor],
        floor: Tensor,
        pieces: list[list[TokenMetrics]],
    ) -> Generator[RowsCompared, None, float]:
        """Fill `pieces`, a list a candidate, a chunk of tokens at a time; returns the noise floor."""
        vocab = min(self.options.vocab or self.b.vocab_size, self.b.vocab_size)
        rows, tokens = self.ids.shape
        labels = self._labels()
        shape = (rows, tokens, self.b.vocab_size)
        saved = min(self.options.quantized_inputs, default=0)
        with ExitStack() as stack:
            file_a = stack.enter_context(_LogitFile(self.options.save_candidate_logits, shape))
            file_b = stack.enter_context(_LogitFile(self.options.save_reference_logits, shape))
            for model in (self.b, *(model for model, _ in self._by_model())):
                stack.enter_context(model.head_loaded())
            length = floor.shape[1]
            first = [] if self.counted is None else [self._floor_logits(states_b[0], length)[:, :vocab].clone()]
            row = 0
            for batch, b in enumerate(states_b):
                for r in range(len(b)):
                    for places in self._chunks(row):
                        logits_b = self.b.logits(b[r : r + 1, places], row)[0]
                        file_b.append(logits_b)
                        if row == 0 and sum(map(len, first)) < length:
                            first.append(logits_b[: length - sum(map(len, first)), :vocab].clone())
                        for n, model in enumerate(self.candidates):
                            logits_a = model.logits(states[n][batch][r : r + 1, places], row)[0]
                            if n == saved:
                                file_a.append(logits_a)
                            found = token_metrics(
                                logits_b[:, :vocab], logits_a[:, :vocab], labels[row, places], self.options.top_k
                            )
                            if not found.is_finite:
                                raise _not_finite(self.b, logits_b[:, :vocab], model, logits_a[:, :vocab], row)
                            pieces[n].append(found)
                    row += 1
                    yield RowsCompared(row, rows)
            again = self.b.logits(floor, 0)[0, :, :vocab]
            floor_kl = kl_divergence(torch.cat(first), again).double().abs()
            check_finite(floor_kl, f"{self.b.loaded_from}: noise floor, row 1")
            return float(floor_kl.mean())

    def _floor_logits(self, states: Tensor, tokens: int) -> Tensor:
        """Logits [tokens, vocab] of the first row's beginning, made as those of the rows are."""
        chunks = states[:1].split(LOGIT_CHUNK_TOKENS, 1)
        needed = chunks[: math.ceil(tokens / LOGIT_CHUNK_TOKENS)]
        return torch.cat([self.b.logits(chunk, 0)[0] for chunk in needed])[:tokens]

    def _report(self, number: int, found: TokenMetrics, floor_kl: float) -> DiffReport:
        counted = self.counted if self.counted is not None else torch.ones_like(found.labelled)
        row_means = [mean_over_rows(found.kl[r : r + 1], counted[r : r + 1]).mean for r in range(len(found.kl))]
        kl = found.kl[counted]
        return DiffReport(
            candidate=getattr(self.candidates[number].source, "label", "A"),
            reference=getattr(self.b.source, "label", "B"),
            rows=len(found.kl),
            row_tokens=found.kl.shape[1],
            tokens=kl.numel(),
            unlabelled_tokens=int((counted & ~found.labelled).sum()),
            dtype=str(self.b.dtype).removeprefix("torch."),
            device=str(self.b.device),
            vocab=min(self.options.vocab or self.b.vocab_size, self.b.vocab_size),
            kl=mean_over_rows(found.kl, counted),
            kl_reverse=mean_over_rows(found.kl_reverse, counted),
            kl_quantiles=quantiles(kl),
            kl_by_confidence=kl_by_confidence(kl, found.confidence[counted]),
            kl_rows=tuple(row_means),
            noise_floor=floor_kl,
            identical=bool(found.same_logit_bits[counted].all()),
            score_candidate=_score(found.candidate_nll, found.candidate_hit, found.labelled, self.candidates[number]),
            score_reference=_score(found.reference_nll, found.reference_hit, found.labelled, self.b),
            top_k_agreement=tuple(
                mean_over_rows(found.agree[..., k].float(), counted) for k in range(found.agree.shape[-1])
            ),
            layers=tuple(self.stages[number]),
            rows_sha256=self.rows_sha256,
            rows_source=self.rows_source,
            versions=versions(),
            kl_histogram=kl_histogram(kl),
            routing=tuple(self.routing[number]),
            delta_p=delta_p(found.reference_nll, found.candidate_nll, found.labelled),
            sure_flips=sure_flips(found.confidence, found.agree[..., 0]),
            by_origin=slices_by_origin(found.kl, found.agree[..., 0], self.options.origins, counted),
            by_position=slices_by_position(found.kl, found.agree[..., 0], counted),
            rows_role=self.options.role,
            positions=self.options.positions,
            cache=self._cache_used(number),
            unseen_inputs=self._unseen_inputs(number),
        )

    def _cache_used(self, number: int) -> CacheUsed | None:
        stored_as, seen = self.options.caches[number] if self.options.caches else None, self.caches[number]
        if stored_as is None or seen is None:
            return None
        return CacheUsed.of(stored_as, seen, len(self.b.structure.ran))


def _not_finite(b: LayeredModel, logits_b: Tensor, a: LayeredModel, logits_a: Tensor, row: int) -> NotFiniteError:
    """Why tokens of a row have no finite KL, or no finite probability of their label."""
    for model, logits in ((b, logits_b), (a, logits_a)):
        if bool((logits.isnan() | (logits == math.inf)).any()):
            return NotFiniteError(
                f"{model.loaded_from}: the head", f"logits are NaN or infinite in {name_of(logits)}; {WIDER}", row
            )
    return NotFiniteError(
        f"{a.loaded_from} against {b.loaded_from}",
        "a token that one gives no probability (logit -inf) is one that the other gives some, or the next of the text: "
        f"no KL or perplexity is defined; {WIDER}",
        row,
    )


def _score(nll: Tensor, hits: Tensor, labelled: Tensor, model: LayeredModel) -> ModelScore:
    mean = mean_over_rows(nll, labelled)
    if mean.mean >= LARGEST_NLL:
        raise NotFiniteError(
            getattr(model.source, "label", "the model"),
            f"-log p of the text's tokens is {mean.mean:.0f} nats, so that perplexity is no number; the checkpoint is "
            f"damaged, or {WIDER}",
        )
    perplexity = math.exp(mean.mean)
    error = perplexity * mean.std_error if mean.std_error is not None else None
    shares = tuple(float(hits[..., k][labelled].float().mean()) for k in range(hits.shape[-1]))
    return ModelScore(perplexity, error, mean, shares)


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    import transformers

    import recompile

    return {"recompile": recompile.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


class _LogitFile:
    """Appends logits to a safetensors file, key `logits`, float32 [rows, tokens, vocab]; nothing where path is None.

    It appears whole or not at all. Raises OutputError."""

    def __init__(self, path: Path | None, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self.file: IO[bytes] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _LogitFile:
        if self.path is None:
            return self
        size = 4 * math.prod(self.shape)
        entry = {"dtype": "F32", "shape": list(self.shape), "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {"made_by": "recompile"}, "logits": entry}).encode()
        header += b" " * (-len(header) % 8)
        self.file = self._stack.enter_context(write_atomically(self.path))
        self.file.write(len(header).to_bytes(8, "little") + header)
        return self

    def append(self, logits: Tensor) -> None:
        if self.file is not None:
            try:
                self.file.write(logits.float().contiguous().cpu().numpy().data)
            except OSError as error:
                raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
