"""A worker process that answers requests: one line of JSON each way, raw bytes behind an answer where it says so."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from eval.engines.builds import EngineError

_COMPLAINT = re.compile(
    r"error|fail|invalid|unknown|missing|assert|unsupported|mismatch|not found|wrong", re.IGNORECASE
)


class Worker:
    """One process; `with Worker(label, command, environment) as worker: worker.ask(do="open", ...)`.

    label: the engine, as messages name it. What the process prints is kept, and quoted where it fails.
    """

    def __init__(self, label: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.label = label
        self._command, self._environment = list(command), dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(OSError):  # a process that never read what it was sent
                        stream.close()
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """One request and its answer. Raises EngineError with the engine's own words where it refuses or dies."""
        self.send(**request)
        return self.receive()

    def send(self, **request: Any) -> None:
        assert self._process is not None, "use the engine inside its with block"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error

    def receive(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            words = self._words()
            raise EngineError(f"{self.label}: {answer['error']}" + (f"; it said: {words}" if words else ""))
        return answer

    def read(self, size: int) -> bytes:
        """The raw bytes behind an answer."""
        assert self._process is not None
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise self._died()
        return data

    def _died(self) -> EngineError:
        assert self._process is not None
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        words = self._words()
        said = f"; it said: {words}" if words else ""
        return EngineError(f"{self.label}: the engine's process {how}{said}")

    def _words(self, lines: int = 2) -> str:
        """The engine's last complaints, else its last line."""
        assert self._log is not None
        self._log.seek(0)
        every = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        complaints = [line for line in every if _COMPLAINT.search(line)]
        return " / ".join((complaints or every)[-lines:])
