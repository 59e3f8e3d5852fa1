"""model_profile: what every group of modules costs in KL when it is taken from each variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from recompile.cli.common import Screen, check_json_path, print_json, progress
from recompile.cli.options import (
    check_made,
    device_options,
    made_options,
    many_values_command,
    output_options,
    text_options,
)
from recompile.costs import LEVELS
from recompile.errors import RecompileError
from recompile.io.report import format_columns
from recompile.io.sizes import format_bytes, format_seconds, parse_size
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import check_vocabulary, read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from eval.profile.adaptive_rows import RowsDone
    from eval.profile.exact import ProfileJob
    from eval.profile.sketch import SketchOptions
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.costs import Profile
    from recompile.recipe.recipe import SourceId

DEFAULT_RTOL = 0.05  # of -r auto, where no time is given either


@many_values_command(
    "model_profile",
    outputs={"--json": "json_path"},
    inputs=("model_b", "in_dir", "sources", "text", "input_ids", "imatrix", "out"),
)
@click.option("-mb", "--model-b", "--model_b", required=True, help="The reference: the unquantized base.")
@click.option("-i", "--in-dir", "--in_dir", help="The variant that recipes start from; with --candidates its name.")
@click.option("-s", "--sources", multiple=True, help="Other variants, as DIR or ID=DIR; any number.")
@click.option(
    "--candidates",
    multiple=True,
    help="Before any variant exists: make these on the fly: bits (2,3,4,6) and schemes (nvfp4) rounded on fitted grids "
    "without GPTQ; GGUF types (Q2_K,IQ3_S,Q4_K,IQ4_KSS) by their encoders.",
)
@made_options
@click.option(
    "--importance-rows",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="--candidates: calibration rows by whose inputs errors are weighed on fitting grids; 0: all alike.",
)
@click.option(
    "--imatrix", metavar="FILE", help="--candidates of GGUF types: importance from this imatrix file instead."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("profile.jsonl"),
    show_default=True,
    help="The journal; an unfinished one goes on.",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="fused",
    show_default=True,
    help="What is swapped together: a layer; attention or MLP (all experts of a layer); q,k,v and gate,up; expert: as "
    "fused, and every matrix of every expert by itself; one tensor.",
)
@click.option(
    "--context",
    type=click.Choice(["clean", "base"]),
    default="clean",
    show_default=True,
    help="Swap into the reference, or into the -i variant.",
)
@click.option(
    "--mode",
    type=click.Choice(["exact", "sketch", "hybrid", "diagonal", "weights"]),
    default="exact",
    show_default=True,
    help="Run every swap; estimate all of them in a few passes; estimate, then run those that decide at -b; the "
    "plain squared-gradient score; or weights: the error of every matrix alone, weighted by its inputs (no KL).",
)
@click.option(
    "--importance/--no-importance",
    default=True,
    show_default=True,
    help="With --mode weights: weigh errors by the inputs of the text, or all columns alike.",
)
@click.option(
    "--samples",
    type=click.IntRange(2, 65536),
    help="Random draws per row of the estimating modes; default 16, or 3 where --minutes are filled with rows.",
)
@click.option(
    "--minutes",
    type=float,
    help="With --mode hybrid: time for the exact swaps, default 10. Else: as many rows as fit in this time (-r auto); "
    "with a number of rows given, as many draws of them.",
)
@click.option(
    "--rtol",
    type=click.FloatRange(min=0, min_open=True),
    help="With -r auto: add rows until the standard error of the total cost, over documents, is below this share of it "
    "for every candidate; default 0.05, or with --minutes what time allows.",
)
@click.option("--max-rows", default=256, show_default=True, help="With -r auto: never more rows than this.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@click.option("--pairs", is_flag=True, help="Keep every draw, from which interactions of pairs can be had.")
@click.option("-b", "--bits", type=float, help="With --mode hybrid: the budget whose decisions are checked, in bpw.")
@click.option("--match", multiple=True, help="Only modules that match a glob (* crosses dots).")
@click.option("--skip", multiple=True, help="Not the modules that match a glob.")
@click.option(
    "--activations",
    is_flag=True,
    help="With --mode exact: swapped modules also see their inputs quantized as their schemes say (w8a8, ...).",
)
@click.option("--head", is_flag=True, help="The output head is a group too, where variants quantize it.")
@click.option("--embedding", is_flag=True, help="The embedding is a group too, where variants quantize it.")
@click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="local",
    help="Spread the swaps of --mode exact, or the rows and sweeps of a sketch, over a Ray cluster at an address "
    "(auto, ray://HOST:10001), or over the cores of this machine.",
)
@click.option("--max-memory", help="Never use more memory than this, e.g. 8GiB.")
@text_options(rows=16, length=512, auto=True)
@device_options
@output_options
def main(
    model_b: str,
    in_dir: str | None,
    sources: tuple[str, ...],
    candidates: tuple[str, ...],
    format_name: str,
    group_size: str,
    asym: bool,
    importance_rows: int,
    imatrix: str | None,
    out: Path,
    level: str,
    context: str,
    mode: str,
    importance: bool,
    samples: int | None,
    minutes: float | None,
    seed: int,
    pairs: bool,
    bits: float | None,
    match: tuple[str, ...],
    skip: tuple[str, ...],
    activations: bool,
    head: bool,
    embedding: bool,
    ray_address: str | None,
    max_memory: str | None,
    rtol: float | None,
    max_rows: int,
    rows: int | None,
    length: int,
    text: Path | None,
    dataset: str | None,
    input_ids: Path | None,
    device: str,
    dtype: str | None,
    json_path: Path | None,
    quiet: bool,
) -> None:
    """Swap one group of modules at a time and measure the end-to-end KL(reference || swapped).

    \b
    Examples:
      model_profile -mb base -i 3bpw -s 2bpw 4bpw 6bpw -o profile.jsonl
      model_profile -mb base -i 3bpw -s 2bpw 4bpw 6bpw --level tensor --mode sketch -o profile.jsonl
      model_profile -mb base --candidates 2,3,4,6 -o profile.jsonl        # needs no variants
      model_profile -mb base --candidates Q2_K,IQ3_S,Q4_K,IQ4_KSS,Q6_K --mode sketch -o profile.jsonl
    """
    check_json_path(json_path)
    if activations and (mode != "exact" or ray_address is not None):
        raise RecompileError("--activations runs swaps one by one: it needs --mode exact, without --ray")
    if mode == "hybrid" and bits is None:
        raise RecompileError("--mode hybrid checks the decisions of one budget: give it, e.g. -b 3.5")
    from recompile.checkpoint.checkpoint import open_checkpoint

    cap = parse_size(max_memory) if max_memory is not None else None
    reference = open_checkpoint(model_b)
    if candidates:
        if sources:
            raise RecompileError("--candidates and -s exclude each other: candidates are made, sources are there")
        roles = frozenset(role for role, asked in (("head", head), ("embedding", embedding)) if asked)
        check_made(format_name)
        how = (format_name, group_size, asym, importance_rows, imatrix)
        make = Making(*how, text, dataset, device, out, level, roles, cap, quiet)
        offered = _made_candidates(reference, candidates, make)
        base_id = _named(in_dir, offered)
    else:
        if in_dir is None or not sources:
            raise RecompileError("give -i VARIANT and -s VARIANT..., or --candidates 2,3,4,6 to make them on the fly")
        base_id, base_dir = _source(in_dir)
        offered = [(base_id, open_checkpoint(base_dir))]
        for given in sources:
            source_id, directory = _source(given)
            offered.append((source_id, open_checkpoint(directory)))
    for _, checkpoint in offered:
        for note in checkpoint.notes:
            click.echo(f"Warning: {note}", err=True)

    from eval.profile.adaptive_rows import FILLING_SAMPLES, RowLimits, profile_more_rows
    from eval.profile.exact import ProfileJob, ProfileOptions
    from eval.profile.hybrid import HybridOptions, profile_hybrid
    from eval.profile.sketch import SketchOptions
    from recompile.optimize.choose import Budget

    auto = _wants_auto(mode, rows, rtol, minutes)
    directories = [reference.path, *(checkpoint.path for _, checkpoint in offered)]
    found, vocab = read_rows(directories, "choose", None if auto else rows, length, text, dataset, input_ids)
    check_vocabulary(reference, vocab)
    if auto:
        found = found.part(0, min(max_rows, len(found.ids)))
    options = ProfileOptions(
        level=level,
        context=context,
        match=match,
        skip=skip,
        head=head,
        embedding=embedding,
        dtype=compute_dtype(dtype),
        device=compute_device(device),
        max_memory_bytes=cap,
        activations=activations,
    )
    for_draws = minutes if mode != "hybrid" and not auto else None
    if samples is None:
        samples = FILLING_SAMPLES if auto and minutes is not None and mode != "hybrid" else 16
    sketch = SketchOptions(samples, for_draws, seed, keep_pairs=pairs, mode=mode)
    job = ProfileJob(reference, base_id, offered, found.ids, out, options, found.sha256, found.source)
    run = _profiler(sketch, importance, ray_address)
    if auto:
        for_rows = minutes if mode != "hybrid" else None
        limits = RowLimits(DEFAULT_RTOL if rtol is None and for_rows is None else rtol, for_rows)
        settings = None if mode == "exact" else sketch
        events = profile_more_rows(found, out, limits, lambda some, n, to: run(job.over(some, to), n), settings)
    else:
        events = run(job, 0)
    click.echo(f"{'at most ' if auto else ''}{len(found.ids)} rows x {found.ids.shape[1]} tokens", err=True)
    if mode == "hybrid":
        wanted = HybridOptions(Budget(bpw=bits), 10.0 if minutes is None else minutes)
        events = profile_hybrid(job, sketch, wanted, sketching=events)
    profile: Profile | None = None
    try:
        profile = _follow(events, out, quiet)
    except KeyboardInterrupt:
        from recompile.costs import load_profile

        if out.exists():  # the first block of -r auto is not put together yet
            click.echo(_ranking(load_profile(out)))
        click.echo(f"Interrupted; {out} holds what was measured, the same command goes on.", err=True)
        raise SystemExit(130) from None
    assert profile is not None, "every profiler ends with the profile"
    if str(json_path) != "-":
        click.echo(_ranking(profile))
        click.echo(f"\nNext: model_optimize {out} -b 4.0 -o overrides.yaml")
    if json_path is not None:
        print_json(json_path, profile_summary(profile))


def _wants_auto(mode: str, rows: int | None, rtol: float | None, minutes: float | None) -> bool:
    """Whether the number of rows is found on the way. Raises RecompileError where options contradict each other."""
    given = click.get_current_context().get_parameter_source("rows")
    auto = rows is None or (minutes is not None and mode != "hybrid" and given is ParameterSource.DEFAULT)
    if auto and mode == "weights":
        raise RecompileError("--mode weights has no noise of rows; give a number of rows in place of -r auto")
    if rtol is not None and not auto:
        raise RecompileError(
            f"--rtol adds rows until the error is small enough, and -r {rows} fixes them: give -r auto"
        )
    return auto


def _profiler(
    sketch: SketchOptions, importance: bool, ray_address: str | None
) -> Callable[[ProfileJob, int], Iterator[Any]]:
    """What carries out a job: (job, number of the first of its rows) -> events."""
    from eval.profile.exact import profile_exact
    from eval.profile.sketch import profile_sketch

    mode = sketch.mode
    if ray_address is not None and mode not in ("exact", "sketch", "diagonal"):
        raise RecompileError(f"--ray spreads exact swaps, or rows of a sketch; --mode {mode} runs in one process")

    profiler: Callable[..., Iterator[Any]] = profile_exact if mode == "exact" else profile_sketch
    if ray_address is not None:
        from eval.profile.cluster import profile_on_ray, sketch_on_ray

        address = None if ray_address == "local" else ray_address
        profiler = partial(profile_on_ray if mode == "exact" else sketch_on_ray, address=address)
    elif mode == "weights":
        from eval.profile.weights import profile_weights

        profiler = partial(profile_weights, importance=importance)

    def run(job: ProfileJob, first_row: int) -> Iterator[Any]:
        settings = [] if mode in ("exact", "weights") else [replace(sketch, first_row=first_row)]
        return profiler(job, *settings)

    return run


def _follow(events: Iterator[Any], out: Path, quiet: bool) -> Profile | None:
    """Draw the progress of a profiler; returns the Profile that it ends with."""
    from eval.profile.adaptive_rows import RowsDone
    from eval.profile.exact import Measured, Started
    from eval.profile.hybrid import HybridRound
    from eval.profile.sketch import SketchProgress, SketchStarted, SweepDone
    from recompile.costs import Profile

    profile: Profile | None = None
    with progress("profiling", 1, unit="steps", quiet=quiet) as bar:
        for event in events:
            if isinstance(event, Started):
                layers = "kept loaded" if event.plan.resident_weights else "read again for every wave"
                _say(
                    f"{event.total} swaps, {event.resumed} of them already in {out}; plan: "
                    f"{format_bytes(event.plan.total)} of memory at most, layers {layers}"
                )
            elif isinstance(event, SketchStarted):
                _say(f"{event.sweeps} sweeps, {event.resumed} of them done before; plan: {event.plan.describe()}")
            elif isinstance(event, Measured):
                swap = event.measurement
                text = f"{swap.group or 'control'} from {swap.source or '-'}: {swap.mean:.5f}"
                bar.update(event.done, text, event.total)
            elif isinstance(event, SketchProgress):
                bar.update(event.done, event.text, event.total)
            elif isinstance(event, SweepDone):
                _say(f"sweep {event.sweeps} took {format_seconds(event.seconds)}; dearest: {_dearest(event.profile)}")
            elif isinstance(event, HybridRound):
                _say(
                    f"{event.swaps} swaps run after {format_seconds(event.seconds)}; the next decision is worth "
                    f"{event.gain_nats:.2g} nats per token"
                )
            elif isinstance(event, RowsDone):
                _say(_rows_done(event))
            elif isinstance(event, Profile):
                profile = event
    return profile


def _rows_done(state: RowsDone) -> str:
    """How well the total is known, and what follows."""
    text = f"{state.rows} rows of {state.documents} documents: standard error of the total {100 * state.error:.2g} %"
    text += f" (candidate {state.candidate})"
    if state.limits.rtol is not None:
        text += f", wanted {100 * state.limits.rtol:.2g} %"
    if state.reason is None:
        return f"{text}; {state.next_rows} more rows, of at most {state.most}"
    if state.limits.rtol is not None and not state.reached:
        text += ", NOT reached"
    return f"{text}; stopped: {state.reason}"


def _say(text: str) -> None:
    click.echo(text, err=True)


def _dearest(profile: Profile, most: int = 3) -> str:
    """The groups that cost most at the base variant's bits."""
    costs = {group.name: profile.cost(group.name, profile.header.base) for group in profile.header.groups}
    ranked = sorted(((c.kl_nats, name) for name, c in costs.items() if c is not None), reverse=True)
    return ", ".join(f"{name} {kl:.4f}" for kl, name in ranked[:most])


