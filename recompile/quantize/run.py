"""A dense base to variants at several bitrates, or straight to one mix: the work of `recompile.quantize`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from recompile.checkpoint.module_names import Dense
from recompile.errors import ArgumentError, FormatError, OutputError
from recompile.events import Note, OnEvent, Progress, follow, ignore
from recompile.formats import COMPRESSED, FORMATS
from recompile.gguf.container import open_gguf
from recompile.gguf.imatrix import read_imatrix, write_imatrix
from recompile.io.report import role_in_words
from recompile.model.decoded import as_dense, base_note
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import RowOptions, check_vocabulary
from recompile.model.tokenizer import tokenizer_texts
from recompile.model.tokens import Rows
from recompile.model.used_rows import UsedRows
from recompile.quantize.encoder_choice import EncoderChoice, parse_rates
from recompile.quantize.external_converters import check_engine, plan_engine, run_engine
from recompile.quantize.gguf import (
    Importance,
    Mix,
    VariantPlan,
    VariantsReport,
    collect_importance,
    gguf_architecture,
    imatrix_of,
    importance_from,
    plan_variants,
)
from recompile.quantize.gguf_build import build_variants
from recompile.quantize.gguf_compensated import ComparedInputsOfFile
from recompile.quantize.gguf_convert import convert, tokenizer_file
from recompile.quantize.gguf_mix import is_gguf_recipe, read_mix
from recompile.quantize.gguf_rounding import Feedback, InputHessians
from recompile.quantize.lazy_variant import read_importance
from recompile.quantize.mix import MixEncoder
from recompile.quantize.mlx_encoder import MlxEncoder
from recompile.quantize.output_statistics import StoredStatistics, open_statistics
from recompile.quantize.pipeline import BuildOptions, quantize_model
from recompile.quantize.quantize_report import LayerDone, QuantizeReport

ROUNDING_METHODS = ("rtn", "mse", "gptq")

# Measures the gradients at the outputs of all maps of a base on rows into a directory: a pass of `eval`, handed in from
# above. (base, rows, directory, device, dtype, cap in bytes) -> events, last the StoredStatistics
MeasureOutputs: TypeAlias = Callable[
    [Checkpoint, Rows, Path, str, "torch.dtype | None", "int | None"], Iterator[object]
]


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """What is asked of variants; see `recompile.quantize` for the meaning of each."""

    bits: tuple[str, ...] = ()  # bitrates, or GGUF types
    schemes: tuple[str, ...] = ()
    modifiers: Path | None = None
    independent: bool = False
    recipe: Path | None = None
    format: str = COMPRESSED
    method: str = "gptq"
    group_size: str = "64"
    asym: bool = False
    importance: bool = True
    head_bits: int | None = None
    codebook: str = "mul1"
    tokenizer_from: Path | None = None
    imatrix: Path | None = None
    save_imatrix: Path | None = None
    converter: bool = False
    engine: str = "own"
    rounding: str | None = None
    compensate: bool = False
    stats: Path | None = None
    max_memory_bytes: int | None = None
    dense: Dense = field(default_factory=Dense)
    where: RowOptions
    device: str = "cpu"
    dtype: str | None = None

    @property
    def two_sided(self) -> bool:
        return self.rounding == "two-sided" or self.stats is not None

    def check(self) -> None:
        """Raises ArgumentError for what does not go together."""
        if not self.bits and not self.schemes and self.modifiers is None and self.recipe is None:
            raise ArgumentError("wanted {bits} with bitrates, {scheme} with names, or {recipe} with a file for one mix")
        if self.method not in ROUNDING_METHODS and not self.schemes:
            raise ArgumentError(
                f"{{method}} {self.method}: wanted rtn, mse or gptq; with {{scheme}} also awq, smoothquant, awq+gptq, "
                f"... ({{modifiers}} says methods in its file)"
            )
        for name, value in (("mtp", self.dense.mtp), ("tower", self.dense.tower)):
            if value not in ("quantize", "keep"):
                raise ArgumentError(f'{{{name}}} {value}: wanted "quantize" or "keep"')
        if self.dense != Dense() and (self.format == "gguf" or self.engine != "own"):
            raise ArgumentError("{mtp}, {tower}, {keep} and {quantize_also} go with our own encoders, not of GGUF")
        if self.independent and self.modifiers is None:
            raise ArgumentError("{independent} goes with {modifiers}; variants are always calibrated so")
        if self.schemes and self.modifiers:
            raise ArgumentError("{scheme} and {modifiers}: wanted one of them")
        said = (self.bits, self.recipe, self.format != COMPRESSED, self.engine != "own", self.asym)
        names_modes = self.format in FORMATS and FORMATS[self.format].names_modes
        of_modes = names_modes and self.schemes and not self.modifiers
        if (self.schemes or self.modifiers) and (any(said) or self.head_bits) and not of_modes:
            raise ArgumentError(
                "{scheme} and {modifiers} say all of the stored form; leave out {bits}, {recipe}, {format}, {engine}, "
                "{asym} and {head_bits}"
            )
        if self.recipe is not None and self.engine != "own":
            raise ArgumentError("{recipe} goes with {engine} own")
        if self.rounding == "one-sided" and self.stats is not None:
            raise ArgumentError("{stats} are for two-sided rounding; leave out {rounding} one-sided")
        if self.two_sided:
            self._check_two_sided()
        if self.compensate:
            self._check_compensate()

    def _check_compensate(self) -> None:
        if self.engine != "own":
            raise ArgumentError(f"{{compensate}}: not with {{engine}} {self.engine}, whose encoder is not ours to aim")
        if self.save_imatrix is not None:
            raise ArgumentError("{save_imatrix}: inputs of a compensated build are no imatrix; make it in a run before")
        if self.independent:
            raise ArgumentError("{compensate} and {independent}: modules answer for those before them, or stand alone")
        asked = len(self.bits) + len(self.schemes) + (self.modifiers is not None)
        if self.recipe is None and asked != 1:
            raise ArgumentError(
                f"{{compensate}}: found {asked} variants, wanted one: it answers for its own errors, and is no part of "
                f"a mix; make the mix itself so, with {{recipe}}"
            )

    def _check_two_sided(self) -> None:
        """What cannot be rounded so is said before the backward pass."""
        if self.engine != "own":
            raise ArgumentError(
                f"{{rounding}} two-sided: not with {{engine}} {self.engine}, whose encoder is not ours to feed into"
            )
        if "gptq" not in self.method and self.modifiers is None:
            raise ArgumentError(f"{{rounding}} two-sided: goes with {{method}} gptq, not {self.method}")


@dataclass(frozen=True)
class ConvertedVariants:
    """What an engine's own converter made."""

    directories: tuple[str, ...]


