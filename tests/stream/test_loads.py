"""What transformers does with quantized modules while it loads, told without loading; then loaded, to compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import recompile as command
from recompile.model.loads import fused_by_transformers, left_out_by_transformers
from recompile.model.stream import LayeredModel
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.pipeline import quantize_model
from tests import tiny
from tests.commands import run
from tests.conftest import load_script


def test_fused_experts_stay_in_the_dtype_of_their_scales() -> None:
    variant = tiny.variants("qwen3-moe", (4,))[4]
    source = open_checkpoint(variant)
    fused = set(fused_by_transformers(source))
    assert fused == {name for name, module in source.modules.items() if ".experts." in name and module.is_quantized}
    said = run(command.main, "--check", variant)
    line = f"; it decodes the {len(fused)} weights of experts to bfloat16, the dtype of their scales"
    assert f"transformers: nothing in it keeps it from loading{line}" in said
    theirs = dict(tiny.plain_model(variant).named_parameters())
    model = LayeredModel.of(source, dtype=torch.float32)
    (name,) = [name for name in model.origins if name.endswith("layers.1.mlp.experts.down_proj")]
    assert theirs[name].dtype == torch.bfloat16
    assert theirs[name].equal(model.load_parameter(name).bfloat16())


def test_a_dense_model_fuses_nothing() -> None:
    assert fused_by_transformers(open_checkpoint(tiny.variants("llama", (4,))[4])) == []


@pytest.mark.parametrize(
    ("model_type", "stopped_at"),
    [
        ("nanochat", {"self_attn.o_proj"}),  # its attention starts the weight of its own map
        ("qwen3_5_moe", set()),  # a model in a model, each with a configuration of its own
    ],
)
def test_what_transformers_cannot_initialize(model_type: str, stopped_at: set[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    base, made = tmp_path / "base", tmp_path / "made"
    load_script("tiny_configs").write(model_type, base)
    for _ in quantize_model(open_checkpoint(base), made, IntEncoder((4,), 32, method="rtn"), tiny.rows(1, 8)):
        pass
    said = left_out_by_transformers(open_checkpoint(made / "4bpw"))
    assert {".".join(name.split(".")[-2:]) for name, _ in said} == stopped_at
    auto = AutoModelForCausalLM if model_type == "nanochat" else AutoModelForImageTextToText
    if stopped_at:
        with pytest.raises(AttributeError, match="no attribute 'weight'"):
            auto.from_pretrained(made / "4bpw")
    else:
        _, told = auto.from_pretrained(made / "4bpw", output_loading_info=True)
        assert not told["missing_keys"]
