"""model_optimize: a profile and a size budget to an override file."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recompile.cli.common import check_json_path, format_bytes, format_columns, print_json, refuse_outputs
from recompile.cli.options import many_values_command, output_options, parse_size
from recompile.cli.search import SEARCHES, Search, read_start
from recompile.cli.starts import better_start
from recompile.cli.verify import RowOptions
from recompile.errors import JournalError, OutputError, RecompileError
from recompile.io.files import write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eval.profile.sketch import Sketch
    from eval.search.acceptance import Contender, Verdict
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.cli.hold import Held
    from recompile.costs import Profile
    from recompile.optimize.budget import Budget, Pool
    from recompile.optimize.choose import Choice, Rules


@many_values_command(
    "model_optimize", outputs={"--json": "json_path", "-o": "out"}, inputs=("profile_path", "start", "text")
)
@click.argument("profile_path", metavar="PROFILE", type=click.Path(path_type=Path))
@click.option(
    "-b",
    "--bits",
    "--target-bpw",
    "bits",
    type=float,
    help="Budget in bits per weight over quantized modules (and the head, where the profile offers it).",
)
@click.option("--size", "--target-size", "size", help="Budget for all tensors, e.g. 4.2GiB.")
@click.option(
    "--total-bpw", type=float, help="Budget in bits per weight over all weights, embedding and head included."
)
@click.option(
    "--max-kl",
    type=float,
    help="The smallest size whose KL is no more than this, nats per token: measured, where the models are at hand.",
)
@click.option("--max-ppl-increase", help="The same for a rise of perplexity, e.g. 2%: KL of ln(1.02).")
@click.option(
    "--active-bpw",
    type=float,
    help="Budget in bits per weight that takes part in a token: routed experts count by experts per token / experts.",
)
@click.option(
    "--pool",
    multiple=True,
    help='NAME=GLOB,GLOB:SIZE, a budget of its own for some modules: --pool "gpu=*.self_attn.*:3GiB". Any number.',
)
@click.option(
    "--frontier",
    metavar="LOW:HIGH:STEP",
    help="A recipe for every budget of a grid (bits per weight), with table and plot; -o is then a folder.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="The recipe to write [default: overrides.yaml]; with --frontier a folder [default: frontier].",
)
@click.option(
    "--solver",
    type=click.Choice(["greedy", "exact", "superadditive", "tilted", "local", "refine"]),
    help="greedy: best KL saved per bit first; exact: the proven optimum of the same costs; superadditive: of costs "
    "that add up faster than linearly, as some whole mixes measure; tilted: of costs times factors of source, kind of "
    "module and depth, as 50 whole mixes measure best; refine: from the best of these (or from --start) by measuring "
    "all costs anew at the recipe itself; local: by exchanges that are measured one by one. Default: refine where the "
    "models are at hand, for at most 10 minutes; exact without them and with --no-check.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path),
    help="A recipe to start from, by hand or not; without a budget its own size is kept. Never made worse.",
)
@click.option("--steps", type=click.IntRange(min=0), help="At most so many steps of a solver that measures.")
@click.option("--minutes", type=float, help="At most so much time for a solver that measures.")
@click.option(
    "--max-memory",
    help="For --solver refine: never use more memory than this, e.g. 8GiB; without it as much as half of what is free.",
)
@click.option("--pin", multiple=True, help="GLOB=ID: take these modules from source ID.")
@click.option("--min", "minimum", multiple=True, help="GLOB=ID: no smaller than source ID.")
@click.option("--max", "maximum", multiple=True, help="GLOB=ID: no larger than source ID.")
@click.option("--ban", multiple=True, help="GLOB=ID: never from source ID.")
@click.option(
    "--max-step",
    type=click.IntRange(min=0),
    help="The same modules of neighbouring layers at most so many sources (by size) apart.",
)
@click.option("--tie", multiple=True, help="GLOB: all modules that it names from one source.")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "sglang", "exllamav3", "llama.cpp", "transformers"]),
    help="Only what this engine loads: modules that it fuses share a source, widths without a kernel are left out.",
)
@click.option(
    "--check/--no-check",
    default=None,
    help="Measure the recipe beside uniform, hand-made and greedy mixes of its size, on rows that nothing else uses. "
    "Default: where the models are at hand.",
)
@click.option(
    "--activations",
    is_flag=True,
    help="--check measures with the inputs of maps quantized as the schemes say (w8a8, fp8-dynamic ...), and what is "
    "written is the best of those mixes. Solvers go by the profile, which model_profile --activations makes alike.",
)
@click.option("--no-guard", is_flag=True, help="Write the solver's recipe even where a simpler mix measures better.")
@click.option("-r", "--rows", default=16, show_default=True, help="Rows for --check.")
@click.option("-l", "--length", default=256, show_default=True, help="Tokens in a row for --check.")
@click.option("-d", "--device", default="cpu", show_default=True, help="For --check.")
@click.option("--text", type=click.Path(path_type=Path), help="Text for --check, split as in model_profile.")
@click.option("--dataset", help="Data set for --check.")
@output_options
def main(
    profile_path: Path,
    bits: float | None,
    size: str | None,
    total_bpw: float | None,
    max_kl: float | None,
    max_ppl_increase: str | None,
    active_bpw: float | None,
    pool: tuple[str, ...],
    frontier: str | None,
    out: Path | None,
    solver: str | None,
    start: Path | None,
    steps: int | None,
    minutes: float | None,
    max_memory: str | None,
    pin: tuple[str, ...],
    minimum: tuple[str, ...],
    maximum: tuple[str, ...],
    ban: tuple[str, ...],
    max_step: int | None,
    tie: tuple[str, ...],
    engine: str | None,
    check: bool | None,
    activations: bool,
    no_guard: bool,
    rows: int,
    length: int,
    device: str,
    text: Path | None,
    dataset: str | None,
    json_path: Path | None,
    quiet: bool,
) -> None:
    """Choose a source for every group of a profile so that KL is least within a size.

    \b
    Examples:
      model_optimize profile.jsonl -b 3.5 -o overrides.yaml
      model_optimize profile.jsonl --size 4.2GiB --pin "*.down_proj=6" --check
      model_optimize profile.jsonl --frontier 2.5:6:0.25 -o frontier/
    """
    check_json_path(json_path)
    from recompile.costs import load_profile
    from recompile.optimize.budget import Budget, parse_share
    from recompile.optimize.choose import SOLVERS, Constraint, Rules, choose

    constraints = tuple(
        Constraint.parse(kind, text)
        for kind, given in (("pin", pin), ("min", minimum), ("max", maximum), ("ban", ban))
        for text in given
    )
    profile = load_profile(profile_path)
    checkpoints = _open_candidates(profile, profile_path)
    if solver is None:
        asked = check is not False and frontier is None and max_kl is None and max_ppl_increase is None
        at_hand = asked and checkpoints is not None and _at_hand(profile, checkpoints)
        solver, minutes = ("refine", 10.0 if minutes is None else minutes) if at_hand else ("exact", minutes)
    rules = Rules(constraints, tie, engine, _refusals(engine, checkpoints), max_step)
    where = RowOptions(rows, length, device, text, dataset, activations)
    if activations:
        _check_activations(check, checkpoints)
    if frontier is not None:
        others = (bits, size, total_bpw, max_kl, max_ppl_increase, active_bpw, start)
        if pool or any(value is not None for value in others) or solver not in SOLVERS:
            raise RecompileError(
                "--frontier has its own budgets, and needs --solver exact or greedy; leave -b, --size and --start out"
            )
        folder = out or Path("frontier")
        _frontier(folder, profile, frontier, solver, rules, checkpoints, where if check else None, json_path, quiet)
        return
    if out is None:
        out = Path("overrides.yaml")
        refuse_outputs({"-o": out}, [profile_path, start, text])
    start_choice = read_start(start, profile, checkpoints) if start is not None else None
    given = (bits, size, total_bpw, max_kl, max_ppl_increase, active_bpw)
    if start_choice is not None and not pool and all(value is None for value in given):
        header = profile.header
        bits_of_start = header.fixed_bits + sum(g.bits[start_choice[g.name]] for g in header.groups)
        size = str(-(-(bits_of_start + header.other_bits) // 8))
    budget = Budget(
        bits,
        total_bpw,
        parse_size(size) if size is not None else None,
        max_kl,
        parse_share(max_ppl_increase) if max_ppl_increase is not None else None,
        active_bpw,
        _active_share(checkpoints) if active_bpw is not None else Fraction(1),
        tuple(_read_pool(text, profile, checkpoints) for text in pool),
    )
    names, made_by = _tensor_names(checkpoints), f"model_optimize {profile_path.name}"
    by_costs = solver if solver in SOLVERS else "exact"
    held: Held | None = None
    if budget.max_kl is not None and check is not False and checkpoints is not None and _at_hand(profile, checkpoints):
        free = max_memory is None
        hold = partial(
            _hold, profile, solver=by_costs, rules=rules, checkpoints=checkpoints, where=where, out=out, holds=free
        )
        held = hold(budget, quiet=quiet)
    elif budget.max_kl is not None:
        why = "--no-check" if check is False else "the models are not at hand"
        click.echo(f"Note: {why}: the limit on KL is kept by what the profile predicts, nothing is measured.", err=True)
    chosen = choose(profile, budget, by_costs, rules) if held is None else held.choice
    if solver in SEARCHES:
        cap = parse_size(max_memory) if max_memory is not None else None
        search = partial(
            _search,
            profile_path=profile_path,
            solver=solver,
            rules=rules,
            checkpoints=checkpoints,
            where=where,
            steps=steps,
            minutes=minutes,
            max_memory_bytes=cap,
            out=out,
            quiet=quiet,
        )
        chosen = search(chosen, start_choice, name=solver)
        if held is not None and not held.keeps(chosen.solution.choice):
            click.echo(f"Note: what {solver} found is above the limit on KL; the {by_costs} recipe is kept.", err=True)
            chosen = held.choice
        elif held is not None:
            from recompile.cli.hold import shrink

            chosen = shrink(
                held,
                chosen,
                lambda limit: hold(replace(budget, max_kl=limit, max_ppl_increase=None), quiet=True),
                lambda smaller: search(smaller, None, name=f"{solver}-smaller"),
            )
    if checkpoints is not None and not constraints and profile.header.candidate(profile.header.base).spec is not None:
        from recompile.quantize.lazy_variant import plainly_named

        plain = plainly_named(chosen.solution.choice, profile.header.groups, checkpoints)
        chosen = replace(chosen, solution=replace(chosen.solution, choice=plain))  # the same tensors and bits
    verdict: Verdict | None = None
    if check is not False:
        try:
            verdict = _verify(chosen, rules, checkpoints, where, start_choice, held, quiet)
        except (RecompileError, OSError) as error:
            if check:
                raise
            click.echo(f"Note: the recipe is written but not verified: {error}", err=True)
    final = chosen if verdict is None or no_guard else _guarded(chosen, rules, verdict, held)
    _write_recipe(out, final, names, made_by, verdict)  # under its final name only after the check
    if str(json_path) != "-":
        click.echo(_summary(chosen, final, out, verdict, held))
    if json_path is not None:
        print_json(json_path, _report(chosen, final, verdict, held))


def _hold(
    profile: Profile,
    budget: Budget,
    solver: str,
    rules: Rules,
    checkpoints: Mapping[str, Checkpoint],
    where: RowOptions,
    out: Path,
    quiet: bool,
    holds: bool,
) -> Held:
    from recompile.cli.hold import hold_limit

    if where.activations:
        raise RecompileError(
            "--activations: a limit on KL is kept for the weights alone; leave it out, or give a size in place of "
            "--max-kl and --max-ppl-increase"
        )
    reference, checkpoints = _open_models(profile, checkpoints)
    measured = _measured_file(out)
    return hold_limit(profile, budget, solver, rules, reference, checkpoints, where, measured, quiet, holds)


def _measured_file(out: Path) -> Path:
    """Beside the recipe: KLs of whole mixes, measured once."""
    return out.with_name(f"{out.stem}.mixes.json")


def _check_activations(check: bool | None, checkpoints: Mapping[str, Checkpoint] | None) -> None:
    from recompile.merge.overlay import build_overlay
    from recompile.model.activations import quantizes_inputs

    if check is False or checkpoints is None:
        raise RecompileError("--activations is about --check, which needs the models of the profile at hand")
    if not any(quantizes_inputs(build_overlay(checkpoint, None)) for checkpoint in checkpoints.values()):
        raise RecompileError(
            f"--activations: none of {', '.join(checkpoints)} says how inputs are quantized (input_activations in its "
            f"config groups); leave it out"
        )


def _frontier(
    folder: Path,
    profile: Profile,
    grid: str,
    solver: str,
    rules: Rules,
    checkpoints: Mapping[str, Checkpoint] | None,
    where: RowOptions | None,
    json_path: Path | None,
    quiet: bool,
) -> None:
    from recompile.cli.frontier import describe_table, draw, make_table, measure_frontier, write_tables
    from recompile.optimize.choose import profile_sha256
    from recompile.optimize.pareto import parse_grid, solve_frontier

    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; --frontier writes a folder")
    found = solve_frontier(profile, parse_grid(grid), solver, rules)
    names = _tensor_names(checkpoints)
    folder.mkdir(parents=True, exist_ok=True)
    for point in found.points:
        path = folder / f"{point.choice.budget.bpw:g}bpw.yaml"
        _write_recipe(path, point.choice, names, f"model_optimize --frontier {grid}", None)
    measured: dict[str, tuple[float, float | None]] = {}
    if where is not None:
        if checkpoints is None:
            raise RecompileError("--check: the sources are not at hand")
        measured = measure_frontier(found, profile, checkpoints, where, quiet)
    table = make_table(found, measured)
    report = {
        "profile_sha256": profile_sha256(profile),
        "solver": solver,
        "grid": grid,
        "left_out_bpw": list(found.left_out),
        "reachable_bpw": list(found.reachable),
    }
    write_tables(folder, table, report, write_text)
    draw(folder, table, f"{Path(profile.header.reference).name}: KL against size")
    if str(json_path) != "-":
        click.echo(describe_table(table))
        if found.left_out:
            low, high = found.reachable
            left = ", ".join(f"{bpw:g}" for bpw in found.left_out)
            click.echo(f"Out of reach and left out: {left} bpw; reachable range: {low:.4f} to {high:.4f} bpw")
        click.echo(f"Wrote {len(found.points)} recipes, frontier.csv, .json and the plot in {folder}")
    if json_path is not None:
        print_json(json_path, {**report, "rows": table})


def _write_recipe(out: Path, chosen: Choice, names: list[str] | None, made_by: str, verdict: Verdict | None) -> None:
    from recompile.optimize.choose import make_recipe
    from recompile.recipe.recipe import dump_recipe

    measured: dict[str, object] = {}
    if verdict is not None:
        found = _written(chosen, verdict)
        measured = {
            "measured_kl_nats": round(found.kl.mean, 6),
            "measured_std_error": round(found.kl.std_error, 6) if found.kl.std_error is not None else None,
            "measured_on": f"{verdict.rows} rows x {verdict.row_tokens} tokens, sha256 {verdict.rows_sha256}",
        }
    recipe, comments = make_recipe(chosen, {"made_by": made_by, **measured}, names)
    base = chosen.profile.header.candidate(chosen.profile.header.base).model_dir
    said = f", measured {measured['measured_kl_nats']:.6f}" if measured else ""
    heading = (
        f"{chosen.bpw:.4f} bits per weight over quantized modules ({chosen.budget.describe()} asked for).\n"
        f"Predicted KL {chosen.predicted_kl_nats:.6f} nats per token{said}.\n"
        f"Apply to {base}:\n"
        f"  {_next_step(chosen.profile, out)}\n"
        f"After each line: KL and bits against the same modules taken from {base}."
    )
    write_text(out, dump_recipe(recipe, comments, heading))


def _at_hand(profile: Profile, checkpoints: Mapping[str, Checkpoint]) -> bool:
    """Whether the reference and the sources that were profiled are still there."""
    same = all(checkpoints[found.label].fingerprint == found.fingerprint for found in profile.header.candidates)
    return same and Path(profile.header.reference).exists()


def _open_models(
    profile: Profile, checkpoints: Mapping[str, Checkpoint] | None
) -> tuple[Checkpoint, Mapping[str, Checkpoint]]:
    """The reference and the sources. Raises RecompileError where one is not at hand, or not what was profiled."""
    from recompile.checkpoint.checkpoint import open_checkpoint

    reference = open_checkpoint(profile.header.reference)
    if checkpoints is None:
        checkpoints = {c.label: open_checkpoint(c.model_dir) for c in profile.header.candidates}
    for found in profile.header.candidates:
        if checkpoints[found.label].fingerprint != found.fingerprint:
            raise RecompileError(
                f"{found.model_dir} is not what the profile measured (another fingerprint); profile it again"
            )
    return reference, checkpoints


def _search(
    chosen: Choice,
    start: Mapping[str, str] | None,
    *,
    profile_path: Path,
    solver: str,
    name: str,
    rules: Rules,
    checkpoints: Mapping[str, Checkpoint] | None,
    where: RowOptions,
    steps: int | None,
    minutes: float | None,
    max_memory_bytes: int | None,
    out: Path,
    quiet: bool,
) -> Choice:
    """Run a solver that needs the models, from --start or else from the exact choice; refine from the better start.

    name: of its journal"""
    from eval.profile.sketch import interactions_of, squared_gradient_scores
    from recompile.optimize.choose import choice_of, limits_of, prepare_problem
    from recompile.optimize.problem import prepare

    profile, budget = chosen.profile, chosen.budget
    reference, checkpoints = _open_models(profile, checkpoints)
    problem = prepare(prepare_problem(profile, rules))
    chooses_start = solver == "refine" and start is None
    sketch = _samples(profile_path, profile) if solver in ("refine", "tilted") else None
    tokens, tilts = profile.header.row_tokens, solver == "tilted" or chooses_start
    search = Search(
        profile=profile,
        problem=problem,
        budget_bits=chosen.solution.budget_bits,
        limits=limits_of(profile, problem, budget, rules, chosen.bits),
        start=start if start is not None else chosen.solution.choice,
        reference=reference,
        checkpoints=checkpoints,
        where=where,
        steps=steps,
        minutes=minutes,
        journal=out.with_name(f"{out.stem}.{name}.jsonl"),
        measured=_measured_file(out),
        quiet=quiet,
        scores=squared_gradient_scores(sketch, tokens) if sketch is not None and tilts else None,
        interactions=interactions_of(sketch, tokens) if sketch is not None and solver == "refine" else None,
        max_memory_bytes=max_memory_bytes,
    )
    if chooses_start:
        search = better_start(search)
    return choice_of(profile, problem, SEARCHES[solver](search), budget, solver)


def _samples(path: Path, profile: Profile) -> Sketch | None:
    """Those beside a sketched profile, where there are any."""
    from eval.profile.sketch import samples_beside

    try:
        return samples_beside(path, profile.header)
    except JournalError as error:
        click.echo(f"Note: the search goes without the samples of the profile: {error}", err=True)
        return None


def _verify(
    chosen: Choice,
    rules: Rules,
    checkpoints: Mapping[str, Checkpoint] | None,
    where: RowOptions,
    start: Mapping[str, str] | None,
    held: Held | None,
    quiet: bool,
) -> Verdict:
    """Measure the choice beside its rivals. Raises RecompileError where the models are not at hand."""
    from recompile.cli.verify import run_verification
    from recompile.optimize.baselines import make_rivals
    from recompile.optimize.choose import choose, limits_of, prepare_problem
    from recompile.optimize.problem import prepare

    profile, budget = chosen.profile, chosen.budget
    reference, checkpoints = _open_models(profile, checkpoints)
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
    elif chosen.solution.solver in SEARCHES:
        others["exact"] = choose(profile, budget, "exact", rules).solution.choice
    rivals = make_rivals(profile, problem, chosen.solution.choice, limits, others, as_they_are)
    role = "accept" if held is None else "report"  # the size was found with the accepting rows
    return run_verification(chosen, rivals, reference, checkpoints, where, quiet, role)


def _guarded(chosen: Choice, rules: Rules, verdict: Verdict, held: Held | None) -> Choice:
    """The recipe, or the best measured mix within the limits where the recipe does not beat all of them."""
    from recompile.optimize.choose import choice_of, prepare_problem
    from recompile.optimize.problem import prepare

    best = verdict.best
    if not verdict.unbeaten or best is verdict.recipe or (held is not None and not held.keeps(best.choice)):
        return chosen
    problem = prepare(prepare_problem(chosen.profile, rules))
    return choice_of(chosen.profile, problem, best.choice, chosen.budget, best.name)


def _next_step(profile: Profile, recipe: Path) -> str:
    """The command that makes the recipe's model."""
    base = profile.header.candidate(profile.header.base)
    if base.spec is not None and "type" in base.spec:
        keys = "" if profile.header.reference.endswith(".gguf") else " --tokenizer-from MODEL.gguf"
        return f"model_quantize -i {profile.header.reference} -o OUT.gguf -or {recipe}{keys}"
    if base.spec is not None:
        return f"model_quantize -i {profile.header.reference} -o OUT -or {recipe}"
    return f"recompile -i {base.model_dir} -o OUT -or {recipe}"