def run_quantize(
    base: Path,
    out: Path,
    options: QuantizeOptions,
    on_event: OnEvent = ignore,
    measure_outputs: MeasureOutputs | None = None,
) -> QuantizeReport | VariantsReport | ConvertedVariants:
    """Make all variants that the options ask for; goes on after the last finished layer or tensor of an interrupted
    run.

    out: the directory of the variants, or with a recipe the mix itself. on_event: gets LayerDone, Calibrated and
    TensorDone, too.
    """
    options.check()
    if options.format == "gguf" or (options.recipe is not None and is_gguf_recipe(options.recipe)):
        return _make_gguf(base, out, options, on_event, measure_outputs)
    if options.engine != "own":
        return _run_engine(base, out, options, on_event)
    return _make_safetensors(base, out, options, on_event, measure_outputs)


def _make_safetensors(
    base_dir: Path,
    out: Path,
    options: QuantizeOptions,
    on_event: OnEvent,
    measure_outputs: MeasureOutputs | None,
) -> QuantizeReport:
    rates = parse_rates(options.bits)
    base = open_checkpoint(base_dir)
    if base.is_quantized:
        on_event(Note(base_note(base), "Warning"))
    base = as_dense(base)
    if problem := tokenizer_texts(base.path)[1]:
        on_event(Note(problem, "Warning"))
    rows, vocab = options.where.read([base.path], "calibrate")
    check_vocabulary(base, vocab)
    outputs = None
    if options.two_sided:
        assert measure_outputs is not None, "handed in by recompile.api"
        outputs = _output_statistics(base, out, rows, options, measure_outputs, on_event)
    names = ("schemes", "modifiers", "recipe", "format", "method", "group_size", "asym", "importance", "head_bits")
    choice = EncoderChoice(bits=rates, codebook=options.codebook, **{name: getattr(options, name) for name in names})
    encoder, head = choice.encoder(base, out, rows, outputs, on_event)
    embeddings = encoder.embeddings if isinstance(encoder, (MlxEncoder, MixEncoder)) else ()
    dense = replace(options.dense, quantize=(*options.dense.quantize, *embeddings))
    report: QuantizeReport | None = None
    for event in quantize_model(
        base,
        out if options.recipe is None else out.parent,
        encoder,
        rows.ids,
        BuildOptions(
            head=head,
            device=compute_device(options.device),
            dtype=compute_dtype(options.dtype),
            rows_sha256=rows.sha256,
            sequential=options.modifiers is not None and not options.independent and not options.compensate,
            compensate=options.compensate,
            dense=dense,
            counted=rows.counted,
            used=UsedRows.of(rows, "calibrate"),
        ),
    ):
        on_event(event)
        if isinstance(event, LayerDone):
            said = event.name + (" (done before)" if event.resumed else "")
            on_event(Progress("quantizing", event.index + 1, event.total, "layers", said))
        else:
            report = event
    assert report is not None, "quantize_model ends with its report"
    report = replace(report, rows=UsedRows.of(rows, "calibrate"))
    for variant in report.variants:
        if variant.not_smoothed:
            on_event(Note(variant.not_smoothed, "Warning"))
    if outputs is not None and options.stats is None:
        shutil.rmtree(outputs.path)
    return report


