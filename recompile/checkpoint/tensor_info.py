"""One stored tensor, or one expert's part of a larger one: name, dtype, shape, and where its bytes are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
