"""compressed-tensors variants of any scheme, or of several in one variant: what `model_quantize --scheme` makes.

A variant is a list of rules: the first whose targets match a module says its scheme and method, as the modifiers of a
recipe do. One Hessian per input serves all variants. Scaling rules (AWQ, SmoothQuant) act before the rounding, for all
maps that read one norm or one other map at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.module_names import role_of
from recompile.costs import ROUTERS, fused_sets
from recompile.errors import FormatError
from recompile.formats import COMPRESSED, FORMATS, packed_int
from recompile.formats.compressed_tensors import merged_config
from recompile.formats.packed_int import IntScheme
from recompile.formats.schemes import Scheme
from recompile.io.patterns import Regex, compile_regex
from recompile.quantize.calibrate import InputStatistics
from recompile.quantize.encoder import Encoded
from recompile.quantize.float_grids import E2M1_MAX, E4M3_MAX, LevelGrid, fit_levels, global_scale
from recompile.quantize.gptq import QuantizedWeight, quantize_gptq
from recompile.quantize.gptq_float import round_gptq
from recompile.quantize.int_grids import (
    GridMethod,
    dequantize_codes,
    fit_grid,
    normalise_importance,
    quantize_to_grid,
)
from recompile.quantize.quantize_report import VariantReport
from recompile.quantize.smoothing_mappings import Fold
from recompile.quantize.smoothing_scales import SCALINGS, awq_scale, smoothquant_scale
from recompile.quantize.two_sided import OutputSource, improve_integers, improve_levels

METHODS = ("rtn", "mse", "gptq")
SCALED_METHODS = tuple(name for scaling in SCALINGS for name in (scaling, *(f"{scaling}+{how}" for how in METHODS)))


@dataclass(frozen=True)
class SchemeRule:
    """Which modules get a scheme, and how their numbers are found. scheme None: they stay dense.

    targets: globs over module names, `re:` patterns (matched from the start), or "Linear" for all
    """

    scheme: Scheme | None
    method: str = "gptq"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise FormatError(f"method: found {self.method!r}, wanted one of {', '.join(METHODS)}")
        for target in (*self.targets, *self.ignore):
            _pattern(target)

    def matches(self, module: str) -> bool:
        return _any_matches(self.targets, module) and not _any_matches(self.ignore, module)


@dataclass(frozen=True)
class ScalingRule:
    """Which modules' inputs are scaled, and how. targets, ignore: as in SchemeRule.

    strength: SmoothQuant's alpha; 0.5 as in the paper
    """

    method: str
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    strength: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in SCALINGS:
            raise FormatError(f"scaling: found {self.method!r}, wanted one of {', '.join(SCALINGS)}")
        if not 0 <= self.strength <= 1:
            raise FormatError(f"strength: found {self.strength}, wanted 0 to 1")
        for target in (*self.targets, *self.ignore):
            _pattern(target)

    def matches(self, module: str) -> bool:
        return _any_matches(self.targets, module) and not _any_matches(self.ignore, module)


@dataclass(frozen=True)
class SchemeVariant:
    """One directory. Modules that no rule matches stay dense; inputs that no scaling matches are not scaled."""

    name: str
    rules: tuple[SchemeRule, ...]
    scalings: tuple[ScalingRule, ...] = ()
    origin: str = field(default="", compare=False)  # the file that says so, for messages

    def rule_of(self, module: str) -> SchemeRule | None:
        return next((rule for rule in self.rules if rule.matches(module)), None)

    def scaling_of(self, module: str) -> ScalingRule | None:
        return next((rule for rule in self.scalings if rule.matches(module)), None)


def split_method(method: str) -> tuple[str | None, str]:
    """(scaling, rounding) of a method's name: "gptq" -> (None, "gptq"), "awq" -> ("awq", "mse"), "awq+gptq"."""
    scaling, _, rounding = method.rpartition("+")
    if scaling in SCALINGS and rounding in METHODS:
        return scaling, rounding
    if method in SCALINGS:
        return method, "mse"
    if method in METHODS:
        return None, method
    raise FormatError(f"method: found {method!r}, wanted one of {', '.join((*METHODS, *SCALED_METHODS))}")


def uniform(scheme: Scheme, method: str = "gptq") -> SchemeVariant:
    """All linear maps of the layers in one scheme."""
    scaling, rounding = split_method(method)
    return SchemeVariant(scheme.name, (SchemeRule(scheme, rounding),), (ScalingRule(scaling),) if scaling else ())


@lru_cache(maxsize=1024)
def _pattern(target: str) -> Regex:
    if target.startswith("re:"):
        return compile_regex(target[3:], f"target {target[:100]!r}")
    if target == "Linear":
        target = "*"
    return compile_regex(".*".join(re.escape(piece) for piece in target.split("*")) + "$", f"target {target[:100]!r}")


