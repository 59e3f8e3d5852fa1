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
from recompile.model.texts import TextSource, assign_roles


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


@dataclass(frozen=True)
class EngineOptions:
    """How two files are compared in an engine.

    base:      an opened base-logits file, in place of the reference
    save_base: where to write the base's logits for llama-perplexity or for another run
    sources:   candidate and reference opened as checkpoints, to run both in torch beside the engine
    text:      where the tokens are from, for the report
    cache:     what the candidate keeps its keys and values in, in the engine and in torch; the reference keeps f16
    """

    base: BaseLogits | None = None
    save_base: Path | str | None = None
    sources: tuple[WeightSource, WeightSource] | None = None
    device: str = "cpu"
    dtype: torch.dtype | None = None
    text: str = ""
    threads: int | None = None
    cache: CacheFormat | None = None


def compare_with_engine(
    installed: Installed,
    candidate: Path | str,
    reference: Path | str | None,
    tokens: NDArray[np.int32],
    asked: EngineOptions | None = None,
) -> Iterator[EngineEvent]:
    """Run two GGUF files over chunks of tokens, int32 [chunks, n_ctx]; yields a ChunkDone a chunk, last the report.

    reference: the base's file; None where `asked.base` takes its place
    Raises EngineError (missing, refused), MismatchError for files of different vocabularies.
    """
    asked = asked or EngineOptions()
    chunks, n_ctx = tokens.shape
    if n_ctx < 4:
        raise RecompileError(f"chunks of {n_ctx} tokens leave nothing to count; wanted 4 or more")
    if (reference is None) == (asked.base is None):
        raise RecompileError("one reference is needed: the base's GGUF file, or a file of its logits")
    with ExitStack() as stack:
        comparison = _Comparison(stack, installed, candidate, reference, tokens, asked)
        for number in range(chunks):
            comparison.add_chunk(number)
            yield ChunkDone(number + 1, chunks, comparison.tally.statistics())
    yield comparison.report()


class _Comparison:
    """Two files in the engine, and in torch where that was asked for; open until the stack is closed."""

    def __init__(
        self,
        stack: ExitStack,
        installed: Installed,
        candidate: Path | str,
        reference: Path | str | None,
        tokens: NDArray[np.int32],
        asked: EngineOptions,
    ) -> None:
        self.installed, self.candidate, self.tokens, self.asked = installed, candidate, tokens, asked
        self.chunks, self.n_ctx = tokens.shape
        self.first, self.last = counted(self.n_ctx)
        self.tally = Tally()
        threads, base = asked.threads, asked.base
        self.engine_a = stack.enter_context(Engine(installed, threads=threads))
        self.model_a = self.engine_a.load(candidate, self.n_ctx, asked.cache)
        self.engine_b: Engine | None = None
        if reference is not None:
            self.engine_b = stack.enter_context(Engine(installed, threads=threads))
            n_vocab, self.label_b = self.engine_b.load(reference, self.n_ctx).n_vocab, str(reference)
        else:
            assert base is not None, "one of the two is there"
            n_vocab, self.label_b = base.n_vocab, str(base.path)
        _check_vocabulary(self.model_a.n_vocab, n_vocab, candidate, self.label_b)
        _check_tokens(tokens, self.model_a.n_vocab, candidate)
        self.collected = Collected(f"{candidate} against {self.label_b}: KL")
        self.writer: BaseLogitsWriter | None = None
        if asked.save_base is not None:
            self.writer = stack.enter_context(BaseLogitsWriter(asked.save_base, tokens, self.model_a.n_vocab))
        self.side: OwnRuns | None = None
        if asked.sources is not None:
            ids = torch.tensor([with_bos(chunk, self.model_a) for chunk in tokens])
            runs = [OwnRun(asked.sources[0], asked.dtype, cache=asked.cache), OwnRun(asked.sources[1], asked.dtype)]
            self.side = stack.enter_context(OwnRuns(runs, ids, self.first, self.last, asked.device))

    def add_chunk(self, number: int) -> None:
        """Run both over one chunk, and count what they say."""
        chunk = self.tokens[number]
        labels, place = chunk[self.first + 1 : self.last + 1], 0
        logits_a = self.engine_a.logits(with_bos(chunk, self.model_a), self.first, self.last)
        for block_a, block_b in _same_positions(logits_a, self._blocks_b(number), self.last - self.first):
            self._add_block(number, place, block_a, block_b, labels)
            place += len(block_a)
        self.collected.end_row(number)

    def _blocks_b(self, number: int) -> Iterator[NDArray[Any]]:
        """The reference's logits, float32 [positions, vocab] a block, or a base file's records, uint16."""
        if self.engine_b is not None:
            return self.engine_b.logits(with_bos(self.tokens[number], self.model_a), self.first, self.last)
        assert self.asked.base is not None, "one of the two is there"
        return _records_in_blocks(self.asked.base, number, self.model_a.batch_tokens)

    def _add_block(
        self, number: int, place: int, block_a: NDArray[Any], block_b: NDArray[Any], labels: NDArray[np.int32]
    ) -> None:
        """One block of positions of a chunk; place: of its first one; labels: of the whole chunk."""
        if block_b.dtype == np.uint16:
            records, logits_b = block_b, decode(block_b, self.model_a.n_vocab)
        else:
            records, logits_b = encode(block_b, CLIP_NATS[self.installed.engine]), block_b
        if self.writer is not None:
            self.writer.append(records)
        stop = place + len(block_a)
        self.tally.add(block_a, records, labels[place:stop])
        found = {"engine": kl_divergence(_tensor(logits_b), _tensor(block_a))}
        if self.side is not None:
            torch_a, torch_b = (self.side.logits(run, number, place, stop) for run in (0, 1))
            found["torch"] = kl_divergence(torch_b, torch_a)
            found["engine a"] = kl_divergence(torch_a, _tensor(block_a))
            found["engine b"] = kl_divergence(torch_b, _tensor(logits_b))
        for what, values in found.items():
            self.collected.add(what, values)

    def report(self) -> EngineReport:
        return EngineReport(
            engine=self.installed.label,
            candidate=str(self.candidate),
            reference=self.label_b,
            chunks=self.chunks,
            n_ctx=self.n_ctx,
            tokens=self.tally.tokens,
            bos=self.model_a.bos if self.model_a.add_bos else None,
            text=self.asked.text,
            tokens_sha256=hashlib.sha256(np.ascontiguousarray(self.tokens, "<i4").tobytes()).hexdigest(),
            tool=self.tally.statistics(),
            tool_complete=self.tally.tokens >= FEWEST_TOKENS,
            kl=self.collected.kl("engine"),
            torch=self._torch_figures(),
            versions=versions(),
            cache=self.asked.cache.name if self.asked.cache is not None else "",
        )

    def _torch_figures(self) -> TorchFigures | None:
        if self.side is None:
            return None
        return TorchFigures(
            kl=self.collected.kl("torch"),
            engine_candidate=self.collected.kl("engine a"),
            engine_reference=self.collected.kl("engine b") if self.engine_b is not None else None,
            dtype=str(self.side.models[0].dtype).removeprefix("torch."),
        )


def with_bos(chunk: NDArray[np.int32], model: EngineModel) -> list[int]:
    """A chunk as it is run: the first token is replaced by BOS where the tokenizer adds one."""
    run = [int(token) for token in chunk]
    if model.add_bos:
        run[0] = model.bos
    return run


def _tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def _records_in_blocks(base: BaseLogits, chunk: int, rows: int) -> Iterator[NDArray[np.uint16]]:
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
