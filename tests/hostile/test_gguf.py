"""GGUF files whose headers lie about counts, keys and splits."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from recompile.errors import CheckpointError
from recompile.formats.gguf_types import TYPES
from recompile.gguf.container import NewTensor, encode_key, open_gguf, write_gguf


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(keys: bytes, count: int, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + keys


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as found:
        open_gguf(path)
    assert str(path) in str(found.value)
    assert len(str(found.value)) < 500
    return str(found.value)


def test_sparse_files_are_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for raw, size in (
        (header(text("x") + struct.pack("<IIQ", 9, 0, 8 << 30), 1), (8 << 30) + 4096),  # 8 GiB of bytes in a key
        (header(text("x") + struct.pack("<IIQ", 9, 8, 1 << 30), 1), (8 << 30) + 4096),  # 2^30 empty strings
        (header(b"", 0, 70_000_000), 2 << 30),
        (header(b"", 1 << 40, 0), 4096),
    ):
        with path.open("wb") as file:
            file.write(raw)
            file.truncate(size)
        refused(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_files_that_are_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    refused(path)


def write(path: Path, name: str, **keys: int) -> None:
    records = [encode_key(f"split.{key}", value, "i32") for key, value in keys.items()]
    write_gguf(path, records, [NewTensor(name, TYPES["F32"], (4,), lambda: iter([bytes(16)]))])


@pytest.mark.parametrize("count", [0, 1, -3])
def test_a_split_that_says_it_is_none(count: int, tmp_path: Path) -> None:
    write(tmp_path / "x-00001-of-00002.gguf", "a", count=count)
    assert "one of 2 splits" in refused(tmp_path / "x-00001-of-00002.gguf")


def test_half_of_a_model_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    write(tmp_path / "h" / "x.gguf", "a", **{"count": 1, "tensors.count": 2})
    assert "is a part of a model that was split" in refused(tmp_path / "h" / "x.gguf")
