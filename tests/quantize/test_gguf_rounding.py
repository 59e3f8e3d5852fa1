"""Error feedback for GGUF types: less output error in the same bytes, rows in GGUF's order, whole builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from recompile import api
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import OutputError
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_codes import LAYOUTS, put_levels
from recompile.formats.gguf_encode import quantize_rows
from recompile.formats.gguf_types import TYPES
from recompile.gguf.architectures import Fused
from recompile.gguf.container import open_gguf
from recompile.gguf.names import Place
from recompile.gguf.values import Heads
from recompile.model.stream import LayeredModel
from recompile.quantize.gguf import Importance, VariantsReport, collect_importance, place_pieces
from recompile.quantize.gguf_compensated import ComparedInputsOfFile, place_in_layer
from recompile.quantize.gguf_rounding import InputHessians, Order, round_rows, rounding_grid
from tests import tiny
from tests.quantize.test_gguf_variants import tokenizer_file

pytest.importorskip("libgguf")
HEADS = Heads(4, 2, linear_key=2, linear_value=4, head_key=8, head_value=8)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_output_error_falls_and_the_scales_stay(name: str) -> None:
    kind, generator = TYPES[name], torch.Generator().manual_seed(0)
    inputs = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    hessian, weight = inputs.T @ inputs, torch.randn(96, 256, generator=generator)
    packed = quantize_rows(kind, weight, hessian.diagonal())
    made = put_levels(kind, packed, round_rows(weight, hessian, rounding_grid(kind, packed, 256)))

    def error(rows: torch.Tensor) -> float:
        wrong = weight - dequantize_rows(kind, rows, 256)
        return float(((wrong @ hessian) * wrong).sum())

    assert error(made) < 0.8 * error(packed)
    plain = torch.zeros(96, 256)
    assert torch.equal(put_levels(kind, made, plain), put_levels(kind, packed, plain)), "only codes differ"


def test_rows_of_more_than_one_chunk_are_rounded_as_alone() -> None:
    kind, generator = TYPES["Q4_0"], torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 32, generator=generator)
    hessian, weight = inputs.T @ inputs, torch.randn(1500, 32, generator=generator)
    packed = quantize_rows(kind, weight)
    whole = round_rows(weight, hessian, rounding_grid(kind, packed, 32))
    part = round_rows(weight[1100:1200], hessian, rounding_grid(kind, packed[1100:1200], 32))
    assert torch.equal(whole[1100:1200], part)


@pytest.mark.parametrize(
    "place",
    [
        Place("x"),
        Place("x", heads=4),
        Place("x", steps=("value_rows",)),
        Place("x", steps=("value_columns",)),
        Place("x", fused=Fused("x", ("a", "b"), "rows"), part=1),
        Place("x", fused=Fused("x", ("a", "b"), "alternate"), part=1),
        Place("x", fused=Fused("x", ("a", "b"), "qkvz"), part=0),
    ],
    ids=lambda place: f"{place.heads or ''}{''.join(place.steps)}{place.fused.how if place.fused else ''}" or "plain",
)
def test_the_order_says_which_row_and_column_is_which(place: Place) -> None:
    rows = 96 if place.fused is not None and place.fused.how == "qkvz" else 32
    weight = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))
    (stored,) = place_pieces(weight, place, HEADS)
    order = Order.of(place, HEADS, rows, 32)
    assert order.rows is not None
    found = weight[order.rows]
    assert torch.equal(found if order.columns is None else found[:, order.columns], stored)


def test_fused_experts_have_no_rows_to_go_by() -> None:
    place = Place("x", fused=Fused("x", ("a", "b"), "rows_turned"), stacked=True)
    assert Order.of(place, HEADS, 32, 32).rows is None


def made(out: Path, *types: str, architecture: str = "llama-2", count: int = 12, **options: Any) -> VariantsReport:
    base = tiny.base(architecture)
    vocabulary = open_checkpoint(base).config["vocab_size"]
    tokens = tokenizer_file(out.parent / "tokens.gguf", vocabulary)
    rows = out.parent / "rows.safetensors"
    save_file({"input_ids": tiny.rows(count, 32)}, rows)
    found = api.quantize(base, out, bits=types, format="gguf", tokenizer_from=tokens, input_ids=rows, **options)
    assert isinstance(found, VariantsReport)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.gguf"))}


@pytest.mark.parametrize("rounding", ["one-sided", "two-sided"])
def test_a_build_with_feedback(rounding: str, tmp_path: Path) -> None:
    """Of the same size and types as one without; every layer's matrices and the head are rounded so."""
    plain = made(tmp_path / "plain", "Q4_0", "Q5_1")
    better = made(tmp_path / "better", "Q4_0", "Q5_1", rounding=rounding)
    for name, old in files(tmp_path / "plain").items():
        new = files(tmp_path / "better")[name]
        assert len(new) == len(old)
        assert new != old
    for preset, entries in better.tensors.items():
        before = {entry.tensor: entry for entry in plain.tensors[preset]}
        quantized = [entry for entry in entries if TYPES[entry.got].is_quantized]
        assert [entry.got for entry in quantized] == [before[entry.tensor].got for entry in quantized]
        said = {entry.tensor for entry in quantized if entry.rounding}
        tied = "output.weight" not in before
        assert {entry.tensor for entry in quantized} - said <= (set() if tied else {"token_embd.weight"})
        if rounding == "two-sided":
            assert any(entry.rounding.startswith("two-sided, ") for entry in quantized)
    assert not (tmp_path / "better.stats").exists()


