"""What quantized caches take and cost, measured on the unquantized model: the options of `model_optimize --context`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eval.diff import CacheUsed, DiffOptions, measure_many
from eval.metrics import Mean
from eval.mixes.measured import digest
from eval.mixes.mixes_file import MixesFile
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.errors import JournalError
from recompile.events import OnEvent, ignore
from recompile.formats.cache_types import CacheFormat
from recompile.io.schema import read_as
from recompile.model.tokens import Rows
from recompile.optimize.cache_choice import CacheCost


@dataclass(frozen=True)
class _Measured:
    """A line of the file: the reference through one cache, on some rows, whatever the context that is asked about."""

    used: CacheUsed
    kl: Mean


def measure_caches(
    reference: Checkpoint,
    caches: Sequence[CacheFormat],
    context: int,
    rows: Rows,
    file: MixesFile,
    *,
    vocab: int | None = None,
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> tuple[CacheCost, ...]:
    """KL(reference || reference through each cache) on `rows`, and the bytes of each once `context` tokens are in it.

    One pass over the reference for all that `file` does not hold of these rows already; it keeps them. Raises
    UnsupportedError for a model without such a cache, FormatError for heads that cannot be stored so, JournalError.
    """
    key = digest(["caches", reference.identity, rows.sha256, vocab, device])
    known = _known(file, key)
    missing = [each for each in dict.fromkeys(caches) if (each.engine, each.name) not in known]
    if missing:
        options = DiffOptions(device=device, vocab=vocab, caches=tuple(missing)).over(rows)
        for report in measure_many([reference] * len(missing), reference, rows.ids, options, on_event, "caches"):
            assert report.cache is not None, "every candidate has one"
            one = _Measured(report.cache, report.kl)
            known[one.used.engine, one.used.name] = one
            file.append({"of": key, "cache": asdict(one)})
    return tuple(_cost(known[each.engine, each.name], context) for each in caches)


def _cost(one: _Measured, context: int) -> CacheCost:
    used = one.used
    return CacheCost(used.name, used.engine, used.flags, used.bytes_at(context), one.kl.mean, one.kl.std_error)


def _known(file: MixesFile, key: str) -> dict[tuple[str, str], _Measured]:
    """By engine and name. Raises JournalError."""
    found: dict[tuple[str, str], _Measured] = {}
    for number, line in enumerate(file.values()[1:], start=2):
        stored: Any = line.get("cache") if isinstance(line, dict) and line.get("of") == key else None
        if stored is not None:
            one = read_as(_Measured, stored, f"{file.path}:{number}", error=JournalError)
            found[one.used.engine, one.used.name] = one
    return found
