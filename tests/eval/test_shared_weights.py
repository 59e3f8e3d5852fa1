"""Weights that several layers share (Zamba 2): a sketch adds up what a change of them does in each of these layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.passes.adjoint import AdjointPass, LayerBackward, SwapProducts, plan_pass
from eval.profile.exact import ProfileJob, ProfileOptions
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.quantize.lazy_variant import make_variants, spec_of

IDS = torch.arange(32).reshape(2, 16) * 7 % 48


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model with three layers of one shared block, and its directory."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING["zamba2"](
        vocab_size=48, hidden_size=32, num_hidden_layers=4, layers_block_type=["hybrid", "mamba", "hybrid", "hybrid"],
        mamba_d_state=8, mamba_d_conv=4, mamba_expand=2, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=16,
        intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, num_mem_blocks=1, adapter_rank=8,
        chunk_size=8, use_mem_rope=True, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    out = tmp_path_factory.mktemp("zamba2")
    model.save_pretrained(out)
    return model, out


class FixedCotangents:
    """The same gradients at what the head takes in every run: [samples, rows, tokens, hidden]."""

    def __init__(self, values: Tensor, gradients: int) -> None:
        self.values, self.gradients = values, gradients

    def at_norm(self, rows: slice, normed: Tensor) -> tuple[list[Tensor], dict[tuple[str, str], Tensor]]:
        return list(self.values[:, rows]), {}


@pytest.mark.parametrize("gradients", [0, 2])
def test_products_are_those_of_the_whole_models_gradient(
    made: tuple[Any, Path], gradients: int, tmp_path: Path
) -> None:
    model, folder = made
    base = open_checkpoint(folder)
    candidates = make_variants(base, [spec_of("3", group_size=16, symmetric=True)])
    job = ProfileJob(base, candidates[0][0], candidates, IDS, tmp_path / "p.jsonl", ProfileOptions())
    layered = job.model()
    header = job.header(layered.dtype, method="sketch", settings={})
    values = torch.randn(2, *IDS.shape, 32, generator=torch.Generator().manual_seed(1))
    plan = plan_pass(layered, header.groups, 1, rows=2, tokens=16, samples=2, cap_bytes=None)
    runner = AdjointPass(layered, base, job.by_label, header.groups, plan, scratch_folder=tmp_path)
    found: dict[str, SwapProducts] = {}
    for event in runner.run(IDS, FixedCotangents(values, gradients)):
        if isinstance(event, LayerBackward):
            assert not any(swap.group in found for swap in event.swaps), "a swap is priced once"
            found |= {swap.group: swap for swap in event.swaps}
    shared = [group for group in header.groups if ".shared_transformer." in group.name]
    assert len(shared) > 3
    (_, variant), *_ = candidates
    parameters = dict(model.named_parameters())
    for sample in range(2):
        model.zero_grad()
        (model.model(IDS).last_hidden_state * values[sample]).sum().backward()
        for group in header.groups:
            tensors = [f"{module}.weight" for module in group.modules]
            changes = [(variant.load(tensor) - base.load(tensor)).double() for tensor in tensors]
            wanted = sum(float((parameters[t].grad * c).sum()) for t, c in zip(tensors, changes, strict=True))
            assert float(found[group.name].products.sum(0)[sample]) == pytest.approx(wanted, rel=2e-3, abs=2e-4)
