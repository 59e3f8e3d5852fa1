"""From a base model to the best mix of a size, in stages that an interrupted run goes on after: `recompile.auto`.

A sketch of candidates made on the fly, the recipe, one calibrated pass straight to the mix (or a merge of variants),
another to a uniform build, healing where that is asked for, and a comparison of all builds on rows of the role
"report". OUT.work/ holds what each stage left.

What modules cost by themselves is not what they cost in a build that makes good its own errors, and the mix chosen by
it may gain less from that than a uniform build does: so where errors are compensated both are measured on rows of the
role "accept", and the better one is healed and written.
"""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from recompile import api
from recompile.api.shared import PathLike, as_path, check_types
from recompile.arguments import Worded
from recompile.auto_checks import (
    LATE,
    NO_RIVAL,
    Places,
    are_gguf_types,
    check_budget,
    check_choice,
    check_places,
    check_prompts,
    check_rows,
    check_variants,
    forecast_profile,
    is_rival,
    uniform_within,
    why_not_kept,
)
from recompile.auto_minutes import Asked, Shares, Split, first_look
from recompile.auto_stages import Stages
from recompile.callable_rooms import make_callable
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.costs import LEVELS, Candidate, Profile, load_profile
from recompile.errors import ArgumentError, NotBetterError, NoTimeError, RecompileError
from recompile.events import Note, OnEvent, Said, ignore
from recompile.formats import COMPRESSED, FORMATS
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.gguf.container import is_gguf, open_gguf
from recompile.io.files import beside, copy_whole, locked, write_json
from recompile.io.report import to_plain
from recompile.io.sizes import size_bytes
from recompile.model.rows import RowOptions
from recompile.model.texts import ROLE_SHARES, text_from_file
from recompile.model.trace import read_trace
from recompile.optimize.solvers import solver_named
from recompile.planning import (
    TRACE_TOKENS,
    AutoPlan,
    PlanOptions,
    Sizes,
    Target,
    judging_seconds,
    make_plan,
    rounded_bytes,
    target_of,
)
from recompile.quantize.gguf_convert import tokenizer_file
from recompile.quantize.lazy_variant import parse_candidates, rounded_dir

make_callable(__name__)
MAKE = "make"  # in place of a trace
LATE_ANSWERS = 1.25  # more prompts, for those that are longer than rows, and for roles that got few
MIX, UNIFORM = "mix", "uniform"
MEASURED = "measured.json"  # of the builds, as model_diff --json has it
DEFAULT_CANDIDATES = "2,3,4,5,6,8"


@dataclass(frozen=True)
class AutoReport:
    """The mix beside other builds. builds: as `eval.mixes.builds.compare_builds` gives them, the mix first."""

    builds: tuple[Mapping[str, Any], ...]
    reference_perplexity: float
    rows: int
    row_tokens: int
    rows_sha256: str
    rows_source: str
    rows_role: str
    positions: str
    seconds: Mapping[str, float]  # by stage
    recipe: str
    out: str
    card: str  # Markdown for a model page
    page: str  # HTML


