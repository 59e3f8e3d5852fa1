"""What a write of a checkpoint directory will do: tensors, shards and files, and what happens on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recompile.checkpoint.checkpoint import StoredModule, TensorInfo
from recompile.formats import DTYPE_BYTES
from recompile.merge.convert import Conversion
from recompile.merge.fuse_experts import FusedExperts
from recompile.merge.overlay import Accounting, Overlay, Placement

MANIFEST_NAME = "recompile_manifest.json"

MANIFEST_ENTRY_BYTES = 400  # about what a module takes there

DEFAULT_SHARD_MB = 8192

MB = 1 << 20  # of --shard-size, as exllamav3 counts


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One tensor of the output and where its bytes come from."""

    info: TensorInfo  # in the output: path and offset as they will be under OUT
    source: TensorInfo | None  # copied from here; None for a value that is decoded or converted


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One module of the output. Its tensors stand in part-name order, the order in which they are hashed."""

    name: str
    placement: Placement
    stored: StoredModule  # as the output holds it
    tensors: tuple[PlannedTensor, ...]
    shard: int
    conversion: Conversion | None = None


@dataclass(frozen=True)
class PlannedShard:
    """One shard of the output."""

    file: str
    header: bytes  # everything before the data, length prefix included
    size_bytes: int  # of the whole file


@dataclass(frozen=True)
class WritePlan:
    """Everything that `execute` will do. `texts` are the JSON files but the manifest, which needs the hashes."""

    overlay: Overlay
    out: Path
    dense: bool
    shards: tuple[PlannedShard, ...]
    modules: tuple[PlannedModule, ...]
    texts: Mapping[str, str]
    copies: tuple[Path, ...]  # other files of the base directory
    recipe_text: str | None
    accounting: Accounting
    warnings: tuple[str, ...] = ()
    fused: Mapping[str, FusedExperts] = field(default_factory=dict)  # of a decoded copy, by their names in it
    true_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of modules that are stored padded
    turned: frozenset[str] = frozenset()  # modules whose weight is [in, out] in a decoded copy

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(module.stored.size_bytes for module in self.modules)

    @property
    def needed_bytes(self) -> int:
        """Room that the output will take; its manifest is estimated."""
        return (
            sum(shard.size_bytes for shard in self.shards)
            + sum(len(text.encode()) for text in self.texts.values())
            + sum(path.stat().st_size for path in self.copies)
            + MANIFEST_ENTRY_BYTES * len(self.modules)
        )


@dataclass(frozen=True)
class Step:
    """Some bytes of a module were written (or checked)."""

    module: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class WantedTensor:
    """A tensor of the output before it has a place."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo | None
    size_bytes: int


def wanted_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> WantedTensor:
    """A tensor that is not a copy of another."""
    size = DTYPE_BYTES[dtype]
    for length in shape:
        size *= length
    return WantedTensor(name, dtype, shape, None, size)


def copied_tensors(placement: Placement) -> list[WantedTensor]:
    """The tensors of a module whose bytes are taken over, in the order of their part names."""
    return [WantedTensor(i.name, i.dtype, i.shape, i, i.size_bytes) for _, i in sorted(placement.stored.parts.items())]


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in name.split(".")]