def _open_candidates(profile: Profile, path: Path) -> dict[str, Checkpoint] | None:
    """label -> checkpoint (headers only); None, with a word on stderr, where one is not at hand."""
    from recompile.checkpoint.checkpoint import open_checkpoint

    try:
        if any(candidate.spec is not None for candidate in profile.header.candidates):
            from recompile.quantize.lazy_variant import open_candidates

            return open_candidates(profile, path)
        return {c.label: open_checkpoint(c.model_dir) for c in profile.header.candidates}
    except (RecompileError, OSError) as error:
        click.echo(f"Note: the sources are not at hand ({error}): a line for every module, nothing checked.", err=True)
        return None


def _active_share(checkpoints: Mapping[str, Checkpoint] | None) -> Fraction:
    from recompile.optimize.budget import active_share

    if checkpoints is None:
        raise RecompileError("--active-bpw reads the number of experts from a config.json, and no source is at hand")
    return active_share(next(iter(checkpoints.values())).config)


def _read_pool(text: str, profile: Profile, checkpoints: Mapping[str, Checkpoint] | None) -> Pool:
    """A pool, with what its globs name in the base besides the profiled modules (where the base is at hand)."""
    from recompile.optimize.budget import Pool, split_pool

    name, globs, size = split_pool(text)
    pool = Pool(name, globs, parse_size(size))
    if checkpoints is None:
        return pool
    profiled = {module for group in profile.header.groups for module in group.modules}
    stored = checkpoints[profile.header.base].modules
    others = [module for module in stored.values() if module.name not in profiled and pool.holds(module.name)]
    return replace(pool, other_bits=8 * sum(module.size_bytes for module in others))


