"""The fork's types whose codes stand for several weights: random bytes that its own decoder has decoded."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from recompile.errors import FormatError
from recompile.formats import ik_codebooks
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_types import find_type

VECTORS = Path(__file__).parents[1] / "vectors" / "ik_codebooks.npz"
TYPES = tuple(ik_codebooks.TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_decoding_is_bit_exact(name: str) -> None:
    with np.load(VECTORS) as file:
        packed, decoded = file[f"{name}_packed"], file[f"{name}_decoded"]
    assert packed.shape[1] == find_type(name).row_bytes(decoded.shape[1]) == ik_codebooks.TYPES[name].row_bytes(512)
    for data in (packed, packed.tobytes(), torch.from_numpy(packed)):
        found = ik_codebooks.dequantize(name, data, decoded.shape)
        assert np.array_equal(found.numpy().view(np.int32), decoded.view(np.int32))
    found = dequantize_rows(name, torch.from_numpy(packed).flatten(), decoded.shape[1])
    assert np.array_equal(found.numpy().view(np.int32), decoded.view(np.int32))


@pytest.mark.parametrize("name", TYPES)
def test_many_rows_decode_as_one_row_does(name: str) -> None:
    """More rows than one chunk of weights holds."""
    row_bytes = ik_codebooks.TYPES[name].row_bytes(256)
    packed = torch.randint(0, 256, (600, row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    packed[:, : ik_codebooks.TYPES[name].head_bytes] = 60  # a finite d
    whole = ik_codebooks.dequantize(name, packed, (600, 256))
    for row in (0, 511, 512, 599):
        assert torch.equal(ik_codebooks.dequantize(name, packed[row], (1, 256))[0], whole[row])


def test_a_trellis_worked_by_hand() -> None:
    """IQ2_KT: d = 2, level code 8 (1) in the first scale block, code 5: x begins at 5 + 4096."""
    row = torch.zeros(4 + 68, dtype=torch.uint8)
    row[:4] = torch.tensor([2.0]).view(torch.uint8)
    row[4], row[8] = 8, 5
    found = ik_codebooks.dequantize("IQ2_KT", row, (1, 256))[0]
    x = 5 + 4096
    for weight in found[:8].tolist():
        x = x * 0xCBAC1FED % 2**32
        assert weight == 2.0 * (sum(byte & 63 for byte in x.to_bytes(4, "little")) - 126)


def test_wrong_sizes_say_what_was_found_and_wanted() -> None:
    with pytest.raises(FormatError, match="found 100 columns; wanted a multiple of 256"):
        ik_codebooks.dequantize("IQ2_KL", b"", (0, 100))
    with pytest.raises(FormatError, match=re.escape("IQ4_KT: found 5 bytes; wanted 132, 1 rows of 132 bytes")):
        ik_codebooks.dequantize("IQ4_KT", bytes(5), (1, 256))
    with pytest.raises(FormatError, match="found 'IQ9_KT'; wanted one of IQ2_KL"):
        ik_codebooks.dequantize("IQ9_KT", b"", (0, 256))
