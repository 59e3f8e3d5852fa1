"""The Python API: what every command does, as a function with plain arguments.

    import recompile

    recompile.quantize("base", "variants", bits=[2, 3, 4, 6])
    recompile.profile("base", "variants/3bpw", ["variants/2bpw", "variants/4bpw", "variants/6bpw"], mode="sketch")
    found = recompile.optimize("profile.jsonl", bits=3.5, out="overrides.yaml")
    recompile.merge("variants/3bpw", "mix", recipe="overrides.yaml")

Arguments have the defaults of the commands. Each function returns a report, and goes on where an interrupted call with
the same arguments stopped, as the command does. `on_event` is called with what happens on the way (recompile.events:
Progress for a bar, Note for people, and events of the work). Wrong arguments raise ArgumentError, every other expected
failure another RecompileError, with one line that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from recompile.events import OnEvent, ignore
from recompile.io.sizes import size_bytes

if TYPE_CHECKING:
    from eval.search.frontier import FrontierReport
    from eval.search.optimize import OptimizeReport
    from recompile.optimize.choose import Constraint

PathLike: TypeAlias = "str | os.PathLike[str]"


def optimize(
    profile: PathLike,
    out: PathLike | None = None,
    *,
    bits: float | None = None,
    size: int | str | None = None,
    total_bpw: float | None = None,
    max_kl: float | None = None,
    max_ppl_increase: float | str | None = None,
    active_bpw: float | None = None,
    pool: Sequence[str] = (),
    solver: str | None = None,
    start: PathLike | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    max_memory: int | str | None = None,
    pin: Sequence[str] = (),
    minimum: Sequence[str] = (),
    maximum: Sequence[str] = (),
    ban: Sequence[str] = (),
    max_step: int | None = None,
    tie: Sequence[str] = (),
    engine: str | None = None,
    check: bool | None = None,
    activations: bool = False,
    guard: bool = True,
    rows: int = 16,
    length: int = 256,
    device: str = "cpu",
    text: PathLike | None = None,
    dataset: str | None = None,
    on_event: OnEvent | None = None,
) -> OptimizeReport:
    """Choose a source for every group of a profile so that KL is least within a size; write the override file.

        found = recompile.optimize("profile.jsonl", bits=3.5, out="overrides.yaml")
        print(found.written.bpw, found.measured.kl if found.measured else found.written.predicted_kl_nats)

    bits, total_bpw, active_bpw: budgets in bits per weight; size: bytes, or text such as "4.2GiB"; max_kl: nats per
    token; max_ppl_increase: 0.02 or "2%"; pool: "NAME=GLOB,GLOB:SIZE" each. At most one of bits, size, total_bpw,
    max_kl and max_ppl_increase; without any, the size of `start`.
    solver: a name of recompile.optimize.solvers.SOLVERS; None: refine for at most 10 minutes where the models are still
    there, else exact. steps, minutes: the most that a solver which runs models may take; max_memory: bytes or text
    pin, minimum, maximum, ban: "GLOB=ID" each; tie: globs; max_step: sources between neighbouring layers; engine: only
    what it loads
    check: measure the recipe beside uniform, hand-made and greedy mixes on rows that nothing else uses; None: where the
    models are there. guard: write the best of those where the recipe does not beat them with confidence. rows, length,
    text, dataset, device: of what is run; activations: with inputs quantized as schemes say

    Raises BudgetError where the budget cannot be met.
    """
    from eval.search.optimize import OptimizeOptions, optimize_recipe
    from recompile.model.rows import RowOptions
    from recompile.optimize.budget import parse_share

    options = OptimizeOptions(
        bpw=bits,
        size_bytes=size_bytes(size),
        total_bpw=total_bpw,
        max_kl=max_kl,
        max_ppl_increase=parse_share(max_ppl_increase) if isinstance(max_ppl_increase, str) else max_ppl_increase,
        active_bpw=active_bpw,
        pools=tuple(pool),
        constraints=_constraints(pin, minimum, maximum, ban),
        ties=tuple(tie),
        engine=engine,
        max_step=max_step,
        solver=solver,
        start=_path(start),
        steps=steps,
        minutes=minutes,
        max_memory_bytes=size_bytes(max_memory),
        check=check,
        activations=activations,
        guard=guard,
        where=RowOptions(rows, length, _path(text), dataset),
        device=device,
    )
    return optimize_recipe(Path(profile), Path(out or "overrides.yaml"), options, on_event or ignore)


def frontier(
    profile: PathLike,
    grid: str,
    out: PathLike | None = None,
    *,
    solver: str = "exact",
    pin: Sequence[str] = (),
    minimum: Sequence[str] = (),
    maximum: Sequence[str] = (),
    ban: Sequence[str] = (),
    max_step: int | None = None,
    tie: Sequence[str] = (),
    engine: str | None = None,
    check: bool | None = None,
    activations: bool = False,
    rows: int = 16,
    length: int = 256,
    device: str = "cpu",
    text: PathLike | None = None,
    dataset: str | None = None,
    on_event: OnEvent | None = None,
) -> FrontierReport:
    """A recipe for every budget of a grid, with a table and a plot, in the folder `out` (default "frontier").

        table = recompile.frontier("profile.jsonl", "2.5:6:0.25").rows

    grid: "LOW:HIGH:STEP", bits per weight; solver: exact or greedy; check: measure every recipe. The others: as in
    `optimize`.
    """
    from eval.search.frontier import write_frontier
    from eval.search.optimize import OptimizeOptions
    from recompile.model.rows import RowOptions

    options = OptimizeOptions(
        solver=solver,
        constraints=_constraints(pin, minimum, maximum, ban),
        max_step=max_step,
        ties=tuple(tie),
        engine=engine,
        check=check,
        activations=activations,
        where=RowOptions(rows, length, _path(text), dataset),
        device=device,
    )
    return write_frontier(Path(profile), Path(out or "frontier"), grid, options, on_event or ignore)


def _constraints(
    pin: Sequence[str], minimum: Sequence[str], maximum: Sequence[str], ban: Sequence[str]
) -> tuple[Constraint, ...]:
    from recompile.optimize.choose import Constraint

    kinds = (("pin", pin), ("min", minimum), ("max", maximum), ("ban", ban))
    return tuple(Constraint.parse(kind, text) for kind, given in kinds for text in given)


def _path(given: PathLike | None) -> Path | None:
    return None if given is None else Path(given)
