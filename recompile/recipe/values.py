"""What one line of a recipe says: a source, an override; and what was decided of a tensor."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

SourceId: TypeAlias = str | int | float | bool | bytes | datetime.date | None  # any YAML scalar; datetime is a date

# A source that is not there yet: model_quantize makes it. What each says is read by recompile/quantize/made.py.
MADE_KINDS = ("bits", "type", "scheme")
MADE_SETTINGS = ("group_size", "symmetric", "format")
DENSE: Mapping[str, Any] = {"scheme": "dense"}  # of a source that leaves modules as the base has them


@dataclass(frozen=True)
class Source:
    """One line of `sources:`, a directory that modules may be taken from."""

    id: SourceId
    model_dir: str  # as written, see resolve_dir; "bits: 4" for a source that model_quantize is to make
    line: int = 0  # of the entry, from 1; 0 where no file was read
    note: str | None = None
    spec: Mapping[str, Any] | None = field(default=None, hash=False)  # how to make it; None for a directory


@dataclass(frozen=True)
class Override:
    """One line of `overrides:`, as written."""

    key: str
    source: SourceId
    line: int = 0  # of the entry, from 1; 0 where no file was read
    note: str | None = None
    optional: bool = False  # no error where it matches nothing: of other tools that let it pass


@dataclass(frozen=True)
class Decision:
    """Where one tensor comes from, and why."""

    tensor_name: str
    directory: str | None  # None: the base
    override: Override | None  # the line that decided: the first match of the winning directory
    beaten: tuple[Override, ...]  # other lines that match the name, in file order
