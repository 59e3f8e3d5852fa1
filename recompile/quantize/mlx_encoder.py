"""MLX variants: what `model_quantize --format mlx` makes. Writing them needs no mlx.

Affine grids have fitted scales and biases (affine_grids.py), which GPTQ and two-sided rounding then round on; mxfp4,
mxfp8 and nvfp4 are the small floats of float_grids.py, nvfp4 with 8-bit scales alone, as MLX has no scale above them.
As mlx-lm has it, embeddings and the output head are quantized with everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, dense_dtype
from recompile.checkpoint.module_names import head_in, role_of
from recompile.errors import ArgumentError, FormatError
from recompile.formats import fp4, mlx, mlx_config, mx
from recompile.formats.mlx_config import MODES, MlxScheme
from recompile.formats.packed_int import IntScheme
from recompile.formats.schemes import parse_scheme
from recompile.model.roles import roles_of
from recompile.quantize.affine_grids import AffineGrid, fit_affine
from recompile.quantize.encoders import METHODS, rounding_of, variant_name
from recompile.quantize.float_grids import LevelGrid, fit_levels
from recompile.quantize.gptq import QuantizedWeight, quantize_gptq
from recompile.quantize.gptq_float import round_gptq
from recompile.quantize.int_grids import normalise_importance, quantize_to_grid
from recompile.quantize.pipeline import Encoded, VariantReport
from recompile.quantize.two_sided import OutputSource, improve_integers, improve_levels

FLOAT_MODES = tuple(mode for mode in MODES if mode != "affine")
_SCALE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_AFFINE_GROUPS = MODES["affine"][1]


def check_base(base: Checkpoint) -> None:
    """Raises FormatError for a model whose tensors mlx-lm does not keep, naming those that it keeps."""
    model_type = base.config.get("model_type")
    if not mlx_config.is_known(base.config):
        raise FormatError(
            f"{base.label}: mlx-lm may rename, stack or change the tensors of model_type {str(model_type)[:60]!r}; MLX "
            f"builds are made of {', '.join(sorted(mlx_config.KNOWN_TYPES))}"
        )


def scale_dtype_of(base: Checkpoint) -> torch.dtype:
    """What MLX holds scales and biases in: the dtype of the model."""
    return _SCALE_DTYPES.get(dense_dtype(base.modules.values()), torch.float32)


def embeddings_of(base: Checkpoint) -> tuple[str, ...]:
    """The names of the text model's embeddings, which mlx-lm quantizes as it does maps."""
    roles = roles_of(base)
    return tuple(
        name
        for name, module in base.modules.items()
        if roles[name].kind == "embedding" and roles[name].part == "text" and len(module.shape or ()) == 2
    )


def stores_head(base: Checkpoint) -> bool:
    """Whether the output head has a weight of its own; a tied one is the embedding, as MLX stores it."""
    return not base.config.get("tie_word_embeddings") and head_in(base.modules) is not None


def affine(bits: float, group_size: str) -> MlxScheme:
    """Raises ArgumentError for a group size, FormatError for bits, that MLX does not have."""
    if group_size not in map(str, _AFFINE_GROUPS):
        raise ArgumentError(f"{{group_size}} {group_size}: MLX has {', '.join(map(str, _AFFINE_GROUPS))}")
    return MlxScheme(int(bits) if bits == int(bits) else bits, int(group_size))  # type: ignore[arg-type]


def float_mode(name: str) -> MlxScheme:
    """The scheme of a mode that has one. Raises ArgumentError for another name."""
    if name not in FLOAT_MODES:
        raise ArgumentError(f"{{scheme}} {name}: MLX has {', '.join(FLOAT_MODES)}; affine integers go by {{bits}}")
    (bits,), (group_size,), _ = MODES[name]
    return MlxScheme(bits, group_size, name)


