"""KLs of whole mixes, each measured once: kept in a file beside the recipe, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from eval.diff import DiffOptions
from eval.mixes.meter import MixMeter
from eval.mixes.mixes_file import KIND, MixesFile
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.costs import Profile
from recompile.errors import JournalError
from recompile.events import OnEvent, Progress, ignore
from recompile.model.tokens import Rows
from recompile.optimize.choose import profile_sha256

ROUGH_ABOVE_NATS = 0.2  # more KL than that is measured in the quickest type: rounding is far below what rows differ by


class MeasuredMixes:
    """Mean KL of whole mixes (group -> candidate label) of a profile, on some rows.

    file: has what was measured, of any rows and profiles; holds: whether decoded weights may stay in memory
    rough: in the quickest type, to tell mixes apart that differ by more than it rounds
    """

    def __init__(
        self,
        profile: Profile,
        reference: Checkpoint,
        checkpoints: Mapping[str, Checkpoint],
        rows: Rows,
        device: str,
        file: MixesFile,
        on_event: OnEvent = ignore,
        holds: bool = True,
        rough: bool = False,
    ) -> None:
        self.rows = rows
        self._header, self._reference, self._checkpoints = profile.header, reference, checkpoints
        self._device, self._file, self._on_event, self._holds, self._rough = device, file, on_event, holds, rough
        self._key = digest([profile_sha256(profile), rows.sha256, *(["rough"] if rough else [])])
        self._meter: MixMeter | None = None
        self._known: dict[str, float] = {}
        self._mixes: dict[str, dict[str, str]] = {}
        self._load()

    def measure(self, mixes: Sequence[Mapping[str, str]]) -> list[float]:
        """Nats per token, in the order of `mixes`. Raises JournalError where they cannot be kept."""
        names = [digest(sorted(mix.items())) for mix in mixes]
        missing = {name: mix for name, mix in zip(names, mixes, strict=True) if name not in self._known}
        if missing:
            for done, (name, mix) in enumerate(missing.items()):
                self._on_event(Progress("measuring mixes", done, len(missing), "mixes"))
                self._known[name] = math.fsum(self._open().measure(mix)) / len(self.rows.ids)
                self._append({"mix": name, "kl_nats": self._known[name]})
            self._on_event(Progress("measuring mixes", len(missing), len(missing), "mixes"))
        return [self._known[name] for name in names]

    def kept(self, name: str) -> Mapping[str, str] | None:
        """A mix that `keep` was given under a name, in this run or an earlier one."""
        return self._mixes.get(name)

    def keep(self, name: str, mix: Mapping[str, str]) -> None:
        """Raises JournalError where it cannot be kept."""
        self._mixes[name] = dict(mix)
        self._append({"name": name, "choice": dict(mix)})

    def _open(self) -> MixMeter:
        """The models, once one has to be measured; the reference runs once."""
        if self._meter is None:
            models = self._header, self._checkpoints, self._reference
            options = DiffOptions(device=self._device, counted=self.rows.counted)
            self._meter = MixMeter(*models, self.rows.ids, rough=self._rough, options=options, holds=self._holds)
        return self._meter

    def _load(self) -> None:
        """What is known of these rows and this profile. Raises JournalError."""
        lines = self._file.values()
        if lines and (not isinstance(lines[0], dict) or lines[0].get("kind") != KIND):
            raise JournalError(f"{self._file.path}:1: not KLs of mixes as this program keeps them; remove it")
        for number, line in enumerate(lines[1:], start=2):
            self._read_line(line, number)

    def _append(self, line: dict[str, Any]) -> None:
        self._file.append({"of": self._key, **line})

    def _read_line(self, line: Any, number: int) -> None:
        try:
            if line["of"] != self._key:
                return
            if "mix" in line:
                value = float(line["kl_nats"])
                if not math.isfinite(value):
                    raise ValueError(f"kl_nats is {value}")
                self._known[str(line["mix"])] = value
            else:
                self._mixes[str(line["name"])] = {str(group): str(source) for group, source in line["choice"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise JournalError(f"{self._file.path}:{number}: not a measured mix ({error}); remove the file") from error


def digest(value: Any) -> str:
    """Of anything that JSON holds."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
