"""A finished build and its base -> the same codes, format and size with less KL: scales, norms and biases are tuned.

Adam on logarithms of scales (and on norms and biases in units of their size) against KL(base || build), on rows of the
calibration role. Both models are streamed: the base runs once over a block of steps and leaves its last hidden states;
the build runs layer by layer, keeping what enters every layer, and backward layer by layer with each layer run again,
or, where the decoded weights and activations fit (`keeps_graph`), on the graph of the first run. Weights are decoded
from what would be stored, so what is measured is what is written.

Rows do not overlap: `train` moves the numbers, `choose` says which step was best and when to stop, `accept` whether
the healed build is kept at all (better by a paired test, one-sided at 95 %), `report` what is claimed, and `second`,
text of another kind, that it is not only this text.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.heal_kl import LOGIT_CHUNK_TOKENS, OtherHead, row_kls
from eval.heal_output import check_name, read_healed, write_healed
from eval.heal_places import Place, holder_of, moved_by_text, places_outside, whole_of
from eval.heal_rows import HealRows, heal_rows
from recompile.checkpoint.checkpoint import Checkpoint, WeightSource, open_checkpoint
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.safetensors_files import open_tensors
from recompile.errors import (
    CheckpointError,
    JournalError,
    NotBetterError,
    NoTimeError,
    OutputError,
    RecompileError,
)
from recompile.events import Note, OnEvent, Progress, ignore
from recompile.io.checksums import run_of
from recompile.io.files import beside, check_is_no_input, check_partial, parse_json, remove_empty, settle, unmarked
from recompile.io.journal import LineJournal
from recompile.io.memory import available_bytes, format_mib, keep_heap_small, process_bytes
from recompile.io.schema import read_as
from recompile.io.tensors import save_tensors
from recompile.merge.check_same_weights import check_made_of
from recompile.model.counted import pick, spread
from recompile.model.rows import RowOptions
from recompile.model.stream import LayeredModel, LinearWeights, check_same_skeleton, sketch_dtype
from recompile.quantize.movable import Movable, MovedBuild, find_movables

WORK_SUFFIX = ".healing"  # where an unfinished run keeps its journal and its last state
JOURNAL = "journal.jsonl"
STATE_KEY = "recompile_heal"  # of the state's metadata
BLOCK_STEPS = 16  # steps whose rows the base runs over at a time
# Runs over the rows of a role: base and build before the first step; base, build and healed build for three roles.
RUNS_BEFORE, RUNS_OF_VERDICT = 2, 9
BETAS, EPSILON = (
    (0.9, 0.99),
    1e-12,
)  # gradients of single scales are 1e-7 and less; few hundred steps: a second moment of a thousand would never settle
WARM_SHARE, FINAL_SHARE = 0.05, 0.05  # of the steps, of the learning rate
CONFIDENCE = 1.645  # standard errors; one-sided 95 %
# Log steps of Adam by stored bits a weight: coarse codes leave more for scales to make good. 2e-3 at 3 bits and 1e-3
# at 4 were measured, the others were not.
LEARNING_RATES = ((2.6, 4e-3), (3.6, 2e-3), (4.8, 1e-3), (99.0, 5e-4))


@dataclass(frozen=True)
class HealOptions:
    """How long and how fast a build is healed."""

    tokens: int = 150_000
    minutes: float | None = None  # in all, judging too: steps for `tokens` end early, and the rate falls in time
    learning_rate: float | None = None  # None: by the build's bits
    batch_tokens: int = 1024
    check_every: int = 15  # steps between two looks at the choosing rows
    patience: int = 4  # looks without a new best one before it stops
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None  # None: steps in bfloat16 where that is fast, judging in the device's default
    vocab: int | None = None  # true vocabulary where the model pads it
    max_memory_bytes: int | None = None


@dataclass(frozen=True)
class HealStarted:
    """What a healing run is about to do."""

    steps: int
    moving: int  # numbers that move
    learning_rate: float
    keeps_graph: bool
    resumed: int  # steps found from an earlier run


@dataclass(frozen=True)
class HealStep:
    """A step is done. loss: KL on its training rows before it moved anything, nats a token; seconds: of all steps.

    limit: the seconds of steps that the minutes asked for leave; None without minutes
    """

    step: int
    steps: int
    loss: float
    seconds: float
    limit: float | None = None


@dataclass(frozen=True)
class HealJudging:
    """The rows of so many roles are measured, before and after, for the verdict."""

    done: int
    total: int
    role: str  # the next one


@dataclass(frozen=True)
class Paired:
    """Two builds on the same rows: KL(base || build), nats a token; the unit of the doubt is the row."""

    before: float
    after: float
    gain: float  # after - before; negative is better
    std_error: float
    rows: int

    @staticmethod
    def of(before: Sequence[float], after: Sequence[float]) -> Paired:
        old, new = torch.tensor(before, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
        change = new - old
        error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else math.inf
        return Paired(float(old.mean()), float(new.mean()), float(change.mean()), error, len(change))

    @property
    def is_better(self) -> bool:
        return self.gain + CONFIDENCE * self.std_error < 0

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before > 0 else 1.0


@dataclass(frozen=True)
class HealChecked:
    """A look at the choosing rows; `best` says whether it is the best so far."""

    step: int
    steps: int
    choosing: Paired
    best: bool


@dataclass(frozen=True)
class HealReport:
    """kept: whether the output was written. accept: the verdict's rows; report, second: the claim's."""

    build: str
    base: str
    out: str
    kept: bool
    steps: int
    best_step: int
    tokens: int
    seconds: float
    learning_rate: float
    moved_tensors: int
    accept: Paired
    report: Paired
    second: Paired
    rows_source: str
    second_source: str
    dtype: str  # that it was judged in
    rows_sha256: str
    kl_rows: Mapping[str, tuple[float, ...]]  # "report" and "second" of the healed build, row means
    positions: str = "all"  # of a trace: "response" where only predictions of what the model wrote are counted
    train_dtype: str = ""  # that the steps were run in

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Done:
    """How far a run had come when its state was written; seconds: of all steps."""

    step: int
    best_step: int
    best_kl: float
    looks_since: int
    seconds: float


def heal_build(
    build: Path, base: Path, out: Path, where: RowOptions, options: HealOptions, on_event: OnEvent = ignore
) -> HealReport:
    """`heal` for directories. Tells `on_event` a Progress and the events of `heal`; raises NotBetterError where healing
    did not lower the KL of the accept rows with confidence, so that nothing was written."""
    from recompile.merge.overlay import check_same_model

    check_is_no_input(out, [build, base])
    candidate, reference = open_checkpoint(build), open_checkpoint(base)
    check_same_model(reference, candidate)
    rows, vocab = heal_rows(reference, candidate, where, options.tokens)
    gain = ""
    for event in heal(candidate, reference, out, rows, replace(options, vocab=vocab)):
        on_event(event)
        if isinstance(event, HealStarted):
            on_event(Progress("healing", event.resumed, event.steps, "steps", f"{event.moving} numbers move"))
        elif isinstance(event, HealStep):
            on_event(_progress(event, f"KL {event.loss:.4f} in training{gain}"))
        elif isinstance(event, HealJudging):
            on_event(Progress("judging", event.done, event.total, "roles", f"{event.role} rows, before and after"))
        elif isinstance(event, HealChecked):
            pair = event.choosing
            gain = f", {pair.after:.4f} held out ({pair.gain:+.4f} ± {pair.std_error:.4f})"
        elif isinstance(event, HealReport):
            if event.kept:
                return event
            raise NotBetterError(
                f"{build}: healing did not lower the KL of the accept rows with confidence "
                f"({event.accept.gain:+.5f} ± {event.accept.std_error:.5f} nats); nothing was written"
            )
    raise AssertionError("heal ends with its report")


def _progress(step: HealStep, text: str) -> Progress:
    """By steps, or by the clock where that may end them."""
    if step.limit is None or step.step >= step.steps:
        return Progress("healing", step.step, step.steps, "steps", text)
    limit = max(1, math.ceil(step.limit))
    return Progress("healing", min(limit, round(step.seconds)), limit, "seconds", f"step {step.step}, {text}")


def heal(
    build: Checkpoint, base: Checkpoint, out: Path, rows: HealRows, options: HealOptions | None = None
) -> Iterator[HealStarted | HealStep | HealChecked | HealJudging | Note | HealReport]:
    """Tune what may move in `build` against `base`; yields HealStarted, a HealStep a step, a HealChecked a look, a
    HealJudging a role, and last the HealReport. Writes `out` only if that is better on the accept rows.

    A run that was killed goes on from its last look when it is started again with the same arguments; one that was
    killed after its output was whole is at its end, and a Note says so. Raises
    UnsupportedError for formats that do not heal, OutputError where `out` cannot be written or belongs to another run,
    RecompileError for rows or a memory cap that are too small.
    """
    yield from Healing(build, base, out, rows, options or HealOptions()).run()


@dataclass
class _Adam:
    """Moments of every movable, by tensor."""

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    count: int = 0

    @staticmethod
    def of(movables: Mapping[str, Movable]) -> _Adam:
        first, second = ({name: torch.zeros_like(m.start) for name, m in movables.items()} for _ in range(2))
        return _Adam(first, second)

    def step(self, movables: Mapping[str, Movable], gradients: Mapping[str, Tensor], rate: float) -> None:
        self.count += 1
        one, two = BETAS
        for name, gradient in gradients.items():
            first = self.first[name].mul_(one).add_(gradient, alpha=1 - one)
            second = self.second[name].mul_(two).addcmul_(gradient, gradient, value=1 - two)
            root = (second / (1 - two**self.count)).sqrt_().add_(EPSILON)
            movables[name].delta.addcdiv_(first, root, value=-rate / (1 - one**self.count))


class Healing:
    """A run of `heal`, which has the arguments: what moves, its moments, and how far it is. `run` does all of it."""

    def __init__(self, build: Checkpoint, base: Checkpoint, out: Path, rows: HealRows, options: HealOptions) -> None:
        self.build, self.base, self.out, self.rows, self.options = build, base, out, rows, options
        self.began, self.limit = time.monotonic(), math.inf  # seconds that steps may take
        for name in ("choose", "accept", "report", "second"):
            if len(getattr(rows, name)) < 2:
                raise RecompileError(f"{name} rows: found {len(getattr(rows, name))}, wanted at least 2")
        if not len(rows.train):
            raise RecompileError("train rows: found none; give more text")
        if options.max_memory_bytes is not None:
            keep_heap_small()  # before there is much to keep
        self.model = LayeredModel.of(build, dtype=options.dtype, device=options.device)
        self.teacher = LayeredModel.of(base, dtype=self.model.dtype, device=options.device)
        check_same_skeleton(self.teacher, self.model)
        check_made_of(build, base, {name for name in base.modules if self.model.is_turned(name)})
        fast = options.dtype or sketch_dtype(options.device)
        self.trained, self.trainer = self.model, self.teacher  # the two that steps run
        if fast != self.model.dtype:
            self.trained = LayeredModel.of(build, dtype=fast, device=options.device)
            self.trainer = LayeredModel.of(base, dtype=fast, device=options.device)
        for model in (self.model, self.teacher, self.trained, self.trainer):
            model.model.set_experts_implementation("eager")  # as LinearWeights tells experts apart
        self.movables = moved_by_text(self.trained, find_movables(build, self.model.device))
        self.outside = places_outside(self.trained, self.movables)
        self.source = MovedBuild(build, self.movables)
        self.batch_rows = max(1, min(len(rows.train), options.batch_tokens // rows.train.shape[1]))
        self.steps = max(1, math.ceil(options.tokens / (self.batch_rows * rows.train.shape[1])))
        self.rate = options.learning_rate or default_rate(build)
        self.adam = _Adam.of(self.movables)
        self.work = beside(out, WORK_SUFFIX)
        self.best: dict[str, Tensor] = {name: m.delta.clone() for name, m in self.movables.items()}
        self.best_step, self.best_kl, self.looks_since, self.done = 0, math.inf, 0, 0
        self.spent = 0.0  # seconds of steps, earlier runs included
        self.keeps_graph = self._plan()

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _plan(self) -> bool:
        """Whether a step keeps its decoded weights and graph. Raises RecompileError where not even one layer fits."""
        model, size = self.model, max(4, self.model.dtype.itemsize)
        tokens = self.batch_rows * self.rows.train.shape[1]
        layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
        outputs = max(sum(p.shape[0] for p in layer.parameters() if p.dim() == 2) for layer in model.layers)
        heads = int(getattr(model.model.config, "num_attention_heads", 1))
        graph = tokens * (8 * model.hidden_size + 4 * outputs + 3 * heads * self.rows.train.shape[1]) * size
        moving = 5 * 4 * sum(m.start.numel() for m in self.movables.values())
        head = 3 * model.vocab_size * model.hidden_size * size + 6 * LOGIT_CHUNK_TOKENS * model.vocab_size * 4
        states = (len(layers) + 2) * tokens * model.hidden_size * size
        block = BLOCK_STEPS * tokens * model.hidden_size * size
        cap = self.options.max_memory_bytes
        fixed = process_bytes(cap) + moving + head + states + block
        least = fixed + 3 * max(layers) * size + graph
        if cap is not None and least > cap:
            raise RecompileError(
                f"{{max_memory}} {format_mib(cap)} is too little: healing needs {format_mib(least)} for one layer, the "
                f"head and what moves; use shorter rows or a smaller {{batch_tokens}}"
            )
        whole = fixed + 2 * sum(layers) * size + len(layers) * graph
        return whole <= (cap if cap is not None else available_bytes(str(model.device)) // 2)

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run(self) -> Iterator[HealStarted | HealStep | HealChecked | HealJudging | Note | HealReport]:
        whole = self._whole_already()
        if whole is not None:
            yield Note(f"{self.out}: the run before this had written it when it was stopped; {self.work} is removed")
            yield whole
            return
        check_name(self.build, self.out)
        with self._journal() as journal:
            self._take_up(journal)
            resumed = self.done
            moving = sum(m.start.numel() for m in self.movables.values())
            yield HealStarted(self.steps, moving, self.rate, self.keeps_graph, resumed)
            before, minutes = self._before(), self.options.minutes
            if self.best_kl == math.inf:
                self.best_kl = sum(before["choose"]) / len(before["choose"])
            began = before_step = time.monotonic()
            earlier, longest = self.spent, 0.0  # a step that the base's states are made for takes longest
            stop = self.done >= self.steps or self.looks_since >= self.options.patience
            for ids, wanted, counted in self._batches() if not stop else ():
                loss = self.step(ids, wanted, counted)
                self.done += 1
                now = time.monotonic()
                self.spent, longest, before_step = earlier + now - began, max(longest, now - before_step), now
                yield HealStep(self.done, self.steps, loss, self.spent, self.limit if minutes is not None else None)
                late = self.spent + longest > self.limit
                if self.done % self.options.check_every and self.done != self.steps and not late:
                    continue
                kl = self.row_kls("choose", self.choose_states)
                found = Paired.of(before["choose"], kl)
                is_best = found.after < self.best_kl
                if is_best:
                    self.best_kl, self.best_step, self.looks_since = found.after, self.done, 0
                    self.best = {name: m.delta.clone() for name, m in self.movables.items()}
                else:
                    self.looks_since += 1
                self._save()
                journal.append({"step": self.done, "loss": loss, "choosing": asdict(found), "best": is_best})
                yield HealChecked(self.done, self.steps, found, is_best)
                before_step = time.monotonic()
                if late or self.looks_since >= self.options.patience:
                    break
            for name, movable in self.movables.items():
                movable.delta = self.best[name]
            report = yield from self._verdict(before)
            self._remove_work(journal)
        yield report

    def _whole_already(self) -> HealReport | None:
        """The report of a run with the same arguments that was killed between giving its output its name and removing
        its work folder, which is removed; None where there was no such run."""
        if not self.out.exists():
            return None
        if not (self.work / JOURNAL).is_file():
            remove_empty(self.work)  # killed at the very end
            return None
        with self._journal() as journal:
            about = read_healed(self.out)
            if about is None or journal.values()[:1] != [self._settings()]:
                return None
            about.pop("rows", None)
            if self.out.is_dir():
                settle(self.out)
            report = read_as(HealReport, {**about, "seconds": 0.0}, f"{self.out}: its report", error=CheckpointError)
            self._remove_work(journal)
        return report

    def _remove_work(self, journal: LineJournal) -> None:
        """The journal, by which it is held, goes last."""
        for path in self.work.glob("state*"):
            path.unlink()
        with unmarked(self.work):
            journal.path.unlink()
            self.work.rmdir()

    def _rate_now(self) -> float:
        """Up to the full rate, then down a cosine; by the clock where that ends first."""
        share = self.done / self.steps
        if self.options.minutes is not None:
            share = max(share, min(1.0, self.spent / self.limit))
        warm = min(1.0, (self.done + 1) / max(1.0, WARM_SHARE * self.steps))
        return self.rate * warm * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * share)))

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Training rows of the steps still to do, the base's last hidden states of them, and what counts of them. Rows
        come in an order of their own in every round through them."""
        count, counted = len(self.rows.train), self.rows.counted.get("train")

        @lru_cache(maxsize=2)
        def order(round_: int) -> list[int]:
            generator = torch.Generator().manual_seed(self.options.seed + round_ * count)
            found: list[int] = torch.randperm(count, generator=generator).tolist()
            return found

        for first in range(self.done, self.steps, BLOCK_STEPS):
            last = min(self.steps, first + BLOCK_STEPS)
            places = range(first * self.batch_rows, last * self.batch_rows)
            numbers = [order(place // count)[place % count] for place in places]
            chosen = self.rows.train[numbers]
            states = self.teacher_states(chosen, self.trainer).split(self.batch_rows)
            marks = [None] * len(states) if counted is None else counted[numbers].split(self.batch_rows)
            yield from zip(chosen.split(self.batch_rows), states, marks, strict=True)

    @torch.no_grad()
    def teacher_states(self, ids: Tensor, teacher: LayeredModel | None = None) -> Tensor:
        """The base's post-norm states, [rows, tokens, hidden]; ids: int64 [rows, tokens]; teacher: that for steps, in
        place of that for judging."""
        return (teacher or self.teacher).normed(ids, self.batch_rows, self.base)

    def _before(self) -> dict[str, list[float]]:
        """KL of the build as it is, on the choosing rows, of which the base's states are kept. The time of it says what
        judging takes and what the minutes leave for steps. Raises NoTimeError where that is nothing."""
        started = time.monotonic()
        kept = {name: m.delta for name, m in self.movables.items()}
        for movable in self.movables.values():
            movable.delta = torch.zeros_like(movable.delta)
        found = {}
        self.choose_states = self.teacher_states(self.rows.choose)
        found["choose"] = self.row_kls("choose", self.choose_states)
        for name, movable in self.movables.items():
            movable.delta = kept[name]
        if self.options.minutes is not None:
            now = time.monotonic()
            judging = (RUNS_OF_VERDICT + 1) / RUNS_BEFORE * (now - started)  # and the last look
            self.limit = 60 * self.options.minutes - (now - self.began) - judging
            if self.limit <= 0:
                least = (60 * self.options.minutes - self.limit) / 60
                raise NoTimeError(
                    f"{{minutes}} {self.options.minutes:g} are too few: judging alone takes about {least:.2g} minutes "
                    f"on this machine; give more, or use fewer {{rows}} (now {len(self.rows.choose)} a role)"
                )
        return found

    def row_kls(self, name: str, teacher: Tensor, source: WeightSource | None = None) -> list[float]:
        """KL(base || what is being healed, or another source) of every row of a name, nats a token.

        teacher: the base's post-norm states of these rows, [rows, tokens, hidden]
        """
        return row_kls(
            self.model,
            source or self.source,
            self.teacher,
            self.base,
            getattr(self.rows, name),
            teacher,
            self.options.vocab,
            self.batch_rows,
            self.rows.counted.get(name),
        )

    def _verdict(self, before: Mapping[str, list[float]]) -> Generator[HealJudging, None, HealReport]:
        pairs: dict[str, Paired] = {}
        rows: dict[str, tuple[float, ...]] = {}
        untouched = MovedBuild(self.build, {})
        judges = ("accept", "report", "second")
        for number, name in enumerate(judges):
            yield HealJudging(number, len(judges), name)
            teacher = self.teacher_states(getattr(self.rows, name))
            old, new = self.row_kls(name, teacher, untouched), self.row_kls(name, teacher)
            pairs[name] = Paired.of(old, new)
            rows[name] = tuple(new)
        kept = self.best_step > 0 and pairs["accept"].is_better
        report = HealReport(
            build=self.build.label,
            base=self.base.label,
            out=str(self.out),
            kept=kept,
            steps=self.done,
            best_step=self.best_step,
            tokens=self.done * self.batch_rows * self.rows.train.shape[1],
            seconds=round(self.spent, 1),
            learning_rate=self.rate,
            moved_tensors=len(self.movables),
            accept=pairs["accept"],
            report=pairs["report"],
            second=pairs["second"],
            rows_source=self.rows.source,
            second_source=self.rows.second_source,
            dtype=str(self.model.dtype),
            train_dtype=str(self.trained.dtype),
            rows_sha256=self.rows.sha256(),
            kl_rows={name: rows[name] for name in ("report", "second")},
            positions=self.rows.positions,
        )
        if kept:
            about = {**report.as_dict(), "rows": [asdict(used) for used in self.rows.used]}
            del about["seconds"]  # told, but not written: two runs end with the same files
            write_healed(self.build, self.movables, self.out, about)
        return report

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, ids: Tensor, teacher: Tensor, counted: Tensor | None = None) -> float:
        """Move everything once; returns the KL before, nats a token.

        ids: int64 [rows, tokens]; teacher: the base's post-norm states of them, [rows, tokens, hidden]
        counted: bool [rows, tokens], what the KL is of; None: all
        """
        model, source = self.trained, self.source
        gradients: dict[str, Tensor] = {}
        graphs: list[tuple[Tensor, Tensor, dict[str, Tensor], list[Place]]] = []
        entered, before = self._embed(ids)
        hidden = entered.detach()
        inputs: list[Tensor] = []
        for index in range(model.depth):
            inputs.append(hidden)
            with model.layer(index, source):
                if self.keeps_graph:
                    graphs.append(self._run_layer(index, hidden))
                    hidden = graphs[-1][1].detach()
                else:
                    with torch.no_grad():
                        hidden = model.run_layer(index, hidden)
        loss, cotangent = self._head(hidden, teacher, gradients, counted)
        for index in reversed(range(model.depth)):
            if self.keeps_graph:
                cotangent = self._pull_back(*graphs.pop(), cotangent, gradients)
            else:
                with model.layer(index, source):
                    cotangent = self._pull_back(*self._run_layer(index, inputs.pop()), cotangent, gradients)
        if before:
            self._pull_back(None, entered, before, self._outside(before), cotangent, gradients)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RecompileError(
                f"step {self.done + 1}: the loss ({loss:g}) or its gradient is not finite; use a smaller "
                f"{{learning_rate}} (it was {self.rate:g}), or {{dtype}} float32"
            )
        self.adam.step(self.movables, gradients, self._rate_now())
        return loss

    def _embed(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The state that enters the first layer, in a graph where something before it moves, and what that is."""
        model = self.trained
        with model.embedding_loaded(self.source) as first_state:
            model.record(ids[:1])
            moving = self._moving_of(model.structure.before)
            with torch.set_grad_enabled(bool(moving)):
                return first_state(ids, 0), moving

    def _outside(self, parameters: Collection[str]) -> list[Place]:
        return [place for place in self.outside if place.parameter in parameters]

    def _moving_of(self, names: Collection[str]) -> dict[str, Tensor]:
        """Of loaded parameters outside the layers those that move, in a graph."""
        moving = dict.fromkeys(place.parameter for place in self._outside(names))
        return {name: self.trained.model.get_parameter(name).requires_grad_(True) for name in moving}

    def _run_layer(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Place]]:
        """The loaded layer's input and output in a graph, its parameters that matter, and whose they are."""
        layer = self.trained.layers[index]
        places = self._places(index)
        parameters: dict[str, Tensor] = {place.parameter: layer.get_parameter(place.parameter) for place in places}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        leaf = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            out = self.trained.run_layer(index, leaf)
        return leaf, out, parameters, places

    def _pull_back(
        self,
        leaf: Tensor | None,
        out: Tensor,
        parameters: Mapping[str, Tensor],
        places: Sequence[Place],
        cotangent: Tensor,
        gradients: dict[str, Tensor],
    ) -> Tensor:
        """The cotangent of a layer's input, or that of its output where there is no leaf; adds what its parameters say
        to `gradients`."""
        leaves = [] if leaf is None else [leaf]
        wanted = [*leaves, *parameters.values()]
        found = torch.autograd.grad(out, wanted, cotangent.to(out.dtype), allow_unused=True)
        by_name = dict(zip(parameters, found[len(leaves) :], strict=True))
        for place in places:
            gradient = by_name[place.parameter]
            if gradient is not None:
                self._add(place, parameters[place.parameter].detach(), gradient, gradients)
        if leaf is None:
            return cotangent
        assert found[0] is not None, "a layer depends on its input"
        return found[0]

    def _add(self, place: Place, value: Tensor, gradient: Tensor, gradients: dict[str, Tensor]) -> None:
        value, gradient = place.of(value), place.of(gradient)
        for tensor in place.tensors:
            movable = self.movables[tensor]
            found = movable.gradient(None if movable.is_vector else value, gradient)
            gradients[tensor] = gradients[tensor] + found if tensor in gradients else found

    def _places(self, index: int) -> list[Place]:
        """Where the movables of a loaded layer sit in its parameters."""
        model, prefix = self.trained, f"{self.trained.prefix_of_layer(index)}."
        found = []
        of_module: dict[str, list[str]] = {}
        for tensor, movable in self.movables.items():
            if not movable.is_vector:
                of_module.setdefault(holder_of(tensor), []).append(tensor)
        for weight in LinearWeights(model, index):
            of_base = self.base.modules  # the build's shapes may be padded
            shapes = [(of_base.get(name) or self.build.modules[name]).shape for name in weight.modules]
            start, many = 0, len(weight.modules)
            for number, (module, shape) in enumerate(zip(weight.modules, shapes, strict=True)):
                rows = shape[0] if shape is not None else 0
                if module in of_module:
                    part = slice(start, start + rows) if many > 1 else None
                    if weight.alternating:
                        part = slice(number, None, many)
                    parameter = weight.parameter.removeprefix(prefix)
                    whole = None
                    if shape is not None and weight.expert is None and many == 1:
                        whole = whole_of(model, weight.parameter, shape)
                    tensors = tuple(of_module[module])
                    turned = weight.transposed and not self.movables[tensors[0]].as_the_model
                    found.append(Place(parameter, weight.expert, part, tensors, whole, turned))
                start += rows
        for name, _ in model.layers[index].named_parameters():
            origin = model.origins[f"{prefix}{name}"]
            if origin.converter is None and origin.tensors[0] in self.movables:
                movable = self.movables[origin.tensors[0]]
                if movable.is_vector:
                    found.append(Place(name, None, None, (origin.tensors[0],)))
        return found

    def _head(
        self, hidden: Tensor, teacher: Tensor, gradients: dict[str, Tensor], counted: Tensor | None
    ) -> tuple[float, Tensor]:
        """Mean KL of what counts of the batch, and the cotangent of what leaves the last layer."""
        model, source = self.trained, self.source
        with model.norm_loaded(source) as norm, model.head_loaded(source):
            norms, moving = self._moving_of(model.structure.after), self._moving_of(model.structure.head)
            leaf = hidden.detach().requires_grad_(True)
            with torch.enable_grad():
                normed = norm(leaf)
            places = None if counted is None else counted.flatten().nonzero().flatten()
            flat, wanted = (pick(states.flatten(0, 1), places) for states in (normed.detach(), teacher))
            total, pieces = 0.0, []
            with OtherHead(self.trainer, self.base) as reference:
                for start in range(0, len(flat), LOGIT_CHUNK_TOKENS):
                    part = slice(start, start + LOGIT_CHUNK_TOKENS)
                    log_p = self._cut(reference(wanted[part])).float().log_softmax(-1)
                    with torch.enable_grad():
                        piece = flat[part].clone().requires_grad_(True)
                        log_q = self._cut(model.logits(piece[None])[0]).float().log_softmax(-1)
                        loss = (log_p.exp() * (log_p - log_q)).sum() / len(flat)
                    pieces.append(
                        self._pull_back(piece, loss, moving, self._outside(moving), torch.ones_like(loss), gradients)
                    )
                    total += float(loss.detach())
            cotangent = spread(torch.cat(pieces)[None], places, normed.shape[:2].numel()).view_as(normed)
            back = self._pull_back(leaf, normed, norms, self._outside(norms), cotangent, gradients)
        return total, back

    def _cut(self, logits: Tensor) -> Tensor:
        return logits if self.options.vocab is None else logits[..., : self.options.vocab]

    # ---- going on --------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "kind": "recompile-heal",
            "build": self.build.identity,
            "base": self.base.identity,
            "rows": self.rows.sha256(),
            "tokens": self.options.tokens,
            "minutes": self.options.minutes,
            "learning_rate": self.rate,
            "batch_tokens": self.options.batch_tokens,
            "check_every": self.options.check_every,
            "patience": self.options.patience,
            "seed": self.options.seed,
            "dtype": [str(self.model.dtype), str(self.trained.dtype)],
            "moving": sum(m.start.numel() for m in self.movables.values()),
        }

    @contextmanager
    def _journal(self) -> Iterator[LineJournal]:
        check_partial(self.work, JOURNAL)
        with unmarked(self.work):
            journal = LineJournal(self.work / JOURNAL)
        try:
            with journal:
                yield journal
        finally:
            with suppress(OSError):  # unless something is in it
                self.work.rmdir()

    def _take_up(self, journal: LineJournal) -> None:
        """Go on from the last look of an earlier run with the same settings."""
        if not journal.lines:
            journal.begin(self._settings())
            return
        settings = self._settings()
        header, *_ = journal.values()
        if header != settings:
            changed = [key for key in settings if not isinstance(header, dict) or header.get(key) != settings[key]]
            raise OutputError(
                f"{self.work}: was begun with other settings ({', '.join(changed)}); remove it, or go on with those"
            )
        journal.drop_torn()
        state = self.work / "state.safetensors"
        if len(journal.lines) < 2 or not state.exists():
            return
        way_out = f"; remove {self.work} to start again"
        with open_tensors(state, error=JournalError, way_out=way_out, checks=True, run=run_of(settings)) as stored:
            text = (stored.metadata() or {}).get(STATE_KEY, "null")
            about = parse_json(text, f"{state}: {STATE_KEY}", error=JournalError)
            done = read_as(_Done, about, f"{state}: {STATE_KEY}", error=JournalError)
            for name, movable in self.movables.items():
                parts = (stored.get_tensor(f"{kind}.{name}") for kind in ("delta", "first", "second", "best"))
                found = [part.to(self.model.device) for part in parts]
                if any(part.shape != movable.start.shape or part.dtype != movable.delta.dtype for part in found):
                    raise JournalError(f"{state}: {name} has another shape or dtype than what moves{way_out}")
                if not all(bool(part.isfinite().all()) for part in found):
                    raise JournalError(f"{state}: {name} holds numbers that are not finite{way_out}")
                movable.delta, self.adam.first[name], self.adam.second[name], self.best[name] = found
        self.done = self.adam.count = done.step
        self.best_step, self.best_kl = done.best_step, done.best_kl
        self.looks_since, self.spent = done.looks_since, done.seconds

    def _save(self) -> None:
        """One file, so that its tensors and its numbers are of one moment."""
        tensors: dict[str, Tensor] = {}
        for name, movable in self.movables.items():
            tensors |= {
                f"delta.{name}": movable.delta,
                f"first.{name}": self.adam.first[name],
                f"second.{name}": self.adam.second[name],
                f"best.{name}": self.best[name],
            }
        whole = {name: value.contiguous().cpu().clone() for name, value in tensors.items()}
        done = _Done(self.done, self.best_step, self.best_kl, self.looks_since, self.spent)
        about = {STATE_KEY: json.dumps(asdict(done))}
        save_tensors(self.work / "state.safetensors", whole, about, checked=True, run=run_of(self._settings()))


def default_rate(build: Checkpoint) -> float:
    """Of the build's mean stored bits a quantized weight."""
    quantized = [m for m in build.modules.values() if m.is_quantized and role_of(m.name) == "layer"]
    bits = 8 * sum(m.size_bytes for m in quantized) / max(1, sum(m.numel for m in quantized))
    return next(rate for limit, rate in LEARNING_RATES if bits < limit or limit == LEARNING_RATES[-1][0])
