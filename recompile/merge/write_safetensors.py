"""A plan -> a checkpoint directory: shards, index, config and manifest. Bounded memory, all or nothing.

`plan_write` (plan_safetensors.py) decides everything and reads no tensor; `execute` carries the plan out and decides
nothing. Tensors are copied byte for byte and hashed on the way; torch is imported only to decode.

The output grows in a directory beside it, which holds a marker file of ours, is flushed to disk, and then gets
its name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recompile.checkpoint.checkpoint import (
    Checkpoint,
    GgufCheckpoint,
    MlxCheckpoint,
    TensorInfo,
    seen_by_transformers,
)
from recompile.checkpoint.safetensors_files import OpenFiles, read_safetensors_header, read_tensor
from recompile.errors import CheckpointError, OutputError
from recompile.io.files import (
    PARTIAL_SUFFIX,
    OutputDirectory,
    check_is_not_here,
    check_partial,
    insist,
    partial_path,
)
from recompile.merge.configs import dump_json
from recompile.merge.dense_copy import decode_planned
from recompile.merge.manifest import make_manifest
from recompile.merge.overlay import Overlay
from recompile.merge.write_plan import MANIFEST_NAME, PlannedModule, Step, WritePlan

CHUNK_BYTES = 1 << 20  # copied and hashed at a time, per thread: stays in a core's cache between the two

# sha256 costs more than the copy itself, so modules are spread over threads that each copy and hash.
MAX_WORKERS = 4


# ---- where the output goes -------------------------------------------------------------------------------------------


def check_output(overlay: Overlay, out: str | os.PathLike[str], needed_bytes: int = 0) -> None:
    """Raise OutputError if `out` cannot become the output: it is, holds or lies in an input (symbolic links followed),
    it exists and is not empty, the directory in which it grows is another's, its place cannot be written to or has too
    little room."""
    label = os.fspath(out)
    real = Path(os.path.realpath(Path(out).expanduser()))
    check_is_not_here(real)
    if real.name.endswith(PARTIAL_SUFFIX):
        raise OutputError(f"{label}: names ending in {PARTIAL_SUFFIX} are kept for unfinished outputs; choose another")
    partial = partial_path(real)
    for checkpoint in overlay.checkpoints:
        source = Path(os.path.realpath(checkpoint.path))
        for place, what in ((real, label), (partial, f"{label}{PARTIAL_SUFFIX}")):
            if place == source:
                raise OutputError(f"{what}: is the input directory {checkpoint.label}; choose another output")
            if source in place.parents:
                raise OutputError(f"{what}: lies inside the input directory {checkpoint.label}; choose another output")
            if place in source.parents:
                raise OutputError(f"{what}: holds the input directory {checkpoint.label}; choose another output")
    if real.exists() and not real.is_dir():
        raise OutputError(f"{label}: exists and is a file; choose another output")
    try:
        if real.is_dir() and any(real.iterdir()):
            raise OutputError(f"{label}: exists and is not empty; remove it or choose another output")
        reclaimed = check_partial(partial)
        parent = _existing_parent(real)
        if not parent.is_dir():
            raise OutputError(f"{label}: {parent} is a file; choose another output")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{label}: no permission to write in {parent}; choose another output")
        free = shutil.disk_usage(parent).free + reclaimed
    except OSError as error:
        raise OutputError(f"{label}: cannot be used as output: {error.strerror or error}") from error
    if needed_bytes > free:
        raise OutputError(
            f"{label}: needs {needed_bytes} bytes ({needed_bytes / 2**30:.2f} GiB), {parent} has {free} free "
            f"({free / 2**30:.2f} GiB); free some or choose another disk"
        )


def _existing_parent(path: Path) -> Path:
    return next((parent for parent in path.parents if parent.exists()), Path(path.anchor))


# ---- writing ---------------------------------------------------------------------------------------------------------


def execute(plan: WritePlan, *, workers: int | None = None) -> Generator[Step, None, None]:
    """Carry out a plan, yielding a step for every few MiB. The output exists when the iterator is exhausted.

    workers: threads that copy and hash; default by the number of cores. Decoding runs in one.

    If it fails, is interrupted or is abandoned, nothing of it is left. Raises OutputError (no room, no
    permission, the output exists by now) and CheckpointError (a source that ends early or changes meanwhile).
    """
    check_output(plan.overlay, plan.out, plan.needed_bytes)
    partial = OutputDirectory(plan.out)
    progress = _Progress(plan.data_bytes)
    try:
        partial.create()
        with _OpenFiles(plan, partial.path) as files:
            hashes: dict[str, str] = {}
            yield from _run(plan, files, progress, hashes, 1 if plan.dense else workers or default_workers())
            files.finish()
        for source in plan.copies:
            progress.file = source.name
            _copy_file(source, partial.path / source.name)
        for name, text in {**plan.texts, MANIFEST_NAME: dump_json(make_manifest(plan, hashes))}.items():
            progress.file = name
            _write_text(partial.path / name, text)
        partial.finish()
        yield Step("", progress.total, progress.total)
    except OSError as error:
        partial.discard()
        raise _output_error(plan, progress, error) from error
    except BaseException:
        partial.discard()
        raise


@dataclass
class _Progress:
    total: int
    done: int = 0
    file: str = ""


def _output_error(plan: WritePlan, progress: _Progress, error: OSError) -> OutputError:
    where = f"{plan.out}: cannot be written: {error.strerror or error}"
    at = f" at {progress.file}" if progress.file else ""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "free some space or choose another disk" if full else "choose another output"
    return OutputError(
        f"{where}{at}, after {progress.done} of {progress.total} bytes (nothing of it is left); {way_out}"
    )


def default_workers() -> int:
    """Threads that copy and hash: one more than cores, since one of them waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores + 1)