def _any_matches(targets: Sequence[str], module: str) -> bool:
    return any(_pattern(target).match(module) for target in targets)


@dataclass(frozen=True)
class _Job:
    """Modules of one input that one variant makes in one scheme."""

    variant: int
    scheme: Scheme
    method: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class SchemeEncoder:
    """An Encoder (see pipeline.py) of compressed-tensors variants."""

    variants: tuple[SchemeVariant, ...]
    importance: bool = True
    damping: float = 0.01
    scale_dtype: torch.dtype = torch.bfloat16
    head_scheme: Scheme | None = None  # of the output head in every variant, where it is quantized at all
    outputs: OutputSource | None = None  # with it, GPTQ is followed by two-sided rounding where that is better

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise FormatError(f"{next(name for name in names if names.count(name) > 1)} is given twice")

    @property
    def names(self) -> list[str]:
        return [variant.name for variant in self.variants]

    def rule_of(self, variant: int, module: str) -> SchemeRule | None:
        found = self.variants[variant].rule_of(module)
        if role_of(module) != "head":
            return found
        return SchemeRule(self.head_scheme, found.method if found else "gptq") if self.head_scheme else None

    @property
    def scales_inputs(self) -> bool:
        return any(variant.scalings for variant in self.variants)

    def only(self, variants: Sequence[int]) -> SchemeEncoder:
        return replace(self, variants=tuple(self.variants[number] for number in variants))

    def scale_of(
        self,
        variant: int,
        fold: Fold,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, InputStatistics],
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """float32 [channels] that divides what the fold's producer gives; None where no rule asks for one.

        AWQ's is searched for the schemes that the consumers get; SmoothQuant scales what norms give only. Raises
        FormatError where rules ask for different scalings of one norm's readers.
        """
        found = {name: self.variants[variant].scaling_of(name) for name in fold.consumers}
        rules = {rule: name for name, rule in found.items() if rule is not None}
        kinds = {(rule.method, rule.strength): name for rule, name in rules.items()}
        if not kinds:
            return None
        if len(kinds) > 1:
            listed = ", ".join(f"{method} for {name}" for (method, _), name in kinds.items())
            raise FormatError(
                f"{self.variants[variant].name}: maps that read {fold.producer} have one scale, and the recipe asks "
                f"for several ({listed}); give all of them one modifier"
            )
        ((method, strength),) = kinds
        if method == "smoothquant":
            scale = smoothquant_scale(fold, weights, statistics, strength) if fold.from_norm else None
            return None if scale is None else finish(scale)
        rounded = {name: value for name, value in weights.items() if self._scheme_in(variant, name, value) is not None}
        if not rounded:
            return None
        counted = replace(fold, consumers=tuple(rounded))
        chosen = awq_scale(counted, rounded, statistics, lambda name, w: self._nearest(variant, name, w), finish)
        return None if chosen is None or chosen.exponent == 0 else chosen.scale

    def _scheme_in(self, variant: int, name: str, weight: Tensor) -> Scheme | None:
        if name.rpartition(".")[2] in ROUTERS or self.why_not_in(variant, name, (weight.shape[0], weight.shape[1])):
            return None
        rule = self.rule_of(variant, name)
        return rule.scheme if rule else None

    def _nearest(self, variant: int, name: str, weight: Tensor) -> Tensor:
        """A weight [out, in] rounded to nearest in its scheme, decoded."""
        scheme = self._scheme_in(variant, name, weight)
        assert scheme is not None, name
        if not scheme.is_packed_integer:
            grid = fit_levels(weight, scheme, "rtn", None, self.scale_dtype)
            return grid.round(weight) * grid.spread(weight.shape[1])
        integers = IntScheme.from_config(scheme.weights)
        fitted = fit_grid(weight, integers, "rtn", None, self.scale_dtype)
        return dequantize_codes(quantize_to_grid(weight, fitted, integers), fitted, integers)

    def why_not_in(self, variant: int, module: str, shape: tuple[int, int]) -> str | None:
        """Why a module stays dense in one variant."""
        rule = self.rule_of(variant, module)
        if rule is None or rule.scheme is None:
            return f"no rule of {self.variants[variant].origin or 'the variant'} takes it, kept dense"
        return rule.scheme.why_not(shape)

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        reasons = [self.why_not_in(number, module, shape) for number in range(len(self.variants))]
        return next(iter(reasons)) if all(reasons) else None

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        return self.encode_observed(weights, hessian, biases, None)

    def encode_observed(
        self,
        weights: Mapping[str, Tensor],
        hessian: Tensor | None,
        biases: Mapping[str, Tensor],
        largest: Tensor | None,
    ) -> list[dict[str, Encoded]]:
        """As `encode`; largest: [in] the largest |x| of every input, for schemes that store a scale of their inputs.

        A module that a variant keeps dense is missing from that variant's result."""
        made: list[dict[str, Encoded]] = [{} for _ in self.variants]
        jobs = [job for number in range(len(self.variants)) for job in self._jobs(number, weights)]
        for modules in dict.fromkeys(job.modules for job in jobs):
            mine = [job for job in jobs if job.modules == modules]
            own = {name: weights[name] for name in modules}
            notes: list[dict[str, str]] = [{} for _ in mine]  # of two-sided rounding
            for job, parts, of_job in zip(mine, self._parts(own, hessian, mine, notes), notes, strict=True):
                for name, found in parts.items():
                    encoded = _finish(name, found, job.scheme, biases.get(name), largest)
                    made[job.variant][name] = replace(encoded, rounding=of_job.get(name, ""))
        return made

    def _jobs(self, variant: int, weights: Mapping[str, Tensor]) -> list[_Job]:
        members: dict[tuple[str, str], list[str]] = {}
        schemes: dict[str, Scheme] = {}
        for name, weight in weights.items():
            rule = self.rule_of(variant, name)
            if (
                rule is None
                or rule.scheme is None
                or self.why_not_in(variant, name, (weight.shape[0], weight.shape[1]))
            ):
                continue
            schemes[rule.scheme.name] = rule.scheme
            members.setdefault((rule.scheme.name, rule.method), []).append(name)
        return [_Job(variant, schemes[name], method, tuple(found)) for (name, method), found in members.items()]

    def _parts(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, jobs: Sequence[_Job], notes: list[dict[str, str]]
    ) -> list[dict[str, dict[str, Tensor]]]:
        """For every job, the stored parts of its modules, which are all of `weights`; fills `notes`, a dict a job.

        Rounding is two-sided only where weights are not scaled: their outputs' gradients were measured unscaled."""
        plain = [n for n, job in enumerate(jobs) if not self.variants[job.variant].scalings]
        stacked = torch.cat(list(weights.values())).float()
        sizes = [len(weight) for weight in weights.values()]
        made: list[dict[str, dict[str, Tensor]]] = [{} for _ in jobs]
        integers = [n for n, job in enumerate(jobs) if job.scheme.is_packed_integer]
        quantized = self._quantize_integers(stacked, hessian, [jobs[n] for n in integers])
        if self.outputs is not None and hessian is not None:
            chosen = [at for at, n in enumerate(integers) if n in plain and jobs[n].method == "gptq"]
            better, of_jobs = improve_integers(
                weights, hessian, [quantized[at] for at in chosen], self.outputs, self.damping
            )
            for at, improved, of_job in zip(chosen, better, of_jobs, strict=True):
                quantized[at] = improved
                notes[integers[at]] |= of_job
        for n, found in zip(integers, quantized, strict=True):
            zeros = found.grid.zero_point
            pieces = zip(
                weights,
                found.codes.split(sizes),
                found.grid.scale.split(sizes),
                zeros.split(sizes) if zeros is not None else [None] * len(sizes),
                strict=True,
            )
            for name, codes, scale, zero in pieces:
                made[n][name] = packed_int.pack(codes, scale, zero, found.scheme, self.scale_dtype)
        others = [n for n, job in enumerate(jobs) if not job.scheme.is_packed_integer]
        grids = [self._fit(weights, hessian, jobs[n]) for n in others]
        with_gptq = [at for at, n in enumerate(others) if jobs[n].method == "gptq" and hessian is not None]
        rounded: dict[int, Tensor] = {}
        if hessian is not None and with_gptq:
            joined = [_join(list(grids[at].values())) for at in with_gptq]
            rounded = dict(zip(with_gptq, round_gptq(stacked, hessian, joined, self.damping), strict=True))
            chosen = [at for at in with_gptq if others[at] in plain]
            if self.outputs is not None and chosen:
                found_levels, of_jobs = improve_levels(
                    weights,
                    hessian,
                    [grids[at] for at in chosen],
                    [rounded[at] for at in chosen],
                    self.outputs,
                    self.damping,
                )
                for at, levels_of, of_job in zip(chosen, found_levels, of_jobs, strict=True):
                    rounded[at] = levels_of
                    notes[others[at]] |= of_job
        for at, n in enumerate(others):
            levels = rounded[at].split(sizes) if at in rounded else None
            for number, (name, grid) in enumerate(grids[at].items()):
                made[n][name] = grid.pack(levels[number] if levels else grid.round(weights[name]))
        return made

    def _quantize_integers(
        self, stacked: Tensor, hessian: Tensor | None, jobs: Sequence[_Job]
    ) -> list[QuantizedWeight]:
        schemes = [IntScheme.from_config(job.scheme.weights) for job in jobs]
        with_gptq = [n for n, job in enumerate(jobs) if job.method == "gptq" and hessian is not None]
        made: dict[int, QuantizedWeight] = {}
        if hessian is not None and with_gptq:
            found = quantize_gptq(
                stacked,
                hessian,
                [schemes[n] for n in with_gptq],
                damping=self.damping,
                importance=self.importance,
                act_order="static",
                scale_dtype=self.scale_dtype,
            )
            made = dict(zip(with_gptq, found, strict=True))
        diagonal = hessian.diagonal() if hessian is not None and self.importance else None
        for n, job in enumerate(jobs):
            if n not in made:
                fit: GridMethod = "rtn" if job.method == "rtn" else "mse"
                grid = fit_grid(stacked, schemes[n], fit, diagonal, self.scale_dtype)
                made[n] = QuantizedWeight(quantize_to_grid(stacked, grid, schemes[n]), grid, schemes[n])
        return [made[n] for n in range(len(jobs))]

    def _fit(self, weights: Mapping[str, Tensor], hessian: Tensor | None, job: _Job) -> dict[str, LevelGrid]:
        """A grid a module. Modules that engines fuse share nvfp4's global scale."""
        first = next(iter(weights.values()))
        diagonal = hessian.diagonal() if hessian is not None and self.importance else None
        column_weight = normalise_importance(diagonal, first.shape[1], first.device)
        whole: dict[str, Tensor] = {}
        if job.scheme.has_global_scale:
            for members in fused_sets(weights):
                whole |= dict.fromkeys(members, global_scale([weights[name] for name in members]))
        return {
            name: fit_levels(
                weight,
                job.scheme,
                "rtn" if job.method == "rtn" else "mse",
                column_weight,
                self.scale_dtype,
                whole.get(name),
            )
            for name, weight in weights.items()
        }

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return stored

    def config_group(self, module: str, variant: int) -> dict[str, Any]:
        """The config group of a quantized module in one variant."""
        rule = self.rule_of(variant, module)
        assert rule is not None, module
        assert rule.scheme is not None, module
        return rule.scheme.group()

    def quantization_config(self, variant: int, report: VariantReport, dense: Sequence[str]) -> dict[str, Any]:
        quantized = [module.module for module in report.modules if module.quantized]
        groups = {name: self.config_group(name, variant) for name in quantized}
        return merged_config({}, groups.items(), dense, [*quantized, *dense])

    def description(self) -> dict[str, Any]:
        return {
            "format": COMPRESSED,
            "variants": {
                variant.name: [
                    {
                        "targets": list(rule.targets),
                        "ignore": list(rule.ignore),
                        "scheme": rule.scheme.name if rule.scheme else None,
                        "method": rule.method,
                    }
                    for rule in variant.rules
                ]
                for variant in self.variants
            },
            **(
                {
                    "scalings": {
                        variant.name: [
                            {
                                "method": rule.method,
                                "targets": list(rule.targets),
                                "ignore": list(rule.ignore),
                                "strength": rule.strength,
                            }
                            for rule in variant.scalings
                        ]
                        for variant in self.variants
                    }
                }
                if self.scales_inputs
                else {}
            ),
            "importance": self.importance,
            "damping": self.damping,
            "scale_dtype": str(self.scale_dtype),
            "head_scheme": self.head_scheme.name if self.head_scheme else None,
            **({"rounding": "two-sided", "statistics": self.outputs.fingerprint} if self.outputs is not None else {}),
        }


