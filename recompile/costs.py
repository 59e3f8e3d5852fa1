"""The Profile: what every (group, candidate) costs in KL and in bits, and the journal file it lives in.

`profile.jsonl` has one header line and one line per measurement, each with the KL of every row, so that statistics can
be redone. Lines are appended and flushed as they are measured; a line cut off by a crash is dropped when the file is
opened again. `eval` fills the table, `optimize` reads it. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from recompile.checkpoint.module_names import role_of
from recompile.errors import JournalError, NotFiniteError, RecompileError
from recompile.io.checksums import without_checksums
from recompile.io.files import open_regular, parse_json, read_bytes
from recompile.io.journal import LineJournal
from recompile.io.printable import printable
from recompile.io.schema import describe, read_as
from recompile.recipe.recipe import SourceId

JOURNAL_VERSION = 1
MOST_ROWS = 10_000_000
# KL is a difference of numbers of some nats; how far below 0 rounding them may take it.
KL_ROUNDING = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
LEVELS = ("layer", "block", "fused", "expert", "tensor")

# Projections that engines fuse into one matrix and that therefore share a scheme; read by the level "fused".
FUSED_SETS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})  # never in one group with what they route to


@dataclass(frozen=True)
class ProfileGroup:
    """Modules that are swapped together, and what each candidate stores them in."""

    name: str
    modules: tuple[str, ...]
    weights: int
    bits: Mapping[str, int]  # candidate label -> stored bits of all modules, scales and biases included
    layer: int | None  # index of the layer it belongs to; None for the head and the embedding


@dataclass(frozen=True)
class Candidate:
    """One source that is offered to every group."""

    id: SourceId
    model_dir: str
    fingerprint: str
    spec: Mapping[str, Any] | None = None  # made on the fly: how, as in a recipe; model_dir then only describes it
    feedback: bool = False  # of one made on the fly: rounded with error feedback, beside the profile

    @property
    def label(self) -> str:
        """The id as a JSON key; ids of different types never share one."""
        return candidate_label(self.id)


@lru_cache(maxsize=1024, typed=True)  # 1, 1.0 and true are equal and have labels of their own
def candidate_label(source_id: SourceId) -> str:
    """The id as text: as it is, or as JSON where it is no text or looks like a number."""
    return source_id if isinstance(source_id, str) and not _looks_like_number(source_id) else json.dumps(source_id)


def _looks_like_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?\d+(\.\d+)?", text) is not None or text in ("true", "false", "null")


def id_of_directory(model_dir: str) -> SourceId:
    """`./4bpw` -> 4, `out/2.5bpw` -> 2.5, anything else -> its last name: what a recipe's author would write."""
    name = os.path.basename(os.path.normpath(model_dir))
    found = re.fullmatch(r"(\d+(?:\.\d+)?)bpw", name)
    if found is None:
        return name
    return float(found[1]) if "." in found[1] else int(found[1])


@dataclass(frozen=True)
class ProfileHeader:
    """What was measured, with what; a journal is only continued by a run with an equal header."""

    method: str  # "exact": swaps run one by one; "sketch", "diagonal", "hybrid": estimated by eval.profile.sketch
    context: str  # "clean": swapped into the reference; "base": into the base variant
    level: str
    reference: str  # model directory
    reference_fingerprint: str
    base: str  # label of the candidate that the recipe starts from (-i)
    candidates: tuple[Candidate, ...]
    groups: tuple[ProfileGroup, ...]
    fixed_bits: int  # stored bits of quantized modules that are in no group, as in the base variant
    fixed_weights: int
    other_bits: int  # everything else in the base variant: embedding, head, norms
    other_weights: int
    rows: int
    row_tokens: int
    rows_sha256: str
    rows_source: str
    dtype: str
    device: str
    versions: Mapping[str, str] = field(default_factory=dict)
    version: int = JOURNAL_VERSION
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the method: seed, draws, ...
    rows_role: str = ""  # which part of a text or trace the rows are; "" in profiles of earlier versions
    positions: str = "all"  # of a trace: "response" where only predictions of what the model wrote are counted
    documents: tuple[str, ...] = ()  # of every row

    @cached_property
    def group_weights(self) -> int:
        return sum(group.weights for group in self.groups)

    def candidate(self, label: str) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.label == label)


