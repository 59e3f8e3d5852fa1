"""model_optimize as people type it, on tiny variants with a profile made up in a journal."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from eval.search.kl_limit import MeasuredLimit
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import load_profile
from recompile.errors import RecompileError
from recompile.merge.overlay import build_overlay
from recompile.optimize.choose import Choice
from recompile.recipe.recipe import load_recipe
from tests.journals import unsealed
from tests.optimize_runs import FEW, by_hand, optimize, overlay_of, run, sources_of, write_profile


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profile.jsonl")
    return tmp_path / "profile.jsonl"


def test_the_recipe_has_globs_and_resolves_to_the_choice(tmp_path: Path) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile)
    report = optimize(profile, "-b", "3.9", "--pin", "*.v_proj=6", "--ban", "*=2")
    overlay = overlay_of(profile, header)
    assert overlay.warnings == ()
    directories = {candidate.label: candidate.model_dir for candidate in header.candidates}
    for group in header.groups:
        label = sources_of(report)[group.name]
        assert label != "2"
        for module in group.modules:
            assert overlay.placements[module].source == (None if label == header.base else directories[label])
    assert overlay.accounting.bpw == report["bpw"] <= 3.9
    recipe = load_recipe(profile.with_name("mix.yaml"))
    assert "model.layers.*.self_attn.v_proj.*" in [override.key for override in recipe.overrides]
    assert len(recipe.provenance["profile"]["sha256"]) == 64
    assert set(recipe.provenance["profile"]["sources"]) == {"2", "3", "4", "6"}


def test_sources_that_are_gone_give_a_plain_recipe_and_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile)
    text = unsealed(profile).read_text()
    for candidate in header.candidates:
        text = text.replace(json.dumps(candidate.model_dir), json.dumps(f"gone/{candidate.id}bpw"))
    profile.write_text(text)
    result = run(profile, "-b", "3.9", "-o", tmp_path / "mix.yaml", "--pin", "*.v_proj=6")
    assert result.exit_code == 0
    assert "the sources are not available" in result.output
    recipe = load_recipe(tmp_path / "mix.yaml")
    assert not any("*" in override.key.removesuffix(".*") for override in recipe.overrides)


def test_an_engine_ties_what_it_fuses(profile: Path) -> None:
    chosen = sources_of(optimize(profile, "-b", "3.7", "--engine", "vllm"))
    for layer in range(2):
        assert len({chosen[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert len({chosen[f"model.layers.{layer}.mlp.{name}_proj"] for name in ("gate", "up")}) == 1
    refused = run(profile, "-b", "3.7", "--engine", "exllamav3", "-o", profile.with_name("no.yaml"))
    assert refused.exit_code == 1
    assert "exllamav3 does not read pack-quantized" in refused.output
    assert not profile.with_name("no.yaml").exists()


def test_ties(profile: Path) -> None:
    chosen = sources_of(optimize(profile, "-b", "3.7", "--tie", "*.down_proj"))
    assert len({source for module, source in chosen.items() if module.endswith("down_proj")}) == 1


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_spellings_of_one_budget(profile: Path) -> None:
    report = optimize(profile, "-b", "3.7")
    for words in (["--bits", "3.7"], ["--target-bpw", "3.7"]):
        assert optimize(profile, *words)["choice"] == report["choice"]
    size = report["total_bytes"]
    for words in (["--size", str(size)], ["--target-size", f"{size / 2**30:.12f}G"]):
        assert optimize(profile, *words)["total_bytes"] <= size


def test_pools_count_what_their_globs_name_besides(profile: Path) -> None:
    header = load_profile(profile).header
    base = open_checkpoint(header.candidate(header.base).model_dir)
    embedding = base.modules["model.embed_tokens"].size_bytes
    attention = [g for g in header.groups if "self_attn" in g.name]
    room = sum(g.bits["4"] for g in attention) // 8
    report = optimize(
        profile,
        *("--pool", f"gpu=*.self_attn.*,*.embed_tokens:{room + embedding}"),
        *("--pool", "cpu=*.mlp.*:40KiB"),
    )
    used = sum(g.bits[report["choice"][g.name]] for g in attention) // 8
    assert room - 2000 < used <= room
    assert sum(g.bits[report["choice"][g.name]] for g in header.groups if ".mlp." in g.name) <= 8 * 40 * 1024


def test_active_bits_of_a_moe(tmp_path: Path) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile, "qwen2-moe")
    report = optimize(profile, "--active-bpw", "3.6")
    bits = weights = 0.0
    for group in header.groups:
        share = 0.5 if ".experts." in group.name else 1.0  # 2 of 4 experts
        bits += share * group.bits[report["choice"][group.name]]
        weights += share * group.weights
    assert 3.5 < bits / weights <= 3.6
    refused = run(tmp_path / "profile.jsonl", "--active-bpw", "1")
    assert refused.exit_code == 1
    assert "--active-bpw 1 binds" in refused.output


def test_limits_on_kl_and_perplexity(profile: Path) -> None:
    report = optimize(profile, "--max-ppl-increase", "30%")
    assert report["predicted_kl_nats"] <= 0.2623643
    assert optimize(profile, "--max-kl", "0.26236426")["choice"] == report["choice"]
    assert report["limit"] is None, "--no-check: predicted only"


def test_a_limit_on_kl_holds_for_what_is_measured(profile: Path) -> None:
    """The size that the made-up profile predicts measures more than the limit."""
    predicted = optimize(profile, "--max-kl", "0.1")
    output = profile.with_name("report.json")
    words = ("--max-kl", "0.1", "-r", "6", "-l", "24", "-o", profile.with_name("mix.yaml"), "--json", output)
    result = run(profile, *words, "--no-guard")
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    limit, verdict = report["limit"], report["verdict"]
    assert limit["tried"][0][0] == predicted["bits"]
    assert limit["tried"][0][1] > 0.1 >= limit["measured_kl_nats"]
    assert limit["tried"][-1] == [report["bits"], limit["measured_kl_nats"]]
    assert verdict["rows_sha256"] != limit["rows_sha256"], "reported on rows that found nothing"
    assert f"{limit['measured_kl_nats']:.6f} on the 6 rows that the size was found with" in result.output
    # what was measured is what is written
    from eval.diff import DiffOptions, DiffReport, compare
    from recompile.model.rows import read_rows

    header = load_profile(profile).header
    reference = open_checkpoint(header.reference)
    rows, vocab = read_rows([reference.path], "accept", 6, 24, None, None, None)
    assert rows.sha256 == limit["rows_sha256"]
    *_, again = compare(overlay_of(profile, header), reference, rows.ids, DiffOptions(vocab=vocab))
    assert isinstance(again, DiffReport)
    assert again.kl.mean == pytest.approx(limit["measured_kl_nats"], rel=1e-3)  # two ways to sum float32 logits


def test_a_limit_is_told_where_the_verification_fails(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RecompileError("no rows left to report on")

    monkeypatch.setattr("eval.search.acceptance.verify", fail)
    out = profile.parent / "new" / "mix.yaml"
    result = run(profile, "--max-kl", "0.3", "-r", "2", "-l", "16", "-o", out)
    assert result.exit_code == 0, result.output
    assert "written but not verified: no rows left" in result.output
    assert "on the 2 rows that the size was found with" in result.stdout
    assert out.exists()


def test_a_limit_out_of_reach_names_what_is_measured(profile: Path) -> None:
    result = run(profile, "--max-kl", "1e-7", "-r", "4", "-l", "16", "-o", profile.with_name("no.yaml"))
    assert result.exit_code == 1
    assert "is out of reach: the best that these sources reach measures 0." in result.output
    assert not profile.with_name("no.yaml").exists()


def test_a_limit_without_models_is_said_to_be_predicted(profile: Path) -> None:
    header = load_profile(profile).header
    profile.write_text(unsealed(profile).read_text().replace(header.candidates[0].fingerprint, "0" * 16))
    result = run(profile, "--max-kl", "0.2", "-o", profile.with_name("mix.yaml"), "-r", "4", "-l", "16")
    assert result.exit_code == 0, result.output
    assert "Note: the models are not available: the limit on KL is kept by what the profile predicts" in result.output
    assert profile.with_name("mix.yaml").exists()


def test_a_limit_is_for_the_weights_alone(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--max-kl", "0.2", "--activations", "-o", profile.with_name("no.yaml"))
    refused = run(profile, *words)
    assert refused.exit_code == 1
    assert "--activations: none of 3, 2, 4, 6 says how inputs are quantized" in " ".join(refused.output.split())
    monkeypatch.setattr("recompile.model.activations.quantizes_inputs", lambda overlay: True)
    refused = run(profile, *words)
    assert refused.exit_code == 1
    assert "--activations: a limit on KL is kept for the weights alone" in " ".join(refused.output.split())
    assert not profile.with_name("no.yaml").exists()


def test_what_a_search_finds_keeps_the_limit(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that leaves the limit is not followed; one that lowers KL at the size found is."""
    labels = [candidate.label for candidate in load_profile(profile).header.candidates]
    words = ("--max-kl", "0.3", "--solver", "local", "-r", "4", "-l", "16", "-o", profile.with_name("mix.yaml"))
    words = (*words, "--json", profile.with_name("report.json"), "--no-guard")
    found = {}
    for name, pick in {
        "worse": lambda search: dict.fromkeys(search.start, min(labels)),
        "same": lambda s: s.start,
    }.items():
        monkeypatch.setattr("eval.search.local.search_local", pick)
        result = run(profile, *words)
        assert result.exit_code == 0, result.output
        found[name] = result.output, json.loads(profile.with_name("report.json").read_text())
    assert "what local found is above the limit on KL; the exact recipe is kept" in found["worse"][0]
    assert found["worse"][1]["solver"] == "exact"
    assert found["same"][1]["solver"] == "local"
    assert found["same"][1]["choice"] == found["worse"][1]["choice"]


