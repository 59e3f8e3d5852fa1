"""int8 weights that are not packed: values by hand, every strategy, refusals, equality with compressed-tensors."""

from __future__ import annotations

import contextlib
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.int_plain import PlainIntScheme, dequantize, read_scheme
from recompile.formats.scale_grid import CHANNEL, TENSOR, ScaleGrid

CODES = [[1, -2, 3, -4, 127], [5, 6, -7, 8, -128]]


def parts_of(scale: object, zero_point: object = None) -> dict[str, Tensor]:
    parts = {"weight": torch.tensor(CODES, dtype=torch.int8), "weight_scale": torch.tensor(scale, dtype=torch.bfloat16)}
    if zero_point is not None:
        parts["weight_zero_point"] = torch.tensor(zero_point, dtype=torch.int8)
    return parts


GOLDEN = [
    ("tensor", TENSOR, [0.5], None, [[0.5, -1, 1.5, -2, 63.5], [2.5, 3, -3.5, 4, -64]]),
    ("tensor, a scalar", TENSOR, 2.0, None, [[2, -4, 6, -8, 254], [10, 12, -14, 16, -256]]),
    ("channel", CHANNEL, [[2.0], [0.5]], None, [[2, -4, 6, -8, 254], [2.5, 3, -3.5, 4, -64]]),
    # groups of two columns; the third has one
    ("group", ScaleGrid(1, 2), [[1, 2, 4], [8, 0.5, 2]], None, [[1, -2, 6, -8, 508], [40, 48, -3.5, 4, -256]]),
    ("tensor, zero point", TENSOR, [2.0], [1], [[0, -6, 4, -10, 252], [8, 10, -16, 14, -258]]),
    ("channel, zero point", CHANNEL, [[2.0], [1.0]], [[-1], [3]], [[4, -2, 8, -6, 256], [2, 3, -10, 5, -131]]),
    (
        "group, zero point at the ends of the range",
        ScaleGrid(1, 2),
        [[1, 2, 4], [8, 0.5, 2]],
        [[1, 0, 127], [-3, 8, -128]],
        [[0, -3, 6, -8, 0], [64, 72, -7.5, 0, 0]],
    ),
]


@pytest.mark.parametrize(("grid", "scale", "zero", "dense"), [g[1:] for g in GOLDEN], ids=[g[0] for g in GOLDEN])
def test_values_by_hand(grid: ScaleGrid, scale: object, zero: object, dense: list[list[float]]) -> None:
    scheme = PlainIntScheme(8, grid, zero is None)
    found = dequantize(parts_of(scale, zero), scheme)
    assert found.dtype == torch.float32
    assert found.tolist() == dense


def test_a_symmetric_module_may_carry_zero_points_of_zero_only() -> None:
    scheme = PlainIntScheme(8, CHANNEL, True)
    assert torch.equal(
        dequantize(parts_of([[2.0], [1.0]], [[0], [0]]), scheme), dequantize(parts_of([[2.0], [1.0]]), scheme)
    )
    with pytest.raises(FormatError, match=r"^m\.weight_zero_point: found values other than 0"):
        dequantize(parts_of([[2.0], [1.0]], [[0], [1]]), scheme, "m")


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (PlainIntScheme(8, CHANNEL, True), {"weight": None}, r"weight: not found"),
        (PlainIntScheme(8, CHANNEL, True), {"weight_scale": None}, r"weight_scale: not found"),
        (PlainIntScheme(8, CHANNEL, False), {}, r"weight_zero_point: not found"),
        (PlainIntScheme(8, TENSOR, True), {}, r"weight_scale: found shape \[2, 1\], wanted \[1, 1\].*whole tensor"),
        (PlainIntScheme(8, ScaleGrid(1, 2), True), {}, r"weight_scale: found shape \[2, 1\], wanted \[2, 3\]"),
        (PlainIntScheme(8, CHANNEL, True), {"weight": torch.zeros(2, 5)}, r"weight: found torch.float32"),
        (PlainIntScheme(8, CHANNEL, True), {"weight": torch.zeros(5, dtype=torch.int8)}, r"weight: found shape \[5\]"),
        (
            PlainIntScheme(8, CHANNEL, True),
            {"weight_scale": torch.ones(2, 1, dtype=torch.int32)},
            r"weight_scale: found",
        ),
        (PlainIntScheme(8, CHANNEL, True), {"weight_scale": torch.tensor([[1], [torch.nan]])}, r"weight_scale: .*NaN"),
        (
            PlainIntScheme(8, CHANNEL, False),
            {"weight_zero_point": torch.zeros(2, 1)},
            r"weight_zero_point: found torch.f",
        ),
        (PlainIntScheme(7, CHANNEL, True), {}, r"weight: found codes -128 to 127, wanted -64 to 63 for 7 bits"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    scheme: PlainIntScheme, change: dict[str, Tensor | None], message: str
) -> None:
    parts = {**parts_of([[2.0], [1.0]]), **change}
    with pytest.raises(FormatError, match=r"^a\.b\." + message):
        dequantize({name: part for name, part in parts.items() if part is not None}, scheme, "a.b")


