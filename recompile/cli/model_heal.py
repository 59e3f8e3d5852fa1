"""model_heal: a finished build and its base -> the same codes, size and format with less KL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from recompile.cli.common import Screen, check_json_path, command, print_json
from recompile.cli.options import device_options, output_options, text_options
from recompile.io.report import format_columns
from recompile.io.sizes import format_seconds

if TYPE_CHECKING:
    from eval.heal import HealReport, Paired


@command("model_heal", outputs={"--json": "json_path"}, inputs=("in_dir", "base_dir", "text", "input_ids"))
@click.option("-i", "--in-dir", "--in_dir", required=True, help="The finished build: a variant or a mix.")
@click.option(
    "-mb", "--model-b", "--model_b", "base_dir", required=True, help="The unquantized base that it was made of."
)
@click.option(
    "-o", "--out-dir", "--out_dir", type=click.Path(path_type=Path), required=True, help="Where the healed build goes."
)
@click.option(
    "--tokens", default=150_000, show_default=True, help="Training tokens, rows used again where text is short."
)
@click.option("--minutes", type=float, help="Stop moving numbers after so many minutes.")
@click.option(
    "--learning-rate",
    type=float,
    help="Of Adam on logarithms of scales; default by the build's bits (0.0005 to 0.004).",
)
@click.option("--batch-tokens", default=1024, show_default=True, help="Tokens a step.")
@click.option("--max-memory", help="Never use more memory than this, e.g. 8GiB.")
@text_options(rows=16, length=512)
@device_options
@output_options
def main(
    in_dir: str,
    base_dir: str,
    out_dir: Path,
    tokens: int,
    minutes: float | None,
    learning_rate: float | None,
    batch_tokens: int,
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
    """Tune the scales, norms and biases of a finished build against its base; every code stays.

    -r rows each say which step was best, whether the build is better at all, and what is reported, on text of two
    kinds; none of them trains. The output is written only if it is better. A run that was stopped goes on when the same
    command is given again.

    \b
    Examples:
      model_heal -i 3bpw -mb base -o 3bpw-healed
      model_heal -i mix -mb base -o mix-healed --minutes 20 --json healed.json
    """
    check_json_path(json_path)
    import recompile.api

    with Screen(quiet) as screen:
        report = recompile.api.heal(
            in_dir,
            base_dir,
            out_dir,
            tokens=tokens,
            minutes=minutes,
            learning_rate=learning_rate,
            batch_tokens=batch_tokens,
            max_memory=max_memory,
            rows=rows,
            length=length,
            text=text,
            dataset=dataset,
            input_ids=input_ids,
            device=device,
            dtype=dtype,
            on_event=screen,
        )
    if str(json_path) != "-":
        click.echo(_summary(report))
    if json_path is not None:
        print_json(json_path, report)


def _summary(report: HealReport) -> str:
    def line(name: str, pair: Paired) -> tuple[str, str, str, str, str]:
        change = f"{pair.gain:+.6f} ± {pair.std_error:.6f}"
        return (name, f"{pair.before:.6f}", f"{pair.after:.6f}", f"{pair.ratio:.3f}", change)

    rows = [
        line("accept rows (the verdict)", report.accept),
        line(f"report rows: {report.rows_source}", report.report),
        line(f"another kind of text: {report.second_source}", report.second),
    ]
    header = ("KL(base || build), nats a token", "before", "healed", "ratio", "paired difference")
    text = format_columns(rows, header, range(1, 5))
    text += (
        f"\n{report.steps} steps ({report.tokens} tokens, {format_seconds(report.seconds)}), the best after "
        f"{report.best_step}; {report.moved_tensors} tensors moved, learning rate {report.learning_rate:g}"
    )
    return f"{text}\n{report.out}"
