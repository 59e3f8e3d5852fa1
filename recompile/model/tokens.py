"""Text -> rows of tokens, split into roles that never overlap.

Every document belongs to exactly one role, decided by a hash of its text: the rows that a model is quantized with
(`calibrate`), that modules are chosen with (`choose`), that a choice is checked with (`accept`) and that the final
numbers are reported on (`report`) never share a document, whichever command asks, and for how many rows of what length.
`all` takes every document, for a text that the user chose to measure on.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recompile.checkpoint.safetensors_files import open_tensors
from recompile.errors import CheckpointError, MismatchError, RecompileError
from recompile.gguf.container import is_gguf, open_gguf
from recompile.io.files import open_regular, read_text
from recompile.io.tensors import save_tensors
from recompile.model.guarded import Limits, run_guarded, stepped

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

T = TypeVar("T")

# Shares of the documents. Quantizing wants the most rows; `report` more than `choose`, since its standard error is what
# is printed at the end. Changing a share moves documents between roles: never do it within one series of measurements.
ROLE_SHARES: Mapping[str, float] = {"calibrate": 0.40, "choose": 0.20, "accept": 0.15, "report": 0.25}
# Of 400 tried, the one that splits every domain of both default texts nearest to these shares.
ROLE_SALT = 66
ROLES = (*ROLE_SHARES, "all")

OVERLAP_WINDOW = 32  # tokens; shorter stretches repeat by chance in honest text
STRETCH_CHARS = 6000  # about three rows of 512 tokens of English
LONGEST_CHARS = 20_000  # a document above this would fill a small sample by itself, so a user's text is cut here
FEW_DOCUMENTS = 16  # below this a hash split by documents would leave roles empty, so long ones are cut
SHORTEST_ARTICLE_CHARS = 400  # half of the encyclopedia's records are a title and nothing else
KIN_CHARS = 64  # a power of two; about 17 tokens of English, so half of an OVERLAP_WINDOW
MANY_DOCUMENTS = 16  # what more of them (and more than a twentieth of all) repeat is a form, not a copy
ENCODE_BATCH = 8  # documents tokenized at a time


@dataclass(frozen=True)
class Document:
    """A text that belongs to one role as a whole."""

    text: str
    origin: str  # the domain it comes from: "wiki", "code", a file's name
    continues: bool = False  # whether it follows, in one running text, directly on the document before it


@dataclass(frozen=True)
class TextSource:
    """Documents, and a name that says where they come from (it is printed in reports)."""

    name: str
    documents: tuple[Document, ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of tokens, all of one length; those of a trace are padded with zeros on the right.

    ids:        int64 [rows, tokens]
    documents:  per row, which document it is cut from ("wiki-1f0c9a2b"; several joined by "+")
    origins:    per row, the domain of its documents
    sha256:     of the shape and the ids, nothing else: equal hashes mean equal tokens (of a trace also of what counts)
    lengths:    of a trace, int64 [rows]: tokens without the padding
    counted:    of a trace, bool [rows, tokens]: places whose predictions count
    positions:  of a trace, "response" or "all": which those are
    """

    ids: Tensor
    documents: tuple[str, ...]
    origins: tuple[str, ...]
    source: str
    role: str
    sha256: str
    lengths: Tensor | None = None
    counted: Tensor | None = None
    positions: str = "all"

    def part(self, start: int, stop: int) -> Rows:
        """Rows start .. stop - 1, with a hash of their own."""
        return self.of(range(start, min(stop, len(self.ids))))

    def of(self, rows: Sequence[int]) -> Rows:
        """These rows in this order, with a hash of their own."""
        kept = list(rows)
        counted = None if self.counted is None else self.counted[kept]
        found = _rows(
            self.ids[kept],
            tuple(self.documents[row] for row in kept),
            tuple(self.origins[row] for row in kept),
            self.source,
            self.role,
            counted,
        )
        lengths = None if self.lengths is None else self.lengths[kept]
        return replace(found, lengths=lengths, counted=counted, positions=self.positions)

    @property
    def counted_in_words(self) -> str:
        """What counts of the rows of a trace, to go on a sentence about them; empty for text."""
        if self.counted is None:
            return ""
        what = "response tokens" if self.positions == "response" else "tokens, padding left out,"
        return f", of which {int(self.counted.sum())} {what} count ({self.source}, role {self.role})"

    def by_length(self) -> Rows:
        """Short rows first, so that padded rows that run together are of about one length."""
        if self.lengths is None:
            return self
        return self.of(self.lengths.sort(stable=True).indices.tolist())


