"""model_trace: rows that a model writes itself, in answer to prompts, to calibrate and measure on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recompile.cli.common import FiniteRange, Screen, command, show
from recompile.cli.options import device_options, output_options, path_option
from recompile.cli.render_trace import describe_trace


@command("model_trace", outputs={"-o": "out", "--json": "json_path"}, inputs=("base", "prompts"))
@click.option("-m", "--model", "base", required=True, help="The unquantized base, with its tokenizer's chat template.")
@path_option("-o", "--out", required=True, says="The file to write, e.g. trace.safetensors.")
@path_option(
    "--prompts",
    says='JSON lines {"kind": ..., "messages": [...], "tools": [...]} in place of the bundled 320 prompts.',
)
@click.option("-r", "--rows", type=int, help="Take the first so many prompts, kinds in turn; default all.")
@click.option("--tokens", default=256, help="At most so many new tokens a response.")
@click.option(
    "--temperature",
    type=FiniteRange(click.FloatRange(min=0)),
    default=1.0,
    help="Of the softmax that tokens are drawn from: 1 is the model's own distribution, 0 is greedy.",
)
@click.option("--seed", default=0, help="Of the draws; each prompt has draws of its own.")
@click.option("-bsz", "--batch-size", "--batch_size", default=8, help="Prompts a batch.")
@click.option(
    "--url",
    metavar="URL",
    help="Ask a running OpenAI-compatible server, e.g. http://localhost:8000/v1, in place of running the model; -m "
    "then gives tokenizer and config, -bsz requests at a time.",
)
@device_options
@output_options
def main(json_path: Path | None, quiet: bool, **options: Any) -> None:
    """Let a model answer prompts through its chat template; write the rows that others calibrate and measure on.

    Every prompt belongs to one role (calibrate, choose, accept, report), so that no row is used for two things. The
    weights are in memory for this as far as they fit, or on a server. A stopped run goes on with the same command.

    \b
    Examples:
      model_trace -m base -o trace.safetensors
      model_trace -m base -o trace.safetensors --prompts mine.jsonl --tokens 512 --seed 1
      model_trace -m base -o trace.safetensors --url http://localhost:8000/v1 -bsz 32
    """
    from recompile import api

    with Screen(quiet) as screen:
        report = api.trace(**options, on_event=screen)
    show(report.as_dict(), json_path, lambda: describe_trace(report))
