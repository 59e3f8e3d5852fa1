"""Mixes as recipes of mlx-lm, llm-compressor and exllamav3, read again by our own readers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.recompile import main as recompile
from recompile.formats.schemes import parse_scheme
from recompile.quantize.modifiers import load_modifiers
from recompile.recipe.recipe import load_recipe
from tests import tiny
from tests.commands import refusal, run

UP, DOWN, QUERY = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"


def write(folder: Path, text: str) -> Path:
    path = folder / "mix.yaml"
    path.write_text(text)
    return path


def emitted(folder: Path, base: Path, dialect: str, recipe: Path | None) -> Path:
    out = folder / f"{dialect}.out"
    said = run(recompile, "-i", base, *(("-or", recipe) if recipe else ()), "--emit", dialect)
    run(recompile, "-i", base, *(("-or", recipe) if recipe else ()), "--emit", dialect, "-o", out)
    assert out.read_text() == said
    return out


MLX_MIX = f"""
sources:
  - {{id: 8, bits: 8, group_size: 32, format: mlx}}
  - {{id: mxfp4, scheme: mxfp4, format: mlx}}
  - {{id: dense, scheme: dense}}
overrides:
  - {{key: "{DOWN}.*", source: 8}}
  - {{key: "*.q_proj.*", source: mxfp4}}
  - {{key: "{UP}.*", source: dense}}
  - {{key: "lm_head.*", source: 8}}
base: {{bits: 3, group_size: 32, format: mlx}}
"""


def test_an_mlx_predicate_and_back(tmp_path: Path) -> None:
    base, ours = tiny.base("llama-2"), write(tmp_path, MLX_MIX)
    out = emitted(tmp_path, base, "mlx", ours)
    said = json.loads(out.read_text())["quantization"]
    paths = {name for name, module in open_checkpoint(base).modules.items() if len(module.shape or ()) == 2}
    assert said.keys() - {"bits", "group_size", "mode"} == paths
    assert said[UP] is False
    assert said[DOWN] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert said[QUERY] == {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert said["model.embed_tokens"]["bits"] == said["bits"] == 3
    assert emitted(tmp_path, base, "mlx", out).read_text() == out.read_text()


def test_the_mix_that_is_made_says_the_same_as_its_recipe(tmp_path: Path) -> None:
    base, ours = tiny.base("llama-2"), write(tmp_path, MLX_MIX)
    rows = tmp_path / "rows.safetensors"
    save_file({"input_ids": tiny.rows(4, 16)}, rows)
    run(model_quantize, "-i", base, "-o", tmp_path / "mix", "-or", ours, "--input-ids", rows, "--method", "rtn")
    of_recipe = emitted(tmp_path, base, "mlx", ours).read_text()
    (tmp_path / "mlx.out").unlink()
    assert json.loads(emitted(tmp_path, tmp_path / "mix", "mlx", None).read_text()) == json.loads(of_recipe)


SCHEMES = f"""
sources:
  - {{id: nvfp4, scheme: nvfp4-a4}}
  - {{id: fp8, scheme: fp8-dynamic}}
  - {{id: 6, bits: 6, group_size: 32, symmetric: false}}
overrides:
  - {{key: "{DOWN}.*", source: nvfp4}}
  - {{key: "*.q_proj.*", source: fp8}}
  - {{key: "*.1.mlp.*", source: 6}}
