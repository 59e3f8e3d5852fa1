"""How far a candidate's predictions are from a reference's: per token first, then with the doubt of every mean.

KL is KL(reference || candidate) in nats per token, from float32 log-softmax without any epsilon, unless a name says
otherwise. Rows are the unit of statistics: a standard error is that of the mean over row means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from recompile.errors import NotFiniteError
from recompile.formats.checks import is_finite
from recompile.io.report import with_error
from recompile.model.finite import check_finite

METRICS_VERSION = 2  # 2: the 99.9 % quantile, delta p, sure flips, slices
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
CPU_BLOCK_BYTES = 1 << 21  # of one model's logits: large enough for two threads, small enough for the caches
DEVICE_BLOCK_BYTES = 1 << 28


@torch.no_grad()
def kl_divergence(reference: Tensor, candidate: Tensor) -> Tensor:
    """KL(reference || candidate) at every token, in nats; without a gradient.

    reference, candidate: [..., vocab] logits, any float dtype, same shape
    returns:              [...] float32; exactly 0 where the logits are equal, NaN or infinite where one is not finite
    A padded vocabulary is cut by the caller, who knows its true size. Tokens that the reference gives no probability
    (logit -inf) add nothing.
    """
    vocab = reference.shape[-1]
    rows, others = reference.reshape(-1, vocab), candidate.reshape(-1, vocab)
    room = _Room(len(rows), vocab, rows.device)
    pieces = [room.compare(r, c).kl() for r, c in zip(rows.split(room.block), others.split(room.block), strict=True)]
    return torch.cat(pieces).reshape(reference.shape[:-1])


class _Room:
    """Memory for some tokens' distributions, written over by each block: fresh tensors of this size cost more than the
    arithmetic."""

    def __init__(self, tokens: int, vocab: int, device: torch.device) -> None:
        """device: of the logits [tokens, vocab]"""
        budget = CPU_BLOCK_BYTES if device.type == "cpu" else DEVICE_BLOCK_BYTES
        self.block = max(1, budget // (4 * vocab))  # tokens at a time
        self._values = torch.empty(4, min(self.block, tokens), vocab, device=device)

    def compare(self, reference: Tensor, candidate: Tensor) -> _Compared:
        """Of logits [at most `block`, vocab]. What an earlier call returned is no longer of use."""
        log_p, log_q, p, q = self._values[:, : len(reference)]
        return _Compared(_log_softmax(reference, log_p, p), _log_softmax(candidate, log_q, q), p, q)


@dataclass
class _Compared:
    """Two models' distributions at some tokens, float32 [tokens, vocab]: probabilities p and q that add up to nearly 1,
    and their logarithms.

    torch adds up the exponentials of a row in a few running sums, 5e-5 off at 300 000 logits on some processors. What
    p and q add up to, added pairwise, takes that back: once a token, where the figures are made.
    """

    log_p: Tensor
    log_q: Tensor
    p: Tensor
    q: Tensor
    _difference: Tensor | None = None

    def __post_init__(self) -> None:
        self.total_p, self.total_q = self.p.sum(-1), self.q.sum(-1)  # [tokens]
        self.log_total_p, self.log_total_q = self.total_p.log(), self.total_q.log()

    def kl(self) -> Tensor:
        """KL(p || q) [tokens]. From the first of these two on, log_p and log_q are no more."""
        return self._expectation(self.p) / self.total_p + (self.log_total_q - self.log_total_p)

    def kl_reverse(self) -> Tensor:
        """KL(q || p) [tokens]."""
        return (self.log_total_p - self.log_total_q) - self._expectation(self.q) / self.total_q

    def _expectation(self, p: Tensor) -> Tensor:
        """sum over vocab of p * (log_p - log_q), [tokens]."""
        if self._difference is None:
            self._difference = self.log_p.sub_(self.log_q)
        terms = torch.mul(p, self._difference, out=self.log_q)
        total = terms.sum(-1)
        if not bool(torch.isfinite(total).all()):  # 0 * inf where a logit is -inf: such terms are 0 by definition
            total = torch.where(p == 0, 0.0, terms).sum(-1)  # a NaN probability is not 0 and stays NaN
        return total


def _log_softmax(logits: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
    """Log-probabilities of logits [tokens, vocab] into log_p, which is returned, and probabilities into p."""
    torch.log_softmax(logits.float(), -1, out=log_p)
    torch.exp(log_p, out=p)
    return log_p


TOP_CHUNK = 64  # values of which only the largest is looked at first


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of [tokens, vocab] along vocab: values and places [tokens, k].

    Among the k chunks with the largest maxima are the k largest values; a CPU finds these five times as fast so."""
    whole = values.shape[1] // TOP_CHUNK
    if whole <= k or values.device.type != "cpu":
        found = values.topk(k, -1)
        return found.values, found.indices
    maxima = values[:, : whole * TOP_CHUNK].unflatten(1, (whole, TOP_CHUNK)).amax(-1)
    chunks = maxima.topk(k, -1).indices.sort(-1).values
    places = (chunks[..., None] * TOP_CHUNK + torch.arange(TOP_CHUNK)).flatten(1)
    rest = torch.arange(whole * TOP_CHUNK, values.shape[1])
    places = torch.cat([places, rest.expand(len(values), -1)], 1)
    found = values.gather(1, places).topk(k, -1)
    return found.values, places.gather(1, found.indices)


