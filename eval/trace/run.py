"""A reference and prompts -> a trace file: the work of `recompile.trace`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval.diff import versions
from eval.generating import WritingPlan, plan_writing, writing
from eval.trace.encode import EncodedPrompts, encode_prompts, encode_texts
from eval.trace.generate import Sampling, answer, end_tokens, plan_batches
from eval.trace.prompts import BUNDLED, Prompt, bundled_prompts, prompts_of_file, prompts_sha256
from eval.trace.server import Answer, Server
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.checkpoint.config_fields import context_of
from recompile.errors import ArgumentError, CheckpointError, JournalError, RecompileError
from recompile.events import Note, OnEvent, Progress, ignore
from recompile.io.files import read_json
from recompile.io.journal import LineJournal
from recompile.io.schema import describe, read_as
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import check_vocabulary
from recompile.model.stream import LayeredModel
from recompile.model.texts import ROLE_SHARES
from recompile.model.tokenizer import tokenizer_sha256
from recompile.model.trace import Trace, TraceAbout, make_trace, save_trace

WRITING = "the reference writes"


@dataclass(frozen=True)
class TraceRequest:
    """See `recompile.trace` for the meaning of each."""

    prompts: Path | None
    rows: int | None
    sampling: Sampling
    batch_size: int
    device: str
    dtype: str | None
    url: str | None = None  # of a server that runs the model


@dataclass(frozen=True)
class TraceKind:
    """Rows of one kind."""

    kind: str
    rows: int
    prompt_tokens: int
    response_tokens: int
    ended: int  # rows that the model ended by itself
    roles: dict[str, int]  # rows of every role


@dataclass(frozen=True)
class TraceReport:
    """What `model_trace` wrote."""

    out: str
    base: str
    rows: int
    prompt_tokens: int
    response_tokens: int
    kinds: tuple[TraceKind, ...]
    roles: dict[str, int]  # rows of every role
    left_out: int  # prompts that do not fit the model's context with a whole response
    about: TraceAbout
    sha256: str  # of the rows

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_trace(base: Path, out: Path, request: TraceRequest, on_event: OnEvent = ignore) -> TraceReport:
    """Write the file `out`; an interrupted run goes on from OUT.journal, a prompt a line, which goes once it is whole.

    Raises UnsupportedError for a tokenizer without a chat template and for a layer that does not fit in memory,
    RecompileError for prompts that cannot be read, JournalError for a journal of another trace.
    """
    if not math.isfinite(request.sampling.temperature) or request.sampling.temperature < 0:
        raise ArgumentError(f"{{temperature}} {request.sampling.temperature}: wanted 0 (greedy) or more")
    checkpoint = open_checkpoint(base)
    tokens = request.sampling.max_new_tokens
    prompts, encoded, left_out = fitting_prompts(checkpoint, request.prompts, request.rows, tokens, on_event)
    if encoded.tools_in_text:
        on_event(Note("the chat template has no place for tools; their schemas stand in the first message"))
    kind = _Job if request.url is None else ServerJob
    job = kind(checkpoint, prompts, encoded, request, on_event)
    journal_path = out.with_name(out.name + ".journal")
    with LineJournal(journal_path) as journal:
        responses = job.run(journal)
        trace = job.trace(responses)
        save_trace(trace, out)
        with suppress(OSError):  # it is only in the way
            journal_path.unlink()
    return _report(out, trace, left_out)


def fitting_prompts(
    base: Checkpoint, path: Path | None, rows: int | None, new_tokens: int, on_event: OnEvent = ignore
) -> tuple[tuple[Prompt, ...], EncodedPrompts, int]:
    """Prompts that fit the model's context with a whole response, and their tokens; how many do not and are left out.

    path: a file of them, None: the bundled ones; rows: the first so many; new_tokens: of a response at most. Raises
    UnsupportedError for a tokenizer without a chat template, RecompileError for prompts that cannot be used.
    """
    prompts = (prompts_of_file(path) if path is not None else bundled_prompts())[:rows]
    return _that_fit(base, prompts, encode_prompts(base.path, prompts), new_tokens, on_event)


def _that_fit(
    base: Checkpoint, prompts: Sequence[Prompt], encoded: EncodedPrompts, new_tokens: int, on_event: OnEvent
) -> tuple[tuple[Prompt, ...], EncodedPrompts, int]:
    """Without the prompts that leave no room for a whole response in the model's context."""
    context = context_of(base.config)
    if context is None:
        return tuple(prompts), encoded, 0
    kept = [number for number, ids in enumerate(encoded.ids) if len(ids) + new_tokens <= context]
    left_out = len(prompts) - len(kept)
    if not kept:
        raise RecompileError(
            f"{base.label}: no prompt fits its context of {context} tokens with a response of {new_tokens}; "
            f"ask for fewer {{tokens}}, or give shorter {{prompts}}"
        )
    if left_out:
        on_event(Note(f"{left_out} prompts do not fit the context of {context} tokens and are left out", "Warning"))
    found = replace(encoded, ids=tuple(encoded.ids[number] for number in kept))
    return tuple(prompts[number] for number in kept), found, left_out


