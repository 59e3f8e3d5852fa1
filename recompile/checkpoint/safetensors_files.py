"""Safetensors files: headers checked against the file, and tensors read where their headers say."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from sys import intern
from typing import TYPE_CHECKING, Any

from recompile.errors import CheckpointError
from recompile.formats import DTYPE_BYTES
from recompile.formats.gguf_types import QUANTIZED_TYPES
from recompile.formats.stored import TensorInfo
from recompile.io.files import Failure, open_regular, parse_json
from recompile.io.memory import available_bytes
from recompile.io.printable import printable
from recompile.io.schema import describe

if TYPE_CHECKING:
    import torch
    from safetensors import safe_open
    from torch import Tensor

MOST_TENSORS, MOST_AXES = 500_000, 16  # DeepSeek-V3 has 135,459 of at most 3
MAX_HEADER_BYTES = 100 * 1000 * 1000  # the limit of the safetensors format itself


@contextmanager
def open_tensors(
    path: Path, *, error: Failure = CheckpointError, way_out: str = "", checks: bool = False, run: str | None = None
) -> Iterator[safe_open]:
    """A safetensors file that is no checkpoint, to read: rows, traces, statistics, the state of a run.

    Its header is checked first. Raises `error` for what is no such file, with `way_out` at the end, also where a tensor
    that is asked for in the block is not there or cannot be read. checks: reads all of it first, and raises where its
    checksum does not fit; one without is taken as it is. run: raises for a part of another run.
    """
    import safetensors

    from recompile.io.checksums import KEY, RUN, checksum_of_tensors

    try:
        read_safetensors_header(path)
        with safetensors.safe_open(path, framework="pt") as stored:
            about = stored.metadata() or {}
            if checks and KEY in about and checksum_of_tensors(stored.keys(), stored.get_tensor, about) != about[KEY]:
                raise CheckpointError(f"{path}: was changed after it was written (its checksum does not fit)")
            if run is not None and about.get(RUN) != run:
                raise CheckpointError(f"{path}: is of another run, with other settings")
            yield stored
    except CheckpointError as failed:
        raise error(f"{failed}{way_out}") from failed
    except (OSError, safetensors.SafetensorError) as failed:
        raise error(f"{path}: not a readable safetensors file: {failed}{way_out}") from failed


def read_tensors(path: Path, *, error: Failure = CheckpointError, way_out: str = "") -> dict[str, Tensor]:
    """All tensors of such a file, of any shape and dtype. Raises `error` as `open_tensors` does."""
    with open_tensors(path, error=error, way_out=way_out) as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def read_safetensors_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and metadata of one safetensors file, checked against the size of the file.

    Raises CheckpointError naming the file and the tensor for anything the safetensors format forbids: a header that
    does not fit, unknown dtypes, offsets that do not match shape and dtype, overlap, holes, a truncated file.
    """
    try:
        with open_regular(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > file_bytes:
                raise CheckpointError(
                    f"{path}: not a whole safetensors file: it has {file_bytes} bytes and its first 8 ask for a header "
                    f"of {header_bytes}; download or write it again"
                )
            raw = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    count = raw.count(b"data_offsets")
    if count > MOST_TENSORS:
        raise CheckpointError(
            f"{path}: the safetensors header has {count} tensors, at most {MOST_TENSORS} are read here"
        )
    header = parse_json(raw, f"{path}: the safetensors header")
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is {describe(header)}, wanted an object")
    start = 8 + header_bytes
    metadata = header.pop("__metadata__", {}) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of the safetensors header is no object of texts; write it again")
    tensors: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # few differ; 135,000 tensors of 256 experts share them
    for name, entry in header.items():
        tensors[intern(name)] = _tensor_info(path, name, entry, start, shapes)
    end = 0
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.size_bytes)):
        begin = info.offset - start
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves {begin - end} bytes unused before it"
            raise CheckpointError(f"{path}: tensor {info.name} {what}; the file is damaged")
        end = begin + info.size_bytes
    if start + end != file_bytes:
        what = "truncated" if start + end > file_bytes else "longer than its header says"
        raise CheckpointError(
            f"{path}: {what}: its header describes {start + end} bytes and it has {file_bytes}; "
            f"download or write it again"
        )
    return tensors, metadata


_ODD = re.compile(r"[^\x00-\x7f]|[0-9]{10}")


