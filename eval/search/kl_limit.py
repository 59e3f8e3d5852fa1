"""`--max-kl` and `--max-ppl-increase` where the models are available: the limit holds for the measured KL.

The size is searched with rows of the role "accept"; what was found is then verified on rows of the role "report".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from eval.mixes.measured import MeasuredMixes
from recompile.costs import Profile
from recompile.events import Note, OnEvent, Said, ignore
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Choice, Rules
from recompile.optimize.kl_limit import Tried, hold_kl


@dataclass(frozen=True)
class MeasuredLimit:
    """A limit that was kept by measuring."""

    max_kl_nats: float
    choice: Choice  # the smallest that was found
    tried: tuple[Tried, ...]
    kls: MeasuredMixes  # on the accepting rows

    def kl(self, choice: Mapping[str, str]) -> float:
        """Measured on the accepting rows, nats per token."""
        (kl,) = self.kls.measure([choice])
        return kl

    def keeps(self, choice: Mapping[str, str]) -> bool:
        return self.kl(choice) <= self.max_kl_nats


def hold_limit(
    profile: Profile, budget: Budget, solver: str, rules: Rules, kls: MeasuredMixes, on_event: OnEvent = ignore
) -> MeasuredLimit:
    """The smallest choice whose KL, measured by `kls`, keeps the budget's limit.

    Raises BudgetError where the limit is out of reach.
    """
    assert budget.max_kl is not None, "asked for"
    weights = max(1, profile.counted_weights)
    tried: list[Tried] = []
    said = f"{kls.rows.ids.shape[0]} rows x {kls.rows.ids.shape[1]} tokens"
    for event in hold_kl(profile, budget, solver, rules, lambda choice: kls.measure([choice])[0], said):
        if isinstance(event, Choice):
            return MeasuredLimit(budget.max_kl, event, tuple(tried), kls)
        tried.append(event)
        kept = "within" if event.holds else "above"
        bpw = event.solution.bits / weights
        on_event(Said(f"{bpw:.4f} bpw: KL {event.kl_nats:.6f} measured, {kept} the limit"))
    raise AssertionError("hold_kl ends with a Choice")


def shrink(
    held: MeasuredLimit,
    found: Choice,
    hold: Callable[[float], MeasuredLimit],
    search: Callable[[Choice], Choice],
    on_event: OnEvent = ignore,
) -> Choice:
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
    on_event(
        Note(
            f"at {again.bpw:.4f} bpw the search ends at KL {held.kl(again.solution.choice):.6f}, above the limit; "
            f"the recipe of {found.bpw:.4f} bpw is kept."
        )
    )
    return found
