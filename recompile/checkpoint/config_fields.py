"""The fields of config.json that size a model, checked before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recompile.errors import CheckpointError
from recompile.io.schema import describe

# Field -> the least and the most that it may be. Far above any model there is, and far below what hangs a builder.
COUNTS = {
    "num_hidden_layers": (1, 2000),
    "hidden_size": (1, 2**20),
    "intermediate_size": (0, 2**24),
    "moe_intermediate_size": (0, 2**24),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (1, 2**14),
    "head_dim": (0, 2**16),  # of latent attention the rotated part, which may be none (GLM-5-Next)
    "vocab_size": (1, 2**26),
    "num_experts": (0, 2**16),
    "num_local_experts": (0, 2**16),
    "n_routed_experts": (0, 2**16),
    "num_experts_per_tok": (0, 2**16),
    "max_position_embeddings": (1, 2**40),
}
MOST_WEIGHTS = 2**36  # of one matrix: hidden_size x vocab_size or intermediate_size
NUMBERS = {
    "rms_norm_eps": (0.0, 1.0),
    "layer_norm_eps": (0.0, 1.0),
    "layer_norm_epsilon": (0.0, 1.0),
    "norm_eps": (0.0, 1.0),
    "rope_theta": (1e-3, 1e30),
}


def config_place(label: str) -> str:
    """The file that a checkpoint's config comes from, for messages."""
    return label if label.endswith(".gguf") else f"{label}/config.json"


def check_config(config: Mapping[str, Any], place: str) -> None:
    """Raise CheckpointError for a size or a constant that no model has, naming file, field, found and wanted."""
    for where, values in (
        ("", config),
        *((f"{key}.", value) for key, value in config.items() if _is_config(key, value)),
    ):
        for field, (least, most) in COUNTS.items():
            for value in _each(values.get(field)):
                if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                    raise CheckpointError(
                        f"{place}: {where}{field} is {describe(value)}, wanted a whole number from {least} to {most}"
                    )
        for field, (low, high) in NUMBERS.items():
            for value in _each(values.get(field)):
                number = not isinstance(value, bool) and isinstance(value, (int, float))
                if not number or not math.isfinite(value) or not low <= value <= high:
                    raise CheckpointError(
                        f"{place}: {where}{field} is {describe(value)}, wanted a number from {low:g} to {high:g}"
                    )
        sizes = {name: values.get(name) for name in ("hidden_size", "vocab_size", "intermediate_size")}
        for name in ("vocab_size", "intermediate_size"):
            rows, columns = sizes[name], sizes["hidden_size"]
            if isinstance(rows, int) and isinstance(columns, int) and rows * columns > MOST_WEIGHTS:
                raise CheckpointError(
                    f"{place}: {where}hidden_size {columns} x {name} {rows} is a matrix of {rows * columns} weights, "
                    f"wanted at most {MOST_WEIGHTS}"
                )


def _is_config(key: str, value: Any) -> bool:
    return isinstance(value, Mapping) and str(key).endswith("_config") and key != "quantization_config"


def _each(value: Any) -> tuple[Any, ...]:
    """A field, or the fields of all layers where a model has a list of them; none where it is null."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def context_of(config: Mapping[str, Any]) -> int | None:
    """The tokens of the longest row that a model was made for; None where its config.json does not say."""
    nested = config.get("text_config")
    found = config.get("max_position_embeddings") or (
        nested.get("max_position_embeddings") if isinstance(nested, Mapping) else None
    )
    return found if isinstance(found, int) else None


def architectures_of(config: Mapping[str, Any]) -> list[str]:
    """The classes that a config.json names; none where it names no list of them."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
