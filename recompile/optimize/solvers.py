"""The solvers: one table of their names for the library, the commands and the benchmarks. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from recompile.errors import ArgumentError


@dataclass(frozen=True)
class Solver:
    """One way to choose. function: "module:name", loaded when it is run, of

    solve(problem: Problem, bits: int) -> Solution       by the costs of the profile alone, or
    search(search: eval.search.job.Search) -> choice     runs_models: measuring whole mixes
    """

    name: str
    says: str  # for help texts
    function: str
    runs_models: bool = False

    def load(self) -> Callable[..., Any]:
        module, _, name = self.function.partition(":")
        found: Callable[..., Any] = getattr(import_module(module), name)
        return found


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("greedy", "best KL saved per bit first", "recompile.optimize.greedy:solve_greedy"),
        Solver("exact", "the proven optimum of the same costs", "recompile.optimize.exact:solve_exact"),
        Solver(
            "superadditive",
            "of costs that add up faster than linearly, as some whole mixes measure",
            "eval.search.initial_recipes:search_superadditive",
            runs_models=True,
        ),
        Solver(
            "tilted",
            "of costs times factors of source, kind of module and depth, as 50 whole mixes measure best",
            "eval.search.initial_recipes:search_tilted",
            runs_models=True,
        ),
        Solver(
            "refine",
            "from the best of these (or from {start}) by measuring all costs anew at the recipe itself",
            "eval.search.refine:search_refine",
            runs_models=True,
        ),
        Solver(
            "local",
            "by exchanges that are measured one by one",
            "eval.search.local:search_local",
            runs_models=True,
        ),
    )
}
BY_COSTS = tuple(solver.name for solver in SOLVERS.values() if not solver.runs_models)


def solver_named(name: str) -> Solver:
    """Raises ArgumentError for a name that is not in the table."""
    if name not in SOLVERS:
        raise ArgumentError(f'{{solver}} "{name}": wanted one of {", ".join(SOLVERS)}')
    return SOLVERS[name]


def load_by_costs(name: str) -> Callable[..., Any]:
    """`solve(problem, bits) -> Solution` of a solver that needs no models. Raises ArgumentError for another."""
    if name not in BY_COSTS:
        raise ArgumentError(f'{{solver}} "{name}": wanted one of {", ".join(BY_COSTS)}')
    return SOLVERS[name].load()
