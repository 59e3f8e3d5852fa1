"""GGUF files whose weights are quantized are a base like any other: decoded when they are read, and it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import recompile
from recompile.checkpoint.checkpoint import GgufCheckpoint, open_checkpoint
from recompile.costs import load_profile
from recompile.errors import UnsupportedError
from recompile.events import Note
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from recompile.model.decoded import as_dense
from recompile.model.stream import LayeredModel
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.gguf import plan_variants
from recompile.quantize.gguf_build import build_variants
from recompile.quantize.pipeline import quantize_model
from tests import gguf_tiny
from tests.gguf.test_architecture_logits import logits, write_files
from tests.gguf_models import VOCAB, write_model
from tests.stream.test_quantized_bases import published

# permuted rows; norms with an offset; steps and fused projections; experts in parts of several kinds
NAMES = ("llama", "gemma2", "qwen3next", "gpt-oss", "deepseek2", "gemma4 experts", "granitemoe shared", "llama4")


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    save_file({"input_ids": torch.arange(32).reshape(2, 16) * 5 % VOCAB}, tmp_path / "rows.safetensors")
    return tmp_path / "rows.safetensors"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_quantized_to_what_its_decoded_model_is(name: str, tmp_path: Path) -> None:
    """Of a file with weights of four types: all that is in an 8-bit variant is what the file decodes to."""
    _, _, mixed = write_files(tmp_path, name, mixed=True)
    base = open_checkpoint(mixed)
    assert base.is_quantized
    dense = as_dense(base)
    assert not dense.is_quantized
    assert "is itself quantized (gguf)" in dense.notes[-1]
    wanted = logits(base)
    assert torch.allclose(logits(dense), wanted, atol=1e-5 * float(wanted.std()))
    rows = torch.arange(24).reshape(2, 12) * 5 % gguf_tiny.VOCAB
    for _ in quantize_model(base, tmp_path, IntEncoder((8,), 16, False, "rtn"), rows):
        pass
    made = open_checkpoint(tmp_path / "8bpw")
    quantized = [module for module in made.modules.values() if module.is_quantized]
    assert sum(".experts." in module.name for module in quantized) == sum(
        ".experts." in module.name and module.name.endswith("_proj") for module in dense.modules.values()
    )
    theirs, ours = LayeredModel.of(base, dtype=torch.float32), LayeredModel.of(made, dtype=torch.float32)
    assert theirs.origins.keys() == ours.origins.keys()
    for parameter in theirs.origins:
        want, have = theirs.load_parameter(parameter), ours.load_parameter(parameter)
        assert float((have - want).norm()) < 0.01 * float(want.norm()), parameter


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_it_is_made_into_other_types_row_by_row(name: str, tmp_path: Path) -> None:
    _, _, mixed = write_files(tmp_path, name, mixed=True)
    base = open_checkpoint(mixed)
    for _ in build_variants(plan_variants(base, tmp_path, ["F32", "Q8_0"])):
        pass
    plain, eight = (open_checkpoint(tmp_path / f"mix-{kind}.gguf") for kind in ("F32", "Q8_0"))
    assert isinstance(plain, GgufCheckpoint)
    assert {tensor.type.name for tensor in plain.file.tensors.values()} == {"F32"}
    for tensor in base.tensors:
        if not tensor.startswith("rope_"):
            assert plain.load(tensor).equal(base.load(tensor).float()), tensor
            error = float((eight.load(tensor).float() - base.load(tensor)).norm())
            assert error < 0.01 * float(base.load(tensor).float().norm()), tensor


def test_every_command_says_so(tmp_path: Path, ids: Path) -> None:
    base = write_model(tmp_path / "m.gguf", kind="Q5_1")
    said: list[str] = []

    def note(event: object) -> None:
        if isinstance(event, Note):
            said.append(event.text)

    def told() -> bool:
        found = any("the base is itself quantized (gguf)" in text for text in said)
        said.clear()
        return found

    common: dict[str, Any] = {"input_ids": ids, "on_event": note}
    recompile.quantize(base, tmp_path / "v", bits=["4"], group_size=16, method="rtn", **common)
    assert told()
    recompile.quantize(base, tmp_path, bits=["Q4_0"], format="gguf", **common)
    assert told()
    for number, offered in enumerate((["4"], ["Q4_0", "Q8_0"])):
        out = tmp_path / f"{number}.jsonl"
        settings: dict[str, Any] = {"group_size": 16} if offered == ["4"] else {}
        recompile.profile(base, candidates=offered, importance_rows=0, mode="sketch", out=out, **settings, **common)
        assert told()
        found = load_profile(out).measurements.values()
        assert min(min(swap.kl_rows) for swap in found) >= 0
        assert max(max(swap.kl_rows) for swap in found) > 0


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_published_base_is_made_into_gguf(kind: str, tmp_path: Path) -> None:
    """8-bit blocks and MXFP4 experts: the float32 file is what they decode to."""
    base, plain = (open_checkpoint(path) for path in published(kind))
    tokens = [f"t{number}" for number in range(base.config["vocab_size"])]
    write_gguf(tmp_path / "t.gguf", [encode_key("tokenizer.ggml.tokens", tokens)], [])
    keys = open_gguf(tmp_path / "t.gguf")
    files = []
    for source, stem in ((base, "a"), (plain, "b")):
        for _ in build_variants(plan_variants(source, tmp_path, ["F32"], stem=stem, tokenizer_from=keys)):
            pass
        files.append(open_gguf(tmp_path / f"{stem}-F32.gguf"))
    made, wanted = files
    assert set(made.tensors) == set(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        assert made.tensors[name].ne == tensor.ne
        assert made.read(made.tensors[name]) == wanted.read(tensor), name


def test_one_without_names_is_refused_in_one_sentence_where_they_are_needed(tmp_path: Path, ids: Path) -> None:
    base = write_model(tmp_path / "m.gguf", "rwkv9", "Q8_0")
    with pytest.raises(UnsupportedError, match="'rwkv9' has no table of Hugging Face names here"):
        recompile.quantize(base, tmp_path / "v", bits=["4"], input_ids=ids)
    recompile.quantize(base, tmp_path, bits=["Q4_0"], format="gguf", importance=False)
    assert open_gguf(tmp_path / "m-Q4_0.gguf").tensors["blk.0.attn_q.weight"].type.name == "Q4_0"
