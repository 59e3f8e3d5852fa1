"""What modules are for, told by the model that transformers makes of the config; names as checkpoints have them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from recompile.checkpoint.checkpoint import StoredModule, TensorInfo
from recompile.checkpoint.module_names import ROLES_NAME, Dense, Role, dump_roles, read_roles, role_of
from recompile.errors import CheckpointError, UnsupportedError
from recompile.formats.compressed_tensors import Targets, merged_config, named_for_loaders
from recompile.merge.left_dense import left_dense
from recompile.model.roles import loader_model, roles_of
from recompile.model.skeleton import find_stack
from tests.conftest import load_script

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip


def source_of(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], packed: frozenset[str] = frozenset()) -> Any:
    """A checkpoint of tensors that nobody stored, `packed` quantized to half a byte a weight."""
    modules = {}
    for tensor, shape in shapes.items():
        name, _, part = tensor.rpartition(".")
        key = name if part in ("weight", "bias") else tensor
        info = TensorInfo(tensor, "BF16", shape, Path("none"), 0, 2)
        modules[key] = StoredModule(
            key, {part if key == name else "": info}, shape if part == "weight" else None,
            "pack-quantized" if key in packed else "dense",
        )  # fmt: skip
    return SimpleNamespace(config=config, modules=modules)


LAYER = "model.layers.1"
CASES: dict[str, tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]] = {
    "granitemoe": (
        {"model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2},
        {
            f"{LAYER}.block_sparse_moe.router.layer.weight": ((8, 32), "text router"),
            f"{LAYER}.block_sparse_moe.input_linear.weight": ((8, 96, 32), "text linear"),
            f"{LAYER}.self_attn.q_proj.weight": ((32, 32), "text linear"),
            f"{LAYER}.input_layernorm.weight": ((32,), "text vector"),
            "model.embed_tokens.weight": ((64, 32), "text embedding"),
        },
    ),
    "jetmoe": (
        {
            "model_type": "jetmoe", "num_local_experts": 8, "num_experts_per_tok": 2, "kv_channels": 8,
            "num_attention_heads": None,
        },
        {
            f"{LAYER}.mlp.router.layer.weight": ((8, 32), "text router"),
            f"{LAYER}.mlp.experts.3.gate_proj.weight": ((48, 32), "text linear"),
            f"{LAYER}.mlp.experts.3.down_proj.weight": ((32, 48), "text linear"),
            f"{LAYER}.self_attention.kv_proj.weight": ((32, 32), "text linear"),
        },
    ),
    "hunyuan_v1_moe": (
        {"model_type": "hunyuan_v1_moe", "num_experts": 8, "moe_topk": 2, "head_dim": 8},
        {
            f"{LAYER}.mlp.gate.wg.weight": ((8, 32), "text router"),
            f"{LAYER}.mlp.experts.7.up_proj.weight": ((48, 32), "text linear"),
            f"{LAYER}.mlp.shared_mlp.up_proj.weight": ((48, 32), "text linear"),
        },
    ),
    "deepseek_v32": (
        {
            "model_type": "deepseek_v32", **LATENT, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 6,
            "mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4,
        },
        {
            f"{LAYER}.self_attn.indexer.weights_proj.weight": ((6, 32), "text gate"),
            f"{LAYER}.self_attn.indexer.wk.weight": ((16, 32), "text linear"),
            f"{LAYER}.self_attn.indexer.wq_b.weight": ((96, 24), "text linear"),
            f"{LAYER}.mlp.gate.weight": ((8, 32), "text router"),
            f"{LAYER}.mlp.gate.e_score_correction_bias": ((8,), "text vector"),
            f"{LAYER}.mlp.shared_experts.up_proj.weight": ((24, 32), "text linear"),
            # the layer after the last one predicts a second token; the loader leaves it out
            "model.layers.2.eh_proj.weight": ((32, 64), "mtp projection"),
            "model.layers.2.enorm.weight": ((32,), "mtp vector"),
            "model.layers.2.embed_tokens.weight": ((64, 32), "mtp embedding"),
            "model.layers.2.shared_head.head.weight": ((64, 32), "mtp embedding"),
            "model.layers.2.mlp.gate.weight": ((8, 32), "mtp router"),
            "model.layers.2.mlp.shared_experts.up_proj.weight": ((24, 32), "mtp linear"),
        },
    ),
    "qwen3_next": (
        {
            "model_type": "qwen3_next", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
            "head_dim": 8, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
            "layer_types": ["full_attention", "linear_attention"],
        },
        {
            f"{LAYER}.linear_attn.in_proj_ba.weight": ((8, 32), "text gate"),
            f"{LAYER}.linear_attn.in_proj_qkvz.weight": ((96, 32), "text linear"),
            f"{LAYER}.linear_attn.conv1d.weight": ((64, 1, 4), "text convolution"),
            f"{LAYER}.linear_attn.A_log": ((4,), "text vector"),
            f"{LAYER}.mlp.shared_expert_gate.weight": ((1, 32), "text gate"),
            f"{LAYER}.mlp.gate.weight": ((8, 32), "text router"),
            f"{LAYER}.mlp.experts.0.up_proj.weight": ((24, 32), "text linear"),
            "mtp.layers.0.mlp.experts.0.up_proj.weight": ((24, 32), "mtp linear"),
            "mtp.fc.weight": ((32, 64), "mtp projection"),
            "mtp.norm.weight": ((32,), "mtp vector"),
        },
    ),
    "gpt_oss": (
        {"model_type": "gpt_oss", "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
        {
            f"{LAYER}.mlp.router.weight": ((8, 32), "text router"),
            f"{LAYER}.mlp.experts.gate_up_proj": ((8, 32, 96), "text linear"),
            f"{LAYER}.mlp.experts.gate_up_proj_bias": ((8, 96), "text vector"),
            f"{LAYER}.self_attn.sinks": ((4,), "text vector"),
        },
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
        {
            "transformer.h.1.attn.c_attn.weight": ((32, 96), "text linear"),
            "transformer.wpe.weight": ((16, 32), "text embedding"),
        },
    ),
    "gemma3": (
        {
            "model_type": "gemma3", "text_config": {**SMALL, "model_type": "gemma3_text", "head_dim": 8},
            "vision_config": VISION, "mm_tokens_per_image": 4,
        },
        {
            "language_model.model.layers.1.self_attn.q_proj.weight": ((32, 32), "text linear"),
            "language_model.model.embed_tokens.weight": ((64, 32), "text embedding"),
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": ((16, 16), "tower linear"),
            "vision_tower.vision_model.embeddings.patch_embedding.weight": ((16, 3, 8, 8), "tower convolution"),
            "multi_modal_projector.mm_input_projection_weight": ((16, 32), "tower parameter"),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_roles(name: str) -> None:
    config, tensors = CASES[name]
    found = roles_of(source_of({**SMALL, **config}, {tensor: shape for tensor, (shape, _) in tensors.items()}))
    assert {module: f"{role.part} {role.kind}" for module, role in found.items()} == {
        tensor.removesuffix(".weight"): role for tensor, (_, role) in tensors.items()
    }


def test_a_map_of_an_mtp_layer_is_like_the_last_layers() -> None:
    config, tensors = CASES["deepseek_v32"]
    found = roles_of(source_of({**SMALL, **config}, {tensor: shape for tensor, (shape, _) in tensors.items()}))
    assert found["model.layers.2.mlp.shared_experts.up_proj"].like == "model.layers.1.mlp.shared_experts.up_proj"
    assert found["model.layers.2.eh_proj"].like is None


def test_an_architecture_that_transformers_does_not_know() -> None:
    shapes = {"model.layers.0.mlp.gate.weight": (8, 32), "model.layers.0.mlp.up_proj.weight": (48, 32)}
    found = roles_of(source_of({"model_type": "not_there"}, shapes))
    assert [role.kind for role in found.values()] == ["router", "linear"]


@pytest.mark.parametrize(
    ("dense", "role", "why"),
    [
        (Dense(), Role("text", "linear", "a"), None),
        (Dense(), Role("text", "router", "a"), "router"),
        (Dense(), Role("mtp", "linear", "a"), None),
        (Dense(), Role("mtp", "router", "a"), "mtp router"),
        (Dense(mtp="keep"), Role("mtp", "linear", "a"), "mtp"),
        (Dense(), Role("tower", "linear", "a"), "tower"),
        (Dense(tower="quantize"), Role("tower", "linear", "a"), None),
        (Dense(keep=("*.q_proj",)), Role("text", "linear", "a"), "keep"),
        (Dense(quantize=("*.q_proj",)), Role("tower", "linear", "a"), None),
        (Dense(keep=("*",), quantize=("*",)), Role("text", "linear", "a"), "keep"),
    ],
)
def test_what_stays_dense(dense: Dense, role: Role, why: str | None) -> None:
    assert dense.why_dense("model.layers.0.self_attn.q_proj", role, (4, 4)) == why


def test_configs_name_modules_as_loaders_do() -> None:
    """Gemma 3 is stored as language_model.model.layers.*, and the module is model.language_model.layers.*."""
    config, tensors = CASES["gemma3"]
    source = source_of(config, {tensor: shape for tensor, (shape, _) in tensors.items()})
    roles = roles_of(source)
    stored = "language_model.model.layers.1.self_attn.q_proj"
    tower = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    group = {"weights": {"num_bits": 4}}
    made = named_for_loaders(
        merged_config({}, [(stored, group)], [tower], [*source.modules]), {n: r.loader for n, r in roles.items()}
    )
    assert Targets(made).group_of(stored) is not None
    assert Targets(made).group_of("model.language_model.layers.1.self_attn.q_proj") is not None
    assert Targets(made).group_of(roles[tower].loader) is None
    assert {tower, roles[tower].loader} <= set(made["ignore"])


def test_what_is_left_dense_is_counted_by_role() -> None:
    config, tensors = CASES["deepseek_v32"]
    packed = frozenset(t.removesuffix(".weight") for t, (_, role) in tensors.items() if role == "text linear")
    shapes = {tensor: shape for tensor, (shape, _) in tensors.items()}
    found = left_dense(source_of({**SMALL, **config}, shapes, packed))
    weights = {"mtp": 32 * 64 + 32 + 2 * 64 * 32 + 8 * 32 + 24 * 32, "router": 8 * 32, "gate": 6 * 32, "vector": 8}
    assert {kind: count for kind, count, _ in found.kinds} == weights
    total = sum(weights.values()) + (16 * 32 + 96 * 24 + 24 * 32)
    assert found.share == pytest.approx(sum(weights.values()) / total)
    assert str(found).startswith(f"left dense: {100 * found.share:.1f} % of the weights: mtp ")
    assert "router 2" in str(found)


@pytest.mark.parametrize("name", CASES)
def test_a_variant_keeps_the_roles(name: str, tmp_path: Path) -> None:
    config, tensors = CASES[name]
    found = roles_of(source_of({**SMALL, **config}, {tensor: shape for tensor, (shape, _) in tensors.items()}))
    (tmp_path / ROLES_NAME).write_text(dump_roles(found))
    kept = read_roles(tmp_path, found)
    assert kept is not None
    assert {module: (r.part, r.kind, r.loader) for module, r in kept.items()} == {
        module: (r.part, r.kind, r.loader) for module, r in found.items()
    }
    assert read_roles(tmp_path, [*found, "of.another.model"]) is None
    (tmp_path / ROLES_NAME).write_text('{"version": 1, "kinds": []}')
    with pytest.raises(CheckpointError, match="not a list of roles"):
        read_roles(tmp_path, found)


@pytest.mark.parametrize(
    ("name", "role"),
    [("lm_head", "head"), ("head", "head"), ("embed", "embedding"), ("model.language_model.lm_head", "head"),
     ("vision_tower.head", "layer"), ("model.layers.0.mlp.head", "layer"), ("model.audio.embed", "layer"),
     ("vision_model.encoder.layer.0.attention.output", "layer"), ("output", "head")],
)  # fmt: skip
def test_head_and_embedding_by_name(name: str, role: str) -> None:
    """`head` and `embed` alone are DeepSeek-V4's own; inside something they are another thing."""
    assert role_of(name) == role


@pytest.mark.parametrize(
    ("model_type", "module", "part", "kind"),
    [
        ("longcat_flash", "model.layers.0.mlp.router.classifier", "text", "router"),  # of experts that are none, too
        ("longcat_flash", "model.layers.0.mlp.experts.gate_up_proj", "text", "linear"),
        ("phi4_multimodal", "model.layers.0.mlp.gate_up_proj", "text", "linear"),
        ("phi4_multimodal", "model.embed_tokens_extend.image_embed.img_projection_down", "tower", "linear"),
    ],
)
def test_towers_and_idle_experts_of_the_text_model(model_type: str, module: str, part: str, kind: str) -> None:
    config = load_script("tiny_configs").tiny_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if "bias" not in name}
    role = roles_of(source_of(config.to_dict(), shapes))[module]
    assert (role.part, role.kind) == (part, kind)
    assert find_stack(model)[0] == "model.layers"


def test_a_type_without_a_model_that_makes_text_is_told_at_once() -> None:
    """transformers' own message names every class that there is, and imports them all to that end."""
    with pytest.raises(UnsupportedError, match="it has no model that makes text for model_type 't5'"):
        loader_model('{"model_type": "t5"}')
