"""The whole job on the real small model, through the commands that people type."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import model_diff, model_optimize, model_profile, model_quantize
from recompile.cli import recompile as recompile_command
from recompile.merge.overlay import build_overlay

ROWS = ["-r", "2", "-l", "48"]
LAYERS = 10


def run(command: Any, *words: str | Path) -> str:
    result = CliRunner().invoke(command.main, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def base(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model's first layers: all would take three times as long, and show no more."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("base") / base_model.name
    shutil.copytree(base_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(base_model / "model.safetensors")
    number = re.compile(r"model\.layers\.(\d+)\.")
    cut = [name for name in tensors if (found := number.match(name)) is not None and int(found[1]) >= LAYERS]
    save_file({name: value for name, value in tensors.items() if name not in cut}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    return folder


@pytest.fixture(scope="module")
def work(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Variants of the real model at 2, 3, 4 and 6 bits, a sketch profile of it, and a recipe for 3.5 bpw."""
    work = tmp_path_factory.mktemp("smollm2")
    run(model_quantize, "-i", base, "-o", work, "-b", "2", "3", "4", "6", "--method", "rtn", *ROWS)
    sources = [work / f"{bits}bpw" for bits in (2, 4, 6)]
    run(
        model_profile,
        *("-mb", base, "-i", work / "3bpw", "-s", *sources, "-o", work / "profile.jsonl"),
        *("--mode", "sketch", "--samples", "2", "-r", "2", "-l", "48"),  # exact swaps would take four times as long
    )
    chosen = ["-b", "3.5", "-o", work / "mix.yaml", "--no-guard", "--no-check"]
    run(model_optimize, work / "profile.jsonl", *chosen)
    run(recompile_command, "-i", work / "3bpw", "-o", work / "mix", "-or", work / "mix.yaml", "--verify")
    return work


@cache  # a test asks for what another has measured
def kl_of(work: Path, base: Path, *words: str | Path) -> dict[str, Any]:
    report = work / "diff.json"
    run(model_diff, *words, "-mb", base, *ROWS, "--json", report)
    return json.loads(report.read_text())  # type: ignore[no-any-return]


def test_the_recipe_measures_the_same_before_and_after_it_is_written(work: Path, base: Path) -> None:
    overlaid = kl_of(work, base, "-ma", work / "3bpw", "-or", work / "mix.yaml")
    written = kl_of(work, base, "-ma", work / "mix")
    assert overlaid["kl"] == written["kl"]
    assert overlaid["kl_rows"] == written["kl_rows"]
    assert overlaid["score_candidate"] == written["score_candidate"]
    assert overlaid["size"]["total_bytes"] == written["size"]["total_bytes"]


def test_the_budget_is_kept_and_bits_help(work: Path, base: Path) -> None:
    mix = build_overlay(open_checkpoint(work / "mix"), None)
    assert 3.5 - 0.05 < mix.accounting.bpw <= 3.5
    names = ("2bpw", "3bpw", "4bpw", "6bpw", "mix")
    words = [word for name in names for word in ("-ma", work / name)]
    found = kl_of(work, base, *words)["candidates"]
    kl = {name: one["kl"]["mean"] for name, one in zip(names, found, strict=True)}
    assert kl["2bpw"] > kl["3bpw"] > kl["mix"] > kl["6bpw"] > 0
    assert kl["4bpw"] < kl["3bpw"]


def test_a_model_against_itself_has_no_divergence(work: Path, base: Path) -> None:
    report = kl_of(work, base, "-ma", base)
    assert report["kl"]["mean"] == 0.0
    assert report["identical"] is True


def test_transformers_loads_the_mix_and_agrees(work: Path, base: Path) -> None:
    """The mix of 2, 3, 4 and 6 bits in transformers with compressed-tensors on the CPU, against our own decoding.

    float32 arithmetic over ten layers in another order of operations: 2e-3 on logits of size 20 is its rounding.
    """
    pytest.importorskip("compressed_tensors")
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    recipe, mix = work / "four-widths.yaml", work / "four-widths"
    recipe.write_text(
        "sources:\n"
        + "".join(f"  - {{id: {bits}, model_dir: {work}/{bits}bpw}}\n" for bits in (4, 2, 6))
        + "overrides:\n"
        '  - {key: "*.self_attn.*", source: 4}\n'
        '  - {key: "model.layers.5.mlp.up_proj.*", source: 2}\n'
        '  - {key: "*.down_proj.*", source: 6}\n'
    )
    run(recompile_command, "-i", work / "3bpw", "-o", mix, "-or", recipe)
    ids, logits = work / "ids.safetensors", work / "logits.safetensors"
    kl_of(work, base, "-ma", mix, "-si", ids, "-sla", logits)
    model = AutoModelForCausalLM.from_pretrained(mix, dtype=torch.float32, local_files_only=True).eval()
    groups = model.config.quantization_config.to_dict()["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {2, 3, 4, 6}
    with torch.inference_mode():
        theirs = model(load_file(ids)["input_ids"]).logits
    ours = load_file(logits)["logits"]
    assert theirs.shape == ours.shape
    assert float((theirs - ours).abs().max()) < 2e-3
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


def test_a_hand_edited_recipe(work: Path, base: Path) -> None:
    """The mission's own recipe: attention one step up, some layers two."""
    recipe = work / "by-hand.yaml"
    recipe.write_text(
        f"sources:\n  - {{id: 4, model_dir: {work}/4bpw}}\n  - {{id: 6, model_dir: {work}/6bpw}}\n"
        'overrides:\n  - {key: "*.self_attn.*", source: 4}\n  - {key: "model.layers.0.*", source: 6}\n'
    )
    before = kl_of(work, base, "-ma", work / "3bpw")
    after = kl_of(work, base, "-ma", work / "3bpw", "-or", recipe)
    assert after["kl"]["mean"] < before["kl"]["mean"]
    overlay = build_overlay(open_checkpoint(work / "3bpw"), recipe)
    places = {name: placement.source for name, placement in overlay.placements.items()}
    assert places["model.layers.0.mlp.up_proj"] == f"{work}/6bpw"
    assert places["model.layers.0.self_attn.q_proj"] == f"{work}/6bpw"  # the directory first named last wins
    assert places["model.layers.1.self_attn.q_proj"] == f"{work}/4bpw"
    assert places["model.layers.1.mlp.up_proj"] is None
