"""Recipes of modifiers: ours, llm-compressor's, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.coupled_modules import read_scaled_sets
from recompile.cli.model_quantize import main as model_quantize
from recompile.errors import FormatError, RecipeError, RecompileError, UnsupportedError
from recompile.formats.schemes import parse_scheme
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.model.stream import LayeredModel
from recompile.quantize.calibrate import InputCollector
from recompile.quantize.modifiers import load_modifiers
from recompile.quantize.pipeline import BuildOptions, quantize_model
from recompile.quantize.quantize_report import LayerDone
from recompile.quantize.scheme_encoder import SchemeEncoder, uniform
from tests import mixes, tiny

ATTENTION, DOWN, UP = (f"model.layers.3.{leaf}_proj" for leaf in ("self_attn.q", "mlp.down", "mlp.up"))


def load(folder: Path, text: str):
    (folder / "recipe.yaml").write_text(text)
    return load_modifiers(folder / "recipe.yaml")


def test_the_first_modifier_that_matches_decides(tmp_path: Path) -> None:
    variant, notes = load(
        tmp_path,
        'modifiers:\n- {method: gptq, scheme: w4a16-g64, targets: "*.self_attn.*"}\n'
        '- {method: rtn, scheme: fp8-channel, targets: ["*.mlp.*"], ignore: "*.up_proj"}\n',
    )
    assert (variant.name, notes) == ("recipe", [])
    attention, down = variant.rule_of(ATTENTION), variant.rule_of(DOWN)
    assert attention is not None
    assert attention.scheme is not None
    assert attention.scheme.name == "w4a16-g64"
    assert down is not None
    assert down.scheme is not None
    assert (down.method, down.scheme.name) == ("rtn", "fp8-channel")
    assert variant.rule_of(UP) is None


def test_a_recipe_of_llm_compressor(tmp_path: Path) -> None:
    variant, notes = load(
        tmp_path,
        r"""
quant_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: ["lm_head"]
      dampening_frac: 0.02
      config_groups:
        group_0: {targets: ["re:.*down_proj$"], weights: {num_bits: 8, type: int, strategy: channel, symmetric: true}}
        group_1:
          targets: ["re:.*self_attn.*_proj$"]
          weights: {num_bits: 4, type: float, strategy: tensor_group, group_size: 16, symmetric: true, dynamic: false}
    QuantizationModifier: {scheme: {FP8_DYNAMIC: ["re:.*up_proj$"]}}
""",
    )
    found = [variant.rule_of(name) for name in (DOWN, ATTENTION, UP)]
    formats = [rule.scheme.format for rule in found if rule is not None and rule.scheme is not None]
    assert formats == ["pack-quantized", "nvfp4-pack-quantized", "float-quantized"]
    assert [rule.method for rule in found if rule is not None] == ["gptq", "gptq", "rtn"]
    assert variant.rule_of("lm_head") is None
    assert len(notes) == 1
    assert "dampening_frac" in notes[0]


def test_scalings_of_ours_and_of_llm_compressor(tmp_path: Path) -> None:
    """SmoothQuantModifier then GPTQModifier is its recipe for w8a8; AWQModifier rounds as well."""
    variant, notes = load(
        tmp_path,
        """
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8, ignore: ["re:.*mlp.*"]}
    AWQModifier: {scheme: W4A16_ASYM, targets: ["re:.*mlp.*"], ignore: [lm_head], duo_scaling: true}
    GPTQModifier: {scheme: W8A8, targets: Linear, ignore: [lm_head]}
