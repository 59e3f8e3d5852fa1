"""Several limits at once: the multiple-choice knapsack with more than one row, and with steps between neighbours.

    minimise    sum of cost[g, o] * x[g, o]
    subject to  sum of use_k[g, o] * x[g, o] <= limit_k   for every row k,   one option per group

One row is left to the solvers of the plain problem, with its use in place of the bits; rows that share no group are
solved one by one; anything else goes to HiGHS (scipy.optimize.milp). Steps between neighbouring layers are rows, too:
with rungs r counted from 0, for every r  [a at r or higher] <= [b at r - step or higher], whose matrix is totally
unimodular by itself, so that they cost the search little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from recompile.errors import ArgumentError, BudgetError, RecompileError
from recompile.optimize.problem import Group, Option, Problem, Solution, expand_choice

Solver = Callable[[Problem, int], Solution]

_REPAIRS = 6  # HiGHS keeps rows to 1e-6 of their scale: a row that is over by bits is asked again that much tighter
_COST_SCALE = 1e4  # the spread of all costs in HiGHS's units; its absolute gap of 1e-6 is then 1e-10 of the spread


def _plain(value: int) -> str:
    return str(value)


@dataclass(frozen=True)
class Row:
    """One limit. use: number of a group -> what each of its options takes, in the order of the prepared problem's
    options; groups that are not named take nothing. fixed: taken whatever is chosen, part of limit and of `used`."""

    name: str
    use: Mapping[int, tuple[int, ...]]
    limit: int
    fixed: int = 0
    spell: Callable[[int], str] = _plain  # a used amount in the user's unit
    is_step: bool = False  # a step between neighbours: never what a message is about

    def used(self, numbers: Sequence[int]) -> int:
        """What a choice takes; numbers: the option of every group."""
        return self.fixed + sum(use[numbers[group]] for group, use in self.use.items())

    @property
    def least(self) -> int:
        return self.fixed + sum(min(use) for use in self.use.values())

    @property
    def most(self) -> int:
        return self.fixed + sum(max(use) for use in self.use.values())


def step_rows(problem: Problem, neighbours: Sequence[tuple[int, int]], rung: Mapping[str, int], step: int) -> list[Row]:
    """Rows that keep the options of two groups within `step` rungs of each other. rung: source -> place on the ladder,
    from 0. Raises ArgumentError for a step below 0."""
    if step < 0:
        raise ArgumentError(f"{{max_step}} {step}: wanted 0 or more rungs")
    rows = []
    for one, other in neighbours:
        for low, high in ((one, other), (other, one)):
            places = [rung[option.source] for option in problem.groups[high].options]
            below = [rung[option.source] for option in problem.groups[low].options]
            for place in sorted(set(places)):
                if place - step <= min(below):
                    continue
                use = {high: tuple(int(p >= place) for p in places), low: tuple(-int(p >= place - step) for p in below)}
                rows.append(Row("{max_step}", use, 0, is_step=True))
    return rows


def solve_rows(problem: Problem, rows: Sequence[Row], solver: Solver, time_limit_s: float = 60) -> Solution:
    """The choice of least cost within all rows, and its proven gap. `problem` must be prepared.

    solver: what settles one row alone (solve_exact or solve_greedy). `bits` of the result counts the problem's bits,
    `budget_bits` is the sum that the rows leave room for only where they are one row of bits; else it equals `bits`.
    Raises BudgetError where no choice is within all rows, naming the rows that bind and what they could reach.
    """
    for row in rows:
        if not row.is_step and row.least > row.limit:
            raise BudgetError(_out_of_reach(row, row.least, row.most))
    parts = _independent(problem, rows)
    if parts is not None:
        numbers, gap, name = _solve_apart(problem, parts, solver)
    else:
        numbers, gap = _solve_together(problem, rows, time_limit_s)
        name = "exact"
    for row in rows:
        assert row.used(numbers) <= row.limit, f"{row.name} is not kept"
    options = [group.options[number] for group, number in zip(problem.groups, numbers, strict=True)]
    bits = problem.fixed_bits + sum(option.bits for option in options)
    cost = math.fsum(option.cost for option in options)
    choice = expand_choice(problem, [option.source for option in options])
    return Solution(choice, bits, cost, cost - gap, gap, name, bits)


def _out_of_reach(row: Row, least: int, most: int, others: str = "") -> str:
    return (
        f"{row.name} binds: {row.spell(row.limit)} asked for, reachable range{others}: {row.spell(least)} to "
        f"{row.spell(most)}"
    )


# ---- rows that share no group ----------------------------------------------------------------------------------------


def _independent(problem: Problem, rows: Sequence[Row]) -> list[tuple[list[int], Row | None]] | None:
    """(groups, their row or None) where no group is in two rows and none is a step; else None."""
    owner: dict[int, Row] = {}
    for row in rows:
        if row.is_step or any(group in owner for group in row.use):
            return None
        owner.update(dict.fromkeys(row.use, row))
    free = [group for group in range(len(problem.groups)) if group not in owner]
    return [(sorted(row.use), row) for row in rows] + ([(free, None)] if free else [])


def _solve_apart(
    problem: Problem, parts: Sequence[tuple[list[int], Row | None]], solver: Solver
) -> tuple[list[int], float, str]:
    numbers, gap, name = [0] * len(problem.groups), 0.0, "exact"
    for members, row in parts:
        groups = []
        for place in members:
            group = problem.groups[place]
            use = row.use[place] if row is not None else (0,) * len(group.options)
            options = tuple(Option(o.source, bits, o.cost) for o, bits in zip(group.options, use, strict=True))
            groups.append(Group(str(place), options))
        part = Problem(tuple(groups), row.fixed if row is not None else 0)
        most = part.fixed_bits + sum(max(option.bits for option in group.options) for group in groups)
        found = solver(part, min(row.limit, most) if row is not None else 0)
        gap += found.gap
        name = found.solver
        for place, group in zip(members, groups, strict=True):
            labels = [option.source for option in group.options]
            numbers[place] = labels.index(found.choice[str(place)])
    return numbers, gap, name


# ---- HiGHS -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    first: NDArray[np.int64]  # [groups + 1] column of each group's first option
    one_each: csr_array
    rows: csr_array  # scaled
    scale: NDArray[np.float64]  # [rows]


def _build(problem: Problem, rows: Sequence[Row]) -> _Matrix:
    counts = [len(group.options) for group in problem.groups]
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    columns = int(first[-1])
    one_each = csr_array(
        (np.ones(columns), (np.repeat(np.arange(len(counts)), counts), np.arange(columns))),
        shape=(len(counts), columns),
    )
    places, at, values, scale = [], [], [], np.ones(len(rows))
    for number, row in enumerate(rows):
        largest = max((abs(value) for use in row.use.values() for value in use), default=1) or 1
        scale[number] = 1.0 / largest
        for group, use in row.use.items():
            for option, value in enumerate(use):
                if value:
                    places.append(number)
                    at.append(int(first[group]) + option)
                    values.append(value / largest)
    matrix = csr_array((values, (places, at)), shape=(len(rows), columns))
    return _Matrix(first, one_each, matrix, scale)


def _run(
    matrix: _Matrix, objective: NDArray[np.float64], limits: NDArray[np.float64], time_limit_s: float
) -> OptimizeResult:
    columns = len(objective)
    constraints = [LinearConstraint(matrix.one_each, 1, 1)]
    if len(limits):
        constraints.append(LinearConstraint(matrix.rows, -np.inf, limits * matrix.scale))
    return milp(
        objective,
        integrality=np.ones(columns),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": max(0.1, time_limit_s), "mip_rel_gap": 0.0},
    )


def _solve_together(problem: Problem, rows: Sequence[Row], time_limit_s: float) -> tuple[list[int], float]:
    deadline = time.monotonic() + time_limit_s
    matrix = _build(problem, rows)
    # costs count from the least of their group: sums of small differences, not of large numbers
    least = [min(option.cost for option in group.options) for group in problem.groups]
    above = np.array([o.cost - low for group, low in zip(problem.groups, least, strict=True) for o in group.options])
    spread = float(np.add.reduceat(above, matrix.first[:-1]).max(initial=0.0)) if len(above) else 0.0
    unit = _COST_SCALE / spread if spread > 0 else 1.0
    limits = np.array([row.limit - row.fixed for row in rows], dtype=np.float64)
    bound = 0.0
    for attempt in range(_REPAIRS):
        found = _run(matrix, above * unit, limits, deadline - time.monotonic())
        if found.x is None:
            if found.status == 2 and attempt == 0:
                raise BudgetError(_who_binds(problem, rows, matrix))
            break
        if attempt == 0:  # the bound of the untightened problem is the one that holds
            dual = found.mip_dual_bound
            bound = max(0.0, dual / unit) if dual is not None and math.isfinite(dual) else 0.0
        numbers = _numbers(problem, matrix, found.x)
        over = [max(0, row.used(numbers) - row.limit) for row in rows]
        if not any(over):
            cost = math.fsum(
                group.options[number].cost - low
                for group, number, low in zip(problem.groups, numbers, least, strict=True)
            )
            gap = cost - bound
            return numbers, gap if gap > 1e-9 * max(spread, cost) else 0.0
        limits = limits - np.array(over)
    raise RecompileError(
        f"no choice within all limits was found in {time_limit_s:g} seconds, though none was proven impossible; "
        f"loosen one of them: {', '.join(dict.fromkeys(row.name for row in rows))}"
    )


def _numbers(problem: Problem, matrix: _Matrix, x: NDArray[np.float64]) -> list[int]:
    first = matrix.first.tolist()
    return [int(np.argmax(x[first[group] : first[group + 1]])) for group in range(len(problem.groups))]


def _who_binds(problem: Problem, rows: Sequence[Row], matrix: _Matrix) -> str:
    """Which rows cannot be met while the others are: the least that each could reach then."""
    told = []
    for number, row in enumerate(rows):
        if row.is_step:
            continue
        objective = np.zeros(int(matrix.first[-1]))
        for group, use in row.use.items():
            start = int(matrix.first[group])
            objective[start : start + len(use)] = np.array(use) * matrix.scale[number]
        limits = np.array([math.inf if other is row else other.limit - other.fixed for other in rows])
        found = _run(matrix, objective, limits, 10)
        if found.x is not None:
            least = row.used(_numbers(problem, matrix, found.x))
            if least > row.limit:
                told.append(_out_of_reach(row, least, row.most, " beside the other limits"))
    if not told:
        told.append("the limits exclude each other: " + ", ".join(dict.fromkeys(row.name for row in rows)))
    return "; ".join(told)
