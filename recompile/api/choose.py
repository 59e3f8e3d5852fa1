"""Verbs that find a recipe: profile, optimize, frontier."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.api.shared import PathLike, as_path, check_types, shares
from recompile.events import OnEvent, ignore
from recompile.formats import COMPRESSED
from recompile.io.sizes import size_bytes

if TYPE_CHECKING:
    from eval.profile.run import ProfileRequest
    from eval.search.frontier import FrontierReport
    from eval.search.optimize import OptimizeReport
    from recompile.costs import Profile


def profile(
    reference: PathLike,
    base: str | None = None,
    sources: Sequence[str] = (),
    out: PathLike = "profile.jsonl",
    *,
    candidates: Sequence[str] = (),
    format: str = COMPRESSED,
    group_size: int | str | None = None,
    asym: bool = False,
    importance_rows: int = 16,
    feedback: bool = False,
    imatrix: PathLike | None = None,
    level: str = "fused",
    context: str = "clean",
    mode: str = "exact",
    importance: bool = True,
    samples: int | None = None,
    minutes: float | None = None,
    rtol: float | None = None,
    max_rows: int = 256,
    seed: int = 0,
    pairs: bool = False,
    bits: float | None = None,
    whole_mixes: bool = True,
    match: Sequence[str] = (),
    skip: Sequence[str] = (),
    activations: bool = False,
    head: bool = False,
    embedding: bool = False,
    ray: str | None = None,
    max_memory: int | str | None = None,
    rows: int | str | None = None,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    trace: PathLike | None = None,
    positions: str = "response",
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> Profile:
    """Measure what every group of modules costs in KL when it is taken from each source, into the journal `out`.

        recompile.profile("base", "variants/3bpw", ["variants/2bpw", "variants/4bpw"], "profile.jsonl", mode="sketch")
        recompile.profile("base", candidates=["2,3,4,6"], mode="sketch")         # needs no variants

    base: the variant that recipes start from, and sources: others, "DIR" or "ID=DIR"; or candidates, made on the fly:
    bits and schemes ("nvfp4"), rounded as format, group_size (default 64) and asym say, or GGUF types; errors weighed
    by the inputs of importance_rows calibration rows or an imatrix file. base is then the name of one. feedback: bits
    and schemes are rounded with error feedback on those rows, as `quantize` does, and kept in OUT.rounded/
    level: layer, block, fused, expert or tensor; context: swap into the reference ("clean") or into base ("base");
    match, skip: globs of modules; head, embedding: groups, too; activations: swapped modules see quantized inputs
    mode: exact (every swap is run), sketch, hybrid (checks the decisions of a budget of `bits`, for `minutes`),
    diagonal or weights (importance: weighed by inputs); samples, seed, pairs: of random draws; whole_mixes: after a
    sketch of a mixture of experts, measure a few mixes and multiply costs by measured / predicted
    rows: a number, or "auto": until the standard error is below rtol, or for so many minutes, at most max_rows;
    default 16. length, text, dataset, input_ids: of these rows; trace: a file of `trace` in place of text, its choose
    rows (importance_rows: its calibrate rows); positions: KL of the "response" counts, or of "all"
    ray: "local" or the address of a cluster; max_memory: bytes or text such as "8GiB"; device, dtype: where and in what

    Returns the Profile (`cost(group, source)`, `header.groups`). An unfinished journal goes on. Raises ArgumentError,
    JournalError for a journal of another measurement.
    """
    given = {name: value for name, value in locals().items() if name not in ("reference", "out", "on_event")}
    if mode != "weights" or (importance and imatrix is None):
        check_types(reference)
    from eval.profile.run import run_profile

    return run_profile(str(reference), Path(out), profile_request(out, **given), on_event or ignore)


def profile_request(out: PathLike, **given: Any) -> ProfileRequest:
    """The arguments of `profile`, its defaults filled in. Raises ArgumentError for one that is wrong by itself."""
    from eval.profile.exact import ProfileOptions
    from eval.profile.run import ProfileRequest
    from recompile.model.devices import compute_device, compute_dtype
    from recompile.model.rows import RowOptions
    from recompile.quantize.candidates import CandidateOptions

    asked = {name: one.default for name, one in inspect.signature(profile).parameters.items()} | given
    cap = size_bytes(asked["max_memory"], "{max_memory}")
    text, input_ids, trace = (as_path(asked[name]) for name in ("text", "input_ids", "trace"))
    where = RowOptions(None, asked["length"], text, asked["dataset"], input_ids, trace, asked["positions"])
    roles = frozenset(role for role in ("head", "embedding") if asked[role])
    same = (
        "mode",
        "importance",
        "samples",
        "minutes",
        "rtol",
        "max_rows",
        "seed",
        "pairs",
        "whole_mixes",
        "ray",
        "rows",
    )
    return ProfileRequest(
        base=None if asked["base"] is None else str(asked["base"]),
        sources=tuple(str(source) for source in asked["sources"]),
        candidates=tuple(str(candidate) for candidate in asked["candidates"]),
        making=CandidateOptions(
            **{name: asked[name] for name in ("format", "group_size", "asym", "importance_rows", "feedback")},
            **{name: asked[name] for name in ("device", "level")},
            imatrix=as_path(asked["imatrix"]),
            where=where,
            out=Path(out),
            roles=roles,
            cap_bytes=cap,
        ),
        options=ProfileOptions(
            **{name: asked[name] for name in ("level", "context", "head", "embedding", "activations")},
            match=tuple(asked["match"]),
            skip=tuple(asked["skip"]),
            dtype=compute_dtype(asked["dtype"]),
            device=compute_device(asked["device"]),
            max_memory_bytes=cap,
        ),
        **{name: asked[name] for name in same},
        bpw=asked["bits"],
        where=where,
    )


def _choosing(
    *,
    pin: Sequence[str] = (),
    minimum: Sequence[str] = (),
    maximum: Sequence[str] = (),
    ban: Sequence[str] = (),
    max_step: int | None = None,
    tie: Sequence[str] = (),
    engine: str | None = None,
    free_experts: bool = False,
    check: bool | None = None,
    activations: bool = False,
    rows: int = 16,
    length: int | None = None,
    device: str = "cpu",
    text: PathLike | None = None,
    dataset: str | None = None,
    trace: PathLike | None = None,
    positions: str = "response",
) -> dict[str, Any]:
    """What `optimize` and `frontier` have in common, as fields of OptimizeOptions."""
    from recompile.model.rows import RowOptions
    from recompile.optimize.choose import Constraint

    kinds = (("pin", pin), ("min", minimum), ("max", maximum), ("ban", ban))
    if length is None:
        length = 256 if trace is None else 512
    return {
        "constraints": tuple(Constraint.parse(kind, text) for kind, given in kinds for text in given),
        "max_step": max_step,
        "ties": tuple(tie),
        "engine": engine,
        "free_experts": free_experts,
        "check": check,
        "activations": activations,
        "where": RowOptions(rows, length, as_path(text), dataset, None, as_path(trace), positions),
        "device": device,
    }


@shares(_choosing)
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
    guard: bool = True,
    context: int | None = None,
    cache_bits: Sequence[str] = (),
    on_event: OnEvent | None = None,
    **choosing: Any,
) -> OptimizeReport:
    """Choose a source for every group of a profile so that KL is least within a size; write the override file.

        found = recompile.optimize("profile.jsonl", bits=3.5, out="overrides.yaml")
        print(found.written.bpw, found.measured.kl if found.measured else found.written.predicted_kl_nats)

    bits, total_bpw, active_bpw: budgets in bits per weight; size: bytes, or text such as "4.2GiB"; max_kl: nats per
    token; max_ppl_increase: 0.02 or "2%"; pool: "NAME=GLOB,GLOB:SIZE" each. At most one of bits, size, total_bpw,
    max_kl and max_ppl_increase; without any, the size of `start`.
    solver: a name of recompile.optimize.solvers.SOLVERS; None: refine for at most 10 minutes where the models are still
    there, else exact. steps, minutes: the most that a solver which runs models may take; max_memory: bytes or text
    context, cache_bits: `size` is of all tensors and of a cache of so many tokens, one of these ("8,6" as exllamav3
    stores it, "q8_0" as llama.cpp does; f16 where none is given), whose KL is measured on the base
    pin, minimum, maximum, ban: "GLOB=ID" each; tie: globs; max_step: sources between neighbouring layers; engine: only
    what it loads; free_experts: without an engine, experts of a layer may differ, which few engines load
    check: measure the recipe beside uniform, hand-made and greedy mixes on rows that nothing else uses; None: where the
    models are there. guard: write the best of those where the recipe does not beat them with confidence. rows, length,
    text, dataset, device: of what is run; trace: a file of `trace` in place of text, its choose, accept and report
    rows; positions: KL of the "response" counts, or of "all"; activations: with inputs quantized as schemes say

    Raises BudgetError where the budget cannot be met.
    """
    from eval.search.optimize import OptimizeOptions, optimize_recipe
    from recompile.optimize.budget import parse_share

    options = OptimizeOptions(
        bpw=bits,
        size_bytes=size_bytes(size, "{size}"),
        total_bpw=total_bpw,
        max_kl=max_kl,
        max_ppl_increase=parse_share(max_ppl_increase) if isinstance(max_ppl_increase, str) else max_ppl_increase,
        active_bpw=active_bpw,
        pools=tuple(pool),
        solver=solver,
        start=as_path(start),
        steps=steps,
        minutes=minutes,
        max_memory_bytes=size_bytes(max_memory, "{max_memory}"),
        guard=guard,
        context=context,
        cache_bits=tuple(cache_bits),
        **_choosing(**choosing),
    )
    return optimize_recipe(Path(profile), Path(out or "overrides.yaml"), options, on_event or ignore)


@shares(_choosing)
def frontier(
    profile: PathLike,
    grid: str,
    out: PathLike | None = None,
    *,
    solver: str = "exact",
    on_event: OnEvent | None = None,
    **choosing: Any,
) -> FrontierReport:
    """A recipe for every budget of a grid, with a table and a plot, in the folder `out` (default "frontier").

        table = recompile.frontier("profile.jsonl", "2.5:6:0.25").rows

    grid: "LOW:HIGH:STEP", bits per weight; solver: exact or greedy; check: measure every recipe. The others: as in
    `optimize`.
    """
    from eval.search.frontier import write_frontier
    from eval.search.optimize import OptimizeOptions

    options = OptimizeOptions(solver=solver, **_choosing(**choosing))
    return write_frontier(Path(profile), Path(out or "frontier"), grid, options, on_event or ignore)
