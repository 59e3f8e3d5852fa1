"""Proxy costs: the formulas by hand, against a plain loop, and a journal that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from eval.profile.exact import Measured, ProfileJob, ProfileOptions
from eval.profile.weights import cosine_distance, profile_weights, relative_error, score_module, trimmed_mean
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.cli.model_profile import main
from recompile.costs import Profile, load_profile
from recompile.model.stream import LayeredModel
from recompile.quantize.activation_stats import collect_moments
from tests import tiny


def test_the_error_by_hand() -> None:
    """w = (1, 2), e = (1, -1), s = (2, 3), m = (1, 0.5): (2 + 3 + (1 - 0.5)^2) / (2 + 12 + (1 + 1)^2)."""
    w, e = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0]])
    s, m = torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 0.5]])
    assert relative_error(w, e, s, m).item() == pytest.approx(5.25 / 18)
    assert relative_error(w, e, torch.ones(1, 2), torch.zeros(1, 2)).item() == pytest.approx(2 / 5)


def test_the_cosine_by_hand() -> None:
    """(1, 0) against (1, 1) with weights (1, 3): 1 - 1 / sqrt(1 * 4); a longer vector costs nothing."""
    w = torch.tensor([[1.0, 0.0]])
    assert cosine_distance(w, torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 3.0]])).item() == pytest.approx(0.5)
    assert cosine_distance(w, w, torch.ones(1, 2)).item() == pytest.approx(0, abs=1e-6)


def test_a_trimmed_mean_leaves_out_the_ends() -> None:
    values = torch.arange(200.0)
    values[7], values[9] = 1e9, -1e9
    kept = sorted(values.tolist())[2:-2]
    assert trimmed_mean(values).item() == pytest.approx(sum(kept) / len(kept))


def checkpoints() -> tuple[Checkpoint, list[tuple[int, Checkpoint]]]:
    found = tiny.variants("llama", (2, 4, 8))
    return open_checkpoint(tiny.base("llama")), [(bits, open_checkpoint(path)) for bits, path in found.items()]


def run(path: Path, importance: bool = True, level: str = "tensor") -> tuple[Profile, int]:
    base, candidates = checkpoints()
    job = ProfileJob(base, 2, candidates, tiny.rows(3, 16), path, ProfileOptions(level=level))
    events = list(profile_weights(job, importance=importance))
    assert isinstance(events[-1], Profile)
    return events[-1], sum(isinstance(event, Measured) for event in events)


def test_scores_are_those_of_a_plain_loop() -> None:
    base, candidates = checkpoints()
    candidate = candidates[0][1]
    layers = list(collect_moments(LayeredModel.of(base), tiny.rows(3, 16)))
    moments = {module: inputs for layer in layers for inputs in layer for module in inputs.modules}
    module = "model.layers.1.mlp.down_proj"
    weight = base.load(f"{module}.weight").double()
    error = candidate.load(f"{module}.weight").double() - weight
    found = score_module(base, candidate, module, moments[module], 3)
    for row in range(3):
        s = moments[module].sum_squares[row].double() / 16
        m = moments[module].sums[row].double() / 16
        each = [
            float((s * e**2).sum() + (m @ e) ** 2) / float((s * w**2).sum() + (m @ w) ** 2)
            for w, e in zip(weight, error, strict=True)
        ]
        assert found[row].item() == pytest.approx(6.0 * sum(each), rel=1e-4)  # 64 rows: 1 % of them is none


def test_a_journal_goes_on_and_serves_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    profile, measured = run(path)
    assert profile.is_complete
    assert profile.header.method == "weights"
    assert measured == 3 * len(profile.header.groups)
    for group in profile.header.groups:
        costs = [profile.cost(group.name, str(bits)) for bits in (2, 4, 8)]
        assert all(cost is not None and cost.kl_nats >= 0 for cost in costs)
        low, middle, high = (cost.kl_nats for cost in costs if cost is not None)
        assert low > middle > high
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-5]) + lines[-5][:20])  # killed while writing
    again, repeated = run(path)
    assert repeated == 5
    assert again.measurements == profile.measurements
    assert run(path)[1] == 0
    assert load_profile(path).measurements == profile.measurements


def test_without_importance_no_text_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weighted, _ = run(tmp_path / "weighted.jsonl")
    monkeypatch.setattr("eval.profile.weights.collect_moments", None)
    plain, _ = run(tmp_path / "plain.jsonl", importance=False)
    for key, found in plain.measurements.items():
        assert len(set(found.kl_rows)) == 1
        assert found.kl_rows != weighted.measurements[key].kl_rows


def test_the_command_runs_this_and_not_a_sketch(tmp_path: Path) -> None:
    base, variants = tiny.copy_of(tiny.base("llama"), tmp_path / "base"), tiny.variants("llama", (2, 4))
    tiny.write_tokenizer(base)
    out = tmp_path / "p.jsonl"
    for flag, weighed in (("--importance", True), ("--no-importance", False)):
        out.unlink(missing_ok=True)
        where = ["-mb", str(base), "-i", f"2={variants[2]}", "-s", f"4={variants[4]}", "-o", str(out)]
        result = CliRunner().invoke(main, [*where, "--mode", "weights", flag, "-r", "2", "-l", "16", "--quiet"])
        assert result.exit_code == 0, result.output
        assert "no nats" in result.output
        header = load_profile(out).header
        assert header.method == "weights"
        assert header.settings["importance"] is weighed