@dataclass(frozen=True)
class _Wrote:
    module: PlannedModule
    count: int


class _Cancelled(Exception):
    """Another thread failed or the user stopped."""


def _run(
    plan: WritePlan, files: _OpenFiles, progress: _Progress, hashes: dict[str, str], workers: int
) -> Iterator[Step]:
    """Write every module, in threads; `hashes` is filled with a sha256 per module."""
    events: queue.SimpleQueue[_Wrote | Future[tuple[str, str]]] = queue.SimpleQueue()
    stop = threading.Event()

    def write(module: PlannedModule) -> tuple[str, str]:
        return module.name, _write_module(plan, module, files, lambda count: events.put(_Wrote(module, count)), stop)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="recompile-write")
    try:
        for module in plan.modules:
            pool.submit(write, module).add_done_callback(events.put)
        left = len(plan.modules)
        while left:
            event = events.get()
            if isinstance(event, _Wrote):
                progress.done += event.count
                progress.file = plan.shards[event.module.shard].file
                yield Step(event.module.name, progress.done, progress.total)
            else:
                left -= 1
                name, digest = event.result()
                hashes[name] = digest
    finally:
        stop.set()
        insist(lambda: pool.shutdown(wait=True, cancel_futures=True))


def _write_module(
    plan: WritePlan, module: PlannedModule, files: _OpenFiles, wrote: Callable[[int], None], stop: threading.Event
) -> str:
    """Write one module and return the sha256 of its parts' bytes."""
    digest = hashlib.sha256()
    target = files.shards[module.shard]
    made = _convert(module) if module.conversion is not None else {}
    for tensor in module.tensors:
        if tensor.info.name in made:
            chunks = _in_chunks(made[tensor.info.name])
        elif tensor.source is None:
            chunks = _in_chunks(decode_planned(plan, module, tensor))
        elif tensor.source.is_scattered:
            with OpenFiles() as opened:
                chunks = _in_chunks(memoryview(opened.read(tensor.source)))
        else:
            chunks = files.read(tensor.source)
        at = tensor.info.offset
        for chunk in chunks:
            if stop.is_set():
                raise _Cancelled
            with files.locks[module.shard]:
                _write_at(target, chunk, at)
            digest.update(chunk)
            at += len(chunk)
            wrote(len(chunk))
        files.start_flush(module.shard, tensor.info)
    return digest.hexdigest()


def _convert(module: PlannedModule) -> dict[str, memoryview]:
    """The bytes of every tensor of a module that changes its form."""
    import torch

    assert module.conversion is not None, module.name
    parts = {part: read_tensor(info) for part, info in module.placement.stored.parts.items()}
    made = module.conversion.run(parts)
    found = {}
    for tensor in module.tensors:
        value = made[tensor.info.name[len(module.name) + 1 :]].contiguous()
        assert tuple(value.shape) == tensor.info.shape, f"{tensor.info.name} was planned as {tensor.info.shape}"
        found[tensor.info.name] = memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return found


