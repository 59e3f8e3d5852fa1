"""Inputs of linear maps quantized as their scheme says, while a model is streamed: what w8a8, fp8 or nvfp4 engines add.

A config group's `input_activations` says how: one scale a token, a tensor, or a group of columns, found while running
("dynamic") or stored (`input_scale`; for nvfp4 `input_global_scale`, which divides, with group scales found while
running). Values are quantized and decoded again in the compute dtype's float32, as the compressed-tensors library
(0.20) does; kernels that multiply the codes directly differ from it by the order of their sums only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, StoredModule
from recompile.costs import is_expert
from recompile.errors import FormatError, UnsupportedError
from recompile.formats import compressed_tensors, mx
from recompile.formats.fp4 import round_e2m1
from recompile.formats.fp8 import E4M3_MAX, round_e4m3
from recompile.model.linear_calls import LinearMode
from recompile.model.stream import LayeredModel, LinearWeights

if TYPE_CHECKING:
    from recompile.merge.overlay import Overlay

NUMBERS = re.compile(r"\d+")
SMALLEST_NVFP4_SCALE = 0.125  # in place of 0, as the library has it
_STRATEGIES = ("token", "tensor", "group", "tensor_group")


@dataclass(frozen=True)
class InputScheme:
    """How the inputs of one module are quantized.

    strategy: token, tensor, group or tensor_group (nvfp4)
    columns:  of a group; dynamic: scales are found while running; power_of_two: MX scales
    """

    bits: int
    type: str  # "int" or "float"
    strategy: str
    dynamic: bool
    symmetric: bool = True
    columns: int | None = None
    power_of_two: bool = False

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> InputScheme:
        """From an `input_activations` entry. Raises UnsupportedError for what no engine has."""
        strategy = entry.get("strategy") or ("group" if entry.get("group_size") else "tensor")
        made = cls(
            int(entry.get("num_bits") or 8),
            str(entry.get("type") or "int"),
            str(strategy),
            entry.get("dynamic") in (True, "local"),
            entry.get("symmetric") is not False,
            entry.get("group_size"),
            strategy == "group" and entry.get("scale_dtype") in ("torch.uint8", "uint8"),
        )
        known = made.bits in (4, 8) and made.type in ("int", "float") and strategy in _STRATEGIES
        if not known or (
            made.type == "float" and made.bits == 4 and strategy != "tensor_group" and not made.power_of_two
        ):
            raise UnsupportedError(f"input_activations: {dict(entry)} is not known here")
        return made


def fake_quantize(
    x: Tensor, scheme: InputScheme, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> Tensor:
    """x quantized and decoded again; any shape [..., in], same dtype.

    scale: the stored one: `input_scale`, or nvfp4's `input_global_scale`; None where scales are dynamic
    Raises FormatError for static schemes without a scale and for groups that do not divide the inputs.
    """
    values = x.float()
    if scheme.columns is not None and scheme.strategy in ("group", "tensor_group"):
        if values.shape[-1] % scheme.columns:
            raise FormatError(f"groups of {scheme.columns} do not divide {values.shape[-1]} inputs")
        values = values.unflatten(-1, (-1, scheme.columns))
    needs_stored = scheme.strategy == "tensor_group" or not scheme.dynamic
    if needs_stored and scale is None:
        raise FormatError("the scale of the inputs is not stored")
    if scheme.strategy == "tensor_group":
        assert scale is not None, "checked above"
        made = _nvfp4(values, scale.float().reshape(()))
    elif scheme.power_of_two:
        exponent = mx.shared_exponent(_largest(values, scheme), scheme.bits)
        factor = torch.exp2(exponent.clamp(-mx.SCALE_BIAS, mx.SCALE_BIAS).double()).float()
        made = (round_e2m1 if scheme.bits == 4 else round_e4m3)(values / factor) * factor
    elif scheme.type == "float":
        factor = scale.float() if scale is not None and not scheme.dynamic else _largest(values, scheme) / E4M3_MAX
        factor = torch.where(factor > 0, factor, torch.ones_like(factor))
        made = round_e4m3(values / factor) * factor
    else:
        made = _integers(values, scheme, scale, zero_point)
    return made.reshape(x.shape).to(x.dtype)


def _largest(values: Tensor, scheme: InputScheme) -> Tensor:
    return values.abs().amax() if scheme.strategy == "tensor" else values.abs().amax(-1, keepdim=True)


def _nvfp4(values: Tensor, whole: Tensor) -> Tensor:
    scale = round_e4m3(values.abs().amax(-1, keepdim=True) * whole / 6)
    factor = torch.where(scale > 0, scale, SMALLEST_NVFP4_SCALE) / whole
    return round_e2m1(values / factor) * factor


def _integers(values: Tensor, scheme: InputScheme, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    low, high = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    zero: Tensor | float = 0.0
    if scale is not None and not scheme.dynamic:
        factor = scale.float()
        zero = zero_point.float() if zero_point is not None else 0.0
    elif scheme.symmetric:
        factor = _largest(values, scheme) / ((high - low) / 2)
    else:
        everything = scheme.strategy == "tensor"
        top = (values.amax() if everything else values.amax(-1, keepdim=True)).clamp(min=0)
        bottom = (values.amin() if everything else values.amin(-1, keepdim=True)).clamp(max=0)
        factor = (top - bottom) / (high - low)
        factor = torch.where(factor > 0, factor, torch.ones_like(factor))
        zero = (low - bottom / factor).clamp(low, high).round()
    factor = torch.where(factor > 0, factor, torch.ones_like(factor))
    return ((values / factor + zero).round().clamp(low, high) - zero) * factor


@dataclass(frozen=True)
class _Input:
    scheme: InputScheme
    scale: Tensor | None
    zero_point: Tensor | None


def _input_of(checkpoint: Checkpoint, module: StoredModule, device: torch.device) -> _Input | None:
    """How a stored module's inputs are quantized; None where they are kept."""
    method = checkpoint.quantization_config.get("quant_method")
    if not module.is_quantized or method != compressed_tensors.QUANT_METHOD:
        return None
    entry = compressed_tensors.group_for(checkpoint, module).get("input_activations")
    if not entry:
        return None
    scheme = InputScheme.from_config(entry)

    def stored(part: str) -> Tensor | None:
        return checkpoint.read(f"{module.name}.{part}", device) if part in module.parts else None

    scale = stored("input_global_scale" if scheme.strategy == "tensor_group" else "input_scale")
    return _Input(scheme, scale, stored("input_zero_point"))