@pytest.mark.parametrize(
    ("weights", "scheme"),
    [
        ({"num_bits": 8, "strategy": "channel"}, PlainIntScheme(8, CHANNEL, True)),
        ({}, PlainIntScheme(8, TENSOR, True)),  # the library's defaults
        ({"group_size": -1}, PlainIntScheme(8, CHANNEL, True)),
        ({"group_size": 64, "symmetric": False}, PlainIntScheme(8, ScaleGrid(1, 64), False)),
        ({"num_bits": 4, "strategy": "tensor"}, PlainIntScheme(4, TENSOR, True)),
        ({"strategy": "block", "block_structure": "64x32"}, PlainIntScheme(8, ScaleGrid(64, 32), True)),
        ({"strategy": "channel", "actorder": None, "observer": "mse"}, PlainIntScheme(8, CHANNEL, True)),
    ],
)
def test_configs_are_read(weights: dict[str, object], scheme: PlainIntScheme) -> None:
    assert read_scheme(weights) == scheme


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"type": "float"}, "weights.type: found 'float', wanted 'int'"),
        ({"num_bits": 9}, "weights.num_bits: found 9"),
        ({"num_bits": True}, "weights.num_bits: found True"),
        ({"dynamic": True}, "weights.dynamic"),
        ({"actorder": "group"}, "weights.actorder"),
        ({"symmetric": "yes"}, "weights.symmetric"),
        ({"strategy": "group"}, "weights.group_size: found None"),
        ({"strategy": "channel", "group_size": 32}, "weights.group_size: found 32"),
        ({"strategy": "token"}, "weights.strategy: found 'token'"),
        ({"strategy": "block"}, "weights.block_structure: found None"),
        ({"strategy": "block", "block_structure": [0, 1]}, r"weights.block_structure: found \[0, 1\]"),
        ({"new": 1}, "weights.new: found 1, known keys"),
    ],
)
def test_configs_that_do_not_fit_are_refused(weights: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_scheme(weights)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.text(max_size=8), st.lists(st.integers(-1, 3), max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(
    weights=st.dictionaries(
        st.sampled_from(["num_bits", "type", "strategy", "group_size", "block_structure", "symmetric", "actorder"]),
        JUNK,
    )
)
def test_any_config_is_read_or_refused(weights: dict[str, object]) -> None:
    with contextlib.suppress(FormatError):
        assert isinstance(read_scheme(weights), PlainIntScheme)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_equal_to_the_compressed_tensors_library(strategy: str, symmetric: bool) -> None:
    pytest.importorskip("compressed_tensors")
    naive = importlib.import_module("compressed_tensors.compressors.naive_quantized.base")
    pytest.importorskip("compressed_tensors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    weights = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": symmetric}
    weights |= {"group_size": 32} if strategy == "group" else {}
    scheme = read_scheme(weights)
    generator = torch.Generator().manual_seed(3)
    shape = (1,) if strategy == "tensor" else scheme.grid.shape(48, 64)
    parts = {
        "weight": torch.randint(-128, 128, (48, 64), generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(shape, generator=generator),
    }
    if not symmetric:
        parts["weight_zero_point"] = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    group = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    theirs = naive.IntQuantizationCompressor.decompress(dict(parts), group)["weight"]
    assert torch.equal(dequantize(parts, scheme), theirs)
