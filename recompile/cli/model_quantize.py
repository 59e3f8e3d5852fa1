"""model_quantize: a dense base model to variants at several bitrates, in one pass."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recompile.checkpoint.module_names import HEAD_NAMES
from recompile.cli.common import check_json_path, print_json, progress
from recompile.cli.options import device_options, many_values_command, output_options, text_options
from recompile.errors import FormatError
from recompile.io.report import format_columns
from recompile.io.sizes import format_bpw, format_bytes, parse_size
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import check_vocabulary, read_rows

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint
    from recompile.model.tokens import Rows
    from recompile.quantize.gguf import Mix, VariantsReport
    from recompile.quantize.mix import MixEncoder
    from recompile.quantize.output_statistics import StoredStatistics
    from recompile.quantize.pipeline import Encoder, ModuleReport, QuantizeReport


@many_values_command(
    "model_quantize",
    outputs={"--json": "json_path", "--save-imatrix": "save_imatrix"},
    inputs=("in_dir", "override", "modifiers", "tokenizer_from", "imatrix", "text", "input_ids"),
)
@click.option("-i", "--in-dir", "--in_dir", required=True, help="The dense base model.")
@click.option(
    "-o",
    "--out-dir",
    "--out_dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Where the variants go: DIR/3bpw, DIR/4bpw, ...",
)
@click.option(
    "-b", "--bits", multiple=True, help="Bitrates, any number: -b 2 3 4 6; GGUF types: -b Q3_K_S Q4_K IQ4_KSS."
)
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    help="In place of -b, compressed-tensors schemes: --scheme w4a16-g64 w8a16 fp8-channel nvfp4 mxfp4 ...",
)
@click.option(
    "--modifiers",
    type=click.Path(path_type=Path),
    help="In place of -b, one variant by a recipe of modifiers (YAML), or of llm-compressor.",
)
@click.option(
    "--independent",
    is_flag=True,
    help="With --modifiers: calibrate every module on the unquantized model, as variants are, in place of what the "
    "quantized layers before it give.",
)
@click.option(
    "-or",
    "--override",
    "recipe_path",
    type=click.Path(path_type=Path),
    help="Make one mix instead: a recipe whose sources are like {id: 4, bits: 4}, for EXL2 and EXL3 with --format or "
    "{id: 2.5, bits: 2.5, format: exl2}. OUT is then the mix's own directory; "
    "with {id: Q4_K, type: Q4_K}, or llama-quantize's, --custom-q's or thireus's recipes, a GGUF file.",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["compressed-tensors", "exl2", "exl3", "gguf"]),
    default="compressed-tensors",
    show_default=True,
)
@click.option(
    "--method",
    default="gptq",
    show_default=True,
    metavar="rtn|mse|gptq|awq|smoothquant|awq+gptq|...",
    help="Round to nearest; least squares grids; GPTQ on top of those. With --scheme also awq and smoothquant: scales "
    "of the inputs moved into norms and maps before them, then mse or, as awq+gptq, another rounding.",
)
@click.option(
    "-g", "--group-size", default="64", show_default=True, help="32, 64, 128 or channel (compressed-tensors)."
)
@click.option(
    "--asym",
    is_flag=True,
    help="A zero point per group (compressed-tensors). transformers 5.23 cannot load such mixes.",
)
@click.option(
    "--importance/--no-importance",
    default=True,
    show_default=True,
    help="Weight errors by the Hessian diagonal when grids are fitted (mse, gptq).",
)
@click.option(
    "-hb",
    "--head-bits",
    "--head_bits",
    type=int,
    help="Quantize the output head to this; default: dense (EXL2, EXL3: 6).",
)
@click.option(
    "--codebook", type=click.Choice(["3inst", "mcg", "mul1"]), default="mul1", show_default=True, help="EXL3 codebook."
)
@click.option(
    "--tokenizer-from",
    metavar="X.gguf",
    help="GGUF: the file whose tokenizer keys the outputs get; needed where the base is no GGUF file.",
)
@click.option(
    "--imatrix",
    metavar="FILE",
    help="GGUF: importance from this imatrix file, or a profile's .importance.safetensors, in place of a calibration "
    "pass.",
)
@click.option("--save-imatrix", metavar="FILE", help="GGUF: also write the importance as an imatrix file.")
@click.option(
    "--converter", is_flag=True, help="GGUF: make the base file with llama.cpp's own converter, in its own environment."
)
@click.option(
    "--engine",
    type=click.Choice(["own", "exllamav2", "exllamav3"]),
    default="own",
    show_default=True,
    help="Whose encoder makes the tensors; the last two need CUDA.",
)
@click.option(
    "--rounding",
    type=click.Choice(["one-sided", "two-sided"]),
    help="With GPTQ: weigh errors by the inputs of a map alone, or also by the gradients at its outputs, which takes a "
    "backward pass over the calibration rows. Default: two-sided where --stats is given.",
)
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the statistics of those gradients here, and use them again when they are there (some MB a layer).",
)
@click.option("--max-memory", help="For that backward pass: never use more memory than this, e.g. 8GiB.")
@text_options(rows=64, length=512)
@device_options
@output_options
def main(
    in_dir: str,
    out_dir: Path,
    bits: tuple[str, ...],
    schemes: tuple[str, ...],
    modifiers: Path | None,
    independent: bool,
    recipe_path: Path | None,
    format_name: str,
    method: str,
    group_size: str,
    asym: bool,
    importance: bool,
    head_bits: int | None,
    codebook: str,
    tokenizer_from: str | None,
    imatrix: str | None,
    save_imatrix: str | None,
    converter: bool,
    engine: str,
    rounding: str | None,
    stats: Path | None,
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
    """Quantize a model to several bitrates; calibration runs once for all of them.

    An interrupted run goes on after the last finished layer when the same command is given again.

    \b
    Examples:
      model_quantize -i base -o variants -b 2 3 4 6
      model_quantize -i base -o exl2 --format exl2 -b 2.5 3 4 5
      model_quantize -i base -o variants --scheme w4a16-g64 w8a16 fp8-channel nvfp4 mxfp4
      model_quantize -i base -o awq --scheme w4a16-g64 --method awq
      model_quantize -i base -o variants -b 2 3 4 --rounding two-sided --stats stats
      model_quantize -i base -o gguf --format gguf -b Q3_K_S Q4_K Q6_K IQ4_KSS --tokenizer-from X.gguf
      model_quantize -i base -o mix -or overrides.yaml           # straight to the mix, no variants
      model_quantize -i base -o MIX.gguf -or overrides.yaml --tokenizer-from X.gguf
    """
    check_json_path(json_path)
    if not bits and not schemes and modifiers is None and recipe_path is None:
        raise click.UsageError("wanted -b with bitrates, --scheme with names, or -or RECIPE for one mix")
    if method not in ("rtn", "mse", "gptq") and not schemes:
        raise click.UsageError(
            f"--method {method}: wanted rtn, mse or gptq; with --scheme also awq, smoothquant, awq+gptq, ... "
            f"(--modifiers says methods in its file)"
        )
    if independent and modifiers is None:
        raise click.UsageError("--independent goes with --modifiers; variants are always calibrated so")
    if schemes and modifiers:
        raise click.UsageError("--scheme and --modifiers: wanted one of them")
    if (schemes or modifiers) and (
        bits or recipe_path or format_name != "compressed-tensors" or engine != "own" or asym or head_bits
    ):
        raise click.UsageError(
            "--scheme and --modifiers say all of the stored form; leave out -b, -or, --format, --engine, --asym and "
            "--head-bits"
        )
    if recipe_path is not None and engine != "own":
        raise click.UsageError("-or goes with --engine own")
    if rounding == "one-sided" and stats is not None:
        raise click.UsageError("--stats are for two-sided rounding; leave out --rounding one-sided")
    two_sided = rounding == "two-sided" or stats is not None
    if two_sided:
        _check_two_sided(format_name, method, engine, modifiers)
    gguf_mix = recipe_path is not None and _is_gguf_recipe(recipe_path)
    if format_name == "gguf" or gguf_mix:
        from recompile.checkpoint.checkpoint import open_checkpoint

        folder = out_dir if recipe_path is None else out_dir.parent
        base = open_checkpoint(_converted(in_dir, folder, quiet) if converter else in_dir)
        make = partial(read_rows, [base.path], "calibrate", rows, length, text, dataset, input_ids)
        files = (tokenizer_from, imatrix, save_imatrix)
        names: Sequence[str | Mix] = bits
        provenance: dict[str, str] = {}
        if recipe_path is not None:
            mix, provenance = gguf_mix_of(recipe_path, base, out_dir, bits)
            names = [mix]
        calibrate = make if importance else None
        _make_gguf(base, folder, names, provenance, files, calibrate, device, dtype, json_path, quiet)
        return
    rates = _rates(bits)
    if engine != "own":
        _run_engine(engine, in_dir, out_dir, format_name, rates, head_bits, rows, length, device, codebook, quiet)
        return
    from recompile.checkpoint.checkpoint import open_checkpoint

    base = open_checkpoint(in_dir)
    found, vocab = read_rows([base.path], "calibrate", rows, length, text, dataset, input_ids)
    check_vocabulary(base, vocab)
    from recompile.quantize.encoders import EXL_HEAD_BITS

    outputs = None
    if two_sided:
        cap = parse_size(max_memory) if max_memory is not None else None
        outputs = _output_statistics(
            base, out_dir, stats, found, compute_device(device), compute_dtype(dtype), cap, quiet
        )

    def with_outputs(made: Encoder) -> Encoder:
        """The encoder with those statistics. Raises FormatError for one that rounds one-sided only."""
        if outputs is None:
            return made
        if not hasattr(made, "outputs"):
            raise FormatError(f"--rounding two-sided: not for {made.description()['format']}")
        return replace(made, outputs=outputs)  # type: ignore[type-var]

    encoder: Encoder
    if schemes or modifiers:
        encoder, head = with_outputs(_scheme_encoder(schemes, modifiers, method, importance)), False
    elif recipe_path is None:
        if format_name in ("exl2", "exl3") and head_bits is None:
            head_bits = EXL_HEAD_BITS
        encoder, head = _encoder(format_name, rates, method, group_size, asym, importance, head_bits, codebook, found)
        encoder = with_outputs(encoder)
    else:
        format_name = _format_of_mix(recipe_path, format_name)
        is_exl = format_name in ("exl2", "exl3")
        if head_bits is not None and not is_exl:
            raise click.UsageError("-hb: in a mix a line for lm_head.* says what the head is")

        def encoder_of(settings: Mapping[str, Any]) -> Encoder:
            if "scheme" in settings:
                return with_outputs(_scheme_source(str(settings["scheme"]), format_name, method, importance))
            size, symmetric = settings.get("group_size", group_size), settings.get("symmetric", not asym)
            size = "channel" if size is None else str(size)
            rate = (float(settings["bits"]),)
            made, _ = _encoder(format_name, rate, method, size, not symmetric, importance, None, codebook, found)
            return with_outputs(made)

        of_head = {"bits": head_bits or EXL_HEAD_BITS, "format": format_name} if is_exl else None
        encoder, head = mix_encoder(recipe_path, base, out_dir, rates, encoder_of, of_head)
        out_dir = out_dir.parent

    from recompile.quantize.pipeline import LayerDone, quantize_model

    report: QuantizeReport | None = None
    with progress("quantizing", 1, unit="layers", quiet=quiet) as bar:
        for event in quantize_model(
            base,
            out_dir,
            encoder,
            found.ids,
            head=head,
            device=compute_device(device),
            dtype=compute_dtype(dtype),
            rows_sha256=found.sha256,
            sequential=modifiers is not None and not independent,
        ):
            if isinstance(event, LayerDone):
                bar.update(event.index + 1, event.name + (" (done before)" if event.resumed else ""), event.total)
            else:
                report = event
    assert report is not None, "quantize_model ends with its report"
    if str(json_path) != "-":
        click.echo(_summary(report))
    if json_path is not None:
        print_json(json_path, report)
    if outputs is not None and stats is None:
        shutil.rmtree(outputs.path)


def _check_two_sided(format_name: str, method: str, engine: str, modifiers: Path | None) -> None:
    """What cannot be rounded so is said before the backward pass."""
    if engine != "own" or format_name == "gguf":
        what = f"--engine {engine}" if engine != "own" else "--format gguf"
        raise click.UsageError(f"--rounding two-sided: not with {what}, whose encoder is not ours to feed back into")
    if "gptq" not in method and modifiers is None:
        raise click.UsageError(f"--rounding two-sided: goes with --method gptq, not {method}")


def _output_statistics(
    base: Checkpoint,
    out_dir: Path,
    stats: Path | None,
    rows: Rows,
    device: str,
    dtype: Any,
    cap_bytes: int | None,
    quiet: bool,
) -> StoredStatistics:
    """Gradients at the outputs of all maps: those kept in `stats`, or measured on the calibration rows."""
    from recompile.quantize.output_statistics import StoredStatistics, open_statistics

    path = stats if stats is not None else out_dir.with_name(out_dir.name + ".stats")  # until the variants are whole
    kept = open_statistics(path)
    if kept is not None:
        kept.check_base(base.identity, base.label)
        return kept
    from eval.passes.output_gradients import GradientOptions, GradientsProgress, measure_outputs

    options = GradientOptions(dtype=dtype, device=device, max_memory_bytes=cap_bytes)
    with progress("gradients", 1, unit="layers", quiet=quiet) as bar:
        for event in measure_outputs(base, rows.ids, path, options, rows_sha256=rows.sha256):
            if isinstance(event, GradientsProgress):
                bar.update(event.done, event.text, event.total)
            elif isinstance(event, StoredStatistics):
                return event
    raise AssertionError("measure_outputs ends with its statistics")


def _rates(bits: tuple[str, ...]) -> tuple[float, ...]:
    try:
        return tuple(float(rate) for rate in bits)
    except ValueError:
        raise FormatError(f"-b {' '.join(bits)}: wanted numbers (tensor types go with --format gguf)") from None


def _is_gguf_recipe(path: Path) -> bool:
    """Whether a recipe is of GGUF types: ours with such sources, or another tool's."""
    from recompile.merge.type_recipes import looks_like_type_recipe
    from recompile.quantize.gguf_mix import makes_gguf
    from recompile.recipe.recipe import load_recipe

    return looks_like_type_recipe(path) or makes_gguf(load_recipe(path))


