"""Experts that a checkpoint keeps in one tensor: seen, quantized, merged and run one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.checkpoint.module_names import Dense
from recompile.merge.check import loaders_that_fail
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.verify import verify
from recompile.merge.write_safetensors import execute
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.pipeline import BuildOptions, quantize_model
from tests import tiny

EXPERTS, HIDDEN, INNER = 4, 64, 32
COMMON = {
    "vocab_size": tiny.VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"head_dim": 16, "sliding_window": 8},  # [experts, in, out], gate and up in turn, biases
    "llama4_text": {  # [experts, in, out], gate before up, one product over all experts
        "head_dim": 16, "intermediate_size_mlp": 64, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
    },
    "granitemoe": {},  # [experts, out, in] in modules of their own names
    "dbrx": {  # [experts x inner, hidden], the rows of all experts one below another
        "d_model": HIDDEN, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": 2,
                       "ffn_act_fn": {"name": "silu"}},
    },
}  # fmt: skip
NAMES = {
    "gpt_oss": "model.layers.0.mlp.experts.{}.gate_proj",
    "llama4_text": "model.layers.0.feed_forward.experts.{}.gate_proj",
    "granitemoe": "model.layers.0.block_sparse_moe.experts.{}.w1",
    "dbrx": "transformer.blocks.0.ffn.experts.{}.gate_proj",
}
IDS = tiny.rows(2, 12)


def make(model_type: str, out: Path) -> Any:
    """A tiny random model, also written to `out`."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**COMMON, **CASES[model_type]})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if parameter.dim() > 1 else 0.5))
    model.save_pretrained(out)
    return model


def logits_of(checkpoint: Checkpoint) -> Tensor:
    return tiny.streamed_logits(checkpoint, IDS, len(IDS))


def experts_of(model: Any, layer: int) -> Any:
    return next(
        module
        for name, module in model.named_modules()
        if f".{layer}." in name
        and name.endswith(("experts", "experts.mlp"))
        and len(list(module.parameters(False))) > 1
    )


def put_expert(block: Any, expert: int, gate: Tensor, up: Tensor, down: Tensor) -> None:
    """Write an expert's matrices, [out, in], into transformers' module, by what its forward does with them."""
    kind = type(block).__name__
    if kind == "DbrxExpertGLU":
        for parameter, matrix in ((block.w1, gate), (block.v1, up), (block.w2, down.T)):
            parameter.data.unflatten(0, (EXPERTS, -1))[expert] = matrix
        return
    if kind == "GptOssExperts":
        block.gate_up_proj.data[expert, :, 0::2], block.gate_up_proj.data[expert, :, 1::2] = gate.T, up.T
        block.down_proj.data[expert] = down.T
    elif kind == "Llama4TextExperts":
        block.gate_up_proj.data[expert] = torch.cat([gate.T, up.T], 1)
        block.down_proj.data[expert] = down.T
    else:
        block.gate_up_proj.data[expert] = torch.cat([gate, up])
        block.down_proj.data[expert] = down


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """Model type, model, and a directory with base, 4bpw and 8bpw."""
    work = tmp_path_factory.mktemp(request.param)
    model = make(request.param, work / "base")
    for _ in quantize_model(open_checkpoint(work / "base"), work, IntEncoder((4, 8), 32), IDS):
        pass
    return request.param, model, work


def test_a_fused_checkpoint_runs_expert_by_expert(made: tuple[str, Any, Path]) -> None:
    name, model, work = made
    base = open_checkpoint(work / "base")
    assert base.modules[NAMES[name].format(3)].shape == (INNER, HIDDEN)
    with torch.no_grad():
        assert torch.allclose(logits_of(base), model(IDS).logits, atol=1e-5)
    assert base.whole.modules.keys() != base.modules.keys()
    assert logits_of(base.whole).equal(logits_of(base))


def test_every_slice_is_quantized_and_decodes_to_what_it_stood_for(made: tuple[str, Any, Path]) -> None:
    name, model, work = made
    variant = open_checkpoint(work / "4bpw")
    for expert in range(EXPERTS):
        assert variant.modules[NAMES[name].format(expert)].is_quantized
    router = next(n for n in variant.modules if n.endswith(("router", "router.layer")))
    assert not variant.modules[router].is_quantized
    import copy

    theirs = copy.deepcopy(model)
    leaves = ("w1", "w3", "w2") if name == "granitemoe" else ("gate_proj", "up_proj", "down_proj")
    with torch.no_grad():
        for layer in range(2):
            for expert in range(EXPERTS):
                where = NAMES[name].replace("s.0", f"s.{layer}").format(expert).rpartition(".")[0]
                parts = [variant.load(f"{where}.{leaf}.weight") for leaf in leaves]
                put_expert(experts_of(theirs, layer), expert, *parts)
        for module in variant.modules.values():
            if module.is_quantized and ".experts." not in module.name:
                theirs.get_submodule(module.name).weight.copy_(variant.load(f"{module.name}.weight"))
        assert torch.allclose(logits_of(variant), theirs(IDS).logits, atol=1e-5)
        assert not torch.allclose(logits_of(variant), model(IDS).logits, atol=1e-2)


def test_a_mix_of_experts_has_the_bytes_of_its_sources(made: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, _, work = made
    key = NAMES[name].format(1)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"sources: [{{id: 8, model_dir: {work / '8bpw'}}}]\noverrides: [{{key: '{key}.*', source: 8}}]\n")
    mix = build_overlay(open_checkpoint(work / "4bpw"), recipe)
    for _ in execute(plan_write(mix, tmp_path / "mix")):
        pass
    assert verify(tmp_path / "mix").ok
    written = open_checkpoint(tmp_path / "mix")
    assert written.load(f"{key}.weight").equal(open_checkpoint(work / "8bpw").load(f"{key}.weight"))
    assert logits_of(written).equal(logits_of(mix))  # type: ignore[arg-type]


