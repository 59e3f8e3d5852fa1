"""How an EXL2 or EXL3 candidate is made on the fly; sizes are those of the files, to the bit.

EXL2 goes through its encoder without GPTQ: rows in the order of their importance, rounded to nearest.

EXL3's encoder takes 10 to 30 s per million weights on a CPU, too slow to try every bitrate on every weight, so its
candidates are STAND-INS. The encoder rotates a weight until it looks Gaussian. What it leaves of that is known, D of
the square at K bits (_DISTORTION), and white, so each weight gets normal noise in proportion to the scales of its row
and column. A quantizer whose values are the means of what they stand for also shrinks, E[error x weight] = -D: noise of
D (1 - D) is added to (1 - D) times the weight.

Both formats store an output head, of EXL_HEAD_BITS in every variant. It is counted, and not rounded here: it is the
same in every recipe.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, TensorInfo, split_name
from recompile.checkpoint.module_names import HEAD_NAMES, role_of
from recompile.checkpoint.tied_head import stored_head
from recompile.errors import FormatError
from recompile.formats import DTYPE_BYTES, FLOAT_DTYPES, exl2, exl3
from recompile.formats.exl2 import OUT_MULTIPLE
from recompile.formats.exl3 import BLOCK, TILE
from recompile.quantize.encoders import EXL_FORMATS, EXL_HEAD_BITS, Exl2Encoder, Exl3Encoder
from recompile.quantize.exl2 import layout_for_bits, plan_groups, quantize_exl2
from recompile.quantize.fake_quant import NOWHERE, Importances, SharedEncodings, Stored, linear_modules

# Mean squared error of quantize_exl3 (mul1) over the mean square: 256 x 384 Gaussian weights, uneven rows and columns.
_DISTORTION: Mapping[float, float] = {
    1: 0.269, 1.5: 0.137, 2: 0.0679, 2.5: 0.0341, 3: 0.0173, 3.5: 0.00878, 4: 0.00443, 5: 0.00113, 6: 0.000295,
    7: 7.7e-5, 8: 2.0e-5,
}  # fmt: skip
Headers = Mapping[str, tuple[str, tuple[int, ...]]]  # part -> (dtype, shape)


@dataclass(frozen=True)
class Exl2Maker:
    """EXL2 at a bitrate, whole or not."""

    bits: float
    shared: SharedEncodings = field(default_factory=SharedEncodings, compare=False)
    bytes_per_weight: int = 24  # the rows, their permuted copy, errors, codes and what they decode to

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise FormatError(f"bits: found {self.bits:g}; EXL2 has 2 to 8 bits, fractions too")

    def store(self, base: Checkpoint) -> Stored:
        stored = _store(base, Exl2Encoder([self.bits]), exl2.FORMAT, self.bits)
        sizes: dict[str, int] = {}
        for tensor, info in stored.tensors.items():
            module = split_name(tensor)[0]
            sizes[module] = sizes.get(module, 0) + info.size_bytes
        for module in stored.formats:
            if role_of(module) != "head":
                self.shared.ask(module, f"{self.bits:g}", sizes[module])
        return stored

    def round(self, base: Checkpoint, module: str, weight: Tensor, importance: Importances | None) -> Tensor:
        if role_of(module) == "head":
            return weight.float()
        parts = self.shared.get(module, f"{self.bits:g}")
        if parts is None:
            columns = (importance or {}).get(module)
            hessian = torch.diag(columns.to(weight.device)) if columns is not None and bool(columns.any()) else None
            layout = layout_for_bits(self.bits, weight.shape[1], weight.shape[0])
            parts = quantize_exl2(weight, hessian, layout)
            self.shared.put(module, f"{self.bits:g}", parts)
        return exl2.dequantize(parts, module=module)[: len(weight)].to(weight.device).float()

    @property
    def kept_bytes(self) -> int:
        return self.shared.most_bytes

    def description(self) -> Mapping[str, Any]:
        return {"format": exl2.FORMAT, "bits": self.bits, "method": "rtn, rows by importance"}

    @property
    def group(self) -> None:
        return None


@dataclass(frozen=True)
class Exl3StandIn:
    """A stand-in for EXL3 at K bits: the size of the file, and an error as large as the encoder's."""

    bits: float
    kept_bytes: int = 0
    bytes_per_weight: int = 16

    def __post_init__(self) -> None:
        Exl3Encoder([self.bits])  # raises FormatError for bits that EXL3 does not have

    def store(self, base: Checkpoint) -> Stored:
        return _store(base, Exl3Encoder([self.bits]), exl3.FORMAT, self.bits)

    def round(self, base: Checkpoint, module: str, weight: Tensor, importance: Importances | None) -> Tensor:
        weight = weight.float()
        if role_of(module) == "head":
            return weight
        left = _DISTORTION[self.bits]
        # the same noise at every bitrate: what tells them apart is its size
        generator = torch.Generator().manual_seed(zlib.crc32(module.encode()))
        noise = torch.randn(weight.shape, generator=generator).to(weight.device)  # [out, in]
        by_row = weight.square().mean(1, keepdim=True).sqrt()
        by_column = (weight / by_row.clamp(min=1e-30)).square().mean(0).sqrt()
        noise *= by_row * (by_column * (left * (1 - left)) ** 0.5)
        return noise.add_(weight, alpha=1 - left)

    def description(self) -> Mapping[str, Any]:
        return {"format": exl3.FORMAT, "bits": self.bits, "stand-in": _DISTORTION[self.bits]}

    @property
    def group(self) -> None:
        return None


