"""What is written appears whole or not at all, by one process at a time, and never over the user's files."""

from __future__ import annotations

import errno
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from recompile.errors import CheckpointError, JournalError, OutputError
from recompile.io import files
from recompile.io.files import (
    OutputDirectory,
    check_outputs,
    lock,
    locked,
    open_regular,
    parse_json,
    read_json,
    read_text,
    write_atomically,
    write_text,
    write_with,
)

HOLD = """
import sys, time
from recompile.io.files import locked, write_atomically
with {how} as _:
    print("held", flush=True)
    time.sleep(60)
"""


def hold(how: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(how=how)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with write_atomically(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_nothing_is_left_of_what_failed(tmp_path: Path, failure: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fails() -> None:
        with write_atomically(path) as file:
            file.write(b"half")
            raise failure

    with pytest.raises((type(failure), OutputError)):
        fails()
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"file: cannot be written: No space left on device; free some space"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_library_that_wants_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.recompile-partial.svg").write_text("left by a run that was killed")
    write_with(tmp_path / "a.svg", lambda name: name.write_text("drawn"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
    assert (tmp_path / "a.svg").read_text() == "drawn"

    def fails(name: Path) -> None:
        name.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="free some space"):
        write_with(tmp_path / "b.svg", fails)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.svg"]


def test_devices_are_written_to_and_links_followed(tmp_path: Path) -> None:
    write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()
    with pytest.raises(OutputError, match=r"^/dev/full: cannot be written: No space left on device; free some space"):
        write_text("/dev/full", "x")
    (tmp_path / "there").write_text("before")
    (tmp_path / "link").symlink_to("there")
    write_text(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "after"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "below", tmp_path / ("n" * 300), tmp_path / "a\0b", Path("/proc/x/y")):
        with pytest.raises(OutputError, match="cannot be written"):
            write_text(path, "x")


def test_two_processes_on_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    process = hold(f"write_atomically({str(path)!r})")
    try:
        with pytest.raises(OutputError) as refused, write_atomically(path):
            pass
        assert f"process {process.pid} (" in str(refused.value)
        assert "since 2" in str(refused.value)
    finally:
        process.kill()
        process.wait()
    write_text(path, "mine")  # what a killed process held is free, and its half is replaced
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.gguf"]


def test_two_processes_on_one_folder(tmp_path: Path) -> None:
    process = hold(f"locked({str(tmp_path)!r})")
    try:
        with pytest.raises(JournalError, match=f"process {process.pid}"), locked(tmp_path, error=JournalError):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("lets_go", [True, False])
def test_a_lock_that_is_let_go_while_its_holder_is_looked_for_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lets_go: bool
) -> None:
    holders = [os.open(tmp_path, os.O_RDONLY)]
    lock(holders[0], tmp_path)

    def is_gone(descriptor: int) -> None:
        if lets_go:
            os.close(holders.pop())

    monkeypatch.setattr(files, "_holder", is_gone)
    if lets_go:
        with locked(tmp_path):
            pass
    else:  # no /proc that says who it is
        with pytest.raises(OutputError, match="another process is writing it"), locked(tmp_path):
            pass
    assert len(holders) == (not lets_go)
    for descriptor in holders:
        os.close(descriptor)


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    out = OutputDirectory(tmp_path / "out")
    with out as folder:
        (folder / "file").write_text("x")
        with pytest.raises(OutputError, match="is writing it"):
            OutputDirectory(tmp_path / "out").create()
        out.finish()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["file"]
    with OutputDirectory(tmp_path / "other") as folder:
        (folder / "file").write_text("x")
    assert not (tmp_path / "other").exists()
    assert not (tmp_path / "other.recompile-partial").exists()


@pytest.mark.parametrize("seed", range(8))
def test_of_three_at_once_one_makes_the_directory(seed: int, tmp_path: Path) -> None:
    """Each gives it up once and then finishes it; the others are told in words, and nothing of two is mixed."""
    children = [_make_in_a_fork(tmp_path / "out", 8 * number + seed) for number in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 1}
    assert codes.count(0) <= 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"] * codes.count(0)
    if 0 in codes:
        assert len({(tmp_path / "out" / name).read_text() for name in "abc"}) == 1
        assert sorted(os.listdir(tmp_path / "out")) == ["a", "b", "c"]


def _make_in_a_fork(out: Path, seed: int) -> int:
    """Pid of a child that ends with 0 where it made the directory, 1 where it was refused in words."""
    child = os.fork()
    if child:
        return child
    code, moment = 3, random.Random(seed)
    try:
        time.sleep(moment.random() / 1000)
        with OutputDirectory(out) as folder:
            (folder / "given up").write_text("x")
        whole = OutputDirectory(out)
        with whole as folder:
            for name in "abc":
                (folder / name).write_text(str(os.getpid()))
            time.sleep(moment.random() / 1000)
            whole.finish()
        code = 0
    except OutputError as refused:
        code = 1 if re.search("is writing it|exists by now", str(refused)) else 2
    finally:
        os._exit(code)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["directory", "pipe", "device", "nothing", "loop", "nul", "surrogate", "large"])
def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path: Any = tmp_path / "x"
    if what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "loop":
        path.symlink_to("x")
    elif what == "nul":
        path = tmp_path / "a\0b"
    elif what == "surrogate":
        path = tmp_path / "\ud800"
    elif what == "large":
        monkeypatch.setitem(files.LARGEST, "json", 10)
        path.write_text(" " * 11)
    before = time.monotonic()
    with pytest.raises(JournalError) as refused:
        open_regular(path, kind="json", error=JournalError)
    assert str(path) in str(refused.value)
    assert time.monotonic() - before < 20  # it does not wait for a writer


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"hello",
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
        rb'{"\ud800": 1}',
        rb'["\udfff"]',
        b"\xef\xbb\xbf{}",
        b"{}x",
        b'{"a":1',
    ],
)
def test_what_is_not_json_is_one_error(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as refused:
        read_json(path)
    assert str(refused.value).startswith(f"{path}:")
    assert len(str(refused.value)) < 300
    with pytest.raises(JournalError, match=r"x\.json:7:"):
        parse_json(raw, "x.json", error=JournalError, line=7)


def test_json_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1, "a": 2, "b": [Infinity], "c": "\\ud83d\\ude00"}')
    assert read_json(path) == {"a": 2, "b": [float("inf")], "c": "\U0001f600"}


