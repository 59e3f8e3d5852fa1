"""The command `recompile`: what it prints, and that every failure is one line and exit code 1."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import recompile
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import common
from recompile.cli.recompile import main
from recompile.errors import RecompileError
from recompile.io.files import MARKER_NAME
from recompile.io.report import format_columns, to_plain
from recompile.io.sizes import format_bpw, format_bytes, format_seconds
from recompile.merge.explain import fold_modules, resolved_table
from recompile.merge.overlay import build_overlay
from recompile.merge.write_plan import MANIFEST_NAME
from tests import mixes


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base 3bpw and 4bpw, 5bpw, and mix.yaml, in the working directory."""
    monkeypatch.chdir(tmp_path)
    mixes.packed(tmp_path / "3bpw", 3)
    mixes.packed(tmp_path / "4bpw", 4)
    mixes.packed(tmp_path / "5bpw", 5, symmetric=False)
    mixes.recipe(tmp_path / "mix.yaml", {"*.self_attn.*": "4bpw", "model.layers.1.mlp.*": "5bpw"})
    return tmp_path


# ---- the plain way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("-i", "-o", "-or", "-ss"),
        ("--in-dir", "--out-dir", "--override", "--shard-size"),
        ("--in_dir", "--out_dir", "--override", "--shard_size"),
    ],
)
def test_writes_and_verifies(models: Path, flags: tuple[str, str, str, str]) -> None:
    i, o, override, size = flags
    result = run(i, "3bpw", o, "out", override, "mix.yaml", size, 4096, "--verify")
    assert result.exit_code == 0, result.output
    overlay = build_overlay(open_checkpoint("3bpw"), "mix.yaml")
    made = open_checkpoint("out")
    assert made.tensors.keys() == {info.name for m in overlay.modules.values() for info in m.parts.values()}
    assert f"{overlay.accounting.bpw:.3f}" in result.stdout
    assert "15 of 30 modules overridden: 12 from 4bpw, 3 from 5bpw" in result.stdout
    assert "Verified 30 modules against the manifest, 30 of them against their sources: all equal" in result.stdout
    assert "Next: model_diff -ma out" in result.stdout
    assert "Wrote out: " in result.stdout


def test_a_merge_that_was_killed_while_verifying_goes_on_with_that(models: Path) -> None:
    words = ("-i", "3bpw", "-o", "out", "-or", "mix.yaml", "-ss", 4096)
    assert run(*words).exit_code == 0
    made = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert "exists and is not empty" in run(*words).output  # without --verify there is nothing to go on with
    Path("out", MARKER_NAME).touch()  # killed before its last step
    result = run(*words, "--verify")
    assert result.exit_code == 0, result.output
    assert not Path("out", MARKER_NAME).exists()
    assert "out: was written by an earlier run of this merge; verifying it" in result.output
    assert "Verified 30 modules against the manifest, 30 of them against their sources: all equal" in result.output
    assert {path: path.stat().st_mtime_ns for path in Path("out").iterdir()} == made
    for words_of_another in (words[:4], (*words, "--dense"), ("-i", "4bpw", *words[2:])):
        refused = run(*words_of_another, "--verify")
        assert (refused.exit_code, "exists and is not empty" in refused.output) == (1, True), refused.output
    config = Path("out") / "config.json"
    config.write_text(config.read_text().replace("1", "2", 1))
    assert "exists and is not empty" in run(*words, "--verify").output


def test_without_a_recipe_it_copies(models: Path) -> None:
    assert run("-i", "3bpw", "-o", "out").exit_code == 0
    assert open_checkpoint("out").fingerprint == open_checkpoint("3bpw").fingerprint


def test_dense(models: Path) -> None:
    result = run("-i", "3bpw", "-o", "out", "-or", "mix.yaml", "--dense", "--verify")
    assert result.exit_code == 0, result.output
    assert open_checkpoint("out").formats == ()
    assert ", decoded" in result.stdout


