"""Checkpoints that are damaged, lie about themselves, or carry what no model has: one message that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.config_fields import architectures_of, check_config
from recompile.checkpoint.safetensors_files import read_safetensors_header
from recompile.cli.recompile import main as recompile
from recompile.errors import CheckpointError
from recompile.model.fused_experts import ExpertStack
from recompile.model.known_fields import NEVER, taken
from tests import tiny
from tests.commands import run
from tests.hostile.refusals import refuses, run_on


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "m"
    tiny.write_model(path, "llama")
    return path


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "m"))


def packed(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def opened(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


WHOLE: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "header of 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "open brackets": packed(b"[" * 1_000_000),
    "nested": packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "list": packed(b"[]"),
    "null": packed(b"null"),
    "utf16": packed('{"a": 1}'.encode("utf-16")),
    "byte order mark": packed(b"\xef\xbb\xbf{}"),
    "no utf8": packed(b'{"\xff":1}'),
    "trailing": packed(b"{}x"),
    "half a surrogate": packed(rb'{"\ud800.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "long number": packed(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,' + b"9" * 5000 + b"]}}"),
    "600,000 tensors": packed(
        b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % n for n in range(600_000)) + b"}"
    ),
    "a million axes": packed(b'{"a":{"dtype":"F32","shape":[' + b"0," * 999_999 + b'0],"data_offsets":[0,0]}}'),
    "metadata": packed(b'{"__metadata__":[1],"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_is_no_safetensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE[name])
    with pytest.raises(CheckpointError) as refused:
        read_safetensors_header(path)
    assert str(refused.value).startswith(str(path))
    assert len(str(refused.value)) < 600


ENTRIES: dict[str, Any] = {
    **{f"offsets {value!r}"[:40]: {"data_offsets": value} for value in (
        [-4, 100], [100, 0], [0.0, 32768.0], ["0", "1"], None, [0], [False, True], {"a": 1}, [10**15, 10**15 + 8], 3,
        [0, 10**4000],
    )},
    **{f"shape {value!r}"[:40]: {"shape": value} for value in (
        [-1, -16384], [256.0, 64], "ab", {"a": 1}, None, 5, [10**30], [0, 10**18], [True, 16384], [1, 2],
    )},
    **{f"dtype {value!r}": {"dtype": value} for value in ("Q99", 3, ["F32"], {}, "bf16", None)},
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_a_tensor_that_is_none(name: str, copy: Path, tmp_path: Path) -> None:
    header, data = opened(copy / "model.safetensors")
    first = next(key for key in header if key != "__metadata__")
    header[first] |= ENTRIES[name]
    (copy / "model.safetensors").write_bytes(packed(header, data))
    refuses(tmp_path, recompile, "-i", copy, "-o", tmp_path / "OUT", "--quiet", names="model.safetensors")


NAMES = {
    "up": "../../../../tmp/evil.weight",
    "absolute": "/tmp/evil.weight",
    "nul": "a\0b.weight",
    "newline": "a\nError: fake\nb.weight",
    "escape": "\x1b[2J\x1b]0;title\x07.weight",
    "bidi": "\u202egnp.exe\u202c.weight",
    "empty": "",
    "digits": "model.layers." + "9" * 5000 + ".mlp.up_proj.weight",
    "superscript": "model.layers.\u00b2.mlp.up_proj.weight",
    "arabic": "model.layers.\u0661.mlp.up_proj.weight",
    "long": "a" * 100_000 + ".weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names(name: str, copy: Path, tmp_path: Path) -> None:
    header, data = opened(copy / "model.safetensors")
    old = "model.layers.0.mlp.up_proj.weight"
    renamed = {NAMES[name] if key == old else key: value for key, value in header.items()}
    (copy / "model.safetensors").write_bytes(packed(renamed, data))
    run_on(recompile, "-i", copy, "-o", tmp_path / "OUT", "--quiet")
    run_on(recompile, "--check", copy)
    assert {path.name for path in tmp_path.iterdir()} <= {"m", "OUT"}
    assert not Path("/tmp/evil.weight").exists()


def as_kind(kind: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "directory":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path.name)

    return change


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "loop"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_files_that_are_none(kind: str, name: str, copy: Path, tmp_path: Path) -> None:
    as_kind(kind)(copy / name)
    refuses(tmp_path, recompile, "-i", copy, "-o", tmp_path / "OUT", "--quiet", names=str(copy))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{}}', '{"weight_map":{"a":1}}', "[" * 100_000,
     '{"metadata":' + "9" * 5000 + "}", '{"weight_map":{"a":"../x.safetensors"}}',
     '{"weight_map":{"a":"' + "a" * 5000 + '"}}',
     '{"weight_map":{"a":"a\\u0000.safetensors"}}', '{"weight_map":{"a":"\\ud800"}}'],
    ids=range(13),
)  # fmt: skip
def test_an_index_that_is_none(text: str, copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(text)
    refuses(tmp_path, recompile, "-i", copy, "-o", tmp_path / "OUT", "--quiet", names=str(copy))


def test_integers_without_scales_are_no_weights(copy: Path, tmp_path: Path) -> None:
    header, data = opened(copy / "model.safetensors")
    header["model.layers.1.mlp.up_proj.weight"]["dtype"] = "I16"
    (copy / "model.safetensors").write_bytes(packed(header, data))
    refuses(tmp_path, recompile, "-i", copy, "-o", tmp_path / "OUT", "--quiet", names="up_proj.weight is I16")


# ---- config.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("num_hidden_layers", value) for value in (0, -1, 100_000, 2**32 - 1, "2", 2.5, True, float("nan"), [2])),
        *(("hidden_size", value) for value in (0, "64", 2**32)),
        *(("num_attention_heads", value) for value in (0, -4, "4", 2**32)),
        *(("num_key_value_heads", value) for value in (0, [])),
        *(("vocab_size", value) for value in (0, 2**40, None)),
        *(("intermediate_size", value) for value in (-1, 2**40)),
        *(("rms_norm_eps", value) for value in ("x", float("nan"), float("inf"), -1.0)),
        *(("rope_theta", value) for value in (0.0, "x", float("nan"))),
    ],
)
def test_a_config_is_checked_before_a_model_is_built(field: str, value: Any) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256, field: value}
    if value in ([2], [], None):  # a list is one value a layer, null is unset
        return check_config(config, "m/config.json")
    for place, whole in (("", config), ("text_config.", {"text_config": config})):
        with pytest.raises(CheckpointError, match=rf"^m/config\.json: {place}{field} is .*, wanted "):
            check_config(whole, "m/config.json")
    return None


CODE = {
    "auto_map": {"AutoModel": "org/repo--x.Y"},
    "_attn_implementation": "org/kernel",
    "attn_implementation": "org/kernel",
    "_experts_implementation": "org/kernel",
    "attn_implementation_internal": "org/kernel",
    "kernel_config": {"RMSNorm": "org/kernel:RMSNorm"},
    "use_kernels": True,
    "use_mamba_kernels": True,
    "trust_remote_code": True,
    "custom_pipelines": {"x": {"impl": "run.py"}},
    "name_or_path": "org/repo",
    "_name_or_path": "org/repo",
    "use_pretrained_backbone": True,
    "a_field_of_next_year": "org/repo",
    "dtype": "hub",
    "id2label": {"0": "n/a"},
    "quantization_config": {"quant_method": "x"},
}


@pytest.mark.parametrize("value", [3, 1.5, True, "LlamaForCausalLM", {"a": 1}, [7, None]])
def test_classes_that_are_no_list_of_names_are_none(value: Any, copy: Path) -> None:
    assert architectures_of({"architectures": value}) == []
    assert architectures_of({"architectures": ["A", 3]}) == ["A"]
    config = json.loads((copy / "config.json").read_text()) | {"architectures": value}
    (copy / "config.json").write_text(json.dumps(config))
    assert "no inconsistency found" in run(recompile, "--check", copy)


def test_experts_of_several_shapes_are_no_stack() -> None:
    stack = ExpertStack("layer.experts.gate_up_proj", ("gate", "up"), transposed=False, alternating=True)
    for role, width in (("gate", 4), ("up", 8)):
        stack.add_tensor("", "", role, torch.zeros(width, 3))
    with pytest.raises(CheckpointError, match=r"gate_up_proj: .*the shapes \[4, 3\] and \[8, 3\], wanted one"):
        stack.convert("layer.experts.gate_up_proj")


@pytest.mark.parametrize(
    ("model_type", "config", "wanted"),
    [
        ("llama", {"model_type": "llama", "rope_scaling": {"factor": {"__float__": "Infinity"}}}, None),
        ("llama", {"hidden_size": 64, "torch_dtype": "bfloat16", "pretraining_tp": 1, "head_dim": 16}, None),
        ("jamba", CODE, {}),
        ("llama", CODE, {}),
        (
            "llama",
            {"rope_scaling": {"auto_map": {"x": "o/r"}, "_attn_implementation": "o/r", "factor": 2}},
            {"rope_scaling": {"factor": 2}},
        ),
        ("deepseek_v3", {"num_nextn_predict_layers": 1, "num_local_experts": 4, "topk_method": "x"}, 2),
        (
            "qwen3_5",
            {"text_config": {**CODE, "hidden_size": 8}, "image_token_id": 3},
            {"text_config": {"hidden_size": 8}, "image_token_id": 3},
        ),
        (
            "llava",
            {"vision_config": {**CODE, "model_type": "siglip_vision_model", "patch_size": 2}},
            {"vision_config": {"model_type": "siglip_vision_model", "patch_size": 2}},
        ),
        (
            "llava",
            {"vision_config": {**CODE, "model_type": "no-such", "patch_size": 2}},
            {"vision_config": {"model_type": "no-such"}},
        ),
        ("qwen2_vl", {"max_window_layers": 2}, None),  # of its text model, which older files do not set apart
        (
            "kimi_linear",
            {"linear_attn_config": {"head_dim": 16, "auto_map": {}}},
            {"linear_attn_config": {"head_dim": 16}},
        ),
    ],
)
def test_transformers_gets_known_fields_alone(model_type: str, config: dict[str, Any], wanted: Any) -> None:
    from transformers import CONFIG_MAPPING

    kept = taken(config, CONFIG_MAPPING[model_type], "m/config.json")
    if isinstance(wanted, int):
        assert len(kept) == wanted
    else:
        assert kept == (config if wanted is None else wanted)


@pytest.mark.parametrize("value", ["org/act", "./act", "..\\act", "/tmp/act"])
@pytest.mark.parametrize("place", ["hidden_act", "text_config"])
def test_a_known_field_is_no_path(value: str, place: str) -> None:
    from transformers import CONFIG_MAPPING

    config = {"hidden_act": value} if place == "hidden_act" else {"text_config": {"hidden_act": value}}
    with pytest.raises(CheckpointError, match=r"^m/config\.json: .*hidden_act is the text .*, wanted no path"):
        taken(config, CONFIG_MAPPING["qwen3_5"], "m/config.json")


NO_MATTER = {"use_mamba_kernels", "dtype", "output_attentions"}  # choices of a run, not of a model


def test_known_fields_lose_nothing_of_any_type() -> None:
    """A config with all defaults of its model type is the same from its known fields alone, for all that make text."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    seen = 0
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING)):
        config_class = CONFIG_MAPPING[model_type]
        try:
            text = json.dumps(config_class().to_dict(), default=str)
            whole = config_class.from_dict(json.loads(text)).to_dict()
        except Exception:  # a library that is not installed; a type without defaults that hold together
            continue
        again = config_class.from_dict(taken(json.loads(text), config_class, model_type))
        names = {name for name in whole if NEVER.search(name) is None} - NO_MATTER
        assert _plain(again.to_dict(), names) == _plain(whole, names), model_type
        seen += 1
    assert seen > 100


