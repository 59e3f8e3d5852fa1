"""From a profile and a budget to a recipe on disk: solved by costs, searched with the models, measured, written.

Torch is loaded only where models run.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.mixes.mixes_file import MixesFile
from recompile.arguments import Worded
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import Profile, load_profile
from recompile.errors import ArgumentError, JournalError, RecompileError
from recompile.events import Note, OnEvent, Said, ignore
from recompile.formats import FORMATS, FormatSpec
from recompile.formats.cache_types import parse_sweep
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.io.files import write_text
from recompile.io.sizes import parse_size
from recompile.merge.overlay import build_overlay
from recompile.model.rows import RowOptions
from recompile.model.used_rows import UsedRows, check_apart, recorded_rows
from recompile.optimize.baselines import make_baselines
from recompile.optimize.budget import Budget, Pool, active_share, split_pool
from recompile.optimize.cache_choice import CacheChoice, choose_cache
from recompile.optimize.choose import (
    Choice,
    Constraint,
    Rules,
    choice_of,
    choose,
    limits_of,
    make_recipe,
    prepare_problem,
    solve,
    tied_experts,
)
from recompile.optimize.engine_constraints import refusals
from recompile.optimize.problem import prepare, with_costs
from recompile.optimize.solvers import SOLVERS, solver_named
from recompile.optimize.start import read_start
from recompile.quantize.lazy_variant import open_candidates, plainly_named
from recompile.recipe.recipe import dump_recipe

if TYPE_CHECKING:
    from eval.profile.sketch import Sketch
    from eval.search.acceptance import Contender, Verdict
    from eval.search.kl_limit import MeasuredLimit
    from recompile.model.tokens import Rows

WORTH_SAYING = 0.01  # of the KL, that twice as many rows would save
REFINE_MINUTES = 10.0  # at most, where nobody asked for a solver


@dataclass(frozen=True)
class OptimizeOptions:
    """What is asked of a recipe; see `recompile.optimize` for the meaning of each."""

    bpw: float | None = None
    size_bytes: int | None = None
    total_bpw: float | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    active_bpw: float | None = None
    pools: tuple[str, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    ties: tuple[str, ...] = ()
    engine: str | None = None
    free_experts: bool = False
    max_step: int | None = None
    solver: str | None = None
    start: Path | None = None
    steps: int | None = None
    minutes: float | None = None
    max_memory_bytes: int | None = None
    check: bool | None = None
    activations: bool = False
    guard: bool = True
    context: int | None = None  # tokens, whose cache is in size_bytes as well
    cache_bits: tuple[str, ...] = ()
    where: RowOptions = field(default_factory=lambda: RowOptions(16, 256))
    device: str = "cpu"

    @property
    def limits_kl(self) -> bool:
        return self.max_kl is not None or self.max_ppl_increase is not None

    @property
    def has_size(self) -> bool:
        given = (self.bpw, self.size_bytes, self.total_bpw, self.max_kl, self.max_ppl_increase, self.active_bpw)
        return bool(self.pools) or any(value is not None for value in given)


@dataclass(frozen=True)
class LimitReport:
    """How a limit on KL was kept by measuring."""

    max_kl_nats: float
    measured_kl_nats: float  # of what was written
    rows: int
    rows_sha256: str
    tried: tuple[tuple[int, float], ...]  # (stored bits, measured KL)


@dataclass(frozen=True)
class OptimizeReport:
    """A recipe that was written, and what is known of it."""

    out: Path
    solved: Choice  # what the solver found
    written: Choice  # the same, or a simpler mix that measured better
    verdict: Verdict | None  # None: not measured
    limit: LimitReport | None
    best_is_over: bool = False  # the best mix of the verdict is above the limit on KL
    cache: CacheChoice | None = None  # where weights and cache share a size

    @property
    def measured(self) -> Contender | None:
        """What was measured of the recipe that was written."""
        return measured_of(self.written, self.verdict) if self.verdict is not None else None

    def as_dict(self) -> dict[str, Any]:
        chosen, verdict = self.written, self.verdict
        verified = None
        if verdict is not None:
            verified = {
                "ratio": verdict.ratio,
                "ppl_increase": verdict.ppl_increase,
                "beats_all": not verdict.unbeaten,
                "unbeaten": [contender.name for contender in verdict.unbeaten],
                "best": verdict.best.name,
                "wrote": "recipe" if self.solved is chosen else chosen.solution.solver,
                **vars(verdict),
            }
        return {
            "budget": chosen.budget.describe(),
            "budget_bits": chosen.solution.budget_bits,
            "bits": chosen.solution.bits,
            "bpw": chosen.bpw,
            "total_bytes": chosen.total_bytes,
            "solver": chosen.solution.solver,
            "gap": chosen.solution.gap,
            "predicted_kl_nats": chosen.predicted_kl_nats,
            "predicted_std_error": chosen.predicted_std_error,
            "limit": self.limit,
            "cache": asdict(self.cache) if self.cache is not None else None,
            "verdict": verified,
            "choice": dict(chosen.solution.choice),
        }


def optimize_recipe(
    profile_path: Path, out: Path, options: OptimizeOptions, on_event: OnEvent = ignore
) -> OptimizeReport:
    """Choose a source for every group of a profile within a budget, and write the recipe.

    on_event: gets Notes, and what the solver tells. Raises BudgetError, ArgumentError, RecompileError.
    """
    optimization = _Optimization(profile_path, out, options, on_event)
    with closing(optimization.measured):
        return optimization.run()


class _Optimization:
    def __init__(self, profile_path: Path, out: Path, options: OptimizeOptions, on_event: OnEvent) -> None:
        self.path, self.out, self.options, self.on_event = profile_path, out, options, on_event
        self.profile = load_profile(profile_path)
        self.checkpoints = open_sources(self.profile, profile_path, on_event)
        self.rules = rules_of(options, self.checkpoints)
        say_of_experts(self.rules, self.profile, on_event)
        self.solver, self.minutes = self._solver()
        self.by_costs = "exact" if SOLVERS[self.solver].runs_models else self.solver
        self.measured = MixesFile(out.with_name(f"{out.stem}.mixes.json"))  # KLs of whole mixes, measured once

    def run(self) -> OptimizeReport:
        options, profile = self.options, self.profile
        if options.activations:
            check_activations(options, self.checkpoints)
        start = read_start(options.start, profile, self.checkpoints) if options.start is not None else None
        cache = self._cache() if options.context is not None or options.cache_bits else None
        if cache is not None:
            self.options = options = replace(options, size_bytes=cache.chosen.weights_bytes)
        budget = self._budget(start)
        held = self._hold(budget, self.on_event) if self._measures_limit(budget) else None
        chosen = choose(profile, budget, self.by_costs, self.rules) if held is None else held.choice
        self._say_of_rows(budget)
        if SOLVERS[self.solver].runs_models:
            chosen = self._searched(chosen, start, held)
        if self.checkpoints is not None and not options.constraints and _is_made(profile):
            plain = plainly_named(chosen.solution.choice, profile.header.groups, self.checkpoints)
            chosen = replace(chosen, solution=replace(chosen.solution, choice=plain))  # the same tensors and bits
        names, made_by = tensor_names(self.checkpoints), f"model_optimize {self.path.name}"
        verdict = self._verdict(chosen, start, held) if options.check is not False else None
        final = chosen if verdict is None or not options.guard else self._guarded(chosen, verdict, held)
        write_recipe(self.out, final, names, made_by, verdict, cache)  # under its final name only after the check
        over = held is not None and verdict is not None and not held.keeps(verdict.best.choice)
        return OptimizeReport(self.out, chosen, final, verdict, _limit_report(held, final), over, cache)

    def _solver(self) -> tuple[str, float | None]:
        """The solver, and its time: refine for a while where the models are there, unless something else was asked."""
        options = self.options
        if options.solver is not None:
            return solver_named(options.solver).name, options.minutes
        asked = options.check is not False and not options.limits_kl
        if asked and self.checkpoints is not None and are_same(self.profile, self.checkpoints):
            return "refine", REFINE_MINUTES if options.minutes is None else options.minutes
        return "exact", options.minutes

    def _budget(self, start: Mapping[str, str] | None) -> Budget:
        options, header = self.options, self.profile.header
        size_bytes = options.size_bytes
        if start is not None and not options.has_size:  # its own size
            bits_of_start = header.fixed_bits + sum(group.bits[start[group.name]] for group in header.groups)
            size_bytes = -(-(bits_of_start + header.other_bits) // 8)
        return Budget(
            options.bpw,
            options.total_bpw,
            size_bytes,
            options.max_kl,
            options.max_ppl_increase,
            options.active_bpw,
            _active_share(self.checkpoints) if options.active_bpw is not None else Fraction(1),
            tuple(_read_pool(text, self.profile, self.checkpoints) for text in options.pools),
        )

    def _cache(self) -> CacheChoice:
        """The cache to run with, of those that leave room for a mix."""
        from eval.search.cache_costs import measure_caches
        from recompile.model.devices import compute_device

        options = self.options
        if options.context is None:
            raise ArgumentError("{cache_bits}: goes with {context}, the tokens that the cache is to hold")
        if options.size_bytes is None:
            raise ArgumentError("{context}: goes with {size}, which is then of all tensors and the cache together")
        caches = parse_sweep(options.cache_bits or ("f16",), "{cache_bits}")
        reference, checkpoints = open_models(self.profile, self.path, self.checkpoints)
        rows, vocab = self._rows("choose", reference, checkpoints)
        device = compute_device(options.device)
        how: dict[str, Any] = {"vocab": vocab, "device": device, "on_event": self.on_event}
        costs = measure_caches(reference, caches, options.context, rows, self.measured, **how)
        return choose_cache(
            self.profile,
            options.size_bytes,
            options.context,
            costs,
            self.by_costs,
            self.rules,
            rows=len(rows.ids),
            rows_sha256=rows.sha256,
        )

    # ---- a limit on KL -----------------------------------------------------------------------------------------------

    def _measures_limit(self, budget: Budget) -> bool:
        """Whether there is a limit on KL that can be measured; says so where there is one that cannot."""
        if budget.max_kl is None:
            return False
        unasked = self.options.check is False
        if not unasked and self.checkpoints is not None and are_same(self.profile, self.checkpoints):
            return True
        why = "{check=False}" if unasked else "the models are not available"
        said = f"{why}: the limit on KL is kept by what the profile predicts, nothing is measured."
        self.on_event(Note(Worded(said)))
        return False

    def _hold(self, budget: Budget, on_event: OnEvent) -> MeasuredLimit:
        from eval.mixes.measured import MeasuredMixes
        from eval.search.kl_limit import hold_limit
        from recompile.model.devices import compute_device

        options = self.options
        if options.activations:
            raise ArgumentError(
                "{activations}: a limit on KL is kept for the weights alone; leave it out, or give a size in place of "
                "{max_kl} and {max_ppl_increase}"
            )
        reference, checkpoints = open_models(self.profile, self.path, self.checkpoints)
        rows, _ = self._rows("accept", reference, checkpoints)
        free, device = options.max_memory_bytes is None, compute_device(options.device)
        kls = MeasuredMixes(
            self.profile, reference, checkpoints, rows, device, self.measured, self.on_event, holds=free
        )
        return hold_limit(self.profile, budget, self.by_costs, self.rules, kls, on_event)

    def _rows(self, role: str, reference: Checkpoint, checkpoints: Mapping[str, Checkpoint]) -> tuple[Rows, int | None]:
        """Rows that nothing else used, as far as the profile and the variants say, and the true vocabulary."""
        rows, vocab = self.options.where.read([reference.path, *(c.path for c in checkpoints.values())], role)
        check_apart(rows, role, used_before(self.path, self.profile, checkpoints), self.on_event)
        return rows, vocab

    # ---- searching with the models -----------------------------------------------------------------------------------

    def _searched(self, chosen: Choice, start: Mapping[str, str] | None, held: MeasuredLimit | None) -> Choice:
        """What the solver finds from a choice by costs (or from the start), within the limit on KL where there is
        one."""
        from eval.search.kl_limit import shrink

        found = self._search(chosen, start, self.solver)
        if held is None:
            return found
        if not held.keeps(found.solution.choice):
            said = f"what {self.solver} found is above the limit on KL; the {self.by_costs} recipe is kept."
            self.on_event(Note(Worded(said)))
            return held.choice
        return shrink(
            held,
            found,
            lambda limit: self._hold(replace(found.budget, max_kl=limit, max_ppl_increase=None), ignore),
            lambda smaller: self._search(smaller, None, f"{self.solver}-smaller"),
            self.on_event,
        )

    def _search(self, chosen: Choice, start: Mapping[str, str] | None, name: str) -> Choice:
        """Run the solver, from the start or else from `chosen`; refine from the better start. name: of its journal"""
        from eval.profile.sketch import interactions_of, squared_gradient_scores
        from eval.search.initial_recipes import better_start
        from eval.search.job import Search
        from recompile.model.devices import compute_device

        options, profile, budget, solver = self.options, chosen.profile, chosen.budget, self.solver
        reference, checkpoints = open_models(profile, self.path, self.checkpoints)
        problem = prepare(prepare_problem(profile, self.rules))
        chooses_start = solver == "refine" and start is None
        sketch = self._samples() if solver in ("refine", "tilted") else None
        tokens, tilts = profile.header.row_tokens, solver == "tilted" or chooses_start
        search = Search(
            profile=profile,
            problem=problem,
            budget_bits=chosen.solution.budget_bits,
            limits=limits_of(profile, problem, budget, self.rules, chosen.bits),
            start=start if start is not None else chosen.solution.choice,
            reference=reference,
            checkpoints=checkpoints,
            where=options.where,
            steps=options.steps,
            minutes=self.minutes,
            journal=self.out.with_name(f"{self.out.stem}.{name}.jsonl"),
            measured=self.measured,
            scores=squared_gradient_scores(sketch, tokens) if sketch is not None and tilts else None,
            interactions=interactions_of(sketch, tokens) if sketch is not None and solver == "refine" else None,
            max_memory_bytes=options.max_memory_bytes,
            device=compute_device(options.device),
            on_event=self.on_event,
        )
        if chooses_start:
            search = better_start(search)
        return choice_of(profile, problem, SOLVERS[solver].load()(search), budget, solver)

    def _say_of_rows(self, budget: Budget) -> None:
        """Whether a profile of more rows would choose better, as far as the draws beside a sketched one tell."""
        sketch = self._samples() if budget.has_primary and self.profile.header.method == "sketch" else None
        if sketch is None:
            return
        from eval.profile.row_gain import gain_of_more_rows

        profile, rules = self.profile, self.rules
        problem = prepare(prepare_problem(profile, rules))

        def choose_by(costs: Mapping[tuple[str, str], float]) -> Mapping[str, str]:
            other = with_costs(problem, lambda group, option: fsum(costs[m, option.source] for m in group.members))
            return solve(profile, other, budget, self.by_costs, rules).choice

        gain = gain_of_more_rows(sketch, profile.header.row_tokens, choose_by)
        if gain is None:
            return
        said = f"A profile of {2 * gain.rows} rows in place of {gain.rows} would choose a mix with about"
        if gain.of_twice >= WORTH_SAYING:
            self.on_event(Note(f"{said} {gain.of_twice:.1%} less KL.", ""))
        else:
            self.on_event(Said(f"{said} {WORTH_SAYING:.0%} less KL at most."))

    def _samples(self) -> Sketch | None:
        """Those beside a sketched profile, where there are any."""
        from eval.profile.sketch import samples_beside

        try:
            return samples_beside(self.path, self.profile.header)
        except JournalError as error:
            self.on_event(Note(f"the search goes without the samples of the profile: {error}"))
            return None

    # ---- measuring the result ----------------------------------------------------------------------------------------

    def _verdict(self, chosen: Choice, start: Mapping[str, str] | None, held: MeasuredLimit | None) -> Verdict | None:
        """The recipe beside its baselines; None, with a Note, where it cannot be measured and nobody asked for that."""
        try:
            return self._verify(chosen, start, held)
        except (RecompileError, OSError) as error:
            if self.options.check:
                raise
            self.on_event(Note(f"the recipe is written but not verified: {error}"))
            return None

    def _verify(self, chosen: Choice, start: Mapping[str, str] | None, held: MeasuredLimit | None) -> Verdict:
        from eval.diff import DiffOptions
        from eval.mixes.evaluator import MixEvaluator
        from eval.search.acceptance import verify
        from recompile.model.devices import compute_device

        options, rules, profile, budget = self.options, self.rules, chosen.profile, chosen.budget
        reference, checkpoints = open_models(profile, self.path, self.checkpoints)
        problem = prepare(prepare_problem(profile, rules))
        others: dict[str, Mapping[str, str]] = {}
        if rules.max_step is None:
            others["greedy"] = choose(profile, budget, "greedy", rules).solution.choice
        limits = limits_of(profile, problem, budget, rules, chosen.bits)
        if budget.max_kl is not None:  # its greedy recipe may be larger than the size found
            others.clear()
        as_they_are = {"the start": start} if start is not None else {}
        if held is not None:  # where a search went on to a smaller size it is larger than the limits, and only shown
            (as_they_are if held.choice.bits > chosen.bits else others)[held.choice.solution.solver] = (
                held.choice.solution.choice
            )
        elif SOLVERS[self.solver].runs_models:
            others["exact"] = choose(profile, budget, "exact", rules).solution.choice
        baselines = make_baselines(profile, problem, chosen.solution.choice, limits, others, as_they_are)
        role = "accept" if held is None else "report"  # the size was found with the accepting rows
        rows, vocab = self._rows(role, reference, checkpoints)
        diff = DiffOptions(device=compute_device(options.device), vocab=vocab)
        return verify(
            MixEvaluator(profile.header, checkpoints, reference, options=diff),
            chosen.solution.choice,
            chosen.bits,
            chosen.predicted_kl_nats,
            baselines,
            rows,
            self.on_event,
            activations=options.activations,
        )

    def _guarded(self, chosen: Choice, verdict: Verdict, held: MeasuredLimit | None) -> Choice:
        """The recipe, or the best measured mix within the limits where the recipe does not beat all of them."""
        best = verdict.best
        if not verdict.unbeaten or best is verdict.recipe or (held is not None and not held.keeps(best.choice)):
            return chosen
        problem = prepare(prepare_problem(chosen.profile, self.rules))
        return choice_of(chosen.profile, problem, best.choice, chosen.budget, best.name)


def _limit_report(held: MeasuredLimit | None, written: Choice) -> LimitReport | None:
    if held is None:
        return None
    rows = held.kls.rows
    tried = tuple((found.solution.bits, found.kl_nats) for found in held.tried)
    return LimitReport(held.max_kl_nats, held.kl(written.solution.choice), len(rows.ids), rows.sha256, tried)


def measured_of(chosen: Choice, verdict: Verdict) -> Contender:
    """What was measured of a choice that the verdict compared."""
    return next(c for c in verdict.contenders if dict(c.choice) == dict(chosen.solution.choice))


# ---- what a profile names --------------------------------------------------------------------------------------------


def _is_made(profile: Profile) -> bool:
    """Whether its candidates are made on the fly."""
    return profile.header.candidate(profile.header.base).spec is not None


def open_sources(profile: Profile, path: Path, on_event: OnEvent = ignore) -> dict[str, Checkpoint] | None:
    """label -> checkpoint (headers only); None, with a Note, where one is not there."""
    try:
        return open_candidates(profile, path)
    except (RecompileError, OSError) as error:
        on_event(Note(f"the sources are not available ({error}): a line for every module, nothing checked."))
        return None


def are_same(profile: Profile, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether the reference and the sources that were profiled are still there."""
    if not all(checkpoints[found.label].identity == found.fingerprint for found in profile.header.candidates):
        return False
    reference = profile.header.reference
    return Path(reference).exists() and open_checkpoint(reference).identity == profile.header.reference_fingerprint


