"""model_profile: what every group of modules costs in KL when it is taken from each variant."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from recompile.cli.common import check_json_path, format_bytes, format_columns, print_json, progress
from recompile.cli.options import (
    check_vocabulary,
    compute_device,
    compute_dtype,
    device_options,
    many_values_command,
    output_options,
    parse_size,
    read_rows,
    text_options,
)

if TYPE_CHECKING:
    from recompile.checkpoint import Checkpoint
    from recompile.costs import Profile
    from recompile.recipe import SourceId


@many_values_command("model_profile")
@click.option("-mb", "--model-b", "--model_b", required=True, help="The reference: the unquantized base.")
@click.option("-i", "--in-dir", "--in_dir", required=True, help="The variant that recipes start from.")
@click.option("-s", "--sources", multiple=True, required=True, help="Other variants, as DIR or ID=DIR; any number.")
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
    type=click.Choice(["layer", "block", "fused", "tensor"]),
    default="fused",
    show_default=True,
    help="What is swapped together: a layer; attention or MLP; q,k,v and gate,up; one tensor.",
)
@click.option(
    "--context",
    type=click.Choice(["clean", "base"]),
    default="clean",
    show_default=True,
    help="Swap into the reference, or into the -i variant.",
)
@click.option("--match", multiple=True, help="Only modules that match a glob (* crosses dots).")
@click.option("--skip", multiple=True, help="Not the modules that match a glob.")
@click.option("--head", is_flag=True, help="The output head is a group too, where variants quantize it.")
@click.option("--embedding", is_flag=True, help="The embedding is a group too, where variants quantize it.")
@click.option("--max-memory", help="Never use more memory than this, e.g. 8GiB.")
@text_options(rows=16, length=512)
@device_options
@output_options
def main(
    model_b: str,
    in_dir: str,
    sources: tuple[str, ...],
    out: Path,
    level: str,
    context: str,
    match: tuple[str, ...],
    skip: tuple[str, ...],
    head: bool,
    embedding: bool,
    max_memory: str | None,
    rows: int,
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
    Example:
      model_profile -mb base -i 3bpw -s 2bpw 4bpw 6bpw -o profile.jsonl
    """
    check_json_path(json_path)
    from recompile.checkpoint import open_checkpoint

    cap = parse_size(max_memory) if max_memory is not None else None
    reference = open_checkpoint(model_b)
    base_id, base_dir = _source(in_dir)
    candidates: list[tuple[SourceId, Checkpoint]] = [(base_id, open_checkpoint(base_dir))]
    for given in sources:
        source_id, directory = _source(given)
        candidates.append((source_id, open_checkpoint(directory)))
    for _, checkpoint in candidates:
        for note in checkpoint.notes:
            click.echo(f"Warning: {note}", err=True)

    from eval.profile import Measured, ProfileOptions, Started, profile_exact
    from recompile.costs import Profile

    directories = [reference.path, *(checkpoint.path for _, checkpoint in candidates)]
    found, vocab = read_rows(directories, "choose", rows, length, text, dataset, input_ids)
    check_vocabulary(reference, vocab)
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
    )
    events = profile_exact(
        reference, base_id, candidates, found.ids, out, options, rows_sha256=found.sha256, rows_source=found.source
    )
    started = next(events)
    assert isinstance(started, Started), "the plan comes first"
    plan = started.plan
    click.echo(
        f"{started.total} swaps on {rows if input_ids is None else len(found.ids)} rows x {found.ids.shape[1]} tokens, "
        f"{started.resumed} of them already in {out}; plan: {format_bytes(plan.total)} of memory at most, layers "
        f"{'kept loaded' if plan.resident_weights else 'read again for every wave'}",
        err=True,
    )
    profile: Profile | None = None
    try:
        with progress("profiling", started.total, unit="swaps", quiet=quiet) as bar:
            bar.update(started.resumed)
            for event in events:
                if isinstance(event, Measured):
                    swap = event.measurement
                    bar.update(event.done, f"{swap.group or 'control'} from {swap.source or '-'}: {swap.mean:.5f}")
                elif isinstance(event, Profile):
                    profile = event
    except KeyboardInterrupt:
        from recompile.costs import load_profile

        click.echo(_ranking(load_profile(out)))
        click.echo(f"Interrupted; {out} holds what was measured, the same command goes on.", err=True)
        raise SystemExit(130) from None
    assert profile is not None, "profile_exact ends with the profile"
    if str(json_path) != "-":
        click.echo(_ranking(profile))
        click.echo(f"\nNext: model_optimize {out} -b 4.0 -o overrides.yaml")
    if json_path is not None:
        print_json(json_path, profile_summary(profile))


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
    for group in profile.header.groups:
        costs = {source: profile.cost(group.name, source) for source in group.bits}
        groups.append({"name": group.name, "weights": group.weights, "bits": dict(group.bits), "costs": costs})
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
            cells.append("-" if cost is None else f"{cost.kl_nats:.5f} ± {cost.std_error:.5f}")
        rows.append((group.name, *cells))
    where = "the reference" if header.context == "clean" else f"the {header.base} variant"
    title = f"KL in nats per token of taking a group from each source, swapped into {where}"
    if len(order) > most:
        title += f" (the {most} dearest of {len(order)} groups)"
    return f"{title}\n" + format_columns(rows, ("group", *labels), range(1, len(labels) + 1))
