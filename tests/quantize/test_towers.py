"""A multimodal model: its text is quantized, its tower carried byte for byte, and configs say the loader's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.merge.check import check_checkpoint
from recompile.merge.explain import reached_aside
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.pipeline import quantize_model
from tests import tiny

TEXT = {
    "model_type": "gemma3_text", "vocab_size": tiny.VOCAB, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8,
    "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, 4bpw and 8bpw."""
    from transformers import AutoModelForImageTextToText, Gemma3Config

    work = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(1)
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=200)
    AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).save_pretrained(work / "base")
    encoder = IntEncoder((4, 8), 32, method="rtn")
    for _ in quantize_model(open_checkpoint(work / "base"), work, encoder, tiny.rows(1, 8)):
        pass
    return work


def test_the_tower_is_carried_byte_for_byte(work: Path) -> None:
    stored, kept = load_file(work / "base" / "model.safetensors"), load_file(work / "4bpw" / "model.safetensors")
    names = [name for name in stored if not name.startswith("language_model.")]
    assert len(names) > 10
    assert all(kept[name].equal(stored[name]) for name in names)
    assert "language_model.model.layers.0.self_attn.q_proj.weight_packed" in kept


def test_a_merge_loads_in_transformers_with_our_logits(work: Path, tmp_path: Path) -> None:
    """Modules are stored as language_model.model.layers.*, and are model.language_model.layers.* in transformers."""
    from transformers import AutoModelForImageTextToText

    recipe = tmp_path / "mix.yaml"
    text = f"sources: [{{id: 8, model_dir: {work / '8bpw'}}}]\noverrides: [{{key: '*.self_attn.*', source: 8}}]\n"
    recipe.write_text(text)
    mix = build_overlay(open_checkpoint(work / "4bpw"), recipe)
    assert [line.partition(": vision")[0] for line in reached_aside(mix)] == [
        f'{recipe}:2: "*.self_attn.*" reaches into a vision or audio tower'
    ]
    for _ in execute(plan_write(mix, tmp_path / "mix")):
        pass
    assert [p for p in check_checkpoint(tmp_path / "mix") if p.severity == "error"] == []
    rows = tiny.rows(2, 10)
    theirs, told = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "mix", dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    ours = tiny.streamed_logits(open_checkpoint(tmp_path / "mix"), rows)
    with torch.inference_mode():
        assert torch.allclose(theirs(input_ids=rows).logits, ours, atol=1e-5)


def test_targets_of_stored_names_alone_are_told(work: Path, tmp_path: Path) -> None:
    damaged = tiny.copy_of(work / "4bpw", tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["targets"] = [target for target in group["targets"] if r"model\.language_model" not in target]
    (damaged / "config.json").write_text(json.dumps(config))
    (problem,) = [p for p in check_checkpoint(damaged) if p.severity == "error"]
    assert "do not match model.language_model.layers.0." in str(problem)
