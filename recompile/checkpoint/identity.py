"""What a checkpoint is, in full: every byte of every tensor and everything in its config that decides a result.

A journal that is resumed holds the identities of the models that it was begun with; a run over other ones, however
alike, is refused. `Checkpoint.fingerprint` reads 12 KiB of a tensor and no config: it tells builds apart and proves
nothing.

Tensors are hashed once a machine: digests of large checkpoints are kept in the user's cache (below
`$XDG_CACHE_HOME/recompile/identities`), and count while size, modification and change time, inode and device of every
shard are what they were.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from recompile.errors import CheckpointError, RecompileError
from recompile.io.checksums import read_checked_json, write_checked_json
from recompile.io.files import open_regular

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint, TensorInfo

IDENTITY_VERSION = 1
CHUNK_BYTES = 1 << 20  # hashed on its own; one of zeros is not hashed at all, so that holes in a file cost nothing
CACHED_BYTES = 1 << 26  # a checkpoint from this size on is worth a file in the cache
THREADS = 4
WITHOUT_EFFECT = ("_name_or_path", "transformers_version")  # keys of a config that decide no result
_ZEROS = bytes(CHUNK_BYTES)


def canonical_config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """Everything of a config that may change a result, in one spelling: keys in order, numbers as JSON has them."""
    kept = {key: value for key, value in config.items() if key not in (*WITHOUT_EFFECT, "quantization_config")}
    return json.dumps([kept, quantization], sort_keys=True, separators=(",", ":"), default=str)


def identity_of(checkpoint: Checkpoint) -> str:
    """Hash of the canonical config and of all tensors: names, dtypes, shapes and bytes. Which shard holds what, and the
    directory, are no part of it. Raises CheckpointError for a shard that cannot be read or changes meanwhile."""
    digest = hashlib.sha256(f"identity {IDENTITY_VERSION}\n".encode())
    digest.update(canonical_config(checkpoint.config, checkpoint.quantization_config).encode() + b"\n")
    digest.update(_digest_of_tensors(checkpoint).encode())
    return digest.hexdigest()


def _digest_of_tensors(checkpoint: Checkpoint) -> str:
    paths = sorted({info.path for info in checkpoint.stored_tensors.values()})
    files = [_status(path) for path in paths]
    stored = _cache_file(checkpoint.path) if checkpoint.size_bytes >= CACHED_BYTES else None
    names = hashlib.sha256(repr([_described(info) for info in _in_order(checkpoint)]).encode()).hexdigest()
    key = {"version": IDENTITY_VERSION, "files": files, "tensors": names}
    if stored is not None and (known := _cached(stored, key)) is not None:
        return known
    digest = hashlib.sha256()
    for info, found in zip(_in_order(checkpoint), _content_digests(_in_order(checkpoint)), strict=True):
        digest.update(f"{info.name} {info.dtype} {list(info.shape)} {found}\n".encode())
    if [_status(path) for path in paths] != files:
        raise CheckpointError(
            f"{checkpoint.label}: was changed while it was read; run the command again once it is whole"
        )
    made = digest.hexdigest()
    if stored is not None:
        with suppress(RecompileError, OSError):  # without a cache it is hashed again the next time
            stored.parent.mkdir(parents=True, exist_ok=True)
            write_checked_json(stored, {**key, "digest": made, "directory": str(checkpoint.path.resolve())})
    return made


def _in_order(checkpoint: Checkpoint) -> list[TensorInfo]:
    return [checkpoint.stored_tensors[name] for name in sorted(checkpoint.stored_tensors)]


def _described(info: TensorInfo) -> tuple[object, ...]:
    return info.name, info.dtype, info.shape, info.path.name, info.offset, info.size_bytes


def _status(path: Path) -> list[Any]:
    """What tells that a file is not the one it was. The change time is set by the system alone, unlike the others."""
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return [path.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev]


def _cache_file(path: Path) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    root = Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache"
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return root / "recompile" / "identities" / f"{name}.json"


def _cached(stored: Path, key: Mapping[str, Any]) -> str | None:
    with suppress(RecompileError):
        found = read_checked_json(stored, way_out="it is made again")
        if isinstance(found, dict) and {name: found.get(name) for name in key} == key:
            return str(found["digest"]) if isinstance(found.get("digest"), str) else None
    return None


def _content_digests(tensors: Iterable[TensorInfo]) -> list[str]:
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # hashing and reading let other threads run
        return list(pool.map(_content_digest, tensors))


def _content_digest(info: TensorInfo) -> str:
    """Of a tensor's bytes: a hash of the hashes of its chunks."""
    digest = hashlib.sha256()
    try:
        with open_regular(info.path) as file:
            for start in range(0, info.size_bytes, CHUNK_BYTES):
                count = min(CHUNK_BYTES, info.size_bytes - start)
                chunk = _chunk(file, info, info.offset + start, count)
                digest.update(b"\0" if chunk is None else hashlib.sha256(chunk).digest())
    except OSError as error:
        raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _chunk(file: IO[bytes], info: TensorInfo, offset: int, count: int) -> bytes | None:
    """Some bytes of a tensor, or None for nothing but zeros."""
    descriptor = file.fileno()
    try:
        if os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + count:
            return None
    except (OSError, AttributeError):  # a hole to the end of the file, or a system that knows no holes
        pass
    chunk = os.pread(descriptor, count, offset)
    if len(chunk) != count:
        raise CheckpointError(f"{info.path}: ends inside tensor {info.name}; was it changed while open?")
    return None if chunk == _ZEROS[:count] else chunk
