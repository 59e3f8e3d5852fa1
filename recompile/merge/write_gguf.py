"""Overlay of GGUF files -> one GGUF file, or splits: tensors byte for byte from their sources, keys from the base.

As for directories: `plan_gguf` decides everything and reads no tensor, `execute_gguf` carries it out. The key section
is the base's, byte for byte, but for `general.file_type`, `general.quantization_version`, the keys that place splits
and the provenance keys of this project (`recompile.*`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from recompile import __version__
from recompile.checkpoint.checkpoint import GgufCheckpoint, StoredModule, TensorInfo
from recompile.errors import CheckpointError, OutputError, UnsupportedError
from recompile.formats.gguf_types import FILE_TYPES, TYPES, GgufType
from recompile.gguf.container import (
    SPLIT_KEYS,
    GgufTensor,
    Layout,
    NewTensor,
    encode_key,
    lay_out,
    open_gguf,
)
from recompile.io.files import finished_meanwhile, is_still, open_locked, partial_path, sync_directory
from recompile.merge.manifest import recipe_text
from recompile.merge.overlay import Accounting, Overlay, Placement, account, quantizable
from recompile.merge.write_plan import MB, Step
from recompile.merge.write_safetensors import CHUNK_BYTES, default_workers

PROVENANCE = "recompile."  # keys of this project
HASHES_KEY = "recompile.tensor_sha256"  # hex digests of all tensors, one after another in the order of the file
HEX = 64
QUANTIZATION_VERSION = 2
MAINLINE_ONLY = frozenset({"NVFP4", "Q2_0"})  # ik_llama.cpp has no such types
_SPLIT_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output and the stored pieces that it is made of: one, or one for each expert."""

    new: NewTensor
    pieces: tuple[TensorInfo, ...]
    file: int


@dataclass(frozen=True)
class PlannedModule:
    """A module of the mix, for reports."""

    name: str
    placement: Placement
    stored: StoredModule


@dataclass(frozen=True)
class PlannedFile:
    """One file of the output: its header's layout, and which tensors of the plan it holds."""

    path: Path
    layout: Layout = field(repr=False)
    tensors: tuple[int, ...]  # numbers in the plan
    hashes_at: int | None  # where the hex digests stand in the header; in the first file


@dataclass(frozen=True)
class GgufPlan:
    """Everything that `execute_gguf` will do."""

    overlay: Overlay
    out: Path
    shards: tuple[PlannedFile, ...]
    tensors: tuple[PlannedTensor, ...]
    modules: tuple[PlannedModule, ...]
    accounting: Accounting
    warnings: tuple[str, ...] = ()
    dense: bool = False

    @property
    def data_bytes(self) -> int:
        return sum(tensor.new.size_bytes for tensor in self.tensors)

    @property
    def needed_bytes(self) -> int:
        return sum(shard.layout.size_bytes for shard in self.shards)


def is_gguf_mix(overlay: Overlay) -> bool:
    """Whether the base is a GGUF file, so that the output is one."""
    return isinstance(overlay.base, GgufCheckpoint)


