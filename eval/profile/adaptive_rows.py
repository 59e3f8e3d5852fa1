"""Rows are added until the total cost is known well enough.

A profile's rows are measured in blocks, each a profile of its own in `<profile>.rows/`, so that more rows cost only
what is new and an interrupted run goes on where it was. After every block all rows so far are put together at
`<profile>`: the same file, and for a sketch the same draws, as a run over that many rows from the beginning.

What is watched is the total of each candidate: the sum over all groups of what they cost when taken from it. Its
standard error is over documents (rows of one document are not independent: they count as one, clustered), and the worst
candidate's, relative to its total, has to come below `rtol`. The error falls as one over the root of the documents, so
a block is as large as that promises to be needed, at most doubling what is there.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eval.profile.sketch import SketchOptions, SweepStore, as_profile, join_rows
from recompile.costs import (
    Measurement,
    Profile,
    ProfileHeader,
    header_difference,
    load_profile,
    open_journal,
)
from recompile.errors import JournalError, OutputError
from recompile.io.files import partial_path, sync_directory
from recompile.model.tokens import Rows

FIRST_ROWS = 8
TIMING_ROWS = 2  # of the first block where time is short: what a row costs is learnt from it
SMALLEST_BLOCK = 4
FILLING_SAMPLES = 3  # draws a row where time is filled with rows: more rows and fewer draws were better, down to two


@dataclass(frozen=True)
class RowLimits:
    """When to stop adding rows: at the first of these. The largest number of rows is that of the rows given."""

    rtol: float | None = 0.05  # wanted standard error of the totals, relative; None: as many rows as time allows
    minutes: float | None = None  # no block is begun that would end later; the first one runs always
    first: int = FIRST_ROWS


@dataclass(frozen=True)
class RowsDone:
    """A block is measured. error: standard error of the worst candidate's total, relative to that total."""

    rows: int
    documents: int
    most: int
    error: float
    candidate: str  # label of the worst one
    limits: RowLimits
    seconds: float  # of this run so far
    reason: str | None  # why no block follows; None where one does
    next_rows: int  # of the next block

    @property
    def reached(self) -> bool:
        return self.limits.rtol is not None and self.error <= self.limits.rtol


