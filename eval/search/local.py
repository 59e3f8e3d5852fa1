"""`--solver local`: measured exchanges around the start."""

from __future__ import annotations

from collections.abc import Mapping

from eval.diff import DiffOptions
from eval.mixes.evaluator import MixEvaluator
from eval.search.job import Search
from recompile.events import Said
from recompile.io.sizes import format_seconds
from recompile.optimize.local import LocalOptions, LocalResult
from recompile.optimize.local import search_local as exchange


def search_local(search: Search) -> Mapping[str, str]:
    """Measured exchanges around the start (recompile.optimize.local)."""
    rows, vocab = search.where.read(search.directories, "choose")
    mixes = MixEvaluator(
        search.profile.header,
        search.checkpoints,
        search.reference,
        options=DiffOptions(device=search.device, vocab=vocab),
        holds=search.max_memory_bytes is None,
    )
    defaults = LocalOptions()
    options = LocalOptions(
        rounds=search.steps if search.steps is not None else defaults.rounds,
        seconds=60 * search.minutes if search.minutes is not None else defaults.seconds,
    )
    result: LocalResult | None = None
    measure = mixes.meter(rows)
    for event in exchange(search.problem, search.limits, search.start, measure, len(rows.ids), options):
        if isinstance(event, LocalResult):
            result = event
            continue
        said = f"{event.gain:.6f} better" if event.accepted is not None else "none better"
        search.on_event(
            Said(
                f"round {event.number}: {event.tried} moves, {said}; KL {event.kl:.6f} on the choosing rows, "
                f"{format_seconds(event.seconds)}"
            )
        )
    assert result is not None, "it ends with its result"
    return result.choice