@dataclass(frozen=True)
class Making:
    """How candidates are made on the fly, as the options say it. roles: other than layers that are groups too."""

    format_name: str
    group_size: str
    asym: bool
    importance_rows: int
    imatrix: str | None
    text: Path | None
    dataset: str | None
    device: str
    out: Path
    level: str
    roles: frozenset[str]
    cap_bytes: int | None
    quiet: bool


def _made_candidates(reference: Checkpoint, names: tuple[str, ...], make: Making) -> list[tuple[SourceId, Checkpoint]]:
    """The candidates of `--candidates`, which are made on the fly from the reference."""
    from recompile.quantize.fake_quant import KEEP_BYTES
    from recompile.quantize.lazy_variant import (
        exl_spec_of,
        fallbacks_of,
        make_variants,
        parse_candidates,
        save_importance,
        spec_of,
    )

    if make.group_size != "channel" and not make.group_size.isdigit():
        raise RecompileError(f"--group-size {make.group_size}: wanted a number such as 64, or channel")
    size = None if make.group_size == "channel" else int(make.group_size)
    if make.format_name in ("exl2", "exl3"):
        specs = [exl_spec_of(name, make.format_name) for name in parse_candidates(names)]
        if make.roles:
            raise RecompileError(
                f"--head, --embedding: {make.format_name} candidates have one head of 6 bits, and a dense embedding"
            )
        if make.format_name == "exl3":
            _say(
                "Note: EXL3 candidates are stand-ins, the weight with noise as large as what the encoder leaves; sizes "
                "are the files'."
            )
    else:
        specs = [spec_of(name, group_size=size, symmetric=not make.asym) for name in parse_candidates(names)]
    types = [source_id for source_id, spec in specs if "type" in spec]
    if types:
        _check_gguf_groups(reference, make)
        if len(types) < len(specs):
            _say("Note: GGUF types and compressed-tensors forms are never in one file: ban one kind in model_optimize.")
    elif make.imatrix is not None:
        raise RecompileError("--imatrix: goes with --candidates of GGUF types")
    importance: Mapping[str, Tensor] | None = None
    if types and (make.imatrix is not None or make.importance_rows):
        importance = _gguf_importance(reference, make)
    elif make.importance_rows and make.format_name != "exl3":  # noise has no use for it
        from recompile.quantize.calibrate import input_power

        found, vocab = read_rows(
            [reference.path], "calibrate", make.importance_rows, 512, make.text, make.dataset, None
        )
        check_vocabulary(reference, vocab)
        importance = input_power(reference, found.ids, device=compute_device(make.device))
    offered = make_variants(reference, specs, importance, make.roles, KEEP_BYTES if make.cap_bytes is None else 0)
    if importance is not None:
        save_importance(importance, make.out)
    for line in fallbacks_of(offered):
        _say(line)
    return list(offered)


