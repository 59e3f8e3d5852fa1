"""The base-logits file and the statistics of llama-perplexity: by hand, and against what the real tool wrote.

tests/vectors/llama_kl was made with llama.cpp build 9371's llama-perplexity on two tiny random models (65 tokens, BOS
added, 6 chunks of 64): its base file, what it printed, and the logits that the same libllama gave for both models.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from eval.engines.base_logits import BaseLogitsWriter, counted, decode, encode, open_base_logits, record_codes
from eval.engines.llama_kl import CHUNK_HEADER, Tally, chunk_line, format_statistics
from recompile.errors import CheckpointError

VECTORS = Path(__file__).parent.parent / "vectors" / "llama_kl"


def logits(name: str) -> NDArray[np.float32]:
    with np.load(VECTORS / "logits.npz") as stored:
        values: NDArray[np.float32] = stored[name]
    return values


def test_a_record_by_hand() -> None:
    """Logits 0, -1, -20 with 16 nats: the last is clipped to -16, so scale = 16 / 65535."""
    (record,) = encode(np.array([[0.0, -1.0, -20.0]], np.float32), 16.0)
    assert len(record) == record_codes(3) == 2 * 2 + 4
    scale, lowest = np.ascontiguousarray(record[:4]).view(np.float32)
    log_total = math.log(1 + math.exp(-1) + math.exp(-20))
    assert scale == pytest.approx(16 / 65535, rel=1e-7)
    assert lowest == pytest.approx(-16 - log_total, rel=1e-7)
    assert record[4:].tolist() == [65535, round(65535 * 15 / 16), 0, 0]  # the last pads to an even number
    decoded = decode(record[None], 3)[0]
    assert decoded == pytest.approx([-log_total, -1 - log_total, -16 - log_total], abs=2 * float(scale))


def test_equal_logits_have_no_scale() -> None:
    (record,) = encode(np.full((1, 4), 2.5, np.float32), 16.0)
    assert record[4:].tolist() == [0, 0, 0, 0]
    assert decode(record[None], 4)[0] == pytest.approx([-math.log(4)] * 4)


def test_counted_positions() -> None:
    assert counted(512) == (256, 511)  # 255 of them
    assert counted(5) == (2, 4)


def test_the_real_tools_file_to_the_last_byte(tmp_path: Path) -> None:
    base = open_base_logits(VECTORS / "base.dat")
    assert (base.n_ctx, base.n_vocab, base.chunks) == (64, 65, 6)
    assert int(base.tokens[0, 0]) == 1  # BOS stands once, where the text begins
    assert not (base.tokens[1:, 0] == 1).any()
    with BaseLogitsWriter(tmp_path / "again.dat", base.tokens, base.n_vocab) as writer:
        for chunk in logits("base_logits"):
            writer.append(encode(chunk, 16.0))
    assert (tmp_path / "again.dat").read_bytes() == (VECTORS / "base.dat").read_bytes()


def test_every_line_that_the_real_tool_printed() -> None:
    base = open_base_logits(VECTORS / "base.dat")
    first, last = counted(base.n_ctx)
    tally, lines = Tally(), [CHUNK_HEADER]
    for chunk, candidate in enumerate(logits("candidate_logits")):
        tally.add(candidate, base.records(chunk), base.tokens[chunk, first + 1 : last + 1])
        lines.append(chunk_line(chunk + 1, tally.statistics()))
    printed = "\n".join([*lines, "", format_statistics(tally.statistics())])
    assert printed.splitlines() == (VECTORS / "printed.txt").read_text().rstrip("\n").splitlines()


def test_statistics_by_hand() -> None:
    """Two positions of two tokens: p = (3/4, 1/4) against q = (1/2, 1/2), and p = q."""
    p = np.log(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32))
    q = np.zeros((2, 2), np.float32)
    tally = Tally()
    tally.add(q, encode(p, 16.0), np.array([0, 1], np.int32))
    s = tally.statistics()
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert s.tokens == 2
    assert s.kl.value == pytest.approx(kl / 2, abs=1e-6)
    assert (s.kl_max, s.kl_min) == (pytest.approx(kl, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert s.delta_p.value == pytest.approx((0.5 - 0.75) / 2, abs=1e-6)
    assert s.delta_p_rms.value == pytest.approx(0.25 / math.sqrt(2), abs=1e-6)
    assert s.perplexity.value == pytest.approx(2, abs=1e-6)
    assert s.perplexity_base.value == pytest.approx(math.exp(-(math.log(0.75) + math.log(0.5)) / 2), abs=1e-5)
    assert s.same_top.value == 1.0


def test_blocks_of_a_tally_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base_logits(VECTORS / "base.dat")
    first, last = counted(base.n_ctx)
    found = []
    for block_bytes in (1 << 23, 4 * 65 * 7):
        monkeypatch.setattr("eval.engines.llama_kl.BLOCK_BYTES", block_bytes)
        tally = Tally()
        tally.add(logits("candidate_logits")[0], base.records(0), base.tokens[0, first + 1 : last + 1])
        found.append(tally.statistics())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"_logitz_" + data[8:], "does not begin with _logits_"),
        (lambda data: data[:19], "does not begin with _logits_"),
        (lambda data: data[:-1], "it was cut off"),
        (lambda data: data[:8] + struct.pack("<Iii", 64, -1, 6) + data[20:], "n_vocab -1"),
        (lambda data: data[:8] + struct.pack("<Iii", 64, 65, 1 << 30) + data[20:], "chunks"),
        (lambda data: data[:20] + struct.pack("<i", 65) + data[24:], "its tokens run from"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object, says: str) -> None:
    path = tmp_path / "base.dat"
    assert callable(damage)
    path.write_bytes(damage((VECTORS / "base.dat").read_bytes()))
    with pytest.raises(CheckpointError, match=says):
        open_base_logits(path)


def test_a_failed_run_leaves_no_file(tmp_path: Path) -> None:
    base = open_base_logits(VECTORS / "base.dat")
    with pytest.raises(ZeroDivisionError), BaseLogitsWriter(tmp_path / "b.dat", base.tokens, base.n_vocab):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
