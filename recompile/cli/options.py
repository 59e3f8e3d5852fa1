"""Options that several commands share, and options that take any number of values (`-b 2 3 4 6`)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import click

from recompile.cli.common import Command
from recompile.formats import CANDIDATE_FORMATS, COMPRESSED
from recompile.formats.mlx_config import QUANT_METHOD as MLX

Option: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


class ManyValuesCommand(Command):
    """A command whose `multiple=True` options also take their values after one flag: `-b 2 3 4` is `-b 2 -b 3 -b 4`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        many = {
            flag
            for option in self.params
            if isinstance(option, click.Option) and option.multiple and not option.is_flag
            for flag in option.opts
        }
        known = {flag for option in self.params if isinstance(option, click.Option) for flag in option.opts}
        known |= {flag for option in self.params if isinstance(option, click.Option) for flag in option.secondary_opts}
        known |= set(ctx.help_option_names)
        spread: list[str] = []
        flag: str | None = None
        fresh = False
        for arg in args:
            is_flag = arg.split("=")[0] in known or (arg.startswith("-") and not re.fullmatch(r"-?\d+(\.\d*)?", arg))
            if is_flag:
                flag, fresh = (arg, True) if arg in many else (None, False)
                if flag is None:
                    spread.append(arg)
            elif flag is not None:
                spread += [flag, arg]
                fresh = False
            else:
                spread.append(arg)
        if flag is not None and fresh:
            spread.append(flag)  # a flag without a value: let click say so
        return super().parse_args(ctx, spread)


def many_values_command(
    name: str, *, cls: type[ManyValuesCommand] = ManyValuesCommand, **options: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110, **options.pop("context_settings", {})}
    return click.command(name, cls=cls, context_settings=settings, **options)


class RowCount(click.ParamType):
    """A number of rows, or "auto": as many as an error asks for."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int) or value == "auto":
            return value
        if not re.fullmatch(r"[1-9]\d*", value):
            self.fail(f'"{value}" is neither a number of rows nor "auto"', param, ctx)
        return int(value)


def text_options(rows: int, length: int, *, auto: bool = False, unset: bool = False) -> Option:
    """`-r -l --text --dataset --input-ids`: where token rows come from; `auto`: -r auto is a choice, and nothing given
    is None; `unset`: nothing given is None."""
    row_type: Any = RowCount() if auto else int
    row_help = "Rows of tokens; auto: as many as --rtol asks for." if auto else "Rows of tokens."

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(
            (
                click.option(
                    "-r",
                    "--rows",
                    type=row_type,
                    default=None if auto or unset else rows,
                    show_default=str(rows),
                    help=row_help,
                ),
                click.option("-l", "--length", default=length, show_default=True, help="Tokens in a row."),
                click.option(
                    "--text", type=click.Path(path_type=Path), help="A UTF-8 text file in place of the default text."
                ),
                click.option("--dataset", help="A data set of the `datasets` library, e.g. wiki2."),
                click.option(
                    "--input-ids",
                    type=click.Path(path_type=Path),
                    help="Token rows (safetensors, key input_ids, int64 [rows, tokens]) in place of text.",
                ),
            )
        ):
            function = option(function)
        return function

    return add


def trace_options(function: Callable[..., Any], more: str = "", default: str | None = "response") -> Callable[..., Any]:
    """`--trace --positions`; more: to go on the help of --trace; default: of --positions, None where stages differ."""

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        source = click.get_current_context().get_parameter_source("positions")
        if source is not click.core.ParameterSource.DEFAULT and options["trace"] is None:
            raise click.UsageError("--positions goes with --trace")
        return function(*args, **options)

    with_positions = click.option(
        "--positions",
        type=click.Choice(["response", "all"]),
        default=default,
        show_default=default or "all to quantize with, else response",
        help="Of a trace: which predictions count, those of the response's tokens or all.",
    )(checked)
    return click.option(
        "--trace",
        type=click.Path(path_type=Path),
        help="Rows of model_trace, or a publisher's token ids (JSON, JSONL, parquet), in place of text: those of the "
        f"role that is needed, at most -r of them.{more}",
    )(with_positions)


def in_dir_option(name: str, says: str, *, required: bool = True) -> Option:
    """`-i`: the build or base that a command starts from."""
    return click.option("-i", "--in-dir", "--in_dir", name, required=required, help=says)


def model_b_option(name: str, says: str, *, required: bool = True) -> Option:
    """`-mb`: the unquantized model."""
    return click.option("-mb", "--model-b", "--model_b", name, required=required, help=says)


def out_dir_option(says: str) -> Option:
    """`-o`: the directory that is made."""
    path = click.Path(path_type=Path)
    return click.option("-o", "--out-dir", "--out_dir", "out", type=path, required=True, help=says)


def budget_bits_option(*others: str, says: str) -> Option:
    """`-b`: one budget in bits per weight; others: more spellings of the flag."""
    return click.option("-b", "--bits", *others, "bits", type=float, help=says)


def max_memory_option(of: str = "") -> Option:
    """`--max-memory`; of: the part of the work that it is for, "For the profile"."""
    says = "Never use more memory than this, e.g. 8GiB."
    return click.option("--max-memory", help=f"{of}: {says[0].lower()}{says[1:]}" if of else says)


def tokenizer_from_option(says: str) -> Option:
    """`--tokenizer-from`: of GGUF outputs."""
    return click.option("--tokenizer-from", metavar="X.gguf", help=says)


def imatrix_option(says: str) -> Option:
    """`--imatrix`: of GGUF types."""
    return click.option("--imatrix", metavar="FILE", help=says)


def rounding_option(says: str) -> Option:
    """`--rounding`: whose errors GPTQ weighs."""
    return click.option("--rounding", type=click.Choice(["one-sided", "two-sided"]), help=says)


def samples_option(says: str, default: int | None = None) -> Option:
    """`--samples`: random draws of a sketch."""
    shown: dict[str, Any] = {} if default is None else {"default": default, "show_default": True}
    return click.option("--samples", type=click.IntRange(2, 65536), **shown, help=says)


def device_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`-d --dtype`."""
    function = click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Compute dtype; default float32 on the CPU, bfloat16 elsewhere.",
    )(function)
    return click.option(
        "-d", "--device", default="cpu", show_default=True, help="cpu, cuda:0, or a CUDA device number."
    )(function)


