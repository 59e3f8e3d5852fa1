"""Parameters that a GGUF file keeps in parts, in the form in which transformers' own converters work.

Such a converter takes tensors one by one and makes a parameter of them. One here first puts the parts together as a
Hugging Face checkpoint would have them, then hands them to transformers' converter where the parameter has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from recompile.gguf.names import Joined

Join = Callable[[list[list[Tensor]]], Tensor]  # for each part its tensors: one, or one an expert


@dataclass
class JoinConverter:
    """Makes one parameter of parts of fused tensors. `patterns` of the parts are "<whole> <number of the part>".

    wholes: name of a fused tensor -> what puts it together and the pattern that transformers' converter knows it by
    inner:  transformers' converter, where there is one
    parts:  of every whole the tensors so far, [rows, in] each
    """

    wholes: Mapping[str, tuple[Join, str | None]]
    inner: Any = None
    parts: dict[str, list[list[Tensor]]] = field(default_factory=dict)

    def add_tensor(self, full: str, tensor: str, pattern: str | None, value: Tensor) -> None:
        assert pattern is not None, "every part has a pattern"
        whole, _, number = pattern.rpartition(" ")
        parts = self.parts.setdefault(whole, [])
        while len(parts) <= int(number):
            parts.append([])
        parts[int(number)].append(value)

    def convert(self, name: str, **settings: Any) -> Mapping[str, Any]:
        made = {whole: self.wholes[whole][0](parts) for whole, parts in self.parts.items()}
        if self.inner is None:
            (value,) = made.values()
            return {name: value}
        for whole, value in made.items():
            self.inner.add_tensor(name, whole, self.wholes[whole][1], value)
        return self.inner.convert(name, **settings)


def patterned(whole: Joined) -> list[tuple[str, str]]:
    """The parts of a fused tensor, each with its pattern."""
    return [(name, f"{whole.name} {number}") for number, names in enumerate(whole.parts) for name in names]
