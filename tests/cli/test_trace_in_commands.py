"""`--trace` in every command: the rows of the role that is needed, what counts of them, what is said of them, and what
is refused: another trace on resuming, and a row in two roles."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import recompile
from eval.heal import HealChecked
from eval.heal_rows import heal_rows
from eval.profile.exact import Measured, ProfileJob, ProfileOptions, profile_exact
from eval.trace.prompts import prompts_of_file
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_heal import main as model_heal
from recompile.cli.model_optimize import main as model_optimize
from recompile.cli.model_profile import main as model_profile
from recompile.cli.model_quantize import main as model_quantize
from recompile.cli.model_report import main as model_report
from recompile.costs import Profile, load_profile
from recompile.errors import ArgumentError, JournalError, MismatchError, OutputError, RecompileError
from recompile.events import Note
from recompile.io.checksums import KEY
from recompile.model.rows import RowOptions
from recompile.model.texts import ROLE_SHARES
from recompile.model.tokens import Rows, save_rows
from recompile.model.trace import METADATA_KEY, read_trace
from recompile.model.used_rows import UsedRows, check_apart
from recompile.quantize.gguf import VariantsReport
from recompile.quantize.quantize_report import LayerDone
from recompile.recipe.recipe import load_recipe
from tests import tiny, traces
from tests.commands import refusal, run
from tests.journals import unsealed
from tests.quantize.test_gguf_variants import tokenizer_file

LENGTH = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """trace.safetensors of the talking model, and 3bpw and 4bpw calibrated on it."""
    folder = tmp_path_factory.mktemp("commands")
    prompts = traces.write_prompts(folder / "prompts.jsonl", copies=3)
    recompile.trace(traces.model(), folder / "trace.safetensors", prompts=prompts, tokens=12)
    options = ("--trace", folder / "trace.safetensors", "-l", LENGTH, "-g", tiny.GROUP_SIZE, "--quiet")
    more = ("--positions", "response", "--json", folder / "made.json")
    run(model_quantize, "-i", traces.model(), "-o", folder, "-b", 3, 4, *options, *more)
    return folder


@pytest.fixture(scope="module")
def profiled(folder: Path) -> Path:
    """profile.jsonl of the two variants, from the trace."""
    options = ("--mode", "sketch", "--samples", 4, "-l", LENGTH, "-r", 6, "--quiet")
    run(
        model_profile, "-mb", traces.model(), "-i", folder / "3bpw", "-s", folder / "4bpw", *options,
        "--trace", folder / "trace.safetensors", "-o", folder / "profile.jsonl",
    )  # fmt: skip
    return folder / "profile.jsonl"


def trace_of(folder: Path, role: str, rows: int | None = None) -> Rows:
    where = RowOptions(rows, LENGTH, trace=folder / "trace.safetensors")
    return where.read([traces.model()], role)[0]


def other_trace(folder: Path, tmp_path: Path) -> Path:
    """Another trace of the same prompts."""
    out = tmp_path / "other.safetensors"
    recompile.trace(traces.model(), out, prompts=folder / "prompts.jsonl", tokens=12, seed=5)
    return out


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_end_at_the_length_and_late_answers_are_left_out(folder: Path) -> None:
    trace = read_trace(folder / "trace.safetensors").of_role("choose")
    lengths, first = trace.lengths.tolist(), [int(row.nonzero()[0]) for row in trace.response]
    length = sorted(first)[len(first) // 2]
    where = RowOptions(None, length, trace=folder / "trace.safetensors")
    rows, _ = where.read([traces.model()], "choose")
    kept = [row for row in range(len(lengths)) if first[row] < length]
    assert 0 < len(kept) < len(lengths)
    assert rows.ids.tolist() == trace.ids[kept, :length].tolist()
    assert rows.counted is not None
    for row, number in enumerate(kept):
        last = min(lengths[number], length) - 1
        assert rows.counted[row].nonzero().flatten().tolist() == list(range(first[number] - 1, last))
    late = len(lengths) - len(kept)
    assert f"cut at {length} tokens; {late} of {len(lengths)} rows answer later and are left out" in rows.source
    with pytest.raises(RecompileError, match='no response of the role "choose" begins within 2 tokens'):
        RowOptions(None, 2, trace=folder / "trace.safetensors").read([traces.model()], "choose")


def test_parts_keep_what_counts_and_have_hashes_of_their_own(folder: Path) -> None:
    rows = trace_of(folder, "calibrate")
    part = rows.part(2, 5)
    assert rows.counted is not None
    assert part.counted is not None
    assert torch.equal(part.counted, rows.counted[2:5])
    assert (part.positions, part.role, part.documents) == ("response", "calibrate", rows.documents[2:5])
    assert part.sha256 not in (rows.sha256, rows.part(1, 4).sha256)
    every = RowOptions(None, LENGTH, trace=folder / "trace.safetensors", positions="all")
    assert every.read([traces.model()], "calibrate")[0].sha256 != rows.sha256
    turned = rows.by_length()
    assert sorted(turned.documents) == sorted(rows.documents)
    assert turned.lengths is not None
    assert turned.lengths.tolist() == sorted(turned.lengths.tolist())


# ---- every command takes the rows of its role, and says so -----------------------------------------------------------


def test_quantizing_takes_calibrate_rows(folder: Path, tmp_path: Path) -> None:
    rows = trace_of(folder, "calibrate", 64)
    assert rows.counted is not None
    found = json.loads((folder / "3bpw" / "quantize_report.json").read_text())
    assert found["rows"]["documents"] == list(rows.documents)
    assert (found["rows"]["role"], found["rows"]["positions"]) == ("calibrate", "response")
    assert found["made_by"]["rows"] == rows.sha256
    tokens = {module["tokens"] for module in found["variant"]["modules"] if module["quantized"]}
    assert tokens == {int(rows.counted.sum())}
    assert json.loads((folder / "made.json").read_text())["rows"]["role"] == "calibrate"
    options = ("-i", traces.model(), "-b", 3, "-g", tiny.GROUP_SIZE, "-l", LENGTH, "--quiet")
    said = run(model_quantize, *options, "-o", tmp_path, "--trace", folder / "trace.safetensors")  # of all positions
    assert json.loads((tmp_path / "3bpw" / "quantize_report.json").read_text())["rows"]["positions"] == "all"
    assert f"calibrated on {len(rows.ids)} rows, trace.safetensors, written by talking" in said
    assert "role calibrate" in said
    one, other = (load_file(path / "3bpw" / "model.safetensors") for path in (folder, tmp_path))
    assert any(not torch.equal(one[name], other[name]) for name in one if name.endswith("weight_packed"))
    assert "--positions goes with --trace" in refusal(model_quantize, *options, "-o", tmp_path, "--positions", "all")


def test_two_sided_rounding_takes_them_too(folder: Path, tmp_path: Path) -> None:
    rows = trace_of(folder, "calibrate", 64)
    options = ("--rounding", "two-sided", "--stats", tmp_path / "stats", "-g", tiny.GROUP_SIZE, "-l", LENGTH, "--quiet")
    run(
        model_quantize, "-i", traces.model(), "-o", tmp_path, "-b", 3, *options,
        "--trace", folder / "trace.safetensors", "--positions", "response",
    )  # fmt: skip
    about = json.loads((tmp_path / "stats" / "statistics.json").read_text())
    assert about["made_of"]["rows"] == rows.sha256
    assert rows.counted is not None
    held_out = list(range(7, len(rows.ids), 8))
    counts = {tuple(entry[1:]) for entry in about["modules"].values()}
    apart = int(rows.counted[held_out].sum())
    assert counts == {(2 * (int(rows.counted.sum()) - apart), 2 * apart)}


@pytest.mark.parametrize("rounding", [None, "one-sided"])
def test_gguf_files_are_calibrated_on_them(folder: Path, tmp_path: Path, rounding: str | None) -> None:
    vocabulary = json.loads((traces.model() / "config.json").read_text())["vocab_size"]
    how: dict[str, Any] = {"tokenizer_from": tokenizer_file(tmp_path / "tokens.gguf", vocabulary), "rounding": rounding}
    how |= {"bits": ["Q4_0"], "format": "gguf", "length": LENGTH, "trace": folder / "trace.safetensors"}
    made = []
    for positions in ("response", "all"):
        report = recompile.quantize(traces.model(), tmp_path / positions, **how, positions=positions)
        assert isinstance(report, VariantsReport)
        assert report.rows == UsedRows.of(
            RowOptions(64, LENGTH, trace=how["trace"], positions=positions).read([traces.model()], "calibrate")[0],
            "calibrate",
        )
        made.append(Path(report.files[0]).read_bytes())
    assert made[0] != made[1]


def test_groups_are_attributed_at_the_positions_of_responses(folder: Path, tmp_path: Path) -> None:
    given = {"trace": folder / "trace.safetensors", "rows": 4}
    found = recompile.diff(folder / "3bpw", traces.model(), **given, attribute="layer").attribution
    assert found is not None
    rows = RowOptions(4, 512, trace=folder / "trace.safetensors").read([traces.model()], "report")[0].by_length()
    base, build = (open_checkpoint(path) for path in (traces.model(), folder / "3bpw"))
    job = ProfileJob(base, 3, [(3, build)], rows.ids, tmp_path / "p.jsonl", ProfileOptions(level="layer"))
    *_, profile = profile_exact(job.over(rows, tmp_path / "p.jsonl"))
    assert isinstance(profile, Profile)
    for group in found.groups:
        assert group.kl_rows == pytest.approx(profile.measurements[group.group, "3"].kl_rows, abs=1e-6)


def test_profiles_take_choose_rows(folder: Path, profiled: Path) -> None:
    header = load_profile(profiled).header
    rows = trace_of(folder, "choose", 6)
    assert (header.rows_role, header.positions, header.rows_sha256) == ("choose", "response", rows.sha256)
    assert header.documents == rows.documents


@pytest.mark.parametrize("mode", ["exact", "hybrid", "diagonal", "weights"])
def test_every_mode_runs_on_a_trace(folder: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "p.jsonl"
    more = ("-b", 4, "--minutes", 0.02) if mode == "hybrid" else ()
    said = run(
        model_profile, "-mb", traces.model(), "--candidates", "3,4", "-g", tiny.GROUP_SIZE, "--mode", mode, *more,
        "--samples", 2, "-r", 3, "-l", LENGTH, "--trace", folder / "trace.safetensors", "-o", out, "--quiet",
    )  # fmt: skip
    assert "role choose, response tokens only" in said
    profile = load_profile(out)
    assert profile.is_complete
    assert max(found.mean for found in profile.measurements.values()) > 0


def test_added_rows_are_those_of_the_trace(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    run(
        model_profile, "-mb", traces.model(), "--candidates", "3,4", "-g", tiny.GROUP_SIZE, "--mode", "sketch",
        "--samples", 2, "-r", "auto", "--rtol", 1e-6, "-l", LENGTH, "--trace", folder / "trace.safetensors",
        "-o", out, "--quiet",
    )  # fmt: skip
    rows = trace_of(folder, "choose")
    header = load_profile(out).header
    assert header.rows == len(rows.ids) > 8
    assert (header.rows_sha256, header.documents) == (rows.sha256, rows.documents)


@pytest.mark.parametrize("solver", ["exact", "refine", "local", "tilted", "superadditive"])
def test_recipes_are_searched_and_verified_on_their_own_rows(
    folder: Path, profiled: Path, tmp_path: Path, solver: str
) -> None:
    out = tmp_path / "mix.yaml"
    more = ("--steps", 1) if solver in ("refine", "local") else ()
    said = run(
        model_optimize, profiled, "-b", 4.2, "-o", out, "--solver", solver, *more, "--check", "-r", 4, "-l", LENGTH,
        "--trace", folder / "trace.safetensors", "--json", tmp_path / "r.json", "--quiet",
    )  # fmt: skip
    rows = trace_of(folder, "accept", 4).by_length()
    verdict = json.loads((tmp_path / "r.json").read_text())["verdict"]
    assert (verdict["rows_sha256"], verdict["rows_role"]) == (rows.sha256, "accept")
    assert rows.counted is not None
    assert (verdict["positions"], verdict["tokens"]) == ("response", int(rows.counted.sum()))
    assert "role accept, response tokens only" in said
    assert load_recipe(out).provenance["measured_positions"] == "response"


def test_a_limit_is_held_on_accept_rows_and_verified_on_report_rows(
    folder: Path, profiled: Path, tmp_path: Path
) -> None:
    options = ("--max-kl", 0.12, "--check", "-r", 4, "-l", LENGTH, "--json", tmp_path / "r.json", "--quiet")
    run(model_optimize, profiled, "-o", tmp_path / "m.yaml", *options, "--trace", folder / "trace.safetensors")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["limit"]["rows_sha256"] == trace_of(folder, "accept", 4).sha256
    assert found["verdict"]["rows_role"] == "report"


def test_frontiers_are_measured_on_the_trace(folder: Path, profiled: Path, tmp_path: Path) -> None:
    options = ("--frontier", "3.6:4.4:0.4", "--check", "-r", 3, "-l", LENGTH, "--quiet")
    run(model_optimize, profiled, "-o", tmp_path / "f", *options, "--trace", folder / "trace.safetensors")
    table = json.loads((tmp_path / "f" / "frontier.json").read_text())["rows"]
    trace = {row["name"]: row["measured_kl_nats"] for row in table}
    run(model_optimize, profiled, "-o", tmp_path / "g", *options)
    text = json.loads((tmp_path / "g" / "frontier.json").read_text())["rows"]
    assert all(row["measured_kl_nats"] != trace[row["name"]] > 0 for row in text)


def test_healing_takes_the_rows_of_every_role(folder: Path, tmp_path: Path) -> None:
    base, build = (open_checkpoint(path) for path in (traces.model(), folder / "3bpw"))
    where = RowOptions(5, LENGTH, trace=folder / "trace.safetensors")
    rows, vocab = heal_rows(base, build, where, tokens=10_000)
    assert vocab is not None
    for name, role in (("train", "calibrate"), ("choose", "choose"), ("accept", "accept"), ("report", "report")):
        wanted = trace_of(folder, role, None if name == "train" else 5)
        assert torch.equal(getattr(rows, name), wanted.ids)
        assert wanted.counted is not None
        assert torch.equal(rows.counted[name], wanted.counted)
    assert "second" not in rows.counted
    options = ("--tokens", 400, "--batch-tokens", 80, "-r", 4, "-l", LENGTH, "--learning-rate", 0.01, "--quiet")
    given = ("-i", folder / "3bpw", "-mb", traces.model(), "--trace", folder / "trace.safetensors", *options)
    said = run(model_heal, *given, "-o", tmp_path / "healed", "--json", tmp_path / "h.json")
    assert "response tokens only" in said
    found = json.loads((tmp_path / "healed" / "heal_report.json").read_text())
    assert [used["role"] for used in found["rows"]] == ["calibrate", "choose", "accept", "report"]
    assert found["positions"] == "response"


@pytest.mark.parametrize("heal", [pytest.param(False, marks=pytest.mark.sweep), True])
def test_one_command_does_all_on_the_trace(folder: Path, tmp_path: Path, heal: bool) -> None:
    how: dict[str, Any] = {"bits": 4.3, "candidates": ["3,4"], "group_size": tiny.GROUP_SIZE, "solver": "exact"}
    how |= {"rows": 4, "length": LENGTH, "calibration_rows": 8, "samples": 2, **({"heal": 0.02} if heal else {})}
    how |= {"trace": folder / "trace.safetensors", "verify": not heal}
    report = recompile.auto(traces.model(), tmp_path / "mix", **how)
    assert (report.rows_role, report.positions) == ("report", "response")
    assert report.rows_sha256 == trace_of(folder, "report", 4).by_length().sha256
    assert load_profile(tmp_path / "mix.work" / "profile.jsonl").header.positions == "response"
    with pytest.raises(OutputError, match=r"begun with other settings \(trace\)"):
        recompile.auto(traces.model(), tmp_path / "mix", **{**how, "trace": other_trace(folder, tmp_path)})
    with pytest.raises(OutputError, match=r"begun with other settings \(trace\)"):
        recompile.auto(traces.model(), tmp_path / "mix", **how, positions="all")


def test_one_command_traces_by_itself(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of_file(folder / "prompts.jsonl")
    monkeypatch.setattr("eval.trace.run.bundled_prompts", lambda: prompts)
    monkeypatch.setattr("recompile.auto.TRACE_TOKENS", 12)
    how: dict[str, Any] = {"bits": 4.3, "candidates": ["3,4"], "group_size": tiny.GROUP_SIZE, "solver": "exact"}
    how |= {"rows": 4, "length": LENGTH, "calibration_rows": 8, "samples": 2, "verify": False}
    with_trace, without = (recompile.auto_plan(traces.model(), tmp_path / "m", **how, **more)
                           for more in ({"trace": "make"}, {}))  # fmt: skip
    assert [stage.name for stage in with_trace.stages] == ["trace", *(stage.name for stage in without.stages)]
    assert "the base answers 34 prompts" in str(with_trace)  # 4 rows are 15 % of 27, and some may be left out
    assert with_trace.stages[0].seconds > 0
    assert with_trace.memory_bytes > without.memory_bytes
    report = recompile.auto(traces.model(), tmp_path / "mix", **how, trace="make")
    made = tmp_path / "mix.work" / "trace.safetensors"
    assert len(read_trace(made).ids) == 34
    assert (report.rows_role, report.positions) == ("report", "response")
    assert report.rows_source.startswith("trace.safetensors, written by talking at temperature 1")
    assert next(iter(report.seconds)) == "trace"
    with pytest.raises(OutputError, match=r"begun with other settings \(trace\)"):
        recompile.auto(traces.model(), tmp_path / "mix", **how, trace=folder / "trace.safetensors")


# ---- going on --------------------------------------------------------------------------------------------------------


def stop_at(kind: type) -> Any:
    """Once an event of a kind is told."""

    def stop(event: object) -> None:
        if isinstance(event, kind):
            raise KeyboardInterrupt

    return stop


def test_another_trace_is_refused_on_going_on(folder: Path, profiled: Path, tmp_path: Path) -> None:
    """The same file name, other rows."""
    given, other = tmp_path / "given" / "trace.safetensors", other_trace(folder, tmp_path)
    given.parent.mkdir()
    shutil.copyfile(folder / "trace.safetensors", given)
    how: dict[str, Any] = {"trace": given, "length": LENGTH}
    models = str(folder / "3bpw"), [str(folder / "4bpw")]

    def quantize(**more: Any) -> object:
        bits = {"bits": [3], "group_size": tiny.GROUP_SIZE}
        return recompile.quantize(traces.model(), tmp_path / "q", **bits, **how, **more)

    def two_sided(**more: Any) -> object:
        bits = {"bits": [3], "group_size": tiny.GROUP_SIZE, "rounding": "two-sided"}
        return recompile.quantize(traces.model(), tmp_path / "t", **bits, **how, **more)

    def profile(**more: Any) -> object:
        return recompile.profile(traces.model(), *models, tmp_path / "p.jsonl", rows=3, **how, **more)

    def heal(**more: Any) -> object:
        steps = {"tokens": 4000, "batch_tokens": 80, "rows": 4}
        return recompile.heal(folder / "3bpw", traces.model(), tmp_path / "h", **steps, **how, **more)

    runs: list[tuple[Any, type, type[Exception], str]] = [
        (quantize, LayerDone, OutputError, r"begun with other settings \(rows"),
        (two_sided, LayerDone, MismatchError, "measured on other rows, by a run that was stopped"),
        (profile, Measured, JournalError, "rows_sha256 was"),
        (heal, HealChecked, OutputError, r"begun with other settings \(rows"),
    ]
    for command, event, _, _ in runs:
        with pytest.raises(KeyboardInterrupt):
            command(on_event=stop_at(event))
    shutil.copyfile(other, given)
    for command, _, kind, said in runs:
        with pytest.raises(kind, match=said):
            command()


# ---- a row has one role ----------------------------------------------------------------------------------------------


def test_a_row_that_was_profiled_is_not_verified_on(folder: Path, profiled: Path, tmp_path: Path) -> None:
    """A profile of calibrate rows, say of another version of a publisher's trace."""
    accept = trace_of(folder, "accept", 4)
    lines = profiled.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    header["documents"][2] = accept.documents[1]
    bad = tmp_path / "profile.jsonl"
    bad.write_text("".join([json.dumps(header) + "\n", *lines[1:]]))
    unsealed(bad)
    given = (bad, "-b", 4.2, "--solver", "exact", "-r", 4, "-l", LENGTH, "--trace", folder / "trace.safetensors")
    said = refusal(model_optimize, *given, "--check", "-o", tmp_path / "m.yaml", "--quiet")
    assert f"1 documents ({accept.documents[1]}) have the role accept here" in said
    assert f"{bad} says that they were used in the role choose; a row has one role" in said
    said = refusal(
        model_optimize, *given[0:1], *given[5:], "--frontier", "3.6:4.4:0.4", "--check", "-o", tmp_path / "f"
    )
    assert "a row has one role" in said


