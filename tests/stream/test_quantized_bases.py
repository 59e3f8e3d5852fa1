"""Models as they are published, in 8-bit blocks or MXFP4, are a base like any other: decoded when they are read."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import recompile
from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from eval.profile.sketch import SketchOptions, profile_sketch
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import Profile
from recompile.errors import FormatError, UnsupportedError
from recompile.events import Note
from recompile.model.decoded import as_dense
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.lazy_variant import make_variants, spec_of
from recompile.quantize.pipeline import quantize_model
from tests import tiny
from tests.stream import architectures

BLOCK = 16
_kept: list[Any] = []


def write(directory: Path, tensors: dict[str, Tensor], raw: dict[str, tuple[str, Tensor]], **config: Any) -> Path:
    """A copy of a model with other tensors. raw: dtype as the header spells it, and bytes of that size."""
    whole = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**whole, **config}))
    save_file({name: value.contiguous() for name, value in tensors.items()} | {n: v for n, (_, v) in raw.items()},
              directory / "model.safetensors")  # fmt: skip
    if raw:  # safetensors.torch has no name for every dtype
        content = (directory / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        for name, (dtype, _) in raw.items():
            header[name]["dtype"] = dtype
        text = json.dumps(header).encode()
        (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return directory


def to_fp8_blocks(weight: Tensor, powers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales [out / 16, in / 16], and what they mean."""
    out_features, in_features = weight.shape
    tiles = weight.reshape(out_features // BLOCK, BLOCK, in_features // BLOCK, BLOCK)
    scale = tiles.abs().amax((1, 3)) / 448 + 1e-9
    scale = torch.exp2(scale.log2().ceil()) if powers else scale
    codes = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    means = codes.float() * scale[:, None, :, None]
    return codes.reshape(weight.shape), scale, means.reshape(weight.shape)


@functools.cache
def published(kind: str) -> tuple[Path, Path]:
    """A quantized directory, and the dense one that it stands for."""
    if not _kept:
        _kept.append(tempfile.TemporaryDirectory())
    root = Path(_kept[0].name)
    name = {"fp8": "llama", "fp8-scale": "deepseek-v3", "mxfp4": "gpt-oss"}[kind]
    quantized, dense = (
        tiny.copy_of(architectures.checkpoint(name), root / f"{kind}-{what}") for what in ("q", "dense")
    )
    tensors, means, raw = load_file(quantized / "model.safetensors"), {}, {}
    stored = dict(tensors)
    for tensor, value in tensors.items():
        linear = value.dim() == 2 and "proj" in tensor and not any(size % BLOCK for size in value.shape)
        if kind != "mxfp4" and linear:
            codes, scale, means[tensor] = to_fp8_blocks(value, powers=kind == "fp8-scale")
            stored[tensor] = codes
            if kind == "fp8":
                stored[f"{tensor}_scale_inv"] = scale
            else:
                raw[tensor.removesuffix("weight") + "scale"] = ("F8_E8M0", (scale.log2() + 127).to(torch.uint8))
        elif kind == "mxfp4" and tensor.endswith(("gate_up_proj", "down_proj")):
            generator = torch.Generator().manual_seed(len(tensor))
            experts, inputs, outputs = value.shape
            padded = -(-inputs // 32)
            blocks = torch.randint(0, 256, (experts, outputs, padded, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 124, (experts, outputs, padded), generator=generator, dtype=torch.uint8)
            del stored[tensor]
            stored |= {f"{tensor}_blocks": blocks, f"{tensor}_scales": scales}
            means[tensor] = plain_mxfp4(blocks, scales)
    config = {"quant_method": "mxfp4"} if kind == "mxfp4" else {"quant_method": "fp8", "weight_block_size": [BLOCK] * 2}
    write(quantized, stored, raw, quantization_config=config)
    write(dense, {**tensors, **means}, {})
    return quantized, dense


def plain_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """By transformers' own decoder, [experts, in, out]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["fp8", "fp8-scale", "mxfp4"])
def test_a_published_model_runs_as_what_it_decodes_to(kind: str) -> None:
    quantized, dense = published(kind)
    ids = architectures.rows(2, 9)
    base = open_checkpoint(quantized)
    assert base.is_quantized
    wanted = tiny.plain_logits(architectures.plain_model(dense), ids, 2)
    assert torch.equal(tiny.streamed_logits(base, ids), wanted)


@pytest.mark.parametrize("kind", ["fp8", "fp8-scale", "mxfp4"])
def test_a_published_model_is_profiled_and_quantized(kind: str, tmp_path: Path) -> None:
    quantized, dense = published(kind)
    base, plain = open_checkpoint(quantized), open_checkpoint(dense)
    ids = architectures.rows(2, 8)
    costs = []
    for number, reference in enumerate((base, plain)):
        candidates = make_variants(reference, [spec_of("4", group_size=16, symmetric=True)])
        job = ProfileJob(reference, candidates[0][0], candidates, ids, tmp_path / f"{number}.jsonl", ProfileOptions())
        *_, profile = profile_exact(job)
        assert isinstance(profile, Profile)
        costs.append({swap: found.kl_rows for swap, found in profile.measurements.items()})
        *_, sketched = profile_sketch(ProfileJob(*_job(job), path=tmp_path / f"{number}-s.jsonl"), SketchOptions(2))
        assert isinstance(sketched, Profile)
    assert costs[0] == costs[1], "the same weights, stored in two ways"
    encoder = IntEncoder((4,), 16, True, "rtn")
    for source, out in ((base, "q"), (plain, "dense")):
        for _ in quantize_model(source, tmp_path / out, encoder, ids):
            pass
    made, wanted = (open_checkpoint(tmp_path / out / "4bpw") for out in ("q", "dense"))
    packed = [name for name in wanted.tensors if name.endswith("weight_packed")]
    assert packed
    assert all(torch.equal(made.read(name), wanted.read(name)) for name in packed)
    assert "quantization_config" in made.config
    assert torch.isfinite(tiny.streamed_logits(made, ids)).all()


def _job(job: ProfileJob) -> tuple[Any, ...]:
    return job.reference, job.base, job.candidates, job.ids


def test_the_dense_view_of_a_quantized_base_says_so() -> None:
    base = open_checkpoint(published("fp8")[0])
    dense = as_dense(base)
    assert not dense.is_quantized
    assert any("the base is itself quantized (fp8-scale-inv)" in note for note in dense.notes)
    assert dense.fingerprint == base.fingerprint
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(dense.load(name), base.load(name))
    assert torch.equal(dense.read(name), base.load(name).bfloat16())
    assert as_dense(open_checkpoint(published("fp8")[1])).is_quantized is False


def test_a_build_of_compressed_tensors_is_a_base_too() -> None:
    base = open_checkpoint(tiny.variants("llama-2", (3,))[3])
    dense, name = as_dense(base), "model.layers.1.mlp.down_proj.weight"
    assert not dense.is_quantized
    assert dense.tensors[name].shape == base.load(name).shape
    ids = tiny.rows(1, 6)
    assert torch.equal(tiny.streamed_logits(dense, ids), tiny.streamed_logits(base, ids))


def test_a_scale_that_means_nan_is_named(tmp_path: Path) -> None:
    directory = tiny.copy_of(published("mxfp4")[0], tmp_path / "damaged")
    stored = load_file(directory / "model.safetensors")
    stored["model.layers.0.mlp.experts.down_proj_scales"][1, 0, 0] = 255
    save_file(stored, directory / "model.safetensors")
    with pytest.raises((FormatError, UnsupportedError), match=r"experts\.1\.down_proj.*NaN"):
        open_checkpoint(directory).load("model.layers.0.mlp.experts.1.down_proj.weight")


def test_every_command_says_that_its_base_is_quantized(tmp_path: Path) -> None:
    base = published("fp8")[0]
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": architectures.rows(2, 8)}, ids)
    said: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, Note):
            said.append(event.text)

    def told() -> bool:
        found = any("the base is itself quantized (fp8-scale-inv)" in text for text in said)
        said.clear()
        return found

    common: dict[str, Any] = {"input_ids": ids, "on_event": note}
    recompile.quantize(base, tmp_path / "v", bits=["4"], group_size=16, method="rtn", **common)
    assert told()
    recompile.diff(tmp_path / "v" / "4bpw", base, **common)
    assert told()
    out = tmp_path / "p.jsonl"
    recompile.profile(base, candidates=["4"], group_size=16, importance_rows=0, mode="sketch", out=out, **common)
    assert told()
    recompile.diff(tmp_path / "v" / "4bpw", tmp_path / "v" / "4bpw", **common)
    assert not any("fp8" in text for text in said)
