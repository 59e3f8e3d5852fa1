"""Candidates that are rounded with error feedback cost what variants on disk cost, and are made once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import recompile
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.costs import Profile, load_profile
from recompile.recipe.recipe import load_recipe
from tests.commands import refusal, run

ROWS: Mapping[str, Any] = {"rows": 2, "length": 64}


def costs(profile: Profile) -> dict[tuple[str | None, str | None], float]:
    return {swap: found.mean for swap, found in profile.measurements.items()}


@pytest.mark.parametrize(
    ("format_name", "names"),
    [
        ("compressed-tensors", ["2", "4", "fp8-channel"]),
        ("mlx", ["3", "4"]),
        pytest.param("exl2", ["2.5", "4"], marks=pytest.mark.sweep),
    ],
)
def test_rounded_candidates_cost_what_variants_cost(
    format_name: str, names: list[str], tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    base, out = tiny_models["tiny-dense"], tmp_path / "p.jsonl"
    calibration: dict[str, Any] = {"rows": 2, "length": 512, "format": format_name}
    bits = [name for name in names if name[0].isdigit()]
    recompile.quantize(base, tmp_path / "variants", bits=bits, **calibration)
    if len(bits) < len(names):
        recompile.quantize(base, tmp_path / "variants", scheme=names[len(bits) :], rows=2)
    first, *others = [str(tmp_path / "variants" / (f"{name}bpw" if name in bits else name)) for name in names]
    how: dict[str, Any] = {"mode": "sketch", "samples": 2, "level": "layer", **ROWS}
    wanted = recompile.profile(base, first, others, tmp_path / "v.jsonl", **how)
    how |= {"candidates": names, "format": format_name, "importance_rows": 2}
    found = recompile.profile(base, names[0], out=out, feedback=True, **how)
    assert costs(found) == pytest.approx(costs(wanted), rel=1e-5)
    assert all(candidate.spec and candidate.feedback for candidate in found.header.candidates)
    plain = recompile.profile(base, names[0], out=tmp_path / "plain.jsonl", **how)
    assert costs(found) != pytest.approx(costs(plain), rel=0.05)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("p.jsonl.rounded/*/*")}
    assert times
    assert costs(recompile.profile(base, names[0], out=out, feedback=True, **how)) == costs(found)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("p.jsonl.rounded/*/*")} == times


def test_a_search_runs_the_rounded_weights_and_says_where_they_are_gone(
    tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    profile, recipe = tmp_path / "p.jsonl", tmp_path / "mix.yaml"
    rows = ("-r", 2, "-l", 64, "--quiet")
    run(
        model_profile, "-mb", tiny_models["tiny-dense"], "--candidates", "2,4", "--importance-rows", 2, "--feedback",
        "--mode", "sketch", "--samples", 2, "--level", "layer", "-o", profile, *rows,
    )  # fmt: skip
    assert all(candidate.feedback for candidate in load_profile(profile).header.candidates)
    search = ("-b", 3.25, "-o", recipe, "--steps", 1, *rows)
    run(model_optimize, profile, *search)
    assert {source.spec["bits"] for source in load_recipe(recipe).sources if source.spec} <= {2, 4}
    assert "measured_kl_nats" in load_recipe(recipe).provenance
    shutil.rmtree(tmp_path / "p.jsonl.rounded")
    said = run(model_optimize, profile, "-b", 3.25, "-o", recipe)
    assert "p.jsonl.rounded/2bpw: not there" in said
    assert "nothing checked" in said
    assert "p.jsonl.rounded/2bpw: not there" in refusal(model_optimize, profile, "--solver", "refine", *search)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--candidates", "Q4_K,Q6_K"), "not for candidates of GGUF types"),
        (("--candidates", "3,4", "--format", "exl3"), "not for candidates of EXL3"),
        (("-i", "3bpw", "-s", "4bpw"), "--feedback goes with --candidates"),
        (("--candidates", "3,4", "--importance-rows", 0), "wanted --importance-rows 1 or more"),
    ],
)
def test_kinds_that_are_not_rounded_so_are_refused(
    given: tuple[object, ...], said: str, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    words = ("-mb", tiny_models["tiny-dense"], "--feedback", "-o", tmp_path / "p.jsonl", "-r", 1, "-l", 16)
    assert said in refusal(model_profile, *words, *given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "theirs", ["p.jsonl.rounded", "p.jsonl.rounded/3bpw", "p.jsonl.rounded/3bpw/model.safetensors"]
)
def test_what_stands_in_the_place_of_rounded_candidates_stays(
    theirs: str, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / theirs
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    words = ("-mb", tiny_models["tiny-dense"], "--candidates", "3,4", "--feedback", "--importance-rows", 1)
    said = refusal(model_profile, *words, "-o", tmp_path / "p.jsonl", "-r", 1, "-l", 16, "--quiet")
    assert "p.jsonl.rounded" in said
    assert "exists" in said or "Not a directory" in said
    assert path.read_text() == "mine"
