"""What `model_diff --engine` prints: llama-perplexity's lines and tables, then our own figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eval.engines.engine_diff import EngineReport, KlFigures
    from eval.engines.run import EngineDiff


def describe_engine(found: EngineDiff) -> str:
    from eval.engines.llama_kl import CHUNK_HEADER, chunk_line

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
