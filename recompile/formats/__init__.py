"""The table of formats: which stored parts make up one module. Imports no torch.

A format is one row here and one file beside this one, named by the row's `code`, which offers

    dequantize(parts, scheme, module) -> Tensor     dense [out_features, in_features]

Where tensors alone do not say how to read them, the row names who reads the config, one per `quant_method`: a file
beside this one with

    scheme_of(checkpoint, module) -> the scheme that dequantize takes

and may offer, so that a few rows of a large module can be decoded alone,

    take_rows(parts, first, last) -> parts          of output features first..last, whole parts read before
    rows_to_read(scheme, parts, first, last) -> {part: (first, last)}    of parts that are stored by rows

A row tells from tensor headers alone which format a module is in and what its shape is, so that recipes, plans and
`--dry-run` never read a tensor. Stored size needs no row: it is the bytes of all parts of the module, bias included.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol

from recompile.formats.gguf_types import QUANTIZED_TYPES

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
class ShardRules:
    """What a format's engine makes of the files in a model directory.

    all_are_loaded: every *.safetensors there, whatever an index says
    index_counts:   model.safetensors.index.json is read, and must be true
    prefix:         how the shards are called that a merge writes
    metadata:       `format` in the metadata of those shards
    engines:        who loads, for messages
    """

    all_are_loaded: bool = False
    index_counts: bool = True
    prefix: str = "model"
    metadata: str = "pt"
    engines: str = "engines"


@dataclass(frozen=True)
class FormatSpec:
    """One way to store a weight.

    name:     the format's name in reports, e.g. "exl2"
    required: parts that must all be there for a module to be in this format
    marks:    (part, dtypes): the part whose dtype tells formats with equal part names apart
    code:     module below recompile.formats with `dequantize`; None where there is nothing to decode
    shape:    headers -> (out_features, in_features) as stored (padded where the format pads), None where only the
              model knows
    sized_by_config: the shape follows from headers and config.json: the reader offers
              shape_of(checkpoint, name, headers) -> (out_features, in_features)
    unless:   parts whose presence means another format
    when:     headers -> whether they are in this format, where dtypes and part names are not enough
    readers:  quant_method in config.json -> file with `scheme_of`; the first also serves configs that name no method.
              Empty where the parts alone say all
    runnable: False for formats that are recognised only to be refused by name
    pads_to:  stored (out, in) are the model's rounded up to multiples of these
    shards:   how its engine reads a directory
    engine:   the one engine that loads it; None: general ones, by the rules of merge/engine_rules.py
    names_method: config.json's quant_method is the format's own name
    config_is_read: whether its engine reads quantization_config at all
    scales:   part -> dtypes that it may have, of the parts that codes are multiplied by
    levels:   the numbers that its codes stand for, of quantize/float_grids.py; None: integers of any width, or its own
    is_made:  `quantize` makes variants of it by its name
    lazily:   how candidates of it are made in memory: by its "encoder", or as "noise" of the encoder's size; None: not
    names_modes: variants of it are named by modes, as schemes are
    expert_engine: whose sets of experts a mix of it keeps to where no engine is asked for; None: one kernel an expert
    runs_stored_head: whether its engine runs a stored head though the config ties it to the embedding
    merge:    file beside this one that says what a merge of such modules needs, see `load_merge`; None: a family that
              merge/configs.py knows by its quant_method
    """

    name: str
    required: tuple[str, ...]
    marks: tuple[str, frozenset[str]]
    code: str | None
    shape: Callable[[Headers], tuple[int, ...] | None]
    unless: tuple[str, ...] = ()
    when: Callable[[Headers], bool] = lambda parts: True
    readers: Mapping[str, str] = field(default_factory=dict)
    sized_by_config: bool = False
    runnable: bool = True
    pads_to: tuple[int, int] | None = None
    shards: ShardRules = ShardRules()
    engine: str | None = None
    merge: str | None = None
    names_method: bool = False
    config_is_read: bool = True
    scales: Mapping[str, frozenset[str]] = field(default_factory=dict)
    levels: str | None = None
    is_made: bool = False
    lazily: str | None = None
    names_modes: bool = False
    expert_engine: str | None = "vllm"
    runs_stored_head: bool = False

    def matches(self, parts: Headers) -> bool:
        if any(part not in parts for part in self.required) or any(part in parts for part in self.unless):
            return False
        part, dtypes = self.marks
        return part in parts and parts[part].dtype in dtypes and self.when(parts)

    def load_reader(self, quant_method: str | None) -> ModuleType | None:
        """The file that reads a module's scheme from the config of this `quant_method`; None where none is needed.

        Raises KeyError for a method that does not go with the format."""
        if not self.readers:
            return None
        name = next(iter(self.readers.values())) if quant_method is None else self.readers[quant_method]
        return importlib.import_module(f"recompile.formats.{name}")

    def load_merge(self) -> ModuleType | None:
        """The file with `problems(mix)` and `merged_files(mix)` (see mix_facts.py), for formats that have their own."""
        return importlib.import_module(f"recompile.formats.{self.merge}") if self.merge is not None else None

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


def _nvfp4_shape(parts: Headers) -> tuple[int, ...]:
    packed = parts["weight_packed"].shape
    return (*packed[:-1], packed[-1] * 2)


def _modelopt_nvfp4_shape(parts: Headers) -> tuple[int, ...]:
    packed = parts["weight"].shape
    return (*packed[:-1], packed[-1] * 2)


def _mxfp6_shape(parts: Headers) -> tuple[int, ...]:
    packed = parts["weight_packed"].shape
    return (*packed[:-1], packed[-1] * 4 // 3)


def _gptq_shape(parts: Headers) -> tuple[int, ...]:
    """in_features from g_idx, else from the bits that the packed zero points show."""
    out_features = parts["scales"].shape[-1]
    if "g_idx" in parts:
        return (out_features, parts["g_idx"].shape[0])
    bits = parts["qzeros"].shape[-1] * 32 // out_features
    return (out_features, parts["qweight"].shape[0] * 32 // bits)


def _awq_shape(parts: Headers) -> tuple[int, ...]:
    return (parts["scales"].shape[-1], parts["qweight"].shape[0])


def _bytes_per_scale(parts: Headers) -> float:
    packed, scale = parts["weight_packed"].shape, parts["weight_scale"].shape
    return packed[-1] / scale[-1] if packed and scale and scale[-1] else 0.0


_INT32 = frozenset({"I32"})
_UINT8 = frozenset({"U8"})
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})
_EXPONENTS = frozenset({"U8", "F8_E8M0"})  # MX scales: powers of two
_FLOATS = FLOAT_DTYPES - {"F64"}  # what readers and engines take as factors
_E4M3 = frozenset({"F8_E4M3"})
COMPRESSED = "compressed-tensors"  # a family of formats: what `quantize` makes where no other is asked for
_COMPRESSED_TENSORS = {COMPRESSED: "compressed_tensors"}
_FP8_READERS = {"fp8": "fp8", "modelopt": "fp8", "fbgemm_fp8": "fp8"}

# Asked from top to bottom; the first row that matches names the format. "dense" is last: any module whose parts are
# all floating point, a norm or a stray parameter included.
FORMATS: dict[str, FormatSpec] = {
    row.name: row
    for row in (
        FormatSpec(
            "exl2",
            ("q_weight",),
            ("q_weight", _INT32),
            "exl2",
            _exl2_shape,
            pads_to=(32, 32),
            shards=ShardRules(True, index_counts=False, prefix="output", engines="EXL2 engines"),  # its index is stale
            engine="exllamav2",
            merge="exl2_config",
            names_method=True,
            config_is_read=False,
            is_made=True,
            lazily="encoder",
            expert_engine=None,
            runs_stored_head=True,
        ),
        FormatSpec(
            "exl3",
            ("trellis",),
            ("trellis", frozenset({"I16"})),
            "exl3",
            _exl3_shape,
            pads_to=(128, 128),
            shards=ShardRules(True, engines="EXL3 engines"),
            engine="exllamav3",
            merge="exl3_config",
            names_method=True,
            is_made=True,
            lazily="noise",
            expert_engine="exllamav3",
        ),
        FormatSpec(
            "pack-quantized",
            ("weight_packed", "weight_scale"),
            ("weight_packed", _INT32),
            "packed_int",
            lambda parts: None,  # in_features stands in the tensor weight_shape
            scales={"weight_scale": _FLOATS},
            readers=_COMPRESSED_TENSORS,
        ),
        FormatSpec(
            "nvfp4-pack-quantized",
            ("weight_packed", "weight_scale", "weight_global_scale"),
            ("weight_packed", _UINT8),
            "fp4",
            _nvfp4_shape,
            scales={"weight_scale": _E4M3, "weight_global_scale": _FLOATS},
            readers=_COMPRESSED_TENSORS,
            levels="e2m1",
        ),
        FormatSpec(
            "nvfp4-modelopt",
            ("weight", "weight_scale", "weight_scale_2"),
            ("weight", _UINT8),
            "fp4",
            _modelopt_nvfp4_shape,
            scales={"weight_scale": _E4M3, "weight_scale_2": _FLOATS},
            readers={"modelopt": "fp4"},
        ),
        FormatSpec(
            "mxfp6-pack-quantized",
            ("weight_packed", "weight_scale"),
            ("weight_packed", _UINT8),
            "mx",
            _mxfp6_shape,
            scales={"weight_scale": _EXPONENTS},
            when=lambda parts: _bytes_per_scale(parts) == 24,  # 32 codes of 6 bits; mxfp4 has 16 bytes
            readers=_COMPRESSED_TENSORS,
            levels="e2m3",
        ),
        FormatSpec(
            "mxfp4-pack-quantized",
            ("weight_packed", "weight_scale"),
            ("weight_packed", _UINT8),
            "mx",
            _nvfp4_shape,
            scales={"weight_scale": _EXPONENTS},
            readers=_COMPRESSED_TENSORS | {"mxfp4": "mx"},
            levels="e2m1",
        ),
        FormatSpec(
            "mxfp8-quantized",
            ("weight", "weight_scale"),
            ("weight", _FP8),
            "mx",
            _weight_shape,
            when=lambda parts: parts["weight_scale"].dtype in _EXPONENTS,
            readers=_COMPRESSED_TENSORS,
            levels="e4m3",
        ),
        FormatSpec(
            "fp8-scale-inv",
            ("weight", "weight_scale_inv"),
            ("weight", _FP8),
            "fp8",
            _weight_shape,
            scales={"weight_scale_inv": _FLOATS | {"F8_E8M0"}},
            readers=_FP8_READERS,
        ),
        FormatSpec(
            "float-quantized",
            ("weight",),
            ("weight", _FP8),
            "fp8",
            _weight_shape,
            scales={"weight_scale": _FLOATS},
            readers=_COMPRESSED_TENSORS | _FP8_READERS,
            levels="e4m3",
        ),
        FormatSpec(
            "int-quantized",
            ("weight", "weight_scale"),
            ("weight", frozenset({"I8"})),
            "int_plain",
            _weight_shape,
            scales={"weight_scale": _FLOATS},
            readers=_COMPRESSED_TENSORS,
            levels="int8",
        ),
        FormatSpec(
            "gptq",
            ("qweight", "scales"),
            ("qweight", _INT32),
            "gptq",
            _gptq_shape,
            scales={"scales": _FLOATS},
            when=lambda parts: parts["qweight"].shape[-1:] == parts["scales"].shape[-1:],  # AWQ packs these columns
            readers={"gptq": "gptq", "auto-round": "auto_round", "intel/auto-round": "auto_round", "awq": "awq"},
        ),
        FormatSpec(
            "awq",
            ("qweight", "scales"),
            ("qweight", frozenset({"I32", "I16"})),  # int16: a layout that is refused by name
            "awq",
            _awq_shape,
            scales={"scales": _FLOATS},
            readers={"awq": "awq", "auto-round": "auto_round", "intel/auto-round": "auto_round", "gptq": "gptq"},
        ),
        FormatSpec(
            "gguf",
            ("weight",),
            ("weight", QUANTIZED_TYPES),
            "gguf",
            _weight_shape,
            readers={"gguf": "gguf"},
            engine="llama.cpp",
            is_made=True,
            expert_engine="llama.cpp",
        ),
        FormatSpec(
            "mlx",
            ("weight", "scales"),
            ("weight", frozenset({"U32"})),
            "mlx",
            lambda parts: None,  # bits and group size stand in config.json
            readers={"mlx": "mlx_config"},
            sized_by_config=True,
            shards=ShardRules(metadata="mlx", engines="MLX engines"),
            engine="mlx-lm",
            expert_engine="mlx-lm",
            merge="mlx_config",
            is_made=True,
            lazily="encoder",
            names_modes=True,
        ),
        FormatSpec("dense", (), ("weight", FLOAT_DTYPES), None, _weight_shape, unless=("weight_scale",)),
    )
}

VARIANT_FORMATS = (COMPRESSED, *(row.name for row in FORMATS.values() if row.is_made))
CANDIDATE_FORMATS = (COMPRESSED, *(row.name for row in FORMATS.values() if row.lazily))

# Parts that hold codes, which are nothing without the others of their format; and parts that are nothing without codes.
# Names that models have for parameters of their own (scales, signs, bias) are left out.
CODE_PARTS = ("weight_packed", "q_weight", "trellis", "qweight")
COMPANION_PARTS = (
    "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "weight_scale_inv",
    "weight_scale_2", "q_scale", "q_scale_max", "q_groups", "q_invperm", "qzeros", "suh", "svh", "mcg", "mul1",
)  # fmt: skip
# What a module needs beside what tells its format: one part of each set.
_NEEDED = {
    "exl2": ({"q_scale"}, {"q_scale_max"}, {"q_groups"}, {"q_invperm"}),
    "exl3": ({"suh", "su", "signs"}, {"svh", "sv", "signs"}),
    "pack-quantized": ({"weight_shape"},),
}


def incomplete(spec: FormatSpec, parts: Headers) -> str | None:
    """What is wrong with a module that has some parts of a format and not all; None where nothing is."""
    found = ", ".join(parts)
    if spec.name != "dense":
        missing = [" or ".join(sorted(names)) for names in _NEEDED.get(spec.name, ()) if names.isdisjoint(parts)]
        return f"is {spec.name} without {', '.join(missing)}: it has {found}" if missing else None
    codes = [part for part in CODE_PARTS if part in parts]
    if codes:
        rows = [row for row in FORMATS.values() if codes[0] in row.required]
        wanted = " or ".join(f"{row.name} ({', '.join(row.required)})" for row in rows)
        kinds = ", ".join(f"{part} {parts[part].dtype} {list(parts[part].shape)}" for part in codes)
        return f"has {kinds} and is no format that is known here: it has {found}; wanted {wanted}"
    if "weight" not in parts and (alone := [part for part in COMPANION_PARTS if part in parts]):
        return f"has {', '.join(alone)} and no weight that they belong to; tensors of it are missing"
    return None


# Suffixes under which a format stores one module's weight; anything else below a module is a parameter of its own.
WEIGHT_PARTS = frozenset(
    {"weight", "bias", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
    | {"weight_global_scale", "input_scale", "input_global_scale", "weight_scale_inv", "weight_scale_2"}
    | {"input_zero_point", "output_scale", "pre_quant_scale"}
    | {"q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "q_perm"}
    | {"trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "signs"}
    | {"qweight", "qzeros", "scales", "g_idx", "biases"}
)


def format_of(parts: Headers) -> FormatSpec:
    """The format that a module's parts are in. Parts that are no format's at all count as dense parameters."""
    for spec in FORMATS.values():
        if spec.matches(parts):
            return spec
    return FORMATS["dense"]
