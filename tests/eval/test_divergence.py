"""Greedy runs: where a candidate parts is where two plain `generate` runs of transformers part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from eval import divergence as measured
from eval.divergence import GreedyRuns, divergence, greedy_runs, paired_divergence, parse_divergence
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main
from recompile.errors import MismatchError
from tests import tiny

NEW = 24


def written(directory: Path, prompts: torch.Tensor) -> torch.Tensor:
    """What transformers writes after the prompts."""
    model = tiny.plain_model(directory)
    ids = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=NEW, eos_token_id=None
    )
    return ids[:, prompts.shape[1] :]


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen2-moe", "qwen3-moe"])
def test_runs_part_where_plain_generation_parts(architecture: str, tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base(architecture))
    build = open_checkpoint(tiny.variants(architecture, (3,))[3])
    prompts = tiny.rows(6, 8)
    runs = greedy_runs(base, prompts, NEW, batch=4)
    reference = written(base.path, prompts)
    assert torch.equal(runs.ids[:, 8:], reference)
    candidate = written(tiny.dense_copy(build, tmp_path / "dense", build.path), prompts)
    found = divergence(build, runs, batch=4)
    wanted = [(row != other).nonzero().flatten() for row, other in zip(reference, candidate, strict=True)]
    assert found.same_tokens == tuple(int(places[0]) if len(places) else NEW for places in wanted)
    assert found.finished == tuple(len(places) == 0 for places in wanted)
    assert 0 < sum(found.same_tokens) < 6 * NEW, "runs that all part at once, or never, would prove little"
    assert divergence(base, runs).finished == (True,) * 6  # the reference never leaves itself


def test_the_end_of_the_reference_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(tiny.base("llama-tied"))
    prompts = tiny.rows(2, 8)
    fifth = int(greedy_runs(base, prompts, NEW).ids[0, 8 + 4])
    monkeypatch.setattr(measured, "_end_tokens", lambda runner: frozenset({fifth}))
    runs = greedy_runs(base, prompts, NEW)
    first = (runs.ids[0, 8:] == fifth).nonzero().flatten()
    assert runs.lengths[0] == int(first[0]) + 1
    assert divergence(base, runs).same_tokens == runs.lengths


def test_figures_by_hand() -> None:
    ids = torch.zeros(4, 2 + 10, dtype=torch.int64)
    runs = GreedyRuns(ids, 2, (10, 10, 5, 10))
    chosen = torch.zeros(4, 10, dtype=torch.int64)
    chosen[0, 3] = chosen[1, 0] = chosen[2, 7] = 1  # the third parts after the reference has ended: never
    found = measured._where_they_part(chosen, runs)
    assert found.same_tokens == (3, 0, 5, 10)
    assert found.finished == (False, False, True, True)
    assert found.survival == ((1, 0.75), (2, 0.75), (4, 0.5), (8, 0.5), (10, 0.5))
    assert found.median is None
    assert "never" in str(found)
    chosen[3, 1] = 1
    other = measured._where_they_part(chosen, runs)
    assert other.median == 2.0  # of 0, 1, 3 and the one that never parts
    difference, (low, high) = paired_divergence(found, other)
    assert difference.mean == pytest.approx(9 / 4)
    assert low < 0 < high


def test_bad_input() -> None:
    base = open_checkpoint(tiny.base("llama-tied"))
    with pytest.raises(MismatchError, match="token 100000"):
        greedy_runs(base, torch.tensor([[1, 100_000]]), 2)
    for text in ("", "32", "ax2", "0x5", "5x0", "9999999x2"):
        with pytest.raises(ValueError, match="x"):
            parse_divergence(text)
    assert parse_divergence("32X300") == (32, 300)


def test_the_command_prints_it_and_writes_it(tmp_path: Path) -> None:
    save_file({"input_ids": tiny.rows(3, 16)}, tmp_path / "ids.safetensors")
    out = tmp_path / "report.json"
    given = ["-ma", tiny.variants("llama-tied", (3,))[3], "-mb", tiny.base("llama-tied"), "--json", out]
    more = ["--input-ids", tmp_path / "ids.safetensors", "--max-memory", "64GiB", "--divergence", "3x10"]
    result = CliRunner().invoke(main, [str(word) for word in (*given, *more)])
    assert result.exit_code == 0, result.output
    assert "Greedy runs (3 prompts x 10 tokens): the first other token comes" in result.output
    assert len(json.loads(out.read_text())["divergence"]["same_tokens"]) == 3
    result = CliRunner().invoke(main, [str(word) for word in (*given, *more[:-1], "4x10")])
    assert result.exit_code == 1
    assert "4 prompts are asked for" in result.output
