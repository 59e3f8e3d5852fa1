"""What a JSON report must have where a page, a card or a picture reads it: numbers where numbers are drawn.

Only what is shown is looked at, and what is missing is left to who reads it: other versions write more or less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from recompile.io.schema import describe


class Whole(dict[str, Any]):
    """The shape of an object that has all of these keys."""


NUMBER, TEXT = "a number", "a text"  # or null: not measured, of no error
SIZE, KL = "a number of 0 or more", "a KL"  # as NUMBER; rounding takes a KL of 0 a little below
LEAST_KL = -1e-3
MEAN = Whole(mean=NUMBER, std_error=SIZE)
MEAN_KL = Whole(mean=KL, std_error=SIZE)
_OF_ROWS = Whole(name=TEXT, rows=NUMBER, tokens=NUMBER, kl=MEAN_KL, same_top=MEAN)
_QUANTILES = dict.fromkeys(("median", "p90", "p99", "p999", "max"), NUMBER)
_BIN = Whole.fromkeys(("low", "high", "share", "tokens", "kl_mean", "kl_median"), NUMBER)
REPORT: Mapping[str, Any] = {
    "rows": NUMBER,
    "row_tokens": NUMBER,
    "kl": MEAN_KL,
    "kl_rows": [KL],
    "kl_quantiles": _QUANTILES,
    "kl_by_confidence": [_BIN],
    "kl_histogram": Whole(edges_log10=[NUMBER], below=NUMBER, counts=[NUMBER], above=NUMBER),
    "noise_floor": NUMBER,
    "score_candidate": {"perplexity": SIZE},
    "score_reference": {"perplexity": SIZE},
    "top_k_agreement": [MEAN],
    "delta_p": {"rms": MEAN},
    "sure_flips": {"share": MEAN},
    "layers": [{"name": TEXT, "drift": dict.fromkeys(("relative_error", "sqnr_db", "cosine_error"), NUMBER)}],
    "by_origin": [_OF_ROWS],
    "by_position": [_OF_ROWS],
    "divergence": {"prompts": NUMBER, "new_tokens": NUMBER, "median": NUMBER, "survival": [[NUMBER]]},
    "size": dict.fromkeys(("bpw", "total_bytes", "head_bpw", "embedding_bpw"), NUMBER),
    "cache": {"name": TEXT},
    "cache_sweep": [
        {
            "cache": {
                "name": TEXT,
                "engine": TEXT,
                "key_bits": NUMBER,
                "value_bits": NUMBER,
                "bytes_per_token": NUMBER,
            },
            "kl": MEAN_KL,
            "difference": MEAN,
            "kl_quantiles": _QUANTILES,
            "same_top": MEAN,
        }
    ],
    "attribution": {
        "level": TEXT,
        "total": MEAN,
        "total_noise": MEAN,
        "groups": [{"group": TEXT, "bits_per_weight": NUMBER, "relative_error": NUMBER, "kl": MEAN, "noise": MEAN}],
    },
    "candidate": TEXT,
    "candidate_dir": TEXT,
    "recipe": TEXT,
    "recipe_name": TEXT,
    "rows_source": TEXT,
    "rows_sha256": TEXT,
    "rows_role": TEXT,
    "positions": TEXT,
}


def check_shape(value: Any, shape: Any, place: str) -> None:
    """Raise ValueError naming the place of what is of another type, or a number that is not finite.

    shape: NUMBER, TEXT, [shape of every item], or {key: shape}, of which any may be missing"""
    if value is None:
        return
    if isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{place}: {describe(value)}, wanted an object")
        for key, inner in shape.items():
            if isinstance(shape, Whole) and key not in value:
                raise ValueError(f"{place} has no {key}")
            if isinstance(shape, Whole) and isinstance(inner, Mapping) and value[key] is None:
                raise ValueError(f"{place}.{key}: null, wanted an object")
            if key in value:
                check_shape(value[key], inner, f"{place}.{key}" if place else key)
    elif isinstance(shape, Sequence) and not isinstance(shape, str):
        if not isinstance(value, list):
            raise ValueError(f"{place}: {describe(value)}, wanted a list")
        for number, item in enumerate(value):
            if item is None and isinstance(shape[0], Mapping):
                raise ValueError(f"{place}[{number}]: null, wanted an object")
            check_shape(item, shape[0], f"{place}[{number}]")
    elif shape == TEXT:
        if not isinstance(value, str):
            raise ValueError(f"{place}: {describe(value)}, wanted a text")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{place}: {describe(value)}, wanted a finite number")
    elif value < {SIZE: 0.0, KL: LEAST_KL}.get(str(shape), -math.inf):
        raise ValueError(f"{place}: {describe(value)}, wanted {shape}")
