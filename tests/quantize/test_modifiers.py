"""Recipes of modifiers: ours, llm-compressor's, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from recompile.errors import RecipeError, RecompileError, UnsupportedError
from recompile.quantize.modifiers import load_modifiers

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