def test_json(models: Path) -> None:
    result = run("-i", "3bpw", "-o", "out", "-or", "mix.yaml", "--verify", "--json", "-")
    report = json.loads(result.stdout)
    assert report["size"]["bpw"] > report["base_size"]["bpw"]
    assert report["overridden"] == {"4bpw": 12, "5bpw": 3}
    assert report["verified"]["modules"] == 30
    assert report["lowest_correlation"][1] > 0.8
    entry = next(m for m in report["modules"] if m["module"] == "model.layers.1.mlp.up_proj")
    assert (entry["source"], entry["line"], entry["key"]) == ("5bpw", 6, "model.layers.1.mlp.*")
    run("-i", "3bpw", "-or", "mix.yaml", "--dry-run", "--json", "plan.json")
    planned = json.loads(Path("plan.json").read_text())
    assert planned["size"] == report["size"]
    assert planned["seconds"] is None


def test_warnings_go_to_stderr(models: Path) -> None:
    Path("mix.yaml").write_text(Path("mix.yaml").read_text().replace("*.self_attn.*", "*.self_attn.v_proj.*"))
    result = run("-i", "3bpw", "-o", "out", "-or", "mix.yaml")
    assert "Warning: model.layers.0.self_attn: q_proj, k_proj, v_proj have different schemes" in result.stderr
    assert "Warning" not in result.stdout


# ---- dry run ---------------------------------------------------------------------------------------------------------