@dataclass(frozen=True)
class Measurement:
    """KL(reference || context with one group swapped) of every row, nats per token. group None: nothing swapped.

    Raises NotFiniteError for a KL that is NaN or infinite: a profile holds numbers only.
    reached False: an expert to which the router sent no token of these rows, so that kl_rows says nothing of its cost.
    """

    group: str | None
    source: str | None  # candidate label
    kl_rows: tuple[float, ...]
    reached: bool = True

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.kl_rows)):
            row = next(number for number, value in enumerate(self.kl_rows) if not math.isfinite(value))
            raise NotFiniteError(
                self.described,
                f"its KL is {self.kl_rows[row]}; use a wider {{dtype}}, and measure it again",
                row,
            )

    @property
    def described(self) -> str:
        return f"{self.group} from {self.source}" if self.group is not None else "the model with nothing swapped"

    def check_sign(self, dtype: str) -> None:
        """Raise NotFiniteError for a KL below 0 by more than arithmetic in `dtype` explains."""
        lowest = min(self.kl_rows, default=0.0)
        if lowest < -KL_ROUNDING.get(dtype, max(KL_ROUNDING.values())):
            row = self.kl_rows.index(lowest)
            raise NotFiniteError(
                self.described,
                f"its KL is {lowest:.6g} nats a token, and no KL is below 0; it was measured wrong or changed since: "
                f"measure it again",
                row,
            )

    @property
    def mean(self) -> float:
        return math.fsum(self.kl_rows) / len(self.kl_rows) if self.kl_rows else math.nan


@dataclass(frozen=True)
class Cost:
    """What a swap adds to the context's own KL: mean over rows and the standard error of it (paired by row).

    is_prior: not measured, but guessed from the same projection of experts that tokens did reach.
    """

    kl_nats: float
    std_error: float
    is_prior: bool = False


@dataclass(frozen=True)
class Profile:
    """What was measured of every swap: the header, the control and one measurement a (group, candidate)."""

    header: ProfileHeader
    control: Measurement | None  # nothing swapped
    measurements: Mapping[tuple[str, str], Measurement]  # (group, candidate label)

    def cost(self, group: str, source: str) -> Cost | None:
        """The cost of a swap over the control; None where it was not measured.

        An expert that no token reached has the prior of `prior`; without one it counts as not measured.
        """
        found = self.measurements.get((group, source))
        if found is None:
            if self.header.context == "base" and source == self.header.base:
                return Cost(0.0, 0.0)
            return None
        return self._measured_cost(found) if found.reached else self.prior(group, source)

    def prior(self, group: str, source: str) -> Cost | None:
        """What an expert costs as far as similar experts tell: the median over the experts of the same layer,
        projection and candidate that tokens reached, else over those of all layers; as doubtful as they are spread, or
        as it is large.
        """
        similar = similar_experts(group)
        for key in (similar, similar.rpartition(".")[2]):
            costs = self._costs_of_similar.get((key, source))
            if costs:
                middle = statistics.median(costs)
                return Cost(middle, max(statistics.pstdev(costs), abs(middle)), is_prior=True)
        return None

    @cached_property
    def _costs_of_similar(self) -> Mapping[tuple[str, str], list[float]]:
        """Measured costs of experts by (projection in its layer, candidate) and (projection anywhere, candidate)."""
        found: dict[tuple[str, str], list[float]] = {}
        for (group, source), measurement in self.measurements.items():
            if measurement.reached and is_expert(group):
                similar = similar_experts(group)
                for key in (similar, similar.rpartition(".")[2]):
                    found.setdefault((key, source), []).append(self._measured_cost(measurement).kl_nats)
        return found

    def _measured_cost(self, found: Measurement) -> Cost:
        base = self.control.kl_rows if self.control is not None else (0.0,) * len(found.kl_rows)
        differences = [value - zero for value, zero in zip(found.kl_rows, base, strict=True)]
        rows = len(differences)
        mean = math.fsum(differences) / rows
        if rows < 2:
            return Cost(mean, math.inf)
        variance = math.fsum((value - mean) ** 2 for value in differences) / (rows - 1)
        return Cost(mean, math.sqrt(variance / rows))

    def unreached(self) -> list[str]:
        """Groups that no token of the rows reached, in the order of the groups."""
        return [
            group.name
            for group in self.header.groups
            if any(
                found is not None and not found.reached
                for found in (self.measurements.get((group.name, source)) for source in group.bits)
            )
        ]

    def as_dict(self) -> dict[str, object]:
        """Per group and candidate the cost and the bits, as `model_profile --json` has them."""
        unreached = set(self.unreached())
        groups = [
            {
                "name": group.name,
                "weights": group.weights,
                "bits": dict(group.bits),
                "costs": {source: self.cost(group.name, source) for source in group.bits},
                "reached": group.name not in unreached,
            }
            for group in self.header.groups
        ]
        control = self.control.mean if self.control is not None else None
        return {"header": self.header, "control_kl_nats": control, "groups": groups}

    @property
    def is_complete(self) -> bool:
        return not self.missing()

    def missing(self) -> list[tuple[str, str]]:
        """Swaps that are not measured yet, in the order of the groups."""
        return [
            (group.name, source)
            for group in self.header.groups
            for source in group.bits
            if (group.name, source) not in self.measurements
            and not (self.header.context == "base" and source == self.header.base)
        ]

    @property
    def counted_weights(self) -> int:
        """Weights that bits per weight is over: all quantized modules, in groups or not."""
        return self.header.group_weights + self.header.fixed_weights


