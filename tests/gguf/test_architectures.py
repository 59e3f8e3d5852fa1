"""Every row of the table of architectures against what llama.cpp's converter makes of the same tiny model: names,
shapes, values and keys; then back, fused tensors put together again. scripts/gguf_golden.py writes the expectations."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from recompile.checkpoint.checkpoint import GgufCheckpoint, open_checkpoint
from recompile.errors import FormatError, MismatchError, UnsupportedError
from recompile.gguf.architectures import ARCHITECTURES
from recompile.gguf.container import GgufFile, encode_key, open_gguf, write_gguf
from recompile.gguf.keys import model_records
from recompile.gguf.names import architecture_of, text_config_of, text_name
from recompile.model.stream import dense_names, transformers_config
from recompile.quantize.gguf import left_out, plan_variants
from recompile.quantize.gguf_build import build_variants
from recompile.quantize.lazy_variant import make_variants, spec_of
from tests import gguf_tiny

# Keys that the converter leaves out and the engine would fill in with the same values, and the other way round.
OPTIONAL = {
    "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length", "rope.freq_base",
    "expert_gating_func", "nextn_predict_layers", "attention.layer_norm_rms_epsilon",
}  # fmt: skip


@cache
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gguf_tiny.GOLDEN.read_text())
    return found


def ours(folder: Path, entry: dict[str, Any]) -> GgufFile:
    """Our float32 file of the tiny model of an entry."""
    base = gguf_tiny.write_tiny(folder / "base", entry)
    tokens = folder / "tokens.gguf"
    write_gguf(tokens, [encode_key("tokenizer.ggml.tokens", ["x"] * gguf_tiny.VOCAB)], [])
    plan = plan_variants(open_checkpoint(base), folder, ["F32"], tokenizer_from=open_gguf(tokens))
    for _ in build_variants(plan):
        pass
    return open_gguf(folder / "base-F32.gguf")


def idle(key: str, entry: dict[str, Any]) -> bool:
    """Whether a key speaks of experts or state spaces in a model without: Granite's converter writes them always."""
    told = {"ssm": "ssm_", "expert": "_exps"}
    part = next((part for start, part in told.items() if key.split(".")[1].startswith(start)), "")
    return entry["config"]["model_type"] == "granitemoehybrid" and not any(part in tensor for tensor in entry["gguf"])


def one_of(value: Any) -> Any:
    """The number that all layers have, of a list with one a layer."""
    return value[0] if isinstance(value, list) and len({*value}) == 1 else value


def test_every_architecture_of_the_table_was_compared() -> None:
    assert {entry["architecture"] for entry in golden().values()} == set(ARCHITECTURES)
    assert set(golden()) == set(gguf_tiny.BUILDS)


@pytest.mark.parametrize("name", gguf_tiny.BUILDS)
def test_our_file_is_the_converters(name: str, tmp_path: Path) -> None:
    """Names, shapes, values to the bit (to float32's rounding where an exponential is in it), and keys; from the file
    alone the tensors of the Hugging Face checkpoint again."""
    entry = golden()[name]
    file = ours(tmp_path, entry)
    assert file.value("general.architecture") == entry["architecture"]
    assert set(file.tensors) == set(entry["gguf"])
    for tensor, (shape, wanted) in entry["gguf"].items():
        info = file.tensors[tensor]
        assert [size for size in info.shape if size > 1] == [size for size in shape if size > 1], tensor
        raw = file.read(info)
        if isinstance(wanted, list):
            have = torch.frombuffer(bytearray(raw), dtype=torch.float32).tolist()
            assert have == pytest.approx(wanted, rel=1e-6), tensor
        elif hashlib.sha256(raw).hexdigest()[:12] != wanted:
            assert tensor.endswith(".ssm_a"), tensor  # the last bit of an exponential is the processor's own
            logs = open_checkpoint(tmp_path / "base").load(f"model.layers.{tensor.split('.')[1]}.mamba.A_log")
            have = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(logs.shape)
            assert torch.allclose(have.double(), -logs.double().exp(), rtol=1e-6), tensor
    stored = {key: file.value(key) for key in file.keys if key.startswith(f"{entry['architecture']}.")}
    keys, made = (
        {key.split(".", 1)[1]: one_of(value) for key, value in found.items() if not idle(key, entry)}
        for found in (entry["keys"], stored)
    )
    for key in (set(keys) | set(made)) - OPTIONAL:
        assert made.get(key) == pytest.approx(keys.get(key)), key
    for key in OPTIONAL & set(keys) & set(made):
        assert made[key] == pytest.approx(keys[key]), key

    checkpoint = open_checkpoint(file.path)
    assert isinstance(checkpoint, GgufCheckpoint)
    row = ARCHITECTURES[entry["architecture"]]
    if row.read_as or text_config_of(entry["config"])["model_type"] not in row.model_types:
        return  # as another type, with experts of their own: the logits are compared elsewhere
    left = set(left_out(open_checkpoint(tmp_path / "base")))
    wanted_names = {text_name(hf) or "": hf for hf in gguf_tiny.spelled_out(entry["hf"]) if hf not in left}
    wanted_names.pop("lm_head.weight" if "output.weight" not in file.tensors else "", None)
    assert {found for found in dense_names(checkpoint) if not found.startswith("rope_")} == set(wanted_names)
    shapes = gguf_tiny.spelled_out(entry["hf"])
    for plain, hf in wanted_names.items():
        have, want = checkpoint.load(plain).float(), gguf_tiny.values_of(hf, shapes[hf])
        assert have.shape == want.shape, plain
        assert torch.allclose(have, want, rtol=1e-5, atol=1e-6), plain
    config, stated = transformers_config(checkpoint.config), text_config_of(entry["config"])
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(config, key) == stated[key], key