def _tensor_names(checkpoints: Mapping[str, Checkpoint] | None) -> list[str] | None:
    if checkpoints is None:
        return None
    return list(dict.fromkeys(name for checkpoint in checkpoints.values() for name in checkpoint.tensors))


def _refusals(engine: str | None, checkpoints: Mapping[str, Checkpoint] | None) -> dict[str, dict[str, str]] | None:
    """label -> module -> why the engine refuses it; None where there is no engine, or no source at hand to look at."""
    from recompile.optimize.engine_constraints import refusals

    return refusals(engine, checkpoints) if engine is not None and checkpoints is not None else None


def _summary(solved: Choice, chosen: Choice, out: Path, verdict: Verdict | None, held: Held | None) -> str:
    """solved: what the solver found; chosen: what was written."""
    from recompile.cli.verify import describe_verdict

    header = chosen.profile.header
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for group in header.groups:
        label = chosen.solution.choice[group.name]
        counts[label] += len(group.modules)
        weights[label] += group.weights
    rows = [
        (candidate.label, candidate.model_dir, str(counts[candidate.label]), f"{100 * share:.1f} %")
        for candidate in header.candidates
        for share in [weights[candidate.label] / max(1, header.group_weights)]
    ]
    spare = chosen.solution.budget_bits - chosen.solution.bits
    gap = f", gap to the proven bound {chosen.solution.gap:.2g}" if math.isfinite(chosen.solution.gap) else ""
    error = f" ± {chosen.predicted_std_error:.6f}" if chosen.predicted_std_error is not None else ""
    lines = [
        format_columns(rows, ("source", "directory", "modules", "of the weights"), (2, 3)),
        "",
        f"Size:         {chosen.bpw:.4f} bpw over quantized modules, {format_bytes(chosen.total_bytes)} in all; "
        f"{format_bytes(spare / 8)} of the budget left",
        f"Predicted KL: {chosen.predicted_kl_nats:.6f}{error} nats per token (swaps added up; "
        f"solver {chosen.solution.solver}{gap})",
    ]
    if verdict is not None:
        lines += ["", describe_verdict(verdict, chosen.profile)]
        if solved is not chosen:
            lines.append(f'Wrote the best of them instead: "{chosen.solution.solver}" (--no-guard keeps the recipe).')
        elif verdict.unbeaten:
            lines.append(_why_kept(verdict, held))
    if held is not None:
        reported = _written(chosen, verdict).kl if verdict is not None else None
        lines.append(held.describe(chosen.solution.choice, reported))
    if verdict is not None or held is not None:
        lines.append("")
    lines += [f"Wrote {out}", "", f"Next: {_next_step(chosen.profile, out)}"]
    return "\n".join(lines)


