"""Every format through the commands themselves, as someone who checks this project from outside runs them:

    model_diff -ma CASE -mb CASE --input-ids ids.safetensors -sla out.safetensors

must give the logits of a plain transformers model with the dense weights that CASE's codes mean, and `recompile` must
merge four cases to the very bytes of their sources.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from recompile.cli.model_diff import main as model_diff
from recompile.cli.recompile import main as recompile_command
from tests import mixes, tiny
from tests.formats.test_checkpoints import CASES, write_pair


def run(command, *arguments: str | Path) -> str:
    result = CliRunner().invoke(command, [*map(str, arguments), "--quiet"])
    assert result.exit_code == 0, result.output
    return result.output


def check_logits(folder: Path, packed: Path, dense: Path) -> None:
    """1e-4 of the range of the logits, in float32."""
    ids = tiny.rows(2, 12)
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    out = folder / "out.safetensors"
    report = folder / "report.json"
    run(
        model_diff,
        "-ma",
        packed,
        "-mb",
        packed,
        "--input-ids",
        folder / "ids.safetensors",
        "-sla",
        out,
        "--json",
        report,
    )
    assert json.loads(report.read_text())["kl"]["mean"] == 0
    found = load_file(out)["logits"]
    wanted = tiny.plain_logits(tiny.plain_model(dense), ids)
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape
    span = float(wanted.max() - wanted.min())
    assert span > 1, "a model that predicts nothing would pass anything"
    assert float((found - wanted).abs().max()) < 1e-4 * span


@pytest.mark.parametrize("name", CASES)
def test_model_diff_gives_the_logits_of_every_format(name: str, tmp_path: Path) -> None:
    packer, quantization = CASES[name]
    check_logits(tmp_path, *write_pair(tiny.base("llama-2"), tmp_path, lambda module: packer, quantization))


@pytest.mark.parametrize("name", ["int8-tensor", "mxfp4", "gptq, asymmetric v2, 2 bits"])
def test_model_diff_on_experts(name: str, tmp_path: Path) -> None:
    packer, quantization = CASES[name]
    check_logits(tmp_path, *write_pair(tiny.base("qwen3-moe"), tmp_path, lambda module: packer, quantization))


def test_four_cases_merge_to_the_expected_bytes(tmp_path: Path) -> None:
    """The expected directory is put together here by name, from the files of the cases."""
    taken = {
        "*.self_attn.*": "nvfp4",
        "*.1.mlp.gate_proj.*": "int8-tensor",
        "*.down_proj.*": "fp8-block",
    }
    made = {}
    for name in ("mxfp8", *taken.values()):
        (tmp_path / name).mkdir()
        packer, quantization = CASES[name]
        made[name] = write_pair(tiny.base("llama-2"), tmp_path / name, lambda module, p=packer: p, quantization)
    recipe = mixes.recipe(tmp_path / "mix.yaml", {key: made[name][0] for key, name in taken.items()})
    run(recompile_command, "-i", made["mxfp8"][0], "-o", tmp_path / "out", "-or", recipe, "--verify")

    def origin(tensor: str) -> str:
        if ".self_attn." in tensor:
            return "nvfp4"
        if ".1.mlp.gate_proj." in tensor:
            return "int8-tensor"
        return "fp8-block" if ".down_proj." in tensor else "mxfp8"

    tensors = [{name: load_file(pair[n] / "model.safetensors") for name, pair in made.items()} for n in (0, 1)]
    expected, dense = (
        {tensor: value for name, found in by_case.items() for tensor, value in found.items() if origin(tensor) == name}
        for by_case in tensors
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert found[tensor].dtype == value.dtype, tensor
        assert torch.equal(found[tensor].view(torch.uint8), value.view(torch.uint8)), tensor
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    formats = sorted(group["format"] for group in groups.values())
    assert formats == ["float-quantized", "int-quantized", "mxfp8-quantized", "nvfp4-pack-quantized"]
    run(recompile_command, "--check", tmp_path / "out")
    config = json.loads((made["mxfp8"][1] / "config.json").read_text())
    (tmp_path / "dense").mkdir()
    save_file(dense, tmp_path / "dense" / "model.safetensors")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    check_logits(tmp_path, tmp_path / "out", tmp_path / "dense")
