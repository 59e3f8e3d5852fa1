"""model_auto: the whole way, resumed at every stage, and what it says of the result."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

import recompile
from recompile import check
from recompile.auto import auto_options
from recompile.auto_checks import is_rival
from recompile.auto_minutes import Asked, Shares, default_minutes, split_minutes
from recompile.auto_stages import STATE, Stages
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import model_auto
from recompile.costs import bits_of_uniform, load_profile
from recompile.errors import NotBetterError
from recompile.events import Progress
from recompile.gguf.container import open_gguf
from recompile.io.checksums import write_checked_json
from recompile.model.used_rows import HEAL_KEY
from recompile.planning import AutoPlan, PlannedStage
from recompile.recipe.recipe import load_recipe
from tests import tiny
from tests.quantize.test_gguf_variants import tokenizer_file

GROUP = tiny.GROUP_SIZE
TEXT = "\n\n\n".join(f"Document {n}. " + " ".join(f"word{(n * k) % 97}" for k in range(120)) for n in range(60))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def arguments(base: Path, out: Path, text: Path, *more: object) -> list[str]:
    given = ["-i", base, "-o", out, "-r", 3, "-l", 32, "--calibration-rows", 4, "--samples", 4, "--text", text]
    return [str(argument) for argument in [*given, "--solver", "exact", "--quiet", *more]]


def auto(*given: Any) -> Result:
    return CliRunner().invoke(model_auto.main, arguments(*given))


def made(*given: Any) -> Result:
    result = auto(*given)
    assert result.exit_code == 0, result.output
    return result


def test_one_command_makes_the_mix_and_measures_it(text: Path, tmp_path: Path) -> None:
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    result = made(base, out, text, "-b", 4.3, "--candidates", "3,4,6", "-g", GROUP, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    mix, uniform = report["builds"]
    recipe = load_recipe(tmp_path / "mix.work" / "overrides.yaml")
    assert mix["bpw"] <= 4.3
    assert mix["bpw"] == pytest.approx(recipe.provenance["bpw"], abs=1e-4)
    assert mix["total_bytes"] == open_checkpoint(out).size_bytes
    assert uniform["build"].endswith("3bpw"), "4 bits in groups of 32 are 4.5 bpw and would be larger"
    assert uniform["total_bytes"] <= mix["total_bytes"]
    assert 0 < mix["kl_nats"] < uniform["kl_nats"]
    low, high = uniform["interval_95"]
    assert low < uniform["mix_minus_this_nats"] < high
    assert set(report["seconds"]) == {"profile", "recipe", "build", "uniform", "pick", "verify", "report"}
    assert "mix - this" in result.output
    assert not (tmp_path / "mix.work" / "uniform").exists(), "no variant stays on the disk"
    assert (mix["kept"], uniform["kept"]) == (True, False)
    assert "3bpw (compared, not kept)" in result.output
    card = (tmp_path / "mix.card.md").read_text()
    assert f"| mix | {mix['bpw']:.2f} |" in card
    assert "overrides:" in card
    page = (tmp_path / "mix.report.html").read_text()
    assert page.startswith("<!doctype html>") or "<html" in page[:400].lower()
    assert report["card"].endswith("mix.card.md")
    assert {c.label for c in load_profile(tmp_path / "mix.work" / "profile.jsonl").header.candidates} == {"3", "4", "6"}


def test_minutes_in_all_are_split_once_and_kept(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and draws fall until the passes fit, and what is left is shared; a later run takes the same."""
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    said = auto(base, out, text, "-b", 3.9, "--candidates", "3,4", "-g", GROUP, "--minutes", 60, "--plan").output
    assert "60 minutes in all were asked for" in said
    assert re.search(r"^  heal +about +\d", said, re.MULTILINE), "there is time for it"
    options = (base, out, text, "-b", 3.9, "--candidates", "3,4", "-g", GROUP, "--minutes", 0.2)
    monkeypatch.setattr(Shares, "affords_uniform", lambda *given: True)  # on every machine
    monkeypatch.setattr("recompile.auto.is_rival", lambda *given: True)
    made(*options)
    split = json.loads((tmp_path / "mix.work" / "auto.json").read_text())["done"]["split"]["result"]["split"]
    assert split["heal"] is None
    assert split["search_minutes"] == 0, "of costs that are there"
    assert all(found.feedback for found in load_profile(tmp_path / "mix.work" / "profile.jsonl").header.candidates)
    assert not list(tmp_path.glob("mix.work/*.rounded")), "until the end only"
    monkeypatch.setattr(
        "recompile.planning.flops_per_second", lambda device="cpu": 1e6
    )  # a machine that is slow by now
    again = made(*options)
    assert again.output.count("done before") == 7
    other = auto(*options[:-1], 30)
    assert other.exit_code == 1
    assert "other settings (minutes)" in other.output


