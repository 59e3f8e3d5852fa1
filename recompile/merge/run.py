"""A base variant and an override file to a checkpoint on disk, and checks of finished ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from recompile.errors import ArgumentError, CheckpointError, RecipeError, UnsupportedError
from recompile.events import Note, OnEvent, Progress, ignore
from recompile.formats import FORMATS
from recompile.io.files import settle
from recompile.merge.explain import reached_aside
from recompile.merge.finished import is_finished
from recompile.merge.overlay import Accounting, Overlay, account, build_overlay, quantizable
from recompile.merge.plan_safetensors import plan_write
from recompile.merge.type_recipes import as_recipe, load_type_recipe, looks_like_type_recipe, open_type_sources
from recompile.merge.write_gguf import GgufPlan, check_gguf_output, execute_gguf, is_gguf_mix, plan_gguf, verify_gguf
from recompile.merge.write_plan import DEFAULT_SHARD_MB, MANIFEST_NAME, WritePlan
from recompile.merge.write_safetensors import check_output, execute
from recompile.recipe.recipe import Recipe

if TYPE_CHECKING:
    from recompile.merge.problems import Problem
    from recompile.merge.verify import VerifyReport

Plan: TypeAlias = "WritePlan | GgufPlan"
ERRORS_TOLD = 4


@dataclass(frozen=True)
class MergeOptions:
    """See `recompile.merge` for the meaning of each."""

    recipe: Path | None = None
    shard_size: int | None = None  # MiB
    type_sources: tuple[str, ...] = ()
    dry_run: bool = False
    verify: bool = False
    dense: bool = False
    allow_unmatched: bool = False
    probe: bool = True
    engine: str | None = None
    reencode: bool = False


@dataclass(frozen=True)
class MergeReport:
    """What was written, or with dry_run would be."""

    overlay: Overlay
    plan: Plan
    out: Path | None
    before: Accounting  # of the base, over the modules that count in the result
    warnings: tuple[str, ...]
    lowest_correlation: tuple[str, float] | None = None  # of the probe; None if it did not run
    seconds: float | None = None
    verified: VerifyReport | None = None

    @property
    def overridden(self) -> dict[str, int]:
        """Source -> modules taken from it."""
        return dict(Counter(p.source for p in self.overlay.placements.values() if p.source is not None))

    def as_dict(self) -> dict[str, Any]:
        overlay, plan = self.overlay, self.plan
        modules = [
            {
                "module": m.name,
                "source": m.placement.source,
                "format": m.stored.format,
                "bits_per_weight": m.stored.bits_per_weight,
                "line": m.placement.override.line if m.placement.override else None,
                "key": m.placement.override.key if m.placement.override else None,
            }
            for m in plan.modules
        ]
        return {
            "base": overlay.base.label,
            "out": str(self.out) if self.out is not None else None,
            "recipe": overlay.recipe.name if overlay.recipe else None,
            "dense": plan.dense,
            "base_size": self.before.as_dict(),
            "size": plan.accounting.as_dict(),
            "overridden": self.overridden,
            "modules": modules,
            "warnings": self.warnings,
            "lowest_correlation": self.lowest_correlation,
            "seconds": self.seconds,
            "bytes_per_second": plan.data_bytes / self.seconds if self.seconds else None,
            "verified": self.verified,
        }


class VerifyFailed(CheckpointError):
    """What was written is not what its sources hold; `report` has the problems."""

    def __init__(self, message: str, report: MergeReport) -> None:
        super().__init__(message)
        self.report = report


def run_merge(base_dir: str, out: Path | None, options: MergeOptions, on_event: OnEvent = ignore) -> MergeReport:
    """Plan, check and write a mix; the output appears whole or not at all. out: None with dry_run only.

    on_event: gets every `Step`, too. Raises RecipeError, UnsupportedError, MismatchError, OutputError, VerifyFailed.
    """
    if out is None and not options.dry_run:
        raise ArgumentError("{out} is needed, or {dry_run}")
    base = open_checkpoint(base_dir)
    recipe = read_type_recipe(base, options.recipe, options.type_sources, options.allow_unmatched)
    overlay = build_overlay(base, recipe or options.recipe, allow_unmatched=options.allow_unmatched)
    plan = _plan(overlay, base_dir, out, options)
    warnings = [*overlay.warnings, *reached_aside(overlay), *plan.warnings]
    if options.engine is not None and not options.dense:
        warnings += _refused(plan, options.engine)
    for warning in warnings:
        on_event(Note(warning, "Warning"))
    before = account(overlay.base.modules.values(), quantizable(overlay.checkpoints))
    finished = options.verify and not options.dry_run and is_finished(plan)
    if out is not None and isinstance(plan, WritePlan) and not finished:
        check_output(overlay, out, plan.needed_bytes)
    if options.dry_run:
        return MergeReport(overlay, plan, out, before, tuple(warnings))
    assert out is not None, "asked for above"
    lowest = _probe(overlay) if options.probe else None
    if finished:
        if out.is_dir():
            settle(out)
        on_event(Note(f"{out}: was written by an earlier run of this merge; verifying it"))
    seconds = None if finished else _write(plan, options.dense, on_event)
    verified = _verified(plan, out, on_event) if options.verify else None
    report = MergeReport(overlay, plan, out, before, tuple(warnings), lowest, seconds, verified)
    if verified is not None and (found := errors_of(verified.problems)):
        raise VerifyFailed(describe_errors(str(out), "verify", found, f", first {found[0]}"), report)
    return report


def _write(plan: Plan, dense: bool, on_event: OnEvent) -> float:
    """Carry out a plan; the seconds that it took."""
    began = time.monotonic()
    doing = "decoding" if dense else "copying"
    on_event(Progress(doing, 0, plan.data_bytes, "bytes"))
    with closing(execute_gguf(plan) if isinstance(plan, GgufPlan) else execute(plan)) as steps:
        for step in steps:
            on_event(step)
            on_event(Progress(doing, step.done_bytes, plan.data_bytes, "bytes", step.module))
    return time.monotonic() - began


def _plan(overlay: Overlay, base_dir: str, out: Path | None, options: MergeOptions) -> Plan:
    """What would be written. Raises UnsupportedError, OutputError for an output that is refused."""
    if is_gguf_mix(overlay) and not options.dense:
        plan = plan_gguf(overlay, out or Path("mix.gguf"), options.shard_size)
        if not (options.verify and not options.dry_run and is_finished(plan)):
            check_gguf_output(plan)
        return plan
    if out is not None and not (options.verify and (out / MANIFEST_NAME).is_file()):  # else after it is planned
        check_output(overlay, out)
    size = DEFAULT_SHARD_MB if options.shard_size is None else options.shard_size
    target = out or Path(f"{base_dir}-mix")
    return plan_write(overlay, target, size, dense=options.dense, reencode=options.reencode)


def read_type_recipe(
    base: Checkpoint, path: Path | None, type_sources: Sequence[str], allow_unmatched: bool
) -> Recipe | None:
    """The override file read as another tool's recipe of GGUF types, where it is one."""
    if path is None or not (type_sources or looks_like_type_recipe(path)):
        if type_sources:
            raise ArgumentError("{type_sources} goes with {recipe} FILE, a recipe of GGUF types")
        return None
    if not isinstance(base, GgufCheckpoint):
        raise RecipeError(f"{path}: names GGUF types, and {base.label} is no GGUF file")
    if not type_sources:
        raise RecipeError(
            f"{path}: is a recipe of GGUF types; say which files hold them: {{type_sources}} Q4_K=FILE.gguf ... "
            f"(or a directory of such files)"
        )
    types = load_type_recipe(path)
    return as_recipe(types, base.file, open_type_sources(type_sources), allow_unmatched=allow_unmatched)


