"""A profile and a budget to a recipe: constraints in the user's words, the solver, and the override file.

Numbers and text only; nothing here opens a checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recompile.costs import Profile, ProfileGroup
from recompile.errors import ArgumentError, BudgetError, RecompileError
from recompile.optimize.budget import Budget
from recompile.optimize.engine_constraints import check_engine, is_routed_expert, is_stacked, loaded_together
from recompile.optimize.frontier import lagrangian_path, solve_for_cost
from recompile.optimize.limits import Row, solve_rows, step_rows
from recompile.optimize.problem import (
    Group,
    Option,
    Problem,
    Solution,
    at_least,
    at_most,
    evaluate,
    merge,
    pin,
    prepare,
    reachable_range,
)
from recompile.optimize.solvers import load_by_costs
from recompile.recipe.compress import Line, compress
from recompile.recipe.recipe import Glob, Override, Recipe, Source, suggest

_ARGUMENT_OF = {"pin": "pin", "min": "minimum", "max": "maximum", "ban": "ban"}


@dataclass(frozen=True)
class Constraint:
    """Texts "GLOB=ID" of the arguments pin, minimum, maximum and ban: kind is "pin", "min", "max" or "ban"."""

    kind: str
    glob: str
    source: str  # candidate label

    @staticmethod
    def parse(kind: str, text: str) -> Constraint:
        glob, separator, source = text.rpartition("=")
        if not separator or not glob.strip() or not source.strip():
            argument = f"{{{_ARGUMENT_OF[kind]}}}"
            raise RecompileError(f'{argument} "{text}": wanted GLOB=ID, e.g. {argument} "*.down_proj=4"')
        return Constraint(kind, glob.strip(), source.strip())


@dataclass(frozen=True)
class Rules:
    """What a choice has to obey besides the budget."""

    constraints: tuple[Constraint, ...] = ()
    ties: tuple[str, ...] = ()  # globs; all groups that one names share a source
    engine: str | None = None  # one of engines.ENGINES
    refused: Mapping[str, Mapping[str, str]] | None = None  # candidate label -> module -> why the engine refuses it
    max_step: int | None = None  # rungs between the same modules of neighbouring layers
    experts_of: str | None = None  # without an engine: routed experts share sources as this one loads them

    def __bool__(self) -> bool:
        """Whether they may narrow the choice; experts that share a source are told by a note of their own."""
        return bool(self.constraints or self.ties or self.engine or self.max_step is not None)


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


def constrain(problem: Problem, groups: Sequence[ProfileGroup], rules: Rules) -> Problem:
    """Narrow a problem. A glob names modules (or tensors); a group follows if any of its modules matches.

    Pins come after the other constraints, whatever the order given ("min" and "max" compare with a source that must
    still be offered), ties and what the engine loads together after them all. max_step is not applied here.
    Raises RecompileError where a glob matches nothing, a source is not offered, or nothing is left of a group.
    """
    narrow = {"pin": pin, "min": at_least, "max": at_most}
    engine = rules.engine
    if engine is not None:
        check_engine(engine)
    if engine is not None and rules.refused is not None:
        problem = _drop_refused(problem, groups, engine, rules.refused)
    for constraint in sorted(rules.constraints, key=lambda constraint: constraint.kind == "pin"):
        what = f'{{{_ARGUMENT_OF[constraint.kind]}}} "{constraint.glob}"'
        matched = _matched_groups(groups, constraint.glob, what)
        if constraint.kind == "ban":
            problem = _ban(problem, matched, constraint.source, f"{what}={constraint.source}")
            continue
        for group in matched:
            problem = narrow[constraint.kind](problem, group.name, constraint.source)
    for glob in rules.ties:
        matched = _matched_groups(groups, glob, f'{{tie}} "{glob}"')
        problem = _tie(problem, [group.name for group in matched], glob, f'{{tie}} "{glob}"')
    if engine is not None:
        group_of = {module: group.name for group in groups for module in group.modules}
        for members in loaded_together(engine, group_of):
            names = list(dict.fromkeys(group_of[module] for module in members))
            problem = _tie(
                problem, names, _common(names), f"{{engine}} {engine}: {members[0]} and others are loaded together"
            )
    elif rules.experts_of is not None:
        group_of = {m: group.name for group in groups for m in group.modules if is_stacked(m)}
        for members in loaded_together(rules.experts_of, group_of):
            names = list(dict.fromkeys(group_of[module] for module in members))
            kind = "experts" if is_routed_expert(members[0]) else "heads"
            what = f"{members[0]} and other {kind} share a source, as {rules.experts_of} loads them ({{free_experts}})"
            problem = _tie(problem, names, _common(names), what)
    return problem


def tied_experts(groups: Sequence[ProfileGroup], engine: str) -> int:
    """Groups of routed experts, or of heads' maps, that would choose for themselves and share a source, as `engine`
    loads them."""
    group_of = {m: group.name for group in groups for m in group.modules if is_stacked(m)}
    sets = [{group_of[module] for module in members} for members in loaded_together(engine, group_of)]
    return sum(len(names) for names in sets if len(names) > 1)


def _matched_groups(groups: Sequence[ProfileGroup], pattern: str, what: str) -> list[ProfileGroup]:
    glob = Glob.parse(pattern)
    matched = [g for g in groups if any(glob.matches(name) for m in g.modules for name in (m, f"{m}.weight"))]
    if not matched:
        near = suggest(pattern, [module for group in groups for module in group.modules])
        hint = f'; did you mean "{near}"?' if near else ""
        raise RecompileError(f"{what} matches no profiled module{hint}")
    return matched


def _ban(problem: Problem, matched: Sequence[ProfileGroup], source: str, what: str) -> Problem:
    names = {group.name for group in matched}
    offered = {option.source for group in problem.groups if group.name in names for option in group.options}
    if source not in offered:
        raise RecompileError(f"{what}: none of the modules it names is offered {source}; offered: {', '.join(offered)}")
    return _without(problem, {name: {source} for name in names}, what)


def _without(problem: Problem, gone: Mapping[str, set[str]], what: str) -> Problem:
    """A problem without some sources of some groups."""
    groups = []
    for group in problem.groups:
        drop = gone.get(group.name, set())
        kept = tuple(option for option in group.options if option.source not in drop)
        if not kept:
            raise RecompileError(f'{what}: leaves "{group.name}" no source; it offers {_labels(group)}')
        groups.append(replace(group, options=kept))
    return replace(problem, groups=tuple(groups))


def _labels(group: Group) -> str:
    return ", ".join(option.source for option in group.options)


def _drop_refused(
    problem: Problem, groups: Sequence[ProfileGroup], engine: str, refused: Mapping[str, Mapping[str, str]]
) -> Problem:
    gone: dict[str, set[str]] = {}
    reasons: dict[str, None] = {}
    for group in groups:
        for label, why in refused.items():
            for module in group.modules:
                if module in why:
                    gone.setdefault(group.name, set()).add(label)
                    reasons[why[module]] = None
    return _without(problem, gone, f"{{engine}} {engine}: {'; '.join(list(reasons)[:3])}") if gone else problem


def _tie(problem: Problem, names: Sequence[str], name: str, what: str) -> Problem:
    """Merge the groups that hold any of the names, ties made before included."""
    wanted = set(names)
    indexes = [at for at, group in enumerate(problem.groups) if not wanted.isdisjoint(group.members)]
    return merge(problem, indexes, name, what)


def _common(names: Sequence[str]) -> str:
    """`model.layers.0.self_attn.q_proj`, `...k_proj` -> `model.layers.0.self_attn.q_proj+k_proj`."""
    parent = names[0].rpartition(".")[0]
    if all(name.rpartition(".")[0] == parent for name in names) and len(names) <= 4:
        return f"{parent}.{'+'.join(name.rpartition('.')[2] for name in names)}"
    return f"{names[0]} and {len(names) - 1} more"


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


def choose(
    profile: Profile, budget: Budget, solver: str = "greedy", rules: Rules | Sequence[Constraint] = ()
) -> Choice:
    """Solve for one budget (which may hold several limits).

    Raises BudgetError, with the reachable range in the budget's own unit and the limit that binds, and RecompileError
    for a profile with holes.
    """
    load_by_costs(solver)  # raises for a name that is none
    rules = rules if isinstance(rules, Rules) else Rules(tuple(rules))
    problem = prepare(prepare_problem(profile, rules))
    solution = solve(profile, problem, budget, solver, rules)
    mean, error = predict(profile, solution.choice)
    return Choice(solution, profile, budget, mean, error)


def prepare_problem(profile: Profile, rules: Rules) -> Problem:
    """The problem of a whole profile under rules. Raises RecompileError for a profile with holes."""
    missing = profile.missing()
    if missing:
        raise RecompileError(
            f"the profile is unfinished: {len(missing)} swaps are not measured, first {missing[0][0]} from "
            f"{missing[0][1]}; run the same model_profile command to go on"
        )
    return constrain(make_problem(profile), profile.header.groups, rules)


def solve(profile: Profile, problem: Problem, budget: Budget, solver: str, rules: Rules) -> Solution:
    """Solve a prepared problem, whose costs need not be the profile's, within the limits of the budget."""
    narrowed = " under these constraints" if rules else ""
    steps = _steps(profile, problem, rules.max_step) if rules.max_step is not None else []
    limits = budget.extra_rows(profile, problem)
    if budget.max_kl is not None:
        check_kl_alone(budget, rules)
        control = profile.control.mean if profile.control is not None else 0.0
        try:
            return solve_for_cost(problem, budget.max_kl - control, load_by_costs(solver))
        except BudgetError:
            path = lagrangian_path(problem)
            least, most = (control + path.points[at].cost for at in (-1, 0))
            raise BudgetError(
                f"budget {budget.describe()} is below what the most expensive sources reach; reachable range: "
                f"{least:.6g} to {most:.6g} nats per token{narrowed}"
            ) from None
    if budget.has_primary:
        bits = budget.bits(profile)
        fewest, most_bits = reachable_range(problem)
        if not fewest <= bits <= most_bits:
            wrong = "below what the cheapest" if bits < fewest else "above what the most expensive"
            spelled = budget.spell_range(fewest, most_bits, profile)
            raise BudgetError(
                f"budget {budget.describe()} is {wrong} sources take; reachable range: {spelled}{narrowed}"
            )
        if not steps and not limits:
            return load_by_costs(solver)(problem, bits)
        limits = [budget.primary_row(profile, problem), *limits]
    if steps and solver == "greedy":
        raise ArgumentError("{max_step} needs {solver} exact")
    solution = solve_rows(problem, [*limits, *steps], load_by_costs(solver))
    return replace(solution, budget_bits=budget.bits(profile)) if budget.has_primary else solution


