"""AWQ GEMM: the order of nibbles by hand, an independent packer, refusals."""

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

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import FormatError, UnsupportedError
from recompile.formats.awq import AwqScheme, dequantize, read_scheme, unpack_words
from tests.formats.packers import AWQ_POSITION, pack_awq, signed


def test_nibbles_by_hand() -> None:
    """0x75316420: nibbles 0 2 4 6 1 3 5 7 from the lowest, which are the columns' own numbers."""
    assert unpack_words(torch.tensor([[0x7531_6420]], dtype=torch.int32)).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]
    # only column 7 is 15: the top nibble, so that the word is negative
    assert unpack_words(torch.tensor([[signed(0xF000_0000)]], dtype=torch.int32)).tolist() == [[0] * 7 + [15]]
    # only column 1 is 15: nibble 4
    assert unpack_words(torch.tensor([[0x000F_0000]], dtype=torch.int32)).tolist() == [[0, 15] + [0] * 6]


def test_weights_by_hand() -> None:
    """Two inputs, eight outputs, a group each; output o has the code o for input 0 and 15 - o for input 1."""
    parts = {
        "qweight": torch.tensor([[0x7531_6420], [signed(0x8ACE_9BDF)]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x1111_1111], [0x7531_6420]], dtype=torch.int32),
        "scales": torch.tensor([[1.0] * 8, [0.5] * 8], dtype=torch.float16),
    }
    found = dequantize(parts, AwqScheme(1))
    assert found.dtype == torch.float32
    assert found.tolist() == [[o - 1.0, (15 - 2 * o) * 0.5] for o in range(8)]


@pytest.mark.parametrize("group_size", [16, 32, None])
def test_what_was_packed_is_read(group_size: int | None) -> None:
    out_features, in_features = 40, 80  # 80 is no multiple of 32: the last group is shorter
    generator = torch.Generator().manual_seed(6)
    groups = torch.arange(in_features) // (group_size or in_features)
    shape = (out_features, int(groups.max()) + 1)
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    zeros = torch.randint(0, 16, shape, generator=generator)
    scales = torch.rand(shape, generator=generator).to(torch.float16)
    expected = (codes - zeros[:, groups]).float() * scales.float()[:, groups]
    assert torch.equal(dequantize(pack_awq(codes, zeros, scales), AwqScheme(group_size)), expected)


