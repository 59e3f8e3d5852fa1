"""The smallest size whose MEASURED KL keeps a limit: the budgeted choice is solved for one budget after another, each
choice is measured as a whole, and what is measured says which budget comes next.

Sums of single swaps miss what whole mixes measure by a factor, and that factor changes slowly with size. So the next
budget is the one whose predicted KL is the limit times predicted / measured of the last choice, until one choice keeps
the limit and one does not; between those two, log KL is taken to fall along a straight line in bits.

Numbers only: what measures is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from recompile.costs import Profile
from recompile.errors import BudgetError, RecompileError
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Choice, Rules, check_kl_alone, choice_of, prepare_problem
from recompile.optimize.frontier import LagrangianPath, Solver, lagrangian_path
from recompile.optimize.problem import Problem, Solution, prepare
from recompile.optimize.solvers import load_by_costs

MOST_TRIES = 12  # measurements; five or six are usual
NEAR = 0.002  # of the range of sizes: a size is the smallest where one smaller by that much does not hold
_LEAST_STEP = 1 / 8  # of what is left between a size that holds and one that does not
_STRIDE = 4.0  # growth of steps into one direction


@dataclass(frozen=True)
class Tried:
    """One measured choice."""

    solution: Solution
    kl_nats: float  # measured, nats per token
    holds: bool  # whether it keeps the limit


def least_size(
    problem: Problem,
    max_kl_nats: float,
    solver: Solver,
    measure: Callable[[Mapping[str, str]], float],
    *,
    control_nats: float = 0.0,
) -> Iterator[Tried]:
    """Search the budget; yields every measured choice. The last one that holds is the smallest that was found.

    problem: prepared. measure: KL of a choice (member -> source), nats per token, above 0 where anything differs from
    the reference. control_nats: predicted KL of a mix whose costs are all 0. None holds only where the choice of least
    predicted cost, which is tried then, does not.
    """
    path = lagrangian_path(problem)
    lowest, highest = path.points[0].bits, path.points[-1].bits
    near = max(1, round(NEAR * (highest - lowest)))
    over, over_kl = lowest - 1, math.inf  # budgets up to here do not hold
    best: Tried | None = None
    known: dict[tuple[str, ...], float] = {}
    steps = 0  # into one direction
    budget = _bits_for(path, max_kl_nats - control_nats)
    while True:
        solution = solver(problem, budget)
        key = tuple(solution.choice.values())
        if key not in known:
            known[key] = measure(solution.choice)
            tried = Tried(solution, known[key], known[key] <= max_kl_nats)
            yield tried
            best = tried if tried.holds else best
        kl = known[key]
        if not kl <= max_kl_nats:
            over, over_kl = budget, kl if math.isfinite(kl) else 1e3 * max_kl_nats
        found = best.solution.bits if best is not None else highest + 1
        if found - over <= near or over >= highest or len(known) >= MOST_TRIES:
            return
        if best is not None and over >= lowest:
            share = math.log(over_kl / max_kl_nats) / math.log(over_kl / best.kl_nats) if best.kl_nats > 0 else 0.5
            share = min(max(share, _LEAST_STEP), 1 - _LEAST_STEP)
            budget = min(max(over + round(share * (found - over)), over + 1), found - 1)
            continue
        steps += 1
        stride = round(near * _STRIDE**steps)
        predicted = solution.cost + control_nats
        wanted = max_kl_nats * predicted / kl if 0 < kl < math.inf else max_kl_nats
        budget = _bits_for(path, wanted - control_nats)
        if best is not None:
            budget = max(min(budget, found - stride), lowest)
        else:
            budget = min(max(budget, over + stride), highest)


def _bits_for(path: LagrangianPath, cost: float) -> int:
    """The smallest hull solution of no more than a predicted cost, or the one of least cost."""
    return next((point.bits for point in path.points if point.cost <= cost), path.points[-1].bits)


def hold_kl(
    profile: Profile,
    budget: Budget,
    solver: str,
    rules: Rules,
    measure: Callable[[Mapping[str, str]], float],
    rows: str,
) -> Iterator[Tried | Choice]:
    """The smallest choice of a profile whose measured KL keeps `budget.max_kl`; yields what is tried, last the Choice.

    rows: what is measured on, for the error. Raises BudgetError, with the least KL that was measured, where the limit
    is out of reach, and RecompileError where it is 0 or less, not a number, or stands beside what it cannot.
    """
    limit = budget.max_kl
    assert limit is not None, "asked for"
    if not limit > 0:
        raise RecompileError(f"budget {budget.describe()}: wanted a KL above 0")
    problem = prepare(prepare_problem(profile, rules))
    check_kl_alone(budget, rules)
    control = profile.control.mean if profile.control is not None else 0.0
    best: Tried | None = None
    least = math.inf
    for tried in least_size(problem, limit, load_by_costs(solver), measure, control_nats=control):
        yield tried
        best, least = tried if tried.holds else best, min(least, tried.kl_nats)
    if best is None:
        narrowed = " under these constraints" if rules else ""
        raise BudgetError(
            f"budget {budget.describe()} is out of reach: the best that these sources reach{narrowed} measures "
            f"{least:.6g} nats per token on {rows}; ask for that, or profile larger sources"
        )
    found = choice_of(profile, problem, best.solution.choice, budget, solver)
    yield replace(found, solution=replace(best.solution, budget_bits=best.solution.bits))
