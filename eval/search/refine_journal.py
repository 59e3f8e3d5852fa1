"""The journal of a refining search: what the models answered, so that an interrupted search goes on as if it had not
been: it is run again from its start, and asks the models only what it has not asked before."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eval.mixes.oracle import MixOracle
from eval.search.job import Search
from recompile.arguments import spell
from recompile.errors import JournalError
from recompile.io.journal import LineJournal
from recompile.optimize.choose import profile_sha256
from recompile.optimize.refine import RefineStep, SwapModel

FORMAT = 4
_FLAGS = {"max_step": "--max-step", "pool": "--pool", "active_bpw": "--active-bpw"}


@dataclass
class RefineJournal:
    """An open journal; an oracle for `recompile.optimize.refine`. `choice` and `steps` are where the search stands."""

    path: Path
    file: LineJournal
    oracle: MixOracle
    choice: dict[str, str]
    steps: int = 0  # done
    _kept: deque[dict[str, Any]] = field(default_factory=deque)  # lines of an interrupted run that are not used yet
    _swaps: list[tuple[str, str]] = field(default_factory=list)  # in the order of packed numbers

    @staticmethod
    def open(path: Path, search: Search, rows_sha256: str, oracle: MixOracle) -> RefineJournal:
        """Begin a journal, or go on with one of the same profile, limits, start and rows.

        A journal of another search is begun anew: what it holds is a recipe that was written already. A line cut off
        by a crash is dropped. Raises JournalError where it cannot be written.
        """
        header = _header(search, rows_sha256)
        limits = [replace(row, name=spell(row.name, _FLAGS)) for row in search.limits]
        before = _header(replace(search, limits=limits), rows_sha256)  # of a version whose limits were called by flags
        journal = LineJournal(path)
        try:
            lines = journal.values()
            if not lines or lines[0] not in (header, before):
                journal.begin(header)
                lines = []
            journal.drop_torn()
        except BaseException:
            journal.close()
            raise
        return RefineJournal(path, journal, oracle, dict(search.start), _kept=deque(lines[1:]))

    @property
    def is_replaying(self) -> bool:
        return bool(self._kept)

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        """As the oracle's. Raises JournalError."""
        replayed = self.is_replaying
        found = self._answer("costs", choice, lambda: self._packed(self.oracle.linearise(choice, step)))
        model = self._unpacked(found)
        if replayed:
            self.oracle.recall(model)
        return model

    def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
        """As the oracle's. Raises JournalError."""
        found = self._answer(
            "kl", choice, lambda: {"rows": list(self.oracle.measure(choice)), "rough": self.oracle.rough}
        )
        self.oracle.rough = found["rough"]  # what is measured after an interruption is measured alike
        return list(found["rows"])

    def changes(
        self, choice: Mapping[str, str], swaps: Sequence[Mapping[str, str]], step: int
    ) -> Sequence[Sequence[float]]:
        """As the oracle's. Raises JournalError."""
        found = self._answer("changes", choice, lambda: self.oracle.changes(choice, swaps, step))
        return [list(rows) for rows in found]

    def append(self, step: RefineStep) -> None:
        """Keep a step, for people to read; on disk when this returns. Raises JournalError."""
        self.choice, self.steps = dict(step.choice), step.step + 1
        if self._kept and "step" in self._kept[0]:
            self._kept.popleft()
            return
        self._write(
            {
                "step": step.step,
                "accepted": step.accepted,
                "damping": step.damping,
                "bits": step.bits,
                "kl_nats": step.kl_nats,
                "change_nats": step.change_nats,
                "change_std_error": step.change_std_error,
                "moved": step.moved,
                "predicted_nats": step.predicted_nats,
                "measured": step.measured,
                "choice": dict(step.choice),
            }
        )

    def _answer(self, asked: str, choice: Mapping[str, str], make: Callable[[], Any]) -> Any:
        """What the models say, or said; an answer is on disk before anything comes of it."""
        name = hashlib.sha256(json.dumps(sorted(choice.items())).encode()).hexdigest()[:16]
        if self._kept:
            line = self._kept.popleft()
            if line.get("of") != name or asked not in line:
                raise JournalError(
                    f"{self.path}: holds another search than its first line says ({asked} of {name} is asked, it goes "
                    f"on with {', '.join(line)}); remove it"
                )
            return line[asked]
        line = {"of": name, asked: make()}
        self._write(line)
        return line[asked]

    def _packed(self, model: SwapModel) -> dict[str, Any]:
        """Three numbers a swap are most of a journal: as base64 of float64, which loses nothing."""
        line: dict[str, Any] = {"kl": model.kl_nats, "alike": [[*pair, value] for pair, value in model.alike.items()]}
        if sorted(model.slope) != self._swaps:
            line["swaps"] = self._swaps = sorted(model.slope)
        for name, values in (("slope", model.slope), ("own", model.own), ("cross", model.cross)):
            packed = np.array([values[swap] for swap in self._swaps], dtype="<f8").tobytes()
            line[name] = base64.b64encode(packed).decode()
        return line

    def _unpacked(self, line: Mapping[str, Any]) -> SwapModel:
        if "swaps" in line:
            self._swaps = [(group, source) for group, source in line["swaps"]]
        slope, own, cross = (
            dict(zip(self._swaps, np.frombuffer(base64.b64decode(line[name]), dtype="<f8").tolist(), strict=True))
            for name in ("slope", "own", "cross")
        )
        return SwapModel(line["kl"], slope, own, cross, {(one, other): value for one, other, value in line["alike"]})

    def _write(self, line: Mapping[str, Any]) -> None:
        self.file.append(line)

    def __enter__(self) -> RefineJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _header(search: Search, rows_sha256: str) -> dict[str, str]:
    return {"kind": "recompile-refine", "key": _key(search, rows_sha256)}


def _key(search: Search, rows_sha256: str) -> str:
    limits = [(row.name, row.limit, row.fixed) for row in search.limits]
    about = [FORMAT, profile_sha256(search.profile), limits, dict(search.start), rows_sha256]
    if search.interactions is not None:
        about.append(search.interactions.sha256)
    text = json.dumps(about)
    return hashlib.sha256(text.encode()).hexdigest()
