"""A journal: JSON lines behind a header line, each on disk before its work counts as done, held by one process.

What follows the last newline was cut off by a crash: it is dropped, and the log says so (`recompile` logger, which the
commands show). A disk that fills while a line is written leaves the lines before it whole. Every line ends with a
checksum of it and of those before it (`recompile.io.checksums`), which is not seen here.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from recompile.errors import JournalError
from recompile.io.checksums import is_whole, with_checksum, without_checksums
from recompile.io.files import LARGEST, Failure, is_still, lock, parse_json, sync_directory

log = logging.getLogger("recompile")


class LineJournal:
    """An open journal. `lines` is what it held when it was opened, the header first: whole lines, without newlines and
    checksums.

        with LineJournal(path) as journal:
            if not journal.lines: journal.begin({"kind": ...})
            journal.append({"done": 1})

    A second process (or object) on the same path is refused and told who holds it. Where the block fails and nothing
    was added to a header that was begun in it, the file is removed: nothing was done. Raises `error` where the file
    cannot be read, written or held, and where a whole line of it was changed.
    """

    def __init__(self, path: Path | str, *, error: Failure = JournalError) -> None:
        self.path, self._error = Path(path), error
        file: IO[bytes] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            existed = self.path.exists()
            if existed and not self.path.is_file():
                raise error(f"{path}: is not a regular file; choose another")
            while True:
                file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b", buffering=0)
                lock(file.fileno(), path, error=error)
                if is_still(self.path, file.fileno()):  # and was not removed by its owner between the two calls
                    break
                file.close()
            if os.fstat(file.fileno()).st_size > LARGEST["journal"]:
                raise error(f"{path}: has more than {LARGEST['journal']} bytes; is it the right file?")
            raw = file.readall()
        except (OSError, ValueError) as failed:
            _close(file)
            raise error(f"{path}: cannot be written: {getattr(failed, 'strerror', None) or failed}") from failed
        except BaseException:
            _close(file)
            raise
        self._file, self._is_just_begun = file, False
        self._lines = raw.split(b"\n")
        self.torn_bytes = len(self._lines.pop())
        if self.torn_bytes and not self._lines and not _is_torn_header(raw):
            _close(file)
            raise error(f"{path}: exists and is no journal of this tool; move it away, or choose another output")
        self._whole = len(raw) - self.torn_bytes
        try:
            self._lines, self._checksum = without_checksums(path, self._lines, error)
        except BaseException:
            _close(file)
            raise
        if self.torn_bytes:
            kept = f"its {len(self._lines)} whole lines" if self._lines else "nothing"
            log.warning("%s: the last line was cut off by a crash and is dropped; %s stay", path, kept)

    @property
    def lines(self) -> list[bytes]:
        return self._lines

    def values(self) -> list[Any]:
        """The lines as JSON values. Raises `error` for a damaged one, with its number."""
        try:
            return [
                parse_json(line, str(self.path), error=self._error, line=number)
                for number, line in enumerate(self._lines, start=1)
            ]
        except self._error as failed:
            raise self._error(f"{failed}; remove the file to start again") from failed

    def begin(self, header: Any) -> None:
        """Start anew: the header is the only line."""
        self._whole, self._lines, self.torn_bytes, self._checksum = 0, [], 0, 0
        self.append(header)
        self._is_just_begun = True
        with suppress(OSError):  # a file system that cannot
            sync_directory(self.path.parent)

    def drop_torn(self) -> None:
        """Have what was cut off gone from the file, once its header is known to be the wanted one: also a run with
        nothing left to add leaves whole lines."""
        if self.torn_bytes:
            self.append_lines(())

    def append(self, *values: Any) -> None:
        """Add lines; on disk when this returns. Raises `error` where the disk refuses; then no part of them stays."""
        self.append_lines(json.dumps(value).encode() for value in values)

    def append_lines(self, lines: Iterable[bytes]) -> None:
        """As `append`, for lines that are JSON already, of objects."""
        parts, checksum = list[bytes](), self._checksum
        for line in lines:
            if checksum is not None:
                line, checksum = with_checksum(line, checksum)
            parts.append(line + b"\n")
        data = b"".join(parts)
        descriptor = self._file.fileno()
        try:
            os.ftruncate(descriptor, self._whole)
            view, at = memoryview(data), self._whole
            while len(view):
                count = os.pwrite(descriptor, view, at)
                view, at = view[count:], at + count
            os.fsync(descriptor)
        except OSError as failed:
            with suppress(OSError):  # or the torn line is dropped when it is opened again
                os.ftruncate(descriptor, self._whole)
            raise self._error(
                f"{self.path}: cannot be written: {failed.strerror or failed}; what is in it stays valid, make room "
                f"and run the same command to go on"
            ) from failed
        self._whole, self._checksum = self._whole + len(data), checksum
        self._is_just_begun = False

    def keep(self) -> None:
        """What was done lies in other files, to which the header belongs: a run that fails leaves it."""
        self._is_just_begun = False

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LineJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._is_just_begun:
            with suppress(OSError):
                self.path.unlink()
        self.close()


def _is_torn_header(raw: bytes) -> bool:
    """Whether it can be the start of a header that a crash cut off, and nothing whole of another's."""
    with suppress(ValueError):
        json.loads(raw)
        return is_whole(raw)
    return raw.startswith(b"{")


def _close(file: IO[bytes] | None) -> None:
    if file is not None:
        file.close()


def settings_difference(old: Any, new: Any) -> str:
    """Which settings of two runs on a base model differ, in a few words."""
    if not isinstance(old, Mapping):
        return "unreadable journal"
    flat_old, flat_new = _flatten(old), _flatten(new)
    changed = [key for key in {**flat_old, **flat_new} if flat_old.get(key) != flat_new.get(key)]
    if changed == ["base"]:
        return "the base model is another one, or its config.json or tensors were changed since"
    return "; ".join(f"{key} was {flat_old.get(key)!r}, is {flat_new.get(key)!r}" for key in changed[:4])


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {prefix + key: item})
    return flat