""",
    )
    assert ["duo_scaling" in note for note in notes] == [True]
    scaling, rule = variant.scaling_of(ATTENTION), variant.rule_of(ATTENTION)
    assert scaling is not None
    assert rule is not None
    assert rule.scheme is not None
    assert (scaling.method, scaling.strength, rule.method, rule.scheme.name) == ("smoothquant", 0.8, "gptq", "w8a8")
    scaling, rule = variant.scaling_of(DOWN), variant.rule_of(DOWN)
    assert scaling is not None
    assert rule is not None
    assert rule.scheme is not None
    assert (scaling.method, rule.method, rule.scheme.name) == ("awq", "mse", "w4a16-g128-asym")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("modifiers: [{method: spinquant, scheme: w4a16}]", UnsupportedError, "llm-compressor"),
        ("modifiers: [{method: awq}]", RecipeError, "no modifier has a scheme"),
        ("modifiers: [{method: awq+gptq}]", RecipeError, "scheme is missing"),
        ("modifiers: [{method: awq, scheme: w4a16, strength: 0.5}]", RecipeError, "strength is SmoothQuant's"),
        ("modifiers: [{method: smoothquant, scheme: w8a8, strength: 2}]", RecipeError, "from 0 to 1"),
        ("modifiers: [{method: rtm, scheme: w4a16}]", RecipeError, "wanted rtn"),
        ("modifiers: [{scheme: w4a16, target: x}]", RecipeError, "'target' is not known"),
        ("modifiers: [{scheme: w4b16}]", RecompileError, "did you mean"),
        ("modifiers: []", RecipeError, "a list"),
        ("a_stage: {b_modifiers: {SmoothQuantModifier: {smoothing_strength: 0.8}}}", RecipeError, "no modifier has"),
        ("a_stage: {b_modifiers: {AWQModifier: {scheme: W4A16, mappings: [{}]}}}", UnsupportedError, "mappings"),
        ("a_stage: {b_modifiers: {SpinQuantModifier: {rotations: [R1]}}}", UnsupportedError, "SpinQuant"),
        (
            "a_stage: {b_modifiers: {GPTQModifier: {scheme: W4A16, kv_cache_scheme: {}}}}",
            RecipeError,
            "kv_cache_scheme",
        ),
        ("[1, 2]", RecipeError, "modifiers"),
    ],
)
def test_what_is_refused(text: str, kind: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message):
        load(tmp_path, text)


# ---- one pass, sequentially or independently -------------------------------------------------------------------------

SEEN: dict[str, Tensor] = {}


class Recording(SchemeEncoder):
    """Keeps the Hessian that every module was made with."""

    def encode_observed(self, weights, hessian, biases, largest):
        SEEN.update(dict.fromkeys(weights, hessian.clone()))
        return super().encode_observed(weights, hessian, biases, largest)


def hessians_of(directory: Path, ids: Tensor) -> dict[str, Tensor]:
    model = LayeredModel.of(open_checkpoint(directory))
    found = {}
    with torch.inference_mode():
        states = list(model.embed(ids, len(ids)))
        for index in range(model.depth):
            with model.layer(index), InputCollector(model, index) as collector:
                states = [model.run_layer(index, state) for state in states]
            found |= {name: group.hessian for group in collector.groups for name in group.modules}
    return found


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("sequential", [True, False])
def test_what_layers_are_calibrated_on(sequential: bool, method: str, tmp_path: Path) -> None:
    """Sequentially: the inputs that the finished variant itself gives its layers, but for what a layer does to its own
    later maps; independently: those of the base."""
    base, ids = tiny.base("llama-2"), tiny.rows(4, 16)
    encoder = Recording((replace(uniform(parse_scheme("w3a16-g32"), method), name="mix"),))
    SEEN.clear()
    for _ in quantize_model(open_checkpoint(base), tmp_path, encoder, ids, BuildOptions(sequential=sequential)):
        pass
    name = "model.layers.1.self_attn.q_proj"
    of_base, of_mix = hessians_of(base, ids)[name], hessians_of(tmp_path / "mix", ids)[name]
    scaled = name in {reader for entry in read_scaled_sets(tmp_path / "mix") for reader in entry.consumers}
    assert scaled == (method == "awq")
    if method == "gptq":
        near, far = (of_mix, of_base) if sequential else (of_base, of_mix)
        assert torch.allclose(SEEN[name], near, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(SEEN[name], far, rtol=1e-2)
    elif sequential:
        assert torch.allclose(SEEN[name], of_mix, rtol=1e-3, atol=1e-2)


def test_a_sequential_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    base, ids = tiny.base("llama-2"), tiny.rows(4, 16)
    encoder = SchemeEncoder((replace(uniform(parse_scheme("w3a16-g32")), name="mix"),))

    def run(out: Path) -> Iterator[object]:
        return quantize_model(open_checkpoint(base), out, encoder, ids, BuildOptions(sequential=True))

    list(run(tmp_path / "whole"))
    killed = run(tmp_path / "killed")
    next(killed)
    killed.close()
    events = list(run(tmp_path / "killed"))
    assert any(event.resumed for event in events if isinstance(event, LayerDone))
    one, two = (load_file(tmp_path / name / "mix" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    two_variants = SchemeEncoder((uniform(parse_scheme("w3a16-g32")), uniform(parse_scheme("w8a16"))))
    with pytest.raises(FormatError, match="one at a time"):
        list(quantize_model(open_checkpoint(base), tmp_path / "two", two_variants, ids, BuildOptions(sequential=True)))


def test_independent_modifiers_make_the_merge_of_their_variants(tmp_path: Path) -> None:
    """By the commands; without --independent the second layer is calibrated on other inputs."""
    base, ids = tiny.base("llama-2"), tmp_path / "ids.safetensors"
    save_file({"input_ids": tiny.rows(4, 16)}, ids)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        'modifiers:\n- {method: gptq, scheme: w4a16-g32, targets: "*.self_attn.*"}\n- {method: mse, scheme: nvfp4}\n'
    )

    def run(out: str, *more: str) -> Path:
        arguments = ["-i", str(base), "-o", str(tmp_path / out), "--input-ids", str(ids), "--quiet", *more]
        result = CliRunner().invoke(model_quantize, arguments)
        assert result.exit_code == 0, result.output
        return tmp_path / out

    gptq, mse = run("gptq", "--scheme", "w4a16-g32"), run("mse", "--scheme", "nvfp4", "--method", "mse")
    mix = mixes.recipe(tmp_path / "mix.yaml", {"*.self_attn.*": gptq / "w4a16-g32"})
    overlay = build_overlay(open_checkpoint(mse / "nvfp4"), mix)
    for _ in execute(plan_write(overlay, tmp_path / "merged")):
        pass
    merged, alone, one_after_another = (
        load_file(path / "model.safetensors")
        for path in (
            tmp_path / "merged",
            run("independent", "--modifiers", str(recipe), "--independent") / "recipe",
            run("sequential", "--modifiers", str(recipe)) / "recipe",
        )
    )
    assert merged.keys() == alone.keys() == one_after_another.keys()
    different = [
        name for name in merged if not torch.equal(merged[name].view(torch.uint8), alone[name].view(torch.uint8))
    ]
    assert different == []
    packed = "model.layers.1.self_attn.q_proj.weight_packed"
    assert not torch.equal(merged[packed], one_after_another[packed])
    refused = CliRunner().invoke(model_quantize, ["-i", str(base), "-o", "x", "-b", "4", "--independent"])
    assert (refused.exit_code, "goes with --modifiers" in refused.output) == (1, True)


def test_modifiers_that_take_nothing_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("modifiers:\n  - {method: rtn, scheme: w4a16-g64, targets: 'no.such'}\n")
    words = [
        "-i",
        str(tiny.base("llama")),
        "--modifiers",
        str(path),
        "-o",
        str(tmp_path / "OUT"),
        "-r",
        "2",
        "-l",
        "16",
    ]
    result = CliRunner().invoke(model_quantize, words)
    assert result.exit_code == 1
    assert f"nothing would be quantized; model.layers.0.mlp.down_proj: no rule of {path} takes it" in result.output
