"""Grid fitting: hand-worked grids, then the mse search against brute force, rtn and its own definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.packed_int import IntScheme, dequantize, pack
from recompile.quantize.int_grids import Grid, dequantize_codes, fit_grid, quantize_to_grid


def heavy_tailed(out_features: int, in_features: int, seed: int) -> Tensor:
    """Weight-like values: a Student t with 5 degrees of freedom, rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(6, out_features, in_features, generator=generator)
    row_size = 0.5 + torch.rand(out_features, 1, generator=generator)
    return 0.03 * row_size * normal[0] / normal[1:].square().mean(0).sqrt()


def reconstruct(weight: Tensor, grid: Grid, scheme: IntScheme) -> Tensor:
    return dequantize_codes(quantize_to_grid(weight, grid, scheme), grid, scheme)


def group_errors(weight: Tensor, grid: Grid, scheme: IntScheme, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of each group, [O, NG]."""
    squared = (weight - reconstruct(weight, grid, scheme)).square()
    if importance is not None:
        squared = squared * importance
    return squared.view(len(weight), grid.scale.shape[1], -1).sum(-1)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_rtn_symmetric_by_hand() -> None:
    weight = torch.tensor([[7.5, -3.75, 0.75, 0.0]])
    grid = fit_grid(weight, IntScheme(4, 4, True), "rtn")
    assert grid.scale.tolist() == [[1.0]]  # 7.5 / 7.5, not / 7 or / 8
    assert grid.zero_point is None
    # 7.5 rounds to 8, above the highest code 7
    assert quantize_to_grid(weight, grid, IntScheme(4, 4, True)).tolist() == [[7, -4, 1, 0]]


def test_rtn_asymmetric_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0, 2.0, 4.0, 5.0, 6.0]])
    scheme = IntScheme(2, 4, False)
    grid = fit_grid(weight, scheme, "rtn")
    # group 0: (2 - -1) / 3 = 1, z = -2 + 1; group 1 is widened to 0: 6 / 3 = 2, z = -2
    assert grid.scale.tolist() == [[1.0, 2.0]]
    assert grid.zero_point is not None
    assert grid.zero_point.tolist() == [[-1, -2]]
    codes = quantize_to_grid(weight, grid, scheme)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[-2, -1, 0, 1, -1, 0, 0, 1]]  # 5 / 2 = 2.5 rounds to the even 2
    assert dequantize_codes(codes, grid, scheme).tolist() == [[-1, 0, 1, 2, 2, 4, 4, 6]]


def test_mse_gives_the_extra_level_to_the_longer_tail_by_a_negative_scale() -> None:
    weight = torch.tensor([[1.0, 0.5, 0.0, -0.5], [-1.0, -0.5, 0.0, 0.5]])  # levels -2..1 times -0.5, and times 0.5
    scheme = IntScheme(2, None, True)
    grid = fit_grid(weight, scheme)
    assert grid.scale.tolist() == [[-0.5], [0.5]]
    assert quantize_to_grid(weight, grid, scheme).tolist() == [[-2, -1, 0, 1], [-2, -1, 0, 1]]
    assert torch.equal(reconstruct(weight, grid, scheme), weight)


def test_mse_scale_of_one_bit_by_hand() -> None:
    # Levels -1 and 0: of 3, 2, 0.1 and 0 the first two are coded, and the scale is their mean, negated.
    grid = fit_grid(torch.tensor([[3.0, 2.0, 0.1, 0.0]]), IntScheme(1, None, True))
    assert grid.scale.tolist() == [[-2.5]]
    # With squared errors counted 3 : 1 the mean is weighted.
    grid = fit_grid(torch.tensor([[3.0, 2.0, 0.1, 0.0]]), IntScheme(1, None, True), "mse", torch.tensor([3.0, 1, 1, 1]))
    assert grid.scale.tolist() == [[-2.75]]


@pytest.mark.parametrize("method", ["rtn", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_group_of_zeros_decodes_to_zeros(method: str, symmetric: bool, bits: int) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 4:] = torch.tensor([1.0, -1.0, 0.5, 0.25])
    scheme = IntScheme(bits, 4, symmetric)
    for importance in (None, torch.zeros(8), torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])):
        grid = fit_grid(weight, scheme, method, importance)  # type: ignore[arg-type]
        assert bool(grid.scale.isfinite().all())
        assert bool((grid.scale != 0).all())
        dense = reconstruct(weight, grid, scheme)
        assert bool((dense[weight.view(3, 2, 4).eq(0).all(-1).repeat_interleave(4, 1)] == 0).all())


def test_weights_on_a_grid_are_found_exactly() -> None:
    """What a 4-bit block format dequantizes to must survive as it is; every level occurs in every group."""
    generator = torch.Generator().manual_seed(3)
    for symmetric in (True, False):
        scheme = IntScheme(4, 32, symmetric)
        levels = torch.stack([torch.randperm(32, generator=generator) % 16 - 8 for _ in range(64)])
        zero_point = 0 if symmetric else torch.randint(-8, 8, (64, 1), generator=generator)
        scale = (torch.rand(64, 1, generator=generator) + 0.1).bfloat16().float()
        weight = (levels - zero_point) * scale
        assert torch.equal(reconstruct(weight, fit_grid(weight, scheme), scheme), weight)


# --- against other ways to compute it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 5])
def test_codes_are_the_nearest_levels(bits: int, symmetric: bool) -> None:
    scheme = IntScheme(bits, 16, symmetric)
    weight = heavy_tailed(12, 48, seed=bits)
    grid = fit_grid(weight, scheme)
    levels = torch.arange(scheme.code_min, scheme.code_max + 1).float()[:, None, None]
    if grid.zero_point is not None:
        levels = levels - grid.zero_point
    every_value = (levels * grid.scale).repeat_interleave(16, dim=2)  # [2^b, O, I]
    nearest = (every_value - weight).abs().amin(0)
    # 1e-6 of a step: a weight half-way between two levels may go to either
    slack = 1e-6 * grid.scale.abs().repeat_interleave(16, dim=1)
    assert bool(((reconstruct(weight, grid, scheme) - weight).abs() <= nearest + slack).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_is_near_a_dense_search_over_scales_and_zero_points(bits: int, symmetric: bool, weighted: bool) -> None:
    weight = heavy_tailed(96, 32, seed=7)
    weight[:16] += 0.03  # some groups off centre
    importance = 0.05 + torch.rand(32, generator=torch.Generator().manual_seed(8)) if weighted else None
    cost = torch.ones(32) if importance is None else importance
    scheme = IntScheme(bits, 32, symmetric)
    steps = (1 << bits) - 1

    best = torch.full((96,), torch.inf)
    widest = 2.2 * weight.abs().amax(1, keepdim=True) / steps
    signed_fractions = torch.linspace(0.05, 1.2, 231)
    for zero in [1 << (bits - 1)] if symmetric else range(steps + 1):
        for fraction in torch.cat([signed_fractions, -signed_fractions] if symmetric else [signed_fractions]):
            scale = widest * fraction
            value = (weight / scale).round().clamp(-zero, steps - zero) * scale
            best = torch.minimum(best, ((weight - value).square() * cost).sum(1))

    found = group_errors(weight, fit_grid(weight, scheme, "mse", importance, torch.float32), scheme, importance)[:, 0]
    # The search tries tens of grids where this loop tries hundreds to thousands, but fits each scale exactly.
    assert float(found.sum() / best.sum()) < 1.03
    assert float((found / best).median()) < 1.01


@pytest.mark.parametrize(
    ("bits", "symmetric", "at_most"),
    [(2, True, 0.55), (3, True, 0.70), (4, True, 0.85), (2, False, 0.70), (3, False, 0.88), (4, False, 0.96)],
)
def test_mse_beats_absmax_clearly_at_few_bits(bits: int, symmetric: bool, at_most: float) -> None:
    weight = heavy_tailed(128, 256, seed=1)
    scheme = IntScheme(bits, 64, symmetric)
    error = {m: float(group_errors(weight, fit_grid(weight, scheme, m), scheme).sum()) for m in ("rtn", "mse")}  # type: ignore[arg-type]
    assert error["mse"] < at_most * error["rtn"]


def test_refitting_the_best_candidate_lowers_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most in long groups of few bits, where the tried ranges are far apart and the codes follow the scale slowly."""
    weight = heavy_tailed(64, 512, seed=6)
    scheme = IntScheme(2, None, True)
    refitted = group_errors(weight, fit_grid(weight, scheme, scale_dtype=torch.float32), scheme)
    monkeypatch.setattr("recompile.quantize.int_grids._REFITS", 0)
    at_once = group_errors(weight, fit_grid(weight, scheme, scale_dtype=torch.float32), scheme)
    assert bool((refitted <= at_once).all())
    assert float(refitted.sum()) < 0.998 * float(at_once.sum())


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.integers(0, 1 << 30),
)
def test_every_grid_is_legal_and_mse_never_worse_than_rtn(
    bits: int, symmetric: bool, weighted: bool, scale_dtype: torch.dtype, size: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(5, 24, generator=generator) ** 3 + size * torch.randn(5, 1, generator=generator)
    importance = torch.rand(24, generator=generator) ** 4 if weighted else None
    scheme = IntScheme(bits, 8, symmetric)
    errors = {}
    for method in ("rtn", "mse"):
        grid = fit_grid(weight, scheme, method, importance, scale_dtype)  # type: ignore[arg-type]
        assert grid.scale.dtype == torch.float32
        assert torch.equal(grid.scale, grid.scale.to(scale_dtype).float())  # rounded before the codes were chosen
        assert bool((grid.scale != 0).all())
        codes = quantize_to_grid(weight, grid, scheme)
        parts = pack(codes, grid.scale, grid.zero_point, scheme, scale_dtype)  # refuses codes out of range
        assert torch.equal(dequantize(parts, scheme), dequantize_codes(codes, grid, scheme))
        errors[method] = group_errors(weight, grid, scheme, importance)
    # 1e-5: the search sums the same errors in another order, and raises importances below 1e-6 of the mean
    assert bool((errors["mse"] <= errors["rtn"] * (1 + 1e-5) + 1e-5 * size**2 * 1e-6).all())


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight = heavy_tailed(64, 128, seed=5)
    importance = torch.ones(128)
    importance[::4] = 50
    scheme = IntScheme(3, 64, False)
    plain = group_errors(weight, fit_grid(weight, scheme), scheme, importance).sum()
    aware = group_errors(weight, fit_grid(weight, scheme, "mse", importance), scheme, importance).sum()
    assert float(aware) < 0.8 * float(plain)
    scaled = fit_grid(weight, scheme, "mse", 1024 * importance)  # only the proportions count
    assert torch.equal(scaled.scale, fit_grid(weight, scheme, "mse", importance).scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, None])
