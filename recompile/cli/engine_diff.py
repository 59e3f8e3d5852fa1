"""`model_diff --engine`: two GGUF files in llama.cpp or ik_llama.cpp, with llama-perplexity's figures and ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recompile.cli.common import print_json, progress
from recompile.errors import MismatchError, RecompileError
from recompile.model.devices import compute_device, compute_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eval.engines.base_logits import BaseLogits
    from eval.engines.builds import Installed
    from eval.engines.engine_diff import EngineReport, KlFigures

DEFAULT_N_CTX = 512
DEFAULT_CHUNKS = 8


@dataclass(frozen=True)
class EngineRun:
    """The options of `model_diff` that count here."""

    engine: str
    library: Path | None
    candidate: str
    reference: str | None
    chunks: int | None
    n_ctx: int
    text: Path | None
    dataset: str | None
    input_ids: Path | None
    base_logits: Path | None
    save_base_logits: Path | None
    with_torch: bool
    threads: int | None
    device: str
    dtype: str | None


def show(run: EngineRun, json_path: Path | None, quiet: bool) -> None:
    """Compare, and print as llama-perplexity does: a line a chunk, then its tables; then our own figures."""
    from eval.engines.base_logits import open_base_logits
    from eval.engines.builds import find_engine
    from eval.engines.engine_diff import EngineReport, compare_with_engine
    from eval.engines.llama_kl import CHUNK_HEADER, chunk_line

    installed = find_engine(run.engine, run.library)
    base = None
    if run.base_logits is not None:
        if run.save_base_logits is not None:
            raise RecompileError(
                "--kl-divergence-base reads a file that --save-all-logits would write; give one of them"
            )
        base = open_base_logits(run.base_logits)
    elif run.reference is None:
        raise click.UsageError("-mb BASE.gguf is needed, or --kl-divergence-base FILE")
    tokens, text = _chunks(run, installed, base)
    sources: Any = None
    if run.with_torch and run.reference is not None:
        from recompile.checkpoint.checkpoint import open_checkpoint
        from recompile.merge.overlay import check_same_model

        candidate, reference = open_checkpoint(run.candidate), open_checkpoint(run.reference)
        check_same_model(reference, candidate)
        sources = (candidate, reference)
    events = compare_with_engine(
        installed,
        run.candidate,
        run.reference if base is None else None,
        tokens,
        base=base,
        save_base=run.save_base_logits,
        sources=sources,
        device=compute_device(run.device),
        dtype=compute_dtype(run.dtype),
        text=text,
        threads=run.threads,
    )
    lines = [CHUNK_HEADER]
    with progress(f"chunks in {run.engine}", len(tokens), unit="chunks", quiet=quiet) as bar:
        for event in events:
            if isinstance(event, EngineReport):
                report = event
            else:
                lines.append(chunk_line(event.done, event.so_far))
                bar.update(event.done)
    if str(json_path) != "-":
        click.echo("\n".join(lines))
        click.echo(_summary(report))
    if json_path is not None:
        print_json(json_path, report.as_dict())


def _chunks(run: EngineRun, installed: Installed, base: BaseLogits | None) -> tuple[NDArray[Any], str]:
    """Token chunks, and where they are from."""
    import numpy as np

    from eval.engines.engine_diff import report_text, tokenize_with_engine
    from recompile.model import tokens

    given = [n for n, v in (("--text", run.text), ("--dataset", run.dataset), ("--input-ids", run.input_ids)) if v]
    if len(given) > 1 or (given and base is not None):
        names = given + (["--kl-divergence-base"] if base is not None else [])
        raise RecompileError(f"{' and '.join(names)}: each brings its own tokens; give one of them")
    if base is not None:
        if run.chunks is not None and run.chunks > base.chunks:
            raise MismatchError(f"{base.path} holds {base.chunks} chunks, --llama-chunks asks for {run.chunks}")
        return np.asarray(base.tokens[: run.chunks]), str(base.path)
    if run.input_ids is not None:
        rows = tokens.rows_from_file(run.input_ids)
        return rows.ids[: run.chunks].numpy().astype(np.int32), rows.source
    assert run.reference is not None
    if run.text is not None:
        name = str(run.text)
        try:
            text = run.text.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecompileError(f"{run.text}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
        chunks = run.chunks
    else:
        source = tokens.text_from_dataset(run.dataset) if run.dataset else tokens.default_text()
        name, chunks = source.name, run.chunks or DEFAULT_CHUNKS
        text = "".join(document.text for document in source.documents) if run.dataset else report_text(source)
    return tokenize_with_engine(installed, run.reference, text, run.n_ctx, chunks, threads=run.threads), name


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
        lines.append(
            "The engine rounds activations to 8 bits before it multiplies them with quantized weights and keeps its "
            "cache in f16;\ntorch does neither. KLs that differ by no more than that say nothing about the weights."
        )
    return "\n".join(lines)


def _figures(f: KlFigures) -> str:
    q = f.quantiles
    return f"{f.kl}; median {q.median:.6f}, p90 {q.p90:.6f}, p99 {q.p99:.6f}, max {q.max:.6f}"
