"""What `model_profile` prints: the groups that cost most, from every source."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from recompile.io.report import format_columns, role_in_words, with_error

if TYPE_CHECKING:
    from pathlib import Path

    from recompile.costs import Profile


def describe_next(profile: Profile, out: Path) -> str:
    """What a finished profile prints."""
    return f"{describe_profile(profile)}\n\nNext: model_optimize {shlex.quote(str(out))} -b 4.0 -o overrides.yaml"


def describe_profile(profile: Profile, most: int = 20) -> str:
    """The groups that hurt most at the base variant's bits, with every candidate's cost."""
    header = profile.header
    labels = [candidate.label for candidate in header.candidates]
    order = sorted(
        header.groups,
        key=lambda group: (
            -max(
                (cost.kl_nats for label in labels if (cost := profile.cost(group.name, label)) is not None),
                default=float("-inf"),
            )
        ),
    )
    rows = []
    for group in order[:most]:
        cells = []
        for label in labels:
            cost = profile.cost(group.name, label)
            mark = " prior" if cost is not None and cost.is_prior else ""
            cells.append("-" if cost is None else f"{with_error(cost.kl_nats, cost.std_error, '.5f')}{mark}")
        rows.append((group.name, *cells))
    where = "the reference" if header.context == "clean" else f"the {header.base} variant"
    title = f"KL in nats per token of taking a group from each source, swapped into {where}"
    if header.method == "weights":
        title = "Weighted relative error of the weights, times rows, of taking a group from each source (no nats)"
    if len(order) > most:
        title += f" (the {most} most expensive of {len(order)} groups)"
    text = f"{title}\n" + format_columns(rows, ("group", *labels))
    said = role_in_words(header.rows_role, header.positions)
    text += f"\nMeasured on {header.rows} rows x {header.row_tokens} tokens, {header.rows_source}{said}"
    unreached = profile.unreached()
    if unreached:
        text += (
            f"\n{len(unreached)} of {len(header.groups)} groups are experts that no token of these rows reached, such "
            f"as {unreached[0]}: unmeasured. Their prior is the median over the same projection of the other experts; "
            f"more rows help."
        )
    return text
