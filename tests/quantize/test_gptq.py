"""GPTQ: two columns by hand, then against a plain float64 implementation of the published algorithm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.packed_int import IntScheme, dequantize, pack
from recompile.quantize import gptq
from recompile.quantize.gptq import QuantizedWeight, proxy_error, quantize_gptq
from recompile.quantize.int_grids import Grid, dequantize_codes, fit_grid, quantize_to_grid


def make_case(out_features: int, in_features: int, seed: int, spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """A weight and the X^T X of correlated inputs (spectrum 1/k, channels of very different size)."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(6, out_features, in_features, generator=generator)
    weight = 0.03 * normal[0] / normal[1:].square().mean(0).sqrt()  # Student t, 5 degrees of freedom
    rotation = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator))[0]
    spectrum = torch.arange(1, in_features + 1).float().rsqrt()
    channel_size = (spread * torch.randn(in_features, generator=generator)).exp()
    inputs = (torch.randn(4 * in_features, in_features, generator=generator) * spectrum) @ rotation.t() * channel_size
    return weight, inputs.t() @ inputs


def decode(result: QuantizedWeight) -> Tensor:
    return dequantize_codes(result.codes, result.grid, result.scheme)


def plain_gptq(
    weight: Tensor, hessian: Tensor, scheme: IntScheme, damping: float, importance: Tensor | None, static: bool
) -> Tensor:
    """GPTQ as published: after each column the others move by H^-1, and the column leaves H^-1. float64, no blocks.

    Returns the dequantized weight. Groups get their grids from `fit_grid`, on the weights as they are when they begin.
    """
    in_features = weight.shape[1]
    group_size = scheme.group_size or in_features
    w, h = weight.double().clone(), hessian.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    result = torch.zeros_like(w)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist() if static else range(in_features)
    upfront = static or scheme.group_size is None
    grids: dict[int, Grid] = {}
    for j in order:
        group = j // group_size
        if group not in grids:
            columns = slice(group * group_size, (group + 1) * group_size)
            source = weight if upfront else w.float()
            part = None if importance is None else importance[columns] / importance.mean()
            grids[group] = fit_grid(source[:, columns], IntScheme(scheme.bits, None, scheme.symmetric), "mse", part)
        scale = grids[group].scale[:, 0].double()
        zero = grids[group].zero_point
        offset = 0.0 if zero is None else zero[:, 0].double()
        code = (torch.round(w[:, j] / scale) + offset).clamp(scheme.code_min, scheme.code_max)
        result[:, j] = (code - offset) * scale
        step = (w[:, j] - result[:, j]) / inverse[j, j]
        w -= step[:, None] * inverse[j][None, :]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # out of the game; the row and column are 0
    return result.float()


def count_rows_that_differ(left: Tensor, right: Tensor) -> int:
    """Rows with a weight off by more than rounding noise: a weight on a tie may send the rest of its row elsewhere."""
    return int(((left - right).abs() > 1e-5 * left.abs().max()).any(1).sum())


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_two_columns_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """H = [[1, .5], [.5, 1]]: the second column takes over H_12 / H_22 = 0.5 of the error of the first."""
    unit_grid = Grid(torch.ones(1, 1), None)
    monkeypatch.setattr(gptq, "fit_grid", lambda *args: unit_grid)
    weight = torch.tensor([[0.4, 0.4]])
    hessian = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    (result,) = quantize_gptq(weight, hessian, [IntScheme(4, None, True)], damping=0.0)
    assert result.codes.tolist() == [[0, 1]]  # 0.4 + 0.5 * 0.4 = 0.6 rounds up; to nearest would be 0, 0
    # E = (0.4, -0.6): 0.16 + 0.36 - 0.24 = 0.28, against 0.16 + 0.16 + 0.16 = 0.48 for rounding to nearest
    everything = 0.16 + 0.16 + 0.16
    assert float(proxy_error(weight, decode(result), hessian)) == pytest.approx(0.28 / everything)


