"""What more rows would gain, against choices that were really made from more rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from eval.profile.exact import ProfileJob, ProfileOptions
from eval.profile.row_gain import RowGain, gain_of_more_rows
from eval.profile.sketch import Sketch, SketchOptions, profile_sketch
from recompile.checkpoint.checkpoint import open_checkpoint
from tests import tiny
from tests.optimize_runs import run

GROUPS, ROW_TOKENS = 40, 10
TRUE = np.linspace(0.5, 1.5, GROUPS)  # what every group costs from its small source


def drawn(rows: int, noise: float, seed: int) -> Sketch:
    """Costs of every group and row, log-normal about the true ones; no scores to shrink by."""
    generator = np.random.default_rng(seed)
    values = TRUE[:, None] * np.exp(noise * generator.standard_normal((GROUPS, rows)) - noise**2 / 2)
    sums = values * 2 * ROW_TOKENS
    swaps = tuple((f"g{n}", "small") for n in range(GROUPS))
    return Sketch(swaps, sums, sums, sums, np.ones((GROUPS, rows), np.int64), 1)


def half_of_them(costs: Mapping[tuple[str, str], float]) -> dict[str, str]:
    """The half of the groups that cost least by these costs are made small."""
    order = sorted(costs, key=costs.__getitem__)
    small = set(order[: GROUPS // 2])
    return {group: source if (group, source) in small else "large" for group, source in costs}


def true_kl(rows: int, noise: float, seeds: range) -> float:
    """Of choices that so many rows make, in the mean."""
    found = []
    for seed in seeds:
        means = drawn(rows, noise, seed).products2.mean(1)
        found.append(TRUE[np.argsort(means)[: GROUPS // 2]].sum())
    return float(np.mean(found))


def test_twice_as_many_rows_gain_what_was_predicted() -> None:
    noise, rows = 0.2, 16
    predicted = []
    for seed in range(40):
        gain = gain_of_more_rows(drawn(rows, noise, seed), ROW_TOKENS, half_of_them)
        assert gain is not None
        predicted.append((gain.from_quarter - gain.from_half) / 4)
    gained = true_kl(rows, noise, range(1000, 1400)) - true_kl(2 * rows, noise, range(2000, 2400))
    assert gained > 0
    assert float(np.mean(predicted)) == pytest.approx(gained, rel=0.35)


def test_rows_that_agree_gain_nothing() -> None:
    gain = gain_of_more_rows(drawn(8, 0.0, 0), ROW_TOKENS, half_of_them)
    assert gain is not None
    assert gain.of_twice == 0
    assert gain.from_half == pytest.approx(TRUE[: GROUPS // 2].sum())


def test_too_few_rows_tell_nothing() -> None:
    assert gain_of_more_rows(drawn(3, 0.1, 0), ROW_TOKENS, half_of_them) is None


def test_a_share_is_never_negative() -> None:
    assert RowGain(16, 0.2, 0.1).of_twice == 0
    assert RowGain(16, 0.2, 0.28).of_twice == pytest.approx(0.1)
    assert RowGain(16, 0.0, 0.1).of_twice == 0


def test_model_optimize_says_when_more_rows_would_pay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [(n, open_checkpoint(directory)) for n, directory in tiny.variants("llama", (3, 2, 4, 6)).items()]
    path = tmp_path / "profile.jsonl"
    job = ProfileJob(open_checkpoint(tiny.base("llama")), 3, variants, tiny.rows(6, 16), path, ProfileOptions())
    *_, _ = profile_sketch(job, SketchOptions(4))

    def said() -> str:
        result = run(path, "-b", "3.9", "--solver", "exact", "--no-check", "-o", tmp_path / "mix.yaml")
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    real, found = gain_of_more_rows, []

    def kept(*given: object) -> RowGain | None:
        found.append(real(*given))  # type: ignore[arg-type]
        return RowGain(6, 0.2, 0.28)

    monkeypatch.setattr("eval.profile.row_gain.gain_of_more_rows", kept)
    assert "A profile of 12 rows in place of 6 would choose a mix with about 10.0% less KL." in said()
    assert found[0] is not None
    assert 0 < found[0].from_half < 100
    assert found[0].rows == 6
    monkeypatch.setattr("eval.profile.row_gain.gain_of_more_rows", lambda *given: RowGain(6, 0.2, 0.2))
    assert "1% less KL at most" in said()
