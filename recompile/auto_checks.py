"""What a later stage of `recompile.auto` would refuse, asked of the same code before anything is measured or written.

A run takes hours, and a plan is believed: so both look at the output, at every source and at the budget first, as far
as headers, the text of the rows and the tokenizer tell. What takes a measurement is left to its stage.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.auto_stages import STATE, begun_with, check_new
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import (
    Candidate,
    Measurement,
    Profile,
    bits_of_uniform,
    candidate_label,
    id_of_directory,
    uniform_candidate,
)
from recompile.errors import ArgumentError, BudgetError, OutputError, RecompileError
from recompile.gguf.container import is_gguf
from recompile.io.files import check_not_input, check_outputs, check_place
from recompile.io.sizes import format_bytes, size_bytes
from recompile.recipe.recipe import load_recipe

if TYPE_CHECKING:
    from eval.profile.run import Forecast
    from recompile.model.rows import RowOptions

KERNEL_PLACES = ("/proc", "/sys")  # where nothing can be made, whatever their permissions say


RIVAL = 1.6  # times the cost of a mix: compensation leaves 0.6 to 0.96 of a cost, by what it is of (docs/quality.md)
NO_RIVAL = f"a uniform build costs over {RIVAL:g} times what the mix does by the profile; its minutes go to the mix"
LATE = "are left for a uniform build to compare the mix with; it is left out, and stands in a run with more {minutes}"
ROOM = 2  # times what rounded candidates take: builds and their states need some too


# ---- arguments -------------------------------------------------------------------------------------------------------


def check_variants(variants: Sequence[Path]) -> None:
    """Raise where variants are not there, are fewer than two, or would have one name in a recipe."""
    for path in variants:
        open_checkpoint(path)
    if len(variants) == 1:
        raise ArgumentError("{variants}: one variant leaves nothing to choose; give two or more")
    places: dict[str, Path] = {}
    named: dict[str, Path] = {}
    for path in variants:
        if (real := os.path.realpath(path)) in places:
            raise ArgumentError(f"{{variants}}: {path} is given twice; give every variant once")
        label = candidate_label(id_of_directory(str(path)))
        if label in named:
            raise ArgumentError(
                f"{{variants}}: {named[label]} and {path} would both be source {label} of the recipe; rename one"
            )
        places[real] = named[label] = path
    files = [path for path in variants if is_gguf(path)]
    if files and len(files) < len(variants):
        other = next(path for path in variants if path not in files)
        raise ArgumentError(
            f"{{variants}}: {files[0]} is a GGUF file and {other} is none; they are never in one build: give one kind"
        )


def why_not_kept(work: Path, needed: int) -> str:
    """Why rounded candidates of so many bytes are not kept in a run's folder: no room, or a run that was begun without.
    Empty where they are."""
    try:
        if (begun := begun_with(work)) is not None:
            return "" if begun.get("feedback") else "candidates are measured without error feedback, as this was begun"
        free = shutil.disk_usage(next(path for path in (work, *work.absolute().parents) if path.is_dir())).free
    except OSError:  # nothing can be written there, which `check_places` refuses
        return ""
    if free >= ROOM * needed:
        return ""
    said = f"candidates are measured without error feedback, for which {format_bytes(ROOM * needed)} would have to be"
    return f"{said} free at {work}; found {format_bytes(free)}"


def are_gguf_types(offered: Sequence[str], out: Path) -> bool:
    """Whether candidates are GGUF types. Raises ArgumentError where some are and some are not, or where there is but
    one, FormatError where `out` is no file's name."""
    from recompile.quantize.gguf_mix import check_out
    from recompile.quantize.lazy_variant import parse_candidates, spec_of

    kinds = {next(iter(spec_of(name)[1])) for name in parse_candidates(offered)}
    if "type" in kinds and len(kinds) > 1:
        raise ArgumentError("{candidates}: GGUF types and other forms are never in one build; give one kind")
    if "type" in kinds:
        check_out(out)
    return "type" in kinds


def check_choice(names: Sequence[str]) -> None:
    """Raise ArgumentError where there is nothing to choose from."""
    if len(names) == 1:
        raise ArgumentError(
            f"{{candidates}} {names[0]}: one candidate leaves nothing to choose; give two or more, e.g. {{candidates}} "
            f"2,3,4,6"
        )