def test_a_row_that_a_build_was_made_of_is_not_reported_on(folder: Path, tmp_path: Path) -> None:
    build = shutil.copytree(folder / "3bpw", tmp_path / "3bpw")
    report = json.loads((build / "quantize_report.json").read_text())
    documents = trace_of(folder, "report").documents
    report["rows"]["documents"][:2] = documents[:2]
    (build / "quantize_report.json").write_text(json.dumps(report))
    given = ("-ma", build, "-mb", traces.model(), "--trace", folder / "trace.safetensors")
    said = refusal(model_diff, *given)
    assert "2 documents" in said
    assert f"{build}/quantize_report.json says that they were used in the role calibrate" in said
    said = refusal(
        model_heal, "-i", build, "-mb", traces.model(), "--trace", folder / "trace.safetensors", "-o", tmp_path / "h"
    )
    assert "a row has one role" in said
    report["rows"]["documents"] = list(trace_of(folder, "choose").documents)
    (build / "quantize_report.json").write_text(json.dumps(report))
    said = refusal(
        model_profile, "-mb", traces.model(), "-i", build, "-s", folder / "4bpw", "-o", tmp_path / "p.jsonl",
        "--trace", folder / "trace.safetensors",
    )  # fmt: skip
    assert "have the role choose here" in said


