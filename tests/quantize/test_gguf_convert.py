"""`--converter`: what is done around llama.cpp's converter, with a stand-in for its command (no network in tests)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner

import recompile
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.cli.model_quantize import main
from recompile.errors import OutputError, UnsupportedError
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from recompile.quantize import gguf_convert
from tests import tiny
from tests.gguf_models import write_model

GOOD = "import shutil; shutil.copy({model!r}, sys.argv[sys.argv.index('--outfile') + 1])"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to convert, a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def stand_in(body: str) -> Path:
    """The converter's command, which does what `body` says; it notes how it was called."""
    command = gguf_convert.command_in(gguf_convert.environment())
    command.parent.mkdir(parents=True, exist_ok=True)
    command.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"calls = open({str(command.parent / 'calls')!r}, 'a')\n"
        f"print(sys.argv[1:], os.environ.get('PYTHONPATH'), file=calls, flush=True)\n"
        f"{body}\n"
    )
    command.chmod(0o755)
    return command


def test_the_base_file_is_made_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/this/process")
    model = write_model(tmp_path / "made.gguf", kind="F32")
    command = stand_in(GOOD.format(model=str(model)))
    said: list[str] = []
    made = gguf_convert.convert(base, tmp_path / "out", lambda step, what: said.append(what))
    assert made == tmp_path / "out" / "model-BASE.gguf"
    assert made.read_bytes() == model.read_bytes()
    assert said == ["installing the converter", "running it", "model-BASE.gguf"]
    calls = (command.parent / "calls").read_text()
    assert f"['{base}', '--outfile', '{made}.recompile-partial', '--outtype', 'auto']" in calls
    assert "/of/this/process" not in calls, "another PYTHONPATH would hide the converter's own gguf package"
    assert gguf_convert.convert(base, tmp_path / "out") == made
    assert (command.parent / "calls").read_text() == calls
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-BASE.gguf"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_base_that_was_changed_since_is_converted_again(base: Path, tmp_path: Path, name: str) -> None:
    """Whatever its file says of when it was changed: the time of a copy may be that of the original."""
    stand_in(GOOD.format(model=str(write_model(tmp_path / "made.gguf", kind="F32"))))
    said: list[str] = []
    made = gguf_convert.convert(base, tmp_path / "out")
    gguf_convert.convert(base, tmp_path / "out", lambda step, what: said.append(what))
    assert said == []
    (base / name).write_text("changed")
    os.utime(base / name, ns=(1, 1))
    assert gguf_convert.convert(base, tmp_path / "out", lambda step, what: said.append(what)) == made
    assert "running it" in said


def test_the_command_goes_on_from_it(base: Path, tmp_path: Path) -> None:
    stand_in(GOOD.format(model=str(write_model(tmp_path / "made.gguf", kind="F32"))))
    arguments = ["-i", str(base), "-o", str(tmp_path / "out"), "--format", "gguf", "-b", "Q8_0", "--converter"]
    result = CliRunner().invoke(main, [*arguments, "--no-importance", "--quiet"])
    assert result.exit_code == 0, result.output
    made = open_checkpoint(tmp_path / "out" / "model-BASE-Q8_0.gguf")
    assert {module.format for name, module in made.modules.items() if name.endswith("_proj")} == {"gguf"}


def test_a_file_gets_its_tokenizer_from_the_converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither a GGUF file is given nor is the base one; the keys are kept for the next build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = tiny.copy_of(tiny.base("llama-2"), tmp_path / "base")
    keys = tmp_path / "keys.gguf"
    write_gguf(keys, [encode_key("tokenizer.ggml.tokens", [f"t{n}" for n in range(256)])], [])
    command = stand_in(GOOD.format(model=str(keys)))
    arguments = ["-i", str(base), "--format", "gguf", "-b", "Q8_0", "--no-importance", "--quiet"]
    for out in ("first", "second"):
        result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / out)])
        assert result.exit_code == 0, result.output
        made = open_gguf(tmp_path / out / "base-Q8_0.gguf")
        assert made.value("tokenizer.ggml.tokens") == open_gguf(keys).value("tokenizer.ggml.tokens")
    (call,) = (command.parent / "calls").read_text().splitlines()
    assert "--vocab-only" in call
    (base / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')  # another tokenizer: other keys
    stand_in("sys.exit('BPE pre-tokenizer was not recognized')")
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "third")])
    assert result.exit_code == 1
    assert "not recognized" in result.output
    assert "give a GGUF file of the same model with --tokenizer-from" in " ".join(result.output.split())
    assert not (tmp_path / "third").exists()
    (kept,) = (tmp_path / "cache" / "recompile" / "tokenizers").iterdir()
    assert kept.suffix == ".gguf"


def test_the_whole_way_asks_for_the_tokenizer_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stand_in("sys.exit('BPE pre-tokenizer was not recognized')")
    with pytest.raises(UnsupportedError, match="not recognized"):
        recompile.auto(tiny.base("llama-2"), tmp_path / "mix.gguf", engine="llama.cpp", bits=5)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("print('step'); sys.exit('Model PhiNine is not supported')", UnsupportedError, "PhiNine is not supported"),
        ("sys.exit(3)", UnsupportedError, "failed: no message"),
        ("pass", OutputError, "ended well and left no file"),
    ],
)
def test_a_failure_has_the_converters_words(
    base: Path, tmp_path: Path, body: str, error: type[Exception], message: str
) -> None:
    stand_in(body)
    with pytest.raises(error, match=message):
        gguf_convert.convert(base, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_index_is_told_and_leaves_nothing_that_looks_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is installed last; a second run tries again."""
    ran: list[str] = []

    def pip(words: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(words[-1])
        return subprocess.CompletedProcess(words, 1, "", "looking\nERROR: No matching distribution found")

    def create(folder: Path, **_: object) -> None:
        (folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(gguf_convert.venv, "create", create)
    monkeypatch.setattr(gguf_convert.subprocess, "run", pip)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"No matching distribution found\. Is the package index reachable"):
            gguf_convert.convert(base, tmp_path / "out")
    assert ran == [gguf_convert.NEEDS[-1]] * 2

    def fail(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "ensurepip")

    monkeypatch.setattr(gguf_convert.venv, "create", fail)
    with pytest.raises(UnsupportedError, match="apt install python3-venv"):
        gguf_convert.convert(base, tmp_path / "out")
