"""What quantized caches take and cost, measured on the unquantized model: the options of `model_optimize --context`."""

from __future__ import annotations

from collections.abc import Sequence

from eval.diff import DiffOptions, measure_many
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.events import OnEvent, ignore
from recompile.formats.cache_types import CacheFormat
from recompile.model.tokens import Rows
from recompile.optimize.cache_choice import CacheCost


def measure_caches(
    reference: Checkpoint,
    caches: Sequence[CacheFormat],
    context: int,
    rows: Rows,
    *,
    vocab: int | None = None,
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> tuple[CacheCost, ...]:
    """KL(reference || reference through each cache) on `rows`, and the bytes of each once `context` tokens are in it.

    One pass over the reference for all. Raises UnsupportedError for a model without such a cache, FormatError for heads
    that cannot be stored so.
    """
    options = DiffOptions(
        device=device,
        vocab=vocab,
        lengths=tuple(rows.lengths.tolist()) if rows.lengths is not None else (),
        counted=rows.counted,
        caches=tuple(caches),
    )
    reports = measure_many([reference] * len(caches), reference, rows.ids, options, on_event, "caches")
    found = []
    for report in reports:
        assert report.cache is not None, "every candidate has one"
        used = report.cache
        size = used.bytes_at(context)
        found.append(CacheCost(used.name, used.engine, used.flags, size, report.kl.mean, report.kl.std_error))
    return tuple(found)
