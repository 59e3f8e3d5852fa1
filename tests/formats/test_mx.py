"""mxfp4, mxfp6, mxfp8: codes and powers of two by hand, an independent packer, refusals, equality with the library."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.mx import MxScheme, dequantize, read_scheme, unpack_e2m3

E4M3 = torch.float8_e4m3fn
FP4, FP6, FP8 = MxScheme(4), MxScheme(6), MxScheme(8)


def exponents(*values: int) -> Tensor:
    return torch.tensor([values], dtype=torch.uint8)


def test_fp4_values_times_powers_of_two() -> None:
    """Code 2 is 1, code 15 is -6; 2^(127-127) = 1, 2^(130-127) = 8."""
    parts = {"weight_packed": torch.tensor([[0xF2] * 32], dtype=torch.uint8), "weight_scale": exponents(127, 130)}
    assert dequantize(parts, FP4).tolist() == [[1.0, -6.0] * 16 + [8.0, -48.0] * 16]


def test_four_fp6_codes_lie_in_three_bytes() -> None:
    """Codes 1, 63, 8, 31 from the lowest bit: 011111 001000 111111 000001 = 0x7C8FC1, lowest byte first.

    E2M3: 1 is 1/8; 63 is -(1 + 7/8) * 4 = -7.5; 8 is 1; 31 is 7.5.
    """
    packed = torch.tensor([[0xC1, 0x8F, 0x7C]], dtype=torch.uint8)
    assert unpack_e2m3(packed).tolist() == [[0.125, -7.5, 1.0, 7.5]]
    parts = {"weight_packed": packed.repeat(1, 8), "weight_scale": exponents(126)}
    assert dequantize(parts, FP6).tolist() == [[0.0625, -3.75, 0.5, 3.75] * 8]


def test_every_fp6_code_means_what_its_bits_say() -> None:
    """Sign, two bits of exponent (bias 1, 0 is subnormal), three of mantissa."""
    codes = list(range(64))
    stream = sum(code << (6 * at) for at, code in enumerate(codes))
    packed = torch.tensor([[stream >> (8 * at) & 255 for at in range(48)]], dtype=torch.uint8)
    expected = []
    for code in codes:
        sign, exponent, mantissa = code >> 5, code >> 3 & 3, code & 7
        value = mantissa / 8 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 1)
        expected.append(-value if sign else value)
    assert unpack_e2m3(packed).tolist() == [expected]


def test_fp8_values_times_powers_of_two() -> None:
    """0x38 is 1, 0xBC is -1.5 in e4m3."""
    weight = torch.tensor([[0x38, 0xBC] * 32], dtype=torch.uint8).view(E4M3)
    parts = {"weight": weight, "weight_scale": exponents(128, 120)}
    assert dequantize(parts, FP8).tolist() == [[2.0, -3.0] * 16 + [2.0**-7, -1.5 * 2.0**-7] * 16]


def test_scales_at_both_ends() -> None:
    """0 is 2^-127, which float32 holds as a subnormal number; 254 is 2^127."""
    parts = {"weight_packed": torch.tensor([[0x22] * 32], dtype=torch.uint8), "weight_scale": exponents(0, 254)}
    found = dequantize(parts, FP4)[0].double()
    assert found[0].item() == 2.0**-127
    assert found[32].item() == 2.0**127


def test_a_scale_dtype_of_its_own_is_read() -> None:
    parts = {"weight_packed": torch.tensor([[0x22] * 16], dtype=torch.uint8), "weight_scale": exponents(129)}
    parts["weight_scale"] = parts["weight_scale"].view(torch.float8_e8m0fnu)
    assert dequantize(parts, FP4).tolist() == [[4.0] * 32]


PARTS = {
    4: {"weight_packed": torch.zeros(2, 32, dtype=torch.uint8)},
    6: {"weight_packed": torch.zeros(2, 48, dtype=torch.uint8)},
    8: {"weight": torch.zeros(2, 64).to(E4M3)},
}


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CODES": None}, "CODES: not found"),
        ({"weight_scale": None}, "weight_scale: not found"),
        ({"CODES": torch.zeros(2, 32)}, "CODES: found torch.float32"),
        (
            {"weight_scale": torch.zeros(2, 3, dtype=torch.uint8)},
            r"weight_scale: found shape \[2, 3\], wanted \[2, 2\]",
        ),
        ({"weight_scale": torch.zeros(2, 2)}, "weight_scale: found torch.float32"),
        ({"weight_scale": torch.full((2, 2), 255, dtype=torch.uint8)}, "weight_scale: found 4 scales that mean NaN"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(bits: int, change: dict[str, Tensor | None], message: str) -> None:
    (codes,) = PARTS[bits]
    parts: dict[str, Tensor | None] = {**PARTS[bits], "weight_scale": torch.full((2, 2), 127, dtype=torch.uint8)}
    dequantize(parts, MxScheme(bits))  # type: ignore[arg-type]
    parts |= {codes if name == "CODES" else name: part for name, part in change.items()}
    with pytest.raises(FormatError, match=r"^a\.b\." + message.replace("CODES", codes)):
        dequantize({name: part for name, part in parts.items() if part is not None}, MxScheme(bits), "a.b")


def test_widths_that_are_no_whole_groups_are_refused() -> None:
    scale = torch.zeros(2, 1, dtype=torch.uint8)
    for scheme, width in ((FP4, 15), (FP6, 25), (FP6, 12)):
        with pytest.raises(FormatError, match=f"found {width} elements a row"):
            dequantize({"weight_packed": torch.zeros(2, width, dtype=torch.uint8), "weight_scale": scale}, scheme)


def test_weights_beyond_float32_are_refused() -> None:
    parts = {"weight_packed": torch.full((1, 16), 0x77, dtype=torch.uint8), "weight_scale": exponents(254)}
    with pytest.raises(FormatError, match="weight_packed: found 32 NaN or infinite"):
        dequantize(parts, FP4)


def test_configs() -> None:
    config = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    for bits in (4, 6, 8):
        assert read_scheme(config | {"num_bits": bits}) == MxScheme(bits)
    for change in ({"num_bits": 5}, {"type": "int"}, {"group_size": 16}, {"strategy": "channel"}, {"symmetric": False}):
        with pytest.raises(FormatError, match=f"weights.{next(iter(change))}"):
            read_scheme(config | change)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 6, 8]),
    shape=st.tuples(st.integers(0, 3), st.integers(0, 100)),
    scale=st.tuples(st.integers(0, 3), st.integers(0, 4)),
)
def test_any_shapes_are_read_or_refused(bits: int, shape: tuple[int, int], scale: tuple[int, int]) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    parts = {"weight": codes.view(E4M3)} if bits == 8 else {"weight_packed": codes}
    with contextlib.suppress(FormatError):
        found = dequantize(parts | {"weight_scale": torch.full(scale, 127, dtype=torch.uint8)}, MxScheme(bits))
        assert found.shape == (shape[0], shape[1] * 8 // bits)


@pytest.mark.parametrize(
    ("bits", "module", "name"),
    [
        (4, "mxfp4", "MXFP4PackedCompressor"),
        (6, "mxfp6", "MXFP6PackedCompressor"),
        (8, "mxfp8", "MXFP8QuantizationCompressor"),
    ],
)
def test_equal_to_the_compressed_tensors_library(bits: int, module: str, name: str) -> None:
    """Exactly: powers of two lose nothing in the library's bfloat16."""
    pytest.importorskip("compressed_tensors")
    base = importlib.import_module(f"compressed_tensors.compressors.{module}.base")
    pytest.importorskip("compressed_tensors")
    presets = importlib.import_module("compressed_tensors.quantization")
    group = presets.preset_name_to_scheme(f"MXFP{bits}A16", ["Linear"])
    assert read_scheme(group.model_dump(mode="json")["weights"]) == MxScheme(bits)
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 256, (40, 64 * bits // 8), generator=generator, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0  # no NaN in e4m3
    parts = {"weight": codes.view(E4M3)} if bits == 8 else {"weight_packed": codes}
    parts["weight_scale"] = torch.randint(100, 150, (40, 2), generator=generator, dtype=torch.uint8)
    theirs = getattr(base, name).decompress(dict(parts), group)["weight"]
    assert torch.equal(dequantize(parts, MxScheme(bits)), theirs.float())
