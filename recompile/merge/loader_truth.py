"""Which scheme a loader would apply to every module, by its own matching rules, against what is stored.

What is stored is read off headers, never off config.json: bits from the codes' bytes, scales and zero points from their
shapes. A loader that matches another target than was meant makes parameters of other shapes and stops, or of the same
shapes and reads codes otherwise: both are told, module by module. Headers only; no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.module_names import role_of
from recompile.formats import FORMATS, compressed_tensors
from recompile.merge.configs import is_linear
from recompile.merge.target_rules import EXPERT_SHARDS, ROWS, Place, Stops, TargetRules, Targets

if TYPE_CHECKING:
    from recompile.formats.stored import StoredModule

_EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(\w+)$")
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # loaders never quantize them, whatever a config says
_FLOAT_CODES = frozenset({"F8_E4M3", "F8_E5M2"})
_CLASSES = {"embedding": ("VocabParallelEmbedding",), "head": ("ParallelLMHead",), "layer": ("LinearBase",)}
_LINEAR, _EMBEDDING = ("Linear", "Module"), ("Embedding", "Module")  # torch's, which transformers has
# vLLM's linear classes, of which every name contains "Linear"
_QKV, _MERGED = ("QKVParallelLinear",), ("MergedColumnParallelLinear",)


@dataclass(frozen=True)
class Layout:
    """How a weight is kept, as far as shapes tell. scales: of weight_scale, (1,) for one a tensor."""

    bits: int
    type: str
    scales: tuple[int, ...]
    zero_points: bool = False
    inputs: str = ""  # what rounds its inputs, which no shape tells

    def __str__(self) -> str:
        rows = "one scale" if self.scales == (1,) else f"{' x '.join(map(str, self.scales))} scales"
        points = " and zero points" if self.zero_points else ""
        inputs = f" with {self.inputs} inputs" if self.inputs else ""
        return f"{self.type}{self.bits}, {rows}{points}{inputs}"


def misread(
    engine: str, modules: Mapping[str, StoredModule], config: Mapping[str, Any], loaded: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """(module, what the loader would make of it) for every module that an engine reads otherwise than it is stored.

    engine: a key of target_rules.ROWS; config: the quantization_config, of compressed-tensors or, for vLLM, GPTQ
    loaded: stored name -> transformers' own, where they differ

    Raises FormatError for targets that are no regular expressions.
    """
    rules = ROWS[engine]
    names = loaded or {}
    renamed: Callable[[str], str] = _same
    if rules.renames is None:
        renamed = lambda name: names.get(name, name)  # noqa: E731
    elif any(name.startswith(("model.language_model.", "language_model.")) for name in modules):
        renamed = rules.renames
    if config.get("quant_method") == "gptq" and rules.gptq is not None:
        yield from _misread_gptq(rules, modules, config, renamed)
    if config.get("quant_method") != compressed_tensors.QUANT_METHOD:
        return
    targets = Targets.of(config, renamed if rules.renames is not None else _same)
    meant = compressed_tensors.Targets(config)
    for place, members in _places(rules, modules, renamed):
        yield from _misread_at(rules, targets, meant, place, members)


def _same(name: str) -> str:
    return name


def _misread_gptq(
    rules: TargetRules,
    modules: Mapping[str, StoredModule],
    config: Mapping[str, Any],
    renamed: Callable[[str], str],
) -> Iterator[tuple[str, str]]:
    assert rules.gptq is not None, "asked by the caller"
    named = config.get("modules_in_block_to_quantize") or []
    flat = [name for entry in named for name in ([entry] if isinstance(entry, str) else entry)]
    quantized = [renamed(name) for name in flat or [name for name, stored in modules.items() if stored.is_quantized]]
    for place, members in _places(rules, modules, renamed):
        if place.is_experts:  # their loader falls back to others; not compared
            continue
        said = "" if not place.shards else f", as a part of {place.name}"
        try:
            found = rules.gptq(config, place, quantized)
        except Stops as error:
            for module in members:
                yield module.name, f"stored as {_told(module)}; {rules.version} stops at it{said}: {error}"
            continue
        for module in members:
            stored, applied = _stored(module, None), None
            if found is not None and module.shape is not None:
                size = int(found["group_size"] or -1)
                groups = 1 if size < 0 else -(-module.shape[1] // size)
                applied = Layout(int(found["bits"] or 4), "int", (module.shape[0], groups))
            if applied != stored and (stored is not None or place.classes != _CLASSES["head"]):
                yield module.name, f"stored as {stored or 'dense'}; {rules.version} applies {applied or 'none'}{said}"


# ---- the loader's places ---------------------------------------------------------------------------------------------


def _places(
    rules: TargetRules, stored: Mapping[str, StoredModule], renamed: Callable[[str], str]
) -> Iterator[tuple[Place, list[StoredModule]]]:
    """Every place of the loader's model that is a quantized or a linear module here, with what is stored for it."""
    modules = {
        name: module
        for name, module in stored.items()
        if module.shape is not None and len(module.shape) == 2 and (module.is_quantized or is_linear(module))
        if module.is_quantized or name.rpartition(".")[2] not in _ROUTERS
    }
    stacks = _stacks(modules) if rules.stacks_experts else {}
    done: set[str] = set()
    for name, module in modules.items():
        if name in done:
            continue
        whole = _whole_of(rules, name, modules, stacks)
        place, members = whole if whole is not None else (None, [name])
        done.update(members)
        if place is None:
            place = Place(name, _classes_of(rules, name, module))
        place = Place(renamed(place.name), place.classes, tuple(map(renamed, place.shards)), place.is_experts)
        yield place, [modules[member] for member in members]


