"""Overlay -> a checkpoint directory: shards, index, config and manifest. Bounded memory, all or nothing.

`plan_write` decides everything and reads no tensor; `execute` carries the plan out and decides nothing. Tensors are
copied byte for byte and hashed on the way; torch is imported only to decode (`dense=True`).

The output grows in `OUT.partial`, which holds a marker file of ours, is flushed to disk, and is then renamed to OUT.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile import __version__
from recompile.checkpoint.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    GgufCheckpoint,
    OpenFiles,
    StoredModule,
    TensorInfo,
    dense_dtype,
    no_table_of_names,
    read_safetensors_header,
    read_tensor,
    split_name,
)
from recompile.checkpoint.coupled_modules import SCALING_NAME, dump_scaled_sets
from recompile.errors import CheckpointError, OutputError, RecipeError, UnsupportedError
from recompile.formats import DTYPE_BYTES, FORMATS, ShardRules
from recompile.gguf.names import Joined
from recompile.io.files import PARTIAL_SUFFIX, OutputDirectory, check_partial, insist, partial_path
from recompile.merge.configs import dump_json, is_verbatim, merged_texts, origin_of, without_quantization
from recompile.merge.convert import Conversion, is_expressible, plan_conversions
from recompile.merge.fuse_experts import FusedExperts, fused_experts, with_fused
from recompile.merge.overlay import Accounting, Overlay, Placement, account, quantizable
from recompile.merge.stacks import StackPlace, name_in_file, plan_stacks
from recompile.recipe.recipe import dump_recipe, parse_recipe

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST_NAME = "recompile_manifest.json"
MANIFEST_VERSION = 1
MANIFEST_ENTRY_BYTES = 400  # about what a module takes there
DEFAULT_SHARD_MB = 8192
MB = 1 << 20  # of --shard-size, as exllamav3 counts

CHUNK_BYTES = 1 << 20  # copied and hashed at a time, per thread: stays in a core's cache between the two
# sha256 costs more than the copy itself, so modules are spread over threads that each copy and hash.
MAX_WORKERS = 4

# Weights of other kinds, which would be stale beside ours, and the records of the tools of this project.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot")
QUANTIZATION_FILES = frozenset(
    {"quantization_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"}
)
REWRITTEN_FILES = QUANTIZATION_FILES | {"config.json", MANIFEST_NAME, "made_by_recompile.json", SCALING_NAME}
BESIDE_GGUF = frozenset(
    {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    | {"vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"}
)
STALE_IN_MIXES = frozenset({"quantize_report.json"})  # true of a variant, not of a mix


# ---- the plan --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output and where its bytes come from."""

    info: TensorInfo  # in the output: path and offset as they will be under OUT
    source: TensorInfo | None  # copied from here; None for a value that is decoded or converted


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module of the output. Its tensors stand in part-name order, the order in which they are hashed."""

    name: str
    placement: Placement
    stored: StoredModule  # as the output holds it
    tensors: tuple[PlannedTensor, ...]
    shard: int
    conversion: Conversion | None = None


@dataclass(frozen=True)
class PlannedShard:
    """One shard of the output."""

    file: str
    header: bytes  # everything before the data, length prefix included
    size_bytes: int  # of the whole file


@dataclass(frozen=True)
class WritePlan:
    """Everything that `execute` will do. `texts` are the JSON files but the manifest, which needs the hashes."""

    overlay: Overlay
    out: Path
    dense: bool
    shards: tuple[PlannedShard, ...]
    modules: tuple[PlannedModule, ...]
    texts: Mapping[str, str]
    copies: tuple[Path, ...]  # other files of the base directory
    recipe_text: str | None
    accounting: Accounting
    warnings: tuple[str, ...] = ()
    fused: Mapping[str, FusedExperts] = field(default_factory=dict)  # of a decoded copy, by their names in it
    true_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of modules that are stored padded

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(module.stored.size_bytes for module in self.modules)

    @property
    def needed_bytes(self) -> int:
        """Room that the output will take; its manifest is estimated."""
        return (
            sum(shard.size_bytes for shard in self.shards)
            + sum(len(text.encode()) for text in self.texts.values())
            + sum(path.stat().st_size for path in self.copies)
            + MANIFEST_ENTRY_BYTES * len(self.modules)
        )


@dataclass(frozen=True)
class Step:
    """Some bytes of a module were written (or checked)."""

    module: str
    done_bytes: int
    total_bytes: int


def with_whole_experts(overlay: Overlay) -> Overlay:
    """The overlay with fused experts of which none is quantized as their checkpoint stores them, in one piece."""
    placements = dict(overlay.placements)
    changed = False
    for checkpoint in {id(p.checkpoint): p.checkpoint for p in placements.values()}.values():
        for modules, stored in checkpoint.fused_blocks:
            members = [placements.get(name) for name in modules]
            if any(p is None or p.checkpoint is not checkpoint or p.stored.is_quantized for p in members):
                continue
            changed, first = True, placements[next(iter(modules))]
            for name in modules:
                del placements[name]
            for tensor in stored:
                module = next(name for name in (tensor, split_name(tensor)[0]) if name in checkpoint.whole.modules)
                whole = checkpoint.whole.modules[module]
                placements[module] = Placement(module, whole, checkpoint.whole, first.source, first.override)
    return replace(overlay, placements=placements) if changed else overlay


def plan_write(
    overlay: Overlay,
    out: str | os.PathLike[str],
    shard_mb: int = DEFAULT_SHARD_MB,
    *,
    dense: bool = False,
    reencode: bool = False,
) -> WritePlan:
    """Decide every byte range, config and file of the output; reads headers and small JSON files, no tensor but the
    group indices of GPTQ modules and the global scales of nvfp4 ones.

    dense:    decode every quantized module to the base's dense dtype (bf16 as a rule) and copy the rest; imports torch
    reencode: give nvfp4 modules of a fused set from several sources one global scale

    Raises UnsupportedError for a mix that no engine loads (the message names `--dense` where that helps), MismatchError
    for sources with rotations of their own, FormatError for modules that their config does not describe, RecipeError
    for a recipe that changed on disk, OutputError for a shard size below 1.
    """
    if shard_mb < 1:
        raise OutputError(f"{{shard_size}} {shard_mb}: wanted at least 1 (MB)")
    out = Path(out)
    stack = _stack_rule(overlay) if not dense else None
    overlay = with_whole_experts(overlay) if stack is None else overlay
    warnings: list[str] = []
    conversions: dict[str, Conversion] = {}
    ordered = [overlay.placements[name] for name in sorted(overlay.placements, key=natural_key)]
    fused: dict[str, FusedExperts] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if dense:
        _check_decodable(overlay, ordered)
        shapes = _true_shapes(overlay)
        wholes, warnings = fused_experts(overlay)
        fused = {whole.name: whole for whole in wholes}
        ordered = sorted(with_fused(ordered, wholes, overlay.placements), key=lambda p: natural_key(p.module))
        wanted = _dense_tensors(overlay, ordered, shapes, wholes)
        texts = {"config.json": dump_json(_dense_config(overlay))}
        rules, with_index = ShardRules(), True
    else:
        if is_expressible([p.stored.format for p in ordered]):
            conversions = plan_conversions(overlay, reencode=reencode)
        wanted = [_copied(p) if p.module not in conversions else _converted(p, conversions) for p in ordered]
        texts, warnings = merged_texts(overlay, conversions)
        rules = next((FORMATS[name].shards for name in overlay.formats), ShardRules())
        with_index = rules.index_counts
    places = plan_stacks((tensor for tensors in wanted for tensor in tensors), stack) if stack is not None else {}
    shards, modules = _lay_out(out, ordered, wanted, shard_mb * MB, rules, conversions, places)
    if with_index and len(shards) > 1:
        texts[INDEX_NAME] = dump_json(_index(modules, shards, places))
    if overlay.scaled_sets:
        texts[SCALING_NAME] = dump_scaled_sets(overlay.scaled_sets)
    if is_verbatim(overlay) and not dense:
        skipped = frozenset(REWRITTEN_FILES - QUANTIZATION_FILES | texts.keys())
    else:
        skipped = REWRITTEN_FILES | STALE_IN_MIXES
    accounting = account([module.stored for module in modules], quantizable(overlay.checkpoints))
    return WritePlan(
        overlay,
        out,
        dense,
        shards,
        modules,
        texts,
        other_files(overlay.base.path, skipped),
        recipe_text(overlay),
        accounting,
        (*warnings, *_code_notes(overlay.base, skipped)),
        fused,
        shapes,
    )


def _stack_rule(overlay: Overlay) -> Callable[[str], tuple[str, int] | None] | None:
    """(stack, expert) of a tensor, for formats whose engine loads the experts of a layer as one; None for others."""
    for name in overlay.formats:
        rule = getattr(FORMATS[name].load_merge(), "stacked_tensor", None)
        if rule is not None:
            return lambda tensor: rule(overlay.config, tensor)
    return None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A tensor of the output before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None
    size_bytes: int


def _wanted(name: str, dtype: str, shape: tuple[int, ...]) -> _Wanted:
    """A tensor that is not a copy of another."""
    size = DTYPE_BYTES[dtype]
    for length in shape:
        size *= length
    return _Wanted(name, dtype, shape, None, size)


def _copied(placement: Placement) -> list[_Wanted]:
    return [_Wanted(i.name, i.dtype, i.shape, i, i.size_bytes) for _, i in sorted(placement.stored.parts.items())]


def _converted(placement: Placement, conversions: Mapping[str, Conversion]) -> list[_Wanted]:
    parts = conversions[placement.module].parts
    return [_wanted(f"{placement.module}.{part}", dtype, shape) for part, (dtype, shape) in parts.items()]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in name.split(".")]


def _lay_out(
    out: Path,
    ordered: Sequence[Placement],
    wanted: Sequence[Sequence[_Wanted]],
    shard_bytes: int,
    rules: ShardRules,
    conversions: Mapping[str, Conversion],
    places: Mapping[str, StackPlace],
) -> tuple[tuple[PlannedShard, ...], tuple[PlannedModule, ...]]:
    """Fill shards in the order of the modules; a module's tensors stay together, one larger than a shard alone, and so
    do modules whose tensors are stacked."""
    members: list[list[int]] = []
    filled = 0
    for unit in _units(wanted, places):
        size = sum(tensor.size_bytes for number in unit for tensor in wanted[number])
        if not members or (members[-1] and filled + size > shard_bytes):
            members.append([])
            filled = 0
        members[-1] += unit
        filled += size
    shards, modules = [], []
    for shard, numbers in enumerate(members):
        file = f"{rules.prefix}.safetensors"
        if len(members) > 1:
            file = f"{rules.prefix}-{shard + 1:05d}-of-{len(members):05d}.safetensors"
        # Wide dtypes first: then every tensor starts at a multiple of its item size, which loaders that map files need.
        tensors = _in_order([tensor for number in numbers for tensor in wanted[number]], places)
        starts, end = {}, 0
        for tensor in tensors:
            starts[tensor.name] = end
            end += tensor.size_bytes
        header = _header(tensors, starts, rules.metadata, places)
        path = out / file
        shards.append(PlannedShard(file, header, len(header) + end))
        for number in numbers:
            placement = ordered[number]
            planned = tuple(
                PlannedTensor(
                    TensorInfo(t.name, t.dtype, t.shape, path, len(header) + starts[t.name], t.size_bytes),
                    t.source,
                )
                for t in wanted[number]
            )
            conversion = conversions.get(placement.module)
            stored = _stored(placement, planned, conversion)
            modules.append(PlannedModule(placement.module, placement, stored, planned, shard, conversion))
    return tuple(shards), tuple(modules)


def _units(wanted: Sequence[Sequence[_Wanted]], places: Mapping[str, StackPlace]) -> Iterator[list[int]]:
    """Numbers of modules that go into one shard: those of one block of experts, or one alone."""
    unit: list[int] = []
    last = None
    for number, tensors in enumerate(wanted):
        place = places.get(tensors[0].name) if tensors else None
        container = place.container if place is not None else None
        if unit and (container is None or container != last):
            yield unit
            unit = []
        unit.append(number)
        last = container
    if unit:
        yield unit


def _in_order(tensors: Sequence[_Wanted], places: Mapping[str, StackPlace]) -> list[_Wanted]:
    """Wide dtypes first, stacks where their first tensor stands, in the order of the experts."""
    ranks: dict[str, int] = {}
    for rank, tensor in enumerate(tensors):
        ranks.setdefault(name_in_file(tensor.name, places), rank)

    def key(tensor: _Wanted) -> tuple[int, int, int]:
        place = places.get(tensor.name)
        rank = ranks[name_in_file(tensor.name, places)]
        return (-DTYPE_BYTES[tensor.dtype], rank, place.index if place is not None else 0)

    return sorted(tensors, key=key)


def _stored(placement: Placement, tensors: Sequence[PlannedTensor], conversion: Conversion | None) -> StoredModule:
    """The module as the output holds it."""
    skip = len(placement.module) + 1
    parts = {tensor.info.name[skip:]: tensor.info for tensor in tensors}
    if conversion is not None:
        return StoredModule(placement.module, parts, placement.stored.shape, conversion.format)
    if all(tensor.source is not None for tensor in tensors):
        return StoredModule(placement.module, parts, placement.stored.shape, placement.stored.format)
    # a part of a fused tensor is written with the whole, under another name or under its first part's module
    shape = parts["weight"].shape if "weight" in parts else None
    return StoredModule(placement.module, parts, shape, "dense")


def _header(
    tensors: Sequence[_Wanted], starts: Mapping[str, int], metadata: str, places: Mapping[str, StackPlace]
) -> bytes:
    """The safetensors header, padded with spaces so that the data starts at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": metadata}}
    for tensor in tensors:
        start, place = starts[tensor.name], places.get(tensor.name)
        if place is not None and place.index:
            continue  # the first one's entry is that of all
        count = place.count if place is not None else 1
        entries[name_in_file(tensor.name, places)] = {
            "dtype": tensor.dtype,
            "shape": [*([count] if place is not None else ()), *tensor.shape],
            "data_offsets": [start, start + count * tensor.size_bytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(
    modules: Sequence[PlannedModule], shards: Sequence[PlannedShard], places: Mapping[str, StackPlace]
) -> dict[str, Any]:
    weight_map = {
        name_in_file(t.info.name, places): shards[module.shard].file for module in modules for t in module.tensors
    }
    return {
        "metadata": {"total_size": sum(module.stored.size_bytes for module in modules)},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _code_notes(base: Checkpoint, skipped: frozenset[str]) -> tuple[str, ...]:
    """What a loader with trust_remote_code would run, which a merge takes over as it is: said, never run here."""
    code = [path.name for path in other_files(base.path, skipped) if path.suffix.lower() == ".py"]
    notes = [f"{base.label}: its code is copied with it and not run here: {', '.join(code[:8])}"] if code else []
    if base.config.get("auto_map"):
        notes.append(
            f"{base.label}/config.json: auto_map is copied; loaders run that code with trust_remote_code alone"
        )
    return tuple(notes)


def other_files(directory: Path, skipped: frozenset[str] = REWRITTEN_FILES) -> tuple[Path, ...]:
    """Files that a new checkpoint takes over from the base as they are: tokenizer, generation config, licence, code."""
    beside = directory.is_file()  # a GGUF file: only what is surely the model's own
    return tuple(
        path
        for path in sorted((directory.parent if beside else directory).iterdir())
        if path.is_file()
        and not (beside and path.name not in BESIDE_GGUF)
        and not path.name.startswith(".")
        and path.suffix.lower() not in WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name not in skipped
    )


def recipe_text(overlay: Overlay) -> str | None:
    """The recipe as written. Raises RecipeError if the file no longer says what was resolved."""
    recipe = overlay.recipe
    if recipe is None:
        return None
    if recipe.path is None:
        return dump_recipe(recipe)
    try:
        text = recipe.path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{recipe.name}: cannot be read again: {error}") from error
    again = parse_recipe(text, recipe.name)
    if (again.sources, again.overrides) != (recipe.sources, recipe.overrides):
        raise RecipeError(f"{recipe.name}: changed while this command was reading it; start again")
    return text


# ---- dense output ----------------------------------------------------------------------------------------------------


def _dense_config(overlay: Overlay) -> dict[str, Any]:
    config = without_quantization(overlay.config)
    name = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(dense_dtype(overlay.base.modules.values()))
    if name is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = name
        if "dtype" not in config and "torch_dtype" not in config:
            config["dtype"] = name
    return config


def _check_decodable(overlay: Overlay, ordered: Sequence[Placement]) -> None:
    """Raise UnsupportedError for a format that cannot be decoded, FormatError for a module that no config covers."""
    if isinstance(overlay.base, GgufCheckpoint) and overlay.base.heads is None:
        raise UnsupportedError(
            f"{overlay.base.label}: {no_table_of_names(overlay.base.file.value('general.architecture'))}"
        )
    for placement in ordered:
        if not FORMATS[placement.stored.format].runnable:
            raise UnsupportedError(
                f"{origin_of(placement)}: {placement.module} is stored as {placement.stored.format}, which cannot be "
                f"decoded; take that module from another variant"
            )
        if placement.stored.is_quantized:
            placement.checkpoint.scheme(placement.stored)


def _dense_tensors(
    overlay: Overlay,
    ordered: Sequence[Placement],
    shapes: Mapping[str, tuple[int, ...]],
    fused: Sequence[FusedExperts],
) -> list[list[_Wanted]]:
    """The tensors of a decoded copy: dense modules as they are, others as `weight` (and `bias`) of their true shape,
    experts of one tensor a layer as that tensor.
    """
    dtype = dense_dtype(overlay.base.modules.values())
    together: dict[str, list[FusedExperts]] = {}
    for whole in fused:
        together.setdefault(whole.module, []).append(whole)
    whole_of = {name: whole for whole in overlay.joined.values() for names in whole.parts for name in names}
    wanted: list[list[_Wanted]] = []
    for placement in ordered:
        stored = placement.stored
        if stored.name in together:
            wanted.append([_wanted(whole.name, dtype, whole.shape) for whole in together[stored.name]])
            continue
        if isinstance(placement.checkpoint, GgufCheckpoint):  # stored in GGUF's own order and convention
            infos = [info for _, info in sorted(stored.parts.items()) if info.name in placement.checkpoint.places]
            held = [(whole_of.get(info.name), info) for info in infos]
            wanted.append(
                [
                    _wanted(info.name, dtype, info.shape) if joined is None else _joined(overlay, joined, dtype)
                    for joined, info in held
                    if joined is None or info.name == joined.parts[0][0]
                ]
            )
            continue
        if not stored.is_quantized:
            wanted.append(_copied(placement))
            continue
        shape = shapes.get(stored.name) or stored.shape
        assert shape is not None, stored.name
        tensors = [_wanted(f"{stored.name}.weight", dtype, shape)]
        if "bias" in stored.parts:
            bias = stored.parts["bias"]
            # The padding is at the end, so the true bias is a prefix of the stored bytes.
            cut = TensorInfo(
                bias.name, bias.dtype, shape[:1], bias.path, bias.offset, shape[0] * DTYPE_BYTES[bias.dtype]
            )
            tensors.insert(0, _Wanted(bias.name, bias.dtype, shape[:1], cut, cut.size_bytes))
        wanted.append(tensors)
    return wanted


def _joined(overlay: Overlay, whole: Joined, dtype: str) -> _Wanted:
    """A tensor that Hugging Face's checkpoints fuse and a GGUF base keeps in parts."""
    assert isinstance(overlay.base, GgufCheckpoint), "only GGUF files keep tensors in parts"
    return _wanted(whole.name, dtype, overlay.base.joined_shape(whole))


def _true_shapes(overlay: Overlay) -> dict[str, tuple[int, ...]]:
    """The shape without padding of every module that is stored padded.

    From another checkpoint of the mix that holds the module unpadded, else from the model that config.json describes.
    """
    found: dict[str, tuple[int, ...]] = {}
    missing = []
    for name, stored in overlay.modules.items():
        if FORMATS[stored.format].pads_to is None:
            continue
        unpadded = (c.modules.get(name) for c in overlay.checkpoints)
        shape = next(
            (m.shape for m in unpadded if m is not None and FORMATS[m.format].pads_to is None and m.shape), None
        )
        if shape is not None:
            found[name] = shape
        else:
            missing.append(name)
    if missing:
        from recompile.model.stream import LayeredModel

        model = LayeredModel.of(overlay)
        parameters = dict(model.model.named_parameters(remove_duplicate=False))
        for name in missing:
            found[name] = _shape_in_model(overlay, model, parameters, name)
    return found


def _shape_in_model(overlay: Overlay, model: Any, parameters: Mapping[str, Any], module: str) -> tuple[int, ...]:
    tensor = f"{module}.weight"
    stored = overlay.modules[module].shape
    for name, origin in model.origins.items():
        if tensor not in origin.tensors:
            continue
        shape = tuple(parameters[name].shape)
        if origin.converter is not None and len(shape) == 3:  # experts in one tensor, some projections side by side
            side_by_side = len(set(origin.patterns))
            shape = (shape[1] // side_by_side, shape[2])
        fits = stored is None or all(true <= padded for true, padded in zip(shape, stored, strict=True))
        if len(shape) == 2 and fits:
            return shape
    raise UnsupportedError(
        f"{overlay.label}: {module} is stored padded as {list(stored or ())}, and its true shape does not follow from "
        f"config.json, so that it cannot be decoded to a dense copy"
    )


def _decode(plan: WritePlan, module: PlannedModule, tensor: PlannedTensor) -> memoryview:
    """The bytes of one decoded weight. Raises CheckpointError for values that the dense dtype cannot hold."""
    import torch
    from safetensors.torch import _TYPES as TORCH_DTYPES  # the library's own table of dtype spellings

    info = tensor.info
    dtype = TORCH_DTYPES[info.dtype]
    assert dtype is not None, "decoded weights are of a float dtype"
    whole = plan.fused.get(info.name)
    value: Tensor = plan.overlay.load(info.name) if whole is None else whole.make(plan.overlay, plan.true_shapes, dtype)
    if any(have < want for have, want in zip(value.shape, info.shape, strict=True)):
        raise CheckpointError(
            f"{origin_of(module.placement)}: {info.name} decodes to {list(value.shape)}, wanted {info.shape}"
        )
    value = value[tuple(slice(0, size) for size in info.shape)].to(dtype).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{origin_of(module.placement)}: {info.name} has values beyond the range of {info.dtype}; use a base whose "
            f"dense tensors are bfloat16"
        )
    return memoryview(value.view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]


# ---- where the output goes -------------------------------------------------------------------------------------------


def check_output(overlay: Overlay, out: str | os.PathLike[str], needed_bytes: int = 0) -> None:
    """Raise OutputError if `out` cannot become the output: it is, holds or lies in an input (symbolic links followed),
    it exists and is not empty, `out`.partial is another's, its place cannot be written to or has too little room."""
    label = os.fspath(out)
    real = Path(os.path.realpath(Path(out).expanduser()))
    if real.name.endswith(PARTIAL_SUFFIX):
        raise OutputError(f"{label}: names ending in {PARTIAL_SUFFIX} are kept for unfinished outputs; choose another")
    partial = partial_path(real)
    for checkpoint in overlay.checkpoints:
        source = Path(os.path.realpath(checkpoint.path))
        for place, what in ((real, label), (partial, f"{label}{PARTIAL_SUFFIX}")):
            if place == source:
                raise OutputError(f"{what}: is the input directory {checkpoint.label}; choose another output")
            if source in place.parents:
                raise OutputError(f"{what}: lies inside the input directory {checkpoint.label}; choose another output")
            if place in source.parents:
                raise OutputError(f"{what}: holds the input directory {checkpoint.label}; choose another output")
    if real.exists() and not real.is_dir():
        raise OutputError(f"{label}: exists and is a file; choose another output")
    try:
        if real.is_dir() and any(real.iterdir()):
            raise OutputError(f"{label}: exists and is not empty; remove it or choose another output")
        reclaimed = check_partial(partial)
        parent = _existing_parent(real)
        if not parent.is_dir():
            raise OutputError(f"{label}: {parent} is a file; choose another output")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{label}: no permission to write in {parent}; choose another output")
        free = shutil.disk_usage(parent).free + reclaimed
    except OSError as error:
        raise OutputError(f"{label}: cannot be used as output: {error.strerror or error}") from error
    if needed_bytes > free:
        raise OutputError(
            f"{label}: needs {needed_bytes} bytes ({needed_bytes / 2**30:.2f} GiB), {parent} has {free} free "
            f"({free / 2**30:.2f} GiB); free some or choose another disk"
        )


def _existing_parent(path: Path) -> Path:
    return next((parent for parent in path.parents if parent.exists()), Path(path.anchor))


# ---- writing ---------------------------------------------------------------------------------------------------------


def execute(plan: WritePlan, *, workers: int | None = None) -> Generator[Step, None, None]:
    """Carry out a plan, yielding a step for every few MiB. The output exists when the iterator is exhausted.

    workers: threads that copy and hash; default by the number of cores. Decoding runs in one.

    If it fails, is interrupted or is abandoned, neither OUT nor OUT.partial is left. Raises OutputError (no room, no
    permission, the output exists by now) and CheckpointError (a source that ends early or changes meanwhile).
    """
    check_output(plan.overlay, plan.out, plan.needed_bytes)
    partial = OutputDirectory(plan.out)
    progress = _Progress(plan.data_bytes)
    try:
        partial.create()
        with _OpenFiles(plan, partial.path) as files:
            hashes: dict[str, str] = {}
            yield from _run(plan, files, progress, hashes, 1 if plan.dense else workers or default_workers())
            files.finish()
        for source in plan.copies:
            progress.file = source.name
            _copy_file(source, partial.path / source.name)
        for name, text in {**plan.texts, MANIFEST_NAME: dump_json(make_manifest(plan, hashes))}.items():
            progress.file = name
            _write_text(partial.path / name, text)
        partial.finish()
        yield Step("", progress.total, progress.total)
    except OSError as error:
        partial.discard()
        raise _output_error(plan, progress, error) from error
    except BaseException:
        partial.discard()
        raise


@dataclass
class _Progress:
    total: int
    done: int = 0
    file: str = ""


def _output_error(plan: WritePlan, progress: _Progress, error: OSError) -> OutputError:
    where = f"{plan.out}: cannot be written: {error.strerror or error}"
    at = f" at {progress.file}" if progress.file else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "free some space or choose another disk" if full else "choose another output"
    return OutputError(
        f"{where}{at}, after {progress.done} of {progress.total} bytes (nothing of it is left); {way_out}"
    )


def default_workers() -> int:
    """Threads that copy and hash: one more than cores, since one of them waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores + 1)


@dataclass(frozen=True)
class _Wrote:
    module: PlannedModule
    count: int


class _Cancelled(Exception):
    """Another thread failed or the user stopped."""


def _run(
    plan: WritePlan, files: _OpenFiles, progress: _Progress, hashes: dict[str, str], workers: int
) -> Iterator[Step]:
    """Write every module, in threads; `hashes` is filled with a sha256 per module."""
    events: queue.SimpleQueue[_Wrote | Future[tuple[str, str]]] = queue.SimpleQueue()
    stop = threading.Event()

    def write(module: PlannedModule) -> tuple[str, str]:
        return module.name, _write_module(plan, module, files, lambda count: events.put(_Wrote(module, count)), stop)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="recompile-write")
    try:
        for module in plan.modules:
            pool.submit(write, module).add_done_callback(events.put)
        left = len(plan.modules)
        while left:
            event = events.get()
            if isinstance(event, _Wrote):
                progress.done += event.count
                progress.file = plan.shards[event.module.shard].file
                yield Step(event.module.name, progress.done, progress.total)
            else:
                left -= 1
                name, digest = event.result()
                hashes[name] = digest
    finally:
        stop.set()
        insist(lambda: pool.shutdown(wait=True, cancel_futures=True))


def _write_module(
    plan: WritePlan, module: PlannedModule, files: _OpenFiles, wrote: Callable[[int], None], stop: threading.Event
) -> str:
    """Write one module and return the sha256 of its parts' bytes."""
    digest = hashlib.sha256()
    target = files.shards[module.shard]
    made = _convert(module) if module.conversion is not None else {}
    for tensor in module.tensors:
        if tensor.info.name in made:
            chunks = _in_chunks(made[tensor.info.name])
        elif tensor.source is None:
            chunks = _in_chunks(_decode(plan, module, tensor))
        elif tensor.source.is_scattered:
            with OpenFiles() as opened:
                chunks = _in_chunks(memoryview(opened.read(tensor.source)))
        else:
            chunks = files.read(tensor.source)
        at = tensor.info.offset
        for chunk in chunks:
            if stop.is_set():
                raise _Cancelled
            with files.locks[module.shard]:
                _write_at(target, chunk, at)
            digest.update(chunk)
            at += len(chunk)
            wrote(len(chunk))
        files.start_flush(module.shard, tensor.info)
    return digest.hexdigest()


def _convert(module: PlannedModule) -> dict[str, memoryview]:
    """The bytes of every tensor of a module that changes its form."""
    import torch

    assert module.conversion is not None, module.name
    parts = {part: read_tensor(info) for part, info in module.placement.stored.parts.items()}
    made = module.conversion.run(parts)
    found = {}
    for tensor in module.tensors:
        value = made[tensor.info.name[len(module.name) + 1 :]].contiguous()
        assert tuple(value.shape) == tensor.info.shape, f"{tensor.info.name} was planned as {tensor.info.shape}"
        found[tensor.info.name] = memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return found


def _in_chunks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count


class _OpenFiles:
    """Descriptors of the sources and of the shards, for the length of a `with` block.

    Sources must be what they were when the plan was made, and must not change until they are copied.
    """

    def __init__(self, plan: WritePlan, directory: Path) -> None:
        self.plan = plan
        self.directory = directory
        self.shards: list[int] = []
        # Writes to one file exclude each other in the kernel anyway, where waiting threads burn a core.
        self.locks = [threading.Lock() for _ in plan.shards]
        self._sources: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._buffers = threading.local()

    def __enter__(self) -> _OpenFiles:
        try:
            self._open_sources()
            for shard in self.plan.shards:
                descriptor = os.open(self.directory / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                self.shards.append(descriptor)
                os.ftruncate(descriptor, shard.size_bytes)
                _write_at(descriptor, memoryview(shard.header), 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open_sources(self) -> None:
        wanted: dict[Path, list[TensorInfo]] = {}
        for module in self.plan.modules:
            if isinstance(module.placement.checkpoint, GgufCheckpoint):
                continue  # is decoded, which reads it as it is opened
            for info in module.placement.stored.parts.values():
                wanted.setdefault(info.path, []).append(info if info.view is None else info.view.stored)
        for path, infos in wanted.items():
            now, _ = read_safetensors_header(path)
            if any(now.get(info.name) != info for info in infos):
                raise CheckpointError(f"{path}: was changed after it was opened; start again")
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
            self._sources[path] = descriptor
            self._stamps[path] = self._stamp(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @staticmethod
    def _stamp(descriptor: int) -> tuple[int, int]:
        status = os.fstat(descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, info: TensorInfo) -> Iterator[memoryview]:
        """The bytes of a tensor in chunks; each is overwritten by the next. Raises CheckpointError where they end."""
        descriptor = self._sources[info.path]
        buffer = getattr(self._buffers, "view", None)
        if buffer is None:
            buffer = self._buffers.view = memoryview(bytearray(CHUNK_BYTES))
        done = 0
        while done < info.size_bytes:
            try:
                count = os.preadv(descriptor, [buffer[: min(CHUNK_BYTES, info.size_bytes - done)]], info.offset + done)
            except OSError as error:
                raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{info.path}: ends after {done} of the {info.size_bytes} bytes of tensor {info.name}; it was cut "
                    f"short while it was being copied, restore it and start again"
                )
            yield buffer[:count]
            done += count

    def start_flush(self, shard: int, written: TensorInfo) -> None:
        """Let the kernel begin to write a tensor to disk, so that the flush at the end finds little to do. On Linux the
        advice to drop pages does that for pages that cannot be dropped yet."""
        if written.size_bytes >= CHUNK_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.shards[shard], written.offset, written.size_bytes, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """Flush the shards to disk. Raises CheckpointError if a source was changed while it was read."""
        for descriptor in self.shards:
            os.fsync(descriptor)
        for path, descriptor in self._sources.items():
            if self._stamp(descriptor) != self._stamps[path]:
                raise CheckpointError(f"{path}: was changed while it was being copied; start again")

    def __exit__(self, *_: object) -> None:
        for descriptor in (*self.shards, *self._sources.values()):
            os.close(descriptor)
        self.shards, self._sources = [], {}


def _copy_file(source: Path, target: Path) -> None:
    try:
        reader = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}") from error
    with reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())


def _write_text(target: Path, text: str) -> None:
    with target.open("x", encoding="utf-8", errors="backslashreplace") as writer:
        writer.write(text)
        writer.flush()
        os.fsync(writer.fileno())


# ---- the manifest ----------------------------------------------------------------------------------------------------


def make_manifest(plan: WritePlan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the output is made of; the same for every run with the same inputs (no times, no host, no output name).

    A module's hash is the sha256 of the bytes of its parts, one after another in the order of the part names.
    """
    overlay = plan.overlay
    modules: dict[str, Any] = {}
    for module in plan.modules:
        entry: dict[str, Any] = {
            "source": module.placement.source,
            "format": module.stored.format,
            "bits_per_weight": round(module.stored.bits_per_weight, 6),
            "sha256": hashes[module.name],
        }
        if module.conversion is not None:
            entry["converted_from"] = module.placement.stored.format
        elif module.stored.format != module.placement.stored.format:
            entry["decoded_from"] = module.placement.stored.format
        modules[module.name] = entry
    text = plan.recipe_text
    return {
        "manifest_version": MANIFEST_VERSION,
        "recompile_version": __version__,
        "dense": plan.dense,
        "base": _manifest_source(overlay.base),
        "sources": {model_dir: _manifest_source(source) for model_dir, source in overlay.sources.items()},
        "recipe": None
        if text is None or overlay.recipe is None
        else {"name": overlay.recipe.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text},
        "accounting": plan.accounting.as_dict(),
        "modules": modules,
    }


def _manifest_source(checkpoint: Checkpoint) -> dict[str, str]:
    return {"directory": checkpoint.label, "fingerprint": checkpoint.fingerprint}
