"""What of --ray is refused before anything is read or written; a cluster is not needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recompile.cli.model_profile import main as model_profile
from tests import tiny
from tests.commands import refusal


@pytest.mark.parametrize("mode", ["exact", "sketch"])
@pytest.mark.parametrize(
    ("address", "has_ray", "says"),
    [
        ("ray://host:10001", True, "Ray's client is not installed; pip install 'ray[client]'"),
        ("nowhere", True, "no address of a cluster; wanted HOST:PORT, auto, or no address at all"),
        ("host:99999", True, "no address of a cluster"),
        ("auto", False, "Ray is not installed"),
    ],
)
def test_nothing_is_left_of_a_cluster_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, address: str, has_ray: bool, says: str
) -> None:
    def begun(**_: Any) -> None:
        raise AssertionError("no cluster is looked for")

    fake = SimpleNamespace(is_initialized=lambda: False, init=begun)
    monkeypatch.setitem(sys.modules, "ray", fake if has_ray else None)
    monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace(RayError=RuntimeError))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "grpc" else found(name, *more))
    variants, out = tiny.variants("llama-2", (3, 4)), tmp_path / "p.jsonl"
    rows = ["--input-ids", ids(tmp_path / "in"), "-r", 2]
    words = ["-mb", tiny.base("llama-2"), "-i", variants[4], "-s", variants[3], "-o", out, "--mode", mode, *rows]
    assert says in refusal(model_profile, *words, "--ray", address)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_a_cluster_that_is_not_reached_leaves_no_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    def unreachable(**_: Any) -> None:
        raise ConnectionError("nobody at 127.0.0.1:6379")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=unreachable))
    monkeypatch.setitem(sys.modules, "ray.exceptions", SimpleNamespace(RayError=RuntimeError))
    variants, out = tiny.variants("llama-2", (3, 4)), tmp_path / "p.jsonl"
    words = ["-mb", tiny.base("llama-2"), "-i", variants[4], "-s", variants[3], "-o", out, "--mode", mode]
    said = refusal(model_profile, *words, "--input-ids", ids(tmp_path / "in"), "-r", 2, "--ray", "127.0.0.1:6379")
    assert "--ray: ConnectionError: nobody at 127.0.0.1:6379" in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def ids(folder: Path) -> Path:
    from recompile.io.tensors import save_tensors

    save_tensors(folder / "ids.safetensors", {"input_ids": tiny.rows(2, 16)})
    return folder / "ids.safetensors"
