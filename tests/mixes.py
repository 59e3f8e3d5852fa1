"""Tiny seeded builds of one llama in every format that can be mixed: dense, packed integers, EXL2, EXL3.

Encoders here are the plainest that work, so that tests of writing do not lean on those of quantizing. All take a
directory that does not exist yet and return it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from recompile.formats import exl2, exl3, packed_int
from recompile.merge.overlay import Overlay, build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 64, 4, 2, 96, 160
GROUP = 32


def config(layers: int = 3, tied: bool = False, **extra: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **extra,
    }


def weights(layers: int = 3, tied: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Dense float32 tensors by name."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    kv = HIDDEN // HEADS * KV_HEADS
    made = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        for name, size in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            made[f"{layer}.self_attn.{name}_proj.weight"] = draw(size, HIDDEN)
        made[f"{layer}.mlp.gate_proj.weight"] = draw(INTERMEDIATE, HIDDEN)
        made[f"{layer}.mlp.up_proj.weight"] = draw(INTERMEDIATE, HIDDEN)
        made[f"{layer}.mlp.down_proj.weight"] = draw(HIDDEN, INTERMEDIATE)
        made[f"{layer}.input_layernorm.weight"] = 1 + draw(HIDDEN)
        made[f"{layer}.post_attention_layernorm.weight"] = 1 + draw(HIDDEN)
    made["model.norm.weight"] = 1 + draw(HIDDEN)
    if not tied:
        made["lm_head.weight"] = draw(VOCAB, HIDDEN)
    return made


def linears(tensors: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in tensors if "_proj" in name]


def save(directory: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], file: str = "model") -> Path:
    directory.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / f"{file}.safetensors")
    (directory / "config.json").write_text(json.dumps(settings, indent=2))
    (directory / "generation_config.json").write_text('{"max_length": 20}')
    return directory


def dense(
    directory: Path, dtype: torch.dtype = torch.bfloat16, layers: int = 3, tied: bool = False, seed: int = 0
) -> Path:
    made = {name: value.to(dtype) for name, value in weights(layers, tied, seed).items()}
    return save(directory, made, config(layers, tied))


def packed(
    directory: Path,
    bits: int,
    *,
    symmetric: bool = True,
    group: int | None = GROUP,
    layers: int = 3,
    tied: bool = False,
    seed: int = 0,
    bias: bool = False,
    head: bool = False,
) -> Path:
    """compressed-tensors pack-quantized; `bias`: every down_proj gets one; `head`: lm_head is quantized too."""
    scheme = packed_int.IntScheme(bits, group, symmetric)
    made: dict[str, Tensor] = {}
    original = weights(layers, tied, seed)
    quantized = set(linears(original)) | ({"lm_head"} if head else set())
    for name, value in original.items():
        module = name.removesuffix(".weight")
        if module not in quantized:
            made[name] = value.bfloat16()
            continue
        made.update({f"{module}.{part}": tensor for part, tensor in pack(value, scheme).items()})
        if bias and module.endswith("down_proj"):
            made[f"{module}.bias"] = torch.full((value.shape[0],), 0.25, dtype=torch.bfloat16)
    body = {
        "targets": ["Linear"],
        "format": "pack-quantized",
        "weights": scheme.to_config(),
        "input_activations": None,
        "output_activations": None,
    }
    settings = config(layers, tied and not head)
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [] if head else ["lm_head"],
        "config_groups": {"group_0": body},
    }
    return save(directory, made, settings)


def pack(weight: Tensor, scheme: packed_int.IntScheme) -> dict[str, Tensor]:
    """Round to nearest, the widest value of a group at the end of the range."""
    out_features, in_features = weight.shape
    grouped = weight.view(out_features, -1, scheme.group_size or in_features)
    if scheme.symmetric:
        scale = grouped.abs().amax(-1) / ((2**scheme.bits - 1) / 2)
        zero = None
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = (high - low) / (2**scheme.bits - 1)
        zero = (scheme.code_min - low / scale).round().clamp(scheme.code_min, scheme.code_max)
    codes = (grouped / scale[..., None]).round() + (0 if zero is None else zero[..., None])
    codes = codes.clamp(scheme.code_min, scheme.code_max).view(out_features, in_features).to(torch.int32)
    return packed_int.pack(codes, scale, None if zero is None else zero.to(torch.int32), scheme)


def exl2_parts(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """One group over all rows and one scale for all, with the identity permutation; out_features padded to 32."""
    out_features, in_features = weight.shape
    padded = torch.zeros(in_features, -(-out_features // 32) * 32)
    padded[:, :out_features] = weight.t()
    half = 2 ** (bits - 1)
    largest = (weight.abs().max() / half).half().reshape(1)
    codes = torch.full((1, padded.shape[1]), 16, dtype=torch.uint8)
    scale = exl2.stored_scale(codes, largest).float()
    values = ((padded / scale).round() + half).clamp(0, 2 * half - 1).to(torch.uint8)
    return exl2.pack(values, codes, largest, [(bits, in_features)], torch.arange(in_features))


def as_exl2(directory: Path, bits: int, *, tied: bool = False, seed: int = 0) -> Path:
    """Head included, as converters do even for a tied one; a stale index beside it."""
    original = weights(tied=tied, seed=seed)
    original.setdefault("lm_head.weight", original["model.embed_tokens.weight"])
    made: dict[str, Tensor] = {}
    for name, value in original.items():
        module = name.removesuffix(".weight")
        if "_proj" in name or module == "lm_head":
            made.update({f"{module}.{part}": tensor for part, tensor in exl2_parts(value, bits).items()})
        else:
            made[name] = value.half()
    settings = config(tied=tied)
    settings["quantization_config"] = {
        "quant_method": "exl2",
        "version": "0.3.2",
        "bits": float(bits),
        "head_bits": bits,
        "calibration": {"rows": 1, "length": 2, "dataset": "(default)"},
    }
    save(directory, made, settings, "output")
    stale = {"metadata": {}, "weight_map": {"model.norm.weight": "gone.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(stale))
    return directory


def exl3_parts(shape: tuple[int, ...], bits: float, codebook: str = "3inst", seed: int = 0) -> dict[str, Tensor]:
    """A legal linear of random weights: every trellis is one. shape: (out, in) without padding."""
    out_features, in_features = (-(-size // 128) * 128 for size in shape)
    generator = torch.Generator().manual_seed(seed)
    trellis = torch.randint(
        -(2**15), 2**15, (in_features // 16, out_features // 16, int(16 * bits)), generator=generator
    )
    parts = {
        "trellis": trellis.to(torch.int16),
        "suh": torch.full((in_features,), 0.25, dtype=torch.float16),
        "svh": torch.full((out_features,), 0.25, dtype=torch.float16),
    }
    if codebook != "3inst":
        value = exl3.MARKERS[codebook]
        parts[codebook] = torch.tensor(value - (1 << 32), dtype=torch.int32)
    return parts


def as_exl3(directory: Path, bits: float, codebook: str = "3inst", *, tied: bool = False, seed: int = 0) -> Path:
    made: dict[str, Tensor] = {}
    original = weights(tied=tied)
    original.setdefault("lm_head.weight", original["model.embed_tokens.weight"])
    for number, (name, value) in enumerate(original.items()):
        module = name.removesuffix(".weight")
        if "_proj" in name or module == "lm_head":
            parts = exl3_parts(tuple(value.shape), bits, codebook, seed * 1000 + number)
            made.update({f"{module}.{part}": tensor for part, tensor in parts.items()})
        else:
            made[name] = value.bfloat16()
    settings = config(tied=tied)
    settings["quantization_config"] = {
        "quant_method": "exl3",
        "version": "1.6.5",
        "bits": bits,
        "head_bits": bits,
        "codebook": codebook,
    }
    return save(directory, made, settings)


def recipe(file: Path, taken: Mapping[str, Path | str]) -> Path:
    """An override file: {key: directory}; later directories win, as they are named later."""
    directories = list(dict.fromkeys(str(directory) for directory in taken.values()))
    lines = ["sources:"] + [f"  - {{id: {number}, model_dir: {name}}}" for number, name in enumerate(directories)]
    lines += ["overrides:"] if taken else ["overrides: []"]
    lines += [f'  - {{key: "{key}", source: {directories.index(str(name))}}}' for key, name in taken.items()]
    if not directories:
        lines[0] = "sources: []"
    file.write_text("\n".join(lines) + "\n")
    return file


def overlay_of(base: Path, recipe: Path | None = None) -> Overlay:
    return build_overlay(open_checkpoint(base), recipe)


def written(overlay: Overlay, out: Path, shard_mb: int = 8192, **options: Any) -> Checkpoint:
    for _ in execute(plan_write(overlay, out, shard_mb, **options)):
        pass
    return open_checkpoint(out)


def raw(info: TensorInfo) -> bytes:
    with info.path.open("rb") as file:
        file.seek(info.offset)
        return file.read(info.size_bytes)


def bytes_of(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor: dtype, shape and bytes."""
    return {name: (i.dtype, i.shape, raw(i)) for name, i in open_checkpoint(directory).tensors.items()}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
