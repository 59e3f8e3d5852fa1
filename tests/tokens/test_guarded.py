"""Tokenizers and chat templates of a checkpoint run in a child process: what loops or grows is one error, and soon."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.run_diff import chat_prompt
from recompile.errors import CheckpointError, MismatchError, RecompileError
from recompile.model import guarded
from recompile.model.guarded import Limits, run_guarded, stepped
from recompile.model.rows import rows_of_text
from recompile.model.texts import Document, TextSource
from recompile.model.tokenizer import load_tokenizer, with_tokenizer
from recompile.model.tokens import make_rows
from tests.tokens.test_tokens import TOKENIZER

SHORT = Limits(0.3, 256 * 2**20)
LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
GROWTH = "{% set ns = namespace(a='x' * 1000000) %}{% for a in range(40) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"


def loop() -> None:
    while True:
        pass


def loop_in_c() -> None:
    re.match(r"(a+)+$", "a" * 60 + "b")


def grow() -> int:
    held = []
    while True:
        held.append(bytearray(16 * 2**20))


def wait_for_ever() -> None:
    threading.Event().wait()


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (loop, "does not end: 0.3 seconds of computing"),
        (loop_in_c, "does not end"),
        (os.abort, "ended with signal 6"),
        (lambda: os._exit(3), "ended with exit code 3"),
    ],
)
def test_work_that_does_not_end_well_is_one_error(work: Callable[[], object], says: str) -> None:
    with pytest.raises(CheckpointError, match=f"m: the tokenizer {says}"):
        run_guarded(work, "m: the tokenizer", SHORT)


def test_what_a_library_prints_is_shown_unless_it_crashed(capfd: pytest.CaptureFixture[str]) -> None:
    def work(ends: Callable[[], object]) -> Callable[[], object]:
        def prints() -> object:
            os.write(2, b"thread '<unnamed>' panicked at src/lib.rs\n")
            return ends()

        return prints

    if not hasattr(os, "memfd_create"):
        pytest.skip("this system has no files in memory")
    with pytest.raises(CheckpointError, match="m: the tokenizer ended with signal 6"):
        run_guarded(work(os.abort), "m: the tokenizer", SHORT)
    assert capfd.readouterr().err == ""
    assert run_guarded(work(lambda: 3), "m: the tokenizer", SHORT) == 3
    assert capfd.readouterr().err == "thread '<unnamed>' panicked at src/lib.rs\n"


def test_work_that_grows_is_one_error() -> None:
    with pytest.raises(CheckpointError, match="m: the tokenizer takes more than 256 MiB of memory"):
        run_guarded(grow, "m: the tokenizer", Limits(60.0, 256 * 2**20))


def test_work_that_waits_for_ever_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "WALL_FACTOR", 1)
    with pytest.raises(CheckpointError, match="does not end"):
        run_guarded(wait_for_ever, "m: the tokenizer", SHORT)


def test_results_and_errors_come_back() -> None:
    assert run_guarded(lambda: {"a": torch.arange(3)}, "m", SHORT)["a"].tolist() == [0, 1, 2]

    def wrong() -> None:
        raise MismatchError("of another model")

    with pytest.raises(MismatchError, match=r"^of another model$"):
        run_guarded(wrong, "m", SHORT)

    class LocalError(Exception):
        """Cannot be pickled."""

    def local() -> None:
        raise LocalError("no pickle")

    with pytest.raises(RecompileError, match="LocalError: no pickle"):
        run_guarded(local, "m", SHORT)


def test_work_that_goes_forward_may_take_longer() -> None:
    import time

    def steps() -> int:
        for _ in range(4):
            stepped()
            end = time.process_time() + 0.15
            while time.process_time() < end:
                pass
        return 4

    assert run_guarded(steps, "m", SHORT) == 4
    stepped()  # here it does nothing: this process has no limit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TOKENIZER.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("template", "cpu_seconds", "says"),
    [(LOOP, 1.0, "m: .* does not end"), (GROWTH, 60.0, "MiB|MemoryError")],  # a slow machine, too, grows before it ends
)
def test_a_chat_template_that_loops_or_grows(
    template: str, cpu_seconds: float, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "CPU_SECONDS", cpu_seconds)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(RecompileError, match=says):
        with_tokenizer(folder, chat_prompt)


def test_a_chat_template_gives_what_it_gave(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}w1 w2 w5{% endfor %}")
    assert with_tokenizer(folder, chat_prompt) == [3, 4, 7]
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no user') }}")
    with pytest.raises(RecompileError, match="gen_prompt: the chat template fails: TemplateError: no user"):
        with_tokenizer(folder, chat_prompt)


def test_rows_are_those_of_this_process(folder: Path) -> None:
    source = TextSource("made", tuple(Document(f"w{n} w{n + 1} w{n + 2} w{n + 3}", "a") for n in range(30)))
    tokenizer: Any = load_tokenizer(folder)
    wanted = make_rows(source, tokenizer, 4, 3, "choose")
    found, size = rows_of_text(source, folder, 4, 3, "choose")
    assert found.sha256 == wanted.sha256
    assert (found.ids == wanted.ids).all()
    assert (found.documents, found.origins, size) == (wanted.documents, wanted.origins, len(tokenizer))


def test_a_pipe_among_the_tokenizer_files_is_refused_at_once(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: cannot be read: it is a (named )?pipe"):
        with_tokenizer(folder, len)
