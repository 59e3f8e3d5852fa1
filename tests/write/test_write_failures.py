"""Where an output may go, and that nothing of it lies on disk where writing it fails."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.errors import CheckpointError, OutputError
from recompile.io.files import MARKER_NAME
from recompile.merge import write_safetensors as write
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_plan import MANIFEST_NAME
from recompile.merge.write_safetensors import check_output, execute
from tests import mixes
from tests.mixes import bytes_of, files_of, overlay_of, written

# ---- where the output may go -----------------------------------------------------------------------------------------


def test_outputs_that_touch_an_input_are_refused(mix: tuple[Path, Path], tmp_path: Path) -> None:
    overlay = overlay_of(*mix)
    (tmp_path / "link").symlink_to(tmp_path / "4bpw")
    for out, problem in (
        (mix[0], "is the input directory"),
        (tmp_path / "4bpw", "is the input directory"),
        (tmp_path / "link", "is the input directory"),
        (tmp_path / "x" / ".." / "3bpw", "is the input directory"),
        (tmp_path / "3bpw" / "mix", "lies inside the input directory"),
        (tmp_path / "link" / "deeper" / "mix", "lies inside the input directory"),
        (tmp_path, "holds the input directory"),
        (tmp_path / "mix.recompile-partial", "names ending in .recompile-partial"),
        (mix[1], "is a file"),
        (mix[1] / "mix", "is a file"),
    ):
        with pytest.raises(OutputError, match=problem):
            check_output(overlay, out)
    check_output(overlay, tmp_path / "fresh")
    check_output(overlay, tmp_path / "not" / "yet" / "there")


def test_an_input_may_not_lie_in_the_partial_directory(tmp_path: Path) -> None:
    base = mixes.dense(tmp_path / "out.recompile-partial")
    with pytest.raises(OutputError, match=r"out\.recompile-partial: is the input directory"):
        check_output(overlay_of(base), tmp_path / "out")


def test_an_output_that_holds_something_is_refused(tmp_path: Path) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    out = tmp_path / "out"
    out.mkdir()
    check_output(overlay, out)  # empty: fine
    written(overlay, out)
    before = files_of(out)
    with pytest.raises(OutputError, match="exists and is not empty; remove it or choose another"):
        list(execute(plan_write(overlay, out)))
    assert files_of(out) == before


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OutputError, match=r"needs 101 bytes .* has 100 free"):
        check_output(overlay, tmp_path / "out", 101)
    check_output(overlay, tmp_path / "out", 100)
    with pytest.raises(OutputError, match=r"has 100 free"):
        list(execute(plan_write(overlay, tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_place_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    monkeypatch.setattr(write.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match=f"no permission to write in {tmp_path}"):
        check_output(overlay, tmp_path / "out")


def test_a_partial_directory_of_another_is_left_alone(tmp_path: Path) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    partial = tmp_path / "out.recompile-partial"
    partial.mkdir()
    (partial / "precious").write_text("mine")
    with pytest.raises(OutputError, match=r"out\.recompile-partial: exists and is not an unfinished output"):
        list(execute(plan_write(overlay, tmp_path / "out")))
    assert (partial / "precious").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_partial_directory_of_ours_is_replaced(tmp_path: Path) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    partial = tmp_path / "out.recompile-partial"
    partial.mkdir()
    (partial / MARKER_NAME).write_text("")
    (partial / "model-00001-of-00009.safetensors").write_text("half")
    made = written(overlay, tmp_path / "out")
    assert not partial.exists()
    assert files_of(made.path).keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        MANIFEST_NAME,
    }


def test_two_runs_at_once_do_not_meet(tmp_path: Path) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    first = execute(plan_write(overlay, tmp_path / "out"))
    next(first)
    with pytest.raises(OutputError, match=rf"process {os.getpid()} \(.*\) is writing it"):
        list(execute(plan_write(overlay, tmp_path / "out")))
    list(first)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "base")


# ---- failures --------------------------------------------------------------------------------------------------------


def nothing_left(directory: Path, *expected: str) -> None:
    assert sorted(path.name for path in directory.iterdir()) == sorted(expected)


def test_abandoned_runs_leave_nothing(tmp_path: Path) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    steps = execute(plan_write(overlay, tmp_path / "out"))
    next(steps)
    assert (tmp_path / "out.recompile-partial" / MARKER_NAME).exists()
    steps.close()
    nothing_left(tmp_path, "base")


def test_interrupted_runs_leave_nothing(tmp_path: Path) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    steps = execute(plan_write(overlay, tmp_path / "out"))
    next(steps)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())
    nothing_left(tmp_path, "base")


def test_an_impatient_user_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while the first Ctrl-C is being cleaned up after."""
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    true_remove = write.shutil.rmtree
    presses = iter([KeyboardInterrupt(), KeyboardInterrupt()])

    def remove(path: Path, **options: Any) -> None:
        for press in presses:
            raise press
        true_remove(path, **options)

    steps = execute(plan_write(overlay, tmp_path / "out"))
    next(steps)
    monkeypatch.setattr(write.shutil, "rmtree", remove)
    with pytest.raises(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt())
    nothing_left(tmp_path, "base")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))
    plan = plan_write(overlay, tmp_path / "out")
    room = plan.data_bytes // 2
    true_pwrite = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return true_pwrite(descriptor, data, offset)

    monkeypatch.setattr(write.os, "pwrite", pwrite)
    with pytest.raises(OutputError) as caught:
        list(execute(plan))
    message = str(caught.value)
    assert "No space left on device" in message
    assert "model.safetensors" in message
    assert f"of {plan.data_bytes} bytes" in message
    assert "free some space" in message
    nothing_left(tmp_path, "base")


