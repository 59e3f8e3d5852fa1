"""Answers to prompts by a server that runs the model: the /completions of an OpenAI-compatible API, by token ids.

Nothing of the distribution is cut off (top-p, top-k and min-p are switched off), so that draws are those of the model
that the server has, as precise as the server holds it. Servers that give the tokens they drew (vLLM: `token_ids`,
llama.cpp: `tokens`) are taken at their word; of others there is only text.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from eval.trace.generate import Sampling
from recompile.errors import ArgumentError, RecompileError
from recompile.io.files import parse_json

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry of a request
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be others later
LISTING_SECONDS = 20.0  # in which a server that is up says what it serves
ANSWER_SECONDS = 900.0  # for a whole response, which comes at its end
LARGEST_LISTING = 16 * 2**20  # bytes
# Bytes of an answer: beside what is asked for, for each token of it (long ones, spelled as \\u0020, and its id), and
# for each of a prompt that comes back as ids and text.
ANSWER_BYTES, TOKEN_BYTES, PROMPT_TOKEN_BYTES = 256 * 2**10, 512, 256
EVERYTHING = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}
WITH_TOKENS = {"return_token_ids": True, "return_tokens": True}  # of vLLM, of llama.cpp; others pass over them


@dataclass(frozen=True)
class Answer:
    """tokens: None where the server gives text alone; ended: whether the model ended it by itself."""

    text: str
    tokens: tuple[int, ...] | None
    ended: bool


@dataclass(frozen=True)
class Server:
    """url: up to the version, "http://host:8000/v1"; model: the name it serves the model under."""

    url: str
    model: str
    wait: Callable[[float], None] = time.sleep
    calls: _Calls = field(default_factory=lambda: _Calls(), compare=False)

    @staticmethod
    def at(url: str, wait: Callable[[float], None] = time.sleep) -> Server:
        """With the first model that it serves. Raises ArgumentError for what is no address, RecompileError for a server
        that is not reached or serves none."""
        if not _is_address(url):
            raise ArgumentError(f"{{url}} {url}: no address of a server; wanted http://HOST:PORT/v1")
        found = Server(url.rstrip("/"), "", wait)
        models = found._asked("GET", "/models", LARGEST_LISTING).get("data")
        first = models[0] if isinstance(models, list) and models else None
        if not isinstance(first, dict) or not isinstance(first.get("id"), str):
            raise RecompileError(f"{{url}} {url}/models names no model; is it an OpenAI-compatible server?")
        return Server(found.url, first["id"], wait)

    def answers(
        self, prompts: Mapping[int, Sequence[int]], hashes: Sequence[str], sampling: Sampling, together: int
    ) -> Iterator[tuple[int, Answer]]:
        """(number, answer) of every prompt as they come, so many requests at a time. Where one fails, or the caller
        stops, those that are under way are broken off."""
        with ThreadPoolExecutor(together) as pool:
            waiting = {
                pool.submit(self.complete, ids, hashes[number], sampling): number for number, ids in prompts.items()
            }
            try:
                for ready in as_completed(waiting):
                    yield waiting[ready], ready.result()
            except BaseException:
                for left in waiting:
                    left.cancel()
                self.calls.break_off()
                raise

    def complete(self, prompt: Sequence[int], prompt_sha256: str, sampling: Sampling) -> Answer:
        """Raises RecompileError for a server that fails again and again, or answers in another form."""
        seed = int(sha256(f"{sampling.seed} {prompt_sha256}".encode()).hexdigest()[:7], 16)
        found = self._asked(
            "POST",
            "/completions",
            ANSWER_BYTES + TOKEN_BYTES * sampling.max_new_tokens + PROMPT_TOKEN_BYTES * len(prompt),
            {
                "model": self.model,
                "prompt": list(prompt),
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "seed": seed,
                **EVERYTHING,
                **WITH_TOKENS,
            },
        )
        choices = found.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
            raise RecompileError(f"{self.url}/completions: its answer has no choices[0].text")
        usage = found.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if isinstance(counted, int) and counted != len(prompt):
            raise RecompileError(
                f"{self.url}/completions: counts {counted} tokens in a prompt of {len(prompt)}; it adds some or has "
                f"another tokenizer: serve the model that is traced"
            )
        return Answer(choice["text"], _tokens(choice, self.url), choice.get("finish_reason") == "stop")

    def _asked(
        self, method: str, path: str, most_bytes: int, content: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        said = ""
        for wait in (0.0, *WAITS):
            if wait:
                self.wait(wait)
            try:
                status, body = self._sent(method, path, most_bytes, content)
            except TimeoutError as error:
                raise RecompileError(
                    f"{self.url}{path}: no whole answer in {self._seconds(path):g} seconds; the same command goes on "
                    f"when the server is there again"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if status in PASSING:
                said = f"status {status}: {_reason(body)}"
                continue
            if status != 200:
                raise RecompileError(f"{self.url}{path}: the server answers {status}: {_reason(body)}")
            found = parse_json(body, f"{self.url}{path}: its answer", error=RecompileError)
            if not isinstance(found, dict):
                raise RecompileError(f"{self.url}{path}: its answer is {type(found).__name__}, wanted an object")
            return found
        raise RecompileError(
            f"{self.url}{path}: no answer in {len(WAITS) + 1} attempts, the last: {said}; the same command goes on "
            f"when the server is there again"
        )

    def _seconds(self, path: str) -> float:
        return LISTING_SECONDS if path == "/models" else ANSWER_SECONDS

    def _sent(self, method: str, path: str, most_bytes: int, content: Mapping[str, Any] | None) -> tuple[int, bytes]:
        """Status and body. Raises TimeoutError where they are not there in time, however slowly bytes come, and
        RecompileError for a body that is larger than any honest one, of which no more is read."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        seconds = self._seconds(path)
        call = _Call(kind(parts.hostname or "", parts.port, timeout=seconds))
        with self.calls.under_way(call, seconds):
            body = None if content is None else json.dumps(content).encode()
            headers = {"Accept": "application/json", **({"Content-Type": "application/json"} if body else {})}
            call.connect()
            call.connection.request(method, f"{parts.path}{path}", body, headers)
            answer = call.connection.getresponse()
            read = answer.read(most_bytes + 1)
        if len(read) > most_bytes:
            raise RecompileError(
                f"{self.url}{path}: its answer has more than {most_bytes} bytes, which no answer to what was asked "
                f"has; is it an OpenAI-compatible server?"
            )
        return answer.status, read