class QuantizedInputs(LinearMode):
    """Context manager: inside it, linear maps of one loaded layer, fused experts slice by slice and Conv1D among them,
    see their inputs as their schemes quantize them.

    The model must run experts one by one (`set_experts_implementation("eager")`), as `of` arranges.
    only: these modules alone; None: all. seen: gets the modules whose maps ran
    """

    def __init__(
        self,
        model: LayeredModel,
        overlay: Overlay,
        index: int,
        only: Collection[str] | None = None,
        seen: set[str] | None = None,
    ) -> None:
        super().__init__(LinearWeights(model, index))
        self._only = only
        self._seen: set[str] = set() if seen is None else seen
        self._overlay, self._device = overlay, model.device
        self._inputs: dict[str, _Input | None] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = self.weights.find(weight)
        how = self._of(found.modules[0]) if found is not None else None
        if found is not None:
            self._seen.update(found.modules)
        if found is not None and how is not None:
            x = self._quantize(x, how, found.modules[0])
        return super().linear(x, weight, bias)

    def _of(self, module: str) -> _Input | None:
        if self._only is not None and module not in self._only:
            return None
        if module not in self._inputs:
            placement = self._overlay.placements.get(module)
            self._inputs[module] = (
                _input_of(placement.checkpoint, placement.stored, self._device) if placement is not None else None
            )
        return self._inputs[module]

    @staticmethod
    def _quantize(x: Tensor, how: _Input, module: str) -> Tensor:
        try:
            return fake_quantize(x, how.scheme, how.scale, how.zero_point)
        except FormatError as error:
            raise FormatError(f"{module}: {error}") from error


def quantizes_inputs(overlay: Overlay) -> bool:
    """Whether any module of the mix says how its inputs are quantized."""
    return any(True for _ in _that_quantize(overlay))


def _that_quantize(overlay: Overlay) -> Iterator[str]:
    for name, p in overlay.placements.items():
        method = p.checkpoint.quantization_config.get("quant_method")
        known = p.stored.is_quantized and method == compressed_tensors.QUANT_METHOD
        if known and compressed_tensors.group_for(p.checkpoint, p.stored).get("input_activations"):
            yield name


@dataclass(frozen=True)
class UnseenInputs:
    """Modules whose schemes quantize inputs that were run as they are; why: the rest of a sentence."""

    why: str
    modules: tuple[str, ...]


def unseen_inputs(overlay: Overlay, model: LayeredModel, seen: Collection[str]) -> tuple[UnseenInputs, ...]:
    """What a run under `QuantizedInputs` of every layer, which saw the modules `seen`, has not quantized."""
    inside = {name for index in range(model.depth) for name in model.modules_of_layer(index)}
    alike = {NUMBERS.sub("#", name) for name in seen}
    found: dict[str, list[str]] = {}
    for name in _that_quantize(overlay):
        if name in seen:
            continue
        if name not in inside:
            why = "stand outside of the layers, where inputs are kept"
        elif is_expert(name) and NUMBERS.sub("#", name) in alike:
            why = "are experts that no token reached"
        else:
            why = "are multiplied by a function that is not seen here"
        found.setdefault(why, []).append(name)
    return tuple(UnseenInputs(why, tuple(names)) for why, names in found.items())
