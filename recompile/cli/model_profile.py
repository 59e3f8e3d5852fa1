"""model_profile: what every group of modules costs in KL when it is taken from each variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recompile.cli.common import EXIT_INTERRUPTED, Screen, command, show
from recompile.cli.options import (
    budget_bits_option,
    device_options,
    imatrix_option,
    in_dir_option,
    made_options,
    max_memory_option,
    model_b_option,
    output_options,
    path_option,
    samples_option,
    text_options,
    trace_options,
)
from recompile.cli.render_profile import describe_next, describe_profile
from recompile.costs import LEVELS, load_profile


@command(
    "model_profile",
    outputs={"--json": "json_path"},
    inputs=("reference", "base", "sources", "text", "input_ids", "trace", "imatrix", "out"),
)
@model_b_option("reference", "The reference: the unquantized base.")
@in_dir_option("base", "The variant that recipes start from; with --candidates its name.", required=False)
@click.option("-s", "--sources", multiple=True, help="Other variants, as DIR or ID=DIR; any number.")
@click.option(
    "--candidates",
    multiple=True,
    help="Before any variant exists: make these on the fly: bits (2,3,4,6) and schemes (nvfp4) rounded on fitted grids "
    "without GPTQ (see --feedback); GGUF types (Q2_K,IQ3_S,Q4_K,IQ4_KSS) by their encoders.",
)
@made_options
@click.option(
    "--importance-rows",
    type=click.IntRange(min=0),
    default=16,
    help="--candidates: calibration rows by whose inputs errors are weighed on fitting grids; 0: all alike.",
)
@click.option("--feedback", is_flag=True, help="--candidates: rounded with error feedback (GPTQ) on those rows before.")
@imatrix_option("--candidates of GGUF types: importance from this imatrix file instead.")
@path_option(
    "-o",
    "--out",
    default=Path("profile.jsonl"),
    says="The journal; an unfinished one goes on.",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    default="fused",
    help="What is swapped together: a layer; attention or MLP (all experts of a layer); q,k,v and gate,up; expert: as "
    "fused, and every matrix of every expert by itself; one tensor.",
)
@click.option(
    "--context",
    type=click.Choice(["clean", "base"]),
    default="clean",
    help="Swap into the reference, or into the -i variant.",
)
@click.option(
    "--mode",
    type=click.Choice(["exact", "sketch", "hybrid", "diagonal", "weights"]),
    default="exact",
    help="Run every swap; estimate all of them in a few passes; estimate, then run those that decide at -b; the "
    "plain squared-gradient score; or weights: the error of every matrix alone, weighted by its inputs (no KL).",
)
@click.option(
    "--importance/--no-importance",
    default=True,
    help="With --mode weights: weigh errors by the inputs of the text, or all columns alike.",
)
@samples_option("Random draws per row of the estimating modes; default 16, or 3 where --minutes are filled with rows.")
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
@click.option("--max-rows", default=256, help="With -r auto: never more rows than this.")
@click.option("--seed", default=0, help="Of the draws.")
@click.option("--pairs", is_flag=True, help="Keep every draw, from which interactions of pairs can be had.")
@budget_bits_option(says="With --mode hybrid: the budget whose decisions are checked, in bpw.")
@click.option(
    "--whole-mixes/--no-whole-mixes",
    default=True,
    help="With --mode sketch of a mixture of experts: measure a few whole mixes and multiply costs by measured / "
    "predicted, since a sketch does not see tokens that go to other experts.",
)
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
    "ray",
    is_flag=False,
    flag_value="local",
    help="Spread the swaps of --mode exact, or the rows and sweeps of a sketch, over a Ray cluster at an address "
    "(auto, ray://HOST:10001), or over the cores of this machine.",
)
@max_memory_option()
@text_options(rows=16, length=512, auto=True)
@trace_options
@device_options
@output_options
def main(json_path: Path | None, quiet: bool, **options: Any) -> None:
    """Swap one group of modules at a time and measure the end-to-end KL(reference || swapped).

    \b
    Examples:
      model_profile -mb base -i 3bpw -s 2bpw 4bpw 6bpw -o profile.jsonl
      model_profile -mb base -i 3bpw -s 2bpw 4bpw 6bpw --level tensor --mode sketch -o profile.jsonl
      model_profile -mb base --candidates 2,3,4,6 -o profile.jsonl        # needs no variants
      model_profile -mb base --candidates Q2_K,IQ3_S,Q4_K,IQ4_KSS,Q6_K --mode sketch -o profile.jsonl
    """
    from recompile import api

    out = options["out"]
    try:
        with Screen(quiet) as screen:
            profile = api.profile(**options, on_event=screen)
    except KeyboardInterrupt:
        if out.exists():  # the first block of -r auto is not put together yet
            click.echo(describe_profile(load_profile(out)))
        click.echo(f"Interrupted; {out} holds what was measured, the same command goes on.", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
    show(profile.as_dict(), json_path, lambda: describe_next(profile, out))