def plan_gguf(overlay: Overlay, out: str | os.PathLike[str], split_mb: int | None = None) -> GgufPlan:
    """Decide every tensor, key and byte range of the output; reads headers only.

    split_mb: largest size of a file in MiB; None: one file

    Raises UnsupportedError for sources that are no GGUF files or of another architecture, for experts of one tensor in
    several types, and for types that no one engine has; OutputError for an output that is not named *.gguf.
    """
    out = Path(out)
    if out.suffix != ".gguf":
        raise OutputError(f"{out}: a GGUF base is merged into a GGUF file; name it {out.name}.gguf (or use {{dense}})")
    if split_mb is not None and split_mb < 1:
        raise OutputError(f"{{shard_size}} {split_mb}: wanted at least 1 (MB)")
    base = overlay.base
    assert isinstance(base, GgufCheckpoint), "the caller asks is_gguf_mix first"
    architecture = base.file.value("general.architecture")
    for checkpoint in overlay.checkpoints:
        found = checkpoint.file.value("general.architecture") if isinstance(checkpoint, GgufCheckpoint) else None
        if found != architecture:
            what = "is not a GGUF file" if found is None else f"has the architecture {found}"
            raise UnsupportedError(
                f"{checkpoint.label}: {what}, and {base.label} is a GGUF file of {architecture}: tensors cannot be "
                f"exchanged between them; write a decoded copy with {{dense}}"
            )
    merged = _merged_tensors(overlay)
    kinds = {tensor.type for tensor, _ in merged}
    warnings = _engine_warnings(overlay, kinds)
    records = _merged_records(overlay, base, merged)
    parts = _parts(merged, None if split_mb is None else split_mb * MB)
    shards, tensors = [], []
    for number, members in enumerate(parts):
        path = _split_path(out, number, len(parts))
        head = list(records) if number == 0 else []
        if len(parts) > 1:
            head += [
                encode_key("split.no", number, "u16"),
                encode_key("split.count", len(parts), "u16"),
                encode_key("split.tensors.count", len(merged), "i32"),
            ]
        layout = lay_out(head, [merged[i][0] for i in members], base.file.alignment)
        shards.append(
            PlannedFile(path, layout, tuple(members), _hashes_at(layout, len(merged)) if number == 0 else None)
        )
        tensors += [PlannedTensor(merged[i][0], merged[i][1], number) for i in members]
    modules = tuple(PlannedModule(p.module, p, p.stored) for p in overlay.placements.values())
    return GgufPlan(
        overlay,
        out,
        tuple(shards),
        tuple(tensors),
        modules,
        account([module.stored for module in modules], quantizable(overlay.checkpoints)),
        tuple(warnings),
    )


def _merged_tensors(overlay: Overlay) -> list[tuple[NewTensor, tuple[TensorInfo, ...]]]:
    """Every tensor of the output in the base's order, with its pieces; tensors that only a source has come last."""
    pieces: dict[str, list[tuple[int, TensorInfo, GgufTensor]]] = {}
    for placement in overlay.placements.values():
        checkpoint = placement.checkpoint
        assert isinstance(checkpoint, GgufCheckpoint), "plan_gguf checks all of them"
        for info in placement.stored.parts.values():
            place = checkpoint.places.get(info.name)
            name = place.gguf if place is not None else info.name
            expert = place.expert if place is not None and place.expert is not None else -1
            pieces.setdefault(name, []).append((expert, info, checkpoint.file.tensors[name]))
    assert isinstance(overlay.base, GgufCheckpoint), "plan_gguf checks it"
    order = dict.fromkeys([name for name in overlay.base.file.tensors if name in pieces])
    merged = []
    for name in [*order, *(name for name in pieces if name not in order)]:
        found = sorted(pieces[name], key=lambda piece: piece[0])
        types = dict.fromkeys(tensor.type.name for _, _, tensor in found)
        if len(types) > 1:
            raise UnsupportedError(
                f"{overlay.label}: the experts of {name} would be {', '.join(types)}, and GGUF keeps all experts of a "
                f"layer in one tensor of one type; take them from one variant"
            )
        first = found[0][2]
        if first.type.rows > 1 and len({info.path for _, info, _ in found}) > 1:
            raise UnsupportedError(
                f"{overlay.label}: {name} is stored as {first.type.name}, in interleaved rows that move as a whole only"
            )
        merged.append((NewTensor(name, first.type, first.ne), tuple(info for _, info, _ in found)))
    return merged


def _engine_warnings(overlay: Overlay, kinds: Iterable[GgufType]) -> list[str]:
    kinds = list(kinds)
    fork = sorted(kind.name for kind in kinds if kind.fork)
    mainline = sorted(kind.name for kind in kinds if kind.name in MAINLINE_ONLY)
    if fork and mainline:
        raise UnsupportedError(
            f"{overlay.label}: the mix holds {', '.join(fork)}, which only ik_llama.cpp loads, and "
            f"{', '.join(mainline)}, which only llama.cpp loads; leave one of them out"
        )
    return [f"{overlay.label}: {', '.join(fork)}: loads in ik_llama.cpp only"] if fork else []


