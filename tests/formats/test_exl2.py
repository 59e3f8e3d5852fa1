"""EXL2 decoding and packing: golden vectors, worked examples of the format spec, round trips and damaged parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats import exl2

VECTORS = Path(__file__).parents[1] / "vectors"
CASES = (
    "b2_g64", "b3_g64", "b4_g128", "b5_g32", "b6_g128", "b8_g32", "mix865432", "mix43_ragged",
    "mix54_identity_bias", "b4_tiny_scales", "mix64_head",
)  # fmt: skip


def load(case: str) -> dict[str, Tensor]:
    return load_file(VECTORS / f"exl2_{case}.safetensors")


def only_parts(vector: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: vector[name] for name in (*exl2.PARTS, "bias") if name in vector}


def bit_pattern(tensor: Tensor) -> Tensor:
    """float16 as int16, so that comparing sees signed zeros and NaN."""
    return tensor.contiguous().view(torch.int16)


def decode_plainly(parts: dict[str, Tensor]) -> np.ndarray:
    """The decoder of section 7, one code row at a time in numpy: float16 [out, in]."""
    words = parts["q_weight"].numpy().view(np.uint32).astype(np.uint64)
    words = np.concatenate([words, np.zeros((1, words.shape[1]), np.uint64)])
    table = parts["q_groups"].numpy().view(np.uint16).reshape(-1, 2).astype(int)
    scales = parts["q_scale"].numpy().view(np.uint32)
    rows = []
    for g, (bits, start) in enumerate(table):
        end = table[g + 1][1] if g + 1 < len(table) else words.shape[0] - 1
        smallest = np.float16(np.float32(parts["q_scale_max"][g].item()) * np.float32(2.0**-8))
        nibbles = np.stack([(scales[g, n >> 3] >> np.uint32(4 * (n & 7))) & 15 for n in range(words.shape[1])])
        step = ((nibbles.astype(np.float32) + 1) ** 2 * np.float32(smallest)).astype(np.float16)
        for i in range((end - start) * 32 // bits):
            bit = int(i * bits)
            low, high = words[start + (bit >> 5)], words[start + (bit >> 5) + 1]
            code = ((low | (high << np.uint64(32))) >> np.uint64(bit & 31)) & np.uint64(2**bits - 1)
            signed = code.astype(np.float32) - 2 ** (bits - 1)
            rows.append((signed * step.astype(np.float32)).astype(np.float16))
    return np.ascontiguousarray(np.stack(rows)[parts["q_invperm"].numpy()].T)


def random_parts(groups: list[tuple[int, int]], out_features: int, seed: int) -> dict[str, Tensor]:
    """Parts with random bits everywhere; the groups may be in any order."""
    generator = torch.Generator().manual_seed(seed)

    def words(*shape: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)

    starts = [0]
    for bits, rows in groups:
        starts.append(starts[-1] + rows * bits // 32)
    table = [value for (bits, _), start in zip(groups, starts, strict=False) for value in (bits, start)]
    in_features = sum(rows for _, rows in groups)
    return {
        "q_weight": words(starts[-1], out_features),
        "q_scale": words(len(groups), out_features // 8),
        "q_scale_max": (torch.rand(len(groups), generator=generator) * 0.02).half(),
        "q_groups": torch.tensor(table).to(torch.int16),
        "q_invperm": torch.randperm(in_features, generator=generator).to(torch.int32),
    }


# ---- golden vectors and worked examples ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_dequantize_matches_the_reference_bit_for_bit(case: str) -> None:
    vector = load(case)
    dense = exl2.dequantize(only_parts(vector))
    assert dense.dtype == torch.float16
    assert dense.is_contiguous()
    assert torch.equal(bit_pattern(dense), bit_pattern(vector["expected"].t()))


@pytest.mark.parametrize("case", CASES)
def test_unpacking_and_packing_give_the_original_bytes(case: str) -> None:
    vector = load(case)
    parts = only_parts(vector)
    exl2.check_parts(case, parts)
    codes, scale_codes = exl2.unpack_codes(parts), exl2.unpack_scale_codes(parts["q_scale"])
    assert torch.equal(codes, vector["codes"])
    assert torch.equal(scale_codes, vector["scale_codes"])

    groups = [(group.bits, group.rows) for group in exl2.group_layout(parts)]
    packed = exl2.pack(
        codes, scale_codes, parts["q_scale_max"], groups, torch.argsort(parts["q_invperm"]), parts.get("bias")
    )
    assert packed.keys() == parts.keys()
    for name, tensor in parts.items():
        assert packed[name].dtype == tensor.dtype, name
        assert packed[name].numpy().tobytes() == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("case", CASES)
def test_storage_bits_are_those_of_the_stored_tensors(case: str) -> None:
    parts = only_parts(load(case))
    groups = [(group.bits, group.rows) for group in exl2.group_layout(parts)]
    stored_bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in parts.values())
    out_features, in_features = parts["q_weight"].shape[1], len(parts["q_invperm"])
    assert exl2.storage_bits(in_features, out_features, groups, has_bias="bias" in parts) == stored_bits
    assert exl2.storage_bits(in_features, out_features - 31, groups, has_bias="bias" in parts) == stored_bits


def test_group_layout_of_a_mixed_tensor() -> None:
    assert exl2.group_layout(load("mix43_ragged")) == (
        exl2.Group(4, 0, 128),
        exl2.Group(3, 16, 128),
        exl2.Group(3, 28, 128),
        exl2.Group(3, 40, 32),
    )


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (2, "e4e4e4e4 e4e4e4e4"),
        (3, "88fac688 c688fac6 fac688fa"),
        (4, "76543210 fedcba98 76543210 fedcba98"),
        (5, "8a418820 c5a92839 ca307b9a 38bdab49 ffbbcdeb"),
        (6, "440c2040 a2481c61 3ce34c2c 544d2450 a6585d65 7de75c6d"),
        (8, "03020100 07060504 0b0a0908 0f0e0d0c 13121110 17161514 1b1a1918 1f1e1d1c"),
    ],
)
def test_worked_words_of_section_4(bits: int, words: str) -> None:
    column = (torch.arange(32) % 2**bits).to(torch.uint8)
    codes = column.unsqueeze(1).repeat(1, 32)  # [in=32, out=32]
    ones = torch.ones(1, 32, dtype=torch.uint8)
    parts = exl2.pack(codes, ones * 16, torch.tensor([1.0]).half(), [(bits, 32)], torch.arange(32))
    for out in (0, 31):
        assert [f"{word & 0xFFFFFFFF:08x}" for word in parts["q_weight"][:, out].tolist()] == words.split()
    # scale code 16 of a maximum of 1 is a step of exactly 1, so the weight is the code less its zero point
    assert exl2.dequantize(parts)[7].tolist() == (column.int() - 2 ** (bits - 1)).tolist()


@pytest.mark.parametrize(
    ("scale_max", "steps"),
    [(0x224C, (0x0326, 0x1CEB, 0x224C)), (0x3400, (0x1400, 0x2E40, 0x3400)), (0x1A25, (0x00C5, 0x14CF, 0x1A28))],
)
def test_scale_table_of_section_5(scale_max: int, steps: tuple[int, int, int]) -> None:
    stored = torch.tensor([scale_max], dtype=torch.int16).view(torch.float16)
    codes = torch.tensor([[1, 10, 16]], dtype=torch.uint8)  # stored nibbles 0, 9 and 15
    assert exl2.stored_scale(codes, stored).view(torch.int16).tolist() == [list(steps)]


def test_column_0_has_the_lowest_scale_nibble() -> None:
    q_scale = torch.tensor([[0x76543210, -1]], dtype=torch.int32)
    assert exl2.unpack_scale_codes(q_scale).tolist() == [[1, 2, 3, 4, 5, 6, 7, 8] + [16] * 8]


# ---- against the plain decoder ---------------------------------------------------------------------------------------

group_lists = st.lists(st.tuples(st.sampled_from(exl2.WIDTHS), st.sampled_from([32, 64, 96])), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(groups=group_lists, out_features=st.sampled_from([32, 64, 96]), seed=st.integers(0, 2**31))
def test_any_layout_decodes_as_the_plain_decoder(groups: list[tuple[int, int]], out_features: int, seed: int) -> None:
    parts = random_parts(groups, out_features, seed)
    dense = exl2.dequantize(parts)
    assert dense.numpy().tobytes() == decode_plainly(parts).tobytes()


@settings(max_examples=40, deadline=None)
@given(groups=group_lists, seed=st.integers(0, 2**31), with_bias=st.booleans())
def test_any_legal_layout_survives_a_round_trip(groups: list[tuple[int, int]], seed: int, with_bias: bool) -> None:
    groups = sorted(groups, reverse=True)
    parts = random_parts(groups, 64, seed)
    if with_bias:
        parts["bias"] = torch.randn(64).half()
    layout = [(group.bits, group.rows) for group in exl2.group_layout(parts)]
    assert layout == groups
    packed = exl2.pack(
        exl2.unpack_codes(parts),
        exl2.unpack_scale_codes(parts["q_scale"]),
        parts["q_scale_max"],
        layout,
        torch.argsort(parts["q_invperm"]),
        parts.get("bias"),
    )
    assert packed.keys() == parts.keys()
    assert all(torch.equal(packed[name], parts[name]) for name in parts)


@pytest.mark.parametrize("budget", [1, 1 << 14, 1 << 30])
def test_decoding_in_blocks_of_columns_changes_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = load("mix865432")
    monkeypatch.setattr(exl2, "_BLOCK_WEIGHTS_CPU", budget)
    assert torch.equal(bit_pattern(exl2.dequantize(only_parts(vector))), bit_pattern(vector["expected"].t()))


def test_strided_parts_decode_as_contiguous_ones() -> None:
    vector = load("mix43_ragged")
    strided = {name: torch.stack([tensor, tensor], dim=-1)[..., 0] for name, tensor in only_parts(vector).items()}
    assert not strided["q_weight"].is_contiguous()
    assert torch.equal(bit_pattern(exl2.dequantize(strided)), bit_pattern(vector["expected"].t()))


def test_a_stored_q_perm_and_the_scheme_are_ignored() -> None:
    parts = only_parts(load("b2_g64"))
    extra = {**parts, "q_perm": torch.zeros(3, dtype=torch.int16)}
    exl2.check_parts("m", extra)
    assert torch.equal(exl2.dequantize(extra, object()), exl2.dequantize(parts))


def test_first_rows_from_32768_are_read_as_uint16() -> None:
    # So many rows need more input channels than the engine takes, so only check_parts may refuse them.
    in_features, out_features = 4 * 32768 + 32, 32
    codes = torch.randint(0, 256, (in_features, out_features), generator=torch.Generator().manual_seed(0)).int()
    quads = codes.view(-1, 4, out_features)
    q_weight = quads[:, 0] | quads[:, 1] << 8 | quads[:, 2] << 16 | quads[:, 3] << 24
    parts = {
        "q_weight": q_weight,
        "q_scale": torch.full((2, 4), -1, dtype=torch.int32),
        "q_scale_max": torch.tensor([1.0, 2.0]).half(),
        "q_groups": torch.tensor([8, 0, 8, -32768], dtype=torch.int16),
        "q_invperm": torch.arange(in_features, dtype=torch.int32),
    }
    assert exl2.group_layout(parts)[1] == exl2.Group(8, 32768, 32)
    step = torch.ones(in_features, 1)
    step[-32:] = 2
    assert torch.equal(exl2.dequantize(parts).float(), ((codes - 128) * step).t())
    with pytest.raises(FormatError, match=r"m\.q_invperm: found 131104 input channels; wanted at most 65536"):
        exl2.check_parts("m", parts)


# ---- damaged parts ---------------------------------------------------------------------------------------------------


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(parts: dict[str, Tensor]) -> None:
        parts[name] = change(parts[name].clone())

    return damage


def with_value(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return replaced(name, change)


# mix54_identity_bias: K = 256, N = 64, groups (5, 0) (4, 10) (4, 18) (4, 26), R = 34
DAMAGES = {
    **{
        f"missing {name}": (
            (lambda parts, name=name: parts.pop(name)),
            rf"m: missing m\.{name}; wanted all of q_weight",
        )
        for name in exl2.PARTS
    },
    **{
        f"{name} dtype": (replaced(name, lambda t: t.float()), rf"m\.{name}: found float32 .* wanted")
        for name in (*exl2.PARTS, "bias")
    },
    **{
        f"{name} dims": (replaced(name, lambda t: t.unsqueeze(0)), rf"m\.{name}: found .* wanted")
        for name in (*exl2.PARTS, "bias")
    },
    "scale_max bfloat16": (replaced("q_scale_max", lambda t: t.bfloat16()), r"m\.q_scale_max: found bfloat16 \[4\]"),
    "columns": (replaced("q_weight", lambda t: t[:, :48]), r"m\.q_weight: found 48 columns .*multiple of 32"),
    "no columns": (replaced("q_weight", lambda t: t[:, :0]), r"m\.q_weight: found 0 columns"),
    "half the columns": (replaced("q_weight", lambda t: t[:, :32]), r"m\.q_scale: found \[4, 8\]; wanted \[4, 4\]"),
    "scale rows": (replaced("q_scale", lambda t: t[:3]), r"m\.q_scale: found \[3, 8\]; wanted \[4, 8\]"),
    "scale columns": (replaced("q_scale", lambda t: t[:, :7]), r"m\.q_scale: found \[4, 7\]; wanted \[4, 8\]"),
    "scale_max count": (replaced("q_scale_max", lambda t: t[:3]), r"m\.q_scale_max: found 3 values; wanted 4"),
    "scale_max infinite": (with_value("q_scale_max", 1, float("inf")), r"m\.q_scale_max: .*not finite"),
    "scale_max NaN": (with_value("q_scale_max", 1, float("nan")), r"m\.q_scale_max: .*not finite"),
    "no groups": (replaced("q_groups", lambda t: t[:0]), r"m\.q_groups: found 0 values; wanted pairs"),
    "odd groups": (replaced("q_groups", lambda t: t[:7]), r"m\.q_groups: found 7 values; wanted pairs"),
    "one group less": (replaced("q_groups", lambda t: t[:6]), r"m\.q_scale: found \[4, 8\]; wanted \[3, 8\]"),
    "width 7": (with_value("q_groups", 2, 7), r"m\.q_groups: group 1 has 7 bits; wanted one of 2, 3, 4, 5, 6, 8"),
    "width 0": (with_value("q_groups", 2, 0), r"m\.q_groups: group 1 has 0 bits"),
    "width -4": (with_value("q_groups", 2, -4), r"m\.q_groups: group 1 has 65532 bits"),
    "first group late": (with_value("q_groups", 1, 5), r"m\.q_groups: the first group starts at .* 5; wanted 0"),
    "group past the end": (with_value("q_groups", 7, 34), r"m\.q_groups: group 3 covers 32-bit rows 34 to 34 of 34"),
    "group far past the end": (
        with_value("q_groups", 7, -1),
        r"m\.q_groups: group 2 covers 32-bit rows 18 to 65535 of 34",
    ),
    "groups going back": (with_value("q_groups", 5, 8), r"m\.q_groups: group 1 covers 32-bit rows 10 to 8"),
    "broken weights": (with_value("q_groups", 3, 11), r"m\.q_groups: group 0 has 11 .* 70\.4 weights; wanted a mult"),
    "half a block": (
        with_value("q_groups", 5, 16),
        r"m\.q_groups: group 1 has 6 .* 48 weights; wanted a multiple of 32",
    ),
    "rows cut": (replaced("q_weight", lambda t: t[:30]), r"m\.q_invperm: found 256 values; wanted 224"),
    "no rows": (replaced("q_weight", lambda t: t[:0]), r"m\.q_groups: group 0 covers 32-bit rows 0 to 10 of 0"),
    "invperm cut": (replaced("q_invperm", lambda t: t[:-1]), r"m\.q_invperm: found 255 values; wanted 256"),
    "invperm empty": (replaced("q_invperm", lambda t: t[:0]), r"m\.q_invperm: found 0 values; wanted 256"),
    "invperm twice": (with_value("q_invperm", 3, 9), r"m\.q_invperm: found 1 values twice or more; wanted a perm"),
    "invperm negative": (with_value("q_invperm", 3, -1), r"m\.q_invperm: found values -1 \.\. 255; wanted a permut"),
    "invperm too large": (with_value("q_invperm", 3, 256), r"m\.q_invperm: found values 0 \.\. 256; wanted a permut"),
    "bias unpadded": (replaced("bias", lambda t: t[:50]), r"m\.bias: found 50 values; wanted 64"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parts_give_an_error_that_names_the_tensor(damage: str) -> None:
    parts = only_parts(load("mix54_identity_bias"))
    exl2.check_parts("m", parts)
    change, message = DAMAGES[damage]
    change(parts)
    with pytest.raises(FormatError, match=message):
        exl2.check_parts("m", parts)
    with pytest.raises(FormatError, match=message):
        exl2.dequantize(parts, module="m")


def test_the_default_name_of_a_nameless_module() -> None:
    with pytest.raises(FormatError, match=r"^tensor: missing tensor\.q_weight, tensor\.q_scale,"):
        exl2.dequantize({})


def test_rising_widths_decode_but_do_not_pass_for_the_engine() -> None:
    parts = random_parts([(4, 32), (5, 32)], 32, seed=1)
    assert exl2.dequantize(parts).numpy().tobytes() == decode_plainly(parts).tobytes()
    with pytest.raises(FormatError, match=r"m\.q_groups: group 1 has 5 bits after a group of 4 bits"):
        exl2.check_parts("m", parts)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_fuzzed_parts_give_a_format_error_or_the_right_weights(data: st.DataObject) -> None:
    parts = random_parts([(6, 64), (3, 32), (2, 32)], 64, seed=data.draw(st.integers(0, 3)))
    parts["bias"] = torch.zeros(64).half()
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from([*exl2.PARTS, "bias"]))
        if name not in parts:
            continue
        tensor = parts[name]
        action = data.draw(st.sampled_from(["value", "value", "cut", "grow", "dtype", "view", "drop"]))
        if action == "value" and tensor.numel() and not tensor.is_floating_point():
            info = torch.iinfo(tensor.dtype)
            value = data.draw(st.one_of(st.integers(-1, 40), st.integers(info.min, info.max)))
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = value
        elif action == "value" and tensor.numel():
            tensor.view(-1)[0] = data.draw(st.floats(width=16))
        elif action == "cut" and tensor.dim():
            dim = data.draw(st.integers(0, tensor.dim() - 1))
            parts[name] = tensor.narrow(dim, 0, data.draw(st.integers(0, tensor.shape[dim]))).clone()
        elif action == "grow" and tensor.dim():
            dim = data.draw(st.integers(0, tensor.dim() - 1))
            parts[name] = torch.cat([tensor, tensor], dim=dim)
        elif action == "dtype":
            parts[name] = tensor.to(data.draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8])))
        elif action == "view":
            parts[name] = (
                tensor.reshape(data.draw(st.sampled_from([(-1,), (1, -1), (1, 1, -1)]))) if tensor.numel() else tensor
            )
        elif action == "drop":
            del parts[name]
    try:
        dense = exl2.dequantize(parts)
    except FormatError:
        return
    with np.errstate(over="ignore"):
        assert dense.numpy().tobytes() == decode_plainly(parts).tobytes()


# ---- pack refuses ----------------------------------------------------------------------------------------------------


def test_pack_refuses_what_the_engine_cannot_read() -> None:
    def arguments(**changes: object) -> dict:
        fine = {
            "codes": torch.full((64, 32), 3, dtype=torch.uint8),
            "scale_codes": torch.full((2, 32), 16, dtype=torch.uint8),
            "scale_max": torch.ones(2).half(),
            "groups": [(3, 32), (2, 32)],
            "perm": torch.arange(64),
            "bias": torch.zeros(32).half(),
        }
        return {**fine, **changes}

    exl2.check_parts("m", exl2.pack(**arguments()))
    too_large = torch.full((64, 32), 3, dtype=torch.uint8)
    too_large[63, 5] = 4
    for changes, message in (
        ({"codes": too_large}, "codes: found 4 in a group of 2 bits"),
        ({"codes": too_large.int()}, r"codes: found int32 \[64, 32\]"),
        ({"codes": too_large[:, :16], "scale_codes": torch.ones(2, 16, dtype=torch.uint8)}, "codes: found 16 columns"),
        ({"scale_codes": torch.full((2, 32), 17, dtype=torch.uint8)}, r"scale_codes: found a value outside 1 \.\. 16"),
        ({"scale_codes": torch.full((2, 32), 0, dtype=torch.uint8)}, r"scale_codes: found a value outside 1 \.\. 16"),
        ({"scale_codes": torch.full((1, 32), 1, dtype=torch.uint8)}, r"scale_codes: .* wanted uint8 \[2, 32\]"),
        ({"scale_max": torch.ones(2)}, r"q_scale_max: found float32"),
        ({"scale_max": torch.ones(3).half()}, r"q_scale_max: found 3 values; wanted 2"),
        ({"groups": [(2, 32), (3, 32)]}, "group 1 has 3 bits after a group of 2 bits"),
        ({"groups": [(7, 32), (2, 32)]}, r"groups\[0\]: found 7 bits"),
        ({"groups": [(3, 48), (2, 16)]}, r"groups\[0\]: found 48 rows; wanted a positive multiple of 32"),
        ({"groups": [(3, 32), (2, 64)]}, "groups: found 96 rows in all; wanted in_features = 64"),
        ({"perm": torch.zeros(64, dtype=torch.int64)}, "perm: found 63 values twice or more"),
        ({"perm": torch.arange(1, 65)}, r"perm: found values 1 \.\. 64"),
        ({"perm": torch.arange(63)}, r"perm: found int64 \[63\]; wanted int32 or int64 \[64\]"),
        ({"bias": torch.zeros(31).half()}, "bias: found 31 values; wanted 32"),
    ):
        with pytest.raises(FormatError, match=message):
            exl2.pack(**arguments(**changes))
