"""Importance matrices of llama.cpp: what a calibration run says of every weight's inputs, as a GGUF file.

`general.type` is `imatrix`; for a weight `<name>` there are `<name>.in_sum2`, the sums of squared inputs [experts, in],
and `<name>.counts`, how many tokens they are sums of, [experts]. The importance of a column is in_sum2 / counts.
Newest builds add `.in_sum` (plain sums) and `.stats`: the first is read and written, the second left alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recompile.errors import CheckpointError, FormatError
from recompile.formats.gguf_types import TYPES
from recompile.gguf.container import GgufFile, NewTensor, encode_key, open_gguf, write_gguf

SUM2, COUNTS, SUM = ".in_sum2", ".counts", ".in_sum"


@dataclass(frozen=True)
class InputSums:
    """What was added up over the inputs of one weight; one row an expert, one row in all for others."""

    sum_squares: NDArray[np.float32]  # [experts, in]
    counts: NDArray[np.float32]  # [experts], tokens
    sums: NDArray[np.float32] | None = None  # [experts, in]

    def __post_init__(self) -> None:
        if self.sum_squares.ndim != 2 or self.counts.shape != self.sum_squares.shape[:1]:
            raise FormatError(
                f"imatrix: found sums {list(self.sum_squares.shape)} and counts {list(self.counts.shape)}; "
                f"wanted [experts, in] and [experts]"
            )

    def importance(self) -> NDArray[np.float32]:
        """Mean squared input of every column, [experts, in]. An expert that no token reached has ones: nothing is known
        of it, and that must not hide its weights."""
        counts = self.counts[:, None]
        mean = np.divide(self.sum_squares, counts, out=np.ones_like(self.sum_squares), where=counts > 0)
        return mean.astype(np.float32)

    def mean(self) -> NDArray[np.float32] | None:
        """Mean input of every column, [experts, in]; None where plain sums are not known."""
        if self.sums is None:
            return None
        counts = self.counts[:, None]
        return np.divide(self.sums, counts, out=np.zeros_like(self.sums), where=counts > 0).astype(np.float32)


@dataclass(frozen=True)
class Imatrix:
    """A whole file: GGUF tensor name ("blk.0.attn_q.weight") -> its sums."""

    entries: Mapping[str, InputSums]
    chunks: int
    chunk_tokens: int
    datasets: tuple[str, ...] = ()

    def importance(self, tensor: str) -> NDArray[np.float32] | None:
        """[experts, in] of a tensor, None where the file says nothing of it."""
        found = self.entries.get(tensor)
        return found.importance() if found is not None else None


def read_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Read an imatrix GGUF file.

    Raises CheckpointError for a file of another kind, sums without counts, shapes that do not fit, and values that are
    negative or not finite.
    """
    file = open_gguf(path)
    if file.value("general.type") != "imatrix":
        raise CheckpointError(
            f'{file.label}: general.type is {file.value("general.type")!r}, wanted "imatrix": not an importance matrix '
            f"(older builds wrote .dat files; llama-imatrix converts them: --in-file OLD.dat -o NEW.gguf)"
        )
    entries = {}
    for name in file.tensors:
        if not name.endswith(SUM2):
            continue
        weight = name.removesuffix(SUM2)
        if weight + COUNTS not in file.tensors:
            raise CheckpointError(f"{file.label}: has {name} and no {weight}{COUNTS}")
        squares = _values(file, name)
        counts = _values(file, weight + COUNTS).reshape(-1)
        squares = squares.reshape(-1, squares.shape[-1])
        if len(counts) != len(squares):
            raise CheckpointError(f"{file.label}: {name} has {len(squares)} rows, its counts {len(counts)}")
        if not np.isfinite(squares).all() or (squares < 0).any() or not np.isfinite(counts).all() or (counts < 0).any():
            raise CheckpointError(f"{file.label}: {name} or its counts are negative or not finite")
        sums = _values(file, weight + SUM).reshape(squares.shape) if weight + SUM in file.tensors else None
        entries[weight] = InputSums(squares, counts, sums)
    if not entries:
        raise CheckpointError(f"{file.label}: holds no *{SUM2} tensor")
    return Imatrix(
        entries,
        int(file.value("imatrix.chunk_count", 0)),
        int(file.value("imatrix.chunk_size", 0)),
        tuple(file.value("imatrix.datasets", ())),
    )


def _values(file: GgufFile, name: str) -> NDArray[np.float32]:
    tensor = file.tensors[name]
    if tensor.type.name != "F32":
        raise CheckpointError(f"{file.label}: {name} is stored as {tensor.type.name}, wanted F32")
    return np.frombuffer(file.read(tensor), "<f4").reshape(tensor.shape)


def write_imatrix(path: str | os.PathLike[str], imatrix: Imatrix) -> None:
    """Write an imatrix GGUF file that llama-quantize --imatrix takes. Raises OutputError if it cannot be written."""
    records = [
        encode_key("general.type", "imatrix"),
        encode_key("imatrix.datasets", list(imatrix.datasets) or ["unknown"], "string"),
        encode_key("imatrix.chunk_count", imatrix.chunks, "u32"),
        encode_key("imatrix.chunk_size", imatrix.chunk_tokens, "u32"),
    ]
    tensors = []
    for name, sums in sorted(imatrix.entries.items()):
        tensors.append(_tensor(name + SUM2, sums.sum_squares))
        tensors.append(_tensor(name + COUNTS, sums.counts[:, None]))
        if sums.sums is not None:
            tensors.append(_tensor(name + SUM, sums.sums))
    write_gguf(Path(path), records, tensors)


def _tensor(name: str, values: NDArray[np.float32]) -> NewTensor:
    data = np.ascontiguousarray(values, "<f4").tobytes()
    return NewTensor(name, TYPES["F32"], tuple(reversed(values.shape)), lambda: [data])
