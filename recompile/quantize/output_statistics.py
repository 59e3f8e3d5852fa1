"""Statistics of gradients at the outputs of maps, kept in a directory: one file a layer, read module by module.

A layer's file holds, for every module and both shares of the rows (`fit`, `held_out`), the diagonal of E[g g^T] as
float32 [O] and, as float16, the correlations above it, row by row [O (O - 1) / 2]: 100 000 tokens leave a third of a
percent of noise in a correlation, and float16 adds a twentieth of that. `statistics.json` says what was measured and is
written last; a directory without it is not whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recompile.checkpoint.safetensors_files import open_tensors
from recompile.errors import CheckpointError, MismatchError
from recompile.io.checksums import read_checked_json, write_checked_json
from recompile.io.files import PARTIAL_SUFFIX
from recompile.io.tensors import save_tensors
from recompile.quantize.two_sided import OutputStatistics

ABOUT = "statistics.json"
VERSION = 1
SHARES = ("fit", "held_out")
_LAYER_FILE = re.compile(r"layer-\d{5,}\.safetensors")


@dataclass(frozen=True)
class GradientSums:
    """What one map's gradients add up to. sums: [O, O] float32, of g g^T; tokens: (token, draw) pairs."""

    fit: Tensor
    held_out: Tensor
    tokens: int
    held_out_tokens: int


@dataclass
class StoredStatistics:
    """Implements `two_sided.OutputSource` from a whole directory."""

    path: Path
    about: Mapping[str, Any]
    modules: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)  # file, tokens, tokens held out
    _checked: set[str] = field(default_factory=set)  # files, which are read whole once

    @property
    def fingerprint(self) -> str:
        return str(self.about["fingerprint"])

    def of(self, module: str, device: torch.device) -> OutputStatistics | None:
        """Raises CheckpointError for a file that cannot be read or holds numbers that are not finite."""
        if module not in self.modules:
            return None
        file, tokens, held_out_tokens = self.modules[module]
        found = []
        try:
            way_out, checks = f"; remove {self.path} and measure anew", file not in self._checked
            with open_tensors(self.path / file, way_out=way_out, checks=checks, run=self.fingerprint) as stored:
                self._checked.add(file)
                for share in SHARES:
                    parts = (stored.get_tensor(f"{module}.{share}.{part}") for part in ("diagonal", "correlations"))
                    found.append(_unpack(*(part.to(device) for part in parts)))
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.path / file}: {module}: cannot be read: {error}; remove {self.path} and measure anew"
            ) from error
        return OutputStatistics(found[0], found[1], tokens, held_out_tokens)

    def check_base(self, identity: str, label: str) -> None:
        """Raise MismatchError unless they were measured on this base."""
        if self.about["made_of"]["base"] != identity:
            raise MismatchError(
                f"{self.path}: was measured on another model than {label}; give another {{stats}}, or remove it"
            )

    def check_rows(self, rows_sha256: str) -> None:
        """Raise MismatchError unless they were measured on these rows."""
        if self.about["made_of"].get("rows") != rows_sha256:
            raise MismatchError(
                f"{self.path}: was measured on other rows, by a run that was stopped; remove it, or go on with its rows"
            )


def open_statistics(path: Path) -> StoredStatistics | None:
    """What a directory holds; None where there is none yet. Raises CheckpointError for one that is something else."""
    about = path / ABOUT
    if not path.exists():
        return None
    if not path.is_dir():
        raise CheckpointError(f"{path}: is a file; statistics are kept in a directory of their own")
    if not about.exists():
        if not all(_LAYER_FILE.fullmatch(child.name) or PARTIAL_SUFFIX in child.name for child in path.iterdir()):
            raise CheckpointError(
                f"{path}: holds no {ABOUT}, and other files; statistics need a directory of their own"
            )
        return None
    found = read_checked_json(about, way_out=f"remove {path}, measure anew")
    try:
        if found["version"] != VERSION:
            raise CheckpointError(f"{about}: version {found['version']}, wanted {VERSION}; remove {path}, measure anew")
        modules = {name: (str(f), int(n), int(held)) for name, (f, n, held) in found["modules"].items()}
        found["made_of"]["base"], found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{about}: is not a record of statistics ({error!r}); remove {path}") from error
    return StoredStatistics(path, found, modules)