def test_experts_that_stay_dense_stay_in_one_tensor(made: tuple[str, Any, Path], tmp_path: Path) -> None:
    """So that loaders which know no experts of their own still load the model."""
    _, _, work = made
    base = open_checkpoint(work / "base")
    for _ in quantize_model(
        base, tmp_path, IntEncoder((4,), 32), IDS, BuildOptions(dense=Dense(keep=("*.experts.*",)))
    ):
        pass
    kept = load_file(tmp_path / "4bpw" / "model.safetensors")
    for name, value in load_file(work / "base" / "model.safetensors").items():
        if name in base.fused:
            assert kept[name].equal(value)
    for _ in execute(plan_write(build_overlay(base, None), tmp_path / "copy")):
        pass
    assert verify(tmp_path / "copy").ok
    assert open_checkpoint(tmp_path / "copy").fingerprint == base.fingerprint


def test_loaders_that_would_leave_experts_random_are_told(made: tuple[str, Any, Path]) -> None:
    """transformers makes a list of Llama 4's experts before it loads packed ones; others it knows fused only."""
    name, _, work = made
    told = [problem for problem in loaders_that_fail(work / "4bpw") if "transformers does not run this" in str(problem)]
    assert all(problem.severity == "warning" for problem in told)
    assert [NAMES[name].format(0).rpartition(".")[0] in str(problem) for problem in told] == (
        [] if name == "llama4_text" else [True]
    )
    assert loaders_that_fail(work / "base") == []


def test_calibration_counts_what_every_expert_saw(made: tuple[str, Any, Path]) -> None:
    """GPTQ's error on the calibration rows is below that of plain rounding, for experts as well."""
    import json

    name, _, work = made
    report = json.loads((work / "4bpw" / "quantize_report.json").read_text())["variant"]["modules"]
    seen = {entry["module"]: entry["tokens"] for entry in report if ".experts." in entry["module"]}
    assert sum(seen.values()) > 0
    per_layer = sum(tokens for module, tokens in seen.items() if ".0." in module.partition(".experts.")[0])
    per_token = 3 * (EXPERTS if name == "llama4_text" else 2)  # projections x experts that a token reaches
    assert per_layer == IDS.numel() * per_token


def dense_copy(source: Checkpoint, out: Path) -> Any:
    """The decoded copy of a variant, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    for _ in execute(plan_write(build_overlay(source, None), out, dense=True)):
        pass
    assert verify(out).ok
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_a_decoded_copy_has_the_tensors_of_the_base_and_runs_in_transformers(
    made: tuple[str, Any, Path], tmp_path: Path
) -> None:
    _, _, work = made
    variant = open_checkpoint(work / "4bpw")
    model = dense_copy(variant, tmp_path / "dense")
    stored = {name: value.shape for name, value in load_file(tmp_path / "dense" / "model.safetensors").items()}
    assert stored == {n: value.shape for n, value in load_file(work / "base" / "model.safetensors").items()}
    with torch.no_grad():  # 16-bit floats hold a decoded weight of 4 bits to 2^-11 of it
        wanted = logits_of(open_checkpoint(tmp_path / "dense"))
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-5)
        assert float((wanted - logits_of(variant)).abs().max()) < 0.05 * float(wanted.std())


def test_a_decoded_mix_takes_every_expert_from_its_own_source(made: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, _, work = made
    key = NAMES[name].format(1)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(f"sources: [{{id: 8, model_dir: {work / '8bpw'}}}]\noverrides: [{{key: '{key}.*', source: 8}}]\n")
    mix = build_overlay(open_checkpoint(work / "4bpw"), recipe)
    for _ in execute(plan_write(mix, tmp_path / "dense", dense=True)):
        pass
    written = open_checkpoint(tmp_path / "dense")
    for expert, source in enumerate(("4bpw", "8bpw", "4bpw")):
        wanted = open_checkpoint(work / source).load(f"{NAMES[name].format(expert)}.weight")
        assert torch.allclose(written.load(f"{NAMES[name].format(expert)}.weight").float(), wanted, rtol=2**-8)


def test_a_decoded_copy_of_a_multimodal_model_has_experts_turned_as_stored(tmp_path: Path) -> None:
    """Qwen3-VL-MoE stores [experts, in, out] and runs [experts, out, in]; layers keep the prefix of the base."""
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    text = {**COMMON, "num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 16, "intermediate_size": 64}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": HIDDEN,
              "patch_size": 4, "spatial_merge_size": 2, "deepstack_visual_indexes": [0]}  # fmt: skip
    torch.manual_seed(0)
    config = CONFIG_MAPPING["qwen3_vl_moe"](text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    stored = load_file(tmp_path / "base" / "model.safetensors")
    for _ in quantize_model(open_checkpoint(tmp_path / "base"), tmp_path, IntEncoder((8,), 32), IDS):
        pass
    mix = build_overlay(open_checkpoint(tmp_path / "8bpw"), None)
    for _ in execute(plan_write(mix, tmp_path / "dense", dense=True)):
        pass
    assert verify(tmp_path / "dense").ok
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert {name: value.shape for name, value in written.items()} == {n: value.shape for n, value in stored.items()}
    for name in stored:
        if ".experts." in name:
            assert float((written[name].float() - stored[name]).norm()) < 0.02 * float(stored[name].norm())
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
