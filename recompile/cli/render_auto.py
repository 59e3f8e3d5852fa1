"""What `model_auto` prints: the mix beside other builds, and on the way what its stages print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.cli.render_merge import describe_merge
from recompile.cli.render_optimize import describe_recipe
from recompile.cli.render_profile import describe_next
from recompile.cli.render_quantize import describe_variants
from recompile.cli.render_trace import describe_trace
from recompile.io.report import format_columns, role_in_words, with_error
from recompile.io.sizes import format_bpw, format_bytes

if TYPE_CHECKING:
    from recompile.auto import AutoReport
    from recompile.auto_stages import StageDone


def describe_stage(stage: StageDone, work: Path) -> str:
    """What the command of that stage would print."""
    from recompile.merge.run import MergeReport

    report: Any = stage.report
    if stage.name == "trace":
        return describe_trace(report)
    if stage.name == "profile":
        return describe_next(report, work / "profile.jsonl")
    if stage.name == "recipe":
        return describe_recipe(report)
    if stage.name == "heal" and not isinstance(report, dict):
        pair = report.accept
        return f"Healed in {report.steps} steps: KL {pair.before:.4f} to {pair.after:.4f} on rows of its own"
    if stage.name in ("build", "uniform"):
        return describe_merge(report) if isinstance(report, MergeReport) else describe_variants(report)
    return ""


def describe_auto(report: AutoReport) -> str:
    """The mix beside other builds, and what that says."""
    rows, verdicts = [], []
    mix = report.builds[0]
    for entry in report.builds:
        kept, versus = entry.get("kept", True), ""
        name = entry["build"] if kept else f"{Path(entry['build']).name} (compared, not kept)"
        if entry is not mix:
            low, high = entry["interval_95"]
            versus = f"{entry['mix_minus_this_nats']:+.4f} [{low:+.4f}, {high:+.4f}]"
            smaller = entry["total_bytes"] <= mix["total_bytes"]
            if smaller and low > 0:
                way = "use it instead" if kept else "model_quantize makes it"
                verdicts.append(f"{name} is not larger and measures better with confidence: {way}.")
            elif smaller and high >= 0:
                verdicts.append(f"The mix is not better than {name} with confidence: more -r rows may tell.")
        rows.append(
            (
                name,
                format_bpw(entry["bpw"]),
                format_bytes(entry["total_bytes"]),
                with_error(entry["kl_nats"], entry["kl_std_error"], ".4f"),
                f"{entry['perplexity']:.3f}",
                versus,
            )
        )
    header = ("build", "bpw", "size", "KL(base || build), nats/token", "perplexity", "mix - this [95 %]")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items())
    lines = [
        format_columns(rows, header),
        f"on {report.rows} rows x {report.row_tokens} tokens that nothing else used, {report.rows_source}"
        f"{role_in_words(report.rows_role, report.positions)}",
        *verdicts,
        f"Stages: {seconds}. Recipe: {report.recipe}",
        f"For a model page: {report.card}; to look at: {report.page}",
    ]
    return "\n".join(lines)
