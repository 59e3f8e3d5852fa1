"""One size for weights and cache together: which quantized cache leaves the mix the least KL in all. Numbers only.

KLs add up, as those of swaps do: a cache is one more group, whose options take bytes and cost KL. With few options
each is tried: the best mix in what it leaves, and its own KL on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from recompile.costs import Profile
from recompile.errors import BudgetError
from recompile.io.sizes import format_bytes
from recompile.optimize.budget import Budget
from recompile.optimize.choose import Rules, choose, prepare_problem
from recompile.optimize.problem import prepare, reachable_range


@dataclass(frozen=True)
class CacheCost:
    """One way to store the cache.

    name: as `model_diff -cq` has it; flags: of its engine; kl_nats: of the base through it, nats per token
    """

    name: str
    engine: str
    flags: str
    size_bytes: int  # at the context asked for
    kl_nats: float
    std_error: float | None


@dataclass(frozen=True)
class CacheOption:
    """A cache, and the best mix in what it leaves.

    weights_kl_nats: predicted; None where no mix fits beside this cache
    """

    cost: CacheCost
    weights_bytes: int  # that it leaves for all tensors, as far as a mix can use them
    weights_kl_nats: float | None

    @property
    def kl_nats(self) -> float | None:
        """Of both, added up."""
        return None if self.weights_kl_nats is None else self.cost.kl_nats + self.weights_kl_nats


@dataclass(frozen=True)
class CacheChoice:
    """Caches that were tried, in the order given, and the one to run with."""

    context: int  # tokens
    size_bytes: int  # of tensors and cache together
    options: tuple[CacheOption, ...]
    number: int
    rows: int  # that the caches were measured on
    rows_sha256: str

    @property
    def chosen(self) -> CacheOption:
        return self.options[self.number]


def choose_cache(
    profile: Profile,
    size_bytes: int,
    context: int,
    costs: Sequence[CacheCost],
    solver: str,
    rules: Rules,
    *,
    rows: int,
    rows_sha256: str,
) -> CacheChoice:
    """The cache that has the least KL together with the best mix beside it, by costs; the smaller one of equals.

    Raises BudgetError where no cache leaves room for any mix.
    """
    most_bits = reachable_range(prepare(prepare_problem(profile, rules)))[1]
    most_bytes = -(-(most_bits + profile.header.other_bits) // 8)  # more is of no use to any mix
    options = tuple(
        _option(profile, min(size_bytes - cost.size_bytes, most_bytes), cost, solver, rules) for cost in costs
    )
    fitting = [
        (option.kl_nats, option.cost.size_bytes, n) for n, option in enumerate(options) if option.kl_nats is not None
    ]
    if not fitting:
        smallest = min(costs, key=lambda cost: cost.size_bytes)
        header = profile.header
        least = header.fixed_bits + sum(min(group.bits.values()) for group in header.groups) + header.other_bits
        raise BudgetError(
            f"{{size}} {format_bytes(size_bytes)}: the smallest cache ({smallest.name}) takes "
            f"{format_bytes(smallest.size_bytes)} at {context} tokens and the smallest mix {format_bytes(least / 8)}, "
            f"together {format_bytes(smallest.size_bytes + least / 8)}; give more {{size}}, less {{context}}, or fewer "
            f"{{cache_bits}}"
        )
    return CacheChoice(context, size_bytes, options, min(fitting)[2], rows, rows_sha256)


def _option(profile: Profile, left: int, cost: CacheCost, solver: str, rules: Rules) -> CacheOption:
    if left <= 0:
        return CacheOption(cost, left, None)
    try:
        found = choose(profile, Budget(size_bytes=left), solver, rules)
    except BudgetError:
        return CacheOption(cost, left, None)
    return CacheOption(cost, left, found.predicted_kl_nats)