@dataclass(frozen=True, eq=False)
class MlxEncoder:
    """One scheme a variant; the head may have affine bits of its own."""

    variants: tuple[MlxScheme, ...]
    base_config: Mapping[str, Any]
    embeddings: tuple[str, ...] = ()  # that are quantized like all else
    method: str = "gptq"
    importance: bool = True
    scale_dtype: torch.dtype = torch.bfloat16
    head: MlxScheme | None = None
    damping: float = 0.01
    outputs: OutputSource | None = None  # with it, GPTQ is followed by two-sided rounding where that is better

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise FormatError(f"method: found {self.method!r}, wanted one of {', '.join(METHODS)}")
        if self.outputs is not None and self.method != "gptq":
            raise FormatError("two-sided rounding: goes with method gptq")

    @property
    def names(self) -> list[str]:
        return [variant_name(scheme.bits) if scheme.mode == "affine" else scheme.mode for scheme in self.variants]

    def scheme_of(self, module: str, variant: int) -> MlxScheme:
        return self.head if self.head is not None and role_of(module) == "head" else self.variants[variant]

    def why_not_in(self, variant: int, module: str, shape: tuple[int, int]) -> str | None:
        """Why a module stays dense in one variant: its groups do not divide it, or mlx-lm would round it anew."""
        if mlx_config.stays_dense(self.base_config, module):
            return "mlx-lm splits it by heads and would round it anew, kept dense"
        group_size = self.scheme_of(module, variant).group_size
        return (
            f"groups of {group_size} do not divide its {shape[1]} columns, kept dense"
            if shape[1] % group_size
            else None
        )

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        reasons = [self.why_not_in(number, module, shape) for number in range(len(self.variants))]
        return reasons[0] if all(reasons) else None

    def encode_observed(
        self,
        weights: Mapping[str, Tensor],
        hessian: Tensor | None,
        biases: Mapping[str, Tensor],
        largest: Tensor | None,
    ) -> list[dict[str, Encoded]]:
        """As `encode`: MLX stores nothing of inputs."""
        return self.encode(weights, hessian, biases)

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        """As `Encoder.encode`. A module that a variant keeps dense is missing from that variant's result."""
        name, first = next(iter(weights.items()))
        schemes = [self.scheme_of(name, number) for number in range(len(self.variants))]
        fitting = [number for number, scheme in enumerate(schemes) if first.shape[1] % scheme.group_size == 0]
        parts: dict[int, dict[str, dict[str, Tensor]]] = {}
        notes: dict[int, dict[str, str]] = {}
        for chosen, make in (
            ([n for n in fitting if schemes[n].mode == "affine"], self._integers),
            ([n for n in fitting if schemes[n].mode != "affine"], self._levels),
        ):
            found, said = make(weights, hessian, [schemes[n] for n in chosen])
            parts |= zip(chosen, found, strict=True)
            notes |= zip(chosen, said, strict=True)
        made: list[dict[str, Encoded]] = [{} for _ in self.variants]
        for number in fitting:
            for module, stored in parts[number].items():
                dense = mlx.dequantize(stored, schemes[number], module)
                bias = {"bias": biases[module]} if module in biases else {}
                made[number][module] = Encoded({**stored, **bias}, dense, notes[number].get(module, ""))
        return made

    # ---- the two kinds of grids --------------------------------------------------------------------------------------

    def _integers(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, schemes: Sequence[MlxScheme]
    ) -> tuple[list[dict[str, dict[str, Tensor]]], list[dict[str, str]]]:
        """For every scheme, the parts of every module and what two-sided rounding did."""
        if not schemes:
            return [], []
        stacked = torch.cat(list(weights.values())).float()
        diagonal = hessian.diagonal() if hessian is not None and self.importance else None
        fit = "rtn" if self.method == "rtn" else "mse"
        grids = [fit_affine(stacked, s.bits, s.group_size, fit, diagonal, self.scale_dtype) for s in schemes]  # type: ignore[arg-type]
        integers = [IntScheme(s.bits, s.group_size, symmetric=False) for s in schemes]
        whole = [grid.as_integers(scheme) for grid, scheme in zip(grids, integers, strict=True)]
        notes: list[dict[str, str]] = [{} for _ in schemes]
        if self.method == "gptq" and hessian is not None:
            made = quantize_gptq(stacked, hessian, integers, damping=self.damping, act_order="static", grids=whole)
            if self.outputs is not None:
                made, notes = improve_integers(weights, hessian, made, self.outputs, self.damping)
        else:
            made = [
                QuantizedWeight(quantize_to_grid(stacked, grid, scheme), grid, scheme)
                for grid, scheme in zip(whole, integers, strict=True)
            ]
        return [self._pack(weights, found, grid) for found, grid in zip(made, grids, strict=True)], notes

    def _pack(
        self, weights: Mapping[str, Tensor], made: QuantizedWeight, grid: AffineGrid
    ) -> dict[str, dict[str, Tensor]]:
        parts, stop = {}, 0
        for name, weight in weights.items():
            rows = slice(stop, stop + len(weight))
            stop = rows.stop
            codes = made.codes[rows].int() - made.scheme.code_min
            parts[name] = {
                "weight": mlx.pack_codes(codes, made.scheme.bits),
                "scales": grid.scale[rows].to(self.scale_dtype),
                "biases": grid.bias[rows].to(self.scale_dtype),
            }
        return parts

    def _levels(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, schemes: Sequence[MlxScheme]
    ) -> tuple[list[dict[str, dict[str, Tensor]]], list[dict[str, str]]]:
        """As `_integers`, for small floats."""
        if not schemes:
            return [], []
        stacked = torch.cat(list(weights.values())).float()
        diagonal = hessian.diagonal() if hessian is not None and self.importance else None
        column_weight = normalise_importance(diagonal, stacked.shape[1], stacked.device)
        fit = "rtn" if self.method == "rtn" else "mse"
        grids = [fit_small_floats(stacked, scheme.mode, fit, column_weight) for scheme in schemes]
        notes: list[dict[str, str]] = [{} for _ in schemes]
        if self.method == "gptq" and hessian is not None:
            levels = round_gptq(stacked, hessian, grids, self.damping)
            if self.outputs is not None:
                mine = [_by_module(weights, grid) for grid in grids]
                levels, notes = improve_levels(weights, hessian, mine, levels, self.outputs, self.damping)
        else:
            levels = [grid.round(stacked) for grid in grids]
        sizes = [len(weight) for weight in weights.values()]
        return [
            {
                name: {"weight": _level_codes(own, scheme.mode), "scales": scales.contiguous()}
                for name, own, scales in zip(
                    weights, found.split(sizes), grid.scales["scales"].split(sizes), strict=True
                )
            }
            for scheme, grid, found in zip(schemes, grids, levels, strict=True)
        ], notes

    # ---- what the pipeline asks --------------------------------------------------------------------------------------

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored

    def quantization_config(self, variant: int, report: VariantReport, dense: Sequence[str]) -> dict[str, Any]:
        return config_of(
            self.base_config,
            report,
            {m.module: self.scheme_of(m.module, variant) for m in report.modules if m.quantized},
        )

    def config_fields(self, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(mlx_config.KEYS, quantization) | mlx_config.loader_fields(config)

    def description(self) -> dict[str, Any]:
        return {
            "format": mlx_config.QUANT_METHOD,
            "variants": [scheme.entry() for scheme in self.variants],
            "head": self.head.entry() if self.head is not None else None,
            "method": self.method,
            "importance": self.importance,
            "damping": self.damping,
            "scale_dtype": str(self.scale_dtype),
            **rounding_of(self.outputs),
        }


def config_of(
    base_config: Mapping[str, Any], report: VariantReport, schemes: Mapping[str, MlxScheme]
) -> dict[str, Any]:
    """`quantization` of config.json for the quantized modules of a report."""
    return mlx_config.quantization_map(
        base_config, schemes, {module.module: module.weights for module in report.modules}
    )


def fit_small_floats(weight: Tensor, mode: str, method: str, column_weight: Tensor | None) -> LevelGrid:
    """The grid of a weight [O, I] in mxfp4, mxfp8 or nvfp4; its `scales` hold MLX's part "scales", uint8."""
    scheme = parse_scheme(mode)
    if mode != "nvfp4":
        grid = fit_levels(weight, scheme, method, column_weight)
        return LevelGrid(scheme, grid.factor, mx.GROUP_SIZE, {"scales": grid.scales["weight_scale"]})
    one = torch.ones(1, device=weight.device)  # MLX has no scale above those of the groups
    grid = fit_levels(weight, scheme, method, column_weight, whole=one, smallest=SMALLEST_E4M3)
    return LevelGrid(scheme, grid.factor, fp4.GROUP_SIZE, {"scales": grid.scales["weight_scale"].view(torch.uint8)})


SMALLEST_E4M3 = 2.0**-9  # above 0


def _by_module(weights: Mapping[str, Tensor], grid: LevelGrid) -> dict[str, LevelGrid]:
    factors = grid.factor.split([len(weight) for weight in weights.values()])
    return {
        name: LevelGrid(grid.scheme, factor, grid.columns, {}) for name, factor in zip(weights, factors, strict=True)
    }


def _level_codes(levels: Tensor, mode: str) -> Tensor:
    """[O, I] levels -> the uint32 words of MLX."""
    codes = levels.to(torch.float8_e4m3fn) if mode == "mxfp8" else fp4.pack_e2m1(levels)
    return codes.contiguous().view(torch.uint8).view(torch.uint32)
