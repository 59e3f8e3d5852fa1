"""HF directory -> GGUF variants: values, keys, fallbacks reported, importance, resuming, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from recompile.cli.model_quantize import main
from recompile.errors import CheckpointError, FormatError, MismatchError, OutputError, UnsupportedError
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from recompile.quantize.gguf import (
    Calibrated,
    Importance,
    TensorDone,
    VariantsReport,
    collect_importance,
    find_preset,
    plan_variants,
)
from recompile.quantize.gguf_build import build_variants
from tests import tiny
from tests.gguf_models import VOCAB, write_model

pytest.importorskip("libgguf")
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "gemma2", "gemma3_text")


def write_hf(
    folder: Path,
    model_type: str,
    *,
    hidden: int = 64,
    inner: int = 96,
    layers: int = 2,
    tied: bool | None = None,
    vocab: int = VOCAB,
) -> Path:
    """A random model of transformers' own making, with every feature of its architecture."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields: dict[str, object] = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": hidden // 4, "vocab_size": vocab, "max_position_embeddings": 128,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": 16, "query_pre_attn_scalar": hidden // 4, "rope_theta": 50000.0, "norm_topk_prob": True,
        "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if "moe" not in model_type:
        fields = {key: value for key, value in fields.items() if "expert" not in key and "moe" not in key}
    if model_type == "qwen2_moe":
        fields["norm_topk_prob"] = False  # as in the released models; the engine knows no other
    if tied is not None:
        fields["tie_word_embeddings"] = tied
    if model_type == "mistral":
        fields["sliding_window"] = None
    torch.manual_seed(3)
    config = CONFIG_MAPPING[model_type](**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.1)
    model.save_pretrained(folder)
    return folder


def tokenizer_file(path: Path, tokens: int = VOCAB) -> Path:
    write_gguf(
        path, [encode_key("tokenizer.ggml.model", "gpt2"), encode_key("tokenizer.ggml.tokens", ["x"] * tokens)], []
    )
    return path


def build(base: Path, out: Path, names: list[str], importance: Importance | None = None) -> VariantsReport:
    keys = open_gguf(tokenizer_file(base.parent / "tokens.gguf"))
    plan = plan_variants(open_checkpoint(base), out, names, tokenizer_from=keys, importance=importance)
    *steps, report = list(build_variants(plan))
    assert isinstance(report, VariantsReport)
    assert all(isinstance(step, TensorDone) for step in steps)
    return report


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    return tiny.streamed_logits(checkpoint, torch.arange(24).reshape(1, 24) % VOCAB)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_float_file_is_the_same_model(model_type: str, tmp_path: Path) -> None:
    """Names, row order, norms, experts and the config from the keys: the file alone gives the same logits."""
    base = write_hf(tmp_path / "hf", model_type)
    build(base, tmp_path, ["F32"])
    made, source = open_checkpoint(tmp_path / "hf-F32.gguf"), open_checkpoint(base)
    assert isinstance(made, GgufCheckpoint)
    for name in source.tensors:
        if name in made.tensors:
            have, want = made.load(name), source.load(name)
            off = 2e-7 if "norm" in name and model_type.startswith("gemma") else 0.0  # of adding one and taking it off
            assert torch.allclose(have, want, rtol=0, atol=off), name
    assert torch.allclose(logits(made), logits(source), atol=2e-4)
    assert made.file.value("tokenizer.ggml.tokens") == ["x"] * VOCAB


