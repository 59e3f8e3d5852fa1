"""Whole recipes, improved where they are: a trust-region method on the measured KL.

Costs of single swaps are measured around the reference, and a recipe sits somewhere else. So the cost of every swap is
measured again AT the current recipe: to first order by the gradient of the KL itself, to second order by the Fisher
matrix of the model as it is there,

    KL(recipe + swaps) = KL(recipe) + sum of linear + damping * sum of quadratic,

the budgeted choice on these costs is solved, the move is measured on rows of its own, and taken if it is better there.
(Levenberg-Marquardt: Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963; the choice
takes the place of the linear solve.) The damping stands for what the quadratic form of single swaps leaves out: their
interactions, which grow with the move. It need not be guessed: every measured move tells which damping would have
foretold it, (change - linear) / quadratic, and the next move is solved with that.

Interactions measured instead of damped, by the products of Fisher samples, do worse at this number of samples: on
SmolLM2 at 3.4 bits, swaps chosen to cancel in 12 samples do not cancel in 12 others, and the moves lose.

The rows of a step are few, and a solver that looks for the least of many noisy costs finds noise. So the measured first
order is shrunk towards what the profile says of the same swap (the difference of the two costs), by as much as its
scatter over the rows says is noise.

Numbers only: what linearises and measures is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from recompile.optimize.exact import solve_exact
from recompile.optimize.problem import Option, Problem, Solution, evaluate

FIRST_DAMPING = 2.0
LEAST_DAMPING, MOST_DAMPING = 0.5, 64.0  # below 1: where interactions help, not hurt; a measurement decides
CLOSE = 1.3  # a damping within this factor of the measured one needs no second try
BELIEF = 0.7  # weight of a measured damping in the logarithm of the next
MEMORY = 0.5  # weight of the last step's model in this step's
TRIES = 3  # moves tried per linearisation
PATIENCE = 3  # linearisations in a row without a better recipe, and the search ends


@dataclass(frozen=True)
class SwapModel:
    """What swaps at one recipe cost on some rows, nats per token: first- and second-order terms by (group, source)."""

    kl_nats: float  # of the recipe on the rows of the model
    linear: Mapping[tuple[str, str], float]
    quadratic: Mapping[tuple[str, str], float]
    linear_error: Mapping[tuple[str, str], float]  # standard error of the first order over the rows


class Oracle(Protocol):
    """What the method asks of the models."""

    def linearise(self, choice: Mapping[str, str], step: int) -> SwapModel:
        """At a choice (group -> source), on rows that no earlier step has seen where there are any left."""
        ...

    def measure(self, choice: Mapping[str, str]) -> Sequence[float]:
        """KL of every accepting row, nats per token. The same rows each time, none of them seen by linearise."""
        ...


@dataclass(frozen=True)
class RefineStep:
    """One try; `choice` is the incumbent after it."""

    step: int
    tried: int  # of this step's moves, from 1
    accepted: bool
    choice: Mapping[str, str]
    bits: int
    kl_nats: float  # of the incumbent on the accepting rows
    change_nats: float  # of the tried move, paired over rows: mean
    change_std_error: float
    predicted_nats: float  # by the undamped model
    moved: int  # groups that the tried move changes
    damping: float
    model: SwapModel  # to go on from


def refine(
    problem: Problem,
    budget_bits: int,
    start: Mapping[str, str],
    oracle: Oracle,
    *,
    steps: int = 6,
    first_step: int = 0,
    damping: float = FIRST_DAMPING,
    remembered: tuple[SwapModel, Mapping[str, str]] | None = None,
    solve: Callable[[Problem, int], Solution] = solve_exact,
    out_of_time: Callable[[], bool] = lambda: False,
) -> Iterator[RefineStep]:
    """Improve `start` (member -> source, within the budget or not); yields a RefineStep per tried move.

    problem: its costs are where first-order terms are shrunk to (NaN: nowhere). The first step yielded moves to within
    the budget whatever it costs, if `start` is over it. Ends after `steps` linearisations, after PATIENCE of
    them without a better recipe, or out of time.
    """
    incumbent = dict(start)
    rows = list(oracle.measure(incumbent))
    over = evaluate(problem, incumbent)[0] > budget_bits
    idle = 0
    for step in range(first_step, first_step + steps):
        if (out_of_time() or idle == PATIENCE) and not over:
            return
        idle += 1
        model = settle(oracle.linearise(incumbent, step), problem, incumbent)
        if remembered is not None:
            model = blend(model, remembered[0], incumbent)
        origin, origin_rows = dict(incumbent), rows
        remembered = (model, origin)
        for tried in range(1, TRIES + 1):
            solution = solve(priced(problem, model, damping), budget_bits)
            while tried == 1 and dict(solution.choice) == incumbent and damping > LEAST_DAMPING:  # too timid
                damping = max(LEAST_DAMPING, damping / CLOSE)
                solution = solve(priced(problem, model, damping), budget_bits)
            if dict(solution.choice) == incumbent:
                break
            moved = sum(origin[name] != source for name, source in solution.choice.items())
            found = list(oracle.measure(solution.choice))
            mean, error = _mean_and_error(found, rows)
            accepted = mean < 0 or over
            linear = evaluate(priced(problem, model, 0.0), solution.choice)[1]
            quadratic = evaluate(priced(problem, model, 1.0), solution.choice)[1] - linear
            wanted = _measured_damping(_mean_and_error(found, origin_rows)[0], linear, quadratic, damping)
            if accepted:
                incumbent, rows, over, idle = dict(solution.choice), found, False, 0
            yield RefineStep(
                step,
                tried,
                accepted,
                dict(incumbent),
                evaluate(problem, incumbent)[0],
                math.fsum(rows) / len(rows),
                mean,
                error,
                linear + quadratic,
                moved,
                damping,
                model,
            )
            far = not damping / CLOSE <= wanted <= damping * CLOSE
            damping = damping ** (1 - BELIEF) * wanted**BELIEF
            if (accepted and not far) or (tried > 1 and not accepted and incumbent != origin) or out_of_time():
                break


def _measured_damping(change: float, linear: float, quadratic: float, damping: float) -> float:
    """The damping with which the model would have foretold a measured change of KL, within a factor of 4 of the one it
    was solved with; a move that did not pay asks for more."""
    wanted = (change - linear) / quadratic if quadratic > 0 else damping
    least = damping * CLOSE**2 if change >= 0 else damping / 4
    return min(max(wanted, least, LEAST_DAMPING), damping * 4, MOST_DAMPING)


def priced(problem: Problem, model: SwapModel, damping: float) -> Problem:
    """The problem with the model's costs; those of tied members add up."""
    groups = []
    for group in problem.groups:
        options = []
        for option in group.options:
            swaps = [(member, option.source) for member in group.members]
            cost = math.fsum(model.linear.get(s, math.nan) + damping * model.quadratic.get(s, math.nan) for s in swaps)
            options.append(Option(option.source, option.bits, cost))
        groups.append(replace(group, options=tuple(options)))
    return replace(problem, groups=tuple(groups))