def _equal_rows(left: Tensor, right: Tensor, likely: Tensor) -> Tensor:
    """Which rows are equal to the last bit; only those that `likely` names are looked at. [tokens] bool."""
    equal = torch.zeros_like(likely)
    for row in likely.nonzero().flatten().tolist():  # row by row: a choice of rows would be copied
        equal[row] = torch.equal(left[row], right[row])
    return equal


@dataclass(frozen=True)
class TokenMetrics:
    """What is kept of every token; all [tokens] (or [rows, tokens]) on the CPU, top-k ones with a last axis K."""

    kl: Tensor  # float32, KL(reference || candidate), nats
    kl_reverse: Tensor  # float32, KL(candidate || reference), nats
    confidence: Tensor  # float32, the reference's highest probability
    reference_nll: Tensor  # float32, -log p(label), nats; 0 where there is no label
    candidate_nll: Tensor
    labelled: Tensor  # bool: the token has a label; the last one of a row has none
    reference_hit: Tensor  # bool [.., K]: the label is among the reference's K most probable
    candidate_hit: Tensor
    agree: Tensor  # bool [.., K]: both rank the same K tokens, in the same order
    same_logit_bits: Tensor  # bool: every logit equal to the last bit

    @property
    def is_finite(self) -> bool:
        """Whether every figure is a number."""
        figures = (self.kl, self.kl_reverse, self.confidence, self.reference_nll, self.candidate_nll)
        return all(is_finite(figure) for figure in figures)

    @staticmethod
    def cat(parts: Sequence[TokenMetrics]) -> TokenMetrics:
        return TokenMetrics(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TokenMetrics)))

    def placed(self, counted: Tensor) -> TokenMetrics:
        """Figures of the tokens that `counted` (bool [rows, tokens], on the CPU) marks, at their places; zeros
        elsewhere."""
        values = []
        for f in fields(TokenMetrics):
            value = getattr(self, f.name)
            whole = torch.zeros(*counted.shape, *value.shape[1:], dtype=value.dtype)
            whole[counted] = value
            values.append(whole)
        return TokenMetrics(*values)

    def reshape(self, rows: int) -> TokenMetrics:
        values = (getattr(self, f.name) for f in fields(TokenMetrics))
        return TokenMetrics(*(value.reshape(rows, -1, *value.shape[1:]) for value in values))


def token_metrics(reference: Tensor, candidate: Tensor, labels: Tensor, top_k: int) -> TokenMetrics:
    """Compare two sets of logits token by token.

    reference, candidate: [tokens, vocab] logits, any float dtype, on one device
    labels:               [tokens] int64, the next token of each; -1 where there is none
    top_k:                largest K of the top-K figures
    """
    if reference.shape != candidate.shape or reference.shape[:1] != labels.shape:
        raise ValueError(
            f"logits {list(reference.shape)} and {list(candidate.shape)}, labels {list(labels.shape)} do not fit"
        )
    top_k = min(top_k, reference.shape[-1])
    room = _Room(len(reference), reference.shape[1], reference.device)
    split = (part.split(room.block) for part in (reference, candidate, labels))
    return TokenMetrics.cat([_block_metrics(room, r, c, y, top_k) for r, c, y in zip(*split, strict=True)])


