"""What a sketch of a mixture of experts leaves out, found by measuring a few whole mixes.

A sketch is a quadratic form around the reference: it knows nothing of tokens that a rounding error sends to other
experts, and predicts less than such swaps cost. So experts and everything else, from every source, are measured
together as whole mixes beside the largest source, and all costs of such a part are multiplied by measured / predicted:

    f_best             = KL(all from the largest) / sum of its costs
    f(part from c)     = (KL(part from c, rest from the largest) - f_best * costs of the rest) / costs of the part

A factor that noise takes out of RANGE is cut there, and said.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.diff import DiffOptions
from eval.mixes.evaluator import MixEvaluator
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.costs import Profile, open_journal
from recompile.errors import JournalError
from recompile.events import OnEvent, Progress, ignore
from recompile.io.checksums import read_checked_json, write_checked_json
from recompile.io.schema import read_as

MOST_ROWS = 16
RANGE = (0.2, 5.0)
KIND = "recompile-whole-mixes"


@dataclass(frozen=True)
class PartFactor:
    """Costs of one part of the model from one source, as predicted and as measured in a whole mix."""

    part: str  # "experts", "the rest", "all"
    source: str  # candidate label
    predicted_nats: float
    measured_nats: float
    factor: float  # what costs are multiplied by: measured / predicted, within RANGE
    is_cut: bool  # measured / predicted lay outside

    def described(self) -> str:
        cut = f", cut to {self.factor:.2f}" if self.is_cut else ""
        ratio = self.measured_nats / self.predicted_nats if self.predicted_nats > 0 else math.nan
        return (
            f"{self.part} from {self.source}: measured {self.measured_nats:.5f} nats, predicted "
            f"{self.predicted_nats:.5f} ({ratio:.2f} x{cut})"
        )


def parts_of(profile: Profile) -> dict[str, list[str]]:
    """Groups of experts and the others; one part where every group holds both, none for a model without experts."""
    of_experts = {g.name: [".experts." in f".{m}." for m in g.modules] for g in profile.header.groups}
    if not any(any(flags) for flags in of_experts.values()):
        return {}
    if any(any(flags) and not all(flags) for flags in of_experts.values()):
        return {"all": list(of_experts)}
    experts = [name for name, flags in of_experts.items() if all(flags)]
    rest = [name for name in of_experts if name not in set(experts)]
    return {"experts": experts, "the rest": rest} if rest else {"experts": experts}


def measure_factors(
    profile: Profile,
    reference: Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    ids: Tensor,
    options: DiffOptions,
    path: Path,
    together: int,
    on_event: OnEvent = ignore,
) -> tuple[PartFactor, ...]:
    """The factors of every part and source; empty for a model without experts.

    ids: int64 [rows, tokens] of the profile, of which the first MOST_ROWS are run; together: mixes in one pass
    path: keeps what was measured, so that the same profile is not measured again. Raises JournalError for a file there
    that is something else, NotFiniteError as any measurement does.
    """
    parts = parts_of(profile)
    if not parts:
        return ()
    rows = min(MOST_ROWS, len(ids))
    key = _key(profile, rows)
    if (kept := _kept(path, key)) is not None:
        return kept
    header = profile.header
    labels = sorted((c.label for c in header.candidates), key=lambda label: -sum(g.bits[label] for g in header.groups))
    largest, others = labels[0], labels[1:]
    mixes: dict[tuple[str, str], dict[str, str]] = {("all", largest): {g.name: largest for g in header.groups}}
    for label in others:
        for part, names in parts.items():
            mixes[part, label] = {**mixes["all", largest], **dict.fromkeys(names, label)}
    if options.counted is not None:
        options = replace(options, counted=options.counted[:rows])
    evaluator = MixEvaluator(header, checkpoints, reference, options=options)
    measured: dict[tuple[str, str], float] = {}
    wanted = list(mixes)
    for start in range(0, len(wanted), together):
        on_event(Progress("measuring whole mixes", start, len(wanted), "mixes"))
        some = wanted[start : start + together]
        reports = evaluator.reports([mixes[name] for name in some], ids[:rows])
        # rows count alike, as in the costs
        measured |= {name: math.fsum(found.kl_rows) / rows for name, found in zip(some, reports, strict=True)}
    on_event(Progress("measuring whole mixes", len(wanted), len(wanted), "mixes"))

    def predicted(names: Sequence[str], label: str) -> float:
        return math.fsum(_cost(profile, name, label, rows) for name in names)

    best = _factor("all", largest, predicted(list(mixes["all", largest]), largest), measured["all", largest])
    factors = [replace(best, part=part) for part in parts]
    for (part, label), kl in measured.items():
        if label != largest:
            rest = [g.name for g in header.groups if g.name not in set(parts[part])]
            left = best.factor * predicted(rest, largest)
            factors.append(_factor(part, label, predicted(parts[part], label), kl - left))
    found = tuple(factors)
    write_checked_json(path, {"kind": KIND, "made_by": "recompile", "key": key, "factors": [asdict(f) for f in found]})
    return found


def corrected(profile: Profile, factors: Sequence[PartFactor]) -> Profile:
    """The profile with every cost of a part and source multiplied by its factor."""
    part_of = {name: part for part, names in parts_of(profile).items() for name in names}
    factor_of = {(f.part, f.source): f.factor for f in factors}
    measurements = {
        (group, source): replace(found, kl_rows=tuple(kl * factor_of[part_of[group], source] for kl in found.kl_rows))
        if (part_of.get(group), source) in factor_of
        else found
        for (group, source), found in profile.measurements.items()
    }
    return replace(profile, measurements=measurements)


def keep_corrected(path: Path, profile: Profile) -> Profile:
    """Append the corrected costs to the journal of the profile, whose later lines win."""
    with open_journal(path, profile.header) as journal:
        if journal.profile.measurements != profile.measurements:
            journal.append(profile.measurements.values())
        return journal.profile


def _cost(profile: Profile, group: str, label: str, rows: int) -> float:
    """Mean over the first rows, control taken off; the prior of an expert that no token reached counts nothing."""
    found = profile.measurements.get((group, label))
    if found is None or not found.reached:
        return 0.0
    control = profile.control.kl_rows if profile.control is not None else (0.0,) * len(found.kl_rows)
    return math.fsum(value - zero for value, zero in zip(found.kl_rows[:rows], control[:rows], strict=True)) / rows


def _factor(part: str, source: str, predicted: float, measured: float) -> PartFactor:
    ratio = measured / predicted if predicted > 0 else 1.0
    factor = min(max(ratio, RANGE[0]), RANGE[1])
    return PartFactor(part, source, predicted, measured, factor, factor != ratio)


def _key(profile: Profile, rows: int) -> str:
    costs = sorted([group, source, found.mean] for (group, source), found in profile.measurements.items())
    text = json.dumps([asdict(profile.header), rows, costs], default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(path: Path, key: str) -> tuple[PartFactor, ...] | None:
    if not path.exists():
        return None
    way_out = "remove it, the mixes are measured again"
    found: Any = read_checked_json(path, error=JournalError, way_out=way_out)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise JournalError(f"{path}: is not a file of measured whole mixes; move it away, its name is needed")
    if found.get("key") != key:
        return None
    try:
        return read_as(_Factors, {"factors": found.get("factors")}, str(path), error=JournalError).factors
    except JournalError as error:
        raise JournalError(f"{error}; {way_out}") from error


@dataclass(frozen=True)
class _Factors:
    factors: tuple[PartFactor, ...]
