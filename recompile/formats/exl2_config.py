"""EXL2 configs: what config.json must say after a merge, and which dense modules the engine reads. No torch.

The engine decides per module from the tensors alone (`q_weight` or `weight`), so that any mix of EXL2 layers loads; the
config is for people and for tools that dispatch on `quant_method`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from recompile.formats import FLOAT_DTYPES
from recompile.formats.mix_facts import MergedFile, MergeProblem, MixFacts
from recompile.formats.stored import StoredModule

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


# ---- what a merge asks -----------------------------------------------------------------------------------------------


def problems(mix: MixFacts) -> list[MergeProblem]:
    """What keeps the engine from loading the mix."""
    way_out = "take it from an EXL2 variant or from a float16 copy of the model, or write a decoded copy with {dense}"
    return [MergeProblem(dense_problems(mix.foreign_dense), way_out)]


def merged_files(mix: MixFacts) -> tuple[list[MergedFile], list[str]]:
    """The JSON files of the output, and warnings."""
    config = merged_config(
        mix.base_config,
        mix.inherited,
        bits=mix.bpw,
        head_bits=mix.head_bpw,
        head_is_dense=any(not mix.modules[name].is_quantized for name in mix.heads),
    )
    return [MergedFile("config.json", config)], []