class _Job:
    """Answers that are missing in a journal, batch by batch."""

    def __init__(
        self,
        base: Checkpoint,
        prompts: Sequence[Prompt],
        encoded: EncodedPrompts,
        request: TraceRequest,
        on_event: OnEvent,
    ) -> None:
        self.base, self.prompts, self.encoded, self.request, self.on_event = base, prompts, encoded, request, on_event
        size, dtype, device, writer = self._open()
        self.vocab = min(check_vocabulary(base, encoded.vocab) or size, size)
        largest = max(max(ids) for ids in encoded.ids)
        if largest >= size:
            raise RecompileError(
                f"{base.label}: the chat template gives token {largest}, the model has {size}; "
                f"take the tokenizer of the same model"
            )
        self.ends = end_tokens(base.config, _generation_config(base), encoded.end)
        sampling = request.sampling
        self.about = TraceAbout(
            kinds=tuple(prompt.kind for prompt in prompts),
            roles=tuple(prompt.role for prompt in prompts),
            prompts=tuple(prompt.sha256 for prompt in prompts),
            ended=(),
            base=base.path.name,
            base_fingerprint=base.fingerprint,
            tokenizer_sha256=tokenizer_sha256(base.path),
            template_sha256=encoded.template_sha256,
            prompts_source=str(request.prompts) if request.prompts is not None else BUNDLED,
            temperature=sampling.temperature,
            seed=sampling.seed,
            max_new_tokens=sampling.max_new_tokens,
            dtype=dtype,
            device=device,
            vocab=self.vocab,
            tools_in_text=encoded.tools_in_text,
            thinking_switch=encoded.thinking_switch,
            versions=versions(),
            writer=writer,
        )

    def _open(self) -> tuple[int, str, str, str]:
        """What writes: its vocabulary, dtype and device, and its name where it is not this tool."""
        self.device = compute_device(self.request.device)
        self.model = LayeredModel.of(self.base, dtype=compute_dtype(self.request.dtype), device=self.device)
        return self.model.vocab_size, str(self.model.dtype).removeprefix("torch."), self.device, ""

    @property
    def header(self) -> dict[str, Any]:
        """What a journal must have been begun with."""
        about = asdict(self.about)
        for name in ("kinds", "roles", "prompts", "ended", "prompts_source", "base", "is_retokenized"):
            del about[name]
        about["base_fingerprint"] = self.base.identity  # in full, with its config: a journal never mixes two models
        about |= {"prompts": prompts_sha256(self.prompts), "ends": sorted(self.ends), **self._rounding}
        return {"made_by": "recompile", "kind": "trace", **about}

    @property
    def _rounding(self) -> dict[str, Any]:
        """What else decides the draws."""
        return {"batch": self.request.batch_size}

    def run(self, journal: LineJournal) -> list[list[int]]:
        """A response a prompt. A batch counts as written once all of its lines are there."""
        done = self._take_up(journal)
        total = len(self.prompts)
        missing = [
            batch
            for batch in plan_batches(self.encoded.ids, self.request.batch_size)
            if not all(number in done for number in batch)
        ]
        finished = total - sum(map(len, missing))
        self.on_event(Progress(WRITING, finished, total, unit="prompts"))
        if missing:
            with writing(self.model, self._plan(), self.on_event) as runner:
                for batch in missing:
                    written = self._answer(runner, batch, finished)
                    journal.append(*({"prompt": n, "response": ids} for n, ids in zip(batch, written, strict=True)))
                    done |= dict(zip(batch, written, strict=True))
                    finished += len(batch)
                    self.on_event(Progress(WRITING, finished, total, unit="prompts"))
        return [done[number] for number in range(total)]

    def _plan(self) -> WritingPlan:
        """Batches are as asked for, wherever the weights are: they decide how states are rounded."""
        size = self.request.batch_size
        tokens = max(map(len, self.encoded.ids)) + self.request.sampling.max_new_tokens
        way_out = "write fewer at a time ({batch_size}), on fewer bytes a weight ({dtype} bfloat16)"
        return plan_writing(self.model, size, size, tokens, "responses are", way_out)

    def _answer(self, runner: Any, batch: Sequence[int], finished: int) -> list[list[int]]:
        def within(event: object) -> None:
            if isinstance(event, Progress):
                at = finished + len(batch) * event.done / event.total
                self.on_event(Progress(WRITING, min(at, finished + len(batch) - 0.01), len(self.prompts), "prompts"))

        return answer(
            runner,
            [self.encoded.ids[number] for number in batch],
            [self.prompts[number].sha256 for number in batch],
            self.request.sampling,
            ends=self.ends,
            vocab=self.vocab,
            device=self.model.device,
            on_event=within,
        )

    def _take_up(self, journal: LineJournal) -> dict[int, list[int]]:
        """The responses of a journal; a new one is begun."""
        if not self._take_up_header(journal):
            return {}
        found = {}
        for number, line in enumerate(journal.values()[1:], start=2):
            if not self._is_response(line):
                raise JournalError(f"{journal.path}:{number}: is no response of this trace; remove the file")
            found[line["prompt"]] = line["response"]
        return found

    def _take_up_header(self, journal: LineJournal) -> bool:
        """Whether a journal has lines of this trace; an empty one is begun. Raises JournalError for one of another."""
        if not journal.lines:
            journal.begin(self.header)
            return False
        header, *_ = journal.values()
        if header != self.header:
            wanted = self.header
            other = [name for name in wanted if not isinstance(header, dict) or header.get(name) != wanted[name]]
            raise JournalError(
                f"{journal.path}: is of another trace ({', '.join(other)}); remove it, or choose another {{out}}"
            )
        journal.drop_torn()
        return True

    def _is_response(self, line: Any) -> bool:
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), int):
            return False
        ids = line.get("response")
        return (
            0 <= line["prompt"] < len(self.prompts)
            and isinstance(ids, list)
            and 0 < len(ids) <= self.request.sampling.max_new_tokens
            and all(isinstance(token, int) and 0 <= token < self.vocab for token in ids)
        )

    def trace(self, responses: Sequence[Sequence[int]]) -> Trace:
        ended = tuple(response[-1] in self.ends for response in responses)
        return make_trace(self.encoded.ids, responses, replace(self.about, ended=ended))