def check_kl_alone(budget: Budget, rules: Rules) -> None:
    """Raise RecompileError where a limit on KL stands beside limits that it cannot be solved with."""
    if budget.pools or budget.active_bpw is not None or rules.max_step is not None:
        raise ArgumentError("{max_kl} and {max_ppl_increase} stand alone: without {pool}, {active_bpw}, {max_step}")


def limits_of(profile: Profile, problem: Problem, budget: Budget, rules: Rules, bits: int) -> list[Row]:
    """Every limit of a solved budget as a row of its own; bits: what was found, the limit where only KL was given."""
    rows = budget.extra_rows(profile, problem)
    if budget.has_primary:
        rows.append(budget.primary_row(profile, problem))
    elif budget.max_kl is not None:
        use = {place: tuple(option.bits for option in group.options) for place, group in enumerate(problem.groups)}
        rows.append(Row("size found", use, bits, problem.fixed_bits))
    return rows + (_steps(profile, problem, rules.max_step) if rules.max_step is not None else [])


def choice_of(profile: Profile, problem: Problem, choice: Mapping[str, str], budget: Budget, solver: str) -> Choice:
    """A choice that no solver of the profile's own costs made, as they would hand it over; its gap is not known.

    Raises RecompileError for a choice that the problem does not allow.
    """
    bits, cost = evaluate(problem, choice)
    limit = budget.bits(profile) if budget.has_primary else bits
    solution = Solution(dict(choice), bits, cost, -math.inf, math.inf, solver, limit)
    mean, error = predict(profile, choice)
    return Choice(solution, profile, budget, mean, error)


