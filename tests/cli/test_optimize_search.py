"""model_optimize where the models run: refine and its journal, and solvers that measure whole mixes."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.mixes.meter import MixMeter
from eval.profile.exact import ProfileJob, ProfileOptions
from eval.profile.sketch import SketchOptions, profile_sketch
from eval.search import refine_journal
from eval.search.job import Search
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import Profile, load_profile
from recompile.errors import RecompileError
from recompile.model.rows import RowOptions
from recompile.optimize.baselines import Baseline, make_baselines
from recompile.optimize.cross_entropy import POPULATION, ROUNDS
from recompile.optimize.exact import solve_exact
from tests import tiny
from tests.journals import unsealed
from tests.optimize_runs import FEW, by_hand, optimize, overlay_of, run, write_profile


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    write_profile(tmp_path / "profile.jsonl")
    return tmp_path / "profile.jsonl"


# ---- refine ----------------------------------------------------------------------------------------------------------


def test_refine_is_what_runs_where_the_models_are_at_hand_and_goes_on_from_its_journal(tmp_path: Path) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile)
    report = optimize(profile, "-b", "3.9", "--check", "--no-guard", "--steps", "2", *FEW)
    assert report["solver"] == "refine"
    budget = report["budget_bits"]
    assert report["bits"] <= budget
    journal = [json.loads(line) for line in (tmp_path / "mix.refine.jsonl").read_text().splitlines()]
    assert journal[-1]["choice"] == dict(report["choice"])
    steps = [line for line in journal if line.get("accepted")]
    assert all(line["change_nats"] < 0 for line in steps)
    assert [line["kl_nats"] for line in steps] == sorted((line["kl_nats"] for line in steps), reverse=True)
    overlay = overlay_of(profile, header)
    assert overlay.accounting.quantized_bits <= budget
    # cut off in the middle of a line: what is whole counts, and nothing is asked again
    path = tmp_path / "mix.refine.jsonl"
    path.write_text(path.read_text() + '{"of": "2", "tri')
    again = optimize(profile, "-b", "3.9", "--check", "--no-guard", "--steps", "2", *FEW)
    assert again["choice"] == report["choice"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == journal


def test_refine_reads_the_draws_that_pairs_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [(n, open_checkpoint(directory)) for n, directory in tiny.variants("llama-2", (3, 2, 4, 6)).items()]
    base = open_checkpoint(tiny.base("llama-2"))

    def search(name: str, keep: bool) -> tuple[list[dict[str, Any]], str]:
        profile, out = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.yaml"
        job = ProfileJob(base, 3, variants, tiny.rows(6, 16), profile, ProfileOptions(level="tensor"))
        *_, _ = profile_sketch(job, SketchOptions(4, keep_pairs=keep))
        result = run(
            profile, "-b", "3.9", "--no-check", "--solver", "refine", "--steps", "1", "-r", "4", "-l", "24", "-o", out
        )
        assert result.exit_code == 0, result.output
        lines = unsealed(out.with_name(f"{name}.refine.jsonl")).read_text().splitlines()
        return [json.loads(line) for line in lines], " ".join(result.output.split())

    monkeypatch.setattr("recompile.optimize.interactions.common_share", lambda *_: 0.5)  # a model that learnt nothing
    (alone, plain), (journal, output) = search("without", False), search("with", True)
    assert "interactions of swaps" not in plain
    assert "interactions of swaps from the 24 draws of --pairs: 50.0 % of what they say holds on other rows" in output
    assert journal[0]["key"] != alone[0]["key"]  # one search does not go on with the other's journal
    assert journal[1] == alone[1]  # the same start and rows
    assert journal[-1]["moved"] > 1
    assert journal[-1]["predicted_nats"] != alone[-1]["predicted_nats"]


def test_an_interrupted_refine_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.mixes.oracle.SAMPLED_FIRST", 1)
    monkeypatch.setattr("recompile.optimize.refine.SWAPS", (8, 4))
    monkeypatch.setattr("recompile.optimize.refine.STALLED", 1)
    monkeypatch.setattr("recompile.optimize.thompson.DRAWS", 8)
    profile, path = tmp_path / "profile.jsonl", tmp_path / "mix.refine.jsonl"
    write_profile(profile)
    words = ("-b", "3.9", "--no-check", "--steps", "5", *FEW)
    whole = optimize(profile, *words)
    lines = path.read_text().splitlines(keepends=True)
    asked = [line for line in map(json.loads, lines) if "of" in line]
    searched = sum("costs" in line for line in asked)
    assert 0 < searched < 5  # and in the other steps swaps were measured
    assert 0 < sum("changes" in line for line in asked) <= 2 * (5 - searched)
    for kept in (2, len(lines) // 2, len(lines) - 2):
        path.write_text("".join(lines[:kept]))
        again = optimize(profile, *words)
        assert again["choice"] == whole["choice"]
        assert path.read_text().splitlines(keepends=True) == lines, f"{kept} lines were kept"
    head, first, *rest = unsealed(path).read_text().splitlines(keepends=True)
    path.write_text(head + first.replace('"of": "', '"of": "other') + "".join(rest))
    refused = run(profile, *words, "-o", tmp_path / "mix.yaml")
    assert refused.exit_code == 1
    assert "mix.refine.jsonl: holds another search than its first line says" in " ".join(refused.output.split())


def test_a_refine_interrupted_under_limits_called_by_flags_goes_on(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of a journal has the names of limits, which were flags once: hours of models are not thrown away."""
    path, pool = profile.with_name("mix.refine.jsonl"), "gpu=*.self_attn.*:1MiB"
    words = ("-b", "3.9", "--max-step", "2", "--pool", pool, "--solver", "refine", "--steps", "1", *FEW[1:])
    key = refine_journal._key
    names: list[set[str]] = []

    def key_before(search: Search, rows_sha256: str) -> str:
        flags = {row.name: row.name.replace("{max_step}", "--max-step").replace("{pool}", "--pool")
                 for row in search.limits}  # fmt: skip
        names.append(set(flags.values()))
        limits = [replace(row, name=flags[row.name]) for row in search.limits]
        return key(replace(search, limits=limits), rows_sha256)

    with monkeypatch.context() as older:
        older.setattr(refine_journal, "_key", key_before)
        found = optimize(profile, *words)
    assert {"--max-step", "--pool gpu"} < names[0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    monkeypatch.setattr(MixMeter, "measure", lambda *_: pytest.fail("what the journal holds is asked again"))
    assert optimize(profile, *words)["choice"] == found["choice"]
    assert path.read_text().splitlines(keepends=True) == lines


def test_refine_never_makes_a_hand_made_start_worse(tmp_path: Path) -> None:
    profile = tmp_path / "profile.jsonl"
    header = write_profile(profile)
    by_hand = {
        group.name: ("6" if "down_proj" in group.name or "q_proj" in group.name else "2") for group in header.groups
    }
    lines = "".join(f'  - {{key: "{name}.*", source: {source}}}\n' for name, source in by_hand.items())
    folders = {candidate.label: candidate.model_dir for candidate in header.candidates}
    recipe = tmp_path / "hand.yaml"
    recipe.write_text(
        f"sources:\n  - {{id: 6, model_dir: {folders['6']}}}\n  - {{id: 2, model_dir: {folders['2']}}}\noverrides:\n"
        + lines
    )
    report = optimize(profile, "--start", recipe, "--check", "--no-guard", "--steps", "6", "-r", "8", "-l", "64")
    journal = [json.loads(line) for line in (tmp_path / "mix.refine.jsonl").read_text().splitlines()]
    assert report["solver"] == "refine"
    taken = [line for line in journal if line.get("accepted")]
    assert taken, "a recipe without sense leaves something to gain"
    assert report["bits"] <= header.fixed_bits + sum(group.bits[by_hand[group.name]] for group in header.groups)


def test_refine_says_before_it_starts_what_memory_it_needs(tmp_path: Path) -> None:
    profile = tmp_path / "profile.jsonl"
    write_profile(profile)
    result = run(
        profile, "-b", "3.9", "-o", tmp_path / "mix.yaml", "--solver", "refine", "--max-memory", "1MiB", "--steps", "1",
        "--no-check", *FEW,
    )  # fmt: skip
    assert result.exit_code == 1
    assert "--max-memory 1 MiB is too little" in " ".join(result.output.split())
    assert not (tmp_path / "mix.yaml").exists()


# ---- costs that add up faster than linearly --------------------------------------------------------------------------


def made_up_kl(monkeypatch: pytest.MonkeyPatch, profile: Path, power: float) -> list[Mapping[str, str]]:
    """Mixes measure 3 x the sum of cost ** power in place of running models; returns the list of what was measured."""
    costs = load_profile(profile)
    measured: list[Mapping[str, str]] = []

    def measure(self: MixMeter, choice: Mapping[str, str]) -> list[float]:
        measured.append(dict(choice))
        return [law(costs, choice, power)] * len(self.accept)

    monkeypatch.setattr(MixMeter, "measure", measure)
    return measured


def law(profile: Profile, choice: Mapping[str, str], power: float) -> float:
    costs = [profile.cost(group, label) for group, label in choice.items()]
    return 3 * sum(cost.kl_nats**power for cost in costs if cost is not None)


def test_the_superadditive_choice_is_better_where_costs_add_up_faster(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_profile(profile, "llama")
    measured = made_up_kl(monkeypatch, profile, 1.6)
    words = ("-b", "3.3", "-r", "4", "-l", "16")
    exact = optimize(profile, "--solver", "exact", *words)
    report = optimize(profile, "--solver", "superadditive", *words)
    costs = load_profile(profile)
    assert report["solver"] == "superadditive"
    assert report["bits"] <= report["budget_bits"]
    assert law(costs, report["choice"], 1.6) < law(costs, exact["choice"], 1.6)
    assert report["predicted_kl_nats"] > exact["predicted_kl_nats"], "it gives up some of the plain sum for it"
    assert len(measured) == 5, "the exact choice and the uniform variants"
    # another budget measures its own exact choice only, and other rows measure everything again
    optimize(profile, "--solver", "superadditive", "-b", "3.6", *words[2:])
    assert len(measured) == 6
    result = run(profile, "--solver", "superadditive", "--no-check", *words, "-o", profile.with_name("mix.yaml"))
    assert "super-additive: power 1.600, log error 0.000 over 5 whole mixes (plain sum " in result.output
    assert len(measured) == 6
    optimize(profile, "--solver", "superadditive", "-b", "3.3", "-r", "3", "-l", "16")
    assert len(measured) == 11


def test_refine_starts_from_the_exact_choice_where_costs_add_up(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up_kl(monkeypatch, profile, 1.0)
    words = ("-b", "3.3", "-r", "4", "-l", "16", "--no-check", "-o", profile.with_name("mix.yaml"))
    result = run(profile, "--solver", "refine", "--steps", "0", "--json", "-", *words)
    assert result.exit_code == 0, result.output
    assert "the search starts from exact\n" in result.stderr
    assert json.loads(result.stdout)["choice"] == optimize(profile, "--solver", "exact", *words[:6])["choice"]


def test_refine_starts_from_the_greedy_choice_where_that_measures_best(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("-r", "4", "-l", "16", "--no-check")
    lower = optimize(profile, "--solver", "exact", "-b", "3.0", *words)
    monkeypatch.setattr(
        "eval.search.initial_recipes.solve_greedy", lambda problem, bits: solve_exact(problem, lower["budget_bits"])
    )
    monkeypatch.setattr(
        "eval.mixes.measured.MeasuredMixes.measure",
        lambda self, mixes: [0.1 if dict(mix) == lower["choice"] else 1.0 for mix in mixes],
    )
    words = ("-b", "3.3", *words, "-o", str(profile.with_name("mix.yaml")))
    result = run(profile, "--solver", "refine", "--steps", "0", "--json", "-", *words)
    assert result.exit_code == 0, result.output
    assert "the search starts from greedy\n" in result.stderr
    assert json.loads(result.stdout)["choice"] == lower["choice"]


def test_refine_starts_from_a_hand_made_mix_where_that_measures_best(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a recipe is verified against is a start as well: a poor profile ends no worse than rules of thumb."""
    by_rule: list[Mapping[str, str]] = []

    def kept(*given: Any) -> list[Baseline]:
        found = make_baselines(*given)
        by_rule[:] = [b.within for b in found if b.within is not None and b.name.endswith("attention +1")]
        return found

    monkeypatch.setattr("eval.search.initial_recipes.make_baselines", kept)
    monkeypatch.setattr(
        "eval.mixes.measured.MeasuredMixes.measure",
        lambda self, mixes: [0.1 if dict(mix) in map(dict, by_rule) else 1.0 for mix in mixes],
    )
    words = ("-b", "3.3", "-r", "4", "-l", "16", "--no-check", "-o", str(profile.with_name("mix.yaml")))
    result = run(profile, "--solver", "refine", "--steps", "0", "--json", "-", *words)
    assert result.exit_code == 0, result.output
    assert re.search(r"the search starts from uniform \d, attention \+1\n", result.stderr)
    found = json.loads(result.stdout)
    assert found["choice"] == by_rule[0]
    assert found["bits"] <= found["budget_bits"], "the rung that would make it as large as the recipe is left out"


def test_tilted_costs_are_left_out_where_a_round_takes_longer_than_their_share(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[float] = []

    def measure(self: MixMeter, choice: Mapping[str, str]) -> list[float]:
        measured.append(0.0)
        time.sleep(0.05)
        return [1.0] * len(self.accept)

    monkeypatch.setattr(MixMeter, "measure", measure)
    words = ("-b", "3.3", "-r", "4", "-l", "16", "--steps", "0", "--no-check", "-o", profile.with_name("mix.yaml"))
    result = run(profile, "--solver", "refine", "--minutes", "0.01", *words)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert "tilted costs: left out, measuring a mix takes " in said
    assert "so that 10 do not fit in 20% of 0.01 minutes" in said
    count = len(measured)
    assert count < 10
    run(profile, "--solver", "refine", "--minutes", "0.01", *words)
    assert len(measured) <= count + 1, "gone on with, mixes measured before take no time, and it stays left out"


def test_the_tilted_choice_is_better_where_kinds_of_modules_err_together(
    profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs, measured = load_profile(profile), []

    def true_kl(choice: Mapping[str, str]) -> float:
        expensive = {group: 8.0 if "v_proj" in group else 3.0 if "down_proj" in group else 1.0 for group in choice}
        return sum(expensive[group] * cost.kl_nats for group, label in choice.items()
                   if (cost := costs.cost(group, label)) is not None)  # fmt: skip

    def measure(self: MixMeter, choice: Mapping[str, str]) -> list[float]:
        measured.append(dict(choice))
        return [true_kl(choice)] * len(self.accept)

    monkeypatch.setattr(MixMeter, "measure", measure)
    words = ("-b", "3.3", "-r", "4", "-l", "16")
    exact = optimize(profile, "--solver", "exact", *words)
    found = optimize(profile, "--solver", "tilted", *words)
    assert found["solver"] == "tilted"
    assert found["bits"] <= found["budget_bits"]
    assert true_kl(found["choice"]) < 0.97 * true_kl(exact["choice"])
    count = len(measured)
    assert 10 < count <= ROUNDS * POPULATION
    assert optimize(profile, "--solver", "tilted", *words)["choice"] == found["choice"]
    result = run(
        profile, "--solver", "refine", "--steps", "0", "--no-check", *words, "-o", profile.with_name("mix.yaml")
    )
    assert "the search starts from tilted costs\n" in result.output
    again = [mix for mix in measured[count:] if mix in measured[:count]]
    assert len(again) <= 1, "what is beside the recipe is not measured again, but by refine, on rows of its own"


def test_rows_that_chose_the_start_accept_no_move(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, set[tuple[int, ...]]] = {}

    def measure(self: MixMeter, choice: Mapping[str, str]) -> list[float]:
        seen.setdefault(id(self), {tuple(row) for row in self.accept.tolist()})
        pool = getattr(self, "pool", self.accept[:0])  # of a meter that linearises, too
        assert not seen[id(self)] & {tuple(row) for row in pool.tolist()}
        return [0.5] * len(self.accept)

    monkeypatch.setattr(MixMeter, "measure", measure)
    kept: list[MixMeter] = []  # so that no two have the same id
    made = MixMeter.__post_init__
    monkeypatch.setattr(MixMeter, "__post_init__", lambda self: (made(self), kept.append(self))[0])
    words = ("-b", "3.3", "-r", "4", "-l", "16", "--no-check", "-o", profile.with_name("mix.yaml"))
    result = run(profile, "--solver", "refine", "--steps", "0", *words)
    assert result.exit_code == 0, result.output
    starts, search = seen.values()
    assert len(starts) == len(search) == 4
    assert not starts & search


def test_a_short_text_is_used_whole(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"Document {n}. " + " ".join(f"word{n * k}" for k in range(60)) for n in range(60)))
    where = RowOptions(4, 32, text)
    folders = [tiny.base("llama-2")]
    few = where.read_up_to(folders, "choose", 10, 4)
    every = where.read_up_to(folders, "choose", 100_000, 4)
    assert len(few.ids) == 10
    assert 20 < len(every.ids) < 1000
    assert every.ids[:10].tolist() == few.ids.tolist()
    with pytest.raises(RecompileError, match="ask for fewer or shorter rows"):
        where.read_up_to(folders, "choose", 100_000, 50_000)


def test_a_start_by_hand_is_not_replaced(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = made_up_kl(monkeypatch, profile, 1.6)
    recipe = by_hand(profile, '{key: "*.mlp.*", source: 4}')
    words = ("--solver", "refine", "--steps", "0", "-r", "4", "-l", "16")
    start = {group.name: "4" if ".mlp." in group.name else "3" for group in load_profile(profile).header.groups}
    assert optimize(profile, "--start", recipe, *words)["choice"] == start
    assert measured == [start]


def test_differences_from_the_base_have_no_law(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = tmp_path / "profile.jsonl"
    write_profile(profile)
    profile.write_text(unsealed(profile).read_text().replace('"context": "clean"', '"context": "base"'))
    words = ("-b", "3.3", "-r", "2", "-l", "16", "--no-check", "-o", tmp_path / "mix.yaml")
    refused = run(profile, "--solver", "superadditive", *words)
    assert refused.exit_code == 1
    assert "profile with --context clean" in refused.output
    result = run(profile, "--solver", "refine", "--steps", "0", *words)
    assert result.exit_code == 0, result.output
    assert "the search starts from " in result.output
