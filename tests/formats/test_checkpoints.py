"""Whole checkpoints in every format that is only read: streamed logits are those of a dense model with equal weights.

The dense weights come from the codes that were packed, not from reading them back. 1e-4 of the logit range: both sides
run in float32 on equal weights but for the last bit of a product.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.formats.gptq import GptqScheme
from recompile.formats.packed_int import IntScheme, pack
from recompile.merge.check import check_checkpoint
from tests import tiny
from tests.formats.packers import pack_awq, pack_gptq

E4M3 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M3 = torch.tensor([m / 8 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(3) for m in range(8)])

Packed = tuple[dict[str, Tensor], Tensor]  # stored parts, the dense weight that they mean
Packer = Callable[[Tensor], Packed]


def groups_of(weight: Tensor, size: int) -> Tensor:
    return weight.unflatten(1, (-1, size))


def int8(strategy: str, symmetric: bool = True) -> Packer:
    def packer(weight: Tensor) -> Packed:
        rows = {"tensor": weight.reshape(1, 1, -1), "channel": weight[:, None], "group": groups_of(weight, 16)}[
            strategy
        ]
        low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
        if symmetric:
            scale, zero = torch.maximum(-low, high) / 127.5, torch.zeros_like(low)
        else:
            scale = (high - low) / 255
            zero = (-128 - low / scale).round().clamp(-128, 127)
        codes = (rows / scale + zero).round().clamp(-128, 127)
        shape = (1,) if strategy == "tensor" else (len(weight), -1)
        parts = {"weight": codes.reshape(weight.shape).to(torch.int8), "weight_scale": scale.reshape(shape)}
        if not symmetric:
            parts["weight_zero_point"] = zero.reshape(shape).to(torch.int8)
        return parts, ((codes - zero) * scale).reshape(weight.shape)

    return packer


def fp8(rows: int, columns: int, name: str = "weight_scale") -> Packer:
    """One scale for blocks of rows x columns, partial ones at the edges included; 0: all of them."""

    def packer(weight: Tensor) -> Packed:
        bh, bw = rows or weight.shape[0], columns or weight.shape[1]
        count = (math.ceil(weight.shape[0] / bh), math.ceil(weight.shape[1] / bw))
        scale, codes, dense = torch.empty(count), torch.empty(weight.shape), torch.empty(weight.shape)
        for r in range(count[0]):
            for c in range(count[1]):
                at = (slice(r * bh, (r + 1) * bh), slice(c * bw, (c + 1) * bw))
                scale[r, c] = weight[at].abs().max() / 448
                codes[at] = (weight[at] / scale[r, c]).to(E4M3).float()
                dense[at] = codes[at] * scale[r, c]
        return {"weight": codes.to(E4M3), name: scale.reshape(1) if count == (1, 1) and not rows else scale}, dense

    return packer


def nearest(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(codes with a sign bit above the table's, values) of the nearest in a table of magnitudes."""
    magnitude = (values.abs()[..., None] - table).abs().argmin(-1)
    return magnitude + len(table) * (values < 0), torch.where(values < 0, -table[magnitude], table[magnitude])