def test_the_documentation_lists_every_row() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gguf.md").read_text()
    for row in ARCHITECTURES.values():
        assert f"| {row.name} | {', '.join(row.model_types)} |" in text


def test_names_are_those_of_the_gguf_package() -> None:
    """Its maps know every name of ours, and give the same name in GGUF."""
    gguf = pytest.importorskip("gguf")
    kinds = {spelled: kind for kind, spelled in gguf.MODEL_ARCH_NAMES.items()}
    newer = {"deepseek32", "cohere2moe", "mellum"}  # than the package
    own = {"in_proj_qkv", "in_proj_z", "k_b_proj", "v_b_proj", "input_linear"}  # our names of parts of fused tensors
    compared = 0
    for row in ARCHITECTURES.values():
        if row.name in newer:
            continue
        kind = kinds[row.name]
        table = gguf.get_tensor_name_map(kind, 4)
        for leaf, there in row.layer.items():
            hf = f"{row.layers}.2.{there.replace('.{}', '')}"
            if there.rpartition(".")[2] in own or any(leaf in part for fused in row.fused for part in fused.parts):
                continue
            found = table.get_name(hf) or table.get_name(hf.removeprefix("transformer."))
            if found is None and leaf == "ffn_gate" and gguf.MODEL_TENSOR.FFN_GATE not in gguf.MODEL_TENSORS[kind]:
                continue  # of layers that these models do not have
            if found is None and there.startswith("mlp.") and "ffn_gate_exps" in row.layer:
                continue  # a layer without experts, of which the package does not know
            if found is None and "{}" in there:  # the converter stacks them under a name of its own
                continue
            assert found == f"blk.2.{leaf}", (row.name, leaf, there)
            compared += 1
    assert compared > 400


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob is False, and llama.cpp computes qwen3moe with True"),
        ("llama4", {"attention_chunk_size": 64}, "attention_chunk_size is 64, and llama.cpp computes llama4 with 8192"),
        ("llama4", {"use_qk_norm": False}, "use_qk_norm is False with 4 experts"),
        ("qwen35", {"layer_types": ["linear_attention"] * 2}, "full attention at no regular interval"),
        ("glm-dsa", {"mlp_layer_types": ["sparse", "dense"]}, "llama.cpp wants all dense layers first"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is None, and llama.cpp computes gemma2"),
        ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0, and llama.cpp computes gemma3"),
        ("deepseek2", {"attention_bias": True}, "attention_bias is True, and llama.cpp computes deepseek2"),
        ("ernie4_5-moe", {"use_bias": True}, "use_bias is True, and llama.cpp computes ernie4_5-moe with False"),
        ("kimi-linear", {"linear_attn_config": {"num_heads": 2}}, "delta attention has 2 heads and latent attention 4"),
        ("kimi-linear", {"moe_renormalize": False}, "moe_renormalize is False, and llama.cpp computes kimi-linear"),
        ("bailingmoe", {"norm_head": True}, "norm_head is True, and llama.cpp computes bailingmoe with False"),
        ("bailingmoe2", {"use_qk_norm": False}, "has no use_qk_norm"),
        ("granitehybrid", {"position_embedding_type": "rope"}, "is rope, and llama.cpp computes granitehybrid"),
        ("nemotron_h_moe", {"hybrid_override_pattern": "ME*-"}, "llama.cpp knows one kind"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type 'dynamic' has no"),
    ],
)  # fmt: skip
def test_what_the_engine_would_compute_otherwise_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    config = {**golden()[name]["config"], **change}
    with pytest.raises(UnsupportedError, match=message):
        model_records(ARCHITECTURES[golden()[name]["architecture"]], text_config_of(config), "x")


def test_a_first_ling_that_no_class_of_transformers_computes_says_so(tmp_path: Path) -> None:
    """Its shares of experts are not normalized; its file can be merged and quantized all the same."""
    entry = json.loads(json.dumps(golden()["bailingmoe"]))
    entry["config"]["norm_topk_prob"] = False
    file = ours(tmp_path, entry)
    assert file.value("bailingmoe.expert_weights_norm") is False
    checkpoint = open_checkpoint(file.path)
    assert "model_type" not in checkpoint.config
    (note,) = checkpoint.notes
    assert "normalizes the weights of experts" in note


