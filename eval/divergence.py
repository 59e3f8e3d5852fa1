"""For how long greedy runs of a candidate write what the reference writes.

The reference's own continuations are made once, with its key-value cache. A candidate's greedy run leaves them at the
first token that is not its own most probable one, since up to there both have read the same: one pass over the
reference's continuations, streamed layer by layer, tells where, and no candidate generates anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.diff_memory import LOGIT_CHUNK_TOKENS, kept_states, plan_diff, put_states
from eval.generating import plan_writing, writing
from eval.metrics import Mean, paired_difference
from recompile.checkpoint.checkpoint import WeightSource
from recompile.errors import MismatchError, UnsupportedError
from recompile.events import OnEvent, Progress, ignore
from recompile.formats.cache_types import CacheFormat
from recompile.model.kv_cache import SimulatedCache
from recompile.model.stream import LayeredModel


@dataclass(frozen=True)
class GreedyRuns:
    """What the reference writes, greedily, after some prompts.

    ids: int64 [prompts, prompt tokens + new tokens]; lengths: new tokens until it ends itself, that end included
    """

    ids: Tensor
    prompt_tokens: int
    lengths: tuple[int, ...]

    @property
    def new_tokens(self) -> int:
        return self.ids.shape[1] - self.prompt_tokens


@dataclass(frozen=True)
class Divergence:
    """Where greedy runs of a candidate part from the reference's."""

    prompts: int
    prompt_tokens: int
    new_tokens: int  # at most, a run
    same_tokens: tuple[int, ...]  # a run: tokens written before the first other one
    finished: tuple[bool, ...]  # a run: no other token until the reference ended, or to the last token looked at
    median: float | None  # of same_tokens; None where more than half of the runs never part
    survival: tuple[tuple[int, float], ...]  # (n, share of runs with no other token among the first n)

    def __str__(self) -> str:
        within = f"after {self.median:g} tokens (median)" if self.median is not None else "never, in half of the runs"
        curve = ", ".join(f"{100 * share:.0f} % after {n}" for n, share in self.survival)
        return (
            f"the first other token comes {within}; equal so far: {curve} "
            f"({sum(self.finished)} of {self.prompts} runs never part)"
        )


def parse_divergence(text: str) -> tuple[int, int]:
    """ "32x300" -> 32 prompts, 300 tokens each. Raises ValueError."""
    prompts, times, tokens = text.lower().partition("x")
    if not times or not prompts.isdecimal() or not tokens.isdecimal() or min(int(prompts), int(tokens)) < 1:
        raise ValueError(f'"{text}" is not PROMPTSxTOKENS, such as 32x300')
    if int(prompts) > 4096 or int(tokens) > 1 << 20:
        raise ValueError(f'"{text}": at most 4096 prompts and {1 << 20} tokens')
    return int(prompts), int(tokens)


@torch.inference_mode()
def greedy_runs(
    reference: WeightSource,
    prompts: Tensor,
    new_tokens: int,
    *,
    batch: int = 8,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    vocab: int | None = None,
    max_memory_bytes: int | None = None,
    on_event: OnEvent = ignore,
) -> GreedyRuns:
    """The reference's most probable continuations of `prompts` (int64 [prompts, tokens]), by its own forward with its
    cache. Its weights are in memory for that, or as many of its layers as fit: the others are read anew for every token
    (of more than `batch` rows at a time where memory allows). vocab: the true vocabulary of a padded one; no token
    beyond it is written; max_memory_bytes: that the process stays below.

    Raises UnsupportedError where not even one layer fits or the model takes no cache.
    """
    model = LayeredModel.of(reference, dtype=dtype, device=device)
    if int(prompts.max()) >= model.vocab_size:
        raise MismatchError(f"a prompt holds token {int(prompts.max())}, the model has {model.vocab_size}")
    tokens = prompts.shape[1] + new_tokens
    what, way_out = "greedy runs are", "leave {divergence} out"
    plan = plan_writing(model, batch, len(prompts), tokens, what, way_out, max_memory_bytes)
    on_event(Progress("the reference's greedy runs", 0, len(prompts), unit="runs"))
    made, lengths = [], []
    with writing(model, plan, on_event) as runner:
        ends = _end_tokens(runner)
        for part in prompts.split(plan.rows):
            ids, counts = _continue(runner, part.to(model.device), new_tokens, ends, vocab or model.vocab_size)
            made.append(ids.cpu())
            lengths += counts
            on_event(Progress("the reference's greedy runs", len(lengths), len(prompts), unit="runs"))
    return GreedyRuns(torch.cat(made), prompts.shape[1], tuple(lengths))