@dataclass(frozen=True)
class AutoOptions:
    """See `recompile.auto` for the meaning of each."""

    bits: float | None
    total_bpw: float | None
    size: int | str | None
    candidates: tuple[str, ...]
    format: str
    tokenizer_from: Path | None
    variants: tuple[Path, ...]
    group_size: int | str | None
    asym: bool
    level: str
    samples: int
    solver: str | None
    minutes: float | None  # in all
    search_minutes: float | None
    rows: int
    length: int
    calibration_rows: int
    text: Path | None
    dataset: str | None
    trace: Path | None
    positions: str | None
    max_memory: int | str | None
    verify: bool
    engine: str | None
    rounding: str | None
    compensate: bool
    heal: float | None  # minutes
    device: str
    dtype: str | None
    checks_recipe: bool = True  # beside uniform and hand-made ones, before it is built
    feedback: bool = True  # candidates are rounded with it before they are measured, where their kind can be

    @property
    def prompts(self) -> int:
        """How many the base answers for a trace that is to be made: as many as give every role its rows; else 0."""
        if str(self.trace) != MAKE:
            return 0
        shares = {"calibrate": self.calibration_rows, "choose": self.rows, "accept": self.rows, "report": self.rows}
        needed = max(rows / ROLE_SHARES[role] for role, rows in shares.items())
        return math.ceil(LATE_ANSWERS * needed)

    @property
    def says_times(self) -> bool:
        """Whether anything was said of how much is to be done."""
        known = inspect.signature(auto).parameters
        names = ("minutes", "search_minutes", "heal", "rows", "length", "samples", "calibration_rows", "variants")
        return any(getattr(self, name) != known[name].default for name in names)

    @property
    def target(self) -> Target | None:
        return target_of(self.engine) if self.engine is not None else None

    @property
    def budget(self) -> dict[str, Any]:
        """The one budget, as an argument of `recompile.optimize`. Raises ArgumentError."""
        given = {"bits": self.bits, "total_bpw": self.total_bpw, "size": self.size}
        found = {name: value for name, value in given.items() if value is not None}
        if len(found) != 1:
            raise ArgumentError("give one budget: {bits} 3.5, {total_bpw} 4 or {size} 4.2GiB")
        return found

    def check(self) -> None:
        """Raises ArgumentError for what does not go together."""
        from recompile.quantize.candidates import check_rounding

        assert self.budget, "raises where there is none"
        if self.level not in LEVELS:
            raise ArgumentError(f'{{level}} "{self.level}": wanted one of {", ".join(LEVELS)}')
        if self.solver is not None:
            solver_named(self.solver)
        RowOptions(self.rows, self.length, self.text, self.dataset, None, self.trace, self.positions or "all").check()
        size_bytes(self.size, "{size}")
        size_bytes(self.max_memory, "{max_memory}")
        if self.tokenizer_from is not None:
            open_gguf(self.tokenizer_from)
        if self.text is not None:
            text_from_file(self.text)
        if self.trace is not None and not self.prompts:
            read_trace(self.trace)
        if self.variants and self.candidates:
            raise ArgumentError(
                "{variants} and {candidates} exclude each other: variants are there, candidates are made"
            )
        if self.format != COMPRESSED and self.variants:
            raise ArgumentError("{variants} are in a format of their own; leave {format} out")
        target = self.target
        check_rounding(target.format if target is not None else self.format, self.group_size, self.asym)
        if target is not None and self.variants:
            raise ArgumentError("{engine} says what candidates are made; with {variants} their format decides")
        if target is not None and self.format not in (COMPRESSED, target.format):
            raise ArgumentError(f"{{engine}} {self.engine} reads {target.format}, not {{format}} {self.format}")
        if self.rounding is not None and self.variants:
            raise ArgumentError("{rounding}: variants are rounded already; leave it out, or give {candidates}")
        check_variants(self.variants)