def gguf_mix_of(path: Path, base: Checkpoint, out: Path, bits: Sequence[str]) -> tuple[Mix, dict[str, str]]:
    """The types that a recipe, ours or another tool's, gives to the tensors of a file, and what its keys say of that.

    bits: the type or preset of what no line names, at most one"""
    import recompile
    from recompile.gguf.names import architecture_of
    from recompile.merge.type_recipes import load_type_recipe, looks_like_type_recipe
    from recompile.quantize.gguf import base_tensors
    from recompile.quantize.gguf_mix import check_out, mix_of, mix_of_types
    from recompile.recipe.recipe import load_recipe

    if len(bits) > 1:
        raise FormatError("-or: -b gives the type of what no line names, so one type")
    check_out(out)
    unnamed = bits[0] if bits else None
    tensors = base_tensors(base, architecture_of(base.config.get("model_type")))
    if looks_like_type_recipe(path):
        mix = mix_of_types(load_type_recipe(path), base, tensors, unnamed, out.name)
    else:
        recipe = load_recipe(path)
        for warning in recipe.warnings:
            click.echo(f"Warning: {warning}", err=True)
        mix = mix_of(recipe, base, tensors, unnamed, out.name)
    source = json.dumps({"file": base.path.resolve().name, "fingerprint": base.fingerprint})
    return mix, {"version": recompile.__version__, "base": source, "recipe": path.read_text(encoding="utf-8")}


