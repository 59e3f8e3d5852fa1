"""A mix straight from the base: every module in the form that a recipe gives it, in one calibrated pass.

    sources:
      - {id: 3, bits: 3}
      - {id: 6, bits: 6}
      - {id: nvfp4, scheme: nvfp4}
    overrides:
      - {key: "*.v_proj.*", source: 6}
    base: {bits: 3}

What comes out equals, byte for byte, the mix of variants that were quantized on the same calibration rows: a module's
codes depend on its own weights and the inputs of the unquantized model alone. EXL2 and EXL3 are made so as well, from
sources like {id: 2.5, bits: 2.5, format: exl2}.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.checkpoint.module_names import role_of
from recompile.errors import RecipeError
from recompile.model.roles import roles_of
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.mlx_encoder import MlxEncoder, config_of
from recompile.quantize.scheme_encoder import SchemeEncoder
from recompile.recipe.recipe import Recipe, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recompile.quantize.encoder import Encoded, Encoder
    from recompile.quantize.quantize_report import VariantReport


@dataclass(frozen=True)
class MixEncoder:
    """An Encoder of one variant that asks another encoder for every module."""

    name: str  # of the directory
    encoders: Mapping[str, Encoder]  # of one variant each, by the name that `assignment` calls them
    assignment: Mapping[str, str]  # module -> encoder; what is not in it stays dense

    @property
    def names(self) -> list[str]:
        return [self.name]

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        if module not in self.assignment:
            return "a line of the recipe says dense, or none names it and there is no base: kept dense"
        return self.encoders[self.assignment[module]].why_not(module, shape)

    def why_not_in(self, variant: int, module: str, shape: tuple[int, int]) -> str | None:
        return self.why_not(module, shape)

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
        """As ObservingEncoder's: schemes may store a scale of their inputs."""
        made: dict[str, Encoded] = {}
        for key in dict.fromkeys(self.assignment[name] for name in weights):
            mine = {name: weight for name, weight in weights.items() if self.assignment[name] == key}
            encoder = self.encoders[key]
            if isinstance(encoder, SchemeEncoder):
                (encoded,) = encoder.encode_observed(mine, hessian, biases, largest)
            else:
                (encoded,) = encoder.encode(mine, hessian, biases)
            made |= encoded
        return [{name: made[name] for name in weights}]

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        return next(iter(self.encoders.values())).dense_dtype(stored)

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Embeddings that are quantized like all else."""
        first = next(iter(self.encoders.values()))
        return first.embeddings if isinstance(first, MlxEncoder) else ()

    def config_fields(self, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
        first = next(iter(self.encoders.values()))
        if isinstance(first, MlxEncoder):
            return first.config_fields(config, quantization)
        return {"quantization_config": quantization}

    def quantization_config(self, variant: int, report: VariantReport, dense: Sequence[str]) -> dict[str, Any]:
        first = next(iter(self.encoders.values()))
        quantized = [module.module for module in report.modules if module.quantized]
        if isinstance(first, MlxEncoder):
            made = {name: self.encoders[self.assignment[name]] for name in quantized}
            return config_of(
                first.base_config,
                report,
                {name: one.scheme_of(name, 0) for name, one in made.items() if isinstance(one, MlxEncoder)},
            )
        if not isinstance(first, (IntEncoder, SchemeEncoder)):  # these say what a module is in the module itself
            head_bits = round(report.head_bpw, 2) if report.head_bpw is not None else 16
            return {
                **first.quantization_config(0, report, dense),
                "bits": round(report.bpw, 2),
                "head_bits": head_bits,
            }
        from recompile.formats.compressed_tensors import merged_config

        schemes = []
        for name in quantized:
            encoder = self.encoders[self.assignment[name]]
            if isinstance(encoder, SchemeEncoder):
                schemes.append((name, encoder.config_group(name, 0)))
                continue
            assert isinstance(encoder, IntEncoder), "one format a mix"
            schemes.append((name, encoder.config_group(role_of(name), 0)))
        return merged_config({}, schemes, dense, [*quantized, *dense])

    def description(self) -> dict[str, Any]:
        lines = json.dumps(sorted(self.assignment.items()))
        return {
            "mix": {key: encoder.description() for key, encoder in self.encoders.items()},
            "assignment": hashlib.sha256(lines.encode()).hexdigest(),
        }


def assign(
    recipe: Recipe, base: Checkpoint, unnamed: str | None, head: str, embeddings: Sequence[str] | None = None
) -> dict[str, str]:
    """module -> the source (as the recipe describes it) of every linear module of `base`, and of the head.

    unnamed: the source of modules that no line names; None: they stay dense. head: the output head's name, which takes
    part only where a line names it.
    embeddings: for formats that quantize embeddings and the head like all else: the embeddings, and then the head takes
    part where the base stores one.
    Raises RecipeError for a source that is a directory, and for a line that names no module which can be quantized.
    """
    for source in recipe.sources:
        if source.spec is None:
            raise RecipeError(
                f"{recipe.location(source)}: {source.model_dir} is a directory that does not say how model_quantize "
                f"made it; give {{id: 4, bits: 4}} or the like. To merge directories: recompile -i BASE -o OUT -or "
                f"{recipe.name}"
            )
    roles = roles_of(base)
    linear = [m.name for m in base.modules.values() if m.shape is not None and len(m.shape) == 2]
    layers = [name for name in linear if roles[name].kind != "embedding" and roles[name].part in ("text", "mtp")]
    alike = embeddings is not None
    outer = [name for name in [*(embeddings or ()), head] if not alike or name in base.modules]
    names = [f"{name}.weight" for name in dict.fromkeys([*layers, *outer])]
    for line in recipe.unmatched(names):
        near = suggest(line.key, names)
        hint = f'; did you mean "{near}"?' if near else f"; such as {names[0]}"
        raise RecipeError(f'{recipe.location(line)}: key "{line.key}" matches no module to quantize{hint}')
    found: dict[str, str] = {}
    for name in names:
        source_dir = recipe.source_dir(name) or (unnamed if alike or name != f"{head}.weight" else None)
        if source_dir is not None:
            found[name.removesuffix(".weight")] = source_dir
    return found