def test_rows_in_a_file_are_used_in_their_role_alone(folder: Path, tmp_path: Path) -> None:
    rows, _ = RowOptions(4, 24).read([traces.model()], "report")
    save_rows(rows, tmp_path / "rows.safetensors")
    given = ("-i", traces.model(), "-o", tmp_path, "-b", 3, "--input-ids", tmp_path / "rows.safetensors")
    said = refusal(model_quantize, *given)
    assert 'rows have the role "report", and are to be used in the role "calibrate"' in said


def test_rows_without_a_role_are_warned_of(folder: Path, tmp_path: Path) -> None:
    """Someone measures on the very rows that were calibrated on."""
    save_file({"input_ids": tiny.rows(4, 24)}, tmp_path / "rows.safetensors")
    given = {"input_ids": tmp_path / "rows.safetensors"}
    recompile.quantize(traces.model(), tmp_path, bits=[3], group_size=tiny.GROUP_SIZE, **given)
    told: list[object] = []
    recompile.diff(tmp_path / "3bpw", traces.model(), **given, on_event=told.append)
    said = [event.text for event in told if isinstance(event, Note)]
    assert any("4 documents" in text and "used in the role calibrate" in text for text in said)
    told.clear()
    recompile.diff(folder / "3bpw", traces.model(), **given, on_event=told.append)
    assert not any(isinstance(event, Note) for event in told)


