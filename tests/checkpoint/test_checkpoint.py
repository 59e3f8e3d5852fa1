"""Opening a model directory: what is read and what not, and one message for everything that can be wrong with it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.checkpoint import checkpoint as checkpoint_module
from recompile.checkpoint.checkpoint import (
    INDEX_NAME,
    Checkpoint,
    StoredModule,
    TensorInfo,
    dense_dtype,
    open_checkpoint,
    quant_method,
    split_name,
)
from recompile.checkpoint.module_names import template_of
from recompile.checkpoint.safetensors_files import OpenFiles, read_safetensors_header, read_tensor
from recompile.errors import CheckpointError, FormatError, MissingWeight, UnsupportedError
from recompile.formats import FORMATS
from tests import tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small dense model that may be damaged."""
    return tiny.copy_of(tiny.base("llama-2"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.base("llama-2", torch.bfloat16, 0, 3), tmp_path / "model")


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(file: Path, **changes: Tensor | None) -> None:
    tensors = {**load_file(file), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


# ---- one file's header -----------------------------------------------------------------------------------------------


def raw_file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_by_hand(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry("F32", [1], 4, 8),  # the header's order is not the data's
        "a": entry("BF16", [2, 1], 0, 4),
        "none": entry("I64", [0, 3], 8, 8),
    }
    path = raw_file(tmp_path / "x.safetensors", header, bytes(range(8)))
    tensors, metadata = read_safetensors_header(path)
    start = 8 + len(json.dumps(header))
    assert metadata == {"format": "pt"}
    assert tensors == {
        "b": TensorInfo("b", "F32", (1,), path, start + 4, 4),
        "a": TensorInfo("a", "BF16", (2, 1), path, start, 4),
        "none": TensorInfo("none", "I64", (0, 3), path, start + 8, 0),
    }
    assert tensors["a"].numel == 2
    assert read_tensor(tensors["b"]).view(torch.uint8).tolist() == [4, 5, 6, 7]
    assert read_tensor(tensors["none"]).shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry("F32", [1], 0, 4)}, b"123", "truncated"),
        ({"a": entry("F32", [1], 0, 4)}, b"12345", "longer than its header says"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, bytes(12), "tensor b leaves 4 bytes unused"),
        ({"a": entry("F32", [1], 4, 8)}, bytes(8), "tensor a leaves 4 bytes unused"),
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 2, 6)}, bytes(6), "tensor b overlaps"),
        ({"a": entry("F32", [2], 0, 4)}, bytes(4), r"tensor a F32 \[2\] needs 8 bytes, its offsets give 4"),
        ({"a": entry("F31", [1], 0, 4)}, bytes(4), "tensor a has dtype 'F31'"),
        ({"a": entry("F32", [-1], 0, 4)}, bytes(4), r"tensor a has shape \[-1\]"),
        ({"a": entry("F32", [1], -4, 0)}, bytes(4), "tensor a has shape"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "entry of tensor a is malformed"),
        ({"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}}, bytes(4), "entry of tensor a is malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4), "entry of tensor a is malformed"),
        ({"a": 5}, bytes(4), "entry of tensor a is malformed"),
        ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4), "tensor a"),
        (b"{not json", b"", "the safetensors header.*: not (JSON|UTF-8)"),
        (b"\xff\xfe", b"", "the safetensors header.*: not (JSON|UTF-8)"),
        (b"[1, 2]", b"", "header is a list, wanted an object"),
    ],
)
def test_a_damaged_header_is_one_message(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_safetensors_header(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 100) + b"{}", struct.pack("<Q", 2**63)])
def test_a_file_too_short_for_its_header(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a whole safetensors file"):
        read_safetensors_header(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read: No such file"):
        read_safetensors_header(tmp_path / "x.safetensors")


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10**9))
def test_cut_anywhere_a_shard_is_refused(cut: int) -> None:
    whole = (tiny.base("llama-2") / "model.safetensors").read_bytes()
    path = tiny.base("llama-2").parent / "cut.safetensors"
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_safetensors_header(path)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10**9), value=st.integers(0, 255))
def test_any_changed_byte_of_a_header_is_refused_or_harmless(at: int, value: int) -> None:
    """Never another exception, never a range outside the file."""
    whole = bytearray((tiny.base("llama-2") / "model.safetensors").read_bytes())
    header_bytes = struct.unpack("<Q", whole[:8])[0]
    whole[at % (8 + header_bytes)] = value
    path = tiny.base("llama-2").parent / "changed.safetensors"
    path.write_bytes(whole)
    try:
        tensors, _ = read_safetensors_header(path)
    except CheckpointError:
        return
    assert all(info.offset >= 8 and info.offset + info.size_bytes <= len(whole) for info in tensors.values())


