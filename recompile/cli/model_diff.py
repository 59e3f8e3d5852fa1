"""model_diff: compare two models, or a model with a recipe applied, without writing anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from recompile.cli.common import Screen, check_json_path, command, print_json
from recompile.cli.options import device_options, engine_options, output_options, text_options
from recompile.errors import UnsupportedError
from recompile.io.report import format_columns
from recompile.io.sizes import format_bpw, format_bytes
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import check_vocabulary, read_rows

if TYPE_CHECKING:
    import torch

    from eval.diff import DiffReport
    from recompile.merge.overlay import Overlay


@command(
    "model_diff",
    outputs={
        "--json": "json_path",
        "--save-input-ids": "save_input_ids",
        "--save-logits-a": "save_logits_a",
        "--save-logits-b": "save_logits_b",
    },
    inputs=("model_a", "model_b", "override", "text", "input_ids"),
)
@click.option("-ma", "--model-a", "--model_a", required=True, help="Model A, the candidate (a quantized build).")
@click.option("-mb", "--model-b", "--model_b", help="Model B, the reference (the unquantized base).")
@click.option("-or", "--override", type=click.Path(path_type=Path), help="Recipe (YAML) to apply to model A in memory.")
@text_options(rows=10, length=2048)
@click.option(
    "-kb",
    "--keep-b",
    "--keep_b",
    default=0,
    show_default=True,
    help="Keep B's state after the first N stages (embedding first).",
)
@click.option("-tkm", "--topk-max", "--topk_max", default=5, show_default=True, help="Largest K of the top-K figures.")
@click.option("-bsz", "--batch-size", "--batch_size", type=int, help="Rows a batch; default about 2048 tokens.")
@click.option(
    "-gp",
    "--gen-prompt",
    "--gen_prompt",
    is_flag=True,
    help="Put the chat template's generation prompt before every row.",
)
@click.option(
    "-si",
    "--save-input-ids",
    "--save_input_ids",
    type=click.Path(path_type=Path),
    help="Save the token rows (safetensors, input_ids).",
)
@click.option(
    "-sla",
    "--save-logits-a",
    "--save_logits_a",
    type=click.Path(path_type=Path),
    help="Save A's logits (safetensors, logits, float32 [rows, tokens, vocab]).",
)
@click.option("-slb", "--save-logits-b", "--save_logits_b", type=click.Path(path_type=Path), help="Save B's logits.")
@click.option("--allow-unmatched", is_flag=True, help="Go on where a key of the recipe matches no tensor.")
@click.option(
    "--activations",
    is_flag=True,
    help="Also measure A with the inputs of its linear maps quantized as its schemes say (w8a8, fp8-dynamic ...).",
)
@engine_options
@device_options
@output_options
@click.pass_context
def main(
    ctx: click.Context,
    model_a: str,
    model_b: str | None,
    override: Path | None,
    rows: int,
    length: int,
    text: Path | None,
    dataset: str | None,
    input_ids: Path | None,
    keep_b: int,
    topk_max: int,
    batch_size: int | None,
    gen_prompt: bool,
    save_input_ids: Path | None,
    save_logits_a: Path | None,
    save_logits_b: Path | None,
    allow_unmatched: bool,
    activations: bool,
    engine: str | None,
    engine_lib: Path | None,
    llama_chunks: int | None,
    base_logits: Path | None,
    save_base_logits: Path | None,
    no_torch: bool,
    threads: int | None,
    device: str,
    dtype: str | None,
    json_path: Path | None,
    quiet: bool,
) -> None:
    """How far model A's predictions are from model B's.

    Both are streamed layer by layer, so a model larger than memory can be compared. KL is KL(B || A), in nats a token.

    \b
    Examples:
      model_diff -ma 3bpw -mb base -r 10
      model_diff -ma 3bpw -mb base -or overrides.yaml -r 10 --json diff.json
      model_diff --engine llama.cpp -ma Q4_K_M.gguf -mb BF16.gguf --llama-chunks 20
    """
    check_json_path(json_path)
    if engine is not None:
        _check_engine_use(ctx)
        from recompile.cli import engine_diff

        run = engine_diff.EngineRun(
            engine=engine,
            library=engine_lib,
            candidate=model_a,
            reference=model_b,
            chunks=llama_chunks,
            n_ctx=length if _given(ctx, "length") else engine_diff.DEFAULT_N_CTX,
            text=text,
            dataset=dataset,
            input_ids=input_ids,
            base_logits=base_logits,
            save_base_logits=save_base_logits,
            with_torch=not no_torch,
            threads=threads,
            device=device,
            dtype=dtype,
        )
        engine_diff.show(run, json_path, quiet)
        return
    for name in ENGINE_ONLY:
        if _given(ctx, name):
            raise click.UsageError(f"{_flag(ctx, name)} goes with --engine")
    if model_b is None:
        raise click.UsageError("-mb is needed: model B, the reference")
    from recompile.checkpoint.checkpoint import open_checkpoint
    from recompile.merge.overlay import build_overlay, check_same_model

    checkpoint_a, checkpoint_b = open_checkpoint(model_a), open_checkpoint(model_b)
    overlay = build_overlay(checkpoint_a, override, allow_unmatched=allow_unmatched)
    from recompile.merge.explain import reached_aside

    for warning in [*overlay.warnings, *reached_aside(overlay)]:
        click.echo(f"Warning: {warning}", err=True)
    check_same_model(checkpoint_b, checkpoint_a)

    from eval.diff import DiffOptions, measure_many
    from recompile.model import tokens

    if activations:
        from recompile.model.activations import quantizes_inputs

        if not quantizes_inputs(overlay):
            raise UnsupportedError(
                f"--activations: no module of {overlay.label} says how its inputs are quantized (input_activations in "
                f"config.json); leave it out, or use a variant such as w8a8, fp8-dynamic or nvfp4-a4"
            )

    found, vocab = read_rows(
        [checkpoint_b.path, checkpoint_a.path], "report", rows, length, text, dataset, input_ids, split_own_text=False
    )
    vocab = check_vocabulary(checkpoint_b, vocab)
    ids = found.ids
    if gen_prompt:
        ids = _with_chat_prompt(ids, tokens.load_tokenizer(checkpoint_b.path))
    if save_input_ids is not None:
        tokens.save_rows(found, save_input_ids)
    options = DiffOptions(
        batch=batch_size,
        top_k=topk_max,
        keep_reference=keep_b,
        dtype=compute_dtype(dtype),
        device=compute_device(device),
        vocab=vocab,
        quantized_inputs=frozenset({1} if activations else ()),
        save_candidate_logits=save_logits_a,
        save_reference_logits=save_logits_b,
    )
    candidates = [overlay] * (2 if activations else 1)
    with Screen(quiet) as screen:
        report, *others = measure_many(
            candidates, checkpoint_b, ids, options, screen, rows_source=found.source, rows_sha256=found.sha256
        )
    with_inputs: DiffReport | None = others[0] if others else None
    if str(json_path) != "-":
        click.echo(_layer_table(report))
        click.echo(_summary(report, overlay))
        if with_inputs is not None:
            click.echo(_with_inputs(report, with_inputs))
    if json_path is not None:
        more = {"with_activations": with_inputs.as_dict()} if with_inputs is not None else {}
        from recompile.merge.left_dense import left_dense

        size = {**overlay.accounting.as_dict(), "left_dense": left_dense(overlay).as_dict()}
        print_json(json_path, {**report.as_dict(), "size": size, **_origin(overlay, override), **more})


def _origin(overlay: Overlay, override: Path | None) -> dict[str, str | None]:
    """What A was made of, so that a report can be set beside the profile that predicted it."""
    text = override.read_text(encoding="utf-8") if override is not None else None
    return {"candidate_dir": overlay.base.label, "recipe_name": override.name if override else None, "recipe": text}


# What only the real engine takes, and what it cannot take.
ENGINE_ONLY = ("engine_lib", "llama_chunks", "base_logits", "save_base_logits", "no_torch", "threads")
NOT_WITH_ENGINE = (
    "override",
    "rows",
    "keep_b",
    "topk_max",
    "batch_size",
    "gen_prompt",
    "save_input_ids",
    "save_logits_a",
    "save_logits_b",
    "allow_unmatched",
    "activations",
)


def _given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _flag(ctx: click.Context, name: str) -> str:
    return next(max(option.opts, key=len) for option in ctx.command.params if option.name == name)


def _check_engine_use(ctx: click.Context) -> None:
    wrong = [_flag(ctx, name) for name in NOT_WITH_ENGINE if _given(ctx, name)]
    if wrong:
        raise click.UsageError(
            f"{', '.join(wrong)}: not with --engine, which runs finished GGUF files in chunks (--llama-chunks, -l)"
        )


def _with_chat_prompt(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    import torch

    from recompile.errors import RecompileError

    if not getattr(tokenizer, "chat_template", None):
        raise RecompileError("--gen-prompt: the tokenizer has no chat template")
    messages = [{"role": "user", "content": "Say something."}]
    prefix = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return torch.cat([torch.tensor([prefix], dtype=ids.dtype).expand(len(ids), -1), ids], 1)


def _layer_table(report: DiffReport) -> str:
    kept = {layer.name: f"{100 * layer.same_experts.mean:.2f} %" for layer in report.routing}
    rows = [
        (
            layer.name,
            f"{layer.drift.relative_error:.6f}",
            f"{layer.drift.max_difference:.6f}",
            f"{layer.drift.sqnr_db:.2f}",
            f"{layer.drift.cosine_error:.6f}",
            *([kept.get(layer.name, "")] if kept else []),
        )
        for layer in report.layers
    ]
    header = ("state after", "rel. error", "max diff/norm", "SQNR dB", "cosine error", "same experts")
    return format_columns(rows, header[: len(rows[0])], tuple(range(1, len(rows[0]))))


def _routing(report: DiffReport) -> list[str]:
    """What A's errors do to the choice of experts; nothing for a model without them."""
    if not report.routing:
        return []
    mean = sum(layer.same_experts.mean for layer in report.routing) / len(report.routing)
    worst = min(report.routing, key=lambda layer: layer.same_experts.mean)
    unused, experts = sum(layer.unused for layer in report.routing), sum(layer.experts for layer in report.routing)
    fullest = max(max(layer.load) * layer.experts / max(1, sum(layer.load)) for layer in report.routing)
    return [
        f"Routing: {100 * mean:.2f} % of tokens keep all {worst.chosen} of their experts (mean of "
        f"{len(report.routing)} layers), fewest after {worst.name}: {100 * worst.same_experts.mean:.2f} %"
        f"{_error(100 * worst.same_experts.std_error if worst.same_experts.std_error is not None else None, 2)}",
        f"Expert load in B: {unused} of {experts} experts saw no token, the fullest {fullest:.1f} times its share",
    ]


