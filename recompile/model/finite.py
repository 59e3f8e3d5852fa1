"""Numbers that are not finite stop a run, with the place named; they never become a figure.

A value that a type cannot hold (float16 ends at 65,504) turns infinite, one layer later NaN, and a NaN that is left out
of a mean turns into a perfect score. So every state that a model hands on is looked at once, by one sum a row: it is
infinite or NaN if any of its terms is. What is made of states (products, statistics, KLs) is checked where it is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recompile.errors import NotFiniteError
from recompile.formats.checks import is_finite

WAITING = 256  # sums on a device that may wait for each other before somebody waits for them
WIDER = "use a wider {dtype}"


def check_finite(value: Tensor, what: str, hint: str = WIDER) -> None:
    """Raise NotFiniteError where `value`, of any shape, holds NaN or infinities; `what` says whose it is, e.g. "base:
    layer 1, row 3"."""
    if not is_finite(value):
        bad = int((~value.detach().float().isfinite()).sum())
        raise NotFiniteError(what, f"{bad} of {value.numel()} values are NaN or infinite in {name_of(value)}; {hint}")


def name_of(value: Tensor) -> str:
    """Of the dtype: "bfloat16". value: any shape."""
    return str(value.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class _Seen:
    label: str  # of the weights
    place: str
    first_row: int | None
    dtype: str
    sums: Tensor  # [rows] float32
    module: nn.Module | None


@dataclass
class FiniteWatch:
    """Looks at the states that one model hands on. On a CPU at once; on a device, where asking means waiting, when
    `settle` is called or many have been seen."""

    _seen: list[_Seen] = field(default_factory=list, repr=False)

    def see(
        self, state: Tensor, label: str, place: str, first_row: int | None, module: nn.Module | None = None
    ) -> None:
        """Note a state [rows, ...].

        label: of the weights it was made with; place: "layer 3"; first_row: number of the state's first row, from 0,
        where it is known; module: what made it, whose loaded parameters are searched for the reason
        Raises NotFiniteError, here or in `settle`.
        """
        sums = state.detach().flatten(1).sum(1, dtype=torch.float32)
        self._seen.append(_Seen(label, place, first_row, name_of(state), sums, module))
        if state.device.type == "cpu" or len(self._seen) >= WAITING:
            self.settle()

    def settle(self) -> None:
        """Raise NotFiniteError for the first state seen that is not finite."""
        seen, self._seen = self._seen, []
        if not seen or bool(torch.cat([one.sums for one in seen]).isfinite().all()):
            return
        for one in seen:
            finite = one.sums.isfinite()
            if not bool(finite.all()):
                at = int(finite.logical_not().nonzero()[0])
                row = None if one.first_row is None else one.first_row + at
                raise state_error(one.label, one.place, row, one.dtype, one.module)


def state_error(label: str, place: str, row: int | None, dtype: str, module: nn.Module | None = None) -> NotFiniteError:
    """What is said of a state that is not finite. row: from 0, where it is known."""
    named = module.named_parameters() if module is not None else ()
    damaged = next((name for name, value in named if not value.is_meta and not is_finite(value)), None)
    found = f"hidden states are NaN or infinite in {dtype}"
    if damaged is not None:
        found += f", and so is its {damaged}: the checkpoint is damaged, or {WIDER} than {dtype}"
    elif dtype == "float32":
        found += "; the checkpoint is damaged"
    else:
        found += f"; the model leaves the range of {dtype}: {WIDER}"
    return NotFiniteError(f"{label}: {place}", found, row)
