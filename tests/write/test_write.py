"""write.py: what is planned, and what lies on disk afterwards."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from recompile.checkpoint.checkpoint import TensorInfo, open_checkpoint
from recompile.errors import FormatError, MismatchError, OutputError, RecipeError, UnsupportedError
from recompile.formats import DTYPE_BYTES, FORMATS
from recompile.formats.compressed_tensors import Targets
from recompile.merge import plan_safetensors
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_plan import MANIFEST_NAME, WritePlan
from recompile.merge.write_safetensors import execute
from tests import mixes
from tests.mixes import bytes_of, files_of, overlay_of, written

# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_every_module_moves_whole_and_byte_for_byte(mix: tuple[Path, Path], tmp_path: Path) -> None:
    out = bytes_of(written(overlay_of(*mix), tmp_path / "out").path)

    expected: dict[str, Any] = {}
    for source in ("3bpw", "4bpw", "5bpw", "dense"):
        for name, tensor in bytes_of(tmp_path / source).items():
            if "layers.0.mlp.down_proj" in name or "v_proj" in name:
                wanted = "4bpw"
            elif "layers.1.mlp" in name:
                wanted = "5bpw"
            else:
                wanted = "dense" if "layers.2.mlp.down_proj" in name else "3bpw"
            if wanted == source:
                expected[name] = tensor
    assert out == expected
    # the source's extra part came along, and the base's part that the source lacks is gone
    assert "model.layers.0.mlp.down_proj.bias" in out
    assert "model.layers.0.mlp.down_proj.weight_zero_point" not in out
    assert "model.layers.1.mlp.down_proj.weight_zero_point" in out
    assert "model.layers.2.mlp.down_proj.weight_packed" not in out


def test_the_output_decodes_to_what_the_overlay_decodes_to(mix: tuple[Path, Path], tmp_path: Path) -> None:
    overlay = overlay_of(*mix)
    made = written(overlay, tmp_path / "out")
    for name, module in overlay.modules.items():
        if module.shape is not None:
            assert torch.equal(made.load(f"{name}.weight"), overlay.load(f"{name}.weight")), name
    assert made.modules.keys() == overlay.modules.keys()


def test_no_overrides_is_a_plain_copy(tmp_path: Path) -> None:
    base = mixes.packed(tmp_path / "3bpw", 3)
    made = written(overlay_of(base, mixes.recipe(tmp_path / "none.yaml", {})), tmp_path / "out")
    assert bytes_of(made.path) == bytes_of(base)
    assert json.loads((made.path / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_two_runs_give_the_same_files(mix: tuple[Path, Path], tmp_path: Path) -> None:
    written(overlay_of(*mix), tmp_path / "one", 1)
    for _ in execute(plan_write(overlay_of(*mix), tmp_path / "two", 1), workers=1):
        pass
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_other_files_come_from_the_base(tmp_path: Path) -> None:
    base = mixes.dense(tmp_path / "base")
    kept = ["tokenizer.json", "LICENSE", "modeling_x.py", "chat_template.jinja", "vocab.txt"]
    dropped = ["pytorch_model.bin", "a.gguf", "b.pth", "c.pt", "quantize_config.json", ".hidden", MANIFEST_NAME]
    dropped += ["model.safetensors.index.json.bak.gguf", "pytorch_model.bin.index.json", "quantization_config.json"]
    dropped += ["a-Q4_0.gguf.building", "a-Q4_0.building.jsonl", "b.gguf.recompile-partial", "t.safetensors.journal"]
    for name in kept + dropped:
        (base / name).write_text(f"this is {name}" if name != "tokenizer.json" else '{"model": {"vocab": {"a": 0}}}')
    (base / "subdir").mkdir()
    other = mixes.dense(tmp_path / "other", seed=1)
    recipe = mixes.recipe(tmp_path / "r.yaml", {"model.layers.0.*": other})
    made = written(overlay_of(base, recipe), tmp_path / "out")
    found = files_of(made.path)
    assert found.keys() == {*kept, "generation_config.json", "config.json", "model.safetensors", MANIFEST_NAME}
    assert found["LICENSE"] == b"this is LICENSE"


def test_a_report_of_the_base_is_not_true_of_a_mix(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3bpw", 3), mixes.packed(tmp_path / "4bpw", 4)
    (base / "quantize_report.json").write_text("{}")
    written(overlay_of(base), tmp_path / "copy")
    written(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*.0.mlp.*": other})), tmp_path / "mix")
    assert (tmp_path / "copy" / "quantize_report.json").exists()
    assert not (tmp_path / "mix" / "quantize_report.json").exists()


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """6.4 MiB: an embedding of 1.5 MiB, 12 packed modules of about 0.4 MiB that mix 2, 4 and 8 byte items."""
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.zeros(12288, 64, dtype=torch.bfloat16)}
    for number in range(12):
        scale = torch.rand(1024, 3, generator=torch.Generator().manual_seed(number))  # 3: an odd number of 2-byte items
        codes = torch.randint(-8, 8, (1024, 96 * 8), generator=torch.Generator().manual_seed(number))
        scheme = mixes.packed_int.IntScheme(4, 256, True)
        parts = mixes.packed_int.pack(codes, scale, None, scheme)
        tensors |= {f"model.layers.{number}.mlp.up_proj.{part}": value for part, value in parts.items()}
        tensors[f"model.layers.{number}.odd.weight"] = torch.ones(number * 2 + 1, dtype=torch.bfloat16)
    body = {"targets": ["Linear"], "format": "pack-quantized", "weights": scheme.to_config()}
    settings = mixes.config(12)
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": body},
    }
    return mixes.save(tmp_path / "large", tensors, settings)


def test_shards(large: Path, tmp_path: Path) -> None:
    made = written(overlay_of(large), tmp_path / "out", 1)
    assert bytes_of(made.path) == bytes_of(large)
    shards = sorted(path.name for path in made.path.glob("*.safetensors"))
    count = len(shards)
    assert shards == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert count == 7  # the embedding alone, then 2 modules of 0.4 MiB a shard, 12 of them
    index = json.loads((made.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == open_checkpoint(large).size_bytes
    assert index["weight_map"] == {name: info.path.name for name, info in made.tensors.items()}
    for module in made.modules.values():
        assert len({info.path for info in module.parts.values()}) == 1, module.name
    by_shard: dict[Path, list[TensorInfo]] = {}
    for info in made.tensors.values():
        by_shard.setdefault(info.path, []).append(info)
    for path, infos in by_shard.items():
        size = sum(info.size_bytes for info in infos)
        assert size <= 1 << 20 or [info.name for info in infos] == ["model.embed_tokens.weight"], path
    # layers follow each other in the order of their numbers
    first = {name: made.tensors[f"{name}.weight_scale"].path.name for name in made.modules if "up_proj" in name}
    assert [first[f"model.layers.{number}.mlp.up_proj"] for number in range(12)] == sorted(first.values())


@pytest.mark.parametrize("shard_mb", [1, 8192])
def test_headers_are_what_loaders_want(large: Path, tmp_path: Path, shard_mb: int) -> None:
    made = written(overlay_of(large), tmp_path / "out", shard_mb)
    for path in made.path.glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length]
        assert length % 8 == 0
        assert json.loads(header)["__metadata__"] == {"format": "pt"}
        assert header.rstrip(b" ") + b" " * (len(header) - len(header.rstrip(b" "))) == header
        with safe_open(path, "pt") as opened:  # the library maps the file: misaligned tensors would fail here
            for name in opened.keys():  # noqa: SIM118, it is no dict
                assert torch.equal(opened.get_tensor(name), made.read(name))
    for info in made.tensors.values():
        assert info.offset % DTYPE_BYTES[info.dtype] == 0, info.name


def test_one_shard_has_a_plain_name_and_no_index(large: Path, tmp_path: Path) -> None:
    found = files_of(written(overlay_of(large), tmp_path / "out").path)
    assert "model.safetensors" in found
    assert "model.safetensors.index.json" not in found


def test_a_shard_size_below_one_is_refused(large: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="shard_size 0"):
        plan_write(overlay_of(large), tmp_path / "out", 0)


# ---- configs: compressed-tensors -------------------------------------------------------------------------------------


def test_config_says_what_is_stored(mix: tuple[Path, Path], tmp_path: Path) -> None:
    made = written(overlay_of(*mix), tmp_path / "out")
    config = made.quantization_config
    for name, module in made.modules.items():
        matching = [
            key
            for key, group in config["config_groups"].items()
            if Targets({"config_groups": {key: group}}).group_of(name, class_name="?") is not None
        ]
        assert len(matching) == (1 if module.is_quantized else 0), name
    weights = {
        name: config["config_groups"][key]["weights"]
        for name in made.modules
        for key, group in config["config_groups"].items()
        if Targets({"config_groups": {key: group}}).group_of(name, class_name="?") is not None
    }
    figures = {name: (w["num_bits"], w["strategy"], w.get("group_size"), w["symmetric"]) for name, w in weights.items()}
    assert figures["model.layers.0.mlp.down_proj"] == (4, "group", 32, True)
    assert figures["model.layers.2.self_attn.v_proj"] == (4, "group", 32, True)
    assert figures["model.layers.1.mlp.up_proj"] == (5, "channel", None, False)
    assert figures["model.layers.0.mlp.up_proj"] == (3, "group", 32, False)
    assert len(config["config_groups"]) == 3
    assert config["ignore"] == ["lm_head", "model.layers.2.mlp.down_proj"]
    assert (config["quantization_status"], config["format"]) == ("compressed", "pack-quantized")


def test_a_tied_head_is_ignored_and_stays_tied(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3", 3, tied=True), mixes.packed(tmp_path / "4", 4, tied=True)
    made = written(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*.mlp.*": other})), tmp_path / "out")
    assert made.quantization_config["ignore"] == ["lm_head"]
    assert made.config["tie_word_embeddings"] is True


def test_a_head_of_its_own_unties(tmp_path: Path) -> None:
    base = mixes.packed(tmp_path / "3", 3, tied=True)
    other = mixes.packed(tmp_path / "4", 4, head=True)
    made = written(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"lm_head.*": other})), tmp_path / "out")
    assert made.modules["lm_head"].format == "pack-quantized"
    assert made.config["tie_word_embeddings"] is False
    assert made.quantization_config["ignore"] == []
    assert Targets(made.quantization_config).group_of("lm_head")["weights"]["num_bits"] == 4  # type: ignore[index]


def test_nothing_quantized_has_no_quantization_config(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3", 3), mixes.dense(tmp_path / "dense")
    made = written(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*_proj.*": other})), tmp_path / "out")
    assert "quantization_config" not in made.config
    assert made.formats == ()


def test_a_dense_base_takes_quantized_modules(tmp_path: Path) -> None:
    base, other = mixes.dense(tmp_path / "dense"), mixes.packed(tmp_path / "4", 4)
    made = written(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*.mlp.*": other})), tmp_path / "out")
    assert made.quantization_config["quant_method"] == "compressed-tensors"
    assert "model.layers.0.self_attn.q_proj" in made.quantization_config["ignore"]
    assert "model.embed_tokens" not in made.quantization_config["ignore"]


def test_fused_sets_of_several_schemes_are_named(mix: tuple[Path, Path], tmp_path: Path) -> None:
    warnings = plan_write(overlay_of(*mix), tmp_path / "out").warnings
    assert any("q_proj, k_proj, v_proj have different schemes and 2 more" in text for text in warnings)
    assert not any("gate_proj" in text for text in warnings)


def test_rotated_variants_are_refused(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3", 3), mixes.packed(tmp_path / "4", 4)
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"r1": {}}}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(MismatchError, match=r"4: .*stored rotated"):
        plan_write(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*.mlp.*": other})), tmp_path / "out")


def test_formats_that_no_engine_mixes_are_refused(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "ct", 3), mixes.as_exl2(tmp_path / "exl2", 4)
    recipe = mixes.recipe(tmp_path / "r.yaml", {"model.layers.1.mlp.*": other})
    with pytest.raises(UnsupportedError) as caught:
        plan_write(overlay_of(base, recipe), tmp_path / "out")
    message = str(caught.value)
    assert "compressed-tensors (model." in message
    assert "exl2 (model.layers.1.mlp." in message
    assert "with dense" in message


# ---- configs: EXL2 and EXL3 ------------------------------------------------------------------------------------------


def test_exl2_names_index_and_config(tmp_path: Path) -> None:
    base, other = mixes.as_exl2(tmp_path / "3", 3), mixes.as_exl2(tmp_path / "5", 5)
    overlay = overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*.mlp.*": other}))
    made = written(overlay, tmp_path / "out")
    assert "output.safetensors" in files_of(made.path)
    assert not (made.path / "model.safetensors.index.json").exists()
    config = made.quantization_config
    assert config["bits"] == round(overlay.accounting.bpw, 2)
    assert 3.5 < config["bits"] < 6
    assert config["head_bits"] == round(overlay.accounting.head_bpw or 0, 2)
    assert (config["quant_method"], config["version"]) == ("exl2", "0.3.2")
    assert config["calibration"] == {"rows": 1, "length": 2, "dataset": "(default)"}
    assert (
        bytes_of(made.path)["model.layers.0.mlp.up_proj.q_weight"]
        == bytes_of(other)["model.layers.0.mlp.up_proj.q_weight"]
    )


def test_exl2_shards_have_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_safetensors, "MB", 20_000)
    made = written(overlay_of(mixes.as_exl2(tmp_path / "3", 3)), tmp_path / "out", 1)
    names = {path.name for path in made.path.glob("*.safetensors")}
    assert len(names) > 1
    assert f"output-00001-of-{len(names):05d}.safetensors" in names
    assert not (made.path / "model.safetensors.index.json").exists()


def test_exl2_keeps_the_tie_beside_a_quantized_head(tmp_path: Path) -> None:
    base = mixes.as_exl2(tmp_path / "3", 3, tied=True)
    assert written(overlay_of(base), tmp_path / "out").config["tie_word_embeddings"] is True


@pytest.mark.parametrize(("dtype", "fits"), [(torch.bfloat16, False), (torch.float16, True)])
def test_exl2_takes_dense_modules_as_float16_only(tmp_path: Path, dtype: torch.dtype, fits: bool) -> None:
    base, other = mixes.as_exl2(tmp_path / "3", 3), mixes.dense(tmp_path / "dense", dtype)
    overlay = overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"model.layers.1.mlp.*": other}))
    if fits:
        made = written(overlay, tmp_path / "out")
        assert made.modules["model.layers.1.mlp.up_proj"].format == "dense"
        assert made.modules["model.layers.2.mlp.up_proj"].format == "exl2"
    else:
        with pytest.raises(UnsupportedError, match=r"BF16.*EXL2 engines.*float16.*with dense"):
            plan_write(overlay, tmp_path / "out")


def test_a_dense_head_in_exl2_unties(tmp_path: Path) -> None:
    base, other = mixes.as_exl2(tmp_path / "3", 3, tied=True), mixes.dense(tmp_path / "dense", torch.float16)
    made = written(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"lm_head.*": other})), tmp_path / "out")
    assert made.config["tie_word_embeddings"] is False
    assert made.quantization_config["head_bits"] == 16


def test_exl3_configs_are_regenerated(tmp_path: Path) -> None:
    base, other = mixes.as_exl3(tmp_path / "3", 3, "mcg", tied=True), mixes.as_exl3(tmp_path / "2.5", 2.5, "mul1")
    made = written(overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*.mlp.*": other})), tmp_path / "out")
    storage = json.loads((made.path / "quantization_config.json").read_text())
    up = storage["tensor_storage"]["model.layers.0.mlp.up_proj"]
    assert (up["quant_format"], up["bits_per_weight"]) == ("exl3", 2.5)
    assert up["mul1_multiplier"] == 0x83DCD12D
    assert "mcg_multiplier" not in up
    trellis = made.tensors["model.layers.0.mlp.up_proj.trellis"]
    assert up["stored_tensors"][trellis.name] == {
        "shape": list(trellis.shape),
        "n_bytes": trellis.size_bytes,
        "dtype": "torch.int16",
    }
    assert storage["tensor_storage"]["model.norm"].keys() == {"stored_tensors"}
    assert storage["tensor_storage"]["model.layers.0.self_attn.q_proj"]["bits_per_weight"] == 3
    linears = [m for n, m in made.modules.items() if "_proj" in n]
    measured = sum(8 * m.size_bytes for m in linears) / sum(m.numel for m in linears)
    for config in (storage, made.quantization_config):
        assert config["bits"] == round(measured, 2)
        assert "codebook" not in config  # it differs
        assert config["version"] == "1.6.5"
    assert made.quantization_config["head_bits"] == pytest.approx(3.3, abs=0.4)
    assert made.config["tie_word_embeddings"] is False
    assert "tensor_storage" not in made.quantization_config


def test_exl3_keeps_one_codebook_for_all(tmp_path: Path) -> None:
    made = written(overlay_of(mixes.as_exl3(tmp_path / "3", 3, "mcg")), tmp_path / "out")
    assert made.quantization_config["codebook"] == "mcg"


@pytest.mark.parametrize(
    ("other", "key", "problem"),
    [
        ((3, "mul1"), "*.v_proj.*", r"k_proj has the mcg codebook and .*v_proj the mul1 one at the same 3 bits"),
        ((3, "3inst"), "*.gate_proj.*", r"gate_proj has the 3inst codebook and .*up_proj the mcg one"),
        ((4, "mul1"), "*.v_proj.*", None),  # another K: the engine does not fuse the two
        ((3, "mul1"), "*.down_proj.*", None),
    ],
)
def test_exl3_pairs_share_a_codebook(tmp_path: Path, other: tuple[float, str], key: str, problem: str | None) -> None:
    base, source = mixes.as_exl3(tmp_path / "base", 3, "mcg"), mixes.as_exl3(tmp_path / "other", *other)
    overlay = overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {key: source}))
    if problem is None:
        assert plan_write(overlay, tmp_path / "out").modules
    else:
        with pytest.raises(UnsupportedError, match=problem):
            plan_write(overlay, tmp_path / "out")


def test_exl3_experts_share_bits(tmp_path: Path) -> None:
    def build(name: str, bits: float) -> Path:
        made: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(8, dtype=torch.bfloat16)}
        for expert in range(3):
            for projection in ("gate_proj", "up_proj", "down_proj"):
                for part, value in mixes.exl3_parts((128, 128), bits).items():
                    made[f"model.layers.0.mlp.experts.{expert}.{projection}.{part}"] = value
        return mixes.save(tmp_path / name, made, {"model_type": "x", "quantization_config": {"quant_method": "exl3"}})

    base, other = build("3", 3), build("4", 4)
    whole = overlay_of(base, mixes.recipe(tmp_path / "whole.yaml", {"*.experts.*.up_proj.*": other}))
    assert plan_write(whole, tmp_path / "out").modules
    torn = overlay_of(base, mixes.recipe(tmp_path / "torn.yaml", {"*.experts.1.up_proj.*": other}))
    with pytest.raises(UnsupportedError, match=r"experts' up_proj in model\.layers\.0\.mlp\.experts differ"):
        plan_write(torn, tmp_path / "out")


def test_two_markers_are_refused(tmp_path: Path) -> None:
    base = mixes.as_exl3(tmp_path / "3", 3, "mcg")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.mul1"] = torch.tensor(0x83DCD12D - (1 << 32), dtype=torch.int32)
    mixes.save(tmp_path / "both", tensors, json.loads((base / "config.json").read_text()))
    with pytest.raises(UnsupportedError, match=r"model\.layers\.1\.mlp\.up_proj has both markers"):
        plan_write(overlay_of(tmp_path / "both"), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exl3_takes_dense_linears_as_float16_only(tmp_path: Path, dtype: torch.dtype) -> None:
    base, other = mixes.as_exl3(tmp_path / "3", 3), mixes.dense(tmp_path / "dense", dtype)
    keys = {"model.embed_tokens.*": other, "model.norm.*": other}
    assert plan_write(overlay_of(base, mixes.recipe(tmp_path / "a.yaml", keys)), tmp_path / "out").modules
    overlay = overlay_of(base, mixes.recipe(tmp_path / "b.yaml", {"*.down_proj.*": other}))
    if dtype is torch.float16:
        made = written(overlay, tmp_path / "out")
        assert made.modules["model.layers.0.mlp.down_proj"].shape == (mixes.HIDDEN, mixes.INTERMEDIATE)
    else:
        with pytest.raises(UnsupportedError, match=r"BF16.*EXL3 engines.*float16 only.*with dense"):
            plan_write(overlay, tmp_path / "out")


# ---- dense -----------------------------------------------------------------------------------------------------------


def test_dense_holds_the_decoded_values(mix: tuple[Path, Path], tmp_path: Path) -> None:
    overlay = overlay_of(*mix)
    made = written(overlay, tmp_path / "out", dense=True)
    assert made.formats == ()
    assert "quantization_config" not in made.config
    assert made.modules.keys() == overlay.modules.keys()
    for name in overlay.modules:
        value = made.read(f"{name}.weight")
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, overlay.load(f"{name}.weight").bfloat16()), name
    assert torch.equal(
        made.read("model.layers.0.mlp.down_proj.bias"), overlay.load("model.layers.0.mlp.down_proj.bias")
    )
    manifest = json.loads((made.path / MANIFEST_NAME).read_text())
    assert manifest["dense"] is True
    assert manifest["modules"]["model.layers.0.mlp.up_proj"]["decoded_from"] == "pack-quantized"


def test_dense_cuts_padding_and_mixes_anything(tmp_path: Path) -> None:
    base = mixes.as_exl2(tmp_path / "exl2", 4, tied=True)
    exl3, ints = mixes.as_exl3(tmp_path / "exl3", 3), mixes.packed(tmp_path / "ints", 4)
    recipe = mixes.recipe(tmp_path / "r.yaml", {"*.0.mlp.*": exl3, "*.1.mlp.up_proj.*": ints})
    overlay = overlay_of(base, recipe)
    made = written(overlay, tmp_path / "out", dense=True)
    true_shapes = {name: tuple(value.shape) for name, value in mixes.weights().items()}
    assert {name: made.tensors[name].shape for name in made.tensors} == true_shapes
    for name, shape in true_shapes.items():
        wanted = overlay.load(name)[tuple(slice(0, size) for size in shape)]
        # the base's dense tensors are float16; what comes dense from elsewhere keeps its dtype
        assert torch.equal(made.read(name), wanted.to(made.read(name).dtype)), name
    assert made.read("model.layers.0.mlp.up_proj.weight").dtype == torch.float16
    assert overlay.load("model.layers.0.mlp.up_proj.weight").shape == (128, 128)  # padded before
    assert made.config["tie_word_embeddings"] is False
    assert made.config["torch_dtype"] == "float16"


def test_dense_of_a_tied_model_stays_tied(tmp_path: Path) -> None:
    made = written(overlay_of(mixes.packed(tmp_path / "3", 3, tied=True)), tmp_path / "out", dense=True)
    assert made.config["tie_word_embeddings"] is True
    assert "lm_head" not in made.modules


def test_dense_refuses_before_writing_what_it_cannot_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = mixes.dense(tmp_path / "dense")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.float8_e4m3fn)
    mixes.save(tmp_path / "fp8", tensors, mixes.config())
    with pytest.raises(FormatError, match=r"up_proj is stored as float-quantized, and no target of config_groups"):
        plan_write(overlay_of(tmp_path / "fp8"), tmp_path / "out", dense=True)
    monkeypatch.setitem(FORMATS, "float-quantized", dataclasses.replace(FORMATS["float-quantized"], runnable=False))
    with pytest.raises(UnsupportedError, match=r"up_proj is stored as float-quantized, which cannot be decoded"):
        plan_write(overlay_of(tmp_path / "fp8"), tmp_path / "out", dense=True)


# ---- manifest --------------------------------------------------------------------------------------------------------


def test_manifest(mix: tuple[Path, Path], tmp_path: Path) -> None:
    overlay = overlay_of(*mix)
    made = written(overlay, tmp_path / "out")
    manifest = json.loads((made.path / MANIFEST_NAME).read_text())
    name = "model.layers.0.mlp.down_proj"
    digest = hashlib.sha256()
    stored = bytes_of(tmp_path / "4bpw")
    for part in ("bias", "weight_packed", "weight_scale", "weight_shape"):  # alphabetical
        digest.update(stored[f"{name}.{part}"][2])
    size = 64 * 96 * 4 / 8 + 64 * 3 * 2 + 16 + 64 * 2  # codes, scales, shape, bias
    assert manifest["modules"][name] == {
        "source": str(tmp_path / "4bpw"),
        "format": "pack-quantized",
        "bits_per_weight": round(8 * size / (64 * 96), 6),
        "sha256": digest.hexdigest(),
    }
    assert manifest["modules"]["model.norm"]["source"] is None
    assert manifest["modules"].keys() == made.modules.keys()
    assert manifest["base"] == {"directory": str(mix[0]), "fingerprint": open_checkpoint(mix[0]).fingerprint}
    assert manifest["sources"].keys() == {str(tmp_path / name) for name in ("4bpw", "5bpw", "dense")}
    text = mix[1].read_text()
    assert manifest["recipe"]["text"] == text
    assert manifest["recipe"]["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert manifest["accounting"]["bpw"] == overlay.accounting.bpw


def test_a_recipe_that_changes_meanwhile_is_noticed(mix: tuple[Path, Path], tmp_path: Path) -> None:
    overlay = overlay_of(*mix)
    mixes.recipe(mix[1], {"*.mlp.*": tmp_path / "4bpw"})
    with pytest.raises(RecipeError, match=r"mix\.yaml: changed"):
        plan_write(overlay, tmp_path / "out")


def test_a_plan_is_a_value(mix: tuple[Path, Path], tmp_path: Path) -> None:
    def facts(plan: WritePlan) -> Any:
        return plan.shards, plan.texts, plan.accounting, [(m.name, m.tensors) for m in plan.modules]

    first, second = (facts(plan_write(overlay_of(*mix), tmp_path / "out")) for _ in range(2))
    assert first == second
    assert not (tmp_path / "out").exists()
