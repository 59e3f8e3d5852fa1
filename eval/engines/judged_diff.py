"""Two directories in a real engine -> how far the candidate is from the reference there, and by our own forward pass.

Nothing here is of one engine: `judge.JUDGES` has them. Both models are loaded, each in a process of its own, and rows
go through them side by side. The engine computes in its own dtype, and rounds inputs where the candidate's schemes say
so; our own pass is made without either and with both, so that it is seen what of a difference they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from eval.diff import versions
from eval.engines.figures import Collected, KlFigures
from eval.engines.judge import Judge, JudgedModel
from eval.engines.ours import OwnRun, OwnRuns
from eval.engines.scores import Scores, kl_of
from eval.metrics import Mean
from recompile.errors import MismatchError
from recompile.merge.overlay import Overlay
from recompile.model.activations import quantizes_inputs


@dataclass(frozen=True)
class SameFile:
    """One file by our own forward pass against the same file in the engine."""

    kl: KlFigures  # KL(ours || engine)
    log_prob: Mean  # mean absolute difference of the next token's log-probability


@dataclass(frozen=True)
class OwnFigures:
    """One way of our own forward pass."""

    dtype: str
    quantized_inputs: bool  # of the candidate, as its schemes say
    kl: KlFigures  # KL(reference || candidate), over the same tokens as the engine's
    whole_kl: KlFigures  # the same over all tokens
    nll_candidate: Mean  # nats per token
    nll_reference: Mean
    candidate: SameFile
    reference: SameFile
    moved: Mean | None  # mean absolute difference of A's next-token log-probability to the way before it

    @property
    def what(self) -> str:
        return f"ours, {self.dtype}, {'quantized inputs' if self.quantized_inputs else 'weights alone'}"


@dataclass(frozen=True)
class JudgedReport:
    """What `model_diff --engine vllm|transformers|mlx` measured. A is the candidate, B the reference."""

    engine: str
    version: str
    dtype: str
    candidate: str
    reference: str
    rows: int
    row_tokens: int
    tokens: int  # predictions of a next token
    text: str
    tokens_sha256: str
    vocab: int
    listed: int  # most probable tokens that the engine tells; `vocab` where it tells all
    known: Mean  # share of B's listed tokens that A lists as well: each a class of its own in KLs
    outside: Mean  # B's probability of all other tokens, which are one class
    kl: KlFigures  # the engine's KL(reference || candidate)
    nll_candidate: Mean  # the engine's, nats per token
    nll_reference: Mean
    ours: tuple[OwnFigures, ...]  # weights alone, then with what the engine adds, one thing at a time
    notes: tuple[str, ...] = ()  # what the engine says of how it computes
    versions: dict[str, str] = field(default_factory=versions)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RowJudged:
    """One row is compared; yielded while a comparison runs."""

    done: int
    total: int


JudgedEvent: TypeAlias = "RowJudged | JudgedReport"


@dataclass(frozen=True)
class JudgeOptions:
    """How two directories are compared in an engine.

    top_k: of engines that list tokens, 0: all; dtype: of the engine, None: its own default; python: that has the
    engine, in place of its environment's; with_torch: by our own pass as well, on `device`; vocab: the true one where
    the model pads it; text: where the rows are from, for the report
    """

    top_k: int
    dtype: str | None = None
    python: Path | None = None
    threads: int | None = None
    with_torch: bool = True
    device: str = "cpu"
    vocab: int | None = None
    text: str = ""


def compare_in_engine(
    judge: Judge, candidate: Overlay, reference: Overlay, ids: Tensor, asked: JudgeOptions
) -> Iterator[JudgedEvent]:
    """Run two directories over token rows, int64 [rows, tokens]; yields a RowJudged a row, last the report.

    Raises EngineError (missing, refused), MismatchError for models of different vocabularies.
    """
    dtype, vocab = asked.dtype or judge.dtype, asked.vocab
    how: dict[str, Any] = {"dtype": dtype, "tokens": ids.shape[1], "top_k": asked.top_k}
    how |= {"python": asked.python, "threads": asked.threads}
    ways = _ways(candidate, getattr(torch, dtype)) if asked.with_torch else []
    collected = Collected(f"{candidate.label} against {reference.label}")
    with ExitStack() as stack:
        a = stack.enter_context(JudgedModel(judge, candidate.base.path, **how))
        b = stack.enter_context(JudgedModel(judge, reference.base.path, **how))
        if a.vocab != b.vocab:
            raise MismatchError(f"{a.path} has {a.vocab} tokens in {judge.name}, {b.path} has {b.vocab}")
        vocab = a.vocab if judge.lists or vocab is None else min(vocab, a.vocab)
        own = None
        if ways:
            runs = [OwnRun(*_of_side(side, way)) for way in ways for side in (candidate, reference)]
            own = stack.enter_context(OwnRuns(runs, ids, 0, ids.shape[1] - 1, asked.device))
        for row, tokens in enumerate(ids):
            place = 0
            for block_a, block_b in zip(a.score(tokens, vocab), b.score(tokens, vocab), strict=True):
                stop = place + len(block_a.labels)
                mine = _own_blocks(own, row, place, stop, tokens[place + 1 : stop + 1], vocab, len(ways))
                _collect(collected, block_a, block_b, mine)
                place = stop
            collected.end_row(row)
            yield RowJudged(row + 1, len(ids))
    yield JudgedReport(
        engine=judge.name,
        version=a.version,
        dtype=dtype,
        candidate=str(candidate.label),
        reference=str(reference.label),
        rows=len(ids),
        row_tokens=ids.shape[1],
        tokens=len(ids) * (ids.shape[1] - 1),
        text=asked.text,
        tokens_sha256=hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest(),
        vocab=vocab,
        listed=a.top_k if judge.lists else vocab,
        known=collected.mean("known"),
        outside=collected.mean("outside"),
        kl=collected.kl("engine"),
        nll_candidate=collected.mean("engine nll a"),
        nll_reference=collected.mean("engine nll b"),
        ours=tuple(_own_figures(collected, number, way) for number, way in enumerate(ways)),
        notes=a.notes,
    )


# ---- our own ways ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Way:
    dtype: torch.dtype
    quantized_inputs: bool


def _ways(candidate: Overlay, dtype: torch.dtype) -> list[_Way]:
    """Weights alone in float32; with what the engine adds: quantized inputs, its dtype, both."""
    plain = _Way(torch.float32, False)
    inputs = quantizes_inputs(candidate)
    return list(dict.fromkeys([plain, _Way(torch.float32, inputs), _Way(dtype, inputs)]))


def _of_side(side: Overlay, way: _Way) -> tuple[Overlay, torch.dtype, bool]:
    return side, way.dtype, way.quantized_inputs and quantizes_inputs(side)


def _own_blocks(
    own: OwnRuns | None, row: int, start: int, stop: int, labels: Tensor, vocab: int, ways: int
) -> list[tuple[Scores, Scores]]:
    """Candidate's and reference's scores of every way."""
    if own is None:
        return []
    found = [Scores.of_logits(own.logits(run, row, start, stop)[:, :vocab], labels) for run in range(2 * ways)]
    return list(zip(found[::2], found[1::2], strict=True))


def _collect(collected: Collected, a: Scores, b: Scores, ours: Sequence[tuple[Scores, Scores]]) -> None:
    found = kl_of(b, a)
    collected.add("engine", found.nats)
    collected.add("known", found.known)
    collected.add("outside", found.outside)
    collected.add("engine nll a", -a.labels)
    collected.add("engine nll b", -b.labels)
    for number, (own_a, own_b) in enumerate(ours):
        collected.add(f"{number} kl", kl_of(own_b, own_a, b, a).nats)
        collected.add(f"{number} whole", kl_of(own_b, own_a).nats)
        collected.add(f"{number} moved", (own_a.labels - ours[max(number - 1, 0)][0].labels).abs())
        for side, mine, theirs in (("a", own_a, a), ("b", own_b, b)):
            collected.add(f"{number} nll {side}", -mine.labels)
            collected.add(f"{number} same {side}", kl_of(mine, theirs).nats)
            collected.add(f"{number} labels {side}", (mine.labels - theirs.labels).abs())


def _own_figures(collected: Collected, number: int, way: _Way) -> OwnFigures:
    def same(side: str) -> SameFile:
        return SameFile(collected.kl(f"{number} same {side}"), collected.mean(f"{number} labels {side}"))

    return OwnFigures(
        dtype=str(way.dtype).removeprefix("torch."),
        quantized_inputs=way.quantized_inputs,
        kl=collected.kl(f"{number} kl"),
        whole_kl=collected.kl(f"{number} whole"),
        nll_candidate=collected.mean(f"{number} nll a"),
        nll_reference=collected.mean(f"{number} nll b"),
        candidate=same("a"),
        reference=same("b"),
        moved=collected.mean(f"{number} moved") if number else None,
    )
