"""Other projects' quantizers, each in a pinned environment of its own, run on the same base and the same tokens.

    built = build("llm-compressor", base, ids, out, method="gptq", bits=3, group_size=64)

A peer is one program in scripts/peer_programs: it is given a JSON file of settings and a safetensors file of token ids,
calls that project's own public functions, and writes a checkpoint. `recompile.checkpoint` reads all of them.

PEER_PRELOAD=libopenblas.so.0 (and PEER_LIBRARIES=DIR of what that needs) is preloaded into peers: MLX's wheel for CPUs
has the reference BLAS, which multiplies forty times slower.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from eval.engines.environments import ENVIRONMENTS, Environment, clean, install, python_of

ROOT = Path(__file__).resolve().parent
_TORCH = "torch==2.13.0"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def preloaded() -> dict[str, str]:
    """What the environment of this process wants loaded into peers, as variables of theirs."""
    given = {"LD_PRELOAD": "PEER_PRELOAD", "LD_LIBRARY_PATH": "PEER_LIBRARIES"}
    return {name: os.environ[own] for name, own in given.items() if own in os.environ}


@dataclass(frozen=True)
class Peer:
    """environment: its pinned packages; program: file in scripts/peer_programs."""

    environment: Environment
    program: str

    @property
    def version(self) -> str:
        return f"{self.environment.package} {self.environment.version}"


PEERS = {
    "llm-compressor": Peer(
        Environment(
            "llm-compressor", ("llmcompressor==0.14.0.1", _TORCH, "datasets"), 1.6, "from llmcompressor import oneshot"
        ),
        "llm_compressor.py",
    ),
    "auto-round": Peer(
        Environment("auto-round", ("auto-round==0.16.1", _TORCH, "datasets"), 1.8, "from auto_round import AutoRound"),
        "auto_round_.py",
    ),
    "mlx-lm": Peer(ENVIRONMENTS["mlx"], "mlx_lm_.py"),
}


class PeerFailed(Exception):
    """A peer's program ended with an error; its last words are the message."""


@dataclass(frozen=True)
class Built:
    """A checkpoint and what it took to make it, processes it started included."""

    path: Path
    cpu_seconds: float | None  # None: it was there, and nobody had taken the time


def timed(out: Path, make: Callable[[], object]) -> Built:
    """What `make` leaves at `out`, unless it is there; the time is kept beside it."""
    record = out.with_name(out.name + ".seconds")
    if out.exists():
        return Built(out, float(record.read_text()) if record.exists() else None)
    began = _cpu_seconds()
    make()
    seconds = _cpu_seconds() - began
    record.write_text(f"{seconds}\n")
    print(f"{out.name}: {seconds:.0f} CPU s", file=sys.stderr)
    return Built(out, seconds)


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def build(peer: str, base: Path, ids: Tensor, out: Path, *, threads: int = 1, **settings: Any) -> Built:
    """out, made by `peer` from `base` with the token ids [rows, length]; kept where it is there already.

    Raises PeerFailed with what the program printed last.
    """
    row = PEERS[peer]
    install(row.environment)
    out.parent.mkdir(parents=True, exist_ok=True)
    return timed(out, lambda: _run(row, base, ids, out, threads, settings))


def _run(row: Peer, base: Path, ids: Tensor, out: Path, threads: int, settings: Mapping[str, Any]) -> None:
    partial, log = out.with_name(out.name + ".partial"), out.with_name(out.name + ".log")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch, log.open("w") as said:
        rows, given = Path(scratch) / "rows.safetensors", Path(scratch) / "settings.json"
        save_file({"input_ids": ids.contiguous()}, rows)
        given.write_text(json.dumps({"base": str(base), "out": str(partial), "rows": str(rows), **settings}))
        done = subprocess.run(
            [str(python_of(row.environment)), "-I", str(ROOT / "peer_programs" / row.program), str(given)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=clean() | OFFLINE | preloaded() | dict.fromkeys(THREADS, str(threads)),
            cwd=scratch,
        )
    if done.returncode:
        raise PeerFailed(f"{row.version}: {log}: {log.read_text().strip().splitlines()[-1:]}")
    partial.rename(out)
