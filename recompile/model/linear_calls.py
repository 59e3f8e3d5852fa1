"""Linear maps of a running layer, whatever function the model calls for them, as calls of `linear`.

`x @ w`, `torch.bmm` over all experts and the `addmm` of Conv1D are the same map with the weight transposed; watchers
see all of them as `linear(x, w.T)`, whose weight shares its memory with the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from recompile.model.stream import LinearWeights

_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
_BATCHES = (torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class LinearMode(TorchFunctionMode):
    """Context manager: inside it, every linear map by a known weight of one layer runs through `linear`."""

    def __init__(self, weights: LinearWeights) -> None:
        super().__init__()
        self.weights = weights

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in], weight [out, in] -> [..., out]."""
        return nn.functional.linear(x, weight, bias)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.linear:
            return self.linear(*args, **kwargs)
        if func is torch.addmm and len(args) == 3 and not kwargs and self.weights.find(args[2]) is not None:
            return self.linear(args[1], args[2].T, args[0])
        if len(args) == 2 and not kwargs and isinstance(args[1], Tensor):
            x, weight = args
            if func in _PRODUCTS and weight.dim() == 2 and self.weights.find(weight) is not None:
                return self.linear(x, weight.T)
            if func in _BATCHES and weight.dim() == 3 and x.dim() == 3 and self.weights.holds(weight):
                return torch.stack([self.linear(one, matrix.T) for one, matrix in zip(x, weight, strict=True)])
        return func(*args, **kwargs)
