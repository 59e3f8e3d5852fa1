"""Two-sided rounding: against brute force on tiny matrices, a plain loop on larger ones, GPTQ for Hout = I."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats import exl2, exl3
from recompile.formats.packed_int import IntScheme
from recompile.formats.schemes import parse_scheme
from recompile.quantize import exl2 as exl2_encoder
from recompile.quantize import exl3 as exl3_encoder
from recompile.quantize import two_sided
from recompile.quantize.float_grids import LEVELS, fit_levels
from recompile.quantize.gptq import quantize_gptq
from recompile.quantize.gptq_float import round_gptq
from recompile.quantize.two_sided import (
    MatrixRounding,
    OutputStatistics,
    RoundingGrid,
    choose_damping,
    grid_of_integers,
    grid_of_levels,
    level_table,
    proxy,
    round_two_sided,
    round_where_better,
)

ROUNDERS = ["numba", "torch"]


@pytest.fixture(params=ROUNDERS)
def rounder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(two_sided, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")
    return str(request.param)


def covariance(size: int, samples: int, seed: int, spread: float = 0.5) -> Tensor:
    """Of correlated vectors whose entries differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1).rsqrt()
    x = torch.randn(samples, size, generator=generator) @ mix * (spread * torch.randn(size, generator=generator)).exp()
    return x.t() @ x / samples


def unit_grid(out_features: int, in_features: int, high: float = 3) -> RoundingGrid:
    ones = torch.ones(out_features, 1)
    return RoundingGrid(ones, torch.zeros(in_features, dtype=torch.long), -high * ones, high * ones)


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix.double() + damping * matrix.double().diagonal().mean() * torch.eye(len(matrix)).double()


# ---- by brute force --------------------------------------------------------------------------------------------------


def first_sweep(weight: Tensor, inputs: Tensor, outputs: Tensor, order: list[tuple[int, int]], top: int) -> Tensor:
    """Coordinate descent's first sweep: every entry in turn takes the level with which the loss can still become least
    if all entries that come after it were free real numbers. The loss is e^T (Hout x Hin) e, by least squares."""
    out_features, in_features = weight.shape
    metric = torch.kron(outputs, inputs)
    places = [r * in_features + c for r, c in order]
    error = torch.zeros(out_features * in_features, dtype=torch.float64)
    levels = torch.zeros_like(weight)
    for number, (r, c) in enumerate(order):
        done, free = places[: number + 1], places[number + 1 :]
        losses = {}
        for level in range(-top, top + 1):
            trial = error.clone()
            trial[places[number]] = weight[r, c] - level
            fixed = trial[done]
            loss = fixed @ metric[done][:, done] @ fixed
            if free:
                pull = metric[free][:, done] @ fixed
                loss = loss - pull @ torch.linalg.solve(metric[free][:, free], pull)
            losses[level] = float(loss)
        best = min(losses, key=lambda level: losses[level])
        levels[r, c] = best
        error[places[number]] = weight[r, c] - best
    return levels


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_first_sweep_of_brute_force_coordinate_descent(rounder: str, seed: int) -> None:
    out_features, in_features = 3, 4
    weight = 1.5 * torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(100 + seed))
    inputs, outputs = covariance(in_features, 40, seed), covariance(out_features, 40, seed + 50)
    columns = inputs.diagonal().argsort(descending=True).tolist()
    rows = outputs.diagonal().argsort(descending=True).tolist()
    order = [(r, c) for c, r in itertools.product(columns, rows)]  # rows within a column
    wanted = first_sweep(weight.double(), damped(inputs, 0.01), damped(outputs, 0.3), order, 3)
    (found,) = round_two_sided(weight, inputs, outputs, [unit_grid(out_features, in_features)], 0.01, 0.3)
    assert torch.equal(found.double(), wanted)
    assert not torch.equal(found, weight.round().clamp(-3, 3)), "feedback moved something"


# ---- against a plain loop --------------------------------------------------------------------------------------------


