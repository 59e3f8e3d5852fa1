"""Verbs that make builds and the rows that they are made with: quantize, heal, trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recompile.api.shared import PathLike, as_path, check_types
from recompile.events import OnEvent, Progress, ignore
from recompile.formats import COMPRESSED
from recompile.io.sizes import size_bytes

if TYPE_CHECKING:
    import torch

    from eval.heal import HealReport
    from eval.trace.run import TraceReport
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.model.tokens import Rows
    from recompile.quantize.gguf import VariantsReport
    from recompile.quantize.quantize_report import QuantizeReport
    from recompile.quantize.run import ConvertedVariants


def quantize(
    base: PathLike,
    out: PathLike,
    *,
    bits: Sequence[float | str] = (),
    scheme: Sequence[str] = (),
    modifiers: PathLike | None = None,
    independent: bool = False,
    recipe: PathLike | None = None,
    format: str = COMPRESSED,
    method: str = "gptq",
    group_size: int | str = 64,
    asym: bool = False,
    importance: bool = True,
    head_bits: int | None = None,
    codebook: str = "mul1",
    tokenizer_from: PathLike | None = None,
    imatrix: PathLike | None = None,
    save_imatrix: PathLike | None = None,
    converter: bool = False,
    engine: str = "own",
    rounding: str | None = None,
    compensate: bool = False,
    stats: PathLike | None = None,
    max_memory: int | str | None = None,
    mtp: str = "quantize",
    tower: str = "keep",
    keep: Sequence[str] = (),
    quantize_also: Sequence[str] = (),
    rows: int | None = None,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
    trace: PathLike | None = None,
    positions: str = "all",
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> QuantizeReport | VariantsReport | ConvertedVariants:
    """Quantize a dense model to several bitrates, calibrated once for all; or, with `recipe`, straight to a mix.

        recompile.quantize("base", "variants", bits=[2, 3, 4, 6])                # variants/2bpw, variants/3bpw, ...
        recompile.quantize("base", "mix", recipe="overrides.yaml")               # sources like {id: 4, bits: 4}
        recompile.quantize("base", "gguf", bits=["Q4_K", "Q6_K"], format="gguf", tokenizer_from="X.gguf")

    bits: bitrates, or GGUF types; scheme: compressed-tensors schemes ("w4a16-g64", "nvfp4") instead; modifiers: a YAML
    of them (independent: calibrated on the unquantized model)
    format: compressed-tensors, exl2, exl3, gguf or mlx (schemes: its modes mxfp4, mxfp8, nvfp4, beside bits);
    method: rtn, mse or gptq, with schemes of compressed-tensors also awq and smoothquant;
    group_size: 32, 64, 128 or "channel"; asym: a zero point a group; importance: weigh errors of fitted grids by
    inputs; head_bits: of the output head; codebook: of EXL3; rounding: "one-sided" or "two-sided", the statistics of
    which are kept in stats and measured within max_memory; compensate: one build whose modules make good what those
    before them were rounded by
    mtp, tower: "quantize" or "keep" MTP layers and vision or audio towers; keep, quantize_also: globs of modules that
    stay dense, or are quantized, whatever they are for
    tokenizer_from, imatrix, save_imatrix, converter: of GGUF; engine: whose encoder, "own", "exllamav2" or "exllamav3"
    rows, length, text, dataset, input_ids: what is calibrated on (rows None: 64, or all of input_ids); trace: a file of
    `trace` in place of these, its calibrate rows; positions: the inputs of the "response" count, or of "all"; device,
    dtype: where and in what

    Returns a QuantizeReport (`directories`, `variants`), for GGUF a VariantsReport (`files`). Raises ArgumentError,
    FormatError, OutputError.
    """
    calibrated = (importance and imatrix is None) or compensate or rounding is not None or stats is not None
    if engine == "own" and (calibrated or (format != "gguf" and recipe is None)):
        check_types(base)
    from recompile.checkpoint.module_names import Dense
    from recompile.model.rows import RowOptions
    from recompile.quantize.run import QuantizeOptions, run_quantize

    taken = 64 if rows is None and input_ids is None else rows
    options = QuantizeOptions(
        bits=tuple(str(rate) for rate in bits),
        schemes=tuple(scheme),
        modifiers=as_path(modifiers),
        independent=independent,
        recipe=as_path(recipe),
        format=format,
        method=method,
        group_size=str(group_size),
        asym=asym,
        importance=importance,
        head_bits=head_bits,
        codebook=codebook,
        tokenizer_from=as_path(tokenizer_from),
        imatrix=as_path(imatrix),
        save_imatrix=as_path(save_imatrix),
        converter=converter,
        engine=engine,
        rounding=rounding,
        compensate=compensate,
        stats=as_path(stats),
        max_memory_bytes=size_bytes(max_memory, "{max_memory}"),
        dense=Dense(tuple(keep), tuple(quantize_also), mtp, tower),
        where=RowOptions(taken, length, as_path(text), dataset, as_path(input_ids), as_path(trace), positions),
        device=device,
        dtype=dtype,
    )
    return run_quantize(Path(base), Path(out), options, on_event or ignore, _measure_outputs)


def _measure_outputs(
    base: Checkpoint,
    rows: Rows,
    path: Path,
    device: str,
    dtype: torch.dtype | None,
    cap_bytes: int | None,
) -> Iterator[object]:
    from eval.passes.output_gradients import GradientOptions, GradientsProgress, measure_outputs

    options = GradientOptions(dtype=dtype, device=device, max_memory_bytes=cap_bytes)
    for event in measure_outputs(base, rows.ids, path, options, rows_sha256=rows.sha256, counted=rows.counted):
        yield event
        if isinstance(event, GradientsProgress):
            yield Progress("gradients", event.done, event.total, "layers", event.text)


def heal(
    build: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    tokens: int = 150_000,
    minutes: float | None = None,
    learning_rate: float | None = None,
    batch_tokens: int = 1024,
    max_memory: int | str | None = None,
    rows: int = 16,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    trace: PathLike | None = None,
    positions: str = "response",
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> HealReport:
    """Tune the scales, norms and biases of a finished build against its base; every code stays.

        recompile.heal("mix", "base", "mix-healed", minutes=20).report.ratio

    tokens: of training, rows used again where text is short; minutes: in all, about; learning_rate: of Adam on
    logarithms of scales, None: by the build's bits; batch_tokens: of a step; max_memory: bytes or text
    rows: of each role that judges; length, text, dataset: of all rows; trace: a file of `trace` in place of text, each
    role's own rows; positions: KL of the "response" counts, or of "all"; device, dtype: of the arithmetic (None:
    steps in bfloat16 where the device multiplies that fast, on a CPU judged in float32)

    Raises RecompileError, and writes nothing, where KL on rows of its own is not lower with confidence.
    """
    check_types(build, base)
    from eval.heal import HealOptions, heal_build
    from recompile.model.devices import compute_device, compute_dtype
    from recompile.model.rows import RowOptions

    options = HealOptions(
        tokens=tokens,
        minutes=minutes,
        learning_rate=learning_rate,
        batch_tokens=batch_tokens,
        device=compute_device(device),
        dtype=compute_dtype(dtype),
        max_memory_bytes=size_bytes(max_memory, "{max_memory}"),
    )
    where = RowOptions(rows, length, as_path(text), dataset, None, as_path(trace), positions)
    return heal_build(Path(build), Path(base), Path(out), where, options, on_event or ignore)


def trace(
    base: PathLike,
    out: PathLike,
    *,
    prompts: PathLike | None = None,
    rows: int | None = None,
    tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    url: str | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> TraceReport:
    """Let a model answer prompts through its chat template, and write the rows that others are measured on.

        print(recompile.trace("base", "trace.safetensors", rows=80).roles)

    prompts: a file of JSON lines in place of the bundled ones; rows: the first so many, None: all
    tokens: of a response at most; temperature: 1 draws from the model's own distribution, 0 is greedy; seed: of the
    draws, of which every prompt has its own; batch_size: prompts that run together; device, dtype: where and in what
    url: of an OpenAI-compatible server that runs the model and answers instead, "http://localhost:8000/v1"; base is
    needed for its tokenizer and config then

    Every prompt belongs to one role. Goes on with an interrupted run. Raises UnsupportedError for a model without a
    chat template or with a layer too large for memory.
    """
    if url is None:
        check_types(base)
    from eval.trace.generate import Sampling
    from eval.trace.run import TraceRequest, run_trace

    sampling = Sampling(temperature, seed, tokens)
    request = TraceRequest(as_path(prompts), rows, sampling, batch_size, device, dtype, url)
    return run_trace(Path(base), Path(out), request, on_event or ignore)
