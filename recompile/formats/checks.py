"""Checks of one stored part that every format makes. Each raises FormatError: name, what was found, what was wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from recompile.errors import FormatError

SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_CPU_CHUNK_WEIGHTS = 1 << 18  # 1 MiB as float32: small enough for the caches, big enough to hide a torch call
_DEVICE_CHUNK_WEIGHTS = 1 << 26  # elsewhere only memory bounds the chunk, and few kernel launches are wanted


def get_part(
    parts: Mapping[str, Tensor],
    module: str,
    name: str,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int, ...] | None = None,
    because: str = "",
) -> Tensor:
    """One part of any shape, or of `shape`, and of one of `dtypes`; `because` says where that shape comes from.

    Raises FormatError.
    """
    part = parts.get(name)
    if part is None:
        raise FormatError(f"{module}.{name}: not found; the module has {', '.join(sorted(parts)) or 'no parts'}")
    if part.dtype not in dtypes:
        raise FormatError(f"{module}.{name}: found {part.dtype}, wanted {' or '.join(str(dtype) for dtype in dtypes)}")
    if shape is not None and tuple(part.shape) != shape:
        raise FormatError(
            f"{module}.{name}: found shape {list(part.shape)}, wanted {list(shape)}{', ' if because else ''}{because}"
        )
    return part


def check_matrix(part: Tensor, name: str) -> tuple[int, int]:
    """The two sizes of a tensor [rows, columns], both above 0. Raises FormatError."""
    if part.dim() != 2 or 0 in part.shape:
        raise FormatError(f"{name}: found shape {list(part.shape)}, wanted two sizes above 0")
    return (part.shape[0], part.shape[1])


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; any shape. Least and largest, or a sum, tell of all; only where a sum is not
    finite each value is asked."""
    if not (value.is_floating_point() or value.is_complex()) or value.numel() == 0:
        return True
    value = value.detach()
    value = value.float() if value.element_size() == 1 else value
    if value.element_size() == 2:  # sums of these in a wider type take seven times as long
        return all(math.isfinite(float(end)) for end in value.aminmax())
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def check_finite(part: Tensor, name: str) -> None:
    """Refuse NaN and infinite values of any shape; float8 is looked at as float32, since torch compares few dtypes of 8
    bits. Raises FormatError."""
    finite = (part.float() if part.element_size() == 1 else part).isfinite()
    if not bool(finite.all()):
        raise FormatError(
            f"{name}: found {int((~finite).sum())} NaN or infinite values in {finite.numel()}, wanted finite ones"
        )


def row_chunks(rows: int, columns: int, device: torch.device) -> Iterable[slice]:
    """Slices over `rows` that keep a float32 scratch of whole rows small."""
    step = max(1, (_CPU_CHUNK_WEIGHTS if device.type == "cpu" else _DEVICE_CHUNK_WEIGHTS) // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