def test_static_order_begins_with_the_largest_input_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """H = [[1, 1], [1, 4]]: column 1 goes first and rounds to 0; column 0 takes over H_01 / H_00 = 1 of its error."""
    monkeypatch.setattr(gptq, "fit_grid", lambda *args: Grid(torch.ones(1, 1), None))
    weight, hessian = torch.tensor([[0.2, 0.4]]), torch.tensor([[1.0, 1.0], [1.0, 4.0]])
    scheme = IntScheme(4, None, True)
    (static,) = quantize_gptq(weight, hessian, [scheme], damping=0.0, act_order="static")
    assert static.codes.tolist() == [[1, 0]]  # 0.2 + 1 * 0.4 = 0.6
    (off,) = quantize_gptq(weight, hessian, [scheme], damping=0.0, act_order="off")
    assert off.codes.tolist() == [[0, 0]]  # 0.4 + (1 / 4) * 0.2 = 0.45


# --- against the plain implementation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "scheme",
    [
        IntScheme(2, 32, False),
        IntScheme(3, 32, True),
        IntScheme(4, 64, False),  # wider than a block
        IntScheme(3, 24, False),  # begins inside blocks and runs
        IntScheme(3, None, True),
        IntScheme(4, None, False),
    ],
)
def test_equal_to_the_plain_algorithm(scheme: IntScheme, weighted: bool, static: bool) -> None:
    weight, hessian = make_case(24, 192, seed=11)
    (result,) = quantize_gptq(
        weight,
        hessian,
        [scheme],
        damping=0.02,
        block=48,
        importance=weighted,
        act_order="static" if static else "off",
    )
    importance = hessian.diagonal() if weighted else None
    expected = plain_gptq(weight, hessian, scheme, 0.02, importance, static)
    assert count_rows_that_differ(expected, decode(result)) <= 1  # a tie in 4608 roundings: about one run in a hundred


MANY = [
    IntScheme(2, 32, False),
    IntScheme(3, 64, True),
    IntScheme(4, None, False),
    IntScheme(6, 96, True),
    IntScheme(8, 16, False),
    IntScheme(3, 64, False),
]


@pytest.mark.parametrize("act_order", ["off", "static"])
def test_all_schemes_at_once_equal_one_at_a_time(act_order: gptq.ActOrder) -> None:
    weight, hessian = make_case(20, 192, seed=12)
    together = quantize_gptq(weight, hessian, MANY, act_order=act_order)
    assert [result.scheme for result in together] == MANY
    for scheme, result in zip(MANY, together, strict=True):
        (alone,) = quantize_gptq(weight, hessian, [scheme], act_order=act_order)
        assert count_rows_that_differ(decode(alone), decode(result)) <= 1, scheme


def test_block_width_and_row_splits_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = make_case(20, 192, seed=13)
    schemes = MANY[:4]
    expected = quantize_gptq(weight, hessian, schemes)
    for block in (1, 20, 100, 4096):
        for want, got in zip(expected, quantize_gptq(weight, hessian, schemes, block=block), strict=True):
            assert count_rows_that_differ(decode(want), decode(got)) <= 1, block
    monkeypatch.setattr(gptq, "_STACK_WEIGHTS", 192 * 4 * 7)  # 7 rows at a time, the last part shorter
    for want, got in zip(expected, quantize_gptq(weight, hessian, schemes), strict=True):
        assert got.codes.shape == want.codes.shape
        assert got.grid.scale.shape == want.grid.scale.shape
        assert count_rows_that_differ(decode(want), decode(got)) <= 1


def test_stacked_matrices_equal_separate_ones() -> None:
    query, hessian = make_case(16, 192, seed=14)
    key, _ = make_case(8, 192, seed=15)
    stacked = quantize_gptq(torch.cat([query, key]), hessian, MANY[:2])
    separate = [quantize_gptq(query, hessian, MANY[:2]), quantize_gptq(key, hessian, MANY[:2])]
    for i in range(2):
        both = torch.cat([decode(separate[0][i]), decode(separate[1][i])])
        assert count_rows_that_differ(decode(stacked[i]), both) <= 1