def blend(new: SwapModel, old: SwapModel, incumbent: Mapping[str, str]) -> SwapModel:
    """(1 - MEMORY) of the new model and MEMORY of the old one, seen from the incumbent."""
    linear, quadratic = {}, {}
    for swap, value in new.linear.items():
        here = (swap[0], incumbent[swap[0]])
        if swap == here:
            linear[swap] = quadratic[swap] = 0.0
            continue
        linear[swap] = (1 - MEMORY) * value + MEMORY * (old.linear[swap] - old.linear[here])
        quadratic[swap] = (1 - MEMORY) * new.quadratic[swap] + MEMORY * abs(old.quadratic[swap] - old.quadratic[here])
    return replace(new, linear=linear, quadratic=quadratic)


def settle(model: SwapModel, problem: Problem, incumbent: Mapping[str, str]) -> SwapModel:
    """First-order terms shrunk towards the problem's costs: by 1 / mean z^2 (James and Stein), z the distance of a term
    from its prior in standard errors. Members of ties have no cost of their own and stay as they are."""
    priors: dict[tuple[str, str], float] = {}
    for group in problem.groups:
        here = group.option(incumbent[group.members[0]])
        if len(group.members) > 1 or here is None:
            continue
        for option in group.options:
            swap = (group.name, option.source)
            if option.source != here.source and swap in model.linear:
                priors[swap] = option.cost - here.cost - model.quadratic[swap]
    squares = [
        ((model.linear[swap] - prior) / model.linear_error[swap]) ** 2
        for swap, prior in priors.items()
        if math.isfinite(prior) and 0 < model.linear_error[swap] < math.inf
    ]
    if not squares:
        return model
    kept = max(0.0, 1 - len(squares) / math.fsum(squares))
    linear = dict(model.linear)
    for swap, prior in priors.items():
        if math.isfinite(prior):
            linear[swap] = prior + kept * (linear[swap] - prior)
    return replace(model, linear=linear)


def _mean_and_error(after: Sequence[float], before: Sequence[float]) -> tuple[float, float]:
    """Of the differences of paired rows."""
    values = [a - b for a, b in zip(after, before, strict=True)]
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