@pytest.mark.parametrize(
    ("minutes", "heal", "wanted"),
    [
        (100.0, True, (64, 16, 64, 18.67, 28.0)),
        (100.0, None, (64, 16, 64, 46.67, None)),
        (100.0, 5.0, (64, 16, 64, 41.67, 5.0)),
        (20.0, True, (16, 4, 32, 3.52, 5.28)),
        (1.0, True, (8, 4, 16, 0.5, None)),
    ],
)
def test_how_minutes_are_split(minutes: float, heal: float | None, wanted: tuple[float | None, ...]) -> None:
    def passes(rows: int, samples: int, calibration_rows: int) -> float:
        return rows * (samples + 1) * 2.0 + calibration_rows * 16.0

    found = split_minutes(minutes, (64, 16, 64), passes, heal)
    assert (found.rows, found.samples, found.calibration_rows, found.search_minutes, found.heal) == wanted
    spent = passes(found.rows, found.samples, found.calibration_rows) / 60 + found.search_minutes + (found.heal or 0)
    assert spent <= minutes + 0.01 or wanted[:3] == (8, 4, 16)


def plan_of(rows: int, samples: int, calibration_rows: int) -> AutoPlan:
    """Seconds that are easy to follow."""
    seconds = {"profile": rows * samples, "recipe": 2 * rows, "build": 8 * calibration_rows}
    seconds |= {"uniform": 8 * calibration_rows, "pick": 3 * rows, "verify": 4 * rows}
    stages = tuple(PlannedStage(name, "", float(found)) for name, found in seconds.items())
    return AutoPlan(None, "", (), stages, 0, ())


def test_minutes_are_shared_again_by_what_stages_took() -> None:
    asked = Asked((16, 16, 64), 40.0, None, None, says_times=True)
    shares = Shares(asked, plan_of, judging=120.0)
    first = shares.first()
    assert first is not None
    assert (first.counts, first.minutes) == ((16, 16, 64), 40.0)
    fast = shares.again(first, {"profile": 128.0})
    assert (fast.counts, fast.heal is not None) == (first.counts, True)
    assert fast.search_minutes > first.search_minutes
    slow = shares.again(first, {"profile": 768.0})  # thrice as long
    assert slow.rows == 16, "the profile is there"
    assert slow.calibration_rows == 16
    assert slow.minutes == 40.0
    done = {"profile": 128.0, "recipe": 600.0, "build": 512.0, "uniform": 512.0, "pick": 96.0}
    left = 0.95 * (40 - (sum(done.values()) + 2 * 64) / 60)  # pick took twice its plan, so verify will
    assert shares.healing(first, done) == pytest.approx(left, abs=0.01)
    assert shares.healing(first, {**done, "build": 550.0}) == pytest.approx(6.11, abs=0.01), "of which 4 are judging"
    assert shares.healing(first, {**done, "build": 590.0}) is None, "5.5, of which steps would get less than a third"
    assert shares.healing(first, {**done, "build": 1012.0}) is None, "two minutes and more are judging"
    done = {"profile": 256.0, "recipe": 600.0}
    assert shares.calibrating(first, done) == first, "1,760 s of 2,160, which is late enough"
    few = replace(first, calibration_rows=16)
    assert shares.calibrating(few, {**done, "recipe": 400.0}).calibration_rows == 64, "a quarter is left for healing"
    assert shares.calibrating(few, done).calibration_rows == 32
    late = {**done, "recipe": 1100.0}
    assert shares.calibrating(first, late).calibration_rows == 32
    assert shares.calibrating(first, {**late, "profile": 1024.0}).calibration_rows == 16, "there are no fewer"
    assert shares.affords_uniform(first, {**late, "build": 460.0})
    assert not shares.affords_uniform(first, {**late, "build": 500.0}), "460, as long again, and 112 to compare"
    given = Shares(Asked((16, 16, 64), 40.0, 3.0, 5.0, says_times=True), plan_of, 120.0)
    assert given.again(first, {"profile": 384.0}).search_minutes == 3.0
    assert given.healing(first, done) == 5.0


