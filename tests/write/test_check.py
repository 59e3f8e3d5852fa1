"""check.py: verify, check_checkpoint and the probe find what is wrong, and nothing where nothing is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import CheckpointError, MismatchError
from recompile.formats import packed_int
from recompile.merge.check import check_checkpoint
from recompile.merge.check_same_weights import BLOCK_ROWS, check_same_weights, row_block
from recompile.merge.overlay import Overlay, build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.verify import verify
from recompile.merge.write_plan import MANIFEST_NAME
from recompile.merge.write_safetensors import execute
from tests import mixes


def overlay_of(base: Path, recipe: Path | None = None) -> Overlay:
    return build_overlay(open_checkpoint(base), recipe)


def recompiled(tmp_path: Path, base: Path, taken: dict[str, Path | str], **options: Any) -> Path:
    overlay = overlay_of(base, mixes.recipe(tmp_path / "mix.yaml", taken))
    for _ in execute(plan_write(overlay, tmp_path / "out", **options)):
        pass
    return tmp_path / "out"


def change_json(file: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def found_in(directory: Path) -> list[str]:
    return [f"{problem.severity} {problem}" for problem in check_checkpoint(directory)]


# ---- verify ----------------------------------------------------------------------------------------------------------


def test_a_fresh_output_verifies(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3", 3), mixes.packed(tmp_path / "4", 4)
    out = recompiled(tmp_path, base, {"*.mlp.*": other})
    steps: list[int] = []
    report = verify(out, lambda step: steps.append(step.done_bytes))
    assert report.ok
    assert report.problems == ()
    assert report.modules == report.compared_with_sources == len(open_checkpoint(out).modules)
    assert steps[-1] == report.size_bytes == 2 * open_checkpoint(out).size_bytes
    assert steps == sorted(steps)


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)[0]
        opened.seek(offset)
        opened.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_flipped_bit_is_found(tmp_path: Path, part: str) -> None:
    base, other = mixes.packed(tmp_path / "3", 3), mixes.packed(tmp_path / "4", 4)
    out = recompiled(tmp_path, base, {"*.mlp.*": other})
    info = open_checkpoint(out).tensors[f"model.layers.1.mlp.up_proj.{part}"]
    flip(info.path, info.offset + info.size_bytes // 2)
    report = verify(out)
    assert not report.ok
    assert any(p.where == "model.layers.1.mlp.up_proj" and "hash" in p.message for p in report.problems)


def test_a_source_that_no_longer_matches_is_told_apart(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3", 3), mixes.packed(tmp_path / "4", 4)
    out = recompiled(tmp_path, base, {"*.mlp.*": other})
    total = len(open_checkpoint(out).modules)
    # seen by the fingerprint: the source is another one now, which is no fault of the output
    info = open_checkpoint(other).tensors["model.layers.1.mlp.up_proj.weight_packed"]
    flip(info.path, info.offset)
    report = verify(out)
    assert report.ok
    assert report.compared_with_sources == total - 9
    assert "was changed since" in report.notes[0]
    # and one that is gone
    other.rename(tmp_path / "elsewhere")
    assert "not found from here" in verify(out).notes[0]


def test_modules_that_the_manifest_lacks_or_invents(tmp_path: Path) -> None:
    out = recompiled(tmp_path, mixes.packed(tmp_path / "3", 3), {})

    def rename(manifest: Any) -> None:
        manifest["modules"]["model.ghost"] = manifest["modules"].pop("model.norm")

    change_json(out / MANIFEST_NAME, rename)
    problems = {problem.where: problem.message for problem in verify(out).problems}
    assert problems.keys() == {"model.norm", "model.ghost"}
    assert "not stored" in problems["model.ghost"]


def test_a_decoded_copy_verifies_against_its_manifest(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3", 3), mixes.as_exl2(tmp_path / "exl2", 4)
    out = recompiled(tmp_path, base, {"*.0.mlp.*": other}, dense=True)
    report = verify(out)
    assert report.problems == ()
    assert report.compared_with_sources == 3 * 2 + 3  # norms, final norm, embedding, head: the rest was decoded


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST_NAME}"):
        verify(mixes.dense(tmp_path / "dense"))
    (tmp_path / "dense" / MANIFEST_NAME).write_text('{"manifest_version": 99, "modules": {}}')
    with pytest.raises(CheckpointError, match="not a manifest of version 1"):
        verify(tmp_path / "dense")


# ---- check_checkpoint ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "packed", "asymmetric", "channel", "exl2", "exl3", "tied", "decoded"])
def test_what_we_write_is_consistent(tmp_path: Path, kind: str) -> None:
    builders: dict[str, Callable[[], tuple[Path, Path]]] = {
        "dense": lambda: (mixes.dense(tmp_path / "a"), mixes.dense(tmp_path / "b", seed=1)),
        "packed": lambda: (mixes.packed(tmp_path / "a", 3), mixes.packed(tmp_path / "b", 5, bias=True)),
        "asymmetric": lambda: (mixes.packed(tmp_path / "a", 3), mixes.packed(tmp_path / "b", 5, symmetric=False)),
        "channel": lambda: (mixes.packed(tmp_path / "a", 3, group=None), mixes.dense(tmp_path / "b")),
        "exl2": lambda: (mixes.as_exl2(tmp_path / "a", 3), mixes.as_exl2(tmp_path / "b", 6)),
        "exl3": lambda: (mixes.as_exl3(tmp_path / "a", 3), mixes.as_exl3(tmp_path / "b", 4, "mul1", tied=True)),
        "tied": lambda: (mixes.packed(tmp_path / "a", 3, tied=True), mixes.packed(tmp_path / "b", 5, tied=True)),
        "decoded": lambda: (mixes.as_exl2(tmp_path / "a", 3), mixes.as_exl3(tmp_path / "b", 4)),
    }
    base, other = builders[kind]()
    out = recompiled(tmp_path, base, {"*.1.mlp.*": other}, dense=kind == "decoded")
    assert found_in(out) == []


def group(out: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda q: q.update(quantization_status="frozen"), "error config.json: .*quantization_status is 'frozen'"),
        (lambda q: q.update(ignore=[]), "error lm_head: is stored dense, group_0 matches it, and it is not in ignore"),
        (lambda q: q.update(ignore=["lm_head", "re:.*up_proj$"]), "error .*up_proj: .*quantized and is in ignore"),
        (
            lambda q: q.update(format="mixed-precision"),
            "error config.json: .*wanted 'pack-quantized' as in every group",
        ),
        (lambda q: q["config_groups"]["group_0"].pop("format"), "warning .*group_0: has no format"),
        (
            lambda q: q["config_groups"]["group_0"].update(targets=["re:.*self_attn.*"]),
            "error .*gate_proj: is stored quantized, and no target",
        ),
        (
            lambda q: q["config_groups"].update(extra={**q["config_groups"]["group_0"], "targets": ["Linear"]}),
            "error .*q_proj: targets of group_0 and extra match it",
        ),
        (
            lambda q: q["config_groups"].update(
                a={**q["config_groups"]["group_0"], "targets": ["re:.*mlp.*"]},
                b={**q["config_groups"]["group_0"], "targets": ["re:.*down_proj$"]},
            ),
            "error .*down_proj: targets of a and b match it; engines differ",
        ),
        (
            lambda q: q["config_groups"].update(x={**q["config_groups"]["group_0"], "targets": ["re:.*nothing$"]}),
            "warning config.json: quantization_config: x: its targets match no quantized module",
        ),
        (
            lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=5),
            r"error .*q_proj: weight_packed is \[64, 8\]; 5 bits with 2 groups|error .*q_proj: weight_packed is",
        ),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=64), "error .*: weight_scale is"),
        (
            lambda q: q["config_groups"]["group_0"]["weights"].update(symmetric=False),
            "error .*: weight_zero_point is mis",
        ),
        (lambda q: q["config_groups"]["group_0"]["weights"].update(num_bits=17), "error .*: config group of"),
        (
            lambda q: q["config_groups"].update(x={**q["config_groups"]["group_0"], "targets": ["re:.*v_proj$"]}),
            "warning .*x: target 're:.*v_proj\\$' also matches vLLM's qkv_proj",
        ),
    ],
)
def test_compressed_configs_that_lie(tmp_path: Path, change: Callable[[Any], None], expected: str) -> None:
    directory = mixes.packed(tmp_path / "4", 4)
    assert found_in(directory) == []
    change_json(directory / "config.json", lambda config: change(config["quantization_config"]))
    assert any(re.match(expected, line) for line in found_in(directory)), found_in(directory)


def test_zero_points_of_a_symmetric_group(tmp_path: Path) -> None:
    directory = mixes.packed(tmp_path / "4", 4, symmetric=False)
    change_json(
        directory / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=True),
    )
    assert any("symmetric, and a weight_zero_point is stored" in line for line in found_in(directory))


def test_a_tied_head_outside_ignore(tmp_path: Path) -> None:
    directory = mixes.packed(tmp_path / "4", 4, tied=True)
    assert found_in(directory) == []
    change_json(directory / "config.json", lambda config: config["quantization_config"].update(ignore=[]))
    assert any('tied "lm_head" is not in ignore' in line for line in found_in(directory))


def test_ties_and_heads(tmp_path: Path) -> None:
    stored = mixes.dense(tmp_path / "stored")
    change_json(stored / "config.json", lambda config: config.update(tie_word_embeddings=True))
    (line,) = found_in(stored)
    assert line.startswith("error config.json: tie_word_embeddings is true, and lm_head is stored with other values")
    assert "transformers and model_diff run the stored head, vLLM and SGLang drop it" in line

    def copy_embedding(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(stored / "model.safetensors", copy_embedding)
    (line,) = found_in(stored)
    assert line.startswith(
        "warning config.json: tie_word_embeddings is true, and lm_head is stored with the embedding's"
    )
    absent = mixes.dense(tmp_path / "absent", tied=True)
    change_json(absent / "config.json", lambda config: config.update(tie_word_embeddings=False))
    assert found_in(absent) == ["error config.json: tie_word_embeddings is false, and no output head is stored"]
    exl3 = mixes.as_exl3(tmp_path / "exl3", 3)
    change_json(exl3 / "config.json", lambda config: config.update(tie_word_embeddings=True))
    assert any(line.startswith("error config.json: tie_word_embeddings is true") for line in found_in(exl3))


def test_quantized_without_a_config_and_the_reverse(tmp_path: Path) -> None:
    packed = mixes.packed(tmp_path / "packed", 4)
    change_json(packed / "config.json", lambda config: config.pop("quantization_config"))
    assert any("has no quantization_config" in line for line in found_in(packed))
    dense = mixes.dense(tmp_path / "dense")
    change_json(dense / "config.json", lambda c: c.update(quantization_config={"quant_method": "exl2"}))
    assert any("no module is stored quantized" in line for line in found_in(dense))


def test_mixed_formats(tmp_path: Path) -> None:
    directory = mixes.packed(tmp_path / "packed", 4)
    exl2 = load_file(mixes.as_exl2(tmp_path / "exl2", 4) / "output.safetensors")

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value for name, value in exl2.items() if "layers.0.mlp.up_proj" in name})
        for name in [n for n in tensors if "layers.0.mlp.up_proj.weight" in n]:
            del tensors[name]

    change_tensors(directory / "model.safetensors", mix)
    assert any(
        "compressed-tensors (" in line and "exl2 (model.layers.0.mlp.up_proj)" in line for line in found_in(directory)
    )


def test_a_directory_that_cannot_be_opened_is_one_problem(tmp_path: Path) -> None:
    directory = mixes.dense(tmp_path / "dense")
    os.truncate(directory / "model.safetensors", 5000)
    (line,) = found_in(directory)
    assert "truncated" in line
    assert found_in(tmp_path / "absent") == [f"error {tmp_path / 'absent'}: no such model directory"]


def test_stray_shards(tmp_path: Path) -> None:
    directory = mixes.dense(tmp_path / "dense")
    save_file({"x": torch.zeros(1)}, directory / "model-00001-of-00002.safetensors")
    assert any("warning" in line and "ignored model-00001" in line for line in found_in(directory))


def test_exl2_parts_and_index(tmp_path: Path) -> None:
    directory = mixes.as_exl2(tmp_path / "exl2", 4)
    (line,) = found_in(directory)
    assert line.startswith("warning model.safetensors.index.json: is stale")
    (directory / "model.safetensors.index.json").unlink()

    def break_groups(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.q_groups"][0] = 7
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.float16)
        tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(64, dtype=torch.bfloat16)

    change_tensors(directory / "output.safetensors", break_groups)
    lines = found_in(directory)
    assert any("error model.layers.1.mlp.up_proj: q_groups: group 0 has 7 bits" in line for line in lines)
    assert any("error model.layers.0.mlp.up_proj: is stored twice" in line for line in lines)
    assert any("error model.layers.2.input_layernorm.weight: is BF16" in line for line in lines)
    assert len(lines) == 3


def test_exl3_markers_and_storage(tmp_path: Path) -> None:
    out = recompiled(tmp_path, mixes.as_exl3(tmp_path / "a", 3, "mcg"), {})
    assert found_in(out) == []

    def lie(storage: Any) -> None:
        storage["tensor_storage"]["model.layers.0.mlp.up_proj"]["bits_per_weight"] = 4
        storage["tensor_storage"].pop("model.layers.1.mlp.up_proj")
        storage["tensor_storage"]["ghost"] = {"stored_tensors": {"ghost.weight": {}}}
        storage["bits"] = 2.0

    change_json(out / "quantization_config.json", lie)
    lines = "\n".join(found_in(out))
    assert "tensor_storage of model.layers.0.mlp.up_proj: bits_per_weight" in lines
    assert "tensor_storage lacks model.layers.1.mlp.up_proj" in lines
    assert "tensor_storage lists ghost" in lines
    assert "bits is 2.0, in config.json it is 3." in lines

    def break_marker(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.mcg"] = torch.tensor(5, dtype=torch.int32)
        tensors["model.layers.1.self_attn.v_proj.mul1"] = tensors.pop("model.layers.1.self_attn.v_proj.mcg")

    change_tensors(out / "model.safetensors", break_marker)
    lines = "\n".join(found_in(out))
    assert "error model.layers.0.mlp.up_proj: mcg: found value 0x00000005" in lines
    assert "model.layers.1.self_attn.k_proj: has the mcg codebook" in lines


# ---- the probe -------------------------------------------------------------------------------------------------------


def test_two_bit_variants_of_one_model_pass(tmp_path: Path) -> None:
    base = mixes.packed(tmp_path / "2a", 2)
    other = mixes.packed(tmp_path / "2b", 2, symmetric=False, group=16)
    report = check_same_weights(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*_proj.*": other})))
    assert report.unquantized_tensors == 7  # two norms a layer and the last one
    assert len(report.modules) == 21
    assert report.lowest is not None
    assert 0.6 < report.lowest[1] < 0.95  # the hardest honest case


@pytest.mark.parametrize("kind", ["dense", "packed", "exl2", "exl3"])
def test_other_weights_are_refused(tmp_path: Path, kind: str) -> None:
    base = mixes.packed(tmp_path / "base", 3)
    builders: dict[str, Callable[[], Path]] = {
        "dense": lambda: mixes.dense(tmp_path / "other", seed=1),
        "packed": lambda: mixes.packed(tmp_path / "other", 8, seed=1),
        "exl2": lambda: mixes.as_exl2(tmp_path / "other", 6, seed=1),
        "exl3": lambda: mixes.as_exl3(tmp_path / "other", 4),  # random weights beside the base's own norms
    }
    other = builders[kind]()
    if kind != "exl3":  # the same norms: only the weights tell
        norms = {n: v for n, v in load_file(base / "model.safetensors").items() if "norm" in n}
        file = next(other.glob("*.safetensors"))
        change_tensors(file, lambda tensors: tensors.update({n: v.to(tensors[n].dtype) for n, v in norms.items()}))
    overlay = overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"model.layers.2.mlp.down_proj.*": other}))
    with pytest.raises(
        MismatchError, match=r"model\.layers\.2\.mlp\.down_proj was not made from .*correlation .* -?0\.0"
    ):
        check_same_weights(overlay)


def test_norms_that_differ_by_more_than_rounding_are_refused(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "base", 3), mixes.packed(tmp_path / "other", 4)
    recipe = mixes.recipe(tmp_path / "r.yaml", {"*.mlp.*": other})

    exact = mixes.weights()

    def halves(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "norm" in name]:
            assert not torch.equal(exact[name].half().float(), tensors[name].float())
            tensors[name] = exact[name].half()  # rounded another way than the base's bfloat16

    change_tensors(other / "model.safetensors", halves)
    assert check_same_weights(overlay_of(base, recipe)).unquantized_tensors == 7

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"] *= 1.02

    change_tensors(other / "model.safetensors", scale)
    with pytest.raises(MismatchError, match=r"model\.layers\.1\.input_layernorm\.weight differs from"):
        check_same_weights(overlay_of(base, recipe))


def test_the_probe_looks_at_few_modules_everywhere(tmp_path: Path) -> None:
    base = mixes.packed(tmp_path / "base", 3, layers=12)
    a, b = mixes.packed(tmp_path / "a", 4, layers=12), mixes.packed(tmp_path / "b", 5, layers=12)
    recipe = mixes.recipe(tmp_path / "r.yaml", {"*_proj.*": a, "model.layers.5.*_proj.*": b})
    report = check_same_weights(overlay_of(base, recipe), sample=12)
    assert len(report.modules) == 12
    assert sum(".layers.5." in name for name in report.modules) == 6
    assert len({name.rpartition(".")[2] for name in report.modules if ".layers.5." not in name}) >= 5  # kinds
    assert len({name.split(".")[2] for name in report.modules}) >= 5  # depth


def test_nothing_overridden_is_nothing_to_probe(tmp_path: Path) -> None:
    report = check_same_weights(overlay_of(mixes.packed(tmp_path / "base", 3)))
    assert (report.unquantized_tensors, report.modules, report.lowest) == (0, (), None)


@pytest.mark.parametrize("kind", ["dense", "symmetric", "asymmetric", "channel", "exl2", "exl3"])
def test_a_row_block_is_those_rows_of_the_whole(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(416, 128, generator=torch.Generator().manual_seed(0))
    schemes = {
        "symmetric": packed_int.IntScheme(3, 32, True),
        "asymmetric": packed_int.IntScheme(5, 64, False),
        "channel": packed_int.IntScheme(7, None, False),
    }
    settings: dict[str, Any] = {"model_type": "x"}
    if kind in schemes:
        parts = mixes.pack(weight, schemes[kind])
        body = {"targets": ["Linear"], "format": "pack-quantized", "weights": schemes[kind].to_config()}
        settings["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {"g": body}}
    elif kind == "dense":
        parts = {"weight": weight.bfloat16()}
    else:
        parts = mixes.exl2_parts(weight, 4) if kind == "exl2" else mixes.exl3_parts((416, 128), 3, "mul1")
        settings["quantization_config"] = {"quant_method": kind}
    directory = mixes.save(tmp_path / "one", {f"model.x_proj.{part}": value for part, value in parts.items()}, settings)
    checkpoint = open_checkpoint(directory)
    module = checkpoint.modules["model.x_proj"]
    whole = checkpoint.load("model.x_proj.weight")
    for first in range(0, 416, BLOCK_ROWS):
        block = row_block(checkpoint, module, first)
        torch.testing.assert_close(block, whole[first : first + BLOCK_ROWS], rtol=0, atol=1e-6 if kind == "exl3" else 0)
