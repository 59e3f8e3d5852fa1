"""What an engine says of the next token, at some positions of a row: of every token, or of the most probable ones.

Where only the most probable tokens are known, a KL is that of two distributions over classes: every token that both
know is a class of its own, all others are one. By the log-sum inequality it is at most the KL over all tokens, and it
lacks only what differs inside of that one class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.metrics import kl_divergence

SMALLEST_REST = 1e-7  # one less a sum of float32 probabilities is not known better than that


@dataclass(frozen=True)
class Scores:
    """log_p:  float32 [positions, vocab], or [positions, K] of the tokens `ids`
    labels: float32 [positions], of the text's next token
    ids:    int64 [positions, K]; None: every token
    """

    log_p: Tensor
    labels: Tensor
    vocab: int
    ids: Tensor | None = None

    @classmethod
    def of_logits(cls, logits: Tensor, next_tokens: Tensor) -> Scores:
        """logits: float [positions, vocab]; next_tokens: int64 [positions]"""
        log_p = logits.float().log_softmax(-1)
        return cls(log_p, log_p.gather(1, next_tokens[:, None])[:, 0], logits.shape[1])

    def of_tokens(self, ids: Tensor) -> Tensor:
        """Log-probabilities of tokens, int64 [positions, K] -> float32 [positions, K]; NaN where they are not known."""
        if self.ids is None:
            return self.log_p.gather(1, ids)
        table = torch.full((len(self.log_p), self.vocab), torch.nan)
        return table.scatter_(1, self.ids, self.log_p).gather(1, ids)


@dataclass(frozen=True)
class Kl:
    """KL(reference || candidate) at some positions.

    nats:    float32 [positions]
    known:   share of the reference's listed tokens that the candidate lists as well, [positions]
    outside: the reference's probability of all that are not classes of their own, [positions]
    """

    nats: Tensor
    known: Tensor
    outside: Tensor


def kl_of(reference: Scores, candidate: Scores, *over: Scores) -> Kl:
    """KL over all tokens where both know them, else over classes as the module says.

    over: scores whose tokens must be listed, too, so that two KLs are over the same classes
    """
    lists = [scores for scores in (reference, candidate, *over) if scores.ids is not None]
    if not lists:
        nats = kl_divergence(reference.log_p, candidate.log_p)
        return Kl(nats, torch.ones_like(nats), torch.zeros_like(nats))
    ids = lists[0].ids
    assert ids is not None
    log_p, log_q = reference.of_tokens(ids).double(), candidate.of_tokens(ids).double()
    is_class = ~(log_p.isnan() | log_q.isnan())
    for scores in lists[1:]:
        is_class &= ~scores.of_tokens(ids).isnan()
    log_p, log_q = (torch.where(is_class, values, -torch.inf) for values in (log_p, log_q))
    inside = torch.where(is_class, log_p.exp() * (log_p - log_q), 0).sum(1)
    rest_p, rest_q = ((1 - values.exp().sum(1)).clamp(min=SMALLEST_REST) for values in (log_p, log_q))
    everything = is_class.sum(1) == reference.vocab
    outside = torch.where(everything, 0, rest_p * (rest_p / rest_q).log())
    rest = torch.where(everything, 0, rest_p)
    return Kl((inside + outside).float(), is_class.float().mean(1), rest.float())
