"""How large the parts of a model are: what plans of memory count with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recompile.model.stream import LayeredModel

DECODING = 4  # of a parameter, so many times as float32: as stored, decoded, sliced; and that of the origin


@dataclass(frozen=True)
class LayerSizes:
    """What one layer is made of, in values: what plans of memory count with."""

    weights: int  # all parameters of a layer
    parameter: int  # the largest of them
    outputs: int  # outputs of its linear maps a token (routed experts: all that a row may reach)
    attention: int  # heads
    routed: bool

    @staticmethod
    def of(model: LayeredModel, index: int) -> LayerSizes:
        """Of a layer of a skeleton."""
        weights = largest = outputs = 0
        routed = False
        config = layer_config(model, index)
        active = int(getattr(config, "num_experts_per_tok", 1) or 1)
        for parameter in model.layers[index].parameters():
            weights += parameter.numel()
            largest = max(largest, parameter.numel())
            if parameter.dim() == 2:
                outputs += parameter.shape[0]
            elif parameter.dim() == 3:
                routed = True
                outputs += active * parameter.shape[1]
        return LayerSizes(weights, largest, outputs, int(getattr(config, "num_attention_heads", 1)), routed)


def layer_config(model: LayeredModel, index: int) -> Any:
    """Of a layer: where these differ in heads or windows, the configuration of the model refuses to say either."""
    text = getattr(model.model.config, "get_text_config", lambda: model.model.config)()
    each = getattr(text, "per_layer_config", None)
    return each[index] if each is not None and index < len(each) else text


def attention_widths(model: LayeredModel) -> tuple[int, int]:
    """Values of a token's queries, and of its keys (as many as its values), in the widest layer.

    Heads are those of the configuration; one without gets keys and values as wide as the hidden state."""
    found = []
    for index in range(model.depth):
        config = layer_config(model, index)
        queries = getattr(config, "num_attention_heads", None)
        heads, width = getattr(config, "num_key_value_heads", None) or queries, getattr(config, "head_dim", None)
        if isinstance(queries, int) and not isinstance(width, int):
            width = -(-model.hidden_size // queries)
        if isinstance(queries, int) and isinstance(width, int):
            found.append((queries * width, heads * width if isinstance(heads, int) else model.hidden_size))
        else:
            found.append((model.hidden_size, model.hidden_size))
    return max(queries for queries, _ in found), max(keys for _, keys in found)
