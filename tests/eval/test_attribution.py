"""KL by groups: what a recipe with that group alone costs, noise of the size of the error, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import recompile
from eval.attribution import Attribution, AttributionOptions, Noised, attribute
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main
from recompile.errors import ArgumentError, JournalError
from recompile.events import OnEvent, ignore
from recompile.merge.overlay import build_overlay
from recompile.model.stream import LayeredModel
from tests import tiny
from tests.stream import architectures

KINDS = ("llama-tied", "qwen2-moe")


def attributed(kind: str, bits: int = 3, on_event: OnEvent = ignore, **more: object) -> Attribution:
    base, variant = open_checkpoint(tiny.base(kind)), open_checkpoint(tiny.variants(kind, (bits,))[bits])
    options = AttributionOptions(**more)  # type: ignore[arg-type]
    return attribute(build_overlay(variant, None), base, tiny.rows(3, 16), options, on_event)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_costs_what_the_base_with_that_group_alone_does(kind: str, tmp_path: Path) -> None:
    found = attributed(kind, level="block")
    save_file({"input_ids": tiny.rows(3, 16)}, tmp_path / "ids.safetensors")
    assert len({module for each in found.groups for module in each.modules}) == sum(
        len(g.modules) for g in found.groups
    )
    for each in (found.groups[0], found.groups[len(found.groups) // 2]):
        lines = "".join(f"  - {{key: '{module}.*', source: a}}\n" for module in each.modules)
        recipe = tmp_path / "one.yaml"
        recipe.write_text(f"sources: [{{id: a, model_dir: '{tiny.variants(kind, (3,))[3]}'}}]\noverrides:\n{lines}")
        alone = recompile.diff(tiny.base(kind), tiny.base(kind), recipe=recipe, input_ids=tmp_path / "ids.safetensors")
        assert each.kl_rows == pytest.approx(alone.report.kl_rows, rel=1e-3, abs=1e-7)
    assert [each.kl.mean for each in found.groups] == sorted((each.kl.mean for each in found.groups), reverse=True)
    assert found.total.mean == pytest.approx(sum(each.kl.mean for each in found.groups))
    assert found.total_noise is None


def test_noise_is_as_large_as_the_error_and_has_no_part_in_it() -> None:
    base, variant = open_checkpoint(tiny.base("llama-tied")), open_checkpoint(tiny.variants("llama-tied", (3,))[3])
    noised = Noised.like(build_overlay(variant, None), base)
    seen = []
    for name, module in variant.modules.items():
        if not module.is_quantized:
            assert torch.equal(noised.load(f"{name}.weight"), base.load(f"{name}.weight").float())
            continue
        clean = base.load(f"{name}.weight").float()
        noise, error = noised.load(f"{name}.weight") - clean, variant.load(f"{name}.weight").float() - clean
        assert float(noise.norm()) == pytest.approx(float(error.norm()), rel=1e-4)
        assert abs(float(torch.cosine_similarity(noise.flatten(), error.flatten(), 0))) < 0.1
        seen.append(noise.flatten()[:64] / noise.norm())
    assert float((seen[0] - seen[1]).norm()) > 0.01, "every tensor has draws of its own"


def test_noise_costs_what_a_checkpoint_with_that_noise_does(tmp_path: Path) -> None:
    found = attributed("llama-tied", level="tensor", iso=True)
    base, variant = open_checkpoint(tiny.base("llama-tied")), open_checkpoint(tiny.variants("llama-tied", (3,))[3])
    noised = Noised.like(build_overlay(variant, None), base)
    each = found.groups[1]
    (module,) = each.modules
    directory = tiny.copy_of(tiny.base("llama-tied"), tmp_path / "noised")
    stored = load_file(directory / "model.safetensors")
    stored = {name: value.float() for name, value in stored.items()}
    stored[f"{module}.weight"] = noised.load(f"{module}.weight")
    save_file(stored, directory / "model.safetensors")
    save_file({"input_ids": tiny.rows(3, 16)}, tmp_path / "ids.safetensors")
    alone = recompile.diff(directory, tiny.base("llama-tied"), input_ids=tmp_path / "ids.safetensors")
    assert each.noise_rows == pytest.approx(alone.report.kl_rows, rel=1e-3, abs=1e-7)
    assert each.noise is not None
    assert each.against_noise == pytest.approx(each.kl.mean / each.noise.mean)
    assert found.total_noise is not None
    clean = base.load(f"{module}.weight").float()
    assert each.relative_error == pytest.approx(
        float((variant.load(f"{module}.weight").float() - clean).norm() / clean.norm()), rel=1e-4
    )


def test_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    """GPT-2's are [in, out] where the build's are [out, in]."""
    base = architectures.checkpoint("gpt2")
    save_file({"input_ids": architectures.rows(2, 9)}, tmp_path / "ids.safetensors")
    ids = tmp_path / "ids.safetensors"
    recompile.quantize(base, tmp_path / "gpt2", bits=[4], method="rtn", group_size=32, input_ids=ids)
    made = open_checkpoint(tmp_path / "gpt2" / "4bpw")
    options = AttributionOptions(level="tensor", iso=True)
    found = attribute(build_overlay(made, None), open_checkpoint(base), architectures.rows(2, 9), options)
    assert all(0 < each.relative_error < 0.3 for each in found.groups)
    assert all(each.kl.mean > 0 for each in found.groups)
    assert found.total_noise is not None
    assert 0.2 < found.total.mean / found.total_noise.mean < 5, "rounding to nearest is about as bad as noise"


def test_models_larger_than_memory_are_streamed_and_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = attributed("llama-tied")
    loads = []
    layer = LayeredModel.layer
    monkeypatch.setattr(LayeredModel, "layer", lambda self, *a, **k: (loads.append(1), layer(self, *a, **k))[1])
    monkeypatch.setattr("eval.attribution.MEMORY_SHARE", 1e-9)
    monkeypatch.setattr("eval.profile.exact.plan_memory", _streamed)
    assert attributed("llama-tied") == whole
    assert len(loads) > 2 * LayeredModel.of(open_checkpoint(tiny.base("llama-tied"))).depth


def _streamed(*arguments: object) -> object:
    from eval.profile.exact import MemoryPlan

    assert arguments[2] is not None, "a cap is set where the weights take too much"
    return MemoryPlan(0, 0, 0, 0, 0, 2)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    journal = tmp_path / "diff.json.journal"
    events: list[object] = []

    def stop_after_three(event: object) -> None:
        events.append(event)
        if len(events) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attributed("llama-tied", journal=journal, on_event=stop_after_three)
    kept = len(journal.read_text().splitlines())
    assert kept >= 3
    assert attributed("llama-tied", journal=journal) == attributed("llama-tied")
    assert len(journal.read_text().splitlines()) > kept
    with pytest.raises(JournalError, match="of another measurement"):
        attributed("llama-tied", bits=4, journal=journal)


def test_the_command(tmp_path: Path) -> None:
    save_file({"input_ids": tiny.rows(3, 16)}, tmp_path / "ids.safetensors")
    base, three = tiny.base("llama-tied"), tiny.variants("llama-tied", (3,))[3]
    out = tmp_path / "diff.json"
    common = ["-ma", three, "-mb", base, "--input-ids", tmp_path / "ids.safetensors", "--quiet"]
    result = CliRunner().invoke(main, [*map(str, common), "--attribute", "--iso", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "A's groups (fused), each by itself in B:" in result.stdout
    assert "KL / noise" in result.stdout
    found = json.loads(out.read_text())["attribution"]
    assert found["level"] == "fused"
    assert found["groups"][0]["kl"]["mean"] >= found["groups"][-1]["kl"]["mean"]
    assert not (tmp_path / "diff.json.journal").exists()
    for arguments, message in (
        (("--iso",), "--iso: goes with --attribute"),
        (("--attribute", "module"), "'module' is not one of"),
        (("-ma", str(three), "--attribute"), "--attribute goes with one -ma"),
    ):
        refused = CliRunner().invoke(main, [*map(str, common), *arguments])
        assert refused.exit_code != 0
        assert message in refused.output
    with pytest.raises(ArgumentError, match="stores no module quantized"):
        recompile.diff(base, base, input_ids=tmp_path / "ids.safetensors", attribute="fused")
