"""Search of d, levels and codes for the fork's types of `ik_codebooks` on the CPU, compiled by numba. Import lazily.

Minimises the sum of importance * (weight - decoded)^2, a row at a time:

1. For every scale block of 32 weights the best of a few trial scales, by least squares from the codes that each finds.
2. d from the largest of them, times the factor for which levels come nearest to all of them.
3. For that d every block takes the best of the levels nearest to its scale, of either sign, with either table.
4. d by least squares from the codes found, and codes again; kept if it helps.

What makes it fast: the nearest of 2^13 to 2^16 sequences is looked for in a few of several hundred clusters of them.
Sequences are clustered once, by k-means from evenly spaced starts, so that the same arguments give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numba import get_num_threads, njit
from numpy.typing import NDArray

from recompile.io.threads import torch_threads_kept

Floats = NDArray[np.float32]
Integers = NDArray[np.int32]

_FASTMATH = {"nnan", "nsz", "contract", "reassoc"}
_BLOCK = 32
# Trial scales: parts of the one that gives the table a block's energy, and of the one that gives it its largest weight.
_TRIALS = ((0.9, 1.05, 1.2), (1.0, 1.2, 1.45, 1.7))
_TRIALS_SMALL = ((0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.7, 2.0), ())  # of small tables
_FEW_LEVELS = 32  # up to so many, the second nearest is tried as well
_REFITS = 2
_FACTORS = np.linspace(0.7, 1.3, 61).astype(np.float32)  # on d
_PROBES_FIRST, _PROBES = 4, 16  # clusters that are looked through for a trial, and in the end
_ROUNDS = 6  # of k-means
_SMALL = 64  # sequences that need no clusters


class Clusters(NamedTuple):
    """A table of sequences in clusters, [tables] in turn.

    values:  float32 [tables, weights, n], sequences of a cluster side by side; codes: int32 [tables, n], which they are
    centers: float32 [tables, weights, clusters]; starts: int32 [tables, clusters + 1], where each begins in `values`
    """

    values: Floats
    codes: Integers
    centers: Floats
    starts: Integers


class Target(NamedTuple):
    """What the search has to know of a type.

    levels:   all that a scale block may have, ascending
    negative: whether signs of weights are stored apart from sequences, which are absolute values then
    half:     True where d is stored as float16, False for float32
    """

    levels: Any
    negative: bool
    half: bool


class _Room(NamedTuple):
    """Scratch: distances to sequences of a cluster and to clusters, and the clusters that are looked through."""

    near: Floats
    far: Floats
    chosen: Integers


class Found(NamedTuple):
    """d: float32 [rows], exact in the stored dtype; levels: int32, indexes into `Target.levels`, and tables: int32,
    [rows, scale blocks]; codes: int32 [rows, columns / weights of a code]."""

    d: Floats
    levels: Integers
    tables: Integers
    codes: Integers

    def of_rows(self, rows: slice) -> Found:
        """Views."""
        return Found(self.d[rows], self.levels[rows], self.tables[rows], self.codes[rows])


def clustered(tables: Sequence[Floats]) -> Clusters:
    """Tables of sequences, float32 [n, weights of a code] each, in clusters of about 128; takes seconds."""
    made = [_cluster(table) for table in tables]
    return Clusters(*(np.stack(parts) for parts in zip(*made, strict=True)))


def _cluster(values: Floats) -> tuple[Floats, Integers, Floats, Integers]:
    count = 1 if len(values) <= _SMALL else len(values) // 128
    centers = values[:: len(values) // count][:count].copy()
    nearest = np.zeros(len(values), np.int64)
    for _ in range(_ROUNDS if count > 1 else 0):
        for start in range(0, len(values), 4096):
            part = values[start : start + 4096]
            nearest[start : start + 4096] = ((centers**2).sum(1) - 2 * part @ centers.T).argmin(1)
        sums = np.stack([np.bincount(nearest, values[:, i], count) for i in range(values.shape[1])], 1)
        sizes = np.bincount(nearest, minlength=count)
        filled = sizes > 0
        centers[filled] = (sums[filled] / sizes[filled, None]).astype(np.float32)
    order = np.argsort(nearest, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(nearest, minlength=count))))
    return (
        np.ascontiguousarray(values[order].T),
        order.astype(np.int32),
        np.ascontiguousarray(centers.T),
        starts.astype(np.int32),
    )


def search(target: Target, clusters: Clusters, weight: Floats, importance: Floats) -> Found:
    """weight: float32 [rows, columns], finite, columns a multiple of 32; importance: float32 [columns], above 0.

    The search runs on as many threads as numba is set to; the result does not depend on their number."""
    rows, columns = weight.shape
    target = target._replace(levels=np.array(target.levels, np.float32))
    blocks, weights = columns // _BLOCK, clusters.values.shape[1]
    found = Found(
        np.zeros(rows, np.float32),
        np.zeros((rows, blocks), np.int32),
        np.zeros((rows, blocks), np.int32),
        np.zeros((rows, columns // weights), np.int32),
    )
    of_energy, of_largest = _TRIALS_SMALL if clusters.values.shape[2] <= _SMALL else _TRIALS
    mean, largest = np.sqrt((clusters.values.astype(np.float64) ** 2).mean()), np.abs(clusters.values).max()
    of_both = [*((part / mean, 0) for part in of_energy), *((0, part / largest) for part in of_largest)]
    trials = np.array(of_both, np.float32)
    threads = max(1, min(get_num_threads(), rows))
    bounds = np.linspace(0, rows, threads + 1).astype(int)

    def part(number: int) -> None:
        own = slice(bounds[number], bounds[number + 1])
        _encode(target, clusters, weight[own], importance, trials, found.of_rows(own))

    with torch_threads_kept(), ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(threads)))
    return found


# ---- compiled --------------------------------------------------------------------------------------------------------


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _distances(values, begin, end, t, w, out):  # type: ignore[no-untyped-def]
    """out[m - begin]: weighted squared distance of t [weights] to sequence m. Returns the least."""
    least = np.float32(3e38)
    t0, t1, w0, w1 = t[0], t[1], w[0], w[1]  # numbers of their own, which `out` cannot overlap
    if values.shape[0] == 8:
        t2, t3, t4, t5, t6, t7 = t[2], t[3], t[4], t[5], t[6], t[7]
        w2, w3, w4, w5, w6, w7 = w[2], w[3], w[4], w[5], w[6], w[7]
        for m in range(end - begin):
            d0 = t0 - values[0, begin + m]
            d1 = t1 - values[1, begin + m]
            d2 = t2 - values[2, begin + m]
            d3 = t3 - values[3, begin + m]
            d4 = t4 - values[4, begin + m]
            d5 = t5 - values[5, begin + m]
            d6 = t6 - values[6, begin + m]
            d7 = t7 - values[7, begin + m]
            near = w0 * d0 * d0 + w1 * d1 * d1 + w2 * d2 * d2 + w3 * d3 * d3
            out[m] = near + w4 * d4 * d4 + w5 * d5 * d5 + w6 * d6 * d6 + w7 * d7 * d7
    elif values.shape[0] == 4:
        t2, t3, w2, w3 = t[2], t[3], w[2], w[3]
        for m in range(end - begin):
            d0 = t0 - values[0, begin + m]
            d1 = t1 - values[1, begin + m]
            d2 = t2 - values[2, begin + m]
            d3 = t3 - values[3, begin + m]
            out[m] = w0 * d0 * d0 + w1 * d1 * d1 + w2 * d2 * d2 + w3 * d3 * d3
    else:
        for m in range(end - begin):
            d0 = t0 - values[0, begin + m]
            d1 = t1 - values[1, begin + m]
            out[m] = w0 * d0 * d0 + w1 * d1 * d1
    for m in range(end - begin):
        least = min(least, out[m])
    return least


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _first(out, count, wanted):  # type: ignore[no-untyped-def]
    for m in range(count):
        if out[m] == wanted:
            return m
    return 0


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _nearest_clusters(far, count, probes, chosen):  # type: ignore[no-untyped-def]
    """The `probes` least of `far`, nearest first, into `chosen`."""
    filled, worst = 0, np.float32(3e38)
    for c in range(count):
        if far[c] < worst or filled < probes:
            at = min(filled, probes - 1)
            while at > 0 and far[chosen[at - 1]] > far[c]:
                chosen[at] = chosen[at - 1]
                at -= 1
            chosen[at] = c
            filled = min(filled + 1, probes)
            if filled == probes:
                worst = far[chosen[probes - 1]]


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _nearest(clusters, table, t, w, probes, room):  # type: ignore[no-untyped-def]
    """Place among `values` of the nearest sequence in the `probes` nearest clusters."""
    values, centers, starts = clusters.values[table], clusters.centers[table], clusters.starts[table]
    count = centers.shape[1]
    probes = min(probes, count)
    if count > 1:
        _distances(centers, 0, count, t, w, room.far)
        _nearest_clusters(room.far, count, probes, room.chosen)
    best, place = np.float32(3e38), 0
    for probe in range(probes):
        begin, end = starts[room.chosen[probe]], starts[room.chosen[probe] + 1]
        least = _distances(values, begin, end, t, w, room.near)
        if least < best:
            best, place = least, begin + _first(room.near, end - begin, least)
    return place


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _assign(target, clusters, table, x, w, scale, probes, places, room):  # type: ignore[no-untyped-def]
    """Places of the nearest sequences of a block [32] at a scale; (sum w x v, sum w v v), v with its signs."""
    weights = clusters.values.shape[1]
    values = clusters.values[table]
    t = np.empty(weights, np.float32)
    cross, energy = 0.0, 0.0
    for group in range(_BLOCK // weights):
        first = group * weights
        for i in range(weights):
            t[i] = x[first + i] / scale
            if target.negative:
                t[i] = abs(t[i])
        place = _nearest(clusters, table, t, w[first : first + weights], probes, room)
        places[group] = place
        for i in range(weights):
            v = values[i, place]
            own = abs(x[first + i]) if target.negative else x[first + i]
            cross += w[first + i] * own * v
            energy += w[first + i] * v * v
    return cross, energy


@njit(nogil=True, cache=True)
def _level_near(levels, wanted):  # type: ignore[no-untyped-def]
    best = 0
    for n in range(levels.shape[0]):
        if abs(levels[n] - wanted) < abs(levels[best] - wanted):
            best = n
    return best


@njit(nogil=True, cache=True)
def _stored(d, unit, half):  # type: ignore[no-untyped-def]
    """d, in parts of unit, as the type holds d * unit; 0 where that is too small for it."""
    whole = np.float64(d) * unit
    if half:
        whole = _to_half(min(max(whole, -65504.0), 65504.0))
    return np.float64(np.float32(whole)) / unit


@njit(nogil=True, cache=True)
def _to_half(value):  # type: ignore[no-untyped-def]
    """Rounded to the nearest float16, ties to even; subnormal ones are multiples of 2^-24."""
    if value == 0.0:
        return 0.0
    unit = 2.0 ** (max(math.floor(math.log2(abs(value))), -14) - 10)
    return np.rint(value / unit) * unit


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _block_scale(target, clusters, x, w, trials, places, room, out):  # type: ignore[no-untyped-def]
    """The scales of the best two trials and sum w v v of the best into `out` [3], which stays 0 for a block of zeros;
    both signs where the table is small.

    trials: float32 [n, 2], parts of the block's root mean square and of its largest weight that a scale is tried at"""
    total, counts, largest = 0.0, 0.0, 0.0
    for i in range(_BLOCK):
        total += w[i] * x[i] * x[i]
        counts += w[i]
        largest = max(largest, abs(x[i]))
    if total <= 0.0:
        return
    start = math.sqrt(total / counts)
    best, second = -1.0, -1.0
    for trial in range(trials.shape[0]):
        for sign in range(2 if clusters.values.shape[2] <= _SMALL else 1):
            tried = np.float32((start * trials[trial, 0] + largest * trials[trial, 1]) * (1 - 2 * sign))
            cross, energy = _assign(target, clusters, 0, x, w, tried, _PROBES_FIRST, places, room)
            if energy <= 0.0:
                continue
            gain = cross * cross / energy
            if gain > best:
                second, out[1] = best, out[0]
                best, out[0], out[2] = gain, cross / energy, energy
            elif gain > second:
                second, out[1] = gain, cross / energy


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _best_factor(levels, scales, energies, d):  # type: ignore[no-untyped-def]
    """d times the factor for which levels of either sign come nearest to the scales, an error by the block's energy."""
    best, chosen = np.inf, d
    for factor in _FACTORS:
        tried, cost = d * factor, 0.0
        for b in range(scales.shape[0]):
            if scales[b] == 0.0:
                continue
            one = scales[b] - tried * levels[_level_near(levels, scales[b] / tried)]
            other = scales[b] + tried * levels[_level_near(levels, -scales[b] / tried)]
            near = min(abs(one), abs(other))
            cost += energies[b] * near * near
        if cost < best:
            best, chosen = cost, tried
    return chosen