@pytest.mark.parametrize("kl", [0.29, 0.31])
def test_what_a_search_gains_under_a_limit_is_taken_in_bytes(profile: Path, kl: float) -> None:
    from eval.mixes.measured import MeasuredMixes
    from eval.search.kl_limit import shrink
    from recompile.optimize.budget import Budget
    from recompile.optimize.choose import Rules, choose

    first, found, smaller = (choose(load_profile(profile), Budget(bpw=b), "exact", Rules()) for b in (4.0, 3.9, 3.3))
    known = [(first, 0.3), (found, 0.15), (smaller, kl)]

    class Kls(MeasuredMixes):
        def __init__(self) -> None:
            pass

        def measure(self, mixes: Sequence[Mapping[str, str]]) -> list[float]:
            return [next(kl for choice, kl in known if choice.solution.choice == mix) for mix in mixes]

    held = MeasuredLimit(0.3, first, (), Kls())
    asked: list[object] = []
    told: list[object] = []
    result = shrink(
        held,
        found,
        lambda limit: (asked.append(limit), replace(held, choice=smaller))[1],
        lambda begun: (asked.append(begun), begun)[1],
        told.append,
    )
    assert asked == [pytest.approx(0.3 / 0.5), smaller]
    assert result == (replace(smaller, budget=found.budget) if kl < 0.3 else found)
    assert any("the search ends at KL 0.310000, above the limit" in str(event) for event in told) == (kl > 0.3)
    assert shrink(held, first, lambda limit: held, lambda begun: begun) is first, "nothing was gained"