def test_maps_that_transformers_writes_under_the_name_of_experts_are_found(tmp_path: Path) -> None:
    """Kimi Linear's first layer has none."""
    entry = json.loads(json.dumps(golden()["kimi-linear"]))
    first = "model.layers.0."
    entry["hf"] = {
        name.replace(f"{first}mlp.", f"{first}block_sparse_moe."): shape for name, shape in entry["hf"].items()
    }
    assert set(ours(tmp_path, entry).tensors) == set(entry["gguf"])


def test_a_tensor_without_a_name_is_named(tmp_path: Path) -> None:
    entry = json.loads(json.dumps(golden()["granite"]))
    entry["hf"]["model.layers.0.self_attn.extra.weight"] = [4, 4]
    with pytest.raises(
        FormatError, match=r"1 tensors have no name in GGUF's granite, first model\.layers\.0\.self_attn\.extra"
    ):
        ours(tmp_path, entry)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_rows_beyond_the_tokens_are_left_out_where_the_converter_leaves_them_out(kind: str, tmp_path: Path) -> None:
    base = open_checkpoint(gguf_tiny.write_tiny(tmp_path / "base", golden()["gemma3"]))
    tokens = gguf_tiny.VOCAB - 4
    write_gguf(tmp_path / "t.gguf", [encode_key("tokenizer.ggml.tokens", ["x"] * tokens)], [])
    for _ in build_variants(plan_variants(base, tmp_path, [kind], tokenizer_from=open_gguf(tmp_path / "t.gguf"))):
        pass
    file = open_gguf(tmp_path / f"base-{kind}.gguf")
    assert file.tensors["token_embd.weight"].ne == (64, tokens)
    assert file.value("gemma3.vocab_size") == tokens
    made = open_checkpoint(file.path)
    assert transformers_config(made.config).vocab_size == tokens
    have, want = (checkpoint.load("model.embed_tokens.weight").float() for checkpoint in (made, base))
    assert torch.allclose(have, want[:tokens], atol=0 if kind == "F32" else 0.01)


@pytest.mark.parametrize(("tokens", "rows"), [(44, 44), (48, 48)])
def test_a_candidate_on_the_fly_weighs_the_rows_that_the_file_will_have(tokens: int, rows: int, tmp_path: Path) -> None:
    folder = gguf_tiny.write_tiny(tmp_path / "base", golden()["gemma3"])
    vocab = {f"t{number}": number for number in range(tokens - 1)}
    added = [{"id": tokens - 1, "content": "end"}]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": added}))
    ((_, made),) = make_variants(open_checkpoint(folder), [spec_of("Q8_0")])
    assert made.modules["model.embed_tokens"].size_bytes == rows * 64 // 32 * 34
    assert made.modules["model.embed_tokens"].shape == (48, 64)


def test_fewer_tokens_than_rows_are_another_model_elsewhere(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf", [encode_key("tokenizer.ggml.tokens", ["x"] * (gguf_tiny.VOCAB - 4))], [])
    base = open_checkpoint(gguf_tiny.write_tiny(tmp_path / "base", golden()["gemma2"]))
    with pytest.raises(MismatchError, match=r"has 44 tokens, .* has a vocabulary of 48"):
        plan_variants(base, tmp_path, ["F32"], tokenizer_from=open_gguf(tmp_path / "t.gguf"))


@pytest.mark.parametrize("name", ["gptneox", "bloom"])
def test_a_number_of_key_heads_that_a_type_does_not_know_counts_for_nothing(name: str, tmp_path: Path) -> None:
    entry = json.loads(json.dumps(golden()[name]))
    entry["config"]["num_key_value_heads"] = 2
    tensor = "blk.0.attn_qkv.weight"
    file = ours(tmp_path, entry)
    assert hashlib.sha256(file.read(file.tensors[tensor])).hexdigest()[:12] == entry["gguf"][tensor][1]


def test_towers_and_drafts_are_left_out_and_told(tmp_path: Path) -> None:
    entry = golden()["gemma3 wrapped"]
    base = open_checkpoint(gguf_tiny.write_tiny(tmp_path / "base", entry))
    write_gguf(tmp_path / "t.gguf", [encode_key("tokenizer.ggml.tokens", ["x"] * gguf_tiny.VOCAB)], [])
    plan = plan_variants(base, tmp_path, ["F32"], tokenizer_from=open_gguf(tmp_path / "t.gguf"))
    assert set(plan.left_out) == {name for name in base.tensors if "vision" in name or "multi_modal" in name}
    assert len(plan.left_out) > 10


@pytest.mark.parametrize("name", ["qwen3 wrapped", "x"])
def test_model_types_of_no_row_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be written as GGUF here; known: .*glm4_moe.*gpt_oss"):
        architecture_of(name)