def test_rows_do_not_influence_each_other(
    symmetric: bool, group_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = IntScheme(3, group_size, symmetric)
    weight = heavy_tailed(21, 48, seed=9)
    whole = fit_grid(weight, scheme)
    codes = quantize_to_grid(weight, whole, scheme)
    monkeypatch.setattr("recompile.quantize.int_grids._CPU_CHUNK_WEIGHTS", 4 * 48)  # chunks of 4 rows
    chunked = fit_grid(weight, scheme)
    # 1e-6: sums over a group may be taken in another order where chunks are narrower than a vector
    assert torch.allclose(chunked.scale, whole.scale, rtol=1e-6, atol=0)
    if whole.zero_point is not None:
        assert torch.equal(chunked.zero_point, whole.zero_point)  # type: ignore[arg-type]
    assert torch.equal(quantize_to_grid(weight, whole, scheme), codes)


def test_the_input_is_left_as_it_was() -> None:
    weight = heavy_tailed(4, 32, seed=2)
    before = weight.clone()
    importance = torch.rand(32)
    importance_before = importance.clone()
    grid = fit_grid(weight, IntScheme(3, 16, False), "mse", importance)
    quantize_to_grid(weight, grid, IntScheme(3, 16, False))
    assert torch.equal(weight, before)
    assert torch.equal(importance, importance_before)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.full((2, 8), torch.nan)}, "weight: found 16 NaN or infinite"),
        ({"weight": torch.full((2, 8), -torch.inf)}, "weight: found 16 NaN or infinite"),
        ({"weight": torch.zeros(8)}, r"weight: found shape \[8\]"),
        ({"weight": torch.zeros(0, 8)}, r"weight: found shape \[0, 8\]"),
        ({"weight": torch.zeros(2, 10)}, "group_size 4 does not divide the 10 columns"),
        ({"weight": torch.full((2, 8), 1e7), "scale_dtype": torch.float16}, "found values up to 1e[+]07, whose scale"),
        ({"importance": torch.ones(9)}, r"importance: found shape \[9\], wanted \[8\]"),
        ({"importance": -torch.ones(8)}, "importance: found negative"),
        ({"importance": torch.full((8,), torch.nan)}, "importance: found negative, NaN"),
        ({"method": "best"}, "method: found 'best'"),
        ({"scale_dtype": torch.float64}, "scale_dtype: found torch.float64"),
    ],
)
def test_what_has_no_grid_is_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"weight": torch.ones(2, 8), "scheme": IntScheme(3, 4, True), "method": "mse"}
    fit_grid(**arguments)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        fit_grid(**(arguments | change))  # type: ignore[arg-type]
