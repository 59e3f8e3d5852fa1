"""Answers to prompts by a server that runs the model: the /completions of an OpenAI-compatible API, by token ids.

Nothing of the distribution is cut off (top-p, top-k and min-p are switched off), so that draws are those of the model
that the server has, as precise as the server holds it. Servers that give the tokens they drew (vLLM: `token_ids`,
llama.cpp: `tokens`) are taken at their word; of others there is only text.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from eval.trace.generate import Sampling
from recompile.errors import ArgumentError, RecompileError

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each retry of a request
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be others later
TIMEOUT = 900.0  # seconds without a byte: a long response comes as a whole
LARGEST_ANSWER = 64 * 2**20
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

    @staticmethod
    def at(url: str, wait: Callable[[float], None] = time.sleep) -> Server:
        """With the first model that it serves. Raises ArgumentError for what is no address, RecompileError for a server
        that is not reached or serves none."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ArgumentError(f"{{url}} {url}: no address of a server; wanted http://HOST:PORT/v1")
        found = Server(url.rstrip("/"), "", wait)
        listed = found._asked("GET", "/models")
        models = listed.get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise RecompileError(f"{{url}} {url}/models names no model; is it an OpenAI-compatible server?")
        return Server(found.url, str(models[0]["id"]), wait)

    def answers(
        self, prompts: Mapping[int, Sequence[int]], hashes: Sequence[str], sampling: Sampling, together: int
    ) -> Iterator[tuple[int, Answer]]:
        """(number, answer) of every prompt as they come, so many requests at a time."""
        with ThreadPoolExecutor(together) as pool:
            waiting = {
                pool.submit(self.complete, ids, hashes[number], sampling): number for number, ids in prompts.items()
            }
            try:
                for ready in as_completed(waiting):
                    yield waiting[ready], ready.result()
            finally:
                for left in waiting:
                    left.cancel()

    def complete(self, prompt: Sequence[int], prompt_sha256: str, sampling: Sampling) -> Answer:
        """Raises RecompileError for a server that fails again and again, or answers in another form."""
        seed = int(sha256(f"{sampling.seed} {prompt_sha256}".encode()).hexdigest()[:7], 16)
        found = self._asked(
            "POST",
            "/completions",
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
        choice = (found.get("choices") or [None])[0]
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

    def _asked(self, method: str, path: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        said = ""
        for wait in (0.0, *WAITS):
            if wait:
                self.wait(wait)
            try:
                status, body = self._sent(method, path, content)
            except (OSError, http.client.HTTPException) as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if status in PASSING:
                said = f"status {status}: {_reason(body)}"
                continue
            if status != 200:
                raise RecompileError(f"{self.url}{path}: the server answers {status}: {_reason(body)}")
            try:
                found = json.loads(body)
            except (ValueError, RecursionError) as error:
                raise RecompileError(f"{self.url}{path}: its answer is not JSON: {error}") from error
            if not isinstance(found, dict):
                raise RecompileError(f"{self.url}{path}: its answer is {type(found).__name__}, wanted an object")
            return found
        raise RecompileError(
            f"{self.url}{path}: no answer in {len(WAITS) + 1} attempts, the last: {said}; the same command goes on "
            f"when the server is there again"
        )

    def _sent(self, method: str, path: str, content: Mapping[str, Any] | None) -> tuple[int, bytes]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT)
        try:
            body = None if content is None else json.dumps(content).encode()
            headers = {"Accept": "application/json", **({"Content-Type": "application/json"} if body else {})}
            connection.request(method, f"{parts.path}{path}", body, headers)
            answer = connection.getresponse()
            read = answer.read(LARGEST_ANSWER + 1)
            if len(read) > LARGEST_ANSWER:
                raise RecompileError(f"{self.url}{path}: answers more than {LARGEST_ANSWER} bytes")
            return answer.status, read
        finally:
            connection.close()


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
