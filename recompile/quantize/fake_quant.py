"""How one candidate is made on the fly: integers of some bits, a compressed-tensors scheme, or a GGUF tensor type.

A maker says what a variant would store of a dense base, from headers alone, and rounds one weight when it is asked for.
What it rounds to is what model_quantize writes by method "mse" (integers, schemes) or with --format gguf, except that
nothing here runs GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, TensorInfo, split_name
from recompile.checkpoint.module_names import Dense, role_of
from recompile.costs import fused_sets
from recompile.errors import FormatError
from recompile.formats import FORMATS, packed_int
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_encode import NEEDS_IMPORTANCE, quantize_rows, resolve
from recompile.formats.gguf_types import GgufType, find_type
from recompile.formats.packed_int import IntScheme
from recompile.formats.schemes import Scheme
from recompile.model.roles import roles_of, turned_modules
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.float_grids import fit_levels, global_scale
from recompile.quantize.gguf import VOCABULARY, BaseTensor, Preset, base_tensors, find_preset, layers_of, rows_in_file
from recompile.quantize.int_grids import normalise_importance, round_to_grid
from recompile.quantize.scheme_encoder import SchemeEncoder, uniform

NOWHERE = Path("(made on the fly)")
SCALE_DTYPE = torch.bfloat16
Importances = Mapping[str, Tensor]  # module -> [in] float32, mean square of every input; None: not calibrated
WORKING_BYTES = 8  # of a weight being rounded: a float32 copy, one more for the error of a search
SHARED_BYTES = 64 << 20  # of encodings kept for a while because several candidates fall back to one type
KEEP_BYTES = 1 << 30  # of encodings kept where no memory cap is given


@dataclass(frozen=True)
class Stored:
    """What a variant would hold of a base.

    tensors: all of them, by name; formats: of the modules that are made, "pack-quantized", "gguf", ...
    fallbacks: module -> (type asked for, type it gets), where these differ
    copies: tensor -> the base's tensor that it is one more copy of: a head of its own where the base ties it
    """

    tensors: Mapping[str, TensorInfo]
    formats: Mapping[str, str]
    fallbacks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)


class Maker(Protocol):
    """How a candidate that is made on the fly is stored, and what its weights decode to."""

    def store(self, base: Checkpoint) -> Stored:
        """What the variant of a dense base would hold. Raises FormatError where nothing of it would be quantized."""

    def round(self, base: Checkpoint, module: str, weight: Tensor, importance: Importances | None) -> Tensor:
        """What the stored form of a module's weight decodes to.

        weight: [out, in] float; returns float32 [out, in]
        """

    def description(self) -> Mapping[str, Any]:
        """What decides the values, for fingerprints."""

    @property
    def group(self) -> Mapping[str, Any] | None:
        """The config group (weights, input_activations) of compressed-tensors that describes it; None for others."""

    @property
    def kept_bytes(self) -> int:
        """Memory at most that the maker keeps between weights."""

    @property
    def bytes_per_weight(self) -> int:
        """Memory at most that rounding takes, beside the weight as it is read and as it comes out."""


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IntMaker:
    """`pack-quantized` integers on fitted grids."""

    encoder: IntEncoder
    kept_bytes: int = 0
    bytes_per_weight: int = WORKING_BYTES

    def store(self, base: Checkpoint) -> Stored:
        return store_alike(base, linear_modules(base), packed_int.FORMAT, self.encoder.why_not, self._parts)

    def _parts(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        (encoded,) = self.encoder.round("model.layers.0.x", torch.zeros(shape), None)
        return encoded.parts

    def round(self, base: Checkpoint, module: str, weight: Tensor, importance: Importances | None) -> Tensor:
        (scheme,) = self.encoder.schemes(role_of(module))
        how = self.encoder.grid_method, _of(module, importance, weight), self.encoder.scale_dtype
        return round_to_grid(weight.float(), scheme, *how)

    def description(self) -> Mapping[str, Any]:
        return self.encoder.description()

    @property
    def group(self) -> Mapping[str, Any] | None:
        return {"weights": self.encoder.schemes("layer")[0].to_config()}


@dataclass(frozen=True)
class SchemeMaker:
    """Any scheme of `model_quantize --scheme`; the weights alone, inputs are not rounded."""

    scheme: Scheme
    kept_bytes: int = 0
    bytes_per_weight: int = WORKING_BYTES
    _whole: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def store(self, base: Checkpoint) -> Stored:
        return store_alike(base, linear_modules(base), self.scheme.format, self._why_not, self._parts)

    def _why_not(self, module: str, shape: tuple[int, int]) -> str | None:
        return self.scheme.why_not(shape)

    def _parts(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        encoder = SchemeEncoder((uniform(self.scheme, "mse"),))
        name = "model.layers.0.x"
        (made,) = encoder.encode_observed({name: torch.zeros(shape)}, None, {}, torch.ones(shape[1]))
        return dict(made[name].parts)

    def round(self, base: Checkpoint, module: str, weight: Tensor, importance: Importances | None) -> Tensor:
        weight, diagonal = weight.float(), _of(module, importance, weight)
        if self.scheme.is_packed_integer:
            scheme = IntScheme.from_config(self.scheme.weights)
            return round_to_grid(weight, scheme, "mse", diagonal, SCALE_DTYPE)
        whole = self._global_scale(base, module, weight) if self.scheme.has_global_scale else None
        columns = normalise_importance(diagonal, weight.shape[1], weight.device)
        levels = fit_levels(weight, self.scheme, "mse", columns, SCALE_DTYPE, whole)
        code = FORMATS[self.scheme.format].load_code()
        parts = levels.pack(levels.round(weight))
        return code.dequantize(parts, code.read_scheme(self.scheme.weights), module=module)

    def _global_scale(self, base: Checkpoint, module: str, weight: Tensor) -> Tensor:
        """nvfp4's, which projections that engines fuse share, as model_quantize gives it to them."""
        parent = module.rpartition(".")[0]
        siblings = [name for name in base.modules if name.rpartition(".")[0] == parent]
        members = next(found for found in fused_sets(siblings) if module in found)
        key = (base.fingerprint, members[0])
        if key not in self._whole:
            scales = [global_scale([base.load(f"{name}.weight", device=weight.device)]) for name in members]
            self._whole[key] = torch.stack(scales).amin(0).cpu()  # it is inverse to the largest weight
        return self._whole[key].to(weight.device)

    def description(self) -> Mapping[str, Any]:
        return {"scheme": self.scheme.name, "weights": dict(self.scheme.weights), "method": "mse"}

    @property
    def group(self) -> Mapping[str, Any] | None:
        return {"weights": self.scheme.weights, "input_activations": self.scheme.input_activations}