def go_smaller(
    held: MeasuredLimit,
    found: Choice,
    hold: Callable[[float], MeasuredLimit],
    search: Callable[[Choice], Choice],
    on_event: object,
) -> Choice:
    """In place of `eval.search.kl_limit.shrink`: always the search's choice at a smaller size."""
    smaller = hold(1.5 * held.max_kl_nats).choice
    assert smaller.bits < found.bits
    return replace(search(smaller), budget=found.budget)


def test_a_limit_is_searched_again_at_a_smaller_size(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Mapping[str, str]] = []
    monkeypatch.setattr("eval.search.local.search_local", lambda search: (begun.append(search.start), search.start)[1])
    monkeypatch.setattr("eval.search.kl_limit.shrink", go_smaller)
    report = profile.with_name("report.json")
    words = ("--max-ppl-increase", "30%", "--solver", "local", "-r", "4", "-l", "16", "--no-guard", "--json", report)
    result = run(profile, *words, "-o", profile.with_name("mix.yaml"))
    assert result.exit_code == 0, result.output
    first, second = begun
    written = json.loads(report.read_text())
    assert written["choice"] == dict(second) != dict(first)
    assert written["budget"] == "perplexity 30 % up at most (KL 0.262364)"


def test_the_larger_recipe_that_a_search_began_with_does_not_compete(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a search at a smaller size it keeps the limit and measures less, but takes more bytes."""
    monkeypatch.setattr("eval.search.local.search_local", lambda search: search.start)
    monkeypatch.setattr("eval.search.kl_limit.shrink", go_smaller)
    report = profile.with_name("report.json")
    words = ("--max-kl", "0.3", "--solver", "local", "-r", "4", "-l", "16", "--json", report)
    result = run(profile, *words, "-o", profile.with_name("mix.yaml"))
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    (larger,) = [c for c in written["verdict"]["contenders"] if c["name"] == "exact"]
    assert larger["kl"]["mean"] < written["verdict"]["contenders"][0]["kl"]["mean"]
    assert not larger["competes"]
    assert larger["bits"] > written["bits"]
    assert written["solver"] != "exact"


@pytest.mark.parametrize("within", [True, False])
def test_a_better_mix_is_written_only_within_the_limit(
    profile: Path, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """On the reporting rows a simple mix is the best; on those that the size was found with it may be above."""
    from eval.search.acceptance import Verdict

    monkeypatch.setattr(Verdict, "best", property(lambda self: next(c for c in self.contenders[1:] if not c.is_over)))
    monkeypatch.setattr(Verdict, "unbeaten", property(lambda self: (self.best,)))
    monkeypatch.setattr(MeasuredLimit, "keeps", lambda self, choice: within)
    report = profile.with_name("report.json")
    words = ("--max-kl", "0.3", "--solver", "exact", "-r", "4", "-l", "16", "--json", report)
    result = run(profile, *words, "-o", profile.with_name("mix.yaml"))
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())["solver"]
    said = " ".join(result.output.split())
    if within:
        assert written != "exact"
        assert f'Wrote the best of them instead: "{written}"' in said
    else:
        assert written == "exact"
        assert "is above the limit on KL on the rows that the size was found with" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give a budget"),
        (["-b", "3", "--size", "1GiB"], "give one of"),
        (["-b", "1"], "reachable range: 2."),
        (["--pool", "gpu"], "wanted NAME=GLOB"),
        (["--active-bpw", "3"], "config.json names no experts"),
        (["--max-ppl-increase", "much"], "wanted a share"),
        (["-b", "3.7", "--max-step", "1", "--solver", "greedy"], "--max-step needs --solver exact"),
    ],
)
def test_budgets_that_cannot_be_read_or_met(profile: Path, words: list[str], says: str) -> None:
    result = run(profile, "-o", profile.with_name("no.yaml"), *words)
    assert result.exit_code == 1
    assert says in result.output
    assert not profile.with_name("no.yaml").exists()


# ---- verification ----------------------------------------------------------------------------------------------------


def test_a_recipe_is_measured_beside_its_rivals_at_no_fewer_bytes(profile: Path) -> None:
    write_profile(profile, "llama")
    report = optimize(profile, "-b", "3.7", "--steps", "8", *FEW)
    verdict = report["verdict"]
    names = [contender["name"] for contender in verdict["contenders"]]
    assert names[0] == "recipe"
    for part in ("uniform 3", "uniform 4 (larger)", "attention +1", "first and last layers +2", "first layers +1"):
        assert any(part in name for name in names), names
    for contender in verdict["contenders"][1:]:
        if contender["name"] != "uniform 3" and "within" not in contender["name"]:
            assert contender["bits"] >= verdict["contenders"][0]["bits"]
        difference = contender["difference"]["mean"]
        rows = [a - b for a, b in zip(verdict["contenders"][0]["kl_rows"], contender["kl_rows"], strict=True)]
        assert difference == pytest.approx(sum(rows) / len(rows), abs=1e-12)
        assert contender["interval"][0] < difference < contender["interval"][1]
    written = next(c for c in verdict["contenders"] if c["choice"] == report["choice"])
    assert verdict["ratio"] == pytest.approx(verdict["contenders"][0]["kl"]["mean"] / verdict["predicted_kl_nats"])
    assert written["name"] == verdict["wrote"]
    header = load_profile(profile).header
    from eval.diff import DiffOptions, DiffReport, compare
    from recompile.model.rows import read_rows

    overlay = overlay_of(profile, header)
    reference = open_checkpoint(header.reference)
    rows_, vocab = read_rows([reference.path], "accept", 4, 24, None, None, None)
    *_, again = compare(overlay, reference, rows_.ids, DiffOptions(vocab=vocab))
    assert isinstance(again, DiffReport)
    assert again.kl.mean == written["kl"]["mean"], "what was measured is what was written, to the last bit"
    assert load_recipe(profile.with_name("mix.yaml")).provenance["measured_kl_nats"] == round(again.kl.mean, 6)


def test_a_recipe_worse_than_the_simple_mix_is_not_written(tmp_path: Path) -> None:
    """A profile that has everything the wrong way round: the optimum of its costs is the smallest variant."""
    profile = tmp_path / "profile.jsonl"
    write_profile(profile, wrong=True)
    words = ("-b", "4.6", "--solver", "exact", "-o", tmp_path / "mix.yaml", "--json", tmp_path / "report.json")
    result = run(profile, *words, *FEW)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    verdict = report["verdict"]
    assert verdict["beats_all"] is False
    assert set(verdict["contenders"][0]["choice"].values()) == {"2"}
    assert verdict["wrote"] == verdict["best"] != "recipe"
    assert "does NOT beat" in result.output
    assert "Wrote the best of them instead" in result.output
    assert report["bits"] <= report["budget_bits"]
    best = min((c for c in verdict["contenders"] if not c["is_over"]), key=lambda c: c["kl"]["mean"])
    assert report["choice"] == best["choice"]
    kept = optimize(profile, "-b", "4.6", "--solver", "exact", *FEW, "--no-guard")
    assert set(kept["choice"].values()) == {"2"}


def test_models_that_changed_since_they_were_profiled_are_not_trusted(profile: Path, tmp_path: Path) -> None:
    header = load_profile(profile).header
    text = unsealed(profile).read_text().replace(header.candidates[0].fingerprint, "0" * 16)
    profile.write_text(text)
    result = run(profile, "-b", "3.7", "-o", tmp_path / "mix.yaml", *FEW)
    assert result.exit_code == 1
    assert "is not what the profile measured" in result.output
    quietly = run(profile, "-b", "3.7", "-o", tmp_path / "mix.yaml", "-r", "4", "-l", "24")
    assert quietly.exit_code == 0
    assert "written but not verified" in quietly.output


# ---- frontier --------------------------------------------------------------------------------------------------------


def test_a_frontier_is_a_folder_of_recipes_with_tables_and_plots(profile: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = profile.with_name("frontier")
    result = run(profile, "--frontier", "3:4:0.5", "-o", folder, "--check", "-r", "2", "-l", "16")
    assert result.exit_code == 0, result.output
    assert {path.name for path in folder.iterdir()} == {
        *("3bpw.yaml", "3.5bpw.yaml", "4bpw.yaml"),
        *("frontier.csv", "frontier.json", "frontier.png", "frontier.svg"),
    }
    assert (folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (folder / "frontier.svg").read_text()
    with (folder / "frontier.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows if row["recipe"]] == ["3bpw", "3.5bpw", "4bpw"]
    assert {row["name"] for row in rows if not row["recipe"]} == {f"uniform {n}" for n in (2, 3, 4, 6)}
    header = load_profile(profile).header
    base = open_checkpoint(header.candidate(header.base).model_dir)
    for row in rows:
        assert float(row["measured_kl_nats"]) > 0
        assert float(row["predicted_std_error"]) >= 0
        if row["recipe"]:
            overlay = build_overlay(base, load_recipe(folder / row["recipe"]))
            assert overlay.accounting.total_bytes == int(row["total_bytes"])
            assert overlay.accounting.bpw == float(row["bpw"]) <= float(row["budget_bpw"])
    assert json.loads((folder / "frontier.json").read_text())["rows"][0]["name"] == rows[0]["name"]


@pytest.mark.parametrize(
    "name",
    [
        "3bpw.yaml",
        "frontier.png",
        *(pytest.param(f"frontier.{kind}", marks=pytest.mark.sweep) for kind in ("csv", "json", "svg")),
    ],
)
def test_a_frontier_replaces_its_own_files_alone(name: str, profile: Path) -> None:
    folder, words = profile.with_name("own"), [profile, "--frontier", "3:3.5:0.5", "-o", profile.with_name("own")]
    assert run(*words).exit_code == 0
    made = (folder / name).read_bytes()
    assert run(*words).exit_code == 0  # again: all files are known as this tool's
    assert (folder / name).read_bytes() == made
    (folder / name).write_bytes(b"of the user")
    result = run(*words)
    assert (result.exit_code, f"{folder / name}: exists, and this tool did not make it" in result.output) == (1, True)
    assert (folder / name).read_bytes() == b"of the user"
    assert run(*words, "--force").exit_code == 0
    assert (folder / name).read_bytes() == made


def test_a_frontier_takes_no_other_budget(profile: Path) -> None:
    result = run(profile, "--frontier", "3:4:0.5", "-b", "3", "-o", profile.with_name("f"))
    assert result.exit_code == 1
    assert "--frontier has its own budgets" in result.output


# ---- a start, and solvers that measure -------------------------------------------------------------------------------


def test_a_recipe_by_hand_is_improved_at_its_own_size(profile: Path) -> None:
    """The hand puts its bits on the wrong side: MLP up, attention down."""
    header = load_profile(profile).header
    recipe = by_hand(profile, '{key: "*.mlp.*", source: 6}', '{key: "*.self_attn.*", source: 2}')
    report = optimize(profile, "--start", recipe, "--solver", "local", "--steps", "2", *FEW)
    start = {module: ("6" if ".mlp." in module else "2") for group in header.groups for module in (group.name,)}
    bits = header.fixed_bits + sum(group.bits[start[group.name]] for group in header.groups)
    assert report["bits"] <= bits
    verdict = report["verdict"]
    measured = {contender["name"]: contender for contender in verdict["contenders"]}
    assert measured["the start"]["choice"] == start
    written = next(c for c in verdict["contenders"] if c["choice"] == report["choice"])
    assert written["kl"]["mean"] <= measured["the start"]["kl"]["mean"]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            ['{key: "model.layers.0.self_attn.q_proj.*", source: 6}'],
            'group "model.layers.0.self_attn.q_proj+k_proj+v_proj" is split',
        ),
    ],
)
def test_a_start_that_splits_a_group_is_refused(tmp_path: Path, lines: list[str], says: str) -> None:
    profile = tmp_path / "profile.jsonl"
    write_profile(profile, level="fused")
    result = run(profile, "--start", by_hand(profile, *lines), "-o", tmp_path / "mix.yaml")
    assert result.exit_code == 1
    assert says in result.output


def test_a_start_from_elsewhere_or_too_large_is_refused(profile: Path, tmp_path: Path) -> None:
    recipe = by_hand(profile, '{key: "*.mlp.*", source: 6}')
    large = run(profile, "--start", recipe, "-b", "3", "--solver", "local", "-o", tmp_path / "mix.yaml", *FEW)
    assert large.exit_code == 1
    assert "the start takes" in large.output
    (tmp_path / "elsewhere").mkdir()
    recipe.write_text(
        f'sources:\n  - {{id: 4, model_dir: {tmp_path}/elsewhere}}\noverrides:\n  - {{key: "*.mlp.*", source: 4}}\n'
    )
    result = run(profile, "--start", recipe, "-o", tmp_path / "mix.yaml")
    assert result.exit_code == 1
    assert "is no candidate of the profile" in result.output
