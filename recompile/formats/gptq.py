"""GPTQ checkpoints: integer weights of 2 to 8 bits, stored transposed. Layouts `gptq` (v1), `gptq_v2` and `gptq_p`.

Axes: O = out_features, I = in_features, G = group size, NG = ceil(I/G) (1 for group_size -1), b = bits. A module stores

    qweight  int32 [I*b/32, O]   codes u, packed along I
    qzeros   int32 [NG, O*b/32]  zero points z, packed along O
    scales   float [NG, O]
    g_idx    int32 [I]           group of every input; optional, i//G where missing

and means W[o, i] = (u[i, o] - z[g, o]) * s[g, o] with g = g_idx[i]. v1 stores z - 1 in every field, the others z. The
layouts v1 and v2 pack one little-endian bit stream; planar `gptq_p` splits the bits of 32 codes over planes. Names and
config keys are those of AutoGPTQ and GPTQModel (7.7).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from recompile.errors import FormatError, UnsupportedError
from recompile.formats.checks import SCALE_DTYPES, check_finite, check_matrix, get_part, row_chunks
from recompile.formats.packed_int import unpack_rows
from recompile.formats.stored import Described, StoredModule
from recompile.io.patterns import Regex, compile_regex
from recompile.io.schema import describe

LAYOUTS = ("gptq", "gptq_v2", "gptq_p")
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # low bits first
_OVERRIDABLE = ("bits", "group_size", "sym")  # what a `dynamic` rule may change of the stored form


@dataclass(frozen=True)
class GptqScheme:
    """How a module is stored. Raises FormatError for values that the format does not have."""

    bits: int  # 2..8
    group_size: int | None  # None: one scale per output
    symmetric: bool | None  # True: every zero point must be 2^(b-1); None: the config does not say
    layout: str = "gptq"  # one of LAYOUTS

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or self.bits not in PLANES:
            raise FormatError(f"bits: found {self.bits!r}, wanted a whole number from 2 to 8")
        if self.group_size is not None and (not _is_int(self.group_size) or self.group_size < 1):
            raise FormatError(f"group_size: found {self.group_size!r}, wanted a whole number above 0, or -1")
        if self.symmetric not in (True, False, None):
            raise FormatError(f"sym: found {self.symmetric!r}, wanted true or false")
        if self.layout not in LAYOUTS:
            raise FormatError(f"checkpoint_format: found {self.layout!r}, wanted {' or '.join(LAYOUTS)}")


def scheme_of(checkpoint: Described, module: StoredModule) -> GptqScheme:
    """The scheme of a module by the checkpoint's config. Raises FormatError, or UnsupportedError for layouts that were
    repacked for one kernel."""
    try:
        scheme = read_scheme(checkpoint.quantization_config, module.name)
    except UnsupportedError as error:
        raise UnsupportedError(f"{checkpoint.label}: {error}") from error
    except FormatError as error:
        raise FormatError(f"{checkpoint.label}: config of {module.name}: {error}") from error
    if module.format != "gptq":
        found = ", ".join(f"{part} {list(info.shape)}" for part, info in module.parts.items())
        raise FormatError(
            f"{checkpoint.label}: config.json says GPTQ, and {module.name} is not packed so: qweight and scales must "
            f"have the same columns, it has {found}"
        )
    return scheme


def read_scheme(config: Mapping[str, Any], module: str) -> GptqScheme:
    """The scheme that a GPTQ `quantization_config` gives a module: the base values, changed by the first `dynamic` rule
    that matches. Raises FormatError and UnsupportedError."""
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout == "marlin" or config.get("is_marlin_format"):
        raise UnsupportedError(
            "checkpoint_format 'marlin' in config.json: the weights were repacked for one GPU kernel; "
            "use the GPTQ checkpoint that they were made from"
        )
    if layout not in LAYOUTS:
        raise UnsupportedError(f"checkpoint_format {layout!r} in config.json: this version reads {', '.join(LAYOUTS)}")
    pack_dtype = str(config.get("pack_dtype") or "int32").removeprefix("torch.")
    if pack_dtype != "int32":
        raise UnsupportedError(f"pack_dtype {pack_dtype!r} in config.json: this version reads int32")
    values = {key: config.get(key) for key in _OVERRIDABLE}
    rule = _first_rule(config.get("dynamic"), module)
    if rule is not None:
        pattern, overrides = rule
        if pattern.startswith("-:"):
            raise FormatError(f"dynamic rule {pattern!r} says that it is not quantized, and it is stored quantized")
        values |= {key: overrides[key] for key in _OVERRIDABLE if overrides.get(key) is not None}
    if values["bits"] is None:
        raise FormatError("bits: not found in config.json or quantize_config.json")
    group_size = values["group_size"]
    return GptqScheme(values["bits"], None if group_size in (None, -1) else group_size, values["sym"], str(layout))


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Regex:
    return compile_regex(pattern, "dynamic")


def _first_rule(dynamic: Any, module: str) -> tuple[str, Mapping[str, Any]] | None:
    """The first rule of `dynamic` whose regex matches from the start of the module's name."""
    if not dynamic:
        return None
    if not isinstance(dynamic, Mapping):
        raise FormatError(f"dynamic: found {describe(dynamic)}, wanted an object of rules")
    for pattern, overrides in dynamic.items():
        regex = pattern[2:] if pattern[:2] in ("+:", "-:") else pattern
        if _compiled(regex).match(module):
            if overrides is not None and not isinstance(overrides, Mapping):
                raise FormatError(f"dynamic rule {pattern!r}: found {overrides!r}, wanted an object")
            return pattern, overrides or {}
    return None


