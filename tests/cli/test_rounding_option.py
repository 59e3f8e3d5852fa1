"""model_quantize --rounding and --stats: what is written, kept, reused and refused; and that it pays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import eval.passes.output_gradients as output_gradients
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_quantize import main as model_quantize
from tests import tiny
from tests.commands import refusal, run


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": tiny.rows(8, 32)}, path)
    return path


def notes_of(variant: Path) -> dict[str, str]:
    report = json.loads((variant / "quantize_report.json").read_text())
    return {module["module"]: module["rounding"] for module in report["variant"]["modules"] if module["quantized"]}


def test_statistics_are_measured_once_and_used_for_every_format(
    tmp_path: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, stats = tiny.base("llama"), tmp_path / "stats"
    common = ("-i", base, "-g", 32, "--input-ids", ids, "--quiet")
    run(model_quantize, *common, "-o", tmp_path / "two", "-b", 2, 3, "--stats", stats)
    run(model_quantize, *common, "-o", tmp_path / "one", "-b", 3)
    notes = notes_of(tmp_path / "two" / "3bpw")
    assert len(notes) == 28
    assert all(note.startswith(("two-sided, 0.", "one-sided: ")) for note in notes.values())
    assert sum(note.startswith("two-sided") for note in notes.values()) > 14
    assert set(notes_of(tmp_path / "one" / "3bpw").values()) == {""}
    before, after = (open_checkpoint(tmp_path / kind / "3bpw") for kind in ("one", "two"))
    changed = 0
    for name, note in notes.items():
        same = torch.equal(before.load(f"{name}.weight"), after.load(f"{name}.weight"))
        assert same == note.startswith("one-sided"), name
        changed += not same
    assert changed

    def not_again(*_: object, **__: object) -> None:
        raise AssertionError("statistics that are there are not measured again")

    monkeypatch.setattr(output_gradients, "measure_outputs", not_again)
    run(model_quantize, *common, "-o", tmp_path / "s", "--scheme", "nvfp4", "w4a16-g32", "w8a16", "--stats", stats)
    for scheme in ("nvfp4", "w4a16-g32", "w8a16"):
        assert any(note.startswith("two-sided") for note in notes_of(tmp_path / "s" / scheme).values()), scheme
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        "sources: [{id: 3, bits: 3}, {id: 2, bits: 2}]\n"
        'overrides: [{key: "model.layers.*", source: 2}, {key: "*.mlp.*", source: 3}]\n'
    )
    run(model_quantize, *common, "-o", tmp_path / "mix", "-or", recipe, "--stats", stats)
    mix = open_checkpoint(tmp_path / "mix")
    for part in ("weight_packed", "weight_scale"):  # the very bytes of the variants
        name = f"model.layers.1.mlp.up_proj.{part}"
        assert torch.equal(mix.read(name), after.read(name))


def test_without_stats_they_are_gone_when_the_variants_are_whole(tmp_path: Path, ids: Path) -> None:
    out = tmp_path / "out"
    run(
        model_quantize, "-i", tiny.base("qwen2-moe"), "-g", 32, "--input-ids", ids, "-o", out, "-b", 3,
        "--rounding", "two-sided", "--quiet",
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    notes = notes_of(out / "3bpw")
    assert any(note.startswith("two-sided") for name, note in notes.items() if ".experts." in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rounding", "two-sided", "--method", "rtn"), "goes with --method gptq"),
        (("--rounding", "two-sided", "--format", "exl2", "--engine", "exllamav2"), "not with --engine exllamav2"),
        (("--rounding", "one-sided", "--stats", "x"), "leave out --rounding"),
    ],
)
def test_what_cannot_be_rounded_so_is_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, ids: Path
) -> None:
    said = refusal(
        model_quantize, "-i", tiny.base("llama"), "-o", tmp_path / "o", "-b", 3, "--input-ids", ids, *options
    )
    assert message in said
    assert not (tmp_path / "o").exists()


def test_statistics_of_another_model_are_refused(tmp_path: Path, ids: Path) -> None:
    stats = tmp_path / "stats"
    common = ("-g", 32, "-b", 4, "--input-ids", ids, "--stats", stats, "--quiet")
    run(model_quantize, "-i", tiny.base("llama-ragged"), "-o", tmp_path / "a", *common)
    assert "another model" in refusal(model_quantize, "-i", tiny.base("llama"), "-o", tmp_path / "b", *common)
    (tmp_path / "file").write_text("x")
    said = refusal(
        model_quantize, "-i", tiny.base("llama"), "-o", tmp_path / "b", *common[:-3], "--stats", tmp_path / "file"
    )
    assert "is a file" in said


@pytest.mark.sweep
def test_a_trained_model_loses_less(tmp_path: Path, tiny_models: Mapping[str, Path]) -> None:
    """KL on rows that neither was made with, paired over rows."""
    base = tiny_models["tiny-dense"]
    kl = {}
    for rounding in ("one-sided", "two-sided"):
        out = tmp_path / rounding
        run(
            model_quantize,
            "-i",
            base,
            "-o",
            out,
            "-b",
            3,
            "-g",
            64,
            "-r",
            16,
            "-l",
            128,
            "--rounding",
            rounding,
            "--quiet",
        )
        report = tmp_path / f"{rounding}.json"
        run(model_diff, "-ma", out / "3bpw", "-mb", base, "-r", 16, "-l", 64, "--json", report, "--quiet")
        kl[rounding] = torch.tensor(json.loads(report.read_text())["kl_rows"])
    difference = kl["two-sided"] - kl["one-sided"]
    error = difference.std() / len(difference) ** 0.5
    assert difference.mean() < -4 * error
    assert kl["two-sided"].mean() < 0.9 * kl["one-sided"].mean()