def test_joined_rows_are_compared_document_by_document() -> None:
    rows = Rows(torch.zeros(1, 2, dtype=torch.int64), ("a-1+b-2",), ("a+b",), "text", "report", "")
    with pytest.raises(MismatchError, match=r"1 documents \(b-2\)"):
        check_apart(rows, "report", [("there", UsedRows("choose", ("b-2+c-3",)))])
    check_apart(rows, "report", [("there", UsedRows("report", ("b-2",))), ("there", UsedRows("choose", ("c-3",)))])


def test_a_report_refuses_builds_measured_on_the_profiles_rows(folder: Path, profiled: Path, tmp_path: Path) -> None:
    report = tmp_path / "d.json"
    options = ("--trace", folder / "trace.safetensors", "--json", report, "--quiet")
    run(model_diff, "-ma", folder / "3bpw", "-mb", traces.model(), *options)
    page, card = tmp_path / "r.html", tmp_path / "c.md"
    run(model_report, profiled, report, "-o", page, "--card", card)
    assert "role report, response tokens only" in card.read_text()
    assert "role choose, response tokens only" in card.read_text()
    found = json.loads(report.read_text())
    found["rows_sha256"] = load_profile(profiled).header.rows_sha256
    report.write_text(json.dumps(found))
    assert "was measured on the rows that profile.jsonl was made of" in refusal(
        model_report, profiled, report, "-o", page
    )


