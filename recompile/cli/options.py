"""Options that several commands share, and options that take any number of values (`-b 2 3 4 6`)."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import click

from recompile.cli.common import long_flag
from recompile.formats import CANDIDATE_FORMATS, COMPRESSED
from recompile.formats.mlx_config import QUANT_METHOD as MLX

Option: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


class RowCount(click.ParamType):
    """A number of rows, or "auto": as many as an error asks for."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if isinstance(value, int) or value == "auto":
            return value
        if not re.fullmatch(r"[1-9]\d*", value):
            self.fail(f'"{value}" is neither a number of rows nor "auto"', param, ctx)
        return int(value)


PRINTED = ("json_path", "card")  # options whose "-" is standard output


class Name(click.Path):
    """A path. "" (of a variable that is not set) would be the current directory; "-" is standard output of some."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value) == "" or (str(value) == "-" and (param is None or param.name not in PRINTED)):
            self.fail(f'"{value}" is no name of a file or directory; is a variable empty?', param, ctx)
        return super().convert(value, param, ctx)


def options(*each: Option) -> Option:
    """Several options as one decorator, in this order."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda done, option: option(done), reversed(each), function)

    return add


def options_of(
    verb: Callable[..., Any], given: Mapping[str, Any], ctx: click.Context
) -> tuple[dict[str, Any], list[str]]:
    """What a function of the Python API takes of the options, and the flags of those that it does not, as far as they
    were typed."""
    taken = inspect.signature(verb).parameters
    typed = {name for name in given if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT}
    wrong = [
        long_flag([*option.secondary_opts, *option.opts])
        for option in ctx.command.params
        if option.name in typed and option.name not in taken
    ]
    return {name: value for name, value in given.items() if name in taken}, wrong


def path_option(*flags: str, says: str, **more: Any) -> Option:
    """An option that names a file or a directory."""
    return click.option(*flags, type=Name(path_type=Path), help=says, **more)


def text_file_options(says: str = "A UTF-8 text file in place of the default text.", dataset: str = "") -> Option:
    """`--text --dataset`."""
    return options(
        path_option("--text", says=says),
        click.option("--dataset", help=dataset or "A data set of the `datasets` library, e.g. wiki2."),
    )


def text_options(rows: int, length: int, *, auto: bool = False, unset: bool = False, ids: bool = True) -> Option:
    """`-r -l --text --dataset --input-ids`: where token rows come from; `auto`: -r auto is a choice, and nothing given
    is None; `unset`: nothing given is None; `ids`: whether --input-ids is one."""
    row_type: Any = RowCount() if auto else int
    row_help = "Rows of tokens; auto: as many as --rtol asks for." if auto else "Rows of tokens."
    default = None if auto or unset else rows
    token_rows = "Token rows (safetensors, key input_ids, int64 [rows, tokens]) in place of text: all, or the first -r."
    return options(
        click.option("-r", "--rows", type=row_type, default=default, show_default=str(rows), help=row_help),
        click.option("-l", "--length", default=length, help="Tokens in a row."),
        text_file_options(),
        *([path_option("--input-ids", says=token_rows)] if ids else []),
    )


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
        type=Name(path_type=Path),
        help="Rows of model_trace, or a publisher's token ids (JSON, JSONL, parquet), in place of text: those of the "
        f"role that is needed, at most -r of them.{more}",
    )(with_positions)


def in_dir_option(name: str, says: str, *, required: bool = True) -> Option:
    """`-i`: the build or base that a command starts from."""
    return click.option("-i", "--in-dir", "--in_dir", name, required=required, type=Name(), help=says)


def model_b_option(name: str, says: str, *, required: bool = True) -> Option:
    """`-mb`: the unquantized model."""
    return click.option("-mb", "--model-b", "--model_b", name, required=required, help=says)


def out_dir_option(says: str) -> Option:
    """`-o`: the directory that is made."""
    return path_option("-o", "--out-dir", "--out_dir", "out", says=says, required=True)


def recipe_option(name: str, says: str, **more: Any) -> Option:
    """`-or`: a recipe, or what is read as one."""
    return path_option("-or", "--override", name, says=says, **more)


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
    return click.option("--samples", type=click.IntRange(2, 65536), default=default, help=says)


# `-d --dtype`
device_options = options(
    click.option("-d", "--device", default="cpu", help="cpu, cuda:0, or a CUDA device number."),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Compute dtype; default float32 on the CPU, bfloat16 elsewhere.",
    ),
)

# `--format -g --asym`: what candidates made on the fly are
made_options = options(
    click.option(
        "--format",
        "format",
        type=click.Choice(CANDIDATE_FORMATS),
        default=COMPRESSED,
        help="What --candidates given as bits are: integers; EXL2 by its encoder without GPTQ, fractions too; "
        "EXL3 by stand-ins: noise as large as its encoder's error, which takes too long on a CPU; MLX, affine "
        "or mxfp4, mxfp8, nvfp4.",
    ),
    click.option("-g", "--group-size", show_default="64", help="Of --candidates: 32, 64, 128 (MLX too) or channel."),
    click.option("--asym", is_flag=True, help="--candidates have a zero point per group."),
)

# `--engine` and what goes with it: the real engine's logits, counted as its own tool counts them
engine_options = options(
    click.option(
        "--engine",
        type=click.Choice(["llama.cpp", "ik_llama.cpp", "vllm", "transformers", MLX]),
        help="Run both models in this engine, beside our own forward pass: GGUF files with llama-perplexity's "
        "KL statistics, directories with log-probabilities (see `recompile engines`).",
    ),
    path_option(
        "--engine-lib",
        "library",
        says="Your own libllama, or a Python that has vllm, transformers or mlx-lm, not the pinned one.",
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
    path_option(
        "--kl-divergence-base",
        "base_logits",
        says="With --engine: a file of base logits in place of B's run; its tokens are used.",
    ),
    path_option(
        "--save-all-logits", "save_base_logits", says="With --engine: write B's logits as llama-perplexity's base file."
    ),
    click.option(
        "--torch/--no-torch",
        "with_torch",
        default=True,
        show_default=False,
        help="With --engine; --no-torch leaves out our own forward pass beside it.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="With --engine: its threads."),
)

# `--json --quiet`
output_options = options(
    path_option("--json", "json_path", says='Also write the whole report as JSON; "-" = stdout.'),
    click.option("--quiet", is_flag=True, help="No progress bar."),
)
