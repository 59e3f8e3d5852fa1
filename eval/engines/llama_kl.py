"""The statistics of `llama-perplexity --kl-divergence`, from logits and records of base logits.

The base's log-probabilities are those of its file (clipped, 16 bits, not renormalized), whether or not a file was
written, so that the figures are the tool's own to the printed digits. Its standard errors take every token as
independent, which neighbours in a text are not; ours (`eval.metrics`) take chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.engines.base_logits import decode, exp_f32, log_sum_exp

SMALLEST_LOG_P = np.float32(-16)  # base tokens less probable than this add nothing
FEWEST_TOKENS = 100  # the tool prints no final statistics for fewer
QUANTILES = (0.999, 0.99, 0.95, 0.90, 0.10, 0.05, 0.01, 0.001)
DELTA_QUANTILES = (0.999, 0.99, 0.95, 0.90, 0.75, 0.25, 0.10, 0.05, 0.01, 0.001)
BLOCK_BYTES = 1 << 23


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error over tokens."""

    value: float
    std_error: float


@dataclass(frozen=True)
class ToolStatistics:
    """What the tool prints at its end; KL in nats, probabilities as shares of 1."""

    tokens: int
    perplexity: Estimate
    perplexity_base: Estimate
    correlation: float  # of ln PPL(Q) and ln PPL(base)
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    kl: Estimate
    kl_max: float
    kl_quantiles: dict[str, float]
    kl_median: float
    kl_min: float
    delta_p: Estimate
    delta_p_max: float
    delta_p_quantiles: dict[str, float]
    delta_p_median: float
    delta_p_min: float
    delta_p_rms: Estimate
    same_top: Estimate


@dataclass
class Tally:
    """Collects tokens; `statistics()` at any time."""

    kl: list[NDArray[np.float64]] = field(default_factory=list)
    delta_p: list[NDArray[np.float32]] = field(default_factory=list)
    nll: list[NDArray[np.float32]] = field(default_factory=list)
    nll_base: list[NDArray[np.float32]] = field(default_factory=list)
    same_top: int = 0

    def add(self, logits: NDArray[np.float32], records: NDArray[np.uint16], labels: NDArray[np.int32]) -> None:
        """Add positions: the candidate's logits float32 [positions, n_vocab], the base's records uint16 [positions,
        codes], and the next tokens int32 [positions]."""
        step = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
        for start in range(0, len(logits), step):
            stop = start + step
            self._add(logits[start:stop], records[start:stop], labels[start:stop])

    def _add(self, logits: NDArray[np.float32], records: NDArray[np.uint16], labels: NDArray[np.int32]) -> None:
        log_p = decode(records, logits.shape[1])
        largest = logits.max(1)
        log_total = log_sum_exp(logits, largest)
        rows = np.arange(len(logits))
        normalizer = largest + log_total
        nll = normalizer - logits[rows, labels]
        nll_base = -log_p[rows, labels]
        terms = exp_f32(log_p) * ((log_p - logits) + normalizer[:, None])
        terms[log_p <= SMALLEST_LOG_P] = 0
        self.kl.append(terms.sum(1, dtype=np.float64))
        self.delta_p.append(exp_f32(-nll) - exp_f32(-nll_base))
        self.nll.append(nll)
        self.nll_base.append(nll_base)
        self.same_top += int((logits.argmax(1) == log_p.argmax(1)).sum())

    @property
    def tokens(self) -> int:
        return sum(len(part) for part in self.kl)

    def statistics(self) -> ToolStatistics:
        kl = np.concatenate(self.kl)
        delta, nll, base = (np.concatenate(parts) for parts in (self.delta_p, self.nll, self.nll_base))
        count = len(kl)
        # Squares and products of float32 are float32 in the tool; its sums are float64.
        log_q, log_b = _mean(nll, nll * nll), _mean(base, base * base)
        product = float((nll * base).mean(dtype=np.float64)) - log_q.value * log_b.value
        covariance = product / (count - 1) if count >= 10 else 0.0
        spread = log_q.std_error * log_b.std_error
        log_ratio = Estimate(log_q.value - log_b.value, _root(log_q.std_error**2 + log_b.std_error**2 - 2 * covariance))
        ppl, ppl_base = _exp(log_q), _exp(log_b)
        both = ppl.value * ppl_base.value * covariance
        squared = (delta * delta).astype(np.float64)
        squares = _mean(squared, squared * squared)
        rms = math.sqrt(squares.value)
        top = self.same_top / count
        kl_sorted, delta_sorted = np.sort(kl.astype(np.float32)), np.sort(delta)
        return ToolStatistics(
            tokens=count,
            perplexity=ppl,
            perplexity_base=ppl_base,
            correlation=covariance / spread if spread else math.nan,
            log_ratio=log_ratio,
            ratio=_exp(log_ratio),
            difference=Estimate(ppl.value - ppl_base.value, _root(ppl.std_error**2 + ppl_base.std_error**2 - 2 * both)),
            kl=_mean(kl, kl * kl),
            kl_max=float(kl_sorted[-1]),
            kl_quantiles={_share(q): _quantile(kl_sorted, q) for q in QUANTILES},
            kl_median=float(np.median(kl_sorted)),
            kl_min=float(kl_sorted[0]),
            delta_p=_mean(delta, delta * delta),
            delta_p_max=float(delta_sorted[-1]),
            delta_p_quantiles={_share(q): _quantile(delta_sorted, q) for q in DELTA_QUANTILES},
            delta_p_median=float(np.median(delta_sorted)),
            delta_p_min=float(delta_sorted[0]),
            delta_p_rms=Estimate(rms, 0.5 / rms * squares.std_error if rms else 0.0),
            same_top=Estimate(top, math.sqrt(top * (1 - top) / (count - 1)) if count > 1 else 0.0),
        )