def used_before(path: Path, profile: Profile, checkpoints: Mapping[str, Checkpoint]) -> list[tuple[str, UsedRows]]:
    """Rows that the profile at a path and the variants of it were made of."""
    chosen = UsedRows("choose", profile.header.documents)
    return [(str(path), chosen), *recorded_rows(checkpoint.path for checkpoint in checkpoints.values())]


def open_models(
    profile: Profile, path: Path, checkpoints: Mapping[str, Checkpoint] | None
) -> tuple[Checkpoint, Mapping[str, Checkpoint]]:
    """The reference and the sources. Raises RecompileError where one is not there, or not what was profiled."""
    reference = open_checkpoint(profile.header.reference)
    if checkpoints is None:
        checkpoints = open_candidates(profile, path)
    for found in profile.header.candidates:
        if checkpoints[found.label].identity != found.fingerprint:
            raise RecompileError(
                f"{found.model_dir} is not what the profile measured: its config or its tensors were changed since; "
                f"profile it again"
            )
    if reference.identity != profile.header.reference_fingerprint:
        raise RecompileError(
            f"{profile.header.reference} is not the reference that the profile measured against: its config or its "
            f"tensors were changed since; profile it again"
        )
    return reference, checkpoints


def rules_of(options: OptimizeOptions, checkpoints: Mapping[str, Checkpoint] | None) -> Rules:
    """Constraints, with what the engine refuses, where there is one, and the sources to look at.

    Without an engine, the experts of a layer share sources as the engine of the sources' format loads them, unless they
    are asked to be free.
    """
    engine = options.engine
    refused = refusals(engine, checkpoints) if engine is not None and checkpoints is not None else None
    experts = None if engine is not None or options.free_experts else engine_of_format(checkpoints)
    return Rules(options.constraints, options.ties, engine, refused, options.max_step, experts)


