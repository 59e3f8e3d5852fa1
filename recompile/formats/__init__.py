"""The table of formats: which stored parts make up one module. Imports no torch.

A format is one row here and one file beside this one, named by the row's `code`, which offers

    dequantize(parts, scheme, module) -> Tensor     dense [out_features, in_features]

A row tells from tensor headers alone which format a module is in and what its shape is, so that recipes, plans and
`--dry-run` never read a tensor. Stored size needs no row: it is the bytes of all parts of the module, bias included.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


class Header(Protocol):
    """What a tensor's header says of it."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


Headers = Mapping[str, Header]


@dataclass(frozen=True)
class FormatSpec:
    """One way to store a weight.

    name:     the format's name in reports, e.g. "exl2"
    required: parts that must all be there for a module to be in this format
    marks:    (part, dtypes): the part whose dtype tells formats with equal part names apart
    code:     module below recompile.formats with `dequantize`; None where there is nothing to decode
    shape:    headers -> (out_features, in_features) as stored (padded where the format pads), None where only the
              model knows
    unless:   parts whose presence means another format
    runnable: False for formats that are recognised only to be refused by name
    """

    name: str
    required: tuple[str, ...]
    marks: tuple[str, frozenset[str]]
    code: str | None
    shape: Callable[[Headers], tuple[int, ...] | None]
    unless: tuple[str, ...] = ()
    runnable: bool = True

    def matches(self, parts: Headers) -> bool:
        if any(part not in parts for part in self.required) or any(part in parts for part in self.unless):
            return False
        part, dtypes = self.marks
        return part in parts and parts[part].dtype in dtypes

    def load_code(self) -> ModuleType:
        assert self.code is not None, f"{self.name} has nothing to decode"
        return importlib.import_module(f"recompile.formats.{self.code}")


def _weight_shape(parts: Headers) -> tuple[int, ...] | None:
    return tuple(parts["weight"].shape) if "weight" in parts else None


def _exl2_shape(parts: Headers) -> tuple[int, ...]:
    return (parts["q_weight"].shape[-1], parts["q_invperm"].shape[0])


def _exl3_shape(parts: Headers) -> tuple[int, ...] | None:
    trellis = parts["trellis"].shape
    return (trellis[1] * 16, trellis[0] * 16) if len(trellis) == 3 else None


_INT32 = frozenset({"I32"})

# Asked from top to bottom; the first row that matches names the format. "dense" is last: any module whose parts are
# all floating point, a norm or a stray parameter included.
FORMATS: dict[str, FormatSpec] = {
    row.name: row
    for row in (
        FormatSpec("exl2", ("q_weight",), ("q_weight", _INT32), "exl2", _exl2_shape),
        FormatSpec("exl3", ("trellis",), ("trellis", frozenset({"I16"})), "exl3", _exl3_shape),
        FormatSpec(
            "pack-quantized",
            ("weight_packed", "weight_scale"),
            ("weight_packed", _INT32),
            "packed_int",
            lambda parts: None,  # in_features stands in the tensor weight_shape
        ),
        FormatSpec(
            "nvfp4-pack-quantized",
            ("weight_packed", "weight_scale", "weight_global_scale"),
            ("weight_packed", frozenset({"U8"})),
            None,
            lambda parts: (parts["weight_packed"].shape[0], parts["weight_packed"].shape[1] * 2),
            runnable=False,
        ),
        FormatSpec(
            "mxfp4-pack-quantized",
            ("weight_packed", "weight_scale"),
            ("weight_packed", frozenset({"U8"})),
            None,
            lambda parts: None,
            runnable=False,
        ),
        FormatSpec(
            "float-quantized",
            ("weight",),
            ("weight", frozenset({"F8_E4M3", "F8_E5M2"})),
            None,
            _weight_shape,
            runnable=False,
        ),
        FormatSpec(
            "int-quantized",
            ("weight", "weight_scale"),
            ("weight", frozenset({"I8"})),
            None,
            _weight_shape,
            runnable=False,
        ),
        FormatSpec("gptq", ("qweight", "scales"), ("qweight", _INT32), None, lambda parts: None, runnable=False),
        FormatSpec("dense", (), ("weight", FLOAT_DTYPES), None, _weight_shape, unless=("weight_scale",)),
    )
}

# Suffixes under which a format stores one module's weight; anything else below a module is a parameter of its own.
WEIGHT_PARTS = frozenset(
    {"weight", "bias", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
    | {"weight_global_scale", "input_scale", "input_global_scale", "weight_scale_inv", "weight_scale_2"}
    | {"q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm"}
    | {"trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "signs"}
    | {"qweight", "qzeros", "scales", "g_idx"}
)


def format_of(parts: Headers) -> FormatSpec:
    """The format that a module's parts are in. Parts that are no format's at all count as dense parameters."""
    for spec in FORMATS.values():
        if spec.matches(parts):
            return spec
    return FORMATS["dense"]