@njit(nogil=True, cache=True)
def _levels_to_try(levels, scales, d, out):  # type: ignore[no-untyped-def]
    """Indexes of the levels nearest to two scales / d, of either sign, and where there are few levels of their
    neighbours; returns how many."""
    count = 0
    for n in range(4):
        wanted = scales[n // 2] / d * (1 - 2 * (n % 2))
        near = _level_near(levels, wanted)
        other = near + 1 if levels[near] < wanted else near - 1
        for level in (near, other):
            of_sign = 0 <= level < levels.shape[0] and levels[level] * wanted > 0
            passed = level != near and levels.shape[0] > _FEW_LEVELS
            for m in range(count):
                passed = passed or out[m] == level
            if of_sign and not passed:
                out[count] = level
                count += 1
    if count == 0 and levels[_level_near(levels, 0.0)] != 0.0:
        out[0] = _level_near(levels, 0.0)
        count = 1
    return count


class _Choice(NamedTuple):
    """Of every scale block of a row: index of its level, its table, places of its sequences [blocks, groups]."""

    levels: Integers
    tables: Integers
    places: Integers


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _choose(target, clusters, x, w, scales, d, refit, choice, room):  # type: ignore[no-untyped-def]
    """Fills `choice` for a row [columns] at d, with the levels and tables that it has where `refit`; returns (error,
    sum w x level v, sum w level v level v)."""
    blocks, groups = choice.places.shape
    places, tried = np.empty(groups, np.int32), np.empty(8, np.int32)
    error, cross, energy = 0.0, 0.0, 0.0
    zero = _level_near(target.levels, 0.0)
    for b in range(blocks):
        own_x, own_w = x[b * _BLOCK : (b + 1) * _BLOCK], w[b * _BLOCK : (b + 1) * _BLOCK]
        whole = 0.0
        for i in range(_BLOCK):
            whole += own_w[i] * own_x[i] * own_x[i]
        best = whole if target.levels[zero] == 0.0 else np.inf
        best_cross, best_energy = 0.0, 0.0
        first_table, tables = 0, clusters.values.shape[0]
        if refit:
            tried[0], count = choice.levels[b], 1
            first_table, tables = choice.tables[b], choice.tables[b] + 1
        else:
            choice.levels[b] = zero
            count = _levels_to_try(target.levels, scales[b], d, tried)
        for n in range(count):
            level = target.levels[tried[n]]
            if level == 0.0:
                continue
            for table in range(first_table, tables):
                c, e = _assign(target, clusters, table, own_x, own_w, np.float32(d * level), _PROBES, places, room)
                size = abs(d * level) if target.negative else d * level
                own = whole - 2.0 * size * c + size * size * e
                if own < best:
                    best, best_cross, best_energy = own, (size / d) * c, level * level * e
                    choice.levels[b], choice.tables[b] = tried[n], table
                    choice.places[b] = places
        error += best
        cross += best_cross
        energy += best_energy
    return error, cross, energy


@njit(nogil=True, fastmath=_FASTMATH, cache=True)
def _encode(target, clusters, weight, importance, trials, found):  # type: ignore[no-untyped-def]
    blocks, groups = weight.shape[1] // _BLOCK, _BLOCK // clusters.values.shape[1]
    levels = target.levels
    room = _Room(
        np.empty(clusters.values.shape[2], np.float32),
        np.empty(clusters.centers.shape[2], np.float32),
        np.zeros(_PROBES, np.int32),
    )
    places = np.empty(groups, np.int32)
    scales = np.zeros((blocks, 3))  # see `_block_scale`
    extreme = levels[0] if abs(levels[0]) > abs(levels[-1]) else levels[-1]
    zero = _level_near(levels, 0.0)
    for row in range(weight.shape[0]):
        found.levels[row] = zero
        unit = np.abs(weight[row]).max()  # weights are in parts of it, so that no square is too large or too small
        if unit == 0.0:
            continue
        x = weight[row] / unit
        choice = _Choice(
            np.full(blocks, zero, np.int32), np.zeros(blocks, np.int32), np.zeros((blocks, groups), np.int32)
        )
        top = 0.0
        for b in range(blocks):
            own = slice(b * _BLOCK, (b + 1) * _BLOCK)
            scales[b] = 0.0
            _block_scale(target, clusters, x[own], importance[own], trials, places, room, scales[b])
            top = max(top, abs(scales[b, 0]))
        wanted = _best_factor(levels, scales[:, 0], scales[:, 2], top / extreme) if top > 0.0 else 0.0
        d = _stored(wanted, unit, target.half)
        least = np.inf
        for turn in range(1 + _REFITS):
            if d == 0.0:
                break
            error, cross, energy = _choose(target, clusters, x, importance, scales, d, turn > 0, choice, room)
            if error >= least:
                break
            least = error
            found.d[row] = np.float32(d * unit)
            for b in range(blocks):
                found.levels[row, b], found.tables[row, b] = choice.levels[b], choice.tables[b]
                codes = clusters.codes[choice.tables[b]]
                for g in range(groups):
                    found.codes[row, b * groups + g] = codes[choice.places[b, g]]
            d = _stored(cross / energy, unit, target.half) if energy > 0.0 else 0.0
