"""Measured exchanges around a choice, with racing: the last per cent that no sum of single costs can see.

A round proposes moves within all limits (one group up, one down, one down and another up), measures them beside the
incumbent on a few rows, keeps the better half, measures those on twice as many rows, and so on; what is left on all
rows replaces the incumbent if its paired difference is below zero with confidence. Racing after Maron and Moore,
"Hoeffding races" (NeurIPS 1993), with paired differences in place of bounds, and halving after Karnin, Koren and
Somekh, "Almost optimal exploration in multi-armed bandits" (ICML 2013).

Numbers only: what measures is passed in.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from recompile.errors import RecompileError
from recompile.optimize.limits import Row
from recompile.optimize.problem import Problem, evaluate


class Measure(Protocol):
    """Measures whole choices; the same row gives the same KL for the same choice."""

    def __call__(self, choices: Sequence[Mapping[str, str]], rows: Sequence[int]) -> list[tuple[float, ...]]:
        """KL of every choice at every one of these rows, nats per token."""


@dataclass(frozen=True)
class LocalOptions:
    """How a local search spends its measurements."""

    moves: int = 8  # measured together in a round
    first_rows: int = 4  # in the first heat; doubled from heat to heat
    rounds: int = 20
    patience: int = 4  # rounds without success after which it stops
    seconds: float = math.inf
    trust: float = 0.5  # share of a swap's cost by which it may be wrong beside the others: large swaps are tried first
    accept_t: float = 1.7  # of the paired difference over all rows: 95 % one-sided from 20 rows on
    seed: int = 0


@dataclass(frozen=True)
class Move:
    """Groups (numbers) and the options (numbers) that they move to."""

    changes: tuple[tuple[int, int], ...]
    predicted: float  # change of the summed costs, nats per token


@dataclass(frozen=True)
class Round:
    """One finished round; yielded as it ends."""

    number: int
    tried: int
    accepted: Move | None
    kl: float  # of the incumbent on all rows, nats per token
    gain: float  # of the accepted move, nats per token; 0 where there is none
    seconds: float


@dataclass(frozen=True)
class LocalResult:
    """What a local search found."""

    choice: Mapping[str, str]
    bits: int
    kl_start: float  # on all rows, nats per token
    kl: float
    rounds: int
    measured: int  # choices x rows


def search_local(
    problem: Problem,
    limits: Sequence[Row],
    start: Mapping[str, str],
    measure: Measure,
    rows: int,
    options: LocalOptions | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Round | LocalResult]:
    """Improve `start` (member -> source); yields a Round as each ends, last a LocalResult.

    problem: prepared; limits: rows that every choice keeps (a start above one of them is an error). The result is never
    one whose mean over the rows is above the start's. Raises RecompileError for fewer than 2 rows or such a start.
    """
    options = options or LocalOptions()
    if rows < 2:
        raise RecompileError("{solver} local compares paired rows: give at least 2")
    state = _State(problem, limits, start)
    over = [row for row, used in zip(limits, state.used(), strict=True) if used > row.limit]
    if over:
        raise RecompileError(
            f"the start takes {over[0].spell(over[0].used(state.numbers))}, more than {over[0].name} allows "
            f"({over[0].spell(over[0].limit)})"
        )
    began, rng = clock(), random.Random(options.seed)
    race = _Race(measure, rows, options)
    incumbent = race.of(state.choice(), list(range(rows)))
    kl_start = kl = _mean(incumbent)
    tried: set[tuple[tuple[int, int], ...]] = set()
    idle = number = 0
    while number < options.rounds and idle < options.patience and clock() - began < options.seconds:
        moves = _propose(state, options, tried)
        if not moves:
            break
        number += 1
        tried.update(move.changes for move in moves)
        order = rng.sample(range(rows), rows)
        choices = [state.choice(move) for move in moves]
        winner = race.run(choices, incumbent, order)
        accepted, gain = None, 0.0
        if winner is not None:
            place, values = winner
            accepted, gain = moves[place], kl - _mean(values)
            state.apply(moves[place])
            incumbent, kl = values, _mean(values)
            tried.clear()
        idle = 0 if accepted is not None else idle + 1
        yield Round(number, len(moves), accepted, kl, gain, clock() - began)
    choice = state.choice()
    yield LocalResult(choice, evaluate(problem, choice)[0], kl_start, kl, number, race.measured)


class _State:
    """The incumbent as one option number per group, and what it takes of every limit."""

    def __init__(self, problem: Problem, limits: Sequence[Row], start: Mapping[str, str]) -> None:
        self.problem, self.limits = problem, limits
        evaluate(problem, start)  # raises where it is no choice of this problem
        self.numbers = [
            next(n for n, option in enumerate(group.options) if option.source == start[group.members[0]])
            for group in problem.groups
        ]

    def used(self) -> list[int]:
        return [row.used(self.numbers) for row in self.limits]

    def choice(self, move: Move | None = None) -> dict[str, str]:
        numbers = list(self.numbers)
        for group, option in move.changes if move is not None else ():
            numbers[group] = option
        return {
            member: group.options[number].source
            for group, number in zip(self.problem.groups, numbers, strict=True)
            for member in group.members
        }

    def apply(self, move: Move) -> None:
        for group, option in move.changes:
            self.numbers[group] = option

    def fits(self, changes: Sequence[tuple[int, int]], used: Sequence[int]) -> bool:
        for row, now in zip(self.limits, used, strict=True):
            added = sum(
                row.use[group][option] - row.use[group][self.numbers[group]]
                for group, option in changes
                if group in row.use
            )
            if now + added > row.limit:
                return False
        return True


def _propose(state: _State, options: LocalOptions, tried: set[tuple[tuple[int, int], ...]]) -> list[Move]:
    """The most promising moves that were not tried around this incumbent: those that may gain most if single costs are
    off by the trusted share, as many different groups as possible."""
    ups: list[tuple[float, int, int]] = []
    downs: list[tuple[float, int, int]] = []
    for group, (candidates, now) in enumerate(
        zip((g.options for g in state.problem.groups), state.numbers, strict=True)
    ):
        here = candidates[now]
        for number, option in enumerate(candidates):
            if number != now:
                change = option.cost - here.cost
                (ups if option.bits > here.bits else downs).append((change, group, number))
    used = state.used()
    ranked: list[tuple[float, Move]] = []
    for change, group, number in (*ups, *downs):
        if state.fits([(group, number)], used):
            ranked.append((change - options.trust * abs(change), Move(((group, number),), change)))
    # pairs: of each kind only the best few hundred, so that this stays quadratic in few
    best_ups = sorted(ups)[:300]
    best_downs = sorted(downs)[:300]
    for up, up_group, up_number in best_ups:
        for down, down_group, down_number in best_downs:
            if up_group == down_group:
                continue
            changes = ((down_group, down_number), (up_group, up_number))
            score = up + down - options.trust * (abs(up) + abs(down))
            if score < 0 and state.fits(changes, used):
                ranked.append((score, Move(changes, up + down)))
    ranked.sort(key=lambda entry: (entry[0], entry[1].changes))
    chosen: list[Move] = []
    times: dict[int, int] = {}
    for _, move in ranked:
        if move.changes in tried or any(times.get(group, 0) >= 2 for group, _ in move.changes):
            continue
        for group, _ in move.changes:
            times[group] = times.get(group, 0) + 1
        chosen.append(move)
        if len(chosen) == options.moves:
            break
    return chosen


class _Race:
    def __init__(self, measure: Measure, rows: int, options: LocalOptions) -> None:
        self._measure, self.rows, self.options = measure, rows, options
        self.measured = 0

    def of(self, choice: Mapping[str, str], rows: Sequence[int]) -> list[float]:
        self.measured += len(rows)
        return list(self._measure([choice], rows)[0])

    def run(
        self, choices: Sequence[Mapping[str, str]], incumbent: Sequence[float], order: Sequence[int]
    ) -> tuple[int, list[float]] | None:
        """(place of the winner, its KL of every row), or None. order: rows in the order they are used."""
        alive = list(range(len(choices)))
        values: list[dict[int, float]] = [{} for _ in choices]
        done, until = 0, min(self.rows, self.options.first_rows)
        while True:
            fresh = list(order[done:until])
            self.measured += len(alive) * len(fresh)
            for place, found in zip(alive, self._measure([choices[place] for place in alive], fresh), strict=True):
                values[place].update(zip(fresh, found, strict=True))
            seen = list(order[:until])
            mean = {p: _mean([values[p][row] - incumbent[row] for row in seen]) for p in alive}
            alive = sorted((p for p in alive if mean[p] < 0), key=lambda p: mean[p])
            if until == self.rows:
                break
            alive = alive[: max(1, (len(alive) + 1) // 2)]
            if not alive:
                return None
            done, until = until, min(self.rows, 2 * until)
        for place in alive:
            differences = [values[place][row] - incumbent[row] for row in range(self.rows)]
            if _t_value(differences) < -self.options.accept_t:
                return place, [values[place][row] for row in range(self.rows)]
        return None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _t_value(differences: Sequence[float]) -> float:
    """Mean over its standard error; of equal differences minus infinity, plus infinity or 0."""
    mean = _mean(differences)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    error = math.sqrt(variance / len(differences))
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
