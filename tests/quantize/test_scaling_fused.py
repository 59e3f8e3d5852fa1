"""AWQ, SmoothQuant and quantized inputs where maps are no nn.Linear: fused experts, slice by slice, and Conv1D."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.checkpoint.module_names import Dense
from recompile.formats.schemes import parse_scheme
from recompile.merge.overlay import build_overlay
from recompile.model.activations import QuantizedInputs
from recompile.model.stream import LayeredModel
from recompile.quantize.pipeline import BuildOptions, quantize_model
from recompile.quantize.quantize_report import QuantizeReport
from recompile.quantize.scheme_encoder import SchemeEncoder, uniform
from tests import tiny
from tests.quantize.test_fused_experts import CASES, EXPERTS, IDS, logits_of, make
from tests.quantize.test_scaling import Unrounded

NORM = {
    "gpt2": "ln_2",
    "llama4_text": None,
    "dbrx": "norm_2",
}  # what the MLP reads; Llama 4 weighs the inputs of its experts before
UP = {
    "llama4_text": "up_proj",
    "dbrx": "up_proj",
    "granitemoe": "w3",
    "gpt_oss": None,
    "gpt2": None,
}  # gpt-oss's is clamped after


def base_of(name: str, folder: Path) -> Checkpoint:
    if name != "gpt2":
        make(name, folder)
        return open_checkpoint(folder)
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": tiny.VOCAB, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return open_checkpoint(folder)


@pytest.mark.parametrize("name", [*CASES, "gpt2"])
def test_random_scales_leave_the_logits_alone(name: str, tmp_path: Path) -> None:
    base, encoder = base_of(name, tmp_path / "base"), Unrounded()
    *_, report = quantize_model(base, tmp_path, encoder, IDS)
    assert isinstance(report, QuantizeReport)
    if name == "gpt2":  # what this encoder calls quantized is [out, in], and Conv1D's dense weights are not
        path = tmp_path / "scaled" / "model.safetensors"
        turned = {f"{module.module}.weight" for module in report.variants[0].modules if module.quantized}
        stored = {n: value.T.contiguous() if n in turned else value for n, value in load_file(path).items()}
        save_file(stored, path, {"format": "pt"})
    asked = [producer for producer in encoder.asked if re.search(r"\.(layers|h|blocks)\.1\.", producer)]
    norm = NORM.get(name, "post_attention_layernorm")
    assert any(producer.endswith(f".{norm}") for producer in asked) == (norm is not None)
    assert sum(producer.endswith(f".{UP[name]}") and ".experts." in producer for producer in asked) == (
        EXPERTS if UP[name] else 0
    )
    wanted, found = logits_of(base), logits_of(open_checkpoint(tmp_path / "scaled"))
    assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.max() - wanted.min())
    said = report.variants[0].not_smoothed
    left = {module.module for module in report.variants[0].modules if module.smoothed is False}
    assert bool(said) == bool(left)
    assert left == {module.module for module in report.variants[0].modules if module.module.endswith(LEFT[name])}
    if left:
        assert f"not smoothed: {len(left)} of " in said


LEFT: dict[str, tuple[str, ...]] = {
    "gpt_oss": tuple(f"experts.{n}.down_proj" for n in range(EXPERTS)),
    "llama4_text": (
        *(f"experts.{n}.{leaf}_proj" for n in range(EXPERTS) for leaf in ("gate", "up")),
        "shared_expert.gate_proj",
        "shared_expert.up_proj",
    ),
    "granitemoe": ("no module",),
    "gpt2": ("c_proj",),
    "dbrx": ("out_proj",),  # values lie in one map with queries and keys
}


def test_experts_that_stay_in_one_dense_tensor_are_not_scaled(tmp_path: Path) -> None:
    base, encoder = base_of("gpt_oss", tmp_path / "base"), Unrounded()
    for _ in quantize_model(base, tmp_path, encoder, IDS, BuildOptions(dense=Dense(keep=("*.experts.*",)))):
        pass
    assert not any("post_attention_layernorm" in producer for producer in encoder.asked)
    assert any("input_layernorm" in producer for producer in encoder.asked)
    kept, stored = (load_file(tmp_path / name / "model.safetensors") for name in ("scaled", "base"))
    assert all(kept[name].equal(stored[name]) for name in base.fused)
    wanted, found = logits_of(base), logits_of(open_checkpoint(tmp_path / "scaled"))
    assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.max() - wanted.min())


@pytest.mark.parametrize("name", [*CASES, "gpt2"])
def test_inputs_of_every_map_are_quantized(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of(name, tmp_path / "base")
    encoder = SchemeEncoder((uniform(parse_scheme("w8a8"), "rtn"),))
    for _ in quantize_model(base, tmp_path, encoder, IDS):
        pass
    overlay = build_overlay(open_checkpoint(tmp_path / encoder.names[0]), None)
    seen: set[str] = set()
    plain = QuantizedInputs._quantize

    def quantize(x: torch.Tensor, how: Any, module: str) -> torch.Tensor:
        seen.add(module)
        return plain(x, how, module)

    monkeypatch.setattr(QuantizedInputs, "_quantize", staticmethod(quantize))
    model = LayeredModel.of(overlay, dtype=torch.float32)
    model.model.set_experts_implementation("eager")
    with torch.inference_mode():
        (state,) = model.embed(IDS, len(IDS))
        for index in range(model.depth):
            with model.layer(index):
                before = model.run_layer(index, state)
                with QuantizedInputs(model, overlay, index):
                    after = model.run_layer(index, state)
            difference = float((after - before).norm() / before.norm())
            assert 0 < difference < 0.2  # a token's scale of 8 bits
            state = before
    quantized = {module.name for module in overlay.modules.values() if module.is_quantized}
    told_by_another = {module for module in quantized if module.endswith((".up_proj", ".w3"))}  # one map with the gate
    missing = {module for module in quantized - seen - told_by_another if ".experts." not in module}
    assert not missing
    assert {module for module in seen if ".experts." in module} or name == "gpt2"
