"""EXL3 from end to end on a tiny model: two variants, a merge, what it measures and what the files say."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from eval.diff import DiffReport, compare
from recompile.checkpoint.checkpoint import WeightSource, open_checkpoint
from recompile.merge.check import check_checkpoint
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
from recompile.quantize.encoders import Exl3Encoder
from recompile.quantize.pipeline import BuildOptions, quantize_model
from tests import tiny


def kl(candidate: WeightSource, reference: WeightSource) -> float:
    *_, report = compare(candidate, reference, tiny.rows(4, 24))
    assert isinstance(report, DiffReport)
    return report.kl.mean


@pytest.mark.parametrize("search", ["quick", pytest.param("best", marks=pytest.mark.sweep)])
def test_a_mix_of_two_bitrates_lies_between_them(search: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if search == "quick":
        request.getfixturevalue("quick_exl3")
    base = open_checkpoint(tiny.base("llama-1"))
    for _ in quantize_model(base, tmp_path, Exl3Encoder([3, 4]), tiny.rows(8, 24, seed=2), BuildOptions(head=True)):
        pass
    low, high = (open_checkpoint(tmp_path / name) for name in ("3bpw", "4bpw"))
    assert low.formats == ("exl3",)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text(
        f"sources: [{{id: 4, model_dir: {tmp_path}/4bpw}}]\noverrides: [{{key: '*.mlp.*', source: 4}}]\n",
        encoding="utf-8",
    )
    mix = build_overlay(low, recipe)
    with closing(execute(plan_write(mix, tmp_path / "out"))) as steps:
        for _ in steps:
            pass
    written = open_checkpoint(tmp_path / "out")
    assert [p for p in check_checkpoint(tmp_path / "out") if p.severity == "error"] == []
    assert kl(low, base) > kl(written, base) > kl(high, base) > 0
    assert kl(mix, base) == kl(written, base)
    for name, stored in written.modules.items():
        source = high if ".mlp." in name else low
        for part, info in stored.parts.items():
            assert written.read_bytes(info) == source.read_bytes(source.modules[name].parts[part]), info.name
