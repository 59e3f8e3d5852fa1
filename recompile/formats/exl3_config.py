"""EXL3 configs: config.json and quantization_config.json of a merge, and what the engine's fused kernels ask of
neighbours. Works on tensor headers alone; no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from recompile.formats import FLOAT_DTYPES
from recompile.formats.mix_facts import MergedFile, MergeProblem, MixFacts
from recompile.formats.stored import StoredModule

QUANT_METHOD = "exl3"
STORAGE_FILE = "quantization_config.json"
DENSE_HEAD_BITS = 16
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}  # part -> the one value it can have, as uint32
PAIRS = (("k_proj", "v_proj"), ("gate_proj", "up_proj"))  # run as one by the engine where shape and K are equal

_TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip


def is_linear(module: StoredModule) -> bool:
    """A trellis of rank 3; rank 2 is a quantized embedding."""
    return "trellis" in module.parts and len(module.parts["trellis"].shape) == 3


def bits_of(module: StoredModule) -> int | float:
    """K of a linear, codes only: the last dimension of its trellis / 16."""
    bits = module.parts["trellis"].shape[-1] / 16
    return int(bits) if bits == int(bits) else bits


def codebook_of(module: StoredModule) -> str:
    """ "mcg", "mul1", "3inst" (no marker), or "mcg+mul1" for a module that no engine reads the same way twice."""
    return "+".join(marker for marker in MARKERS if marker in module.parts) or "3inst"


# ---- config ----------------------------------------------------------------------------------------------------------


def merged_config(
    config: Mapping[str, Any],
    inherited: Mapping[str, Any],
    modules: Mapping[str, StoredModule],
    *,
    heads: Collection[str],
    embeddings: Collection[str],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, quantization_config.json) of a merge whose quantized modules are EXL3.

    config:     the base's config.json
    inherited:  a quantization_config to carry version and calibration over from; {} is allowed
    modules:    every module of the result
    heads, embeddings: names of the modules that count apart

    `bits` and `head_bits` are measured from storage over padded sizes, as the format's own tools do after a merge;
    `codebook` is left out where modules differ in it, since it is a label for the whole model.
    """
    linears = [m for m in modules.values() if m.name not in embeddings and _is_weight(m)]
    head = [m for m in linears if m.name in heads]
    body = [m for m in linears if m.name not in heads]
    own = ("quant_method", "bits", "head_bits", "codebook", "tensor_storage")
    quantization: dict[str, Any] = {
        "quant_method": QUANT_METHOD,
        **{key: value for key, value in inherited.items() if key not in own},
        "bits": round(_storage_bits(body), 2),
        "head_bits": _head_bits(head),
    }
    codebooks = {codebook_of(m) for m in linears if is_linear(m)}
    if len(codebooks) == 1:
        quantization["codebook"] = codebooks.pop()
    merged = {**config, "quantization_config": quantization}
    if head and merged.get("tie_word_embeddings"):
        merged["tie_word_embeddings"] = False  # loaders in the HF style would drop the stored head
    return merged, {**quantization, "tensor_storage": tensor_storage(modules)}


def _is_weight(module: StoredModule) -> bool:
    return is_linear(module) or (not module.is_quantized and module.shape is not None and len(module.shape) == 2)


def _storage_bits(modules: Iterable[StoredModule]) -> float:
    modules = list(modules)
    return sum(8 * m.size_bytes for m in modules) / max(1, sum(m.numel for m in modules))


def _head_bits(head: list[StoredModule]) -> float | int:
    return round(_storage_bits(head), 2) if head and all(is_linear(m) for m in head) else DENSE_HEAD_BITS


def tensor_storage(modules: Mapping[str, StoredModule]) -> dict[str, Any]:
    """The index of every leaf module's tensors that quantization_config.json holds; a plain copy of the headers."""
    storage: dict[str, Any] = {}
    for module in modules.values():
        key = module.name.rpartition(".")[0] if set(module.parts) == {""} else module.name  # a loose parameter's owner
        entry = storage.setdefault(key, {"stored_tensors": {}})
        for info in module.parts.values():
            entry["stored_tensors"][info.name] = {
                "shape": list(info.shape),
                "n_bytes": info.size_bytes,
                "dtype": f"torch.{_TORCH_DTYPES[info.dtype]}",
            }
        if is_linear(module):
            entry["quant_format"] = QUANT_METHOD
            entry["bits_per_weight"] = bits_of(module)
            for marker, value in MARKERS.items():
                if marker in module.parts:
                    entry[f"{marker}_multiplier"] = value
    return storage


