"""The exact profile on a local Ray cluster of two workers equals that of one process, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from eval.cluster import profile_on_ray
from eval.profile import Measured, ProfileOptions, profile_exact
from recompile.checkpoint import open_checkpoint
from recompile.costs import Profile, load_profile

pytest.importorskip("ray", reason="Ray is not installed: pip install 'recompile[ray]'")


def workers() -> list[int]:
    """Processes of Ray that run `measure`, or wait for more of it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                parents = (entry / "status").read_text()
            except OSError:
                continue
            if words.startswith("ray::measure") and f"Uid:\t{os.getuid()}" in parents:
                found.append(int(entry.name))
    return found


def start_cluster() -> Any:
    """Two workers; a busy machine may need a second try, Ray waits 30 seconds."""
    import ray

    here = Path(__file__).resolve()
    variables = {
        "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parents[1])]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    for attempt in range(3):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
            return ray
        except Exception as error:  # Ray's own startup raises nothing narrower
            ray.shutdown()
            if attempt == 2:
                pytest.skip(f"no local Ray cluster starts on this machine: {error}")
    raise AssertionError("unreachable")


def test_a_killed_worker_costs_only_its_task_and_results_are_equal(tmp_path: Path) -> None:
    base = open_checkpoint(tiny.base("llama"))
    candidates = [(bits, open_checkpoint(path)) for bits, path in tiny.variants("llama", (2, 3, 4)).items()]
    ids, options = tiny.rows(3, 24), ProfileOptions(level="tensor")
    *_, alone = profile_exact(base, 3, candidates, ids, tmp_path / "alone.jsonl", options)
    assert isinstance(alone, Profile)

    ray = start_cluster()
    killed = None
    try:
        for event in profile_on_ray(base, 3, candidates, ids, tmp_path / "spread.jsonl", options):
            if isinstance(event, Measured) and killed is None and (alive := workers()):
                killed = alive[0]
                os.kill(killed, signal.SIGKILL)
            if isinstance(event, Profile):
                spread = event
    finally:
        ray.shutdown()
    assert killed is not None, "no worker was there to be killed"
    assert spread.is_complete
    assert dict(spread.measurements) == dict(alone.measurements)
    assert spread.control == alone.control
    assert load_profile(tmp_path / "spread.jsonl") == spread
    assert max(measurement.mean for measurement in spread.measurements.values()) > 1e-3
