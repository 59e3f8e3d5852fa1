"""Encoding GGUF types: ggml's own bytes, errors in bounds, fallbacks reported, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recompile.errors import FormatError, UnsupportedError
from recompile.formats import gguf_encode, ik
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_encode import ENCODABLE, NEEDS_IMPORTANCE, encode, quantize_rows, resolve
from recompile.formats.gguf_types import TYPES

libgguf = pytest.importorskip("libgguf")
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"}  # seconds of tables on first use
QUICK = sorted(ENCODABLE - SLOW - set(ik.TYPES))

# Relative RMSE on few gaussian rows with importance of ones, a little above what ggml's encoders reach (the ik quants
# format spec gives IQ4_XS 0.0756, Q4_K 0.0707, Q3_K 0.1446, Q2_K 0.2679).
BARS = {
    "F32": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 0.006, "Q6_K": 0.02, "Q6_0": 0.024, "Q5_K": 0.037, "Q5_1": 0.045,
    "Q5_0": 0.048, "Q4_K": 0.072, "Q4_1": 0.09, "Q4_0": 0.095, "IQ4_NL": 0.08, "IQ4_XS": 0.077, "MXFP4": 0.13,
    "NVFP4": 0.11, "Q3_K": 0.15, "IQ3_S": 0.14, "IQ3_XXS": 0.19, "Q2_K": 0.275, "TQ1_0": 1.0, "TQ2_0": 1.0, "Q1_0": 0.7,
    "IQ2_KL": 0.235, "IQ1_KT": 0.385, "IQ2_KT": 0.3, "IQ3_KT": 0.16, "IQ4_KT": 0.095,
}  # fmt: skip


def gaussian(rows: int = 8, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed))


def relative_error(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).norm() / want.norm())


@pytest.mark.parametrize("kind", QUICK)
def test_errors_are_within_what_the_type_can_do(kind: str) -> None:
    weight = gaussian()
    made = encode(kind, weight, torch.ones(512))
    assert made.kind is TYPES[kind]
    assert made.bits == 8 * 8 * TYPES[kind].row_bytes(512)
    assert relative_error(made.dense, weight) <= BARS[kind]


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "Q6_K", "IQ4_NL", "Q4_0"])
def test_bytes_are_ggmls(kind: str) -> None:
    weight, importance = gaussian(), torch.rand(512, generator=torch.Generator().manual_seed(1)) + 0.1
    for counts in (None, importance):
        want = libgguf.quantize_rows(weight.numpy(), TYPES[kind].type_id, None if counts is None else counts.numpy())
        assert np.array_equal(quantize_rows(kind, weight, counts).numpy().ravel(), np.asarray(want).ravel())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    want = quantize_rows("Q4_K", gaussian())
    monkeypatch.setattr(gguf_encode, "CHUNK_WEIGHTS", 1500)
    assert torch.equal(quantize_rows("Q4_K", gaussian()), want)


def test_importance_moves_the_error_where_it_counts_less() -> None:
    weight, importance = gaussian(64), torch.ones(512)
    importance[::4] = 100
    for kind in ("Q4_K", "IQ4_NL", "Q6_0"):
        plain, weighted = encode(kind, weight, torch.ones(512)).dense, encode(kind, weight, importance).dense
        assert relative_error(weighted[:, ::4], weight[:, ::4]) < relative_error(plain[:, ::4], weight[:, ::4])


def test_what_a_tensor_really_gets() -> None:
    """The spec's table, for rows of 576 = 18 * 32, and of 48."""
    asked = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q3_K": "Q4_0", "IQ3_S": "IQ4_NL", "IQ4_KSS": "IQ4_NL"}
    assert {kind: resolve(kind, 576).name for kind in asked} == asked
    assert resolve("Q4_K", 512).name == "Q4_K"
    assert resolve("Q4_K", 48).name == resolve("Q4_0", 48).name == "F16"
    assert encode("Q4_K", gaussian(2, 576)).kind.name == "Q5_0"


def test_q6_0_of_zeros_and_of_one_huge_weight() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 5] = -1000
    dense = encode("Q6_0", weight).dense
    assert torch.equal(dense[0], torch.zeros(64))
    assert abs(float(dense[1, 5]) + 1000) < 2
    assert float(dense[1, :5].abs().max()) == 0


def test_the_types_of_the_fork() -> None:
    weight = gaussian(4)
    made = encode("iq4_ks", weight, torch.ones(512))
    assert torch.equal(made.data, ik.quantize("IQ4_KS", weight, torch.ones(512)))
    assert torch.equal(made.dense, dequantize_rows("IQ4_KS", made.data, 512))


def test_bad_input_is_told() -> None:
    weight = gaussian(2)
    for kind in sorted(NEEDS_IMPORTANCE):
        with pytest.raises(FormatError, match="cannot be encoded without importance"):
            quantize_rows(kind, weight)
    with pytest.raises(FormatError, match="wanted one value for each of 512"):
        quantize_rows("Q4_K", weight, torch.ones(3))
    with pytest.raises(FormatError, match="negative or all zero"):
        quantize_rows("Q4_K", weight, torch.zeros(512))
    with pytest.raises(FormatError, match="NaN or infinite"):
        quantize_rows("Q4_K", weight.index_fill(1, torch.tensor([3]), torch.nan))
    with pytest.raises(FormatError, match="multiples of 256"):
        quantize_rows("Q4_K", gaussian(2, 96))
    with pytest.raises(UnsupportedError, match="has no encoder here"):
        quantize_rows("Q8_KV", weight)
