"""The budgeted choice to proven optimality.

    minimise    sum of cost[g, chosen option of g]
    subject to  sum of bits[g, chosen option of g] <= budget,   one option per group

The multiple-choice knapsack. At the multiplier m of the greedy solution every choice costs

    Lagrangian bound  +  sum of reduced costs  +  m * bits left,      all three sums' terms >= 0

so options whose reduced cost is above the greedy's gap are out, and most groups are settled (Pisinger, "A minimal
algorithm for the multiple-choice knapsack problem", EJOR 83, 1995). What remains, the core, is enumerated as two
lists of undominated partial choices, joined by binary search (Horowitz and Sahni, "Computing partitions with
applications to the knapsack problem", JACM 21, 1974), with whole-number bits and no tolerance. A core too wide for
that goes to HiGHS (scipy.optimize.milp), in the same reduced form, scaled so that its tolerances do not matter, with
equal groups merged into one whose options are counted.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from recompile.optimize.greedy import Start, Table, build_table, lagrangian_gap, make_solution, run_greedy
from recompile.optimize.problem import Problem, Solution, check_budget, prepare

_ROUGH_GROUPS = 64  # of the core in an inexact enumeration that sharpens the incumbent
_ROUGH_STATES = 20_000  # partial choices kept per list there
_PROOF_STATES = 400_000  # per list in the enumeration that proves
_STORED_STATES = 20_000_000  # of all steps together: 6 bytes each
_HIGHS_COLUMNS = 20_000  # above this HiGHS spends minutes before it looks at its time limit
_COST_SCALE = 1e4  # the gap in HiGHS's units; its absolute tolerance of 1e-6 is then 1e-10 of the gap
_TIE = 1e-13  # costs that differ by less than this part of the sum of the core's costs are equal


def solve_exact(problem: Problem, budget_bits: int, time_limit_s: float = 60) -> Solution:
    """The choice of least cost within budget_bits (bits, fixed_bits included); of equal costs, of fewest bits.

    `gap` (nats per token) is cost - lower_bound: 0.0 when optimality is proven, else what the better of the
    Lagrangian and the HiGHS bound leaves open after time_limit_s seconds. Never worse than greedy, never over the
    budget. The tie rule holds where HiGHS was not needed. Within a group, equal bits and cost go to the source label
    that sorts first. Options without a finite cost are left out. Raises BudgetError outside the reachable range,
    RecompileError for a group without a measured option.
    """
    deadline = time.monotonic() + time_limit_s
    problem = prepare(problem)
    check_budget(problem, budget_bits)
    table = build_table(problem)
    start = run_greedy(table, budget_bits - problem.fixed_bits)
    chosen, gap = _improve(table, start, budget_bits - problem.fixed_bits, deadline)
    return make_solution(problem, table, chosen, budget_bits, gap, "exact")


@dataclass(frozen=True)
class _Core:
    """The groups that still have a choice. Bits count from each group's smallest kept option, in `unit` bits."""

    groups: NDArray[np.int64]  # [core groups] group numbers
    index: list[NDArray[np.int64]]  # per core group: flat table indexes, bits rising
    bits: list[NDArray[np.int64]]  # per core group, first is 0
    reduced: list[NDArray[np.float64]]  # per core group, nats per token
    base: NDArray[np.int64]  # [groups] flat index of the smallest kept option of every group
    unit: int  # greatest common divisor of all differences of bits
    budget: int  # in units, above the base
    current: list[int]  # per core group, the option number of the incumbent
    gap: float  # of the incumbent above the Lagrangian bound of the rounded-down budget, nats per token
    noise: float  # rounding error of a sum of reduced costs, nats per token


