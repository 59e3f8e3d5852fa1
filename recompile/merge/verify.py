"""Does a recompiled checkpoint hold the bytes that its manifest, and its sources, say? Read, never trusted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, StoredModule, open_checkpoint, read_json
from recompile.checkpoint.safetensors_files import OpenFiles
from recompile.errors import CheckpointError
from recompile.merge.check import check_checkpoint
from recompile.merge.manifest import MANIFEST_VERSION
from recompile.merge.problems import Problem
from recompile.merge.write_gguf import HASHES_KEY, check_hashes
from recompile.merge.write_plan import MANIFEST_NAME, Step
from recompile.merge.write_safetensors import CHUNK_BYTES, default_workers


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` read and found."""

    directory: str
    modules: int
    size_bytes: int
    compared_with_sources: int  # modules whose bytes were also read from their source
    notes: tuple[str, ...]  # why others were not
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        return not any(problem.severity == "error" for problem in self.problems)


def verify(out: str | os.PathLike[str], on_step: Callable[[Step], None] | None = None) -> VerifyReport:
    """Read a recompiled checkpoint again and compare every module's bytes with the manifest, and with the module's
    source where that is still there.

    on_step: called after every module, with bytes read so far

    Raises CheckpointError if the directory cannot be opened or has no manifest of ours; contradictions are reported.
    """
    opened = open_checkpoint(out)
    if isinstance(opened, GgufCheckpoint):
        return _verify_gguf(opened)
    manifest = _read_manifest(opened)
    listed: Mapping[str, Mapping[str, Any]] = manifest["modules"]
    one_by_one = any(modules & listed.keys() for modules, _ in opened.fused_blocks)  # as merges stack experts
    checkpoint = opened if one_by_one else opened.whole
    problems = check_checkpoint(out)
    for name in sorted(checkpoint.modules.keys() - listed.keys()):
        problems.append(Problem(name, f"is stored and not in {MANIFEST_NAME}"))
    for name in sorted(listed.keys() - checkpoint.modules.keys()):
        problems.append(Problem(name, f"is in {MANIFEST_NAME} and not stored"))
    stored = {name: module for name, module in checkpoint.modules.items() if name in listed}
    for name, module in stored.items():
        if module.format != listed[name].get("format"):
            problems.append(Problem(name, f"is {module.format}, the manifest says {listed[name].get('format')}"))
    sources, notes = _reachable_sources(manifest)
    originals: dict[str, StoredModule] = {}
    for name in stored:
        source = listed[name].get("source")
        if source not in sources or listed[name].keys() & {"decoded_from", "converted_from"}:
            continue
        original = sources[source].modules.get(name) or sources[source].whole.modules.get(name)
        if original is not None:
            originals[name] = original
        else:
            problems.append(Problem(name, f"is not in {source or 'the base'}, which it was taken from"))
    total = sum(module.size_bytes for module in (*stored.values(), *originals.values()))
    done = 0
    for name, digest in _hashes(stored.values()):
        done += stored[name].size_bytes
        if digest != listed[name].get("sha256"):
            problems.append(Problem(name, f"its bytes hash to {digest[:16]}, the manifest says {_short(listed[name])}"))
        if on_step:
            on_step(Step(name, done, total))
    for name, digest in _hashes(originals.values()):
        done += originals[name].size_bytes
        if digest != listed[name].get("sha256"):
            where = listed[name].get("source") or "the base"
            problems.append(Problem(name, f"its bytes in {where} hash to {digest[:16]}, not {_short(listed[name])}"))
        if on_step:
            on_step(Step(name, done, total))
    return VerifyReport(checkpoint.label, len(stored), total, len(originals), tuple(notes), tuple(problems))


def _verify_gguf(checkpoint: GgufCheckpoint) -> VerifyReport:
    """A GGUF file against the hashes that a merge left in its keys."""
    found = check_hashes(checkpoint.path)
    if found is None:
        raise CheckpointError(
            f"{checkpoint.label}: has no key {HASHES_KEY}, so there is nothing to verify it against; it was not merged "
            f"by recompile (recompile --check reads any file)"
        )
    problems = [
        Problem(name, "its bytes do not have the hash in the file's keys") for name, ok in found.items() if not ok
    ]
    note = "sources are compared when the file is written (recompile -i ... --verify)"
    size = checkpoint.size_bytes
    return VerifyReport(checkpoint.label, len(checkpoint.modules), size, 0, (note,), tuple(problems))


def _short(entry: Mapping[str, Any]) -> str:
    return str(entry.get("sha256"))[:16]


def _read_manifest(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.path / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint.label}: has no {MANIFEST_NAME}, so there is nothing to verify it against; it was not written "
            f"by recompile (recompile --check reads any checkpoint)"
        )
    manifest = read_json(path)
    version = manifest.get("manifest_version") if isinstance(manifest, dict) else None
    if version != MANIFEST_VERSION or not isinstance(manifest.get("modules"), dict):
        raise CheckpointError(f"{path}: is not a manifest of version {MANIFEST_VERSION} (found {version!r})")
    return manifest


def _reachable_sources(manifest: Mapping[str, Any]) -> tuple[dict[str | None, Checkpoint], list[str]]:
    """The checkpoints that the output was made from and that are still what they were, by `source` in the manifest."""
    found: dict[str | None, Checkpoint] = {}
    notes = []
    entries: dict[str | None, Any] = {None: manifest.get("base"), **(manifest.get("sources") or {})}
    for source, entry in entries.items():
        directory = entry.get("directory") if isinstance(entry, Mapping) else None
        if not isinstance(directory, str) or not Path(directory).is_dir():
            notes.append(f"{directory}: not found from here, so that its bytes were not compared")
            continue
        try:
            checkpoint = open_checkpoint(directory)
        except CheckpointError as error:
            notes.append(f"{error}; its bytes were not compared")
            continue
        if checkpoint.fingerprint != entry.get("fingerprint"):
            notes.append(f"{directory}: was changed since, so that its bytes were not compared")
            continue
        found[source] = checkpoint
    return found, notes


def _hashes(modules: Iterable[StoredModule]) -> Iterator[tuple[str, str]]:
    """(module, sha256 over its parts' bytes in part-name order), in order, read by several threads."""
    modules = list(modules)
    with ThreadPoolExecutor(default_workers()) as pool:
        yield from zip((module.name for module in modules), pool.map(hash_module, modules), strict=True)


def hash_module(module: StoredModule) -> str:
    """sha256 over the bytes of a module's parts, in part-name order, as in the manifest. Raises CheckpointError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for _, info in sorted(module.parts.items()):
        if info.is_scattered:
            with OpenFiles() as files:
                digest.update(files.read(info))
            continue
        try:
            with info.path.open("rb", buffering=0) as file:
                file.seek(info.offset)
                left = info.size_bytes
                while left:
                    count = file.readinto(buffer[: min(left, CHUNK_BYTES)])
                    if not count:
                        raise CheckpointError(
                            f"{info.path}: ends inside tensor {info.name}; was it changed while open?"
                        )
                    digest.update(buffer[:count])
                    left -= count
        except OSError as error:
            raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
