"""GGUF files of an architecture that is in no table: what needs no names works on them, what runs a model refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from tests import gguf_tiny
from tests.gguf_models import VOCAB, write_model

pytest.importorskip("libgguf")
REFUSED = "Error: {}: GGUF architecture 'rwkv9' has no table of Hugging Face names here, so that transformers"


def run(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(command: Any, *arguments: object) -> str:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    return result.output


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A float32 base, variants that model_quantize made of it, and token ids."""
    write_model(tmp_path / "m.gguf", "rwkv9", "F32", experts=3, head=True)
    run(
        model_quantize, "-i", tmp_path / "m.gguf", "-o", tmp_path, "--format", "gguf", "-b", "Q8_0", "Q4_0",
        "--no-importance", "--quiet",
    )  # fmt: skip
    save_file({"input_ids": torch.randint(0, VOCAB, (2, 16))}, tmp_path / "rows.safetensors")
    return tmp_path


def test_variants_of_any_file(files: Path) -> None:
    """All matrices, experts too; vectors and routers stay; every key of the base is there, byte for byte."""
    base, made = open_gguf(files / "m.gguf"), open_gguf(files / "m-Q4_0.gguf")
    kinds = {name: tensor.type.name for name, tensor in made.tensors.items()}
    assert kinds["blk.1.ffn_up_exps.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    assert made.tensors["blk.1.ffn_up_exps.weight"].ne == base.tensors["blk.1.ffn_up_exps.weight"].ne
    assert all(made.record(key) == base.record(key) for key in base.keys if key != "general.file_type")
    want, have = (open_checkpoint(file.path).load("blk.1.ffn_down_exps.weight") for file in (base, made))
    assert 0 < float((have.float() - want).norm() / want.norm()) < 0.15


def test_a_mix_is_chosen_merged_and_named_for_other_tools(files: Path) -> None:
    eight, four, profile = files / "m-Q8_0.gguf", files / "m-Q4_0.gguf", files / "p.jsonl"
    run(
        model_profile, "-mb", files / "m.gguf", "-i", eight, "-s", four, "-o", profile, "--mode", "weights",
        "--no-importance", "--input-ids", files / "rows.safetensors", "--quiet",
    )  # fmt: skip
    recipe = files / "mix.yaml"
    run(model_optimize, profile, "-b", 6, "-o", recipe, "--no-check", "--quiet")
    run(recompile, "-i", eight, "-o", files / "mix.gguf", "-or", recipe, "--verify", "--quiet")
    mix = open_gguf(files / "mix.gguf")
    kinds = {name: tensor.type.name for name, tensor in mix.tensors.items()}
    assert {"Q8_0", "Q4_0", "F32"} == set(kinds.values())
    for name, kind in kinds.items():
        source = {"Q8_0": eight, "Q4_0": four}.get(kind, eight)
        assert mix.read(name) == open_gguf(source).read(name), name
    assert "no inconsistency found" in run(recompile, "--check", files / "mix.gguf")
    text = run(recompile, "-i", eight, "-or", recipe, "--emit", "llama-quantize")
    assert "attn_q" in text
    assert "q4_0" in text


def test_what_runs_a_model_is_refused_in_one_sentence(files: Path) -> None:
    base, four = files / "m.gguf", files / "m-Q4_0.gguf"
    rows = ("--input-ids", files / "rows.safetensors", "--quiet")
    pair = ("-mb", base, "-i", four, "-s", files / "m-Q8_0.gguf", "-o", files / "p.jsonl")
    for output in (
        refused(model_diff, "-ma", four, "-mb", base, *rows),
        refused(model_profile, *pair, "--mode", "sketch", *rows),
        refused(model_profile, *pair, "--mode", "weights", *rows),
        refused(model_quantize, "-i", base, "-o", files / "out", "--format", "gguf", "-b", "Q4_0", *rows),
    ):
        assert REFUSED.format(base) in output, output
        assert "Traceback" not in output
    assert REFUSED.format(four) in refused(recompile, "-i", four, "-o", files / "dense", "--dense", "--quiet")
    assert not (files / "dense").exists()


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek2"])
def test_a_decoded_copy_has_fused_tensors_in_one_piece_again(name: str, tmp_path: Path) -> None:
    entry = json.loads(gguf_tiny.GOLDEN.read_text())[name]
    base = gguf_tiny.write_tiny(tmp_path / "base", entry)
    write_gguf(tmp_path / "t.gguf", [encode_key("tokenizer.ggml.tokens", ["x"] * gguf_tiny.VOCAB)], [])
    made_of = ("-i", base, "-o", tmp_path, "--tokenizer-from", tmp_path / "t.gguf", "--no-importance", "--quiet")
    run(model_quantize, *made_of, "--format", "gguf", "-b", "Q8_0")
    run(recompile, "-i", tmp_path / "base-Q8_0.gguf", "-o", tmp_path / "dense", "--dense", "--quiet")
    made, source = open_checkpoint(tmp_path / "dense"), open_checkpoint(base)
    assert set(made.tensors) == set(source.tensors)
    for tensor in source.tensors:
        have, want = made.load(tensor).float(), source.load(tensor).float()
        assert float((have - want).norm() / want.norm()) < 0.02, tensor