def test_minutes_that_are_left_go_to_healing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it was planned or not, and the other way round; what is built is placed either way."""
    base, healed = tiny.base("llama-2"), tmp_path / "healed"
    monkeypatch.setattr("recompile.auto_minutes.LEAST_HEAL_MINUTES", 1e6)  # so that none is planned
    heal, given = recompile.api.heal, []

    def short(*paths: Any, minutes: float, **how: Any) -> Any:
        given.append(minutes)
        return heal(*paths, minutes=0.02, **how)

    monkeypatch.setattr(recompile.api, "heal", short)
    options = (text, "-b", 3.9, "--candidates", "3,4", "-g", GROUP, "--minutes", 2)
    made(base, healed, *options)
    done = json.loads((tmp_path / "healed.work" / "auto.json").read_text())["done"]
    assert done["shares"]["result"]["split"]["heal"] is None
    assert given == [done["left"]["result"]["heal"]]
    assert given[0] > 0.5
    assert "heal" in done
    assert (healed / "config.json").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(Shares, "healing", lambda *given: None)
    monkeypatch.setattr("recompile.auto.is_rival", lambda *given: True)
    options = (*options[:-1], 9)
    again = made(base, tmp_path / "plain", *options)
    told = " ".join(again.output.split())
    assert "too few of 9 minutes are left for healing; it is left out" in told
    assert (tmp_path / "plain" / "config.json").is_file()
    assert "heal" not in json.loads((tmp_path / "plain.work" / "auto.json").read_text())["done"]
    assert made(base, tmp_path / "plain", *options).output.count("done before") == 7


def test_no_uniform_build_where_it_would_be_late(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said, the mix is written, and a run that goes on does the same."""
    monkeypatch.setattr(Shares, "affords_uniform", lambda *given: False)
    monkeypatch.setattr("recompile.auto.is_rival", lambda *given: True)
    options = (tiny.base("llama-2"), tmp_path / "mix", text, "-b", 3.9, "--candidates", "3,4", "-g", GROUP)
    told = " ".join(made(*options, "--minutes", 0.2).output.split())
    assert "too few of 0.2 minutes are left for a uniform build to compare the mix with; it is left out" in told
    assert "a run with more --minutes" in told
    assert (tmp_path / "mix" / "config.json").is_file()
    assert list((tmp_path / "mix.work").glob("built*")) == []
    assert not (tmp_path / "mix.work" / "uniform").exists()
    monkeypatch.undo()
    assert made(*options, "--minutes", 0.2).output.count("done before") == 5


