"""What `model_diff` prints: drift by layer, sizes, perplexities, top-K agreement and KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recompile.io.report import format_columns, role_in_words, with_error
from recompile.io.sizes import format_bpw, format_bytes
from recompile.merge.left_dense import left_dense

if TYPE_CHECKING:
    from eval.attribution import Attribution
    from eval.diff import CacheUsed, DiffReport
    from eval.metrics import Mean, Slice
    from eval.run_diff import ManyDiffs, ModelDiff
    from recompile.merge.overlay import Overlay


def describe_diff(found: ModelDiff) -> str:
    """Everything of one candidate."""
    parts = [_layer_table(found.report), _summary(found.report, found.overlay)]
    if found.with_activations is not None:
        parts.append(_with_inputs(found.report, found.with_activations))
    if found.cache_sweep:
        parts += ["", _sweep(found)]
    if found.attribution is not None:
        parts += ["", _attribution(found.attribution, found.report)]
    if found.divergence is not None:
        parts += ["", f"Greedy runs ({_runs(found)}): {found.divergence}"]
    return "\n".join(parts)


def _runs(found: ModelDiff) -> str:
    assert found.divergence is not None
    return f"{found.divergence.prompts} prompts x {found.divergence.new_tokens} tokens"


def _cache(used: CacheUsed) -> str:
    rest = used.of_layers - used.layers
    others = f"; what the other {rest} keep is left as it is" if rest else ""
    return (
        f"{used.name} as {used.engine} stores it ({used.flags}): {used.key_bits:g} bits a value of keys, "
        f"{used.value_bits:g} of values, {format_bytes(used.bytes_per_token)} a token; {used.layers} of "
        f"{used.of_layers} layers attend through it{others}"
    )


def _sweep(found: ModelDiff) -> str:
    """A row a cache, and what it adds to A as the report has it."""
    rows = [
        (
            point.cache.name,
            f"{point.bits:.2f}",
            format_bytes(point.cache.bytes_per_token),
            f"{point.kl:.6f}",
            f"{point.difference:+.6f}",
            f"{point.interval[0]:+.6f} to {point.interval[1]:+.6f}" if point.interval is not None else "-",
            f"{point.kl_quantiles.p99:.4f}",
            f"{100 * point.same_top.mean:.2f} %",
            f"{point.perplexity:.4f}",
        )
        for point in found.cache_sweep
    ]
    header = ["cache", "bits a value", "a token", "KL(B || A), nats/token", "more than above", "95 %", "p99"]
    used, grid = found.cache_sweep[0].cache, found.cache_grid
    rest = used.of_layers - used.layers
    said = f"A through quantized caches; {used.layers} of {used.of_layers} layers attend through one"
    said += f", what the other {rest} keep is left as it is" if rest else ""
    lines = [said, format_columns(rows, [*header, "same top token", "perplexity"])]
    if grid is not None:
        by_keys = [(key, *(f"{kl:.6f}" for kl in row)) for key, row in zip(grid.keys, grid.kl, strict=True)]
        lines += ["", "KL by keys (down) and values (across):", format_columns(by_keys, ["", *grid.values])]
    return "\n".join(lines)


GROUPS_SHOWN = 40


def _attribution(found: Attribution, report: DiffReport) -> str:
    """A row a group, the most expensive first."""
    with_noise = found.total_noise is not None
    rows = [
        (
            each.group,
            format_bpw(each.bits_per_weight),
            f"{100 * each.relative_error:.2f} %",
            f"{each.kl:.6f}",
            f"{100 * each.kl.mean / found.total.mean:.1f} %" if found.total.mean > 0 else "-",
            *([f"{each.noise:.6f}"] if each.noise is not None else []),
            *([f"{each.against_noise:.2f}" if each.against_noise is not None else "-"] if with_noise else []),
        )
        for each in found.groups[:GROUPS_SHOWN]
    ]
    header = ["group", "bpw", "rel. error", "KL by itself, nats/token", "share"]
    header += ["noise of that size", "KL / noise"] if with_noise else []
    left = len(found.groups) - len(rows)
    lines = [
        f"A's groups ({found.level}), each by itself in B:",
        format_columns(rows, header),
        *([f"... and {left} more, which --json holds"] if left > 0 else []),
        f"All of them added: {found.total}; together, as above: {report.kl}",
    ]
    if found.total_noise is not None and found.total_noise.mean > 0:
        lines.append(
            f"Noise of their sizes added: {found.total_noise}; A's errors cost "
            f"{found.total.mean / found.total_noise.mean:.2f} times as much"
        )
    return "\n".join(lines)


def describe_many(found: ManyDiffs) -> str:
    """A row a candidate, then every other candidate against the best, paired over rows."""
    first = found.diffs[0].report
    order = sorted(range(len(found.diffs)), key=lambda n: found.diffs[n].report.kl.mean)
    rows = []
    for n in order:
        report, size = found.diffs[n].report, found.diffs[n].overlay.accounting
        parted = found.diffs[n].divergence
        rows.append(
            (
                found.names[n],
                format_bpw(size.bpw),
                format_bytes(size.total_bytes),
                f"{report.kl:.5f}",
                f"{report.kl_quantiles.median:.5f}",
                f"{report.kl_quantiles.p99:.3f}",
                f"{report.score_candidate.perplexity:.4f}",
                f"{100 * report.top_k_agreement[0].mean:.2f} %",
                f"{100 * report.delta_p.rms.mean:.2f} %" if report.delta_p is not None else "",
                *([_median(parted.median)] if parted is not None else []),
            )
        )
    header = [
        "candidate",
        "bpw",
        "size",
        "KL(B || A), nats/token",
        "median",
        "p99",
        "perplexity",
        "same top token",
        "RMS delta p",
        *(["greedy runs part"] if found.diffs[0].divergence is not None else []),
    ]
    lines = [
        f"B (reference): {first.reference}",
        f"Measured on:   {_rows_of(first)}, {first.dtype} on {first.device}; B's perplexity "
        f"{first.score_reference.perplexity:.4f}",
        *([f"Their cache:   {_cache(first.cache)}"] if first.cache is not None else []),
        "",
        format_columns(rows, header),
        "",
        f"KL less that of {found.names[order[0]]}, paired over rows:",
    ]
    table = []
    for n in order[1:]:
        pair = found.pair(n, order[0])
        interval = f"{pair.interval[0]:+.5f} to {pair.interval[1]:+.5f}" if pair.interval is not None else "-"
        table.append(
            (
                found.names[n],
                f"{pair.difference:+.5f}",
                interval,
                "worse" if pair.is_clear else "not told apart",
            )
        )
    lines.append(format_columns(table, ("candidate", "difference, nats/token", "95 %", "")))
    return "\n".join(lines)


def _rows_of(report: DiffReport, whole: bool = False) -> str:
    """Which tokens were compared; whole: and how many of them count in what."""
    padded = report.tokens < report.rows * report.row_tokens
    counted = ""
    if padded:
        counted = f" ({report.tokens} tokens {'of responses ' if report.positions == 'response' else ''}counted)"
    elif whole:
        counted = (
            f" ({report.tokens} tokens counted, {report.unlabelled_tokens} of them, the last of each row, not in "
            f"perplexity)"
        )
    role = role_in_words(report.rows_role)
    shape = f"{report.rows} rows {'of at most' if padded else 'x'} {report.row_tokens} tokens"
    return f"{shape}{counted}, {report.rows_source}{role}"


def _median(median: float | None) -> str:
    return f"after {median:g}" if median is not None else "half never"


def _layer_table(report: DiffReport) -> str:
    kept = {layer.name: f"{100 * layer.same_experts.mean:.2f} %" for layer in report.routing}
    rows = [
        (
            layer.name,
            f"{layer.drift.relative_error:.6f}",
            f"{layer.drift.max_difference:.6f}",
            f"{layer.drift.sqnr_db:.2f}",
            f"{layer.drift.cosine_error:.6f}",
            *([kept.get(layer.name, "")] if kept else []),
        )
        for layer in report.layers
    ]
    header = ("state after", "rel. error", "max diff/norm", "SQNR dB", "cosine error", "same experts")
    return format_columns(rows, header[: len(rows[0])])


def _routing(report: DiffReport) -> list[str]:
    """What A's errors do to the choice of experts; nothing for a model without them."""
    if not report.routing:
        return []
    mean = sum(layer.same_experts.mean for layer in report.routing) / len(report.routing)
    worst = min(report.routing, key=lambda layer: layer.same_experts.mean)
    unused, experts = sum(layer.unused for layer in report.routing), sum(layer.experts for layer in report.routing)
    fullest = max(max(layer.load) * layer.experts / max(1, sum(layer.load)) for layer in report.routing)
    return [
        f"Routing: {100 * mean:.2f} % of tokens keep all {worst.chosen} of their experts (mean of "
        f"{len(report.routing)} layers), fewest after {worst.name}: {_percent(worst.same_experts)}",
        f"Expert load in B: {unused} of {experts} experts saw no token, the fullest {fullest:.1f} times its share",
    ]


