"""What `model_quantize` prints: the variants it made, with sizes and errors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from recompile.io.report import format_columns, role_in_words
from recompile.io.sizes import format_bpw, format_bytes

if TYPE_CHECKING:
    from recompile.model.used_rows import UsedRows
    from recompile.quantize.gguf import VariantsReport
    from recompile.quantize.quantize_report import ModuleReport, QuantizeReport
    from recompile.quantize.run import ConvertedVariants


def describe_variants(report: QuantizeReport | VariantsReport | ConvertedVariants) -> str:
    """A row a variant, and what calibration saw."""
    from recompile.quantize.gguf import VariantsReport
    from recompile.quantize.run import ConvertedVariants

    if isinstance(report, ConvertedVariants):
        return "\n".join(report.directories)
    return _gguf_summary(report) if isinstance(report, VariantsReport) else _summary(report)


def _summary(report: QuantizeReport) -> str:
    rows = []
    for variant, directory in zip(report.variants, report.directories, strict=True):
        made = [module for module in variant.modules if module.quantized]
        rows.append(
            (
                directory,
                format_bpw(variant.bpw),
                format_bpw(variant.head_bpw),
                format_bytes(variant.size_bytes),
                str(len(made)),
                f"{_mean([module.relative_error for module in made]):.4f}",
                f"{_mean([module.sqnr_db for module in made if module.sqnr_db is not None]):.2f}",
                f"{_mean([m.output_error for m in made if m.output_error is not None]):.5f}",
            )
        )
    header = ("variant", "bpw", "head", "size", "modules", "rel. error", "SQNR dB", "output error")
    text = format_columns(rows, header)
    text += _calibrated_on(report.rows)
    modules = report.variants[0].modules
    borrowed = sum(module.quantized and module.note.startswith("made with the inputs of") for module in modules)
    blind = sum(module.quantized and module.note.startswith("not calibrated") for module in modules)
    if borrowed or blind:
        text += (
            f"\noutside the layers: {borrowed} modules made with the inputs of the last layer's, {blind} without inputs"
        )
    for line in dict.fromkeys(variant.left_dense for variant in report.variants):
        text += f"\n{line}" if line else ""
    kept: list[ModuleReport] = [module for module in modules if not module.quantized]
    for module in kept[:10]:
        text += f"\nkept dense: {module.module}: {_as_flag(module.note)}"
    if len(kept) > 10:
        text += f"\n... and {len(kept) - 10} more; all in quantize_report.json"
    return text


def _calibrated_on(used: UsedRows | None) -> str:
    if used is None:
        return ""
    return f"\ncalibrated on {len(used.documents)} rows, {used.source}{role_in_words(used.role, used.positions)}"


def _gguf_summary(report: VariantsReport) -> str:
    from recompile.quantize.gguf import counts_of

    rows = []
    for file, (_, made) in zip(report.files, report.tensors.items(), strict=True):
        quantized = [entry for entry in made if entry.got not in ("F32",)]
        size, weights = sum(entry.size_bytes for entry in made), sum(entry.weights for entry in made)
        types = ", ".join(f"{count} {kind}" for kind, count in counts_of(made).items())
        error = _mean([entry.relative_error for entry in quantized])
        rows.append((file, format_bpw(8 * size / weights), format_bytes(size), f"{error:.4f}", types))
    text = format_columns(rows, ("file", "bpw", "size", "rel. error", "tensors by type"), range(1, 4))
    text += _calibrated_on(report.rows)
    for preset, made in report.tensors.items():
        rounded = [entry for entry in made if entry.rounding]
        if rounded:
            both = sum(entry.rounding.startswith("two-sided") for entry in rounded)
            text += f"\n{preset}: codes of {len(rounded)} tensors by error feedback, {both} of them two-sided"
        noted: dict[tuple[str, str, str], int] = {}
        for entry in report.noted(preset):
            key = (entry.asked, entry.got, entry.note)
            noted[key] = noted.get(key, 0) + 1
        for (asked, got, note), count in noted.items():
            what = f"tensors asked to be {asked} are {got}" if asked != got else f"{got} tensors"
            text += f"\n{preset}: {count} {what}: {note}"
    if report.left_out:
        text += (
            f"\nleft out: {len(report.left_out)} tensors of vision, audio or draft parts, which llama.cpp takes from a "
            f"file of their own, first {report.left_out[0]}"
        )
    return text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _as_flag(note: str) -> str:
    return f"--{note}" if note.startswith("keep,") else note
