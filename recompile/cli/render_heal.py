"""What `model_heal` prints: KL before and after on rows of three roles, and what moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recompile.io.report import format_columns, role_in_words, with_error
from recompile.io.sizes import format_seconds

if TYPE_CHECKING:
    from eval.heal import HealReport, Paired


def describe_heal(report: HealReport) -> str:
    """KL before and after, and what moved."""

    def line(name: str, pair: Paired) -> tuple[str, str, str, str, str]:
        change = with_error(pair.gain, pair.std_error, "+.6f")
        return (name, f"{pair.before:.6f}", f"{pair.after:.6f}", f"{pair.ratio:.3f}", change)

    rows = [
        line("accept rows (the verdict)", report.accept),
        line(f"report rows: {report.rows_source}{role_in_words('', report.positions)}", report.report),
        line(f"another kind of text: {report.second_source}", report.second),
    ]
    header = ("KL(base || build), nats a token", "before", "healed", "ratio", "paired difference")
    text = format_columns(rows, header)
    text += (
        f"\n{report.steps} steps ({report.tokens} tokens, {format_seconds(report.seconds)}), the best after "
        f"{report.best_step}; {report.moved_tensors} tensors moved, learning rate {report.learning_rate:g}"
    )
    return f"{text}\n{report.out}"
