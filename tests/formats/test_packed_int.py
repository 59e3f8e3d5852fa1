"""pack-quantized integers: bit streams worked out by hand, round trips, refusals, equality with compressed-tensors."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.packed_int import IntScheme, dequantize, pack, pack_rows, unpack_rows


def as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


# (bits, codes, words): every word written out by hand from "element i occupies bits [i*b, i*b + b)".
GOLDEN = [
    (1, [1, 0, 1, 1, 0, 0, 0, 0, 1], [0b1_0000_1101]),
    (2, [0, 1, 2, 3, 3], [0b11_11_10_01_00]),
    (4, [0, 1, 2, 3, 4, 5, 6, 7, 9], [0x7654_3210, 0x9]),
    (8, [0x78, 0x56, 0x34, 0x12, 0xFF], [0x1234_5678, 0xFF]),
    # 3 bits: element 10 has bits 30, 31 | 32. 0b101 puts 1, 0 on top of word 0 and 1 at the bottom of word 1.
    (3, [0b110] + [0] * 9 + [0b101], [0x4000_0006, 0b1]),
    # 3 bits: element 21 has bits 63 | 64, 65.
    (3, [0] * 21 + [0b111], [0, 0x8000_0000, 0b11]),
    # 5 bits: element 6 has bits 30, 31 | 32, 33, 34. 0b10111: low 11, high 101.
    (5, [0] * 6 + [0b10111], [0xC000_0000, 0b101]),
    # 6 bits: element 5 has bits 30, 31 | 32..35. 0b110110: low 10, high 1101.
    (6, [1] + [0] * 4 + [0b110110], [0x8000_0001, 0b1101]),
    # 7 bits: element 4 has bits 28..31 | 32, 33, 34. 0b1011001: low 1001, high 101.
    (7, [0] * 4 + [0b1011001], [0x9000_0000, 0b101]),
]


@pytest.mark.parametrize(("bits", "codes", "words"), GOLDEN)
def test_a_row_is_one_bit_stream_lowest_bit_first(bits: int, codes: list[int], words: list[int]) -> None:
    stored = torch.tensor([[as_int32(word) for word in words]], dtype=torch.int32)
    assert pack_rows(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == stored.tolist()
    assert unpack_rows(stored, bits, len(codes)).tolist() == [codes]


def pack_with_big_ints(rows: list[list[int]], bits: int) -> list[list[int]]:
    """The definition of the stream, with one unbounded integer a row."""
    packed = []
    for row in rows:
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        packed.append([as_int32(stream >> (32 * w) & 0xFFFF_FFFF) for w in range(-(-len(row) * bits // 32))])
    return packed


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 10, 11, 31, 32, 33, 63, 65, 97, 130])
def test_packing_agrees_with_big_integers_for_every_width(bits: int, n: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, n), generator=torch.Generator().manual_seed(100 * bits + n))
    packed = pack_rows(codes.to(torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == pack_with_big_ints(codes.tolist(), bits)
    assert torch.equal(unpack_rows(packed, bits, n), codes.to(torch.uint8))


def test_unpacking_does_not_alias_or_change_its_input() -> None:
    for bits in range(1, 9):
        packed = torch.full((2, bits), -1, dtype=torch.int32)
        unpack_rows(packed, bits, 32).zero_()
        assert bool((packed == -1).all()), bits


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("n", [3, 40])
def test_unpacking_reads_a_transposed_tensor(rows: int, n: int) -> None:
    for bits in range(1, 9):
        codes = torch.arange(rows * n).reshape(rows, n) % (1 << bits)
        packed = pack_rows(codes, bits).t().contiguous().t()  # columns contiguous
        assert unpack_rows(packed, bits, n).tolist() == codes.tolist()


# --- dequantization ---------------------------------------------------------------------------------------------------


def test_dequantize_by_hand_asymmetric_group() -> None:
    parts = {
        "weight_packed": torch.tensor([[0x7654_3210]], dtype=torch.int32),  # q = -8 .. -1
        "weight_scale": torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16),
        "weight_shape": torch.tensor([1, 8]),
        "weight_zero_point": torch.tensor([[0, 9]], dtype=torch.int32),  # z = -8, 1
    }
    dense = dequantize(parts, IntScheme(4, 4, symmetric=False))
    assert dense.dtype == torch.float32
    assert dense.tolist() == [[0.0, 0.5, 1.0, 1.5, -10.0, -8.0, -6.0, -4.0]]


def test_dequantize_by_hand_symmetric_channel_with_odd_columns_and_negative_scale() -> None:
    # 3 bits: codes + 4 = 0, 7, 4, 5, 3 at bits 0, 3, 6, 9, 12
    word = 0 | 7 << 3 | 4 << 6 | 5 << 9 | 3 << 12
    parts = {
        "weight_packed": torch.tensor([[word]], dtype=torch.int32),
        "weight_scale": torch.tensor([[-0.25]]),
        "weight_shape": torch.tensor([1, 5]),
    }
    assert dequantize(parts, IntScheme(3, None, True)).tolist() == [[1.0, -0.75, 0.0, -0.25, 0.25]]


def test_zero_points_run_along_the_outputs() -> None:
    # 9 outputs, 2 groups, 4 bits: outputs 0..7 of a group share a word, output 8 begins the next.
    zero_point = torch.tensor([[-8, 0], [-7, 0], [-6, 0], [-5, 0], [-4, 0], [-3, 0], [-2, 0], [-1, 0], [3, 0]])
    parts = pack(torch.zeros(9, 4, dtype=torch.int8), torch.ones(9, 2), zero_point, IntScheme(4, 2, False))
    assert parts["weight_zero_point"].tolist() == [[0x7654_3210, as_int32(0x8888_8888)], [0xB, 0x8]]
    expected = -zero_point.float().repeat_interleave(2, dim=1)
    assert dequantize(parts, IntScheme(4, 2, False)).tolist() == expected.tolist()


def test_pack_stores_exactly_the_parts_of_the_format() -> None:
    codes = torch.randint(-4, 4, (6, 32), dtype=torch.int8)
    symmetric = pack(codes, torch.rand(6, 1), None, IntScheme(3, None, True))
    assert {name: (part.dtype, list(part.shape)) for name, part in symmetric.items()} == {
        "weight_packed": (torch.int32, [6, 3]),
        "weight_scale": (torch.bfloat16, [6, 1]),
        "weight_shape": (torch.int64, [2]),
    }
    assert symmetric["weight_shape"].tolist() == [6, 32]
    asymmetric = pack(codes, torch.rand(6, 2), torch.zeros(6, 2, dtype=torch.int8), IntScheme(3, 16, False))
    assert asymmetric["weight_zero_point"].dtype == torch.int32
    assert list(asymmetric["weight_zero_point"].shape) == [1, 2]
    assert all(part.is_contiguous() for part in asymmetric.values())


@st.composite
def packed_weights(draw: st.DrawFn) -> tuple[IntScheme, Tensor, Tensor, Tensor | None]:
    bits, symmetric = draw(st.integers(1, 8)), draw(st.booleans())
    group_size = draw(st.none() | st.integers(1, 40))
    out_features = draw(st.integers(1, 40))
    in_features = draw(st.integers(1, 70)) if group_size is None else group_size * draw(st.integers(1, 4))
    scheme = IntScheme(bits, group_size, symmetric)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    shape = (out_features, scheme.count_groups(in_features))
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (out_features, in_features), generator=generator)
    zero_point = torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator)
    return scheme, codes, torch.randn(shape, generator=generator), None if symmetric else zero_point


@settings(max_examples=150, deadline=None)
@given(packed_weights(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_round_trip_is_exact(case: tuple[IntScheme, Tensor, Tensor, Tensor | None], scale_dtype: torch.dtype) -> None:
    scheme, codes, scale, zero_point = case
    parts = pack(codes, scale, zero_point, scheme, scale_dtype)
    columns = torch.arange(codes.shape[1]) // (scheme.group_size or codes.shape[1])
    levels = codes if zero_point is None else codes - zero_point[:, columns]
    expected = levels.float() * scale.to(scale_dtype).float()[:, columns]
    assert torch.equal(dequantize(parts, scheme), expected)
    assert torch.equal(dequantize(parts, scheme, dtype=torch.bfloat16), expected.bfloat16())


def test_a_short_last_group_is_read() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, -8, -7, -6]])  # 10 columns in groups of 4, 4 and 2
    parts = {
        "weight_packed": pack_rows(codes + 8, 4),
        "weight_scale": torch.tensor([[1.0, 10.0, 100.0]]),
        "weight_shape": torch.tensor([1, 10]),
    }
    expected = [[1.0, 2, 3, 4, 50, 60, 70, -80, -700, -600]]
    assert dequantize(parts, IntScheme(4, 4, True)).tolist() == expected
    with pytest.raises(FormatError, match="does not divide"):
        pack(codes, torch.ones(1, 3), None, IntScheme(4, 4, True))


def test_many_chunks_of_rows_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = IntScheme(5, 32, False)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-16, 16, (37, 64), generator=generator)
    parts = pack(
        codes, torch.rand(37, 2, generator=generator), torch.randint(-16, 16, (37, 2), generator=generator), scheme
    )
    whole = dequantize(parts, scheme)
    monkeypatch.setattr("recompile.formats.packed_int._CPU_CHUNK_WEIGHTS", 64 * 5)
    assert torch.equal(dequantize(parts, scheme), whole)


@pytest.mark.parametrize("symmetric", [True, False])
def test_old_files_may_say_the_group_of_every_column(symmetric: bool) -> None:
    """Two rows, four columns, groups 1 0 0 1: scales 1 and 10 by hand."""
    scheme = IntScheme(4, 2, symmetric, act_order=True)
    zero_point = None if symmetric else torch.tensor([[1, -1], [0, 2]])
    codes = torch.tensor([[1, 2, 3, 4], [-5, -6, -7, -8]])
    parts = pack(codes, torch.tensor([[1.0, 10.0], [2.0, 4.0]]), zero_point, scheme)
    parts["weight_g_idx"] = torch.tensor([1, 0, 0, 1], dtype=torch.int32)
    expected = {
        True: [[10.0, 2.0, 3.0, 40.0], [-20.0, -12.0, -14.0, -32.0]],
        False: [[20.0, 1.0, 2.0, 50.0], [-28.0, -12.0, -14.0, -40.0]],
    }
    assert dequantize(parts, scheme).tolist() == expected[symmetric]


def test_a_group_of_minus_one_everywhere_is_a_placeholder() -> None:
    scheme = IntScheme(4, 2, True)
    parts = pack(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1.0, 10.0]]), None, scheme)
    parts["weight_g_idx"] = torch.full((4,), -1, dtype=torch.int32)
    assert dequantize(parts, scheme).tolist() == [[1.0, 2.0, 30.0, 40.0]]


# --- refusals ---------------------------------------------------------------------------------------------------------


def make_parts(scheme: IntScheme, out_features: int = 6, in_features: int = 64) -> dict[str, Tensor]:
    shape = (out_features, scheme.count_groups(in_features))
    zero_point = None if scheme.symmetric else torch.zeros(shape, dtype=torch.int8)
    parts = pack(torch.zeros(out_features, in_features, dtype=torch.int8), torch.ones(shape), zero_point, scheme)
    if scheme.act_order:
        parts["weight_g_idx"] = torch.zeros(in_features, dtype=torch.int32)
    return parts


SYMMETRIC, ASYMMETRIC = IntScheme(4, 32, True), IntScheme(4, 32, False)
REFUSED_PARTS = [
    (SYMMETRIC, "weight_packed", None, r"weight_packed: not found"),
    (SYMMETRIC, "weight_scale", None, r"weight_scale: not found"),
    (SYMMETRIC, "weight_shape", None, r"weight_shape: not found"),
    (ASYMMETRIC, "weight_zero_point", None, r"weight_zero_point: not found"),
    (SYMMETRIC, "weight_zero_point", torch.zeros(1, 2, dtype=torch.int32), r"weight_zero_point: found, wanted none"),
    (IntScheme(4, 32, True, act_order=True), "weight_g_idx", None, r"weight_g_idx: not found"),
    (SYMMETRIC, "weight_g_idx", torch.full((64,), 2, dtype=torch.int32), r"weight_g_idx: found groups 2 to 2"),
    (SYMMETRIC, "weight_g_idx", torch.tensor([-1] + [0] * 63, dtype=torch.int32), r"weight_g_idx: found groups -1 to"),
    (SYMMETRIC, "weight_g_idx", torch.zeros(63, dtype=torch.int32), r"weight_g_idx: .*\[63\], wanted .*\[64\]"),
    (SYMMETRIC, "weight_g_idx", torch.zeros(64), r"weight_g_idx: found torch.float32"),
    (SYMMETRIC, "weight_packed", torch.zeros(6, 8, dtype=torch.int64), r"weight_packed: found torch.int64"),
    (
        SYMMETRIC,
        "weight_packed",
        torch.zeros(6, 6, dtype=torch.int32),
        r"weight_packed: .*\[6, 6\], wanted \[6, 8\]",
    ),
    (
        SYMMETRIC,
        "weight_packed",
        torch.zeros(5, 8, dtype=torch.int32),
        r"weight_packed: .*\[5, 8\], wanted \[6, 8\]",
    ),
    (SYMMETRIC, "weight_packed", torch.zeros(48, dtype=torch.int32), r"weight_packed: found shape \[48\]"),
    (SYMMETRIC, "weight_scale", torch.ones(6, 1), r"weight_scale: found shape \[6, 1\], wanted \[6, 2\]"),
    (SYMMETRIC, "weight_scale", torch.ones(6), r"weight_scale: found shape \[6\]"),
    (SYMMETRIC, "weight_scale", torch.ones(6, 2, dtype=torch.int32), r"weight_scale: found torch.int32, wanted"),
    (SYMMETRIC, "weight_scale", torch.full((6, 2), torch.nan), r"weight_scale: found 12 NaN or infinite"),
    (SYMMETRIC, "weight_scale", torch.full((6, 2), -torch.inf).bfloat16(), r"weight_scale: found 12 NaN or infinite"),
    (SYMMETRIC, "weight_shape", torch.tensor([6, 64, 1]), r"weight_shape: found torch.int64 \[3\]"),
    (SYMMETRIC, "weight_shape", torch.tensor([6.0, 64.0]), r"weight_shape: found torch.float32"),
    (SYMMETRIC, "weight_shape", torch.tensor([0, 64]), r"weight_shape: found \[0, 64\], wanted positive"),
    (SYMMETRIC, "weight_shape", torch.tensor([64, 6]), r"weight_packed: found shape \[6, 8\], wanted \[64, 1\]"),
    (ASYMMETRIC, "weight_zero_point", torch.zeros(6, 2, dtype=torch.int8), r"weight_zero_point: found torch.int8"),
    (ASYMMETRIC, "weight_zero_point", torch.zeros(6, 2, dtype=torch.int32), r"weight_zero_point: .*wanted \[1, 2\]"),
]


@pytest.mark.parametrize(("scheme", "name", "value", "message"), REFUSED_PARTS)
def test_parts_that_do_not_fit_are_refused_by_name(
    scheme: IntScheme, name: str, value: Tensor | None, message: str
) -> None:
    parts = make_parts(scheme)
    dequantize(parts, scheme)  # sound before the change
    parts.pop(name, None)
    if value is not None:
        parts[name] = value
    with pytest.raises(FormatError, match=r"^model\.layers\.0\.mlp\.up_proj\." + message):
        dequantize(parts, scheme, "model.layers.0.mlp.up_proj")


def test_one_bad_scale_among_many_is_found() -> None:
    parts = make_parts(SYMMETRIC)
    parts["weight_scale"][3, 1] = torch.nan
    with pytest.raises(FormatError, match="found 1 NaN or infinite values in 12"):
        dequantize(parts, SYMMETRIC)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"]),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from([torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]),
    st.integers(-3, 70),
)
def test_any_wrong_part_raises_only_format_error(name: str, shape: list[int], dtype: torch.dtype, fill: int) -> None:
    parts = make_parts(ASYMMETRIC)
    parts[name] = torch.full(shape, fill).to(dtype)
    try:
        dense = dequantize(parts, ASYMMETRIC)
    except FormatError as error:
        assert "tensor.weight_" in str(error)  # noqa: PT017 (either outcome is right; the message is what is checked)
    else:
        assert list(dense.shape) == [6, 64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((2, 8), 4)}, r"codes: found values 4 to 4, wanted -4 to 3 for 3 bits"),
        ({"codes": torch.full((2, 8), -5)}, r"codes: found values -5"),
        ({"codes": torch.zeros(2, 8)}, r"codes: found torch.float32"),
        ({"codes": torch.zeros(16, dtype=torch.int8)}, r"codes: found shape \[16\]"),
        ({"scale": torch.ones(2, 1)}, r"scale: found shape \[2, 1\], wanted \[2, 2\]"),
        ({"scale": torch.full((2, 2), 1e6)}, r"scale: found NaN or infinite values as torch.float16"),
        ({"scale_dtype": torch.float64}, r"scale_dtype: found torch.float64"),
        ({"zero_point": None}, r"zero_point: found None"),
        ({"zero_point": torch.full((2, 2), 4)}, r"zero_point: found values 4 to 4"),
        ({"zero_point": torch.zeros(2, 2)}, r"zero_point: found torch.float32"),
        ({"scheme": IntScheme(3, 4, True)}, r"zero_point: found one, wanted None"),
        ({"scheme": IntScheme(3, 3, False)}, r"group_size 3 does not divide the 8 columns"),
    ],
)
def test_pack_refuses_what_the_stored_form_cannot_hold(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "codes": torch.zeros(2, 8, dtype=torch.int8),
        "scale": torch.ones(2, 2),
        "zero_point": torch.zeros(2, 2, dtype=torch.int8),
        "scheme": IntScheme(3, 4, False),
        "scale_dtype": torch.float16,
    }
    pack(**arguments)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        pack(**(arguments | change))  # type: ignore[arg-type]


# --- schemes and their config -----------------------------------------------------------------------------------------


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    assert IntScheme(4, 32, True).bits_per_weight(576) == 4.5
    assert IntScheme(4, 64, False).bits_per_weight(576) == 4 + 20 / 64
    assert IntScheme(3, None, True).bits_per_weight(1536) == pytest.approx(3 + 16 / 1536)
    assert IntScheme(8, None, False).bits_per_weight(100) == pytest.approx(8.24)


def test_bits_per_weight_is_the_stored_size() -> None:
    for scheme in (IntScheme(3, 32, True), IntScheme(6, 64, False), IntScheme(2, None, True)):
        parts = make_parts(scheme, out_features=32, in_features=128)  # no tail padding at these shapes
        stored_bits = 8 * sum(part.nbytes for name, part in parts.items() if name != "weight_shape")
        assert stored_bits / (32 * 128) == scheme.bits_per_weight(128)


def test_config_by_hand() -> None:
    assert IntScheme(4, 32, True).to_config() == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    assert IntScheme(8, None, False).to_config() == {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": "channel",
        "dynamic": False,
    }


@given(st.integers(1, 8), st.none() | st.integers(1, 4096), st.booleans())
def test_config_round_trip(bits: int, group_size: int | None, symmetric: bool) -> None:
    scheme = IntScheme(bits, group_size, symmetric)
    assert IntScheme.from_config(scheme.to_config()) == scheme


@pytest.mark.parametrize(
    ("config", "scheme"),
    [
        ({"num_bits": 4, "group_size": 128}, IntScheme(4, 128, True)),  # as the library infers it
        ({"num_bits": 4, "group_size": -1}, IntScheme(4, None, True)),
        ({"strategy": "channel"}, IntScheme(8, None, True)),
        ({"num_bits": 3, "strategy": "channel", "group_size": None, "symmetric": False}, IntScheme(3, None, False)),
        (
            {
                "num_bits": 4,
                "strategy": "group",
                "group_size": 64,
                "actorder": "static",
                "observer": "mse",
                "observer_kwargs": {},
                "zp_dtype": "torch.int8",
                "scale_dtype": None,
                "block_structure": None,
                "something_new": None,
            },
            IntScheme(4, 64, True),
        ),
        ({"num_bits": 4, "group_size": 64, "actorder": "group"}, IntScheme(4, 64, True, act_order=True)),
        ({"num_bits": 4, "group_size": 64, "actorder": "dynamic"}, IntScheme(4, 64, True, act_order=True)),
        ({"num_bits": 4, "group_size": 64, "actorder": True}, IntScheme(4, 64, True, act_order=True)),
    ],
)
def test_configs_that_other_tools_write_are_read(config: dict[str, object], scheme: IntScheme) -> None:
    assert IntScheme.from_config(config) == scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "float"}, "weights.type: found 'float'"),
        ({"strategy": "tensor"}, "weights.strategy: found 'tensor'"),
        ({"strategy": "block"}, "weights.strategy: found 'block'"),
        ({"strategy": "tensor_group"}, "weights.strategy: found 'tensor_group'"),
        ({"strategy": None, "group_size": None}, "weights.strategy: found 'tensor'"),
        ({"strategy": "channel"}, "weights.group_size: found 32"),
        ({"group_size": None}, "weights.group_size: found None"),
        ({"group_size": 0}, "weights.group_size: found 0"),
        ({"group_size": "32"}, "weights.group_size: found '32'"),
        ({"actorder": "sideways"}, "weights.actorder: found 'sideways'"),
        ({"dynamic": True}, "weights.dynamic: found True"),
        ({"dynamic": "local"}, "weights.dynamic: found 'local'"),
        ({"block_structure": [128, 128]}, r"weights.block_structure: found \[128, 128\]"),
        ({"scale_dtype": "torch.float8_e4m3fn"}, "weights.scale_dtype: found"),
        ({"something_new": 1}, "weights.something_new: found 1, wanted null"),
        ({"num_bits": 9}, "weights: bits: found 9"),
        ({"num_bits": 0}, "weights: bits: found 0"),
        ({"num_bits": 4.0}, "weights: bits: found 4.0"),
        ({"num_bits": True}, "weights: bits: found True"),
        ({"symmetric": "yes"}, "weights: symmetric: found 'yes'"),
    ],
)
def test_configs_that_are_not_packed_integers_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        IntScheme.from_config(IntScheme(4, 32, True).to_config() | change)


# --- the library itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_equal_to_the_compressed_tensors_library(bits: int) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors 0.20 is not installed")
    helpers = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    generator = torch.Generator().manual_seed(bits)
    scheme = IntScheme(bits, 5, False)
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (13, 35), generator=generator).to(torch.int8)
    zero_point = torch.randint(scheme.code_min, scheme.code_max + 1, (13, 7), generator=generator).to(torch.int8)
    parts = pack(codes, torch.ones(13, 7), zero_point, scheme)
    assert torch.equal(parts["weight_packed"], helpers.pack_to_int32(codes, bits))
    assert torch.equal(parts["weight_zero_point"], helpers.pack_to_int32(zero_point, bits, packed_dim=0))
    unpacked = helpers.unpack_from_int32(parts["weight_packed"], bits, torch.Size([13, 35]))
    assert torch.equal(unpack_rows(parts["weight_packed"], bits, 35).short() + scheme.code_min, unpacked.short())


def test_the_library_accepts_our_config() -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    quantization = importlib.import_module("compressed_tensors.quantization")
    for scheme in (IntScheme(4, 32, True), IntScheme(3, None, False), IntScheme(8, 128, False)):
        args = quantization.QuantizationArgs(**scheme.to_config())
        assert IntScheme.from_config(args.model_dump(mode="json")) == scheme