def pack_bytes(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the even column low."""
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)


def nvfp4(weight: Tensor) -> Packed:
    rows = groups_of(weight, 16)
    whole = 448 * 6 / weight.abs().max()
    scale = (rows.abs().amax(-1, keepdim=True) * whole / 6).to(E4M3)
    step = scale.float() / whole
    codes, values = nearest(rows / step, E2M1)
    parts = {"weight_packed": pack_bytes(codes.flatten(1)), "weight_scale": scale.squeeze(-1)}
    return parts | {"weight_global_scale": whole.reshape(1)}, (values * step).flatten(1)


def modelopt_nvfp4(weight: Tensor) -> Packed:
    parts, dense = nvfp4(weight)
    scale = 1 / parts["weight_global_scale"].reshape(())
    return {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"], "weight_scale_2": scale}, dense


def mx(bits: int) -> Packer:
    def packer(weight: Tensor) -> Packed:
        rows = groups_of(weight, 32)
        exponent = rows.abs().amax(-1, keepdim=True).log2().floor() - {4: 2, 6: 2, 8: 8}[bits]
        scaled = rows / 2.0**exponent
        stored = (exponent.squeeze(-1) + 127).to(torch.uint8)
        if bits == 8:
            codes = scaled.clamp(-448, 448).to(E4M3)
            return {"weight": codes.flatten(1), "weight_scale": stored}, (codes.float() * 2.0**exponent).flatten(1)
        numbers, values = nearest(scaled, E2M1 if bits == 4 else E2M3)
        numbers = numbers.flatten(1)
        if bits == 4:
            packed = pack_bytes(numbers)
        else:
            words = sum(numbers[:, k::4] << (6 * k) for k in range(4))
            packed = torch.stack([words >> shift & 255 for shift in (0, 8, 16)], -1).flatten(1).to(torch.uint8)
        return {"weight_packed": packed, "weight_scale": stored}, (values * 2.0**exponent).flatten(1)

    return packer


def integers(weight: Tensor, bits: int, groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes [O, I], true zeros and scales [O, NG] for columns in `groups`; float16 scales."""
    count, top = int(groups.max()) + 1, (1 << bits) - 1
    zeros, scales = torch.empty(len(weight), count), torch.empty(len(weight), count)
    for group in range(count):
        columns = weight[:, groups == group]
        low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
        if symmetric:
            scales[:, group] = torch.maximum(-low, high) * 2 / top
        else:
            scales[:, group] = (high - low) / top
        scales = scales.half().float()
        zeros[:, group] = (1 << (bits - 1)) if symmetric else (-low / scales[:, group]).round().clamp(1, top)
    codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(0, top)
    return codes.long(), zeros.long(), scales


def gptq(bits: int, size: int, symmetric: bool, layout: str = "gptq", order: str | None = "trivial") -> Packer:
    def packer(weight: Tensor) -> Packed:
        width = weight.shape[1]
        groups = torch.arange(width) // (width if size == -1 else size)
        if order == "scattered":
            groups = groups[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
        codes, zeros, scales = integers(weight, bits, groups, symmetric)
        scheme = GptqScheme(bits, None if size == -1 else size, symmetric, layout)
        parts = pack_gptq(codes, zeros, scales.half(), scheme, groups if order else None)
        return parts, (codes - zeros[:, groups]) * scales[:, groups]

    return packer


def awq(weight: Tensor) -> Packed:
    groups = torch.arange(weight.shape[1]) // 32
    codes, zeros, scales = integers(weight, 4, groups, False)
    return pack_awq(codes, zeros, scales), (codes - zeros[:, groups]) * scales[:, groups]


def packed_with_g_idx(weight: Tensor) -> Packed:
    groups = torch.arange(weight.shape[1]).flip(0) % (weight.shape[1] // 16)
    codes, zeros, scales = integers(weight, 4, groups, False)
    parts = pack(codes - 8, scales, zeros - 8, IntScheme(4, 16, False), torch.float32)
    return parts | {"weight_g_idx": groups.int()}, (codes - zeros[:, groups]) * scales[:, groups]


def compressed(format: str | None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 8, "symmetric": True, **weights}}
    groups = {"group_0": group | ({"format": format} if format else {})}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", "config_groups": groups}


FLOAT: dict[str, Any] = {"type": "float"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
CASES: dict[str, tuple[Packer, dict[str, Any]]] = {
    "int8-tensor": (int8("tensor"), compressed("int-quantized", strategy="tensor")),
    "int8-channel, naive": (int8("channel"), compressed("naive-quantized", strategy="channel")),
    "int8-channel, no format": (int8("channel"), compressed(None, strategy="channel")),
    "int8-channel, asymmetric": (
        int8("channel", False),
        compressed("int-quantized", strategy="channel", symmetric=False),
    ),
    "int8-group, asymmetric": (
        int8("group", False),
        compressed("int-quantized", strategy="group", group_size=16, symmetric=False),
    ),
    "fp8-tensor": (fp8(0, 0), compressed("float-quantized", strategy="tensor", **FLOAT)),
    "fp8-channel, naive": (fp8(1, 0), compressed("naive-quantized", strategy="channel", **FLOAT)),
    "fp8-block": (fp8(48, 40), compressed("float-quantized", strategy="block", block_structure=[48, 40], **FLOAT)),
    "fp8-deepseek": (fp8(48, 40, "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [48, 40]}),
    "nvfp4": (
        nvfp4,
        compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16, **FLOAT),
    ),
    "nvfp4-modelopt": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    **{
        f"mxfp{bits}": (mx(bits), compressed(name, num_bits=bits, strategy="group", group_size=32, **FLOAT))
        for bits, name in ((4, "mxfp4-pack-quantized"), (6, "mxfp6-pack-quantized"), (8, "mxfp8-quantized"))
    },
    "pack-quantized, g_idx": (
        packed_with_g_idx,
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False, actorder="group"),
    ),
    "gptq": (gptq(4, 32, True), GPTQ),
    "gptq, no g_idx": (gptq(8, 32, True, order=None), GPTQ | {"bits": 8}),
    "gptq, asymmetric v1, 3 bits": (gptq(3, 32, False), GPTQ | {"bits": 3, "sym": False}),
    "gptq, asymmetric v2, 2 bits": (
        gptq(2, 32, False, "gptq_v2"),
        GPTQ | {"bits": 2, "sym": False, "checkpoint_format": "gptq_v2"},
    ),
    "gptq, planes, 5 bits": (gptq(5, 32, False, "gptq_p"), GPTQ | {"bits": 5, "sym": False, "format": "gptq_p"}),
    "gptq, activation order": (
        gptq(4, 16, False, order="scattered"),
        GPTQ | {"group_size": 16, "sym": False, "desc_act": True},
    ),
    "gptq, whole columns": (gptq(4, -1, True), GPTQ | {"group_size": -1}),
    "auto-round": (
        gptq(4, 32, False, "gptq_v2", None),
        GPTQ | {"quant_method": "auto-round", "packing_format": "auto_round", "sym": False},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
}


def streamed_logits(directory: Path, ids: Tensor) -> Tensor:
    return tiny.streamed_logits(open_checkpoint(directory), ids, len(ids))


def write_pair(
    base: Path, folder: Path, packers: Callable[[str], Packer | None], quantization: dict[str, Any]
) -> tuple[Path, Path]:
    """(packed, dense) directories of one model; `packers` says how a module is packed, None keeps it dense."""
    config = json.loads((base / "config.json").read_text())
    packed: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, value in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        packer = packers(module) if name.endswith("_proj.weight") else None
        if packer is None:
            packed[name] = dense[name] = value.float()
            continue
        parts, dense[name] = packer(value.float())
        packed |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    return (
        write(folder / "packed", packed, config | {"quantization_config": quantization}),
        write(folder / "dense", dense, config | {"dtype": "float32"}),
    )


def write(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def check_equal(packed: Path, dense: Path) -> Tensor:
    ids = tiny.rows(2, 12)
    wanted = tiny.plain_logits(tiny.plain_model(dense), ids)
    found = streamed_logits(packed, ids)
    span = float(wanted.max() - wanted.min())
    assert span > 1, "a model that predicts nothing would pass anything"
    assert float((found - wanted).abs().max()) < 1e-4 * span
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_dense_weights(name: str, tmp_path: Path) -> None:
    packer, quantization = CASES[name]
    base = tiny.base("llama-2")
    packed, dense = write_pair(base, tmp_path, lambda module: packer, quantization)
    checkpoint = open_checkpoint(packed)
    assert sum(module.is_quantized for module in checkpoint.modules.values()) == 14
    found = check_equal(packed, dense)
    original = streamed_logits(base, tiny.rows(2, 12))
    assert float((found - original).abs().max()) > 1e-3, "the packed weights are other weights"


def test_planned_shapes_are_those_of_the_weights(tmp_path: Path) -> None:
    """From headers, before anything is decoded; bits are the bytes on disk."""
    for number, (packer, quantization) in enumerate(CASES.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        packed, dense = write_pair(tiny.base("llama-2"), folder, lambda module, p=packer: p, quantization)
        wanted = open_checkpoint(dense).modules
        group = quantization.get("config_groups", {}).get("group_0", {})
        named = {group["format"]} if group.get("format", "naive-quantized") != "naive-quantized" else set()
        assert named <= set(open_checkpoint(packed).formats)
        for name, module in open_checkpoint(packed).modules.items():
            assert module.shape == wanted[name].shape
            stored = sum(info.size_bytes for info in module.parts.values())
            assert module.bits_per_weight == 8 * stored / math.prod(wanted[name].shape or (module.numel,))


@pytest.mark.parametrize("name", CASES)
def test_scales_of_another_dtype_are_found_by_check(name: str, tmp_path: Path) -> None:
    packer, quantization = CASES[name]
    one = "model.layers.0.mlp.up_proj"
    packed, _ = write_pair(
        tiny.base("llama-2"), tmp_path, lambda module: packer if module == one else None, quantization
    )
    assert not [found for found in check_checkpoint(packed) if ", wanted " in str(found)]
    whole = load_file(packed / "model.safetensors")
    scales = [tensor for tensor in whole if tensor.startswith(f"{one}.") and "scale" in tensor.rpartition(".")[2]]
    assert scales
    for tensor in scales:
        save_file({**whole, tensor: torch.ones(whole[tensor].shape, dtype=torch.int32)}, packed / "model.safetensors")
        said = [str(found) for found in check_checkpoint(packed) if found.severity == "error"]
        assert any(line.startswith(f"{tensor}: is I32, wanted ") for line in said), said


def test_several_schemes_in_one_checkpoint(tmp_path: Path) -> None:
    """Attention in int8, gate and up in nvfp4, down in fp8, one o_proj dense; regexes sorted as the library does."""
    groups = {
        "group_0": compressed("int-quantized", strategy="channel")["config_groups"]["group_0"],
        "group_1": {
            "targets": ["re:.*mlp.*"],
            "weights": {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        },
        "group_2": {
            "targets": [r"re:.*\.down_proj$"],
            "weights": {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": "48x40"},
        },
    }

    def packers(module: str) -> Packer | None:
        if module.endswith("0.self_attn.o_proj"):
            return None
        return fp8(48, 40) if module.endswith("down_proj") else nvfp4 if ".mlp." in module else int8("channel")

    quantization = compressed(None) | {"format": "mixed-precision", "config_groups": groups}
    packed, dense = write_pair(tiny.base("llama-2"), tmp_path, packers, quantization)
    check_equal(packed, dense)


def test_dynamic_rules_give_modules_other_bits(tmp_path: Path) -> None:
    def packers(module: str) -> Packer | None:
        if module.endswith("1.self_attn.o_proj"):
            return None
        return gptq(8, 16, False) if module.endswith("down_proj") else gptq(4, 32, True)

    rules = {r"-:.*\.layers\.1\..*o_proj": {}, r"+:.*\.down_proj$": {"bits": 8, "group_size": 16, "sym": False}}
    packed, dense = write_pair(tiny.base("llama-2"), tmp_path, packers, GPTQ | {"dynamic": rules})
    check_equal(packed, dense)


@pytest.mark.parametrize("name", ["int8-channel, asymmetric", "fp8-block", "nvfp4", "gptq, activation order", "awq"])
def test_experts_stored_one_by_one(name: str, tmp_path: Path) -> None:
    packer, quantization = CASES[name]
    packed, dense = write_pair(tiny.base("qwen3-moe"), tmp_path, lambda module: packer, quantization)
    assert any(".experts.3." in module for module in open_checkpoint(packed).modules)
    check_equal(packed, dense)


@pytest.mark.parametrize("shape_has_experts", [True, False])
def test_experts_stored_in_one_tensor(shape_has_experts: bool, tmp_path: Path) -> None:
    """`experts.gate_up_proj_packed`: gate rows above up rows, experts along the first axis."""
    scheme = IntScheme(4, 16, True)

    def packer(weight: Tensor) -> Packed:
        groups = torch.arange(weight.shape[1]) // 16
        codes, _, scales = integers(weight, 4, groups, True)
        return pack(codes - 8, scales, None, scheme, torch.float32), (codes - 8) * scales[:, groups]

    quantization = compressed("pack-quantized", num_bits=4, strategy="group", group_size=16)
    packed, dense = write_pair(tiny.base("qwen3-moe"), tmp_path, lambda module: packer, quantization)
    tensors = load_file(packed / "model.safetensors")
    fused: dict[str, Tensor] = {name: value for name, value in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.rpartition(".experts.")[0] + ".experts" for name in tensors.keys() - fused.keys()}):
        for part in ("packed", "scale"):
            gate, up, down = (
                torch.stack([tensors[f"{prefix}.{expert}.{leaf}.weight_{part}"] for expert in range(tiny.EXPERTS)])
                for leaf in ("gate_proj", "up_proj", "down_proj")
            )
            fused[f"{prefix}.gate_up_proj_{part}"] = torch.cat([gate, up], 1)
            fused[f"{prefix}.down_proj_{part}"] = down
        for leaf, size in (("gate_up_proj", [2 * tiny.EXPERT_SIZE, tiny.HIDDEN]), ("down_proj", [64, 64])):
            fused[f"{prefix}.{leaf}_shape"] = torch.tensor(([tiny.EXPERTS] if shape_has_experts else []) + size)
    save_file(fused, packed / "model.safetensors")
    module = open_checkpoint(packed).modules["model.layers.1.mlp.experts.gate_up_proj"]
    assert module.format == "pack-quantized"
    assert module.shape == (tiny.EXPERTS, 2 * tiny.EXPERT_SIZE, tiny.HIDDEN)
    check_equal(packed, dense)


@pytest.mark.parametrize("dotted", [True, False])
def test_experts_in_one_tensor_of_8_bit_floats(dotted: bool, tmp_path: Path) -> None:
    """`experts.gate_up_proj.weight` and `.weight_scale`, or `experts.gate_up_proj` and `_scale`."""
    packer, quantization = CASES["fp8-channel, naive"]
    packed, dense = write_pair(tiny.base("qwen3-moe"), tmp_path, lambda module: packer, quantization)
    tensors = load_file(packed / "model.safetensors")
    fused = {name: value for name, value in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.rpartition(".experts.")[0] + ".experts" for name in tensors.keys() - fused.keys()}):
        for part in ("weight", "weight_scale"):
            gate, up, down = (
                torch.stack([tensors[f"{prefix}.{expert}.{leaf}.{part}"] for expert in range(tiny.EXPERTS)])
                for leaf in ("gate_proj", "up_proj", "down_proj")
            )
            suffix = f".{part}" if dotted else part.removeprefix("weight")
            fused[f"{prefix}.gate_up_proj{suffix}"] = torch.cat([gate, up], 1)
            fused[f"{prefix}.down_proj{suffix}"] = down
    save_file(fused, packed / "model.safetensors")
    check_equal(packed, dense)
