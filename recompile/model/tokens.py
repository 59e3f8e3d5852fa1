"""Documents -> rows of tokens, and rows in files.

The documents of a role (`recompile.model.texts`) alone make its rows, so that rows of different roles share none.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.safetensors_files import open_tensors
from recompile.errors import MismatchError, RecompileError
from recompile.io.tensors import save_tensors
from recompile.model.guarded import stepped
from recompile.model.texts import ROLES, Document, TextSource, documents_of, whole_documents

if TYPE_CHECKING:
    from torch import Tensor

OVERLAP_WINDOW = 32  # tokens; shorter stretches repeat by chance in honest text
ENCODE_BATCH = 8  # documents tokenized at a time, at most
FEWEST_CHARS = 2000  # of a long document that are tokenized at a time


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


# ---------------------------------------------------------------- rows


def check_shape(count: int | None, length: int) -> None:
    """Raise RecompileError for no rows, or rows without anything to predict. count: None: as many as there are"""
    if count is not None and count < 1:
        raise RecompileError(f"{{rows}} {count}: wanted at least 1")
    if length < 2:
        raise RecompileError(f"{{length}} {length}: wanted at least 2 tokens in a row; the second is predicted")


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
    check_shape(count, length)
    by_origin: dict[str, list[Document]] = {}
    for document in whole_documents(source.documents) if role == "all" else documents_of(source, role):
        by_origin.setdefault(document.origin, []).append(document)
    frame = _Frame.of(tokenizer, length)
    streams = []
    for origin, documents in by_origin.items():
        if role != "all":
            documents.sort(key=lambda d: hashlib.sha256(f"{seed} {d.hash}".encode()).digest())
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
    first = None if count is None else frame.body
    waiting: list[tuple[Document, list[int] | None]] = []  # what follows the first row; None: not tokenized yet
    joined: list[int] = []
    names: list[str] = []
    for document, ids, is_whole in _encode_documents(documents, tokenizer, first):
        name = _name(document)
        if len(ids) >= frame.body:
            yield frame.start + ids[: frame.body], name
            waiting.append((document, ids[frame.body :] if is_whole else None))
        elif ids:
            joined += [*frame.between, *ids] if joined else ids
            names.append(name)
            if len(joined) >= frame.body:
                yield frame.start + joined[: frame.body], "+".join(names)
                joined, names = [], []
    most = None if count is None else count * frame.body  # tokens of one document that can be of use
    while waiting:
        left: list[tuple[Document, list[int] | None]] = []
        for document, rest in waiting:
            if rest is None:
                ((_, ids, _),) = _encode_documents([document], tokenizer, most)
                rest = ids[frame.body :]
            if len(rest) >= frame.body:
                yield frame.start + rest[: frame.body], _name(document)
                left.append((document, rest[frame.body :]))
        waiting = left


def _name(document: Document) -> str:
    return f"{document.origin}-{document.hash[:8]}"


def _encode_documents(
    documents: Sequence[Document], tokenizer: Any, most: int | None
) -> Iterator[tuple[Document, list[int], bool]]:
    """Yield each document, its tokens, and whether these are all of them: of a long one no more are made than `most`
    needs. Few documents are tokenized at a time at first: few rows need no more."""
    start, taking = 0, 1
    while start < len(documents):
        batch = documents[start : start + taking]
        start, taking = start + taking, min(2 * taking, ENCODE_BATCH)
        stepped()
        chars = max(8 * most, FEWEST_CHARS) if most is not None else None
        encoded = _encode(tokenizer, [document.text[:chars] for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            taken = chars
            while taken is not None and most is not None and taken < len(document.text) and len(ids) < most + 16:
                taken *= 2
                stepped()
                ids = _encode(tokenizer, [document.text[:taken]])[0]
            is_whole = taken is None or taken >= len(document.text)
            # The last tokens before a cut may be others than in the whole text, so they are never used.
            yield document, ids if is_whole else ids[:most], is_whole


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


def check_ids(rows: Rows, vocab_size: int) -> None:
    """Refuse rows with a token that a model does not have."""
    largest = int(rows.ids.max())
    if largest >= vocab_size:
        row, column = (rows.ids == largest).nonzero()[0].tolist()
        raise MismatchError(
            f"{rows.source}: token {largest} at row {row}, position {column} is beyond the model's vocabulary of "
            f"{vocab_size}: wrong tokenizer, or rows of another model"
        )


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
