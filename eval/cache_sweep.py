"""What several quantized caches cost one candidate, on the same rows: `model_diff -cqs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eval.diff import CacheUsed, DiffReport
from eval.metrics import Mean, Quantiles, paired_difference


@dataclass(frozen=True)
class CachePoint:
    """The candidate through one cache.

    difference: KL less that of the candidate as the report beside it has it, nats a token, paired over rows
    interval:   95 % of it, Student's t over rows; None for fewer than two rows
    """

    cache: CacheUsed
    kl: Mean
    kl_quantiles: Quantiles
    kl_rows: tuple[float, ...]
    same_top: Mean
    perplexity: float
    difference: Mean
    interval: tuple[float, float] | None

    @property
    def bits(self) -> float:
        """Stored bits a value, keys and values together, scales included."""
        keys, values = self.cache.key_bits, self.cache.value_bits
        return (keys + values) / 2


def sweep_of(report: DiffReport, swept: Sequence[DiffReport]) -> tuple[CachePoint, ...]:
    """The reports of a candidate with other caches, in their order, beside its own."""
    return tuple(_point(report, each) for each in swept)


def _point(report: DiffReport, swept: DiffReport) -> CachePoint:
    assert swept.cache is not None, "it was run through one"
    difference, interval = paired_difference(torch.tensor(swept.kl_rows), torch.tensor(report.kl_rows))
    return CachePoint(
        cache=swept.cache,
        kl=swept.kl,
        kl_quantiles=swept.kl_quantiles,
        kl_rows=swept.kl_rows,
        same_top=swept.top_k_agreement[0],
        perplexity=swept.score_candidate.perplexity,
        difference=difference,
        interval=interval if difference.std_error is not None else None,
    )


@dataclass(frozen=True)
class CacheGrid:
    """KL of every kind of keys (down) with every kind of values (across), as `model_diff -cqs exllamav3-grid` has it.

    kl: nats a token, a row for each of `keys`
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    kl: tuple[tuple[float, ...], ...]


def grid_of(points: Sequence[CachePoint]) -> CacheGrid | None:
    """A sweep as a grid; None where it is not one of two kinds each and more."""
    kinds = [_kinds(point.cache) for point in points]
    keys, values = (tuple(dict.fromkeys(pair[n] for pair in kinds)) for n in range(2))
    found = dict(zip(kinds, (point.kl.mean for point in points), strict=True))
    if min(len(keys), len(values)) < 2 or len(found) != len(points) or len(found) != len(keys) * len(values):
        return None
    return CacheGrid(keys, values, tuple(tuple(found[key, value] for value in values) for key in keys))


def _kinds(cache: CacheUsed) -> tuple[str, str]:
    """Of keys, of values, as the cache's name has them; the engine stays with the keys."""
    keys, comma, values = cache.name.partition(",")
    return keys, values if comma else keys.rpartition(":")[2]
