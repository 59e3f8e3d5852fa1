"""What is going to be read next is asked of the system in as few and as small requests as will do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from recompile.checkpoint import safetensors_files
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.safetensors_files import read_ahead
from recompile.formats.stored import TensorInfo
from recompile.model.stream import LayeredModel
from tests import tiny

Asked = list[tuple[str, int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """(file, first byte, bytes) of every request."""
    found: Asked = []

    def advise(descriptor: int, offset: int, size: int, how: int) -> None:
        assert how == os.POSIX_FADV_WILLNEED
        found.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, offset, size))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


@pytest.fixture
def info(tmp_path: Path) -> Callable[[str, int, int], TensorInfo]:
    def made(file: str, offset: int, size: int) -> TensorInfo:
        (tmp_path / file).touch()
        return TensorInfo(f"{file}.{offset}", "U8", (size,), tmp_path / file, offset, size)

    return made


def test_neighbours_are_one_request(asked: Asked, info: Callable[[str, int, int], TensorInfo]) -> None:
    far = 5 << 20
    read_ahead([info("a", 100, 50), info("b", 0, 10), info("a", far, 8), info("a", 0, 100), info("a", 300, 1)])
    assert sorted(asked) == [("a", 0, 301), ("a", far, 8), ("b", 0, 10)]


def test_more_than_memory_has_room_for_is_not_asked_for(
    asked: Asked, info: Callable[[str, int, int], TensorInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_files, "available_bytes", lambda: 400)
    read_ahead([info("a", 0, 101)])
    assert asked == []
    read_ahead([info("a", 0, 100)])
    assert asked == [("a", 0, 100)]


def test_a_file_that_is_gone_is_told_by_who_reads_it(asked: Asked, tmp_path: Path) -> None:
    read_ahead([TensorInfo("x", "U8", (4,), tmp_path / "gone", 0, 4)])
    assert asked == []


def test_a_layer_asks_for_the_next_one(asked: Asked) -> None:
    checkpoint = open_checkpoint(tiny.base("llama"))
    model = LayeredModel.of(checkpoint)
    for index in range(model.depth):
        asked.clear()
        with model.layer(index):
            spans = [(begin, begin + size) for _, begin, size in asked]
            for name, tensor in checkpoint.tensors.items():
                inside = any(
                    begin <= tensor.offset and tensor.offset + tensor.size_bytes <= end for begin, end in spans
                )
                assert inside or f".layers.{index + 1}." not in name
            assert bool(spans) == (index + 1 < model.depth)
