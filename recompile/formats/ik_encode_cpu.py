"""Search of d, levels, shift bits and codes for the fork's IQ*_K types on the CPU, compiled by numba. Import lazily.

Minimises the sum of importance * (weight - decoded)^2. Whatever shares one d (a row, or a block of 256) is called a
span and is searched on its own (ik quants format spec, "What an encoder has to find"; the method below is ours):

1. For every scale block, both signs of the scale and both shift bits: the best of a few trial scales.
2. d from the largest of these scales, times a few factors; for each d every scale block takes the best of 16
   candidates, the four levels nearest to each of its four scales. The d of the least error wins.
3. d by least squares from the codes found, then levels and codes again; kept if it helps.

What makes it fast: 16 candidate scales are priced at once, a SIMD lane each, four for every sign and shift bit. The
price of a weight is a chain of fused multiply-adds and minimums over the grid, with no table and no branch, and finds
no code; codes are found only for the winner. With the even parity of IQ4_KSS a weight has two such prices, for codes of
either parity, and a group of four pays the least change where the parities do not fit: that is the exact minimum over
its legal codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads, njit
from numpy.typing import NDArray

from recompile.io.threads import torch_threads_kept

_FASTMATH = {"nnan", "nsz", "contract", "reassoc"}  # no NaN ever enters; sums may be fused and reordered
_LANES = 16  # lane = 8 * (scale is negative) + 4 * (shift bit) + place among four candidates
_F16_MAX = 65504.0
_HUGE = np.float32(3e38)
_NOTHING = np.float32(1e-20)  # part of a span's largest weight below which a scale block counts as zero

# Trial scales put the largest weight of a scale block at a geometric row of places, from `first` times the nearer end
# of the grid to `last` times the farther one. grid values -> (first, last, trials). More trials gained under 0.1 % of
# error with 8 and more values, 0.5 % with four.
_TRIALS = {4: (0.6, 1.4, 16), 8: (0.75, 1.3, 8), 16: (0.85, 1.2, 8), 32: (0.9, 1.15, 8), 64: (0.95, 1.1, 8)}
# Factors on the d that lets the largest scale have the largest level. With 7 bits of level others gained nothing, with
# fewer 0.5 to 1 % of error.
_FACTORS_FINE = (1.0,)
_FACTORS_COARSE = (1.0, 0.93, 1.06)
_FINE_LEVELS = 128
_REFITS = 1  # a second one gained under 0.05 %


class Target(NamedTuple):
    """What the search has to know of a type.

    grid, shift, levels, scale_block, even_parity: as in `recompile.formats.ik.IkType`
    span:   weights that share one d; 0 for a whole row
    half:   True where d is stored as float16, False for float32
    """

    grid: tuple[int, ...]
    shift: int
    levels: tuple[int, int, int]
    scale_block: int
    even_parity: bool
    span: int
    half: bool


class Found(NamedTuple):
    """d: float32 [rows, spans], exact in the stored dtype; levels: int16 and shifts: uint8 [rows, scale blocks]; codes:
    uint8 [rows, columns]."""

    d: NDArray[np.float32]
    levels: NDArray[np.int16]
    shifts: NDArray[np.uint8]
    codes: NDArray[np.uint8]

    def of_rows(self, rows: slice) -> Found:
        """Views."""
        return Found(self.d[rows], self.levels[rows], self.shifts[rows], self.codes[rows])


def search(target: Target, weight: NDArray[np.float32], importance: NDArray[np.float32]) -> Found:
    """Best d, levels, shift bits and codes of each row, on `numba.get_num_threads()` threads.

    weight:     float32 [rows, columns], finite, contiguous; columns a multiple of the span
    importance: float32 [columns], positive, mean about 1
    """
    rows, columns = weight.shape
    span = target.span or columns
    scale_blocks = columns // target.scale_block
    found = Found(
        np.zeros((rows, columns // span if columns else 0), np.float32),
        np.zeros((rows, scale_blocks), np.int16),
        np.zeros((rows, scale_blocks), np.uint8),
        np.zeros((rows, columns), np.uint8),
    )
    if not weight.size:
        return found
    first, last, trials = _TRIALS[len(target.grid)]
    near, far = sorted((-target.grid[0], target.grid[-1]))
    places = np.geomspace(first * near, last * far, trials).astype(np.float32)
    low, high, step = target.levels
    factors = np.array(_FACTORS_FINE if (high - low) // step + 1 >= _FINE_LEVELS else _FACTORS_COARSE)
    kernel = _kernel(target.grid, target.even_parity)
    order = _order(target.scale_block, target.even_parity)
    layout = _Layout(target.scale_block, span, order, np.float32(target.shift), low, high, step, target.half)

    def run(part: slice) -> None:
        kernel(weight[part], importance, layout, places, factors, found.of_rows(part))

    with torch_threads_kept():
        threads = min(get_num_threads(), rows)
    chunks = 1 if threads == 1 else min(rows, 4 * threads)  # a few a thread, since the cores may be shared
    parts = [slice(rows * i // chunks, rows * (i + 1) // chunks) for i in range(chunks)]
    if threads == 1:
        run(parts[0])
    else:
        with ThreadPoolExecutor(threads) as pool:  # the kernel holds no lock of Python
            list(pool.map(run, parts))
    return found


class _Layout(NamedTuple):
    """What a kernel has to know of a type, and of its spans.

    size: weights of a scale block; order: int64 [size], stored weight -> place in its block; shift: float32, what a
    shift bit adds; low, high, step: the levels; half: as in `Target`
    """

    size: int
    span: int
    order: Any
    shift: Any
    low: int
    high: int
    step: int
    half: bool


class _Block(NamedTuple):
    """One scale block: the weights begin to end of a span. x: in units of its largest weight, w: their importance."""

    x: Any
    w: Any
    begin: int
    end: int


class _Grid(NamedTuple):
    """The values of a type's codes, as the prices need them: (q - g)^2 = q^2 + squares + twice * q.

    grid_codes: uint8, the codes of even parity before those of odd parity; even_* and odd_*: the values of either
    """

    values: Any
    grid_codes: Any
    squares: Any
    twice: Any
    even_squares: Any
    even_twice: Any
    odd_squares: Any
    odd_twice: Any


class _Lanes(NamedTuple):
    """Room for what is priced at once, float32 [_LANES] each. shift: what a lane's shift bit adds to the grid; price:
    error in units of scale^2; least: the least error of the trials so far."""

    shift: Any
    scale: Any
    inverse: Any
    level: Any
    price: Any
    least: Any


def _order(size: int, even_parity: bool) -> NDArray[np.int64]:
    """Stored weight -> place in its scale block: the four of an IQ4_KSS word lie together."""
    order = np.arange(size)
    return 2 * (order >> 2) + 16 * (order & 1) + ((order >> 1) & 1) if even_parity else order


def _grid_of(grid_values: tuple[int, ...]) -> _Grid:
    values = np.array(grid_values, np.float32)
    odd = np.array([bin(code).count("1") & 1 for code in range(len(values))])
    squares, twice = values * values, -2 * values
    grid_codes = np.argsort(odd, kind="stable").astype(np.uint8)  # even parity first
    return _Grid(
        values, grid_codes, squares, twice, squares[odd == 0], twice[odd == 0], squares[odd == 1], twice[odd == 1]
    )


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _least(squares: Any, twice: Any, q: Any) -> Any:
    """min over the grid of (q - g)^2, less q^2. Rounding: about 1e-3 of a grid unit squared, far below a step."""
    least = squares[0] + twice[0] * q
    for k in range(1, squares.shape[0]):
        least = min(least, squares[k] + twice[k] * q)
    return least


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _price_plain(grid: Any, block: Any, lanes: Any) -> None:
    """price[lane] = sum of w * (x * inverse - nearest value)^2: the error in units of the lane's scale squared."""
    squares, twice, x, w = grid.squares, grid.twice, block.x, block.w
    inverse, shift, price = lanes.inverse, lanes.shift, lanes.price
    for lane in range(_LANES):
        price[lane] = np.float32(0)
    for i in range(block.begin, block.end):
        x_i, w_i = x[i], w[i]
        for lane in range(_LANES):
            q = x_i * inverse[lane] - shift[lane]
            price[lane] += w_i * (q * q + _least(squares, twice, q))


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _price_both(even_squares: Any, even_twice: Any, odd_squares: Any, odd_twice: Any, q: Any, w: Any) -> Any:
    """(price of the nearest code, price of changing its parity, 1 if the nearest code is odd) of one weight."""
    even, odd = _least(even_squares, even_twice, q), _least(odd_squares, odd_twice, q)
    return w * (q * q + min(even, odd)), w * abs(even - odd), np.int32(odd < even)


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _price_parity(grid: Any, block: Any, lanes: Any) -> None:
    """As `_price_plain`, where each four weights must take codes whose parities sum to an even number."""
    e_sq, e_tw, o_sq, o_tw = grid.even_squares, grid.even_twice, grid.odd_squares, grid.odd_twice
    x, w, inverse, shift, price = block.x, block.w, lanes.inverse, lanes.shift, lanes.price
    for lane in range(_LANES):
        price[lane] = np.float32(0)
    for i in range(block.begin, block.end, 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for lane in range(_LANES):
            # Written out: a loop over the four would be the one that LLVM vectorises.
            p0, c0, odd0 = _price_both(e_sq, e_tw, o_sq, o_tw, x0 * inverse[lane] - shift[lane], w0)
            p1, c1, odd1 = _price_both(e_sq, e_tw, o_sq, o_tw, x1 * inverse[lane] - shift[lane], w1)
            p2, c2, odd2 = _price_both(e_sq, e_tw, o_sq, o_tw, x2 * inverse[lane] - shift[lane], w2)
            p3, c3, odd3 = _price_both(e_sq, e_tw, o_sq, o_tw, x3 * inverse[lane] - shift[lane], w3)
            change = min(min(c0, c1), min(c2, c3))
            price[lane] += p0 + p1 + p2 + p3 + np.float32(odd0 ^ odd1 ^ odd2 ^ odd3) * change


@njit(fastmath=_FASTMATH, error_model="numpy")
def _choose_plain(values: Any, x: Any, begin: int, end: int, inverse: Any, shift: Any, codes: Any) -> None:
    """The code of the value nearest to x * inverse - shift, for each weight."""
    for i in range(begin, end):
        codes[i] = 0
    for k in range(values.shape[0] - 1):
        middle = (values[k] + values[k + 1]) * np.float32(0.5)
        for i in range(begin, end):
            codes[i] += np.uint8(x[i] * inverse - shift > middle)


@njit(fastmath=_FASTMATH, error_model="numpy")
def _choose_parity(
    values: Any, grid_codes: Any, x: Any, w: Any, begin: int, end: int, inverse: Any, shift: Any, codes: Any
) -> None:
    """The codes whose price `_price_parity` finds."""
    half = values.shape[0] // 2
    for i in range(begin, end, 4):
        odd_sum: Any = False
        least, changed, other = _HUGE, i, np.uint8(0)
        for j in range(i, i + 4):
            q = x[j] * inverse - shift
            even_gap, even_code, odd_gap, odd_code = _HUGE, np.uint8(0), _HUGE, np.uint8(0)
            for k in range(half):
                gap = abs(q - values[grid_codes[k]])
                if gap < even_gap:
                    even_gap, even_code = gap, grid_codes[k]
                gap = abs(q - values[grid_codes[half + k]])
                if gap < odd_gap:
                    odd_gap, odd_code = gap, grid_codes[half + k]
            change = w[j] * abs(even_gap * even_gap - odd_gap * odd_gap)
            codes[j] = odd_code if odd_gap < even_gap else even_code
            odd_sum ^= odd_gap < even_gap
            if change < least:
                least, changed, other = change, j, even_code if odd_gap < even_gap else odd_code
        if odd_sum:
            codes[changed] = other


@njit(fastmath=_FASTMATH, error_model="numpy")
def _stored_d(d: float, half: bool, unit: float) -> Any:
    """d as its stored dtype rounds it, never to zero in float16; d counts in units of the span's largest weight."""
    if not half:
        return np.float32(d * unit) / unit
    size = min(abs(d) * unit, _F16_MAX)
    last_place = math.ldexp(1.0, max(math.frexp(size)[1], -13) - 11)  # subnormal below 2^-14
    size = max(np.rint(size / last_place), 1.0) * last_place
    return (size if d > 0 else -size) / unit


# The parts of the search. All are inlined as source, so that the grid stays a constant in them. `parity`: the codes
# are those of IQ4_KSS, constant, too.


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _price(grid: Any, parity: bool, block: Any, lanes: Any) -> None:
    """lanes.price at lanes.inverse, of the weights of a scale block."""
    if parity:
        _price_parity(grid, block, lanes)
    else:
        _price_plain(grid, block, lanes)


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _choose(grid: Any, parity: bool, block: Any, d: Any, level: Any, moved: Any, codes: Any) -> None:
    """The best codes of a scale block's weights, at the scale d * level and the shift `moved`."""
    x, w, begin, end = block.x, block.w, block.begin, block.end
    inverse = np.float32(1 / (d * level)) if level != 0 else np.float32(0)
    if parity:
        _choose_parity(grid.values, grid.grid_codes, x, w, begin, end, inverse, moved, codes)
    else:
        _choose_plain(grid.values, x, begin, end, inverse, moved, codes)


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _try_scales(grid: Any, parity: bool, block: Any, places: Any, lanes: Any, best_scales: Any) -> Any:
    """1. The best trial scale of one scale block for every sign and shift bit, into best_scales [_LANES], where each
    stands four times: in the four lanes that will try the levels next to it.

    A trial scale puts the block's largest weight at one of `places` on the grid; four are priced at a time.
    Returns the energy (error of decoding to zeros) and the best of the four scales, signed.
    """
    x, w = block.x, block.w
    largest: Any = np.float32(0)
    energy: Any = np.float32(0)
    for i in range(block.begin, block.end):
        largest = max(largest, abs(x[i]))
        energy += w[i] * x[i] * x[i]
    found: Any = np.float32(0)
    if largest < _NOTHING:
        for lane in range(_LANES):
            best_scales[lane] = np.float32(0)
    else:
        for lane in range(_LANES):
            lanes.least[lane] = _HUGE
        for t in range(0, places.shape[0], 4):
            for lane in range(_LANES):
                place = places[t + (lane & 3)] / largest
                lanes.inverse[lane] = place if lane < 8 else -place
            _price(grid, parity, block, lanes)
            for lane in range(_LANES):
                trial = np.float32(1) / lanes.inverse[lane]
                error = lanes.price[lane] * trial * trial
                if error < lanes.least[lane]:
                    lanes.least[lane], lanes.scale[lane] = error, trial
        winner = 0
        for four in range(0, _LANES, 4):
            best_lane = four
            for lane in range(four + 1, four + 4):
                if lanes.least[lane] < lanes.least[best_lane]:
                    best_lane = lane
            for lane in range(four, four + 4):
                best_scales[lane] = lanes.scale[best_lane]
            if lanes.least[best_lane] < lanes.least[winner]:
                winner = best_lane
        found = lanes.scale[winner]
    return energy, found


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _price_levels(
    grid: Any, parity: bool, block: Any, layout: Any, d: Any, best_scales: Any, energy: Any, lanes: Any
) -> Any:
    """2. The best level and shift bit of one scale block at one d: of each of its four scales the four nearest levels
    are priced. Level 0 decodes to zeros, and costs the energy. Returns the error and the lane; lanes.level has levels.
    """
    low, high, step = layout.low, layout.high, layout.step
    per_level, d_f = np.float32(1 / (d * step)), np.float32(d)
    first_index, last_index = np.float32(-low / step - 1), np.float32((high - low) // step)
    for lane in range(_LANES):
        index = max(np.floor(best_scales[lane] * per_level + first_index), np.float32(0))
        index = min(index + np.float32(lane & 3), last_index)
        lanes.level[lane] = np.float32(low) + np.float32(step) * index
        lanes.scale[lane] = d_f * lanes.level[lane]
        lanes.inverse[lane] = np.float32(1) / lanes.scale[lane] if lanes.level[lane] != 0 else np.float32(0)
    _price(grid, parity, block, lanes)
    least: Any = _HUGE
    for lane in range(_LANES):
        error = lanes.price[lane] * lanes.scale[lane] * lanes.scale[lane] if lanes.level[lane] != 0 else energy
        lanes.price[lane] = error
        least = min(least, error)
    winner = 0
    for lane in range(_LANES):
        if lanes.price[lane] == least:
            winner = lane
    return least, winner


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _refit(grid: Any, parity: bool, x: Any, w: Any, layout: Any, d: Any, levels: Any, shifts: Any, codes: Any) -> Any:
    """3. The two sums whose ratio is the d of least squares, with the levels and shift bits found and the codes that
    are best at them and d."""
    above, below = 0.0, 0.0
    for b in range(levels.shape[0]):
        begin, end = b * layout.size, (b + 1) * layout.size
        moved = layout.shift * np.float32(shifts[b])
        _choose(grid, parity, _Block(x, w, begin, end), d, levels[b], moved, codes)
        part_above: Any = np.float32(0)
        part_below: Any = np.float32(0)
        for i in range(begin, end):
            value = grid.values[codes[i]] + moved
            part_above += w[i] * x[i] * value
            part_below += w[i] * value * value
        above += float(levels[b]) * part_above
        below += float(levels[b]) ** 2 * part_below
    return above, below


@njit(fastmath=_FASTMATH, error_model="numpy", inline="always")
def _load(weight: Any, importance: Any, row: int, start: int, layout: Any, x: Any, w: Any) -> Any:
    """One span into x, in units of its largest weight, which is returned, and w; within scale blocks in order.
    A span of zeros is not loaded."""
    size, order = layout.size, layout.order
    unit = 0.0
    for i in range(x.shape[0]):
        unit = max(unit, abs(float(weight[row, start + i])))
    if unit != 0.0:
        for begin in range(0, x.shape[0], size):
            for i in range(size):
                x[begin + i] = weight[row, start + begin + order[i]] / unit
                w[begin + i] = importance[start + begin + order[i]]
    return unit


@lru_cache(maxsize=16)
def _kernel(grid_values: tuple[int, ...], even_parity: bool) -> Callable[..., None]:
    """Compiled search for one grid. The grid is a constant of the code: its loops are unrolled, its values folded."""
    grid = _grid_of(grid_values)

    @njit(fastmath=_FASTMATH, error_model="numpy", nogil=True, cache=True)
    def encode(weight: Any, importance: Any, layout: Any, places: Any, factors: Any, out: Any) -> None:
        size, span, shift = layout.size, layout.span, layout.shift
        count = span // size
        x, w = np.empty(span, np.float32), np.empty(span, np.float32)
        scales = np.empty((count, _LANES), np.float32)  # best trial scales, as _try_scales leaves them
        energy = np.empty(count, np.float32)  # error of a scale block that decodes to zeros
        levels, shifts = np.empty(count, np.int16), np.empty(count, np.uint8)
        best_levels, best_shifts = np.empty(count, np.int16), np.empty(count, np.uint8)
        codes = np.empty(span, np.uint8)
        room = np.empty((6, _LANES), np.float32)
        lanes = _Lanes(room[0], room[1], room[2], room[3], room[4], room[5])
        for lane in range(_LANES):
            lanes.shift[lane] = shift * np.float32((lane >> 2) & 1)
        extreme = layout.low if -layout.low > layout.high else layout.high

        for row in range(weight.shape[0]):
            for s in range(weight.shape[1] // span):
                start, first_block = s * span, s * count
                for b in range(count):
                    out.levels[row, first_block + b] = extreme  # any legal level, where d stays zero
                unit = _load(weight, importance, row, start, layout, x, w)
                if unit == 0.0:
                    continue
                top = 0.0  # signed scale of the largest magnitude
                total_energy = 0.0
                for b in range(count):
                    block = _Block(x, w, b * size, (b + 1) * size)
                    zeros, scale = _try_scales(grid, even_parity, block, places, lanes, scales[b])
                    energy[b] = zeros
                    total_energy += zeros
                    if abs(scale) > abs(top):
                        top = float(scale)

                # Turns: d from the largest scale by each of the factors, then by least squares.
                best, d = np.inf, 0.0
                for turn in range(factors.shape[0] + _REFITS):
                    if turn < factors.shape[0]:
                        trial_d = _stored_d(top / extreme * factors[turn], layout.half, unit)
                    else:
                        above, below = _refit(grid, even_parity, x, w, layout, d, best_levels, best_shifts, codes)
                        trial_d = _stored_d(above / below, layout.half, unit) if below > 0.0 else 0.0
                    if trial_d == 0.0 or trial_d == d:
                        continue
                    total_error = 0.0
                    for b in range(count):
                        block = _Block(x, w, b * size, (b + 1) * size)
                        error, winner = _price_levels(
                            grid, even_parity, block, layout, trial_d, scales[b], energy[b], lanes
                        )
                        levels[b] = np.int16(lanes.level[winner])
                        shifts[b] = np.uint8((winner >> 2) & 1)
                        total_error += error
                    if total_error < best:
                        best, d = total_error, trial_d
                        for b in range(count):
                            best_levels[b], best_shifts[b] = levels[b], shifts[b]

                if best >= total_energy:  # nothing near the weights can be stored (a float16 d is too coarse): zeros
                    continue
                out.d[row, s] = np.float32(d * unit)
                for b in range(count):
                    begin = b * size
                    out.levels[row, first_block + b] = best_levels[b]
                    out.shifts[row, first_block + b] = best_shifts[b]
                    moved = shift * np.float32(best_shifts[b])
                    _choose(grid, even_parity, _Block(x, w, begin, begin + size), d, best_levels[b], moved, codes)
                    for i in range(size):
                        out.codes[row, start + begin + layout.order[i]] = codes[begin + i]

    return encode
