"""Finished builds of one model compared with the reference and with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from eval.diff import DiffOptions, measure_many
from eval.metrics import paired_difference
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.events import OnEvent, ignore
from recompile.merge.overlay import account, quantizable
from recompile.model.devices import compute_device
from recompile.model.rows import RowOptions
from recompile.model.used_rows import check_apart, recorded_rows


def compare_builds(
    reference: Checkpoint,
    mix: Checkpoint,
    baselines: Sequence[Checkpoint],
    rows: RowOptions,
    device: str = "cpu",
    on_event: OnEvent = ignore,
    role: str = "report",
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The mix and other builds against the reference on rows of a role, paired by row; as JSON values: what
    is told of them, and everything that was measured of each, as `model_diff --json` has it.

    rows: which ones. Raises MismatchError where a build was made of one of them.
    """
    found, vocab = rows.read([reference.path, mix.path], role)
    found = found.by_length()
    builds = [mix, *baselines]
    check_apart(found, role, recorded_rows(build.path for build in builds), on_event)
    options = DiffOptions(device=compute_device(device), vocab=vocab).over(found)
    reports = measure_many(
        builds,
        reference,
        found.ids,
        options,
        on_event,
        "verifying" if role == "report" else "comparing",
        rows_source=found.source,
        rows_sha256=found.sha256,
    )
    counted = quantizable(builds)
    told, whole = [], []
    for build, report in zip(builds, reports, strict=True):
        sizes = account(build.modules.values(), counted)
        entry: dict[str, Any] = {
            "build": build.label,
            "bpw": sizes.bpw,
            "total_bytes": sizes.total_bytes,
            "kl_nats": report.kl.mean,
            "kl_std_error": report.kl.std_error,
            "perplexity": report.score_candidate.perplexity,
        }
        if build is not mix:
            mean, interval = paired_difference(torch.tensor(reports[0].kl_rows), torch.tensor(report.kl_rows))
            entry |= {"mix_minus_this_nats": mean.mean, "interval_95": list(interval)}
        told.append(entry)
        whole.append({**report.as_dict(), "size": sizes.as_dict(), "candidate_dir": build.label})
    return {
        "builds": told,
        "reference_perplexity": reports[0].score_reference.perplexity,
        "rows": len(found.ids),
        "row_tokens": found.ids.shape[1],
        "rows_sha256": found.sha256,
        "rows_source": found.source,
        "rows_role": found.role,
        "positions": found.positions,
    }, whole
