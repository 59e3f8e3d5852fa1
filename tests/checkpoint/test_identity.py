"""What a checkpoint is, in full: a journal of one model is never continued with another, however alike the two are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from eval.profile.sketch import SketchOptions, SweepDone, profile_sketch
from recompile.checkpoint import identity
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import model_optimize, model_profile
from recompile.errors import JournalError, OutputError, RecompileError
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.lazy_variant import make_variants, spec_of
from recompile.quantize.pipeline import quantize_model
from tests import tiny
from tests.commands import refusal
from tests.commands import run as run_command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.base("llama"), tmp_path / "model")


def flip_signs(path: Path) -> None:
    """Of the middle of every matrix, far from its ends and its middle row; the file keeps size and times."""
    shard = path / "model.safetensors"
    before = shard.stat()
    tensors = load_file(shard)
    for value in tensors.values():
        if value.dim() == 2:
            value.view(-1)[value.numel() // 3 : value.numel() // 3 + 100] *= -1
    save_file(tensors, shard, {"format": "pt"})
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


CHANGES = {
    "signs": flip_signs,
    "rope": edit_config(rope_theta=500.0),
    "eps": edit_config(rms_norm_eps=1e-2),
    "activation": edit_config(hidden_act="gelu"),
    "a nested key": edit_config(rope_scaling={"rope_type": "linear", "factor": 2.0}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_a_result_changes_the_identity(change: Callable[[Path], None], model: Path) -> None:
    before = open_checkpoint(model)
    assert before.identity == open_checkpoint(tiny.base("llama")).identity, "the directory is no part of it"
    change(model)
    assert open_checkpoint(model).identity != before.identity


def test_every_byte_counts(model: Path) -> None:
    seen = {open_checkpoint(model).identity}
    shard = model / "model.safetensors"
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for offset in range(start, len(raw), (len(raw) - start) // 20):
        shard.write_bytes(raw[:offset] + bytes([raw[offset] ^ 1]) + raw[offset + 1 :])
        seen.add(open_checkpoint(model).identity)
    assert len(seen) >= 21


def test_what_changes_no_result_changes_no_identity(model: Path, tmp_path: Path) -> None:
    wanted = open_checkpoint(model).identity
    file = model / "config.json"
    found = json.loads(file.read_text()) | {"_name_or_path": "elsewhere", "transformers_version": "9"}
    file.write_text(json.dumps(dict(reversed(found.items())), indent=7))
    assert open_checkpoint(model).identity == wanted
    os.utime(model / "model.safetensors", (1, 1))
    assert open_checkpoint(model).identity == wanted
    sharded = tiny.write_model(tmp_path / "sharded", "llama", shards=3)
    assert open_checkpoint(sharded).identity == wanted


def test_holes_are_zeros(tmp_path: Path) -> None:
    """A file written with holes and its copy without are one model; a byte in the middle of one is another."""
    directories = [tiny.copy_of(tiny.base("llama"), tmp_path / name) for name in ("full", "sparse")]
    size = 5 * identity.CHUNK_BYTES
    tensors = load_file(directories[0] / "model.safetensors") | {"big": torch.zeros(size, dtype=torch.uint8)}
    save_file(tensors, directories[0] / "model.safetensors")
    raw = (directories[0] / "model.safetensors").read_bytes()
    sparse = directories[1] / "model.safetensors"
    with sparse.open("wb") as file:
        for start in range(0, len(raw), 4096):
            piece = raw[start : start + 4096]
            if any(piece):
                file.seek(start)
                file.write(piece)
        file.truncate(len(raw))
    wanted, found = (open_checkpoint(path).identity for path in directories)
    assert wanted == found
    with sparse.open("r+b") as file:
        file.seek(open_checkpoint(directories[1]).tensors["big"].offset + size // 2)
        file.write(b"\1")
    assert open_checkpoint(directories[1]).identity != wanted


# ---- hashed once ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "CACHED_BYTES", 0)
    return tmp_path / "cache" / "recompile" / "identities"


def test_a_checkpoint_is_hashed_once(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = open_checkpoint(model).identity
    read: list[object] = []
    hash_all = identity._content_digests
    monkeypatch.setattr(identity, "_content_digests", lambda tensors: read.append(1) or hash_all(tensors))
    assert open_checkpoint(model).identity == wanted
    assert not read
    edit_config(rope_theta=3.0)(model)  # no tensor is read again for another config
    other = open_checkpoint(model).identity
    assert (other != wanted, read) == (True, [])
    flip_signs(model)  # size and modification time are what they were
    changed = open_checkpoint(model).identity
    assert (changed != other, read) == (True, [1])
    (stored,) = cache.iterdir()
    for damage in ("", "{", "[]", '{"digest": 1}', stored.read_text().replace('"version": 1', '"version": 0')):
        stored.write_text(damage)
        assert open_checkpoint(model).identity == changed
    assert len(read) == 6


def test_a_cache_that_cannot_be_written_is_none(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "CACHED_BYTES", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_checkpoint(model).identity == open_checkpoint(model).identity


def test_small_checkpoints_leave_nothing_in_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_checkpoint(model).identity
    assert not (tmp_path / "cache").exists()


# ---- journals -------------------------------------------------------------------------------------------------------


def quantize(model: Path, out: Path) -> object:
    return quantize_model(open_checkpoint(model), out / "v", IntEncoder((4,), 32, True, "rtn"), tiny.rows(2, 8))


def job_of(model: Path, out: Path) -> ProfileJob:
    base = open_checkpoint(model)
    candidates = make_variants(base, [spec_of(name, group_size=32) for name in ("2", "4")])
    return ProfileJob(base, 2, candidates, tiny.rows(2, 8), out / "p.jsonl", ProfileOptions(level="layer"))


def sketch(model: Path, out: Path) -> object:
    return profile_sketch(job_of(model, out), SketchOptions(samples=16))


RUNS: dict[str, Callable[[Path, Path], object]] = {
    "model_quantize": quantize,
    "exact profile": lambda model, out: profile_exact(job_of(model, out)),
    "sketch": sketch,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_changed_model_is_not_resumed(
    run: Callable[[Path, Path], object], change: Callable[[Path], None], model: Path, tmp_path: Path
) -> None:
    begun = iter(run(model, tmp_path))  # type: ignore[call-overload]
    for number, event in enumerate(begun):  # until there is something to go on from
        if isinstance(event, SweepDone) if run is sketch else number == 2:
            break
    begun.close()
    change(model)
    with pytest.raises(RecompileError, match=r"config(\.json)? or (its )?tensors were changed since") as caught:
        list(run(model, tmp_path))  # type: ignore[call-overload]
    assert isinstance(caught.value, (JournalError, OutputError))


def test_a_search_is_not_run_over_changed_models(tmp_path: Path) -> None:
    """model_optimize measures mixes only where the reference and every source are what was profiled."""
    base = tiny.copy_of(tiny.base("llama"), tmp_path / "base")
    words = ["-mb", str(base), "--candidates", "2,4", "-g", "32", "-r", "2", "-l", "16", "--mode", "sketch"]
    words += ["--importance-rows", "0", "-o", str(tmp_path / "p.jsonl")]
    run_command(model_profile.main, *words)
    flip_signs(base)
    words = [tmp_path / "p.jsonl", "-b", "3.2", "-o", tmp_path / "o.yaml"]
    assert "its tensors were changed since; profile it again" in refusal(model_optimize.main, *words, "--check")
    assert not (tmp_path / "o.yaml").exists()
