"""8-bit floats: bytes by hand, partial blocks, both names of the scale, refusals, equality with compressed-tensors."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import FormatError
from recompile.formats.fp8 import Fp8Scheme, dequantize, read_scheme
from recompile.formats.scale_grid import CHANNEL, TENSOR, ScaleGrid

E4M3 = torch.float8_e4m3fn
# e4m3: sign, four bits of exponent (bias 7), three of mantissa.
# 0x38 = 0 0111 000 = 1; 0xBC = -(1 + 4/8) = -1.5; 0x7E = 2^8 * 1.75 = 448; 0x01 = 2^-9; 0x00, 0x80 = 0; 0x40 = 2.
BYTES = [[0x38, 0xBC, 0x7E], [0x01, 0x80, 0x40]]
VALUES = [[1.0, -1.5, 448.0], [2.0**-9, 0.0, 2.0]]


def parts_of(scale: object, name: str = "weight_scale", dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"weight": torch.tensor(BYTES, dtype=torch.uint8).view(E4M3), name: torch.tensor(scale, dtype=dtype)}


GOLDEN = [
    (TENSOR, [2.0], [[2.0, -3.0, 896.0], [2.0**-8, 0.0, 4.0]]),
    (TENSOR, 1.0, VALUES),
    (CHANNEL, [[2.0], [512.0]], [[2.0, -3.0, 896.0], [1.0, 0.0, 1024.0]]),
    (CHANNEL, [2.0, 512.0], [[2.0, -3.0, 896.0], [1.0, 0.0, 1024.0]]),  # one a row, without the second axis
    (ScaleGrid(1, 2), [[2.0, 0.5], [1.0, 4.0]], [[2.0, -3.0, 224.0], [2.0**-9, 0.0, 8.0]]),
    (ScaleGrid(2, 2), [[2.0, 0.25]], [[2.0, -3.0, 112.0], [2.0**-8, 0.0, 0.5]]),  # the right block is partial
    (ScaleGrid(128, 128), [[4.0]], [[4.0, -6.0, 1792.0], [2.0**-7, 0.0, 8.0]]),
]


@pytest.mark.parametrize(("grid", "scale", "dense"), GOLDEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_by_hand(grid: ScaleGrid, scale: object, dense: list[list[float]], dtype: torch.dtype) -> None:
    found = dequantize(parts_of(scale, dtype=dtype), Fp8Scheme(grid))
    assert found.dtype == torch.float32
    assert found.tolist() == dense


def test_blocks_at_both_edges_have_scales_of_their_own() -> None:
    """3 x 5 weights of one, blocks 2 x 2: every weight reads its block's number."""
    parts = {"weight": torch.ones(3, 5).to(E4M3), "weight_scale": torch.tensor([[1.0, 2, 3], [4, 5, 6]])}
    assert dequantize(parts, Fp8Scheme(ScaleGrid(2, 2))).tolist() == [
        [1, 1, 2, 2, 3],
        [1, 1, 2, 2, 3],
        [4, 4, 5, 5, 6],
    ]


