"""EXL3 encoder: legal trellises, the error figures of the format spec, and LDLQ, refit and padding doing their work."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor

from recompile.errors import CheckpointError, UnsupportedError
from recompile.formats.exl3 import BITS, bits_of, check_parts, codebook_table, codes, dequantize, pack_states
from recompile.quantize import exl3
from recompile.quantize.exl3 import quantize_exl3, viterbi_torch

CPU = torch.device("cpu")


def gaussian(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded(parts: dict[str, Tensor], weight: Tensor) -> Tensor:
    check_parts("encoded", parts)
    return dequantize(parts)[: weight.shape[0], : weight.shape[1]]


def relative_error(parts: dict[str, Tensor], weight: Tensor, hessian: Tensor | None = None) -> float:
    """tr(E H E^T) / tr(W H W^T), E = decoded - weight; no Hessian means the identity."""
    error, weight = (decoded(parts, weight) - weight).double(), weight.double()
    metric = torch.eye(weight.shape[1]).double() if hessian is None else hessian.double()
    return (((error @ metric) * error).sum() / ((weight @ metric) * weight).sum()).item()


def correlated_hessian(size: int, seed: int = 2) -> Tensor:
    """Of inputs whose variances fall as 1/n^1.5 along random directions."""
    directions = torch.linalg.qr(gaussian(size, size, seed=seed))[0]
    inputs = gaussian(2 * size, size, seed=seed + 1) * torch.arange(1, size + 1) ** -0.75 @ directions.T
    return inputs.T @ inputs


def path_cost(states: Tensor, targets: Tensor, table: Tensor) -> Tensor:
    return (table[states] - targets).square().sum(1)


# ---- trellis search --------------------------------------------------------------------------------------------------

# Relative error of N(0, 1) targets at the best operating point: spec section 8, and our own scan for the other K.
SPEC_MSE = {1: 0.28, 1.5: 0.136, 2: 0.067, 2.5: 0.0345, 3: 0.0175, 3.5: 0.0088, 4: 0.0045, 5: 0.00115, 6: 0.0003}
SPEC_MSE |= {7: 8.2e-5, 8: 2.1e-5}


@pytest.mark.parametrize("bits", BITS)
def test_torch_search_gives_legal_paths_of_the_expected_error(bits: float) -> None:
    table = codebook_table("mul1", CPU).float()
    targets = gaussian(2, 256) * exl3.TARGET_STD["mul1"][bits]
    states = viterbi_torch(targets, table, bits)
    assert states.dtype == torch.int32
    trellis = pack_states(states.view(2, 1, 256), bits)  # asserts the overlap rule, cyclically
    assert torch.equal(codes(trellis).view(2, 256), states)
    error = (path_cost(states, targets, table).sum() / targets.square().sum()).item()
    assert error == pytest.approx(SPEC_MSE[bits], rel=0.2)  # two tiles: some 7 % of sampling noise


def test_no_single_symbol_change_improves_a_path() -> None:
    # At K = 8 symbol t is the low byte of state t and the high byte of state t+1, so every change can be tried.
    table = codebook_table("mcg", CPU).float()
    targets = gaussian(1, 256)
    states = viterbi_torch(targets, table, 8)[0].long()
    error = (table - targets.view(256, 1)).square()  # [position, state]
    symbols = torch.arange(256)
    for t in range(255):  # symbol 255 is the node that pass 2 pins
        here = error[t, (states[t] & 0xFF00) | symbols]
        after = error[t + 1, (symbols << 8) | (states[t + 1] & 0xFF)]
        assert (here + after).min() >= error[t, states[t]] + error[t + 1, states[t + 1]] - 1e-5  # float32 path sums


def test_batches_of_the_torch_search_do_not_change_it() -> None:
    table = codebook_table("mcg", CPU).float()
    targets = gaussian(2, 256)
    one_by_one = viterbi_torch(targets, table, 6, memory_bytes=1)
    assert torch.equal(viterbi_torch(targets, table, 6), one_by_one)


@pytest.mark.parametrize("bits", [2, *(pytest.param(bits, marks=pytest.mark.sweep) for bits in (2.5, 4))])
def test_numba_search_costs_the_same_as_torch(bits: float) -> None:
    pytest.importorskip("numba", reason="the compiled search needs the extra [exl3]")
    from recompile.quantize.exl3_viterbi_cpu import viterbi_cpu

    table = codebook_table("mul1", CPU).float()
    targets = gaussian(3, 256, seed=4) * 0.9
    fast = torch.from_numpy(viterbi_cpu(targets.numpy(), table.numpy(), bits))
    plain = viterbi_torch(targets, table, bits)
    pack_states(fast.view(1, 3, 256), bits)  # asserts the overlap rule
    # Only rounding differs (fused multiply-add); where it breaks a tie of pass 1 the paths may part, at equal cost.
    torch.testing.assert_close(path_cost(fast, targets, table), path_cost(plain, targets, table), rtol=1e-5, atol=0)
    assert viterbi_cpu(targets[:0].numpy(), table.numpy(), bits).shape == (0, 256)


def test_without_numba_the_torch_search_is_used_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = gaussian(1, 256)
    table = codebook_table("mcg", CPU).float()
    monkeypatch.setitem(sys.modules, "recompile.quantize.exl3_viterbi_cpu", None)  # as if its import failed
    exl3._numba_search.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="numba is not installed"):
            first = exl3.viterbi(targets, "mcg", 8)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exl3.viterbi(targets, "mcg", 8)
        assert torch.equal(first, viterbi_torch(targets, table, 8))
    finally:
        exl3._numba_search.cache_clear()


# ---- whole weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "codebook"),
    [(2, "mcg"), (4, "mul1"), *(pytest.param(bits, "mcg", marks=pytest.mark.sweep) for bits in (3, 4))],
)
def test_error_of_gaussian_weights_is_that_of_the_spec(bits: int, codebook: str) -> None:
    weight = gaussian(128, 128) * 0.02
    error = relative_error(quantize_exl3(weight, None, bits, codebook), weight)
    low, high = {2: (0.066, 0.068), 3: (0.0175, 0.0175), 4: (0.0045, 0.0045)}[bits]
    assert 0.97 * low <= error <= 1.03 * high


def test_parts_are_named_shaped_and_typed_as_the_format_wants() -> None:
    weight, bias = gaussian(200, 100).bfloat16(), gaussian(200)
    parts = quantize_exl3(weight, None, 4, "mcg", bias=bias)
    found = {name: (part.dtype, list(part.shape)) for name, part in parts.items()}
    assert found == {
        "trellis": (torch.int16, [8, 16, 64]),
        "suh": (torch.float16, [128]),
        "svh": (torch.float16, [256]),
        "mcg": (torch.int32, []),
        "bias": (torch.float16, [256]),
    }
    assert parts["mcg"].item() & 0xFFFFFFFF == 0xCBAC1FED
    assert torch.equal(parts["bias"][:200], bias.half())
    assert not parts["bias"][200:].any()


@pytest.mark.parametrize(("codebook", "marker"), [("3inst", set()), ("mul1", {"mul1"})])
def test_markers(codebook: str, marker: set[str]) -> None:
    weight = gaussian(128, 128)
    parts = quantize_exl3(weight, None, 4, codebook)
    assert set(parts) == {"trellis", "suh", "svh"} | marker
    assert relative_error(parts, weight) < 0.0047  # with the wrong codebook this is near 1


def test_half_bits_encode_with_mul1() -> None:
    weight = gaussian(128, 128)
    parts = quantize_exl3(weight, None, 2.5, "mul1", refit=False)
    assert bits_of(parts["trellis"]) == 2.5
    assert relative_error(parts, weight) == pytest.approx(SPEC_MSE[2.5], rel=0.05)


@pytest.mark.parametrize("shape", [(128, 128), (100, 200)])
def test_ldlq_lowers_the_error_that_the_hessian_measures(shape: tuple[int, int]) -> None:
    weight, hessian = gaussian(*shape) * 0.02, correlated_hessian(shape[1])
    plain = relative_error(quantize_exl3(weight, None, 4), weight, hessian)
    fed_back = relative_error(quantize_exl3(weight, hessian, 4, refit=False), weight, hessian)
    refitted = relative_error(quantize_exl3(weight, hessian, 4), weight, hessian)
    assert fed_back < 0.5 * plain
    assert refitted < fed_back


def test_a_hessian_of_equal_inputs_does_no_harm() -> None:
    weight = gaussian(128, 128)
    error = relative_error(quantize_exl3(weight, 17.0 * torch.eye(128), 4), weight)
    assert error == pytest.approx(0.0045, rel=0.05)


def test_inputs_that_never_fire_do_not_break_ldlq() -> None:
    weight, hessian = gaussian(128, 128), correlated_hessian(128)
    hessian[:, 7], hessian[7] = 0, 0
    plain = relative_error(quantize_exl3(weight, None, 4), weight, hessian)
    assert relative_error(quantize_exl3(weight, hessian, 4), weight, hessian) < 0.5 * plain


def test_refit_lowers_the_error() -> None:
    weight = gaussian(128, 128)
    with_refit, without = quantize_exl3(weight, None, 4), quantize_exl3(weight, None, 4, refit=False)
    assert torch.equal(with_refit["trellis"], without["trellis"])
    assert relative_error(with_refit, weight) < relative_error(without, weight)


def test_padding_is_scaled_to_zero_and_costs_no_accuracy() -> None:
    weight = gaussian(100, 200)
    parts = quantize_exl3(weight, None, 4)
    assert relative_error(parts, weight) < 0.0045  # the padding's freedom helps
    dense = dequantize(parts)
    assert dense.shape == (128, 256)
    assert not dense[100:].any()
    assert not dense[:, 200:].any()


def test_zero_channels_stay_zero_and_outlier_channels_keep_their_precision() -> None:
    weight = gaussian(128, 128)
    weight[7] *= 100
    weight[5], weight[:, 9] = 0, 0
    parts = quantize_exl3(weight, None, 4)
    dense = decoded(parts, weight)
    assert not dense[5].any()
    assert not dense[:, 9].any()
    ordinary = torch.arange(128) != 7
    error = (dense - weight)[ordinary].square().sum() / weight[ordinary].square().sum()
    assert error < 0.006


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_weights_of_any_size(size: float) -> None:
    weight = gaussian(128, 128) * size
    assert relative_error(quantize_exl3(weight, None, 4), weight) < 0.0047


def test_all_zero_weights() -> None:
    weight = torch.zeros(128, 128)
    assert torch.equal(decoded(quantize_exl3(weight, torch.eye(128), 4), weight), weight)


def test_the_seed_decides_the_signs() -> None:
    weight = gaussian(128, 128)
    first, again, other = (quantize_exl3(weight, None, 4, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["suh"].sign(), other["suh"].sign())
    assert not torch.equal(first["svh"].sign(), other["svh"].sign())


@pytest.mark.parametrize(
    ("bits", "codebook", "message"),
    [(9, "mcg", "9 bits"), (0, "mcg", "0 bits"), (4.5, "mul1", "4.5 bits"), (2.5, "mcg", "mul1"), (4, "qtip", "qtip")],
)
def test_what_exl3_does_not_have(bits: float, codebook: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quantize_exl3(gaussian(128, 128), None, bits, codebook)


@pytest.mark.parametrize(
    ("weight", "hessian", "bias", "message"),
    [
        (torch.full((128, 128), float("nan")), None, None, "weight: found inf or nan"),
        (torch.full((128, 128), 1e30), None, None, "weight: found values too large"),
        (torch.ones(128, 128, dtype=torch.int32), None, None, "weight: found torch.int32"),
        (torch.ones(128), None, None, r"weight: .*\[out, in\]"),
        (gaussian(128, 64), torch.eye(128), None, r"hessian: found shape \[128, 128\]; wanted \[64, 64\]"),
        (gaussian(128, 64), -torch.eye(64), None, "hessian: found a diagonal"),
        (gaussian(128, 64), torch.full((64, 64), float("inf")), None, "hessian: found inf"),
        (gaussian(128, 64), torch.eye(64) - 3 * (1 - torch.eye(64)), None, "hessian: .*semidefinite"),
        (gaussian(128, 64), None, torch.zeros(64), r"bias: found shape \[64\]; wanted \[128\]"),
        (gaussian(128, 64), None, torch.full((128,), 1e6), "bias: found values beyond 65504"),
    ],
)
def test_inputs_that_cannot_be_encoded(
    weight: Tensor, hessian: Tensor | None, bias: Tensor | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        quantize_exl3(weight, hessian, 4, bias=bias)


@pytest.mark.parametrize(
    "work",
    [
        "from recompile.quantize.exl3_viterbi_cpu import viterbi_cpu\n"
        "viterbi_cpu(np.zeros((2, 256), np.float32), np.linspace(-1, 1, 65536, dtype=np.float32), 2)",
        "from recompile.formats.ik import quantize\nquantize('IQ4_KSS', torch.randn(4, 256))",
    ],
    ids=["exl3", "ik"],
)
def test_torch_keeps_its_threads(work: str) -> None:
    """In a process where numba has not started its own yet; it does so once."""
    pytest.importorskip("numba")
    code = f"""
import numpy as np, torch
torch.set_num_threads(1)
torch.ones(100, 100) @ torch.ones(100, 100)  # torch starts its threads with its first work
assert torch.get_num_threads() == 1
{work}
print(torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
