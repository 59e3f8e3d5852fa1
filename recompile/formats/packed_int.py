"""compressed-tensors `pack-quantized`: integer weights of 1 to 8 bits in int32 words, with group or channel scales.

Axes: O = out_features, I = in_features, G = group size, NG = ceil(I / G) (1 for channel scales), b = bits.

A module stores four parts beside each other:

    weight_packed      int32 [O, ceil(I*b/32)]   codes + 2^(b-1), one little-endian bit stream per row
    weight_scale       float [O, NG]
    weight_shape       int64 [2]                 O, I
    weight_zero_point  int32 [ceil(O*b/32), NG]  asymmetric only: the same stream, running along O
    weight_g_idx       int32 [I]                 old files only (actorder "group"): the group of every column, or all -1

and means W[o, i] = (q[o, i] - z[o, g]) * s[o, g] with g = i//G, or weight_g_idx[i] where stored; q and z are signed in
[-2^(b-1), 2^(b-1) - 1], and z = 0 when symmetric. Field names and the stored form are those of the
compressed-tensors library (0.20).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.errors import FormatError

FORMAT = "pack-quantized"  # the row that this file is the code of
SCALE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Config keys of one `weights` entry that say nothing about the stored bytes: how the numbers were found.
_CALIBRATION_KEYS = frozenset({"observer", "observer_kwargs"})
_HANDLED_KEYS = frozenset({"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"})
_GROUP_ORDERS = ("group", "dynamic", True)  # actorder up to 0.19: columns of one group are scattered, see weight_g_idx
# Values that leave the stored form as it is. "weight" and "static" order the columns only while quantizing.
_NEUTRAL_VALUES: Mapping[str, tuple[object, ...]] = {
    "actorder": (False, "weight", "static"),
    "scale_dtype": ("torch.bfloat16", "torch.float16", "torch.float32", "bfloat16", "float16", "float32"),
    "zp_dtype": ("torch.int8", "int8"),
}

_CPU_CHUNK_WEIGHTS = 1 << 18  # 1 MiB as float32: small enough for the caches, big enough to hide a torch call
_DEVICE_CHUNK_WEIGHTS = 1 << 26  # elsewhere only memory bounds the chunk, and few kernel launches are wanted


@dataclass(frozen=True)
class IntScheme:
    """How the weights of a module become integers. Raises FormatError for values that the format cannot express."""

    bits: int  # 1..8
    group_size: int | None  # columns that share one scale; None = one scale per output row (channel)
    symmetric: bool  # False: a zero point per group
    act_order: bool = False  # old files: weight_g_idx says the group of every column

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or not 1 <= self.bits <= 8:
            raise FormatError(f"bits: found {self.bits!r}, wanted a whole number from 1 to 8")
        if self.group_size is not None and (not _is_int(self.group_size) or self.group_size < 1):
            raise FormatError(
                f"group_size: found {self.group_size!r}, wanted a positive whole number, or None for channel scales"
            )
        if not isinstance(self.symmetric, bool):
            raise FormatError(f"symmetric: found {self.symmetric!r}, wanted true or false")

    @property
    def code_min(self) -> int:
        """Lowest signed code, -2^(b-1)."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """Highest signed code, 2^(b-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def count_groups(self, in_features: int) -> int:
        """NG: scales per output row; a last group may be shorter than the others."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight: codes, 16-bit scales and zero points, without tail padding and `weight_shape`."""
        per_group = 16 + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.count_groups(in_features) / in_features

    def to_config(self) -> dict[str, Any]:
        """The `weights` entry of a config group in `quantization_config`."""
        config: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "channel" if self.group_size is None else "group",
        }
        if self.group_size is not None:
            config["group_size"] = self.group_size
        return config | ({"actorder": "group"} if self.act_order else {}) | {"dynamic": False}

    @classmethod
    def from_config(cls, weights: Mapping[str, Any]) -> IntScheme:
        """Read the `weights` entry of a config group; absent keys have the library's defaults.

        Raises FormatError for a type, strategy, ordering or key that packed integers do not have.
        """
        type_ = _get(weights, "type", "int")
        if type_ != "int":
            raise FormatError(f"weights.type: found {type_!r}, wanted 'int'")
        if _get(weights, "dynamic", False) is not False:
            raise FormatError(f"weights.dynamic: found {weights['dynamic']!r}, wanted false: weights are stored")
        act_order = weights.get("actorder") in _GROUP_ORDERS
        for key, value in weights.items():
            if key == "actorder" and act_order:
                continue
            if key in _HANDLED_KEYS or key in _CALIBRATION_KEYS or value is None:
                continue
            if value not in _NEUTRAL_VALUES.get(key, ()):
                wanted = " or ".join(["null", *(repr(v) for v in _NEUTRAL_VALUES.get(key, ()))])
                raise FormatError(f"weights.{key}: found {value!r}, wanted {wanted} for packed integer weights")

        group_size = weights.get("group_size")
        if group_size is not None and not _is_int(group_size):
            raise FormatError(f"weights.group_size: found {group_size!r}, wanted a whole number or null")
        strategy = weights.get("strategy")
        if strategy is None:  # the library's rule: the group size says it
            strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
        if strategy == "channel":
            if group_size not in (None, -1):
                raise FormatError(f"weights.group_size: found {group_size}, wanted null with strategy 'channel'")
            group_size = None
        elif strategy == "group":
            if group_size is None or group_size < 1:
                raise FormatError(f"weights.group_size: found {group_size}, wanted >= 1 with strategy 'group'")
        else:
            raise FormatError(f"weights.strategy: found {strategy!r}, wanted 'group' or 'channel'")
        try:
            return cls(_get(weights, "num_bits", 8), group_size, _get(weights, "symmetric", True), act_order)
        except FormatError as error:
            raise FormatError(f"weights: {error}") from None


