"""Work on files that may loop or grow without end, in a child process with limits: tokenizers and chat templates.

A tokenizer's regular expressions and normalizers, and the loops of a chat template, are programs of the checkpoint that
run in libraries which bound neither time nor memory. The child is a fork: it starts in milliseconds, has what this
process has read already, and its result is what the work returns here.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from recompile.errors import CheckpointError, RecompileError
from recompile.io.memory import format_mib

T = TypeVar("T")
CPU_SECONDS = 20.0  # for tiny files; the largest tokenizers load in 5
CPU_SECONDS_PER_MB = 5.0  # of what is read
WALL_FACTOR = 12  # of the CPU limit: a busy machine gives a process a small share, one that sleeps for ever ends too
MEMORY_BYTES = 768 * 2**20  # beyond what this process holds
MOST_SAID = 2**16  # bytes of what libraries print that are shown
WAYS_OUT = "take the files of the original model, give less text, or token rows ({input_ids}) where they are taken"
MEMORY_PER_BYTE = 64  # of what is read: text and tokens as Python's objects


@dataclass(frozen=True)
class Limits:
    """cpu_seconds: without a step forward (`stepped`); memory_bytes: that the work may add."""

    cpu_seconds: float
    memory_bytes: int

    @classmethod
    def of(cls, content_bytes: int, text_bytes: int = 0) -> Limits:
        """For work that reads files of so many bytes, and then text of so many in steps."""
        return cls(
            CPU_SECONDS + CPU_SECONDS_PER_MB * content_bytes / 1e6,
            MEMORY_BYTES + MEMORY_PER_BYTE * (content_bytes + text_bytes),
        )


_limits: Limits | None = None  # of this process, where it is such a child


def stepped() -> None:
    """Called by the work at every step that bounds itself: its time limit starts anew. No effect elsewhere."""
    if _limits is not None:
        signal.setitimer(signal.ITIMER_PROF, _limits.cpu_seconds)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * _limits.cpu_seconds)


def run_guarded(work: Callable[[], T], what: Path | str, limits: Limits) -> T:
    """What `work` returns (something that pickles), computed in a child process with these limits.

    what: the file or directory and what is done, for messages: "m/tokenizer.json: the tokenizer". Errors of the work
    are raised here. Raises CheckpointError where a limit is passed or the child dies. Where a system cannot fork, or
    inside such a child, the work runs in this process.
    """
    if _limits is not None or not hasattr(os, "fork"):
        return work()
    reader, writer = os.pipe()
    said = _scratch()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()  # or what waits in it would be written twice
    child = os.fork()
    if child == 0:
        if said is not None:
            os.dup2(said.fileno(), 2)
        _work_in_child(work, writer, limits)  # never returns
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as pipe:
            raw = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if said is not None:
        with said:
            said.seek(0)
            if code == 0 and sys.stderr is not None and (text := said.read(MOST_SAID)):
                sys.stderr.write(text.decode("utf-8", "replace"))
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        raise CheckpointError(
            f"{what} does not end: {limits.cpu_seconds:.3g} seconds of computing without a step forward; {WAYS_OUT}"
        )
    if code != 0:
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise CheckpointError(
            f"{what} ended with {cause}, in a process that may take {format_mib(limits.memory_bytes)}; {WAYS_OUT}"
        )
    done, value = pickle.loads(raw)
    if done:
        result: T = value
        return result
    if isinstance(value, MemoryError):
        raise CheckpointError(f"{what} takes more than {format_mib(limits.memory_bytes)} of memory; {WAYS_OUT}")
    raise value


def _scratch() -> IO[bytes] | None:
    """A file in memory for what libraries print in the child: it is shown at the end, and not where they crashed, whose
    message is one line. None where a system has no such files."""
    try:
        return os.fdopen(os.memfd_create("printed"), "w+b")
    except (OSError, AttributeError):
        return None


def _work_in_child(work: Callable[[], Any], writer: int, limits: Limits) -> None:
    global _limits
    code = 1
    try:
        faulthandler.disable()  # this end of it is one message
        for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # which ends a process whatever it is at
        _limits = limits
        _limit_memory(limits.memory_bytes)
        if "torch" in sys.modules:  # threads of this library do not live on in a fork
            sys.modules["torch"].set_num_threads(1)
        stepped()
        try:
            answer: tuple[bool, Any] = True, work()
        except Exception as error:
            answer = False, error
        try:
            raw = pickle.dumps(answer)
        except Exception:  # an error of a library that does not pickle
            raw = pickle.dumps((False, RecompileError(f"{type(answer[1]).__name__}: {answer[1]}")))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(raw)
        code = 0
    finally:
        os._exit(code)


def _limit_memory(extra_bytes: int) -> None:
    """Private memory of this process may grow by so much. Only where /proc says what it is now."""
    import resource

    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return
    now = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)
    if now is not None:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = now + extra_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))