def plain_two_sided(weight: Tensor, inputs: Tensor, outputs: Tensor, *grid: Tensor) -> Tensor:
    """One entry after another in float64, no blocks; F_rc is computed whole for every entry.

    grid: scale, lowest and highest level, [O, I] each"""
    columns = inputs.diagonal().argsort(descending=True, stable=True)
    rows = outputs.diagonal().argsort(descending=True, stable=True)

    def unit_upper(matrix: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
        return lower / lower.diagonal()

    u = unit_upper(damped(inputs, 0.01)[columns][:, columns])
    v = unit_upper(damped(outputs, 1.0)[rows][:, rows])
    w, s, lo, hi = (t.double()[rows][:, columns] for t in (weight, *grid))
    error, levels = torch.zeros_like(w), torch.zeros_like(w)
    for c in range(w.shape[1]):
        for r in range(w.shape[0]):
            aim = w[r, c] + v[: r + 1, r] @ error[: r + 1] @ u[:, c]
            levels[r, c] = (aim / s[r, c]).round().clamp(lo[r, c], hi[r, c])
            error[r, c] = w[r, c] - levels[r, c] * s[r, c]
    back = torch.empty_like(levels)
    back[rows[:, None], columns] = levels
    return back.float()


@pytest.mark.parametrize("symmetric", [True, False])
def test_tiles_change_nothing(rounder: str, symmetric: bool) -> None:
    """130 rows and 96 columns: more than one tile both ways, none of them whole."""
    weight = torch.randn(130, 96, generator=torch.Generator().manual_seed(3)) * 0.02
    inputs, outputs = covariance(96, 400, 4), covariance(130, 500, 5)
    (quantized,) = quantize_gptq(weight, inputs, [IntScheme(3, 32, symmetric)], act_order="static")
    grid = grid_of_integers(quantized)
    assert grid.low is not None
    assert grid.high is not None
    wanted = plain_two_sided(weight, inputs, outputs, *(t[:, grid.group] for t in (grid.scale, grid.low, grid.high)))
    (found,) = round_two_sided(weight, inputs, outputs, [grid])
    assert int((found != wanted).sum()) <= 130, "a tie or two sends what follows elsewhere"
    spread = grid.scale[:, grid.group]
    outputs, inputs = damped(outputs, 1.0).float(), damped(inputs, 0.01).float()
    errors = [proxy(weight - levels * spread, inputs, outputs) for levels in (found, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)
    before = quantized.codes.float() if grid.low.min() == grid.low.max() else None
    if before is not None:
        assert errors[0] < proxy(weight - before * spread, inputs, outputs)


# ---- one-sided is a case of it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_with_hout_the_identity_it_is_gptq_bit_for_bit(rounder: str, bits: int, symmetric: bool) -> None:
    weight = torch.randn(70, 96, generator=torch.Generator().manual_seed(bits)) * 0.02
    inputs = covariance(96, 300, 7)
    (quantized,) = quantize_gptq(weight, inputs, [IntScheme(bits, 32, symmetric)], act_order="static")
    (found,) = round_two_sided(weight, inputs, torch.eye(70), [grid_of_integers(quantized)])
    zero = quantized.grid.zero_point
    codes = found if zero is None else found + zero.float().repeat_interleave(32, 1)
    assert torch.equal(codes.to(torch.int8), quantized.codes)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-channel", "w8a8", "mxfp8", "mxfp6"])
def test_float_grids_too(rounder: str, name: str) -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) * 0.02
    inputs = covariance(64, 200, 7)
    grid = fit_levels(weight, parse_scheme(name))
    (wanted,) = round_gptq(weight, inputs, [grid])
    (found,) = round_two_sided(weight, inputs, torch.eye(48), [grid_of_levels(grid, 64)])
    assert int((found != wanted).sum()) <= 2, "errors near 1e-7 may tip one entry"
    assert torch.equal(grid.levels.round(found), found), "all are levels of the type"


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_level_tables_hold_what_rounding_gives(name: str) -> None:
    """Also half way between two levels, where the even one is taken, by both ways of looking a level up."""
    levels = LEVELS[name]
    if name == "int8":
        return
    table = level_table(levels.round, levels.largest)
    values = torch.cat([torch.linspace(-1.1, 1.1, 4001) * levels.largest, (table[1:] + table[:-1]) / 2, table])
    wanted = levels.round(values)
    assert torch.equal(two_sided._nearest(table, (table[1:] + table[:-1]) / 2, values), wanted)
    pytest.importorskip("numba")
    numba = importlib.import_module("recompile.quantize.two_sided_cpu")
    assert [numba._nearest(table.numpy(), value) for value in values.numpy()] == wanted.tolist()


# ---- how much of Hout to believe -------------------------------------------------------------------------------------


def gradients(tokens: int, seed: int, size: int = 40, common: float = 1.0) -> Tensor:
    """E[g g^T] of so many tokens, whose entries share a few directions."""
    directions = torch.randn(3, size, generator=torch.Generator().manual_seed(11))
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(tokens, size, generator=generator)
    shared = torch.randn(tokens, 3, generator=generator) @ directions
    x = own + common * shared
    return x.t() @ x / tokens


def test_more_tokens_are_damped_less_and_noise_is_not_followed() -> None:
    many = OutputStatistics(gradients(20000, 1), gradients(2000, 2), 20000, 2000)
    few = OutputStatistics(gradients(60, 3), gradients(2000, 2), 60, 2000)
    noise = OutputStatistics(gradients(50, 4, common=0), gradients(5000, 5, common=0), 50, 5000)
    damping_many, ratio_many = choose_damping(many)
    damping_few, ratio_few = choose_damping(few)
    assert damping_many is not None
    assert damping_few is not None
    assert damping_many < damping_few
    assert ratio_many < ratio_few < 1
    assert choose_damping(noise)[1] > 0.99
    assert choose_damping(OutputStatistics(torch.eye(4), torch.zeros(4, 4), 1, 0)) == (None, 1.0)


def test_a_matrix_keeps_its_one_sided_levels_unless_held_out_rows_say_better() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(8)) * 0.02
    inputs = covariance(64, 300, 9)
    (quantized,) = quantize_gptq(weight, inputs, [IntScheme(3, 32, True)], act_order="static")
    grid, before = grid_of_integers(quantized), quantized.codes.float()
    held_out = gradients(2000, 2)
    ((after, done),) = round_where_better(
        weight, inputs, OutputStatistics(gradients(20000, 1), held_out, 20000, 2000), [grid], [before]
    )
    spread = grid.scale[:, grid.group]
    measured = proxy(weight - after * spread, inputs, held_out) / proxy(weight - before * spread, inputs, held_out)
    assert done.rounding == "two-sided"
    assert done.ratio == pytest.approx(measured)
    assert measured < 0.95
    assert "two-sided, 0." in done.note()

    # held-out gradients of the opposite correlations: whatever was learnt is wrong there
    flip = torch.ones(40)
    flip[::2] = -1
    opposite = held_out * flip * flip[:, None]
    kept = round_where_better(weight, inputs, OutputStatistics(gradients(99, 1), opposite, 99, 9), [grid], [before])[0]
    assert torch.equal(kept[0], before)
    assert kept[1].rounding == "one-sided"
    assert kept[1].reason
    assert round_where_better(weight, inputs, None, [grid], [before])[0][0] is before
    assert MatrixRounding("one-sided").note() == ""


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(FormatError, match=r"outputs: found shape \[3, 3\], wanted \[2, 2\]"):
        round_two_sided(torch.zeros(2, 4), torch.eye(4), torch.eye(3), [unit_grid(2, 4)])
    statistics = OutputStatistics(torch.eye(3), torch.eye(3), 1, 1)
    with pytest.raises(FormatError, match="output statistics"):
        round_where_better(torch.zeros(2, 4), torch.eye(4), statistics, [unit_grid(2, 4)], [torch.zeros(2, 4)])


