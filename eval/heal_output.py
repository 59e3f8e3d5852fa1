"""A healed build on disk: every byte that did not move is the build's."""

from __future__ import annotations

import json
import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, TensorInfo
from recompile.checkpoint.safetensors_files import read_tensor
from recompile.errors import OutputError
from recompile.gguf.container import SPLIT_KEYS, GgufTensor, NewTensor, encode_key, is_gguf, open_gguf, write_gguf
from recompile.io.files import OutputDirectory, parse_json, read_json, write_json
from recompile.merge.write_gguf import PROVENANCE
from recompile.model.used_rows import HEAL_KEY
from recompile.quantize.movable import Movable

REPORT = "heal_report.json"
COPY_BYTES = 1 << 24


def check_name(build: Checkpoint, out: Path) -> None:
    """Raise OutputError where `out` exists, or is named unlike what a build of this kind becomes."""
    if out.exists():
        raise OutputError(f"{out}: exists already; remove it, or choose another output")
    if isinstance(build, GgufCheckpoint) and out.suffix != ".gguf":
        raise OutputError(f"{out}: a GGUF build is healed into a GGUF file; name it {out.name}.gguf")


def read_healed(build: Path) -> dict[str, Any] | None:
    """The report in a healed build; None for one that was not healed here."""
    if is_gguf(build):
        text = open_gguf(build).value(HEAL_KEY)
        found = parse_json(text, f"{build}: {HEAL_KEY}") if isinstance(text, str) else None
    else:
        found = read_json(build / REPORT) if (build / REPORT).is_file() else None
    return found if isinstance(found, dict) else None


def write_healed(build: Checkpoint, movables: Mapping[str, Movable], out: Path, report: Mapping[str, Any]) -> None:
    """Copy a build with what moved; the report goes with it.

    What says which bytes came from which variant (recompile_manifest.json, the keys of a merged GGUF file) is left out,
    for these bytes no longer do. A GGUF build in several files becomes one."""
    if isinstance(build, GgufCheckpoint):
        _write_gguf(build, movables, out, report)
    else:
        _write_directory(build, movables, out, report)


def _write_directory(build: Checkpoint, movables: Mapping[str, Movable], out: Path, report: Mapping[str, Any]) -> None:
    directory = OutputDirectory(out)
    with directory as folder:
        _copy_files(build, folder)
        for movable in movables.values():
            info = build.tensors[movable.tensor]
            value = movable.stored
            if tuple(value.shape) != tuple(info.shape):
                raise OutputError(f"{movable.tensor}: is {list(value.shape)} now, was {list(info.shape)}")
            with (folder / info.path.relative_to(build.path)).open("r+b") as file:
                file.seek(info.offset)
                file.write(_bytes_of(value))
        write_json(folder / REPORT, report)
        directory.finish()


def _copy_files(build: Checkpoint, folder: Path) -> None:
    for path in sorted(build.path.iterdir()):
        if path.is_file() and path.name not in ("recompile_manifest.json", REPORT) and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)


def _bytes_of(value: Tensor) -> bytes:
    import torch

    return value.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


def _write_gguf(build: GgufCheckpoint, movables: Mapping[str, Movable], out: Path, report: Mapping[str, Any]) -> None:
    records = [record for key, record in build.file.records(SPLIT_KEYS).items() if not key.startswith(PROVENANCE)]
    records.append(encode_key(HEAL_KEY, json.dumps(dict(report))))
    moving: dict[str, list[Movable]] = {}
    for movable in movables.values():
        moving.setdefault(movable.tensor, []).append(movable)
    infos = sorted((build.tensors[name] for name in moving), key=_place)  # of a tensor, or of one expert of it
    tensors = [
        NewTensor(tensor.name, tensor.type, tensor.ne, partial(_chunks, tensor, infos, moving))
        for tensor in build.file.tensors.values()
    ]
    write_gguf(out, records, tensors, build.file.alignment)


def _place(info: TensorInfo | GgufTensor) -> tuple[str, int]:
    return str(info.path), info.offset


def _chunks(
    tensor: GgufTensor, infos: Sequence[TensorInfo], moving: Mapping[str, Sequence[Movable]]
) -> Iterator[bytes]:
    """The bytes of a tensor in the file, with what moved in it. infos: of all that moves, as it lies in the files."""
    path, end = str(tensor.path), tensor.offset + tensor.size_bytes
    inside = infos[bisect_left(infos, _place(tensor), key=_place) : bisect_left(infos, (path, end), key=_place)]
    at = tensor.offset
    for info in inside:
        yield from _copied(tensor.path, at, info.offset)
        stored = read_tensor(info)
        for movable in moving[info.name]:
            stored = movable.in_file(info, stored)
        yield _bytes_of(stored)
        at = info.offset + info.size_bytes
    yield from _copied(tensor.path, at, end)


def _copied(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        for at in range(start, end, COPY_BYTES):
            yield file.read(min(COPY_BYTES, end - at))
