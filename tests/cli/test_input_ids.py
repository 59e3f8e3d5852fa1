"""Token rows of a file: all of them, or as many as -r says; never the number that is the default for text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

import recompile
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from tests import tiny
from tests.commands import run

ROWS = 20  # more than model_diff and model_profile take of a text


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "ids.safetensors"
    save_file({"input_ids": tiny.rows(ROWS, 8)}, path)
    return path


@pytest.mark.parametrize(("given", "taken"), [((), ROWS), (("-r", 3), 3), (("-r", 50), ROWS)])
def test_as_many_rows_as_asked_for(given: tuple[object, ...], taken: int, ids: Path, tmp_path: Path) -> None:
    base, variant = tiny.base("llama-tied"), tiny.variants("llama-tied", (3,))[3]
    report = tmp_path / "diff.json"
    run(model_diff, "-ma", variant, "-mb", base, "--input-ids", ids, "--json", report, "--quiet", *given)
    found = json.loads(report.read_text())
    assert found["rows"] == taken
    rows = recompile.diff(variant, base, input_ids=ids).report.kl_rows
    assert tuple(found["kl_rows"]) == pytest.approx(rows[:taken], abs=1e-6), "the first of them"
    profile = tmp_path / "p.jsonl"
    some = ("--candidates", "3,4", "--mode", "sketch", "--samples", 2, "--importance-rows", 0, "--quiet")
    run(model_profile, "-mb", base, "--input-ids", ids, "-o", profile, *some, *given)
    assert json.loads(profile.read_text().splitlines()[0])["rows"] == taken
    out = tmp_path / "built"
    run(model_quantize, "-i", base, "-o", out, "-b", 4, "-g", 32, "--input-ids", ids, "--quiet", *given)
    used = json.loads((out / "4bpw" / "quantize_report.json").read_text())["rows"]
    assert len(used["documents"]) == taken