def test_dry_run_says_who_decided(models: Path) -> None:
    result = run("-i", "3bpw", "-o", "out", "-or", "mix.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.startswith(("model", "lm"))}
    assert lines["model.layers.1.mlp.up_proj"][1:] == ["5bpw", "5.677", "mix.yaml:6", '"model.layers.1.mlp.*"']
    assert lines["model.layers.2.self_attn.k_proj"][1:3] == ["4bpw", "4.562"]
    assert lines["model.layers.2.mlp.up_proj"][1:] == ["(base)", "3.521", "-"]
    assert lines["lm_head"][1:3] == ["(base)", "16.000"]
    assert "7 other modules (norms and the like) from the base" in result.stdout
    assert "model.norm" not in lines
    assert not Path("out").exists()
    every = run("-i", "3bpw", "-or", "mix.yaml", "--dry-run", "--all").stdout
    assert re.search(r"^model\.norm +\(base\) +16\.000 +-$", every, re.MULTILINE)


def test_a_long_table_is_folded_over_layers(tmp_path: Path) -> None:
    base, other = mixes.packed(tmp_path / "3", 3, layers=12), mixes.packed(tmp_path / "4", 4, layers=12)
    overlay = build_overlay(open_checkpoint(base), mixes.recipe(tmp_path / "r.yaml", {"model.layers.1*.mlp.*": other}))
    table = resolved_table(overlay)
    row = next(line for line in table.splitlines() if "{1,10-11}.mlp.up_proj" in line)
    assert row.split()[1:] == ["3", str(other), "4.52", f"{tmp_path}/r.yaml:4", '"model.layers.1*.mlp.*"']
    assert any(line.startswith("model.layers.{0,2-9}.mlp.up_proj ") for line in table.splitlines())
    assert len(table.splitlines()) < 20
    assert len(resolved_table(overlay, every=True).splitlines()) == len(overlay.placements) + 2


def testfold_modules() -> None:
    assert fold_modules(["m.0.up", "m.1.up", "m.3.up"]) == "m.{0-1,3}.up"
    assert fold_modules(["m.4.up"]) == "m.4.up"
    assert fold_modules(["m.0.experts.0.up", "m.0.experts.1.up", "m.1.experts.0.up"]) == "m.{0-1}.experts.*.up"


def bytes_read() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts reads as Linux does")
def test_dry_run_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = mixes.dense(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.zeros(40_000, 64, dtype=torch.bfloat16)  # 5 MB
    save_file(tensors, base / "model.safetensors")
    arguments = ("-i", base, "-o", tmp_path / "out", "--dry-run")
    assert run(*arguments).exit_code == 0  # imports are done
    before = bytes_read()
    assert run(*arguments).exit_code == 0
    assert bytes_read() - before < 100_000
    before = bytes_read()
    assert run("-i", base, "-o", tmp_path / "out").exit_code == 0
    assert bytes_read() - before > 5_000_000  # the count does count


# ---- imports ---------------------------------------------------------------------------------------------------------


def outside(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_and_import_need_no_torch() -> None:
    code = (
        "import sys, recompile.cli.recompile; print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    )
    assert outside(code).stdout == "[]\n"
    assert run("-h").output == run("--help").output
    assert "recompile -i 3bpw -o mix -or overrides.yaml --verify" in run("-h").output


@pytest.mark.parametrize("extra", [["-o", "out", "--no-probe"], ["--dry-run"]])
def test_copying_needs_no_torch(models: Path, extra: list[str]) -> None:
    code = (
        "import sys; from recompile.cli.recompile import main; main(sys.argv[1:], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    result = outside(code, "-i", "3bpw", "-or", "mix.yaml", *extra)
    assert result.stdout.splitlines()[-1] == "False", result.stderr


# ---- failures --------------------------------------------------------------------------------------------------------


def fails(result: Result, expected: str) -> None:
    """One line on stderr, exit code 1, no traceback."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert re.search(expected, lines[0]), lines[0]
    assert "Traceback" not in result.output


def test_each_error_is_one_line(models: Path) -> None:
    mixes.recipe(models / "typo.yaml", {"model.layers.0.self_attn.q_prj.*": "4bpw"})
    Path("gone.yaml").write_text("sources: [{id: 4, model_dir: nowhere}]\noverrides: [{key: '*', source: 4}]\n")
    Path("bad.yaml").write_text("overrides: [")
    mixes.as_exl2(models / "exl2", 4)
    mixes.recipe(models / "formats.yaml", {"*.mlp.*": "exl2"})
    mixes.packed(models / "stranger", 4, seed=1)
    mixes.recipe(models / "stranger.yaml", {"*.mlp.*": "stranger"})
    Path("full").mkdir()
    Path("full", "file").touch()
    cut = mixes.packed(models / "cut", 4)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
    for arguments, expected in (
        (("-i", "absent", "-o", "out"), r"absent: no such model directory"),
        (("-i", "cut", "-o", "out"), r"cut/model\.safetensors: truncated"),
        (("-i", "3bpw", "-o", "out", "-or", "absent.yaml"), r"absent\.yaml: no such file"),
        (("-i", "3bpw", "-o", "out", "-or", "bad.yaml"), r"bad\.yaml:"),
        (("-i", "3bpw", "-o", "out", "-or", "typo.yaml"), r"typo\.yaml:4: .*matches no tensor; did you mean"),
        (("-i", "3bpw", "-o", "out", "-or", "gone.yaml"), r"nowhere"),
        (("-i", "3bpw", "-o", "out", "-or", "formats.yaml"), r"exl2 \(.*--dense"),
        (
            ("-i", "3bpw", "-o", "out", "-or", "stranger.yaml"),
            r"stranger: .*not builds of the same weights.*--no-probe",
        ),
        (("-i", "3bpw", "-o", "3bpw"), r"3bpw: is the input directory"),
        (("-i", "3bpw", "-o", "full"), r"full: exists and is not empty"),
        (("-i", "3bpw", "-o", "mix.yaml/out"), r"mix\.yaml is a file"),
        (("-i", "3bpw", "-o", "out", "-ss", "0"), r"--shard-size 0"),
        (("-i", "3bpw", "-o", "out", "--json", "absent/report.json"), r"absent/report\.json: cannot be written"),
        (("--check", "absent"), r"absent: check found 1 error"),
        (("--check", "3bpw", "--verify"), f"3bpw: has no {MANIFEST_NAME}"),
    ):
        fails(run(*arguments), expected)
        assert not Path("out").exists(), arguments


def test_no_probe_and_allow_unmatched_go_on(models: Path) -> None:
    mixes.packed(models / "stranger", 4, seed=1)
    mixes.recipe(models / "r.yaml", {"*.mlp.*": "stranger", "*.nothing.*": "stranger"})
    result = run("-i", "3bpw", "-o", "out", "-or", "r.yaml", "--no-probe", "--allow-unmatched")
    assert result.exit_code == 0, result.output
    assert 'Warning: r.yaml:5: overrides[1].key "*.nothing.*" matches no tensor' in result.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("-i", "x"), ("-o", "x"), ("--check", "x", "-i", "y"), ("-i", "x", "--nope")]
)
def test_usage(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_a_failed_verify_fails(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recompile.merge import write_safetensors as write

    true_write = write._write_at

    def write_at(descriptor: int, data: memoryview, offset: int) -> None:
        damaged = bytearray(data)
        damaged[-1] ^= offset > 0 and len(data) > 100  # neither headers nor the stored shapes
        true_write(descriptor, memoryview(damaged), offset)

    monkeypatch.setattr(write, "_write_at", write_at)
    result = run("-i", "3bpw", "-o", "out", "--verify")
    assert "NOT equal" in result.stdout
    fails(result, r"out: verify found \d+ errors, first .*hash")


def test_check_lists_problems(models: Path) -> None:
    assert run("-i", "3bpw", "-o", "out", "-or", "mix.yaml").exit_code == 0
    good = run("--check", "out", "--verify")
    assert good.exit_code == 0
    assert "out: no inconsistency found" in good.stdout
    config = json.loads(Path("out/config.json").read_text())
    config["quantization_config"]["quantization_status"] = "frozen"
    Path("out/config.json").write_text(json.dumps(config))
    bad = run("--check", "out")
    assert "error: config.json: quantization_config: quantization_status is 'frozen'" in bad.stdout
    fails(bad, "out: check found 1 error")
    report = json.loads(run("--check", "out", "--json", "-").stdout)
    assert report["problems"][0]["severity"] == "error"


# ---- common ----------------------------------------------------------------------------------------------------------


def command_that(error: BaseException) -> Any:
    @common.command("thing")
    def thing() -> None:
        raise error

    return CliRunner().invoke(thing, [])


def test_how_commands_end() -> None:
    expected = command_that(RecompileError("mix.yaml:3: what is wrong"))
    assert (expected.exit_code, expected.stderr) == (1, "Error: mix.yaml:3: what is wrong\n")
    io = command_that(PermissionError(13, "Permission denied", "some/file"))
    assert (io.exit_code, io.stderr) == (1, "Error: some/file: Permission denied\n")
    interrupted = command_that(KeyboardInterrupt())
    assert interrupted.exit_code == 130
    assert len(interrupted.stderr.strip().splitlines()) == 1
    assert "interrupted" in interrupted.stderr
    bug = command_that(AssertionError("ours"))
    assert bug.exit_code == 1  # our own bugs are one line too, and leave their traceback in a file
    assert "unforeseen: AssertionError: ours; the details were written to" in bug.stderr


def test_figures() -> None:
    assert format_bytes(0) == "0 B"
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(5 * 2**30) == "5.00 GiB"
    assert format_bytes(5000 * 2**30) == "5000.00 GiB"
    assert (format_bpw(4.25), format_bpw(None)) == ("4.250", "-")
    assert (format_seconds(1.25), format_seconds(75)) == ("1.2 s", "1 min 15 s")
    assert format_seconds(7260) == "2 h 1 min"
    assert format_columns([("a", "10"), ("bbb", "2")], ("x", "y"), right=(1,)) == "x     y\n---  --\na    10\nbbb   2"


def test_json_values(tmp_path: Path) -> None:
    assert to_plain({1: float("nan"), "p": Path("x"), "s": {2, 1}, "t": torch.tensor([1.0])}) == {
        "1": None,
        "p": "x",
        "s": [1, 2],
        "t": [1.0],
    }
    common.print_json(tmp_path / "r.json", {"a": float("inf")})
    made_by = f"recompile {recompile.__version__}"
    assert json.loads((tmp_path / "r.json").read_text()) == {"made_by": made_by, "a": None}
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with common.progress("copying", 100 * 2**20) as bar:
        for second in range(25):
            clock[0] = second
            bar.update(second * 2**20, "layer")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "copying: 10.00 MiB of 100.00 MiB (10 %), 10.0 s gone, about 1 min 30 s left; layer",
        "copying: 20.00 MiB of 100.00 MiB (20 %), 20.0 s gone, about 1 min 20 s left; layer",
    ]
    with common.progress("copying", 10, quiet=True) as bar:
        clock[0] = 100
        bar.update(1)
    assert capsys.readouterr().err == ""
