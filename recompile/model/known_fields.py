"""Which fields of a config.json transformers is given: those that its class for the model type declares or reads.

An allow-list. A config may name repositories and code that transformers would fetch, under names that change from
release to release; a list of such names is never whole. Nothing else is lost: outputs get the whole config.json."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from recompile.errors import CheckpointError
from recompile.io.schema import describe

# What PreTrainedConfig itself reads, and what any modeling file reads through shared code (rotary positions, layers
# that are not alike, sliding windows). https://huggingface.co/docs/transformers/main_classes/configuration
COMMON = frozenset(
    {
        "model_type",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
        "tie_word_embeddings",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "initializer_range",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "rotary_dim",
        "original_max_position_embeddings",
        "layer_types",
        "mtp_layer_types",
        "sliding_window",
        "per_layer_config",
        "text_config",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)
# Known or not: what chooses, fetches or runs code; and labels of classes, which may hold any text.
NEVER = re.compile(
    r"^_|implementation|kernel_config|kernels$|auto_map|trust_remote|custom_code|pretrained|name_or_path|repo_id|^hub_"
    r"|^(id2label|label2id|quantization_config|compression_config)$"
)
# How the code of a model asks for a field: config.NAME, getattr(config, "NAME"), kwargs.pop("NAME"), "NAME" in kwargs.
_READ = re.compile(
    r"\bconfig\.([A-Za-z]\w*)|\w*config\w*,\s*['\"]([A-Za-z]\w*)['\"]"
    r"|kwargs(?:\.\w+\(|\[)\s*['\"]([A-Za-z]\w*)['\"]|['\"]([A-Za-z]\w*)['\"] (?:not )?in kwargs"
)
# Paths and ids of repositories; a separator of words (" / ") is none.
_ELSEWHERE = re.compile(r"\S[/\\]|[/\\]\S")
_RATIO = re.compile(r"\d{1,3}/\d{1,3}")  # of two numbers: Granite 4 Vision's downsample_rate
_FLOATS = re.compile(r"(torch\.)?(bfloat16|float\d+\w*|half|double)")


@lru_cache(maxsize=128)
def known_fields(config_class: type) -> frozenset[str]:
    """The names that a configuration class declares, maps, or reads, and that the model's own code reads from it."""
    inner = getattr(config_class, "sub_configs", None) or {}
    names = set(COMMON) | set(inner)
    for declared in inner.values():  # older files have the fields of the text model beside those of the whole
        if _is_here(declared):
            names |= known_fields(declared)
    mapped = getattr(config_class, "attribute_map", {})
    names |= {*mapped, *mapped.values()}
    for base in inspect.getmro(config_class):
        names |= set(inspect.get_annotations(base))
        if "__init__" in vars(base):
            names |= set(inspect.signature(base).parameters) - {"args", "kwargs"}
        if base.__module__.startswith("transformers.models."):
            folder = Path(inspect.getfile(base)).parent
            for file in (*folder.glob("configuration_*.py"), *folder.glob("modeling_*.py")):
                for found in _READ.findall(file.read_text(encoding="utf-8")):
                    names |= set(filter(None, found))
    return frozenset(name for name in names if NEVER.search(name) is None)


def taken(config: Mapping[str, Any], config_class: type | None, place: str) -> dict[str, Any]:
    """The part of a config.json, or of a sub-config in it, that transformers is given.

    config_class: what transformers has for its model type; None for a type that it does not have
    place: the file, and the field for a sub-config, for messages
    Raises CheckpointError where a field that would be used is a path or the name of a repository.
    """
    known = COMMON if config_class is None else known_fields(config_class)
    inner = {} if config_class is None else getattr(config_class, "sub_configs", {}) or {}
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if key not in known:
            continue
        if key in ("dtype", "torch_dtype") and not (isinstance(value, str) and _FLOATS.fullmatch(value)):
            continue  # transformers takes any attribute of torch by this name
        if isinstance(value, Mapping) and (key in inner or key == "text_config"):
            kept[key] = taken(value, _inner_class(config_class, inner.get(key), key, value), f"{place}: {key}")
        elif key.endswith(("_rate", "_ratio")) and isinstance(value, str) and _RATIO.fullmatch(value):
            kept[key] = value
        else:
            kept[key] = _without_code(value, f"{place}: {key}")
    return kept


def _inner_class(owner: type | None, declared: Any, key: str, value: Mapping[str, Any]) -> type | None:
    """The class of a sub-config: the declared one, or by its model type where any is taken."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if isinstance(declared, type) and declared is not AutoConfig:
        found: Any = declared
    else:
        defaults = (getattr(owner, "sub_configs_defaults", None) or {}).get(key)
        model_type = value.get("model_type", getattr(defaults, "model_type", None))
        found = CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None
    return found if _is_here(found) else None


def _is_here(config_class: Any) -> bool:
    """Whether it is a class of fields: AutoConfig is none, nor what stands for a class whose library is missing."""
    from transformers import PreTrainedConfig

    return isinstance(config_class, type) and issubclass(config_class, PreTrainedConfig)


def _without_code(value: Any, place: str) -> Any:
    """A field's value; of mappings in it no entry that chooses code."""
    if isinstance(value, str) and _ELSEWHERE.search(value):
        raise CheckpointError(
            f"{place} is {describe(value)}, wanted no path and no name of a repository: nothing is fetched for a "
            "config.json"
        )
    if isinstance(value, Mapping):
        return {
            key: _without_code(item, f"{place}.{key}")
            for key, item in value.items()
            if key == "__float__" or NEVER.search(str(key)) is None
        }
    return [_without_code(item, place) for item in value] if isinstance(value, list) else value