def engine_of_format(checkpoints: Mapping[str, Checkpoint] | None) -> str | None:
    """Whose sets of experts sources of this format should keep to; None for EXL2, which has one kernel an expert."""
    formats = {name for checkpoint in (checkpoints or {}).values() for name in checkpoint.formats}
    general = FormatSpec.expert_engine
    own = (row.expert_engine for row in FORMATS.values() if row.name in formats and row.expert_engine != general)
    return next(own, general)


def say_of_experts(rules: Rules, profile: Profile, on_event: OnEvent) -> None:
    """Tell where experts that were profiled apart share a source though nobody asked for it."""
    tied = tied_experts(profile.header.groups, rules.experts_of) if rules.experts_of is not None else 0
    if tied:
        said = f"{tied} groups of experts share sources layer by layer, as {rules.experts_of} loads them"
        if rules.experts_of != FORMATS[MLX].engine:  # whose files hold them in one tensor
            said += "; {free_experts} lets each choose (recompile --check says where such a mix runs)"
        on_event(Note(Worded(said)))


def check_activations(options: OptimizeOptions, checkpoints: Mapping[str, Checkpoint] | None) -> None:
    """Raises ArgumentError where no source says how inputs are quantized, or nothing is measured."""
    from recompile.model.activations import quantizes_inputs

    if options.check is False or checkpoints is None:
        raise ArgumentError("{activations} is about {check}, which needs the models of the profile")
    if not any(quantizes_inputs(build_overlay(checkpoint, None)) for checkpoint in checkpoints.values()):
        raise ArgumentError(
            f"{{activations}}: none of {', '.join(checkpoints)} says how inputs are quantized (input_activations in "
            f"its config groups); leave it out"
        )