def _tensor_info(
    path: Path, name: str, entry: Any, start: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> TensorInfo:
    try:
        dtype, shape, (begin, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: header entry of tensor {name} is malformed: {repr(entry)[:200]}") from error
    if _ODD.search(name) and any(
        word.isdigit() and not (word.isascii() and len(word) < 10) for word in name.split(".")
    ):
        raise CheckpointError(
            f"{path}: tensor {printable(name)[:80]} has a number in its name that none has; the file is damaged"
        )
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{path}: tensor {name} has dtype {repr(dtype)[:80]}, known: {', '.join(DTYPE_BYTES)}")
    sizes = (*shape, begin, stop)
    if len(shape) > MOST_AXES or not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        found = f"shape {describe(list(shape))} and offsets {describe(begin)}..{describe(stop)}"
        found = f"shape {list(shape)} and offsets {begin}..{stop}" if len(str(sizes)) < 200 else found
        raise CheckpointError(
            f"{path}: tensor {name} has {found}; wanted at most {MOST_AXES} axes, and whole numbers from 0 to 2^63"
        )
    wanted = DTYPE_BYTES[dtype]
    for size in shape:
        wanted *= size
    if stop - begin != wanted:
        raise CheckpointError(
            f"{path}: tensor {name} {dtype} {list(shape)} needs {wanted} bytes, its offsets give {stop - begin}"
        )
    return TensorInfo(intern(name), intern(dtype), shapes.setdefault(shape, shape), path, start + begin, wanted)


class OpenFiles:
    """Shards that stay open for the length of a `with` block: many small reads open each of them once."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def read(self, info: TensorInfo) -> bytes:
        """The bytes of one tensor. Raises CheckpointError for a file that cannot be read or ends early."""
        if info.is_scattered:
            import torch

            return read_tensor(info).reshape(-1).view(torch.uint8).numpy().tobytes()
        try:
            descriptor = self._descriptors.get(info.path)
            if descriptor is None:
                descriptor = self._descriptors[info.path] = os.open(info.path, os.O_RDONLY | os.O_CLOEXEC)
            pieces = []
            done = 0
            while done < info.size_bytes:  # one read gives 2 GiB at most
                piece = os.pread(descriptor, info.size_bytes - done, info.offset + done)
                if not piece:
                    raise CheckpointError(f"{info.path}: ends inside tensor {info.name}; was it changed while open?")
                pieces.append(piece)
                done += len(piece)
        except OSError as error:
            raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


READ_AHEAD_GAP = 1 << 20  # bytes between two tensors that are read along rather than asked about separately
READ_AHEAD_SHARE = 0.25  # of the free memory, which the system keeps them in until they are wanted


def read_ahead(infos: Iterable[TensorInfo]) -> None:
    """Ask the system to read these tensors into its cache of files while other work is done. Waits for nothing, raises
    nothing, and asks for nothing that would push much else out of memory."""
    by_path: dict[Path, list[tuple[int, int]]] = {}
    for info in infos:
        stored = info.view.stored if info.view is not None and info.is_scattered else info
        by_path.setdefault(stored.path, []).append((stored.offset, stored.offset + stored.size_bytes))
    size = sum(end - begin for spans in by_path.values() for begin, end in set(spans))
    if not hasattr(os, "posix_fadvise") or size > READ_AHEAD_SHARE * available_bytes():
        return
    for path, spans in by_path.items():
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for begin, end in _joined(spans):
                    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of bytes, those that touch or nearly do as one."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if found and begin - found[-1][1] <= READ_AHEAD_GAP:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def read_tensor(info: TensorInfo, device: str | torch.device = "cpu") -> Tensor:
    """The bytes of one tensor, of any shape and its own dtype, read once into its final host buffer."""
    import torch

    if info.view is not None and info.is_scattered:
        stored, (start, step) = info.view.stored, info.view.columns or info.view.rows or (0, 1)
        size = stored.size_bytes // stored.shape[0]
        whole = replace(
            stored, shape=stored.shape[1:], offset=stored.offset + info.view.index * size, size_bytes=size, view=None
        )
        count = info.shape[0]
        if info.view.rows is not None:
            return read_tensor(whole, device)[start : start + step * count : step].reshape(info.shape)
        part = read_tensor(whole, device)[..., start : start + step * count : step]
        return (part.T if part.dim() == 2 else part).contiguous()
    from safetensors.torch import _TYPES as TORCH_DTYPES  # the library's own table of dtype spellings

    buffer = torch.empty(info.size_bytes, dtype=torch.uint8)
    try:
        with info.path.open("rb", buffering=0) as file:
            file.seek(info.offset)
            view = memoryview(buffer.numpy())  # type: ignore[arg-type]
            done = 0
            while done < info.size_bytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{info.path}: ends inside tensor {info.name}; was it changed while open?")
                done += count
    except OSError as error:
        raise CheckpointError(f"{info.path}: cannot be read: {error.strerror or error}") from error
    if info.dtype in QUANTIZED_TYPES:  # rows of bytes
        buffer = buffer.view(*info.shape[:-1], -1)
        return buffer if torch.device(device).type == "cpu" else buffer.to(device)
    dtype = torch.float8_e8m0fnu if info.dtype == "F8_E8M0" else TORCH_DTYPES[info.dtype]
    assert dtype is not None, "DTYPE_BYTES lists only dtypes that torch has"
    tensor = buffer.view(dtype).reshape(info.shape)
    return tensor if torch.device(device).type == "cpu" else tensor.to(device)
