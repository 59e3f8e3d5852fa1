"""Files as this project reads and writes them: regular ones of a sane size are read; what is written appears whole or
not at all, by one process at a time, and never in place of something of the user's.

    with write_atomically(path) as file: file.write(...)      one file
    with OutputDirectory(path) as folder: ...; folder.finish()   a directory that grows beside PATH
    with locked(path): ...                                    one process at a time; a second is told who is there
    check_outputs({"--json": json_path}, inputs=[model_dir])  before long work
    read_json(path), read_text(path), open_regular(path)      everything that is read
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from recompile.errors import CheckpointError, OutputError, RecompileError

PARTIAL_SUFFIX = ".recompile-partial"  # of what is written and not whole yet: a name that nobody else has
MARKER_NAME = ".recompile-partial"  # says that a directory is ours to delete
MIB = 2**20
# The largest file of a kind that is read whole. Honest ones are far below: the index of 135,459 tensors has 15 MB, a
# tokenizer 40 MB, a recipe of 50,000 lines 5 MB.
LARGEST = {"json": 512 * MIB, "recipe": 32 * MIB, "text": 2048 * MIB, "journal": 8192 * MIB}

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
_MADE_BY = re.compile(
    rb"made_by\W{1,8}(recompile|model_)|recompile-(profile|refine|mix)|recompile_rows|content=.recompile"
    rb"|^name,recipe,budget_bpw,bpw,total_bytes"  # frontier.csv, which has no place for a mark
)
_MARK_BYTES = 64 * 1024  # looked at, at either end of a file

Failure = type[RecompileError]
_last_opened = ""


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_regular(path: Path | str, *, kind: str | None = None, error: Failure = CheckpointError) -> IO[bytes]:
    """Open a file to read. It must be a regular file (or a link to one), of at most LARGEST[kind] bytes.

    Raises `error` for anything else: a directory, a pipe (which would wait for ever), a device (which never ends), a
    name that no file can have.
    """
    global _last_opened
    _last_opened = os.fspath(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as failed:
        raise error(f"{path}: cannot be read: {failed.strerror or failed}") from failed
    except ValueError as failed:  # a NUL or a surrogate in the name
        raise error(f"{path}: cannot be read: no file can have this name ({failed})") from failed
    status = os.fstat(descriptor)
    what = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), None)
    if what is not None:
        os.close(descriptor)
        raise error(f"{path}: cannot be read: it is {what}, wanted a regular file")
    largest = LARGEST[kind] if kind is not None else None
    if largest is not None and status.st_size > largest:
        os.close(descriptor)
        raise error(
            f"{path}: has {status.st_size} bytes, a {kind} file that is read here has at most {largest} "
            f"({largest // MIB} MiB); is it the right file?"
        )
    return os.fdopen(descriptor, "rb")


def last_opened() -> str:
    """The path that was opened last by `open_regular`: what was being read when something unforeseen failed."""
    return _last_opened


def read_bytes(path: Path | str, *, kind: str, error: Failure = CheckpointError) -> bytes:
    """The whole file. Raises `error` as `open_regular` does, and where it cannot be read or held."""
    with open_regular(path, kind=kind, error=error) as file:
        try:
            return file.read(LARGEST[kind] + 1)
        except OSError as failed:
            raise error(f"{path}: cannot be read: {failed.strerror or failed}") from failed
        except MemoryError as failed:
            raise error(f"{path}: is larger than the memory there is") from failed


def read_text(path: Path | str, *, kind: str = "text", error: Failure = CheckpointError, bom: bool = False) -> str:
    """The whole file, which must be UTF-8; bom: with a byte order mark taken off. Raises `error`."""
    raw = read_bytes(path, kind=kind, error=error)
    try:
        return raw.decode("utf-8-sig" if bom else "utf-8")
    except UnicodeDecodeError as failed:
        raise error(f"{path}: not UTF-8 text: {failed.reason} at byte {failed.start}") from failed


def read_json(path: Path | str, *, kind: str = "json", error: Failure = CheckpointError) -> Any:
    """Parse a JSON file. Raises `error` with the file, line and column."""
    return parse_json(read_bytes(path, kind=kind, error=error), str(path), error=error)


def parse_json(raw: bytes | str, where: str, *, error: Failure = CheckpointError, line: int | None = None) -> Any:
    """JSON values. where: the file, for messages; line: of the file, where `raw` is one line of it.

    A repeated key keeps its last value, NaN and Infinity are read, as Python's json does. Raises `error` for what is
    not JSON, not UTF-8, nested too deeply, an integer of more digits than Python reads, half a surrogate pair.
    """
    place = where if line is None else f"{where}:{line}"
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value = json.loads(text)
        if "\\u" in text and _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # raises where half a pair stayed alone
        return value
    except UnicodeDecodeError as failed:
        raise error(f"{place}: not UTF-8 text: {failed.reason} at byte {failed.start}") from failed
    except UnicodeEncodeError as failed:
        raise error(f"{place}: holds half a surrogate pair (\\ud800 to \\udfff alone), which is no text") from failed
    except json.JSONDecodeError as failed:
        at = f"{where}:{failed.lineno}" if line is None else place
        raise error(f"{at}:{failed.colno}: not JSON: {failed.msg}") from failed
    except RecursionError as failed:
        raise error(f"{place}: not readable JSON: lists or objects nested too deeply") from failed
    except MemoryError as failed:
        raise error(f"{place}: is larger than the memory there is") from failed
    except ValueError as failed:  # more digits than Python makes an integer of
        raise error(f"{place}: not readable JSON: a number has too many digits") from failed


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


# ---- writing files ---------------------------------------------------------------------------------------------------


@contextmanager
def write_atomically(path: Path | str, *, error: Failure = OutputError) -> Iterator[IO[bytes]]:
    """A file to write, which gets its name when the block ends well: written beside it, fsynced, renamed.

    Where the block fails, the disk is full or the user stops, nothing of it is left and what stood there before stays.
    A device or pipe (/dev/stdout) is written to, not replaced; the target of a link is replaced, not the link.
    Raises `error` where it cannot be written, also where another process writes the same file.
    """
    final, descriptor = _begin(path, error)
    if descriptor < 0:
        try:
            with final.open("wb") as device:
                yield device
        except OSError as failed:
            if failed.filename in (None, str(final)) and failed.errno != errno.EPIPE:
                raise _cannot_write(path, failed, error) from failed
            raise
        return
    partial, file = partial_path(final), os.fdopen(descriptor, "wb")
    try:
        yield file
        file.flush()
        os.fsync(descriptor)
        os.replace(partial, final)
        sync_directory(final.parent)
    except BaseException as failed:
        partial.unlink(missing_ok=True)
        if isinstance(failed, OSError) and failed.filename in (None, str(partial), str(final)):
            raise _cannot_write(path, failed, error) from failed
        raise
    finally:
        with suppress(OSError):  # what is buffered does not fit; that was said already, and the file is gone
            file.close()


def write_with(path: Path | str, write: Callable[[Path], object], *, error: Failure = OutputError) -> None:
    """As `write_atomically`, for a library that wants a name to write to (safetensors, matplotlib)."""
    final, descriptor = _begin(path, error)
    if descriptor < 0:  # safetensors would put a file in the place of /dev/null
        raise error(f"{path}: cannot be written: it is no regular file, and this needs one; choose another")
    partial = partial_path(final)
    scratch = final.with_name(f"{final.stem}{PARTIAL_SUFFIX}{final.suffix}")  # one that a killed run left is replaced
    try:
        write(scratch)
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, final)
        sync_directory(final.parent)
    except Exception as failed:
        if isinstance(failed, OSError) or type(failed).__name__ == "SafetensorError":
            raise _cannot_write(path, failed, error) from failed
        raise
    finally:
        scratch.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        os.close(descriptor)


_inputs: dict[str, str] = {}  # real paths of the checkpoints that this process reads, as they were called
_UNFINISHED = (PARTIAL_SUFFIX, ".building", ".healing", ".work")  # what a run reads and writes itself


def note_input(path: Path | str) -> None:
    """From now on no file of a checkpoint that is read is replaced by one that is written, whatever named it."""
    if not os.fspath(path).endswith(_UNFINISHED):
        _inputs[os.path.realpath(path)] = os.fspath(path)


def _refuse_input(path: Path | str, final: Path) -> None:
    if not _inputs or not final.is_file():
        return
    shown = _inputs.get(str(final))
    if shown is None and str(final.parent) in _inputs and not was_made_here(final):
        shown = _inputs[str(final.parent)]
    if shown is not None:
        raise OutputError(f"{path}: is a file of the input {shown}, which is never written over; choose another")


def _begin(path: Path | str, error: Failure) -> tuple[Path, int]:
    """The file that `path` stands for, and the open unfinished one beside it, held alone; -1 where it is a device."""
    try:
        final = Path(os.path.realpath(path))
        _refuse_input(path, final)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.is_dir():
            raise error(f"{path}: cannot be written: is a directory; choose another file")
        if final.exists() and not final.is_file():
            return final, -1
        return final, open_locked(partial_path(final), Path(path), error)
    except (OSError, ValueError) as failed:
        raise _cannot_write(path, failed, error) from failed


def _cannot_write(path: Path | str, failed: Exception, error: Failure) -> RecompileError:
    full = isinstance(failed, OSError) and failed.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "free some space, or choose another disk" if full else "choose another file"
    said = (failed.strerror if isinstance(failed, OSError) else None) or failed
    return error(f"{path}: cannot be written: {said}; {way_out}")


def write_text(path: Path | str, text: str, *, error: Failure = OutputError) -> None:
    """Replace a file by a text, whole or not at all. Raises `error`."""
    with write_atomically(path, error=error) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path | str, value: Any, *, indent: int | None = 2, error: Failure = OutputError) -> None:
    """Replace a file by a JSON value, whole or not at all. Raises `error`."""
    write_text(path, json.dumps(value, indent=indent) + "\n", error=error)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- locks -----------------------------------------------------------------------------------------------------------


def lock(descriptor: int, what: Path | str, *, error: Failure = OutputError) -> None:
    """Hold a file or directory alone until its descriptor is closed. Raises `error` saying who holds it."""
    for holder in (lambda: _holder(descriptor), lambda: _holder(descriptor) or "another process"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as failed:
            if (found := holder()) is not None:  # else it let go between the two questions, or cannot be seen
                raise error(f"{what}: {found} is writing it; wait for it to end, or choose another output") from failed
        except OSError as failed:
            if failed.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):  # a file system without locks
                raise
            return


@contextmanager
def locked(path: Path | str, what: Path | str | None = None, *, error: Failure = OutputError) -> Iterator[None]:
    """Hold a file or directory that exists alone for the length of the block.

    Raises `error` saying who holds it, or that the one who held it has just given it its final name.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as failed:
        raise _cannot_write(what or path, failed, error) from failed
    try:
        lock(descriptor, what or path, error=error)
        if not is_still(path, descriptor):
            raise error(finished_meanwhile(what or path))
        yield
    finally:
        os.close(descriptor)


