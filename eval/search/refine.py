"""`--solver refine` with the models: rows, the oracle, and the journal that an interrupted search goes on by."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from eval.diff import DiffOptions
from eval.mixes.measured import ROUGH_ABOVE_NATS
from eval.mixes.oracle import MixOracle, OracleProgress
from eval.search.initial_recipes import FIT_ROWS
from eval.search.job import Search
from eval.search.refine_journal import RefineJournal
from recompile.arguments import Worded
from recompile.events import Progress, Said
from recompile.optimize.exact import solve_exact
from recompile.optimize.limits import solve_rows
from recompile.optimize.refine import RefineStep, refine

REFINE_STEPS = 60
REFINE_ROWS = 4  # linearised in a step, fresh ones each: many short steps go further than a few long ones
ACCEPT_ROWS = 12  # measured after every move, always the same
DEVICE_ROWS = 4  # times as many of both where no CPU runs the models: they cost little beside reading all weights


def search_refine(search: Search) -> Mapping[str, str]:
    """Descent by what swaps cost at the recipe itself (recompile.optimize.refine); an interrupted one goes on by its
    journal."""
    steps = search.steps if search.steps is not None else REFINE_STEPS
    factor = 1 if torch.device(search.device).type == "cpu" else DEVICE_ROWS
    asked = search.where.rows if search.where.rows is not None else ACCEPT_ROWS
    accept, of_step = factor * min(asked, ACCEPT_ROWS), factor * REFINE_ROWS
    # of a short text the rows come again in later steps, with new draws
    most = FIT_ROWS + accept + steps * of_step
    rows = search.where.read_up_to(search.directories, "choose", most, accept + of_step)
    first = min(FIT_ROWS, len(rows.ids) - accept - of_step)  # not those by which the start was chosen
    if search.interactions is not None:
        found = search.interactions
        search.on_event(
            Said(
                Worded(
                    f"interactions of swaps from the {found.draws.shape[1]} draws of {{pairs}}: "
                    f"{100 * found.share:.1f} % of what they say holds on other rows, and counts"
                )
            )
        )
    began = last = time.monotonic()
    took = reached = 0.0  # seconds of the last step; steps of the bar

    def out_of_time() -> bool:
        """Whether most of another step like the last one would be too late."""
        return search.minutes is not None and time.monotonic() + took / 2 - began > 60 * search.minutes

    def follow(event: OracleProgress) -> None:
        nonlocal reached  # a step that measures swaps goes through the layers several times
        reached = max(reached, journal.steps + event.done / event.total)
        search.on_event(Progress("refining", reached, steps, text=event.text))

    judging, pool = rows.part(first, first + accept), rows.part(first + accept, len(rows.ids))
    oracle = MixOracle(
        search.profile.header,
        search.checkpoints,
        search.reference,
        pool=pool.ids,
        pool_counted=pool.counted,
        accept=judging.ids,
        rows_per_step=of_step,
        rough_above_nats=ROUGH_ABOVE_NATS,
        options=DiffOptions(device=search.device, counted=judging.counted),
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
            if not again:
                search.on_event(Said(_describe(step, accept)))
        return journal.choice


def _describe(step: RefineStep, rows: int) -> str:
    said = f"step {step.step + 1}: " + (f"{step.measured} swaps measured, " if step.measured else "")
    if not step.moved:
        return f"{said}no improving move predicted; KL {step.kl_nats:.5f} on {rows} rows of its own"
    against = f"{step.change_nats:+.5f} ± {step.change_std_error:.5f} against the best"
    best = "the best now" if step.accepted else "not kept"
    now = f"{step.kl_nats:.5f} on {rows} rows of its own"
    return f"{said}{step.moved} groups moved, KL {against}, {best}; {now}"
