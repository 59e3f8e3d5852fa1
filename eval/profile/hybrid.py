"""Sketch everything, then run the swaps that a decision hangs on.

At a size budget the optimizer takes, for every group, the candidate of least cost + price * bits, with one price for
all groups. A decision is worth checking where its runner-up is close for the noise of the two estimates: the expected
gain of knowing better is

    sigma * (phi(d / sigma) - d / sigma * Phi(-d / sigma)),      d the gap, sigma the noise of the gap,

(expected value of perfect information: Raiffa and Schlaifer, "Applied Statistical Decision Theory", 1961). The
candidates of the most valuable decisions are swapped in exactly, round by round, until the time is spent; the rest of
the sketch is scaled by what the exact swaps of its candidate turned out to be.

A sketch does not see tokens that a rounding error sends to other experts. The base candidate is run as a whole once,
and the share of tokens whose experts change in a layer counts as noise of the estimates of that layer's experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from scipy.special import ndtr

from eval.diff import DiffOptions, DiffReport, compare
from eval.profile.exact import ExactProfiler, ProfileJob
from eval.profile.sketch import SketchOptions, profile_sketch
from recompile.costs import Measurement, Profile, ProfileGroup, is_expert, layer_index, load_header, open_journal
from recompile.optimize.choose import Budget, make_problem
from recompile.optimize.frontier import lagrangian_path

FIRST_ROUND = 8  # swaps, from which the time of one is learnt
MISFIT = 0.1  # relative scatter of a sketch without noise around the exact swap, on real models
ROUTED_ROWS = 16  # that are run to see where routing moves
PRIOR_SWAPS = 4  # a candidate's scale counts as known after about so many exact swaps


@dataclass(frozen=True)
class HybridOptions:
    """Which decisions of a sketch's recipe are checked by exact swaps, and for how long."""

    budget: Budget
    minutes: float = 10.0  # for the exact swaps
    least_gain_nats: float = 1e-6  # decisions that promise less are not checked


@dataclass(frozen=True)
class RoutingMoved:
    """Of a mixture of experts: the share of tokens that go to other experts when all is taken from the base candidate.

    by_layer: layer -> share; rows: of how many rows
    """

    by_layer: Mapping[int, float]
    rows: int


@dataclass(frozen=True)
class HybridRound:
    """A round of exact swaps is measured."""

    swaps: int  # exact ones so far
    gain_nats: float  # expected of the next round
    seconds: float


def profile_hybrid(
    job: ProfileJob,
    sketch_options: SketchOptions,
    hybrid: HybridOptions,
    *,
    sketching: Iterator[object] | None = None,
) -> Iterator[object]:
    """As `profile_sketch`, then exact swaps; yields Measured and HybridRound events too, and last the Profile.

    sketching: the events of another sketch into the same journal, of method "hybrid" and over the first of the rows,
    in place of `profile_sketch` over all of them (`eval.profile.adaptive_rows`). Exact swaps are journaled in
    `<path>.exact.jsonl` and are not run again; where time does not end it, a run that was killed ends with the bytes
    of one that was not.
    Raises as both profilers do, and BudgetError for a budget outside the reachable range.
    """
    sketched: Profile | None = None
    if sketching is None:
        sketching = profile_sketch(job, replace(sketch_options, mode="hybrid"))
    for event in sketching:
        if isinstance(event, Profile):
            sketched = event
        else:
            yield event
    assert sketched is not None, "a sketch ends with its profile"
    job = job.first(sketched.header.rows)
    noise = math.sqrt(2 / (sketch_options.samples * len(job.ids)) + MISFIT**2)
    moved = routing_moved(job, sketched)
    if moved is not None:
        yield moved
    noises = noise_by_group(sketched.header.groups, noise, moved)
    model = job.model()
    padded = {name: value for name, value in sketched.header.settings.items() if name == "padded"}
    header = replace(sketched.header, method="exact", settings=padded)
    began = time.monotonic()
    exact_path = job.path.with_name(f"{job.path.name}.exact.jsonl")
    before = load_header(exact_path) if exact_path.exists() else None
    if before is not None and before.rows != header.rows:
        exact_path.rename(job.path.with_name(f"{job.path.name}.exact-{before.rows}-rows.jsonl"))  # swaps of fewer rows
    with (
        open_journal(exact_path, header) as exact,
        open_journal(job.path, sketched.header) as journal,
    ):
        profiler = ExactProfiler(job, model, model, header, job.plan(model, header))
        per_swap: float | None = None
        # What the rounds so far measured. A run that goes on takes the rounds of the one before it: swaps that are in
        # the journal already are known when the round comes that chose them, not before.
        kept = exact.profile.measurements
        is_finished = bool(kept) and all(sketched.measurements.get(swap) == found for swap, found in kept.items())
        known: dict[tuple[str, str], Measurement] = dict(kept) if is_finished else {}
        while True:
            merged = merge(sketched, known)
            wanted, gain = worth_checking(merged, hybrid.budget, noises, set(known))
            yield HybridRound(len(known), gain, time.monotonic() - began)
            left = 60 * hybrid.minutes - (time.monotonic() - began)
            most = 4 * FIRST_ROUND if known else FIRST_ROUND
            most = most if per_swap is None else min(most, int(left / per_swap))
            if not wanted or gain < hybrid.least_gain_nats or left <= 0 or most < 1:
                break
            chosen = wanted[:most]
            missing = [swap for swap in chosen if swap not in exact.profile.measurements]
            while missing:
                started, now = time.monotonic(), missing[: FIRST_ROUND if per_swap is None else len(missing)]
                for measured in profiler.run(exact, set(now)):
                    yield replace(measured, total=len(exact.profile.measurements) + len(wanted))
                per_swap = (time.monotonic() - started) / len(now)
                left = 60 * hybrid.minutes - (time.monotonic() - began)
                missing = missing[len(now) :][: max(0, int(left / per_swap))]
            known |= {swap: found for swap in chosen if (found := exact.profile.measurements.get(swap)) is not None}
        merged = merge(sketched, exact.profile.measurements)
        if merged.measurements != journal.profile.measurements:  # else it was finished before
            journal.append(merged.measurements.values())
        yield journal.profile


