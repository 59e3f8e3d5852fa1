"""Two models, or one with a recipe applied, compared over rows of tokens: the work of `recompile.diff`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.diff import DiffOptions, DiffReport, measure_many
from recompile.checkpoint.checkpoint import open_checkpoint
from recompile.checkpoint.decoded import base_note
from recompile.checkpoint.tied_head import find_tied_head
from recompile.errors import ArgumentError
from recompile.events import Note, OnEvent, ignore
from recompile.io.files import read_text
from recompile.merge.explain import reached_aside
from recompile.merge.left_dense import left_dense
from recompile.merge.overlay import Overlay, build_overlay, check_same_model
from recompile.model import tokens
from recompile.model.activations import quantizes_inputs
from recompile.model.devices import compute_device, compute_dtype
from recompile.model.rows import RowOptions, check_vocabulary, read_rows


@dataclass(frozen=True)
class DiffRequest:
    """See `recompile.diff` for the meaning of each."""

    recipe: Path | None
    allow_unmatched: bool
    activations: bool
    keep_b: int
    topk_max: int
    batch_size: int | None
    gen_prompt: bool
    save_input_ids: Path | None
    save_logits_a: Path | None
    save_logits_b: Path | None
    where: RowOptions
    device: str
    dtype: str | None


@dataclass(frozen=True)
class ModelDiff:
    """How far a candidate is from a reference, and what the candidate was made of."""

    report: DiffReport
    overlay: Overlay  # the candidate
    recipe_name: str | None
    recipe: str | None  # its text, so that a report can be set beside the profile that predicted it
    with_activations: DiffReport | None  # the same with inputs quantized as the candidate's schemes say

    def as_dict(self) -> dict[str, Any]:
        more = {"with_activations": self.with_activations.as_dict()} if self.with_activations is not None else {}
        return {
            **self.report.as_dict(),
            "size": {**self.overlay.accounting.as_dict(), "left_dense": left_dense(self.overlay).as_dict()},
            "candidate_dir": self.overlay.base.label,
            "recipe_name": self.recipe_name,
            "recipe": self.recipe,
            **more,
        }


def run_diff(candidate: str, reference: str, request: DiffRequest, on_event: OnEvent = ignore) -> ModelDiff:
    """Compare; writes nothing but what `save_...` names. on_event: gets LayerDrift and RowsCompared, too.

    Raises MismatchError for builds of different models, RecipeError, ArgumentError.
    """
    checkpoint_a, checkpoint_b = open_checkpoint(candidate), open_checkpoint(reference)
    if checkpoint_b.is_quantized:
        on_event(Note(base_note(checkpoint_b), "Warning"))
    path = request.recipe
    overlay = build_overlay(checkpoint_a, path, allow_unmatched=request.allow_unmatched)
    for warning in [*overlay.warnings, *reached_aside(overlay)]:
        on_event(Note(warning, "Warning"))
    for checkpoint in {checkpoint_b.path: checkpoint_b, checkpoint_a.path: checkpoint_a}.values():
        tied_head = find_tied_head(checkpoint)
        if tied_head is not None and not tied_head.is_copy:
            on_event(Note(f"{checkpoint.label}: {tied_head}", "Warning"))
    check_same_model(checkpoint_b, checkpoint_a)
    if request.activations and not quantizes_inputs(overlay):
        raise ArgumentError(
            f"{{activations}}: no module of {overlay.label} says how its inputs are quantized (input_activations in "
            f"config.json); leave it out, or use a variant such as w8a8, fp8-dynamic or nvfp4-a4"
        )
    where = request.where
    given = (where.rows, where.length, where.text, where.dataset, where.input_ids)
    rows, vocab = read_rows([checkpoint_b.path, checkpoint_a.path], "report", *given, split_own_text=False)
    vocab = check_vocabulary(checkpoint_b, vocab)
    ids = rows.ids
    if request.gen_prompt:
        prefix = tokens.with_tokenizer(checkpoint_b.path, _chat_prompt)
        ids = torch.cat([torch.tensor([prefix], dtype=ids.dtype).expand(len(ids), -1), ids], 1)
    if request.save_input_ids is not None:
        tokens.save_rows(rows, request.save_input_ids)
    options = DiffOptions(
        batch=request.batch_size,
        top_k=request.topk_max,
        keep_reference=request.keep_b,
        dtype=compute_dtype(request.dtype),
        device=compute_device(request.device),
        vocab=vocab,
        quantized_inputs=frozenset({1} if request.activations else ()),
        save_candidate_logits=request.save_logits_a,
        save_reference_logits=request.save_logits_b,
    )
    candidates = [overlay] * (2 if request.activations else 1)
    report, *others = measure_many(
        candidates, checkpoint_b, ids, options, on_event, rows_source=rows.source, rows_sha256=rows.sha256
    )
    text = read_text(path, kind="recipe") if path is not None else None
    return ModelDiff(report, overlay, path.name if path is not None else None, text, others[0] if others else None)


def _chat_prompt(tokenizer: Any) -> list[int]:
    """Tokens of the chat template up to where the model answers."""
    if not getattr(tokenizer, "chat_template", None):
        raise ArgumentError("{gen_prompt}: the tokenizer has no chat template")
    messages = [{"role": "user", "content": "Say something."}]
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:  # a template's own errors are of any kind
        reason = str(error).strip().split("\n", 1)[0]
        raise ArgumentError(f"{{gen_prompt}}: the chat template fails: {type(error).__name__}: {reason}") from error
    return [int(token) for token in found]
