"""Overlay -> the plan of a checkpoint directory: everything is decided here, from headers alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recompile.checkpoint.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    MlxCheckpoint,
    StoredModule,
    TensorInfo,
    split_name,
)
from recompile.checkpoint.coupled_modules import SCALING_NAME, dump_scaled_sets
from recompile.errors import OutputError
from recompile.formats import DTYPE_BYTES, FORMATS, ShardRules, mlx_config
from recompile.merge.configs import dump_json, is_verbatim, merged_texts
from recompile.merge.convert import Conversion, is_expressible, norm_changes, plan_conversions
from recompile.merge.dense_copy import check_decodable, dense_config, dense_tensors, true_shapes
from recompile.merge.fuse_experts import FusedExperts, fused_experts, with_fused
from recompile.merge.manifest import recipe_text
from recompile.merge.overlay import Overlay, Placement, account, quantizable
from recompile.merge.stacks import FileNames, StackPlace, plan_stacks
from recompile.merge.write_plan import (
    DEFAULT_SHARD_MB,
    MANIFEST_NAME,
    MB,
    PlannedModule,
    PlannedShard,
    PlannedTensor,
    WantedTensor,
    WritePlan,
    copied_tensors,
    natural_key,
    wanted_tensor,
)
from recompile.model.tokenizer import tokenizer_texts

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
    holds = _decoded(overlay) if dense else _copied(overlay, reencode)
    names = FileNames({})
    if stack is not None:
        names = _names_in_file(overlay, plan_stacks((t for tensors in holds.tensors for t in tensors), stack))
    shards, modules = _lay_out(out, holds, shard_mb * MB, names)
    texts = dict(holds.texts)
    if (dense or holds.rules.index_counts) and len(shards) > 1:
        texts[INDEX_NAME] = dump_json(_index(modules, shards, names))
    tokenizer, problem = tokenizer_texts(overlay.base.path)
    texts |= tokenizer
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
        (*holds.warnings, *([problem] if problem else ()), *_code_notes(overlay.base, skipped)),
        holds.fused,
        holds.true_shapes,
        holds.turned,
    )


@dataclass(frozen=True)
class _Contents:
    """What an output holds, before it is cut into shards; fused, true_shapes, turned: as in `WritePlan`."""

    placements: Sequence[Placement]
    tensors: Sequence[Sequence[WantedTensor]]  # of each of them
    texts: Mapping[str, str]
    warnings: Sequence[str]
    rules: ShardRules
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    fused: Mapping[str, FusedExperts] = field(default_factory=dict)
    true_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()


def _in_natural_order(overlay: Overlay) -> list[Placement]:
    return [overlay.placements[name] for name in sorted(overlay.placements, key=natural_key)]


def _decoded(overlay: Overlay) -> _Contents:
    """Every quantized module decoded, and the rest copied."""
    from recompile.model.roles import turned_modules

    ordered = _in_natural_order(overlay)
    check_decodable(overlay, ordered)
    turned, shapes = turned_modules(overlay), true_shapes(overlay)
    wholes, warnings = fused_experts(overlay)
    ordered = sorted(with_fused(ordered, wholes, overlay.placements), key=lambda p: natural_key(p.module))
    return _Contents(
        ordered,
        dense_tensors(overlay, ordered, shapes, wholes, turned),
        {"config.json": dump_json(dense_config(overlay))},
        warnings,
        ShardRules(),
        fused={whole.name: whole for whole in wholes},
        true_shapes=shapes,
        turned=turned,
    )


def _copied(overlay: Overlay, reencode: bool) -> _Contents:
    """The bytes of the sources, but for modules that are stored in another way in this mix."""
    ordered = _in_natural_order(overlay)
    stacks = _stack_rule(overlay) is not None
    left_out = {p.module: None for p in ordered if stacks and mlx_config.is_left_out(overlay.config, p.module)}
    ordered = [p for p in ordered if p.module not in left_out]
    conversions: dict[str, Conversion] = {}
    if is_expressible([p.stored.format for p in ordered]):
        conversions = plan_conversions(overlay, reencode=reencode)
    changes = norm_changes(overlay, as_mlx=stacks)
    other = conversions | changes
    wanted = [copied_tensors(p) if p.module not in other else _converted(p, other) for p in ordered]
    texts, warnings = merged_texts(overlay, conversions)
    if left_out:
        warnings = [
            *warnings,
            f"{len(left_out)} modules are left out, at which mlx-lm stops: {next(iter(left_out))}, ...",
        ]
    rules = next((FORMATS[name].shards for name in _formats_of(overlay)), ShardRules())
    return _Contents(ordered, wanted, texts, warnings, rules, other)


def _formats_of(overlay: Overlay) -> tuple[str, ...]:
    """Quantized formats of an output. A dense checkpoint that lies as MLX has it stays so."""
    return overlay.formats or ((mlx_config.QUANT_METHOD,) if isinstance(overlay.base, MlxCheckpoint) else ())


def _stack_rule(overlay: Overlay) -> Callable[[str], tuple[str, int] | None] | None:
    """(stack, expert) of a tensor, for formats whose engine loads the experts of a layer as one; None for others."""
    for name in _formats_of(overlay):
        rule = getattr(FORMATS[name].load_merge(), "stacked_tensor", None)
        if rule is not None:
            return lambda tensor: rule(overlay.config, tensor)
    return None


def _names_in_file(overlay: Overlay, stacks: Mapping[str, StackPlace]) -> FileNames:
    """What the engine of an output whose experts are stacked calls its tensors."""
    config = overlay.config
    return FileNames(
        stacks,
        lambda name: mlx_config.name_in_file(config, name),
        lambda name, shape: mlx_config.shape_in_file(config, name, shape),
    )


def _converted(placement: Placement, conversions: Mapping[str, Conversion]) -> list[WantedTensor]:
    parts = conversions[placement.module].parts
    return [wanted_tensor(f"{placement.module}.{part}", dtype, shape) for part, (dtype, shape) in parts.items()]


def _lay_out(
    out: Path, holds: _Contents, shard_bytes: int, names: FileNames
) -> tuple[tuple[PlannedShard, ...], tuple[PlannedModule, ...]]:
    """Fill shards in the order of the modules; a module's tensors stay together, one larger than a shard alone, and so
    do modules whose tensors are stacked."""
    wanted, rules = holds.tensors, holds.rules
    members: list[list[int]] = []
    filled = 0
    for unit in _units(wanted, names):
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
        tensors = _in_order([tensor for number in numbers for tensor in wanted[number]], names)
        starts, end = {}, 0
        for tensor in tensors:
            starts[tensor.name] = end
            end += tensor.size_bytes
        header = _header(tensors, starts, rules.metadata, names)
        path = out / file
        shards.append(PlannedShard(file, header, len(header) + end))
        for number in numbers:
            placement = holds.placements[number]
            planned = tuple(
                PlannedTensor(
                    TensorInfo(t.name, t.dtype, t.shape, path, len(header) + starts[t.name], t.size_bytes),
                    t.source,
                )
                for t in wanted[number]
            )
            conversion = holds.conversions.get(placement.module)
            stored = _stored(placement, planned, conversion)
            modules.append(PlannedModule(placement.module, placement, stored, planned, shard, conversion))
    return tuple(shards), tuple(modules)


def _units(wanted: Sequence[Sequence[WantedTensor]], names: FileNames) -> Iterator[list[int]]:
    """Numbers of modules that go into one shard: those of one block of experts, or one alone."""
    unit: list[int] = []
    last = None
    for number, tensors in enumerate(wanted):
        place = names.stacks.get(tensors[0].name) if tensors else None
        container = place.container if place is not None else None
        if unit and (container is None or container != last):
            yield unit
            unit = []
        unit.append(number)
        last = container
    if unit:
        yield unit


def _in_order(tensors: Sequence[WantedTensor], names: FileNames) -> list[WantedTensor]:
    """Wide dtypes first, stacks where their first tensor stands, in the order of the experts."""
    ranks: dict[str, int] = {}
    for rank, tensor in enumerate(tensors):
        ranks.setdefault(names.name(tensor.name), rank)

    def key(tensor: WantedTensor) -> tuple[int, int, int]:
        place = names.stacks.get(tensor.name)
        rank = ranks[names.name(tensor.name)]
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


def _header(tensors: Sequence[WantedTensor], starts: Mapping[str, int], metadata: str, names: FileNames) -> bytes:
    """The safetensors header, padded with spaces so that the data starts at a multiple of 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": metadata}}
    for tensor in tensors:
        start, place = starts[tensor.name], names.stacks.get(tensor.name)
        if place is not None and place.index:
            continue  # the first one's entry is that of all
        count = place.count if place is not None else 1
        entries[names.name(tensor.name)] = {
            "dtype": tensor.dtype,
            "shape": [*([count] if place is not None else ()), *names.reshape(tensor.name, tensor.shape)],
            "data_offsets": [start, start + count * tensor.size_bytes],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(modules: Sequence[PlannedModule], shards: Sequence[PlannedShard], names: FileNames) -> dict[str, Any]:
    weight_map = {names.name(t.info.name): shards[module.shard].file for module in modules for t in module.tensors}
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


UNFINISHED = re.compile(r"\.((recompile-)?partial|building|journal)\b")  # of a run that writes into the base


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
        and not UNFINISHED.search(path.name)
        and path.name not in skipped
    )
