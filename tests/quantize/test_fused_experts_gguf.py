"""Experts that a Hugging Face base keeps in one tensor, on the way to GGUF: importance and candidates, one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from recompile.gguf.imatrix import read_imatrix, write_imatrix
from recompile.quantize.gguf import (
    Importance,
    VariantsReport,
    base_tensors,
    collect_importance,
    imatrix_of,
    importance_from,
    plan_variants,
)
from recompile.quantize.gguf_build import build_variants
from recompile.quantize.gguf_mix import read_mix
from recompile.quantize.lazy_variant import make_variants, spec_of
from tests import gguf_tiny
from tests.gguf.test_architecture_logits import golden
from tests.quantize.test_fused_experts import EXPERTS

pytest.importorskip("libgguf")
NAMES = ["gpt-oss", "llama4", "granitemoe", "gemma4 experts"]  # gate and up in turn, turned, as they are, kept together
IDS = torch.arange(64).reshape(4, 16) * 7 % gguf_tiny.VOCAB


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    """A base of fused experts, and a folder with its float32 GGUF file."""
    work = tmp_path_factory.mktemp("fused")
    base = open_checkpoint(gguf_tiny.write_tiny(work / "base", golden()[request.param], gguf_tiny.sound_values))
    assert base.fused
    write_gguf(work / "t.gguf", [encode_key("tokenizer.ggml.tokens", ["x"] * gguf_tiny.VOCAB)], [])
    variants(base, work, ["F32"])
    return base, work


def variants(base: Checkpoint, work: Path, names: list[str], importance: Importance | None = None) -> VariantsReport:
    plan = plan_variants(
        base, work, names, stem="base", tokenizer_from=open_gguf(work / "t.gguf"), importance=importance
    )
    *_, report = build_variants(plan)
    assert isinstance(report, VariantsReport)
    return report


def importance_of(base: Checkpoint) -> Importance:
    *_, found = collect_importance(base, IDS)
    assert isinstance(found, Importance)
    return found


def test_importance_is_that_of_the_file_with_experts_in_parts(made: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    """The GGUF file's experts are other tensors, which run through another path."""
    base, work = made
    file = open_checkpoint(work / "base-F32.gguf")
    ours, theirs = (
        imatrix_of(importance_of(checkpoint), base_tensors(checkpoint), IDS.shape[1]) for checkpoint in (base, file)
    )
    assert ours.entries.keys() == theirs.entries.keys()
    experts = [name for name in ours.entries if "_exps" in name]
    assert len(experts) >= 2
    for name, wanted in theirs.entries.items():
        assert np.array_equal(ours.entries[name].counts, wanted.counts), name
        assert np.allclose(ours.entries[name].sum_squares, wanted.sum_squares, rtol=1e-3, atol=1e-4), name
    for name in experts:
        assert ours.entries[name].sum_squares.shape[0] == EXPERTS
    write_imatrix(tmp_path / "i.gguf", ours)
    again = importance_from(read_imatrix(tmp_path / "i.gguf"), base_tensors(base), "i.gguf")
    found = importance_of(base)
    for name, value in again.values.items():
        assert torch.allclose(value, found.values[name], rtol=1e-5), name
    reached = {names for tensor in base_tensors(base) for names in tensor.modules if names[0] in found.tokens}
    for name in (name for names in reached for name in names if ".experts." in name):
        assert (name in again.values) == (found.tokens[name] > 0), name


def test_candidates_made_on_the_fly_are_the_files_experts(made: tuple[Checkpoint, Path]) -> None:
    base, work = made
    found = importance_of(base)
    report = variants(base, work, ["Q4_0"], found)
    assert not any("experts" in note.note for note in report.noted("Q4_0"))
    file = open_checkpoint(work / "base-Q4_0.gguf")
    ((_, variant),) = make_variants(base, [spec_of("Q4_0")], found.values)
    seen = [name for tensor in base_tensors(base) if "_exps.weight" in tensor.name for name in tensor.seen]
    assert len(seen) >= 2 * EXPERTS
    for name in seen:
        have = variant.load(name)
        assert variant.modules[name.removesuffix(".weight")].format == "gguf"
        assert not torch.equal(have, base.load(name).float())
        if file.has(name):  # Gemma 4's have gate and up together
            assert torch.equal(have, file.load(name).float()), name


def test_a_recipe_gives_the_experts_of_a_tensor_one_type(made: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    base, _ = made
    (tmp_path / "mix.yaml").write_text(
        "base: {type: Q4_0}\nsources: [{id: Q8_0, type: Q8_0}]\noverrides: [{key: '*.experts.*', source: Q8_0}]\n"
    )
    mix, _, _ = read_mix(tmp_path / "mix.yaml", base, tmp_path / "mix.gguf")
    assert {kind for name, kind in mix.kinds.items() if "_exps" in name} == {"Q8_0"}
    assert {kind for name, kind in mix.kinds.items() if "attn_" in name} == {"Q4_0"}
