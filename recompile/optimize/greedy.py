"""Greedy choice: the best KL saved per bit first, then exchanges until the budget is spent.

The order of upgrades along each group's lower convex hull solves the linear relaxation of the multiple-choice
knapsack (Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979), so the ratio of
the first upgrade that does not fit is the optimal multiplier, and the Lagrangian bound at it

    L(m) = sum over groups of min over options of (cost + m * bits)  -  m * budget

is the value of the relaxation: every greedy solution comes with how far from the optimum it can be at most.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from recompile.optimize.problem import Group, Option, Problem, Solution, check_budget, expand_choice, prepare

_EXCHANGE_WORK = 4_000_000  # moves looked at in all exchanges together: a few seconds at the very worst


def solve_greedy(problem: Problem, budget_bits: int) -> Solution:
    """A good choice within budget_bits (bits, fixed_bits included), never above it, exact fits accepted.

    Starts from the fewest bits, takes the hull upgrades in order of KL saved per bit, passing over those that do not
    fit; then makes the exchange that lowers the cost most, one option for a larger one or one down and one up, until
    none is left. An option that costs more KL for more bits is never taken: budget that would only do harm is left.
    Ties: at equal KL saved per bit the upgrade of fewer bits, then the earlier group, then the source label that
    sorts first; within a group, equal bits and cost go to the label that sorts first, equal cost to fewer bits.

    `lower_bound` is the Lagrangian bound. Options without a finite cost are left out. Raises BudgetError outside the
    reachable range, RecompileError for a group without a measured option.
    """
    problem = prepare(problem)
    check_budget(problem, budget_bits)
    table = build_table(problem)
    start = run_greedy(table, budget_bits - problem.fixed_bits)
    return make_solution(problem, table, start.chosen, budget_bits, start.gap, "greedy")


# --- options as numbers -----------------------------------------------------------------------------------------


def efficient_options(group: Group) -> list[Option]:
    """The options worth having: bits strictly rising, cost strictly falling (dominated ones are gone)."""
    kept: list[Option] = []
    for option in sorted(group.options, key=_bits_cost_label):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def _bits_cost_label(option: Option) -> tuple[int, float, str]:
    return option.bits, option.cost, option.source


def lower_hull(options: Sequence[Option]) -> list[int]:
    """Indexes of efficient options on the lower convex hull of (bits, cost); first and last are always on it."""
    hull: list[int] = []
    for index, option in enumerate(options):
        while len(hull) > 1:
            low, high = options[hull[-2]], options[hull[-1]]
            # high stays only if the way to it saves more per bit than the way from it
            if (low.cost - high.cost) * (option.bits - high.bits) > (high.cost - option.cost) * (high.bits - low.bits):
                break
            hull.pop()
        hull.append(index)
    return hull


@dataclass(frozen=True)
class Table:
    """The efficient options of all groups, flat: those of group g are first[g] .. first[g + 1] - 1."""

    options: list[Option]
    first: NDArray[np.int64]  # [groups + 1]
    owner: NDArray[np.int64]  # [options] the group of each option
    bits: NDArray[np.int64]  # [options]
    cost: NDArray[np.float64]  # [options] nats per token
    hulls: list[list[int]]  # per group, flat indexes


def build_table(problem: Problem) -> Table:
    """The table of a prepared problem."""
    options: list[Option] = []
    hulls: list[list[int]] = []
    counts: list[int] = []
    for group in problem.groups:
        efficient = efficient_options(group)
        start = len(options)
        hulls.append([start + index for index in lower_hull(efficient)])
        options.extend(efficient)
        counts.append(len(efficient))
    return Table(
        options=options,
        first=np.array([0, *accumulate(counts)], dtype=np.int64),
        owner=np.repeat(np.arange(len(counts)), counts),
        bits=np.array([option.bits for option in options], dtype=np.int64),
        cost=np.array([option.cost for option in options], dtype=np.float64),
        hulls=hulls,
    )


def hull_steps(table: Table) -> list[tuple[float, int, int, str, int, int]]:
    """A heap of first upgrades: (-KL saved per bit, bits added, group, label, place on the hull, flat index)."""
    heap = [_step(table, group, 1) for group, hull in enumerate(table.hulls) if len(hull) > 1]
    heapq.heapify(heap)
    return heap


def next_step(table: Table, group: int, place: int) -> tuple[float, int, int, str, int, int] | None:
    """The upgrade of a group after the one to `place` on its hull, as in hull_steps; None at the end."""
    return _step(table, group, place + 1) if place + 1 < len(table.hulls[group]) else None


def _step(table: Table, group: int, place: int) -> tuple[float, int, int, str, int, int]:
    hull = table.hulls[group]
    low, high = table.options[hull[place - 1]], table.options[hull[place]]
    added = high.bits - low.bits
    return (high.cost - low.cost) / added, added, group, high.source, place, hull[place]


# --- the solver on numbers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """A feasible choice and the multiplier that bounds every other one."""

    chosen: NDArray[np.int64]  # [groups] flat indexes into the table
    multiplier: float  # nats per bit, >= 0
    reduced: NDArray[np.float64]  # [options] cost + multiplier * bits above the least of its group, >= 0
    gap: float  # cost of the choice - Lagrangian bound, >= 0


def run_greedy(table: Table, budget_bits: int) -> Start:
    """The greedy choice for the bits of the groups alone; the caller has checked that the budget is reachable."""
    chosen = np.array([hull[0] for hull in table.hulls], dtype=np.int64)
    left = budget_bits - int(table.bits[chosen].sum())
    multiplier = 0.0
    heap = hull_steps(table)
    while heap:
        slope, added, group, _, place, index = heap[0]
        if added > left:  # later upgrades of this group start from this one; the exchanges see what else may fit
            multiplier = multiplier or -slope
            heapq.heappop(heap)
            continue
        chosen[group] = index
        left -= added
        following = next_step(table, group, place)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, following)
    reduced = reduced_costs(table, multiplier)
    _exchange(table, chosen, reduced, multiplier, left)
    return Start(chosen, multiplier, reduced, lagrangian_gap(table, chosen, reduced, multiplier, budget_bits))


def reduced_costs(table: Table, multiplier: float) -> NDArray[np.float64]:
    """cost + multiplier * bits of each option above the least of its group, nats per token: what it loses at least.

    For any choice: cost = Lagrangian bound + sum of its reduced costs + multiplier * bits left. So an option whose
    reduced cost alone is above the gap of a known choice is in no better one.
    """
    if not len(table.bits):
        return np.zeros(0)
    first = table.first[:-1]
    # from the group's cheapest option on, so that large bits do not drown small costs
    value = (table.cost - table.cost[first][table.owner]) + multiplier * (table.bits - table.bits[first][table.owner])
    reduced: NDArray[np.float64] = value - np.minimum.reduceat(value, first)[table.owner]
    return reduced


def lagrangian_gap(
    table: Table, chosen: NDArray[np.int64], reduced: NDArray[np.float64], multiplier: float, budget_bits: int
) -> float:
    """Cost of a choice above the Lagrangian bound, nats per token; a sum of terms >= 0, so nothing cancels."""
    left = budget_bits - int(table.bits[chosen].sum())
    return math.fsum(reduced[chosen]) + multiplier * left


def _exchange(
    table: Table, chosen: NDArray[np.int64], reduced: NDArray[np.float64], multiplier: float, left: int
) -> None:
    """Improve `chosen` in place: the best single upgrade or down-and-up pair that fits, until none lowers the cost.

    Only options whose reduced cost is below the gap are tried: no other can be part of a better choice. That leaves
    a few near the break for real tables, so that this stays near-linear.
    """
    work = 0
    while True:
        gap = math.fsum(reduced[chosen]) + multiplier * left
        targets = np.flatnonzero(reduced < gap)
        work += len(targets)
        if not len(targets) or work > _EXCHANGE_WORK:
            return
        owner = table.owner[targets]
        added = table.bits[targets] - table.bits[chosen[owner]]  # bits; negative = a downgrade
        saved = table.cost[chosen[owner]] - table.cost[targets]  # nats; negative = a downgrade
        move = _best_exchange(added, saved, owner, left)
        if move is None:
            return
        for position in move:
            chosen[owner[position]] = targets[position]
            left -= int(added[position])


def _best_exchange(
    added: NDArray[np.int64], saved: NDArray[np.float64], owner: NDArray[np.int64], left: int
) -> tuple[int, ...] | None:
    """The exchange that saves most: one upgrade within `left` bits, or one downgrade and one upgrade in two groups.

    Ties: fewer bits, then the move found first in the order (bits added, group).
    """
    ups = np.flatnonzero(added > 0)
    if not len(ups):
        return None
    ups = ups[np.lexsort((owner[ups], -saved[ups], added[ups]))]
    # best[k] and other[k]: the upgrade that saves most among ups[:k], and the one of another group than best[k]'s
    best, other = [-1], [-1]
    up_saved, up_owner = saved[ups].tolist(), owner[ups].tolist()
    first, second = -1, -1
    for place, (gain, group) in enumerate(zip(up_saved, up_owner, strict=True)):
        if first < 0 or gain > up_saved[first]:
            if first >= 0 and up_owner[first] != group:
                second = first
            first = place
        elif group != up_owner[first] and (second < 0 or gain > up_saved[second]):
            second = place
        best.append(first)
        other.append(second)

    def key(gain: float, bits: int) -> tuple[float, int]:
        return (-gain, bits)

    found: tuple[int, ...] | None = None
    found_key = (0.0, 0)
    single = best[int(np.searchsorted(added[ups], left, side="right"))]
    if single >= 0:
        found, found_key = (int(ups[single]),), key(up_saved[single], int(added[ups[single]]))
    downs = np.flatnonzero(added < 0)
    downs = downs[np.lexsort((owner[downs], added[downs]))]
    within = np.searchsorted(added[ups], left - added[downs], side="right").tolist()
    for down, limit, gain, group in zip(
        downs.tolist(), within, saved[downs].tolist(), owner[downs].tolist(), strict=True
    ):
        up = best[limit]
        if up >= 0 and up_owner[up] == group:
            up = other[limit]
        if up < 0:
            continue
        total = up_saved[up] + gain
        if total <= 1e-12 * up_saved[up]:  # rounding noise is not a gain; also keeps the loop from turning in circles
            continue
        candidate = key(total, int(added[down] + added[ups[up]]))
        if found is None or candidate < found_key:
            found, found_key = (down, int(ups[up])), candidate
    return found


def make_solution(
    problem: Problem, table: Table, chosen: NDArray[np.int64], budget_bits: int, gap: float, solver: str
) -> Solution:
    """A Solution of a chosen option per group; bits are added in whole numbers, costs without rounding in between."""
    options = [table.options[index] for index in chosen.tolist()]
    bits = problem.fixed_bits + sum(option.bits for option in options)
    assert bits <= budget_bits, "a solver went over its budget"
    cost = math.fsum(option.cost for option in options)
    choice = expand_choice(problem, [option.source for option in options])
    return Solution(choice, bits, cost, cost - gap, gap, solver, budget_bits)