# ---------------------------------------------------------------- where text comes from


def default_text(multilingual: bool = False) -> TextSource:
    """The text that is used when none is named.

    The calibration text inside an installed `exllamav2` wheel (found without importing it), else the English topics
    of `pydoc_data`, which every Python ships. The name of what is returned says which.

    multilingual: also take the file of other languages. Off by default: a model that speaks only English, as the
    demo's, is far off its training there, and the KL of such rows would drown that of the rows people care about.
    """
    folder = _find_exllamav2_text()
    if folder is None:
        found = _python_topics()
        return replace(found, name=f"{found.name} (no exllamav2 wheel is installed)")
    readers = {
        "wiki": lambda text: [body for body in _doc_records(text) if len(body) >= SHORTEST_ARTICLE_CHARS],
        "c4": lambda text: text.split("\n"),  # one web page a line
        "technical": None,  # long articles with nothing between them: running text
        "code": None,  # snippets in many languages; an empty line may be between two or inside one
        "tiny": lambda text: text.split("<|endoftext|>"),
    }
    if multilingual:
        readers["multilingual"] = None
    documents: list[Document] = []
    for origin, split in readers.items():
        text = _read_text(folder / f"{origin}.utf8")
        if split is None:
            documents += cut_stretches(text, origin)
        else:
            documents += [Document(body.strip(), origin) for body in split(text) if body.strip()]
    name = f"exllamav2 {importlib.metadata.version('exllamav2')} calibration text ({', '.join(readers)})"
    return TextSource(name, tuple(documents))


def other_text(source: TextSource) -> TextSource:
    """Text of another kind than `source`, which needs no network: Python's documentation, or, where that is it, the
    source code of its standard library."""
    topics = _python_topics()
    if not source.name.startswith(topics.name):
        return topics
    import dataclasses
    import statistics
    import textwrap

    documents: list[Document] = []
    for module in (argparse, ast, dataclasses, functools, inspect, statistics, textwrap):
        documents += cut_stretches(inspect.getsource(module), "stdlib")
    return TextSource(f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}", tuple(documents))


def text_from_file(path: Path | str) -> TextSource:
    """Read a UTF-8 file. Its documents are, whichever comes first in this list:

    `<doc ...>...</doc>` records; what form feeds separate; what two or more empty lines separate; else the file is
    one running text, cut in stretches. Where that gives only a few documents, or very long ones, these are cut in
    stretches too, so that every role gets some. A running text is whole again under the role `all`.
    """
    path = Path(path)
    text = _read_text(path)
    bodies = _doc_records(text)
    if not bodies:
        separator = "\f" if "\f" in text else r"\n[ \t]*\n[ \t]*\n\s*"
        bodies = [body.strip("\n") for body in re.split(separator, text) if body.strip()]
    if not bodies:
        raise RecompileError(f"{path}: there is no text in this file")
    documents: list[Document] = []
    for body in bodies:
        if len(bodies) < FEW_DOCUMENTS or len(body) > LONGEST_CHARS:
            documents += cut_stretches(body, path.name)
        else:
            documents.append(Document(body, path.name))
    return TextSource(str(path), tuple(documents))


