"""model_quantize: a dense base model to variants at several bitrates, in one pass."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from recompile.cli.common import Screen, command, show
from recompile.cli.options import (
    device_options,
    imatrix_option,
    in_dir_option,
    max_memory_option,
    out_dir_option,
    output_options,
    path_option,
    recipe_option,
    rounding_option,
    text_options,
    tokenizer_from_option,
    trace_options,
)
from recompile.cli.render_quantize import describe_variants
from recompile.formats import COMPRESSED, VARIANT_FORMATS


@command(
    "model_quantize",
    outputs={"--json": "json_path", "--save-imatrix": "save_imatrix"},
    inputs=("base", "recipe", "modifiers", "tokenizer_from", "imatrix", "text", "input_ids", "trace"),
)
@in_dir_option("base", "The dense base model.")
@out_dir_option("Where the variants go: DIR/3bpw, DIR/4bpw, ...")
@click.option(
    "-b", "--bits", multiple=True, help="Bitrates, any number: -b 2 3 4 6; GGUF types: -b Q3_K_S Q4_K IQ4_KSS."
)
@click.option(
    "--scheme",
    "scheme",
    multiple=True,
    help="In place of -b, compressed-tensors schemes: --scheme w4a16-g64 w8a16 fp8-channel nvfp4 mxfp4 ... With "
    "--format mlx its modes mxfp4 mxfp8 nvfp4, also beside -b.",
)
@path_option(
    "--modifiers",
    says="In place of -b, one variant by a recipe of modifiers (YAML), or of llm-compressor.",
)
@click.option(
    "--independent",
    is_flag=True,
    help="With --modifiers: calibrate every module on the unquantized model, as variants are, in place of what the "
    "quantized layers before it give.",
)
@recipe_option(
    "recipe",
    says="Make one mix instead: a recipe whose sources are like {id: 4, bits: 4}, for EXL2 and EXL3 with --format or "
    "{id: 2.5, bits: 2.5, format: exl2}, or variants made by this command. OUT is then the mix's own directory; "
    "with {id: Q4_K, type: Q4_K}, or llama-quantize's, --custom-q's or thireus's recipes, a GGUF file.",
)
@click.option(
    "--format",
    "format",
    type=click.Choice(VARIANT_FORMATS),
    default=COMPRESSED,
)
@click.option(
    "--method",
    default="gptq",
    metavar="rtn|mse|gptq|awq|smoothquant|awq+gptq|...",
    help="Round to nearest; least squares grids; GPTQ on top of those. With --scheme also awq and smoothquant: scales "
    "of the inputs moved into norms and maps before them, then mse or, as awq+gptq, another rounding.",
)
@click.option("-g", "--group-size", default="64", help="32, 64, 128 (MLX too) or channel (compressed-tensors).")
@click.option(
    "--asym",
    is_flag=True,
    help="A zero point per group (compressed-tensors). transformers 5.23 cannot load such mixes.",
)
@click.option(
    "--importance/--no-importance",
    default=True,
    help="Weight errors by the Hessian diagonal when grids are fitted (mse, gptq).",
)
@click.option(
    "-hb",
    "--head-bits",
    "--head_bits",
    type=int,
    help="Quantize the output head to this; default: dense (EXL2, EXL3: 6; MLX: as everything else).",
)
@click.option("--codebook", type=click.Choice(["3inst", "mcg", "mul1"]), default="mul1", help="EXL3 codebook.")
@tokenizer_from_option("GGUF: the file whose tokenizer keys the outputs get; default: made by llama.cpp's converter.")
@imatrix_option(
    "GGUF: importance from this imatrix file, or a profile's .importance.safetensors, in place of a calibration pass."
)
@click.option("--save-imatrix", metavar="FILE", help="GGUF: also write the importance as an imatrix file.")
@click.option(
    "--converter", is_flag=True, help="GGUF: make the base file with llama.cpp's own converter, in its own environment."
)
@click.option(
    "--engine",
    type=click.Choice(["own", "exllamav2", "exllamav3"]),
    default="own",
    help="Whose encoder makes the tensors; the last two need CUDA.",
)
@rounding_option(
    "With GPTQ: weigh errors by the inputs of a map alone, or also by the gradients at its outputs, which takes a "
    "backward pass over the calibration rows. Default: two-sided where --stats is given. GGUF types are rounded to "
    "nearest, as llama-quantize does, unless this is given.",
)
@click.option(
    "--compensate",
    is_flag=True,
    help="Aim every module at the base's outputs, given what the rounded modules before it make of the same tokens: "
    "less KL at the same bytes. For one bitrate, type, scheme or recipe: a finished build, no part of a mix.",
)
@path_option(
    "--stats",
    metavar="DIR",
    says="Keep the statistics of those gradients here, and use them again when they are there (some MB a layer).",
)
@max_memory_option("For that backward pass")
@click.option(
    "--mtp",
    type=click.Choice(["quantize", "keep"]),
    default="quantize",
    help="MTP layers: like the last layer, with its inputs where these fit; or as they are, byte for byte.",
)
@click.option(
    "--tower",
    type=click.Choice(["keep", "quantize"]),
    default="keep",
    help="Vision and audio towers: as they are, byte for byte; or quantized without calibration.",
)
@click.option(
    "--keep",
    multiple=True,
    metavar="GLOB",
    help="Modules that stay dense, beside routers, gates, norms, convolutions and embeddings.",
)
@click.option(
    "--quantize",
    "quantize_also",
    multiple=True,
    metavar="GLOB",
    help="Matrices that are quantized whatever their role is.",
)
@text_options(rows=64, length=512, unset=True)
@partial(trace_options, default="all")
@device_options
@output_options
def main(json_path: Path | None, quiet: bool, **options: Any) -> None:
    """Quantize a model to several bitrates; calibration runs once for all of them.

    An interrupted run goes on after the last finished layer when the same command is given again.

    \b
    Examples:
      model_quantize -i base -o variants -b 2 3 4 6
      model_quantize -i base -o exl2 --format exl2 -b 2.5 3 4 5
      model_quantize -i base -o mlx --format mlx -b 2 3 4 6 --scheme mxfp4
      model_quantize -i base -o variants --scheme w4a16-g64 w8a16 fp8-channel nvfp4 mxfp4
      model_quantize -i base -o awq --scheme w4a16-g64 --method awq
      model_quantize -i base -o variants -b 2 3 4 --rounding two-sided --stats stats
      model_quantize -i base -o variants -b 3 4 --mtp keep --keep "*.layers.0.*"
      model_quantize -i base -o gguf --format gguf -b Q3_K_S Q4_K Q6_K IQ4_KSS --tokenizer-from X.gguf
      model_quantize -i base -o mix -or overrides.yaml           # straight to the mix, no variants
      model_quantize -i base -o MIX.gguf -or overrides.yaml --tokenizer-from X.gguf
    """
    from recompile import api

    with Screen(quiet) as screen:
        report = api.quantize(**options, on_event=screen)
    show(report, json_path, lambda: describe_variants(report))
