"""A trace: rows of tokens that a model wrote itself, in answer to prompts, in one safetensors file.

Every prompt belongs to exactly one role, decided by a hash of what is asked, so that no row can be in two roles,
whichever command reads the file. The tensors of the file:

    input_ids  int64 [rows, tokens]   prompt and response, padded with zeros on the right
    response   uint8 [rows, tokens]   1 where the token was written by the model, its end included; 0 elsewhere
    lengths    int64 [rows]           tokens of a row without the padding

and its metadata, `recompile_trace`: JSON with the fields of `TraceAbout`.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from recompile.checkpoint.safetensors_files import open_tensors
from recompile.errors import RecompileError
from recompile.io.files import parse_json
from recompile.io.schema import read_as
from recompile.io.tensors import save_tensors
from recompile.model.texts import ROLE_SHARES, role_of_key

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "recompile_trace"
VERSION = 1
# Changing it moves prompts between roles: never do it within one series of measurements.
ROLE_SALT = 1


def role_of_prompt(prompt_sha256: str) -> str:
    """The role of the row that answers a prompt; a pure function of what is asked."""
    return role_of_key(f"trace{ROLE_SALT} {prompt_sha256}")


@dataclass(frozen=True)
class TraceAbout:
    """What a trace says of itself.

    kinds, roles, prompts: a row: its kind, its role, the hash of what was asked
    ended: a row: whether the model ended it by itself, or the limit on tokens did
    """

    kinds: tuple[str, ...]
    roles: tuple[str, ...]
    prompts: tuple[str, ...]
    ended: tuple[bool, ...]
    base: str  # the directory's name, for people
    base_fingerprint: str
    tokenizer_sha256: str | None
    template_sha256: str
    prompts_source: str
    temperature: float
    seed: int
    max_new_tokens: int
    dtype: str
    device: str
    vocab: int  # tokens that could be written; 0 where another tool does not say
    tools_in_text: bool  # the template has no place for tools, so that schemas stand in the first message
    thinking_switch: bool  # the template has one
    versions: dict[str, str]
    version: int = VERSION
    writer: str = ""  # where a server wrote it: the name of the model there
    is_retokenized: bool = False  # some responses came as text

    @property
    def origin(self) -> str:
        """Who wrote it and how, for reports."""
        if not self.base_fingerprint:
            return f"of another tool, written by {self.base}" if self.base else "of another tool"
        drawn = "greedily" if self.temperature == 0 else f"at temperature {self.temperature:g}, seed {self.seed}"
        there = f" on a server ({self.writer})" if self.writer else ""
        again = ", text tokenized again" if self.is_retokenized else ""
        return f"written by {self.base}{there} {drawn}{again}"


@dataclass(frozen=True, eq=False)
class Trace:
    """ids: int64 [rows, tokens]; response: bool [rows, tokens]; lengths: int64 [rows]."""

    ids: Tensor
    response: Tensor
    lengths: Tensor
    about: TraceAbout

    @property
    def counts(self) -> dict[str, int]:
        """Rows of every role."""
        return {role: self.about.roles.count(role) for role in ROLE_SHARES}

    def of_role(self, role: str) -> Trace:
        """The rows of one role ("all": every row), without padding that none of them needs."""
        kept = [row for row, its in enumerate(self.about.roles) if role in (its, "all")]
        return self._rows(kept)

    def first(self, count: int | None) -> Trace:
        """At most so many rows; all for None."""
        return self if count is None else self._rows(list(range(min(count, len(self.ids)))))

    def _rows(self, kept: Sequence[int]) -> Trace:
        from dataclasses import replace

        width = int(self.lengths[list(kept)].max()) if kept else 0
        about = self.about
        return Trace(
            self.ids[list(kept), :width],
            self.response[list(kept), :width],
            self.lengths[list(kept)],
            replace(
                about,
                kinds=tuple(about.kinds[row] for row in kept),
                roles=tuple(about.roles[row] for row in kept),
                prompts=tuple(about.prompts[row] for row in kept),
                ended=tuple(about.ended[row] for row in kept),
            ),
        )

    def cut(self, length: int) -> Trace:
        """The first `length` tokens of every row, without the rows whose response begins later."""
        from dataclasses import replace

        response = self.response[:, :length]
        kept = response.any(1).nonzero().flatten().tolist()
        whole = replace(self, ids=self.ids[:, :length], response=response, lengths=self.lengths.clamp(max=length))
        return whole._rows(kept)

    @property
    def sha256(self) -> str:
        """Of the shape, the ids, the lengths and the response mask."""
        digest = hashlib.sha256(struct.pack("<2q", *self.ids.shape))
        for tensor in (self.ids, self.lengths):
            digest.update(tensor.cpu().numpy().astype("<i8").tobytes())
        digest.update(self.response.cpu().numpy().astype("u1").tobytes())
        return digest.hexdigest()

    def counted(self, positions: str) -> Tensor:
        """bool [rows, tokens]: the places whose predictions count.

        "response": those that predict a token of the response, so from the last token of the prompt to the last but one
        of the row; "all": every place that is no padding.
        """
        import torch

        if positions == "all":
            return torch.arange(self.ids.shape[1])[None] < self.lengths[:, None]
        counted = torch.zeros_like(self.response)
        counted[:, :-1] = self.response[:, 1:]
        return counted


def make_trace(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], about: TraceAbout) -> Trace:
    """Put prompts and what was written after each into padded rows."""
    import torch

    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    response = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (tokens, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        response[row, len(prompt) : len(tokens)] = True
    return Trace(ids, response, torch.tensor([len(row) for row in rows]), about)


def save_trace(trace: Trace, path: Path | str) -> None:
    """Write the file; whole or not at all. Raises OutputError."""
    import torch

    tensors = {"input_ids": trace.ids, "response": trace.response.to(torch.uint8), "lengths": trace.lengths}
    metadata = {"made_by": "recompile", METADATA_KEY: json.dumps(asdict(trace.about))}
    save_tensors(path, tensors, metadata, checked=True)


def read_trace(path: Path | str) -> Trace:
    """Read and check what `save_trace` wrote, or a publisher's JSON, JSON lines or parquet
    (recompile.model.published_trace). Raises RecompileError for anything else, or for a prompt in two roles."""
    import torch

    from recompile.model.published_trace import SUFFIXES, read_published

    path = Path(path)
    if path.suffix in SUFFIXES:
        found_trace = read_published(path)
        if found_trace.about.vocab:
            check_trace_vocabulary(path, found_trace.ids, found_trace.about.vocab)
        return found_trace
    with open_tensors(path, error=RecompileError, way_out="; make the trace again", checks=True) as stored:
        metadata = stored.metadata() or {}
        if METADATA_KEY not in metadata:
            raise RecompileError(f"{path}: is no trace: its metadata has no {METADATA_KEY}; make one with model_trace")
        names = sorted(stored.keys())
        found = {name: stored.get_tensor(name) for name in ("input_ids", "response", "lengths") if name in names}
    wanted = {"input_ids": (torch.int64, 2), "response": (torch.uint8, 2), "lengths": (torch.int64, 1)}
    for name, (dtype, axes) in wanted.items():
        tensor = found.get(name)
        if tensor is None or tensor.dtype != dtype or tensor.ndim != axes:
            has = "none" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise RecompileError(f"{path}: {name} is {has}; a trace has {str(dtype)[6:]} with {axes} axes")
    ids, response, lengths = (found[name] for name in wanted)
    about = _about(path, metadata[METADATA_KEY], len(ids))
    _check_rows(path, ids, response, lengths)
    check_trace_vocabulary(path, ids, about.vocab)
    return Trace(ids, response.bool(), lengths, about)


def _about(path: Path, text: str, rows: int) -> TraceAbout:
    value = parse_json(text, f"{path}: {METADATA_KEY}", error=RecompileError)
    if not isinstance(value, dict) or value.get("version") != VERSION:
        version = value.get("version") if isinstance(value, dict) else None
        raise RecompileError(f"{path}: a trace of version {version!r}; this version reads {VERSION}; make it again")
    names = [field.name for field in fields(TraceAbout) if field.default is MISSING or field.name in value]
    missing = [name for name in names if name not in value]
    if missing:
        raise RecompileError(f"{path}: {METADATA_KEY} has no {missing[0]}; make the trace again")
    for name in ("kinds", "roles", "prompts", "ended"):
        listed = value[name]
        kind = bool if name == "ended" else str
        if not isinstance(listed, list) or len(listed) != rows or not all(isinstance(item, kind) for item in listed):
            raise RecompileError(f"{path}: {METADATA_KEY}.{name} is no list of {rows}, one a row; make the trace again")
    for row, (prompt, role) in enumerate(zip(value["prompts"], value["roles"], strict=True)):
        if not re.fullmatch("[0-9a-f]{64}", prompt) or role != role_of_prompt(prompt):
            raise RecompileError(
                f"{path}: row {row} has the role {role!r}, and its prompt another; rows of one role must not be used "
                f"in another: make the trace again"
            )
    if len(set(value["prompts"])) < rows:
        raise RecompileError(f"{path}: two rows answer the same prompt; make the trace again")
    known = {name: value[name] for name in names}
    return read_as(TraceAbout, known, f"{path}: {METADATA_KEY}", error=RecompileError, unbounded=frozenset({"seed"}))


def _check_rows(path: Path, ids: Tensor, response: Tensor, lengths: Tensor) -> None:
    import torch

    rows, width = ids.shape
    if rows < 1 or width < 2 or response.shape != ids.shape or lengths.shape != (rows,):
        raise RecompileError(
            f"{path}: input_ids {list(ids.shape)}, response {list(response.shape)} and lengths {list(lengths.shape)} "
            f"do not fit together; make the trace again"
        )
    if int(ids.min()) < 0 or int(lengths.min()) < 2 or int(lengths.max()) > width or int(response.max()) > 1:
        raise RecompileError(f"{path}: holds tokens, lengths or marks out of range; make the trace again")
    padding = torch.arange(width)[None] >= lengths[:, None]
    if bool(response.bool()[padding].any()) or bool(response[:, 0].any()) or not bool(response.bool().any(1).all()):
        raise RecompileError(
            f"{path}: marks padding or a first token as written, or none of a row; make the trace again"
        )


def check_trace_vocabulary(path: Path, ids: Tensor, vocab: int) -> None:
    """Raise RecompileError for a token of ids, int64 [rows, tokens], that a vocabulary of so many does not have."""
    if int(ids.max()) >= vocab:
        row, place = (ids >= vocab).nonzero()[0].tolist()
        raise RecompileError(
            f"{path}: row {row} has token {int(ids[row, place])} at place {place}, and the vocabulary {vocab} tokens; "
            f"it is damaged, or of another model"
        )