def _block_metrics(room: _Room, reference: Tensor, candidate: Tensor, labels: Tensor, top_k: int) -> TokenMetrics:
    both = room.compare(reference, candidate)
    top_p, order_p = largest(both.log_p, top_k)
    _, order_q = largest(both.log_q, top_k)
    target = labels.clamp(min=0)[:, None]
    no_label = labels < 0
    reference_nll = both.log_total_p - both.log_p.gather(-1, target)[:, 0]
    candidate_nll = both.log_total_q - both.log_q.gather(-1, target)[:, 0]
    kl = both.kl()
    values = (
        kl,
        both.kl_reverse(),
        top_p[:, 0].exp() / both.total_p,
        reference_nll.masked_fill(no_label, 0.0),
        candidate_nll.masked_fill(no_label, 0.0),
        ~no_label,
        ((order_p == target).cumsum(-1) > 0) & ~no_label[:, None],
        ((order_q == target).cumsum(-1) > 0) & ~no_label[:, None],
        (order_p == order_q).cumprod(-1).bool(),
        _equal_rows(reference, candidate, kl == 0),
    )
    return TokenMetrics(*(value.cpu() for value in values))


# ---- means with their doubt ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """A mean over all tokens, and the standard error of it with rows as the unit; None for fewer than two rows."""

    mean: float
    std_error: float | None

    def __format__(self, spec: str) -> str:
        return with_error(self.mean, self.std_error, spec or ".6f")

    def __str__(self) -> str:
        return f"{self}"


def mean_over_rows(values: Tensor, counted: Tensor | None = None) -> Mean:
    """Mean of [rows, tokens] values and its standard error over rows. counted: bool [rows, tokens], the tokens that are
    meant; None for all.

    Raises NotFiniteError where one of these is NaN or infinite, or where there is none.
    """
    values = values.double()
    counted = torch.ones_like(values, dtype=torch.bool) if counted is None else counted
    if not bool(counted.any()):
        raise NotFiniteError("a mean over no tokens", "the rows have nothing to measure; use longer rows")
    check_finite(values[counted], "a mean over tokens")
    counts = counted.sum(1)
    used = counts > 0
    sums = torch.where(counted, values, 0.0).sum(1)[used]
    counts = counts[used].double()
    mean = float(sums.sum() / counts.sum())
    rows = len(sums)
    if rows < 2:
        return Mean(mean, None)
    # ratio estimator: rows weigh by their tokens, so the error is that of the residuals sum - mean * count
    residual = sums - mean * counts
    error = math.sqrt(float((residual**2).sum()) * rows / (rows - 1)) / float(counts.sum())
    return Mean(mean, error)


def paired_difference(left: Tensor, right: Tensor) -> tuple[Mean, tuple[float, float]]:
    """Mean of left - right over rows measured on the same tokens, and its 95 % interval (Student's t over rows).

    left, right: [rows] row means in nats. The interval is infinite for fewer than two rows.
    """
    from scipy.stats import t as student

    difference = (left.double() - right.double()).flatten()
    rows = len(difference)
    mean = float(difference.mean())
    if rows < 2:
        return Mean(mean, None), (-math.inf, math.inf)
    error = float(difference.std() / math.sqrt(rows))
    half = float(student.ppf(0.975, rows - 1)) * error
    return Mean(mean, error), (mean - half, mean + half)


@dataclass(frozen=True)
class Quantiles:
    """Of values a token, nats where they are KL."""

    median: float
    p90: float
    p99: float
    p999: float
    max: float


def quantiles(values: Tensor) -> Quantiles:
    """Median, 90 %, 99 %, 99.9 % and largest of values of any shape (linear interpolation between neighbours). Raises
    NotFiniteError."""
    check_finite(values, "quantiles of tokens")
    ordered = values.double().flatten().sort().values

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))

    return Quantiles(at(0.5), at(0.9), at(0.99), at(0.999), float(ordered[-1]))


