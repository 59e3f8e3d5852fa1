"""Solvers that need the models: what they are handed, and how a command runs them.

A solver is a function from a Search to a choice (group -> candidate label) within its limits; SEARCHES names them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recompile.cli.common import format_seconds, progress
from recompile.cli.mix_kls import ROUGH_ABOVE_NATS
from recompile.cli.options import compute_device
from recompile.cli.starts import FIT_ROWS, search_superadditive, search_tilted
from recompile.errors import RecompileError

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.cli.verify import RowOptions
    from recompile.costs import Profile
    from recompile.optimize.interactions import Interactions
    from recompile.optimize.limits import Row
    from recompile.optimize.problem import Problem
    from recompile.optimize.refine import RefineStep
    from recompile.recipe.recipe import Recipe

REFINE_STEPS = 60
REFINE_ROWS = 4  # linearised in a step, fresh ones each: many short steps go further than a few long ones
ACCEPT_ROWS = 12  # measured after every move, always the same
DEVICE_ROWS = 4  # times as many of both where no CPU runs the models: they cost little beside reading all weights


@dataclass(frozen=True)
class Search:
    """Everything a solver that needs models is handed."""

    profile: Profile
    problem: Problem  # prepared, constraints applied; its costs are the profile's
    budget_bits: int  # of problem.fixed_bits and all groups; where only pools are limited, what they leave room for
    limits: Sequence[Row]  # all limits, the size included; every choice has to keep them
    start: Mapping[str, str]  # within the limits
    reference: Checkpoint
    checkpoints: Mapping[str, Checkpoint]  # candidate label -> source
    where: RowOptions  # -r, -l, -d: rows of the role "choose" are the solver's
    steps: int | None
    minutes: float | None
    journal: Path  # beside the recipe; a solver that resumes keeps its state here
    measured: Path  # beside the recipe; KLs of whole mixes, measured once (recompile.cli.starts)
    quiet: bool
    scores: Mapping[tuple[str, str], float] | None = None  # squared-gradient scores by (group, source), if at hand
    interactions: Interactions | None = None  # of swaps, from the draws of a profile made with --pairs
    max_memory_bytes: int | None = None  # of refine; others hold no decoded weights where it is given


def search_local(search: Search) -> Mapping[str, str]:
    """Measured exchanges around the start (recompile.optimize.local)."""
    from eval.diff import DiffOptions
    from eval.mixes.choice_meter import ChoiceMeter
    from recompile.optimize.local import LocalOptions, LocalResult, search_local

    directories = [search.reference.path, *(source.path for source in search.checkpoints.values())]
    rows, vocab = search.where.read(directories, "choose")
    device = compute_device(search.where.device)
    meter = ChoiceMeter(
        search.profile.header,
        search.checkpoints,
        search.reference,
        rows.ids,
        DiffOptions(device=device, vocab=vocab),
        holds=search.max_memory_bytes is None,
    )
    defaults = LocalOptions()
    options = LocalOptions(
        rounds=search.steps if search.steps is not None else defaults.rounds,
        seconds=60 * search.minutes if search.minutes is not None else defaults.seconds,
    )
    result: LocalResult | None = None
    for event in search_local(search.problem, search.limits, search.start, meter, len(rows.ids), options):
        if isinstance(event, LocalResult):
            result = event
        elif not search.quiet:
            said = f"{event.gain:.6f} better" if event.accepted is not None else "none better"
            click.echo(
                f"round {event.number}: {event.tried} moves, {said}; KL {event.kl:.6f} on the choosing rows, "
                f"{format_seconds(event.seconds)}",
                err=True,
            )
    assert result is not None, "search_local ends with its result"
    return result.choice


def search_refine(search: Search) -> Mapping[str, str]:
    """Descent by what swaps cost at the recipe itself (recompile.optimize.refine); an interrupted one goes on by its
    journal."""
    import torch

    from eval.mixes.oracle import MixOracle, OracleProgress
    from recompile.cli.refine_journal import RefineJournal
    from recompile.optimize.exact import solve_exact
    from recompile.optimize.limits import solve_rows
    from recompile.optimize.refine import refine

    directories = [search.reference.path, *(source.path for source in search.checkpoints.values())]
    steps = search.steps if search.steps is not None else REFINE_STEPS
    device = compute_device(search.where.device)
    factor = 1 if torch.device(device).type == "cpu" else DEVICE_ROWS
    accept, of_step = factor * min(search.where.rows, ACCEPT_ROWS), factor * REFINE_ROWS
    # of a short text the rows come again in later steps, with new draws
    rows = search.where.read_up_to(directories, "choose", FIT_ROWS + accept + steps * of_step, accept + of_step)
    first = min(FIT_ROWS, len(rows.ids) - accept - of_step)  # not those by which the start was chosen
    if search.interactions is not None and not search.quiet:
        found = search.interactions
        click.echo(
            f"interactions of swaps from the {found.draws.shape[1]} draws of --pairs: {100 * found.share:.1f} % of "
            f"what they say holds on other rows, and counts",
            err=True,
        )
    began = last = time.monotonic()
    took = reached = 0.0  # seconds of the last step; steps of the bar

    def out_of_time() -> bool:
        """Whether most of another step like the last one would be too late."""
        return search.minutes is not None and time.monotonic() + took / 2 - began > 60 * search.minutes

    with progress("refining", steps, unit="steps", quiet=search.quiet) as bar:

        def follow(event: OracleProgress) -> None:
            nonlocal reached  # a step that measures swaps goes through the layers several times
            reached = max(reached, journal.steps + event.done / event.total)
            bar.update(reached, event.text)

        oracle = MixOracle(
            search.profile.header,
            search.checkpoints,
            search.reference,
            pool=rows.ids[first + accept :],
            accept=rows.ids[first : first + accept],
            rows_per_step=of_step,
            rough_above_nats=ROUGH_ABOVE_NATS,
            device=device,
            max_memory_bytes=search.max_memory_bytes,
            progress=follow,
        )
        with RefineJournal.open(search.journal, search, rows.sha256, oracle) as journal:
            for step in refine(
                search.problem,
                search.budget_bits,
                search.start,
                journal,
                steps=steps,
                solve=lambda problem, bits: solve_rows(problem, search.limits, solve_exact),
                out_of_time=out_of_time,
                interactions=search.interactions,
            ):
                last, took = time.monotonic(), time.monotonic() - last
                again = journal.is_replaying
                journal.append(step)
                if not again and not search.quiet:
                    click.echo(_describe(step, accept), err=True)
            return journal.choice


def _describe(step: RefineStep, rows: int) -> str:
    said = f"step {step.step + 1}: " + (f"{step.measured} swaps measured, " if step.measured else "")
    if not step.moved:
        return f"{said}no move would pay; KL {step.kl_nats:.5f} on {rows} rows of its own"
    against = f"{step.change_nats:+.5f} ± {step.change_std_error:.5f} against the best"
    best = "the best now" if step.accepted else "not kept"
    now = f"{step.kl_nats:.5f} on {rows} rows of its own"
    return f"{said}{step.moved} groups moved, KL {against}, {best}; {now}"


SEARCHES: Mapping[str, Callable[[Search], Mapping[str, str]]] = {
    "superadditive": search_superadditive,
    "tilted": search_tilted,
    "local": search_local,
    "refine": search_refine,
}


def read_start(path: Path, profile: Profile, checkpoints: Mapping[str, Checkpoint] | None) -> dict[str, str]:
    """A recipe as a choice of the profile's candidates.

    Raises RecompileError for a directory that is no candidate and a group whose modules come from several.
    """
    from recompile.recipe.recipe import load_recipe

    recipe = load_recipe(path)
    header = profile.header
    labels = {_real(candidate.model_dir): candidate.label for candidate in header.candidates}
    of_directory: dict[str | None, str] = {
        source.model_dir: _label_of(recipe, source.model_dir, labels, profile) for source in recipe.sources
    }
    has_base = isinstance(recipe.base, str)
    of_directory[None] = _label_of(recipe, recipe.base, labels, profile) if has_base else header.base
    choice = {}
    for group in header.groups:
        found: dict[str, str] = {}
        for module in group.modules:
            stored = checkpoints[header.base].modules.get(module) if checkpoints is not None else None
            tensors = [part.name for part in stored.parts.values()] if stored is not None else [f"{module}.weight"]
            for tensor in tensors:
                found.setdefault(of_directory[recipe.source_dir(tensor)], tensor)
        if len(found) > 1:
            parts = "; ".join(f"{tensor} from {label}" for label, tensor in found.items())
            raise RecompileError(
                f'{path}: group "{group.name}" is split ({parts}), and the profile chooses it as one; profile at a'
                f" finer --level, or edit the recipe"
            )
        (choice[group.name],) = found
    return choice


def _real(directory: str) -> str:
    return str(Path(directory).resolve())


def _label_of(recipe: Recipe, directory: str, labels: Mapping[str, str], profile: Profile) -> str:
    from recompile.recipe.recipe import resolve_dir

    real = _real(directory)
    if real not in labels:  # as the reader of recipes finds it: here, or beside the recipe
        found, _ = resolve_dir(recipe, directory)
        real = _real(str(found))
    if real not in labels:
        known = ", ".join(candidate.model_dir for candidate in profile.header.candidates)
        raise RecompileError(f"{recipe.name}: {directory} is no candidate of the profile; these are: {known}")
    return labels[real]