def _steps(profile: Profile, problem: Problem, step: int) -> list[Row]:
    """Rows between the same modules of one layer and of the next that has them."""
    header = profile.header
    place = {member: number for number, group in enumerate(problem.groups) for member in group.members}
    whole = {c.label: sum(group.bits[c.label] for group in header.groups) for c in header.candidates}
    rung = {label: sorted(set(whole.values())).index(bits) for label, bits in whole.items()}
    kinds: dict[str, list[tuple[int, int]]] = {}
    for group in header.groups:
        if group.layer is not None:
            kind = re.sub(rf"\.{group.layer}(?=\.|$)", ".*", group.name, count=1)
            kinds.setdefault(kind, []).append((group.layer, place[group.name]))
    pairs = {
        (one, other)
        for found in kinds.values()
        for (_, one), (_, other) in itertools.pairwise(sorted(found))
        if one != other
    }
    return step_rows(problem, sorted(pairs), rung, step)


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


def make_recipe(
    choice: Choice, provenance: Mapping[str, Any], names: Iterable[str] | None = None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe of a choice, over the profile's base variant, and a comment for every line.

    Lines are sorted, exceptions last. names: all tensor names of the base and the sources; with them, lines are
    globs where that changes nothing (compress.py), else every module has a line of its own.
    """
    header = choice.profile.header
    by_directory = {candidate.model_dir: candidate for candidate in header.candidates}
    base = header.candidate(header.base).model_dir
    group_of = {module: group for group in header.groups for module in group.modules}
    assignment: dict[str, str | None] = {}
    for module, group in group_of.items():
        directory = header.candidate(choice.solution.choice[group.name]).model_dir
        assignment[module] = None if directory == base else directory
    lines = compress(assignment, names)
    told: dict[str, str] = {}  # group -> the module whose line counts what the group saves
    comments = {line.key: _comment(choice, line, group_of, told) for line in lines}
    overrides = tuple(Override(line.key, by_directory[line.directory].id) for line in lines)
    used = {line.directory for line in lines}
    sources = tuple(Source(c.id, c.model_dir, spec=c.spec) for c in header.candidates if c.model_dir in used)
    recipe = Recipe(
        sources,
        overrides,
        base=base if header.candidate(header.base).spec is None else dict(header.candidate(header.base).spec or {}),
        budget=choice.budget.describe(),
        provenance={
            **provenance,
            "solver": choice.solution.solver,
            "bpw": round(choice.bpw, 5),
            "total_bytes": choice.total_bytes,
            "predicted_kl_nats": round(choice.predicted_kl_nats, 6),
            "predicted_std_error": _rounded(choice.predicted_std_error),
            "profile": {
                "sha256": profile_sha256(choice.profile),
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


def profile_sha256(profile: Profile) -> str:
    """Hash of what was measured: fingerprints, rows, groups, bits and every KL; the order of the lines is no matter."""
    header = profile.header
    digest = hashlib.sha256()
    digest.update(
        json.dumps(
            [
                header.method,
                header.context,
                header.reference_fingerprint,
                header.rows_sha256,
                [(c.label, c.fingerprint) for c in header.candidates],
                [(g.name, g.modules, sorted(g.bits.items())) for g in header.groups],
                profile.control.kl_rows if profile.control is not None else None,
            ]
        ).encode()
    )
    for (group, source), found in sorted(profile.measurements.items()):
        digest.update(json.dumps([group, source, found.kl_rows]).encode())
    return digest.hexdigest()


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if value is not None else None


def _comment(choice: Choice, line: Line, group_of: Mapping[str, ProfileGroup], told: dict[str, str]) -> str:
    """What the groups of a line save and cost against the base; a group is counted on the first line that has any of
    it."""
    profile = choice.profile
    base = profile.header.base
    counted: list[ProfileGroup] = []
    with_others: set[str] = set()
    for module in line.modules:
        group = group_of[module]
        if group.name not in told:
            told[group.name] = module
            counted.append(group)
        elif group not in counted:
            with_others.add(told[group.name])
    parts = [f"{len(line.modules)} modules"] if len(line.modules) > 1 else []
    if counted:
        saved, bits, known = 0.0, 0, True
        for group in counted:
            label = choice.solution.choice[group.name]
            there, here = profile.cost(group.name, label), profile.cost(group.name, base)
            known &= there is not None and here is not None
            if there is not None and here is not None:
                saved += there.kl_nats - here.kl_nats
            bits += group.bits[label] - group.bits[base]
        parts += [f"KL {saved:+.6f}"] if known else []
        parts.append(f"{bits / 1e6:+.3f} Mbit")
    if with_others:
        names = sorted({module.rpartition(".")[2] for module in with_others})
        parts.append(f"same group (with {', '.join(names)})")
    return ", ".join(parts)
