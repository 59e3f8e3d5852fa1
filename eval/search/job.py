"""What a search that runs models is handed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.mixes.mixes_file import MixesFile
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.costs import Profile
from recompile.events import OnEvent, ignore
from recompile.model.rows import RowOptions
from recompile.optimize.interactions import Interactions
from recompile.optimize.limits import Row
from recompile.optimize.problem import Problem


@dataclass(frozen=True)
class Search:
    """Everything a solver that needs models is handed; it returns a choice (group -> candidate label) in the limits."""

    profile: Profile
    problem: Problem  # prepared, constraints applied; its costs are the profile's
    budget_bits: int  # of problem.fixed_bits and all groups; where only pools are limited, what they leave room for
    limits: Sequence[Row]  # all limits, the size included; every choice has to keep them
    start: Mapping[str, str]  # within the limits
    reference: Checkpoint
    checkpoints: Mapping[str, Checkpoint]  # candidate label -> source
    where: RowOptions  # rows of the role "choose" are the solver's
    steps: int | None
    minutes: float | None
    journal: Path  # beside the recipe; a solver that resumes keeps its state here
    measured: MixesFile  # beside the recipe; KLs of whole mixes, measured once (eval.mixes.measured)
    scores: Mapping[tuple[str, str], float] | None = None  # squared-gradient scores by (group, source), if known
    interactions: Interactions | None = None  # of swaps, from the draws of a profile made with --pairs
    max_memory_bytes: int | None = None  # of refine; others hold no decoded weights where it is given
    device: str = "cpu"
    on_event: OnEvent = ignore

    @property
    def directories(self) -> list[Path]:
        """Where a tokenizer may lie, the reference first."""
        return [self.reference.path, *(source.path for source in self.checkpoints.values())]
