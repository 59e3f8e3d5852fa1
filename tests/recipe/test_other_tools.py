"""Recipes of MLX, ModelOpt and exllamav3 as recipes of sources that are made; what they say that ours cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.errors import RecipeError
from recompile.quantize.modifiers import load_modifiers
from recompile.recipe.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from tests import tiny
from tests.commands import refusal, run

LAYER = "model.layers.1.mlp.up_proj"


def lines(recipe: Recipe) -> list[tuple[str, Any]]:
    specs = {source.id: source.spec for source in recipe.sources}
    return [(override.key, dict(specs[override.source] or {})) for override in recipe.overrides]


MLX4 = {"bits": 4, "group_size": 64, "format": "mlx"}
DENSE = {"scheme": "dense"}
READ: dict[str, tuple[dict[str, Any], Any, list[tuple[str, Any]], str]] = {
    "MLX": (
        {
            "model_type": "llama",
            "quantization": {
                "bits": 4,
                "group_size": 64,
                LAYER: {"bits": 8, "group_size": 32},
                "lm_head": False,
                "model.embed_tokens": True,
                "model.layers.0.mlp.up_proj": {"mode": "mxfp4"},
            },
        },
        MLX4,
        [
            (f"{LAYER}.*", {"bits": 8, "group_size": 32, "format": "mlx"}),
            ("lm_head.*", DENSE),
            ("model.embed_tokens.*", MLX4),
            ("model.layers.0.mlp.up_proj.*", {"scheme": "mxfp4", "format": "mlx"}),
        ],
        "",
    ),
    "MLX by its copy, with stacked experts": (
        {
            "model_type": "qwen3_moe",
            "quantization_config": {
                "bits": 4,
                "group_size": 64,
                "mode": "affine",
                "model.layers.0.mlp.switch_mlp.down_proj": {"bits": 6, "group_size": 64},
            },
        },
        MLX4,
        [("model.layers.0.mlp.experts.*.down_proj.*", {"bits": 6, "group_size": 64, "format": "mlx"})],
        "",
    ),
    "MLX of a model that it renames": (
        {
            "model_type": "qwen3_5_moe",
            "quantization": {
                "bits": 4,
                "group_size": 64,
                "language_model.lm_head": False,
                "language_model.model.layers.0.self_attn.q_proj": {"bits": 6, "group_size": 64},
                "language_model.model.layers.0.mlp.switch_mlp.up_proj": {"bits": 6, "group_size": 64},
            },
        },
        MLX4,
        [
            ("lm_head.*", DENSE),
            ("model.language_model.layers.0.self_attn.q_proj.*", {"bits": 6, "group_size": 64, "format": "mlx"}),
            (
                "model.language_model.layers.0.mlp.experts.*.up_proj.*",
                {"bits": 6, "group_size": 64, "format": "mlx"},
            ),
        ],
        "",
    ),
    "ModelOpt, one algorithm": (
        {
            "quantization": {
                "quant_algo": "NVFP4",
                "group_size": 16,
                "exclude_modules": ["lm_head", "*.gate", "vision*"],
            }
        },
        {"scheme": "nvfp4-a4"},
        [("lm_head.*", DENSE), ("*.gate.*", DENSE), ("vision*", DENSE)],
        "",
    ),
    "ModelOpt, several": (
        {
            "producer": {"name": "modelopt"},
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "kv_cache_quant_algo": "FP8",
                "quantized_layers": {
                    LAYER: {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": True},
                    "model.layers.0.mlp.experts": {"quant_algo": "FP8"},
                },
            },
        },
        None,
        [(f"{LAYER}.*", {"scheme": "w4a16-g64-asym"}), ("model.layers.0.mlp.experts.*", {"scheme": "fp8-static"})],
        "modelopt: W4A16_AWQ scales inputs as well",
    ),
    "ModelOpt in config.json": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}},
        {"scheme": "fp8-static"},
        [("lm_head.*", DENSE)],
        "",
    ),
    "ModelOpt with its head": (
        {"quantization": {"quant_algo": "FP8_PB_WO"}},
        {"scheme": "fp8-block"},
        [],
        "does not exclude lm_head",
    ),
    "exllamav3": (
        {"target_bpw": 3.1, "head_bits": 6, "tensors": {LAYER: 3, "model.layers.0.mlp.up_proj": 4}},
        None,
        [
            (f"{LAYER}.*", {"bits": 3, "format": "exl3"}),
            ("model.layers.0.mlp.up_proj.*", {"bits": 4, "format": "exl3"}),
            ("lm_head.*", {"bits": 6, "format": "exl3"}),
        ],
        "",
    ),
}


@pytest.mark.parametrize("case", READ)
@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_what_other_tools_say(case: str, indent: int | str | None, tmp_path: Path) -> None:
    said, base, wanted, warning = READ[case]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(said, indent=indent))
    recipe = load_recipe(path)
    assert (lines(recipe), recipe.base) == (wanted, base)
    assert warning in " ".join(recipe.warnings)
    assert bool(recipe.warnings) == bool(warning)
    again = parse_recipe(dump_recipe(recipe))
    assert (lines(again), again.base) == (wanted, base)


def test_lines_keep_their_place() -> None:
    text = '{\n"quantization": {"bits": 4, "group_size": 64,\n "a.b": {"bits": 8, "group_size": 64},\n"c": false}}'
    assert [(o.key, o.line) for o in parse_recipe(text).overrides] == [("a.b.*", 3), ("c.*", 4)]


def test_what_is_excluded_wins_and_may_be_missing() -> None:
    said = {"quant_algo": "FP8", "exclude_modules": ["*.q_proj", "mtp*"]}
    recipe = parse_recipe(json.dumps({"quantization": said}))
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"]
    assert recipe.unmatched(names) == []
    assert [recipe.source_dir(name) for name in names] == ["scheme: dense", None]


REFUSED = {
    "bits": ({"quantization": {"bits": 7, "group_size": 64}}, r":1: quantization: mlx: .*bits: found 7"),
    "a group size": (
        {"quantization": {"bits": 4, "group_size": 64, "a": {"bits": 4, "group_size": 48}}},
        r":1: quantization\.a: mlx: .*found 48",
    ),
    "an entry": ({"quantization": {"bits": 4, "group_size": 64, "a": 3}}, r"mlx: 3 is no entry of a path"),
    "a mode": ({"quantization": {"bits": 4, "group_size": 64, "mode": "q8"}}, "mlx: .*mode"),
    "a star": ({"quantization": {"bits": 4, "group_size": 64, "a*": False}}, r'"a\*" is no name of a module'),
    "an algorithm": (
        {"quantization": {"quant_algo": "W4A8_MXFP4_FP8"}},
        r':1: quantization: modelopt: quant_algo "W4A8_MXFP4_FP8" has no scheme here',
    ),
    "groups": ({"quantization": {"quant_algo": "NVFP4", "group_size": 32}}, "modelopt: group_size 32: NVFP4 is stored"),
    "a wildcard": (
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["layers.[0-3].*"]}},
        "modelopt: .* have no wildcard but",
    ),
    "a list": ({"quantization": {"quant_algo": "FP8", "exclude_modules": "lm_head"}}, "modelopt: .* is no list"),
    "no layers": ({"quantization": {"quant_algo": "MIXED_PRECISION"}}, "modelopt: MIXED_PRECISION without"),
    "a layer": (
        {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": "FP8"}}},
        r"quantized_layers\.a: modelopt: ",
    ),
    "no algorithm": ({"quantization": {"quant_algo": None}}, "modelopt: quant_algo null has no scheme"),
    "half bits": ({"head_bits": 6, "tensors": {"a": 2.5}}, r":1: tensors\.a: exllamav3: 2\.5 bits"),
    "no tensors": ({"target_bpw": 3, "tensors": {}}, "exllamav3: tensors is empty"),
    "another method": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, '"awq": configs of this'),
    "modifiers": ({"quant_stage": {"quant_modifiers": {}}}, "llm-compressor: is a recipe of modifiers; give it as"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    said, message = REFUSED[case]
    with pytest.raises(RecipeError, match=message) as refused:
        parse_recipe(json.dumps(said), "r.json")
    assert str(refused.value).startswith("r.json:1: ")
    assert len(str(refused.value)) < 600
    assert "\n" not in str(refused.value)


HOSTILE = {
    "a long line": '{"quantization": {"bits": 4, "group_size": 64, "' + "a" * 10_000_000 + '": 3}}',
    "a control character": '{"quantization": {"bits": 4, "group_size": 64, "a\x01": false}}',
    "an open quote": '{"quantization": {"bits": 4, "group_size": 64, "a: false}}',
    "depth": '{"quantization": ' + "[" * 5000,
    "a number": '{"quantization": {"bits": ' + "9" * 5000 + ', "group_size": 64}}',
    "names that are lists": '{"quantization": {"bits": 4, "group_size": 64, ? [a, b] : false}}',
    "tensors of a list": '{"head_bits": 6, "tensors": {? [a] : 3}}',
    "layers that are null": '{"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": {null: null}}}',
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str) -> None:
    with pytest.raises(RecipeError, match=r"^r\.json") as refused:
        parse_recipe(HOSTILE[case], "r.json")
    assert len(str(refused.value)) < 600


# ---- by the commands -------------------------------------------------------------------------------------------------


def rows_file(folder: Path) -> Path:
    save_file({"input_ids": tiny.rows(4, 16)}, folder / "rows.safetensors")
    return folder / "rows.safetensors"


def make(folder: Path, said: dict[str, Any]) -> dict[str, str]:
    """module -> format of a mix that model_quantize makes."""
    path = folder / "said.json"
    path.write_text(json.dumps(said))
    out = folder / "mix"
    run(model_quantize, "-i", tiny.base("llama-2"), "-o", out, "-or", path, "--input-ids", rows_file(folder))
    return {name: module.format for name, module in open_checkpoint(out).modules.items()}


def test_an_mlx_config_makes_the_mix_that_it_describes(tmp_path: Path) -> None:
    entries = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 32}, LAYER: False, "model.embed_tokens": False}
    said = {"quantization": {"bits": 3, "group_size": 32, "mode": "affine", **entries}}
    formats = make(tmp_path, {"model_type": "llama", **said})
    assert formats[LAYER] == formats["model.embed_tokens"] == "dense"
    assert formats["model.layers.0.mlp.down_proj"] == formats["model.layers.0.mlp.up_proj"] == "mlx"
    made = json.loads((tmp_path / "mix" / "config.json").read_text())
    assert made["quantization"]["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert made["quantization"]["model.layers.0.mlp.up_proj"]["bits"] == 3
    again = load_recipe(tmp_path / "mix" / "config.json")
    assert again.source_dir("model.layers.0.mlp.down_proj.weight") == "bits: 8, group_size: 32, format: mlx"


def test_a_modelopt_config_makes_the_mix_that_it_describes(tmp_path: Path) -> None:
    layers = {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "FP8"},
        LAYER: {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.mlp.up_proj": {"quant_algo": "FP8"},
    }
    said = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "exclude_modules": ["*.0.mlp.*", "mtp*"]}
    formats = make(tmp_path, {"quantization": said})
    assert {name: found for name, found in formats.items() if found not in ("dense",) and "norm" not in name} == {
        "model.layers.0.self_attn.q_proj": "float-quantized",
        LAYER: "nvfp4-pack-quantized",
    }


def test_a_line_that_names_nothing_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"quantization": {"bits": 4, "group_size": 64,\n"model.layers.9.mlp.up_proj": false}}')
    said = refusal(
        *(model_quantize, "-i", tiny.base("llama-2"), "-o", tmp_path / "mix", "-or", path),
        *("--input-ids", rows_file(tmp_path)),
    )
    assert f'{path}:2: overrides[0]: key "model.layers.9.mlp.up_proj.*" matches no module' in " ".join(said.split())
    said = refusal(recompile, "-i", tiny.base("llama-2"), "-o", tmp_path / "mix", "-or", path)
    assert "matches no" in said or "is for model_quantize" in said


def test_recipes_as_llm_compressor_writes_them(tmp_path: Path) -> None:
    """Beside a checkpoint: every key spelled out, null where it says nothing."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "default_stage:\n  run_type: oneshot\n  default_modifiers:\n    GPTQModifier:\n      targets: [Linear]\n"
        "      ignore: [lm_head]\n      scheme: W4A16\n      kv_cache_scheme: null\n      config_groups: null\n"
        "      bypass_divisibility_checks: false\n      actorder: static\n"
    )
    variant, notes = load_modifiers(path)
    rule = variant.rule_of(LAYER)
    assert rule is not None
    assert rule.scheme is not None
    assert (rule.method, rule.scheme.name) == ("gptq", "w4a16-g128")
    assert [note.partition("Modifier.")[2].partition(":")[0] for note in notes] == ["actorder"]
    path.write_text("quant_modifiers:\n  QuantizationModifier: {targets: [Linear], scheme: FP8_DYNAMIC}\n")
    variant, _ = load_modifiers(path)
    assert [rule.scheme.name for rule in variant.rules if rule.scheme is not None] == ["fp8-dynamic"]
