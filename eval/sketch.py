"""The few-pass profiler: what every swap costs, for all groups and candidates at once.

To second order the KL that a change of weights costs at token t is 1/2 dz' F_t dz, with dz the change of the logits and
F_t = diag(p_t) - p_t p_t' the Fisher matrix of the reference's next-token distribution. With random g_t of mean 0 and
covariance F_t (`eval.fisher`), for a row of T tokens,

    E[(sum over t of g_t . dz_t)^2] = sum over t of dz_t' F_t dz_t = 2 T (mean KL of the row),

and sum over t of g_t . dz_t = <G, dW> for ONE backward pass that starts from the g_t, whatever dW is: one sample serves
every group and every candidate (`eval.adjoint` gets <G, dW> without forming G), and the product of two such numbers
estimates how two swaps interact:

    KL(both) - KL(one) - KL(other) = E[<G, dW_1> <G, dW_2>] / T.

A row's estimate is the mean over samples of <G, dW>^2 / (2 T): unbiased for the quadratic form, with a relative
variance of about 2 / samples whatever the model. Rows (documents) are the unit of the standard error.

Shrinking. The same pass gives the squared-gradient score (`--mode diagonal`): squares of the products of single tokens
and outputs, added up as if independent. It is biased (tokens and outputs are not independent) but has hardly any noise,
and its bias is much alike for modules of one type and candidates of one width. So the logarithm of estimate / score is
shrunk towards the mean of its type and candidate, and towards the mean of its group's candidates, in proportion to its
noise (empirical Bayes for a normal hierarchy: Efron and Morris, "Stein's estimation rule and its competitors", JASA 68,
1973). `shrink=False` leaves the plain estimates.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.adjoint import AdjointPass, LayerBackward, LayerForward, PassPlan, SwapProducts, plan_pass
from eval.fisher import DRAWS, FisherCotangents
from eval.profile import ProfileOptions, make_header
from recompile.checkpoint import Checkpoint, WeightSource
from recompile.costs import Candidate, Measurement, Profile, ProfileHeader, is_expert, open_journal
from recompile.errors import JournalError, OutputError, RecompileError
from recompile.recipe import SourceId
from recompile.stream import LayeredModel

SWEEP_SAMPLES = 8  # per row and sweep; a sweep is the unit that is kept when a run is interrupted


@dataclass(frozen=True)
class SketchOptions:
    samples: int = 32  # per row
    minutes: float | None = None  # no sweep is begun that would end later; at least one runs
    seed: int = 0
    shrink: bool = True
    keep_pairs: bool = False  # keep every sample of every swap, from which interactions can be had
    mode: str = "sketch"  # or "diagonal": the squared-gradient score alone


@dataclass(frozen=True)
class SketchStarted:
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


def estimate(sketch: Sketch, row_tokens: int, *, diagonal: bool = False, shrink: bool = True) -> NDArray[np.float64]:
    """KL of every swap and row, nats per token: [swaps, rows]."""
    scores = sketch.squares / (2 * row_tokens * sketch.samples)
    plain = sketch.products2 / (2 * row_tokens * sketch.samples)
    if diagonal:
        return scores
    return plain * shrink_factors(sketch, plain, scores)[:, None] if shrink else plain


def shrink_factors(sketch: Sketch, plain: NDArray[np.float64], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shrunk mean / plain mean of every swap (1 where there is nothing to learn from); [swaps].

    plain, scores: [swaps, rows], estimates and squared-gradient scores, nats per token
    """
    means, bases = plain.mean(1), scores.mean(1)
    factors = np.ones(len(means))
    usable = (means > 0) & (bases > 0)
    if usable.sum() < 8 or sketch.samples < 2:
        return factors
    noise = _relative_noise(sketch, usable)
    log_ratio = np.full(len(means), np.nan)
    log_ratio[usable] = np.log(means[usable] / bases[usable]) + noise / 2  # E[log x] is below log E[x] by half of it
    kinds = [(_type_of(group), label) for group, label in sketch.swaps]
    centre = _means_by(kinds, log_ratio)
    rest = log_ratio - centre
    groups = [group for group, _ in sketch.swaps]
    common = _shrunk_means(groups, rest, noise)
    own = rest - common
    spread = max(0.0, float(np.nanvar(own)) - noise)
    wanted = centre + common + own * spread / (spread + noise)
    factors[usable] = np.exp(wanted[usable] + np.log(bases[usable])) / means[usable]
    return factors


