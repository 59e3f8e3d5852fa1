"""What a run of `recompile.auto` has done already, so that one that was stopped goes on after its last whole stage."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recompile.errors import JournalError, OutputError
from recompile.events import Note, OnEvent, ignore
from recompile.io.checksums import read_checked_json, write_checked_json
from recompile.io.files import check_partial, is_marked, open_regular, unmarked

STATE = "auto.json"


@dataclass(frozen=True)
class StageDone:
    """A stage ran; report: what the function behind it returned. Told to `on_event`."""

    name: str
    report: Any


def check_new(work: Path, out: Path) -> None:
    """Raise OutputError where a run cannot begin: something stands where it would write that it did not make."""
    if out.exists() and not (out.is_file() or out.is_dir()):
        raise OutputError(f"{{out}} {out}: is a device or a pipe, and a model is files; choose another {{out}}")
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists and was not made by model_auto; move it away, or choose another {{out}}")
    check_partial(work, STATE)


class Stages:
    """What is done already, in `work/auto.json`. Raises OutputError where it was done with other settings."""

    def __init__(self, work: Path, settings: Mapping[str, Any], out: Path, on_event: OnEvent = ignore) -> None:
        self._path, self._out, self._on_event = work / STATE, out, on_event
        self._settings = json.loads(json.dumps(settings))
        self._done: dict[str, dict[str, Any]] = {}
        if is_marked(work, STATE):
            state = read_checked_json(self._path, error=JournalError, way_out=f"remove {work} and {out} to start again")
            check_state(self._path, state)
            changed = [key for key, value in self._settings.items() if state["settings"].get(key) != value]
            if changed:
                raise OutputError(
                    f"{work}: was begun with other settings ({', '.join(changed)}); remove it and {out} to start "
                    f"again, or choose another {{out}}"
                )
            self._done = state["done"]
        else:
            check_new(work, out)
            try:
                with unmarked(work):
                    work.mkdir(exist_ok=True)
                    self._save()
            except OSError as error:
                raise OutputError(f"{work}: cannot be made: {error.strerror or error}") from error

    @property
    def seconds(self) -> dict[str, float]:
        """Of every stage that is done; decisions that were kept are none."""
        return {name: stage["seconds"] for name, stage in self._done.items() if not stage.get("decision")}

    def run(self, name: str, stage: Callable[[], Any], leaves: Path | None = None) -> dict[str, Any]:
        """Run a stage unless it is done; returns its result, then or now, where that is a dict, else nothing.

        leaves: the file that later stages go on with. Raises JournalError where it was changed since."""
        if name in self._done:
            if leaves is not None:
                self._check_left(name, leaves)
            self._on_event(Note(f"{name}: done before", ""))
            return dict(self._done[name]["result"])
        self._on_event(Note(f"{name} ...", ""))
        started = time.monotonic()
        result = stage()
        seconds = round(time.monotonic() - started, 1)
        kept = json.loads(json.dumps(result)) if isinstance(result, dict) else {}
        self._done[name] = {"seconds": seconds, "result": kept}
        if leaves is not None:
            self._done[name]["left"] = file_sha256(leaves)
        self._save()
        self._on_event(StageDone(name, result))
        return dict(kept)

    def keep(self, name: str, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A decision of this run, or the same that it took before; nothing is told of it."""
        if name not in self._done:
            self._done[name] = {"seconds": 0.0, "result": json.loads(json.dumps(decide())), "decision": True}
            self._save()
        return dict(self._done[name]["result"])

    def _check_left(self, name: str, leaves: Path) -> None:
        way_out = f"remove {self._path.parent} and {self._out} to start again, or put a copy of it back"
        try:
            found = file_sha256(leaves)
        except JournalError as error:
            raise JournalError(f"{error}; {way_out}") from error
        if self._done[name].get("left", found) != found:
            raise JournalError(f"{leaves}: is not what the stage {name} left; {way_out}")

    def _save(self) -> None:
        write_checked_json(self._path, {"settings": self._settings, "done": self._done})


def begun_with(work: Path) -> dict[str, Any] | None:
    """The settings that a run was begun with; None where there is none, or none that can be read."""
    if not is_marked(work, STATE):
        return None
    try:
        found = read_checked_json(work / STATE, error=JournalError, way_out="")
        check_state(work / STATE, found)
    except JournalError:  # `Stages` says so
        return None
    return dict(found["settings"])


def file_sha256(path: Path) -> str:
    """Of a file's bytes. Raises JournalError where it cannot be read."""
    digest = hashlib.sha256()
    with open_regular(path, error=JournalError) as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def check_state(path: Path, state: Any) -> None:
    """Raise JournalError unless a state file has the shape that `Stages` gives it."""
    shaped = isinstance(state, dict) and isinstance(state.get("settings"), dict) and isinstance(state.get("done"), dict)
    if not shaped or not all(
        isinstance(stage, dict)
        and isinstance(stage.get("seconds"), (int, float))
        and isinstance(stage.get("result"), dict)
        and isinstance(stage.get("left", ""), str)
        for stage in state["done"].values()
    ):
        raise JournalError(f"{path}: not the state of a model_auto run; remove its folder to start again")
