"""EXL3 decoding against golden vectors, the spot tables of the format spec, and every broken part we could think of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats import exl3

VECTORS = Path(__file__).parents[1] / "vectors"
LINEARS = sorted(path.stem for path in VECTORS.glob("exl3_k*.safetensors"))
EMBEDDINGS = sorted(path.stem for path in VECTORS.glob("exl3_embed_*.safetensors"))
PARTS = {"trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "bias", "signs"}
CPU = torch.device("cpu")
MCG, MUL1 = -877912083, -2082680531  # the markers as they are stored, int32

TOLERANCE = 2e-6  # of the largest weight: what the spec allows a float32 decoder against a float64 one


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(parts, what they should decode to) of one vector file."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    return {k: v for k, v in tensors.items() if k in PARTS}, {k: v for k, v in tensors.items() if k not in PARTS}


def linear(bits: float = 4, rows: int = 128, columns: int = 256, marker: str | None = "mul1") -> dict[str, Tensor]:
    """Random but legal parts of a linear, in = rows, out = columns."""
    generator = torch.Generator().manual_seed(7)
    shape = (rows // 16, columns // 16, int(16 * bits))
    parts = {
        "trellis": torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16),
        "suh": torch.randn(rows, generator=generator).half(),
        "svh": torch.randn(columns, generator=generator).half(),
    }
    if marker:
        parts[marker] = torch.tensor({"mcg": MCG, "mul1": MUL1}[marker], dtype=torch.int32)
    return parts


def embedding(bits: int = 3, vocab: int = 5, groups: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    records = torch.randint(-(1 << 15), 1 << 15, (vocab, groups, 1 + 16 * bits), generator=generator).to(torch.int16)
    records[..., 0] = torch.rand(vocab, groups, generator=generator).half().view(torch.int16)
    signs = torch.randint(0, 2, (groups, 256), generator=generator) * 2.0 - 1
    return {"trellis": records.view(vocab, -1), "signs": signs.half()}


# ---- golden vectors --------------------------------------------------------------------------------------------------


def test_the_vectors_cover_every_k_and_codebook() -> None:
    assert len(LINEARS) == 29
    assert len(EMBEDDINGS) == 3
    for bits in range(1, 9):
        for codebook in ("3inst", "mcg", "mul1"):
            assert any(f"_k{bits}_{codebook}_" in name for name in LINEARS)


@pytest.mark.parametrize("name", LINEARS)
def test_linear_vector(name: str) -> None:
    parts, expected = read(name)
    found = exl3.dequantize(parts)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    wanted = expected["expected"].t()
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())
    assert torch.equal(exl3.inner(parts).view(torch.int16), expected["inner"].view(torch.int16))
    if "states" in expected:
        assert torch.equal(exl3.codes(parts["trellis"]), expected["states"].int() & 0xFFFF)


@pytest.mark.parametrize("name", LINEARS)
def test_packing_the_states_gives_the_stored_bytes(name: str) -> None:
    trellis = read(name)[0]["trellis"]
    assert torch.equal(exl3.pack_states(exl3.codes(trellis), exl3.bits_of(trellis)), trellis)


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embedding_vector(name: str) -> None:
    parts, expected = read(name)
    wanted = expected["expected"]
    found = exl3.dequantize(parts)
    assert found.shape == (wanted.shape[0], parts["signs"].numel())
    atol = TOLERANCE * wanted.abs().max().item()
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=0, atol=atol)
    assert torch.equal(found, exl3.dequantize_embedding(parts))


def test_an_embedding_read_in_small_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = embedding(vocab=7)
    whole = exl3.dequantize(parts)
    monkeypatch.setattr(exl3, "_EMBEDDING_CHUNK", 3 * 512)
    torch.testing.assert_close(exl3.dequantize(parts), whole, rtol=0, atol=TOLERANCE * whole.abs().max().item())


def test_a_wide_linear_read_in_column_bands_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = linear(3, 256, 384)
    whole = exl3.dequantize(parts)
    monkeypatch.setattr(exl3, "_BAND_COLUMNS", 256)
    torch.testing.assert_close(exl3.dequantize(parts), whole, rtol=0, atol=TOLERANCE * whole.abs().max().item())


# ---- the spec's tables, worked by hand -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "first", "at_100", "last"),
    [
        (1, "4e05 9c0a 3814 7029", "1b8a", "d381 a702"),
        (2, "29ca a729 9ca7 729e", "9823", "629c 8a72"),
        (2.5, "f0aa 8553 154f aa78", "9a70", "2f85 7c2a"),
        (3, "6f14 78a7 c53c 29e3", "5f0a", "2dbc 6de2"),
        (4, "1529 529e 29e3 9e37", "35fd", "9515 5152"),
        (5, "9853 0a78 4f1b e370", "5314", "c9a6 34c2"),
        (8, "129e 9e37 3700 0000", "5084", "49df df12"),
    ],
)
def test_states_of_the_worked_tile(bits: float, first: str, at_100: str, last: str) -> None:
    words = (torch.arange(int(16 * bits)) * 0x9E37) & 0xFFFF
    trellis = torch.where(words >= 0x8000, words - 0x10000, words).to(torch.int16).view(1, 1, -1)
    states = [f"{state:04x}" for state in exl3.codes(trellis).flatten().tolist()]
    assert states[:4] == first.split()
    assert states[100] == at_100
    assert states[254:] == last.split()


@pytest.mark.parametrize(
    ("codebook", "halves", "mean", "std", "low", "high"),
    [
        ("3inst", "3a25 bb5b 3b74 c066 b7f8 b110", 0.0002, 1.2437, -3.957, 3.973),
        ("mcg", "3f60 304e ba13 3e0f b915 3acd", 0.0000, 1.2441, -3.949, 3.949),
        ("mul1", "c2e8 3921 b72d b89e baf2 b936", -0.0019, 1.0003, -3.453, 3.348),
    ],
)
def test_codebook_spot_values(codebook: str, halves: str, mean: float, std: float, low: float, high: float) -> None:
    table = exl3.codebook_table(codebook, CPU)
    spots = table[torch.tensor([0x0000, 0x0001, 0x0002, 0x1234, 0x8000, 0xFFFF])].view(torch.int16).tolist()
    assert [f"{half & 0xFFFF:04x}" for half in spots] == halves.split()
    values = table.double()
    found = [values.mean().item(), values.std(correction=0).item(), values.min().item(), values.max().item()]
    assert found == pytest.approx([mean, std, low, high], abs=5e-4)  # the table gives three to four places


def test_stream_order_first_and_last() -> None:
    order = exl3.stream_order(CPU)
    places = [(place // 16, place % 16) for place in order.tolist()]
    first = [(0, 0), (1, 0), (8, 0), (9, 0), (0, 8), (1, 8), (8, 8), (9, 8), (2, 0), (3, 0), (10, 0), (11, 0), (2, 8)]
    assert places[:13] == first
    assert places[255] == (15, 15)
    assert sorted(order.tolist()) == list(range(256))
    matrix = torch.arange(32 * 48).view(32, 48)
    assert exl3.matrix_to_tiles(matrix)[1, 2, 2].item() == matrix[16 + 8, 32].item()
    assert torch.equal(exl3.tiles_to_matrix(exl3.matrix_to_tiles(matrix)), matrix)


def test_hadamard_is_sylvester_and_its_own_inverse() -> None:
    matrix = exl3.hadamard(128, CPU).double()
    assert (matrix[3, 5] > 0, matrix[3, 1] > 0, matrix[0, 0] > 0) == (False, False, True)  # popcounts 1, 1, 0
    torch.testing.assert_close(matrix @ matrix, torch.eye(128).double(), rtol=0, atol=1e-6)


def test_legacy_sign_bit_0_belongs_to_channel_0_and_means_minus() -> None:
    parts = linear(2, 128, 128)
    plain = exl3.dequantize({**parts, "suh": torch.ones(128).half(), "svh": torch.ones(128).half()})
    su, sv = torch.zeros(8, dtype=torch.int16), torch.zeros(8, dtype=torch.int16)
    su[0], sv[1] = 1, -(1 << 15)  # input channel 0 and output channel 31
    legacy = {name: part for name, part in parts.items() if name not in ("suh", "svh")} | {"su": su, "sv": sv}
    wanted = plain.clone()
    wanted[:, 0] *= -1
    wanted[31] *= -1
    assert torch.equal(exl3.dequantize(legacy), wanted)
    mixed = {name: part for name, part in parts.items() if name != "suh"} | {"su": su}
    torch.testing.assert_close(exl3.dequantize(mixed)[:, 0], -plain[:, 0] * parts["svh"].float())


def test_names_of_k_and_codebook() -> None:
    assert [exl3.bits_of(torch.zeros(8, 8, int(16 * bits))) for bits in exl3.BITS] == list(exl3.BITS)
    assert isinstance(exl3.bits_of(torch.zeros(8, 8, 64)), int)
    assert [exl3.codebook_of(linear(marker=marker)) for marker in (None, "mcg", "mul1")] == ["3inst", "mcg", "mul1"]
    with pytest.raises(FormatError, match="trellis"):
        exl3.bits_of(torch.zeros(8, 8, 72))
    with pytest.raises(FormatError, match="both markers"):
        exl3.codebook_of(linear() | {"mcg": torch.tensor(MCG)})


def test_layout_in_memory_does_not_matter() -> None:
    parts = linear()
    turned = {**parts, "trellis": parts["trellis"].permute(2, 0, 1).contiguous().permute(1, 2, 0)}
    assert not turned["trellis"].is_contiguous()
    assert torch.equal(exl3.dequantize(turned), exl3.dequantize(parts))


def test_cached_tables_made_in_inference_mode_serve_outside() -> None:
    for cached in (exl3.codebook_table, exl3.hadamard, exl3.stream_order):
        cached.cache_clear()
    with torch.inference_mode():
        exl3.dequantize(linear())
    assert not exl3.hadamard(128, CPU).is_inference()
    assert not exl3.codebook_table("mul1", CPU).is_inference()


@pytest.mark.parametrize("bits", exl3.BITS)
def test_states_that_do_not_overlap_are_not_packed(bits: float) -> None:
    states = exl3.codes(linear(bits)["trellis"])
    states[3, 4, 200] ^= 0x8000  # the oldest bit: no new one at any K
    with pytest.raises(AssertionError, match="overlap"):
        exl3.pack_states(states, bits)


# ---- broken parts ----------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor]], object]

BROKEN_LINEARS: dict[str, tuple[str, Change]] = {
    "no trellis": ("trellis", lambda p: p.pop("trellis")),
    "no suh": ("suh", lambda p: p.pop("suh")),
    "no svh": ("svh", lambda p: p.pop("svh")),
    "uint8 trellis": ("trellis", lambda p: p.update(trellis=p["trellis"].to(torch.uint8))),
    "int32 trellis": ("trellis", lambda p: p.update(trellis=p["trellis"].int())),
    "bf16 trellis": ("trellis", lambda p: p.update(trellis=p["trellis"].bfloat16())),
    "rank 1": ("trellis", lambda p: p.update(trellis=p["trellis"].flatten())),
    "rank 4": ("trellis", lambda p: p.update(trellis=p["trellis"][None])),
    "empty": ("trellis", lambda p: p.update(trellis=p["trellis"][:, :0])),
    "K 4.5": ("trellis", lambda p: p.update(trellis=torch.zeros(8, 16, 72, dtype=torch.int16))),
    "K 0.5": ("trellis", lambda p: p.update(trellis=p["trellis"][..., :8])),
    "K 9": ("trellis", lambda p: p.update(trellis=torch.zeros(8, 16, 144, dtype=torch.int16))),
    "last dimension 65": ("trellis", lambda p: p.update(trellis=torch.zeros(8, 16, 65, dtype=torch.int16))),
    "half K with 3inst": ("trellis", lambda p: (p.update(trellis=p["trellis"][..., :40]), p.pop("mul1"))),
    "in not of 128": ("trellis", lambda p: p.update(trellis=p["trellis"][:7])),
    "out not of 128": ("trellis", lambda p: p.update(trellis=p["trellis"][:, :12])),
    "both markers": ("mcg", lambda p: p.update(mcg=torch.tensor(MCG, dtype=torch.int32))),
    "marker of the other codebook": ("mul1", lambda p: p.update(mul1=torch.tensor(MCG, dtype=torch.int32))),
    "marker as int64": ("mul1", lambda p: p.update(mul1=torch.tensor(MUL1))),
    "marker as a vector": ("mul1", lambda p: p.update(mul1=torch.tensor([MUL1, MUL1], dtype=torch.int32))),
    "empty marker": ("mul1", lambda p: p.update(mul1=torch.zeros(0, dtype=torch.int32))),
    "bf16 suh": ("suh", lambda p: p.update(suh=p["suh"].bfloat16())),
    "float32 svh": ("svh", lambda p: p.update(svh=p["svh"].float())),
    "suh of the out side": ("suh", lambda p: p.update(suh=p["svh"])),
    "suh of rank 2": ("suh", lambda p: p.update(suh=p["suh"][None])),
    "nan in suh": ("suh", lambda p: p["suh"].__setitem__(5, float("nan"))),
    "inf in svh": ("svh", lambda p: p["svh"].__setitem__(5, float("inf"))),
    "suh and su": ("su", lambda p: p.update(su=torch.zeros(8, dtype=torch.int16))),
    "svh and sv": ("sv", lambda p: p.update(sv=torch.zeros(16, dtype=torch.int16))),
    "short su": ("su", lambda p: (p.pop("suh"), p.update(su=torch.zeros(7, dtype=torch.int16)))),
    "float su": ("su", lambda p: (p.pop("suh"), p.update(su=torch.zeros(8)))),
    "bf16 bias": ("bias", lambda p: p.update(bias=torch.zeros(256, dtype=torch.bfloat16))),
    "short bias": ("bias", lambda p: p.update(bias=torch.zeros(200, dtype=torch.float16))),
    "a dense weight too": ("weight", lambda p: p.update(weight=torch.zeros(256, 128))),
    "signs of an embedding": ("signs", lambda p: p.update(signs=torch.ones(1, 256).half())),
    "another device": ("svh", lambda p: p.update(svh=p["svh"].to("meta"))),
}

BROKEN_EMBEDDINGS: dict[str, tuple[str, Change]] = {
    "no signs": ("signs", lambda p: p.pop("signs")),
    "bf16 signs": ("signs", lambda p: p.update(signs=p["signs"].bfloat16())),
    "short signs": ("signs", lambda p: p.update(signs=p["signs"][:, :128])),
    "no groups": ("signs", lambda p: p.update(signs=p["signs"][:0])),
    "nan signs": ("signs", lambda p: p["signs"].fill_(float("nan"))),
    "one group too few": ("trellis", lambda p: p.update(signs=p["signs"][:1])),
    "words cut off": ("trellis", lambda p: p.update(trellis=p["trellis"][:, :-1])),
    "K 9": ("trellis", lambda p: p.update(trellis=torch.zeros(5, 2 * 145, dtype=torch.int16))),
    "no rows": ("trellis", lambda p: p.update(trellis=p["trellis"][:0])),
    "inf scale": ("trellis", lambda p: p["trellis"].__setitem__((2, 49), 0x7C00)),
    "a marker": ("mul1", lambda p: p.update(mul1=torch.tensor(MUL1, dtype=torch.int32))),
    "suh of a linear": ("suh", lambda p: p.update(suh=torch.ones(5).half())),
}


@pytest.mark.parametrize(("name", "change"), BROKEN_LINEARS.values(), ids=BROKEN_LINEARS)
def test_a_broken_linear_names_module_and_tensor(name: str, change: Change) -> None:
    parts = linear()
    exl3.check_parts("model.q_proj", parts)
    change(parts)
    with pytest.raises(FormatError, match=rf"^model\.q_proj\.{name}: found .*; wanted"):
        exl3.check_parts("model.q_proj", parts)
    with pytest.raises(FormatError, match=rf"^model\.q_proj\.{name}: "):
        exl3.dequantize(parts, module="model.q_proj")


@pytest.mark.parametrize(("name", "change"), BROKEN_EMBEDDINGS.values(), ids=BROKEN_EMBEDDINGS)
def test_a_broken_embedding_names_module_and_tensor(name: str, change: Change) -> None:
    parts = embedding()
    exl3.check_parts("embed_tokens", parts)
    change(parts)
    with pytest.raises(FormatError, match=rf"^embed_tokens\.{name}: found .*; wanted"):
        exl3.dequantize(parts, module="embed_tokens")


@pytest.mark.parametrize("extra", [{}, {"scale": torch.zeros(3)}, {"bias": torch.zeros(256)}])
def test_what_is_tolerated(extra: dict[str, Tensor]) -> None:
    parts = linear()
    wanted = exl3.dequantize(parts)
    parts["mul1"] = parts["mul1"].view(1)  # some tools make a vector of it
    assert torch.equal(exl3.dequantize({**parts, **extra}), wanted)


def test_linear_and_embedding_are_not_mixed_up() -> None:
    with pytest.raises(FormatError, match="rank 3"):
        exl3.dequantize_embedding(linear())
    with pytest.raises(FormatError, match="rank 2"):
        exl3.inner(embedding())


DTYPES = (torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.uint8)
NAMES = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1", "bias", "signs", "weight")
SIZES = st.sampled_from((0, 1, 2, 5, 8, 16, 17, 40, 49, 64, 98, 128, 256))


@st.composite
def damaged(draw: st.DrawFn) -> dict[str, Tensor]:
    """Legal parts with up to three of them dropped, cast, cut, reshaped or replaced by noise."""
    parts = linear(draw(st.sampled_from(exl3.BITS)), 128, 128) if draw(st.booleans()) else embedding()
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(NAMES))
        how = draw(st.sampled_from(("drop", "cast", "cut", "turn", "noise", "bytes")))
        part = parts.get(name)
        if how == "noise" or part is None:
            shape = draw(st.lists(SIZES, max_size=3))
            part = torch.zeros(shape).to(draw(st.sampled_from(DTYPES)))
        elif how == "drop":
            del parts[name]
            continue
        elif how == "cast":
            part = part.to(draw(st.sampled_from(DTYPES)))
        elif how == "cut" and part.ndim:
            axis = draw(st.integers(0, part.ndim - 1))
            part = part.narrow(axis, 0, draw(st.integers(0, part.shape[axis])))
        elif how == "turn":
            part = part.movedim(0, -1) if part.ndim > 1 else part[None]
        elif how == "bytes" and part.numel():
            noise = draw(st.binary(min_size=1, max_size=8))
            part = part.contiguous().clone()
            raw = part.view(-1).view(torch.uint8)
            raw[: len(noise)] = torch.tensor(list(noise), dtype=torch.uint8)[: raw.numel()]
        parts[name] = part
    return parts


@settings(max_examples=300, deadline=None)
@given(damaged())
def test_damaged_parts_decode_to_finite_weights_or_raise_format_error(parts: dict[str, Tensor]) -> None:
    try:
        dense = exl3.dequantize(parts)
    except FormatError as error:
        assert "found" in str(error)  # noqa: PT017 - both outcomes are right
        assert str(error).startswith("tensor.")  # noqa: PT017
        return
    trellis = parts["trellis"]
    if trellis.ndim == 3:
        assert dense.shape == (16 * trellis.shape[1], 16 * trellis.shape[0])
    else:
        assert dense.shape == (len(trellis), parts["signs"].numel())
    assert bool(dense.isfinite().all())
