"""The whole job on a tiny GLM-4.5: a dense first layer, routed by a correction bias, an MTP layer behind the last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import model_diff, model_quantize
from recompile.cli import recompile as recompile_command
from recompile.merge.check import check_checkpoint
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.quantize.encoders import Exl3Encoder
from recompile.quantize.pipeline import BuildOptions, Encoded, quantize_model
from tests import commands, tiny
from tests.quantize.test_compensated import check_killed_builds

LAYERS, EXPERTS, HIDDEN = 6, 4, 64
MTP = f"model.layers.{LAYERS}"
CONFIG = {
    "vocab_size": tiny.VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True, "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROWS = ("-r", 2, "-l", 16, "--quiet")
# Attention and shared experts from 5 bits; layers 1 to 4 from 4; the rest is the base's.
RECIPE = """sources: [{id: 4, model_dir: 4bpw}, {id: 5, model_dir: 5bpw}]
overrides:
  - {key: "model.layers.1.*", source: 4}
  - {key: "model.layers.2.*", source: 4}
  - {key: "model.layers.3.*", source: 4}
  - {key: "model.layers.4.*", source: 4}
  - {key: "*.self_attn.*", source: 5}
  - {key: "*.shared_experts.*", source: 5}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    out = tmp_path_factory.mktemp("glm") / "base"
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(Glm4MoeConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name:
                value.copy_(torch.randn(value.shape) * 0.3)  # routes other tokens than zeros would
            elif value.dim() > 1:
                value.copy_(torch.randn(value.shape) / value.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    last = f"model.layers.{LAYERS - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        value = tensors[name].float()
        tensors[name.replace(last, f"{MTP}.")] = (value + 0.1 * torch.randn(value.shape)).bfloat16()
    tensors[f"{MTP}.eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN).bfloat16()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{MTP}.{norm}.weight"] = torch.ones(HIDDEN).bfloat16()
    tensors[f"{MTP}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors[f"{MTP}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    tiny.write_tokenizer(out)
    return out


def check_mix(mix: Path) -> None:
    """Every module is where the recipe says, the MTP layer too, and the whole holds together."""
    assert [p for p in check_checkpoint(mix) if p.severity == "error"] == []
    made = open_checkpoint(mix)
    sources = {bits: open_checkpoint(mix.parent / f"{bits}bpw") for bits in (3, 4, 5)}
    for name, module in made.modules.items():
        five = ".self_attn." in name or ".shared_experts." in name
        four = name.split(".")[:2] == ["model", "layers"] and name.split(".")[2] in "1234"
        wanted = sources[5 if five else 4 if four else 3]
        for part in module.parts.values():
            assert made.read(part.name).equal(wanted.read(part.name)), part.name


def test_the_hand_made_recipe_from_variants_to_a_checked_output(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(base.parent)
    said = commands.run(model_quantize.main, "-i", "base", "-o", ".", "-b", 3, 4, 5, "-g", 32, *ROWS)
    assert "left dense:" in said
    told = r"outside the layers: (\d+) modules made with the inputs of the last layer's, (\d+) without inputs"
    found = re.search(told, said)
    assert found is not None
    assert int(found[1]) + int(found[2]) == 4 + 3 + 3 * EXPERTS, "attention, shared and routed experts of the MTP layer"
    assert int(found[1]) >= 4 + 3, "the rest are experts of the last layer that the rows did not reach"
    Path("mix.yaml").write_text(RECIPE)
    said = commands.run(recompile_command.main, "-i", "3bpw", "-o", "mix", "-or", "mix.yaml", "--verify")
    assert f'mix.yaml:7: "*.self_attn.*" reaches into an MTP layer: {MTP}.self_attn' in said
    check_mix(Path("mix"))
    said = commands.run(recompile_command.main, "--check", "mix")
    assert "transformers does not run this" in said, "its experts have two widths, which transformers decodes as one"
    assert "vllm does not run this" not in said

    # what was measured is what was written, and what it decodes to is what transformers runs
    report = commands.run(model_diff.main, "-ma", "3bpw", "-or", "mix.yaml", "-mb", "mix", *ROWS)
    assert "KL" in report
    assert " 0.00000000" in report or "0.0000" in report
    commands.run(recompile_command.main, "-i", "mix", "-o", "dense", "--dense")
    commands.run(recompile_command.main, "-i", "4bpw", "-o", "dense4", "--dense")
    rows = tiny.rows(2, 12)
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained("dense4", dtype=torch.float32)(rows).logits
        packed_model = AutoModelForCausalLM.from_pretrained("4bpw", dtype=torch.float32)
        packed_model(rows[:1, :2])  # decompresses
        for parameter in packed_model.parameters():
            parameter.data = parameter.data.bfloat16().float()  # as the dense copy has them
        assert torch.allclose(packed_model(rows).logits, dense, atol=1e-5)
        mixed = AutoModelForCausalLM.from_pretrained("dense", dtype=torch.float32)(rows).logits
        reference = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)(rows).logits
    assert 0 < float((mixed - reference).square().mean()) < float((dense - reference).square().mean()) * 2


def test_an_mtp_layer_may_be_kept_byte_for_byte(base: Path, tmp_path: Path) -> None:
    command = (model_quantize.main, "-i", base, "-o", tmp_path, "-b", 4, "-g", 32, "--method", "rtn", "--mtp", "keep")
    said = commands.run(*command, *ROWS)
    assert "mtp " in said
    stored, kept = load_file(base / "model.safetensors"), load_file(tmp_path / "4bpw" / "model.safetensors")
    names = [name for name in stored if name.startswith(f"{MTP}.")]
    assert len(names) > 20
    assert all(kept[name].equal(stored[name]) for name in names)
    assert [p for p in check_checkpoint(tmp_path / "4bpw") if p.severity == "error"] == []


class QuickExl3(Exl3Encoder):
    """EXL3 parts of the right shapes, of one 1-bit encoding a shape repeated: the encoder itself takes minutes."""

    made: ClassVar[dict[torch.Size, Encoded]] = {}

    def encode(
        self, weights: Mapping[str, Tensor], hessian: Tensor | None, biases: Mapping[str, Tensor]
    ) -> list[dict[str, Encoded]]:
        found: list[dict[str, Encoded]] = [{} for _ in self.bits]
        for name, weight in weights.items():
            if weight.shape not in self.made:
                self.made[weight.shape] = Exl3Encoder([1], 1, method="rtn").encode({"a": weight}, None, {})[0]["a"]
            one = self.made[weight.shape]
            for variant, bits in enumerate(self.bits):
                parts = {part: value.clone() for part, value in one.parts.items()}
                width = self.head_bits if name == "lm_head" else bits
                parts["trellis"] = parts["trellis"].repeat(1, 1, int(width or 0))
                if name in biases:
                    parts["bias"] = torch.nn.functional.pad(biases[name].half(), (0, -len(biases[name]) % 128))
                found[variant][name] = Encoded(parts, one.dense)
        return found


@pytest.mark.usefixtures("quick_exl3")
def test_the_same_recipe_in_exl3(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in quantize_model(
        open_checkpoint(base), Path(), QuickExl3([3, 4, 5]), tiny.rows(2, 16), BuildOptions(head=True)
    ):
        pass
    Path("mix.yaml").write_text(RECIPE)
    for _ in execute(plan_write(build_overlay(open_checkpoint("3bpw"), "mix.yaml"), "mix")):
        pass
    check_mix(Path("mix"))
    assert open_checkpoint("mix").modules[f"{MTP}.mlp.experts.3.up_proj"].format == "exl3"


@pytest.mark.parametrize("how", [pytest.param("sequential", marks=pytest.mark.sweep), "compensate"])
def test_a_killed_build_on_its_own_rounding_goes_on(
    how: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer is run again, for the MTP layer takes the inputs of its modules."""
    options = BuildOptions(sequential=how == "sequential", compensate=how == "compensate", head=True)
    check_killed_builds(open_checkpoint(base), tiny.rows(6, 16), options, tmp_path, monkeypatch)