def _in_chunks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count


class _OpenFiles:
    """Descriptors of the sources and of the shards, for the length of a `with` block.

    Sources must be what they were when the plan was made, and must not change until they are copied.
    """

    def __init__(self, plan: WritePlan, directory: Path) -> None:
        self.plan = plan
        self.directory = directory
        self.shards: list[int] = []
        # Writes to one file exclude each other in the kernel anyway, where waiting threads burn a core.
        self.locks = [threading.Lock() for _ in plan.shards]
        self._sources: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._buffers = threading.local()

    def __enter__(self) -> _OpenFiles:
        try:
            self._open_sources()
            for shard in self.plan.shards:
                descriptor = os.open(self.directory / shard.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                self.shards.append(descriptor)
                os.ftruncate(descriptor, shard.size_bytes)
                _write_at(descriptor, memoryview(shard.header), 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _open_sources(self) -> None:
        wanted: dict[Path, list[TensorInfo]] = {}
        owners: dict[Path, Checkpoint] = {}
        for module in self.plan.modules:
            checkpoint = module.placement.checkpoint
            if isinstance(checkpoint, GgufCheckpoint):
                continue  # is decoded, which reads it as it is opened
            for info in module.placement.stored.parts.values():
                owners[info.path] = checkpoint
                wanted.setdefault(info.path, []).append(info if info.view is None else info.view.stored)
        for path, infos in wanted.items():
            now, _ = read_safetensors_header(path)
            if isinstance(owners[path], MlxCheckpoint):
                now = seen_by_transformers(now, owners[path].config)
            if any(now.get(info.name) != info for info in infos):
                raise CheckpointError(f"{path}: was changed after it was opened; start again")
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
            self._sources[path] = descriptor
            self._stamps[path] = self._stamp(descriptor)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @staticmethod
    def _stamp(descriptor: int) -> tuple[int, int]:
        status = os.fstat(descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, info: TensorInfo) -> Iterator[memoryview]:
        """The bytes of a tensor in chunks; each is overwritten by the next. Raises CheckpointError where they end."""
        descriptor = self._sources[info.path]
        buffer = getattr(self._buffers, "view", None)
        if buffer is None:
            buffer = self._buffers.view = memoryview(bytearray(CHUNK_BYTES))
        done = 0
        while done < info.size_bytes:
            try:
                count = os.preadv(descriptor, [buffer[: min(CHUNK_BYTES, info.size_bytes - done)]], info.offset + done)
            except OSError as error:
                raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
            if count == 0:
                raise CheckpointError(
                    f"{info.path}: ends after {done} of the {info.size_bytes} bytes of tensor {info.name}; it was cut "
                    f"short while it was being copied, restore it and start again"
                )
            yield buffer[:count]
            done += count

    def start_flush(self, shard: int, written: TensorInfo) -> None:
        """Let the kernel begin to write a tensor to disk, so that the flush at the end finds little to do. On Linux the
        advice to drop pages does that for pages that cannot be dropped yet."""
        if written.size_bytes >= CHUNK_BYTES and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.shards[shard], written.offset, written.size_bytes, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """Flush the shards to disk. Raises CheckpointError if a source was changed while it was read."""
        for descriptor in self.shards:
            os.fsync(descriptor)
        for path, descriptor in self._sources.items():
            if self._stamp(descriptor) != self._stamps[path]:
                raise CheckpointError(f"{path}: was changed while it was being copied; start again")

    def __exit__(self, *_: object) -> None:
        for descriptor in (*self.shards, *self._sources.values()):
            os.close(descriptor)
        self.shards, self._sources = [], {}


def _copy_file(source: Path, target: Path) -> None:
    try:
        reader = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}") from error
    with reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)
        writer.flush()
        os.fsync(writer.fileno())


def _write_text(target: Path, text: str) -> None:
    with target.open("x", encoding="utf-8", errors="backslashreplace") as writer:
        writer.write(text)
        writer.flush()
        os.fsync(writer.fileno())