@pytest.mark.parametrize("act_order", ["off", "static"])
def test_uncorrelated_inputs_mean_rounding_to_nearest(act_order: gptq.ActOrder) -> None:
    weight, _ = make_case(16, 96, seed=16)
    hessian = torch.diag(0.5 + torch.rand(96, generator=torch.Generator().manual_seed(1)))
    for scheme in (IntScheme(3, 32, True), IntScheme(4, 32, False), IntScheme(3, None, False)):
        (result,) = quantize_gptq(weight, hessian, [scheme], act_order=act_order)
        grid = fit_grid(weight, scheme, "mse", hessian.diagonal())
        assert torch.allclose(result.grid.scale, grid.scale, rtol=1e-6, atol=0)
        codes = quantize_to_grid(weight, grid, scheme)
        assert int((result.codes != codes).sum()) <= 1  # a weight half-way between two levels


# --- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", ["off", "static"])
def test_output_error_is_less_than_half_of_mse_rounding(symmetric: bool, act_order: gptq.ActOrder) -> None:
    weight, hessian = make_case(96, 256, seed=17)
    schemes = [IntScheme(bits, 64, symmetric) for bits in (2, 3, 4, 6)]
    errors = []
    for scheme, result in zip(schemes, quantize_gptq(weight, hessian, schemes, act_order=act_order), strict=True):
        rounded = min(
            float(proxy_error(weight, dequantize_codes(quantize_to_grid(weight, grid, scheme), grid, scheme), hessian))
            for grid in (fit_grid(weight, scheme), fit_grid(weight, scheme, "mse", hessian.diagonal()))
        )
        errors.append(float(proxy_error(weight, decode(result), hessian)))
        assert errors[-1] < rounded / 2, scheme
    assert errors == sorted(errors, reverse=True)


def test_static_order_is_better_where_inputs_differ_in_size() -> None:
    weight, hessian = make_case(96, 256, seed=18, spread=1.0)
    scheme = IntScheme(3, 64, True)
    error = {
        order: float(proxy_error(weight, decode(quantize_gptq(weight, hessian, [scheme], act_order=order)[0]), hessian))
        for order in ("off", "static")
    }  # type: dict[str, float]
    assert error["static"] < 0.95 * error["off"]


def test_results_can_be_stored() -> None:
    weight, hessian = make_case(12, 192, seed=19)
    for act_order in ("off", "static"):
        for result in quantize_gptq(weight, hessian, MANY, act_order=act_order, scale_dtype=torch.float16):  # type: ignore[arg-type]
            assert result.codes.dtype == torch.int8
            assert torch.equal(result.grid.scale, result.grid.scale.half().float())
            assert (result.grid.zero_point is None) == result.scheme.symmetric
            parts = pack(result.codes, result.grid.scale, result.grid.zero_point, result.scheme, torch.float16)
            assert torch.equal(dequantize(parts, result.scheme), decode(result))


def test_the_scale_of_the_hessian_does_not_matter_and_inputs_stay_as_they_were() -> None:
    weight, hessian = make_case(12, 192, seed=20)
    weight_before, hessian_before = weight.clone(), hessian.clone()
    first = quantize_gptq(weight, hessian, MANY[:2])
    assert torch.equal(weight, weight_before)
    assert torch.equal(hessian, hessian_before)
    for want, got in zip(first, quantize_gptq(weight, hessian * 2.0**40, MANY[:2]), strict=True):
        assert torch.equal(want.codes, got.codes)
    for want, got in zip(first, quantize_gptq(weight.double(), hessian.double(), MANY[:2]), strict=True):
        assert torch.equal(want.codes, got.codes)
    assert quantize_gptq(weight, hessian, []) == []


# --- hard Hessians ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", ["off", "static"])
@pytest.mark.parametrize("importance", [True, False])
def test_dead_inputs_are_rounded_to_nearest_and_leave_the_others_alone(
    act_order: gptq.ActOrder, importance: bool
) -> None:
    weight, hessian = make_case(16, 96, seed=21)
    dead = [0, 5, 40, *range(64, 96)]  # a whole group as well
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    scheme = IntScheme(3, 32, False)
    (result,) = quantize_gptq(weight, hessian, [scheme], act_order=act_order, importance=importance)
    dense = decode(result)
    nearest = dequantize_codes(quantize_to_grid(weight, result.grid, scheme), result.grid, scheme)
    assert torch.allclose(dense[:, dead], nearest[:, dead], rtol=0, atol=1e-6)
    assert not torch.allclose(dense, nearest, rtol=0, atol=1e-6)  # the living ones do make up for each other
    assert float(proxy_error(weight, dense, hessian)) < float(proxy_error(weight, nearest, hessian))
    assert float((dense - weight)[:, 64:].square().sum() / weight[:, 64:].square().sum()) < 0.1  # a real grid there too