def _of(module: str, importance: Importances | None, weight: Tensor) -> Tensor | None:
    found = (importance or {}).get(module)
    return found.to(weight.device) if found is not None else None


def linear_modules(base: Checkpoint) -> list[str]:
    """The modules that model_quantize quantizes unless it is told otherwise: linear maps of the layers, and of MTP
    layers."""
    roles, default = roles_of(base), Dense()
    return [
        name
        for name, module in base.modules.items()
        if module.shape is not None
        and len(module.shape) == 2
        and "weight" in module.parts
        and default.why_dense(name, roles[name], module.shape) is None
    ]


WhyNot = Callable[[str, tuple[int, int]], "str | None"]  # (module, shape) -> why it stays dense, or None


def store_alike(
    base: Checkpoint,
    names: Iterable[str],
    format_name: str,
    why_not: WhyNot,
    parts_of: Callable[[tuple[int, ...]], Mapping[str, Tensor]],
) -> Stored:
    """These modules in one form. parts_of: [out, in] -> the parts of a matrix of zeros, or of one on the meta device.

    Raises FormatError where none of them can be in that form."""
    formats: dict[str, str] = {}
    reason = "it has no linear layers"
    turned = turned_modules(base)
    for name in names:
        module = base.modules[name]
        assert module.shape is not None, name
        shape = module.shape[::-1] if name in turned else module.shape
        why = why_not(module.name, (shape[0], shape[1]))
        if why is None:
            formats[module.name] = format_name
        else:
            reason = f"{module.name}: {why}"
    if not formats:
        raise FormatError(f"{base.label}: nothing would be quantized; {reason}")
    from safetensors.torch import _TYPES as TORCH_DTYPES

    spelled = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    tensors: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], dict[str, tuple[str, tuple[int, ...], int]]] = {}
    for name, info in base.tensors.items():
        owner, part = split_name(name)
        if owner not in formats or part != "weight":
            tensors[name] = info
            continue
        whole = info.shape[::-1] if owner in turned else info.shape
        if whole not in shapes:
            shapes[whole] = {
                stored: (spelled[value.dtype], tuple(value.shape), value.numel() * value.element_size())
                for stored, value in parts_of(whole).items()
            }
        for stored, (dtype, shape, size) in shapes[whole].items():
            tensors[f"{owner}.{stored}"] = TensorInfo(f"{owner}.{stored}", dtype, shape, NOWHERE, 0, size)
    return Stored(tensors, formats)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@dataclass