def finished_meanwhile(path: Path | str) -> str:
    """What is said where an output was not there when the work was planned, and is once it is held."""
    return f"{path}: exists by now: another process has just finished it; choose another output"


def open_locked(path: Path, what: Path, error: Failure = OutputError) -> int:
    """Create or take up a file and hold it alone, emptied. Raises OSError, and `error` where another holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise error(f"{path}: stands where {what.name} would be written first, and is no file; remove it")
            lock(descriptor, what, error=error)
            if is_still(path, descriptor):  # and was not renamed by its owner between the two calls
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_still(path: Path | str, descriptor: int) -> bool:
    """Whether the open file or directory stands under that name: not removed, renamed or replaced meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str | None:
    """Who holds the lock on an open file, in words; None where that is not known. Linux says so in /proc/locks."""
    status = os.fstat(descriptor)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
                return _process(int(fields[4]))
    except (OSError, ValueError):
        pass
    return None


def _process(pid: int) -> str:
    """`process 123 (model_profile -mb base, since 12:30:05)`."""
    folder = Path("/proc") / str(pid)
    try:
        command = " ".join(
            part.decode(errors="replace") for part in (folder / "cmdline").read_bytes().split(b"\0") if part
        )
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(folder.stat().st_mtime))
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({command[:120] + '...' if len(command) > 120 else command}, since {since})"


