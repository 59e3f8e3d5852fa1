"""The trained tiny models: whole, learnt something, named as released checkpoints are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from recompile.checkpoint import open_checkpoint
from recompile.tokens import default_text, load_tokenizer, make_rows


def record_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "made_by_recompile.json").read_text()))


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_it_predicts_held_out_text_far_better_than_chance(tiny_models: Mapping[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_models[name]
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    ids = make_rows(default_text(), load_tokenizer(folder), 8, 128, "report").ids
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
    found = float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    frequency = torch.bincount(ids.flatten(), minlength=2048).double()
    unigram = (
        -float((frequency[frequency > 0] * (frequency[frequency > 0] / frequency.sum()).log()).sum()) / ids.numel()
    )
    # it sees the context: better than the frequencies of these very rows would be on new text (that is what + 0.5 is
    # for: 1,024 tokens fit themselves far too well), and far below the 7.62 nats of chance
    assert found < min(unigram + 0.5, 6.2)
    assert found == pytest.approx(float(str(record_of(folder)["held_out_nats"])), abs=0.4)  # other rows, bf16 weights


def test_dense_widths_are_multiples_of_256(tiny_models: Mapping[str, Path]) -> None:
    checkpoint = open_checkpoint(tiny_models["tiny-dense"])
    shapes = [module.shape for module in checkpoint.modules.values() if module.shape and len(module.shape) == 2]
    assert len(shapes) == 4 * 7 + 2
    assert all(size % 256 == 0 for shape in shapes for size in shape)


def test_experts_are_stored_one_by_one_and_most_are_used(tiny_models: Mapping[str, Path]) -> None:
    folder = tiny_models["tiny-moe"]
    names = set(open_checkpoint(folder).modules)
    for layer in range(4):
        for expert in range(8):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                assert f"model.layers.{layer}.mlp.experts.{expert}.{projection}" in names
    counts = record_of(folder)["expert_tokens"]
    assert isinstance(counts, list)
    for layer_counts in counts:
        used = [count for count in layer_counts if count > sum(layer_counts) / 100]
        assert len(used) >= 5, "a router that sends everything to a few experts would make a poor test"
