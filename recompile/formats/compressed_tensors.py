"""compressed-tensors configs: which scheme a module has, and what config.json must say after a merge. No torch.

Field names and matching rules are those of the compressed-tensors library 0.20 and of vLLM 0.33, which match targets
differently; what is written here reads the same in both (disjoint, anchored targets, no reliance on order).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recompile.errors import FormatError, MismatchError, UnsupportedError
from recompile.formats import FORMATS

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint, StoredModule

QUANT_METHOD = "compressed-tensors"
WRITTEN_VERSION = "0.20.0"


def group_of(config: Mapping[str, Any], module: str, class_name: str = "Linear") -> Mapping[str, Any] | None:
    """The config group that a module falls in, as compressed-tensors matches: the exact name, then `re:` patterns in
    alphabetical order (anchored at the start), then the class name. None where no target matches."""
    groups = config.get("config_groups") or {}
    by_target: dict[str, Mapping[str, Any]] = {}
    for group in groups.values():
        for target in group.get("targets") or ():
            by_target.setdefault(str(target), group)
    if module in by_target:
        return by_target[module]
    for target in sorted(target for target in by_target if target.startswith("re:")):
        try:
            if re.match(target[3:], module):
                return by_target[target]
        except re.error as error:
            raise FormatError(f"config_groups: target {target!r} is not a regular expression: {error}") from error
    return by_target.get(class_name)


def scheme_of(checkpoint: Checkpoint, module: StoredModule) -> Any:
    """The scheme of a module, of the class that its format's `dequantize` takes.

    What is stored decides the format: a group's `format` is advice, often missing. The group's `weights` must fit what
    is stored. Raises FormatError where they do not or no group covers the module, UnsupportedError for rotations.
    """
    if checkpoint.quantization_config.get("transform_config"):
        raise UnsupportedError(
            f"{checkpoint.label}: config.json has a transform_config (rotations), which is not supported; the weights "
            f"alone would not be the model's"
        )
    weights = weights_of(checkpoint, module)
    try:
        return FORMATS[module.format].load_code().read_scheme(weights)
    except FormatError as error:
        raise FormatError(f"{checkpoint.label}: config group of {module.name}: {error}") from error


def weights_of(checkpoint: Checkpoint, module: StoredModule) -> Mapping[str, Any]:
    """The `weights` entry of the config group that covers a module."""
    weights: Mapping[str, Any] = group_for(checkpoint, module)["weights"]
    return weights


def group_for(checkpoint: Checkpoint, module: StoredModule) -> Mapping[str, Any]:
    """The config group that covers a module. Raises FormatError where none does."""
    config = checkpoint.quantization_config
    is_embedding = module.name.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings")
    group = group_of(config, module.name, "Embedding" if is_embedding else "Linear")
    if group is None or not isinstance(group.get("weights"), Mapping):
        raise FormatError(
            f"{checkpoint.label}: {module.name} is stored as {module.format}, and no target of config_groups in "
            f"config.json matches it; engines would not know its bits"
        )
    return group


def merged_config(
    base: Mapping[str, Any],
    quantized: Iterable[tuple[str, Mapping[str, Any]]],
    dense: Sequence[str],
    all_modules: Sequence[str],
) -> dict[str, Any]:
    """`quantization_config` of a checkpoint whose modules come from several sources.

    base:        quantization_config of the base variant ({} for a dense base)
    quantized:   (module, config group of its source) for every quantized module
    dense:       modules with a 2-D weight that is not quantized; they go to `ignore`
    all_modules: every module of the checkpoint, to keep targets from matching what they should not

    One group per distinct scheme: groups are equal when all their fields but `targets` are.
    """
    members: dict[str, list[str]] = {}
    bodies: dict[str, dict[str, Any]] = {}
    for module, group in quantized:
        body = {key: value for key, value in group.items() if key != "targets"}
        body.setdefault("format", "pack-quantized")
        key = json.dumps(_without_nulls(body), sort_keys=True)
        members.setdefault(key, []).append(module)
        bodies.setdefault(key, body)
    ordered = sorted(bodies, key=lambda key: (_bits(bodies[key]), key))
    groups = {
        f"group_{number}": {"targets": targets_for(members[key], all_modules), **bodies[key]}
        for number, key in enumerate(ordered)
    }
    formats = {str(body["format"]) for body in bodies.values()}
    carried = {
        key: value
        for key, value in base.items()
        if key not in ("config_groups", "ignore", "format", "quantization_status", "quant_method")
    }
    transform = carried.get("transform_config")
    if transform:
        raise MismatchError(
            "config.json: the base has a transform_config (rotations); a merge of such variants is not supported"
        )
    return {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": WRITTEN_VERSION,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **carried,
        "ignore": sorted(dense),
        "config_groups": groups,
    }


def _bits(body: Mapping[str, Any]) -> int:
    weights = body.get("weights")
    return int(weights.get("num_bits", 0)) if isinstance(weights, Mapping) else 0


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def targets_for(modules: Sequence[str], all_modules: Sequence[str]) -> list[str]:
    """Targets that match exactly `modules` among `all_modules`: `re:` patterns over layers where they are exact, else
    plain names. Every pattern starts with `.*` (engines rename prefixes), escapes dots and ends in `$`, and has a dot
    before the projection, so that no fused name (`qkv_proj`) ends like a pattern for one shard (`v_proj`)."""
    by_tail: dict[str, list[str]] = {}
    plain: list[str] = []
    for module in modules:
        found = re.match(r"^(.*?\.)(\d+)(\..+)$", module)
        if found:
            by_tail.setdefault(f"{found[1]}\0{found[3]}", []).append(found[2])
        else:
            plain.append(module)
    by_layers: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for key, layers in by_tail.items():
        prefix, tail = key.split("\0")
        parent, _, leaf = tail.rpartition(".")
        by_layers.setdefault((prefix, parent, tuple(sorted(layers, key=int))), []).append(leaf)
    targets = []
    for (prefix, parent, numbers), leaves in by_layers.items():
        exact = {f"{prefix}{layer}{parent}.{leaf}" for layer in numbers for leaf in leaves}
        for which in (r"\d+", numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"):
            pattern = _pattern(prefix, which, parent, leaves)
            if {module for module in all_modules if re.match(pattern, module)} == exact:
                targets.append(f"re:{pattern}")
                break
        else:
            targets += sorted(exact)
    return sorted(targets) + sorted(plain)


def _pattern(prefix: str, layers: str, parent: str, leaves: Sequence[str]) -> str:
    leaf = re.escape(leaves[0]) if len(leaves) == 1 else f"({'|'.join(re.escape(leaf) for leaf in sorted(leaves))})"
    return f".*{re.escape(prefix)}{layers}{re.escape(parent)}\\.{leaf}$"
