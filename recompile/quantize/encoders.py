"""What `model_quantize` can make: one encoder a format, each serving all bitrates of a run from one Hessian."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.module_names import role_of
from recompile.errors import FormatError
from recompile.formats import exl2, exl3, packed_int
from recompile.formats.compressed_tensors import merged_config
from recompile.formats.packed_int import IntScheme
from recompile.quantize.encoder import Encoded
from recompile.quantize.gptq import ActOrder, QuantizedWeight, quantize_gptq
from recompile.quantize.int_grids import GridMethod, fit_grid, quantize_to_grid
from recompile.quantize.quantize_report import VariantReport
from recompile.quantize.two_sided import OutputSource, improve_integers

METHODS = ("rtn", "mse", "gptq")
EXL_FORMATS = (exl2.FORMAT, exl3.FORMAT)
EXL_HEAD_BITS = 6  # of the output head in EXL2 and EXL3, as their own converters have it


def variant_name(bits: float) -> str:
    """ "3bpw", "2.5bpw": the directory of the variant at this nominal bitrate."""
    return f"{bits:g}bpw"


def rounding_of(outputs: OutputSource | None) -> dict[str, Any]:
    """What an encoder's description says of two-sided rounding: nothing without it, so that older journals go on."""
    return {} if outputs is None else {"rounding": "two-sided", "statistics": outputs.fingerprint}


def _split_rows(stacked: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(weights, stacked.split([len(weight) for weight in weights.values()]), strict=True))


