"""The super-additive choice: a solver of its own; and what `--solver refine` starts from, the best-measuring choice.

A few whole mixes (the start and the uniform variants) are measured on rows of the role "choose", how costs add up is
fitted to them (recompile.optimize.superadditive), and the choice is solved again with costs that add up so. Some more
mixes tell which factors on costs choose best (recompile.optimize.tilt). What was measured is kept in a file beside the
recipe: an interrupted run or another budget measures no mix twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from recompile.cli.mix_kls import ROUGH_ABOVE_NATS, MixKls, digest
from recompile.cli.options import compute_device
from recompile.errors import FitError

if TYPE_CHECKING:
    from recompile.cli.search import Search
    from recompile.optimize.superadditive import SuperAdditive

FIT_ROWS = 8  # mixes differ by factors, and few rows tell those
TILT_SHARE = 0.25  # of the time: no round of tilted costs is begun after it

Mix = Mapping[str, str]  # member of a group -> source


def search_superadditive(search: Search) -> Mix:
    """The super-additive choice, whether or not it measures better than the start. Raises as `fit_law` does."""
    law = fit_law(search, _kls(search))
    click.echo(_describe(law), err=True)
    return _solve(search, law)


def search_tilted(search: Search) -> Mix:
    """The best-measuring mix that tilted costs choose."""
    return _tilted(search, _kls(search), lambda gone: search.minutes is not None and gone > 60 * search.minutes)


def better_start(search: Search) -> Search:
    """The search from the mix that measures best on the same rows: its start, which is the exact choice, the greedy or
    super-additive one, or one that tilted costs choose (recompile.optimize.tilt); with the time that is left. Where no
    law can be fitted it says why and does without."""
    from recompile.optimize.greedy import solve_greedy
    from recompile.optimize.rows import solve_rows

    began = time.monotonic()
    kls = _kls(search)
    starts = {"exact": search.start, "greedy": solve_rows(search.problem, search.limits, solve_greedy).choice}
    said = ""
    try:
        law = fit_law(search, kls)
    except FitError as error:
        click.echo(f"Note: no super-additive choice to start from: {error}", err=True)
    else:
        starts["super-additive"] = _solve(search, law)
        said = f"{_describe(law)}; "
    most = math.inf if search.minutes is None else TILT_SHARE * 60 * search.minutes
    starts["tilted costs"] = _tilted(search, kls, lambda gone: gone > most)
    found = dict(zip(starts, kls.measure(list(starts.values())), strict=True))
    best = min(found, key=found.__getitem__)
    measured = ", ".join(f"{name} {kl:.6f}" for name, kl in found.items())
    click.echo(f"{said}on {len(kls.rows.ids)} choosing rows: KL {measured}; the search starts from {best}", err=True)
    left = None if search.minutes is None else max(0.0, search.minutes - (time.monotonic() - began) / 60)
    return replace(search, start=starts[best], minutes=left)


def _tilted(search: Search, kls: MixKls, enough: Callable[[float], bool]) -> Mix:
    """The best mix that tilted costs choose. enough: of so many seconds, asked after every round. What was found is
    kept, for how far the search comes depends on the time."""
    from recompile.optimize.exact import solve_exact
    from recompile.optimize.rows import solve_rows
    from recompile.optimize.tilt import Tilts, search_tilts

    began = time.monotonic()
    limits = [(row.name, row.limit, row.fixed) for row in search.limits]
    name = f"tilted {digest([limits, search.start, search.minutes])}"
    if (kept := kls.kept(name)) is not None:
        return kept
    choice: Mix = search.start
    for found in search_tilts(
        Tilts.of(search.problem, search.scores),
        lambda problem: solve_rows(problem, search.limits, solve_exact),
        kls.measure,
        out_of_time=lambda: enough(time.monotonic() - began),
    ):
        choice = found.choice
        if not search.quiet:
            click.echo(f"tilted costs: {found.measured} mixes measured, the best has KL {found.kl_nats:.6f}", err=True)
    kls.keep(name, choice)
    return choice


def _kls(search: Search) -> MixKls:
    from recompile.optimize.problem import evaluate

    directories = [search.reference.path, *(source.path for source in search.checkpoints.values())]
    rows, _ = search.where.read(directories, "choose", min(search.where.rows, FIT_ROWS))
    device = compute_device(search.where.device)
    models = search.profile, search.reference, search.checkpoints
    free = search.max_memory_bytes is None
    rough = evaluate(search.problem, search.start)[1] > ROUGH_ABOVE_NATS
    return MixKls(*models, rows, device, search.measured, search.quiet, holds=free, rough=rough)


def fit_law(search: Search, kls: MixKls) -> SuperAdditive:
    """How the costs of the search add up, by its start and the uniform mixes. Raises FitError where they do not say."""
    from recompile.optimize.superadditive import fit, uniform_mixes

    if search.profile.header.context == "base":
        raise FitError(
            "how costs add up is fitted to costs against the reference, and this profile holds differences from its "
            "base (made with --context base); profile with --context clean"
        )
    mixes = [search.start, *uniform_mixes(search.problem, search.start).values()]
    measured = zip(mixes, kls.measure(mixes), strict=True)
    return fit(search.problem, [(mix, kl) for mix, kl in measured if kl > 0])  # 0: a candidate that is the reference


def _solve(search: Search, law: SuperAdditive) -> Mix:
    from recompile.optimize.exact import solve_exact
    from recompile.optimize.rows import solve_rows

    return solve_rows(law.transform(search.problem), search.limits, solve_exact).choice


def _describe(law: SuperAdditive) -> str:
    return (
        f"super-additive: power {law.power:.3f}, log error {law.log_error:.3f} over {law.mixes} whole mixes (plain sum "
        f"{law.log_error_of_sum:.3f})"
    )
