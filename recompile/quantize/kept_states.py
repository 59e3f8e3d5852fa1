"""What an unfinished build keeps: the names of its stages' files, and states, where it is calibrated on itself.

States are those that enter the next layer. The weights of the layers before are in their stages' files, but as they are
stored, and running the rows through them again would take as long as reading a state. One file, replaced as layers are
done, at most every `SECONDS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from recompile.checkpoint.safetensors_files import open_tensors
from recompile.errors import OutputError
from recompile.io.tensors import save_tensors

NAME = ".states"  # hidden, and no .safetensors: it is no part of the variant
AFTER = "recompile_after_layer"
SECONDS = 30.0  # between two of them


def stage_shard(number: int) -> str:
    """The file of a stage's tensors."""
    return f"stage-{number:05d}.safetensors"


def stage_report(number: int) -> str:
    """The file of what was made of its modules, written last."""
    return f".stage-{number:05d}.json"


def stage_sets(number: int) -> str:
    """The file of the scales that it moved."""
    return f".scaled-{number:05d}.json"


@dataclass
class KeptStates:
    """The file of one build. run: whose part it is, see `run_of`."""

    folder: Path
    run: str
    written: float = -math.inf  # by the clock of `monotonic`

    @property
    def path(self) -> Path:
        return self.folder / NAME

    def after(self) -> int:
        """The layer that its states leave; -1 where there are none. Raises OutputError for a file that is damaged or
        of another run."""
        if not self.path.exists():
            return -1
        with self._open() as stored:
            text = (stored.metadata() or {}).get(AFTER, "")
            if not text.isdecimal():
                raise OutputError(f"{self.path}: {AFTER} is {text!r}, wanted the number of a layer{self._way_out}")
            return int(text)

    def is_due(self) -> bool:
        """Whether it is time to keep states again."""
        return time.monotonic() - self.written >= SECONDS

    def keep(self, layer: int, states: Mapping[str, Sequence[Tensor]], weights: Mapping[str, Tensor]) -> None:
        """states: by whose they are, [rows, tokens, width] each, as they leave the layer; weights: of any shape, that
        later layers share with those before. Raises OutputError."""
        tensors = {f"{whose}.{n}": state for whose, found in states.items() for n, state in enumerate(found)}
        tensors |= {f"weight.{name}": value for name, value in weights.items()}
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_tensors(self.path, whole, {AFTER: str(layer)}, checked=True, run=self.run)
        self.written = time.monotonic()

    def take_up(self, states: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        """Put the kept states [rows, tokens, width] in the place of those given, and return the shared weights. Raises
        OutputError for other names or shapes."""
        with self._open() as stored:
            for whose, found in states.items():
                for n, state in enumerate(found):
                    kept = stored.get_tensor(f"{whose}.{n}")
                    if kept.shape[:2] != state.shape[:2]:
                        raise OutputError(
                            f"{self.path}: {whose}.{n} is {list(kept.shape)}, wanted {list(state.shape)}{self._way_out}"
                        )
                    found[n] = kept.to(state.device)
            names = [name for name in stored.keys() if name.startswith("weight.")]  # noqa: SIM118
            return {name.removeprefix("weight."): stored.get_tensor(name) for name in names}

    @property
    def _way_out(self) -> str:
        return f"; remove {self.folder} to start again"

    def _open(self) -> AbstractContextManager[Any]:
        return open_tensors(self.path, error=OutputError, way_out=self._way_out, checks=True, run=self.run)
