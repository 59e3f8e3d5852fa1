"""model_optimize: a profile and a size budget to an override file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recompile.arguments import spell
from recompile.cli.common import Screen, command, flags_of, refuse_outputs, show
from recompile.cli.options import (
    Name,
    budget_bits_option,
    options_of,
    output_options,
    path_option,
    text_file_options,
    trace_options,
)
from recompile.cli.render_optimize import describe_frontier, describe_recipe
from recompile.errors import ArgumentError
from recompile.io.files import check_is_no_input, models_named_in
from recompile.optimize.solvers import SOLVERS

SOLVERS_HELP = spell("; ".join(f"{solver.name}: {solver.says}" for solver in SOLVERS.values()), flags_of(None))


@command("model_optimize", outputs={"--json": "json_path"}, inputs=("profile", "start", "text", "trace"))
@click.argument("profile", metavar="PROFILE", type=Name(path_type=Path))
@budget_bits_option(
    "--target-bpw",
    says="Budget in bits per weight over quantized modules (and the head, where the profile offers it).",
)
@click.option("--size", "--target-size", "size", help="Budget for all tensors, e.g. 4.2GiB.")
@click.option(
    "--total-bpw", type=float, help="Budget in bits per weight over all weights, embedding and head included."
)
@click.option(
    "--max-kl",
    type=float,
    help="The smallest size whose KL is no more than this, nats per token: measured, where the models are available.",
)
@click.option("--max-ppl-increase", help="The same for a rise of perplexity, e.g. 2%: KL of ln(1.02).")
@click.option(
    "--active-bpw",
    type=float,
    help="Budget in bits per weight that takes part in a token: routed experts count by experts per token / experts.",
)
@click.option(
    "--pool",
    multiple=True,
    help='NAME=GLOB,GLOB:SIZE, a budget of its own for some modules: --pool "gpu=*.self_attn.*:3GiB". Any number.',
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="--size is of all tensors and of a cache that holds so many tokens; what it costs is measured on the base.",
)
@click.option(
    "--cache-bits",
    multiple=True,
    metavar="BITS[,BITS] ...",
    help="With --context: caches to choose from, as in model_diff -cq: 8 8,6 4 or q8_0 q8_0,q4_0 q4_0. Default: f16.",
)
@click.option(
    "--frontier",
    "grid",
    metavar="LOW:HIGH:STEP",
    help="A recipe for every budget of a grid (bits per weight), with table and plot; -o is then a folder.",
)
@path_option(
    "-o",
    "--out",
    says="The recipe to write [default: overrides.yaml]; with --frontier a folder [default: frontier].",
)
@click.option(
    "--solver",
    type=click.Choice(list(SOLVERS)),
    help=f"{SOLVERS_HELP}. Default: refine where the "
    "models are available, for at most 10 minutes; exact without them and with --no-check.",
)
@path_option(
    "--start",
    says="A recipe to start from, by hand or not; without a budget its own size is kept. Never made worse.",
)
@click.option("--steps", type=click.IntRange(min=0), help="At most so many steps of a solver that measures.")
@click.option("--minutes", type=float, help="At most so much time for a solver that measures.")
@click.option(
    "--max-memory",
    help="For --solver refine: never use more memory than this, e.g. 8GiB; without it as much as half of what is free.",
)
@click.option("--pin", multiple=True, help="GLOB=ID: take these modules from source ID.")
@click.option("--min", "minimum", multiple=True, help="GLOB=ID: no smaller than source ID.")
@click.option("--max", "maximum", multiple=True, help="GLOB=ID: no larger than source ID.")
@click.option("--ban", multiple=True, help="GLOB=ID: never from source ID.")
@click.option(
    "--max-step",
    type=click.IntRange(min=0),
    help="The same modules of neighbouring layers at most so many sources (by size) apart.",
)
@click.option("--tie", multiple=True, help="GLOB: all modules that it names from one source.")
@click.option(
    "--engine",
    type=click.Choice(["vllm", "sglang", "exllamav3", "llama.cpp", "transformers"]),
    help="Only what this engine loads: modules that it fuses share a source, widths without a kernel are left out.",
)
@click.option(
    "--free-experts",
    is_flag=True,
    help="Let experts of a layer have different sources. Default: they share, as the engine of the format loads them "
    "(vLLM: one for all experts of a layer; EXL3, GGUF: one a projection).",
)
@click.option(
    "--check/--no-check",
    default=None,
    help="Measure the recipe beside uniform, hand-made and greedy mixes of its size, on rows that nothing else uses. "
    "Default: where the models are available.",
)
@click.option(
    "--activations",
    is_flag=True,
    help="--check measures with the inputs of maps quantized as the schemes say (w8a8, fp8-dynamic ...), and what is "
    "written is the best of those mixes. Solvers go by the profile, which model_profile --activations makes alike.",
)
@click.option(
    "--guard/--no-guard",
    default=True,
    show_default=False,
    help="--no-guard: write the solver's recipe even where a simpler mix measures better.",
)
@click.option("-r", "--rows", default=16, help="Rows for --check.")
@click.option("-l", "--length", type=int, show_default="256; 512 of a trace", help="Tokens in a row for --check.")
@click.option("-d", "--device", default="cpu", help="For --check.")
@text_file_options("Text for --check, split as in model_profile.", "Data set for --check.")
@trace_options
@output_options
@click.pass_context
def main(ctx: click.Context, json_path: Path | None, quiet: bool, **options: Any) -> None:
    """Choose a source for every group of a profile so that KL is least within a size.

    \b
    Examples:
      model_optimize profile.jsonl -b 3.5 -o overrides.yaml
      model_optimize profile.jsonl --size 4.2GiB --pin "*.down_proj=6" --check
      model_optimize profile.jsonl --size 14GiB --context 32768 --cache-bits q8_0 q8_0,q4_0 q4_0
      model_optimize profile.jsonl --frontier 2.5:6:0.25 -o frontier/
    """
    from recompile import api

    grid = options.pop("grid")
    with Screen(quiet) as screen:
        if grid is None:
            options["out"] = options["out"] if options["out"] is not None else Path("overrides.yaml")
            inputs = [options[name] for name in ("profile", "start", "text", "trace")]
            refuse_outputs({"-o": options["out"], "--json": json_path}, inputs)
            found = api.optimize(**options, on_event=screen)
            show(found.as_dict(), json_path, lambda: describe_recipe(found))
            return
        taken, wrong = options_of(api.frontier, options, ctx)
        if wrong:
            raise ArgumentError(f"--frontier has its own budgets; leave {', '.join(wrong)} out")
        solver = taken.pop("solver") or "exact"
        from eval.search.frontier import frontier_files

        folder = options["out"] or Path("frontier")
        check_is_no_input(folder, models_named_in(Path(options["profile"])))
        for path in frontier_files(folder, grid):
            refuse_outputs({"-o": path, "--json": json_path}, [options["profile"], options["text"], options["trace"]])
        table = api.frontier(grid=grid, solver=solver, **taken, on_event=screen)
    show(table.as_dict(), json_path, lambda: describe_frontier(table))
