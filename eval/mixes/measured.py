"""KLs of whole mixes, each measured once: kept in a file beside the recipe, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.mixes.oracle import MixOracle
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.costs import Profile
from recompile.errors import JournalError
from recompile.events import OnEvent, Progress, ignore
from recompile.model.tokens import Rows
from recompile.optimize.choose import profile_sha256

ROUGH_ABOVE_NATS = 0.2  # more KL than that is measured in the quickest type: rounding is far below what rows differ by


class MeasuredMixes:
    """Mean KL of whole mixes (group -> candidate label) of a profile, on some rows.

    path: has what was measured, of any rows and profiles; holds: whether decoded weights may stay in memory
    rough: in the quickest type, to tell mixes apart that differ by more than it rounds
    """

    def __init__(
        self,
        profile: Profile,
        reference: Checkpoint,
        checkpoints: Mapping[str, Checkpoint],
        rows: Rows,
        device: str,
        path: Path,
        on_event: OnEvent = ignore,
        holds: bool = True,
        rough: bool = False,
    ) -> None:
        self.rows = rows
        self._header, self._reference, self._checkpoints = profile.header, reference, checkpoints
        self._device, self._path, self._on_event, self._holds, self._rough = device, path, on_event, holds, rough
        self._key = digest([profile_sha256(profile), rows.sha256, *(["rough"] if rough else [])])
        self._oracle: MixOracle | None = None
        self._file = self._load()
        self._known: dict[str, Any] = self._file.setdefault(self._key, {})

    def measure(self, mixes: Sequence[Mapping[str, str]]) -> list[float]:
        """Nats per token, in the order of `mixes`. Raises JournalError where they cannot be kept."""
        names = [digest(sorted(mix.items())) for mix in mixes]
        missing = {name: mix for name, mix in zip(names, mixes, strict=True) if name not in self._known}
        if missing:
            for done, (name, mix) in enumerate(missing.items()):
                self._on_event(Progress("measuring mixes", done, len(missing), "mixes"))
                self._known[name] = math.fsum(self._open().measure(mix)) / len(self.rows.ids)
                self._save()
            self._on_event(Progress("measuring mixes", len(missing), len(missing), "mixes"))
        return [self._known[name] for name in names]

    def kept(self, name: str) -> Mapping[str, str] | None:
        """A mix that `keep` was given under a name, in this run or an earlier one."""
        found = self._file.get(f"{self._key} {name}")
        return None if found is None else {str(group): str(source) for group, source in found.items()}

    def keep(self, name: str, mix: Mapping[str, str]) -> None:
        """Raises JournalError where it cannot be kept."""
        self._file[f"{self._key} {name}"] = dict(mix)
        self._save()

    def _open(self) -> MixOracle:
        """The models, once one has to be measured; the reference runs once."""
        if self._oracle is None:
            ids = self.rows.ids
            models = self._header, self._checkpoints, self._reference
            self._oracle = MixOracle(*models, ids, ids, device=self._device, holds=self._holds, rough=self._rough)
        return self._oracle

    def _load(self) -> dict[str, dict[str, Any]]:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8"))) if self._path.exists() else {}
        except (OSError, ValueError) as error:
            raise JournalError(f"{self._path}: cannot be read: {error}; remove it") from error

    def _save(self) -> None:
        partial = self._path.with_name(f"{self._path.name}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._file) + "\n", encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            raise JournalError(f"{self._path}: cannot be written: {error}; choose another -o") from error


def digest(value: Any) -> str:
    """Of anything that JSON holds."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
