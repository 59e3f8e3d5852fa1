"""What a report shows, as one value: a profile, what was measured beside it, and recipes to compare with.

Reads JSON reports of `model_diff` and `model_optimize` and turns them into dataclasses. Imports no torch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.report.shapes import NUMBER, REPORT, check_shape
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import Profile, load_header, load_profile
from recompile.errors import MismatchError, RecompileError
from recompile.io.files import read_json
from recompile.io.report import role_in_words
from recompile.merge.overlay import account, quantizable
from recompile.optimize.choose import predict
from recompile.recipe.recipe import Recipe, load_recipe, parse_recipe

# Ends of tensor names, since keys match tensors and a profile names modules. One of the builds' kinds always fits.
TENSOR_ENDINGS = ("weight", "weight_packed", "qweight", "q_weight", "trellis", "weight_scale", "bias")

GROUPS_SHOWN = 600  # of an attribution, the most expensive first


@dataclass(frozen=True)
class Drift:
    """The hidden state after one stage, against the reference's."""

    name: str
    sqnr_db: float | None  # None: the states are equal
    cosine_error: float | None
    relative_error: float | None


@dataclass(frozen=True)
class CacheKl:
    """A build through one quantized cache."""

    name: str
    engine: str
    bits: float  # a value, scales included
    bytes_per_token: float
    kl: float  # nats per token
    std_error: float | None
    difference: float  # from the build's KL in the same report, paired over rows
    difference_error: float | None
    p99: float | None
    same_top: float


@dataclass(frozen=True)
class Measured:
    """One build or recipe whose KL was measured by running it."""

    name: str
    kl_nats: float  # KL(reference || candidate), nats per token
    std_error: float | None
    bpw: float | None  # over quantized modules; None where the report does not say
    total_bytes: int | None
    head_bpw: float | None  # None: tied to the embedding, or the report does not say
    embedding_bpw: float | None
    noise_floor: float | None  # KL of the reference against itself, run in another shape
    rows: int
    row_tokens: int
    rows_source: str  # and the role
    rows_sha256: str
    perplexity: float | None
    same_top_token: float | None  # share of tokens
    delta_p_rms: float | None  # root mean square change of the probability of the text's tokens
    sure_flips: float | None  # share of tokens with another top token, of those the reference was sure of
    divergence_median: float | None  # tokens of greedy runs before the first other one; None: not measured
    kl_rows: tuple[float, ...]  # row means
    quantiles: Mapping[str, float | None]
    histogram: Mapping[str, Any] | None
    confidence: tuple[Mapping[str, Any], ...]
    drift: tuple[Drift, ...]
    by_origin: tuple[Mapping[str, Any], ...] = ()  # slices as the report has them
    by_position: tuple[Mapping[str, Any], ...] = ()
    divergence: Mapping[str, Any] | None = None  # of greedy runs: prompts, median, survival
    cache_sweep: tuple[CacheKl, ...] = ()
    attribution: Mapping[str, Any] | None = None  # level, groups with KL and noise, totals
    uniform: str | None = None  # candidate label, where this is one of the profile's candidates alone
    choice: Mapping[str, str] | None = None  # group -> candidate label; None where it cannot be told
    predicted_kl_nats: float | None = None
    predicted_std_error: float | None = None
    note: str = ""  # why there is no prediction
    reference_perplexity: float | None = None  # on the same rows, in the run that measured the build


@dataclass(frozen=True)
class Preset:
    """A recipe to compare with that nobody has measured here: predicted only."""

    name: str
    choice: Mapping[str, str]
    bits: int
    predicted_kl_nats: float
    predicted_std_error: float | None


