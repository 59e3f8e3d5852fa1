"""A tied flag with another stored head: --check, model_diff and transformers say and do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.tied_head import find_tied_head
from recompile.cli import model_diff
from recompile.merge.check import check_checkpoint
from recompile.model.stream import LayeredModel
from tests import tiny
from tests.commands import run


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
