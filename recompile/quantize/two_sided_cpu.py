"""The scalar loops of `two_sided.py` on the CPU, compiled by numba. Import lazily."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_FASTMATH = {"contract", "reassoc"}


@njit(fastmath=_FASTMATH, cache=True)
def round_tile(tile: Any, made: Any) -> None:
    """As `two_sided.round_tile_torch`; all [columns, rows] float32, C order; table [n] or empty.

    tile: a `two_sided.Tile` of arrays; made: levels, error and carried, which are written
    """
    original, before, above, upper_in, upper_out, scale, low, high, table = tile
    levels, error, carried = made
    columns, rows = original.shape
    uniform = len(table) == 0
    pull = np.empty(rows, np.float32)
    for k in range(columns):
        for r in range(rows):
            pull[r] = above[k, r]
            carried[k, r] = before[k, r]
        for j in range(k):
            factor = upper_in[j, k]
            for r in range(rows):
                carried[k, r] += factor * error[j, r]
        for r in range(rows):
            x = (original[k, r] + carried[k, r] + pull[r]) / scale[k, r]
            level = min(max(np.rint(x), low[k, r]), high[k, r]) if uniform else _nearest(table, x)
            levels[k, r] = level
            error[k, r] = original[k, r] - level * scale[k, r]
            carried[k, r] += error[k, r]
            given = carried[k, r]
            for q in range(r + 1, rows):
                pull[q] += upper_out[r, q] * given


@njit(cache=True)
def _nearest(table: Any, x: Any) -> Any:
    """The nearest of rising levels; at a tie the one with the even place, which is that with the even mantissa."""
    first, last = 0, len(table) - 1
    while last - first > 1:
        middle = (first + last) // 2
        if table[middle] <= x:
            first = middle
        else:
            last = middle
    left, right = x - table[first], table[last] - x
    if left < right:
        return table[first]
    if right < left:
        return table[last]
    return table[first] if (first - len(table) // 2) % 2 == 0 else table[last]
