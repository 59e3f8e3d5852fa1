"""Killed (SIGKILL) at several of its writes, every long command goes on to the same bytes; two on one output never mix.

A command runs in a fork of this process; it is killed as soon as a journal line or a file has been put on disk.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from recompile.checkpoint.checkpoint import open_checkpoint
from tests import gguf_models, tiny

TEXT = "\n\n\n".join(f"Document {n}. " + " ".join(f"word{(n * k) % 97}" for k in range(120)) for n in range(60))


@dataclass(frozen=True)
class Long:
    """A command that writes much. words: of the command, by a folder; results: what has to be the same, by name."""

    command: str
    words: Callable[[Path], list[object]]
    results: Callable[[Path], Mapping[str, object]]


def run_in_fork(command: str, words: list[object], folder: Path, kill_at: int | None = None) -> tuple[int, int, str]:
    """Exit code (negative: a signal), writes that reached the disk, what was printed. kill_at: of these writes."""
    child = start(command, words, folder, kill_at)
    return end(child, folder)


def start(command: str, words: list[object], folder: Path, kill_at: int | None = None, name: str = "out") -> int:
    main = importlib.import_module(f"recompile.cli.{command}").main  # before the fork, or each would import it
    child = os.fork()
    if child:
        return child
    code, count, sync = 99, 0, os.fsync
    printed = os.open(folder / f".{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        torch.set_num_threads(1)

        def counted(descriptor: int) -> None:
            nonlocal count
            sync(descriptor)
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = counted  # type: ignore[assignment]
        import sys

        sys.stdout, sys.stderr = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
        try:
            main(args=[str(word) for word in words], standalone_mode=True)
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 0
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / f".{name}.count").write_text(str(count))
    finally:
        os._exit(code)


def end(child: int, folder: Path, name: str = "out") -> tuple[int, int, str]:
    _, status = os.waitpid(child, 0)
    counted = folder / f".{name}.count"
    printed = (folder / f".{name}.txt").read_text() if (folder / f".{name}.txt").exists() else ""
    return os.waitstatus_to_exitcode(status), int(counted.read_text()) if counted.exists() else 0, printed


def weights_of(out: Path) -> dict[str, object]:
    return {path.name: path.read_bytes() for path in sorted([*out.glob("*.safetensors"), out / "config.json"])}


def chosen(path: Path) -> dict[str, object]:
    return {"overrides": path.read_text().partition("overrides:")[2]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over two integer variants, one over two GGUF files, a profile, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    variants = tiny.variants("llama-2", (2, 3, 4))
    (folder / "text.txt").write_text(TEXT)
    (folder / "r.yaml").write_text(
        f'sources:\n  - {{id: 3, model_dir: {variants[3]}}}\noverrides:\n  - {{key: "*.mlp.*", source: 3}}\n'
    )
    for name, kind in (("a", "Q8_0"), ("b", "Q4_0")):
        gguf_models.write_model(folder / f"{name}.gguf", kind=kind)
    (folder / "g.yaml").write_text(
        f'sources:\n  - {{id: b, model_dir: {folder}/b.gguf}}\noverrides:\n  - {{key: "*.mlp.*", source: b}}\n'
    )
    base, others = open_checkpoint(tiny.base("llama-2")), [(n, open_checkpoint(d)) for n, d in variants.items()]
    job = ProfileJob(base, 3, others, tiny.rows(3, 16), folder / "p.jsonl", ProfileOptions(level="tensor"))
    *_, _ = profile_exact(job)
    return folder


def long_commands(inputs: Path) -> dict[str, Long]:
    base, variants, text = tiny.base("llama-2"), tiny.variants("llama-2", (2, 3, 4)), inputs / "text.txt"
    rows = ["-r", 3, "-l", 16, "--text", text, "--quiet"]
    auto = ["-b", 4.3, "--candidates", "3,4", "-g", tiny.GROUP_SIZE, "--calibration-rows", 2, "--solver", "exact"]
    refine = ["-b", 3.2, "--no-check", "--no-guard", "--steps", 2, "--solver", "refine"]
    return {
        "safetensors merge": Long(
            "recompile",
            lambda d: ["-i", variants[4], "-o", d / "m", "-or", inputs / "r.yaml", "--quiet"],
            lambda d: weights_of(d / "m"),
        ),
        "gguf merge": Long(
            "recompile",
            lambda d: ["-i", inputs / "a.gguf", "-o", d / "m.gguf", "-or", inputs / "g.yaml", "--no-probe", "--quiet"],
            lambda d: {"m.gguf": (d / "m.gguf").read_bytes()},
        ),
        "profile": Long(
            "model_profile",
            lambda d: [
                "-i", variants[4], "-mb", base, "-s", variants[3], "-o", d / "p.jsonl", "--mode", "exact", *rows,
            ],
            lambda d: {"p.jsonl": (d / "p.jsonl").read_bytes()},
        ),
        "refine": Long(
            "model_optimize",
            lambda d: [inputs / "p.jsonl", "-o", d / "mix.yaml", *refine, *rows],
            lambda d: (
                chosen(d / "mix.yaml")
                | {name: (d / name).read_bytes() for name in ("mix.refine.jsonl", "mix.mixes.json")}
            ),
        ),
        "model_auto": Long(
            "model_auto",
            lambda d: ["-i", base, "-o", d / "m", "--samples", 2, *auto, *rows],
            lambda d: weights_of(d / "m") | chosen(d / "m.work" / "overrides.yaml"),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["safetensors merge", "gguf merge", "profile", "refine", "model_auto"])
def test_killed_at_any_write_it_goes_on_to_the_same_bytes(name: str, inputs: Path, tmp_path: Path) -> None:
    long = long_commands(inputs)[name]
    folder = tmp_path / "whole"
    folder.mkdir()
    code, writes, printed = run_in_fork(long.command, long.words(folder), folder)
    assert code == 0, printed
    wanted = long.results(folder)
    assert writes >= 2, "nothing of it was put on disk with care"
    moments = sorted({1, 2, writes // 2, writes - 1} - {0})
    folder = tmp_path / "killed"
    folder.mkdir()
    kills = 0
    for moment in moments if name != "model_auto" else moments[1:]:
        code, _, printed = run_in_fork(long.command, long.words(folder), folder, kill_at=moment)
        if code == 0:  # a run that goes on has fewer writes left
            break
        assert code == -signal.SIGKILL, printed
        kills += 1
    assert kills >= (2 if len(moments) > 2 else 1)
    code, _, printed = run_in_fork(long.command, long.words(folder), folder)
    if code != 0:  # the kill came after the last of it: the output is whole, and is not written over
        assert "exists" in printed or "already" in printed, printed
    found = long.results(folder)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == value, key
    left = [path.name for path in folder.iterdir() if path.name.endswith((".recompile-partial", ".building"))]
    assert left == []


@pytest.mark.parametrize(
    "name",
    ["safetensors merge", "gguf merge", "profile", pytest.param("refine", marks=pytest.mark.sweep), "model_auto"],
)
def test_two_on_one_output(name: str, inputs: Path, tmp_path: Path) -> None:
    """One ends well, or both one after the other; the other is refused in words, and the output is whole."""
    long = long_commands(inputs)[name]
    whole, both = tmp_path / "whole", tmp_path / "both"
    whole.mkdir()
    both.mkdir()
    code, _, printed = run_in_fork(long.command, long.words(whole), whole)
    assert code == 0, printed
    pair = {label: start(long.command, long.words(both), both, name=label) for label in ("one", "other")}
    ended = [end(child, both, label) for label, child in pair.items()]
    codes = sorted(code for code, _, _ in ended)
    assert codes in ([0, 0], [0, 1]), ended
    for code, _, printed in ended:
        assert code == 0 or re.search(r"Error: .*(process \d+ \(.+\) is writing it|exists)", printed), printed
        assert "Traceback" not in printed, printed
    wanted, found = long.results(whole), long.results(both)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == value, key
