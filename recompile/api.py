"""The Python API: what every command does, as a function with plain arguments.

    import recompile

    recompile.quantize("base", "variants", bits=[2, 3, 4, 6])
    recompile.profile("base", "variants/3bpw", ["variants/2bpw", "variants/4bpw", "variants/6bpw"], mode="sketch")
    found = recompile.optimize("profile.jsonl", bits=3.5, out="overrides.yaml")
    recompile.merge("variants/3bpw", "mix", recipe="overrides.yaml")

Arguments have the defaults of the commands. Each function returns a report, and goes on where an interrupted call with
the same arguments stopped, as the command does. `on_event` is called with what happens on the way (recompile.events:
Progress for a bar, Note for people, and events of the work). Wrong arguments raise ArgumentError, every other expected
failure another RecompileError, with one line that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from recompile.events import OnEvent, Progress, ignore
from recompile.io.sizes import size_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from eval.heal import HealReport
    from eval.search.frontier import FrontierReport
    from eval.search.optimize import OptimizeReport
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.optimize.choose import Constraint
    from recompile.quantize.gguf import VariantsReport
    from recompile.quantize.pipeline import QuantizeReport
    from recompile.quantize.run import ConvertedVariants

PathLike: TypeAlias = "str | os.PathLike[str]"


def quantize(
    base: PathLike,
    out: PathLike,
    *,
    bits: Sequence[float | str] = (),
    scheme: Sequence[str] = (),
    modifiers: PathLike | None = None,
    independent: bool = False,
    recipe: PathLike | None = None,
    format: str = "compressed-tensors",
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
    stats: PathLike | None = None,
    max_memory: int | str | None = None,
    mtp: str = "quantize",
    tower: str = "keep",
    keep: Sequence[str] = (),
    quantize_also: Sequence[str] = (),
    rows: int | None = 64,
    length: int = 512,
    text: PathLike | None = None,
    dataset: str | None = None,
    input_ids: PathLike | None = None,
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
    format: compressed-tensors, exl2, exl3 or gguf; method: rtn, mse or gptq, with schemes also awq and smoothquant;
    group_size: 32, 64, 128 or "channel"; asym: a zero point a group; importance: weigh errors of fitted grids by
    inputs; head_bits: of the output head; codebook: of EXL3; rounding: "one-sided" or "two-sided", the statistics of
    which are kept in stats and measured within max_memory
    mtp, tower: "quantize" or "keep" MTP layers and vision or audio towers; keep, quantize_also: globs of modules that
    stay dense, or are quantized, whatever they are for
    tokenizer_from, imatrix, save_imatrix, converter: of GGUF; engine: whose encoder, "own", "exllamav2" or "exllamav3"
    rows, length, text, dataset, input_ids: what is calibrated on; device, dtype: where and in what

    Returns a QuantizeReport (`directories`, `variants`), for GGUF a VariantsReport (`files`). Raises ArgumentError,
    FormatError, OutputError.
    """
    from recompile.checkpoint.module_names import Dense
    from recompile.model.rows import RowOptions
    from recompile.quantize.run import QuantizeOptions, run_quantize

    options = QuantizeOptions(
        bits=tuple(str(rate) for rate in bits),
        schemes=tuple(scheme),
        modifiers=_path(modifiers),
        independent=independent,
        recipe=_path(recipe),
        format=format,
        method=method,
        group_size=str(group_size),
        asym=asym,
        importance=importance,
        head_bits=head_bits,
        codebook=codebook,
        tokenizer_from=_path(tokenizer_from),
        imatrix=_path(imatrix),
        save_imatrix=_path(save_imatrix),
        converter=converter,
        engine=engine,
        rounding=rounding,
        stats=_path(stats),
        max_memory_bytes=size_bytes(max_memory),
        dense=Dense(tuple(keep), tuple(quantize_also), mtp, tower),
        where=RowOptions(rows, length, _path(text), dataset, _path(input_ids)),
        device=device,
        dtype=dtype,
    )
    return run_quantize(Path(base), Path(out), options, on_event or ignore, _measure_outputs)


def _measure_outputs(
    base: Checkpoint,
    ids: Tensor,
    path: Path,
    rows_sha256: str,
    device: str,
    dtype: torch.dtype | None,
    cap_bytes: int | None,
) -> Iterator[object]:
    from eval.passes.output_gradients import GradientOptions, GradientsProgress, measure_outputs

    options = GradientOptions(dtype=dtype, device=device, max_memory_bytes=cap_bytes)
    for event in measure_outputs(base, ids, path, options, rows_sha256=rows_sha256):
        yield event
        if isinstance(event, GradientsProgress):
            yield Progress("gradients", event.done, event.total, "layers", event.text)