# ---- the output ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where a run writes. inputs: all that it reads; is_file: whether the mix is a GGUF file; made_of: what says so,
    for the message"""

    out: Path
    work: Path
    beside: Mapping[str, Path]  # files beside the output, as messages name them
    inputs: tuple[Path, ...]
    is_file: bool
    made_of: str
    or_else: str  # how the mix would be a GGUF file, to go on the same message

    @property
    def is_begun(self) -> bool:
        """Whether a run of this output was begun before, and goes on."""
        return (self.work / STATE).exists()


def check_places(places: Places) -> None:
    """Raise OutputError where the output, or what is written beside it, cannot be written."""
    out = places.out
    real = Path(os.path.realpath(out))
    said = f"{{out}} {out}"
    inputs = {os.path.realpath(path): path for path in places.inputs}
    check_not_input(said, str(real), inputs)
    for name, given in inputs.items():
        if Path(name) in real.parents and Path(name).is_dir():
            raise OutputError(
                f"{said}: lies inside the input {given}, which is never written to; choose another {{out}}"
            )
        if real in Path(name).parents:
            raise OutputError(f"{said}: holds the input {given}, which is never written over; choose another {{out}}")
    for place in (real, Path(os.path.realpath(places.work))):
        check_place(said, place)
    if any(real.is_relative_to(place) for place in KERNEL_PLACES):
        raise OutputError(f"{said}: cannot be written: no file can be made there; choose another {{out}}")
    if not places.is_begun:
        check_new(places.work, out)
        check_outputs(places.beside, [])
    if places.is_file and out.suffix != ".gguf":
        raise OutputError(f"{said}: {places.made_of} make one GGUF file; give it a name that ends in .gguf")
    if not places.is_file and out.suffix == ".gguf":
        raise OutputError(
            f"{said}: is the name of a GGUF file, and {places.made_of} make a directory; choose another {{out}}"
            f"{places.or_else}"
        )


# ---- stages ----------------------------------------------------------------------------------------------------------


def forecast_profile(base: str, arguments: Mapping[str, Any], shape: tuple[int, int] | None) -> Forecast:
    """What the profile would be of. arguments: those that `recompile.profile` gets, `out` among them; shape: rows and
    their tokens, where those cannot be read yet. Raises as the profile would before its first pass."""
    from eval.profile.run import forecast
    from recompile.api.choose import profile_request

    return forecast(base, profile_request(**arguments), shape)


def check_budget(found: Forecast, budget: Mapping[str, Any], rules: str | None) -> None:
    """Raise BudgetError for a budget that no mix of the sources has, RecompileError for sources of which an engine
    loads none. As `recompile.optimize` would: it is asked for a choice of sources that cost nothing.

    budget: the one argument of `recompile.optimize`; rules: the engine whose rules the choice keeps
    """
    from eval.search.optimize import OptimizeOptions, rules_of
    from recompile.optimize.budget import Budget
    from recompile.optimize.choose import choose

    ((name, value),) = budget.items()
    header = found.header
    nothing = (0.0,) * header.rows
    swaps = {
        (group.name, label): Measurement(group.name, label, nothing) for group in header.groups for label in group.bits
    }
    free = Profile(header, Measurement(None, None, nothing), swaps)
    asked = Budget(budget.get("bits"), budget.get("total_bpw"), size_bytes(budget.get("size"), "{size}"))
    try:
        choose(free, asked, "greedy", rules_of(OptimizeOptions(engine=rules), found.sources))
    except BudgetError as error:
        given = f"{{{name}}} {value:g}" if isinstance(value, float) else f"{{{name}}} {value}"
        raise BudgetError(f"{given}: {error.template}; give a budget within it, or other sources") from error
    except RecompileError as error:
        raise type(error)(f"{error.template}; choose another {{engine}}, or other sources") from error


def check_rows(directories: Sequence[Path], where: RowOptions, roles: Sequence[str]) -> None:
    """Raise RecompileError where a text or trace has too few rows of a role. directories: where a tokenizer may lie"""
    for role in roles:
        where.read(directories, role)


def check_prompts(base: Checkpoint, prompts: int, tokens: int) -> None:
    """Raise where a base cannot answer prompts: it has no chat template, or no prompt fits its context.

    prompts: how many; tokens: of a response at most
    """
    from eval.trace.run import fitting_prompts

    try:
        fitting_prompts(base, None, prompts, tokens)
    except RecompileError as error:
        raise type(error)(f"{{trace}} make: {error.template}") from error


# ---- the uniform build beside a mix ----------------------------------------------------------------------------------


def uniform_within(
    profile: Profile, bits: float | None, total_bpw: float | None, size: int | str | None
) -> tuple[Candidate, bool, int]:
    """The largest candidate whose uniform build is within the budget, or else the smallest; whether it is; bytes of
    that build."""
    from recompile.optimize.budget import Budget  # here, so that refusals need no solvers

    budget = Budget(bits, total_bpw, size_bytes(size))
    candidate, fits = uniform_candidate(profile, budget.bits(profile))
    found = bits_of_uniform(profile, candidate.label) + profile.header.other_bits
    return candidate, fits, -(-found // 8)


def is_rival(profile: Profile, label: str, recipe: Path) -> bool:
    """Whether a uniform build of a candidate may be better than the mix, by what the profile says of both."""
    mix = load_recipe(recipe).provenance["predicted_kl_nats"]
    costs = (profile.cost(group.name, label) for group in profile.header.groups)
    return sum(cost.kl_nats for cost in costs if cost is not None) <= RIVAL * mix
