"""model_report: a profile and what was measured to one page, pictures, and a block for model cards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recompile.cli.common import Screen, command, is_forced
from recompile.cli.options import Name, budget_bits_option, path_option


@command(
    "model_report",
    outputs={"-o": "out", "--card": "card"},
    inputs=("profile", "reports", "variants", "recipes"),
)
@click.argument("profile", metavar="PROFILE", type=Name(path_type=Path))
@click.argument("reports", metavar="[REPORT.json]...", nargs=-1, type=Name(path_type=Path))
@path_option("-o", "--out", says="The page to write, e.g. report.html.")
@path_option("--png", says="A directory for still pictures, PNG.")
@path_option("--svg", says="A directory for still pictures, SVG.")
@path_option("--card", says='Markdown to paste on a model page: table and recipe; "-" = stdout.')
@path_option("--variants", multiple=True, says="Builds to list with their sizes.")
@path_option("--recipe", "recipes", multiple=True, says="Override files to show.")
@click.option("--title", help="What the page is called; default: the reference's directory.")
@click.option("--quiet", is_flag=True, help="Do not say what was written.")
@budget_bits_option(says="The size that the explorer opens with, bits per weight.")
def main(card: Path | None, quiet: bool, **options: Any) -> None:
    """One page that shows what every bit buys, with the recipe explorer; opens from disk, needs no network.

    REPORT.json: files of model_diff --json, or model_optimize --check --json.

    \b
    Examples:
      model_report profile.jsonl -o report.html
      model_report profile.jsonl 3bpw.json 4bpw.json mix.json --recipe mine.yaml -o report.html
      model_report profile.jsonl 3bpw.json mix.json --png pictures --card card.md
    """
    from recompile import api

    if options["title"] is not None:
        options["title"] = options["title"].encode("utf-8", "backslashreplace").decode()  # bytes that are no UTF-8
    with Screen(quiet) as screen:
        text = api.report(**options, card=card, force=is_forced(), on_event=screen)
    if str(card) == "-":
        click.echo(text, nl=False)