def test_dead_inputs_need_no_damping() -> None:
    """A dead column must not make the factor fail, which would damp the living ones as well."""
    weight, hessian = make_case(16, 64, seed=24, spread=0.0)
    hessian = (hessian / hessian.trace()).double().matrix_power(3)  # so ill-conditioned that damping changes codes
    scheme = IntScheme(3, None, True)
    (alone,) = quantize_gptq(weight, hessian, [scheme], damping=0.0, importance=False)
    with_dead = torch.nn.functional.pad(hessian, (0, 2, 0, 2))
    wider = torch.nn.functional.pad(weight, (0, 2))  # zeros do not move the grid
    (result,) = quantize_gptq(wider, with_dead, [scheme], damping=0.0, importance=False)
    assert count_rows_that_differ(decode(alone), decode(result)[:, :64]) <= 1
    assert bool((decode(result)[:, 64:] == 0).all())


def test_no_input_at_all_means_rounding_to_nearest() -> None:
    weight, _ = make_case(8, 64, seed=22)
    scheme = IntScheme(4, 32, True)
    (result,) = quantize_gptq(weight, torch.zeros(64, 64), [scheme])
    grid = fit_grid(weight, scheme)
    assert int((result.codes != quantize_to_grid(weight, grid, scheme)).sum()) <= 1


def test_fewer_tokens_than_columns_are_damped_until_it_works() -> None:
    weight, _ = make_case(8, 64, seed=23)
    inputs = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    hessian = inputs.t() @ inputs  # rank 10: not positive definite, by float rounding even slightly negative
    scheme = IntScheme(3, 32, True)
    for damping in (0.0, 1e-12, 0.01):
        (result,) = quantize_gptq(weight, hessian, [scheme], damping=damping)
        grid = fit_grid(weight, scheme, "mse", hessian.diagonal())
        rounded = dequantize_codes(quantize_to_grid(weight, grid, scheme), grid, scheme)
        assert float(proxy_error(weight, decode(result), hessian)) < 0.5 * float(
            proxy_error(weight, rounded, hessian)
        ), damping


def change(tensor: Tensor, row: int, column: int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[row, column] = value
    return tensor


EYE = torch.eye(32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hessian": EYE[:31]}, r"hessian: found shape \[31, 32\], wanted \[32, 32\]"),
        ({"hessian": change(EYE, 3, 4, torch.nan)}, "hessian: found NaN or infinite"),
        ({"hessian": change(EYE, 3, 4, torch.inf)}, "hessian: found NaN or infinite"),
        ({"hessian": change(EYE, 3, 3, -1.0)}, "hessian: found a negative diagonal"),
        ({"hessian": torch.eye(32) - 1 + torch.diag(torch.ones(32))}, "hessian: not positive definite"),
        ({"weight": torch.zeros(32)}, r"weight: found shape \[32\]"),
        ({"weight": torch.full((2, 32), torch.inf)}, "weight: found 64 NaN or infinite"),
        ({"schemes": [IntScheme(4, 16, True), IntScheme(4, 12, True)]}, "group_size 12 does not divide the 32 columns"),
        ({"act_order": "dynamic"}, "act_order: found 'dynamic'"),
        ({"block": 0}, "block: found 0"),
    ],
)
def test_what_cannot_be_quantized_is_refused(arguments: dict[str, object], message: str) -> None:
    sound: dict[str, object] = {"weight": torch.ones(2, 32), "hessian": EYE, "schemes": [IntScheme(4, 16, True)]}
    quantize_gptq(**sound)  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        quantize_gptq(**(sound | arguments))  # type: ignore[arg-type]