def _summary(report: DiffReport, overlay: Overlay) -> str:
    from recompile.merge.left_dense import left_dense

    size = overlay.accounting
    a, b = report.score_candidate, report.score_reference
    lines = [
        "",
        f"A (candidate): {report.candidate}",
        f"B (reference): {report.reference}",
        f"A's size:      {format_bpw(size.bpw)} bpw over quantized modules, head {format_bpw(size.head_bpw)}, "
        f"embedding {format_bpw(size.embedding_bpw)}, {format_bytes(size.total_bytes)} in all",
        f"               {left_dense(overlay)}",
        f"Measured on:   {report.rows} rows x {report.row_tokens} tokens ({report.tokens} tokens counted, "
        f"{report.unlabelled_tokens} of them, the last of each row, not in perplexity), {report.rows_source}, "
        f"{report.dtype} on {report.device}",
        "",
        f"A perplexity: {a.perplexity:.8f}" + _error(a.perplexity_std_error),
        f"B perplexity: {b.perplexity:.8f}" + _error(b.perplexity_std_error),
        "",
    ]
    table = [
        (f"K = {k}", f"{hit_a:.4f}", f"{hit_b:.4f}", f"{agree.mean:.4f}" + _error(agree.std_error, 4))
        for k, (hit_a, hit_b, agree) in enumerate(
            zip(a.label_in_top_k, b.label_in_top_k, report.top_k_agreement, strict=True), 1
        )
    ]
    header = ("", "label in A's top K", "label in B's top K", "same top K in A and B")
    lines += [format_columns(table, header, (1, 2, 3)), ""]
    q = report.kl_quantiles
    lines += [
        f"KL(B || A), the candidate measured by the reference: {report.kl.mean:.8f}{_error(report.kl.std_error)} nats",
        f"KL(A || B), the other way round:                     {report.kl_reverse.mean:.8f}"
        f"{_error(report.kl_reverse.std_error)} nats",
        f"KL(B || A) per token: median {q.median:.6f}, p90 {q.p90:.6f}, p99 {q.p99:.6f}, max {q.max:.6f}",
        f"Noise floor: {report.noise_floor:.2e} nats (B against itself, run in another shape)",
    ]
    lines += _routing(report)
    if report.identical:
        lines.append("Every logit of A equals B's to the last bit.")
    bins = [
        (
            f"{bin.low:.2f} - {bin.high:.2f}",
            f"{100 * bin.share:.1f} %",
            f"{bin.kl_mean:.6f}" if bin.tokens else "-",
            f"{bin.kl_median:.6f}" if bin.tokens else "-",
        )
        for bin in report.kl_by_confidence
    ]
    lines += ["", format_columns(bins, ("B's top probability", "of tokens", "mean KL", "median KL"), (1, 2, 3))]
    return "\n".join(lines)


def _with_inputs(report: DiffReport, with_inputs: DiffReport) -> str:
    lines = [
        "",
        f"Weights alone:             KL(B || A) {report.kl.mean:.8f}{_error(report.kl.std_error)} nats (as above)",
        f"Inputs quantized as well:  KL(B || A) {with_inputs.kl.mean:.8f}{_error(with_inputs.kl.std_error)} nats, "
        f"perplexity {with_inputs.score_candidate.perplexity:.6f}, "
        f"same top token {100 * with_inputs.top_k_agreement[0].mean:.1f} %",
    ]
    return "\n".join(lines)


def _error(std_error: float | None, digits: int = 8) -> str:
    return f" ± {std_error:.{digits}f}" if std_error is not None else ""
