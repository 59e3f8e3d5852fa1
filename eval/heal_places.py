"""Where what healing moves sits in the parameters of a loaded layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.model.stream import LayeredModel


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
