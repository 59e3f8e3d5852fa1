"""A recipe of directories is built anew from the base: each stands for what it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import recompile
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.errors import RecipeError, RecompileError
from tests import tiny

RECIPE = """
sources:
- {{id: more, model_dir: {more}}}
overrides:
- {{key: "*.self_attn.*", source: more}}
"""


@pytest.mark.parametrize(
    ("how", "names"),
    [
        ({"bits": ["3", "5"], "group_size": 32}, ("3bpw", "5bpw")),
        ({"bits": ["3", "4"], "group_size": "channel", "asym": True}, ("3bpw", "4bpw")),
        ({"bits": ["2.5", "4"], "format": "exl2", "head_bits": 6}, ("2.5bpw", "4bpw")),
        ({"bits": ["3"], "scheme": ["mxfp4"], "format": "mlx", "group_size": 32}, ("3bpw", "mxfp4")),
        ({"scheme": ["w4a16-g32", "w8a16"]}, ("w4a16-g32", "w8a16")),
    ],
    ids=lambda value: (
        value.get("format", "schemes" if "scheme" in value else "bits") if isinstance(value, dict) else ""
    ),
)
def test_the_mix_is_that_of_the_merge(how: dict[str, Any], names: tuple[str, str], tmp_path: Path) -> None:
    """Byte for byte, the base variant named in the recipe; without the directory's report it is refused."""
    base, ids = tiny.base("llama-2"), tmp_path / "ids.safetensors"
    save_file({"input_ids": tiny.rows(8, 16)}, ids)
    recompile.quantize(base, tmp_path, input_ids=ids, **how)
    recipe = tmp_path / "mix.yaml"
    less, more = (tmp_path / name for name in names)
    recipe.write_text(RECIPE.format(more=more))
    recompile.merge(less, tmp_path / "merged", recipe=recipe)
    recipe.write_text(RECIPE.format(more=more) + f"base: {less}\n")
    given = {key: value for key, value in how.items() if key not in ("bits", "scheme", "group_size", "asym")}
    recompile.quantize(base, tmp_path / "anew", input_ids=ids, recipe=recipe, **given)
    one, two, plain = (open_checkpoint(path) for path in (tmp_path / "merged", tmp_path / "anew", less))
    assert one.tensors.keys() == two.tensors.keys()
    assert [name for name in one.tensors if not torch.equal(bytes_of(one, name), bytes_of(two, name))] == []
    attention = [name for name in one.tensors if ".self_attn.q_proj." in name and name in plain.tensors]
    assert any(not torch.equal(bytes_of(one, name), bytes_of(plain, name)) for name in attention)
    (more / "quantize_report.json").unlink()
    with pytest.raises(RecipeError, match=r"mix.yaml:3: .* is a directory that does not say how"):
        recompile.quantize(base, tmp_path / "not", input_ids=ids, recipe=recipe, **given)


def bytes_of(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.read(name).contiguous().view(-1).view(torch.uint8)


def test_a_compensated_build_of_a_recipe_of_directories(tmp_path: Path) -> None:
    """The way from a merge to a finished build: the same recipe and bytes, other codes; a mix says no one scheme."""
    base, ids = tiny.base("llama-2"), tmp_path / "ids.safetensors"
    save_file({"input_ids": tiny.rows(8, 16)}, ids)
    recompile.quantize(base, tmp_path, input_ids=ids, bits=["3", "5"], group_size=32)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(RECIPE.format(more="5bpw"))  # beside the recipe
    recompile.merge(tmp_path / "3bpw", tmp_path / "merged", recipe=recipe)
    recompile.quantize(
        base, tmp_path / "anew", input_ids=ids, recipe=recipe, bits=["3"], group_size=32, compensate=True
    )
    merged, anew = (tmp_path / name for name in ("merged", "anew"))
    sizes = [(path / "model.safetensors").stat().st_size for path in (merged, anew)]
    assert abs(sizes[0] - sizes[1]) < 2000, "headers apart"
    config = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (merged, anew)]
    assert config[0] == config[1]
    shutil.copy(anew / "quantize_report.json", merged)
    recipe.write_text(RECIPE.format(more=merged))
    with pytest.raises(RecipeError, match="does not say how"):
        recompile.quantize(base, tmp_path / "not", input_ids=ids, recipe=recipe, bits=["3"])


@pytest.mark.parametrize(
    "report",
    [
        "[]",
        "{",
        "null",
        '{"variant": 3, "made_by": {"encoder": {"format": "pack-quantized"}}}',
        '{"variant": {"name": "3bpw"}, "made_by": []}',
        '{"variant": {"name": "x"}, "made_by": {"encoder": {"format": "compressed-tensors", "variants": ["x"]}}}',
        '{"variant": {"name": "99999bpw"}, "made_by": {"encoder": {"format": "pack-quantized"}}}',
        '{"variant": {"name": "3bpw"}, "made_by": {"encoder": {"format": "mlx", "variants": [3]}}}',
    ],
)
def test_reports_that_say_nothing_are_refused_by_line(report: str, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "quantize_report.json").write_text(report)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(RECIPE.format(more=tmp_path / "v"))
    with pytest.raises(RecipeError, match=r"mix.yaml:3: .* is a directory that does not say how"):
        recompile.quantize(tiny.base("llama-2"), tmp_path / "not", recipe=recipe, bits=["3"], rows=2, length=16)


@pytest.mark.parametrize("settings", ['"group_size": "x"', '"group_size": -5', '"group_size": 1e99, "symmetric": "x"'])
def test_settings_of_a_report_are_checked_as_those_of_a_recipe(settings: str, tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    encoder = f'{{"format": "pack-quantized", {settings}}}'
    report = f'{{"variant": {{"name": "3bpw"}}, "made_by": {{"encoder": {encoder}}}}}'
    (tmp_path / "v" / "quantize_report.json").write_text(report)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(RECIPE.format(more=tmp_path / "v"))
    with pytest.raises(RecompileError, match=r"group_size|symmetric"):
        recompile.quantize(tiny.base("llama-2"), tmp_path / "not", recipe=recipe, bits=["3"], rows=2, length=16)
    assert not (tmp_path / "not").exists()