def _converted(in_dir: str, out_dir: Path, quiet: bool) -> Path:
    """The base as a GGUF file made by llama.cpp's own converter."""
    from recompile.quantize.gguf_convert import convert

    with progress("converting", 2, unit="steps", quiet=quiet) as bar:
        return convert(Path(in_dir), out_dir, lambda step, what: bar.update(step, what))


def _make_gguf(
    base: Checkpoint,
    out_dir: Path,
    names: Sequence[str | Mix],
    provenance: Mapping[str, str],
    files: tuple[str | None, str | None, str | None],
    make_rows: Callable[[], tuple[Rows, int | None]] | None,
    device: str,
    dtype: str | None,
    json_path: Path | None,
    quiet: bool,
) -> None:
    """One GGUF file for each type, preset or mix.

    provenance: keys for every file; files: the GGUF file with the tokenizer's keys, the imatrix file (or a profile's
    importance) to read and the one to write
    make_rows: the calibration rows; None: no importance
    """
    from recompile.gguf.container import open_gguf
    from recompile.gguf.imatrix import read_imatrix, write_imatrix
    from recompile.quantize.gguf import (
        Importance,
        VariantsReport,
        build_variants,
        collect_importance,
        imatrix_of,
        importance_from,
        plan_variants,
    )

    tokenizer_from, imatrix, save_imatrix = files
    keys_of = open_gguf(tokenizer_from) if tokenizer_from is not None else None
    # refuses what it must before the long work
    plan = plan_variants(base, out_dir, names, tokenizer_from=keys_of, provenance=provenance)
    if imatrix is not None and imatrix.endswith(".safetensors"):
        from recompile.quantize.lazy_variant import read_importance

        plan = replace(plan, importance=Importance(read_importance(Path(imatrix)), source=imatrix))
    elif imatrix is not None:
        plan = replace(plan, importance=importance_from(read_imatrix(imatrix), plan.tensors, imatrix))
    elif make_rows is not None:
        found, vocab = make_rows()
        check_vocabulary(base, vocab)
        calibration = collect_importance(
            base, found.ids, device=compute_device(device), dtype=compute_dtype(dtype), source=found.source
        )
        with progress("calibrating", 1, unit="layers", quiet=quiet) as bar:
            while True:
                try:
                    step = next(calibration)
                except StopIteration as stop:
                    plan = replace(plan, importance=stop.value)
                    break
                bar.update(step.done, f"layer {step.done}", step.total)
        if save_imatrix is not None and plan.importance is not None:
            write_imatrix(save_imatrix, imatrix_of(plan.importance, plan.tensors, found.ids.shape[1]))
    report: VariantsReport | None = None
    with progress("encoding", 1, quiet=quiet) as bar:
        for event in build_variants(plan):
            if isinstance(event, VariantsReport):
                report = event
            else:
                bar.update(event.done_bytes, event.tensor, event.total_bytes)
    assert report is not None, "build_variants ends with its report"
    if str(json_path) != "-":
        click.echo(_gguf_summary(report))
    if json_path is not None:
        print_json(json_path, report)


