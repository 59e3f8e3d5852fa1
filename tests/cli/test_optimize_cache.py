"""model_optimize --context: one size for weights and cache, measured on a trained tiny model, and what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import recompile
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_optimize import main
from recompile.model.kv_cache import SimulatedCache
from recompile.recipe.recipe import load_recipe
from tests.stream import architectures
from tests.stream.test_kv_cache import logits_through

pytest.importorskip("libgguf")
VALUES = 2 * 4 * 4 * 64  # a token: keys and values, layers, heads, values of a head


@pytest.fixture(scope="module")
def profile(tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "profile.jsonl"
    recompile.profile(
        tiny_models["tiny-dense"], candidates=["2", "3", "4", "6"], mode="sketch", rows=2, length=64, out=path
    )
    return path


def run(profile: Path, *words: str) -> Any:
    out = profile.with_name("mix.yaml")
    arguments = [str(profile), "-o", str(out), "--no-check", "--solver", "exact", "-r", "2", "-l", "64", "--quiet"]
    return CliRunner().invoke(main, [*arguments, "--force", *words])


def test_weights_and_cache_share_a_size(profile: Path) -> None:
    report = profile.with_name("mix.json")
    caches = ("f16", "8", "q8_0,q4_0", "q4_0")
    result = run(profile, "--size", "3MiB", "--context", "1024", "--cache-bits", *caches, "--json", str(report))
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    options = found["cache"]["options"]
    bits = (16, 8.5, 6.5, 4.5)
    assert [option["cost"]["size_bytes"] for option in options] == [round(1024 * VALUES * each / 8) for each in bits]
    assert [option["cost"]["name"] for option in options] == list(caches)
    assert options[0]["weights_kl_nats"] is None, "f16 alone takes 4 MiB"
    costs = [option["cost"]["kl_nats"] for option in options]
    assert costs == sorted(costs)
    chosen = options[found["cache"]["number"]]
    assert found["total_bytes"] + chosen["cost"]["size_bytes"] <= 3 * 2**20
    assert found["predicted_kl_nats"] == pytest.approx(chosen["weights_kl_nats"])
    assert found["predicted_kl_nats"] + chosen["cost"]["kl_nats"] == pytest.approx(
        min(o["weights_kl_nats"] + o["cost"]["kl_nats"] for o in options if o["weights_kl_nats"] is not None)
    )
    said = f"Run with {chosen['cost']['flags']}"
    assert said in result.stdout
    text = profile.with_name("mix.yaml").read_text()
    assert f"# {said} at 1024 tokens." in text
    provenance = load_recipe(profile.with_name("mix.yaml")).provenance
    assert provenance is not None
    assert provenance["cache"]["flags"] == chosen["cost"]["flags"]
    assert provenance["cache"]["with_weights_bytes"] == 3 * 2**20


def test_what_is_measured_is_what_model_diff_measures(profile: Path, tiny_models: Mapping[str, Path]) -> None:
    found = recompile.optimize(
        profile, profile.with_name("mix.yaml"), size="8MiB", context=64, cache_bits=["q4_0"], check=False,
        solver="exact", rows=2, length=64,
    )  # fmt: skip
    assert found.cache is not None
    base = open_checkpoint(tiny_models["tiny-dense"])
    from eval.mixes.mixes_file import MixesFile
    from eval.search.cache_costs import measure_caches
    from recompile.formats.cache_types import parse_cache
    from recompile.model.rows import RowOptions

    rows, vocab = RowOptions(2, 64).read([base.path], "choose")
    assert rows.sha256 == found.cache.rows_sha256
    file = MixesFile(profile.with_name("other.json"))
    (cost,) = measure_caches(base, [parse_cache("q4_0")], 64, rows, file, vocab=vocab)
    assert cost == found.cache.chosen.cost
    assert found.cache.chosen.cost.kl_nats > 0


def test_caches_are_measured_once(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever context is asked about next, with whichever other caches; not on other rows."""
    from eval.search import cache_costs

    asked: list[int] = []
    measure = cache_costs.measure_many

    def counted(candidates: list[Any], *rest: Any) -> Any:
        asked.append(len(candidates))
        return measure(candidates, *rest)

    monkeypatch.setattr(cache_costs, "measure_many", counted)
    out, report = profile.with_name("again.yaml"), profile.with_name("again.json")

    def costs(*words: str) -> dict[str, float]:
        result = run(profile, "--size", "4MiB", "--json", str(report), *words, "-o", str(out))
        assert result.exit_code == 0, result.output
        options = json.loads(report.read_text())["cache"]["options"]
        return {option["cost"]["name"]: option["cost"]["kl_nats"] for option in options}

    first = costs("--context", "256", "--cache-bits", "q8_0", "4")
    assert asked == [2]
    assert costs("--context", "512", "--cache-bits", "4", "q8_0") == first
    assert asked == [2]
    third = costs("--context", "512", "--cache-bits", "4", "q4_0", "q8_0")
    assert asked == [2, 1], "only the new one"
    assert {name: third[name] for name in first} == first
    costs("--context", "512", "--cache-bits", "4", "-l", "48")
    assert asked == [2, 1, 1], "other rows"
    lines = out.with_name("again.mixes.json").read_text().splitlines()
    damaged = [line.replace('"mean"', '"meen"') for line in lines]
    out.with_name("again.mixes.json").write_text("\n".join(damaged) + "\n")
    result = run(profile, "--size", "4MiB", "--context", "64", "--cache-bits", "4", "-o", str(out))
    assert result.exit_code == 1
    assert "again.mixes.json:2: " in result.output


