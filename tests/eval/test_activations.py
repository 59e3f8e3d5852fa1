"""Quantized inputs: formulas by hand, the library's own forward, and both KLs by model_diff."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from eval.diff import DiffOptions, DiffReport, compare_many
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.costs import load_profile
from recompile.errors import FormatError
from recompile.formats.schemes import parse_scheme
from recompile.merge.overlay import Overlay, build_overlay
from recompile.model.activations import InputScheme, fake_quantize
from recompile.model.rows import read_rows
from recompile.quantize.pipeline import quantize_model
from recompile.quantize.scheme_encoder import SchemeEncoder, uniform
from tests import tiny
from tests.stream import architectures

NAMES = ("w8a8", "fp8-dynamic", "fp8-static", "nvfp4-a4", "mxfp4-a4")


def inputs_of(name: str) -> InputScheme:
    entry = parse_scheme(name).input_activations
    assert entry is not None
    return InputScheme.from_config(entry)


def test_int8_per_token_by_hand() -> None:
    """One scale a row: 127.5 steps to the largest value."""
    x = torch.tensor([[127.5, 1.4, -0.6], [0.0, 0.0, 0.0]])
    assert fake_quantize(x, inputs_of("w8a8")).tolist() == [[127.0, 1.0, -1.0], [0.0, 0.0, 0.0]]


def test_fp8_static_by_hand() -> None:
    """150 lies between 144 and 160, 8.5 half-way between 8 and 9; 1000 is beyond 448."""
    x = torch.tensor([[300.0, 2000.0, 17.0]])
    assert fake_quantize(x, inputs_of("fp8-static"), torch.tensor([2.0])).tolist() == [[288.0, 896.0, 16.0]]
    with pytest.raises(FormatError, match="not stored"):
        fake_quantize(x, inputs_of("fp8-static"))


def test_nvfp4_by_hand() -> None:
    """The largest value is 6 levels of the group's scale."""
    x = torch.zeros(1, 16)
    x[0, :3] = torch.tensor([12.0, 5.1, -0.4])
    made = fake_quantize(x, inputs_of("nvfp4-a4"), torch.tensor([1.0]))
    assert made[0, :4].tolist() == [12.0, 6.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("activations")
    encoder = SchemeEncoder(tuple(uniform(parse_scheme(name), "rtn") for name in NAMES))
    for _ in quantize_model(open_checkpoint(tiny.base("llama-2")), out, encoder, tiny.rows(4, 32)):
        pass
    return out


@pytest.mark.parametrize("name", ["w8a8", "fp8-dynamic", "fp8-block-dynamic", "nvfp4-a4", "mxfp4-a4", "mxfp8-a8"])
def test_values_are_the_librarys(name: str) -> None:
    pytest.importorskip("compressed_tensors")
    library = importlib.import_module("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)) * 3
    args = QuantizationArgs(**(parse_scheme(name).input_activations or {}))
    whole = 448 * 6 / x.abs().max().reshape(1) if name == "nvfp4-a4" else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity(), global_scale=whole)
    theirs = library.fake_quantize(x, scale, zero, args, global_scale=whole)
    ours = fake_quantize(x, inputs_of(name), whole)
    assert float((ours - x).norm()) > 0
    assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm())


@pytest.mark.parametrize("name", ["w8a8", "fp8-dynamic", "fp8-static"])
def test_logits_are_the_librarys(name: str, built: Path, tmp_path: Path) -> None:
    """transformers fake-quantizes the inputs of such checkpoints on every forward."""
    pytest.importorskip("compressed_tensors")
    overlay = build_overlay(open_checkpoint(built / name), None)
    base = open_checkpoint(tiny.base("llama-2"))
    ids = tiny.rows(2, 12)
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    for number, file in ((0, plain), (1, quantized)):
        options = DiffOptions(quantized_inputs=frozenset({0} if number else ()), save_candidate_logits=file)
        reports = [e for e in compare_many([overlay], base, ids, options) if isinstance(e, DiffReport)]
        assert reports[0].kl.mean > 0
    ours, weights_only = load_file(quantized)["logits"], load_file(plain)["logits"]
    theirs = tiny.plain_logits(tiny.plain_model(built / name), ids)
    assert float((ours - theirs).norm()) < 1e-4 * float(theirs.norm())
    assert float((weights_only - theirs).norm()) > 1e-3 * float(theirs.norm())


def test_model_diff_prints_both(built: Path, tmp_path: Path) -> None:
    save_file({"input_ids": tiny.rows(2, 12)}, tmp_path / "ids")
    arguments = ["-mb", str(tiny.base("llama-2")), "--input-ids", str(tmp_path / "ids"), "--quiet", "--activations"]
    ran = CliRunner().invoke(model_diff, ["-ma", str(built / "w8a8"), *arguments, "--json", str(tmp_path / "j")])
    assert ran.exit_code == 0, ran.output
    assert "Inputs quantized as well" in ran.output
    found = json.loads((tmp_path / "j").read_text())
    assert found["with_activations"]["kl"]["mean"] > found["kl"]["mean"]
    both = CliRunner().invoke(model_diff, ["-ma", str(built / "w8a8"), *arguments, "-sla", str(tmp_path / "a")])
    assert both.exit_code == 0, both.output
    saved, ids = load_file(tmp_path / "a")["logits"], tiny.rows(2, 12)
    options = DiffOptions(quantized_inputs=frozenset({0}), save_candidate_logits=tmp_path / "wanted")
    overlay = build_overlay(open_checkpoint(built / "w8a8"), None)
    list(compare_many([overlay], open_checkpoint(tiny.base("llama-2")), ids, options))
    assert torch.equal(saved, load_file(tmp_path / "wanted")["logits"]), "those with quantized inputs"
    refused = CliRunner().invoke(model_diff, ["-ma", str(tiny.base("llama-2")), *arguments])
    assert (refused.exit_code, "input_activations" in refused.output) == (1, True)


