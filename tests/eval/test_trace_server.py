"""model_trace --url against a small server in this process: tokens, text, retries, going on, refusals."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import recompile
from recompile.cli.model_trace import main as model_trace
from recompile.errors import ArgumentError, JournalError, RecompileError
from recompile.events import Note
from recompile.model.trace import read_trace
from tests import traces
from tests.commands import run
from tests.journals import unsealed

TOKENS = 10


class Served:
    """Answers of the greedy trace, by prompt. asked: the requests for them, in any order; form: what of an answer is
    given; before: is called with every request and may return (status, body) instead."""

    def __init__(self, greedy: Path) -> None:
        self.trace = read_trace(greedy)
        self.tokenizer = AutoTokenizer.from_pretrained(traces.model())
        self.asked: list[dict[str, Any]] = []
        self.form = "token_ids"
        self.before: Callable[[int], tuple[int, bytes] | None] = lambda number: None
        self.model = "talking"
        self.responses: dict[tuple[int, ...], list[int]] = {}
        for row, length in enumerate(self.trace.lengths.tolist()):
            ids, start = self.trace.ids[row, :length].tolist(), int(self.trace.response[row].nonzero()[0])
            self.responses[tuple(ids[:start])] = ids[start:]
        self.requests = 0
        self.lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        tokens = self.responses[tuple(request["prompt"])]
        ended = tokens[-1] == traces.END
        choice: dict[str, Any] = {
            "text": self.tokenizer.decode(tokens[: len(tokens) - ended]),
            "finish_reason": "stop" if ended else "length",
        }
        if self.form != "text":
            choice[self.form] = tokens
        return {"choices": [choice], "usage": {"prompt_tokens": len(request["prompt"])}}

    def handle(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        with self.lock:
            self.requests += 1
            number = self.requests
        if (found := self.before(number)) is not None:
            return found
        if (method, path) == ("GET", "/v1/models"):
            return 200, json.dumps({"data": [{"id": self.model}]}).encode()
        assert (method, path) == ("POST", "/v1/completions")
        request = json.loads(body)
        with self.lock:
            self.asked.append(request)
        return 200, json.dumps(self.answer(request)).encode()


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    prompts = traces.write_prompts(folder / "prompts.jsonl")
    recompile.trace(traces.model(), folder / "greedy.safetensors", prompts=prompts, tokens=TOKENS, temperature=0)
    return folder / "greedy.safetensors"


@pytest.fixture
def served(greedy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, str]]:
    monkeypatch.setattr("eval.trace.server.WAITS", (0.01,) * 4)
    behind = Served(greedy)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply("GET", b"")

        def do_POST(self) -> None:
            self._reply("POST", self.rfile.read(int(self.headers["Content-Length"])))

        def _reply(self, method: str, body: bytes) -> None:
            status, content = behind.handle(method, self.path, body)
            if status == 0:  # hang up
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield behind, f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def traced(greedy: Path, out: Path, url: str, **options: Any) -> Any:
    how = {"prompts": greedy.parent / "prompts.jsonl", "tokens": TOKENS, "temperature": 0, "batch_size": 4, **options}
    return recompile.trace(traces.model(), out, url=url, **how)


@pytest.mark.parametrize("form", ["token_ids", "tokens", "text"])
def test_rows_are_those_that_the_server_wrote(
    greedy: Path, served: tuple[Served, str], tmp_path: Path, form: str
) -> None:
    behind, url = served
    behind.form = form
    told: list[object] = []
    report = traced(greedy, tmp_path / "t.safetensors", url, on_event=told.append)
    own, found = read_trace(greedy), read_trace(tmp_path / "t.safetensors")
    assert torch.equal(found.ids, own.ids)
    assert torch.equal(found.response, own.response)
    assert (found.about.ended, found.about.roles) == (own.about.ended, own.about.roles)
    assert (found.about.writer, found.about.is_retokenized) == ("talking", form == "text")
    said = [event.text for event in told if isinstance(event, Note)]
    assert any("came as text and are tokenized again" in text for text in said) == (form == "text")
    assert found.about.origin.startswith("written by talking on a server (talking) greedily")
    assert found.about.origin.endswith("tokenized again") == (form == "text")
    assert report.rows == len(traces.PROMPTS)
    assert not list(tmp_path.glob("*.journal"))


def test_nothing_of_the_distribution_is_cut_off(greedy: Path, served: tuple[Served, str], tmp_path: Path) -> None:
    behind, url = served
    out = tmp_path / "t.safetensors"
    options = ("--prompts", greedy.parent / "prompts.jsonl", "--tokens", TOKENS, "--temperature", 0.8, "--seed", 3)
    run(model_trace, "-m", traces.model(), "-o", out, "--url", f"{url}/", *options, "--quiet")
    assert len(behind.asked) == len(traces.PROMPTS)
    assert len({request["seed"] for request in behind.asked}) == len(traces.PROMPTS)
    for request in behind.asked:
        assert (request["top_p"], request["top_k"], request["min_p"]) == (1.0, -1, 0.0)
        assert (request["temperature"], request["max_tokens"], request["model"]) == (0.8, TOKENS, "talking")
    seeds = {tuple(request["prompt"]): request["seed"] for request in behind.asked}
    behind.asked.clear()
    run(model_trace, "-m", traces.model(), "-o", out, "--url", url, *options, "-r", 5, "--quiet")
    assert all(seeds[tuple(request["prompt"])] == request["seed"] for request in behind.asked)


def test_a_server_that_stumbles_is_asked_again(greedy: Path, served: tuple[Served, str], tmp_path: Path) -> None:
    behind, url = served
    bad = {3: (503, b"loading"), 6: (0, b""), 9: (429, b'{"error": {"message": "slow down"}}')}
    behind.before = bad.get
    traced(greedy, tmp_path / "t.safetensors", url)
    assert torch.equal(read_trace(tmp_path / "t.safetensors").ids, read_trace(greedy).ids)
    assert behind.requests == 1 + len(traces.PROMPTS) + len(bad)


def test_what_came_is_kept_and_not_asked_again(greedy: Path, served: tuple[Served, str], tmp_path: Path) -> None:
    behind, url = served
    out, journal = tmp_path / "t.safetensors", tmp_path / "t.safetensors.journal"
    behind.before = lambda number: (503, b"gone") if number > 10 else None
    with pytest.raises(RecompileError, match=r"no answer in 5 attempts, the last: status 503: gone; the same command"):
        traced(greedy, out, url, batch_size=1)
    kept = journal.read_text().splitlines()
    assert len(kept) == 1 + 9
    behind.before = lambda number: None
    others: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"rows": 20}, "prompts"),
    ]
    for changed, key in others:
        with pytest.raises(JournalError, match=rf"another trace \({key}\)"):
            traced(greedy, out, url, **changed)
    behind.model = "another"
    with pytest.raises(JournalError, match=r"another trace \(writer\)"):
        traced(greedy, out, url)
    behind.model = "talking"
    behind.asked.clear()
    traced(greedy, out, url)  # more requests at a time change nothing
    assert len(behind.asked) == len(traces.PROMPTS) - 9
    assert torch.equal(read_trace(out).ids, read_trace(greedy).ids)
    journal.write_text("\n".join(kept) + "\n")
    kept = unsealed(journal).read_text().splitlines()
    journal.write_text("\n".join([*kept, '{"prompt": 99, "text": "", "tokens": [], "ended": true}']) + "\n")
    with pytest.raises(JournalError, match="journal:11: is no response of this trace"):
        traced(greedy, out, url)


BAD = [
    ((400, b'{"error": {"message": "no such model"}}'), "the server answers 400: no such model"),
    ((404, b"<html>nothing</html>"), "the server answers 404: <html>nothing</html>"),
    ((301, b""), "the server answers 301: nothing"),
    ((200, b"[1]"), "its answer is list, wanted an object"),
    ((200, b"{"), "its answer:1:2: not JSON"),
    ((200, b'{"choices": []}'), r"has no choices\[0\].text"),
    ((200, b'{"choices": [{"text": "x", "token_ids": ["a"]}]}'), "token_ids of its answer is no list of tokens"),
    ((200, b'{"choices": [{"text": "x"}], "usage": {"prompt_tokens": 1}}'), "counts 1 tokens in a prompt of"),
    ((200, b'{"choices": [{"text": "x", "token_ids": [99999]}]}'), "beyond the vocabulary of .* another model"),
    ((200, b"\xff"), "its answer: not UTF-8 text"),
    ((200, b"[" * 100_000), "its answer: not readable JSON: lists or objects nested too deeply"),
    ((200, b'{"choices": {"a": 1}}'), r"has no choices\[0\].text"),
    ((200, b'{"choices": "abc"}'), r"has no choices\[0\].text"),
    ((200, b'{"choices": [{"text": "\\ud800"}]}'), "half a surrogate pair"),
    (
        (200, b'{"choices": [{"text": "x", "token_ids": [%s]}]}' % b",".join([b"70"] * 20)),
        "20 tokens, asked for were at",
    ),
    ((200, b'{"choices": [{"text": "", "token_ids": []}]}'), "the response to prompt 1 is empty"),
]


@pytest.mark.parametrize(("reply", "said"), BAD)
def test_other_answers_are_refused_at_once(
    greedy: Path, served: tuple[Served, str], tmp_path: Path, reply: tuple[int, bytes], said: str
) -> None:
    behind, url = served
    behind.before = lambda number: reply if number > 1 else None
    with pytest.raises(RecompileError, match=said):
        traced(greedy, tmp_path / "t.safetensors", url, rows=1)
    assert behind.requests == 2
    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize(("path", "size"), [("/models", 17 << 20), ("/completions", 3 << 20)])
def test_an_answer_that_is_too_large_is_not_read_to_its_end(greedy: Path, tmp_path: Path, path: str, size: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
    listing = [head % 23 + b'{"data": [{"id": "m"}]}']
    large = [head % size, b'{"choices": [{"text": "' + b"word " * (size // 5 - 99)]  # whose end never comes
    with talking(lambda asked: large if path in asked else listing) as url:
        began = time.monotonic()
        with pytest.raises(RecompileError, match=rf"{path}: its answer has more than \d+ bytes, which no answer to"):
            traced(greedy, tmp_path / "t.safetensors", url)
        assert time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_refused_in_words(greedy: Path, served: tuple[Served, str], tmp_path: Path) -> None:
    behind, url = served
    odd = ("http://a..b/v1", "http://x:99999/v1", "http://x:abc/v1", "http://[::1/v1", "http://a b/v1", "http://x/\x1b")
    for bad in ("localhost:8000", "ftp://x/v1", "http://", "http://x/v1?a=b", *odd):
        with pytest.raises(ArgumentError, match="no address of a server"):
            traced(greedy, tmp_path / "t.safetensors", bad)
    behind.before = lambda number: (200, b'{"data": []}')
    with pytest.raises(RecompileError, match="names no model; is it an OpenAI-compatible server"):
        traced(greedy, tmp_path / "t.safetensors", url)
    with pytest.raises(RecompileError, match="no answer in 5 attempts"):
        traced(greedy, tmp_path / "t.safetensors", "http://127.0.0.1:9/v1")


# What a server does with the connection, piece by piece; slow ones go on for much longer than a test.
SLOW = {
    "says nothing": [],
    "headers without an end": [b"HTTP/1.1 200 OK\r\n", *(b"X-%d: y\r\n" % n for n in range(600))],
    "a body byte by byte": [b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n", *[b" "] * 600],
    "a body without a length": [b"HTTP/1.1 200 OK\r\n\r\n{", *[b" "] * 600],
}


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize("path", ["/models", "/completions"])
def test_a_server_that_never_ends_is_left_in_time(
    greedy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, path: str
) -> None:
    monkeypatch.setattr("eval.trace.server.LISTING_SECONDS", 0.5)
    monkeypatch.setattr("eval.trace.server.ANSWER_SECONDS", 0.5)
    listing = [b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"data": [{"id": "m"}]}']
    with talking(lambda asked: SLOW[slow] if path in asked else listing) as url:
        began = time.monotonic()
        with pytest.raises(RecompileError, match=f"{path}: no whole answer in 0.5 seconds"):
            traced(greedy, tmp_path / "t.safetensors", url)
        assert time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []


def test_one_refusal_breaks_off_the_requests_beside_it(greedy: Path, tmp_path: Path) -> None:
    listing = [b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"data": [{"id": "m"}]}']
    seen: list[str] = []

    def pieces(asked: str) -> list[bytes]:
        if "/models" in asked:
            return listing
        seen.append(asked)
        return [b"HTTP/1.1 400 no\r\nContent-Length: 2\r\n\r\nno"] if len(seen) == 3 else []

    with talking(pieces) as url:
        began = time.monotonic()
        with pytest.raises(RecompileError, match="the server answers 400: no"):
            traced(greedy, tmp_path / "t.safetensors", url)
        assert time.monotonic() - began < 20
    assert list(tmp_path.iterdir()) == []


@contextmanager
def talking(pieces: Callable[[str], list[bytes]]) -> Iterator[str]:
    """A server that answers a request (its first line) by pieces, one in 50 ms, and then leaves the line open."""
    ended = threading.Event()
    lines: list[socket.socket] = []

    def one(line: socket.socket) -> None:
        try:
            for piece in pieces(line.recv(1 << 16).split(b"\r\n")[0].decode()):
                line.sendall(piece)
                if ended.wait(0.05):
                    return
            ended.wait()
        except OSError:
            pass  # hung up

    def accept() -> None:
        while not ended.is_set():
            try:
                line, _ = listener.accept()
            except OSError:
                return
            lines.append(line)
            threading.Thread(target=one, args=(line,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            ended.set()
            for line in lines:
                line.close()
