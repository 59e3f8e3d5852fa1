"""Runs of model_optimize on tiny variants with a profile made up in a journal, for the tests of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from click.testing import CliRunner, Result

from eval.profile.exact import ProfileJob, ProfileOptions
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_optimize import main
from recompile.costs import Measurement, ProfileHeader, load_profile, open_journal
from recompile.merge.overlay import Overlay, build_overlay
from recompile.recipe.recipe import load_recipe
from tests import tiny

FEW = ("--check", "-r", "4", "-l", "24")  # rows, to be quick


def write_profile(
    path: Path,
    architecture: str = "llama-2",
    bits: tuple[int, ...] = (3, 2, 4, 6),
    level: str = "tensor",
    wrong: bool = False,
) -> ProfileHeader:
    """A whole journal; the first of `bits` is the base. Attention costs more; wrong: more bits cost more."""
    header, content = _profile(architecture, bits, level, wrong)
    path.write_bytes(content)
    return header


@cache
def _profile(architecture: str, bits: tuple[int, ...], level: str, wrong: bool) -> tuple[ProfileHeader, bytes]:
    checkpoints = [(n, open_checkpoint(directory)) for n, directory in tiny.variants(architecture, bits).items()]
    reference = open_checkpoint(tiny.base(architecture))
    options = ProfileOptions(level=level)
    header = ProfileJob(reference, bits[0], checkpoints, tiny.rows(2, 8), Path(), options).header(torch.float32)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "profile.jsonl"
        with open_journal(path, header) as journal:
            journal.append([Measurement(None, None, (0.0, 0.0))])
            for number, group in enumerate(header.groups):
                expensive = (3.0 if "self_attn" in group.name else 1.0) * (2.0 if ".0." in group.name else 1.0)
                for label in group.bits:
                    kl = (expensive + 0.01 * number) * 4.0 ** (int(label) - 9 if wrong else -int(label))
                    journal.append([Measurement(group.name, label, (kl, 1.1 * kl))])
        return header, path.read_bytes()


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def optimize(profile: Path, *words: str | Path) -> dict[str, Any]:
    """The JSON report; the recipe lies beside the profile as mix.yaml."""
    report = profile.with_name("report.json")
    check = [] if "--check" in words else ["--no-check"]
    result = run(profile, "-o", profile.with_name("mix.yaml"), "--json", report, *check, *words)
    assert result.exit_code == 0, result.output
    return dict(json.loads(report.read_text()))


def overlay_of(profile: Path, header: ProfileHeader) -> Overlay:
    base = header.candidate(header.base).model_dir
    return build_overlay(open_checkpoint(base), load_recipe(profile.with_name("mix.yaml")))


def sources_of(report: Mapping[str, Any]) -> dict[str, str]:
    return dict(report["choice"])


def by_hand(profile: Path, *lines: str) -> Path:
    header = load_profile(profile).header
    recipe = profile.with_name("by-hand.yaml")
    sources = "".join(f"  - {{id: {c.id}, model_dir: {c.model_dir}}}\n" for c in header.candidates)
    recipe.write_text(f"sources:\n{sources}overrides:\n" + "".join(f"  - {line}\n" for line in lines))
    return recipe