def _join(grids: Sequence[LevelGrid]) -> LevelGrid:
    """One grid over the rows of several."""
    return replace(grids[0], factor=torch.cat([grid.factor for grid in grids]), scales={})


def _finish(
    name: str, parts: dict[str, Tensor], scheme: Scheme, bias: Tensor | None, largest: Tensor | None
) -> Encoded:
    """The module as stored, with what a reader decodes it to."""
    code = FORMATS[scheme.format].load_code()
    dense = code.dequantize(parts, code.read_scheme(scheme.weights), module=name)
    parts = {**parts, **_input_scales(name, scheme, largest)}
    if bias is not None:
        parts["bias"] = bias
    return Encoded(parts, dense)


def _input_scales(name: str, scheme: Scheme, largest: Tensor | None) -> dict[str, Tensor]:
    """Stored scales of the inputs: one a tensor for static schemes, nvfp4's global one."""
    inputs = scheme.input_activations
    if inputs is None or inputs["dynamic"] is True:
        return {}
    if largest is None:
        raise FormatError(
            f"{name}: {scheme.name} stores a scale of the module's inputs, and no calibration row gave any"
        )
    top = largest.float().max().reshape(1).clamp(min=torch.finfo(torch.float32).tiny)
    if inputs["strategy"] == "tensor_group":
        return {"input_global_scale": E4M3_MAX * E2M1_MAX / top}
    return {"input_scale": top / (E4M3_MAX if inputs["type"] == "float" else 127.5)}
