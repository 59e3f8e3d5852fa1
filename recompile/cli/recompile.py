"""recompile: write the checkpoint that a base variant and an override file describe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from recompile.cli.common import Command, Screen, command, long_flag, refuse_outputs, show
from recompile.cli.options import Name, output_options, path_option, recipe_option
from recompile.cli.render_merge import describe_check, describe_merge, describe_plan
from recompile.errors import CheckpointError
from recompile.io.files import write_text
from recompile.merge.engine_rules import CHECKED_ENGINES
from recompile.merge.run import VerifyFailed, describe_errors
from recompile.merge.write_plan import DEFAULT_SHARD_MB
from recompile.recipe.other_tools import SCHEME_DIALECTS


class _Recompile(Command):
    """`recompile engines ...` is another command. Nothing else can be meant: this one takes no word without a flag."""

    def main(self, *args: Any, **extra: Any) -> Any:
        given = args[0] if args else extra.get("args")
        words = sys.argv[1:] if given is None else list(given)
        if words[:1] == ["engines"]:
            from recompile.cli.engines import main as engines

            return engines.main(words[1:], "recompile engines")
        return super().main(*args, **extra)


@command(
    "recompile", cls=_Recompile, outputs={"--json": "json_path"}, inputs=("base", "recipe", "type_sources", "check")
)
@click.option("-i", "--in-dir", "--in_dir", "base", metavar="DIR", type=Name(), help="The variant that is overridden.")
@path_option("-o", "--out-dir", "--out_dir", "out", metavar="OUT", says="What is written.")
@recipe_option(
    "recipe",
    metavar="FILE",
    says="The override file (YAML); none: a plain copy.",
)
@click.option(
    "-ss",
    "--shard-size",
    "--shard_size",
    "shard_size",
    type=click.IntRange(max=2**31 - 1),
    metavar="MB",
    help=f"Largest size of a file, in MiB; default {DEFAULT_SHARD_MB}, and for GGUF one file.",
)
@click.option(
    "--type-sources",
    multiple=True,
    metavar="TYPE=FILE",
    help="With a recipe of GGUF types as -or: the files of each type, Q4_K=model-Q4_K.gguf ..., or their directory.",
)
@click.option(
    "--emit",
    "emit",
    type=click.Choice(["llama-quantize", "ik-custom-q", "thireus", *SCHEME_DIALECTS]),
    help="Print the mix as a recipe of another tool (to OUT with -o), and stop. The first three are of GGUF types.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, and stop. Reads no weight.")
@click.option("--all", "every", is_flag=True, help="With --dry-run: a line for every module.")
@click.option("--verify", is_flag=True, help="Read the result again and compare it with its sources.")
@click.option("--dense", is_flag=True, help="Write decoded weights, for tools that read nothing else.")
@click.option("--allow-unmatched", is_flag=True, help="Go on where a key matches no tensor.")
@click.option(
    "--probe/--no-probe",
    default=True,
    show_default=False,
    help="--no-probe: do not test that the sources were made from the same weights.",
)
@click.option("--check", metavar="DIR", type=Name(), help="Check a finished checkpoint of any origin; writes nothing.")
@click.option(
    "--engine",
    type=click.Choice(CHECKED_ENGINES),
    help="Refuse to write what this engine does not run; with --check, ask whether it runs DIR.",
)
@click.option(
    "--reencode", is_flag=True, help="Give nvfp4 projections that engines fuse, taken from several sources, one scale."
)
@output_options
def main(
    base: str | None,
    out: Path | None,
    check: str | None,
    emit: str | None,
    every: bool,
    json_path: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Write a new checkpoint: the variant -i with the modules that the override file takes from other variants.

    Every tensor is copied byte for byte from its source; config, index and manifest are written to fit. The output
    appears whole or not at all.

    `recompile engines` lists and installs the real engines (recompile engines --help).

    \b
      recompile -i 3bpw -or overrides.yaml --dry-run
      recompile -i 3bpw -o mix -or overrides.yaml --verify
      recompile --check mix --engine vllm                         # what its loader makes of every module
      recompile -i Q3_K.gguf -o MIX.gguf -or overrides.yaml --verify
      recompile -i Q3_K.gguf -or overrides.yaml --emit llama-quantize      # or -i base, for a mix that is to be made
      recompile -i Q3_K.gguf -o MIX.gguf -or custom-q.txt --type-sources IQ4_XS=IQ4_XS.gguf Q6_K=Q6_K.gguf
    """
    from recompile import api

    with Screen(quiet) as screen:
        if check is not None:
            if base or out or options["recipe"]:
                raise click.UsageError("--check DIR stands alone; leave out -i, -o and -or")
            checked = api.check(check, verify=options["verify"], engine=options["engine"], on_event=screen)
            show(checked.verified or checked.as_dict(), json_path, lambda: describe_check(checked))
            if checked.errors:
                raise CheckpointError(describe_errors(check, "check", checked.errors))
            return
        if base is None or (out is None and not options["dry_run"] and emit is None):
            raise click.UsageError("wanted -i DIR and -o DIR (or --dry-run, or --check DIR); -h explains")
        if json_path is not None and out is not None and os.path.realpath(json_path) == os.path.realpath(out):
            raise click.UsageError(f"--json {json_path}: is what -o writes as well; choose another file")
        if emit is not None:
            _check_emit(click.get_current_context())
            wanted = {name: options[name] for name in ("recipe", "type_sources", "allow_unmatched")}
            _put(api.emit(base, emit, **wanted, on_event=screen), out, [base, options["recipe"]])
            return
        try:
            report = api.merge(base, out, **options, on_event=screen)
        except VerifyFailed as failed:
            written = failed.report
            show(written.as_dict(), json_path, lambda: describe_merge(written))
            raise
    dry_run = options["dry_run"]
    show(report.as_dict(), json_path, lambda: describe_plan(report, every) if dry_run else describe_merge(report))


_BESIDE_EMIT = {"base", "out", "emit", "recipe", "type_sources", "allow_unmatched", "quiet", "force"}


def _check_emit(context: click.Context) -> None:
    """--emit writes no checkpoint, so options of one would be ignored."""
    for option in context.command.params:
        given = context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE
        if given and option.name not in _BESIDE_EMIT:
            raise click.UsageError(f"{long_flag(option.opts)}: not with --emit, which prints a recipe; leave one out")


def _put(text: str, out: Path | None, inputs: list[Any]) -> None:
    if out is None:
        click.echo(text, nl=False)
        return
    same = out.is_file() and out.stat().st_size == len(text.encode()) and out.read_text(encoding="utf-8") == text
    if not same:  # two of the dialects have no place for a mark of this tool, so equal content is one
        refuse_outputs({"-o": out}, inputs)
        write_text(out, text)


if __name__ == "__main__":
    main()
