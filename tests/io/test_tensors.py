"""Tensor files of this project: the same contents are the same bytes."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from recompile.errors import OutputError
from recompile.io.tensors import save_tensors


def test_the_same_contents_are_the_same_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    tensors = {name: torch.full((2, 3), n, dtype=dtype) for n, (name, dtype) in enumerate(
        [("b", torch.float64), ("a", torch.float64), ("ä", torch.int64), ("c", torch.bfloat16)]
    )}  # fmt: skip
    about = {f"key {n}": f'"{n}" \\ \n\x01\x7f é 語 \U0001f600' for n in range(8)}
    found = set()
    for number in range(6):
        path = tmp_path / f"{number}.safetensors"
        order = [-1, 1][number % 2]
        save_tensors(path, dict(list(tensors.items())[::order]), dict(list(about.items())[::order]))
        found.add(path.read_bytes())
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == about
            assert all(torch.equal(file.get_tensor(name), value) for name, value in tensors.items())
    assert len(found) == 1
    raw = found.pop()
    assert [raw.index(f'"{key}"'.encode()) for key in about] == sorted(raw.index(f'"{key}"'.encode()) for key in about)


@pytest.mark.parametrize("about", [None, {}, {"format": "pt"}])
def test_few_metadata_are_kept_as_they_are(tmp_path: Path, about: dict[str, str] | None) -> None:
    save_tensors(tmp_path / "one", {"x": torch.arange(3)}, about)
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert (file.metadata() or {}) == (about or {})
        assert file.get_tensor("x").tolist() == [0, 1, 2]


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        assert path.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("recompile.io.tensors._sort_metadata", fails)
    with pytest.raises(OutputError, match=r"x: cannot be written: No space left on device; free some space"):
        save_tensors(tmp_path / "x", {"x": torch.zeros(2, 3)}, {"a": "b", "c": "d"})
    assert list(tmp_path.iterdir()) == []