def _summary(report: DiffReport, overlay: Overlay) -> str:
    size = overlay.accounting
    a, b = report.score_candidate, report.score_reference
    lines = [
        "",
        f"A (candidate): {report.candidate}",
        f"B (reference): {report.reference}",
        f"A's size:      {format_bpw(size.bpw)} bpw over quantized modules, head {format_bpw(size.head_bpw)}, "
        f"embedding {format_bpw(size.embedding_bpw)}, {format_bytes(size.total_bytes)} in all",
        f"               {left_dense(overlay)}",
        *([f"A's cache:     {_cache(report.cache)}"] if report.cache is not None else []),
        f"Measured on:   {_rows_of(report, whole=True)}, {report.dtype} on {report.device}",
        "",
        f"A perplexity: {with_error(a.perplexity, a.perplexity_std_error, '.8f')}",
        f"B perplexity: {with_error(b.perplexity, b.perplexity_std_error, '.8f')}",
        "",
    ]
    table = [
        (f"K = {k}", f"{hit_a:.4f}", f"{hit_b:.4f}", f"{agree:.4f}")
        for k, (hit_a, hit_b, agree) in enumerate(
            zip(a.label_in_top_k, b.label_in_top_k, report.top_k_agreement, strict=True), 1
        )
    ]
    header = ("", "label in A's top K", "label in B's top K", "same top K in A and B")
    lines += [format_columns(table, header), ""]
    q = report.kl_quantiles
    lines += [
        f"KL(B || A), the candidate measured by the reference: {report.kl:.8f} nats",
        f"KL(A || B), the other way round:                     {report.kl_reverse:.8f} nats",
        f"KL(B || A) per token: median {q.median:.6f}, p90 {q.p90:.6f}, p99 {q.p99:.6f}, p99.9 {q.p999:.6f}, "
        f"max {q.max:.6f}",
        *_text_tokens(report),
        f"Noise floor: {report.noise_floor:.2e} nats (B against itself, run in another shape)",
    ]
    lines += _routing(report)
    if report.identical:
        lines.append("Every logit of A equals B's to the last bit.")
    bins = [
        (
            f"{bin.low:.2f} - {bin.high:.2f}",
            f"{100 * bin.share:.1f} %",
            f"{bin.kl_mean:.6f}" if bin.tokens else "-",
            f"{bin.kl_median:.6f}" if bin.tokens else "-",
        )
        for bin in report.kl_by_confidence
    ]
    lines += ["", format_columns(bins, ("B's top probability", "of tokens", "mean KL", "median KL"))]
    for title, slices in (("rows from", report.by_origin), ("tokens of context", report.by_position)):
        if slices:
            lines += ["", _slices(title, slices)]
    return "\n".join(lines)


