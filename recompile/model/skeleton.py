"""The transformers model of a config.json without its weights, and which checkpoint tensors make each of them."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from recompile.checkpoint.checkpoint import WeightSource, join_parts, no_table_of_names, split_name
from recompile.checkpoint.config_fields import architectures_of, check_config
from recompile.errors import CheckpointError, MissingWeight, UnsupportedError
from recompile.gguf.names import Joined
from recompile.model.fused_experts import ExpertStacks, stack_flat_experts
from recompile.model.joined import JoinConverter, patterned
from recompile.model.known_fields import taken
from recompile.model.known_types import TEXT_TABLES, check_makes_text, type_in, unknown_type
from recompile.model.own_forward import name_of

# Last parts of tensors that say how something is quantized, not what a weight is.
QUANTIZATION_PARTS = re.compile(r"(?:^|[._])(?:scale|scale_inv|zero_point|g_idx|[kvq]_scale|output_scale|input_scale)$")
# Tensors of GGUF files that hold what config.json says of rotary positions.
GGUF_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

LARGE = 2**26  # values of a parameter that is never made


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter a module registers goes to the meta device; buffers stay real.

    Building under `torch.device("meta")` would lose the values of buffers that no checkpoint holds. Parameters count as
    initialized for transformers.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
            vars(param)["_is_hf_initialized"] = True  # nothing is drawn for it: on this device that takes as long
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with _LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


class _LargeOnMeta(TorchFunctionMode):
    """Inside, what is about to be a large parameter is on the meta device from the start: all experts of a layer may be
    more than there is memory to promise."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None and "out" not in kwargs:
            sizes = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args
            if sizes and all(isinstance(size, int) for size in sizes) and math.prod(sizes) >= LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_skeleton(
    config: Mapping[str, Any], dtype: torch.dtype, device: torch.device, place: str = "config.json"
) -> Any:
    """The model, its parameters and persistent buffers on the meta device, other buffers real and on `device`.

    Raises UnsupportedError for what transformers has no causal model of, CheckpointError for a config it refuses."""
    from transformers.initialization import no_init_weights  # values take half of the time, and a checkpoint has them

    check_config(config, place)
    model_config = transformers_config(config, place)
    model_class = _model_class(config, model_config, place)
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    if model_class.config_class is model_config.sub_configs.get("text_config"):  # the class of the text alone
        model_config = model_config.get_text_config()
    try:
        with _parameters_on_meta(), no_init_weights():
            model = model_class._from_config(model_config, dtype=dtype)  # sdpa where it can, as from_pretrained
    except (ValueError, ImportError, KeyError, AttributeError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UnsupportedError(
            f"transformers cannot build a {model_class.__name__} from {place}: {one_line(error)}"
        ) from error
    finally:
        logger.setLevel(level)
    stack_flat_experts(model)
    stored = set(model.state_dict())
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                full = f"{prefix}.{name}" if prefix else name
                kept = full not in stored or _may_lack(model, full)
                module._buffers[name] = buffer.to(device if kept else "meta")
    return model.eval()


def one_line(error: Exception) -> str:
    """What an error says, without line ends, and no more than a message has room for."""
    return " ".join(str(error).split())[:300]


def _may_lack(model: Any, name: str) -> bool:
    """Whether transformers keeps a state's initial value where a checkpoint has none."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _model_class(config: Mapping[str, Any], model_config: Any, place: str) -> Any:
    """The class that config.json names where it is one that makes text, else what transformers takes for its type."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    model_type = model_config.model_type
    makes_text: list[str] = []
    for table in TEXT_TABLES:
        found = getattr(auto, table).get(model_type, ())
        makes_text += [found] if isinstance(found, str) else list(found)
    check_makes_text(model_type, bool(makes_text), bool(getattr(model_config, "is_encoder_decoder", False)), place)
    wanted = [name for name in architectures_of(config) if name in makes_text]
    for name in [*wanted, *makes_text]:
        model_class = getattr(transformers, name, None)
        if model_class is not None:
            return model_class
    raise UnsupportedError(f"{place}: this transformers has no class {makes_text[0]}; it cannot be run")


def transformers_config(config: Mapping[str, Any], place: str = "config.json") -> Any:
    """The transformers config object of a config.json, without its quantization.

    Raises CheckpointError if `model_type` is missing or unknown."""
    from transformers import CONFIG_MAPPING

    model_type = type_in(config)
    if model_type is None and "gguf_architecture" in config:
        raise UnsupportedError(f"{place}: {no_table_of_names(config['gguf_architecture'])}")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise unknown_type(model_type, place)
    config_class = CONFIG_MAPPING[model_type]
    kept = {key: _plain_floats(value) for key, value in taken(config, config_class, place).items()}
    kept["model_type"] = model_type
    try:
        return config_class.from_dict(kept)
    except Exception as error:  # its validators raise classes of their own, which derive from nothing narrower
        raise CheckpointError(f"{place}: not a valid {model_type} config: {one_line(error)}") from error


def _plain_floats(value: Any) -> Any:
    """transformers writes infinities and NaN as {"__float__": "Infinity"}, for JSON has none."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain_floats(item) for key, item in value.items()}
    return [_plain_floats(item) for item in value] if isinstance(value, list) else value


# ---- where the layers are --------------------------------------------------------------------------------------------


def find_stack(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers of the text model: of the lists that are in no other one, the outermost that is as long as the
    text's config says, or the one with most weights where none is.

    Raises UnsupportedError where there is none."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        decoder = model
    for root in (decoder, model):
        found: list[tuple[bool, int, int, str, nn.ModuleList]] = []
        inside: list[str] = []
        start = name_of(model, root) if isinstance(root, nn.Module) else ""
        for name, module in model.get_submodule(start).named_modules(prefix=start):
            if any(name.startswith(outer) for outer in inside):
                continue
            if isinstance(module, nn.ModuleList) and len(module):
                inside.append(f"{name}.")
                fits, weights = len(module) == depth, sum(p.numel() for p in module.parameters())
                found.append((fits, -name.count(".") if fits else 0, weights, name, module))
        if found:
            *_, name, layers = max(found, key=lambda entry: entry[:3])
            return name, layers
    raise UnsupportedError(f"{type(model).__name__} has no list of layers that can be streamed")


def find_runner(model: Any, stack_name: str) -> Any:
    """The innermost model that holds the layers and a head: what turns token ids into logits."""
    from transformers import PreTrainedModel

    found = None
    for name, module in model.named_modules():
        if (name and not stack_name.startswith(f"{name}.")) or not isinstance(module, PreTrainedModel):
            continue
        head = module.get_output_embeddings()
        if head is not None and any(head is inner for inner in module.modules()):
            found = module
    if found is None:
        raise UnsupportedError(f"{type(model).__name__} has no output head that makes logits; it cannot be run")
    return found


# ---- which tensors make what -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """How one parameter or buffer is made: the checkpoint tensors it needs and transformers' converter, if any.

    made_as: the name under which the converter is asked; it may make several parameters of the same tensors
    """

    tensors: tuple[str, ...]
    patterns: tuple[str | None, ...]
    converter: Any = None
    made_as: str = ""


def find_origins(model: Any, source: WeightSource) -> tuple[dict[str, Origin], list[tuple[str, str]]]:
    """For every parameter and persistent buffer of the model the checkpoint tensors that make it, by transformers' own
    name mapping; and the tensors that make none, each with the name that the mapping gives it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    experts = ExpertStacks(model)
    collected: dict[str, list[tuple[str, str | None]]] = {}
    left: list[tuple[str, str]] = []
    for tensor in sorted(dense_names(source), key=dot_natural_key):
        renamed, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and tensor in state:
            renamed, pattern = rename_source_key(tensor, [], [], model.base_model_prefix, state)
        if renamed in state:
            collected.setdefault(renamed, []).append((tensor, pattern))
        elif (place := experts.place(tensor, renamed)) is not None:
            collected.setdefault(place[0], []).append((tensor, place[1]))
        else:
            left.append((tensor, renamed))
    tied = getattr(model, "all_tied_weights_keys", {}) or {}
    origins: dict[str, Origin] = {}
    for name, found in collected.items():
        tensors, patterns = zip(*found, strict=True)
        converter = experts.converter(name) or (by_pattern[patterns[0]] if patterns[0] is not None else None)
        targets = [name]
        if converter is not None and len(converter.target_patterns) > 1:
            first = converter.target_patterns[0]
            targets = [name.replace(first, target) for target in converter.target_patterns]
        made = Origin(tensors, patterns, converter, name)
        if any(tensor in _joined(source) for tensor in tensors):
            made = _joined_origin(source, name, found, converter)
        for target in targets:
            if target in state:
                origins[target] = made
    for name, same_as in tied.items():
        if name not in origins and same_as in origins:
            origins[name] = origins[same_as]
        elif same_as not in origins and name in origins:
            origins[same_as] = origins[name]
    return origins, left


def check_nothing_left(
    model: Any,
    stack_name: str,
    depth: int,
    source: WeightSource,
    left: list[tuple[str, str]],
    origins: Mapping[str, Origin],
) -> None:
    """Raise MissingWeight for a tensor of the text model that no part of it reads, with the weight that it may be.

    Not meant: layers of multi-token prediction, which lie beyond the last one; buffers that are computed; what
    transformers itself says that it leaves out; parts of a multimodal model that the class does not have."""
    computed = {name for name, _ in model.named_buffers()}
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", r"(^|\.)mtp(\.|_)"]
    beyond = re.compile(rf"(?:{re.escape(stack_name)}|(?:^|.*\.)layers)\.(\d+)\.")
    text = model.config.get_text_config()
    others = text is not model.config or any(key.endswith("_config") for key in source.config)
    unread = []
    for tensor, renamed in left:
        if tensor in computed or renamed in computed or tensor in GGUF_ROTARY:
            continue
        if any(re.search(pattern, name) for pattern in patterns for name in (tensor, renamed)):
            continue
        if QUANTIZATION_PARTS.search(tensor):
            continue
        number = beyond.match(renamed)
        if number and int(number[1]) >= depth:
            continue
        if others and not renamed.startswith(stack_name.rpartition(".")[0] + "."):
            continue
        unread.append(tensor)
    if unread:
        found = (name for name, _ in model.named_parameters() if name.startswith(f"{stack_name}."))
        missing = next((name for name in found if name not in origins), None)
        raise MissingWeight(
            f"{_file_of(source, unread[0])}: {type(model).__name__} reads {unread[0]} nowhere"
            + (f", nor {len(unread) - 1} other tensors" if len(unread) > 1 else "")
            + (f", and finds no {missing}" if missing is not None else "")
            + "; it does not belong to the model of config.json, or this transformers does not know it"
        )


def _file_of(source: WeightSource, tensor: str) -> str:
    """The file that a dense value is read from, the first of several; the source where that is not known."""
    module = module_of(source, tensor)
    for holder in (source, getattr(source, "base", None)):  # an overlay has its files in its parts
        stored = getattr(holder, "tensors", {})
        info = stored.get(tensor) or next((it for name, it in stored.items() if split_name(name)[0] == module), None)
        if info is not None and getattr(info, "path", None) is not None:
            return str(info.path)
    return str(getattr(source, "label", "the checkpoint"))


def _joined(source: WeightSource) -> Mapping[str, Joined]:
    """The tensors that a source keeps in parts; only GGUF files do."""
    return getattr(source, "joined", {})


def _joined_origin(source: Any, name: str, found: list[tuple[str, str | None]], converter: Any) -> Origin:
    """The origin of a parameter made of tensors that a GGUF file keeps in parts: the parts."""
    wholes, parts = {}, []
    for tensor, pattern in found:
        whole = source.joined[tensor]
        wholes[tensor] = (partial(join_parts, whole, heads=source.heads), pattern)
        parts += patterned(whole)
    tensors, patterns = zip(*parts, strict=True)
    return Origin(tensors, patterns, JoinConverter(wholes, converter), name)


def dense_names(source: WeightSource) -> list[str]:
    """Names of all dense values that a source can give: `<module>.weight` for quantized modules, else the tensors; of
    tensors that it keeps in parts, the whole."""
    whole = _joined(source)
    parts = {name for joined in whole.values() for names in joined.parts for name in names}
    return [name for name in _stored_names(source) if name not in parts] + list(whole)


def _stored_names(source: WeightSource) -> list[str]:
    names = []
    for module in source.modules.values():
        if module.is_quantized:
            names.append(module.dense_name)
            names += [f"{module.name}.bias"] if "bias" in module.parts else []
        else:
            names += [info.name for info in module.parts.values()]
    return names


def module_of(source: WeightSource, tensor: str) -> str:
    """The checkpoint module that a tensor is a part of: itself for a parameter with a name of its own."""
    return tensor if tensor in source.modules else split_name(tensor)[0]
