"""EXL2 configs: what config.json must say after a merge, and which dense modules the engine reads. No torch.

The engine decides per module from the tensors alone (`q_weight` or `weight`), so that any mix of EXL2 layers loads; the
config is for people and for tools that dispatch on `quant_method`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from recompile.formats import FLOAT_DTYPES

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import StoredModule

QUANT_METHOD = "exl2"
DENSE_DTYPE = "F16"  # of everything that is stored unquantized
DENSE_HEAD_BITS = 16


def merged_config(
    config: Mapping[str, Any],
    inherited: Mapping[str, Any],
    *,
    bits: float,
    head_bits: float | None,
    head_is_dense: bool,
) -> dict[str, Any]:
    """config.json of a merge whose quantized modules are EXL2.

    config:        the base's config.json
    inherited:     a quantization_config to carry version and calibration over from; {} is allowed
    bits:          measured bits per weight over the linears of the layers, scales and permutations included
    head_bits:     measured bits per weight of a stored head; None if no head of its own is stored
    head_is_dense: the stored head is a plain weight

    `tie_word_embeddings` stays as it was: converters leave it `true` beside a quantized head, and the engine takes the
    head's tensors first. Only a dense head would lose to a `true`, so it is set to false there.
    """
    merged = dict(config)
    carried = {key: value for key, value in inherited.items() if key not in ("bits", "head_bits", "quant_method")}
    merged["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        **carried,
        "bits": round(bits, 2),
        "head_bits": DENSE_HEAD_BITS if head_bits is None or head_is_dense else round(head_bits, 2),
    }
    if head_is_dense and merged.get("tie_word_embeddings"):
        merged["tie_word_embeddings"] = False
    return merged


def dense_problems(modules: Iterable[StoredModule]) -> list[str]:
    """Dense modules that the engine would not read as they are: it wants float16.

    modules: dense modules that do not come from an EXL2 checkpoint (a converter's own vision towers may be bf16)
    """
    found = []
    for module in modules:
        for info in module.parts.values():
            if info.dtype in FLOAT_DTYPES and info.dtype != DENSE_DTYPE:
                found.append(f"{info.name} is {info.dtype}, and EXL2 engines read unquantized tensors as float16 only")
    return found
