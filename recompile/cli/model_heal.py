"""model_heal: a finished build and its base -> the same codes, size and format with less KL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recompile.cli.common import Screen, command, show
from recompile.cli.options import (
    device_options,
    in_dir_option,
    max_memory_option,
    model_b_option,
    out_dir_option,
    output_options,
    text_options,
    trace_options,
)
from recompile.cli.render_heal import describe_heal


@command("model_heal", outputs={"--json": "json_path"}, inputs=("build", "base", "text", "trace"))
@in_dir_option("build", "The finished build: a variant or a mix.")
@model_b_option("base", "The unquantized base that it was made of.")
@out_dir_option("Where the healed build goes.")
@click.option("--tokens", default=150_000, help="Training tokens, rows used again where text is short.")
@click.option("--minutes", type=float, help="Be done after about so many minutes, judging included.")
@click.option(
    "--learning-rate",
    type=float,
    help="Of Adam on logarithms of scales; default by the build's bits (0.0005 to 0.004).",
)
@click.option("--batch-tokens", default=1024, help="Tokens a step.")
@max_memory_option()
@text_options(rows=16, length=512, ids=False)
@trace_options
@device_options
@output_options
def main(json_path: Path | None, quiet: bool, **options: Any) -> None:
    """Tune the scales, norms and biases of a finished build against its base; every code stays.

    -r rows each say which step was best, whether the build is better at all, and what is reported, on text of two
    kinds; none of them trains. The output is written only if it is better. Without --dtype, steps run in bfloat16 where
    a CPU multiplies that fast, and are judged in float32. A run that was stopped goes on when the same command is given
    again.

    \b
    Examples:
      model_heal -i 3bpw -mb base -o 3bpw-healed
      model_heal -i mix -mb base -o mix-healed --minutes 20 --json healed.json
    """
    from recompile import api

    with Screen(quiet) as screen:
        report = api.heal(**options, on_event=screen)
    show(report, json_path, lambda: describe_heal(report))
