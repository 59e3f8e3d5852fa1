"""Names of compressed-tensors schemes ("w4a16-g64", "fp8-channel", "nvfp4") and what they stand for. No torch.

    wNa16[-gG|-channel][-asym]   integers of N = 2..8 bits in int32 words, activations kept (G defaults to 128; 8 bits:
                                 one scale a row)
    w8a8[-static]                int8 weights, one scale a row; int8 activations, one scale a token (static: a tensor)
    fp8-tensor|channel|block     8-bit floats, activations kept; block: 128 x 128
    fp8-dynamic|static           8-bit floats, one scale a row (static: a tensor), with fp8 activations
    fp8-block-dynamic            blocks of 128 x 128, fp8 activations with a scale for 128 columns of a token
    w4afp8[-gG]                  4-bit integers with fp8 activations, one scale a token
    nvfp4, mxfp4, mxfp6, mxfp8   4, 6 and 8-bit floats with a scale for 16 (nvfp4) or 32 columns, activations kept
    nvfp4-a4, mxfp4-a4, mxfp8-a8 the same with activations in the weights' format

Presets of llm-compressor (W4A16, FP8_DYNAMIC, NVFP4 ...) are read as what they mean there. Field names and values of
the config groups are those of the compressed-tensors library (0.20).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from recompile.errors import FormatError

BLOCK = 128
NVFP4_COLUMNS, MX_COLUMNS = 16, 32

PRESETS: Mapping[str, str] = {
    **{f"W{bits}A16": f"w{bits}a16-g128" for bits in range(2, 9)},
    "W4A16_ASYM": "w4a16-g128-asym",
    "W8A8": "w8a8",
    "INT8": "w8a8",
    "W4AFP8": "w4afp8-g128",
    "FP8": "fp8-static",
    "FP8_DYNAMIC": "fp8-dynamic",
    "FP8_BLOCK": "fp8-block-dynamic",
    "NVFP4A16": "nvfp4",
    "NVFP4": "nvfp4-a4",
    "MXFP4A16": "mxfp4",
    "MXFP4": "mxfp4-a4",
    "MXFP6A16": "mxfp6",
    "MXFP8A16": "mxfp8",
    "MXFP8": "mxfp8-a8",
}

EXAMPLES = ("w4a16-g64", "w8a16", "w8a8", "fp8-channel", "fp8-dynamic", "nvfp4", "mxfp4", "mxfp8")


@dataclass(frozen=True, eq=False)
class Scheme:
    """One way to store and run a linear map, as a config group says it.

    name:              as users write it; a directory name
    format:            compressed-tensors format string, a key of FORMATS
    weights:           the group's `weights`
    input_activations: the group's `input_activations`; None where activations are kept
    """

    name: str
    format: str
    weights: Mapping[str, Any]
    input_activations: Mapping[str, Any] | None = None

    @property
    def bits(self) -> int:
        return int(self.weights["num_bits"])

    @property
    def columns(self) -> int | None:
        """Columns that share a scale; None: the row, or the tensor."""
        if self.weights["strategy"] == "block":
            return int(self.weights["block_structure"][1])
        size = self.weights.get("group_size")
        return int(size) if size else None

    @property
    def is_packed_integer(self) -> bool:
        """Integers of any width in words of 32 bits, by quantize/int_grids.py; all others are float_grids'."""
        return self.format == "pack-quantized"

    @property
    def has_global_scale(self) -> bool:
        """A scale of the whole tensor stands over those of its groups."""
        return self.format == "nvfp4-pack-quantized"

    def group(self) -> dict[str, Any]:
        """The config group without its targets."""
        return {
            "format": self.format,
            "weights": dict(self.weights),
            "input_activations": None if self.input_activations is None else dict(self.input_activations),
            "output_activations": None,
        }

    def why_not(self, shape: tuple[int, int]) -> str | None:
        """Why a weight [out, in] cannot be stored so; None if it can. Blocks may be partial at the edges, groups not:
        engines compute their number by division."""
        if self.columns and self.weights["strategy"] != "block" and shape[1] % self.columns:
            return f"groups of {self.columns} do not divide its {shape[1]} columns, kept dense"
        if self.format == "mxfp6-pack-quantized" and shape[1] % 4:
            return f"6-bit floats are stored in fours, it has {shape[1]} columns, kept dense"
        return None


def stored_format(weights: Mapping[str, Any], *, has_inputs: bool) -> tuple[str, str | None]:
    """The format that a config group's `weights` are stored in, and the dtype of scales where that has only one.

    has_inputs: whether activations are quantized, too
    """
    bits, strategy = weights["num_bits"], weights["strategy"]
    if weights["type"] == "int":
        return ("int-quantized" if bits == 8 and has_inputs else "pack-quantized"), None
    if strategy == "tensor_group":
        return "nvfp4-pack-quantized", "torch.float8_e4m3fn"
    if strategy == "group" and weights.get("group_size") == MX_COLUMNS:
        return ("mxfp8-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"), "torch.uint8"
    return "float-quantized", None