def test_no_uniform_build_that_is_no_rival(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where minutes are limited they go to the mix, if uniform is far from it by the profile."""
    monkeypatch.setattr(Shares, "affords_uniform", lambda *given: True)
    options = (tiny.base("llama-2"), text, "-b", 3.9, "--candidates", "2,4", "-g", GROUP, "--minutes", 0.2)
    told = " ".join(made(options[0], tmp_path / "far", *options[1:]).output.split())
    assert "a uniform build costs over 1.6 times what the mix does" in told
    assert "uniform" not in json.loads((tmp_path / "far.work" / "auto.json").read_text())["done"]
    profile, recipe = load_profile(tmp_path / "far.work" / "profile.jsonl"), tmp_path / "far.work" / "overrides.yaml"
    assert not is_rival(profile, "2", recipe)
    assert is_rival(profile, "4", recipe)
    assert made(options[0], tmp_path / "far", *options[1:]).output.count("done before") == 5


def test_a_limit_that_nobody_asked_for() -> None:
    """Only where everything takes longer and less is enough, and only where nothing was said of how much to do."""
    assert default_minutes(full=1000.0, least=100.0, weights=10**8) is None
    assert default_minutes(full=4000.0, least=700.0, weights=10**8) == 18.0
    assert default_minutes(full=8000.0, least=1500.0, weights=10**8) == 32.0  # a slow machine, or a busy one
    assert default_minutes(full=4000.0, least=700.0, weights=7 * 10**9) is None
    plain = Shares(Asked((16, 16, 64), None, None, None, says_times=False), plan_of, 60.0)
    assert plain.first() is not None
    assert plain.unlimited == 40
    assert Shares(Asked((16, 16, 64), None, None, None, says_times=True), plan_of, 60.0).first() is None
    assert not auto_options(bits=3.5).says_times
    for said in ({"rows": 8}, {"heal": 3.0}, {"quick": True}, {"minutes": 9.0}, {"variants": ("a",)}):
        assert auto_options(bits=3.5, **said).says_times


def test_a_card_of_the_user_s_is_not_written_over(text: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.card.md").write_text("# my model\n")
    result = auto(tiny.base("llama-2"), tmp_path / "mix", text, "-b", 4.3, "--candidates", "3,4")
    assert result.exit_code == 1
    assert "mix.card.md: exists, and this tool did not make it" in result.output
    assert not (tmp_path / "mix.work").exists()


def test_it_goes_on_after_the_last_finished_stage(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in every stage in turn; no stage that was finished runs again."""
    base, out, ran = tiny.base("llama-2"), tmp_path / "mix", []
    options = (base, out, text, "-b", 4.3, "--candidates", "3,4", "-g", GROUP)
    whole = Stages.run
    for number, stopped in enumerate(("profile", "recipe", "build", "uniform", "pick", "verify")):

        def run(self: Any, name: str, stage: Any, leaves: Path | None = None, *, stopped: str = stopped) -> Any:
            def counted() -> Any:
                ran.append(name)
                if name == stopped:
                    raise KeyboardInterrupt
                return stage()

            return whole(self, name, counted, leaves)

        monkeypatch.setattr(Stages, "run", run)
        assert auto(*options).exit_code == 130
        monkeypatch.undo()
        done = json.loads((tmp_path / "mix.work" / "auto.json").read_text())["done"]
        assert len([name for name, stage in done.items() if "decision" not in stage]) == number
    assert sorted(ran) == sorted(2 * ["profile", "recipe", "build", "uniform", "pick"] + ["verify"])
    made(*options)
    again = made(*options)
    assert again.output.count("done before") == 7


def test_other_settings_are_not_mixed_in(text: Path, tmp_path: Path) -> None:
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    work = tmp_path / "mix.work"
    work.mkdir()
    (work / "auto.json").write_text(json.dumps({"settings": {"base": "another"}, "done": {}}))
    result = auto(base, out, text, "-b", 4)
    assert result.exit_code == 1
    assert "begun with other settings (base, budget" in result.output


def test_it_refuses_a_directory_that_it_did_not_make(text: Path, tmp_path: Path) -> None:
    (tmp_path / "mix").mkdir()
    result = auto(tiny.base("llama-2"), tmp_path / "mix", text, "-b", 4)
    assert result.exit_code == 1
    assert "was not made by model_auto" in result.output


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "give one budget: --bits 3.5, --total-bpw 4 or --size 4.2GiB"),
        (("-b", 4, "--size", "1MiB"), "give one budget: --bits 3.5, --total-bpw 4 or --size 4.2GiB"),
        (("-b", 4, "--variants", "x"), "x: no such model directory"),
        (("-b", 4, "--variants", "x", "y", "--candidates", "3,4"), "--variants and --candidates exclude each other"),
        (("-b", 4, "--format", "exl2", "-g", 32), "--group-size: of integers; --format exl2 has groups of its own"),
        (("-b", 4, "--level", "row"), '--level "row": wanted one of layer, block, fused, expert, tensor'),
        (("-b", 4, "--solver", "best"), '--solver "best": wanted one of greedy, exact'),
        (("-b", 4, "--trace", "none.json"), "--trace takes the place of --text; give one of them"),
        (("-b", 4, "--tokenizer-from", "none.gguf"), "none.gguf: cannot be read: No such file or directory"),
    ],
)
@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_what_is_missing_is_said_first(
    more: tuple[object, ...], says: str, plan: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    result = auto(tiny.base("llama-2"), tmp_path / "mix", text, *more, *plan)
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "mix.work").exists()


