"""Checksums in what a run goes on from: a byte that a disk, an editor or another run changed is told and not built on.

Lines of a journal are chained, so that one that is missing, doubled or out of place is told too. What has no checksum,
of an earlier version or made by hand, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.errors import CheckpointError
from recompile.io.files import Failure, read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

KEY = "crc32"
RUN = "recompile_run"  # metadata of a part of a run
_AT_END = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')


def run_of(settings: Any) -> str:
    """The name of a run with such settings, for its parts."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


# ---- lines -----------------------------------------------------------------------------------------------------------


def with_checksum(line: bytes, before: int) -> tuple[bytes, int]:
    """A JSON object on one line with the checksum of it and of all lines before it, which is returned too.

    before: of the line before; 0 for the first."""
    assert line[-1:] == b"}" != line[1:], "an object that holds something"
    found = zlib.crc32(line, before)
    return line[:-1] + b', "%s": "%08x"}' % (KEY.encode(), found), found


def is_whole(line: bytes) -> bool:
    """Whether a first line is there to its end."""
    end = _AT_END.search(line)
    return end is not None and zlib.crc32(line[: end.start()] + b"}") == int(end[1], 16)


def without_checksums(path: Path | str, lines: Sequence[bytes], error: Failure) -> tuple[list[bytes], int | None]:
    """The lines as they were before `with_checksum`, and the last checksum; None where the first line has none, as in a
    file of an earlier version or made by hand. Raises `error` with the number of the line that was changed."""
    if not lines:
        return [], 0
    checked = _AT_END.search(lines[0]) is not None
    found, last = list[bytes](), 0
    for number, line in enumerate(lines, start=1):
        end = _AT_END.search(line)
        plain = line if end is None else line[: end.start()] + b"}"
        if checked:
            last = zlib.crc32(plain, last)
            if end is None or int(end[1], 16) != last:
                raise error(
                    f"{path}:{number}: this line or its place was changed after it was written (its checksum does not "
                    f"fit); remove the file to start again, or put a copy of it back. Where you changed it yourself, "
                    f'take "{KEY}" out of its first line'
                )
        found.append(plain)
    return found, last if checked else None


# ---- JSON ------------------------------------------------------------------------------------------------------------


def write_checked_json(path: Path, value: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """As `write_json`, an object with its checksum. Raises OutputError."""
    kept = json.loads(json.dumps(value))  # as it is read: keys are texts
    write_json(path, {**kept, KEY: _checksum_of(kept)}, indent=indent)


def read_checked_json(path: Path, *, error: Failure = CheckpointError, way_out: str) -> Any:
    """As `read_json`, without the checksum. Raises `error`, with `way_out` at its end."""
    try:
        found = read_json(path, error=error)
    except error as failed:
        raise error(f"{failed}; {way_out}") from failed
    if isinstance(found, dict) and KEY in found and found.pop(KEY) != _checksum_of(found):
        raise error(f"{path}: was changed after it was written (its checksum does not fit); {way_out}")
    return found


def _checksum_of(value: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


# ---- tensors ---------------------------------------------------------------------------------------------------------


def checksum_of_tensors(names: Iterable[str], read: Callable[[str], Tensor], metadata: Mapping[str, str]) -> str:
    """Of names, dtypes, shapes and bytes of tensors, and of what else is said of them.

    read: one tensor of any shape, on the CPU
    """
    import torch

    found = zlib.crc32(json.dumps(sorted((k, v) for k, v in metadata.items() if k != KEY)).encode())
    for name in sorted(names):
        value = read(name)
        found = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), found)
        if value.numel():
            found = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