@cache
def parse_scheme(name: str) -> Scheme:
    """The scheme of a name. Raises FormatError with the nearest known name."""
    text = PRESETS.get(name.strip().upper(), name.strip().lower()) if name.strip().isupper() else name.strip().lower()
    found = re.fullmatch(r"w(\d)a16(?:-(g\d+|channel))?(-asym)?", text)
    if found:
        return _integers(text, int(found[1]), found[2], symmetric=not found[3])
    found = re.fullmatch(r"w4afp8(?:-(g\d+|channel))?", text)
    if found:
        made = _integers(text, 4, found[1], symmetric=True)
        return Scheme(text, made.format, made.weights, _activations(8, "float", "token"))
    if text in ("w8a8", "w8a8-static"):
        inputs = _activations(8, "int", "token" if text == "w8a8" else "tensor")
        return Scheme(text, "int-quantized", _weights(8, "int", "channel"), inputs)
    if text in _FLOATS:
        return _FLOATS[text]
    known = [*_FLOATS, *PRESETS, *EXAMPLES, "w8a8-static", "w4afp8"]
    near = difflib.get_close_matches(text, known, n=1) or difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise FormatError(f"scheme {name!r} is not known{hint} (for example {', '.join(EXAMPLES)})")


def _integers(name: str, bits: int, grouping: str | None, *, symmetric: bool) -> Scheme:
    if not 2 <= bits <= 8:
        raise FormatError(f"scheme {name!r}: found {bits} bits, wanted 2 to 8")
    if grouping is None:
        grouping = "channel" if bits == 8 else "g128"
    if grouping == "channel":
        return Scheme(name, "pack-quantized", _weights(bits, "int", "channel", symmetric=symmetric))
    size = int(grouping[1:])
    if size < 1:
        raise FormatError(f"scheme {name!r}: found groups of {size}, wanted at least 1 column")
    return Scheme(name, "pack-quantized", _weights(bits, "int", "group", symmetric=symmetric, group_size=size))


def _weights(bits: int, type_: str, strategy: str, *, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": type_,
        "symmetric": symmetric,
        "strategy": strategy,
        **more,
        "dynamic": False,
    }


def _activations(bits: int, type_: str, strategy: str, **more: Any) -> dict[str, Any]:
    """Dynamic (found while running) for all but the strategy "tensor", whose scale is stored."""
    dynamic: bool | str = "local" if strategy == "tensor_group" else strategy != "tensor"
    return {"num_bits": bits, "type": type_, "symmetric": True, "strategy": strategy, **more, "dynamic": dynamic}


_NV: dict[str, Any] = {"group_size": NVFP4_COLUMNS, "scale_dtype": "torch.float8_e4m3fn"}
_MX: dict[str, Any] = {"group_size": MX_COLUMNS, "scale_dtype": "torch.uint8"}
_BLOCKS: dict[str, Any] = {"block_structure": [BLOCK, BLOCK]}
_FLOATS: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8-tensor", "float-quantized", _weights(8, "float", "tensor")),
        Scheme("fp8-channel", "float-quantized", _weights(8, "float", "channel")),
        Scheme("fp8-block", "float-quantized", _weights(8, "float", "block", **_BLOCKS)),
        Scheme("fp8-static", "float-quantized", _weights(8, "float", "tensor"), _activations(8, "float", "tensor")),
        Scheme("fp8-dynamic", "float-quantized", _weights(8, "float", "channel"), _activations(8, "float", "token")),
        Scheme(
            "fp8-block-dynamic",
            "float-quantized",
            _weights(8, "float", "block", **_BLOCKS),
            _activations(8, "float", "group", group_size=BLOCK),
        ),
        Scheme("nvfp4", "nvfp4-pack-quantized", _weights(4, "float", "tensor_group", **_NV)),
        Scheme(
            "nvfp4-a4",
            "nvfp4-pack-quantized",
            _weights(4, "float", "tensor_group", **_NV),
            _activations(4, "float", "tensor_group", **_NV),
        ),
        Scheme("mxfp4", "mxfp4-pack-quantized", _weights(4, "float", "group", **_MX)),
        Scheme(
            "mxfp4-a4",
            "mxfp4-pack-quantized",
            _weights(4, "float", "group", **_MX),
            _activations(4, "float", "group", **_MX),
        ),
        Scheme("mxfp6", "mxfp6-pack-quantized", _weights(6, "float", "group", **_MX)),
        Scheme("mxfp8", "mxfp8-quantized", _weights(8, "float", "group", **_MX)),
        Scheme(
            "mxfp8-a8",
            "mxfp8-quantized",
            _weights(8, "float", "group", **_MX),
            _activations(8, "float", "group", **_MX),
        ),
    )
}
