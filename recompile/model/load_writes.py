"""What transformers writes over values that it has loaded.

from_pretrained runs a model's `_init_weights` once the checkpoint is loaded, for what the checkpoint lacks. The
functions of transformers.initialization leave loaded tensors alone; an assignment does not, whatever was stored: Zaya's
routers get -1 for their last balancing bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGEST = 1 << 24  # numbers of a tensor that is tried with values: all experts of a layer may stand beside a buffer


@dataclass(frozen=True)
class Written:
    """Of one tensor: where, and what. Both of the tensor's shape."""

    places: Tensor
    values: Tensor

    def over(self, value: Tensor) -> Tensor:
        """`value`, any shape, as transformers leaves it."""
        places, values = (held.to(value.device) for held in (self.places, self.values))
        return torch.where(places, values.to(value.dtype), value)


@torch.no_grad()
def written_while_loading(model: Any) -> dict[str, Written]:
    """Name of a stored buffer -> what is written into it. Tried with values that no model starts with; torch's
    generator is left where it was."""
    from transformers.initialization import guard_torch_init_functions

    stored = model.state_dict().keys()
    found: dict[str, Written] = {}
    with torch.random.fork_rng(devices=[]), guard_torch_init_functions():
        for name, module, starter in _with_starters(model):
            prefix = f"{name}." if name else ""
            there = {leaf: held for leaf, held in module._buffers.items() if held is not None}
            names = [leaf for leaf, held in there.items() if prefix + leaf in stored and held.numel() <= LARGEST]
            if names:
                found |= {prefix + leaf: written for leaf, written in _tried(module, starter, names).items()}
    return found


def _with_starters(model: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, the innermost model around it), which starts its weights."""
    from transformers import PreTrainedModel

    starters: dict[str, Any] = {}
    for name, module in model.named_modules():
        around = starters.get(name.rpartition(".")[0], model) if name else model
        starters[name] = module if isinstance(module, PreTrainedModel) else around
        yield name, module, starters[name]


def _tried(module: nn.Module, starter: Any, names: list[str]) -> Mapping[str, Written]:
    """What `starter` writes into those buffers of a module, all tensors of which count as loaded."""
    buffers, parameters = dict(module._buffers), dict(module._parameters)
    odd = {name: _odd(held) for name, held in (buffers | parameters).items() if held is not None}
    try:
        for name, held in odd.items():
            tensor: Any = held.clone() if name in buffers else nn.Parameter(held.clone(), requires_grad=False)
            tensor._is_hf_initialized = True
            (module._buffers if name in buffers else module._parameters)[name] = tensor
        starter._init_weights(module)
        after = {name: module._buffers[name] for name in names}
    finally:
        module._buffers.update(buffers)
        module._parameters.update(parameters)
    changed = {name: (value, value != odd[name]) for name, value in after.items() if value is not None}
    return {name: Written(places, value) for name, (value, places) in changed.items() if bool(places.any())}


def _odd(held: Tensor) -> Tensor:
    if held.numel() > LARGEST:
        return torch.empty(held.shape, dtype=held.dtype, device="meta")
    return torch.full(held.shape, 77.0, device="cpu").to(held.dtype)