def _plain(config: dict[str, Any], names: set[str]) -> Any:
    return json.loads(json.dumps({name: config.get(name) for name in names}, default=str, sort_keys=True))


def test_a_kernel_of_the_hub_is_never_asked_for(copy: Path) -> None:
    from recompile.model.stream import LayeredModel

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "_attn_implementation": "org/kernel"}))
    assert LayeredModel.of(open_checkpoint(copy)).model.config._attn_implementation in ("sdpa", "eager")


def test_code_that_a_merge_copies_is_told(copy: Path, tmp_path: Path) -> None:
    (copy / "modeling_x.py").write_text("raise SystemExit('run')\n")
    code, output = run_on(recompile, "-i", copy, "-o", tmp_path / "OUT", "--quiet")
    assert code == 0
    assert "its code is copied with it and not run here: modeling_x.py" in output
    assert (tmp_path / "OUT" / "modeling_x.py").read_text() == "raise SystemExit('run')\n"


@pytest.mark.parametrize("out", ["", ".", "/", "m", "m/config.json", "m/sub/../../m"])
def test_outputs_that_are_none(out: str, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(tmp_path, recompile, "-i", "m", "-o", out, "--quiet", names="")
    refuses(tmp_path, recompile, "-i", "m", "-o", "OUT", "--dry-run", "--json", "m/config.json", names="m/config.json")


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 32}}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (5, "quantization_config: 5, wanted an object"),
        ([], "quantization_config: a list, wanted an object"),
        ({"quant_method": 5}, "quant_method: 5, wanted text or null"),
        ({"quant_method": ["awq"]}, "quant_method: a list, wanted text or null"),
        ({"config_groups": 3}, "config_groups: 3, wanted"),
        ({"config_groups": ["Linear"]}, "config_groups: a list, wanted an object"),
        ({"config_groups": {"g": 3}}, "config_groups.g: 3, wanted an object"),
        ({"config_groups": {"g": {"targets": 7}}}, "config_groups.g: targets: 7, wanted"),
        ({"config_groups": {"g": {"targets": [7]}}}, "config_groups.g: targets[0]: 7, wanted text"),
        ({"config_groups": {"g": {**GROUP, "weights": "int4"}}}, 'weights: the text "int4", wanted an object'),
        ({"config_groups": {"g": {**GROUP, "weights": {"num_bits": -4}}}}, "weights: num_bits: -4, wanted a width"),
        ({"config_groups": {"g": {**GROUP, "weights": {"group_size": 2**70}}}}, "weights: group_size: a number of"),
        ({"ignore": "lm_head"}, 'ignore: the text "lm_head", wanted a list'),
        ({"ignore": [None]}, "ignore[0]: null, wanted text"),
        ({"modules_to_not_convert": {"a": 1}}, "modules_to_not_convert: an object, wanted a list"),
        ({"quant_method": "gptq", "bits": 1e300}, "bits: 1e+300, wanted a width"),
        ({"quant_method": "gptq", "bits": float("nan")}, "bits: nan, wanted a width"),
        ({"quant_method": "awq", "q_group_size": -128}, "q_group_size: -128, wanted -1, or a size"),
        ({"quant_method": "fp8", "weight_block_size": [128, -1]}, "weight_block_size: [128, -1], wanted sizes"),
        ({"quant_method": "exl3", "tensor_storage": []}, "tensor_storage: a list, wanted an object"),
        ({"desc_act": "maybe"}, 'desc_act: the text "maybe", wanted true or false or null'),
    ],
    ids=str,
)
def test_a_quantization_config_is_typed(config: Any, says: str, copy: Path) -> None:
    """In one place, whatever the format, when the checkpoint is opened."""
    path = copy / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "quantization_config": config}))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(copy)
    assert str(error.value).startswith(f"{path}: quantization_config: ".removesuffix(" " if config in (5, []) else ""))
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (5, "quantization: 5, wanted an object"),
        ([4, 64], "quantization: a list, wanted an object"),
        ({"bits": "4", "group_size": 64}, 'bits: the text "4", wanted a whole number or null'),
        ({"bits": 4.5, "group_size": 64}, "bits: 4.5, wanted a whole number or null"),
        ({"bits": True, "group_size": 64}, "bits: true, wanted a whole number or null"),
        ({"bits": 4, "group_size": 2**40}, "group_size: 1099511627776, wanted -1, or a size"),
        ({"bits": 0, "group_size": 64}, "bits: 0, wanted a width"),
        ({"bits": 4, "group_size": [64]}, "group_size: a list, wanted a whole number or null"),
        ({"bits": 4, "group_size": 64, "mode": 7}, "mode: 7, wanted text or null"),
        ({"bits": 4, "group_size": 64, "lm_head": {"bits": "8"}}, 'lm_head: bits: the text "8", wanted a whole'),
        ({"bits": 4, "group_size": 64, "lm_head": {"bits": -8}}, "lm_head: bits: -8, wanted a"),
        ({"bits": 4, "group_size": 64, "lm_head": {"mode": []}}, "lm_head: mode: a list, wanted text"),
        ({"bits": 4, "group_size": 64, "a\x1b[2J": {"mode": 1}}, "a\\u001b[2J: mode: 1, wanted text"),
    ],
    ids=str,
)
def test_a_quantization_of_mlx_is_typed(config: Any, says: str, copy: Path) -> None:
    path = copy / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "quantization": config}))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(copy)
    assert str(error.value).startswith(f"{path}: quantization: ")
    assert says in str(error.value)


def test_what_tools_write_is_a_quantization_config() -> None:
    from recompile.checkpoint.quantization_fields import check_mlx_quantization as check_mlx
    from recompile.checkpoint.quantization_fields import check_quantization_config as check

    honest: list[dict[str, Any]] = [
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}, "ignore": ["re:.*lm_head"]},
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": True, "desc_act": None, "dynamic": {"-:x": {}}},
        {"quant_method": "exl2", "version": "0.1", "bits": 4.25, "head_bits": 6, "calibration": {"rows": 100}},
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "version": "GEMM", "modules_to_not_convert": None},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"},
        {"group_size": 64, "bits": 4, "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}},  # MLX
    ]
    for config in honest:
        assert check(config, "config.json") is config
    check_mlx("w4a16", "config.json")
    check_mlx(honest[-1], "config.json")
    check_mlx({"bits": 4, "group_size": 64, "a": False, "b": {"bits": None}, "mode": "affine"}, "config.json")
    assert check(None, "config.json") == {}
