"""What the pipeline asks of an encoder: weights in, stored parts out; what it may observe, scale and be told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from recompile.quantize.calibrate import InputStatistics
from recompile.quantize.quantize_report import VariantReport
from recompile.quantize.smoothing_mappings import Fold


@dataclass(frozen=True)
class Encoded:
    """One module in one variant: its stored parts and the dense weight they stand for."""

    parts: dict[str, Tensor]
    dense: Tensor  # [out, in], decoded from the parts
    rounding: str = ""  # what two-sided rounding did, for the report


class Encoder(Protocol):
    """Makes the variants' parts of modules that share an input. One object serves all bitrates of a run."""

    @property
    def names(self) -> Sequence[str]:
        """Variant directory names, e.g. "3bpw"."""
        ...

    def why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        """The reason why a module must stay dense, None if it can be encoded."""
        ...

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        """For each variant, the parts of every module; hessian [in, in] or None where no token was seen."""
        ...

    def dense_dtype(self, stored: torch.dtype) -> torch.dtype:
        """What unquantized floating-point tensors are stored as."""
        ...

    def quantization_config(self, variant: int, report: VariantReport, dense: Sequence[str]) -> dict[str, Any]: ...
    def description(self) -> dict[str, Any]:
        """Everything that decides the output, for the journal."""
        ...


@runtime_checkable
class ObservingEncoder(Protocol):
    """An Encoder that also asks for the ranges of the inputs, and may keep a module dense in some variants only."""

    def why_not_in(self, variant: int, module: str, shape: tuple[int, int]) -> str | None: ...
    def encode_observed(
        self,
        weights: Mapping[str, Tensor],
        hessian: Tensor | None,
        biases: Mapping[str, Tensor],
        largest: Tensor | None,
    ) -> list[dict[str, Encoded]]:
        """As Encoder.encode; largest: [in] the largest |x| of every input over the calibration rows."""
        ...


@runtime_checkable
class KeyedEncoder(Protocol):
    """An Encoder whose loaders look for more in config.json than a quantization_config, or elsewhere."""

    def config_fields(self, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
        """The keys to set in a base's config.json; quantization: what `quantization_config` gave."""
        ...


@runtime_checkable
class ScalingEncoder(Protocol):
    """An Encoder whose variants may scale inputs before they round."""

    @property
    def scales_inputs(self) -> bool: ...
    def only(self, variants: Sequence[int]) -> Encoder:
        """The encoder of some of its variants."""
        ...

    def scale_of(
        self,
        variant: int,
        fold: Fold,
        weights: Mapping[str, Tensor],
        statistics: Mapping[str, InputStatistics],
        finish: Callable[[Tensor], Tensor],
    ) -> Tensor | None:
        """float32 [channels] that divides the producer's outputs in one variant, None for none.

        weights: the consumers', unscaled; finish: turns a wanted scale into the nearest that can be stored exactly
        """
        ...