def _gguf_summary(report: VariantsReport) -> str:
    from recompile.quantize.gguf import counts_of

    rows = []
    for file, (_, made) in zip(report.files, report.tensors.items(), strict=True):
        quantized = [entry for entry in made if entry.got not in ("F32",)]
        size, weights = sum(entry.size_bytes for entry in made), sum(entry.weights for entry in made)
        types = ", ".join(f"{count} {kind}" for kind, count in counts_of(made).items())
        error = _mean([entry.relative_error for entry in quantized])
        rows.append((file, format_bpw(8 * size / weights), format_bytes(size), f"{error:.4f}", types))
    text = format_columns(rows, ("file", "bpw", "size", "rel. error", "tensors by type"), range(1, 4))
    for preset, _ in report.tensors.items():
        noted: dict[tuple[str, str, str], int] = {}
        for entry in report.noted(preset):
            key = (entry.asked, entry.got, entry.note)
            noted[key] = noted.get(key, 0) + 1
        for (asked, got, note), count in noted.items():
            what = f"tensors asked to be {asked} are {got}" if asked != got else f"{got} tensors"
            text += f"\n{preset}: {count} {what}: {note}"
    return text


def _run_engine(
    engine: str,
    in_dir: str,
    out_dir: Path,
    format_name: str,
    bits: tuple[float, ...],
    head_bits: int | None,
    rows: int,
    length: int,
    device: str,
    codebook: str,
    quiet: bool,
) -> None:
    """Let an engine's own converter make the variants."""
    from recompile.quantize.external_converters import check_engine, plan_engine, run_engine

    wanted = {"exllamav2": "exl2", "exllamav3": "exl3"}[engine]
    if format_name != wanted:
        raise FormatError(f"--engine {engine} makes {wanted}: add --format {wanted}")
    check_engine(engine)
    number = device.rpartition(":")[2] if device != "cpu" else "0"
    steps = plan_engine(engine, Path(in_dir), out_dir, bits, head_bits or 6, rows, length, number, codebook)
    with progress("converting", len(steps), unit="runs", quiet=quiet) as bar:
        for output in run_engine(steps):
            bar.update(output.number, f"{output.step.title}: {output.line[-60:]}")
    click.echo("\n".join(str(step.made) for step in steps if step.made.is_dir()))


