"""Which experts tokens go to, and how many tokens keep theirs: against transformers' own router, run apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from eval.diff import DiffReport, compare
from eval.routing import ExpertChoices, compare_choices
from recompile.checkpoint.checkpoint import open_checkpoint
from tests import tiny

ROWS, TOKENS = 3, 16


def report_of(candidate: Path, reference: Path) -> DiffReport:
    *_, report = compare(open_checkpoint(candidate), open_checkpoint(reference), tiny.rows(ROWS, TOKENS))
    assert isinstance(report, DiffReport)
    return report


def plain_choices(directory: Path) -> list[torch.Tensor]:
    """bool [rows, tokens, experts] a layer, from the logits that transformers gives out itself."""
    model = tiny.plain_model(directory)
    with torch.no_grad():
        logits = model(tiny.rows(ROWS, TOKENS), output_router_logits=True, use_cache=False).router_logits
    top = model.config.num_experts_per_tok
    nobody = [torch.zeros_like(found, dtype=torch.bool) for found in logits]
    sets = [none.scatter_(1, found.topk(top, -1).indices, True) for none, found in zip(nobody, logits, strict=True)]
    return [found.reshape(ROWS, TOKENS, -1) for found in sets]


def with_noisy_attention(directory: Path, target: Path) -> Path:
    """A copy whose first attention writes something else, so that later routers see other states."""
    tiny.copy_of(directory, target)
    (path,) = target.glob("*.safetensors")
    tensors = load_file(path)
    name = "model.layers.0.self_attn.o_proj.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(3))
    tensors[name] = (tensors[name].float() + 0.5 * noise * tensors[name].float().std()).to(tensors[name].dtype)
    save_file(tensors, path, {"format": "pt"})
    return target


@pytest.mark.parametrize("architecture", ["qwen2-moe", "qwen3-moe"])
def test_agreement_and_load_are_those_of_transformers_routers(architecture: str, tmp_path: Path) -> None:
    base = tiny.base(architecture)
    other = with_noisy_attention(base, tmp_path / "other")
    report = report_of(other, base)
    theirs, ours = plain_choices(base), plain_choices(other)
    assert 0 < len(report.routing) == len(theirs)
    for layer, reference, candidate in zip(report.routing, theirs, ours, strict=True):
        same = (reference == candidate).all(-1).float()
        assert layer.same_experts.mean == pytest.approx(float(same.mean()), abs=1e-6)
        assert layer.load == tuple(reference.sum((0, 1)).tolist())
        assert layer.load_candidate == tuple(candidate.sum((0, 1)).tolist())
        assert layer.unused == int((reference.sum((0, 1)) == 0).sum())
    assert min(layer.same_experts.mean for layer in report.routing) < 1, "the change has to move some token"


def test_a_model_routes_as_itself_and_a_dense_one_not_at_all() -> None:
    moe, dense = tiny.base("qwen3-moe"), tiny.base("llama")
    assert {layer.same_experts.mean for layer in report_of(moe, moe).routing} == {1.0}
    assert report_of(dense, dense).routing == ()


class _Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(experts, 2, 2))

    def forward(self, states: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return states


def test_choices_given_as_zeroed_copies_of_the_tokens_are_read() -> None:
    """As Llama 4 calls its experts: every token once an expert, multiplied by a score that is 0 for most."""
    layer = _Experts(3)
    states = torch.zeros(3, 4, 2)  # [experts, tokens, hidden]
    for token, expert in enumerate((2, 0, 0, 1)):
        states[expert, token] = 1.5
    with ExpertChoices().watching(layer) as chosen:
        layer(states.reshape(12, 2))
    assert chosen.sets[0].int().argmax(1).tolist() == [2, 0, 0, 1]


def test_sets_are_compared_not_orders_and_not_by_half() -> None:
    first, second = ExpertChoices(), ExpertChoices()
    for choices, indices in ((first, [[0, 1], [2, 3]]), (second, [[1, 0], [2, 1]])):
        layer = _Experts(4)
        with choices.watching(layer):
            layer(torch.zeros(2, 2), torch.tensor(indices), torch.ones(2, 2))
    found = compare_choices("layer", first, second, rows=1)
    assert found is not None
    assert found.same_experts.mean == 0.5
    assert (found.load, found.load_candidate, found.unused) == ((1, 1, 1, 1), (1, 2, 1, 0), 0)
