"""Two GGUF files in a real engine -> how far the candidate is from the reference, as the engine's own tool counts it.

Both files are loaded, each in a process of its own, and go through the text chunk by chunk; of their logits only one
block of positions is held. Chunks, positions and statistics are those of `llama-perplexity --kl-divergence`. Beside
them stand our own figures: KL from unclipped float32 logits, with chunks as the unit of its standard error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.diff import versions
from eval.engines.base_logits import CLIP_NATS, BaseLogits, BaseLogitsWriter, counted, decode, encode
from eval.engines.builds import Installed
from eval.engines.figures import Collected, KlFigures
from eval.engines.llama_kl import FEWEST_TOKENS, Tally, ToolStatistics
from eval.engines.ours import OwnRun, OwnRuns
from eval.engines.process import Engine, EngineModel
from eval.metrics import kl_divergence
from recompile.checkpoint.checkpoint import WeightSource
from recompile.errors import MismatchError, RecompileError
from recompile.formats.cache_types import CacheFormat
from recompile.model.tokens import TextSource, assign_roles


@dataclass(frozen=True)
class TorchFigures:
    """The same files and positions through our own float forward pass, where activations are never quantized.

    The engine multiplies quantized weights with activations that it rounds to 8 bits; `engine_*` is what that (and its
    f16 cache) does to one and the same file: KL(torch || engine).
    """

    kl: KlFigures  # KL(reference || candidate), both in torch
    engine_candidate: KlFigures
    engine_reference: KlFigures | None  # None where a base file stands for the reference's engine
    dtype: str


@dataclass(frozen=True)
class ChunkDone:
    """One chunk is compared; yielded while a comparison runs. `so_far` is over all chunks until now."""

    done: int
    total: int
    so_far: ToolStatistics


@dataclass(frozen=True)
class EngineReport:
    """What `model_diff --engine llama.cpp` measured. A is the candidate, B the reference."""

    engine: str
    candidate: str
    reference: str
    chunks: int
    n_ctx: int
    tokens: int  # counted positions
    bos: int | None  # put at the head of every chunk
    text: str
    tokens_sha256: str
    tool: ToolStatistics
    tool_complete: bool  # False: fewer tokens than the tool prints final statistics for
    kl: KlFigures  # from the engine's logits, neither clipped nor rounded (against a base file: its clipped ones)
    torch: TorchFigures | None
    versions: dict[str, str]
    cache: str = ""  # what the candidate keeps its keys and values in; "": the engine's default, f16

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


EngineEvent: TypeAlias = "ChunkDone | EngineReport"


def report_text(source: TextSource) -> str:
    """The documents that nothing else uses (role "report"), one of each origin in turn, with empty lines between."""
    by_origin: dict[str, list[str]] = {}
    for document, role in zip(source.documents, assign_roles(source), strict=True):
        if role == "report":
            by_origin.setdefault(document.origin, []).append(document.text)
    turns = max((len(texts) for texts in by_origin.values()), default=0)
    return "\n\n\n".join(texts[n] for n in range(turns) for texts in by_origin.values() if n < len(texts))


def cut_chunks(tokens: Iterable[int], n_ctx: int, chunks: int | None) -> NDArray[np.int32]:
    """Tokens of a text in chunks as llama-perplexity cuts them: int32 [chunks, n_ctx], the rest of the text left out.

    Raises RecompileError where the text is too short for the chunks wanted (None: as many as there are).
    """
    flat = np.fromiter(tokens, np.int32)
    there = len(flat) // n_ctx
    wanted = there if chunks is None else chunks
    if there < max(1, wanted):
        raise RecompileError(
            f"the text has {len(flat)} tokens, enough for {there} chunks of {n_ctx}; {wanted or 1} are wanted: "
            f"give a longer {{text}}, fewer {{chunks}} or a shorter {{length}}"
        )
    return flat[: wanted * n_ctx].reshape(wanted, n_ctx)


def tokenize_with_engine(
    installed: Installed, model: Path | str, text: str, n_ctx: int, chunks: int | None, *, threads: int | None = None
) -> NDArray[np.int32]:
    """Chunks of a text by the tokenizer inside a GGUF file, int32 [chunks, n_ctx]; as `cut_chunks` raises."""
    enough = text if chunks is None else text[: 16 * chunks * n_ctx]  # no tokenizer makes fewer than one token per 16
    with Engine(installed, threads=threads) as engine:
        engine.load(model, n_ctx)
        found = engine.tokenize(enough)
        if chunks is not None and len(found) < chunks * n_ctx and len(enough) < len(text):
            found = engine.tokenize(text)
    return cut_chunks(found, n_ctx, chunks)


def compare_with_engine(
    installed: Installed,
    candidate: Path | str,
    reference: Path | str | None,
    tokens: NDArray[np.int32],
    *,
    base: BaseLogits | None = None,
    save_base: Path | str | None = None,
    sources: tuple[WeightSource, WeightSource] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    text: str = "",
    threads: int | None = None,
    cache: CacheFormat | None = None,
) -> Iterator[EngineEvent]:
    """Run two GGUF files over chunks of tokens, int32 [chunks, n_ctx]; yields a ChunkDone a chunk, last the report.

    reference: the base's file; None where `base`, an opened base-logits file, takes its place
    save_base: where to write the base's logits for llama-perplexity or for another run
    sources:   candidate and reference opened as checkpoints, to run both in torch beside the engine
    cache:     what the candidate keeps its keys and values in, in the engine and in torch; the reference keeps f16
    Raises EngineError (missing, refused), MismatchError for files of different vocabularies.
    """
    chunks, n_ctx = tokens.shape
    if n_ctx < 4:
        raise RecompileError(f"chunks of {n_ctx} tokens leave nothing to count; wanted 4 or more")
    if (reference is None) == (base is None):
        raise RecompileError("one reference is needed: the base's GGUF file, or a file of its logits")
    first, last = counted(n_ctx)
    clip = CLIP_NATS[installed.engine]
    tally = Tally()
    collected = Collected(f"{candidate} against {reference or (base and base.path)}: KL")
    with ExitStack() as stack:
        engine_a = stack.enter_context(Engine(installed, threads=threads))
        model_a = engine_a.load(candidate, n_ctx, cache)
        engine_b = None
        if reference is not None:
            engine_b = stack.enter_context(Engine(installed, threads=threads))
            model_b = engine_b.load(reference, n_ctx)
            _check_vocabulary(model_a.n_vocab, model_b.n_vocab, candidate, reference)
        else:
            assert base is not None
            _check_vocabulary(model_a.n_vocab, base.n_vocab, candidate, base.path)
        _check_tokens(tokens, model_a.n_vocab, candidate)
        writer = None
        if save_base is not None:
            writer = stack.enter_context(BaseLogitsWriter(save_base, tokens, model_a.n_vocab))
        side = None
        if sources is not None:
            ids = torch.tensor([with_bos(chunk, model_a) for chunk in tokens])
            runs = [OwnRun(sources[0], dtype, cache=cache), OwnRun(sources[1], dtype)]
            side = stack.enter_context(OwnRuns(runs, ids, first, last, device))
        for number, chunk in enumerate(tokens):
            run, labels = with_bos(chunk, model_a), chunk[first + 1 : last + 1]
            blocks_b = (
                engine_b.logits(run, first, last)
                if engine_b is not None
                else _records_in_blocks(base, number, model_a.batch_tokens)
            )
            place = 0
            for block_a, block_b in _same_positions(engine_a.logits(run, first, last), blocks_b, last - first):
                if block_b.dtype == np.uint16:
                    records, logits_b = block_b, decode(block_b, model_a.n_vocab)
                else:
                    records, logits_b = encode(block_b, clip), block_b
                if writer is not None:
                    writer.append(records)
                tally.add(block_a, records, labels[place : place + len(block_a)])
                found = {"engine": kl_divergence(_tensor(logits_b), _tensor(block_a))}
                if side is not None:
                    torch_a, torch_b = (side.logits(run, number, place, place + len(block_a)) for run in (0, 1))
                    found["torch"] = kl_divergence(torch_b, torch_a)
                    found["engine a"] = kl_divergence(torch_a, _tensor(block_a))
                    found["engine b"] = kl_divergence(torch_b, _tensor(logits_b))
                for what, values in found.items():
                    collected.add(what, values)
                place += len(block_a)
            collected.end_row(number)
            yield ChunkDone(number + 1, chunks, tally.statistics())
    label_b = str(reference if reference is not None else base.path if base else "")
    yield EngineReport(
        engine=installed.label,
        candidate=str(candidate),
        reference=label_b,
        chunks=chunks,
        n_ctx=n_ctx,
        tokens=tally.tokens,
        bos=model_a.bos if model_a.add_bos else None,
        text=text,
        tokens_sha256=hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest(),
        tool=tally.statistics(),
        tool_complete=tally.tokens >= FEWEST_TOKENS,
        kl=collected.kl("engine"),
        torch=None
        if side is None
        else TorchFigures(
            kl=collected.kl("torch"),
            engine_candidate=collected.kl("engine a"),
            engine_reference=collected.kl("engine b") if reference is not None else None,
            dtype=str(side.models[0].dtype).removeprefix("torch."),
        ),
        versions=versions(),
        cache=cache.name if cache is not None else "",
    )


def with_bos(chunk: NDArray[np.int32], model: EngineModel) -> list[int]:
    """A chunk as it is run: the first token is replaced by BOS where the tokenizer adds one."""
    run = [int(token) for token in chunk]
    if model.add_bos:
        run[0] = model.bos
    return run


def _tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _records_in_blocks(base: BaseLogits | None, chunk: int, rows: int) -> Iterator[NDArray[np.uint16]]:
    assert base is not None
    records = base.records(chunk)
    for start in range(0, len(records), rows):
        yield records[start : start + rows]


def _same_positions(
    left: Iterator[NDArray[Any]], right: Iterator[NDArray[Any]], positions: int
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Pair two streams of rows whose blocks may be cut differently."""
    a: NDArray[Any] = np.empty((0, 0))
    b: NDArray[Any] = np.empty((0, 0))
    done = 0
    while done < positions:
        a = a if len(a) else next(left)
        b = b if len(b) else next(right)
        count = min(len(a), len(b))
        yield a[:count], b[:count]
        a, b, done = a[count:], b[count:], done + count
    for stream in (left, right):
        assert next(stream, None) is None  # the end of an engine's answer is read, too


def _check_vocabulary(candidate: int, reference: int, a: Path | str, b: Path | str) -> None:
    if candidate != reference:
        raise MismatchError(f"{a} has {candidate} tokens, {b} has {reference}; they are not builds of one model")


def _check_tokens(tokens: NDArray[np.int32], n_vocab: int, path: Path | str) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= n_vocab:
        raise MismatchError(f"{path}: token ids run from {low} to {high}, its vocabulary from 0 to {n_vocab - 1}")
