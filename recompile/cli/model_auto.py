"""model_auto: from a base model to the best mix at a size in one resumable command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from recompile.arguments import spell
from recompile.cli.common import Screen, command, flags_of, show
from recompile.cli.options import (
    budget_bits_option,
    device_options,
    in_dir_option,
    made_options,
    max_memory_option,
    output_options,
    path_option,
    rounding_option,
    samples_option,
    text_file_options,
    tokenizer_from_option,
    trace_options,
)
from recompile.cli.render_auto import describe_auto, describe_stage
from recompile.planning import TARGETS


@command("model_auto", outputs={"--json": "json_path"}, inputs=("base", "variants", "tokenizer_from", "text", "trace"))
@in_dir_option("base", "The dense base model.")
@path_option(
    "-o",
    "--out",
    required=True,
    says="The mix; stages go to OUT.work/, a card and a page beside it (OUT.card.md, OUT.report.html).",
)
@budget_bits_option(says="Budget: bits per weight over quantized modules.")
@click.option("--total-bpw", type=float, help="Budget: bits per weight over everything.")
@click.option("--size", help="Budget: size of the weights, e.g. 4.2GiB.")
@click.option(
    "--candidates",
    multiple=True,
    help="Bits and schemes on offer, made on the fly [default: 2,3,4,5,6,8]; or GGUF types: Q3_K,IQ4_XS,Q6_K, with "
    "-o MIX.gguf.",
)
@tokenizer_from_option("GGUF: the file whose tokenizer keys the mix gets; default: made by llama.cpp's converter.")
@path_option(
    "--variants",
    multiple=True,
    says="Merge these directories instead (any format): the first is the one that recipes start from.",
)
@click.option(
    "--for",
    "engine",
    type=click.Choice(list(TARGETS)),
    help="The engine that is to load the mix: sets format and candidates, and keeps its rules.",
)
@rounding_option("As in model_quantize; two-sided takes longer and loses less. GGUF types: one-sided if left out.")
@click.option(
    "--compensate/--no-compensate",
    default=True,
    help="Builds whose modules make good what those before them were rounded by, as in model_quantize.",
)
@click.option(
    "--heal",
    metavar="MINUTES",
    type=float,
    help="Tune scales, norms and biases of the finished mix for so long, the verdict included.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A first look: at most 6 rows of 256 tokens, 8 draws, 24 calibration rows, a minute of search; one-sided, "
    "nothing compensated, no uniform build, and no mix but those of the search measured.",
)
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be done, how long it may take, and stop.")
@made_options
@click.option("--level", default="fused", help="What is chosen together, as in model_profile.")
@samples_option("Random draws per row of the profile.", default=16)
@click.option("--solver", help="As in model_optimize; its own default if left out.")
@click.option(
    "--minutes",
    type=float,
    help="In all, about: rows and draws are at most those asked for; search and healing share what is left "
    "[default: 18, or what the least takes, under half a billion weights where no rows, draws or minutes are given].",
)
@click.option("--search-minutes", type=float, help="For a solver that measures.")
@click.option("-r", "--rows", default=16, help="Rows to profile on; as many others verify.")
@click.option("-l", "--length", default=512, help="Tokens in a row.")
@click.option("--calibration-rows", default=64, help="Rows to quantize with.")
@text_file_options()
@partial(
    trace_options, more=" make: the base answers prompts first, for as many rows as all stages need.", default=None
)
@max_memory_option("For the profile")
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Also make and measure a uniform build; where builds are compensated, the better one is written.",
)
@device_options
@output_options
@click.pass_context
def main(ctx: click.Context, json_path: Path | None, quiet: bool, plan_only: bool, **options: Any) -> None:
    """Profile, choose, build and verify: the best mix of a size, in one command that goes on where it was stopped.

    \b
    Examples:
      model_auto -i base -o mix -b 3.5
      model_auto -i base -o mix -b 3.5 --quick
      model_auto -i base -o mix -b 3.5 --trace make --plan
      model_auto -i base -o mix --size 14GiB --for vllm --heal 20 --plan
      model_auto -i base -o mix --size 4.2GiB --variants 3bpw 2bpw 4bpw 6bpw
      model_auto -i base -o mix -b 3.5 --format exl2 --candidates 2,2.5,3,4,5,6
      model_auto -i base -o MIX.gguf -b 4.5 --candidates Q3_K,IQ4_XS,Q4_K,Q5_K,Q6_K --tokenizer-from X.gguf
    """
    from recompile.auto import auto, auto_plan
    from recompile.auto_stages import StageDone

    if plan_only:
        plan = auto_plan(**options)
        show(plan.as_dict(), json_path, lambda: spell(plan.text, flags_of(ctx.command)))
        return
    out = options["out"]
    with Screen(quiet) as screen:

        def follow(event: object) -> None:
            screen(event)
            if isinstance(event, StageDone) and (said := describe_stage(event, out.with_name(f"{out.name}.work"))):
                click.echo(said, err=True)

        report = auto(**options, on_event=follow)
    show(report, json_path, lambda: describe_auto(report))