@dataclass(frozen=True)
class Build:
    """A directory named by --variants: its size, from its headers."""

    name: str
    bpw: float
    total_bytes: int


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows: a profile, what was measured, recipes and builds."""

    title: str
    profile: Profile
    profile_name: str
    measured: tuple[Measured, ...] = ()
    presets: tuple[Preset, ...] = ()
    builds: tuple[Build, ...] = ()
    start_bits: int = 0  # the budget that the explorer opens with, stored bits of quantized modules
    notes: tuple[str, ...] = field(default=())

    def bits_of(self, choice: Mapping[str, str]) -> int:
        """Stored bits of quantized modules under a choice, what is in no group included."""
        header = self.profile.header
        return header.fixed_bits + sum(group.bits[choice[group.name]] for group in header.groups)

    def bpw(self, bits: int) -> float:
        return bits / max(1, self.profile.counted_weights)

    def total_bytes(self, bits: int) -> int:
        return (bits + self.profile.header.other_bits) // 8

    def uniform(self, label: str) -> dict[str, str] | None:
        """Every group from one candidate; None where a group does not offer it."""
        groups = self.profile.header.groups
        return {group.name: label for group in groups} if all(label in group.bits for group in groups) else None


def gather(
    profile_path: Path,
    reports: Sequence[Path] = (),
    variants: Sequence[Path] = (),
    recipes: Sequence[Path] = (),
    title: str | None = None,
    start_bpw: float | None = None,
) -> ReportData:
    """Read everything that a report shows.

    reports: files of `model_diff --json` or `model_optimize --json`. recipes: override files to show as predicted
    points. Raises JournalError and RecompileError naming the file.
    """
    profile = load_profile(profile_path)
    missing = profile.missing()
    if missing:
        raise RecompileError(
            f"{profile_path}: the profile is unfinished: {len(missing)} swaps are not measured, first {missing[0][0]} "
            f"from {missing[0][1]}; run the same model_profile command to go on"
        )
    if not profile.header.groups:
        raise RecompileError(f"{profile_path}: the profile has no group; there is nothing to show")
    builds = tuple(_build(path) for path in variants)
    notes: list[str] = []
    measured = []
    for path in reports:
        for found in read_reports(path, profile, builds):
            if found is None:
                notes.append(f"{path.name}: a recipe without a measured KL (model_optimize --check measures it)")
            else:
                measured.append(found)
    same = [one.name for one in measured if one.rows_sha256 and one.rows_sha256 == profile.header.rows_sha256]
    if same:
        raise MismatchError(
            f"{same[0]} was measured on the rows that {profile_path.name} was made of; a row has one role: measure it "
            f"on others (model_diff takes those of the role report)"
        )
    _check_one_reference(measured)
    if len({one.rows_sha256 for one in measured}) > 1:
        notes.append("The measured builds did not all run on the same rows: compare their KL with care.")
    presets = tuple(_preset(load_recipe(path), path.name, profile) for path in recipes)
    reference = os.path.basename(os.path.normpath(profile.header.reference)) or profile.header.reference
    data = ReportData(title or reference, profile, profile_path.name, tuple(measured), presets, builds, 0, tuple(notes))
    return _with_start(data, start_bpw)


SAME_PERPLEXITY = 0.02  # relative; what types and shapes of arithmetic move is far less


def _check_one_reference(measured: Sequence[Measured]) -> None:
    """Raise MismatchError where builds were measured against different references, which their perplexities on the same
    rows tell apart; of other rows nothing does."""
    first: dict[str, Measured] = {}
    for one in measured:
        other = first.setdefault(one.rows_sha256, one)
        ours, theirs = one.reference_perplexity, other.reference_perplexity
        if ours is not None and theirs is not None and abs(ours - theirs) > SAME_PERPLEXITY * theirs:
            raise MismatchError(
                f"{other.name} and {one.name} were measured against two references: on the same rows one has a "
                f"perplexity of {theirs:.4g}, the other of {ours:.4g}; give reports of one base"
            )


def _with_start(data: ReportData, start_bpw: float | None) -> ReportData:
    """Open with the asked size, or that of the first measured mix, or half way from the base to the next candidate."""
    from dataclasses import replace

    header = data.profile.header
    fewest = header.fixed_bits + sum(min(group.bits.values()) for group in header.groups)
    most = header.fixed_bits + sum(max(group.bits.values()) for group in header.groups)
    if start_bpw is not None:
        bits = math.floor(start_bpw * data.profile.counted_weights + 1e-6)
        if not fewest <= bits <= most:
            raise RecompileError(
                f"{{bits}} {start_bpw:g}: out of reach; these sources make {data.bpw(fewest):.4f} to "
                f"{data.bpw(most):.4f} bpw"
            )
        return replace(data, start_bits=bits)
    mixes = [one.choice for one in data.measured if one.choice is not None and one.uniform is None]
    if mixes:
        return replace(data, start_bits=data.bits_of(mixes[0]))
    uniforms = [data.uniform(candidate.label) for candidate in header.candidates]
    sizes = sorted({data.bits_of(choice) for choice in uniforms if choice is not None})
    base = data.uniform(header.base)
    here = data.bits_of(base) if base is not None else fewest
    above = [size for size in sizes if size > here]
    return replace(data, start_bits=(here + above[0]) // 2 if above else (fewest + most) // 2)


def _build(path: Path) -> Build:
    checkpoint = open_checkpoint(path)
    size = account(checkpoint.modules.values(), quantizable([checkpoint]))
    return Build(os.path.basename(os.path.normpath(path)), size.bpw, size.total_bytes)


# ---- JSON reports --------------------------------------------------------------------------------------------------


def read_reports(path: Path, profile: Profile, builds: Sequence[Build] = ()) -> list[Measured | None]:
    """What a file of `--json` measured: one build, or as many as `model_diff` compared in one run."""
    content = _json_of(path)
    if isinstance(content, dict) and isinstance(content.get("candidates"), list):
        return [_read(one, path, profile, builds) for one in content["candidates"]]
    return [_read(content, path, profile, builds)]


def read_report(path: Path, profile: Profile, builds: Sequence[Build] = ()) -> Measured | None:
    """A report of `model_diff --json` or `model_optimize --check --json`; None for a recipe that was not measured.

    Raises RecompileError for any other file.
    """
    return _read(_json_of(path), path, profile, builds)


def _json_of(path: Path) -> Any:
    try:
        return read_json(path, error=RecompileError)
    except RecompileError as error:
        if not _is_profile(path):
            raise
        raise RecompileError(
            f"{path}: is a profile, and a page is of one; wanted reports of model_diff --json or model_optimize --json "
            f"after it"
        ) from error


def _is_profile(path: Path) -> bool:
    try:
        return load_header(path) is not None
    except RecompileError:
        return False


def _read(content: Any, path: Path, profile: Profile, builds: Sequence[Build]) -> Measured | None:
    if not isinstance(content, dict):
        raise RecompileError(f"{path}: is not a report of model_diff --json or model_optimize --json")
    try:
        if isinstance(content.get("measured", content), dict):
            check_shape(content.get("measured", content), REPORT, "measured" if "measured" in content else "")
        if "choice" in content and "budget_bits" in content:
            check_shape(content, {"bpw": NUMBER, "total_bytes": NUMBER, "choice": {}}, "")
    except ValueError as error:
        raise RecompileError(f"{path}: {error}; make the report again") from error
    try:
        if "kl_by_confidence" in content:
            return _read_diff(content, path, profile, builds)
        if "choice" in content and "budget_bits" in content:
            return _read_optimized(content, path, profile)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecompileError(
            f"{path}: an incomplete report, at {error}; make it again with the same command"
        ) from error
    raise RecompileError(f"{path}: is not a report of model_diff --json or model_optimize --json")


def _read_optimized(content: Mapping[str, Any], path: Path, profile: Profile) -> Measured | None:
    if content.get("measured") is None:
        return None
    choice = {str(group): str(source) for group, source in content["choice"].items()}
    labels = {group.name: set(group.bits) for group in profile.header.groups}
    if set(choice) != set(labels) or any(source not in labels[group] for group, source in choice.items()):
        raise RecompileError(
            f"{path}: its choice is not over the groups of this profile; give the profile it came from"
        )
    size = {"bpw": content["bpw"], "total_bytes": content["total_bytes"]}
    return _measured(content["measured"], f"mix at {content['bpw']:.2f} bpw", size, choice, profile, "")


def _read_diff(content: Mapping[str, Any], path: Path, profile: Profile, builds: Sequence[Build]) -> Measured:
    label = str(content["candidate"])
    directory = str(content.get("candidate_dir") or label)
    base = _label_of(directory, profile)
    size = content.get("size")
    if size is None:
        known = {build.name: {"bpw": build.bpw, "total_bytes": build.total_bytes} for build in builds}
        size = known.get(os.path.basename(os.path.normpath(directory)))
    choice, note = None, ""
    if content.get("recipe"):
        name = str(content.get("recipe_name") or "recipe")
        if base is None:
            note = f"{directory} is none of the profile's sources"
        else:
            try:
                choice = choice_of(parse_recipe(content["recipe"], name), profile, base)
            except RecompileError as error:
                note = str(error)
        name = Path(name).stem
    else:
        name = f"uniform {base}" if base is not None else os.path.basename(os.path.normpath(label)) or label
        if base is not None:
            choice = {group.name: base for group in profile.header.groups if base in group.bits}
            choice = choice if len(choice) == len(profile.header.groups) else None
        else:
            note = f"{directory} is none of the profile's sources"
    cache = content.get("cache")
    if cache:
        name = f"{name}, cache {cache['name']}"
        note = note or "the prediction is of weights alone"
    found = _measured(content, name, size, choice if not cache else None, profile, note)
    if content.get("recipe") or base is None or cache:
        return found
    from dataclasses import replace

    return replace(found, uniform=base)


def _measured(
    report: Mapping[str, Any],
    name: str,
    size: Mapping[str, Any] | None,
    choice: Mapping[str, str] | None,
    profile: Profile,
    note: str,
) -> Measured:
    mean, error = predict(profile, choice) if choice is not None else (None, None)
    agree = report.get("top_k_agreement") or ()
    return Measured(
        name=name,
        kl_nats=float(report["kl"]["mean"]),
        std_error=report["kl"]["std_error"],
        bpw=size["bpw"] if size else None,
        total_bytes=int(size["total_bytes"]) if size else None,
        head_bpw=_inner(size, "head_bpw") if size else None,
        embedding_bpw=_inner(size, "embedding_bpw") if size else None,
        noise_floor=_inner(report, "noise_floor"),
        rows=int(report["rows"]),
        row_tokens=int(report["row_tokens"]),
        rows_source=str(report["rows_source"])
        + role_in_words(str(report.get("rows_role", "")), str(report.get("positions", "all"))),
        rows_sha256=str(report["rows_sha256"]),
        perplexity=report["score_candidate"]["perplexity"],
        same_top_token=agree[0]["mean"] if agree else None,
        delta_p_rms=_inner(report, "delta_p", "rms", "mean"),
        sure_flips=_inner(report, "sure_flips", "share", "mean"),
        divergence_median=_inner(report, "divergence", "median"),
        kl_rows=tuple(float(value) for value in report.get("kl_rows") or ()),
        quantiles=dict(report["kl_quantiles"]),
        histogram=report.get("kl_histogram"),
        confidence=tuple(report["kl_by_confidence"]),
        drift=tuple(
            Drift(
                str(layer["name"]),
                layer["drift"]["sqnr_db"],
                layer["drift"]["cosine_error"],
                layer["drift"]["relative_error"],
            )
            for layer in report["layers"]
        ),
        by_origin=tuple(report.get("by_origin") or ()),
        by_position=tuple(report.get("by_position") or ()),
        divergence=_divergence(report.get("divergence")),
        cache_sweep=tuple(_cache_kl(point) for point in report.get("cache_sweep") or ()),
        attribution=_attribution(report.get("attribution")),
        choice=choice,
        predicted_kl_nats=mean,
        predicted_std_error=error,
        note=note,
        reference_perplexity=_inner(report, "score_reference", "perplexity"),
    )


def _divergence(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    keys = ("prompts", "new_tokens", "median", "survival")
    return {key: found[key] for key in keys} if found and found.get("survival") else None


def _cache_kl(point: Mapping[str, Any]) -> CacheKl:
    cache = point["cache"]
    return CacheKl(
        name=str(cache["name"]),
        engine=str(cache["engine"]),
        bits=(float(cache["key_bits"]) + float(cache["value_bits"])) / 2,
        bytes_per_token=float(cache["bytes_per_token"]),
        kl=float(point["kl"]["mean"]),
        std_error=point["kl"]["std_error"],
        difference=float(point["difference"]["mean"]),
        difference_error=point["difference"]["std_error"],
        p99=point["kl_quantiles"]["p99"],
        same_top=float(point["same_top"]["mean"]),
    )


def _attribution(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of it: the most expensive groups, means alone."""
    if not found:
        return None
    groups = [
        {
            "group": str(each["group"]),
            "bits_per_weight": float(each["bits_per_weight"]),
            "relative_error": float(each["relative_error"]),
            "kl": float(each["kl"]["mean"]),
            "noise": float(each["noise"]["mean"]) if each["noise"] is not None else None,
        }
        for each in found["groups"][:GROUPS_SHOWN]
    ]
    noise = found["total_noise"]
    return {
        "level": str(found["level"]),
        "groups": groups,
        "total": float(found["total"]["mean"]),
        "total_noise": float(noise["mean"]) if noise is not None else None,
    }