def made_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--format -g --asym`: what candidates made on the fly are."""
    for option in reversed(
        (
            click.option(
                "--format",
                "format",
                type=click.Choice(CANDIDATE_FORMATS),
                default=COMPRESSED,
                show_default=True,
                help="What --candidates given as bits are: integers; EXL2 by its encoder without GPTQ, fractions too; "
                "EXL3 by stand-ins: noise as large as its encoder's error, which takes too long on a CPU; MLX, affine "
                "or mxfp4, mxfp8, nvfp4.",
            ),
            click.option(
                "-g",
                "--group-size",
                show_default="64",
                help="Of --candidates: 32, 64, 128 (MLX too) or channel.",
            ),
            click.option("--asym", is_flag=True, help="--candidates have a zero point per group."),
        )
    ):
        function = option(function)
    return function


def engine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--engine` and what goes with it: the real engine's logits, counted as its own tool counts them."""
    path = click.Path(path_type=Path)
    for option in reversed(
        (
            click.option(
                "--engine",
                type=click.Choice(["llama.cpp", "ik_llama.cpp", "vllm", "transformers", MLX]),
                help="Run both models in this engine, beside our own forward pass: GGUF files with llama-perplexity's "
                "KL statistics, directories with log-probabilities (see `recompile engines`).",
            ),
            click.option(
                "--engine-lib",
                "library",
                type=path,
                help="Your own libllama, or a Python that has vllm, transformers or mlx-lm, not the pinned one.",
            ),
            click.option(
                "--engine-top-k",
                type=click.IntRange(min=0),
                help="With --engine vllm: log-probabilities that it tells at a position; default 1000, 0: all (slow).",
            ),
            click.option(
                "--llama-chunks",
                "chunks",
                type=click.IntRange(min=1),
                help="GGUF in --engine: chunks of -l tokens (default 8 of 512), of which the second half counts.",
            ),
            click.option(
                "--kl-divergence-base",
                "base_logits",
                type=path,
                help="With --engine: a file of base logits in place of B's run; its tokens are used.",
            ),
            click.option(
                "--save-all-logits",
                "save_base_logits",
                type=path,
                help="With --engine: write B's logits as llama-perplexity's base file.",
            ),
            click.option(
                "--torch/--no-torch",
                "with_torch",
                default=True,
                help="With --engine; --no-torch leaves out our own forward pass beside it.",
            ),
            click.option("--threads", type=click.IntRange(min=1), help="With --engine: its threads."),
        )
    ):
        function = option(function)
    return function


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--json --quiet`."""
    function = click.option("--quiet", is_flag=True, help="No progress bar.")(function)
    return click.option(
        "--json",
        "json_path",
        type=click.Path(path_type=Path),
        help='Also write the whole report as JSON; "-" = stdout.',
    )(function)