@dataclass(frozen=True)
class DeltaP:
    """Change of the probability of the text's own next token, candidate minus reference, as shares of 1: the "delta p"
    of llama-perplexity, with rows as the unit of its doubt."""

    mean: Mean  # negative: the candidate finds the text less probable
    rms: Mean  # root of the mean square; its standard error by the delta method


def delta_p(reference_nll: Tensor, candidate_nll: Tensor, labelled: Tensor) -> DeltaP:
    """Of the tokens that have a label. All [rows, tokens]; nll in nats. Raises NotFiniteError."""
    change = torch.exp(-candidate_nll.double()) - torch.exp(-reference_nll.double())
    mean, square = mean_over_rows(change, labelled), mean_over_rows(change**2, labelled)
    rms = math.sqrt(square.mean)
    if square.std_error is None:
        return DeltaP(mean, Mean(rms, None))
    return DeltaP(mean, Mean(rms, 0.5 * square.std_error / rms if rms else 0.0))


SURE = 0.9  # the reference's top probability above which another top token is a change that users see


@dataclass(frozen=True)
class SureFlips:
    """Tokens whose most probable token changes although the reference was sure of it."""

    above: float  # the reference's top probability
    tokens: int  # of which it was that sure
    share: Mean | None  # of these whose top token changes; None where there is none


def sure_flips(confidence: Tensor, same_top: Tensor, above: float = SURE) -> SureFlips:
    """confidence: [rows, tokens], the reference's top probability; same_top: bool [rows, tokens], both models put the
    same token first. Raises NotFiniteError."""
    sure = confidence > above
    tokens = int(sure.sum())
    return SureFlips(above, tokens, mean_over_rows((~same_top).float(), sure) if tokens else None)


@dataclass(frozen=True)
class Slice:
    """KL and top-token agreement of part of the tokens, with the doubt of that part."""

    name: str  # what the rows come from, or a range of positions
    rows: int
    tokens: int
    kl: Mean  # nats per token
    same_top: Mean  # share of tokens


def _slice(name: str, kl: Tensor, same_top: Tensor, counted: Tensor) -> Slice:
    rows, tokens = int(counted.any(1).sum()), int(counted.sum())
    return Slice(name, rows, tokens, mean_over_rows(kl, counted), mean_over_rows(same_top.float(), counted))


def slices_by_origin(
    kl: Tensor, same_top: Tensor, origins: Sequence[str], counted: Tensor | None = None
) -> tuple[Slice, ...]:
    """One slice a kind of row, in the order in which kinds appear; none where all rows are of one kind.

    kl, same_top: [rows, tokens]; origins: per row, or empty where it is not known; counted: bool [rows, tokens], the
    tokens that are meant, None for all. Raises NotFiniteError.
    """
    counted = torch.ones_like(kl, dtype=torch.bool) if counted is None else counted
    if len(set(origins)) < 2:
        return ()
    of = {name: [row for row, origin in enumerate(origins) if origin == name] for name in dict.fromkeys(origins)}
    return tuple(_slice(name, kl[rows], same_top[rows], counted[rows]) for name, rows in of.items())


POSITION_EDGES = (0, 512, 2048, 8192, 32768)  # tokens before the one that is predicted from


def slices_by_position(kl: Tensor, same_top: Tensor, counted: Tensor | None = None) -> tuple[Slice, ...]:
    """Tokens by how much context they see; none where every row ends before the second edge. [rows, tokens] all.

    counted: the tokens that are meant, None for all
    """
    counted = torch.ones_like(kl, dtype=torch.bool) if counted is None else counted
    tokens = kl.shape[1]
    if tokens <= POSITION_EDGES[1]:
        return ()
    edges = [*(edge for edge in POSITION_EDGES if edge < tokens), tokens]
    return tuple(
        _slice(f"{low} - {high}", kl[:, low:high], same_top[:, low:high], counted[:, low:high])
        for low, high in pairwise(edges)
        if bool(counted[:, low:high].any())
    )


HISTOGRAM_LOW, HISTOGRAM_HIGH, HISTOGRAM_PER_DECADE = -8, 2, 5  # powers of ten of nats; five bins a decade


