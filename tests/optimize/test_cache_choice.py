"""Weights and cache in one size: the cache is one more group, so the least over all mixes of both is what is chosen."""

from __future__ import annotations

import itertools
import random

import pytest

from recompile.costs import Profile
from recompile.errors import BudgetError
from recompile.optimize.cache_choice import CacheCost, choose_cache
from recompile.optimize.choose import Constraint, Rules, predict
from tests.profiles import make_profile

NAMES = ("f16", "q8_0", "q8_0,q4_0", "q4_0")


def costs(full_bytes: int, scale: float) -> list[CacheCost]:
    sizes = (16.0, 8.5, 6.5, 4.5)
    return [
        CacheCost(name, "llama.cpp", f"-ctk {name}", round(full_bytes * bits / 16), scale * 4.0**-bits, None)
        for name, bits in zip(NAMES, sizes, strict=True)
    ]


def least_of_all(profile: Profile, size_bytes: int, caches: list[CacheCost]) -> float | None:
    """By trying every mix with every cache."""
    groups, found = profile.header.groups, []
    for cache in caches:
        for labels in itertools.product(*(group.bits for group in groups)):
            choice = {group.name: label for group, label in zip(groups, labels, strict=True)}
            bits = profile.header.fixed_bits + sum(group.bits[choice[group.name]] for group in groups)
            if (bits + profile.header.other_bits) + 8 * cache.size_bytes <= 8 * size_bytes:
                found.append(predict(profile, choice)[0] + cache.kl_nats)
    return min(found, default=None)


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_least_of_all_mixes_of_both(seed: int) -> None:
    profile = make_profile("block", 2, seed)
    header, rng = profile.header, random.Random(seed)
    least, most = (
        (header.fixed_bits + header.other_bits + sum(pick(group.bits.values()) for group in header.groups))
        for pick in (min, max)
    )
    low, high = least // 8, most // 8
    caches = costs(rng.randrange(1, high), 10 ** rng.uniform(-2, 6))
    size = round(low + rng.uniform(0.2, 1.2) * (high - low) + caches[-1].size_bytes)
    wanted = least_of_all(profile, size, caches)
    assert wanted is not None
    found = choose_cache(profile, size, 4096, caches, "exact", Rules(), rows=1, rows_sha256="")
    assert found.chosen.kl_nats == pytest.approx(wanted)
    assert [option.cost.name for option in found.options] == list(NAMES)
    assert found.chosen.weights_bytes == min(size - found.chosen.cost.size_bytes, -(-most // 8))
    assert all(
        option.kl_nats is None or option.kl_nats >= found.chosen.kl_nats - 1e-12  # type: ignore[operator]
        for option in found.options
    )


def test_a_size_that_no_cache_fits_says_what_would() -> None:
    profile = make_profile()
    with pytest.raises(BudgetError, match=r"the smallest cache \(q4_0\) takes .* at 4096 tokens and the smallest mix"):
        choose_cache(profile, 1000, 4096, costs(10**6, 1.0), "exact", Rules(), rows=1, rows_sha256="")


def test_constraints_hold_beside_a_cache() -> None:
    profile = make_profile()
    size = 10**6
    free = choose_cache(profile, size, 64, costs(1000, 1.0), "exact", Rules(), rows=1, rows_sha256="")
    pinned = Rules((Constraint.parse("pin", "*=2"),))
    bound = choose_cache(profile, size, 64, costs(1000, 1.0), "exact", pinned, rows=1, rows_sha256="")
    assert bound.chosen.weights_kl_nats is not None
    assert free.chosen.weights_kl_nats is not None
    assert bound.chosen.weights_kl_nats > free.chosen.weights_kl_nats
