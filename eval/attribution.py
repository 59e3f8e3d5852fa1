"""Which groups of a build its KL comes from, and whether they are sensitive or badly rounded: `model_diff --attribute`.

Each group of modules of the candidate is put into the reference by itself, and the KL is measured as an exact profile
does. With `iso` the reference also gets isotropic noise there: of the same size in every tensor as the candidate's
error, and independent of it and of everything else. What such noise costs is how sensitive the group is; what the
candidate's own error costs, in these units, is how well it was rounded: far below 1 where the error avoids directions
that matter (GPTQ, importance), above 1 where it seeks them (outliers that were cut).
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.metrics import Mean
from eval.profile.exact import Measured, ProfileJob, ProfileOptions, profile_exact
from recompile.checkpoint.checkpoint import Checkpoint, StoredModule, split_name
from recompile.costs import Profile
from recompile.errors import ArgumentError, MismatchError
from recompile.events import OnEvent, Progress, ignore
from recompile.io.memory import available_bytes
from recompile.merge.overlay import Overlay
from recompile.model.roles import turned_modules

OWN, NOISE = "own", "noise"  # what is put into the reference
MEMORY_SHARE = 0.7  # of what is free, for the swaps that run together
SEED_BYTES = 7


@dataclass(frozen=True)
class GroupAttribution:
    """One group of the candidate's modules, by itself in the reference.

    relative_error: |A - B| / |B| of its weights, Frobenius
    kl:             KL(reference || reference with the candidate's weights there), nats a token
    noise:          the same with isotropic noise of that size in their place; None where it was not asked for
    against_noise:  kl / noise; None where either is 0 or not measured
    """

    group: str
    modules: tuple[str, ...]
    weights: int
    bits_per_weight: float  # as the candidate stores it
    relative_error: float
    kl: Mean
    kl_rows: tuple[float, ...]
    noise: Mean | None
    noise_rows: tuple[float, ...]
    against_noise: float | None


@dataclass(frozen=True)
class Attribution:
    """Every group of a candidate, the most expensive first.

    total: sum of the groups' KLs; what it differs from the KL of all together by is what groups do to each other
    """

    level: str
    groups: tuple[GroupAttribution, ...]
    total: Mean
    total_noise: Mean | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Stands(Checkpoint):
    """A mix that stands as one candidate of a profile."""

    source: Overlay = field(kw_only=True)

    @staticmethod
    def of(overlay: Overlay) -> _Stands:
        base = overlay.base
        return _Stands(base.path, overlay.label, overlay.config, base.tensors, source=overlay)

    @cached_property
    def modules(self) -> Mapping[str, StoredModule]:
        return self.source.modules

    @cached_property
    def identity(self) -> str:
        """Of all that the mix is made of, and of where each module comes from."""
        parts = [found.identity for found in self.source.checkpoints]
        parts += [f"{name} {placed.checkpoint.label}" for name, placed in sorted(self.source.placements.items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def has(self, tensor: str) -> bool:
        return self.source.has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        return self.source.load(tensor, device=device)


@dataclass(frozen=True)
class Noised(_Stands):
    """The reference with noise as large, tensor by tensor, as the candidate's error."""

    reference: Checkpoint = field(kw_only=True)

    @staticmethod
    def like(overlay: Overlay, reference: Checkpoint) -> Noised:
        """For every tensor of the overlay."""
        base = overlay.base
        return Noised(base.path, f"{overlay.label}, as noise", overlay.config, base.tensors, source=overlay,
                       reference=reference)  # fmt: skip

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(f"noise {super().identity}".encode()).hexdigest()

    @cached_property
    def _turned(self) -> frozenset[str]:
        return turned_modules(self.reference)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        """As Checkpoint.load, in the shape that the candidate's own has."""
        theirs, ours = self.both(tensor, device)
        size = float((theirs - ours).norm())
        noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(_seed_of(tensor))).to(ours.device)
        return ours if size == 0 else ours + noise * (size / float(noise.norm()))

    def both(self, tensor: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """The candidate's and the reference's values of one tensor, float32 of one shape, [out, in] of a matrix.

        Raises MismatchError where the candidate holds it otherwise."""
        theirs, ours = self.source.load(tensor, device=device), self.reference.load(tensor, device=device)
        module = split_name(tensor)[0]
        stored = self.source.modules.get(module)
        if stored is not None and stored.is_quantized and module in self._turned and tensor.endswith(".weight"):
            ours = ours.T
        if theirs.dim() == ours.dim() and all(a >= b for a, b in zip(theirs.shape, ours.shape, strict=True)):
            theirs = theirs[tuple(slice(0, size) for size in ours.shape)]  # of a padded format
        if theirs.shape != ours.shape:
            raise MismatchError(
                f"{self.source.label}: {tensor} is {list(theirs.shape)}, in {self.reference.label} "
                f"{list(ours.shape)}; leave {{attribute}} out"
            )
        return theirs.float(), ours.float()


def _seed_of(tensor: str) -> int:
    return int.from_bytes(hashlib.sha256(tensor.encode()).digest()[:SEED_BYTES], "little")


@dataclass(frozen=True)
class AttributionOptions:
    """How a KL is attributed; rows_sha256 and rows_source: of the rows, for the journal.

    level:   what a group is, one of recompile.costs.LEVELS; iso: also with isotropic noise
    counted: bool [rows, tokens], the places whose KL counts; None: all
    journal: where finished swaps are kept, so that another call with the same arguments goes on; None: nowhere
    """

    level: str = "fused"
    iso: bool = False
    counted: Tensor | None = field(default=None, compare=False)
    journal: Path | None = None
    max_memory_bytes: int | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"
    rows_sha256: str = ""
    rows_source: str = ""


def attribute(
    overlay: Overlay, reference: Checkpoint, ids: Tensor, asked: AttributionOptions, on_event: OnEvent = ignore
) -> Attribution:
    """Put each group of the candidate by itself into the reference; ids: int64 [rows, tokens].

    Raises ArgumentError for a candidate that stores nothing quantized; what `profile_exact` raises.
    """
    if not any(module.is_quantized for module in overlay.modules.values()):
        raise ArgumentError(f"{{attribute}}: {overlay.label} stores no module quantized; there is nothing to attribute")
    noised = Noised.like(overlay, reference)
    candidates: list[tuple[str, Checkpoint]] = [(OWN, _Stands.of(overlay)), *([(NOISE, noised)] if asked.iso else [])]
    with ExitStack() as stack:
        journal = asked.journal
        if journal is None:
            journal = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "attribution.jsonl"
        options = ProfileOptions(
            level=asked.level,
            head=True,
            embedding=True,
            max_memory_bytes=asked.max_memory_bytes,
            dtype=asked.dtype,
            device=asked.device,
        )
        rows = (asked.rows_sha256, asked.rows_source, asked.counted)
        job = ProfileJob(reference, OWN, candidates, ids, journal, options, *rows)
        weights = torch.ones(len(ids)) if asked.counted is None else asked.counted.sum(1)
        return _attribution(_measured(job, on_event), noised, weights.double())


def _measured(job: ProfileJob, on_event: OnEvent) -> Profile:
    """The exact profile of a job, its weights read again for every wave where they do not fit in memory."""
    model = job.model()
    needed = sum(math.prod(shape) for shape in model.shapes.values()) * model.dtype.itemsize
    free = available_bytes(job.options.device)
    if job.options.max_memory_bytes is None and needed > free * MEMORY_SHARE / 2:
        capped = ProfileOptions(**{**vars(job.options), "max_memory_bytes": int(free * MEMORY_SHARE)})
        job = ProfileJob(**{**{name: getattr(job, name) for name in job.__dataclass_fields__}, "options": capped})
    for event in profile_exact(job):
        if isinstance(event, Measured):
            on_event(Progress("attribution", event.done, event.total, unit="swaps"))
        elif isinstance(event, Profile):
            found = event
    return found


def _attribution(profile: Profile, noised: Noised, tokens: Tensor) -> Attribution:
    """tokens: [rows], those that count"""
    rows = {key: found.kl_rows for key, found in profile.measurements.items()}
    groups = []
    for group in profile.header.groups:
        own, noise = rows[group.name, OWN], rows.get((group.name, NOISE), ())
        kl, as_noise = _mean(own, tokens), _mean(noise, tokens) if noise else None
        usable = as_noise is not None and as_noise.mean > 0 and kl.mean > 0
        groups.append(
            GroupAttribution(
                group=group.name,
                modules=group.modules,
                weights=group.weights,
                bits_per_weight=group.bits[OWN] / max(1, group.weights),
                relative_error=_relative_error(group.modules, noised),
                kl=kl,
                kl_rows=own,
                noise=as_noise,
                noise_rows=noise,
                against_noise=kl.mean / as_noise.mean if usable and as_noise is not None else None,
            )
        )
    groups.sort(key=lambda each: -each.kl.mean)
    with_noise = all(each.noise_rows for each in groups)
    return Attribution(
        level=profile.header.level,
        groups=tuple(groups),
        total=_sum((each.kl_rows for each in groups), tokens),
        total_noise=_sum((each.noise_rows for each in groups), tokens) if with_noise else None,
    )


def _mean(rows: Iterable[float], tokens: Tensor) -> Mean:
    """Over tokens, of row means: as a report's KL is."""
    values = torch.tensor(list(rows), dtype=torch.float64)
    mean = float((values * tokens).sum() / tokens.sum())
    count = len(values)
    if count < 2:
        return Mean(mean, None)
    residual = (values - mean) * tokens
    return Mean(mean, math.sqrt(float(residual.square().sum()) * count / (count - 1)) / float(tokens.sum()))


def _sum(groups: Iterable[tuple[float, ...]], tokens: Tensor) -> Mean:
    return _mean(torch.tensor(list(groups), dtype=torch.float64).sum(0).tolist(), tokens)


def _relative_error(modules: Iterable[str], noised: Noised) -> float:
    error = size = 0.0
    for module in modules:
        theirs, ours = noised.both(f"{module}.weight")
        error += float((theirs - ours).double().square().sum())
        size += float(ours.double().square().sum())
    return math.sqrt(error / size) if size else 0.0