# ---- grouping ------------------------------------------------------------------------------------------------------


def group_name(module: str, level: str) -> str:
    """The group that a module falls in at a level.

    layer:  model.layers.3
    block:  model.layers.3.self_attn, model.layers.3.mlp; the experts of a layer, shared experts, routers each apart
    fused:  model.layers.3.self_attn.q_proj+k_proj+v_proj; the same projections of all experts of a layer together
    expert: as fused, but every matrix of every expert by itself: model.layers.3.mlp.experts.7.up_proj
    tensor: the module itself
    """
    found = re.match(r"^(.*?\.\d+)\.(.+)$", module)
    if level == "tensor" or found is None or role_of(module) != "layer":
        return module
    layer, tail = found[1], found[2]
    if level == "layer":
        return layer
    names = tail.split(".")
    leaf = names[-1]
    block = kind_of(tail.rpartition(".")[0])
    if level == "expert" and is_expert(module):
        return module
    if level == "block" and leaf in ROUTERS:
        return module
    if level == "block":
        return f"{layer}.{block}" if block else f"{layer}.{leaf}"
    together = next((members for members in FUSED_SETS if leaf in members), (leaf,))
    return ".".join(filter(None, (layer, block, "+".join(together))))


def is_expert(module: str) -> bool:
    """Whether a module belongs to one routed expert: `...experts.7.up_proj`, not `...shared_experts.up_proj`."""
    return re.search(r"\.experts\.\d+(\.|$)", module) is not None


def similar_experts(module: str) -> str:
    """The same projection of any expert of the layer: `...experts.7.up_proj` -> `...experts.*.up_proj`."""
    return re.sub(r"(\.experts)\.\d+(?=\.|$)", r"\1.*", module)


def fused_sets(modules: Iterable[str]) -> list[tuple[str, ...]]:
    """Modules that engines run as one matrix together; others alone."""
    sets: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        together = next((members for members in FUSED_SETS if leaf in members), (leaf,))
        sets.setdefault((parent, together), []).append(name)
    return [tuple(members) for members in sets.values()]