# ---- EXL2 and EXL3 ---------------------------------------------------------------------------------------------------


def correlated_outputs(size: int) -> OutputStatistics:
    return OutputStatistics(gradients(20000, 1, size), gradients(2000, 2, size), 20000, 2000)


def test_exl2_codes_are_better_on_held_out_rows_with_the_same_scales() -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(4)) * 0.02
    inputs, outputs = covariance(128, 400, 3), correlated_outputs(96)
    layouts = [exl2_encoder.layout_for_bits(rate, 128, 96) for rate in (2.5, 4.0)]
    notes: list[str] = []
    before = exl2_encoder.quantize_exl2_many(weight, inputs, layouts)
    after = exl2_encoder.quantize_exl2_many(weight, inputs, layouts, None, 0.12, outputs, notes)
    assert [note.startswith("two-sided") for note in notes] == [True, True]
    for old, new in zip(before, after, strict=True):
        assert not torch.equal(old["q_weight"], new["q_weight"])
        assert all(torch.equal(old[part], new[part]) for part in ("q_scale", "q_scale_max", "q_groups", "q_invperm"))
        errors = [weight - exl2.dequantize(parts)[:96].float() for parts in (old, new)]
        assert proxy(errors[1], inputs, outputs.held_out) < 0.97 * proxy(errors[0], inputs, outputs.held_out)


def test_exl3_tiles_aim_at_what_both_sides_ask_for() -> None:
    pytest.importorskip("numba")
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(6)) * 0.02
    inputs, outputs = covariance(128, 400, 3), correlated_outputs(128)
    notes: list[str] = []
    old = exl3_encoder.quantize_exl3(weight, inputs, 2, "mul1")
    new = exl3_encoder.quantize_exl3(weight, inputs, 2, "mul1", outputs=outputs, notes=notes)
    assert notes[0].startswith("two-sided")
    assert not torch.equal(old["trellis"], new["trellis"])
    errors = [weight - exl3.dequantize(parts).float() for parts in (old, new)]
    assert proxy(errors[1], inputs, outputs.held_out) < 0.97 * proxy(errors[0], inputs, outputs.held_out)

    # Every tile is the best path for what the formula, taken whole, asks of it; with no output side it is LDLQ's.
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(7))
    ones = torch.ones(128)
    lower_in, lower_out = (exl3_encoder._feedback(damped(m, 0.3), ones) for m in (inputs, outputs.fit))
    search = exl3_encoder._TwoSided(x, x, inputs.double(), (ones, ones), "mul1", 2, False)
    states = search._search(lower_in, lower_out)
    error = x - exl3.tiles_to_matrix(exl3.codebook_table("mul1", x.device).float()[states])
    aims = x + lower_in.t() @ error @ lower_out - error
    found = exl3_encoder.viterbi(exl3.matrix_to_tiles(aims).view(-1, 256), "mul1", 2).view(states.shape)
    assert (found == states).all(-1).float().mean() > 0.97, "a sum in another order may tip a path"
    assert torch.equal(search._search(lower_in, torch.eye(128)), exl3_encoder._ldlq(x, lower_in, "mul1", 2))