# ---- what the engine asks of neighbours ------------------------------------------------------------------------------


def fusion_problems(modules: Mapping[str, StoredModule]) -> list[str]:
    """Why the engine would fail on, or misread, this set of modules; empty if it loads.

    Two markers on one module; two codebooks in a pair that the engine runs as one; experts of one projection in a layer
    that differ in K or codebook. Sign words (`su`) beside float scales (`suh`) are fine: each module decodes alone.
    """
    linears = {name: module for name, module in modules.items() if is_linear(module)}
    found = [
        f"{name} has both markers, .mcg and .mul1; engines decode it one way or the other by batch size"
        for name, module in linears.items()
        if "+" in codebook_of(module)
    ]
    for name, module in linears.items():
        for first, second in PAIRS:
            other = _sibling(name, first, second)
            partner = linears.get(other) if other else None
            if partner is None or partner.shape != module.shape or bits_of(partner) != bits_of(module):
                continue
            if codebook_of(partner) != codebook_of(module):
                found.append(
                    f"{name} has the {codebook_of(module)} codebook and {other} the {codebook_of(partner)} one at the "
                    f"same {bits_of(module)} bits; the engine runs the two as one and refuses that"
                )
    for (layer, projection), names in _expert_sets(linears).items():
        kinds = {f"{bits_of(linears[n])} bits, {codebook_of(linears[n])} codebook": n for n in reversed(names)}
        if len(kinds) > 1:
            listed = " against ".join(f"{name} ({kind})" for kind, name in reversed(kinds.items()))
            found.append(f"the experts' {projection} in {layer} differ: {listed}; the engine wants one kind for all")
    return found


def expert_warnings(modules: Mapping[str, StoredModule]) -> list[str]:
    """Expert sets that are quantized in part: they load, and run slowly."""
    found = []
    for (layer, projection), names in _expert_sets(modules).items():
        count = sum(is_linear(modules[name]) for name in names)
        if 0 < count < len(names):
            found.append(
                f"{count} of {len(names)} experts' {projection} in {layer} are EXL3 and the rest dense; "
                f"such layers run on the engine's slow path"
            )
    return found


def _sibling(name: str, first: str, second: str) -> str | None:
    parts = name.split(".")
    return ".".join(second if part == first else part for part in parts) if first in parts else None


def _expert_sets(modules: Mapping[str, StoredModule]) -> dict[tuple[str, str], list[str]]:
    """(layer, projection) -> the modules of all experts."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, module in modules.items():
        match = re.match(r"^(.+\.experts)\.\d+\.(.+)$", name)
        if match and module.shape is not None and len(module.shape) == 2:
            found.setdefault((match[1], match[2]), []).append(name)
    return found


def dense_problems(modules: Iterable[StoredModule], embeddings: Collection[str]) -> list[str]:
    """Dense modules that the engine would not read as they are.

    modules: dense modules that do not come from an EXL3 checkpoint. Norms and embeddings may be bf16 or float16;
             every other weight must be float16
    """
    found = []
    for module in modules:
        linear = module.shape is not None and len(module.shape) == 2 and module.name not in embeddings
        allowed = {"F16"} if linear else {"F16", "BF16"}
        for info in module.parts.values():
            if info.dtype in FLOAT_DTYPES and info.dtype not in allowed:
                wanted = "float16" if linear else "float16 or bfloat16"
                found.append(f"{info.name} is {info.dtype}, and EXL3 engines read it as {wanted} only")
    return found


# ---- what a merge asks -----------------------------------------------------------------------------------------------


def problems(mix: MixFacts) -> list[MergeProblem]:
    """What keeps the engine from loading the mix."""
    return [
        MergeProblem(
            dense_problems(mix.foreign_dense, mix.embeddings),
            "take it from an EXL3 variant or from a float16 copy of the model, or write a decoded copy with {dense}",
        ),
        MergeProblem(
            fusion_problems(mix.modules),
            "take such modules together from one source, or write a decoded copy with {dense}",
        ),
    ]


def merged_files(mix: MixFacts) -> tuple[list[MergedFile], list[str]]:
    """The JSON files of the output, and warnings."""
    config, storage = merged_config(mix.config, mix.inherited, mix.modules, heads=mix.heads, embeddings=mix.embeddings)
    files = [MergedFile("config.json", config), MergedFile(STORAGE_FILE, storage, indent=4)]
    return files, expert_warnings(mix.modules)