def kind_of(name: str) -> str:
    """A name without its numbers: the same for all layers (and experts)."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def layer_index(name: str) -> int | None:
    """`model.layers.3.mlp.up_proj` -> 3; None for the head, the embedding and names without a number."""
    found = re.match(r"^.*?\.(\d+)(\.|$)", name)
    return int(found[1]) if found and role_of(name) == "layer" else None


# ---- the journal ---------------------------------------------------------------------------------------------------


class Journal:
    """An open profile.jsonl. `append` writes and flushes measurements; `profile` is all there are so far."""

    def __init__(self, path: Path, profile: Profile, lines: LineJournal) -> None:
        self.path, self.header, self._lines = path, profile.header, lines
        self._profile: Profile | None = profile  # None: to be built when it is asked for
        self._found = dict(profile.measurements)
        self._control = profile.control

    @property
    def profile(self) -> Profile:
        """Every measurement so far; what is appended later does not change it."""
        if self._profile is None:
            self._profile = Profile(self.header, self._control, dict(self._found))
        return self._profile

    def append(self, measurements: Iterable[Measurement]) -> None:
        """Add measurements; on disk when this returns. Raises JournalError where the disk refuses, NotFiniteError for
        a KL that is none, which is never written."""
        lines: list[dict[str, Any]] = []
        measurements = list(measurements)
        for found in measurements:
            found.check_sign(self.header.dtype)
        for found in measurements:
            lines.append(_as_line(found))
            if found.group is None or found.source is None:
                self._control = found
            else:
                self._found[(found.group, found.source)] = found
        self._lines.append(*lines)
        self._profile = None

    def held(self, measurements: Iterable[Measurement]) -> bool:
        """Whether all of these were lines of the journal when it was opened, whatever later lines say."""
        lines = set(self._lines.lines)
        return all(json.dumps(_as_line(found)).encode() in lines for found in measurements)

    def keep(self) -> None:
        """See LineJournal.keep."""
        self._lines.keep()

    def close(self) -> None:
        self._lines.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *failed: Any) -> None:
        self._lines.__exit__(*failed)


def _as_line(found: Measurement) -> dict[str, Any]:
    line = {"group": found.group, "source": found.source, "kl_rows": found.kl_rows}
    return line if found.reached else {**line, "reached": False}


def open_journal(path: Path, header: ProfileHeader) -> Journal:
    """Create a journal, or go on with one that has the same header.

    Raises JournalError where the header differs (naming the fields), a line is damaged, or another process writes it.
    """
    journal = LineJournal(path)
    try:
        if not journal.lines and journal.torn_bytes:
            raise JournalError(f"{path}: has no whole header line; not a profile, or cut off at once: remove it")
        if not journal.lines:
            journal.begin(_header_as_dict(header))
            return Journal(path, Profile(header, None, {}), journal)
        profile = _parse(path, journal.lines)
        changed = header_difference(profile.header, header)
        if changed:
            raise JournalError(
                f"{path}: is the journal of another measurement: {'; '.join(changed)}; "
                f"choose another {{out}}, or remove it to start again"
            )
        journal.drop_torn()
        return Journal(path, profile, journal)
    except BaseException:
        journal.close()
        raise


def load_profile(path: Path) -> Profile:
    """Read a profile, finished or not. Raises JournalError."""
    lines = read_bytes(path, kind="journal", error=JournalError).split(b"\n")
    torn = lines.pop()
    if not lines:
        raise JournalError(f"{path}: has no whole header line; not a profile, or cut off at once: remove it")
    if torn:
        raise JournalError(
            f"{path}:{len(lines) + 1}: the last line was cut off; run the same model_profile command, it goes on from "
            f"the line before"
        )
    return _parse(path, without_checksums(path, lines, JournalError)[0])


def load_header(path: Path) -> ProfileHeader | None:
    """The header of a profile alone, whatever comes after it; None where a crash cut it off. Raises JournalError."""
    with open_regular(path, kind="journal", error=JournalError) as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        return None
    return _parse_header(path, without_checksums(path, [line[:-1]], JournalError)[0][0])


def _header_as_dict(header: ProfileHeader) -> dict[str, Any]:
    return {"kind": "recompile-profile", **asdict(header)}


def _parse(path: Path, lines: Sequence[bytes]) -> Profile:
    header = _parse_header(path, lines[0])
    control: Measurement | None = None
    found: dict[tuple[str, str], Measurement] = {}
    labels = {group.name: set(group.bits) for group in header.groups}
    for number, line in enumerate(lines[1:], start=2):
        measurement = _parse_line(path, number, line, header)
        if measurement.group is None or measurement.source is None:
            control = measurement
        elif measurement.source not in labels.get(measurement.group, ()):
            raise JournalError(
                f'{path}:{number}: measures "{measurement.group}" from "{measurement.source}", which the header '
                f"does not know"
            )
        else:
            found[(measurement.group, measurement.source)] = measurement
    return Profile(header, control, found)


@dataclass(frozen=True)
class _Line:
    """A measurement as a line of a journal holds it."""

    group: str | None
    source: str | None
    kl_rows: tuple[float, ...]
    reached: bool = True


def _parse_json(path: Path, line: bytes, number: int) -> Any:
    try:
        return parse_json(line, str(path), error=JournalError, line=number)
    except JournalError as error:
        raise JournalError(f"{error}; is it a profile? A damaged one is removed and made again") from error


def _parse_header(path: Path, line: bytes) -> ProfileHeader:
    place = f"{path}:1"
    content = _parse_json(path, line, 1)
    if not isinstance(content, dict) or content.pop("kind", None) != "recompile-profile":
        raise JournalError(f"{place}: not a profile made by model_profile")
    if content.get("version") != JOURNAL_VERSION:
        raise JournalError(
            f"{place}: is a profile of version {describe(content.get('version'))}, this program reads {JOURNAL_VERSION}"
        )
    header = read_as(ProfileHeader, content, place, error=JournalError)
    labels = [candidate.label for candidate in header.candidates]
    for what, names in (
        ("candidates", labels),
        ("groups", [group.name for group in header.groups]),
        ("modules of groups", [module for group in header.groups for module in group.modules]),
    ):
        if not names and what != "modules of groups":
            raise JournalError(f"{place}: has no {what}")
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise JournalError(f'{place}: two {what} are "{printable(twice)[:80]}"')
    if header.base not in labels:
        raise JournalError(
            f'{place}: base "{printable(header.base)[:80]}" is none of its candidates: {", ".join(labels)}'
        )
    if not 1 <= header.rows <= MOST_ROWS:
        raise JournalError(f"{place}: rows is {header.rows}, wanted 1 to {MOST_ROWS}")
    known = set(labels)
    for group in header.groups:
        strange = group.bits.keys() - known
        if strange or not group.bits:
            which = f'"{printable(min(strange))[:80]}", which is no candidate' if strange else "no candidate"
            raise JournalError(f'{place}: group "{printable(group.name)[:80]}" has bits of {which}')
    return header


def _parse_line(path: Path, number: int, line: bytes, header: ProfileHeader) -> Measurement:
    place = f"{path}:{number}"
    found = read_as(_Line, _parse_json(path, line, number), place, error=JournalError)
    try:
        measurement = Measurement(found.group, found.source, found.kl_rows, found.reached)
        measurement.check_sign(header.dtype)
    except NotFiniteError as error:
        raise JournalError(f"{place}: {error}") from error
    if len(measurement.kl_rows) != header.rows:
        raise JournalError(f"{place}: has {len(measurement.kl_rows)} rows, the header says {header.rows}")
    return measurement


def header_difference(old: ProfileHeader, new: ProfileHeader) -> list[str]:
    """Fields in which two headers differ, in words. Directories may be spelled differently: fingerprints count."""
    before, after = _comparable(old), _comparable(new)
    changed = [key for key in before if before[key] != after[key]]
    words = {key: f"{key} was {_short(before[key])}, is {_short(after[key])}" for key in changed}
    if "reference_fingerprint" in words:
        words["reference_fingerprint"] = (
            f"{new.reference} is another model, or its config or tensors were changed since"
        )
    offered = [[candidate.label for candidate in header.candidates] for header in (old, new)]
    if "candidates" in words and offered[0] == offered[1]:
        pairs = zip(old.candidates, new.candidates, strict=True)
        others = [now.model_dir for then, now in pairs if then.fingerprint != now.fingerprint]
        words["candidates"] = f"{', '.join(others)}: other models, or their config or tensors were changed since"
    return list(words.values())


def _comparable(header: ProfileHeader) -> dict[str, Any]:
    values = json.loads(json.dumps(_header_as_dict(header)))
    for key in ("kind", "reference", "rows_source", "rows_role", "documents"):  # rows are told apart by their hash
        values.pop(key)
    values["candidates"] = [[entry["id"], entry["fingerprint"]] for entry in values["candidates"]]
    return dict(values)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Raise RecompileError where two candidates share an id."""
    seen: dict[str, str] = {}
    for candidate in candidates:
        if candidate.label in seen:
            raise RecompileError(
                f"{candidate.model_dir} and {seen[candidate.label]} would both be source {candidate.label}; "
                f"give one an id of its own: {{sources}} ID={candidate.model_dir}"
            )
        seen[candidate.label] = candidate.model_dir


def uniform_candidate(profile: Profile, budget_bits: int) -> tuple[Candidate, bool]:
    """The largest candidate that modules all together may be made of within `budget_bits`, or the smallest there is;
    whether it is within."""
    header = profile.header
    totals = {candidate.label: bits_of_uniform(profile, candidate.label) for candidate in header.candidates}
    fitting = [label for label, total in totals.items() if total <= budget_bits]
    found = max(fitting, key=lambda x: totals[x]) if fitting else min(totals, key=lambda x: totals[x])
    return header.candidate(found), bool(fitting)


def bits_of_uniform(profile: Profile, label: str) -> int:
    """Stored bits of quantized modules."""
    return profile.header.fixed_bits + sum(group.bits[label] for group in profile.header.groups)
