"""How loaders match what a config says to modules: one row an engine, with source and version. No torch.

A loader asks for one place at a time, by the name and the class of the module in its own model; projections that it
runs as one matrix (`qkv_proj`) are one place. The rows say how it looks the place up in `ignore` and in the targets of
`config_groups`. tests/write/test_loader_truth.py runs the libraries' own functions on many configs, and compares.

    vLLM 0.32.0          model_executor/layers/quantization/compressed_tensors/utils.py, compressed_tensors.py; of GPTQ
                         utils/gptq_utils.py
    SGLang at 06b5b190   python/sglang/srt/layers/quantization/compressed_tensors/utils.py (read, not run)
    compressed-tensors   0.20.1, utils/match.py and quantization/lifecycle/apply.py, which transformers 5.24 calls
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

from recompile.errors import FormatError
from recompile.io.patterns import Regex, compile_regex

# What a loader runs as one matrix, by the last word of its name. The first shard's target is everybody's.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),  # Qwen3.5
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek
}
EXPERT_SHARDS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERTS = "RoutedExperts"  # vLLM's class of all experts of a layer, which targets of Linear take as well


class Stops(FormatError):
    """The loader ends with an error at this place."""


class Entries:
    """Targets or `ignore` in an order: which is the first that matches a name? Exact names are looked up, since large
    mixes list tens of thousands of them."""

    def __init__(self, entries: Iterable[str]) -> None:
        self.entries = tuple(dict.fromkeys(entries))
        self._exact = {entry: n for n, entry in enumerate(self.entries) if not entry.startswith("re:")}
        self._patterns = [(n, entry) for n, entry in enumerate(self.entries) if entry.startswith("re:")]
        self._of_class: dict[str, str | None] = {}

    def first(self, name: str) -> str | None:
        """The first entry that equals a name, or whose pattern matches it from its start."""
        exact = self._exact.get(name)
        for n, entry in self._patterns:
            if exact is not None and n > exact:
                break
            if _pattern(entry[3:]).match(name):
                return entry
        return name if exact is not None else None

    def first_within(self, name: str) -> str | None:
        """As `first`, and an entry that is no pattern may stand anywhere in the name, in any case of letters."""
        lower = name.lower()
        found = (
            entry
            for entry in self.entries
            if (_pattern(entry[3:]).match(name) if entry.startswith("re:") else entry.lower() in lower)
        )
        return next(found, None)

    def of_class(self, kind: str) -> str | None:
        """`first_within` of a class's name, of which there are few."""
        if kind not in self._of_class:
            self._of_class[kind] = self.first_within(kind)
        return self._of_class[kind]


@dataclass(frozen=True)
class Targets:
    """`config_groups` and `ignore` as loaders hold them: a target that is written twice keeps its first place and has
    its last group."""

    groups: Mapping[str, Mapping[str, Any]]
    ignore: Entries

    @classmethod
    def of(cls, config: Mapping[str, Any], renamed: Callable[[str], str] = lambda name: name) -> Targets:
        """renamed: what a loader makes of entries that are names (not of `re:` patterns nor of classes)."""

        def entry(text: Any) -> str:
            name = str(text)
            return renamed(name) if "." in name and not name.startswith("re:") else name

        groups: dict[str, Mapping[str, Any]] = {}
        for group in (config.get("config_groups") or {}).values():
            for target in group.get("targets") or ():
                groups[entry(target)] = group
        return cls(groups, Entries(entry(text) for text in config.get("ignore") or ()))

    @cached_property
    def listed(self) -> Entries:
        """Targets in the order of the config."""
        return Entries(self.groups)

    @cached_property
    def with_experts(self) -> Entries:
        """The same with vLLM's class of experts behind them, where Linear is a target."""
        more = [_EXPERTS] if "Linear" in self.groups else []
        return Entries([*self.groups, *more])

    @cached_property
    def sorted(self) -> Entries:
        """Names in the order of the alphabet, then patterns."""
        return Entries(sorted(self.groups, key=lambda target: ("re:" in target, target)))


@dataclass(frozen=True)
class Place:
    """One module of a loader's model.

    name:    "model.layers.0.self_attn.qkv_proj"
    classes: its class and those above it, the nearest first
    shards:  names of what it is fused of; of experts those of the first; empty where it is one module
    """

    name: str
    classes: tuple[str, ...]
    shards: tuple[str, ...] = ()
    is_experts: bool = False


@dataclass(frozen=True)
class TargetRules:
    """One loader.

    find:    the target that a place falls in; None: left dense. Raises Stops
    gptq:    what a GPTQ config says of a place; None where that is not known here. Raises Stops
    stacks_experts: one scheme for all experts of a layer
    renames: of multimodal models, stored name -> its own; None: it has transformers' names
    """

    version: str
    find: Callable[[Targets, Place], str | None]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stacks_experts: bool = False
    gptq: Callable[[Mapping[str, Any], Place, Collection[str]], Mapping[str, Any] | None] | None = None
    renames: Callable[[str], str] | None = None


@lru_cache(maxsize=8192)
def _pattern(text: str) -> Regex:
    return compile_regex(text, "quantization_config: target")