def test_a_work_folder_of_the_user_is_left_alone(text: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mix.work" / "profile.jsonl"
    mine.parent.mkdir()
    mine.write_text("mine")
    result = auto(tiny.base("llama-2"), tmp_path / "mix", text, "-b", 4.3, "--candidates", "3,4", "-g", GROUP)
    assert result.exit_code == 1
    assert "mix.work: exists and is not an unfinished output" in " ".join(result.output.split())
    assert [path.read_text() for path in mine.parent.iterdir()] == ["mine"]
    mine.unlink()  # an empty one is no more ours
    result = auto(tiny.base("llama-2"), tmp_path / "mix", text, "-b", 4.3, "--candidates", "3,4", "-g", GROUP)
    assert result.exit_code == 1
    assert "mix.work: exists and is not an unfinished output" in " ".join(result.output.split())
    assert list(tmp_path.glob("mix*")) == [mine.parent]


def test_variants_are_merged(text: Path, tmp_path: Path) -> None:
    found, out = tiny.variants("llama-2", (3, 4, 6)), tmp_path / "mix"
    made(
        tiny.base("llama-2"), out, text, "-b", 4.3, "--variants", *found.values(), "--json", tmp_path / "r.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "r.json").read_text())
    assert [Path(entry["build"]).name for entry in report["builds"]] == ["mix", "3bpw", "4bpw", "6bpw"]
    assert 3.5 < report["builds"][0]["bpw"] <= 4.3
    assert report["builds"][0]["kl_nats"] < report["builds"][1]["kl_nats"]


def test_gguf_types_make_one_file(text: Path, tmp_path: Path) -> None:
    """The mix beside the largest uniform file that is no larger, both with the importance of the profile."""
    pytest.importorskip("libgguf")
    base, out = tiny.base("llama-2"), tmp_path / "MIX.gguf"
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    tokens = tmp_path / "tokens.gguf"
    tokenizer_file(tokens, vocabulary)
    options = (text, "-b", 5.1, "--candidates", "Q4_0,Q5_0,Q8_0", "--tokenizer-from", tokens, "--level", "tensor")
    made(base, out, *options, "--json", tmp_path / "r.json")
    mix, uniform = json.loads((tmp_path / "r.json").read_text())["builds"]
    types = {tensor.type.name for tensor in open_gguf(out).tensors.values()}
    assert len(types & {"Q4_0", "Q5_0", "Q8_0"}) >= 2
    assert uniform["build"].endswith("-Q4_0.gguf")
    assert 4.9 < mix["bpw"] <= 5.1
    assert uniform["total_bytes"] <= mix["total_bytes"] == open_checkpoint(out).size_bytes
    assert 0 < mix["kl_nats"] < uniform["kl_nats"]
    assert made(base, out, *options).output.count("done before") == 7

    for names, where, message in (
        ("Q4_0,Q8_0", tmp_path / "mix", "ends in .gguf"),
        ("4,Q8_0", tmp_path / "x.gguf", "never in one build"),
    ):
        result = auto(base, where, text, "-b", 5, "--candidates", names)
        assert result.exit_code == 1
        assert message in result.output


@pytest.mark.sweep
def test_a_gguf_mix_is_healed_or_stays_as_it_was_built(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("libgguf")
    base, out = tiny.base("llama-2"), tmp_path / "MIX.gguf"
    tokens = tokenizer_file(tmp_path / "tokens.gguf", json.loads((base / "config.json").read_text())["vocab_size"])
    more = ("-b", 5.1, "--candidates", "Q4_0,Q8_0", "--tokenizer-from", tokens, "--heal", 0.02)
    said = made(base, out, text, *more, "--json", tmp_path / "r.json").output
    mix, built, _ = json.loads((tmp_path / "r.json").read_text())["builds"]
    assert (Path(mix["build"]).name, Path(built["build"]).name) == ("MIX.gguf", "built.gguf")
    assert mix["total_bytes"] == built["total_bytes"] == open_checkpoint(out).size_bytes
    is_healed = HEAL_KEY in open_gguf(out).keys
    assert is_healed == (mix["kl_nats"] != built["kl_nats"]) == ("stays as it was built" not in said)
    assert not (tmp_path / "MIX.gguf.work" / "built.gguf").exists()


def test_bits_and_schemes_on_offer(text: Path, tmp_path: Path) -> None:
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    names = f"3,w4a16-g{GROUP},fp8-channel"
    made(base, out, text, "-b", 5.5, "--candidates", names, "-g", GROUP, "--json", tmp_path / "r.json")
    mix, uniform = json.loads((tmp_path / "r.json").read_text())["builds"]
    assert uniform["build"].endswith(f"w4a16-g{GROUP}")
    assert {module.format for module in open_checkpoint(out).modules.values()} >= {"pack-quantized", "float-quantized"}
    assert 0 < mix["kl_nats"] < uniform["kl_nats"]


# ---- for an engine, healed, planned ----------------------------------------------------------------------------------


def test_for_an_engine_its_candidates_and_rules(text: Path, tmp_path: Path) -> None:
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    made(base, out, text, "-b", 5.5, "--for", "vllm", "-g", GROUP, "--json", tmp_path / "r.json")
    assert {c.label for c in load_profile(tmp_path / "mix.work" / "profile.jsonl").header.candidates} == {"4", "8"}
    assert check(out, engine="vllm").errors == ()
    result = auto(base, out, text, "-b", 5.5, "--for", "transformers", "-g", GROUP)
    assert result.exit_code == 1
    assert "engine" in result.output  # the folder was begun for another


def test_for_mlx_embedding_and_head_are_chosen_too(text: Path, tmp_path: Path) -> None:
    """Down to the uniform build, everything is as mlx-lm has it."""
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    options = (base, out, text, "-b", 4.9, "--for", "mlx", "-g", GROUP)
    made(*options, "--json", tmp_path / "r.json")
    header = load_profile(tmp_path / "mix.work" / "profile.jsonl").header
    assert {candidate.label for candidate in header.candidates} == {"2", "3", "4", "5", "6", "8"}
    assert {"model.embed_tokens", "lm_head"} <= {group.name for group in header.groups}
    mix, uniform = json.loads((tmp_path / "r.json").read_text())["builds"]
    assert 4.5 < mix["bpw"] <= 4.9
    assert mix["total_bytes"] == open_checkpoint(out).size_bytes
    assert uniform["build"].endswith("3bpw"), "4 bits in groups of 32, with a bias, are 5 bpw and would be larger"
    assert 0 < mix["kl_nats"] < uniform["kl_nats"]
    stored = {module.format for module in open_checkpoint(out).modules.values() if len(module.shape or ()) == 2}
    assert stored == {"mlx"}
    assert check(out, engine="mlx").errors == ()
    assert made(*options).output.count("done before") == 7


def test_healed_mixes_stand_beside_the_mix_as_it_was_built(text: Path, tmp_path: Path) -> None:
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    options = (base, out, text, "-b", 3.9, "--candidates", "3,4", "-g", GROUP, "--heal", 0.02)
    made(*options, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    mix, built, _ = report["builds"]
    assert list(report["seconds"]) == ["profile", "recipe", "build", "uniform", "pick", "heal", "verify", "report"]
    assert (Path(mix["build"]).name, Path(built["build"]).name) == ("mix", "built")
    assert mix["total_bytes"] == built["total_bytes"]
    assert not (tmp_path / "mix.work" / "built").exists()
    assert made(*options).output.count("done before") == 8


def test_the_uniform_build_is_written_where_it_is_better(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a compensated mix and a uniform build of the size, that with less KL on rows for such decisions."""

    def choose_badly(self: Any) -> object:
        profile = load_profile(self.profile)
        size = (bits_of_uniform(profile, "3") + profile.header.other_bits) // 8
        return recompile.optimize(self.profile, self.recipe, size=size, pin=["*=3"], solver="exact", check=False)

    monkeypatch.setattr("recompile.auto._Auto._recipe", choose_badly)
    options = (tiny.base("llama-2"), tmp_path / "mix", text, "-b", 4.6, "--candidates", "3,4,6", "-g", GROUP)
    result = made(*options, "--json", tmp_path / "r.json")
    assert re.search(r"KL 0\.\d+ of the mix, 0\.\d+ of uniform 4, .*: uniform is written", result.output)
    report = json.loads((tmp_path / "r.json").read_text())
    written, other = report["builds"]
    assert (Path(written["build"]).name, Path(other["build"]).name) == ("mix", "built")
    assert written["bpw"] == pytest.approx(other["bpw"] + 1)
    assert written["kl_nats"] < other["kl_nats"]
    assert Path(report["recipe"]).name == "uniform.yaml"
    assert load_recipe(report["recipe"]).provenance["bpw"] == pytest.approx(written["bpw"], abs=1e-4)
    assert made(*options).output.count("done before") == 7
    healed = (*options[:1], tmp_path / "healed", *options[2:], "--heal", 0.02, "--json", tmp_path / "h.json")
    made(*healed)
    first, before, _ = json.loads((tmp_path / "h.json").read_text())["builds"]
    assert Path(before["build"]).name == "4bpw"
    assert first["bpw"] == before["bpw"] == written["bpw"]


def test_where_healing_is_not_better_the_mix_stays_as_it_was_built(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heal(*_: Any, **__: Any) -> None:
        raise NotBetterError("it is not better")

    monkeypatch.setattr(recompile.api, "heal", heal)
    out = tmp_path / "mix"
    more = ("-b", 3.9, "--candidates", "3,4", "-g", GROUP, "--heal", 0.02, "--json", tmp_path / "r.json")
    result = made(tiny.base("llama-2"), out, text, *more)
    assert "it is not better; the mix stays as it was built" in result.output
    mix, built, _ = json.loads((tmp_path / "r.json").read_text())["builds"]
    assert mix["kl_nats"] == built["kl_nats"]
    assert open_checkpoint(out).size_bytes == mix["total_bytes"]


def test_a_plan_is_printed_and_nothing_is_made(text: Path, tmp_path: Path) -> None:
    base, out = tiny.base("llama-2"), tmp_path / "mix"
    result = made(base, out, text, "-b", 4, "--heal", 5, "--rounding", "two-sided", "--plan")
    for stage in ("profile", "recipe", "build", "uniform", "heal", "verify"):
        assert re.search(rf"^  {stage} +about +\d", result.output, re.MULTILINE), result.output
    assert "two-sided" in result.output
    assert list(tmp_path.iterdir()) == [text]
    file = tmp_path / "mix.gguf"
    result = made(base, file, text, "-b", 5, "--for", "llama.cpp", "--plan", "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["missing"] == []
    assert plan["seconds"] == pytest.approx(sum(stage["seconds"] for stage in plan["stages"]))
    searched = recompile.auto_plan(base, out, bits=4, solver="superadditive", search_minutes=3)
    assert searched.stages[1].seconds > 180  # it measures whole mixes, as the table of solvers says


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--for", "exllamav3", "--format", "exl2"), "--for exllamav3 reads exl3, not --format exl2"),
        (("--for", "mlx", "--asym"), "--asym: of compressed-tensors; --format mlx has a bias in every group anyway"),
        (("--for", "exllamav2", "-g", 32), "--group-size: of integers; --format exl2 has groups of its own"),
        (("--for", "vllm", "--variants", "x", "y"), "--for says what candidates are made"),
        (("--rounding", "two-sided", "--variants", "x", "y"), "--rounding: variants are rounded already"),
    ],
)
def test_engines_and_rounding_that_do_not_fit(more: tuple[object, ...], says: str, text: Path, tmp_path: Path) -> None:
    result = auto(tiny.base("llama-2"), tmp_path / "mix", text, "-b", 4, *more)
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())


def test_a_first_look_takes_less_of_everything_and_no_more_than_was_asked_for() -> None:
    plain, quick = auto_options(bits=3.5), auto_options(bits=3.5, quick=True)
    assert (quick.rows, quick.length, quick.samples, quick.calibration_rows) == (6, 256, 8, 24)
    assert (quick.search_minutes, quick.rounding, quick.verify) == (1.0, "one-sided", False)
    assert (quick.solver, quick.checks_recipe, plain.solver, plain.checks_recipe) == ("refine", False, None, True)
    assert auto_options(bits=3.5, quick=True, solver="exact").solver == "exact"
    assert (plain.search_minutes, plain.rounding, plain.verify) == (None, None, True)
    asked = auto_options(bits=3.5, quick=True, rows=2, search_minutes=3.0, rounding="two-sided")
    assert (asked.rows, asked.search_minutes, asked.rounding) == (2, 3.0, "two-sided")
    assert auto_options(bits=3.5, quick=True, variants=("a", "b")).rounding is None  # they are rounded already


def test_the_library_takes_the_arguments_that_auto_has() -> None:
    with pytest.raises(TypeError, match="no argument 'bit'"):
        recompile.auto_plan("base", "mix", bit=4)


def test_a_first_look_searches_and_measures_nothing_beside_it(tmp_path: Path) -> None:
    how: dict[str, Any] = {"bits": 4.0, "candidates": ["3,4"], "group_size": tiny.GROUP_SIZE, "quick": True}
    stages: set[str] = set()
    recompile.auto(
        tiny.base("llama-2"), tmp_path / "mix", **how, rows=2, length=32, calibration_rows=4, search_minutes=0.02,
        on_event=lambda event: stages.add(event.what) if isinstance(event, Progress) else None,
    )  # fmt: skip
    assert (tmp_path / "mix.work" / "overrides.refine.jsonl").is_file()
    assert "quantizing" in stages
    assert "checking" not in stages


def test_where_errors_are_compensated_the_costs_alone_choose(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of candidates rounded with error feedback, kept for that where there is room: a run that was begun goes on as it
    was begun, whatever room there is by then."""

    def plan(*more: object) -> str:
        asked = (tiny.base("llama-2"), tmp_path / "mix", text, "-b", 3.9, "--candidates", "3,4", "-g", GROUP, *more)
        words = [word for word in arguments(*asked, "--plan") if word not in ("--solver", "exact")]
        result = CliRunner().invoke(model_auto.main, words)
        assert result.exit_code == 0, result.output
        return result.output

    feedback, searches = "rounded before with error feedback", "refine, and 7 mixes measured"
    said = plan()
    assert feedback in said
    assert searches not in said
    assert feedback in plan("--no-compensate")
    for more in (["--no-compensate"], ["--search-minutes", 1]):
        assert searches in plan(*more), "what is built is what a search measures, or it is asked for"
    monkeypatch.setattr("recompile.auto_checks.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    said = plan()
    assert "candidates are measured without error feedback, for which" in said
    assert "mix.work; found 1000 B" in said
    assert feedback not in said
    assert searches in said
    (tmp_path / "mix.work").mkdir()
    write_checked_json(tmp_path / "mix.work" / STATE, {"settings": {"feedback": True}, "done": {}})
    assert feedback in plan()