# ---- directories -----------------------------------------------------------------------------------------------------


def check_is_not_here(out: Path) -> None:
    """Raise OutputError for the directory that the process runs in, or one around it: an output takes its place, and
    whoever stands in it is left in a directory that is gone."""
    here, out = Path.cwd(), Path(os.path.realpath(out.expanduser()))
    if out == here or out in here.parents:
        raise OutputError(f"{out}: is, or holds, the directory that this runs in; give a name inside it")


class OutputDirectory:
    """A directory that grows in `partial_path(OUT)`, with a marker file of ours, and is renamed to OUT when whole.

    As a `with` block: where it is left without `finish()`, nothing of it stays. Ours alone meanwhile (a lock on the
    marker); one that a killed run left is replaced.
    """

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.realpath(out.expanduser()))
        check_is_not_here(self.out)
        self.path = partial_path(self.out)
        self._marker = -1

    def create(self) -> None:
        """Make it, in place of one that a killed run left.

        Raises OutputError where another run is at work, or has just finished.
        """
        marker = self.path / MARKER_NAME
        while True:
            descriptor = self._hold(marker)
            try:
                lock(descriptor, self.path)
                if is_still(marker, descriptor):  # and was not removed or renamed by its owner between the two calls
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        self._marker = descriptor
        if self.out.is_dir() and any(self.out.iterdir()):
            self.discard()
            raise OutputError(finished_meanwhile(self.out))
        empty(self.path, MARKER_NAME)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"An unfinished output of recompile. The next run with this output replaces it.\n")

    def _hold(self, marker: Path) -> int:
        """The open marker in the directory, both made where they are missing."""
        for left in range(_TRIES, -1, -1):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                check_partial(self.path)
                self.path.mkdir(exist_ok=True)
                return os.open(marker, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except (FileNotFoundError, FileExistsError):  # its owner removed or renamed it between two of the calls
                if not left:
                    raise
        raise AssertionError("the last try returns or raises")

    def finish(self) -> None:
        """Rename it to the output. The marker goes last: a directory without it is never taken for ours to delete."""
        sync_directory(self.path)
        os.rename(self.path, self.out)
        sync_directory(self.out.parent)
        settle(self.out)
        self._close()

    def discard(self) -> None:
        """Remove it, if it was made by this run and is not finished."""
        if self._marker >= 0:
            insist(self._remove)
            self._close()

    def _remove(self) -> None:
        """The marker, by which it is held, goes last: what another run then puts there is not ours to remove."""
        with suppress(OSError):
            if is_still(self.path / MARKER_NAME, self._marker):
                remove_partial(self.path, MARKER_NAME)

    def _close(self) -> None:
        if self._marker >= 0:
            os.close(self._marker)
            self._marker = -1

    def __enter__(self) -> Path:
        self.create()
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def settle(out: Path) -> None:
    """Take the marker out of a finished output: the last step, also where a run was killed before it."""
    (out / MARKER_NAME).unlink(missing_ok=True)
    sync_directory(out)


_TRIES = 1000


def partial_path(out: Path) -> Path:
    """Where an output grows. Raises OutputError for the root of a file system, which has no name."""
    return beside(out, PARTIAL_SUFFIX)


def beside(out: Path, suffix: str) -> Path:
    """The path of an output with a suffix. Raises OutputError for "/", "." and "", which have no name."""
    if not out.name:
        raise OutputError(f"{out}: cannot be written: this is no name of an output; choose another")
    return out.with_name(out.name + suffix)


def check_partial(partial: Path, mark: str = MARKER_NAME) -> int:
    """Bytes in an unfinished directory of ours, which is replaced or taken up. mark: the file of ours in it, which is
    made first and removed last. Raises OutputError where there is something, and not that file: it is another's. So is
    an empty one, unless its name says that it is ours, or the note of `unmarked`."""
    is_noted = _is_noted(partial)
    try:
        names = None if partial.is_symlink() else os.listdir(partial)
    except FileNotFoundError:
        return 0
    except NotADirectoryError:
        if not os.path.lexists(partial):  # something above it is a file, which the caller says
            return 0
        names = None
    is_ours = names is not None and (mark in names or all(PARTIAL_SUFFIX in name for name in names))
    if not is_ours or not (names or is_noted or _is_noted(partial)):
        raise OutputError(
            f"{partial}: exists and is not an unfinished output of recompile (no {mark} in it); "
            f"move it away or choose another output"
        )
    return sum(_size_of(partial / name) for name in names or ())


@contextmanager
def unmarked(folder: Path) -> Iterator[None]:
    """For the block in which a folder of ours has no mark, since it is made or removed: a note beside it says whose it
    is, so that an empty one is known for ours where the block is killed, and for the user's otherwise. Where the block
    fails, an empty folder is removed. Raises OutputError where nothing can be made there."""
    if folder.name.endswith(PARTIAL_SUFFIX):  # the name says it
        yield
        return
    note, is_mine = partial_path(folder), True
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:  # of another run, killed or under way
        is_mine = False
    except OSError as failed:
        raise _cannot_write(folder, failed, OutputError) from failed
    try:
        yield
    except BaseException:
        if is_mine:
            with suppress(OSError):  # something is in it
                folder.rmdir()
            note.unlink(missing_ok=True)
        raise
    note.unlink(missing_ok=True)


def is_begun(folder: Path) -> bool:
    """Whether a folder without a mark is ours: empty, but for what a killed write left, and noted by `unmarked`."""
    try:
        names = None if folder.is_symlink() else os.listdir(folder)
    except OSError:
        return False
    return names is not None and all(PARTIAL_SUFFIX in name for name in names) and bool(names or _is_noted(folder))


def _is_noted(folder: Path) -> bool:
    return folder.name.endswith(PARTIAL_SUFFIX) or partial_path(folder).is_file()


def is_marked(folder: Path, mark: str) -> bool:
    """Whether a folder has its mark; a note that a run left which was killed between the two is removed."""
    found = (folder / mark).exists()
    if found and not folder.name.endswith(PARTIAL_SUFFIX) and _is_noted(folder):
        partial_path(folder).unlink(missing_ok=True)
    return found


def remove_empty(folder: Path) -> None:
    """Remove an empty folder of ours that a run left which was killed while it removed it; one of the user's stays."""
    if not folder.name.endswith(PARTIAL_SUFFIX) and _is_noted(folder):
        with suppress(OSError):  # something is in it, or it is gone
            folder.rmdir()
        partial_path(folder).unlink(missing_ok=True)


def empty(folder: Path, mark: str) -> None:
    """Remove all that is in a directory of ours but its mark."""
    for path in folder.iterdir():
        if path.name == mark:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_partial(folder: Path, mark: str) -> None:
    """Remove an unfinished directory, its mark last: killed meanwhile, it is still known for ours."""
    empty(folder, mark)
    with unmarked(folder):
        (folder / mark).unlink(missing_ok=True)
        folder.rmdir()


def _size_of(path: Path) -> int:
    """Bytes of a regular file; 0 for anything else, also for one that its owner has just removed."""
    try:
        status = os.lstat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def copy_whole(source: Path, out: Path) -> None:
    """Copy a file or a directory, whole or not at all. Raises OutputError as the writers of either do."""
    if source.is_file():
        with write_atomically(out) as file, open_regular(source) as old:
            shutil.copyfileobj(old, file, 1 << 24)
        return
    directory = OutputDirectory(out)
    with directory as place:
        shutil.copytree(source, place, dirs_exist_ok=True)
        directory.finish()


def insist(clean_up: Callable[[], None]) -> None:
    """Clean up to the end, also where Ctrl-C is pressed again meanwhile (or a shell sends it twice)."""
    interrupted: KeyboardInterrupt | None = None
    while True:
        try:
            clean_up()
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


# ---- what may be written over ----------------------------------------------------------------------------------------


def check_outputs(
    outputs: Mapping[str, Path | str | None], inputs: Iterable[Path | str | None], *, force: bool = False
) -> None:
    """Raise OutputError, before long work, unless every output may be written.

    outputs: argument -> file to write; None, "-" (stdout) and devices are always fine
    inputs: files and directories that the same call reads; not one of them, nor a file that stands in such a directory,
        is ever written over
    force: also files are replaced that this tool did not make
    """
    read = {os.path.realpath(path): path for path in inputs if path is not None and os.fspath(path)}
    taken: dict[str, str] = {}
    for argument, path in outputs.items():
        if path is None or os.fspath(path) == "-":
            continue
        if not os.fspath(path) or "\0" in os.fspath(path):
            raise OutputError(f'{argument} "{path}": is no name of a file; choose another')
        real = os.path.realpath(path)
        if real in taken:
            raise OutputError(f"{argument} {path}: is what {taken[real]} writes as well; choose another file")
        taken[real] = argument
        if os.path.isdir(real):
            raise OutputError(f"{argument} {path}: cannot be written: is a directory; choose another file")
        check_not_input(f"{argument} {path}", real, read)
        check_place(f"{argument} {path}", Path(real))
        inside = next((other for other in taken if real.startswith(other + "/") or other.startswith(real + "/")), None)
        if inside is not None:
            raise OutputError(
                f"{argument} {path}: one of it and {inside}, which {taken[inside]} writes, would be a file and a "
                f"directory at once; choose another file"
            )
        folder = next((name for name in read if os.path.isdir(name) and real.startswith(name.rstrip("/") + "/")), None)
        if not os.path.isfile(real):
            continue
        if folder is not None and not was_made_here(real):
            raise OutputError(
                f"{argument} {path}: is a file of the input {read[folder]}, which is never written over; choose another"
            )
        if not force and not was_made_here(real):
            raise OutputError(
                f"{argument} {path}: exists, and this tool did not make it; choose another file, or give {{force}} to "
                f"replace it"
            )


# Where recipes, profiles and reports name models. What it does not find, the writer of every file still refuses.
_NAMES_A_MODEL = re.compile(
    rb"""\b(?:model_dir|reference|candidate|base|build)["']?\s*:\s*(?:"([^"\n]*)"|'([^'\n]*)'|([^"',}\n#]+))"""
)
_HEAD_BYTES = 1 << 20


def models_named_in(path: Path) -> Iterator[str]:
    """The models that exist of those named in the head of a file, from the working directory or beside it."""
    if path.suffix not in (".yaml", ".yml", ".json", ".jsonl") or not path.is_file():
        return
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return  # told when it is read
    for found in _NAMES_A_MODEL.finditer(head):
        name = os.fsdecode(next(group for group in found.groups() if group is not None).strip())
        if name and "\0" not in name:
            yield from (place for place in (name, str(path.parent / name)) if os.path.exists(place))


def check_not_input(said: str, real: str, inputs: Mapping[str, Path | str]) -> None:
    """Raise OutputError where an output is an input. said: how the message begins; inputs: real path -> as given"""
    found = next((name for name in inputs if _is_same(real, name)), None)
    if found is not None:
        raise OutputError(f"{said}: is an input ({inputs[found]}), which is never written over; choose another")


def check_is_no_input(out: Path, inputs: Iterable[Path | str]) -> None:
    """Raise OutputError for the name of an output directory that is an input, or a file of one."""
    real, read = os.path.realpath(out), {os.path.realpath(given): given for given in inputs}
    check_not_input(f"{{out}} {out}", real, read)
    folder = next((name for name in read if os.path.isfile(real) and real.startswith(name.rstrip("/") + "/")), None)
    if folder is not None:
        raise OutputError(
            f"{{out}} {out}: is a file of the input {read[folder]}, which is never written over; choose another"
        )


def check_place(said: str, real: Path) -> None:
    """Raise OutputError where no file can be made or replaced at `real`. A device is written to as it is."""
    if os.path.exists(real) and not real.is_file():
        return
    try:
        os.lstat(partial_path(real))
    except FileNotFoundError:
        pass
    except OSError as failed:  # a file where a directory is wanted, a name too long, no permission to look
        raise OutputError(f"{said}: cannot be written: {failed.strerror}; choose another file") from failed
    folder = next(parent for parent in real.parents if parent.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"{said}: cannot be written: no permission to write in {folder}; choose another file")


def _is_same(one: str, other: str) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False


def was_made_here(path: Path | str) -> bool:
    """Whether a file says that this tool made it (or is empty): such a file may be replaced without asking."""
    try:
        with open(path, "rb") as file:
            head = file.read(_MARK_BYTES)
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _MARK_BYTES))
            return size == 0 or _MADE_BY.search(head) is not None or _MADE_BY.search(file.read(_MARK_BYTES)) is not None
    except OSError:
        return False
