"""What headers say is stored: tensors (or one expert's part of a larger one), and the modules that they make up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FUSED_EXPERTS = re.compile(r"\.experts\.[a-z]\w*$")  # all experts of a layer in one parameter


@dataclass(frozen=True)
class View:
    """A tensor that is a part of a larger stored one.

    stored:  as the file's header says it, [experts, ...]
    index:   the expert
    columns: (start, step) along the last axis of the expert's slice, which is transposed then
    rows:    (start, step) along its first axis
             neither: rows of it, one after another in the file
    """

    stored: TensorInfo
    index: int
    columns: tuple[int, int] | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: what its header says and where its bytes are."""

    name: str
    dtype: str  # safetensors spelling: "BF16", "I32"; a tensor type of GGUF files: "Q4_K"
    shape: tuple[int, ...]
    path: Path
    offset: int  # of the first byte, from the start of the file
    size_bytes: int
    view: View | None = None  # one expert's part of a stored tensor; see is_scattered

    @property
    def is_scattered(self) -> bool:
        """Whether its bytes do not lie in a row, so that only `read_tensor` gives them."""
        return self.view is not None and (self.view.columns is not None or self.view.rows is not None)

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class StoredModule:
    """One module as stored: all tensors `<name>.<part>` that belong together."""

    name: str
    parts: Mapping[str, TensorInfo]
    shape: tuple[int, ...] | None  # (out_features, in_features) as stored; None for loose parameters
    format: str

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts.values())

    @property
    def numel(self) -> int:
        """Weights in the module: those of the weight if it has one, else of all parameters."""
        if self.shape is None:
            return sum(part.numel for part in self.parts.values())
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per weight, scales, zero points and bias included."""
        return 8 * self.size_bytes / max(1, self.numel)

    @property
    def is_quantized(self) -> bool:
        return self.format != "dense"

    @property
    def dense_name(self) -> str:
        """The name of the dense weight that the parts stand for; fused experts are a parameter of their own."""
        return self.name if FUSED_EXPERTS.search(self.name) else f"{self.name}.weight"


class Described(Protocol):
    """What the readers of formats need of a checkpoint."""

    @property
    def label(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def quantization_config(self) -> Mapping[str, Any]: ...