def test_headers_are_those_that_safetensors_reads() -> None:
    file = tiny.base("llama") / "model.safetensors"
    tensors, _ = read_safetensors_header(file)
    wanted = load_file(file)
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert tensors[name].shape == tuple(value.shape)
        found = read_tensor(tensors[name])
        assert found.dtype == value.dtype
        assert torch.equal(found, value)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float8_e4m3fn, torch.float64, torch.complex64]
)
def test_tensors_of_any_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(6).reshape(2, 3).to(dtype)
    save_file({"x": value}, tmp_path / "x.safetensors")
    tensors, _ = read_safetensors_header(tmp_path / "x.safetensors")
    found = read_tensor(tensors["x"])
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def test_a_file_that_shrinks_after_it_was_opened(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    os.truncate(last.path, last.offset + last.size_bytes - 1)
    with pytest.raises(CheckpointError, match=f"ends inside tensor {last.name}"):
        checkpoint.read(last.name)
    with pytest.raises(CheckpointError, match=f"ends inside tensor {last.name}"):
        checkpoint.read_bytes(last)


# ---- the directory ---------------------------------------------------------------------------------------------------


def test_what_is_no_model_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such model directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: is a file"):
        open_checkpoint(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: not a model directory: it has no config\.json"):
        open_checkpoint(tmp_path / "empty")
    (tmp_path / "out.recompile-partial").mkdir()
    with pytest.raises(CheckpointError, match="half written by an earlier run"):
        open_checkpoint(tmp_path / "out.recompile-partial")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1,\n  "b": }', r"config\.json:2:8: not JSON"),
        (b"[]", r"config\.json: holds a list, wanted an object"),
        (b"\xff{}", r"config\.json: not UTF-8"),
        (b"", r"config\.json:1:1: not JSON"),
    ],
)
def test_a_damaged_config(model: Path, text: bytes, says: str) -> None:
    (model / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(model)


def test_a_directory_without_shards(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model: has no \*\.safetensors .*\.bin files: convert them"):
        open_checkpoint(model)
    (model / "pytorch_model.bin").unlink()
    (model / INDEX_NAME).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="though it has an index of them"):
        open_checkpoint(model)


def test_shards_and_index(sharded: Path) -> None:
    found, whole = open_checkpoint(sharded), open_checkpoint(tiny.base("llama-2"))
    assert found.tensors.keys() == whole.tensors.keys()
    assert found.modules.keys() == whole.modules.keys()
    assert found.size_bytes == whole.size_bytes
    assert found.fingerprint == whole.fingerprint
    assert found.notes == ()
    for name in whole.tensors:
        assert torch.equal(found.read(name), whole.read(name))


def test_a_shard_that_is_missing(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00003\.safetensors is listed in .* and missing"):
        open_checkpoint(sharded)


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: truncated"):
        open_checkpoint(sharded)


def edit_index(directory: Path, change: Callable[[dict[str, str]], Any]) -> None:
    content = json.loads((directory / INDEX_NAME).read_text())
    change(content["weight_map"])
    (directory / INDEX_NAME).write_text(json.dumps(content))


def test_an_index_that_lists_more_than_there_is(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.update(ghost="model-00001-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match="lists 1 tensors that no shard holds, first ghost"):
        open_checkpoint(sharded)


def test_an_index_that_names_the_wrong_shard(sharded: Path) -> None:
    edit_index(sharded, lambda names: names.update({"lm_head.weight": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match=r"says lm_head\.weight is in model-00001.*, it is in model-0000[23]"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", 'no "weight_map" object'),
        ('{"weight_map": {"a": 1}}', 'no "weight_map" object'),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "names a file outside its directory"),
        ("{", "not JSON"),
    ],
)
def test_a_damaged_index(sharded: Path, text: str, says: str) -> None:
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    edit_tensors(sharded / "model-00001-of-00003.safetensors", lm_head__weight=torch.zeros(256, 64))
    edit_tensors(sharded / "model-00002-of-00003.safetensors", lm_head__weight=torch.zeros(256, 64))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in both model-00001.* and model-0000[23]"):
        open_checkpoint(sharded)


def test_a_stray_shard_is_ignored_where_engines_ignore_it(model: Path) -> None:
    save_file({"stray.weight": torch.zeros(2, 2)}, model / "old.safetensors")
    found = open_checkpoint(model)
    assert "stray.weight" not in found.tensors
    assert len(found.notes) == 1
    assert "ignored old.safetensors" in found.notes[0]


def test_a_stray_shard_counts_where_engines_load_it(model: Path) -> None:
    """EXL2 engines load every file of the directory, and read no index."""
    edit_config(model, quantization_config={"quant_method": "exl2"})
    save_file({"stray.weight": torch.zeros(2, 2)}, model / "old.safetensors")
    assert "stray.weight" in open_checkpoint(model).tensors
    (model / INDEX_NAME).write_text('{"weight_map": {"stale": "gone.safetensors"}}')
    assert "stray.weight" in open_checkpoint(model).tensors, "EXL2 directories carry a stale index"
    save_file({"lm_head.weight": torch.zeros(2, 2)}, model / "old.safetensors")
    with pytest.raises(CheckpointError, match="is in both"):
        open_checkpoint(model)


def test_a_stray_shard_of_exl3_is_refused(sharded: Path) -> None:
    edit_config(sharded, quantization_config={"quant_method": "exl3"})
    assert open_checkpoint(sharded).tensors
    save_file({"stray.weight": torch.zeros(2, 2)}, sharded / "old.safetensors")
    with pytest.raises(CheckpointError, match=r"old\.safetensors is not listed in .* EXL3 engines load every shard"):
        open_checkpoint(sharded)


def test_a_whole_model_is_taken_before_other_files(model: Path) -> None:
    for number in (1, 2):
        save_file({f"x{number}.weight": torch.zeros(1)}, model / f"part-{number}.safetensors")
    (model / "model.safetensors").unlink()
    assert set(open_checkpoint(model).tensors) == {"x1.weight", "x2.weight"}


# ---- laziness --------------------------------------------------------------------------------------------------------


def test_opening_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny.variants("llama", (3,))[3]
    reads: list[str] = []
    monkeypatch.setattr(checkpoint_module, "read_tensor", lambda info, device="cpu": reads.append(info.name))
    read_bytes = checkpoint_module.Checkpoint.read_bytes

    def note(self: Checkpoint, info: TensorInfo, files: OpenFiles | None = None) -> bytes:
        reads.append(info.name)
        return read_bytes(self, info, files)

    monkeypatch.setattr(checkpoint_module.Checkpoint, "read_bytes", note)
    base = open_checkpoint(tiny.base("llama"))
    assert len(base.modules) > 30
    assert base.size_bytes > 0
    assert not base.is_quantized
    assert dense_dtype(base.modules.values()) == "BF16"
    assert reads == []
    variant = open_checkpoint(directory)
    assert reads == []
    shapes = {m.shape for m in variant.modules.values()}
    assert shapes
    assert reads == [f"{m.name}.weight_shape" for m in variant.modules.values() if m.is_quantized], "16 bytes each"


def test_opening_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from recompile.checkpoint.checkpoint import open_checkpoint as o; "
        f"c = o({str(tiny.variants('llama', (3,))[3])!r}); c.modules, c.fingerprint, c.formats; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- modules ---------------------------------------------------------------------------------------------------------


def test_parts_are_gathered_into_modules(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.attn.q.weight": torch.zeros(8, 4),
        "model.layers.0.attn.q.bias": torch.zeros(8),
        "model.layers.0.norm.weight": torch.zeros(4),
        "model.layers.0.mixer.A_log": torch.zeros(3),  # a parameter with a name of its own
        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(2, 8, 4),  # a fused one
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(tmp_path).modules
    assert {name: sorted(module.parts) for name, module in found.items()} == {
        "model.layers.0.attn.q": ["bias", "weight"],
        "model.layers.0.norm": ["weight"],
        "model.layers.0.mixer.A_log": [""],
        "model.layers.0.mlp.experts.gate_up_proj": [""],
    }
    assert {name: module.shape for name, module in found.items()} == {
        "model.layers.0.attn.q": (8, 4),
        "model.layers.0.norm": (4,),
        "model.layers.0.mixer.A_log": None,
        "model.layers.0.mlp.experts.gate_up_proj": None,
    }
    assert found["model.layers.0.attn.q"].numel == 32
    assert found["model.layers.0.attn.q"].size_bytes == 4 * (32 + 8)
    assert found["model.layers.0.attn.q"].bits_per_weight == 32 * 40 / 32
    assert found["model.layers.0.mlp.experts.gate_up_proj"].numel == 64
    assert not any(module.is_quantized for module in found.values())


def test_modules_of_a_quantized_checkpoint() -> None:
    found = open_checkpoint(tiny.variants("llama-bias", (3,))[3])
    base = open_checkpoint(tiny.base("llama-bias"))
    assert found.formats == ("pack-quantized",)
    assert found.is_quantized
    assert quant_method(found.config) == "compressed-tensors"
    assert quant_method(base.config) is None
    assert found.modules.keys() == base.modules.keys()
    for name, module in found.modules.items():
        assert module.shape == base.modules[name].shape
        assert module.numel == base.modules[name].shape[0] * math.prod(base.modules[name].shape[1:])
        assert module.is_quantized is (name.endswith("_proj"))
    q = found.modules["model.layers.0.self_attn.q_proj"]
    assert set(q.parts) == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    # 64 x 64 weights of 3 bits, 2 scales of 16 bits a row, two int64 sizes, 64 biases of 16 bits
    assert 8 * q.size_bytes == 64 * 64 * 3 + 64 * 2 * 16 + 128 + 64 * 16
    assert q.bits_per_weight == pytest.approx(3 + 0.5 + 128 / 4096 + 0.25)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (
            {
                "q_weight": torch.zeros(2, 8, dtype=torch.int32),
                "q_invperm": torch.zeros(32, dtype=torch.int16),
                "q_scale": torch.zeros(1, 1, dtype=torch.int32),
                "q_scale_max": torch.zeros(1).half(),
                "q_groups": torch.zeros(2, dtype=torch.int16),
            },
            "exl2",
        ),
        (
            {
                "trellis": torch.zeros(2, 2, 48, dtype=torch.int16),
                "suh": torch.zeros(32).half(),
                "svh": torch.zeros(32).half(),
            },
            "exl3",
        ),
        (
            {
                "weight_packed": torch.zeros(4, 8, dtype=torch.int32),
                "weight_scale": torch.zeros(4, 1),
                "weight_shape": torch.tensor([4, 64]),
            },
            "pack-quantized",
        ),
        (
            {
                "weight_packed": torch.zeros(4, 8, dtype=torch.uint8),
                "weight_scale": torch.zeros(4, 1).to(torch.float8_e4m3fn),
                "weight_global_scale": torch.zeros(1),
            },
            "nvfp4-pack-quantized",
        ),
        ({"weight": torch.zeros(4, 4, dtype=torch.float64)}, "dense"),
    ],
)
def test_formats_are_told_by_their_parts(tmp_path: Path, parts: dict[str, Tensor], name: str) -> None:
    save_file({f"m.{part}": value for part, value in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    module = checkpoint.modules["m"]
    assert module.format == name
    assert checkpoint.formats == (() if name == "dense" else (name,))


def test_a_format_that_is_known_and_not_decoded_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = dataclasses.replace(FORMATS["pack-quantized"], runnable=False)
    monkeypatch.setitem(FORMATS, "pack-quantized", known)
    found = open_checkpoint(tiny.variants("llama-2", (3,))[3])
    with pytest.raises(UnsupportedError, match="up_proj is stored as pack-quantized, which this version cannot decode"):
        found.load("model.layers.0.mlp.up_proj.weight")


def test_packed_weights_without_their_shape(tmp_path: Path) -> None:
    directory = tiny.copy_of(tiny.variants("llama-2", (3,))[3], tmp_path / "model")
    name = "model.layers.0.mlp.up_proj"
    for value, says in (
        (torch.tensor([128.0, 64.0]), r"up_proj\.weight_shape is F32 \[2\], wanted I64 \[2\]"),
        (torch.tensor([1, 2, 3]), r"up_proj\.weight_shape is I64 \[3\]"),
        (torch.tensor([0, 64]), "weight_shape says 0 x 64"),
        (torch.tensor([-1, 64]), "weight_shape says -1 x 64"),
        (torch.tensor([2**62, 64]), "weight_shape says"),
    ):
        edit_tensors(directory / "model.safetensors", **{f"{name}.weight_shape": value})
        with pytest.raises(FormatError, match=says):
            _ = open_checkpoint(directory).modules


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(model: Path, value: float) -> None:
    weight = torch.zeros(128, 64)
    weight[3, 5] = weight[100, 60] = value
    edit_tensors(model / "model.safetensors", model__layers__1__mlp__up_proj__weight=weight)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model).load("model.layers.1.mlp.up_proj.weight")
    assert str(caught.value).startswith(str(model))
    assert ": model.layers.1.mlp.up_proj.weight holds 2 NaN or infinite values of 8192" in str(caught.value)


def test_weights_whose_sum_overflows_are_still_finite(model: Path) -> None:
    weight = torch.full((128, 64), 3e38, dtype=torch.bfloat16)
    edit_tensors(model / "model.safetensors", model__layers__1__mlp__up_proj__weight=weight)
    assert torch.equal(open_checkpoint(model).load("model.layers.1.mlp.up_proj.weight"), weight)


def test_a_scale_that_is_not_finite_is_found_in_the_decoded_weight(tmp_path: Path) -> None:
    directory = tiny.copy_of(tiny.variants("llama-2", (3,))[3], tmp_path / "model")
    scale = load_file(directory / "model.safetensors")["model.layers.1.mlp.up_proj.weight_scale"]
    scale[7, 1] = math.nan
    edit_tensors(directory / "model.safetensors", model__layers__1__mlp__up_proj__weight_scale=scale)
    with pytest.raises((CheckpointError, FormatError), match=r"model\.layers\.1\.mlp\.up_proj"):
        open_checkpoint(directory).load("model.layers.1.mlp.up_proj.weight")


def test_load_decodes_and_read_does_not() -> None:
    found = open_checkpoint(tiny.variants("llama", (4,))[4])
    name = "model.layers.2.mlp.down_proj"
    assert found.load(f"{name}.weight").shape == (64, 128)
    assert found.read(f"{name}.weight_packed").dtype == torch.int32
    with pytest.raises(MissingWeight, match=r"holds no tensor .*down_proj\.weight; did you mean"):
        found.read(f"{name}.weight")
    assert found.has(f"{name}.weight")
    assert not found.has(f"{name}.bias")
    assert not found.has("model.layers.2.mlp.side_proj.weight")
    with pytest.raises(MissingWeight, match="side_proj"):
        found.load("model.layers.2.mlp.side_proj.weight")


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprints_tell_builds_apart(model: Path, tmp_path: Path) -> None:
    before = open_checkpoint(model).fingerprint
    assert before == open_checkpoint(tiny.base("llama-2")).fingerprint, "the directory is no part of it"
    weights = load_file(model / "model.safetensors")
    for index in (0, -1):  # the first and the last value
        changed = weights["lm_head.weight"].clone()
        changed.view(-1)[index] += 1
        edit_tensors(model / "model.safetensors", lm_head__weight=changed)
        assert open_checkpoint(model).fingerprint != before
    edit_tensors(model / "model.safetensors", lm_head__weight=weights["lm_head.weight"].reshape(64, 256))
    assert open_checkpoint(model).fingerprint != before, "another shape of the same bytes"
    edit_tensors(model / "model.safetensors", lm_head__weight=None, head__weight=weights["lm_head.weight"])
    assert open_checkpoint(model).fingerprint != before, "another name"
    edit_tensors(model / "model.safetensors", head__weight=None, lm_head__weight=weights["lm_head.weight"])
    assert open_checkpoint(model).fingerprint == before
    found = {open_checkpoint(path).fingerprint for path in tiny.variants("llama", (2, 3, 4)).values()}
    assert len(found) == 3


# ---- small parts -----------------------------------------------------------------------------------------------------


def test_split_name() -> None:
    assert split_name("model.norm.weight") == ("model.norm", "weight")
    assert split_name("weight") == ("", "weight")


def test_dense_dtype_is_that_of_most_bytes() -> None:
    def stored(name: str, dtype: str, size: int, fmt: str = "dense") -> StoredModule:
        info = TensorInfo(f"{name}.weight", dtype, (size,), Path("x"), 0, size)
        return StoredModule(name, {"weight": info}, (size,), fmt)

    assert dense_dtype([stored("a", "F32", 10), stored("b", "BF16", 30), stored("c", "F16", 20)]) == "BF16"
    assert dense_dtype([stored("a", "F16", 10), stored("b", "BF16", 30, "exl2")]) == "F16"
    assert dense_dtype([]) == "BF16"


@pytest.mark.parametrize(
    ("name", "numbers", "template"),
    [
        ("model.layers.1.list.0.0", ["1", "0", "0"], "model.layers.{0}.list.{1}.{2}"),  # the last one counts, too
        ("model.layers.1.mlp.down_proj", ["1"], "model.layers.{0}.mlp.down_proj"),
        ("model.layers.1.x", ["2"], None),
    ],
)
def test_names_as_templates_of_their_numbers(name: str, numbers: list[str], template: str | None) -> None:
    assert template_of(name, numbers) == template
