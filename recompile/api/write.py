"""Verbs that read and write checkpoints and recipes: merge, emit, check, open_checkpoint, load_recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recompile.api.shared import PathLike, as_path
from recompile.events import OnEvent, ignore

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.merge.run import CheckReport, MergeReport
    from recompile.recipe.recipe import Recipe


def merge(
    base: PathLike,
    out: PathLike | None = None,
    *,
    recipe: PathLike | None = None,
    shard_size: int | None = None,
    type_sources: Sequence[str] = (),
    dry_run: bool = False,
    verify: bool = False,
    dense: bool = False,
    allow_unmatched: bool = False,
    probe: bool = True,
    engine: str | None = None,
    reencode: bool = False,
    on_event: OnEvent | None = None,
) -> MergeReport:
    """Write a new checkpoint: a variant with the modules that the recipe takes from others, byte for byte.

        report = recompile.merge("variants/3bpw", "mix", recipe="overrides.yaml", verify=True)
        print(report.plan.accounting.bpw, report.overridden)

    recipe: the override file, none: a plain copy; type_sources: "TYPE=FILE" each, for a recipe of GGUF types
    dry_run: plan only (`out` may be left out); verify: read the result again; dense: write decoded weights; probe: test
    that the sources were made from the same weights; engine: refuse what it does not run; shard_size: MiB a file;
    allow_unmatched: go on where a key matches no tensor; reencode: one scale for fused nvfp4 projections

    The output appears whole or not at all. Raises RecipeError, MismatchError, OutputError, UnsupportedError, and
    VerifyFailed.
    """
    from recompile.merge.run import MergeOptions, run_merge

    options = MergeOptions(
        recipe=as_path(recipe),
        shard_size=shard_size,
        type_sources=tuple(type_sources),
        dry_run=dry_run,
        verify=verify,
        dense=dense,
        allow_unmatched=allow_unmatched,
        probe=probe,
        engine=engine,
        reencode=reencode,
    )
    return run_merge(str(base), as_path(out), options, on_event or ignore)


def emit(
    base: PathLike,
    dialect: str,
    *,
    recipe: PathLike | None = None,
    type_sources: Sequence[str] = (),
    allow_unmatched: bool = False,
    on_event: OnEvent | None = None,
) -> str:
    """A mix as a recipe of another tool: of GGUF types for "llama-quantize", "ik-custom-q" or "thireus"; of bits or
    schemes for "mlx", "llm-compressor" or "exllamav3".

        print(recompile.emit("Q3_K.gguf", "ik-custom-q", recipe="overrides.yaml"))
    """
    from recompile.merge.run import MergeOptions
    from recompile.quantize.emit import emit_recipe

    options = MergeOptions(recipe=as_path(recipe), type_sources=tuple(type_sources), allow_unmatched=allow_unmatched)
    return emit_recipe(str(base), dialect, options, on_event or ignore)


def check(
    path: PathLike, *, verify: bool = False, engine: str | None = None, on_event: OnEvent | None = None
) -> CheckReport:
    """Check a finished checkpoint of any origin, as its engine reads it; writes nothing.

        assert not recompile.check("mix").errors

    verify: read all of it again and compare it with its manifest and sources; engine: ask whether it runs there
    ("mlx": what its loader makes of every module)
    """
    from recompile.merge.run import run_check

    return run_check(str(path), verify, engine, on_event or ignore)


def open_checkpoint(path: PathLike) -> Checkpoint:
    """A directory or GGUF file, headers only: `modules`, `tensors`, `config`, and `read` of any tensor.

    print(len(recompile.open_checkpoint("variants/3bpw").modules))
    """
    from recompile.checkpoint.checkpoint import open_checkpoint as opened

    return opened(path)


def load_recipe(path: PathLike) -> Recipe:
    """An override file as values: `sources`, `overrides`, `warnings`.

    for line in recompile.load_recipe("overrides.yaml").overrides: print(line.key, line.source)
    """
    from recompile.recipe.recipe import load_recipe as loaded

    return loaded(path)
