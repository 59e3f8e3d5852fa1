"""Verification as commands do it: open the models, make rows, measure a recipe beside its rivals, say what came out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recompile.cli.common import format_columns, progress
from recompile.cli.options import compute_device, read_rows
from recompile.errors import RecompileError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from eval.search.acceptance import Contender, Verdict
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.costs import Profile
    from recompile.model.tokens import Rows
    from recompile.optimize.baselines import Rival
    from recompile.optimize.choose import Choice


@dataclass(frozen=True)
class RowOptions:
    """`-r -l -d --text --dataset`: the rows of a role and where models run. activations: with inputs quantized, too."""

    rows: int
    length: int
    device: str
    text: Path | None
    dataset: str | None
    activations: bool = False

    def read(self, directories: Sequence[Path], role: str, rows: int | None = None) -> tuple[Rows, int | None]:
        return read_rows(directories, role, rows or self.rows, self.length, self.text, self.dataset, None)

    def read_up_to(self, directories: Sequence[Path], role: str, most: int, least: int) -> Rows:
        """`most` rows, or as many as the text has. Raises RecompileError for fewer than `least`."""
        try:
            return self.read(directories, role, most)[0]
        except RecompileError:  # a short text, which is read again at little cost
            self.read(directories, role, least)
            return read_rows(directories, role, None, self.length, self.text, self.dataset, None)[0]


def run_verification(
    chosen: Choice,
    rivals: Sequence[Rival],
    reference: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    options: RowOptions,
    quiet: bool,
    role: str = "accept",
) -> Verdict:
    """Measure on rows of a role that has chosen nothing."""
    from eval.diff import DiffOptions
    from eval.search.acceptance import Verdict, verify

    directories = [reference.path, *(checkpoint.path for checkpoint in checkpoints.values())]
    found, vocab = options.read(directories, role)
    events = verify(
        chosen.profile.header,
        checkpoints,
        reference,
        chosen.solution.choice,
        chosen.bits,
        chosen.predicted_kl_nats,
        rivals,
        found.ids,
        DiffOptions(device=compute_device(options.device), vocab=vocab),
        rows_source=found.source,
        rows_sha256=found.sha256,
        activations=options.activations,
    )
    for event in _shown(events, len(rivals) + 1, quiet):
        if isinstance(event, Verdict):
            return event
    raise AssertionError("verify ends with a Verdict")


def _shown(events: Iterable[object], mixes: int, quiet: bool) -> Iterable[object]:
    """The same events, with a bar."""
    from eval.diff import LayerDrift, RowsCompared

    done, total = 0, 1
    with progress("checking", 1, unit="steps", quiet=quiet) as bar:
        for event in events:
            if isinstance(event, LayerDrift):
                total, done = 2 * event.total * mixes, done + 1
                bar.update(min(done, total), event.name, total)
            elif isinstance(event, RowsCompared):
                bar.update(total / 2 + total / 2 * event.done / event.total, f"logits of row {event.done}", total)
            yield event


def describe_verdict(verdict: Verdict, profile: Profile) -> str:
    """The table of all measured mixes and what it means."""
    weights = max(1, profile.counted_weights)
    rows = []
    for contender in verdict.contenders:
        difference = ""
        if contender.difference is not None and contender.interval is not None:
            low, high = contender.interval
            difference = f"{contender.difference.mean:+.5f} [{low:+.5f}, {high:+.5f}]"
        rows.append(
            (contender.name, f"{contender.bits / weights:.4f}", str(contender.kl), difference, _mark(contender))
        )
    inputs = ", inputs quantized as the schemes say" if verdict.activations else ""
    header = ("mix", "bpw", "measured KL", "recipe - mix, 95 % interval", "")
    return (
        f"Measured on {verdict.rows} rows x {verdict.row_tokens} tokens that nothing else uses (KL in nats per token, "
        f"paired by row{inputs}):\n" + format_columns(rows, header, (1, 2, 3)) + "\n" + verdict_line(verdict)
    )


def _mark(contender: Contender) -> str:
    if contender.interval is None:
        return ""
    if not contender.competes:
        return "larger than asked for; not a rival"
    return "beaten" if contender.is_beaten else ("better" if contender.interval[0] > 0 else "open")


def verdict_line(verdict: Verdict) -> str:
    ratio = f"{verdict.ratio:.2f}" if math.isfinite(verdict.ratio) else "not a number"
    said = f"Measured / predicted KL: {ratio}; perplexity {100 * verdict.ppl_increase:+.2f} % against the reference."
    rivals = [contender for contender in verdict.contenders[1:] if contender.competes]
    if not rivals:
        return f"{said}\nNo other mix of this size to compare with."
    if verdict.rows < 2:
        return f"{said}\nOne row gives no interval: nothing is proved; use -r 8 or more."
    if not verdict.unbeaten:
        return f"{said}\nThe recipe beats every one of them with 95 % confidence."
    names = ", ".join(f'"{contender.name}"' for contender in verdict.unbeaten)
    return f"{said}\nThe recipe does NOT beat {names} with 95 % confidence on these rows."