def _text_tokens(report: DiffReport) -> list[str]:
    """What changes for the text's own tokens, and for those that B was sure of."""
    change, flips = report.delta_p, report.sure_flips
    if change is None or flips is None:
        return []
    lines = [
        f"Delta p of the text's tokens, A - B: mean {_percent(change.mean, '+.3f')}, RMS {_percent(change.rms, '.3f')}"
    ]
    if flips.share is not None:
        lines.append(
            f"Another top token where B gave its own more than {flips.above:g}: {_percent(flips.share)} of "
            f"these {flips.tokens} tokens"
        )
    return lines


def _percent(share: Mean, spec: str = ".2f") -> str:
    """ "12.30 % ± 0.45"."""
    error = "" if share.std_error is None else f" ± {format(100 * share.std_error, spec.lstrip('+'))}"
    return f"{format(100 * share.mean, spec)} %{error}"


def _slices(title: str, slices: Sequence[Slice]) -> str:
    rows = [
        (
            part.name,
            str(part.rows),
            str(part.tokens),
            f"{part.kl:.6f}",
            _percent(part.same_top),
        )
        for part in slices
    ]
    return format_columns(rows, (title, "rows", "tokens", "mean KL", "same top token"))


def _with_inputs(report: DiffReport, with_inputs: DiffReport) -> str:
    lines = [
        "",
        f"Weights alone:             KL(B || A) {report.kl:.8f} nats (as above)",
        f"Inputs quantized as well:  KL(B || A) {with_inputs.kl:.8f} nats, "
        f"perplexity {with_inputs.score_candidate.perplexity:.6f}, "
        f"same top token {100 * with_inputs.top_k_agreement[0].mean:.1f} %",
    ]
    for unseen in with_inputs.unseen_inputs:
        more = f" and {len(unseen.modules) - 1} more" if len(unseen.modules) > 1 else ""
        lines.append(f"Not quantized: inputs of {unseen.modules[0]}{more}, which {unseen.why}")
    return "\n".join(lines)