def optimize(
    profile: PathLike,
    out: PathLike | None = None,
    *,
    bits: float | None = None,
    size: int | str | None = None,
    total_bpw: float | None = None,
    max_kl: float | None = None,
    max_ppl_increase: float | str | None = None,
    active_bpw: float | None = None,
    pool: Sequence[str] = (),
    solver: str | None = None,
    start: PathLike | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    max_memory: int | str | None = None,
    pin: Sequence[str] = (),
    minimum: Sequence[str] = (),
    maximum: Sequence[str] = (),
    ban: Sequence[str] = (),
    max_step: int | None = None,
    tie: Sequence[str] = (),
    engine: str | None = None,
    check: bool | None = None,
    activations: bool = False,
    guard: bool = True,
    rows: int = 16,
    length: int = 256,
    device: str = "cpu",
    text: PathLike | None = None,
    dataset: str | None = None,
    on_event: OnEvent | None = None,
) -> OptimizeReport:
    """Choose a source for every group of a profile so that KL is least within a size; write the override file.

        found = recompile.optimize("profile.jsonl", bits=3.5, out="overrides.yaml")
        print(found.written.bpw, found.measured.kl if found.measured else found.written.predicted_kl_nats)

    bits, total_bpw, active_bpw: budgets in bits per weight; size: bytes, or text such as "4.2GiB"; max_kl: nats per
    token; max_ppl_increase: 0.02 or "2%"; pool: "NAME=GLOB,GLOB:SIZE" each. At most one of bits, size, total_bpw,
    max_kl and max_ppl_increase; without any, the size of `start`.
    solver: a name of recompile.optimize.solvers.SOLVERS; None: refine for at most 10 minutes where the models are still
    there, else exact. steps, minutes: the most that a solver which runs models may take; max_memory: bytes or text
    pin, minimum, maximum, ban: "GLOB=ID" each; tie: globs; max_step: sources between neighbouring layers; engine: only
    what it loads
    check: measure the recipe beside uniform, hand-made and greedy mixes on rows that nothing else uses; None: where the
    models are there. guard: write the best of those where the recipe does not beat them with confidence. rows, length,
    text, dataset, device: of what is run; activations: with inputs quantized as schemes say

    Raises BudgetError where the budget cannot be met.
    """
    from eval.search.optimize import OptimizeOptions, optimize_recipe
    from recompile.model.rows import RowOptions
    from recompile.optimize.budget import parse_share

    options = OptimizeOptions(
        bpw=bits,
        size_bytes=size_bytes(size),
        total_bpw=total_bpw,
        max_kl=max_kl,
        max_ppl_increase=parse_share(max_ppl_increase) if isinstance(max_ppl_increase, str) else max_ppl_increase,
        active_bpw=active_bpw,
        pools=tuple(pool),
        constraints=_constraints(pin, minimum, maximum, ban),
        ties=tuple(tie),
        engine=engine,
        max_step=max_step,
        solver=solver,
        start=_path(start),
        steps=steps,
        minutes=minutes,
        max_memory_bytes=size_bytes(max_memory),
        check=check,
        activations=activations,
        guard=guard,
        where=RowOptions(rows, length, _path(text), dataset),
        device=device,
    )
    return optimize_recipe(Path(profile), Path(out or "overrides.yaml"), options, on_event or ignore)


def frontier(
    profile: PathLike,
    grid: str,
    out: PathLike | None = None,
    *,
    solver: str = "exact",
    pin: Sequence[str] = (),
    minimum: Sequence[str] = (),
    maximum: Sequence[str] = (),
    ban: Sequence[str] = (),
    max_step: int | None = None,
    tie: Sequence[str] = (),
    engine: str | None = None,
    check: bool | None = None,
    activations: bool = False,
    rows: int = 16,
    length: int = 256,
    device: str = "cpu",
    text: PathLike | None = None,
    dataset: str | None = None,
    on_event: OnEvent | None = None,
) -> FrontierReport:
    """A recipe for every budget of a grid, with a table and a plot, in the folder `out` (default "frontier").

        table = recompile.frontier("profile.jsonl", "2.5:6:0.25").rows

    grid: "LOW:HIGH:STEP", bits per weight; solver: exact or greedy; check: measure every recipe. The others: as in
    `optimize`.
    """
    from eval.search.frontier import write_frontier
    from eval.search.optimize import OptimizeOptions
    from recompile.model.rows import RowOptions

    options = OptimizeOptions(
        solver=solver,
        constraints=_constraints(pin, minimum, maximum, ban),
        max_step=max_step,
        ties=tuple(tie),
        engine=engine,
        check=check,
        activations=activations,
        where=RowOptions(rows, length, _path(text), dataset),
        device=device,
    )
    return write_frontier(Path(profile), Path(out or "frontier"), grid, options, on_event or ignore)


def _constraints(
    pin: Sequence[str], minimum: Sequence[str], maximum: Sequence[str], ban: Sequence[str]
) -> tuple[Constraint, ...]:
    from recompile.optimize.choose import Constraint

    kinds = (("pin", pin), ("min", minimum), ("max", maximum), ("ban", ban))
    return tuple(Constraint.parse(kind, text) for kind, given in kinds for text in given)


def _path(given: PathLike | None) -> Path | None:
    return None if given is None else Path(given)


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
    input_ids: PathLike | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    on_event: OnEvent | None = None,
) -> HealReport:
    """Tune the scales, norms and biases of a finished build against its base; every code stays.

        recompile.heal("mix", "base", "mix-healed", minutes=20).report.ratio

    tokens: of training, rows used again where text is short; minutes: of training at most; learning_rate: of Adam on
    logarithms of scales, None: by the build's bits; batch_tokens: of a step; max_memory: bytes or text
    rows: of each role that judges; length, text, dataset: of all rows; device, dtype: of the arithmetic

    Raises RecompileError, and writes nothing, where KL on rows of its own is not lower with confidence.
    """
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
        max_memory_bytes=size_bytes(max_memory),
    )
    where = RowOptions(rows, length, _path(text), dataset, _path(input_ids))
    return heal_build(Path(build), Path(base), Path(out), where, options, on_event or ignore)