def _inner(report: Mapping[str, Any], *names: str) -> float | None:
    """A number within a report; None where a version of the tool did not write it."""
    found: Any = report
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return float(found) if found is not None else None


# ---- recipes over the groups of a profile ----------------------------------------------------------------------------


def _label_of(directory: str, profile: Profile) -> str | None:
    """The candidate that a directory is: the same path as written, or the same last name where one only has it."""
    candidates = profile.header.candidates
    same = [one.label for one in candidates if os.path.normpath(one.model_dir) == os.path.normpath(directory)]
    if not same:
        last = os.path.basename(os.path.normpath(directory))
        same = [one.label for one in candidates if os.path.basename(os.path.normpath(one.model_dir)) == last]
    return same[0] if len(same) == 1 else None


def choice_of(recipe: Recipe, profile: Profile, base: str) -> dict[str, str]:
    """group -> candidate label, as the recipe over the candidate `base` decides.

    Raises RecompileError for a directory that is no candidate, a group whose modules part, or a source that a group
    does not offer: such a recipe cannot be predicted from this profile.
    """
    labels: dict[str | None, str | None] = {None: base}
    choice: dict[str, str] = {}
    for group in profile.header.groups:
        found = {_directory(recipe, module) for module in group.modules}
        for directory in found - labels.keys():
            labels[directory] = _label_of(str(directory), profile)
        sources = {labels[directory] for directory in found}
        unknown = next((directory for directory in found if labels[directory] is None), None)
        if unknown is not None:
            raise RecompileError(f"{recipe.name}: {unknown} is none of the profile's sources; no prediction")
        if len(sources) > 1:
            raise RecompileError(
                f"{recipe.name}: takes the modules of {group.name} from several sources; no prediction"
            )
        source = str(sources.pop())
        if source not in group.bits:
            raise RecompileError(f"{recipe.name}: {group.name} is not profiled from source {source}; no prediction")
        choice[group.name] = source
    return choice


def _directory(recipe: Recipe, module: str) -> str | None:
    found: Iterable[str | None] = (recipe.source_dir(f"{module}.{ending}") for ending in TENSOR_ENDINGS)
    return next((directory for directory in found if directory is not None), None)


def _preset(recipe: Recipe, name: str, profile: Profile) -> Preset:
    base = profile.header.base
    if isinstance(recipe.base, str):
        base = _label_of(recipe.base, profile) or base
    choice = choice_of(recipe, profile, base)
    bits = profile.header.fixed_bits + sum(group.bits[choice[group.name]] for group in profile.header.groups)
    mean, error = predict(profile, choice)
    return Preset(Path(name).stem, choice, bits, mean, error)
