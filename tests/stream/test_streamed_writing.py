"""Text that is written with weights read anew for every token: the same as with all of them in memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from eval import divergence, generating
from eval.divergence import greedy_runs
from eval.generating import WritingPlan, plan_writing
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import UnsupportedError
from recompile.events import Note
from recompile.model.stream import LayeredModel
from tests import tiny
from tests.conftest import load_script

NEW = 6


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What the machine says it has; a test sets "bytes"."""
    found = {"bytes": 1 << 40}
    monkeypatch.setattr(generating, "available_bytes", lambda device: found["bytes"])
    return found


def limit(free: dict[str, int], model: LayeredModel, rows: int, tokens: int, held: int, way: str = "x") -> None:
    """As little free memory as lets `held` layers stay."""
    low, high = 1, 1 << 32
    while low < high:
        free["bytes"] = (low + high) // 2
        try:
            plan = plan_writing(model, rows, rows, tokens, "responses are", way)
            fits = plan.held is None or plan.held >= held
        except UnsupportedError:
            fits = False
        low, high = (low, free["bytes"]) if fits else (free["bytes"] + 1, high)
    free["bytes"] = low


# keys and values, experts, values handed to later layers, states that are no keys, one layer that runs several times
TYPES = ("llama", "qwen3_moe", "gemma3n_text", "qwen3_next", "mamba2", "zamba2", "deepseek_v3", "gpt_oss", "xlnet")


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_written_does_not_depend_on_where_the_weights_are(model_type: str, tmp_path: Path) -> None:
    load_script("tiny_configs").write(model_type, tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    model = LayeredModel.of(base)
    prompts = torch.randint(2, model.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    wanted = greedy_runs(base, prompts, NEW, batch=3)
    plan = WritingPlan(1, 3, 1 << 20)
    said: list[object] = []
    read: list[int] = []
    loads = LayeredModel.load

    def load(self: LayeredModel, module: torch.nn.Module, *where: object) -> None:
        read.append(next(n for n, layer in enumerate(self.layers) if layer is module))
        loads(self, module, *where)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayeredModel, "load", load)
        patch.setattr(divergence, "plan_writing", lambda *_: plan)
        found = greedy_runs(base, prompts, NEW, batch=3, on_event=said.append)
    assert torch.equal(found.ids, wanted.ids)
    assert found.lengths == wanted.lengths
    passes = max(wanted.lengths)
    assert 0 not in read
    assert read.count(model.depth - 1) in (passes, passes + 1)
    assert any(isinstance(event, Note) and "1 of" in event.text for event in said)


def test_more_rows_run_together_where_weights_are_read_anew(free: dict[str, int]) -> None:
    model = LayeredModel.of(open_checkpoint(tiny.base("llama-12")))
    assert plan_writing(model, 2, 9, 20, "x", "y") == WritingPlan(None, 2)
    limit(free, model, 2, 20, held=5)
    one_layer = 4 * sum(math.prod(shape) for name, shape in model.shapes.items() if ".layers.3." in name)
    assert plan_writing(model, 2, 2, 20, "x", "y") == WritingPlan(5, 2, 7 * one_layer)
    more = plan_writing(model, 2, 9, 20, "x", "y")
    cache_of_a_row = (
        2 * 2 * 4 * 12 * 20 * 2 * 16
    )  # copies, keys and values, bytes, layers, tokens, heads of keys, values
    assert more.rows == min(9, 2 + 5 * one_layer // cache_of_a_row) > 2
    assert more.held is not None
    assert more.held < 5
    assert more.read_bytes == (12 - more.held) * one_layer


def test_all_weights_are_loaded_where_nothing_says_what_is_free(free: dict[str, int]) -> None:
    free["bytes"] = 0
    model = LayeredModel.of(open_checkpoint(tiny.base("llama-tied")))
    assert plan_writing(model, 2, 9, 20, "x", "y") == WritingPlan(None, 2)


def test_a_layer_that_does_not_fit_is_refused(free: dict[str, int]) -> None:
    free["bytes"] = 1000
    base = open_checkpoint(tiny.base("llama-tied"))
    with pytest.raises(UnsupportedError, match=r"layer by layer, for which .* are wanted .*; leave divergence out"):
        greedy_runs(base, tiny.rows(1, 8), 2)
