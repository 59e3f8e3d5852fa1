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


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("modifiers: [{method: awq, scheme: w4a16}]", UnsupportedError, "llm-compressor"),
        ("modifiers: [{method: rtm, scheme: w4a16}]", RecipeError, "wanted rtn"),
        ("modifiers: [{scheme: w4a16, target: x}]", RecipeError, "'target' is not known"),
        ("modifiers: [{scheme: w4b16}]", RecompileError, "did you mean"),
        ("modifiers: []", RecipeError, "a list"),
        ("a_stage: {b_modifiers: {SmoothQuantModifier: {smoothing_strength: 0.8}}}", UnsupportedError, "SmoothQuant"),
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