def test_chunks_of_rows_meet_inside_blocks() -> None:
    """More weights than one chunk holds (2^18), block rows that do not divide a chunk's rows."""
    rows, columns = 700, 1024
    scale = torch.arange(1.0, 1 + 7 * 4).reshape(7, 4)  # blocks of 100 x 300
    parts = {"weight": torch.ones(rows, columns).to(E4M3), "weight_scale": scale}
    found = dequantize(parts, Fp8Scheme(ScaleGrid(100, 300)))
    expected = torch.stack(
        [torch.stack([scale[o // 100, i // 300] for i in range(columns)]) for o in range(0, rows, 50)]
    )
    assert torch.equal(found[::50], expected)


def test_e5m2_is_read() -> None:
    """e5m2: 0x3C = 1, 0x41 = 2 * 1.25 = 2.5."""
    parts = {"weight": torch.tensor([[0x3C, 0x41]], dtype=torch.uint8).view(torch.float8_e5m2)}
    assert dequantize(parts | {"weight_scale": torch.tensor([2.0])}, Fp8Scheme(TENSOR)).tolist() == [[2.0, 5.0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, r"weight: not found"),
        ({"weight_scale": None}, r"weight_scale: not found"),
        ({"weight": torch.zeros(2, 3)}, r"weight: found torch.float32"),
        ({"weight": torch.zeros(0, 3).to(E4M3)}, r"weight: found shape \[0, 3\]"),
        ({"weight_scale": torch.ones(3, 1)}, r"weight_scale: found shape \[3, 1\], wanted \[2, 1\].*each row"),
        ({"weight_scale": torch.ones(1)}, r"weight_scale: found shape \[1\], wanted \[2, 1\]"),
        ({"weight_scale": torch.ones(2, 1, dtype=torch.uint8)}, r"weight_scale: found torch.uint8"),
        ({"weight_scale": torch.tensor([[1.0], [torch.inf]])}, r"weight_scale: found 1 NaN or infinite values in 2"),
        ({"weight": torch.full((2, 3), 0x7F, dtype=torch.uint8).view(E4M3)}, r"weight: found 6 NaN"),
        ({"weight_zero_point": torch.ones(2, 1).to(E4M3)}, r"weight_zero_point: found values other than 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    parts = {**parts_of([[2.0], [1.0]]), **change}
    with pytest.raises(FormatError, match=r"^a\.b\." + message):
        dequantize({name: part for name, part in parts.items() if part is not None}, Fp8Scheme(CHANNEL), "a.b")


def test_zero_points_of_zero_are_ignored() -> None:
    parts = parts_of([[2.0], [1.0]])
    plain = dequantize(parts, Fp8Scheme(CHANNEL))
    assert torch.equal(dequantize(parts | {"weight_zero_point": torch.zeros(2, 1).to(E4M3)}, Fp8Scheme(CHANNEL)), plain)


@pytest.mark.parametrize(
    ("weights", "grid"),
    [
        ({"strategy": "tensor"}, TENSOR),
        ({"strategy": "channel"}, CHANNEL),
        ({"strategy": "block", "block_structure": [128, 64]}, ScaleGrid(128, 64)),
        ({"strategy": "block", "block_structure": "128x64"}, ScaleGrid(128, 64)),
        ({"block_structure": [128, 64]}, ScaleGrid(128, 64)),
        ({"strategy": "group", "group_size": 64}, ScaleGrid(1, 64)),
    ],
)
def test_configs_are_read(weights: dict[str, object], grid: ScaleGrid) -> None:
    assert read_scheme({"num_bits": 8, "type": "float"} | weights) == Fp8Scheme(grid)


@pytest.mark.parametrize(
    "change", [{"type": "int"}, {"num_bits": 4}, {"symmetric": False}, {"strategy": "block"}, {"dynamic": True}]
)
def test_configs_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(FormatError, match=f"weights.({next(iter(change))}|block_structure)"):
        read_scheme({"num_bits": 8, "type": "float", "strategy": "channel"} | change)


def write(directory: Path, parts: dict[str, Tensor], quantization: dict[str, object] | None) -> Path:
    directory.mkdir()
    config = {"model_type": "llama"} | ({} if quantization is None else {"quantization_config": quantization})
    (directory / "config.json").write_text(json.dumps(config))
    save_file({f"a.b.{name}": part for name, part in parts.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("parts", "quantization", "dense"),
    [
        # DeepSeek: weight_scale_inv multiplies, blocks from the config
        (
            parts_of([[2.0, 0.25]], "weight_scale_inv"),
            {"quant_method": "fp8", "weight_block_size": [2, 2]},
            [[2.0, -3.0, 112.0], [2.0**-8, 0.0, 0.5]],
        ),
        (parts_of([3.0]), {"quant_method": "fp8"}, [[3.0, -4.5, 1344.0], [3 * 2.0**-9, 0.0, 6.0]]),
        (parts_of(3.0), {"quant_method": "modelopt"}, [[3.0, -4.5, 1344.0], [3 * 2.0**-9, 0.0, 6.0]]),
        (parts_of([[2.0], [512.0]]), {"quant_method": "fbgemm_fp8"}, [[2.0, -3.0, 896.0], [1.0, 0.0, 1024.0]]),
    ],
)
def test_configs_without_groups(
    tmp_path: Path, parts: dict[str, Tensor], quantization: dict[str, object], dense: list[list[float]]
) -> None:
    checkpoint = open_checkpoint(write(tmp_path / "m", parts, quantization))
    assert checkpoint.modules["a.b"].shape == (2, 3)
    assert checkpoint.load("a.b.weight").tolist() == dense


def test_modelopt_may_keep_its_config_in_a_file_of_its_own(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", parts_of(3.0), None)
    (directory / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert open_checkpoint(directory).load("a.b.weight")[0].tolist() == [3.0, -4.5, 1344.0]


@pytest.mark.parametrize(
    ("parts", "quantization", "message"),
    [
        (
            parts_of([[2.0, 0.25]], "weight_scale_inv"),
            {"quant_method": "fp8"},
            r"a\.b\.weight_scale_inv: .*weight_block",
        ),
        ({"weight": torch.ones(2, 3).to(E4M3)}, {"quant_method": "fp8"}, r"a\.b\.weight_scale: not found"),
        (
            parts_of([2.0]),
            {"quant_method": "exl2"},
            "quant_method in config.json is 'exl2', and a.b is stored as float",
        ),
        (parts_of([2.0]), None, "no target of config_groups"),
        (
            parts_of([[2.0, 0.25]], "weight_scale_inv"),
            {"quant_method": "fp8", "weight_block_size": "many"},
            "weight_block_size: found 'many'",
        ),
    ],
)
def test_checkpoints_that_do_not_say_how_to_read_them(
    tmp_path: Path, parts: dict[str, Tensor], quantization: dict[str, object] | None, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        open_checkpoint(write(tmp_path / "m", parts, quantization)).load("a.b.weight")


@settings(max_examples=80, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    scale_shape=st.lists(st.integers(0, 4), max_size=3),
    grid=st.builds(ScaleGrid, st.sampled_from([None, 1, 2]), st.sampled_from([None, 1, 2])),
    scale_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32, E4M3]),
)
def test_any_shapes_are_read_or_refused(
    shape: tuple[int, int], scale_shape: list[int], grid: ScaleGrid, scale_dtype: torch.dtype
) -> None:
    parts = {"weight": torch.ones(shape).to(E4M3), "weight_scale": torch.ones(scale_shape).to(scale_dtype)}
    with contextlib.suppress(FormatError):
        assert dequantize(parts, Fp8Scheme(grid)).tolist() == torch.ones(shape).tolist()


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_equal_to_the_compressed_tensors_library(strategy: str) -> None:
    pytest.importorskip("compressed_tensors")
    naive = importlib.import_module("compressed_tensors.compressors.naive_quantized.base")
    pytest.importorskip("compressed_tensors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    weights |= {"block_structure": [32, 16]} if strategy == "block" else {}
    scheme = read_scheme(weights)
    generator = torch.Generator().manual_seed(3)
    shape = (1,) if strategy == "tensor" else scheme.grid.shape(40, 72)
    parts = {
        "weight": torch.randn(40, 72, generator=generator).to(E4M3),
        "weight_scale": torch.rand(shape, generator=generator),
    }
    group = quantization.QuantizationScheme(targets=["Linear"], weights=quantization.QuantizationArgs(**weights))
    theirs = naive.FloatQuantizationCompressor.decompress(dict(parts), group)["weight"]
    assert torch.equal(dequantize(parts, scheme), theirs.float())
