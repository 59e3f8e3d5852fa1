"""Rows are added until the total is known well enough: the rule, its limits, and that blocks change no result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from eval.profile.adaptive_rows import RowLimits, RowsDone, profile_more_rows, relative_error
from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from eval.profile.hybrid import HybridOptions, profile_hybrid
from eval.profile.sketch import SketchOptions, SweepStore, profile_sketch
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import model_profile
from recompile.costs import Profile, load_profile
from recompile.errors import JournalError
from recompile.model.tokens import Rows, save_rows
from recompile.optimize.choose import Budget
from tests import tiny

OPTIONS = ProfileOptions(level="layer")


def rows(count: int, documents: tuple[str, ...] | None = None) -> Rows:
    names = documents or tuple(f"d{n}" for n in range(count))
    return Rows(tiny.rows(count, 12), names, ("made",) * count, "made", "choose", "").part(0, count)


def block(mode: str, some: Rows, first_row: int, path: Path) -> Iterator[object]:
    base = open_checkpoint(tiny.base("llama"))
    given = [(bits, open_checkpoint(folder)) for bits, folder in tiny.variants("llama", (2, 4)).items()]
    job = ProfileJob(base, 4, given, some.ids, path, OPTIONS).over(some, path)
    if mode == "exact":
        return profile_exact(job)
    return profile_sketch(job, SketchOptions(4, mode=mode, first_row=first_row))


def grow(mode: str, pool: Rows, path: Path, limits: RowLimits) -> tuple[list[RowsDone], Profile]:
    sketch = None if mode == "exact" else SketchOptions(4, mode=mode)
    events = list(profile_more_rows(pool, path, limits, partial(block, mode), sketch))
    assert isinstance(events[-1], Profile)
    return [event for event in events if isinstance(event, RowsDone)], events[-1]


def test_the_error_is_that_of_a_mean_over_documents() -> None:
    values = np.random.default_rng(0).normal(5, 2, 40)
    plain = float(values.std(ddof=1) / 40**0.5 / values.mean())
    assert relative_error(values, [str(n) for n in range(40)]) == pytest.approx(plain)
    twice = np.repeat(values, 2)  # a second row that says the same again tells nothing new
    assert relative_error(twice, [str(n // 2) for n in range(80)]) == pytest.approx(plain)
    assert relative_error(twice, [str(n) for n in range(80)]) < 0.8 * plain
    assert relative_error(values, ["one"] * 40) == float("inf")


@pytest.mark.parametrize("mode", ["exact", "sketch", "diagonal"])
def test_rows_stop_at_the_error_and_equal_a_run_over_all_of_them(tmp_path: Path, mode: str) -> None:
    pool, path = rows(40), tmp_path / "p.jsonl"
    loose, _ = grow(mode, pool, path, RowLimits(rtol=10.0, first=4))
    assert [state.rows for state in loose] == [4]
    wanted = 0.7 * loose[-1].error
    states, profile = grow(mode, pool, path, RowLimits(rtol=wanted, first=4))
    assert all(state.error > wanted for state in states[:-1])
    assert states[-1].error <= wanted
    assert states[-1].reached
    assert states[-1].rows == profile.header.rows > 4
    assert load_profile(path) == profile
    part = pool.part(0, profile.header.rows)
    *_, whole = block(mode, part, 0, tmp_path / "whole.jsonl")
    assert isinstance(whole, Profile)
    assert whole.header == profile.header
    for swap, found in whole.measurements.items():
        assert profile.measurements[swap].kl_rows == pytest.approx(found.kl_rows, rel=2e-3, abs=1e-7)
    totals = sum(np.array(m.kl_rows) for (_, source), m in whole.measurements.items() if source == states[-1].candidate)
    assert isinstance(totals, np.ndarray)
    assert states[-1].error == pytest.approx(totals.std(ddof=1) / len(totals) ** 0.5 / totals.mean(), rel=1e-2)


def test_a_maximum_is_kept_and_said(tmp_path: Path) -> None:
    states, profile = grow("sketch", rows(6), tmp_path / "p.jsonl", RowLimits(rtol=1e-4, first=4))
    assert [state.rows for state in states] == [4, 6]
    assert not states[-1].reached
    assert states[-1].reason == "no more rows are there"
    assert profile.header.rows == 6


def test_time_is_kept(tmp_path: Path) -> None:
    states, _ = grow("sketch", rows(20), tmp_path / "p.jsonl", RowLimits(rtol=None, minutes=1e-6, first=2))
    assert [state.rows for state in states] == [2]
    assert states[-1].reason == "the time is spent"
    states, _ = grow("sketch", rows(20), tmp_path / "p.jsonl", RowLimits(rtol=None, minutes=5, first=2))
    assert states[-1].rows == 20  # what five minutes would allow is more than there is


@pytest.mark.parametrize(
    ("minutes", "own", "per_row"), [(1.0, 9.0, 5.5), (5.0, 9.0, 5.5), (1.0, 0.1, 2.0), (2.0, 20, 1)]
)
def test_time_is_filled_with_rows_and_not_overrun(tmp_path: Path, minutes: float, own: float, per_row: float) -> None:
    """A clock that ticks `own` seconds a block and `per_row` a row."""
    now = 0.0

    def ticking(some: Rows, first_row: int, path: Path) -> Iterator[object]:
        nonlocal now
        yield from block("diagonal", some, first_row, path)
        now += own + per_row * len(some.ids)

    limits, settings = RowLimits(rtol=None, minutes=minutes), SketchOptions(4, mode="diagonal")
    pool = rows(100)
    states = [
        event
        for event in profile_more_rows(pool, tmp_path / "p.jsonl", limits, ticking, settings, clock=lambda: now)
        if isinstance(event, RowsDone)
    ]
    assert now <= 60 * minutes
    best = min(100, int((60 * minutes - own) / per_row))  # all rows in one block
    assert states[-1].rows > 0.5 * best  # what a block costs of its own is learnt from the second one
    assert states[-1].reason in ("the time is spent", "no more rows are there")


def test_an_interrupted_run_goes_on_with_its_blocks(tmp_path: Path) -> None:
    path, limits = tmp_path / "p.jsonl", RowLimits(rtol=1e-4, first=4)
    events = profile_more_rows(rows(8), path, limits, partial(block, "sketch"), SketchOptions(4))
    for event in events:
        if isinstance(event, RowsDone):
            break
    assert load_profile(path).header.rows == 4
    asked: list[int] = []

    def counted(some: Rows, first_row: int, place: Path) -> Iterator[object]:
        asked.append(first_row if not place.exists() else -1)
        return block("sketch", some, first_row, place)

    *_, profile = profile_more_rows(rows(8), path, limits, counted, SketchOptions(4))
    assert asked == [-1, 4]  # the first block was there
    assert isinstance(profile, Profile)
    assert profile.header.rows == 8
    assert SweepStore(path, profile.header).one(0).products2.shape[1] == 8


def test_another_measurement_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    list(block("diagonal", rows(3), 0, path))
    with pytest.raises(JournalError, match="method was"):
        grow("sketch", rows(8), path, RowLimits(first=4))
    assert load_profile(path).header.method == "diagonal"


def test_hybrid_runs_its_swaps_on_the_rows_that_were_reached(tmp_path: Path) -> None:
    path, pool = tmp_path / "p.jsonl", rows(12)
    base = open_checkpoint(tiny.base("llama"))
    given = [(bits, open_checkpoint(folder)) for bits, folder in tiny.variants("llama", (2, 4)).items()]
    wanted = HybridOptions(Budget(bpw=3.2), minutes=0.05, least_gain_nats=0.0)
    settings = SketchOptions(4, mode="hybrid")
    for limits, reached in ((RowLimits(rtol=1e-9, first=4), 12), (RowLimits(rtol=99.0, first=12), 4)):
        sketching = profile_more_rows(pool, path, limits, partial(block, "hybrid"), settings)
        job = ProfileJob(base, 4, given, pool.ids, path, OPTIONS, "unused", "unused")
        *_, profile = profile_hybrid(job, settings, wanted, sketching=sketching)
        assert isinstance(profile, Profile)
        assert profile.header.rows == reached  # the second run finds its first block of 4 rows and needs no more
        kept = load_profile(tmp_path / "p.jsonl.exact.jsonl")
        assert kept.header.rows == reached
        assert kept.measurements
        assert all(profile.measurements[swap] == found for swap, found in kept.measurements.items())
    assert (tmp_path / "p.jsonl.exact-12-rows.jsonl").exists()


def test_the_command_says_what_was_reached(tmp_path: Path) -> None:
    found = rows(12)
    save_rows(replace(found, documents=tuple(f"d{n // 2}" for n in range(12))), tmp_path / "rows.safetensors")
    variants = tiny.variants("llama", (2, 4))
    words = ["-mb", tiny.base("llama"), "-i", variants[4], "-s", variants[2], "-o", tmp_path / "p.jsonl"]
    words += ["--mode", "sketch", "--samples", 2, "--input-ids", tmp_path / "rows.safetensors", "--quiet"]

    def run(*more: object) -> str:
        result = CliRunner().invoke(model_profile.main, [str(word) for word in [*words, *more]])
        assert "Traceback" not in result.output
        return result.output

    assert "fixes them: give --rows auto" in run("-r", 4, "--rtol", 0.1)
    assert "8 rows of 4 documents: standard error" in (said := run("-r", "auto", "--rtol", 1e-3, "--max-rows", 10))
    assert "10 rows of 5 documents" in said
    assert "NOT reached; stopped: no more rows are there" in said
    assert "stopped: the error wanted is reached" in run("-r", "auto", "--rtol", 5)