def _improve(table: Table, start: Start, budget_bits: int, deadline: float) -> tuple[NDArray[np.int64], float]:
    """The best choice found, and its proven gap."""
    chosen = start.chosen
    enough = time.monotonic() + (deadline - time.monotonic()) / 2  # the other half is for HiGHS
    core = _make_core(table, start, chosen, budget_bits)
    while len(core.groups) > _ROUGH_GROUPS and core.gap > core.noise:
        gap, part = core.gap, _narrow(core)
        found, _ = _enumerate(part, start.multiplier, _ROUGH_STATES, enough)
        if found is not None:
            chosen = _better(table, chosen, _fill(part, found))
            core = _make_core(table, start, chosen, budget_bits)
        if core.gap > 0.9 * gap:
            break
    for limit in (_ROUGH_STATES, _PROOF_STATES):
        if not len(core.groups) or core.gap <= core.noise:
            return chosen, 0.0
        found, complete = _enumerate(core, start.multiplier, limit, enough)
        if found is not None:
            chosen = _better(table, chosen, _fill(core, found))
        if complete:
            return chosen, 0.0
        core = _make_core(table, start, chosen, budget_bits)
    if core.gap <= core.noise:
        return chosen, 0.0
    counted, bound = _solve_highs(core, start.multiplier, deadline - time.monotonic())
    if counted is not None:
        candidate = _fill(core, counted)
        if int(table.bits[candidate].sum()) <= budget_bits:  # HiGHS's integers are integers to 1e-6 only
            chosen = _better(table, chosen, candidate)
    slack = budget_bits - int(table.bits[core.base].sum()) - core.budget * core.unit
    gap = lagrangian_gap(table, chosen, start.reduced, start.multiplier, budget_bits - slack) - bound
    # HiGHS proves to its tolerances, 1e-10 of the gap in these units: what is left of that size is nothing
    return chosen, gap if gap > max(core.noise, 1e-9 * core.gap) else 0.0


def _better(table: Table, old: NDArray[np.int64], new: NDArray[np.int64]) -> NDArray[np.int64]:
    """The cheaper choice; of costs equal to rounding, the one with fewer bits."""
    changed = old != new
    saved = math.fsum(table.cost[old[changed]]) - math.fsum(table.cost[new[changed]])
    noise = _TIE * float(np.abs(table.cost[old[changed]]).sum() + np.abs(table.cost[new[changed]]).sum())
    if abs(saved) <= noise:
        return new if int(table.bits[new].sum()) < int(table.bits[old].sum()) else old
    return new if saved > 0 else old


