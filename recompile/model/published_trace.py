"""Traces of other tools and publishers: token ids as JSON, JSON lines or parquet.

A row is an object; a parquet file has columns of these names:

    input_ids      the prompt, where response_ids stand beside it, else the whole row
    response_ids   what the model wrote after it
    response       in place of response_ids: 1 for each token of input_ids that the model wrote, else 0; also called
                   response_mask or loss_mask. Rows with neither are responses from their second token on
    role           calibrate, choose, accept or report, of every row or of none: then a hash of what was asked decides
    conversation   any value: its turns see each other, so that they have one role
    kind           a name, for slices

A JSON file is a list of rows, or an object with `rows` and, of use here, `model` and `vocab_size`, as exllamav3's
traces are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recompile.errors import RecompileError
from recompile.io.files import open_regular, parse_json, read_bytes, read_json
from recompile.io.schema import describe
from recompile.model.texts import ROLE_SHARES
from recompile.model.trace import Trace, TraceAbout, make_trace, role_of_prompt

MOST_TOKENS = 2**25  # of a parquet file, a few kB of which can stand for any number
SUFFIXES = (".json", ".jsonl", ".parquet")
MASKS = ("response", "response_mask", "loss_mask")


@dataclass(frozen=True)
class _Row:
    prompt: list[int]  # all before the first token that was written
    rest: list[int]
    written: list[bool]  # of the rest
    role: str | None
    conversation: str | None
    kind: str

    @property
    def asked(self) -> list[int]:
        """What decides its role: the prompt, or the whole of a row that has none."""
        return self.prompt if len(self.prompt) > 1 else [*self.prompt, *self.rest]


def read_published(path: Path) -> Trace:
    """Read a file of one of SUFFIXES. Raises RecompileError naming the file and the row, counted from 0, for anything
    that is no row, for rows of which only some have a role, and for one prompt or conversation in two roles."""
    about, stored = _stored(path)
    if not stored:
        raise RecompileError(f"{path}: holds no rows")
    rows = [_row(row, f"{path}: row {number}") for number, row in enumerate(stored)]
    without = [number for number, row in enumerate(rows) if row.role is None]
    if 0 < len(without) < len(rows):
        raise RecompileError(
            f"{path}: row {without[0]} has no role, and others have one; give all of them one, or none"
        )
    keys = _keys(rows)
    roles = [row.role or role_of_prompt(key) for row, key in zip(rows, keys, strict=True)]
    _check_roles(path, keys, roles)
    vocab = about.get("vocab_size")
    trace = make_trace(
        [row.prompt for row in rows],
        [row.rest for row in rows],
        TraceAbout(
            kinds=tuple(row.kind for row in rows),
            roles=tuple(roles),
            prompts=tuple(keys),
            ended=(False,) * len(rows),
            base=Path(str(about.get("model") or "")).name,
            base_fingerprint="",
            tokenizer_sha256=None,
            template_sha256="",
            prompts_source=path.name,
            temperature=0.0,
            seed=0,
            max_new_tokens=max(len(row.rest) for row in rows),
            dtype="",
            device="",
            vocab=vocab if isinstance(vocab, int) and not isinstance(vocab, bool) and vocab > 0 else 0,
            tools_in_text=False,
            thinking_switch=False,
            versions={},
        ),
    )
    for number, row in enumerate(rows):
        for place, is_written in enumerate(row.written, start=len(row.prompt)):
            if not is_written:
                trace.response[number, place] = False
    return trace


def _stored(path: Path) -> tuple[Mapping[str, Any], Sequence[Any]]:
    """What a file says of itself, and its rows."""
    if path.suffix == ".parquet":
        return {}, _parquet_rows(path)
    if path.suffix == ".jsonl":
        lines = read_bytes(path, kind="json", error=RecompileError).split(b"\n")
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        return {}, [parse_json(line, str(path), error=RecompileError, line=number) for number, line in numbered]
    found = read_json(path, error=RecompileError)
    if isinstance(found, dict) and isinstance(found.get("rows"), list):
        return found, found["rows"]
    if not isinstance(found, list):
        raise RecompileError(f'{path}: wanted a list of rows, or an object with the key "rows"')
    return {}, found


def _parquet_rows(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise RecompileError(
            f"{path}: pyarrow, which reads parquet, is not installed; pip install 'recompile[parquet]', or give "
            f"JSON lines"
        ) from error
    try:
        with open_regular(path, error=RecompileError) as raw, ParquetFile(raw) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            counts = [group.column(column).num_values for group in groups for column in range(group.num_columns)]
            if sum(counts) > MOST_TOKENS:
                raise RecompileError(
                    f"{path}: holds {sum(counts)} values, at most {MOST_TOKENS} are read; take fewer of its rows"
                )
            return list(file.read().to_pylist())
    except (OSError, ArrowException) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise RecompileError(f"{path}: not a readable parquet file: {reason}") from error


def _row(row: Any, place: str) -> _Row:
    if not isinstance(row, dict) or row.get("input_ids") is None:
        raise RecompileError(f"{place}: wanted an object with input_ids")
    tokens = _integers(row["input_ids"], f"{place}: input_ids")
    masks = [name for name in MASKS if row.get(name) is not None]
    if row.get("response_ids") is not None:
        if masks:
            raise RecompileError(f"{place}: has response_ids and {masks[0]}; wanted one of them")
        prompt, rest = tokens, _integers(row["response_ids"], f"{place}: response_ids")
        written = [True] * len(rest)
    else:
        marks = [0, *[1] * (len(tokens) - 1)]
        if masks:
            given = row[masks[0]] if isinstance(row[masks[0]], list) else []
            marks = _integers([int(mark) if isinstance(mark, bool) else mark for mark in given], f"{place}: {masks[0]}")
            if len(marks) != len(tokens) or not set(marks) <= {0, 1}:
                raise RecompileError(f"{place}: {masks[0]} is no list of {len(tokens)} of 0 and 1, one a token")
        first = marks.index(1) if 1 in marks else 0
        prompt, rest, written = tokens[:first], tokens[first:], [mark == 1 for mark in marks[first:]]
    if not prompt or not rest or not any(written):
        raise RecompileError(f"{place}: wanted a token before the response, and one of the response at least")
    role = row.get("role")
    if role is not None and (not isinstance(role, str) or role not in ROLE_SHARES):
        raise RecompileError(f"{place}: role is {describe(role)}, wanted one of {', '.join(ROLE_SHARES)}")
    conversation = row.get("conversation")
    kind = row.get("kind")
    return _Row(
        prompt, rest, written, role, None if conversation is None else str(conversation), str(kind) if kind else "rows"
    )


def _integers(values: Any, place: str) -> list[int]:
    try:
        found: NDArray[Any] = np.asarray(values)
    except ValueError:  # lists of several lengths in it
        found = np.zeros(0)
    if found.ndim != 1 or found.dtype.kind not in "iu" or not len(found) or int(found.min()) < 0:
        raise RecompileError(f"{place}: wanted a list of whole numbers, 0 or more")
    if int(found.max()) > 2**31:
        raise RecompileError(f"{place}: {int(found.max())} is no token")
    return [int(value) for value in found]


def _keys(rows: Sequence[_Row]) -> list[str]:
    """What every row answers: the hash of the first prompt of its conversation, where that is said; else of the
    shortest prompt that its own begins with, for a later turn repeats the turns before it."""
    first: dict[str, list[int]] = {}
    for row in rows:
        if row.conversation is not None:
            known = first.get(row.conversation, row.asked)
            first[row.conversation] = min(known, row.asked, key=lambda prompt: (len(prompt), prompt))
    prompts = [row.asked if row.conversation is None else first[row.conversation] for row in rows]
    heads: dict[int, list[int]] = {}
    head: list[int] | None = None
    for number in sorted(range(len(rows)), key=lambda number: prompts[number]):
        if head is None or prompts[number][: len(head)] != head:
            head = prompts[number]
        heads[number] = head
    return [sha256(np.asarray(heads[number], dtype="<i8").tobytes()).hexdigest() for number in range(len(rows))]


def _check_roles(path: Path, keys: Sequence[str], roles: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for number, (key, role) in enumerate(zip(keys, roles, strict=True)):
        other = seen.setdefault(key, number)
        if roles[other] != role:
            raise RecompileError(
                f"{path}: rows {other} and {number} answer the same prompt or conversation, and have the roles "
                f"{roles[other]} and {role}; what was asked has one role"
            )
