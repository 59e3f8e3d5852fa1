"""Candidates made on the fly from a dense reference, before any variant exists: what `--candidates` names.

With `feedback` they are rounded as model_quantize rounds variants, in one calibrated pass before, and kept beside the
profile: error feedback takes more off some modules' errors than off others' (SmolLM2 at 3 bits: half of what output
projections cost, a tenth of what gates do), so a choice by costs without it is one for other weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.costs import candidate_label, is_expert
from recompile.errors import ArgumentError, FormatError
from recompile.events import Note, OnEvent, ignore
from recompile.formats import COMPRESSED, FORMATS
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.gguf.imatrix import read_imatrix
from recompile.model.decoded import as_dense
from recompile.model.devices import compute_device
from recompile.model.rows import RowOptions, check_vocabulary
from recompile.model.tokens import Rows
from recompile.quantize.calibrate import input_power
from recompile.quantize.fake_quant import KEEP_BYTES
from recompile.quantize.gguf import base_tensors, importance_from
from recompile.quantize.lazy_variant import (
    check_importance_file,
    exl_spec_of,
    fallbacks_of,
    make_variants,
    mlx_spec_of,
    open_rounded,
    parse_candidates,
    rounded_dir,
    spec_of,
)
from recompile.quantize.run import QuantizeOptions, calibrate_importance, run_quantize
from recompile.recipe.recipe import SourceId

CALIBRATION_LENGTH = 512
DEFAULT_GROUP_SIZE = 64


@dataclass(frozen=True)
class CandidateOptions:
    """How candidates are made. importance_rows: calibration rows by whose inputs errors are weighed; 0: all alike.
    feedback: rounded with error feedback (GPTQ) on those rows before. roles: other than layers that are groups of the
    profile too; out: the profile, beside which importance and rounded candidates are kept."""

    format: str
    group_size: int | str | None
    asym: bool
    importance_rows: int
    feedback: bool
    imatrix: Path | None
    where: RowOptions  # of these rows; its `rows` and `length` are not looked at, but for a trace its length is
    device: str
    out: Path
    level: str
    roles: frozenset[str]
    cap_bytes: int | None

    @property
    def weighs(self) -> bool:
        """Whether errors are weighed by inputs of calibration rows, which stand-ins have no use for."""
        return bool(self.importance_rows) and self.imatrix is None and self.lazily != "noise"

    @property
    def lazily(self) -> str | None:
        """How candidates of a format of its own are made, see FormatSpec; None: those that their names say."""
        return FORMATS[self.format].lazily if self.format in FORMATS else None


def check_rounding(format_name: str, group_size: int | str | None, asym: bool) -> None:
    """Raises ArgumentError where settings of integers are given for a format that has none."""
    given = [name for name, value in (("{group_size}", group_size is not None), ("{asym}", asym)) if value]
    if format_name == MLX:
        if asym:
            raise ArgumentError("{asym}: of compressed-tensors; {format} mlx has a bias in every group anyway")
        return
    if given and format_name != COMPRESSED:
        raise ArgumentError(f"{', '.join(given)}: of integers; {{format}} {format_name} has groups of its own")


def make_candidates(
    reference: Checkpoint, names: Sequence[str], options: CandidateOptions, on_event: OnEvent = ignore
) -> list[tuple[SourceId, Checkpoint]]:
    """The candidates that `names` name ("2,3,4", "nvfp4", "Q4_K"), made from the reference when they are read.

    Raises ArgumentError for what does not go together, OutputError where the importance has no place (`keep_importance`
    puts it there).
    """
    check_rounding(options.format, options.group_size, options.asym)
    specs = _specs(names, options, on_event)
    rounded = _round(reference, specs, options, on_event) if options.feedback else None
    types = [source_id for source_id, spec in specs if "type" in spec]
    if types:
        _check_gguf_groups(reference, options)
        if len(types) < len(specs):
            said = "GGUF types and compressed-tensors forms are never in one file: ban one kind in model_optimize."
            on_event(Note(said))
    elif options.imatrix is not None:
        raise ArgumentError("{imatrix}: goes with {candidates} of GGUF types")
    if options.imatrix is not None or (options.importance_rows and (types or options.lazily != "noise")):
        check_importance_file(options.out)
    importance: Mapping[str, Tensor] | None = None
    if types and (options.imatrix is not None or options.importance_rows):
        importance = _gguf_importance(as_dense(reference, to_gguf=True), options, on_event)
    elif options.importance_rows and options.lazily != "noise" and (rounded is None or options.roles):
        rows = calibration_rows(reference, options)
        device = compute_device(options.device)
        importance = input_power(reference, rows.ids, device=device, counted=rows.counted, on_event=on_event)
    keep = KEEP_BYTES if options.cap_bytes is None else 0
    try:
        offered = make_variants(reference, specs, importance, options.roles, keep, rounded)
    except FormatError as error:
        sized = "" if options.group_size is None else f", {{group_size}} {options.group_size}"
        raise FormatError(
            f"{{candidates}} {','.join(names)}{sized}: {error.template}; give others that this model can have"
        ) from error
    for line in fallbacks_of(offered):
        on_event(Note(line, ""))
    return list(offered)


def _specs(
    names: Sequence[str], options: CandidateOptions, on_event: OnEvent
) -> list[tuple[SourceId, dict[str, object]]]:
    given = str(DEFAULT_GROUP_SIZE if options.group_size is None else options.group_size)
    if given != "channel" and not re.fullmatch("[0-9]{1,9}", given):
        raise ArgumentError(f"{{group_size}} {given}: wanted a number such as 64, or channel")
    if options.format == MLX:
        if given == "channel":
            raise ArgumentError("{group_size} channel: MLX has 32, 64, 128")
        return [mlx_spec_of(name, int(given)) for name in parse_candidates(names)]
    if options.lazily is None:
        size = None if given == "channel" else int(given)
        return [spec_of(name, group_size=size, symmetric=not options.asym) for name in parse_candidates(names)]
    specs = [exl_spec_of(name, options.format) for name in parse_candidates(names)]
    if options.roles:
        raise ArgumentError(
            f"{{head}}, {{embedding}}: {options.format} candidates have one head of 6 bits, and a dense embedding"
        )
    if options.lazily == "noise":
        on_event(
            Note(
                "EXL3 candidates are stand-ins, the weight with noise as large as what the encoder leaves; sizes "
                "are the files'."
            )
        )
    return specs


def _round(
    reference: Checkpoint,
    specs: Sequence[tuple[SourceId, Mapping[str, object]]],
    options: CandidateOptions,
    on_event: OnEvent,
) -> dict[str, Checkpoint]:
    """The candidates as model_quantize makes them, by label, in one pass for all bits and one for all schemes; those of
    a run before are kept. Raises ArgumentError for kinds that are not rounded so here, and for no rows."""
    if options.lazily == "noise" or any("type" in spec for _, spec in specs):
        kind = "EXL3, whose encoder takes too long" if options.lazily == "noise" else "GGUF types"
        raise ArgumentError(f"{{feedback}}: not for candidates of {kind}; make variants, and give them as {{sources}}")
    if not options.importance_rows:
        raise ArgumentError("{feedback}: goes by the inputs of calibration rows; wanted {importance_rows} 1 or more")
    folder = rounded_dir(options.out)
    on_event(Note(f"candidates are rounded with error feedback, and kept in {folder}", ""))
    how = QuantizeOptions(
        format=options.format,
        group_size=str(DEFAULT_GROUP_SIZE if options.group_size is None else options.group_size),
        asym=options.asym,
        max_memory_bytes=options.cap_bytes,
        where=_where(options),
        device=options.device,
    )
    labels = {key: tuple(candidate_label(name) for name, spec in specs if key in spec) for key in ("bits", "scheme")}
    for some in (replace(how, bits=labels["bits"]), replace(how, schemes=labels["scheme"])):
        if some.bits or some.schemes:
            run_quantize(reference.path, folder, some, on_event)
    return {label: open_rounded(options.out, label) for found in labels.values() for label in found}


def _check_gguf_groups(reference: Checkpoint, options: CandidateOptions) -> None:
    """Raise ArgumentError for groups that no GGUF file can tell apart."""
    if options.level in ("expert", "tensor") and any(is_expert(name) for name in reference.modules):
        raise ArgumentError(
            f"{{level}} {options.level}: in GGUF all experts of a projection are one tensor of one type; use {{level}} "
            f"fused"
        )


def _gguf_importance(reference: Checkpoint, options: CandidateOptions, on_event: OnEvent) -> Mapping[str, Tensor]:
    """As `recompile.quantize` gets it for GGUF: of calibration rows, or of an imatrix file."""
    if options.imatrix is not None:
        tensors = base_tensors(reference)
        return importance_from(read_imatrix(options.imatrix), tensors, str(options.imatrix)).values
    rows = calibration_rows(reference, options)
    return calibrate_importance(reference, rows, options.device, None, on_event).values


def calibration_rows(reference: Checkpoint, options: CandidateOptions) -> Rows:
    """The rows whose inputs errors of candidates are weighed by. Raises RecompileError where there are too few."""
    rows, vocab = _where(options).read([reference.path], "calibrate")
    check_vocabulary(reference, vocab)
    return rows


def _where(options: CandidateOptions) -> RowOptions:
    length = CALIBRATION_LENGTH if options.where.trace is None else options.where.length
    return replace(options.where, rows=options.importance_rows, length=length, input_ids=None)


def candidate_named(name: str | None, offered: Sequence[tuple[SourceId, Checkpoint]]) -> SourceId:
    """The candidate that recipes start from: the one named, else the middle one. Raises ArgumentError."""
    ids = [source_id for source_id, _ in offered]
    if name is None:
        return ids[(len(ids) - 1) // 2]
    found = next((source_id for source_id in ids if str(source_id) == name), None)
    if found is None:
        raise ArgumentError(f"{{base}} {name}: with {{candidates}} it names one of them: {', '.join(map(str, ids))}")
    return found