def _active_share(checkpoints: Mapping[str, Checkpoint] | None) -> Fraction:
    if checkpoints is None:
        raise ArgumentError("{active_bpw} reads the number of experts from a config.json, and no source is available")
    return active_share(next(iter(checkpoints.values())).config)


def _read_pool(text: str, profile: Profile, checkpoints: Mapping[str, Checkpoint] | None) -> Pool:
    """A pool, with what its globs name in the base besides the profiled modules (where the base is there)."""
    name, globs, size = split_pool(text)
    pool = Pool(name, globs, parse_size(size))
    if checkpoints is None:
        return pool
    profiled = {module for group in profile.header.groups for module in group.modules}
    stored = checkpoints[profile.header.base].modules
    others = [module for module in stored.values() if module.name not in profiled and pool.holds(module.name)]
    return replace(pool, other_bits=8 * sum(module.size_bytes for module in others))


def tensor_names(checkpoints: Mapping[str, Checkpoint] | None) -> list[str] | None:
    """Of all sources, each once; None where the models are not there."""
    if checkpoints is None:
        return None
    return list(dict.fromkeys(name for checkpoint in checkpoints.values() for name in checkpoint.tensors))


# ---- the recipe on disk ----------------------------------------------------------------------------------------------


def write_recipe(
    out: Path,
    chosen: Choice,
    names: Sequence[str] | None,
    made_by: str,
    verdict: Verdict | None = None,
    cache: CacheChoice | None = None,
) -> None:
    """Write the override file of a choice; cache: that it was chosen with. Raises OutputError."""
    measured: dict[str, Any] = {}
    if verdict is not None:
        found = measured_of(chosen, verdict)
        measured = {
            "measured_kl_nats": round(found.kl.mean, 6),
            "measured_std_error": round(found.kl.std_error, 6) if found.kl.std_error is not None else None,
            "measured_on": f"{verdict.rows} rows x {verdict.row_tokens} tokens, sha256 {verdict.rows_sha256}",
            **({"measured_positions": verdict.positions} if verdict.positions != "all" else {}),
        }
    recipe, comments = make_recipe(chosen, {"made_by": made_by, **measured, **_cache_lines(cache)}, names)
    base = chosen.profile.header.candidate(chosen.profile.header.base).model_dir
    said = f", measured {measured['measured_kl_nats']:.6f}" if measured else ""
    heading = (
        f"{chosen.bpw:.4f} bits per weight over quantized modules ({chosen.budget.describe()} asked for).\n"
        f"Predicted KL {chosen.predicted_kl_nats:.6f} nats per token{said}.\n"
        + (f"Run with {cache.chosen.cost.flags} at {cache.context} tokens.\n" if cache is not None else "")
        + f"Apply to {base}:\n"
        f"  {next_step(chosen.profile, out)}\n"
        f"After each line: KL and bits against the same modules taken from {base}."
    )
    write_text(out, dump_recipe(recipe, comments, heading))


def _cache_lines(cache: CacheChoice | None) -> dict[str, Any]:
    if cache is None:
        return {}
    cost = cache.chosen.cost
    return {
        "cache": {
            "flags": cost.flags,
            "context": cache.context,
            "bytes": cost.size_bytes,
            "kl_nats": round(cost.kl_nats, 6),
            "with_weights_bytes": cache.size_bytes,
        }
    }


def next_step(profile: Profile, recipe: Path) -> str:
    """The command that makes the recipe's model, for a shell."""
    base = profile.header.candidate(profile.header.base)
    reference, start, given = (shlex.quote(str(path)) for path in (profile.header.reference, base.model_dir, recipe))
    if base.spec is not None and "type" in base.spec:
        if profile.header.reference.endswith(".gguf"):
            return f"model_quantize -i {reference} -o OUT.gguf -or {given}"
        return f"model_quantize -i {reference} -o OUT.gguf -or {given} --tokenizer-from MODEL.gguf"
    if base.spec is not None:
        return f"model_quantize -i {reference} -o OUT -or {given}"
    return f"recompile -i {start} -o OUT -or {given}"