# ---- what does not go together ---------------------------------------------------------------------------------------


def test_a_trace_stands_alone(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x")
    with pytest.raises(ArgumentError, match=r"^trace takes the place of text; give one of them$"):
        recompile.quantize(traces.model(), tmp_path, bits=[3], trace=folder / "trace.safetensors", text=text)
    with pytest.raises(ArgumentError, match='positions "some": wanted response or all'):
        recompile.profile(traces.model(), candidates=["3"], trace=folder / "trace.safetensors", positions="some")


def test_healing_offers_no_token_ids(tmp_path: Path) -> None:
    """Rows of several roles cannot be cut from them."""
    given = ("-i", "build", "-mb", "base", "-o", tmp_path / "out", "--input-ids", tmp_path / "rows.safetensors")
    assert re.search("No such option:? '?--input-ids", refusal(model_heal, *given))
    assert "input_ids" not in inspect.signature(recompile.heal).parameters


def test_tokens_beyond_the_vocabulary_are_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "trace.safetensors")
    with safe_open(folder / "trace.safetensors", framework="pt") as stored:
        metadata = stored.metadata()
    vocab = json.loads(metadata[METADATA_KEY])["vocab"]
    tensors["input_ids"][3, 2] = vocab
    del metadata[KEY]  # as of a file that another program made
    save_file(tensors, tmp_path / "t.safetensors", metadata)
    with pytest.raises(RecompileError, match=f"row 3 has token {vocab} at place 2"):
        read_trace(tmp_path / "t.safetensors")


def test_roles_cover_every_command() -> None:
    assert set(ROLE_SHARES) == {"calibrate", "choose", "accept", "report"}
