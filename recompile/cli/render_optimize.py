"""What `model_optimize` prints: a recipe, what was measured of it, and the table of a frontier."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from recompile.io.report import format_columns, role_in_words, with_error
from recompile.io.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.metrics import Mean
    from eval.search.acceptance import Contender, Verdict
    from eval.search.frontier import FrontierReport, FrontierRow
    from eval.search.optimize import LimitReport, OptimizeReport
    from recompile.costs import Profile
    from recompile.optimize.cache_choice import CacheChoice


def describe_recipe(report: OptimizeReport) -> str:
    """The recipe and what was measured of it."""
    from eval.search.optimize import next_step

    chosen, verdict = report.written, report.verdict
    header = chosen.profile.header
    counts: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for group in header.groups:
        label = chosen.solution.choice[group.name]
        counts[label] += len(group.modules)
        weights[label] += group.weights
    rows = [
        (candidate.label, candidate.model_dir, str(counts[candidate.label]), f"{100 * share:.1f} %")
        for candidate in header.candidates
        for share in [weights[candidate.label] / max(1, header.group_weights)]
    ]
    spare = chosen.solution.budget_bits - chosen.solution.bits
    gap = f", gap to the proven bound {chosen.solution.gap:.2g}" if math.isfinite(chosen.solution.gap) else ""
    lines = [
        format_columns(rows, ("source", "directory", "modules", "of the weights"), (2, 3)),
        "",
        f"Size:         {chosen.bpw:.4f} bpw over quantized modules, {format_bytes(chosen.total_bytes)} in all; "
        f"{format_bytes(spare / 8)} of the budget left",
        f"Predicted KL: {with_error(chosen.predicted_kl_nats, chosen.predicted_std_error)} nats per token "
        f"(swaps added up; solver {chosen.solution.solver}{gap})",
    ]
    if report.cache is not None:
        lines += ["", _cache(report.cache)]
    if verdict is not None:
        lines += ["", describe_verdict(verdict, chosen.profile)]
        if report.solved is not chosen:
            lines.append(f'Wrote the best of them instead: "{chosen.solution.solver}" (--no-guard keeps the recipe).')
        elif verdict.unbeaten:
            lines.append(_why_kept(report, verdict))
    if report.limit is not None:
        lines.append(_limit(report.limit, report.measured.kl if report.measured is not None else None))
    if verdict is not None or report.limit is not None:
        lines.append("")
    lines += [f"Wrote {report.out}", "", f"Next: {next_step(chosen.profile, report.out)}"]
    return "\n".join(lines)


def _cache(found: CacheChoice) -> str:
    """Every cache with the best mix beside it, and the one to run with."""
    rows = [
        (
            option.cost.name,
            format_bytes(option.cost.size_bytes),
            with_error(option.cost.kl_nats, option.cost.std_error),
            format_bytes(option.weights_bytes) if option.weights_bytes > 0 else "nothing",
            f"{option.weights_kl_nats:.6f}" if option.weights_kl_nats is not None else "does not fit",
            f"{option.kl_nats:.6f}" if option.kl_nats is not None else "-",
        )
        for option in found.options
    ]
    header = ("cache", f"at {found.context} tokens", "its KL", "left for weights", "their KL, predicted", "together")
    return (
        f"{format_bytes(found.size_bytes)} for weights and cache (caches measured on {found.rows} rows of the base):\n"
        f"{format_columns(rows, header)}\n"
        f"Run with {found.chosen.cost.flags} ({found.chosen.cost.engine})."
    )


def _why_kept(report: OptimizeReport, verdict: Verdict) -> str:
    """Why a recipe that does not beat all others was written."""
    if verdict.best is verdict.recipe:
        return "It measures best, and is kept."
    if report.best_is_over:
        return f'Kept: "{verdict.best.name}" is above the limit on KL on the rows that the size was found with.'
    return "Kept, as --no-guard says."


def _limit(limit: LimitReport, reported: Mean | None) -> str:
    """How the recipe keeps a limit; reported: its KL on the rows of the verification, where there was one."""
    said = (
        f"Limit:        KL {limit.max_kl_nats:g} at most; {limit.measured_kl_nats:.6f} on the {limit.rows} rows that "
        f"the size was found with ({len(limit.tried)} sizes measured)"
    )
    if reported is None:
        return said
    said += f"; {reported.mean:.6f} on those above"
    if reported.std_error is not None:
        low, high = (reported.mean + side * 1.96 * reported.std_error for side in (-1, 1))
        said += f", 95 % {max(low, 0):.6f} to {high:.6f}"
    return f"{said}: {'above' if reported.mean > limit.max_kl_nats else 'within'} it"


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
    on = (
        f"Measured on {verdict.rows} rows x {verdict.row_tokens} tokens that nothing else uses, {verdict.rows_source}"
        f"{role_in_words(verdict.rows_role, verdict.positions)} (KL in nats per token, paired by row{inputs}):"
    )
    return f"{on}\n{format_columns(rows, header)}\n{verdict_line(verdict)}"


def _mark(contender: Contender) -> str:
    if contender.interval is None:
        return ""
    if not contender.competes:
        return "larger than asked for; shown only"
    return "beaten" if contender.is_beaten else ("better" if contender.interval[0] > 0 else "open")


def verdict_line(verdict: Verdict) -> str:
    """What the measured mixes say of the recipe, in words."""
    ratio = f"{verdict.ratio:.2f}" if math.isfinite(verdict.ratio) else "not a number"
    said = f"Measured / predicted KL: {ratio}; perplexity {100 * verdict.ppl_increase:+.2f} % against the reference."
    baselines = [contender for contender in verdict.contenders[1:] if contender.competes]
    if not baselines:
        return f"{said}\nNo other mix of this size to compare with."
    if verdict.rows < 2:
        return f"{said}\nOne row gives no interval: nothing is proved; use -r 8 or more."
    if not verdict.unbeaten:
        return f"{said}\nThe recipe beats every one of them with 95 % confidence."
    names = ", ".join(f'"{contender.name}"' for contender in verdict.unbeaten)
    return f"{said}\nThe recipe does NOT beat {names} with 95 % confidence on these rows."


def describe_frontier(report: FrontierReport) -> str:
    """The table of all budgets."""
    lines = [_frontier_table(report.rows)]
    if report.left_out_bpw:
        low, high = report.reachable_bpw
        left = ", ".join(f"{bpw:g}" for bpw in report.left_out_bpw)
        lines.append(f"Out of reach and left out: {left} bpw; reachable range: {low:.4f} to {high:.4f} bpw")
    recipes = sum(row.recipe is not None for row in report.rows)
    lines.append(f"Wrote {recipes} recipes, frontier.csv, .json and the plot in {report.folder}")
    return "\n".join(lines)


def _frontier_table(table: Sequence[FrontierRow]) -> str:
    is_measured = any(row.measured_kl_nats is not None for row in table)
    lines = []
    for row in table:
        notes = [word for word, applies in (("nested", row.nested), ("dominated", row.dominated)) if applies]
        line = [
            row.name,
            f"{row.bpw:.4f}",
            f"{row.gib:.4f}",
            with_error(row.predicted_kl_nats, row.predicted_std_error),
        ]
        if is_measured:
            line.append(with_error(row.measured_kl_nats, row.measured_std_error))
        lines.append((*line, ", ".join(notes)))
    header = ("recipe", "bpw", "GiB", "predicted KL", *(["measured KL"] if is_measured else []), "")
    return format_columns(lines, header)
