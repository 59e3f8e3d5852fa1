"""Safetensors files that are no checkpoint (rows, traces, statistics, importance): each is opened by one piece,
which refuses what is no such file at once and by its name."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recompile.checkpoint.safetensors_files import read_tensors
from recompile.cli.model_diff import main as model_diff
from recompile.cli.model_quantize import main as model_quantize
from recompile.errors import CheckpointError
from recompile.quantize.lazy_variant import read_importance
from recompile.quantize.output_statistics import StoredStatistics
from tests import tiny
from tests.hostile.refusals import refuses


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(700 << 30)


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a directory": lambda path: path.mkdir(),
    "a loop": lambda path: path.symlink_to(path.name),
    "700 GiB of nothing": huge,
    "a header of 2^62 bytes": lambda path: path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"),
    "no tensors": lambda path: path.write_bytes(struct.pack("<Q", 2) + b"{}"),
    "deep JSON": lambda path: path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "text": lambda path: path.write_bytes(b"sources:\n  - {id: 3}\n"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--trace", "--input-ids"])
@pytest.mark.parametrize("command", ["diff", "quantize"])
def test_rows_and_traces(tmp_path: Path, kind: str, option: str, command: str) -> None:
    path = tmp_path / "x.safetensors"
    KINDS[kind](path)
    base, build = tiny.base("llama-2"), tiny.variants("llama-2", (3,))[3]
    main, words = {
        "diff": (model_diff, ["-ma", build, "-mb", base]),
        "quantize": (model_quantize, ["-i", base, "-o", tmp_path / "out", "-b", 3, "-g", 32]),
    }[command]
    refuses(tmp_path, main, *words, option, path, "-r", 2, "--quiet", names=str(path))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "no tensors"])
def test_files_of_runs(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    KINDS[kind](path)
    with pytest.raises(CheckpointError, match=f"{path}: .*; remove it"):
        read_importance(path)
    with pytest.raises(CheckpointError, match=f"{path}: .*; remove {tmp_path} and measure anew"):
        StoredStatistics(tmp_path, {"fingerprint": "of a run"}, {"m": (path.name, 1, 1)}).of("m", torch.device("cpu"))
    with pytest.raises(CheckpointError, match=f"^{path}: "):
        read_tensors(path)
