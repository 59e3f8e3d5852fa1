"""Codes of GGUF types: every one can be put, decodes to level * scale + offset, and leaves the scales alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_codes import LAYOUTS, grid_of, put_levels
from recompile.formats.gguf_types import TYPES
from recompile.quantize.movable_gguf import FIELDS

COLUMNS = 512


@pytest.mark.parametrize("name", LAYOUTS)
def test_levels_that_are_put_decode_to_their_grid(name: str) -> None:
    kind, layout = TYPES[name], LAYOUTS[name]
    noise = np.random.default_rng(kind.type_id)
    packed = torch.from_numpy(noise.integers(0, 256, (6, kind.row_bytes(COLUMNS)), dtype=np.uint8))
    for place in FIELDS[name]:
        value = torch.from_numpy(noise.uniform(-0.1, 0.1, place.read(kind, packed).shape))
        place.write(kind, packed, value.to(place.dtype))
    grid = grid_of(kind, packed, COLUMNS)
    assert grid.scale.shape == grid.offset.shape == (6, COLUMNS // layout.group)
    values = torch.tensor(layout.values or range(layout.low, layout.high + 1), dtype=torch.float32)
    levels = values[torch.from_numpy(noise.integers(0, len(values), (6, COLUMNS)))]
    made = put_levels(kind, packed, levels)
    group = torch.arange(COLUMNS) // layout.group
    wanted = levels * grid.scale[:, group] + grid.offset[:, group]
    torch.testing.assert_close(dequantize_rows(kind, made, COLUMNS), wanted, rtol=1e-5, atol=1e-6)
    again = grid_of(kind, made, COLUMNS)
    assert torch.equal(again.scale, grid.scale)
    assert torch.equal(again.offset, grid.offset)
    for place in FIELDS[name]:
        assert torch.equal(place.read(kind, made), place.read(kind, packed))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_levels_of_a_file_give_its_bytes_again(name: str) -> None:
    """Whatever the bytes are: the nearest level to what they decode to is the one they hold."""
    kind, layout = TYPES[name], LAYOUTS[name]
    noise = np.random.default_rng(7)
    packed = torch.from_numpy(noise.integers(0, 256, (4, kind.row_bytes(COLUMNS)), dtype=np.uint8))
    for place in FIELDS[name]:
        place.write(kind, packed, torch.full_like(place.read(kind, packed), 0.0625))
    grid = grid_of(kind, packed, COLUMNS)
    group = torch.arange(COLUMNS) // layout.group
    dense = dequantize_rows(kind, packed, COLUMNS)
    used = grid.scale[:, group] != 0
    at = torch.where(used, (dense - grid.offset[:, group]) / grid.scale[:, group], torch.zeros(()))
    values = torch.tensor(layout.values or range(layout.low, layout.high + 1), dtype=torch.float32)
    levels = values[(at[..., None] - values).abs().argmin(-1)]
    made = put_levels(kind, packed, levels)
    same = dequantize_rows(kind, made, COLUMNS)
    assert torch.equal(same[used], dense[used])
    if bool(used.all()):
        assert torch.equal(made, packed)