@dataclass
class StatisticsWriter:
    """Keeps the layers of one measurement, in any order.

    made_of: everything that decides the numbers, with "base", the model's identity
    """

    path: Path
    made_of: Mapping[str, Any]
    modules: dict[str, tuple[str, int, int]] = field(default_factory=dict)

    def add(self, layer: int, sums: Mapping[str, GradientSums]) -> None:
        """Keep one layer. Modules whose gradients are all 0, or that have none in one share, are left out.

        Raises CheckpointError for numbers that are not finite, OutputError where they cannot be written."""
        tensors: dict[str, Tensor] = {}
        file = f"layer-{layer:05d}.safetensors"
        for module, found in sums.items():
            for matrix in (found.fit, found.held_out):
                if not bool(matrix.isfinite().all()):
                    raise CheckpointError(f"{module}: gradients at its output are not finite; try {{dtype}} float32")
            counts = (found.tokens, found.held_out_tokens)
            if not all(counts) or not all(bool(m.diagonal().any()) for m in (found.fit, found.held_out)):
                continue
            for share, matrix, count in zip(SHARES, (found.fit, found.held_out), counts, strict=True):
                diagonal, correlations = _pack(matrix / count)
                tensors[f"{module}.{share}.diagonal"] = diagonal.cpu()
                tensors[f"{module}.{share}.correlations"] = correlations.cpu()
            self.modules[module] = (file, *counts)
        if not tensors:
            return
        save_tensors(self.path / file, tensors, checked=True, run=self.fingerprint)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([VERSION, self.made_of], sort_keys=True).encode()).hexdigest()[:16]

    def finish(self) -> StoredStatistics:
        """Say that all layers are there."""
        about = {
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "made_of": dict(self.made_of),
            "modules": {name: list(found) for name, found in self.modules.items()},
        }
        write_checked_json(self.path / ABOUT, about, indent=1)
        return StoredStatistics(self.path, about, dict(self.modules))


def _pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[O, O] -> its diagonal [O] float32 and the correlations above it [O (O - 1) / 2] float16."""
    diagonal = matrix.diagonal().float().clone()
    inverse = torch.where(diagonal > 0, diagonal.rsqrt(), torch.zeros_like(diagonal))
    rows, columns = torch.triu_indices(len(matrix), len(matrix), 1, device=matrix.device)
    return diagonal, (matrix[rows, columns] * inverse[rows] * inverse[columns]).clamp_(-1, 1).half()


def _unpack(diagonal: Tensor, correlations: Tensor) -> Tensor:
    if diagonal.ndim != 1:
        raise ValueError(f"a diagonal of shape {list(diagonal.shape)}, wanted one number an output")
    if not diagonal.is_floating_point() or bool((diagonal < 0).any()):
        raise ValueError("a diagonal that is no mean of squares: integers, or numbers below 0")
    size = len(diagonal)
    if correlations.shape != (size * (size - 1) // 2,):
        raise ValueError(f"{list(correlations.shape)} correlations for {size} outputs")
    if not bool(diagonal.isfinite().all()) or not bool(correlations.isfinite().all()):
        raise ValueError("numbers that are not finite")
    root = diagonal.float().sqrt()
    rows, columns = torch.triu_indices(size, size, 1, device=diagonal.device)
    matrix = torch.zeros(size, size, device=diagonal.device)
    matrix[rows, columns] = correlations.float() * root[rows] * root[columns]
    matrix += matrix.t().clone()
    matrix.diagonal().copy_(diagonal)
    return matrix
