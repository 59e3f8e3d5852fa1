"""What `model_diff --engine` prints: of GGUF files llama-perplexity's lines and tables, then our own figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.engines.engine_diff import EngineReport
    from eval.engines.figures import KlFigures
    from eval.engines.judged_diff import JudgedReport
    from eval.engines.run import EngineDiff


def describe_engine(found: EngineDiff) -> str:
    """The engine's figures, and ours beside them."""
    from eval.engines.judged_diff import JudgedReport
    from eval.engines.llama_kl import CHUNK_HEADER, chunk_line

    if isinstance(found.report, JudgedReport):
        return _judged(found.report)
    lines = [CHUNK_HEADER, *(chunk_line(chunk.done, chunk.so_far) for chunk in found.chunks)]
    return "\n".join([*lines, _summary(found.report)])


def _summary(report: EngineReport) -> str:
    from eval.engines.llama_kl import format_statistics

    figures = format_statistics(report.tool)
    lines = [
        "",
        figures if report.tool_complete else f"{report.tool.tokens} tokens: too few for llama-perplexity's tables",
    ]
    clipped = "" if report.torch is None or report.torch.engine_reference else " (against the file's clipped ones)"
    lines += [
        "",
        f"A (candidate): {report.candidate}",
        f"B (reference): {report.reference}",
        f"Measured on:   {report.chunks} chunks x {report.n_ctx} tokens, {report.tokens} of them count; {report.text}",
        f"Engine:        {report.engine}",
        *([f"A's cache:     {report.cache}, flash attention on; B's is f16"] if report.cache else []),
        "",
        "KL(B || A) in nats a token, unclipped; standard errors over chunks:",
        f"  engine: {_figures(report.kl)}{clipped}",
    ]
    if report.torch is not None:
        t = report.torch
        lines += [
            f"  torch:  {_figures(t.kl)} ({t.dtype}, the same weights)",
            "The engine against torch on one and the same file, KL(torch || engine):",
            f"  A:      {_figures(t.engine_candidate)}",
        ]
        if t.engine_reference is not None:
            lines.append(f"  B:      {_figures(t.engine_reference)}")
        if report.cache:
            lines.append("The KL in torch is that of the cache as it is simulated; B attends to its keys as they are.")
        lines.append(
            "The engine rounds activations to 8 bits before it multiplies them with quantized weights and keeps its "
            "cache in f16;\ntorch does neither. KLs that differ by no more than that say nothing about the weights."
        )
    return "\n".join(lines)


def _figures(f: KlFigures) -> str:
    q = f.quantiles
    return f"{f.kl}; median {q.median:.6f}, p90 {q.p90:.6f}, p99 {q.p99:.6f}, max {q.max:.6f}"


# ---- directories -----------------------------------------------------------------------------------------------------


def _judged(report: JudgedReport) -> str:
    whole = report.listed == report.vocab
    told = "every token" if whole else f"the {report.listed} most probable tokens of {report.vocab}"
    lines = [
        f"A (candidate): {report.candidate}",
        f"B (reference): {report.reference}",
        f"Measured on:   {report.rows} rows x {report.row_tokens} tokens, {report.tokens} predictions; {report.text}",
        f"Engine:        {report.version} in {report.dtype}, which tells log-probabilities of {told}",
        *(f"               {note}" for note in report.notes),
        "",
        "KL(B || A) in nats a token, and negative log-likelihood of the text; standard errors over rows:",
    ]
    engine = (f"{report.engine}, {report.dtype}", str(report.kl.kl), report.nll_candidate, report.nll_reference)
    rows = [(own.what, str(own.kl.kl), own.nll_candidate, own.nll_reference) for own in report.ours]
    lines += _table(
        ("", "KL(B || A)", "nll of A", "nll of B"),
        [(what, kl, f"{a.mean:.4f}", f"{b.mean:.4f}") for what, kl, a, b in (engine, *rows)],
    )
    if report.ours:
        lines += [
            "",
            "One and the same file, ours against the engine's: mean |difference of log p(next)|, KL(ours || it):",
        ]
        lines += _table(
            ("", "A: |d log p|", "A: KL", "B: |d log p|", "B: KL"),
            [
                (
                    own.what,
                    *(
                        cell
                        for side in (own.candidate, own.reference)
                        for cell in (f"{side.log_prob.mean:.4f}", f"{side.kl.kl.mean:.6f}")
                    ),
                )
                for own in report.ours
            ],
        )
        lines += _causes(report)
    if not whole:
        lines += ["", *_classes(report)]
    return "\n".join(lines)


def _causes(report: JudgedReport) -> list[str]:
    """How much of the difference of A is what the engine adds to the weights."""
    if len(report.ours) < 2:
        return []
    steps = []
    for before, own in zip(report.ours, report.ours[1:], strict=False):
        assert own.moved is not None, "of all but the first"
        adds = "quantized inputs" if own.quantized_inputs != before.quantized_inputs else own.dtype
        if own.quantized_inputs != before.quantized_inputs and own.dtype != before.dtype:
            adds = f"quantized inputs and {own.dtype}"
        steps.append(f"{adds} by {own.moved.mean:.4f}")
    first, last = (own.candidate.log_prob.mean for own in (report.ours[0], report.ours[-1]))
    return [
        f"In our own pass A's log p(next token) is moved in the mean by {', then '.join(steps)}; the engine is "
        f"{first:.4f} from weights alone,",
        f"{last:.4f} from our last. A difference of that size is of activations and dtype, not of the weights.",
    ]


def _classes(report: JudgedReport) -> list[str]:
    lost = [own.whole_kl.kl.mean - own.kl.kl.mean for own in report.ours[:1]]
    lines = [
        f"These KLs are over B's {report.listed} most probable tokens ({report.known.mean:.1%} of which A tells, too) "
        f"and one class of all others,",
        f"to which B gives {report.outside.mean:.3%}: at most the KL over all tokens"
        + (f", of which ours loses {max(lost[0], 0):.6f} that way." if lost else "."),
    ]
    return lines


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (head, *rows)
    ]
