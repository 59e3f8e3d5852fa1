"""A streamed model is the model: the same logits as transformers gives, to the last bit, one layer in memory at a time.

Both sides run the same transformers modules on equal float32 weights in equal batches, so nothing but equality will do.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import CheckpointError, MismatchError, MissingWeight, UnsupportedError
from recompile.io.memory import resident_bytes
from recompile.merge.overlay import build_overlay
from recompile.model.own_forward import Probe
from recompile.model.skeleton import build_skeleton
from recompile.model.stream import (
    LayeredModel,
    check_same_skeleton,
    dense_names,
    find_runner,
    find_stack,
    release_free_memory,
)
from tests import tiny

ARCHITECTURES = ("llama", "llama-tied", "llama-bias", "qwen2-moe", "qwen3-moe", "gemma2", "gemma3")


def meta_parameters(model: LayeredModel) -> set[str]:
    return {name for name, value in model.model.named_parameters(remove_duplicate=False) if value.is_meta}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("rows", "tokens", "batch"), [(5, 24, 2), (1, 7, 1), (3, 2, 3)])
def test_streamed_logits_are_those_of_transformers(architecture: str, rows: int, tokens: int, batch: int) -> None:
    directory, ids = tiny.base(architecture), tiny.rows(rows, tokens)
    wanted = tiny.plain_logits(tiny.plain_model(directory), ids, batch)
    found = tiny.streamed_logits(open_checkpoint(directory), ids, batch)
    assert torch.equal(found, wanted)
    assert wanted.std() > 1, "a model that predicts nothing would pass anything"


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen2-moe", "gemma2"])
def test_a_quantized_source_runs_as_its_decoded_copy_does(architecture: str, tmp_path: Path) -> None:
    directory, ids = tiny.variants(architecture, (3,))[3], tiny.rows(3, 24)
    checkpoint = open_checkpoint(directory)
    copy = tiny.dense_copy(checkpoint, tmp_path / "dense", directory)
    wanted = tiny.plain_logits(tiny.plain_model(copy), ids, 3)
    assert torch.equal(tiny.streamed_logits(checkpoint, ids, 3), wanted)
    assert not torch.equal(wanted, tiny.plain_logits(tiny.plain_model(tiny.base(architecture)), ids, 3))


def test_an_overlay_runs_as_its_decoded_copy_does(tmp_path: Path) -> None:
    found = tiny.variants("qwen2-moe", (3, 4))
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        f"sources: [{{id: 4, model_dir: '{found[4]}'}}]\n"
        "overrides: [{key: '*.shared_expert.*', source: 4}, {key: '*.experts.1.*', source: 4}]\n"
    )
    overlay, ids = build_overlay(open_checkpoint(found[3]), recipe), tiny.rows(2, 16)
    copy = tiny.dense_copy(overlay, tmp_path / "dense", found[3])
    logits = tiny.streamed_logits(overlay, ids, 2)
    assert torch.equal(logits, tiny.plain_logits(tiny.plain_model(copy), ids, 2))
    assert not torch.equal(logits, tiny.streamed_logits(open_checkpoint(found[3]), ids, 2))


def test_shards_and_dtypes_make_no_difference_to_what_is_loaded() -> None:
    ids = tiny.rows(2, 12)
    whole = tiny.streamed_logits(open_checkpoint(tiny.base("llama")), ids, 2)
    torn = tiny.streamed_logits(open_checkpoint(tiny.base("llama", shards=3)), ids, 2)
    assert torch.equal(whole, torn)
    wide = tiny.streamed_logits(open_checkpoint(tiny.base("llama", torch.float32)), ids, 2)
    plain = tiny.plain_logits(tiny.plain_model(tiny.base("llama", torch.float32)), ids, 2)
    assert torch.equal(wide, plain)
    assert not torch.equal(wide, whole), "float32 weights are not bfloat16 ones"


def test_a_head_of_its_own_beside_a_tied_embedding_is_used(tmp_path: Path) -> None:
    """Sources that quantize the head of a tied model store it; the overlay must then untie."""
    directory = tiny.copy_of(tiny.base("llama-tied"), tmp_path / "headed")
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)  # token t's logit stands at t + 1
    save_file(tensors, directory / "model.safetensors")
    ids = tiny.rows(2, 8)
    tied = tiny.streamed_logits(open_checkpoint(tiny.base("llama-tied")), ids, 2)
    headed = tiny.streamed_logits(build_overlay(open_checkpoint(directory), None), ids, 2)
    assert torch.equal(headed, tied.roll(1, -1))


@pytest.mark.parametrize("architecture", ["llama-tied", "qwen3-moe"])
def test_weights_are_there_for_the_block_only(architecture: str) -> None:
    model = LayeredModel.of(open_checkpoint(tiny.base(architecture)))
    every = {name for name, _ in model.model.named_parameters(remove_duplicate=False)}
    assert meta_parameters(model) == every
    with torch.inference_mode():
        state = torch.empty(0)
        for batch in model.embed(tiny.rows(2, 8), 1):
            state = batch
            here = every - meta_parameters(model)
            assert here == {"model.embed_tokens.weight"}
        assert meta_parameters(model) == every
        with model.layer(1):
            here = every - meta_parameters(model)
            assert here
            assert all(name.startswith("model.layers.1.") for name in here)
            assert {name for name in every if name.startswith("model.layers.1.")} == here
            model.run_layer(1, state)
        assert meta_parameters(model) == every
        with model.norm_loaded(), model.head_loaded():
            assert every - meta_parameters(model) == {"model.norm.weight", "lm_head.weight"}
    assert meta_parameters(model) == every


def test_weights_leave_when_the_block_fails() -> None:
    model = LayeredModel.of(open_checkpoint(tiny.base("llama-2")))
    with pytest.raises(ZeroDivisionError), model.layer(0):
        raise ZeroDivisionError
    assert all(value.is_meta for value in model.model.parameters())


def test_a_layer_replays_for_any_number_of_rows() -> None:
    """Calls are recorded with one row; masks, which sliding windows make real, must serve any batch."""
    model, ids = LayeredModel.of(open_checkpoint(tiny.base("gemma3"))), tiny.rows(4, 24)
    with torch.inference_mode():
        together = next(model.embed(ids, 4))
        with model.layer(0):
            whole = model.run_layer(0, together)
            single = torch.cat([model.run_layer(0, row) for row in together.split(1)])
    # one row and four go through differently shaped matrix products, whose sums may round in another order
    torch.testing.assert_close(single, whole, rtol=1e-5, atol=1e-5)


def test_logits_after_a_soft_cap_are_not_linear() -> None:
    for architecture, linear in (("llama", True), ("gemma2", False)):
        model = LayeredModel.of(open_checkpoint(tiny.base(architecture)))
        with torch.inference_mode(), model.head_loaded():
            hidden = torch.randn(1, 3, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
            assert model.head_is_linear(hidden) is linear
            assert (float(model.logits(50 * hidden).abs().max()) <= 6.0) is not linear  # the cap of tiny's gemma2


def test_names_of_layers_modules_and_parameters_agree() -> None:
    model = LayeredModel.of(open_checkpoint(tiny.base("qwen2-moe")))
    names = model.modules_of_layer(1)
    assert "model.layers.1.mlp.experts.3.gate_proj" in names
    assert len(names) == len(set(names))
    stored = {name for name in open_checkpoint(tiny.base("qwen2-moe")).modules if name.startswith("model.layers.1.")}
    assert set(names) == stored
    assert model.parameters_of("model.layers.1.mlp.experts.3.gate_proj") == ["model.layers.1.mlp.experts.gate_up_proj"]
    assert set(model.parameters_of("model.layers.1.self_attn.q_proj")) == {
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
    }


def test_dense_names_are_what_load_can_give() -> None:
    checkpoint = open_checkpoint(tiny.variants("llama-bias", (3,))[3])
    names = dense_names(checkpoint)
    assert set(names) == set(open_checkpoint(tiny.base("llama-bias")).tensors)
    assert all(checkpoint.has(name) and checkpoint.load(name).is_floating_point() for name in names)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.base("llama-2"), tmp_path / "damaged")


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(directory: Path, name: str, value: Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    save_file(tensors, directory / "model.safetensors")


def test_a_missing_parameter_is_named(damaged: Path) -> None:
    edit_tensors(damaged, "model.layers.1.self_attn.k_proj.weight", None)
    with pytest.raises(MissingWeight, match=r"damaged: holds nothing for 1 .*model\.layers\.1\.self_attn\.k_proj"):
        LayeredModel.of(open_checkpoint(damaged))


def test_a_missing_expert_is_not_passed_over(tmp_path: Path) -> None:
    directory = tiny.copy_of(tiny.base("qwen2-moe"), tmp_path / "damaged")
    edit_tensors(directory, "model.layers.1.mlp.experts.2.up_proj.weight", None)
    with pytest.raises(MissingWeight, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj .* it has 4 of .* 3 of "):
        LayeredModel.of(open_checkpoint(directory))  # before the long work starts


def test_a_missing_head_is_named(damaged: Path) -> None:
    edit_tensors(damaged, "lm_head.weight", None)
    with pytest.raises(MissingWeight, match=r"lm_head\.weight"):
        LayeredModel.of(open_checkpoint(damaged))


def test_a_wrong_shape_is_named(damaged: Path) -> None:
    edit_tensors(damaged, "model.layers.1.mlp.down_proj.weight", torch.zeros(64, 64))
    model = LayeredModel.of(open_checkpoint(damaged))
    with (
        pytest.raises(MismatchError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is \[64, 64\].*\[64, 128\]"),
        model.layer(1),
    ):
        pass
    assert all(value.is_meta for value in model.model.parameters())


@pytest.mark.parametrize("found", ["no-such-model", None, 3])
def test_an_unknown_model_type_is_named(damaged: Path, found: object) -> None:
    edit_config(damaged, model_type=found)
    with pytest.raises(CheckpointError, match=f"model_type {found!r}"):
        LayeredModel.of(open_checkpoint(damaged))


def test_a_config_that_transformers_refuses_is_one_error(damaged: Path) -> None:
    edit_config(damaged, num_attention_heads="many")
    with pytest.raises((CheckpointError, UnsupportedError), match=r"config\.json"):
        LayeredModel.of(open_checkpoint(damaged))


def test_a_model_without_a_stack_of_layers_is_refused(damaged: Path) -> None:
    edit_config(damaged, model_type="bert")
    with pytest.raises((UnsupportedError, MissingWeight)):
        LayeredModel.of(open_checkpoint(damaged))


def test_nan_weights_are_named(damaged: Path) -> None:
    edit_tensors(damaged, "model.layers.0.mlp.up_proj.weight", torch.full((128, 64), float("nan")))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds 8192 NaN"):
        tiny.streamed_logits(open_checkpoint(damaged), tiny.rows(1, 4), 1)


def test_models_of_other_sizes_are_told_apart() -> None:
    four, two = (LayeredModel.of(open_checkpoint(tiny.base(name))) for name in ("llama", "llama-2"))
    with pytest.raises(MismatchError, match="layers 2 against 4"):
        check_same_skeleton(four, two)
    check_same_skeleton(four, LayeredModel.of(open_checkpoint(tiny.base("llama-bias"))))


def test_the_heap_is_asked_for_tensors_of_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("recompile.io.memory.glibc", lambda: asked.append(1))
    release_free_memory(torch.device("cuda:0"))
    assert not asked, "it takes milliseconds, and holds nothing of a GPU's"
    release_free_memory(torch.device("cpu"))
    assert asked


def test_a_start_takes_no_memory_and_no_product_of_the_size_of_weights() -> None:
    """What a model's own forward does is found on zeros: 192 GiB a layer here, more than machines have."""
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 1024, "vocab_size": 512,
        "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 2**16, "num_experts_per_tok": 2,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    }  # fmt: skip
    before = resident_bytes()
    model = build_skeleton(config, torch.float32, torch.device("cpu"))
    name, layers = find_stack(model)
    assert sum(parameter.nbytes for parameter in layers[0].parameters()) > 2**37
    found = Probe(model, find_runner(model, name), list(layers), name, torch.device("cpu"), "it").run()
    assert found.ran == (0, 1)
    assert found.head == ("lm_head.weight",)
    assert resident_bytes() - before < 2**29