def _why_kept(verdict: Verdict, held: Held | None) -> str:
    """Why a recipe that does not beat all others was written."""
    if verdict.best is verdict.recipe:
        return "It measures best, and is kept."
    if held is not None and not held.keeps(verdict.best.choice):
        return f'Kept: "{verdict.best.name}" is above the limit on KL on the rows that the size was found with.'
    return "Kept, as --no-guard says."


def _written(chosen: Choice, verdict: Verdict) -> Contender:
    """What was measured of a choice that the verdict compared."""
    return next(c for c in verdict.contenders if dict(c.choice) == dict(chosen.solution.choice))


def _report(solved: Choice, chosen: Choice, verdict: Verdict | None, held: Held | None) -> dict[str, object]:
    verified = None
    if verdict is not None:
        verified = {
            "ratio": verdict.ratio,
            "ppl_increase": verdict.ppl_increase,
            "beats_all": not verdict.unbeaten,
            "unbeaten": [contender.name for contender in verdict.unbeaten],
            "best": verdict.best.name,
            "wrote": "recipe" if solved is chosen else chosen.solution.solver,
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
        "limit": None
        if held is None
        else {
            "max_kl_nats": held.max_kl_nats,
            "measured_kl_nats": held.kl(chosen.solution.choice),
            "rows": len(held.kls.rows.ids),
            "rows_sha256": held.kls.rows.sha256,
            "tried": [(tried.solution.bits, tried.kl_nats) for tried in held.tried],
        },
        "verdict": verified,
        "choice": dict(chosen.solution.choice),
    }
