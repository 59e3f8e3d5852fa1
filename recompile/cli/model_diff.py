"""model_diff: compare two models, or a model with a recipe applied, without writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from recompile.cli.common import Screen, command, show
from recompile.cli.options import (
    device_options,
    engine_options,
    max_memory_option,
    model_b_option,
    options_of,
    output_options,
    path_option,
    recipe_option,
    text_options,
    trace_options,
)
from recompile.cli.render_diff import describe_diff, describe_many
from recompile.cli.render_engine import describe_engine
from recompile.costs import LEVELS


@command(
    "model_diff",
    outputs={
        "--json": "json_path",
        "--save-input-ids": "save_input_ids",
        "--save-logits-a": "save_logits_a",
        "--save-logits-b": "save_logits_b",
    },
    inputs=("candidates", "reference", "recipes", "text", "input_ids", "trace"),
)
@click.option(
    "-ma",
    "--model-a",
    "--model_a",
    "candidates",
    required=True,
    multiple=True,
    help="Model A, the candidate (a quantized build); several times for a table of candidates on the same rows.",
)
@model_b_option("reference", "Model B, the reference (the unquantized base).", required=False)
@recipe_option(
    "recipes",
    multiple=True,
    says="Recipe (YAML) to apply to model A in memory; several times to compare recipes on one A, or one for each A.",
)
@text_options(rows=10, length=2048, unset=True)
@trace_options
@click.option("-kb", "--keep-b", "--keep_b", default=0, help="Keep B's state after N stages (embedding first).")
@click.option("-tkm", "--topk-max", "--topk_max", default=5, help="Largest K of the top-K figures.")
@click.option("-bsz", "--batch-size", "--batch_size", type=int, help="Rows a batch; default: about 512 tokens.")
@click.option(
    "-gp",
    "--gen-prompt",
    "--gen_prompt",
    is_flag=True,
    help="Put the chat template's generation prompt before every row.",
)
@path_option(
    "-si",
    "--save-input-ids",
    "--save_input_ids",
    says="Save the token rows (safetensors, input_ids).",
)
@path_option(
    "-sla",
    "--save-logits-a",
    "--save_logits_a",
    says="Save A's logits (safetensors, logits, float32 [rows, tokens, vocab]); with --activations those with "
    "quantized inputs.",
)
@path_option("-slb", "--save-logits-b", "--save_logits_b", says="Save B's logits.")
@click.option("--allow-unmatched", is_flag=True, help="Go on where a key of the recipe matches no tensor.")
@click.option(
    "--activations",
    is_flag=True,
    help="Also measure A with the inputs of its linear maps quantized as its schemes say (w8a8, fp8-dynamic ...).",
)
@click.option(
    "--divergence",
    metavar="PROMPTSxTOKENS",
    help="Also where greedy runs of A leave B's, e.g. 32x300. Layers of B beyond memory are read for every token.",
)
@click.option(
    "-cq",
    "--cache-quant",
    "--cache_quant",
    metavar="BITS[,BITS]",
    help="A's keys and values in a quantized cache: 8 or 8,6 as exllamav3 stores it, q8_0 or q8_0,q4_0 as llama.cpp "
    "does, ik:q8_0 as ik_llama.cpp does.",
)
@click.option(
    "-cqs",
    "--cache-quant-sweep",
    "--cache_quant_sweep",
    "cache_sweep",
    multiple=True,
    metavar="BITS[,BITS] ...",
    help="Also A through each of these caches, in one pass; exllamav3 and llama.cpp stand for lists of their own, "
    "exllamav3-grid and llama.cpp-grid for every kind of keys with every kind of values.",
)
@click.option(
    "--attribute",
    is_flag=False,
    flag_value="fused",
    type=click.Choice(LEVELS),
    metavar="[LEVEL]",
    help="Also the KL of each group of A by itself in B: layer, block, fused (the default), expert or tensor.",
)
@click.option("--iso", is_flag=True, help="With --attribute: beside isotropic noise as large as A's error there.")
@max_memory_option()
@engine_options
@device_options
@output_options
@click.pass_context
def main(ctx: click.Context, engine: str | None, json_path: Path | None, quiet: bool, **options: Any) -> None:
    """How far model A's predictions are from model B's.

    Both are streamed layer by layer, so a model larger than memory can be compared. KL is KL(B || A), in nats a token.

    \b
    Examples:
      model_diff -ma 3bpw -mb base -r 10
      model_diff -ma 3bpw -mb base -or overrides.yaml -r 10 --json diff.json
      model_diff -ma 3bpw -mb base --trace trace.safetensors
      model_diff -ma gptq -ma mix -ma healed -mb base -r 20
      model_diff -ma base -mb base -cqs q8_0 q8_0,q4_0 q4_0
      model_diff -ma 3bpw -mb base -r 10 --attribute tensor --iso --json diff.json
      model_diff --engine llama.cpp -ma Q4_K_M.gguf -mb BF16.gguf --llama-chunks 20
      model_diff --engine vllm -ma w4a16 -mb base -r 8              # or transformers, mlx: see recompile engines
    """
    from recompile import api

    candidates, recipes = options.pop("candidates"), options["recipes"]
    if engine is not None:
        options, wrong = options_of(api.engine_diff, options, ctx)
        if wrong:
            how = "which runs finished builds in rows (-r) or chunks (--llama-chunks)"
            raise click.UsageError(f"{', '.join(wrong)}: not with --engine, {how}")
        if len(candidates) > 1:
            raise click.UsageError(f"-ma: one candidate with --engine, {len(candidates)} are given")
        if ctx.get_parameter_source("length") is click.core.ParameterSource.DEFAULT:
            del options["length"]
        with Screen(quiet) as screen:
            run = api.engine_diff(candidates[0], engine=engine, **options, on_event=screen)
        show(run.report.as_dict(), json_path, lambda: describe_engine(run))
        return
    del options["recipes"]
    options, wrong = options_of(api.diff, options, ctx)
    if wrong:
        raise click.UsageError(f"{wrong[0]} goes with --engine")
    if options["reference"] is None:
        raise click.UsageError("-mb is needed: model B, the reference")
    if len(candidates) == 1 and len(recipes) < 2:
        _diff_one(candidates[0], recipes[0] if recipes else None, json_path, quiet, options)
        return
    options, wrong = options_of(api.diff_many, options, ctx)
    if wrong:
        raise click.UsageError(f"{wrong[0]} goes with one -ma")
    mixes = _candidates_with_recipes(candidates, recipes)
    with Screen(quiet) as screen:
        many = api.diff_many(mixes, **options, on_event=screen)
    show(many.as_dict(), json_path, lambda: describe_many(many))


def _diff_one(
    candidate: str, recipe: Path | None, json_path: Path | None, quiet: bool, options: dict[str, Any]
) -> None:
    from recompile import api

    journal = None
    if options["attribute"] is not None and json_path is not None and str(json_path) != "-":
        journal = json_path.with_name(f"{json_path.name}.journal")  # an interrupted run goes on from it
    with Screen(quiet) as screen:
        found = api.diff(candidate, recipe=recipe, **options, attribute_journal=journal, on_event=screen)
    show(found.as_dict(), json_path, lambda: describe_diff(found))
    if journal is not None:
        journal.unlink(missing_ok=True)


def _candidates_with_recipes(candidates: tuple[str, ...], recipes: tuple[Path, ...]) -> list[tuple[str, Path | None]]:
    """One A with several recipes, or as many recipes as As, or none."""
    if not recipes:
        return [(candidate, None) for candidate in candidates]
    if len(candidates) == 1:
        return [(candidates[0], recipe) for recipe in recipes]
    if len(recipes) != len(candidates):
        raise click.UsageError(
            f"-or: {len(recipes)} for {len(candidates)} -ma; give one -ma with several recipes, a recipe for each -ma, "
            f"or none"
        )
    return list(zip(candidates, recipes, strict=True))
