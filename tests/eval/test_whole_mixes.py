"""A sketch of a mixture of experts, corrected by whole mixes that are measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from safetensors.torch import save_file

import eval.profile.whole_mixes as whole_mixes
import recompile
from eval.diff import DiffReport, compare
from eval.profile.whole_mixes import PartFactor, corrected, parts_of
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import JournalError
from recompile.events import Note
from tests import tiny


@pytest.fixture(scope="module")
def sketched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """(folder with p.jsonl, corrected, and raw.jsonl, not; the base; what was said)."""
    folder = tmp_path_factory.mktemp("mixes")
    save_file({"input_ids": tiny.rows(4, 24)}, folder / "ids.safetensors")
    variants = tiny.variants("qwen3-moe", (3, 4))
    said: list[str] = []
    for name, wanted in (("p.jsonl", True), ("raw.jsonl", False)):
        recompile.profile(
            tiny.base("qwen3-moe"),
            str(variants[3]),
            [str(variants[4])],
            folder / name,
            mode="sketch",
            samples=4,
            whole_mixes=wanted,
            input_ids=folder / "ids.safetensors",
            on_event=lambda event: said.append(event.text) if isinstance(event, Note) else None,
        )
    return folder, tiny.base("qwen3-moe"), said


def test_costs_are_what_whole_mixes_measure(sketched: tuple[Path, Path, list[str]]) -> None:
    folder, base, said = sketched
    from recompile.costs import load_profile

    fixed, raw = load_profile(folder / "p.jsonl"), load_profile(folder / "raw.jsonl")
    parts = parts_of(raw)
    assert set(parts) == {"experts", "the rest"}
    variants = tiny.variants("qwen3-moe", (3, 4))
    *_, report = compare(open_checkpoint(variants[4]), open_checkpoint(base), tiny.rows(4, 24))
    assert isinstance(report, DiffReport)
    names = [group.name for group in raw.header.groups]
    total = math.fsum(cost.kl_nats for name in names if (cost := raw.cost(name, "4")) is not None)
    factor = min(max(report.kl.mean / total, 0.2), 5.0)
    for name in names:
        before, after = raw.measurements[name, "4"], fixed.measurements[name, "4"]
        if before.reached:
            assert after.mean == pytest.approx(factor * before.mean, rel=1e-4)
    assert any("measured" in line and "predicted" in line for line in said)


def test_the_same_profile_is_not_measured_again(
    sketched: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base, _ = sketched
    variants = tiny.variants("qwen3-moe", (3, 4))
    monkeypatch.setattr(whole_mixes, "MixEvaluator", None)
    journal = (folder / "p.jsonl").read_bytes()
    recompile.profile(
        base,
        str(variants[3]),
        [str(variants[4])],
        folder / "p.jsonl",
        mode="sketch",
        samples=4,
        input_ids=folder / "ids.safetensors",
    )
    assert (folder / "p.jsonl").read_bytes() == journal, "a finished run appends nothing"
    kept = folder / "p.jsonl.mixes.json"
    before = kept.read_text()
    kept.write_text(json.dumps({"kind": "mine"}))
    with pytest.raises(JournalError, match=r"p\.jsonl\.mixes\.json: is not a file of measured whole mixes"):
        recompile.profile(
            base,
            str(variants[3]),
            [str(variants[4])],
            folder / "p.jsonl",
            mode="sketch",
            samples=4,
            input_ids=folder / "ids.safetensors",
        )
    kept.write_text(before)


def test_without_correction_the_estimates_count_again(sketched: tuple[Path, Path, list[str]]) -> None:
    from recompile.costs import load_profile

    folder, base, _ = sketched
    variants = tiny.variants("qwen3-moe", (3, 4))
    path = folder / "again.jsonl"
    path.write_bytes((folder / "p.jsonl").read_bytes())
    copytree(folder / "p.jsonl.sweeps", folder / "again.jsonl.sweeps")
    settings: dict[str, Any] = {"mode": "sketch", "samples": 4, "input_ids": folder / "ids.safetensors"}
    recompile.profile(base, str(variants[3]), [str(variants[4])], path, whole_mixes=False, **settings)
    assert load_profile(path).measurements == load_profile(folder / "raw.jsonl").measurements


def test_factors_multiply_their_part_and_source_only(sketched: tuple[Path, Path, list[str]]) -> None:
    from recompile.costs import load_profile

    raw = load_profile(sketched[0] / "raw.jsonl")
    found = corrected(raw, [PartFactor("experts", "3", 1.0, 2.0, 2.0, False)])
    experts = set(parts_of(raw)["experts"])
    for (group, source), measurement in raw.measurements.items():
        times = 2.0 if group in experts and source == "3" else 1.0
        assert found.measurements[group, source].kl_rows == tuple(times * kl for kl in measurement.kl_rows)


def test_a_dense_model_has_no_parts() -> None:
    folder = tiny.variants("llama", (3, 4))
    assert recompile.open_checkpoint(folder[3]).modules
    ids = folder[3].parent / "ids-of-whole-mixes.safetensors"
    save_file({"input_ids": tiny.rows(2, 16)}, ids)
    out = folder[3].parent / "dense.jsonl"
    profile = recompile.profile(
        tiny.base("llama"), str(folder[3]), [str(folder[4])], out, mode="sketch", samples=2, input_ids=ids
    )
    assert parts_of(profile) == {}
    assert not out.with_name("dense.jsonl.mixes.json").exists()
