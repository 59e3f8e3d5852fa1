"""Answers to prompts by a model's own forward with its key-value cache, drawn from its own distribution.

A draw is the largest of logits / temperature + Gumbel noise, which is a draw of the softmax. The noise of a prompt
comes from a generator of its own, seeded by the trace's seed and the prompt, so that neither other prompts nor an
interruption change it. Prompts of about one length run together, padded on the left; batches follow from the prompts
alone, so that a run that goes on rounds as one that was never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from recompile.errors import NotFiniteError, UnsupportedError
from recompile.events import OnEvent, Progress, ignore

EVENT_EVERY_STEPS = 16
MOST_PADDING = 1.5  # the longest prompt of a batch against its shortest


@dataclass(frozen=True)
class Sampling:
    """temperature: of the softmax that is drawn from; 0 takes the most probable token"""

    temperature: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256


def plan_batches(prompts: Sequence[Sequence[int]], size: int) -> list[tuple[int, ...]]:
    """Which prompts run together: the shortest first, at most `size`, and none much longer than the first of its
    batch."""
    batches: list[list[int]] = []
    for number in sorted(range(len(prompts)), key=lambda number: (len(prompts[number]), number)):
        batch = batches[-1] if batches else []
        if not batch or len(batch) == size or len(prompts[number]) > MOST_PADDING * len(prompts[batch[0]]):
            batches.append([])
        batches[-1].append(number)
    return [tuple(batch) for batch in batches]


def generator_of(seed: int, prompt_sha256: str) -> torch.Generator:
    """The source of one prompt's noise, on the CPU."""
    return torch.Generator().manual_seed(int(sha256(f"{seed} {prompt_sha256}".encode()).hexdigest()[:15], 16))


@torch.inference_mode()
def answer(
    runner: Any,
    prompts: Sequence[Sequence[int]],
    hashes: Sequence[str],
    sampling: Sampling,
    *,
    ends: frozenset[int],
    vocab: int,
    device: torch.device,
    on_event: OnEvent = ignore,
) -> list[list[int]]:
    """What the model writes after each prompt, its end token included.

    runner: a causal language model of transformers with its weights; hashes: of the prompts, for their noise
    ends: tokens that end a text; vocab: only tokens below it are written
    Raises UnsupportedError for a model that does not generate, NotFiniteError.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    draw = Draw(sampling, [generator_of(sampling.seed, key) for key in hashes], vocab, on_event)
    try:
        made = runner.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,  # the largest of what Draw makes of the logits
            num_beams=1,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=0,
            logits_processor=[draw],
        )
    except (TypeError, ValueError, AttributeError, RuntimeError, KeyError, IndexError) as error:
        said = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedError(
            f"{type(runner).__name__} of transformers does not generate: {type(error).__name__}: {said}; "
            f"measure on text instead"
        ) from error
    return [_until_end(row, ends) for row in made[:, width:].tolist()]


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
    return row[:stop]


class Draw:
    """Logits [rows, vocab] -> scores float32 [rows, vocab] whose largest is the drawn token; as transformers calls a
    LogitsProcessor.

    generators: of every row, one; vocab: the true one, beyond which nothing is drawn
    Raises NotFiniteError where logits are NaN or infinite.
    """

    def __init__(
        self, sampling: Sampling, generators: Sequence[torch.Generator], vocab: int, on_event: OnEvent
    ) -> None:
        self.sampling, self.generators, self.vocab, self.on_event = sampling, generators, vocab, on_event
        self.step = 0

    def __call__(self, _: Tensor, logits: Tensor) -> Tensor:
        if bool((logits.isnan() | (logits == math.inf)).any()):
            raise NotFiniteError("the reference", "logits are NaN or infinite while it writes; use a wider dtype")
        scores = logits.float().clone()
        scores[:, self.vocab :] = -math.inf
        if self.sampling.temperature > 0:
            scores = scores / self.sampling.temperature + self._noise(scores.shape[1]).to(scores.device)
        self.step += 1
        if self.step % EVENT_EVERY_STEPS == 0:
            self.on_event(Progress("", self.step, self.sampling.max_new_tokens, unit="tokens"))
        return scores

    def _noise(self, width: int) -> Tensor:
        """Gumbel noise [rows, width]: -log of exponential draws."""
        noise = torch.zeros(len(self.generators), width)
        for row, generator in enumerate(self.generators):
            noise[row, : self.vocab].exponential_(generator=generator)
        noise[:, : self.vocab] = -noise[:, : self.vocab].clamp_min(torch.finfo(torch.float32).tiny).log()
        return noise


def end_tokens(config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer_end: int | None) -> frozenset[int]:
    """Tokens that end an answer: all that config.json, generation_config.json and the tokenizer name."""
    nested = config.get("text_config")
    named = (config, nested if isinstance(nested, dict) else {}, generation, {"eos_token_id": tokenizer_end})
    return frozenset(token for values in named for token in _tokens(values.get("eos_token_id")))


def _tokens(value: Any) -> Iterator[int]:
    for token in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
            yield token
