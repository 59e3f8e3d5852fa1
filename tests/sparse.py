"""Checkpoints with the headers of large mixture-of-experts models and holes for data: what planning reads, and no more.

Attention, norms and names are DeepSeek-V3's; the weights are compressed-tensors `pack-quantized` of one width.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

HIDDEN, MOE, DENSE, VOCAB, GROUP = 7168, 2048, 18432, 129280, 64
DENSE_LAYERS = 3
ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (128 * 192, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (128 * 256, 512),
    "o_proj": (HIDDEN, 128 * 128),
}
BYTES = {"BF16": 2, "I32": 4, "I64": 8, "F32": 4}
Tensor = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, its bytes where they are no hole


def moe_checkpoint(directory: Path, layers: int, experts: int, bits: int, shard_bytes: int = 8 << 30) -> Path:
    """`layers` of which the first three are dense; 3 * experts + 8 modules in each of the others."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "format": "pack-quantized", "weights": weights}},
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in _tensors(layers, experts, bits):
        size = _size(tensor)
        if filled + size > shard_bytes and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    weight_map = {}
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / file, tensors)
        weight_map |= {name: file for name, *_ in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _tensors(layers: int, experts: int, bits: int) -> Iterator[Tensor]:
    def linear(module: str, rows: int, columns: int) -> Iterator[Tensor]:
        yield f"{module}.weight_packed", "I32", (rows, -(-columns * bits // 32)), b""
        yield f"{module}.weight_scale", "BF16", (rows, columns // GROUP), b""
        yield f"{module}.weight_shape", "I64", (2,), struct.pack("<qq", rows, columns)

    def mlp(parent: str, width: int) -> Iterator[Tensor]:
        yield from linear(f"{parent}.gate_proj", width, HIDDEN)
        yield from linear(f"{parent}.up_proj", width, HIDDEN)
        yield from linear(f"{parent}.down_proj", HIDDEN, width)

    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN), b""
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", "BF16", (HIDDEN,), b""
        for name, (rows, columns) in ATTENTION.items():
            yield from linear(f"{prefix}.self_attn.{name}", rows, columns)
        if layer < DENSE_LAYERS:
            yield from mlp(f"{prefix}.mlp", DENSE)
            continue
        yield f"{prefix}.mlp.gate.weight", "BF16", (experts, HIDDEN), b""
        for expert in range(experts):
            yield from mlp(f"{prefix}.mlp.experts.{expert}", MOE)
        yield from mlp(f"{prefix}.mlp.shared_experts", MOE)
    yield "model.norm.weight", "BF16", (HIDDEN,), b""
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN), b""


def _size(tensor: Tensor) -> int:
    _, dtype, shape, _ = tensor
    size = BYTES[dtype]
    for length in shape:
        size *= length
    return size


def _write_shard(path: Path, tensors: list[Tensor]) -> None:
    header, written, end = {}, [], 0
    for tensor in tensors:
        name, dtype, shape, data = tensor
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + _size(tensor)]}
        if data:
            written.append((end, data))
        end += _size(tensor)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for start, data in written:
            file.seek(8 + len(text) + start)
            file.write(data)