@dataclass(frozen=True)
class IntEncoder:
    """compressed-tensors `pack-quantized` integers."""

    bits: Sequence[int]
    group_size: int | None = 64
    symmetric: bool = True
    method: str = "gptq"
    importance: bool = True
    damping: float = 0.01
    act_order: ActOrder = "static"
    scale_dtype: torch.dtype = torch.bfloat16
    head_bits: int | None = None  # of the output head in every variant, where it is quantized at all
    outputs: OutputSource | None = None  # with it, GPTQ is followed by two-sided rounding where that is better

    def __post_init__(self) -> None:
        if self.outputs is not None and (self.method != "gptq" or self.act_order != "static"):
            raise FormatError("two-sided rounding: goes with method gptq and act_order static")
        if self.method not in METHODS:
            raise FormatError(f"method: found {self.method!r}, wanted one of {', '.join(METHODS)}")
        for bits in (*self.bits, *([self.head_bits] if self.head_bits is not None else [])):
            if bits != int(bits) or not 2 <= bits <= 8:
                raise FormatError(f"bits: found {bits:g}, compressed-tensors integers have 2 to 8 whole bits")

    @property
    def names(self) -> list[str]:
        return [variant_name(bits) for bits in self.bits]

    @property
    def grid_method(self) -> GridMethod:
        """How grids are fitted where GPTQ does not run."""
        return "rtn" if self.method == "rtn" else "mse"

    def schemes(self, role: str) -> list[IntScheme]:
        """The scheme of each variant for modules of a role ("layer", "head")."""
        rates = [self.head_bits or bits if role == "head" else bits for bits in self.bits]
        return [IntScheme(int(rate), self.group_size, self.symmetric) for rate in rates]

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        if self.group_size is not None and shape[1] % self.group_size:
            return f"group size {self.group_size} does not divide its {shape[1]} columns, kept dense"
        return None

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        stacked = torch.cat(list(weights.values()))
        schemes = self.schemes(role_of(next(iter(weights))))
        made = self._quantize(stacked, hessian, schemes)
        notes: list[dict[str, str]] = [{} for _ in made]
        if self.outputs is not None and hessian is not None:
            made, notes = improve_integers(weights, hessian, made, self.outputs, self.damping)
        return self._pack(made, weights, biases, notes)

    def round(self, module: str, weight: Tensor, importance: Tensor | None) -> list[Encoded]:
        """For each variant, one module on fitted grids without GPTQ; importance [in] or None, as fit_grid takes it."""
        rounded = self._round(weight, importance, self.schemes(role_of(module)))
        return [made[module] for made in self._pack(rounded, {module: weight}, {})]

    def _pack(
        self,
        variants: Sequence[QuantizedWeight],
        weights: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        notes: Sequence[Mapping[str, str]] = (),
    ) -> list[dict[str, Encoded]]:
        """The parts of the modules whose weights were stacked; notes: for every variant, of its modules."""
        made = []
        for number, quantized in enumerate(variants):
            codes = _split_rows(quantized.codes, weights)
            scales = _split_rows(quantized.grid.scale, weights)
            zeros = quantized.grid.zero_point
            zero_points = _split_rows(zeros, weights) if zeros is not None else {}
            variant = {}
            for name in weights:
                parts = packed_int.pack(
                    codes[name], scales[name], zero_points.get(name), quantized.scheme, self.scale_dtype
                )
                dense = packed_int.dequantize(parts, quantized.scheme, module=name)
                if name in biases:
                    parts["bias"] = biases[name]
                variant[name] = Encoded(parts, dense, notes[number].get(name, "") if notes else "")
            made.append(variant)
        return made

    def _quantize(self, stacked: Tensor, hessian: Tensor | None, schemes: Sequence[IntScheme]) -> list[QuantizedWeight]:
        if self.method == "gptq" and hessian is not None:
            return quantize_gptq(
                stacked,
                hessian,
                schemes,
                damping=self.damping,
                importance=self.importance,
                act_order=self.act_order,
                scale_dtype=self.scale_dtype,
            )
        diagonal = hessian.diagonal() if hessian is not None and self.importance else None
        return self._round(stacked, diagonal, schemes)

    def _round(self, stacked: Tensor, diagonal: Tensor | None, schemes: Sequence[IntScheme]) -> list[QuantizedWeight]:
        quantized = []
        for scheme in schemes:
            grid = fit_grid(stacked, scheme, self.grid_method, diagonal, self.scale_dtype)
            quantized.append(QuantizedWeight(quantize_to_grid(stacked, grid, scheme), grid, scheme))
        return quantized

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored

    def config_group(self, role: str, variant: int) -> dict[str, Any]:
        """The config group of modules of a role in one variant."""
        return {
            "format": packed_int.FORMAT,
            "weights": self.schemes(role)[variant].to_config(),
            "input_activations": None,
            "output_activations": None,
        }

    def quantization_config(self, variant: int, report: VariantReport, dense: Sequence[str]) -> dict[str, Any]:
        groups = {role: self.config_group(role, variant) for role in ("layer", "head")}
        quantized = [module.module for module in report.modules if module.quantized]
        schemes = [(name, groups["head" if role_of(name) == "head" else "layer"]) for name in quantized]
        return merged_config({}, schemes, dense, [*quantized, *dense])

    def description(self) -> dict[str, Any]:
        return {
            "format": packed_int.FORMAT,
            "bits": [int(bits) for bits in self.bits],
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "method": self.method,
            "importance": self.importance,
            "damping": self.damping,
            "act_order": self.act_order,
            "scale_dtype": str(self.scale_dtype),
            "head_bits": self.head_bits,
            **rounding_of(self.outputs),
        }


