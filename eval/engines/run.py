"""Two GGUF files, or two directories, compared in a real engine: the work of `recompile.engine_diff`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.engines.base_logits import BaseLogits, open_base_logits
from eval.engines.builds import ENGINES as GGUF_ENGINES
from eval.engines.builds import Installed, find_engine
from eval.engines.engine_diff import (
    ChunkDone,
    EngineOptions,
    EngineReport,
    compare_with_engine,
    report_text,
    tokenize_with_engine,
)
from eval.engines.environments import python_of
from eval.engines.judge import JUDGES, Judge
from eval.engines.judged_diff import JudgedReport, JudgeOptions, compare_in_engine
from recompile.arguments import Worded
from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, no_table_of_names, open_checkpoint
from recompile.errors import ArgumentError, MismatchError, RecompileError
from recompile.events import Note, OnEvent, Progress, ignore
from recompile.formats.cache_types import EXLLAMA, CacheFormat, parse_cache
from recompile.merge.overlay import build_overlay, check_same_model
from recompile.model import texts, tokens
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import RowOptions, check_vocabulary

DEFAULT_N_CTX = 512
DEFAULT_CHUNKS = 8
DEFAULT_TOP_K = 1000
ENGINES = (*GGUF_ENGINES, *JUDGES)


@dataclass(frozen=True)
class EngineRun:
    """See `recompile.engine_diff` for the meaning of each."""

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
    cache_quant: str | None = None
    rows: int | None = None
    engine_top_k: int | None = None


@dataclass(frozen=True)
class EngineDiff:
    """What was measured. chunks: of GGUF files, the figures after each chunk, as llama-perplexity prints them."""

    report: EngineReport | JudgedReport
    chunks: tuple[ChunkDone, ...] = ()


def run_engine_diff(run: EngineRun, on_event: OnEvent = ignore) -> EngineDiff:
    """Compare in the engine. on_event: gets a ChunkDone a chunk of GGUF files, a RowJudged a row of directories."""
    if run.engine in JUDGES:
        return _run_judge(JUDGES[run.engine], run, on_event)
    if run.rows is not None or run.engine_top_k is not None:
        name = "{rows}" if run.rows is not None else "{engine_top_k}"
        raise ArgumentError(
            f"{name}: goes with {', '.join(JUDGES)}; {run.engine} takes {{chunks}} and tells all tokens"
        )
    installed = find_engine(run.engine, run.library)
    cache = _cache_of(run)
    base = None
    if run.base_logits is not None:
        if run.save_base_logits is not None:
            raise ArgumentError("{base_logits} reads a file that {save_base_logits} would write; give one of them")
        base = open_base_logits(run.base_logits)
    elif run.reference is None:
        raise ArgumentError("{reference} BASE.gguf is needed, or {base_logits} FILE")
    chunks, text = _chunks(run, installed, base)
    sources: Any = None
    if run.with_torch and run.reference is not None:
        candidate, reference = open_checkpoint(run.candidate), open_checkpoint(run.reference)
        check_same_model(reference, candidate)
        if "model_type" in reference.config:
            sources = (candidate, reference)
        else:
            on_event(Note(Worded(f"{run.engine} only: {', '.join(reference.notes) or _no_names(reference)}"), ""))
    report: EngineReport | None = None
    done: list[ChunkDone] = []
    what = f"chunks in {run.engine}"
    on_event(Progress(what, 0, len(chunks), "chunks"))
    for event in compare_with_engine(
        installed,
        run.candidate,
        run.reference if base is None else None,
        chunks,
        EngineOptions(
            base=base,
            save_base=run.save_base_logits,
            sources=sources,
            device=compute_device(run.device),
            dtype=compute_dtype(run.dtype),
            text=text,
            threads=run.threads,
            cache=cache,
        ),
    ):
        if isinstance(event, EngineReport):
            report = event
        else:
            done.append(event)
            on_event(event)
            on_event(Progress(what, event.done, len(chunks), "chunks"))
    assert report is not None, "compare_with_engine ends with its report"
    return EngineDiff(report, tuple(done))


def _cache_of(run: EngineRun) -> CacheFormat | None:
    if run.cache_quant is None:
        return None
    cache = parse_cache(run.cache_quant)
    if cache.engine == EXLLAMA:
        raise ArgumentError(
            f'{{cache_quant}} "{run.cache_quant}": {run.engine} stores no such cache; give its types, such as q8_0'
        )
    return replace(cache, engine=run.engine)


def _run_judge(judge: Judge, run: EngineRun, on_event: OnEvent) -> EngineDiff:
    """Two directories in vLLM, transformers or mlx-lm."""
    for given, name in (
        (run.chunks is not None, "{chunks}"),
        (run.base_logits is not None, "{base_logits}"),
        (run.save_base_logits is not None, "{save_base_logits}"),
        (run.cache_quant is not None, "{cache_quant}"),
    ):
        if given:
            raise ArgumentError(f"{name}: goes with GGUF files in {' or '.join(GGUF_ENGINES)}")
    if run.reference is None:
        raise ArgumentError(f"{{reference}} is needed: the base's directory, which {judge.name} runs as well")
    if run.engine_top_k is not None and not judge.lists:
        raise ArgumentError(f"{{engine_top_k}}: {judge.name} tells the log-probabilities of all tokens; leave it out")
    python = run.library or python_of(judge.environment)
    candidate, reference = (build_overlay(open_checkpoint(path), None) for path in (run.candidate, run.reference))
    for side in (candidate, reference):
        if isinstance(side.base, GgufCheckpoint):
            raise ArgumentError(f"{side.label}: is a GGUF file; {judge.name} runs directories")
    check_same_model(reference.base, candidate.base)
    default = DEFAULT_CHUNKS if run.input_ids is None else None
    where = RowOptions(run.rows or default, run.n_ctx, run.text, run.dataset, run.input_ids)
    rows, vocab = where.read_own([reference.base.path, candidate.base.path], "report")
    what = f"rows in {judge.name}"
    on_event(Progress(what, 0, len(rows.ids), "rows"))
    for event in compare_in_engine(
        judge,
        candidate,
        reference,
        rows.ids,
        JudgeOptions(
            python=python,
            top_k=DEFAULT_TOP_K if run.engine_top_k is None else run.engine_top_k,
            dtype=run.dtype,
            with_torch=run.with_torch,
            device=compute_device(run.device),
            vocab=check_vocabulary(reference.base, vocab),
            text=rows.source,
            threads=run.threads,
        ),
    ):
        if isinstance(event, JudgedReport):
            return EngineDiff(event)
        on_event(event)
        on_event(Progress(what, event.done, event.total, "rows"))
    raise AssertionError("compare_in_engine ends with its report")


def _no_names(reference: Checkpoint) -> str:
    return no_table_of_names(reference.config.get("gguf_architecture"))


def _chunks(run: EngineRun, installed: Installed, base: BaseLogits | None) -> tuple[NDArray[Any], str]:
    """Token chunks, and where they are from."""
    given = [n for n, v in (("{text}", run.text), ("{dataset}", run.dataset), ("{input_ids}", run.input_ids)) if v]
    if len(given) > 1 or (given and base is not None):
        names = given + (["{base_logits}"] if base is not None else [])
        raise ArgumentError(f"{' and '.join(names)}: each brings its own tokens; give one of them")
    if base is not None:
        if run.chunks is not None and run.chunks > base.chunks:
            raise MismatchError(f"{base.path} holds {base.chunks} chunks, {{chunks}} asks for {run.chunks}")
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
        source = texts.text_from_dataset(run.dataset) if run.dataset else texts.default_text()
        name, chunks = source.name, run.chunks or DEFAULT_CHUNKS
        text = "".join(document.text for document in source.documents) if run.dataset else report_text(source)
    return tokenize_with_engine(installed, run.reference, text, run.n_ctx, chunks, threads=run.threads), name
