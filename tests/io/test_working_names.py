"""Files of the user's beside an output stay: what this tool works in has a name of its own, or a mark."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from recompile.auto_stages import Stages
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli import recompile
from recompile.errors import OutputError, RecompileError
from recompile.gguf.container import open_gguf
from recompile.io.files import (
    OutputDirectory,
    check_partial,
    is_marked,
    partial_path,
    remove_empty,
    remove_partial,
    unmarked,
    write_text,
    write_with,
)
from recompile.io.journal import LineJournal
from recompile.quantize.encoders import IntEncoder
from recompile.quantize.external_converters import EngineStep, run_engine
from recompile.quantize.gguf import plan_variants
from recompile.quantize.gguf_build import build_variants
from recompile.quantize.output_statistics import open_statistics
from tests import gguf_models, tiny
from tests.quantize.test_gguf_variants import tokenizer_file, write_hf
from tests.quantize.test_pipeline import run


def a_directory(out: Path) -> None:
    with OutputDirectory(out):
        pass


def a_journal(out: Path) -> None:
    with LineJournal(out.with_name("out.journal")) as journal:
        journal.begin({"kind": "test"})


def a_converter(out: Path) -> None:
    list(run_engine([EngineStep("4 bpw", (sys.executable, "-c", "raise SystemExit(3)"), out)]))


def statistics(out: Path) -> None:
    assert open_statistics(out.with_name("out.stats")) is None


def gguf_variants(out: Path) -> None:
    pytest.importorskip("libgguf")
    base, words = write_hf(out.with_name("hf"), "llama"), tokenizer_file(out.with_name("tokens.gguf"))
    plan = plan_variants(open_checkpoint(base), out.parent, ["Q8_0"], tokenizer_from=open_gguf(words))
    list(build_variants(plan))


def gguf_merge(out: Path) -> None:
    base = gguf_models.write_model(out.with_name("a.gguf"), kind="Q8_0")
    arguments = ["-i", base, "-o", out.with_name("out.gguf"), "--no-probe", "--quiet"]
    assert CliRunner().invoke(recompile.main, [str(word) for word in arguments]).exit_code == 0


def variants(out: Path) -> None:
    run(tiny.base("llama-2"), out.parent, IntEncoder((3,), 32))


def finished_variants(out: Path) -> None:
    """The directory stands there when the run is asked for again."""
    mine = out.with_name("3bpw.building")
    mine.rename(out.with_name("aside"))
    variants(out)
    out.with_name("aside").rename(mine)
    variants(out)


def stages(out: Path) -> None:
    Stages(out.with_name("out.work"), {}, out)


WORKS: list[tuple[str, Callable[[Path], object]]] = [
    ("out.partial", lambda out: write_text(out, "made")),
    ("out.partial/notes", lambda out: write_text(out, "made")),
    ("out.partial.svg", lambda out: write_with(out.with_name("out.svg"), lambda name: name.write_text("made"))),
    ("out.partial", a_directory),
    ("out.partial/notes", a_directory),
    ("out.recompile-partial/notes", a_directory),
    ("out.journal", a_journal),
    ("out.building/notes", a_converter),
    ("hf-Q8_0.gguf.building", gguf_variants),
    ("hf-Q8_0.building.jsonl", gguf_variants),
    ("out.gguf.partial", gguf_merge),
    ("out.stats/mine.safetensors", statistics),
    ("3bpw.building/x.partial", variants),
    ("3bpw.building/notes", finished_variants),
    ("out.work/profile.jsonl", stages),
]


@pytest.mark.parametrize(("name", "work"), WORKS)
def test_what_the_user_has_beside_an_output_stays(name: str, work: Callable[[Path], object], tmp_path: Path) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    before = {path: path.stat().st_ino for path in (mine, mine.parent)}
    with suppress(RecompileError):
        work(tmp_path / "out")
    assert mine.read_text() == "mine"
    assert {path: path.stat().st_ino for path in (mine, mine.parent)} == before
    if mine.parent != tmp_path:
        assert os.listdir(mine.parent) == [mine.name]


def test_a_removal_that_was_killed_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark goes last."""
    folder = tmp_path / "out.building"
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "deep/b", "z", "mark"):
        (folder / name).write_text("x")
    left, unlink = 2, Path.unlink

    def stops(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", stops)
        with pytest.raises(KeyboardInterrupt):
            remove_partial(folder, "mark")
    check_partial(folder, "mark")
    remove_partial(folder, "mark")
    assert not folder.exists()


def test_an_empty_folder_is_ours_only_where_a_run_was_killed_that_made_it(tmp_path: Path) -> None:
    folder = tmp_path / "out.work"

    def killed() -> None:
        """In a process of its own, between making the folder and its mark."""
        if child := os.fork():
            os.waitpid(child, 0)
            return
        try:
            with unmarked(folder):
                folder.mkdir()
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)

    folder.mkdir()
    with pytest.raises(OutputError, match=r"out\.work: exists and is not an unfinished output"):
        check_partial(folder, "mark")
    folder.rmdir()
    killed()
    assert not os.listdir(folder)
    assert check_partial(folder, "mark") == 0
    with unmarked(folder):
        (folder / "mark").touch()
    assert os.listdir(tmp_path) == ["out.work"]
    assert is_marked(folder, "mark")
    partial_path(folder).touch()  # killed after the mark
    assert is_marked(folder, "mark")
    assert os.listdir(tmp_path) == ["out.work"]
    (folder / "mark").unlink()
    with pytest.raises(OutputError):
        check_partial(folder, "mark")
    folder.rmdir()
    with suppress(KeyError), unmarked(folder):  # a run that fails leaves neither
        folder.mkdir()
        raise KeyError
    assert not os.listdir(tmp_path)
    killed()
    remove_empty(folder)
    assert not os.listdir(tmp_path)
    folder.mkdir()
    remove_empty(folder)
    assert folder.is_dir(), "the user's"


def test_a_torn_header_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "j").write_text('{"kind": "te')
    with LineJournal(tmp_path / "j") as journal:
        journal.begin({"kind": "test"})
    with LineJournal(tmp_path / "j") as journal:
        assert journal.values() == [{"kind": "test"}]
