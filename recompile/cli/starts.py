"""The super-additive choice: a solver of its own; and what `--solver refine` starts from, the best-measuring choice.

A few whole mixes (the start and the uniform variants) are measured on rows of the role "choose", how costs add up is
fitted to them (recompile.optimize.superadditive), and the choice is solved again with costs that add up so. What was
measured is kept in a file beside the recipe: an interrupted run or another budget measures no mix twice.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from recompile.cli.mix_kls import MixKls
from recompile.cli.options import compute_device
from recompile.errors import FitError

if TYPE_CHECKING:
    from recompile.cli.search import Search
    from recompile.optimize.superadditive import SuperAdditive

FIT_ROWS = 8  # mixes differ by factors, and few rows tell those

Mix = Mapping[str, str]  # member of a group -> source


def search_superadditive(search: Search) -> Mix:
    """The super-additive choice, whether or not it measures better than the start. Raises as `fit_law` does."""
    law = fit_law(search, _kls(search))
    click.echo(_describe(law), err=True)
    return _solve(search, law)


def better_start(search: Search) -> Search:
    """The search from its start, the exact choice, or from the greedy or super-additive one where that measures better
    on the same rows; with the time that is left. Where no law can be fitted it says why and does without."""
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
    found = dict(zip(starts, kls.measure(list(starts.values())), strict=True))
    best = min(found, key=found.__getitem__)
    measured = ", ".join(f"{name} {kl:.6f}" for name, kl in found.items())
    click.echo(f"{said}on {len(kls.rows.ids)} choosing rows: KL {measured}; the search starts from {best}", err=True)
    left = None if search.minutes is None else max(0.0, search.minutes - (time.monotonic() - began) / 60)
    return replace(search, start=starts[best], minutes=left)


def _kls(search: Search) -> MixKls:
    directories = [search.reference.path, *(source.path for source in search.checkpoints.values())]
    rows, _ = search.where.read(directories, "choose", min(search.where.rows, FIT_ROWS))
    device = compute_device(search.where.device)
    models = search.profile, search.reference, search.checkpoints
    free = search.max_memory_bytes is None
    return MixKls(*models, rows, device, search.measured, search.quiet, holds=free)


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
