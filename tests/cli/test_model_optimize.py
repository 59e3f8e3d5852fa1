"""model_optimize as people type it, on tiny variants with a profile made up in a journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from click.testing import CliRunner, Result

from eval.profile import ProfileOptions, make_header
from recompile.checkpoint import open_checkpoint
from recompile.cli.model_optimize import main
from recompile.costs import Measurement, ProfileHeader, load_profile, open_journal
from recompile.overlay import Overlay, build_overlay
from recompile.recipe import load_recipe


def write_profile(
    path: Path, architecture: str = "llama", bits: tuple[int, ...] = (3, 2, 4, 6), level: str = "tensor"
) -> ProfileHeader:
    """A whole journal; the first of `bits` is the base. Attention is dear, layer 0 most."""
    checkpoints = [(n, open_checkpoint(directory)) for n, directory in tiny.variants(architecture, bits).items()]
    reference = open_checkpoint(tiny.base(architecture))
    options = ProfileOptions(level=level)
    header = make_header(reference, str(bits[0]), checkpoints, tiny.rows(2, 8), options, torch.float32)
    with open_journal(path, header) as journal:
        journal.append([Measurement(None, None, (0.0, 0.0))])
        for number, group in enumerate(header.groups):
            dear = (3.0 if "self_attn" in group.name else 1.0) * (2.0 if ".0." in group.name else 1.0)
            for label in group.bits:
                kl = (dear + 0.01 * number) * 4.0 ** -int(label)
                journal.append([Measurement(group.name, label, (kl, 1.1 * kl))])
    return header


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def optimize(profile: Path, *words: str | Path) -> dict[str, Any]:
    """The JSON report; the recipe lies beside the profile as mix.yaml."""
    report = profile.with_name("report.json")
    result = run(profile, "-o", profile.with_name("mix.yaml"), "--json", report, *words)
    assert result.exit_code == 0, result.output
    return dict(json.loads(report.read_text()))


def overlay_of(profile: Path, header: ProfileHeader) -> Overlay:
    base = header.candidate(header.base).model_dir
    return build_overlay(open_checkpoint(base), load_recipe(profile.with_name("mix.yaml")))


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profile.jsonl")
    return tmp_path / "profile.jsonl"


def sources_of(report: Mapping[str, Any]) -> dict[str, str]:
    return dict(report["choice"])


def test_the_recipe_has_globs_and_resolves_to_the_choice(tmp_path: Path) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile)
    report = optimize(profile, "-b", "3.9", "--pin", "*.v_proj=6", "--ban", "*=2")
    overlay = overlay_of(profile, header)
    assert overlay.warnings == ()
    directories = {candidate.label: candidate.model_dir for candidate in header.candidates}
    for group in header.groups:
        label = sources_of(report)[group.name]
        assert label != "2"
        for module in group.modules:
            assert overlay.placements[module].source == (None if label == header.base else directories[label])
    assert overlay.accounting.bpw == report["bpw"] <= 3.9
    recipe = load_recipe(profile.with_name("mix.yaml"))
    assert "model.layers.*.self_attn.v_proj.*" in [override.key for override in recipe.overrides]
    assert len(recipe.provenance["profile"]["sha256"]) == 64
    assert set(recipe.provenance["profile"]["sources"]) == {"2", "3", "4", "6"}


def test_sources_that_are_gone_give_a_plain_recipe_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile)
    text = profile.read_text()
    for candidate in header.candidates:
        text = text.replace(json.dumps(candidate.model_dir), json.dumps(f"gone/{candidate.id}bpw"))
    profile.write_text(text)
    result = run(profile, "-b", "3.9", "-o", tmp_path / "mix.yaml", "--pin", "*.v_proj=6")
    assert result.exit_code == 0
    assert "the sources are not at hand" in result.output
    recipe = load_recipe(tmp_path / "mix.yaml")
    assert not any("*" in override.key.removesuffix(".*") for override in recipe.overrides)


def test_an_engine_ties_what_it_fuses(profile: Path) -> None:
    chosen = sources_of(optimize(profile, "-b", "3.7", "--engine", "vllm"))
    for layer in range(2):
        assert len({chosen[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({chosen[f"model.layers.{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    refused = run(profile, "-b", "3.7", "--engine", "exllamav3", "-o", profile.with_name("no.yaml"))
    assert refused.exit_code == 1
    assert "exllamav3 does not read pack-quantized" in refused.output
    assert not profile.with_name("no.yaml").exists()


def test_ties(profile: Path) -> None:
    chosen = sources_of(optimize(profile, "-b", "3.7", "--tie", "*.down_proj"))
    assert len({source for module, source in chosen.items() if module.endswith("down_proj")}) == 1


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_spellings_of_one_budget(profile: Path) -> None:
    report = optimize(profile, "-b", "3.7")
    for words in (["--bits", "3.7"], ["--target-bpw", "3.7"]):
        assert optimize(profile, *words)["choice"] == report["choice"]
    size = report["total_bytes"]
    for words in (["--size", str(size)], ["--target-size", f"{size / 2**30:.12f}G"]):
        assert optimize(profile, *words)["total_bytes"] <= size


def test_pools_count_what_their_globs_name_besides(profile: Path) -> None:
    header = load_profile(profile).header
    base = open_checkpoint(header.candidate(header.base).model_dir)
    embedding = base.modules["model.embed_tokens"].size_bytes
    attention = [g for g in header.groups if "self_attn" in g.name]
    room = sum(g.bits["4"] for g in attention) // 8
    report = optimize(
        profile,
        *("--pool", f"gpu=*.self_attn.*,*.embed_tokens:{room + embedding}"),
        *("--pool", "cpu=*.mlp.*:40KiB"),
    )
    used = sum(g.bits[report["choice"][g.name]] for g in attention) // 8
    assert room - 2000 < used <= room
    assert sum(g.bits[report["choice"][g.name]] for g in header.groups if ".mlp." in g.name) <= 8 * 40 * 1024


def test_active_bits_of_a_moe(tmp_path: Path) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile, "qwen2-moe")
    report = optimize(profile, "--active-bpw", "3.6")
    bits = weights = 0.0
    for group in header.groups:
        share = 0.5 if ".experts." in group.name else 1.0  # 2 of 4 experts
        bits += share * group.bits[report["choice"][group.name]]
        weights += share * group.weights
    assert 3.5 < bits / weights <= 3.6
    refused = run(tmp_path / "profile.jsonl", "--active-bpw", "1")
    assert refused.exit_code == 1
    assert "--active-bpw 1 binds" in refused.output


def test_limits_on_kl_and_perplexity(profile: Path) -> None:
    report = optimize(profile, "--max-ppl-increase", "30%")
    assert report["predicted_kl_nats"] <= 0.2623643
    assert optimize(profile, "--max-kl", "0.26236426")["choice"] == report["choice"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give a budget"),
        (["-b", "3", "--size", "1GiB"], "give one of"),
        (["-b", "1"], "reachable range: 2."),
        (["--pool", "gpu"], "wanted NAME=GLOB"),
        (["--active-bpw", "3"], "config.json names no experts"),
        (["--max-ppl-increase", "much"], "wanted a share"),
        (["-b", "3.7", "--max-step", "1", "--solver", "greedy"], "--max-step needs --solver exact"),
    ],
)
def test_budgets_that_cannot_be_read_or_met(profile: Path, words: list[str], says: str) -> None:
    result = run(profile, "-o", profile.with_name("no.yaml"), *words)
    assert result.exit_code == 1
    assert says in result.output
    assert not profile.with_name("no.yaml").exists()
