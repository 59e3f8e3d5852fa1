"""Profiles spread over the workers of a Ray cluster.

A task of the exact profile is the swaps of one layer (a worker process keeps the reference's states from one task to
the next), a task of the sketch some rows of one sweep. Batches have the shapes of a run in one process and every worker
computes with as many threads as the driver, so that on equal processors the results are equal bit for bit. Ray starts
the task of a worker that died again elsewhere; the journal stays with the driver, so whatever else happens costs only
what had not come back yet.

Workers open the checkpoints by the paths of the driver: they need the same file system, and this package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.passes.adjoint import PassPlan
from eval.profile.exact import ExactProfiler, Measured, MemoryPlan, ProfileJob, Started
from eval.profile.sketch import Sketch, SketchJob, SketchOptions, SketchProgress, join_rows, profile_sketch
from recompile.costs import Measurement, Profile, ProfileHeader, open_journal
from recompile.errors import RecompileError
from recompile.model.stream import LayeredModel

RETRIES = 3  # of a task whose worker died
TASKS_PER_WORKER = 4  # of a sketch, where its rows give so many: the last ones to end are then short
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SwapsJob:
    """What a worker needs to measure any swap of one profile."""

    job: ProfileJob
    header: ProfileHeader
    plan: MemoryPlan
    threads: int


class _Swaps:
    """A journal in memory that lacks just the swaps of one task."""

    def __init__(self, header: ProfileHeader, swaps: Sequence[tuple[str, str]]) -> None:
        wanted = set(swaps)
        zero = (0.0,) * header.rows
        others = {
            (group.name, source): Measurement(group.name, source, zero)
            for group in header.groups
            for source in group.bits
            if (group.name, source) not in wanted
        }
        self.control = None if ("", "") in wanted else Measurement(None, None, zero)
        self.profile = Profile(header, self.control, others)
        self.found: list[Measurement] = []

    def append(self, measurements: Sequence[Measurement]) -> None:
        self.found += measurements


_profilers: dict[str, ExactProfiler] = {}  # of this worker process, by reference and rows


def measure(given: SwapsJob, swaps: Sequence[tuple[str, str]]) -> list[Measurement]:
    """The swaps (group, candidate label) of one task; ("", "") is the control. Runs in a worker."""
    torch.set_num_threads(given.threads)
    header = given.header
    key = f"{header.reference_fingerprint} {header.rows_sha256} {header.context} {header.base}"
    if key not in _profilers:
        _profilers.clear()
        model = given.job.model()
        _profilers[key] = ExactProfiler(given.job, model, given.job.context(model), header, given.plan)
    journal = _Swaps(header, swaps)
    for _ in _profilers[key].run(journal):  # type: ignore[arg-type]
        pass
    return journal.found


def profile_on_ray(job: ProfileJob, *, address: str | None = None) -> Iterator[Started | Measured | Profile]:
    """`eval.profile.exact.profile_exact` over a Ray cluster; the same events, journal and results.

    address: of a running cluster ("auto", "ray://host:10001"); None: one on this machine, ended with the run. A cluster
    that this process is connected to already is used as it is.
    Raises RecompileError where Ray is not installed, the cluster is not reached, or a task fails again and again.
    """
    model = job.model()
    header = job.header(model.dtype)
    job.context(model)  # raises here what each worker would
    plan = job.plan(model, header)
    given = SwapsJob(job, header, plan, torch.get_num_threads())
    with open_journal(job.path, header) as journal:
        missing = journal.profile.missing()
        total = sum(len(group.bits) for group in header.groups)
        yield Started(plan, total, total - len(missing))
        done = total - len(missing)
        tasks = _tasks(header, missing, journal.profile.control is None)
        with _connected(address, job.path, given.threads) as ray:
            for _, found in _as_they_come(ray, measure, given, tasks):
                journal.append(found)
                for measurement in found:
                    done += measurement.group is not None
                    yield Measured(measurement, done, total)
        profile = journal.profile
    if job.options.context == "clean" and profile.control is not None and any(profile.control.kl_rows):
        raise RecompileError(
            f"{job.path}: the control (nothing swapped) has a KL above 0: workers do not compute alike"
        )
    yield profile


def sketch_on_ray(
    job: ProfileJob, sketch_options: SketchOptions | None = None, *, address: str | None = None
) -> Iterator[object]:
    """`eval.profile.sketch.profile_sketch` over a Ray cluster; the same events, files and results.

    Sweeps are kept by the driver, in their order, when the last of their rows has come back; address and errors as of
    `profile_on_ray`."""

    def sweeps(sketch: SketchJob, plan: PassPlan, first: int) -> Generator[SketchProgress | Sketch]:
        with _connected(address, job.path, torch.get_num_threads()) as ray:
            workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
            tasks = _row_tasks(sketch, plan, first, workers)
            waiting: dict[int, dict[int, Sketch]] = {}  # sweep -> first row -> what was sampled
            blocks = len(tasks) // max(1, sketch.sweeps - first)
            due, given = first, (sketch, plan, torch.get_num_threads())
            for done, ((sweep, rows), found) in enumerate(_as_they_come(ray, sample, given, tasks), 1):
                waiting.setdefault(sweep, {})[rows.start] = found
                yield SketchProgress(done, len(tasks), f"sweep {sweep + 1}, rows {rows.start + 1} to {rows.stop}")
                while len(waiting.get(due, ())) == blocks:
                    parts = waiting.pop(due)
                    yield join_rows([parts[start] for start in sorted(parts)])
                    due += 1

    return profile_sketch(job, sketch_options, sweeps=sweeps)


_models: dict[str, LayeredModel] = {}  # of this worker process, by reference


def sample(given: tuple[SketchJob, PassPlan, int], task: tuple[int, slice]) -> Sketch:
    """Some rows of one sweep. Runs in a worker."""
    (sketch, plan, threads), (sweep, rows) = given, task
    torch.set_num_threads(threads)
    key = f"{sketch.header.reference_fingerprint} {sketch.header.dtype} {sketch.header.device}"
    if key not in _models:
        _models.clear()
        _models[key] = sketch.job.model()
    *_, found = sketch.run(sweep, rows, _models[key], plan, None)
    assert isinstance(found, Sketch), "what was sampled comes last"
    return found


def _row_tasks(sketch: SketchJob, plan: PassPlan, first: int, workers: int) -> list[tuple[int, slice]]:
    """(sweep, rows) of all tasks. Rows come in whole batches of the run in one process, so that the shapes are its
    own; several batches together share the decoding of candidates, as far as that leaves every worker a few tasks."""
    rows, sweeps = sketch.header.rows, range(first, sketch.sweeps)
    batches = -(-rows // plan.batch_rows)
    together = max(1, batches * len(sweeps) // (TASKS_PER_WORKER * workers))
    size = plan.batch_rows * together
    return [(sweep, slice(start, min(rows, start + size))) for sweep in sweeps for start in range(0, rows, size)]


def check_cluster(address: str | None) -> None:
    """Before anything is read or written, raise RecompileError where Ray is not installed, or for what is no address of
    a cluster: HOST:PORT, ray://HOST:PORT (for which Ray's client is needed), or auto. None: one on this machine."""
    ray, _ = _import_ray()
    if address is None or address == "auto" or ray.is_initialized():
        return
    found = re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:]+\]|[A-Za-z0-9_.-]{1,253}):([0-9]{1,5})", address)
    if found is None or not 0 < int(found[3]) < 65536:
        raise RecompileError(
            f"{{ray}} {address}: no address of a cluster; wanted HOST:PORT, auto, or no address at all"
        )
    if found[1] and importlib.util.find_spec("grpc") is None:
        raise RecompileError(f"{{ray}} {address}: Ray's client is not installed; pip install 'ray[client]'")


