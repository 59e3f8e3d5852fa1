"""Long rows that run through layers in pieces: the same states as whole rows, and no silent way around."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval import diff_memory
from eval.diff import DiffOptions, DiffReport, measure_many
from eval.diff_memory import plan_diff
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import RecompileError, UnsupportedError
from recompile.formats.cache_types import parse_cache
from recompile.model import kv_cache
from recompile.model.chunked import ChunkedLayout, Pieces
from recompile.model.stream import LayeredModel
from tests.conftest import load_script
from tests.stream import architectures

TOKENS, PIECE = 96, 40  # windows of the tiny models are 8 tokens


def base_of(model_type: str, folder: Path) -> Path:
    load_script("tiny_configs").write(model_type, folder / model_type)
    return folder / model_type


def ids_of(rows: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(rows))


def normed(folder: Path, pieces: Pieces | None, rows: int = 2) -> tuple[Tensor, LayeredModel]:
    """What the head takes, and the model that ran."""
    model = LayeredModel.of(open_checkpoint(folder))
    model.pieces = pieces
    return model.normed(ids_of(rows), rows), model


# windows and full attention, experts, latent keys and values, states that are no keys beside attention, positions from
# a table, biases by distance, several rotary tables, chunks of attention, recurrent convolutions
TYPES = ("llama", "gemma3_text", "qwen3_moe", "deepseek_v3", "qwen3_next", "gpt2", "bloom", "gpt_oss", "llama4_text")


@pytest.mark.parametrize("model_type", TYPES)
def test_pieces_of_a_row_give_the_states_of_the_whole_row(model_type: str, tmp_path: Path) -> None:
    folder = base_of(model_type, tmp_path)
    wanted, _ = normed(folder, None)
    found, model = normed(folder, Pieces(PIECE, needed=True))
    assert isinstance(model.layouts[TOKENS], ChunkedLayout)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.sweep
@pytest.mark.parametrize("name", architectures.TYPES)
def test_no_architecture_changes_without_a_word(name: str) -> None:
    """In pieces where it can, whole where not; ids [2, 60], windows of 6 tokens."""
    found = []
    for pieces in (None, Pieces(PIECE)):
        model = LayeredModel.of(open_checkpoint(architectures.checkpoint(name)))
        model.pieces = pieces
        found.append(model.normed(architectures.rows(2, 60).clamp(min=3), 2))  # positions of some leave padding out
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


# a layer without a state to go on from, positions from a table that is a weight, layers that hand on more, attention to
# a choice of tokens, a cache of its own
WHOLE = {
    "mamba": "layers.0 of MambaForCausalLM, .*\\(a row in two pieces gives other states than in one",
    "roformer": "RoFormerForCausalLM",
    "gemma3n_text": "layers hand on more than the hidden state",
    "deepseek_v32": "which tokens its attention looks at is a choice among all",
    "minimax": "MiniMaxForCausalLM, which they cannot .*ValueError",
}


@pytest.mark.parametrize("model_type", WHOLE)
def test_whole_rows_run_where_pieces_cannot_and_a_cap_says_so(model_type: str, tmp_path: Path) -> None:
    folder = base_of(model_type, tmp_path)
    wanted, _ = normed(folder, None)
    found, _ = normed(folder, Pieces(PIECE))
    assert torch.equal(found, wanted)
    with pytest.raises(UnsupportedError, match=f"{WHOLE[model_type]}.*give more memory or shorter rows"):
        normed(folder, Pieces(PIECE, needed=True))


def test_positions_that_depend_on_the_length_of_a_row_are_not_cut(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=300, max_position_embeddings=64, rope_parameters=rope)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    wanted, _ = normed(tmp_path / "base", None)
    assert torch.equal(normed(tmp_path / "base", Pieces(PIECE))[0], wanted)
    with pytest.raises(UnsupportedError, match="its positions depend on the length of the row"):
        normed(tmp_path / "base", Pieces(PIECE, needed=True))


def test_a_trial_that_fails_is_found_before_the_layer_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose cache forgets is run on whole rows, not in pieces that know nothing of each other."""
    from transformers.cache_utils import DynamicCache

    folder = base_of("llama", tmp_path)
    wanted, _ = normed(folder, None)
    monkeypatch.setattr(DynamicCache, "update", lambda self, keys, values, *rest: (keys, values))
    assert torch.equal(normed(folder, Pieces(PIECE))[0], wanted)


# ---- model_diff under a cap ------------------------------------------------------------------------------------------


def coarse(keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return keys, values.mul(4).round().div(4)


def compare(folder: Path, options: DiffOptions, monkeypatch: pytest.MonkeyPatch, **plan: object) -> DiffReport:
    """A model beside itself through a coarse cache, by a plan of these fields."""
    base = open_checkpoint(folder)
    made = plan_diff(LayeredModel.of(base), 1, [TOKENS] * 3, 2, None)
    with monkeypatch.context() as patch:
        patch.setattr("eval.diff.plan_diff", lambda *_: replace(made, **plan))
        patch.setattr(kv_cache, "store", coarse)  # heads of these models are shorter than any engine's groups
        options = replace(options, caches=(parse_cache("q8_0"),))
        (report,) = measure_many([base], base, ids_of(3), options)
    return report


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gemma3_text"])
def test_figures_do_not_depend_on_pieces_and_scratch_files(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values in a quantized cache, experts, kept states, a padded batch: all of them see whole rows."""
    folder = base_of(model_type, tmp_path)
    options = DiffOptions(keep_reference=1, lengths=(TOKENS, TOKENS, 70))
    plain = compare(folder, options, monkeypatch)
    cut = compare(folder, options, monkeypatch, pieces=Pieces(PIECE, needed=True), scratch=True)
    assert plain.kl.mean > 1e-7
    assert cut.kl.mean == pytest.approx(plain.kl.mean, rel=1e-3)
    assert cut.routing == plain.routing
    assert cut.cache == plain.cache
    assert [stage.name for stage in cut.layers] == [stage.name for stage in plain.layers]


def test_a_cap_chooses_pieces_then_a_scratch_file_then_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diff_memory, "process_bytes", lambda cap: 0)
    model = LayeredModel.of(open_checkpoint(base_of("gemma3_text", tmp_path)))
    plans = []
    for cap_mib in (1024, 200, 100, 60, 40, 30):
        plans.append(plan_diff(model, 1, [4096] * 8, None, cap_mib * 2**20))
        assert plans[-1].total <= cap_mib * 2**20
    assert plans[0].pieces is None
    assert not plans[0].scratch
    sizes = [plan.pieces.tokens for plan in plans if plan.pieces is not None and not plan.scratch]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes
    assert plans[-1].scratch
    with pytest.raises(RecompileError, match=r"max_memory 4 MiB is too little: this comparison needs \d+ MiB"):
        plan_diff(model, 1, [4096] * 8, None, 4 * 2**20)


def test_rows_that_fill_half_of_the_free_memory_run_in_pieces_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LayeredModel.of(open_checkpoint(base_of("gemma3_text", tmp_path)))
    monkeypatch.setattr(diff_memory, "available_bytes", lambda device: 1 << 40)
    assert plan_diff(model, 1, [32768], None, None).pieces is None
    monkeypatch.setattr(diff_memory, "available_bytes", lambda device: 1 << 30)
    assert plan_diff(model, 1, [32768], None, None).pieces == Pieces(diff_memory.PIECE_TOKENS)
