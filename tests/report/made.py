"""Made-up profiles and reports of the shapes that the tests need; no model is run."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recompile.costs import Candidate, Measurement, ProfileGroup, ProfileHeader, open_journal
from recompile.recipe.recipe import SourceId


def write_profile(
    path: Path,
    layers: int = 6,
    experts: int = 0,
    ids: Sequence[SourceId] = (3, 2, 4, 6),
    rows: int = 5,
    prefix: str = "model.layers",
    dirs: Mapping[SourceId, str] | None = None,
    fused: bool = True,
    specs: bool = False,
) -> Path:
    """A profile whose costs fall with bits, as real ones do; ids are widths or names (then 2, 3, 4... bits)."""
    rng = random.Random(f"{layers} {experts} {ids} {prefix}")
    candidates = tuple(Candidate(one, (dirs or {}).get(one, f"./{one}bpw"), f"print-{one}") for one in ids)
    if specs:  # made on the fly
        candidates = tuple(Candidate(one, f"bits: {one}", f"print-{one}", {"bits": one}) for one in ids)
    width = {c.label: float(c.id) if isinstance(c.id, (int, float)) else 2.0 + n for n, c in enumerate(candidates)}
    groups, found = [], [Measurement(None, None, (0.0,) * rows)]
    for layer in range(layers):
        parts = [(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 96), (("self_attn.o_proj",), 64)]
        for place in [f"mlp.experts.{n}" for n in range(experts)] or ["mlp"]:
            parts += [((f"{place}.gate_proj", f"{place}.up_proj"), 128), ((f"{place}.down_proj",), 64)]
        if not fused:
            parts = [((module,), size // len(modules)) for modules, size in parts for module in modules]
        for modules, size in parts:
            names = tuple(f"{prefix}.{layer}.{module}" for module in modules)
            joined = "+".join(module.rpartition(".")[2] for module in modules)
            name = names[0] if len(names) == 1 else f"{names[0].rpartition('.')[0]}.{joined}"
            bits = {label: round(1000 * size * (bpw + 0.25)) for label, bpw in width.items()}
            groups.append(ProfileGroup(name, names, 1000 * size, bits, layer))
            scale = rng.lognormvariate(-6, 1)
            for label, bpw in width.items():
                cost = scale * 4.0 ** (2 - bpw)
                found.append(Measurement(name, label, tuple(cost * rng.uniform(0.6, 1.4) for _ in range(rows))))
    header = ProfileHeader(
        method="exact",
        context="clean",
        level="fused" if fused else "tensor",
        reference="./base",
        reference_fingerprint="print-base",
        base=candidates[0].label,
        candidates=candidates,
        groups=tuple(groups),
        fixed_bits=0,
        fixed_weights=0,
        other_bits=8_000_000,
        other_weights=500_000,
        rows=rows,
        row_tokens=64,
        rows_sha256="ab" * 32,
        rows_source="made up",
        dtype="float32",
        device="cpu",
        versions={"recompile": "0"},
    )
    with open_journal(path, header) as journal:
        for start in range(0, len(found), 1000):  # one append joins its lines one by one: keep each short
            journal.append(found[start : start + 1000])
    return path


def write_diff(path: Path, directory: str, kl: float, recipe: str | None = None, **more: Any) -> Path:
    """A report as `model_diff --json` writes it."""
    counts = [0] * 50
    counts[25:30] = [20, 40, 60, 30, 10]
    score = {"perplexity": 13.5, "perplexity_std_error": 0.2, "nll": {"mean": 2.6, "std_error": 0.01}}
    stage = {"relative_error": 0.1, "max_difference": 0.2, "sqnr_db": 20.0, "cosine_error": 0.005}
    edges = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
    content = {
        "candidate": directory if recipe is None else f"{directory} + mix.yaml",
        "candidate_dir": directory,
        "recipe": recipe,
        "recipe_name": None if recipe is None else "mix.yaml",
        "rows": 8,
        "row_tokens": 64,
        "rows_source": "made up",
        "rows_sha256": "cd" * 32,
        "kl": {"mean": kl, "std_error": kl / 20},
        "kl_quantiles": {"median": kl / 3, "p90": 2 * kl, "p99": 6 * kl, "max": 20 * kl},
        "kl_histogram": {"edges_log10": [-8.0, 2.0], "below": 5, "counts": counts, "above": 0},
        "kl_by_confidence": [
            {"low": low, "high": high, "share": 1 / 6, "tokens": 80, "kl_mean": kl * (1 - low / 2), "kl_median": kl / 3}
            for low, high in itertools.pairwise(edges)
        ],
        "score_candidate": {**score, "label_in_top_k": [0.5]},
        "top_k_agreement": [{"mean": 0.8, "std_error": 0.01}],
        "layers": [{"name": f"model.layers.{n}", "index": n, "total": 4, "drift": stage} for n in range(4)],
        "size": {"bpw": 3.25, "total_bytes": 9_000_000},
        **more,
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def details(kl: float) -> dict[str, Any]:
    """What a report holds where more was asked for: slices, greedy runs, a sweep of caches, an attribution."""

    def mean(value: float) -> dict[str, float]:
        return {"mean": value, "std_error": value / 10}

    def parts(*names: str) -> list[dict[str, Any]]:
        return [
            {"name": name, "rows": 4, "tokens": 256, "kl": mean(kl * (n + 1)), "same_top": mean(0.8)}
            for n, name in enumerate(names)
        ]

    def cache(name: str, bits: float) -> dict[str, Any]:
        used = {"name": name, "engine": "llama.cpp", "key_bits": bits, "value_bits": bits, "bytes_per_token": 64 * bits}
        return {
            "cache": used, "kl": mean(kl + 1 / 2**bits), "kl_quantiles": {"p99": 1.0}, "same_top": mean(0.8),
            "difference": mean(1 / 2**bits),
        }  # fmt: skip

    groups = [
        {
            "group": f"model.layers.{layer}.{name}", "bits_per_weight": 3.25, "relative_error": 0.2,
            "kl": mean(kl / (2 + layer)), "noise": mean(kl / (1 + layer)),
        }
        for layer in range(4)
        for name in ("self_attn.q_proj+k_proj+v_proj", "mlp.down_proj")
    ]  # fmt: skip
    return {
        "by_origin": parts("wiki", "code", "tool calls"),
        "by_position": parts("0 - 512", "512 - 2048"),
        "divergence": {
            "prompts": 8, "new_tokens": 32, "median": None, "survival": [[1, 1.0], [8, 0.75], [32, 0.625]],
        },
        "cache_sweep": [cache("q8_0", 8.5), cache("q4_0", 4.5), cache("f16", 16.0)],
        "attribution": {"level": "fused", "groups": groups, "total": mean(2 * kl), "total_noise": mean(3 * kl)},
    }  # fmt: skip