class _Call:
    """A request that is under way; hanging up ends whatever waits for it."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self.connection = connection
        self.is_late = self._is_over = False
        self._line: socket.socket | None = None

    def connect(self) -> None:
        self.connection.connect()
        self._line = self.connection.sock  # which the connection gives away with an answer that has no length
        if self._is_over:
            self.hang_up(self.is_late)

    def hang_up(self, is_late: bool = False) -> None:
        self.is_late, self._is_over = is_late, True
        if self._line is not None:
            with suppress(OSError):  # closed already
                self._line.shutdown(socket.SHUT_RDWR)


class _Calls:
    """The requests that are under way."""

    def __init__(self) -> None:
        self._lock, self._open, self._broken_off = threading.Lock(), set[_Call](), False

    @contextmanager
    def under_way(self, call: _Call, seconds: float) -> Iterator[None]:
        """Raises TimeoutError where the block takes longer, RecompileError once all were broken off."""
        with self._lock:
            if self._broken_off:
                raise RecompileError("broken off")
            self._open.add(call)
        clock = threading.Timer(seconds, call.hang_up, (True,))
        clock.daemon = True
        clock.start()
        try:
            yield
            if call.is_late:  # what came is the beginning of an answer without a length
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            if call.is_late:
                raise TimeoutError from error
            raise
        finally:
            clock.cancel()
            with self._lock:
                self._open.discard(call)
            call.connection.close()

    def break_off(self) -> None:
        with self._lock:
            self._broken_off, calls = True, list(self._open)
        for call in calls:
            call.hang_up()


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        there = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        url.encode("ascii")
        (parts.hostname or "").encode("idna")
    except ValueError:  # a port beyond 65535, half an IPv6 address, letters of no address, two dots in a row
        return False
    return there and not (parts.query or parts.fragment or re.search(r"[\x00-\x20\x7f]", url))


def _tokens(choice: Mapping[str, Any], url: str) -> tuple[int, ...] | None:
    for name in ("token_ids", "tokens"):
        found = choice.get(name)
        if found is None:
            continue
        if not isinstance(found, list) or not all(type(token) is int and token >= 0 for token in found):
            raise RecompileError(f"{url}/completions: {name} of its answer is no list of tokens")
        return tuple(found)
    return None


def _reason(body: bytes) -> str:
    """What a server says of an error, in one line."""
    text = body.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text)
        error = found.get("error", found) if isinstance(found, dict) else found
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, RecursionError):
        pass
    return (text.splitlines() or ["nothing"])[0][:300]
