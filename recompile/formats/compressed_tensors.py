"""compressed-tensors configs: which scheme a module has, and what config.json must say after a merge. No torch.

Field names and matching rules are those of the compressed-tensors library 0.20 and of vLLM 0.33, which match targets
differently; what is written here reads the same in both (disjoint, anchored targets, no reliance on order).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from recompile.errors import FormatError, MismatchError, UnsupportedError
from recompile.formats import COMPRESSED, FORMATS
from recompile.formats.stored import Described, StoredModule
from recompile.io.patterns import Regex, compile_regex

QUANT_METHOD = COMPRESSED
WRITTEN_VERSION = "0.20.0"


class Targets:
    """The targets of all `config_groups`, in the order in which compressed-tensors asks them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises FormatError for a target that is not a regular expression."""
        self.config = config
        self._named: dict[str, Mapping[str, Any]] = {}
        for group in (config.get("config_groups") or {}).values():
            for target in group.get("targets") or ():
                self._named[str(target)] = group  # the last group of a target that several have, as the library does
        self._patterns: list[tuple[Regex, Mapping[str, Any]]] = []
        for target in sorted(target for target in self._named if target.startswith("re:")):
            pattern = compile_regex(target[3:], f"config_groups: target {target[:100]!r}")
            self._patterns.append((pattern, self._named[target]))

    def group_of(self, module: str, class_name: str = "Linear") -> Mapping[str, Any] | None:
        """The config group that a module falls in, as compressed-tensors matches: the exact name, then `re:` patterns
        in alphabetical order (anchored at the start), then the class name. None where no target matches."""
        if module in self._named:
            return self._named[module]
        for pattern, group in self._patterns:
            if pattern.match(module):
                return group
        return self._named.get(class_name)


@lru_cache(maxsize=8)
def _targets_of(identity: _Same) -> Targets:
    return Targets(identity.config)


class _Same:
    """A config as a key: equal to itself only. The cache keeps it alive, so that its id is not used again."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def __hash__(self) -> int:
        return id(self.config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.config is self.config


def scheme_of(checkpoint: Described, module: StoredModule) -> Any:
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


def weights_of(checkpoint: Described, module: StoredModule) -> Mapping[str, Any]:
    """The `weights` entry of the config group that covers a module."""
    weights: Mapping[str, Any] = group_for(checkpoint, module)["weights"]
    return weights


def group_for(checkpoint: Described, module: StoredModule) -> Mapping[str, Any]:
    """The config group that covers a module. Raises FormatError where none does."""
    config = checkpoint.quantization_config
    is_embedding = module.name.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings")
    group = _targets_of(_Same(config)).group_of(module.name, "Embedding" if is_embedding else "Linear")
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
    known: dict[int, tuple[Mapping[str, Any], str]] = {}  # one group stands for many modules: spelled out once
    for module, group in quantized:
        if id(group) not in known:
            body = {key: value for key, value in group.items() if key != "targets"}
            body.setdefault("format", "pack-quantized")
            key = json.dumps(_without_nulls(body), sort_keys=True)
            known[id(group)] = (group, key)
            bodies.setdefault(key, body)
        members.setdefault(known[id(group)][1], []).append(module)
    ordered = sorted(bodies, key=lambda key: (_bits(bodies[key]), key))
    names = NumberedNames(all_modules)
    groups = {
        f"group_{number}": {"targets": targets_for(members[key], names), **bodies[key]}
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


def named_for_loaders(config: Mapping[str, Any], loader_names: Mapping[str, str]) -> dict[str, Any]:
    """A merged config whose targets and `ignore` also match the names that loaders know the modules by.

    loader_names: stored name -> the loader's, of every module; where all are equal the config comes back as it is
    """
    renamed = {stored: name for stored, name in loader_names.items() if stored != name}
    groups = config.get("config_groups")
    if not renamed or not groups or config.get("quant_method") != QUANT_METHOD:
        return dict(config)
    ignored = dict.fromkeys(config.get("ignore") or ())
    both = NumberedNames(dict.fromkeys([*loader_names, *renamed.values()]))
    made = {}
    covered = Targets(config)
    of_group: dict[int, list[str]] = {}
    for name in loader_names:
        if name not in ignored and (group := covered.group_of(name, "")) is not None:
            of_group.setdefault(id(group), []).append(name)
    for key, group in groups.items():
        members = of_group.get(id(group), [])
        names = [*members, *(renamed[name] for name in members if name in renamed)]
        made[key] = {**group, "targets": targets_for(list(dict.fromkeys(names)), both)}
    ignore = sorted({*ignored, *(renamed[name] for name in ignored if name in renamed)})
    return {**config, "ignore": ignore, "config_groups": made}


def names_others(config: Mapping[str, Any], modules: Collection[str]) -> bool:
    """Whether targets or `ignore` name modules that are not among `modules`, under a loader's names perhaps."""
    entries = [str(entry) for entry in config.get("ignore") or ()]
    for group in (config.get("config_groups") or {}).values():
        entries += map(str, group.get("targets") or ())
    for entry in entries:
        if entry.startswith("re:"):
            pattern = compile_regex(entry[3:], f"quantization_config: {entry[:100]!r}")
            if not any(pattern.match(name) for name in modules):
                return True
        elif "." in entry and entry not in modules:
            return True
    return False


def _bits(body: Mapping[str, Any]) -> int:
    weights = body.get("weights")
    return int(weights.get("num_bits", 0)) if isinstance(weights, Mapping) else 0


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


class NumberedNames:
    """Module names by what follows each of their numbers: where a pattern may match is looked up, not searched for.

    `a.layers.3.mlp.experts.7.up_proj` stands under `.mlp.experts.7.up_proj` and under `.up_proj`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._by_tail: dict[str, list[tuple[str, str, str]]] = {}  # tail -> (what stands before, number, whole name)
        for name in names:
            for found in _NUMBER.finditer(name):
                entry = (name[: found.start()], found[0], name)
                self._by_tail.setdefault(name[found.end() :], []).append(entry)

    def matching(self, prefix: str, numbers: Collection[str] | None, tails: Iterable[str]) -> Iterator[str]:
        """Every name that ends in `<prefix><number><tail>`, for one of the tails; numbers: None for any."""
        for tail in tails:
            for before, number, name in self._by_tail.get(tail, ()):
                if before.endswith(prefix) and (numbers is None or number in numbers):
                    yield name


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def targets_for(modules: Iterable[str], names: NumberedNames) -> list[str]:
    """Targets that match exactly `modules` among `names`: `re:` patterns over layers where they are exact, else
    plain names. Every pattern starts with `.*` (engines rename prefixes), escapes dots and ends in `$`, and has a dot
    before the projection, so that no fused name (`qkv_proj`) ends like a pattern for one shard (`v_proj`)."""
    modules = list(modules)
    wanted = set(modules)
    by_tail: dict[tuple[str, str], list[str]] = {}
    plain: list[str] = []
    for module in modules:
        number = _NUMBER.search(module)
        if number:
            by_tail.setdefault((module[: number.start()], module[number.end() :]), []).append(number[0])
        else:
            plain.append(module)
    by_layers: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (prefix, tail), layers in by_tail.items():
        parent, _, leaf = tail.rpartition(".")
        by_layers.setdefault((prefix, parent, tuple(sorted(layers, key=int))), []).append(leaf)
    targets = []
    for (prefix, parent, numbers), leaves in by_layers.items():
        tails = [f"{parent}.{leaf}" for leaf in leaves]
        exact = {f"{prefix}{layer}{tail}" for layer in numbers for tail in tails}
        some = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        for layers_pattern, allowed in ((r"\d+", None), (some, frozenset(numbers))):
            if wanted.issuperset(names.matching(prefix, allowed, tails)):
                targets.append(f"re:{_pattern(prefix, layers_pattern, parent, leaves)}")
                break
        else:
            targets += sorted(exact)
    return sorted(targets) + sorted(plain)


def _pattern(prefix: str, layers: str, parent: str, leaves: Sequence[str]) -> str:
    leaf = re.escape(leaves[0]) if len(leaves) == 1 else f"({'|'.join(re.escape(leaf) for leaf in sorted(leaves))})"
    return f".*{re.escape(prefix)}{layers}{re.escape(parent)}\\.{leaf}$"
