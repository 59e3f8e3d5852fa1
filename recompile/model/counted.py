"""Which places of rows count, where not all do: of a trace, those whose predictions are of what the model wrote.

counted: bool [rows, tokens] on the CPU, at least one place a row; None where all places count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def places_of(counted: Tensor | None, row: int) -> Tensor | None:
    """The places of a row that count, int64 [places]; None where all do."""
    return None if counted is None else counted[row].nonzero().flatten()


def pick(values: Tensor, places: Tensor | None) -> Tensor:
    """What stands at some places of a row; [tokens, ...] -> [places, ...]."""
    return values if places is None else values[places.to(values.device)]


def spread(values: Tensor, places: Tensor | None, tokens: int) -> Tensor:
    """The opposite, zero elsewhere; [n, places, ...] -> [n, tokens, ...]."""
    if places is None:
        return values
    whole = values.new_zeros(values.shape[0], tokens, *values.shape[2:])
    whole[:, places.to(values.device)] = values
    return whole


def weight_of(counted: Tensor | None, row: int) -> float:
    """Tokens of a row over those of them that count: a sum over these times it, over all tokens, is their mean.

    counted: bool [rows, tokens]; None: all
    """
    return 1.0 if counted is None else counted.shape[1] / int(counted[row].sum())


def row_means(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean over what counts of every row; [rows, tokens] -> [rows]."""
    if counted is None:
        return values.mean(1)
    marks = counted.to(values.device)
    return values.where(marks, 0.0).sum(1) / marks.sum(1)
