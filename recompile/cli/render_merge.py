"""What `recompile` prints: sizes before and after, what was written, and what a check found."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from recompile.cli.common import current_flags
from recompile.io.report import format_columns
from recompile.io.sizes import format_bpw, format_bytes, format_seconds
from recompile.merge.explain import resolved_table
from recompile.merge.left_dense import left_dense

if TYPE_CHECKING:
    from recompile.merge.run import CheckReport, MergeReport
    from recompile.merge.verify import VerifyReport


def describe_merge(report: MergeReport) -> str:
    """What a finished merge prints."""
    return f"{_sizes(report)}\n{_written(report)}"


def describe_plan(report: MergeReport, every: bool) -> str:
    """What --dry-run prints. every: a line for every module."""
    return f"{resolved_table(report.overlay, every=every)}\n\n{_sizes(report)}"


def describe_check(report: CheckReport) -> str:
    """What --check and --verify print."""
    lines = [describe_verified(report.verified)] if report.verified is not None else []
    lines += [f"{problem.severity}: {problem.spelled(current_flags())}" for problem in report.problems]
    lines += [] if report.problems else [f"{report.directory}: no inconsistency found"]
    return "\n".join([*lines, *report.notes])


def _sizes(report: MergeReport) -> str:
    overlay, plan, before, after = report.overlay, report.plan, report.before, report.plan.accounting

    def row(what: str, figure: str, result: str) -> tuple[str, str, str]:
        return (what, figure, result)

    table = format_columns(
        [
            row("bits per weight, quantized modules", format_bpw(before.bpw), format_bpw(after.bpw)),
            row("bits per weight, head", format_bpw(before.head_bpw), format_bpw(after.head_bpw)),
            row("bits per weight, embedding", format_bpw(before.embedding_bpw), format_bpw(after.embedding_bpw)),
            row("bits per weight, everything", format_bpw(before.total_bpw), format_bpw(after.total_bpw)),
            row("size", format_bytes(before.total_bytes), format_bytes(after.total_bytes)),
        ],
        ("", overlay.base.label, "result"),
        right=(1, 2),
    )
    counts = report.overridden
    listed = ", ".join(f"{count} from {source}" for source, count in counts.items())
    taken = f"{sum(counts.values())} of {len(overlay.placements)} modules overridden" + (
        f": {listed}" if listed else ""
    )
    taken += "" if plan.dense else f"\n{left_dense(overlay)}"
    files = "1 file" if len(plan.shards) == 1 else f"{len(plan.shards)} files"
    return f"{table}\n{taken}\n{len(plan.modules)} modules in {files}" + (", decoded" if plan.dense else "")


def _written(report: MergeReport) -> str:
    plan, seconds = report.plan, report.seconds
    out, size = shlex.quote(str(plan.out)), format_bytes(plan.data_bytes)
    if seconds is None:
        lines = [f"{plan.out}: {size}, written by an earlier run"]
    else:
        rate = plan.data_bytes / max(seconds, 1e-9)
        lines = [f"Wrote {plan.out}: {size} in {format_seconds(seconds)} ({format_bytes(rate)}/s)"]
    if report.verified is not None:
        lines.append(describe_verified(report.verified))
    lines.append(f"Next: model_diff -ma {out} -mb ORIGINAL    (ORIGINAL: the model before quantization)")
    return "\n".join(lines)


def describe_verified(report: VerifyReport) -> str:
    """What `--verify` found."""
    text = (
        f"Verified {report.modules} modules against the manifest, {report.compared_with_sources} of them against their "
        f"sources: {'all equal' if report.ok else 'NOT equal'}"
    )
    return "\n".join([text, *(f"  {note}" for note in report.notes)])
