"""A profile from beginning to end, in any of its modes: the work of `recompile.profile`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.diff import DiffOptions
from eval.mixes.evaluator import TOGETHER
from eval.profile.adaptive_rows import FILLING_SAMPLES, RowLimits, RowsDone, profile_more_rows
from eval.profile.exact import Measured, ProfileJob, ProfileOptions, Started, profile_exact
from eval.profile.hybrid import HybridOptions, HybridRound, RoutingMoved, profile_hybrid
from eval.profile.sketch import (
    SketchOptions,
    SketchProgress,
    SketchStarted,
    SweepDone,
    prepare_sketch,
    profile_sketch,
)
from eval.profile.whole_mixes import corrected, keep_corrected, measure_factors
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import Profile, ProfileHeader, id_of_directory
from recompile.errors import ArgumentError
from recompile.events import Note, OnEvent, Progress, ignore
from recompile.io.sizes import format_bytes, format_seconds
from recompile.model.decoded import base_note
from recompile.model.rows import RowOptions, check_vocabulary
from recompile.model.used_rows import check_apart, recorded_rows
from recompile.optimize.budget import Budget
from recompile.quantize.candidates import CandidateOptions, calibration_rows, candidate_named, make_candidates
from recompile.quantize.lazy_variant import MadeVariant, keep_importance
from recompile.recipe.recipe import SourceId

DEFAULT_ROWS = 16
DEFAULT_SAMPLES = 16
DEFAULT_RTOL = 0.05  # where rows are added and no time is given either
HYBRID_MINUTES = 10.0


@dataclass(frozen=True)
class ProfileRequest:
    """What is asked of a profile; see `recompile.profile` for the meaning of each."""

    base: str | None  # ID=DIR, DIR, or with candidates the name of one
    sources: tuple[str, ...]
    candidates: tuple[str, ...]
    making: CandidateOptions
    options: ProfileOptions
    mode: str
    importance: bool
    samples: int | None
    minutes: float | None
    rtol: float | None
    max_rows: int
    seed: int
    pairs: bool
    bpw: float | None
    whole_mixes: bool  # of a mixture of experts, after a sketch: measured, to correct the costs
    ray: str | None
    rows: int | str | None  # None: DEFAULT_ROWS, or as many as fit in the minutes; "auto": as rtol asks for
    where: RowOptions  # its `rows` is not looked at

    @property
    def adds_rows(self) -> bool:
        """Whether the number of rows is found on the way. Raises ArgumentError for what contradicts that."""
        auto = self.rows == "auto" or (self.rows is None and self.minutes is not None and self.mode != "hybrid")
        if auto and self.mode == "weights":
            raise ArgumentError("{mode} weights has no noise of rows; give a number of rows in place of {rows} auto")
        if self.rtol is not None and not auto:
            rows = DEFAULT_ROWS if self.rows is None else self.rows
            raise ArgumentError(
                f"{{rtol}} adds rows until the error is small enough, and {{rows}} {rows} fixes them: give {{rows}} "
                f"auto"
            )
        return auto

    @property
    def fixed_rows(self) -> int | None:
        """Where rows are not added on the way; None: all of a file of token rows."""
        default = DEFAULT_ROWS if self.where.input_ids is None else None
        return self.rows if isinstance(self.rows, int) else default

    def check(self) -> None:
        """Raises ArgumentError for what does not go together."""
        if self.options.activations and (self.mode != "exact" or self.ray is not None):
            raise ArgumentError("{activations} runs swaps one by one: it needs {mode} exact, without {ray}")
        if self.mode == "hybrid" and self.bpw is None:
            raise ArgumentError("{mode} hybrid checks the decisions of one budget: give it, e.g. {bits} 3.5")
        if self.candidates and self.sources:
            raise ArgumentError("{candidates} and {sources} exclude each other: candidates are made, sources are there")
        if self.making.feedback and not self.candidates:
            raise ArgumentError("{feedback} goes with {candidates}; {sources} are rounded already")
        if not self.candidates and (self.base is None or not self.sources):
            raise ArgumentError(
                "give {base} VARIANT and {sources} VARIANT..., or {candidates} 2,3,4,6 to make them on the fly"
            )
        if self.ray is not None and self.mode not in ("exact", "sketch", "diagonal"):
            raise ArgumentError(
                f"{{ray}} spreads exact swaps, or rows of a sketch; {{mode}} {self.mode} runs in one process"
            )


def run_profile(reference_dir: str, out: Path, request: ProfileRequest, on_event: OnEvent = ignore) -> Profile:
    """Measure what every group of modules costs from each source, into the journal `out`; an unfinished one goes on.

    on_event: gets Notes, and the events of the profiler (Started, Measured, SketchStarted, SweepDone, HybridRound,
    RowsDone, ...). Raises ArgumentError, JournalError, MismatchError.
    """
    request.check()
    reference = open_checkpoint(reference_dir)
    if reference.is_quantized:
        on_event(Note(base_note(reference), "Warning"))
    base_id, offered = _sources(reference, request, on_event)
    if isinstance(first := offered[0][1], MadeVariant) and first.base is not None:
        reference = first.base  # decoded, where it is quantized itself
    for _, checkpoint in offered:
        for note in checkpoint.notes:
            on_event(Note(note, "Warning"))
    auto, mode, minutes = request.adds_rows, request.mode, request.minutes
    directories = [reference.path, *(checkpoint.path for _, checkpoint in offered)]
    found, vocab = replace(request.where, rows=None if auto else request.fixed_rows).read(directories, "choose")
    check_vocabulary(reference, vocab)
    if auto:
        found = found.part(0, min(request.max_rows, len(found.ids)))
    fills_time = auto and minutes is not None and mode != "hybrid"
    samples = request.samples
    if samples is None:
        samples = FILLING_SAMPLES if fills_time else DEFAULT_SAMPLES
    for_draws = minutes if mode != "hybrid" and not auto else None
    is_corrected = request.whole_mixes and mode == "sketch"
    sketch = SketchOptions(
        samples, for_draws, request.seed, keep_pairs=request.pairs, mode=mode, is_corrected=is_corrected
    )
    check_apart(found, "choose", recorded_rows(checkpoint.path for _, checkpoint in offered), on_event)
    job = ProfileJob(reference, base_id, offered, found.ids, out, request.options).over(found, out)
    run = _profiler(sketch, request.importance, request.ray)
    if auto:
        for_rows = minutes if mode != "hybrid" else None
        rtol = DEFAULT_RTOL if request.rtol is None and for_rows is None else request.rtol
        settings = None if mode == "exact" else sketch
        events = profile_more_rows(
            found, out, RowLimits(rtol, for_rows), lambda some, n, to: run(job.over(some, to), n), settings
        )
    else:
        events = run(job, 0)
    most = "at most " if auto else ""
    on_event(Note(f"{most}{len(found.ids)} rows x {found.ids.shape[1]} tokens{found.counted_in_words}", ""))
    if mode == "hybrid":
        wanted = HybridOptions(Budget(bpw=request.bpw), HYBRID_MINUTES if minutes is None else minutes)
        events = profile_hybrid(job, sketch, wanted, sketching=events)
    profile: Profile | None = None
    for number, event in enumerate(events):
        if not number:  # its journal is held
            keep_importance(out, offered)
        if isinstance(event, Profile):
            profile = event
            continue
        on_event(event)
        for said in _tell(event, out):
            on_event(said)
    assert profile is not None, "every profiler ends with the profile"
    return _corrected(profile, job, out, on_event) if is_corrected else profile


@dataclass(frozen=True)
class Forecast:
    """What is known of a profile before anything is measured. header: without hashes of the models; sources: candidate
    label -> what is chosen from"""

    header: ProfileHeader
    sources: Mapping[str, Checkpoint]


def forecast(reference_dir: str, request: ProfileRequest, shape: tuple[int, int] | None = None) -> Forecast:
    """What a sketch would be of, from headers and the text of its rows: nothing is calibrated, run or written.

    shape: rows and their tokens, where rows cannot be read yet. Raises as `run_profile` does before its first sweep,
    for sources that do not go together, rows that are not there, and a memory cap that cannot be kept.
    """
    request.check()
    reference = open_checkpoint(reference_dir)
    weighing, weighed = request.making, bool(request.candidates) and request.making.weighs
    request = replace(request, making=replace(request.making, importance_rows=0, feedback=False))
    base_id, offered = _sources(reference, request, ignore)
    if isinstance(first := offered[0][1], MadeVariant) and first.base is not None:
        reference = first.base
    job = ProfileJob(reference, base_id, offered, torch.zeros(shape or (1, 2)), request.making.out, request.options)
    if shape is None:
        directories = [reference.path, *(checkpoint.path for _, checkpoint in offered)]
        found, vocab = replace(request.where, rows=request.fixed_rows).read(directories, "choose")
        check_vocabulary(reference, vocab)
        job = job.over(found, job.path)
        if weighed:
            calibration_rows(reference, weighing)
    samples = DEFAULT_SAMPLES if request.samples is None else request.samples
    _, sketch, _ = prepare_sketch(job, SketchOptions(samples), identified=False)
    return Forecast(sketch.header, job.by_label)


def _corrected(profile: Profile, job: ProfileJob, out: Path, on_event: OnEvent) -> Profile:
    """Costs of a mixture of experts, multiplied by what a few whole mixes tell of them."""
    job = job.first(profile.header.rows)
    options = DiffOptions(dtype=job.options.dtype, device=str(job.options.device), counted=job.counted)
    together = TOGETHER if job.options.max_memory_bytes is None else 1
    kept = out.with_name(f"{out.name}.mixes.json")
    factors = measure_factors(profile, job.reference, job.by_label, job.ids, options, kept, together, on_event)
    if not factors:
        return profile
    for factor in factors:
        on_event(Note(f"whole mixes, {factor.described()}", ""))
    on_event(Note("costs are multiplied by these ratios: a sketch does not see tokens that go to other experts", ""))
    return keep_corrected(out, corrected(profile, factors))


def _sources(
    reference: Checkpoint, request: ProfileRequest, on_event: OnEvent
) -> tuple[SourceId, list[tuple[SourceId, Checkpoint]]]:
    """What is swapped in, and which of it recipes start from."""
    if request.candidates:
        offered = make_candidates(reference, request.candidates, request.making, on_event)
        return candidate_named(request.base, offered), offered
    assert request.base is not None, "checked before"
    named = [_source(given) for given in (request.base, *request.sources)]
    return named[0][0], [(source_id, open_checkpoint(directory)) for source_id, directory in named]


def _source(given: str) -> tuple[SourceId, str]:
    """`ID=DIR` or `DIR`; a directory that is there by the whole text is one, whatever "=" it has."""
    if os.path.exists(given):
        return id_of_directory(given), given
    name, separator, directory = given.partition("=")
    if separator and name and "/" not in name:
        return (int(name) if re.fullmatch("[0-9]{1,9}", name) else name), directory
    return id_of_directory(given), given


def _profiler(sketch: SketchOptions, importance: bool, ray: str | None) -> Callable[[ProfileJob, int], Iterator[Any]]:
    """What carries out a job: (job, number of the first of its rows) -> events, last a Profile."""
    mode = sketch.mode
    profiler: Callable[..., Iterator[Any]] = profile_exact if mode == "exact" else profile_sketch
    if ray is not None:
        from eval.profile.cluster import check_cluster, profile_on_ray, sketch_on_ray

        address = None if ray == "local" else ray
        check_cluster(address)  # before the journal is begun
        profiler = partial(profile_on_ray if mode == "exact" else sketch_on_ray, address=address)
    elif mode == "weights":
        from eval.profile.weights import profile_weights

        profiler = partial(profile_weights, importance=importance)

    def run(job: ProfileJob, first_row: int) -> Iterator[Any]:
        settings = [] if mode in ("exact", "weights") else [replace(sketch, first_row=first_row)]
        return profiler(job, *settings)

    return run


# ---- events in words -------------------------------------------------------------------------------------------------


def _tell(event: object, out: Path) -> Iterator[Progress | Note]:
    """An event of a profiler for a bar, or for people."""
    if isinstance(event, Measured):
        swap = event.measurement
        text = f"{swap.group or 'control'} from {swap.source or '-'}: {swap.mean:.5f}"
        yield Progress("profiling", event.done, event.total, text=text)
    elif isinstance(event, SketchProgress):
        yield Progress("profiling", event.done, event.total, text=event.text)
    elif isinstance(event, Started):
        layers = "kept loaded" if event.plan.resident_weights else "read again for every wave"
        yield Note(
            f"{event.total} swaps, {event.resumed} of them already in {out}; plan: {format_bytes(event.plan.total)} of "
            f"memory at most, layers {layers}",
            "",
        )
    elif isinstance(event, SketchStarted):
        yield Note(f"{event.sweeps} sweeps, {event.resumed} of them done before; plan: {event.plan.describe()}", "")
    elif isinstance(event, SweepDone):
        seconds = format_seconds(event.seconds)
        yield Note(f"sweep {event.sweeps} took {seconds}; most expensive: {_most_expensive(event.profile)}", "")
    elif isinstance(event, RoutingMoved) and event.by_layer:
        layer, share = max(event.by_layer.items(), key=lambda found: found[1])
        yield Note(
            f"up to {100 * share:.1f} % of the tokens go to other experts (layer {layer}); what a sketch says of "
            f"experts counts as that much less certain, layer by layer",
            "",
        )
    elif isinstance(event, HybridRound):
        yield Note(
            f"{event.swaps} swaps run after {format_seconds(event.seconds)}; the next decision is worth "
            f"{event.gain_nats:.2g} nats per token",
            "",
        )
    elif isinstance(event, RowsDone):
        yield Note(_rows_done(event), "")


def _rows_done(state: RowsDone) -> str:
    """How well the total is known, and what follows."""
    text = f"{state.rows} rows of {state.documents} documents: standard error of the total {100 * state.error:.2g} %"
    text += f" (candidate {state.candidate})"
    if state.limits.rtol is not None:
        text += f", wanted {100 * state.limits.rtol:.2g} %"
    if state.reason is None:
        return f"{text}; {state.next_rows} more rows, of at most {state.most}"
    if state.limits.rtol is not None and not state.reached:
        text += ", NOT reached"
    return f"{text}; stopped: {state.reason}"


def _most_expensive(profile: Profile, most: int = 3) -> str:
    """The groups that cost most at the base variant's bits."""
    costs = {group.name: profile.cost(group.name, profile.header.base) for group in profile.header.groups}
    ranked = sorted(((c.kl_nats, name) for name, c in costs.items() if c is not None), reverse=True)
    return ", ".join(f"{name} {kl:.4f}" for kl, name in ranked[:most])