@pytest.mark.parametrize(
    ("name", "why", "module"),
    [
        ("glm4-moe", "are experts that no token reached", "model.layers.1.mlp.experts.0.down_proj"),
        ("gemma4", "stand outside of the layers, where inputs are kept", "model.per_layer_model_projection"),
        ("llama", None, ""),
    ],
)
def test_modules_whose_inputs_were_not_quantized_are_named(
    name: str, why: str | None, module: str, tmp_path: Path
) -> None:
    folder = architectures.checkpoint(name)
    encoder = SchemeEncoder((uniform(parse_scheme("fp8-dynamic"), "rtn"),))
    for _ in quantize_model(open_checkpoint(folder), tmp_path, encoder, architectures.rows(2, 12)):
        pass
    save_file({"input_ids": architectures.rows(1, 6)}, tmp_path / "ids")
    arguments = ["-ma", str(tmp_path / "fp8-dynamic"), "-mb", str(folder), "--input-ids", str(tmp_path / "ids")]
    ran = CliRunner().invoke(model_diff, [*arguments, "--quiet", "--activations", "--json", str(tmp_path / "j")])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "j").read_text())["with_activations"]["unseen_inputs"]
    assert [entry["why"] for entry in found] == ([why] if why else [])
    assert not why or found[0]["modules"][0] == module
    assert (f"Not quantized: inputs of {module}" in ran.output) == bool(why)


def profile(built: Path, out: Path, *more: str) -> Result:
    rows = ["-r", "2", "-l", "16", "--quiet", "--mode", "exact", "--level", "fused", "-o", str(out)]
    variants = ["-i", str(built / "fp8-static"), "-s", str(built / "w8a8")]
    return CliRunner().invoke(model_profile, ["-mb", str(tiny.base("llama-2")), *variants, *rows, *more])


def test_a_profile_with_activations_is_a_diff_of_one_swap(built: Path, tmp_path: Path) -> None:
    """Its figure for one group is the KL of the base with that group swapped and its inputs quantized."""
    found = profile(built, tmp_path / "p.jsonl", "--activations")
    assert found.exit_code == 0, found.output
    with_inputs = load_profile(tmp_path / "p.jsonl")
    assert profile(built, tmp_path / "plain.jsonl").exit_code == 0
    weights_only = load_profile(tmp_path / "plain.jsonl")
    group = "model.layers.1.mlp.down_proj"
    everywhere = {found.name: "fp8-static" for found in with_inputs.header.groups}
    costs = [made.cost(group, "w8a8") for made in (with_inputs, weights_only)]
    base, swapped = open_checkpoint(tiny.base("llama-2")), open_checkpoint(built / "w8a8")
    rows, _ = read_rows([base.path], "choose", 2, 16, None, None, None)
    mix = Overlay.of_choice(with_inputs.header, {"fp8-static": base, "w8a8": swapped}, {**everywhere, group: "w8a8"})
    for cost, quantized in zip(costs, (frozenset({0}), frozenset[int]()), strict=True):
        options = DiffOptions(quantized_inputs=quantized)
        (report,) = (e for e in compare_many([mix], base, rows.ids, options) if isinstance(e, DiffReport))
        assert cost is not None
        assert cost.kl_nats == pytest.approx(report.kl.mean, rel=0.01)  # 3e-5 nats in float32
    assert costs[0].kl_nats > 1.05 * costs[1].kl_nats


def test_what_activations_cannot_be_measured_for(built: Path, tmp_path: Path) -> None:
    for more, message in (
        (["--mode", "sketch"], "needs --mode exact"),
        (["--context", "base"], "needs --context clean"),
    ):
        refused = profile(built, tmp_path / "p.jsonl", "--activations", *more)
        assert (refused.exit_code, message in refused.output) == (1, True), refused.output


def test_model_optimize_measures_its_mixes_with_quantized_inputs(built: Path, tmp_path: Path) -> None:
    """4-bit floats as inputs cost far more than 4-bit weights alone: the same recipe, measured both ways."""
    variants = ["-i", str(built / "nvfp4-a4"), "-s", str(built / "w8a8")]
    rows = ["-r", "2", "-l", "16", "--quiet"]
    made = CliRunner().invoke(
        model_profile, ["-mb", str(tiny.base("llama-2")), *variants, "-o", str(tmp_path / "p.jsonl"), *rows]
    )
    assert made.exit_code == 0, made.output
    found = []
    for more in ([], ["--activations"]):
        arguments = [str(tmp_path / "p.jsonl"), "-b", "6.5", "-o", str(tmp_path / "o.yaml"), "--solver", "exact"]
        ran = CliRunner().invoke(
            model_optimize, [*arguments, "--check", "--no-guard", *rows, *more, "--json", str(tmp_path / "j")]
        )
        assert ran.exit_code == 0, ran.output
        assert ("inputs quantized as the schemes say" in ran.output) == bool(more)
        found.append(json.loads((tmp_path / "j").read_text())["verdict"]["contenders"][0]["kl"]["mean"])
    assert found[1] > 1.2 * found[0]
    refused = CliRunner().invoke(model_optimize, [*arguments, "--no-check", "--activations"])
    assert (refused.exit_code, "about --check" in refused.output) == (1, True)
