"""What `model_trace` prints: rows and tokens by kind, and rows by role."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recompile.io.report import format_columns

if TYPE_CHECKING:
    from eval.trace.run import TraceReport


def describe_trace(report: TraceReport) -> str:
    """A row a kind of prompt."""
    roles = list(report.roles)
    rows = [
        (
            kind.kind,
            str(kind.rows),
            str(kind.prompt_tokens),
            str(kind.response_tokens),
            f"{kind.ended} of {kind.rows}",
            *(str(kind.roles[role]) for role in roles),
        )
        for kind in report.kinds
    ]
    totals = (str(report.rows), str(report.prompt_tokens), str(report.response_tokens))
    ended = f"{sum(kind.ended for kind in report.kinds)} of {report.rows}"
    rows.append(("all", *totals, ended, *(str(report.roles[role]) for role in roles)))
    header = ("kind", "rows", "prompt tokens", "response tokens", "ended by itself", *roles)
    about = report.about
    lines = [format_columns(rows, header), ""]
    drawn = "greedy" if about.temperature == 0 else f"temperature {about.temperature:g}, seed {about.seed}"
    lines.append(f"{report.out}: written by {report.base} ({drawn}, at most {about.max_new_tokens} tokens a response)")
    if report.left_out:
        lines.append(f"{report.left_out} prompts did not fit the model's context and were left out")
    return "\n".join(lines)