def _import_ray() -> tuple[Any, type[Exception]]:
    """The ray module, and its class of errors. Raises RecompileError where it is not installed."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise RecompileError("{ray}: Ray is not installed; pip install 'recompile[ray]'") from error
    return ray, RayError


@contextmanager
def _connected(address: str | None, path: Path, threads: int) -> Iterator[Any]:
    """The ray module, connected; a connection that is begun here ends with the block."""
    ray, ray_error = _import_ray()
    begun = not ray.is_initialized()
    try:
        if begun:
            check_cluster(address)
            ray.init(
                address=address,
                include_dashboard=False if address is None else None,
                log_to_driver=False,
                runtime_env={"env_vars": {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": str(threads)}},
            )
        yield ray
    except (ray_error, ConnectionError) as error:
        reason = str(error).strip().split("\n")[-1]
        raise RecompileError(
            f"{{ray}}: {type(error).__name__}: {reason}; {path} holds what came back, the same command goes on"
        ) from error
    finally:
        if begun and ray.is_initialized():
            ray.shutdown()


def _as_they_come(
    ray: Any, work: Callable[[Any, Any], Any], job: Any, tasks: Sequence[Any]
) -> Iterator[tuple[Any, Any]]:
    """Run work(job, task) for all tasks on the workers; yields (task, result) in the order of their ends."""
    shared = ray.put(job)
    remote = ray.remote(max_retries=RETRIES)(work)
    waiting = {remote.remote(shared, task): task for task in tasks}
    try:
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(ready), ray.get(ready)
    finally:
        for left in waiting:
            ray.cancel(left)


def _tasks(header: ProfileHeader, missing: Sequence[tuple[str, str]], control: bool) -> list[list[tuple[str, str]]]:
    """The swaps of every layer; what is in no layer, and the control, are tasks of their own."""
    layer_of = {group.name: group.layer for group in header.groups}
    by_layer: dict[int | None, list[tuple[str, str]]] = {}
    for swap in missing:
        by_layer.setdefault(layer_of[swap[0]], []).append(swap)
    return [*by_layer.values(), *([[("", "")]] if control else [])]


def _python_path() -> str:
    """Where workers find this package, when it is run from its folder."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    installed = [folder for folder in sys.path if "site-packages" in folder]
    return os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, given), *installed]))