base: {{bits: 4, group_size: 32}}
"""


def test_modifiers_of_llm_compressor_and_back(tmp_path: Path) -> None:
    base, ours = tiny.base("llama-2"), write(tmp_path, SCHEMES)
    out = emitted(tmp_path, base, "llm-compressor", ours)
    variant, notes = load_modifiers(out)
    assert notes == []
    wanted = {DOWN: "nvfp4-a4", QUERY: "fp8-dynamic", UP: "w6a16-g32-asym", "model.layers.0.mlp.up_proj": "w4a16-g32"}
    for name, scheme in wanted.items():
        rule, meant = variant.rule_of(name), parse_scheme(scheme)
        assert rule is not None
        assert rule.scheme is not None
        assert (rule.scheme.format, dict(rule.scheme.weights)) == (meant.format, dict(meant.weights))
        assert (rule.scheme.input_activations is None) == (meant.input_activations is None)
        assert rule.method == ("gptq" if meant.weights["type"] == "int" else "rtn")
    assert variant.rule_of("lm_head") is None
    assert "&" not in out.read_text()


def test_modifiers_of_a_merge(tmp_path: Path) -> None:
    """Of variants that are there, by the config groups of each."""
    made = tiny.variants("llama-2", (3, 6))
    ours = write(tmp_path, f'sources: [{{id: 6, model_dir: {made[6]}}}]\noverrides: [{{key: "{UP}.*", source: 6}}]\n')
    variant, _ = load_modifiers(emitted(tmp_path, made[3], "llm-compressor", ours))
    bits = {name: rule.scheme.bits for name in (UP, DOWN) if (rule := variant.rule_of(name)) and rule.scheme}
    assert bits == {UP: 6, DOWN: 3}


def test_an_exllamav3_recipe_and_back(tmp_path: Path) -> None:
    base = tiny.base("llama-2")
    ours = write(
        tmp_path,
        f'sources: [{{id: 5, bits: 5, format: exl3}}]\noverrides: [{{key: "{UP}.*", source: 5}}]\n'
        "base: {bits: 3, format: exl3}\n",
    )
    out = emitted(tmp_path, base, "exllamav3", ours)
    said = yaml.safe_load(out.read_text())
    linear = {name for name in open_checkpoint(base).modules if name.endswith("_proj")}
    assert said["tensors"] == {name: 5 if name == UP else 3 for name in linear}
    assert said["head_bits"] == 6
    assert 3 < said["achieved_bpw"] < 5
    assert emitted(tmp_path, base, "exllamav3", out).read_text() == out.read_text()
    recipe = load_recipe(out)
    assert recipe.source_dir(f"{UP}.weight") == "bits: 5, format: exl3"


REFUSED = {
    "MLX has no such bits": ("mlx", "base: {bits: 7}", "bits: 7: bits: found 7"),
    "MLX is never symmetric": ("mlx", "base: {bits: 4, symmetric: true}", "is no scheme of MLX's"),
    "MLX of another format": ("mlx", "base: {bits: 4, format: exl3}", "is no scheme of MLX's"),
    "a scheme MLX lacks": ("mlx", "base: {scheme: fp8-channel}", "scheme: fp8-channel: MLX has affine, mxfp4"),
    "compressed-tensors of MLX": (
        "llm-compressor",
        "base: {bits: 4, format: mlx}",
        "is no scheme of compressed-tensors",
    ),
    "half bits": ("llm-compressor", "base: {bits: 4.5}", "w4.5a16"),
    "whole bits": ("exllamav3", "base: {bits: 2.5, format: exl3}", "give every map whole bits from 1 to 8"),
    "all maps": (
        "exllamav3",
        "sources: [{id: 3, bits: 3}]\noverrides: [{key: '*.q_proj.*', source: 3}]",
        ": dense; exllamav3's recipes give every map whole bits",
    ),
    "a line": (
        "mlx",
        "sources: [{id: 7, bits: 7}]\noverrides:\n- {key: '*.q_proj.*', source: 7}\nbase: {bits: 4}",
        "mix.yaml:3: overrides[0]: model.layers.0.self_attn.q_proj: bits: 7: bits: found 7",
    ),
    "its base": ("mlx", "base: {bits: 7}", "mix.yaml: base: lm_head: bits: 7"),
    "nothing": ("mlx", "base: {scheme: dense}", "the mix quantizes nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_converter_cannot_be_told(case: str, tmp_path: Path) -> None:
    dialect, text, message = REFUSED[case]
    if "overrides" not in text:
        text = f"sources: []\noverrides: []\n{text}"
    said = refusal(recompile, "-i", tiny.base("llama-2"), "-or", write(tmp_path, text), "--emit", dialect)
    assert message in " ".join(said.split())


def test_types_and_schemes_are_not_mixed_up(tmp_path: Path) -> None:
    path = tmp_path / "types.txt"
    path.write_text("ffn_down=q6_K\n")
    said = refusal(recompile, "-i", tiny.base("llama-2"), "-or", path, "--emit", "mlx")
    assert "names GGUF types, and mlx has none" in said