def unpack_planes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes of each row of planar words.

    Each 32 codes are b words, planes of low bits first. A plane of width w holds w bits of every code in w words, the
    j-th code of a word at shift w*j.

    packed:  [rows, words] int32, words a multiple of `bits`
    returns: [rows, n] uint8
    """
    blocks = packed.unflatten(1, (-1, bits))  # [rows, blocks, b]
    codes = torch.zeros((*blocks.shape[:2], 32), dtype=torch.int32, device=packed.device)
    low = 0
    for width in PLANES[bits]:
        shifts = torch.arange(0, 32, width, dtype=torch.int32, device=packed.device)
        fields = blocks[..., low : low + width, None] >> shifts & ((1 << width) - 1)  # [rows, blocks, w, 32/w]
        codes |= fields.flatten(2) << low
        low += width
    return codes.flatten(1)[:, :n].to(torch.uint8)


def unpack_codes(packed: Tensor, scheme: GptqScheme, n: int) -> Tensor:
    """Rows of stored words -> [rows, n] uint8, in the scheme's layout."""
    unpack = unpack_planes if scheme.layout == "gptq_p" else unpack_rows
    return unpack(packed, scheme.bits, n)


def unpack_zeros(qzeros: Tensor, scheme: GptqScheme, out_features: int) -> Tensor:
    """True zero points [NG, O] uint8: v1's fields are one too low, modulo 2^b."""
    zeros = unpack_codes(qzeros, scheme, out_features)
    if scheme.layout == "gptq":
        zeros = (zeros + 1) & ((1 << scheme.bits) - 1)  # uint8 wraps at 8 bits as it should
    return zeros


def count_words(n: int, scheme: GptqScheme) -> int:
    """int32 words that n codes take."""
    return -(-n // 32) * scheme.bits if scheme.layout == "gptq_p" else -(-n * scheme.bits // 32)


def dequantize(parts: Mapping[str, Tensor], scheme: GptqScheme, module: str = "tensor") -> Tensor:
    """The dense weight [O, I] float32 of a module, computed in float32 as (u - z) * s.

    Raises FormatError, naming `{module}.{part}`, for parts that are missing, do not fit each other or the scheme (as
    where a `dynamic` rule is missing), scales that are not finite, groups that do not exist, and zero points other than
    2^(b-1) where the scheme is symmetric.
    """
    qweight = get_part(parts, module, "qweight", (torch.int32,))
    words, out_features = check_matrix(qweight, f"{module}.qweight")
    scales = get_part(parts, module, "scales", SCALE_DTYPES)
    groups = check_matrix(scales, f"{module}.scales")[0]
    if scales.shape[1] != out_features:
        raise FormatError(
            f"{module}.scales: found {scales.shape[1]} columns, wanted {out_features}, as many as qweight has"
        )
    check_finite(scales, f"{module}.scales")
    given = f"from {scheme.bits} bits in the config; is a rule of `dynamic` missing?"
    wanted = (groups, count_words(out_features, scheme))
    qzeros = get_part(parts, module, "qzeros", (torch.int32,), wanted, given)

    g_idx = parts.get("g_idx")
    in_features = words * 32 // scheme.bits if g_idx is None or g_idx.dim() != 1 else g_idx.shape[0]
    if count_words(in_features, scheme) != words or in_features < 1:
        raise FormatError(
            f"{module}.qweight: found {words} rows, wanted {count_words(in_features, scheme)} for {in_features} "
            f"inputs, {given}"
        )
    group_size = scheme.group_size or in_features
    if groups != -(-in_features // group_size):
        raise FormatError(
            f"{module}.scales: found {groups} groups, wanted {-(-in_features // group_size)} for {in_features} inputs "
            f"and group_size {scheme.group_size or -1} in the config; is a rule of `dynamic` missing?"
        )
    index = torch.arange(in_features, dtype=torch.int64, device=qweight.device) // group_size
    if g_idx is not None:
        found = get_part(parts, module, "g_idx", (torch.int32, torch.int64), (in_features,), "one group per input")
        low, high = (int(value) for value in found.aminmax())
        if low < 0 or high >= groups:
            raise FormatError(f"{module}.g_idx: found groups {low} to {high}, wanted 0 to {groups - 1}")
        index = found.to(torch.int64)

    zeros = unpack_zeros(qzeros, scheme, out_features)  # [NG, O]
    middle = 1 << (scheme.bits - 1)
    if scheme.symmetric and bool((zeros != middle).any()):
        raise FormatError(
            f"{module}.qzeros: found zero points {int(zeros.min())} to {int(zeros.max())}, wanted all {middle}: the "
            f"config says sym; is checkpoint_format {scheme.layout!r} right?"
        )
    scale_rows, zero_rows = scales.t().float(), zeros.t().float()  # [O, NG]
    dense = torch.empty((out_features, in_features), dtype=torch.float32, device=qweight.device)
    for rows in row_chunks(out_features, in_features, qweight.device):
        values = dense[rows].copy_(unpack_codes(qweight[:, rows].t().contiguous(), scheme, in_features))
        values -= zero_rows[rows].index_select(1, index)
        values *= scale_rows[rows].index_select(1, index)
    return dense


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