def _stacks(modules: Iterable[str]) -> dict[str, tuple[Place, list[str]]]:
    """`...mlp.experts` -> the place of all experts of a layer, and their modules."""
    members: dict[str, list[str]] = {}
    for name in modules:
        expert = _EXPERT.match(name)
        if expert:
            members.setdefault(expert[1], []).append(name)
    found = {}
    for stack, names in members.items():
        leaves = {name.rpartition(".")[2] for name in names}
        shards = next((shards for shards in EXPERT_SHARDS if set(shards) == leaves), None)
        if shards is not None:
            first = tuple(f"{stack}.0.{leaf}" for leaf in shards)
            found[stack] = Place(stack, ("RoutedExperts",), first, is_experts=True), names
    return found


def _whole_of(
    rules: TargetRules, name: str, modules: Mapping[str, Any], stacks: Mapping[str, tuple[Place, list[str]]]
) -> tuple[Place, list[str]] | None:
    """What the loader runs a module together with: a fused projection, the experts of a layer."""
    expert = _EXPERT.match(name)
    if expert:
        return stacks.get(expert[1])
    parent, _, leaf = name.rpartition(".")
    for fused, projections in rules.fused.items():
        members = [f"{parent}.{projection}" for projection in projections]
        if leaf in projections and all(member in modules for member in members):
            return Place(f"{parent}.{fused}", _QKV if fused == "qkv_proj" else _MERGED, tuple(members)), members
    return None


def _classes_of(rules: TargetRules, name: str, module: StoredModule) -> tuple[str, ...]:
    role = role_of(name)
    if not rules.fused:
        return _EMBEDDING if role == "embedding" else _LINEAR
    return _CLASSES[role] if role != "layer" else ("RowParallelLinear",)


# ---- one place -------------------------------------------------------------------------------------------------------


def _misread_at(
    rules: TargetRules, targets: Targets, meant: compressed_tensors.Targets, place: Place, members: list[StoredModule]
) -> Iterator[tuple[str, str]]:
    said = "" if place.name == members[0].name and len(members) == 1 else f", as a part of {place.name}"
    try:
        target = rules.find(targets, place)
    except Stops as error:
        for module in members:
            yield module.name, f"stored as {_told(module)}; {rules.version} stops at it{said}: {error}"
        return
    if target is None:
        for module in members:
            if module.is_quantized:
                why = f"takes it for dense{said}: ignore has it, or no target matches it"
                yield module.name, f"stored as {_told(module)}; {rules.version} applies none and {why}"
        return
    group = targets.groups[target]
    for module in members:
        applied = _applied(group, module)
        stored = _stored(module, meant.group_of(module.name))
        if stored is None:
            yield module.name, f"stored as dense; {rules.version} applies {applied}{said}, by target {target!r}"
        elif isinstance(applied, str) or applied != stored:
            yield module.name, f"stored as {stored}; {rules.version} applies {applied}{said}, by target {target!r}"


def _told(module: StoredModule) -> str:
    return str(_stored(module, None) or "dense")


def _stored(module: StoredModule, group: Mapping[str, Any] | None) -> Layout | None:
    """From shapes; group: as the format's own library matches it, for the inputs, of which no shape tells."""
    if not module.is_quantized or module.shape is None:
        return None
    out, columns = module.shape
    if "qweight" in module.parts:
        groups, bits = module.parts["scales"].shape[0], module.parts["qweight"].shape[0] * 32 // columns
        return Layout(bits, "int", (out, groups))
    codes = module.parts.get("weight_packed") or module.parts["weight"]
    bits = codes.size_bytes * 8 // (out * columns)
    is_float = FORMATS[module.format].levels not in (None, "int8") or codes.dtype in _FLOAT_CODES
    scale = module.parts.get("weight_scale")
    scales = tuple(scale.shape) if scale is not None else ()
    return Layout(
        bits,
        "float" if is_float else "int",
        (1,) if scale is not None and scale.numel == 1 else scales,
        "weight_zero_point" in module.parts,
        _inputs(group),
    )


def _applied(group: Mapping[str, Any], module: StoredModule) -> Layout | str:
    """The parameters that a group makes for a module of this size; a text for a group that makes none."""
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or module.shape is None:
        return "a group without weights"
    out, columns = module.shape
    size, block, strategy = weights.get("group_size"), weights.get("block_structure"), weights.get("strategy")
    if strategy is None:
        strategy = "block" if block else "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "block" and block:
        sizes = [int(word) for word in block.split("x")] if isinstance(block, str) else [int(word) for word in block]
        scales: tuple[int, ...] = (-(-out // sizes[0]), -(-columns // sizes[1]))
    elif strategy in ("group", "tensor_group") and isinstance(size, int) and size > 0:
        scales = (out, -(-columns // size))
    elif strategy == "channel":
        scales = (out, 1)
    else:
        scales = (1,)
    kind = "float" if weights.get("type") == "float" else "int"
    bits = int(weights.get("num_bits") or 8)
    return Layout(bits, kind, (1,) if scales == (1, 1) else scales, weights.get("symmetric") is False, _inputs(group))


def _inputs(group: Mapping[str, Any] | None) -> str:
    entry = (group or {}).get("input_activations")
    if not entry:
        return ""
    how = "" if entry.get("dynamic") else " static"
    return f"{'fp' if entry.get('type') == 'float' else 'int'}{entry.get('num_bits', 8)}{how}"