def test_chunks_of_inputs() -> None:
    """More weights than one chunk holds (2^18)."""
    codes = torch.randint(0, 16, (1024, 512), generator=torch.Generator().manual_seed(7))
    words = torch.zeros(512, 128, dtype=torch.int64)
    for column in range(8):
        words |= codes.t()[:, column::8] << (4 * AWQ_POSITION[column])
    parts = {
        "qweight": torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32),
        "qzeros": torch.zeros(4, 128, dtype=torch.int32),
        "scales": torch.arange(1.0, 5.0).repeat(1024, 1).t().contiguous(),
    }
    expected = codes.float() * (torch.arange(512) // 128 + 1).float()
    assert torch.equal(dequantize(parts, AwqScheme(128)), expected)


def make_parts() -> dict[str, Tensor]:
    shape = (16, 2)
    return pack_awq(torch.zeros(16, 64, dtype=torch.int64), torch.full(shape, 8), torch.ones(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": None}, "qweight: not found"),
        ({"qzeros": None}, "qzeros: not found"),
        ({"scales": None}, "scales: not found"),
        ({"qweight": torch.zeros(64, 2, dtype=torch.int16)}, "qweight: found torch.int16"),
        ({"qweight": torch.zeros(64, 3, dtype=torch.int32)}, r"scales: found shape \[2, 16\], wanted \[2, 24\]"),
        (
            {"scales": torch.ones(4, 16)},
            r"scales: found shape \[4, 16\], wanted \[2, 16\], for 64 inputs and group_size",
        ),
        ({"scales": torch.full((2, 16), torch.inf)}, "scales: found 32 NaN or infinite"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, r"qzeros: found shape \[2, 3\], wanted \[2, 2\]"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "g_idx: found, wanted none"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    parts = {**make_parts(), **change}
    with pytest.raises(FormatError, match=r"^a\.b\." + message):
        dequantize({name: part for name, part in parts.items() if part is not None}, AwqScheme(32), "a.b")


def test_without_zero_points_every_stored_one_must_be_eight() -> None:
    parts = make_parts()
    assert torch.equal(dequantize(parts, AwqScheme(32, zero_point=False)), dequantize(parts, AwqScheme(32)))
    parts["qzeros"][1, 1] = 0x7777_7777
    with pytest.raises(FormatError, match="qzeros: found zero points 7 to 8, wanted all 8"):
        dequantize(parts, AwqScheme(32, zero_point=False))


@settings(max_examples=80, deadline=None)
@given(
    qweight=st.tuples(st.integers(0, 5), st.integers(0, 3)),
    qzeros=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    scales=st.tuples(st.integers(0, 3), st.integers(0, 24)),
    group_size=st.none() | st.integers(1, 4),
)
def test_any_shapes_are_read_or_refused(
    qweight: tuple[int, int], qzeros: tuple[int, int], scales: tuple[int, int], group_size: int | None
) -> None:
    parts = {
        "qweight": torch.zeros(qweight, dtype=torch.int32),
        "qzeros": torch.zeros(qzeros, dtype=torch.int32),
        "scales": torch.ones(scales),
    }
    with contextlib.suppress(FormatError):
        assert dequantize(parts, AwqScheme(group_size)).shape == (qweight[1] * 8, qweight[0])


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, AwqScheme(128)),
        ({"w_bit": 4, "q_group_size": 64, "zero_point": False, "version": "GEMM"}, AwqScheme(64, False)),
        ({"bits": 4, "group_size": -1}, AwqScheme(None)),
        ({"bits": 4, "group_size": 32, "sym": True, "format": "gemm"}, AwqScheme(32, False)),
        ({"bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gemm"}, AwqScheme(32)),
    ],
)
def test_configs_are_read(config: dict[str, Any], scheme: AwqScheme) -> None:
    assert read_scheme(config) == scheme


def test_configs_that_do_not_fit_are_refused() -> None:
    for version in ("gemv", "gemv_fast", "llm-awq", "marlin"):
        with pytest.raises(UnsupportedError, match=f"AWQ version '{version}'"):
            read_scheme({"bits": 4, "group_size": 128, "version": version})
    for change in ({"bits": 8}, {"bits": "4"}, {"group_size": 0}, {"zero_point": "no"}):
        with pytest.raises(FormatError, match=f"{next(iter(change))}: found"):
            read_scheme({"bits": 4, "group_size": 128} | change)


def open_with(directory: Path, parts: dict[str, Tensor], quantization: dict[str, Any] | None) -> Any:
    config = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (directory / "config.json").write_text(json.dumps(config))
    save_file({f"a.b.{name}": part for name, part in parts.items()}, directory / "model.safetensors")
    return open_checkpoint(directory)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32},
    ],
)
def test_told_from_gptq_by_headers(tmp_path: Path, quantization: dict[str, Any]) -> None:
    codes = torch.arange(16 * 64).reshape(16, 64) % 16
    parts = pack_awq(codes, torch.full((16, 2), 3), torch.ones(16, 2))
    checkpoint = open_with(tmp_path, parts, quantization)
    module = checkpoint.modules["a.b"]
    assert (module.format, module.shape) == ("awq", (16, 64))
    assert module.size_bytes == 16 * 64 // 2 + 2 * 16 // 2 + 2 * 16 * 2
    assert torch.equal(checkpoint.load("a.b.weight"), (codes - 3).float())


def test_the_config_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    assert open_with(tmp_path, make_parts(), None).load("a.b.weight").tolist() == torch.full((16, 64), -8.0).tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_other_layouts_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = {"qweight": torch.zeros(16, 8, dtype=dtype), "scales": torch.ones(2, 16, dtype=torch.float16)}
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}
    with pytest.raises(UnsupportedError, match=r"AWQ version 'gemv' in config\.json has another layout"):
        open_with(tmp_path, parts, quantization).load("a.b.weight")


def test_a_gptq_module_with_an_awq_config_is_refused(tmp_path: Path) -> None:
    parts = {
        "qweight": torch.zeros(8, 16, dtype=torch.int32),
        "qzeros": torch.zeros(2, 2, dtype=torch.int32),
        "scales": torch.ones(2, 16, dtype=torch.float16),
    }
    with pytest.raises(FormatError, match=r"config\.json says AWQ, and a\.b is not packed so"):
        open_with(tmp_path, parts, {"quant_method": "awq", "bits": 4, "group_size": 32}).load("a.b.weight")