def merge(sketched: Profile, exact: Mapping[tuple[str, str], Measurement]) -> Profile:
    """Exact swaps in place of their estimates; other estimates scaled by their candidate's median exact / sketch."""
    logs: dict[str, list[float]] = {}
    for swap, found in exact.items():
        estimate = sketched.measurements[swap].mean
        if found.mean > 0 and estimate > 0:
            logs.setdefault(swap[1], []).append(math.log(found.mean / estimate))
    scales = {
        label: math.exp(float(torch.tensor(values).median()) * len(values) / (len(values) + PRIOR_SWAPS))
        for label, values in logs.items()
    }
    measurements = {
        swap: exact[swap]
        if swap in exact
        else replace(found, kl_rows=tuple(value * scales.get(swap[1], 1.0) for value in found.kl_rows))
        for swap, found in sketched.measurements.items()
    }
    return replace(sketched, measurements=measurements)


def routing_moved(job: ProfileJob, sketched: Profile) -> RoutingMoved | None:
    """How far routing moves on the first rows of a job; None for a model without groups of experts.

    Runs the reference and the base candidate as wholes. Raises NotFiniteError.
    """
    if not any(_holds_experts(group) for group in sketched.header.groups):
        return None
    rows = min(ROUTED_ROWS, len(job.ids))
    some = job.first(rows)
    options = DiffOptions(dtype=job.options.dtype, device=str(job.options.device), counted=some.counted)
    *_, report = compare(job.by_label[sketched.header.base], job.reference, some.ids, options)
    assert isinstance(report, DiffReport), "a comparison ends with its report"
    shares = {layer_index(f"{layer.name}."): 1 - layer.same_experts.mean for layer in report.routing}
    return RoutingMoved({layer: share for layer, share in shares.items() if layer is not None}, rows)


def noise_by_group(groups: Sequence[ProfileGroup], noise: float, moved: RoutingMoved | None) -> dict[str, float]:
    """Relative standard errors of the estimates: of experts that tokens leave, about the share of those in addition."""
    by_layer = moved.by_layer if moved is not None else {}
    return {
        group.name: math.hypot(noise, by_layer.get(group.layer, 0.0))
        if _holds_experts(group) and group.layer is not None
        else noise
        for group in groups
    }


def _holds_experts(group: ProfileGroup) -> bool:
    return any(is_expert(module) for module in group.modules)


def worth_checking(
    profile: Profile, budget: Budget, noises: Mapping[str, float], known: set[tuple[str, str]]
) -> tuple[list[tuple[str, str]], float]:
    """Swaps to measure, most valuable decision first, and the expected gain of the best one, nats per token.

    noises: relative standard error of a group's estimates; known: swaps that are exact already
    """
    problem = make_problem(profile)
    path = lagrangian_path(problem)
    at = path.index_within(budget.bits(profile))
    price = path.points[at + 1].saved_per_bit if at + 1 < len(path.points) else 0.0
    decisions: list[tuple[float, list[tuple[str, str]]]] = []
    for group in problem.groups:
        priced = sorted((option.cost + price * option.bits, option.source, option.cost) for option in group.options)
        if len(priced) < 2:
            continue
        (best, first, first_cost), *others = priced
        gains = []
        for value, source, cost in others:
            variance = sum(
                (noises[group.name] * abs(c)) ** 2
                for s, c in ((first, first_cost), (source, cost))
                if (group.name, s) not in known
            )
            gains.append((expected_gain(value - best, math.sqrt(variance)), source))
        gain, runner_up = max(gains)
        swaps = [(group.name, source) for source in (first, runner_up) if (group.name, source) not in known]
        if swaps and gain > 0:
            decisions.append((gain, swaps))
    decisions.sort(key=lambda decision: -decision[0])
    return [swap for _, swaps in decisions for swap in swaps], decisions[0][0] if decisions else 0.0


def expected_gain(gap: float, sigma: float) -> float:
    """Expected value of learning the true sign of a gap that is known with standard error sigma."""
    if sigma <= 0:
        return 0.0
    z = gap / sigma
    return sigma * (math.exp(-z * z / 2) / math.sqrt(2 * math.pi) - z * float(ndtr(-z)))
