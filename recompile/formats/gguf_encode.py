"""Dense weights -> bytes of GGUF tensor types: llama.cpp's through `libgguf` (ggml's own encoders, the same bytes),
ik_llama.cpp's through `ik` and `ik_codebooks`.

A type fits a tensor only if its block divides the rows. `resolve` says what a tensor really gets, by the rules that
llama-quantize follows; nothing here swaps types silently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recompile.errors import FormatError, UnsupportedError
from recompile.formats import ik, ik_codebooks
from recompile.formats.gguf import DECODERS, dequantize_rows
from recompile.formats.gguf_types import TYPES, GgufType, find_type

# What a tensor gets whose rows the type's blocks of 256 do not divide (GGUF format spec, section 2).
_INSTEAD = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    **dict.fromkeys(("IQ2_K", "IQ2_KS", "IQ3_K", "IQ3_KS", "IQ4_K", "IQ4_KS", "IQ4_KSS"), "IQ4_NL"),
    **dict.fromkeys(ik_codebooks.TYPES, "IQ4_NL"),
    **dict.fromkeys(("IQ5_K", "IQ5_KS"), "Q6_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
NEEDS_IMPORTANCE = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})  # ggml's encoder has no other way
# ggml encodes these as well; what is left can be copied only.
_OF_FORK = ik.TYPES.keys() | ik_codebooks.TYPES.keys()
ENCODABLE = (frozenset(DECODERS) - {"Q6_0"}) | _OF_FORK | {"F32", "F16", "BF16", "Q6_0"}

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Q6_0_STEPS = 19  # scales tried for a block of Q6_0, around the one that reaches its largest weight
CHUNK_WEIGHTS = 1 << 22  # encoded at a time


@dataclass(frozen=True)
class EncodedTensor:
    """A weight as one type stores it.

    kind:  the type that it really got
    data:  uint8 [rows, row bytes]
    dense: float32 [rows, columns], decoded from data
    """

    kind: GgufType
    data: Tensor
    dense: Tensor

    @property
    def bits(self) -> int:
        """Stored bits."""
        return 8 * self.data.numel()


def resolve(kind: str | GgufType, columns: int) -> GgufType:
    """The type that rows of this many weights get where `kind` is asked for: itself where its blocks fit, else what
    llama-quantize takes instead, F16 where that does not fit either."""
    row = find_type(kind) if isinstance(kind, str) else kind
    if row.fits(columns):
        return row
    instead = TYPES[_INSTEAD.get(row.name, "F16")]
    return instead if instead.fits(columns) else TYPES["F16"]


@torch.no_grad()
def quantize_rows(kind: str | GgufType, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Encode rows as a tensor type.

    kind:       a type's name or row; its block must divide the columns
    weight:     float [rows, columns], finite
    importance: float [columns], mean squared input of each column, not negative, not all zero; None: none is known
    returns:    uint8 [rows, row bytes] on the CPU; for llama.cpp's types the bytes that ggml's own encoder gives
    raises:     FormatError for weights or importance of another shape or not finite, and for types that cannot be
                encoded without importance; UnsupportedError for types without an encoder, and where libgguf (numba for
                ik_llama.cpp's types) is not installed
    """
    row = find_type(kind) if isinstance(kind, str) else kind
    if weight.dim() != 2 or not row.fits(weight.shape[1]):
        raise FormatError(
            f"{row.name}: found a weight {list(weight.shape)}; wanted two axes and columns in multiples of {row.block}"
        )
    if row.name in _FLOATS:
        dtype = _FLOATS[row.name]
        return weight.detach().cpu().to(dtype).contiguous().view(torch.uint8)
    if row.name not in ENCODABLE:
        raise UnsupportedError(f"{row.name}: has no encoder here; wanted one of {', '.join(sorted(ENCODABLE))}")
    if row.name in NEEDS_IMPORTANCE and importance is None:
        raise FormatError(f"{row.name}: cannot be encoded without importance; calibrate, or give an imatrix file")
    if row.name in _OF_FORK:
        encoder = ik if row.name in ik.TYPES else ik_codebooks
        return encoder.quantize(row.name, weight, importance).cpu()
    dense = weight.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(dense).all()):
        raise FormatError(f"{row.name}: found weights that are NaN or infinite; wanted finite weights only")
    counts = _check_importance(row, importance, weight.shape[1])
    if row.name == "Q6_0":
        return _quantize_q6_0(dense, counts)
    try:
        import libgguf
    except ImportError:
        raise UnsupportedError(f"encoding {row.name} needs libgguf: pip install 'recompile[gguf]'") from None
    packed = torch.empty((dense.shape[0], row.row_bytes(dense.shape[1])), dtype=torch.uint8)
    step = max(1, CHUNK_WEIGHTS // dense.shape[1])
    imatrix = None if counts is None else counts.numpy()
    for first in range(0, len(dense), step):
        made = libgguf.quantize_rows(dense[first : first + step].numpy(), row.type_id, imatrix)
        packed[first : first + step] = torch.from_numpy(made).view(-1, packed.shape[1])
    return packed


def encode(kind: str, weight: Tensor, importance: Tensor | None = None) -> EncodedTensor:
    """Encode one dense tensor on the fly: what `kind` (or what its rows get instead) stores of it, and what that
    decodes to, on the weight's device. weight: float [..., columns]; importance and errors as `quantize_rows`."""
    row = resolve(kind, weight.shape[-1])
    data = quantize_rows(row, weight.reshape(-1, weight.shape[-1]), importance)
    dense = dequantize_rows(row, data.to(weight.device), weight.shape[-1]).view(weight.shape)
    return EncodedTensor(row, data, dense)


def _check_importance(row: GgufType, importance: Tensor | None, columns: int) -> Tensor | None:
    if importance is None:
        return None
    counts = importance.detach().to("cpu", torch.float32)
    if counts.shape != (columns,):
        raise FormatError(f"{row.name}: found importance {list(counts.shape)}; wanted one value for each of {columns}")
    if not bool(torch.isfinite(counts).all()) or bool((counts < 0).any()) or not bool(counts.any()):
        raise FormatError(f"{row.name}: found importance that is not finite, negative or all zero; calibrate again")
    return counts.contiguous()


def _quantize_q6_0(weight: Tensor, importance: Tensor | None) -> Tensor:
    """Q6_0: for each block of 32 the scale, of some around max / -32, whose rounding errs least (weighted)."""
    blocks = weight.view(-1, 32)
    weights = torch.ones(1, 32) if importance is None else importance.view(-1, 32).repeat(len(weight), 1)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # [blocks, 1], with its sign
    best = torch.full((len(blocks), 1), torch.inf)
    scale = torch.zeros_like(largest)
    for step in range(_Q6_0_STEPS):
        d = (largest / (-32 + 0.15 * (step - _Q6_0_STEPS // 2))).half().float()
        codes = torch.where(d != 0, blocks / d, 0).round().clamp(-32, 31)
        error = ((codes * d - blocks).square() * weights).sum(1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, d, scale)
    codes = (torch.where(scale != 0, blocks / scale, 0).round().clamp(-32, 31) + 32).to(torch.uint8)
    low, high = codes[:, :16], codes[:, 16:]
    q = low & 15 | (high & 15) << 4
    pairs = low >> 4 | high >> 4 << 2  # four bits for each k
    h = pairs[:, :8] | pairs[:, 8:] << 4
    packed = torch.cat((scale.half().view(torch.uint8), h, q), 1)
    return packed.view(len(weight), -1)