def _output_statistics(
    base: Checkpoint,
    out: Path,
    rows: Rows,
    options: QuantizeOptions,
    measure_outputs: MeasureOutputs,
    on_event: OnEvent,
) -> StoredStatistics:
    """Gradients at the outputs of all maps: those kept in `stats`, or measured on the calibration rows."""
    # without stats they are kept until the variants are whole
    path = options.stats if options.stats is not None else out.with_name(out.name + ".stats")
    if options.stats is None and path.is_dir() and not any(path.iterdir()):
        raise OutputError(
            f"{path}: exists, and is empty; statistics are kept under this name and go when the variants are whole: "
            f"remove it, or choose another {{out}}"
        )
    kept = open_statistics(path)
    if kept is not None:
        kept.check_base(base.identity, base.label)
        if options.stats is None:
            kept.check_rows(rows.sha256)
        return kept
    device, dtype = compute_device(options.device), compute_dtype(options.dtype)
    events = measure_outputs(base, rows, path, device, dtype, options.max_memory_bytes)
    return follow(events, on_event, StoredStatistics)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _make_gguf(
    base_dir: Path,
    out: Path,
    options: QuantizeOptions,
    on_event: OnEvent,
    measure_outputs: MeasureOutputs | None,
) -> VariantsReport:
    """One GGUF file for each type, preset or mix."""
    folder = out if options.recipe is None else out.parent
    if options.converter:
        base_dir = convert(base_dir, folder, lambda step, what: on_event(Progress("converting", step, 2, text=what)))
    base = open_checkpoint(base_dir)
    if base.is_quantized:
        on_event(Note(base_note(base), "Warning"))
    base = as_dense(base, to_gguf=True)
    names: Sequence[str | Mix] = options.bits
    provenance: Mapping[str, str] = {}
    if options.recipe is not None:
        mix, provenance, warnings = read_mix(options.recipe, base, out, options.bits)
        for warning in warnings:
            on_event(Note(warning, "Warning"))
        names = [mix]
    tokenizer = options.tokenizer_from
    if tokenizer is None and not isinstance(base, GgufCheckpoint):
        gguf_architecture(base)  # raises for one without names
        tokenizer = tokenizer_file(base_dir, lambda step, what: on_event(Progress("tokenizer", step, 2, text=what)))
    keys_of = open_gguf(tokenizer) if tokenizer is not None else None
    # refuses what it must before the long work
    plan = plan_variants(base, folder, names, tokenizer_from=keys_of, provenance=provenance)
    rows: Rows | None = None
    feeds_back = options.rounding is not None or options.two_sided or options.compensate
    if feeds_back or (options.imatrix is None and options.importance):
        rows, vocab = options.where.read([base.path], "calibrate")
        check_vocabulary(base, vocab)
    if options.imatrix is not None:
        plan = replace(plan, importance=_read_importance(options.imatrix, plan))
    elif options.importance and rows is not None and not feeds_back:
        found = calibrate_importance(base, rows, options.device, options.dtype, on_event)
        plan = replace(plan, importance=found)
        _save_importance(found, plan, rows, options)
    outputs: StoredStatistics | None = None
    if feeds_back:
        assert rows is not None, "read for this"
        if options.two_sided:
            assert measure_outputs is not None, "handed in by recompile.api"
            outputs = _output_statistics(base, out, rows, options, measure_outputs, on_event)
        plan = replace(plan, feedback=_feedback(base, rows, outputs, options))
    report = _build_gguf(plan, rows, options, on_event)
    if outputs is not None and options.stats is None:
        shutil.rmtree(outputs.path)
    return replace(report, rows=None if rows is None else UsedRows.of(rows, "calibrate"))