def auto(
    base: PathLike,
    out: PathLike,
    *,
    bits: float | None = None,
    total_bpw: float | None = None,
    size: int | str | None = None,
    candidates: Sequence[str] = (),
    format: str = COMPRESSED,
    tokenizer_from: PathLike | None = None,
    variants: Sequence[PathLike] = (),
    group_size: int | str | None = None,
    asym: bool = False,
    level: str = "fused",
    samples: int = 16,
    solver: str | None = None,
    minutes: float | None = None,
    search_minutes: float | None = None,
    rows: int = 16,
    length: int = 512,
    calibration_rows: int = 64,
    text: PathLike | None = None,
    dataset: str | None = None,
    trace: PathLike | None = None,
    positions: str | None = None,
    max_memory: int | str | None = None,
    verify: bool = True,
    engine: str | None = None,
    rounding: str | None = None,
    compensate: bool = True,
    heal: float | None = None,
    quick: bool = False,
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> AutoReport:
    """Profile, choose, build and verify: the best mix of a size, in one call that goes on where it was stopped.

        report = recompile.auto("base", "mix", bits=3.5)
        print(report.builds[0]["bpw"], report.builds[0]["kl_nats"])

    bits, total_bpw, size: the one budget, as in `optimize`; candidates: made on the fly, as in `profile`; variants:
    merge these directories instead, the first is the one that recipes start from
    engine: "llama.cpp", "exllamav2", "exllamav3", "mlx", "vllm" or "transformers": format and candidates where they are
    not given, and rules that the choice keeps; rounding: as in `quantize`, GGUF types at least one-sided; compensate:
    the mix, and the uniform build beside it, make good their own errors, as in `quantize`
    heal: minutes of healing of the finished mix
    minutes: in all; rows and draws are then at most those given, and search and healing share what the passes leave.
    None: 18, or what the least takes, for models under half a billion weights where no rows, draws or minutes are asked
    for; else no limit;
    search_minutes: of a solver that measures
    trace: as in the others, or "make": the base answers prompts first, as many as the rows of all stages need
    quick: a rough mix for a first look: at most 6 rows of 256 tokens, 8 draws and 24 calibration rows, a minute of
    search (one-sided, refine, where nothing else is asked for); nothing is compensated, and neither a uniform build nor
    mixes beside those of the search are measured
    verify: also make and measure a uniform build, and write it where both are compensated and it is better on rows for
    such decisions; calibration_rows: rows to quantize with; the others as in `profile`,
    `optimize` and `quantize`. OUT.work/ holds what each stage left. on_event: gets a StageDone after each stage, too.
    """
    given = {name: value for name, value in locals().items() if name not in ("base", "out", "on_event")}
    return run_auto(Path(base), Path(out), auto_options(**given), on_event or ignore)


def auto_plan(base: PathLike, out: PathLike, **options: Any) -> AutoPlan:
    """What `auto` with the same arguments would do, about how long that takes, and what is missing for it.

        print(recompile.auto_plan("base", "mix", size="4GiB", engine="vllm"))

    Reads headers and the text of the rows, and times one matrix product. Raises ArgumentError as `auto` does.
    """
    check_types(base)
    made = auto_options(**options)
    made.check()
    return _Auto(Path(base), Path(out), made, ignore).plan()


def _signature_of_auto() -> inspect.Signature:
    """The arguments of `auto` but on_event, for a plan."""
    known = inspect.signature(auto).parameters.values()
    return inspect.Signature(
        [parameter for parameter in known if parameter.name != "on_event"], return_annotation="AutoPlan"
    )


auto_plan.__signature__ = _signature_of_auto()  # type: ignore[attr-defined]


def auto_options(**given: Any) -> AutoOptions:
    """The arguments of `auto`, its defaults filled in. Raises TypeError for one that it does not have."""
    known = inspect.signature(auto).parameters
    names = [name for name in known if name not in ("base", "out", "on_event")]
    if unknown := [name for name in given if name not in names]:
        raise TypeError(f"auto() has no argument {unknown[0]!r}")
    values = {name: given.get(name, known[name].default) for name in names}
    values["candidates"] = tuple(str(candidate) for candidate in values["candidates"])
    values["variants"] = tuple(Path(variant) for variant in values["variants"])
    for name in ("tokenizer_from", "text", "trace"):
        values[name] = as_path(values[name])
    if values.pop("quick"):
        values |= first_look(values)
    return AutoOptions(**values)


def run_auto(base: Path, out: Path, options: AutoOptions, on_event: OnEvent = ignore) -> AutoReport:
    """All stages; those that are done already are not run again. on_event: gets a StageDone after each that ran."""
    check_types(base)
    options.check()
    return _Auto(base, out, options, on_event).run()


class _Auto:
    def __init__(self, base: Path, out: Path, options: AutoOptions, on_event: OnEvent) -> None:
        self.base, self.out, self.options, self.on_event = open_checkpoint(base), out, options, on_event
        self.base_dir = str(base)
        self.target = options.target
        by_target = list(self.target.candidates) if self.target is not None else [DEFAULT_CANDIDATES]
        self.offered = list(options.candidates) or by_target
        self.format = options.format
        if self.target is not None and self.target.format != "gguf":
            self.format = self.target.format
        self.is_plain = self.format == COMPRESSED
        self.mlx = self.format == MLX
        self.gguf = not options.variants and self.is_plain and are_gguf_types(self.offered, out)
        self.names = [path.name for path in options.variants] or parse_candidates(self.offered)
        check_choice(self.names)
        if options.tokenizer_from is not None and not self.gguf:
            raise ArgumentError(
                f"{{tokenizer_from}} {options.tokenizer_from}: goes with GGUF types that are made, {{candidates}} Q3_K,"
                f"Q4_K,Q6_K; leave it out"
            )
        self.work = beside(out, ".work")
        self.profile, self.recipe = self.work / "profile.jsonl", self.work / "overrides.yaml"
        lazily = FORMATS[self.format].lazily if self.format in FORMATS else None
        feeds_back = options.feedback and not (options.variants or self.gguf or lazily == "noise")
        self._no_room = why_not_kept(self.work, rounded_bytes(self._sizes, self.names)) if feeds_back else ""
        self.feeds_back = feeds_back and not self._no_room
        if self.chooses_by_costs:
            self.options = options = replace(options, solver="exact", checks_recipe=False)
        of_rows = ("text", "dataset", "trace", "positions", "device")
        self.texts: dict[str, Any] = {name: getattr(options, name) for name in of_rows}
        self.texts["positions"] = options.positions or "response"
        self._split: Split | None = None  # of the minutes in all
        self._picked, self._affords_uniform = MIX, True
        self._apart = False  # whether what is built goes to the work folder first
        if options.prompts:
            self.texts["trace"] = self.work / "trace.safetensors"
        self.rounding: dict[str, Any] = {}  # what candidates are rounded to, where there is a choice
        if self.mlx or (self.is_plain and not self.gguf):
            self.rounding = {"group_size": self.group_size, "asym": options.asym}

    @property
    def _shared(self) -> AutoOptions:
        """What is asked for, with the rows, draws and minutes that the minutes in all leave."""
        return self.options if self._split is None else replace(self.options, **asdict(self._split))

    @property
    def _rounding(self) -> str | None:
        """GGUF types are rounded with error feedback here, though not by `quantize`, unless it is said otherwise."""
        return self.options.rounding or ("one-sided" if self.gguf else None)

    @property
    def compensates(self) -> bool:
        """Whether what is built makes good its own errors; a merge of variants that are there cannot."""
        return self.options.compensate and not self.options.variants

    @property
    def _searches(self) -> bool:
        """Whether a recipe is searched for by measuring mixes."""
        return self.options.solver is None or solver_named(self.options.solver).runs_models

    @property
    def chooses_by_costs(self) -> bool:
        """Whether no mix is measured before the recipe is built: what a search measures is not compensated, and what it
        gains there a compensated build of SmolLM2 has lost again (docs/quality.md)."""
        options = self.options
        return self.feeds_back and self.compensates and options.solver is None and options.search_minutes is None

    @property
    def compares(self) -> bool:
        """Whether a uniform build is made beside the mix; variants that are there stand beside it as they are."""
        return self.options.verify and not self.options.variants and self._affords_uniform

    @property
    def picks(self) -> bool:
        """Whether the better one of mix and uniform build is written."""
        return self.compares and self.compensates

    @property
    def heals(self) -> bool:
        return self.options.heal is not None

    def plan(self) -> AutoPlan:
        """See `auto_plan`. Raises for what any stage would refuse, as far as that is known; a run that was begun goes
        on with what it was begun with."""
        check_places(self.places)
        self._split = self._shares.first()
        self.options = self._shared
        found = self._plan(self.options)
        if not (found.missing or self.places.is_begun):
            self._check_stages()
        return found

    @property
    def places(self) -> Places:
        """All that is written, and what must not be."""
        options = self.options
        given = (options.tokenizer_from, options.text, None if options.prompts else options.trace)
        is_file = is_gguf(options.variants[0]) if options.variants else self.gguf
        return Places(
            out=self.out,
            work=self.work,
            beside={"the card": self.card, "the page": self.page},
            inputs=(Path(self.base_dir), *options.variants, *(path for path in given if path is not None)),
            is_file=is_file,
            made_of=self._made_of,
            or_else="" if options.variants else ", or give GGUF types: {candidates} Q3_K,Q4_K,Q6_K",
        )

    @property
    def _made_of(self) -> str:
        """What the mix is made of, for messages."""
        given = self.options.variants
        return f"{{variants}} such as {given[0]}" if given else f"the candidates {', '.join(self.names)}"

    def _check_stages(self) -> None:
        """Raise for what stages would refuse before they measure anything."""
        options, shape = self.options, None
        if options.prompts:
            check_prompts(self.base, options.prompts, TRACE_TOKENS)
            shape = (1, 2)  # rows end where answers do
        elif options.dataset is not None:  # which may have to be fetched
            shape = (options.rows, options.length)
        found = forecast_profile(self.base_dir, {**self._profile_arguments(), "out": self.profile}, shape)
        check_budget(found, options.budget, self.target.rules if self.target is not None else None)
        if shape is None:
            roles = ["report", *(["accept"] if self.picks or options.checks_recipe else [])]
            check_rows([self.base.path, *options.variants[:1]], self._rows, roles)
            if self.compensates:
                rows = replace(self._rows, rows=options.calibration_rows, positions=options.positions or "all")
                check_rows([self.base.path], rows, ["calibrate"])

    @cached_property
    def _sizes(self) -> Sizes:
        return Sizes.of(self.base)

    @cached_property
    def _shares(self) -> Shares:
        """Of the minutes in all."""
        options = self.options
        counts = (options.rows, options.samples, options.calibration_rows)
        minutes = options.minutes, options.search_minutes, options.heal
        asked = Asked(counts, *minutes, options.says_times, self._searches)

        def plan(rows: int, samples: int, calibration_rows: int) -> AutoPlan:
            counts: dict[str, Any] = {"rows": rows, "samples": samples, "calibration_rows": calibration_rows}
            return self._plan(replace(options, **counts, search_minutes=0.0, heal=None, minutes=None))

        judging = judging_seconds(self._sizes, options.rows, options.length, options.device)
        return Shares(asked, plan, judging, self._sizes.body + self._sizes.head)

    def _plan(self, options: AutoOptions) -> AutoPlan:
        return make_plan(
            self._sizes,
            options.engine,
            "gguf" if self.gguf else self.format,
            tuple(self.names),
            PlanOptions(
                rows=options.rows,
                length=options.length,
                samples=options.samples,
                calibration_rows=options.calibration_rows,
                search_minutes=options.search_minutes,
                solver=options.solver,
                rounding=self._rounding,
                compensate=self.compensates,
                heal_minutes=options.heal,
                builds=not options.variants,
                verify=options.verify and self._affords_uniform,
                checks_recipe=options.checks_recipe,
                feedback=self.feeds_back,
                prompts=options.prompts,
                device=options.device,
                minutes=options.minutes,
                unlimited=self._shares.unlimited if options.minutes is not None else None,
                note=self._no_room,
            ),
        )

    @property
    def _wants_tokenizer(self) -> bool:
        given = self.options.tokenizer_from or self.options.variants
        return self.gguf and not given and not is_gguf(self.base.path)

    @property
    def group_size(self) -> int | str:
        return 64 if self.options.group_size is None else self.options.group_size

    def run(self) -> AutoReport:
        asked, plan = self.options, self.plan()  # which refuses before the models are hashed
        self.options = asked  # minutes are shared as the first run found, whose machine may have been busy or idle
        if plan.missing:
            raise ArgumentError("; ".join(plan.missing))
        settings = self._settings()
        if self._wants_tokenizer:  # before anything is made: where it cannot be had, the user gives a file
            path = tokenizer_file(self.base.path, lambda step, what: self.on_event(Said(f"tokenizer: {what}")))
            self.options = asked = replace(asked, tokenizer_from=path)
        stages = Stages(self.work, settings, self.out, self.on_event)
        if not stages.seconds:
            self.on_event(Said(Worded(plan.text)))
        with locked(self.work, self.out):  # one process at a time
            self._share(stages, "split", lambda: self._split)
            if self.options.prompts:
                stages.run("trace", self._trace, self.texts["trace"])
            stages.run("profile", self._profile, self.profile)
            if self._split is not None:
                self._share(stages, "shares", partial(self._shares.again, self._split, stages.seconds))
            self._apart = self.picks or self.heals
            stages.run("recipe", self._recipe, self.recipe)
            if self._split is not None:
                if self.picks:
                    of = partial(is_rival, load_profile(self.profile), self._uniform_candidate[0].label, self.recipe)
                    self._keep_uniform(stages, "rival", of, NO_RIVAL)
                self._share(stages, "calibrating", partial(self._shares.calibrating, self._split, stages.seconds))
            stages.run("build", self._build)
            if self._split is not None and self.compares:
                affords = partial(self._shares.affords_uniform, self._split, stages.seconds)
                self._keep_uniform(stages, "affords", affords, f"too few of {self._split.minutes:g} minutes {LATE}")
            if self.compares:
                stages.run("uniform", self._build_uniform)
            if self.picks:
                self._picked = stages.run("pick", self._pick)["picked"]
            if self._split is not None and self._apart:
                self._take_what_is_left(stages, self._split)
            if self.heals:
                stages.run("heal", self._heal)
            elif self._apart:
                self._place()
            found = stages.run("verify", self._measure)
            stages.run("report", self._report)
        builds = tuple(found.pop("builds"))
        return AutoReport(
            builds,
            **found,
            seconds=stages.seconds,
            recipe=str(self.picked_recipe),
            out=str(self.out),
            card=str(self.card),
            page=str(self.page),
        )

    def _keep_uniform(self, stages: Stages, name: str, keeps: Callable[[], bool], why_not: str) -> None:
        """No uniform build where `keeps` says so, now or in the run that is gone on with; `why_not` is told."""
        self._affords_uniform = stages.keep(name, lambda: {"uniform": keeps()})["uniform"]
        if not self._affords_uniform:
            self.on_event(Note(Worded(why_not)))

    def _take_what_is_left(self, stages: Stages, split: Split) -> None:
        """Heal for the minutes that the stages before it left, planned or not; say so where it was and they did not."""
        left = stages.keep("left", lambda: {"heal": self._shares.healing(split, stages.seconds)})["heal"]
        if left is None and self.heals:
            self.on_event(Note(f"too few of {split.minutes:g} minutes are left for healing; it is left out"))
        self.options = replace(self.options, heal=left)

    def _share(self, stages: Stages, name: str, split: Callable[[], Split | None]) -> None:
        """Take rows, draws and minutes of stages as this run, or the one that it goes on with, shares them."""
        kept = stages.keep(name, lambda: {"split": to_plain(split())})["split"]
        self._split = None if kept is None else Split(**kept)
        self.options = self._shared

    def _settings(self) -> dict[str, Any]:
        """What a run must not be gone on with another of."""
        options = self.options
        ((name, value),) = options.budget.items()
        budget = [{"bits": "-b", "total_bpw": "--total-bpw", "size": "--size"}[name], value]
        made = [*self.offered, str(self.group_size), str(options.asym)]
        return {
            "base": self.base.identity,
            "budget": budget,
            "offered": [open_checkpoint(path).identity for path in options.variants] or made,
            "level": options.level,
            "samples": options.samples,
            "solver": [options.solver, options.search_minutes],
            **({} if options.minutes is None else {"minutes": options.minutes}),
            "rows": [options.rows, options.length, options.calibration_rows, str(options.text), options.dataset],
            "dtype": options.dtype,
            **({} if self.is_plain else {"format": self.format}),
            **({"engine": options.engine} if options.engine else {}),
            **({"rounding": self._rounding} if self._rounding else {}),
            **({"compensate": True} if self.compensates else {}),
            **({"feedback": True} if self.feeds_back else {}),
            **({"picks": True} if self.picks else {}),
            **({"heal": options.heal} if self.heals else {}),
            **({"tokenizer_from": open_checkpoint(options.tokenizer_from).identity} if options.tokenizer_from else {}),
            **({"trace": [self._identity_of(options.trace), options.positions]} if options.trace else {}),
        }

    def _identity_of(self, trace: Path) -> str:
        """Of the rows of a trace; one that is to be made follows from the other settings."""
        return MAKE if self.options.prompts else read_trace(trace).sha256

    def _trace(self) -> object:
        options = self.options
        how: dict[str, Any] = {"rows": options.prompts, "tokens": TRACE_TOKENS, "device": options.device}
        path = self.texts["trace"]
        return api.trace(self.base_dir, path, **how, dtype=options.dtype, on_event=self.on_event)

    def _profile_arguments(self) -> dict[str, Any]:
        options = self.options
        how: dict[str, Any] = {"mode": "sketch", "samples": options.samples, "level": options.level}
        if options.variants:
            how |= {"base": str(options.variants[0]), "sources": [str(path) for path in options.variants[1:]]}
        else:
            how |= {"candidates": self.offered, "format": self.format, **self.rounding}
        if self.mlx:  # quantized with everything else, so chosen with everything else
            how |= {"head": True, "embedding": True}
        if self.gguf or self.feeds_back:
            how |= {"importance_rows": options.calibration_rows, "feedback": self.feeds_back}
        rows: dict[str, Any] = {"rows": options.rows, "length": options.length, "dtype": options.dtype}
        rows["max_memory"] = options.max_memory
        return {**how, **rows, **self.texts}

    def _profile(self) -> Profile:
        return api.profile(self.base_dir, out=self.profile, **self._profile_arguments(), on_event=self.on_event)

    def _recipe(self) -> object:
        options = self.options
        how: dict[str, Any] = {"solver": options.solver, "rows": options.rows}
        how["minutes"] = options.search_minutes if self._searches else None
        how["engine"] = self.target.rules if self.target is not None else None
        how["check"] = None if options.checks_recipe else False
        return api.optimize(
            self.profile, self.recipe, **options.budget, **how, length=options.length, **self.texts,
            on_event=self.on_event,
        )  # fmt: skip

    @property
    def built(self) -> Path:
        """The mix as it is built; what is picked or healed goes to `out`."""
        if not self._apart:
            return self.out
        return self.work / f"built{self.out.suffix if self.out.suffix == '.gguf' else ''}"

    @property
    def picked(self) -> Path:
        """The build that is healed and written."""
        return self.built if self._picked == MIX else self._uniform

    @property
    def _said(self) -> str:
        return "the mix" if self._picked == MIX else "the uniform build"

    @property
    def picked_recipe(self) -> Path:
        return self.recipe if self._picked == MIX else self.uniform_recipe

    @property
    def uniform_recipe(self) -> Path:
        return self.work / "uniform.yaml"

    @property
    def _uniform(self) -> Path:
        """Where the uniform build goes; its name says what it is."""
        candidate = self._uniform_candidate[0]
        rate, scheme = candidate.label, "scheme" in (candidate.spec or {})
        stem = self.base.path.resolve().name.removesuffix(".gguf")
        name = f"{stem}-{rate}.gguf" if self.gguf else rate if scheme else f"{rate}bpw"
        return self.work / "uniform" / name

    @cached_property
    def _uniform_candidate(self) -> tuple[Candidate, bool, int]:
        asked = self.options
        return uniform_within(load_profile(self.profile), asked.bits, asked.total_bpw, asked.size)

    def _build(self) -> object:
        if self.options.variants:
            return api.merge(str(self.options.variants[0]), self.built, recipe=self.recipe, on_event=self.on_event)
        return self._quantize(self.built, recipe=self.recipe)

    def _build_uniform(self) -> object:
        """A uniform build within the budget, made the same way, from a recipe of its own."""
        self._write_uniform_recipe(None)
        self._uniform.parent.mkdir(exist_ok=True)
        return self._quantize(self._uniform, recipe=self.uniform_recipe)

    def _write_uniform_recipe(self, rules: str | None) -> None:
        """rules: the engine whose rules it keeps. Raises RecompileError where it cannot."""
        candidate, _, size = self._uniform_candidate
        how: dict[str, Any] = {"pin": [f"*={candidate.label}"], "engine": rules, "solver": "exact", "check": False}
        api.optimize(self.profile, self.uniform_recipe, size=size, **how)

    def _pick(self) -> dict[str, Any]:
        """Which of the two builds has less KL, on rows that are for such decisions."""
        candidate, fits, _ = self._uniform_candidate
        try:
            self._write_uniform_recipe(self.target.rules if self.target is not None else None)
        except RecompileError:
            fits = False
        if not fits:
            return {"picked": MIX}
        mix, uniform = (entry["kl_nats"] for entry in self._compare([self.built, self._uniform], "accept")[0]["builds"])
        picked = UNIFORM if uniform < mix else MIX
        better = f"KL {mix:.4f} of the mix, {uniform:.4f} of uniform {candidate.label}, both compensated, on rows of "
        self.on_event(Note(f"{better}the role accept: {picked} is written", ""))
        return {"picked": picked, "kl_nats": {MIX: mix, UNIFORM: uniform}}

    def _place(self) -> None:
        if self.picked.exists():  # else it is there already
            self.picked.replace(self.out)

    def _compare(self, builds: Sequence[Path], role: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        from eval.mixes.builds import compare_builds

        first, *others = map(open_checkpoint, builds)
        return compare_builds(self.base, first, others, self._rows, self.options.device, self.on_event, role)

    @property
    def _rows(self) -> RowOptions:
        """Of what builds are compared on."""
        options = self.options
        where = (options.text, options.dataset, None, self.texts["trace"], self.texts["positions"])
        return RowOptions(options.rows, options.length, *where)

    def _heal(self) -> object:
        from eval.heal import WORK_SUFFIX
        from eval.heal_output import read_healed

        options = self.options
        work, picked = beside(self.out, WORK_SUFFIX), self.picked
        if self.out.exists() and not work.exists():  # it appears whole, so a run was killed after that
            return {"kept": read_healed(self.out) is not None}
        shape: dict[str, Any] = {"rows": options.rows, "length": options.length, "dtype": options.dtype}
        try:
            return api.heal(
                picked,
                self.base_dir,
                self.out,
                minutes=options.heal,
                max_memory=options.max_memory,
                **shape,
                **self.texts,
                on_event=self.on_event,
            )
        except (NotBetterError, NoTimeError) as error:
            self.on_event(Note(f"{error}; {self._said} stays as it was built"))
            copy_whole(picked, self.out)
            return {"kept": False}

    def _quantize(self, out: Path, **what: Any) -> object:
        from recompile.quantize.lazy_variant import importance_file

        options = self.options
        shape: dict[str, Any] = {"rows": options.calibration_rows, "length": options.length, "dtype": options.dtype}
        how: dict[str, Any] = dict(self.rounding)
        if self._rounding is not None:
            how["rounding"] = self._rounding
        if self.compensates:
            how["compensate"] = True
        if self.gguf:  # with the importance that the candidates were made with
            how |= {"tokenizer_from": options.tokenizer_from, "imatrix": importance_file(self.profile)}
        texts = {**self.texts, "positions": options.positions or "all"}
        return api.quantize(self.base_dir, out, **what, **how, **shape, **texts, on_event=self.on_event)

    def _measure(self) -> dict[str, Any]:
        builds = [self.out, *([self.picked] if self.heals else []), *self.options.variants]
        if self.compares:
            builds.append(self._uniform if self._picked == MIX else self.built)
        result, measured = self._compare(builds, "report")
        header = load_profile(self.profile).header
        recipe = {"recipe": self.picked_recipe.read_text(), "candidate_dir": header.candidate(header.base).model_dir}
        names = [mix_name(self.out), *([f"{mix_name(self.out)} before healing"] if self.heals else [])]
        for one, name in zip(measured, names, strict=False):
            one |= {**recipe, "recipe_name": name}
        write_json(self.work / MEASURED, {"candidates": to_plain(measured)})
        for made in (self.work / "uniform", self.work / "built", rounded_dir(self.profile)):
            shutil.rmtree(made, ignore_errors=True)
        (self.work / "built.gguf").unlink(missing_ok=True)
        for entry in result["builds"]:
            entry["kept"] = Path(entry["build"]).exists()
        return result

    @property
    def card(self) -> Path:
        return self.out.with_name(f"{mix_name(self.out)}.card.md")

    @property
    def page(self) -> Path:
        return self.out.with_name(f"{mix_name(self.out)}.report.html")

    def _report(self) -> dict[str, Any]:
        """A block for a model card and a page, beside the output."""
        from eval.report.run import ReportRequest, write_report

        title = mix_name(self.out)
        write_report(self.profile, ReportRequest([self.work / MEASURED], out=self.page, card=self.card, title=title))
        return {"card": str(self.card), "page": str(self.page)}


def mix_name(out: Path) -> str:
    """What the files beside an output are named after."""
    return out.name.removesuffix(".gguf")
