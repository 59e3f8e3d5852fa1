"""A journal: whole lines, one process, a torn tail dropped and reported."""

from __future__ import annotations

import errno
import logging
import os
import re
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from recompile.errors import JournalError, OutputError
from recompile.io.journal import LineJournal


def plain(path: Path) -> str:
    """What a journal holds beside checksums."""
    return re.sub(r', "crc32": "[0-9a-f]{8}"}\n', "}\n", path.read_text())


def test_lines_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    with LineJournal(path) as journal:
        assert journal.lines == []
        journal.begin({"kind": "test"})
        journal.append({"a": 1}, {"b": [2.5, None]})
    with LineJournal(path) as journal:
        assert journal.values() == [{"kind": "test"}, {"a": 1}, {"b": [2.5, None]}]
        journal.append({"c": 3})
    assert plain(path) == '{"kind": "test"}\n{"a": 1}\n{"b": [2.5, null]}\n{"c": 3}\n'


@pytest.mark.parametrize("cut", range(1, 13))
def test_a_torn_tail_is_dropped_and_told(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "j.jsonl"
    whole = '{"kind": "test"}\n{"a": 1}\n'
    path.write_text((whole + '{"b": 2222}\n')[: len(whole) + cut - 1])
    with caplog.at_level(logging.WARNING, "recompile"), LineJournal(path) as journal:
        assert [line.decode() for line in journal.lines] == whole.splitlines()
        journal.append({"b": 3})
    assert ("cut off by a crash" in caplog.text) == (cut > 1)
    assert path.read_text() == whole + '{"b": 3}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "j.jsonl"
    real = os.pwrite

    def full(descriptor: int, data: bytes, at: int) -> int:
        if len(data) > 6:
            return real(descriptor, data[:6], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    with LineJournal(path, error=OutputError) as journal:
        journal.begin({"kind": "test"})
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(OutputError, match=r"j\.jsonl: cannot be written: No space left on device"):
                journal.append({"a": 1})
        assert plain(path) == '{"kind": "test"}\n'
        journal.append({"a": 2})
    assert plain(path) == '{"kind": "test"}\n{"a": 2}\n'


def test_one_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(JournalError, match=f"process {os.getpid()} .* is writing it")
    with LineJournal(tmp_path / "j.jsonl"), refused:
        LineJournal(tmp_path / "j.jsonl")
    LineJournal(tmp_path / "j.jsonl").close()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text('{"kind": "test"}\n{"a"\n{"b": 1}\n')
    with LineJournal(tmp_path / "j.jsonl") as journal, pytest.raises(JournalError, match=r"j\.jsonl:2:"):
        journal.values()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/zero"), tmp_path / "a\0b"):
        with pytest.raises(JournalError):
            LineJournal(path)


def test_a_run_that_failed_before_it_did_anything_leaves_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"

    def run(*lines: dict[str, object]) -> None:
        with LineJournal(path) as journal:
            if not journal.lines:
                journal.begin({"kind": "test"})
            journal.append(*lines) if lines else None
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert not path.exists()
    with pytest.raises(KeyError):
        run({"a": 1})
    with pytest.raises(KeyError):
        run()  # it was there before
    assert plain(path) == '{"kind": "test"}\n{"a": 1}\n'


def test_a_journal_that_its_owner_removes_meanwhile_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"kind": "test"}\n')

    def lock(descriptor: int, what: Path, **_: object) -> None:
        if os.fstat(descriptor).st_size:
            path.unlink()  # as its owner did after this one had opened it

    monkeypatch.setattr("recompile.io.journal.lock", lock)
    with LineJournal(path) as journal:
        assert journal.lines == []
        journal.begin({"kind": "new"})
    assert plain(path) == '{"kind": "new"}\n'


def test_no_bit_and_no_line_changes_without_a_word(tmp_path: Path) -> None:
    """Every bit flipped, every cut, lines doubled, left out and swapped: what is read is the start of what was."""
    path, wanted = tmp_path / "j.jsonl", [{"kind": "test"}, {"a": 1.25}, {"b": "x"}, {"c": [7]}]
    with LineJournal(path) as journal:
        journal.begin(wanted[0])
        journal.append(*wanted[1:])
    whole = path.read_bytes()
    first, *rest = whole.splitlines(keepends=True)
    flips = [whole[:n] + bytes([whole[n] ^ (1 << bit)]) + whole[n + 1 :] for n in range(len(whole)) for bit in range(8)]
    cuts = [whole[:n] for n in range(1, len(whole))]
    orders = [[rest[n] for n in order] for order in product(range(3), repeat=3) if order != (0, 1, 2)]
    for damaged in [*flips, *cuts, *(first + b"".join(order) for order in orders), whole + rest[-1], whole + first]:
        path.write_bytes(damaged)
        with suppress(JournalError), LineJournal(path) as journal:
            found = journal.values()
            if found[:1] == wanted[:1]:  # else it is the journal of another run
                assert found == wanted[: len(found)]
                assert len(found) == len(wanted) or len(damaged) < len(whole) or journal.torn_bytes


def test_lines_without_checksums_are_read_and_added_to(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"kind": "test"}\n{"a": 1}\n')
    with LineJournal(path) as journal:
        journal.append({"b": 2})
    assert path.read_text() == '{"kind": "test"}\n{"a": 1}\n{"b": 2}\n'