def test_llama3_rope_goes_there_and_back(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "hf", "llama")
    config = json.loads((base / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 500000.0, "max_position_embeddings": 131072}
    config["rope_scaling"] = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    build(base, tmp_path, ["F32"])
    made = open_checkpoint(tmp_path / "hf-F32.gguf")
    assert made.config["rope_scaling"] == config["rope_scaling"]
    assert torch.allclose(logits(made), logits(open_checkpoint(base)), atol=2e-4)


def test_types_and_what_they_fall_back_to(tmp_path: Path) -> None:
    """Rows of 64 and 256: K types fit only ffn_down, and the report says so."""
    base = write_hf(tmp_path / "hf", "llama", inner=256)
    report = build(base, tmp_path, ["Q4_K", "Q8_0"])
    file = open_gguf(tmp_path / "hf-Q4_K.gguf")
    assert file.tensors["blk.0.ffn_down.weight"].type.name == "Q4_K"
    assert file.tensors["blk.0.attn_q.weight"].type.name == "Q5_0"
    assert file.tensors["blk.0.attn_norm.weight"].type.name == "F32"
    assert file.value("general.file_type") == 14
    noted = {made.tensor: made for made in report.noted("Q4_K")}
    assert (noted["blk.0.attn_q.weight"].asked, noted["blk.0.attn_q.weight"].got) == ("Q4_K", "Q5_0")
    assert "its rows are 64" in noted["blk.0.attn_q.weight"].note
    assert "blk.0.ffn_down.weight" not in noted
    assert report.noted("Q8_0") == []
    made = {entry.tensor: entry for entry in report.tensors["Q8_0"]}
    assert made["blk.1.ffn_up.weight"].bits == 8.5
    assert 0 < made["blk.1.ffn_up.weight"].relative_error < 0.01
    source = open_checkpoint(base).load("model.layers.1.mlp.up_proj.weight")
    have = open_checkpoint(tmp_path / "hf-Q8_0.gguf").load("model.layers.1.mlp.up_proj.weight")
    assert float((have - source).norm() / source.norm()) == pytest.approx(made["blk.1.ffn_up.weight"].relative_error)


def test_experts_are_encoded_with_their_own_importance(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "hf", "qwen3_moe")
    checkpoint = open_checkpoint(base)
    rows = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    *steps, importance = collect_importance(checkpoint, rows)
    assert isinstance(importance, Importance)
    assert [step.done for step in steps if isinstance(step, Calibrated)] == [1, 2]
    assert importance.values["model.layers.0.mlp.experts.1.down_proj"].shape == (32,)
    assert importance.values["lm_head"].shape == (64,)
    report = build(base, tmp_path, ["Q4_0"], importance)
    plain = build(base, tmp_path / "plain", ["Q4_0"])
    with_importance, without = open_gguf(tmp_path / "hf-Q4_0.gguf"), open_gguf(tmp_path / "plain" / "hf-Q4_0.gguf")
    name = "blk.1.ffn_up_exps.weight"
    assert with_importance.tensors[name].ne == (64, 32, 4)
    assert with_importance.read(name) != without.read(name)
    assert all("no calibration token" not in made.note for made in plain.tensors["Q4_0"])
    assert {made.tensor for made in report.noted("Q4_0")} <= {made.tensor for made in report.tensors["Q4_0"]}


def test_importance_is_the_mean_square_of_inputs(tmp_path: Path) -> None:
    """Against a hook on transformers' own module."""
    base = write_hf(tmp_path / "hf", "llama")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    ids = torch.arange(30).reshape(2, 15) % VOCAB
    with torch.no_grad():
        model(ids)
    *_, found = collect_importance(open_checkpoint(base), ids)
    assert isinstance(found, Importance)
    have = found.values["model.layers.1.mlp.down_proj"]
    want = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).square().mean(0)
    assert torch.allclose(have, want, rtol=1e-3)


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "hf", "llama")
    keys = open_gguf(tokenizer_file(tmp_path / "tokens.gguf"))
    whole = plan_variants(open_checkpoint(base), tmp_path / "a", ["Q4_0", "Q8_0"], tokenizer_from=keys)
    want = list(build_variants(whole))[-1]
    plan = plan_variants(open_checkpoint(base), tmp_path / "b", ["Q4_0", "Q8_0"], tokenizer_from=keys)
    steps = build_variants(plan)
    for _ in range(5):
        next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert len(list((tmp_path / "b").glob("*.building"))) == 2
    have = list(build_variants(plan))[-1]
    for name in ("hf-Q4_0.gguf", "hf-Q8_0.gguf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert isinstance(want, VariantsReport)
    assert isinstance(have, VariantsReport)
    assert want.tensors == have.tensors
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["hf-Q4_0.gguf", "hf-Q8_0.gguf"]


@pytest.mark.parametrize("named", [0, 1, 2])
def test_killed_while_its_files_get_their_names_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: int
) -> None:
    base = write_hf(tmp_path / "hf", "llama")
    keys = open_gguf(tokenizer_file(tmp_path / "tokens.gguf"))

    def built(folder: str) -> list[object]:
        plan = plan_variants(open_checkpoint(base), tmp_path / folder, ["Q4_0", "Q8_0"], tokenizer_from=keys)
        return list(build_variants(plan))

    *_, want = built("a")
    real, count = os.replace, 0

    def replace(source: Path, target: Path) -> None:
        nonlocal count
        if count == named:
            raise KeyboardInterrupt
        count += 1
        real(source, target)

    def unlink(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        patched.setattr(Path, "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            built("b")
    *_, have = built("b")
    assert isinstance(want, VariantsReport)
    assert isinstance(have, VariantsReport)
    assert want.tensors == have.tensors
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["hf-Q4_0.gguf", "hf-Q8_0.gguf"]
    for name in ("hf-Q4_0.gguf", "hf-Q8_0.gguf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(OutputError, match="exists; remove it or choose another"):
        built("b")


def test_a_gguf_base_keeps_its_keys(tmp_path: Path) -> None:
    base = write_model(tmp_path / "m.gguf", kind="F32")
    plan = plan_variants(open_checkpoint(base), tmp_path / "out", ["Q8_0"])
    list(build_variants(plan))
    made, source = open_gguf(tmp_path / "out" / "m-Q8_0.gguf"), open_gguf(base)
    assert all(made.record(key) == source.record(key) for key in source.keys if key != "general.file_type")
    assert made.tensors["blk.0.attn_k.weight"].type.name == "Q8_0"
    want = open_checkpoint(base).load("model.layers.0.self_attn.k_proj.weight")
    have = open_checkpoint(made.path).load("model.layers.0.self_attn.k_proj.weight")
    assert float((have - want).norm() / want.norm()) < 0.01


def test_presets() -> None:
    medium = find_preset("q4_k_m")
    kinds = [medium.wanted(f"blk.{layer}.attn_v.weight", 16, True) for layer in range(16)]
    assert kinds[:2] == kinds[14:] == ["Q6_K", "Q6_K"]  # the first and the last eighth
    assert kinds.count("Q6_K") == 8
    assert medium.wanted("blk.3.attn_q.weight", 16, True) == "Q4_K"
    assert medium.wanted("token_embd.weight", 16, True) == "Q6_K"
    assert medium.wanted("token_embd.weight", 16, False) == "Q4_K"
    assert find_preset("Q8_0").head == "Q8_0"
    assert find_preset("iq4_kss").default == "IQ4_KSS"
    with pytest.raises(FormatError, match="did you mean Q4_K"):
        find_preset("Q4K")


def test_what_is_refused(tmp_path: Path) -> None:
    base = open_checkpoint(write_hf(tmp_path / "hf", "llama"))
    with pytest.raises(CheckpointError, match="tokenizer_from"):
        plan_variants(base, tmp_path, ["Q8_0"])
    wrong = open_gguf(tokenizer_file(tmp_path / "wrong.gguf", 41))
    with pytest.raises(MismatchError, match="has 41 tokens"):
        plan_variants(base, tmp_path, ["Q8_0"], tokenizer_from=wrong)
    with pytest.raises(FormatError, match="twice"):
        plan_variants(base, tmp_path, ["Q8_0", "q8_0"], tokenizer_from=wrong)
    (tmp_path / "q-Q8_0.gguf").touch()
    write_model(tmp_path / "q.gguf", kind="F32")
    with pytest.raises(OutputError, match="exists"):
        plan_variants(open_checkpoint(tmp_path / "q.gguf"), tmp_path, ["Q8_0"])
    other = tmp_path / "gpt"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "opt"}')
    save_file({"wte.weight": torch.zeros(2, 2)}, other / "model.safetensors")
    with pytest.raises(UnsupportedError, match="model_type 'opt' cannot be written"):
        plan_variants(open_checkpoint(other), tmp_path, ["Q8_0"], tokenizer_from=wrong)
    keys = open_gguf(tokenizer_file(tmp_path / "tokens.gguf"))
    wide = open_checkpoint(write_hf(tmp_path / "wide", "llama", inner=256))
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_down\.weight: IQ2_XXS: cannot be encoded without importance"):
        list(build_variants(plan_variants(wide, tmp_path / "iq", ["IQ2_XXS"], tokenizer_from=keys)))


def test_the_command(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "hf", "llama")
    keys = tokenizer_file(tmp_path / "tokens.gguf")
    save_file({"input_ids": torch.randint(0, VOCAB, (4, 16))}, tmp_path / "rows.safetensors")
    arguments = [
        *("-i", str(base), "-o", str(tmp_path / "out"), "--format", "gguf", "-b", "Q4_K", "Q8_0"),
        *("--tokenizer-from", str(keys), "--input-ids", str(tmp_path / "rows.safetensors"), "--quiet"),
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    again = [value.replace("/out", "/again") for value in arguments]
    again += ["--save-imatrix", str(tmp_path / "made.gguf")]
    assert CliRunner().invoke(main, again).exit_code == 0
    third = [value.replace("/out", "/third") for value in arguments] + ["--imatrix", str(tmp_path / "made.gguf")]
    assert CliRunner().invoke(main, third).exit_code == 0
    one, other = open_gguf(tmp_path / "out" / "hf-Q4_K.gguf"), open_gguf(tmp_path / "third" / "hf-Q4_K.gguf")
    same = [one.read(name) == other.read(name) for name in one.tensors]
    assert sum(same) > 0.9 * len(same)  # sums are divided and multiplied again, so a last bit may differ
    assert "tensors asked to be Q4_K are Q5_0: Q4_K has blocks of 256, its rows are 64" in result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"hf-Q4_K.gguf", "hf-Q8_0.gguf"}
    result = CliRunner().invoke(main, ["-i", str(base), "-o", str(tmp_path / "o"), "-b", "Q4_K"])
    assert result.exit_code == 1
    assert "go with --format gguf" in result.output