def _relative_noise(sketch: Sketch, usable: NDArray[np.bool_]) -> float:
    """Variance of an estimate, relative to its square, from how samples of one row scatter: the median over swaps."""
    count, rows = sketch.samples, sketch.products2.shape[1]
    second, fourth = sketch.products2[usable] / count, sketch.products4[usable] / count
    variance = np.maximum(fourth - second**2, 0) * count / (count - 1)  # of one sample's square, per row
    relative = variance.mean(1) / (rows * count) / second.mean(1) ** 2
    return float(np.median(relative))


def _type_of(group: str) -> str:
    return ".".join(part for part in group.split(".") if not part.isdigit())


def _means_by(keys: Sequence[object], values: NDArray[np.float64]) -> NDArray[np.float64]:
    sums: dict[object, list[float]] = {}
    for key, value in zip(keys, values.tolist(), strict=True):
        sums.setdefault(key, []).append(value)
    means = {key: float(np.nanmean(found)) if np.isfinite(found).any() else math.nan for key, found in sums.items()}
    return np.array([means[key] for key in keys])


def _shrunk_means(keys: Sequence[str], values: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    """The mean of each key's values, shrunk towards 0 by its noise."""
    means = _means_by(keys, values)
    count = len(keys) / len(set(keys))  # candidates per group
    spread = max(0.0, float(np.nanvar(means)) - noise / count)
    shrunk: NDArray[np.float64] = means * spread / (spread + noise / count)
    return shrunk


# ---- running ---------------------------------------------------------------------------------------------------------


def profile_sketch(
    reference: Checkpoint,
    base: SourceId,
    candidates: Sequence[tuple[SourceId, Checkpoint]],
    ids: Tensor,
    path: Path,
    options: ProfileOptions | None = None,
    sketch_options: SketchOptions | None = None,
    *,
    rows_sha256: str = "",
    rows_source: str = "",
) -> Iterator[SketchStarted | SketchProgress | SweepDone | Profile]:
    """Estimate every (group, candidate) swap into `path`; yields SketchStarted, progress, a SweepDone per sweep, and
    last the Profile.

    ids: int64 [rows, tokens]. Sweeps are kept beside `path`, in `<path>.sweeps/`; a run that is started again with the
    same settings goes on after the last whole one, also to more samples. Raises as `profile_exact` does.
    """
    options, wanted = options or ProfileOptions(), sketch_options or SketchOptions()
    if options.context != "clean":
        raise RecompileError(f"--mode {wanted.mode} measures around the reference; use --context clean")
    if wanted.samples < 2:
        raise RecompileError(f"--samples {wanted.samples}: wanted at least 2, or no noise can be told")
    model = LayeredModel.of(reference, dtype=options.dtype, device=options.device)
    by_label: dict[str, WeightSource] = {Candidate(i, "", "").label: checkpoint for i, checkpoint in candidates}
    header = make_header(
        reference,
        Candidate(base, "", "").label,
        candidates,
        ids,
        options,
        model.dtype,
        rows_sha256=rows_sha256,
        rows_source=rows_source,
        method=wanted.mode,
        settings={"seed": wanted.seed, "draws": DRAWS, "shrink": wanted.shrink},
    )
    plan = plan_pass(
        model,
        header.groups,
        len(by_label),
        rows=ids.shape[0],
        tokens=ids.shape[1],
        samples=min(SWEEP_SAMPLES, wanted.samples),
        cap_bytes=options.max_memory_bytes,
    )
    store = SweepStore(path, header)
    with open_journal(path, header) as journal:
        sweeps = -(-wanted.samples // SWEEP_SAMPLES)
        done = store.count()
        yield SketchStarted(plan, sweeps, min(done, sweeps))
        total = store.load(done) if done else None
        started = time.monotonic()
        for sweep in range(done, sweeps):
            began = time.monotonic()
            samples = min(SWEEP_SAMPLES, wanted.samples - sweep * SWEEP_SAMPLES)
            runner = AdjointPass(model, reference, by_label, header.groups, plan, scratch_folder=path.parent)
            cotangents = FisherCotangents(model, by_label, header.groups, samples, wanted.seed, sweep)
            found: list[SwapProducts] = []
            for event in runner.run(ids, cotangents):
                step = sweep * 2 * model.depth
                if isinstance(event, LayerForward):
                    yield SketchProgress(
                        step + event.layer + 1, sweeps * 2 * model.depth, f"sweep {sweep + 1}, forward"
                    )
                elif isinstance(event, LayerBackward):
                    found += event.swaps
                    if event.layer is not None:
                        step += 2 * model.depth - event.layer
                        yield SketchProgress(step, sweeps * 2 * model.depth, f"sweep {sweep + 1}, layer {event.layer}")
            made = collect(found, samples, wanted.keep_pairs)
            store.save(sweep, made)
            total = made if total is None else total + made
            now = time.monotonic()
            yield SweepDone(sweep + 1, now - began, _as_profile(header, total, wanted))
            if wanted.minutes is not None and (now - started) + (now - began) > 60 * wanted.minutes:
                break
        assert total is not None, "at least one sweep is done"
        profile = _as_profile(header, total, wanted)
        control = profile.control
        assert control is not None, "made with the profile"
        journal.append([control, *profile.measurements.values()])
        yield journal.profile


def collect(found: Sequence[SwapProducts], samples: int, keep_pairs: bool) -> Sketch:
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


def _as_profile(header: ProfileHeader, sketch: Sketch, options: SketchOptions) -> Profile:
    values = estimate(sketch, header.row_tokens, diagonal=options.mode == "diagonal", shrink=options.shrink)
    seen = sketch.tokens.sum(1) > 0  # an expert that no token reached is not free, it is unmeasured
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
        settings = {key: header.settings[key] for key in ("seed", "draws")}
        groups = [(group.name, group.modules) for group in header.groups]
        candidates = [(candidate.label, candidate.fingerprint) for candidate in header.candidates]
        text = json.dumps([
            settings, groups, candidates, header.reference_fingerprint, header.rows_sha256, header.rows,
            header.row_tokens, header.dtype,
        ])  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()

    def count(self) -> int:
        """Whole sweeps found from the first on. Raises JournalError for those of another measurement."""
        number = 0
        while self._file(number).exists():
            number += 1
        if number:
            with self._open(number - 1) as file:
                found = (file.metadata() or {}).get("key")
            if found != self._key:
                raise JournalError(
                    f"{self.folder}: holds the sweeps of another measurement (other rows, models, groups or seed); "
                    f"choose another -o, or remove the folder to start again"
                )
        return number

    def _open(self, number: int) -> safe_open:
        try:
            return safe_open(self._file(number), framework="pt")
        except (OSError, SafetensorError) as error:
            raise JournalError(f"{self._file(number)}: cannot be read: {error}; remove it to sample again") from error

    def load(self, count: int) -> Sketch:
        """The sum of the first `count` sweeps."""
        total: Sketch | None = None
        for number in range(count):
            with self._open(number) as file:
                about = file.metadata() or {}
                values = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
                swaps = tuple((group, source) for group, source in json.loads(about["swaps"]))
                one = Sketch(swaps, samples=int(about["samples"]), **values)
            total = one if total is None else total + one
        assert total is not None, "asked for at least one"
        return total

    def save(self, number: int, sketch: Sketch) -> None:
        """Raises OutputError where it cannot be written; then nothing of it stays."""
        target = self._file(number)
        partial = target.with_name(f"{target.name}.partial")
        tensors = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(sketch, name)))
            for name in ("products2", "products4", "squares", "tokens", "pairs")
            if getattr(sketch, name) is not None
        }
        about = {"key": self._key, "samples": str(sketch.samples), "swaps": json.dumps(sketch.swaps)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=about)
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{target}: cannot be written: {error}; make room and run the same command") from error
