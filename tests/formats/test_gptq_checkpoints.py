"""GPTQ: words by hand, zero points of both versions, planes, activation order, `dynamic` rules, refusals."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.errors import FormatError, UnsupportedError
from recompile.formats.gptq import GptqScheme, dequantize, read_scheme, unpack_planes, unpack_zeros
from tests.formats.packers import pack_gptq, pack_planes, pack_stream, signed

# --- by hand ----------------------------------------------------------------------------------------------------------


def test_four_bits_by_hand() -> None:
    """Output o has the code (o + i) mod 16 for input i: word 0 of output 0 is 0x76543210, of output 1 0x87654321.

    Symmetric: true zero 8; v1 stores 0x77777777. One group of eight inputs, scales 1, 2, 4 ...
    """
    words = [0x7654_3210, 0x8765_4321, 0x9876_5432, 0xA987_6543, 0xBA98_7654, 0xCBA9_8765, 0xDCBA_9876, 0xEDCB_A987]
    parts = {
        "qweight": torch.tensor([[signed(word) for word in words]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x7777_7777]], dtype=torch.int32),
        "scales": torch.tensor([[2.0**o for o in range(8)]], dtype=torch.float16),
    }
    expected = [[((o + i) % 16 - 8) * 2.0**o for i in range(8)] for o in range(8)]
    found = dequantize(parts, GptqScheme(4, 8, True))
    assert found.dtype == torch.float32
    assert found.tolist() == expected
    parts["qzeros"] = torch.tensor([[signed(0x8888_8888)]], dtype=torch.int32)
    assert dequantize(parts, GptqScheme(4, None, True, "gptq_v2")).tolist() == expected


@pytest.mark.parametrize(
    ("bits", "word", "stored", "true_v1"),
    [
        (4, 0xFEDC_BA98, [8, 9, 10, 11, 12, 13, 14, 15], [9, 10, 11, 12, 13, 14, 15, 0]),  # all ones wrap, alone
        (8, 0xFF7F_0001, [1, 0, 127, 255], [2, 1, 128, 0]),
        (2, 0b11_10_01_00_11_10_01_00_11_10_01_00_11_10_01_00, [0, 1, 2, 3] * 4, [1, 2, 3, 0] * 4),
    ],
)
def test_zero_points_are_one_higher_than_stored_in_v1_field_by_field(
    bits: int, word: int, stored: list[int], true_v1: list[int]
) -> None:
    words = torch.tensor([[signed(word)]], dtype=torch.int32)
    assert unpack_zeros(words, GptqScheme(bits, None, None, "gptq"), len(stored)).tolist() == [true_v1]
    assert unpack_zeros(words, GptqScheme(bits, None, None, "gptq_v2"), len(stored)).tolist() == [stored]


def test_three_bits_straddle_words() -> None:
    """Code 10 has bits 30, 31 | 32 and code 21 bits 63 | 64, 65 of its column."""
    words = [0x4000_0000, signed(0x8000_0001), 0b11]  # code 10 = 0b101, code 21 = 0b111
    parts = {
        "qweight": torch.tensor([[word] * 32 for word in words], dtype=torch.int32),
        "qzeros": torch.tensor([pack_stream([4] * 32, 3)], dtype=torch.int32),
        "scales": torch.ones(1, 32, dtype=torch.float16),
    }
    expected = [-4.0] * 32
    expected[10], expected[21] = 1.0, 3.0
    assert dequantize(parts, GptqScheme(3, None, True, "gptq_v2"))[0].tolist() == expected


def test_planes_of_five_bits_by_hand() -> None:
    """Four words of low nibbles, then one word of top bits: code 9 lies in word 1 at shift 4, its top bit in word 4."""
    words = [0, 0x0000_00B0, 0, 0, 1 << 9]
    codes = unpack_planes(torch.tensor([words], dtype=torch.int32), 5, 32)
    assert codes.tolist() == [[0] * 9 + [0b11011] + [0] * 22]


@pytest.mark.parametrize("bits", range(2, 9))
def test_planes_agree_with_the_definition(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 96), generator=torch.Generator().manual_seed(bits))
    packed = torch.tensor([pack_planes(row, bits) for row in codes.tolist()], dtype=torch.int32)
    assert packed.shape == (3, 3 * bits)
    assert torch.equal(unpack_planes(packed, bits, 96).long(), codes)


def test_columns_regrouped_by_activation_order() -> None:
    """Groups 1 0 0 1 1 0 1 0 of eight inputs; group 0 has scale 1 and zero 2, group 1 scale 10 and zero 5."""
    g_idx = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    scheme = GptqScheme(4, 4, False)
    codes, zeros = torch.arange(8).repeat(8, 1), torch.tensor([[2, 5]] * 8)
    parts = pack_gptq(codes, zeros, torch.tensor([[1.0, 10.0]] * 8), scheme, g_idx)
    expected = [-50.0, -1.0, 0.0, -20.0, -10.0, 3.0, 10.0, 5.0]
    assert dequantize(parts, scheme).tolist() == [expected] * 8


# --- every combination ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["none", "trivial", "scattered"])
def test_what_was_packed_is_read(bits: int, layout: str, symmetric: bool, order: str) -> None:
    out_features, in_features, group_size = 64, 96, 32
    generator = torch.Generator().manual_seed(bits)
    scheme = GptqScheme(bits, group_size, symmetric, layout)
    codes = torch.randint(0, 1 << bits, (out_features, in_features), generator=generator)
    zeros = torch.randint(0, 1 << bits, (out_features, 3), generator=generator)
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if symmetric else zeros
    scales = torch.rand(out_features, 3, generator=generator).to(torch.float16)
    groups = torch.arange(in_features) // group_size
    groups = groups[torch.randperm(in_features, generator=generator)] if order == "scattered" else groups
    parts = pack_gptq(codes, zeros, scales, scheme, None if order == "none" else groups)
    expected = (codes - zeros[:, groups]).float() * scales.float()[:, groups]
    assert torch.equal(dequantize(parts, scheme), expected)


def test_one_group_a_column_and_bfloat16_scales() -> None:
    scheme = GptqScheme(4, None, False)
    codes = torch.arange(16).repeat(8, 1)
    scales = torch.full((8, 1), 0.1, dtype=torch.bfloat16)
    parts = pack_gptq(codes, torch.full((8, 1), 3), scales, scheme)
    assert torch.equal(dequantize(parts, scheme), (codes - 3).float() * scales.float())


def test_a_last_group_may_be_shorter() -> None:
    scheme = GptqScheme(4, 16, False)
    codes, zeros = torch.arange(24).repeat(8, 1) % 16, torch.tensor([[1, 2]] * 8)
    parts = pack_gptq(codes, zeros, torch.tensor([[1.0, 2.0]] * 8), scheme)
    assert dequantize(parts, scheme)[0].tolist() == [float(i - 1) for i in range(16)] + [
        2.0 * (i - 2) for i in range(8)
    ]


# --- refusals ---------------------------------------------------------------------------------------------------------

SCHEME = GptqScheme(4, 32, True)


def make_parts(bits: int = 4, group_size: int = 32) -> dict[str, Tensor]:
    scheme = GptqScheme(bits, group_size, True)
    shape = (32, 64 // group_size)
    zeros = torch.full(shape, 1 << (bits - 1))
    return pack_gptq(torch.zeros(32, 64, dtype=torch.int64), zeros, torch.ones(shape), scheme, torch.arange(64) // 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: not found"),
        ({"qzeros": None}, "qzeros: not found"),
        ({"scales": None}, "scales: not found"),
        ({"qweight": torch.zeros(8, 32)}, "qweight: found torch.float32"),
        ({"qweight": torch.zeros(7, 32, dtype=torch.int32)}, "qweight: found 7 rows, wanted 8 for 64 inputs"),
        ({"qweight": torch.zeros(8, 32, 1, dtype=torch.int32)}, r"qweight: found shape \[8, 32, 1\]"),
        (
            {"qzeros": torch.zeros(2, 3, dtype=torch.int32)},
            r"qzeros: found shape \[2, 3\], wanted \[2, 4\], from 4 bits",
        ),
        ({"qzeros": torch.zeros(2, 4, dtype=torch.int32)}, r"qzeros: found zero points 1 to 1, wanted all 8"),
        ({"scales": torch.ones(2, 31)}, "scales: found 31 columns, wanted 32"),
        ({"scales": torch.full((2, 32), torch.nan)}, "scales: found 64 NaN"),
        ({"scales": torch.ones(2, 32, dtype=torch.int32)}, "scales: found torch.int32"),
        ({"g_idx": torch.zeros(64)}, "g_idx: found torch.float32"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx: found groups 2 to 2, wanted 0 to 1"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx: found groups -1 to -1"),
        ({"g_idx": torch.zeros(64, 1, dtype=torch.int32)}, "g_idx: found shape"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    parts = {**make_parts(), **change}
    with pytest.raises(FormatError, match=r"^a\.b\." + message):
        dequantize({name: part for name, part in parts.items() if part is not None}, SCHEME, "a.b")


def test_a_missed_dynamic_rule_is_named() -> None:
    with pytest.raises(FormatError, match=r"a\.qzeros: .*a rule of `dynamic`"):
        dequantize(make_parts(bits=8), SCHEME, "a")
    with pytest.raises(FormatError, match=r"a\.scales: found 2 groups, wanted 4 .*a rule of `dynamic`"):
        dequantize(make_parts(), GptqScheme(4, 16, True), "a")
    with pytest.raises(FormatError, match=r"a\.scales: found 2 groups, wanted 1 .*group_size -1"):
        dequantize(make_parts(), GptqScheme(4, None, True), "a")


def test_a_v2_file_read_as_v1_is_noticed() -> None:
    parts = make_parts()
    parts["qzeros"] = torch.full((2, 4), signed(0x8888_8888), dtype=torch.int32)
    with pytest.raises(FormatError, match=r"zero points 9 to 9, wanted all 8: .*checkpoint_format 'gptq' right"):
        dequantize(parts, SCHEME)


@settings(max_examples=100, deadline=None)
@given(
    qweight=st.tuples(st.integers(0, 9), st.integers(0, 33)),
    qzeros=st.tuples(st.integers(0, 3), st.integers(0, 9)),
    scales=st.tuples(st.integers(0, 3), st.integers(0, 33)),
    g_idx=st.none() | st.lists(st.integers(-1, 3), max_size=33),
    bits=st.integers(2, 8),
    layout=st.sampled_from(["gptq", "gptq_v2", "gptq_p"]),
)
def test_any_shapes_are_read_or_refused(
    qweight: tuple[int, int],
    qzeros: tuple[int, int],
    scales: tuple[int, int],
    g_idx: list[int] | None,
    bits: int,
    layout: str,
) -> None:
    parts = {
        "qweight": torch.zeros(qweight, dtype=torch.int32),
        "qzeros": torch.zeros(qzeros, dtype=torch.int32),
        "scales": torch.ones(scales),
    }
    if g_idx is not None:
        parts["g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    with contextlib.suppress(FormatError):
        found = dequantize(parts, GptqScheme(bits, None, None, layout))
        assert found.shape[0] == scales[1]


# --- configs ----------------------------------------------------------------------------------------------------------

BASE: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}


@pytest.mark.parametrize(
    ("change", "scheme"),
    [
        ({}, GptqScheme(4, 128, True, "gptq")),
        ({"checkpoint_format": "gptq_v2"}, GptqScheme(4, 128, True, "gptq_v2")),
        ({"format": "gptq_p", "bits": 5}, GptqScheme(5, 128, True, "gptq_p")),
        ({"group_size": -1, "sym": False}, GptqScheme(4, None, False)),
        ({"pack_dtype": "int32", "desc_act": True, "lm_head": True}, GptqScheme(4, 128, True)),
        # the first rule that matches wins, and its unset keys are the base's
        (
            {"dynamic": {r"+:.*\.down_proj$": {"bits": 8}, r".*mlp.*": {"bits": 3, "group_size": 32}}},
            GptqScheme(8, 128, True),
        ),
        ({"dynamic": {r".*mlp.*": {"group_size": 32, "sym": False, "mse": 1}, r"+:.*": {}}}, GptqScheme(4, 32, False)),
        # anchored at the start
        ({"dynamic": {r"mlp": {"bits": 8}, r"layers": {"bits": 8}}}, GptqScheme(4, 128, True)),
        ({"dynamic": {r"-:.*o_proj": {}, r"+:model\.layers\.0\.": {"group_size": -1}}}, GptqScheme(4, None, True)),
    ],
)
def test_configs_are_read(change: dict[str, Any], scheme: GptqScheme) -> None:
    assert read_scheme(BASE | change, "model.layers.0.mlp.down_proj") == scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": None}, "bits: not found"),
        ({"bits": 9}, "bits: found 9"),
        ({"bits": "4"}, "bits: found '4'"),
        ({"group_size": 0}, "group_size: found 0"),
        ({"sym": "yes"}, "sym: found 'yes'"),
        ({"dynamic": {"-:.*down_proj": {}}}, "says that it is not quantized, and it is stored quantized"),
        ({"dynamic": {"+:(": {}}}, "is no regular expression"),
        ({"dynamic": {".*": 8}}, "found 8, wanted an object"),
        ({"dynamic": [1]}, "dynamic: found a list"),
    ],
)
def test_configs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_scheme(BASE | change, "model.layers.0.mlp.down_proj")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint_format": "marlin"}, "repacked for one GPU kernel"),
        ({"is_marlin_format": True}, "repacked for one GPU kernel"),
        ({"format": "bitblas"}, "'bitblas' in config.json: this version reads gptq, gptq_v2, gptq_p"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    ],
)
def test_layouts_of_one_kernel_are_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_scheme(BASE | change, "a")


# --- checkpoints ------------------------------------------------------------------------------------------------------


def open_with(
    directory: Path, parts: dict[str, Tensor], quantization: dict[str, Any] | None, **files: dict[str, Any]
) -> Checkpoint:
    config = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (directory / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    save_file({f"a.b.{name}": part for name, part in parts.items()}, directory / "model.safetensors")
    return open_checkpoint(directory)


def random_parts(scheme: GptqScheme, with_g_idx: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """Parts of a module [32, 64] with two groups, and its dense weight."""
    generator = torch.Generator().manual_seed(9)
    codes = torch.randint(0, 1 << scheme.bits, (32, 64), generator=generator)
    zeros = torch.full((32, 2), 1 << (scheme.bits - 1))
    scales = torch.rand(32, 2, generator=generator).to(torch.float16)
    groups = torch.arange(64) // 32
    dense = (codes - zeros[:, groups]).float() * scales.float()[:, groups]
    return pack_gptq(codes, zeros, scales, scheme, groups if with_g_idx else None), dense


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", ["gptq", "gptq_p"])
@pytest.mark.parametrize("with_g_idx", [True, False])
def test_the_shape_is_known_from_headers(tmp_path: Path, bits: int, layout: str, with_g_idx: bool) -> None:
    parts, dense = random_parts(GptqScheme(bits, 32, True, layout), with_g_idx)
    quantization = BASE | {"bits": bits, "group_size": 32, "checkpoint_format": layout}
    checkpoint = open_with(tmp_path, parts, quantization)
    module = checkpoint.modules["a.b"]
    assert (module.format, module.shape) == ("gptq", (32, 64))
    assert module.bits_per_weight == pytest.approx(8 * sum(p.numel() * p.element_size() for p in parts.values()) / 2048)
    assert torch.equal(checkpoint.load("a.b.weight"), dense)


def test_the_config_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    parts, dense = random_parts(GptqScheme(3, 32, True))
    checkpoint = open_with(tmp_path, parts, None, quantize_config={"bits": 3, "group_size": 32, "sym": True})
    assert torch.equal(checkpoint.load("a.b.weight"), dense)


def test_config_json_goes_before_that_file(tmp_path: Path) -> None:
    parts, dense = random_parts(GptqScheme(3, 32, True))
    checkpoint = open_with(tmp_path, parts, BASE | {"bits": 3, "group_size": 32}, quantize_config={"bits": 8})
    assert torch.equal(checkpoint.load("a.b.weight"), dense)


def test_a_module_without_config_is_refused(tmp_path: Path) -> None:
    parts, _ = random_parts(GptqScheme(3, 32, True))
    with pytest.raises(FormatError, match="bits: not found"):
        open_with(tmp_path, parts, None).load("a.b.weight")


@pytest.mark.parametrize(
    ("packing", "layout"),
    [("auto_round:auto_gptq", "gptq"), ("auto_round", "gptq_v2"), ("auto_round:gptqmodel", "gptq_v2")],
)
def test_auto_round_packing_says_how_zeros_are_stored(tmp_path: Path, packing: str, layout: str) -> None:
    parts, dense = random_parts(GptqScheme(4, 32, True, layout))
    # sym false, so that a wrong reading would show in the weights and not as an error
    quantization = {"quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": 32, "sym": False}
    assert torch.equal(open_with(tmp_path, parts, quantization).load("a.b.weight"), dense)


@pytest.mark.parametrize("key", ["a.b", r"\.b"])
def test_auto_round_overrides_by_name_or_regex(tmp_path: Path, key: str) -> None:
    parts, dense = random_parts(GptqScheme(8, 32, True))
    quantization = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "extra_config": {key: {"bits": 8, "group_size": 32}, "a.*": {"bits": 16}},
    }
    assert torch.equal(open_with(tmp_path, parts, quantization).load("a.b.weight"), dense)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packing_format": "auto_round:fp8"}, UnsupportedError, "packing_format 'auto_round:fp8'"),
        ({"packing_format": "auto_round:auto_awq"}, FormatError, "stored as gptq, and packing_format .* means awq"),
        ({"extra_config": {"a.b": {"bits": 16}}}, FormatError, "says that it is not quantized"),
        ({"extra_config": {"(": {}}}, FormatError, "no regular expression"),
        ({"bits": None}, FormatError, "bits: found None"),
        ({"quant_method": "bitsandbytes"}, FormatError, "quant_method in config.json is 'bitsandbytes', and a.b is"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, UnsupportedError, "repacked"),
    ],
)
def test_checkpoints_that_cannot_be_read(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    parts, _ = random_parts(GptqScheme(4, 32, True))
    quantization = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32}
    with pytest.raises(error, match=message):
        open_with(tmp_path, parts, quantization | change).load("a.b.weight")


def test_repacked_weights_are_refused_by_their_config_whatever_their_shape(tmp_path: Path) -> None:
    parts = {"qweight": torch.zeros(4, 64, dtype=torch.int32), "scales": torch.ones(2, 32, dtype=torch.float16)}
    with pytest.raises(UnsupportedError, match="repacked"):
        open_with(tmp_path, parts, BASE | {"checkpoint_format": "marlin"}).load("a.b.weight")
    with pytest.raises(FormatError, match=r"config\.json says GPTQ, and a\.b is not packed so"):
        open_checkpoint_again(tmp_path, BASE)


def open_checkpoint_again(directory: Path, quantization: dict[str, Any]) -> Tensor:
    config = {"model_type": "llama", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    return open_checkpoint(directory).load("a.b.weight")