def _end_tokens(runner: Any) -> frozenset[int]:
    """Tokens that end a text, as the model's configuration says."""
    found = getattr(runner.config, "eos_token_id", None)
    text = getattr(runner.config, "text_config", None)
    found = found if found is not None else getattr(text, "eos_token_id", None)
    return frozenset(found if isinstance(found, (list, tuple)) else [found] if isinstance(found, int) else [])


def _continue(runner: Any, ids: Tensor, new_tokens: int, ends: frozenset[int], vocab: int) -> tuple[Tensor, list[int]]:
    """Rows with `new_tokens` more (zeros after an end), and how many of these each wrote until it ended."""

    def within(_: Tensor, scores: Tensor) -> Tensor:
        scores[:, vocab:] = -math.inf
        return scores

    try:
        made = runner.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=1,
            max_new_tokens=new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
            logits_processor=[within],
        )
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedError(
            f"{type(runner).__name__} of transformers does not generate: {type(error).__name__}: {said}; leave "
            f"{{divergence}} out"
        ) from error
    made = torch.nn.functional.pad(made, (0, ids.shape[1] + new_tokens - made.shape[1]))
    lengths = []
    for row in made[:, ids.shape[1] :].tolist():
        lengths.append(next((place + 1 for place, token in enumerate(row) if token in ends), new_tokens))
    return made, lengths


@torch.inference_mode()
def divergence(
    candidate: WeightSource,
    runs: GreedyRuns,
    *,
    batch: int = 8,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    vocab: int | None = None,
    cache: CacheFormat | None = None,
    max_memory_bytes: int | None = None,
    on_event: OnEvent = ignore,
) -> Divergence:
    """Where a candidate's greedy runs, keys and values kept in `cache`, leave the reference's. Streams it once; the
    process stays below max_memory_bytes. Raises RecompileError where that is too little."""
    model = LayeredModel.of(candidate, dtype=dtype, device=device)
    ids = runs.ids[:, :-1]
    plan = plan_diff(model, 0, [ids.shape[1]] * len(ids), None if max_memory_bytes else batch, max_memory_bytes)
    model.pieces, batch = plan.pieces, plan.batch or batch
    seen = SimulatedCache.of(cache, model.model.config.model_type) if cache is not None else None
    what = f"greedy runs of {getattr(candidate, 'label', 'A')}"
    states = kept_states(model.embed(ids, batch), ids.numel(), plan.scratch)
    for index in range(model.depth):
        on_event(Progress(what, index, model.depth + 1, unit="layers"))
        with model.layer(index) as layer, seen.of_layer(layer) if seen is not None else nullcontext():
            after = (model.run_layer(index, state, n * batch) for n, state in enumerate(states))
            put_states(states, after, plan.scratch)
    with model.norm_loaded() as norm:
        put_states(states, map(norm, states), plan.scratch)
    first = runs.prompt_tokens - 1
    tokens = []
    with model.head_loaded():
        for n, state in enumerate(states):
            for row in range(len(state)):
                tokens.append(
                    torch.cat(
                        [
                            model.logits(part, n * batch + row)[0, :, : vocab or model.vocab_size].float().argmax(-1)
                            for part in state[row : row + 1, first:].split(LOGIT_CHUNK_TOKENS, 1)
                        ]
                    ).cpu()
                )
    on_event(Progress(what, model.depth + 1, model.depth + 1, unit="layers"))
    return _where_they_part(torch.stack(tokens), runs)


def _where_they_part(chosen: Tensor, runs: GreedyRuns) -> Divergence:
    """chosen: int64 [prompts, new tokens], the candidate's own token at every place of the reference's text."""
    differs = chosen != runs.ids[:, runs.prompt_tokens :]
    same, finished = [], []
    for row, length in zip(differs, runs.lengths, strict=True):
        places = row[:length].nonzero().flatten()
        same.append(int(places[0]) if len(places) else length)
        finished.append(len(places) == 0)
    places = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n < runs.new_tokens] + [runs.new_tokens]
    equal = [(n, sum(s >= n or done for s, done in zip(same, finished, strict=True)) / len(same)) for n in places]
    # a run that ends with the reference's has not parted: it counts as longer than all others
    ordered = sorted(math.inf if done else float(count) for count, done in zip(same, finished, strict=True))
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return Divergence(
        len(same),
        runs.prompt_tokens,
        runs.new_tokens,
        tuple(same),
        tuple(finished),
        middle if math.isfinite(middle) else None,
        tuple(equal),
    )


def paired_divergence(left: Divergence, right: Divergence) -> tuple[Mean, tuple[float, float]]:
    """Mean over prompts of how many tokens longer `left` writes what the reference writes, and its 95 % interval.

    A run that never parts counts with the tokens that the reference wrote."""
    return paired_difference(_lengths(left.same_tokens), _lengths(right.same_tokens))


def _lengths(counts: Sequence[int]) -> Tensor:
    return torch.tensor(counts, dtype=torch.float64)