def _mean(values: NDArray[Any], squares: NDArray[Any]) -> Estimate:
    """The mean and its error over tokens; no error for 10 tokens or fewer, as in the tool."""
    count = len(values)
    mean = float(values.mean(dtype=np.float64))
    variance = float(squares.mean(dtype=np.float64)) - mean * mean
    return Estimate(mean, math.sqrt(variance / (count - 1)) if variance > 0 and count > 10 else 0.0)


def _exp(log: Estimate) -> Estimate:
    value = math.exp(log.value)
    return Estimate(value, value * log.std_error)


def _root(value: float) -> float:
    return math.sqrt(value) if value > 0 else 0.0


def _share(quantile: float) -> str:
    return f"{100 * quantile:.1f}"


def _quantile(ordered: NDArray[np.float32], share: float) -> float:
    """Between neighbours in proportion, all in float32 as the tool has it."""
    place = np.float32(share) * np.float32(len(ordered) - 1)
    low = int(place)
    part = place - np.float32(low)
    return float((np.float32(1) - part) * ordered[low] + part * ordered[min(low + 1, len(ordered) - 1)])


CHUNK_HEADER = (
    "chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence      "
    "        Δp RMS            Same top p"
)


def chunk_line(chunk: int, s: ToolStatistics) -> str:
    """The line that the tool prints after each chunk (counted from 1)."""
    return (
        f"{chunk:4d}    {s.perplexity.value:9.4f} ± {s.perplexity.std_error:9.4f}"
        f"    {s.log_ratio.value:10.5f} ± {s.log_ratio.std_error:10.5f}"
        f"    {s.kl.value:10.5f} ± {s.kl.std_error:10.5f}"
        f"    {100 * s.delta_p_rms.value:6.3f} ± {100 * s.delta_p_rms.std_error:6.3f} %"
        f"    {100 * s.same_top.value:6.3f} ± {100 * s.same_top.std_error:6.3f} %"
    )


def format_statistics(s: ToolStatistics) -> str:
    """The tool's final three tables, line by line."""

    def pair(name: str, e: Estimate) -> str:
        return f"{name:<30}: {e.value:10.6f} ± {e.std_error:10.6f}"

    def percent(e: Estimate) -> str:
        return f"{100 * e.value:6.3f} ± {100 * e.std_error:5.3f} %"

    lines = [
        "====== Perplexity statistics ======",
        pair("Mean PPL(Q)", s.perplexity),
        pair("Mean PPL(base)", s.perplexity_base),
        f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * s.correlation:6.2f}%",
        pair("Mean ln(PPL(Q)/PPL(base))", s.log_ratio),
        pair("Mean PPL(Q)/PPL(base)", s.ratio),
        pair("Mean PPL(Q)-PPL(base)", s.difference),
        "",
        "====== KL divergence statistics ======",
        f"Mean    KLD: {s.kl.value:10.6f} ± {s.kl.std_error:10.6f}",
        f"Maximum KLD: {s.kl_max:10.6f}",
    ]
    upper = [share for share in s.kl_quantiles if float(share) > 50]
    lines += [f"{share:>4}%   KLD: {s.kl_quantiles[share]:10.6f}" for share in upper]
    lines.append(f"Median  KLD: {s.kl_median:10.6f}")
    lines += [f"{share:>4}%   KLD: {value:10.6f}" for share, value in s.kl_quantiles.items() if share not in upper]
    lines += [f"Minimum KLD: {s.kl_min:10.6f}", "", "====== Token probability statistics ======"]
    lines += [f"Mean    Δp: {percent(s.delta_p)}", f"Maximum Δp: {100 * s.delta_p_max:6.3f}%"]
    upper = [share for share in s.delta_p_quantiles if float(share) > 50]
    lines += [f"{share:>4}%   Δp: {100 * s.delta_p_quantiles[share]:6.3f}%" for share in upper]
    lines.append(f"Median  Δp: {100 * s.delta_p_median:6.3f}%")
    lines += [f"{k:>4}%   Δp: {100 * v:6.3f}%" for k, v in s.delta_p_quantiles.items() if k not in upper]
    lines += [
        f"Minimum Δp: {100 * s.delta_p_min:6.3f}%",
        f"RMS Δp    : {percent(s.delta_p_rms)}",
        f"Same top p: {percent(s.same_top)}",
    ]
    return "\n".join(lines)
