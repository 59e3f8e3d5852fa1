"""What every module of a checkpoint is for, read off transformers' own model of its architecture on the meta device.

No list of names decides: a router is a map to one score an expert in a block that holds experts, a gate is a map to one
value a head or a token, a tower is what the text model does not run, an MTP layer is what the loader leaves out and is
built like a layer. Names are translated with transformers' own key mapping, so that the same table says under which
name a loader knows a stored module.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from recompile.checkpoint.checkpoint import WeightSource
from recompile.checkpoint.config_fields import architectures_of
from recompile.checkpoint.fused_experts import FLAT_PARENT, expert_counts
from recompile.checkpoint.module_names import NUMBERS, Role, by_name, template_of
from recompile.errors import CheckpointError, UnsupportedError

_WIDTH = re.compile(r"dim|size|rank|width|hidden")
_NO_WIDTH = re.compile(r"kernel|conv|chunk|window|num_|n_")


def roles_of(source: WeightSource) -> Mapping[str, Role]:
    """The role of every stored module of a checkpoint or a mix, by its name.

    For an architecture that transformers does not know, roles are told by name and `loader` is the stored name.
    """
    shapes = tuple((name, module.shape, "weight" in module.parts) for name, module in source.modules.items())
    return _roles(json.dumps(_without_quantization(source.config), sort_keys=True, default=str), _Shapes(shapes))


def stack_name(source: WeightSource) -> str:
    """The name, in the model that loaders make, of the list of layers: "model.layers".

    Raises CheckpointError or UnsupportedError where transformers cannot make the model."""
    from recompile.model.skeleton import find_stack

    text = json.dumps(_without_quantization(source.config), sort_keys=True, default=str)
    return find_stack(loader_model(text))[0]


def turned_modules(source: WeightSource) -> frozenset[str]:
    """Modules whose dense weight is stored as [in, out] (GPT-2's Conv1D); quantized ones are [out, in] everywhere."""
    text = json.dumps(_without_quantization(source.config), sort_keys=True, default=str)
    try:
        model = loader_model(text)
    except (CheckpointError, UnsupportedError):
        return frozenset()
    turned = {name for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    return (
        frozenset(name for name, role in roles_of(source).items() if role.loader in turned) if turned else frozenset()
    )


class _Shapes:
    """The stored modules as a cache key that is cheap to compare."""

    def __init__(self, entries: tuple[tuple[str, tuple[int, ...] | None, bool], ...]) -> None:
        self.entries, self._hash = entries, hash(entries)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shapes) and self.entries == other.entries


def _without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "quantization_config"}


@lru_cache(maxsize=8)
def _roles(config_text: str, shapes: _Shapes) -> Mapping[str, Role]:
    config = json.loads(config_text)
    names = [name for name, _, _ in shapes.entries]
    try:
        model = loader_model(config_text)
    except (CheckpointError, UnsupportedError):
        return by_name(names, {name: shape for name, shape, _ in shapes.entries}, config)
    return _Reader(model).read(shapes.entries)


# ---- the loader's model ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def loader_model(config_text: str) -> Any:
    """The model that `from_pretrained` would make of a config.json, on the meta device.

    config_text: the config as JSON, without quantization_config
    Raises CheckpointError or UnsupportedError where transformers cannot make one.
    """
    import transformers

    from recompile.model.fused_experts import stack_flat_experts
    from recompile.model.skeleton import transformers_config

    config = json.loads(config_text)
    made = transformers_config(config)
    classes = [getattr(transformers, name, None) for name in architectures_of(config)]
    classes += [transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText]
    problem: Exception | None = None
    for found in classes:
        table = getattr(found, "_model_mapping", None)
        if found is None or (table is not None and type(made) not in table):
            continue  # whose message would name every class that there is, and import it to that end: ten seconds
        try:
            with torch.device("meta"), torch.no_grad():
                model = found.from_config(made) if hasattr(found, "from_config") else found._from_config(made)
            stack_flat_experts(model)
            return model.eval()
        except Exception as error:  # models raise whatever their constructors meet
            problem = error
    why = problem or f"it has no model that makes text for model_type {config.get('model_type')!r}"
    raise UnsupportedError(f"transformers cannot build the model of config.json: {why}")


def _towers(model: Any) -> tuple[str, ...]:
    """Prefixes of the parts beside the layers that hold a model of their own: Phi-4 multimodal keeps its towers within
    the text model."""
    from transformers import PreTrainedModel

    from recompile.model.skeleton import find_stack

    try:
        way = f"{find_stack(model)[0]}."
    except UnsupportedError:
        return ()
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and not way.startswith(f"{name}."):
            words = name.split(".")
            prefixes = (".".join(words[:count]) + "." for count in range(1, len(words) + 1))
            found[next(prefix for prefix in prefixes if not way.startswith(prefix))] = None
    return tuple(found)


