"""nvfp4: nibbles by hand, both spellings of the tensor's scale, refusals, equality with compressed-tensors."""

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
from recompile.formats.fp4 import Nvfp4Scheme, dequantize, read_scheme, unpack_e2m1

E4M3 = torch.float8_e4m3fn
SCHEME = Nvfp4Scheme()
CONFIG = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}

# Columns 2k and 2k+1 are the low and high nibble: 0x10 is 0, 0.5; 0x32 is 1, 1.5; 0x54 is 2, 3; 0x76 is 4, 6; a set top
# bit is a minus.
ALL_BYTES = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
ALL_VALUES = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def test_the_even_column_is_the_low_nibble() -> None:
    found = unpack_e2m1(torch.tensor([ALL_BYTES], dtype=torch.uint8))
    assert found.dtype == torch.float32
    assert found.tolist() == [ALL_VALUES]
    assert found[0, 8].signbit(), "code 8 is minus zero"


def parts_of(groups: int = 2, rows: int = 1) -> dict[str, Tensor]:
    """All sixteen values in every group; scales 1.5 and 448 by turns; the tensor's scale is 4."""
    return {
        "weight_packed": torch.tensor([ALL_BYTES * groups] * rows, dtype=torch.uint8),
        "weight_scale": torch.tensor([([1.5, 448.0] * groups)[:groups]] * rows).to(E4M3),
        "weight_global_scale": torch.tensor([4.0]),
    }


def test_the_scale_of_the_tensor_divides() -> None:
    expected = [value * 1.5 / 4 for value in ALL_VALUES] + [value * 112 for value in ALL_VALUES]
    assert dequantize(parts_of(), SCHEME).tolist() == [expected]


def test_in_modelopt_spelling_it_multiplies() -> None:
    parts = parts_of()
    other = {"weight": parts["weight_packed"], "weight_scale": parts["weight_scale"]}
    other["weight_scale_2"] = torch.tensor(0.25)
    found = dequantize(other, Nvfp4Scheme("weight", "weight_scale_2", divides=False))
    assert torch.equal(found, dequantize(parts, SCHEME))


def test_modelopt_files_are_told_by_their_parts(tmp_path: Path) -> None:
    parts = parts_of()
    stored = {"a.b.weight": parts["weight_packed"], "a.b.weight_scale": parts["weight_scale"]}
    stored |= {"a.b.weight_scale_2": torch.tensor(0.25), "a.b.input_scale": torch.tensor(1.0)}
    save_file(stored, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.modules["a.b"].shape == (1, 32)
    assert torch.equal(checkpoint.load("a.b.weight"), dequantize(parts, SCHEME))
    # its AWQ multiplies the inputs first, which is the same as multiplying the columns
    scale = torch.linspace(0.5, 2, 32)
    save_file(stored | {"a.b.pre_quant_scale": scale.bfloat16()}, tmp_path / "model.safetensors")
    found = open_checkpoint(tmp_path).load("a.b.weight")
    assert torch.equal(found, dequantize(parts, SCHEME) * scale.bfloat16().float())
    save_file(stored | {"a.b.pre_quant_scale": scale[:31].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match=r"pre_quant_scale: found \[31\]"):
        open_checkpoint(tmp_path).load("a.b.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, "weight_packed: not found"),
        ({"weight_scale": None}, "weight_scale: not found"),
        ({"weight_global_scale": None}, "weight_global_scale: not found"),
        ({"weight_packed": torch.zeros(1, 16, dtype=torch.int8)}, "weight_packed: found torch.int8"),
        ({"weight_packed": torch.zeros(1, 12, dtype=torch.uint8)}, "weight_packed: found 24 columns"),
        ({"weight_packed": torch.zeros(16, dtype=torch.uint8)}, r"weight_packed: found shape \[16\]"),
        ({"weight_scale": torch.ones(1, 1).to(E4M3)}, r"weight_scale: found shape \[1, 1\], wanted \[1, 2\]"),
        ({"weight_scale": torch.ones(1, 2)}, "weight_scale: found torch.float32"),
        ({"weight_scale": torch.full((1, 2), 0x7F, dtype=torch.uint8).view(E4M3)}, "weight_scale: found 2 NaN"),
        ({"weight_global_scale": torch.tensor([0.0])}, r"weight_global_scale: found \[1\] \[0.0\], wanted one finite"),
        ({"weight_global_scale": torch.tensor([-1.0])}, "weight_global_scale: found"),
        ({"weight_global_scale": torch.tensor([torch.nan])}, "weight_global_scale: found"),
        ({"weight_global_scale": torch.tensor([torch.inf])}, "weight_global_scale: found"),
        ({"weight_global_scale": torch.ones(2)}, r"weight_global_scale: found \[2\]"),
        ({"weight_global_scale": torch.tensor([1e-38])}, "weight_global_scale with weight_scale: found 1 NaN or inf"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(change: dict[str, Tensor | None], message: str) -> None:
    parts = {**parts_of(), **change}
    with pytest.raises(FormatError, match=r"^a\.b\." + message):
        dequantize({name: part for name, part in parts.items() if part is not None}, SCHEME, "a.b")


def test_configs() -> None:
    assert read_scheme(CONFIG | {"scale_dtype": "torch.float8_e4m3fn"}) == SCHEME
    for change in ({"num_bits": 8}, {"type": "int"}, {"group_size": 32}, {"strategy": "group"}, {"symmetric": False}):
        with pytest.raises(FormatError, match=f"weights.{next(iter(change))}"):
            read_scheme(CONFIG | change)


@settings(max_examples=60, deadline=None)
@given(
    packed=st.tuples(st.integers(0, 3), st.integers(0, 24)),
    scale=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    whole=st.floats(width=32),
)
def test_any_shapes_are_read_or_refused(packed: tuple[int, int], scale: tuple[int, int], whole: float) -> None:
    parts = {
        "weight_packed": torch.full(packed, 0x22, dtype=torch.uint8),
        "weight_scale": torch.ones(scale).to(E4M3),
        "weight_global_scale": torch.tensor([whole]),
    }
    with contextlib.suppress(FormatError):
        found = dequantize(parts, SCHEME)
        assert found.shape == (packed[0], packed[1] * 2)
        assert bool(found.isfinite().all())


def test_equal_to_the_compressed_tensors_library() -> None:
    """In bfloat16, which is what the library computes in."""
    pytest.importorskip("compressed_tensors")
    nvfp4 = importlib.import_module("compressed_tensors.compressors.nvfp4.base")
    pytest.importorskip("compressed_tensors")
    presets = importlib.import_module("compressed_tensors.quantization")
    generator = torch.Generator().manual_seed(4)
    parts = {
        "weight_packed": torch.randint(0, 256, (40, 32), generator=generator, dtype=torch.uint8),
        "weight_scale": (torch.rand(40, 4, generator=generator) * 400).to(E4M3),
        "weight_global_scale": torch.tensor([8.0]),  # a power of two: the library's bfloat16 values stay exact
    }
    group = presets.preset_name_to_scheme("NVFP4A16", ["Linear"])
    theirs = nvfp4.NVFP4PackedCompressor.decompress(dict(parts), group)["weight"]
    ours = dequantize(parts, SCHEME)
    assert torch.equal(ours.to(torch.bfloat16), theirs)


def test_the_config_of_the_library_is_read() -> None:
    pytest.importorskip("compressed_tensors")
    presets = importlib.import_module("compressed_tensors.quantization")
    for name in ("NVFP4", "NVFP4A16"):
        weights = presets.preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")["weights"]
        assert read_scheme(weights) == SCHEME
