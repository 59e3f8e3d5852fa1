"""Where what healing moves sits in the parameters of a loaded layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.model.skeleton import module_of
from recompile.model.stream import LayeredModel
from recompile.quantize.movable import Movable


@dataclass(frozen=True)
class Whole:
    """A stored weight of which a parameter is some rows: transformers takes it apart while it loads.

    rows: how many it has; place: int64 [its rows], which of them the parameter's are
    """

    rows: int
    place: Tensor

    def filled(self, value: Tensor) -> Tensor:
        """The rows of a parameter [its rows, ...] where they are in the whole, zeros elsewhere: [rows, ...]."""
        found = value.new_zeros(self.rows, *value.shape[1:])
        found[self.place] = value
        return found


@dataclass(frozen=True)
class Place:
    """Where movables sit: a parameter of the layer (name within it), one expert of it, some of its rows.

    turned: the parameter, or an expert's slice of it, is [in, out] where its movables want [out, in]
    """

    parameter: str
    expert: int | None
    rows: slice | None
    tensors: tuple[str, ...] = ()
    whole: Whole | None = None
    turned: bool = False

    def of(self, value: Tensor) -> Tensor:
        """Its part of the parameter or of a gradient of it: a weight, turned where that is asked for, or a vector."""
        if self.expert is not None:
            value = value[self.expert]
        if self.turned:
            value = value.T
        if self.rows is not None:
            value = value[self.rows]
        return value if self.whole is None else self.whole.filled(value)


class RowNumbers:
    """A weight source whose one weight [rows, columns] has its row's number everywhere. Implements WeightSource."""

    config: Mapping[str, Any] = {}
    modules: Mapping[str, Any] = {}
    label = "row numbers"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def has(self, tensor: str) -> bool:
        return True

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        return torch.arange(self.shape[0], device=device, dtype=torch.float32)[:, None].expand(self.shape)


def whole_of(model: LayeredModel, parameter: str, shape: tuple[int, ...]) -> Whole | None:
    """What of a stored weight a parameter is; None where it is all of it."""
    origin = model.origins[parameter]
    if origin.converter is None or len(origin.tensors) != 1 or model.shapes[parameter][0] == shape[0]:
        return None
    numbers = model.load_parameter(parameter, RowNumbers(shape))
    return Whole(shape[0], numbers[:, 0].long())


def holder_of(tensor: str) -> str:
    """The module that a movable belongs to, by its key."""
    return tensor.rpartition(".")[0]


def moved_by_text(model: LayeredModel, movables: Mapping[str, Movable]) -> dict[str, Movable]:
    """Those that the text model reads: not what a tower for pictures or sound holds, a prediction of later tokens, or
    what transformers makes of several vectors."""
    inside = {name for index in range(model.depth) for name in _names_of_layer(model, index)}
    read = [model.origins[name] for name in {*inside, *_names_outside(model)} if name in model.origins]
    vectors = {origin.tensors[0] for origin in read if origin.converter is None}
    weights = {module_of(model.source, tensor) for origin in read for tensor in origin.tensors}
    return {
        key: movable
        for key, movable in movables.items()
        if (key in vectors if movable.is_vector else holder_of(key) in weights)
    }


def places_outside(model: LayeredModel, movables: Mapping[str, Movable]) -> list[Place]:
    """Where movables sit in what is read before the layers, after them and in the head, by full names of parameters."""
    scales: dict[str, list[str]] = {}
    for key, movable in movables.items():
        if not movable.is_vector:
            scales.setdefault(holder_of(key), []).append(key)
    found = []
    for name in _names_outside(model):
        origin = model.origins.get(name)
        if origin is None or len(origin.tensors) != 1:
            continue
        tensor = origin.tensors[0]
        module = module_of(model.source, tensor)
        if tensor in movables and movables[tensor].is_vector and origin.converter is None:
            found.append(Place(name, None, None, (tensor,)))
        elif module in scales and name.endswith("weight"):
            stored, keys = model.source.modules.get(module), scales[module]
            whole = whole_of(model, name, stored.shape) if stored is not None and stored.shape is not None else None
            turned = model.is_turned(module) and not movables[keys[0]].as_the_model
            found.append(Place(name, None, None, tuple(keys), whole, turned))
    return found


def _names_of_layer(model: LayeredModel, index: int) -> Iterable[str]:
    prefix = model.prefix_of_layer(index)
    return (f"{prefix}.{name}" for name, _ in model.layers[index].named_parameters())


def _names_outside(model: LayeredModel) -> list[str]:
    structure = model.structure
    return list(dict.fromkeys([*structure.before, *structure.after, *structure.head]))