def _make_core(table: Table, start: Start, chosen: NDArray[np.int64], budget_bits: int) -> _Core:
    """Settle what the gap settles. The budget rounded down to what sums of the core can reach narrows the gap further,
    which may settle more, until nothing changes."""
    first, reduced, multiplier = table.first, start.reduced, start.multiplier
    budget = budget_bits
    low, high = first[:-1], first[1:] - 1
    # the size of what reduced costs are differences of, for their rounding error
    terms = table.cost[low] - table.cost[high] + multiplier * (table.bits[high] - table.bits[low])
    while True:
        gap = lagrangian_gap(table, chosen, reduced, multiplier, budget)
        keep = reduced <= gap * (1 + 1e-12)
        counts = np.add.reduceat(keep, first[:-1], dtype=np.int64) if len(keep) else np.zeros(0, dtype=np.int64)
        open_groups = np.flatnonzero(counts > 1)
        noise = 1e-15 * float(terms[open_groups].sum())
        keep |= reduced <= gap + noise
        kept = np.flatnonzero(keep)
        counts = np.add.reduceat(keep, first[:-1], dtype=np.int64) if len(keep) else np.zeros(0, dtype=np.int64)
        open_groups = np.flatnonzero(counts > 1)
        ends = np.cumsum(counts)
        base = kept[ends - counts]
        above = table.bits[kept] - table.bits[base][table.owner[kept]]
        unit = int(np.gcd.reduce(above)) if len(open_groups) else 1
        base_bits = int(table.bits[base].sum())
        rounded = base_bits + (budget - base_bits) // unit * unit
        if rounded == budget:
            break
        budget = rounded
    slices = [slice(int(ends[g] - counts[g]), int(ends[g])) for g in open_groups]
    return _Core(
        groups=open_groups,
        index=[kept[s] for s in slices],
        bits=[above[s] // unit for s in slices],
        reduced=[reduced[kept[s]] for s in slices],
        base=base,
        unit=unit,
        budget=(budget - base_bits) // unit,
        current=[int(np.searchsorted(kept[s], chosen[g])) for g, s in zip(open_groups.tolist(), slices, strict=True)],
        gap=gap,
        noise=noise,
    )


def _narrow(core: _Core) -> _Core:
    """The part of the core most likely to hold a better choice: the groups where the incumbent gives something away,
    then those that have a second option nearly as good as the first. The others stay as the incumbent has them."""
    width = _widths(core)
    given = [float(reduced[number]) > 0 for reduced, number in zip(core.reduced, core.current, strict=True)]
    ranked = sorted(range(len(core.groups)), key=lambda g: (not given[g], width[g], g))
    inside = sorted(ranked[:_ROUGH_GROUPS])
    base, budget = core.base.copy(), core.budget
    for g in ranked[_ROUGH_GROUPS:]:
        base[core.groups[g]] = core.index[g][core.current[g]]
        budget -= int(core.bits[g][core.current[g]])
    return replace(
        core,
        groups=core.groups[inside],
        index=[core.index[g] for g in inside],
        bits=[core.bits[g] for g in inside],
        reduced=[core.reduced[g] for g in inside],
        base=base,
        budget=budget,
        current=[core.current[g] for g in inside],
    )


def _widths(core: _Core) -> list[float]:
    """What taking its second best option loses at least, per core group, nats per token."""
    return [float(np.partition(reduced, 1)[1]) for reduced in core.reduced]


def _fill(core: _Core, found: list[int]) -> NDArray[np.int64]:
    """Flat table indexes of a whole choice, from an option number per core group."""
    chosen = core.base.copy()
    for group, index, number in zip(core.groups.tolist(), core.index, found, strict=True):
        chosen[group] = index[number]
    return chosen


# --- enumeration of the core ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Half:
    """Undominated partial choices of half of the core, bits rising, value (reduced - multiplier * bits) falling."""

    order: list[int]  # core groups, as added
    bits: NDArray[np.int64]  # [states] units
    reduced: NDArray[np.float64]  # [states] nats per token
    parents: list[NDArray[np.int32]]  # per step, [states after it]: the state before
    numbers: list[NDArray[np.int16]]  # per step, [states after it]: the option taken


def _enumerate(core: _Core, multiplier: float, limit: int, deadline: float) -> tuple[list[int] | None, bool]:
    """(option number per core group or None, whether nothing was left out and so the choice is optimal)."""
    per_unit = multiplier * core.unit
    # wide choices first: while the list is short, whatever uses up the gap alone is gone at once
    width = _widths(core)
    order = sorted(range(len(core.groups)), key=lambda g: (-width[g], g))
    stored = 0
    halves, complete = [], True
    for part in (order[0::2], order[1::2]):
        rest = sum(int(bits[-1]) for bits in core.bits)
        half, whole = _list_states(core, part, per_unit, limit, _STORED_STATES // 2 - stored // 2, rest, deadline)
        complete &= whole
        if half is None:
            return None, False
        halves.append(half)
    left, right = halves
    # value of a pair: reduced + per_unit * units left over, the cost above the Lagrangian bound
    partner = np.searchsorted(right.bits, core.budget - left.bits, side="right") - 1
    fits = np.flatnonzero(partner >= 0)
    if not len(fits):
        return None, False
    partner = partner[fits]
    unused = core.budget - left.bits[fits] - right.bits[partner]
    value = left.reduced[fits] + right.reduced[partner] + per_unit * unused
    least = float(value.min())
    # of equal values the fewest bits: for each left state the smallest right state that is as good, to rounding
    tolerance = core.noise + _TIE * per_unit * core.budget
    right_value = right.reduced - per_unit * right.bits  # falling
    wanted = least + tolerance - left.reduced[fits] - per_unit * (core.budget - left.bits[fits])
    smallest = np.minimum(np.searchsorted(-right_value, -wanted, side="left"), partner)
    total = np.where(right_value[smallest] <= wanted, left.bits[fits] + right.bits[smallest], core.budget + 1)
    pick = int(np.argmin(total))
    if total[pick] > core.budget:  # rounding hid even the best pair from the search
        pick = int(np.argmin(value))
        smallest = partner
    found = [0] * len(core.groups)
    _trace(left, int(fits[pick]), found)
    _trace(right, int(smallest[pick]), found)
    return found, complete


def _list_states(
    core: _Core, order: list[int], per_unit: float, limit: int, room: int, rest: int, deadline: float
) -> tuple[_Half | None, bool]:
    """All undominated partial choices within budget and gap; at most `limit` of least reduced cost after a step."""
    bits, reduced = np.zeros(1, dtype=np.int64), np.zeros(1)
    parents: list[NDArray[np.int32]] = []
    numbers: list[NDArray[np.int16]] = []
    ceiling = core.gap + core.noise
    complete = True
    for group in order:
        rest -= int(core.bits[group][-1])
        all_bits = (core.bits[group][:, None] + bits).ravel()  # [options * states]
        all_reduced = (core.reduced[group][:, None] + reduced).ravel()
        short = np.maximum(core.budget - all_bits - rest, 0)  # units that no choice of the other groups can use
        alive = np.flatnonzero((all_bits <= core.budget) & (all_reduced + per_unit * short <= ceiling))
        value = all_reduced[alive] - per_unit * all_bits[alive]
        alive = alive[np.lexsort((value, all_bits[alive]))]
        value = all_reduced[alive] - per_unit * all_bits[alive]
        lower = np.ones(len(alive), dtype=bool)
        lower[1:] = value[1:] < np.minimum.accumulate(value)[:-1]
        alive = alive[lower]
        if len(alive) > limit:
            complete = False
            alive = alive[_spread(np.floor(all_reduced[alive] * (1e3 / core.gap)), limit)]
        room -= len(alive)
        if not len(alive) or room < 0 or time.monotonic() > deadline:
            return None, False
        parents.append((alive % len(bits)).astype(np.int32))
        numbers.append((alive // len(bits)).astype(np.int16))
        bits, reduced = all_bits[alive], all_reduced[alive]
    return _Half(order, bits, reduced, parents, numbers), complete


def _spread(rank: NDArray[np.float64], limit: int) -> NDArray[np.int64]:
    """Places of the `limit` least ranks, in order; of those equal to the last one, evenly spaced places."""
    last = np.partition(rank, limit - 1)[limit - 1]
    below, equal = np.flatnonzero(rank < last), np.flatnonzero(rank == last)
    room = limit - len(below)
    return np.sort(np.concatenate([below, equal[np.arange(room) * len(equal) // room]]))


def _trace(half: _Half, state: int, found: list[int]) -> None:
    for step in reversed(range(len(half.order))):
        found[half.order[step]] = int(half.numbers[step][state])
        state = int(half.parents[step][state])


# --- HiGHS for wide cores ---------------------------------------------------------------------------------------


def _solve_highs(core: _Core, multiplier: float, time_limit_s: float) -> tuple[list[int] | None, float]:
    """(option number per core group or None, proven cost above the Lagrangian bound, nats per token).

    minimise  sum of reduced * x + multiplier * unused   with   sum of bits * x + unused = budget, so that all
    coefficients of the objective lie between 0 and the gap. Groups with equal options are one group whose x count.
    """
    if time_limit_s <= 0:
        return None, 0.0
    per_unit = multiplier * core.unit
    scale = _COST_SCALE / core.gap
    classes: dict[tuple[bytes, bytes], list[int]] = {}
    for number, (bits, reduced) in enumerate(zip(core.bits, core.reduced, strict=True)):
        classes.setdefault((bits.tobytes(), reduced.tobytes()), []).append(number)
    members = list(classes.values())
    sizes = np.array([len(core.bits[numbers[0]]) for numbers in members])
    counts = np.array([len(numbers) for numbers in members], dtype=float)
    bits_x = np.concatenate([core.bits[numbers[0]] for numbers in members])
    reduced_x = np.concatenate([core.reduced[numbers[0]] for numbers in members])
    columns = len(bits_x)
    if columns > _HIGHS_COLUMNS:
        return None, 0.0
    objective = np.append(reduced_x, per_unit) * scale
    one_each = csr_array(
        (np.ones(columns), (np.repeat(np.arange(len(members)), sizes), np.arange(columns))),
        shape=(len(members), columns + 1),
    )
    largest = float(bits_x.max())  # the row in these units: HiGHS's tolerances are absolute
    spent = csr_array((np.append(bits_x, 1) / largest)[None, :])
    budget = core.budget / largest
    unused = math.ceil(core.gap / per_unit) + 1 if per_unit > 0 else core.budget
    result = milp(
        objective,
        integrality=np.append(np.ones(columns), 0),
        bounds=Bounds(0, np.append(np.repeat(counts, sizes), min(unused, core.budget))),
        constraints=[LinearConstraint(one_each, counts, counts), LinearConstraint(spent, budget, budget)],
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )
    bound = result.mip_dual_bound
    proven = max(0.0, bound / scale) if bound is not None and math.isfinite(bound) else 0.0
    if result.x is None:
        return None, proven
    found = [0] * len(core.groups)
    start = 0
    for numbers, size in zip(members, sizes.tolist(), strict=True):
        times = np.rint(result.x[start : start + size]).astype(np.int64)
        start += size
        if times.sum() != len(numbers):
            return None, proven
        for group, option in zip(numbers, np.repeat(np.arange(size), times).tolist(), strict=True):
            found[group] = option
    return found, proven
