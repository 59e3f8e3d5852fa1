"""Caches as engines store them: by hand, against ggml's own encoders, and what users may ask for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recompile.errors import ArgumentError, FormatError, UnsupportedError
from recompile.formats.cache_types import EXLLAMA, IK, LLAMA, CacheFormat, parse_cache, parse_sweep
from recompile.formats.exl3 import hadamard
from recompile.formats.gguf_decode import IQ4_VALUES
from recompile.formats.kv_cache import rotation, store, store_latent


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def keys_of(x: Tensor, cache: str) -> Tensor:
    return store(x, x, parse_cache(cache))[0]


def values_of(x: Tensor, cache: str) -> Tensor:
    return store(x, x, parse_cache(cache))[1]


# ---- exllamav3 -------------------------------------------------------------------------------------------------------


def test_a_group_of_ones_in_two_bits_by_hand() -> None:
    """Rotated it is (s, 0, 0 ...) with s = sqrt(32): codes 3 and 2 of the steps [-1, -.5, 0, .5, 1] stand for .75 s and
    .25 s; back, the first value is (.75 + 31 * .25) and every other .75 - .25."""
    found = keys_of(torch.ones(1, 32), "2")
    wanted = torch.full((1, 32), 0.5)
    wanted[0, 0] = 8.5
    assert torch.allclose(found, wanted, atol=4e-3)  # scale and result are float16


@pytest.mark.parametrize("bits", range(2, 9))
def test_rotated_values_are_middles_of_equal_steps_of_a_float16_scale(bits: int) -> None:
    x = heads(40, 64)
    turned = (keys_of(x, str(bits)).unflatten(-1, (-1, 32)) @ hadamard(32, x.device)).flatten(0, 1)
    before = (x.half().float().unflatten(-1, (-1, 32)) @ hadamard(32, x.device)).flatten(0, 1)
    scale = before.abs().amax(1, keepdim=True).half().float()
    steps = turned / scale * (1 << (bits - 1)) - 0.5  # whole numbers
    assert float((steps - steps.round()).abs().max()) < 0.01 * (1 << bits) / 4
    assert float(((turned - before).abs() / scale).max()) < 1.02 / (1 << bits) + 2e-3, "half a step at most"


def test_keys_and_values_have_bits_of_their_own() -> None:
    x = heads(3, 2, 5, 64)
    keys, values = store(x, x, parse_cache("8,3"))
    assert torch.equal(keys, keys_of(x, "8"))
    assert torch.equal(values, keys_of(x, "3"))
    assert (keys - x).norm() < 0.1 * (values - x).norm()


def test_latents_are_quantized_and_their_rotary_part_is_not() -> None:
    latent, rotary = heads(2, 1, 5, 64), heads(2, 1, 5, 16)
    stored, kept = store_latent(latent, rotary, parse_cache("4,2"))
    assert torch.equal(stored, keys_of(latent, "4"))
    assert torch.equal(kept, rotary.half().float())
    with pytest.raises(UnsupportedError, match=r"stores latents \(MLA\)"):
        store_latent(latent, rotary, parse_cache("q8_0"))


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_without_a_rotation_rows_are_those_of_ggml(kind: str) -> None:
    libgguf = pytest.importorskip("libgguf")
    from recompile.formats.gguf import dequantize_rows
    from recompile.formats.gguf_types import TYPES

    x = heads(6, 96)
    packed = torch.from_numpy(libgguf.quantize_rows(x.numpy(), TYPES[kind.upper()].type_id, None))
    wanted = dequantize_rows(kind.upper(), packed, 96)
    assert torch.equal(keys_of(x, f"ik:{kind}"), wanted)
    assert torch.equal(values_of(x, kind), wanted), "heads of 96 are not rotated by llama.cpp either"


def test_iq4_nl_is_what_a_plain_loop_makes() -> None:
    """Codes nearest to x * -127 / (largest), then the scale that fits them best with x squared as weights."""
    x = heads(3, 64)
    wanted = []
    for block in x.reshape(-1, 32).double().tolist():
        scale = max(block, key=abs) / IQ4_VALUES[0]
        codes = [min(IQ4_VALUES, key=lambda code, v=value: abs(code - v / scale)) for value in block]
        above = sum(v * v * c * v for c, v in zip(codes, block, strict=True))
        below = sum(v * v * c * c for c, v in zip(codes, block, strict=True))
        wanted += [code * float(torch.tensor(above / below).half()) for code in codes]
    assert torch.allclose(keys_of(x, "ik:iq4_nl").flatten(), torch.tensor(wanted), atol=2e-3)
    assert not keys_of(torch.zeros(1, 32), "ik:iq4_nl").any()


def test_what_llama_cpp_rotates() -> None:
    assert [rotation(head, True) for head in (32, 64, 80, 96, 128, 192, 256)] == [None, 64, None, None, 128, 64, 256]
    assert [rotation(head, False) for head in (32, 64, 128, 192)] == [None, 64, 64, 64]
    ones = torch.ones(1, 128)
    pytest.importorskip("libgguf")
    # rotated there is one number that is not zero, which 4 bits hold exactly
    assert torch.allclose(keys_of(ones, "q4_0"), ones, atol=1e-3)
    spike = torch.zeros(1, 64)
    spike[0, 5] = 7.0  # without the rotation the one that is exact
    assert torch.allclose(keys_of(spike, "ik:q8_0"), spike, atol=1e-2)
    assert (values_of(spike, "q4_0") - spike).abs().max() > 0.05


def test_interleaved_keys_are_stored_pair_by_pair() -> None:
    pytest.importorskip("libgguf")
    x = heads(4, 64)
    order = torch.tensor([half * 32 + i for i in range(32) for half in (0, 1)])
    keys, values = store(x, x, parse_cache("ik:q4_0"), interleaved=True)
    assert torch.equal(keys[:, order], keys_of(x[:, order], "ik:q4_0"))
    assert not torch.equal(keys, values)
    assert torch.equal(values, values_of(x, "ik:q4_0"))
    assert torch.equal(store(x, x, parse_cache("4"), interleaved=True)[0], keys_of(x, "4")), "llama.cpp's alone"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_and_dtypes(dtype: torch.dtype) -> None:
    pytest.importorskip("libgguf")
    x = heads(2, 3, 4, 64).to(dtype)
    assert torch.equal(keys_of(x, "f16"), x.half().to(dtype))
    assert torch.equal(values_of(x, "f32,bf16"), x.bfloat16().to(dtype))
    for cache in ("4", "q4_0", "ik:iq4_nl"):
        for made in store(x, x, parse_cache(cache)):
            assert (made.dtype, made.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("cache", ["4", "q4_0", "ik:q8_0"])
def test_heads_of_other_sizes_are_refused(cache: str) -> None:
    with pytest.raises(FormatError, match="heads have 16 values"):
        keys_of(heads(2, 16), cache)
    assert keys_of(heads(2, 16), "f16").shape == (2, 16)


# ---- what users write ------------------------------------------------------------------------------------------------


def test_names_bits_and_flags() -> None:
    for text, wanted, bits, flags in (
        ("8", CacheFormat(EXLLAMA, "8", "8"), (8.5, 8.5), "-cq 8"),
        (" 8,6 ", CacheFormat(EXLLAMA, "8", "6"), (8.5, 6.5), "-cq 8,6"),
        ("Q8_0, q4_0", CacheFormat(LLAMA, "q8_0", "q4_0"), (8.5, 4.5), "-ctk q8_0 -ctv q4_0 -fa on"),
        ("ik:q5_1", CacheFormat(IK, "q5_1", "q5_1"), (6.0, 6.0), "-ctk q5_1 -ctv q5_1 -fa on"),
        ("q4_0,f16", CacheFormat(LLAMA, "q4_0", "f16"), (4.5, 16.0), "-ctk q4_0 -ctv f16"),
    ):
        found = parse_cache(text)
        assert found == wanted
        assert (found.key_bits, found.value_bits) == bits
        assert found.flags == flags
        assert parse_cache(found.name) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q8", r'stores a cache as "q8"; did you mean q8_0\?; wanted bits from 2 to 8'),
        ("9", 'as "9"; wanted'),
        ("", 'as ""; wanted'),
        ("8,q4_0", "mixes types of two engines"),
        ("ik:4", "mixes types of two engines"),
        ("vllm:8", "the only engine to be named is ik"),
    ],
)
def test_other_names_are_refused(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_cache(text)


def test_a_sweep_has_every_cache_once() -> None:
    assert [cache.name for cache in parse_sweep(["8", "q8_0", "8", "exllamav3"])] == [
        *("8", "q8_0", "7", "6", "5", "4", "3", "2")
    ]
    assert "q8_0,q4_0" in [cache.name for cache in parse_sweep(["llama.cpp"])]
    assert math.isclose(parse_sweep(["3"])[0].key_bits, 3.5)