class _Reader:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.state = model.state_dict(keep_vars=True)
        self.owners = dict(model.named_modules())
        names = {id(module): name for name, module in self.owners.items()}
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        text = model.config.get_text_config()
        self.text = names.get(id(decoder), "") if text is not model.config else ""
        self.towers = _towers(model)
        self.depth = int(getattr(text, "num_hidden_layers", 0) or 0)
        head = model.get_output_embeddings()
        self.head = names.get(id(head)) if head is not None else None
        self.embedding = self.state.get(f"{names.get(id(model.get_input_embeddings()))}.weight")
        counts = expert_counts(text.to_dict())
        extra = getattr(text, "zero_expert_num", None)  # LongCat's router also scores experts that compute nothing
        self.idle_experts = extra if type(extra) is int else 0
        self._kinds: dict[tuple[str, type, tuple[int, ...]], str] = {}
        self.experts: dict[str, int] = {}  # module that holds experts -> how many
        self.holders: dict[str, str] = {}  # and the module within it whose parameters they are: itself, but for DBRX
        for name, module in self.owners.items():
            stacked = {p.shape[0] for p in module._parameters.values() if p is not None and p.dim() == 3}
            stacked -= {count + self.idle_experts for count in stacked} if self.idle_experts else set()
            if len(stacked) == 1 and stacked & counts:
                container = name.removesuffix(".mlp") if name.endswith(FLAT_PARENT) else name
                self.experts[container], self.holders[container] = stacked.pop(), name
            elif isinstance(module, nn.ModuleList) and len(module) in counts and name.endswith("experts"):
                self.experts[name], self.holders[name] = len(module), name

    def read(self, entries: Iterable[tuple[str, tuple[int, ...] | None, bool]]) -> dict[str, Role]:
        entries = list(entries)
        renamed = self._renamed([f"{name}.weight" if weight or shape else name for name, shape, weight in entries])
        found: dict[str, Role] = {}
        unclaimed: list[tuple[str, tuple[int, ...] | None]] = []
        for (name, shape, weight), (target, alias) in zip(entries, renamed, strict=True):
            if target in self.state:
                found[name] = self._role(target, alias)
                if not weight and shape is None and found[name].kind == "linear" and self.state[target].dim() == 2:
                    found[name] = replace(found[name], kind="parameter")  # stored bare: its parts would have no names
            else:
                unclaimed.append((name, shape))
        return found | self._unclaimed(unclaimed, found, {name: shape for name, shape, _ in entries})

    def _renamed(self, tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(parameter that a tensor goes to, name of its module in the loader's terms) of every tensor.

        Tensors that differ in their numbers only are renamed once: there are tens of thousands of experts.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        prefix = self.model.base_model_prefix
        templates: dict[tuple[str, ...], tuple[str, str] | None] = {}

        def rename(tensor: str) -> tuple[str, str]:
            target, pattern = rename_source_key(tensor, renamings, converters, prefix, self.state)
            if target not in self.state:
                target = self._in_state(tensor, target)
            alias = target
            if pattern is not None and target in self.state:  # one of several tensors that make a parameter
                alias, _ = rename_source_key(tensor, renamings, [], prefix, self.state)
            return target, alias.removesuffix(".weight")

        for tensor in tensors:
            words = NUMBERS.split(tensor)  # text and numbers in turn
            kind, numbers = tuple(words[::2]), words[1::2]
            template = templates.get(kind)
            if template is None:
                found = rename(tensor)
                made = [template_of(name, numbers) for name in found]
                if found[0] in self.state and made[0] is not None and made[1] is not None:
                    templates[kind] = (made[0], made[1])
                yield found
                continue
            target = template[0].format(*numbers)
            yield (target, template[1].format(*numbers)) if target in self.state else rename(tensor)

    def _in_state(self, tensor: str, target: str) -> str:
        """Where a name that the mapping leaves unknown belongs: bare fused experts, one expert of a fused parameter."""
        for name in (tensor, tensor.removesuffix(".weight"), target.removesuffix(".weight")):
            if name in self.state:
                return name
        expert = re.fullmatch(r"(.+)\.\d+\.\w+\.weight", target)
        container = expert[1] if expert else ""
        if container in self.experts:
            holder = self.holders[container]
            return next(f"{holder}.{leaf}" for leaf, p in self.owners[holder]._parameters.items() if p is not None)
        outer = container.removesuffix(".experts")  # JetMoE: gate and up, and down, in modules of their own
        beside = [name for name in self.experts if outer != container and name.rpartition(".")[0] == outer]
        return f"{beside[0]}.weight" if len(beside) == 2 else target

    def _role(self, target: str, alias: str) -> Role:
        part = "text"
        owner = target.rpartition(".")[0]
        outside = self.text and not target.startswith(f"{self.text}.") and owner != self.head
        if outside or target.startswith(self.towers):
            part = "tower"
        value = self.state[target]
        key = (NUMBERS.sub("#", target), type(self.owners[owner]), tuple(value.shape))
        if key not in self._kinds:
            self._kinds[key] = self._kind(target)
        return Role(part, self._kinds[key], alias)

    def _kind(self, target: str) -> str:
        name, _, leaf = target.rpartition(".")
        owner, value = self.owners[name], self.state[target]
        if isinstance(owner, nn.Embedding):
            return "embedding"
        if name == self.head:
            return "head"
        if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return "convolution"
        if value.dim() < 2 or not value.is_floating_point():
            return "vector"
        if name in self.holders.values():
            return "linear" if value.dim() == 3 else "vector"  # a bias for every expert
        if value.dim() == 2 and self._is_router(name, value):
            return "router"
        if value.dim() == 2 and self._is_gate(name, value):
            return "gate"
        linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"
        return "linear" if linear and leaf == "weight" else "parameter"

    def _is_router(self, name: str, value: torch.Tensor) -> bool:
        """Whether a map gives a score to every expert of the block that it is in."""
        block = name
        while block:
            block = block.rpartition(".")[0]
            inside = [found for found in self.experts if found.startswith(f"{block}.") or not block]
            if any(name.startswith(f"{found}.") for found in inside):
                return False  # within an expert
            if inside:
                depth_of_block = block.count(".")
                near = [found for found in inside if found.count(".") == depth_of_block + 1]
                around = self.owners[name.rpartition(".")[0]]
                attention = hasattr(around, "head_dim") or hasattr(around, "num_heads")
                counts = {self.experts[found] + idle for found in near for idle in (0, self.idle_experts)}
                return bool(near) and not attention and value.shape[0] in counts
        return False

    def _is_gate(self, name: str, value: torch.Tensor) -> bool:
        """Whether a map gives one value a token, or one or two a head, of what it stands beside."""
        outputs = int(value.shape[0])
        if outputs == 1:
            return True
        around = self.owners[name.rpartition(".")[0]]
        numbers = {key: number for key, number in vars(around).items() if type(number) is int and number > 1}
        heads = {number for key, number in numbers.items() if key.endswith("heads")}
        widths = {number for key, number in numbers.items() if _WIDTH.search(key) and not _NO_WIDTH.search(key)}
        counts = heads | {2 * number for number in numbers.values() if number in heads}
        return outputs in counts - widths and 2 * outputs <= value.shape[1]

    def _unclaimed(
        self,
        names: Iterable[tuple[str, tuple[int, ...] | None]],
        found: Mapping[str, Role],
        shapes: Mapping[str, tuple[int, ...] | None],
    ) -> dict[str, Role]:
        """Roles of modules that the loader leaves out: MTP layers are built like the layers of the model."""
        tails: dict[str, str] = {}  # what follows the number of a layer -> the module of the last layer that has it
        stacks: Counter[str] = Counter()
        for name, role in found.items():
            layer = re.match(r"^(.*?)\.(\d+)\.(.+)$", name)
            if layer and role.part == "text":
                tails[layer[3]] = name
                stacks[layer[1]] += 1
        stack = stacks.most_common(1)[0][0] if stacks else None
        members: dict[str, list[tuple[str, tuple[int, ...] | None, str | None]]] = {}
        for name, shape in names:
            beyond = re.match(rf"^{re.escape(stack)}\.(\d+)\.", name) if stack else None
            root = beyond[0] if beyond else name.partition(".")[0]
            words = name.split(".")
            tail = next((".".join(words[n:]) for n in range(1, len(words)) if ".".join(words[n:]) in tails), None)
            members.setdefault(root, []).append((name, shape, tails[tail] if tail else None))
        roles: dict[str, Role] = {}
        for inside in members.values():
            is_layer = any(like and found[like].kind == "linear" and shapes[like] == shape for _, shape, like in inside)
            for name, shape, like in inside:
                roles[name] = self._mtp(name, shape, like, found, shapes) if is_layer else Role("unused", "other", name)
        return roles

    def _mtp(
        self,
        name: str,
        shape: tuple[int, ...] | None,
        like: str | None,
        found: Mapping[str, Role],
        shapes: Mapping[str, tuple[int, ...] | None],
    ) -> Role:
        if like is not None and len(shape or ()) == len(shapes[like] or ()):
            fits = shapes[like] == shape
            return Role("mtp", found[like].kind, name, like if fits and found[like].kind == "linear" else None)
        if shape is None or len(shape) < 2:
            return Role("mtp", "vector", name)
        if self.embedding is not None and tuple(shape) == tuple(self.embedding.shape):
            return Role("mtp", "embedding", name)
        return Role("mtp", "projection", name)  # of the pair of states that enters; engines keep it as it is