def _encoder(
    format_name: str,
    bits: tuple[float, ...],
    method: str,
    group_size: str,
    asym: bool,
    importance: bool,
    head_bits: int | None,
    codebook: str,
    rows: Rows,
) -> tuple[Encoder, bool]:
    """The encoder that the options ask for, and whether the head is quantized."""
    from recompile.quantize.encoders import Exl2Encoder, Exl3Encoder, IntEncoder

    if len(set(bits)) != len(bits):
        raise FormatError("-b: a bitrate is given twice")
    if format_name == "exl2":
        return Exl2Encoder(bits, head_bits, len(rows.ids), rows.ids.shape[1], method), True
    if format_name == "exl3":
        return Exl3Encoder(bits, head_bits, codebook, len(rows.ids), rows.ids.shape[1], method), True
    size = None if group_size == "channel" else int(group_size) if group_size.isdigit() else 0
    if size == 0:
        raise FormatError(f"--group-size {group_size}: wanted a number such as 64, or channel")
    whole = [int(rate) for rate in bits if rate == int(rate)]
    if len(whole) != len(bits):
        raise FormatError("-b: compressed-tensors variants have whole bits, 2 to 8; mix them with a recipe")
    return IntEncoder(whole, size, not asym, method, importance, head_bits=head_bits), head_bits is not None


