"""What is known of variants that were made: of each module, each variant, and all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recompile.checkpoint.checkpoint import read_json
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import read_safetensors_header
from recompile.model.used_rows import UsedRows

REPORT = "quantize_report.json"  # beside a variant
NAMED = 4  # modules of a list that a message names


@dataclass(frozen=True)
class ModuleReport:
    """How one module came out in one variant."""

    module: str
    weights: int
    size_bytes: int  # of all its parts, scales and bias included
    relative_error: float  # |W - Wq| / |W|, Frobenius
    sqnr_db: float | None  # None: no error at all
    output_error: float | None  # tr(E H E') / tr(W H W'): relative squared error of the outputs on the calibration rows
    tokens: int  # calibration tokens that reached the module
    quantized: bool = True
    note: str = ""  # why it stayed dense, or was made without a Hessian
    rounding: str = ""  # what two-sided rounding did
    smoothed: bool | None = None  # whether a scale could be moved into what makes its inputs; None: none was wanted

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.size_bytes / self.weights


@dataclass(frozen=True)
class VariantReport:
    """What became of one variant: bits per weight and an entry for every quantized module."""

    name: str
    modules: tuple[ModuleReport, ...]
    bpw: float  # over the quantized modules of the layers
    head_bpw: float | None
    size_bytes: int
    left_dense: str = ""  # the share of the weights that is not quantized, by role

    @property
    def not_smoothed(self) -> str:
        """The modules that AWQ or SmoothQuant left out, in one sentence; empty where there are none."""
        left = [module.module for module in self.modules if module.smoothed is False]
        wanted = sum(module.smoothed is not None for module in self.modules)
        if not left:
            return ""
        return (
            f"{self.name}: not smoothed: {len(left)} of {wanted} quantized modules, whose inputs are made by nothing "
            f"that a scale can be moved into: {', '.join(left[:NAMED])}{', ...' if len(left) > NAMED else ''}"
        )


@dataclass(frozen=True)
class LayerDone:
    """A layer is written to every variant."""

    index: int
    total: int
    name: str
    resumed: bool
    modules: Mapping[str, tuple[ModuleReport, ...]]  # by variant


@dataclass(frozen=True)
class QuantizeReport:
    """What a quantizing run made."""

    variants: tuple[VariantReport, ...]
    directories: tuple[str, ...]
    rows: UsedRows | None = None  # that it was calibrated on

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def variant_report(name: str, modules: list[ModuleReport], partial: Path) -> VariantReport:
    """Of a variant whose files lie in `partial`."""
    rates: dict[str, float] = {}
    for role in ("layer", "head"):
        counted = [m for m in modules if m.quantized and role_of(m.module) == role]
        if counted:
            rates[role] = 8 * sum(m.size_bytes for m in counted) / sum(m.weights for m in counted)
    shards = [read_safetensors_header(shard)[0] for shard in partial.glob("stage-*.safetensors")]
    total = sum(info.size_bytes for tensors in shards for info in tensors.values())
    return VariantReport(name, tuple(modules), rates.get("layer", 0.0), rates.get("head"), total)


def read_report(path: Path) -> VariantReport:
    """That of a finished variant's quantize_report.json."""
    found = read_json(path)["variant"]
    return VariantReport(**{**found, "modules": tuple(ModuleReport(**entry) for entry in found["modules"])})