class SharedEncodings:
    """Encodings of one run's candidates that are kept: those of a type that several of them fall back to, until
    SHARED_BYTES are full and the oldest go; and `keep_bytes` of any, for good: encoders are slow, and a sweep or a step
    that measures a whole mix asks for every weight again. An encoding is parts of one module, of any shape; its form is
    a type's name or whatever else tells the candidates of a module apart.
    """

    keep_bytes: int = 0
    asked: dict[tuple[str, str], int] = field(default_factory=dict)  # (module, form) -> candidates that want it
    _all_bytes: int = 0  # of all that is asked for, once
    _kept: dict[tuple[str, str], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    _kept_bytes: int = 0
    _passing: dict[tuple[str, str], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    _passing_bytes: int = 0

    def ask(self, module: str, form: str, size_bytes: int) -> None:
        """Say that a candidate will want this encoding."""
        self._all_bytes += size_bytes if (module, form) not in self.asked else 0
        self.asked[module, form] = self.asked.get((module, form), 0) + 1

    def get(self, module: str, form: str) -> Mapping[str, Tensor] | None:
        key = (module, form)
        return self._kept[key] if key in self._kept else self._passing.get(key)

    def put(self, module: str, form: str, parts: Mapping[str, Tensor]) -> None:
        key, size = (module, form), _size_of(parts)
        if self._kept_bytes + size <= self.keep_bytes:
            self._kept[key] = parts
            self._kept_bytes += size
        elif self.asked.get(key, 0) > 1 and size <= SHARED_BYTES:
            self._passing[key] = parts
            self._passing_bytes += size
            while self._passing_bytes > SHARED_BYTES:
                self._passing_bytes -= _size_of(self._passing.pop(next(iter(self._passing))))

    @property
    def most_bytes(self) -> int:
        if self._all_bytes <= self.keep_bytes:
            return self._all_bytes
        return self.keep_bytes + (SHARED_BYTES if any(count > 1 for count in self.asked.values()) else 0)


def _size_of(parts: Mapping[str, Tensor]) -> int:
    return sum(part.numel() * part.element_size() for part in parts.values())


@dataclass(frozen=True)
class GgufMaker:
    """One tensor type, or one preset, as `model_quantize --format gguf` makes it.

    literal: roles ("head", "embedding") that get the type itself; elsewhere they get what the type's own file has, a
             Q6_K head for most
    """

    kind: str
    literal: frozenset[str] = frozenset()
    shared: SharedEncodings = field(default_factory=SharedEncodings, compare=False)
    bytes_per_weight: int = WORKING_BYTES
    _kinds: dict[str, GgufType] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def preset(self) -> Preset:
        return find_preset(self.kind)

    def store(self, base: Checkpoint) -> Stored:
        planned = base_tensors(base)
        kinds = gguf_types(base, planned, self.preset, self.literal)
        cut = rows_in_file(base)
        tensors: dict[str, TensorInfo] = {}
        formats: dict[str, str] = {}
        fallbacks: dict[str, tuple[str, str]] = {}
        for tensor in planned:
            asked, got = kinds[tensor.name]
            for source in tensor.seen:  # experts one by one, whose rows are those of the stack
                shape = base.tensors[source].shape
                rows = base.tensors[source].numel // tensor.ne[0]
                rows = cut if cut is not None and tensor.name in VOCABULARY else rows
                tensors[source] = TensorInfo(source, got.name, shape, NOWHERE, 0, rows * got.row_bytes(tensor.ne[0]))
                if tensor.plain:
                    continue
                module = split_name(source)[0]
                self._kinds[module] = got
                self.shared.ask(module, got.name, tensors[source].size_bytes)
                formats[module] = "gguf" if got.is_quantized else "dense"
                if asked != got.name:
                    fallbacks[module] = (asked, got.name)
        return Stored(tensors, formats, fallbacks)

    def round(self, base: Checkpoint, module: str, weight: Tensor, importance: Importances | None) -> Tensor:
        kind, columns = self._kinds[module], weight.shape[-1]
        kept = self.shared.get(module, kind.name)
        if kept is None:
            importance_of = usable_importance(kind, module, importance, columns)
            kept = {"rows": quantize_rows(kind, weight.float(), importance_of)}
            self.shared.put(module, kind.name, kept)
        return dequantize_rows(kind, kept["rows"].to(weight.device), columns).view(weight.shape)

    def description(self) -> Mapping[str, Any]:
        return {"format": "gguf", "type": self.preset.name, "literal": sorted(self.literal)}

    @property
    def group(self) -> None:
        return None

    @property
    def kept_bytes(self) -> int:
        return self.shared.most_bytes


def gguf_types(
    base: Checkpoint, planned: Sequence[BaseTensor], preset: Preset, literal: frozenset[str] = frozenset()
) -> dict[str, tuple[str, GgufType]]:
    """GGUF tensor -> (type asked for, type it gets). Raises FormatError for an unknown type."""
    layers = layers_of(base, planned)
    tied = not any(tensor.name == "output.weight" for tensor in planned)
    found = {}
    for tensor in planned:
        if tensor.plain:
            found[tensor.name] = ("F32", find_type("F32"))
            continue
        asked = find_type(preset.wanted(tensor.name, layers, tied)).name
        if role_of(tensor.module) in literal:
            asked = find_type(preset.default).name
        found[tensor.name] = (asked, resolve(asked, tensor.ne[0]))
    return found


def usable_importance(kind: GgufType, module: str, importance: Importances | None, columns: int) -> Tensor | None:
    """What a module is encoded with, float32 [columns]: its importance, unless no token gave any. Types that have to
    have some take all columns alike where the model was calibrated and only this module got no token."""
    found = (importance or {}).get(module)
    if found is not None and found.shape == (columns,) and bool(found.any()):
        return found
    return torch.ones(columns) if importance is not None and kind.name in NEEDS_IMPORTANCE else None
