"""KL(base || build) of whole rows, as healing judges a build: the base's states are kept, its head is loaded beside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eval.metrics import kl_divergence
from recompile.checkpoint.checkpoint import WeightSource
from recompile.model.counted import pick, places_of
from recompile.model.stream import LayeredModel

LOGIT_CHUNK_TOKENS = 256


class OtherHead:
    """The base's head, loaded beside the build's: post-norm states [tokens, hidden] -> logits [tokens, vocab]."""

    def __init__(self, model: LayeredModel, source: WeightSource) -> None:
        self._model, self._loaded = model, model.head_loaded(source)

    def __enter__(self) -> OtherHead:
        self._loaded.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._loaded.__exit__(*what)

    @torch.no_grad()
    def __call__(self, normed: Tensor) -> Tensor:
        return self._model.logits(normed[None])[0]


@torch.no_grad()
def row_kls(
    model: LayeredModel,
    source: WeightSource,
    teacher: LayeredModel,
    base: WeightSource,
    ids: Tensor,
    teacher_states: Tensor,
    vocab: int | None,
    batch: int,
    counted: Tensor | None = None,
) -> list[float]:
    """Mean KL(base || source) of every row, nats a token; teacher_states: the base's post-norm states of `ids`.

    counted: bool [rows, tokens], the places that are meant; None: all
    """
    normed = model.normed(ids, batch, source)
    found = []
    with model.head_loaded(source), OtherHead(teacher, base) as reference:
        for row, both in enumerate(zip(normed, teacher_states, strict=True)):
            mine, wanted = (pick(states, places_of(counted, row)) for states in both)
            pieces = []
            for start in range(0, len(mine), LOGIT_CHUNK_TOKENS):
                part = slice(start, start + LOGIT_CHUNK_TOKENS)
                p, q = reference(wanted[part]), model.logits(mine[None, part])[0]
                pieces.append(kl_divergence(p[..., :vocab], q[..., :vocab]))
            found.append(float(torch.cat(pieces).double().mean()))
    return found
