"""`--max-kl` and `--max-ppl-increase` where the models are at hand: the limit holds for the measured KL.

The size is searched with rows of the role "accept"; what was found is then verified on rows of the role "report".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from recompile.cli.mix_kls import MixKls
from recompile.cli.options import compute_device

if TYPE_CHECKING:
    from eval.metrics import Mean
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.cli.verify import RowOptions
    from recompile.costs import Profile
    from recompile.optimize.budget import Budget
    from recompile.optimize.choose import Choice, Rules
    from recompile.optimize.kl_limit import Tried


@dataclass(frozen=True)
class Held:
    """A limit that was kept by measuring."""

    max_kl_nats: float
    choice: Choice  # the smallest that was found
    tried: tuple[Tried, ...]
    kls: MixKls  # on the accepting rows

    def kl(self, choice: Mapping[str, str]) -> float:
        """Measured on the accepting rows, nats per token."""
        (kl,) = self.kls.measure([choice])
        return kl

    def keeps(self, choice: Mapping[str, str]) -> bool:
        return self.kl(choice) <= self.max_kl_nats

    def describe(self, choice: Mapping[str, str], reported: Mean | None) -> str:
        """How a choice keeps the limit; reported: its KL on the rows of the verification, where there was one."""
        rows = len(self.kls.rows.ids)
        said = (
            f"Limit:        KL {self.max_kl_nats:g} at most; {self.kl(choice):.6f} on the {rows} rows that the size "
            f"was found with ({len(self.tried)} sizes measured)"
        )
        if reported is None:
            return said
        said += f"; {reported.mean:.6f} on those above"
        if reported.std_error is not None:
            low, high = (reported.mean + side * 1.96 * reported.std_error for side in (-1, 1))
            said += f", 95 % {max(low, 0):.6f} to {high:.6f}"
        return f"{said}: {'above' if reported.mean > self.max_kl_nats else 'within'} it"


def hold_limit(
    profile: Profile,
    budget: Budget,
    solver: str,
    rules: Rules,
    reference: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    where: RowOptions,
    path: Path,
    quiet: bool,
    holds: bool = True,
) -> Held:
    """The smallest choice whose measured KL keeps the budget's limit. path: has what was measured; holds: whether
    decoded weights may stay in memory.

    Raises BudgetError where the limit is out of reach.
    """
    from recompile.optimize.choose import Choice
    from recompile.optimize.kl_limit import hold_kl

    assert budget.max_kl is not None, "asked for"
    rows, _ = where.read([reference.path, *(source.path for source in checkpoints.values())], "accept")
    kls = MixKls(profile, reference, checkpoints, rows, compute_device(where.device), path, quiet, holds)
    weights = max(1, profile.counted_weights)
    tried: list[Tried] = []
    said = f"{rows.ids.shape[0]} rows x {rows.ids.shape[1]} tokens"
    for event in hold_kl(profile, budget, solver, rules, lambda choice: kls.measure([choice])[0], said):
        if isinstance(event, Choice):
            return Held(budget.max_kl, event, tuple(tried), kls)
        tried.append(event)
        if not quiet:
            kept = "within" if event.holds else "above"
            click.echo(
                f"{event.solution.bits / weights:.4f} bpw: KL {event.kl_nats:.6f} measured, {kept} the limit", err=True
            )
    raise AssertionError("hold_kl ends with a Choice")


def shrink(held: Held, found: Choice, hold: Callable[[float], Held], search: Callable[[Choice], Choice]) -> Choice:
    """What a search gained in KL, taken in bytes: a smaller choice within the limit, or else what it found.

    found: by the search at the size of `held`, within the limit. The search is expected to gain as much, by a factor,
    at the smaller size where choices by costs measure the limit over that factor. hold: finds that choice for a limit;
    search: runs from it.
    """
    gained = held.kl(found.solution.choice) / held.kl(held.choice.solution.choice)
    if not 0 < gained < 1:
        return found
    smaller = hold(held.max_kl_nats / gained).choice
    if smaller.bits >= found.bits:
        return found
    again = search(smaller)
    if held.keeps(again.solution.choice):
        return replace(again, budget=found.budget)
    click.echo(
        f"Note: at {again.bpw:.4f} bpw the search ends at KL {held.kl(again.solution.choice):.6f}, above the limit; "
        f"the recipe of {found.bpw:.4f} bpw is kept.",
        err=True,
    )
    return found
