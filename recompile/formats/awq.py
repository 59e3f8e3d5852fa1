"""AWQ checkpoints, version GEMM: 4-bit integer weights, stored transposed and packed along the outputs.

Axes: O = out_features, I = in_features, G = group size, NG = ceil(I/G) (1 for group_size -1). A module stores

    qweight  int32 [I, O/8]    codes u, eight outputs a word
    qzeros   int32 [NG, O/8]   zero points z, the same
    scales   float [NG, O]

and means W[o, i] = (u[i, o] - z[i//G, o]) * s[i//G, o]. The nibble at shift 4p of word c is output 8c + ORDER[p]. Names
and config keys are those of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.errors import FormatError, UnsupportedError
from recompile.formats.checks import SCALE_DTYPES, check_finite, check_matrix, get_part, row_chunks
from recompile.formats.stored import Described, StoredModule

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class AwqScheme:
    """group_size: None for one scale per output; zero_point False: every stored zero point must be 8."""

    group_size: int | None
    zero_point: bool = True

    def __post_init__(self) -> None:
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise FormatError(f"group_size: found {size!r}, wanted a whole number above 0, or -1")
        if not isinstance(self.zero_point, bool):
            raise FormatError(f"zero_point: found {self.zero_point!r}, wanted true or false")


def scheme_of(checkpoint: Described, module: StoredModule) -> AwqScheme:
    """The scheme of a module by the checkpoint's config. Raises FormatError, or UnsupportedError for other versions."""
    try:
        scheme = read_scheme(checkpoint.quantization_config)
    except UnsupportedError as error:
        raise UnsupportedError(f"{checkpoint.label}: {error}") from error
    except FormatError as error:
        raise FormatError(f"{checkpoint.label}: config of {module.name}: {error}") from error
    if module.format != "awq":
        raise FormatError(
            f"{checkpoint.label}: config.json says AWQ, and {module.name} is not packed so: its qweight has as "
            f"many columns as its scales, as GPTQ's has"
        )
    return scheme


def read_scheme(config: Mapping[str, Any]) -> AwqScheme:
    """The scheme that an AWQ `quantization_config` gives every module. Raises FormatError, UnsupportedError."""
    version = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
    if version != "gemm":
        raise UnsupportedError(f"AWQ version {version!r} in config.json has another layout; this version reads gemm")
    bits = config.get("bits", config.get("w_bit", BITS))
    if bits != BITS or isinstance(bits, bool):
        raise FormatError(f"bits: found {bits!r}, wanted {BITS} for AWQ")
    group_size = config.get("group_size", config.get("q_group_size"))
    zero_point = config.get("zero_point")
    if zero_point is None:  # GPTQModel's key
        zero_point = not config.get("sym", False)
    return AwqScheme(None if group_size in (None, -1) else group_size, zero_point)


def unpack_words(words: Tensor) -> Tensor:
    """Codes in natural order.

    words:   [rows, n] int32
    returns: [rows, 8n] uint8
    """
    shifts = [BITS * ORDER.index(column) for column in range(PER_WORD)]
    fields = words[..., None] >> torch.tensor(shifts, dtype=torch.int32, device=words.device) & 15  # [rows, n, 8]
    return fields.to(torch.uint8).flatten(1)


def dequantize(parts: Mapping[str, Tensor], scheme: AwqScheme, module: str = "tensor") -> Tensor:
    """The dense weight [O, I] float32 of a module, computed in float32 as (u - z) * s.

    Raises FormatError, naming `{module}.{part}`, for parts that are missing or do not fit each other or the scheme,
    scales that are not finite, and zero points other than 8 where the scheme has none.
    """
    qweight = get_part(parts, module, "qweight", (torch.int32,))
    in_features, words = check_matrix(qweight, f"{module}.qweight")
    out_features = words * PER_WORD
    group_size = scheme.group_size or in_features
    groups = -(-in_features // group_size)
    given = f"for {in_features} inputs and group_size {scheme.group_size or -1} in the config"
    scales = get_part(parts, module, "scales", SCALE_DTYPES, (groups, out_features), given)
    check_finite(scales, f"{module}.scales")
    zeros = unpack_words(get_part(parts, module, "qzeros", (torch.int32,), (groups, words), given))  # [NG, O]
    if not scheme.zero_point and bool((zeros != 8).any()):
        raise FormatError(
            f"{module}.qzeros: found zero points {int(zeros.min())} to {int(zeros.max())}, wanted all 8: the config "
            f"says that there are none, and tools do not agree on what that means"
        )
    if "g_idx" in parts:
        raise FormatError(f"{module}.g_idx: found, wanted none: AWQ has no activation order")
    dense = torch.empty((out_features, in_features), dtype=torch.float32, device=qweight.device)
    for rows in row_chunks(in_features, out_features, qweight.device):
        group = torch.arange(rows.start, rows.stop, device=qweight.device) // group_size
        values = unpack_words(qweight[rows]).float()  # [inputs, O]
        values -= zeros.index_select(0, group)
        values *= scales.index_select(0, group).float()
        dense[:, rows] = values.t()
    return dense
