"""Cost against size: the nested hull solutions of all budgets at once, and the smallest size for a given cost."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace

from recompile.errors import BudgetError, RecompileError
from recompile.optimize.greedy import build_table, hull_steps, next_step
from recompile.optimize.problem import Problem, Solution, expand_choice, prepare, reachable_range

Solver = Callable[[Problem, int], Solution]  # solve_greedy or solve_exact


@dataclass(frozen=True)
class HullPoint:
    """One solution on the path: the one before it with one group moved to a more expensive source."""

    bits: int  # stored bits, fixed_bits included
    cost: float  # predicted KL, nats per token
    saved_per_bit: float  # nats per bit that the move saves; falls along the path; inf for the first point
    members: tuple[str, ...]  # of the moved group; () for the first point
    source: str  # what they move to; "" for the first point


@dataclass(frozen=True)
class LagrangianPath:
    """All hull solutions, cheapest first: bits rise, costs fall, each differs from the one before in one group.

    Each is optimal for exactly its own bits (the linear relaxation is whole there); between two neighbours no choice
    lies below the straight line that joins them.
    """

    points: tuple[HullPoint, ...]
    cheapest: dict[str, str]  # member -> source of the first point

    def choice_at(self, index: int) -> dict[str, str]:
        """member -> source of points[index]."""
        choice = dict(self.cheapest)
        for point in self.points[1 : range(len(self.points))[index] + 1]:
            choice.update(dict.fromkeys(point.members, point.source))
        return choice

    def index_within(self, budget_bits: int) -> int:
        """The most expensive point of at most budget_bits. Raises BudgetError below the first."""
        index = bisect_right(self.points, budget_bits, key=lambda point: point.bits) - 1
        if index < 0:
            raise BudgetError(f"budget {budget_bits} bits is below the cheapest choice of {self.points[0].bits} bits")
        return index

    def bound_at(self, budget_bits: int) -> float:
        """No choice within budget_bits costs less, nats per token: the line between the neighbouring points."""
        index = self.index_within(budget_bits)
        point = self.points[index]
        if index + 1 == len(self.points):
            return point.cost
        return point.cost - self.points[index + 1].saved_per_bit * (budget_bits - point.bits)


def lagrangian_path(problem: Problem) -> LagrangianPath:
    """The path of all hull solutions, from the fewest bits to the least cost; one pass for every budget.

    Order and ties as in solve_greedy. Options without a finite cost are left out. Raises RecompileError for a group
    without a measured option.
    """
    problem = prepare(problem)
    table = build_table(problem)
    chosen = [hull[0] for hull in table.hulls]
    bits = problem.fixed_bits + sum(table.options[index].bits for index in chosen)
    cost = math.fsum(table.options[index].cost for index in chosen)
    cheapest = expand_choice(problem, [table.options[index].source for index in chosen])
    points = [HullPoint(bits, cost, math.inf, (), "")]
    heap = hull_steps(table)
    rounding = 0.0  # Neumaier's compensation: 300,000 small steps must not drift
    while heap:
        slope, added, group, source, place, index = heap[0]
        following = next_step(table, group, place)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, following)
        change = table.options[index].cost - table.options[table.hulls[group][place - 1]].cost
        total = cost + change
        rounding += (cost - total) + change if abs(cost) >= abs(change) else (change - total) + cost
        bits, cost = bits + added, total
        points.append(HullPoint(bits, cost + rounding, -slope, problem.groups[group].members, source))
    return LagrangianPath(tuple(points), cheapest)


def solve_for_cost(problem: Problem, max_cost: float, solver: Solver) -> Solution:
    """The smallest size whose predicted cost is at most max_cost (nats per token), by bisection on the budget.

    With solve_exact it is the smallest there is (as far as its gaps are 0.0), with solve_greedy the smallest that the
    bisection met. `budget_bits` of the result is the size found. Raises BudgetError where even the least cost is above
    max_cost, RecompileError for a max_cost that is not a number.
    """
    if math.isnan(max_cost):
        raise RecompileError("the cost limit is not a number")
    problem = prepare(problem)
    path = lagrangian_path(problem)
    least, most = path.points[-1].cost, path.points[0].cost
    enough = next((index for index, point in enumerate(path.points) if point.cost <= max_cost), None)
    if enough is None:
        raise BudgetError(f"no choice costs {max_cost:g} nats per token; reachable range: {least:g} to {most:g}")
    best = solver(problem, path.points[enough].bits)
    if best.cost > max_cost:  # a point of the path sums to max_cost only but for rounding
        best = solver(problem, reachable_range(problem)[1])
    if best.cost > max_cost:
        raise BudgetError(f"no choice costs {max_cost:g} nats per token; reachable range: {least:g} to {most:g}")
    low = path.points[0].bits
    if enough > 0:
        # by bound_at no smaller size can do; one bit less allows for its rounding
        before, after = path.points[enough - 1], path.points[enough]
        low = max(low, before.bits + math.floor((before.cost - max_cost) / after.saved_per_bit) - 1)
    while low < best.bits:
        middle = (low + best.bits) // 2
        tried = solver(problem, middle)
        if tried.cost <= max_cost:
            best = tried
        else:
            low = middle + 1
    return replace(best, budget_bits=best.bits)  # its bound holds for the smaller budget all the more
