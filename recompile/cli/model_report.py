"""model_report: a profile and what was measured to one page, pictures, and a block for model cards."""

from __future__ import annotations

from pathlib import Path

import click

from recompile.cli.common import refuse_outputs
from recompile.cli.options import many_values_command
from recompile.errors import RecompileError
from recompile.io.files import write_text


@many_values_command(
    "model_report",
    outputs={"-o": "out", "--card": "card"},
    inputs=("profile_path", "reports", "variants", "recipes"),
)
@click.argument("profile_path", metavar="PROFILE", type=click.Path(path_type=Path))
@click.argument("reports", metavar="[REPORT.json]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The page to write, e.g. report.html.")
@click.option("--png", type=click.Path(path_type=Path), help="A directory for still pictures, PNG.")
@click.option("--svg", type=click.Path(path_type=Path), help="A directory for still pictures, SVG.")
@click.option(
    "--card", type=click.Path(path_type=Path), help='Markdown to paste on a model page: table and recipe; "-" = stdout.'
)
@click.option("--variants", multiple=True, type=click.Path(path_type=Path), help="Builds to list with their sizes.")
@click.option("--recipe", "recipes", multiple=True, type=click.Path(path_type=Path), help="Override files to show.")
@click.option("--title", help="What the page is called; default: the reference's directory.")
@click.option("--quiet", is_flag=True, help="Do not say what was written.")
@click.option("-b", "--bits", type=float, help="The size that the explorer opens with, bits per weight.")
def main(
    profile_path: Path,
    reports: tuple[Path, ...],
    out: Path | None,
    png: Path | None,
    svg: Path | None,
    card: Path | None,
    variants: tuple[Path, ...],
    recipes: tuple[Path, ...],
    title: str | None,
    quiet: bool,
    bits: float | None,
) -> None:
    """One page that shows what every bit buys, with the recipe explorer; opens from disk, needs no network.

    REPORT.json: files of model_diff --json, or model_optimize --check --json.

    \b
    Examples:
      model_report profile.jsonl -o report.html
      model_report profile.jsonl 3bpw.json 4bpw.json mix.json --recipe mine.yaml -o report.html
      model_report profile.jsonl 3bpw.json mix.json --png pictures --card card.md
    """
    if out is None and png is None and svg is None and card is None:
        raise RecompileError("nothing to write: give -o report.html, --png DIR, --svg DIR or --card FILE")
    from eval.report.data import gather

    def say(text: str) -> None:
        if not quiet:
            click.echo(text, err=True)

    data = gather(profile_path, reports, variants, recipes, title, bits)
    for note in data.notes:
        click.echo(f"Warning: {note}", err=True)
    for kind, directory in (("png", png), ("svg", svg)):
        if directory is not None:
            from eval.report.pictures import pictures

            for picture in pictures(data):
                path = directory / f"{picture.name}.{kind}"
                refuse_outputs({f"--{kind}": path}, [profile_path, *reports, *variants, *recipes])
    if out is not None:
        from eval.report.page import render

        write_text(out, render(data))
        say(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
    for kind, directory in (("png", png), ("svg", svg)):
        if directory is not None:
            from eval.report.pictures import write_pictures

            for path in write_pictures(data, directory, kind):
                say(f"Wrote {path}")
    if card is not None:
        from eval.report.card import card as make_card

        text = make_card(data)
        if str(card) == "-":
            click.echo(text, nl=False)
        else:
            write_text(card, text)
            say(f"Wrote {card}")