def maker_for(format_name: str, bits: float, shared: SharedEncodings) -> Exl2Maker | Exl3StandIn:
    """Raises FormatError for a format or a bitrate that there is not."""
    if format_name not in EXL_FORMATS:
        raise FormatError(f"format {format_name}: wanted {' or '.join(EXL_FORMATS)}; integers say none")
    return Exl2Maker(bits, shared) if format_name == exl2.FORMAT else Exl3StandIn(bits)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def _exl2_headers(shape: tuple[int, int], bits: float) -> Headers:
    out_features, in_features = padded(shape[0], OUT_MULTIPLE), shape[1]
    groups = plan_groups(layout_for_bits(bits, in_features, out_features), in_features)
    return {
        "q_weight": ("I32", (sum(rows * width for width, rows in groups) // 32, out_features)),
        "q_scale": ("I32", (len(groups), out_features // 8)),
        "q_scale_max": ("F16", (len(groups),)),
        "q_groups": ("I16", (2 * len(groups),)),
        "q_invperm": ("I32", (in_features,)),
    }


def _exl3_headers(shape: tuple[int, int], bits: float) -> Headers:
    out_features, in_features = (padded(size, BLOCK) for size in shape)
    return {
        "trellis": ("I16", (in_features // TILE, out_features // TILE, round(TILE * bits))),
        "suh": ("F16", (in_features,)),
        "svh": ("F16", (out_features,)),
        "mul1": ("I32", ()),
    }


def padded(size: int, multiple: int) -> int:
    """The next multiple that is no smaller."""
    return -(-size // multiple) * multiple


def _store(base: Checkpoint, encoder: Exl2Encoder | Exl3Encoder, format_name: str, bits: float) -> Stored:
    """All linear maps of the layers at `bits`, the head at EXL_HEAD_BITS; what stays dense as the encoder keeps it."""
    from safetensors.torch import _TYPES as TORCH_DTYPES  # the library's own table of dtype spellings

    headers, pads_to = (_exl2_headers, OUT_MULTIPLE) if format_name == exl2.FORMAT else (_exl3_headers, BLOCK)
    widths = dict.fromkeys(linear_modules(base), bits)
    head, weight_of_head = _head_of(base)
    if head is not None:
        widths[head] = EXL_HEAD_BITS
    formats: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    reason = "it has no linear layers"
    for name, width in widths.items():
        out_features, in_features = base.tensors[weight_of_head if name == head else f"{name}.weight"].shape
        why = encoder.why_not(name, (out_features, in_features))
        if why is not None:
            reason = f"{name}: {why}"
            continue
        formats[name] = format_name
        parts = dict(headers((out_features, in_features), width))
        if f"{name}.bias" in base.tensors:
            parts["bias"] = ("F16", (padded(out_features, pads_to),))
        for part, (dtype, shape) in parts.items():
            size_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
            tensors[f"{name}.{part}"] = TensorInfo(f"{name}.{part}", dtype, shape, NOWHERE, 0, size_bytes)
    if not any(role_of(name) == "layer" for name in formats):
        raise FormatError(f"{base.label}: nothing would be quantized; {reason}")
    spelled = {kind: name for name, kind in TORCH_DTYPES.items()}
    for name, info in base.tensors.items():
        if split_name(name)[0] not in formats:
            kind = TORCH_DTYPES[info.dtype]
            assert isinstance(kind, torch.dtype), "tensors of safetensors files have torch dtypes"
            dtype = spelled[encoder.dense_dtype(kind)] if info.dtype in FLOAT_DTYPES else info.dtype
            tensors[name] = replace(info, dtype=dtype, size_bytes=info.numel * DTYPE_BYTES[dtype])
    copies = {f"{head}.weight": weight_of_head} if head in formats and head not in base.modules else {}
    return Stored(tensors, formats, copies=copies)


def _head_of(base: Checkpoint) -> tuple[str | None, str]:
    """The output head and the tensor that holds its weight: the embedding's where they are tied."""
    head = stored_head(base.modules)
    if head is not None:
        return head.name, f"{head.name}.weight"
    tied = next((name for name in base.modules if role_of(name) == "embedding"), None)
    if not base.config.get("tie_word_embeddings") or tied is None:
        return None, ""
    return HEAD_NAMES[0], f"{tied}.weight"
