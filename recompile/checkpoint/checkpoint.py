"""Checkpoint: a model directory opened lazily. Names, dtypes, shapes, byte ranges and config; no tensor is read until
asked for, and torch is imported only then."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any, Protocol

from recompile.checkpoint.fused_experts import split_experts
from recompile.checkpoint.quantization_fields import check_mlx_quantization, check_quantization_config
from recompile.checkpoint.safetensors_files import OpenFiles, read_safetensors_header, read_tensor
from recompile.errors import CheckpointError, FormatError, MissingWeight, UnsupportedError
from recompile.formats import (
    DTYPE_BYTES,
    FLOAT_DTYPES,
    FORMATS,
    WEIGHT_PARTS,
    FormatSpec,
    ShardRules,
    format_of,
    incomplete,
    mlx_config,
)
from recompile.formats.gguf_types import QUANTIZED_TYPES
from recompile.formats.stored import FUSED_EXPERTS, StoredModule, TensorInfo
from recompile.gguf.config import config_of
from recompile.gguf.container import GgufFile, GgufTensor, find_gguf, is_gguf, open_gguf
from recompile.gguf.keys import heads_in
from recompile.gguf.names import (
    Heads,
    Joined,
    Place,
    architecture_in,
    is_stacked,
    joined_of,
    places_of,
    row_order,
    steps_of,
    text_config_of,
    to_hf,
)
from recompile.gguf.values import BY_HEAD, join_one
from recompile.io.files import PARTIAL_SUFFIX, note_input
from recompile.io.files import read_json as read_json
from recompile.io.printable import printable
from recompile.io.schema import describe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INTEGER_DTYPES = frozenset({"BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
INDEX_NAME = "model.safetensors.index.json"
# Files that say how a model is quantized where config.json does not -> quant_method, where they name none.
OLD_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
FINGERPRINT_BYTES = 4096  # read at the start, the middle and the end of every tensor

_FUSED_PART = re.compile(r"(.+\.experts\.[a-z]\w*?)_(packed|scale|shape|zero_point|global_scale|g_idx)")


def split_name(tensor: str) -> tuple[str, str]:
    """`model.norm.weight` -> (`model.norm`, `weight`)."""
    module, _, part = tensor.rpartition(".")
    return module, part


class WeightSource(Protocol):
    """Where a model's weights come from, one module at a time: a Checkpoint, or an Overlay of several."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def modules(self) -> Mapping[str, StoredModule]: ...
    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        """The dense value of a tensor of the model, [out, in] of a matrix. Raises MissingWeight."""
        ...

    def has(self, tensor: str) -> bool: ...


