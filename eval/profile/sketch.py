"""The few-pass profiler: what every swap costs, for all groups and candidates at once.

To second order the KL that a change of weights costs at token t is 1/2 dz' F_t dz, with dz the change of the logits and
F_t = diag(p_t) - p_t p_t' the Fisher matrix of the reference's next-token distribution. With random g_t of mean 0 and
covariance F_t (`eval.passes.fisher`), for a row of T tokens,

    E[(sum over t of g_t . dz_t)^2] = sum over t of dz_t' F_t dz_t = 2 T (mean KL of the row),

and sum over t of g_t . dz_t = <G, dW> for ONE backward pass that starts from the g_t, whatever dW is: one sample serves
every group and every candidate (`eval.passes.adjoint` gets <G, dW> without forming G), and the product of two such
numbers estimates how two swaps interact:

    KL(both) - KL(one) - KL(other) = E[<G, dW_1> <G, dW_2>] / T.

A row's estimate is the mean over samples of <G, dW>^2 / (2 T): unbiased for the quadratic form, with a relative
variance of about 2 / samples whatever the model. Rows (documents) are the unit of the standard error.

Shrinking. The same pass gives the squared-gradient score (`--mode diagonal`): squares of the products of single tokens
and outputs, added up as if independent. It is biased (tokens and outputs are not independent) but has hardly any noise,
and its bias is much alike for modules of one type and candidates of one width. So an estimate is the score times a
ratio, and the ratio of estimate to score is taken apart into levels (overall, type, candidate, type x candidate, group,
swap), each shrunk by the share of its variance that is no noise. That share is the covariance of the level between
halves of the rows, which have no draws and no documents in common, over its variance (reliability by split halves:
Spearman and Brown, 1910; shrinking by it: Efron and Morris, "Stein's estimation rule and its competitors", JASA 68,
1973). So two or three draws of a row are enough, and time is better spent on rows. `shrink=False` leaves the plain
estimates.

Rows are weighed by one over the root of their total: a few documents with many times the KL of others would decide
alone what groups cost relative to each other. Half way to documents that count alike, ranks hardly change, and recipes
of few rows lose half as much. The total of all swaps stays what it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from eval.passes.adjoint import AdjointPass, LayerBackward, LayerForward, PassPlan, SwapProducts, plan_pass
from eval.passes.fisher import DRAWS, FisherCotangents
from eval.profile.exact import ProfileJob
from recompile.checkpoint.safetensors_files import open_tensors
from recompile.costs import Measurement, Profile, ProfileHeader, is_expert, kind_of, open_journal
from recompile.errors import ArgumentError, JournalError
from recompile.io.tensors import save_tensors
from recompile.model.finite import check_finite
from recompile.model.stream import LayeredModel
from recompile.optimize.interactions import Interactions
from recompile.quantize.lazy_variant import making_bytes

SWEEP_SAMPLES = 8  # per row and sweep; a sweep is the unit that is kept when a run is interrupted
FEWEST_SWAPS = 8  # of which a ratio of estimate to score can be learnt
HALVINGS = 8


@dataclass(frozen=True)
class SketchOptions:
    """How many random draws estimate the costs, and what is kept of them."""

    samples: int = 32  # per row
    minutes: float | None = None  # no sweep is begun that would end later; at least one runs
    seed: int = 0
    shrink: bool = True
    keep_pairs: bool = False  # keep every sample of every swap, from which interactions can be had
    mode: str = "sketch"  # or "diagonal": the squared-gradient score alone
    first_row: int = 0  # number of the first row among all rows: the draws of a row depend on its number
    is_corrected: bool = False  # whole mixes correct the costs afterwards: estimates have later lines of their own


@dataclass(frozen=True)
class SketchStarted:
    """What a sketch is about to do."""

    plan: PassPlan
    sweeps: int
    resumed: int  # sweeps found from an earlier run


@dataclass(frozen=True)
class SketchProgress:
    """A layer of a sweep is done."""

    done: int
    total: int  # layer steps of all sweeps
    text: str


@dataclass(frozen=True)
class SweepDone:
    """A sweep is kept; `profile` holds the estimates so far."""

    sweeps: int
    seconds: float
    profile: Profile


@dataclass(frozen=True)
class Sketch:
    """Sums over the samples of all sweeps so far.

    swaps: (group, candidate label); products2, products4: [swaps, rows], sums over samples of <G, dW>^2 and ^4;
    squares: [swaps, rows], sum over samples of the single-token scores; tokens: [swaps, rows] int64 seen by the group
    samples: per row; pairs: [swaps, rows, samples] where kept
    """

    swaps: tuple[tuple[str, str], ...]
    products2: NDArray[np.float64]
    products4: NDArray[np.float64]
    squares: NDArray[np.float64]
    tokens: NDArray[np.int64]
    samples: int
    pairs: NDArray[np.float32] | None = None

    def __add__(self, other: Sketch) -> Sketch:
        assert self.swaps == other.swaps, "sweeps of one profile"
        pairs = None
        if self.pairs is not None and other.pairs is not None:
            pairs = np.concatenate([self.pairs, other.pairs], 2)
        return Sketch(
            self.swaps,
            self.products2 + other.products2,
            self.products4 + other.products4,
            self.squares + other.squares,
            self.tokens,
            self.samples + other.samples,
            pairs,
        )


def join_rows(parts: Sequence[Sketch]) -> Sketch:
    """One sketch over the rows of all parts, one after another; sums of parts with more samples are scaled down."""
    first, samples = parts[0], min(part.samples for part in parts)
    assert all(part.swaps == first.swaps for part in parts), "of one profile"
    shares = [samples / part.samples for part in parts]
    pairs = [part.pairs[..., :samples] for part in parts if part.pairs is not None]

    def joined(name: str) -> NDArray[np.float64]:
        return np.concatenate([getattr(part, name) * share for part, share in zip(parts, shares, strict=True)], 1)

    return Sketch(
        first.swaps,
        joined("products2"),
        joined("products4"),
        joined("squares"),
        np.concatenate([part.tokens for part in parts], 1),
        samples,
        np.concatenate(pairs, 1) if len(pairs) == len(parts) else None,
    )


def estimate(
    sketch: Sketch, row_tokens: int, *, diagonal: bool = False, shrink: bool = True, weigh: bool = False
) -> NDArray[np.float64]:
    """KL of every swap and row, nats per token: [swaps, rows]. weigh: rows by one over the root of their total."""
    scores = sketch.squares / (2 * row_tokens * sketch.samples)
    plain = sketch.products2 / (2 * row_tokens * sketch.samples)
    if diagonal:
        return scores
    if not shrink:
        return plain
    if weigh:
        totals = scores.sum(0)  # as plain.sum(0), with less noise
        if (totals > 0).all():
            weights = totals**-0.5
            weights *= totals.sum() / (weights * totals).sum()
            scores, plain = scores * weights, plain * weights
    return plain * shrink_factors(sketch.swaps, plain, scores)[:, None]


def shrink_factors(
    swaps: Sequence[tuple[str, str]], plain: NDArray[np.float64], scores: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Shrunk mean / plain mean of every swap (1 where there is nothing to learn from); [swaps].

    plain, scores: [swaps, rows], estimates and squared-gradient scores, nats per token
    """
    means, bases = plain.mean(1), scores.mean(1)
    factors = np.ones(len(means))
    usable = (means > 0) & (bases > 0) & (plain != scores).any(1)  # equal: there is no score of its own
    if usable.sum() < FEWEST_SWAPS:
        return factors
    table = _RatioTable(swaps)
    every = np.arange(plain.shape[1])
    overall, levels = table.levels(plain, scores, every, usable)
    shares = table.reliabilities(plain, scores, levels, usable)
    ratios = overall * np.maximum(1 + sum(share * level for share, level in zip(shares, levels, strict=True)), 0.1)
    factors[usable] = (ratios * bases)[usable] / means[usable]
    return factors