def _scheme_source(name: str, format_name: str, method: str, importance: bool) -> Encoder:
    """The encoder of a recipe's source that is a scheme; for the head as well, where a line names it."""
    from recompile.formats.schemes import parse_scheme
    from recompile.quantize.scheme_encoder import SchemeEncoder, uniform

    if format_name != "compressed-tensors":
        raise FormatError(f"scheme {name}: is stored as compressed-tensors; leave out --format {format_name}")
    scheme = parse_scheme(name)
    return SchemeEncoder((uniform(scheme, method),), importance, head_scheme=scheme)


def _scheme_encoder(schemes: tuple[str, ...], modifiers: Path | None, method: str, importance: bool) -> Encoder:
    from recompile.formats.schemes import parse_scheme
    from recompile.quantize.modifiers import load_modifiers
    from recompile.quantize.scheme_encoder import SchemeEncoder, uniform

    if modifiers is not None:
        variant, notes = load_modifiers(modifiers)
        for note in notes:
            click.echo(f"Note: {note}", err=True)
        return SchemeEncoder((variant,), importance)
    return SchemeEncoder(tuple(uniform(parse_scheme(name), method) for name in schemes), importance)


def _format_of_mix(path: Path, asked: str) -> str:
    """The format of a recipe's mix: what its sources say, or else --format. Raises RecipeError where they differ."""
    from recompile.errors import RecipeError
    from recompile.recipe.recipe import load_recipe

    recipe = load_recipe(path)
    specs = [source.spec for source in recipe.sources if source.spec is not None]
    if isinstance(recipe.base, dict):
        specs.append(recipe.base)
    said = {str(spec.get("format", asked)) for spec in specs}
    if len(said) > 1:
        raise RecipeError(f"{recipe.name}: sources of several formats, {', '.join(sorted(said))}; a mix has one")
    found = said.pop() if said else asked
    if found not in ("compressed-tensors", "exl2", "exl3") or asked not in ("compressed-tensors", found):
        raise RecipeError(
            f"{recipe.name}: sources of format {found}, and --format {asked}; wanted exl2 or exl3, or --format alone"
        )
    return found