def _refused(plan: Plan, engine: str) -> list[str]:
    """What `engine` does not run of a planned merge: UnsupportedError for errors, the warnings as text."""
    from recompile.merge.check import check_plan

    if isinstance(plan, GgufPlan):
        if engine == FORMATS["gguf"].engine:
            return []
        raise UnsupportedError(f"{{engine}} {engine}: GGUF files are llama.cpp's; leave out {{engine}}")
    problems = check_plan(plan, engine)
    errors = [f"{problem}" for problem in errors_of(problems)]
    if errors:
        more = f"; and {len(errors) - ERRORS_TOLD} more" if len(errors) > ERRORS_TOLD else ""
        raise UnsupportedError(
            f"{{engine}} {engine}: {'; '.join(errors[:ERRORS_TOLD])}{more}. Nothing was written; take such modules "
            f"from "
            f"other variants (model_optimize --engine {engine} chooses among those that run)"
        )
    return [str(problem) for problem in problems]


def _probe(overlay: Overlay) -> tuple[str, float] | None:
    if overlay.overridden == 0:
        return None
    from recompile.merge.check_same_weights import check_same_weights

    return check_same_weights(overlay).lowest


def _verified(plan: Plan, out: Path, on_event: OnEvent) -> VerifyReport:
    if not isinstance(plan, GgufPlan):
        return run_verify(str(out), on_event)
    from recompile.merge.problems import Problem
    from recompile.merge.verify import VerifyReport

    found = verify_gguf(
        plan, lambda step: on_event(Progress("verifying", step.done_bytes, plan.data_bytes, "bytes", step.module))
    )
    problems = tuple(Problem(str(plan.out), problem) for problem in found.problems)
    return VerifyReport(str(plan.out), len(plan.modules), plan.data_bytes, len(plan.modules), (), problems)


