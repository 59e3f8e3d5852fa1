"""Documents: where text comes from, and its split into roles that never overlap.

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
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.errors import RecompileError
from recompile.io.files import read_text

if TYPE_CHECKING:
    import numpy as np

# Shares of the documents. Quantizing wants the most rows; `report` more than `choose`, since its standard error is what
# is printed at the end. Changing a share moves documents between roles: never do it within one series of measurements.
ROLE_SHARES: Mapping[str, float] = {"calibrate": 0.40, "choose": 0.20, "accept": 0.15, "report": 0.25}
# Of 400 tried, the one that splits every domain of both default texts nearest to these shares.
ROLE_SALT = 66
ROLES = (*ROLE_SHARES, "all")

STRETCH_CHARS = 6000  # about three rows of 512 tokens of English
LONGEST_CHARS = 20_000  # a document above this would fill a small sample by itself, so a user's text is cut here
FEW_DOCUMENTS = 16  # below this a hash split by documents would leave roles empty, so long ones are cut
SHORTEST_ARTICLE_CHARS = 400  # half of the encyclopedia's records are a title and nothing else
KIN_CHARS = 64  # a power of two; about 17 tokens of English, so half of the window that `tokens.overlap` looks for
MANY_DOCUMENTS = 16  # what more of them (and more than a twentieth of all) repeat is a form, not a copy


@dataclass(frozen=True)
class Document:
    """A text that belongs to one role as a whole."""

    text: str
    origin: str  # the domain it comes from: "wiki", "code", a file's name
    continues: bool = False  # whether it follows, in one running text, directly on the document before it

    @functools.cached_property
    def hash(self) -> str:
        """Of its words; what decides its role, its place and its name."""
        return text_hash(self.text)


@dataclass(frozen=True)
class TextSource:
    """Documents, and a name that says where they come from (it is printed in reports)."""

    name: str
    documents: tuple[Document, ...]


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
    return _bundled_text(folder, multilingual)


@functools.lru_cache(maxsize=2)  # every role of it asks again
def _bundled_text(folder: Path, multilingual: bool) -> TextSource:
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
    hashes = [document.hash for document in source.documents]
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


def text_hash(text: str) -> str:
    """Of the words alone: blanks and line ends do not count."""
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).hexdigest()


def documents_of(source: TextSource, role: str) -> list[Document]:
    """The documents of a role; of exact copies one."""
    found = {
        document.hash: document
        for document, its_role in zip(source.documents, assign_roles(source), strict=True)
        if its_role == role
    }
    return list(found.values())


def whole_documents(documents: Sequence[Document]) -> list[Document]:
    """The stretches of running texts put together again."""
    whole: list[tuple[str, list[str]]] = []
    for document in documents:
        if document.continues and whole and whole[-1][0] == document.origin:
            whole[-1][1].append(document.text)
        else:
            whole.append((document.origin, [document.text]))
    return [Document("".join(texts), origin) for origin, texts in whole]