def text_from_dataset(name: str) -> TextSource:
    """Read `NAME[:CONFIG[:SPLIT]]` through the `datasets` library, which may fetch it; `wiki2` is WikiText-2 raw, test.

    The text column is `text`, else the first column of strings. One record is one document, except that WikiText's
    records are the paragraphs of one running text.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecompileError(
            f"{{dataset}} {name}: the `datasets` library is not installed; pip install datasets, or use {{text}} FILE"
        ) from error
    wanted = "Salesforce/wikitext:wikitext-2-raw-v1:test" if name == "wiki2" else name
    path, _, rest = wanted.partition(":")
    config, _, split = rest.partition(":")
    try:
        data = datasets.load_dataset(path, config or None, split=split or None)
        if not split:  # a mapping of splits
            split = next((known for known in ("test", "validation", "train") if known in data), next(iter(data)))
            data = data[split]
        column = "text" if "text" in data.column_names else _first_text_column(data, name)
        texts = [str(record) for record in data[column]]
    except RecompileError:
        raise
    except Exception as error:  # the library has no common base class: network, cache, parsers
        reason = str(error).strip().split("\n", 1)[0]
        raise RecompileError(f"{{dataset}} {name}: cannot be loaded: {type(error).__name__}: {reason}") from error
    source = f"{path}{':' + config if config else ''}:{split}"
    if "wikitext" in path.lower():
        return TextSource(source, tuple(cut_stretches("\n\n".join(texts), path)))
    return TextSource(source, tuple(Document(text, path) for text in texts if text.strip()))


def cut_stretches(text: str, origin: str, stretch_chars: int = STRETCH_CHARS) -> list[Document]:
    """Cut a running text into documents of about `stretch_chars`, at empty lines, else line ends, sentences, blanks.

    Nothing is lost: the stretches joined are the text. All but the first are marked as continuing.
    """
    stretches: list[Document] = []
    start = 0
    while len(text) - start > stretch_chars + stretch_chars // 2:
        low, high = start + stretch_chars * 3 // 4, start + stretch_chars * 5 // 4
        end = high
        for boundary in ("\n\n\n", "\n\n", "\n", ". ", " "):
            found = text.rfind(boundary, low, high)
            if found >= 0:
                end = found + len(boundary)
                break
        stretches.append(Document(text[start:end], origin, continues=start > 0))
        start = end
    if text[start:].strip():
        stretches.append(Document(text[start:], origin, continues=start > 0))
    return stretches


def _find_exllamav2_text() -> Path | None:
    """The folder of calibration text in an installed exllamav2. A top-level find_spec imports nothing of it."""
    try:
        spec = importlib.util.find_spec("exllamav2")
    except (ImportError, ValueError):
        return None
    for package in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(package) / "conversion" / "standard_cal_data"
        if all((folder / f"{origin}.utf8").is_file() for origin in ("wiki", "c4", "technical", "code", "tiny")):
            return folder
    return None


def _python_topics() -> TextSource:
    from pydoc_data.topics import topics

    documents: list[Document] = []
    for _, text in sorted(topics.items()):
        documents += cut_stretches(text, "pydoc")  # a quarter of the topics holds most of the text
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return TextSource(f"pydoc_data.topics of Python {version}", tuple(documents))


_DOC = re.compile(r"<doc\b")


def _doc_records(text: str) -> list[str]:
    """What stands between `<doc ...>` and `</doc>`, in one pass: nothing is searched twice where one is not closed."""
    found, at = [], 0
    while (begin := _DOC.search(text, at)) is not None:
        start = text.find(">", begin.end())
        stop = text.find("</doc>", start + 1) if start >= 0 else -1
        if stop < 0:
            break
        found.append(text[start + 1 : stop].strip())
        at = stop + len("</doc>")
    return [body for body in found if body]


def _first_text_column(data: Any, name: str) -> str:
    for column in data.column_names:
        if len(data) and isinstance(data[0][column], str):
            return str(column)
    raise RecompileError(f"{{dataset}} {name}: no column holds text; its columns are {', '.join(data.column_names)}")


def _read_text(path: Path) -> str:
    text = read_text(path, kind="text", error=RecompileError, bom=True)
    return text.replace("\r\n", "\n").replace("\r", "\n")


# ---------------------------------------------------------------- roles


@functools.lru_cache(maxsize=4)  # every role of a source asks again
def assign_roles(source: TextSource) -> tuple[str, ...]:
    """The role of every document of a source.

    A hash of the words decides, so blanks, line ends and the order of documents do not move one. Documents that share
    a stretch of text (copies, quotations, the same snippet twice) are near duplicates, and all of these get one role;
    only what many documents repeat, such as a licence on top of each, is not held against them.
    """
    hashes = [_text_hash(document.text) for document in source.documents]
    return tuple(_role_of_hash(hashes[first]) for first in _first_kin(source.documents, hashes))


def _role_of_hash(text_hash: str) -> str:
    return role_of_key(f"role{ROLE_SALT} {text_hash}")


def role_of_key(key: str) -> str:
    """The role that the hash of a text decides, by the shares of `ROLE_SHARES`."""
    point = int(hashlib.sha256(key.encode()).hexdigest()[:12], 16) / 16**12  # uniform in [0, 1)
    for role, share in ROLE_SHARES.items():
        if point < share:
            return role
        point -= share
    return "report"  # rounding of the shares


def _first_kin(documents: Sequence[Document], hashes: Sequence[str]) -> list[int]:
    """For each document the one of its near duplicates, itself included, that has the smallest hash."""
    import numpy as np

    windows = [_window_hashes(document.text) for document in documents]
    every = np.concatenate([np.zeros(0, np.uint64), *windows])
    owner = np.repeat(np.arange(len(documents)), [len(found) for found in windows])
    order = np.argsort(every, kind="stable")  # equal hashes side by side, their owners ascending
    every, owner = every[order], owner[order]
    first = np.flatnonzero(np.r_[True, every[1:] != every[:-1]][: len(every)])
    sizes = np.diff(np.r_[first, len(every)])
    many = max(MANY_DOCUMENTS, len(documents) // 20)

    parent_of = list(range(len(documents)))

    def head(document: int) -> int:
        while parent_of[document] != document:
            parent_of[document] = parent_of[parent_of[document]]
            document = parent_of[document]
        return document

    shared = (sizes > 1) & (sizes <= many)
    for start, size in zip(first[shared].tolist(), sizes[shared].tolist(), strict=True):
        one, *others = (head(int(document)) for document in owner[start : start + size])
        for other in others:
            one, other = sorted((head(one), head(other)), key=lambda document: (hashes[document], document))
            parent_of[other] = one
    return [head(document) for document in range(len(documents))]


def _window_hashes(text: str) -> np.ndarray:
    """Hashes of the windows of `KIN_CHARS` characters, a quarter of them, picked by the hash itself.

    Blanks do not count, nor do rulers (----); all but Latin letters count twice: they are more tokens.
    """
    import numpy as np

    packed = re.sub(r"(\W)\1{3,}", r"\1", "".join(text.split()))
    codes = np.frombuffer(packed.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    letters = ((codes | np.uint64(32)) - np.uint64(ord("a"))) < np.uint64(26)  # modulo 2**64: smaller ones wrap
    codes = np.repeat(codes, np.where(letters, 1, 2))
    factor, width = np.uint64(0x9E3779B97F4A7C15), 1
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
        hashes = codes * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(1)
        while width < KIN_CHARS and len(hashes) > width:
            hashes = hashes[:-width] * factor + hashes[width:]  # of windows twice as wide
            factor *= factor
            width *= 2
        if width < KIN_CHARS:
            return np.zeros(0, np.uint64)
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0x94D049BB133111EB)  # the low bits now depend on every character
        hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes[hashes % np.uint64(4) == 0])


def _text_hash(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()


# ---------------------------------------------------------------- rows


def make_rows(source: TextSource, tokenizer: Any, count: int | None, length: int, role: str, seed: int = 0) -> Rows:
    """Cut `count` rows of `length` tokens out of the documents of one role; None: as many as there are.

    A row lies within one document where that is long enough; a longer document gives several rows, its first one long
    before its second, so that a small sample holds many documents. Shorter ones are joined with others of the same
    origin and role, the tokenizer's EOS between; the unit of statistics is therefore the row. Origins take turns, so
    that even a small sample has all of them. What is left of a document after its last full row is not used.

    Text is tokenized as plain text: what looks like a special token in it is not one, and none is added, unless the
    tokenizer adds BOS by itself (the model was then trained to see it first): then every row starts with BOS.

    The order of documents depends on `seed` alone, and a smaller `count` gives the first rows of a larger one. Under
    the role `all` there is no split and no shuffling: documents come in their own order, stretches of one running
    text are put together again, and its rows follow each other.
    """
    if role not in ROLES:
        raise RecompileError(f'unknown role "{role}"; known: {", ".join(ROLES)}')
    if length < 2 or (count is not None and count < 1):
        raise RecompileError(f"rows: at least 1 row of 2 tokens is needed, not {count} of {length}")
    by_origin: dict[str, list[Document]] = {}
    for document in _whole_documents(source.documents) if role == "all" else documents_of(source, role):
        by_origin.setdefault(document.origin, []).append(document)
    frame = _Frame.of(tokenizer, length)
    streams = []
    for origin, documents in by_origin.items():
        if role != "all":
            documents.sort(key=lambda d: hashlib.sha256(f"{seed} {_text_hash(d.text)}".encode()).digest())
        streams.append((origin, _rows_of_origin(documents, tokenizer, frame, count)))

    rows: list[tuple[list[int], str, str]] = []
    while streams and (count is None or len(rows) < count):
        alive = []
        for origin, stream in streams:
            if count is not None and len(rows) == count:
                break
            row = next(stream, None)
            if row is not None:
                rows.append((row[0], row[1], origin))
                alive.append((origin, stream))
        streams = alive
    if not rows or (count is not None and len(rows) < count):
        whose = "" if role == "all" else f' for the role "{role}"'
        raise RecompileError(
            f"{source.name}: there is text for {len(rows)} rows of {length} tokens{whose}, and "
            f"{'at least 1' if count is None else count} wanted; ask for fewer or shorter rows, or give more text"
        )
    return _rows(
        [ids for ids, _, _ in rows],
        documents=tuple(document for _, document, _ in rows),
        origins=tuple(origin for _, _, origin in rows),
        source=source.name,
        role=role,
    )


def overlap(first: Rows, second: Rows) -> int:
    """How many different windows of 32 tokens are in both."""
    return len(_windows(first.ids) & _windows(second.ids))


def _windows(ids: Tensor) -> set[bytes]:
    found: set[bytes] = set()
    for row in ids.tolist():
        packed = struct.pack(f"<{len(row)}q", *row)
        found.update(packed[8 * at : 8 * (at + OVERLAP_WINDOW)] for at in range(len(row) - OVERLAP_WINDOW + 1))
    return found


def documents_of(source: TextSource, role: str) -> list[Document]:
    """The documents of a role; of exact copies one."""
    found = {
        _text_hash(document.text): document
        for document, its_role in zip(source.documents, assign_roles(source), strict=True)
        if its_role == role
    }
    return list(found.values())


def _whole_documents(documents: Sequence[Document]) -> list[Document]:
    """Put the stretches of running texts together again."""
    whole: list[tuple[str, list[str]]] = []
    for document in documents:
        if document.continues and whole and whole[-1][0] == document.origin:
            whole[-1][1].append(document.text)
        else:
            whole.append((document.origin, [document.text]))
    return [Document("".join(texts), origin) for origin, texts in whole]


@dataclass(frozen=True)
class _Frame:
    """What is put around the tokens of documents."""

    start: list[int]  # BOS, or nothing
    between: list[int]  # EOS, or an empty line for a tokenizer without one
    body: int  # tokens of text in a row

    @classmethod
    def of(cls, tokenizer: Any, length: int) -> _Frame:
        bos: int | None = getattr(tokenizer, "bos_token_id", None)
        eos: int | None = getattr(tokenizer, "eos_token_id", None)
        adds_bos = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
        between = [eos] if eos is not None else _encode(tokenizer, ["\n\n"])[0]
        start = [bos] if adds_bos and bos is not None else []
        return cls(start, between, length - len(start))


def _rows_of_origin(
    documents: Sequence[Document], tokenizer: Any, frame: _Frame, count: int | None
) -> Iterator[tuple[list[int], str]]:
    """Yield (ids, document names): the first row of every document, then the second of those that have one, ..."""
    most = None if count is None else count * frame.body  # tokens of one document that can be of use
    waiting: list[tuple[list[int], str]] = []
    joined: list[int] = []
    names: list[str] = []
    for name, ids in _encode_documents(documents, tokenizer, most):
        if len(ids) >= frame.body:
            yield frame.start + ids[: frame.body], name
            waiting.append((ids[frame.body :], name))
        elif ids:
            joined += [*frame.between, *ids] if joined else ids
            names.append(name)
            if len(joined) >= frame.body:
                yield frame.start + joined[: frame.body], "+".join(names)
                joined, names = [], []
    while waiting:
        waiting = [(ids, name) for ids, name in waiting if len(ids) >= frame.body]
        for at, (ids, name) in enumerate(waiting):
            yield frame.start + ids[: frame.body], name
            waiting[at] = (ids[frame.body :], name)


def _encode_documents(
    documents: Sequence[Document], tokenizer: Any, most: int | None
) -> Iterator[tuple[str, list[int]]]:
    """Yield (name, ids) of each document, tokenizing a few at a time, and of a long one no more than `most` needs."""
    for start in range(0, len(documents), ENCODE_BATCH):
        batch = documents[start : start + ENCODE_BATCH]
        stepped()
        chars = max(8 * most, 100_000) if most is not None else None
        encoded = _encode(tokenizer, [document.text[:chars] for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            taken = chars
            while taken is not None and most is not None and taken < len(document.text) and len(ids) < most + 16:
                taken *= 2
                stepped()
                ids = _encode(tokenizer, [document.text[:taken]])[0]
            # The last tokens before a cut may be others than in the whole text, so they are never used.
            if taken is not None and most is not None and taken < len(document.text):
                ids = ids[:most]
            yield f"{document.origin}-{_text_hash(document.text)[:8]}", ids


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Tokenize as plain text: "<s>" in a web page is four characters, not the start of a sequence."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [list(ids) for ids in encoded]


def _rows(
    ids: Tensor | list[list[int]],
    documents: tuple[str, ...],
    origins: tuple[str, ...],
    source: str,
    role: str,
    counted: Tensor | None = None,
) -> Rows:
    import torch

    tensor = torch.as_tensor(ids, dtype=torch.int64).contiguous()
    return Rows(tensor, documents, origins, source, role, rows_sha256(tensor, counted))


def rows_sha256(ids: Tensor, counted: Tensor | None = None) -> str:
    """Of the shape and the ids, and of what counts where that is not all; int64 and bool [rows, tokens]."""
    digest = hashlib.sha256(struct.pack("<2q", *ids.shape))
    digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    if counted is not None:
        digest.update(counted.cpu().numpy().astype("u1").tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- rows in files


def save_rows(rows: Rows, path: Path | str) -> None:
    """Write a safetensors file with the key `input_ids`, int64 [rows, tokens]; the rest goes in its metadata."""
    about = {"documents": rows.documents, "origins": rows.origins, "source": rows.source, "role": rows.role}
    metadata = {"recompile_rows": json.dumps(about)}
    save_tensors(path, {"input_ids": rows.ids}, metadata)


def rows_from_file(path: Path | str) -> Rows:
    """Read the key `input_ids` of a safetensors file: int64 (or int32) [rows, tokens].

    A file that `save_rows` wrote comes back as it was; of any other, each row is a document, and the role is "all".
    """
    import torch

    path = Path(path)
    with open_tensors(path, error=RecompileError) as stored:
        keys = sorted(stored.keys())
        ids = stored.get_tensor("input_ids") if "input_ids" in keys else None
        metadata = stored.metadata() or {}
    if "recompile_trace" in metadata:
        raise RecompileError(f"{path}: is a trace, whose rows are padded and have roles; give it with {{trace}}")
    if ids is None:
        raise RecompileError(f'{path}: no key "input_ids"; its keys are {", ".join(keys) or "none at all"}')
    if ids.dtype not in (torch.int64, torch.int32):
        raise RecompileError(f"{path}: input_ids has dtype {str(ids.dtype).removeprefix('torch.')}; int64 is wanted")
    if ids.ndim != 2:
        raise RecompileError(f"{path}: input_ids has shape {list(ids.shape)}; [rows, tokens] is wanted")
    if ids.shape[0] < 1 or ids.shape[1] < 2:
        raise RecompileError(f"{path}: input_ids has shape {list(ids.shape)}; at least 1 row of 2 tokens is needed")
    if int(ids.min()) < 0:
        row, column = (ids < 0).nonzero()[0].tolist()
        raise RecompileError(f"{path}: input_ids[{row}, {column}] is {int(ids[row, column])}; a token is 0 or more")
    about = _about_rows(metadata.get("recompile_rows"), ids.shape[0])
    if about is None:
        names = tuple(f"row-{rows_sha256(row[None])[:16]}" for row in ids)
        return _rows(ids, names, (path.name,) * ids.shape[0], str(path), "all")
    return _rows(ids, **about)


def _about_rows(text: str | None, count: int) -> dict[str, Any] | None:
    """What `save_rows` noted, if that is whole."""
    try:
        about = json.loads(text or "")
        documents, origins = tuple(map(str, about["documents"])), tuple(map(str, about["origins"]))
        kept = {"documents": documents, "origins": origins, "source": str(about["source"]), "role": str(about["role"])}
    except (ValueError, TypeError, KeyError):
        return None
    return kept if len(documents) == len(origins) == count and kept["role"] in ROLES else None


# ---------------------------------------------------------------- tokenizers

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
    from transformers import AutoTokenizer  # noqa: F401 - here, so that the child need not

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


def check_ids(rows: Rows, vocab_size: int) -> None:
    """Refuse rows with a token that a model does not have."""
    largest = int(rows.ids.max())
    if largest >= vocab_size:
        row, column = (rows.ids == largest).nonzero()[0].tolist()
        raise MismatchError(
            f"{rows.source}: token {largest} at row {row}, position {column} is beyond the model's vocabulary of "
            f"{vocab_size}: wrong tokenizer, or rows of another model"
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