def mix_encoder(
    recipe_path: Path,
    base: Checkpoint,
    out: Path,
    bits: Sequence[float],
    encoder_of: Callable[[Mapping[str, Any]], Encoder],
    of_head: Mapping[str, Any] | None = None,
) -> tuple[MixEncoder, bool]:
    """The encoder of a recipe's mix, named as `out`, and whether it quantizes the head.

    bits: one bitrate for modules that no line names, where the recipe has no `base:`; encoder_of: of one source's spec;
    of_head: the spec of a head that no line names, None: it stays dense.
    """
    from recompile.errors import RecipeError
    from recompile.quantize.mix import MixEncoder, assign
    from recompile.recipe.recipe import describe_spec, load_recipe

    recipe = load_recipe(recipe_path)
    for warning in recipe.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if len(bits) > 1:
        raise RecipeError("-or: -b gives the bitrate of what no line names, so one number")
    unnamed: Mapping[str, Any] | None = recipe.base if isinstance(recipe.base, dict) else None
    if bits:
        unnamed = {"bits": bits[0]}
    specs = {source.model_dir: source.spec for source in recipe.sources if source.spec is not None}
    if unnamed is not None:
        specs[describe_spec(unnamed)] = unnamed
    head = next((name for name in HEAD_NAMES if name in base.modules), HEAD_NAMES[0])
    assignment = assign(recipe, base, describe_spec(unnamed) if unnamed is not None else None, head)
    if of_head is not None and head not in assignment:
        assignment[head] = describe_spec(of_head)
        specs[assignment[head]] = of_head
    for spec in specs.values():
        if "bits" not in spec and "scheme" not in spec:
            kind = next(iter(spec), "nothing")
            raise RecipeError(
                f"{recipe.name}: a source given by {kind} cannot be made by model_quantize; wanted bits or a scheme"
            )
    used = set(assignment.values())
    encoders = {key: encoder_of(spec) for key, spec in specs.items() if key in used}
    if not encoders:
        raise RecipeError(f"{recipe.name}: quantizes nothing; give -b, a `base:` or a line that names a module")
    return MixEncoder(out.name, encoders, assignment), head in assignment


def _summary(report: QuantizeReport) -> str:
    rows = []
    for variant, directory in zip(report.variants, report.directories, strict=True):
        made = [module for module in variant.modules if module.quantized]
        rows.append(
            (
                directory,
                format_bpw(variant.bpw),
                format_bpw(variant.head_bpw),
                format_bytes(variant.size_bytes),
                str(len(made)),
                f"{_mean([module.relative_error for module in made]):.4f}",
                f"{_mean([module.sqnr_db for module in made if module.sqnr_db is not None]):.2f}",
                f"{_mean([m.output_error for m in made if m.output_error is not None]):.5f}",
            )
        )
    header = ("variant", "bpw", "head", "size", "modules", "rel. error", "SQNR dB", "output error")
    text = format_columns(rows, header, range(1, 8))
    kept: list[ModuleReport] = [module for module in report.variants[0].modules if not module.quantized]
    for module in kept[:10]:
        text += f"\nkept dense: {module.module}: {module.note}"
    if len(kept) > 10:
        text += f"\n... and {len(kept) - 10} more; all in quantize_report.json"
    return text


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
