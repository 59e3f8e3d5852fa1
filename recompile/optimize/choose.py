"""A profile and a budget to a recipe: constraints in the user's words, the solver, and the override file.

Numbers and text only; nothing here opens a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recompile.costs import Profile, ProfileGroup
from recompile.errors import BudgetError, RecompileError
from recompile.optimize.exact import solve_exact
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.problem import Group, Option, Problem, Solution, at_least, at_most, pin, reachable_range
from recompile.recipe import Glob, Override, Recipe, Source, suggest

SOLVERS: Mapping[str, Callable[[Problem, int], Solution]] = {"greedy": solve_greedy, "exact": solve_exact}


@dataclass(frozen=True)
class Budget:
    """A size, in the words it was asked in; exactly one field is set."""

    bpw: float | None = None  # bits per weight over quantized modules
    total_bpw: float | None = None  # over all weights, embedding, head and norms included
    size_bytes: int | None = None  # of all tensors

    def describe(self) -> str:
        if self.bpw is not None:
            return f"{self.bpw:g} bpw over quantized modules"
        if self.total_bpw is not None:
            return f"{self.total_bpw:g} bpw over all weights"
        return f"{self.size_bytes} bytes"

    def bits(self, profile: Profile) -> int:
        """The budget in stored bits of quantized modules."""
        header = profile.header
        if self.bpw is not None:
            return math.floor(self.bpw * profile.counted_weights + 1e-6)
        if self.total_bpw is not None:
            everything = profile.counted_weights + header.other_weights
            return math.floor(self.total_bpw * everything + 1e-6) - header.other_bits
        assert self.size_bytes is not None, "one field is set"
        return 8 * self.size_bytes - header.other_bits

    def spell_range(self, fewest: int, most: int, profile: Profile) -> str:
        """A range of stored bits of quantized modules, in the words of this budget. Rounded inwards, so that both ends
        can be asked for as they stand."""
        header = profile.header
        if self.size_bytes is not None:
            ends = (-(-(fewest + header.other_bits) // 8), (most + header.other_bits) // 8)
            return " to ".join(f"{size} bytes ({size / 2**30:.4f} GiB)" for size in ends)
        weights, more = max(1, profile.counted_weights), 0
        if self.total_bpw is not None:
            weights, more = weights + header.other_weights, header.other_bits
        low, high = (fewest + more) / weights, (most + more) / weights
        for digits in range(4, 16):
            lowest, highest = math.ceil(low * 10**digits), math.floor(high * 10**digits)
            if lowest <= highest:
                break
        in_all = " in all" if self.total_bpw is not None else ""
        return f"{lowest / 10**digits:.{digits}f} bpw to {highest / 10**digits:.{digits}f} bpw{in_all}"


@dataclass(frozen=True)
class Constraint:
    """`--pin/--min/--max GLOB=ID`: kind is "pin", "min" or "max"."""

    kind: str
    glob: str
    source: str  # candidate label

    @staticmethod
    def parse(kind: str, text: str) -> Constraint:
        glob, separator, source = text.rpartition("=")
        if not separator or not glob.strip() or not source.strip():
            raise RecompileError(f'--{kind} "{text}": wanted GLOB=ID, e.g. --{kind} "*.down_proj=4"')
        return Constraint(kind, glob.strip(), source.strip())


def make_problem(profile: Profile) -> Problem:
    """The budgeted choice: one option per group and candidate, bits counted over quantized modules."""
    groups = []
    for group in profile.header.groups:
        options = []
        for source, bits in group.bits.items():
            cost = profile.cost(group.name, source)
            kl, error = (cost.kl_nats, cost.std_error) if cost is not None else (math.nan, math.inf)
            options.append(Option(source, bits, kl, error))
        groups.append(Group(group.name, tuple(options)))
    return Problem(tuple(groups), profile.header.fixed_bits)


def constrain(problem: Problem, groups: Sequence[ProfileGroup], constraints: Sequence[Constraint]) -> Problem:
    """Narrow a problem. A glob names modules (or tensors); a group follows if any of its modules matches.

    Pins come last, whatever the order given: "min" and "max" compare with a source that must still be offered.
    Raises RecompileError where a glob matches nothing or a source is not offered.
    """
    narrow = {"pin": pin, "min": at_least, "max": at_most}
    for constraint in sorted(constraints, key=lambda constraint: constraint.kind == "pin"):
        glob = Glob.parse(constraint.glob)
        matched = [g for g in groups if any(glob.matches(name) for m in g.modules for name in (m, f"{m}.weight"))]
        if not matched:
            near = suggest(constraint.glob, [module for group in groups for module in group.modules])
            hint = f'; did you mean "{near}"?' if near else ""
            raise RecompileError(f'--{constraint.kind} "{constraint.glob}" matches no profiled module{hint}')
        for group in matched:
            problem = narrow[constraint.kind](problem, group.name, constraint.source)
    return problem


@dataclass(frozen=True)
class Choice:
    """A solved recipe and what the profile predicts of it."""

    solution: Solution
    profile: Profile
    budget: Budget
    predicted_kl_nats: float
    predicted_std_error: float | None

    @property
    def bits(self) -> int:
        return self.solution.bits

    @property
    def bpw(self) -> float:
        return self.solution.bits / max(1, self.profile.counted_weights)

    @property
    def total_bytes(self) -> int:
        return (self.solution.bits + self.profile.header.other_bits) // 8


def choose(profile: Profile, budget: Budget, solver: str = "greedy", constraints: Sequence[Constraint] = ()) -> Choice:
    """Solve for one budget.

    Raises BudgetError, with the reachable range in the budget's own unit, and RecompileError for a profile with holes.
    """
    if solver not in SOLVERS:
        raise RecompileError(f'solver "{solver}": wanted one of {", ".join(SOLVERS)}')
    missing = profile.missing()
    if missing:
        raise RecompileError(
            f"the profile is unfinished: {len(missing)} swaps are not measured, first {missing[0][0]} from "
            f"{missing[0][1]}; run the same model_profile command to go on"
        )
    problem = constrain(make_problem(profile), profile.header.groups, constraints)
    bits = budget.bits(profile)
    fewest, most = reachable_range(problem)
    if not fewest <= bits <= most:
        wrong = "below what the cheapest sources take" if bits < fewest else "above what the dearest sources take"
        raise BudgetError(
            f"budget {budget.describe()} is {wrong}; reachable range: {budget.spell_range(fewest, most, profile)}"
            + (" under these constraints" if constraints else "")
        )
    solution = SOLVERS[solver](problem, bits)
    mean, error = predict(profile, solution.choice)
    return Choice(solution, profile, budget, mean, error)


def predict(profile: Profile, choice: Mapping[str, str]) -> tuple[float, float | None]:
    """Predicted KL of a whole choice, as if swaps added up: the control plus all costs; and its standard error, from
    the row sums (so that swaps measured on the same rows are not taken for independent)."""
    rows = profile.header.rows
    control = profile.control.kl_rows if profile.control is not None else (0.0,) * rows
    totals = list(control)
    for group, source in choice.items():
        found = profile.measurements.get((group, source))
        if found is not None:
            totals = [total + value - zero for total, value, zero in zip(totals, found.kl_rows, control, strict=True)]
    mean = math.fsum(totals) / rows
    if rows < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((total - mean) ** 2 for total in totals) / (rows - 1) / rows)


def make_recipe(choice: Choice, provenance: Mapping[str, Any]) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a choice, over the profile's base variant, and a comment for every line.

    Every module that is not taken from the base has a line of its own, sorted by layer; so no two lines compete.
    """
    header = choice.profile.header
    used: dict[str, None] = {}
    overrides: list[Override] = []
    comments: dict[str, str] = {}
    for group in sorted(header.groups, key=lambda group: math.inf if group.layer is None else group.layer):
        label = choice.solution.choice[group.name]
        if label == header.base:
            continue
        used[label] = None
        comment = _comment(choice, group, label)
        for number, module in enumerate(group.modules):
            key = f"{module}.*"
            overrides.append(Override(key, header.candidate(label).id))
            together = f" (with {group.modules[0].rpartition('.')[2]})" if number else ""
            comments[key] = comment if not number else f"same group{together}"
    labels = [candidate.label for candidate in header.candidates if candidate.label in used]
    sources = tuple(Source(header.candidate(label).id, header.candidate(label).model_dir) for label in labels)
    recipe = Recipe(
        sources,
        tuple(overrides),
        base=header.candidate(header.base).model_dir,
        budget=choice.budget.describe(),
        provenance={
            **provenance,
            "solver": choice.solution.solver,
            "bpw": round(choice.bpw, 5),
            "total_bytes": choice.total_bytes,
            "predicted_kl_nats": round(choice.predicted_kl_nats, 6),
            "predicted_std_error": _rounded(choice.predicted_std_error),
            "profile": {
                "method": header.method,
                "context": header.context,
                "level": header.level,
                "rows": header.rows,
                "row_tokens": header.row_tokens,
                "rows_sha256": header.rows_sha256,
                "reference": header.reference_fingerprint,
                "sources": {candidate.label: candidate.fingerprint for candidate in header.candidates},
            },
        },
    )
    return recipe, comments


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if value is not None else None


def _comment(choice: Choice, group: ProfileGroup, label: str) -> str:
    profile = choice.profile
    base = profile.header.base
    there, here = profile.cost(group.name, label), profile.cost(group.name, base)
    bits = group.bits[label] - group.bits[base]
    text = f"{bits / 1e6:+.3f} Mbit"
    if there is not None and here is not None:
        text = f"KL {there.kl_nats - here.kl_nats:+.6f}, {text}"
    return text