def _merged_records(
    overlay: Overlay, base: GgufCheckpoint, merged: Sequence[tuple[NewTensor, tuple[TensorInfo, ...]]]
) -> list[bytes]:
    """The base's key records, with what must change."""
    records = {
        name: record for name, record in base.file.records(SPLIT_KEYS).items() if not name.startswith(PROVENANCE)
    }
    if overlay.overridden:
        number = file_type_of(tensor for tensor, _ in merged)
        if number is None:
            records.pop("general.file_type", None)  # engines then guess it from the tensors
        else:
            records["general.file_type"] = encode_key("general.file_type", number, "u32")
    if any(tensor.type.is_quantized for tensor, _ in merged):
        records["general.quantization_version"] = encode_key(
            "general.quantization_version", QUANTIZATION_VERSION, "u32"
        )
    if overlay.overridden:
        records |= {
            f"{PROVENANCE}{name}": encode_key(f"{PROVENANCE}{name}", value)
            for name, value in _provenance(overlay, len(merged)).items()
        }
    return list(records.values())


def file_type_of(tensors: Iterable[NewTensor]) -> int | None:
    """`general.file_type` for the quantized type that fills most bytes, else the float type; None where it has no
    number."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.ne) > 1:
            weights[tensor.type.name] += tensor.size_bytes
    quantized = {name: size for name, size in weights.items() if TYPES[name].is_quantized} or weights
    return FILE_TYPES.get(max(quantized, key=lambda name: quantized[name])) if quantized else FILE_TYPES["F32"]


def _provenance(overlay: Overlay, tensors: int) -> dict[str, str]:
    """What the file is made of; the same for every run with the same inputs (no times, no host)."""

    def source(checkpoint: GgufCheckpoint) -> str:
        return json.dumps({"file": checkpoint.path.name, "fingerprint": checkpoint.fingerprint})

    found: dict[str, str] = {"version": __version__}
    assert isinstance(overlay.base, GgufCheckpoint), "plan_gguf checks it"
    found["base"] = source(overlay.base)
    for number, checkpoint in enumerate(overlay.sources.values()):
        assert isinstance(checkpoint, GgufCheckpoint), "plan_gguf checks it"
        found[f"source.{number}"] = source(checkpoint)
    text = recipe_text(overlay)
    if text is not None:
        found["recipe"] = text
    found["tensor_sha256"] = "0" * (HEX * tensors)  # filled in when they are known
    return found


def _hashes_at(layout: Layout, tensors: int) -> int | None:
    record = encode_key(HASHES_KEY, "0" * (HEX * tensors))
    at = layout.header.find(record)
    return None if at < 0 else at + len(record) - HEX * tensors


def _parts(merged: Sequence[tuple[NewTensor, tuple[TensorInfo, ...]]], limit: int | None) -> list[list[int]]:
    """Which tensors go in which file, in order; one larger than a file gets one of its own."""
    if limit is None:
        return [list(range(len(merged)))]
    parts: list[list[int]] = [[]]
    filled = 0
    for number, (tensor, _) in enumerate(merged):
        if parts[-1] and filled + tensor.size_bytes > limit:
            parts.append([])
            filled = 0
        parts[-1].append(number)
        filled += tensor.size_bytes
    return parts


def _split_path(out: Path, number: int, count: int) -> Path:
    if count == 1:
        return out
    return out.with_name(f"{_SPLIT_SUFFIX.sub('', out.stem)}-{number + 1:05d}-of-{count:05d}.gguf")


# ---- writing ---------------------------------------------------------------------------------------------------------


def check_gguf_output(plan: GgufPlan) -> None:
    """Raise OutputError if the output exists, is an input, or its place has too little room or cannot be written to."""
    for shard in plan.shards:
        if shard.path.exists():
            raise OutputError(f"{shard.path}: exists; remove it or choose another output")
    for checkpoint in plan.overlay.checkpoints:
        assert isinstance(checkpoint, GgufCheckpoint), "plan_gguf checks it"
        inputs = {os.path.realpath(path) for path in checkpoint.file.paths}
        for shard in plan.shards:
            if os.path.realpath(shard.path) in inputs:
                raise OutputError(f"{shard.path}: is an input; choose another output")
    parent = plan.out.parent if str(plan.out.parent) else Path()
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{plan.out}: {parent} is not a directory that can be written to; choose another output")
    status = os.statvfs(parent)
    free = status.f_bavail * status.f_frsize
    if plan.needed_bytes > free:
        raise OutputError(
            f"{plan.out}: needs {plan.needed_bytes} bytes, {parent} has {free} free; free some or choose another disk"
        )


def execute_gguf(plan: GgufPlan, *, workers: int | None = None) -> Generator[Step, None, None]:
    """Carry out a plan, yielding a step for every tensor. The files have their names when the iterator is exhausted.

    If it fails, is interrupted or is abandoned, nothing of the output is left. Raises OutputError (no room, no
    permission, the output exists by now) and CheckpointError (a source that ends early or changes meanwhile).
    """
    check_gguf_output(plan)
    partials = [partial_path(shard.path) for shard in plan.shards]
    try:
        with _Files(plan, partials) as files:  # holds the partials until they have their names
            hashes: dict[int, str] = {}
            yield from _copy(plan, files, hashes, workers or default_workers())
            digests = "".join(hashes[number] for number in range(len(plan.tensors))).encode()
            first = plan.shards[0]
            if first.hashes_at is not None:
                _write_at(files.targets[0], memoryview(digests), first.hashes_at)
            files.finish()
            for partial, shard in zip(partials, plan.shards, strict=True):
                os.replace(partial, shard.path)
            sync_directory(plan.shards[0].path.parent)
        yield Step("", plan.data_bytes, plan.data_bytes)
    except OSError as error:
        raise OutputError(
            f"{plan.out}: cannot be written: {error.strerror or error} (nothing of it is left)"
        ) from error


def _copy(plan: GgufPlan, files: _Files, hashes: dict[int, str], workers: int) -> Iterator[Step]:
    """Copy every tensor in threads; `hashes` gets the sha256 of each."""
    stop = threading.Event()
    numbers = [number for shard in plan.shards for number in range(len(shard.tensors))]
    jobs: dict[Future[str], int] = {}
    done = 0
    with ThreadPoolExecutor(workers, thread_name_prefix="recompile-gguf") as pool:
        try:
            for number, tensor in enumerate(plan.tensors):
                offset = plan.shards[tensor.file].layout.offsets[numbers[number]]
                jobs[pool.submit(_copy_tensor, files, tensor, offset, stop)] = number
            waiting = set(jobs)
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for job in finished:
                    number = jobs[job]
                    hashes[number] = job.result()
                    done += plan.tensors[number].new.size_bytes
                    yield Step(plan.tensors[number].new.name, done, plan.data_bytes)
        finally:
            stop.set()
            for job in jobs:
                job.cancel()


def _copy_tensor(files: _Files, tensor: PlannedTensor, offset: int, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    for info in tensor.pieces:
        for chunk in files.read(info):
            if stop.is_set():
                break
            with files.locks[tensor.file]:
                _write_at(files.targets[tensor.file], chunk, offset)
            digest.update(chunk)
            offset += len(chunk)
    return digest.hexdigest()


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data, offset)
        data = data[count:]
        offset += count


class _Files:
    """Descriptors of the sources and of the unfinished outputs, for the length of a `with` block."""

    def __init__(self, plan: GgufPlan, partials: Sequence[Path]) -> None:
        self.plan = plan
        self.partials = partials
        self.targets: list[int] = []
        self.locks = [threading.Lock() for _ in partials]
        self._sources: dict[Path, int] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        self._buffers = threading.local()

    def __enter__(self) -> _Files:
        try:
            for path in {info.path for tensor in self.plan.tensors for info in tensor.pieces}:
                try:
                    self._sources[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
                self._stamps[path] = self._stamp(path)
            for partial, shard in zip(self.partials, self.plan.shards, strict=True):
                self.targets.append(open_locked(partial, shard.path))
                if shard.path.exists():
                    raise OutputError(finished_meanwhile(shard.path))
                os.ftruncate(self.targets[-1], shard.layout.size_bytes)
                _write_at(self.targets[-1], memoryview(shard.layout.header), 0)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _stamp(self, path: Path) -> tuple[int, int]:
        status = os.fstat(self._sources[path])
        return status.st_size, status.st_mtime_ns

    def read(self, info: TensorInfo) -> Iterator[memoryview]:
        """The bytes of a tensor in chunks; each is overwritten by the next. Raises CheckpointError where they end."""
        buffer = getattr(self._buffers, "view", None)
        if buffer is None:
            buffer = self._buffers.view = memoryview(bytearray(CHUNK_BYTES))
        done = 0
        while done < info.size_bytes:
            wanted = buffer[: min(CHUNK_BYTES, info.size_bytes - done)]
            count = os.preadv(self._sources[info.path], [wanted], info.offset + done)
            if count == 0:
                raise CheckpointError(f"{info.path}: ends inside tensor {info.name}; was it changed while open?")
            yield buffer[:count]
            done += count

    def finish(self) -> None:
        """Flush to disk. Raises CheckpointError if a source was changed while it was read."""
        for descriptor in self.targets:
            os.fsync(descriptor)
        for path, stamp in self._stamps.items():
            if self._stamp(path) != stamp:
                raise CheckpointError(f"{path}: was changed while it was being copied; start again")

    def __exit__(self, *_: object) -> None:
        for partial, held in zip(self.partials, self.targets, strict=False):
            if is_still(partial, held):  # one that another process began since ours was renamed stays
                partial.unlink(missing_ok=True)
        for descriptor in (*self.targets, *self._sources.values()):
            os.close(descriptor)
        self.targets, self._sources = [], {}


# ---- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufVerified:
    """What `verify_gguf` compared."""

    tensors: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_gguf(plan: GgufPlan, progress: Callable[[Step], None] = lambda step: None) -> GgufVerified:
    """Read the output again: every tensor against its sources' bytes, and keys against the base's.

    Problems are returned, not raised."""
    problems: list[str] = []
    file = open_gguf(plan.shards[0].path)
    base = plan.overlay.base
    assert isinstance(base, GgufCheckpoint), "plan_gguf checks it"
    changed = {"general.file_type", "general.quantization_version", *SPLIT_KEYS}
    for name in base.file.keys:
        if name in changed or name.startswith(PROVENANCE):
            continue
        if name not in file.keys or file.record(name) != base.file.record(name):
            problems.append(f"key {name} differs from {base.label}'s")
    stored = file.value(HASHES_KEY, "")
    done = 0
    for number, tensor in enumerate(plan.tensors):
        wanted, found = hashlib.sha256(), hashlib.sha256()
        for info in tensor.pieces:
            _hash(info.path, info.offset, info.size_bytes, wanted)
        there = file.tensors.get(tensor.new.name)
        if there is None or (there.type, there.ne) != (tensor.new.type, tensor.new.ne):
            problems.append(f"tensor {tensor.new.name} is not there as planned")
            continue
        _hash(there.path, there.offset, there.size_bytes, found)
        if found.digest() != wanted.digest():
            problems.append(f"tensor {tensor.new.name} differs from {tensor.pieces[0].path}")
        if stored and stored[HEX * number : HEX * (number + 1)] != found.hexdigest():
            problems.append(f"tensor {tensor.new.name} differs from the hash in the file's keys")
        done += tensor.new.size_bytes
        progress(Step(tensor.new.name, done, plan.data_bytes))
    return GgufVerified(len(plan.tensors), tuple(problems))


def check_hashes(path: str | os.PathLike[str]) -> Mapping[str, bool] | None:
    """Tensor -> whether its bytes have the hash that a merge left in the file's keys; None for files without hashes."""
    file = open_gguf(path)
    stored = file.value(HASHES_KEY)
    if not isinstance(stored, str) or len(stored) != HEX * len(file.tensors):
        return None
    found = {}
    for number, tensor in enumerate(file.tensors.values()):
        digest = hashlib.sha256()
        _hash(tensor.path, tensor.offset, tensor.size_bytes, digest)
        found[tensor.name] = digest.hexdigest() == stored[HEX * number : HEX * (number + 1)]
    return found


def _hash(path: Path, offset: int, size: int, digest: hashlib._Hash) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while size:
            chunk = file.read(min(CHUNK_BYTES, size))
            if not chunk:
                raise CheckpointError(f"{path}: ends early; was it changed while open?")
            digest.update(chunk)
            size -= len(chunk)