def test_text_is_utf8(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xef\xbb\xbfgr\xc3\xbc\xc3\x9fe")
    assert read_text(tmp_path / "x", bom=True) == "grüße"
    (tmp_path / "x").write_bytes(b"abc\xff")
    with pytest.raises(CheckpointError, match="at byte 3"):
        read_text(tmp_path / "x")


# ---- outputs against inputs ------------------------------------------------------------------------------------------


def outputs_case(folder: Path) -> None:
    (folder / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "m" / name).write_text("{}")
    (folder / "profile.jsonl").write_text('{"kind": "recompile-profile"}\n')
    (folder / "by-hand.yaml").write_text("sources: []\noverrides: []\n")
    (folder / "ours.yaml").write_text("sources: []\nprovenance: {made_by: model_optimize p.jsonl}\n")
    (folder / "link.yaml").symlink_to("by-hand.yaml")
    os.link(folder / "profile.jsonl", folder / "hard.jsonl")


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("profile.jsonl", "is an input"),
        ("hard.jsonl", "is an input"),
        ("./m/../profile.jsonl", "is an input"),
        ("m", "is a directory"),
        ("m/config.json", "is a file of the input"),
        ("m/model.safetensors", "is a file of the input"),
        ("by-hand.yaml", "did not make it"),
        ("link.yaml", "did not make it"),
        ("", "no name of a file"),
        (".", "is a directory"),
        ("/", "is a directory"),
        ("a\0b", "no name of a file"),
    ],
)
def test_what_is_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    outputs_case(tmp_path)
    with pytest.raises(OutputError, match=says):
        check_outputs({"-o": output}, ["profile.jsonl", "m", None])
    if "did not make" not in says:
        with pytest.raises(OutputError, match=says):
            check_outputs({"-o": output}, ["profile.jsonl", "m"], force=True)


def test_what_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs_case(tmp_path)
    (tmp_path / "empty").touch()
    for output in (None, "-", "/dev/null", "new.yaml", "m/new.json", "ours.yaml", "empty"):
        check_outputs({"-o": output}, ["profile.jsonl", "m"])
    check_outputs({"-o": "by-hand.yaml"}, ["profile.jsonl", "m"], force=True)
    with pytest.raises(OutputError, match="writes as well"):
        check_outputs({"-o": "a.json", "--json": "./a.json"}, [])


def test_a_device_is_never_replaced_by_what_a_library_writes(tmp_path: Path) -> None:
    """safetensors puts a file of its own under the name that it is given, /dev/null too where the user may."""
    pipe = tmp_path / "x.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot be written: it is no regular file"):
        write_with(pipe, lambda path: path.write_bytes(b"never"))
    assert pipe.is_fifo()
