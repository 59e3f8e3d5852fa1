"""Choices by measuring whole mixes: solvers of their own, and what `--solver refine` starts from.

On rows of the role "choose" a few whole mixes (the start and the uniform variants) tell how costs add up
(recompile.optimize.superadditive), or some more which factors on costs choose best
(recompile.optimize.cross_entropy). What was measured is kept in a file beside the recipe: an interrupted run or another
budget measures no mix twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace

from eval.mixes.measured import ROUGH_ABOVE_NATS, MeasuredMixes, digest
from eval.search.job import Search
from recompile.errors import FitError
from recompile.events import Note, Said
from recompile.io.sizes import format_seconds
from recompile.optimize.baselines import make_baselines
from recompile.optimize.cross_entropy import POPULATION, CostFactors, search_factors
from recompile.optimize.exact import solve_exact
from recompile.optimize.greedy import solve_greedy
from recompile.optimize.limits import solve_rows
from recompile.optimize.problem import evaluate
from recompile.optimize.superadditive import SuperAdditive, fit, uniform_mixes

FIT_ROWS = 8  # mixes differ by factors, and few rows tell those
TILT_SHARE = 0.2  # of the time of a search that starts from tilted costs
ROUGH_TO_COMPARE_NATS = 0.02  # to tell mixes of one size apart: what rounding adds to the KL is alike for all of them

Mix = Mapping[str, str]  # member of a group -> source


def search_superadditive(search: Search) -> Mix:
    """The super-additive choice, whether or not it measures better than the start. Raises as `fit_law` does."""
    law = fit_law(search, _kls(search))
    search.on_event(Note(_describe(law), ""))
    return _solve(search, law)


def search_tilted(search: Search) -> Mix:
    """The best-measuring mix that tilted costs choose."""
    return _tilted(search, _kls(search, ROUGH_TO_COMPARE_NATS), 1.0)


def better_start(search: Search) -> Search:
    """The search from what measures best on the same rows: its start (the exact choice), the greedy choice, the one by
    tilted costs (recompile.optimize.cross_entropy), or a mix that people make without a profile; with the time that is
    left. Those mixes are what the recipe is verified against, and a short profile may be no better than they are."""
    began = time.monotonic()
    kls = _kls(search, ROUGH_TO_COMPARE_NATS)
    by_hand = make_baselines(search.profile, search.problem, search.start, search.limits)
    starts: dict[str, Mix] = {
        "exact": search.start,
        "greedy": solve_rows(search.problem, search.limits, solve_greedy).choice,
        **{baseline.name: baseline.within for baseline in by_hand if baseline.within is not None},
    }
    measured_kls = kls.measure(list(starts.values()))
    each = (time.monotonic() - began) / len(starts)
    starts["tilted costs"] = _tilted(search, kls, TILT_SHARE, each)
    found = dict(zip(starts, [*measured_kls, *kls.measure([starts["tilted costs"]])], strict=True))
    best = min(found, key=found.__getitem__)
    measured = ", ".join(f"{name} {kl:.6f}" for name, kl in found.items())
    search.on_event(Note(f"On {len(kls.rows.ids)} choosing rows: KL {measured}; the search starts from {best}", ""))
    left = None if search.minutes is None else max(0.0, search.minutes - (time.monotonic() - began) / 60)
    return replace(search, start=starts[best], minutes=left)


def _tilted(search: Search, kls: MeasuredMixes, share: float, mix_seconds: float = 0.0) -> Mix:
    """The best mix that tilted costs choose, in so large a share of the time; the start where a mix takes so long that
    not one round fits. What was found is kept, for how far the search comes depends on the time."""
    began = time.monotonic()
    most = math.inf if search.minutes is None else share * 60 * search.minutes
    limits = [(row.name, row.limit, row.fixed) for row in search.limits]
    name = f"tilted {digest([limits, search.start, most])}"
    if (kept := kls.kept(name)) is not None:
        return kept
    choice: Mix = search.start
    if POPULATION * mix_seconds > most:
        kls.keep(name, choice)
        took = f"measuring a mix takes {format_seconds(mix_seconds)}, so that {POPULATION} do not fit in {share:.0%} of"
        search.on_event(Said(f"tilted costs: left out, {took} {search.minutes:g} minutes"))
        return choice
    for found in search_factors(
        CostFactors.of(search.problem, search.scores),
        lambda problem: solve_rows(problem, search.limits, solve_exact),
        kls.measure,
    ):
        choice = found.choice
        said = f"tilted costs: {found.measured} mixes measured, the best has KL {found.kl_nats:.6f}"
        search.on_event(Said(said))
        if (time.monotonic() - began) * (found.number + 2) / (found.number + 1) > most:  # another round would end later
            break
    kls.keep(name, choice)
    return choice


def _kls(search: Search, rough_above_nats: float = ROUGH_ABOVE_NATS) -> MeasuredMixes:
    """Of mixes on the rows that starts are chosen by; measured in the quickest type where the start's costs add up to
    more than a limit."""
    asked = search.where.rows if search.where.rows is not None else FIT_ROWS
    rows, _ = search.where.read(search.directories, "choose", min(asked, FIT_ROWS))
    models = search.profile, search.reference, search.checkpoints
    free = search.max_memory_bytes is None
    rough = evaluate(search.problem, search.start)[1] > rough_above_nats
    return MeasuredMixes(*models, rows, search.device, search.measured, search.on_event, holds=free, rough=rough)


def fit_law(search: Search, kls: MeasuredMixes) -> SuperAdditive:
    """How the costs of the search add up, by its start and the uniform mixes. Raises FitError where they do not say."""
    if search.profile.header.context == "base":
        raise FitError(
            "how costs add up is fitted to costs against the reference, and this profile holds differences from its "
            "base (made with {context} base); profile with {context} clean"
        )
    mixes = [search.start, *uniform_mixes(search.problem, search.start).values()]
    measured = zip(mixes, kls.measure(mixes), strict=True)
    return fit(search.problem, [(mix, kl) for mix, kl in measured if kl > 0])  # 0: a candidate that is the reference


def _solve(search: Search, law: SuperAdditive) -> Mix:
    return solve_rows(law.transform(search.problem), search.limits, solve_exact).choice


def _describe(law: SuperAdditive) -> str:
    return (
        f"super-additive: power {law.power:.3f}, log error {law.log_error:.3f} over {law.mixes} whole mixes (plain sum "
        f"{law.log_error_of_sum:.3f})"
    )
