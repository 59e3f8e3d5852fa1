"""The inputs of every linear map of a layer, as Hessians X^T X, collected while the layer runs.

Nothing here knows architectures: every `torch.nn.functional.linear` call inside the layer is watched, and its weight
tells which checkpoint module it belongs to. Experts that transformers keeps fused in one 3-D parameter are told apart
by which slice of it the call reads, so each expert gets the Hessian of the tokens that the router really sent to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from recompile.checkpoint import split_name
from recompile.stream import LayeredModel


@dataclass
class InputStatistics:
    """What modules that read the same input share. `modules` are checkpoint names."""

    modules: list[str]
    hessian: Tensor | None = None  # [in, in] float32, sum over tokens of x x^T
    tokens: int = 0


@dataclass
class _Watched:
    """One weight that calls may read: the checkpoint modules that make it up."""

    modules: tuple[str, ...]


@dataclass
class InputCollector(TorchFunctionMode):
    """Context manager: inside it, linear calls of one loaded layer add to the Hessians of their inputs.

    groups: filled while running; modules that are always given the very same tensor (q, k, v; gate, up) share one entry
    """

    groups: list[InputStatistics] = field(default_factory=list)

    def __init__(self, model: LayeredModel, index: int) -> None:
        super().__init__()
        self.groups = []
        self._group_of: dict[str, InputStatistics] = {}
        self._whole: dict[int, _Watched] = {}  # address of a 2-D weight
        self._slices: dict[int, tuple[int, list[_Watched]]] = {}  # address of a 3-D one: bytes a slice, experts
        self._last: tuple[Tensor, InputStatistics] | None = None
        layer, prefix = model.layers[index], model.prefix_of_layer(index)
        for name, parameter in layer.named_parameters():
            origin = model.origins[f"{prefix}.{name}"]
            modules = [split_name(tensor)[0] for tensor in origin.tensors]
            if parameter.dim() == 2 and name.endswith("weight"):
                self._whole[parameter.data_ptr()] = _Watched(tuple(modules))
            elif parameter.dim() == 3 and origin.converter is not None and len(modules) % len(parameter) == 0:
                self._slices[parameter.data_ptr()] = (
                    parameter[0].numel() * parameter.element_size(),
                    _by_expert(modules, origin.patterns, len(parameter)),
                )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            watched = self._find(weight)
            if watched is not None:
                self._add(watched, args[0] if args else kwargs["input"])
        return func(*args, **kwargs)

    def _find(self, weight: Tensor) -> _Watched | None:
        address = weight.data_ptr()
        if address in self._whole:
            return self._whole[address]
        for start, (stride, experts) in self._slices.items():
            if start <= address < start + stride * len(experts) and weight.dim() == 2:
                return experts[(address - start) // stride]
        return None

    def _add(self, watched: _Watched, inputs: Tensor) -> None:
        leader = watched.modules[0]
        group = self._group_of.get(leader)
        if group is None:
            if self._last is not None and self._last[0] is inputs:
                group = self._last[1]
                group.modules += watched.modules
            else:
                group = InputStatistics(list(watched.modules))
                self.groups.append(group)
            for module in watched.modules:
                self._group_of[module] = group
        if self._last is not None and self._last[0] is inputs:
            self._last = (inputs, group)
            if group.modules[0] != leader:
                return
        self._last = (inputs, group)
        if group.modules[0] != leader:
            return
        x = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        group.tokens += len(x)
        if group.hessian is None:
            group.hessian = x.T @ x
        else:
            group.hessian.addmm_(x.T, x)


def _by_expert(modules: list[str], patterns: tuple[str | None, ...], experts: int) -> list[_Watched]:
    """Modules of each expert: a fused parameter lists, pattern by pattern, one tensor per expert."""
    by_pattern: dict[str | None, list[str]] = {}
    for module, pattern in zip(modules, patterns, strict=True):
        by_pattern.setdefault(pattern, []).append(module)
    return [_Watched(tuple(found[e] for found in by_pattern.values())) for e in range(experts)]