def _of_shards(place: Place, targets: Entries) -> str | None:
    """The first shard's target, where every shard has one, whether it is the same or not."""
    found = [targets.first(shard) for shard in place.shards]
    return found[0] if found and all(found) else None


def _ignored_shards(place: Place, ignored: Callable[[str], object]) -> bool:
    found = [bool(ignored(shard)) for shard in place.shards]
    if any(found) and not all(found):
        left = [shard for shard, is_ignored in zip(place.shards, found, strict=True) if is_ignored]
        raise Stops(f"ignore has {', '.join(left)} and not the other projections of {place.name}")
    return all(found)


# ---- vLLM ------------------------------------------------------------------------------------------------------------


def vllm(targets: Targets, place: Place) -> str | None:
    """The target that vLLM matches to a place; None: it loads the place unquantized."""
    if place.is_experts:
        return _vllm_experts(targets, place)
    if targets.ignore.first(place.name) or (place.shards and _ignored_shards(place, targets.ignore.first)):
        return None
    listed = targets.listed
    return listed.first(place.name) or _of_shards(place, listed) or listed.of_class(place.classes[0])


def _vllm_experts(targets: Targets, place: Place) -> str | None:
    """Asks for the projections of expert 0, and takes what they have for all."""
    listed = targets.with_experts
    found: list[str | None] = []
    for shard in place.shards:
        target = None if targets.ignore.first(shard) else listed.first(shard) or listed.of_class(_EXPERTS)
        found.append("Linear" if target == _EXPERTS and _EXPERTS not in targets.groups else target)
    schemes = [targets.groups[target] if target is not None else None for target in found]
    if any(scheme != schemes[0] for scheme in schemes):
        raise Stops(f"the projections of {place.shards[0].rpartition('.')[0]} have several schemes")
    return found[0]


def vllm_gptq(config: Mapping[str, Any], place: Place, quantized: Collection[str]) -> Mapping[str, Any] | None:
    """What a GPTQ config says of a place: bits and group_size; None: left dense. Raises Stops.

    quantized: what `modules_in_block_to_quantize` names, or the modules that are stored quantized where it is not
    there. Rules of `dynamic` are asked with the fused name alone: `+:.*up_proj` takes gate_up_proj, `+:.*[.]up_proj`
    does not.
    """

    def listed(name: str) -> bool:
        return any(entry in name for entry in quantized)

    found = [listed(shard) for shard in place.shards or (place.name,)]
    if any(found) and not all(found):
        raise Stops(f"some of the projections of {place.name} are quantized, and not all")
    said = {key: config.get(key) for key in ("bits", "group_size")}
    for pattern, entry in (config.get("dynamic") or {}).items():
        is_negative = pattern.startswith("-:")
        if _pattern(pattern[2:] if is_negative or pattern.startswith("+:") else pattern).match(place.name):
            if is_negative:
                return None
            if isinstance(entry, Mapping):
                said |= {key: entry[key] for key in said if isinstance(entry.get(key), int)}
            break
    return said if all(found) else None


# ---- SGLang ----------------------------------------------------------------------------------------------------------


def sglang(targets: Targets, place: Place) -> str | None:
    """As `vllm`, for SGLang."""
    if place.is_experts:  # as vLLM did before 0.19: no other rule is known here
        return _vllm_experts(targets, place)

    ignored = targets.ignore.first_within
    if place.shards and place.name not in targets.ignore.entries:
        is_ignored = _ignored_shards(place, ignored)
    else:
        is_ignored = ignored(place.name) is not None
    if is_ignored:
        return None
    listed = targets.listed
    found = listed.first(place.name) or listed.of_class(place.classes[0]) or _of_shards(place, listed)
    if found is None:
        raise Stops("no target of config_groups matches it, and ignore does not have it")
    return found


# ---- transformers ----------------------------------------------------------------------------------------------------


def compressed_tensors(targets: Targets, place: Place) -> str | None:
    """Exact names, then patterns, both in the order of the alphabet, then classes."""
    if targets.ignore.first(place.name) or any(kind in targets.ignore.entries for kind in place.classes):
        return None
    named = targets.sorted.first(place.name)
    return named or next((target for target in targets.sorted.entries if target in place.classes), None)


# ---- the rows --------------------------------------------------------------------------------------------------------


def _multimodal(name: str) -> str:
    """vLLM and SGLang keep the text model of a multimodal one under `language_model.model.`."""
    for stored, loaded in (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head")):
        if name.startswith(stored):
            return loaded + name[len(stored) :]
    return name.removeprefix("model.") if name.startswith(("model.visual.", "model.vision_tower.")) else name


_VLLM = TargetRules("vLLM 0.32.0", vllm, FUSED, stacks_experts=True, gptq=vllm_gptq, renames=_multimodal)
ROWS: Mapping[str, TargetRules] = {
    "vllm": _VLLM,
    "vllm-cpu": replace(_VLLM, version="vLLM 0.32.0 on a CPU"),
    "sglang": TargetRules("SGLang at 06b5b190", sglang, FUSED, stacks_experts=True, renames=_multimodal),
    "transformers": TargetRules("transformers 5.24 with compressed-tensors 0.20.1", compressed_tensors),
}