@dataclass(frozen=True)
class _Stored:
    """A line of a server's journal."""

    prompt: int
    text: str
    tokens: tuple[int, ...] | None
    ended: bool


class ServerJob(_Job):
    """The same by a server; a journal line holds tokens, or text where the server gives no tokens."""

    def _open(self) -> tuple[int, str, str, str]:
        assert self.request.url is not None, "asked for"
        self.server = Server.at(self.request.url)
        nested = self.base.config.get("text_config")
        size = self.base.config.get("vocab_size") or (nested.get("vocab_size") if isinstance(nested, dict) else None)
        return size if isinstance(size, int) else self.encoded.vocab, "", "server", self.server.model

    @property
    def _rounding(self) -> dict[str, Any]:
        return {}

    def run(self, journal: LineJournal) -> list[list[int]]:
        """A response a prompt; texts become tokens once all are there."""
        answers = self._answers_of(journal)
        total = len(self.prompts)
        missing = {number: ids for number, ids in enumerate(self.encoded.ids) if number not in answers}
        self.on_event(Progress(WRITING, total - len(missing), total, unit="prompts"))
        hashes = [prompt.sha256 for prompt in self.prompts]
        for number, found in self.server.answers(missing, hashes, self.request.sampling, self.request.batch_size):
            self._check(number, found)
            journal.append({"prompt": number, **asdict(found)})
            answers[number] = found
            self.on_event(Progress(WRITING, len(answers), total, unit="prompts"))
        return self._tokens(answers)

    def _tokens(self, answers: Mapping[int, Answer]) -> list[list[int]]:
        """Of every prompt, with the end of the turn where the model ended it."""
        texts = {number: one.text for number, one in answers.items() if one.tokens is None}
        found = {number: list(one.tokens) for number, one in answers.items() if one.tokens is not None}
        if texts:
            said = f"{len(texts)} of {len(answers)} responses came as text and are tokenized again, which may differ"
            self.on_event(Note(f"{said} from what was drawn"))
            self.about = replace(self.about, is_retokenized=True)
            found |= encode_texts(self.base.path, texts)
        responses = []
        for number in range(len(answers)):
            tokens = found[number]
            if answers[number].ended and not (tokens and tokens[-1] in self.ends) and self.encoded.end is not None:
                tokens = [*tokens, self.encoded.end]
            responses.append(tokens)
        return responses

    def _check(self, number: int, found: Answer) -> None:
        """Raises RecompileError for what no journal is to hold."""
        place = f"{self.request.url}: the response to prompt {number + 1}"
        ends = found.ended and self.encoded.end is not None
        if not (found.text if found.tokens is None else found.tokens) and not ends:
            raise RecompileError(f"{place} is empty; leave this prompt out")
        largest, most = max(found.tokens or (0,)), self.request.sampling.max_new_tokens
        if largest >= self.vocab:
            raise RecompileError(
                f"{place} has token {largest}, beyond the vocabulary of {self.vocab}; the server has another model "
                f"than {self.base.label}"
            )
        if len(found.tokens or ()) > most + 1:  # the end of the turn may stand beside them
            raise RecompileError(f"{place} has {len(found.tokens or ())} tokens, asked for were at most {most}")

    def _answers_of(self, journal: LineJournal) -> dict[int, Answer]:
        """Those of a journal; a new one is begun."""
        if not self._take_up_header(journal):
            return {}
        found = {}
        for number, line in enumerate(journal.values()[1:], start=2):
            place = f"{journal.path}:{number}"
            stored = read_as(_Stored, line, place, error=JournalError)
            if stored.prompt >= len(self.prompts):
                raise JournalError(f"{place}: is no response of this trace; remove the file")
            found[stored.prompt] = Answer(stored.text, stored.tokens, stored.ended)
            self._check(stored.prompt, found[stored.prompt])
        return found


def _generation_config(base: Checkpoint) -> Mapping[str, Any]:
    """generation_config.json, where chat models name the tokens that end a turn; empty where there is none."""
    path = base.path / "generation_config.json"
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is {describe(found)}, wanted an object")
    return found


def _report(out: Path, trace: Trace, left_out: int) -> TraceReport:
    about = trace.about
    written = trace.response.sum(1)
    kinds = []
    for kind in dict.fromkeys(about.kinds):
        rows = [row for row, its in enumerate(about.kinds) if its == kind]
        kinds.append(
            TraceKind(
                kind,
                len(rows),
                int((trace.lengths - written)[rows].sum()),
                int(written[rows].sum()),
                sum(about.ended[row] for row in rows),
                {role: sum(about.roles[row] == role for row in rows) for role in ROLE_SHARES},
            )
        )
    return TraceReport(
        str(out),
        about.base,
        len(trace.ids),
        int((trace.lengths - written).sum()),
        int(written.sum()),
        tuple(kinds),
        trace.counts,
        left_out,
        about,
        trace.sha256,
    )