def read_scheme(weights: Mapping[str, Any]) -> IntScheme:
    """From the `weights` entry of a config group, as every compressed-tensors format offers it."""
    return IntScheme.from_config(weights)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Write each row as one bit stream, lowest bit first: element i takes bits [i*b, i*b + b) of its row.

    codes:   [rows, n] any integer dtype, values 0 .. 2^bits - 1 (higher bits are dropped)
    returns: [rows, ceil(n*bits/32)] int32; the tail of a row is zero
    """
    rows, n = codes.shape
    lanes_per_row = -(-n // 8)
    stream_bytes = -(-n * bits // 32) * 4
    fields = codes.new_zeros((rows, lanes_per_row * 8), dtype=torch.uint8)
    fields[:, :n] = codes
    if bits == 8:
        stream = fields
    else:
        # Eight one-byte fields in a 64-bit lane move together in three steps, pairs first: 8 x b, 4 x 2b, 2 x 4b.
        lanes = fields.view(torch.int64)
        for half, step in ((bits, 8), (2 * bits, 16), (4 * bits, 32)):
            low, high = _field_masks(half, step), _field_masks(half, step) << half
            lanes = (lanes & low) | ((lanes >> (step - half)) & high)
        stream = lanes.view(torch.uint8).view(rows, lanes_per_row, 8)[..., :bits].reshape(rows, lanes_per_row * bits)
    packed = stream.new_zeros((rows, stream_bytes))
    used_bytes = min(stream_bytes, stream.shape[1])  # what a last lane has beyond the last word is padding
    packed[:, :used_bytes] = stream[:, :used_bytes]
    return packed.view(torch.int32)


def unpack_rows(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` elements of each row's bit stream, as `pack_rows` wrote them.

    packed:  [rows, words] int32, words * 32 >= n * bits
    returns: [rows, n] uint8, values 0 .. 2^bits - 1; new memory, rows not necessarily contiguous
    """
    rows, words = packed.shape
    # Flat, since a [rows, 1] that counts as contiguous may have a stride that .view(dtype) refuses.
    words_flat = packed.contiguous().view(-1)
    if bits == 8:
        return words_flat.view(torch.uint8).view(rows, -1)[:, :n].clone()
    if bits in (1, 2, 4):  # eight elements are a whole uint8, int16 or int32
        units = words_flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[bits])
        lanes = units.view(rows, -1).to(torch.int64, copy=True)
    else:  # eight elements are b bytes: copy them to the low end of a 64-bit lane
        lanes_per_row = -(-n // 8)
        stream = words_flat.view(torch.uint8).view(rows, words * 4)
        missing_bytes = lanes_per_row * bits - words * 4  # the last lane may end beyond the last word
        if missing_bytes > 0:
            stream = torch.nn.functional.pad(stream, (0, missing_bytes))
        blocks = stream[:, : lanes_per_row * bits].unflatten(1, (lanes_per_row, bits))
        lane_bytes = stream.new_zeros((rows, lanes_per_row, 8))
        for k in range(bits):  # b long strided copies: faster than one copy with rows of b bytes
            lane_bytes[..., k] = blocks[..., k]
        lanes = lane_bytes.view(torch.int64).squeeze(-1)
    # The steps of pack_rows backwards. A sign-extended lane does no harm: the first masks cut it off.
    upper = torch.empty_like(lanes)
    for half, step in ((4 * bits, 32), (2 * bits, 16), (bits, 8)):
        torch.bitwise_left_shift(lanes, step - half, out=upper)
        upper &= _field_masks(half, step) << step
        lanes &= _field_masks(half, step)
        lanes |= upper
    return lanes.view(torch.uint8)[:, :n]


def rows_to_read(scheme: IntScheme, parts: Collection[str], first: int, last: int) -> dict[str, tuple[int, int]]:
    """The rows of each part that output features first..last need; first is a multiple of 32."""
    needed = {"weight_packed": (first, last), "weight_scale": (first, last)}
    if "weight_zero_point" in parts:  # packed along the rows
        needed["weight_zero_point"] = (first * scheme.bits // 32, -(-last * scheme.bits // 32))
    return needed


def dequantize(
    parts: Mapping[str, Tensor], scheme: IntScheme, module: str = "tensor", dtype: torch.dtype = torch.float32
) -> Tensor:
    """The dense weight of a module, computed in float32 as (q - z) * s and then cast to `dtype`.

    parts:   the stored parts named at the top of this file, all on one device; others (a bias) are ignored
    returns: [O, I] `dtype` on the device of the parts

    Raises FormatError, naming `{module}.{part}`, when parts are missing, do not fit each other or the scheme, or hold
    a scale that is not finite. A last group shorter than the others is read.
    """
    out_features, in_features = _check_parts(parts, scheme, module)
    index = _column_groups(parts, scheme, module)
    packed, scale = parts["weight_packed"], parts["weight_scale"].float()
    bits, groups = scheme.bits, scheme.count_groups(in_features)
    group_size = scheme.group_size or in_features
    offset: Tensor | None = None  # [O, NG] float32: the zero point as stored, so that q - z = code - offset
    if not scheme.symmetric:
        offset = unpack_rows(parts["weight_zero_point"].t(), bits, out_features).t().float()

    dense = torch.empty((out_features, in_features), dtype=dtype, device=packed.device)
    padded = in_features if index is not None else groups * group_size
    in_place = dtype == torch.float32 and padded == in_features
    chunk_rows = _rows_per_chunk(padded, packed.device)
    for start in range(0, out_features, chunk_rows):
        rows = slice(start, min(start + chunk_rows, out_features))
        count = rows.stop - start
        values = dense[rows] if in_place else dense.new_zeros((count, padded), dtype=torch.float32)
        values[:, :in_features].copy_(unpack_rows(packed[rows], bits, in_features))
        if index is not None:
            values -= (1 << (bits - 1)) if offset is None else offset[rows].index_select(1, index)
            values *= scale[rows].index_select(1, index)
        else:
            grouped = values.view(count, groups, group_size)  # [rows, NG, G]
            grouped -= (1 << (bits - 1)) if offset is None else offset[rows, :, None]
            grouped *= scale[rows, :, None]
        if not in_place:
            dense[rows] = values[:, :in_features]
    return dense


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: IntScheme,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The stored parts of a module, contiguous and on the device of `codes`.

    codes:      [O, I] signed integers of the scheme's range
    scale:      [O, NG] float, cast to `scale_dtype`; I must be a multiple of the group size
    zero_point: [O, NG] signed integers of the scheme's range; None exactly when the scheme is symmetric

    Raises FormatError for shapes, dtypes or values that the stored form cannot hold.
    """
    if codes.ndim != 2 or 0 in codes.shape:
        raise FormatError(f"codes: found shape {list(codes.shape)}, wanted [out, in]")
    out_features, in_features = codes.shape
    if scheme.group_size is not None and in_features % scheme.group_size:
        raise FormatError(f"group_size {scheme.group_size} does not divide the {in_features} columns; keep it dense")
    if scale_dtype not in SCALE_DTYPES:
        raise FormatError(f"scale_dtype: found {scale_dtype}, wanted one of {_names(SCALE_DTYPES)}")
    if (zero_point is None) != scheme.symmetric:
        raise FormatError(
            "zero_point: found one, wanted None for a symmetric scheme"
            if scheme.symmetric
            else "zero_point: found None, wanted [out, groups] for an asymmetric scheme"
        )
    wanted = (out_features, scheme.count_groups(in_features))
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise FormatError(f"{name}: found shape {list(tensor.shape)}, wanted {list(wanted)}")
    for name, integers in (("codes", codes), ("zero_point", zero_point)):
        if integers is None:
            continue
        if integers.is_floating_point() or integers.dtype == torch.bool:
            raise FormatError(f"{name}: found {integers.dtype}, wanted signed integers")
        low, high = (int(v) for v in integers.aminmax())
        if low < scheme.code_min or high > scheme.code_max:
            raise FormatError(
                f"{name}: found values {low} to {high}, wanted {scheme.code_min} to {scheme.code_max} "
                f"for {scheme.bits} bits"
            )
    stored_scale = scale.to(scale_dtype).contiguous()
    if not bool(stored_scale.isfinite().all()):
        raise FormatError(f"scale: found NaN or infinite values as {scale_dtype}, wanted finite ones")

    half = 1 << (scheme.bits - 1)
    parts = {
        "weight_packed": pack_rows(codes.to(torch.int16) + half, scheme.bits),
        "weight_scale": stored_scale,
        "weight_shape": torch.tensor([out_features, in_features], dtype=torch.int64, device=codes.device),
    }
    if zero_point is not None:
        parts["weight_zero_point"] = pack_rows(zero_point.t().to(torch.int16) + half, scheme.bits).t().contiguous()
    return parts


def _check_parts(parts: Mapping[str, Tensor], scheme: IntScheme, module: str) -> tuple[int, int]:
    """(O, I) of parts that fit each other and the scheme; FormatError for any others."""
    needed = ["weight_packed", "weight_scale", "weight_shape"] + ([] if scheme.symmetric else ["weight_zero_point"])
    for name in needed:
        if name not in parts:
            raise FormatError(f"{module}.{name}: not found, wanted for {_describe(scheme)}")
    if scheme.act_order and "weight_g_idx" not in parts:
        raise FormatError(f"{module}.weight_g_idx: not found, wanted for columns grouped by activation order")
    if scheme.symmetric and "weight_zero_point" in parts:
        raise FormatError(f"{module}.weight_zero_point: found, wanted none for {_describe(scheme)}")

    shape = parts["weight_shape"]
    if shape.dtype not in (torch.int64, torch.int32) or tuple(shape.shape) != (2,):
        raise FormatError(f"{module}.weight_shape: found {shape.dtype} {list(shape.shape)}, wanted torch.int64 [2]")
    out_features, in_features = (int(v) for v in shape.tolist())
    if out_features < 1 or in_features < 1:
        raise FormatError(f"{module}.weight_shape: found {[out_features, in_features]}, wanted positive [out, in]")

    bits, groups = scheme.bits, scheme.count_groups(in_features)
    _check_part(parts, module, "weight_packed", (torch.int32,), (out_features, math.ceil(in_features * bits / 32)))
    _check_part(parts, module, "weight_scale", SCALE_DTYPES, (out_features, groups))
    if not scheme.symmetric:
        _check_part(parts, module, "weight_zero_point", (torch.int32,), (math.ceil(out_features * bits / 32), groups))
    finite = parts["weight_scale"].isfinite()
    if not bool(finite.all()):
        raise FormatError(
            f"{module}.weight_scale: found {int((~finite).sum())} NaN or infinite values in {finite.numel()}, "
            "wanted finite ones"
        )
    return out_features, in_features


def _column_groups(parts: Mapping[str, Tensor], scheme: IntScheme, module: str) -> Tensor | None:
    """The group of every column [I] int64; None where they are the neighbours' (no g_idx, or -1 as a placeholder)."""
    g_idx = parts.get("weight_g_idx")
    if g_idx is None:
        return None
    in_features = int(parts["weight_shape"].tolist()[1])
    if g_idx.dtype not in (torch.int32, torch.int64) or tuple(g_idx.shape) != (in_features,):
        raise FormatError(
            f"{module}.weight_g_idx: found {g_idx.dtype} {list(g_idx.shape)}, wanted torch.int32 [{in_features}]"
        )
    low, high = (int(value) for value in g_idx.aminmax())
    if low == high == -1:
        return None
    groups = scheme.count_groups(in_features)
    if low < 0 or high >= groups:
        raise FormatError(f"{module}.weight_g_idx: found groups {low} to {high}, wanted 0 to {groups - 1}")
    return g_idx.to(torch.int64)


def _check_part(
    parts: Mapping[str, Tensor], module: str, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]
) -> None:
    part = parts[name]
    if part.dtype not in dtypes:
        raise FormatError(f"{module}.{name}: found {part.dtype}, wanted {_names(dtypes)}")
    if tuple(part.shape) != shape:
        raise FormatError(
            f"{module}.{name}: found shape {list(part.shape)}, wanted {list(shape)}, from weight_shape "
            f"{parts['weight_shape'].tolist()} and the config's scheme"
        )


def _field_masks(width: int, step: int) -> int:
    """`width` ones at bits 0, 2*step, 4*step ... of 64. Below 2^63 even shifted by `step`, as bits < 8."""
    return sum(((1 << width) - 1) << at for at in range(0, 64, 2 * step))


def _rows_per_chunk(columns: int, device: torch.device) -> int:
    return max(1, (_CPU_CHUNK_WEIGHTS if device.type == "cpu" else _DEVICE_CHUNK_WEIGHTS) // columns)


def _describe(scheme: IntScheme) -> str:
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    return f"{kind} {scheme.bits}-bit weights"


def _get(config: Mapping[str, Any], key: str, default: object) -> Any:
    value = config.get(key)
    return default if value is None else value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
