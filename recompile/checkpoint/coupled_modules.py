"""Which modules of a checkpoint only work together, because a scale was moved from one into the others.

AWQ and SmoothQuant divide a producer (a norm's weight, or the rows of a linear map) by a scale a channel and multiply
the columns of its consumers by it. `recompile_scaling.json` beside the weights lists those sets, so that a merge keeps
them together. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from recompile.errors import CheckpointError
from recompile.io.files import read_json

SCALING_NAME = "recompile_scaling.json"
SCALING_VERSION = 1


@dataclass(frozen=True)
class ScaledSet:
    """producer and consumers: module names; all of one set come from one checkpoint."""

    producer: str
    consumers: tuple[str, ...]

    @property
    def members(self) -> tuple[str, ...]:
        return (self.producer, *self.consumers)


def dump_scaled_sets(sets: Iterable[ScaledSet]) -> str:
    """The file's text."""
    listed = [{"producer": found.producer, "consumers": list(found.consumers)} for found in sets]
    return json.dumps({"version": SCALING_VERSION, "sets": listed}, indent=1) + "\n"


def read_scaled_sets(directory: Path) -> tuple[ScaledSet, ...]:
    """The sets of a checkpoint directory; none where nothing was scaled. Raises CheckpointError for a damaged file."""
    path = directory / SCALING_NAME
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return ()
    return _read(path, changed)


@lru_cache(maxsize=64)
def _read(path: Path, changed: int) -> tuple[ScaledSet, ...]:
    try:
        content = read_json(path)
        if content["version"] != SCALING_VERSION:
            raise CheckpointError(f"{path}: version {content['version']!r}, this program reads {SCALING_VERSION}")
        return tuple(ScaledSet(str(e["producer"]), tuple(map(str, e["consumers"]))) for e in content["sets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a list of scaled sets ({error!r}); it was damaged") from error