@dataclass(frozen=True)
class Histogram:
    """Tokens by their KL, in bins of equal width on a logarithmic scale."""

    edges_log10: tuple[float, float]  # log10 of the lowest and the highest edge, in nats
    below: int  # tokens under the lowest edge: zero, rounding noise, and the reference against itself
    counts: tuple[int, ...]  # bins from the lowest edge up
    above: int


def kl_histogram(kl: Tensor) -> Histogram:
    """Count values of `kl` (nats, any shape) by their logarithm; negative ones (rounding) count as below. Raises
    NotFiniteError."""
    check_finite(kl, "a histogram of tokens")
    values = kl.double().flatten()
    bins = (HISTOGRAM_HIGH - HISTOGRAM_LOW) * HISTOGRAM_PER_DECADE
    logs = values.clamp_min(1e-300).log10()
    place = ((logs - HISTOGRAM_LOW) * HISTOGRAM_PER_DECADE).floor().clamp(-1, bins).long() + 1  # 0 below, last above
    counts = torch.bincount(place, minlength=bins + 2).tolist()
    edges = (float(HISTOGRAM_LOW), float(HISTOGRAM_HIGH))
    return Histogram(edges, counts[0], tuple(counts[1:-1]), counts[-1])


@dataclass(frozen=True)
class ConfidenceBin:
    """KL of the tokens whose reference confidence (highest probability) lies in [low, high)."""

    low: float
    high: float
    share: float  # of all tokens
    tokens: int
    kl_mean: float  # nats
    kl_median: float


def kl_by_confidence(kl: Tensor, confidence: Tensor) -> tuple[ConfidenceBin, ...]:
    """Tokens by the reference's confidence. Raises NotFiniteError.

    kl, confidence: of any shape, the same: nats, and the highest probability that the reference gives
    """
    check_finite(kl, "KL by confidence")
    check_finite(confidence, "KL by confidence")
    bins = []
    for low, high in pairwise(CONFIDENCE_EDGES):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        values = kl[inside].double()
        tokens = int(inside.sum())
        mean, median = (float(values.mean()), float(values.median())) if tokens else (math.nan, math.nan)
        bins.append(ConfidenceBin(low, high, tokens / max(1, kl.numel()), tokens, mean, median))
    return tuple(bins)


# ---- drift of hidden states ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """How far a hidden state is from the reference's, each figure a mean over rows (the largest one a maximum)."""

    relative_error: float  # |candidate - reference| / |reference|, Frobenius
    max_difference: float  # largest |candidate - reference| / |reference| of any row
    sqnr_db: float  # 10 log10(|reference|^2 / |candidate - reference|^2); infinite where they are equal
    cosine_error: float  # 1 - cos(candidate, reference)


DRIFT_TOKENS = 1024  # whose differences are held together


def drift(candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-row figures of `Drift` for hidden states [rows, tokens, hidden]: four [rows] float64 tensors."""
    sums = torch.zeros(4, len(candidate), dtype=torch.float64, device=candidate.device)  # |c|^2, |r|^2, c.r, |c - r|^2
    largest = torch.zeros(len(candidate), dtype=torch.float64, device=candidate.device)
    for ours, theirs in zip(candidate.split(DRIFT_TOKENS, 1), reference.split(DRIFT_TOKENS, 1), strict=True):
        c, r = ours.flatten(1).float(), theirs.flatten(1).float()
        error = c - r
        products = [torch.linalg.vecdot(left, right) for left, right in ((c, c), (r, r), (c, r), (error, error))]
        sums += torch.stack(products).double()
        largest = largest.maximum(error.abs_().amax(1).double())
    (ours_norm, norm), noise = sums[:2].sqrt(), sums[3].sqrt()
    ratio = torch.where(noise == 0, 0.0, noise / norm)  # a state of zeros equals itself
    cosine_error = torch.where(noise == 0, 0.0, 1 - sums[2] / (ours_norm * norm))
    return ratio, torch.where(noise == 0, 0.0, largest / norm), -20 * ratio.log10(), cosine_error


def mean_drift(rows: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Drift:
    """The mean over rows of what `drift` gave for each, four [rows] a batch; the largest error is that of all."""
    ratio, largest, sqnr, cosine = (torch.cat(list(parts)) for parts in zip(*rows, strict=True))
    return Drift(float(ratio.mean()), float(largest.max()), float(sqnr.mean()), float(cosine.mean()))
