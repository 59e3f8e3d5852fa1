"""What a format's own merge file is told of a mix, as plain values. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recompile.formats.stored import StoredModule


@dataclass(frozen=True)
class MixFacts:
    """A mix whose quantized modules are all of one format.

    base_config:   config.json of the base
    config:        the same with the mix's own `tie_word_embeddings`
    inherited:     the quantization_config to carry version and calibration over from; {} where there is none
    modules:       every module of the result
    schemes:       of every quantized module what its config says of it, where its format has a reader; values differ by
                   format
    heads, embeddings: names of the modules that count apart
    foreign_dense: dense modules that do not come from a checkpoint of the format
    bpw, head_bpw: bits per weight of the quantized modules; of the head, None where none is stored
    """

    base_config: Mapping[str, Any]
    config: Mapping[str, Any]
    inherited: Mapping[str, Any]
    modules: Mapping[str, StoredModule]
    schemes: Mapping[str, Any]
    heads: frozenset[str]
    embeddings: frozenset[str]
    foreign_dense: Sequence[StoredModule]
    bpw: float
    head_bpw: float | None


@dataclass(frozen=True)
class MergeProblem:
    """Why no engine would load a mix, once a cause, and the way out."""

    causes: Sequence[str]
    way_out: str


@dataclass(frozen=True)
class MergedFile:
    """A JSON file of the output."""

    name: str
    content: Mapping[str, Any]
    indent: int = 2
