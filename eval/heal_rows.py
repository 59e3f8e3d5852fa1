"""The rows that a build is healed and judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.errors import ArgumentError
from recompile.model.rows import RowOptions, check_vocabulary, first_with_tokenizer, rows_of_text
from recompile.model.tokens import Rows
from recompile.model.used_rows import UsedRows, check_apart, recorded_rows

LEAST_TRAIN_ROWS = 4
ROLES = {"train": "calibrate", "choose": "choose", "accept": "accept", "report": "report"}  # of a text or trace


@dataclass(frozen=True)
class HealRows:
    """int64 [rows, tokens] each; roles as above. second: another kind of text, named by `second_source`.

    counted: by name, bool [rows, tokens], the places of these rows whose KL counts; of those not named all do
    used: which rows they are, for the report
    """

    train: Tensor
    choose: Tensor
    accept: Tensor
    report: Tensor
    second: Tensor
    source: str = ""
    second_source: str = ""
    counted: Mapping[str, Tensor] = field(default_factory=dict)
    used: tuple[UsedRows, ...] = ()
    positions: str = "all"

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                digest.update(repr(tuple(value.shape)).encode() + value.contiguous().numpy().tobytes())
        for name, counted in sorted(self.counted.items()):
            digest.update(name.encode() + counted.contiguous().numpy().tobytes())
        return digest.hexdigest()


def heal_rows(base: Checkpoint, build: Checkpoint, where: RowOptions, tokens: int) -> tuple[HealRows, int | None]:
    """Rows of every role, where.rows of each that judges and at most `tokens` tokens to train, and the true vocabulary.
    None trains that the build was calibrated on, unless there are few others: those it fits already, and a compensated
    build so well (a seventh of the KL of other rows) that they say little of what is wrong with it.

    Raises RecompileError for text that is too short, ArgumentError for input_ids, which have no roles.
    """
    from recompile.model import texts

    if where.input_ids is not None:
        raise ArgumentError("{input_ids}: rows of several roles are needed; give text with {text} or {dataset}")
    directories = [base.path, build.path]
    records = recorded_rows([build.path])
    parts = {"train": _train_rows(where, directories, [used for _, used in records], tokens)}
    parts |= {role: where.read(directories, role)[0] for role in ("choose", "accept", "report")}
    used = tuple(UsedRows.of(rows, ROLES[name]) for name, rows in parts.items())
    for name, rows in parts.items():
        here = [(f"healing ({other.role} rows)", other) for other in used]
        check_apart(rows, ROLES[name], [*records, *here])
    own = any(given is not None for given in (where.text, where.dataset, where.trace))
    other = texts.default_text() if own else texts.other_text(texts.default_text())
    second, vocab = rows_of_text(other, first_with_tokenizer(directories), None, where.length, "report")
    found = HealRows(
        **{name: rows.ids for name, rows in parts.items()},
        second=second.ids[: where.rows],
        source=parts["report"].source,
        second_source=second.source,
        counted={name: rows.counted for name, rows in parts.items() if rows.counted is not None},
        used=used,
        positions=parts["report"].positions,
    )
    return found, check_vocabulary(base, vocab)


def _train_rows(where: RowOptions, directories: Sequence[Path], seen: Sequence[UsedRows], tokens: int) -> Rows:
    wanted = -(-tokens // where.length)
    calibrated = [used for used in seen if used.role == ROLES["train"]]
    found = where.read_up_to(
        directories, ROLES["train"], wanted + sum(len(used.documents) for used in calibrated), LEAST_TRAIN_ROWS
    )
    known = frozenset().union(*(used.parts for used in calibrated))
    fresh = [row for row, document in enumerate(found.documents) if known.isdisjoint(document.split("+"))]
    if len(fresh) >= max(LEAST_TRAIN_ROWS, min(wanted, len(found.ids) // 2)):
        return found.of(fresh[:wanted])
    return found.part(0, wanted)
