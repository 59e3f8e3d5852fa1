"""The tokenizer in a model's directory or GGUF file: loaded with limits on time and memory, checked, compared."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from recompile.errors import CheckpointError, MismatchError
from recompile.gguf.container import is_gguf, open_gguf
from recompile.io.files import open_regular
from recompile.model.guarded import Limits, run_guarded

T = TypeVar("T")

GGUF_TOKEN_KEYS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.scores")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(model_dir: Path | str) -> Any:
    """The tokenizer in a model's directory, from local files only, without running code that lies there."""
    folder = Path(model_dir)
    gguf: dict[str, str] = {}
    if is_gguf(folder):  # a tokenizer beside it is the original's; else transformers makes one from the file's keys
        gguf, folder = ({} if _has_tokenizer(folder.parent) else _gguf_arguments(folder)), folder.parent
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such directory, so no tokenizer")
    if not gguf and not _has_tokenizer(folder):
        raise CheckpointError(
            f"{folder}: no tokenizer here (none of {', '.join(TOKENIZER_FILES)}); "
            "copy tokenizer.json and tokenizer_config.json from the original model, or give token rows with {input_ids}"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **gguf)
    except Exception as error:  # transformers and tokenizers raise whatever their parsers meet
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"{folder / gguf.get('gguf_file', '')}: the tokenizer cannot be loaded: {type(error).__name__}: {reason}"
        ) from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _gguf_arguments(path: Path) -> dict[str, str]:
    """What AutoTokenizer is told of a GGUF file. With the model's type it need not find out for itself, for which it
    takes the file's whole vocabulary apart, token by token: ten times as long where there are 262,144."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    from recompile.gguf.config import config_of

    model_type = str(config_of(open_gguf(path))[0].get("model_type", ""))
    known = TOKENIZER_MAPPING_NAMES.get(model_type)
    by_type = {"tokenizer_type": model_type} if known not in (None, "MistralCommonBackend") else {}
    return {"gguf_file": path.name, **by_type}


def tokenizer_texts(model: Path) -> tuple[Mapping[str, str], str]:
    """The tokenizer in a GGUF file's keys as the files that a directory holds, by name; none where the model is a
    directory or has such files beside it. Second: why a file's keys give none, else empty."""
    if not is_gguf(model) or _has_tokenizer(model.parent):
        return {}, ""
    about = model.stat()
    return _texts_of_keys(model, about.st_mtime_ns, about.st_size)


@functools.lru_cache(maxsize=1)  # every variant asks again, and a large vocabulary takes seconds
def _texts_of_keys(model: Path, changed_ns: int, size: int) -> tuple[Mapping[str, str], str]:
    def work(tokenizer: Any) -> dict[str, str]:
        for name in ("gguf_file", "tokenizer_type", "local_files_only", "is_local"):  # how it was loaded here
            tokenizer.init_kwargs.pop(name, None)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}

    try:
        return with_tokenizer(model, work), ""
    except CheckpointError as error:
        return {}, f"{error}; what is written has no tokenizer"


def with_tokenizer(model_dir: Path | str, work: Callable[[Any], T], *, text_bytes: int = 0) -> T:
    """What `work` makes of a directory's tokenizer, both in a child process with limits on time and memory.

    text_bytes: of the text that it tokenizes, which it may do for as long as it goes forward. Raises CheckpointError
    for tokenizers and chat templates that do not end or take too much memory, for files that are none, and whatever
    the work raises.
    """
    from transformers import AutoTokenizer, LlamaConfig  # noqa: F401 - here, so that no child need, at 2 seconds each

    path = Path(model_dir)
    folder = path.parent if is_gguf(path) else path
    content = 2**26 if path != folder else 0  # keys of a GGUF file
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        if any(word in name for word in ("tok", "vocab", "merges", "special_tokens", "chat_template")):
            if (folder / name).is_dir():
                continue
            with open_regular(folder / name) as file:
                content += os.fstat(file.fileno()).st_size
    limits = Limits.of(content, text_bytes)
    return run_guarded(lambda: work(load_tokenizer(model_dir)), f"{path}: the tokenizer or chat template", limits)


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer whose ordinary tokens go beyond a model's vocabulary.

    Added tokens may: some text-only models come with an image token that they have no embedding for.
    """
    added = set(tokenizer.get_added_vocab().values())
    largest, token = max(((index, token) for token, index in tokenizer.get_vocab().items() if index not in added))
    if largest >= vocab_size:
        raise MismatchError(
            f'wrong tokenizer: its token {largest} ("{token}") is beyond the model\'s vocabulary of {vocab_size}; '
            "take the tokenizer of the same model"
        )


def tokenizer_sha256(model_dir: Path | str) -> str | None:
    """A hash of what token ids mean, to see that two checkpoints share a tokenizer; None where there is none.

    It covers tokens, their ids and the merges, read from tokenizer.json, else vocab.json and merges.txt: blanks, key
    order, the two ways to write merges and the settings that tools add when they save again do not matter. Of other
    files (tokenizer.model, ...) the bytes are hashed, so such a hash says nothing against one from tokenizer.json. That
    of a GGUF file covers its token keys, begins with "gguf:" and compares with other GGUF files only.
    """
    folder = Path(model_dir)
    if is_gguf(folder):
        file = open_gguf(folder)
        records = b"".join(file.record(key) for key in GGUF_TOKEN_KEYS if key in file.keys)
        return f"gguf:{hashlib.sha256(records).hexdigest()}" if records else None
    try:
        if (folder / "tokenizer.json").is_file():
            return _tokenizer_json_sha256((folder / "tokenizer.json").read_bytes())
        if (folder / "vocab.json").is_file():
            meaning = _vocab_files_meaning(folder)
        else:
            for name in TOKENIZER_FILES:
                if (folder / name).is_file():
                    return hashlib.sha256((folder / name).read_bytes()).hexdigest()
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder}: the tokenizer's files cannot be read: {error}") from error
    return _meaning_sha256(meaning)


def _meaning_sha256(meaning: Mapping[str, Any]) -> str:
    canonical = json.dumps(meaning, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


_seen: dict[bytes, str] = {}  # variants of one model have equal files, and reading one takes most of a second


def _tokenizer_json_sha256(raw: bytes) -> str:
    key = hashlib.sha256(raw).digest()
    if key not in _seen:
        _seen[key] = _meaning_sha256(_token_meaning(json.loads(raw.decode("utf-8"))))
    return _seen[key]


def _token_meaning(stored: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json -> {"tokens": {token: id}, "merges": [[left, right], ...]}"""
    model = stored["model"]
    vocab = model.get("vocab") or {}
    if isinstance(vocab, list):  # unigram: [[token, score], ...]
        vocab = {token: index for index, (token, _) in enumerate(vocab)}
    tokens = dict(vocab)
    tokens.update({added["content"]: added["id"] for added in stored.get("added_tokens") or ()})
    return {"tokens": tokens, "merges": [_pair(merge) for merge in model.get("merges") or ()]}


def _vocab_files_meaning(folder: Path) -> dict[str, Any]:
    tokens = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if (folder / "added_tokens.json").is_file():
        tokens.update(json.loads((folder / "added_tokens.json").read_text(encoding="utf-8")))
    lines: list[str] = []
    if (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
    return {"tokens": tokens, "merges": [_pair(line) for line in lines if line.strip()]}


def _pair(merge: str | Sequence[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)