def test_a_full_disk_at_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlay = overlay_of(mixes.dense(tmp_path / "base"))

    def full(target: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "_write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        list(execute(plan_write(overlay, tmp_path / "out")))
    nothing_left(tmp_path, "base")


def test_a_source_cut_short_while_it_is_copied(tmp_path: Path) -> None:
    base = mixes.dense(tmp_path / "base")
    steps = execute(plan_write(overlay_of(base), tmp_path / "out"))
    next(steps)  # everything is open
    source = base / "model.safetensors"
    os.truncate(source, source.stat().st_size // 2)
    # the copying threads may be past the cut already; then the changed time gives it away
    with pytest.raises(CheckpointError, match=r"model\.safetensors: (ends after|was changed while)"):
        list(steps)
    nothing_left(tmp_path, "base")


def test_a_source_written_to_while_it_is_copied(tmp_path: Path) -> None:
    base = mixes.dense(tmp_path / "base")
    steps = execute(plan_write(overlay_of(base), tmp_path / "out"))
    next(steps)
    with (base / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed while it was being copied"):
        list(steps)
    nothing_left(tmp_path, "base")


def _mkdir(path: Path) -> Path:
    path.mkdir()
    return path


def test_a_source_that_ends_early_names_the_tensor(tmp_path: Path) -> None:
    base = mixes.dense(tmp_path / "base")
    plan = plan_write(overlay_of(base), tmp_path / "out")
    last = max((t.source for m in plan.modules for t in m.tensors if t.source), key=lambda info: info.offset)
    with write._OpenFiles(plan, _mkdir(tmp_path / "shards")) as files:
        os.truncate(last.path, last.offset + 10)
        with pytest.raises(CheckpointError, match=rf"ends after 10 of the \d+ bytes of tensor {last.name}"):
            list(files.read(last))


def test_a_source_replaced_after_it_was_opened(tmp_path: Path) -> None:
    base = mixes.dense(tmp_path / "base")
    plan = plan_write(overlay_of(base), tmp_path / "out")
    (base / "model.safetensors").unlink()
    other = mixes.dense(tmp_path / "other", torch.float16)
    (other / "model.safetensors").rename(base / "model.safetensors")
    with pytest.raises(CheckpointError, match="was changed after it was opened"):
        list(execute(plan))
    nothing_left(tmp_path, "base", "other")


def test_values_beyond_the_dense_dtype(tmp_path: Path) -> None:
    base = mixes.as_exl2(tmp_path / "exl2", 4)  # its dense tensors are float16
    other = mixes.packed(tmp_path / "ints", 4)
    tensors = load_file(other / "model.safetensors")
    scale = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[scale] = torch.full_like(tensors[scale], 1e6)
    (other / "model.safetensors").unlink()
    mixes.save_file(tensors, other / "model.safetensors")
    overlay = overlay_of(base, mixes.recipe(tmp_path / "r.yaml", {"*.0.mlp.up_proj.*": other}))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has values beyond the range of F16"):
        list(execute(plan_write(overlay, tmp_path / "out", dense=True)))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.recompile-partial").exists()


KILLED = """
import os, signal, sys
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.merge.overlay import build_overlay
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.write_safetensors import execute
steps = execute(plan_write(build_overlay(open_checkpoint(sys.argv[1]), None), sys.argv[2]), workers=1)
for number in range(5):
    next(steps)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_runs_are_cleaned_up_by_the_next(tmp_path: Path) -> None:
    base, out = mixes.dense(tmp_path / "base"), tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, base, out], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    nothing_left(tmp_path, "base", "out.recompile-partial")
    with pytest.raises(CheckpointError, match="half written by an earlier run"):
        open_checkpoint(tmp_path / "out.recompile-partial")
    assert bytes_of(written(overlay_of(base), out).path) == bytes_of(base)
    nothing_left(tmp_path, "base", "out")