def test_an_empty_folder_of_the_users_is_not_taken_for_statistics(tmp_path: Path) -> None:
    (tmp_path / "out.stats").mkdir()
    with pytest.raises(OutputError, match=r"out\.stats: exists, and is empty; .* remove it, or choose another out"):
        made(tmp_path / "out", "Q4_0", rounding="two-sided")
    assert (tmp_path / "out.stats").is_dir()
    assert not (tmp_path / "out").exists()


def test_experts_are_rounded_each_by_its_own_inputs(tmp_path: Path) -> None:
    report = made(tmp_path / "moe", "Q4_0", architecture="qwen2-moe", rounding="one-sided")
    (entries,) = report.tensors.values()
    experts = [entry for entry in entries if "_exps" in entry.tensor]
    assert experts
    assert all("with feedback" in entry.rounding for entry in experts)


@pytest.mark.parametrize("kind", [InputHessians, ComparedInputsOfFile])
def test_a_stopped_build_goes_on_to_the_same_bytes(
    kind: type[InputHessians | ComparedInputsOfFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"rounding": "one-sided", "compensate": kind.compensates}
    made(tmp_path / "whole", "Q4_0", **options)
    asked, ask = 0, kind.of

    def stopping(self: InputHessians, module: str, layer: int | None) -> torch.Tensor | None:
        nonlocal asked
        asked += 1
        if asked == 9:
            raise KeyboardInterrupt
        return ask(self, module, layer)

    monkeypatch.setattr(kind, "of", stopping)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "part", "Q4_0", **options)
    made(tmp_path / "part", "Q4_0", **options)
    assert files(tmp_path / "part") == files(tmp_path / "whole")


@pytest.mark.parametrize("architecture", ["llama-2", "qwen2-moe-2"])
def test_a_compensated_build_is_nearer_to_its_base(architecture: str, tmp_path: Path) -> None:
    """On rows that it was not made with; permuted rows and experts in one tensor find their places."""
    rows, kl = tiny.rows(80, 32)[64:], []
    wanted = tiny.streamed_logits(open_checkpoint(tiny.base(architecture)), rows).double().log_softmax(-1)
    for compensate in (False, True):
        out = tmp_path / f"{compensate}"
        options: dict[str, Any] = {"rounding": "one-sided", "compensate": compensate}
        made(out, "Q4_0", architecture=architecture, count=64, **options)
        (file,) = out.glob("*.gguf")
        found = tiny.streamed_logits(open_checkpoint(file), rows).double().log_softmax(-1)
        kl.append(float((wanted.exp() * (wanted - found)).sum(-1).mean()))
    assert kl[1] < 0.95 * kl[0]


def test_tensors_are_made_as_a_layer_calls_them() -> None:
    names = ["ffn_down", "ffn_up", "attn_output", "attn_v", "attn_q_b", "attn_q_a", "ffn_down_shexp", "ffn_gate_exps"]
    found = sorted(names, key=lambda name: place_in_layer(f"blk.3.{name}.weight"))
    wanted = ["attn_q_a", "attn_v", "attn_q_b", "attn_output", "ffn_up", "ffn_gate_exps", "ffn_down", "ffn_down_shexp"]
    assert found == wanted


def test_one_pass_gives_importance_and_feedback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those of an importance that a pass of its own collected, and so is the imatrix file."""
    made(tmp_path / "plain", "Q4_0", save_imatrix=tmp_path / "plain.gguf")
    loaded, load = [], LayeredModel.layer
    monkeypatch.setattr(LayeredModel, "layer", lambda self, n, *a: (loaded.append(n), load(self, n, *a))[1])
    made(tmp_path / "one", "Q4_0", rounding="one-sided", save_imatrix=tmp_path / "one.gguf")
    assert loaded == sorted(set(loaded))
    assert len(loaded) > 1
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    base, ids = open_checkpoint(tiny.base("llama-2")), tiny.rows(12, 32)
    *_, apart = collect_importance(base, ids)
    assert isinstance(apart, Importance)
    save_file({name: value.clone() for name, value in apart.values.items()}, tmp_path / "apart.safetensors")
    made(tmp_path / "two", "Q4_0", rounding="one-sided", imatrix=tmp_path / "apart.safetensors")
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize("compensate", [False, True])
def test_a_gguf_base_is_rounded_as_the_model_it_holds(compensate: bool, tmp_path: Path) -> None:
    """Rows stand in GGUF's order there; nothing is reordered twice."""
    made(tmp_path / "f", "F32")
    (base,) = (tmp_path / "f").glob("*.gguf")
    made(tmp_path / "direct", "Q4_0", rounding="one-sided", compensate=compensate)
    api.quantize(
        base, tmp_path / "again", bits=("Q4_0",), format="gguf", input_ids=tmp_path / "rows.safetensors",
        rounding="one-sided", compensate=compensate,
    )  # fmt: skip
    (first,), (second,) = ((tmp_path / name).glob("*.gguf") for name in ("direct", "again"))
    one, other = open_gguf(first), open_gguf(second)
    for name, tensor in one.tensors.items():
        assert one.read(tensor) == other.read(name), name
