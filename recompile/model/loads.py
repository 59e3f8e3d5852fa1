"""Which quantized modules transformers' loader would not take, told by its own model and key mapping.

compressed-tensors packs modules of class Linear. Experts that the model fuses in one parameter are decoded and put
together while loading, where its key mapping collects them one by one; elsewhere their tensors are passed over and the
parameter keeps random values, with a load report only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from recompile.checkpoint.checkpoint import WeightSource
from recompile.errors import CheckpointError, UnsupportedError
from recompile.model.roles import loader_model


def left_out_by_transformers(source: WeightSource) -> list[tuple[str, str]]:
    """(module, why) of the modules that transformers with compressed-tensors leaves out or stops at; none where it does
    not know the architecture at all."""
    from transformers import __version__

    fates = _fates(source)
    return [(name, f"transformers {__version__} {fate}") for name, fate in fates if fate and fate != _FUSED]


def fused_by_transformers(source: WeightSource) -> list[str]:
    """The quantized modules that transformers decodes and puts together while loading. They stay in the dtype of their
    scales (bfloat16, mostly) then, whatever dtype the model is loaded in, and are multiplied in it."""
    return [name for name, fate in _fates(source) if fate == _FUSED]


_FUSED = "fused"


def _fates(source: WeightSource) -> Iterator[tuple[str, str | None]]:
    """(module, what keeps it from being loaded) of a checkpoint's modules; _FUSED for those that are loaded as a part
    of a fused parameter, None for the others."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    try:
        model = loader_model(json.dumps(config, sort_keys=True, default=str))
    except (CheckpointError, UnsupportedError):
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    state = model.state_dict(keep_vars=True)
    kinds: dict[str, str | None] = {}
    for name, module in source.modules.items():
        if not module.is_quantized and "weight" not in module.parts:
            continue
        kind = f"{re.sub(r'[0-9]+', '#', name)} {module.is_quantized}"
        if kind not in kinds and not module.is_quantized:
            _, pattern = rename_source_key(f"{name}.weight", renamings, converters, model.base_model_prefix, state)
            collected = pattern is not None and pattern.endswith(".weight")
            kinds[kind] = (
                "unpacks all that its key mapping puts together, and stops at what is dense" if collected else None
            )
        if kind not in kinds:
            target, pattern = rename_source_key(
                module.dense_name, renamings, converters, model.base_model_prefix, state
            )
            kinds[kind] = _why_not(model, target, pattern, kind)
        yield name, kinds[kind]


def _why_not(model: Any, target: str, pattern: str | None, kind: str) -> str | None:
    name, _, leaf = target.rpartition(".")
    try:
        owner = model.get_submodule(name)
    except AttributeError:
        owner = None
    if isinstance(owner, nn.Linear) and pattern is not None:
        return "takes it apart or puts it together while it loads, dense only; the weight stays random"
    if owner is not None and leaf in owner._parameters and pattern is not None:
        return _FUSED  # experts that the mapping collects
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if isinstance(owner, nn.Linear) and target in {*tied, *tied.values()}:
        return "gives it to several layers, and stops where such a one is packed"
    if isinstance(owner, nn.Linear):
        return None if _initializes(model, name) else "stops while it initializes a packed module of this kind"
    if type(owner).__name__ == "Conv1D":
        return "packs modules of class Linear, not Conv1D; the weight stays random"
    container = re.sub(r"\.\d+\.\w+$", "", name)
    try:
        block = model.get_submodule(container)
    except AttributeError:
        block = None
    if ".experts." in f".{kind}." and not isinstance(block, nn.ModuleList):
        if type(block).__name__ in _patched():
            return None
        return f"has no experts of their own in {type(model).__name__}; they stay random"
    return None  # MTP layers and what else it passes over on purpose


def _initializes(model: Any, name: str) -> bool:
    """Whether transformers' own start of weights copes with a linear module that has no `weight`, as a packed one. The
    innermost model that holds a module starts it."""
    words = name.split(".")
    around = [model.get_submodule(".".join(words[:count])) for count in range(len(words) + 1)]
    weight = around[-1]._parameters.pop("weight")
    starter = model
    try:
        with torch.no_grad():
            for module in around:
                starter = module if hasattr(module, "_init_weights") else starter
                starter._init_weights(module)
        return True
    except AttributeError:
        return False
    finally:
        around[-1]._parameters["weight"] = weight


def _patched() -> frozenset[str]:
    """Classes that transformers replaces by lists of experts before it loads packed ones."""
    from transformers.quantizers import base

    return frozenset(getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {}))