def test_f16_is_counted_where_no_cache_is_named(profile: Path) -> None:
    report = profile.with_name("mix.json")
    result = run(profile, "--size", "3MiB", "--context", "256", "--json", str(report))
    assert result.exit_code == 0, result.output
    (option,) = json.loads(report.read_text())["cache"]["options"]
    assert (option["cost"]["name"], option["cost"]["size_bytes"]) == ("f16", 256 * VALUES * 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-b", "3.5", "--context", "64"), "--context: goes with --size"),
        (("--size", "3MiB", "--cache-bits", "8"), "--cache-bits: goes with --context"),
        (("--size", "3MiB", "--context", "64", "--cache-bits", "q8"), '--cache-bits: "q8": no engine stores a cache'),
        (("--size", "1MiB", "--context", "4096", "--cache-bits", "q4_0"), "give more --size, less --context"),
        (("--frontier", "3:4:0.5", "--context", "64"), "has its own budgets"),
    ],
)
def test_what_is_refused(profile: Path, words: tuple[str, ...], message: str) -> None:
    result = run(profile, *words)
    assert result.exit_code == 1
    assert message in result.output


def test_layers_with_a_window_hold_no_more_than_it() -> None:
    """gpt-oss: one layer of 6 tokens, one of all; 2 heads of 8."""
    from eval.diff import CacheUsed
    from recompile.formats.cache_types import parse_cache

    cache = parse_cache("f16")
    source = open_checkpoint(architectures.checkpoint("gpt-oss"))
    seen = SimulatedCache.of(cache, "gpt_oss")
    _, ran = logits_through(source, architectures.rows(1, 9), seen.storing)
    ran.stored_as = cache
    used = CacheUsed.of(cache, ran, 2)
    a_layer = 2 * 2 * 8 * 2  # keys and values, heads, values, bytes
    assert used.windows == ((None, a_layer), (6, a_layer))
    assert used.bytes_per_token == 2 * a_layer
    assert [used.bytes_at(context) for context in (4, 100)] == [4 * 2 * a_layer, (100 + 6) * a_layer]


def test_a_latent_keeps_its_rotary_part_in_sixteen_bits() -> None:
    from recompile.formats.cache_types import parse_cache

    source = open_checkpoint(architectures.checkpoint("deepseek-v3"))
    _, ran = logits_through(source, architectures.rows(1, 9), lambda module, keys, values: (keys, values))
    ran.stored_as = parse_cache("4")
    assert ran.bytes_per_token() == {None: 2 * (16 * 4.5 + 4 * 16) / 8}
