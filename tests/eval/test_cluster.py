"""Profiles on a local Ray cluster of two workers equal those of one process, also when a worker is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.profile.cluster import profile_on_ray, sketch_on_ray
from eval.profile.exact import ProfileJob, ProfileOptions, profile_exact
from eval.profile.sketch import SketchOptions, SketchProgress, SweepDone, SweepStore, profile_sketch
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.costs import Profile, load_profile
from tests import tiny

pytest.importorskip("ray", reason="Ray is not installed: pip install 'recompile[ray]'")
OPTIONS = ProfileOptions(level="tensor")


def workers(task: str) -> list[int]:
    """Processes of Ray that run a function, or wait for more of it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes()
                if words.startswith(b"ray::" + task.encode()) and entry.stat().st_uid == os.getuid():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers; a busy machine may need a second try, Ray waits 30 seconds."""
    import ray

    here = Path(__file__).resolve()
    with pytest.MonkeyPatch.context() as patch:  # which workers inherit: an environment of their own takes others
        patch.setenv("PYTHONPATH", os.pathsep.join([str(here.parents[2]), str(here.parents[1])]))
        patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
        for attempt in range(3):
            try:
                ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
                break
            except Exception as error:  # Ray's own startup raises nothing narrower
                ray.shutdown()
                if attempt == 2:
                    pytest.skip(f"no local Ray cluster starts on this machine: {error}")
        yield ray
        ray.shutdown()


def models() -> tuple[Checkpoint, list[tuple[int, Checkpoint]]]:
    base = open_checkpoint(tiny.base("llama-2"))
    return base, [(bits, open_checkpoint(path)) for bits, path in tiny.variants("llama-2", (2, 3, 4)).items()]


@contextlib.contextmanager
def one_killed(task: str) -> Iterator[list[int]]:
    """Inside it, the first process seen to run the task is killed; it is then in the list."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not killed and not over.wait(0.1):  # workers take seconds to import what they need for a first task
            for process in workers(task)[:1]:
                with contextlib.suppress(ProcessLookupError):  # it ended by itself
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield killed
    finally:
        over.set()
        watcher.join()


def test_an_exact_profile_over_workers_is_that_of_one_process(tmp_path: Path, cluster: Any) -> None:
    base, candidates = models()
    job = ProfileJob(base, 3, candidates, tiny.rows(3, 24), tmp_path / "alone.jsonl", OPTIONS)
    *_, alone = profile_exact(job)
    assert isinstance(alone, Profile)
    *_, spread = profile_on_ray(replace(job, path=tmp_path / "spread.jsonl"))
    assert isinstance(spread, Profile)
    assert spread.is_complete
    assert dict(spread.measurements) == dict(alone.measurements)
    assert spread.control == alone.control
    assert load_profile(tmp_path / "spread.jsonl") == spread
    assert max(measurement.mean for measurement in spread.measurements.values()) > 1e-3


def test_a_sketch_over_workers_is_that_of_one_process(tmp_path: Path, cluster: Any) -> None:
    """Rows of 256 tokens come in batches of two, so 5 rows are 3 tasks a sweep, the last one of a short batch."""
    base, candidates = models()
    job = ProfileJob(base, 3, candidates, tiny.rows(5, 256), tmp_path / "alone.jsonl", OPTIONS)
    wanted = SketchOptions(12, keep_pairs=True)
    *_, alone = profile_sketch(job, wanted)
    with one_killed("sample") as killed:
        events = list(sketch_on_ray(replace(job, path=tmp_path / "spread.jsonl"), wanted))
    assert killed, "no worker was there to be killed"
    assert {event.total for event in events if isinstance(event, SketchProgress)} == {6}
    assert sum(isinstance(event, SweepDone) for event in events) == 2
    spread = events[-1]
    assert isinstance(spread, Profile)
    assert isinstance(alone, Profile)
    assert spread == alone
    pairs = [SweepStore(tmp_path / name, alone.header).load(2).pairs for name in ("alone.jsonl", "spread.jsonl")]
    assert pairs[0] is not None
    assert (pairs[0] == pairs[1]).all()
    assert len({round(found.mean, 6) for found in spread.measurements.values()}) > 10
