"""YAML text of single values, as it may stand inside {...} on one line."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml

from recompile.recipe.values import SourceId

TEXT_TAG = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """Text with line breaks of any kind goes into double quotes: in single ones U+0085 comes back as a blank."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar(TEXT_TAG, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)


_PLAIN = re.compile(r"[A-Za-z0-9_.*-]+")  # keys of recipes, as a rule


def dump_value(value: Any, **options: Any) -> str:
    """A value as YAML, on one line unless the options say otherwise."""
    return str(yaml.dump(value, Dumper=_Dumper, allow_unicode=True, width=math.inf, **options))


@lru_cache(maxsize=1024, typed=True)  # 1, 1.0 and true are equal and spelled apart
def scalar_text(value: SourceId, quoted: bool = False) -> str:
    """A scalar as it may stand inside {...} on one line."""
    if quoted and isinstance(value, str) and _PLAIN.fullmatch(value):
        return f'"{value}"'  # what YAML's emitter writes, a hundred times as fast
    text = dump_value([value], default_flow_style=True, default_style='"' if quoted else None).strip()[1:-1]
    if not quoted and isinstance(value, str) and text[:1] == "'":
        return scalar_text(value, quoted=True)
    return text


def note_text(note: str | None) -> str:
    """A note as it follows other keys inside {...}; empty for None."""
    return "" if note is None else f", note: {scalar_text(note)}"


def comment_text(text: str) -> str:
    """One line of characters that YAML allows."""
    return yaml.reader.Reader.NON_PRINTABLE.sub("?", " ".join(text.split()))


def describe_spec(spec: Mapping[str, Any]) -> str:
    """`bits: 4, group_size: 32`: what stands for the directory of a source that is to be made."""
    return ", ".join(f"{key}: {scalar_text(value)}" for key, value in spec.items())
