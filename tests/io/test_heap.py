"""Freed memory is given back in time, and asking for it takes no time where nothing has grown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from recompile.io import memory
from recompile.io.memory import FREE_BYTES_KEPT, GROWN_BYTES, LOOKS_APART, Freed


class Process:
    """What a process holds, what of it is in use, and a glibc that takes a millisecond to count that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resident = self.used = 2**30
        self.now, self.counted, self.trimmed = 0.0, 0, 0
        self.freed = Freed()
        monkeypatch.setattr(memory, "resident_bytes", lambda: self.resident)
        monkeypatch.setattr(memory, "time", SimpleNamespace(monotonic=lambda: self.now))

    def mallinfo2(self) -> Any:
        self.now += 1e-3
        self.counted += 1
        return SimpleNamespace(field4=0, field7=self.used)

    def malloc_trim(self, pad: int) -> None:
        self.trimmed += 1
        self.resident = self.used

    def release(self, passed: float = 1e-4) -> None:
        self.now += passed
        self.freed.release(self)


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Process:
    made = Process(monkeypatch)
    made.release()
    assert made.counted == 1
    return made


def test_a_process_that_does_not_grow_is_counted_now_and_then(process: Process) -> None:
    for _ in range(100_000):
        process.release()
    share = (process.counted - 1) * 1e-3 / process.now
    assert 0.5 / (LOOKS_APART + 1) < share <= 1 / LOOKS_APART
    assert not process.trimmed


def test_freed_memory_never_adds_more_than_is_promised(process: Process) -> None:
    """Layers come and go, and what they leave behind fits no other: each time the process is larger."""
    peak = process.used + FREE_BYTES_KEPT
    for _ in range(300):
        process.resident += 2**20
        process.release(0.0)
        assert process.resident <= peak + 2**20
    assert 300 * 2**20 // FREE_BYTES_KEPT <= process.trimmed <= 300 * 2**20 // (FREE_BYTES_KEPT - GROWN_BYTES)
    assert process.counted <= 3 * 300 * 2**20 // GROWN_BYTES


def test_what_is_freed_without_growth_is_given_back_a_little_later(process: Process) -> None:
    process.used -= 2 * FREE_BYTES_KEPT
    process.release()
    assert not process.trimmed
    process.release(LOOKS_APART * 1e-3)
    assert process.trimmed == 1
