"""Predicted times: against what was measured, and by hand."""

from __future__ import annotations

import pytest

from recompile import planning
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.planning import Sizes, forward_seconds, making_seconds, memory_bytes, sketch_seconds

GEMMA = Sizes(body=100_270_080, head=167_772_160, hidden=640, layers=18, cubes=299_460_722_688)  # 262,144 tokens
INTEGERS = "compressed-tensors"


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)


def test_a_sketch_of_a_model_with_a_large_head_is_predicted() -> None:
    """Gemma 3 270M, integers of 2 to 6 bits, 4 rows x 256 tokens, 8 draws: 112 seconds of a core that multiplies at 81
    GFLOP/s, 11 of them in the head, and 25 for the inputs' weights before."""
    making = making_seconds(GEMMA, INTEGERS)
    assert sketch_seconds(GEMMA, 1024, 8, 5, making, 0, 81e9) == pytest.approx(112, rel=0.3)
    assert forward_seconds(GEMMA, 16 * 512, 81e9, head=False) == pytest.approx(25, rel=0.3)


def test_what_a_sketch_costs_by_hand() -> None:
    sizes = Sizes(body=1000, head=100, hidden=10, layers=2, cubes=0)
    of_body, of_head = 1.2 * 2 * 1000 * 7 / 1e3, 1.5 * 2 * 100 * 7 / 1e3
    found = sketch_seconds(sizes, 7, 12, 3, 0.5, 0, 1e3)  # two sweeps, of 8 and of 4 samples
    assert found == pytest.approx((2 * (2 + 3) + 12) * of_body + 2 * (3 * 0.5 + 2 * of_head))
    with_heads = sketch_seconds(sizes, 7, 12, 3, 0.5, 3, 1e3)
    assert with_heads - found == pytest.approx(2 * 3 * 3 * of_head)


def test_the_numbers_that_are_written_twice_agree() -> None:
    from eval import heal
    from eval.passes import adjoint
    from eval.profile import sketch
    from recompile.quantize import candidates

    assert planning.SWEEP_SAMPLES == sketch.SWEEP_SAMPLES
    assert planning.JUDGED_BY_HEAL == heal.RUNS_BEFORE + heal.RUNS_OF_VERDICT + 1  # and a look
    assert planning.LOGIT_CHUNK_TOKENS == adjoint.LOGIT_CHUNK_TOKENS
    assert planning.IMPORTANCE_LENGTH == candidates.CALIBRATION_LENGTH


def test_types_of_other_engines_take_what_their_encoders_take() -> None:
    assert making_seconds(GEMMA, "gguf") == pytest.approx(0.16 * 100.27008)
    assert making_seconds(GEMMA, MLX) == making_seconds(GEMMA, INTEGERS) == pytest.approx(0.11 * 100.27008)


def test_the_logits_of_a_large_vocabulary_are_counted() -> None:
    small = Sizes(GEMMA.body, GEMMA.head // 8, GEMMA.hidden, GEMMA.layers, GEMMA.cubes)
    more = memory_bytes(GEMMA, 4096) - memory_bytes(small, 4096)
    assert more == 4 * (2 * (GEMMA.head - small.head) + 5 * 256 * (262_144 - 32_768))