def profile_more_rows(
    rows: Rows,
    path: Path,
    limits: RowLimits,
    block: Callable[[Rows, int, Path], Iterator[object]],
    sketch: SketchOptions | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[object]:
    """Measure blocks of rows until a limit is reached; yields the events of every block's profiler, a RowsDone after
    each, and last the Profile of all rows measured, which is then at `path`.

    rows: the most that may be used; block: profiles some rows into a journal, given the number of the first of them
    sketch: the settings of a profiler that samples; None for exact swaps
    clock: seconds by which a limit of time is kept
    Raises JournalError where `path` holds another measurement, and what the profiler raises.
    """
    folder = path.with_name(f"{path.name}.rows")
    started, parts, done, timed = clock(), list[Profile](), 0, list[tuple[int, float]]()
    wanted = min(len(rows.ids), limits.first if limits.minutes is None else min(limits.first, TIMING_ROWS))
    while True:
        stop = min(_kept(folder, done) or done + wanted, len(rows.ids))
        part_path = folder / f"{done:05d}-{stop:05d}.jsonl"
        began, found = clock(), part_path.exists()
        for event in block(rows.part(done, stop), done, part_path):
            if isinstance(event, Profile):
                parts.append(event)
            else:
                yield event
        now = clock()
        timed += [] if found else [(stop - done, now - began)]
        together = publish(path, folder, rows.part(0, stop), parts, sketch)
        state = _judge(together, rows, limits, now - started, timed)
        yield state
        done, wanted = stop, state.next_rows
        if state.reason is not None:
            yield together
            return


def _kept(folder: Path, start: int) -> int | None:
    """Where a block that an earlier run began at this row ends."""
    stops = [re.fullmatch(rf"{start:05d}-(\d{{5}})\.jsonl", found.name) for found in folder.glob(f"{start:05d}-*")]
    return max((int(found[1]) for found in stops if found is not None), default=None)


def affordable_rows(timed: Sequence[tuple[int, float]], left: float) -> int:
    """Rows of a block that ends in `left` seconds. timed: (rows, seconds) of the blocks so far.

    A block costs something of its own (candidates are decoded for it) and something a row: told apart by two blocks of
    unlike sizes; until then all of it is taken for the rows', which ends too early rather than too late."""
    if not timed:
        return TIMING_ROWS if left > 0 else 0
    rows, seconds = timed[-1]
    own, per_row = 0.0, seconds / rows
    other = next(((r, s) for r, s in timed if r != rows), None)
    if other is not None and (slope := (seconds - other[1]) / (rows - other[0])) > 0:
        per_row, own = slope, max(0.0, seconds - slope * rows)
    return max(0, int((left - own) / per_row)) if per_row > 0 else len(timed) * rows


def _judge(
    profile: Profile, rows: Rows, limits: RowLimits, seconds: float, timed: Sequence[tuple[int, float]]
) -> RowsDone:
    done, most = profile.header.rows, len(rows.ids)
    documents = rows.documents[:done]
    error, candidate = worst_total(profile, documents)
    reason, wanted = None, done
    if limits.rtol is not None and error <= limits.rtol:
        reason = "the error wanted is reached"
    elif done == most:
        reason = "no more rows are there"
    elif limits.rtol is not None and math.isfinite(error):
        wanted = min(done, math.ceil(done * (error / limits.rtol) ** 2) - done)
    if reason is None and limits.minutes is not None:
        affordable = affordable_rows(timed, 60 * limits.minutes - seconds)
        if affordable < 1:
            reason = "the time is spent"
        wanted = affordable if limits.rtol is None else min(max(wanted, SMALLEST_BLOCK), affordable)
    else:
        wanted = max(wanted, SMALLEST_BLOCK)
    wanted = min(wanted, most - done)
    counted = len(set(documents))
    return RowsDone(done, counted, most, error, candidate, limits, seconds, reason, 0 if reason else wanted)


def worst_total(profile: Profile, documents: Sequence[str]) -> tuple[float, str]:
    """The largest relative standard error of the candidates' totals, and whose it is.

    documents: of every row; rows of one document are one observation (a cluster: the error of a ratio of sums, Cochran,
    "Sampling Techniques", 3rd edition, section 9A). Infinite for fewer than two documents or a total of 0 or less.
    """
    worst, label = -1.0, ""
    for candidate in profile.header.candidates:
        values = total_rows(profile, candidate.label)
        error = relative_error(values, documents)
        if error > worst:
            worst, label = error, candidate.label
    return worst, label


def total_rows(profile: Profile, label: str) -> NDArray[np.float64]:
    """[rows] float64, the sum over groups of the cost of one candidate; unreached experts and holes add nothing."""
    total = np.zeros(profile.header.rows)
    control = np.array(profile.control.kl_rows) if profile.control is not None else 0.0
    for group in profile.header.groups:
        found = profile.measurements.get((group.name, label))
        if found is not None and found.reached:
            total += np.array(found.kl_rows) - control
    return total


def relative_error(values: NDArray[np.float64], documents: Sequence[str]) -> float:
    """Standard error of the mean of `values` over rows, clustered by document, relative to the mean."""
    names = sorted(set(documents))
    mean = float(values.mean())
    if len(names) < 2 or mean <= 0:
        return math.inf
    at = {name: number for number, name in enumerate(names)}
    sums = np.zeros(len(names))
    np.add.at(sums, [at[name] for name in documents], values - mean)
    variance = float((sums**2).sum()) * len(names) / (len(names) - 1)
    return math.sqrt(variance) / len(values) / mean


# ---- putting blocks together -----------------------------------------------------------------------------------------


def publish(path: Path, folder: Path, rows: Rows, parts: Sequence[Profile], sketch: SketchOptions | None) -> Profile:
    """Write the profile of all rows at `path`, with the sweeps of a sketch beside it; returns it."""
    settings = {key: value for key, value in parts[0].header.settings.items() if key != "first_row"}
    header = replace(
        parts[0].header, rows=len(rows.ids), rows_sha256=rows.sha256, settings=settings, documents=rows.documents
    )
    _check_place(path, header)
    if sketch is None:
        profile = Profile(header, *_joined(parts))
    else:
        stores = [SweepStore(_path_of(folder, part), part.header) for part in parts]
        sweeps = min(store.count() for store in stores)
        profile = _publish_sweeps(path, header, stores, sweeps, sketch)
    partial = partial_path(path)
    try:
        partial.unlink(missing_ok=True)
        with open_journal(partial, header) as journal:
            assert profile.control is not None, "every profiler measures it"
            journal.append([profile.control, *profile.measurements.values()])
        partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return load_profile(path)


def _path_of(folder: Path, part: Profile) -> Path:
    start = int(part.header.settings.get("first_row", 0))
    return folder / f"{start:05d}-{start + part.header.rows:05d}.jsonl"


def _check_place(path: Path, header: ProfileHeader) -> None:
    """Raises JournalError unless `path` is free, or holds the same measurement of other rows."""
    if not path.exists():
        return
    found = load_profile(path).header
    alike = replace(found, rows=header.rows, rows_sha256=header.rows_sha256)
    changed = header_difference(alike, header)
    if changed:
        raise JournalError(
            f"{path}: is the journal of another measurement: {'; '.join(changed)}; choose another {{out}}, or remove "
            f"it and "
            f"{path.name}.rows to start again"
        )


def _joined(parts: Sequence[Profile]) -> tuple[Measurement | None, dict[tuple[str, str], Measurement]]:
    """The control and the measurements of all rows."""

    def rows_of(found: Sequence[Measurement]) -> Measurement:
        values = tuple(value for part in found for value in part.kl_rows)
        return Measurement(found[0].group, found[0].source, values, any(part.reached for part in found))

    controls = [part.control for part in parts if part.control is not None]
    swaps = {swap: rows_of([part.measurements[swap] for part in parts]) for swap in parts[0].measurements}
    return (rows_of(controls) if controls else None), swaps


def _publish_sweeps(
    path: Path, header: ProfileHeader, stores: Sequence[SweepStore], sweeps: int, wanted: SketchOptions
) -> Profile:
    target = SweepStore(path, header)
    for old in target.folder.glob("sweep-*.safetensors"):  # of fewer rows; all of it is in the blocks
        old.unlink()
    for sweep in range(sweeps):
        target.save(sweep, join_rows([store.one(sweep) for store in stores]))
    return as_profile(header, target.load(sweeps), wanted)
