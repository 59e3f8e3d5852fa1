"""Two models, or one with a recipe applied, compared over rows of tokens: the work of `recompile.diff`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.attribution import Attribution, AttributionOptions, attribute
from eval.cache_sweep import CacheGrid, CachePoint, grid_of, sweep_of
from eval.diff import DiffOptions, DiffReport, measure_many
from eval.divergence import Divergence, divergence, greedy_runs, parse_divergence
from eval.metrics import Mean, paired_difference
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.checkpoint.config_fields import context_of
from recompile.checkpoint.tied_head import find_tied_head
from recompile.costs import LEVELS
from recompile.errors import ArgumentError
from recompile.events import Note, OnEvent, ignore
from recompile.formats.cache_types import CacheFormat, parse_cache, parse_sweep
from recompile.io.files import read_text
from recompile.io.memory import available_bytes
from recompile.merge.explain import reached_aside
from recompile.merge.left_dense import left_dense
from recompile.merge.overlay import Overlay, build_overlay, check_same_model
from recompile.model import tokenizer, tokens
from recompile.model.activations import quantizes_inputs
from recompile.model.decoded import base_note
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import RowOptions, check_vocabulary, read_rows
from recompile.model.stream import LayeredModel, default_dtype
from recompile.model.used_rows import check_apart, recorded_rows


@dataclass(frozen=True)
class DiffRequest:
    """See `recompile.diff` for the meaning of each."""

    recipe: Path | None
    allow_unmatched: bool
    activations: bool
    keep_b: int
    topk_max: int
    batch_size: int | None
    gen_prompt: bool
    save_input_ids: Path | None
    save_logits_a: Path | None
    save_logits_b: Path | None
    where: RowOptions
    device: str
    dtype: str | None
    max_memory_bytes: int | None = None
    divergence: str | None = None  # PROMPTSxTOKENS of greedy runs
    cache_quant: str | None = None
    cache_sweep: tuple[str, ...] = ()
    attribute: str | None = None  # a level of groups
    iso: bool = False
    attribute_journal: Path | None = None


@dataclass(frozen=True)
class ModelDiff:
    """How far a candidate is from a reference, and what the candidate was made of."""

    report: DiffReport
    overlay: Overlay  # the candidate
    recipe_name: str | None
    recipe: str | None  # its text, so that a report can be set beside the profile that predicted it
    with_activations: DiffReport | None  # the same with inputs quantized as the candidate's schemes say
    divergence: Divergence | None = None  # of greedy runs, where asked for
    cache_sweep: tuple[CachePoint, ...] = ()  # through other caches, in the order asked for
    attribution: Attribution | None = None  # of KL to groups of modules, where asked for

    @property
    def cache_grid(self) -> CacheGrid | None:
        """The sweep by keys and values, where it has every pair of them."""
        return grid_of(self.cache_sweep)

    def as_dict(self) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if self.with_activations is not None:
            more["with_activations"] = self.with_activations.as_dict()
        if self.divergence is not None:
            more["divergence"] = asdict(self.divergence)
        if self.cache_sweep:
            more["cache_sweep"] = [asdict(point) for point in self.cache_sweep]
        if self.attribution is not None:
            more["attribution"] = self.attribution.as_dict()
        return {
            **self.report.as_dict(),
            "size": {**self.overlay.accounting.as_dict(), "left_dense": left_dense(self.overlay).as_dict()},
            "candidate_dir": self.overlay.base.label,
            "recipe_name": self.recipe_name,
            "recipe": self.recipe,
            **more,
        }


@dataclass(frozen=True)
class PairedKl:
    """KL of one candidate less that of another, over the same rows."""

    left: int  # places of the two among the candidates
    right: int
    difference: Mean  # nats per token; negative: `left` is nearer to the reference
    interval: tuple[float, float] | None  # 95 %, Student's t over rows; None for fewer than two rows

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class ManyDiffs:
    """Several candidates against one reference, on the same rows: each, and every two of them paired over rows."""

    names: tuple[str, ...]  # short, and no two alike
    diffs: tuple[ModelDiff, ...]
    pairs: tuple[PairedKl, ...]

    @property
    def best(self) -> int:
        """The place of the candidate of the smallest mean KL; the first of equal ones."""
        return min(range(len(self.diffs)), key=lambda n: self.diffs[n].report.kl.mean)

    def pair(self, left: int, right: int) -> PairedKl:
        """left's KL less right's."""
        for found in self.pairs:
            if (found.left, found.right) == (left, right):
                return found
            if (found.left, found.right) == (right, left):
                low, high = found.interval or (0.0, 0.0)
                turned = (-high, -low) if found.interval else None
                return PairedKl(left, right, Mean(-found.difference.mean, found.difference.std_error), turned)
        raise KeyError((left, right))

    def as_dict(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "best": self.best,
            "candidates": [found.as_dict() for found in self.diffs],
            "pairs": [asdict(pair) for pair in self.pairs],
        }


def run_diff(candidate: str, reference: str, request: DiffRequest, on_event: OnEvent = ignore) -> ModelDiff:
    """Compare; writes nothing but what `save_...` names. on_event: gets LayerDrift and RowsCompared, too.

    Raises MismatchError for builds of different models, RecipeError, ArgumentError.
    """
    _check_trace(request)
    _check_caches(request)
    _check_attribute(request)
    base, mix = open_checkpoint(reference), open_checkpoint(candidate)
    overlay = _overlay_of(mix, request.recipe, base, request, on_event)
    _check_divergence(request)
    report, *others = _measure([overlay], base, request, on_event)
    with_inputs = others.pop(0) if request.activations else None
    (parted,) = _divergences([overlay], base, request, on_event)
    found = _model_diff(report, overlay, request.recipe, with_inputs, parted)
    parts = _attributed(overlay, base, request, on_event) if request.attribute is not None else None
    return replace(found, cache_sweep=sweep_of(report, others), attribution=parts)


def run_diffs(
    candidates: Sequence[tuple[str, Path | None]], reference: str, request: DiffRequest, on_event: OnEvent = ignore
) -> ManyDiffs:
    """As `run_diff`, of several candidates (model, recipe or None) with one pass over the reference.

    Holds the hidden states of all candidates. Raises ArgumentError for what one candidate alone can have.
    """
    if request.save_logits_a is not None:
        raise ArgumentError(f"{{save_logits_a}}: goes with one candidate; {len(candidates)} are given")
    if request.activations:
        raise ArgumentError(f"{{activations}}: goes with one candidate; {len(candidates)} are given")
    if request.cache_sweep:
        raise ArgumentError(f"{{cache_sweep}}: goes with one candidate; {len(candidates)} are given")
    if request.attribute is not None:
        raise ArgumentError(f"{{attribute}}: goes with one candidate; {len(candidates)} are given")
    _check_divergence(request)
    _check_trace(request)
    _check_caches(request)
    _check_attribute(request)
    base = open_checkpoint(reference)
    overlays = [_overlay_of(open_checkpoint(model), recipe, base, request, on_event) for model, recipe in candidates]
    reports = _measure(overlays, base, request, on_event)
    parted = _divergences(overlays, base, request, on_event)
    found = [
        _model_diff(report, overlay, recipe, None, one)
        for report, overlay, (_, recipe), one in zip(reports, overlays, candidates, parted, strict=True)
    ]
    pairs = []
    for left, right in combinations(range(len(reports)), 2):
        rows = [torch.tensor(reports[n].kl_rows) for n in (left, right)]
        difference, interval = paired_difference(*rows)
        pairs.append(PairedKl(left, right, difference, interval if difference.std_error is not None else None))
    return ManyDiffs(_short_names(candidates), tuple(found), tuple(pairs))


def _short_names(candidates: Sequence[tuple[str, Path | None]]) -> tuple[str, ...]:
    """The last parts of paths, as many as tell the candidates apart; numbered where nothing does."""
    whole = [
        f"{str(model).rstrip('/')} + {recipe}" if recipe is not None else str(model).rstrip("/")
        for model, recipe in candidates
    ]
    short = [
        " + ".join(Path(part).name or part for part in (str(model).rstrip("/"), str(recipe or "")) if part)
        for model, recipe in candidates
    ]
    names = [name if short.count(name) == 1 else long for name, long in zip(short, whole, strict=True)]
    return tuple(f"{name} ({n + 1})" if names.count(name) > 1 else name for n, name in enumerate(names))


def _overlay_of(
    checkpoint: Checkpoint, recipe: Path | None, base: Checkpoint, request: DiffRequest, on_event: OnEvent
) -> Overlay:
    """A candidate with its recipe, checked against the reference; warnings go to on_event."""
    overlay = build_overlay(checkpoint, recipe, allow_unmatched=request.allow_unmatched)
    for warning in [*overlay.warnings, *reached_aside(overlay)]:
        on_event(Note(warning, "Warning"))
    check_same_model(base, checkpoint)
    if request.activations and not quantizes_inputs(overlay):
        raise ArgumentError(
            f"{{activations}}: no module of {overlay.label} says how its inputs are quantized (input_activations in "
            f"config.json); leave it out, or use a variant such as w8a8, fp8-dynamic or nvfp4-a4"
        )
    return overlay


def _measure(
    overlays: Sequence[Overlay], base: Checkpoint, request: DiffRequest, on_event: OnEvent
) -> list[DiffReport]:
    """A report of each; with `activations` one more, of the first with its inputs quantized; then one of the first
    through each cache of the sweep."""
    if base.is_quantized:
        on_event(Note(base_note(base), "Warning"))
    for checkpoint in {one.path: one for one in (base, *(overlay.base for overlay in overlays))}.values():
        tied_head = find_tied_head(checkpoint)
        if tied_head is not None and not tied_head.is_copy:
            on_event(Note(f"{checkpoint.label}: {tied_head}", "Warning"))
    ids, rows, vocab = _rows_of(overlays, base, request)
    made_of = dict.fromkeys(folder for overlay in overlays for folder in folders_of(overlay))
    check_apart(rows, "report", recorded_rows(made_of), on_event)
    if request.save_input_ids is not None:
        tokens.save_rows(rows, request.save_input_ids)
    if request.keep_b:
        on_event(
            Note(f"A is given B's states after its first {request.keep_b} stages: what follows is told of the rest")
        )
    stored_as = _cache_of(request)
    sweep = parse_sweep(request.cache_sweep)
    sources = [*overlays, *([overlays[0]] if request.activations else [])]
    options = DiffOptions(
        batch=request.batch_size,
        top_k=request.topk_max,
        keep_reference=request.keep_b,
        dtype=compute_dtype(request.dtype),
        device=compute_device(request.device),
        vocab=vocab,
        quantized_inputs=frozenset({len(overlays)} if request.activations else ()),
        max_memory_bytes=request.max_memory_bytes,
        save_candidate_logits=request.save_logits_a,
        save_reference_logits=request.save_logits_b,
    ).over(rows)
    about: dict[str, Any] = {"rows_source": rows.source, "rows_sha256": rows.sha256}
    at_once = _states_at_once(ids, base, options) if sweep else len(sources)
    first = sweep[: max(1, at_once - len(sources))]
    with_first = replace(options, caches=(*[stored_as] * len(sources), *first))
    found = measure_many([*sources, *[overlays[0]] * len(first)], base, ids, with_first, on_event, **about)
    for start in range(len(first), len(sweep), at_once):
        part = sweep[start : start + at_once]
        alone = replace(options, caches=part, quantized_inputs=frozenset(), **_NOTHING_SAVED)
        found += measure_many([overlays[0]] * len(part), base, ids, alone, on_event, **about)
    return found


_NOTHING_SAVED: dict[str, Any] = {"save_candidate_logits": None, "save_reference_logits": None}
SWEEP_SHARE = 0.25  # of the memory that is free, for the states of candidates that run together


def _states_at_once(ids: Tensor, base: Checkpoint, options: DiffOptions) -> int:
    """How many candidates' hidden states of all rows may be in memory: a sweep of more takes several passes."""
    width = LayeredModel.of(base, dtype=options.dtype, device=options.device).hidden_size
    size = ids.numel() * width * (options.dtype or default_dtype(options.device)).itemsize
    free = min(filter(None, (available_bytes(options.device), options.max_memory_bytes)), default=0)
    return max(1, int(SWEEP_SHARE * free) // size) if free else sys.maxsize  # 0: nothing says what is free


def _cache_of(request: DiffRequest) -> CacheFormat | None:
    return parse_cache(request.cache_quant) if request.cache_quant is not None else None


def folders_of(overlay: Overlay) -> list[Path]:
    """Where what a candidate was made of may be said: its own directory and its sources'."""
    return [overlay.base.path, *(source.path for source in overlay.sources.values())]


def _check_trace(request: DiffRequest) -> None:
    """What is made of rows of one length, or of text, is not made of a trace."""
    if request.where.trace is None:
        return
    for given, name in (
        (request.gen_prompt, "{gen_prompt}"),
        (request.divergence is not None, "{divergence}"),
        (request.save_input_ids is not None, "{save_input_ids}"),
        (request.save_logits_a is not None, "{save_logits_a}"),
        (request.save_logits_b is not None, "{save_logits_b}"),
    ):
        if given:
            raise ArgumentError(f"{name}: goes with rows of one length, not with those of {{trace}}; leave one out")


PROMPT_TOKENS = 48  # of a row's beginning, which greedy runs go on from


def _rows_of(
    overlays: Sequence[Overlay], base: Checkpoint, request: DiffRequest
) -> tuple[Tensor, tokens.Rows, int | None]:
    """What is run, int64 [rows, tokens]; where it is from; and the true vocabulary of a padded one."""
    rows, vocab = request.where.read_own([base.path, *(overlay.base.path for overlay in overlays)], "report")
    vocab = check_vocabulary(base, vocab)
    ids = rows.ids
    if request.gen_prompt:
        prefix = tokenizer.with_tokenizer(base.path, chat_prompt)
        ids = torch.cat([torch.tensor([prefix], dtype=ids.dtype).expand(len(ids), -1), ids], 1)
    return ids, rows, vocab


def _attributed(overlay: Overlay, base: Checkpoint, request: DiffRequest, on_event: OnEvent) -> Attribution:
    ids, rows, _ = _rows_of([overlay], base, request)
    options = AttributionOptions(
        level=request.attribute or "",
        iso=request.iso,
        journal=request.attribute_journal,
        max_memory_bytes=request.max_memory_bytes,
        dtype=compute_dtype(request.dtype),
        device=compute_device(request.device),
        rows_sha256=rows.sha256,
        rows_source=rows.source,
        counted=rows.counted,
    )
    return attribute(overlay, base, ids, options, on_event)


def _check_attribute(request: DiffRequest) -> None:
    if request.iso and request.attribute is None:
        raise ArgumentError("{iso}: goes with {attribute}")
    if request.attribute is not None and request.attribute not in LEVELS:
        raise ArgumentError(f'{{attribute}}: "{request.attribute}" is no level; wanted one of {", ".join(LEVELS)}')


def _check_caches(request: DiffRequest) -> None:
    _cache_of(request)
    parse_sweep(request.cache_sweep)


def _check_divergence(request: DiffRequest) -> None:
    if request.divergence is not None:
        try:
            parse_divergence(request.divergence)
        except ValueError as error:
            raise ArgumentError(f"{{divergence}}: {error}") from None


def _divergences(
    overlays: Sequence[Overlay], base: Checkpoint, request: DiffRequest, on_event: OnEvent
) -> Sequence[Divergence | None]:
    """One a candidate, None where no greedy runs are asked for. Prompts are beginnings of report rows."""
    if request.divergence is None:
        return [None] * len(overlays)
    count, new_tokens = parse_divergence(request.divergence)
    context = context_of(base.config)
    if context is not None and PROMPT_TOKENS + new_tokens > context:
        raise ArgumentError(
            f"{{divergence}} {request.divergence}: prompts of {PROMPT_TOKENS} tokens and {new_tokens} new ones are "
            f"more than the model's context of {context}; ask for at most {context - PROMPT_TOKENS} new tokens"
        )
    where = request.where
    rows, vocab = read_rows(
        [base.path, *(overlay.base.path for overlay in overlays)],
        "report",
        count,
        PROMPT_TOKENS if where.input_ids is None else where.length,
        where.text,
        where.dataset,
        where.input_ids,
        split_own_text=False,
    )
    if len(rows.ids) < count:
        raise ArgumentError(f"{{divergence}}: {count} prompts are asked for, {rows.source} has {len(rows.ids)} rows")
    how: dict[str, Any] = {
        "dtype": compute_dtype(request.dtype),
        "device": compute_device(request.device),
        "vocab": check_vocabulary(base, vocab),
        "max_memory_bytes": request.max_memory_bytes,
        "on_event": on_event,
    }
    runs = greedy_runs(base, rows.ids[:count, :PROMPT_TOKENS], new_tokens, **how)
    return [divergence(overlay, runs, cache=_cache_of(request), **how) for overlay in overlays]


def _model_diff(
    report: DiffReport,
    overlay: Overlay,
    recipe: Path | None,
    with_activations: DiffReport | None,
    parted: Divergence | None,
) -> ModelDiff:
    text = read_text(recipe, kind="recipe") if recipe is not None else None
    return ModelDiff(report, overlay, recipe.name if recipe is not None else None, text, with_activations, parted)


def chat_prompt(tokenizer: Any) -> list[int]:
    """Tokens of the chat template up to where the model answers. Raises ArgumentError for one that fails or is none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("{gen_prompt}: the tokenizer has no chat template")
    messages = [{"role": "user", "content": "Say something."}]
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template's own errors are of any kind
        reason = str(error).strip().split("\n", 1)[0]
        raise ArgumentError(f"{{gen_prompt}}: the chat template fails: {type(error).__name__}: {reason}") from error
    return [int(token) for token in found]
