"""A tied flag with another stored head: --check, model_diff and transformers say and do the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.tied_head import find_tied_head, stored_head
from recompile.cli import model_diff
from recompile.merge.check import check_checkpoint
from recompile.merge.overlay import build_overlay
from recompile.model.stream import LayeredModel
from tests import tiny
from tests.commands import run
from tests.stream import architectures


@pytest.mark.parametrize("kind", ["other", "copy", "none"])
def test_one_statement_that_is_true_of_transformers(kind: str, tmp_path: Path) -> None:
    directory = tiny.copy_of(tiny.base("llama-tied"), tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    if kind != "none":
        head = embedding.flip(0) if kind == "other" else embedding.clone()
        save_file({**tensors, "lm_head.weight": head.contiguous()}, directory / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(directory)
    found = find_tied_head(checkpoint)
    theirs = tiny.plain_model(directory).lm_head.weight
    assert torch.equal(theirs, (embedding.flip(0) if kind == "other" else embedding).float())
    ours = LayeredModel.of(checkpoint).load_parameter("lm_head.weight")
    assert torch.equal(ours, theirs), "model_diff runs what transformers runs"
    problems = [(str(problem), problem.severity) for problem in check_checkpoint(directory)]
    said = run(model_diff.main, "-ma", directory, "-mb", tiny.base("llama-tied"), "-r", "1", "-l", "8")
    if kind == "none":
        assert (found, problems) == (None, [])
        assert "tie_word_embeddings" not in said
        return
    assert found is not None
    assert problems == [(f"config.json: {found}", "error" if kind == "other" else "warning")]
    assert (f"Warning: {directory}: {found}" in said) is (kind == "other")


@pytest.mark.parametrize(("outer", "nested", "tied"), [(False, True, False), (True, False, True), (None, True, True)])
def test_of_two_flags_the_outer_one_counts(outer: bool | None, nested: bool, tied: bool, tmp_path: Path) -> None:
    """As transformers asks them: Qwen3-VL-MoE's classes write false outside and true within."""
    directory = tiny.copy_of(tiny.base("llama"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    config = {**config, "tie_word_embeddings": outer, "text_config": {"tie_word_embeddings": nested}}
    if outer is None:
        del config["tie_word_embeddings"]
    (directory / "config.json").write_text(json.dumps(config))
    assert (find_tied_head(open_checkpoint(directory)) is not None) is tied


def test_a_head_of_which_a_bias_alone_is_stored_is_tied() -> None:
    """BERT and its relatives: the weight is the embedding's."""
    directory = architectures.checkpoint("camembert")
    base = open_checkpoint(directory)
    assert base.modules["lm_head"].parts.keys() == {"bias"}
    assert stored_head(base.modules) is None
    assert build_overlay(base, None).config["tie_word_embeddings"] is True
    assert [problem for problem in check_checkpoint(directory) if problem.severity == "error"] == []