class _RatioTable:
    """Ratios of estimate to score, taken apart by type, candidate, type x candidate, group and swap."""

    def __init__(self, swaps: Sequence[tuple[str, str]]) -> None:
        kinds: list[list[object]] = [
            [kind_of(group) for group, _ in swaps],
            [label for _, label in swaps],
            [(kind_of(group), label) for group, label in swaps],
            [group for group, _ in swaps],
            list(swaps),
        ]
        self._keys = [np.unique(list(map(str, kind)), return_inverse=True)[1] for kind in kinds]

    def levels(
        self,
        plain: NDArray[np.float64],
        scores: NDArray[np.float64],
        rows: NDArray[np.int64],
        usable: NDArray[np.bool_],
    ) -> tuple[float, list[NDArray[np.float64]]]:
        """The overall ratio of these rows, and relative to it the deviation of every level; [swaps] each."""
        bases = scores[:, rows].mean(1)
        valid = usable & (bases > 0)
        ratio = np.divide(plain[:, rows].mean(1), bases, out=np.zeros(len(bases)), where=valid)
        overall = float(ratio[valid].mean()) if valid.any() else 0.0
        rest = np.where(valid, ratio / overall - 1, 0.0) if overall > 0 else np.zeros(len(bases))
        levels = []
        for keys in self._keys:
            counts = np.bincount(keys, valid)[keys]
            level = np.bincount(keys, rest)[keys] / np.maximum(counts, 1)
            level[~valid] = 0.0
            levels.append(level)
            rest = rest - level
        return overall, levels

    def reliabilities(
        self,
        plain: NDArray[np.float64],
        scores: NDArray[np.float64],
        levels: Sequence[NDArray[np.float64]],
        usable: NDArray[np.bool_],
    ) -> list[float]:
        """The share of each level's variance that halves of the rows have in common; 0 for a single row."""
        count = plain.shape[1]
        if count < 2:
            return [0.0] * len(levels)
        generator = np.random.default_rng(0)  # halves of equal rows are equal in every run
        common = np.zeros(len(levels))
        for _ in range(HALVINGS):
            order = generator.permutation(count)
            _, one = self.levels(plain, scores, order[: count // 2], usable)
            _, other = self.levels(plain, scores, order[count // 2 :], usable)
            common += [float((a * b).mean()) / HALVINGS for a, b in zip(one, other, strict=True)]
        variances = [float((level**2).mean()) for level in levels]
        return [
            min(1.0, max(0.0, shared / variance)) if variance > 0 else 0.0
            for shared, variance in zip(common.tolist(), variances, strict=True)
        ]


# ---- running ---------------------------------------------------------------------------------------------------------


def sketch_settings(wanted: SketchOptions) -> dict[str, object]:
    """What a header says of the draws."""
    settings: dict[str, object] = {"seed": wanted.seed, "draws": DRAWS, "shrink": wanted.shrink}
    return settings | ({"first_row": wanted.first_row} if wanted.first_row else {})


def profile_sketch(
    job: ProfileJob,
    sketch_options: SketchOptions | None = None,
    *,
    sweeps: Callable[[SketchJob, PassPlan, int], Generator[SketchProgress | Sketch]] | None = None,
) -> Iterator[SketchStarted | SketchProgress | SweepDone | Profile]:
    """Estimate every (group, candidate) swap; yields SketchStarted, progress, a SweepDone per sweep, and last the
    Profile.

    sweeps: who makes them (default `run_sweeps`, in this process). They are kept beside the journal, in
    `<path>.sweeps/`; a run that is started again with the same settings goes on after the last whole one, also to more
    samples. Raises as `profile_exact` does.
    """
    wanted = sketch_options or SketchOptions()
    model, sketch, plan = prepare_sketch(job, wanted)
    header = sketch.header
    store = SweepStore(job.path, header)
    with open_journal(job.path, header) as journal:
        done = store.count(sketch.samples)
        if done:
            journal.keep()
        yield SketchStarted(plan, sketch.sweeps, min(done, sketch.sweeps))
        total = store.load(done) if done else None
        started = began = time.monotonic()
        making = run_sweeps(sketch, plan, done, model) if sweeps is None else sweeps(sketch, plan, done)
        with closing(making):
            for event in making:
                if isinstance(event, SketchProgress):
                    yield event
                    continue
                store.save(done, event)
                journal.keep()
                total = event if total is None else total + event
                done += 1
                now = time.monotonic()
                yield SweepDone(done, now - began, as_profile(header, total, wanted))
                if wanted.minutes is not None and (now - started) + (now - began) > 60 * wanted.minutes:
                    break
                began = now
        assert total is not None, "at least one sweep is done"
        profile = as_profile(header, total, wanted)
        control = profile.control
        assert control is not None, "made with the profile"
        estimates = [control, *profile.measurements.values()]
        kept = (journal.profile.control, journal.profile.measurements) == (control, profile.measurements)
        has_later_lines = wanted.is_corrected or wanted.mode == "hybrid"
        if not kept and not (has_later_lines and journal.held(estimates)):
            journal.append(estimates)
        yield profile


def prepare_sketch(
    job: ProfileJob, wanted: SketchOptions, *, identified: bool = True
) -> tuple[LayeredModel, SketchJob, PassPlan]:
    """What is decided before the first pass: the model without weights, what is sampled, and the memory for it.

    identified: see ProfileJob.header. Raises ArgumentError, MismatchError, and RecompileError where the memory cap
    cannot be kept.
    """
    if job.options.context != "clean":
        raise ArgumentError(f"{{mode}} {wanted.mode} measures around the reference; use {{context}} clean")
    if wanted.samples < 2:
        raise ArgumentError(f"{{samples}} {wanted.samples}: wanted at least 2, or no noise can be told")
    model = job.model()
    settings = sketch_settings(wanted)
    header = job.header(model.dtype, method=wanted.mode, settings=settings, identified=identified)
    sketch = SketchJob(job, header, wanted)
    return model, sketch, sketch.plan(model)


@dataclass(frozen=True)
class SketchJob:
    """What any process needs to sample any rows of any sweep of one profile."""

    job: ProfileJob
    header: ProfileHeader
    wanted: SketchOptions

    @property
    def sweeps(self) -> int:
        return -(-self.wanted.samples // SWEEP_SAMPLES)

    def samples(self, sweep: int) -> int:
        """Per row, of one sweep; 0 for sweeps that are not wanted."""
        return max(0, min(SWEEP_SAMPLES, self.wanted.samples - sweep * SWEEP_SAMPLES))

    def plan(self, model: LayeredModel) -> PassPlan:
        """Of a pass over all rows. Raises RecompileError where the memory cap cannot be kept."""
        return plan_pass(
            model,
            self.header.groups,
            len(self.job.candidates),
            rows=self.header.rows,
            tokens=self.header.row_tokens,
            samples=min(SWEEP_SAMPLES, self.wanted.samples),
            cap_bytes=self.job.options.max_memory_bytes,
            making=making_bytes(self.job.by_label.values()),
        )

    def run(
        self, sweep: int, rows: slice, model: LayeredModel, plan: PassPlan, folder: Path | None
    ) -> Iterator[LayerForward | LayerBackward | Sketch]:
        """One pass over some rows; its own events, and last what it sampled. The draws are those of a pass over all."""
        job, candidates = self.job, self.job.by_label
        runner = AdjointPass(model, job.reference, candidates, self.header.groups, plan, scratch_folder=folder)
        samples, first = self.samples(sweep), self.wanted.first_row + rows.start
        counted = None if job.counted is None else job.counted[rows]
        cotangents = FisherCotangents(
            model, candidates, self.header.groups, samples, self.wanted.seed, sweep, first, counted=counted
        )
        found: list[SwapProducts] = []
        for event in runner.run(job.ids[rows], cotangents):
            if isinstance(event, LayerBackward):
                found += event.swaps
            yield event
        yield collect(found, samples, self.wanted.keep_pairs)


def run_sweeps(
    sketch: SketchJob, plan: PassPlan, first: int, model: LayeredModel
) -> Generator[SketchProgress | Sketch]:
    """The sweeps from `first` on in this process, each ending with its Sketch."""
    depth = model.depth
    total = sketch.sweeps * 2 * depth
    for sweep in range(first, sketch.sweeps):
        for event in sketch.run(sweep, slice(0, sketch.header.rows), model, plan, sketch.job.path.parent):
            if isinstance(event, LayerForward):
                yield SketchProgress(sweep * 2 * depth + event.layer + 1, total, f"sweep {sweep + 1}, forward")
            elif isinstance(event, Sketch):
                yield event
            elif event.layer is not None:
                step = (sweep + 1) * 2 * depth - event.layer
                yield SketchProgress(step, total, f"sweep {sweep + 1}, layer {event.layer}")


def collect(found: Sequence[SwapProducts], samples: int, keep_pairs: bool) -> Sketch:
    """The products of all swaps as one Sketch: [swaps, rows, samples], of which pairs keep every draw."""
    products = torch.stack([swap.products for swap in found]).double()  # [swaps, rows, samples]
    squares = torch.stack(
        [
            # the head and the embedding have no single-token score: their plain estimate takes its place
            (swap.squares * samples if swap.squares is not None else swap.products.square().sum(1)).double()
            for swap in found
        ]
    )
    return Sketch(
        tuple((swap.group, swap.source) for swap in found),
        products.square().sum(2).numpy(),
        products.pow(4).sum(2).numpy(),
        squares.numpy(),
        torch.stack([swap.tokens for swap in found]).numpy(),
        samples,
        products.float().numpy() if keep_pairs else None,
    )


def as_profile(header: ProfileHeader, sketch: Sketch, options: SketchOptions) -> Profile:
    """What all the samples so far say of every swap."""
    diagonal = options.mode == "diagonal"
    values = estimate(sketch, header.row_tokens, diagonal=diagonal, shrink=options.shrink, weigh=options.shrink)
    seen = sketch.tokens.sum(1) > 0  # an expert that no token reached is not free, it is unmeasured
    if header.settings.get("padded"):  # nor is one that nothing but padding reached
        seen &= sketch.products2.sum(1) > 0
    measured = {
        swap: Measurement(*swap, tuple(rows), bool(reached) or not is_expert(swap[0]))
        for swap, rows, reached in zip(sketch.swaps, values.tolist(), seen, strict=True)
    }
    return Profile(header, Measurement(None, None, (0.0,) * header.rows), measured)


# ---- what is kept ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepStore:
    """`<profile>.sweeps/sweep-0000.safetensors` and so on: one file a sweep, each whole."""

    path: Path  # of the profile
    header: ProfileHeader

    @property
    def folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}.sweeps")

    def _file(self, number: int) -> Path:
        return self.folder / f"sweep-{number:04d}.safetensors"

    @property
    def _key(self) -> str:
        """What the samples depend on: not the mode, and not how they are read."""
        header = self.header
        settings = {key: header.settings[key] for key in ("seed", "draws", "first_row") if key in header.settings}
        groups = [(group.name, group.modules) for group in header.groups]
        candidates = [(candidate.label, candidate.fingerprint) for candidate in header.candidates]
        text = json.dumps([
            settings, groups, candidates, header.reference_fingerprint, header.rows_sha256, header.rows,
            header.row_tokens, header.dtype,
        ])  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()

    def count(self, wanted: Callable[[int], int] = lambda sweep: 0) -> int:
        """Whole sweeps found from the first on, up to one that has fewer samples than are wanted of it.

        Raises JournalError for those of another measurement."""
        number = 0
        while self._file(number).exists() and self._samples(number) >= wanted(number):
            number += 1
        if number:
            with self._open(number - 1) as file:
                found = (file.metadata() or {}).get("key")
            if found != self._key:
                raise JournalError(
                    f"{self.folder}: holds the sweeps of another measurement (other rows, models, groups or seed); "
                    f"choose another {{out}}, or remove the folder to start again"
                )
        return number

    def _samples(self, number: int) -> int:
        with self._open(number) as file:
            return int((file.metadata() or {}).get("samples", 0))

    def _open(self, number: int, *, checks: bool = False) -> AbstractContextManager[safe_open]:
        return open_tensors(
            self._file(number), error=JournalError, way_out="; remove it to sample again", checks=checks
        )

    def one(self, number: int) -> Sketch:
        """A sweep."""
        with self._open(number, checks=True) as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for name, value in tensors.items():
                check_finite(value, f"{self._file(number)}: {name}", "remove it to sample again, with a wider {dtype}")
            values = {name: value.numpy() for name, value in tensors.items()}
            try:
                swaps = tuple((group, source) for group, source in json.loads(about["swaps"]))
                return Sketch(swaps, samples=int(about["samples"]), **values)
            except (KeyError, ValueError, TypeError) as error:
                raise JournalError(f"{self._file(number)}: is no sweep ({error}); remove it to sample again") from error

    def load(self, count: int) -> Sketch:
        """The sum of the first `count` sweeps."""
        total = self.one(0)
        for number in range(1, count):
            total += self.one(number)
        return total

    def save(self, number: int, sketch: Sketch) -> None:
        """Raises OutputError where it cannot be written, NotFiniteError for sums that are no numbers; then nothing of
        it stays."""
        target = self._file(number)
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(sketch, name)))
            for name in ("products2", "products4", "squares", "tokens", "pairs")
            if getattr(sketch, name) is not None
        }
        for name, value in tensors.items():
            check_finite(value, f"{target}: {name}")
        about = {"key": self._key, "samples": str(sketch.samples), "swaps": json.dumps(sketch.swaps)}
        save_tensors(target, tensors, about, checked=True)


def samples_beside(path: Path, header: ProfileHeader) -> Sketch | None:
    """All the samples kept beside a profile; None where there are none. Raises JournalError for those of another
    measurement."""
    store = SweepStore(path, header)
    count = store.count()
    return store.load(count) if count else None


def squared_gradient_scores(sketch: Sketch, row_tokens: int) -> dict[tuple[str, str], float]:
    """What samples say by squared gradients, nats per token by (group, candidate label)."""
    scores = estimate(sketch, row_tokens, diagonal=True).mean(1).tolist()
    return dict(zip(sketch.swaps, scores, strict=True))


def interactions_of(sketch: Sketch, row_tokens: int) -> Interactions | None:
    """What swaps cost together; None where the samples of single swaps were not kept (--pairs)."""
    return None if sketch.pairs is None else Interactions.of(sketch.swaps, sketch.pairs, row_tokens)