def _check_gguf_groups(reference: Checkpoint, make: Making) -> None:
    """Raise RecompileError for groups that no GGUF file can tell apart."""
    from recompile.costs import is_expert

    if make.level in ("expert", "tensor") and any(is_expert(name) for name in reference.modules):
        raise RecompileError(
            f"--level {make.level}: in GGUF all experts of a projection are one tensor of one type; use --level fused"
        )


def _gguf_importance(reference: Checkpoint, make: Making) -> Mapping[str, Tensor]:
    """As `model_quantize --format gguf` gets it: of calibration rows, or of an imatrix file."""
    from recompile.gguf.imatrix import read_imatrix
    from recompile.quantize.gguf import base_tensors, importance_from
    from recompile.quantize.run import calibrate_importance

    if make.imatrix is not None:
        tensors = base_tensors(reference)
        return importance_from(read_imatrix(make.imatrix), tensors, make.imatrix).values
    found, vocab = read_rows([reference.path], "calibrate", make.importance_rows, 512, make.text, make.dataset, None)
    check_vocabulary(reference, vocab)
    with Screen(make.quiet) as screen:
        values: Mapping[str, Tensor] = calibrate_importance(reference, found, make.device, None, screen).values
    return values


def _named(name: str | None, offered: list[tuple[SourceId, Checkpoint]]) -> SourceId:
    """The candidate that recipes start from: the one named by -i, else the middle one."""
    ids = [source_id for source_id, _ in offered]
    if name is None:
        return ids[(len(ids) - 1) // 2]
    found = next((source_id for source_id in ids if str(source_id) == name), None)
    if found is None:
        raise RecompileError(f"-i {name}: with --candidates it names one of them: {', '.join(map(str, ids))}")
    return found


def _source(given: str) -> tuple[SourceId, str]:
    """`ID=DIR` or `DIR`."""
    from recompile.costs import id_of_directory

    name, separator, directory = given.partition("=")
    if separator and name and "/" not in name:
        return (int(name) if name.isdigit() else name), directory
    return id_of_directory(given), given


def profile_summary(profile: Profile) -> dict[str, object]:
    """Per group and source the cost and the bits, for --json."""
    groups = []
    unreached = set(profile.unreached())
    for group in profile.header.groups:
        costs = {source: profile.cost(group.name, source) for source in group.bits}
        groups.append(
            {
                "name": group.name,
                "weights": group.weights,
                "bits": dict(group.bits),
                "costs": costs,
                "reached": group.name not in unreached,
            }
        )
    control = profile.control.mean if profile.control is not None else None
    return {"header": profile.header, "control_kl_nats": control, "groups": groups}


def _ranking(profile: Profile, most: int = 20) -> str:
    """The groups that hurt most at the base variant's bits, with every candidate's cost."""
    header = profile.header
    labels = [candidate.label for candidate in header.candidates]
    order = sorted(
        header.groups,
        key=lambda group: (
            -max(
                (cost.kl_nats for label in labels if (cost := profile.cost(group.name, label)) is not None),
                default=float("-inf"),
            )
        ),
    )
    rows = []
    for group in order[:most]:
        cells = []
        for label in labels:
            cost = profile.cost(group.name, label)
            mark = " prior" if cost is not None and cost.is_prior else ""
            cells.append("-" if cost is None else f"{cost.kl_nats:.5f} ± {cost.std_error:.5f}{mark}")
        rows.append((group.name, *cells))
    where = "the reference" if header.context == "clean" else f"the {header.base} variant"
    title = f"KL in nats per token of taking a group from each source, swapped into {where}"
    if header.method == "weights":
        title = "Weighted relative error of the weights, times rows, of taking a group from each source (no nats)"
    if len(order) > most:
        title += f" (the {most} dearest of {len(order)} groups)"
    text = f"{title}\n" + format_columns(rows, ("group", *labels), range(1, len(labels) + 1))
    unreached = profile.unreached()
    if unreached:
        text += (
            f"\n{len(unreached)} of {len(header.groups)} groups are experts that no token of these rows reached, such "
            f"as {unreached[0]}: unmeasured. Their prior is the median over the same projection of the other experts; "
            f"more rows help."
        )
    return text
