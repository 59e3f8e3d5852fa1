"""Something in a checkpoint that contradicts something else: what every check reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from recompile.arguments import respell


@dataclass(frozen=True)
class Problem:
    """Something in a checkpoint that contradicts something else."""

    where: str  # a file or a module
    message: str
    severity: str = "error"  # "error": its engine fails or reads other weights; "warning": worth knowing

    def __str__(self) -> str:
        return self.spelled({})

    def spelled(self, names: Mapping[str, str]) -> str:
        """With other names for arguments that the message names."""
        return f"{self.where}: {respell(self.message, names)}"
