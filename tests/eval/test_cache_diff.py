"""A candidate through quantized caches: alone as in a sweep, keys and values apart, as in the engines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import recompile
from eval.metrics import paired_difference
from eval.run_diff import ModelDiff
from recompile.cli.model_diff import main
from recompile.errors import ArgumentError, FormatError
from recompile.model.texts import default_text
from recompile.model.tokenizer import load_tokenizer
from recompile.model.tokens import make_rows
from tests import tiny
from tests.engine_models import installed, sharpened, write_files

pytest.importorskip("libgguf")
SWEEP = ("8", "3", "q8_0,q4_0", "ik:q4_0", "f16")


@pytest.fixture(scope="module")
def model(tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers of 4 key-value heads of 64."""
    return sharpened(tiny_models["tiny-dense"], tmp_path_factory.mktemp("cache") / "tiny")


@pytest.fixture(scope="module")
def ids(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "ids.safetensors"
    save_file({"input_ids": make_rows(default_text(), load_tokenizer(model), 3, 96, "report").ids}, path)
    return path


@pytest.fixture(scope="module")
def swept(model: Path, ids: Path) -> ModelDiff:
    return recompile.diff(model, model, input_ids=ids, cache_sweep=SWEEP)


def test_a_sweep_is_every_cache_alone_and_leaves_the_candidate_as_it_is(
    swept: ModelDiff, model: Path, ids: Path
) -> None:
    assert swept.report.identical, "model A is model B, and no cache of its own"
    assert swept.report.cache is None
    assert [point.cache.name for point in swept.cache_sweep] == list(SWEEP)
    for point in swept.cache_sweep[:3]:
        alone = recompile.diff(model, model, input_ids=ids, cache_quant=point.cache.name)
        assert alone.report.kl_rows == point.kl_rows
        assert alone.report.cache == point.cache
        assert alone.report.score_candidate.perplexity == point.perplexity
        mean, interval = paired_difference(torch.tensor(point.kl_rows), torch.tensor(swept.report.kl_rows))
        assert (point.difference, point.interval) == (mean, interval)


def test_fewer_bits_cost_more_and_a_rotation_helps(swept: ModelDiff) -> None:
    kl = {point.cache.name: point.kl.mean for point in swept.cache_sweep}
    assert kl["f16"] < 1e-5 < kl["8"] < kl["q8_0,q4_0"] < kl["3"]
    assert kl["q8_0,q4_0"] < kl["ik:q4_0"]


def test_a_grid_has_every_pair_in_as_many_passes_as_memory_wants(
    model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval import run_diff
    from recompile.formats.cache_types import parse_sweep

    assert len(parse_sweep(["exllamav3-grid"])) == 49
    assert len(parse_sweep(["llama.cpp-grid", "q8_0"])) == 25
    names = [f"{keys},{values}" for keys in ("8", "3") for values in ("8", "4", "3")]
    passes: list[int] = []
    measure = run_diff.measure_many

    def counted(sources: list[object], *rest: object, **more: object) -> object:
        passes.append(len(sources))
        return measure(sources, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(run_diff, "measure_many", counted)
    at_once = recompile.diff(model, model, input_ids=ids, cache_sweep=names)
    assert passes == [7]
    grid = at_once.cache_grid
    assert grid is not None
    assert (grid.keys, grid.values) == (("8", "3"), ("8", "4", "3"))
    for keys, row in zip(grid.keys, grid.kl, strict=True):
        assert list(row) == sorted(row), "fewer bits of values cost more"
        for values, kl in zip(grid.values, row, strict=True):
            name = keys if keys == values else f"{keys},{values}"
            assert kl == next(point.kl.mean for point in at_once.cache_sweep if point.cache.name == name)
    monkeypatch.setattr(run_diff, "_states_at_once", lambda *_: 3)
    few = recompile.diff(model, model, input_ids=ids, cache_sweep=names)
    assert passes[1:] == [3, 3, 1]
    assert few.cache_sweep == at_once.cache_sweep
    assert recompile.diff(model, model, input_ids=ids, cache_sweep=names[:5]).cache_grid is None


def test_what_is_said_of_a_cache(swept: ModelDiff) -> None:
    point = swept.cache_sweep[2]
    values = 4 * 4 * 64  # layers, heads, values of a head
    assert point.cache.bytes_per_token == values * (8.5 + 4.5) / 8
    assert (point.cache.layers, point.cache.of_layers) == (4, 4)
    assert point.cache.flags == "-ctk q8_0 -ctv q4_0 -fa on"
    assert point.bits == 6.5


def test_keys_and_values_are_quantized_apart(model: Path, ids: Path) -> None:
    both, keys, values = (
        recompile.diff(model, model, input_ids=ids, cache_quant=name).report.kl.mean
        for name in ("q4_0", "q4_0,f16", "f16,q4_0")
    )
    assert 0 < values < both
    assert 0 < keys < both


def test_many_candidates_share_a_cache(model: Path, ids: Path) -> None:
    found = recompile.diff_many([model, model], model, input_ids=ids, cache_quant="4")
    alone = recompile.diff(model, model, input_ids=ids, cache_quant="4")
    assert [diff.report.kl_rows for diff in found.diffs] == [alone.report.kl_rows] * 2


def test_greedy_runs_attend_through_the_cache(model: Path) -> None:
    runs = {
        name: recompile.diff(model, model, rows=1, length=64, divergence="4x24", cache_quant=name).divergence
        for name in (None, "2")
    }
    assert all(found is not None for found in runs.values())
    assert runs[None].finished == (True,) * 4  # type: ignore[union-attr]
    assert not all(runs["2"].finished)  # type: ignore[union-attr]


def test_heads_that_no_group_divides_are_refused(tmp_path: Path) -> None:
    save_file({"input_ids": tiny.rows(1, 16)}, tmp_path / "ids.safetensors")
    base = tiny.base("llama-tied")
    with pytest.raises(FormatError, match="heads have 16 values"):
        recompile.diff(base, base, input_ids=tmp_path / "ids.safetensors", cache_quant="q8_0")


def test_the_command(model: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "diff.json"
    arguments = ["-ma", model, "-mb", model, "--input-ids", ids, "--quiet", "--json", out]
    result = CliRunner().invoke(main, [*map(str, arguments), "-cq", "8", "-cqs", "q8_0", "ik:q4_0"])
    assert result.exit_code == 0, result.output
    assert "A's cache:     8 as exllamav3 stores it (-cq 8): 8.5 bits a value of keys" in result.stdout
    assert "A through quantized caches; 4 of 4 layers attend through one" in result.stdout
    report = json.loads(out.read_text())
    assert report["cache"]["name"] == "8"
    assert [point["cache"]["name"] for point in report["cache_sweep"]] == ["q8_0", "ik:q4_0"]
    assert report["cache_sweep"][0]["difference"]["mean"] == pytest.approx(
        report["cache_sweep"][0]["kl"]["mean"] - report["kl"]["mean"], abs=1e-9
    )
    result = CliRunner().invoke(main, [*map(str, arguments), "-cqs", "8", "8,4", "4,8", "4", "--force"])
    assert "KL by keys (down) and values (across):" in result.stdout
    assert len(json.loads(out.read_text())["cache_sweep"]) == 4
    wrong = CliRunner().invoke(main, [*map(str, arguments[:7]), "-cqs", "q8"])
    assert wrong.exit_code == 1
    assert "--cache-quant-sweep" in wrong.output
    assert "did you mean q8_0?" in wrong.output
    two = CliRunner().invoke(main, [*map(str, ["-ma", model, *arguments[:7]]), "-cqs", "8"])
    assert "--cache-quant-sweep goes with one -ma" in two.output


# ---- against the engines ---------------------------------------------------------------------------------------------

# How far the engine's KL may be from ours, and KL(torch || engine) of the same candidate, both in KLs of the cache.
# Two caches of unlike layouts come to about 2 there. ik_llama.cpp writes 4-bit keys in a way of its own.
NEAR = {"llama.cpp": (0.05, 0.05), "ik_llama.cpp": (0.4, 0.8)}


@pytest.mark.parametrize("engine", ["llama.cpp", "ik_llama.cpp"])
@pytest.mark.parametrize(
    "cache", ["q8_0,q4_0", *(pytest.param(kind, marks=pytest.mark.sweep) for kind in ("q4_0", "iq4_nl"))]
)
def test_kl_is_that_of_the_engine_with_such_a_cache(engine: str, cache: str, files: Path) -> None:
    installed(engine)
    found = recompile.engine_diff(
        files, files, engine=engine, chunks=4, length=192, threads=1, cache_quant=cache
    ).report
    assert found.torch is not None
    assert found.cache == (f"ik:{cache}" if engine == "ik_llama.cpp" else cache)
    ours, theirs = found.torch.kl.kl.mean, found.kl.kl.mean
    assert ours > 1e-3
    means, tokens = NEAR[engine] if cache != "q8_0,q4_0" else (0.05, 0.1)
    assert theirs == pytest.approx(ours, rel=means)
    assert found.torch.engine_candidate.kl.mean < tokens * ours
    assert found.torch.engine_reference is not None
    assert found.torch.engine_reference.kl.mean < 1e-5


@pytest.fixture(scope="module")
def files(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In F32, where engines round no activations."""
    (made,) = write_files(model, tmp_path_factory.mktemp("files"), ["F32"], None)
    return made


def test_what_engines_do_not_store(files: Path) -> None:
    installed("llama.cpp")
    with pytest.raises(ArgumentError, match=r'"8": llama.cpp stores no such cache'):
        recompile.engine_diff(files, files, chunks=1, cache_quant="8")