# ---- finished checkpoints --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckReport:
    """What is wrong with a checkpoint. verified: where its tensors were read again and compared with its manifest."""

    directory: str
    problems: tuple[Problem, ...]
    verified: VerifyReport | None = None
    notes: tuple[str, ...] = ()  # what was and was not looked at, and what each engine would do

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(errors_of(self.problems))

    def as_dict(self) -> dict[str, Any]:
        return {"directory": self.directory, "problems": self.problems, "notes": self.notes}


def run_verify(directory: str, on_event: OnEvent = ignore) -> VerifyReport:
    """Read a merged checkpoint again and compare it with its manifest and its sources."""
    from recompile.merge.verify import verify

    return verify(
        directory,
        lambda step: on_event(Progress("verifying", step.done_bytes, step.total_bytes, "bytes", step.module)),
    )


def run_check(directory: str, verify: bool, engine: str | None, on_event: OnEvent = ignore) -> CheckReport:
    """Check a finished checkpoint of any origin, as its engine reads it; writes nothing."""
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.merge.check import check_checkpoint, check_engine, loaders_that_fail
    from recompile.merge.check_model import check_model

    if verify and engine:
        raise ArgumentError("{check} DIR takes {verify} or {engine}, one after the other")
    if verify:
        report = run_verify(directory, on_event)
        return CheckReport(directory, tuple(report.problems), report)
    problems = check_checkpoint(directory)
    found = loaders_that_fail(directory) if engine is None else check_engine(directory, engine)
    problems = [*problems, *found]
    notes: list[str] = []
    try:
        checkpoint = open_checkpoint(directory)
        checkpoint.modules  # noqa: B018 - read from headers now, or refused
    except CheckpointError:  # told above
        return CheckReport(directory, tuple(problems))
    more, notes = check_model(checkpoint)
    known = {str(problem) for problem in problems}
    problems = [*problems, *(problem for problem in more if str(problem) not in known)]
    return CheckReport(directory, tuple(problems), notes=tuple(notes))


def errors_of(problems: Sequence[Problem]) -> list[Problem]:
    """Those that are no mere warnings."""
    return [problem for problem in problems if problem.severity == "error"]


def describe_errors(directory: str, what: str, errors: Sequence[Problem], first: str = "") -> str:
    """What is said of a directory with errors. first: what the first of them is, to go on the sentence."""
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    return f"{directory}: {what} found {count}{first}; write or download it again"