@dataclass(frozen=True)
class Checkpoint:
    """A model directory: safetensors shards, config and tokenizer files.

    `label` is the directory as the user wrote it, for messages. Experts that a dense checkpoint keeps in one tensor are
    seen one by one (fused_experts.py): `whole` is the same checkpoint without that.
    """

    path: Path
    label: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    _modules: dict[str, StoredModule] = field(default_factory=dict, repr=False, compare=False)
    # stored name -> the names that it is seen under; and the tensors as stored, where some are seen otherwise
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False, kw_only=True)
    as_stored: Mapping[str, TensorInfo] | None = field(default=None, repr=False, kw_only=True)

    # ---- what is stored -------------------------------------------------------------------------------------------

    @property
    def stored_tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors under the names and shapes that the files have."""
        return self.tensors if self.as_stored is None else self.as_stored

    @cached_property
    def whole(self) -> Checkpoint:
        """This checkpoint with its tensors as they are stored."""
        return replace(self, tensors=self.stored_tensors, fused={}, as_stored=None) if self.fused else self

    @cached_property
    def fused_blocks(self) -> tuple[tuple[frozenset[str], tuple[str, ...]], ...]:
        """Of every block of fused experts, the modules that it is seen as and the stored tensors that it is."""
        blocks: dict[str, tuple[set[str], list[str]]] = {}
        for stored, seen in self.fused.items():
            container = seen[0].rpartition(".")[0].rpartition(".")[0].rpartition(".")[0]
            modules, names = blocks.setdefault(container, (set(), []))
            modules |= {split_name(name)[0] for name in seen}
            names.append(stored)
        return tuple((frozenset(modules), tuple(names)) for modules, names in blocks.values())

    @property
    def aliases(self) -> Mapping[str, str]:
        """A second name of some tensors, by which recipes may call them as well."""
        return {}

    @cached_property
    def modules(self) -> Mapping[str, StoredModule]:
        """Every module by name, in the order of the shards."""
        grouped: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.tensors.items():
            module, part = split_name(name)
            fused = _FUSED_PART.fullmatch(name) if ".experts." in name else None
            if part == "scale" and self._is_fp8(f"{module}.weight"):
                grouped.setdefault(module, {})["weight_scale_inv"] = info  # DeepSeek's own name for it
            elif fused and (f"{fused[1]}_packed" in self.tensors or self._holds_fused_codes(fused[1])):
                grouped.setdefault(fused[1], {})[f"weight_{fused[2]}"] = info  # all experts of a layer in 3-D tensors
            elif self._holds_fused_codes(name):
                grouped.setdefault(name, {})["weight"] = info
            elif part in WEIGHT_PARTS:
                grouped.setdefault(intern(module), {})[intern(part)] = info
            else:  # a parameter with a name of its own, such as `A_log`, or a fused expert tensor
                grouped.setdefault(name, {})[""] = info
        with OpenFiles() as files:
            return {name: self._stored(name, parts, files) for name, parts in grouped.items()}

    def _is_fp8(self, name: str) -> bool:
        info = self.tensors.get(name)
        return info is not None and info.dtype in ("F8_E4M3", "F8_E5M2")

    def _holds_fused_codes(self, name: str) -> bool:
        """Whether `name` holds 8-bit codes of all experts of a layer, with a `<name>_scale` beside it."""
        info = self.tensors.get(name)
        return (
            info is not None
            and FUSED_EXPERTS.search(name) is not None
            and info.dtype not in FLOAT_DTYPES
            and f"{name}_scale" in self.tensors
        )

    def _stored(self, name: str, parts: dict[str, TensorInfo], files: OpenFiles) -> StoredModule:
        spec = format_of(parts)
        problem = incomplete(spec, parts)
        if problem is not None:
            raise FormatError(
                f"{self.label}: {name} {problem}; the checkpoint is incomplete: download or make it again"
            )
        weight = parts.get("weight")
        if spec.name == "dense" and weight is not None and weight.dtype in INTEGER_DTYPES:
            raise FormatError(
                f"{weight.path}: tensor {weight.name} is {weight.dtype} {list(weight.shape)} without scales; wanted a "
                f"float dtype, or the parts of a format that is known here"
            )
        shape = self._shape(spec, name, parts, files)
        return StoredModule(name, parts, shape, spec.name)

    def _shape(
        self, spec: FormatSpec, name: str, parts: dict[str, TensorInfo], files: OpenFiles
    ) -> tuple[int, ...] | None:
        try:
            shape = spec.shape(parts)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            found = ", ".join(f"{part} {list(info.shape)}" for part, info in parts.items())
            raise FormatError(f"{self.label}: {name} is not a whole {spec.name} module: it has {found}") from error
        if spec.sized_by_config:
            found_shape: tuple[int, ...] = self._reader(spec, name).shape_of(self, name, parts)
            return found_shape
        if shape is not None or "weight_shape" not in parts:
            return shape
        info = parts["weight_shape"]
        raw = self.read_bytes(info, files)
        packed = parts.get("weight_packed")
        experts = packed.shape[:1] if packed is not None and len(packed.shape) == 3 else ()
        if info.dtype not in ("I64", "I32") or info.numel not in (2, 2 + len(experts)):
            raise FormatError(
                f"{self.label}: {info.name} is {info.dtype} {list(info.shape)}, wanted I64 [2] = [out, in]"
            )
        width = DTYPE_BYTES[info.dtype]
        out_features, in_features = (
            int.from_bytes(raw[at : at + width], "little", signed=True)
            for at in (len(raw) - 2 * width, len(raw) - width)
        )
        if out_features <= 0 or in_features <= 0 or out_features * in_features > 1 << 50:
            raise FormatError(
                f"{self.label}: {info.name} says {out_features} x {in_features}, wanted two sizes above 0"
            )
        return (*experts, out_features, in_features)

    def made_group(self, module: str) -> Mapping[str, Any] | None:
        """The compressed-tensors config group of a module that is made on the fly; None for what is stored."""
        return None

    @cached_property
    def quantization_config(self) -> Mapping[str, Any]:
        """`quantization_config` of config.json; without one, the file that some tools write beside it. MLX's
        `quantization` wins over both, as it does for its loaders, and is given a quant_method."""
        mlx = mlx_config.quantization_of(self.config)
        if mlx is not None:
            return mlx
        place = f"{self.path / 'config.json'}: quantization_config"
        found = self.config.get("quantization_config")
        for file, method in () if found else OLD_CONFIGS.items():
            if (self.path / file).is_file():
                old = read_json(self.path / file)
                found, place = {"quant_method": method, **old} if isinstance(old, dict) else old, str(self.path / file)
                break
        return check_quantization_config(found, place)

    @property
    def is_quantized(self) -> bool:
        return any(module.is_quantized for module in self.modules.values())

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """The quantized formats that occur, in the order they are met."""
        return tuple(dict.fromkeys(module.format for module in self.modules.values() if module.is_quantized))

    @property
    def size_bytes(self) -> int:
        return sum(info.size_bytes for info in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tensor names, dtypes and shapes and of 12 KiB of every tensor (start, middle, end), hex.

        It tells builds apart without reading whole models; it is not a proof that two builds are equal: `identity` is.
        """
        digest = hashlib.sha256()
        for name in sorted(self.stored_tensors):
            info = self.stored_tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            with info.path.open("rb") as file:
                for start in (0, (info.size_bytes - FINGERPRINT_BYTES) // 2, info.size_bytes - FINGERPRINT_BYTES):
                    file.seek(info.offset + max(0, start))
                    digest.update(file.read(min(FINGERPRINT_BYTES, info.size_bytes)))
        return digest.hexdigest()

    @cached_property
    def identity(self) -> str:
        """What journals are continued by: a hash of the config and of every byte of every tensor, hex."""
        from recompile.checkpoint.identity import identity_of

        return identity_of(self)

    # ---- reading --------------------------------------------------------------------------------------------------

    def has(self, tensor: str) -> bool:
        """Whether `load(tensor)` would find a value: a stored tensor, or the weight of a quantized module."""
        module, part = split_name(tensor)
        return tensor in self.tensors or tensor in self.modules or (part == "weight" and module in self.modules)

    def read_bytes(self, info: TensorInfo, files: OpenFiles | None = None) -> bytes:
        """The bytes of one tensor; files: for many reads in turn. Raises CheckpointError for a file that ends early."""
        if files is not None:
            return files.read(info)
        with OpenFiles() as own:
            return own.read(info)

    def read(self, tensor: str, device: str | torch.device = "cpu") -> Tensor:
        """One stored tensor as it is, of any shape and dtype, nothing decoded. Raises MissingWeight."""
        info = self.tensors.get(tensor)
        if info is None:
            near = difflib.get_close_matches(tensor, self.tensors, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise MissingWeight(f"{self.label}: holds no tensor {tensor}{hint}")
        return read_tensor(info, device)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        """A dense value of a tensor of the model, e.g. `model.layers.0.mlp.up_proj.weight`, decoded where it is
        quantized. Stored shape and dtype for dense tensors; [out, in] and the format's own dtype for decoded ones,
        padded where the format pads.

        Raises MissingWeight, FormatError, UnsupportedError (a format that is recognised and not supported), and
        CheckpointError for values that are not finite.
        """
        from recompile.formats.checks import is_finite

        module_name, _ = split_name(tensor)
        module = self.modules.get(tensor) or self.modules.get(module_name)
        if module is None or not module.is_quantized or tensor != module.dense_name:
            value = self.read(tensor, device)
        else:
            parts = {name: read_tensor(info, device) for name, info in module.parts.items()}
            value = self.decode(module, parts)
        if not is_finite(value):
            bad = int((~value.isfinite()).sum())
            stored = module.parts.values() if module is not None else (self.tensors[tensor],)
            raise CheckpointError(
                f"{next(iter(stored)).path}: {tensor} holds {bad} NaN or infinite values of {value.numel()}; "
                f"this checkpoint is damaged, make or download it again"
            )
        return value

    def decode(self, module: StoredModule, parts: Mapping[str, Tensor]) -> Tensor:
        """Dense weight [out_features, in_features] of a quantized module from its parts; [experts, ...] if fused."""
        spec = FORMATS[module.format]
        if not spec.runnable:
            readable = ", ".join(spec.name for spec in FORMATS.values() if spec.runnable)
            raise UnsupportedError(
                f"{self.label}: {module.name} is stored as {spec.name}, which this version cannot decode; it reads "
                f"{readable}"
            )
        try:
            code, scheme = spec.load_code(), self.scheme(module)
            if not FUSED_EXPERTS.search(module.name):
                return _with_input_scale(code.dequantize(parts, scheme, module=module.name), parts, module.name)
            return _stack_experts(code.dequantize, parts, scheme, module.name)
        except FormatError as error:
            raise FormatError(f"{self.label}: {str(error).removeprefix(f'{self.label}: ')}") from error

    def restore(self, tensor: str, value: Tensor) -> Tensor:
        """A dense tensor of any shape as models have it, given as the file has it."""
        return value

    def scheme(self, module: StoredModule) -> Any:
        """What the config says of how this module is quantized; None where the parts alone say it all."""
        reader = self._reader(FORMATS[module.format], module.name)
        return None if reader is None else reader.scheme_of(self, module)

    def _reader(self, spec: FormatSpec, name: str) -> Any:
        method = self.quantization_config.get("quant_method")
        try:
            return spec.load_reader(method)
        except KeyError:
            raise FormatError(
                f"{self.label}: quant_method in config.json is {method!r}, and {name} is stored as {spec.name}, which "
                f"goes with {' or '.join(spec.readers)}"
            ) from None


def _with_input_scale(dense: Tensor, parts: Mapping[str, Tensor], module: str) -> Tensor:
    """ModelOpt's AWQ keeps a scale a column that multiplies the module's inputs: the map is W diag(pre_quant_scale)."""
    scale = parts.get("pre_quant_scale")
    if scale is None:
        return dense
    if scale.numel() != dense.shape[1]:
        raise FormatError(
            f"{module}.pre_quant_scale: found {list(scale.shape)}, wanted a number for each of {dense.shape[1]} columns"
        )
    return dense * scale.float().reshape(-1)


def _stack_experts(dequantize: Callable[..., Tensor], parts: Mapping[str, Tensor], scheme: Any, module: str) -> Tensor:
    """Dense weights [experts, out, in] of parts that hold all experts; a part without that axis is common to all."""
    import torch

    packed = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    if packed.dim() != 3 or packed.shape[0] == 0:
        raise FormatError(f"{module}: found shape {list(packed.shape)}, wanted [experts, out, words]")
    experts = packed.shape[0]
    common = {"weight_shape": parts["weight_shape"].flatten()[-2:]} if "weight_shape" in parts else {}
    split = {name: part for name, part in parts.items() if name not in common}
    for name, part in split.items():
        if part.dim() == 0 or part.shape[0] != experts:
            raise FormatError(f"{module}.{name}: found shape {list(part.shape)}, wanted [{experts}, ...]")
    return torch.stack(
        [
            dequantize(
                common | {name: part[expert] for name, part in split.items()}, scheme, module=f"{module}[{expert}]"
            )
            for expert in range(experts)
        ]
    )


@dataclass(frozen=True)
class PartedCheckpoint(Checkpoint):
    """A checkpoint that keeps in parts what others have in one tensor.

    `joined` are those tensors, under transformers' names, which `load` puts together; `heads` what of the architecture
    that asks for, None where it asks for nothing.
    """

    joined: Mapping[str, Joined] = field(kw_only=True, repr=False, default_factory=dict)
    heads: Heads | None = field(kw_only=True, repr=False, default=None)

    def has(self, tensor: str) -> bool:
        return tensor in self.joined or super().has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        if tensor in self.joined:
            return self.join(self.joined[tensor], lambda part: self.load(part, device=device))
        return super().load(tensor, device=device)

    def join(self, whole: Joined, load: Callable[[str], Tensor]) -> Tensor:
        """A fused tensor as Hugging Face has it, [rows, in] or [experts, rows, in], its parts loaded by `load`, from
        here or from another source."""
        return join_parts(whole, [[load(name) for name in names] for names in whole.parts], self.heads)

    def joined_shape(self, whole: Joined) -> tuple[int, ...]:
        """The shape of a fused tensor, without reading any part."""
        import torch

        return tuple(self.join(whole, lambda part: torch.empty(self._shape_of(part), device="meta")).shape)

    def _shape_of(self, tensor: str) -> tuple[int, ...]:
        module = self.modules.get(split_name(tensor)[0])
        dense = module is not None and module.is_quantized and tensor == module.dense_name
        return module.shape if module is not None and dense and module.shape else self.tensors[tensor].shape


@dataclass(frozen=True)
class GgufCheckpoint(PartedCheckpoint):
    """A GGUF file or its splits, under the names and conventions of Hugging Face checkpoints.

    `tensors` have Hugging Face names and lie in the file as they are; each expert of a 3-D tensor is one of its own.
    `read`, `load` and `decode` give values in Hugging Face's order of rows and without what GGUF adds to norms.
    `path` is the (first) file; `heads` are None for an architecture without a table of names.
    """

    file: GgufFile = field(kw_only=True, repr=False)
    places: Mapping[str, Place] = field(kw_only=True, repr=False)

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        return {name: place.gguf for name, place in self.places.items()}

    def read(self, tensor: str, device: str | torch.device = "cpu") -> Tensor:
        value = super().read(tensor, device)
        return value if self.tensors[tensor].dtype in QUANTIZED_TYPES else self.restore(tensor, value)

    def decode(self, module: StoredModule, parts: Mapping[str, Tensor]) -> Tensor:
        return self.restore(module.dense_name, super().decode(module, parts))

    def restore(self, tensor: str, value: Tensor) -> Tensor:
        """Undo what conversion to GGUF did to a tensor's rows or values; any shape, which may change."""
        place = self.places.get(tensor)
        if place is None:
            return value
        if place.heads:
            value = value[row_order(value.shape[0], place.heads, back=True)]
        if place.steps and self.heads is not None:
            quantized = self.tensors[tensor].dtype in QUANTIZED_TYPES
            for step in reversed(steps_of(place, self.heads, quantized=quantized)):
                value = step.to_hf(value)
        return value - place.offset if place.offset else value


@dataclass(frozen=True)
class MlxCheckpoint(PartedCheckpoint):
    """A directory of a model whose tensors mlx-lm renames and changes, as mlx-lm keeps them; under transformers' names.

    `tensors` lie in the files as they are; `read` and `load` give transformers' values, without what is added to norms.
    `joined` are what keys and values of all heads come from, where mlx-lm has a matrix a head.
    """

    def read(self, tensor: str, device: str | torch.device = "cpu") -> Tensor:
        return self.restore(tensor, super().read(tensor, device))

    def restore(self, tensor: str, value: Tensor) -> Tensor:
        return value.float() - 1 if mlx_config.adds_one(self.config, tensor) else value


def no_table_of_names(architecture: Any) -> str:
    """Why a GGUF file cannot be run or decoded: one sentence."""
    return (
        f"GGUF architecture {architecture!r} has no table of Hugging Face names here, so that transformers cannot run "
        f"it; merges, model_quantize ({{importance=False}}, {{imatrix}}), model_profile ({{mode}} weights "
        f"{{importance=False}}) and {{engine}} work"
    )


def join_parts(whole: Joined, parts: list[list[Tensor]], heads: Heads | None) -> Tensor:
    """The fused tensor that the values of its parts make, [rows, in] or [experts, rows, in]: for each part one
    [its rows, in], or one an expert or head; the rows of heads are below one another."""
    import torch

    if not whole.stacked:
        return join_one(whole.how, [part[0] for part in parts], heads)
    made = [join_one(whole.how, of_one, heads) for of_one in zip(*parts, strict=True)]
    return torch.cat(made) if whole.how == BY_HEAD else torch.stack(made)


def open_gguf_checkpoint(path: str | os.PathLike[str]) -> GgufCheckpoint:
    """Open a GGUF file as a checkpoint: its config is made from its keys, or read from a config.json beside it.

    An architecture without a table of names keeps GGUF's names: such a model can be merged, not run.

    Raises CheckpointError as `open_gguf` does, and for a file of a known architecture that lacks what a model needs.
    """
    label = os.fspath(path)
    file = open_gguf(path)
    for part in {tensor.path for tensor in file.tensors.values()}:
        note_input(part)
    config, notes = config_of(file)
    architecture = architecture_in(file.value("general.architecture"), file.tensors)
    beside = file.path.parent / "config.json"
    if beside.is_file() and architecture is not None and not architecture.read_as:
        found = read_json(beside)
        text = text_config_of(found) if isinstance(found, dict) else {}
        if text.get("model_type") in architecture.model_types:
            config, notes = {key: value for key, value in text.items() if key != "quantization_config"}, []
            config["tie_word_embeddings"] = "output.weight" not in file.tensors
    heads = heads_in(config) if architecture is not None else None
    tensors: dict[str, TensorInfo] = {}
    places: dict[str, Place] = {}
    names: dict[str, tuple[str, ...]] = {}
    for tensor in file.tensors.values():
        found_names = to_hf(architecture, tensor.name, tensor.shape[0])
        names[tensor.name] = tuple(found_names)
        stacked = architecture is not None and found_names[0] != tensor.name and is_stacked(architecture, tensor.name)
        for number, name in enumerate(found_names):
            place = None
            if architecture is not None and heads is not None:
                found_places = places_of(
                    architecture, name, heads
                )  # of others where old files hold a whole in one piece
                known = Place(tensor.name) if name != tensor.name else None
                place = next((p for p in found_places if p.gguf == tensor.name), known)
            tensors[name] = _slice_of(tensor, name, number, len(found_names) if stacked else None, place, heads)
            if place is not None:
                places[name] = place
    joined = joined_of(architecture, names) if architecture is not None and not architecture.read_as else {}
    return GgufCheckpoint(
        file.path, label, config, tensors, tuple(notes), file=file, places=places, joined=joined, heads=heads
    )


def _slice_of(
    tensor: GgufTensor, name: str, number: int, count: int | None, place: Place | None, heads: Heads | None
) -> TensorInfo:
    """A tensor as it lies in the file, or its expert `number` of `count`, with the shape of Hugging Face's."""
    if count is None:
        shape = tensor.shape
        if place is not None and heads is not None:
            for step in reversed(steps_of(place, heads, quantized=tensor.type.name in QUANTIZED_TYPES)):
                shape = step.shape(shape)
        if len(shape) == 3 and not (place is not None and place.steps):  # heads that are no experts: rows one by one
            shape = (shape[0] * shape[1], shape[2])
        return TensorInfo(name, tensor.type.name, shape, tensor.path, tensor.offset, tensor.size_bytes)
    size = tensor.size_bytes // count
    return TensorInfo(name, tensor.type.name, tensor.shape[1:], tensor.path, tensor.offset + number * size, size)


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Open a model directory or a GGUF file; reads config.json and the headers of the shards, no tensor.

    Raises CheckpointError for a directory that is missing or incomplete, shards that are damaged, truncated, listed and
    absent, or hold a tensor twice, and for stray shards that the format's engine would load as well.
    """
    label = os.fspath(directory)
    path = Path(directory).expanduser()
    if is_gguf(path):
        return open_gguf_checkpoint(directory)
    if path.is_file():
        raise CheckpointError(
            f"{label}: is a file; a model directory with config.json and *.safetensors, or a GGUF file, is wanted"
        )
    if not path.is_dir():
        raise CheckpointError(f"{label}: no such model directory")
    if not any(path.glob("*.safetensors")) and (inside := find_gguf(path)) is not None:
        return open_gguf_checkpoint(inside)
    config_path = path / "config.json"
    if not config_path.exists():
        what = (
            "a directory half written by an earlier run" if label.endswith(PARTIAL_SUFFIX) else "not a model directory"
        )
        raise CheckpointError(f"{label}: {what}: it has no config.json")
    config = read_json(config_path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_path}: holds {describe(config)}, wanted an object")
    check_quantization_config(config.get("quantization_config"), f"{config_path}: quantization_config")
    check_mlx_quantization(config.get("quantization"), f"{config_path}: quantization")
    note_input(path)
    notes: list[str] = []
    tensors: dict[str, TensorInfo] = {}
    listed = _index_map(path)
    for shard in _shards(path, label, config, listed, notes):
        found, _ = read_safetensors_header(shard)
        for name, info in found.items():
            if name in tensors:
                raise CheckpointError(
                    f"{label}: tensor {name} is in both {tensors[name].path.name} and {shard.name}; engines would take "
                    f"one or the other: remove the shard that does not belong here"
                )
            tensors[name] = info
    if listed is not None and shards_of(config).index_counts:
        _check_index(label, listed, tensors)
    changed = mlx_config.is_changed(config, tensors)
    if changed:
        tensors = seen_by_transformers(tensors, config)
    seen, fused = split_experts(tensors, config)
    if not changed:
        return Checkpoint(path, label, config, seen, tuple(notes), fused=fused, as_stored=tensors)
    joined = _joined_by_mlx(label, config, seen)
    return MlxCheckpoint(path, label, config, seen, tuple(notes), fused=fused, as_stored=tensors, joined=joined)


def _joined_by_mlx(label: str, config: Mapping[str, Any], seen: Mapping[str, TensorInfo]) -> dict[str, Joined]:
    """The tensors that mlx-lm keeps by heads. Raises CheckpointError where one is not whole, or is there twice."""
    names = (name.removesuffix(".weight") for name in seen if name.endswith(".weight"))
    try:
        wholes = mlx_config.wholes_of(config, names)
    except FormatError as error:
        raise CheckpointError(f"{label}: {error}") from None
    twice = next((name for name in wholes if name in seen), None)
    if twice is not None:
        raise CheckpointError(f"{label}: holds {twice} and, by heads, {wholes[twice][0][0]}, ...; remove one of them")
    return {name: Joined(name, parts, BY_HEAD, stacked=True) for name, parts in wholes.items()}


def seen_by_transformers(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Tensors of MLX's under transformers' names and shapes, where their bytes lie. Raises CheckpointError for one that
    is there under both names."""
    seen: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        own = intern(mlx_config.name_seen(config, name))
        if own in seen:
            raise CheckpointError(
                f"{info.path}: holds {mlx_config.name_in_file(config, own)}, as mlx-lm calls it, and {own}, as "
                f"transformers does; loaders would take one or the other: remove one"
            )
        seen[own] = replace(info, name=own, shape=mlx_config.shape_in_file(config, own, info.shape))
    return seen


def quant_method(config: Mapping[str, Any]) -> str | None:
    """`quant_method` of a config.json, e.g. "compressed-tensors", "exl2"; None for a dense model."""
    found = config.get("quantization_config")
    return str(found.get("quant_method")) if isinstance(found, Mapping) else None


def shards_of(config: Mapping[str, Any]) -> ShardRules:
    """What the engine of a checkpoint's format makes of the files in its directory."""
    spec = FORMATS.get(quant_method(config) or "")
    return spec.shards if spec is not None else ShardRules()


def _shards(
    path: Path, label: str, config: Mapping[str, Any], listed: Mapping[str, str] | None, notes: list[str]
) -> list[Path]:
    """The shards that belong to the checkpoint, in order.

    Where the format's engine loads every *.safetensors in the directory, every one counts, and one that an index which
    counts does not list is an error. Elsewhere the index, or model.safetensors, is what loaders read.
    """
    found = sorted(path.glob("*.safetensors"))
    if not found:
        other = sorted({file.suffix for file in path.iterdir() if file.suffix in (".bin", ".pth", ".pt", ".gguf")})
        hint = f" (it has {', '.join(other)} files: convert them to safetensors first)" if other else ""
        index = " though it has an index of them" if (path / INDEX_NAME).exists() else ""
        raise CheckpointError(f"{label}: has no *.safetensors{index}{hint}")
    rules = shards_of(config)
    if rules.all_are_loaded and not rules.index_counts:
        return found
    if listed is not None and not listed:
        raise CheckpointError(f"{path / INDEX_NAME}: its weight_map is empty, and {found[0].name} is there; remove it")
    if rules.all_are_loaded:
        if listed is not None:
            stray = [file.name for file in found if file.name not in set(listed.values())]
            if stray:
                raise CheckpointError(
                    f"{label}: {', '.join(stray)} is not listed in {INDEX_NAME}, and {rules.engines} load every "
                    f"shard in the directory; remove it"
                )
        return found
    if listed is not None:
        chosen = sorted(path / name for name in set(listed.values()))
    elif (path / "model.safetensors").exists():
        chosen = [path / "model.safetensors"]
    else:
        chosen = found
    for file in chosen:
        if not _is_there(file):
            raise CheckpointError(f"{label}: shard {file.name} is listed in {INDEX_NAME} and missing"[:500])
    ignored = [file.name for file in found if file not in chosen]
    if ignored:
        notes.append(f"{label}: ignored {', '.join(ignored)} (not part of the model's index)")
    return chosen


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _index_map(path: Path) -> dict[str, str] | None:
    index = path / INDEX_NAME
    if not index.exists():
        return None
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f'{index}: has no "weight_map" object of tensor names to file names')
    outside = [name for name in dict.fromkeys(weight_map.values()) if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index}: names a file outside its directory: {printable(outside[0])[:200]}")
    return weight_map


def _check_index(label: str, listed: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    absent = [name for name in listed if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{label}: {INDEX_NAME} lists {len(absent)} tensors that no shard holds, first {absent[0]} in "
            f"{listed[absent[0]]}; the download is incomplete or the index is stale"
        )
    file_of = {path: path.name for path in {info.path for info in tensors.values()}}
    wrong = [name for name, file in listed.items() if file_of[tensors[name].path] != file]
    if wrong:
        raise CheckpointError(
            f"{label}: {INDEX_NAME} says {wrong[0]} is in {listed[wrong[0]]}, it is in {tensors[wrong[0]].path.name}"
        )


def dense_dtype(modules: Iterable[StoredModule]) -> str:
    """The float dtype that most dense bytes are in, safetensors spelling; "BF16" if there is none."""
    counts: dict[str, int] = {}
    for module in modules:
        for part in module.parts.values():
            if not module.is_quantized and part.dtype in FLOAT_DTYPES:
                counts[part.dtype] = counts.get(part.dtype, 0) + part.size_bytes
    return max(counts, key=lambda dtype: counts[dtype]) if counts else "BF16"