@dataclass(frozen=True)
class Exl2Encoder:
    """EXL2; bitrates may be fractional. The head, where asked for, has a bitrate of its own."""

    bits: Sequence[float]
    head_bits: int | None = EXL_HEAD_BITS
    rows: int = 0
    row_tokens: int = 0
    method: str = "gptq"
    damping: float = 0.12
    outputs: OutputSource | None = None  # with it, GPTQ is followed by two-sided rounding where that is better

    @property
    def names(self) -> list[str]:
        return [variant_name(bits) for bits in self.bits]

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        return f"EXL2 needs columns in multiples of 32, it has {shape[1]}; kept dense" if shape[1] % 32 else None

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        from recompile.quantize.exl2 import layout_for_bits, quantize_exl2_many

        made: list[dict[str, Encoded]] = [{} for _ in self.bits]
        for name, weight in weights.items():
            rates = [float(self.head_bits or b) if role_of(name) == "head" else float(b) for b in self.bits]
            layouts = [layout_for_bits(rate, weight.shape[1], weight.shape[0]) for rate in rates]
            used = hessian if self.method == "gptq" else None
            outputs = self.outputs.of(name, weight.device) if self.outputs is not None else None
            notes: list[str] = []
            try:
                found = quantize_exl2_many(weight, used, layouts, biases.get(name), self.damping, outputs, notes)
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from error
            for variant, parts in enumerate(found):
                dense = exl2.dequantize(parts, module=name)[: len(weight)]
                made[variant][name] = Encoded(parts, dense, notes[variant] if notes else "")
        return made

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return torch.float16

    def quantization_config(self, variant: int, report: VariantReport, dense: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": exl2.FORMAT,
            "version": "0.3.2",
            "bits": float(self.bits[variant]),
            "head_bits": self.head_bits or 16,
            "calibration": {"rows": self.rows, "length": self.row_tokens, "dataset": "(default)"},
        }

    def description(self) -> dict[str, Any]:
        return {
            "format": exl2.FORMAT,
            "bits": [float(bits) for bits in self.bits],
            "head_bits": self.head_bits,
            "method": self.method,
            "damping": self.damping,
            **rounding_of(self.outputs),
        }


@dataclass(frozen=True)
class Exl3Encoder:
    """EXL3; whole bits 1 to 8, and 1.5, 2.5, 3.5 with the mul1 codebook."""

    bits: Sequence[float]
    head_bits: int | None = EXL_HEAD_BITS
    codebook: str = "mul1"
    rows: int = 0
    row_tokens: int = 0
    method: str = "gptq"
    outputs: OutputSource | None = None  # with it, LDLQ is followed by a two-sided search, kept where that is better

    def __post_init__(self) -> None:
        for bits in self.bits:
            if bits not in (1, 2, 3, 4, 5, 6, 7, 8) and not (bits in (1.5, 2.5, 3.5) and self.codebook == "mul1"):
                raise FormatError(
                    f"bits: found {bits:g}; EXL3 has whole bits 1 to 8, and 1.5, 2.5, 3.5 with the mul1 codebook"
                )

    @property
    def names(self) -> list[str]:
        return [variant_name(bits) for bits in self.bits]

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        return None  # the format pads

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        from recompile.quantize.exl3 import quantize_exl3

        made: list[dict[str, Encoded]] = [{} for _ in self.bits]
        for name, weight in weights.items():
            outputs = self.outputs.of(name, weight.device) if self.outputs is not None else None
            for variant, bits in enumerate(self.bits):
                rate = self.head_bits or bits if role_of(name) == "head" else bits
                notes: list[str] = []
                parts = quantize_exl3(
                    weight,
                    hessian if self.method == "gptq" else None,
                    int(rate) if rate == int(rate) else rate,
                    codebook=self.codebook,
                    seed=zlib.crc32(name.encode()),  # every module its own signs, the same in every run
                    bias=biases.get(name),
                    outputs=outputs,
                    notes=notes,
                )
                dense = exl3.dequantize(parts, module=name)[: weight.shape[0], : weight.shape[1]]
                made[variant][name] = Encoded(parts, dense, notes[0] if notes else "")
        return made

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return torch.float16 if stored == torch.float32 else stored

    def quantization_config(self, variant: int, report: VariantReport, dense: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": exl3.FORMAT,
            "version": "1.4.1",
            "bits": float(self.bits[variant]),
            "head_bits": self.head_bits or 16,
            "calibration": {"rows": self.rows, "cols": self.row_tokens},
            "out_scales": "always",
            "codebook": self.codebook,
        }

    def description(self) -> dict[str, Any]:
        return {
            "format": exl3.FORMAT,
            "bits": list(self.bits),
            "head_bits": self.head_bits,
            "codebook": self.codebook,
            "method": self.method,
            **rounding_of(self.outputs),
        }
