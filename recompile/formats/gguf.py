"""The tensor types of GGUF files as one format of this project: decoding on any device, for every type with a layout.

The types themselves are rows in `gguf_types`; the arithmetic is in `gguf_decode`, `gguf_decode_iq` and, for
ik_llama.cpp's, `ik` and `ik_codebooks`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recompile.errors import FormatError, UnsupportedError
from recompile.formats import gguf_decode, gguf_decode_iq, ik, ik_codebooks
from recompile.formats.gguf_types import GgufType, find_type
from recompile.formats.stored import Described, StoredModule

# Weights decoded at a time. CPU: temporaries that stay in the second-level cache. Elsewhere: enough to fill a GPU.
CHUNK_WEIGHTS_CPU = 1 << 17
CHUNK_WEIGHTS_OTHER = 1 << 26

DECODERS = gguf_decode.DECODERS | gguf_decode_iq.DECODERS
DECODABLE = frozenset(DECODERS) | frozenset(ik.TYPES) | frozenset(ik_codebooks.TYPES) | {"F32", "F16", "BF16"}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@torch.no_grad()
def dequantize_rows(kind: str | GgufType, data: Tensor, columns: int) -> Tensor:
    """Decode rows of a tensor type, to the bit as ggml's reference decoder does.

    kind:    a type's name or row, e.g. "Q4_K"
    data:    uint8, the rows one after another, any shape, any device
    columns: weights of a row
    returns: float32 [rows, columns] on that device. Any bytes decode, to NaN and infinity too where a scale is one
    raises:  FormatError if the size of data does not fit, UnsupportedError for types that can only be copied
    """
    row = find_type(kind) if isinstance(kind, str) else kind
    if not row.fits(columns):
        raise FormatError(f"{row.name}: found {columns} columns; wanted a multiple of {row.block}")
    row_bytes = row.row_bytes(columns)
    if data.dtype != torch.uint8 or data.numel() % row_bytes:
        raise FormatError(f"{row.name}: found {data.numel()} of {data.dtype}; wanted uint8, rows of {row_bytes} bytes")
    rows = data.numel() // row_bytes
    if row.name in ik.TYPES:
        return ik.dequantize(row.name, data, (rows, columns))
    if row.name in ik_codebooks.TYPES:
        return ik_codebooks.dequantize(row.name, data, (rows, columns))
    if row.name in _FLOATS:
        return data.reshape(rows, row_bytes).contiguous().view(_FLOATS[row.name]).float()
    decode = DECODERS.get(row.name)
    if decode is None:
        raise UnsupportedError(
            f"tensor type {row.name} can be copied and not decoded here; take that tensor from another variant"
        )
    blocks = data.reshape(-1, row.block_bytes)
    dense = torch.empty((blocks.shape[0], row.block), dtype=torch.float32, device=data.device)
    step = max(1, (CHUNK_WEIGHTS_CPU if data.device.type == "cpu" else CHUNK_WEIGHTS_OTHER) // row.block)
    for first in range(0, blocks.shape[0], step):
        dense[first : first + step] = decode(blocks[first : first + step])
    return dense.view(rows, columns)


def scheme_of(checkpoint: Described, module: StoredModule) -> tuple[str, tuple[int, ...]]:
    """The tensor type and the shape, which stand in the tensor's own info."""
    info = module.parts["weight"]
    return info.dtype, info.shape


def dequantize(parts: Mapping[str, Tensor], scheme: tuple[str, tuple[int, ...]], module: str = "tensor") -> Tensor:
    """The weight of a module as its file has it, float32 in its shape (rows in the file's own order).

    parts: {"weight": uint8 [..., row bytes] of all rows, or of some}. Raises FormatError and UnsupportedError naming
    the module, as `dequantize_rows`.
    """
    kind, shape = scheme
    try:
        return dequantize_rows(kind, parts["weight"], shape[-1]).view(-1, *shape[1:])
    except (FormatError, UnsupportedError) as error:
        raise type(error)(f"{module}: {error}") from error