def _read_importance(path: Path, plan: VariantPlan) -> Importance:
    if path.suffix == ".safetensors":
        return Importance(read_importance(path), source=str(path))
    return importance_from(read_imatrix(path), plan.tensors, str(path))


def _save_importance(importance: Importance, plan: VariantPlan, rows: Rows, options: QuantizeOptions) -> None:
    if options.save_imatrix is not None:
        write_imatrix(options.save_imatrix, imatrix_of(importance, plan.tensors, rows.ids.shape[1]))


def _feedback(base: Checkpoint, rows: Rows, outputs: StoredStatistics | None, options: QuantizeOptions) -> Feedback:
    """One pass over the rows gives what codes make up for errors by, and the importance where no file has it."""
    device, dtype = compute_device(options.device), compute_dtype(options.dtype)
    kind = ComparedInputsOfFile if options.compensate else InputHessians
    inputs = kind(base, rows.ids, device=device, dtype=dtype, counted=rows.counted)
    key = f"{rows.sha256} {outputs.fingerprint if outputs is not None else ''}"
    key += " compensated" if options.compensate else ""
    key += f" {options.dtype}" if options.dtype is not None else ""
    return Feedback(inputs, outputs, key, gives_importance=options.imatrix is None and options.importance)


def _build_gguf(plan: VariantPlan, rows: Rows | None, options: QuantizeOptions, on_event: OnEvent) -> VariantsReport:
    """Carry out the plan; an imatrix file that was asked for is written before the outputs get their names."""
    collected = plan.feedback.inputs if plan.feedback is not None and plan.feedback.gives_importance else None
    for event in build_variants(plan):
        on_event(event)
        if isinstance(event, VariantsReport):
            return event
        on_event(Progress("encoding", event.done_bytes, event.total_bytes, "bytes", event.tensor))
        is_last = event.done_bytes == event.total_bytes
        if is_last and isinstance(collected, InputHessians) and rows is not None and options.save_imatrix is not None:
            collected.go_to(None)
            found = Importance(collected.mean_squares, collected.tokens, _name_of(rows))
            _save_importance(found, plan, rows, options)
    raise AssertionError("build_variants ends with its report")


def _name_of(rows: Rows) -> str:
    """Of an importance that was collected on them."""
    return rows.source if rows.counted is None else f"{rows.source}{role_in_words(rows.role, rows.positions)}"


def calibrate_importance(
    base: Checkpoint, rows: Rows, device: str = "cpu", dtype: str | None = None, on_event: OnEvent = ignore
) -> Importance:
    """Mean squares of the inputs of every matrix over calibration rows, as GGUF encoders weigh errors."""
    found: Importance | None = None
    for event in collect_importance(
        base,
        rows.ids,
        device=compute_device(device),
        dtype=compute_dtype(dtype),
        source=_name_of(rows),
        counted=rows.counted,
    ):
        on_event(event)
        if isinstance(event, Importance):
            found = event
        else:
            on_event(Progress("calibrating", event.done, event.total, "layers", f"layer {event.done}"))
    assert found is not None, "collect_importance ends with the importance"
    return found


# ---- engines' own converters -----------------------------------------------------------------------------------------


def _run_engine(base: Path, out: Path, options: QuantizeOptions, on_event: OnEvent) -> ConvertedVariants:
    """Let an engine's own converter make the variants."""
    engine = options.engine
    wanted = next(spec.name for spec in FORMATS.values() if spec.engine == engine)
    if options.format != wanted:
        raise ArgumentError(f"{{engine}} {engine} makes {wanted}: add {{format}} {wanted}")
    check_engine(engine)
    number = options.device.rpartition(":")[2] if options.device != "cpu" else "0"
    where, head_bits = options.where, options.head_bits or 6
    if where.trace is not None:
        raise ArgumentError(
            f"{{trace}}: the converter of {engine} has text of its own; leave it out, or take our encoder"
        )
    if where.rows is None:
        raise FormatError("an engine's converter takes a number of rows")
    steps = plan_engine(
        engine, base, out, parse_rates(options.bits), head_bits, where.rows, where.length, number, options.codebook
    )
    for output in run_engine(steps):
        text = f"{output.step.title}: {output.line[-60:]}"
        on_event(Progress("converting", output.number, len(steps), "runs", text))
    return ConvertedVariants(tuple(str(step.made) for step in steps if step.made.is_dir()))
